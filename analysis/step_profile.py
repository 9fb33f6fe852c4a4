"""Where the time of a training step goes: torch's profiler, summed into the parts of a model.

Self time of every operator, so that the parts add up to the step. On CUDA it is the time of the
kernels, and what the step takes beyond them is a row of its own: the gaps between launches.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.model import ByteLM
from mambabyte.optim import make_optimizer
from mambabyte.train import train_step

# The first pattern that is found in an operator's name names its part.
PARTS: tuple[tuple[str, str], ...] = (
    ("scan", r"selective_scan|_Scan"),
    ("convolution", r"conv|_Conv"),
    ("attention", r"scaled_dot_product|flash|efficient_attention"),
    ("matrix products", r"::(mm|addmm|bmm|baddbmm|matmul|linear)$|MmBackward"),
    ("norms", r"norm"),
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("optimizer", r"Optimizer|_foreach|_fused_adam|lerp|addcdiv|addcmul|::sqrt|::div"),
    ("activations", r"silu|gelu|relu|tanh|sigmoid|softplus"),
    ("copies", r"copy|cat$|contiguous|_to_copy|clone|fill_|zero"),
)
OTHER, GAPS = "everything else", "between kernels"


def part_of(operator: str) -> str:
    """The part of a step that an operator belongs to, by its name."""
    return next((part for part, pattern in PARTS if re.search(pattern, operator)), OTHER)


def profile_step(
    model_config: ModelConfig, recipe: TrainConfig, device: str, steps: int = 5
) -> tuple[pd.DataFrame, float]:
    """(part, ms, share) of one step, largest first, and the milliseconds of a step unprofiled.

    Steps are the readable ones of ``train.train_step`` on random bytes; times are means. What the
    profiler itself costs is taken out in proportion: shares are its, the total is the clock's.
    """
    torch.manual_seed(0)
    model = ByteLM(model_config).to(device)
    recipe = replace(recipe, step="eager")
    optimizer = make_optimizer(model, recipe)
    tokens = torch.randint(0, 256, (recipe.batch_size, recipe.context + 1), device=device)
    cuda = device.startswith("cuda")

    def run(count: int) -> float:
        began = time.perf_counter()
        for step in range(count):
            train_step(model, optimizer, tokens, recipe, step)  # reads the loss, so it waits
        return 1e3 * (time.perf_counter() - began) / count

    run(2)
    ms = run(steps)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
                 ) as profiler:
        run(steps)
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is in the row of the operator that launched it, too
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micro:
            part = part_of(event.key)
            spent[part] = spent.get(part, 0.0) + micro / 1e3 / steps
    total = sum(spent.values())
    if cuda:
        spent[GAPS] = max(0.0, ms - total)
    else:
        spent = {part: value * ms / total for part, value in spent.items()}
    frame = pd.DataFrame({"part": list(spent), "ms": list(spent.values())})
    frame["share"] = frame["ms"] / frame["ms"].sum()
    return frame.sort_values("ms", ascending=False, ignore_index=True), ms
