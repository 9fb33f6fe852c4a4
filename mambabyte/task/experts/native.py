"""The experts, and their gate once it is fitted, on the CPU: ``experts.c``, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambabyte.errors import NonFiniteError
from mambabyte.ops.build import c as native_build
from mambabyte.ops.stream.feeding import NOT_NUMBERS
from mambabyte.task.experts.contexts import PADDING, ContextTable
from mambabyte.task.experts.matches import MATCH_DISCOUNT, Matches
from mambabyte.task.ngram import NgramModel, V

SOURCE = Path(__file__).with_name("experts.c")
FEATURES = 4  # numbers that a gate reads of each expert
MOST, MOST_HIDDEN = 64, 256  # experts and hidden units, as in the source
_pointer, _int = ctypes.c_void_p, ctypes.c_int64
_Discounts = ctypes.c_double * 3


class _Level(ctypes.Structure):
    _fields_ = [("contexts", _int), ("begin", _pointer), ("key", _pointer), ("start", _pointer),
                ("total", _pointer), ("symbol", _pointer), ("count", _pointer),
                ("discount", _Discounts), ("is_expert", _int)]


class _Table(ctypes.Structure):
    _fields_ = [("pairs", _int), ("key", _pointer), ("count", _pointer), ("discount", _Discounts),
                ("length", _int), ("words", _int), ("skip", _int), ("fold", _int)]


class _Mixture(ctypes.Structure):
    _fields_ = [("levels", _int), ("tables", _int), ("matches", _int), ("others", _int),
                ("hidden", _int), ("reach", _int), ("newest", _int), ("level", _pointer),
                ("table", _pointer), ("match", _pointer), ("match_discount", ctypes.c_double),
                ("weight_in", _pointer), ("bias_in", _pointer), ("weight_out", _pointer),
                ("bias_out", _pointer)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None without a C compiler or a place to keep what it makes."""
    loaded = native_build.load(SOURCE)
    if isinstance(loaded, str):
        return None
    loaded.found_bytes.restype = _int
    # Told once, as a byte is looked up often.
    loaded.look_up.argtypes = _pointer, _pointer, _int, _int, _pointer
    loaded.mix.argtypes = _pointer, _pointer, _pointer, _pointer
    return loaded


class NativeExperts:
    """Counted experts whose tables are on the CPU, ``others`` that are not counted, and a gate.

    ``gate``: weight and bias of its hidden layer, then of its softmax; without one only ``read``
    works. Holds pointers into all these tensors, which must not change. RuntimeError without a C
    compiler.
    """

    def __init__(
        self, ngram: NgramModel, orders: Sequence[int], tables: Sequence[ContextTable],
        matches: Matches, others: int, gate: Sequence[Tensor] = (),
    ) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("no C compiler")
        self._library, self._others = loaded, others
        self.n_experts = len(orders) + len(tables) + len(matches.lengths) + others
        assert self.n_experts <= MOST
        assert ngram.order <= PADDING
        assert not gate or len(gate[1]) <= MOST_HIDDEN
        assert ngram.tables is not None
        levels = (_Level * ngram.order)(*(
            _Level(len(level.key), *(_at(t) for t in (begin, level.key, level.start, level.total,
                                                      level.symbol, level.count)),
                   _Discounts(*discounts), m + 1 in orders)
            for m, (level, discounts, begin) in enumerate(zip(
                ngram.levels, ngram.discounts, ngram.tables.begins, strict=True))))
        counts = (_Table * len(tables))(*(
            _Table(len(t.key), _at(t.key), _at(t.count), _Discounts(*t.discounts),
                   t.context.length, t.context.words, t.context.skip, t.context.fold)
            for t in tables))
        lengths = (_int * len(matches.lengths))(*matches.lengths)
        weights = [p.detach().float().t().contiguous() for p in gate]
        self._kept = ngram, tables, levels, counts, lengths, weights
        self._mixture = _Mixture(
            len(levels), len(counts), len(lengths), others, len(weights[1]) if gate else 0,
            matches.reach, matches.newest, ctypes.addressof(levels), ctypes.addressof(counts),
            ctypes.addressof(lengths), MATCH_DISCOUNT[0], *(_at(w) for w in weights))
        self._at = ctypes.addressof(self._mixture)
        self._found_bytes = loaded.found_bytes(ctypes.byref(self._mixture))

    def look_up(self, text: bytes) -> Tensor:
        """What the counted experts say of the byte after ``text``, whose first PADDING bytes are no
        history: for ``mix``, once."""
        found = torch.empty(self._found_bytes, dtype=torch.uint8, device="cpu")
        self._library.look_up(self._at, text, PADDING, len(text), found.data_ptr())
        return found

    def mix(self, found: Tensor, others: Tensor | None = None) -> Tensor:
        """Log p (V,) float32 of the byte that ``look_up`` was asked for; others (n, V), or (V,) if
        there is one. NonFiniteError where it is nan."""
        log_p = torch.empty(V, dtype=torch.float32, device="cpu")
        if self._others:
            assert others is not None
            assert others.numel() == self._others * V
            others = others.float().contiguous()
        if self._library.mix(self._at, None if others is None else others.data_ptr(),
                             found.data_ptr(), log_p.data_ptr()):
            raise NonFiniteError(NOT_NUMBERS)
        return log_p

    def log_p(
        self, text: np.ndarray, begin: int, end: int, others: Tensor | None = None
    ) -> Tensor:
        """Log p (end - begin, V) float32 of the byte at these places of text (L,) uint8, whose
        first PADDING bytes are no history; others (end - begin, n, V)."""
        made = torch.empty(end - begin, V, dtype=torch.float32, device="cpu")
        self._call(text, begin, end, others, made, None)
        return made

    def read(
        self, text: np.ndarray, begin: int, others: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each expert gives the bytes text[begin:], (L, E), and what a gate reads there,
        (L, FEATURES * E), both float32; arguments as in ``log_p``."""
        size = len(text) - begin
        picked = torch.empty(size, self.n_experts, dtype=torch.float32, device="cpu")
        seen = torch.empty(
            size, FEATURES * self.n_experts, dtype=torch.float32, device="cpu")
        self._call(text, begin, len(text), others, picked, seen)
        return picked, seen

    def _call(
        self, text: np.ndarray, begin: int, end: int, others: Tensor | None, out: Tensor,
        seen: Tensor | None,
    ) -> None:
        assert PADDING <= begin <= end <= len(text) + (seen is None)
        text = np.ascontiguousarray(text)
        if self._others:
            assert others is not None
            assert others.shape == (end - begin, self._others, V)
            others = others.float().contiguous()
        threads = max(1, min(torch.get_num_threads(), 64, (end - begin) // 16))
        self._library.mixture(
            ctypes.byref(self._mixture), ctypes.c_void_p(text.ctypes.data), _int(PADDING),
            _int(begin), _int(end),
            None if others is None else _at(others), threads, seen is None, _at(out),
            None if seen is None else _at(seen))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
