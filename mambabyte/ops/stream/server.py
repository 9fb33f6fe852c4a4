"""A kernel that stays on the device and is fed byte after byte through the host's memory.

To launch a kernel and to load its weights takes as long as some bytes of a small model. A kernel
that stays looks into the host's memory for its next order, and leaves when none has come for about
a millisecond, so that it never stands in anybody's way for longer.

It runs on a CUDA stream of its own. The memory of its states is of that stream, and is touched in
the order of that stream alone: by the kernel, and by copies from and to states of others.

One lock a device is held while a byte is fed or room is made, so that nobody who has one kernel
leave waits for somebody who waits for the same of another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambabyte.ops.stream.feeding import Mailbox

PATIENCE = 1000  # times that the kernel looks in vain before it leaves, about a microsecond each
_GO_ON, _LEAVE = 1 << 8, 1 << 9  # flags beside the byte of an order
_MADE = 16  # states that are made at a time

_SERVERS: weakref.WeakSet[Server] = weakref.WeakSet()


@functools.cache
def lock_of(device: torch.device) -> threading.RLock:
    """What is held while a kernel that stays on ``device`` has an order, or is made to leave."""
    return threading.RLock()


def make_room(device: torch.device, large: bool = False) -> None:
    """Have the kernels that stay on ``device`` leave, or only those that take up all of it: for a
    launch that would wait until they have lost patience. Under the device's lock."""
    for server in tuple(_SERVERS):
        if server.device == device and (server.large or not large):
            server.stop()


def halves(address: int) -> tuple[int, int]:
    """An address as two words of an order."""
    return address & 0xFFFFFFFF, address >> 32


class Row(NamedTuple):
    """The numbers of a state in memory of a server's stream."""

    numbers: Tensor  # (floats,)
    words: tuple[int, int]  # the halves of its address


class Served:
    """The state of one text whose numbers are in memory of a server's stream, a tuple; others take
    ``outside()``."""

    server: Server
    words: tuple[int, int]  # the halves of the address of its numbers

    def outside(self) -> Any:
        """The same in memory of the current stream, as tensors that anybody may use."""
        return self.server.outside(self.server, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: elsewhere it lies elsewhere."""
        state = self.outside()
        return type(state), tuple(state)


class Server(Mailbox):
    """Feeds one kernel; ``launch(orders, log_probs, done, ticket)`` starts it on the current stream
    with these addresses and the number of its first order, which has ``words`` words. A state has
    ``floats`` numbers; ``outside(server, state)`` makes of a Served, by ``copies``, what others
    take. A ``large`` kernel takes up all of the device.

    Who has the method ``launch`` has the server, and is not kept by it: weights on the device would
    otherwise stay until Python looks for circles.
    """

    spins = 300  # about 30 us: then the kernel may have left

    def __init__(
        self, device: torch.device, floats: int, launch: Callable[[int, int, int, int], None],
        outside: Callable[[Server, Any], Any], *, words: int = 5, large: bool = False,
    ) -> None:
        super().__init__(device, lock_of(device))
        self.outside, self.large = outside, large
        self._floats, self._launch = floats, weakref.WeakMethod(launch)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self.raw_stream: int = self._stream.cuda_stream
        # Each word before the number of the order.
        self._orders = torch.zeros(2 * words, dtype=torch.int32, device="cpu",
                                   pin_memory=device.type == "cuda")
        self._written = (ctypes.c_char * (8 * words)).from_address(self._orders.data_ptr())
        self._pairs, self._nowhere = struct.Struct(f"@{2 * words}I"), (0,) * (words - 1)
        self._made: list[Row] = []
        self._at_hand: tuple[int, int] | None = None  # where the kernel's own state also lies
        self._stopped = True  # whether it is known to have left
        _SERVERS.add(self)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the end of the interpreter
            self.stop()

    def order(self, byte: int, before: tuple[int, int], *more: int) -> Row:
        """Feed a byte from the state at ``before``: where the state after it lies, which ``read``
        is to be called for. ``more`` are the words behind the two places. Under the lock."""
        self._settle()
        _, ticket = self.told()
        new = self._fresh()
        self._order = byte, *before, *new.words, *more
        flag = _GO_ON if before == self._at_hand else 0
        self._write(ticket, byte | flag, *self._order[1:])
        self._at_hand = new.words
        if self._stopped:
            self._late()
        if not self._made:  # while the kernel has the byte
            self._make()
        return new

    def taken_in(self, *parts: Tensor) -> Row:
        """A state with the numbers of ``parts``."""
        with self.between():
            new = self._fresh()
            torch.cat([part.flatten() for part in parts], out=new.numbers)
        return new

    def copies(self, *tensors: Tensor) -> list[Tensor]:
        """Of tensors of the server's stream: in memory of the current stream."""
        found = [torch.empty_like(tensor) for tensor in tensors]
        with self.between():
            for copy, tensor in zip(found, tensors, strict=True):
                copy.copy_(tensor)
        return found

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """What is done within is of the server's stream, when the kernel has left; it comes after
        what is on the current stream, and before what will be."""
        with self.lock:
            self.stop()
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated within is of the server's stream: for what the kernel, and no other,
        writes first."""
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            yield

    def stop(self) -> None:
        """Return when the kernel has left. Under the lock."""
        self._at_hand = None
        self._settle()
        if not (self._stopped or self._stream.query()):
            self._write(self.told()[1], _LEAVE, *self._nowhere)
            while not self._stream.query():
                pass
        self._stopped = True

    def _settle(self) -> None:
        """Wait for the answer to an order that was interrupted, so that the next one does not take
        its place before the kernel has read it."""
        while not (self._stopped or self.is_told() or self._stream.query()):
            pass

    def _write(self, ticket: int, *words: int) -> None:
        self._pairs.pack_into(
            self._written, 0, *chain.from_iterable([(word, ticket) for word in words]))

    def _late(self) -> None:
        """Start the kernel if it is not there, and has not answered before it left."""
        if self._stream.query() and not self.is_told():
            self._write(self._ticket, *self._order)
            launch = self._launch()
            assert launch is not None
            with torch.cuda.stream(self._stream):
                launch(self._orders.data_ptr(), self.log_probs.data_ptr(), self._at,
                       self._ticket)
            self._stopped = False

    def _fresh(self) -> Row:
        if not self._made:
            self._make()
        return self._made.pop()

    def _make(self) -> None:
        with self.memory():
            rows = torch.empty(_MADE, self._floats, dtype=torch.float32, device=self.device)
        at = rows.data_ptr()
        self._made = [Row(row, halves(at + 4 * self._floats * i))
                      for i, row in enumerate(rows.unbind())]
