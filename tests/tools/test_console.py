"""Progress on the console: what is said while nothing new comes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from analysis.cli import main
from analysis.cli.console import said_again
from analysis.cli.options import print_result
from mambabyte.errors import UserError


def test_the_last_line_is_said_again_until_another_comes() -> None:
    said: list[str] = []
    twice = threading.Semaphore(0)

    def say(line: str) -> None:
        said.append(line)
        if "so far" in line:
            twice.release()

    with said_again(say, first=1e-3, most=2e-3) as report:
        assert not twice.acquire(timeout=0.01)  # nothing to say yet
        for line in ("counting", "fitting"):
            report(line)
            assert twice.acquire(timeout=60)
            assert twice.acquire(timeout=60)
    assert re.fullmatch(r"counting: \d+ s so far", said[said.index("counting") + 1])
    assert re.fullmatch(r"fitting: \d+ s so far", said[said.index("fitting") + 1])


def test_it_ends_with_an_error() -> None:
    before = threading.active_count()
    with contextlib.suppress(KeyError), said_again(lambda line: None) as report:
        report("counting")
        raise KeyError
    assert threading.active_count() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [
    "--version", "--help", "memory --help", "runs list --json", "runs list", "nope"])
def test_a_full_disk_loses_no_result_and_is_said(command: str, tmp_path: Path) -> None:
    ask = [sys.executable, "-m", "mambabyte", *command.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(ask, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        mute = subprocess.run(ask, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 2
    *result, line = done.stderr.splitlines()
    assert line.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    if "--json" in command:
        assert result[-1].startswith("{")
    assert mute.returncode == (2 if command == "nope" else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_files_are_kept_though_stdout_is_full(monkeypatch, capsys) -> None:
    kept: list[int] = []
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="standard output took no more"):
            print_result({"bits": 2}, True, [], lambda: kept.append(1))
    assert kept
    assert '{"bits": 2}' in capsys.readouterr().err


def test_a_disk_that_fails_is_one_line(monkeypatch, capsys, tmp_path) -> None:
    """Reading on from an open file says neither its name nor what to do."""
    def fails(path: Path, **how: str) -> str:
        if path.name != "README.md":
            return read_text(path, **how)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "README.md").write_text("a page")
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", fails)
    assert main(["report", "--readme", str(tmp_path / "README.md")]) == 2
    assert capsys.readouterr().err == (
        "error: a file could not be read or written to its end: Input/output error\n")


def test_a_result_is_printed_though_no_file_takes_it(capsys) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        print_result({"bits": 2}, True, [], full)
    assert capsys.readouterr().out == '{"bits": 2}\n'


@pytest.mark.parametrize("command", [
    "audit mambabyte.ops:selective_scan --out {there}/sub", "bench scan --record {there}/sub",
    "task run counts --record {there}/sub", "study memory --record {there}/sub"])
def test_where_a_result_goes_is_asked_before_the_work(command: str, tmp_path: Path, capsys) -> None:
    there = tmp_path / "a file"
    there.write_text("mine")
    assert main([word.format(there=there) for word in command.split()]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert line.startswith(f"error: cannot write to {there}")
