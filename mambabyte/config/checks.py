"""Checks that several configurations share."""

from __future__ import annotations

import math

from mambabyte.errors import UserError


def at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}: it must be a finite number, 0 or more")
