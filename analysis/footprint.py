"""The bytes of one training step and of a streaming state, in closed form; what fits where.

Symbols: B batch, L context, d = d_model, D = d_inner, N = d_state, R = dt_rank, K = d_conv,
V = vocab_size, H heads; T steps a chunk. A *full tensor* is one of B L D N float32 elements: the
scan's intermediates before they are summed over the states.

What autograd keeps of a scan, per layer (read off the formulas; analysis.memory counts it):

sequential        2 full tensors: exp(delta_t A) and h_t of every step.
document_chunked  5: b, exp(log_decay - cs), exp(cs), the bracket it multiplies, h. log_decay is
                  a sixth while the forward pass of the layer lasts (sub and cumsum keep nothing).
document_cumsum   5, the same tensors in one chunk. corrected_cumsum 5, with exp(-cs).
chunked           5 - 2/T: the decays, the inputs (kept whole by the view of their first step),
                  the local states, exp(cs), h; and 2/T of carries.
fused             no full tensor: its inputs, and one state every few steps (``saved_shape``).
epsilon           5: b, exp(cs) + epsilon, exp(cs), the bracket, h. clamped 6, with -cs and its
                  exponential; centred 6, with both exponentials and the local sums.
pairwise          3 + T: b, exp(cs), h, and T weights a step, as segment_sum; late_mask 3 + 2 T,
                  the weights before and after the mask.
associative       2 + 3 log2 T: each doubling keeps a, and a and h as shifted.

The cast to bf16 of autocast changes none of these: the scan runs in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.ops import FORMS, default_form, native_conv, native_scan
from mambabyte.ops.causal_conv import FUSED_TAPS

Autocast = Literal["fp32", "bf16"]
FLOAT32 = 4
INT64 = 8
# What the tables of whole steps show. All pairs of a chunk would be ten times off their scale.
SCAN_FORMS = (
    "sequential", "chunked", "corrected_cumsum", "document_chunked", "document_cumsum", "fused",
)
# Full tensors that each repair of the trick keeps, in the words of mambabyte.ops.repairs.
_REPAIRS = {
    "clamped": ("inputs b", "-cs", "exp(-cs), clamped", "exp(cs)", "bracket", "states h"),
    "epsilon": ("inputs b", "exp(cs) + epsilon", "exp(cs)", "bracket", "states h"),
    "centred": ("inputs b", "exp(cs - m)", "exp(m - cs)", "local sums", "exp(cs)", "states h"),
    "pairwise": ("inputs b", "exp(cs)", "states h"),
    "late_mask": ("inputs b", "exp(cs)", "states h"),
    "segment_sum": ("inputs b", "exp(cs)", "states h"),
    "associative": (),
}
# Tensors of a weight for each pair of steps in a chunk, and masks of a byte a pair.
_PAIRS = {"pairwise": (1, 1), "late_mask": (2, 1), "segment_sum": (1, 2)}


# What the matrix libraries hold inside torch's allocator, measured: the intercept of the peaks
# recorded on an H200 (data/measurements/h200-memory.json, torch 2.11). 67 MB of it are cuBLAS
# workspaces of 32 MiB, one for the thread of the forward pass and one for that of the backward
# pass (torch's default on Hopper; 8 MiB each on earlier cards). The rest has no explanation yet.
LIBRARY_BYTES = 92 * 10**6

# What a scan keeps without the axis of the states: small beside a full tensor.
PER_CHANNEL = ("delta u", "delta, folded", "delta u, folded", "B and C, folded", "masks")


@dataclass(frozen=True)
class Term:
    """One tensor that autograd keeps: where it is, what it is, how large."""

    layer: int  # -1: embedding, final norm, head and loss
    part: str
    tensor: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


# ----------------------------------------------------------------------------- the closed form


def scan_terms(
    form: str, batch: int, length: int, channels: int, states: int, chunk: int,
    device: str = "cpu", itemsize: int = FLOAT32,
) -> list[tuple[str, int, int]]:
    """(tensor, elements, itemsize) that one scan keeps for its backward pass.

    Counts what the form itself makes; its inputs belong to the layer (see ``saved_terms``).
    ``itemsize`` is that of the streams, 2 under bf16 autocast; it matters to the fused form alone.
    """
    wide = channels * states
    full = batch * length * wide
    token = batch * length * channels
    if form == "fused":
        shape = _fused_saved_shape(batch, length, channels, states, device, itemsize)
        return [("state checkpoints", math.prod(shape), FLOAT32)]
    if form == "sequential":
        return [
            ("decays exp(delta A)", full, FLOAT32),
            ("states h", full, FLOAT32),
            ("initial state", batch * wide, FLOAT32),
            ("delta u", token, FLOAT32),
        ]
    if form in ("document_chunked", "document_cumsum", "corrected_cumsum"):
        exponential = "exp(-cs)" if form == "corrected_cumsum" else "exp(log_decay - cs)"
        names = ("inputs b", exponential, "exp(cs)", "bracket (cumsum + carry)", "states h")
        return [(name, full, FLOAT32) for name in names] + [("delta u", token, FLOAT32)]
    if form == "chunked":
        steps = min(chunk, length)
        pieces = -(-length // steps)
        padded = batch * pieces * steps
        terms = [
            ("delta, folded", padded * channels, FLOAT32),
            ("delta u, folded", padded * channels, FLOAT32),
            ("B and C, folded", 2 * padded * states, FLOAT32),
            ("exp(cs)", padded * wide, FLOAT32),
            ("states h", padded * wide, FLOAT32),
            ("carries, stacked", batch * pieces * wide, FLOAT32),
            # The product of the last chunk makes the final state, which training does not use.
            ("carries", batch * (pieces - 1) * wide, FLOAT32),
        ]
        if steps > 1:
            terms += [
                ("decays exp(delta A)", padded * wide, FLOAT32),
                ("inputs", padded * wide, FLOAT32),
                ("local states", batch * pieces * (steps - 2) * wide, FLOAT32),
            ]
        return terms
    if form in _REPAIRS:
        return _repair_terms(form, batch, length, channels, states, chunk)
    raise UserError(f"no closed form for scan form {form!r}: choose {', '.join(FORMS)}")


def _chunks(length: int, chunk: int) -> list[int]:
    """Steps of each chunk: all ``chunk`` but perhaps the last; 0 is the whole length."""
    chunk = min(chunk or length, length)
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def _repair_terms(
    form: str, batch: int, length: int, channels: int, states: int, chunk: int
) -> list[tuple[str, int, int]]:
    wide = batch * channels * states
    steps = _chunks(length, chunk)
    terms = [(name, length * wide, FLOAT32) for name in _REPAIRS[form]]
    if form in _PAIRS:
        weights, masks = _PAIRS[form]
        pairs = sum(t * t for t in steps)
        terms += [("weights", weights * pairs * wide, FLOAT32), ("masks", masks * pairs, 1)]
    if form == "associative":
        # Each doubling multiplies by a and by the shifted a and h; the carry by the last a, but
        # for the first chunk, whose state wants no gradient; C by h.
        doublings = [(t - 1).bit_length() for t in steps]
        kept = sum(t * (3 * n + 2) for t, n in zip(steps, doublings, strict=True))
        terms.append(("a, shifted a and h of each doubling",
                      (kept - (steps[0] if doublings[0] else 0)) * wide, FLOAT32))
    if form not in ("clamped", "epsilon"):
        terms.append(("initial state", wide, FLOAT32))
    return [*terms, ("delta u", batch * length * channels, FLOAT32)]


def _fused_saved_shape(
    batch: int, length: int, channels: int, states: int, device: str, itemsize: int
) -> tuple[int, ...]:
    if device != "cuda":
        return native_scan.saved_shape(batch, length, channels, states)
    from mambabyte.ops import cuda_scan

    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    return cuda_scan.saved_shape(batch, length, channels, states, dtype)


def _norm_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int, readers: int
) -> list[tuple[str, int, int]]:
    """A norm and its output; ``readers`` linear maps each keep a cast of it under autocast."""
    d = config.d_model
    terms = [("input (residual stream)", tokens * d, FLOAT32)]
    if config.norm == "layer":
        terms.append(("mean and 1/std", 2 * tokens, FLOAT32))
    else:
        terms.append(("1/rms", tokens, FLOAT32))
        # Composed of pow, rsqrt and mul there, one kernel on CUDA; the weights multiply this.
        if device == "cpu" and config.norm == "rms":
            terms.append(("normalised input", tokens * d, FLOAT32))
    copies = 1 if itemsize == FLOAT32 else readers
    return [*terms, ("output", copies * tokens * d, itemsize)]


def rms_norm_is_cast() -> bool:
    """Whether CUDA's autocast takes rms_norm to float32: torch 2.11 did not, 2.13 does."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def _squares_in_float32(config: ModelConfig, itemsize: int, device: str) -> bool:
    """CUDA's autocast takes ``square`` to float32; the CPU's leaves it in bf16."""
    return config.mlp_activation == "relu2" and itemsize != FLOAT32 and device == "cuda"


def _mlp_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int
) -> list[tuple[str, int, int]]:
    hidden = tokens * config.mlp_hidden
    terms = [("hidden, before and after activation", 2 * hidden, itemsize)]
    if _squares_in_float32(config, itemsize, device):
        terms.append(("hidden in float32, for its square", hidden, FLOAT32))
    return terms


def _one_kernel(config: ModelConfig, device: str, itemsize: int) -> bool:
    """Whether the convolution is this package's own, not torch's: see ops.causal_conv."""
    if device == "cuda":
        return config.d_conv in FUSED_TAPS
    return (itemsize == FLOAT32 and config.d_conv in native_conv.TAPS
            and native_conv.available(torch.float32))


def _mamba_terms(
    config: ModelConfig, batch: int, length: int, itemsize: int, form: str, device: str
) -> list[tuple[str, str, int, int]]:
    d, D, N = config.d_model, config.d_inner, config.d_state
    tokens = batch * length
    full_rank = config.dt_rank == "full"
    rank = 0 if full_rank else config.dt_rank_value
    fused, half = form == "fused", itemsize != FLOAT32
    terms = [
        ("scan input", "u", tokens * D, itemsize if fused else FLOAT32),
        ("scan input", "exp(A_log) and A", 2 * D * N, FLOAT32),
        ("projection", "input of out_proj", tokens * D, itemsize),
    ]
    one_kernel = _one_kernel(config, device, itemsize)
    if one_kernel:  # reads u where in_proj left it, writes (B, L, D)
        copies = 0 if fused or not half else 1
    else:
        terms += [
            ("conv", "input, padded", batch * (length + config.d_conv - 1) * D, itemsize),
            ("conv", "output", tokens * D, itemsize),
        ]
        # torch's convolution leaves (B, D, L) in memory and each linear map copies u; for a
        # batch of one the CPU leaves it in (L, D) order and the copies are u itself.
        copies = 2 if full_rank else 1
        if batch == 1 and device == "cpu":
            copies = 0 if fused or not half else 1
    terms.append(("projection", "u, copied for x_proj and dt_proj", copies * tokens * D, itemsize))
    # z, B, C and the low-rank step are views: each keeps the whole output that it was cut from.
    if rank or fused or (form != "chunked" and not half):
        terms.append(("projection", "output of x_proj", tokens * (rank + 2 * N), itemsize))
    if fused or not half or one_kernel:
        terms.append(("gate", "output of in_proj (u and z)", tokens * 2 * D, itemsize))
    if fused:
        terms.append(("scan input", "delta", tokens * D, itemsize))
    else:
        terms += [
            ("scan input", "softplus input and output", 2 * tokens * D, FLOAT32),
            ("gate", "y and silu(z)", 2 * tokens * D, FLOAT32),
        ]
        if half:
            terms.append(("gate", "z in float32", tokens * D, FLOAT32))
        if half and form != "chunked":
            terms.append(("scan input", "B and C in float32", 2 * tokens * N, FLOAT32))
    if half:
        x_width = rank + 2 * N
        cast = 2 * D * d + D * config.d_conv + D * x_width + D * config.dt_rank_value + D * d
        terms.append(("casts", "weights in bf16", cast, itemsize))
    chunk = config.scan_chunk or FORMS[form].chunk
    for name, elements, size in scan_terms(
            form, batch, length, D, N, chunk, device, itemsize):
        terms.append(("scan input" if name in PER_CHANNEL else "scan", name, elements, size))
    return terms


def _attention_terms(
    config: ModelConfig, batch: int, length: int, itemsize: int, device: str
) -> list[tuple[str, str, int, int]]:
    d, kv = config.d_model, config.n_kv_head * config.head_dim
    tokens = batch * length
    terms = [
        ("attention", "q and k, rotated", tokens * (d + kv), itemsize),
        ("attention", "v", tokens * kv, itemsize),
        ("attention", "output", tokens * d, itemsize),
        ("attention", "log-sum-exp", tokens * config.n_head, FLOAT32),
        ("attention", "cos and sin", 4 * length * (config.head_dim // 2), itemsize),
        ("projection", "input of out_proj", tokens * d, itemsize),
    ]
    if config.qk_norm:
        # The CPU computes the norm, and keeps its input, in float32 in any case.
        wide = device == "cpu" or rms_norm_is_cast()
        terms.append(("attention", "q and k before their norm", tokens * (d + kv),
                      FLOAT32 if wide else itemsize))
        heads = config.n_head + config.n_kv_head
        terms.append(("attention", "1/rms of q and k", tokens * heads, FLOAT32))
    if length > config.attention_window:
        terms.append(("attention", "window mask", length * length, itemsize))
    if itemsize != FLOAT32:
        terms.append(("casts", "weights in bf16", 2 * d * d + 2 * d * kv, itemsize))
    return terms


def saved_terms(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    device: str = "cpu", checkpointing: bool = False,
) -> list[Term]:
    """Every tensor that autograd keeps between forward and backward of ``ByteLM.loss``.

    Parameters are not counted. ``checkpointing`` is torch.utils.checkpoint around every block:
    then a block keeps its input alone. Raises UserError for a form without a closed form.
    """
    form = resolve_form(config, device)
    itemsize = 2 if autocast == "bf16" else FLOAT32
    tokens = batch * length
    d, V = config.d_model, config.vocab_size
    found: list[Term] = []
    for i, letter in enumerate(config.layers):
        if checkpointing:
            found.append(Term(i, "norm", "block input", tokens * d, FLOAT32))
            continue
        readers = 1 if letter == "M" else 3
        rows = [("norm", *t) for t in _norm_terms(config, tokens, device, itemsize, readers)]
        if letter == "M":
            rows += _mamba_terms(config, batch, length, itemsize, form, device)
        else:
            rows += _attention_terms(config, batch, length, itemsize, device)
        if config.mlp_hidden:
            rows += [("mlp", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
            rows += [("mlp", *t) for t in _mlp_terms(config, tokens, device, itemsize)]
            if itemsize != FLOAT32:
                rows.append(("casts", "weights in bf16", 2 * d * config.mlp_hidden, itemsize))
        found += [Term(i, *row) for row in rows]
    head = [("head", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
    if config.embed_norm:
        head += [("head", "embedding before its norm", tokens * d, FLOAT32),
                 ("head", "1/rms of the embedding", tokens, FLOAT32)]
    if config.logit_softcap:
        head.append(("head", "tanh of the logits", tokens * V, itemsize))
    if itemsize != FLOAT32:
        head.append(("casts", "weights in bf16", V * d, itemsize))
    head += [
        ("head", "log-softmax", tokens * V, FLOAT32),
        # Flattened targets are a copy, but for a batch of one a view of the bytes.
        ("head", "bytes and targets", batch * (length + 1) + (tokens if batch > 1 else 0), INT64),
        ("head", "weight of the mean", 1, FLOAT32),
    ]
    return found + [Term(-1, *row) for row in head]


def resolve_form(config: ModelConfig, device: str) -> str:
    """The scan form that runs there; "auto" on CUDA means the fused kernels."""
    if config.scan_form != "auto":
        return config.scan_form
    return "fused" if device == "cuda" else default_form(device)


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


def scan_workspace(form: str, batch: int, length: int, channels: int, states: int, chunk: int,
                   ) -> tuple[int, int]:
    """Bytes that a scan needs above what it keeps: (forward, backward), at the worst moment.

    In full tensors, with k chunks (c = 1/k of one): the forward of the document's form holds
    log_decay and, of the chunk at hand, cs, inner and the product with C: 1 + 3 c. Its backward
    is worse: the gradient of each slice ``x[:, start:end]`` is a tensor of the *full* length,
    zero outside the chunk. Two of them accumulate (for b and log_decay) and a third is under
    way, while of the last chunk only the 4 c that it kept are free again: 3 - 4 c. ``split``
    instead of slices has gradients of the size of the chunk, joined once: no such excess.
    """
    full = batch * length * channels * states * FLOAT32
    if form in ("document_chunked", "document_cumsum", "corrected_cumsum"):
        c = full if form == "document_cumsum" else full * min(chunk, length) // length
        if form == "corrected_cumsum":
            return full + 2 * c, 2 * c
        return full + 3 * c, max(3 * full - 4 * c, 2 * c)
    if form in _REPAIRS:
        c = full * min(chunk, length) // length
        pairs = c * min(chunk, length)  # a weight for each pair of steps in one chunk
        # Forward: log_decay (and b, which associative does not keep), then what a chunk makes and
        # drops. Backward: gradients of the weights, one a pass over the pairs.
        return {
            "clamped": (full + 2 * c, 2 * c), "epsilon": (full + c, 2 * c),
            "centred": (full + 4 * c, 2 * c), "pairwise": (full + 2 * pairs, 2 * pairs),
            "late_mask": (full + pairs, 2 * pairs),
            "segment_sum": (full + 2 * pairs, 3 * pairs),
            "associative": (2 * full + 2 * c, 2 * c),
        }[form]
    if form == "chunked":
        # Forward: log_decay, the stacked local states and the product with the carries.
        return 3 * full, 3 * full
    if form == "sequential":
        return 0, 6 * batch * channels * states * FLOAT32
    return 0, 0


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
    (backward).
    """
    form = resolve_form(config, device)
    itemsize = 2 if autocast == "bf16" else FLOAT32
    tokens, D, d = batch * length, config.d_inner, config.d_model
    n_bytes = config.n_parameters * FLOAT32
    terms = saved_terms(config, batch, length, autocast, device, checkpointing)
    kept = sum(t.bytes for t in terms)
    whole = terms if not checkpointing else saved_terms(config, batch, length, autocast, device)
    per_layer = [sum(t.bytes for t in whole if t.layer == i) for i in range(config.n_layer)]
    mlp = [sum(t.bytes for t in whole if t.layer == i and t.part == "mlp")
           for i in range(config.n_layer)]
    stays = [sum(t.bytes for t in terms if t.layer == i) for i in range(config.n_layer)]

    # Gradients appear from the head down; all of them exist at the end.
    moments: dict[str, int] = {
        "loss, forward": kept + tokens * config.vocab_size * FLOAT32 + (
            0 if itemsize == FLOAT32 else
            tokens * (d * FLOAT32 + config.vocab_size * itemsize)),
        "loss, backward": kept + 2 * tokens * config.vocab_size * FLOAT32,
        "optimizer step": n_bytes,
    }
    chunk = config.scan_chunk or FORMS[form].chunk
    forward, backward = scan_workspace(form, batch, length, D, config.d_state, chunk)
    stream = tokens * D * itemsize
    for i, letter in enumerate(config.layers):
        # What lies below, and this layer whole: under checkpointing it is there for a while, made
        # again from its input, which its norm keeps in any case.
        held = sum(stays[:i]) + per_layer[i]
        residual = tokens * d * FLOAT32
        if config.mlp_hidden:
            # d(x^2) = grad * (2 * x^1): the gradient, both factors and the product, all at once.
            wide = _squares_in_float32(config, itemsize, device)
            hidden = tokens * config.mlp_hidden
            moments[f"layer {i}, MLP backward"] = held + residual + hidden * (
                4 * (FLOAT32 if wide else itemsize) - itemsize)
        if letter == "A":
            moments[f"layer {i}, attention backward"] = held + residual + 5 * tokens * d * itemsize
        elif form == "fused":
            # dy, du, ddelta, dz, dB, dC and the partial sums of the last two.
            sums = 2 * tokens * config.d_state * itemsize + FLOAT32 * _partial_sums(
                batch, length, D, config.d_state, device, itemsize)
            # And u in (L, D) order where torch's convolution left it in (D, L) order.
            torchs = device == "cpu" and not _one_kernel(config, device, itemsize)
            copied = stream if torchs and batch > 1 else 0
            moments[f"layer {i}, scan backward"] = (
                held - mlp[i] + residual + 3 * stream + copied + sums)
        else:
            # Not yet there, or gone: y, silu(z), the input of out_proj, and the MLP's.
            after = 2 * tokens * D * FLOAT32 + stream + mlp[i]
            moments[f"layer {i}, scan forward"] = held - after + 2 * stream + forward
            grads = residual + 3 * tokens * D * FLOAT32  # dy, dz, the skip's du
            moments[f"layer {i}, scan backward"] = held - after + grads + backward
    libraries = LIBRARY_BYTES if device == "cuda" else 0
    moment = max(moments, key=lambda name: moments[name])
    late = moment == "optimizer step"
    done = int(moment.split()[1].rstrip(",")) if moment.startswith("layer") else None
    gradients = n_bytes if late else _gradients_above(config, done, moment)
    return Budget(
        form, autocast, n_bytes, gradients, _optimizer_bytes(config, optimizer),
        0 if late else kept, moments[moment] - (0 if late else kept), libraries, moment)


def _partial_sums(
    batch: int, length: int, channels: int, states: int, device: str, itemsize: int
) -> int:
    """Elements of the partial sums of dB and dC in the backward pass of the fused scan."""
    if device != "cuda":
        return 2 * batch * length * states * -(-channels // native_scan.GROUP)
    from mambabyte.ops import cuda_scan

    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    return math.prod(cuda_scan.partial_sums_shape(batch, length, channels, states, dtype))


def _gradients_above(config: ModelConfig, layer: int | None, moment: str) -> int:
    """Bytes of the gradients that exist while the backward pass is at ``layer``, its own too."""
    if layer is None or "forward" in moment:
        return 0
    groups = config.parameter_groups()
    ends = groups["embedding"] + groups.get("head", 0)
    per_layer = (config.n_parameters - ends) * FLOAT32 / config.n_layer
    return int(ends * FLOAT32 + per_layer * (config.n_layer - layer))


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


def state_bytes(
    config: ModelConfig, seen: int, batch: int = 1, itemsize: int = FLOAT32
) -> dict[str, int]:
    """Bytes of the streaming state after ``seen`` bytes: {"ssm": ..., "kv_cache": ...}.

    An SSM layer keeps K-1 inputs of its convolution and D x N float32 states whatever it has
    seen. Attention keeps a key and a value for each byte, up to its window less one.
    """
    ssm = batch * config.d_inner * ((config.d_conv - 1) * itemsize + config.d_state * FLOAT32)
    kept = min(seen, config.attention_window - 1)
    kv = batch * 2 * config.n_kv_head * config.head_dim * kept * itemsize
    layers = config.layers
    return {"ssm": layers.count("M") * ssm, "kv_cache": layers.count("A") * kv}


# ------------------------------------------------------------------------------ what fits where

# Outside torch's allocator: the CUDA context, its libraries' handles, and fragments. An
# allowance, not a measurement.
ALLOWANCE_BYTES = 768 * 2**20
LARGEST = 2**24
DEVICES_GB = (16, 24, 40, 80, 141)


@dataclass(frozen=True)
class Fit:
    """Whether a training step fits a device, by how much, and what would fit."""

    budget: Budget
    breakdown: dict[str, int]  # bytes by category; their sum is required_bytes
    required_bytes: int
    device_memory_bytes: int | None
    fits: bool | None  # None without a device to fit
    spare_bytes: int | None  # negative: so much is missing
    largest_batch: int | None  # at the given context; 0 if not even one sequence fits
    largest_context: int | None  # at the given batch size


def fit(
    model_config: ModelConfig, train_config: TrainConfig, device_memory_bytes: int | None,
    device: str = "cuda", checkpointing: bool = False,
) -> Fit:
    """Does one training step of this recipe fit, and what is the largest that does?

    Closed form: nothing is allocated. ``device`` says what "auto" means (on CUDA the fused scan
    and bf16 autocast). Raises UserError for a scan form without a closed form.
    """
    autocast = autocast_of(train_config, device)

    def step_of(batch: int, context: int) -> Budget:
        return budget(model_config, batch, context, autocast, device, checkpointing,
                      train_config.optimizer)

    def required(batch: int, context: int) -> int:
        return step_of(batch, context).peak + ALLOWANCE_BYTES

    batch, context = train_config.batch_size, train_config.context
    step = step_of(batch, context)
    breakdown = {
        "weights": step.weights, "gradients": step.gradients, "optimizer": step.optimizer,
        "activations": step.activations, "workspace": step.workspace,
        "libraries": step.libraries, "allowance": ALLOWANCE_BYTES,
    }
    total = required(batch, context)
    if device_memory_bytes is None:
        return Fit(step, breakdown, total, None, None, None, None, None)
    room = device_memory_bytes
    return Fit(
        step, breakdown, total, room, total <= room, room - total,
        _largest(lambda n: required(n, context) <= room),
        _largest(lambda n: required(batch, n) <= room),
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n in 1..LARGEST that fits, by bisection; 0 if none does."""
    low, high = 0, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def autocast_of(config: TrainConfig, device: str) -> Autocast:
    """What the recipe's ``precision`` means on that device."""
    if config.precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return "fp32" if config.precision == "fp32" else "bf16"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str | int) -> int:
    """'40GB' (10^9), '40GiB' (2^30) or a number of bytes, as bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"memory {text!r}: write e.g. 40GB, 40GiB or a number of bytes")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise UserError(f"memory {text!r} is nothing: write e.g. 40GB")
    return value
