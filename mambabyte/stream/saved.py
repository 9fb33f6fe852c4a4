"""Streaming states in files: safetensors, with a version, the digest of the weights and a checksum.

A file holds the tensors of a state by their place in it, such as ``state.0.ssm_state``, and as
metadata its whole numbers. How they are put together is not in the file but asked of the model, so
that nothing in a file is ever run or named a type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambabyte.config.checks import path_of
from mambabyte.config.files import to_json, whole_file
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.errors import UserError
from mambabyte.stream.states import batch_of, hash_tensors, weights_digest

FORMAT, VERSION = "mambabyte streaming state", 1
_AGAIN = "; read the text again and save anew"


class Kept(NamedTuple):
    """What is kept of a stream: enough to go on without the model being asked for anything."""

    state: Any  # as the model returns it, of B texts
    log_probs: Tensor  # (B, V) float32 of the next byte, on the CPU


def save_state(path: Path | str, model: Any, kept: Kept, of: str | None = None) -> None:
    """Write a state of ``model`` to ``path``, whole or not at all.

    ``of`` is the digest that a reader must name: by default ``weights_digest(model)``. Raises
    UserError for a state that has nan or inf in it, or that has another form than the model's.
    """
    path = path_of(path, "the file of a state")
    tensors, numbers = _named(kept.state)
    tensors["log_probs"] = kept.log_probs
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    _check("the state to save", model, tensors, numbers)
    about = {"format": FORMAT, "version": str(VERSION),
             "of": of or weights_digest(model), "numbers": to_json(numbers)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {**about, "sha256": _checksum(tensors, about)})


def load_state(path: Path | str, model: Any, of: str | None = None) -> Kept:
    """What ``save_state`` wrote, on the model's device.

    Raises UserError for what is no state, is of another version or of other weights, is not what
    was written, or has other shapes, types or layers than the model's states have.
    """
    path = path_of(path, "the file of a state")
    tensors, about = _read(path)
    if about.get("version") != str(VERSION):
        raise UserError(f"{path} is a state of version {about.get('version')!r}, expected "
                        f"{VERSION}{_AGAIN}")
    expected = of or weights_digest(model)
    if about.get("of") != expected:
        raise UserError(f"{path} is a state of other weights (SHA-256 {about.get('of')!s:.12}, "
                        f"expected {expected:.12}): load the checkpoint that it was saved with"
                        f"{_AGAIN} with this one")
    sum_written = about.pop("sha256", None)
    if sum_written != _checksum(tensors, about):
        raise UserError(f"{path} is not what was written (its SHA-256 is another){_AGAIN}")
    try:
        numbers = json.loads(about.get("numbers", ""))
    except ValueError:
        numbers = None
    if not isinstance(numbers, dict):
        raise UserError(f"{path} does not say the whole numbers of its state{_AGAIN}")
    shape = _check(str(path), model, tensors, numbers)
    device = model.device
    log_probs = tensors.pop("log_probs")
    placed = {name: t.to(device) for name, t in tensors.items()} | numbers
    return Kept(_filled(shape, placed), log_probs)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if not path.is_file():  # to read a pipe would be to wait for ever
            raise SafetensorError("there is no such file, or it is none")
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise SafetensorError("its metadata name another format or none")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, UnicodeError, ValueError) as error:
        raise UserError(f"{path} is no streaming state ({str(error).splitlines()[0]}): expected a "
                        f"file written by save_state or --save-state{_AGAIN}") from None


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    total = hashlib.sha256(to_json(about, sort_keys=True).encode())
    hash_tensors(total, tensors)
    return total.hexdigest()


# ------------------------------------------------------------------------------ form of a state


def _places(state: Any, name: str = "state") -> Iterator[tuple[str, Any]]:
    """Every tensor and whole number of a state by its place."""
    if isinstance(state, list | tuple):
        for key, part in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
            yield from _places(part, f"{name}.{key}")
    elif isinstance(state, Tensor | int):
        yield name, state
    elif state is not None:
        raise UserError(f"{name} is a {type(state).__name__}: a state that is kept has tensors and "
                        "whole numbers, in tuples and lists")


def _named(state: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    places = dict(_places(state))
    return ({n: x for n, x in places.items() if isinstance(x, Tensor)},
            {n: x for n, x in places.items() if isinstance(x, int)})


def _filled(state: Any, places: dict[str, Any], name: str = "state") -> Any:
    """A state of the form of ``state`` with the tensors and numbers of ``places``."""
    if isinstance(state, list | tuple):
        parts = [_filled(part, places, f"{name}.{key}") for key, part in zip(
            getattr(state, "_fields", range(len(state))), state, strict=True)]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return places.get(name)


@torch.inference_mode()
def _first_two(model: Any) -> tuple[Tensor, Any, Any]:
    """Logits (1, 1, V), and the states of a model after one byte and after two: the axes that
    differ grow with the text, and the whole numbers that do count its bytes."""
    start = torch.tensor([[START_BYTE]], device=model.device)
    logits, one = model(start, None)
    return logits, one, model(start, one)[1]


def _check(
    what: str, model: Any, tensors: dict[str, Tensor], numbers: dict[str, int]
) -> Any:
    """A state of the model's form. UserError where tensors or numbers of ``what`` are not those
    of one."""
    logits, one, two = _first_two(model)
    (wanted, counts), (later, recounts) = _named(one), _named(two)
    expected = {**wanted, "log_probs": logits[:, 0].float()}
    later["log_probs"] = expected["log_probs"]
    if tensors.keys() != expected.keys() or numbers.keys() != counts.keys():
        odd = sorted((tensors.keys() ^ expected.keys()) | (numbers.keys() ^ counts.keys()))
        raise UserError(f"{what} is a state of another model: it differs in {len(odd)} places, the "
                        f"first {odd[0]}")
    seen = {numbers[name] for name in counts if counts[name] != recounts[name]}
    if len(seen) > 1 or any(type(n) is not int or n < 0 for n in numbers.values()):
        raise UserError(f"{what} has counts of bytes that cannot be, {sorted(map(str, seen))}: "
                        f"expected one{_AGAIN}")
    try:
        rows = batch_of(list(tensors.values()))
    except UserError as error:
        raise UserError(f"{what} is no state: {error}{_AGAIN}") from None
    for name, like in expected.items():
        tensor, most = tensors[name], max(seen, default=None)
        grows = [a != b for a, b in zip(like.shape, later[name].shape, strict=True)]
        fits = tensor.dtype == like.dtype and tensor.ndim == like.ndim and all(
            (size >= least and (most is None or size <= most)) if grow else size == least
            for size, least, grow in zip(tensor.shape[1:], like.shape[1:], grows[1:], strict=True))
        if not fits:
            shape = ["n" if grow else n for n, grow in zip(like.shape, grows, strict=True)]
            raise UserError(f"{what} has {name} as {tensor.dtype} {tuple(tensor.shape)}, expected "
                            f"{like.dtype} ({rows}, {', '.join(map(str, shape[1:]))}){_AGAIN}")
        # -inf is a log-probability of 0, and no other number of a state is infinite
        if not (tensor.isfinite() | (tensor == float("-inf")) if name == "log_probs"
                else tensor.isfinite()).all():
            raise UserError(f"{what} has nan or inf in {name}: its weights or its state have gone "
                            f"nan{_AGAIN}")
    return one
