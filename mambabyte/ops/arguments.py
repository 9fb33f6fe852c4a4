"""What an operator is given: whether its tensors fit together, where documents begin in them, and
whether autocast is on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mambabyte.errors import UserError

T = TypeVar("T")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OLD = 255  # an age from which on nothing asks for it
# torch.amp.is_autocast_available would say so, but torch 2.11's compiler cannot look into it.
_WITHOUT = ("meta",)
_DERIVED = WeakTensorKeyDictionary()  # of ages, what was worked out of them; see once


def check_tensors(
    name: str, x: Tensor | None, shape: tuple[int, ...] | None, dtypes: Sequence[torch.dtype],
    others: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = (),
) -> None:
    """Whether tensors fit together, before any of them reaches native code.

    ``x`` has ``shape`` (None: any) and one of ``dtypes``. Each of the ``others`` is (name, tensor,
    shape, dtype; None: any of ``FLOATS``) and on the device of x; with a "?" behind its name it
    may be None. Raises UserError that names the first one that does not fit, what it is and what
    it should be.
    """
    others = list(others)
    for each, tensor in ((name, x), *((other[0], other[1]) for other in others)):
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
            kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            dense = "to_padded_tensor(0)" if tensor.is_nested else "to_dense()"
            each = each.rstrip("?")
            raise UserError(f"{each} is {kind}: expected it dense, {each}.{dense}")
    if not isinstance(x, Tensor):
        raise UserError(f"{name} is {_kind(x)}: expected a tensor")
    if shape is not None and x.shape != shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}: expected {tuple(shape)}")
    if x.dtype not in dtypes:
        known = ", ".join(map(str, dtypes))
        raise UserError(f"{name} is {x.dtype}: expected {known}; cast it, or use a form in torch")
    device = x.device
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
        if tensor.dtype != dtype and (dtype is not None or tensor.dtype not in FLOATS):
            real = "one of 16, 32 or 64 real bits" if dtype is None else str(dtype)
            raise UserError(f"{other} is {tensor.dtype}: expected {real} beside {name} in "
                            f"{x.dtype}")


class Ages(NamedTuple):
    """Says that ``steps`` (B, L) uint8 are what :func:`document_ages` makes, not a user's mask; and
    how many documents there are at most, where that is known: a row's first step counts as the
    start of one, the last column does not count."""

    steps: Tensor
    most: int | None = None


def document_ages(starts: Tensor | Sequence[int] | Ages | None, x: Tensor) -> Tensor | None:
    """How many steps each step of x (B, L, ...) is behind the start of its document, (B, L) uint8;
    255 for more, and where the document has begun before the first step. None where there is one
    document.

    ``starts`` is (B, L) bool, true at the first step of a document. For a batch of one it may be
    whole numbers that ascend, a list or of one dimension: the steps at which documents begin; the
    length itself may come last, as in cumulative lengths (``cu_seqlens``). :class:`Ages` give what
    they hold. Raises UserError for what does not fit.
    """
    if starts is None:
        return None
    (batch, length), device = x.shape[:2], x.device
    if isinstance(starts, Ages):
        return starts.steps
    if not isinstance(starts, Tensor):
        try:
            starts = torch.tensor(starts, device=device)
        except (TypeError, ValueError, RuntimeError):  # torch's of what is no rectangle of numbers
            raise UserError(f"document_starts is {starts!r:.60}: expected bool of shape "
                            f"{(batch, length)}, or whole numbers for a batch of one") from None
        starts = starts.long() if starts.shape == (0,) else starts
    check_tensors("document_starts", starts, None, (starts.dtype,))
    shape = tuple(starts.shape)
    if starts.dtype == torch.bool and shape != (batch, length):
        raise UserError(f"document_starts has shape {shape}: expected {(batch, length)}")
    if starts.device != device:
        raise UserError(f"document_starts is on {starts.device} and the sequence on {device}: move "
                        f"it, document_starts.to({str(device)!r})")
    place = torch.arange(length, device=device)
    if starts.dtype != torch.bool:
        if starts.is_floating_point() or starts.is_complex() or starts.ndim != 1 or batch != 1:
            raise UserError(f"document_starts is {starts.dtype} of shape {shape}: expected bool of "
                            f"shape {(batch, length)}, or whole numbers for a batch of one")
        ends = torch.cat([starts.new_zeros(1), starts.long(), starts.new_full((1,), length)])
        if bool((ends.diff() < 0).any()):
            raise UserError(f"document_starts must ascend from 0 or more to at most {length}, the "
                            f"length: got {_listed(starts)}")
        starts = (place[:, None] == starts).any(1)[None]
    last = torch.where(starts, place, -OLD).cummax(1).values
    return (place - last).clamp(max=OLD).to(torch.uint8)


def ages_of(
    starts: Tensor | Sequence[int] | Ages | None, ages: Tensor | None, x: Tensor
) -> Tensor | None:
    """The ages of an operator that takes either: :func:`document_ages` of ``starts``, or ``ages``
    as they are. Raises UserError for both, and for ages that are not (B, L) uint8 beside x."""
    if ages is None:
        return document_ages(starts, x)
    if starts is not None:
        raise UserError("document_starts and ages say the same: give one of them")
    check_tensors("x", x, None, (x.dtype,), (("ages", ages, tuple(x.shape[:2]), torch.uint8),))
    return ages


def check_flag(name: str, value: object) -> None:
    """Raise UserError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_kind(value)}: expected True or False")


def once(ages: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """What ``make()`` gives, the first time that it is asked for by that name: layers that get
    the same ages, which nobody changes, share it."""
    derived = _DERIVED.setdefault(ages, {})
    if name not in derived:
        derived[name] = make()
    found: T = derived[name]
    return found


def cumulative_lengths(ages: Tensor) -> Tensor | None:
    """Where documents begin in ages (B, L), row behind row, and then B L: (n + 1,) int32, as
    kernels for sequences of many lengths take them (``cu_seqlens``).

    A row's first step is the start of one. n is how many there are at most, of :class:`Ages`; where
    there are fewer, empty ones stand at the end. None where that is not known: to count them would
    wait for the device, and in a CUDA graph cannot be done. Found once for the same ages.
    """
    most: int | None = once(ages, "most", lambda: None)
    if most is None:
        return None

    def found(most: int = most) -> Tensor:
        starts = ages == 0
        starts[:, 0] = True
        numbers = torch.arange(1, most + 2, device=ages.device)
        return torch.searchsorted(starts.flatten().cumsum(0), numbers, out_int32=True)

    return once(ages, "lengths", found)


def _listed(numbers: Tensor) -> str:
    return f"{numbers[:8].tolist()}{' and so on' if len(numbers) > 8 else ''}"


def whole(value: object) -> bool:
    """Whether a size is a whole number, and no True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def address(x: Tensor | None) -> int:
    """Where the numbers of a tensor begin, for native code; None is a null pointer."""
    return 0 if x is None else x.data_ptr()


def chosen_form(operator: str, form: str, forms: Iterable[str], length: int) -> str:
    """``form``, or what "auto" stands for: "fused", and for a single step "recurrent". UserError
    where the ``operator`` has no such form."""
    if form not in ("auto", *forms):
        raise UserError(f"{operator} form {form!r} is unknown: choose auto, {', '.join(forms)}")
    if form == "auto":
        return "recurrent" if length == 1 else "fused"
    return form


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What to compute in: float32, or float64 where any of the tensors is."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise UserError for what is no chunk size; None, a form's own, is one."""
    if chunk_size is not None and (not whole(chunk_size) or chunk_size < 1):
        raise UserError(f"chunk_size is {chunk_size}: it must be a whole number, at least 1")


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
