"""metrics.jsonl: one record a logged step, written as training goes on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mambabyte.config.files import whole_file

_NUMBERS = {word: float(word) for word in ("nan", "inf", "-inf")}  # as JSON has them here
_OLD_NAMES = {"headroom": "exponent"}  # of runs from before a metric had its present name


@dataclass(frozen=True)
class Progress:
    """What is shown and logged while training."""

    step: int
    n_steps: int
    loss: float  # nats per byte
    bits_per_byte: float
    grad_norm: float
    lr: float
    bytes_per_second: float
    seconds: float
    bytes_seen: int
    exponent: float | None  # max |log-decay cumulated over 32 steps|; None without SSM layers
    joules: float | None  # None when not measured


def read_metrics(path: Path) -> list[Progress]:
    """The records of a metrics.jsonl, of old runs too; what a kill cut off is left out."""
    names = {f.name for f in fields(Progress)}
    found = []
    for _, record in _records(path):
        record = {_OLD_NAMES.get(name, name): _NUMBERS.get(str(value), value)
                  for name, value in record.items()}
        if record.keys() == names:
            found.append(Progress(**record))
    return found


def drop_after(path: Path, step: int) -> None:
    """Forget records of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = [line for line, record in _records(path) if record.get("step", math.inf) <= step]
    with whole_file(path) as temporary:  # a kill here loses no record
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line cut off by a kill
            continue
        if isinstance(record, dict):
            found.append((line, record))
    return found
