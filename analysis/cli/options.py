"""One module a command: parse the options, call the library, print the result.

``parse`` reads a dataclass from the command line with the module's docstring as its help.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import tyro

from analysis.cli.console import escaped, write
from mambabyte.config.files import to_json

T = TypeVar("T")


def parse(options: type[T], argv: list[str], command: str, about: str | None,
          default: T | None = None) -> T:
    """Options of ``mambabyte COMMAND``; prints help or a usage error and exits as tyro does."""
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        options, args=argv, prog=f"mambabyte {command}", description=about,
        **kwargs,
    )


def print_result(record: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The result on stdout: the record as JSON, or lines for people."""
    write(to_json(record) if as_json else "\n".join(lines), sys.stdout)


def cell(value: Any) -> str:
    """A value in a table: numbers in at most four digits, or all of a large one's, - for none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escaped(str(value))


def pick_device(device: str) -> str:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    import torch

    from mambabyte.errors import UserError

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: no CUDA device is available; use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"device {device!r} is unknown: use auto, cpu, cuda or cuda:1")
    return device
