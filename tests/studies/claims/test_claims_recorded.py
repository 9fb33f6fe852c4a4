"""Recorded runs decide claims, and the right one where there are several."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pandas as pd
import pytest

from analysis.runs.folders import ROOT
from analysis.runs.records import load_records, write_record_folder
from analysis.studies import get_study
from analysis.studies.claims import compute as claims
from analysis.studies.claims.evidence import Evidence
from analysis.studies.claims.experiments.streamed import COLUMNS
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, INCONSISTENT, OPEN
from analysis.studies.drawing import drawings
from analysis.studies.task.record import task_record
from tests.helpers.claims_lab import BY_ID, OUR_FACTS, lab, on_gpu, run_of, task, training, verdict


def test_only_tables_of_whole_runs_are_copied(monkeypatch):
    """A verdict asks dozens of times, of every table of every record."""
    asked, rename = [], pd.DataFrame.rename
    monkeypatch.setattr(pd.DataFrame, "rename", lambda frame, **how: asked.append(
        list(frame)) or rename(frame, **how))
    whole = task({"system": "one"}).records[0]
    other = run_of("gradients", tables={"rows": [{"system": "one", "seconds": 1.0}]})
    found = Evidence((), (other, whole)).task("one")
    assert found.name == "gpu-task"
    assert asked == [list(whole.tables["runs"].frame)]


@pytest.mark.parametrize(("claim", "tables", "after"), [
    ("wall-clock", training(30.0), HOLDS), ("wall-clock", training(70.0), CAVEAT),
    ("wall-clock", training(150.0), FAILS),
    ("energy-10-25", training(30.0, 300.0), HOLDS), ("energy-10-25", training(30.0, 3e3), FAILS),
    ("energy-10-20", training(30.0, 350.0), CAVEAT), ("energy-10-20", training(30.0), OPEN),
])
def test_recorded_training_decides(claim, tables, after):
    assert verdict(claim) != FAILS
    assert verdict(claim, on_gpu(tables=tables)) == after


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
    ("ablation", {"copy_attention": 1.0, "copy_ssm": 0.5, "copy_size": 32, "copy_chance": 0.03},
     "repetition-home-turf", HOLDS),
    ("ablation", {"copy_attention": 1.0, "copy_ssm": 0.99, "copy_size": 8, "copy_chance": 0.1},
     "repetition-home-turf", CAVEAT),
    ("ablation", {"copy_attention": 0.4, "copy_ssm": 0.9, "copy_size": 8, "copy_chance": 0.1},
     "repetition-home-turf", FAILS),
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
    write_record_folder(
        task_record(rows, {"date": "2026-11-21", "commit": "abc", "command": "task",
                           "versions": {"torch": "2"},
                           "machine": {"cpu": "a", "gpus": [{"name": "a GPU"}]}},
                    idle_watts=50.0, characters=60_000), tmp_path / "task" / "gpu-task")
    evidence = Evidence((), tuple(load_records(tmp_path).values()))
    exact = evidence.task("mamba_byte")
    assert exact is not None
    assert exact.what["seed"].tolist() == [1]
    for claim, after in (("wall-clock", FAILS), ("energy-10-25", FAILS),
                         ("accuracy-069-073", FAILS), ("floor-risk", HOLDS)):
        assert verdict(claim, evidence) == after, claim
    finding = claims.judge(BY_ID["accuracy-069-073"], lab(evidence))
    assert "0.610" in finding.reason
    assert "60 steps" in finding.reason
    assert "200 -> 2.5 ms a step" in str(claims.judge(BY_ID["kernel-feasible"], lab(evidence)).ours)


def test_checks_ask_for_tables_that_their_study_records():
    asked = {(study, name) for path in sorted((ROOT / "analysis" / "studies" /
    "claims").rglob("*.py"))
             for study, name in re.findall(r'lab\.table\(\s*"(\w+)", "(\w+)"', path.read_text())}
    assert len(asked) > 2
    in_records = {(r.study, name) for r in load_records().values()
                  for name in (*r.tables, *r.figures)}
    for study, name in asked - in_records:
        fields = get_study(study).module().Results.__dataclass_fields__
        assert name in fields or name in drawings(get_study(study)), f"{study} keeps no {name}"


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
        recorded = on_gpu({"few_steps_best_bits": bits, "few_steps_tokens": 16384},
                          study="ablation")
        finding = claims.judge(BY_ID["lowest-in-five"], lab(recorded))
        assert (finding.verdict, finding.source) == (after, "run")


def test_a_longer_training_of_tied_heads_decides():
    for end, after in ((0.005, HOLDS), (0.03, CAVEAT), (0.3, FAILS)):
        rows = [{"steps": n, "tied minus own, bits/byte": d} for n, d in ((100, 0.7), (3000, end))]
        recorded = Evidence((), (run_of("claims", tables={"tied": rows}),))
        assert verdict("tied-neutral", recorded) == after


def test_peaks_by_an_allocator_decide():
    """The same rows that the record of an H200 has."""
    def record(mb: float, checkpointing: bool = False) -> Evidence:
        rows = [{"layers": "MMMM", "d_model": 192, "form": "document_as_coded", "batch": batch,
                 "context": context, "autocast": "bf16", "checkpointing": checkpointing,
                 "peak, measured, MB": mb} for batch, context in ((64, 2048), (16, 1024))]
        made = run_of("memory", tables={"cuda": rows}, device="cuda", provenance={
            "machine": {"gpus": [{"name": "a GPU"}]}})
        return Evidence((), (made,))

    assert [verdict("oom-40", record(mb)) for mb in (82e3, 30e3)] == [HOLDS, FAILS]
    assert [verdict("inside-40", record(mb)) for mb in (10e3, 30e3, 50e3)] == [
        HOLDS, CAVEAT, FAILS]
    finding = claims.judge(BY_ID["fix-checkpointing"], lab(record(27.9e3, checkpointing=True)))
    assert "27.9 by the allocator of a GPU" in finding.reason


def test_the_stronger_evidence_speaks_and_is_named():
    """A card's numbers before others, a full run or a record before a quick run here."""
    quick = replace(run_of("throughput", {"x": 1.0}, name="quick"), profile="quick")
    full = replace(run_of("throughput", {"x": 2.0}, name="full"), profile="full")
    card = run_of("throughput", {"x": 3.0}, device="cuda", name="card")
    record = run_of("throughput", {"x": 4.0}, name="record")
    for runs, records, first in (((quick,), (card,), "card"), ((quick,), (record,), "record"),
                                 ((full,), (record,), "full"), ((full,), (card,), "card"),
                                 ((quick,), (), "quick")):
        found = Evidence(runs, records).value("throughput", "x")
        assert found.name == first
        assert first in found.text


def test_the_longest_training_speaks_first():
    quick = run_of("ablation", {"ssm_steps": -0.5, "hybrid_steps": -0.5}, name="quick")
    long = run_of("ablation", {"ssm_steps": 0.5, "hybrid_steps": 0.4}, name="long")
    runs = (replace(quick, parameters={"steps": 80, "device": "cuda"}),
            replace(long, parameters={"steps": 1000}))
    found = Evidence(runs[:1], runs[1:])
    assert found.value("ablation", "ssm_steps").name == "quick"  # the card's
    assert found.value("ablation", "ssm_steps", most="steps").name == "long"
    assert verdict("speed-not-quality", found) == FAILS


SCALE = {"A": "modded_nanogpt", "M": "nano_ssm", "MA": "nano_ssm_1_1"}


def systems(ssm: float, hybrid: float, ending: str = "", seeds: int = 1, joules: float = 16e3,
            steps: int = 2150) -> list[dict]:
    """Whole runs of the baseline's recipe: bits a byte that the SSM and the hybrid are off."""
    rows = [{"system": SCALE[p] + ending, "seed": seed, "steps": steps, "valid_bits_per_byte":
             1.4 + b, "valid_accuracy": 0.72 - b / 5, "joules": joules if p == "MA" else 15e3}
            for p, b in (("A", 0.0), ("M", ssm), ("MA", hybrid)) for seed in range(seeds)]
    return rows


def small(ssm: float = -0.2, hybrid: float = -0.1):
    return run_of("ablation", {"ssm_steps": ssm, "hybrid_steps": hybrid, "ssm_char_accuracy": 0.5,
                               "reference_char_accuracy": 0.45})


def second(name: str = "wide", **bits: float):
    """Runs at the second document's widths, by pattern and in three seeds."""
    rows = [{"pattern": p, "seed": seed, "heldout_bits_per_byte": 2 + b + seed / 100}
            for p, b in bits.items() for seed in range(3)]
    run = run_of("ablation", tables={"runs": rows}, name=name)
    return replace(run, parameters={"d_model": 512, "n_layer": 9, "steps": 400})


def test_larger_models_speak_beside_small_ones():
    for ending in ("", "_500"):
        def judged(ssm: float, hybrid: float, claim: str, ending: str = ending) -> str:
            return verdict(claim, Evidence((small(),), task(*systems(ssm, hybrid, ending)).records))

        assert judged(-0.1, -0.05, "speed-not-quality") == HOLDS
        assert judged(0.15, -0.05, "speed-not-quality") == CAVEAT
        assert judged(0.15, 0.05, "speed-not-quality") == CAVEAT
        assert judged(0.15, 0.05, "attention-home-turf") == CAVEAT
        assert judged(-0.15, 0.05, "attention-home-turf") == FAILS


def test_the_whole_recipe_speaks_before_its_start():
    rows = [*systems(0.2, -0.02), *systems(0.15, 0.05, "_500", steps=500)]
    finding = claims.judge(BY_ID["speed-not-quality"], lab(Evidence((small(),),
                                                                    task(*rows).records)))
    assert "-0.020 bits (a recipe close to the baseline's)" in str(finding.ours)
    assert "after 2,150 steps the pure SSM is +0.200" in finding.reason
    assert "after 500 steps the pure SSM is +0.150" in finding.reason
    behind = Evidence((small(0.3, 0.2),), task(*systems(0.3, 0.2)).records)
    assert verdict("speed-not-quality", behind) == FAILS
    own = Evidence((small(0.3, 0.2), second(A=0.0, MA=-0.1)), behind.records)
    assert verdict("speed-not-quality", own) == CAVEAT


def test_systems_of_unequal_steps_are_not_compared():
    unequal = systems(-0.1, -0.05)
    unequal[-1]["steps"] = 700
    assert verdict("genuinely-competitive", task(*unequal)) == OPEN
    assert verdict("genuinely-competitive", task(*systems(-0.1, -0.05))) == CAVEAT


def test_systems_are_taken_from_one_record():
    """A newer record of attention alone does not come between them."""
    newer, older = task(*systems(0.0, 0.0)[:1]).records, task(*systems(0.1, -0.1)).records
    older = tuple(replace(run, run_id="older") for run in older)
    found = Evidence((), newer + older).tasks(*SCALE.values())
    assert found is not None
    assert {source.name for source in found} == {"older"}


def test_costs_of_different_jobs_have_no_ratio():
    """Both numbers stand there, as they were measured."""
    rows = systems(0.2, -0.01, seeds=3)
    for claim in ("genuinely-competitive", "closer-to-baseline"):
        one, several = (claims.judge(BY_ID[claim], lab(task(*rows, job=job))) for job in ("a", ""))
        assert "x the energy" in str(one.ours)
        assert "energy" not in str(several.ours)
        assert "several commands" in several.reason
        assert (one.verdict, several.verdict) == (HOLDS, CAVEAT)
    base = {"system": "modded_nanogpt", "joules": 15e3, "seconds": 30.0}
    one, several = (str(claims.judge(BY_ID["train-cheap"], lab(task({}, base, job=job))).ours)
                    for job in ("a", ""))
    assert "x the baseline" in one
    assert several.endswith("two jobs")


@pytest.mark.parametrize(("hybrid", "seeds", "joules", "after"), [
    (-0.02, 3, 15.5e3, HOLDS), (-0.02, 1, 15.5e3, CAVEAT), (-0.02, 3, 20e3, CAVEAT),
    (0.05, 3, 14e3, CAVEAT), (0.05, 3, 20e3, FAILS), (0.5, 3, 14e3, FAILS)])
def test_the_race_by_one_recipe_decides(hybrid, seeds, joules, after):
    recorded = task(*systems(0.2, hybrid, seeds=seeds, joules=joules))
    for claim in ("genuinely-competitive", "closer-to-baseline"):
        assert verdict(claim, recorded) == after


def test_the_documents_own_widths_are_found_by_their_size():
    small_run = replace(second("small", A=0.0, MA=9.0), parameters={
        "d_model": 64, "n_layer": 9, "steps": 4000})
    finding = claims.judge(BY_ID["best-of-22"], lab(Evidence((small_run, second(A=0.0, MA=-0.15)))))
    assert (finding.verdict, finding.source) == (OPEN, "wide")
    assert str(finding.ours).startswith("-0.150 bits")


def test_ratios_are_compared_seed_by_seed():
    for gap, after in ((-0.2, HOLDS), (-0.02, CAVEAT), (0.02, FAILS)):
        assert verdict("ratio-again", Evidence((second(MA=0.0, MMMA=gap),))) == after
    assert verdict("ratio-again") == OPEN


def test_a_byte_in_plain_torch_decides_what_scoring_costs():
    """The document streams through torch; a kernel of ours says little of it."""
    def judged(ssm: float, written: float | None, seen: int = 1) -> str:
        ms = {"SSM": ssm, "attention, last 1024 keys": 1.0, "attention, all keys": 2.0}
        tables = {"streaming": [{"system": s, "bytes_seen": 4096, "ms": v} for s, v in ms.items()]}
        if written is not None:
            tables["stream"] = [
                {"way": way, "texts at a time": n, "a byte of each, median (us)": us}
                for way, n, us in (("torch, a call a byte", 8, 1.0), ("kernel", seen, 1.0),
                                   ("torch, a call a byte", seen, 1e3 * written))]
        return verdict("eval-cheap", on_gpu(tables=tables))

    assert [judged(0.1, ms) for ms in (0.4, 0.6, 1.5, 3.0)] == [HOLDS, CAVEAT, CAVEAT, FAILS]
    assert [judged(ms, None) for ms in (0.4, 3.0)] == [CAVEAT, FAILS]


def streamed(losses: list[float], steps: int = 600) -> Evidence:
    """A record of models trained by the published scan that lose so many bits when streamed."""
    rows = [dict(zip(COLUMNS, (seed, steps, 2.5, 2.5, 2.5 + loss, 0.5, 0.49), strict=True))
            for seed, loss in enumerate(losses)]
    return Evidence((), (run_of("claims", tables={"streamed": rows}, name="streamed"),))


def test_the_longer_training_decides_what_streaming_costs():
    for losses, noise, suffers in (([0.013, 0.033, 0.181], FAILS, HOLDS),
                                   ([0.001, 0.002, 0.0], CAVEAT, FAILS),
                                   ([-0.01, 0.05, 0.02], FAILS, CAVEAT)):
        assert verdict("below-noise", streamed(losses)) == noise
        assert verdict("underperform", streamed(losses)) == suffers
    finding = claims.judge(BY_ID["below-noise"], lab(streamed([0.013, 0.033, 0.181])))
    assert "3 seeds" in finding.reason
    assert finding.source == "streamed"
    # A shorter record does not stand before what is trained here.
    assert "computed here" in claims.judge(BY_ID["below-noise"], lab(streamed([9.0], 5))).source


def test_parts_of_a_block_are_decided_by_several_seeds():
    def record(selection: list[float]) -> Evidence:
        rows = [{"seed": i, "steps": 1500, "without selection, bits/byte": bits,
                 "without gate, bits/byte": 0.17, "without convolution, bits/byte": 0.2}
                for i, bits in enumerate(selection)]
        return Evidence((), (run_of("claims", tables={"parts": rows}, name="parts"),))

    for selection, after in (([0.0, 0.01, 0.016], FAILS), ([0.0], OPEN), ([0.3, 0.4, 0.5], HOLDS),
                             ([0.0, 0.3, 0.1], CAVEAT)):
        assert verdict("gating-key", record(selection)) == after


def test_the_published_forms_own_end_is_told():
    values = {"highest_exponent": 225.0, "document_crossed": 162,
              "document_ending": "step 163: loss nan, gradient norm nan; first not finite in x"}
    for claim in ("benign", "chunks-fix-overflow"):
        finding = claims.judge(BY_ID[claim], lab(Evidence((run_of("overflow", values),))))
        assert "at step 162 and ends so: step 163: loss nan." in finding.reason


def test_idle_power_is_said_to_be_assumed():
    known = task({}, {"system": "mamba_byte"}).records[0]
    measured = replace(run_of("task"), parameters={"idle_measured_watts": 130.0})
    finding = claims.judge(BY_ID["energy-10-25"], lab(Evidence(
        (), (replace(known, parameters={"idle_watts": 50.0}), measured))))
    # 15 kJ in 200 s are 75 W, and 80 W less would be nothing.
    assert "an assumed 50 W" in finding.reason
    assert "-1 kJ with the 130 W" in finding.reason


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
