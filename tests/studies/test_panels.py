"""The notebooks' panels: the study's own numbers at any slider position, and silence in batch."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pandas as pd
import pytest

from analysis.studies import get_study, profile_parameters, session
from analysis.studies.memory import compute as memory
from analysis.studies.memory import panel as memory_panel
from analysis.studies.memory.closed_form import budgets_at, budgets_frame, smallest_devices
from analysis.studies.overflow import Grid, error_map
from analysis.studies.overflow import panel as overflow_panel
from analysis.studies.throughput import compute as throughput
from analysis.studies.throughput import figures as throughput_figures
from analysis.studies.throughput import panel as throughput_panel
from analysis.theory import bounds
from mambabyte.config import PRESETS

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
    for name in ("memory", "overflow", "throughput"):
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
