"""Speculative generation draws what plain generation draws, whatever is guessed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, stream_engine, streams
from mambabyte.stream.engines.base import Engine, TorchEngine
from mambabyte.stream.engines.layout import KINDS
from mambabyte.stream.generation import FirstOf, Repetitions, Speculation
from tests.conftest import TEXT

CONFIG = ModelConfig(d_model=16, n_layer=2, d_state=3, n_head=2, n_kv_head=1, attention_window=12,
                     local_window=5, ssd_head_dim=8, ssd_d_state=4, delta_head_dim=8,
                     tied_head=False)
PROMPT = TEXT[:60].encode()


def lm(letters: str) -> ByteLM:
    """Certain enough of some bytes, and not of all."""
    torch.manual_seed(2)
    model = ByteLM(replace(CONFIG, n_layer=len(letters), layer_pattern=letters)).eval()
    with torch.no_grad():
        model.head.weight *= 30
    return model


class Known:
    """Guesses from a text that it is given, with every third byte wrong; notes how much it was
    asked for."""

    def __init__(self, text: bytes, wrong: int = 3) -> None:
        self.text, self.at, self.wrong, self.asked = text, 0, wrong, []

    def read(self, data: bytes) -> None:
        self.at += len(data)

    def guess(self, last: int, most: int) -> bytes:
        assert most >= 1
        self.asked.append(most)
        right = self.text[self.at + 1 : self.at + 1 + most]
        return bytes(b ^ (i % self.wrong == self.wrong - 1) for i, b in enumerate(right))


def plain(model, **how) -> bytes:
    stream = ByteStream(model)
    stream.feed(PROMPT)
    return b"".join(stream.draw(32, **how))


def speculated(model, guesser, **how) -> tuple[bytes, Speculation, ByteStream]:
    stream = ByteStream(model)
    stream.feed(PROMPT)
    draws = Speculation(guesser)
    return b"".join(draws.draw(stream, 32, **how)), draws, stream


HOW = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"top_k": 3, "top_p": 0.8}]


@pytest.fixture(params=["engine", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":  # as where nothing but the model itself goes on
        monkeypatch.setattr(streams.cpu, "supports", lambda model: False)
    return request.param


@pytest.mark.parametrize("letters", ["MA", "".join(kind.letter for kind in KINDS)])
def test_the_text_is_that_of_plain_generation(letters, engine):
    model = lm(letters)
    by_torch = isinstance(stream_engine(model), TorchEngine)
    assert by_torch == (engine == "torch")  # else both are one case
    # Of seven layers that have learned nothing one byte is far ahead: drawn hot, it is not alone.
    for how in HOW if letters == "MA" else [{"temperature": 8.0, "seed": 3}]:
        wanted = plain(model, **how)
        assert len(set(wanted)) > 5  # no text that any guesser has right
        for wrong in (1, 3, 99) if letters == "MA" else (3,):  # all wrong, some, none
            got, draws, stream = speculated(model, Known(wanted, wrong), **how)
            assert got == wanted
            assert draws.drawn == 32
            if wrong == 99:
                assert draws.passes < 9
            after = ByteStream(model)
            after.feed(PROMPT + wanted)
            assert torch.allclose(stream.log_probs, after.log_probs, atol=1e-4)


def test_a_stream_closed_early_stands_behind_what_it_gave(engine):
    model = lm("MA")
    wanted = plain(model, temperature=0.0)
    stream = ByteStream(model)
    stream.feed(PROMPT)
    pieces = Speculation(Known(wanted)).draw(stream, 32, temperature=0.0)
    got = b"".join(next(pieces) for _ in range(3))
    pieces.close()
    assert wanted.startswith(got)
    assert b"".join(stream.draw(32 - len(got), temperature=0.0)) == wanted[len(got) :]


def test_wrong_guesses_become_fewer_and_right_ones_more():
    model = lm("M")
    wanted = plain(model, temperature=0.0)
    never, always = Known(wanted, 1), Known(wanted, 99)
    speculated(model, never, temperature=0.0)
    speculated(model, always, temperature=0.0)
    assert set(never.asked[1:-1]) == {1}
    assert max(always.asked) == 15


def test_a_guesser_that_says_too_much_is_cut_short():
    model = lm("M")
    wanted = plain(model, temperature=0.0)

    class Endless(Known):
        def guess(self, last: int, most: int) -> bytes:
            return self.text[self.at + 1 :] + bytes(100)

    assert speculated(model, Endless(wanted), temperature=0.0)[0] == wanted


def test_nothing_is_drawn_where_nothing_is_asked_for():
    stream = ByteStream(lm("M"))
    before = stream.log_probs
    assert list(Speculation(Known(b"")).draw(stream, 0)) == []
    assert stream.log_probs is before


def test_repetitions():
    guesser = Repetitions(match=4)
    assert guesser.guess(97, 5) == b""
    guesser.read(b"one fish two fish red")
    assert guesser.guess(ord(" "), 5) == b""  # "red " is new
    guesser.read(b" fi")
    assert guesser.guess(ord("s"), 5) == b"h red"  # the last time
    guesser.read(b"sh")
    assert guesser.guess(ord(" "), 9) == b"red fish "
    assert guesser.guess(ord(" "), 20) == b"red fish red fish re"  # and so on, into what is guessed
    short = Repetitions(match=4, memory=10)
    for _ in range(30):
        short.read(b"abcdefgh")
    assert short.guess(ord("a"), 3) == b"bcd"
    assert len(short._text) <= 20
    assert FirstOf(guesser, Known(b"__x", 9)).guess(1, 1) == b"_"


def test_an_engine_that_guesses_is_given_the_text_so_far_and_counted():
    class Guessing(Engine):
        guesses = True

        def __init__(self):
            self.given = []

        def __call__(self, data, state):
            return torch.zeros(256), len(data) + (state or 0)

        def guess_and_draw(self, log_probs, state, length, past, *how):
            self.given.append((length, past, how))
            for piece, passes, guessed in ((b"abca", 2, 3), (b"bc", 2, 1)):
                state += len(piece)
                yield piece, torch.zeros(256), state, passes, guessed

    stream = ByteStream(lm("M"))
    stream._engine = engine = Guessing()
    guesser = FirstOf(Repetitions())
    guesser.read(b"before")
    draws = Speculation(guesser)
    before = stream._state = 5
    assert b"".join(draws.draw(stream, 6, 0.5, 3, 0.9, 7)) == b"abcabc"
    assert engine.given == [(6, b"before", (0.5, 3, 0.9, 7))]
    assert (draws.passes, draws.drawn, draws.guessed, draws.right) == (4, 6, 4, 2)
    assert guesser.past == b"beforeabcabc"
    assert stream._state == before + 6
