"""What the engines of ``cuda.py`` and ``hybrid.py`` share: how a text, or a byte of it, is fed, and
how the host learns what came of it."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import torch
from torch import Tensor

from mambabyte.errors import NonFiniteError

VOCABULARY = 256
NOT_NUMBERS = "the model's probabilities are not numbers: its weights have gone nan"


def nothing() -> None:
    """What is to be done while the card has a byte, where there is nothing."""


def every_byte(device: torch.device) -> list[Tensor]:
    """Each byte as a text (1, 1): feeding one copies nothing to the device."""
    return list(torch.arange(256, device=device).to(torch.uint8)[:, None, None])


class Mailbox:
    """Memory of the host that a kernel writes the log-probabilities of one text to, and then a
    number, so that nobody waits for the kernel's end."""

    spins = 10_000  # looks at the number between two at whether the kernel has failed

    def __init__(self, device: torch.device, lock: threading.RLock) -> None:
        self.lock = lock  # one text at a time
        self.device, self._ticket = device, 0
        self._memory = torch.zeros(VOCABULARY + 1, dtype=torch.float32, device="cpu",
                                   pin_memory=device.type == "cuda")
        self.log_probs = self._memory[:VOCABULARY]
        self._at = self._memory.data_ptr() + 4 * VOCABULARY
        self._number = ctypes.c_uint32.from_address(self._at)
        self._first = ctypes.c_float.from_address(self._memory.data_ptr())

    def told(self) -> tuple[int, int]:
        """Where the next kernel tells that it is done, and the number that says so."""
        self._ticket = self._ticket % 0xFFFFFFFF + 1
        return self._at, self._ticket

    def is_told(self) -> bool:
        """Whether the kernel has told that it is done."""
        return bool(self._number.value == self._ticket)

    def read(self) -> Tensor:
        """The log-probabilities, when they are there; NonFiniteError where they are nan."""
        ticket, number = self._ticket, self._number
        while number.value != ticket:
            for _ in range(self.spins):
                if number.value == ticket:
                    break
            else:
                self._late()
        if math.isnan(self._first.value):  # normalised: where one is nan, all are
            raise NonFiniteError(NOT_NUMBERS)
        return self.log_probs.clone()

    def _late(self) -> None:
        """Raise what made the kernel fail: one that failed never tells."""
        torch.cuda.current_stream(self.device).query()


class ByteFeeder:
    """What the two engines share: a text is fed, by ``_launch``."""

    device: torch.device
    most_drawn = 256  # in one launch, so that bytes come steadily

    def _launch(
        self, state: Any, log_probs: Tensor, batch: int, length: int, *,
        tokens: Tensor | None = None, every: bool = False,
    ) -> Any:
        raise NotImplementedError

    def _begin(self, device: torch.device) -> None:
        self.device, self._index = device, device.index
        self._bytes = every_byte(device)

    def feed(
        self, tokens: Tensor, state: Any, all_positions: bool = False
    ) -> tuple[Tensor, Any]:
        """Advance by tokens (B, L) uint8, L at least 1.

        Returns log-probabilities float32 of the byte after the last one, (B, 256), or after each
        with ``all_positions``, (B, L, 256); and the new state.
        """
        batch, length = tokens.shape
        shape = (batch, length, VOCABULARY) if all_positions else (batch, VOCABULARY)
        log_probs = torch.empty(shape, dtype=torch.float32, device=self.device)
        return log_probs, self._launch(state, log_probs, batch, length,
                                       tokens=tokens.contiguous(), every=all_positions)

    def text(self, data: bytes) -> Tensor:
        """``data`` on the device, (1, L) uint8."""
        if len(data) == 1:
            return self._bytes[data[0]]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)[None].to(self.device)
