"""The claims ledger: its rows, its arithmetic done again, its evidence and its shape."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.runs.folders import Run, Value, tables_of, write_record
from analysis.runs.records import write_record_folder
from analysis.runs.staleness import source_files
from analysis.studies.claims import compute as claims
from analysis.studies.claims import evidence as evidence_module
from analysis.studies.claims import values as answers
from analysis.studies.claims.checks.memory import OURS, PUBLISHED, full_tensor, kept
from analysis.studies.claims.checks.published import first_run
from analysis.studies.claims.evidence import Evidence, gather
from analysis.studies.claims.figures import VERDICTS as DRAWN
from analysis.studies.claims.figures import verdict_bars
from analysis.studies.claims.lab import EXPERIMENTS, Lab, Settings
from analysis.studies.claims.ledger import (
    CHECKS,
    CLAIMS,
    DOCUMENTS,
    KINDS,
    OPEN,
    VERDICTS,
    Claim,
    Finding,
    load_ledger,
)
from mambabyte.config import PRESETS
from mambabyte.errors import UserError
from tests.helpers.claims_lab import BY_ID, CHEAP, LEDGER, TYPICAL, lab, run_of

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
    followed = {path.name for path in source_files(["analysis.studies.claims.compute"])}
    assert {CLAIMS, "arithmetic.py", "trainings.py", "ledger.py"} <= followed


def test_no_verdict_is_returned_without_looking():
    """A check whose every return is the same constant verdict would not be a check."""
    # cannot be had
    allowed = {"open_statement", "compiled_loop", "leader_energy", "best_of_runs"}
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
    attention = d * d + d * d + 2 * d * 256 + 8  # and a gain a head
    ssm = (d * 2 * inner + inner * 4 + inner + inner * inner + inner + inner * n + inner
           + 2 * inner * n + inner * d)
    assert ours("fewer-parameters") == f"{ssm:,} against {attention:,}"


def test_bytes_by_hand():
    before, after = PRESETS["mamba_byte_original"].train, PRESETS["mamba_byte"].train
    one = 64 * 2048 * 384 * 16 * 4
    assert full_tensor(before) == one == 8 * full_tensor(after)
    assert ours("product-64") == f"{5 * one * 4 / 1e9:.1f} GB"
    # Six full tensors in four layers, whatever autocast does; in our order five and delta u.
    ours_scan = 4 * (5 * one + 64 * 2048 * 384 * 4)
    assert kept(before, "fp32", "scan") == pytest.approx(4 * 6 * one, rel=0.02)
    assert kept(before, "bf16", "scan") == pytest.approx(kept(before, "fp32", "scan"), rel=0.02)
    assert kept(before, "fp32", "scan", OURS) == pytest.approx(ours_scan, rel=0.02)
    assert (PUBLISHED.scan_form, OURS.scan_form) == ("document_as_coded", "document_chunked")


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


def test_the_larger_of_two_runs_speaks_and_is_named():
    """Whatever is newer; but a card's number before any of a processor's."""
    sizes = {"small": (100, (0, 1, 2)), "few seeds": (1000, (0,)), "large": (1000, (0, 1, 2))}
    runs = [replace(run_of("made-up", {"x": float(i)}, name=name),
                    parameters={"device": "cpu", "steps": steps, "seeds": seeds})
            for i, (name, (steps, seeds)) in enumerate(sizes.items())]
    for order in (runs, runs[::-1]):
        found = Evidence(tuple(order)).value("made-up", "x")
        assert found is not None
        assert (found.what, found.name) == (2.0, "large")
    card = run_of("made-up", {"x": 9.0}, device="cuda", name="card")
    found = Evidence((card, *runs)).value("made-up", "x")
    assert found is not None
    assert found.name == "card"
    quick = replace(runs[2], profile="quick")
    assert Evidence((quick, runs[0])).value("made-up", "x").name == "small"


def test_unmeasured_value_is_no_evidence():
    found = Evidence((run_of("ablation", {"drift_ssm": None}),))
    assert found.value("ablation", "drift_ssm") is None


def test_a_record_is_evidence_of_its_machine(tmp_path):
    machine = {"date": "2026-01-01", "commit": "c", "command": "x", "versions": {"a": "1"},
               "machine": {"cpu": "a CPU", "gpus": [{"name": "a GPU"}]}}
    write_record_folder(Run(
        "throughput", {"device": "cuda"}, {"x": Value(math.inf)},
        tables_of({"t": ("", pd.DataFrame({"k": [1, 2]}))}), {"drawn": "t"}, machine,
        title="t", about="a"), tmp_path / "throughput" / "a")
    found = gather(tmp_path / "none", tmp_path)
    value = found.value("throughput", "x", accelerator=True)
    assert value is not None
    assert value.what == math.inf
    assert value.text == "a (a GPU)"
    for name in ("t", "drawn"):  # a table, and the table that is the data of a figure
        table = found.table("throughput", name, accelerator=True)
        assert table is not None
        assert table.what["k"].tolist() == [1, 2]


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


def test_every_claim_can_be_judged_by_the_projects_records(tmp_path):
    """A new record may have a table's name or columns that a check takes for its own."""
    frame = claims.ledger_frame(LEDGER.claims, lab(gather(tmp_path)))
    assert (frame["verdict"] == OPEN).sum() < 20


@pytest.mark.parametrize("workers", [2, 3, 100])
def test_each_training_is_done_by_one_of_the_processes(workers, monkeypatch):
    done = []
    monkeypatch.setattr(claims, "run_jobs",
                        lambda function, jobs, *_: (function(*j) for j in jobs))
    for name in claims.TRAININGS:
        monkeypatch.setitem(EXPERIMENTS, name, lambda settings, name=name: done.append(name) or {
            "seed": settings.seed})
    found = claims.trained_ahead(Settings(seed=3), workers)
    assert found == {f"{name}.seed": 3 for name in claims.TRAININGS}
    assert sorted(done) == sorted(claims.TRAININGS)


def test_run_counts_and_figure(tmp_path, monkeypatch):
    """The whole study with given numbers: every row judged, counted and drawn."""
    monkeypatch.setattr(claims, "Lab", lambda settings, evidence, *others: lab(evidence))
    monkeypatch.setattr(evidence_module, "RECORDS", tmp_path)
    found = claims.run(claims.Parameters(runs_root=str(tmp_path), workers=1))
    assert len(found.ledger) == len(LEDGER.claims)
    assert list(found.ledger)[:4] == ["claim", "verdict", "theirs", "ours"]  # seen unscrolled
    assert found.counts["all"].sum() == sum(claim.counted for claim in LEDGER.claims)
    assert set(VERDICTS) <= set(found.counts.columns)
    assert set(DRAWN) == set(VERDICTS)
    p = claims.Parameters()
    values = {name: value.value for name, value in answers.values(found, p).items()}
    assert sum(values[f"n_{n}"] for n in answers.NAMES.values()) == values["n_claims"]
    assert values["n_claims_first"] + values["n_claims_second"] == values["n_claims"]
    assert verdict_bars(found.counts).axes
    assert found.tied["tied minus own, bits/byte"].tolist() == pytest.approx([0.46, 0.3])
    assert found.parts["without selection, bits/byte"].tolist() == [0.064]
    assert found.streamed["accuracy streamed"].tolist() == [0.44]
    assert values["first_run_lost"] is None  # not measured, where no such run is known
    known = answers.values(replace(found, first_run=first_run(lab(facts=LEDGER.facts))), p)
    assert (known["first_run_lost"].value, known["first_run_finite"].value) == (300.0, 200.0)
    missing = found.ledger[found.ledger["source"] == "not measured"]["ours"]
    assert any(v is None for v in missing)
