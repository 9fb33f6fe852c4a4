"""How the kernels of ``scan.cu`` are launched, and the tensor maps that some of them read."""

from __future__ import annotations

import ctypes
import functools

import torch

from mambabyte.ops.build.kernel import Kernel, Program, encode_tiled, places_parameters, raw_stream
from mambabyte.ops.scan.plan import BACKWARD_SHAPES, CARRY_WARPS, FORWARD_SHAPES

# Parameters as ``struct`` writes them: a call's tensors and sizes, and the gradients that come in.
PROBLEM = "10P21q"
UPSTREAM = "2P2q"
MAP = 128  # bytes of a tensor map
MAPS = f"{6 * MAP}s"


def program(name: str) -> Program:
    """The program of that kernel alone."""
    return Program.from_file("scan/scan.cu", names=(name,))


def trained(hopper: bool) -> list[str]:
    """The kernels that training launches in bf16: gated, from no state, of one document, as a plan
    may cut it; and those of the smoke preset, which has 8 states a channel."""
    flags, both = "true, true", (False, True)
    return [
        *(f"tile_forward<{flags}, {warps}, {resident}, {true(fold)}, false>"
          for warps, resident in FORWARD_SHAPES for fold in both),
        *(f"tile_backward<{flags}, {warps}, {resident}, false, {true(fold)}, {true(hopper)}, "
          "false>"
          for warps, resident in BACKWARD_SHAPES for fold in both),
        *(f"tile_carry<{true(adjoint)}, {true(adjoint)}, true, {CARRY_WARPS}, false>"
          for adjoint in both),
        "tile_sums",
        "any_forward<bf16, 8, true, FULL>", "any_backward<bf16, 8, true>", "any_sums<bf16, 8>",
    ]  # fmt: skip


@functools.cache
def _kernel(name: str, device: int, parameters: str) -> Kernel:
    return program(name).kernel(name, device, parameters)


def launch(
    device: int, name: str, parameters: str, blocks: int, threads: tuple[int, int], shared: int,
    *args: int, overlap: bool = False,
) -> None:
    """With ``overlap``, only to be used after another kernel of the same call, the launch need not
    wait for that one's end."""
    kernel = _kernel(name, device, parameters)
    kernel.allow_shared(shared)
    overlap = overlap and is_hopper(device)
    kernel.launch((blocks, 1, 1), (*threads, 1), shared, raw_stream(device), *args, overlap=overlap)


@functools.cache
def is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def takes_boxes(device: int) -> bool:
    """Whether a kernel can be given tensor maps there."""
    return is_hopper(device) and places_parameters()


@functools.lru_cache(1024)  # training comes back to the same addresses; to encode takes 10 us
def encode(
    device: int, address: int, batch: int, length: int, channels: int, by_batch: int,
    by_time: int, groups: int,
) -> bytes:  # fmt: skip
    """CUtensorMap of (batch, channels / 8, time, 8), for boxes of 1 x ``groups`` x 8 x 8; empty
    where the driver does not take it."""
    tensor_map = (ctypes.c_uint64 * 32)()
    to = (ctypes.addressof(tensor_map) + 63) // 64 * 64
    sizes = (ctypes.c_uint64 * 4)(8, length, channels // 8, batch)
    steps = (ctypes.c_uint64 * 3)(2 * by_time, 16, max(16, 2 * by_batch))
    box, ones = (ctypes.c_uint32 * 4)(8, 8, groups, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    # bf16, 4 dimensions; not interleaved, not swizzled, L2 sectors of 128 bytes, zeros outside
    taken = encode_tiled(
        device, to, 9, 4, ctypes.c_void_p(address), sizes, steps, box, ones, 0, 0, 2, 0)
    return ctypes.string_at(to, MAP) if taken else b""


def true(flag: bool) -> str:
    return "true" if flag else "false"
