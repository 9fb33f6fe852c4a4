"""The training loop: readable, resumable bit for bit, and loud about numbers that are not finite.

A run folder holds config.json, provenance.json, metrics.jsonl (one record a logged step),
checkpoints/step_*/ and, once the run has ended, result.json.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte import checkpoint
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.files import make_dir, write_json
from mambabyte.config.provenance import provenance
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.energy import EnergyMeter
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte
from mambabyte.model import ByteLM, distributed, record_exponent_headroom
from mambabyte.ops import FORMS, default_form
from mambabyte.train.captured import FastStep, Windows, prepare, window_starts
from mambabyte.train.growth import bytes_before, stage_at, stages
from mambabyte.train.optim import learning_rate, make_optimizer, schedule, set_rates
from mambabyte.train.precision import autocast

LN2 = math.log(2)
_AGREE_EVERY = 16  # steps after which several processes ask the first whether to stop, and the time


class NonFiniteError(UserError):
    """A loss or gradient became inf or nan; the message names the step and the layer."""


@dataclass(frozen=True)
class Progress:
    """What is shown and logged while training. ``headroom`` is max |cumulated log-decay|."""

    step: int
    n_steps: int
    loss: float  # nats per byte
    bits_per_byte: float
    grad_norm: float
    lr: float
    bytes_per_second: float
    seconds: float
    bytes_seen: int
    headroom: float | None  # None without SSM layers
    joules: float | None  # None when not measured


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    run: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    report_scoring: Callable[[float], None] = lambda done: None,
    evaluate_bytes: int = 100_000,
) -> dict[str, Any]:
    """Train and return the result record, which is also in ``run``/result.json.

    ``report`` is called every ``log_every`` steps, ``report_scoring`` with the share done while the
    held-out text is scored at the end. The loop ends at ``n_steps``, at
    ``max_seconds`` or at Ctrl-C; each leaves a checkpoint that ``resume`` goes on from. A run is
    deterministic for a seed on one machine: batches depend on (seed, step) alone.

    Raises UserError for a configuration that cannot run and NonFiniteError when it diverges; the
    last checkpoint written is then still good.
    """
    world = distributed.current()
    device = world.device(device)
    refuse_study_form(model_config, config)
    for stage in stages(config):
        world.share(torch.empty(stage.batch_size))  # fails now if it does not divide
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: use --device cpu")
    sample_windows(corpus.train, config.context, 1, 0, 0)  # fails now if a window cannot fit
    if model_config.vocab_size < 256:
        raise UserError(f"vocab_size is {model_config.vocab_size}: text has bytes up to 255, so it "
                        "must be at least 256")
    make_dir(run)
    checkpoints = run / "checkpoints"
    if (run / "config.json").exists() and not resume:
        goes_on = ("to continue it" if any(checkpoints.glob("step_*"))
                   else "to start it over, since it has no checkpoint yet")
        raise UserError(f"{run} holds a run already: give --resume {goes_on}, or another folder")

    torch.manual_seed(config.seed)
    model = ByteLM(model_config)
    if config.parallel == "sharded":
        world.shard(model, device)
    else:
        model.to(device)
    fast = config.parallel == "data" and config.step != "eager" and (
        config.step != "auto" or device.startswith("cuda"))
    optimizer = make_optimizer(model, config, on_device=fast)
    step, seconds_before, joules_before = 0, 0.0, 0.0
    digests = corpus.digest()
    if resume and any(checkpoints.glob("step_*")):
        saved = checkpoint.load_training(checkpoint.find_checkpoint(run), model, optimizer)
        _refuse_other_recipe(run, saved["train"], config)
        # (A checkpoint from before this was kept does not say what it was trained on.)
        if saved.get("text", digests["train"]) != digests["train"]:
            raise UserError(f"{run} was trained on another text than {corpus.name} is now: resume "
                            "with the corpus that it was started on, or choose another run folder")
        step, seconds_before = saved["step"], saved["seconds"]
        joules_before = saved.get("joules") or 0.0
    world.wait()  # all have seen whether there is a run already
    if world.first:
        write_json(run / "config.json", {"model": asdict(model_config), "train": asdict(config)})
        write_json(run / "provenance.json", {
            **provenance(), "corpus": corpus.name, "corpus_sha256": digests,
            "device": device, "processes": world.size})
        (run / "result.json").unlink(missing_ok=True)
        _drop_metrics_after(run / "metrics.jsonl", step)

    stage, stepper = stage_at(step, config), None
    meter = EnergyMeter(device, config.idle_watts)
    began = logged = time.perf_counter()
    logged_step = step
    stopped_by = "n_steps"
    model.train()

    def elapsed() -> float:
        return seconds_before + time.perf_counter() - began

    def agreed(yes: bool) -> bool:
        # To ask the others waits for the device: at every captured step that would leave gaps.
        if world.size == 1:
            return yes
        return (not fast or step % _AGREE_EVERY == 0) and world.agree(yes)

    clock = world.agree(elapsed())

    def joules() -> float | None:
        energy = meter.read()
        return None if energy.joules is None else joules_before + energy.joules

    def save() -> None:
        checkpoint.save_training(checkpoints, model, optimizer, {
            "step": step, "seconds": elapsed(), "joules": joules(), "train": asdict(config),
            "text": digests["train"]})
        if world.first:
            checkpoint.prune(checkpoints, config.keep_checkpoints)
        world.wait()

    log_file = run / "metrics.jsonl" if world.first else Path(os.devnull)
    with log_file.open("a") as metrics, stop_on_interrupt() as interrupted:
        while step < config.n_steps:
            if agreed(interrupted()):
                stopped_by = "interrupt"
                break
            if config.max_seconds and agreed(elapsed() >= config.max_seconds):
                stopped_by = "max_seconds"
                break
            if world.size == 1 or (config.time_aware and step % _AGREE_EVERY == 0):
                clock = world.agree(elapsed())  # else each would have a rate of its own
            if step == stage.end or (fast and stepper is None):  # the windows' shape changes
                if stepper is not None:
                    _read(model, stepper, config, False)
                stage, stepper = stage_at(step, config), None  # frees the old graph's memory
                stepper = _fast_step(model, optimizer, corpus, config, step) if fast else None
            log = (step + 1) % config.log_every == 0 or step + 1 == config.n_steps
            due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.n_steps
            if stepper is None:
                tokens = sample_windows(
                    corpus.train, stage.context, stage.batch_size, config.seed, step
                ).to(device, non_blocking=True)
                loss, grad_norm, headroom = train_step(
                    model, optimizer, world.share(tokens), config, step, measure_headroom=log,
                    elapsed_seconds=clock)
            else:
                stepper(schedule(step, config, clock))
                if log or due:
                    loss, grad_norm, headroom = _read(model, stepper, config, log)
            step += 1
            if log:
                now = time.perf_counter()
                seen = bytes_before(step, config)
                rate = (seen - bytes_before(logged_step, config)) / max(now - logged, 1e-9)
                logged, logged_step = now, step
                progress = Progress(
                    step, config.n_steps, loss, loss / LN2, grad_norm,
                    learning_rate(step - 1, config), rate, elapsed(),
                    seen, headroom, joules())
                metrics.write(json.dumps(asdict(progress)) + "\n")
                metrics.flush()
                report(progress)
            if due:
                save()
    if stopped_by != "n_steps":
        if stepper is not None and step:
            _read(model, stepper, config, False)
        save()

    energy = meter.read()
    result: dict[str, Any] = {
        "steps": step,
        "stopped_by": stopped_by,
        "seconds": elapsed(),
        "bytes_seen": bytes_before(step, config),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "joules": joules(),
        "energy_source": energy.source,
        "idle_watts": config.idle_watts,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device)
        if device.startswith("cuda") else None,
        "checkpoint": str(checkpoint.find_checkpoint(run).relative_to(run)),
    }
    if stopped_by != "interrupt":
        valid = corpus.valid[:evaluate_bytes]
        sharded = config.parallel == "sharded" and world.size > 1
        # What no device holds is scored on the first process's CPU.
        scored = checkpoint.load_model(run) if sharded and world.first else model
        mine = len(valid) > 1 and (world.first or not sharded)
        result["valid_bits_per_byte"] = (
            bits_per_byte(scored, valid, report=report_scoring) if mine else None)
        result["valid_bytes"] = len(valid)
        if world.first:
            write_json(run / "result.json", result)
    return result


def _fast_step(
    model: ByteLM, optimizer: torch.optim.Optimizer, corpus: Corpus, config: TrainConfig, step: int
) -> FastStep:
    """The captured steps from ``step`` to the end of its stage."""
    if config.step == "compile":
        # All stages share one function, and torch stops compiling a function for the ninth time.
        torch._dynamo.reset()
    prepare(model, config, compiled=config.step == "compile")
    stage = stage_at(step, config)
    shape = replace(config, context=stage.context, batch_size=stage.batch_size, n_steps=stage.end,
                    first_context=0, first_batch_size=0)
    text = torch.from_numpy(np.array(corpus.train)).to(model.device)
    starts = window_starts(len(text), shape, step)
    starts = distributed.current().share(starts.T).T.contiguous()
    return FastStep(model, model.loss, optimizer, Windows(text, stage.context), starts, shape,
                    first_step=step)


def _read(
    model: ByteLM, stepper: FastStep, config: TrainConfig, measure_headroom: bool
) -> tuple[float, float, float | None]:
    """Loss, gradient norm and headroom of the last step; NonFiniteError if one since the
    beginning was not finite."""
    loss, norm, bad = stepper.read()
    if bad is not None:
        raise NonFiniteError(
            f"step {bad + 1}: the loss or the gradient norm is not finite (seen at a later step: "
            "the step does not wait for the device). Checkpoints written before it are good. "
            f"Scan form: {scan_form_in_use(model, model.device)}; lower lr, or find the layer "
            "with --train.step eager")
    headroom: dict[int, float] = {}
    if measure_headroom and "M" in model.config.layers:
        mixed = autocast(model.device, config.precision)
        with mixed, torch.no_grad(), record_exponent_headroom(model) as headroom:
            model(stepper.tokens()[:, :-1])
    return loss, norm, max(headroom.values(), default=None)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C came. A step is never torn; a second Ctrl-C is.

    Outside the main thread, where Python takes no signals, it always says no.
    """
    came = False

    def handler(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


# What may change between a run and its continuation without changing the weights.
_FREE_ON_RESUME = {"max_seconds", "log_every", "checkpoint_every", "keep_checkpoints",
                   "idle_watts", "allow_study_form", "parallel"}


def _refuse_other_recipe(run: Path, saved: dict[str, Any], config: TrainConfig) -> None:
    now = json.loads(json.dumps(asdict(config)))
    saved = {**asdict(TrainConfig()), **saved}  # a run from before a setting had its default
    changed = [k for k in now if saved.get(k) != now[k] and k not in _FREE_ON_RESUME]
    if changed:
        raise UserError(f"{run} was trained with another {', '.join(changed)}: resume with the "
                        "same options, or choose another run folder")


def refuse_study_form(model_config: ModelConfig, config: TrainConfig) -> None:
    """UserError for a scan form that is a subject of study, unless it was asked for."""
    form = FORMS.get(model_config.scan_form)
    if form is not None and form.study and not config.allow_study_form:
        raise UserError(f"scan form {model_config.scan_form!r} is a subject of study "
                        f"({form.about}): train with auto, or give --train.allow-study-form")


def train_step(
    model: ByteLM, optimizer: torch.optim.Optimizer, tokens: Tensor, config: TrainConfig,
    step: int, measure_headroom: bool = False, elapsed_seconds: float = 0.0,
) -> tuple[float, float, float | None]:
    """One step on tokens (batch, context + 1): loss in nats, gradient norm, exponent headroom."""
    set_rates(optimizer, schedule(step, config, elapsed_seconds))
    optimizer.zero_grad(set_to_none=True)
    with autocast(tokens.device, config.precision):
        recording: Any = record_exponent_headroom(model) if measure_headroom else nullcontext({})
        with recording as headroom:
            loss = model.loss(tokens)
    loss.backward()
    world = distributed.current()
    world.average([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    limit = config.grad_clip or math.inf
    norm = distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), limit))
    loss_value, norm_value = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
    if not math.isfinite(loss_value) or not math.isfinite(norm_value):
        where = _first_bad_layer(model, tokens, config)
        raise NonFiniteError(
            f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; first not finite in "
            f"{where}. Checkpoints written before it are good. Scan form: "
            f"{scan_form_in_use(model, tokens.device)}; lower lr, or train with scan form auto")
    optimizer.step()
    return loss_value, norm_value, max(headroom.values(), default=None)


def scan_form_in_use(model: ByteLM, device: torch.device) -> str:
    form = model.config.scan_form
    return default_form(device) if form == "auto" else form


def _first_bad_layer(model: ByteLM, tokens: Tensor, config: TrainConfig) -> str:
    """The first module whose output is not finite, else the parameter whose gradient is not."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not bad and not torch.isfinite(tensor).all():
                bad.append(f"the forward output of {name}")
        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad(), autocast(tokens.device, config.precision):
            model.loss(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return bad[0]
    # Backward runs from the last layer to the first: the last bad gradient came first.
    names = [n for n, p in model.named_parameters()
             if p.grad is not None and not torch.isfinite(p.grad).all()]
    return f"the gradient of {names[-1]}" if names else "the loss itself"


def _drop_metrics_after(path: Path, step: int) -> None:
    """Forget records of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line cut off by a kill
            continue
        if isinstance(record, dict) and record.get("step", math.inf) <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept))
