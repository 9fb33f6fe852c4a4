"""The claims ledger: its rows, its arithmetic done again, and verdicts that change with numbers."""

from __future__ import annotations

import ast
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis import claims
from analysis.claims import choices
from analysis.claims import evidence as evidence_module
from analysis.claims.evidence import Evidence, gather, load_records
from analysis.claims.lab import EXPERIMENTS, Lab, Settings
from analysis.claims.ledger import (
    CAVEAT,
    CHECKS,
    CLAIMS,
    DOCUMENTS,
    FAILS,
    HOLDS,
    INCONSISTENT,
    KINDS,
    OPEN,
    VERDICTS,
    Claim,
    Finding,
    load_ledger,
)
from analysis.claims.memory import PUBLISHED, full_tensor, kept
from analysis.claims.published import first_run
from analysis.plots.claims import VERDICTS as DRAWN
from analysis.plots.claims import verdict_bars
from analysis.records import write_tables
from analysis.results import ROOT, Run, Table, Value, write_record
from analysis.sources import source_files
from analysis.studies import get_study
from analysis.task_record import rows_frame, summary_frame
from mambabyte.config import PRESETS
from mambabyte.errors import UserError
from mambabyte.files import write_json
from mambabyte.model import ByteLM

LEDGER = load_ledger()
BY_ID = {claim.id: claim for claim in LEDGER.claims}
CHEAP = ("formula", "overflow", "gradient", "kept", "selectivity")

# What the experiments give, so that the tests of judgement need not run them.
TYPICAL = {
    "scan_step.published_32": 2.2e-3, "scan_step.published_64": 2.2e-3,
    "scan_step.corrected_32": 9e-7, "scan_step.probability_32": 1.6e-3,
    "formula.whole_to_definition": 0.36, "formula.whole_to_early_decay": 3e-16,
    "formula.chunked_to_whole": 3e-16,
    "overflow.log_max": 88.72, "overflow.whole_fails_at_8": 112, "overflow.whole_fails_at_16": 57,
    "overflow.chunk_fails_at_decay": 2.8, "overflow.exp_cs_zero_at_decay": 3.25,
    "overflow.stable_error_there": 4e-8,
    "gradient.document_chunked_across_32": 0.071, "gradient.document_chunked_across_64": 0.071,
    "gradient.document_chunked_all_64": 0.35, "gradient.document_chunked_nonzero_64": 1.0,
    "gradient.corrected_cumsum_across_32": 1.6e-7,
    "kept.full_tensors": 5.0, "kept.without_concatenation": 1.0, "kept.twice_length": 2.0,
    "kept.twice_channels": 2.0, "kept.twice_states": 2.0,
    "operations.calls": 363, "operations.in_float32": 1, "operations.backward_exponent": 1.95,
    "operations.built_from_both": 1, "operations.all_of_torch": 1,
    "operations.split_exponent": 1.0, "operations.bytes_per_element": 99,
    "streaming.state_bytes_16": 116736, "streaming.state_bytes_512": 116736,
    "streaming.bytes_moved_16": 5.1e6, "streaming.bytes_moved_512": 5.1e6,
    "streaming.calls_per_byte": 1, "streaming.step_error": 9e-7, "streaming.tail_inputs": 3,
    "streaming.ssm_channels": 384, "streaming.ssm_states": 16,
    "selectivity.dt": 0.05, "selectivity.B": 0.9, "selectivity.C": 0.9,
    "initial.loss": 5.576, "initial.loss_low": 5.56, "initial.loss_high": 5.59,
    "initial.unit_loss": 185.5, "initial.bias_low": 1.001e-3, "initial.bias_high": 0.0999,
    "initial.bias_median": 0.0099, "initial.bias_mean": 0.0217, "initial.dt_high": 0.147,
    "initial.headroom": 60.4, "initial.whole_overflows_at": 49, "initial.A_low": -16,
    "initial.A_high": -1, "initial.A_is_range": 1,
    "fox.first_loss": 5.64, "fox.last_loss": 0.69, "fox.accuracy_at_their_loss": 0.99,
    "fox.steps_to_their_loss": 9, "fox.accuracy": 0.997, "fox.headroom": 62.9,
    "fox_published.last_loss": 0.69, "fox_published.accuracy": 0.997,
    "fox_published.parallel_loss": 0.6621, "fox_published.streamed_loss": 0.6633,
    "fox_fast.headroom": 72.8, "fox_fast.dt_high": 0.21,
    "smoke.steps": 2, "smoke.context": 64, "smoke.batch": 2, "smoke.seconds": 0.04,
    "smoke.published_passes_check": 0,
    "mixers.attention": 4.7, "mixers.loop": 45.0, "mixers.published": 70.0, "mixers.auto": 6.6,
    "second_steps.bits_5": 4.59, "second_steps.bits_40": 3.26,
    "second_steps.bits_250": 2.75, "artefact.untrained": 0.32, "artefact.after_5": 0.37,
    "tying.early": 0.46, "tying.late": 0.3, "tying.tied_after_60": 4.0, "tying.own_after_60": 3.54,
    "tying.tied_after_180": 3.5, "tying.own_after_180": 3.2, "tying.head_parameters": 12288,
    "tying.smaller_share": 0.45, "tying.cosine": 0.15,
    "gating.dt_spread": 1.7, "gating.without_selection": 0.064, "gating.without_gate": 0.31,
    "gating.without_convolution": 0.24,
    "counts.bits_0": 4.65, "counts.bits_1": 3.78, "counts.accuracy_0": 0.16,
    "counts.accuracy_4": 0.60, "crashed.ssm_2": 1, "crashed.ssm_3": 1,
}


# What was published beside the documents decides some claims on its own; most tests ask what our
# measurements say, so they do without the authors' run.
OUR_FACTS = {name: fact for name, fact in LEDGER.facts.items() if name != "first_run"}


def lab(evidence: Evidence | None = None, *, facts: dict | None = None, **given: float) -> Lab:
    """A laboratory with typical numbers; ``fox__headroom=99`` replaces fox.headroom."""
    other = {name.replace("__", "."): value for name, value in given.items()}
    return Lab(Settings(), evidence, facts or OUR_FACTS, {**TYPICAL, **other})


def verdict(claim: str, evidence: Evidence | None = None, **given: float) -> str:
    return claims.judge(BY_ID[claim], lab(evidence, **given)).verdict


def run_of(study: str, values: dict | None = None, tables: dict | None = None,
           device: str = "cpu", name: str = "run", **entries) -> Run:
    return Run(
        folder=Path(name), study=study, parameters={"device": device}, run_id=name,
        values={k: Value(v) for k, v in (values or {}).items()},
        tables={k: Table(k, "", pd.DataFrame(v)) for k, v in (tables or {}).items()}, **entries)


# --------------------------------------------------------------------------------- the rows


def test_ledger_is_complete():
    assert len(LEDGER.claims) >= 80
    assert {c.document for c in LEDGER.claims} == set(DOCUMENTS)
    assert {c.kind for c in LEDGER.claims} == set(KINDS)
    assert len({c.claim for c in LEDGER.claims}) == len(LEDGER.claims)


def test_every_check_exists_and_every_check_is_used():
    assert {c.check for c in LEDGER.claims} == CHECKS.keys()


def test_open_statements_say_what_would_decide():
    for claim in LEDGER.claims:
        if claim.check == "open-statement":
            assert claim.note, claim.id


@pytest.mark.parametrize(("row", "match"), [
    ('id="a"\ndocument="first"\nwhere="x"\nclaim="y"\nkind="z"\ncheck="c"', "kind 'z'"),
    ('id="a"\ndocument="third"\nwhere="x"\nclaim="y"\nkind="memory"\ncheck="c"', "document"),
    ('id="a"\ndocument="first"\nwhere="x"\nkind="memory"\ncheck="c"', "claim is missing"),
    ('id="a"\ndocument="first"\nwhere="x"\nclaim="y"\nkind="memory"\ncheck="c"\nverdict="holds"',
     "unknown entries verdict"),
    ('id="a"\ndocument="first"\nwhere="x"\nclaim="y"\nkind="memory"\ncheck="c"\nnumbers=["4"]',
     "finite numbers"),
])
def test_bad_row_is_refused(tmp_path, row, match):
    path = tmp_path / "claims.toml"
    path.write_text(f"[[claim]]\n{row}\n")
    with pytest.raises(UserError, match=match):
        load_ledger(path)


def test_doubled_id_is_refused(tmp_path):
    row = '[[claim]]\nid="a"\ndocument="first"\nwhere="x"\nclaim="y"\nkind="memory"\ncheck="c"\n'
    path = tmp_path / "claims.toml"
    path.write_text(row * 2)
    with pytest.raises(UserError, match="twice"):
        load_ledger(path)


def test_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text("claims = 3")
    with pytest.raises(UserError, match="not a ledger"):
        load_ledger(path)


def test_unknown_check_is_refused():
    with pytest.raises(UserError, match="does not exist"):
        claims.judge(replace(BY_ID["parameters"], check="nothing"), lab())


def test_unknown_verdict_is_refused():
    with pytest.raises(UserError, match="verdict"):
        Finding("perhaps", None, "because")


def test_digest_of_the_study_follows_the_ledger_and_its_checks():
    followed = {path.name for path in source_files(["analysis.claims"])}
    assert {CLAIMS, "arithmetic.py", "trainings.py", "ledger.py"} <= followed


def test_no_verdict_is_returned_without_looking():
    """A check whose every return is the same constant verdict would not be a check."""
    allowed = {"open_statement", "leader_energy", "best_of_runs"}  # cannot be had
    for module in claims.CHECK_MODULES:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if not (isinstance(node, ast.FunctionDef)
                    and "check" in map(ast.unparse, node.decorator_list)):
                continue
            returned = [n.args[0] for n in ast.walk(node) if isinstance(n, ast.Call)
                        and isinstance(n.func, ast.Name) and n.func.id == "Finding"]
            constant = {a.id for a in returned if isinstance(a, ast.Name) and a.id.isupper()}
            others = [a for a in returned if not (isinstance(a, ast.Name) and a.id.isupper())]
            helper = any(isinstance(n, ast.Call) and ast.unparse(n.func) in ("_count",)
                         for n in ast.walk(node))
            assert others or helper or len(constant) > 1 or node.name in allowed, node.name


# ---------------------------------------------------------------------------- judged as a whole


def test_every_claim_gets_a_finding():
    room = lab()
    for claim in LEDGER.claims:
        finding = claims.judge(claim, room)
        assert finding.verdict in VERDICTS
        assert finding.reason.strip().endswith((".", ")")), claim.id
        assert finding.source
        assert "nan" not in f"{finding.ours} {finding.reason}".split(), claim.id


def test_missing_runs_are_named():
    for claim in ("wall-clock", "overhead-2-4", "eval-cheap", "speed-not-quality", "floor-risk"):
        finding = claims.judge(BY_ID[claim], lab())
        assert finding.verdict == OPEN
        assert "run study" in finding.reason
        assert finding.source.startswith("study ")


def test_typical_numbers_are_those_of_the_experiments():
    """The experiments that take no time give the numbers that the other tests assume."""
    torch.set_num_threads(1)
    for name in CHEAP:
        for quantity, value in EXPERIMENTS[name](Settings()).items():
            typical = TYPICAL.get(f"{name}.{quantity}")
            if typical is not None and abs(typical) > 1e-4:
                assert value == pytest.approx(typical, rel=0.15), f"{name}.{quantity}"


# -------------------------------------------------------------------------- verdicts can change


@pytest.mark.parametrize(("claim", "before", "given", "after"), [
    ("naive-formula", FAILS, {"formula__whole_to_definition": 1e-15}, HOLDS),
    ("chunk-formula", CAVEAT, {"formula__chunked_to_whole": 0.1}, FAILS),
    ("rounding-error", FAILS, {"scan_step__published_64": 1e-12}, HOLDS),
    ("agree-013", CAVEAT, {"scan_step__published_32": 1e-3}, HOLDS),
    ("agree-013", CAVEAT, {"scan_step__published_32": 0.1}, FAILS),
    ("below-noise", CAVEAT, {"fox_published__streamed_loss": 0.9}, FAILS),
    ("a-max", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("step-decay", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("chunk-bound-26", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("overflow-by-50", INCONSISTENT, {"overflow__whole_fails_at_8": 50}, HOLDS),
    ("overflow-by-50", INCONSISTENT, {"initial__whole_overflows_at": 400}, FAILS),
    ("dt-max", FAILS, {"initial__dt_high": 0.09, "fox_fast__dt_high": 0.1}, HOLDS),
    ("inner-bounded", CAVEAT, {"overflow__chunk_fails_at_decay": math.inf}, HOLDS),
    ("comfortably-fp32", CAVEAT, {"initial__headroom": 95}, FAILS),
    ("chunks-fix-overflow", CAVEAT, {"initial__headroom": 10}, HOLDS),
    ("benign", CAVEAT, {"fox_fast__headroom": 120}, FAILS),
    ("saturates", FAILS, {"overflow__exp_cs_zero_at_decay": 1.0}, HOLDS),
    ("less-bulletproof", HOLDS, {"overflow__stable_error_there": 1.0}, FAILS),
    ("gradient-same-math", FAILS, {"gradient__document_chunked_across_32": 1e-7}, HOLDS),
    ("carry-gradient", HOLDS, {"gradient__document_chunked_nonzero_64": 0.0}, FAILS),
    ("underperform", CAVEAT, {"fox_published__last_loss": 1.5}, HOLDS),
    ("cumsum-exp", HOLDS, {"operations__built_from_both": 0}, FAILS),
    ("cumsum-exp", HOLDS, {"operations__all_of_torch": 0}, FAILS),
    ("fox-confirms", FAILS, {"fox_published__last_loss": 3.0}, HOLDS),
    ("smoke-pass", CAVEAT, {"smoke__published_passes_check": 1}, HOLDS),
    ("init-002", HOLDS, {"initial__loss": 7.0}, FAILS),
    ("init-185", HOLDS, {"initial__unit_loss": 20.0}, FAILS),
    ("dt-bias-range", HOLDS, {"initial__bias_high": 0.5}, FAILS),
    ("a-init", CAVEAT, {"initial__A_is_range": 0}, FAILS),
    ("five-to-seven", HOLDS, {"kept__full_tensors": 2.0}, FAILS),
    ("because-concatenated", FAILS, {"kept__without_concatenation": 0.1}, HOLDS),
    ("full-sequence-held", HOLDS, {"kept__twice_length": 1.0}, FAILS),
    ("memory-n-d-state", CAVEAT, {"kept__twice_channels": 1.0}, HOLDS),
    ("time-n-d-inner-d-state", FAILS, {"operations__backward_exponent": 1.0}, HOLDS),
    ("linear-complexity", CAVEAT, {"operations__split_exponent": 2.0}, FAILS),
    ("fuse-acceptably", FAILS, {"operations__calls": 5}, HOLDS),
    ("bandwidth-bound", HOLDS, {"operations__bytes_per_element": 0.1}, FAILS),
    ("state-o-1", HOLDS, {"streaming__state_bytes_512": 2e6}, FAILS),
    ("step-cost-constant", HOLDS, {"streaming__bytes_moved_512": 2e7}, FAILS),
    ("conv-state", CAVEAT, {"streaming__tail_inputs": 4}, HOLDS),
    ("conv-state", CAVEAT, {"streaming__step_error": 0.5}, FAILS),
    ("one-step-per-byte", HOLDS, {"streaming__step_error": 0.5}, FAILS),
    ("data-dependent", HOLDS, {"selectivity__B": 0.0}, FAILS),
    ("fox-loss", CAVEAT, {"fox__last_loss": 3.9, "fox__first_loss": 5.6}, HOLDS),
    ("fox-loss", CAVEAT, {"fox__last_loss": 5.5}, FAILS),
    ("fox-accuracy", HOLDS, {"fox__accuracy_at_their_loss": 0.1, "fox__accuracy": 0.2}, FAILS),
    ("lowest-in-five", INCONSISTENT, {"second_steps__bits_5": 2.0}, HOLDS),
    ("converge-lower", HOLDS, {"second_steps__bits_40": 4.6}, FAILS),
    ("fifty-times-longer", HOLDS, {"second_steps__bits_250": 4.6}, FAILS),
    ("artefact-16", CAVEAT, {"artefact__untrained": 0.9}, FAILS),
    ("artefact-16", CAVEAT, {"artefact__after_5": 0.3}, HOLDS),
    ("tied-neutral", OPEN, {"tying__late": -0.01}, HOLDS),
    ("tied-neutral", OPEN, {"tying__late": 0.5}, FAILS),
    ("tied-couples", HOLDS, {"tying__smaller_share": 0.0}, FAILS),
    ("gating-key", FAILS, {"gating__without_selection": 0.5}, HOLDS),
    ("gating-key", FAILS, {"gating__without_selection": 0.2}, CAVEAT),
    ("gating-dynamic", HOLDS, {"gating__dt_spread": 1.0}, FAILS),
    ("gating-dynamic", HOLDS, {"gating__without_selection": -0.1}, CAVEAT),
    ("initial-losses", HOLDS, {"initial__loss_low": 5.7, "initial__loss_high": 5.8}, INCONSISTENT),
    ("signs-of-life", CAVEAT, {"counts__bits_0": 3.0}, FAILS),
    ("metric-short-range", CAVEAT, {"counts__accuracy_4": 0.2}, FAILS),
    ("viable-but-slow", HOLDS, {"mixers__loop": 4.0}, FAILS),
    ("limited-by-speed", HOLDS, {"mixers__auto": 44.0}, FAILS),
    ("crashes", CAVEAT, {"crashed__ssm_2": 0}, FAILS),
    ("smoke-one-second", HOLDS, {"smoke__seconds": 60.0}, FAILS),
])
def test_another_measurement_gives_another_verdict(claim, before, given, after):
    assert verdict(claim) == before
    assert verdict(claim, **given) == after


@pytest.mark.parametrize(("claim", "numbers", "after"), [
    ("parameters", (2e6,), FAILS), ("tokens-64m", (65.5e6,), HOLDS), ("tokens-3x", (5,), FAILS),
    ("cut-16", (8,), HOLDS), ("product-64", (30,), FAILS),
    ("footprint-8", (20,), FAILS), ("tensor-32", (16.1,), HOLDS), ("our-config-64", (0.4,), HOLDS),
    ("over-15", (1.7,), FAILS), ("margin-4", (5,), HOLDS), ("flops-7e13", (4.4e14,), HOLDS),
    ("third-from-overhead", (0.1, 5, 8), FAILS), ("ten-percent", (0.5,), FAILS),
    ("energy-ranges", (10, 20, 10, 20), HOLDS),
    ("third-of-time", (294.9, 90, 105), HOLDS), ("six-three", (7, 2), HOLDS),
    ("three-to-one", (3.5,), HOLDS), ("slower-ratio", (10, 37, 0.7), FAILS),
    ("table-values", (256, 192, 6, 16, 4, 2), INCONSISTENT),
    ("halved-quartered", (2048, 512, 64, 16), INCONSISTENT),
    ("limits-steps", (180, 0.7, 0.7), FAILS), ("overnight", (2200, 200, 37, 0.7), FAILS),
    ("kernel-gain", (40, 37, 0.7), HOLDS), ("kernel-gain", (500, 37, 0.7), FAILS),
    ("implied-power", (10, 25, 80, 220, 30e3, 250), HOLDS),
    ("cuts-to-fit", (15,), HOLDS), ("cuts-to-fit", (10,), FAILS), ("fix-recurrent", (20,), FAILS),
    ("fix-d-state-8", (80,), HOLDS), ("baseline-energy", (51700,), HOLDS),
    ("baseline-time", (100,), FAILS), ("baseline-accuracy", (0.5,), FAILS),
    ("baseline-power", (53336, 295), HOLDS), ("leader-accuracy", (0.8,), FAILS),
    ("install-time", (100, 150), HOLDS), ("optimizer", (1e-3, 0.9, 0.95, 0.1, 1.0), INCONSISTENT),
    ("five-effective", (200, 200, 37), HOLDS), ("three-times", (50, 50), HOLDS),
    ("two-results", (2.1, 2.0295), HOLDS), ("fox-repetitions", (400,), HOLDS),
    ("ln-256-555", (5.0,), FAILS), ("exp-26", (5e-10,), FAILS), ("overflow-at-90", (88.7,), HOLDS),
    ("baseline-power", (47285, 10), INCONSISTENT), ("artefact-16", (40,), HOLDS),
    ("mamba-2024", (2405,), HOLDS),
])
def test_another_number_in_the_row_gives_another_verdict(claim, numbers, after):
    assert verdict(claim) != after
    changed = replace(BY_ID[claim], numbers=tuple(map(float, numbers)))
    assert claims.judge(changed, lab()).verdict == after


def test_outside_facts_decide():
    real_card = replace(BY_ID["rtx-5090-ada"], theirs="Blackwell, 32 GB", numbers=(32.0,))
    assert claims.judge(real_card, lab()).verdict == HOLDS
    other = {**LEDGER.facts, "mambabyte_paper": {"datasets": ["enwik8"], "source": "x"}}
    assert verdict("enwik8-16") == FAILS
    assert claims.judge(BY_ID["enwik8-16"], Lab(facts=other)).verdict == HOLDS


@pytest.mark.parametrize(("claim", "fact", "change", "before", "after"), [
    ("dt-bias-uniform", "first_code", {"dt_draw": "uniform"}, FAILS, HOLDS),
    ("image-bundles", "image", {"packages": ["torch", "mamba-ssm"]}, HOLDS, FAILS),
    ("image-bundles", "image", {"torch": "2.4.0"}, HOLDS, FAILS),
    ("install-brittle", "mamba_ssm", {"wheels_named_by": ["Python"]}, HOLDS, FAILS),
    ("install-time", "mamba_ssm", {"build_seconds": 5}, CAVEAT, FAILS),
    ("optimizer", "first_code", {"weight_decay": 0.0}, HOLDS, INCONSISTENT),
    ("script-name", "second_script", {"name": "other.py"}, INCONSISTENT, INCONSISTENT),
    ("ratio-in-block", "second_script", {"ratio_in": "HybridBlock"}, FAILS, HOLDS),
    ("review-clean", "second_script", {"parts": ["attention", "n-gram tables"]}, HOLDS, FAILS),
])
def test_what_was_published_decides(claim, fact, change, before, after):
    assert verdict(claim) == before
    other = {**OUR_FACTS, fact: {**OUR_FACTS[fact], **change}}
    assert claims.judge(BY_ID[claim], lab(facts=other)).verdict == after


def test_the_authors_own_run_decides():
    """Its loss was lost, its clock ran out; the same run in good health decides the other way."""
    for claim, alone, lost in (
            ("benign", CAVEAT, FAILS), ("chunks-fix-overflow", CAVEAT, FAILS),
            ("wall-clock", OPEN, FAILS), ("steps-within-cap", OPEN, FAILS),
            ("energy-10-25", OPEN, FAILS), ("train-cheap", OPEN, FAILS),
            ("disqualified", OPEN, CAVEAT), ("trained-64m", OPEN, FAILS)):
        assert verdict(claim) == alone, claim
        finding = claims.judge(BY_ID[claim], lab(facts=LEDGER.facts))
        assert finding.verdict == lost, claim
        assert "cybertronai" in finding.source, claim
    run = {**LEDGER.facts["first_run"], "losses": [5.5, 3.0, 2.0, 1.9, 1.8, 1.7],
           "elapsed_s": [1, 4, 7, 10, 13, 16], "seconds": 125.0, "joules": 12e3, "steps":
           [0, 100, 200, 300, 400, 500], "disqualified": ""}
    healthy = {**LEDGER.facts, "first_run": run}
    for claim, after in (("benign", CAVEAT), ("wall-clock", HOLDS), ("steps-within-cap", HOLDS),
                         ("energy-10-25", HOLDS), ("train-cheap", HOLDS), ("disqualified", FAILS),
                         ("trained-64m", HOLDS)):
        assert claims.judge(BY_ID[claim], lab(facts=healthy)).verdict == after, claim


def test_the_authors_log_in_derived_numbers():
    run = first_run(lab(facts=LEDGER.facts))
    assert run is not None
    assert run.ms_per_step == pytest.approx(1e3 * (279 - 57) / 400)
    assert run.steps_done == pytest.approx(500 + (300.1 - 279) / 0.555, abs=1)
    assert (run.last_finite_step, run.first_lost_step) == (200, 300)
    assert first_run(lab()) is None


def test_a_mixer_without_selection_has_one_transition():
    torch.manual_seed(0)
    model = ByteLM(choices.small_model())
    choices.fix_transitions(model)
    mixer = choices.mixers_of(model)[0]
    _, delta, B, C, _, _ = mixer.scan_inputs(torch.randn(2, 7, 48), None)
    for tensor in (delta, B, C):
        assert torch.equal(tensor, tensor[:1, :1].expand_as(tensor))
    model.loss(torch.randint(256, (2, 9))).backward()
    assert mixer.constant.grad is not None
    assert mixer.dt_proj.bias.grad.abs().sum() > 0


def test_a_mixer_without_its_gate_or_neighbours():
    torch.manual_seed(0)
    ungated, alone = ByteLM(choices.small_model()), ByteLM(choices.small_model())
    choices.open_gates(ungated)
    choices.drop_convolution(alone)
    x = torch.randn(1, 5, 48)
    z = choices.mixers_of(ungated)[0].scan_inputs(x, None)[4]
    assert torch.nn.functional.silu(z) == pytest.approx(torch.ones_like(z), rel=1e-5)
    mixer = choices.mixers_of(alone)[0]
    moved = x.clone()
    moved[:, 1] += 1  # a neighbour changes nothing of what the next byte brings
    u, v = (mixer.scan_inputs(t, None)[0][:, 2] for t in (x, moved))
    assert torch.equal(u, v)
    assert not torch.equal(x, moved)


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


def test_recorded_loop_decides():
    for ratio, after in ((52.0, HOLDS), (90.0, CAVEAT), (400.0, FAILS)):
        assert verdict("slower-50", on_gpu({"loop_over_attention": ratio})) == after


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
                 "measured peak (MB)": mb} for batch, context in ((64, 2048), (16, 1024))]
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


# ------------------------------------------------------------------ the arithmetic, done again


def ours(claim: str) -> str:
    return str(claims.judge(BY_ID[claim], lab()).ours)


def test_counts_by_hand():
    d, n, r, layers = 384, 16, 12, 4
    block = 192 * 2 * d + d * 4 + d + d * (r + 2 * n) + r * d + d + d * n + d + d * 192 + 2 * 192
    assert ours("parameters") == f"{256 * 192 + layers * block + 2 * 192:,}" == "1,057,152"
    assert ours("tokens-64m") == f"{16 * 1024 * 4000 / 1e6:.1f} M" == "65.5 M"
    assert ours("tokens-197m") == f"{64 * 2048 * 1500 / 1e6:.1f} M"
    assert ours("product-7e13") == f"{16 * 1024 * 4000 * 1057152:.3g}"
    assert ours("exp-26") == f"{math.exp(-26):.3g}"
    assert ours("chunk-bound-26") == f"{32 * 0.1 * 16:.1f}"
    assert ours("exp-inner-range") == f"[1, {math.exp(31 * 1.6):.3g}]"
    assert ours("slower-ratio") == f"{37 / 0.7:.1f}"


def test_attention_and_ssm_parameters_by_hand():
    d, inner, n = 512, 1024, 16
    attention = d * d + d * d + 2 * d * 256
    ssm = (d * 2 * inner + inner * 4 + inner + inner * inner + inner + inner * n + inner
           + 2 * inner * n + inner * d)
    assert ours("fewer-parameters") == f"{ssm:,} against {attention:,}"


def test_bytes_by_hand():
    before, after = PRESETS["mamba_byte_original"].train, PRESETS["mamba_byte"].train
    one = 64 * 2048 * 384 * 16 * 4
    assert full_tensor(before) == one == 8 * full_tensor(after)
    assert ours("product-64") == f"{5 * one * 4 / 1e9:.1f} GB"
    # Five full tensors and delta u, in four layers, whatever autocast does.
    scan = 4 * (5 * one + 64 * 2048 * 384 * 4)
    assert kept(before, "fp32", "scan") == pytest.approx(scan, rel=0.02)
    assert kept(before, "bf16", "scan") == pytest.approx(kept(before, "fp32", "scan"), rel=0.02)
    assert PUBLISHED.scan_form == "document_chunked"


def test_layers_by_hand():
    assert "MMMAMMMAM" in ours("six-three")
    assert ours("ssm-1-ratio") == f"{5 / 4:.2f}:1"


# --------------------------------------------------------------------------------- the evidence


def write_run(root: Path, name: str, study: str, date: str, values: dict, sources: str = "",
              profile: str = "quick") -> None:
    folder = root / name
    folder.mkdir(parents=True)
    write_record(folder, {
        "study": study, "parameters": {}, "status": "done", "run_id": name, "sources": sources,
        "profile": profile, "values": {k: {"value": v} for k, v in values.items()},
        "provenance": {"date": date, "machine": {"cpu": "a CPU", "gpus": []}}})


def test_gather_prefers_full_then_newest_and_drops_stale(tmp_path, monkeypatch):
    write_run(tmp_path, "a", "made-up", "2026-01-01", {"x": 1.0})
    write_run(tmp_path, "b", "made-up", "2026-02-01", {"x": 2.0})
    write_run(tmp_path, "c", "made-up", "2025-01-01", {"x": 3.0}, profile="full")
    write_run(tmp_path, "d", "throughput", "2026-01-01", {"x": 4.0}, sources="another digest")
    write_run(tmp_path, "e", "claims", "2026-01-01", {"x": 5.0})
    found = gather(tmp_path, tmp_path)
    assert [r.run_id for r in found.runs] == ["c", "b", "a"]
    assert found.stale == ("throughput",)
    value = found.value("made-up", "missing", "x")
    assert value is not None
    assert (value.what, value.text) == (3.0, "c (a CPU)")
    finding = claims.judge(BY_ID["eval-cheap"], lab(found))
    assert "out of date" in finding.reason


def test_unmeasured_value_is_no_evidence():
    found = Evidence((run_of("ablation", {"drift_ssm": None}),))
    assert found.value("ablation", "drift_ssm") is None


def test_records_of_every_shape_are_read(tmp_path):
    machine = {"machine": {"cpu": "a CPU", "gpus": [{"name": "a GPU"}]}}
    write_json(tmp_path / "a.json", {
        "format": 1, "study": "throughput", "parameters": {"device": "cuda"},
        "values": {"x": {"value": "inf"}}, "provenance": machine,
        "tables": [{"name": "t", "caption": "c", "columns": ["k"], "rows": [[1], [None]]}]})
    write_json(tmp_path / "b.json", {
        "study": "overflow", "parameters": {}, **machine, "tables": {"t": [{"k": 1}]}})
    write_json(tmp_path / "c.json", [1, 2])
    write_json(tmp_path / "d.json", {
        "system": "ours", "runs": [{"system": "ours", "seconds": 1.0, "joules": 2.0}], **machine})
    records = load_records(tmp_path)
    assert [r.study for r in records] == ["throughput", "overflow", "task"]
    found = Evidence((), tuple(records))
    value = found.value("throughput", "x", accelerator=True)
    assert value is not None
    assert value.what == math.inf
    assert value.text == "a (a GPU)"
    assert found.table("overflow", "t", accelerator=True) is not None
    whole = found.task("ours")
    assert whole is not None
    assert whole.what["joules"].tolist() == [2.0]
    assert found.task("another") is None


def test_broken_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json"):
        load_records(tmp_path)


# ------------------------------------------------------------------------------- the study's shape


def test_laboratory_measures_once_and_refuses_unknown_names(monkeypatch):
    calls = []
    monkeypatch.setitem(EXPERIMENTS, "made_up", lambda settings: calls.append(1) or {"x": 1.0})
    room = Lab()
    assert room["made_up.x"] + room["made_up.x"] == 2.0
    assert calls == [1]
    with pytest.raises(UserError, match="quantity"):
        room["made_up.y"]
    with pytest.raises(UserError, match="experiment"):
        room["nothing.x"]
    with pytest.raises(UserError, match="fact"):
        room.fact("nothing", "x")


def test_claim_with_wrong_numbers_is_named():
    claim = Claim("a", "first", "x", "y", "memory", "c", numbers=(1.0, 2.0, 3.0))
    for attribute in ("number", "range"):
        with pytest.raises(UserError, match="claim 'a'"):
            getattr(claim, attribute)


def test_parameters_are_checked():
    with pytest.raises(UserError, match="initial_seeds"):
        claims.Parameters(initial_seeds=0)
    for steps in ((), (0, 5), (9, 5), (5, 5)):
        with pytest.raises(UserError, match="tied_steps"):
            claims.Parameters(tied_steps=steps)


def test_run_counts_and_figure(tmp_path, monkeypatch):
    """The whole study with given numbers: every row judged, counted and drawn."""
    monkeypatch.setattr(claims, "Lab", lambda settings, evidence, facts, report: lab(evidence))
    monkeypatch.setattr(evidence_module, "MEASUREMENTS", tmp_path)
    found = claims.run(claims.Parameters(runs_root=str(tmp_path)))
    assert len(found.ledger) == len(LEDGER.claims)
    assert found.counts["all"].sum() == len(LEDGER.claims)
    assert set(VERDICTS) <= set(found.counts.columns)
    assert set(DRAWN) == set(VERDICTS)
    values = {name: value for name, (value, _, _) in claims.headline(found).items()}
    assert sum(values[f"n_{n}"] for n in claims.NAMES.values()) == values["n_claims"]
    assert values["n_claims_first"] + values["n_claims_second"] == values["n_claims"]
    assert verdict_bars(found.counts).axes
    assert found.tied["tied minus own, bits/byte"].tolist() == pytest.approx([0.46, 0.3])
    assert values["first_run_lost"] is None  # not measured, where no such run is known
    known = claims.headline(replace(found, first_run=first_run(lab(facts=LEDGER.facts))))
    assert (known["first_run_lost"][0], known["first_run_finite"][0]) == (300.0, 200.0)
    missing = found.ledger[found.ledger["source"] == "not measured"]["ours"]
    assert any(v is None for v in missing)
