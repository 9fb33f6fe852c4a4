"""An n-gram model as a byte model: alone, or mixed with a neural one."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.model.lm import symbols
from mambabyte.stream import ByteModel, Engine, stream_engine
from mambabyte.task.ngram import NgramModel, V


def only_bytes(tokens: Tensor) -> Tensor:
    """``tokens`` (B, L) of any integers as int64; UserError where they are no bytes."""
    tokens = symbols(tokens)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise UserError(f"tokens are from {tokens.min()} to {tokens.max()}: an n-gram model "
                        "has bytes alone, from 0 to 255")
    return tokens


def as_text(state: Tensor | bytes) -> bytes:
    """The last bytes of one text, (1, n) uint8 or as they are."""
    return state if isinstance(state, bytes) else bytes(state[0].tolist())


def as_tensor(state: Tensor | bytes) -> Tensor:
    """The inverse of ``as_text``."""
    if not isinstance(state, bytes):
        return state
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)[None] if state else torch.empty(
        1, 0, dtype=torch.uint8, device="cpu")


class NgramLM(nn.Module):
    """An n-gram model alone as a byte model: tokens and state in, log-probabilities and state out.

    The state is the last ``order - 1`` bytes, (B, order - 1) uint8 on the CPU.
    """

    def __init__(self, ngram: NgramModel) -> None:
        super().__init__()
        self.ngram = ngram

    @property
    def device(self) -> torch.device:
        return self.ngram.device

    def digest(self) -> str:
        """For ``weights_digest``: its tables are no parameters."""
        return self.ngram.digest()

    def streamed(self) -> Engine:
        """What a stream goes on by."""
        return _Tables(self.ngram)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, L); returns log p of the byte after each, (B, L, V), and the state."""
        tokens = only_bytes(tokens)
        batch, width = len(tokens), self.ngram.order - 1
        if state is None:
            state = torch.full((batch, width), START_BYTE, dtype=torch.uint8, device="cpu")
        text = torch.cat([state.to(tokens.device), tokens.to(torch.uint8)], 1)
        contexts = text[:, 1:].unfold(1, width, 1) if width else text[:, :, None][:, :, :0]
        log_p = self.ngram.log_probs_after(contexts.flatten(0, 1)).unflatten(0, (batch, -1))
        return log_p.to(tokens.device), text[:, text.shape[1] - width :].cpu()


class _Tables(Engine):
    """Look-ups in tables on the CPU; the last bytes are kept as such."""

    name = "tables on the host"

    def __init__(self, ngram: NgramModel) -> None:
        self._ngram, self._width = ngram, ngram.order - 1
        self._start = bytes([START_BYTE]) * self._width

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        last = (self._start if state is None else as_text(state)) + data
        last = last[len(last) - self._width :]
        return self._ngram.after(last), last

    def for_model(self, state: Any) -> Any:
        return as_tensor(state)


class Mixture(nn.Module):
    """``weight * n-gram + (1 - weight) * model``, probabilities mixed linearly; a byte model."""

    model: nn.Module

    def __init__(self, model: ByteModel, ngram: NgramModel, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise UserError(f"the n-gram's weight is {weight}: it must be in [0, 1]")
        self.model = cast(nn.Module, model)
        self.ngram, self.weight = NgramLM(ngram), weight

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    def digest(self) -> str:
        """For ``weights_digest``: the n-gram's weight is no parameter."""
        return repr(self.weight)

    def streamed(self) -> Engine:
        """What a stream goes on by: both as they do alone, and mixed."""
        return _Mixed(stream_engine(cast(ByteModel, self.model)), stream_engine(self.ngram),
                      self.weight)

    def forward(self, tokens: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        neural, ngram = (None, None) if state is None else state
        logits, neural = self.model(tokens, neural)
        counted, ngram = self.ngram(tokens, ngram)
        log_p = mix(torch.log_softmax(logits.float(), -1), counted, self.weight)
        return log_p, (neural, ngram)


class _Mixed(Engine):
    """Two engines, and their probabilities mixed; the table is read while a card has the byte."""

    def __init__(self, neural: Engine, counted: Engine, weight: float) -> None:
        self._neural, self._counted, self._weight = neural, counted, weight
        self.name = f"{neural.name}; {counted.name}"
        self.sees_nan = neural.sees_nan  # a table's counts are numbers

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        first, second = (None, None) if state is None else state
        found: list[tuple[Tensor, Any]] = []
        log_p, first = self._neural.beside(
            data, first, lambda: found.append(self._counted(data, second)))
        counts, second = found[0]
        return mix(log_p, counts, self._weight), (first, second)

    def for_model(self, state: tuple) -> tuple:
        return self._neural.for_model(state[0]), self._counted.for_model(state[1])


def mix(neural: Tensor, counted: Tensor, weight: float) -> Tensor:
    """Log of the weighted mean of two distributions given as log-probabilities (..., V)."""
    if weight in (0.0, 1.0):
        return counted if weight else neural
    return torch.logaddexp(neural + math.log1p(-weight), counted + math.log(weight))


def best_weight(neural: Tensor, counted: Tensor) -> float:
    """The n-gram's weight that makes held-out text most probable, in steps of 0.01.

    ``neural`` and ``counted`` (L,) are the log-probabilities of the bytes that came.
    """
    grid = [i / 100 for i in range(101)]
    losses = [-float(mix(neural.double(), counted.double(), w).mean()) for w in grid]
    if np.isnan(losses).any():
        raise NonFiniteError("the probabilities of held-out text are not numbers: the weights have "
                             "gone nan")
    return grid[int(np.argmin(losses))]
