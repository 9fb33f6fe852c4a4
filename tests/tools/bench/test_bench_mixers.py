"""The bench of the field's mixers: its rows, right results, and peers that are not there."""

from __future__ import annotations

import gc
import math
import signal
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.cli import main
from analysis.cli.studies.tables import mixers_table
from analysis.measure.bench import mixers, tuning
from analysis.measure.bench.mixers import COLUMNS, FAMILIES, run_bench
from mambabyte.errors import UserError
from mambabyte.ops import mamba3_scan


def test_a_small_bench_has_its_columns_and_right_results() -> None:
    frame = run_bench([(1, 40, 2)], device="cpu", repeats=3)
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 2 * sum(len(f.peers) for f in FAMILIES.values())
    ours = frame[frame["peer"] == "fused"]
    assert (ours["median_seconds"] > 0).all()
    assert (ours["error_output"] < 1e-5).all()
    assert (ours[ours["direction"] == "forward+backward"]["error_gradient"] < 1e-5).all()
    others = frame[frame["peer"].isin(["mamba_ssm", "fla"])]
    assert others["median_seconds"].isna().all()
    assert (others["note"] != "").all()
    table = mixers_table(frame)
    assert table["batch x length x heads"].unique().tolist() == ["1 x 40 x 2"]
    mine = table["of"] == "fused"
    assert (table["times this project's"][mine] == 1).all()
    assert table["median (us)"][mine].tolist() == (
        1e6 * ours["median_seconds"]).round(1).tolist()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--repeats", "3", "--shapes", "1,20,1", "--peers", "attention"]
    assert main(["bench", "mixers", *arguments]) == 0
    assert "forward+backward" in capsys.readouterr().out


def test_unknown_families_are_refused() -> None:
    with pytest.raises(UserError, match="family 'none' is unknown: choose from 'SSD, 64 st"):
        run_bench(families=("none",), device="cpu")


def test_a_peer_of_mamba3_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def siso(Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor,
             Q_bias: Tensor, K_bias: Tensor, Angles: Tensor, D: Tensor) -> Tensor:
        """What mamba_ssm says of its arguments: gates (B, H, L), angles (B, L, H, S), of which it
        takes tanh and sigmoid itself."""
        assert Angles.shape[2] == V.shape[2]
        return mamba3_scan(
            V, DT.mT, ADT.mT, K, Q, math.pi * torch.tanh(Angles[:, :, 0]),
            torch.sigmoid(Trap.mT), D, B_bias=K_bias, C_bias=Q_bias)[0]

    name = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"
    module = ModuleType(name)
    module.__dict__["mamba3_siso_combined"] = siso
    monkeypatch.setitem(sys.modules, name, module)
    family = FAMILIES["Mamba-3, 64 states"]
    inputs = {key: x.double() for key, x in family.make(
        (2, 30, 3), torch.float32, torch.device("cpu")).items()}
    assert family.exact is not None
    torch.testing.assert_close(family.peers["mamba_ssm"].call(**inputs), family.exact(**inputs))


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixers._bench_family

    def interrupted(rows: list[dict[str, Any]], name: str, *more: Any) -> None:
        if name == "KDA":
            raise KeyboardInterrupt
        whole(rows, name, *more)

    monkeypatch.setattr(mixers, "_bench_family", interrupted)
    lines: list[str] = []
    frame = run_bench([(1, 8, 1)], ("attention", "KDA"), "cpu", 3, lines.append)
    assert set(frame["family"]) == {"attention"}
    assert lines[-1] == "interrupted: the 2 rows of before are kept"
    with pytest.raises(KeyboardInterrupt):
        run_bench([(1, 8, 1)], ("KDA",), "cpu", 3)


class Autotuner:
    """Triton's, as far as it matters here: a cache by key, a choice of settings, a timer."""

    do_bench: Any = None

    def __init__(self, settings: list[Any]) -> None:
        self.cache: dict[Any, Any] = {}
        self.settings, self.nargs = settings, {"x": 1}
        self.fn = self.base_fn = SimpleNamespace(run=run, __name__="kernel")

    def prune_configs(self, meta: dict[str, Any]) -> list[Any]:
        return self.settings


class Setting(SimpleNamespace):
    def all_kwargs(self) -> dict[str, Any]:
        return {"compiles": self.compiles}


def run(x: int, compiles: str, warmup: bool) -> Any:
    assert x == 1
    assert warmup
    while compiles == "never":
        signal.pause()
    if compiles == "not":
        raise ValueError(compiles)
    return SimpleNamespace(metadata=SimpleNamespace(shared=1 << 30 if compiles == "large" else 8))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 1 << 10})
    driver = SimpleNamespace(active=SimpleNamespace(
        utils=utils, get_current_target=lambda: "sm_90", get_current_device=lambda: 0),
        set_active=lambda instead: None)
    for name, content in {
        "triton": {}, "triton.runtime": {"driver": driver},
        "triton.runtime.autotuner": {"Autotuner": Autotuner},
        "triton.testing": {"do_bench": lambda call, **times: times},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["triton"].testing = sys.modules["triton.testing"]  # type: ignore[attr-defined]
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("triton")
def test_settings_are_compiled_ahead_and_given_up_in_time() -> None:
    quick, large, fails, never = (Setting(compiles=how) for how in ("", "large", "not", "never"))
    choose = Autotuner.prune_configs
    with tuning.bounded_tuning(math.inf) as settings:
        assert Autotuner([large, quick, fails]).prune_configs({"warmup": False}) == [quick]
        assert settings() == (3, 0)
        assert Autotuner([quick]).do_bench(print) == {
            "warmup": tuning.WARM_MS, "rep": tuning.TIMED_MS}
        # Nothing runs: the tuner comes to see why.
        assert Autotuner([fails, large]).prune_configs({"warmup": False}) == [fails]
    with tuning.bounded_tuning(-1.0) as settings:  # over at once: one setting each
        assert Autotuner([never, quick, never]).prune_configs({"warmup": False}) == [quick]
        assert settings() == (3, 2)
    assert Autotuner.prune_configs is choose
    assert Autotuner.do_bench is None


@pytest.mark.usefixtures("triton")
def test_what_was_chosen_is_carried_to_other_sizes() -> None:
    tuner = Autotuner([])
    tuner.cache = {(64, "bf16"): "a", (128, "bf16"): "b"}
    gc.collect()
    end = tuning.carry_tuning()
    assert (256, "none") in tuner.cache
    assert tuner.cache[128, "bf16"] == "b"
    assert tuner.cache[128, "fp32"] == "b"
    assert [row["setting"] for row in tuning.chosen_settings()] == ["b", "a"]
    end()
    assert (256, "none") not in tuner.cache
