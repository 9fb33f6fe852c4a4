"""SSD on NVIDIA GPUs (sm_80 and later): launches the kernels of ``ssd.cu``, for bf16 sequences."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambabyte.ops.build.kernel import Kernel, Program, raw_stream

CHANNELS = 64  # of a head, the one number there is a kernel for
STATES = (16, 32, 64, 128)
CHUNK = 64  # steps, and rows of a tile
_THREADS = {"ssd_states": 128, "ssd_pass": 128, "ssd_output": 128, "ssd_gradients": 256,
            "ssd_groups": 128}
_PARAMETERS = {
    "ssd_states": "6P6q3i", "ssd_pass": "5Pq4i", "ssd_output": "8P9q4i",
    "ssd_gradients": "15P12q4i", "ssd_groups": "4Pqi"}
# Heads of a block share products, blocks fill the card: so many heads, and so many blocks at least.
MOST_TOGETHER, OUTPUT_BLOCKS, GRADIENT_BLOCKS = 8, 512, 256


def names(states: int) -> list[str]:
    """The kernels for that many states."""
    return [f"ssd_states<{states}, false>", f"ssd_states<{states}, true>", "ssd_pass",
            f"ssd_output<{states}>", f"ssd_gradients<{states}>", f"ssd_groups<{states}>"]


@functools.cache
def program(states: int) -> Program:
    return Program.from_file(
        "build/types.cu", "build/mma.cu", "build/chunks.cu", "ssd/ssd.cu", names=names(states))


@functools.cache
def _kernel(name: str, states: int, device: int) -> Kernel:
    return program(states).kernel(name, device, _PARAMETERS[name.partition("<")[0]])


def _launch(device: int, name: str, states: int, blocks: int, shared: int, *args: int) -> None:
    kernel = _kernel(name, states, device)
    kernel.allow_shared(shared)
    threads = _THREADS[name.partition("<")[0]]
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared, raw_stream(device), *args)


def _shared(states: int, square: int, deep: int) -> int:
    """Bytes of tiles of 64 rows: ``square`` of them of 64 columns, ``deep`` of N; all padded."""
    return 2 * CHUNK * (square * (CHANNELS + 8) + deep * (states + 8))


def heads_of_a_block(per_group: int, blocks: int, least: int = GRADIENT_BLOCKS) -> int:
    """How many heads of a group a block takes, where ``blocks`` have one each: as many as leave
    ``least`` blocks or more."""
    return max(n for n in range(1, MOST_TOGETHER + 1)
               if per_group % n == 0 and (n == 1 or blocks // n >= least))


def aligned_rows(x: Tensor) -> Tensor:
    """As it is where its rows can be read 16 bytes at a time."""
    ready = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(
        step % 8 for step in x.stride()[:3])
    return x if ready else x.contiguous()


class _Problem:
    """Sizes and inputs of one call, laid out as the kernels want them."""

    def __init__(self, x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> None:
        self.batch, self.length, self.heads, _ = x.shape
        self.states = B.shape[3]
        self.chunks = -(-self.length // CHUNK)
        self.blocks = self.batch * self.chunks * self.heads
        self.per_group = self.heads // B.shape[2]
        self.device = x.device.index
        self.x, self.B, self.C = aligned_rows(x), aligned_rows(B), aligned_rows(C)
        self.step, self.log_decay = step.contiguous(), log_decay.contiguous()
        self.sizes = (self.length, self.heads, self.per_group)

    def chunk_states(self, x: Tensor, B: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state (B, K, H, P, N), and its log-decay (B, K, H)."""
        shape = (self.batch, self.chunks, self.heads)
        states = self.step.new_empty(*shape, CHANNELS, self.states)
        totals = self.step.new_empty(shape)
        _launch(
            self.device, f"ssd_states<{self.states}, {str(backward).lower()}>", self.states,
            self.blocks, _shared(self.states, 1, 1),
            x.data_ptr(), self.step.data_ptr(), self.log_decay.data_ptr(), B.data_ptr(),
            states.data_ptr(), totals.data_ptr(), *x.stride()[:3], *B.stride()[:3], *self.sizes,
        )  # fmt: skip
        return states, totals

    def passed_on(
        self, states: Tensor, totals: Tensor, initial: Tensor | None, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """The state that each chunk is entered with (B, K, H, P, N) in bf16, and the last one;
        backward the gradients of the states that they are left with, and of the first."""
        carries = torch.empty_like(states, dtype=torch.bfloat16)
        last = self.step.new_empty(self.batch, self.heads, CHANNELS, self.states)
        initial = None if initial is None else initial.contiguous()
        _launch(
            self.device, "ssd_pass", self.states, last.numel() // (2 * _THREADS["ssd_pass"]), 0,
            states.data_ptr(), totals.data_ptr(), pointer(initial), carries.data_ptr(),
            last.data_ptr(), last.numel(), CHANNELS * self.states, self.chunks, self.heads,
            backward,
        )  # fmt: skip
        return carries, last


def forward(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """SSD on prepared inputs: ``h = exp(log_decay) h + step x B^T``, ``y = h C + D x``.

    Shapes: x (B, L, H, 64), B, C (B, L, G, N) in bf16 with any strides, N in STATES; step and
    log_decay (B, L, H), D (H,) and initial_state (B, H, 64, N) in float32. Returns y (B, L, H, 64),
    the final state, and for :func:`backward` the states between chunks; empty unless ``save``.
    """
    p = _Problem(x, step, log_decay, B, C)
    carries, final_state = p.passed_on(*p.chunk_states(p.x, p.B, False), initial_state, False)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    D = None if D is None else D.contiguous()
    together = heads_of_a_block(p.per_group, p.blocks, OUTPUT_BLOCKS)
    _launch(
        p.device, f"ssd_output<{p.states}>", p.states, p.blocks // together,
        _shared(p.states, 2, 3),
        p.x.data_ptr(), p.step.data_ptr(), p.log_decay.data_ptr(), p.B.data_ptr(), p.C.data_ptr(),
        pointer(D), carries.data_ptr(), y.data_ptr(), *p.x.stride()[:3], *p.B.stride()[:3],
        *p.C.stride()[:3], *p.sizes, together,
    )  # fmt: skip
    return y, final_state, carries if save else carries.new_empty(0)


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, step: Tensor, log_decay: Tensor,
    B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, carries: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`forward`'s tensors, in their order; None for one that is None.

    Every sum has a fixed order, so the same inputs give the same bits.
    """
    p = _Problem(x, step, log_decay, B, C)
    dy = aligned_rows(dy)
    dcarries, dinitial = p.passed_on(*p.chunk_states(dy, p.C, True), dfinal_state, True)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dstep, dlog_decay = torch.empty_like(p.step), torch.empty_like(p.step)
    # dB and dC of each block: those that share a group are added up below.
    together = heads_of_a_block(p.per_group, p.blocks)
    dB, dC = (x.new_empty(p.batch, p.length, p.heads // together, p.states) for _ in range(2))
    dD = p.step.new_empty(p.batch * p.chunks, p.heads)
    D = None if D is None else D.contiguous()
    _launch(
        p.device, f"ssd_gradients<{p.states}>", p.states, p.blocks // together,
        _shared(p.states, 5, 6),
        dy.data_ptr(), p.x.data_ptr(), p.step.data_ptr(), p.log_decay.data_ptr(), p.B.data_ptr(),
        p.C.data_ptr(), pointer(D), carries.data_ptr(), dcarries.data_ptr(), dx.data_ptr(),
        dstep.data_ptr(), dlog_decay.data_ptr(), dB.data_ptr(), dC.data_ptr(), dD.data_ptr(),
        *dy.stride()[:3], *p.x.stride()[:3], *p.B.stride()[:3], *p.C.stride()[:3], *p.sizes,
        together,
    )  # fmt: skip

    parts = p.per_group // together
    if parts > 1:
        of_parts, packs = (dB, dC), B.numel() // 8
        dB, dC = (torch.empty(B.shape, dtype=B.dtype, device=B.device) for _ in range(2))
        blocks = -(-2 * packs // _THREADS["ssd_groups"])
        _launch(
            p.device, f"ssd_groups<{p.states}>", p.states, blocks, 0,
            *(t.data_ptr() for t in (*of_parts, dB, dC)), packs, parts)
    return (dx, dstep, dlog_decay, dB, dC,
            None if D is None else dD.sum(0), None if initial_state is None else dinitial)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
