"""Streaming equals parallel scoring; CharModel keeps the contract of the public task."""

from __future__ import annotations

import copy
import heapq
import math
import pickle
from dataclasses import replace

import pytest
import torch

from mambabyte import evaluate
from mambabyte.config import ModelConfig
from mambabyte.corpus.utf8 import as_bytes, as_characters, continuation_range
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.evaluate import bits_per_byte, byte_log_probs, score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, CharModel, generate, sample_byte
from mambabyte.task.mixture import Mixture
from mambabyte.task.ngram import count
from tests.conftest import MULTIBYTE, TEXT

SMALL = ModelConfig(d_model=32, n_layer=2, d_state=4, n_head=2, n_kv_head=2, attention_window=32)


@pytest.fixture(scope="module", params=["M", "MA"])
def trained(request) -> ByteLM:
    """A model that has seen multi-byte text, so that longer characters are in question."""
    torch.manual_seed(0)
    model = ByteLM(replace(SMALL, layer_pattern=request.param))
    data = torch.tensor(list((TEXT[:90] + MULTIBYTE).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        start = (step * 37) % (len(data) - 65)
        optimizer.zero_grad()
        model.loss(data[start : start + 65][None]).backward()
        optimizer.step()
    return model.eval()


def test_characters_begin_where_the_bytes_before_them_end():
    text = as_characters("a\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffffb".encode() + b"\xff\x80c")
    assert evaluate._begins(text).tolist() == [len(as_bytes(text[:i])) for i in range(len(text))]


def test_parallel_and_streaming_give_the_same_predictions(trained):
    data = (MULTIBYTE + TEXT[:100] + MULTIBYTE).encode()
    parallel = score(trained, data, 300, window=64)
    streaming = score_streaming(CharModel(trained), data, 300)
    assert parallel.characters == streaming.characters == 300
    assert parallel.bytes == streaming.bytes > 300
    assert (parallel.hits == streaming.hits).all()
    assert 0.05 < parallel.char_accuracy < 1  # the test would be empty otherwise
    assert parallel.bits_per_byte == pytest.approx(streaming.bits_per_byte, rel=1e-5)


MIXED = (MULTIBYTE[:60] + "é日🙂").encode() + "Grüße à la café".encode("latin-1") + bytes([
    0xE2, 0x82, 0x41, 0xED, 0xA0, 0x80, 0xC0, 0x80, 0xF5, 0, 0xFF]) + "日".encode()[:2]


def test_every_byte_is_scored_once_by_every_path(trained, monkeypatch):
    """Bytes of no UTF-8 too: each is a character that nothing predicts."""
    parallel = score(trained, MIXED, len(MIXED), window=16)
    streaming = score_streaming(CharModel(trained), MIXED, len(MIXED))
    inputs = torch.tensor([0x0A, *MIXED[:-1]])[None]
    with torch.no_grad():  # the definition
        log_p = torch.log_softmax(trained(inputs)[0][0].double(), -1)
    bits = -float(log_p[torch.arange(len(MIXED)), torch.tensor(list(MIXED))].mean()) / math.log(2)
    for found in (parallel, streaming):
        assert found.bytes == len(MIXED)
        assert found.bytes_not_utf8 == MIXED.decode("utf-8", "surrogateescape").encode(
            "utf-8", "replace").count(b"?")
        assert found.characters == len(MIXED.decode("utf-8", "surrogateescape"))
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert (parallel.hits == streaming.hits).all()
    assert bits_per_byte(trained, MIXED) == pytest.approx(bits, rel=1e-5)  # training's own


def _gone_nan() -> ByteLM:
    model = ByteLM(ModelConfig(d_model=8, n_layer=1, d_state=2))
    with torch.no_grad():
        model.norm_f.weight[0] = math.nan
    return model.eval()


@pytest.mark.parametrize("use", [
    lambda m: list(generate(m, "a", 3, temperature=0)), lambda m: list(generate(m, "a", 3)),
    lambda m: CharModel(m).greedy(), lambda m: CharModel(m).predict(), lambda m: score(m, b"abc"),
    lambda m: score_streaming(CharModel(m), b"abc"), lambda m: bits_per_byte(m, b"abc"),
    lambda m: list(generate(Mixture(m, count(b"abcabc", 2), 0.5), "a", 3, temperature=0))])
def test_probabilities_that_are_no_numbers_are_one_clear_line(use):
    with pytest.raises(NonFiniteError, match="gone nan"):
        use(_gone_nan())


def test_half_a_character_is_refused_by_the_stream(trained):
    for use in (CharModel(trained).observe, CharModel(trained).log_prob,
                lambda char: list(generate(trained, char, 1))):
        with pytest.raises(UserError, match="half a character"):
            use("\ud83d")


def test_a_text_read_in_one_go_scores_as_it_does_by_characters(trained, monkeypatch):
    """As on a GPU, where a launch takes many bytes; here they are fed one by one."""
    data = (MULTIBYTE + TEXT[:60]).encode()
    by_characters = score_streaming(CharModel(trained), data, 200)

    def read(stream: ByteStream, data: bytes) -> torch.Tensor:
        before = []
        for byte in data:
            before.append(stream.log_probs)
            stream.feed(bytes([byte]))
        return torch.stack(before)

    monkeypatch.setattr(ByteStream, "read", read)
    in_one_go = score_streaming(CharModel(trained), data, 200)
    assert (in_one_go.hits == by_characters.hits).all()
    assert in_one_go.bits_per_byte == pytest.approx(by_characters.bits_per_byte, rel=1e-6)
    assert (in_one_go.characters, in_one_go.bytes) == (200, by_characters.bytes)


def test_what_has_no_quick_way_is_not_read_in_one_go(trained):
    stream = ByteStream(trained)
    before = stream.log_probs
    assert stream.read(b"abc") is None
    assert stream.log_probs is before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_stream_that_was_pickled_goes_on_from_its_place(trained, copied):
    stream, chars = ByteStream(trained), CharModel(trained)
    stream.feed(b"the qu")
    for char in "é the":
        chars.observe(char)
    other, others = copied(stream), copied(chars)
    for one in (stream, other):
        one.feed(b"ick")
    assert torch.equal(stream.log_probs, other.log_probs)
    assert others.predict() == chars.predict()


def test_longer_characters_are_sometimes_predicted_and_right(trained):
    text = MULTIBYTE
    hits = score(trained, text.encode(), len(text)).hits
    assert any(hit and ord(char) >= 0x80 for hit, char in zip(hits, text, strict=True))


def test_windows_do_not_change_the_result(trained):
    data = MULTIBYTE.encode()[:200]
    a, b = byte_log_probs(trained, data, window=200), byte_log_probs(trained, data, window=7)
    assert torch.allclose(a, b, atol=1e-4)
    picked = a[torch.arange(200), torch.tensor(list(data))]
    assert bits_per_byte(trained, data) == pytest.approx(-picked.mean().item() / math.log(2), 1e-4)


def brute_force(model: ByteLM, prefix: str) -> dict[str, float]:
    """Every character's probability, by trying every UTF-8 sequence of up to three bytes."""
    base = ByteStream(model)
    base.feed(prefix.encode())
    first = base.log_probs.exp().tolist()
    found = {chr(b): first[b] for b in range(0x80)}
    leads = sorted(range(0xC2, 0xF0), key=lambda b: -first[b])[:3]
    for lead in leads:
        stream = base.fork()
        stream.feed(bytes([lead]))
        second = stream.log_probs.exp().tolist()
        for b in continuation_range(bytes([lead])):
            p = first[lead] * second[b]
            if lead < 0xE0:
                found[bytes([lead, b]).decode()] = p
            elif p > 1e-4:
                deeper = stream.fork()
                deeper.feed(bytes([b]))
                third = deeper.log_probs.exp().tolist()
                for c in range(0x80, 0xC0):
                    found[bytes([lead, b, c]).decode()] = p * third[c]
    return found


def test_predict_equals_brute_force(trained):
    for prefix in ("", "na", "caf", "costs 5 ", "日", "“d"):
        model = CharModel(trained)
        for char in prefix:
            model.observe(char)
        got, expected = model.predict(), brute_force(trained, prefix)
        best = max(expected, key=expected.__getitem__)
        assert max(got, key=got.__getitem__) == best, prefix
        for char, p in got.items():
            if char in expected:
                assert p == pytest.approx(expected[char], rel=1e-4, abs=1e-9)
        assert sum(got.values()) <= 1 + 1e-5
        assert all(0 <= p <= 1 for p in got.values())
        # Everything of weight is there.
        assert all(c in got for c, p in expected.items() if p > 0.0101)


def test_search_of_longer_characters_keeps_only_what_may_still_win(trained, monkeypatch):
    kept = []
    push = heapq.heappush
    monkeypatch.setattr(heapq, "heappush", lambda heap, item: kept.append(item) or push(heap, item))
    model, bounds = CharModel(trained), []
    for char in MULTIBYTE[:40]:
        best_ascii = max(list(model.predict().values())[:128])
        bounds += [(-negative, best_ascii) for negative, _ in kept]
        kept.clear()
        model.observe(char)
    assert 0 < len(bounds) < 1000  # 64 would be kept of each prefix that is asked about
    assert all(bound > min(best, model.detail) for bound, best in bounds)


def test_contract_predict_does_not_advance_and_reset_forgets(trained):
    model = CharModel(trained)
    first = model.predict()
    assert model.predict() == first
    for char in "naïve €":
        model.predict()
        model.observe(char)
    assert model.predict() != first
    plain = CharModel(trained)
    for char in "naïve €":  # never predicting must not matter
        plain.observe(char)
    assert plain.predict() == pytest.approx(model.predict(), rel=1e-4)
    model.reset()
    assert model.predict() == first


def test_insertion_order_breaks_ties():
    # A model whose logits are all equal: every byte has probability 1/256.
    model = ByteLM(SMALL)
    with torch.no_grad():
        model.norm_f.weight.zero_()
        model.norm_f.bias.zero_()
    chars = CharModel(model)
    distribution = chars.predict()
    assert next(iter(distribution)) == "\x00" == chars.greedy()
    assert list(distribution)[:128] == [chr(i) for i in range(128)]


def test_streaming_state_is_constant(trained):
    stream = ByteStream(trained)
    sizes = []
    for byte in (TEXT * 2)[:120].encode():
        stream.feed(bytes([byte]))
        sizes.append(stream.state_bytes())
    assert len(set(sizes[40:])) == 1


def test_forks_are_independent(trained):
    stream = ByteStream(trained)
    stream.feed(b"the ")
    before = stream.log_probs.clone()
    fork = stream.fork()
    fork.feed(b"quick")
    assert torch.equal(stream.log_probs, before)
    assert not torch.equal(fork.log_probs, before)


def test_generate_is_seeded_whole_characters_and_greedy_at_zero(trained):
    def text(**kw):
        return "".join(generate(trained, "naïve ", 60, **kw))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0) == text(temperature=0, seed=5)
    assert text(top_k=1, seed=3) == text(temperature=0)
    for tiny in (1e-3, 1e-30, 1e-40, 5e-324):  # what it divides may not become nan
        assert text(temperature=tiny) == text(temperature=0)
    assert all(len(piece) >= 1 for piece in generate(trained, "", 40))
    assert list(generate(trained, "x", 0)) == []


def test_sampling_filters():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    g = torch.Generator().manual_seed(0)

    def draws(**kw):
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | kw
        return {sample_byte(log_probs, generator=g, **options) for _ in range(300)}

    assert draws() == {0, 1, 2, 3}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_p=0.6) == {0, 1}
    assert draws(top_p=0.01) == {0}
    assert draws(temperature=0.0) == {0}
    beyond = torch.tensor([0.0] * 256 + [5.0])  # a symbol that is no byte
    assert sample_byte(beyond, 0.0, 0, 1.0, g) < 256 > sample_byte(beyond, 0.1, 0, 1.0, g)


def test_nothing_to_score_is_an_error(trained):
    for f in (lambda: score(trained, b""), lambda: bits_per_byte(trained, b""),
              lambda: score_streaming(CharModel(trained), b"")):
        with pytest.raises(UserError, match="nothing to score"):
            f()


@pytest.mark.parametrize("predicted_before", [False, True])
def test_log_prob_of_a_character_is_the_product_over_its_bytes(trained, predicted_before):
    model = CharModel(trained)
    if predicted_before:
        model.predict()
    stream = ByteStream(trained)
    expected = 0.0
    for byte in "日".encode():
        expected += stream.log_probs[byte].item()
        stream.feed(bytes([byte]))
    assert model.log_prob("日") == pytest.approx(expected, rel=1e-5)
