"""Greedy next characters at many places of a text at once, as ``CharModel.greedy`` finds them.

At most places the byte probabilities settle it: an ASCII character beats every lead byte. Where a
longer character is in question the model has to be asked what follows its first bytes. All such
questions, of all places, are asked together: each is a row of tokens from the start of a window,
whose state is known, up to the place and a prefix beyond. The model is causal, so what pads the
shorter rows at their ends does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambabyte.corpus.utf8 import continuation_range, utf8_length
from mambabyte.stream import ByteModel
from mambabyte.stream.states import can_batch, kind, n_bytes, select, split, stack

_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}  # (rows, length) that the model is given at once
_CALL = {"cpu": 100, "cuda": 10_000}  # tokens that cost as much as calling it does
_STATE_BYTES = 1 << 29  # of states kept between the windows' starts
_LEAST_SPACING = 16
_ROUNDS = 2  # as most characters longer than one byte have three, and are asked about twice
_LEADS = np.arange(0xC2, 0xF5)
_NEED = np.array([utf8_length(byte) for byte in range(256)])
_SECOND = np.zeros((256, 256), dtype=bool)  # which byte may come second after which first
for _lead in _LEADS:
    _SECOND[_lead, list(continuation_range(bytes([_lead])))] = True


class Windows:
    """A text ``inputs`` (L,) uint8 as a model reads it, and its states at some of the places.

    ``states[i]`` is the state before ``inputs[starts[i]]``, of batch 1; the starts ascend.
    """

    def __init__(
        self, model: ByteModel, inputs: np.ndarray, starts: Sequence[int], states: list[Any]
    ) -> None:
        self.model, self.inputs = model, inputs
        device = model.device.type
        self._limit, self._call = _TOKENS.get(device, _TOKENS["cpu"]), _CALL.get(device, 100)
        self._set(np.asarray(starts), states)

    def _set(self, starts: np.ndarray, states: list[Any]) -> None:
        self.starts, self._states = starts, states
        # Windows whose states differ in their tensors' numbers alone can be rows of one batch. A
        # state that we cannot look into is one row, alone.
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, state in enumerate(states):
            groups[kind(state) if can_batch(state) else object()].append(i)
        self._groups = [np.array(group) for group in groups.values()]

    def refine(self, places: np.ndarray) -> None:
        """Find states between the starts too, where that costs less than it saves at ``places``."""
        asked = np.searchsorted(self.starts, places, side="right") - 1
        starts, states = list(self.starts), list(self._states)
        for group in self._groups:
            mine = np.isin(asked, group)
            members = np.unique(asked[mine])
            if not len(members) or not can_batch(self._states[members[0]]):
                continue
            known = places[mine] - self.starts[asked[mine]] + 1
            length, rows, questions = int(known.max()), len(members), _ROUNDS * len(known)
            spacing = int(np.sqrt(2 * length * self._call / questions))
            size = max(n_bytes(self._states[i]) for i in members)
            spacing = max(spacing, _LEAST_SPACING, rows * length * size // _STATE_BYTES)
            cost = rows * length + self._call * length / spacing + questions * spacing / 2
            if cost > _ROUNDS * known.sum():
                continue
            for part in np.array_split(members, -(-rows * spacing // self._limit)):
                first = self.starts[part]
                at = np.minimum(first[:, None] + np.arange(length), len(self.inputs) - 1)
                tokens = torch.from_numpy(self.inputs[at]).to(self.model.device).long()
                state = stack([self._states[i] for i in part])
                for begin in range(0, length - spacing, spacing):
                    _, state = self.model(tokens[:, begin : begin + spacing], state)
                    starts += list(first + begin + spacing)
                    # (The text's first window has no state yet, and its next may be one that
                    # we cannot look into: a single row needs no splitting.)
                    states += split(state) if len(part) > 1 else [state]
        order = np.argsort(starts, kind="stable")
        self._set(np.array(starts)[order], [states[i] for i in order])

    def after(self, places: np.ndarray, prefixes: np.ndarray) -> Tensor:
        """Log p (n, V) float32 on the CPU, each after the text up to ``inputs[place]`` and then
        its prefix; places (n,), prefixes (n, k) uint8."""
        window = np.searchsorted(self.starts, places, side="right") - 1
        known = places - self.starts[window] + 1
        rows: list[np.ndarray] = []
        found: list[Tensor] = []
        for members in self._groups:
            limit = self._limit if can_batch(self._states[members[0]]) else 0
            mine = np.flatnonzero(np.isin(window, members))
            mine = mine[np.argsort(known[mine], kind="stable")]
            while len(mine):
                # Rows of about the same length; the longest comes last.
                sizes = (known[mine] + prefixes.shape[1]) * np.arange(1, len(mine) + 1)
                batch, mine = np.split(mine, [max(1, int(np.searchsorted(sizes, limit, "right")))])
                tokens = self._tokens(places[batch], known[batch], prefixes[batch])
                used, which = np.unique(window[batch], return_inverse=True)
                states = [self._states[i] for i in used]
                last = torch.from_numpy(known[batch] + prefixes.shape[1] - 1)
                # A state that we cannot look into is one row, as it is.
                state = select(stack(states), torch.from_numpy(which)) if limit else states[0]
                logits, _ = self.model(tokens, state)
                at = logits[torch.arange(len(batch), device=logits.device), last.to(logits.device)]
                found.append(torch.log_softmax(at.float(), -1))
                rows.append(batch)
        order = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return torch.cat(found).cpu()[order]

    def _tokens(self, places: np.ndarray, known: np.ndarray, prefixes: np.ndarray) -> Tensor:
        """Each row's text from its window's start on, its prefix, and anything after that."""
        length = int(known.max()) + prefixes.shape[1]
        at = (places + 1 - known)[:, None] + np.arange(length)
        tokens = self.inputs[np.minimum(at, len(self.inputs) - 1)]
        into = known[:, None] + np.arange(prefixes.shape[1])
        np.put_along_axis(tokens, into, prefixes, axis=1)
        return torch.from_numpy(tokens).to(self.model.device).long()


def greedy_codes(windows: Windows, places: Tensor, log_probs: Tensor) -> Tensor:
    """Code point of the most probable character after ``inputs[place]``, the lowest of equals.

    ``log_probs`` (n, V) are those of the next byte at each of the places (n,); both are on the
    model's device, and so is the result.
    """
    first = log_probs.exp()
    best, code = first[:, :0x80].max(-1)
    in_question = (first[:, 0xC2:0xF5].max(-1).values > best).nonzero()[:, 0]
    if not len(in_question):
        return code
    asked = places[in_question].cpu().numpy()
    windows.refine(asked)
    # float32 probabilities, multiplied in float64: as CharModel does.
    known = log_probs[in_question].cpu().exp().double().numpy()
    code[in_question] = torch.from_numpy(_search(windows, asked, known)).to(code.device)
    return code


def _search(windows: Windows, places: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The same from probabilities ``first`` (n, V): all prefixes that could still lead to a better
    character are followed together, one byte a round."""
    best, code = first[:, :0x80].max(1), first[:, :0x80].argmax(1)
    owner, lead = np.nonzero(first[:, _LEADS] > best[:, None])
    prefix = _LEADS[lead].astype(np.uint8)[:, None]
    chance = first[owner, prefix[:, 0]]
    while len(owner):
        size = prefix.shape[1]
        following = windows.after(places[owner], prefix).exp().double().numpy()[:, 0x80:0xC0]
        if size == 1:
            following = following * _SECOND[prefix[:, 0], 0x80:0xC0]
        chances = chance[:, None] * following  # (prefixes, 64)
        values = (_code_points(prefix)[:, None] << 6) + np.arange(64)

        whole = _NEED[prefix[:, 0]] == size + 1
        for i, p, value in zip(owner[whole], chances[whole], values[whole], strict=True):
            at = int(p.argmax())  # the first of equals has the lowest code point
            if (-p[at], value[at]) < (-best[i], code[i]):
                best[i], code[i] = p[at], value[at]
        # A longer character equally probable would win by a lower code point.
        shift = 6 * (_NEED[prefix[:, 0]] - size - 1)[:, None]
        level = (chances == best[owner, None]) & (values << shift < code[owner, None])
        row, byte = np.nonzero(((chances > best[owner, None]) | level) & ~whole[:, None])
        prefix = np.concatenate([prefix[row], (0x80 + byte).astype(np.uint8)[:, None]], 1)
        owner, chance = owner[row], chances[row, byte]
    return code


def _code_points(prefix: np.ndarray) -> np.ndarray:
    """What the bits of incomplete characters (n, k) say so far."""
    value = prefix[:, 0].astype(np.int64) & (0x7F >> _NEED[prefix[:, 0]])
    for byte in prefix[:, 1:].T:
        value = (value << 6) + (byte & 0x3F)
    return value
