"""A whole byte model in C on the CPU, byte after byte: ``ops/stream/model.c``, for batch 1.

Through torch a byte of a small model costs forty calls of some microseconds each, many times the
arithmetic. Here it is one call. Weights are read where the model has them, so that the next byte
after an optimizer's step is the new model's.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.families.attention import AttentionState
from mambabyte.model.mixer import LayerState, Mixer, mixers
from mambabyte.ops.build import c as native_build
from mambabyte.ops.scan import cpu as native_scan
from mambabyte.stream.engines.base import Engine, Network, TorchEngine
from mambabyte.stream.engines.layout import (
    BLOCK,
    KINDS,
    MODEL,
    OWN,
    Kind,
    is_known,
    model_numbers,
    pack_layer,
    pack_model,
    parameter_names,
)
from mambabyte.stream.engines.rows import Cache, Room

_LOG = logging.getLogger(__name__)
SOURCE = Path(__file__).parents[2] / "ops/stream/model.c"
MOST_BYTES = 16  # in one call; longer texts are faster in parallel
_STALE = 2
_LEAST_ROOM = 64  # bytes that a cache of attention can grow by in place
_pack_call = struct.Struct("8q").pack


class _Library(NamedTuple):
    advance: Callable[[bytes, bytes, bytes, bytes, bytes], int]
    keep: Callable[[bytes, bytes, int], None]
    kept_size: Callable[[bytes], int]


@functools.cache
def _library() -> _Library | None:
    if not native_scan.available()[0]:
        return None  # the scan says why, in one line
    loaded = native_build.load(SOURCE)
    if isinstance(loaded, str):
        warnings.warn(f"streaming through torch, not in C: {loaded}", RuntimeWarning, stacklevel=4)
        return None
    text = ctypes.c_char_p
    loaded.advance.argtypes, loaded.advance.restype = [text] * 5, ctypes.c_int
    loaded.keep.argtypes, loaded.keep.restype = [text, text, ctypes.c_void_p], None
    loaded.kept_size.argtypes, loaded.kept_size.restype = [text], ctypes.c_int64
    return _Library(loaded.advance, loaded.keep, loaded.kept_size)


def supports(model: nn.Module) -> bool:
    """Whether :class:`NativeModel` computes what ``model`` does.

    A ByteLM of any registered layers in float32 on the CPU, of at least 256 symbols, with
    scan_form "auto" or "fused"; without hooks, foreign or parametrized parts, or autocast; and a C
    compiler.
    """
    if type(model) is not ByteLM or model.config.vocab_size < 256:
        return False
    if model.config.scan_form not in ("auto", "fused") or torch.is_autocast_enabled("cpu"):
        return False
    return (is_known(model) and all(map(_readable, model.parameters()))
            and _library() is not None)


@functools.cache
def say_foreign(names: str) -> None:
    """Say once why a model of registered layers streams slowly."""
    _LOG.warning("note: %s runs through torch, byte after byte: no engine has that layer", names)


def foreign_layers(model: Any) -> str:
    """The classes of a ByteLM's layers that the engine does not have, by name."""
    found = {type(m).__name__ for m in mixers(model, Mixer)} if type(model) is ByteLM else set()
    return ", ".join(sorted(found - {kind.__name__ for kind in KINDS}))


def engine_for(model: Any) -> Engine:
    """What a model on the CPU streams by."""
    if names := foreign_layers(model):
        say_foreign(names)
    return NativeEngine(model) if supports(model) else TorchEngine(model)


class NativeEngine(Engine):
    """Up to MOST_BYTES bytes in C, of a model that ``supports`` accepts; more through torch."""

    name = "model.c"

    def __init__(self, model: ByteLM) -> None:
        self._native, self._parallel = NativeModel(model), TorchEngine(model)

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        few = len(data) <= MOST_BYTES
        return self._native(data, state) if few else self._parallel(data, state)

    def ahead(self, data: bytes, state: Any) -> tuple[Tensor, Callable[[int], Any]] | None:
        """As ``NativeModel.ahead``; None for more than MOST_BYTES bytes."""
        return self._native.ahead(data, state) if len(data) <= MOST_BYTES else None


def network_for(model: ByteLM, guided: nn.Module) -> Network:
    """What the network ``model`` of ``guided`` (task/guide.py) goes on by on the CPU."""
    readable = plain_parts(guided) and all(map(_readable, guided.parameters()))
    return NativeNetwork(model, guided) if readable and supports(model) else Network(model)


class NativeNetwork(Network):
    """A network in C, with the parts ``prior``, ``best``, ``kind`` and ``gate`` around it."""

    name = NativeEngine.name
    hints = True

    def __init__(self, model: ByteLM, guided: nn.Module) -> None:
        super().__init__(model)
        self._native = NativeModel(model, guided)

    def guided(self, data: bytes, state: Any, hint: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return self._native.guided(data, state, hint)


def plain_parts(guided: nn.Module) -> bool:
    """Whether what a guided model has around its network computes what the engines do."""
    return all(type(part) in (nn.Linear, nn.Embedding) and not part._forward_hooks
               and not part._forward_pre_hooks
               for part in (getattr(guided, name) for name in ("prior", "best", "kind", "gate")))


def _new(*shape: int) -> Tensor:
    """Memory for the C code to fill, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _kinds(model: ByteLM) -> list[Kind]:
    """What the C code has for the mixer of each layer."""
    return [KINDS[type(mixer)] for mixer in mixers(model, Mixer)]


def _readable(x: Tensor) -> bool:
    return (x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()
            and x.numel() * x.element_size() <= x.untyped_storage().nbytes())


class NativeModel:
    """``(data, state) -> (log p of the next byte, state)`` of a model that ``supports`` accepts.

    States are those of ``ByteLM`` at batch 1, in and out; none that was given out ever changes.
    """

    def __init__(self, model: ByteLM, guided: nn.Module | None = None) -> None:
        library = _library()
        assert library is not None
        self._library = library
        config = self.config = model.config
        self._kinds = _kinds(model)
        # Looked up anew in every call, as parameters may be replaced: a dict and a name each.
        self._slots: list[tuple[Mapping[str, Tensor | None], str]] = []
        modules = dict(model.named_modules())
        if guided is not None:
            modules |= {f"guided.{name}": part for name, part in guided.named_children()}
        for path in parameter_names(config, self._kinds):
            owner, _, name = path.rpartition(".")
            found = modules.get(owner)  # a block without an MLP has none
            self._slots.append((found._parameters if path and found is not None else {}, name))
        self._shape = model_numbers(model)
        # Outputs that later layers add: each is kept under a number.
        slots = {skip: i for i, skip in enumerate(s for s in config.skips if s is not None)}
        self._layers = [
            (kind.tag, window, -1 if skip is None else slots[skip], slots.get(i, -1))
            for i, (kind, window, skip) in enumerate(zip(
                self._kinds, (getattr(m, "window", 0) for m in mixers(model, Mixer)),
                config.skips, strict=True))]
        self._states = [[(1, *shape) for shape in type(m).state_shapes(config, 0).values()]
                        for m in mixers(model, Mixer)]
        self._pack_states = struct.Struct(f"{13 * config.n_layer}q").pack
        self._shapes = [_shape(slot.get(name)) for slot, name in self._slots]
        self._weights = _Weights([], [], b"", b"", torch.empty(0, device="cpu"))

    def __call__(
        self, data: bytes, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState]]:
        """Advance by ``data``, a byte or more; log p is (V,) float32."""
        log_probs = _new(self.config.vocab_size)
        return log_probs, self._run(len(data), data, state, log_probs=log_probs)

    def ahead(
        self, data: bytes, state: list[LayerState] | None
    ) -> tuple[Tensor, Callable[[int], list[LayerState]]]:
        """Log p (L, V) after each of ``data``, and what says the state after how many of them; to
        be asked once, as what lies behind that is given up. Each is as it would be alone."""
        log_probs = _new(len(data), self.config.vocab_size)
        after = self._run(len(data), data, state, log_probs=log_probs, each=True)
        kinds = [(kind.state, window) for kind, (_, window, *_) in
                 zip(self._kinds, self._layers, strict=True)]

        def first(count: int) -> list[LayerState]:
            return [layer.without(len(data) - count, window) if isinstance(layer, Cache)
                    else state_of(*(x[count - 1 : count] for x in layer))
                    for layer, (state_of, window) in zip(after, kinds, strict=True)]

        return log_probs, first

    def guided(
        self, data: bytes, state: list[LayerState] | None, hint: Sequence[Tensor]
    ) -> tuple[Tensor, list[LayerState]]:
        """As ``Network.guided``, of a model with ``guided`` around it."""
        log_probs = _new(self.config.vocab_size)
        hint = [x.contiguous() for x in hint]
        return log_probs, self._run(len(data), data, state, log_probs=log_probs, hint=hint)

    def _run(
        self, length: int, data: bytes, state: list[LayerState] | None,
        log_probs: Tensor, each: bool = False,
        hint: Sequence[Tensor | None] = (None, None, None),
    ) -> list[LayerState]:
        """Advance by ``length`` bytes, and fill the outputs that are given; with ``each``, rows of
        states (but of caches) are those after each byte."""
        pointers = [0 if (x := slot.get(name)) is None else x.data_ptr()
                    for slot, name in self._slots]
        # C reads what this call holds: another thread may give the model other parameters, and
        # this object other weights.
        weights = self._weights if pointers == self._weights.pointers else self._follow()
        if not length:
            raise UserError("there is no byte to advance by")
        held: list[Tensor] = []  # kept alive while C reads their memory
        words: list[int] = []
        after: list[LayerState] = []
        position = 0
        for i, (kind, shapes) in enumerate(zip(self._kinds, self._states, strict=True)):
            before = None if state is None else state[i]
            if kind.state is AttentionState:
                position = 0 if before is None else before.position
                after.append(self._cache(before, self._layers[i][1], length, words, held))
            else:
                after.append(_memory(kind, shapes, before, words, held, length if each else 1))
        states = self._pack_states(*words)
        hints = [0 if t is None else t.data_ptr() for t in hint]
        while True:
            call = _pack_call(length, position, log_probs.data_ptr(), weights.kept.data_ptr(),
                              each, *hints)
            failed = self._library.advance(weights.words, weights.layers, states, call, data)
            if failed == _STALE:
                self._weights = weights = weights._replace(
                    kept=self._keep(weights.words, weights.layers))
            elif failed:
                raise MemoryError("native model: no scratch memory")
            else:
                return after

    def _cache(
        self, before: AttentionState | None, window: int, length: int, words: list[int],
        held: list[Tensor],
    ) -> AttentionState:
        """As ``_memory``, of attention: keys and values are added behind those that are there,
        where nobody has added others, else to a copy."""
        heads, width = self.config.n_kv_head, self.config.head_dim
        stored = position = first = 0
        room = getattr(before, "room", None)
        if before is not None:
            before = before.alone()
            position, stored = before.position, before.k.shape[2] if before.k.ndim == 4 else 0
            for name, x in (("k", before.k), ("v", before.v)):
                _check(name, x, (1, heads, stored, width))
        if room is not None and room.extend(before.first + stored, length):  # type: ignore[union-attr]
            first = before.first  # type: ignore[union-attr]
            words += [0] * 4
            strides = [0, 0]
        else:
            # At least as many rows as are copied can follow: a copy costs a row each, in the mean.
            spare = max(_LEAST_ROOM, min(window, stored))
            room = Room(_new(2, heads, stored + length + spare, width), stored + length)
            old = [] if before is None else [_plain_rows(before.k), _plain_rows(before.v)]
            held += old
            words += [x.data_ptr() for x in old] or [0, 0]
            words += 0, 0
            strides = [x.stride(1) for x in old] or [0, 0]
        buffer = room.buffer
        held.append(buffer)
        at = buffer.data_ptr() + 4 * width * first
        words += at, at + 4 * buffer.stride(0), 0, 0, stored, *strides, *[buffer.stride(1)] * 2
        start = first + max(0, stored + length - (window - 1))
        k, v = buffer[:, None, :, start : first + stored + length]
        after = Cache(k, v, position + length)
        after.room, after.first = room, start
        return after

    def _follow(self) -> _Weights:
        """Note where the weights are, and hold them."""
        held = [None if (x := slot.get(name)) is None else x.detach() for slot, name in self._slots]
        for (_, name), x, shape in zip(self._slots, held, self._shapes, strict=True):
            if _shape(x) != shape or (x is not None and not _readable(x)):
                what = "gone" if x is None else f"{tuple(x.shape)} {x.dtype} on {x.device}"
                raise UserError(
                    f"{name} is {what} now: a stream goes on as it began, with contiguous float32 "
                    "of the same shape on the CPU; begin another"
                )
        pointers = [0 if x is None else x.data_ptr() for x in held]
        words = pack_model(*self._shape, *pointers[: len(MODEL)])
        size = len(BLOCK) + OWN
        layers = b"".join(
            pack_layer(*numbers, *pointers[at : at + size]) for numbers, at in
            zip(self._layers, range(len(MODEL), len(pointers), size), strict=True))
        self._weights = _Weights(pointers, held, words, layers, self._keep(words, layers))
        return self._weights

    def _keep(self, words: bytes, layers: bytes) -> Tensor:
        """The transposed parameters; a new tensor, as another thread may read the old one."""
        size = self._library.kept_size(words)
        kept = _new(len(self._kinds) * size)
        self._library.keep(words, layers, kept.data_ptr())
        return kept


class _Weights(NamedTuple):
    """What C reads of a model, kept alive as one: the addresses are those of ``held``."""

    pointers: list[int]
    held: list[Tensor | None]  # in the order of the slots
    words: bytes  # the C struct ``model``
    layers: bytes  # the C structs ``layer``
    kept: Tensor


def _shape(x: Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape or x.device.type != "cpu":
        raise UserError(f"{name} of the state is {tuple(x.shape)} on {x.device}, expected {shape} "
                        "on the CPU: a stream goes on from a state of its own model at batch 1")


def _memory(
    kind: Kind, shapes: Sequence[tuple[int, ...]], before: LayerState, words: list[int],
    held: list[Tensor], rows: int = 1,
) -> LayerState:
    """Append the C struct ``memory`` to ``words``; returns the state, of so many ``rows``, that C
    will fill."""
    after = [_new(rows, *shape[1:]) for shape in shapes]
    none = [0] * (4 - len(shapes))
    if before is None:
        words += [0] * 4
    else:
        for name, x, shape in zip(kind.state._fields, before, shapes, strict=True):  # type: ignore[attr-defined]
            _check(name, x, shape)
            held.append(_plain(x))
            words.append(held[-1].data_ptr())
        words += none
    words += [*(x.data_ptr() for x in after), *none, 0, 0, 0, 0, 0]
    return kind.state(*after)


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _plain_rows(x: Tensor) -> Tensor:
    """(1, H, S, d) in float32 with the rows of a head one after another."""
    one_by_one = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if x.dtype is torch.float32 and one_by_one else x.float().contiguous()
