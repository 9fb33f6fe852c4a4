"""Kernels on the GPU: the driver loads what NVRTC compiled and launches it, through ctypes.

How a kernel file uses it (``cuda.py`` with ``scan.cu`` beside it)::

    PROGRAM = Program.from_file("scan/scan.cu", names=("scan_forward<16>",), options=("-DK=8",))

    def forward(u, ...):
        kernel = PROGRAM.kernel("scan_forward<16>", u.device.index, "PPPiif")
        kernel.launch((grid_x, grid_y, 1), (128, 1, 1), shared_bytes, raw_stream(u.device.index),
                      u.data_ptr(), 0, y.data_ptr(), batch, length, scale)

- ``names`` are name expressions: ``extern "C"`` names, or templates such as ``scan<float, 16>``.
- The third argument of :meth:`Program.kernel` is the parameter list in the letters of ``struct``:
  ``P`` pointer (0 is null), ``i`` int, ``I`` unsigned, ``q`` long long, ``f`` float, ``d`` double.
  A struct parameter is written member by member. Its size is checked when the kernel is loaded.
- More than 48 KiB of shared memory, static arrays counted, is asked for once:
  ``kernel.allow_shared(dynamic bytes)``.
- ``kernel.registers``, ``kernel.local_bytes`` (spills), ``kernel.static_shared_bytes`` describe it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambabyte.ops.build import shipped
from mambabyte.ops.build.nvrtc import Cubin, NvrtcError, compile_cubin, device_arch, nvrtc_version

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_CLUSTER_TOO_LARGE = 912  # CUDA_ERROR_INVALID_CLUSTER_SIZE
_OPS = Path(__file__).parent.parent
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _driver() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise NvrtcError(f"the NVIDIA driver's library {name} cannot be loaded: {error}") from None
    integer, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *[integer] * 7, pointer, pointer, pointer]
    return library


def _check_driver(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise NvrtcError(f"CUDA driver: {what} failed with error {status}, {reason}")


def _make_context_current(device: int) -> None:
    """Make torch's (the primary) context current in a thread that has not used CUDA yet."""
    driver, context = _driver(), ctypes.c_void_p()
    handle = ctypes.c_int()
    _check_driver(driver.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check_driver(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "primary context")
    _check_driver(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _in_context(device: int, function: Callable[..., int], *args: Any) -> int:
    """The status of a driver's function; in a thread that has not used CUDA yet, torch's context is
    made current first."""
    status = function(*args)
    if status == _INVALID_CONTEXT:
        _make_context_current(device)
        status = function(*args)
    return status


def places_parameters() -> bool:
    """Whether the driver tells where a kernel's parameters lie (CUDA 12.4 and later)."""
    return hasattr(_driver(), "cuFuncGetParamInfo")


def encode_tiled(device: int, tensor_map: int, *description: Any) -> bool:
    """``cuTensorMapEncodeTiled`` into the address ``tensor_map``; whether the driver took it."""
    encode = _driver().cuTensorMapEncodeTiled
    return _in_context(device, encode, ctypes.c_void_p(tensor_map), *description) == 0


def raw_stream(device: int) -> int:
    """Handle of torch's current stream on that device, for :meth:`Kernel.launch`."""
    return _raw_stream(device)


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The public way builds a Python object for each call (several times the cost of the launch).
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@functools.cache
def multiprocessors(device: int) -> int:
    """How many the GPU of that number has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """One kernel loaded on one device, with its parameter list fixed as a ``struct`` format."""

    def __init__(self, function: ctypes.c_void_p, name: str, device: int, parameters: str) -> None:
        self.name = name
        self.device = device
        self._function = function
        # A first parameter that wants more alignment than the parameters' place in constant memory
        # has does not lie at its start.
        offset = self._parameter(0)
        parameters = f"{offset[0] if offset else 0}x{parameters}"
        self._struct = struct.Struct("@" + parameters)
        self._launch = _driver().cuLaunchKernel
        self._local = threading.local()
        self._shared = 48 * 1024 - self.static_shared_bytes
        self._check_parameters(parameters)

    def _parameter(self, index: int) -> tuple[int, int] | None:
        """Offset and size of one parameter in bytes; None beyond the last, or where the
        driver cannot tell."""
        info = getattr(_driver(), "cuFuncGetParamInfo", None)  # drivers of CUDA 12.4 and later
        if info is None:
            return None
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found = ctypes.byref(offset), ctypes.byref(size)
        failed = _in_context(self.device, info, self._function, index, *found)
        return None if failed else (offset.value, size.value)

    def _check_parameters(self, parameters: str) -> None:
        """A wrong parameter list would read past the buffer: compare its size with the cubin's."""
        total, index = 0, 0
        while (found := self._parameter(index)) is not None:
            total, index = sum(found), index + 1
        if index and total not in (self._struct.size, struct.calcsize("@" + parameters + "0P")):
            raise NvrtcError(
                f"kernel {self.name} takes {total} bytes of parameters, but the format "
                f"'{parameters}' packs {self._struct.size}"
            )

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        get = _driver().cuFuncGetAttribute
        status = _in_context(self.device, get, ctypes.byref(value), which, self._function)
        _check_driver(status, f"cuFuncGetAttribute of {self.name}")
        return value.value

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._attribute(4)

    @property
    def local_bytes(self) -> int:
        """Local memory a thread: spills and stack."""
        return self._attribute(3)

    @property
    def static_shared_bytes(self) -> int:
        return self._attribute(1)

    def allow_shared(self, shared_bytes: int) -> None:
        """Permit that much dynamic shared memory (needed once above 48 KiB with static arrays)."""
        if shared_bytes > self._shared:
            status = _driver().cuFuncSetAttribute(self._function, 8, shared_bytes)
            _check_driver(status, f"{shared_bytes} bytes of shared memory for {self.name}")
            self._shared = shared_bytes

    def allow_large_clusters(self) -> None:
        """Permit clusters of more than 8 blocks, which not every card has room for."""
        status = _driver().cuFuncSetAttribute(self._function, 14, 1)
        _check_driver(status, f"clusters of more than 8 blocks for {self.name}")

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of that many threads a multiprocessor has at a time. What they take of
        shared memory is to be allowed before."""
        count = ctypes.c_int()
        get = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
        status = _in_context(self.device, get, ctypes.byref(count), self._function, threads,
                             ctypes.c_size_t(shared_bytes))
        _check_driver(status, f"occupancy of {self.name}")
        return count.value

    def resident_clusters(self, blocks: int, threads: int, shared_bytes: int = 0) -> int:
        """How many clusters of that many blocks run on the device at a time; 0 if none can."""
        # CUlaunchConfig, with one CUlaunchAttribute: 4, the dimensions of a cluster.
        attribute = (ctypes.c_uint * 18)(4, 0, blocks, 1, 1)
        config = ctypes.create_string_buffer(struct.pack(
            "@7I4xPPI4x", blocks, 1, 1, threads, 1, 1, shared_bytes, 0,
            ctypes.addressof(attribute), 1))
        count = ctypes.c_int()
        with torch.cuda.device(self.device):
            status = _driver().cuOccupancyMaxActiveClusters(
                ctypes.byref(count), self._function, config)
        if status == _CLUSTER_TOO_LARGE:
            return 0
        _check_driver(status, f"occupancy of {self.name} in clusters of {blocks}")
        return count.value

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        *args: Any,
        overlap: bool = False,
        together: bool = False,
    ) -> None:
        """Launch on ``stream`` (see :func:`raw_stream`); the caller keeps the tensors alive.

        With ``overlap`` the kernel may start before the one launched before it has ended, and waits
        for it itself (``griddepcontrol``; only on cards that have it). With ``together`` all its
        blocks run at a time, or the launch fails (a cooperative launch).

        ``stream`` belongs to the kernel's device, which need not be torch's current one.
        """
        if _current_device() != self.device:  # the driver launches in the current context alone
            with torch.cuda.device(self.device):
                return self.launch(grid, block, shared_bytes, stream, *args, overlap=overlap,
                                   together=together)
        local = self._local
        try:
            buffer, extra = local.packed
        except AttributeError:
            # One buffer a thread: ctypes drops the interpreter's lock during the call.
            buffer = ctypes.create_string_buffer(max(self._struct.size, 1))
            size = ctypes.c_size_t(self._struct.size)
            extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
            local.packed, local.size = (buffer, extra), size
        self._struct.pack_into(buffer, 0, *args)
        function, (gx, gy, gz), (bx, by, bz) = self._function, grid, block
        if overlap or together:
            # CUlaunchConfig, with one CUlaunchAttribute: 6, programmatic stream serialization, or
            # 2, a cooperative launch.
            attribute = (ctypes.c_uint * 18)(6 if overlap else 2, 0, 1)
            config = ctypes.create_string_buffer(struct.pack(
                "@7I4xPPI4x", *grid, *block, shared_bytes, stream, ctypes.addressof(attribute), 1))
            status = _in_context(
                self.device, _driver().cuLaunchKernelEx, config, function, None, extra)
        else:
            status = _in_context(
                self.device, self._launch, function, gx, gy, gz, bx, by, bz, shared_bytes, stream,
                None, extra)
        if status:
            _check_driver(
                status, f"launch of {self.name} grid {grid} block {block} shared {shared_bytes}"
            )


class Program:
    """One source with its options and kernel names: compiled once an architecture, loaded once a
    device, both on first use and from any thread."""

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        options: Sequence[str] = (),
        *,
        filename: str = "kernel.cu",
        own: bool = False,
    ) -> None:
        """``own``: with what an architecture has and later ones lack, ``sm_90a`` for ``sm_90``."""
        self.source, self.names, self.options = source, tuple(names), tuple(options)
        self._own = own
        self.filename = filename
        self._lock = threading.Lock()
        self._kernels: dict[tuple[str, int, str], Kernel] = {}
        self._modules: dict[int, tuple[ctypes.c_void_p, dict[str, str]]] = {}

    @classmethod
    def from_file(
        cls, *filenames: str, names: Sequence[str], options: Sequence[str] = (), own: bool = False
    ) -> Program:
        """Source files of ``mambabyte/ops``, named from there, one after another."""
        texts = [
            f'#line 1 "{name}"\n' + (_OPS / name).read_text(encoding="utf-8")
            for name in filenames
        ]
        return cls("\n".join(texts), names, options, filename=filenames[-1], own=own)

    @functools.cached_property
    def digest(self) -> str:
        """What its machine code is known by, whoever compiled it."""
        return shipped.digest(self.source, self.options, self.names)

    def compile(self, arch: str) -> Cubin:
        """Machine code for ``arch``, from the disk cache where it is there. Needs no GPU."""
        if self._own and arch.startswith("sm_"):
            arch += "a"
        return compile_cubin(self.source, self.options, arch, self.names, filename=self.filename)

    def kernel(self, name: str, device: int, parameters: str) -> Kernel:
        """The kernel on that device, compiled and loaded if need be. A dict look-up otherwise."""
        kernel = self._kernels.get((name, device, parameters))
        if kernel is not None:
            return kernel
        with self._lock, torch.cuda.device(device):
            if device not in self._modules:
                self._modules[device] = self._load(device)
            module, lowered = self._modules[device]
            function = ctypes.c_void_p()
            status = _driver().cuModuleGetFunction(
                ctypes.byref(function), module, lowered[name].encode()
            )
            _check_driver(status, f"finding {name} in {self.filename}")
            kernel = Kernel(function, name, device, parameters)
            return self._kernels.setdefault((name, device, parameters), kernel)

    def _load(self, device: int) -> tuple[ctypes.c_void_p, dict[str, str]]:
        torch.cuda.init()
        _make_context_current(device)
        major, minor = torch.cuda.get_device_capability(device)
        known = shipped.find(f"sm_{major}{minor}", self.digest)
        if known is not None:
            module, status = self._load_image(known[0])
            if not status:  # else the driver is older than the compiler: here there is another
                return module, known[1]
        cubin = self.compile(device_arch(device))
        module, status = self._load_image(cubin.image)
        _check_driver(
            status, f"loading {self.filename} ({cubin.arch}, NVRTC {nvrtc_version()}) on the device"
        )
        return module, cubin.lowered

    def _load_image(self, image: bytes) -> tuple[ctypes.c_void_p, int]:
        """A module of the machine code, and the driver's status."""
        driver, module = _driver(), ctypes.c_void_p()
        # Loading allocates, which would invalidate a graph capture that is under way.
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            return module, driver.cuModuleLoadData(ctypes.byref(module), image)
        finally:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
