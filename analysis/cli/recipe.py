"""Model, training and text of a command, from a run, a file or a preset, before its options."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.config.checks import from_plain, shown
from mambabyte.config.public import from_public, is_public
from mambabyte.errors import UserError

_PARTS = ("preset", "model", "train", "corpus", "device")


@dataclass(frozen=True)
class Recipe:
    """What options start from; each may still be given another value."""

    model: ModelConfig
    train: TrainConfig
    corpus: str | None = None
    device: str | None = None


def recipe(preset: str | None, file: str | Path | None = None) -> Recipe:
    """That of ``file``, whose missing fields are those of ``preset``; of ``preset`` without a file.

    A file is JSON or TOML and has some of "preset", "model", "train", "corpus" and "device", such
    as the config.json of a run folder, or that folder itself; or it is the configuration of a
    public Mamba or Mamba-2, which says the model alone. Raises UserError for any other.
    """
    if file is None:
        base = get_preset(preset or "mamba_byte")
        return Recipe(base.model, base.train)
    path = Path(file)
    path = path / "config.json" if path.is_dir() else path
    values = _read(path)
    if is_public(values):
        base = get_preset(preset or "mamba_byte")
        try:
            return Recipe(from_public(values), base.train)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    base = get_preset(preset or values.get("preset", "mamba_byte"))
    words = {name: values.get(name) or None for name in ("corpus", "device")}
    for name, word in words.items():
        if word is not None and not isinstance(word, str):
            raise UserError(f"{path}: {name} is {shown(word)}: expected text")

    def filled(kind: str, defaults: Any) -> dict[str, Any]:
        given = values.get(kind, {})
        if not isinstance(given, Mapping):
            raise UserError(f"{path}: {kind} is {shown(given)}: expected named values")
        return {**asdict(defaults), **given}

    return Recipe(from_plain(ModelConfig, filled("model", base.model), f"{path}: model"),
                  from_plain(TrainConfig, filled("train", base.train), f"{path}: train"), **words)


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a device, or a pipe that nobody fills
        raise UserError(f"{path} is not a file: expected JSON or TOML")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON, nor TOML named .toml ({error})") from None
    if isinstance(values, dict) and is_public(values):
        return values
    if not isinstance(values, dict) or not values.keys() <= set(_PARTS):
        raise UserError(f"{path} has {shown(list(values) if isinstance(values, dict) else values)}:"
                        f" expected some of {', '.join(_PARTS)}, as the config.json of a run has")
    return values


def option(argv: list[str], name: str) -> str | None:
    """The value of one option, read before the others because it decides their defaults."""
    found = [argv[i + 1] if arg == name and i + 1 < len(argv) else arg.partition("=")[2]
             for i, arg in enumerate(argv) if arg == name or arg.startswith(name + "=")]
    return found[-1] if found else None
