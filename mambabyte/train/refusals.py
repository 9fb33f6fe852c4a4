"""What a run folder and a recipe refuse before training, each in one line."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mambabyte import checkpoint
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.checks import CountOrNone, fit, from_plain, shown
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import distributed
from mambabyte.model.mixer import mixer_of
from mambabyte.ops import FORMS
from mambabyte.ops.scan import cpu as native_scan
from mambabyte.train.schedule import schedule, stage_at, stages


def machine(device: str) -> dict[str, Any]:
    """What decides in which order sums are rounded, besides the recipe."""
    on_cpu = device == "cpu"
    return {"device": device.partition(":")[0],
            "threads": torch.get_num_threads() if on_cpu else None,
            "compiled scan": native_scan.available()[0] if on_cpu else None}


# What may change between a run and its continuation without changing the weights, or (parallel,
# context_parallel, micro_batches) no more than the order of a sum does.
_FREE_ON_RESUME = {"max_seconds", "log_every", "checkpoint_every", "keep_checkpoints",
                   "idle_watts", "allow_study_form", "parallel", "context_parallel",
                   "micro_batches"}
# What may change where the steps that were done would have been the same.
_OF_THE_SCHEDULE = {"n_steps", "schedule", "warmup_fraction", "decay_fraction", "growth_fraction"}


def refuse_other_recipe(
    run: Path, saved: dict[str, Any], config: TrainConfig, done: int
) -> None:
    """UserError where ``config`` would not have made the ``done`` steps of the recipe ``saved``."""
    # A run from before a setting had its default.
    before = from_plain(TrainConfig, {**asdict(TrainConfig()), **saved}, f"recipe of {run}")
    old, new = asdict(before), asdict(config)
    changed = [k for k in new if old[k] != new[k] and k not in _FREE_ON_RESUME]
    said = ", ".join(f"{k} {old[k]}, now {new[k]}" for k in changed)
    if set(changed) - _OF_THE_SCHEDULE:
        raise UserError(f"{run} was trained with {said}: leave these options out, as --resume "
                        "takes the run's own, or choose another run folder")
    for number in range(done if changed else 0):
        if schedule(number, before) != schedule(number, config) or (
                _shape(number, before) != _shape(number, config)):
            raise UserError(
                f"{run} was trained with {said}: with these, step {number + 1} of the {done} done "
                "would have been another. A run can be made longer before its learning rate falls: "
                "schedule stable, and warmup_fraction "
                f"{before.warmup_fraction * before.n_steps / config.n_steps:g} for {config.n_steps}"
                " steps")


def _shape(number: int, config: TrainConfig) -> tuple[int, int]:
    stage = stage_at(number, config)
    return stage.batch_size, stage.context


def refuse_other_kinds(
    model_config: ModelConfig, config: TrainConfig, corpus: Corpus, evaluate_bytes: int
) -> None:
    """UserError for arguments of another kind, and for weights that would be of another type than
    checkpoints and ``precision`` speak of."""
    for value, kind in ((model_config, ModelConfig), (config, TrainConfig), (corpus, Corpus)):
        if not isinstance(value, kind):
            made = "load_corpus" if kind is Corpus else kind.__name__
            raise UserError(f"{shown(value)} stands where a {kind.__name__} is expected: {made} "
                            "makes one")
    fit(evaluate_bytes, CountOrNone, "evaluate_bytes")
    if torch.get_default_dtype() != torch.float32:
        raise UserError(f"torch's default type is {torch.get_default_dtype()}: weights are trained "
                        "in float32, and precision says what is computed in; call "
                        "torch.set_default_dtype(torch.float32) first")


def refuse_what_cannot_run(
    model_config: ModelConfig, config: TrainConfig, corpus: Corpus, device: str
) -> None:
    """UserError now for what would fail in the middle."""
    refuse_study_form(model_config, config)
    each = config.context_parallel
    shared = distributed.current().sequence_group(each)
    for stage in stages(config):
        if shared is not None:
            shared.pieces(stage.context)
        rows = len(distributed.current().share(torch.arange(stage.batch_size, device="cpu"), each))
        if rows % config.micro_batches:
            raise UserError(f"micro_batches {config.micro_batches} does not divide the {rows} "
                            "windows that a process has in a step: choose a divisor of them")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: use --device cpu")
    sample_windows(corpus.train, config.context, 1, 0, 0)  # does a window fit?
    without = [letter for letter in dict.fromkeys(model_config.layers)
               if not mixer_of(letter).knows_documents()]
    if len(corpus.begins.get("train", ())) > 1 and without:
        raise UserError(f"{corpus.name} has documents one behind another, and layers of "
                        f"{', '.join(without)} know none: let forward take ages "
                        "(docs/contributing.md), or give one text")
    if model_config.vocab_size < 256:
        raise UserError(f"vocab_size is {model_config.vocab_size}: text has bytes up to 255, so it "
                        "must be at least 256")


def refuse_taken(run: Path, resume: bool) -> None:
    """UserError where a folder holds a run that was not asked to be resumed, or no run."""
    for name in ("config.json", "provenance.json", "metrics.jsonl", "result.json"):
        if (run / name).exists() and not (run / name).is_file():  # a pipe would be waited for
            raise UserError(f"{run / name} is no file: remove it, or choose another run folder")
    if (run / "config.json").exists() and not resume:
        goes_on = ("to continue it" if checkpoint.saved(run)
                   else "to start it over, since it has no checkpoint yet")
        raise UserError(f"{run} holds a run already: give --resume {goes_on}, or another folder")


def refuse_full_disk(run: Path, model_config: ModelConfig) -> None:
    """UserError where not even the weights and one moment of the optimizer would find room."""
    free, needed = shutil.disk_usage(run).free, 2 * 4 * model_config.n_parameters
    if free < needed:
        raise UserError(f"{run} has room for {free / 1e6:,.1f} MB, and a checkpoint takes "
                        f"{needed / 1e6:,.1f} MB or more: make room, or choose another place")


def refuse_study_form(model_config: ModelConfig, config: TrainConfig) -> None:
    """UserError for a scan form that is a subject of study, unless it was asked for."""
    form = FORMS.get(model_config.scan_form)
    if form is not None and form.study and not config.allow_study_form:
        raise UserError(f"scan form {model_config.scan_form!r} is a subject of study "
                        f"({form.about}): train with auto, or give --train.allow-study-form")
