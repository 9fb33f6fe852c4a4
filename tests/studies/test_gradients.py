"""Gradients across chunk boundaries: right forms, the document's form, truncation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.measure.scans import scan_of
from analysis.studies.gradients import (
    boundary as boundary_gradients,
)
from analysis.studies.gradients import (
    compute as gradients,
)
from analysis.studies.gradients import (
    truncation,
)
from analysis.studies.gradients import (
    values as answers,
)
from analysis.studies.gradients.scan_against_step import scan_against_step
from mambabyte.errors import UserError
from mambabyte.ops.scan.recurrent import recurrent_scan

RIGHT = ("recurrent", "chunked", "corrected_cumsum", "segment_sum", "associative", "pairwise",
         "centred")
SMALL = boundary_gradients.Scans(
    forms=(*RIGHT, "document_chunked"), length=24, chunk=8, channels=3, states=4)


@pytest.fixture(scope="module")
def boundaries() -> pd.DataFrame:
    return boundary_gradients.boundary_frame(SMALL)


def test_right_forms_have_the_gradient_of_the_recurrence(boundaries: pd.DataFrame) -> None:
    chosen = boundaries[boundaries["form"].isin(RIGHT)]
    assert sorted(chosen["boundary, step"].unique()) == [8, 16]
    worst = chosen.groupby("precision")["relative error"].max()
    assert worst["float64"] < 1e-13
    assert worst["float32"] < 1e-5


def test_the_documents_gradient_is_off_in_float64_too(boundaries: pd.DataFrame) -> None:
    rows = boundaries[boundaries["form"] == "document_chunked"].set_index(
        ["precision", "gradient", "boundary, step"])["relative error"]
    for boundary in (8, 16):
        assert rows["float64", "d u", boundary] > 0.02
        assert rows["float64", "d u", boundary] == pytest.approx(
            rows["float32", "d u", boundary], rel=1e-3)
        # What it hands to the initial state is right: h_0 has no factor too many.
        assert rows["float64", "d initial state", boundary] < 1e-13


def test_the_documents_gradient_has_one_factor_too_many() -> None:
    exact = boundary_gradients.make_inputs(12, 2, 1, 0)
    weight = torch.ones_like(exact[0])
    own = boundary_gradients.whole_gradients(scan_of("document_chunked"), exact, 4, 8, weight)
    true = boundary_gradients.whole_gradients(recurrent_scan, exact, 0, 8, weight)
    decay = torch.exp(exact[1] * exact[2][:, 0])  # one state: a_k of each channel
    torch.testing.assert_close(own["d u"][:, :8], (decay * true["d u"])[:, :8])


def test_truncation_loses_everything_before_the_boundary(boundaries: pd.DataFrame) -> None:
    cut = boundaries[boundaries["form"] == "truncated"]
    lost = cut[cut["gradient"].isin(["d u", "d delta", "d B", "d initial state"])]
    assert (lost["relative error"] == 1).all()
    part = cut[cut["gradient"] == "d A"]["relative error"]
    assert ((part > 0.01) & (part < 1)).all()


def test_two_calls_through_the_state_are_one() -> None:
    exact = boundary_gradients.make_inputs(20, 2, 3, 1)
    weight = torch.randn(exact[0].shape, dtype=torch.float64)
    for form in ("recurrent", "chunked", "corrected_cumsum"):
        joined = boundary_gradients.whole_gradients(scan_of(form), exact, 5, 10, weight)
        parts = boundary_gradients.later_loss_gradients(scan_of(form), exact, 5, 10, weight)
        for name in joined:
            torch.testing.assert_close(joined[name], parts[name])
        assert parts["d h"].abs().sum() > 0


def test_gradcheck_passes_and_cannot_tell() -> None:
    checks = boundary_gradients.gradcheck_frame(SMALL).set_index("form")
    assert checks["gradcheck passes"].all()
    assert checks.loc["document_chunked", "gradients against the recurrence"] > 0.1
    assert (checks.loc[list(RIGHT), "gradients against the recurrence"] < 1e-12).all()


def test_error_keeps_its_size_by_distance() -> None:
    frame = boundary_gradients.distance_frame(SMALL)
    assert frame["distance, steps"].tolist() == list(range(1, 17))
    assert frame["error of chunked"].max() < 1e-5
    assert frame["error of document_chunked"].min() > 1e-4


def test_scan_against_step_is_not_rounding(text_file: object) -> None:
    frame = scan_against_step(str(text_file), 0, 1)
    column = "logits, relative RMS, %"
    means = frame[frame["dt"] == "log-uniform"].groupby(["form", "precision"])[column].mean()
    assert means["document_chunked", "float64"] == pytest.approx(
        means["document_chunked", "float32"], rel=1e-3)
    assert 0.05 < means["document_chunked", "float64"] < 1  # the document: 0.13
    assert means["chunked", "float32"] < 1e-3
    assert means["chunked", "float64"] < 1e-10


def test_recall_samples() -> None:
    tokens, answer, distance = truncation.recall_batch(np.random.default_rng(0), 500, 16, 5)
    assert tokens.shape == (500, 16)
    assert distance.min() >= 5
    assert distance.max() <= 15
    for row, right, d in zip(tokens.tolist(), answer.tolist(), distance, strict=True):
        assert row[-1] == truncation.QUERY
        assert row[15 - d] == truncation.SYMBOLS + right
        assert sum(t >= truncation.SYMBOLS for t in row) == 2


def test_truncated_training_has_no_gradient_from_before() -> None:
    model, _ = truncation.train_recall(16, 1, 16, 1, 0)
    tokens, answer, _ = truncation.recall_batch(np.random.default_rng(0), 8, 16, 9)
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    for segment in (16, 8):
        torch.nn.functional.cross_entropy(
            truncation.last_logits(model, tokens, segment), answer).backward()
    whole, first, second = embedded
    assert whole.grad is not None
    assert whole.grad[:, :8].abs().sum() > 0
    assert first.grad is None
    assert second.grad is not None


@pytest.mark.parametrize(("segment", "learns"), [(32, True), (8, False)])
def test_what_is_never_joined_is_never_learned(segment: int, learns: bool) -> None:
    p = gradients.Parameters()
    _, losses = truncation.train_recall(
        segment, p.recall_far + 1, p.recall_length, p.recall_steps, 1)
    assert (truncation.steps_to_learn(losses) is not None) == learns


def test_segments_that_all_fall_short_leave_the_far_task_unmeasured(text_file: object) -> None:
    p = gradients.Parameters(
        forms=("recurrent", "document_chunked"), length=16, chunk=8, channels=2, states=2,
        corpus=str(text_file), draws=1, segments=(2, 4), recall_steps=1, recall_seeds=1)
    found = gradients.run(p, lambda line: None)
    values = answers.values(found, p)
    assert values["far_full"].value is None
    assert values["far_cut"].value is None
    assert values["shortest_segment"].value == 2
    # One seed that never learned leaves no mean: of the others alone it would flatter.
    whole = found.recall["gradient reaches, steps"] == 4
    learned = pd.Series([100.0, 200.0], dtype=object)
    for last, mean in ((learned, 150.0), (learned.replace(200.0, None), None)):
        two = pd.concat([found.recall[whole].head(1)] * 2).assign(**{"steps to learn": last.array})
        changed = replace(found, recall=pd.concat([two, found.recall[~whole]]))
        assert answers.values(changed, p)["steps_to_learn_full"].value == mean


def test_bad_input() -> None:
    for bad in ({"forms": ("nothing",)}, {"chunk": 128}, {"draws": 0},
                {"recall_far": 40}, {"segments": (0,)}, {"segments": ()}, {"forms": ()}):
        with pytest.raises(UserError):
            gradients.Parameters(**bad)
