"""Streaming states as values, of any model: copied, reordered, stacked; the digest of weights.

A state is what a byte model returns beside its logits: tensors with the batch first, whole numbers
and None, in named tuples, tuples and lists. Nothing ever writes into one, so to keep a state is to
hold it, and to roll back is to go on from it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambabyte.config.checks import shown
from mambabyte.errors import UserError
from mambabyte.ops.arguments import FLOATS

# Of a model's configuration: how it computes, not what. A state goes from one form to another.
_FORMS = {"scan_form", "scan_chunk"}


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, list | tuple):
        for part in state:
            yield from tensors_of(part)


def n_bytes(state: Any) -> int:
    """Bytes that the numbers of a state take."""
    return sum(t.numel() * t.element_size() for t in tensors_of(state))


def batch_of(state: Any) -> int:
    """How many texts a state is of; UserError where its tensors do not agree."""
    sizes = {len(t) if t.ndim else 0 for t in tensors_of(state)}
    if len(sizes) != 1:
        raise UserError(f"the tensors of a state have {sorted(sizes) or 'no'} rows: expected one "
                        "row a text in each")
    return sizes.pop()


def mapped(change: Callable[..., Tensor], *states: Any) -> Any:
    """A state of ``change(*tensors)`` for every place of states that are alike; what is no tensor
    is the first one's."""
    first = states[0]
    if isinstance(first, Tensor):
        return change(*states)
    if isinstance(first, list | tuple):
        parts = [mapped(change, *parts) for parts in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def copy(state: Any) -> Any:
    """The same numbers in memory of their own, cut off from any graph: what an engine that works
    in place is given, and what a small state takes to let go of a large batch."""
    return mapped(lambda t: t.detach().clone(memory_format=torch.contiguous_format), state)


def kept_in(layer: Any, dtype: torch.dtype) -> Any:
    """A layer's state with what passes through its projections in the model's type; states of
    recurrences stay float32."""
    wide = {"ssm_state", "memory", "position", "others"}
    return layer._replace(**{name: x.to(dtype) for name, x in layer._asdict().items()
                             if name not in wide})


def select(state: Any, rows: Tensor | Sequence[int]) -> Any:
    """The texts ``rows`` (n,) of a state, in this order: reordered, repeated or left out.

    As beam search needs it; gradients flow through. UserError for a row that is not there.
    """
    try:
        which = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # torch's own of what is no tensor
        which = torch.zeros((), dtype=torch.bool, device="cpu")
    if len(which.shape) == 1 and not len(which):
        which = which.long()
    if which.dtype in (torch.bool, *FLOATS) or which.ndim != 1 or which.is_complex():
        raise UserError(f"rows of a state are {shown(rows)}: expected whole numbers, [2, 0, 0]")
    which = which.long()
    if next(tensors_of(state), None) is None:
        return state  # before the first byte, of as many texts as there will be
    count = batch_of(state)
    if ((which < 0) | (which >= count)).any():
        raise UserError(f"rows {which.tolist()} of a state: it has {count}, from 0 on")
    return mapped(lambda t: t.index_select(0, which.to(t.device)), state)


def stack(states: Sequence[Any]) -> Any:
    """One state of all texts of ``states``, in order; UserError for states of different kinds.

    Where a layer counts the bytes seen, as attention does, all must have seen equally many.
    """
    if not isinstance(states, list | tuple) or not states:
        raise UserError(f"states to stack are {shown(states)}: expected a list of one or more")
    if len(states) == 1:
        return states[0]
    if len(kinds := {kind(state) for state in states}) > 1:
        raise UserError(f"{len(states)} states of {len(kinds)} kinds cannot be one batch: expected "
                        "states of one model, after equally many bytes where it has attention")
    return mapped(lambda *tensors: torch.cat(tensors), *states)


def split(state: Any) -> list[Any]:
    """The states of the single texts: views of what ``stack`` put together, without what a layer
    says it holds for the other rows' sake."""
    rows = range(batch_of(state))
    return [_alone(mapped(lambda t, i=i: t[i : i + 1], state)) for i in rows]


def _alone(state: Any) -> Any:
    if hasattr(state, "alone"):
        return state.alone()
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return type(state)(_alone(part) for part in state)
    return state


def can_batch(state: Any) -> bool:
    """Whether a state of one text can be made a row of a batch: we can look into all of it."""
    if isinstance(state, Tensor):
        return state.ndim > 0 and len(state) == 1
    if isinstance(state, list | tuple):
        return all(can_batch(part) for part in state)
    return state is None or isinstance(state, int)


def kind(state: Any) -> Hashable:
    """Equal for states that can be stacked: all but the number of texts and the numbers within
    tensors is."""
    if isinstance(state, Tensor):
        return state.shape[1:], state.dtype, state.device
    if isinstance(state, list | tuple):
        return tuple(kind(part) for part in state)
    return state


def hash_tensors(total: Any, tensors: dict[str, Tensor]) -> None:
    """Update a hash of hashlib by names, types, shapes and numbers."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def weights_digest(model: Any) -> str:
    """SHA-256 of what a model computes with: its parameters, buffers and configuration, but for
    the form of the scan. Two models with one digest go on from each other's states.

    A module that holds more than tensors, such as tables of an n-gram model, has a method
    ``digest() -> str`` that speaks for them. UserError for what is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} is no torch module: its weights cannot be told "
                        "from others, so its states cannot be kept in files")
    total = hashlib.sha256()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if is_dataclass(config) and not isinstance(config, type):
            said = {k: v for k, v in asdict(config).items() if k not in _FORMS}
            total.update(f"{name} {sorted(said.items())}\n".encode())
        if callable(own := getattr(module, "digest", None)):
            total.update(f"{name} {own()}\n".encode())
    hash_tensors(total, model.state_dict())
    return total.hexdigest()
