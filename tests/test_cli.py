"""The command line as people meet it: help with examples, one-line errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
TINY = ("the quick brown fox jumps over the lazy dog. " * 11)[:485]


def mambabyte(*args, **kw):
    """Run the command as a user does, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "analysis.cli", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, **kw)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text(TINY)
    return path


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """A finished smoke run."""
    folder = tmp_path / "run"
    assert main(["train", "--corpus", str(tiny), "--out", str(folder)]) == 0
    capsys.readouterr()
    return folder


def error_line(capsys, *args):
    """The one line that a refused command prints; its status must not be 0."""
    assert main(list(map(str, args))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"mambabyte {command}" in capsys.readouterr().out.replace("usage: ", "", 1).split(
        "options", 1)[0].split("\n", 1)[1]


def test_usage_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_smoke_mode_from_the_shell(tiny, tmp_path):
    start = time.perf_counter()
    done = mambabyte("train", "--corpus", tiny, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["steps"] == 2
    assert record["smoke"]["scan_output_error"] < 1e-5
    assert record["energy_source"]
    assert "SMOKE mode (train=436 bytes) ctx=64" in done.stderr
    assert "step 2/2" in done.stderr
    assert record["seconds"] < 5
    assert time.perf_counter() - start < 60


def test_without_a_compiler_a_line_says_so_and_smoke_passes(tiny, tmp_path):
    nowhere = {k: v for k, v in os.environ.items() if k != "CC"}
    nowhere |= {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = mambabyte("train", "--corpus", tiny, "--out", tmp_path / "run", env=nowhere)
    assert done.returncode == 0, done.stderr
    assert "SMOKE PASS" in done.stdout
    notes = [line for line in done.stderr.splitlines() if "not used" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: fused selective scan not used on cpu: no C compiler")


def test_smoke_mode_fails_when_the_scan_is_wrong(tiny, tmp_path, capsys):
    line = error_line(capsys, "train", "--corpus", tiny, "--out", tmp_path / "run",
                      "--model.scan-form", "document_chunked")
    assert "does not compute the recurrence" in line
    assert not (tmp_path / "run").exists()


def test_eval_modes_agree_and_generate_is_utf8(run, tiny, capsys):
    results = []
    for mode in ("parallel", "streaming"):
        assert main(["eval", str(run), "--corpus", str(tiny), "--mode", mode, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["char_accuracy"] == results[1]["char_accuracy"]
    assert results[0]["bits_per_byte"] == pytest.approx(results[1]["bits_per_byte"], rel=1e-5)
    assert main(["generate", str(run), "--bytes", "30", "--prompt", "é"]) == 0
    assert capsys.readouterr().out.startswith("é")


def test_generate_reads_standard_input_and_survives_a_closed_pipe(run):
    done = mambabyte("generate", run, "--prompt", "-", "--bytes", "5", input="from stdin")
    assert done.returncode == 0
    assert done.stdout.startswith("from stdin")
    piped = subprocess.run(
        f"{sys.executable} -m analysis.cli generate {run} --bytes 3000 | head -c 10",
        shell=True, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=120)
    assert "Traceback" not in piped.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'"),
        (["train", "--preset", "mamba", "--out", "x"], "preset 'mamba' is unknown"),
        (["train", "--corpus", "{tiny}"], "no run folder was given"),
        (["train", "--corpus", "{tmp}/none.txt", "--out", "{tmp}/r"], "neither stdlib"),
        (["train", "--corpus", "{empty}", "--out", "{tmp}/r"], "is empty"),
        (["train", "--corpus", "{tmp}", "--out", "{tmp}/r"], "lacks wiki.train.raw"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--train.context", "9999999"],
         "context 9999999 needs"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.layer-pattern", "MXA"],
         "letters other than M, A"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.scan-form",
          "document_cumsum"], "subject of study"),
        (["train", "--corpus", "{text}", "--out", "/proc/run"], "cannot write to /proc/run"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--device", "tpu"], "is unknown"),
        (["eval", "{tmp}"], "holds no checkpoint"),
        (["generate", "{tmp}/nowhere"], "holds no checkpoint"),
        (["corpus", "{tmp}/none"], "neither stdlib"),
    ],
)
def test_bad_input_is_one_clear_line(args, message, tiny, text_file, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    places = {"tmp": tmp_path, "tiny": tiny, "empty": empty, "text": text_file}
    assert message in error_line(capsys, *(str(a).format(**places) for a in args))
    assert not (tmp_path / "r").exists()


def test_checkpoint_faults_are_one_clear_line(run, capsys):
    from mambabyte.checkpoint import find_checkpoint

    weights = find_checkpoint(run) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "truncated" in error_line(capsys, "eval", run)
    weights.write_bytes(data)
    config = weights.parent / "config.json"
    config.write_text(config.read_text().replace('"d_state": 8', '"d_state": 9'))
    assert "another shape" in error_line(capsys, "generate", run)


def test_ctrl_c_keeps_what_was_done_and_resumes(text_file, tmp_path):
    folder = tmp_path / "run"
    args = ["train", "--corpus", str(text_file), "--out", str(folder), "--preset", "smoke",
            "--train.n-steps", "100000", "--train.log-every", "5", "--train.max-seconds", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis.cli", *args], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for line in process.stderr:
        if "step 10/" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by interrupt" in out
    assert "Traceback" not in err
    steps = int(out.split()[0])
    assert steps >= 10
    saved = json.loads(next(folder.glob("checkpoints/*/progress.json")).read_text())
    assert saved["step"] == steps
    again = mambabyte(*args, "--resume", "--train.max-seconds", "0.01")
    assert again.returncode == 0, again.stderr
    assert f"{steps} steps" in again.stdout
