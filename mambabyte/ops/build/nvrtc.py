"""CUDA C++ compiled at run time by NVRTC, for this machine's GPU or without one, and cached.

Nothing has to be built or installed beyond a CUDA build of torch: its wheels bring NVRTC along
(``nvidia/cu13/lib`` or ``nvidia/cuda_nvrtc/lib``), and ``pip install nvidia-cuda-nvrtc`` brings the
same library to a machine without a GPU, where :func:`compile_cubin` still works. It is called
through ctypes, so there is no binding package to keep in step with it. ``kernel.py`` loads what it
makes.

NVRTC ships no CUDA headers (no ``cuda_bf16.h``, no ``cstdint``): use built-ins and inline PTX.

Compiling without a GPU: ``compile_cubin(source, arch="sm_90", names=("scan<16>",))``.

Results are kept in ``$XDG_CACHE_HOME/mambabyte`` (or ``~/.cache/mambabyte``) under a hash of the
source, options, names, architecture and NVRTC version. A damaged or unwritable cache only costs
the compilation again.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import glob
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mambabyte.config.files import cache_dir, to_json
from mambabyte.ops.build import shipped, store

_CACHE_FORMAT = 2
_DEFAULT_OPTIONS = ("--std=c++17", "--use_fast_math", "-default-device")


class NvrtcError(RuntimeError):
    """NVRTC or the driver is missing, or refused something. ``log`` holds the compiler's output."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log
        if log:
            self.add_note(log)


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture, and the mangled name of each name asked for."""

    arch: str
    image: bytes
    lowered: dict[str, str]


# ---------------------------------------------------------------------------- finding libraries


def _nvrtc_candidates() -> Iterator[str]:
    """Paths where NVRTC may be, best first: the wheels beside torch, torch itself, the system."""
    pattern = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    folders: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    wheels = sorted(
        folder
        for root in (spec.submodule_search_locations or () if spec else ())
        for package in ("cu1[0-9]", "cuda_nvrtc")
        for sub in ("lib", "bin", "bin/x86_64")
        for folder in glob.glob(os.path.join(root, package, sub))
    )
    # The major version must be the one torch (and so, likely, the driver) speaks.
    mine = f"cu{(torch.version.cuda or '').split('.')[0]}"
    folders += sorted(wheels, key=lambda path: (mine not in Path(path).parts, "cu1" not in path))
    folders.append(os.path.join(os.path.dirname(torch.__file__), "lib"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders += [os.path.join(os.environ[variable], sub) for sub in ("lib64", "lib", "bin")]
    folders.append("/usr/local/cuda/lib64")
    for folder in folders:
        for path in sorted(glob.glob(os.path.join(folder, pattern)), reverse=True):
            if ".alt." not in path:
                yield path
    found = ctypes.util.find_library("nvrtc")
    if found:
        yield found


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    tried = []
    for path in _nvrtc_candidates():
        try:
            # NVRTC opens this one by its bare name, which only works if it is loaded already.
            for builtins in glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so*")):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(builtins)
            library = ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path}: {error}")
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise NvrtcError(
        "NVRTC (CUDA's run-time compiler) was not found: install a CUDA build of torch, or "
        "'pip install nvidia-cuda-nvrtc'",
        "\n".join(tried),
    )


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use. Raises NvrtcError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def supported_archs() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC compiles for, as 10 * major + minor."""
    library, count = _nvrtc(), ctypes.c_int()
    _check_nvrtc(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "supported archs")
    archs = (ctypes.c_int * count.value)()
    _check_nvrtc(library.nvrtcGetSupportedArchs(archs), "supported archs")
    return tuple(sorted(archs))


def nvrtc_available() -> tuple[bool, str]:
    """(True, "NVRTC 13.0") or (False, a one-line reason)."""
    try:
        major, minor = nvrtc_version()
    except NvrtcError as error:
        return False, str(error)
    return True, f"NVRTC {major}.{minor}"


def device_arch(device: int) -> str:
    """Architecture to compile for on that CUDA device: ``sm_90``, or PTX where it is too new."""
    major, minor = torch.cuda.get_device_capability(device)
    known = supported_archs()
    if 10 * major + minor in known:
        return f"sm_{10 * major + minor}"
    older = [arch for arch in known if arch < 10 * major + minor]
    if not older:
        raise NvrtcError(
            f"NVRTC {nvrtc_version()} cannot compile for compute capability {major}.{minor}; "
            f"it knows {known}: use the torch build made for this GPU"
        )
    return f"compute_{older[-1]}"


# ---------------------------------------------------------------------------------- compilation


def _check_nvrtc(status: int, what: str) -> None:
    if status:
        text = _nvrtc().nvrtcGetErrorString(status).decode()
        raise NvrtcError(f"NVRTC failed in {what}: {text}")


def compile_cubin(
    source: str,
    options: Sequence[str] = (),
    arch: str = "sm_90",
    names: Sequence[str] = (),
    *,
    filename: str = "kernel.cu",
) -> Cubin:
    """Compile CUDA C++ for ``arch``. Needs NVRTC but no GPU.

    ``arch`` is ``sm_NN`` (machine code) or ``compute_NN`` (PTX, finished by the driver);
    ``options`` come after ``--std=c++17 --use_fast_math``; ``names`` are the kernels wanted, with
    templates spelled out. Raises NvrtcError: first compiler error in its text, all in ``log``.
    """
    options = (*_DEFAULT_OPTIONS, *options)
    key = [_CACHE_FORMAT, nvrtc_version(), arch, options, sorted(names), filename, source]
    digest = hashlib.sha256(to_json(key).encode()).hexdigest()
    cubin = _read_cache(digest, arch)
    if cubin is None:
        cubin = _compile(source, options, arch, names, filename)
        _write_cache(digest, cubin)
    return cubin


def _compile(
    source: str, options: Sequence[str], arch: str, names: Sequence[str], filename: str
) -> Cubin:
    library, program = _nvrtc(), ctypes.c_void_p()
    _check_nvrtc(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), filename.encode(), 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    try:
        for name in names:
            _check_nvrtc(library.nvrtcAddNameExpression(program, name.encode()), name)
        flags = [option.encode() for option in (f"--gpu-architecture={arch}", *options)]
        status = library.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        if status:
            output = _program_bytes("nvrtcGetProgramLog", program)
            log = output.rstrip(b"\0").decode(errors="replace")
            lines = [line for line in log.splitlines() if "error" in line] or log.splitlines()
            first = lines[0] if lines else library.nvrtcGetErrorString(status).decode()
            raise NvrtcError(f"{filename} does not compile for {arch}: {first}", log)
        lowered = {}
        for name in names:
            mangled = ctypes.c_char_p()
            _check_nvrtc(
                library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)), name
            )
            lowered[name] = (mangled.value or b"").decode()
        kind = "nvrtcGetCUBIN" if arch.startswith("sm_") else "nvrtcGetPTX"
        return Cubin(arch, _program_bytes(kind, program), lowered)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _program_bytes(function: str, program: ctypes.c_void_p) -> bytes:
    """What nvrtcGet<X> returns, asked for in two calls: nvrtcGet<X>Size, then nvrtcGet<X>."""
    library, size = _nvrtc(), ctypes.c_size_t()
    _check_nvrtc(getattr(library, function + "Size")(program, ctypes.byref(size)), function)
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(getattr(library, function)(program, buffer), function)
    return buffer.raw


# ----------------------------------------------------------------------------------- disk cache


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs."""
    return cache_dir() / "cubin"


def _read_cache(digest: str, arch: str) -> Cubin | None:
    found = store.find(cache_folder(), digest)
    if found is None:
        return None
    return Cubin(arch, *shipped.unpacked(found[1]))


def _write_cache(digest: str, cubin: Cubin) -> None:
    payload = shipped.packed(cubin.image, cubin.lowered)
    folder = cache_folder()
    if store.usable(folder):
        with contextlib.suppress(OSError):
            store.keep(folder, digest, lambda path: path.write_bytes(payload))
