"""Compiled code in the cache: private to its user, and bound to what it was made from.

What is loaded from here runs, so the trust boundary is the folder: it is made with mode 0700
whatever the umask, and no file in it is used that another user owns or may write. A file's name
has the hash of what it was made from (source, flags, compiler) and one of that and its content, so
that a file cut short, damaged or renamed is not used either. It is no defence against who can act
as this user, and could as well change the package.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from mambabyte.config.files import private_dir
from mambabyte.config.owners import remove_leftovers, tag


def usable(folder: Path) -> bool:
    """Make the folder; false if we cannot write to it or somebody else owns it."""
    if not private_dir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return False
    remove_leftovers(folder)
    return True


def find(folder: Path, made_from: str, suffix: str = "") -> tuple[Path, bytes] | None:
    """The file in ``folder`` of what hashes to ``made_from``, and its content; None where there is
    none that can be trusted."""
    if not private_dir(folder):
        return None
    for path in folder.glob(f"{made_from}-*{suffix}"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe: no wait
            with os.fdopen(handle, "rb") as file:
                about = os.fstat(handle)
                if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() \
                        and not about.st_mode & 0o022:
                    content = file.read()
                    if path.name == _name(made_from, content, suffix):
                        return path, content
            path.unlink()
        except OSError:
            continue
    return None


def keep(
    folder: Path, made_from: str, write: Callable[[Path], object], suffix: str = ""
) -> Path:
    """Put the file that ``write`` makes at the path it is given into ``folder``; OSError where
    that fails, and whatever ``write`` raises."""
    handle, name = tempfile.mkstemp(f".{tag()}.tmp", ".made.", folder)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o700)
        path = folder / _name(made_from, temporary.read_bytes(), suffix)
        os.replace(temporary, path)  # atomic: another process sees all of it or nothing
        return path
    finally:
        temporary.unlink(missing_ok=True)


def _name(made_from: str, content: bytes, suffix: str) -> str:
    return f"{made_from}-{hashlib.sha256(made_from.encode() + content).hexdigest()[:32]}{suffix}"
