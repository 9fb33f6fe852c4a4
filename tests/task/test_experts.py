"""Experts, their gate, and their mixture as a byte model."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mambabyte.config import get_preset
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.evaluate import score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, CharModel, Engine, stream_engine
from mambabyte.task.experts import (
    Context,
    ExpertLM,
    Experts,
    Matches,
    count_contexts,
    find_matches,
    fit_gate,
    gate,
)
from mambabyte.task.experts.contexts import PADDING, hashes, padded
from mambabyte.task.guide import Guide
from mambabyte.task.ngram import count
from mambabyte.train.smoke import smoke_configs
from tests.conftest import MULTIBYTE, TEXT

COUNTED = (TEXT[:900] + MULTIBYTE).encode()
OTHER = ("The lazy dog jumps naïve over the café. Over the café! " * 8).encode()
CONTEXTS = (Context(words=1), Context(words=2), Context(4, skip=2), Context(3, fold=True),
            Context(9))
SMOKE = smoke_configs(get_preset("mamba_byte").model, 64)[0]


def tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.fixture(scope="module")
def experts():
    text = tensor(COUNTED)
    return Experts(count(text, 5, None), (2, 4, 5), [count_contexts(text, c) for c in CONTEXTS],
                   Matches((3, 5, 9), reach=120, newest=4))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return ByteLM(SMOKE).eval()


def model_of(experts, network=None, engine=True):
    text = padded(tensor(OTHER[:200]))
    others = None if network is None else torch.full((160, 1, 256), 1 / 256)
    fitted, bits = fit_gate(experts, text, PADDING + 40, others, steps=20, hidden=8)
    assert bits < 6
    model = ExpertLM(experts, fitted, network).eval()
    if not engine:
        model._native, model._ready = None, True
    return model


@pytest.mark.parametrize(("wrong", "line"), [
    (lambda: Context(0), "length is 0: expected a whole number from 1 to 32"),
    (lambda: Context(skip=33), "skip is 33: expected a whole number from 0 to 32"),
    (lambda: Context(words=-1), "words is -1: expected a whole number from 0 to 32"),
    (lambda: Matches((3, 40)), r"lengths is \[3, 40\]: .* a whole number from 3 to 32"),
    (lambda: Matches((5, 4)), "in rising order"),
    (lambda: Matches(reach=0), "reach is 0"), (lambda: Matches(newest=0), "newest is 0"),
    (lambda: Matches(newest=1 << 16), "newest is 65536: expected a whole number from 1 to 65535")])
def test_what_c_has_no_room_for_is_refused(wrong, line):
    """In words, and also where Python leaves assertions out."""
    with pytest.raises(UserError, match=line):
        wrong()


def context_of(text: bytes, context: Context) -> bytes:
    """By hand: the bytes that ``context`` names at the end of ``text``."""
    text = text[: len(text) - context.skip]
    if context.words:
        letters = [bytes([b]).isalpha() or b >= 128 for b in text]
        gaps = [i for i, letter in enumerate(letters) if not letter]
        text = text[gaps[-context.words] + 1 :]
    text = text[max(0, len(text) - context.length) :]
    return bytes(b + 32 if context.fold and 65 <= b <= 90 else b for b in text)


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_equal_contexts_have_equal_hashes_and_no_others(context, monkeypatch):
    whole = padded(tensor(COUNTED))
    of_each: dict[int, set[bytes]] = {}
    for i, value in enumerate(hashes(whole, context).tolist()):
        here = context_of(bytes(whole[: PADDING + i].tolist()), context)
        of_each.setdefault(value, set()).add(here)
    assert all(len(names) == 1 for names in of_each.values())
    assert len(of_each) == len({name for names in of_each.values() for name in names}) > 20
    monkeypatch.setattr("mambabyte.task.experts.contexts._CHUNK", 100)
    assert set(hashes(whole, context).tolist()) == set(of_each)


def test_matches_are_those_of_the_definition():
    wanted = Matches((3, 4, 6), reach=60, newest=2)
    text = np.random.default_rng(0).integers(97, 100, 400).astype(np.uint8)
    whole = padded(torch.from_numpy(text))
    found = find_matches(whole, PADDING + 5, PADDING + 401, wanted)
    rows = iter(zip(*(t.tolist() for t in vars(found).values()), strict=True))
    for i in range(5, 401):
        history = bytes(text[max(0, i - 60) : i])
        for kind, length in enumerate(wanted.lengths):
            places = [p for p in range(len(history) - 1, length - 1, -1)
                      if history[p - length : p] == history[-length:]][:2]
            for byte, times in sorted(Counter(history[p] for p in places).items()):
                assert next(rows) == (i - 5, kind, byte, times)
    assert next(rows, None) is None
    nothing = find_matches(whole, PADDING, PADDING + 9, Matches(()))
    assert len(nothing.row) == 0


@pytest.mark.parametrize("with_network", [False, True])
def test_one_pass_pieces_and_a_stream_agree(experts, networks, with_network):
    model = model_of(experts, networks if with_network else None)
    tokens = tensor(OTHER)[None].long()
    with torch.no_grad():
        whole, _ = model(tokens)
        first, state = model(tokens[:, :130])
        second, _ = model(tokens[:, 130:], state)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(1, len(OTHER)), atol=1e-5)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-4)
    advance, state = model.streamed(), None
    for i, byte in enumerate(OTHER[:200]):
        log_p, state = advance(bytes([byte]), state)
        assert torch.allclose(log_p, whole[0, i], atol=1e-3), i


def test_the_engine_is_the_definition(experts, networks):
    tokens = tensor(OTHER)[None].long()
    for network in (None, networks):
        fast, slow = model_of(experts, network), model_of(experts, network, engine=False)
        with torch.no_grad():
            assert torch.allclose(fast(tokens)[0], slow(tokens)[0], atol=1e-4)
    text = padded(tensor(OTHER))
    engine = gate.native_experts(experts, 0)
    if engine is None:
        pytest.skip("no C compiler")
    for a, b in zip(engine.read(text.numpy(), PADDING), gate.read(experts, text, PADDING, None),
                    strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_used_model_says_the_same_by_tables_of_its_own(experts, networks, copied):
    model = model_of(replace(experts, ngram=copy.deepcopy(experts.ngram)), networks)
    stream = ByteStream(model)
    stream.feed(OTHER[:50])
    other = copied(stream)
    stream.feed(OTHER[50:60])
    for level in model.experts.ngram.levels:
        level.count.zero_()
    other.feed(OTHER[50:60])
    assert torch.allclose(other.log_probs, stream.log_probs, atol=1e-5)


def test_looking_up_and_mixing_are_a_pass_in_two_halves(experts):
    engine = model_of(experts, ByteLM(SMOKE)).on_host()
    if engine is None:
        pytest.skip("no C compiler")
    text = padded(tensor(OTHER)).numpy()
    others = torch.softmax(torch.randn(len(OTHER) + 1, 1, 256), -1)
    whole = engine.log_p(text, PADDING, len(text) + 1, others)
    for i in range(len(OTHER) + 1):
        found = engine.look_up(text[: PADDING + i].tobytes())
        assert torch.equal(engine.mix(found, others[i]), whole[i])


def test_a_stream_looks_up_while_the_card_has_the_byte(experts, networks, monkeypatch):
    model, order = model_of(experts, networks), []
    native, network = model.on_host(), stream_engine(networks)
    if native is None:
        pytest.skip("no C compiler")

    class Card(Engine):
        def __call__(self, data, state):
            order.append("waited for")
            return network(data, state)

        def beside(self, data, state, meanwhile):
            order.append("sent")
            meanwhile()
            order.append("answered")
            return network(data, state)

    monkeypatch.setattr("mambabyte.task.experts.model.stream_engine", lambda _: Card())
    look_up = native.look_up
    monkeypatch.setattr(native, "look_up", lambda text: order.append("looked up") or look_up(text))
    stream = ByteStream(model)
    stream.feed(b"a")
    assert order == ["sent", "looked up", "answered"] * 2


def test_what_is_out_of_reach_is_cut_off_now_and_then(experts, monkeypatch):
    model, found = model_of(experts), []
    for spare in (4096, 7, 0):
        monkeypatch.setattr("mambabyte.task.experts.model._SPARE", spare)
        stream = ByteStream(model)
        found.append([])
        for byte in OTHER:
            stream.feed(bytes([byte]))
            found[-1].append(stream.log_probs)
        assert stream.state_bytes() <= PADDING + model.reach + spare or spare == 4096
        _, last = stream.kept.state
        assert bytes(last[0].tolist()) == (b"\n" + OTHER)[-model.reach :]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_guide_and_experts_have_one_n_gram_model_on_the_host(experts, monkeypatch):
    ngram = count(tensor(COUNTED), 5, None)
    guide, counted = Guide(ngram), replace(experts, ngram=ngram)
    monkeypatch.setattr(type(ngram), "device", torch.device("cuda"))
    assert guide.near.ngram is counted.near.ngram is not ngram


@pytest.mark.parametrize("engine", [False, True])
def test_a_gate_that_is_nan_is_said(experts, engine):
    model = model_of(experts, engine=False)
    with torch.no_grad():
        model.gate.outer.bias[1] = torch.nan
    model._ready = not engine
    with pytest.raises(NonFiniteError, match="gone nan"):
        ByteStream(model)


def test_experts_are_distributions_and_say_how_often(experts):
    text = padded(tensor(OTHER))
    pieces = list(experts.distributions(text, PADDING, rows=100))
    p, evidence = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    assert p.shape == (len(OTHER) + 1, len(experts.names), 256)
    assert torch.allclose(p.sum(-1), torch.ones(p.shape[:2], dtype=p.dtype))
    assert (p > 0).all()
    assert (evidence[..., 1] <= evidence[..., 0]).all()
    assert evidence[-1, -1, 0] == 1  # 120 bytes of history: the sentence before, once


def test_scoring_in_windows_is_streaming(experts):
    model = model_of(experts)
    assert len(MULTIBYTE) > 100
    together = score(model, COUNTED[-300:])
    streamed = score_streaming(CharModel(model), COUNTED[-300:])
    assert together.bits_per_byte == pytest.approx(streamed.bits_per_byte, rel=1e-5)
    assert (together.hits == streamed.hits).all()


def test_a_gate_follows_the_expert_that_knows(experts):
    """Of text with the answer as one more expert, nearly all weight goes there."""
    text = padded(tensor(OTHER[:300]))
    answers = torch.full((260, 1, 256), 0.01 / 255)
    answers[torch.arange(260), 0, text[PADDING + 40 :].long()] = 0.99
    _, bits = fit_gate(experts, text, PADDING + 40, answers, steps=150, hidden=8, lr=0.05)
    alone, worse = fit_gate(experts, text, PADDING + 40, steps=150, hidden=8, lr=0.05)
    assert bits < 0.05 < worse
    again, same = fit_gate(experts, text, PADDING + 40, steps=150, hidden=8, lr=0.05)
    assert same == worse
    assert torch.equal(again.inner.weight, alone.inner.weight)


@pytest.mark.parametrize("data", [b"a" * 300, bytes(300), bytes(range(256)), b"\xff\xfe" * 150])
def test_texts_of_few_or_of_all_bytes(data):
    text = tensor(data)
    experts = Experts(count(text[:200], 6, None), (1, 6), [count_contexts(text[:200], c)
                                                           for c in CONTEXTS], Matches())
    fitted, bits = fit_gate(experts, padded(text), PADDING + 200, steps=10, hidden=4)
    log_p, _ = ExpertLM(experts, fitted).eval()(text[None].long())
    assert np.isfinite(bits)
    assert log_p.isfinite().all()
    with pytest.raises(UserError, match="from 0 to 256"):
        ExpertLM(experts, fitted)(torch.tensor([[0, 256]]))


def test_a_stream_of_any_bytes_branches(experts):
    model = model_of(experts)
    stream = ByteStream(model)
    stream.feed(bytes(range(256)) * 2)
    other = stream.fork()
    other.feed(b"\xff\x00")
    before = stream.log_probs.clone()
    stream.feed(b"a")
    again = ByteStream(model)
    again.feed(bytes(range(256)) * 2)
    assert torch.equal(again.log_probs, before)
    assert other.log_probs.isfinite().all()
