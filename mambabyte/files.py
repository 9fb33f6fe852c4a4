"""Files written whole or not at all, and the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambabyte.errors import UserError


def cache_dir() -> Path:
    """Where corpora and compiled kernels are kept: $XDG_CACHE_HOME/mambabyte or ~/.cache/..."""
    # expanduser, not Path.home(): without a home directory that raises
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "mambabyte"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an error."""
    make_dir(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when the block ends without an error."""
    make_dir(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def make_dir(path: Path) -> None:
    """mkdir -p with a UserError where the path cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; choose another folder") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: permission denied; choose another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
