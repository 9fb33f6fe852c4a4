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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mambabyte.config.files import cache_dir, scratch_dir
from mambabyte.ops.build import store

__all__ = ["FLAGS", "HEADERS", "TUNING", "load"]

HEADERS = Path(__file__).parent  # what sources may include

# no -ffast-math: it would break nan and inf
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
PATIENCE_SECONDS = 120  # for all that a compiler is asked about one source
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
    directory = next((path for path in _cache_directories() if store.usable(path)), None)
    if directory is None:
        return "no writable directory for the compiled library"
    try:
        stamp = (os.path.realpath(compiler), os.stat(compiler).st_size, FLAGS, TUNING, defines)
        key = hashlib.sha256(repr(stamp).encode() + _processor().encode())
        for part in (source, *sorted(HEADERS.glob("*.h"))):
            key.update(part.read_bytes())
        made_from = f"{source.stem}-{key.hexdigest()[:24]}"
        if found := store.find(directory, made_from, ".so"):
            return ctypes.CDLL(str(found[0]))
        return ctypes.CDLL(str(store.keep(
            directory, made_from, lambda path: _compile(compiler, source, defines, path), ".so")))
    except CompilerError as error:
        return str(error)
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


class CompilerError(Exception):
    """Why there is no library, in one line."""


_hanging: set[str] = set()  # compilers that have been waited for once


def _compile(compiler: str, source: Path, defines: Sequence[str], target: Path) -> None:
    """Compile to ``target``; CompilerError with the reason of a failure."""
    reason, end = "", time.monotonic() + PATIENCE_SECONDS
    for tuning in () if compiler in _hanging else TUNING:
        command = [compiler, *FLAGS, *tuning, f"-I{HEADERS}", *defines, str(source),
                   "-o", str(target), "-lm"]
        with scratch_dir() as scratch:  # where the compiler keeps its own files
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
                env={**os.environ, "TMPDIR": str(scratch)})
            try:
                _, said = process.communicate(timeout=max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _hanging.add(compiler)
                break
            finally:
                if process.poll() is None:  # with the processes that it has started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        if process.returncode == 0:
            return
        # (A linker says why, "final link failed: No space left", before the line of its driver.)
        errors = [line for line in said.splitlines() if "error" in line or "failed" in line]
        reason = (errors or said.splitlines() or ["no message"])[0].strip()
    if compiler in _hanging:
        reason = f"it gave no answer in {PATIENCE_SECONDS} seconds and is not asked again"
    raise CompilerError(f"{compiler} failed: {reason}")
