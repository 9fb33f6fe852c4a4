"""`mambabyte generate`: states in files, prompts in a cache, guesses; the text stays the same."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from analysis.cli.models import evaluate
from analysis.cli.models import generate as command
from analysis.cli.models.generate import run
from mambabyte.config import ModelConfig
from mambabyte.config.files import write_json
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, generate, generation
from mambabyte.stream.generation import FirstOf
from mambabyte.task import ngram_file
from mambabyte.task.guesses import NgramGuesses
from mambabyte.task.ngram import count

CONFIG = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=3, n_head=2, n_kv_head=1,
                     attention_window=12, tied_head=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(1)
    model = ByteLM(CONFIG)
    with torch.no_grad():
        model.head.weight *= 30
    save_file(model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", vars(CONFIG))
    return folder


@pytest.fixture
def text(checkpoint, capsys):
    """What the command prints, without the prompt's line end."""
    def said(*options: str) -> str:
        run([str(checkpoint), "--device", "cpu", "--seed", "4", *options])
        return capsys.readouterr().out.removesuffix("\n")

    return said


def test_a_long_prompt_is_read_in_pieces_that_are_told(monkeypatch, tmp_path, capsys, checkpoint):
    """Between two Ctrl-C is heard."""
    model, data = ByteLM(CONFIG).eval(), bytes(range(32, 99)) * 2
    whole = ByteStream(model)
    whole.feed(data)
    monkeypatch.setattr(generation, "READ_AT_ONCE", 30)
    told: list[float] = []
    stream, _ = generation.begin(model, data, report=told.append)
    torch.testing.assert_close(stream.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    assert told == [30 / 134, 60 / 134, 90 / 134, 120 / 134, 1]
    generation.begin(model, data[:30], report=told.append)
    assert len(told) == 5  # a short one is one call
    monkeypatch.setattr(command, "LONG_PROMPT", 100)
    for begins in ([], ["--state", str(tmp_path / "a.state")]):
        assert run([str(checkpoint), "--prompt", data.decode(), "--bytes", "2", *begins,
                    "--save-state", str(tmp_path / "a.state")]) == 0
        assert "reading 100%" in capsys.readouterr().err


def test_a_text_goes_on_from_a_saved_state(text, tmp_path):
    whole = text("--prompt", "abc", "--bytes", "30", "--temperature", "0")
    first = text("--prompt", "abc", "--bytes", "12", "--temperature", "0", "--save-state",
                 str(tmp_path / "s"))
    then = text("--state", str(tmp_path / "s"), "--bytes", "18", "--temperature", "0")
    # where a character was cut, both halves are shown as replacements
    assert (first + then).replace("\ufffd", "") in (whole.replace("\ufffd", ""), whole)
    longer = text("--state", str(tmp_path / "s"), "--prompt", "x", "--bytes", "18",
                  "--temperature", "0")
    assert longer.startswith("x")
    assert longer[1:] != then


def test_guesses_and_a_cache_change_no_byte(text, tmp_path, monkeypatch, capsys):
    model = count(b"the quick brown fox" * 9, 4)
    ngram_file.save(model, tmp_path / "kn")
    plain = text("--prompt", "the quick", "--bytes", "40")
    for guess in ("text", str(tmp_path / "kn")):
        assert text("--prompt", "the quick", "--bytes", "40", "--guess", guess) == plain
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"the quick")))
        assert text("--prompt", "-", "--bytes", "40", "--prompt-cache", str(tmp_path / "c"),
                    "--guess", "text") == plain
    assert len(list((tmp_path / "c").glob("*.state"))) == 1


def test_what_does_not_fit_is_said_before_anything_is_drawn(text, tmp_path):
    for options, said in (
            (["--state", "s", "--prompt-cache", "c"], "give one"),
            (["--guess", "nonsense"], "expected text"),
            (["--guess", str(tmp_path)], "no n-gram model"),
            (["--state", str(tmp_path / "none")], "no such file"),
            (["--save-state", str(tmp_path)], "it is a folder")):
        with pytest.raises(UserError, match=said):
            text("--prompt", "abc", *options)


def test_guesses_of_an_n_gram_model_end_where_they_are_doubtful():
    guesses = NgramGuesses(count(b"abcde" * 20 + b"abxyz" * 20, 4))
    doubting = NgramGuesses(guesses.ngram, 0.95)
    for one in (guesses, doubting):
        one.read(b"ab")
    assert 0 < len(doubting.guess(ord("c"), 15)) < 15
    assert guesses.guess(ord("c"), 2) == b"de"  # no more than asked for
    assert guesses.guess(ord("c"), 15)[:3] == b"dea"
    either = NgramGuesses(count(b"abc.abx." * 20, 3))
    either.read(b"a")
    assert either.guess(ord("b"), 5) == b""  # c or x
    single = NgramGuesses(count(b"aaab", 1))
    single.read(b"q")
    assert single.guess(ord("z"), 1) == b"a"
    both = FirstOf(single, guesses)
    both.read(b"abc")
    assert both.guess(ord("d"), 1) == b"a"


def test_generate_takes_a_guesser_and_a_cache(checkpoint, tmp_path):
    from mambabyte.checkpoint import load_model
    from mambabyte.stream import PrefixCache

    model, cache = load_model(checkpoint), PrefixCache(tmp_path)
    wanted = "".join(generate(model, "abc", 20, seed=2))
    guesser = NgramGuesses(count(b"abcabd", 3))
    for _ in range(2):
        assert "".join(generate(model, "abc", 20, seed=2, cache=cache, guesser=guesser)) == wanted
    assert (cache.read_bytes, cache.found_bytes) == (3, 3)


def test_eval_scores_what_comes_after_a_context(checkpoint, tmp_path, capsys):
    (tmp_path / "text").write_text("a small text, again and again. " * 400)
    (tmp_path / "before").write_text("what was before")
    options = [str(checkpoint), "--device", "cpu", "--corpus", str(tmp_path / "text"),
               "--characters", "20", "--json"]
    after = ["--context", str(tmp_path / "before"), "--prompt-cache", str(tmp_path / "c")]
    bits = []
    for more in ([], after, after):
        evaluate.run([*options, *more])
        said = capsys.readouterr()
        bits.append(json.loads(said.out)["bits_per_byte"])
    assert bits[1] == bits[2] != bits[0]
    assert "15 bytes, 14 of them" in said.err  # the last one is read with the text
    for wrong, about in ((["--prompt-cache", "c"], "--context"),
                         (["--context", str(tmp_path / "none")], "cannot be read")):
        with pytest.raises(UserError, match=about):
            evaluate.run([*options, *wrong])
