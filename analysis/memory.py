"""Study: the closed form of a training step's memory against what is counted and measured.

The closed form is analysis.footprint. Three instruments stand beside it: hooks on the tensors that
autograd saves (each storage once, parameters left out), torch's profiler for the peak on the CPU,
and CUDA's allocator for the peak on a GPU. Where there is no GPU, what one has recorded is held
against the closed form as it is today (``recorded_frame``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from analysis.footprint import (
    ALLOWANCE_BYTES,
    DEVICES_GB,
    FLOAT32,
    LIBRARY_BYTES,
    PER_CHANNEL,
    SCAN_FORMS,
    Autocast,
    budget,
    fit,
    parse_memory,
    resolve_form,
    saved_terms,
    scan_terms,
    scan_workspace,
    state_bytes,
)
from analysis.frames import not_measured
from analysis.records import DATA, load_record
from analysis.scans import check_forms, one_thread
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops import FORMS, native_scan, selective_scan
from mambabyte.ops.cumsum import document_chunked_scan
from mambabyte.optim import make_optimizer

__all__ = ["PROFILES", "Memory", "Parameters", "fit", "measure_cuda_peak", "measure_peak",
           "measure_saved", "parse_memory", "run"]

MB, GB = 1e6, 1e9
# Peaks and kept bytes of the cases of ``cuda_cases``, by the allocator of another machine's GPU.
RECORDED = "measurements/h200-memory.json"


class _Held:
    """What the pack hook leaves in the graph: alive as long as autograd keeps the tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def measure_saved(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    checkpointing: bool = False, shapes_only: bool = False,
) -> int:
    """Bytes that autograd holds when the loss is ready: each storage once, without parameters.

    ``shapes_only`` runs the same code on tensors without memory, so that sizes beyond this
    machine can be counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if shapes_only else nullcontext():
        model = _model(config, checkpointing)
        tokens = torch.randint(0, config.vocab_size, (batch, length + 1))
        return _count(lambda: model.loss(tokens), model, autocast)[0]


def _count(
    loss: Callable[[], torch.Tensor], model: nn.Module, autocast: Autocast = "fp32"
) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """Bytes held for the backward of ``loss()``; (shape, storage bytes) of each storage."""
    live: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Held:
        # detach: an output saved by its own node would otherwise keep that node alive.
        held = _Held(tensor.detach())
        live.add(held)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor), _autocast("cpu", autocast):
        value = loss()
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages, shapes = {}, []
    for held in live:
        storage = held.tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in storages:
            storages[storage._cdata] = storage.nbytes()
            shapes.append((tuple(held.tensor.shape), storage.nbytes()))
    del value
    return sum(storages.values()), shapes


def _autocast(device: str, autocast: Autocast) -> AbstractContextManager[Any]:
    if autocast == "fp32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def _model(config: ModelConfig, checkpointing: bool = False, device: str = "cpu") -> ByteLM:
    torch.manual_seed(0)
    model = ByteLM(config)
    if device != "cpu":
        model = model.to(device)
    if checkpointing:  # from outside: the model itself has no switch for it
        from torch.utils.checkpoint import checkpoint

        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def measure_peak(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    checkpointing: bool = False,
) -> int:
    """Peak bytes above the weights of forward and backward on the CPU, by torch's profiler.

    Every allocation and release is counted, to the byte; scratch memory that a C kernel takes
    for itself is not seen.
    """
    model = _model(config, checkpointing)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1))

    def step() -> None:
        with _autocast("cpu", autocast):
            loss = model.loss(tokens)
        loss.backward()

    step()  # caches fill and kernels compile
    model.zero_grad(set_to_none=True)
    return max(accumulate(_memory_events(step)))


def _allocated(work: Callable[[], object]) -> int:
    return sum(n for n in _memory_events(work) if n > 0)


def _memory_events(work: Callable[[], object]) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) on the CPU, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def measure_cuda_peak(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "bf16",
    checkpointing: bool = False,
) -> dict[str, Any]:
    """One case on a GPU: the bytes kept for the backward pass, and the peak of a whole step.

    Three steps with AdamW and clipping as in training; the peak of the last, weights and
    optimizer included. A step that does not fit says so in "error" and has no peak.
    """
    row: dict[str, Any] = {
        **_case_columns(config, batch, length, autocast, checkpointing),
        **dict.fromkeys((*MEASURED, "error")),
    }
    torch.cuda.empty_cache()
    try:
        kept, peak = _cuda_step(config, batch, length, autocast, checkpointing)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"error": str(error).splitlines()[0]}
    return row | dict(zip(MEASURED, (peak / MB, kept / MB), strict=True))


MEASURED = ("measured peak (MB)", "measured kept (MB)")


def _case_columns(
    config: ModelConfig, batch: int, length: int, autocast: str, checkpointing: bool
) -> dict[str, Any]:
    return {"layers": config.layers, "d_model": config.d_model,
            "form": resolve_form(config, "cuda"), "batch": batch, "context": length,
            "autocast": autocast, "checkpointing": checkpointing}


def _cuda_step(
    config: ModelConfig, batch: int, length: int, autocast: Autocast, checkpointing: bool
) -> tuple[int, int]:
    """Allocated bytes that a loss holds, and the peak of a step, on the GPU."""
    model = _model(config, checkpointing, "cuda")
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device="cuda")
    kept = 0
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with _autocast("cuda", autocast):
            loss = model.loss(tokens)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        del loss
    return kept, torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Parameters:
    """Sizes at which the closed form is held against the counts.

    ``batch``, ``context``, ``d_model`` and ``n_layer`` are those of the measured steps; the
    tables of the document's configurations and of the devices do not depend on them.
    """

    forms: tuple[str, ...] = SCAN_FORMS
    patterns: tuple[str, ...] = ("M", "A", "MMMA")
    autocasts: tuple[str, ...] = ("fp32", "bf16")
    batch: int = 2
    context: int = 64
    d_model: int = 64
    n_layer: int = 2
    # Lengths of the scan whose backward allocations are counted, slices against split.
    slice_lengths: tuple[int, ...] = (128, 512, 2048)
    # Layers of the document's original step (64 x 2048) that are counted on shapes alone.
    counted_layers: int = 4
    # Also measure peaks with the allocator of this machine's GPU.
    cuda: bool = False

    def __post_init__(self) -> None:
        check_forms(self.forms)
        if not set(self.autocasts) <= {"fp32", "bf16"}:
            raise UserError(f"autocasts {self.autocasts}: choose from fp32, bf16")
        sizes = (self.batch, self.context, self.d_model, self.n_layer, self.counted_layers,
                 *self.slice_lengths)
        if min(sizes) < 1:
            raise UserError("batch, context, d_model, n_layer, counted_layers and slice_lengths "
                            "must be 1 or more")


_FULL = Parameters(patterns=("M", "A", "MA", "MMMA"), batch=4, context=256, d_model=192,
                   n_layer=4, slice_lengths=(128, 256, 512, 1024, 2048, 4096, 8192))

PROFILES = {
    "quick": Parameters(),
    "full": _FULL,
    "gpu": replace(_FULL, cuda=True),
}


@dataclass(frozen=True)
class Memory:
    """What the study found; every frame has its units in the column names."""

    saved: pd.DataFrame  # closed form against count, each form, pattern and autocast state
    peaks: pd.DataFrame  # closed form against the profiler
    full_tensors: pd.DataFrame  # (B, L, D, N) tensors that each form keeps
    terms: pd.DataFrame  # each tensor of one layer of the document's original step
    budgets: pd.DataFrame  # categories, document's two configurations, every form
    state: pd.DataFrame  # streaming state against KV cache
    slices: pd.DataFrame  # bytes that the backward pass of slices allocates
    devices: pd.DataFrame  # what fits where
    document: pd.DataFrame  # the document's statements in numbers
    cuda: pd.DataFrame  # closed form against a GPU's allocator: this machine's, or a record's


def run(p: Parameters, report: Callable[[str], None]) -> Memory:
    """Closed form, counts, and what follows from them. The same numbers on every run."""
    with one_thread():
        report("counting saved tensors")
        saved = _saved_frame(p)
        report("measuring peaks with the profiler")
        peaks = _peaks_frame(p)
        report("counting what slices in a loop allocate")
        slices = _slices_frame(p)
        report("the document's configurations")
        return Memory(
            saved, peaks, _full_tensors_frame(p), _terms_frame(), _budgets_frame(p),
            _state_frame(), slices, _devices_frame(p), _document_frame(p),
            beside_closed_form(measure_on_cuda(report)) if p.cuda else recorded_frame())


def _worst_error(frame: pd.DataFrame) -> float:
    """Largest |ratio - 1| of a frame whose last column is predicted over measured."""
    return float((frame[frame.columns[-1]].astype(float) - 1).abs().max())


def headline(found: Memory) -> dict[str, tuple[float | bool | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    document = found.document.set_index("key")["ours"]
    budgets = found.budgets[(found.budgets["autocast"] == "bf16")
                            & ~found.budgets["checkpointing"]]
    peak = budgets.set_index(["configuration", "form"])["peak, GB"]
    state = state_bytes(PRESETS["mamba_byte"].model, 1)["ssm"]
    attention = replace(PRESETS["mamba_byte"].model, layer_pattern="A", attention_window=2**21)
    fused = float(peak["64 x 2048", "fused"]) if "fused" in found.budgets["form"].values else None
    slope = {how: _slope(rows["length, steps"], rows["allocated in backward, B"])
             for how, rows in found.slices.groupby("how")}
    return {
        "worst_cuda_error": (_worst_error(found.cuda.dropna()), "",
                             "largest |closed form / measured - 1| of the peak on a GPU"),
        "worst_cuda_kept_error": (
            float((found.cuda["kept, closed form / measured"].dropna() - 1).abs().max()), "",
            "the same of the bytes kept"),
        "cuda_cases": (len(found.cuda), "", "cases measured on a GPU"),
        "libraries_mb": (LIBRARY_BYTES / MB, "MB", "held by the matrix libraries on a GPU"),
        "worst_saved_error": (_worst_error(found.saved), "",
                              "largest |predicted / counted - 1| of the kept bytes"),
        "worst_peak_error": (_worst_error(found.peaks), "",
                             "largest |predicted / profiled - 1| of the peak on the CPU"),
        "tensor_gb": (document["tensor_gb"], "GB", "one full tensor at 64 x 2048"),
        "kept_per_layer": (document["kept_per_layer"], "", "full tensors kept per layer"),
        "live_per_layer": (document["live_per_layer"], "",
                           "full tensors alive in a layer at the peak of its backward pass"),
        "scan_kept_before_gb": (document["scan_kept_before_gb"], "GB",
                                "full tensors kept, four layers, 64 x 2048"),
        "kept_before_gb": (document["kept_before_gb"], "GB", "all kept, float32, 64 x 2048"),
        "kept_before_bf16_gb": (document["kept_before_bf16_gb"], "GB",
                                "all kept, bf16 autocast, 64 x 2048"),
        "scan_kept_before_bf16_gb": (document["scan_kept_before_bf16_gb"], "GB",
                                     "full tensors kept under bf16 autocast, 64 x 2048"),
        "scan_kept_after_gb": (document["scan_kept_after_gb"], "GB",
                               "full tensors kept, four layers, 16 x 1024"),
        "scan_cut": (document["scan_cut"], "times", "cut of the scan's memory by the fix"),
        "without_concatenation": (document["without_concatenation"], "",
                                  "full tensors kept without concatenation, relative to with"),
        "counted_at_size": (document["counted_at_size"], "",
                            "counted / closed form at 64 x 2048"),
        "peak_before_gb": (document["peak_before_gb"], "GB", "peak at 64 x 2048, bf16 autocast"),
        "peak_after_gb": (document["peak_after_gb"], "GB", "peak at 16 x 1024, bf16 autocast"),
        "margin": (document["margin"], "times", "40 GB over that peak"),
        "fused_peak_before_gb": (fused, "GB", "peak at 64 x 2048 with the fused scan, bf16"),
        "slices_exponent": (slope["slices in a loop"], "",
                            "growth exponent of bytes allocated backward, slices"),
        "split_exponent": (slope["split"], "", "the same with split"),
        "ssm_state_bytes": (state, "B", "streaming state of mamba_byte, float32, any length"),
        "crossover_bytes": (state / state_bytes(attention, 1)["kv_cache"], "B",
                            "bytes seen at which a full KV cache outgrows that state"),
    }


def _slope(x: pd.Series, y: pd.Series) -> float:
    """Growth exponent of y over x between the two largest x: 1 linear, 2 quadratic."""
    (x0, x1), (y0, y1) = x.nlargest(2).iloc[::-1], y.nlargest(2).iloc[::-1]
    return float(np.log(y1 / y0) / np.log(x1 / x0))


def _measurable(form: str) -> bool:
    return form != "fused" or native_scan.available()[0]


def _config(p: Parameters, form: str, pattern: str) -> ModelConfig:
    n_layer = max(p.n_layer, len(pattern))
    return ModelConfig(d_model=p.d_model, n_layer=n_layer, layer_pattern=pattern, n_head=4,
                       n_kv_head=4, scan_form=form)


def _cases(p: Parameters) -> list[tuple[str, str, Autocast, bool]]:
    cases = []
    for pattern in p.patterns:
        for form in p.forms if "M" in pattern else ("sequential",):
            if _measurable(form):
                for amp in p.autocasts:
                    kind: Autocast = "bf16" if amp == "bf16" else "fp32"
                    cases += [(form, pattern, kind, False), (form, pattern, kind, True)]
    return cases


def _saved_frame(p: Parameters) -> pd.DataFrame:
    rows = []
    for form, pattern, autocast, checkpointing in _cases(p):
        config = _config(p, form, pattern)
        predicted = sum(t.bytes for t in saved_terms(
            config, p.batch, p.context, autocast, checkpointing=checkpointing))
        measured = measure_saved(config, p.batch, p.context, autocast, checkpointing)
        rows.append({
            "form": form if "M" in pattern else "none", "pattern": pattern, "autocast": autocast,
            "checkpointing": checkpointing, "predicted, B": predicted, "counted, B": measured,
            "predicted / counted": predicted / measured})
    return pd.DataFrame(rows)


def _peaks_frame(p: Parameters) -> pd.DataFrame:
    rows = []
    for form in p.forms:
        if not _measurable(form):
            continue
        for autocast in p.autocasts:
            kind: Autocast = "bf16" if autocast == "bf16" else "fp32"
            config = _config(p, form, "M")
            step = budget(config, p.batch, p.context, kind)
            predicted = step.peak - step.weights - step.optimizer
            measured = measure_peak(config, p.batch, p.context, kind)
            rows.append({
                "form": form, "autocast": autocast, "worst moment": step.worst_moment,
                "predicted, B": predicted, "profiled, B": measured,
                "predicted / profiled": predicted / measured})
    return pd.DataFrame(rows)


def _full_tensors_frame(p: Parameters) -> pd.DataFrame:
    """Tensors of B L D N float32 elements that one scan keeps, and needs besides."""
    batch, length, channels, states, chunk = 1, 256, 16, 16, 32
    full = batch * length * channels * states * FLOAT32
    rows = []
    for form in FORMS:
        terms = scan_terms(form, batch, length, channels, states, chunk)
        kept = sum(n * size for _, n, size in terms)
        ends = sum(n * size for name, n, size in terms if name in PER_CHANNEL)
        forward, backward = scan_workspace(form, batch, length, channels, states, chunk)
        counted = None
        if _measurable(form) and form != "fused":
            inputs = _scan_inputs(batch, length, channels, states)
            loss = partial(_scan_loss, form, inputs, chunk)
            counted = _wide_bytes(loss, channels, states) / full
        rows.append({
            "form": form, "kept, full tensors": (kept - ends) / full if form != "fused" else 0.0,
            "counted, full tensors": counted,
            "forward workspace, full tensors": forward / full,
            "backward workspace, full tensors": backward / full})
    return not_measured(pd.DataFrame(rows), "counted, full tensors")


def _scan_inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    """u, delta, A, B, C of a scan with gentle decay, each wanting a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, channels),) * 2 + ((channels, states),) + (
        (batch, length, states),) * 2
    u, delta, A, B, C = (torch.randn(s, generator=generator) for s in shapes)
    return [t.requires_grad_() for t in (u, delta.sigmoid() * 0.01, -A.exp(), B, C)]


def _scan_loss(form: str, inputs: list[Tensor], chunk: int) -> Tensor:
    u, delta, A, B, C = inputs
    return selective_scan(u, delta, A, B, C, form=form, chunk_size=chunk)[0].sum()


def _gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), inputs)


def _loss_without_concatenation(inputs: list[Tensor], chunk: int) -> Tensor:
    """The document's chunked scan, each chunk's output summed at once: nothing is joined."""
    u, delta, A, B, C = inputs
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    total = u.new_zeros(())
    pieces = zip(*(t.split(chunk, 1) for t in (u, delta, B, C)), strict=True)
    for u_k, delta_k, B_k, C_k in pieces:
        y, state = document_chunked_scan(u_k, delta_k, A, B_k, C_k, state, chunk)
        total = total + y.sum()
    return total


def _wide_bytes(loss: Callable[[], Tensor], channels: int, states: int) -> int:
    """Bytes of the saved tensors that end in (channels, states), with batch or time before."""
    _, held = _count(loss, nn.Module())
    return sum(n for shape, n in held if len(shape) > 2 and shape[-2:] == (channels, states))


def _slices_frame(p: Parameters) -> pd.DataFrame:
    """Bytes that the backward pass of one scan allocates in all, slices against split."""
    chunk, channels, states = 32, 16, 16
    rows = []
    for length in p.slice_lengths:
        full = length * channels * states * FLOAT32
        for form, how in (("document_chunked", "slices in a loop"), ("corrected_cumsum", "split")):
            inputs = _scan_inputs(1, length, channels, states)
            forward = partial(_scan_loss, form, inputs, chunk)
            both = partial(_gradients, forward, inputs)
            allocated = _allocated(both) - _allocated(forward)
            rows.append({
                "length, steps": length, "chunks": -(-length // chunk), "how": how,
                "allocated in backward, B": allocated,
                "in full tensors": allocated / full})
    return pd.DataFrame(rows)


def _terms_frame() -> pd.DataFrame:
    """Every tensor kept by one layer of the document's original step, largest first."""
    preset = PRESETS["mamba_byte_original"]
    config = replace(preset.model, scan_form="document_chunked")
    batch, context = preset.train.batch_size, preset.train.context
    rows = []
    for autocast in ("fp32", "bf16"):
        kind: Autocast = "bf16" if autocast == "bf16" else "fp32"
        for t in saved_terms(config, batch, context, kind):
            if t.layer == 0 and t.bytes:
                rows.append({"autocast": autocast, "part": t.part, "tensor": t.tensor,
                             "bytes each element": t.itemsize, "kept, GB": t.bytes / GB})
    frame = pd.DataFrame(rows).sort_values(
        ["autocast", "kept, GB"], ascending=[False, False], kind="stable")
    return frame.reset_index(drop=True)


def budgets_at(
    model: ModelConfig, batch: int, context: int, forms: tuple[str, ...]
) -> pd.DataFrame:
    """A training step on a GPU by category: a row a scan form, autocast state and checkpointing."""
    rows = []
    for form in forms:
        for autocast in ("fp32", "bf16"):
            kind: Autocast = "bf16" if autocast == "bf16" else "fp32"
            for checkpointing in (False, True):
                step = budget(replace(model, scan_form=form), batch, context, kind, "cuda",
                              checkpointing)
                rows.append({
                    "configuration": f"{batch} x {context}", "form": form,
                    "autocast": autocast, "checkpointing": checkpointing,
                    "weights, GB": step.weights / GB, "gradients, GB": step.gradients / GB,
                    "AdamW, GB": step.optimizer / GB,
                    "activations, GB": step.activations / GB,
                    "workspace, GB": step.workspace / GB,
                    "libraries, GB": step.libraries / GB, "peak, GB": step.peak / GB,
                    "worst moment": step.worst_moment})
    return pd.DataFrame(rows)


def smallest_devices(budgets: pd.DataFrame) -> pd.DataFrame:
    """The smallest common device that holds each of these steps, the allowance included."""
    need = budgets["peak, GB"] + ALLOWANCE_BYTES / GB
    return budgets[["form", "autocast", "checkpointing", "peak, GB"]].assign(**{
        "smallest device": [next((f"{gb} GB" for gb in DEVICES_GB if n <= gb), "none of these")
                            for n in need]})


def _budgets_frame(p: Parameters) -> pd.DataFrame:
    presets = [PRESETS[name] for name in ("mamba_byte", "mamba_byte_original")]
    return pd.concat([
        budgets_at(preset.model, preset.train.batch_size, preset.train.context, p.forms)
        for preset in presets], ignore_index=True)


def _state_frame() -> pd.DataFrame:
    """Streaming state of mamba_byte, of attention at its size, and of the 3:1 mixture."""
    rows = []
    for exponent in range(4, 21, 2):
        seen = 2**exponent
        for pattern in ("M", "A", "MMMA"):
            # A window no shorter than the text: the plain KV cache of attention.
            config = replace(PRESETS["mamba_byte"].model, layer_pattern=pattern,
                             attention_window=2**21)
            rows.append({"bytes seen": seen, "pattern": pattern,
                         "state, B": sum(state_bytes(config, seen).values())})
    return pd.DataFrame(rows)


def _devices_frame(p: Parameters) -> pd.DataFrame:
    preset = PRESETS["mamba_byte"]
    rows = []
    for gigabytes in DEVICES_GB:
        for form in p.forms:
            if form == "sequential":
                continue
            for autocast in ("fp32", "bf16"):
                kind: Autocast = "bf16" if autocast == "bf16" else "fp32"
                train = replace(preset.train, precision=kind)
                model = replace(preset.model, scan_form=form)
                found = fit(model, train, int(gigabytes * GB))
                original = fit(model, replace(train, batch_size=64, context=2048),
                               int(gigabytes * GB))
                rows.append({
                    "device, GB": gigabytes, "form": form, "autocast": autocast,
                    "largest batch at 1024": found.largest_batch,
                    "largest context at batch 16": found.largest_context,
                    "64 x 2048 fits": original.fits,
                    "spare at 64 x 2048, GB": (original.spare_bytes or 0) / GB})
    return pd.DataFrame(rows)


def _document_frame(p: Parameters) -> pd.DataFrame:
    """The document's statements about memory, in its numbers and in ours."""
    before, after = PRESETS["mamba_byte_original"], PRESETS["mamba_byte"]
    config = replace(before.model, scan_form="document_chunked")

    def tensor(train: TrainConfig) -> int:
        return (train.batch_size * train.context * config.d_inner * config.d_state * FLOAT32)

    def kept(train: TrainConfig, autocast: Autocast, part: str = "") -> int:
        return sum(t.bytes for t in saved_terms(config, train.batch_size, train.context, autocast)
                   if part in ("", t.part))

    n = p.counted_layers
    counted = measure_saved(replace(config, n_layer=n), before.train.batch_size,
                            before.train.context, shapes_only=True)
    predicted = sum(t.bytes for t in saved_terms(
        replace(config, n_layer=n), before.train.batch_size, before.train.context))
    inputs = _scan_inputs(1, 256, 16, 16)
    joined = _wide_bytes(lambda: _scan_loss("document_chunked", inputs, 32), 16, 16)
    apart = _wide_bytes(lambda: _loss_without_concatenation(inputs, 32), 16, 16)
    old, new = (budget(config, t.batch_size, t.context, "bf16", "cuda")
                for t in (before.train, after.train))
    _, backward = scan_workspace("document_chunked", before.train.batch_size, before.train.context,
                                 config.d_inner, config.d_state, 32)
    full = tensor(before.train)
    per_layer = kept(before.train, "fp32", "scan") / full / before.model.n_layer
    rows = [
        ("tensor_gb", "one (B, L, D, N) float32 tensor at 64 x 2048, GB", "3.2", full / GB),
        ("kept_per_layer", "such tensors kept per layer", "5 to 7", per_layer),
        ("live_per_layer", "such tensors alive in a layer at its peak", "5 to 7",
         per_layer + backward / full),
        ("scan_kept_before_gb", "such tensors of four layers at 64 x 2048, GB", "64",
         kept(before.train, "fp32", "scan") / GB),
        ("kept_before_gb", "everything kept at 64 x 2048, float32, GB", None,
         kept(before.train, "fp32") / GB),
        ("kept_before_bf16_gb", "everything kept at 64 x 2048, bf16 autocast, GB", None,
         kept(before.train, "bf16") / GB),
        ("scan_kept_before_bf16_gb", "such tensors at 64 x 2048, bf16 autocast, GB",
         "smaller than in float32", kept(before.train, "bf16", "scan") / GB),
        ("scan_kept_after_gb", "such tensors at 16 x 1024, GB", "8",
         kept(after.train, "fp32", "scan") / GB),
        ("scan_cut", "cut of the scan's memory by the fix, times", "16",
         kept(before.train, "fp32", "scan") / kept(after.train, "fp32", "scan")),
        ("without_concatenation", "such tensors kept without concatenation, relative to with",
         "fewer", apart / joined),
        ("counted_at_size", f"counted / closed form at 64 x 2048, {n} layers", None,
         counted / predicted),
        ("peak_before_gb", "peak of a step at 64 x 2048, bf16 autocast, GB", "more than 40",
         old.peak / GB),
        ("peak_after_gb", "peak of a step at 16 x 1024, bf16 autocast, GB", "8 and the rest",
         new.peak / GB),
        ("margin", "40 GB over that peak, times", "4", 40 * GB / new.peak),
    ]
    frame = pd.DataFrame(rows, columns=["key", "statement", "document", "ours"])
    return frame.fillna({"document": "not stated"})


# ---------------------------------------------------------------------------- records of a GPU


def cuda_cases() -> list[tuple[ModelConfig, int, int, Autocast, bool]]:
    """What a GPU machine measures: both document configurations and sizes around them."""
    model = PRESETS["mamba_byte"].model
    hybrid = PRESETS["hybrid_3_1"].model
    cases: list[tuple[ModelConfig, int, int, Autocast, bool]] = []
    for form in ("document_chunked", "chunked", "corrected_cumsum", "fused"):
        config = replace(model, scan_form=form)
        for batch, length in ((8, 512), (16, 1024), (32, 1024), (64, 2048)):
            cases += [(config, batch, length, "bf16", False),
                      (config, batch, length, "fp32", False)]
        cases.append((config, 64, 2048, "bf16", True))
    cases += [(replace(hybrid, scan_form=form), 8, 1024, "bf16", False)
              for form in ("chunked", "fused")]
    cases.append((replace(model, layer_pattern="A"), 16, 1024, "bf16", False))
    return cases


def measure_on_cuda(report: Callable[[str], None]) -> pd.DataFrame:
    """Every case of ``cuda_cases`` on this machine's GPU, by its allocator."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is available: this measurement needs one")
    rows = []
    for case in cuda_cases():
        row = measure_cuda_peak(*case)
        rows.append(row)
        report(" ".join(str(value) for value in row.values() if value is not None))
    return pd.DataFrame(rows)


def beside_closed_form(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows that a GPU measured, of ``cuda_cases`` at any time, beside the closed form of today.

    A row that could not be measured stays, with its "error". UserError for a row of no case.
    """
    cases = {tuple(_case_columns(*case).values()): case for case in cuda_cases()}
    keys = list(_case_columns(*cuda_cases()[0]))
    rows = []
    for row in measured.to_dict("records"):
        case = cases.get(tuple(row[key] for key in keys))
        if case is None:
            raise UserError(f"{RECORDED} has a row that is no case of this study: "
                            f"{ {key: row[key] for key in keys} }")
        config, batch, context, autocast, checkpointing = case
        step = budget(config, batch, context, autocast, "cuda", checkpointing)
        kept = sum(t.bytes for t in saved_terms(
            config, batch, context, autocast, "cuda", checkpointing))
        peak_measured, kept_measured = (row[name] for name in MEASURED)
        rows.append({
            **{key: row[key] for key in keys}, "worst moment": step.worst_moment,
            "kept, closed form, MB": kept / MB, "kept, measured, MB": kept_measured,
            "kept, closed form / measured": kept / MB / kept_measured if kept_measured else None,
            "peak, closed form, MB": step.peak / MB, "peak, measured, MB": peak_measured,
            "peak, closed form / measured":
                step.peak / MB / peak_measured if peak_measured else None})
    return pd.DataFrame(rows)


def recorded_frame() -> pd.DataFrame:
    """The record RECORDED beside the closed form of today; columns of ``beside_closed_form``."""
    return beside_closed_form(load_record(DATA / RECORDED).run.tables["cuda"].frame)
