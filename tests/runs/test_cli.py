"""The command line as people meet it: help with examples, one-line errors, exit codes, JSON."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from analysis.cli import COMMANDS, main
from mambabyte.checkpoint import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds: ends what hangs, says nothing about speed
TINY = ("the quick brown fox jumps over the lazy dog. " * 11)[:485]


def mambabyte(*args, **kw):
    """Run the command as a user does, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "analysis.cli", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True, timeout=PATIENCE, **kw)


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
        "\noptions:", 1)[0].split("\n", 1)[1]


@pytest.mark.parametrize(("command", "action"), [
    (command, action) for command, (module, _) in COMMANDS.items()
    for action in getattr(importlib.import_module(module), "ACTIONS", ())])
def test_every_action_has_help_with_an_example(command, action, capsys):
    with pytest.raises(SystemExit):
        main([command, action, "--help"])
    above = capsys.readouterr().out.partition("\noptions:")[0].splitlines()[1:]
    assert any(re.match(f"    .* {command} {action}", f"{line} ") for line in above)


@pytest.mark.parametrize(("command", "kept"), [("corpus", False), ("ngram", False),
                                               ("study", True), ("train", True)])
def test_an_interruption_says_what_is_kept_where_something_is(command, kept, capsys, monkeypatch):
    """A count, a score or a table of timings is gone, and was said to be kept."""
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(COMMANDS[command][0]), "run", stop)
    assert main([command]) == 130
    assert capsys.readouterr().err == "interrupted" + "; what was finished is kept" * kept + "\n"


def test_usage_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main([]) == 2
    for option in ("--version", "-V"):
        assert main([option]) == 0


def test_smoke_mode_from_the_shell(tiny, tmp_path):
    done = mambabyte("train", "--corpus", tiny, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["steps"] == 2
    assert record["smoke"]["scan_output_error"] < 1e-5
    assert record["energy_source"]
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert kept["smoke"] == record["smoke"]
    assert "SMOKE mode (train=436 bytes) ctx=64" in done.stderr
    assert "memory: a step needs 0.0" in done.stderr
    assert "step 2/2" in done.stderr
    assert record["bytes_seen"] < 1000  # a smoke run is over at once


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


@pytest.mark.long
def test_generate_reads_standard_input_and_survives_a_closed_pipe(run):
    done = mambabyte("generate", run, "--prompt", "-", "--bytes", "5", input="from stdin")
    assert done.returncode == 0
    assert done.stdout.startswith("from stdin")
    piped = subprocess.run(
        f"{sys.executable} -m analysis.cli generate {run} --bytes 3000 | head -c 10",
        shell=True, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    assert "Traceback" not in piped.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'"),
        (["train", "--preset", "mamba", "--out", "x"], "preset 'mamba' is unknown"),
        (["train", "--corpus", "{tiny}"], "train needs --out PATH: Run folder"),
        (["train", "--corpus", "{tmp}/none.txt", "--out", "{tmp}/r"], "neither stdlib"),
        (["train", "--corpus", "{empty}", "--out", "{tmp}/r"], "is empty"),
        (["train", "--corpus", "{tmp}/half", "--out", "{tmp}/r"], "lacks wiki.train.raw"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--train.context", "99999"],
         "context 99999 needs"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.layer-pattern", "MXA"],
         "expected one letter a layer, at least one, each of M (selective SSM)"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--train.betas", "0.9", "2"],
         "betas is [0.9, 2.0]: expected 2 values, each a finite number"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--train.seed", "-1"], "seed is -1"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.mlp-ratio", "-2"],
         "--model.mlp-ratio is -2.0"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.embed-std", "-1"],
         "--model.embed-std is -1.0"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.rope-base", "0"],
         "--model.rope-base is 0.0"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.dt-max", "inf"],
         "--model.dt-max is inf: expected a finite number"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.scan-form", "chunked",
          "--model.scan-chunk", "-4"], "--model.scan-chunk is '-4': expected"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.vocab-size", "100"],
         "it must be at least 256"),
        (["memory", "--device-memory", "40"], "write the unit, e.g. 40GB"),
        (["memory", "--layer-pattern", ""], "--layer-pattern is ''"),
        (["ngram", "--corpus", "{text}", "--order", "256"], "from 1 to 255"),
        (["ngram", "--corpus", "{text}", "--order", "2", "--save", "{tmp}"], "it is a folder"),
        (["report", "--out", "{tmp}"], "it is a folder"),
        (["report", "--runs", "{tmp}/none"], "there is no such folder"),
        (["runs", "list", "{tmp}/none"], "is no folder"),
        (["task", "run", "ngram", "--corpus", "{text}", "--idle-watts", "nan"],
         "--idle-watts is nan"),
        (["study", "overflow", "--set", "seed=-1", "--root", "{tmp}/r"], "seed is -1: expected"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--model.scan-form",
          "document_cumsum"], "subject of study"),
        (["train", "--corpus", "{text}", "--out", "/proc/run"], "cannot write to /proc/run"),
        (["train", "--corpus", "{text}", "--out", "{tmp}/r", "--device", "tpu"],
         "expected auto, cpu, cuda or cuda:N"),
        (["eval", "{tmp}"], "holds no checkpoint"),
        (["generate", "{tmp}/nowhere"], "holds no checkpoint"),
        (["corpus", "{tmp}/none"], "neither stdlib"),
    ],
)
def test_bad_input_is_one_clear_line(args, message, tiny, text_file, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "wiki.test.raw").write_text("text")
    places = {"tmp": tmp_path, "tiny": tiny, "empty": empty, "text": text_file}
    assert message in error_line(capsys, *(str(a).format(**places) for a in args))
    assert not (tmp_path / "r").exists()


@pytest.mark.filterwarnings("default")
def test_bytes_that_are_no_utf8_are_scored_and_said(run, tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu, ".encode("latin-1") * 200)
    records = []
    for mode in ("parallel", "streaming"):
        assert main(["eval", str(run), "--corpus", str(path), "--mode", mode, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "is no UTF-8 from about byte 1 on" in err
        records.append(json.loads(out))
    assert main(["eval", str(run), "--corpus", str(path), "--bytes", "10"]) == 0
    assert "2 of the bytes belong to no UTF-8 character" in capsys.readouterr().out
    for record in records:
        assert record["bytes"] == record["split_bytes"] == record["characters"] == 90
        assert record["bytes_not_utf8"] == 20
        assert record["bits_per_byte"] == pytest.approx(records[0]["bits_per_byte"], rel=1e-5)


def test_weights_that_are_no_numbers_are_one_clear_line(run, tiny, capsys):
    path = find_checkpoint(run) / "model.safetensors"
    weights = load_file(path)
    weights["norm_f.weight"][0] = float("nan")
    save_file(weights, path)
    for command in (["eval", run, "--corpus", tiny], ["generate", run, "--temperature", "0"]):
        assert "nan" in error_line(capsys, *command)


def test_a_run_is_resumed_without_its_options(text_file, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", "--preset", "smoke", "--corpus", str(text_file), "--device", "cpu", "--out",
               str(folder), "--train.lr", "1e-3", "--model.d-state", "4"]
    assert main([*command, "--train.max-seconds", "1e-9"]) == 0
    assert main(["train", "--out", str(folder), "--resume", "--train.max-seconds", "0", "--json"
                 ]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stopped_by"] == "n_steps"
    kept = json.loads((folder / "config.json").read_text())
    assert (kept["train"]["lr"], kept["model"]["d_state"]) == (1e-3, 4)
    assert (kept["corpus"], kept["device"]) == (str(text_file), "cpu")
    line = error_line(capsys, "train", "--out", folder, "--resume", "--train.lr", "2e-3")
    assert "with lr 0.001, now 0.002" in line
    # The same file makes another run.
    again = ["train", "--config", folder / "config.json", "--out", tmp_path / "again"]
    assert main([*map(str, again), "--train.n-steps", "1"]) == 0
    other = json.loads((tmp_path / "again" / "config.json").read_text())
    assert other == kept | {"train": kept["train"] | {"n_steps": 1}}


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.toml", 'preset = "smoke"\n[train]\nlearning_rate = 1', "unknown field 'learning_rate'"),
    ("a.toml", "[model]\nd_state = -1", "d_state is -1"), ("a.toml", "a = ", "is no JSON"),
    ("a.json", '{"model": 3}', "expected named values"),
    ("a.json", "[]", "expected some of preset"),
    ("/dev/zero", None, "is not a file"), ("a.json", '{"modle": {}}', "['modle']"),
    ("a.json", '{"corpus": 3}', "corpus is 3")])
def test_a_wrong_configuration_file_is_one_clear_line(name, text, message, tmp_path, capsys):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    line = error_line(capsys, "train", "--config", path, "--out", tmp_path / "run")
    assert str(path) in line
    assert message in line


def test_memory_answers_for_a_run_and_for_the_options_of_train(run, capsys):
    def asked(*args: object) -> dict:
        assert main(["memory", *map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    kept = json.loads((run / "config.json").read_text())
    own = asked(run, "--device", "cpu")
    assert (own["model"], own["train"]) == (kept["model"], kept["train"])
    assert own == asked(run / "config.json", "--device", "cpu") | {"run": str(run)}
    one, short = (asked(run, option, 1, "--device", "cpu")["required_bytes"]
                  for option in ("--train.batch-size", "--batch-size"))
    assert one == short < own["required_bytes"]
    wide = asked("--preset", "smoke", "--model.vocab-size", 9000, "--model.no-tied-head")
    assert wide["model"]["vocab_size"] == 9000
    assert not wide["model"]["tied_head"]
    assert "nowhere" in error_line(capsys, "memory", "nowhere")


def test_checkpoint_faults_are_one_clear_line(run, capsys):
    weights = find_checkpoint(run) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "truncated" in error_line(capsys, "eval", run)
    weights.write_bytes(data)
    config = weights.parent / "config.json"
    config.write_text(config.read_text().replace('"d_state": 8', '"d_state": 9'))
    assert "another shape" in error_line(capsys, "generate", run)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"", b'{"d_model": 3.5}'])
def test_a_damaged_configuration_is_one_clear_line(content, run, capsys):
    path = find_checkpoint(run) / "config.json"
    path.write_bytes(content)
    line = error_line(capsys, "eval", run)
    assert str(path) in line
    assert "use another checkpoint" in line


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"{}", b'{"step": "x"}'])
def test_damaged_progress_is_one_clear_line(content, run, tiny, capsys):
    path = find_checkpoint(run) / "progress.json"
    path.write_bytes(content)
    assert str(path) in error_line(capsys, "train", "--corpus", tiny, "--out", run, "--resume")


def test_damaged_metrics_do_not_stop_a_resumed_run(run, tiny, capsys):
    (run / "metrics.jsonl").write_bytes(b'{"a": 1}\n[2]\n\xff\xfe\n{"step": 1}\n{"st')
    assert main(["train", "--corpus", str(tiny), "--out", str(run), "--resume"]) == 0
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_resume_says_what_differs_and_where_there_is_nothing(text_file, tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["train", "--corpus", text_file, "--out", folder, "--preset", "smoke",
            "--train.n-steps", "1"]
    assert main([*map(str, args), "--resume"]) == 0
    assert "no checkpoint to resume from: starting at the first step" in capsys.readouterr().err
    line = error_line(capsys, *args, "--resume", "--model.d-state", "4")
    assert "(d_state 8, now 4)" in line
    shutil.rmtree(folder / "checkpoints")
    assert "give --resume to start it over" in error_line(capsys, *args)


@pytest.mark.parametrize("args", [["--temperature", "nan"], ["--temperature", "inf"],
                                  ["--top-p", "nan"], ["--seed", str(2**70)], ["--bytes", "-1"]])
def test_generate_refuses_numbers_that_mean_nothing(args, run, capsys):
    assert f"{args[0]} is {args[1]}" in error_line(capsys, "generate", run, *args)


@pytest.mark.long
def test_generate_reads_any_bytes_and_writes_to_any_terminal(run):
    command = [sys.executable, "-m", "analysis.cli", "generate", run, "--bytes", "5", "--prompt"]
    done = subprocess.run([*command, "-"], cwd=ROOT, capture_output=True, timeout=PATIENCE,
                          input=b"bad \xff utf-8 \xe2\x82")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("bad \ufffd utf-8 \ufffd")
    done = subprocess.run([*command, b"bad \xff"], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    done = mambabyte("generate", run, "--prompt", "é", "--bytes", "5",
                     env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("?")


def test_no_room_is_one_clear_line_and_leaves_no_file(run, text_file, tmp_path, capsys):
    """After ``run``, which compiled what a training needs: a compiler would have no room either."""
    out, had = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    for args in (["ngram", "--order", "5", "--save", out / "kn.safetensors"],
                 ["train", "--preset", "smoke", "--out", out / "run"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, had[1]))
        try:
            code = main([*map(str, args), "--corpus", str(text_file)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, had)
        words = capsys.readouterr().err
        assert code == 2, words
        assert "Traceback" not in words
        assert "File too large; nothing of it was left there" in words
    assert [p.name for p in out.iterdir()] == ["run"]
    assert not list((out / "run" / "checkpoints").iterdir())


@pytest.mark.long
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
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "stopped by interrupt" in out
    assert "Traceback" not in err
    steps = int(out.split()[0])
    assert steps >= 10
    saved = json.loads(next(folder.glob("checkpoints/*/progress.json")).read_text())
    assert saved["step"] == steps
    again = mambabyte(*args[:-1], "0.01", "--resume")
    assert again.returncode == 0, again.stderr
    assert f"{steps} steps" in again.stdout
