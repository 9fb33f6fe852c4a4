"""Guided and mixed systems stream through the engine of their network, with look-ups in C."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mambabyte.config import PRESETS, ModelConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.stream import ByteModel, ByteStream, stream_engine
from mambabyte.stream.engines import cpu as native_model
from mambabyte.stream.engines import cuda as cuda_model
from mambabyte.stream.engines.base import TorchEngine
from mambabyte.stream.engines.layout import is_known
from mambabyte.task import ngram_native
from mambabyte.task.guide import Guide, GuidedLM
from mambabyte.task.mixture import Mixture, NgramLM
from mambabyte.task.ngram import count

TEXT = "a naïve café, a café, a cave; a naïve café … ".encode() * 3
SMALL = ModelConfig(d_model=24, n_layer=2, layer_pattern="MA", n_head=4, n_kv_head=2,
                    attention_window=9, embed_std=0.5, mlp_ratio=1.0)  # fmt: skip


def _system(name: str) -> ByteModel:
    torch.manual_seed(0)
    ngram = count(TEXT, 5, 0.7)
    if name == "ngram":
        return NgramLM(ngram)
    if name == "mixture":
        return Mixture(ByteLM(SMALL), ngram, 0.3).eval()
    guide = Guide(ngram)
    model = GuidedLM(SMALL, guide.n_kinds)
    model.guide = guide
    with torch.no_grad():
        model.gate.weight.normal_()
    return model.eval()


@pytest.mark.parametrize("name", ["ngram", "mixture", "guided"])
def test_streams_as_it_scores_in_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _system(name)
    calls: list[int] = []
    run = native_model.NativeModel._run
    monkeypatch.setattr(native_model.NativeModel, "_run",
                        lambda self, length, *rest, **more: calls.append(length) or run(
                            self, length, *rest, **more))
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([list(TEXT)]))[0][0].float(), -1)
        _, state = model(torch.tensor([list(TEXT[:20])]))
    advance, rows = stream_engine(model), []
    for byte in TEXT[20:]:  # from a state of the parallel model on
        row, state = advance(bytes([byte]), state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows), wanted[20:], rtol=1e-4, atol=1e-4)
    if name != "ngram" and native_model._library() is not None:
        assert calls == [1] * len(rows)
    with torch.inference_mode():  # and back to that
        again, _ = model(torch.tensor([[TEXT[0]]]), advance.for_model(state))
    forward, _ = advance(TEXT[:1], state)
    torch.testing.assert_close(torch.log_softmax(again[0, 0].float(), -1), forward, rtol=1e-4,
                               atol=1e-4)
    last, _ = advance(TEXT[20:], model(torch.tensor([list(TEXT[:20])]))[1])  # and in one piece
    torch.testing.assert_close(last, wanted[-1], rtol=1e-4, atol=1e-4)


class Wrapped(nn.Module):
    """A model of somebody else around a ByteLM, whose engine counts what it is given."""

    def __init__(self, inner: ByteLM, engine: object) -> None:
        super().__init__()
        self.inner, self.engine = inner, engine
        self.device = torch.device("cpu")

    def forward(self, tokens: torch.Tensor, state: object = None) -> tuple:
        return self.inner(tokens, state)

    def streamed(self) -> object:
        return self.engine


class Counting(TorchEngine):
    fed = 0

    def __call__(self, data: bytes, state: object) -> tuple:
        self.fed += len(data)
        return super().__call__(data, state)


def test_an_engine_of_somebody_else() -> None:
    torch.manual_seed(0)
    inner = ByteLM(SMALL).eval()
    engine = Counting(inner)
    stream, plain = ByteStream(Wrapped(inner, engine)), ByteStream(inner)
    for s in (stream, plain):
        s.feed(b"abc")
    torch.testing.assert_close(stream.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
    assert engine.fed == 4  # and the byte before the first
    assert b"".join(stream.draw(5, temperature=0)) == b"".join(plain.draw(5, temperature=0))
    assert not stream.draws_itself
    assert not stream.guesses_itself
    with pytest.raises(UserError, match=r"streamed\(\) of Wrapped returned .*expected an Engine"):
        ByteStream(Wrapped(inner, lambda data, state: (torch.zeros(256), None)))


def test_a_branch_of_a_guided_stream_does_not_change_the_other() -> None:
    stream = ByteStream(_system("guided"))
    stream.feed(b"a na")
    fork = stream.fork()
    alone = ByteStream(_system("guided"))
    alone.feed(b"a na")
    for here, there in zip(b"xyz" * 9, "ïve café a".encode() * 9, strict=False):
        fork.feed(bytes([here]))
        stream.feed(bytes([there]))
        alone.feed(bytes([there]))
        assert torch.equal(stream.log_probs, alone.log_probs)


def test_a_layer_that_no_engine_has_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(MambaMixer):
        pass

    model = ByteLM(replace(SMALL, layer_pattern="M"), {"M": Own}).eval()
    native_model.say_foreign.cache_clear()
    for _ in range(2):
        ByteStream(model)
    assert [r.getMessage() for r in caplog.records] == [
        "note: Own runs through torch, byte after byte: no engine has that layer"]


@pytest.mark.parametrize("name", PRESETS)
def test_engines_know_all_parts_of_every_preset(name: str) -> None:
    with torch.device("meta"):
        model = ByteLM(PRESETS[name].model)
        assert is_known(model)
        model.norm_f = nn.Sequential(model.norm_f)  # a class that is known, in another place
    assert not is_known(model)


@pytest.mark.skipif(ngram_native.library() is None, reason="no C compiler")
def test_looking_up_in_c_equals_torch() -> None:
    ngram = count(TEXT + bytes(range(256)), 6, 0.6)
    guide = Guide(ngram)
    contexts = torch.cat([ngram.contexts(TEXT), torch.randint(256, (200, 5))])
    found = guide.hint(contexts)
    alone = ngram.log_probs_after(contexts)
    for model in (ngram, guide):
        model.__dict__["_native"] = None
    exact = guide.hint(contexts)
    torch.testing.assert_close(found.log_p, exact.log_p, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, ngram.log_probs_after(contexts), rtol=0, atol=1e-5)
    assert torch.equal(found.best, exact.best)
    assert torch.equal(found.kind, exact.kind)
    assert len(found.kind.unique()) > 5


@pytest.mark.skipif(native_model._library() is None, reason="no C compiler")
@pytest.mark.parametrize(("name", "engine"), [
    ("ngram", "tables on the host"), ("mixture", "model.c; tables on the host"),
    ("guided", "model.c")])
def test_a_stream_says_what_computes_it(name: str, engine: str) -> None:
    assert ByteStream(_system(name)).engine == engine
    assert ByteStream(ByteLM(SMALL).double().eval()).engine == "torch, a call a byte"


@pytest.mark.skipif(native_model._library() is None, reason="no C compiler")
@pytest.mark.parametrize("pattern", ["R", "RA"])
def test_what_no_kernel_of_a_card_has_streams_on_the_host(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ByteLM(replace(SMALL, layer_pattern=pattern, ssd_head_dim=8, ssd_d_state=8)).eval()
    longer: list[int] = []
    advance, call = TorchEngine(model), TorchEngine.__call__
    monkeypatch.setattr(TorchEngine, "__call__", lambda self, data, state: longer.append(
        len(data)) or call(self, data, state))
    host = cuda_model._without_kernel(model, "no kernel")
    assert host.name == "model.c, on the host: no kernel"
    state, wanted = None, None
    for data in (b"a", b"bc", TEXT[:40], b"d", b"e"):  # a long one goes in parallel, on the card
        log_p, state = host(data, state)
        expected, wanted = advance(data, wanted)
        torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-5)
    assert longer.count(40) == 2
    assert longer.count(1) == 3  # those of the reference
    rows, after = host.ahead(b"fgh", state)
    expected, wanted = advance(b"fg", wanted)
    torch.testing.assert_close(rows[1], expected, rtol=1e-4, atol=1e-5)
    log_p, _ = host(b"x", after(2))
    torch.testing.assert_close(log_p, advance(b"x", wanted)[0], rtol=1e-4, atol=1e-5)
