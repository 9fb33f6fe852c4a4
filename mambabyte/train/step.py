"""One optimisation step, as a strategy of the loop; the eager one is the definition.

A step draws its own batch and updates its own model: the loop says at which learning rate and
when to look. ``EagerStep`` is written to be read, and waits for the device at every step.
``mambabyte.train.captured.CapturedStep`` computes the same without waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte.config import TrainConfig
from mambabyte.corpus import documents_in, sample_starts, sample_windows
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.model import ByteLM, distributed, record_exponents
from mambabyte.ops import FORMS, default_form
from mambabyte.train.optim import Optimizer, make_optimizer, set_rates
from mambabyte.train.precision import autocast
from mambabyte.train.schedule import schedule, stage_at

Loss = Callable[..., Tensor]
# batches(step): the arguments of the loss at ``step``, which counts from 0; on the device.
Batches = Callable[[int], tuple[Tensor, ...]]


class Reading(NamedTuple):
    """What the last step computed, before it changed the weights."""

    loss: float  # nats
    grad_norm: float  # before clipping
    exponent: float | None  # max |log-decay cumulated over a chunk|; None if not measured


class Step(Protocol):
    """One optimisation step after another."""

    def __call__(self, share: float, measure: bool = False) -> None:
        """Make one step at this share of the peak learning rates; ``measure`` its exponents.

        It may raise NonFiniteError, or leave that to ``read``.
        """

    def read(self) -> Reading:
        """Wait for the last step. NonFiniteError if one since the beginning was not finite."""


class EagerStep:
    """Loss, gradients, their norm, a look at both, then the update: one operation at a time.

    ``loss(*batches(step))`` is a mean over the batch, in nats; None is ``model.loss``. ``config``
    gives the precision, the clipping, and how many equal parts the batch is split into along its
    first axis, whose gradients add up to that of the mean.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, batches: Batches, config: TrainConfig, *,
        loss: Loss | None = None, first_step: int = 0,
    ) -> None:
        self.model, self.optimizer, self.batches, self.config = model, optimizer, batches, config
        self.loss: Loss = loss or model.loss  # type: ignore[assignment]
        self.index = first_step
        self.device = next(model.parameters()).device
        self._world = distributed.current()
        self._reading = Reading(math.nan, math.nan, None)

    def __call__(self, share: float, measure: bool = False) -> None:
        set_rates(self.optimizer, share)
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.batches(self.index)
        recording: Any = record_exponents(self.model) if measure else nullcontext({})
        with recording as exponents:
            loss = self.backward(batch)
        norm = self.clip()
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            self._refuse(batch, loss_value, norm_value)
        self.update()
        self.index += 1
        self._reading = Reading(loss_value, norm_value, max(exponents.values(), default=None))

    def read(self) -> Reading:
        return self._reading

    def backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Leave the gradients in the parameters; the loss, both as means over all processes."""
        total = backward_in_parts(self.loss, batch, self.device, self.config)
        self._world.average([total, *(p.grad for p in self.model.parameters()
                                      if p.grad is not None)])
        return total

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm that ``config`` allows; their norm before that."""
        limit = self.config.grad_clip or math.inf
        norm: Tensor = distributed.whole(
            nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        return norm

    def update(self) -> None:
        """Let the optimizer change the weights."""
        self.optimizer.step()

    def _refuse(self, batch: tuple[Tensor, ...], loss: float, norm: float) -> None:
        where = self._first_not_finite(batch)
        raise NonFiniteError(
            f"step {self.index + 1}: loss {loss}, gradient norm {norm}; first not finite in "
            f"{where}. Checkpoints written before it are good. "
            f"{remedy(self.model, self.config)}", self.index)

    def _first_not_finite(self, batch: tuple[Tensor, ...]) -> str:
        """The first module whose output is not finite, else the parameter whose gradient is not."""
        bad: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if not bad and not torch.isfinite(tensor).all():
                    bad.append(f"the forward output of {name}")
            return hook

        handles = [m.register_forward_hook(watch(n)) for n, m in self.model.named_modules() if n]
        try:
            with torch.no_grad(), autocast(self.device, self.config.precision):
                self.loss(*batch)
        finally:
            for handle in handles:
                handle.remove()
        if bad:
            return bad[0]
        # Backward runs from the last layer to the first: the last bad gradient came first.
        names = [n for n, p in self.model.named_parameters()
                 if p.grad is not None and not torch.isfinite(p.grad).all()]
        return f"the gradient of {names[-1]}" if names else "the loss itself"


def backward_in_parts(
    loss: Loss, batch: tuple[Tensor, ...], device: torch.device, config: TrainConfig,
) -> Tensor:
    """Add the gradients of ``loss(*batch)``, a mean, to the parameters, in ``micro_batches`` equal
    parts of the batch; the loss, detached. UserError where the batch does not divide."""
    count = config.micro_batches
    if len(batch[0]) % count:
        raise UserError(f"micro_batches {count} does not divide the {len(batch[0])} windows of a "
                        "process: choose a divisor of them")
    losses = []
    for part in zip(*(t.chunk(count) for t in batch), strict=True):
        with autocast(device, config.precision):
            mean = loss(*part)
        share = mean / count if count > 1 else mean
        share.backward()
        losses.append(share.detach())
    return torch.stack(losses).sum() if count > 1 else losses[0]


def text_batches(
    data: np.ndarray, config: TrainConfig, device: torch.device | str,
    begins: np.ndarray | None = None,
) -> Batches:
    """This process's windows of a text, drawn from (seed, step) in the shape of the step's stage.

    Each batch is one tensor (batch, context + 1) of int64, as ``ByteLM.loss`` takes it; of
    documents that begin at ``begins`` (n,), with where they do so and the mean number of
    predictions a window, which is the whole batch's in every part of it.
    """
    world = distributed.current()

    def batch(step: int) -> tuple[Tensor, ...]:
        stage = stage_at(step, config)
        tokens = sample_windows(data, stage.context, stage.batch_size, config.seed, step)
        found: tuple[Tensor, ...] = (tokens,)
        if begins is not None:
            starts = sample_starts(len(data), stage.context, len(tokens), config.seed, step)
            first = documents_in(begins, starts, stage.context)
            mean = max(1, (~first[:, 1:]).sum()) / len(first)
            found += torch.from_numpy(first), torch.full(
                (len(first),), mean, dtype=torch.float32, device="cpu")
        return tuple(world.share(t.to(device, non_blocking=True), config.context_parallel)
                     for t in found)

    return batch


def text_step(model: ByteLM, data: np.ndarray, config: TrainConfig) -> EagerStep:
    """The eager step of a recipe on a text, with the recipe's own optimizer and windows."""
    return EagerStep(model, make_optimizer(model, config),
                     text_batches(data, config, model.device), config)


def train_step(
    model: ByteLM, optimizer: Optimizer, tokens: Tensor, config: TrainConfig, step: int,
) -> Reading:
    """One eager step on tokens (batch, context + 1) at the rate that ``config`` has at ``step``.

    Raises NonFiniteError, with the weights as they were, for a loss or gradient that is not finite.
    """
    one = EagerStep(model, optimizer, lambda _: (tokens,), config, first_step=step)
    one(schedule(step, config))
    return one.read()


def remedy(model: nn.Module, config: TrainConfig) -> str:
    """What to change after a loss that is not finite, by the scan form that computed it."""
    lower = f"lower lr, which is {config.lr:g}"
    if not isinstance(model, ByteLM) or not model.config.uses_scan_form:
        return lower
    form = model.config.scan_form
    if FORMS.get(form) and FORMS[form].study:
        return f"Scan form {form} is a subject of study ({FORMS[form].about}): train with auto"
    name = default_form(model.device) if form == "auto" else form
    return f"Scan form: {name}, which has no exponent that overflows; {lower}"
