"""The kernels that stream a whole model, run on the CPU lane by lane as two small blocks together,
against the model in float64: that of any layers, and that of Mamba layers, launched for many bytes
and staying for one after another."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulate import Emulator

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.ops.build.kernel import Program
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.stream import cuda, fitting, hybrid, server
from mambabyte.ops.stream.grid import packing, sizes, tiles
from mambabyte.stream.engines import cuda as engines
from mambabyte.stream.engines.cuda import CudaEngine, CudaGuided, _States
from mambabyte.stream.engines.hybrid import hybrid_layers, hybrid_state, hybrid_streamer
from mambabyte.task.guide import GuidedLM, Hint

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

BLOCKS, THREADS = 2, 64
ODD = ModelConfig(d_model=20, n_layer=2, d_state=5, d_conv=3, dt_rank=3, n_head=2, n_kv_head=1,
                  attention_window=5, local_window=3, ssd_head_dim=8, ssd_d_state=6,
                  delta_head_dim=10, embed_std=1.0)  # fmt: skip
CONFIGS = {
    "all letters and extras": replace(
        ODD, layer_pattern="MALSRDK", n_layer=7, linear_bias=True, ssm_bias=True,
        ssd_norm_eps=0.01, block_scales=True, residual_mix=True, unet_skips=True, qk_gain=1.5,
        qk_norm=True, embed_norm=True, embed_norm_gain=True, mlp_ratio=1.3, tied_head=False,
        logit_softcap=5.0),
    "full step size, heads of whole vectors": replace(
        ODD, layer_pattern="MA", dt_rank="full", norm="rms", rope_fraction=0.5, d_model=96,
        n_head=3, n_kv_head=1, attention_window=11),  # more heads than warps, keys than at a time
    "attention alone": replace(ODD, layer_pattern="AL"),
}  # fmt: skip


def emulated_blocks(program: Program, folder: Path, kept: Path) -> Emulator:
    """A streaming kernel, with its sizes, as blocks that run together."""
    sizes_given = program.options[0].removeprefix("-DSIZES=")
    lines = [line for line in program.source.splitlines() if line[:5] != "#line"]
    source = folder / "stream.cu"
    source.write_text("\n".join([f"#define SIZES {sizes_given}", *lines]))
    return Emulator(source, folder, kept, cluster=BLOCKS)


class Stream:
    """A CUDA stream of the emulator: a thread that runs one kernel."""

    cuda_stream = 0
    running: threading.Thread | None = None
    launched, failed = 0, False

    def query(self) -> bool:
        if self.running is not None and self.running.is_alive():
            return False
        assert not self.failed
        return True

    def wait_stream(self, other: Stream) -> None:
        assert self.query()
        assert other.query()


class Streams(list[Stream]):
    """All of them; the present one is last in ``entered``."""

    def __init__(self) -> None:
        super().__init__([Stream()])
        self.entered = list(self)

    def new(self, *_: object, **more: object) -> Stream:
        self.append(Stream())
        self[-1].cuda_stream = len(self) - 1
        return self[-1]

    @contextlib.contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        self.entered.append(stream)
        yield
        self.entered.pop()

    def run(self, kernel: Callable[[], None], stays: bool, large: bool) -> None:
        """Launch where one that stays or has all of the device would not wait for another."""
        stream = self.entered[-1]
        assert all(s.query() for s in (self if large else [stream]))
        stream.launched += 1

        def run() -> None:
            stream.failed = True  # until it has ended well
            kernel()
            stream.failed = False

        stream.running = threading.Thread(target=run)
        stream.running.start()
        if not stays:
            stream.running.join()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Kernels that stay do so until they are told to leave."""
    streams = Streams()
    monkeypatch.setattr(server, "_SERVERS", set())
    for engine in (cuda, hybrid):
        monkeypatch.setattr(engine, "PATIENCE", 1 << 30)
    monkeypatch.setattr(torch.cuda, "Stream", streams.new)
    monkeypatch.setattr(torch.cuda, "stream", streams.within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.entered[-1])
    yield streams
    server.make_room(torch.device("cpu"))


@pytest.fixture
def emulated(streams: Streams, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(constants: tuple, device: object) -> tuple[object, sizes.Built]:
        whole = sizes.program(constants, 1 << 17)
        # Room for two thirds of the matrices: some tiles stay, the others pass through the ring.
        built = sizes.program(constants, whole.shared_bytes - whole.space // 3 * 4)
        emulator = emulated_blocks(built.program, tmp_path, kept)

        def launch(grid, block, shared, stream, *args, together: bool) -> None:
            def run() -> None:
                emulator.launch(device, "stream_hybrid", fitting.PARAMETERS, grid[0], block[:2],
                                shared, *args)

            assert together
            given = dict(zip(fitting.LAUNCH, args, strict=True))
            streams.run(run, stays=given["orders"] > 0, large=True)

        return SimpleNamespace(launch=launch), built

    monkeypatch.setattr(fitting, "kernel_for", kernel)
    monkeypatch.setattr(hybrid, "raw_stream", lambda device: streams.index(streams.entered[-1]))
    monkeypatch.setattr(fitting, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(fitting, "WIDTHS", (BLOCKS,))
    monkeypatch.setattr(hybrid, "THREADS", THREADS)
    monkeypatch.setattr(packing, "THREADS", THREADS)
    monkeypatch.setattr(sizes, "THREADS", THREADS)
    monkeypatch.setattr(packing, "TILE", 96)
    monkeypatch.setattr(tiles, "RING", 0)


def made(config: ModelConfig) -> ByteLM:
    torch.manual_seed(1)
    model = ByteLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model


def exact(model: ByteLM) -> Callable:
    double = ByteLM(replace(model.config, scan_form="recurrent")).double().eval()
    double.load_state_dict(model.state_dict())
    for module in double.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps
    return double


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("name", "texts", "length"), [
    ("all letters and extras", 1, 5),
    ("all letters and extras", 2, 7), ("full step size, heads of whole vectors", 1, 13)])
@torch.inference_mode()
@pytest.mark.long
def test_bytes_given_drawn_and_embedded(name: str, texts: int, length: int) -> None:
    model = made(CONFIGS[name])
    streamer = hybrid_streamer(model)
    tokens = torch.randint(256, (texts, length)).to(torch.uint8)
    double = exact(model)
    wanted = torch.log_softmax(double(tokens)[0], -1)
    found, state = streamer.feed(tokens[:, :4], streamer.new_state(texts), all_positions=True)
    assert relative_rms(found, wanted[:, :4]) < 3e-6
    # Both go on from one state: the second's keys and values are a copy.
    last, _ = streamer.feed(tokens[:, 4:], state)
    assert relative_rms(last, wanted[:, -1]) < 3e-6
    drawn, after, _ = streamer.draw(found[:, -1], state, length - 4, temperature=0.0)
    both = torch.cat([tokens[:, :4], drawn], 1)
    expected = torch.log_softmax(double(both)[0], -1)
    assert torch.equal(drawn.long(), expected[:, 3:-1].argmax(-1))
    assert relative_rms(after, expected[:, -1]) < 3e-6
    # A state of the model itself, and what the head reads of embedded bytes.
    one = tokens[:1]
    _, states = double(one[:, :-1])
    x = model.embedding(one[:, -1:].long())
    hidden, end = streamer.hidden(x, hybrid_state(streamer, states))
    assert relative_rms(hidden, double.hidden(x.double(), states)[0]) < 3e-6
    for mine, theirs in zip(hybrid_layers(streamer, end), double(one)[1], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if not isinstance(a, torch.Tensor):
                assert a == b
            elif b.numel():
                assert relative_rms(a, b) < 3e-6


@pytest.mark.usefixtures("emulated")
@pytest.mark.long
@torch.inference_mode()
def test_a_window_of_more_keys_than_a_block_takes_at_once() -> None:
    model = made(replace(ODD, layer_pattern="A", n_layer=1, attention_window=40))
    streamer = hybrid_streamer(model)
    tokens = torch.randint(256, (1, 45)).to(torch.uint8)  # 8 keys of each of two blocks at once
    found, _ = streamer.feed(tokens, streamer.new_state(1), all_positions=True)
    wanted = torch.log_softmax(exact(model)(tokens)[0], -1)
    assert relative_rms(found, wanted) < 3e-6


@pytest.mark.usefixtures("emulated")
@pytest.mark.long
@torch.inference_mode()
def test_a_branch_copies_its_keys_in_few_operations() -> None:
    streamer = hybrid_streamer(made(replace(ODD, layer_pattern="AL")))
    tokens = torch.randint(256, (1, 12)).to(torch.uint8)
    _, state = streamer.feed(tokens[:, :7], streamer.new_state(1))  # the last 4 rows are copied
    first, there = streamer.feed(tokens[:, 7:], state)
    with torch.profiler.profile() as profile:
        streamer._grown(state, 5)
    used = [e.name for e in profile.events()]
    assert sum(map(used.count, ("aten::copy_", "aten::zeros", "aten::empty"))) < 5
    again, copied = streamer.feed(tokens[:, 7:], state)
    assert copied.cache.data_ptr() != there.cache.data_ptr()
    assert copied.stored < there.stored
    assert relative_rms(again, first.double()) < 1e-6


@pytest.mark.usefixtures("emulated")
@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_passes_of_several_bytes_draw_what_single_ones_do(name: str) -> None:
    width = 4 if name == "attention alone" else 3
    model = made(CONFIGS[name])
    streamer = hybrid_streamer(model)
    start = torch.randint(256, (1, 4)).to(torch.uint8)
    log_probs, state = streamer.feed(start, streamer.new_state(1))
    for temperature, length in ((0.0, 9), (1.0, 4)):
        how = {"temperature": temperature, "seed": 3}
        drawn, after, end = streamer.draw(log_probs, state, length, **how)
        text = bytes(drawn[0].tolist())
        wrong = bytes(b ^ (i % 4 == 3) for i, b in enumerate(text))
        # All guesses right, some in the middle of a pass wrong, and none made at first.
        for past in (b"ab" + text + b"ab", b"ab" + wrong + b"ab", b""):
            again, last, there, counts = streamer.guess_and_draw(
                log_probs, state, length, past, **how)
            assert torch.equal(again, drawn)
            assert torch.equal(last, after)
            assert there.stored == end.stored
            for mine, theirs in zip(streamer.layers_of(there), streamer.layers_of(end),
                                    strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert all(map(torch.equal, a, b))
            passes, guessed = counts.tolist()
            assert length - guessed <= passes <= length
            if text in past:
                assert passes == -(-length // width)


@pytest.mark.usefixtures("emulated")
@pytest.mark.long
@torch.inference_mode()
def test_a_guided_models_hints_and_gate() -> None:
    torch.manual_seed(1)
    model = GuidedLM(replace(ODD, layer_pattern="MA", logit_softcap=5.0), n_kinds=7).eval()
    for p in model.parameters():
        p += 0.2 * torch.randn(p.shape)
    data = b"abc"
    hint = Hint(torch.log_softmax(3 * torch.randn(3, 256), -1),
                *(torch.randint(7, (3,)).to(torch.uint8) for _ in range(2)))
    engine = CudaGuided(model.lm, model)
    found, state = engine.guided(data[:1], None, (hint.log_p[:1], hint.best[:1], hint.kind[:1]))
    last, _ = engine.guided(data[1:], state, (hint.log_p[1:], hint.best[1:], hint.kind[1:]))
    whole = Hint(*(x[None] for x in (hint.log_p, hint.best, hint.kind)))
    hidden, _ = model.lm.hidden(model.embedded(torch.tensor([list(data)]), whole))
    wanted = torch.log_softmax(model.combined(hidden, whole).double(), -1)[0]
    assert relative_rms(found, wanted[0]) < 1e-5
    assert relative_rms(last, wanted[2]) < 1e-5

    def fill(*places: int) -> None:
        for at, x in zip(places, (hint.log_p, hint.best, hint.kind), strict=True):
            ctypes.memmove(at, x[:1].data_ptr(), x[:1].numel() * x.element_size())

    alone, _ = engine.guided_byte(data[:1], None, fill)
    assert torch.equal(alone, found)


# ---------------------------------------------------------------------- Mamba layers alone

PLAIN = ModelConfig(d_model=12, n_layer=2, d_state=3, d_conv=3, dt_rank=3, embed_std=1.0,
                    mlp_ratio=1.3, embed_norm=True, norm="rms")  # fmt: skip


@pytest.fixture
def plain(streams: Streams, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(plan: cuda.Plan, device: object) -> object:
        emulator = emulated_blocks(plan.program(), tmp_path, kept)

        def launch(grid, block, shared, on, *args) -> None:
            def run() -> None:
                emulator.launch(device, "stream_bytes", cuda._PARAMETERS, grid[0], block[:2],
                                shared, *args)

            streams.run(run, stays=args[-2] > 0, large=False)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(cuda, "THREADS", THREADS)
    monkeypatch.setattr(cuda, "cluster_blocks", lambda shape, device: BLOCKS)
    monkeypatch.setattr(cuda, "_kernel", kernel)
    monkeypatch.setattr(cuda, "_plan_for", lambda shape, *_: cuda.plan(shape, BLOCKS, 1, 1 << 17))
    monkeypatch.setattr(cuda, "raw_stream", lambda device: 0)


def _engine(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> CudaEngine:
    monkeypatch.setattr(engines, "_is_plain", lambda model: True)
    assert isinstance(_States(model).streamer, cuda.CudaStreamer)
    return CudaEngine(model)


@pytest.mark.long
@pytest.mark.usefixtures("plain")
@torch.inference_mode()
def test_bytes_fed_one_by_one_from_any_state(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(PLAIN)
    double = exact(model)
    engine = _engine(model, monkeypatch)
    stream = streams[-1]
    text = b"abcabd"
    wanted = torch.log_softmax(double(torch.tensor([list(text)]))[0][0], -1)
    state, states = None, []
    for i in range(4):
        found, state = engine(text[i : i + 1], state)
        states.append(state)
        assert relative_rms(found, wanted[i]) < 3e-6
    assert stream.launched == 1  # it stays
    again, _ = engine(text[1:2], states[0])  # an earlier state, which the kernel reads in
    assert relative_rms(again, wanted[1]) < 3e-6
    server.make_room(model.device)
    monkeypatch.setattr(cuda, "PATIENCE", 10)
    for launched in (2, 3):
        found, after = engine(text[4:5], states[3])
        assert relative_rms(found, wanted[4]) < 3e-6
        assert stream.launched == launched
        stream.running.join()  # it leaves by itself
    # Out of its memory, which stops it; on by another launch; back in.
    kept = engine.for_model(after)
    assert stream.query()
    for mine, theirs in zip(kept, double(torch.tensor([list(text[:5])]))[1], strict=True):
        assert relative_rms(mine.ssm_state, theirs.ssm_state) < 3e-6
        assert relative_rms(mine.conv_state, theirs.conv_state) < 3e-6
    rows, _ = engine.each(text[4:], states[3])
    assert relative_rms(rows, wanted[4:]) < 3e-6
    found, _ = engine(text[5:], engine._states.from_model(kept))
    assert relative_rms(found, wanted[5]) < 3e-6


@pytest.mark.long
@pytest.mark.usefixtures("plain")
@torch.inference_mode()
def test_a_form_of_the_scan_that_decays_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PLAIN, scan_form="document_chunked")
    model = made(config)
    double, known = ByteLM(config).double().eval(), None
    double.load_state_dict(model.state_dict())
    engine, state = _engine(model, monkeypatch), None
    for byte in b"abcab":
        wanted, known = double(torch.tensor([[byte]]), known)
        found, state = engine(bytes([byte]), state)
        assert relative_rms(found, torch.log_softmax(wanted[0, -1], -1)) < 3e-6
