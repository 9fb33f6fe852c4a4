"""How a model is trained: a frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mambabyte.config.checks import at_least_zero
from mambabyte.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the mamba_byte recipe."""

    context: int = 1024
    batch_size: int = 16
    n_steps: int = 4000
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    # "muon" takes the matrices inside the layers, with its own rate; AdamW takes the rest.
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    # "cosine" falls to 0 over the whole run, "stable" is flat and falls over its last part.
    schedule: Literal["cosine", "stable"] = "cosine"
    decay_fraction: float = 0.4
    # The schedule ends at n_steps or at max_seconds, whichever comes first, at a rate of 0.
    time_aware: bool = False
    # Warm-up of context and batch size, by doublings from these over that share of the steps; 0
    # starts at the full size. See mambabyte.train.schedule.
    first_context: int = 0
    first_batch_size: int = 0
    growth_fraction: float = 0.3
    grad_clip: float = 1.0
    seed: int = 0
    # Wall-clock cap of the training loop in seconds; 0 means none.
    max_seconds: float = 300.0
    # "auto" is bf16 autocast on CUDA and fp32 elsewhere; the SSM state is fp32 in either.
    # "bf16_residual" is autocast with the residual stream in bf16 as well.
    precision: Literal["auto", "fp32", "bf16", "bf16_residual"] = "auto"
    # "graph" captures the whole step as a CUDA graph, "compile" compiles the layers besides;
    # "auto" is "graph" on CUDA. "eager" is the readable definition.
    step: Literal["auto", "eager", "graph", "compile"] = "auto"
    # Over the processes of torchrun: "data" gives each the whole model, "sharded" (FSDP2) a part of
    # weights, gradients and optimizer, gathered layer by layer; its step is the eager one.
    parallel: Literal["data", "sharded"] = "data"
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    # Power in watts to subtract from a measured energy, as the task's rules do with 50 W.
    idle_watts: float = 0.0
    # Training with a scan form that is a subject of study must be asked for.
    allow_study_form: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "n_steps", "log_every", "checkpoint_every",
                     "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip", "max_seconds", "idle_watts"):
            at_least_zero(name, getattr(self, name))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: both must be in [0, 1)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must be 0 or more")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {self.warmup_fraction}: it must be in [0, 1]")
        for first, full in (("first_context", "context"), ("first_batch_size", "batch_size")):
            if not 0 <= getattr(self, first) <= getattr(self, full):
                raise UserError(f"{first} is {getattr(self, first)}: it must be 0 or up to "
                                f"{full}, {getattr(self, full)}")
        if not 0 <= self.growth_fraction < 1:
            raise UserError(f"growth_fraction is {self.growth_fraction}: it must be in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction is {self.decay_fraction}: it must be in (0, 1]")
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"muon_momentum is {self.muon_momentum}: it must be in [0, 1)")
        if self.parallel == "sharded":
            if self.optimizer != "adamw":
                raise UserError(f"optimizer {self.optimizer!r} needs whole matrices: train sharded "
                                "with adamw")
            if self.step not in ("auto", "eager"):
                raise UserError(f"step {self.step!r} cannot be sharded: train sharded with eager")
        if self.time_aware and not self.max_seconds:
            raise UserError("a time-aware schedule needs max_seconds: how long may it take?")
