"""The kernel of any layers that stays for one byte after another, on a CPU as two small blocks."""

from __future__ import annotations

import copy
import ctypes
import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_stream_emulated import (  # noqa: F401  # fixtures among them
    CONFIGS,
    ODD,
    Streams,
    emulated,
    exact,
    made,
    streams,
)

from mambabyte.model import ByteLM
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.stream import hybrid
from mambabyte.ops.stream.server import make_room
from mambabyte.stream import ByteStream
from mambabyte.stream.engines import cuda as engines
from mambabyte.stream.engines.cuda import CudaEngine, CudaGuided
from mambabyte.task import guide, mixture
from mambabyte.task.guide import Guide, GuidedLM, Hint
from mambabyte.task.ngram import count

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("emulated"),
    pytest.mark.long,
]
SMALL = replace(ODD, layer_pattern="MLS", n_layer=3)


def engine_of(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> CudaEngine:
    monkeypatch.setattr(engines, "_is_plain", lambda model: False)
    return CudaEngine(model)


def wanted_of(model: ByteLM) -> Callable[[bytes], torch.Tensor]:
    double = exact(model)
    return lambda text: torch.log_softmax(double(torch.tensor([list(text)]))[0][0, -1], -1)


def fed(engine: CudaEngine, text: bytes, state: object) -> tuple[torch.Tensor, object]:
    for byte in text:
        found, state = engine(bytes([byte]), state)
    return found, state


@torch.inference_mode()
def test_a_byte_at_a_time_from_any_state(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    model = made(CONFIGS["all letters and extras"])
    engine, wanted = engine_of(model, monkeypatch), wanted_of(model)
    text = b"abcabdx"
    state, kept = None, []
    for i in range(5):
        found, state = engine(text[i : i + 1], state)
        kept.append(state)
        assert relative_rms(found, wanted(text[: i + 1])) < 3e-6
    stream = streams[-1]
    assert stream.launched == 1  # it stays
    # From an earlier state, whose rows of keys others have: the kernel copies them.
    found, branch = fed(engine, b"zy", kept[1])
    assert relative_rms(found, wanted(b"abzy")) < 3e-6
    found, state = engine(text[5:6], state)  # the other branch goes on in its own
    assert relative_rms(found, wanted(text[:6])) < 3e-6
    assert stream.launched == 1
    make_room(model.device)
    monkeypatch.setattr(hybrid, "PATIENCE", 10)
    for launched in (2, 3):
        found, _ = engine(b"q", branch)
        assert relative_rms(found, wanted(b"abzyq")) < 3e-6
        assert stream.launched == launched
        stream.running.join()  # it leaves by itself
    # Out of its memory, which stops it; in a launch of several bytes; and back.
    own = engine.for_model(state)
    assert stream.query()
    _, known = exact(model)(torch.tensor([list(text[:6])]))
    for mine, theirs in zip(own, known, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, torch.Tensor) and b.numel():
                assert relative_rms(a, b) < 3e-6
    rows, after = engine.each(b"12345", state)
    assert relative_rms(rows[-1], wanted(text[:6] + b"12345")) < 3e-6
    for start in (after, engine._states.from_model(own)):
        found, _ = engine(b"6", start)
        before = text[:6] + b"12345" if start is after else text[:6]
        assert relative_rms(found, wanted(before + b"6")) < 3e-6


@torch.inference_mode()
def test_drawing_between_bytes_and_two_models_in_turns(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    models = [made(SMALL), made(replace(SMALL, layer_pattern="AD", n_layer=2))]
    texts, all_wanted, streamed = [b"\0", b"\0"], [wanted_of(m) for m in models], []
    for model in models:
        monkeypatch.setattr(engines, "engine_for", lambda model: engine_of(model, monkeypatch))
        monkeypatch.setattr(ByteLM, "device", torch.device("cpu"))
        stream = ByteStream.__new__(ByteStream)
        stream._model, stream._engine = model, engine_of(model, monkeypatch)
        stream._state = None
        stream.feed(b"\0")
        streamed.append(stream)
    for step in range(4):
        for i, stream in enumerate(streamed):
            if step == 1:
                texts[i] += b"".join(stream.draw(5, temperature=0.0))
            if step == 2 and stream.guesses_itself:
                texts[i] += b"".join(
                    piece for piece, *_ in stream.guess_and_draw(texts[i], 5, temperature=0.0))
            stream.feed(bytes([65 + step]))
            texts[i] += bytes([65 + step])
            assert relative_rms(stream.log_probs, all_wanted[i](texts[i])) < 3e-6
    assert sum(s.launched for s in streams) >= 8


@torch.inference_mode()
def test_an_interrupted_byte_is_as_if_it_had_not_been_fed(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    model = made(SMALL)
    engine, wanted = engine_of(model, monkeypatch), wanted_of(model)
    _, state = fed(engine, b"ab", None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as broken:
            broken.setattr(engine.streamer._server, "read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine(b"x", state)
        found, _ = engine(b"c", state)
        assert relative_rms(found, wanted(b"abc")) < 3e-6


@torch.inference_mode()
def test_a_branch_that_is_gone_leaves_its_rows_to_others(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    model = made(replace(SMALL, layer_pattern="AM", n_layer=2))
    engine, wanted = engine_of(model, monkeypatch), wanted_of(model)
    text = b"abcdefghijkl"
    caches, cache = [], engine.streamer._cache
    monkeypatch.setattr(engine.streamer, "_cache",
                        lambda *sizes: caches.append(sizes) or cache(*sizes))
    state = None
    for i in range(len(text)):
        ahead = engine(b"?", state)[0]  # its state is gone at once
        assert relative_rms(ahead, wanted(text[:i] + b"?")) < 3e-6
        found, state = engine(text[i : i + 1], state)
        assert relative_rms(found, wanted(text[: i + 1])) < 3e-6
    assert len(caches) == 2 * 2  # of the state before the first byte alone: as it is, with room


@torch.inference_mode()
def test_looking_ahead_several_ways_never_stops_it(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(hybrid, "_LEAST_ROOM", 3)
    model = made(replace(SMALL, layer_pattern="AML", attention_window=6))
    engine, wanted = engine_of(model, monkeypatch), wanted_of(model)
    text, state = b"abcdefghi", None
    for i in range(len(text)):
        ahead = [engine(bytes([byte]), state) for byte in b"?!-"]  # whose states are all there
        for byte, (found, branch) in zip(b"?!-", ahead, strict=True):
            assert relative_rms(found, wanted(text[:i] + bytes([byte]))) < 3e-6
            found, _ = engine(b".", branch)
            assert relative_rms(found, wanted(text[:i] + bytes([byte]) + b".")) < 3e-6
        found, state = engine(text[i : i + 1], state if i else None)
        assert relative_rms(found, wanted(text[: i + 1])) < 3e-6
        if i == 1:  # states before the first byte come from outside, and stop it
            launched = streams[-1].launched
    assert streams[-1].launched == launched


@torch.inference_mode()
def test_a_guided_models_hints_come_with_the_order() -> None:
    torch.manual_seed(1)
    model = GuidedLM(replace(ODD, layer_pattern="MA", logit_softcap=5.0), n_kinds=7).eval()
    for p in model.parameters():
        p += 0.2 * torch.randn(p.shape)
    hint = Hint(torch.log_softmax(3 * torch.randn(4, 256), -1),
                *(torch.randint(7, (4,)).to(torch.uint8) for _ in range(2)))
    engine, data, state = CudaGuided(model.lm, model), b"abcd", None
    whole = Hint(*(x[None] for x in (hint.log_p, hint.best, hint.kind)))
    hidden, _ = model.lm.hidden(model.embedded(torch.tensor([list(data)]), whole))
    wanted = torch.log_softmax(model.combined(hidden, whole).double(), -1)[0]
    for i in range(4):
        def fill(*places: int, i: int = i) -> None:
            for at, x in zip(places, (hint.log_p, hint.best, hint.kind), strict=True):
                ctypes.memmove(at, x[i : i + 1].data_ptr(), x[:1].numel() * x.element_size())

        found, state = engine.guided_byte(data[i : i + 1], state, fill)
        assert relative_rms(found, wanted[i]) < 1e-5


@torch.inference_mode()
def test_what_is_around_a_guided_model_works_while_the_card_has_the_byte(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Guide(count(b"a text, and another text", 3))
    torch.manual_seed(1)
    model = GuidedLM(replace(ODD, layer_pattern="MA"), counts.n_kinds).eval()
    model.guide, order = counts, []
    network = CudaGuided(model.lm, model)
    monkeypatch.setattr(guide, "network_engine", lambda lm, guided: network)
    served = network._states.streamer._server
    send, read = served.order, served.read
    monkeypatch.setattr(served, "order", lambda *words: order.append("order") or send(*words))
    monkeypatch.setattr(served, "read", lambda: order.append("read") or read())
    engine, state = model.streamed(), None
    for data in (b"a", b"tex"):
        found, state = engine.beside(data, state, lambda: order.append("beside"))
    assert order == ["order", "beside", "read", *["order", "read"] * 2, "order", "beside", "read"]
    wanted, _ = model(torch.tensor([list(b"atex")]))
    assert relative_rms(found, torch.log_softmax(wanted[0, -1].double(), -1)) < 1e-5


@torch.inference_mode()
def test_it_leaves_when_its_exchanges_have_no_more_numbers(
    streams: Streams, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(hybrid, "_STAY", 2)
    model = made(SMALL)
    engine, wanted = engine_of(model, monkeypatch), wanted_of(model)
    found, _ = fed(engine, b"abcde", None)
    assert relative_rms(found, wanted(b"abcde")) < 3e-6
    assert streams[-1].launched == 3


@torch.inference_mode()
def test_a_mixture_counts_while_the_card_has_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(SMALL)
    engine, order = engine_of(model, monkeypatch), []
    streamed, served = mixture.stream_engine, engine.streamer._server
    monkeypatch.setattr(mixture, "stream_engine",
                        lambda part: engine if part is model else streamed(part))
    mixed = mixture.Mixture(model, count(b"a text, and another text", 4), 0.3)
    after, read = mixed.ngram.ngram.after, served.read
    monkeypatch.setattr(mixed.ngram.ngram, "after",
                        lambda last: order.append("counted") or after(last))
    monkeypatch.setattr(served, "read", lambda: order.append("read") or read())
    advance, state = mixed.streamed(), None
    for i, byte in enumerate(b"a tex"):
        found, state = advance(bytes([byte]), state)
        wanted, _ = mixed(torch.tensor([list(b"a tex"[: i + 1])]))
        assert relative_rms(found, wanted[0, -1].double()) < 3e-6
    assert order == ["counted", "read"] * 5


@torch.inference_mode()
def test_weights_on_the_device_go_with_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(made(SMALL), monkeypatch)
    gone = weakref.ref(engine.streamer)
    _, state = fed(engine, b"ab", None)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()
    assert copy.deepcopy(state).position == 2  # is there without
