"""Data parallelism over the processes that torchrun starts; one process is the case of size 1.

Every process holds the whole model, takes its share of each batch and averages the gradients with
the others, so that all make the same step: what one device makes of the whole batch, up to the
order of a sum. A model that is too large for that is sharded (FSDP2, Zhao et al. 2023,
arXiv:2304.11277): each process keeps a part of every tensor and gathers a layer when it runs. The
gradients travel as one flat tensor: models of this size gain more from one
message than from sending the last layers' while the first are computed. Files are written by the
first process.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mambabyte.config import owners
from mambabyte.config.checks import Count, CountOrNone, read
from mambabyte.errors import UserError
from mambabyte.model.sequence import SequenceGroup


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine: which GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, device: str) -> str:
        """This process's device, where all were given the same ``device``."""
        if self.size > 1 and device == "cuda":
            return f"cuda:{self.local_rank}"
        return device

    def share(self, batch: Tensor, each: int = 1) -> Tensor:
        """This process's rows of a batch, whose number must divide evenly; (B, ...). The same rows
        go to ``each`` processes, which share their length (:meth:`sequence_group`)."""
        takers = self.size // each
        if takers <= 1:
            return batch
        if len(batch) % takers:
            of = f" of {each}" if each > 1 else ""
            raise UserError(f"batch_size {len(batch)} does not divide among {takers} "
                            f"{'groups' if of else 'processes'}{of}: choose a multiple of {takers}")
        return batch.chunk(takers)[self.rank // each]

    def sequence_group(self, each: int) -> SequenceGroup | None:
        """The ``each`` neighbouring processes that share sequences with this one; None where it has
        whole ones. All processes ask together; UserError where they do not divide."""
        if each == 1:
            return None
        if self.size % each:
            raise UserError(
                f"context_parallel is {each}, of {self.size} process"
                + ("es: choose a divisor of them" if self.size > 1 else
                   f": start them with torchrun --nproc-per-node {each}"))
        return SequenceGroup(each, self.rank % each, _subgroup(each))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes; a shard already is of the mean."""
        tensors = [t for t in tensors if not is_sharded(t)]
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors,
                                                                         strict=True)])

    def agree(self, value: Any) -> Any:
        """What the first process gives, for what must be the same in all: when to stop, the
        clock."""
        if self.size == 1:
            return value
        given = [value]
        dist.broadcast_object_list(given, src=0)
        return given[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, first to last."""
        if self.size == 1:
            return [value]
        given: list[Any] = [None] * self.size
        dist.all_gather_object(given, value)
        return given

    def wait(self) -> None:
        """Until all are here, as before reading what the first has written."""
        if self.size > 1:
            dist.barrier()

    def shard(self, model: nn.Module, device: str) -> None:
        """Move this process's part of a model with ``layers`` and ``loss`` to its device, layer by
        layer; alone, all of it."""
        if self.size == 1:
            model.to(device)
            return
        # Imported where needed: it takes longer than all the rest of the package.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        # A layer's output is a view of its residual sum, which nothing changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")


@functools.cache
def _subgroup(each: int) -> Any:
    """The process group of ``each`` neighbours that this process is in; None is all processes."""
    if each == dist.get_world_size():
        return None
    return dist.new_subgroups(each)[0]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, told without importing what defines it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """The whole of a sharded tensor, another as it is. All processes must ask together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Tensor, model: Any) -> Tensor:
    """``tensor``, sharded as ``model`` is if it has that shape."""
    if not is_sharded(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def current() -> World:
    """The world that this process has joined; alone if none."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    size = read(os.environ.get("WORLD_SIZE", "1"), Count, "$WORLD_SIZE")
    if size > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            read(os.environ.get(name, ""), CountOrNone, f"$WORLD_SIZE is {size}, and ${name}")
    if size == 1:
        yield World()
        return
    mine = None
    if device.startswith("cuda"):
        mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device not in ("cuda", str(mine)):
            raise UserError(f"device {device!r}, and process {mine.index} of this machine has "
                            f"{mine}: give --device cuda, of which each takes its own")
        if mine.index >= torch.cuda.device_count():
            raise UserError(f"process {mine.index} of this machine has no CUDA device, of which "
                            f"there are {torch.cuda.device_count()}: start as many processes")
        torch.cuda.set_device(mine)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun ends those that wait for a process that failed; if it is killed, nothing does.
        owners.end_with(os.getppid())
    dist.init_process_group("gloo" if mine is None else "nccl", device_id=mine)
    try:
        yield current()
    finally:
        _subgroup.cache_clear()
        dist.destroy_process_group()
