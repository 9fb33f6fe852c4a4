"""The exponents that a model reaches: untrained, while it trains, in a step across the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from analysis.theory.bounds import log_max, share_past_bound
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.model import ByteLM, MambaMixer, mixers, record_exponents
from mambabyte.model.families.shared import inverse_softplus
from mambabyte.train import (
    EagerStep,
    NonFiniteError,
    autocast,
    optimise,
    text_step,
    train_step,
)
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import learning_rate, schedule

CHUNK = 32  # steps over which the exponents of a model are cumulated, as in the document
COUNTED_WINDOWS, COUNTED_BYTES = 2, 128  # the text on which the untrained model is looked at
LEAST_SHARE = 0.5  # of a schedule: a line through less of it is not carried on to its end
TOO_SHORT = "too short to extrapolate"


def ssm_layers(model: nn.Module) -> list[MambaMixer]:
    """The SSM mixers of a model, first layer first."""
    return mixers(model, MambaMixer)


@torch.no_grad()
def step_sizes(model: ByteLM, tokens: Tensor) -> list[Tensor]:
    """dt (B, L, D) of each SSM layer on ``tokens`` (B, L), from the first byte on."""
    found = []

    def keep(mixer: MambaMixer, args: tuple) -> None:
        _, delta, *_ = mixer.scan_inputs(args[0], None)
        found.append(mixer.step_size(delta.float()))

    handles = [mixer.register_forward_pre_hook(keep) for mixer in ssm_layers(model)]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


# -------------------------------------------------------------------------- the untrained model


def pairs_past_bound(corpus_name: str, seed: int, lengths: Sequence[int]) -> pd.DataFrame:
    """Share of (channel, state) pairs past the bound of the whole-sequence trick, by length.

    Closed form from the initialisation, and counted in the untrained mamba_byte model on text:
    pairs whose exponent overflows, and channels with at least one such pair, whose output is lost.
    """
    model, tokens = _untrained(corpus_name, seed, max(lengths), 1)
    exponents = torch.cat(_final_exponents(model, tokens), dim=1)  # (1, layers D, L, N)
    rows = []
    for length in lengths:
        # The published exponent of the last input stops one step short of the last decay.
        past = exponents[:, :, max(length - 2, 0)] > log_max()
        rows.append({
            "length, steps": length, "closed form, share of pairs": share_past_bound(length),
            "counted, share of pairs": float(past.double().mean()) if length > 1 else 0.0,
            "counted, share of channels": float(past.any(-1).double().mean())
            if length > 1 else 0.0})
    return pd.DataFrame(rows)


@torch.no_grad()
def _final_exponents(model: ByteLM, tokens: Tensor) -> list[Tensor]:
    """|cumulated log-decay| of each SSM layer on these tokens, (B, D, L, N), in float64."""
    found = []
    for mixer, dt in zip(ssm_layers(model), step_sizes(model, tokens), strict=True):
        rate = mixer.A_log.double().exp()  # (D, N)
        passed = dt.double().cumsum(1).transpose(1, 2)  # (B, D, L)
        found.append(passed.unsqueeze(-1) * rate.unsqueeze(1))
    return found


def _untrained(corpus_name: str, seed: int, length: int, batch: int) -> tuple[ByteLM, Tensor]:
    """mamba_byte at its initialisation, and text (batch, length) to run it on."""
    torch.manual_seed(seed)
    model = ByteLM(PRESETS["mamba_byte"].model)
    return model, sample_windows(load_corpus(corpus_name).train, length, batch, seed, 0)[:, :-1]


def initial_exponents(corpus_name: str, seed: int) -> dict[str, float]:
    """Of the untrained mamba_byte model on text: the largest per-step and per-chunk exponent."""
    model, tokens = _untrained(corpus_name, seed, COUNTED_BYTES, COUNTED_WINDOWS)
    found = {}
    for name, chunk in (("step", 1), ("chunk", CHUNK)):
        with torch.no_grad(), record_exponents(model, chunk) as seen:
            model(tokens)
        found[name] = max(seen.values())
    return found


# ------------------------------------------------------------------------------------- training


def follow_training(
    model_config: ModelConfig, train: TrainConfig, corpus_name: str, steps: int, every: int,
    device: str = "cpu", report: Callable[[str], None] = lambda line: None,
) -> tuple[pd.DataFrame, str]:
    """Exponents of every SSM layer while a model trains; and how it ended.

    ``steps`` of the recipe's schedule are done, fewer if a loss or gradient is not finite. The
    largest exponent is recorded every ``every`` steps, from the batch that is trained on next,
    and at the batch that is lost, where the stable form stands in for the one that failed.
    "learning, sum of rates" is the sum of the learning rates so far: Adam moves a weight by about
    one rate a step at most.
    """
    corpus = load_corpus(corpus_name)
    torch.manual_seed(train.seed)
    model = ByteLM(model_config).to(device)
    step = text_step(model, corpus.train, train)
    rows: list[dict[str, object]] = []
    learned, ending = 0.0, f"trained {steps} steps"

    def record(number: int) -> None:
        (tokens,) = step.batches(number)
        with torch.no_grad(), autocast(tokens.device, train.precision), \
                record_exponents(model, CHUNK) as seen:
            loss = model.loss(tokens).item()
        rows.extend({"form": model_config.scan_form, "step": number, "layer": layer,
                     "largest exponent in 32 steps": value, "learning, sum of rates": learned,
                     "loss, nats": loss} for layer, value in seen.items())
        report(f"{model_config.scan_form}, step {number}: loss {loss:.3f}, "
               f"largest exponent {max(seen.values()):.1f}")

    def after(done: int) -> None:
        nonlocal learned
        learned += learning_rate(done - 1, train)
        if done % every == 0 or done == steps:
            record(done)

    record(0)
    try:
        optimise(step, partial(schedule, config=train), steps, after=after)
    except NonFiniteError as error:
        ending = str(error).split(". ")[0]
        report(ending)
        for mixer in ssm_layers(model):  # to see the exponents of the lost batch
            mixer.form = "chunked"
        if error.step % every:
            record(error.step)
    return pd.DataFrame(rows), ending


def extrapolate(followed: pd.DataFrame, train: TrainConfig) -> pd.DataFrame:
    """The largest exponent at the end of ``train``'s schedule, by form and layer.

    A line over the sum of learning rates through the measured points, carried on to the sum of
    the whole schedule, as words. A line is a guess: the slope of the last half is given too, and
    less than half of the schedule (LEAST_SHARE) is too short for one.
    """
    total = sum(learning_rate(step, train) for step in range(train.n_steps))
    rows = []
    for (form, layer), group in followed.groupby(["form", "layer"], sort=False):
        x = group["learning, sum of rates"].to_numpy()
        y = group["largest exponent in 32 steps"].to_numpy()
        half = len(x) // 2
        ends = [y[-1] + _slope(x[part:], y[part:]) * (total - x[-1]) for part in (0, half)]
        words = [f"{end:.1f}" if x[-1] / total >= LEAST_SHARE else TOO_SHORT for end in ends]
        rows.append({
            "form": form, "layer": layer, "share of the schedule's learning": x[-1] / total,
            "first": y[0], "last measured": y[-1],
            "at the end, by a line": words[0], "at the end, by the last half": words[1],
            "bound of float32": log_max()})
    return pd.DataFrame(rows)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.ptp(x) > 0 else 0.0


# ------------------------------------------------------------------------- crossing the bound


def cross_the_bound(corpus_name: str, seed: int, exponents: Sequence[float]) -> pd.DataFrame:
    """What one training step does to a model whose exponents are set below and above the bound.

    One channel of the first layer gets the step size whose chunk of 32 cumulates the given
    log-decay at A = -16. The step is the document's: loss, backward, clip at norm 1, AdamW,
    without any check. "with checks" is what this package's own step does.
    """
    config = ModelConfig(d_model=32, n_layer=2, scan_chunk=CHUNK)
    train = TrainConfig(allow_study_form=True)
    tokens = sample_windows(load_corpus(corpus_name).train, 96, 2, seed, 0)
    rows = []
    for form in ("document_chunked", "corrected_cumsum", "chunked"):
        for exponent in exponents:
            row: dict[str, object] = {"form": form, "exponent of 32 steps": exponent}
            row |= _bare_step(_model_at(replace(config, scan_form=form), exponent, seed),
                              tokens, train)
            model = _model_at(replace(config, scan_form=form), exponent, seed)
            try:
                train_step(model, make_optimizer(model, train), tokens, train, 0)
                row["with checks"] = "goes on"
            except NonFiniteError as error:
                row["with checks"] = "stops: " + str(error).split(". ")[0]
            rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def _model_at(config: ModelConfig, exponent: float, seed: int) -> ByteLM:
    """A model whose first channel cumulates ``exponent`` in a chunk at A = -N, whatever it reads.
    """
    torch.manual_seed(seed)
    model = ByteLM(config)
    mixer = ssm_layers(model)[0]
    dt = torch.tensor(exponent / (CHUNK * float(mixer.A_log[0].exp().max())))
    mixer.dt_proj.weight[0] = 0
    mixer.dt_proj.bias[0] = inverse_softplus(dt)
    return model


def _lost_gradients(model: ByteLM) -> int:
    """Parameters whose gradient holds an inf or nan."""
    return sum(not bool(torch.isfinite(q.grad).all()) for q in model.parameters()
               if q.grad is not None)


def _bare_step(model: ByteLM, tokens: Tensor, train: TrainConfig) -> dict[str, object]:
    """Columns of ``cross_the_bound``: what a step without any check leaves of the model."""
    step = EagerStep(model, make_optimizer(model, train), lambda _: (tokens,), train)
    loss = step.backward((tokens,))
    before = _lost_gradients(model)
    norm = step.clip()
    after = _lost_gradients(model)
    step.update()
    weights = list(model.parameters())
    bad = sum(int((~torch.isfinite(q)).sum()) for q in weights)
    return {
        "loss, nats": loss.item(), "gradient norm": norm.item(),
        "gradients lost before clipping": f"{before} of {len(weights)}",
        "gradients lost after clipping": f"{after} of {len(weights)}",
        "weights lost after the step, share": bad / sum(q.numel() for q in weights),
    }


