"""What the commands share: their options, their result, their device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from analysis.cli.console import one_line, say, write
from analysis.cli.parser import POSITIONAL, REPEATED, parse, subcommand
from mambabyte.config.checks import DeviceOrAuto, fit
from mambabyte.config.files import to_json
from mambabyte.errors import UserError

__all__ = ["POSITIONAL", "REPEATED", "parse", "pick_device", "print_result",
           "subcommand"]


def print_result(
    record: dict[str, Any], as_json: bool, lines: list[str],
    then: Callable[[], object] = lambda: None,
) -> None:
    """The result on stdout: the record as JSON, or lines for people. Where stdout takes no more
    the result stands on stderr, and UserError says so; not where its reader went away. ``then``
    keeps it in files: behind it, lest a full disk lose both."""
    text = to_json(record) if as_json else "\n".join(lines)
    error = write(text, sys.stdout)
    if isinstance(error, BrokenPipeError):
        error = None
    if error is not None:
        say(text)
    then()
    if error is not None:
        raise UserError(f"standard output took no more ({error.strerror}): the result stands "
                        "above, on standard error")


def cell(value: Any) -> str:
    """A value in a table: numbers in at most four digits, or all of a large one's, - for none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return one_line(str(value))


def pick_device(device: str) -> str:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    import torch

    fit(device, DeviceOrAuto, "--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: no CUDA device is available; use --device cpu")
    if device.partition(":")[2] and int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise UserError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices, "
                        "from cuda:0 on")
    if device.partition(":")[2]:
        torch.cuda.set_device(device)  # what names no device is meant for it, and no other wakes
    return device
