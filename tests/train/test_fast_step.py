"""The fast step computes what train_step computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.fused import cast_together
from mambabyte.ops.compare import relative_rms
from mambabyte.train import EagerStep, NonFiniteError, ahead, autocast, train, train_step
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule

MODEL = ModelConfig(d_model=32, n_layer=2, layer_pattern="MA", d_state=4, n_head=2, n_kv_head=2,
                    qk_norm=True, mlp_ratio=2.0)
RECIPE = TrainConfig(context=48, batch_size=3, n_steps=8, lr=1e-2, warmup_fraction=0.25)
TEXT = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)


def run_eager(config: TrainConfig, device: str) -> tuple[ByteLM, list[tuple[float, float]]]:
    torch.manual_seed(0)
    model = ByteLM(MODEL).to(device)
    optimizer = make_optimizer(model, config)
    seen = []
    for step in range(config.n_steps):
        tokens = sample_windows(TEXT, config.context, config.batch_size, config.seed, step)
        seen.append(train_step(model, optimizer, tokens.to(device), config, step)[:2])
    return model, seen


def run_fast(
    config: TrainConfig, device: str, way: str = "graph"
) -> tuple[ByteLM, list[tuple[float, float]]]:
    torch.manual_seed(0)
    model = ByteLM(MODEL).to(device)
    prepare(model, replace(config, step=way))
    windows = Windows(torch.from_numpy(TEXT.copy()).to(device), config.context)
    step = CapturedStep(model, model.loss, make_optimizer(model, config, on_device=True), windows,
                    window_starts(len(TEXT), config), config)
    seen = []
    for index in range(config.n_steps):
        step(schedule(index, config))
        seen.append(step.read()[:2])
    return model, seen


def close(a: ByteLM, b: ByteLM, atol: float) -> bool:
    return all(torch.allclose(p, q, atol=atol)
               for p, q in zip(a.parameters(), b.parameters(), strict=True))


# Muon rounds to bf16, which turns the last bit of a gradient into a visible difference.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 1e-2)])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_the_eager_step(optimizer, tolerance, clip):
    config = replace(RECIPE, optimizer=optimizer, grad_clip=clip)
    eager, expected = run_eager(config, "cpu")
    fast, got = run_fast(config, "cpu")
    assert got == [pytest.approx(e, rel=tolerance) for e in expected]
    assert close(eager, fast, tolerance)
    assert expected[-1][0] < expected[0][0]


@pytest.mark.parametrize("changes", [
    {"norm": "rms", "linear_bias": True, "logit_softcap": 15.0, "mlp_activation": "gelu"},
    {"layer_pattern": "MAA", "n_layer": 5, "norm": "rms_plain", "qk_gain": 1.5,
     "residual_mix": True, "block_scales": True, "unet_skips": True, "embed_norm": True,
     "tied_head": False}])
def test_joined_layers_and_head_compute_the_same(changes):
    """Loss and every gradient, and so with a layer that something was hung onto."""
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for way in ("graph", "fused", "hooked"):
        torch.manual_seed(0)
        model = ByteLM(replace(MODEL, **changes)).double()
        prepare(model, TrainConfig(context=19, step="graph" if way == "graph" else "fused"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        if way == "hooked":
            model.layers[1].register_forward_hook(lambda *_: None)
        loss = model.loss(tokens)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found[0], other, strict=True))


def test_weights_cast_together_are_those_that_autocast_casts():
    config = replace(MODEL, n_layer=3, layer_pattern="MAS", linear_bias=True, tied_head=False,
                     ssd_head_dim=16, ssd_d_state=16)
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        model = ByteLM(config)
        loss = cast_together(model, model.loss) if together else model.loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(tokens)
        found.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))


def test_micro_batches_make_the_captured_step_too():
    config = replace(RECIPE, batch_size=4)
    _, whole = run_eager(config, "cpu")
    for parts in (2, 4):
        fast, got = run_fast(replace(config, micro_batches=parts), "cpu")
        assert got == [pytest.approx(e, rel=1e-4) for e in whole]
        eager, same = run_eager(replace(config, micro_batches=parts), "cpu")
        assert same == [pytest.approx(e, rel=1e-4) for e in whole]
        assert close(eager, fast, 1e-4)
    with pytest.raises(UserError, match="expected a divisor of the batch of 4 windows"):
        replace(config, micro_batches=3)
    with pytest.raises(UserError, match="does not divide the 3 windows"):
        EagerStep(fast, make_optimizer(fast, config), lambda step: (torch.zeros(3, 9).long(),),
                  replace(config, micro_batches=2))(1.0)


def test_windows_are_those_of_the_eager_step():
    starts = window_starts(len(TEXT), RECIPE, first_step=2)
    windows = Windows(torch.from_numpy(TEXT.copy()), RECIPE.context)
    for row, step in zip(starts, range(2, RECIPE.n_steps), strict=True):
        expected = sample_windows(TEXT, RECIPE.context, RECIPE.batch_size, RECIPE.seed, step)
        assert torch.equal(windows(row)[0], expected)


def test_a_loss_that_is_not_finite_is_remembered():
    torch.manual_seed(0)
    model = ByteLM(MODEL)
    config = replace(RECIPE, n_steps=6)
    step = CapturedStep(model, model.loss, make_optimizer(model, config, on_device=True),
                    Windows(torch.from_numpy(TEXT.copy()), config.context),
                    window_starts(len(TEXT), config), config, first_step=10)
    step(0.1)
    step(0.1)
    assert step.read().loss > 0
    with torch.no_grad():
        model.norm_f.weight[0] = float("inf")
    for _ in range(3):
        step(0.1)
    with pytest.raises(NonFiniteError) as error:
        step.read()
    assert error.value.step == 12


def test_what_is_begun_ahead_is_over_before_the_first_step():
    config, recipe = replace(MODEL, layer_pattern="A"), replace(RECIPE, precision="bf16")
    ahead.begin(config, recipe, "cpu")
    ahead.begin(replace(MODEL, layer_pattern="M"), recipe, "cuda")  # nothing to compile
    ahead.begin(replace(config, attention_window=8), recipe, "cuda")
    assert not ahead._RUNNING
    ahead.begin(config, recipe, "cuda:99")  # fails, as whatever is wrong does, in silence
    (begun,) = ahead._RUNNING
    model = ByteLM(MODEL)
    CapturedStep(model, model.loss, make_optimizer(model, RECIPE, on_device=True),
                 Windows(torch.from_numpy(TEXT.copy()), RECIPE.context),
                 window_starts(len(TEXT), RECIPE), RECIPE)
    assert not ahead._RUNNING
    assert not begun.is_alive()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(TEXT) * 6)
    return load_corpus(str(path))


def test_training_is_the_same_with_either_step(corpus, tmp_path):
    recipe = replace(RECIPE, checkpoint_every=3, log_every=4)
    results = [train(MODEL, replace(recipe, step=step), corpus, tmp_path / step)
               for step in ("eager", "graph")]
    assert results[0]["valid_bits_per_byte"] == pytest.approx(
        results[1]["valid_bits_per_byte"], rel=1e-4)


def test_training_resumes_exactly_with_the_fast_step(corpus, tmp_path):
    recipe = replace(RECIPE, checkpoint_every=4, step="graph")
    whole = train(MODEL, recipe, corpus, tmp_path / "a")
    train(MODEL, recipe, corpus, tmp_path / "b")
    (tmp_path / "b/checkpoints/step_00000008").rename(tmp_path / "gone")
    part = train(MODEL, recipe, corpus, tmp_path / "b", resume=True)
    assert whole["valid_bits_per_byte"] == part["valid_bits_per_byte"]


def test_divergence_is_found_and_no_bad_checkpoint_is_written(corpus, tmp_path):
    recipe = replace(RECIPE, lr=1e30, grad_clip=0.0, warmup_fraction=0.0, checkpoint_every=6,
                     log_every=100, step="graph")
    with pytest.raises(NonFiniteError, match=r"step [2-6]: .* not finite"):
        train(MODEL, recipe, corpus, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


# What dynamo asks of the embedding's output, it would not say outside of a test.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graph", "fused", "compile"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_captured_equals_eager(optimizer, way):
    config = replace(RECIPE, optimizer=optimizer, precision="fp32", n_steps=12)
    eager, expected = run_eager(config, "cuda")
    fast, got = run_fast(config, "cuda", way)
    assert got == [pytest.approx(e, rel=2e-2) for e in expected]
    assert close(eager, fast, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_joined_operations_are_right_on_a_gpu(name):
    """Loss and every gradient of every preset: in float32 those of torch's operators, in bf16 as
    near to them as torch's own are, and the same bits again."""
    tokens = torch.randint(0, 256, (2, 257), generator=torch.Generator().manual_seed(0)).cuda()

    def found(way: str, precision: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = ByteLM(PRESETS[name].model).cuda()
        with torch.no_grad():  # nothing is 0 from the start on
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        prepare(model, TrainConfig(context=256, step=way, precision=precision))
        with autocast(model.device, precision):
            loss = model.loss(tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    exact = found("graph", "fp32")
    for precision in ("fp32", "bf16", "bf16_residual"):
        joined, again = found("fused", precision), found("fused", precision)
        plain = exact if precision == "fp32" else found("graph", precision)
        for one, two, torchs, true in zip(joined, again, plain, exact, strict=True):
            assert torch.equal(one, two)
            assert relative_rms(one, true) < 2 * relative_rms(torchs, true) + (
                1e-5 if precision == "fp32" else 5e-3)
