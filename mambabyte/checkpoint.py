"""Checkpoints: safetensors for numbers, JSON for the rest, written whole or not at all.

manifest.json has the SHA-256 of each file, the run and the step. It makes a folder one of ours,
which a run goes on from and removes when it is old, and is checked whenever a file is read. One
without, made before or elsewhere, is read with a word of warning and never removed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.checks import from_plain, path_of
from mambabyte.config.files import (
    MANIFEST,
    damaged,
    read_manifest,
    temporary_dir,
    whole_dir,
    write_json,
    write_manifest,
)
from mambabyte.config.public import is_public
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, distributed
from mambabyte.model.mixer import in_float32
from mambabyte.model.pretrained import INDEX, WEIGHTS

_LOG = logging.getLogger(__name__)
_OTHER = ("the file is missing, truncated or damaged; use another checkpoint, or delete this one "
          "to resume from the one before")
MOST_OF_BYTES = 512  # symbols of a model of bytes, with some special ones and padding
_NAME = re.compile(r"step_\d{8,}")
_FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "progress.json")


class Stateful(Protocol):
    """What a checkpoint asks of an optimizer, of torch's or ours."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any]) -> Any: ...


def load_model(path: Path | str, device: str = "cpu") -> ByteLM:
    """The model of a checkpoint folder, or of the newest checkpoint in a run folder; or of a public
    one of Mamba or Mamba-2 (``ByteLM.from_pretrained``).

    Raises UserError when there is none, when it is truncated, or when its tensors do not have
    the shapes its configuration says.
    """
    folder = find_checkpoint(path)
    ours = (folder / MANIFEST).exists()
    if not ours and is_public(_load_object(folder / "config.json")):
        model = ByteLM.from_pretrained(folder, device)
        if model.config.vocab_size > MOST_OF_BYTES:
            _LOG.warning("note: %s is a model of %d symbols of a tokenizer: bytes are read as its "
                         "first 256, which is not what it was trained on", folder,
                         model.config.vocab_size)
        return model
    config = load_config(folder)
    model = in_float32(lambda: ByteLM(config)).to(device)
    load_weights(model, folder)
    _verify(folder, "config.json", "model.safetensors")
    return model


def find_checkpoint(path: Path | str) -> Path:
    """``path`` itself if it is a checkpoint, else the newest one in its checkpoints folder."""
    path = path_of(path, "the checkpoint")
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return path
    found = saved(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: expected model.safetensors, or a run folder "
                        "with checkpoints/step_*")
    return found[-1]


def saved(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first.

    Only folders of our own naming with all of our files, and of this run and step where they say
    of which they are: not what a user put beside them, a copy of another run's or one renamed.
    OSError where the folder cannot be read: a run that has some must not begin anew.
    """
    folder = run / "checkpoints"
    return sorted(p for p in (folder.iterdir() if folder.is_dir() else ())
                  if _NAME.fullmatch(p.name) and all((p / name).is_file() for name in _FILES)
                  and _belongs(p, run_id(run)))


def run_id(run: Path) -> str | None:
    """What tells a run from others, drawn when it was started; None where it is not said."""
    path = run / "provenance.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return said.get("run")
    except (OSError, ValueError, AttributeError):
        return None


def run_of(folder: Path) -> str | None:
    """The run that wrote a checkpoint; None where it does not say, or is damaged."""
    try:
        return (read_manifest(folder) or {}).get("run")
    except ValueError:
        return None


def _belongs(folder: Path, run: str | None) -> bool:
    try:
        manifest = read_manifest(folder)
    except ValueError:  # a damaged manifest: loading says which file and why
        return True
    return manifest is None or (run in (None, manifest.get("run"))
                                and manifest.get("step") == int(folder.name.removeprefix("step_")))


def load_config(folder: Path) -> ModelConfig:
    """The model configuration of a checkpoint; UserError for a file that does not hold one."""
    path = folder / "config.json"
    values = _load_object(path)
    try:
        return from_plain(ModelConfig, values, str(path))
    except UserError as error:
        raise UserError(f"{error}; use another checkpoint") from None


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of ``folder`` into ``model``; UserError names what does not fit."""
    tensors = _load_tensors(folder / "model.safetensors")
    own = model.state_dict()
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise UserError(f"{folder} is a checkpoint of another model: it differs in {len(odd)} "
                        f"tensors, the first {odd[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{folder} is a checkpoint of another shape: {name} is "
                            f"{tuple(tensor.shape)} there, expected {tuple(own[name].shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{folder} has {name} in {tensor.dtype}, expected {own[name].dtype}: "
                            f"{_other(folder)}")
        if not tensor.isfinite().all():
            raise UserError(f"{folder} has nan or inf in {name}: {_other(folder)}")
    model.load_state_dict({n: distributed.like(t, own[n]) for n, t in tensors.items()})


def save_training(
    folder: Path, model: ByteLM, optimizer: Stateful, progress: dict[str, Any]
) -> Path:
    """Write everything a resumed run needs to ``folder``/step_XXXXXXXX; returns that path.

    Of several processes all must call it, since a sharded tensor is gathered from them; the first
    one writes.
    """
    target = folder / f"step_{progress['step']:08d}"
    weights = _contiguous(model.state_dict())
    state = _contiguous({
        f"{index}.{key}": (tensor if isinstance(tensor, Tensor) else
                            torch.tensor(tensor, device="cpu"))
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()})
    if not distributed.current().first:
        return target
    with whole_dir(target) as temporary:
        write_json(temporary / "config.json", asdict(model.config))
        save_file(weights, temporary / "model.safetensors")
        save_file(state, temporary / "optimizer.safetensors")
        write_json(temporary / "progress.json", progress)
        write_manifest(temporary, run=run_id(folder.parent), step=progress["step"])
    return target


def load_training(
    folder: Path, model: ByteLM, optimizer: Stateful
) -> dict[str, Any]:
    """Restore model and optimizer from a checkpoint folder; returns its progress record."""
    saved, given = asdict(load_config(folder)), asdict(model.config)
    changed = [f"{k} {saved[k]!r}, now {given[k]!r}" for k in given if saved[k] != given[k]]
    if changed:
        raise UserError(f"{folder} was trained with another model configuration "
                        f"({'; '.join(changed[:3])}{'; ...' if len(changed) > 3 else ''}): resume "
                        "with the same preset and options, or choose another run folder")
    load_weights(model, folder)
    progress = _load_progress(folder)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = _load_state(folder, optimizer, progress["step"])
    _verify(folder, *_FILES)
    for number, values in state.items():
        state[number] = {k: distributed.like(t, parameters[number]) for k, t in values.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for group in optimizer.param_groups:
        if "done" in group:  # steps, which a momentum that warms up goes by
            group["done"].fill_(progress["step"])
    return progress


def _load_progress(folder: Path) -> dict[str, Any]:
    """progress.json; UserError that names what is not as a training writes it."""
    path = folder / "progress.json"
    progress = _load_object(path)

    def number(key: str) -> bool:
        value: Any = progress.get(key)
        return type(value) in (int, float) and 0 <= value < math.inf

    recipe = progress.get("train")
    wrong = [key for key, right in {
        "step": type(progress.get("step")) is int and number("step"),
        "seconds": number("seconds"),
        "joules": progress.get("joules") is None or number("joules"),
        "train": isinstance(recipe, dict),
    }.items() if not right]
    if not wrong and isinstance(recipe, dict):
        last = recipe.get("n_steps")
        wrong = ["step"] * (type(last) is int and progress["step"] > last)
    if wrong:
        raise UserError(f"{path} does not say {', '.join(wrong)} as it should: {_other(folder)}")
    return progress


def _load_state(
    folder: Path, optimizer: Stateful, step: int
) -> dict[int, dict[str, Tensor]]:
    """What the optimizer knows of each parameter, by number; UserError for what does not fit."""
    path = folder / "optimizer.safetensors"
    parameters = [(p, group.get("muon")) for group in optimizer.param_groups
                  for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for name, tensor in _load_tensors(path).items():
            index, _, key = name.partition(".")
            own = parameters[int(index)][0] if key != "step" else torch.zeros(
                (), dtype=torch.float32, device="cpu")
            shape, dtype = own.shape, own.dtype
            if tensor.shape != shape or tensor.dtype != dtype:
                raise UserError(f"{path} has {name} as {tensor.dtype} {tuple(tensor.shape)}, "
                                f"expected {dtype} {tuple(shape)}: {_other(folder)}")
            if key == "step" and int(tensor) != step:
                raise UserError(f"{path} has {float(tensor)} in {name}, expected the step of the "
                                f"training, {step}: {_other(folder)}")
            state.setdefault(int(index), {})[key] = tensor
    except (ValueError, IndexError, OverflowError):  # no number, none of a parameter, nan or inf
        raise UserError(f"{path} is not the state of this model's optimizer (it has {name}): "
                        f"{_other(folder)}") from None
    expected = {number: {"momentum"} if muon else {"step", "exp_avg", "exp_avg_sq"}
                for number, (_, muon) in enumerate(parameters) if step}
    if {number: set(keys) for number, keys in state.items()} != expected:
        raise UserError(f"{path} lacks a part of the state of {len(expected)} parameters or has "
                        f"another optimizer's: {_other(folder)}")
    return state


def _verify(folder: Path, *names: str) -> None:
    """UserError where a file is not as it was written; a warning where nobody can know."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}: {_other(folder)}") from None
    if manifest is None:
        _LOG.warning("note: %s has no checksums (made before there were any, or elsewhere): damage "
                     "to it cannot be told", folder)
        return
    wrong = damaged(folder, {name: manifest["sha256"].get(name, "") for name in names})
    if wrong:
        raise UserError(f"{folder / wrong[0]} is not what was written (its SHA-256 is another): "
                        f"{_other(folder)}")


def _other(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used: the last good one, if there is any."""
    def good(path: Path) -> bool:
        try:
            manifest = read_manifest(path)
        except ValueError:
            return False
        return manifest is not None and not damaged(path, manifest["sha256"])

    run = folder.parent.parent
    others = [p for p in reversed(saved(run)) if p.name < folder.name and good(p)]
    return _OTHER + (f" (the last good one is {others[0]})" if others else "")


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints in ``folder``, of those that are of its run.
    """
    mine = run_id(folder.parent)
    for old in saved(folder.parent)[:-keep]:
        if mine is None or run_of(old) != mine:
            continue
        # a kill in the middle leaves no half one, and what it leaves is known to be ours
        aside = temporary_dir(old)
        old.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _load_object(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    what = f"{path} cannot be read"
    try:
        if path.exists() and not path.is_file():  # to read a pipe would be to wait for ever
            raise ValueError("it is no file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} ({error.strerror}): {_other(path.parent)}") from None
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"{what} ({error}): {_other(path.parent)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object: "
                        f"{_other(path.parent)}")
    return values


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.exists() and not path.is_file():
            raise SafetensorError("it is no file")
        try:
            str(path).encode()
        except UnicodeEncodeError:  # safetensors takes no path that is not UTF-8
            return load(path.read_bytes())
        return load_file(path)
    except (OSError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({first}): {_other(path.parent)}") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that can be written. Sharded ones are gathered one by one, and kept by the first
    process alone, in its host's memory."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = distributed.whole(tensor.detach())
        if not distributed.is_sharded(tensor):
            kept[name] = full.contiguous()
        elif distributed.current().first:
            kept[name] = full.cpu().contiguous()
    return kept
