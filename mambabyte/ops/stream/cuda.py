"""Streaming a whole model of Mamba layers on the GPU in one launch: packs, plans, launches.

The kernel is ``stream.cu``: a thread-block cluster steps through the bytes, with the weights
in the shared memory of its blocks as far as they fit. It needs compute capability 9.0 or later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.build.nvrtc import NvrtcError
from mambabyte.ops.stream.feeding import VOCABULARY, ByteFeeder, nothing
from mambabyte.ops.stream.server import PATIENCE, Served, Server, lock_of, make_room

THREADS = 384
CLUSTERS = (16, 8)  # blocks of a cluster, best first; 16 is more than every card grants
STREAMS = (1, 2, 4, 8)  # streams of a cluster
ACTIVATIONS = ("relu2", "gelu", "silu")
_PARAMETERS = "PPPPPPPPPPPIQQiiififPi"


@dataclass(frozen=True)
class Shape:
    """Sizes and kinds of a model of Mamba layers; names as in ModelConfig."""

    layers: int
    d_model: int
    d_inner: int
    states: int
    rank: int
    taps: int
    hidden: int = 0
    activation: str = "silu"
    centered: bool = True  # a layer norm, not an RMS norm
    eps: float = 1e-5
    stem_eps: float | None = None  # of an RMS norm behind the embedding, if there is one
    cap: float = 0.0
    decayed: bool = False  # a step's input decays by that step, as the document has it


class LayerWeights(NamedTuple):
    """Weights of one layer as the model has them; a norm is (weight, bias), each (d_model,)."""

    norm: tuple[Tensor, Tensor]
    in_proj: Tensor  # (2 D, d_model)
    conv_weight: Tensor  # (D, K)
    conv_bias: Tensor  # (D,)
    x_proj: Tensor  # (R + 2 N, D)
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    D: Tensor  # (D,)
    out_proj: Tensor  # (d_model, D)
    mlp_norm: tuple[Tensor, Tensor] | None = None
    up: Tensor | None = None  # (hidden, d_model)
    down: Tensor | None = None  # (d_model, hidden)


class StreamState(NamedTuple):
    """What all layers remember of B streams, float32: O(1) in the bytes seen."""

    tail: Tensor  # (layers, B, K - 1, D) last inputs of the convolutions
    ssm: Tensor  # (layers, B, D, N)


# --------------------------------------------------------------------------------------- packing


def split(x: Tensor, dim: int, blocks: int) -> Tensor:
    """Cut a dimension into equal parts, zeros at the end: the blocks become the first dimension."""
    size = -(-x.shape[dim] // blocks)
    pad = [0] * (2 * x.ndim)
    pad[2 * (x.ndim - 1 - dim) + 1] = size * blocks - x.shape[dim]
    return F.pad(x, pad).unflatten(dim, (blocks, size)).movedim(dim, 0)


def _flat(x: Tensor) -> Tensor:
    """(blocks, ...) as (blocks, floats), their number rounded up to 4."""
    return F.pad(x.flatten(1), (0, -x[0].numel() % 4))


def _quads(x: Tensor) -> Tensor:
    """(blocks, rows, columns): one quad of rows after another, each as 32 columns x 4 at a time."""
    x = F.pad(x, (0, -x.shape[2] % 32, 0, -x.shape[1] % 4))
    return x.unflatten(2, (-1, 32)).unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2)


def _rows_of(x: Tensor, blocks: int) -> Tensor:
    """(d_model, channels): each block's rows, channels in the blocks' order, padding as zeros."""
    columns = split(x, 1, blocks).transpose(0, 1).flatten(1)  # (d_model, channels and padding)
    return split(F.pad(columns, (0, -columns.shape[1] % 128)), 0, blocks)


def _behind(norm: tuple[Tensor, Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection w (rows, d_model) with the norm before it multiplied in."""
    weight, bias = (x.double() for x in norm)
    return (w.double() * weight).float(), (w.double() @ bias).float()


def pack(
    layers: Sequence[LayerWeights], final_norm: tuple[Tensor, Tensor], head: Tensor, blocks: int
) -> Tensor:
    """Each block's share of the weights in the kernel's order: (blocks, floats) float32."""

    def share(x: Tensor, dim: int = 0) -> Tensor:
        return split(x.float(), dim, blocks)

    small, in_proj, up, down, out_proj = [], [], [], [], []
    for i, w in enumerate(layers):
        weight, bias = _behind(w.norm, w.in_proj)
        if i > 0:
            in_proj.append(_quads(torch.cat([share(half) for half in weight.chunk(2)], 1)))
        small += [
            torch.cat([share(half) for half in bias.chunk(2)], 1),
            share(w.conv_weight), share(w.conv_bias), share(w.dt_bias), share(w.D),
            share(w.A.double() * 1.4426950408889634),  # the kernel takes powers of 2
            share(F.pad(w.dt_proj, (0, -w.dt_proj.shape[1] % 4))),
        ]  # fmt: skip
        if w.mlp_norm is not None and w.up is not None and w.down is not None:
            weight, bias = _behind(w.mlp_norm, w.up)
            small.append(share(bias))
            up.append(_quads(share(weight)))
            down.append(_rows_of(w.down.float(), blocks))
        # 8 threads a row: channel 8 j + part of row r is at (j, r, part).
        x_proj = share(w.x_proj, 1)
        x_proj = F.pad(x_proj, (0, -x_proj.shape[2] % 8)).unflatten(2, (-1, 8))
        small.append(x_proj.transpose(1, 2))
        out_proj.append(_rows_of(w.out_proj.float(), blocks))
    weight, bias = _behind(final_norm, head)
    everything = [*small, share(bias), _quads(share(weight)), *in_proj, *up, *down, *out_proj]
    return torch.cat([_flat(x) for x in everything], 1).contiguous()


def pack_table(shape: Shape, embedding: Tensor, first: LayerWeights, blocks: int) -> Tensor:
    """What depends on a byte alone, (256, blocks, floats) float32: what the first layer's in_proj
    makes of it, and the block's rows of the embedding; each in rows of four."""
    x = embedding.double()
    if shape.stem_eps is not None:
        x = F.rms_norm(x, x.shape[1:], eps=shape.stem_eps)
    norm, size = F.layer_norm if shape.centered else F.rms_norm, x.shape[1:]
    weight, bias = (w.double() for w in first.norm)
    made = (norm(x, size, eps=shape.eps) * weight + bias) @ first.in_proj.double().T
    rows = torch.cat([split(half, 1, blocks) for half in made.float().chunk(2, 1)], 2)
    rows, own = (F.pad(r, (0, -r.shape[2] % 4)) for r in (rows, split(x.float(), 1, blocks)))
    return torch.cat([rows, own], 2).transpose(0, 1).contiguous()


# -------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Plan:
    """One compiled kernel: how many blocks a cluster, streams a cluster, and what fits."""

    shape: Shape
    blocks: int
    streams: int
    resident: int  # floats of a block's weights in its shared memory; the rest stays in L2
    work: int  # other floats of its shared memory
    floats: int  # of a block's weights

    @property
    def shared_bytes(self) -> int:
        return 4 * (self.resident + self.work)

    def program(self) -> Program:
        return _program(self)


def _up(n: int, to: int = 4) -> int:
    return -(-n // to) * to


def plan(shape: Shape, blocks: int, streams: int, shared_bytes: int) -> Plan | None:
    """The plan for a card with that much shared memory a block, or None where it does not fit."""
    s, channels = shape, -(-shape.d_inner // blocks)
    hidden, rows, model = -(-s.hidden // blocks), -(-s.d_model // blocks), -(-s.d_model // 32)
    projected = s.rank + 2 * s.states
    all_channels, all_hidden = (_up(blocks * n, 128) for n in (channels, hidden))
    small = (
        _up(2 * channels) + 3 * _up(channels) + _up(channels * s.taps) + _up(channels * s.states)
        + channels * _up(s.rank) + _up(hidden) + projected * _up(channels, 8)
    )  # fmt: skip
    head = VOCABULARY // blocks
    least = s.layers * small + head
    floats = least + 32 * model * (head + (s.layers - 1) * _up(2 * channels)) + s.layers * (
        32 * model * _up(hidden) + rows * (all_channels + all_hidden)
    )
    work = streams * (
        blocks * _up(projected) + all_channels + all_hidden + 3 * VOCABULARY + s.d_model
        + _up(projected)
    )  # fmt: skip
    work += 2 * _up(streams * channels) + _up(s.layers * streams * channels * s.states)
    work += _up(s.layers * streams * (s.taps - 1) * channels) + 12 + _up(streams) + 8
    resident = min(floats, (shared_bytes // 4 - work) // 4 * 4)
    return Plan(shape, blocks, streams, resident, work, floats) if resident >= least else None


@functools.cache
def _program(plan: Plan) -> Program:
    s = plan.shape
    whole = {
        "CL": plan.blocks, "S": plan.streams, "T": THREADS, "LAYERS": s.layers, "DM": s.d_model,
        "DI": s.d_inner, "N": s.states, "R": s.rank, "K": s.taps, "H": s.hidden,
        "ACTIVATION": ACTIVATIONS.index(s.activation), "CENTERED": int(s.centered),
        "DECAYED": int(s.decayed), "RESIDENT": plan.resident,
        "BLOB": plan.floats, "WORK": plan.work,
    }  # fmt: skip
    real = {"EPS": s.eps, "CAP": s.cap}
    # One macro: names such as T or N of their own would reach into the compiler's own headers.
    sizes = ", ".join(f"{name} = {value}" for name, value in whole.items())
    sizes = f"constexpr int {sizes}; constexpr float " + ", ".join(
        f"{name} = {float(value)!r}" for name, value in real.items()) + ";"
    options = (f"-DSIZES={sizes}",)
    return Program.from_file(
        "build/types.cu", "stream/cluster.cu", "stream/stream.cu", names=("stream_bytes",),
        options=options
    )


@functools.cache
def _kernel(plan: Plan, device: int) -> Kernel:
    kernel = plan.program().kernel("stream_bytes", device, _PARAMETERS)
    kernel.allow_shared(plan.shared_bytes)
    if plan.blocks > 8:
        kernel.allow_large_clusters()
    return kernel


def shared_limit(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the limit
    return properties.shared_memory_per_block_optin


@functools.cache
def _resident_clusters(shape: Shape, blocks: int, streams: int, device: int) -> int:
    """How many such clusters run at a time on that device; 0 where none can."""
    chosen = plan(shape, blocks, streams, shared_limit(device))
    if chosen is None:
        return 0
    return _kernel(chosen, device).resident_clusters(blocks, THREADS, chosen.shared_bytes)


@functools.cache
def cluster_blocks(shape: Shape, device: int) -> int:
    """Blocks of a cluster for that model on that device; 0 where the kernel cannot run."""
    if torch.cuda.get_device_capability(device)[0] < 9:
        return 0
    return next((n for n in CLUSTERS if _resident_clusters(shape, n, 1, device) > 0), 0)


@functools.cache
def _plan_for(shape: Shape, blocks: int, batch: int, device: int) -> Plan:
    """As few streams a cluster as let all run at a time, or as many as there can be."""
    shared = shared_limit(device)
    best = plan(shape, blocks, 1, shared)
    for streams in STREAMS:
        clusters = _resident_clusters(shape, blocks, streams, device)
        if not clusters:
            break
        best = plan(shape, blocks, streams, shared)
        if clusters * streams >= batch:
            break
    assert best is not None
    return best


# ------------------------------------------------------------------------------------- launching


class ServedState(Served, tuple[Tensor]):
    """What ``StreamState`` is of one text, numbers (n,), with a kernel that stays."""


def _outside(s: Shape, server: Server, state: ServedState) -> StreamState:
    (numbers,) = server.copies(state[0])
    ssm, tail = numbers.split([s.layers * s.d_inner * n for n in (s.states, s.taps - 1)])
    return StreamState(tail.view(s.layers, 1, s.taps - 1, s.d_inner),
                       ssm.view(s.layers, 1, s.d_inner, s.states))


class CudaStreamer(ByteFeeder):
    """Steps a model's streams on one device, with the weights as they are now.

    embedding and head are (256, d_model). Raises NvrtcError where the device cannot run it; ask
    ``cluster_blocks`` first.
    """

    alone, most_drawn = 8, 2048

    def __init__(
        self, shape: Shape, embedding: Tensor, layers: Sequence[LayerWeights],
        final_norm: tuple[Tensor, Tensor], head: Tensor,
    ) -> None:
        self.shape = shape
        self._begin(embedding.device)
        self._blocks = cluster_blocks(shape, self._index)
        if not self._blocks:
            raise NvrtcError(f"no cluster of this model's blocks fits on {self.device}")
        self._blob = pack(layers, final_norm, head, self._blocks)
        self._table = pack_table(shape, embedding, layers[0], self._blocks)
        self._weights = self._blob.data_ptr(), self._table.data_ptr()
        self._plans: dict[int, tuple[Kernel, tuple[int, int, int], int]] = {}
        floats = shape.layers * shape.d_inner * (shape.states + shape.taps - 1)
        self._server = Server(self.device, floats, self._stay, functools.partial(_outside, shape))

    def new_state(self, batch: int) -> StreamState:
        """The state before the first byte."""
        s = self.shape
        zeros = functools.partial(torch.zeros, device=self.device, dtype=torch.float32)
        return StreamState(
            zeros(s.layers, batch, s.taps - 1, s.d_inner),
            zeros(s.layers, batch, s.d_inner, s.states),
        )

    def feed_byte(
        self, byte: int, state: StreamState | Served, meanwhile: Callable[[], None] = nothing
    ) -> tuple[Tensor, Served]:
        """``feed`` of one byte of one text, by a kernel that stays for the next one:
        log-probabilities (256,) on the CPU; NonFiniteError where they are nan. ``meanwhile`` is
        called while the kernel has the byte."""
        server = self._server
        with server.lock:
            if isinstance(state, Served) and state.server is server:
                row = server.order(byte, state.words)
            else:
                given = self.outside(state)
                row = server.order(byte, server.taken_in(given.ssm, given.tail).words)
            new = ServedState((row.numbers,))
            new.server, new.words = server, row.words
            meanwhile()
            return server.read(), new

    def outside(self, state: StreamState | Served) -> StreamState:
        """A state as tensors that anybody may use."""
        return state.outside() if isinstance(state, Served) else state

    def draw(
        self, log_probs: Tensor, state: StreamState | Served, length: int, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0,
    ) -> tuple[Tensor, Tensor, StreamState]:
        """Draw ``length`` bytes of each stream, each fed before the next one is drawn.

        log_probs (B, 256) are those of the next byte. Temperature 0 takes the most probable one;
        ``top_k`` 0 keeps all. Randomness is a function of (seed, position + i, stream), so drawing
        in pieces gives the same bytes. Returns them (B, length) uint8, the log-probabilities after
        the last one, and the new state.
        """
        batch = log_probs.shape[0]
        drawn = torch.empty((batch, length), dtype=torch.uint8, device=self.device)
        after = torch.empty((batch, VOCABULARY), dtype=torch.float32, device=self.device)
        new = self._launch(
            state, after, batch, length, first=log_probs.float().contiguous(), drawn=drawn,
            seed=seed, position=position, temperature=temperature, top_k=top_k, top_p=top_p)
        return drawn, after, new

    def _launch(
        self, state: StreamState | Served, log_probs: Tensor, batch: int, length: int, *,
        tokens: Tensor | None = None, first: Tensor | None = None, drawn: Tensor | None = None,
        every: bool = False, seed: int = 0, position: int = 0, temperature: float = 0.0,
        top_k: int = 0, top_p: float = 1.0,
    ) -> StreamState:
        before = [x.float().contiguous() for x in self.outside(state)]
        new = StreamState(*(torch.empty_like(x) for x in before))
        kernel, grid, shared_bytes = self._planned(batch)
        pointers = [0 if t is None else t.data_ptr()
                    for t in (tokens, first, *before, *new, drawn, log_probs)]
        with lock_of(self.device):
            make_room(self.device, large=True)
            kernel.launch(
                grid, (THREADS, 1, 1), shared_bytes, raw_stream(self._index), *self._weights,
                *pointers, 0, 0, seed % 2**64, position, batch, length, int(every), temperature,
                top_k, top_p, 0, 0)
        return new

    def _stay(self, orders: int, log_probs: int, done: int, ticket: int) -> None:
        """Launch the kernel that takes orders; see ``Server``."""
        kernel, grid, shared_bytes = self._planned(1)
        make_room(self.device, large=True)
        kernel.launch(
            grid, (THREADS, 1, 1), shared_bytes, raw_stream(self._index), *self._weights, *[0] * 7,
            log_probs, done, ticket, 0, 0, 1, 1, 0, 0.0, 0, 1.0, orders, PATIENCE)

    def _planned(self, batch: int) -> tuple[Kernel, tuple[int, int, int], int]:
        """The kernel for so many texts, its grid and its shared memory."""
        found = self._plans.get(batch)
        if found is None:
            chosen = _plan_for(self.shape, self._blocks, batch, self._index)
            grid = (chosen.blocks * -(-batch // chosen.streams), 1, 1)
            found = self._plans[batch] = (
                _kernel(chosen, self._index), grid, chosen.shared_bytes)
        return found
