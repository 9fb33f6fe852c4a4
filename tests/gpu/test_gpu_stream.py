"""A whole model in one kernel on the GPU, against the float64 definition and the model itself."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mambabyte.config import PRESETS, ModelConfig
from mambabyte.evaluate import byte_log_probs, score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.ops.stream.cuda import StreamState
from mambabyte.ops.stream.server import Served
from mambabyte.stream import ByteStream, CharModel, generate, sample_byte, stream_engine
from mambabyte.stream.engines import cuda as cuda_model
from mambabyte.stream.engines.cuda import CudaEngine

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BYTE = PRESETS["mamba_byte"].model
CONFIGS = {
    "mamba_byte": BYTE,
    "smoke": PRESETS["smoke"].model,
    "sizes that divide nothing": replace(
        BYTE, d_model=100, n_layer=3, d_state=5, d_conv=3, norm="rms", tied_head=False,
        logit_softcap=15.0),
    "one layer, wide states": replace(BYTE, d_model=64, n_layer=1, d_state=40, dt_rank=70),
    "an MLP and a norm at the stem": replace(
        BYTE, d_model=128, n_layer=2, mlp_ratio=2.75, norm="rms_plain", embed_norm=True,
        mlp_activation="gelu"),
    "larger than shared memory": replace(
        PRESETS["nano_ssm"].model, n_layer=3, mlp_activation="silu", norm="rms_plain",
        embed_norm_gain=False, linear_bias=False),
}


def made(config: ModelConfig) -> ByteLM:
    """A model in which nothing is at a value that would hide a mistake."""
    torch.manual_seed(1)
    model = ByteLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith(("conv1d.bias", ".D")):
                p.add_(0.3 * torch.randn_like(p))
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
            if name in ("embedding.weight", "head.weight"):
                p.mul_(3 if config.tied_head else 10)  # tied ones would only repeat the byte
    return model.cuda().eval()


def exact(model: ByteLM, tokens: Tensor, state=None) -> tuple[Tensor, list]:
    """Log-probabilities and states in float64 by the definition of the scan."""
    double = ByteLM(replace(model.config, scan_form="recurrent")).double().eval()
    double.load_state_dict({k: v.double().cpu() for k, v in model.state_dict().items()})
    with torch.no_grad():
        logits, state = double(tokens.cpu().long(), state)
    return torch.log_softmax(logits, -1), state


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted).norm() / wanted.norm())


def streamer_of(model: ByteLM):
    assert cuda_model.unsupported(model) == ""
    advance = stream_engine(model)
    assert isinstance(advance, CudaEngine)
    return advance.streamer


def random_bytes(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, length), generator=generator).to(torch.uint8).cuda()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 11])
def test_bytes_given(name: str, batch: int) -> None:
    model = made(CONFIGS[name])
    streamer, tokens = streamer_of(model), random_bytes(batch, 40)
    log_probs, state = streamer.feed(tokens, streamer.new_state(batch), all_positions=True)
    wanted, states = exact(model, tokens)
    assert relative_rms(log_probs, wanted) < 3e-6
    assert relative_rms(state.tail, torch.stack([s.conv_state for s in states])) < 3e-6
    assert relative_rms(state.ssm, torch.stack([s.ssm_state for s in states])) < 3e-6
    # In pieces, bit for bit.
    first, middle = streamer.feed(tokens[:, :17], streamer.new_state(batch))
    last, end = streamer.feed(tokens[:, 17:], middle)
    assert torch.equal(first, log_probs[:, 16])
    assert torch.equal(last, log_probs[:, -1])
    assert torch.equal(end.ssm, state.ssm)
    assert torch.equal(end.tail, state.tail)


@pytest.mark.parametrize("batch", [9, 20, 40, 300])
def test_many_streams_are_each_as_one(batch: int) -> None:
    streamer, tokens = streamer_of(made(BYTE)), random_bytes(batch, 12)
    log_probs, state = streamer.feed(tokens, streamer.new_state(batch))
    for i in (0, batch // 2, batch - 1):
        alone, end = streamer.feed(tokens[i : i + 1], streamer.new_state(1))
        assert relative_rms(log_probs[i], alone[0].double().cpu()) < 1e-6
        assert relative_rms(state.ssm[:, i], end.ssm[:, 0].double().cpu()) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_bytes_are_the_most_probable(name: str) -> None:
    model = made(CONFIGS[name])
    streamer, tokens = streamer_of(model), random_bytes(2, 20)
    before, state = streamer.feed(tokens, streamer.new_state(2))
    drawn, after, _ = streamer.draw(before, state, 30, temperature=0.0)
    wanted, _ = exact(model, torch.cat([tokens, drawn], 1))
    steps = wanted[:, 19:-1]
    picked = steps.gather(-1, drawn.cpu().long()[..., None])[..., 0]
    assert float((steps.amax(-1) - picked).max()) < 1e-4
    assert relative_rms(after, wanted[:, -1]) < 3e-6


FILTERS = [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7},
           {"temperature": 1.5, "top_k": 30, "top_p": 0.9}]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_have_the_distribution_of_sample_byte(options: dict) -> None:
    """The first byte of many streams, against probabilities by the filters' definition."""
    streamer, batch = streamer_of(made(CONFIGS["smoke"])), 20_000
    torch.manual_seed(2)
    log_probs = torch.log_softmax(2 * torch.randn(256), -1)
    o = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    drawn, _, _ = streamer.draw(
        log_probs.cuda().expand(batch, -1), streamer.new_state(batch), 1, seed=7, **o)
    counts = torch.bincount(drawn[:, 0].long().cpu(), minlength=256).double()

    probs = torch.softmax(log_probs.double() / o["temperature"], -1)
    ordered, order = probs.sort(descending=True, stable=True)
    if o["top_k"]:
        ordered[o["top_k"]:] = 0
    ordered[ordered.cumsum(-1) - ordered >= o["top_p"]] = 0
    expected = torch.zeros(256, dtype=torch.float64).scatter(0, order, ordered / ordered.sum())
    assert counts[expected == 0].sum() == 0
    expected *= batch
    common = expected >= 5
    rest = expected[~common].sum()
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    if rest >= 5:
        chi2 += (counts[~common].sum() - rest) ** 2 / rest
    freedom = int(common.sum())  # 5 standard deviations of a chi-square variable
    assert float(chi2) < freedom + 5 * (2 * freedom) ** 0.5
    # The reference itself never leaves the set.
    generator = torch.Generator().manual_seed(0)
    assert all(expected[sample_byte(log_probs, generator=generator, **o)] > 0 for _ in range(50))


def test_draws_are_seeded_and_may_be_made_in_pieces() -> None:
    streamer, tokens = streamer_of(made(BYTE)), random_bytes(3, 9)
    before, state = streamer.feed(tokens, streamer.new_state(3))
    whole, after, _ = streamer.draw(before, state, 40, seed=5, top_k=100)
    first, middle, there = streamer.draw(before, state, 13, seed=5, top_k=100)
    second, end, _ = streamer.draw(middle, there, 27, seed=5, top_k=100, position=13)
    assert torch.equal(whole, torch.cat([first, second], 1))
    assert torch.equal(after, end)
    other, _, _ = streamer.draw(before, state, 40, seed=6, top_k=100)
    assert not torch.equal(whole, other)
    assert len({tuple(row) for row in whole.tolist()}) == 3


def test_goes_on_from_a_parallel_scan_and_back() -> None:
    model = made(BYTE)
    advance = stream_engine(model)
    assert isinstance(advance, CudaEngine)
    data = bytes(random_bytes(1, 700)[0].tolist())
    wanted, _ = exact(model, torch.tensor([list(data)]))
    _, scanned = advance(data[:500], None)  # long: in parallel
    assert isinstance(scanned, list)
    found, stepped = advance(data[500:600], scanned)
    assert isinstance(stepped, StreamState)
    assert relative_rms(found, wanted[0, 599]) < 1e-5
    with torch.inference_mode():
        logits, _ = model(torch.tensor([list(data[600:])]).cuda(), advance.for_model(stepped))
    assert relative_rms(torch.log_softmax(logits[0, -1], -1), wanted[0, -1]) < 1e-5


def test_streams_take_it_and_forks_are_independent() -> None:
    model = made(BYTE)
    stream, sizes = ByteStream(model), set()
    for byte in b"the quick brown fox":
        stream.feed(bytes([byte]))
        sizes.add(stream.state_bytes())
    assert sizes == {4 * 4 * (3 * 384 + 384 * 16)}
    before, fork = stream.log_probs.clone(), stream.fork()
    fork.feed(b" jumps")
    assert torch.equal(stream.log_probs, before)
    model.train()
    wanted = byte_log_probs(model, b"the quick brown fox jumps")
    model.eval()
    read = ByteStream(model).read(b"the quick brown fox jumps")
    assert read is not None
    assert relative_rms(read, wanted.double()) < 1e-5


def test_a_kernel_that_stays_goes_on_from_any_state_and_leaves_by_itself() -> None:
    model = made(BYTE)
    data = b"the quick brown fox jumps over the lazy dog"
    wanted, _ = exact(model, torch.tensor([list(data)]))
    advance = stream_engine(model)
    state, states = None, []
    for i in range(len(data)):
        if i == 9:
            torch.cuda.synchronize()  # it has left: another one goes on
        found, state = advance(data[i : i + 1], state)
        states.append(state)
        assert relative_rms(found, wanted[0, i]) < 3e-6
    assert isinstance(state, Served)
    again, _ = advance(data[5:6], states[4])
    assert relative_rms(again, wanted[0, 5]) < 3e-6
    whole, _ = advance(data[5:], states[4])  # in one launch, from a copy
    assert relative_rms(whole, wanted[0, -1]) < 3e-6
    moved = pickle.loads(pickle.dumps(states[20]))
    assert isinstance(moved, StreamState)
    found, _ = advance(data[21:22], moved)
    assert relative_rms(found, wanted[0, 21]) < 3e-6
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):  # where others' work is, makes no difference
        found, _ = advance(data[31:32], states[30])
        kept = advance.for_model(states[30])
    torch.cuda.synchronize()
    assert relative_rms(found, wanted[0, 31]) < 3e-6
    _, known = exact(model, torch.tensor([list(data[:31])]))
    assert relative_rms(kept[0].ssm_state, known[0].ssm_state) < 3e-6


def test_threads_feed_streams_of_one_model() -> None:
    stream = ByteStream(made(BYTE))
    texts = [bytes(random_bytes(1, 60)[0].tolist()), b"a text of another thread, longer"]
    alone = []
    for text in texts:
        fork = stream.fork()
        for byte in text:
            fork.feed(bytes([byte]))
        alone.append(fork.log_probs)
    forks = [stream.fork() for _ in texts]

    def feed(fork: ByteStream, text: bytes) -> None:
        for byte in text:
            fork.feed(bytes([byte]))

    threads = [threading.Thread(target=feed, args=pair) for pair in zip(forks, texts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fork, log_probs in zip(forks, alone, strict=True):
        assert torch.equal(fork.log_probs, log_probs)


def test_scores_agree() -> None:
    model = made(CONFIGS["smoke"])
    data = ("naïve café – “déjà vu” costs 5 €, 日本語 🙂 and plain text again. " * 8).encode()
    parallel, streaming = score(model, data, 300, window=64), score_streaming(
        CharModel(model), data, 300)
    assert (parallel.hits == streaming.hits).mean() > 0.99
    assert parallel.bits_per_byte == pytest.approx(streaming.bits_per_byte, rel=1e-5)


def test_generate() -> None:
    model = made(BYTE)

    def text(**options) -> str:
        return "".join(generate(model, "naïve ", 600, **options))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0) == text(temperature=0, seed=5)
    assert text(top_k=1, seed=3) == text(temperature=0)
    assert list(generate(model, "x", 0)) == []


def test_a_model_in_bfloat16_is_streamed_as_exactly_as_its_weights_are() -> None:
    model = made(BYTE).bfloat16()
    streamer, tokens = streamer_of(model), random_bytes(1, 40)
    log_probs, _ = streamer.feed(tokens, streamer.new_state(1), all_positions=True)
    wanted, _ = exact(model, tokens)
    assert relative_rms(log_probs, wanted) < 1e-5
    with torch.inference_mode():
        logits, _ = model(tokens.long())
    assert relative_rms(log_probs, torch.log_softmax(logits.double().cpu(), -1)) < 5e-2


@pytest.mark.parametrize(("most", "engine"), [
    (cuda_model.HOST_PARAMETERS, "model.c, on the host: "), (0, "torch, captured: ")])
def test_a_letter_that_no_kernel_has(
    most: int, engine: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_model, "HOST_PARAMETERS", most)
    # All registered letters have a kernel: this one as if it had none.
    monkeypatch.setattr(cuda_model.hybrid, "unsupported", lambda model: "no kernel has Mamba-3")
    cuda_model.say_slow.cache_clear()
    model, data = made(replace(BYTE, layer_pattern="R", n_layer=2)), b"a text of some bytes"
    stream = ByteStream(model)
    assert stream.engine.startswith(engine)
    assert "Mamba-3" in stream.engine
    assert [stream.engine in r.getMessage() for r in caplog.records] == [True]
    before = stream.fork()
    for _ in range(2):
        stream = before.fork()
        for byte in data:
            stream.feed(bytes([byte]))
    assert most or stream._engine._kind is not None
    whole = before.fork()
    whole.feed(data)
    assert relative_rms(stream.log_probs, whole.log_probs.double()) < 1e-5
    with torch.inference_mode():  # from a kept state, on the card
        logits, _ = model(torch.tensor([[97]]).cuda(), stream.kept.state)
    stream.feed(b"a")
    assert relative_rms(stream.log_probs, torch.log_softmax(logits[0, -1].double().cpu(), -1)
                        ) < 1e-5
    grows = ByteStream(made(replace(BYTE, layer_pattern="RA", n_layer=2)))
    grows.feed(b"a")
    grows.feed(b"b")
    assert most or grows._engine._kind is None


@pytest.mark.parametrize("change", [
    {"vocab_size": 300}, {"scan_form": "chunked"},
], ids=str)
def test_what_is_not_supported_goes_the_usual_way(change: dict) -> None:
    model = ByteLM(replace(BYTE, **change)).cuda().eval()
    assert cuda_model.unsupported(model)
    stream = ByteStream(model)
    assert stream.read(b"abc") is None
    assert sum(map(len, stream.draw(5))) == 5


def test_a_model_with_a_hook_or_a_foreign_part_goes_the_usual_way() -> None:
    model = made(BYTE)
    handle = model.layers[1].mixer.register_forward_hook(lambda *_: None)
    assert "hooks" in cuda_model.unsupported(model)
    handle.remove()
    assert cuda_model.unsupported(model) == ""
    model.norm_f = torch.nn.Sequential(model.norm_f)
    assert "foreign" in cuda_model.unsupported(model)
