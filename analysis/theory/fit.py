"""Which training step fits which device, by how much, and what would fit instead."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from analysis.theory.kept_tensors import Autocast
from analysis.theory.step_memory import Budget, budget
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.errors import UserError

# Outside torch's allocator: the CUDA context, its libraries' handles, and fragments. An
# allowance, not a measurement.
ALLOWANCE_BYTES = 768 * 2**20
LARGEST = 2**24
DEVICES_GB = (16, 24, 40, 80, 141)


@dataclass(frozen=True)
class Fit:
    """Whether a training step fits a device, by how much, and what would fit."""

    budget: Budget
    breakdown: dict[str, int]  # bytes by category; their sum is required_bytes
    required_bytes: int
    device_memory_bytes: int | None
    fits: bool | None  # None without a device to fit
    spare_bytes: int | None  # negative: so much is missing
    largest_batch: int | None  # at the given context and micro_batches; 0 if nothing fits
    largest_context: int | None  # at the given batch size


def fit(
    model_config: ModelConfig, train_config: TrainConfig, device_memory_bytes: int | None,
    device: str = "cuda", checkpointing: bool = False,
) -> Fit:
    """Does one training step of this recipe fit, and what is the largest that does?

    Closed form: nothing is allocated. ``device`` says what "auto" means (on CUDA the fused scan
    and bf16 autocast). Raises UserError for a scan form without a closed form, or a sharded model.
    """
    if train_config.parallel == "sharded":
        raise UserError("a sharded model has no closed form: ask for --train.parallel data, which "
                        "is what a process needs of a whole one")
    autocast, parts = autocast_of(train_config, device), train_config.micro_batches

    def step_of(batch: int, context: int) -> Budget:
        return _budget(model_config, batch // parts, context, autocast, device, checkpointing,
                       train_config.optimizer, parts)

    allowance = ALLOWANCE_BYTES if device == "cuda" else 0

    def required(batch: int, context: int) -> int:
        return step_of(batch, context).peak + allowance

    batch, context = train_config.batch_size, train_config.context
    step = step_of(batch, context)
    breakdown = {
        "weights": step.weights, "gradients": step.gradients, "optimizer": step.optimizer,
        "activations": step.activations, "workspace": step.workspace,
        "libraries": step.libraries, "allowance": allowance,
    }
    total = required(batch, context)
    if device_memory_bytes is None:
        return Fit(step, breakdown, total, None, None, None, None, None)
    room = device_memory_bytes
    return Fit(
        step, breakdown, total, room, total <= room, room - total,
        parts * _largest(lambda n: required(parts * n, context) <= room),
        _largest(lambda n: required(batch, n) <= room),
    )


# Searches for several devices begin with the same steps.
_budget = functools.lru_cache(1024)(budget)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n in 1..LARGEST that fits, by bisection; 0 if none does."""
    low, high = 0, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def autocast_of(config: TrainConfig, device: str) -> Autocast:
    """What the recipe's ``precision`` means on that device."""
    if config.precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return "fp32" if config.precision == "fp32" else "bf16"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str | int) -> int:
    """'40GB' (10^9), '40GiB' (2^30) or a number of bytes, as bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"memory {text!r}: write e.g. 40GB, 40GiB or a number of bytes")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise UserError(f"memory {text!r} is nothing: write e.g. 40GB")
    return value
