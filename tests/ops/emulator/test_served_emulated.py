"""The kernel that streams Mamba layers, run on the CPU lane by lane as a cluster of two small
blocks, against the model in float64: launched for many bytes, and staying for one after another."""

from __future__ import annotations

import contextlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulate import Emulator

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.stream import cuda
from mambabyte.stream.cuda import CudaModel, _States

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

BLOCKS, THREADS = 2, 64
SMALL = ModelConfig(d_model=12, n_layer=2, d_state=3, d_conv=3, dt_rank=3, embed_std=1.0,
                    mlp_ratio=1.3, embed_norm=True, norm="rms")  # fmt: skip


class Stream:
    """A CUDA stream of the emulator: a thread that runs one kernel."""

    cuda_stream = 0
    running: threading.Thread | None = None
    launched = 0

    def query(self) -> bool:
        return self.running is None or not self.running.is_alive()

    def wait_stream(self, other: object) -> None:
        assert self.query()


@pytest.fixture
def stream(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()

    def kernel(plan: cuda.Plan, device: object) -> object:
        program = plan.program()
        sizes = program.options[0].removeprefix("-DSIZES=")
        given = (f"#define SIZES {sizes}\n#define __expf expf\n#define __logf logf\n"
                 "#define rsqrtf(x) (1.f / sqrtf(x))\n")
        text = "\n".join(line for line in program.source.splitlines() if line[:5] != "#line")
        (tmp_path / "stream.cu").write_text(given + text)
        emulator = Emulator(tmp_path / "stream.cu", tmp_path, kept, cluster=BLOCKS)

        def launch(grid, block, shared, on, *args) -> None:
            def run() -> None:
                emulator.launch(device, "stream_bytes", cuda._PARAMETERS, grid[0], block[:2],
                                shared, *args)

            stream.launched += 1
            stream.running = threading.Thread(target=run)
            stream.running.start()
            if not args[-2]:  # takes no orders
                stream.running.join()

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(cuda, "THREADS", THREADS)
    monkeypatch.setattr(cuda, "cluster_blocks", lambda shape, device: BLOCKS)
    monkeypatch.setattr(cuda, "_kernel", kernel)
    monkeypatch.setattr(cuda, "_plan_for", lambda shape, *_: cuda.plan(shape, BLOCKS, 1, 1 << 17))
    monkeypatch.setattr(cuda, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **more: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def _model() -> tuple[ByteLM, ByteLM]:
    torch.manual_seed(1)
    model = ByteLM(SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    exact = ByteLM(replace(SMALL, scan_form="recurrent")).double().eval()
    exact.load_state_dict(model.state_dict())
    for module in exact.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps
    return model, exact


def _engine(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> CudaModel:
    from mambabyte.stream import cuda as engine

    monkeypatch.setattr(engine, "_is_plain", lambda model: True)
    assert isinstance(_States(model).streamer, cuda.CudaStreamer)
    return CudaModel(model, None)


@pytest.mark.long
@torch.inference_mode()
def test_bytes_fed_one_by_one_from_any_state(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exact = _model()
    engine = _engine(model, monkeypatch)
    text = b"abcabd"
    wanted = torch.log_softmax(exact(torch.tensor([list(text)]))[0][0], -1)
    state, states = None, []
    for i in range(4):
        found, state = engine(text[i : i + 1], state)
        states.append(state)
        assert relative_rms(found, wanted[i]) < 3e-6
    assert stream.launched == 1  # it stays
    again, _ = engine(text[1:2], states[0])  # an earlier state, which the kernel reads in
    assert relative_rms(again, wanted[1]) < 3e-6
    stream.running.join()  # it leaves by itself
    found, after = engine(text[4:5], states[3])
    assert relative_rms(found, wanted[4]) < 3e-6
    assert stream.launched == 2
    # Out of its memory, which stops it; on by another launch; back in.
    kept = engine.for_model(after)
    assert stream.query()
    for mine, theirs in zip(kept, exact(torch.tensor([list(text[:5])]))[1], strict=True):
        assert relative_rms(mine.ssm_state, theirs.ssm_state) < 3e-6
        assert relative_rms(mine.conv_state, theirs.conv_state) < 3e-6
    rows, _ = engine.each(text[4:], states[3])
    assert relative_rms(rows, wanted[4:]) < 3e-6
    found, _ = engine(text[5:], engine.from_model(kept))
    assert relative_rms(found, wanted[5]) < 3e-6
