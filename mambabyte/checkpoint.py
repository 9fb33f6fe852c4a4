"""Checkpoints: safetensors for numbers, JSON for the rest, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.checks import from_plain
from mambabyte.config.files import whole_dir, write_json
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, distributed

_OTHER = ("the file is missing, truncated or damaged; use another checkpoint, or delete this one "
          "to resume from the one before")
_NAME = re.compile(r"step_\d{8,}")
_FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "progress.json")
# what a resumed run needs of progress.json; "joules" may be null besides
_PROGRESS = {"step": int, "seconds": int | float, "train": dict}


def load_model(path: Path | str, device: str = "cpu") -> ByteLM:
    """The model of a checkpoint folder, or of the newest checkpoint in a run folder.

    Raises UserError when there is none, when it is truncated, or when its tensors do not have
    the shapes its configuration says.
    """
    folder = find_checkpoint(Path(path))
    model = ByteLM(load_config(folder)).to(device)
    load_weights(model, folder)
    return model


def find_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a checkpoint, else the newest one in its checkpoints folder."""
    if (path / "model.safetensors").exists():
        return path
    found = saved(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: expected model.safetensors, or a run folder "
                        "with checkpoints/step_*")
    return found[-1]


def saved(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first.

    Only folders of our own naming with all of our files: neither what a kill left half removed nor
    what a user put beside them, a copy named step_00000600.bak for one.
    """
    return sorted(p for p in (run / "checkpoints").glob("step_*")
                  if _NAME.fullmatch(p.name) and all((p / name).is_file() for name in _FILES))


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
    model.load_state_dict({n: distributed.like(t, own[n]) for n, t in tensors.items()})


def save_training(
    folder: Path, model: ByteLM, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> Path:
    """Write everything a resumed run needs to ``folder``/step_XXXXXXXX; returns that path.

    Of several processes all must call it, since a sharded tensor is gathered from them; the first
    one writes.
    """
    target = folder / f"step_{progress['step']:08d}"
    weights = _contiguous(model.state_dict())
    state = _contiguous({
        f"{index}.{key}": torch.as_tensor(tensor)
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()})
    if not distributed.current().first:
        return target
    with whole_dir(target) as temporary:
        write_json(temporary / "config.json", asdict(model.config))
        save_file(weights, temporary / "model.safetensors")
        save_file(state, temporary / "optimizer.safetensors")
        write_json(temporary / "progress.json", progress)
    return target


def load_training(
    folder: Path, model: ByteLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model and optimizer from a checkpoint folder; returns its progress record."""
    saved, given = asdict(load_config(folder)), asdict(model.config)
    changed = [f"{k} {saved[k]!r}, now {given[k]!r}" for k in given if saved[k] != given[k]]
    if changed:
        raise UserError(f"{folder} was trained with another model configuration "
                        f"({'; '.join(changed[:3])}{'; ...' if len(changed) > 3 else ''}): resume "
                        "with the same preset and options, or choose another run folder")
    load_weights(model, folder)
    path = folder / "progress.json"
    progress = _load_object(path)
    wrong = [key for key, kind in _PROGRESS.items() if not isinstance(progress.get(key), kind)]
    if wrong:
        raise UserError(f"{path} does not say {', '.join(wrong)} as it should: {_OTHER}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _load_tensors(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state.items():
        state[number] = {k: distributed.like(t, parameters[number]) for k, t in values.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints in ``folder``, of those that ``saved`` knows.
    """
    for old in saved(folder.parent)[:-keep]:
        aside = old.with_name(f".{old.name}.old.tmp")  # a kill in the middle leaves no half one
        old.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _load_object(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_OTHER}") from None
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"{path} cannot be read ({error}): {_OTHER}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object: {_OTHER}")
    return values


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({first}): {_OTHER}") from None


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
