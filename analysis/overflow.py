"""Study: where each form of the scan goes wrong, how it shows, and whether training gets there.

With a per-step log-decay of -x (x = |delta A|) and chunks of T steps the cumulated log-decay ends
at -T x. Write F = ln(largest float): 88.72 in float32 and bfloat16, 11.09 in float16. Then, of the
forms that make the weight exp(cs_t - cs_k) out of cumulated sums:

==================  ========================  =====================================
form                fails once                because
==================  ========================  =====================================
document_chunked    (T - 1) x > F             exp(-cs_{T-1}) is inf
corrected_cumsum    T x > F                   exp(-cs_T) is inf
centred             T x > 2 F                 either half of the chunk as above
late_mask           (T - 1) x > F, backward   0 * inf in the gradient of the masked part
clamped             T x > 80, silently        newest inputs weighted by exp(cs + 80)
epsilon             T x > 23, silently (1 %)  newest inputs weighted by 1/(1 + 1e-12 exp(-cs))
==================  ========================  =====================================

The same forms have a quieter fault in the gradient. The weight of an input at its own step, 1, is
made of exp(cs_t) and exp(-cs_t), so the gradient of cs_t gets two terms that should cancel and
leave a rest of eps |g b|, eps the rounding unit. The true gradient of the decay is of size
exp(-x) |g b|: at x > ln(1 / eps) = 16 in float32 the rest is all there is, at x = 11 it is 1 %.
segment_sum, associative and the stable chunks form no such difference.

A failure is *loud* when it leaves inf or nan, *silent* when the result is finite and off by more
than 1 %. The document's form is measured against the recurrence that its formula computes (see
mambabyte.ops.cumsum); its distance from the definition is a column of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.pool import run_jobs
from analysis.scans import (
    ANY_CHUNK,
    INPUTS,
    PUBLISHED,
    Scan,
    check_forms,
    one_thread,
    runnable,
    scan_of,
)
from mambabyte.blocks import Block, MambaMixer
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, record_exponent_headroom
from mambabyte.ops.sequential import sequential_scan
from mambabyte.optim import learning_rate, make_optimizer
from mambabyte.train import NonFiniteError, autocast, train_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# "bf16 inputs": u, delta, B and C rounded to bfloat16, all arithmetic in float32.
PRECISIONS = (*DTYPES, "bf16 inputs")
THRESHOLDS = (1e-6, 1e-3, 1e-2)
SILENT = 1e-2
CROSSED = "first step above the bound"


# --------------------------------------------------------------------------- the analytic bound


def log_max(dtype: str = "float32") -> float:
    """ln of the largest number of the type that a form accumulates in."""
    return math.log(torch.finfo(DTYPES.get(dtype, torch.float32)).max)


def boundary(form: str, decay: float, dtype: str = "float32") -> float:
    """The chunk length, in steps, above which ``form`` fails at a per-step log-decay -decay.

    inf for a form without a bound. See the module's table; ``chunk`` is the whole length for
    document_cumsum.
    """
    limit = log_max(dtype)
    steps = {
        "document_chunked": limit / decay + 1,
        "document_cumsum": limit / decay + 1,
        "late_mask": limit / decay + 1,
        "corrected_cumsum": limit / decay,
        "centred": 2 * limit / decay + 1,
        "clamped": min(80.0, limit - 1) / decay,
        "epsilon": math.log(1e12 * SILENT) / decay,
    }
    return steps.get(form, math.inf)


def share_past_bound(
    length: int, states: int = 16, dt_min: float = 1e-3, dt_max: float = 1e-1,
    limit: float | None = None,
) -> float:
    """Share of (channel, state) pairs whose whole-sequence exponent overflows at ``length``.

    At initialisation A = -n for n = 1..N and dt is log-uniform in [dt_min, dt_max]. Pair (d, n)
    overflows when (length - 1) n dt > F: the published exponent stops one step short. So the
    share is the mean over n of P(dt > F / (n (length - 1))), each a ratio of logarithms.
    """
    limit = log_max() if limit is None else limit
    if length < 2:
        return 0.0
    spread = math.log(dt_max / dt_min)
    shares = [
        min(1.0, max(0.0, math.log(dt_max * n * (length - 1) / limit) / spread))
        for n in range(1, states + 1)
    ]
    return sum(shares) / states


# -------------------------------------------------------------------------------- the error map


def inputs(
    decays: Sequence[float], length: int, channels: int, states: int, kind: str, seed: int,
) -> list[Tensor]:
    """float64 u, delta, A, B, C and initial state; row i of the batch decays by ``decays[i]``.

    The rows differ in nothing else, so a row is the same whatever others stand beside it.
    ``kind`` "constant" has delta = decays[i] at every step, "data-dependent" a log-normal factor
    of mean 1 and sigma 0.5 besides. A is -1 everywhere, so delta is the log-decay itself.
    """
    g = torch.Generator().manual_seed(seed)
    rows = len(decays)

    def normal(*shape: int) -> Tensor:
        one = torch.randn(1, *shape, generator=g, dtype=torch.float64)
        return one.repeat(rows, *(1 for _ in shape))

    delta = torch.tensor(decays, dtype=torch.float64)[:, None, None].expand(rows, length, channels)
    if kind == "data-dependent":
        delta = delta * torch.exp(0.5 * normal(length, channels) - 0.125)
    return [
        normal(length, channels), delta.contiguous(),
        -torch.ones(channels, states, dtype=torch.float64),
        normal(length, states), normal(length, states), normal(channels, states),
    ]


def published_recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """``h_t = a_t (h_{t-1} + b_t)``, step by step: what the document's formula amounts to."""
    ys = []
    for u_t, delta_t, B_t, C_t in zip(
        u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        decay = torch.exp(delta_t.unsqueeze(-1) * A)
        state = decay * (state + (delta_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1))
        ys.append((state * C_t.unsqueeze(1)).sum(-1))
    return torch.stack(ys, 1), state


def results_of(scan: Scan, tensors: list[Tensor], chunk: int, seed: int) -> dict[str, Tensor]:
    """y, final state, and the gradient of each input of a random projection of both, by row.

    The rows of the batch share A, so its gradient comes from a second run in which the rows are
    channels of one sequence, each with its own copy of A (they share B and C too).
    """
    found = _value_and_gradients(scan, tensors, chunk, seed)
    u, delta, A, B, C, state = tensors
    rows, length, channels = u.shape
    beside = [
        u.transpose(0, 1).reshape(1, length, rows * channels),
        delta.transpose(0, 1).reshape(1, length, rows * channels),
        A.repeat(rows, 1), B[:1], C[:1], state.reshape(1, rows * channels, -1),
    ]
    gradient = _value_and_gradients(scan, beside, chunk, seed, copies=rows)["d A"]
    return {**found, "d A": gradient.reshape(rows, channels, -1)}


def _value_and_gradients(
    scan: Scan, tensors: list[Tensor], chunk: int, seed: int, copies: int = 1
) -> dict[str, Tensor]:
    """``copies``: how often the projection is repeated along the channels."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, state = scan(*leaves, chunk)
    g = torch.Generator().manual_seed(seed + 1)
    channels = y.shape[2] // copies
    w = torch.randn(1, y.shape[1], channels, generator=g, dtype=torch.float64)
    v = torch.randn(1, channels, state.shape[2], generator=g, dtype=torch.float64)
    w, v = w.repeat(1, 1, copies).to(y.dtype), v.repeat(1, copies, 1).to(y.dtype)
    gradients = torch.autograd.grad((y * w).sum() + (state * v).sum(), leaves)
    found = {"y": y.detach().double(), "final state": state.detach().double()}
    return found | {f"d {n}": t.double() for n, t in zip(INPUTS, gradients, strict=True)}


def relative_errors(value: Tensor, reference: Tensor) -> Tensor:
    """max |value - reference| / max |reference| of each row; inf or nan where the value has one.
    """
    value, reference = value.flatten(1), reference.flatten(1)
    scale = reference.abs().amax(1).clamp_min(1e-300)
    error = (value - reference).abs().amax(1) / scale
    error = torch.where(value.isinf().any(1), math.inf, error)
    return torch.where(value.isnan().any(1), math.nan, error)


def error_map(p: Parameters, report: Callable[[str], None]) -> pd.DataFrame:
    """One row a (kind, precision, form, chunk, decay): errors of value and gradients.

    Errors are relative to the largest value of the exact result; inf and nan stand for
    themselves.
    """
    parts = []
    for kind in p.kinds:
        exact = inputs(p.decays, p.length, p.channels, p.states, kind, p.seed)
        references = {
            "definition": results_of(sequential_scan, exact, 0, p.seed),
            "published": results_of(published_recurrence, exact, 0, p.seed),
        }
        for precision in p.precisions:
            forms = p.forms if precision == "float32" else p.low_precision_forms
            report(f"error map: {kind} decay, {precision}, {len(forms)} forms")
            tensors = _rounded(exact, precision)
            for form in forms:
                for chunk in p.chunks if form not in ("sequential", "document_cumsum") else (0,):
                    found = results_of(scan_of(form), tensors, chunk, p.seed)
                    parts.append(_map_rows(kind, precision, form, chunk or p.length, p.decays,
                                           found, references))
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Cell:
    """One cell of the map in detail."""

    row: pd.Series  # of the error map
    exponent: float  # largest cumulated log-decay of a chunk, nats
    bound: float  # the chunk length above which the form fails, steps
    positions: pd.DataFrame  # error of y by position, relative to the largest exact value
    first_bad: int | None  # first position that is off by more than 1 %, inf or nan


def cell(
    p: Parameters, form: str, decay: float, chunk: int, precision: str = "float32",
    kind: str = "constant",
) -> Cell:
    """The map's cell at any decay and chunk, on its grid or between, and where y goes wrong."""
    p = replace(p, forms=(form,), low_precision_forms=(form,), precisions=(precision,),
                kinds=(kind,), decays=(decay,), chunks=(chunk,))
    with one_thread():
        row = error_map(p, lambda line: None).iloc[0]
        exact = inputs(p.decays, p.length, p.channels, p.states, kind, p.seed)
        own: Scan = published_recurrence if form in PUBLISHED else sequential_scan
        reference = own(*exact, 0)[0][0]  # (L, channels)
        y = scan_of(form)(*_rounded(exact, precision), chunk)[0][0].double()
    error = ((y - reference).abs() / reference.abs().max()).amax(-1)
    bad = (~(error <= SILENT)).nonzero()
    exponents = F.pad(exact[1][0], (0, 0, 0, -p.length % chunk)).unflatten(0, (-1, chunk)).sum(1)
    return Cell(
        row, float(exponents.max()), boundary(form, decay, precision),
        pd.DataFrame({"position": range(p.length), "error": error.tolist()}),
        int(bad[0]) if len(bad) else None)


def _rounded(exact: list[Tensor], precision: str) -> list[Tensor]:
    if precision != "bf16 inputs":
        return [t.to(DTYPES[precision]) for t in exact]
    u, delta, A, B, C, state = exact
    u, delta, B, C = (t.bfloat16() for t in (u, delta, B, C))
    return [t.float() for t in (u, delta, A, B, C, state)]


def _map_rows(
    kind: str, precision: str, form: str, chunk: int, decays: Sequence[float],
    found: dict[str, Tensor], references: dict[str, dict[str, Tensor]],
) -> pd.DataFrame:
    own = references["published" if form in PUBLISHED else "definition"]
    errors = {name: relative_errors(found[name], own[name]) for name in found}
    value = _worst(errors["y"], errors["final state"])
    gradient = _worst(*(errors[f"d {n}"] for n in INPUTS))
    against = _worst(*(relative_errors(found[n], references["definition"][n])
                       for n in ("y", "final state")))
    columns: dict[str, object] = {
        "kind": kind, "precision": precision, "form": form, "chunk": chunk, "decay": list(decays),
        "value error": value.tolist(), "gradient error": gradient.tolist(),
        "value error against the definition": against.tolist(),
    }
    columns |= {f"error of {name}": e.tolist() for name, e in errors.items()}
    frame = pd.DataFrame(columns)
    frame["value"] = [outcome(e) for e in frame["value error"]]
    frame["gradient"] = [outcome(e) for e in frame["gradient error"]]
    return frame


def _worst(*errors: Tensor) -> Tensor:
    """Elementwise worst: nan before inf before the largest number."""
    stacked = torch.stack(errors)
    worst = stacked.nan_to_num(nan=-1.0, posinf=math.inf).amax(0)
    return torch.where(stacked.isnan().any(0), math.nan, worst)


def outcome(error: float) -> str:
    """What an error means: right, rough (above 1e-3), silent (above 1e-2), inf or nan."""
    if math.isnan(error):
        return "nan"
    if math.isinf(error):
        return "inf"
    return "silent" if error > SILENT else "rough" if error > 1e-3 else "right"


def first_chunks(errors: pd.DataFrame, kind: str = "constant") -> pd.DataFrame:
    """For each form, precision and decay: the first chunk size at which each thing happens.

    Words, since a chunk may be "not up to 128". "bound, steps" is the analytic one.
    """
    rows = []
    chosen = errors[errors["kind"] == kind]
    for (precision, form, decay), group in chosen.groupby(
            ["precision", "form", "decay"], sort=False):
        group = group.sort_values("chunk")
        row: dict[str, object] = {"precision": precision, "form": form, "decay": decay}
        for part in ("value", "gradient"):
            error = group[f"{part} error"].to_numpy()
            chunk = group["chunk"].to_numpy()
            tests = {f"> {t:g}": ~(error <= t) for t in THRESHOLDS}
            tests |= {"inf": np.isinf(error), "nan": np.isnan(error)}
            for name, hit in tests.items():
                row[f"{part} {name}"] = (str(chunk[hit][0]) if hit.any()
                                         else f"not up to {chunk.max()}")
        bound = boundary(str(form), float(decay), str(precision))
        row["bound, steps"] = f"{bound:.1f}" if math.isfinite(bound) else "none"
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(errors: pd.DataFrame) -> pd.DataFrame:
    """One row a precision and form: in how many cells it fails and how, and what is worst."""
    rows = []
    for (precision, form), group in errors.groupby(["precision", "form"], sort=False):
        loud = group["value"].isin(["inf", "nan"]) | group["gradient"].isin(["inf", "nan"])
        silent = ~loud & ((group["value"] == "silent") | (group["gradient"] == "silent"))
        trap = group["value"].isin(["right", "rough"]) & group["gradient"].isin(["inf", "nan"])
        finite = group[~loud]
        rows.append({
            "precision": precision, "form": form, "cells": len(group),
            "loud": int(loud.sum()), "silent": int(silent.sum()),
            "right value, gradient lost": int(trap.sum()),
            "worst finite value error": finite["value error"].max(),
            "worst finite gradient error": finite["gradient error"].max(),
            "value error against the definition": group.loc[
                ~loud, "value error against the definition"].max()})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------- the untrained model


def pairs_past_bound(p: Parameters) -> pd.DataFrame:
    """Share of (channel, state) pairs past the bound of the whole-sequence trick, by length.

    Closed form from the initialisation, and counted in the untrained mamba_byte model on text:
    pairs whose exponent overflows, and channels with at least one such pair, whose output is lost.
    """
    corpus = load_corpus(p.corpus)
    torch.manual_seed(p.seed)
    model = ByteLM(PRESETS["mamba_byte"].model)
    longest = max(p.fraction_lengths)
    tokens = sample_windows(corpus.train, longest, 1, p.seed, 0)[:, :-1]
    exponents = torch.cat(_final_exponents(model, tokens), dim=1)  # (1, layers D, L, N)
    rows = []
    for length in p.fraction_lengths:
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
    x = model.embedding(tokens)
    for layer in model.layers:
        assert isinstance(layer, Block)
        mixer = layer.mixer
        if isinstance(mixer, MambaMixer):
            _, delta, *_ = mixer.scan_inputs(layer.norm(x), None)
            dt = F.softplus(delta + mixer.dt_proj.bias).double().cumsum(1)
            rate = mixer.A_log.double().exp()  # (D, N)
            found.append(dt.transpose(1, 2).unsqueeze(-1) * rate.unsqueeze(1))
        x, _ = layer(x, None)
    return found


def initial_exponents(p: Parameters) -> dict[str, float]:
    """Of the untrained mamba_byte model on text: the largest per-step and per-chunk exponent."""
    corpus = load_corpus(p.corpus)
    torch.manual_seed(p.seed)
    model = ByteLM(PRESETS["mamba_byte"].model)
    tokens = sample_windows(corpus.train, 128, 2, p.seed, 0)[:, :-1]
    found = {}
    for name, chunk in (("step", 1), ("chunk", 32)):
        with torch.no_grad(), record_exponent_headroom(model, chunk) as seen:
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
    optimizer = make_optimizer(model, train)
    rows: list[dict[str, object]] = []
    learned, ending = 0.0, f"trained {steps} steps"

    def record(step: int, tokens: Tensor) -> None:
        with torch.no_grad(), autocast(tokens.device, train.precision), \
                record_exponent_headroom(model, 32) as seen:
            loss = model.loss(tokens).item()
        rows.extend({"form": model_config.scan_form, "step": step, "layer": layer,
                     "largest exponent in 32 steps": value, "learning, sum of rates": learned,
                     "loss, nats": loss} for layer, value in seen.items())
        report(f"{model_config.scan_form}, step {step}: loss {loss:.3f}, "
               f"largest exponent {max(seen.values()):.1f}")

    for step in range(steps + 1):
        tokens = sample_windows(
            corpus.train, train.context, train.batch_size, train.seed, step).to(device)
        if step % every == 0 or step == steps:
            record(step, tokens)
        if step < steps:
            try:
                train_step(model, optimizer, tokens, train, step)
            except NonFiniteError as error:
                ending = str(error).split(". ")[0]
                report(ending)
                _use_form(model, "chunked")  # the exponents of the batch that was lost
                if step % every:
                    record(step, tokens)
                break
            learned += learning_rate(step, train)
    return pd.DataFrame(rows), ending


def _use_form(model: ByteLM, form: str) -> None:
    for layer in model.layers:
        assert isinstance(layer, Block)
        if isinstance(layer.mixer, MambaMixer):
            layer.mixer.form = form


def follow_forms(
    p: Parameters, report: Callable[[str], None]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same model trained with each form in turn: exponents, and one row a form how it ended."""
    if p.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: give device=cpu")
    model = replace(PRESETS["mamba_byte"].model, d_model=p.d_model, n_layer=p.n_layer)
    train = replace(PRESETS["mamba_byte"].train, batch_size=p.batch, context=p.context,
                    n_steps=p.schedule_steps, seed=p.seed, allow_study_form=True)
    frames, endings = [], []
    report("training with " + ", ".join(
        f"{form} (at most {steps} steps)"
        for form, steps in zip(p.trained_forms, p.trained_steps, strict=True)))
    jobs = [(replace(model, scan_form=form), train, p.corpus, steps, p.every, p.device)
            for form, steps in zip(p.trained_forms, p.trained_steps, strict=True)]
    done = run_jobs(follow_training, jobs, p.workers)
    for form, (frame, ending) in zip(p.trained_forms, done, strict=True):
        frames.append(frame)
        exponent = frame.groupby("step")["largest exponent in 32 steps"].max()
        above = exponent[exponent > log_max()]
        endings.append({
            "form": form, "ending": ending, "exponent at the start": exponent.iloc[0],
            "largest exponent": exponent.max(), "last exponent": exponent.iloc[-1],
            CROSSED: int(above.index[0]) if len(above) else None})
    ended = pd.DataFrame(endings)
    # dtype object keeps None, "it did not", apart from nan.
    ended[CROSSED] = pd.Series([row[CROSSED] for row in endings], dtype=object)
    return pd.concat(frames, ignore_index=True), ended


def extrapolate(followed: pd.DataFrame, train: TrainConfig) -> pd.DataFrame:
    """The largest exponent at the end of ``train``'s schedule, by form and layer.

    A line over the sum of learning rates through the measured points, carried on to the sum of
    the whole schedule. A line is a guess: the slope of the last half is given too.
    """
    total = sum(learning_rate(step, train) for step in range(train.n_steps))
    rows = []
    for (form, layer), group in followed.groupby(["form", "layer"], sort=False):
        x = group["learning, sum of rates"].to_numpy()
        y = group["largest exponent in 32 steps"].to_numpy()
        half = len(x) // 2
        slope, last = _slope(x, y), _slope(x[half:], y[half:])
        rows.append({
            "form": form, "layer": layer, "share of the schedule's learning": x[-1] / total,
            "first": y[0], "last measured": y[-1],
            "at the end, by a line": y[-1] + slope * (total - x[-1]),
            "at the end, by the last half": y[-1] + last * (total - x[-1]),
            "bound of float32": log_max()})
    return pd.DataFrame(rows)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.ptp(x) > 0 else 0.0


def cross_the_bound(p: Parameters) -> pd.DataFrame:
    """What one training step does to a model whose exponents are set below and above the bound.

    One channel of the first layer gets the step size whose chunk of 32 cumulates the given
    log-decay at A = -16. The step is the document's: loss, backward, clip at norm 1, AdamW,
    without any check. "with checks" is what this package's own step does.
    """
    corpus = load_corpus(p.corpus)
    config = ModelConfig(d_model=32, n_layer=2, scan_chunk=32)
    train = TrainConfig(allow_study_form=True)
    tokens = sample_windows(corpus.train, 96, 2, p.seed, 0)
    rows = []
    for form in ("document_chunked", "corrected_cumsum", "chunked"):
        for exponent in p.crossings:
            torch.manual_seed(p.seed)
            model = ByteLM(replace(config, scan_form=form))
            _set_exponent(model, exponent, 32)
            row: dict[str, object] = {"form": form, "exponent of 32 steps": exponent}
            row |= _bare_step(model, tokens, train)
            torch.manual_seed(p.seed)
            model = ByteLM(replace(config, scan_form=form))
            _set_exponent(model, exponent, 32)
            try:
                train_step(model, make_optimizer(model, train), tokens, train, 0)
                row["with checks"] = "goes on"
            except NonFiniteError as error:
                row["with checks"] = "stops: " + str(error).split(". ")[0]
            rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def _set_exponent(model: ByteLM, exponent: float, chunk: int) -> None:
    """The first channel's step size, whatever its input: exponent / (chunk * 16)."""
    layer = model.layers[0]
    assert isinstance(layer, Block)
    mixer = layer.mixer
    assert isinstance(mixer, MambaMixer)
    dt = torch.tensor(exponent / (chunk * float(mixer.A_log[0].exp().max())))
    mixer.dt_proj.weight[0] = 0
    mixer.dt_proj.bias[0] = dt + torch.log(-torch.expm1(-dt))


def _lost_gradients(model: ByteLM) -> int:
    """Parameters whose gradient holds an inf or nan."""
    return sum(bool((~torch.isfinite(q.grad)).any()) for q in model.parameters()
               if q.grad is not None)


def _bare_step(model: ByteLM, tokens: Tensor, train: TrainConfig) -> dict[str, object]:
    optimizer = make_optimizer(model, train)
    loss = model.loss(tokens)
    loss.backward()
    before = _lost_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    after = _lost_gradients(model)
    optimizer.step()
    weights = list(model.parameters())
    bad = sum(int((~torch.isfinite(q)).sum()) for q in weights)
    return {
        "loss, nats": loss.item(), "gradient norm": norm.item(),
        "gradients lost before clipping": f"{before} of {len(weights)}",
        "gradients lost after clipping": f"{after} of {len(weights)}",
        "weights lost after the step, share": bad / sum(q.numel() for q in weights),
    }


# ------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Parameters:
    """The grid of the error map, and how far the training is followed.

    ``chunks`` in steps, ``decays`` in nats a step, ``length`` the sequence in steps.
    """

    forms: tuple[str, ...] = ANY_CHUNK
    low_precision_forms: tuple[str, ...] = ("sequential", "corrected_cumsum", "segment_sum")
    precisions: tuple[str, ...] = PRECISIONS
    kinds: tuple[str, ...] = ("constant", "data-dependent")
    chunks: tuple[int, ...] = (4, 8, 16, 32, 48, 64, 96, 128)
    decays: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
    length: int = 128
    channels: int = 2
    states: int = 2
    seed: int = 0
    corpus: str = "stdlib"
    fraction_lengths: tuple[int, ...] = (16, 32, 48, 56, 57, 64, 96, 128, 256, 512, 1024)
    # Exponents of one channel when a training step crosses the bound on purpose.
    crossings: tuple[float, ...] = (60.0, 87.0, 90.0, 120.0)
    # The model that is trained: its width, layers, and how much of the schedule is done.
    d_model: int = 32
    n_layer: int = 2
    batch: int = 4
    context: int = 64
    schedule_steps: int = 4000
    # Scan forms that are trained with, and the steps of the schedule that each does at most.
    trained_forms: tuple[str, ...] = ("auto", "corrected_cumsum", "document_chunked")
    trained_steps: tuple[int, ...] = (600, 400, 400)
    every: int = 20
    # Where the training runs: cpu or cuda. The map is made on the CPU in either case.
    device: str = "cpu"
    workers: int = 1  # trainings beside each other: a GPU has room for all three

    def __post_init__(self) -> None:
        check_forms((*self.forms, *self.low_precision_forms))
        if set(self.precisions) - set(PRECISIONS):
            raise UserError(f"precisions {self.precisions}: choose from {', '.join(PRECISIONS)}")
        if set(self.kinds) - {"constant", "data-dependent"}:
            raise UserError(f"kinds {self.kinds}: choose from constant, data-dependent")
        if not self.decays or min(self.decays) <= 0:
            raise UserError("decays are nats a step, each above 0, at least one")
        if min(self.chunks, default=0) < 1 or min(self.length, self.every) < 1:
            raise UserError("chunks, length and every must be 1 or more")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"device {self.device!r}: choose cpu or cuda")
        if len(self.trained_forms) != len(self.trained_steps) or not self.trained_forms:
            raise UserError(f"trained_forms has {len(self.trained_forms)} entries and "
                            f"trained_steps {len(self.trained_steps)}: one number a form")


_FULL = Parameters(
    low_precision_forms=tuple(form for form in ANY_CHUNK if form != "fused"),
    chunks=(2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    decays=tuple(float(x) for x in np.round(np.geomspace(0.01, 20.0, 25), 6)),
    length=256, fraction_lengths=(*range(2, 65), 96, 128, 192, 256, 512, 1024, 2048),
    crossings=(60.0, 80.0, 87.0, 88.0, 89.0, 90.0, 95.0, 104.0, 120.0, 500.0),
    d_model=64, trained_steps=(4000, 4000, 4000), every=50)

PROFILES = {
    "quick": Parameters(),
    "full": _FULL,
    # The document's own configuration. The cumulated sums are slow: fewer steps of those.
    "gpu": replace(_FULL, d_model=192, n_layer=4, batch=16, context=1024, device="cuda",
                   trained_steps=(4000, 1200, 600), workers=3),
}


@dataclass(frozen=True)
class Overflow:
    """What the study found."""

    errors: pd.DataFrame  # the map: every cell
    first: pd.DataFrame  # first chunk size at which each thing happens, constant decay
    verdicts: pd.DataFrame  # one row a form
    pairs: pd.DataFrame  # share of pairs past the bound, by length
    followed: pd.DataFrame  # exponents while training, by form
    endings: pd.DataFrame  # how each training ended
    extrapolated: pd.DataFrame  # exponents at the end of the document's schedule
    crossing: pd.DataFrame  # what a step across the bound does
    document: pd.DataFrame  # the document's statements in numbers


def run(p: Parameters, report: Callable[[str], None]) -> Overflow:
    """The error map, the untrained model, the training, the crossing. Seeded throughout."""
    p = replace(p, forms=runnable(p.forms))
    with one_thread():
        errors = error_map(p, report)
        report("the untrained model")
        pairs = pairs_past_bound(p)
        followed, endings = follow_forms(p, report)
        report("crossing the bound on purpose")
        crossing = cross_the_bound(p)
        document = _document_frame(p)
    return Overflow(
        errors, first_chunks(errors), verdicts(errors), pairs, followed, endings,
        extrapolate(followed, PRESETS["mamba_byte"].train), crossing, document)


def _document_frame(p: Parameters) -> pd.DataFrame:
    exponents = initial_exponents(p)
    limit = log_max()
    fastest = 16 * 0.1
    rows = [
        ("overflow_at", "|cs| at which exp(-cs) overflows float32", "about 90", limit),
        ("exp_90_log10", "log10 of exp(90)", "39", 90 / math.log(10)),
        ("fastest_decay", "fastest per-step log-decay at initialisation: dt_max * N", "0.8",
         fastest),
        ("fastest_counted", "the same, counted on text", "0.8", exponents["step"]),
        ("length_at_0_8", "first length that overflows at 0.8 a step", "about 50",
         float(first_overflow(0.8))),
        ("length_at_1_6", "first length that overflows at 1.6 a step", "about 50",
         float(first_overflow(fastest))),
        ("chunk_exponent", "largest cumulated log-decay of 32 steps: 32 * dt_max * N", "26",
         32 * fastest),
        ("chunk_exponent_counted", "the same, counted on text", "26", exponents["chunk"]),
        ("largest_factor_log10", "log10 of the largest exp(log_decay - cs) in a chunk of 32",
         "0 (at most 1)", 31 * fastest / math.log(10)),
    ]
    return pd.DataFrame(rows, columns=["key", "statement", "document", "ours"])


def first_overflow(decay: float, dtype: str = "float32") -> int:
    """First length at which the whole-sequence trick as published overflows at that decay."""
    return math.floor(boundary("document_cumsum", decay, dtype)) + 1


def headline(found: Overflow) -> dict[str, tuple[float | str | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    document = found.document.set_index("key")["ours"]
    verdict = found.verdicts[found.verdicts["precision"] == "float32"].set_index("form")
    pairs = found.pairs.set_index("length, steps")
    ended = found.endings.set_index("form")
    first = found.endings["form"].iloc[0]  # the stable form, unless a run has none
    stable = found.followed[found.followed["form"] == first]
    last = stable[stable["step"] == stable["step"].max()]
    end = found.extrapolated[found.extrapolated["form"] == first]
    lost = found.crossing[found.crossing["form"] == "document_chunked"]
    lost = lost[lost["weights lost after the step, share"] > 0]
    longest = int(pairs.index.max())
    share = {n: float(pairs.loc[longest, f"{n}"]) for n in pairs.columns}
    return {
        "float32_bound": (document["overflow_at"], "nats", "cumulated log-decay that overflows"),
        "fastest_decay": (document["fastest_decay"], "nats a step", "dt_max * N at the start"),
        "fastest_counted": (document["fastest_counted"], "nats a step", "the same, on text"),
        "chunk_exponent": (document["chunk_exponent"], "nats", "32 steps of it"),
        "chunk_exponent_counted": (document["chunk_exponent_counted"], "nats",
                                   "largest exponent of 32 steps on text, untrained"),
        "first_length": (int(document["length_at_1_6"]), "steps",
                         "first length that overflows at 1.6 a step"),
        "first_length_at_0_8": (int(document["length_at_0_8"]), "steps",
                                "first length that overflows at 0.8 a step"),
        "largest_factor_log10": (document["largest_factor_log10"], "",
                                 "log10 of the factor claimed to be at most 1"),
        "late_mask_traps": (int(verdict.loc["late_mask", "right value, gradient lost"]), "cells",
                            "right value, gradient inf or nan, mask after the exponential")
        if "late_mask" in verdict.index else (None, "cells", "not in this run"),
        "clamped_silent": (int(verdict.loc["clamped", "silent"]), "cells",
                           "finite and off by more than 1 %, clamped exponent")
        if "clamped" in verdict.index else (None, "cells", "not in this run"),
        "clamped_loud": (int(verdict.loc["clamped", "loud"]), "cells", "inf or nan, clamped")
        if "clamped" in verdict.index else (None, "cells", "not in this run"),
        "map_cells": (int(verdict["cells"].max()), "cells", "cells of a form's map in float32"),
        "longest": (longest, "steps", "length of the next two"),
        "pairs_lost": (100 * share["counted, share of pairs"], "%",
                       "(channel, state) pairs past the bound at that length"),
        "pairs_closed_form": (100 * share["closed form, share of pairs"], "%",
                              "the same in closed form"),
        "channels_lost": (100 * share["counted, share of channels"], "%",
                          "channels with such a pair"),
        "start_exponent": (float(found.endings["exponent at the start"].max()), "nats",
                           "largest exponent of 32 steps before training"),
        "highest_exponent": (float(stable["largest exponent in 32 steps"].max()), "nats",
                             "largest exponent at any recorded step, stable form"),
        "trained_exponent": (float(last["largest exponent in 32 steps"].max()), "nats",
                             "largest exponent after the training, stable form"),
        "trained_steps": (int(stable["step"].max()), "steps", "steps trained, stable form"),
        # Carried on over more than was trained, a line is worth nothing.
        "extrapolated_exponent": (
            float(end["at the end, by a line"].max())
            if end["share of the schedule's learning"].max() >= 0.5 else None,
            "nats", "at the end of the document's schedule, by a line"),
        **_ending(ended, "auto", "stable"),
        **_ending(ended, "corrected_cumsum", "corrected"),
        **_ending(ended, "document_chunked", "document"),
        "weights_lost": (float(lost["weights lost after the step, share"].max()) * 100
                         if len(lost) else 0.0, "%",
                         "weights that are nan after one step across the bound"),
    }


def _ending(ended: pd.DataFrame, form: str, name: str) -> dict[
        str, tuple[float | str | None, str, str]]:
    row = ended.loc[form] if form in ended.index else None
    return {
        f"{name}_exponent": (None if row is None else float(row["largest exponent"]), "nats",
                             f"largest exponent of 32 steps while training with {form}"),
        f"{name}_crossed": (None if row is None else row[CROSSED], "step",
                            f"first recorded step above the bound, {form}"),
        f"{name}_ending": (None if row is None else str(row["ending"]), "",
                           f"how training with {form} ended"),
    }
