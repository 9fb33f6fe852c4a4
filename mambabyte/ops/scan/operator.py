"""The fused selective scan as one PyTorch operator, ``torch.ops.mambabyte.selective_scan``.

The kernels are in ``cpu.py`` and ``cuda.py`` (NVIDIA GPUs, sm_80 and later). This
file is what PyTorch has to know about them: shapes without data, gradients, autocast, devices. So
the scan is one node under torch.compile, and CUDA graphs, checkpointing and DDP work as usual.

Rules of types:

- u, delta, z, B and C share one dtype: bfloat16, float16 or float32, on the CPU float64 too. Under
  autocast they are cast to the autocast dtype (float64 is left alone, as autocast always does).
- A, D, delta_bias and the states are float32 (float64 with float64 inputs), under autocast too;
  lower precision is widened, since that loses nothing.

First-order gradients only: the gradient of a gradient raises, it is never silently wrong.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.build import nvrtc

__all__ = ["default_form", "fused_available", "fused_scan"]

MAX_STATES = 64
OLDEST_CAPABILITY = (8, 0)
_DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}

# --------------------------------------------------------------------------------- availability


@torch.compiler.assume_constant_result  # a fact of the machine: nothing for a graph to look at
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


@torch.compiler.assume_constant_result
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


def _kernels(device_type: str) -> ModuleType:
    """The module with forward, backward and saved_shape; loaded only where it is needed."""
    if device_type == "cpu":
        from mambabyte.ops.scan import cpu as native_scan

        return native_scan
    from mambabyte.ops.scan import cuda as cuda_scan

    return cuda_scan


# ----------------------------------------------------------------------------------- the caller


def fused_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = False,
    recompute: bool = False,
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
    _check_shapes(*tensors)
    if not torch.is_autocast_enabled(u.device.type):
        _check_dtypes(*tensors)
    save = not recompute and torch.is_grad_enabled() and _any_requires_grad(tensors)
    y, final_state, _ = _scan(
        u,
        delta,
        _state_dtype(A, u),
        B,
        C,
        None if D is None else _state_dtype(D, u),
        z,
        None if delta_bias is None else _state_dtype(delta_bias, u),
        None if initial_state is None else _state_dtype(initial_state, u),
        delta_softplus,
        save,
    )
    return y, final_state


def _any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _state_dtype(tensor: Tensor, u: Tensor) -> Tensor:
    """Widened to the dtype of the states: float64 beside float64 inputs, else float32."""
    return tensor.to(torch.float64 if u.dtype == torch.float64 else torch.float32)


_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def _check_shapes(u: Tensor, *others: Tensor | None) -> None:
    """Shapes and devices. Raises UserError that names the tensor, what it is and should be."""
    A = others[1]
    assert A is not None
    if u.ndim != 3 or 0 in u.shape:
        raise UserError(f"u has shape {tuple(u.shape)}: expected (batch, length, channels), none 0")
    if A.is_complex():
        raise UserError("A is complex: only a real A is supported, give its real form")
    if A.ndim != 2 or A.shape[0] != u.shape[2] or not 1 <= A.shape[1] <= MAX_STATES:
        raise UserError(
            f"A has shape {tuple(A.shape)}: expected ({u.shape[2]}, N), the channels of u by "
            f"1 to {MAX_STATES} states; form='chunked' takes more"
        )
    (batch, length, channels), states = u.shape, A.shape[1]
    like_u, like_b, like_d = (batch, length, channels), (batch, length, states), (channels,)
    shapes = (like_u, A.shape, like_b, like_b, like_d, like_u, like_d, (batch, channels, states))
    for name, tensor, shape in zip(_NAMES[1:], others, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(shape)} beside "
                f"u {tuple(u.shape)} and A {tuple(A.shape)}"
            )
        if tensor.device != u.device:
            raise UserError(
                f"{name} is on {tensor.device} and u on {u.device}: move it, "
                f"{name}.to({str(u.device)!r})"
            )
    if u.device.type not in _DTYPES and u.device.type != "meta":
        raise UserError(f"no fused scan on {u.device.type}: use form='chunked' there")


def _check_dtypes(u: Tensor, *others: Tensor | None) -> None:
    allowed = _DTYPES.get(u.device.type, _DTYPES["cpu"])
    if u.dtype not in allowed:
        raise UserError(
            f"u is {u.dtype}: the fused scan on {u.device.type} takes "
            f"{', '.join(str(d) for d in allowed)}; cast it, or use form='chunked'"
        )
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    for name, tensor in zip(_NAMES[1:], others, strict=True):
        if tensor is None:
            continue
        if name in ("delta", "B", "C", "z"):
            if tensor.dtype != u.dtype:
                raise UserError(
                    f"{name} is {tensor.dtype} and u is {u.dtype}: they must agree, cast one, as "
                    f"in {name}.to({u.dtype})"
                )
        elif tensor.dtype not in _DTYPES["cpu"] or torch.promote_types(tensor.dtype, wide) != wide:
            raise UserError(f"{name} is {tensor.dtype}: expected {wide} beside u in {u.dtype}")


# --------------------------------------------------------------------------------- the operator

_LIBRARY = torch.library.Library("mambabyte", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state"
)
# ``save`` asks for the states that spare the backward a second forward (``saved``, else empty).
_LIBRARY.define(
    f"selective_scan({_INPUTS}, bool delta_softplus, bool save) "
    "-> (Tensor y, Tensor final_state, Tensor saved)",
    tags=_TAGS,
)
# Gradients in the order of the inputs; empty for an input that is None.
_LIBRARY.define(
    f"selective_scan_backward(Tensor dy, Tensor? dfinal_state, {_INPUTS}, Tensor saved, "
    "bool delta_softplus) -> (" + ", ".join(["Tensor"] * 9) + ")",
    tags=_TAGS,
)
_scan = torch.ops.mambabyte.selective_scan.default
_scan_backward = torch.ops.mambabyte.selective_scan_backward.default

Tensors = tuple[Tensor, ...]


def _forward_on(device_type: str) -> Any:
    def forward(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
        delta_softplus: bool, save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if u.device not in _READY:
            _require(u.device)
        y, final_state, saved = _kernels(device_type).forward(
            u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, save
        )
        return y, final_state, A.new_empty(0) if saved is None else saved

    return forward


def _backward_on(device_type: str) -> Any:
    def backward(
        dy: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
        C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
        initial_state: Tensor | None, saved: Tensor, delta_softplus: bool,
    ) -> Tensors:  # fmt: skip
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        kernels = _kernels(device_type)
        if device_type == "cpu" and saved.numel() == 0:  # cuda_scan does this by parts
            _, _, saved = kernels.forward(*inputs, delta_softplus, True)
        gradients = kernels.backward(dy, dfinal_state, *inputs, saved, delta_softplus)
        return tuple(
            A.new_empty(0) if given is None else gradient
            for given, gradient in zip(inputs, gradients, strict=True)
        )

    return backward


_READY: set[torch.device] = set()


def _require(device: torch.device) -> None:
    available, reason = fused_available(device)
    if not available:
        raise UserError(f"no fused scan on {device}: {reason}; use form='chunked'")
    _READY.add(device)


for _type, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    _LIBRARY.impl("selective_scan", _forward_on(_type), _key)
    _LIBRARY.impl("selective_scan_backward", _backward_on(_type), _key)


@torch.library.register_fake("mambabyte::selective_scan", lib=_LIBRARY)
def _forward_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
    delta_softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, channels), states = u.shape, A.shape[1]
    saved_shape: tuple[int, ...] = (0,)
    if save:
        if u.device.type == "cuda":
            size = _kernels("cuda").saved_shape(batch, length, channels, states, u.dtype)
        else:
            size = _kernels("cpu").saved_shape(batch, length, channels, states)
        saved_shape = tuple(size)
    return (
        u.new_empty(batch, length, channels),
        A.new_empty(batch, channels, states),
        A.new_empty(saved_shape),
    )


@torch.library.register_fake("mambabyte::selective_scan_backward", lib=_LIBRARY)
def _backward_shapes(
    dy: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, saved: Tensor, delta_softplus: bool,
) -> Tensors:  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(A.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


# ------------------------------------------------------------------------------------ gradients
#
# Registered by hand: torch.library.register_autograd does the same, at 40 us more a call.


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            output = _scan(*args)
        *tensors, ctx.delta_softplus, _ = args
        ctx.set_materialize_grads(False)  # no (B, D, N) of zeros where the state is not used
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dfinal_state, _ = grads
        *inputs, saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(inputs[0])
        gradients = _scan_backward(dy, dfinal_state, *inputs, saved, ctx.delta_softplus)
        wanted = zip(ctx.needs_input_grad[:9], gradients, strict=True)
        return (*[gradient if needed else None for needed, gradient in wanted], None, None)


def differentiable(operator: Any, function: Any) -> Any:
    """Kernel for the Autograd key: ``function`` where a gradient is wanted, else ``operator``."""

    def call(*args: Any) -> Tensors:
        if torch.is_grad_enabled():
            for value in args:
                if isinstance(value, Tensor) and value.requires_grad:
                    return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


def once_only(operator: Any, what: str, instead: str) -> Any:
    """Kernel for the Autograd key of an ``operator`` that is the backward of ``what``."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensors:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
            raise NotImplementedError(
                f"{what} is differentiable once: use {instead} for second order")

    return differentiable(operator, Backward)


_LIBRARY.impl("selective_scan", differentiable(_scan, _Scan), "Autograd")
_LIBRARY.impl(
    "selective_scan_backward",
    once_only(_scan_backward, "the fused selective scan", "form='chunked'"), "Autograd",
)


# ------------------------------------------------------------------------------------- autocast


def _autocast_on(device_type: str) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             z: Tensor | None, *rest: Any) -> Tensors:  # fmt: skip
        dtype = u.dtype if u.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            u, delta, B, C = (t.to(dtype) for t in (u, delta, B, C))
            return _scan(u, delta, A, B, C, D, None if z is None else z.to(dtype), *rest)

    return scan


for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _LIBRARY.impl("selective_scan", _autocast_on(_type), _key)
