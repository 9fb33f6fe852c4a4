"""Greedy characters at many places at once are those of CharModel, ties included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.evaluate import score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, CharModel, greedy
from mambabyte.stream.greedy import Windows, greedy_codes
from mambabyte.task.mixture import Mixture, NgramLM
from mambabyte.task.ngram import count
from tests.conftest import MULTIBYTE

SMALL = ModelConfig(d_model=32, n_layer=3, d_state=4, n_head=2, n_kv_head=2, attention_window=24)
TEXTS = st.text(st.sampled_from("ab é߿ࠀ€日本퟿\U00010000🙂🙃\U0010ffff"), min_size=1, max_size=50)


@pytest.fixture(scope="module", params=["M", "A", "MMA", "MA and n-gram", "n-gram"])
def trained(request: pytest.FixtureRequest) -> Any:
    """Models that have seen multi-byte text, so that longer characters are in question."""
    torch.manual_seed(0)
    counted = count(MULTIBYTE[:120].encode(), 5)
    if request.param == "n-gram":
        return NgramLM(counted)
    model = ByteLM(replace(SMALL, layer_pattern=request.param.split()[0]))
    data = torch.tensor(list(MULTIBYTE.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(90):
        start = (step * 37) % (len(data) - 65)
        optimizer.zero_grad()
        model.loss(data[start : start + 65][None]).backward()
        optimizer.step()
    return Mixture(model, counted, 0.4) if "n-gram" in request.param else model.eval()


@pytest.mark.parametrize("window", [5, 64, None])
def test_score_equals_streaming(trained: Any, window: int | None, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(greedy._TOKENS, "cpu", 200)  # so that batches are split
    monkeypatch.setattr("mambabyte.evaluate._BLOCK", 150)
    text = MULTIBYTE[:90] + "日本語 plain £ 🙂🙂 naïve“"
    monkeypatch.setitem(greedy._CALL, "cpu", 1)
    asked: list[int] = []
    gaps: list[int] = []
    after = Windows.after

    def counted(self: Windows, places: np.ndarray, prefixes: np.ndarray) -> Tensor:
        asked.append(prefixes.shape[1])
        gaps.append(int(np.diff(self.starts, prepend=-999).min()))
        return after(self, places, prefixes)

    monkeypatch.setattr(Windows, "after", counted)
    parallel = score(trained, text.encode(), len(text), window=window)
    assert {1, 2} <= set(asked)  # longer characters were in question
    assert min(gaps) == (5 if window == 5 else 16)  # states were found between the windows
    streaming = score_streaming(CharModel(trained), text.encode(), len(text))
    assert (parallel.hits == streaming.hits).all()
    assert 0.05 < parallel.char_accuracy < 1
    assert parallel.bits_per_byte == pytest.approx(streaming.bits_per_byte, rel=1e-5)


def test_training_mode_is_given_back() -> None:
    model = ByteLM(SMALL).train()
    score(model, b"abc")
    assert model.training


@dataclass
class Opaque:
    """A state that nobody can look into."""

    last: Tensor


class Table(nn.Module):
    """Few bytes, their probabilities powers of two: ties everywhere, characters of any length, from
    the first lead byte to the last."""

    device = torch.device("cpu")

    def __init__(self, seed: int, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque
        generator = torch.Generator().manual_seed(seed)
        likely = [*b"ab", 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0x80, 0x82, 0x9F, 0xA0, 0xBF]
        weights = torch.zeros(32, 256)
        exponents = torch.tensor([0, -1, -8, -8, -8, -8, -8])  # mostly one or two stand out
        for row in weights:
            drawn = torch.randint(len(exponents), (len(likely),), generator=generator)
            row[likely] = 2.0 ** exponents[drawn]
        self.table = (weights + 2.0**-20).log()

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        last = torch.zeros(len(tokens), 2, dtype=torch.long) if state is None else state
        last = last.last if isinstance(last, Opaque) else last
        text = torch.cat([last, tokens], 1)
        row = (text[:, 2:] * 5 + text[:, 1:-1] * 3 + text[:, :-2]) % 32
        new = text[:, text.shape[1] - 2 :]
        return self.table[row], Opaque(new) if self.opaque else new


@settings(max_examples=40)
@example(text="bé𐀀a߿€€€  éa", seed=22, cut=25, opaque=True)  # one window, opaque after its start
@given(text=TEXTS, seed=st.integers(0, 30), cut=st.integers(1, 40), opaque=st.booleans())
def test_every_character_is_that_of_the_search(
    text: str, seed: int, cut: int, opaque: bool
) -> None:
    model = Table(seed, opaque)
    raw = text.encode()
    inputs = np.frombuffer(bytes([START_BYTE]) + raw, np.uint8)
    starts, states, state = [], [], None
    for start in range(0, len(inputs), cut):
        starts.append(start)
        states.append(state)
        _, state = model(torch.from_numpy(inputs[None, start : start + cut].copy()).long(), state)
    chars, places, wanted, log_probs = CharModel(model), [], [], []
    for i in range(len(text) + 1):
        places.append(len(text[:i].encode()))
        wanted.append(ord(chars.greedy()))
        log_probs.append(chars._stream.log_probs)
        if i < len(text):
            chars.observe(text[i])
    windows = Windows(model, inputs, starts, states)
    got = greedy_codes(windows, torch.tensor(places), torch.stack(log_probs))
    assert got.tolist() == wanted


def test_the_table_asks_for_all_lengths() -> None:
    """The property above would be empty if no longer character ever won."""
    lengths = set()
    for seed in range(31):
        stream = ByteStream(Table(seed, False))
        for byte in b"abab\xc2\xbf":
            stream.feed(bytes([byte]))
            chars = CharModel(Table(seed, False))
            chars.seek(stream)
            lengths.add(len(chars.greedy().encode()))
    assert lengths == {1, 2, 3, 4}
