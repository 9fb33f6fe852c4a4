"""The run folders of ``mambabyte train``, as they are on disk: read, and put side by side."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mambabyte.errors import UserError

# What a run logs, and what a curve of it is called; by the seconds of training.
CURVES = {"bits_per_byte": "training loss, bits/byte", "bytes_per_second": "speed, bytes/s",
          "lr": "learning rate (AdamW)", "grad_norm": "gradient norm (before clipping)",
          "exponent": "exponent of 32 steps, nats", "joules": "energy, J"}


_DEPTH = 2  # folders below the one that is searched


@dataclass(frozen=True)
class Training:
    """One run folder. ``result`` is empty while the run goes on, and where it was interrupted."""

    folder: Path
    model: dict[str, Any]
    train: dict[str, Any]
    provenance: dict[str, Any]
    result: dict[str, Any]
    metrics: pd.DataFrame  # a row a logged step; columns as in mambabyte.train.Progress

    @property
    def last(self) -> dict[str, Any]:
        """The last logged step; empty where none was."""
        return {} if self.metrics.empty else self.metrics.iloc[-1].to_dict()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, OSError where it may not be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_training(folder: Path) -> Training:
    """The run in ``folder``; UserError where it holds none."""
    from mambabyte.train.metrics import Progress, read_metrics

    config = read_json(folder / "config.json")
    model, train = config.get("model"), config.get("train")
    if not isinstance(model, dict) or not isinstance(train, dict):
        raise UserError(f"{folder} holds no run: expected the folder that mambabyte train --out "
                        "was given, with its config.json")
    log = folder / "metrics.jsonl"
    rows = [vars(p) for p in read_metrics(log)] if log.is_file() else []
    return Training(folder, model, train, read_json(folder / "provenance.json"),
                    read_json(folder / "result.json"),
                    pd.DataFrame(rows, columns=list(Progress.__dataclass_fields__)))


def find_trainings(root: Path) -> list[Training]:
    """Every run in ``root`` or up to two folders below it, by name. A warning says what may not be
    read."""
    found = []

    def left_out(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # no runs there yet, or removed meanwhile
            return
        warnings.warn(f"{error.filename} is left out: {error.strerror}", stacklevel=3)

    for here, folders, _ in os.walk(root, onerror=left_out, followlinks=True):
        folder, depth = Path(here), len(Path(here).relative_to(root).parts)
        if depth == _DEPTH:
            folders.clear()
        try:
            found.append((depth, folder, read_training(folder)))
        except UserError:  # no run, or another program's config.json
            continue
        except OSError as error:
            left_out(error)
    return [run for _, _, run in sorted(found, key=lambda each: each[:2])]


def summary(run: Training) -> dict[str, Any]:
    """What a list of runs says of one; None for what is not known or was not measured."""
    last, result = run.last, run.result
    seconds, seen, joules = (_number(result.get(k, last.get(k)))
                             for k in ("seconds", "bytes_seen", "joules"))
    return {
        "run": str(run.folder),
        "layers": run.model.get("layer_pattern"),
        "width": run.model.get("d_model"),
        "steps": result.get("steps", last.get("step", 0)),
        "of": run.train.get("n_steps"),
        "ended by": str(result.get("stopped_by", "not yet")) + (
            " (smoke mode)" if result.get("smoke") else ""),
        "seconds": seconds,
        "bytes/s": seen / seconds if seconds and seen else None,
        "training bits/byte": last.get("bits_per_byte"),
        "held-out bits/byte": _number(result.get("valid_bits_per_byte")),
        "joules": joules,
        "corpus": run.provenance.get("corpus"),
        "date": str(run.provenance.get("date", ""))[:16].replace("T", " "),
    }


def _number(value: Any) -> float | None:
    """A number of a file; None where it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and not pd.isna(value)
    return value if known else None


def differences(runs: Sequence[Training]) -> dict[str, list[Any]]:
    """The settings in which runs differ: name -> a value a run, None where it has no such one."""
    settings = [{f"{part}.{key}": value for part in ("model", "train")
                 for key, value in getattr(run, part).items()}
                | {f"corpus.{split}": digest for split, digest in
                   (run.provenance.get("corpus_sha256") or {}).items()}
                | {key: run.provenance.get(key) for key in ("corpus", "device", "commit")}
                for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    found = {name: [one.get(name) for one in settings] for name in names}
    return {name: values for name, values in found.items()
            if any(value != values[0] for value in values)}


def write_events(run: Training, folder: Path) -> Path:
    """The logged steps as TensorBoard event files in ``folder``; UserError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("event files need TensorBoard: pip install 'mambabyte[tensorboard]'"
                        ) from None
    began = pd.Timestamp(run.provenance.get("date") or 0).timestamp()
    with SummaryWriter(str(folder)) as writer:
        for row in run.metrics.to_dict("records"):
            for name in CURVES:
                if not pd.isna(row[name]):
                    writer.add_scalar(name, row[name], row["step"], began + row["seconds"])
        held_out = run.result.get("valid_bits_per_byte")
        if held_out is not None:
            writer.add_scalar("held_out_bits_per_byte", held_out, run.result.get("steps", 0))
    return folder
