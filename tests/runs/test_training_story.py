"""What a training tells a person: where it is, what its numbers mean, and what to change."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from analysis.cli import main
from analysis.cli.console import _Place, _Rows, escaped
from analysis.cli.models.train import _forecast
from analysis.cli.training import Story, clock, replaced
from mambabyte.config import ModelConfig, TrainConfig, get_preset, presets
from mambabyte.corpus import load_corpus
from mambabyte.model import ByteLM
from mambabyte.task import SYSTEMS, get_system, systems
from mambabyte.train import Progress
from mambabyte.train.run import train
from mambabyte.train.schedule import schedule
from mambabyte.train.smoke import smoke_configs
from mambabyte.train.step import remedy

BYTE = get_preset("mamba_byte")


def at(step, seconds, n_steps=4000, exponent=None):
    return Progress(step, n_steps, 12.3456, 17.8112, 1.0, 1e-3, 123456.7, seconds, step * 512,
                    exponent, 123456.0)


def story(recipe=BYTE.train, form="fused", **model):
    return Story(replace(BYTE.model, **model), recipe, form)


def test_both_rows_are_whole_on_80_columns():
    told, p = story(), at(123_456, 250.0, 200_000, 123.4)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        from rich.progress import BarColumn, TextColumn

        rows = _Rows(TextColumn("{task.description}"), BarColumn(bar_width=None),
                     TextColumn("{task.percentage:.0f}%"), _Place(), console=console, expand=True)
        rows.add_task("training", total=1.0, completed=0.3, place=told.place(p),
                      note=told.state(p))
        for renderable in rows.get_renderables():
            console.print(renderable)
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("training")
    assert told.place(p) in lines[0]
    assert lines[1].strip() == told.state(p)
    assert "exponent 123.4 of 88.7" in lines[1]


@pytest.mark.parametrize(("step", "seconds", "left"), [
    (1, 2.5, "4:58"),  # the cap is nearer than the last step, from the first step on
    (3990, 40.0, "0:00"), (3000, 30.0, "0:10"), (115, 301.0, "0:00")])
def test_what_is_left_is_to_the_cap_or_to_the_end(step, seconds, left):
    assert story().place(at(step, seconds)) == f"step {step}/4000, {left} left"


@pytest.mark.parametrize(("cap", "step", "seconds", "share"), [
    (300.0, 1000, 150.0, 0.5), (300.0, 3000, 150.0, 0.75), (0.0, 1000, 900.0, 0.25),
    (300.0, 1000, 900.0, 1.0)])
def test_a_run_is_as_far_as_its_steps_or_its_clock(cap, step, seconds, share):
    assert story(replace(BYTE.train, max_seconds=cap)).done(at(step, seconds)) == share


@pytest.mark.parametrize(("stopped_by", "time_aware", "said"), [
    ("done", False, ["read", "look"]), ("interrupt", False, ["go on"]),
    ("max_seconds", True, ["read", "look"]), ("max_seconds", False, ["go on", "read", "look"])])
def test_what_to_do_next_depends_on_what_ended_it(stopped_by, time_aware, said):
    told = story(replace(BYTE.train, max_seconds=300.0, time_aware=time_aware))
    lines = told.advice({"stopped_by": stopped_by, "steps": 115}, Path("runs/a"))
    assert [re.match("read|look|go on", line).group() for line in lines] == said
    assert all("runs/a" in line for line in lines)
    if len(said) == 3:
        assert "--train.max-seconds 600 " in lines[0]
        assert "at step 115 of 4000" in lines[0]


def test_durations():
    assert [clock(s) for s in (7.2, 750, 11_100, float("inf"))] == ["0:07", "12:30", "3 h 05 min",
                                                                   "?"]


def test_a_cap_inside_the_warm_up_is_said_once_with_what_to_change():
    told = story()
    assert told.notes(at(1, 2.6)) == []  # the first step also starts things
    (note,) = told.notes(at(2, 5.2))
    assert "near step 115 of 4000, inside its warm-up of 200 steps" in note
    assert "--train.time-aware" in note
    assert "--train.max-seconds 0 lifts it (about 2 h 53 min)" in note
    assert told.notes(at(3, 7.8)) == []
    assert "before its learning rate has come down" in story().notes(at(2, 0.6))[0]


@pytest.mark.parametrize("change", [{"max_seconds": 0.0}, {"time_aware": True},
                                    {"max_seconds": 30_000.0}])
def test_no_word_of_a_cap_that_ends_nothing(change):
    assert story(replace(BYTE.train, **change)).notes(at(2, 5.2)) == []


@pytest.mark.parametrize(("model", "form", "ending"), [
    ({}, "fused", "fused, in use here, is safe"),
    ({}, "document_chunked", "document_chunked, in use here, is one of them"),
    ({"layer_pattern": "D"}, "fused", "overflow in float32")])
def test_an_exponent_past_its_limit_says_what_that_means(model, form, ending):
    recipe = replace(BYTE.train, max_seconds=0.0)
    told = story(recipe, form, **model)
    assert told.notes(at(20, 1.0, exponent=88.0)) == []
    (note,) = told.notes(at(40, 2.0, exponent=123.0))
    assert note.startswith("exponent 123 of 88.7: cumulated-sum forms of the scan would overflow")
    assert note.endswith(ending)


@pytest.mark.parametrize(("change", "says", "never"), [
    ({}, "lower lr, which is 0.003", "scan form auto"),
    ({"scan_form": "document_chunked"}, "train with auto", "lower lr"),
    ({"layer_pattern": "A"}, "lower lr, which is 0.003", "Scan form")])
def test_what_to_change_fits_the_form_in_use(change, says, never):
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=2, **change))
    text = remedy(model, TrainConfig(lr=3e-3))
    assert says in text
    assert never not in text


def test_the_quick_start_leaves_its_warm_up_at_any_speed():
    recipe = get_preset("quick_start").train
    for seconds_a_step in (1e-3, 0.05, 0.25):  # a fast card, a core, a slow machine
        shares = [schedule(int(t / seconds_a_step), recipe, t) for t in (0.5, 3.0, 30.0, 60.0)]
        assert shares[0] < shares[1]
        assert shares[1] == pytest.approx(1.0)
        assert 0.3 < shares[2] < 0.6
        assert shares[3] == pytest.approx(0.0, abs=1e-9)


def test_a_long_compilation_is_no_warm_up():
    recipe = get_preset("quick_start").train
    shares = [schedule(step, recipe, 20.0 + step / 100) for step in range(12)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == pytest.approx(shares[9], abs=0.3)  # then the cosine, by the clock


def test_smoke_mode_says_what_it_replaced():
    text = replaced(BYTE.model, BYTE.train, *smoke_configs(BYTE.model, 400))
    assert "in place of 1.06M parameters, layers MMMM, context 1024, batch 16, 4000 steps" in text
    assert "says nothing about quality" in text


@pytest.mark.parametrize(("text", "shown"), [
    ("tab\tline\nend é 👩‍🚀", "tab\tline\nend é 👩‍🚀"), ("\x1b[2J\x07\r", r"\x1b[2J\x07\r"),
    ("\x9b31m\x00", r"\x9b31m\x00"), ("a\u202eb", r"a\u202eb")])
def test_a_terminal_is_not_told_what_to_do(text, shown):
    assert escaped(text) == shown


def test_eval_and_generate_take_the_runs_own_corpus_and_say_so(tmp_path, monkeypatch, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("a line to go on from\nand another. " * 300)
    run = tmp_path / "run"
    recipe = TrainConfig(context=16, batch_size=1, n_steps=1)
    model = ModelConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=2, layer_pattern="A")
    train(model, recipe, load_corpus(str(text)), run, evaluate_bytes=64)
    for place in (run, run / "checkpoints" / "step_00000001"):
        assert main(["eval", str(place), "--characters", "50", "--json", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert '"corpus": "mine.txt"' in out
        assert "corpus: mine.txt, the run's own" in err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["generate", str(run), "--bytes", "40", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a line to go on from")
    assert "held-out text" in err
    assert not [c for c in out if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    text.write_text("another text by now. " * 300)
    assert main(["eval", str(run), "--characters", "50", "--device", "cpu"]) == 0
    assert "trained on another text than mine.txt is now" in capsys.readouterr().err
    text.unlink()
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    assert "cannot be opened" in capsys.readouterr().err
    assert main(["generate", str(run), "--bytes", "1", "--device", "cpu"]) == 0
    assert "note: no prompt, since" in capsys.readouterr().err
    (run / "config.json").write_text('{"model": {}, "train": {}}')  # from before it was kept
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    assert "(it was called mine.txt): name it with --corpus" in capsys.readouterr().err


def test_one_scheme_of_names_serves_train_and_task(capsys):
    for name in ("hybrid_1_1", "ssm_1", "ssm_1_1"):
        assert get_preset(name) == get_preset("ssm_1")
        assert get_system(name) == get_system("ssm_1_1")
        assert get_system(name).model == get_preset(name).model
    for name in ("hybrid_3_1", "nano_hybrid_1_1", "nano_hybrid_3_1", "nano_ssm"):
        assert get_system(name).model == get_preset(name).model
    assert get_system("guided_hybrid_1_1") is get_system("ours")
    for aliases, names in ((presets.ALIASES, presets.PRESETS), (systems.ALIASES, SYSTEMS)):
        assert set(aliases.values()) <= set(names)
        assert not set(aliases) & set(names)
    assert main(["task", "list"]) == 0
    assert "(also: guided_hybrid_1_1)" in capsys.readouterr().out


def test_a_system_that_does_not_tell_its_memory_refuses_no_training(monkeypatch) -> None:
    monkeypatch.setattr("mambabyte.config.provenance.memory_bytes", lambda: None)
    monkeypatch.setattr("mambabyte.model.pretrained.free_bytes", lambda device: None)
    assert re.fullmatch(r"memory: a step needs [\d.]+ GB",
                        _forecast(ModelConfig(), TrainConfig(), "cpu"))
