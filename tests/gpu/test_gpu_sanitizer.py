"""A small run of every kernel, for CUDA's memory and race checker (a minute or two a tool)::

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \\
            python -m pytest -m gpu tests/gpu/test_gpu_sanitizer.py
    done

Without the caching allocator each tensor is an allocation of its own, so that memcheck sees the
first byte past it.
"""

from __future__ import annotations

import mixer_cases
import pytest
import torch
from scan_cases import make_inputs, results

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.model.fused import cast_together
from mambabyte.ops.conv.operator import fused_causal_conv
from mambabyte.ops.mamba.fused import fused_mixer
from mambabyte.ops.mamba.step import mamba_step, scan_step
from mambabyte.ops.ssd import cuda as ssd_kernels
from mambabyte.ops.ssd.mamba3 import cuda as mamba3_kernels
from mambabyte.stream import ByteStream, stream_engine
from mambabyte.train.captured import prepare
from tests.gpu import test_gpu_hybrid, test_gpu_stream
from tests.gpu.test_gpu_stream import made, random_bytes
from tests.helpers.family_cases import make_inputs as family_inputs
from tests.helpers.family_cases import results as family_results

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "states"),
    [((2, 20, 40), 16), ((1, 1, 8), 16), ((2, 9, 5), 3), ((1, 700, 8), 16), ((1, 130, 3), 64)],
)
def test_scan(shape: tuple[int, int, int], states: int, dtype: torch.dtype) -> None:
    for name, tensor in results(make_inputs(*shape, states, dtype)).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 37, 24), (1, 2, 3)])
def test_convolution(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, _, channels = shape
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    tail = torch.randn(batch, 3, channels, device="cuda").to(dtype).requires_grad_()
    weight, bias = (torch.randn(channels, *k, device="cuda").requires_grad_() for k in ((4,), ()))
    y, last = fused_causal_conv(x, weight, bias, tail)
    for gradient in torch.autograd.grad(y.sum() + last.sum(), (x, weight, bias, tail)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 37, 40, 8), (1, 1, 8, 8), (2, 20, 7, 3)])
def test_mixer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = mixer_cases.make_inputs(*shape, dtype=dtype)
    for name, tensor in mixer_cases.results(fused_mixer, inputs).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("channels", [40, 71])
def test_step(channels: int) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    x, z = random(2, 3, channels)
    tail, state = random(3, 3, channels), random(3, channels, 16)
    weights = random(channels, 4), random(channels), random(35, channels), random(channels, 3)
    A = -random(channels, 16).abs()
    for tensor in mamba_step(x, z, tail, state, *weights, random(channels), A, random(channels)):
        assert tensor.isfinite().all()
    B, C = random(2, 3, 16)
    for tensor in scan_step(x, z, A, B, C, None, None, None, state, True):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(("walk_blocks", "many_blocks"), [(1 << 30, 0), (0, 1 << 30), (0, 0)],
                         ids=["all chunks at once", "three in flight", "two in flight"])
@pytest.mark.parametrize(("states", "length"), [(16, 1), (32, 70), (64, 130), (128, 65)])
@pytest.mark.parametrize("family", ["ssd", "mamba3"])
def test_ssd(family: str, states: int, length: int, walk_blocks: int, many_blocks: int,
             monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of a group in a block, as where there are blocks enough."""
    monkeypatch.setattr(ssd_kernels, "WALK_BLOCKS", walk_blocks)
    monkeypatch.setattr(ssd_kernels, "MANY_BLOCKS", many_blocks)
    monkeypatch.setattr(ssd_kernels, "_output_at_once", lambda *_: 1)
    monkeypatch.setattr(mamba3_kernels, "TURN_BLOCKS", 1)
    monkeypatch.setattr(ssd_kernels.heads_of_a_block, "__defaults__", (1,))
    monkeypatch.setattr(mamba3_kernels, "BACK_BLOCKS", 1)
    inputs = family_inputs(family, 2, length, heads=4, keys=states, values=64, groups=2,
                           dtype=torch.bfloat16, device="cuda")
    for name, tensor in family_results(family, inputs, "fused").items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize("family", ["gated delta", "channel gates"])
def test_delta_rule(family: str, length: int) -> None:
    inputs = family_inputs(family, 2, length, heads=3, keys=64, values=64, dtype=torch.bfloat16,
                           device="cuda")
    for name, tensor in family_results(family, inputs, "fused").items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("letters", ["MA", "S", "R", "DK"])
def test_training_step(letters: str) -> None:
    """What makes a mixer's inputs, and what is joined around it."""
    model = made(ModelConfig(d_model=128, n_layer=len(letters), layer_pattern=letters, n_head=2,
                             n_kv_head=2, mlp_ratio=2.0, qk_norm=True)).train()
    prepare(model, TrainConfig(context=70, step="fused", precision="bf16"))
    with torch.autocast("cuda", torch.bfloat16):
        cast_together(model, model.loss)(random_bytes(2, 71).long()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [
    test_gpu_stream.CONFIGS["sizes that divide nothing"],
    test_gpu_hybrid.CONFIGS["all letters and extras"],
], ids=["stream.cu", "hybrid.cu"])
def test_stream(config: ModelConfig) -> None:
    """Fed many bytes and one at a time, drawn from, and with guesses."""
    model = made(config)
    advance = stream_engine(model)
    assert advance.name.endswith(".cu")
    streamer = advance.streamer
    found, state = streamer.feed(random_bytes(3, 9), streamer.new_state(3), all_positions=True)
    assert streamer.draw(found[:, -1], state, 5, temperature=0.0)[1].isfinite().all()
    stream, past = ByteStream(model), b"abcabcab"
    for byte in past:
        stream.feed(bytes([byte]))
    fork = stream.fork()
    fork.feed(b"x")
    assert fork.log_probs.isfinite().all()
    text = b"".join(fork.draw(6, temperature=0.0))
    if advance.guesses:
        text = b"".join(piece for piece, *_ in stream.guess_and_draw(past, 6, temperature=0.0))
    assert len(text) == 6
