"""The bytes of one training step and of a streaming state, in closed form.

Every term is derived from the formulas but one, LIBRARY_BYTES, which was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from analysis.theory.kept_tensors import (
    STREAM_DTYPE,
    Autocast,
    convolves_in_one_kernel,
    low_rank_width,
    resolve_form,
    saved_terms,
    squares_in_float32,
)
from analysis.theory.scan_memory import FLOAT32, partial_sums, scan_workspace
from mambabyte.config import ModelConfig
from mambabyte.ops import FORMS

# What the matrix libraries hold inside torch's allocator. This one number is not derived: it was
# read off the peaks recorded on an H200 (data/measurements/h200-memory.json, torch 2.11), so these
# peaks alone cannot confirm it; analysis.studies.memory.gpu.libraries_frame fits it to some of them
# and judges the others. 67 MB of it are cuBLAS workspaces of 32 MiB, one for the thread of the
# forward pass and one for that of the backward pass (torch's default on Hopper; 8 MiB each on
# earlier cards). The rest has no explanation yet.
LIBRARY_BYTES = 92 * 10**6


@dataclass(frozen=True)
class Budget:
    """Bytes of one training step by category; ``peak`` is what an allocator sees at most."""

    form: str
    autocast: Autocast
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept between forward and backward
    workspace: int  # above all of these at the worst moment
    libraries: int  # what the matrix libraries hold for themselves; none on the CPU
    worst_moment: str

    @property
    def peak(self) -> int:
        return (self.weights + self.gradients + self.optimizer + self.activations
                + self.workspace + self.libraries)


def budget(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    device: str = "cpu", checkpointing: bool = False, optimizer: str = "adamw",
) -> Budget:
    """The closed form of one training step: every category, and the moment of the peak.

    ``optimizer`` is that of TrainConfig. Steps are taken as written, not compiled.

    The peak is looked for at the moments that can be it: the loss (going forward, where the
    output of the last norm and the logits are alive as variables, and going backward), the scan
    of each layer going forward and going backward, the MLP and the attention going backward, and
    the optimizer's step. Layers after the one at hand are not yet there (forward) or no longer
    (backward). A checkpointed layer goes forward a second time, in the backward pass.
    """
    form = resolve_form(config, device)
    dtype = STREAM_DTYPE[autocast]
    itemsize = dtype.itemsize
    tokens, D, d = batch * length, config.d_inner, config.d_model
    n_bytes = config.n_parameters * FLOAT32
    terms = saved_terms(config, batch, length, autocast, device, checkpointing)
    kept = sum(t.bytes for t in terms)
    whole = terms if not checkpointing else saved_terms(config, batch, length, autocast, device)
    per_layer = [sum(t.bytes for t in whole if t.layer == i) for i in range(config.n_layer)]
    mlp = [sum(t.bytes for t in whole if t.layer == i and t.part == "mlp")
           for i in range(config.n_layer)]
    stays = [sum(t.bytes for t in terms if t.layer == i) for i in range(config.n_layer)]

    # Bytes of activations and workspace, and of the gradients of weights: these appear from the
    # head down, and all of them exist at the end.
    moments: dict[str, tuple[int, int]] = {
        "loss, forward": (kept + tokens * config.vocab_size * FLOAT32 + (
            0 if itemsize == FLOAT32 else
            tokens * (d * FLOAT32 + config.vocab_size * itemsize)), 0),
        "loss, backward": (kept + 2 * tokens * config.vocab_size * FLOAT32, 0),
        "optimizer step": (0, n_bytes),
    }
    above = _gradients_above(config)
    chunk = config.scan_chunk or FORMS[form].chunk
    forward, backward = scan_workspace(form, batch, length, D, config.d_state, chunk)
    stream = tokens * D * itemsize
    for i, letter in enumerate(config.layers):
        # What lies below, and this layer whole: under checkpointing it is there for a while, made
        # again from its input, which its norm keeps in any case.
        held = sum(stays[:i]) + per_layer[i]
        residual = tokens * d * FLOAT32
        done = above[i]  # and of this layer what lies behind the moment
        if config.mlp_hidden:
            done += 2 * d * config.mlp_hidden * FLOAT32
            # d(x^2) = grad * (2 * x^1): the gradient, both factors and the product, all at once.
            wide = squares_in_float32(config, itemsize, device)
            hidden = tokens * config.mlp_hidden
            moments[f"layer {i}, MLP backward"] = (held + residual + hidden * (
                4 * (FLOAT32 if wide else itemsize) - itemsize), done)
        done += (D if letter == "M" else d) * d * FLOAT32  # out_proj
        if letter == "A":
            # The gradients of output, q, k and v; the input of out_proj is gone. The kernel that
            # CUDA takes in half precision sums the gradient of q in float32.
            summed = FLOAT32 if device == "cuda" and itemsize != FLOAT32 else 0
            moments[f"layer {i}, attention backward"] = (
                held - mlp[i] + residual + tokens * d * (3 * itemsize + summed), done)
        elif form == "fused":
            # dy, du, ddelta, dz, dB, dC and the partial sums of the last two. On CUDA there is
            # room beside dB and dC for the gradient of the low-rank step.
            columns = 2 * config.d_state
            if device == "cuda":
                columns += low_rank_width(config, device)
            sums = columns * tokens * itemsize + FLOAT32 * partial_sums(
                batch, length, D, config.d_state, device, dtype)
            # And u in (L, D) order where torch's convolution left it in (D, L) order.
            torchs = device == "cpu" and not convolves_in_one_kernel(config, device, itemsize)
            copied = stream if torchs and batch > 1 else 0
            if device == "cpu" and dtype == torch.float16:
                # The C code reads bf16 and float32: u, delta, z, dy, B and C are copied, and the
                # gradients of the first three are made in float32 and then cast.
                copied = FLOAT32 * tokens * (7 * D + 2 * config.d_state)
            moments[f"layer {i}, scan backward"] = (
                held - mlp[i] + residual + 3 * stream + copied + sums, done)
        else:
            # Not yet there, or gone: y, silu(z), the input of out_proj, and the MLP's.
            after = 2 * tokens * D * FLOAT32 + stream + mlp[i]
            again = (residual, above[i]) if checkpointing else (0, 0)
            moments[f"layer {i}, scan forward"] = (
                held - after + 2 * stream + forward + again[0], again[1])
            grads = residual + 3 * tokens * D * FLOAT32  # dy, dz, the skip's du
            moments[f"layer {i}, gate backward"] = (held - mlp[i] - stream + grads, done)
            moments[f"layer {i}, scan backward"] = (held - after + grads + backward, done)
    libraries = LIBRARY_BYTES if device == "cuda" else 0
    moment = max(moments, key=lambda name: sum(moments[name]))
    taken, gradients = moments[moment]
    left = 0 if moment == "optimizer step" else kept
    return Budget(
        form, autocast, n_bytes, gradients, _optimizer_bytes(config, optimizer),
        left, taken - left, libraries, moment)


def _gradients_above(config: ModelConfig) -> list[int]:
    """Bytes of the gradients that exist when the backward pass comes to each layer."""
    groups = config.parameter_groups()
    parts = {"M": sum(n for name, n in groups.items() if name.startswith("ssm")),
             "A": groups["attention"]}
    each = {letter: n / max(config.layers.count(letter), 1) + (groups["mlp"] + groups["norm"])
            / config.n_layer for letter, n in parts.items()}
    # A tied head has its gradient first. The rows of an embedding of its own come last of all.
    found: list[float] = [groups.get("head", groups["embedding"])]
    for letter in reversed(config.layers):
        found.append(found[-1] + each[letter])
    return [int(n * FLOAT32) for n in reversed(found[:-1])]


def _optimizer_bytes(config: ModelConfig, optimizer: str) -> int:
    """Two moments a weight and a step count of 4 bytes a tensor with AdamW.

    Muon keeps one moment of the matrices inside the layers (dt_proj, A_log and the taps of the
    convolution are left to AdamW) and no step count of them.
    """
    groups = config.parameter_groups()
    m, a = config.layers.count("M"), config.layers.count("A")
    matrices = sum(groups[name] for name in (
        "ssm_in_proj", "ssm_x_proj", "ssm_out_proj", "attention", "mlp"))
    tensors = 3 * m + 4 * a + (2 * config.n_layer if config.mlp_hidden else 0)
    saved = (matrices + tensors) * FLOAT32 if optimizer == "muon" else 0
    return (2 * config.n_parameters + _n_tensors(config)) * FLOAT32 - saved


def _n_tensors(config: ModelConfig) -> int:
    """Parameter tensors: AdamW keeps a step count of 4 bytes for each."""
    norm = {"layer": 2, "rms": 1, "rms_plain": 0}[config.norm]
    mlp = 2 + norm if config.mlp_hidden else 0
    each = {"M": 9 + norm + mlp, "A": 4 + norm + mlp}
    ends = (1 if config.tied_head else 2) + norm
    return sum(each[letter] for letter in config.layers) + ends


def state_bytes(config: ModelConfig, seen: int) -> dict[str, int]:
    """Bytes of one stream's float32 state after ``seen`` bytes: {"ssm": ..., "kv_cache": ...}.

    An SSM layer keeps K-1 inputs of its convolution and N states a channel whatever it has seen.
    Attention keeps a key and a value for each byte, up to its window less one.
    """
    ssm = config.d_inner * (config.d_conv - 1 + config.d_state) * FLOAT32
    kept = min(seen, config.attention_window - 1)
    kv = 2 * config.n_kv_head * config.head_dim * kept * FLOAT32
    layers = config.layers
    return {"ssm": layers.count("M") * ssm, "kv_cache": layers.count("A") * kv}
