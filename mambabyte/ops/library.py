"""How an operator of this project becomes one of PyTorch's, ``torch.ops.mambabyte.NAME``.

:func:`define` takes what a family knows (kernels by device, shapes, a check of the arguments, the
same function in torch) and tells PyTorch the rest: gradients, autocast, shapes without data, vmap
and forward-mode derivatives. So an operator is one node under torch.compile, and CUDA graphs,
checkpointing and DDP work as usual.

Gradients are registered by hand: torch.library.register_autograd does the same at 40 us more a
call. Where the native kernels have no rule, which is under torch.func's transforms, with dual
numbers and for the gradient of a gradient, the operator is its form in torch: right, and slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambabyte.errors import UserError

__all__ = ["Tensors", "constant_in_graphs", "define", "transformed", "wants_gradient"]

Tensors = tuple[Tensor, ...]
Kernel = Callable[..., tuple[Tensor | None, ...]]
Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("mambabyte", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these now."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def constant_in_graphs(function: Function) -> Function:
    """For a function of the machine, such as which kernels run here: torch.compile calls it while
    it traces and takes the result for a constant. What torch.compiler.assume_constant_result does,
    which would import the whole compiler, longer than all the rest of torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def define(
    name: str, inputs: str, results: str, *, flags: str = "", kept: str = "",
    forward: Mapping[str, Kernel], backward: Mapping[str, Kernel] | None = None,
    check: Callable[..., None], check_backward: Callable[..., None] | None = None,
    shapes: Callable[..., Tensors], backward_shapes: Callable[..., Tensors] | None = None,
    in_torch: Callable[..., Tensors], cast: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Define ``torch.ops.mambabyte.NAME`` and, with ``backward``, ``NAME_backward``; returns the
    function to call: the first, without the detour through PyTorch's dispatcher where that has
    nothing to do.

    ``inputs`` and ``flags`` are arguments as in a schema ("Tensor u, Tensor? z", "bool silu");
    ``results`` and ``kept`` names of tensors ("y, state"). With ``kept``, which is what the forward
    leaves for the backward, there is a last argument ``bool save``, and without it those are empty.

    Called are, with the tensors as they come, of any strides:

    - ``forward[device](*inputs, *flags[, save])`` -> (results, kept), once ``check(*inputs,
      *flags)`` let them pass; not for an empty first input, whose results are empty;
    - ``backward[device](*gradients of the results, *inputs, *kept, *flags)`` -> a gradient for
      each input, None for an absent one, once ``check_backward``, with the same arguments, let them
      pass. The first result's gradient is always given, the others may be None;
    - ``shapes``, as forward, and ``backward_shapes``, as backward: new empty tensors (the default
      of the latter: contiguous ones like the inputs);
    - ``in_torch(*inputs, *flags)`` -> results: the same function in torch's own operators, for
      derivatives and transforms without a kernel.

    ``cast`` names, by device, the inputs that autocast casts where the first is not float64.
    """
    tensors, result_names, kept_names = map(_names, (inputs, results, kept))
    count = len(tensors)
    operator, required = _declare(
        name, (inputs, flags, "bool save" if kept else ""), (*result_names, *kept_names))

    def with_kept(*args: Any) -> Tensors:
        """``in_torch`` with the operator's signature: it needs nothing kept."""
        found = in_torch(*(args[:-1] if kept else args))
        return (*found, *(args[0].new_empty(0) for _ in kept_names))

    def below(*args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    kernels = {device: _checked(kernel, required, check, bool(kept), shapes)
               for device, kernel in forward.items()}
    record = None
    if backward is not None:
        gradient, gradient_kernels = _define_backward(
            name, inputs, result_names, kept_names, flags, backward, check_backward,
            backward_shapes, in_torch)
        record = _recorded(count, len(result_names), bool(kept), below, gradient,
                           gradient_kernels).apply

    def above(run: Callable[..., Tensors], args: tuple[Any, ...]) -> Tensors:
        if torch.is_grad_enabled():
            for value in args[:count]:
                if isinstance(value, Tensor) and value.requires_grad:
                    return with_kept(*args) if record is None else record(run, *args)
        return run(*args)

    def autograd(*args: Any) -> Tensors:
        if transformed():
            return with_kept(*args)
        return above(kernels.get(_plain(args), below), args)

    def call(*args: Any) -> Tensors:
        kernel = None if torch.compiler.is_compiling() else kernels.get(_plain(args))
        return operator(*args) if kernel is None else above(kernel, args)

    _register(name, operator, kernels, autograd, shapes)
    for device, chosen in (cast or {}).items():
        places = [tensors.index(n) for n in chosen]
        _LIBRARY.impl(name, _autocast(operator, device, places), f"Autocast{device.upper()}")
    return call


def _checked(
    kernel: Kernel, required: list[tuple[int, str]], check: Callable[..., None], keeps: bool,
    shapes: Callable[..., Tensors],
) -> Callable[..., Any]:
    """``kernel`` behind its check; an empty first input has empty results."""

    def run(*args: Any) -> Any:
        _all_given(required, args)
        check(*(args[:-1] if keeps else args))
        return kernel(*args) if args[0].numel() else shapes(*args)

    return run


def _declare(
    name: str, arguments: Sequence[str], results: Iterable[str]
) -> tuple[Any, list[tuple[int, str]]]:
    """Make the schema known; returns the operator, and the places and names of the arguments that
    may not be None."""
    declared = ", ".join(filter(None, arguments))
    listed = ", ".join(f"Tensor {n}" for n in results)
    _LIBRARY.define(f"{name}({declared}) -> ({listed})", tags=_TAGS)
    parts = [part.split() for part in declared.split(",")]
    return (getattr(torch.ops.mambabyte, name).default,
            [(i, named) for i, (kind, named) in enumerate(parts) if kind == "Tensor"])


def _register(
    name: str, operator: Any, kernels: Mapping[str, Callable[..., Any]],
    autograd: Callable[..., Tensors], shapes: Callable[..., Tensors],
) -> None:
    """What the dispatcher calls, by device, above autograd, without data and under vmap."""
    for device, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, device.upper())
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"mambabyte::{name}", shapes, lib=_LIBRARY)
    torch.library.register_vmap(f"mambabyte::{name}", _one_by_one(operator), lib=_LIBRARY)


def _recorded(
    count: int, outputs: int, keeps: bool, below: Callable[..., Tensors], gradient: Any,
    gradient_kernels: Mapping[str, Kernel],
) -> type[torch.autograd.Function]:
    """The node of an operator in autograd's graph: ``apply(run, *arguments)`` runs ``run``, a
    checked kernel or ``below``, the dispatcher's; of the arguments ``count`` are inputs, of what
    comes back ``outputs`` are results and the rest is kept for ``gradient``."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Tensors], *args: Any) -> Tensors:
            output = run(*args)
            ctx.set_materialize_grads(False)  # no zeros for a result that is not used
            if keeps:
                ctx.mark_non_differentiable(*output[outputs:])
            ctx.save_for_backward(*args[:count], *output[outputs:])
            ctx.flags = args[count : len(args) - keeps]
            ctx.first = output[0].shape, output[0].dtype
            # Autograd gives back what passed the forward's checks; hooks may give anything.
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
            ctx.checked = run is not below and hooks is None
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            first, *others = grads[:outputs]
            if first is None:
                shape, dtype = ctx.first
                first = saved[0].new_zeros(shape, dtype=dtype)
            run = gradient
            if ctx.checked and not torch.is_grad_enabled():  # autograd has checked the gradients
                run = gradient_kernels.get(_plain((first, *others)), gradient)
            found = run(first, *others, *saved, *ctx.flags)
            needed = ctx.needs_input_grad
            wanted = zip(needed[1 : count + 1], found, strict=True)
            rest = [None] * (len(needed) - count - 1)
            return (None, *[g if n else None for n, g in wanted], *rest)

    return Recorded


def _define_backward(
    name: str, inputs: str, results: list[str], kept: list[str], flags: str,
    backward: Mapping[str, Kernel], check: Callable[..., None] | None,
    shapes: Callable[..., Tensors] | None, in_torch: Callable[..., Tensors],
) -> tuple[Any, dict[str, Kernel]]:  # fmt: skip
    """Define ``NAME_backward``; returns it, and by device what it runs once all is checked."""
    first, *others = results
    given = _names(inputs)
    count, outputs = len(given), len(results)
    operator, required = _declare(f"{name}_backward", (
        f"Tensor d{first}", *(f"Tensor? d{n}" for n in others), inputs,
        *(f"Tensor {n}" for n in kept), flags), (f"d{n}" for n in given))

    def like_inputs(*args: Any) -> Tensors:
        given = args[outputs : outputs + count]
        return tuple(args[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in given)

    def unchecked(kernel: Kernel) -> Kernel:
        def call(*args: Any) -> tuple[Tensor | None, ...]:
            return kernel(*args) if args[0].numel() else tuple(
                t.zero_() for t in like_inputs(*args))

        return call

    def checked(kernel: Kernel) -> Callable[..., Tensors]:
        def call(*args: Any) -> Tensors:
            _all_given(required, args)
            if check is not None:
                check(*args)
            return tuple(args[0].new_empty(0) if g is None else g for g in kernel(*args))

        return call

    def autograd(*args: Any) -> Tensors:
        recorded = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in args)
        if recorded or transformed():
            return _differentiable(
                in_torch, args[:outputs], args[outputs : outputs + count],
                args[outputs + count + len(kept) :])
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    kernels = {device: unchecked(kernel) for device, kernel in backward.items()}
    _register(f"{name}_backward", operator,
              {device: checked(kernel) for device, kernel in kernels.items()}, autograd,
              shapes or like_inputs)
    return operator, kernels


def _differentiable(
    in_torch: Callable[..., Tensors], upstream: tuple[Any, ...], given: tuple[Any, ...],
    flags: tuple[Any, ...],
) -> Tensors:
    """The gradient of the form in torch, of which there is a gradient."""
    with torch.enable_grad():
        mine = [None if t is None else t.view_as(t) for t in given]
        present = [t if t.requires_grad else t.requires_grad_()
                   for t in mine if t is not None and t.is_floating_point()]
        pairs = [(r, g) for r, g in zip(in_torch(*mine, *flags), upstream, strict=True)
                 if g is not None]
        gradients = iter(torch.autograd.grad(
            [r for r, _ in pairs], present, [g for _, g in pairs], create_graph=True,
            materialize_grads=True))
    return tuple(next(gradients) if t is not None and t.is_floating_point()
                 else upstream[0].new_empty(0) for t in given)


def _all_given(required: list[tuple[int, str]], args: tuple[Any, ...]) -> None:
    """PyTorch lets None pass for any tensor; native code would read from address 0."""
    for i, name in required:
        if args[i] is None:
            raise UserError(f"{name} is None: expected a tensor")


def _names(declared: str) -> list[str]:
    return [part.split()[-1] for part in declared.split(",") if part.strip()]


def transformed() -> bool:
    """Whether dual numbers or a transform of torch.func are in use, unknown to native kernels."""
    return (forward_ad._current_level >= 0
            or torch._C._functorch.peek_interpreter_stack() is not None)


def _plain(args: Iterable[Any]) -> str:
    """Type of the device where PyTorch's dispatcher, which takes as long as a short kernel, would
    find nothing to do but call that device's: no transform, mode, tracing, autocast or profiler,
    and strided tensors of one device that are no subclass and no lazy negative, conjugate or zero.
    Empty otherwise."""
    c = torch._C
    if (forward_ad._current_level >= 0 or c._functorch.peek_interpreter_stack() is not None
            or c._len_torch_dispatch_stack() or c._len_torch_function_stack()
            or c._get_tracing_state() is not None or c._is_any_autocast_enabled()
            or c._autograd._profiler_enabled()):
        return ""
    keys_of, keys, device = c._dispatch_keys, None, ""
    for value in args:
        if isinstance(value, Tensor):
            if keys is None:
                device = value.device.type
                keys = _plain_keys(device)
            if keys_of(value) != keys:
                return ""
    return device


@functools.cache
def _plain_keys(device_type: str) -> Any:
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device_type))


def _one_by_one(operator: Any) -> Callable[..., tuple[Tensors, tuple[int, ...]]]:
    """The rule of vmap: a call for each slice."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensors, Any]:
        found = [
            operator(*(a if d is None else a.select(d, i)
                       for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _autocast(operator: Any, device: str, places: list[int]) -> Callable[..., Tensors]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def call(*args: Any) -> Tensors:
        dtype = torch.get_autocast_dtype(device)
        if args[0].dtype == torch.float64:
            dtype = torch.float64
        given = list(args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            for i in places:
                given[i] = None if given[i] is None else given[i].to(dtype)
            return operator(*given)

    return call
