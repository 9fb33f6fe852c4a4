"""Study: is the gradient that crosses a chunk boundary the gradient of the recurrence?

Let a boundary lie after step p. The gradient of a loss on the steps after p reaches everything
before it through one tensor, the state h_p: with g = dLoss/dh_p,

    dLoss/dh_0 = (prod_{s <= p} a_s) g          dLoss/db_k = (prod_{k < s <= p} a_s) g

so what a chunked form must get right is g, which its second chunk sends back through the carry,
and the products, which shrink with the distance p - k. *Truncation* (a detached carry) sets all of
this to zero: the earlier steps then learn from their own chunk alone.

The document's form hands its gradient across the boundary like any other; but it is the gradient
of its own formula, h_t = a_t (h_{t-1} + b_t), in which b_k is decayed once more: dLoss/db_k is
a_k times the true one. A check of the gradient against differences of the same form
(``gradcheck``) passes and cannot see this; a comparison with the recurrence does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.scans import (
    ANY_CHUNK,
    INPUTS,
    Scan,
    check_forms,
    one_thread,
    relative_rms,
    runnable,
    scan_of,
)
from mambabyte.blocks import AttentionState, Block, LayerState, MambaMixer, MambaState
from mambabyte.config import PRESETS, ModelConfig
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops import selective_scan
from mambabyte.ops.sequential import sequential_scan

# Forms that compute the recurrence and are within their bounds at these decays.
RIGHT = ("sequential", "chunked", "fused", "corrected_cumsum", "pairwise", "segment_sum",
         "associative")
DOCUMENT_DIFFERENCE = 0.13  # %, scan against step, as the document measured it
SYMBOLS = 4  # of the recall task: 0..3 distractors, 4..7 marked symbols, 8 the query
QUERY = 2 * SYMBOLS


def make_inputs(
    length: int, channels: int, states: int, seed: int, batch: int = 2
) -> list[Tensor]:
    """float64 inputs as at the document's initialisation: dt log-uniform, A = -(1..N)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    uniform = torch.rand(channels, generator=g, dtype=torch.float64)
    base = 1e-3 * (0.1 / 1e-3) ** uniform  # (D,), as softplus(bias) is drawn
    delta = base * torch.exp(0.2 * normal(batch, length, channels))
    A = -torch.arange(1, states + 1, dtype=torch.float64).repeat(channels, 1)
    return [
        normal(batch, length, channels), delta, A, normal(batch, length, states),
        normal(batch, length, states), normal(batch, channels, states),
    ]


# ------------------------------------------------------------------------------- the boundaries


def later_loss_gradients(
    scan: Scan, tensors: list[Tensor], chunk: int, boundary: int, weight: Tensor,
    detach: bool = False,
) -> dict[str, Tensor]:
    """Gradients of a loss on the steps from ``boundary`` on, one name to each.

    "h" is the gradient of the state at the boundary. With ``detach`` the carry is cut there, as in
    truncated training. The scan runs in two calls that meet at the boundary, the first ending in
    the state that the second starts from.
    """
    u, delta, A, B, C, state = (t.clone().requires_grad_() for t in tensors)
    _, carry = scan(u[:, :boundary], delta[:, :boundary], A, B[:, :boundary], C[:, :boundary],
                    state, chunk)
    handed = carry.detach().requires_grad_() if detach else carry
    if not detach:
        handed.retain_grad()
    y, _ = scan(u[:, boundary:], delta[:, boundary:], A, B[:, boundary:], C[:, boundary:],
                handed, chunk)
    (y * weight[:, boundary:].to(y.dtype)).sum().backward()
    leaves = dict(zip(INPUTS, (u, delta, A, B, C, state), strict=True))
    found = {f"d {n}": torch.zeros_like(t) if t.grad is None else t.grad
             for n, t in leaves.items()}
    assert handed.grad is not None
    return found | {"d h": handed.grad}


def whole_gradients(scan: Scan, tensors: list[Tensor], chunk: int, boundary: int,
                    weight: Tensor) -> dict[str, Tensor]:
    """The same loss with the scan in one call, its own chunks and carries inside."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, _ = scan(*leaves, chunk)
    loss = (y[:, boundary:] * weight[:, boundary:].to(y.dtype)).sum()
    return {f"d {n}": g for n, g in zip(INPUTS, torch.autograd.grad(loss, leaves), strict=True)}


def boundary_frame(p: Parameters) -> pd.DataFrame:
    """One row a (form, precision, boundary, gradient): relative error against the recurrence.

    The reference is the whole recurrence in float64. Of u, delta and B the gradient at the steps
    before the boundary is compared (that of C is zero there), of A and the initial state all of
    it. "truncated" cuts the carry at the boundary.
    """
    exact = make_inputs(p.length, p.channels, p.states, p.seed)
    weight = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(p.seed + 1),
                         dtype=torch.float64)
    rows = []
    for boundary in range(p.chunk, p.length, p.chunk):
        reference = whole_gradients(sequential_scan, exact, 0, boundary, weight)
        for form, precision in [(f, d) for f in p.forms for d in ("float64", "float32")]:
            tensors = [t.to(getattr(torch, precision)) for t in exact]
            found = whole_gradients(scan_of(form), tensors, p.chunk, boundary, weight)
            rows += _boundary_rows(form, precision, boundary, found, reference)
        cut = later_loss_gradients(sequential_scan, exact, 0, boundary, weight, detach=True)
        rows += _boundary_rows("truncated", "float64", boundary, cut, reference)
    return pd.DataFrame(rows)


def _boundary_rows(
    form: str, precision: str, boundary: int, found: dict[str, Tensor],
    reference: dict[str, Tensor],
) -> list[dict[str, object]]:
    rows = []
    for name in ("d u", "d delta", "d B", "d A", "d initial state"):
        value, exact = found[name], reference[name]
        if name in ("d u", "d delta", "d B"):
            value, exact = value[:, :boundary], exact[:, :boundary]
        rows.append({"form": form, "precision": precision, "boundary, step": boundary,
                     "gradient": name, "relative error": relative_rms(value, exact)})
    return rows


def distance_frame(p: Parameters) -> pd.DataFrame:
    """Gradient of u at each distance before the last boundary: its size, and each form's error.

    The error at a distance is relative to the true gradient *there*, which shrinks with distance.
    """
    exact = make_inputs(p.length, p.channels, p.states, p.seed)
    weight = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(p.seed + 1),
                         dtype=torch.float64)
    boundary = (p.length - 1) // p.chunk * p.chunk
    reference = whole_gradients(sequential_scan, exact, 0, boundary, weight)["d u"]
    size = reference.square().mean((0, 2)).sqrt()
    found = {}
    for form in p.forms:
        tensors = [t.float() for t in exact]
        gradient = whole_gradients(scan_of(form), tensors, p.chunk, boundary, weight)["d u"]
        error = (gradient.double() - reference).square().mean((0, 2)).sqrt()
        found[form] = error[:boundary] / size[:boundary]
    rows = []
    for distance in range(1, boundary + 1):
        at = boundary - distance
        row: dict[str, object] = {"distance, steps": distance,
                                  "size of the gradient of u": float(size[at])}
        row |= {f"error of {form}": float(error[at]) for form, error in found.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def gradcheck_frame(p: Parameters) -> pd.DataFrame:
    """float64 gradcheck of each form over two boundaries, and the same form against the recurrence.

    The first says that a form's gradient is that of its own value, the second that the value and
    the gradient are those of the recurrence.
    """
    u, delta, A, B, C, state = make_inputs(7, 2, 2, p.seed, batch=1)
    delta = delta * 10  # decays strong enough to tell two recurrences apart
    inputs = tuple(t.clone().requires_grad_() for t in (u, delta, A, B, C, state))
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(p.seed),
                         dtype=torch.float64)
    reference = whole_gradients(sequential_scan, list(inputs), 0, 0, weight)
    y_exact, _ = sequential_scan(u, delta, A, B, C, state)
    rows = []
    for form in p.forms:
        scan = scan_of(form)

        def call(*tensors: Tensor, scan: Scan = scan) -> tuple[Tensor, Tensor]:
            return scan(*tensors, 3)

        consistent = torch.autograd.gradcheck(call, inputs, raise_exception=False)
        found = whole_gradients(scan, list(inputs), 3, 0, weight)
        rows.append({
            "form": form, "gradcheck passes": bool(consistent),
            "value against the recurrence": relative_rms(call(*inputs)[0].detach(), y_exact),
            "gradients against the recurrence": max(
                relative_rms(found[name], reference[name]) for name in found)})
    return pd.DataFrame(rows)


# -------------------------------------------------------- the document's difference of 0.13 %


def _initialise(model: ByteLM, uniform: bool, seed: int) -> None:
    """Redraw softplus(dt bias) uniformly, as the document's words say, instead of log-uniformly."""
    if not uniform:
        return
    g = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        assert isinstance(layer, Block)
        if isinstance(layer.mixer, MambaMixer):
            dt = torch.rand(layer.mixer.dt_proj.bias.shape, generator=g) * (0.1 - 1e-3) + 1e-3
            with torch.no_grad():
                layer.mixer.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def scan_against_step(p: Parameters) -> pd.DataFrame:
    """The untrained mamba_byte model on 80 bytes: parallel scan against one step at a time.

    The steps are the recurrence itself. For each draw of the weights, precision and scan form:
    relative difference of the logits, and of the scan's output alone in the first layer. If
    float64 shows the same difference as float32, it is not rounding.
    """
    corpus = load_corpus(p.corpus)
    rows = []
    for draw in range(p.draws):
        tokens = sample_windows(corpus.train, 80, 1, p.seed, draw)[:, :-1]
        for uniform in (False, True):
            for precision in ("float32", "float64"):
                for form in ("document_chunked", "corrected_cumsum", "chunked"):
                    torch.manual_seed(p.seed + draw)
                    model = ByteLM(replace(PRESETS["mamba_byte"].model, scan_form=form))
                    _initialise(model, uniform, p.seed + draw)
                    model = model.to(getattr(torch, precision))
                    scan, step = _logits_and_scan(model, tokens)
                    rows.append({
                        "draw": draw, "dt": "uniform" if uniform else "log-uniform",
                        "precision": precision, "form": form,
                        "logits, relative RMS, %": 100 * relative_rms(scan[0], step[0]),
                        "logits, largest over largest, %": 100 * float(
                            (scan[0] - step[0]).abs().max() / step[0].abs().max()),
                        "scan alone, relative RMS, %": 100 * relative_rms(scan[1], step[1])})
    return pd.DataFrame(rows)


def _logits_and_scan(
    model: ByteLM, tokens: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits, first layer's scan output) by the model's form, and one step at a time."""
    layer = model.layers[0]
    assert isinstance(layer, Block)
    mixer = layer.mixer
    assert isinstance(mixer, MambaMixer)
    form = mixer.form
    found = []
    for name in (form, "sequential"):
        for block in model.layers:
            assert isinstance(block, Block)
            if isinstance(block.mixer, MambaMixer):
                block.mixer.form = name
        logits, _ = model(tokens)
        u, delta, B, C, _, _ = mixer.scan_inputs(layer.norm(model.embedding(tokens)), None)
        y, _ = selective_scan(u, delta, -mixer.A_log.exp(), B, C, delta_bias=mixer.dt_proj.bias,
                              delta_softplus=True, form=name)
        found.append((logits, y))
    return found[0], found[1]


# --------------------------------------------------------------------- what truncation costs


def recall_batch(
    rng: np.random.Generator, batch: int, length: int, nearest: int = 1
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A marked symbol among distractors, asked for at the end: (tokens, answer, distance).

    The marked symbol stands ``nearest`` or more steps before the query, the last token. Recall
    needs the model to let the marked symbol alone into its state and to keep it there.
    """
    tokens = rng.integers(0, SYMBOLS, (batch, length))
    at = rng.integers(0, length - nearest, batch)
    answer = rng.integers(0, SYMBOLS, batch)
    tokens[np.arange(batch), at] = SYMBOLS + answer
    tokens[:, -1] = QUERY
    return torch.from_numpy(tokens), torch.from_numpy(answer), length - 1 - at


def _last_logits(model: ByteLM, tokens: Tensor, segment: int) -> Tensor:
    """Logits at the query, the state detached after every ``segment`` steps."""
    state: list[LayerState] | None = None
    logits = tokens
    for start in range(0, tokens.shape[1], segment):
        logits, state = model(tokens[:, start : start + segment], state)
        state = [_detached(s) for s in state]
    return logits[:, -1, :SYMBOLS]


def _detached(state: LayerState) -> LayerState:
    if isinstance(state, MambaState):
        return MambaState(state.tail.detach(), state.ssm.detach())
    return AttentionState(state.k.detach(), state.v.detach(), state.position)


def recall_frame(p: Parameters, report: Callable[[str], None]) -> pd.DataFrame:
    """Accuracy of recall by distance after training with carries cut every so many steps.

    Two tasks. In "any distance" the symbol may stand next to the query, so a model can learn what
    to keep within one segment and carry it further than any gradient went. In "far only" it
    stands more than ``recall_far`` steps before: no segment up to that length ever joins the two.
    Chance is 1 in 4. Steps to learn: until the loss of the last 20 steps is below 0.1, None if
    never.
    """
    rows = []
    for seed in range(p.seed + 1, p.seed + 1 + p.recall_seeds):
        for task, nearest in (("any distance", 1), ("far only", p.recall_far + 1)):
            for segment in p.segments:
                if task == "far only" and segment < p.recall_far:
                    continue  # shorter than a length that already cannot
                model, losses = _train_recall(segment, nearest, p, seed)
                learned = _steps_to_learn(losses)
                report(f"recall, {task}, gradient reaches {segment} steps, seed {seed}: "
                       f"loss {np.mean(losses[-20:]):.3f}")
                rng = np.random.default_rng([seed, 2**31])
                with torch.no_grad():
                    tokens, answer, distance = recall_batch(rng, 4096, p.recall_length)
                    last = _last_logits(model, tokens, p.recall_length)
                right = (last.argmax(-1) == answer).numpy()
                width = max(1, p.recall_length // 8)
                for low in range(0, p.recall_length, width):
                    inside = (distance > low) & (distance <= low + width)
                    if inside.any():
                        rows.append({
                            "task": task, "gradient reaches, steps": segment, "seed": seed,
                            "distance up to, steps": low + width,
                            "accuracy": float(right[inside].mean()),
                            "steps to learn": learned})
    frame = pd.DataFrame(rows)
    # dtype object keeps None, "never", apart from nan.
    frame["steps to learn"] = pd.Series([row["steps to learn"] for row in rows], dtype=object)
    return frame


def _steps_to_learn(losses: list[float]) -> int | None:
    means = np.convolve(losses, np.full(20, 1 / 20), "valid")
    below = np.flatnonzero(means < 0.1)
    return int(below[0]) + 20 if len(below) else None


def _train_recall(
    segment: int, nearest: int, p: Parameters, seed: int
) -> tuple[ByteLM, list[float]]:
    torch.manual_seed(seed)
    model = ByteLM(ModelConfig(vocab_size=QUERY + 1, d_model=32, n_layer=1, d_state=8,
                               embed_std=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng([seed, 1])
    losses = []
    for step in range(p.recall_steps):
        warm, cool = (step + 1) / 20, 2 * (p.recall_steps - step) / p.recall_steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, warm, cool)
        tokens, answer, _ = recall_batch(rng, 32, p.recall_length, nearest)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(_last_logits(model, tokens, segment), answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


# ------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Parameters:
    """Sizes of the scans that are compared and of the recall task. Lengths in steps."""

    forms: tuple[str, ...] = (
        "sequential", "chunked", "fused", "corrected_cumsum", "document_chunked", "segment_sum",
        "associative")
    length: int = 128
    chunk: int = 32
    channels: int = 8
    states: int = 16
    seed: int = 0
    corpus: str = "stdlib"
    # Draws of the untrained model's weights for the comparison of scan and step.
    draws: int = 3
    # How far the gradient reaches in training for recall; the last is the whole sequence.
    segments: tuple[int, ...] = (4, 8, 32)
    recall_length: int = 32
    recall_far: int = 8
    recall_steps: int = 200
    recall_seeds: int = 3

    def __post_init__(self) -> None:
        check_forms(self.forms)
        if not 1 <= self.chunk < self.length:
            raise UserError(f"chunk {self.chunk} and length {self.length}: there is a boundary "
                            "only with 1 <= chunk < length")
        numbers = (self.channels, self.states, self.draws, self.recall_steps, self.recall_seeds,
                   *self.segments)
        if min(numbers) < 1:
            raise UserError("channels, states, draws, recall_steps, recall_seeds and segments "
                            "must be 1 or more")
        if not 1 <= self.recall_far < self.recall_length - 1:
            raise UserError(f"recall_far {self.recall_far} must lie inside recall_length "
                            f"{self.recall_length}")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        forms=ANY_CHUNK, length=512, channels=16, draws=20, segments=(2, 4, 8, 16, 48),
        recall_length=48, recall_far=16, recall_steps=600, recall_seeds=5),
}


@dataclass(frozen=True)
class Gradients:
    """What the study found."""

    boundaries: pd.DataFrame  # error of each gradient at every boundary
    distances: pd.DataFrame  # size and error of the gradient by distance
    checks: pd.DataFrame  # gradcheck, and the comparison that it cannot make
    steps: pd.DataFrame  # scan against step in the untrained model
    recall: pd.DataFrame  # accuracy by distance after truncated training


def run(p: Parameters, report: Callable[[str], None]) -> Gradients:
    """Boundaries, distances, gradcheck, scan against step, recall. Seeded throughout."""
    p = replace(p, forms=runnable(p.forms))
    with one_thread():
        report("gradients at every boundary")
        boundaries, distances = boundary_frame(p), distance_frame(p)
        report("gradcheck")
        checks = gradcheck_frame(p)
        report("scan against step in the untrained model")
        steps = scan_against_step(p)
        return Gradients(boundaries, distances, checks, steps, recall_frame(p, report))


def headline(found: Gradients) -> dict[str, tuple[float | bool | int | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    errors = found.boundaries
    single = errors[errors["precision"] == "float32"]
    right = single[single["form"].isin(RIGHT)]
    document = errors[(errors["form"] == "document_chunked")
                      & (errors["precision"] == "float64")]
    carried = document[document["gradient"] == "d initial state"]["relative error"]
    inputs = document[document["gradient"] == "d u"]["relative error"]
    cut = errors[(errors["form"] == "truncated") & (errors["gradient"] == "d A")]
    own = found.steps[(found.steps["form"] == "document_chunked")
                      & (found.steps["dt"] == "log-uniform")].set_index("precision")
    chunked = found.steps[found.steps["form"] == "chunked"].set_index("precision")
    logits, alone = "logits, relative RMS, %", "scan alone, relative RMS, %"
    recall = found.recall
    longest = recall["gradient reaches, steps"].max()
    shortest = recall["gradient reaches, steps"].min()
    far = recall[recall["task"] == "far only"]
    anywhere = recall[recall["task"] == "any distance"]

    def reach(frame: pd.DataFrame, segment: int, column: str) -> float | None:
        values = frame[frame["gradient reaches, steps"] == segment][column].dropna()
        return float(values.mean()) if len(values) else None

    return {
        "worst_right_form": (float(right["relative error"].max()), "",
                             "largest error of a right form in float32, any boundary"),
        "worst_epsilon": (
            float(single[single["form"] == "epsilon"]["relative error"].max())
            if "epsilon" in set(single["form"]) else None, "",
            "the same of the form with a small constant in the denominator"),
        "document_input_gradient": (100 * float(inputs.max()), "%",
                                    "error of the document's gradient of u, float64"),
        "document_state_gradient": (float(carried.max()), "",
                                    "error of its gradient of the initial state, float64"),
        "document_gradcheck": (bool(found.checks.set_index("form").loc[
            "document_chunked", "gradcheck passes"]), "", "its gradcheck passes")
        if "document_chunked" in set(found.checks["form"]) else (None, "", "not in this run"),
        "truncated_a": (100 * float(cut["relative error"].mean()), "%",
                        "error of the gradient of A when the carry is cut, mean of boundaries"),
        "difference_float32": (float(own.loc[["float32"], logits].mean()), "%",
                               "logits, document's scan against step, mean of draws"),
        "difference_float64": (float(own.loc[["float64"], logits].mean()), "%",
                               "the same in float64"),
        "difference_low": (float(own.loc[["float64"], logits].min()), "%", "lowest draw"),
        "difference_high": (float(own.loc[["float64"], logits].max()), "%", "highest draw"),
        "difference_scan_alone": (float(own.loc[["float64"], alone].mean()), "%",
                                  "output of the first layer's scan alone, float64"),
        "rounding_float32": (float(chunked.loc[["float32"], logits].mean()), "%",
                             "logits, a right chunked scan against step, float32"),
        "document_difference": (DOCUMENT_DIFFERENCE, "%", "as the document measured it"),
        "steps_to_learn_full": (reach(anywhere, longest, "steps to learn"), "steps",
                                "recall at any distance, nothing cut"),
        "steps_to_learn_cut": (reach(anywhere, shortest, "steps to learn"), "steps",
                               "the same, gradient cut at the shortest segment"),
        "shortest_segment": (int(shortest), "steps", "shortest reach of the gradient"),
        "far_full": (reach(far, longest, "accuracy"), "",
                     "accuracy, trained on far symbols only, nothing cut"),
        "far_cut": (reach(far, int(far["gradient reaches, steps"].min()), "accuracy"), "",
                    "the same, gradient cut short of the distance"),
    }
