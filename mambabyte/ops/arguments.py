"""What an operator is given: whether its tensors fit together, and whether autocast is on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mambabyte.errors import UserError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# torch.amp.is_autocast_available would say so, but torch 2.11's compiler cannot look into it.
_WITHOUT = ("meta",)


def check_tensors(
    name: str, x: Tensor | None, shape: tuple[int, ...] | None, dtypes: Sequence[torch.dtype],
    others: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = (),
) -> None:
    """Whether tensors fit together, before any of them reaches native code.

    ``x`` has ``shape`` (None: any) and one of ``dtypes``. Each of the ``others`` is (name, tensor,
    shape, dtype; None: any real floating one) and on the device of x; with a "?" behind its name it
    may be None. Raises UserError that names the first one that does not fit, what it is and what
    it should be.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"{name} is {_kind(x)}: expected a tensor")
    if shape is not None and x.shape != shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}: expected {tuple(shape)}")
    if x.dtype not in dtypes:
        known = ", ".join(map(str, dtypes))
        raise UserError(f"{name} is {x.dtype}: expected {known}; cast it, or use a form in torch")
    device, others = x.device, list(others)
    for each, tensor in ((name, x), *((other[0], other[1]) for other in others)):
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise UserError(f"{each} is {tensor.layout}: expected it dense, {each}.to_dense()")
    for other, tensor, wanted, dtype in others:
        if tensor is None and other[-1] == "?":
            continue
        other = other.rstrip("?")
        if not isinstance(tensor, Tensor):
            raise UserError(f"{other} is {_kind(tensor)}: expected a tensor of shape "
                            f"{tuple(wanted)}")
        if tensor.shape != wanted:
            raise UserError(f"{other} has shape {tuple(tensor.shape)}: expected {tuple(wanted)} "
                            f"beside {name} {tuple(x.shape)}")
        if tensor.device != device:
            raise UserError(f"{other} is on {tensor.device} and {name} on {device}: move it, "
                            f"{other}.to({str(device)!r})")
        if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
            real = "a real floating dtype" if dtype is None else str(dtype)
            raise UserError(f"{other} is {tensor.dtype}: expected {real} beside {name} in "
                            f"{x.dtype}")


def whole(value: object) -> bool:
    """Whether a size is a whole number, and no True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    return device.type not in _WITHOUT and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operators compute in the types of their arguments."""
    if device.type in _WITHOUT:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
