"""Run folders: what is written is what is read, whole, the same bytes for the same data."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import plots
from analysis.runs import folders as results
from analysis.runs.folders import Recorder, list_runs, load_run
from analysis.runs.frames import in_words, not_measured, read_frame, write_frame
from mambabyte.errors import UserError

DATA = pd.DataFrame({"length, bytes": [1, 2, 4], "time, ms": [0.5, 1.0, 2.0]})
WORDS = {"title": "Time", "caption": "It doubles.", "alt": "A straight line."}


def drawing() -> Figure:
    figure, axes = plots.new_figure()
    axes.plot(DATA["length, bytes"], DATA["time, ms"])
    plots.label_axes(axes, "length, bytes", "time, ms")
    return figure


def recorded(folder, **parameters):
    recorder = Recorder("tiny", parameters or {"n": 3, "sizes": [1, 2]}, str(folder))
    recorder.value("slope", np.float64(0.5), unit="ms/byte", about="fitted")
    recorder.value("joules", None, unit="J")
    recorder.table("times", DATA, caption="Times.")
    recorder.figure("times", drawing(), data=DATA, **WORDS)
    return recorder.finish()


def test_what_is_recorded_is_read(tmp_path):
    run = load_run(recorded(tmp_path / "a"))
    assert (run.study, run.status, run.parameters) == ("tiny", "done", {"n": 3, "sizes": [1, 2]})
    assert run.values["slope"] == results.Value(0.5, "ms/byte", "fitted")
    assert run.values["joules"].value is None
    pd.testing.assert_frame_equal(run.tables["times"].frame, DATA)
    figure = run.figures["times"]
    assert (figure.title, figure.caption, figure.alt) == tuple(WORDS.values())
    pd.testing.assert_frame_equal(figure.data, DATA)
    assert {"date", "commit", "machine", "versions"} <= run.provenance.keys()


def test_not_measured_and_nan_stay_apart(tmp_path):
    frame = pd.DataFrame({
        "nan": [1.0, math.nan], "none": pd.Series([None, 2.0], dtype=object),
        "both": pd.Series([None, math.nan], dtype=object), "inf": [math.inf, -math.inf],
        "missing int": pd.Series([1, None], dtype="Int64"), "word": ["a", None],
        "flag": [True, False], "kind": pd.Categorical(["u", "v"]),
    })
    write_frame(tmp_path / "f.parquet", frame)
    back = read_frame(tmp_path / "f.parquet")
    assert math.isnan(back["nan"][1])
    assert list(back["none"]) == [None, 2.0]
    assert back["both"][0] is None
    assert math.isnan(back["both"][1])
    assert list(back["inf"]) == [math.inf, -math.inf]
    assert list(back["missing int"]) == [1, None]
    assert list(back["word"]) == ["a", None]
    assert list(back["flag"]) == [True, False]
    assert list(back["kind"]) == ["u", "v"]


def test_same_figure_same_bytes(tmp_path):
    first, second = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    for name in ("figures/times.svg", "figures/times.parquet", "tables/times.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    svg = (first / "figures/times.svg").read_text()
    assert "<text" in svg  # text stays text
    # Paths to a hundredth of a point: the rest is most of a figure of many cells.
    assert not re.search(r'\bd="M[^"]*\.\d{3}', svg)
    assert "dc:date" not in svg


@pytest.mark.parametrize("missing", ["title", "caption", "alt"])
def test_figure_needs_its_words(tmp_path, missing):
    recorder = Recorder("tiny", {}, str(tmp_path))
    with pytest.raises(UserError, match=missing):
        recorder.figure("f", drawing(), data=DATA, **{**WORDS, missing: "  "})


def test_figure_needs_its_data(tmp_path):
    with pytest.raises(UserError, match="no data"):
        Recorder("tiny", {}, str(tmp_path)).figure("f", drawing(), data=DATA.head(0), **WORDS)


@pytest.mark.parametrize("name", ["", "Peak", "a b", "../up", "a.b", "-a", "é"])
def test_names_are_slugs(tmp_path, name):
    recorder = Recorder("tiny", {}, str(tmp_path))
    with pytest.raises(UserError, match="name"):
        recorder.value(name, 1)
    with pytest.raises(UserError, match="name"):
        recorder.table(name, DATA, caption="c")
    with pytest.raises(UserError, match="name"):
        Recorder(name, {})


@pytest.mark.parametrize(("frame", "match"), [
    (pd.DataFrame([[1, 2]]), "columns"),
    (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns"),
    (pd.DataFrame({("a", "b"): [1]}), "columns"),
    ([1, 2], "DataFrame"),
])
def test_tables_are_flat_and_named(tmp_path, frame, match):
    with pytest.raises(UserError, match=match):
        Recorder("tiny", {}, str(tmp_path)).table("t", frame, caption="c")


def test_named_index_becomes_a_column(tmp_path):
    recorder = Recorder("tiny", {}, str(tmp_path / "a"))
    recorder.table("t", DATA.set_index("length, bytes"), caption="c")
    assert list(load_run(recorder.finish()).tables["t"].frame) == list(DATA)


def test_values_and_parameters_are_plain(tmp_path):
    with pytest.raises(UserError, match="'v' is a list"):
        Recorder("tiny", {}, str(tmp_path)).value("v", [1])
    with pytest.raises(UserError, match="parameter 'p'"):
        Recorder("tiny", {"p": {1}}, str(tmp_path))


def test_recording_again_replaces(tmp_path):
    recorder = Recorder("tiny", {}, str(tmp_path / "a"))
    recorder.table("old", DATA, caption="c")
    recorder.finish()
    again = Recorder("tiny", {}, str(tmp_path / "a"))
    again.value("x", 1)
    again.value("x", 2)
    run = load_run(again.finish())
    assert run.values["x"].value == 2
    assert not run.tables
    assert not list((tmp_path / "a" / "tables").iterdir())


def test_interactive_runs_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    recorder = Recorder("tiny", {})
    recorder.value("x", 1)
    assert recorder.finish() == tmp_path / "interactive" / "tiny"
    assert list_runs(tmp_path) == []  # and the report does not see it


def test_list_runs_sees_whole_runs_only(tmp_path):
    recorded(tmp_path / "b")
    recorded(tmp_path / "a")
    recorded(tmp_path / ".c.tmp")
    (tmp_path / "half").mkdir()
    assert [r.folder.name for r in list_runs(tmp_path)] == ["a", "b"]
    assert list_runs(tmp_path / "absent") == []


@pytest.mark.parametrize("damage", ["not json", '{"format": 1}', "[]", '{"format": 99}'])
def test_damaged_run_is_a_clear_error(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_run(tmp_path)


def test_truncated_table_is_a_clear_error(tmp_path):
    folder = recorded(tmp_path / "a")
    (folder / "tables" / "times.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a complete run folder"):
        load_run(folder)


def test_run_file_cannot_name_files_elsewhere(tmp_path):
    folder = recorded(tmp_path / "a")
    record = json.loads((folder / "run.json").read_text())
    record["tables"][0]["name"] = "../../secret"
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="table name"):
        load_run(folder)


def test_axis_labels_name_a_unit():
    _, axes = plots.new_figure()
    with pytest.raises(ValueError, match="names no unit"):
        plots.label_axes(axes, "length, bytes", "loss")


def test_direct_labels_do_not_overlap():
    figure, axes = plots.new_figure()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    ends = {f"line {i}": (1.0, 0.98 + 0.001 * i, plots.BLUE) for i in range(6)}
    plots.label_lines(axes, {**ends, "nan": (1.0, math.nan, plots.BLUE)})
    figure.draw_without_rendering()
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 6
    assert np.all(np.diff(heights) > 0.05)
    assert heights[-1] <= 1.0


def test_style_repeats_colour_by_line_and_marker():
    looks = [plots.look(i) for i in range(7)]
    assert len({look["color"] for look in looks}) == 7
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == 7
    assert len({look["marker"] for look in looks}) == 7


def test_more_series_than_colours_stay_apart():
    looks = [plots.look(i) for i in range(14)]
    assert looks[7]["color"] == looks[0]["color"]
    assert len({tuple(look.values()) for look in looks}) == 14
    for first, again in zip(looks[:7], looks[7:], strict=True):
        assert first["marker"] != again["marker"]


def test_a_reference_line_can_be_named_at_either_end():
    figure, axes = plots.new_figure()
    plots.mark_line(axes, y=1.0, text="left")
    plots.mark_line(axes, y=2.0, text="right", right=True)
    figure.draw_without_rendering()
    left, right = (text.get_window_extent() for text in axes.texts)
    frame = axes.get_window_extent()
    assert frame.x0 < left.x0 < left.x1 < right.x0 < right.x1 < frame.x1


def test_missing_floats_can_be_said_to_be_unmeasured(tmp_path):
    frame = pd.DataFrame({"energy, J": [1.0, None], "error, relative": [0.1, math.nan]})
    write_frame(tmp_path / "f.parquet", not_measured(frame, "energy, J"))
    back = read_frame(tmp_path / "f.parquet")
    assert list(back["energy, J"]) == [1.0, None]
    assert math.isnan(back["error, relative"][1])


def test_powers_of_two_stay_short():
    assert [plots._power_of_two(v) for v in (0.5, 32, 4096, 65536, 2**20, 3 * 2**20)] == \
        ["0.5", "32", "4,096", "64 Ki", "1 Mi", "3 Mi"]


def test_what_did_not_happen_has_a_word():
    frame = pd.DataFrame({"at": [1200.0, None], "n": [1, 2]})
    assert in_words(frame, "at", "never")["at"].tolist() == ["1,200", "never"]
    why = pd.Series(["x", None], dtype=object)
    assert in_words(frame, "at", why)["at"].tolist() == ["1,200", None]  # not measured stays so
