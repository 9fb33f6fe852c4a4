"""The ablation study: pairing, budgets, positions, and a tiny whole run."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.measure.statistics import paired_difference, paired_table, student_interval
from analysis.studies.ablation import compute as ablation
from analysis.studies.ablation import learning
from analysis.studies.ablation import values as answers
from analysis.studies.ablation.budgets import COMPARISONS, budget_steps, compare
from analysis.studies.ablation.learning import (
    Learned,
    bits_at,
    constant_rate,
    heldout_bits,
    heldout_windows,
    position_bits,
    window_bits,
)
from analysis.studies.ablation.tables import with_intervals, without_intervals
from analysis.studies.ablation.trained import accuracy_by_position, text_table, unigram_bits
from analysis.studies.ablation.values import _lead_values
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.evaluate import Score
from mambabyte.model import ByteLM
from mambabyte.train import optimise, text_step
from mambabyte.train.schedule import learning_rate, schedule

SMALL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", n_head=2, n_kv_head=2, d_state=4,
                    attention_window=32)

# ------------------------------------------------------------------------------------------ pairing


def test_paired_difference_by_hand():
    paired = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert paired.mean == 2.0
    assert paired.points == "+2.0000, +3.0000, +1.0000"
    assert paired.method == "Student's t"
    assert math.isnan(paired_difference([3.0, 5.0], [1.0, 2.0]).low)


def test_interval_of_many_pairs_is_near_students():
    rng = np.random.default_rng(1)
    a = rng.normal(0.5, 1.0, 60)
    paired = paired_difference(a.tolist(), [0.0] * 60)
    half = 2.0 * a.std(ddof=1) / math.sqrt(60)  # Student's t with 59 degrees: 2.0010
    assert paired.method == "BCa"
    assert paired.low == pytest.approx(a.mean() - half, abs=0.15 * half)
    assert paired.high == pytest.approx(a.mean() + half, abs=0.15 * half)


def test_a_records_interval_follows_from_its_points_today():
    """Whatever it was stored as: an old BCa interval, words, or nothing."""
    points = ["-0.16, -0.15, -0.17, -0.18, -0.14", "+0.1000, +0.2000", ""]
    old = pd.DataFrame({
        "pattern": ["M", "MA", "A"], "mean": [-0.16, 0.15, None],
        "low": ["-9.9", "few seeds", None],
        "high": ["9.9", "few seeds", None], "pairs": [5, 2, 0], "method": ["BCa", "BCa", "none"],
        "points": points})
    for stored in (old, without_intervals(old)):
        shown = with_intervals(stored)
        low, high = student_interval(np.array([-0.16, -0.15, -0.17, -0.18, -0.14]))
        assert shown["low"].tolist() == [f"{low:+.4f}", "few seeds", None]
        assert shown["high"].tolist() == [f"{high:+.4f}", "few seeds", None]
        assert shown["method"].tolist() == [
            "Student's t", "points only (2 seeds, fewer than 3)", "not measured"]
        assert shown["points"].tolist() == points
    assert not set(without_intervals(old)) & {"low", "high", "method"}


def test_the_text_is_a_sample_and_its_error_is_that_of_windows():
    torch.manual_seed(0)
    config = ModelConfig(d_model=8, n_layer=1, d_state=2, layer_pattern="A", n_head=2, n_kv_head=2)
    models = {(p, 0): ByteLM(config) for p in ("A", "other")}
    windows = torch.randint(0, 256, (40, 17))
    table = text_table(models, windows, "A").set_index("pattern")
    bits = window_bits(models["A", 0], windows)
    assert table.loc["A", "bits per byte"] == pytest.approx(heldout_bits(models["A", 0], windows))
    assert table.loc["A", "held-out bytes"] == 40 * 16
    assert table.loc["A", "error over the text"] == pytest.approx(
        bits.std(ddof=1) / 40**0.5, rel=0.1)
    apart = window_bits(models["other", 0], windows) - bits
    assert table.loc["other", "minus A"] == pytest.approx(apart.mean())
    assert table.loc["other", "its error"] == pytest.approx(apart.std(ddof=1) / 40**0.5, rel=0.1)


def test_pairing_removes_what_seeds_share():
    # Seeds differ by 10, systems by 0.1: unpaired the difference would drown.
    seeds = np.arange(6) * 10.0
    wiggle = np.array([0.01, -0.01, 0.02, -0.02, 0.0, 0.01])
    paired = paired_difference(seeds + 0.1 + wiggle, seeds)
    assert paired.low > 0.05
    assert paired.high < 0.15


def test_degenerate_interval_says_so():
    paired = paired_difference([2.0] * 12, [1.0] * 12)
    assert paired.low == paired.high == 1.0
    assert paired.method.startswith("percentile")


def test_pairs_must_pair_up():
    with pytest.raises(UserError, match="do not pair up"):
        paired_difference([1.0, 2.0], [1.0])


def test_paired_table_uses_common_seeds_and_needs_its_reference():
    frame = pd.DataFrame({"pattern": ["A", "A", "M", "M", "M"], "seed": [0, 1, 0, 1, 2],
                          "bits": [2.0, 3.0, 1.0, 1.0, 9.0]})
    table = paired_table(frame, "bits", "pattern", "A")
    assert table["mean"].tolist() == [-1.5]
    assert table["pairs"].tolist() == [2]
    with pytest.raises(UserError, match="not among"):
        paired_table(frame, "bits", "pattern", "MA")


# ------------------------------------------------------------------------------------------ budgets


def learned(step_seconds: float, bits: float, joules: float | None = None) -> Learned:
    return Learned(None, [(0, 8.0), (100, bits)], 100, step_seconds, joules, "", False)


def test_budgets_are_what_the_cheapest_can_spend():
    runs = {("M", 0, 100): learned(0.2, 4.0), ("A", 0, 100): learned(0.1, 2.0)}
    table = budget_steps(runs, {"M": 1000.0, "A": 4000.0}, 20)
    steps = table.set_index(["comparison", "pattern"])["steps"]
    assert steps["steps", "M"] == steps["steps", "A"] == 100
    assert (steps["wall-clock", "M"], steps["wall-clock", "A"]) == (50, 100)
    assert (steps["FLOPs", "M"], steps["FLOPs", "A"]) == (100, 25)
    assert steps["joules", "M"] is None  # no counter: not a number made up
    bits = compare(runs, table, 100).set_index(["comparison", "pattern"])["bits_per_byte"]
    assert bits["wall-clock", "M"] == 6.0  # half way from 8 to 4
    assert bits["FLOPs", "A"] == 6.5
    assert bits["joules", "A"] is None


def test_joules_are_compared_where_they_are_measured():
    runs = {("M", 0, 100): learned(0.1, 4.0, 50.0), ("A", 0, 100): learned(0.1, 2.0, 200.0)}
    table = budget_steps(runs, {"M": 1.0, "A": 1.0}, 20)
    steps = table.set_index(["comparison", "pattern"])["steps"]
    assert (steps["joules", "M"], steps["joules", "A"]) == (100, 25)


def test_constant_rate_keeps_its_peak():
    recipe = TrainConfig(n_steps=100, lr=1e-3, warmup_fraction=0.1)
    flat = constant_rate(recipe)
    for step in range(10):
        assert learning_rate(step, flat) == pytest.approx(learning_rate(step, recipe))
    for step in (10, 50, 99):
        assert learning_rate(step, flat) == pytest.approx(1e-3, rel=1e-4)


def test_bits_at_interpolates():
    assert bits_at([(0, 8.0), (10, 4.0)], 5) == 6.0
    assert bits_at([(0, 8.0), (10, 4.0)], 99) == 4.0


# ---------------------------------------------------------------------------------------- positions


def test_stream_and_fresh_windows_agree_where_both_see_the_same():
    # A window that starts at the stream's start is the stream: drift is zero there.
    torch.manual_seed(0)
    model = ByteLM(SMALL).eval()
    streams = torch.randint(0, 256, (3, 129))
    table = position_bits(model, streams, 32, piece=50)
    assert table["first_position"].tolist() == [0, 8, 16, 32, 64]
    assert table["last_position"].tolist() == [7, 15, 31, 63, 127]
    assert table["drift_bits"].isna().tolist() == [True, True, False, False, False]
    assert table["drift_bits"][2] == pytest.approx(0, abs=1e-6)
    assert abs(table["drift_bits"][4]) > 1e-7  # further on the stream knows more
    weights = table["last_position"] - table["first_position"] + 1
    with torch.no_grad():
        expected = model.loss(streams[:, :33]).item() / math.log(2)
    first = (table["bits_per_byte"] * weights)[:3].sum() / 32
    assert first == pytest.approx(expected, rel=1e-5)


def test_unbounded_cache_is_put_back():
    model = ByteLM(SMALL).eval()
    streams = torch.randint(0, 256, (1, 100))
    bounded = position_bits(model, streams, 32)
    unbounded = position_bits(model, streams, 32, unbounded=True)
    assert model.layers[1].mixer.window == 32
    assert bounded["bits_per_byte"].iloc[-1] != unbounded["bits_per_byte"].iloc[-1]
    assert bounded["bits_per_byte"].iloc[0] == unbounded["bits_per_byte"].iloc[0]


def test_heldout_bits_of_an_untrained_model():
    windows = heldout_windows(np.arange(1000, dtype=np.uint8), 50, 7)
    assert windows.shape == (7, 51)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999 % 256
    assert heldout_bits(ByteLM(SMALL), windows) == pytest.approx(8, abs=0.2)


# ---------------------------------------------------------------------------------------- the study


TINY = ablation.Parameters(
    patterns=("M", "A"), d_model=16, n_layer=2, context=32, batch_size=2, steps=6,
    seeds=(0, 1), heldout_windows=2, characters=20, streams=1, stream_bytes=64,
    tasks=("copy 2",), task_steps=4, task_batch=4, variants=("field", "zero out_proj"),
    variant_steps=2, max_seconds=0.0, workers=1)



@pytest.mark.parametrize("decay", [False, True])
def test_a_tiny_study_end_to_end(corpus_file, decay):
    found = ablation.run(replace(TINY, corpus=corpus_file, decay=decay))
    assert set(found.comparisons["comparison"]) == set(COMPARISONS)
    assert found.systems["pattern"].tolist() == ["M", "A"]
    assert (found.systems["state_bytes"] == found.systems["state_bytes_counted"]).all()
    assert found.paired["reference"].eq("A").all()
    matmul = found.flop_check[found.flop_check["counted"] == "matrix product"]
    assert (matmul["formula_over_counter"] == 1.0).all()
    values = answers.values(found, TINY)
    assert values["seeds"].value == 2
    assert values["ssm_steps"].value is not None
    if decay:  # a run that ends earlier was trained with its own, shorter schedule
        assert len(found.runs) >= 4


@pytest.mark.parametrize(("given", "answer"), [
    ({"patterns": ("A",)}, "2 or more"), ({"patterns": ("A", "M", "A")}, "each once"),
    ({"reference": "MMMA"}, "expected one of the patterns"),
    ({"seeds": ()}, r"seeds is \[\]: expected"), ({"context": 3}, "context is 3: expected"),
    ({"stream_bytes": 63}, "twice the context"), ({"steps": 0}, "steps is 0: expected"),
    ({"tasks": ("recall 99",)}, "keys are distinct"), ({"n_head": 3}, "does not split")])
def test_what_cannot_be_compared_is_refused(given, answer):
    with pytest.raises(UserError, match=answer):
        replace(TINY, **given)


def test_the_field_alone_has_no_largest_choice(corpus_file):
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=("field",))
    values = answers.values(ablation.run(p), p)
    assert values["variant_largest"].value is None
    assert values["half_life_field"].value > 0


def test_pieces_and_bytes_see_and_read_the_same_text(corpus_file):
    pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install '.[tokens]'")
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=(), steps=40, pieces=300,
                piece_train_bytes=20_000)
    found = ablation.run(p).tokens
    assert found["pattern"].tolist() == ["M", "A"]
    step = p.context * p.batch_size * found["bytes_per_token"]
    assert ((found["trained_raw_bytes"] - found["trained_bytes_on_bytes"]).abs() < step).all()
    assert (found["trained_tokens"] < found["trained_bytes_on_bytes"]).all()
    corpus = load_corpus(corpus_file)
    text = bytes(corpus.valid).decode()
    assert (found["raw_bytes"] == len(text.encode())).all()
    # Bits over all tokens are bits over all bytes.
    totals = found["bits_per_token"] * found["tokens"]
    assert totals.tolist() == pytest.approx(
        (found["bits_per_raw_byte"] * found["raw_bytes"]).tolist())
    assert (found["n_parameters"] - found["n_parameters_on_bytes"] == (300 - 256) * 16).all()
    assert (found["bits_per_byte_on_bytes"] < 8).all()


def test_unigram_bits_by_hand():
    train = np.array([65] * 3 + [66], dtype=np.uint8)
    windows = torch.tensor([[65, 65, 66]])  # the first byte is no target
    expected = -(math.log2(4 / 260) + math.log2(2 / 260)) / 2
    assert unigram_bits(train, windows) == pytest.approx(expected)


def test_the_study_is_seeded(corpus_file):
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=())
    first, second = (ablation.run(p).curves["bits_per_byte"] for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(("change", "match"), [
    ({"variants": ("nothing",)}, r"variants is \['nothing'\]: expected"),
    ({"tasks": ("copy",)}, "a size, such as 'recall 4'"),
])
def test_bad_parameters_are_one_clear_line(change, match):
    with pytest.raises(UserError, match=match):
        replace(TINY, **change)


def test_captured_steps_are_the_steps_one_by_one(corpus_file: str) -> None:
    """The step that a GPU captures, run here without capture, against the readable one."""
    config = ModelConfig(d_model=16, n_layer=2, d_state=4)
    recipe = TrainConfig(context=24, batch_size=2, n_steps=25, precision="fp32")
    corpus = load_corpus(corpus_file)
    rate = constant_rate(recipe)
    weights = []
    for make, look_every in ((text_step, 1), (learning.captured_text_step, learning.BLOCK)):
        torch.manual_seed(0)
        model = ByteLM(config)
        step = make(model, corpus.train, recipe)
        follow = learning._Follow(model, step, recipe, None, "cpu", 6, 0.0, look_every)
        optimise(step, partial(schedule, config=rate), 25,
                 stop=follow.stop, after=follow.after)
        assert len(follow.seconds) == 25
        assert min(follow.seconds) > 0
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    difference = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert difference < 1e-5, difference


def test_accuracy_by_position_is_a_mean_over_seeds():
    def scored(*hits: int) -> Score:
        return Score(1.0, 0.5, len(hits), len(hits), 0, np.array(hits, bool))

    frame = accuracy_by_position(
        {("M", 0, 9): scored(1, 1, 0, 0, 1), ("M", 1, 9): scored(1, 0, 0, 0, 1),
         ("A", 0, 9): scored(0, 0, 0, 0, 1)}, context=2)
    assert frame["first character"].tolist() == [0, 2, 4]
    assert frame["last character"].tolist() == [1, 3, 4]
    assert frame["M"].tolist() == [0.75, 0.0, 1.0]
    lead = _lead_values(frame, "A")
    assert (lead["lead_first"].value, lead["lead_last"].value) == (0.75, 0.0)
    assert _lead_values(frame.drop(columns="M"), "A")["lead_first"].value is None
    assert accuracy_by_position({}, 2).empty
