"""Options of commands: what is read, what is refused in one line, what help and a shell say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from analysis.cli import COMMANDS, COMPLETION, completions, main
from analysis.cli.parser import POSITIONAL, REPEATED, help_text, options_of, parse, usage
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.checks import Count
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    place: Annotated[Path, POSITIONAL]
    """A place."""
    size: Count = 3
    """A size."""
    kind: Literal["one", "two"] | None = None
    """A kind."""
    words: tuple[str, ...] = ()
    """Some words."""
    set: Annotated[tuple[str, ...], REPEATED] = ()
    """Pairs."""
    loud: bool = False
    """Say it."""
    train: TrainConfig = field(default_factory=TrainConfig)


def given(*argv: str, **defaults) -> Options:
    return parse(Options, argv, "test", "About.", **defaults)


def test_words_become_fields():
    found = given("here", "--size", "4", "--words", "a", "b,c", "--loud", "--set", "x=1",
                  "--set=y=--z", "--train.lr", "1e-2", "--train.batch_size=2", "--kind", "two")
    assert found == Options(Path("here"), 4, "two", ("a", "b,c"), ("x=1", "y=--z"), True,
                            TrainConfig(lr=0.01, batch_size=2))
    assert given("--words", "a", "--loud", "-").place == Path("-")
    assert given("-1").place == Path("-1")  # no option begins so
    assert given("x", "--no-loud", loud=True).loud is False
    assert given("x", train=TrainConfig(lr=5.0)).train.lr == 5.0
    assert given("x", "--train.seed", "2", train=TrainConfig(lr=5.0)).train == \
        TrainConfig(lr=5.0, seed=2)


@pytest.mark.parametrize(("argv", "line"), [
    ([], "test needs PLACE: A place."),
    (["x", "y"], "test takes no 'y' here"),
    (["x", "--szie", "3"], r"test has no option --szie \(did you mean --size\?\)"),
    (["x", "--size"], "--size needs a value: --size N"),
    (["x", "--words", "--loud"], "--words needs a value"),
    (["x", "--size", "--loud"], "--size needs a value"),
    (["x", "--size", "0"], "--size is 0: expected a whole number from 1"),
    (["x", "--size", "two"], "--size is 'two': expected a whole number"),
    (["x", "--size", "2", "--size", "3"], "--size is given twice"),
    (["x", "--loud", "--no-loud"], "--loud is given twice"),
    (["x", "--loud=perhaps"], "--loud is 'perhaps': expected true or false"),
    (["x", "--kind", "tow"], r"--kind is 'tow' \(did you mean two\?\): expected one of one, two"),
    (["x", "--train.lr", "nan"], "--train.lr is nan: expected a finite number"),
    (["x", "--train.batch-siez", "2"], r"did you mean --train.batch-size\?"),
    (["x", "--train.first-context", "9", "--train.context", "8"], "first_context is 9"),
])
def test_what_is_wrong_is_one_line(argv, line):
    with pytest.raises(UserError, match=line) as error:
        given(*argv)
    assert "\n" not in str(error.value)


def test_a_preset_is_named_once(capsys):
    assert main(["train", "--preset", "smoke", "--preset", "nonsense", "--out", "x"]) == 2
    assert main(["train", "--preset", "smoke", "--preset", "smoke", "--out", "x"]) == 2
    assert "--preset is given twice" in capsys.readouterr().err


def commands() -> dict[str, list]:
    """Every command, and every action of one that has several, with its options."""
    found = {}
    for name, (module, _) in COMMANDS.items():
        loaded = importlib.import_module(module)
        actions = getattr(loaded, "ACTIONS", None)
        found |= {name: options_of(loaded.Options)} if actions is None else {
            f"{name} {action}": options_of(about.options) for action, about in actions.items()}
    return found


@pytest.mark.parametrize(("command", "options"), commands().items())
def test_every_option_has_a_text_of_its_own(command, options):
    said = [option.about for option in options]
    assert all(said), [o.flag for o in options if not o.about]
    assert len(set(said)) == len(said)  # none is a neighbour's
    shown = help_text(options, command, "About.")
    for option in options:
        assert f"\n  {option.flag}" in shown
    assert "\x1b" not in shown  # NO_COLOR or not
    needed = [o for o in options if o.default is MISSING]
    assert shown.count("(required)") == len(needed)
    assert all(usage(o) in shown.splitlines()[0] for o in needed)


def test_help_of_an_action_shows_its_options_and_examples_alone(capsys):
    for argv, has, lacks in ((["bench", "stream", "--help"], "--streams", "--way"),
                             (["bench", "step", "--help"], "--way", "--streams"),
                             (["task", "export", "--help"], "--out", "--seeds")):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert has in out
        assert lacks not in out
        assert f"mambabyte {argv[0]} {argv[1]}" in out.split("options:")[0].split("\n", 1)[1]


def test_a_seed_is_refused_before_the_prompt_is_shown(capsys):
    assert main(["generate", "x", "--seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --seed is -1: expected a whole number")


@pytest.mark.parametrize("argv", [
    ["bench"], ["bench", "scna"], ["bench", "scan", "--streams", "2"], ["bench", "--json"],
    ["task", "list", "--seeds", "3"], ["task", "export", "x", "--characters", "2"], ["evla"],
    ["bench", "scan", "--shapes", "1,2"], ["bench", "scan", "--shapes", "0,2,3"],
    ["bench", "stream", "--seen", "0"], ["bench", "step", "--peers", "mambapy"],
    ["bench", "stream", "--preset", "smoke", "--checkpoint", "x"], ["eval"], ["sweep", "--bogus"],
    ["study", "memory", "--set", "batch"], ["study", "memory", "-f", "no.toml"],
    ["train", "--out", ""], ["eval", ""], ["report", "--out="], ["corpus", ""],
    ["generate", "x", "--top-p", "0"], ["memory", "--layer-pattern", "Q"], ["train", "--out"],
])
def test_a_refused_command_is_one_line_and_status_2(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")


def test_help_needs_no_torch():
    code = "\n".join([
        "import sys, contextlib, io", "from analysis.cli import COMMANDS, main",
        "with contextlib.redirect_stdout(io.StringIO()):", "    for name in COMMANDS:",
        "        with contextlib.suppress(SystemExit): main([name, '--help'])",
        "print(sorted({'torch', 'matplotlib', 'papermill'} & sys.modules.keys()))"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         check=True)
    assert run.stdout.strip() == "[]"


def test_completion_of_commands_actions_options_and_choices(capsys):
    assert completions([]) == list(COMMANDS)
    assert "scan" in completions(["bench"])
    assert {"--shapes", "--help"} <= set(completions(["bench", "scan"]))
    assert completions(["eval", "x", "--split"]) == ["train", "valid", "test"]
    assert "hybrid_3_1" in completions(["train", "--preset"])
    assert "--train.lr" in completions(["train", "--preset", "smoke"])
    assert completions(["nothing"]) == []
    assert main(["--completion"]) == 0
    assert capsys.readouterr().out.strip() == COMPLETION
    script = f"{COMPLETION}\nmambabyte() {{ echo 'scan stream step'; }}\n" \
        "COMP_WORDS=(mambabyte bench s); COMP_CWORD=2; _mambabyte; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "scan stream step"


def test_python_dash_m_is_the_command_even_without_streams_or_a_folder(tmp_path):
    command = [sys.executable, "-m", "mambabyte"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && " \
        f"{sys.executable} -m mambabyte corpus stdlib; echo status $?; " \
        f"{sys.executable} -m mambabyte --version <&- >&- 2>&-; echo status $?"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, env=env)
    assert done.stdout.split("\n")[:2] == ["status 2", "status 0"]
    assert "Traceback" not in done.stderr
    assert "working folder is no longer there" in done.stderr
    done = subprocess.run([*command, "-V"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.startswith("mambabyte ")


def test_parameters_from_a_file(tmp_path, capsys):
    for name, text in (("a.toml", "chunks = [16, 32]\nseed = 3"),
                       ("a.json", '{"chunks": [16, 32], "seed": 3}'),
                       ("a.yaml", "chunks: [16, 32]\nseed: 3")):
        (tmp_path / name).write_text(text)
        assert main(["study", "overflow", "-f", str(tmp_path / name), "--set", "seed=4",
                     "--parameters"]) == 0
        out = capsys.readouterr().out
        assert "chunks = [16, 32]" in out
        assert "seed = 4" in out
    for name, text in (("b.toml", "chunks = "), ("b.json", "[1]"), ("b.yaml", "a: [1"),
                       ("b.txt", "x"), ("c.toml", "chnks = [1]"), ("d.toml", "chunks = 16"),
                       ("e.json", '{"seed": 1e999}')):
        (tmp_path / name).write_text(text)
        assert main(["study", "overflow", "-f", str(tmp_path / name), "--parameters"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1, name


def test_model_and_training_options_are_those_of_the_dataclasses():
    flags = {o.flag for o in options_of(importlib.import_module(COMMANDS["train"][0]).Options)}
    for group, cls in (("model", ModelConfig), ("train", TrainConfig)):
        for name in cls.__dataclass_fields__:
            assert f"--{group}.{name.replace('_', '-')}" in flags
