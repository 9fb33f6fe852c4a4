"""SSD on NVIDIA GPUs (sm_80 and later): launches the kernels of ``ssd.cu``, for bf16 sequences.

Mamba-3 (mambabyte.ops.ssd.mamba3.cuda) launches the same ones between some of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.build.kernel import Kernel, Program, multiprocessors, raw_stream

CHANNELS = 64  # of a head, the one number there is a kernel for
STATES = (16, 32, 64, 128)
CHUNK = 64  # steps, and rows of a tile
_THREADS = {"ssd_walk": 128, "ssd_states": 128, "ssd_pass": 128, "ssd_output": 128,
            "ssd_gradients": 256, "ssd_groups": 128, "angle_turn": 256, "angle_back": 256}
_PARAMETERS = {
    "ssd_walk": "8P6q5i", "ssd_states": "6P6q3i", "ssd_pass": "6Pq6i", "ssd_output": "9P9q4i",
    "ssd_gradients": "18P12q5i", "ssd_groups": "4Pqi",
    "angle_turn": "13P6q5i", "angle_back": "15Pq5i"}
# Heads of a block share products, blocks fill the card: so many heads, and so many blocks at least.
MOST_TOGETHER, GRADIENT_BLOCKS = 8, 256
# A block that walks over all chunks has so many columns of a head's state; it is used from so many
# blocks on, two a multiprocessor: with fewer all chunks at once fill the card better. Beyond four a
# multiprocessor it has copies of two chunks instead of three, so that six find room.
WALK_COLUMNS, WALK_BLOCKS, MANY_BLOCKS = 32, 256, 512


class Kind(NamedTuple):
    """Which kernels there is a program of."""

    states: int
    turned: bool = False  # those of Mamba-3

    def of(self, name: str) -> str:
        """A kernel's name with the arguments of its template."""
        if name in ("ssd_output", "ssd_gradients"):
            return f"{name}<{self.states}, {str(self.turned).lower()}>"
        return f"{name}<{self.states}>"


class Turns(NamedTuple):
    """What SSD is for Mamba-3 besides (angles.cu)."""

    own: Tensor  # (B, L, H) of what a step writes, how much it reads itself
    angles: Tensor  # (B, K, H, S) of whole chunks, a turn 2^32


def names(kind: Kind) -> list[str]:
    """The kernels of a program."""
    own = ["angle_turn", "angle_back"] if kind.turned else ["ssd_groups"]
    ways = [f"{name}<{kind.states}, {backward}>" for name in ("ssd_walk", "ssd_states")
            for backward in ("false", "true")]
    return [*ways, "ssd_pass", *map(kind.of, ["ssd_output", "ssd_gradients", *own])]


@functools.cache
def program(kind: Kind) -> Program:
    return Program.from_file(
        "build/types.cu", "build/mma.cu", "build/chunks.cu", "ssd/mamba3/angles.cu", "ssd/ssd.cu",
        names=names(kind))


@functools.cache
def _kernel(name: str, kind: Kind, device: int) -> Kernel:
    return program(kind).kernel(name, device, _PARAMETERS[name.partition("<")[0]])


def _launch(device: int, name: str, kind: Kind, blocks: int, shared: int, *args: int) -> None:
    kernel = _kernel(name, kind, device)
    kernel.allow_shared(shared)
    threads = _THREADS[name.partition("<")[0]]
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared, raw_stream(device), *args)


def launch(
    like: Tensor, name: str, kind: Kind, blocks: int, *args: Tensor | int | None, shared: int = 0,
) -> None:
    """Launch a kernel where ``like`` is, with so much dynamic shared memory; a tensor is passed by
    its address, None as 0."""
    _launch(like.device.index, name, kind, blocks, shared, *(
        address(a) if a is None or isinstance(a, Tensor) else a for a in args))


def _shared(states: int, square: int, deep: int) -> int:
    """Bytes of tiles of 64 rows: ``square`` of them of 64 columns, ``deep`` of N; all padded."""
    return 2 * CHUNK * (square * (CHANNELS + 8) + deep * (states + 8))


def _angles_bytes(states: int) -> int:
    """Of ``Angles``: float32 of each pair for four warps, four blocks of rows, and the parts that
    threads share a sum by."""
    pairs = states // 2
    return 4 * pairs * (4 + 4 + _THREADS["ssd_gradients"] // pairs)


def heads_of_a_block(per_group: int, blocks: int, least: int = GRADIENT_BLOCKS) -> int:
    """How many heads of a group a block takes, where ``blocks`` have one each: as many as leave
    ``least`` blocks or more."""
    return max(n for n in range(1, MOST_TOGETHER + 1)
               if per_group % n == 0 and (n == 1 or blocks // n >= least))


def output_heads(per_group: int, blocks: int, at_once: Callable[[int], int]) -> int:
    """How many heads of a group a block of ssd_output takes, where ``blocks`` have one each and the
    card has ``at_once`` of so many heads at a time.

    What heads share takes as long as one of them, so that a round of blocks takes 1 + heads: those
    with the least over all rounds, the most of them where it is level.
    """
    return min((n for n in range(MOST_TOGETHER, 0, -1) if per_group % n == 0),
               key=lambda n: -(-blocks // (n * at_once(n))) * (1 + n))


def _output_shared(states: int, together: int) -> int:
    return _shared(states, min(together, 2), 3)


@functools.cache
def _output_at_once(device: int, kind: Kind, shared: int) -> int:
    """How many blocks of ssd_output the card has at a time."""
    kernel = _kernel(kind.of("ssd_output"), kind, device)
    kernel.allow_shared(shared)
    return kernel.resident_blocks(_THREADS["ssd_output"], shared) * multiprocessors(device)


def walk(sequences: int, states: int) -> tuple[int, int]:
    """How many columns of the state a block of ssd_walk has for that many (batch, head), and how
    many blocks there are: 0 where ssd_states and ssd_pass are to be used."""
    columns = min(WALK_COLUMNS, states)
    blocks = sequences * (states // columns)
    return columns, blocks if blocks >= WALK_BLOCKS else 0


def aligned_rows(x: Tensor) -> Tensor:
    """As it is where its rows can be read 16 bytes at a time."""
    ready = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(
        step % 8 for step in x.stride()[:3])
    return x if ready else x.contiguous()


class _Problem:
    """Sizes and inputs of one call, laid out as the kernels want them."""

    def __init__(
        self, x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, turns: Turns | None
    ) -> None:
        self.batch, self.length, self.heads, _ = x.shape
        self.states, self.turns = B.shape[3], turns
        self.kind = Kind(self.states, turns is not None)
        self.angles = None if turns is None else turns.angles
        self.chunks = -(-self.length // CHUNK)
        self.blocks = self.batch * self.chunks * self.heads
        self.per_group = self.heads // B.shape[2]
        self.device = x.device.index
        self.x, self.B, self.C = aligned_rows(x), aligned_rows(B), aligned_rows(C)
        self.step, self.log_decay = step.contiguous(), log_decay.contiguous()
        self.sizes = (self.length, self.heads, self.per_group)

    @property
    def pairs(self) -> int:
        """Pairs of states that turn."""
        return 0 if self.angles is None else self.angles.shape[3]

    def states_between(
        self, x: Tensor, B: Tensor, initial: Tensor | None, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """The state that each chunk is entered with (B, K, H, P, N) in bf16, and the last one;
        backward, where x is dy and B is C, the gradients of the states that they are left with, and
        of the first."""
        initial = None if initial is None else initial.contiguous()
        columns, blocks = walk(self.batch * self.heads, self.states)
        if not blocks:
            return self.passed_on(*self.chunk_states(x, B, backward), initial, backward)
        carries = x.new_empty(self.batch, self.chunks, self.heads, CHANNELS, self.states)
        last = self.step.new_empty(self.batch, self.heads, CHANNELS, self.states)
        stages = 3 if blocks <= MANY_BLOCKS else 2
        _launch(
            self.device, f"ssd_walk<{self.states}, {str(backward).lower()}>", self.kind, blocks,
            2 * CHUNK * (stages * (CHANNELS + 8 + columns + 8) + columns + 8),
            x.data_ptr(), self.step.data_ptr(), self.log_decay.data_ptr(), B.data_ptr(),
            address(initial), address(self.angles), carries.data_ptr(), last.data_ptr(),
            *x.stride()[:3], *B.stride()[:3], *self.sizes, self.pairs,
            stages,
        )  # fmt: skip
        return carries, last

    def chunk_states(self, x: Tensor, B: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state (B, K, H, P, N), and its log-decay (B, K, H)."""
        shape = (self.batch, self.chunks, self.heads)
        states = self.step.new_empty(*shape, CHANNELS, self.states)
        totals = self.step.new_empty(shape)
        _launch(
            self.device, f"ssd_states<{self.states}, {str(backward).lower()}>", self.kind,
            self.blocks, _shared(self.states, 1, 1),
            x.data_ptr(), self.step.data_ptr(), self.log_decay.data_ptr(), B.data_ptr(),
            states.data_ptr(), totals.data_ptr(), *x.stride()[:3], *B.stride()[:3], *self.sizes,
        )  # fmt: skip
        return states, totals

    def passed_on(
        self, states: Tensor, totals: Tensor, initial: Tensor | None, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`states_between` gives, of what each chunk adds."""
        carries = torch.empty_like(states, dtype=torch.bfloat16)
        last = self.step.new_empty(self.batch, self.heads, CHANNELS, self.states)
        launch(
            states, "ssd_pass", self.kind, last.numel() // (2 * _THREADS["ssd_pass"]), states,
            totals, initial, self.angles, carries, last, last.numel(), CHANNELS * self.states,
            self.chunks, self.heads, backward, self.states, self.pairs)
        return carries, last


def forward(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, save: bool, turns: Turns | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """SSD on prepared inputs: ``h = exp(log_decay) h + step x B^T``, ``y = h C + D x``.

    Shapes: x (B, L, H, 64), B, C (B, L, G, N) in bf16 with any strides, N in STATES; step and
    log_decay (B, L, H), D (H,) and initial_state (B, H, 64, N) in float32. Returns y (B, L, H, 64),
    the final state, and for :func:`backward` the states between chunks; empty unless ``save``.
    With ``turns`` G is H.
    """
    p = _Problem(x, step, log_decay, B, C, turns)
    carries, final_state = p.states_between(p.x, p.B, initial_state, False)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    D = None if D is None else D.contiguous()
    together = output_heads(p.per_group, p.blocks, lambda heads: _output_at_once(
        p.device, p.kind, _output_shared(p.states, heads)))
    _launch(
        p.device, p.kind.of("ssd_output"), p.kind, p.blocks // together,
        _output_shared(p.states, together),
        p.x.data_ptr(), p.step.data_ptr(), p.log_decay.data_ptr(), p.B.data_ptr(), p.C.data_ptr(),
        address(D), carries.data_ptr(), address(None if turns is None else turns.own), y.data_ptr(),
        *p.x.stride()[:3], *p.B.stride()[:3],
        *p.C.stride()[:3], *p.sizes, together,
    )  # fmt: skip
    return y, final_state, carries if save else carries.new_empty(0)


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, step: Tensor, log_decay: Tensor,
    B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, carries: Tensor,
    turns: Turns | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`forward`'s tensors, in their order; None for one that is None. With
    ``turns`` also those of its ``own`` and of each step's angle (B, L, H, S), in radians.

    Every sum has a fixed order, so the same inputs give the same bits.
    """
    p = _Problem(x, step, log_decay, B, C, turns)
    dy = aligned_rows(dy)
    dcarries, dinitial = p.states_between(dy, p.C, dfinal_state, True)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dstep, dlog_decay = torch.empty_like(p.step), torch.empty_like(p.step)
    # dB and dC of each block: those that share a group are added up below.
    together = heads_of_a_block(p.per_group, p.blocks)
    dB, dC = (x.new_empty(p.batch, p.length, p.heads // together, p.states) for _ in range(2))
    dD = p.step.new_empty(p.batch * p.chunks, p.heads)
    D = None if D is None else D.contiguous()
    own = d_own = d_angle = None
    shared = _shared(p.states, 5, 6)
    if turns is not None:
        own, d_own = turns.own, torch.empty_like(p.step)
        d_angle = p.step.new_empty(p.batch, p.length, p.heads, p.pairs)
        shared = _shared(p.states, 3, 4) + _angles_bytes(p.states)
    _launch(
        p.device, p.kind.of("ssd_gradients"), p.kind, p.blocks // together, shared,
        dy.data_ptr(), p.x.data_ptr(), p.step.data_ptr(), p.log_decay.data_ptr(), p.B.data_ptr(),
        p.C.data_ptr(), address(D), carries.data_ptr(), dcarries.data_ptr(), address(own),
        dx.data_ptr(), dstep.data_ptr(), dlog_decay.data_ptr(), dB.data_ptr(), dC.data_ptr(),
        dD.data_ptr(), address(d_own), address(d_angle),
        *dy.stride()[:3], *p.x.stride()[:3], *p.B.stride()[:3], *p.C.stride()[:3], *p.sizes,
        together, p.pairs,
    )  # fmt: skip

    parts = p.per_group // together
    if parts > 1:
        of_parts, packs = (dB, dC), B.numel() // 8
        dB, dC = (torch.empty(B.shape, dtype=B.dtype, device=B.device) for _ in range(2))
        blocks = -(-2 * packs // _THREADS["ssd_groups"])
        launch(x, p.kind.of("ssd_groups"), p.kind, blocks, *of_parts, dB, dC, packs, parts)
    found = (dx, dstep, dlog_decay, dB, dC,
             None if D is None else dD.sum(0), None if initial_state is None else dinitial)
    return found if turns is None else (*found, d_own, d_angle)
