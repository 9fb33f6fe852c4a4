"""Attention's first use on a card, begun while the rest of a training is made ready.

Where torch leaves attention to cuDNN, that compiles a kernel when it is first called on a machine,
for half a second; later it finds it in the driver's cache. So it is called beforehand with empty
tensors by a thread, and what comes of that is thrown away. No random numbers are drawn.
"""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.mixers import AttentionSpec, spec_of

# The back ends whose kernels come with torch.
BROUGHT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_RUNNING: list[threading.Thread] = []


def begin(config: ModelConfig, recipe: TrainConfig, device: str) -> None:
    """Begin on a GPU, for a training of these in bf16; returns at once.

    Nothing is raised: what fails here fails again, and is told, in the training.
    """
    kinds = [spec for spec in map(spec_of, dict.fromkeys(config.layers))
             if issubclass(spec, AttentionSpec) and recipe.context <= spec.window_of(config)]
    if not device.startswith("cuda") or not kinds or recipe.precision == "fp32":
        return
    batch = recipe.batch_size // recipe.micro_batches
    shapes = [(batch, heads, recipe.context, config.head_dim)
              for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]

    def run() -> None:
        with contextlib.suppress(Exception), torch.cuda.stream(torch.cuda.Stream(device)):
            q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
                       for shape in shapes)
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape != k.shape)

    _RUNNING.append(threading.Thread(target=run))
    _RUNNING[-1].start()


def wait() -> None:
    """Wait for what was begun: nothing may allocate beside a step that is being captured. Its
    memory goes back to the driver: other streams would find no use for it."""
    if _RUNNING:
        while _RUNNING:
            _RUNNING.pop().join()
        torch.cuda.empty_cache()
