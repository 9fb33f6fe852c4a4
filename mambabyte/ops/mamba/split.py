"""The fused mixer on a stretch of a sequence whose other stretches are elsewhere.

Two things come from there: the convolution's last inputs, and the state of the scan. The state is
worked out while the scan runs, not by a scan before it: its pass over states, which a long sequence
takes in any case, gives what the stretch does to a state, and its other kernels begin with the
state that arrives. Backwards likewise: the pass over adjoint states gives what reaches the initial
state, and what arrives is the gradient of the final one. So a stretch costs what a sequence of its
length does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import without_autocast
from mambabyte.ops.mamba import fused


class Elsewhere(Protocol):
    """The other stretches, as :class:`mambabyte.model.sequence.Piece` has them."""

    def before(self, x: Tensor, rows: int, dim: int) -> Tensor: ...
    def given_back(self, gradient: Tensor, rows: int, dim: int) -> Tensor: ...
    def enter(self, decay: Tensor, end: Tensor) -> tuple[Tensor, list[Tensor]]: ...
    def leave(self, gradient: Tensor, decays: list[Tensor]) -> Tensor: ...


def split_mixer(
    piece: Elsewhere, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor,
    dt_proj: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mambabyte.ops.mamba.fused.fused_mixer` of one stretch: shapes, dtypes and results as
    there; gradients flow through y alone, to the other stretches too. All processes call together.
    """
    if torch.is_autocast_enabled(xz.device.type):
        dtype = torch.get_autocast_dtype(xz.device.type)
        xz, x_proj = xz.to(dtype), x_proj.to(dtype)
        dt_proj = None if dt_proj is None else dt_proj.to(dtype)
    inputs = (xz, conv_weight.float(), conv_bias.float(), x_proj, dt_proj, dt_bias.float(),
              A.float(), D.float())  # fmt: skip
    fused.check(*inputs, None)
    found: tuple[Tensor, Tensor, Tensor] = _SplitMixer.apply(piece, *inputs)
    return found


class _SplitMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Elsewhere, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        xz, conv_weight, *_, A, _ = inputs
        rows = conv_weight.shape[1] - 1
        arrived: list[Tensor] = []

        def arrive(end: Tensor, steps: Tensor) -> Tensor:
            state, decays = piece.enter(torch.exp(steps[..., None] * A), end)
            arrived.extend([state, *decays])
            return state

        with without_autocast(xz.device):
            found = piece.before(xz.chunk(2, -1)[0], rows, 1)
            before = F.pad(found, (0, 0, rows - found.shape[1], 0))  # zeros before the beginning
            given: Any = (*inputs, None, True)
            y, tail, state, *kept = fused.forward(*given, before=before, arrive=arrive)
        ctx.piece, ctx.received, ctx.count = piece, found.shape[1], len(inputs)
        ctx.mark_non_differentiable(tail, state)
        ctx.save_for_backward(*inputs, *kept, before, *arrived)
        return y, tail, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, rest = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        *kept, before, entered = rest[:6]
        decays = rest[6:]
        given: Any = (dy, None, None, *inputs, None, *kept)
        dxz, *others, _none, dbefore = fused.gradients(
            *given, before=before, entered=entered,
            leave=lambda gradient: ctx.piece.leave(gradient, list(decays)))
        rows = before.shape[1]
        back = ctx.piece.given_back(dbefore[:, rows - ctx.received :], rows, 1)
        channels = dxz.shape[2] // 2
        dxz[:, dxz.shape[1] - back.shape[1] :, :channels] += back
        return None, dxz, *others
