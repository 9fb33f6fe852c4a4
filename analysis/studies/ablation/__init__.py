"""Study: SSM, attention and hybrids at equal parameters and at equal cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pandas as pd

from mambabyte.config import get_preset
from mambabyte.config.checks import (
    Checked,
    Count,
    CountOrNone,
    Device,
    Layers,
    NotNegative,
    Positive,
    Rule,
    Seed,
    Threads,
    Workers,
    between,
    entries,
    one_of,
)
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.presets import PresetName
from mambabyte.errors import UserError

TITLE = "SSM, attention and hybrids"
QUESTION = "Which mix of SSM and attention layers predicts bytes best, at equal cost?"
NOTEBOOK = "04_ssm_vs_attention.ipynb"
TIMED = True

COMPARISONS = ("steps", "wall-clock", "FLOPs", "joules")  # what is equal in each
PUBLISHED_MATRIX_LR = 0.04  # Muon
PUBLISHED_EMBED_LR = 0.05
PUBLISHED_EMBED_STD = 0.005
PUBLISHED_SCALAR_LR = 0.04  # vectors: biases, gains, D
PUBLISHED_MOMENTUM_STEPS = 500  # of Muon, from 0.85 to 0.95
# What the script has around its layers: see ModelConfig.
PUBLISHED_PARTS = {"norm": "rms_plain", "embed_norm": True, "qk_gain": 1.5, "block_scales": True,
                   "residual_mix": True, "unet_skips": True}


@dataclass(frozen=True)
class Variant:
    """One change to the baseline: of the model's configuration, its storage or its optimizer."""

    about: str
    model: dict[str, Any] = field(default_factory=dict)
    embed_lr: float = 0.0  # 0: as all others
    scalar_lr: float = 0.0  # of what has one axis, likewise
    momentum_steps: int = 0  # over which Muon's momentum rises
    muon: bool = False  # 2-D parameters of the blocks, A_log left out
    muon_a_log: bool = False
    frozen_taps: bool = False
    bf16_weights: bool = False
    bf16_state: bool = False


VARIANTS: dict[str, Variant] = {
    "field": Variant("the Mamba paper's choices throughout, AdamW"),
    "dt full rank": Variant("dt from a d_inner x d_inner projection", {"dt_rank": "full"}),
    "dt torch init": Variant("dt starts near 0.69, not in [0.001, 0.1]", {"dt_init": "linear"}),
    "zero out_proj": Variant("output projections start at zero", {"zero_init_out": True}),
    "embedding std": Variant("tied embedding starts at std 0.005",
                             {"embed_std": PUBLISHED_EMBED_STD}),
    "embedding rate": Variant("tied embedding trains at 0.05", embed_lr=PUBLISHED_EMBED_LR),
    "Muon": Variant("matrices by Muon at 0.04, A_log by AdamW", muon=True),
    "Muon with A_log": Variant("matrices and A_log by Muon", muon=True, muon_a_log=True),
    "gains and skips": Variant("gains on branches and queries, embedding normalised and mixed into "
                               "every layer, skips across the middle", PUBLISHED_PARTS),
    "scalar rate": Variant("vectors train at 0.04", scalar_lr=PUBLISHED_SCALAR_LR),
    "frozen taps": Variant("convolution taps in no optimizer", frozen_taps=True),
    "bf16 weights": Variant("dt, B, C, taps, embedding and A_log stored in bfloat16",
                            bf16_weights=True),
    "bf16 state": Variant("the state rounded to bfloat16 at every step", bf16_state=True),
    "published": Variant(
        "all of the script's choices, but for arithmetic in the weights that it stores in bfloat16 "
        "(its state is float32 after one step)",
        {"dt_rank": "full", "dt_init": "linear", "zero_init_out": True,
         "embed_std": PUBLISHED_EMBED_STD, **PUBLISHED_PARTS},
        embed_lr=PUBLISHED_EMBED_LR, scalar_lr=PUBLISHED_SCALAR_LR, muon=True, muon_a_log=True,
        momentum_steps=PUBLISHED_MOMENTUM_STEPS, frozen_taps=True, bf16_weights=True),
}


def get_variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise UserError(f"variant {name!r} is unknown: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


TASKS = ("recall", "copy")  # see analysis.studies.ablation.synthetic


def task_size(text: str) -> tuple[str, int]:
    """Kind and size of a task written such as ``recall 4`` or ``copy 16``."""
    kind, _, size = text.partition(" ")
    if not size.isdigit():
        raise UserError(f"task {text!r}: write a kind and a size, such as 'recall 4' or 'copy 16'")
    if kind not in TASKS:
        raise UserError(f"task {kind!r} is unknown: choose one of {', '.join(TASKS)}")
    return kind, int(size)


def _is_task(text: str) -> bool:
    kind, _, size = text.partition(" ")
    return kind in TASKS and size.isascii() and size.isdigit() and 0 < int(size) < 10_000


TaskName = Annotated[str, Rule(_is_task, lambda: f"a kind ({', '.join(TASKS)}) and a size, such as "
                               "'recall 4'")]
VariantName = Annotated[str, one_of(lambda: VARIANTS)]
Seeds = Annotated[tuple[Seed, ...], entries()]


@dataclass(frozen=True)
class Parameters(Checked):
    """What is compared and how long. Defaults are the quick profile: a CPU and about a minute."""

    corpus: str = "stdlib"
    """text: stdlib, wikitext103, a folder or a file"""
    device: Device = "cpu"
    """where it runs: cpu, cuda or cuda:N"""
    threads: Threads = 1
    """of torch on the CPU; 0 leaves torch's own choice"""
    preset: PresetName = "mamba_byte"
    """norm, initialisation and the rest come from here"""
    patterns: Annotated[tuple[LayerPattern, ...], entries(2)] = ("M", "MMMA", "MA", "A")
    """layer patterns that are compared"""
    reference: LayerPattern = "A"
    """what the others are compared with, seed by seed"""
    match: Literal["mlp", "d_model"] = "mlp"
    """what makes the parameters equal: mlp or d_model"""
    d_model: Count = 48
    """width"""
    n_layer: Layers = 4
    """layers"""
    n_head: Count = 2
    """heads of attention"""
    n_kv_head: Count = 2
    """its heads of keys and values"""
    context: Annotated[int, between(4, 10**9)] = 128
    """bytes of a window; quality along a stream is shown from a quarter of it on"""
    batch_size: Count = 4
    """windows of a step"""
    steps: Count = 20
    """training steps of a compared system"""
    lr: Positive = 3e-3
    """largest learning rate"""
    decay: bool = False
    """a cosine to 0 and a run for each budget, or a constant rate and one for all"""
    seeds: Seeds = (0, 1, 2)
    """a training of every system for each"""
    step: Literal["auto", "eager", "graph", "compile"] = "auto"
    """how a step is run: auto, eager, graph, compile; on a CPU always eager"""
    max_seconds: NotNegative = 20.0
    """of one training; 0 is no limit"""
    heldout_windows: Count = 24
    """windows of held-out text"""
    characters: CountOrNone = 60
    """characters whose greedy prediction is scored; 0 scores none"""
    streams: Count = 4
    """long streams on which drift is measured"""
    stream_bytes: Count = 512
    """bytes of each, at least two contexts"""
    tasks: Annotated[tuple[TaskName, ...], entries(0)] = ("recall 4", "copy 8")
    """synthetic tasks, kind and size; may be empty"""
    task_symbols: Annotated[int, between(2, 10_000)] = 8
    """symbols of a task"""
    task_layers: Layers = 2
    """layers of its models"""
    task_steps: Count = 80
    """training steps of a task"""
    task_batch: Count = 64
    """samples of a step"""
    task_seeds: Seeds = (0,)
    """a training on every task for each"""
    variants: Annotated[tuple[VariantName, ...], entries(0)] = tuple(VARIANTS)
    """choices of the second document, one at a time; may be empty"""
    variant_pattern: LayerPattern = "MA"
    """layer pattern of the variants"""
    variant_steps: Count = 8
    """training steps of a variant"""
    variant_seeds: Seeds = (0,)
    """a training of every variant for each"""
    pieces: CountOrNone = 0
    """sentencepiece vocabulary; 0 leaves pieces out"""
    piece_train_bytes: Count = 2_000_000
    """bytes of text on which pieces are trained"""
    few_steps: CountOrNone = 0
    """the second document's few large steps, on pieces; 0 leaves them out"""
    few_tokens: Count = 524_288
    """tokens of such a step"""
    few_presets: Annotated[tuple[PresetName, ...], entries()] = (
        "ssm_1", "hybrid_3_1", "attention")
    """systems that are trained so"""
    workers: Workers = 2
    """trainings beside each other whose time does not count (tasks, variants, pieces)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in self.patterns:
            raise UserError(f"reference is {self.reference!r}: expected one of the patterns, "
                            f"{', '.join(self.patterns)}")
        if self.stream_bytes < 2 * self.context:
            raise UserError(f"stream_bytes is {self.stream_bytes}: expected {2 * self.context} or "
                            "more, twice the context, as drift shows only past it")
        for text in self.tasks:
            kind, size = task_size(text)
            if kind == "recall" and size > self.task_symbols:
                raise UserError(f"tasks has {text!r}: expected at most task_symbols, "
                                f"{self.task_symbols}, as keys are distinct")
        for pattern in (*self.patterns, self.variant_pattern):  # refused here if it has no model
            replace(get_preset(self.preset).model, d_model=self.d_model, n_layer=self.n_layer,
                    n_head=self.n_head, n_kv_head=self.n_kv_head, layer_pattern=pattern)


_FULL = Parameters(
    # Heads of 64: attention's kernels are slower at 32 and at 48.
    corpus="wikitext103", device="cuda", threads=0, d_model=192, n_layer=4, n_head=3, n_kv_head=3,
    context=1024, batch_size=16, steps=1000, lr=1e-3, decay=True, seeds=(0, 1, 2, 3, 4),
    # Captured alone, attention would be judged by what its elementwise operations move.
    step="compile", max_seconds=0.0, heldout_windows=128, characters=10_000, streams=8,
    stream_bytes=60_000, tasks=("recall 8", "recall 16", "copy 32"), task_symbols=32,
    task_layers=4, task_steps=1500, task_seeds=(0, 1, 2),
    # The rounded state is a Python loop over the length: the quick profile shows it.
    variants=tuple(v for v in VARIANTS if v != "bf16 state"), variant_pattern="MMMA",
    variant_steps=400, variant_seeds=(0, 1, 2), pieces=1024, piece_train_bytes=20_000_000,
    few_steps=5, workers=8,
)
PROFILES = {
    "quick": Parameters(),
    "full": _FULL,
    # The second document's four systems at its own widths, matched in parameters.
    "full_hybrid": replace(
        _FULL, preset="hybrid_3_1", patterns=("A", "MA", "MMA", "MMMA"), d_model=512, n_layer=9,
        n_head=8, n_kv_head=4, steps=400, decay=False, streams=2, tasks=(), variants=(), pieces=0,
        few_steps=0),
}


@dataclass(frozen=True)
class Results:
    """Tables of the study; ``None`` in a cell means that it was not measured."""

    systems: pd.DataFrame  # size, cost and state of every pattern
    runs: pd.DataFrame  # one row a trained model
    curves: pd.DataFrame  # held-out bits per byte along every run
    comparisons: pd.DataFrame  # bits per byte of every run at every budget
    paired: pd.DataFrame  # differences to the reference over seeds
    text: pd.DataFrame  # what the held-out text leaves open, at equal steps
    positions: pd.DataFrame  # by position in a long stream
    accuracy: pd.DataFrame  # greedy character accuracy by position in the scored stream, means
    unigram_bits: float  # held-out bits per byte of the training split's byte frequencies
    tasks: pd.DataFrame
    variants: pd.DataFrame
    tokens: pd.DataFrame  # empty without pieces
    few_steps: pd.DataFrame  # empty without pieces
    flops: pd.DataFrame  # operations by module, every pattern
    flop_check: pd.DataFrame  # the closed form beside torch's counter
    state_dtypes: pd.DataFrame  # of the second document's loop, step by step
    documents: pd.DataFrame  # statements that arithmetic judges
