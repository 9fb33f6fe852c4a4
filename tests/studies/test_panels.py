"""The notebooks' panels: the study's own numbers at any slider position, and silence in batch."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis.measure.statistics import student_interval
from analysis.runs.folders import INTERACTIVE, Run, load_run, tables_of, write_run
from analysis.runs.records import RECORDS
from analysis.studies import get_study, profile_parameters, session
from analysis.studies.ablation import Parameters as Ablation
from analysis.studies.ablation import panel as ablation_panel
from analysis.studies.arena import Parameters as Arena
from analysis.studies.arena import panel as arena_panel
from analysis.studies.gradients import Parameters as Gradients
from analysis.studies.gradients import panel as gradients_panel
from analysis.studies.gradients.boundary import boundary_frame
from analysis.studies.memory import compute as memory
from analysis.studies.memory import panel as memory_panel
from analysis.studies.memory.closed_form import budgets_at, budgets_frame, smallest_devices
from analysis.studies.overflow import Grid, error_map
from analysis.studies.overflow import panel as overflow_panel
from analysis.studies.task import Parameters as Task
from analysis.studies.task import panel as task_panel
from analysis.studies.throughput import compute as throughput
from analysis.studies.throughput import figures as throughput_figures
from analysis.studies.throughput import panel as throughput_panel
from analysis.theory import bounds
from mambabyte.config import PRESETS, ModelConfig
from mambabyte.model import ByteLM

SMALL = Grid(
    forms=("corrected_cumsum", "document_chunked", "clamped"), precisions=("float32",),
    kinds=("constant",), chunks=(8, 64), decays=(0.1, 1.6), length=64)


def moved(panel, **positions):
    """The panel's result with its sliders at these positions."""
    for slider in panel.kwargs_widgets:
        if slider._kwarg in positions:
            slider.value = positions[slider._kwarg]
    panel.update()
    return panel.result


@pytest.fixture(scope="module")
def errors():
    return error_map.error_map(SMALL, lambda line: None)


@pytest.mark.parametrize(("form", "decay", "chunk"), [
    ("corrected_cumsum", 0.1, 8), ("corrected_cumsum", 1.6, 64), ("document_chunked", 0.1, 64),
    ("clamped", 1.6, 64)])
def test_the_overflow_panel_says_what_the_map_says(errors, form, decay, chunk):
    found = moved(overflow_panel.panel(SMALL), form=form, decay=decay, chunk=chunk)
    row = errors[(errors["form"] == form) & (errors["decay"] == decay)
                 & (errors["chunk"] == chunk)].iloc[0]
    words = [name for name in row.index if isinstance(row[name], str)]
    assert found.row[words].tolist() == row[words].tolist()
    numbers = row.index.difference(words)
    # Alone or among other rows, sums differ in their last bit: an error of 1e-7 by as much.
    assert found.row[numbers].tolist() == pytest.approx(
        row[numbers].tolist(), rel=1e-3, abs=3e-7, nan_ok=True)
    assert found.exponent == pytest.approx(decay * chunk)
    assert found.bound == bounds.boundary(form, decay)


def test_the_first_bad_position_is_where_the_exponent_passes_the_bound():
    # 1.6 nats a step: 55 steps are 88.0 nats, 56 are 89.6 and float32 ends at 88.72. An input
    # above 2 takes exp(88.0) over the edge.
    found = error_map.cell(SMALL, "corrected_cumsum", 1.6, 64)
    assert found.first_bad in (54, 55)
    assert found.positions["error"][: found.first_bad].max() < 1e-2
    assert error_map.cell(SMALL, "chunked", 1.6, 64).first_bad is None
    # The clamp at 80 nats is silent. Step 51 stands at 81.6: its weight is off by a factor of 5.
    silent = error_map.cell(SMALL, "clamped", 1.6, 64)
    assert silent.row["value"] == "silent"
    assert silent.first_bad == 50


@pytest.mark.parametrize(("batch", "context"), [(64, 2048), (16, 1024)])
def test_the_memory_panel_says_what_the_study_says(batch, context):
    p = memory.Parameters(forms=("fused", "document_chunked"))
    found = moved(memory_panel.panel(p), batch=batch, context=context)
    study = budgets_frame(p.forms)
    same = study[study["configuration"] == f"{batch} x {context}"].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, same)


def test_the_throughput_panel_times_what_its_sliders_say(capsys):
    p = throughput.Parameters(d_model=16, n_layer=1, train_steps=1)
    found = moved(throughput_panel.panel(p), batch=2, context=256)
    assert found["context"].tolist() == [64, 64, 128, 128, 256, 256]
    assert set(found["pattern"]) == {"M", "A"}
    assert set(found["batch"]) == {2}
    assert found["ms"].astype(float).gt(0).all()
    sizes = found.drop_duplicates("pattern")["n_parameters"].tolist()
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)  # equal parameters, as in the study
    per_byte = found["joules_per_megabyte"].notna()
    assert found["joules_per_step"].notna().tolist() == per_byte.tolist()
    assert ("energy: not measured" in capsys.readouterr().out) == (not per_byte.any())


def test_the_throughput_panel_stops_before_it_blocks_the_notebook(monkeypatch, capsys):
    asked = []

    def slow(p, batch, contexts):
        asked.extend(contexts)
        return pd.DataFrame([{"pattern": pattern, "context": contexts[0], "ms": 5.0 * contexts[0],
                              "joules_per_step": None, "energy_source": "not measured"}
                             for pattern in "MA"])

    monkeypatch.setattr(throughput_panel, "steps_at", slow)
    found = throughput_panel._show_steps(throughput.Parameters(), 1, 2048)
    assert asked == [256]  # 1.28 s; the next would take more than 2
    assert set(found["context"]) == {256}
    out = capsys.readouterr().out
    assert "timing steps of 1 x 256 bytes" in out
    assert "512 bytes and more: left out, since a step would take more than 2 s" in out


@pytest.mark.parametrize("joules", [None, 0.5])
def test_the_throughput_panel_draws_energy_where_it_was_measured(joules):
    frame = pd.DataFrame([{"pattern": p, "context": n, "ms": n / 10, "joules_per_step": joules}
                          for p in "MA" for n in (64, 128)])
    drawn = throughput_figures.training_steps(frame)
    assert len(drawn.axes) == (1 if joules is None else 2)
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in drawn.axes)


@pytest.mark.parametrize(("form", "said"), [
    ("document_chunked", "the formula is another"), ("chunked", "it is the precision")])
def test_the_gradients_panel_says_what_the_study_says(form, said, capsys):
    p = Gradients(channels=2, states=2)
    found = moved(gradients_panel.panel(p), form=form, chunk=16, length=32, gradient="d B")
    study = boundary_frame(replace(p, forms=(form,), chunk=16, length=32))
    pd.testing.assert_frame_equal(found, study)
    assert said in capsys.readouterr().out.splitlines()[-2]


def test_the_gradients_panel_refuses_a_length_without_a_boundary(capsys):
    panel = gradients_panel.panel(Gradients(channels=2, states=2))
    assert moved(panel, form="chunked", chunk=64, length=32) is None
    assert "chunk is 64 and length 32: expected a chunk shorter" in capsys.readouterr().out


def test_the_ablation_panel_says_what_the_record_holds(tmp_path):
    record = load_run(RECORDS / "ablation" / "h200-ablation")
    rows = record.tables["comparisons"].frame
    panel = ablation_panel.panel(Ablation(), runs=tmp_path, records=RECORDS)
    for equal, comparison in (("time", "wall-clock"), ("operations", "FLOPs")):
        found = moved(panel, equal=equal, measured=f"h200-ablation: {record.title}")
        found = found.set_index("pattern")
        for pattern, mine in rows[rows["comparison"] == comparison].groupby("pattern"):
            bits, row = mine["bits_per_byte"].to_numpy(float), found.loc[pattern]
            assert row["bits per byte"] == pytest.approx(bits.mean())
            assert (row["low"], row["high"]) == pytest.approx(student_interval(bits))
            assert (row["seeds"], row["steps"]) == (len(bits), mine["steps"].iloc[0])


def test_the_ablation_panel_reads_this_machines_runs(tmp_path, capsys):
    rows = pd.DataFrame([["steps", 10.0, "steps", "M", seed, 10.0, 2.0 + seed] for seed in (0, 1)]
                        + [["joules", None, "joules", "M", seed, None, None] for seed in (0, 1)],
                        columns=["comparison", "budget", "unit", "pattern", "seed", "steps",
                                 "bits_per_byte"], dtype=object)
    write_run(Run("ablation", {}, tables=tables_of({"comparisons": ("", rows)})),
              tmp_path / INTERACTIVE / "ablation")
    panel = ablation_panel.panel(Ablation(), runs=tmp_path, records=tmp_path / "none")
    found = moved(panel, equal="steps", measured=f"this machine: {INTERACTIVE}/ablation").iloc[0]
    assert (found["bits per byte"], found["seeds"]) == (2.5, 2)
    assert pd.isna(found["low"])  # two seeds give no interval
    assert "fewer than 3" in found["method"]
    capsys.readouterr()
    assert moved(panel, equal="joules") is None
    assert "equal joules: not measured in this run" in capsys.readouterr().out


def test_what_a_panel_cannot_read_does_not_stop_its_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation_panel.panel, "__defaults__", (tmp_path, tmp_path))
    session.panel("ablation", scope_of("ablation"))
    assert capsys.readouterr().out.startswith(f"no panel: no record in {tmp_path} and no run in ")
    (tmp_path / "ablation-1").mkdir()
    (tmp_path / "ablation-1" / "run.json").write_text("{")
    session.panel("ablation", scope_of("ablation"))
    assert "is not a complete run folder" in capsys.readouterr().out


def test_the_task_panel_has_a_ratio_within_one_job_only(capsys):
    panel = task_panel.panel(Task())
    ours = "ours, 950 steps of h200-task-all"
    capsys.readouterr()
    pair = moved(panel, first=ours, second="modded_nanogpt of h200-task-all")
    joules = pair.set_index("system")["energy (J)"]
    ratio = joules[ours] / joules["modded_nanogpt of h200-task-all"]
    out = capsys.readouterr().out
    assert f"{ratio:.2f} times the joules" in out.splitlines()[-2]
    assert f"{ours}: {joules[ours]:,.1f} J, accuracy 0.7226 (0.7207 to 0.7238, seeds: 3)" in out
    moved(panel, second="modded_nanogpt of h200-task")
    out = capsys.readouterr().out.splitlines()[-2]
    assert out.startswith("no ratio: ")
    assert out.endswith("these are of h200-task-all and h200-task")


def test_smallest_device():
    model = PRESETS["mamba_byte"].model
    found = smallest_devices(budgets_at(model, 64, 2048, ("fused", "chunked")))
    by_form = found[~found["checkpointing"] & (found["autocast"] == "bf16")].set_index("form")
    assert by_form.loc["fused", "smallest device"] == "16 GB"
    assert by_form.loc["chunked", "smallest device"] == "141 GB"
    huge = smallest_devices(budgets_at(
        replace(model, n_layer=40), 1024, 2048, ("chunked",)))
    assert huge["smallest device"].iloc[0] == "none of these"


def scope_of(study, **given):
    """What a notebook's globals() have: the quick parameters, and no run_dir by hand."""
    return {**profile_parameters(get_study(study)), "run_dir": "", **given}


def test_a_batch_run_shows_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *what: pytest.fail("shown"))
    for name in ("memory", "throughput"):
        session.panel(name, scope_of(name, run_dir=str(tmp_path / "memory-1")))
    assert capsys.readouterr().out == ""
    for name in ("memory", "overflow", "throughput", "gradients", "ablation", "task"):
        notebook = get_study(name).notebook.read_text()
        assert 0 < notebook.index("panel(\\\"") < notebook.index("run = measure(")  # first


def test_a_panel_is_displayed_when_opened_by_hand(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *what: shown.extend(what))
    session.panel("memory", scope_of("memory", forms=["fused"]))
    assert any(type(what).__name__ == "interactive" for what in shown)


def test_without_ipywidgets_there_is_one_line(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("ipywidgets"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    session.panel("memory", scope_of("memory"))
    assert capsys.readouterr().out == session.MISSING + "\n"


def test_the_arenas_panel_shows_what_a_layer_reads():
    torch.manual_seed(0)
    models = {letter: ByteLM(ModelConfig(d_model=16, n_layer=2, layer_pattern=letter, n_head=1,
                                         n_kv_head=1, d_state=4)) for letter in "MA"}
    shown = arena_panel.panel(Arena(), models)
    lives = moved(shown, system="M", layer=1, start=40)
    assert lives["layer"].tolist() == [1]
    assert lives["mixer"].tolist() == ["M"]
    assert moved(shown, system="A", layer=0).empty
    assert moved(shown, system="M", start=2000)["channels"].tolist() == [128]
