"""Launches the kernels of this folder: one program a source and its types, blocks along x alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.library import transformed

# By source, its kernels and their parameters.
SOURCES = {
    "norm": {"norm_forward": "P" * 14 + "iiiif", "norm_backward": "P" * 25 + "iiii",
             "column_sums": "PPii"},
    "linear": {"linear_bias": "PPiii"},
    "rotary": {"rotary_forward": "PPPPPiiiiiif",
               "rotary_backward": "PqqqPqqqPqqqPPPPPPiiiiiif"},
    "activation": {"activation_forward": "PPq", "activation_backward": "PPPq"},
    "loss": {"loss_forward": "PPPPPPiif", "loss_mean": "PPi", "loss_backward": "PPPPPPPPiif"},
}
PARAMETERS = {name: found for kernels in SOURCES.values() for name, found in kernels.items()}
_SOURCE = {name: source for source, kernels in SOURCES.items() for name in kernels}


def takes(*tensors: Tensor | None) -> bool:
    """Whether these are for the kernels: on a GPU, in types that they know, and neither torch's
    compiler nor a transform of torch.func looks in, who need torch's own operators."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return all(t is None or (t.is_cuda and t.dtype in ELEMENTS) for t in tensors)


def program(name: str) -> Program:
    """The program of that kernel alone."""
    source = _SOURCE[name.partition("<")[0]]
    return Program.from_file("build/types.cu", f"fused/{source}.cu", names=(name,))


def trained() -> list[str]:
    """The kernels that training launches in bf16, for the common widths."""
    ways = ("forward", "backward")
    return [
        *(f"norm_{way}<{stream}, bfloat16, 4, {mixed}>" for way in ways
          for stream in ("float", "bfloat16") for mixed in ("false", "true")),
        "column_sums", "linear_bias<bfloat16, 4>",
        *(f"rotary_{way}<bfloat16, 4, {lanes}>" for way in ways for lanes in (4, 8, 16)),
        *(f"activation_{way}<bfloat16, 8, {kind}>" for way in ways for kind in range(3)),
        *(f"loss_{way}<bfloat16, bfloat16>" for way in ways), "loss_mean",
    ]  # fmt: skip


@functools.cache
def _kernel(name: str, device: int) -> Kernel:
    return program(name).kernel(name, device, PARAMETERS[name.partition("<")[0]])


def _launch(name: str, device: int, blocks: int, threads: int, *args: float) -> None:
    _kernel(name, device).launch(
        (blocks, 1, 1), (threads, 1, 1), 0, raw_stream(device), *args)


def launch(
    device: torch.device, name: str, types: str, blocks: int, threads: int,
    *args: Tensor | float | None,
) -> None:
    """Launch ``name<types>``, of ``types`` without arguments ``name``, on torch's stream there; a
    tensor is passed by its address, None as 0."""
    _launch(f"{name}<{types}>" if types else name, device.index, blocks, threads, *(
        0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args))


def refuse_second_derivative() -> None:
    """UserError in a backward pass that is itself recorded: what a kernel does is not, and a
    gradient that lacks it would be wrong without a word."""
    if torch.is_grad_enabled():
        raise UserError("the joined kernels have no gradient of a gradient: train with step eager "
                        "or graph for it")


def aligned(width: int, *tensors: Tensor | None) -> bool:
    """Whether ``width`` elements of each lie on a multiple of their size."""
    return all(t is None or t.data_ptr() % (width * t.element_size()) == 0 for t in tensors)
