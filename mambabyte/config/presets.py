"""The named systems: model, recipe and where each comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from mambabyte.config.checks import one_of
from mambabyte.config.model import ModelConfig
from mambabyte.config.training import TrainConfig
from mambabyte.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A named system: its model, its recipe, and where it comes from."""

    about: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_BYTE = Preset("MambaByte, final configuration: 4 layers, d 192, context 1024, batch 16")

# The second document's hybrid. Its code cycles (ratio SSM, 1 attention) over nine layers, takes
# the step size from a full d_inner x d_inner projection with torch's default initialisation,
# normalises embedding, blocks, queries and keys without weights but for a gain a head, squares a
# ReLU in an MLP of twice the width, zero-initialises the output projections, caps the logits at 30,
# and has gains on branches, the embedding mixed into every layer and skips across the middle. Bytes
# here, 1024 sentencepiece tokens there; the recipe is the first document's (its own is the ablation
# study's variant "published").
_HYBRID = Preset(
    "SSM/attention hybrid 3:1: 9 layers, d 512, MLP in every block; unlike the published one on "
    "bytes, not on 1,024 pieces, and by the first document's recipe",
    ModelConfig(
        d_model=512, n_layer=9, layer_pattern="MMMA", norm="rms_plain", dt_rank="full",
        dt_init="linear", n_head=8, n_kv_head=4, qk_norm=True, qk_gain=1.5, mlp_ratio=2.0,
        embed_std=0.005, embed_norm=True, zero_init_out=True, logit_softcap=30.0,
        block_scales=True, residual_mix=True, unet_skips=True,
    ),
)


def _hybrid(about: str, pattern: str) -> Preset:
    return replace(_HYBRID, about=about, model=replace(_HYBRID.model, layer_pattern=pattern))


# The public baseline (github.com/cybertronai/wikitext, submissions/modded_nanogpt, from
# github.com/KellerJordan/modded-nanogpt): RMS norms with gains on embedding and blocks, without on
# queries and keys, biases everywhere, half of the rotary frequencies off, squared ReLU, projections
# and head from zero, Muon with weight decay for matrices, a rate each for embedding, head and the
# rest. What differs is in the preset's description; and the schedule ends with the clock, too.
_NANO = Preset(
    "the task's baseline, 6 layers, d 384, Muon; unlike the published one: logits capped by tanh, "
    "attention scaled by 1/8 and not 0.12, rotary frequencies in steps of 1/16 and not 1/15, five "
    "Newton-Schulz iterations and not twelve, embedding in float32, AdamW's epsilon 1e-8",
    ModelConfig(
        d_model=384, n_layer=6, layer_pattern="A", norm="rms", n_head=6, n_kv_head=6,
        qk_norm=True, rope_base=1024.0, rope_fraction=0.5, mlp_ratio=4.0, embed_norm=True,
        embed_norm_gain=True, embed_std=1.0, tied_head=False, zero_init_out=True,
        logit_softcap=15.0, linear_bias=True,
    ),
    TrainConfig(
        context=1024, batch_size=32, n_steps=2150, lr=1 / 320, betas=(0.8, 0.95), weight_decay=0.0,
        warmup_fraction=0.0, optimizer="muon", muon_lr=0.035, muon_weight_decay=0.025,
        embed_lr=0.3, head_lr=1 / 320, scalar_lr=0.01, schedule="stable", decay_fraction=0.7,
        grad_clip=0.0, time_aware=True, max_seconds=290.0,
    ),
)
# The same without gains and biases, and with rates of its own: smaller, and what the guided systems
# of the task were chosen with.
_LEAN = Preset(
    "",
    replace(_NANO.model, norm="rms_plain", embed_norm_gain=False, embed_std=0.02,
            linear_bias=False),
    TrainConfig(
        context=1024, batch_size=32, n_steps=2150, lr=3e-3, weight_decay=0.0, warmup_fraction=0.0,
        optimizer="muon", schedule="stable", grad_clip=0.0, time_aware=True, max_seconds=290.0,
    ),
)


def _nano(about: str, **model: object) -> Preset:
    return replace(_NANO, about=about, model=replace(_NANO.model, **model))  # type: ignore[arg-type]


# What a CPU gets when no preset is named. Chosen on held-out training text after 60 seconds of one
# core: many small steps beat few large ones, and a schedule in seconds ends whatever the speed.
_QUICK = Preset(
    "readable text after 60 seconds of a CPU: 4 layers, d 128, context 256, batch 2",
    ModelConfig(d_model=128, n_head=4, n_kv_head=4),
    TrainConfig(context=256, batch_size=2, lr=3e-3, n_steps=100_000, time_aware=True,
                max_seconds=60.0),
)

PRESETS: dict[str, Preset] = {
    "quick_start": _QUICK,
    "mamba_byte": _BYTE,
    "mamba_byte_original": replace(
        _BYTE,
        about="MambaByte before the memory fix: context 2048, batch 64, 1500 steps",
        train=TrainConfig(context=2048, batch_size=64, n_steps=1500),
    ),
    "smoke": Preset(
        "MambaByte smoke configuration: 2 layers, d 32, context 64, batch 2, 2 steps",
        ModelConfig(d_model=32, n_layer=2, d_state=8, n_head=2, n_kv_head=2, attention_window=64),
        TrainConfig(context=64, batch_size=2, n_steps=2, log_every=1),
    ),
    "hybrid_3_1": _HYBRID,
    # The document names three SSM ablations and defines only the first (1:1). We read SSM-k as
    # k SSM layers to one of attention, which makes SSM-3 the hybrid itself.
    "ssm_1": _hybrid("ablation SSM-1: SSM and attention 1:1", "MA"),
    "ssm_2": _hybrid("ablation SSM-2, read as SSM and attention 2:1", "MMA"),
    "ssm_3": _hybrid("ablation SSM-3, read as SSM and attention 3:1", "MMMA"),
    "attention": _hybrid("the hybrid's pure attention baseline", "A"),
    "modded_nanogpt": _NANO,
    "nano_plus_ngram": Preset(
        "a transformer without biases and gains, d 256, 4 layers, 1200 steps of Muon, to be mixed "
        "with an n-gram",
        replace(_LEAN.model, d_model=256, n_layer=4, n_head=4, n_kv_head=4),
        replace(_LEAN.train, n_steps=1200),
    ),
    # modded_nanogpt with other mixers. An SSM layer of expand 2 has 6.4 d^2 weights where
    # attention has 4 d^2, so the MLP is narrowed until the parameters agree within 1 %.
    "nano_ssm": _nano("modded_nanogpt, all attention replaced by SSM", layer_pattern="M",
                      mlp_ratio=2.75),
    "nano_ssm_3_1": _nano("modded_nanogpt, SSM and attention 3:1", layer_pattern="MMMA",
                          mlp_ratio=3.0),
    "nano_ssm_1_1": _nano("modded_nanogpt, SSM and attention 1:1", layer_pattern="MA",
                          mlp_ratio=3.375),
}


PresetName = Annotated[str, one_of(lambda: {**PRESETS, **ALIASES})]
PresetOrAuto = Annotated[str, one_of(lambda: {"auto": 0, **PRESETS, **ALIASES})]


# Other names of the same, one scheme for train and task: hybrid_k_1 is k SSM layers to one of
# attention. What the second document and old records call them is still read.
ALIASES = {"hybrid_1_1": "ssm_1", "ssm_1_1": "ssm_1", "hybrid_2_1": "ssm_2",
           "nano_hybrid_1_1": "nano_ssm_1_1", "nano_hybrid_3_1": "nano_ssm_3_1"}


def get_preset(name: str) -> Preset:
    """The preset called ``name``; a UserError lists the names when there is none."""
    known = isinstance(name, str) and ALIASES.get(name, name) in PRESETS
    if not known:
        raise UserError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[ALIASES.get(name, name)]
