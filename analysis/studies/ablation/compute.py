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
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from analysis.measure.parallel import run_jobs
from analysis.measure.threads import threads
from analysis.studies.ablation import Parameters, Results, get_variant
from analysis.studies.ablation import tokens as sp
from analysis.studies.ablation import variants as second
from analysis.studies.ablation.budgets import Runs, budget_steps, compare
from analysis.studies.ablation.documents import document_checks
from analysis.studies.ablation.learning import (
    Learned,
    heldout_bits,
    heldout_windows,
    learn_text,
)
from analysis.studies.ablation.synthetic import learn_task, parse_task
from analysis.studies.ablation.tables import differences_table
from analysis.studies.ablation.trained import (
    accuracy_by_position,
    curves_table,
    positions_table,
    runs_table,
    text_table,
    unigram_bits,
    with_quality,
)
from analysis.theory.flops import count_flops, flops_table
from analysis.theory.matching import GPU_WIDTHS, Matched, match_patterns, systems_table
from analysis.theory.sizes import at_size
from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.corpus import Corpus, load_corpus
from mambabyte.evaluate import score
from mambabyte.train import text_batches
from mambabyte.train.schedule import schedule


def run(p: Parameters, report: Callable[[str], None] = lambda line: None) -> Results:
    """The whole study. Nothing is drawn and nothing is written."""
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
        text=text_table(trained, windows, p.reference),
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
    return at_size(get_preset(p.preset).model, p.d_model, p.n_layer, p.n_head, p.n_kv_head,
                   attention_window=p.context)


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
    variant, settings = get_variant(name), recipe(p, seed, p.variant_steps)
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
        few = sp.few_steps(
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
