"""Recorded runs decide claims, and the right one where there are several."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pandas as pd
import pytest

from analysis import claims
from analysis.claims import evidence as evidence_module
from analysis.claims.evidence import Evidence, load_records
from analysis.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    OPEN,
)
from analysis.records import write_tables
from analysis.results import ROOT, Table
from analysis.studies import get_study
from analysis.task_record import rows_frame, summary_frame
from tests.claims_lab import BY_ID, OUR_FACTS, lab, run_of, verdict


def training(ms: float, joules: float | None = None, **other: float) -> dict[str, list[dict]]:
    rows = [{"pattern": "M", "form": "document_chunked", "batch": 16, "context": 1024, "ms": ms,
             "joules_per_megabyte": joules}]
    rows += [{"pattern": p, "form": "auto", "batch": 16, "context": 1024, "ms": v,
              "joules_per_megabyte": None} for p, v in other.items()]
    return {"training": rows}


def on_gpu(values: dict | None = None, tables: dict | None = None, study: str = "throughput"):
    return Evidence((run_of(study, values, tables, device="cuda"),))


@pytest.mark.parametrize(("claim", "tables", "after"), [
    ("wall-clock", training(30.0), HOLDS), ("wall-clock", training(70.0), CAVEAT),
    ("wall-clock", training(150.0), FAILS),
    ("energy-10-25", training(30.0, 300.0), HOLDS), ("energy-10-25", training(30.0, 3e3), FAILS),
    ("energy-10-20", training(30.0, 350.0), CAVEAT), ("energy-10-20", training(30.0), OPEN),
    ("five-times", training(1.0, M=1.0, A=5.0), HOLDS),
    ("five-times", training(1.0, M=4.0, A=1.0), FAILS),
])
def test_recorded_training_decides(claim, tables, after):
    assert verdict(claim) != FAILS
    assert verdict(claim, on_gpu(tables=tables)) == after


@pytest.mark.parametrize(("published", "after"), [(3.0, HOLDS), (5.0, CAVEAT), (63.0, FAILS)])
def test_recorded_scans_decide(published, after):
    rows = [{"pass": "forward+backward", "batch": 16, "length": 1024, "form": form, "ms": ms}
            for form, ms in (("document_chunked", published), ("fused", 1.0))]
    assert verdict("overhead-2-4") == OPEN
    assert verdict("overhead-2-4", on_gpu(tables={"scan_time": rows})) == after
    on_cpu = Evidence((run_of("throughput", tables={"scans": rows}),))
    assert verdict("overhead-2-4", on_cpu) == OPEN  # a CPU's ratio says nothing about a GPU's


@pytest.mark.parametrize(("study", "values", "claim", "after"), [
    ("overflow", {"highest_exponent": 95.0, "extrapolated_exponent": 130.0}, "benign", CAVEAT),
    ("overflow", {"highest_exponent": 95.0, "document_exponent": 92.0}, "benign", FAILS),
    ("overflow", {"highest_exponent": 30.0, "extrapolated_exponent": 35.0}, "benign", HOLDS),
    ("overflow", {"highest_exponent": 50.0, "extrapolated_exponent": 80.0}, "benign", CAVEAT),
    ("ablation", {"ssm_steps": -0.02, "hybrid_steps": -0.05}, "speed-not-quality", HOLDS),
    ("ablation", {"ssm_steps": 0.3, "hybrid_steps": 0.2}, "speed-not-quality", FAILS),
    ("ablation", {"hybrid_wall_clock": 0.3, "hybrid_steps": 0.0}, "genuinely-competitive", FAILS),
    ("ablation", {"hybrid_wall_clock": -0.1, "hybrid_steps": 0.0}, "closer-to-baseline", HOLDS),
    ("ablation", {"ssm_char_accuracy": 0.4, "reference_char_accuracy": 0.5},
     "attention-home-turf", HOLDS),
    ("ablation", {"ssm_char_accuracy": 0.5, "reference_char_accuracy": 0.4},
     "attention-home-turf", FAILS),
    ("ablation", {"drift_ssm": 0.5}, "no-window", CAVEAT),
    ("throughput", {"stream_growth_ssm": 3.0}, "cost-independent", FAILS),
    ("throughput", {"stream_growth_ssm": 1.0, "stream_growth_window": 1.9,
                    "stream_growth_cache": 4.0}, "structural-win", HOLDS),
    ("throughput", {"stream_growth_ssm": 5.0, "stream_growth_window": 1.9,
                    "stream_growth_cache": 4.0}, "structural-win", FAILS),
])
def test_recorded_values_decide(study, values, claim, after):
    recorded = Evidence((run_of(study, values, name=f"{study}-abc"),))
    finding = claims.judge(BY_ID[claim], lab(recorded))
    assert finding.verdict == after
    assert finding != claims.judge(BY_ID[claim], lab())
    assert f"{study}-abc" in finding.source


def test_recorded_streaming_decides():
    def table(ssm: float) -> Evidence:
        ms = {"SSM": ssm, "attention, last 1024 keys": 1.0, "attention, all keys": 2.0}
        return Evidence((run_of("throughput", tables={"streaming": [
            {"system": s, "bytes_seen": 4096, "ms": v} for s, v in ms.items()]}),))

    assert [verdict("eval-cheap", table(ms)) for ms in (0.5, 1.5, 3.0)] == [HOLDS, CAVEAT, FAILS]


def task(*rows: dict) -> Evidence:
    """A record of whole runs; what a row lacks is as on a good day."""
    good = {"system": "mamba_byte_as_written", "seconds": 200.0, "joules": 15e3, "steps": 4000,
            "valid_accuracy": 0.7, "failure": None}
    record = run_of("task", name="gpu-task")
    frame = pd.DataFrame([{**good, **row} for row in rows])
    return Evidence((), (replace(record, tables={"runs": Table("runs", "", frame)}),))


@pytest.mark.parametrize(("claim", "row", "after"), [
    ("accuracy-069-073", {"valid_accuracy": 0.71}, HOLDS),
    ("accuracy-069-073", {"valid_accuracy": 0.68}, CAVEAT),
    ("accuracy-069-073", {"valid_accuracy": 0.5}, FAILS),
    ("floor-risk", {"valid_accuracy": 0.5}, HOLDS), ("floor-risk", {"valid_accuracy": 0.8}, CAVEAT),
    ("wall-clock", {}, HOLDS), ("wall-clock", {"seconds": 290.0, "steps": 1800}, FAILS),
    ("energy-10-25", {}, HOLDS), ("energy-10-20", {"joules": 5e4, "steps": 1800}, FAILS),
    ("benign", {"failure": "step 3000: loss nan", "steps": None}, FAILS),
])
def test_a_whole_run_decides(claim, row, after):
    finding = claims.judge(BY_ID[claim], lab(task(row, {"system": "mamba_byte"})))
    assert finding.verdict == after
    assert finding != claims.judge(BY_ID[claim], lab())
    assert "gpu-task" in finding.source


def test_a_record_of_the_task_decides_as_it_is_written(tmp_path):
    """Columns in words, means beside the runs, and one run that a fault of the program ended."""
    fields = {"seed": 0, "joules": 6000.0, "seconds": 15.0, "steps": 60, "ms_per_step": 200.0,
              "valid_accuracy": 0.25, "valid_bits_per_byte": 5.7, "test_accuracy": 0.26}
    rows = [{"system": "mamba_byte_as_written", **fields},
            {"system": "mamba_byte", **fields, "failure": "crashed: NameError"},
            {"system": "mamba_byte", **fields, "seed": 1, "steps": 4000, "ms_per_step": 2.5,
             "valid_accuracy": 0.61}]
    write_tables(tmp_path / "gpu-task.json",
                 {"systems": ("means", summary_frame(rows)), "runs": ("runs", rows_frame(rows))},
                 study="task", title="t", about="a", parameters={}, provenance={
                     "date": "2026-11-21", "commit": "abc", "command": "task",
                     "versions": {"torch": "2"},
                     "machine": {"cpu": "a", "gpus": [{"name": "a GPU"}]}})
    evidence = Evidence((), tuple(load_records(tmp_path)))
    exact = evidence.task("mamba_byte")
    assert exact is not None
    assert exact.what["seed"].tolist() == [1]
    for claim, after in (("wall-clock", FAILS), ("energy-10-25", FAILS), ("overhead-2-4", FAILS),
                         ("accuracy-069-073", FAILS), ("floor-risk", HOLDS)):
        assert verdict(claim, evidence) == after, claim
    finding = claims.judge(BY_ID["accuracy-069-073"], lab(evidence))
    assert "0.610" in finding.reason
    assert "60 steps" in finding.reason
    assert "200 ms a step against 2.5" in str(claims.judge(BY_ID["slower-2-4"], lab(evidence)).ours)


def test_checks_ask_for_tables_that_their_study_records():
    asked = {(study, name) for path in sorted((ROOT / "analysis" / "claims").glob("*.py"))
             for study, name in re.findall(r'lab\.table\(\s*"(\w+)", "(\w+)"', path.read_text())}
    assert len(asked) > 2
    in_records = {(r.study, name) for r in load_records(evidence_module.MEASUREMENTS)
                  for name in r.tables}
    for study, name in asked - in_records:
        notebook = get_study(study).notebook.read_text()
        assert f'\\"{name}\\"' in notebook, f"{study} records no {name}"


def test_a_lost_run_decides_nothing_else():
    lost = task({"failure": "step 3: loss nan", "steps": None, "valid_accuracy": None})
    for claim in ("wall-clock", "energy-10-25", "accuracy-069-073", "floor-risk"):
        assert verdict(claim, lost) == OPEN


def test_leaderboard_entries_show_our_runs():
    """Ours stand beside them and do not decide: another card, another text."""
    recorded = task({"system": "modded_nanogpt", "joules": 31547.0, "seconds": 109.0})
    finding = claims.judge(BY_ID["baseline-energy"], lab(recorded))
    assert finding.verdict == verdict("baseline-energy") == CAVEAT
    assert "31,547 J" in str(finding.ours)
    leader = task({"system": "nano_plus_ngram", "joules": 3842.0, "seconds": 14.0})
    finding = claims.judge(BY_ID["leader-energy"], lab(leader))
    assert finding.verdict == OPEN
    assert "3,842 J" in str(finding.ours)


def test_few_large_steps_decide():
    for bits, after in ((2.0, HOLDS), (3.9, INCONSISTENT)):
        recorded = on_gpu({"few_steps_best_bits": bits}, study="ablation")
        finding = claims.judge(BY_ID["lowest-in-five"], lab(recorded))
        assert (finding.verdict, finding.source) == (after, "run")


@pytest.mark.parametrize(("published", "chunked", "after"), [
    (200.0, 190.0, HOLDS), (200.0, 53.0, CAVEAT), (280.0, 270.0, CAVEAT), (20.0, 10.0, FAILS)])
def test_recorded_torch_forms_decide(published, chunked, after):
    assert verdict("slower-50") == OPEN
    tables = training(published, A=4.0, M=2.6)
    tables["training"].append({**tables["training"][0], "form": "chunked", "ms": chunked})
    assert verdict("slower-50", on_gpu(tables=tables)) == after


def test_a_bench_of_a_named_card_is_evidence_of_an_accelerator():
    """Kernels against each other, as ``mambabyte bench scan`` records them."""
    def bench(short: float, long: float) -> Evidence:
        rows = [{"batch x length x channels": size, "of": of, "pass": "forward+backward",
                 "median (us)": us} for size, sdpa in (("16 x 1024 x 384", short),
                                                       ("1 x 65536 x 1536", long))
                for of, us in (("sdpa", 100 * sdpa), ("mamba_ssm", 100.0))]
        record = run_of("throughput", tables={"bench": rows}, device="a GPU", provenance={
            "machine": {"gpus": [{"name": "a GPU"}]}})
        return Evidence((), (record,))

    assert verdict("five-times") == OPEN
    for ratios, after in (((0.3, 2.6), CAVEAT), ((1.5, 5.0), HOLDS), ((0.3, 0.8), FAILS)):
        assert verdict("five-times", bench(*ratios)) == after


def test_what_slicing_adds_is_told_from_what_materialising_costs():
    def scans(cut_once: float) -> Evidence:
        rows = [{"pass": "forward+backward", "batch": 1, "length": 1024, "form": form, "ms": ms}
                for form, ms in (("document_chunked", 50.0), ("corrected_cumsum", cut_once),
                                 ("fused", 2.0))]
        return Evidence((run_of("throughput", tables={"scan_time": rows}),))

    assert verdict("overhead-cause") == OPEN
    for ms, after in ((49.0, HOLDS), (30.0, CAVEAT), (4.0, FAILS)):
        assert verdict("overhead-cause", scans(ms)) == after


def test_a_longer_training_of_tied_heads_decides():
    for end, after in ((0.005, HOLDS), (0.03, CAVEAT), (0.3, FAILS)):
        rows = [{"steps": n, "tied minus own, bits/byte": d} for n, d in ((100, 0.7), (3000, end))]
        recorded = Evidence((), (run_of("claims", tables={"tied": rows}),))
        assert verdict("tied-neutral", recorded) == after


def test_losses_on_text_decide_whether_training_suffers():
    for gap, after in ((3e-4, FAILS), (0.02, CAVEAT), (0.2, HOLDS)):
        rows = [{"form": form, "step": step, "layer": 0, "loss, nats": 3.0 + more}
                for form, more in (("auto", 0.0), ("document_chunked", gap)) for step in range(9)]
        recorded = Evidence((run_of("overflow", tables={"headroom": rows}),))
        assert verdict("underperform", recorded) == after


def test_peaks_by_an_allocator_decide():
    """The same rows that the record of an H200 has."""
    def record(mb: float, checkpointing: bool = False) -> Evidence:
        rows = [{"layers": "MMMM", "d_model": 192, "form": "document_chunked", "batch": batch,
                 "context": context, "autocast": "bf16", "checkpointing": checkpointing,
                 "peak, measured, MB": mb} for batch, context in ((64, 2048), (16, 1024))]
        made = run_of("memory", tables={"cuda": rows}, device="cuda", provenance={
            "machine": {"gpus": [{"name": "a GPU"}]}})
        return Evidence((), (made,))

    assert [verdict("oom-40", record(mb)) for mb in (82e3, 30e3)] == [HOLDS, FAILS]
    assert [verdict("inside-40", record(mb)) for mb in (10e3, 30e3, 50e3)] == [
        HOLDS, CAVEAT, FAILS]
    finding = claims.judge(BY_ID["fix-checkpointing"], lab(record(27.9e3, checkpointing=True)))
    assert "27.9 GB" in finding.reason


def test_the_longest_training_speaks_first():
    quick = run_of("ablation", {"ssm_steps": -0.5, "hybrid_steps": -0.5}, name="quick")
    long = run_of("ablation", {"ssm_steps": 0.5, "hybrid_steps": 0.4}, name="long")
    runs = (replace(quick, parameters={"steps": 80}), replace(long, parameters={"steps": 1000}))
    found = Evidence(runs[:1], runs[1:])
    assert found.value("ablation", "ssm_steps").name == "quick"
    assert found.value("ablation", "ssm_steps", most="steps").name == "long"
    assert verdict("speed-not-quality", found) == FAILS


def test_larger_models_speak_beside_small_ones():
    def systems(ssm: float, hybrid: float) -> Evidence:
        rows = [{"system": s, "steps": 500, "valid_bits_per_byte": 1.6 + b, "valid_accuracy":
                 0.67 - b / 5} for s, b in (("modded_nanogpt_500", 0.0), ("nano_ssm_500", ssm),
                                            ("nano_ssm_1_1_500", hybrid))]
        small = run_of("ablation", {"ssm_steps": -0.2, "hybrid_steps": -0.1,
                                    "ssm_char_accuracy": 0.5, "reference_char_accuracy": 0.45})
        return Evidence((small,), task(*rows).records)

    assert verdict("speed-not-quality", systems(-0.1, -0.05)) == HOLDS
    assert verdict("speed-not-quality", systems(0.15, 0.05)) == CAVEAT
    assert verdict("attention-home-turf", systems(0.15, 0.05)) == CAVEAT


@pytest.mark.parametrize(("accuracy", "joules", "after"), [
    (0.72, 2900.0, HOLDS), (0.72, 3900.0, CAVEAT), (0.70, 2000.0, CAVEAT), (0.60, 3900.0, FAILS)])
def test_the_race_under_an_energy_cap_decides(accuracy, joules, after):
    recorded = task({"system": "ours", "valid_accuracy": accuracy, "joules": joules},
                    {"system": "ours_attention", "valid_accuracy": 0.71, "joules": 2880.0})
    for claim in ("genuinely-competitive", "closer-to-baseline"):
        assert verdict(claim, recorded) == after


def test_a_fast_kernel_shows_what_can_be_gained():
    recorded = task({"ms_per_step": 204.0}, {"system": "mamba_byte", "ms_per_step": 2.5})
    assert verdict("kernel-feasible") == HOLDS  # by what others have reported
    alone = {name: fact for name, fact in OUR_FACTS.items() if name != "same_competition"}
    for found, after in ((None, OPEN), (recorded, CAVEAT)):
        assert claims.judge(BY_ID["kernel-feasible"], lab(found, facts=alone)).verdict == after
    slow = task({"ms_per_step": 5.0}, {"system": "mamba_byte", "ms_per_step": 2.5})
    assert claims.judge(BY_ID["kernel-feasible"], lab(slow, facts=alone)).verdict == FAILS
    assert verdict("kernels-unavailable") == FAILS
    assert claims.judge(BY_ID["kernels-unavailable"], lab(facts=alone)).verdict == OPEN


def test_smoke_mode_by_variable(monkeypatch):
    monkeypatch.setenv("SMOKE_TEST_ONLY", "1")
    assert verdict("smoke-variable") == HOLDS
    assert os.environ["SMOKE_TEST_ONLY"] == "1"  # left as it was
