"""Guesses for speculative generation from an n-gram model."""

from __future__ import annotations

import math

import torch

from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.task.ngram import NgramModel


class NgramGuesses:
    """Guesses the most probable bytes of ``ngram`` one after another, as long as all of them
    together are right with a probability of ``least``, by its own count."""

    def __init__(self, ngram: NgramModel, least: float = 0.5) -> None:
        self.ngram, self._least = ngram, math.log(least)
        self._last = bytes([START_BYTE]) * (ngram.order - 1)

    def read(self, data: bytes) -> None:
        """The text goes on with ``data``."""
        width = self.ngram.order - 1
        self._last = (self._last + data)[len(self._last) + len(data) - width :]

    def guess(self, last: int, most: int) -> bytes:
        """Up to ``most`` bytes that may follow the text and the byte ``last``."""
        width, text, chance = self.ngram.order - 1, bytearray(self._last), 0.0
        text.append(last)
        begin = len(text)
        while len(text) < begin + most:
            context = torch.frombuffer(text[len(text) - width :], dtype=torch.uint8) \
                if width else torch.empty(0, dtype=torch.uint8, device="cpu")
            log_p, best = self.ngram.log_probs_after(context[None])[0].max(0)
            chance += float(log_p)
            if chance < self._least:
                break
            text.append(int(best))
        return bytes(text[begin:])
