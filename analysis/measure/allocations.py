"""The bytes that a training step really takes: saved tensors by hooks, the CPU's peak by profiler.

A tensor that autograd saves is seen by a hook, and its storage counted once, parameters left out.
Of the peak torch's profiler sees every allocation and release, to the byte; scratch memory that a
C kernel takes for itself is not seen. AllocationCounter counts what each operator makes anew.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analysis.theory.kept_tensors import STREAM_DTYPE, Autocast
from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM


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
        model = build_model(config, checkpointing)
        tokens = torch.randint(0, config.vocab_size, (batch, length + 1))
        return sum(size for _, size in saved_storages(
            lambda: model.loss(tokens), model, autocast))


class _Held:
    """What the pack hook leaves in the graph: alive as long as autograd keeps the tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_storages(
    loss: Callable[[], Tensor], model: nn.Module | None = None, autocast: Autocast = "fp32"
) -> list[tuple[tuple[int, ...], int]]:
    """(shape, bytes) of each storage held for the backward of ``loss()``, the model's left out."""
    live: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        # detach: an output saved by its own node would otherwise keep that node alive.
        held = _Held(tensor.detach())
        live.add(held)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor), autocast_to("cpu", autocast):
        value = loss()
    seen = {p.untyped_storage()._cdata for p in (model.parameters() if model else ())}
    found = []
    for held in live:
        storage = held.tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found.append((tuple(held.tensor.shape), storage.nbytes()))
    del value  # the graph, and what it held, lived until here
    return found


def autocast_to(device: str, autocast: Autocast) -> AbstractContextManager[Any]:
    """torch.autocast to bf16 or fp16, or nothing for fp32."""
    if autocast == "fp32":
        return nullcontext()
    return torch.autocast(device, dtype=STREAM_DTYPE[autocast])


def build_model(config: ModelConfig, checkpointing: bool = False, device: str = "cpu") -> ByteLM:
    """A model of fixed weights; ``checkpointing`` is torch.utils.checkpoint around every block."""
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
    """Peak bytes above the weights of forward and backward on the CPU, by torch's profiler."""
    model = build_model(config, checkpointing)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1))

    def step() -> None:
        with autocast_to("cpu", autocast):
            loss = model.loss(tokens)
        loss.backward()

    step()  # caches fill and kernels compile
    model.zero_grad(set_to_none=True)
    return peak_bytes(step)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that ``work`` holds at a time on the CPU, above what was there before."""
    return max(accumulate(_memory_events(work)))


def allocated_bytes(work: Callable[[], object]) -> int:
    """Bytes of all allocations that ``work`` makes on the CPU, released or not."""
    return sum(n for n in _memory_events(work) if n > 0)


def _memory_events(work: Callable[[], object]) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) on the CPU, in order."""
    from torch.profiler import ProfilerActivity

    from analysis.measure.timing import profiling

    # Cycles that ``work`` leaves are collected here: in a later profile, which knows their bytes,
    # they would count as released. What was there before is frozen, which makes that quick.
    gc.freeze()
    try:
        with profiling(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    finally:
        gc.collect()
        gc.unfreeze()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


class AllocationCounter(TorchDispatchMode):
    """Counts, by operator, the calls and the bytes of every tensor that an operator makes anew.

    A view makes nothing. The count is exact and the same on every machine; workspace inside an
    operator is not seen. Backward passes run under the mode that is active when they start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        name = str(func.overloadpacket)
        self.calls[name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self.bytes[name] += tensor.untyped_storage().nbytes()
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
