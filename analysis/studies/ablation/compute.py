"""Study: SSM, attention and hybrids at equal parameters and at equal cost.

Every layer pattern is brought to one parameter count (see analysis.theory.matching) and trained on
the same batches from the same seeds. One run gives a curve of held-out bits per byte, and each
comparison reads all curves at one budget: the same steps (the same bytes), the same wall-clock
time, the same floating-point operations, the same joules. The budget is what the cheapest system's
whole run costs, so no curve is read past its end. Only then are systems compared, seed by seed
(analysis.measure.statistics).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch

from analysis.measure.parallel import run_jobs
from analysis.measure.threads import threads
from analysis.studies.ablation import tokens as sp
from analysis.studies.ablation import variants as second
from analysis.studies.ablation.budgets import Runs, budget_steps, compare
from analysis.studies.ablation.documents import document_checks
from analysis.studies.ablation.few_steps import few_steps
from analysis.studies.ablation.learning import (
    Learned,
    heldout_bits,
    heldout_windows,
    learn_text,
)
from analysis.studies.ablation.synthetic import learn_task, parse_task
from analysis.studies.ablation.tables import (
    accuracy_by_position,
    curves_table,
    differences_table,
    positions_table,
    runs_table,
    unigram_bits,
    with_quality,
)
from analysis.studies.ablation.values import headline
from analysis.theory.flops import count_flops, flops_table
from analysis.theory.matching import GPU_WIDTHS, Matched, match_patterns, systems_table
from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.corpus import Corpus, load_corpus
from mambabyte.errors import UserError
from mambabyte.evaluate import score
from mambabyte.train import text_batches
from mambabyte.train.schedule import schedule

__all__ = ["PROFILES", "Parameters", "Results", "headline", "run"]


@dataclass(frozen=True)
class Parameters:
    """What is compared and how long. Defaults are the quick profile: a CPU and about a minute."""

    corpus: str = "stdlib"
    device: str = "cpu"
    threads: int = 1  # of torch on the CPU; 0 leaves torch's own choice
    preset: str = "mamba_byte"  # norm, initialisation and the rest come from here
    patterns: tuple[str, ...] = ("M", "MMMA", "MA", "A")
    reference: str = "A"  # what the others are compared with, seed by seed
    match: Literal["mlp", "d_model"] = "mlp"
    d_model: int = 48
    n_layer: int = 4
    n_head: int = 2
    n_kv_head: int = 2
    context: int = 128
    batch_size: int = 4
    steps: int = 100
    lr: float = 3e-3
    # True: a cosine to zero and one run a budget. False: a constant rate, one run for all.
    decay: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    # How a step of the compared systems is run, as TrainConfig.step; on a CPU always eager.
    step: Literal["auto", "eager", "graph", "compile"] = "auto"
    max_seconds: float = 20.0  # of one run; 0 is no limit
    heldout_windows: int = 24
    characters: int = 300
    streams: int = 8
    stream_bytes: int = 1024
    tasks: tuple[str, ...] = ("recall 4", "copy 8")
    task_symbols: int = 8
    task_layers: int = 2
    task_steps: int = 200
    task_batch: int = 64
    task_seeds: tuple[int, ...] = (0,)
    variants: tuple[str, ...] = tuple(second.VARIANTS)
    variant_pattern: str = "MA"
    variant_steps: int = 30
    variant_seeds: tuple[int, ...] = (0,)
    # sp1024 needs the package sentencepiece; 0 pieces leave it out.
    pieces: int = 0
    piece_train_bytes: int = 2_000_000
    # The second document's few large steps, on pieces, at its own widths; 0 leaves them out.
    few_steps: int = 0
    few_tokens: int = 524_288
    few_presets: tuple[str, ...] = ("ssm_1", "hybrid_3_1", "attention")
    # Trainings whose time does not count (tasks, variants, pieces) that run beside each other.
    workers: int = 1

    def __post_init__(self) -> None:
        if len(self.patterns) < 2 or len(set(self.patterns)) < len(self.patterns):
            raise UserError(f"patterns are {', '.join(self.patterns) or 'none'}: a comparison "
                            "needs two or more, each once")
        if self.reference not in self.patterns:
            raise UserError(f"reference {self.reference!r} is not among the patterns "
                            f"{', '.join(self.patterns)}")
        if not self.seeds:
            raise UserError("no seeds are given: name at least one")
        for name in ("steps", "batch_size", "heldout_windows", "streams"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.context < 4:
            raise UserError(f"context is {self.context}: it must be at least 4, as quality along a "
                            "stream is shown from a quarter of it on")
        if self.stream_bytes < 2 * self.context:
            raise UserError(f"stream_bytes is {self.stream_bytes}: drift shows only past the "
                            f"context, give at least {2 * self.context}")
        for name in self.variants:
            second.get_variant(name)
        for name in self.tasks:
            parse_task(name, self.task_symbols)


_FULL = Parameters(
    # Heads of 64: attention's kernels are slower at 32 and at 48.
    corpus="wikitext103", device="cuda", threads=0, d_model=192, n_layer=4, n_head=3, n_kv_head=3,
    context=1024, batch_size=16, steps=1000, lr=1e-3, decay=True, seeds=(0, 1, 2, 3, 4),
    # Captured alone, attention would be judged by what its elementwise operations move.
    step="compile", max_seconds=0.0, heldout_windows=128, characters=10_000, streams=8,
    stream_bytes=60_000, tasks=("recall 8", "recall 16", "copy 32"), task_symbols=32,
    task_layers=4, task_steps=1500, task_seeds=(0, 1, 2),
    # The rounded state is a Python loop over the length: the quick profile shows it.
    variants=tuple(v for v in second.VARIANTS if v != "bf16 state"), variant_pattern="MMMA",
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


def run(p: Parameters, report: Callable[[str], None] = lambda line: None) -> Results:
    """The whole study. Nothing is drawn and nothing is written."""
    if p.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: set device to cpu, or use the quick profile")
    with threads(p.threads):
        return _run(p, report)


def _run(p: Parameters, report: Callable[[str], None]) -> Results:
    corpus = load_corpus(p.corpus, report)
    text = None
    if p.pieces:  # first: it may refuse the text, and what follows takes long
        report(f"training {p.pieces} pieces on {p.piece_train_bytes:,} bytes of the training split")
        vocabulary = sp.train_pieces(bytes(corpus.train[: p.piece_train_bytes]), p.pieces)
        text = sp.encode_corpus(vocabulary, corpus, p.piece_train_bytes)
    systems = match_patterns(base_config(p), p.patterns, by=p.match, multiple=_multiple(p))
    table = systems_table(systems, p.context)
    flops = dict(zip(table["pattern"], table["train_flops_per_byte"], strict=True))
    windows = heldout_windows(corpus.valid, p.context, p.heldout_windows)

    learned: Runs = {}
    for seed in p.seeds:  # patterns take turns, so a slow minute hits all of them
        for pattern, matched in systems.items():
            done = _learn(p, matched.config, corpus, seed, p.steps, windows)
            learned[pattern, seed, p.steps] = done
            report(f"{pattern} seed {seed}: {done.curve[-1][1]:.3f} bits/byte after {done.steps} "
                   f"steps of {1e3 * done.step_seconds:.0f} ms")
    per_step = p.context * p.batch_size
    budgets = budget_steps(learned, flops, per_step)
    for row in budgets.itertuples():
        if p.decay and row.steps is not None:  # a decaying rate must end where its budget ends
            for seed in p.seeds:
                key = (row.pattern, seed, int(row.steps))
                if key not in learned:
                    report(f"{row.pattern} seed {seed}: {row.steps} steps for equal "
                           f"{row.comparison}")
                    learned[key] = _learn(p, systems[row.pattern].config, corpus, seed,
                                          int(row.steps), windows)
    comparisons = compare(learned, budgets, p.steps)
    tokens, few = run_tokens(p, systems, learned, corpus, text, report)
    report("characters, positions")
    trained = {(pattern, seed): learned[pattern, seed, p.steps].model.eval()
               for pattern in p.patterns for seed in p.seeds}
    streams = heldout_windows(corpus.valid, min(p.stream_bytes, len(corpus.valid) - 1), p.streams)
    scores = {key: score(done.model, corpus.valid, p.characters)
              for key, done in learned.items() if key[2] == p.steps and p.characters}
    return Results(
        systems=with_quality(table, comparisons, trained, p.context),
        runs=runs_table(learned, flops, per_step, scores),
        curves=curves_table(learned, flops, per_step, p.steps),
        comparisons=comparisons,
        paired=differences_table(comparisons, p.patterns, p.reference),
        positions=positions_table(trained, streams, p.context),
        accuracy=accuracy_by_position(scores, p.context),
        unigram_bits=unigram_bits(corpus.train, windows),
        tasks=run_tasks(p, report),
        variants=run_variants(p, corpus, windows, report),
        tokens=tokens,
        few_steps=few,
        flops=pd.concat([flops_table(m.config, p.context).assign(pattern=name)
                         for name, m in systems.items()], ignore_index=True),
        flop_check=check_flops(p, systems),
        state_dtypes=second.published_state_dtypes(),
        documents=document_checks(),
    )


def check_flops(p: Parameters, systems: dict[str, Matched]) -> pd.DataFrame:
    """Closed form over counter for every pattern, on one short window: the ratio does not depend
    on its length.
    """
    return pd.concat([
        count_flops(replace(m.config, scan_form="auto"), min(p.context, 64)).assign(pattern=name)
        for name, m in systems.items()], ignore_index=True)


def _multiple(p: Parameters) -> int:
    return GPU_WIDTHS if p.device.startswith("cuda") else 1


def base_config(p: Parameters) -> ModelConfig:
    """The preset at the study's width and depth; attention looks back one training context."""
    return replace(
        get_preset(p.preset).model, d_model=p.d_model, n_layer=p.n_layer, n_head=p.n_head,
        n_kv_head=p.n_kv_head, attention_window=p.context)


def recipe(p: Parameters, seed: int, steps: int) -> TrainConfig:
    return replace(get_preset("mamba_byte").train, context=p.context, batch_size=p.batch_size,
                   n_steps=steps, lr=p.lr, seed=seed, warmup_fraction=0.1)


def _learn(
    p: Parameters, config: ModelConfig, corpus: Corpus, seed: int, steps: int,
    windows: torch.Tensor,
) -> Learned:
    return learn_text(
        config, replace(recipe(p, seed, steps), step=p.step), corpus.train, device=p.device,
        decay=p.decay, windows=windows, max_seconds=p.max_seconds)


def run_tasks(p: Parameters, report: Callable[[str], None]) -> pd.DataFrame:
    """Accuracy on the synthetic tasks. A pattern that equals another at this depth is left out."""
    # Embeddings of unit length: at the text models' 0.02 the blocks' outputs drown the symbols.
    base = replace(base_config(p), n_layer=p.task_layers, embed_std=p.d_model**-0.5)
    patterns: dict[str, str] = {}  # layers -> pattern, the first that gives them
    for pattern in p.patterns:
        patterns.setdefault(replace(base, layer_pattern=pattern).layers, pattern)
    systems = match_patterns(base, tuple(patterns.values()), by=p.match, multiple=_multiple(p))
    jobs = [(p, name, pattern, matched.config, seed)
            for name in p.tasks for pattern, matched in systems.items() for seed in p.task_seeds]
    rows = []
    for done in run_jobs(_task_rows, jobs, p.workers):
        last = done[-1]
        report(f"{last['task']} {last['size']} {last['pattern']} seed {last['seed']}: accuracy "
               f"{last['accuracy']:.2f} after {last['step']} steps")
        rows += done
    return pd.DataFrame(rows)


def _task_rows(
    p: Parameters, name: str, pattern: str, config: ModelConfig, seed: int
) -> list[dict[str, object]]:
    """The curve of one model on one task."""
    task = parse_task(name, p.task_symbols)
    with threads(p.threads):
        curve = learn_task(
            config, task, steps=p.task_steps, batch=p.task_batch, lr=p.lr, seed=seed,
            device=p.device, check_every=max(1, p.task_steps // 10))
    return [{"task": task.name, "size": task.size, "pattern": pattern, "layers": config.layers,
             "seed": seed, "step": step, "accuracy": accuracy, "chance": task.chance,
             "final": step == curve[-1][0]} for step, accuracy in curve]


def run_variants(
    p: Parameters, corpus: Corpus, windows: torch.Tensor, report: Callable[[str], None]
) -> pd.DataFrame:
    """The second document's choices one at a time, in a small hybrid with MLPs."""
    base = replace(base_config(p), layer_pattern=p.variant_pattern, norm="rms", qk_norm=True,
                   mlp_ratio=2.0, logit_softcap=30.0)
    jobs = [(p, base, name, seed, corpus, windows)
            for seed in p.variant_seeds for name in p.variants]
    rows = []
    for row in run_jobs(_variant_row, jobs, p.workers):
        report(f"variant {row['variant']}, seed {row['seed']}: {row['bits_per_byte']:.3f}")
        rows.append(row)
    frame = pd.DataFrame(rows)
    if frame.empty or "field" not in set(frame["variant"]):
        return frame
    baseline = frame[frame["variant"] == "field"].set_index("seed")["bits_per_byte"]
    return frame.assign(
        difference_to_field=frame["bits_per_byte"] - frame["seed"].map(baseline))


def _variant_row(
    p: Parameters, base: ModelConfig, name: str, seed: int, corpus: Corpus, windows: torch.Tensor
) -> dict[str, object]:
    """One training of one variant."""
    variant, settings = second.get_variant(name), recipe(p, seed, p.variant_steps)
    with threads(p.threads):
        model = second.build(base, variant, seed, p.device)
        probe = windows[:4, :-1].to(p.device)
        life = second.memory_half_life(model, probe)
        losses = second.train_variant(
            model, variant, settings, text_batches(corpus.train, settings, p.device),
            partial(schedule, config=settings))
        return {
            "variant": name, "about": variant.about, "seed": seed,
            "n_parameters": model.config.n_parameters, "steps": len(losses),
            "half_life_bytes_at_start": life, "bits_per_byte": heldout_bits(model, windows),
            "half_life_bytes_at_end": second.memory_half_life(model, probe),
        }


def run_tokens(
    p: Parameters, systems: dict[str, Matched], learned: Runs, corpus: Corpus,
    text: sp.PieceText | None, report: Callable[[str], None],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same systems on subword pieces, and the second document's few large steps.

    Bits are per raw byte, beside those of the same system on bytes, which has seen the same number
    of raw bytes and reads the same held-out text as one stream. Both empty without pieces.
    """
    if text is None:
        return pd.DataFrame(), pd.DataFrame()
    per_step = p.context * p.batch_size
    rows = []
    jobs = [(p, text, pattern, matched.config, seed,
             text.steps_for(learned[pattern, seed, p.steps].steps * per_step, per_step))
            for pattern, matched in systems.items() for seed in p.seeds]
    for row in run_jobs(_pieces_row, jobs, p.workers):
        pattern, seed = row["pattern"], row["seed"]
        on_bytes = learned[pattern, seed, p.steps]
        byte_bits = sp.score_stream(
            on_bytes.model, text.held_bytes, len(text.held_bytes), p.device)
        rows.append({
            **row, "n_parameters_on_bytes": systems[pattern].config.n_parameters,
            "trained_bytes_on_bytes": on_bytes.steps * per_step,
            "bits_per_byte_on_bytes": byte_bits,
            "pieces_minus_bytes": row["bits_per_raw_byte"] - byte_bits})
        report(f"sp{p.pieces} {pattern} seed {seed}: {row['bits_per_raw_byte']:.3f} bits per raw "
               f"byte, on bytes {byte_bits:.3f}")
    few = pd.DataFrame()
    if p.few_steps:
        few = few_steps(
            {name: get_preset(name).model for name in p.few_presets}, text.pieces, corpus,
            steps=p.few_steps, tokens_per_step=p.few_tokens, context=p.context,
            train_bytes=p.piece_train_bytes, device=p.device, report=report)
    return pd.DataFrame(rows), few


def _pieces_row(
    p: Parameters, text: sp.PieceText, pattern: str, config: ModelConfig, seed: int, steps: int
) -> dict[str, Any]:
    """One training on pieces."""
    with threads(p.threads):
        row = sp.learn_pieces(text, config, recipe(p, seed, steps), p.device, p.decay)
    return {"pattern": pattern, "seed": seed, **row}
