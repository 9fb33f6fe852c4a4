"""Run folders: what is written is what is read, whole, the same bytes for the same data."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.runs import frames
from analysis.runs.folders import Run, Value, list_runs, load_run, tables_of, write_run
from analysis.runs.frames import in_words, not_measured, read_frame, write_frame
from mambabyte.errors import UserError

DATA = pd.DataFrame({"length, bytes": [1, 2, 4], "time, ms": [0.5, 1.0, 2.0]})


def recorded(folder, **parameters):
    return write_run(Run(
        "tiny", parameters or {"n": 3, "sizes": (1, 2)},
        {"slope": Value(np.float64(0.5), "ms/byte", "fitted"), "joules": Value(None, "J"),
         "lost": Value(math.inf)},
        tables_of({"times": ("Times.", DATA), "raw": ("", DATA)}), {"line": "raw"}), folder)


def test_what_is_written_is_read(tmp_path):
    run = load_run(recorded(tmp_path / "a"))
    assert (run.study, run.status, run.parameters) == ("tiny", "done", {"n": 3, "sizes": [1, 2]})
    assert run.values["slope"] == Value(0.5, "ms/byte", "fitted")
    assert run.values["joules"].value is None
    assert run.values["lost"].value == math.inf
    assert {name: table.caption for name, table in run.tables.items()} == {
        "times": "Times.", "raw": ""}
    pd.testing.assert_frame_equal(run.tables["times"].frame, DATA)
    assert run.figures == {"line": "raw"}
    assert {"date", "commit", "machine", "versions"} <= run.provenance.keys()


def test_names_of_earlier_versions_are_read(tmp_path):
    forms = DATA.assign(form=["sequential", "chunked", "sequential scan"], sequential=[1, 2, 3])
    write_run(Run(
        "tiny", {"forms": ["sequential", "chunked"]},
        {"bf16_sequential_cells": Value(3, "cells"), "sound": Value("sequential", "", "words")},
        tables_of({"followed": ("", forms)}), {"headroom": "followed"}), tmp_path / "old")
    run = load_run(tmp_path / "old")
    assert run.parameters == {"forms": ["recurrent", "chunked"]}
    assert run.figures == {"exponent": "followed"}
    assert run.values["bf16_recurrent_cells"].value == 3
    assert run.values["sound"].value == "recurrent"
    frame = run.tables["followed"].frame
    assert list(frame["form"]) == ["recurrent", "chunked", "sequential scan"]
    assert list(frame["recurrent"]) == [1, 2, 3]


ODD = pd.DataFrame({
    "nan": [1.0, math.nan], "none": pd.Series([None, 2.0], dtype=object),
    "both": pd.Series([None, math.nan], dtype=object), "inf": [math.inf, -math.inf],
    "missing int": pd.Series([1, None], dtype="Int64"), "word": ["a", None],
    "flag": [True, False], "kind": pd.Categorical(["u", "v"]),
    "words that look like others": ["nan", "16"], 'a, "b"\n': ["", 'x, "y"\nz'],
    "exact": [0.1 + 0.2, 5e-324], "whole": [4.0, -0.0],
})


@pytest.mark.parametrize(("rows", "suffix"), [(1, ".csv"), (100, ".parquet")])
def test_not_measured_and_nan_stay_apart(tmp_path, rows, suffix, monkeypatch):
    """In a CSV, and in the Parquet of a table that is too large for one."""
    monkeypatch.setattr(frames, "LARGEST_CSV", 1000)
    frame = pd.concat([ODD] * rows, ignore_index=True)
    path = write_frame(tmp_path, "f", frame)
    assert path.suffix == suffix
    back = read_frame(tmp_path, "f")
    assert math.isnan(back["nan"][1])
    assert list(back["none"][:2]) == [None, 2.0]
    assert back["both"][0] is None
    assert math.isnan(back["both"][1])
    assert list(back["inf"][:2]) == [math.inf, -math.inf]
    assert list(back["missing int"][:2]) == [1, None]
    assert list(back["word"][:2]) == ["a", None]
    assert list(back["flag"][:2]) == [True, False]
    for name in ("words that look like others", 'a, "b"\n', "exact", "whole", "kind"):
        assert list(back[name]) == list(frame[name])
    assert back["whole"].dtype == float


@pytest.mark.parametrize("text", ['"a","b"\n1,2\n3\n', '"a"\n1', '"a"\n"x"y\n', ""])
def test_a_spoiled_csv_is_a_clear_error(tmp_path, text):
    folder = recorded(tmp_path / "a")
    (folder / "times.csv").write_text(text)
    with pytest.raises(UserError, match="not a complete run folder"):
        load_run(folder)


def test_a_column_of_mixed_kinds_is_refused(tmp_path):
    for column in ([1, "x"], [True, 2], [pd.Timestamp(0)]):
        with pytest.raises(UserError, match=r"table t: column 'a' has cells of mixed or unknown"):
            write_frame(tmp_path, "t", pd.DataFrame({"a": pd.Series(column, dtype=object)}))


def test_same_run_same_bytes(tmp_path):
    first, second = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    for name in ("times.csv", "raw.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    lines = (first / "run.json").read_text().splitlines()
    assert '    "slope": {"value": 0.5, "unit": "ms/byte", "about": "fitted"},' in lines


@pytest.mark.parametrize("name", ["", "Peak", "a b", "../up", "a.b", "-a", "é"])
def test_names_are_slugs(tmp_path, name):
    with pytest.raises(UserError, match="name"):
        write_run(Run("tiny", {}, {name: Value(1)}), tmp_path / "r")
    with pytest.raises(UserError, match="name"):
        tables_of({name: ("c", DATA)})
    with pytest.raises(UserError, match="name"):
        write_run(Run(name, {}), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("frame", "match"), [
    (pd.DataFrame([[1, 2]]), "columns"),
    (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns"),
    (pd.DataFrame({("a", "b"): [1]}), "columns"),
    ([1, 2], "DataFrame"),
])
def test_tables_are_flat_and_named(frame, match):
    with pytest.raises(UserError, match=match):
        tables_of({"t": ("c", frame)})


def test_named_index_becomes_a_column():
    assert list(tables_of({"t": ("c", DATA.set_index("length, bytes"))})["t"].frame) == list(DATA)


def test_values_and_parameters_are_plain(tmp_path):
    with pytest.raises(UserError, match="'v' is a list"):
        write_run(Run("tiny", {}, {"v": Value([1])}), tmp_path / "r")
    with pytest.raises(UserError, match="parameter 'p'"):
        write_run(Run("tiny", {"p": {1}}), tmp_path / "r")


def test_writing_again_replaces(tmp_path):
    recorded(tmp_path / "a")
    run = load_run(write_run(Run("tiny", {}, {"x": Value(2)}), tmp_path / "a"))
    assert run.values["x"].value == 2
    assert not run.tables
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]


def test_a_sweeps_folder_keeps_its_notebook(tmp_path):
    (tmp_path / "log.txt").write_text("step 1")
    assert load_run(recorded(tmp_path)).values["slope"].value == 0.5
    assert (tmp_path / "log.txt").read_text() == "step 1"


def test_list_runs_sees_whole_runs_only(tmp_path):
    recorded(tmp_path / "b")
    recorded(tmp_path / "a")
    recorded(tmp_path / ".c.tmp")
    (tmp_path / "half").mkdir()
    assert [r.folder.name for r in list_runs(tmp_path)] == ["a", "b"]
    assert list_runs(tmp_path / "absent") == []


@pytest.mark.parametrize("damage", ["not json", '{"format": 1}', "[]", '{"format": 99}', "{}"])
def test_damaged_run_is_a_clear_error(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_run(tmp_path)


def test_truncated_table_is_a_clear_error(tmp_path):
    folder = recorded(tmp_path / "a")
    (folder / "times.csv").unlink()
    (folder / "times.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a complete run folder"):
        load_run(folder)


def test_run_file_cannot_name_files_elsewhere(tmp_path):
    folder = recorded(tmp_path / "a")
    record = json.loads((folder / "run.json").read_text())
    record["tables"] = {"../../secret": "c"}
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
    write_frame(tmp_path, "f", not_measured(frame, "energy, J"))
    back = read_frame(tmp_path, "f")
    assert list(back["energy, J"]) == [1.0, None]
    assert math.isnan(back["error, relative"][1])


def test_bytes_of_an_axis_are_in_binary_units():
    said = [plots.binary_bytes(n) for n in (0, 1023, 1536, 1000 * 2**20, 5 * 2**50)]
    assert said == ["0 B", "1020 B", "1.5 KiB", "1000 MiB", "5120 TiB"]


def test_powers_of_two_stay_short():
    assert [plots._power_of_two(v) for v in (0.5, 32, 4096, 65536, 2**20, 3 * 2**20)] == \
        ["0.5", "32", "4,096", "64 Ki", "1 Mi", "3 Mi"]


def test_what_did_not_happen_has_a_word():
    frame = pd.DataFrame({"at": [1200.0, None], "n": [1, 2]})
    assert in_words(frame, "at", "never")["at"].tolist() == ["1,200", "never"]
    why = pd.Series(["x", None], dtype=object)
    assert in_words(frame, "at", why)["at"].tolist() == ["1,200", None]  # not measured stays so
