"""Sweeps over a tiny study: what is done is skipped, what failed stays visible, nothing is half."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from analysis.report.appendix import notebook_html
from analysis.runs.folders import list_runs
from analysis.sweep import execute, executors
from analysis.sweep import run as sweep
from analysis.sweep.progress import LiveProgress, PlainProgress, printable
from analysis.sweep.run import run_sweep
from mambabyte.errors import UserError
from tests.helpers.sweeps import Events

ROOT = Path(__file__).resolve().parents[3]

@pytest.fixture(scope="module")
def swept(registry, tmp_path_factory):
    """One sweep of a grid in which one run ends well and the others each in their own way."""
    root = tmp_path_factory.mktemp("runs")
    events = Events()
    # The user's Jupyter has a python3 of its own, which cannot run: it is not ours to ask.
    theirs = tmp_path_factory.mktemp("jupyter")
    (theirs / "kernels" / "python3").mkdir(parents=True)
    (theirs / "kernels" / "python3" / "kernel.json").write_text(json.dumps(
        {"argv": ["false"], "display_name": "Theirs", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(theirs))
        rows = run_sweep(grid={"mode": ["ok", "fail", "die"]}, root=root,
                         executor="local", workers=2, progress=events, registry=registry)
    return root, {row.parameters["mode"]: row for row in rows}, events


def test_each_combination_has_a_row(swept):
    _, rows, _ = swept
    assert {mode: row.status for mode, row in rows.items()} == {
        "ok": "done", "fail": "failed", "die": "failed"}
    assert rows["fail"].error == "ValueError: <b>broken</b>"
    assert "kernel died (no room for the tensor)" in rows["die"].error
    assert "noise" in (rows["die"].folder / "stderr.txt").read_text()


def test_a_notebook_that_keeps_no_run_has_failed(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "_papermill", lambda *given: "")  # it ends well
    (task,) = sweep.plan(list(registry.values()), "quick", {}, {}, tmp_path)
    execute.execute(task)
    (failed,) = list_runs(tmp_path)
    assert failed.status == "failed"
    assert "its last cell is save(run)" in failed.error


def test_a_run_without_memory_says_what_to_do():
    assert execute.why("RuntimeError", "[enforce fail] can't allocate memory: 4 bytes\nmore") == (
        "out of memory: give smaller parameters "
        "(RuntimeError: [enforce fail] can't allocate memory: 4 bytes)")
    assert execute.why("ValueError", "no\nmore") == "ValueError: no"


def test_a_notebook_cut_by_a_full_disk_does_not_hide_why(registry, tmp_path, monkeypatch):
    def full(task, log, errors) -> str:
        (Path(task.temporary) / "notebook.ipynb").write_text("")
        return "OSError: [Errno 28] No space left on device"

    monkeypatch.setattr(execute, "_papermill", full)
    (task,) = sweep.plan(list(registry.values()), "quick", {}, {}, tmp_path)
    execute.execute(task)
    (failed,) = list_runs(tmp_path)
    assert failed.error == "OSError: [Errno 28] No space left on device"


def test_failed_runs_are_visible_with_notebook_and_log(swept):
    root, rows, _ = swept
    runs = {run.parameters["mode"]: run for run in list_runs(root)}
    assert {run.status for run in runs.values()} == {"done", "failed"}
    failed = runs["fail"]
    assert failed.error == rows["fail"].error
    assert failed.notebook is not None
    assert "second line" in failed.notebook.read_text()
    assert (failed.folder / "log.txt").read_text().splitlines() == ["step 0", "step 1", "step 2"]
    assert not failed.values


def test_finished_run_knows_where_it_came_from(swept, registry):
    root, rows, _ = swept
    run = next(r for r in list_runs(root) if r.status == "done")
    assert run.folder.name == run.run_id == rows["ok"].run_id
    assert run.sources == registry["tiny"].sources_digest()
    assert run.profile == "quick"
    assert run.provenance["command"] == "mambabyte study tiny"
    assert run.seconds > 0
    assert run.parameters == {"n": 3, "sizes": [1, 2], "mode": "ok"}
    assert run.values["total"].value == 3


def test_executed_notebook_and_appendix_show_what_is_recorded(swept):
    _, rows, _ = swept
    path = rows["ok"].folder / "notebook.ipynb"
    outputs = [o["data"] for c in json.loads(path.read_text())["cells"]
               for o in c.get("outputs", []) if "data" in o]
    assert sum("image/svg+xml" in data for data in outputs) == 1
    page = notebook_html(path)
    assert page.count("<svg") == 1
    assert "<b>A line.</b> It is flat." in page
    assert "What was &lt;counted&gt;." in page
    assert page.count("<table") == 1


def test_executed_notebook_shows_no_path_of_this_machine(swept):
    root, rows, _ = swept
    text = (rows["ok"].folder / "notebook.ipynb").read_text()
    assert str(ROOT) not in text
    assert ".tmp" not in text
    assert "papermill" not in text
    assert not [p.name for p in root.iterdir() if p.name.endswith(".tmp")]


def test_progress_is_forwarded(swept):
    _, rows, events = swept
    name = rows["ok"].run_id
    mine = [e for e in events.seen if len(e) > 1 and e[1] == name]
    assert mine[0][0] == "started"
    assert ("line", name, "step 1") in mine
    assert mine[-1][:3] == ("finished", name, "done")
    assert {e[2] for e in events.seen if e[0] == "started"} == {f"{i}/3" for i in range(1, 4)}
    assert events.seen[-1] == ("closed",)


@pytest.mark.long
def test_finished_runs_are_skipped_and_failed_ones_tried_again(swept, registry):
    root, rows, _ = swept
    stamp = (rows["ok"].folder / "run.json").stat().st_mtime_ns
    events = Events()
    again = run_sweep(grid={"mode": ["ok", "fail"]}, root=root, progress=events,
                      registry=registry)
    assert [row.status for row in again] == ["skipped", "failed"]
    assert (rows["ok"].folder / "run.json").stat().st_mtime_ns == stamp
    assert ("started", rows["ok"].run_id, "1/2") not in events.seen


def test_wrong_input_stops_before_anything_runs(registry, tmp_path):
    for arguments, match in [
        ({"names": ["tyni"]}, r"did you mean tiny\?"),
        ({"overrides": {"sizs": 1}}, r"did you mean sizes\?"),
        ({"grid": {"n": ["1", "x"]}}, "expected a whole number"),
        ({"grid": {"n": []}}, "no values for n"),
        ({"grid": {"n": [1]}, "overrides": {"n": 1}}, "n is given twice"),
        ({"profile": "deep"}, "no profile 'deep'"),
        ({"executor": "cloud"}, "no executor 'cloud'"),
        ({"executor": "local", "workers": 0}, "workers is 0"),
    ]:
        with pytest.raises(UserError, match=match):
            run_sweep(root=tmp_path / "runs", registry=registry, progress=Events(), **arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "package"), [("dask", "distributed"), ("slurm", "submitit")])
def test_missing_package_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        executors.make_executor(name)


@pytest.mark.parametrize("name", ["serial", "local"])
def test_an_address_is_not_let_fall(name):
    with pytest.raises(UserError, match=r"'gpu' is for the executors dask and slurm"):
        executors.make_executor(name, address="gpu")


def test_same_point_twice_is_one_run(registry, tmp_path):
    tasks = sweep.plan(list(registry.values()), "quick", {}, {"n": ["3", 3, "4"]}, tmp_path)
    assert [task.parameters["n"] for task in tasks] == [3, 4]


def test_a_study_of_results_comes_last_and_what_is_timed_runs_alone(registry, swept, monkeypatch):
    root, rows, _ = swept
    tiny = registry["tiny"]
    judge = dataclasses.replace(tiny, name="judge", reads_runs=True)
    clock = dataclasses.replace(tiny, name="clock", timed=True)
    ran: list[tuple[str, int]] = []

    def run(tasks, pool, progress, force, before, total):
        ran.extend((f"{task.study} {before} of {total}", pool._threads._max_workers)
                   for task in tasks)
        return [rows["ok"]] * len(tasks)

    monkeypatch.setattr(sweep, "_run", run)
    run_sweep(root=root, executor="local", workers=2, progress=Events(),
              registry={"judge": judge, "clock": clock, "tiny": tiny})
    assert ran == [("tiny 0 of 3", 2), ("clock 1 of 3", 1), ("judge 2 of 3", 2)]


def test_interrupted_sweep_leaves_nothing_half_and_no_process(registry, swept, tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from analysis.studies import Study;"
        "from analysis.sweep.run import run_sweep; f = Path(sys.argv[1]);"
        # Where the tests run in the background of a script, processes begin deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "run_sweep(overrides={'mode': 'slow'}, root=sys.argv[2], registry={'tiny':"
        " Study('tiny', 'T', 'Q', f / 'tiny.ipynb', 'tiny_study', f)})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(registry["tiny"].root), str(tmp_path)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{registry['tiny'].root}"})
    try:
        lines = iter(process.stderr.readline, "")
        assert any("step 2" in line for line in lines)
        # A second sweep in the same folder would remove this one's unfinished run.
        with pytest.raises(UserError, match=r"another process .* runs a sweep"):
            run_sweep(root=tmp_path, registry=registry, progress=Events())
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
        assert process.wait(20) != 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert not list(tmp_path.iterdir())
    assert not _still_running(tmp_path)


def test_what_a_study_prints_cannot_drive_the_terminal(capsys):
    assert printable("a\x1b[2Jb\r\nc\x07") == "a [2Jb  c"
    PlainProgress().line("run", "a\x1b[2Jb")
    assert capsys.readouterr().err == "      run | a [2Jb\n"


def test_live_display_shows_the_last_words_and_keeps_what_ended():
    screen = io.StringIO()
    live = LiveProgress(Console(file=screen, force_terminal=True, width=100))
    live.started("tiny-1", 1, 2)
    live.line("tiny-1", "step [red]7")
    table = live._render()
    assert [next(iter(c.cells)) for c in table.columns][1:3] == ["1/2", "tiny-1"]
    assert next(iter(table.columns[4].cells)).plain == "step [red]7"
    live.finished("tiny-1", "failed", "ValueError: [bold]x")
    live.close()
    assert not live._render().columns
    assert "ValueError: [bold]x" in screen.getvalue()


def _still_running(folder: Path) -> list[str]:
    """Command lines that name the folder, after as long as a busy machine takes to end them."""
    for _ in range(600):
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in words:
                found.append(words)
        if not found:
            return []
        time.sleep(0.1)
    return found
