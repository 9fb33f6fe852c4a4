"""The fused selective scan as one PyTorch operator, ``torch.ops.mambabyte.selective_scan``.

The kernels are in ``cpu.py`` and ``cuda.py`` (NVIDIA GPUs, sm_80 and later).

Rules of types:

- u, delta, z, B and C share one dtype: bfloat16, float16 or float32, on the CPU float64 too. Under
  autocast they are cast to the autocast dtype (float64 is left alone, as autocast always does).
- A, D, delta_bias and the states are float32 (float64 with float64 inputs), under autocast too;
  lower precision is widened, since that loses nothing.

The gradient of a gradient, forward-mode derivatives and torch.func's grad are those of the chunked
form in torch.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError
from mambabyte.ops.arguments import check_tensors
from mambabyte.ops.build import nvrtc
from mambabyte.ops.library import Tensors, constant_in_graphs, define, wants_gradient
from mambabyte.ops.scan.chunked import chunked_scan
from mambabyte.ops.scan.recurrent import complete_scan

__all__ = ["check_shapes", "default_form", "fused_available", "fused_scan",
           "run_fused", "scan_in_torch"]

MAX_STATES = 64
OLDEST_CAPABILITY = (8, 0)
_DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}

# --------------------------------------------------------------------------------- availability


@constant_in_graphs
def fused_available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the fused kernels run on that device, and what runs them or why not (one line)."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        return _cuda_available(index)
    if device.type == "cpu":
        return _kernels("cpu").available()
    if device.type == "cuda":
        return False, "torch sees no CUDA device"
    return False, f"there is no fused kernel for device type {device.type!r}"


@functools.cache
def _cuda_available(index: int) -> tuple[bool, str]:
    if torch.version.hip is not None:
        return False, "there is no fused kernel for ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return False, f"compute capability {capability} is below {OLDEST_CAPABILITY}"
    return nvrtc.nvrtc_available()


@constant_in_graphs
def default_form(device: torch.device, dtype: torch.dtype) -> str:
    """What form="auto" means there: "fused", or "chunked" where fused cannot run (and say so)."""
    if dtype not in _DTYPES.get(device.type, ()):
        return "chunked"
    available, reason = fused_available(device)
    if not available:
        _say_once(f"fused selective scan not used on {device.type}: {reason}; using torch instead")
    return "fused" if available else "chunked"


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _kernels(device_type: str) -> ModuleType:
    """The module with forward, backward and saved_shape; loaded only where it is needed."""
    if device_type == "cpu":
        from mambabyte.ops.scan import cpu as native_scan

        return native_scan
    from mambabyte.ops.scan import cuda as cuda_scan

    return cuda_scan


# ----------------------------------------------------------------------------------- the caller


def fused_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, initial_state: Tensor | None = None,
    delta_softplus: bool = False, recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """The fused scan: arguments and results as in :func:`mambabyte.ops.selective_scan`.

    Shapes: u, delta, z (B, L, D); A (D, N) with N <= 64; B, C (B, L, N); D, delta_bias (D,);
    initial_state (B, D, N). Returns y (B, L, D) and the final state (B, D, N).

    ``recompute`` is the low-memory setting: no states are kept between forward and backward, which
    runs the forward again instead.

    Raises UserError for a shape, dtype or device that does not fit, and where no
    fused kernel runs.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    check_shapes(*tensors, most_states=MAX_STATES)
    return run_fused(*tensors, delta_softplus, recompute)


def run_fused(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    delta_softplus: bool, recompute: bool = False, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`fused_scan` of what :func:`check_shapes` let pass; ``ages`` of ``document_ages``."""
    if u.device.type not in _DTYPES and u.device.type != "meta":
        raise UserError(f"no fused scan on {u.device.type}: use form='chunked' there")
    save = not recompute and wants_gradient(
        u, delta, A, B, C, D, z, delta_bias, initial_state)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    y, final_state, _ = _scan(
        u, delta, _widened("A", A, wide), B, C, _widened("D", D, wide), z,
        _widened("delta_bias", delta_bias, wide), _widened("initial_state", initial_state, wide),
        ages, delta_softplus, save,
    )  # fmt: skip
    return y, final_state


def _widened(name: str, tensor: Any, wide: torch.dtype) -> Any:
    """In the dtype of the states, where that loses nothing."""
    if tensor is None or tensor.dtype is wide:
        return tensor
    if torch.promote_types(tensor.dtype, wide) != wide:
        raise UserError(f"{name} is {tensor.dtype}: expected {wide} beside u; cast it, or give u "
                        "in float64 too")
    return tensor.to(wide)


def check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None, stream: torch.dtype | None = None,
    wide: torch.dtype | None = None, most_states: int | None = None,
) -> None:  # fmt: skip
    """Whether the arguments of a scan fit together, for a kernel in dtype too: ``stream`` is that
    of delta, B, C and z, ``wide`` that of the rest. Raises UserError."""
    for name, x in (("u", u), ("A", A)):
        if not isinstance(x, Tensor) or x.is_nested:
            check_tensors(name, x, None, ())
    if u.ndim != 3 or not u.shape[1] * u.shape[2]:
        raise UserError(
            f"u has shape {tuple(u.shape)}: expected (batch, length, channels), the last two at "
            "least 1")
    if A.is_complex():
        raise UserError("A is complex: only a real A is supported, give its real form")
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or not A.shape[1]:
        raise UserError(f"A has shape {tuple(A.shape)}: expected ({channels}, N), the channels of "
                        "u by at least 1 state")
    states = A.shape[1]
    if most_states is not None and states > most_states:
        raise UserError(f"A has shape {tuple(A.shape)}: expected 1 to {most_states} states here; "
                        "form='chunked' takes more")
    like_u, like_b = (batch, length, channels), (batch, length, states)
    check_tensors("u", u, like_u, _DTYPES["cpu"], (
        ("delta", delta, like_u, stream),
        ("A", A, (channels, states), wide),
        ("B", B, like_b, stream),
        ("C", C, like_b, stream),
        ("D?", D, (channels,), wide),
        ("z?", z, like_u, stream),
        ("delta_bias?", delta_bias, (channels,), wide),
        ("initial_state?", initial_state, (batch, channels, states), wide),
    ))  # fmt: skip


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
           z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
           ages: Tensor | None, delta_softplus: bool) -> None:  # fmt: skip
    """Before a kernel: shapes, dtypes, devices, and that there is a kernel at all."""
    check_tensors("u", u, None, _DTYPES["cpu"], (("ages?", ages, u.shape[:2], torch.uint8),))
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state, u.dtype, wide, MAX_STATES)
    if u.dtype not in _DTYPES[u.device.type]:
        known = ", ".join(map(str, _DTYPES[u.device.type]))
        raise UserError(f"u is {u.dtype}: the fused scan on {u.device.type} takes {known}; cast "
                        "it, or use form='chunked'")
    if u.device not in _READY:
        _require(u.device)


def _check_backward(
    dy: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, ages: Tensor | None, saved: Tensor, delta_softplus: bool,
) -> None:  # fmt: skip
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, ages, delta_softplus)
    shape = (0,) if saved is None or saved.ndim == 1 else _saved_shape(u, A)
    check_tensors("u", u, None, _DTYPES["cpu"], (
        ("dy", dy, u.shape, u.dtype),
        ("dfinal_state?", dfinal_state, (u.shape[0], *A.shape), A.dtype),
        ("saved", saved, shape, A.dtype),
    ))  # fmt: skip


# --------------------------------------------------------------------------------- the operator


def _forward_on(device_type: str) -> Any:
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, ages, delta_softplus, save = args
        return _kernels(device_type).forward(*inputs, delta_softplus, save, ages=ages)

    return forward


def _backward_on_cpu(
    dy: Tensor, dfinal_state: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    *inputs, ages, saved, delta_softplus = args
    kernels = _kernels("cpu")
    if saved.numel() == 0:
        _, _, saved = kernels.forward(*inputs, delta_softplus, True, ages=ages)
    found = kernels.backward(dy, dfinal_state, *inputs, saved, delta_softplus, ages=ages)
    return *found, None


def _backward_on_cuda(*args: Any) -> tuple[Tensor | None, ...]:
    # where nothing was saved, it computes it by parts
    *others, ages, saved, delta_softplus = args
    return *_kernels("cuda").backward(*others, saved, delta_softplus, ages=ages), None


_READY: set[torch.device] = set()


def _require(device: torch.device) -> None:
    available, reason = fused_available(device)
    if not available:
        raise UserError(f"no fused scan on {device}: {reason}; use form='chunked'")
    _READY.add(device)


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    sizes = (*u.shape, A.shape[1])
    if u.device.type == "cuda":
        return _kernels("cuda").saved_shape(*sizes, u.dtype)
    return _kernels("cpu").saved_shape(*sizes)


def _shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, ages: Tensor | None,
    delta_softplus: bool, save: bool,
) -> Tensors:
    return (
        u.new_empty(u.shape),
        A.new_empty(u.shape[0], *A.shape),
        A.new_empty(_saved_shape(u, A) if save else (0,)),
    )


def scan_in_torch(*args: Any) -> tuple[Tensor, Tensor]:
    """The scan by the chunked form, arguments as of complete_scan: for what has no kernel."""
    return complete_scan(chunked_scan, FORMS["chunked"].chunk, *args)


def _in_torch(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, ages, delta_softplus = args
    return scan_in_torch(*inputs, delta_softplus, ages)


# ``saved`` are states that spare the backward a second forward.
_scan = define(
    "selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? ages",
    "y, final_state",
    flags="bool delta_softplus",
    kept="saved",
    forward={"cpu": _forward_on("cpu"), "cuda": _forward_on("cuda")},
    backward={"cpu": _backward_on_cpu, "cuda": _backward_on_cuda},
    check=_check,
    check_backward=_check_backward,
    shapes=_shapes,
    in_torch=_in_torch,
    cast=dict.fromkeys(("cpu", "cuda"), ("u", "delta", "B", "C", "z")),
)
