"""What a model is and how it is trained: two frozen dataclasses and the named presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mambabyte.errors import UserError
from mambabyte.ops import FORMS

MIXERS = {"M": "selective SSM", "A": "causal attention"}


def _at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}: it must be a finite number, 0 or more")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a byte-level language model.

    ``layer_pattern`` is cycled over ``n_layer``: "M" is a pure SSM, "MMMA" three SSM layers to
    one attention layer. Names follow the Mamba code: d_model, d_inner, d_state, d_conv, expand,
    dt_rank.
    """

    vocab_size: int = 256
    d_model: int = 192
    n_layer: int = 4
    layer_pattern: str = "M"
    # "rms_plain" is an RMS norm without weights.
    norm: Literal["layer", "rms", "rms_plain"] = "layer"

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    # "auto" is ceil(d_model / 16); "full" projects the step size from all d_inner channels.
    dt_rank: int | Literal["auto", "full"] = "auto"
    # "mamba" draws softplus(bias) log-uniformly from [dt_min, dt_max]; "linear" is torch's default.
    dt_init: Literal["mamba", "linear"] = "mamba"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    n_head: int = 6
    n_kv_head: int = 6
    qk_norm: bool = False
    rope_base: float = 10000.0
    # Share of the rotary frequencies that turn; the rest, the slowest, are 0.
    rope_fraction: float = 1.0
    # How far back attention looks, in training and in streaming: the cache never grows past it.
    attention_window: int = 1024

    # Hidden width of the MLP of every block as a multiple of d_model; 0 means no MLP.
    mlp_ratio: float = 0.0
    mlp_activation: Literal["relu2", "gelu", "silu"] = "relu2"

    embed_std: float = 0.02
    # Whether the embedding is normalised before the first layer, and is the head as well.
    embed_norm: bool = False
    tied_head: bool = True
    zero_init_out: bool = False
    logit_softcap: float = 0.0

    # Which form of the scan computes the SSM layers; see mambabyte.ops.FORMS.
    scan_form: str = "auto"
    scan_chunk: int | None = None

    def __post_init__(self) -> None:
        if not self.layer_pattern or set(self.layer_pattern) - MIXERS.keys():
            raise UserError(
                f"layer_pattern is {self.layer_pattern!r}: write M for an SSM layer and A for "
                "attention, at least one of them and nothing else, e.g. MMMA"
            )
        for name in ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand",
                     "n_head", "n_kv_head", "attention_window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("mlp_ratio", "embed_std", "logit_softcap"):
            _at_least_zero(name, getattr(self, name))
        if not (math.isfinite(self.rope_base) and self.rope_base > 0):
            raise UserError(f"rope_base is {self.rope_base}: it must be a finite number above 0")
        if self.scan_chunk is not None and self.scan_chunk < 1:
            raise UserError(f"scan_chunk is {self.scan_chunk}: it must be at least 1, or None for "
                            "the form's own")
        if isinstance(self.dt_rank, int) and self.dt_rank < 1:
            raise UserError(f"dt_rank is {self.dt_rank}: give a positive rank, 'auto' or 'full'")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise UserError(f"dt_min {self.dt_min} and dt_max {self.dt_max}: they must be finite, "
                            "with 0 < dt_min <= dt_max")
        if not 0 < self.rope_fraction <= 1:
            raise UserError(f"rope_fraction is {self.rope_fraction}: it must be in (0, 1]")
        if "A" in self.layers:
            if self.d_model % self.n_head or (self.d_model // self.n_head) % 2:
                raise UserError(
                    f"d_model {self.d_model} does not split into {self.n_head} heads of even width"
                    ": rotary positions need d_model / n_head to be an even whole number"
                )
            if self.n_head % self.n_kv_head:
                raise UserError(
                    f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
                )
        if self.scan_form != "auto" and self.scan_form not in FORMS:
            raise UserError(
                f"scan_form {self.scan_form!r} is unknown: choose auto, {', '.join(FORMS)}"
            )

    @property
    def layers(self) -> str:
        """One letter a layer: the pattern cycled over n_layer."""
        repeats = -(-self.n_layer // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.n_layer]

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def dt_rank_value(self) -> int:
        """Width of the step-size projection's input: R, or d_inner when it is "full"."""
        if self.dt_rank == "auto":
            return math.ceil(self.d_model / 16)
        return self.d_inner if self.dt_rank == "full" else int(self.dt_rank)

    @property
    def mlp_hidden(self) -> int:
        return round(self.mlp_ratio * self.d_model)

    def parameter_groups(self) -> dict[str, int]:
        """Exact parameter counts by role; a tied head counts once, as embedding."""
        d, d_in, n, r = self.d_model, self.d_inner, self.d_state, self.dt_rank_value
        m, a = self.layers.count("M"), self.layers.count("A")
        x_width = 2 * n + (0 if self.dt_rank == "full" else r)
        kv = self.n_kv_head * self.head_dim
        per_norm = {"layer": 2 * d, "rms": d, "rms_plain": 0}[self.norm]
        norms = self.n_layer * (2 if self.mlp_hidden else 1) + 1
        return {
            "embedding": self.vocab_size * d,
            **({} if self.tied_head else {"head": self.vocab_size * d}),
            "ssm_in_proj": m * d * 2 * d_in,
            "ssm_conv": m * d_in * (self.d_conv + 1),
            "ssm_x_proj": m * d_in * x_width,
            "ssm_dt_proj": m * (r * d_in + d_in),
            "ssm_A_log": m * d_in * n,
            "ssm_D": m * d_in,
            "ssm_out_proj": m * d_in * d,
            "attention": a * (2 * d * d + 2 * d * kv),
            "mlp": self.n_layer * 2 * d * self.mlp_hidden,
            "norm": norms * per_norm,
        }

    @property
    def n_parameters(self) -> int:
        return sum(self.parameter_groups().values())


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the mamba_byte recipe."""

    context: int = 1024
    batch_size: int = 16
    n_steps: int = 4000
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    # "muon" takes the matrices inside the layers, with its own rate; AdamW takes the rest.
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    # "cosine" falls to 0 over the whole run, "stable" is flat and falls over its last part.
    schedule: Literal["cosine", "stable"] = "cosine"
    decay_fraction: float = 0.4
    # The schedule ends at n_steps or at max_seconds, whichever comes first, at a rate of 0.
    time_aware: bool = False
    # Warm-up of context and batch size, by doublings from these over that share of the steps; 0
    # starts at the full size. See mambabyte.growth.
    first_context: int = 0
    first_batch_size: int = 0
    growth_fraction: float = 0.3
    grad_clip: float = 1.0
    seed: int = 0
    # Wall-clock cap of the training loop in seconds; 0 means none.
    max_seconds: float = 300.0
    # "auto" is bf16 autocast on CUDA and fp32 elsewhere; the SSM state is fp32 in either.
    # "bf16_residual" is autocast with the residual stream in bf16 as well.
    precision: Literal["auto", "fp32", "bf16", "bf16_residual"] = "auto"
    # "graph" captures the whole step as a CUDA graph, "compile" compiles the layers besides;
    # "auto" is "graph" on CUDA. "eager" is the readable definition.
    step: Literal["auto", "eager", "graph", "compile"] = "auto"
    # Over the processes of torchrun: "data" gives each the whole model, "sharded" (FSDP2) a part of
    # weights, gradients and optimizer, gathered layer by layer; its step is the eager one.
    parallel: Literal["data", "sharded"] = "data"
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    # Power in watts to subtract from a measured energy, as the task's rules do with 50 W.
    idle_watts: float = 0.0
    # Training with a scan form that is a subject of study must be asked for.
    allow_study_form: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "n_steps", "log_every", "checkpoint_every",
                     "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip", "max_seconds", "idle_watts"):
            _at_least_zero(name, getattr(self, name))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: both must be in [0, 1)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must be 0 or more")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {self.warmup_fraction}: it must be in [0, 1]")
        for first, full in (("first_context", "context"), ("first_batch_size", "batch_size")):
            if not 0 <= getattr(self, first) <= getattr(self, full):
                raise UserError(f"{first} is {getattr(self, first)}: it must be 0 or up to "
                                f"{full}, {getattr(self, full)}")
        if not 0 <= self.growth_fraction < 1:
            raise UserError(f"growth_fraction is {self.growth_fraction}: it must be in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction is {self.decay_fraction}: it must be in (0, 1]")
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"muon_momentum is {self.muon_momentum}: it must be in [0, 1)")
        if self.parallel == "sharded":
            if self.optimizer != "adamw":
                raise UserError(f"optimizer {self.optimizer!r} needs whole matrices: train sharded "
                                "with adamw")
            if self.step not in ("auto", "eager"):
                raise UserError(f"step {self.step!r} cannot be sharded: train sharded with eager")
        if self.time_aware and not self.max_seconds:
            raise UserError("a time-aware schedule needs max_seconds: how long may it take?")


@dataclass(frozen=True)
class Preset:
    """A named system: its model, its recipe, and where it comes from."""

    about: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_BYTE = Preset("MambaByte, final configuration: 4 layers, d 192, context 1024, batch 16")

# The second document's hybrid. Its code cycles (ratio SSM, 1 attention) over nine layers, takes
# the step size from a full d_inner x d_inner projection with torch's default initialisation,
# normalises queries and keys, squares a ReLU in an MLP of twice the width, zero-initialises the
# output projections and caps the logits at 30. Bytes here, 1024 sentencepiece tokens there.
_HYBRID = Preset(
    "SSM/attention hybrid 3:1: 9 layers, d 512, MLP in every block",
    ModelConfig(
        d_model=512, n_layer=9, layer_pattern="MMMA", norm="rms", dt_rank="full",
        dt_init="linear", n_head=8, n_kv_head=4, qk_norm=True, mlp_ratio=2.0,
        embed_std=0.005, zero_init_out=True, logit_softcap=30.0,
    ),
)


def _hybrid(about: str, pattern: str) -> Preset:
    return replace(_HYBRID, about=about, model=replace(_HYBRID.model, layer_pattern=pattern))


# The transformer recipe of the public speed runs (github.com/KellerJordan/modded-nanogpt) at the
# size the document gives: plain RMS norms on embedding, blocks, queries and keys, half of the
# rotary frequencies off, squared ReLU, zero-initialised projections and head, Muon. The published
# 10.84 M parameters leave 0.03 M over those we can name.
_NANO = Preset(
    "transformer recipe of the speed runs: 6 layers, d 384, Muon, stable then decay",
    ModelConfig(
        d_model=384, n_layer=6, layer_pattern="A", norm="rms_plain", n_head=6, n_kv_head=6,
        qk_norm=True, rope_base=1024.0, rope_fraction=0.5, mlp_ratio=4.0, embed_norm=True,
        tied_head=False, zero_init_out=True, logit_softcap=15.0,
    ),
    TrainConfig(
        context=1024, batch_size=32, n_steps=2150, lr=3e-3, weight_decay=0.0, warmup_fraction=0.0,
        optimizer="muon", schedule="stable", grad_clip=0.0, time_aware=True, max_seconds=290.0,
    ),
)


def _nano(about: str, n_steps: int | None = None, **model: object) -> Preset:
    train = _NANO.train if n_steps is None else replace(_NANO.train, n_steps=n_steps)
    return Preset(about, replace(_NANO.model, **model), train)  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = {
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
    "nano_plus_ngram": _nano(
        "the recipe of modded_nanogpt at d 256, 4 layers, 1200 steps, to be mixed with an n-gram",
        n_steps=1200, d_model=256, n_layer=4, n_head=4, n_kv_head=4,
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


def get_preset(name: str) -> Preset:
    """The preset called ``name``; a UserError lists the names when there is none."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
