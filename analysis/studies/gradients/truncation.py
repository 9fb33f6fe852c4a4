"""What truncated training costs: recall of a symbol that no gradient ever joined to its query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.runs.frames import in_words
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.model import ByteLM
from mambabyte.model.mixer import LayerState, detached
from mambabyte.train import EagerStep, optimise

SYMBOLS = 4  # of the recall task: 0..3 distractors, 4..7 marked symbols, 8 the query
QUERY = 2 * SYMBOLS
LEARNED = 0.1  # nats: recall is learned once the mean loss of WINDOW steps is below
WINDOW = 20
PEAK_LR = 1e-2


def recall_batch(
    rng: np.random.Generator, batch: int, length: int, nearest: int = 1
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A marked symbol among distractors, asked for at the end: (tokens, answer, distance).

    The marked symbol stands ``nearest`` or more steps before the query, the last token. Recall
    needs the model to let the marked symbol alone into its state and to keep it there.
    """
    tokens = rng.integers(0, SYMBOLS, (batch, length))
    at = rng.integers(0, length - nearest, batch)
    answer = rng.integers(0, SYMBOLS, batch)
    tokens[np.arange(batch), at] = SYMBOLS + answer
    tokens[:, -1] = QUERY
    return torch.from_numpy(tokens), torch.from_numpy(answer), length - 1 - at


def last_logits(model: ByteLM, tokens: Tensor, segment: int) -> Tensor:
    """Logits (B, SYMBOLS) at the query, the state detached after every ``segment`` steps."""
    state: list[LayerState] | None = None
    logits = tokens
    for start in range(0, tokens.shape[1], segment):
        logits, state = model(tokens[:, start : start + segment], state)
        state = [detached(s) for s in state]
    return logits[:, -1, :SYMBOLS]


def recall_frame(
    seeds: Sequence[int], segments: Sequence[int], length: int, far: int, steps: int,
    report: Callable[[str], None],
) -> pd.DataFrame:
    """Accuracy of recall by distance after training with carries cut every so many steps.

    Two tasks. In "any distance" the symbol may stand next to the query, so a model can learn what
    to keep within one segment and carry it further than any gradient went. In "far only" it
    stands more than ``far`` steps before: no segment up to that length ever joins the two. Chance
    is 1 in 4. Every model trains for ``steps`` steps on texts of ``length``; "steps to learn" is
    when it had learned (see LEARNED), None if it never did.
    """
    rows = []
    for seed in seeds:
        for task, nearest in (("any distance", 1), ("far only", far + 1)):
            for segment in segments:
                if task == "far only" and segment < far:
                    continue  # shorter than a length that already cannot
                model, losses = train_recall(segment, nearest, length, steps, seed)
                learned = steps_to_learn(losses)
                report(f"recall, {task}, gradient reaches {segment} steps, seed {seed}: "
                       f"loss {np.mean(losses[-WINDOW:]):.3f}")
                rng = np.random.default_rng([seed, 2**31])
                with torch.no_grad():
                    tokens, answer, distance = recall_batch(rng, 4096, length)
                    last = last_logits(model, tokens, length)
                right = (last.argmax(-1) == answer).numpy()
                width = max(1, length // 8)
                for low in range(0, length, width):
                    inside = (distance > low) & (distance <= low + width)
                    if inside.any():
                        rows.append({
                            "task": task, "gradient reaches, steps": segment, "seed": seed,
                            "distance up to, steps": low + width,
                            "accuracy": float(right[inside].mean()),
                            "steps to learn": learned})
    frame = pd.DataFrame(rows)
    # dtype object keeps None, "never", apart from nan.
    frame["steps to learn"] = pd.Series([row["steps to learn"] for row in rows], dtype=object)
    return frame


def steps_to_learn(losses: Sequence[float]) -> int | None:
    """Steps after which the mean loss of the last WINDOW of them is below LEARNED; None: never."""
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
    below = np.flatnonzero(means < LEARNED)
    return int(below[0]) + WINDOW if len(below) else None


def train_recall(
    segment: int, nearest: int, length: int, steps: int, seed: int
) -> tuple[ByteLM, list[float]]:
    """A small SSM trained on recall, carries cut after every ``segment`` steps; its losses, nats.
    """
    torch.manual_seed(seed)
    model = ByteLM(ModelConfig(vocab_size=QUERY + 1, d_model=32, n_layer=1, d_state=8,
                               embed_std=0.5))
    recipe = TrainConfig(n_steps=steps, precision="fp32")
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "peak_lr": PEAK_LR}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng([seed, 1])
    step = EagerStep(
        model, optimizer, lambda number: recall_batch(rng, 32, length, nearest)[:2], recipe,
        loss=lambda tokens, answer: F.cross_entropy(last_logits(model, tokens, segment), answer))
    losses: list[float] = []
    optimise(step, lambda number: min(1.0, (number + 1) / 20, 2 * (steps - number) / steps), steps,
             after=lambda done: losses.append(step.read().loss))
    return model, losses


def learning_frame(recall: pd.DataFrame) -> pd.DataFrame:
    """One row a training: steps to learn, "never" where it did not, and accuracy over all
    distances."""
    runs = recall.groupby(["task", "gradient reaches, steps", "seed"], as_index=False).agg(
        {"steps to learn": "first", "accuracy": "mean"})
    return in_words(runs, "steps to learn", "never")
