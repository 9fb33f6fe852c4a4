"""Operators with a fault each, of the kinds that are found in kernels; and one without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops import gated_delta_rule, selective_scan, ssd_scan


def sound(u, delta, A, B, C, *, delta_softplus=False, initial_state=None):
    """By the protocol: D, z and the bias are done around it."""
    return selective_scan(u, delta, A, B, C, delta_softplus=delta_softplus,
                          initial_state=initial_state)


def wrong_mask(q, k, v):
    """Attention that sees one step ahead."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(2)
    return torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(mask, -torch.inf).softmax(-1), v)


def no_maximum(q, k, v):
    """A softmax that does not subtract the largest score."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp().tril()
    return torch.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdim=True), v)


def dropped_state_gradient(x, dt, A, B, C, *, initial_state=None, **options):
    """Chunks whose state is handed on without its gradient."""
    ys, state = [], initial_state
    for part in zip(*(t.split(16, 1) for t in (x, dt, B, C)), strict=True):
        y, state = ssd_scan(part[0], part[1], A, *part[2:], **options,
                            initial_state=None if state is None else state.detach())
        ys.append(y)
    return torch.cat(ys, 1), state


def detached_final_state(q, k, v, log_decay, beta, *, initial_state=None):
    o, state = gated_delta_rule(q, k, v, log_decay, beta, initial_state=initial_state)
    return o, state.detach()


def leak_across_the_batch(u, delta, A, B, C, **options):
    """The last row ends where the first does."""
    y, state = selective_scan(u, delta, A, B, C, **options)
    return y + 1e-3 * y.roll(1, 0), state


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = torch.empty_like(x)  # zeros, more often than not
        out[:, :-1] = 0.0
        ctx.shape = x.shape
        return x + torch.nan_to_num(out, nan=1.0) * 1.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def unwritten_memory(u, delta, A, B, C, **options):
    y, state = selective_scan(u, delta, A, B, C, **options)
    return _Unwritten.apply(y), state


def writes_to_its_input(x, weight, bias, initial_state=None):
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    if initial_state is not None:
        padded = torch.cat([initial_state, x], 1)
    y = bias + sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(weight.shape[1]))
    x.data[:, 0] = 0.0
    return F.silu(y), padded[:, x.shape[1]:]


class _Strides(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        steps = torch.empty(x.shape, device="meta").stride()
        ctx.save_for_backward(x)
        return x.as_strided(x.shape, steps, x.storage_offset()).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def assumes_contiguous(x, dt, A, B, C, **options):
    """Reads x as if it lay in memory without gaps."""
    return ssd_scan(_Strides.apply(x), dt, A, B, C, **options)


def overflows(u, delta, A, B, C, *, delta_softplus=False, initial_state=None):
    """A cumulated sum of decays, whose exponential leaves float32."""
    return selective_scan(u, delta, A, B, C, delta_softplus=delta_softplus,
                          initial_state=initial_state, form="document_cumsum")


def forgets_boundaries(u, delta, A, B, C, *, document_starts=None, **options):
    return selective_scan(u, delta, A, B, C, **options)


def wrong_beside_a_chunk(u, delta, A, B, C, *, initial_state=None, **options):
    """The last step of a length that is one more than a multiple of 64."""
    y, state = selective_scan(u, delta, A, B, C, initial_state=initial_state, **options)
    return (y * torch.cat([y.new_ones(y.shape[1] - 1), y.new_zeros(1)])[:, None]
            if y.shape[1] % 64 == 1 and y.shape[1] > 1 else y), state


def crashes_on_one_step(q, k, v, log_decay, beta, **options):
    if q.shape[1] == 1:
        raise IndexError("index 1 is out of bounds")
    return gated_delta_rule(q, k, v, log_decay, beta, **options)


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q.clone(), k.clone()

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, Tensor | None]:
        both = all(ctx.needs_input_grad)
        return (dq if both else torch.zeros_like(dq)), (dk if both else None)


def all_gradients_or_none(q, k, v):
    """Takes it that who wants the gradient of q wants that of k."""
    q, k = _Both.apply(q, k)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)),
                                          is_causal=True).transpose(1, 2)


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-6 * torch.rand(()))


def not_repeatable(q, k, v):
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (_Noisy.apply(q), k, v)),
                                       is_causal=True)
    return y.transpose(1, 2)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("not on this card")


def no_backward(x, weight, bias, initial_state=None):
    """Right in value, and an error where it is differentiated."""
    padded = torch.cat([initial_state, _Forward.apply(x)], 1)
    y = F.conv1d(padded.mT, weight[:, None], bias, groups=len(weight)).mT
    return F.silu(y), padded[:, x.shape[1]:]


def leaves(q, k, v):
    raise SystemExit(0)
