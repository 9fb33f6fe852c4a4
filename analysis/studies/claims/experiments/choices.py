"""Small paired trainings: one choice of the documents against its alternative, all else equal.

The same seeds, windows and steps on both sides; what is compared is held-out bits per byte. A
minute of training shows the start of learning and no more, and the findings say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.measure.exponents import ssm_layers
from analysis.studies.ablation.learning import captured_text_step
from analysis.studies.claims.lab import Lab, Settings, experiment
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, load_corpus, sample_windows
from mambabyte.model import ByteLM, MambaMixer, mixers
from mambabyte.train import optimise, text_step
from mambabyte.train.schedule import schedule

CONTEXT, BATCH = 128, 8


def small_model() -> ModelConfig:
    """The first document's model, narrower and shallower."""
    return replace(PRESETS["mamba_byte"].model, d_model=48, n_layer=2)


class FixedMixer(MambaMixer):
    """A Mamba mixer whose step sizes, B and C are learned but do not see the input: a classical
    SSM. They come from the same projections, of one learned vector in place of the activations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.constant = nn.Parameter(torch.empty(config.d_inner))  # see fix_transitions

    def scan_inputs(
        self, x: Tensor, conv_state: Tensor | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, _, _, _, z, conv_state = super().scan_inputs(x, conv_state, ages)
        d_state = self.A_log.shape[1]
        low_rank, B, C = self.x_proj(self.constant).split([self.dt_rank, d_state, d_state], dim=-1)
        delta = F.linear(low_rank, self.dt_proj.weight)
        batch, length, _ = u.shape
        delta, B, C = (t.expand(batch, length, -1) for t in (delta, B, C))
        return u, delta, B, C, z, conv_state


def fix_transitions(model: ByteLM) -> None:
    """Draw the vectors in place of the activations of a model of FixedMixer."""
    for mixer in mixers(model, FixedMixer):
        nn.init.normal_(mixer.constant)


def open_gates(model: ByteLM) -> None:
    """Take the gate's weights out of a model of UngatedMixer."""
    for mixer in ssm_layers(model):
        with torch.no_grad():
            mixer.in_proj.weight[mixer.D.shape[0]:] = 0
        rows = torch.ones_like(mixer.in_proj.weight)
        rows[mixer.D.shape[0]:] = 0
        mixer.in_proj.weight.register_hook(lambda grad, rows=rows: grad * rows)


class UngatedMixer(MambaMixer):
    """A Mamba mixer whose output is not gated: z is held where SiLU gives about 1."""

    def scan_inputs(
        self, x: Tensor, conv_state: Tensor | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, delta, B, C, z, conv_state = super().scan_inputs(x, conv_state, ages)
        return u, delta, B, C, torch.full_like(z, 1.2784645), conv_state  # SiLU of it is 1


def drop_convolution(model: ByteLM) -> None:
    """Hold the convolution at the identity: no neighbour is seen."""
    for mixer in ssm_layers(model):
        with torch.no_grad():
            mixer.conv1d.weight.zero_()
            mixer.conv1d.weight[..., -1] = 1
        mixer.conv1d.weight.requires_grad_(False)


def trained(
    config: ModelConfig, corpus: Corpus, seed: int, stops: tuple[int, ...],
    change: Callable[[ByteLM], None] = lambda model: None, mixer: type[MambaMixer] = MambaMixer,
    device: str = "cpu",
) -> tuple[ByteLM, list[float]]:
    """A model after the last of ``stops``, and its held-out bits per byte after each of them.

    Its layers are of ``mixer``; ``change`` is done to the untrained model. On CUDA each step is
    one graph. Raises NonFiniteError where a loss is not finite."""
    recipe = TrainConfig(context=CONTEXT, batch_size=BATCH, n_steps=stops[-1], lr=3e-3,
                         precision="fp32", seed=seed, allow_study_form=True)
    torch.manual_seed(seed)
    model = ByteLM(config, {mixer.letter: mixer}).to(device)
    change(model)
    held_out = sample_windows(corpus.valid, CONTEXT, 32, seed, 0).to(device)
    make_step = text_step if device == "cpu" else captured_text_step
    step = make_step(model, corpus.train, recipe)
    bits: list[float] = []

    @torch.no_grad()
    def look(done: int) -> None:
        if done in stops:
            step.read()
            bits.append(model.loss(held_out).item() / math.log(2))

    optimise(step, partial(schedule, config=recipe), stops[-1], after=look)
    return model, bits


@experiment
def tying(settings: Settings) -> dict[str, float]:
    """The head tied to the embedding against a head of its own, after each of ``tied_steps``."""
    corpus = load_corpus("stdlib")
    config, stops = small_model(), settings.tied_steps
    tied, own = (trained(replace(config, tied_head=tied), corpus, settings.seed, stops,
                         device=settings.device)[1] for tied in (True, False))
    return {
        "early": tied[0] - own[0], "late": tied[-1] - own[-1],
        "head_parameters": config.vocab_size * config.d_model,
        **{f"tied_after_{stop}": bits for stop, bits in zip(stops, tied, strict=True)},
        **{f"own_after_{stop}": bits for stop, bits in zip(stops, own, strict=True)},
        **_two_gradients(config, corpus, settings.seed),
    }


def tied_table(lab: Lab) -> pd.DataFrame:
    """The tied head's comparison, one row a stop: held-out bits per byte."""
    rows = []
    for stop in lab.settings.tied_steps:
        tied, own = (lab[f"tying.{name}_after_{stop}"] for name in ("tied", "own"))
        rows.append({"steps": stop, "tied head, bits/byte": tied, "own head, bits/byte": own,
                     "tied minus own, bits/byte": tied - own})
    return pd.DataFrame(rows)


def _two_gradients(config: ModelConfig, corpus: Corpus, seed: int) -> dict[str, float]:
    """The tied matrix's gradient as an embedding and as a head: sizes and their angle."""
    torch.manual_seed(seed)
    model = ByteLM(config)
    tokens = sample_windows(corpus.train, CONTEXT, BATCH, seed, 0)
    looked_up = model.embedding.weight.detach().clone().requires_grad_()
    read_out = looked_up.detach().clone().requires_grad_()
    hidden, _ = model.hidden(F.embedding(tokens[:, :-1], looked_up))
    loss = F.cross_entropy(F.linear(hidden, read_out).flatten(0, 1), tokens[:, 1:].flatten())
    a, b = torch.autograd.grad(loss, (looked_up, read_out))
    return {"smaller_share": float(min(a.norm(), b.norm()) / (a.norm() + b.norm())),
            "cosine": float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))}


# The block's parts, and how each is taken away: the mixer's class, and what is done to the model.
PARTS: dict[str, tuple[type[MambaMixer], Callable[[ByteLM], None]]] = {
    "selection": (FixedMixer, fix_transitions), "gate": (UngatedMixer, open_gates),
    "convolution": (MambaMixer, drop_convolution)}


@experiment
def gating(settings: Settings) -> dict[str, float]:
    """What input-dependent transitions are worth on text, beside the block's other two parts:
    held-out bits per byte without each less those of the whole block, seed by seed."""
    corpus = load_corpus("stdlib")
    config, stops = small_model(), (settings.parts_steps,)
    found: dict[str, float] = {}
    for seed in range(settings.seed, settings.seed + settings.paired_seeds):
        model, (whole,) = trained(config, corpus, seed, stops, device=settings.device)
        found.setdefault("dt_spread", _step_spread(model, corpus, seed))
        for name, (mixer, change) in PARTS.items():
            _, (bits,) = trained(config, corpus, seed, stops, change, mixer, settings.device)
            found[f"without_{name}_{seed}"] = bits - whole
    return found


def parts_table(lab: Lab) -> pd.DataFrame:
    """What the block loses without each of its parts, one row a seed: held-out bits per byte."""
    first, settings = lab.settings.seed, lab.settings
    return pd.DataFrame([
        {"seed": seed, "steps": settings.parts_steps,
         **{f"without {name}, bits/byte": lab[f"gating.without_{name}_{seed}"] for name in PARTS}}
        for seed in range(first, first + settings.paired_seeds)])


@torch.no_grad()
def _step_spread(model: ByteLM, corpus: Corpus, seed: int) -> float:
    """Largest over smallest step size that a channel takes on held-out text, median over channels.

    What a state keeps over a byte is exp(A dt): a fixed transition has a ratio of 1.
    """
    seen: list[Tensor] = []

    def hook(mixer: MambaMixer, args: tuple) -> None:
        _, delta, *_ = mixer.scan_inputs(args[0], None)
        dt = F.softplus(delta + mixer.dt_proj.bias)
        seen.append(dt.amax((0, 1)) / dt.amin((0, 1)))

    handles = [m.register_forward_pre_hook(hook) for m in ssm_layers(model)]
    model.loss(sample_windows(corpus.valid, CONTEXT, 4, seed, 1).to(model.device))
    for handle in handles:
        handle.remove()
    return float(torch.cat(seen).median())
