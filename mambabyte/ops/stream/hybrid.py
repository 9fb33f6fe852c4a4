"""Streaming a whole model of any layers on the GPU in one launch.

The kernel is ``hybrid.cu``; ``stream.cu`` is quicker for models of Mamba layers alone. All
multiprocessors of the card step through the bytes of one text. It needs compute capability 9.0 or
later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.ops.build.kernel import raw_stream
from mambabyte.ops.build.nvrtc import NvrtcError
from mambabyte.ops.stream import fitting
from mambabyte.ops.stream.feeding import VOCABULARY, ByteFeeder, nothing
from mambabyte.ops.stream.fitting import Loaded, packed_launch
from mambabyte.ops.stream.grid.memory import (
    Exchange,
    Held,
    HybridState,
    Room,
    ServedHybrid,
    Taken,
    taken_out,
)
from mambabyte.ops.stream.grid.numbers import from_numbers, to_numbers
from mambabyte.ops.stream.grid.sizes import BESIDE, PAST, THREADS, WORDS
from mambabyte.ops.stream.grid.tiles import schedule
from mambabyte.ops.stream.server import PATIENCE, Served, Server, halves, make_room

_TURNS = 4096  # positions whose rotary angles are computed at a time
_MOST_EXCHANGES = 6  # a layer; three more a byte
_LEAST_ROOM = 256  # bytes that a cache can grow by in place
_STAY = 16384  # bytes after which a kernel that stays leaves: its exchanges are numbered beforehand
_TABLES = 4  # of angles, that are kept for bytes fed one by one
# Bytes of a pass that checks guesses. Beside layers that keep a state one of four spills registers,
# and wins less, as one of two does; of attention alone it wins more (docs/log/streaming.md).
WIDTH, ATTENTION_WIDTH = 3, 4


class HybridStreamer(ByteFeeder):
    """Steps texts of a model of any layers on one device, with the weights as they are now.

    ``parameters`` are those of a ByteLM of ``config`` by their names in it; ``eps`` is that of its
    norms, ``tiny`` that of norms without one; ``rotary(position, length)`` gives the angles'
    cosines and sines, each (length, head_dim / 2). Raises NvrtcError where the device cannot run
    it.
    """

    alone = 4

    def __init__(
        self, config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float,
        rotary: Any,
    ) -> None:
        self.config = config
        self.embedding = parameters["embedding.weight"].float().contiguous()
        self._begin(self.embedding.device)
        self._rotary = rotary
        self._packed = fitting.packed_for(config, parameters, eps, tiny, self._index)
        self._constants = dict(self._packed.constants)
        self.blocks = int(self._constants["CL"])
        self._chunks = max(1, self.blocks // config.n_kv_head)
        self._plain = self._loaded(1)
        self._hint = torch.zeros(VOCABULARY + 1, dtype=torch.float32, device="cpu",
                                 pin_memory=self.device.type == "cuda")
        at = self._hint.data_ptr()
        self._hint_parts = at, at + 4 * VOCABULARY, at + 4 * VOCABULARY + 1
        self._server = Server(
            self.device, self.blocks * int(self._constants["STATE"]), self._stay, taken_out,
            words=WORDS, large=True)
        # Angles of _TURNS positions, of the server's stream, and where they lie.
        self._tables: dict[int, tuple[Tensor, int]] = {}
        self._angle_bytes = 4 * config.head_dim  # of a position
        self._windows = [{"A": config.attention_window, "L": config.local_window}[letter]
                         for letter in config.layers if letter in "AL"]
        self._turns: tuple[int, Tensor] = (-1, self.embedding)

    def _loaded(self, width: int) -> Loaded:
        """The kernel for passes of up to ``width`` bytes; NvrtcError where that does not fit."""
        packed = self._packed
        constants = tuple((self._constants | {"PASS": width}).items())
        kernel, built = fitting.kernel_for(constants, self._index)
        plan = torch.tensor(schedule(packed.sizes, built.space), dtype=torch.int32,
                            device=self.device)
        weights = _addresses(
            resident=packed.resident, tiles=packed.tiles, schedule=plan,
            embedding=packed.embedding, best=packed.best, kinds=packed.kind,
            final_norm=packed.final_norm)
        return Loaded(kernel, built, width, plan, weights, {})

    @functools.cached_property
    def _guessing(self) -> Loaded | None:
        """What draws with guesses; None where a pass of several bytes does not fit."""
        try:
            return self._loaded(WIDTH if set(self.config.layers) - set("AL") else ATTENTION_WIDTH)
        except NvrtcError:
            return None

    # ------------------------------------------------------------------------------- states

    def new_state(self, batch: int) -> HybridState:
        """The state before the first byte."""
        numbers = torch.zeros(batch, self.blocks * int(self._constants["STATE"]),
                              dtype=torch.float32, device=self.device)
        return HybridState(numbers, self._cache(batch, 0), 0, 0, 0)

    def state_of(
        self, layers: list[list[Tensor]], caches: list[tuple[Tensor, Tensor]], position: int
    ) -> HybridState:
        """From the tensors of layers, as ``to_numbers`` takes them, and keys and values (B,
        n_kv_head, S, head_dim) of each layer of attention."""
        numbers = to_numbers(self.config, layers, self.blocks)
        batch = len(caches[0][0]) if caches else len(numbers)
        stored = max((k.shape[2] for k, _ in caches), default=0)
        cache = self._cache(batch, stored)
        for i, pair in enumerate(caches):
            for j, rows in enumerate(pair):
                self._place(cache[:, i, j], F.pad(rows.float(), (0, 0, stored - rows.shape[2], 0)))
        numbers = numbers.to(self.device)
        if numbers.shape[1] == 0:
            numbers = self.new_state(batch).numbers
        return HybridState(numbers, cache, 0, stored, position)

    def layers_of(
        self, state: HybridState
    ) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """The inverse of ``state_of``, without the position."""
        caches, state = [], self.outside(state)
        for i, window in enumerate(self._windows):
            begin = max(state.begin, state.stored - (window - 1))
            k, v = (self._taken(state.cache[:, i, j], begin, state.stored) for j in range(2))
            caches.append((k.contiguous(), v.contiguous()))
        return from_numbers(self.config, state.numbers, self.blocks), caches

    def _cache(self, batch: int, rows: int) -> Tensor:
        """Room for so many rows, whose numbers nobody reads before they are written."""
        c = self.config
        return torch.empty(batch, len(self._windows), 2, c.n_kv_head, self._chunks,
                           -(-rows // self._chunks), c.head_dim, dtype=torch.float32,
                           device=self.device)

    def _place(self, cache: Tensor, rows: Tensor) -> None:
        """rows (B, n_kv_head, S, head_dim) to the first rows of a cache (B, n_kv_head, chunks,
        slots, head_dim)."""
        rows = F.pad(rows, (0, 0, 0, -rows.shape[2] % self._chunks))
        slots = rows.unflatten(2, (-1, self._chunks)).transpose(2, 3)
        cache[:, :, :, : slots.shape[3]] = slots

    @staticmethod
    def _taken(cache: Tensor, begin: int, end: int) -> Tensor:
        return cache.transpose(2, 3).flatten(2, 3)[:, :, begin:end]

    def outside(self, state: HybridState) -> HybridState:
        """A state as tensors that anybody may use."""
        return state.outside() if isinstance(state, Served) else state

    def _grown(self, state: HybridState, length: int) -> tuple[HybridState, Room, Taken]:
        """A state of the same numbers with room for ``length`` more rows behind its own that
        nobody else has: the same cache where it has that, else a copy."""
        room, stream = getattr(state, "room", None), raw_stream(self._index)
        taken = None if room is None else room.extend(state.stored, length, stream)
        if room is not None and taken is not None:
            return state, room, taken
        copied, room, taken, slot = self._roomier(state, length, stream)
        old = state.cache[..., slot:, :][..., : copied.cache.shape[5], :]
        copied.cache[..., : old.shape[5], :] = old  # all layers at once: by rows it took 1 ms
        return copied, room, taken

    def _roomier(
        self, state: HybridState, length: int, stream: int
    ) -> tuple[HybridState, Room, Taken, int]:
        """A state of the same numbers with a cache of its own, to which the rows from that slot on
        are to be copied, and room for ``length`` more behind them."""
        kept = min(state.stored - state.begin, max([1, *self._windows]) - 1)
        # At least as many rows as are copied can follow: a copy costs a row each, in the mean.
        spare = max(_LEAST_ROOM, kept) if self._windows else 0
        slot = (state.stored - kept) // self._chunks  # whole slots are copied
        begin, stored = (x - slot * self._chunks for x in (state.stored - kept, state.stored))
        cache = self._cache(state.cache.shape[0], stored + length + spare)
        room = Room(cache.shape[4] * cache.shape[5] if self._windows else None, stored, cache,
                    stream)
        taken = room.extend(stored, length, stream)
        assert taken is not None
        return HybridState(state.numbers, cache, begin, stored, state.position), room, taken, slot

    # ----------------------------------------------------------------- a kernel that stays

    def feed_byte(
        self, byte: int, state: HybridState, meanwhile: Callable[[], None] = nothing,
        fill: Callable[[int, int, int], None] | None = None,
    ) -> tuple[Tensor, ServedHybrid]:
        """As ``CudaStreamer.feed_byte``. The hint of a guided model is in the host's memory, where
        ``fill`` writes it: the addresses of its three parts."""
        server = self._server
        with server.lock:
            state, words, room, taken, source = self._within(state)
            angles = self._angles_at(state.position)
            if fill is not None:
                fill(*self._hint_parts)
            _, cache, begin, stored, position = state
            row = server.order(
                byte, words, *room.words, *angles, room.slots, begin, stored, *source)
            new = ServedHybrid(row.numbers, cache, begin, stored + 1, position + 1)
            new.server, new.words, new.room, new.taken = server, row.words, room, taken
            meanwhile()
            return server.read(), new

    def _within(
        self, state: HybridState
    ) -> tuple[HybridState, tuple[int, int], Room, Taken, tuple[int, int, int, int]]:
        """A state in memory of the server's stream with room for a byte's rows, where its numbers
        lie, and the words of where the kernel copies its rows from."""
        server = self._server
        if isinstance(state, ServedHybrid) and state.server is server:
            words, room = state.words, state.room
            taken = room.extend(state.stored, 1, server.raw_stream)
            if taken is not None:
                return state, words, room, taken, (*room.words, 0, 0)
            # Another has the rows behind it, or there are none: the kernel copies, and stays.
            with server.memory():
                moved, room, taken, slot = self._roomier(state, 1, server.raw_stream)
            return moved, words, room, taken, (*state.room.words, slot, state.room.slots)
        state = self.outside(state)
        words = server.taken_in(state.numbers).words
        with server.between():
            state, room, taken = self._grown(HybridState(*state), 1)  # a copy
        return state, words, room, taken, (*room.words, 0, 0)

    def _angles_at(self, position: int) -> tuple[int, int]:
        """Where the kernel that stays finds the angles of a position, in words of an order."""
        if not self._windows:
            return 0, 0
        which, row = divmod(position, _TURNS)
        found = self._tables.get(which)
        if found is None:
            with self._server.between():
                while len(self._tables) >= _TABLES:
                    del self._tables[next(iter(self._tables))]
                table = self._table(which * _TURNS, _TURNS)
            found = self._tables[which] = table, table.data_ptr()
        return halves(found[1] + self._angle_bytes * row)

    def _stay(self, orders: int, log_probs: int, done: int, ticket: int) -> None:
        """Launch the kernel that takes orders; see ``Server``."""
        hint = self._hint.data_ptr() if self._constants["GUIDED"] else 0
        self._start(
            self._plain, streams=1, steps=_STAY, hints=hint, log_probs=log_probs, done=done,
            ticket=ticket, orders=orders, patience=PATIENCE)

    # ------------------------------------------------------------------------------- running

    def guided(
        self, data: bytes, hints: Tensor, state: HybridState
    ) -> tuple[Tensor, HybridState]:
        """Advance one text by ``data``, of which a guide says ``hints`` (1, L, 257) float32: of the
        byte after each, log-probabilities (256), and in the first bytes of the last number the best
        byte and its kind. Log-probabilities (256,) of the byte after the last one, on the CPU, and
        the new state."""
        log_probs = torch.empty(1, VOCABULARY, dtype=torch.float32, device=self.device)
        new = self._launch(state, log_probs, 1, len(data), tokens=self.text(data), hints=hints)
        return log_probs[0].cpu(), new

    def hidden(self, x: Tensor, state: HybridState) -> tuple[Tensor, HybridState]:
        """Advance by embedded bytes x (B, L, d_model): what the head reads, of x's shape."""
        x = x.float().contiguous()
        found = torch.empty_like(x)
        return found, self._launch(state, None, len(x), x.shape[1], inputs=x, hidden=found)

    def draw(
        self, log_probs: Tensor, state: HybridState, length: int, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0,
    ) -> tuple[Tensor, Tensor, HybridState]:
        """As ``CudaStreamer.draw``."""
        batch = log_probs.shape[0]
        drawn = torch.empty((batch, length), dtype=torch.uint8, device=self.device)
        after = torch.empty((batch, VOCABULARY), dtype=torch.float32, device=self.device)
        new = self._launch(
            state, after, batch, length, first=log_probs.float().contiguous(), drawn=drawn,
            seed=seed, position=position, temperature=temperature, top_k=top_k, top_p=top_p)
        return drawn, after, new

    def guess_and_draw(
        self, log_probs: Tensor, state: HybridState, length: int, past: bytes,
        temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
        position: int = 0,
    ) -> tuple[Tensor, Tensor, HybridState, Tensor]:
        """As ``draw`` of one text, the same bytes, where passes check guesses of what followed
        equal endings in ``past``, the text so far, and in what is drawn. Also (2,) int32: passes
        that it took, bytes guessed."""
        loaded, state = self._guessing, self.outside(state)
        past = past[-PAST:]
        rows = torch.frombuffer(bytearray(past or b"\0"), dtype=torch.uint8).to(self.device)
        counts = torch.tensor([length, 0], dtype=torch.int32, device=self.device)
        if loaded is None:
            return *self.draw(log_probs, state, length, temperature, top_k, top_p, seed,
                              position), counts
        drawn = torch.empty((1, length), dtype=torch.uint8, device=self.device)
        after = torch.empty((1, VOCABULARY), dtype=torch.float32, device=self.device)
        trail = torch.empty(loaded.width * state.numbers.shape[1], dtype=torch.float32,
                            device=self.device)
        new = self._launch(
            state, after, 1, length, first=log_probs.float().contiguous(), drawn=drawn, seed=seed,
            position=position, temperature=temperature, top_k=top_k, top_p=top_p, loaded=loaded,
            past=(rows, len(past)), trail=trail, counts=counts)
        return drawn, after, new, counts

    def _angles(self, position: int, length: int) -> Tensor:
        """Cosines and sines (n, 2, head_dim / 2) from ``position`` on, n at least ``length``."""
        if not self._windows:
            return self.embedding
        start, table = self._turns
        if not start <= position <= start + len(table) - length or start < 0:
            start, table = self._turns = position, self._table(position, max(length, _TURNS))
        return table[position - start :]

    def _table(self, position: int, length: int) -> Tensor:
        return torch.stack(self._rotary(position, length), 1).float().contiguous()

    def _launch(
        self, state: HybridState, log_probs: Tensor | None, batch: int, length: int, *,
        tokens: Tensor | None = None, every: bool = False, inputs: Tensor | None = None,
        hints: Tensor | None = None, first: Tensor | None = None, drawn: Tensor | None = None,
        hidden: Tensor | None = None, seed: int = 0, position: int = 0, temperature: float = 0.0,
        top_k: int = 0, top_p: float = 1.0, loaded: Loaded | None = None,
        past: tuple[Tensor | None, int] = (None, 0), trail: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> HybridState:
        loaded = loaded or self._plain
        state, room, taken = self._grown(self.outside(state), length)
        numbers = torch.empty_like(state.numbers)
        angles = self._angles(state.position, length + loaded.width - 1)
        addresses = _addresses(
            tokens=tokens, inputs=inputs, hints=hints, first=first, state_in=state.numbers,
            state_out=numbers, cache=state.cache, rotary=angles, drawn=drawn, log_probs=log_probs,
            hidden=hidden, past=past[0], trail=trail, passes=counts)
        with self._server.lock:
            self._start(
                loaded, **addresses, streams=batch, steps=length, slots=room.slots,
                begin=state.begin, stored=state.stored, seed=seed % 2**64, position=position,
                all=every, temperature=temperature, top_k=top_k, top_p=top_p, known=past[1])
        new = Held(numbers, state.cache, state.begin, state.stored + length,
                   state.position + length)
        new.room, new.taken = room, taken
        return new

    def _start(self, loaded: Loaded, *, streams: int, steps: int, **given: float) -> None:
        """Launch, with values by their names in ``fitting.LAUNCH``. Under the device's lock: of two
        threads on one stream the first to count exchanges is the first to launch."""
        stream, exchanges = raw_stream(self._index), loaded.exchanges
        make_room(self.device)
        if stream not in exchanges:
            exchanges[stream] = Exchange(loaded.built.packets, self.device)
        exchange = exchanges[stream]
        number = exchange.take(streams * steps * (_MOST_EXCHANGES * self.config.n_layer + 3))
        loaded.kernel.launch(
            (self.blocks, 1, 1), (THREADS + BESIDE, 1, 1), loaded.built.shared_bytes, stream,
            *packed_launch(
                packets=exchange.packets.data_ptr(), exchange=number, streams=streams,
                steps=steps, **loaded.weights, **given), together=True)


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}
