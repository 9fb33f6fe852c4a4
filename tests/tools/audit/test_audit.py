"""The auditor: a planted fault is found by the check that is there for it, and nothing else is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from analysis.cli import main
from analysis.measure.audit import run
from analysis.measure.audit.checks import CHECKS, distance
from analysis.measure.audit.kinds import KINDS, Case, define, draw, laid_out
from analysis.measure.audit.run import Audit, audit, check_case
from analysis.measure.audit.targets import ADAPTERS, find_target
from analysis.measure.audit.tuning import one_setting
from mambabyte.errors import UserError

PLANTED = str(Path(__file__).with_name("planted.py"))


def faults(name: str, kind: str, case: Case, *checks: str) -> list[str]:
    """"check: quantity" of each fault of a planted operator."""
    target = find_target(f"{PLANTED}:{name}", kind)
    x = target.taken(draw(target.kind, case, torch.float32, "cpu"))
    found = Audit(name, kind, "cpu", {}, [])
    for check in checks or CHECKS:
        if check != "offsets past 2^31":
            found.findings += check_case(target, check, case, x, 5e-5, None, found)
    return [f"{f.check}: {f.quantity}" for f in found.of("fault")]


SHORT = Case("short", 19)


@pytest.mark.parametrize(("name", "kind", "case", "checks"), [
    ("wrong_mask", "attention", SHORT, {"definition", "causality"}),
    ("no_maximum", "attention", Case("fast", 19, gates="fast"), {"definition", "poisoned memory"}),
    ("dropped_state_gradient", "ssd", SHORT, {"definition", "handover"}),
    ("detached_final_state", "delta", SHORT, {"definition", "handover"}),
    ("leak_across_the_batch", "scan", SHORT, {"definition", "row alone", "other rows"}),
    ("unwritten_memory", "scan", SHORT, {"poisoned memory"}),
    ("all_gradients_or_none", "attention", SHORT, {"one gradient"}),
    ("writes_to_its_input", "conv", SHORT, {"inputs"}),
    ("assumes_contiguous", "ssd", Case("strides", 19, layout="transposed"), {"definition"}),
    ("assumes_contiguous", "ssd", Case("strides", 19, layout="in nan"), {"definition"}),
    ("overflows", "scan", Case("mixed", 70, gates="mixed"), {"definition"}),
    ("wrong_beside_a_chunk", "scan", Case("edge", 65), {"definition"}),
    ("forgets_boundaries", "scan", Case("packed", 19, 1, documents=(1, 9, 9)), {"definition"}),
    ("crashes_on_one_step", "delta", Case("one", 1), {"definition"}),
])
def test_a_planted_fault_is_found(name: str, kind: str, case: Case, checks: set[str]) -> None:
    every = () if case is SHORT else ("definition", "poisoned memory")
    found = {fault.partition(":")[0] for fault in faults(name, kind, case, *every)}
    assert checks <= found, found


def test_what_a_fault_is_in_is_said() -> None:
    assert faults("detached_final_state", "delta", SHORT, "definition") == [
        "definition: gradients through the state"]
    found = faults("dropped_state_gradient", "ssd", SHORT, "definition")
    assert "definition: gradient of initial_state, through the output" in found
    assert "definition: output" not in found
    assert "definition: state" not in found
    assert faults("unwritten_memory", "scan", SHORT, "poisoned memory") == [
        "poisoned memory: output"]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "in nan", "expanded"])
def test_the_sound_one_is(layout: Any) -> None:
    assert faults("sound", "scan", Case("a", 19, layout=layout)) == []
    assert faults("sound", "scan", Case("b", 19, layout=layout, gates="mixed"), "definition") == []


def test_bits_that_differ_are_a_note_and_no_fault() -> None:
    target = find_target(f"{PLANTED}:not_repeatable", "attention")
    x = draw(target.kind, SHORT, torch.float32, "cpu")
    found = Audit("", "", "", {}, [])
    findings = check_case(target, "repeat", SHORT, x, 5e-5, None, found)
    assert {f.quantity for f in findings if f.verdict == "note"} == {
        "gradient of q, through the output"}
    assert not any(f.verdict == "fault" for f in findings)


@pytest.mark.parametrize("name", ["ssd_scan", "selective_scan", "gated_delta_rule"])
@pytest.mark.long
def test_our_own_operators_have_no_fault(name: str) -> None:
    assert not audit(find_target(f"mambabyte.ops:{name}"), [torch.float32], "cpu").of("fault")


@pytest.mark.parametrize(("kind", "adapter", "name"), [
    ("scan", "mamba_ssm.scan", "mambabyte.ops:selective_scan_fn"),
    ("attention", "torch.attention", "torch.nn.functional:scaled_dot_product_attention"),
    ("kda", "auto", "mambabyte.ops:gated_delta_rule"),
    ("conv", "mambabyte.conv", "mambabyte.ops.conv.dispatch:causal_conv"),
])
def test_adapters(kind: str, adapter: str, name: str) -> None:
    target = find_target(name, kind, None if adapter == "auto" else adapter)
    x = target.taken(draw(target.kind, SHORT, torch.float64, "cpu"))
    findings = check_case(target, "definition", SHORT, x, 1e-9, None, Audit("", "", "", {}, []))
    assert {f.verdict for f in findings} == {"ok"}
    assert any(f.quantity == "output" for f in findings)


# ------------------------------------------------------------------- definitions and inputs


def test_the_definitions_of_sums_are_those_of_torch() -> None:
    x = draw(KINDS["conv"], SHORT, torch.float64, "cpu")
    y, tail = define(KINDS["conv"], x)
    padded = torch.cat([x["initial_state"], x["x"]], 1).mT
    wanted = torch.nn.functional.conv1d(padded, x["weight"][:, None], x["bias"], groups=32).mT
    assert distance(y, torch.nn.functional.silu(wanted)) < 1e-12
    assert torch.equal(tail, x["x"][:, -3:])


def test_documents_in_a_row_are_calls_of_their_own() -> None:
    kind = KINDS["scan"]
    x = draw(kind, Case("", 9, 1), torch.float64, "cpu")
    y, _ = define(kind, x, (4, 5))
    part = {n: t[:, 4:] if n in kind.streams else t for n, t in x.items()}
    assert torch.equal(y[:, 4:], kind.define(part)[0])


def test_packed_documents_start_from_nothing() -> None:
    """A reset at each start, as the protocol has it, is what the definition does."""
    kind, case = KINDS["scan"], Case("", 9, 1, documents=(4, 5))
    x = draw(kind, case, torch.float64, "cpu")
    assert "initial_state" not in x
    y, _ = define(kind, x, case.documents)
    assert torch.equal(y[:, :4], kind.define(
        {n: t[:, :4] if n in kind.streams else t for n, t in x.items()})[0])


def test_layouts_keep_values() -> None:
    kind = KINDS["ssd"]
    x = draw(kind, SHORT, torch.float32, "cpu")
    for layout in ("transposed", "in nan"):
        placed = laid_out(kind, Case("", 19, layout=layout), x)  # type: ignore[arg-type]
        assert all(torch.equal(t, x[n]) for n, t in placed.items())
        assert not placed["x"].is_contiguous()
    assert laid_out(kind, Case("", 19, layout="expanded"), x)["x"].stride(0) == 0


def test_one_wrong_element_among_many_counts() -> None:
    expected = torch.randn(1000, 1000)
    found = expected.clone()
    found[3, 4] += 1.0
    assert distance(found, expected) > 1e-2
    assert distance(torch.full((3,), torch.nan), torch.zeros(3)) == torch.inf
    assert distance(None, torch.zeros(3)) == 0.0
    assert distance(None, torch.ones(3)) == torch.inf
    assert distance(torch.ones(2), torch.ones(3)) == torch.inf


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def few(monkeypatch) -> None:
    """Two cases for a whole audit."""
    monkeypatch.setattr(run, "plan", lambda kind, device: [
        (Case("usual", 5), ("definition", "repeat")), (Case("short", 1), ("definition",))])


def test_the_inputs_of_a_fault_are_kept_and_run_again(few, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["audit", f"{PLANTED}:detached_final_state", "--kind", "delta", "--device", "cpu",
                 "--out", str(out), "--html"]) == 1
    text = capsys.readouterr().out
    assert "2 faults" in text
    assert f"once more: mambabyte audit {out / 'fault-01.safetensors'}" in text
    assert json.loads((out / "report.json").read_text())["findings"][0]["verdict"] == "ok"
    assert "none flow" in (out / "report.html").read_text()
    assert main(["audit", str(out / "fault-01.safetensors"), "--device", "cpu", "--json"]) == 1
    again = [f for f in json.loads(capsys.readouterr().out)["findings"]
             if f["verdict"] == "fault"]
    assert [(f["case"], f["quantity"]) for f in again] == [
        ("usual", "gradients through the state")]


def test_what_is_in_the_way_is_said_and_stays(few, tmp_path, capsys) -> None:
    theirs, folder = tmp_path / "fault-ab.safetensors", tmp_path / "fault-01.safetensors"
    theirs.write_bytes(b"of another program")
    command = ["audit", f"{PLANTED}:detached_final_state", "--kind", "delta", "--device", "cpu",
               "--out", str(tmp_path)]
    folder.mkdir()
    assert main(command) == 2
    assert f"cannot write {folder}: it is a folder" in capsys.readouterr().err
    folder.rmdir()
    (tmp_path / "report.json").mkdir()
    assert main(command) == 2
    assert "report.json: it is a folder" in capsys.readouterr().err
    assert theirs.read_bytes() == b"of another program"


def test_a_sound_one_leaves_with_0(few, capsys) -> None:
    assert main(["audit", f"{PLANTED}:sound", "--kind", "scan", "--device", "cpu"]) == 0
    assert "0 faults" in capsys.readouterr().out


def test_what_was_found_before_it_ended_is_reported(few, monkeypatch, capsys) -> None:
    command = ["audit", f"{PLANTED}:sound", "--kind", "scan", "--device", "cpu"]
    assert main([*command, "--max-seconds", "1e-9"]) == 2
    assert "before the first number" in capsys.readouterr().err
    whole = run.check_case

    def second(target: Any, check: str, *rest: Any) -> Any:
        if check == "repeat":
            raise KeyboardInterrupt
        return whole(target, check, *rest)

    monkeypatch.setattr(run, "check_case", second)
    assert main(command) == 130
    text = capsys.readouterr().out
    assert "not reached: usual, float32; short, float32" in text
    assert "definition " in text
    assert "repeat " not in text


def test_numbers_before_an_error_count(few, capsys) -> None:
    assert main(["audit", f"{PLANTED}:no_backward", "--kind", "conv", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "definition         state                          float32         2" in text
    assert "RuntimeError: not on this card" in text


class Tuner:
    """As Triton's, with a kernel that runs at settings of at most 64 elements."""

    def __init__(self, sizes: list[int]) -> None:
        self.configs = [SimpleNamespace(kwargs={"BLOCK": n}, num_stages=1, num_warps=None)
                        for n in sizes]
        self.cache: dict[str, Any] = {}
        self.base_fn = SimpleNamespace(__name__="kernel")
        self.do_bench = lambda call, quantiles: [call(), call(), call()]
        self.ran: list[int] = []

    def prune_configs(self, kwargs: dict[str, Any]) -> list[Any]:
        return self.configs

    def check_disk_cache(self, key: str, configs: Any, bench: Any) -> bool:
        raise AssertionError("what was not timed is not for the disk")

    def _bench(self, *args: Any, config: Any, **meta: Any) -> list[float]:
        if config.kwargs["BLOCK"] < args[0]:  # too small for its argument
            return [float("inf")] * 3
        return self.do_bench(lambda: self.ran.append(config.kwargs["BLOCK"]), (0.5, 0.2, 0.8))

    def __call__(self, key: str, least: int) -> int:
        if key not in self.cache:
            def bench() -> None:
                times = {c.kwargs["BLOCK"]: self._bench(least, config=c)
                         for c in self.prune_configs({})}
                self.cache[key] = min(times, key=lambda n: times[n])
            self.check_disk_cache(key, self.configs, bench)
        return self.cache[key]


def test_kernels_that_tune_themselves_have_one_setting(monkeypatch) -> None:
    module = ModuleType("triton.runtime.autotuner")
    module.Autotuner = Tuner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    tuner = Tuner([256, 64, 128, 32])
    tuner.cache["tuned before"] = 256
    with one_setting() as taken:
        assert tuner("tuned before", 1) == 256
        assert tuner("bf16", 1) == 32  # the smallest
        assert tuner("f32", 50) == 64  # the smallest that runs
    assert tuner.ran == [32, 64]
    assert set(taken) == {"kernel"}
    assert tuner.cache == {"tuned before": 256}
    with pytest.raises(AssertionError, match="for the disk"):
        tuner("bf16", 1)


@pytest.mark.parametrize(("words", "message"), [
    (["nothing"], "names no function"), (["no.such.module:f"], "cannot be imported"),
    (["mambabyte.ops:ssd_scam"], "did you mean ssd_scan"), (["math:pi"], "is a float"),
    (["math:sin"], "give --kind"), (["math:sin", "--adapter", "fla.kdb"], "did you mean fla.kda"),
    (["mambabyte.ops:ssd_scan", "--kind", "scan", "--adapter", "fla.kda"], "is of kind kda"),
    (["mambabyte.ops:ssd_scan", "--html"], "--html needs --out"),
    (["none.safetensors"], "holds no inputs of an audit"),
    ([f"{PLANTED}:sound", "--kind", "attention"], "takes no input of kind attention"),
    (["sys:exit", "--kind", "attention"], "takes no input of kind attention (TypeError"),
    ([f"{PLANTED}:leaves", "--kind", "attention"], "attention (SystemExit: 0)"),
])
def test_what_cannot_be_audited_is_said_in_a_line(few, words, message, capsys) -> None:
    assert main(["audit", *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_module_that_ends_the_program_is_said(tmp_path) -> None:
    (tmp_path / "ends.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(UserError, match=r"cannot be imported \(SystemExit: 0\)"):
        find_target(f"{tmp_path / 'ends.py'}:f", "scan")


def test_every_kind_has_a_case_of_every_sort_and_every_adapter_a_kind() -> None:
    for kind in KINDS.values():
        cases = [case for case, _ in run.plan(kind, "cuda")]
        assert {c.layout for c in cases} == {"contiguous", "transposed", "in nan", "expanded"}
        assert {c.widths for c in cases} == {"odd", "wide"}
        assert {c.widths for c, _ in run.plan(kind, "cpu")} == {"small", "odd", "wide"}
        assert {c.gates for c in cases} == {"usual", "slow", "fast", "mixed"}
        assert len({c.name for c in cases}) == len(cases)
    assert {a.kind for a in ADAPTERS.values()} == set(KINDS)
