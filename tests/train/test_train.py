"""Training: exact resume, caps, divergence, refusal of study forms, smoke mode."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from mambabyte import energy
from mambabyte.checkpoint import load_model
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.ops.scan.recurrent import recurrent_scan
from mambabyte.train import EagerStep, NonFiniteError, train, train_step
from mambabyte.train.metrics import read_metrics
from mambabyte.train.optim import make_optimizer, roles
from mambabyte.train.schedule import learning_rate
from mambabyte.train.smoke import is_smoke, smoke_check, smoke_configs
from tests.helpers.clock import Clock

MODEL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=4, n_head=2, n_kv_head=1)
RECIPE = TrainConfig(context=24, batch_size=2, n_steps=8, lr=1e-2, log_every=2,
                     checkpoint_every=3, max_seconds=0)


@pytest.fixture
def corpus(text_file):
    return load_corpus(str(text_file))


def weights(run):
    return load_model(run).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_reduces_the_loss_and_leaves_a_complete_folder(corpus, tmp_path):
    seen = []
    result = train(MODEL, replace(RECIPE, n_steps=60, log_every=10), corpus, tmp_path / "run",
                   report=seen.append)
    assert seen[-1].loss < seen[0].loss - 0.5
    assert result["stopped_by"] == "n_steps"
    assert result["bytes_seen"] == 60 * 2 * 24
    assert result["valid_bits_per_byte"] < 8
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 60
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 10, 20, 30, 40, 50, 60]
    record = json.loads((tmp_path / "run/provenance.json").read_text())
    assert {"date", "command", "commit", "versions", "machine", "corpus_sha256"} <= record.keys()
    assert json.loads(lines[0])["exponent"] > 0


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_stopped_and_resumed_gives_the_same_weights_bit_for_bit(corpus, tmp_path, stop_at):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(MODEL, RECIPE, corpus, whole)

    def interrupt(progress):
        if progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(MODEL, replace(RECIPE, log_every=1), corpus, parts, report=interrupt)
    assert first["stopped_by"] == "interrupt"
    assert first["steps"] == stop_at
    assert not (parts / "result.json").exists()  # a half run is never done
    second = train(MODEL, RECIPE, corpus, parts, resume=True)
    assert second["steps"] == RECIPE.n_steps
    assert same(weights(whole), weights(parts))
    lines = (parts / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))


def test_a_counter_that_dies_does_not_end_the_training(corpus, tmp_path, monkeypatch):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    counter = zone / "energy_uj"
    counter.write_text("0")
    (zone / "max_energy_range_uj").write_text("1000000000")
    monkeypatch.setattr(energy, "RAPL_ROOT", tmp_path)

    def burn(progress):
        counter.write_text(str(progress.step * 1_000_000))
        if progress.step == 4:
            counter.unlink()

    run = tmp_path / "run"
    result = train(MODEL, RECIPE, corpus, run, report=burn)
    assert result["steps"] == RECIPE.n_steps
    assert result["joules"] is None
    assert result["energy_source"].startswith("not measured from step 5 on (")
    found = [p.joules for p in read_metrics(run / "metrics.jsonl")]
    assert found == [0.0, 1.0, 2.0, None, None]
    # Not even where the counter is back: what it missed belongs to the run.
    counter.write_text("0")
    result = train(MODEL, RECIPE, corpus, run, resume=True)
    assert (result["joules"], result["energy_source"]) == (None, "not measured before step 8")


def test_a_corpus_cut_in_the_middle_loses_no_step(tmp_path):
    path = tmp_path / "t.txt"
    text = b"some text to be cut. " * 1000
    path.write_bytes(text)

    def cut(progress):
        if progress.step == 4:
            path.write_bytes(text[:50])

    with pytest.raises(UserError, match="has 50 now"):
        train(MODEL, RECIPE, load_corpus(str(path)), tmp_path / "run", report=cut)
    path.write_bytes(text)
    train(MODEL, RECIPE, load_corpus(str(path)), tmp_path / "run", resume=True)
    train(MODEL, RECIPE, load_corpus(str(path)), tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_resume_after_a_kill_repeats_from_the_last_checkpoint(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(MODEL, RECIPE, corpus, whole)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(MODEL, replace(RECIPE, log_every=1), corpus, killed, report=kill)
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')  # cut off while writing
    train(MODEL, RECIPE, corpus, killed, resume=True)
    assert same(weights(whole), weights(killed))


def test_wall_clock_cap_stops_with_a_checkpoint(corpus, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("mambabyte.train.run.time", clock)
    result = train(MODEL, replace(RECIPE, log_every=1, max_seconds=3), corpus, tmp_path / "r",
                   report=lambda progress: clock.sleep(1))
    assert result["stopped_by"] == "max_seconds"
    assert result["steps"] == 3
    assert result["seconds"] == 3
    assert load_model(tmp_path / "r")


def test_training_in_another_thread_works(corpus, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(MODEL, RECIPE, corpus, tmp_path / "r")))
    thread.start()
    thread.join()
    assert results[0]["steps"] == RECIPE.n_steps


def test_divergence_names_step_and_layer_and_keeps_the_checkpoint(corpus, tmp_path, monkeypatch):
    real = EagerStep.backward

    def poisoned(step, batch):
        if step.index == 5:
            with torch.no_grad():
                step.model.layers[1].mixer.v_proj.weight[0, 0] = float("nan")
        return real(step, batch)

    monkeypatch.setattr(EagerStep, "backward", poisoned)
    with pytest.raises(NonFiniteError) as error:
        train(MODEL, RECIPE, corpus, tmp_path / "run")
    assert "step 6" in str(error.value)
    assert "layers.1.mixer" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


def test_non_finite_gradient_is_caught_when_the_loss_is_finite():
    # 90 bytes of strong decay: finite forward through the clamp of the loss, inf in the scan.
    model = ByteLM(replace(MODEL, layer_pattern="M", scan_form="corrected_cumsum", scan_chunk=64))
    with torch.no_grad():
        model.layers[1].mixer.A_log.fill_(3.0)  # A = -20
        model.layers[1].mixer.dt_proj.bias.fill_(1.0)
    optimizer = make_optimizer(model, RECIPE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"layers\.1"):
        train_step(model, optimizer, torch.randint(0, 256, (2, 65)), RECIPE, 0)
    assert same(before, model.state_dict())  # no step was taken


def test_study_forms_are_not_trained_by_accident(corpus, tmp_path):
    config = replace(MODEL, scan_form="document_chunked")
    with pytest.raises(UserError, match="subject of study"):
        train(config, RECIPE, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    asked = train(config, replace(RECIPE, allow_study_form=True), corpus, tmp_path / "run")
    assert asked["steps"] == RECIPE.n_steps


def test_a_run_folder_is_not_overwritten(corpus, tmp_path):
    train(MODEL, RECIPE, corpus, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already"):
        train(MODEL, RECIPE, corpus, tmp_path / "run")
    with pytest.raises(UserError, match=r"with lr 0.01, now 0.001: leave"):
        train(MODEL, replace(RECIPE, lr=1e-3), corpus, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="another model configuration"):
        train(replace(MODEL, d_state=8), RECIPE, corpus, tmp_path / "run", resume=True)


def test_a_run_goes_on_for_more_steps_where_the_steps_done_stay_the_same(corpus, tmp_path):
    longer = replace(RECIPE, n_steps=16, schedule="stable", warmup_fraction=0.125)
    train(MODEL, longer, corpus, tmp_path / "whole")

    def interrupt(progress):
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    shorter = replace(longer, n_steps=8, warmup_fraction=0.25)
    run = tmp_path / "run"
    train(MODEL, shorter, corpus, run, report=interrupt)
    with pytest.raises(UserError, match=r"n_steps 8, now 16: with these, step 1 of the 4 done .*"
                       r"warmup_fraction 0.125 for 16 steps"):
        train(MODEL, replace(shorter, n_steps=16), corpus, run, resume=True)
    train(MODEL, longer, corpus, run, resume=True)
    assert same(weights(tmp_path / "whole"), weights(run))
    with pytest.raises(UserError, match="step 11 of the 16 done"):  # where its rate began to fall
        train(MODEL, replace(longer, n_steps=32, warmup_fraction=0.0625), corpus, run, resume=True)


def test_another_text_is_not_resumed_on(corpus, tmp_path):
    run, short = tmp_path / "run", replace(RECIPE, n_steps=2)
    train(MODEL, short, corpus, run)
    (tmp_path / "other").write_text("another text altogether. " * 200)
    with pytest.raises(UserError, match="another text than other is now"):
        train(MODEL, short, load_corpus(str(tmp_path / "other")), run, resume=True)
    assert train(MODEL, short, corpus, run, resume=True)["steps"] == 2


def test_context_longer_than_the_corpus(corpus, tmp_path):
    with pytest.raises(UserError, match="context 1000000 needs at least 1000001 bytes"):
        train(MODEL, replace(RECIPE, context=1_000_000), corpus, tmp_path / "run")


def test_schedule():
    config = TrainConfig(n_steps=100, warmup_fraction=0.05, lr=1.0)
    rates = [learning_rate(s, config) for s in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(b <= a for a, b in pairwise(rates[5:]))


def test_every_parameter_is_in_one_group_on_purpose():
    model = ByteLM(replace(MODEL, mlp_ratio=2.0))
    optimizer = make_optimizer(model, RECIPE)
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    free = {n.split(".")[-2] + "." + n.split(".")[-1]
            for n, role in roles(model).items() if role == "free"}
    assert free == {"mixer.A_log", "mixer.D", "conv1d.bias", "dt_proj.bias", "norm.weight",
                    "norm.bias", "mlp_norm.weight", "mlp_norm.bias", "norm_f.weight",
                    "norm_f.bias"}
    assert optimizer.param_groups[1]["weight_decay"] == 0


# --- smoke mode ----------------------------------------------------------------------------------


def test_smoke_mode_is_chosen(monkeypatch):
    assert is_smoke(9_999)
    assert not is_smoke(10_000)
    monkeypatch.setenv("SMOKE_TEST_ONLY", "1")
    assert is_smoke(10**9)


@pytest.mark.parametrize("form", ["auto", "recurrent", "chunked"])
def test_smoke_passes_when_the_scan_is_right(corpus, form):
    model, recipe = smoke_configs(ModelConfig(scan_form=form), 485)
    assert (model.d_model, model.n_layer, model.d_state) == (32, 2, 8)
    assert (recipe.context, recipe.batch_size, recipe.n_steps) == (64, 2, 2)
    found = smoke_check(ByteLM(model), corpus.train)
    assert found["scan_output_error"] < 1e-6


@pytest.mark.parametrize("n", [0, 1, 2, 8])
def test_a_text_without_a_window_is_named(n):
    with pytest.raises(UserError, match=f"has {n} training bytes: expected 9 or more"):
        smoke_configs(ModelConfig(), n)
    assert smoke_configs(ModelConfig(), 9)[1].context == 8


@pytest.mark.parametrize("form", ["document_chunked", "document_cumsum"])
def test_smoke_fails_when_the_recurrence_is_wrong(corpus, form):
    model, _ = smoke_configs(ModelConfig(scan_form=form), 485)
    with pytest.raises(UserError, match="does not compute the recurrence"):
        smoke_check(ByteLM(model), corpus.train)


@pytest.mark.parametrize("fault", ["nan", "gradient", "state"])
def test_smoke_fails_on_subtler_faults(corpus, fault, monkeypatch):
    def faulty(u, delta, A, B, C, state, chunk):
        y, h = recurrent_scan(u, delta, A, B, C, state)
        if fault == "nan":
            y = y.clone()
            y[0, -1, 0] = float("nan")
        if fault == "gradient" and u.shape[1] > 1:  # right value, gradient cut at half the length
            half = u.shape[1] // 2
            _, cut = recurrent_scan(
                u[:, :half], delta[:, :half], A, B[:, :half], C[:, :half], state)
            late, h = recurrent_scan(
                u[:, half:], delta[:, half:], A, B[:, half:], C[:, half:], cut.detach())
            y = torch.cat([y[:, :half], late], 1)
        if fault == "state":
            h = h * (1 + 1e-4)
        return y, h

    monkeypatch.setitem(SCANS, "chunked", faulty)
    model, _ = smoke_configs(ModelConfig(scan_form="chunked"), 485)
    with pytest.raises(UserError, match="smoke: "):
        smoke_check(ByteLM(model), corpus.train)


# --- devices ------------------------------------------------------------------------------------


def test_cuda_without_a_gpu_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(UserError, match="no CUDA device"):
        train(MODEL, RECIPE, corpus, tmp_path / "run", device="cuda")
