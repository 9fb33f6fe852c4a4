"""A whole model of any layers in one kernel on the GPU, against the float64 definition."""

from __future__ import annotations

import ctypes
import functools
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from mambabyte.config import PRESETS, ModelConfig
from mambabyte.evaluate import byte_log_probs
from mambabyte.model import ByteLM
from mambabyte.ops.stream.grid.memory import ServedHybrid
from mambabyte.ops.stream.hybrid import HybridState
from mambabyte.ops.stream.server import Server
from mambabyte.stream import ByteStream, stream_engine
from mambabyte.stream.engines import cuda as cuda_model
from mambabyte.stream.engines.cuda import CudaEngine, CudaGuided, CudaNetwork
from mambabyte.task.experts import Context, ExpertLM, Experts, Gate, Matches, count_contexts
from mambabyte.task.guide import Guide, GuidedLM, Hint
from mambabyte.task.ngram import count
from tests.gpu.test_gpu_stream import exact, made, random_bytes, relative_rms

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SMALL = ModelConfig(d_model=132, n_layer=2, d_state=5, d_conv=3, n_head=6, n_kv_head=2,
                    attention_window=70, local_window=3, ssd_head_dim=24, ssd_groups=1,
                    ssd_d_state=20, delta_head_dim=33)  # fmt: skip
CONFIGS = {
    "all letters and extras": replace(
        SMALL, layer_pattern="MALSRDK", n_layer=8, linear_bias=True, ssm_bias=True,
        ssd_norm_eps=0.01, block_scales=True, residual_mix=True, unet_skips=True, qk_gain=1.5,
        qk_norm=True, embed_norm=True, embed_norm_gain=True, mlp_ratio=1.3, tied_head=False,
        logit_softcap=15.0),
    "Mamba-2 and the delta rule": ModelConfig(
        d_model=128, n_layer=3, layer_pattern="SDK", norm="rms", norm_eps=1e-5, mlp_ratio=2.0),
    "attention alone": replace(  # whose passes have four bytes
        SMALL, layer_pattern="ALA", n_layer=3, unet_skips=True, qk_norm=True, mlp_ratio=1.3),
    "full step size": replace(SMALL, layer_pattern="MA", dt_rank="full", rope_fraction=0.5),
    # float64 has another epsilon in norms without one: small embeddings would differ by that
    **{name: replace(PRESETS[name].model, embed_std=1.0)
       for name in ("nano_ssm_1_1", "hybrid_3_1", "modded_nanogpt")},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_fed_drawn_embedded_and_handed_over(name: str) -> None:
    model = made(CONFIGS[name])
    assert cuda_model.unsupported(model) == ""
    advance = stream_engine(model)
    assert isinstance(advance, CudaEngine)
    streamer, tokens = advance.streamer, random_bytes(3, 90)
    wanted, states = exact(model, tokens)
    found, state = streamer.feed(tokens[:, :50], streamer.new_state(3), all_positions=True)
    assert relative_rms(found, wanted[:, :50]) < 5e-6
    last, end = streamer.feed(tokens[:, 50:], state)
    assert relative_rms(last, wanted[:, -1]) < 5e-6
    drawn, after, _ = streamer.draw(found[:, -1], state, 30, temperature=0.0)
    both, _ = exact(model, torch.cat([tokens[:, :50], drawn], 1))
    steps = both[:, 49:-1]
    picked = steps.gather(-1, drawn.cpu().long()[..., None])[..., 0]
    assert float((steps.amax(-1) - picked).max()) < 1e-4
    assert relative_rms(after, both[:, -1]) < 5e-6
    for mine, theirs in zip(advance.for_model(end), states, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, torch.Tensor) and b.numel():
                assert relative_rms(a, b) < 1e-5
    # One byte at a time by the mailbox, from a state of the model's own; and embedded bytes.
    with torch.inference_mode():
        _, parallel = model(tokens[:1, :40].long())
        _, hidden_state = model.hidden(model.embedding(tokens[:1, :40].long()))
    stepped = parallel
    for byte in tokens[0, 40:60].tolist():
        row, stepped = advance(bytes([byte]), stepped)
    assert relative_rms(row, wanted[0, 59]) < 1e-5
    with torch.inference_mode():
        x = model.embedding(tokens[:1, 40:48].long())
        theirs, _ = model.hidden(x, hidden_state)
        mine, _ = CudaNetwork(model)(x, hidden_state)
    assert relative_rms(mine, theirs.double().cpu()) < 1e-5


def test_branches_do_not_change_each_other_and_the_cache_is_bounded() -> None:
    model = made(replace(SMALL, layer_pattern="AL", n_layer=2))
    stream, alone = ByteStream(model), ByteStream(model)
    sizes = []
    for i in range(600):
        fork = stream.fork()
        fork.feed(b"x")
        stream.feed(bytes([i % 251]))
        alone.feed(bytes([i % 251]))
        # Rows of a copied cache lie with other blocks, which add up in another order.
        assert relative_rms(stream.log_probs, alone.log_probs.double()) < 1e-6
        sizes.append(stream.state_bytes())
    assert max(sizes[300:]) == max(sizes[:300])


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_that_check_guesses_draw_the_same_bytes(name: str) -> None:
    model = made(CONFIGS[name])
    stream = ByteStream(model)
    stream.feed(bytes(random_bytes(1, 80)[0].tolist()))
    stream.fork().feed(b"x")  # has the rows behind the stream's: all others copy, to equal places
    for how in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        plain, guessing = stream.fork(), stream.fork()
        text = b"".join(plain.draw(90, **how))
        wrong = bytes(b ^ (i % 13 == 12) for i, b in enumerate(text))
        for past in (b"ab" + text + b"ab", b"ab" + wrong + b"ab", b""):
            guessing = stream.fork()
            pieces, passes, guessed = zip(*guessing.guess_and_draw(past, 90, **how), strict=True)
            assert b"".join(pieces) == text
            assert 90 - sum(guessed) <= sum(passes) <= 90
            if text in past:
                assert sum(passes) < 40
            assert relative_rms(guessing.log_probs, plain.log_probs.double()) < 1e-6
            # What follows is drawn from the states that the two have.
            assert list(guessing.fork().draw(9, **how)) == list(plain.fork().draw(9, **how))


SERVED = replace(SMALL, layer_pattern="MALSDK", n_layer=6, norm="rms", norm_eps=1e-5)


def test_a_kernel_that_stays_goes_on_from_any_state_and_leaves_by_itself() -> None:
    model = made(SERVED)
    data = bytes(random_bytes(1, 200)[0].tolist())
    wanted, _ = exact(model, torch.tensor([list(data)]))
    advance = stream_engine(model)
    assert advance.name == "hybrid.cu"
    state, states = None, []
    for i in range(len(data)):
        if i in (9, 150):
            torch.cuda.synchronize()  # it has left: another one goes on
        found, state = advance(data[i : i + 1], state)
        states.append(state)
        assert relative_rms(found, wanted[0, i]) < 1e-5
    assert isinstance(state, ServedHybrid)
    again, _ = advance(data[5:6], states[4])
    assert relative_rms(again, wanted[0, 5]) < 1e-5
    whole, _ = advance(data[5:], states[4])  # in one launch, from a copy
    assert relative_rms(whole, wanted[0, -1]) < 1e-5
    moved = pickle.loads(pickle.dumps(states[120]))
    assert type(moved) is HybridState
    found, _ = advance(data[121:122], moved)
    assert relative_rms(found, wanted[0, 121]) < 1e-5
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):  # where others' work is, makes no difference
        found, _ = advance(data[31:32], states[30])
        kept = advance.for_model(states[30])
    torch.cuda.synchronize()
    assert relative_rms(found, wanted[0, 31]) < 1e-5
    _, known = exact(model, torch.tensor([list(data[:31])]))
    for mine, theirs in zip(kept, known, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, torch.Tensor) and b.numel():
                assert relative_rms(a, b) < 1e-5


def test_models_in_turns_with_scores_and_drawing_between() -> None:
    models = [made(SERVED), made(replace(SMALL, layer_pattern="AL", n_layer=2)),
              made(PRESETS["smoke"].model)]
    streams, texts = [ByteStream(model) for model in models], [b"", b"", b""]
    for step in range(40):
        for i, (model, stream) in enumerate(zip(models, streams, strict=True)):
            stream.feed(bytes([65 + step]))
            texts[i] += bytes([65 + step])
            if step == 20 + i:
                texts[i] += b"".join(stream.draw(30, seed=1))
            if step == 30 + i:
                byte_log_probs(models[i - 1], texts[i - 1])
                torch.randn(2000, 2000, device="cuda").softmax(-1).sum().item()
            if step % 13 == 12:
                read = ByteStream(model)
                assert read.read(texts[i]) is not None
                assert relative_rms(stream.log_probs, read.log_probs.double()) < 1e-5


def test_threads_feed_models_that_each_take_the_whole_device() -> None:
    models = [made(SERVED), made(replace(SMALL, layer_pattern="AL", n_layer=2)),
              made(PRESETS["smoke"].model)]
    text = bytes(random_bytes(1, 150)[0].tolist())
    alone = []
    for model in models:
        stream = ByteStream(model)
        for byte in text:
            stream.feed(bytes([byte]))
        alone.append(stream.log_probs)
    found = {}

    def feed(i: int, model: ByteLM) -> None:
        stream = ByteStream(model)
        for byte in text:
            stream.feed(bytes([byte]))
        found[i] = stream.log_probs

    threads = [threading.Thread(target=feed, args=(i, models[i % 3])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(relative_rms(found[i], alone[i % 3].double()) < 1e-6 for i in range(6))


def test_hints_of_a_guided_model_come_with_its_bytes() -> None:
    torch.manual_seed(1)
    model = GuidedLM(replace(SMALL, layer_pattern="MA"), n_kinds=7).cuda().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    hint = Hint(torch.log_softmax(3 * torch.randn(60, 256), -1),
                *(torch.randint(7, (60,)).to(torch.uint8) for _ in range(2)))
    engine, state, data = CudaGuided(model.lm, model), None, random_bytes(1, 60)
    beside: list[int] = []
    with torch.inference_mode():
        whole = Hint(*(x[None].cuda() for x in (hint.log_p, hint.best, hint.kind)))
        hidden, _ = model.lm.hidden(model.embedded(data.long(), whole))
        wanted = torch.log_softmax(model.combined(hidden, whole).double(), -1)[0].cpu()
    for i, byte in enumerate(data[0].tolist()):
        def fill(*places: int, i: int = i) -> None:
            for at, x in zip(places, (hint.log_p, hint.best, hint.kind), strict=True):
                ctypes.memmove(at, x[i : i + 1].data_ptr(), x[:1].numel() * x.element_size())

        found, state = engine.guided_byte(
            bytes([byte]), state, fill, functools.partial(beside.append, byte))
        assert relative_rms(found, wanted[i]) < 2e-5
    assert beside == data[0].tolist()


def test_experts_are_looked_up_beside_a_guided_models_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"a text, and another text: then one more text, and no other. " * 3
    text = torch.tensor(list(data), dtype=torch.uint8, device="cuda")
    torch.manual_seed(1)
    guide = Guide(count(text, 4, None))
    network = GuidedLM(replace(SMALL, layer_pattern="MA"), guide.n_kinds).cuda()
    network.guide = guide
    experts = Experts(guide.ngram, (2, 4), [count_contexts(text, Context(words=1))], Matches())
    model = ExpertLM(experts, Gate(len(experts.names) + 1).cuda(), network).eval()
    with torch.inference_mode():
        wanted, _ = model(text[None].long())
    native, order = model.on_host(), []
    assert native is not None
    for place, name in ((native, "look_up"), (Server, "order"), (Server, "read")):
        of = getattr(place, name)

        def told(*given: Any, name: str = name, of: Any = of) -> Any:
            order.append(name)
            return of(*given)

        monkeypatch.setattr(place, name, told)
    engine, state = stream_engine(model), None
    for i in range(len(data)):
        found, state = engine(data[i : i + 1], state)
        assert relative_rms(found, wanted[0, i].double().cpu()) < 2e-5
    assert order == ["order", "look_up", "read"] * len(data)
