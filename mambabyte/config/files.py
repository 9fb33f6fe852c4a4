"""Files written whole or not at all, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mambabyte.config import owners
from mambabyte.errors import UserError


def cache_dir() -> Path:
    """Where corpora and compiled kernels are kept: $XDG_CACHE_HOME/mambabyte or ~/.cache/...

    Made for its user alone, as some of what is in it runs.
    """
    # expanduser, not Path.home(): without a home directory that raises. An empty $HOME would be /.
    home = os.path.expanduser("~") if os.environ.get("HOME") != "" else tempfile.gettempdir()
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    private_dir(Path(root) / "mambabyte")
    return Path(root) / "mambabyte"


def private_dir(path: Path) -> bool:
    """Make a folder that its user alone may enter, whatever the umask; false if that is
    impossible, or if it is somebody else's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        about = path.stat()
        if hasattr(os, "getuid") and about.st_uid != os.getuid():
            return False
        if about.st_mode & 0o777 != 0o700:
            path.chmod(0o700)
        return path.is_dir()
    except OSError:
        return False

MANIFEST = "manifest.json"

# What the machine says when it is not the program's fault: full, over quota or over the limit of a
# file's size, read-only, forbidden, too long a name, and a folder where a file should be or the
# reverse.
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                 errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}

# What a file system says that cannot be asked to wait for its disk, or not for a folder.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """UserError where ``path`` cannot be written for want of room or right."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):  # has the machine's answer in its text alone
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else None
        if code not in _NOT_WRITABLE:
            raise
        raise UserError(f"cannot write {path}: {os.strerror(code)}; nothing of it was left there. "
                        "Make room, or choose another place") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an error.

    A link stays one: what it leads to is replaced. Raises UserError where it cannot be written: a
    folder or a device of that name, a file that is to be read only, no right, no room.
    """
    check_file(path)
    path = _behind(path)
    with _writing(path):
        _tidy(path.parent)
        handle, name = tempfile.mkstemp(_suffix(), f".{path.name[:40]}.", path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _writing(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: Path, ours: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when the block ends without an error.

    If there is a folder already, what is in it stays, but for the names that are written again and
    those in ``ours``: what we are known to have made. A link to a folder stays one.
    """
    path = _behind(path)
    with _writing(path):
        there = path.exists()
    make_dir(path if there else path.parent)
    with _writing(path):
        _tidy(path.parent)
        temporary = Path(tempfile.mkdtemp(_suffix(), f".{path.name}.", path.parent))
    try:
        with _writing(path):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):  # safetensors writes for its user alone
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            put_in_place(temporary, path, ours)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps`` of plain values, paths and the scalars of numpy and torch, in strict JSON.

    JSON has no word for a number that is not finite: "nan", "inf" and "-inf" stand for them.
    """
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def temporary_dir(path: Path) -> Path:
    """The name of a folder beside ``path`` for this process to make: as those of ``whole_dir``, it
    is removed by the next one to come if this process is killed."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{_suffix()}"


def put_in_place(temporary: Path, path: Path, ours: Collection[str] = ()) -> None:
    """Rename a complete folder to ``path``, on the disk before anything there gives way to it.

    ``ours`` as in ``whole_dir``.
    """
    for other in path.iterdir() if path.is_dir() else ():
        copy = temporary / other.name
        if other.name in ours or copy.exists():
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.copytree(other, copy, symlinks=True)
        else:
            shutil.copy2(other, copy, follow_symlinks=False)
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    old = temporary.with_suffix(".old")
    if path.exists():  # aside first: whole until the new one stands in its place
        os.replace(path, old)
    os.replace(temporary, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A folder in $TMPDIR for the time of the block, with a short name for sockets to live in."""
    root = Path(tempfile.gettempdir())
    owners.remove_leftovers(root)
    folder = Path(tempfile.mkdtemp(_suffix(), ".mb.", root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _behind(path: Path) -> Path:
    """Where a link leads to, to be replaced in its place; any other path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _suffix() -> str:
    return f".{owners.tag()}.tmp"


@cache
def _tidy(folder: Path) -> None:
    owners.remove_leftovers(folder)


def _sync(path: Path) -> None:
    """Until ``path`` is on the disk, and not only in the machine's memory."""
    with suppress(PermissionError):  # nothing of ours is unreadable to us, but on odd systems
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(handle)


def write_manifest(folder: Path, **more: Any) -> None:
    """Say in manifest.json that the files of ``folder`` are ours, with the SHA-256 of each, and
    ``more``. Written last: a folder that has it is complete."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / MANIFEST, {"sha256": sums, **more})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``write_manifest`` wrote; None where there is none. ValueError if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), dict):
        raise ValueError(f"{path} has no checksums")
    return found


def made(folder: Path) -> set[str]:
    """The names in ``folder`` that its manifest says are ours, with its own."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return set()
    return set() if manifest is None else {MANIFEST, *manifest["sha256"]}


def damaged(folder: Path, sums: dict[str, str]) -> list[str]:
    """The names of ``sums`` whose file in ``folder`` is missing or has another SHA-256."""
    return [name for name, digest in sums.items()
            if not (folder / name).is_file() or sha256(folder / name) != digest]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file; UserError where it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML in UTF-8: {error}") from None


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(to_json(value, indent=2, sort_keys=True) + "\n")


def check_file(path: Path) -> None:
    """Make the folder of ``path``; UserError where a file cannot be written there. Worth asking
    before a long computation whose result goes there.

    A file that is replaced by renaming needs no right of its own, and a device is a name as any
    other to root: both are refused, as writing into them would be, or worse.
    """
    make_dir(_behind(path).parent)
    with _writing(path):
        there, folder, file = path.exists(), path.is_dir(), path.is_file()
    if there and not file:
        what = "folder" if folder else "device or a pipe"
        raise UserError(f"cannot write {path}: it is a {what}; give the name of a file")
    if there and not os.access(path, os.W_OK):
        raise UserError(f"cannot write {path}: the file there is read-only; give another name")


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
