"""Training into a run folder: resumable bit for bit, and loud about numbers that are not finite.

A run folder holds config.json, provenance.json, metrics.jsonl (one record a logged step),
checkpoints/step_*/ and, once the run has ended, result.json.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from mambabyte import checkpoint
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.checks import path_of
from mambabyte.config.files import make_dir, to_json, write_json
from mambabyte.config.owners import only_one, remove_leftovers
from mambabyte.config.provenance import provenance
from mambabyte.corpus import Corpus
from mambabyte.corpus.files import present
from mambabyte.energy import NOT_MEASURED, EnergyMeter, total
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.evaluate import bits_per_byte
from mambabyte.model import ByteLM, Mixer, distributed, mixers
from mambabyte.model.mixer import in_float32
from mambabyte.train import ahead
from mambabyte.train.captured import (
    CapturedStep,
    Windows,
    most_documents,
    prepare,
    window_starts,
)
from mambabyte.train.loop import DONE, Ended, optimise
from mambabyte.train.metrics import Progress, drop_after
from mambabyte.train.optim import make_optimizer
from mambabyte.train.refusals import (
    machine,
    refuse_full_disk,
    refuse_other_kinds,
    refuse_other_recipe,
    refuse_taken,
    refuse_what_cannot_run,
)
from mambabyte.train.schedule import bytes_before, schedule, stage_at, stages
from mambabyte.train.signals import stop_on_signal
from mambabyte.train.step import EagerStep, Step, text_batches

_LOG = logging.getLogger(__name__)
LN2 = math.log(2)
_AGREE_EVERY = 16  # steps after which several processes ask the first whether to stop, and the time


def train(
    model_config: ModelConfig, config: TrainConfig, corpus: Corpus, run: Path | str, *,
    device: str = "cpu", resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    watch: Callable[[Progress], None] = lambda progress: None,
    report_scoring: Callable[[float], None] = lambda done: None, evaluate_bytes: int = 100_000,
) -> dict[str, Any]:
    """Train and return the result record, which is also in ``run``/result.json.

    ``report`` is called at what is logged, the first step and every ``log_every`` steps; ``watch``
    at every step besides, where to look costs no wait for the device; ``report_scoring`` with the
    share done while the held-out text is scored at the end. The loop ends at ``n_steps``, at
    ``max_seconds``, or at Ctrl-C, SIGTERM or SIGHUP; each leaves a checkpoint that ``resume`` goes
    on from. A run is deterministic for a seed on one machine: batches depend on (seed, step) alone.

    Raises UserError for a configuration that cannot run and NonFiniteError when it diverges; the
    last checkpoint written is then still good.
    """
    refuse_other_kinds(model_config, config, corpus, evaluate_bytes)
    run, device = path_of(run, "the run folder"), distributed.current().device(device)
    refuse_what_cannot_run(model_config, config, corpus, device)
    # A notebook may have turned gradients off for all that it does.
    with _locked(run), torch.inference_mode(False), torch.enable_grad():
        refuse_taken(run, resume)
        refuse_full_disk(run, model_config)
        ahead.begin(model_config, config, device)
        training = _Training(model_config, config, corpus, run, device, report, watch)
        if resume and checkpoint.saved(run):
            training.restore()
        training.open_folder()
        ended = training.go()
        result = training.result(ended)
        if ended.stopped_by != "interrupt":
            result |= training.score(corpus.documents("valid", evaluate_bytes), report_scoring)
            if training.world.first:
                write_json(run / "result.json", result)
        return result


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """The run folder, made, tidied and to this training alone; of several processes the first
    asks for all, so that UserError ends all."""
    world, refused = distributed.current(), None
    with ExitStack() as held:
        if world.first:
            try:
                make_dir(run)
                held.enter_context(only_one(run / ".lock", "trains"))
            except UserError as error:
                refused = str(error)
        refused = world.agree(refused)
        if refused:
            raise UserError(refused)
        if world.first:
            for folder in (run, run / "checkpoints"):
                remove_leftovers(folder)
        world.wait()
        yield


class _Training:
    """A model on its way through a run folder: what ``train`` does, in the order it does it."""

    def __init__(
        self, model_config: ModelConfig, config: TrainConfig, corpus: Corpus, run: Path,
        device: str, report: Callable[[Progress], None], watch: Callable[[Progress], None],
    ) -> None:
        self.config, self.corpus, self.run, self.device = config, corpus, run, device
        self.report, self.watch, self.world = report, watch, distributed.current()
        self.checkpoints, self.digests = run / "checkpoints", corpus.digest()
        torch.manual_seed(config.seed)
        self.model = in_float32(lambda: ByteLM(model_config))
        self.model.share_sequences(self.world.sequence_group(config.context_parallel))
        if config.parallel == "sharded":
            self.world.shard(self.model, device)
        else:
            self.model.to(device)
        self.waits = not (config.parallel == "data" and config.step != "eager" and (
            config.step != "auto" or device.startswith("cuda")))  # for the device, at every step
        self.optimizer = make_optimizer(self.model, config, on_device=not self.waits)
        self.step: Step | None = None
        self.done, self.saved_at, self.resumed_at = 0, -1, 0
        self.share = 0.0  # of the peak learning rate, at the last step
        self.seconds_before = 0.0
        self.joules_before: float | None = 0.0  # None: the run before was not measured

    def restore(self) -> None:
        """Go on from the newest checkpoint; UserError where recipe or text are others."""
        saved = checkpoint.load_training(
            checkpoint.find_checkpoint(self.run), self.model, self.optimizer)
        refuse_other_recipe(self.run, saved["train"], self.config, saved["step"])
        # (A checkpoint from before this was kept does not say what it was trained on.)
        if saved.get("text", self.digests["train"]) != self.digests["train"]:
            raise UserError(f"{self.run} was trained on another text than {self.corpus.name} is "
                            "now: resume with the corpus that it was started on, or choose another "
                            "run folder")
        self.done = self.saved_at = self.resumed_at = saved["step"]
        self.seconds_before = saved["seconds"]
        self.joules_before = saved.get("joules")
        now = machine(self.device)
        before = saved.get("machine")  # (first kept later as well)
        changed = [f"{key} {value}, now {now[key]}" for key, value in before.items()
                   if now.get(key, value) != value] if isinstance(before, dict) else []
        if changed:
            _LOG.warning("note: %s goes on otherwise than it began (%s): sums are rounded in "
                         "another order, so its weights will not be bit for bit those of an "
                         "unbroken run", self.run, "; ".join(changed))

    def open_folder(self) -> None:
        """Write what is known before the first step, and forget what will be done again."""
        self.world.wait()  # all have seen whether there is a run already
        if not self.world.first:
            return
        write_json(self.run / "config.json",
                   {"model": asdict(self.model.config), "train": asdict(self.config),
                    "corpus": self.corpus.source, "device": self.device.partition(":")[0]})
        write_json(self.run / "provenance.json", {
            **provenance(), "run": self._run_id(), "corpus": self.corpus.name,
            "corpus_sha256": self.digests, "device": self.device, "processes": self.world.size})
        (self.run / "result.json").unlink(missing_ok=True)
        drop_after(self.run / "metrics.jsonl", self.done)

    def _run_id(self) -> str:
        """That of the run from before, also if its checkpoints alone were copied here."""
        newest = checkpoint.saved(self.run)[-1:]
        return (checkpoint.run_id(self.run) or (newest and checkpoint.run_of(newest[0]))
                or uuid.uuid4().hex)

    def go(self) -> Ended:
        """The steps that are left, stage after stage, and a checkpoint where they stop early."""
        self.meter = EnergyMeter(self.device, self.config.idle_watts)
        self.began = self.logged = time.perf_counter()
        self.logged_at = self.done
        self.clock = self.world.agree(self.elapsed())
        self.model.train()
        ended = Ended(self.done, DONE)
        log_file = self.run / "metrics.jsonl" if self.world.first else Path(os.devnull)
        with log_file.open("a", encoding="utf-8") as self.metrics, stop_on_signal() as asked:
            self.asked = asked
            for stage in stages(self.config):
                if stage.end <= self.done:
                    continue
                self.step = None  # frees the last stage's graph, captured for other windows
                self.step = self._strategy()
                try:
                    ended = optimise(
                        self.step, self._share, stage.end, first=self.done, stop=self._stop,
                        before=self._measures, after=self._after)
                except NonFiniteError:
                    raise
                except UserError:  # before a step, as of a corpus that was cut meanwhile
                    if self.world.size == 1:
                        self._save()
                    raise
                if ended.stopped_by != DONE:
                    break
        if self.step is not None:
            self.step.read()  # no checkpoint of a run that has diverged
        if ended.stopped_by != DONE:
            self._save()
        self.step = None
        return ended

    def elapsed(self) -> float:
        """Seconds of training, those before a resumption too."""
        return self.seconds_before + time.perf_counter() - self.began

    def joules(self) -> float | None:
        """Joules of all processes' devices, those before a resumption too; None, and the reason in
        ``energy_source``, where any of it was not measured."""
        mine = self.meter.read(at=f"step {self.done}")
        found = self.world.gather((self.meter.identity, mine.joules, mine.source))
        sources = list(dict.fromkeys(source for _, _, source in found))
        lacking = [source for source in sources if source.startswith(NOT_MEASURED)]
        self.energy_source = "; ".join(lacking or sources)
        joules = total((identity, joules) for identity, joules, _ in found)
        if self.joules_before is None:
            self.energy_source = f"{NOT_MEASURED} before step {self.resumed_at}"
        return None if joules is None or self.joules_before is None else (
            self.joules_before + joules)

    def _strategy(self) -> Step:
        """How the steps from here to the end of their stage are made."""
        begins = self.corpus.begins.get("train")
        if self.waits:
            return EagerStep(self.model, self.optimizer, text_batches(
                self.corpus.train, self.config, self.device, begins), self.config,
                first_step=self.done)
        if self.config.step == "compile":
            # All stages share one function, and torch stops compiling one for the ninth time.
            torch._dynamo.reset()
        prepare(self.model, self.config)
        stage = stage_at(self.done, self.config)
        shape = replace(self.config, context=stage.context, batch_size=stage.batch_size,
                        n_steps=stage.end, first_context=0, first_batch_size=0)
        text = torch.from_numpy(np.array(present(self.corpus.train))).to(self.model.device)
        starts = window_starts(len(text), shape, self.done, begins)
        starts = self.world.share(
            starts.transpose(0, 1), shape.context_parallel).transpose(0, 1).contiguous()
        most = None if begins is None else most_documents(
            starts, stage.context, begins, shape.micro_batches)
        windows = Windows(text, stage.context, begins, stage.batch_size, most)
        return CapturedStep(self.model, self.model.loss, self.optimizer, windows, starts, shape,
                            first_step=self.done)

    def _agreed(self, yes: bool) -> bool:
        # To ask the others waits for the device: at every captured step that would leave gaps.
        if self.world.size == 1:
            return yes
        return (self.waits or self.done % _AGREE_EVERY == 0) and self.world.agree(yes)

    def _stop(self, done: int) -> str | None:
        if self._agreed(self.asked()):
            return "interrupt"
        cap = self.config.max_seconds
        return "max_seconds" if cap and self._agreed(self.elapsed() >= cap) else None

    def _share(self, number: int) -> float:
        every = self.config.time_aware and number % _AGREE_EVERY == 0
        if self.world.size == 1 or every:  # else each process would have a rate of its own
            self.clock = self.world.agree(self.elapsed())
        self.share = schedule(number, self.config, self.clock)
        return self.share

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.n_steps

    def _logs(self, done: int) -> bool:
        return done == 1 or self._due(done, self.config.log_every)

    def _measures(self, number: int) -> bool:
        return self._logs(number + 1) and any(
            mixer.has_decays for mixer in mixers(self.model, Mixer))

    def _after(self, done: int) -> None:
        assert self.step is not None
        self.done = done
        if self._logs(done):
            progress = self._progress()
            self.logged, self.logged_at = time.perf_counter(), done
            self._log(self.metrics, progress)
        elif self.waits:
            self.watch(self._progress())
        if self._due(done, self.config.checkpoint_every):
            self.step.read()  # no checkpoint of a run that has diverged
            self._save()

    def _progress(self) -> Progress:
        """The last step, and the speed since the last one that was logged."""
        assert self.step is not None
        reading, now = self.step.read(), time.perf_counter()
        seen = bytes_before(self.done, self.config)
        rate = (seen - bytes_before(self.logged_at, self.config)) / max(now - self.logged, 1e-9)
        return Progress(
            self.done, self.config.n_steps, reading.loss, reading.loss / LN2, reading.grad_norm,
            self.config.lr * self.share, rate, self.elapsed(), seen, reading.exponent,
            self.joules())

    def _log(self, metrics: TextIO, progress: Progress) -> None:
        metrics.write(to_json(asdict(progress)) + "\n")
        metrics.flush()
        self.report(progress)

    def _save(self) -> None:
        if self.saved_at == self.done:  # never written twice: that would put the good one at risk
            return
        checkpoint.save_training(self.checkpoints, self.model, self.optimizer, {
            "step": self.done, "seconds": self.elapsed(), "joules": self.joules(),
            "train": asdict(self.config), "text": self.digests["train"],
            "machine": machine(self.device)})
        self.saved_at = self.done
        if self.world.first:
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints)
        self.world.wait()

    def result(self, ended: Ended) -> dict[str, Any]:
        """What is known without scoring."""
        on_cuda = self.device.startswith("cuda")
        return {
            "steps": ended.steps,
            "stopped_by": ended.stopped_by,
            "seconds": self.elapsed(),
            "bytes_seen": bytes_before(ended.steps, self.config),
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "joules": self.joules(),
            "energy_source": self.energy_source,
            "idle_watts": self.config.idle_watts,
            "peak_memory_bytes":
                torch.cuda.max_memory_allocated(self.device) if on_cuda else None,
            "checkpoint": str(checkpoint.find_checkpoint(self.run).relative_to(self.run)),
        }

    def score(self, valid: list[np.ndarray], report: Callable[[float], None]) -> dict[str, Any]:
        """Bits per byte of held-out documents, by the first process if the model is sharded."""
        sharded = self.config.parallel == "sharded" and self.world.size > 1
        # What no device holds is scored on the first process's CPU.
        scored = (checkpoint.load_model(self.run) if sharded and self.world.first else self.model)
        size = sum(map(len, valid))
        mine = size > 0 and (self.world.first or not sharded)
        bits = bits_per_byte(scored, valid, report=report) if mine else None
        return {"valid_bits_per_byte": bits, "valid_bytes": size,
                "valid_split_bytes": len(self.corpus.valid)}
