"""One streaming step of a Mamba layer on the GPU: plans and launches the kernels of step.cu.

Two launches for everything between in_proj and out_proj of a layer; checks are in ``step.py``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.conv.cuda import ELEMENTS

# Each batch row reads the x_proj weights anew; beyond so many reads, matrix products are faster.
MOST_READS = 1 << 23
_SLICE, _LANES = 64, 4  # as in step.cu

_PER_LANE = (1, 2, 4, 8, 16)  # states a thread


@functools.cache
def program(dtype: torch.dtype) -> Program:
    """The step kernels for activations of that dtype."""
    element = ELEMENTS[dtype]
    names = [f"scan_step<{element}>"]
    for weight in sorted({element, "float"}):
        names.append(f"step_input<{element}, {weight}>")
        names += [f"step_state<{element}, {weight}, {per}>" for per in _PER_LANE]
    return Program.from_file("build/types.cu", "mamba/step.cu", names=names)


@functools.cache
def _step_kernels(
    dtype: torch.dtype, weights: torch.dtype, states: int, device: int
) -> tuple[Kernel, Kernel]:
    types, kernels = f"{ELEMENTS[dtype]}, {ELEMENTS[weights]}", program(dtype)
    per = next(n for n in _PER_LANE if n * _LANES >= states)
    return (
        kernels.kernel(f"step_input<{types}>", device, "PPPPPPPPqiiii"),
        kernels.kernel(f"step_state<{types}, {per}>", device, "PPPPPPPPPPqiiii"),
    )


@functools.cache
def _scan_kernel(dtype: torch.dtype, device: int) -> Kernel:
    return program(dtype).kernel(f"scan_step<{ELEMENTS[dtype]}>", device, "P" * 11 + "qqqqqqiii")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def mamba_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One time step of Mamba between its projections, on a GPU: two kernels.

    x and z (B, D), halves of in_proj's output; tail (B, K - 1, D) and state (B, D, N) of before;
    conv_weight (D, K), conv_bias (D,), x_proj (R + 2N, D), dt_proj (D, R), dt_bias and D (D,), and
    A (D, N). Returns out_proj's input (B, D) in x's dtype, the new tail, and the new state in
    float32.
    """
    (batch, channels), device = x.shape, x.device.index
    (states, rank), taps = (A.shape[1], dt_proj.shape[1]), conv_weight.shape[1]
    many = batch * x_proj.numel() > MOST_READS
    if many or x_proj.dtype not in (x.dtype, torch.float32):
        return _wide_step(
            x, z, tail, state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
        )
    x, z, tail, state = _rows(x), _rows(z), tail.contiguous(), state.float().contiguous()
    conv_weight, x_proj, dt_proj = (w.contiguous() for w in (conv_weight, x_proj, dt_proj))
    conv_bias = None if conv_bias is None else conv_bias.to(x_proj.dtype).contiguous()
    dt_bias, A, D = (p.float().contiguous() for p in (dt_bias, A, D))
    rows, slices = rank + 2 * states, -(-channels // _SLICE)
    aligned = x_proj.data_ptr() % 32 == 0 and channels % 8 == 0
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    new_tail, new_state = torch.empty_like(tail), torch.empty_like(state)
    scratch = torch.empty(
        batch * (channels + slices * rows), dtype=torch.float32, device=x.device)
    u = scratch.data_ptr()
    parts = u + 4 * batch * channels
    stream = raw_stream(device)
    first, second = _step_kernels(x.dtype, x_proj.dtype, states, device)
    first.launch(
        (slices, batch, 1), (256, 1, 1), 0, stream,
        x.data_ptr(), tail.data_ptr(), conv_weight.data_ptr(), address(conv_bias),
        x_proj.data_ptr(), new_tail.data_ptr(), u, parts,
        x.stride(0), channels, rows, taps, aligned,
    )  # fmt: skip
    second.launch(
        (-(-channels * _LANES // 128), batch, 1), (128, 1, 1), 4 * rows, stream,
        u, parts, z.data_ptr(), state.data_ptr(), dt_proj.data_ptr(), dt_bias.data_ptr(),
        A.data_ptr(), D.data_ptr(), y.data_ptr(), new_state.data_ptr(),
        z.stride(0), channels, states, rank, slices,
    )  # fmt: skip
    return y, new_tail, new_state


def _wide_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for many rows: the convolution at length 1, two matrix products, a scan step."""
    u, tail = torch.ops.mambabyte.causal_conv.default(
        x.unsqueeze(1),
        conv_weight.float(),
        None if conv_bias is None else conv_bias.float(),
        tail,
        None,
        True,
    )
    u, (states, rank) = u.squeeze(1), (A.shape[1], dt_proj.shape[1])
    low, B, C = F.linear(u, x_proj.to(u.dtype)).split([rank, states, states], dim=1)
    delta = F.linear(low, dt_proj.to(u.dtype))
    y, state = scan_step(u, delta, A, B, C, D, z, dt_bias, state, True)
    return y, tail, state


def scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One time step of the selective scan on a GPU, arguments as of ``selective_scan_step``: u,
    delta and z (B, D), B and C (B, N), A (D, N), D and delta_bias (D,), state (B, D, N). Returns y
    in u's dtype and the new state in float32."""
    (batch, channels), states, device = u.shape, A.shape[1], u.device.index
    u, delta, B, C = (_rows(t.to(u.dtype)) for t in (u, delta, B, C))
    z = None if z is None else _rows(z.to(u.dtype))
    A, state = A.float().contiguous(), state.float().contiguous()
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    y = torch.empty((batch, channels), dtype=u.dtype, device=u.device)
    new_state = torch.empty_like(state)
    _scan_kernel(u.dtype, device).launch(
        (-(-batch * channels * _LANES // 128), 1, 1), (128, 1, 1), 0, raw_stream(device),
        u.data_ptr(), delta.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr(), address(D),
        address(z), address(delta_bias), state.data_ptr(), y.data_ptr(), new_state.data_ptr(),
        u.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        batch * channels, channels, states, delta_softplus,
    )  # fmt: skip
    return y, new_state
