"""Whether a device has room for a model in ``hybrid.cu``, and what a launch of it takes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.ops.build.kernel import Kernel, multiprocessors
from mambabyte.ops.build.nvrtc import NvrtcError
from mambabyte.ops.stream.cuda import shared_limit
from mambabyte.ops.stream.grid.memory import Exchange
from mambabyte.ops.stream.grid.packing import Packed, pack
from mambabyte.ops.stream.grid.sizes import Built, program
from mambabyte.ops.stream.grid.tiles import schedule

# The fields of `Launch` in hybrid.cu, in its order, by letters of ``struct``.
LAUNCH = {
    **dict.fromkeys((
        "packets", "resident", "tiles", "schedule", "embedding", "best", "kinds", "final_norm",
        "tokens", "inputs", "hints", "first", "state_in", "state_out", "cache", "rotary", "drawn",
        "log_probs", "hidden", "done", "past", "trail", "passes", "orders"), "P"),
    "seed": "Q", "position": "Q", "exchange": "I", "slots": "i", "begin": "i", "stored": "i",
    "ticket": "I", "streams": "i", "steps": "i", "all": "i", "temperature": "f", "top_k": "i",
    "top_p": "f", "known": "i", "patience": "i",
}  # fmt: skip
PARAMETERS = "".join(LAUNCH.values()) + "0P"  # as long as the structure
WIDTHS = (128, 64, 32, 16, 8)  # blocks, each alone on a multiprocessor, best first


@functools.cache
def kernel_for(constants: tuple[tuple[str, float], ...], device: int) -> tuple[Kernel, Built]:
    """The kernel on a device, and what a launch needs to know of it."""
    built = program(constants, shared_limit(device))
    if built.space < 0:
        raise NvrtcError("the model's states and small weights take more shared memory than a "
                         "block has")
    kernel = built.program.kernel("stream_hybrid", device, PARAMETERS)
    kernel.allow_shared(built.shared_bytes)
    return kernel, built


def packed_for(
    config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float, device: int
) -> Packed:
    """The parameters, packed for as many blocks as the device runs at a time; NvrtcError where
    they do not fit."""
    blocks = next((n for n in WIDTHS if n <= multiprocessors(device)), 0)
    if not blocks:
        raise NvrtcError(f"the kernel needs {WIDTHS[-1]} multiprocessors")
    packed = pack(config, parameters, eps, tiny, blocks)
    schedule(packed.sizes, kernel_for(packed.constants, device)[1].space)
    return packed


def check_fit(
    config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float, device: int
) -> None:
    """NvrtcError where the device cannot run a model with these parameters, of which the shapes
    count."""
    shapes = {name: p.to("meta") for name, p in parameters.items()}
    packed_for(config, shapes, eps, tiny, device)


def packed_launch(**given: float) -> list[float]:
    """Values of a launch by their names in the order of LAUNCH, what is not given 0."""
    if foreign := given.keys() - LAUNCH.keys():
        raise KeyError(f"a launch of hybrid.cu has no {', '.join(sorted(foreign))}")
    return [given.get(name, 0) for name in LAUNCH]


class Loaded(NamedTuple):
    """A kernel and what each of its launches takes."""

    kernel: Kernel
    built: Built
    width: int  # bytes of a pass at most
    plan: Tensor  # where its tiles lie
    weights: dict[str, int]  # addresses, by their names in LAUNCH
    exchanges: dict[int, Exchange]  # by CUDA stream
