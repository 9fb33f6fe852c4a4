"""Training a model on one of the tasks: the step that text has, on samples drawn in the step.

A model climbs a ladder: it is trained on the smallest size until it has solved it, or to the end
of the schedule, then on the next. What a size asks, such as to compare keys at all, is found in
hundreds of steps where a sample is short; in long ones, of mixed sizes too, attention stays at a
guesser's accuracy for thousands (docs/log/studies.md).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import Cell
from analysis.studies.arena.trainings.tasks import Task, parse_task
from analysis.theory.matching import GPU_WIDTHS, match_patterns
from analysis.theory.sizes import at_size
from analysis.theory.step_memory import state_bytes
from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.config.provenance import commit
from mambabyte.model import ByteLM
from mambabyte.model.lm import embed
from mambabyte.train import autocast, optimise
from mambabyte.train.captured import CapturedStep, prepare
from mambabyte.train.optim import Optimizer, make_optimizer
from mambabyte.train.schedule import schedule

SOLVED = 0.99  # accuracy at which a size is left for the next one
NOTHING = 0.1  # of the way from chance to 1: who learned less is not trained on larger sizes
TESTED = 256  # samples of each size at the end, and half of them on the way
ANSWERS = 1024  # of a step, from which on it has fewer samples
FEWEST = 8  # of a step
LOOK_EVERY = 100  # steps between two looks at the accuracy
HEAD = 64  # channels of a head where the width allows: the one that the GPU's kernels have


def task_config(p: Parameters, system: str, width: int, task: Task) -> ModelConfig:
    """A small model for a task, as many parameters as the others have; its attention looks back
    over whole samples."""
    longest = max(task.length(size) for size in (*task.sizes, *task.beyond))
    base = at_size(
        get_preset("mamba_byte").model, width, p.task_layers, max(1, width // HEAD),
        attention_window=longest, vocab_size=task.vocab_size,
        # Embeddings of unit length: at the text models' 0.02 layers' outputs drown the symbols.
        embed_std=width**-0.5)
    multiple = GPU_WIDTHS if p.device.startswith("cuda") else 1
    systems = tuple(dict.fromkeys(p.task_systems))
    return match_patterns(base, systems, multiple=multiple)[system].config


def learn_task(p: Parameters, cell: Cell, device: str) -> dict[str, Any]:
    """The row of a training on a task: the accuracy on each size when the model had been trained on
    it, and the mean share of wrong answers on other samples, by which a rate is chosen."""
    task = parse_task(cell.kind)
    config = task_config(p, cell.system, int(cell.size), task)
    torch.manual_seed(cell.seed)
    model = ByteLM(config).to(device)
    recipe = TrainConfig(lr=cell.rate, n_steps=cell.budget, weight_decay=0.0, seed=cell.seed,
                         batch_size=p.task_batch, step="graph", schedule="stable")
    optimizer = make_optimizer(model, recipe, on_device=True)
    rows: list[dict[str, Any]] = []
    wrong: list[float] = []
    learning = True
    for size in (*task.sizes, *task.beyond):
        trained = learning and size in task.sizes
        steps = _train(model, optimizer, recipe, task, size) if trained else 0
        accuracy, chance = _accuracy(model, task, size, TESTED), task.chance(size)
        rows.append({
            "task": task.name, "unit": task.unit, "size": size, "accuracy": accuracy,
            "chance": chance, "trained": trained, "steps": steps,
            "state_bytes": sum(state_bytes(config, task.length(size)).values())})
        if size in task.sizes:
            wrong.append(1 - _accuracy(model, task, size, TESTED))
        learning = learning and accuracy > chance + NOTHING * (1 - chance)
    return {"chosen_by": sum(wrong) / len(wrong), "steps": sum(row["steps"] for row in rows),
            "n_parameters": config.n_parameters, "commit": commit(), "accuracies": rows}


def _train(
    model: ByteLM, optimizer: Optimizer, recipe: TrainConfig, task: Task, size: int
) -> int:
    """Train on samples of one size until they are solved or the schedule ends: steps done."""
    prepare(model, replace(recipe, context=task.length(size)))
    asked = len(range(task.length(size))[task.asked(size)])
    samples = min(recipe.batch_size, max(FEWEST, ANSWERS // asked))
    step = CapturedStep(
        model, partial(_loss, model, task.asked(size)), optimizer,
        lambda starts: task.draw(size, samples, starts.device),
        torch.zeros(recipe.n_steps, 1, dtype=torch.int64), recipe)
    accuracy = 0.0

    def look(done: int) -> None:
        nonlocal accuracy
        if done % LOOK_EVERY == 0:
            step.read()  # NonFiniteError ends the training
            accuracy = _accuracy(model, task, size, TESTED // 2)

    ended = optimise(step, partial(schedule, config=recipe), recipe.n_steps, after=look,
                     stop=lambda done: "solved" if accuracy >= SOLVED else None)
    step.read()
    return ended.steps


def _logits(model: ByteLM, inputs: Tensor, asked: slice) -> Tensor:
    """At the positions that are asked alone, (B, answers, V): the head is most of a small model."""
    hidden, _ = model.hidden(embed(inputs, model.embedding.weight))
    return model.logits(hidden[:, asked])


def _loss(model: ByteLM, asked: slice, inputs: Tensor, answers: Tensor) -> Tensor:
    """Mean over all answers, in nats."""
    return F.cross_entropy(_logits(model, inputs, asked).flatten(0, 1).float(), answers.flatten())


@torch.no_grad()
def _accuracy(model: ByteLM, task: Task, size: int, samples: int) -> float:
    """Share of right answers on new samples."""
    with autocast(model.device, "auto"):
        inputs, answers = task.draw(size, samples, model.device)
        found = torch.cat([_logits(model, part, task.asked(size)).argmax(-1)
                           for part in inputs.split(64)])
    return float((found == answers).double().mean())
