"""Where the forms overflow, how it shows, and that the studied forms fail as they should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.measure.scans import scan_of
from analysis.runs.records import RECORDS, load_record
from analysis.studies.overflow import KINDS, PRECISIONS, PROFILES, error_map, error_tables, figures
from analysis.studies.overflow import compute as overflow
from analysis.studies.overflow import values as answers
from analysis.studies.overflow.mixers import mixer_frame
from analysis.theory import bounds
from analysis.theory.forms import ANY_CHUNK
from mambabyte.config import SPECS
from mambabyte.config.mixers import kind_of
from mambabyte.errors import UserError
from mambabyte.model.mixer import mixer_of
from mambabyte.ops import FORMS
from mambabyte.ops.scan import repairs
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.ops.scan.recurrent import recurrent_scan

REPAIRS = [name for name, scan in SCANS.items()
           if scan.__module__ == repairs.__name__]
SMALL = overflow.Parameters(
    forms=tuple(f for f in ANY_CHUNK if f not in ("recurrent", "fused")), low_precision_forms=(),
    precisions=("float32",), kinds=("constant",), chunks=(8, 32, 64),
    decays=(0.02, 0.4, 1.6, 12.8), length=64)


def inputs(decay: float, length: int) -> list[torch.Tensor]:
    return error_map.inputs([decay], length, 2, 2, "constant", 0)


def finite(form: str, decay: float, chunk: int, dtype: torch.dtype = torch.float32) -> bool:
    tensors = [t.to(dtype) for t in inputs(decay, chunk)]
    y, state = scan_of(form)(*tensors, chunk)
    return bool(torch.isfinite(y).all() and torch.isfinite(state).all())


@pytest.fixture(scope="module")
def errors() -> pd.DataFrame:
    return error_map.error_map(SMALL, lambda line: None)


def test_every_repair_is_a_form() -> None:
    written = {name for name in vars(repairs) if name.endswith("_scan")}
    assert written == {SCANS[name].__name__ for name in REPAIRS}
    assert len(written) == 7


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("chunk", [0, 1, 8, 64])
def test_repairs_are_exact_where_nothing_is_repaired(name: str, chunk: int) -> None:
    exact = inputs(0.02, 37)
    found = error_map.results_of(scan_of(name), exact, chunk, 0)
    reference = error_map.results_of(recurrent_scan, exact, 0, 0)
    tolerance = 1e-9 if name == "epsilon" else 1e-12
    for key in reference:
        assert error_map.relative_errors(found[key], reference[key]).max() < tolerance, key


@pytest.mark.parametrize("decay", [0.3, 0.8, 1.6, 5.0])
@pytest.mark.parametrize("form", ["document_chunked", "corrected_cumsum", "centred"])
def test_boundary_is_where_it_is_measured(form: str, decay: float) -> None:
    bound = bounds.boundary(form, decay)
    inside, outside = math.floor(bound * 0.94), math.ceil(bound * 1.04) + 1
    assert finite(form, decay, inside)
    assert not finite(form, decay, outside)


def test_the_published_exponent_stops_one_step_short() -> None:
    decay = 10.0  # 8 steps are 80 nats, 9 are 90
    assert finite("corrected_cumsum", decay, 8)
    assert not finite("corrected_cumsum", decay, 9)
    assert finite("document_chunked", decay, 9)
    assert not finite("document_chunked", decay, 10)


@pytest.mark.parametrize(("chunk", "decay"), [(4, 44.36), (8, 22.18), (16, 11.09), (32, 5.545)])
def test_the_centred_form_fails_by_its_longer_half(chunk: int, decay: float) -> None:
    """Its exponents reach floor(T / 2) steps from the middle, not (T - 1) / 2."""
    assert math.isclose(bounds.log_max() / (chunk // 2), decay, rel_tol=1e-3)
    for times, works in ((0.99, True), (1.01, False)):
        # Small steps and strong A: the inputs delta B u are below 1 and do not overflow first.
        steps = torch.full((1, chunk, 1), 1e-2)
        one = torch.ones_like(steps)
        y, _ = scan_of("centred")(one, steps, torch.tensor([[-100 * times * decay]]), one, one,
                                  torch.zeros(1, 1, 1), chunk)
        assert bool(y.isfinite().all()) == works
        assert (chunk <= bounds.boundary("centred", times * decay)) == works
    # An odd chunk has equal halves: one step more than the even one below it is as safe.
    assert bounds.boundary("centred", 0.99 * decay) == chunk + 1


def test_boundary_of_half_precision() -> None:
    assert bounds.log_max("float16") == pytest.approx(11.09, abs=0.01)
    assert bounds.log_max("bfloat16") == pytest.approx(88.72, abs=0.01)
    assert not finite("corrected_cumsum", 1.6, 8, torch.float16)
    assert finite("corrected_cumsum", 1.6, 6, torch.float16)


def test_loud_and_silent_failures(errors: pd.DataFrame) -> None:
    verdicts = error_tables.verdicts(errors).set_index("form")
    for form in ("chunked", "segment_sum", "associative"):
        assert verdicts.loc[form, ["loud", "silent"]].tolist() == [0, 0], form
    for form in ("document_chunked", "corrected_cumsum", "centred"):
        assert verdicts.loc[form, "loud"] > 0, form
    for form in ("clamped", "epsilon"):
        assert verdicts.loc[form, "loud"] == 0
        assert verdicts.loc[form, "silent"] > 0
    assert verdicts.loc["late_mask", "right value, gradient lost"] > 0


def test_late_mask_has_the_value_of_pairwise_and_no_gradient() -> None:
    tensors = [t.float() for t in inputs(3.0, 64)]
    value, _ = scan_of("late_mask")(*tensors, 64)
    same, _ = scan_of("pairwise")(*tensors, 64)
    assert torch.equal(value, same)
    lost = error_map.results_of(scan_of("late_mask"), tensors, 64, 0)
    kept = error_map.results_of(scan_of("pairwise"), tensors, 64, 0)
    assert lost["d delta"].isnan().any()
    assert kept["d delta"].isfinite().all()


def test_differences_of_sums_lose_the_gradient_of_a_strong_decay(errors: pd.DataFrame) -> None:
    # Far inside the bound of pairwise, which has none, and of the corrected form at chunk 4.
    exact = inputs(12.0, 4)
    reference = error_map.results_of(recurrent_scan, exact, 0, 0)
    single = [t.float() for t in exact]

    def error(form: str) -> float:
        found = error_map.results_of(scan_of(form), single, 4, 0)
        return float(error_map.relative_errors(found["d A"], reference["d A"]).max())

    assert error("pairwise") > 1e-3
    assert error("corrected_cumsum") > 1e-3
    for form in ("segment_sum", "associative", "chunked"):
        assert error(form) < 1e-5, form


def test_the_published_form_is_another_recurrence(errors: pd.DataFrame) -> None:
    cell = errors[(errors["form"] == "document_chunked") & (errors["chunk"] == 8)
                  & (errors["decay"] == 0.4)].iloc[0]
    assert cell["value error"] < 1e-5
    assert cell["value error against the definition"] > 0.05


def test_gradient_of_a_by_row_is_that_of_the_row_alone() -> None:
    exact = error_map.inputs([0.1, 0.7], 12, 2, 3, "data-dependent", 3)
    together = error_map.results_of(recurrent_scan, exact, 0, 5)["d A"]
    u, delta, A, B, C, state = exact
    for i in range(2):
        alone = error_map.results_of(
            recurrent_scan, [t[i : i + 1] for t in (u, delta)] + [A] + [
                t[i : i + 1] for t in (B, C, state)], 0, 5)["d A"]
        torch.testing.assert_close(together[i : i + 1], alone)


def test_share_past_bound() -> None:
    assert bounds.share_past_bound(56) == 0
    assert bounds.share_past_bound(57) > 0
    g = torch.Generator().manual_seed(0)
    dt = 1e-3 * 100 ** torch.rand(200_000, generator=g, dtype=torch.float64)
    n = torch.arange(1, 17)
    for length in (64, 256, 1024):
        drawn = ((length - 1) * dt[:, None] * n > bounds.log_max()).double().mean()
        assert bounds.share_past_bound(length) == pytest.approx(float(drawn), abs=2e-3)
    assert bounds.share_past_bound(10**9) == 1


def test_the_documents_lengths() -> None:
    assert bounds.first_overflow(0.8) == 112  # the document: about 50
    assert bounds.first_overflow(1.6) == 57


def test_first_chunks_reads_the_map(errors: pd.DataFrame) -> None:
    first = error_tables.first_chunks(errors)
    assert set(first["kind"]) == {"constant"}
    first = first.set_index(["form", "of", "first chunk with"])
    assert first.loc[("corrected_cumsum", "value", "nan"), "1.6"] == "64"
    assert first.loc[("corrected_cumsum", "value", "nan"), "0.02"] == "never"
    assert first.loc[("corrected_cumsum", "all", "bound, steps"), "1.6"] == "55.5"
    # Each gradient by itself: that of A is lost at the smallest chunk, that of C never silently.
    assert first.loc[("pairwise", "gradient of A", "error > 0.01"), "12.8"] == "8"
    assert ("pairwise", "gradient of C", "error > 0.01") not in first.index
    assert ("chunked", "value", "nan") not in first.index


def test_first_chunks_of_both_kinds_and_every_gradient() -> None:
    p = replace(SMALL, forms=("corrected_cumsum",), kinds=KINDS, decays=(12.8,))
    first = error_tables.first_chunks(error_map.error_map(p, lambda line: None))
    lost = first[first["first chunk with"] == "nan"].set_index(["kind", "of"])["12.8"]
    for kind in KINDS:  # the initial state is weighed by exp(cs) alone
        assert set(lost[kind].index) == {"value", *(f"gradient of {n}" for n in (
            "u", "delta", "A", "B", "C"))}
        assert lost[kind].astype(int).min() >= 8


def test_rounded_inputs_keep_float32_arithmetic() -> None:
    p = replace(SMALL, forms=("recurrent",), low_precision_forms=("recurrent",),
                precisions=("bf16 inputs", "fp16 inputs", "float16"), decays=(0.4,))
    found = error_map.error_map(p, lambda line: None).set_index("precision")["value error"]
    # 11 bits of a number against 8, and either sum in float32: the fp16 inputs are 2^-11 off.
    assert 2 * found["fp16 inputs"] < found["bf16 inputs"] < 1e-2
    assert 1e-5 < found["fp16 inputs"] < 1e-3
    exact = inputs(0.4, 8)
    rounded = error_map._rounded(exact, "fp16 inputs")
    assert {t.dtype for t in rounded} == {torch.float32}
    assert torch.equal(rounded[0], exact[0].half().float())


def test_the_map_as_a_table_and_its_counts(errors: pd.DataFrame) -> None:
    table = error_tables.errors_by_decay(errors).set_index(["form", "of", "chunk"])
    cell = errors[(errors["form"] == "pairwise") & (errors["chunk"] == 8)
                  & (errors["decay"] == 12.8)].iloc[0]
    assert table.loc[("pairwise", "gradient", 8), "12.8"] == pytest.approx(
        cell["gradient error"], rel=0.05)
    assert math.isnan(table.loc[("corrected_cumsum", "value", 64), "12.8"])
    assert len(table) == 2 * len(errors) / len(SMALL.decays)
    counts = error_tables.outcome_counts(
        error_tables.outcomes_by_decay(errors)).set_index(["form", "of"])
    assert (counts[list(error_tables.OUTCOMES)].sum(axis=1) == counts["cells"]).all()
    assert counts.loc[("pairwise", "value"), "right"] == counts.loc[("pairwise", "value"), "cells"]
    assert counts.loc[("pairwise", "gradient"), "silent"] > 0


def test_maps_are_of_value_and_gradient_and_of_every_form() -> None:
    p = replace(SMALL, low_precision_forms=("recurrent", "pairwise"), kinds=KINDS,
                forms=(*SMALL.forms, "recurrent"), precisions=("float32", "bf16 inputs"))
    errors = error_tables.errors_by_decay(error_map.error_map(p, lambda line: None))
    found = {d.name: d for d in figures.FIGURES if d.of == ("errors",) and d.when(errors)}
    assert set(found) == {"map", "map_data_dependent", "map_bf16_inputs"}
    for one in found.values():
        cells, drawn = one.data(errors), one.draw(errors)
        titles = {axes.get_title(loc="left") for axes in drawn.axes if axes.get_visible()}
        assert set() < titles <= {f"{form}\n{part}" for form in set(cells["form"])
                                  for part in ("value", "gradient")}
    assert "associative" in set(found["map"].data(errors)["form"])


def test_no_mixers_own_operator_has_a_bound_on_its_decays() -> None:
    found = mixer_frame(replace(SMALL, length=48))
    names = {kind_of(letter) for letter in SPECS if mixer_of(letter).has_decays}
    assert set(found["mixer"]) == names >= {"SSM", "Mamba-2", "Kimi Delta Attention"}
    assert (found["largest exponent of 32 steps"] > bounds.log_max()).any()
    assert (found["largest exponent of a step"] <= found["largest exponent of 32 steps"]).all()
    errors = found.filter(regex="error of")
    assert (errors.filter(regex="fp32") < 1e-5).all(axis=None)
    assert (errors.filter(regex="bf16") < 1e-2).all(axis=None)


def test_cells_are_drawn_where_they_are() -> None:
    cells = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=bool)
    for some in (cells, cells.T, ~cells, np.ones_like(cells)):
        drawn = np.zeros(some.shape, dtype=int)
        for box in figures._boxes(some, np.arange(4.0), np.arange(4.0)):
            (left, bottom), (right, top) = box.vertices.min(0), box.vertices.max(0)
            drawn[int(bottom):int(top), int(left):int(right)] += 1
        assert (drawn == some).all()


def test_the_record_of_the_map_is_of_the_full_profile() -> None:
    run = load_record(RECORDS / "overflow" / "cpu-overflow-map")
    full = PROFILES["full"]
    for name in ("precisions", "kinds", "chunks", "decays", "length"):
        kept = run.parameters[name]
        assert (tuple(kept) if isinstance(kept, list) else kept) == getattr(full, name), name
    assert set(run.tables) == {"errors", "first", "verdicts", "outcomes"}
    errors = run.tables["errors"].frame
    # It holds the forms that there were: one added since does not ask for another record.
    assert set(errors["form"]) == set(run.parameters["forms"]) <= set(FORMS)
    for precision, some in errors.groupby("precision"):
        low = run.parameters["low_precision_forms"]
        assert set(some["form"]) == set(
            run.parameters["forms"] if precision == "float32" else low), precision
    assert set(errors["precision"]) == set(PRECISIONS)
    # Every cell of the map is a number of the table.
    cells = sum(run.tables["verdicts"].frame["cells"])
    assert errors[[error_tables.column_of(d) for d in full.decays]].size == 2 * cells


def test_a_run_without_float32_has_no_count_of_its_cells(text_file: object) -> None:
    p = overflow.Parameters(
        forms=("corrected_cumsum",), low_precision_forms=("corrected_cumsum",),
        precisions=("bfloat16",), kinds=("constant",), chunks=(4, 8), decays=(0.4,), length=8,
        corpus=str(text_file), fraction_lengths=(4,), crossings=(60.0,),
        trained_forms=("auto",), trained_steps=(1,))
    values = answers.values(overflow.run(p, lambda line: None), p)
    assert values["map_cells"].value is None
    assert values["clamped_loud"].value is None
    assert values["trained_steps"].value == 1
    assert values["stable_crossed"].value is None
    assert values["bfloat16_corrected_cumsum_cells"].value == 2
    assert values["bfloat16_recurrent_silent"].value is None
    assert values["sound_forms"].value == "none"


def test_what_is_said_of_the_inside_of_the_bound(errors: pd.DataFrame) -> None:
    inside = error_tables.inside_bound(errors, error_tables.TRICKS)
    verdict = error_tables.verdicts(errors).set_index("form")
    said = answers._right_inside(inside, verdict)
    assert said["sound_forms"].value == "chunked, segment_sum, associative"
    assert said["inside_cells"].value == len(inside)
    assert said["inside_wrong"].value == 0
    assert said["inside_wrong_from"].value is None
    spoiled = inside.copy()
    edge = inside["of the bound"].idxmax()
    spoiled.loc[edge, "value"] = "inf"
    said_then = answers._right_inside(spoiled, verdict)
    assert said_then["inside_wrong"].value == 1
    assert said_then["inside_wrong_from"].value == inside["of the bound"].max() < 1
    assert said["inside_silent_from"].value == 12.8


def test_bad_input() -> None:
    for bad in ({"forms": ("nothing",)}, {"precisions": ("fp8",)}, {"kinds": ("odd",)},
                {"decays": (0.0,)}, {"chunks": (0,)}, {"device": "tpu"},
                {"trained_forms": ("auto",), "trained_steps": (1, 2)}, {"forms": ()}, {"kinds": ()},
                {"precisions": ()}, {"crossings": ()}, {"crossings": (0.0,)},
                {"fraction_lengths": ()}, {"fraction_lengths": (0,)}, {"every": 0}):
        with pytest.raises(UserError):
            overflow.Parameters(**bad)


def test_maps_judge_a_form_by_what_its_arithmetic_can_do() -> None:
    keys = {"kind": "constant", "precision": "bfloat16", "chunk": 8}
    errors = pd.DataFrame([
        {**keys, "form": form, "of": part, "1": one, "2": two}
        for form, part, one, two in (
            ("recurrent", "value", 0.2, 0.001), ("recurrent", "gradient", 0.3, 0.001),
            ("chunked", "value", 0.39, 0.002), ("chunked", "gradient", 0.1, 0.001),
            ("clamped", "value", 0.39, 0.02), ("clamped", "gradient", math.inf, math.nan))])
    found = figures.outcomes_of(errors, "bfloat16", "constant").set_index(["form", "of"])
    # Twice the recurrence's own 0.2 is no fault of the form; where that is small, 1 % is the limit.
    assert found.loc[("chunked", "value"), ["1", "2"]].tolist() == ["right", "right"]
    assert found.loc[("clamped", "value"), ["1", "2"]].tolist() == ["right", "silent"]
    assert found.loc[("clamped", "gradient"), ["1", "2"]].tolist() == ["inf", "nan"]
    assert figures.right_everywhere(found.reset_index()) == {"chunked": ["value", "gradient"]}
    drawn = figures.error_maps(errors, "bfloat16", "constant")
    assert [axes.get_title(loc="left") for axes in drawn.axes if axes.get_visible()] == [
        "clamped\nvalue", "clamped\ngradient"]
