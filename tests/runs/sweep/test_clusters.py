"""Runs on a dask cluster and through submitit, whose workers and jobs are killed in the middle."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.sweep import executors
from analysis.sweep import run as sweep
from analysis.sweep.execute import _own_attempt
from analysis.sweep.executors import DaskExecutor, SlurmExecutor, slurm_parameters
from analysis.sweep.run import run_sweep
from mambabyte.config.files import temporary_dir
from mambabyte.errors import UserError
from tests.helpers.sweeps import Events, killed_always, killed_once


@pytest.fixture
def cluster(request, monkeypatch, tmp_path):
    """An executor with two workers of dask, or with submitit's processes on this machine."""
    pytest.importorskip("distributed" if request.param == "dask" else "submitit")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "slurm":
        # Submitit waits so long for a killed job's result, which a shared disk may show late.
        monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1, raising=False)
    pool = DaskExecutor(2) if request.param == "dask" else SlurmExecutor(
        poll_seconds=0.05, cluster="local")
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cluster", [
    pytest.param("dask", marks=pytest.mark.long), "slurm"], indirect=True)
def test_what_a_lost_worker_did_is_done_again(cluster, tmp_path):
    futures = [cluster.submit(killed_once, tmp_path / "mark", number) for number in range(2)]
    assert [future.result(timeout=120) for future in futures] == [0, 1]
    assert (tmp_path / "mark").exists()


@pytest.mark.long
def test_two_clusters_of_dask_are_beside_each_other() -> None:
    """The second found the page's port taken, and warned."""
    pytest.importorskip("distributed")
    pools = [DaskExecutor(1) for _ in range(2)]
    try:
        assert [pool.submit(abs, -2).result(timeout=60) for pool in pools] == [2, 2]
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@pytest.mark.long
@pytest.mark.parametrize("cluster", ["slurm"], indirect=True)
def test_what_is_lost_again_and_again_fails(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "LOST", 1)
    error = cluster.submit(killed_always, tmp_path / "mark").exception(timeout=120)
    assert error is not None
    assert (tmp_path / "mark").read_text() == "began\n" * 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["dask", "slurm"])
def test_a_sweep_whose_worker_is_killed_ends_with_every_run(
    name, registry, tmp_path, monkeypatch
):
    pytest.importorskip("distributed" if name == "dask" else "submitit")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(executors, "SlurmExecutor", functools.partial(
        SlurmExecutor, poll_seconds=0.1, cluster="local"))
    killed: list[int] = []

    class Killer(Events):
        """Kills the process that a run's own was started by, once it has said something."""

        def line(self, run, text):
            super().line(run, text)
            if not killed:
                parent = _parent_of_run(tmp_path / "runs")
                killed.append(parent)
                os.kill(parent, signal.SIGKILL)

    events = Killer()
    # A run that takes a second, so that it is met in the middle.
    rows = run_sweep(
        grid={"mode": ["ok", "pause"], "n": [2, 3]}, root=tmp_path / "runs", executor=name,
        workers=2, progress=events, registry=registry)
    assert killed
    assert [row.status for row in rows] == ["done"] * 4
    assert not [p.name for p in (tmp_path / "runs").iterdir() if p.name.endswith(".tmp")]
    again = run_sweep(
        grid={"mode": ["ok", "pause"], "n": [2, 3]}, root=tmp_path / "runs",
        progress=Events(), registry=registry)
    assert [row.status for row in again] == ["skipped"] * 4


def _parent_of_run(root: Path) -> int:
    """The process that waits for a run below ``root``: a worker of dask, or a job."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            here = (entry / "cwd").readlink()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"analysis.sweep.execute" in words and here == Path.cwd() and _is_below(parent):
            return parent
    raise AssertionError(f"no run below {root}")


def _is_below(process: int) -> bool:
    """Whether this process is among the parents of that one."""
    while process > 1:
        if process == os.getpid():
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_an_attempt_has_a_folder_of_its_own(registry, tmp_path):
    (task,) = sweep.plan(list(registry.values()), "quick", {}, {}, tmp_path)
    first, second = _own_attempt(task), _own_attempt(task)
    assert first.temporary != second.temporary
    assert Path(first.temporary).is_dir()
    tail = sweep._Tail(task)
    first.log.write_text("a\n")
    assert tail.begins()
    assert list(tail.lines(ended=False)) == ["a"]
    second.log.write_text("a\nb\n")  # from its own beginning
    assert list(tail.lines(ended=False)) == ["a", "b"]
    assert replace(task, temporary="") == replace(second, temporary="")
    # One that a killed sweep left is known as such.
    from mambabyte.config.owners import _LEFTOVER

    assert _LEFTOVER.fullmatch(Path(second.temporary).name)
    assert _LEFTOVER.fullmatch(temporary_dir(tmp_path / "x").name)


def test_options_of_sbatch():
    assert slurm_parameters("") == {"slurm_time": executors.SLURM_MINUTES}
    assert slurm_parameters("gpu") == {"slurm_time": executors.SLURM_MINUTES,
                                       "slurm_partition": "gpu"}
    assert slurm_parameters("partition=gpu,time=720, gpus_per_node=1") == {
        "slurm_time": 720, "slurm_partition": "gpu", "slurm_gpus_per_node": 1}
    for wrong in ("partition=", "=gpu"):
        with pytest.raises(UserError, match="expected a partition"):
            slurm_parameters(wrong)


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        SlurmExecutor("gpu")
    with pytest.raises(UserError, match=r"--address tmie=3: .*slurm_tmie"):
        SlurmExecutor("tmie=3", cluster="local")


def test_an_address_that_is_none_is_said():
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match="no dask scheduler answers at 'nowhere://x'"):
        DaskExecutor(1, "nowhere://x")
