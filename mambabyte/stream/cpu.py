"""A whole byte model in C on the CPU, byte after byte: ``ops/stream/model.c``, for batch 1.

Through torch a byte of a small model costs forty calls of some microseconds each, many times the
arithmetic. Here it is one call. Weights are read where the model has them, so that the next byte
after an optimizer's step is the new model's.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.attention import AttentionMixer, AttentionState
from mambabyte.model.block import MLP, Block, RMSNorm
from mambabyte.model.mamba import MambaMixer, MambaState
from mambabyte.model.mixer import LayerState, Mixer, mixers
from mambabyte.ops.build import c as native_build
from mambabyte.ops.scan import cpu as native_scan

SOURCE = Path(__file__).parent.parent / "ops/stream/model.c"
Advance = Callable[[bytes, Any], tuple[Tensor, Any]]
MOST_BYTES = 16  # in one call; longer texts are faster in parallel
_STALE = 2
_PARTS = (ByteLM, Block, MLP, nn.ModuleList, nn.Embedding, nn.Linear, nn.Conv1d, nn.LayerNorm,
          RMSNorm)  # fmt: skip
_ACTIVATIONS = {"relu2": 0, "gelu": 1, "silu": 2}
_MAMBA = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
          "dt_proj.bias", "A_log", "D", "", "", "", "out_proj.weight")  # fmt: skip
_ATTENTION = ("",) * 8 + ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
_MLP = ("mlp_norm.weight", "mlp_norm.bias", "mlp.up_proj.weight", "mlp.out_proj.weight")
_pack_model = struct.Struct("17q4d4q").pack
_pack_call = struct.Struct("4q").pack


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

    A ByteLM of Mamba and attention layers, with any norm, MLP and head, without biases, gains of
    branches, mixing or skips, in float32 on the CPU, of
    at least 256 symbols, with scan_form "auto" or "fused"; without hooks, foreign or parametrized
    parts, or autocast; and a C compiler.
    """
    if type(model) is not ByteLM or model.config.vocab_size < 256 or model.config.has_extras:
        return False
    if model.config.scan_form not in ("auto", "fused") or torch.is_autocast_enabled("cpu"):
        return False
    if any(type(m) not in (*_PARTS, *_KINDS) or m._forward_hooks or m._forward_pre_hooks
           for m in model.modules()):
        return False
    return (_as_configured(model) and all(map(_readable, model.parameters()))
            and _library() is not None)


def shortcut(model: Any, advance: Advance) -> Advance:
    """``advance``, but in C for up to MOST_BYTES bytes where ``supports(model)``."""
    if not supports(model):
        return advance
    native = NativeModel(model)

    def either(data: bytes, state: Any) -> tuple[Tensor, Any]:
        return native(data, state) if len(data) <= MOST_BYTES else advance(data, state)

    return either


def _parameter_names(model: ByteLM) -> list[str]:
    """Where the C structs ``model`` and ``layer`` have pointers; "" where a layer has nothing."""
    config = model.config
    head = "embedding.weight" if config.tied_head else "head.weight"
    names = ["embedding.weight", head, "norm_f.weight", "norm_f.bias"]
    for i, kind in enumerate(_kinds(model)):
        mixer = [name and f"mixer.{name}" for name in kind.names]
        mlp = list(_MLP) if config.mlp_hidden else [""] * len(_MLP)
        names += [name and f"layers.{i}.{name}" for name in ("norm.weight", "norm.bias",
                                                            *mixer, *mlp)]  # fmt: skip
    return names


def _new(*shape: int) -> Tensor:
    """Memory for the C code to fill, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _as_configured(model: ByteLM) -> bool:
    """Whether the mixers still have the form and the window that the configuration says."""
    return all(mixer.as_configured(model.config) for mixer in mixers(model, Mixer))


def _kinds(model: ByteLM) -> list[_Kind]:
    """What the C code has for the mixer of each layer."""
    return [_KINDS[type(mixer)] for mixer in mixers(model, Mixer)]


def _readable(x: Tensor) -> bool:
    return (x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()
            and x.numel() * x.element_size() <= x.untyped_storage().nbytes())


class NativeModel:
    """``(data, state) -> (log p of the next byte, state)`` of a model that ``supports`` accepts.

    States are those of ``ByteLM`` at batch 1, in and out; no state is ever written to.
    """

    def __init__(self, model: ByteLM) -> None:
        library = _library()
        assert library is not None
        self._library = library
        config = self.config = model.config
        # Looked up anew in every call, as parameters may be replaced: a dict and a name each.
        self._slots: list[tuple[Mapping[str, Tensor | None], str]] = []
        for path in _parameter_names(model):
            owner, _, name = path.rpartition(".")
            self._slots.append((model.get_submodule(owner)._parameters if path else {}, name))
        layer_norm = config.norm == "layer"
        tiny = torch.finfo(torch.float32).eps
        eps = model.norm_f.eps if isinstance(model.norm_f.eps, float) else tiny
        self._shape = (
            *(config.n_layer, config.d_model, config.vocab_size, not layer_norm),
            *(config.embed_norm, config.mlp_hidden, _ACTIVATIONS[config.mlp_activation]),
            *(config.d_inner, config.d_state, config.d_conv),
            0 if config.dt_rank == "full" else config.dt_rank_value,
            config.n_head if AttentionMixer.letter in config.layers else 0,
            *(config.n_kv_head, config.head_dim),
            *(config.attention_window, config.qk_norm),
            max(1, round(config.head_dim // 2 * config.rope_fraction)),
            *(eps, tiny, config.logit_softcap, config.rope_base),
        )
        self._kinds = _kinds(model)
        self._conv_state = (1, config.d_conv - 1, config.d_inner)
        self._ssm_state = (1, config.d_inner, config.d_state)
        self._pack_states = struct.Struct(f"{7 * config.n_layer}q").pack
        self._shapes = [_shape(slot.get(name)) for slot, name in self._slots]
        self._weights = _Weights([], [], b"", b"", torch.empty(0))

    def __call__(
        self, data: bytes, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState]]:
        """Advance by ``data``, a byte or more; log p is (V,) float32."""
        pointers = [0 if (x := slot.get(name)) is None else x.data_ptr()
                    for slot, name in self._slots]
        # C reads what this call holds: another thread may give the model other parameters, and
        # this object other weights.
        weights = self._weights if pointers == self._weights.pointers else self._follow()
        length = len(data)
        if not length:
            raise UserError("there is no byte to advance by")
        held: list[Tensor] = []  # kept alive while C reads their memory
        words: list[int] = []
        after: list[LayerState] = []
        position = 0
        for i, kind in enumerate(self._kinds):
            before = None if state is None else state[i]
            if before is not None and kind.has_position:
                position = before.position
            after.append(kind.memory(self, before, length, words, held))
        result = _new(self.config.vocab_size)
        states = self._pack_states(*words)
        while True:
            call = _pack_call(length, position, result.data_ptr(), weights.kept.data_ptr())
            failed = self._library.advance(weights.words, weights.layers, states, call, data)
            if failed == _STALE:
                self._weights = weights = weights._replace(
                    kept=self._keep(weights.words, weights.layers))
            elif failed:
                raise MemoryError("native model: no scratch memory")
            else:
                return result, after

    def mamba(
        self, before: MambaState | None, length: int, words: list[int], held: list[Tensor]
    ) -> MambaState:
        """Append the C struct ``memory`` to ``words``; returns the state that C will fill."""
        conv_state, ssm_state = _new(*self._conv_state), _new(*self._ssm_state)
        if before is not None:
            first, second = _plain(before.conv_state), _plain(before.ssm_state)
            _check("conv_state", first, self._conv_state)
            _check("ssm_state", second, self._ssm_state)
            held += first, second
            words += first.data_ptr(), second.data_ptr()
        else:
            words += 0, 0
        words += conv_state.data_ptr(), ssm_state.data_ptr(), 0, 0, 0
        return MambaState(conv_state, ssm_state)

    def attention(
        self, before: AttentionState | None, length: int, words: list[int], held: list[Tensor]
    ) -> AttentionState:
        """As ``mamba``."""
        stored = position = 0
        old = [0, 0, 0, 0]
        if before is not None:
            stored = before.k.shape[2] if before.k.ndim == 4 else 0
            for name, x in (("k", before.k), ("v", before.v)):
                _check(name, x, (1, self.config.n_kv_head, stored, self.config.head_dim))
            first, second = _plain_rows(before.k), _plain_rows(before.v)
            held += first, second
            position = before.position
            old = [first.data_ptr(), second.data_ptr(), first.stride(1), second.stride(1)]
        shape = (1, self.config.n_kv_head, stored + length, self.config.head_dim)
        k, v = _new(*shape), _new(*shape)
        words += *old[:2], k.data_ptr(), v.data_ptr(), stored, *old[2:]
        start = max(0, stored + length - (self.config.attention_window - 1))
        return AttentionState(k[:, :, start:], v[:, :, start:], position + length)

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
        words = _pack_model(*self._shape, *pointers[:4])
        size = (len(pointers) - 4) // len(self._kinds)
        each: list[int] = []
        for i, kind in enumerate(self._kinds):
            each += kind.tag, *pointers[4 + i * size : 4 + (i + 1) * size]
        layers = struct.pack(f"{len(each)}q", *each)
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


class _Kind(NamedTuple):
    """What the C code has for one kind of mixer."""

    tag: int  # in the C struct ``layer``
    names: tuple[str, ...]  # its parameters, where that struct has pointers
    memory: Callable[..., LayerState]  # appends the struct ``memory``, returns the next state
    has_position: bool  # whether its state says how many bytes came before


_KINDS: dict[type[Mixer], _Kind] = {
    MambaMixer: _Kind(0, _MAMBA, NativeModel.mamba, False),
    AttentionMixer: _Kind(1, _ATTENTION, NativeModel.attention, True),
}


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _plain_rows(x: Tensor) -> Tensor:
    """(1, H, S, d) in float32 with the rows of a head one after another."""
    one_by_one = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if x.dtype is torch.float32 and one_by_one else x.float().contiguous()
