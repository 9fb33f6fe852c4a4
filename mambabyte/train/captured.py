"""A training step without gaps between launches: text on the device, the whole step one CUDA graph.

``step.EagerStep`` is the definition: this computes the same, from the same windows of the text.
What differs is where things are. The text is a tensor on the device; the starts of all windows of
the run are drawn beforehand, from the same stream of random numbers, and an index on the device
says which step it is; the learning rate is a tensor; clipping does not look at its norm; a loss
that is not finite is remembered on the device and found at the next ``read``. So nothing waits for
the host, and on CUDA the step can be captured and replayed with one launch.

Without CUDA the same functions run one by one: that is what the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from mambabyte.config import TrainConfig
from mambabyte.corpus import sample_starts
from mambabyte.errors import NonFiniteError
from mambabyte.model import (
    ByteLM,
    Mixer,
    distributed,
    head_loss,
    mixers,
    record_exponents,
    without_state,
)
from mambabyte.model.fused import cast_together, fused_head_loss, fused_layer
from mambabyte.ops.arguments import OLD, Ages
from mambabyte.train import ahead
from mambabyte.train.optim import Optimizer, set_rates
from mambabyte.train.precision import autocast
from mambabyte.train.step import Loss, Reading, backward_in_parts, remedy

FUSED = ("auto", "fused")
WARM_UP = 3  # steps run one by one before the capture: they create the optimizer's state


def window_starts(
    length: int, config: TrainConfig, first_step: int = 0, begins: np.ndarray | None = None
) -> Tensor:
    """Starts of the windows of every step from ``first_step`` on, (steps, batch_size) int64; of
    documents that begin at ``begins``, (steps, batch_size, 2), each beside the number of
    predictions of its whole batch."""
    starts = np.stack([
        sample_starts(length, config.context, config.batch_size, config.seed, step)
        for step in range(first_step, config.n_steps)])
    if begins is not None:
        first, last = np.searchsorted(begins, np.stack([starts + 1, starts + config.context + 1]))
        predictions = np.maximum(1, (config.context - (last - first)).sum(1, keepdims=True))
        starts = np.stack([starts, np.broadcast_to(predictions, starts.shape)], -1)
    return torch.from_numpy(starts)


def most_documents(starts: Tensor, context: int, begins: np.ndarray, parts: int) -> int:
    """The most documents in any of the ``parts`` equal parts of any step's batch: starts (steps,
    batch_size, 2) of windows of ``context`` bytes, of documents that begin at ``begins``."""
    first = starts[..., 0].numpy()
    before, after = np.searchsorted(begins, np.stack([first + 1, first + context]))
    count = 1 + after - before
    return int(count.reshape(len(count), parts, -1).sum(-1).max())


Batch = tuple[Tensor, *tuple[Tensor | Ages, ...]]  # tokens, and what else a loss is given


class Windows:
    """Gathers windows of sequences that run beside the text, on their device.

    ``Windows(text)(starts)`` is what ``corpus.sample_windows`` returns for the same starts. With
    the places ``begins`` (n,) of documents in the text, starts are those of ``window_starts`` with
    such, of batches of ``batch_size`` windows; ``most``, where known, is of ``most_documents``.
    """

    def __init__(
        self, text: Tensor, context: int, begins: np.ndarray | None = None, batch_size: int = 1,
        most: int | None = None,
    ) -> None:
        self.text, self.batch_size, self.most = text, batch_size, most
        self._offsets = torch.arange(context + 1, device=text.device)
        self._ages: Tensor | None = None
        if begins is not None:
            # Once of the whole text: of the windows of a step it would be six launches.
            self._ages = torch.full_like(text, OLD, dtype=torch.uint8)
            first = torch.from_numpy(begins).to(text.device)
            ends = torch.cat([first[1:], first.new_full((1,), len(text))])
            for age in range(OLD):
                here = first + age
                self._ages[here[here < ends]] = age

    def __call__(self, starts: Tensor) -> Batch:
        """starts (B,) -> tokens (B, context + 1) int64, in a tuple of arguments for the loss; of
        documents (B, 2) -> tokens, ages in their documents and predictions, where
        ``step.text_batches`` has the first bytes of documents."""
        if self._ages is None:
            return (self.text[self.positions(starts)].long(),)
        places = self.positions(starts[:, 0])
        return (self.text[places].long(), Ages(self._ages[places], self.most),
                starts[:, 1].float() / self.batch_size)

    def positions(self, starts: Tensor) -> Tensor:
        """Where in the text the bytes of windows are that begin at ``starts`` (B,): (B, bytes)."""
        return starts[:, None] + self._offsets


class CapturedStep:
    """Calls ``loss(*windows(starts))`` and the optimizer, step after step from ``first_step``.

    starts (steps, batch_size) int64, or more of each window, of every step to come. The optimizer
    must have been made with ``on_device=True``. ``capture`` is by default whether the model is on a
    GPU.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: Optimizer,
        windows: Callable[[Tensor], Batch], starts: Tensor, config: TrainConfig,
        first_step: int = 0, capture: bool | None = None,
    ) -> None:
        ahead.wait()
        self.model, self.optimizer, self.windows = model, optimizer, windows
        self.loss = cast_together(model, loss) if config.step in FUSED else loss
        self.config, self._world = config, distributed.current()
        self.device = next(model.parameters()).device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._starts = starts.to(self.device)
        self._index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._first_step, self._done = first_step, 0
        self._loss = torch.zeros((), dtype=torch.float32, device=self.device)
        self._norm = torch.zeros((), dtype=torch.float32, device=self.device)
        self._bad = torch.full((1,), -1, dtype=torch.int64, device=self.device)
        self._capture = self.device.type == "cuda" if capture is None else capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self._measure = False

    def __call__(self, share: float, measure: bool = False) -> None:
        """One step at this share of the peak learning rates. Does not wait for the device."""
        self._measure = measure
        set_rates(self.optimizer, share)
        if not self._capture:
            self.optimizer.zero_grad(set_to_none=True)
            self._step()
        elif self._done < WARM_UP:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
            torch.cuda.current_stream(self.device).wait_stream(side)
        else:
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()
        self._done += 1

    def read(self) -> Reading:
        """Loss and gradient norm of the last step. Waits for the device.

        The exponents, where they were asked for, are those of its windows and the new weights.
        NonFiniteError for the first step since the beginning at which either was not finite.
        """
        loss, norm, bad = torch.stack([
            self._loss, self._norm, self._bad[0].to(self._loss.dtype)]).tolist()
        if bad >= 0:
            step = self._first_step + int(bad)
            raise NonFiniteError(
                f"step {step + 1}: the loss or the gradient norm is not finite. It was seen at a "
                "later step, since the step does not wait for the device. Checkpoints written "
                f"before it are good. {remedy(self.model, self.config)}; to find the layer, "
                "train with --train.step eager", step)
        exponents: dict[int, float] = {}
        measure, self._measure = self._measure, False
        if measure:
            # cuDNN would compile a kernel for a pass without gradients
            with autocast(self.device, self.config.precision), torch.no_grad(), \
                    sdpa_kernel(ahead.BROUGHT), record_exponents(self.model) as exponents:
                # The model and not the loss: a compiled layer calls no hook that records.
                for part in self._starts[self._done - 1].chunk(self.config.micro_batches):
                    self.model(self.windows(part)[0][:, :-1])
        return Reading(loss, norm, max(exponents.values(), default=None))

    def _step(self) -> None:
        starts = self._starts.index_select(0, self._index)[0]
        loss = backward_in_parts(
            lambda part: self.loss(*self.windows(part)), (starts,), self.device, self.config)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._world.average([loss, *grads])
        norm = nn.utils.get_total_norm(grads, foreach=True)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(
                self._parameters, self.config.grad_clip, norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            self._loss.copy_(loss)
            self._norm.copy_(norm)
            wrong = ~(torch.isfinite(loss) & torch.isfinite(norm)) & (self._bad < 0)
            self._bad.copy_(torch.where(wrong, self._index, self._bad))
            self._index += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        # Without gradients to add to, the captured backward writes them anew at every replay.
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Beside other processes a thread of NCCL's watches events, which "global" forbids.
        mode = "global" if self._world.size == 1 else "thread_local"
        # By itself torch captures on the device that was current when it first did.
        with torch.cuda.device(self.device), torch.cuda.graph(
                graph, stream=torch.cuda.Stream(self.device), capture_error_mode=mode):
            self._step()
        return graph


def prepare(model: ByteLM, config: TrainConfig) -> None:
    """Ready a model on its device for training: mixers, residual type, and how ``config.step`` says
    that layers and head are run.

    Layers of one kind share their compiled code: the time it takes does not grow with depth.
    """
    way = config.step
    if way == "compile" and model.device.type != "cuda":
        way = "graph"
    for mixer in mixers(model, Mixer):
        mixer.prepare(config.context)
        mixer.fused = way in FUSED
    model.residual_dtype = torch.bfloat16 if config.precision == "bf16_residual" else None
    if way in FUSED:
        model.run_layer, model.run_head = fused_layer, fused_head_loss
    elif way == "compile":
        model.run_layer, model.run_head = (
            torch.compile(function, dynamic=False) for function in (without_state, head_loss))
    else:
        model.run_layer, model.run_head = without_state, head_loss

