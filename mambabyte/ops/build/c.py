"""C compiled with the system's compiler on first use, cached on disk, called through ctypes.

The name in the cache hashes the source, the headers it may include, the flags, the compiler and the
processor, so that a library is never another's. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mambabyte.config.files import cache_dir

__all__ = ["FLAGS", "HEADERS", "TUNING", "load"]

HEADERS = Path(__file__).parent  # what sources may include

# no -ffast-math: it would break nan and inf
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
# the first that the compiler accepts
TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])


def load(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL | str:
    """The library made of one C source, or in one line the reason why there is none.

    Compiles it if the cache has none, which takes about a second.
    """
    if sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return "needs a 64-bit little-endian machine"
    if os.name != "posix":
        return "needs a POSIX system (threads)"
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler (looked for $CC, cc, gcc, clang)"
    directory = next((path for path in _cache_directories() if _usable(path)), None)
    if directory is None:
        return "no writable directory for the compiled library"
    try:
        stamp = (os.path.realpath(compiler), os.stat(compiler).st_size, FLAGS, TUNING, defines)
        key = hashlib.sha256(repr(stamp).encode() + _processor().encode())
        for part in (source, *sorted(HEADERS.glob("*.h"))):
            key.update(part.read_bytes())
        target = directory / f"{source.stem}-{key.hexdigest()[:24]}.so"
        if not target.exists() and (reason := _compile(compiler, source, defines, target)):
            return reason
        return ctypes.CDLL(str(target))
    except OSError as error:
        return f"cannot load the compiled library: {error}"


def _processor() -> str:
    """What the compiler's -march=native depends on."""
    words = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for key in ("model name", "flags", "Features", "CPU part"):
        words += [line for line in lines if line.startswith(key)][:1]
    return "\n".join(words)


def _cache_directories() -> list[Path]:
    """Where compiled libraries may live, in order of preference."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [cache_dir(), Path(tempfile.gettempdir()) / f"mambabyte-{user}"]


def _usable(directory: Path) -> bool:
    """Make the directory; false if we cannot write to it or somebody else owns it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "getuid") or directory.stat().st_uid == os.getuid()
        return mine and os.access(directory, os.W_OK | os.X_OK)
    except OSError:
        return False


def _compile(compiler: str, source: Path, defines: Sequence[str], target: Path) -> str:
    """Compile to ``target`` through a temporary name; returns "" or the reason of the failure."""
    reason = ""
    for tuning in TUNING:
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=target.parent)
        os.close(handle)
        command = [compiler, *FLAGS, *tuning, f"-I{HEADERS}", *defines, str(source), "-o", name,
                   "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                os.replace(name, target)  # atomic: another process sees all of it or nothing
                return ""
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            reason = (errors or done.stderr.splitlines() or ["no message"])[0].strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        finally:
            if os.path.exists(name):
                os.unlink(name)
    return f"{compiler} failed: {reason}"
