"""What takes seconds and follows from its input alone, kept in the cache between commands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mambabyte.config.files import cache_dir, private_dir, write_json
from mambabyte.errors import UserError


def kept(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """``make()``, of what JSON holds, or what it once gave for the same ``key``.

    Made anew where the cache is damaged, or another user's, who would decide what is shown; a full
    disk keeps nothing.
    """
    if not private_dir(cache_dir()):
        return make()
    path = _path(kind, key)
    found = _read(path, key)
    if found:
        return found["value"]
    value = make()
    with suppress(UserError):
        write_json(path, {"key": key, "value": value})
    return value


def lacks(kind: str, key: str) -> bool:
    """Whether the cache may hold what belongs to ``key``, and does not."""
    return private_dir(cache_dir()) and _read(_path(kind, key), key) is None


def _path(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(path: Path, key: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key and "value" in found:
            return dict(found)
    return None
