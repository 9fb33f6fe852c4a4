"""A kernel that stays on the device and is fed byte after byte through the host's memory.

To launch a kernel and to load its weights takes three times as long as a byte of a small model.
A kernel that stays looks into the host's memory for its next order, and leaves when none has come
for about a millisecond, so that it never stands in anybody's way for longer.

It runs on a CUDA stream of its own. The memory of its states is of that stream, and is touched in
the order of that stream alone: by the kernel, and by copies from and to states of others.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.stream.feeding import Mailbox

PATIENCE = 1000  # times that the kernel looks in vain before it leaves, about a microsecond each
_GO_ON, _LEAVE = 1 << 8, 1 << 9  # flags beside the byte of an order
_PAIRS = struct.Struct("@10I")  # an order's five words, each before the number of the order
_NOWHERE = 0, 0
_MADE = 16  # states that are made at a time


_SERVERS: weakref.WeakSet[Server] = weakref.WeakSet()


def make_room(device: torch.device) -> None:
    """Have the kernels that stay on ``device`` leave: for a launch that needs all of it at a time,
    which would wait until they have lost patience."""
    for server in tuple(_SERVERS):
        if server.device == device:
            with server.lock:
                server._stop()


class Served(tuple[Tensor]):
    """The state of one text, numbers (n,) in memory of a server's stream; others take
    ``outside()``."""

    server: Server
    words: tuple[int, int]  # the halves of its address

    def outside(self) -> Any:
        """What ``Server`` makes of the numbers in memory of the current stream."""
        return self.server.taken_out(self[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: elsewhere it lies elsewhere."""
        state = self.outside()
        return type(state), tuple(state)


class Server(Mailbox):
    """Feeds one kernel; ``launch(stream, orders, log_probs, done, ticket)`` starts it with these
    addresses and the number of its first order. A state has ``floats`` numbers, of which ``shaped``
    makes a named tuple of tensors for others."""

    spins = 300  # about 30 us: then the kernel may have left

    def __init__(
        self, device: torch.device, floats: int,
        launch: Callable[[int, int, int, int, int], None], shaped: Callable[[Tensor], Any],
    ) -> None:
        super().__init__(device)
        self._floats, self._launch, self._shaped = floats, launch, shaped
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._orders = torch.zeros(10, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._written = (ctypes.c_char * 40).from_address(self._orders.data_ptr())
        self._made: list[tuple[Tensor, tuple[int, int]]] = []
        self._at_hand: tuple[int, int] | None = None  # where the kernel's own state also lies
        _SERVERS.add(self)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the end of the interpreter
            self._stop()

    def order(self, byte: int, before: Served) -> Served:
        """Feed a byte: the state after it, which ``read`` is to be called for. Under the lock."""
        _, ticket = self.told()
        new = self._fresh()
        flag = _GO_ON if before.words == self._at_hand else 0
        self._order = byte, before.words, new.words
        self._write(byte | flag, ticket, before.words, new.words)
        self._at_hand = new.words
        return new

    def taken_in(self, *parts: Tensor) -> Served:
        """A state with the numbers of ``parts``. Under the lock."""
        with self._stopped():
            new = self._fresh()
            torch.cat([part.flatten() for part in parts], out=new[0])
        return new

    def taken_out(self, numbers: Tensor) -> Any:
        """The inverse, of the numbers of a state of this server: what is made of a copy."""
        found = torch.empty_like(numbers)
        with self.lock, self._stopped():
            found.copy_(numbers)
        return self._shaped(found)

    def _write(
        self, order: int, ticket: int, before: tuple[int, int], after: tuple[int, int]
    ) -> None:
        _PAIRS.pack_into(self._written, 0, order, ticket, before[0], ticket, before[1], ticket,
                         after[0], ticket, after[1], ticket)

    def _late(self) -> None:
        """Start the kernel if it is not there, and has not answered before it left."""
        if self._stream.query() and not self.is_told():
            byte, before, after = self._order
            self._write(byte, self._ticket, before, after)
            self._launch(self._stream.cuda_stream, self._orders.data_ptr(),
                         self.log_probs.data_ptr(), self._at, self._ticket)

    def _stop(self) -> None:
        """Return when nothing runs on the stream."""
        self._at_hand = None
        if not self._stream.query():
            self._write(_LEAVE, self.told()[1], _NOWHERE, _NOWHERE)
            while not self._stream.query():
                pass

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        """What is done within comes after what is on the current stream, and before what will be.
        """
        self._stop()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _fresh(self) -> Served:
        if not self._made:
            with torch.cuda.stream(self._stream), torch.inference_mode(False):
                rows = torch.empty(_MADE, self._floats, device=self.device)
            at = [rows.data_ptr() + 4 * self._floats * i for i in range(_MADE)]
            self._made = [(row, (a & 0xFFFFFFFF, a >> 32))
                          for row, a in zip(rows.unbind(), at, strict=True)]
        row, words = self._made.pop()
        new = Served((row,))
        new.server, new.words = self, words
        return new
