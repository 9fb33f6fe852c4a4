"""Verdicts of the claims ledger change with what is measured, stated or published."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from analysis.measure.exponents import ssm_layers
from analysis.studies.claims import compute as claims
from analysis.studies.claims.checks import hybrid
from analysis.studies.claims.checks.published import first_run
from analysis.studies.claims.experiments import choices, trainings
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, INCONSISTENT, OPEN
from mambabyte.corpus import load_corpus
from mambabyte.model import ByteLM, MambaMixer
from tests.helpers.claims_lab import BY_ID, LEDGER, OUR_FACTS, lab, verdict


@pytest.mark.parametrize(("claim", "before", "given", "after"), [
    ("naive-formula", FAILS, {"formula__whole_to_definition": 1e-15}, HOLDS),
    ("chunk-formula", FAILS, {"formula__whole_to_definition": 1e-15}, HOLDS),
    ("rounding-error", FAILS, {"scan_step__published_64": 1e-12}, HOLDS),
    ("agree-013", CAVEAT, {"scan_step__published_32": 1e-3}, HOLDS),
    ("agree-013", CAVEAT, {"scan_step__published_32": 0.1}, FAILS),
    ("below-noise", FAILS, {"streamed__streamed_bits_0": 3.211}, CAVEAT),
    ("below-noise", FAILS, {"scan_step__published_32": 1e-6}, HOLDS),
    ("a-max", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("step-decay", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("chunk-bound-26", INCONSISTENT, {"initial__A_low": -8}, HOLDS),
    ("overflow-by-50", INCONSISTENT, {"overflow__whole_fails_at_8": 50}, HOLDS),
    ("overflow-by-50", INCONSISTENT, {"initial__whole_overflows_at": 400}, FAILS),
    ("dt-max", FAILS, {"initial__dt_high": 0.09, "fox_fast__dt_high": 0.1}, HOLDS),
    ("inner-bounded", CAVEAT, {"overflow__chunk_fails_at_decay": math.inf}, HOLDS),
    ("comfortably-fp32", CAVEAT, {"initial__exponent": 95}, FAILS),
    ("chunks-fix-overflow", CAVEAT, {"initial__exponent": 10}, HOLDS),
    ("benign", CAVEAT, {"fox_fast__exponent": 120}, FAILS),
    ("saturates", FAILS, {"overflow__exp_cs_zero_at_decay": 1.0}, HOLDS),
    ("less-bulletproof", HOLDS, {"overflow__stable_error_there": 1.0}, FAILS),
    ("gradient-same-math", FAILS, {"gradient__document_chunked_across_32": 1e-7}, HOLDS),
    ("carry-gradient", HOLDS, {"gradient__document_chunked_nonzero_64": 0.0}, FAILS),
    ("underperform", HOLDS, {"streamed__streamed_bits_0": 3.2}, FAILS),
    ("underperform", HOLDS, {"streamed__streamed_bits_0": 3.207}, CAVEAT),
    ("cumsum-exp", HOLDS, {"operations__built_from_both": 0}, FAILS),
    ("cumsum-exp", HOLDS, {"operations__all_of_torch": 0}, FAILS),
    ("fox-confirms", FAILS,
     {"fox_published__last_loss": 3.0, "fox_no_scan__last_loss": 3.0}, HOLDS),
    ("fox-confirms", FAILS, {"fox_published__last_loss": 3.0}, FAILS),  # none passes as well
    ("fox-confirms", FAILS, {"fox_no_scan__last_loss": 3.0}, CAVEAT),
    ("init-002", HOLDS, {"initial__loss": 7.0}, FAILS),
    ("init-185", HOLDS, {"initial__unit_loss": 20.0}, FAILS),
    ("dt-bias-range", HOLDS, {"initial__bias_high": 0.5}, FAILS),
    ("a-init", CAVEAT, {"initial__A_is_range": 0}, FAILS),
    ("five-to-seven", HOLDS, {"kept__full_tensors": 2.0}, FAILS),
    ("because-concatenated", FAILS, {"kept__without_concatenation": 0.1}, HOLDS),
    ("full-sequence-held", HOLDS, {"kept__twice_length": 1.0}, FAILS),
    ("memory-n-d-state", INCONSISTENT, {"kept__twice_channels": 1.0}, HOLDS),
    ("memory-n-d-state", INCONSISTENT, {"kept__twice_length": 4.0}, FAILS),
    ("time-n-d-inner-d-state", FAILS, {"operations__backward_exponent": 1.0}, HOLDS),
    ("linear-complexity", CAVEAT, {"operations__split_exponent": 2.0}, FAILS),
    ("fuse-acceptably", FAILS, {"operations__calls": 5}, HOLDS),
    ("overhead-cause", FAILS, {"operations__bytes_cut_once": 1200}, CAVEAT),
    ("overhead-cause", FAILS, {"operations__bytes_cut_once": 1900}, HOLDS),
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
    ("gating-key", OPEN, {"gating__without_selection_0": 0.5}, HOLDS),
    ("gating-key", OPEN, {"gating__without_selection_0": 0.2}, CAVEAT),
    ("gating-dynamic", HOLDS, {"gating__dt_spread": 1.0}, FAILS),
    ("gating-dynamic", HOLDS, {"gating__without_selection_0": -0.1}, CAVEAT),
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
    ("footprint-8", (20,), FAILS), ("tensor-32", (19.3,), HOLDS), ("our-config-64", (0.4,), HOLDS),
    ("over-15", (1.7,), FAILS), ("margin-4", (5,), HOLDS), ("flops-7e13", (4.4e14,), HOLDS),
    ("third-from-overhead", (0.1, 5, 8), FAILS), ("ten-percent", (0.5,), FAILS),
    ("energy-ranges", (10, 20, 10, 20), HOLDS),
    ("third-of-time", (1 / 3, 294.9, 90, 105), HOLDS), ("six-three", (7, 2), HOLDS),
    ("three-to-one", (3.5,), HOLDS), ("slower-ratio", (10, 37, 0.7), FAILS),
    ("table-values", (256, 192, 6, 16, 4, 2), INCONSISTENT),
    ("halved-quartered", (2048, 512, 64, 16), INCONSISTENT),
    ("limits-steps", (180, 0.7, 0.7), FAILS), ("overnight", (2200, 200, 37, 0.7), FAILS),
    ("kernel-gain", (40, 37, 0.7), HOLDS), ("kernel-gain", (500, 37, 0.7), FAILS),
    ("implied-power", (10, 25, 80, 220, 30e3, 250), HOLDS),
    ("cuts-to-fit", (15,), HOLDS), ("cuts-to-fit", (9,), FAILS), ("fix-recurrent", (20,), FAILS),
    ("fix-recurrent", (35,), CAVEAT), ("fix-d-state-8", (80,), HOLDS), ("over-15", (1.49,), HOLDS),
    ("ahead-or-closer", (1.2, 3.3), INCONSISTENT),
    ("quoted-lines", (714, 731, 746, 790), FAILS), ("quoted-lines", (714, 730, 746, 789), FAILS),
    ("baseline-energy", (51700,), HOLDS),
    ("baseline-time", (100,), FAILS), ("baseline-accuracy", (0.5,), FAILS),
    ("baseline-power", (53336, 295), HOLDS), ("leader-accuracy", (0.8,), FAILS),
    ("install-time", (100, 150), HOLDS), ("optimizer", (1e-3, 0.9, 0.95, 0.1, 1.0), INCONSISTENT),
    ("five-effective", (200, 200, 37), HOLDS), ("three-times", (50, 50), HOLDS),
    ("two-results", (2.1, 2.0295), HOLDS), ("fox-repetitions", (400,), HOLDS),
    ("ln-256-555", (5.0,), FAILS), ("exp-26", (5e-10,), FAILS), ("overflow-at-90", (88.7,), HOLDS),
    ("baseline-power", (47285, 10), INCONSISTENT), ("artefact-16", (40,), HOLDS),
    ("mamba-2024", (2023, 2312), HOLDS), ("mamba-2024", (2026, 2312), FAILS),
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
    ("smoke-pass", "first_code", {"smoke_prints": ["SMOKE PASS"]}, FAILS, CAVEAT),
    ("image-bundles", "image", {"packages": ["torch", "mamba-ssm"]}, HOLDS, FAILS),
    ("image-bundles", "image", {"torch": "2.4.0"}, HOLDS, FAILS),
    ("install-brittle", "mamba_ssm", {"wheels_named_by": ["Python"]}, HOLDS, FAILS),
    ("install-time", "mamba_ssm", {"build_seconds": 5}, CAVEAT, FAILS),
    ("optimizer", "first_code", {"weight_decay": 0.0}, HOLDS, INCONSISTENT),
    ("script-name", "second_script", {"name": "other.py"}, INCONSISTENT, INCONSISTENT),
    ("requested", "second_requests", {"items": ["JEPA", "Megakernels"]}, HOLDS, FAILS),
    ("ratio-in-block", "second_script", {"ratio_in": "HybridBlock"}, FAILS, HOLDS),
    ("review-clean", "second_script", {"parts": ["attention", "n-gram tables"]}, HOLDS, FAILS),
    ("quoted-lines", "second_script", {"scan_lines": 20}, HOLDS, FAILS),
    ("five-times-kernel", "mamba_paper", {"speedup_of": "training"}, FAILS, HOLDS),
    ("ahead-or-closer", "same_competition", {"baseline_bpb": 2.5}, CAVEAT, INCONSISTENT),
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
    model = ByteLM(choices.small_model(), {"M": choices.FixedMixer})
    choices.fix_transitions(model)
    mixer = ssm_layers(model)[0]
    _, delta, B, C, _, _ = mixer.scan_inputs(torch.randn(2, 7, 48), None)
    for tensor in (delta, B, C):
        assert torch.equal(tensor, tensor[:1, :1].expand_as(tensor))
    model.loss(torch.randint(256, (2, 9))).backward()
    assert mixer.constant.grad is not None
    assert mixer.dt_proj.bias.grad.abs().sum() > 0


def test_the_reviewed_file_is_named_where_its_lines_fit():
    other = {**OUR_FACTS, "second_script": {**OUR_FACTS["second_script"], "class_lines": 60}}
    for claim in ("script-name", "review-clean"):
        finding = claims.judge(BY_ID[claim], lab())
        assert "file that was reviewed" in finding.reason
        assert "file that was reviewed" not in claims.judge(BY_ID[claim], lab(facts=other)).reason


def test_a_layer_by_the_documents_own_whole_steps():
    """37 s = 5 s_ssm + 4 s_attention, 0.7 s = 9 s_attention."""
    attention = 0.7 / 9
    finding = claims.judge(BY_ID["slower-50"], lab())
    assert f"{(37 - 4 * attention) / 5 / attention:.0f} x a layer" in str(finding.ours)


def test_the_two_patterns_are_not_one_architecture(monkeypatch):
    assert verdict("same-architecture") == CAVEAT
    monkeypatch.setattr(hybrid, "layers", lambda pattern: "MAMAMAMAM")
    assert verdict("same-architecture") == HOLDS


def test_artefacts_are_packed_as_the_script_packs_them():
    assert LEDGER.facts["second_script"]["zlib_level"] == trainings.ZLIB_LEVEL


def test_a_mixer_without_its_scan_reads_no_state():
    torch.manual_seed(0)
    model = ByteLM(choices.small_model())
    mixer = ssm_layers(model)[0]
    x = torch.randn(1, 9, 48)
    moved = x.clone()
    moved[:, 0] += 1  # beyond the reach of a convolution over four
    before = [mixer(t, None)[0][:, 5:] for t in (x, moved)]
    assert not torch.allclose(*before)
    trainings.drop_scans(model)
    assert torch.equal(*(mixer(t, None)[0][:, 5:] for t in (x, moved)))
    model.loss(torch.randint(256, (2, 9))).backward()
    assert not mixer.x_proj.weight.grad[-mixer.A_log.shape[1]:].any()


def test_a_mixer_without_its_gate_or_neighbours():
    torch.manual_seed(0)
    config = choices.small_model()
    ungated, alone = ByteLM(config, {"M": choices.UngatedMixer}), ByteLM(config)
    choices.open_gates(ungated)
    choices.drop_convolution(alone)
    x = torch.randn(1, 5, 48)
    z = ssm_layers(ungated)[0].scan_inputs(x, None)[4]
    assert torch.nn.functional.silu(z) == pytest.approx(torch.ones_like(z), rel=1e-5)
    mixer = ssm_layers(alone)[0]
    moved = x.clone()
    moved[:, 1] += 1  # a neighbour changes nothing of what the next byte brings
    u, v = (mixer.scan_inputs(t, None)[0][:, 2] for t in (x, moved))
    assert torch.equal(u, v)
    assert not torch.equal(x, moved)


@pytest.mark.parametrize("part", ["", *choices.PARTS])
def test_captured_training_learns_what_the_eager_one_does(part, corpus_file, monkeypatch):
    """Here the captured step's functions run one by one; tests/gpu has the graph."""
    mixer, change = choices.PARTS[part] if part else (MambaMixer, lambda model: None)
    corpus, stops = load_corpus(corpus_file), (2, 3)
    _, eager = choices.trained(choices.small_model(), corpus, 0, stops, change, mixer)
    monkeypatch.setattr(choices, "text_step", choices.captured_text_step)
    _, captured = choices.trained(choices.small_model(), corpus, 0, stops, change, mixer)
    assert captured == pytest.approx(eager, rel=1e-5)
    assert eager[1] < eager[0]
