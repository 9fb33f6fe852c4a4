"""The gated delta rule on NVIDIA GPUs (sm_80 and later): launches the kernels of ``delta.cu``, for
bf16 sequences."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.ssd.cuda import aligned_rows

CHANNELS = 64  # key and value channels of a head, the one number there is a kernel for
CHUNK = 64  # steps, and rows of a tile
_THREADS = {"delta_pairs": 128, "delta_forward": 256, "delta_backward": 256, "delta_gradients": 128}
_PARAMETERS = {
    "delta_pairs": "9P6q2i", "delta_forward": "12P9q2i", "delta_backward": "11P9q2i",
    "delta_gradients": "14P9q2i"}
NAMES = tuple(f"{name}<{gate}>" for name in _PARAMETERS for gate in ("false", "true"))
_TILE = 2 * CHUNK * (CHANNELS + 8)  # bytes in bf16; twice that in float32


@functools.cache
def program() -> Program:
    return Program.from_file(
        "build/types.cu", "build/mma.cu", "build/chunks.cu", "delta/delta.cu", names=NAMES)


@functools.cache
def _kernel(name: str, device: int) -> Kernel:
    return program().kernel(name, device, _PARAMETERS[name.partition("<")[0]])


def _launch(device: int, name: str, blocks: int, shared: int, *args: int) -> None:
    kernel = _kernel(name, device)
    kernel.allow_shared(shared)
    threads = _THREADS[name.partition("<")[0]]
    kernel.launch((blocks, 1, 1), (threads, 1, 1), shared, raw_stream(device), *args)


class Kept(NamedTuple):
    """What :func:`forward` leaves for :func:`backward`, for each chunk of a head (B, K, H)."""

    inverse: Tensor  # (.., 64, 64) bf16: of the triangular matrix that a chunk's keys make
    reads: Tensor  # (.., 64, 64) bf16: what each query reads of each step
    decayed: Tensor  # (.., 3, 64, 64) bf16: keys, queries and written keys, with a gate a channel
    scales: Tensor  # (.., 1 or 3, 64) float32: decays
    missing: Tensor  # (.., 64, 64) bf16: what the state misses at each step
    carries: Tensor  # (.., 64, 64) bf16: the state that a chunk is entered with

    @classmethod
    def empty(cls, q: Tensor, log_decay: Tensor, save: bool) -> Kept:
        """New ones; those of the backward pass alone are empty unless ``save``."""
        batch, length, heads, _ = q.shape
        chunks = (batch, -(-length // CHUNK), heads)
        square = (*chunks, CHUNK, CHANNELS)
        inverse, reads = q.new_empty(square), q.new_empty(square)
        missing, carries = (q.new_empty(square if save else 0) for _ in range(2))
        by_channel = log_decay.shape[3] > 1
        decayed = q.new_empty((*chunks, 3, CHUNK, CHANNELS) if by_channel else 0)
        scales = log_decay.new_empty(*chunks, 1 if by_channel else 3, CHANNELS)
        return cls(inverse, reads, decayed, scales, missing, carries)

    @classmethod
    def nothing(cls, q: Tensor) -> Kept:
        return cls(*(q.new_empty(0) for _ in cls._fields))

    def of_chunks(self) -> list[int]:
        """Addresses of what there is of a chunk before any state is known."""
        return [t.data_ptr() for t in self[:4]]


class _Problem:
    """Sizes and inputs of one call, laid out as the kernels want them."""

    def __init__(
        self, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, ages: Tensor | None
    ) -> None:
        self.batch, self.length, self.heads, _ = q.shape
        self.blocks = self.batch * -(-self.length // CHUNK) * self.heads
        self.by_channel = log_decay.shape[3] > 1
        self.device = q.device.index
        self.q, self.k = aligned_rows(q), aligned_rows(k)
        self.log_decay, self.beta = log_decay.contiguous(), beta.contiguous()
        self.ages = None if ages is None else ages.contiguous()
        self.steps = (*self.q.stride()[:3], *self.k.stride()[:3])

    def launch(self, name: str, blocks: int, shared: int, *args: int) -> None:
        _launch(self.device, f"{name}<{str(self.by_channel).lower()}>", blocks, shared, *args,
                self.length, self.heads)

    def pass_shared(self) -> int:
        return (2 * 6 + 2 if self.by_channel else 2 * 5 + 3) * _TILE

    def state(self) -> Tensor:
        return self.beta.new_empty(self.batch, self.heads, CHANNELS, CHANNELS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    initial_state: Tensor | None, ages: Tensor | None, save: bool,
) -> tuple[Tensor, ...]:
    """The rule on prepared inputs.

    Shapes: q, k, v (B, L, H, 64) in bf16 with any strides; log_decay (B, L, H, 1 or 64), beta
    (B, L, H) and initial_state (B, H, 64, 64) in float32; ages (B, L) as of ``document_ages``.
    Returns o (B, L, H, 64), the final state, and the tensors of Kept; those are empty unless
    ``save``.
    """
    p, v = _Problem(q, k, log_decay, beta, ages), aligned_rows(v)
    kept = Kept.empty(q, log_decay, save)
    p.launch(
        "delta_pairs", p.blocks, (5 if p.by_channel else 4) * _TILE,
        p.q.data_ptr(), p.k.data_ptr(), p.log_decay.data_ptr(), p.beta.data_ptr(),
        address(p.ages), *kept.of_chunks(), *p.steps)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = p.state()
    initial = None if initial_state is None else initial_state.contiguous()
    p.launch(
        "delta_forward", p.batch * p.heads, p.pass_shared(),
        p.q.data_ptr(), p.k.data_ptr(), v.data_ptr(), *kept.of_chunks(),
        address(initial), o.data_ptr(), address(kept.missing if save else None),
        address(kept.carries if save else None), last.data_ptr(), *p.steps, *v.stride()[:3])
    return o, last, *(kept if save else Kept.nothing(q))


def backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    beta: Tensor, initial_state: Tensor | None, ages: Tensor | None, *kept: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`forward`'s tensors but the ages, in their order; None for one that is
    None.

    Every sum has a fixed order, so the same inputs give the same bits.
    """
    p, do, saved = _Problem(q, k, log_decay, beta, ages), aligned_rows(do), Kept(*kept)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dcarries, dinitial = torch.empty_like(saved.carries), p.state()
    dlast = None if dlast is None else dlast.contiguous()
    p.launch(
        "delta_backward", p.batch * p.heads, p.pass_shared(),
        p.q.data_ptr(), p.k.data_ptr(), do.data_ptr(), *saved.of_chunks(),
        address(dlast), dv.data_ptr(), dcarries.data_ptr(), dinitial.data_ptr(), *p.steps,
        *do.stride()[:3])
    dq, dk = (torch.empty(v.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dlog_decay, dbeta = torch.empty_like(p.log_decay), torch.empty_like(p.beta)
    p.launch(
        "delta_gradients", p.blocks, (11 if p.by_channel else 7) * _TILE,
        p.q.data_ptr(), p.k.data_ptr(), do.data_ptr(), dv.data_ptr(), p.log_decay.data_ptr(),
        p.beta.data_ptr(), address(p.ages), saved.missing.data_ptr(), saved.carries.data_ptr(),
        dcarries.data_ptr(), dq.data_ptr(), dk.data_ptr(), dlog_decay.data_ptr(),
        dbeta.data_ptr(), *p.steps, *do.stride()[:3])
    return dq, dk, dv, dlog_decay, dbeta, None if initial_state is None else dinitial
