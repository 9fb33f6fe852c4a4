"""Which parameter goes where, Muon against a plain reading of it, schedules, exact resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mambabyte.checkpoint import find_checkpoint, load_model
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train import train
from mambabyte.train.optim import make_optimizer, orthogonalise, roles, set_rates
from mambabyte.train.schedule import schedule

MODEL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=4, n_head=2, n_kv_head=1,
                    mlp_ratio=2.0, tied_head=False)
RECIPE = TrainConfig(context=32, batch_size=2, n_steps=6, checkpoint_every=3, log_every=2,
                     optimizer="muon", schedule="stable")


def test_every_parameter_has_a_role_on_purpose():
    found: dict[str, set[str]] = {"muon": set(), "decay": set(), "free": set()}
    for name, role in roles(ByteLM(MODEL)).items():
        found[role].add(".".join(name.split(".")[-2:]))
    assert found == {
        "muon": {"in_proj.weight", "x_proj.weight", "out_proj.weight", "q_proj.weight",
                 "k_proj.weight", "v_proj.weight", "up_proj.weight"},
        "decay": {"embedding.weight", "head.weight", "conv1d.weight", "dt_proj.weight"},
        "free": {"mixer.A_log", "mixer.D", "conv1d.bias", "dt_proj.bias", "norm.weight",
                 "norm.bias", "mlp_norm.weight", "mlp_norm.bias", "norm_f.weight", "norm_f.bias"},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_hold_every_parameter_once(optimizer):
    model = ByteLM(MODEL)
    groups = make_optimizer(model, replace(RECIPE, optimizer=optimizer)).param_groups
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [g["weight_decay"] for g in groups] == ([0.1, 0.1, 0.0] if optimizer == "muon"
                                                  else [0.1, 0.0])


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 40), (2, 40, 8), (1, 1, 7)])
def test_orthogonalise_keeps_singular_vectors_and_levels_values(shape):
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    got = orthogonalise(matrices)
    assert got.shape == matrices.shape
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ got @ vh.mT  # diagonal, near 1, if the vectors are the same
    values = torch.linalg.svdvals(got)
    assert values.max() < 1.35
    assert values.median() > 0.6
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.15  # bf16


def test_muon_is_its_definition():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([
        torch.nn.Linear(6, 20, bias=False), torch.nn.Linear(20, 6, bias=False),
        torch.nn.Linear(6, 20, bias=False)])})
    config = replace(RECIPE, muon_lr=0.1, weight_decay=0.5, muon_momentum=0.9)
    optimizer = make_optimizer(model, config)
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        set_rates(optimizer, lr_share := 1 / (step + 1))
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            buffers[i] = 0.9 * buffers[i] + 0.1 * p.grad
            update = orthogonalise((0.9 * buffers[i] + 0.1 * p.grad)[None])[0]
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            weights[i] = weights[i] * (1 - 0.1 * lr_share * 0.5) - 0.1 * lr_share * scale * update
        optimizer.step()
    for p, expected in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(p, expected, atol=4e-3)  # bf16 products differ with the batch
        assert not torch.allclose(p, expected * 1.05, atol=4e-3)


def test_the_rest_is_adamw():
    torch.manual_seed(1)
    model, twin = ByteLM(MODEL), ByteLM(MODEL)
    twin.load_state_dict(model.state_dict())
    mine = make_optimizer(model, RECIPE)
    plain = make_optimizer(twin, replace(RECIPE, optimizer="adamw"))
    tokens = torch.randint(0, 256, (2, 17))
    for _ in range(2):
        for m, o in ((model, mine), (twin, plain)):
            o.zero_grad()
            m.loss(tokens).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        mine.step()
        plain.step()
    of = roles(model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) == (of[name] != "muon"), name


def test_a_rate_each_and_decay_of_muon_alone():
    recipe = replace(RECIPE, weight_decay=0.0, muon_weight_decay=0.025, embed_lr=0.3, head_lr=0.2,
                     scalar_lr=0.1)
    model = ByteLM(MODEL)
    names = {p: n for n, p in model.named_parameters()}
    of = roles(model)
    for group in make_optimizer(model, recipe).param_groups:
        for name in (names[p] for p in group["params"]):
            expected = {"embedding.weight": 0.3, "head.weight": 0.2}.get(
                name, {"muon": recipe.muon_lr, "free": 0.1, "decay": recipe.lr}[of[name]])
            assert group["peak_lr"] == expected, name
            assert group["weight_decay"] == (0.025 if of[name] == "muon" else 0.0)


def test_the_momentum_rises_and_its_count_is_saved():
    weight = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 3, False)])})
    recipe = replace(RECIPE, muon_momentum=0.9, muon_first_momentum=0.5, muon_momentum_steps=2)
    optimizer = make_optimizer(weight, recipe)
    (p,) = weight.parameters()
    expected = torch.zeros(3, 3)
    for beta in (0.5, 0.7, 0.9, 0.9):
        p.grad = torch.randn(3, 3)
        expected = beta * expected + (1 - beta) * p.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum"], expected)
    other = make_optimizer(weight, recipe)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["done"] == 4


def test_resume_with_muon_is_exact(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("all work and no play makes a dull byte. " * 400)
    corpus = load_corpus(str(path))
    recipe = replace(RECIPE, muon_first_momentum=0.5, muon_momentum_steps=2 * RECIPE.n_steps)
    train(MODEL, recipe, corpus, tmp_path / "whole")
    train(MODEL, recipe, corpus, tmp_path / "part")
    newest = find_checkpoint(tmp_path / "part")
    newest.rename(tmp_path / "gone")
    train(MODEL, recipe, corpus, tmp_path / "part", resume=True)
    whole, part = (load_model(tmp_path / n).state_dict() for n in ("whole", "part"))
    assert all(torch.equal(whole[k], part[k]) for k in whole)


# --- schedules ------------------------------------------------------------------------------------


def test_stable_then_decay():
    config = TrainConfig(n_steps=100, warmup_fraction=0.1, schedule="stable", decay_fraction=0.4)
    shares = [schedule(s, config) for s in range(101)]
    assert shares[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert set(shares[10:61]) == {1.0}
    assert shares[80] == pytest.approx(0.5)
    assert shares[100] == 0.0
    assert schedule(0, replace(config, warmup_fraction=0.0)) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "stable"])
def test_time_aware_schedule_ends_with_the_time(kind):
    config = TrainConfig(n_steps=1000, schedule=kind, time_aware=True, max_seconds=10.0)
    late = [schedule(200, config, seconds) for seconds in (0.0, 5.0, 9.0, 10.0, 12.0)]
    assert late[0] == schedule(200, replace(config, time_aware=False))
    assert late == sorted(late, reverse=True)
    assert late[-2:] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert schedule(1000, config, 1.0) == pytest.approx(0.0, abs=1e-9)  # the steps count too


def test_rates_may_be_tensors():
    model = ByteLM(MODEL)
    optimizer = make_optimizer(model, RECIPE, on_device=True)
    before = [g["lr"] for g in optimizer.param_groups]
    set_rates(optimizer, 0.25)
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is rate
        assert float(rate) == pytest.approx(0.25 * group["peak_lr"])


@pytest.mark.parametrize("bad", [{"decay_fraction": 0.0}, {"muon_momentum": 1.0},
                                 {"muon_first_momentum": -0.1}, {"muon_momentum_steps": -1},
                                 {"embed_lr": -1.0}, {"muon_weight_decay": -0.1},
                                 {"time_aware": True, "max_seconds": 0.0}])
def test_bad_recipes(bad):
    with pytest.raises(UserError):
        TrainConfig(**bad)
