"""The systems of the public task: named recipes from training bytes to a byte model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.errors import UserError
from mambabyte.task.experts import Context, Matches, Mixing
from mambabyte.task.ngram import DISCOUNT


@dataclass(frozen=True)
class Ngram:
    """How a system uses an n-gram model."""

    order: int = 12
    discount: float | None = DISCOUNT  # None: modified Kneser-Ney
    share: float = 1.0  # of the training text that is counted: its end
    continuation: bool = True
    weight: float | None = None  # None: chosen on held-out training text
    # A guide of training, instead of mixed in afterwards: this share of the training text is
    # counted to guide training on the rest. 0: no guide.
    guide_share: float = 0.0
    recount: bool = True  # all of the training text, once training is over; else keep the guide


@dataclass(frozen=True)
class System:
    """A recipe: a network, an n-gram model, or both; with ``mixing`` experts beside these, and a
    gate that joins them all."""

    about: str
    model: ModelConfig | None
    train: TrainConfig = field(default_factory=TrainConfig)
    ngram: Ngram | None = None
    mixing: Mixing | None = None
    allow_study_form: bool = False


def _preset(name: str, ngram: Ngram | None = None, about: str = "", **train: Any) -> System:
    preset = get_preset(name)
    fast = replace(preset.train, time_aware=True, max_seconds=290.0, step="auto",
                   precision="bf16_residual" if preset.model.embed_norm else "auto")
    return System(about or preset.about, preset.model, replace(fast, **train), ngram)


def _as_written() -> System:
    system = _preset("mamba_byte", about="mamba_byte with the scan exactly as the document has it")
    assert system.model is not None
    return replace(system, model=replace(system.model, scan_form="document_chunked"),
                   train=replace(system.train, step="eager"), allow_study_form=True)


def _guided(about: str, n_steps: int, **model: Any) -> System:
    """The network of nano_plus_ngram, trained on what an n-gram model leaves open."""
    nano = get_preset("nano_plus_ngram").model
    ngram = Ngram(order=12, discount=0.7, guide_share=0.6)
    return replace(_preset("nano_plus_ngram", ngram, about, n_steps=n_steps),
                   model=replace(nano, **model))


WORDS = (Context(words=2), Context(words=3), Context(6, skip=1), Context(7, fold=True))


def _counts(about: str, share: float = 1.0, **mixing: Any) -> System:
    return System(about, None, ngram=Ngram(discount=None, share=share), mixing=Mixing(**mixing))


def _counts_and(
    about: str, n_steps: int, ngram: Ngram, contexts: tuple[Context, ...] = (),
    batch_size: int = 32, **model: Any
) -> System:
    """A guided network among the experts."""
    guided = _guided(about, n_steps, **model)
    return replace(guided, mixing=Mixing(contexts=contexts), ngram=ngram,
                   train=replace(guided.train, step="fused", batch_size=batch_size))


SYSTEMS: dict[str, System] = {
    "mamba_byte": _preset("mamba_byte"),
    "mamba_byte_as_written": _as_written(),
    "modded_nanogpt": _preset("modded_nanogpt"),
    "modded_nanogpt_500": _preset("modded_nanogpt", about="modded_nanogpt, 500 steps", n_steps=500),
    "nano_plus_ngram": _preset("nano_plus_ngram", Ngram(weight=0.5)),
    "nano_plus_ngram_chosen": _preset(
        "nano_plus_ngram", Ngram(order=14, discount=0.85),
        "nano_plus_ngram, order, discount and weight chosen on held-out training text"),
    "hybrid_3_1": _preset("hybrid_3_1", n_steps=2000, lr=1e-3),
    "ssm_1_1": _preset("ssm_1", n_steps=2000, lr=1e-3),
    "nano_ssm": _preset("nano_ssm"),
    "nano_ssm_3_1": _preset("nano_ssm_3_1"),
    "nano_ssm_1_1": _preset("nano_ssm_1_1"),
    "ngram": System("interpolated Kneser-Ney of order 12 alone", None, ngram=Ngram(weight=1.0)),
    "counts": _counts("counted experts and a gate: n-grams, matches in the stream"),
    "counts_quick": _counts("counts of 40 % of the text", 0.4),
    "counts_words": _counts("counts, and words, gaps and folded case", contexts=WORDS),
    "counts_static": _counts("counts without the stream's own matches", contexts=WORDS,
                             matches=Matches(())),
    # Few steps read little text: nearly all is counted at once, and once.
    "counts_ssm": _counts_and("counts and an SSM of 1 layer", 500, Ngram(
        discount=None, guide_share=0.9, recount=False), batch_size=16, layer_pattern="M",
        n_layer=1),
    "counts_hybrid": _counts_and("counts, words and an SSM layer below two of attention", 1300,
        Ngram(discount=None, guide_share=0.6), WORDS, layer_pattern="MAA", n_layer=3),
    "ours": _guided("SSM and attention 1:1, d 256, 4 layers, guided by an n-gram in training",
                    n_steps=950, layer_pattern="MA"),
    "ours_attention": _guided("ours with attention alone", n_steps=700),
}


# The same scheme of names as that of the presets; records have the names that they are read to.
ALIASES = {"hybrid_1_1": "ssm_1_1", "ssm_1": "ssm_1_1", "nano_hybrid_1_1": "nano_ssm_1_1",
           "nano_hybrid_3_1": "nano_ssm_3_1", "ssm_3": "hybrid_3_1",
           "guided_hybrid_1_1": "ours", "guided_attention": "ours_attention"}


def get_system(name: str) -> System:
    """The system called ``name``, or so by its other name; a UserError lists the names."""
    name = ALIASES.get(name, name)
    if name not in SYSTEMS:
        raise UserError(f"system {name!r} is unknown: choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
