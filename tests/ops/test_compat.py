"""The drop-in for mamba-ssm's selective_scan_fn, against the recurrence in its own layout."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.compat import selective_scan_fn

LAYOUTS = ["DN", "BNL", "B1NL", "B2NL", "B4NL"]


def reference(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False):
    """Step by step on (B, D, L): every tensor brought to (B, D, N, L) and no cleverness."""

    def full(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None, :, :, None]
        if x.ndim == 3:
            return x[:, None]
        return x.repeat_interleave(u.shape[1] // x.shape[1], dim=1)

    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    decay = torch.exp(dt[:, :, None] * A[None, :, :, None])
    drive = dt[:, :, None] * full(B) * u[:, :, None]
    h, ys = torch.zeros_like(decay[..., 0]), []
    weights = full(C).expand_as(decay)
    for t in range(u.shape[2]):
        h = decay[..., t] * h + drive[..., t]
        ys.append((weights[..., t] * h).sum(-1))
    y = torch.stack(ys, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def make(b_layout: str, c_layout: str, dtype=torch.float64, seed=0) -> list[Tensor]:
    batch, channels, length, states = 2, 8, 11, 3
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(layout: str) -> Tensor:
        if layout == "DN":
            return normal(channels, states)
        if layout == "BNL":
            return normal(batch, states, length)
        return normal(batch, int(layout[1]), states, length)

    sequence = (batch, channels, length)
    tensors = [normal(*sequence), normal(*sequence), -torch.exp(normal(channels, states))]
    tensors += [matrix(b_layout), matrix(c_layout), normal(channels), normal(*sequence)]
    tensors.append(normal(channels))
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("c_layout", LAYOUTS)
def test_outputs_and_gradients_match_the_recurrence(b_layout: str, c_layout: str) -> None:
    tensors = make(b_layout, c_layout)
    wanted = reference(*tensors, softplus=True)
    got = selective_scan_fn(*tensors, delta_softplus=True, return_last_state=True)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert relative_rms(mine, theirs) < 1e-12
    weights = [torch.randn_like(t) for t in wanted]
    gradients = [
        torch.autograd.grad([(r * w).sum() for r, w in zip(result, weights, strict=True)], tensors)
        for result in (got, wanted)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert relative_rms(mine, theirs) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, z, bias = make("BNL", "B2NL", dtype)
    A, D, bias = A.float(), D.float(), bias.float()
    out, state = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    wanted, _ = reference(*[t.double() for t in (u, delta, A, B, C, D, z, bias)], softplus=True)
    assert relative_rms(out.double(), wanted) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_mixed_dtypes_are_computed_in_the_widest() -> None:
    u, delta, A, B, C, *_ = make("BNL", "BNL", torch.float32)
    out = selective_scan_fn(u.bfloat16(), delta, A, B, C.bfloat16())
    assert out.dtype == torch.bfloat16


def test_without_options_a_tensor_comes_back() -> None:
    tensors = make("BNL", "BNL")[:5]
    out = selective_scan_fn(*tensors)
    assert isinstance(out, Tensor)
    assert relative_rms(out, reference(*tensors)[0]) < 1e-12


def test_complex_a_is_refused() -> None:
    u, delta, A, B, C, *_ = make("BNL", "BNL")
    with pytest.raises(UserError, match="must be real"):
        selective_scan_fn(u, delta, torch.complex(A, A), B, C)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 8), r"u has shape \(2, 8\)"),
        (1, (2, 8, 7), r"delta has shape \(2, 8, 7\): expected \(2, 8, 11\)"),
        (3, (2, 3, 12), r"B has shape \(2, 3, 12\)"),
        (4, (2, 3, 3, 11), r"C has shape \(2, 3, 3, 11\)"),
    ],
)
def test_wrong_shapes_are_named(index: int, shape: tuple[int, ...], message: str) -> None:
    tensors = make("BNL", "BNL")[:5]
    tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(UserError, match=message):
        selective_scan_fn(*tensors)


@pytest.mark.parametrize("constant", [False, True])
def test_packed_sequences(constant: bool) -> None:
    """By seq_idx or cumulative lengths: each sequence as if it were alone, values and gradients."""
    g = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(1, 4, 12, generator=g, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(4, 3, generator=g, dtype=torch.float64)
    B = torch.randn(*((4, 3) if constant else (1, 2, 3, 12)), generator=g, dtype=torch.float64)
    C = torch.randn(1, 3, 12, generator=g, dtype=torch.float64)
    edges = [0, 1, 6, 12]
    seq_idx = torch.tensor([[7] + [2] * 5 + [0] * 6], dtype=torch.int32)

    def alone(u: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return torch.cat([selective_scan_fn(
            u[..., a:b], delta[..., a:b], A, B if constant else B[..., a:b], C[..., a:b],
            delta_softplus=True) for a, b in itertools.pairwise(edges)], -1)

    inputs = [u.requires_grad_(), delta.requires_grad_()]
    wanted = alone(*inputs)
    gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    for packed in ({"seq_idx": seq_idx}, {"cu_seqlens": torch.tensor(edges)}):
        found, last = selective_scan_fn(
            *inputs, A, B, C, delta_softplus=True, return_last_state=True, **packed)
        torch.testing.assert_close(found, wanted)
        for one, two in zip(torch.autograd.grad(found.square().sum(), inputs), gradients,
                            strict=True):
            torch.testing.assert_close(one, two)
        assert last.shape == (1, 4, 3)
    with pytest.raises(UserError, match="give one of them"):
        selective_scan_fn(*inputs, A, B, C, seq_idx=seq_idx, cu_seqlens=torch.tensor(edges))
    with pytest.raises(UserError, match=r"seq_idx is torch\.float32"):
        selective_scan_fn(*inputs, A, B, C, seq_idx=seq_idx.float())
