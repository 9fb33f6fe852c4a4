"""How a model is trained: a frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mambabyte.config.checks import (
    Checked,
    Count,
    CountOrNone,
    NotNegative,
    Seed,
    Share,
    above,
    at_least,
)
from mambabyte.errors import UserError

Momentum = Annotated[float, at_least(0, below=1)]


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How a model is trained; the defaults are the mamba_byte recipe."""

    context: Count = 1024
    """Bytes of a window."""
    batch_size: Count = 16
    """Windows of a step."""
    micro_batches: Count = 1
    """Equal parts of a step's windows, one after the other, whose gradients add up to those of all:
    less memory for the same step."""
    n_steps: Count = 4000
    """Steps of the whole run."""
    lr: NotNegative = 3e-4
    """Largest learning rate, of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """AdamW's decay rates of the mean gradient and of the mean square."""
    weight_decay: NotNegative = 0.1
    """Weight decay of the matrices."""
    warmup_fraction: Share = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the matrices inside the layers, with its own rate; AdamW takes the rest."""
    muon_lr: NotNegative = 0.02
    """Largest learning rate of Muon."""
    muon_weight_decay: NotNegative | None = None
    """Weight decay of Muon's matrices; none is weight_decay."""
    muon_momentum: Momentum = 0.95
    """Momentum of Muon."""
    muon_first_momentum: Momentum = 0.85
    """Momentum of Muon's first step, where it rises."""
    muon_momentum_steps: CountOrNone = 0
    """Steps over which Muon's momentum rises; 0 does not."""
    embed_lr: NotNegative | None = None
    """Largest learning rate of the embedding; none is lr."""
    head_lr: NotNegative | None = None
    """Largest learning rate of a head of its own; none is lr."""
    scalar_lr: NotNegative | None = None
    """Largest learning rate of what has one axis, biases and gains; none is lr."""
    schedule: Literal["cosine", "stable"] = "cosine"
    """cosine falls to 0 over the whole run, stable is flat and falls over its last part."""
    decay_fraction: Annotated[float, above(0, 1)] = 0.4
    """Last part of the stable schedule, in which the rate falls to 0, as a share of the steps."""
    time_aware: bool = False
    """End the schedule, at a rate of 0, at n_steps or max_seconds, whichever comes first."""
    first_context: CountOrNone = 0
    """Bytes of a window at the start, doubled until context; 0 starts at the full size."""
    first_batch_size: CountOrNone = 0
    """Windows of a step at the start, doubled until batch_size; 0 starts at the full size."""
    growth_fraction: Momentum = 0.3
    """Share of the steps over which first_context and first_batch_size grow."""
    grad_clip: NotNegative = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    seed: Seed = 0
    """Of initialisation and batches."""
    max_seconds: NotNegative = 300.0
    """Wall-clock cap of the training loop; 0 is none."""
    precision: Literal["auto", "fp32", "bf16", "bf16_residual"] = "auto"
    """auto is bf16 autocast on CUDA and fp32 elsewhere, with an SSM state of fp32 in either;
    bf16_residual is autocast with the residual stream in bf16 as well."""
    step: Literal["auto", "eager", "graph", "fused", "compile"] = "auto"
    """eager is the readable definition. graph captures the whole step as a CUDA graph; fused does
    that by kernels that join operations, and compile by compiling the layers, half a minute long.
    auto is fused on CUDA and eager elsewhere."""
    parallel: Literal["data", "sharded"] = "data"
    """Over the processes of torchrun: data gives each the whole model; sharded (FSDP2) a part of
    weights, gradients and optimizer, gathered layer by layer, with the eager step."""
    context_parallel: Count = 1
    """Processes of torchrun that share each window, a stretch of its length each; the rest of them
    are for more windows."""
    log_every: Count = 20
    """Steps between two lines of progress."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints."""
    keep_checkpoints: Count = 2
    """How many checkpoints are kept, the newest."""
    idle_watts: NotNegative = 0.0
    """Power to subtract from the measured energy of each device; the task's rules take 50 W."""
    allow_study_form: bool = False
    """Train with a scan form that is there to be measured, not to train with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for first, full in (("first_context", "context"), ("first_batch_size", "batch_size")):
            if getattr(self, first) > getattr(self, full):
                raise UserError(f"{first} is {getattr(self, first)}: expected 0, or up to {full}, "
                                f"{getattr(self, full)}")
        for size in (self.batch_size, self.first_batch_size):
            if size % self.micro_batches:
                raise UserError(f"micro_batches is {self.micro_batches}: expected a divisor of "
                                f"the batch of {size} windows")
        if self.context_parallel > 1 and self.step == "compile":
            raise UserError("step 'compile' cannot exchange what a split context needs: train with "
                            "context_parallel and step fused, graph or eager")
        if self.parallel == "sharded":
            if self.optimizer != "adamw":
                raise UserError(f"optimizer {self.optimizer!r} needs whole matrices: train sharded "
                                "with adamw")
            if self.step not in ("auto", "eager"):
                raise UserError(f"step {self.step!r} cannot be sharded: train sharded with eager")
        if self.time_aware and not self.max_seconds:
            raise UserError("time_aware ends the schedule at max_seconds, which is 0: give it the "
                            "seconds that the run may take, or set time_aware to False, "
                            "--train.no-time-aware")
