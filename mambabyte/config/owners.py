"""Which process a file belongs to, said in its name, and what follows from that.

A *tag* is PLACE-PID-STARTED: a digest of the machine since it was started (and of the container),
the process, and when that was started. So a process id that is used again is not mistaken for the
one before, and no kill can come between making a file and saying whose it is. Leftovers are
removed, and a lock is free, when the process of their tag has ended, and at no other time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mambabyte.errors import UserError

BEAT_SECONDS = 5.0  # between two signs of life of a lock's holder
_TAG = r"[0-9a-f]{8}-\d+-\d+"
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.[A-Za-z0-9_]{{8}}\.(?P<tag>{_TAG})\.(?P<kind>tmp|old)",
                       re.DOTALL)


def tag() -> str:
    """That of this process; another one in each child that it forks."""
    return f"{_place()}-{os.getpid()}-{_started(os.getpid()) or 0}"


def ended(owner: str) -> bool | None:
    """Whether the process of that tag has ended; None where this machine cannot know."""
    place, pid, started = owner.split("-")
    if place != _place():
        return None
    if (now := _started(int(pid))) is not None:
        return now != int(started)
    try:  # it has ended, or is hidden from us, or nothing says when processes were started
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which is alive
        pass
    return False


@cache
def _place() -> str:
    """The machine since it was started, and the container: where a process id means the same."""
    words = [platform.node()]
    with contextlib.suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        words.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; -1 if it has ended and its parent
    has not asked how; None where the system does not say."""
    try:
        # The second field is the command in parentheses, and may have any byte in it.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in ``folder``, of this user and with a tag.

    A folder that such a process had set aside, to put a new one in its place, is put back.
    """
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if not found or not ended(found["tag"]) or path.lstat().st_uid != _user():
                continue
            if found["kind"] == "old" and not (folder / found["name"]).exists():
                path.rename(folder / found["name"])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """One process at a time in this block; UserError says that another does ``what``.

    Each who wants the lock makes the empty file ``lock``.TAG, and has it if no other such file is
    of a process that lives. No file system has to know of locks, and what a killed process left
    is nobody's: it is removed. A holder on another machine, which nobody here can ask, shows that
    it lives by touching its file; who meets one waits for three of these signs.
    """
    for attempt in range(6):
        mine = lock.with_name(f"{lock.name}.{tag()}")
        try:
            os.close(os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            raise _taken(lock, what, mine) from None
        except OSError as error:
            raise UserError(f"cannot write to {lock.parent}: {os.strerror(error.errno or 0)}; "
                            "choose another folder") from None
        done = threading.Event()
        threading.Thread(target=_beat, args=(mine, done), daemon=True).start()
        try:
            other = _holder(lock, mine)
            if other is None:
                yield
                return
            if attempt == 5:
                raise _taken(lock, what, other)
        finally:
            done.set()
            mine.unlink(missing_ok=True)
        # Two that come at once see each other: both step back, and come again at random times.
        time.sleep(random.uniform(0.0, 0.2))


def _taken(lock: Path, what: str, other: Path) -> UserError:
    number = other.name.split("-")[-2]
    return UserError(f"another process ({number}) {what} in {lock.parent}: wait for it, end it, or "
                     "choose another folder")


def _holder(lock: Path, mine: Path) -> Path | None:
    """The file of another process that has the lock; those of ended ones are removed."""
    pattern = re.compile(rf"{re.escape(lock.name)}\.({_TAG})")
    for path in list(lock.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if not found or path == mine:
            continue
        over = ended(found[1])
        if over or (over is None and not _beats(path)):
            with contextlib.suppress(OSError):  # another user's, who may clear it away
                path.unlink(missing_ok=True)
        else:
            return path
    return None


def _beat(mine: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(mine)


def _beats(path: Path) -> bool:
    """Whether the file is touched while one waits for three signs of life."""
    def touched() -> float | None:
        try:
            with path.open("rb") as file:  # opened: a network file system then asks its server
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    before = touched()
    for _ in range(6):
        time.sleep(BEAT_SECONDS / 2)
        if (now := touched()) != before:
            return now is not None
    return False


def end_with(parent: int) -> None:
    """End this process within seconds of its parent, first by SIGTERM and then by SIGKILL.

    ``parent`` is the parent's id where that is known from itself: it may have ended by now.
    """
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
