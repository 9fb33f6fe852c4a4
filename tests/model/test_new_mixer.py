"""A mixer that the package does not know: one class, one letter, and all the rest follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from analysis.measure.allocations import measure_peak, measure_saved
from analysis.studies import gradients, throughput
from analysis.studies.ablation import compute as ablation
from analysis.studies.gradients import mixers as gradient_mixers
from analysis.studies.memory.closed_form import state_frame
from analysis.studies.throughput import compute as throughput_study
from analysis.studies.throughput.tables import crossovers_in_words
from analysis.theory.flops import count_flops
from analysis.theory.kept_tensors import AUTOCASTS, saved_terms
from analysis.theory.step_memory import budget, state_bytes
from mambabyte.checkpoint import load_model
from mambabyte.config import SPECS, ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte
from mambabyte.model import MIXERS, ByteLM, Mixer, register
from mambabyte.model.mixer import Kept, Operations, Step, mixer_of, unregister
from mambabyte.ops.compare import relative_rms
from mambabyte.stream import ByteStream
from mambabyte.train import train
from mambabyte.train.optim import roles
from mambabyte.train.smoke import smoke_check

E = next(letter for letter in "EFGHIJNOPQTUVWXYZ" if letter not in SPECS)
KEEP = 0.9  # of the average at every byte


class Average(NamedTuple):
    mean: Tensor  # (B, d_model)


class MovingAverage(Mixer):
    """y_t = 0.9 y_{t-1} + 0.1 W x_t, all of a sequence as one product."""

    about = "moving average"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, state: Average | None) -> tuple[Tensor, Average]:
        v, t = self.proj(x), torch.arange(x.shape[1], device=x.device)
        age = (t[:, None] - t).to(v.dtype)
        share = torch.where(age >= 0, (1 - KEEP) * KEEP**age, 0.0)  # (L, L)
        y = (v.transpose(1, 2) @ share.T).transpose(1, 2)
        if state is not None:
            y = y + KEEP ** (t[:, None] + 1) * state.mean[:, None]
        return y, Average(y[:, -1])

    @classmethod
    def shapes(cls, config):
        return {"proj.weight": (config.d_model, config.d_model)}

    @classmethod
    def state_shapes(cls, config, seen):
        return {"mean": (config.d_model,)}

    @classmethod
    def operations(cls, config, length, causal=True):
        return [Operations("projection", 2 * config.d_model**2),
                Operations("average", 2 * length * config.d_model, backward_ratio=1.0)]

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        cast = config.d_model**2 if step.dtype != torch.float32 else 0
        return [Kept("average", "shares", step.length**2, step.itemsize),
                Kept("casts", "weights, cast", cast, step.itemsize)]


CONFIG = ModelConfig(d_model=16, n_layer=3, layer_pattern="M", n_head=2, n_kv_head=2, d_state=4)


@pytest.fixture(autouse=True)
def letter() -> Iterator[None]:
    before = dict(MIXERS), dict(SPECS)
    register(E)(MovingAverage)
    yield
    unregister(E)
    assert before == (MIXERS, SPECS)
    with pytest.raises(UserError, match="one letter a layer"):
        replace(CONFIG, layer_pattern="M" + E)


@pytest.fixture
def config() -> ModelConfig:
    return replace(CONFIG, layer_pattern=f"M{E}A")


def test_it_is_counted(config: ModelConfig) -> None:
    model = ByteLM(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters
    assert config.parameter_groups()["moving average"] == 16 * 16
    assert roles(model)["layers.1.mixer.proj.weight"] == "muon"
    assert state_bytes(config, 100)["state"] == 16 * 4


def test_it_trains_scores_and_is_kept(config: ModelConfig, text_file: Path, tmp_path: Path) -> None:
    corpus = load_corpus(str(text_file))
    recipe = TrainConfig(context=24, batch_size=2, n_steps=30, lr=1e-2, log_every=10,
                         checkpoint_every=15, max_seconds=0, optimizer="muon", schedule="stable")
    losses: list[float] = []
    result = train(config, recipe, corpus, tmp_path / "run",
                   report=lambda progress: losses.append(progress.loss))
    assert losses[-1] < losses[0]
    model = load_model(tmp_path / "run")
    assert bits_per_byte(model, corpus.valid[:100_000]) == result["valid_bits_per_byte"]
    again = train(config, recipe, corpus, tmp_path / "run", resume=True)
    assert again["valid_bits_per_byte"] == result["valid_bits_per_byte"]
    assert smoke_check(ByteLM(config), corpus.train)["streaming_error"] < 1e-5


def test_documents_are_refused_by_what_knows_none(
    config: ModelConfig, text_file: Path, tmp_path: Path
) -> None:
    """Before a step: a state would go over from one to the next, or the call would break."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_bytes(text_file.read_bytes())
    corpus, recipe = load_corpus(str(folder)), TrainConfig(context=24, batch_size=2, n_steps=1)
    with pytest.raises(UserError, match=f"one behind another, and layers of {E} know none: let"):
        train(config, recipe, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(mixer_of(letter).knows_documents() for letter in "MALSRDK")


def test_it_streams(config: ModelConfig) -> None:
    model = ByteLM(replace(config, embed_std=1.0)).eval()
    data = bytes(range(40, 70))
    stream, parts = ByteStream(model), []
    for byte in data:
        stream.feed(bytes([byte]))
        parts.append(stream.log_probs)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[START_BYTE, *data]]))
    assert relative_rms(torch.stack(parts), torch.log_softmax(logits[0, 1:], -1)) < 1e-5
    assert stream.state_bytes() == sum(state_bytes(config, 1 + len(data)).values())


@pytest.mark.parametrize("autocast", AUTOCASTS)
def test_what_it_keeps_equals_the_hooks(config: ModelConfig, autocast) -> None:
    predicted = sum(t.bytes for t in saved_terms(config, 2, 20, autocast))
    assert predicted == measure_saved(config, 2, 20, autocast)


def test_the_peak_of_a_step(config: ModelConfig) -> None:
    step = budget(config, 2, 64)
    profiled = measure_peak(config, 2, 64)
    assert step.peak - step.weights - step.optimizer == pytest.approx(profiled, rel=0.05)


def test_its_operations_equal_the_counter(config: ModelConfig) -> None:
    table = count_flops(config, length=21, batch=2)
    products = table[table["counted"] == "matrix product"]
    assert (products["formula_over_counter"] == 1.0).all()


def test_it_goes_into_the_ablation(text_file: Path) -> None:
    found = ablation.run(ablation.Parameters(
        corpus=str(text_file), patterns=(E, "M", "M" + E), reference=E, d_model=16, n_layer=2,
        context=16, batch_size=2, steps=4, seeds=(0,), heldout_windows=2, characters=10,
        streams=1, stream_bytes=32, tasks=(), variants=(), max_seconds=0.0))
    assert found.systems["pattern"].tolist() == [E, "M", "M" + E]
    assert (found.systems["state_bytes"] == found.systems["state_bytes_counted"]).all()
    equal = found.comparisons[found.comparisons["comparison"] == "steps"]
    assert equal["bits_per_byte"].notna().all()
    assert set(equal["pattern"]) == {E, "M", "M" + E}


def test_it_goes_into_every_study() -> None:
    at_boundary = gradient_mixers.mixer_frame(gradients.Scans(length=8, chunk=4)).set_index(
        ["mixer", "gradient of"])
    assert len(at_boundary) == 2 * len(SPECS)
    assert (at_boundary[["one call", "two calls"]] < 1e-5).all(axis=None)
    cut = at_boundary["state detached"].unstack()
    assert (cut["inputs before the boundary"] == 1).all()
    assert ((cut["weights"] > 0.01) & (cut["weights"] < 1)).all()
    state = state_frame()
    assert {E, "K", "MMMA"} <= set(state["pattern"])
    p = throughput.Parameters(mixers=(E,), d_model=8, n_head=2, n_layer=1, lengths=(4, 8),
                              batches=(1,), rounds=1, stream_positions=(0,), stream_steps=1)
    timed = throughput_study.time_mixers(p, lambda line: None)
    assert set(timed["mixer"]) == {"moving average", "attention"}
    crossed = crossovers_in_words(throughput_study.find_crossovers(p, timed))
    assert set(crossed["crossover_in_operations"]) == {"1"}
    assert "moving average" in set(throughput_study.time_streaming(p)["system"])


def test_a_mixer_must_say_what_it_is_asked(config: ModelConfig) -> None:
    class Silent(Mixer):
        about = "nothing"

    with pytest.raises(ValueError, match="taken by MambaMixer"):
        register("M")(Silent)
    with pytest.raises(ValueError, match="no letter"):
        register("AB")(Silent)
    with pytest.raises(NotImplementedError, match="Silent does not say its parameters' shapes"):
        Silent.shapes(config)
    with pytest.raises(UserError, match="no mixer has the letter 'X': choose among M"):
        mixer_of("X")
