"""Training a model on one of the tasks: the step that text has, on samples drawn in the step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import Cell
from analysis.studies.arena.trainings.tasks import IGNORE, Task, parse_task
from analysis.theory.matching import GPU_WIDTHS, match_patterns
from analysis.theory.sizes import at_size
from analysis.theory.step_memory import state_bytes
from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.config.provenance import commit
from mambabyte.model import ByteLM
from mambabyte.model.lm import embed
from mambabyte.train import autocast, optimise
from mambabyte.train.captured import CapturedStep, prepare
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule

SOLVED = 0.999  # accuracy at which a training ends early
TESTED = 256  # samples of each size at the end, and half of them on the way
LOOKS = 10  # at the accuracy on the way
HEAD = 64  # channels of a head where the width allows: the one that the GPU's kernels have


def task_config(p: Parameters, system: str, width: int, task: Task) -> ModelConfig:
    """A small model for a task, as many parameters as the others have; its attention looks back
    over whole samples."""
    length = sum(task.draw(torch.tensor([1]))[0].shape[1:])
    base = at_size(
        get_preset("mamba_byte").model, width, p.task_layers, max(1, width // HEAD),
        attention_window=length, vocab_size=task.vocab_size,
        # Embeddings of unit length: at the text models' 0.02 layers' outputs drown the symbols.
        embed_std=width**-0.5)
    multiple = GPU_WIDTHS if p.device.startswith("cuda") else 1
    systems = tuple(dict.fromkeys(p.task_systems))
    return match_patterns(base, systems, multiple=multiple)[system].config


def learn_task(p: Parameters, cell: Cell, device: str) -> dict[str, Any]:
    """The row of a training on a task: accuracy by size, and the share of wrong answers over the
    trained sizes, by which a rate is chosen."""
    task = parse_task(cell.kind)
    config = task_config(p, cell.system, int(cell.size), task)
    torch.manual_seed(cell.seed)
    model = ByteLM(config).to(device)
    recipe = TrainConfig(lr=cell.rate, n_steps=cell.budget, weight_decay=0.0, seed=cell.seed,
                         context=config.attention_window, batch_size=p.task_batch, step="graph")
    prepare(model, recipe)
    step = CapturedStep(
        model, partial(_loss, model, task.asked), make_optimizer(model, recipe, on_device=True),
        lambda starts: task.batch(p.task_batch, starts.device),
        torch.zeros(cell.budget, 1, dtype=torch.int64), recipe)
    every, found = max(1, cell.budget // LOOKS), {"accuracy": 0.0}

    def look(done: int) -> None:
        if done % every == 0:
            step.read()  # NonFiniteError ends the training
            found["accuracy"] = _mean(_accuracies(model, task, task.sizes, TESTED // 2))

    ended = optimise(step, partial(schedule, config=recipe), cell.budget, after=look,
                     stop=lambda done: "solved" if found["accuracy"] >= SOLVED else None)
    step.read()
    model.eval()
    by_size = _accuracies(model, task, (*task.sizes, *task.beyond), TESTED)
    return {
        "chosen_by": 1 - _mean({s: by_size[s] for s in task.sizes}), "steps": ended.steps,
        "stopped_by": ended.stopped_by, "n_parameters": config.n_parameters,
        "state_bytes": sum(state_bytes(config, config.attention_window).values()),
        "length": config.attention_window, "commit": commit(),
        "accuracies": [{"task": task.name, "unit": task.unit, "size": size, "accuracy": accuracy,
                        "chance": task.chance(size), "trained": size in task.sizes}
                       for size, accuracy in by_size.items()],
    }


def _logits(model: ByteLM, inputs: Tensor, asked: slice) -> Tensor:
    """At the positions that are asked alone, (B, answers, V): the head is most of a small model."""
    hidden, _ = model.hidden(embed(inputs, model.embedding.weight))
    return model.logits(hidden[:, asked])


def _loss(model: ByteLM, asked: slice, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of the mean over a sample's answers, in nats."""
    nats = F.cross_entropy(_logits(model, inputs, asked).flatten(0, 1).float(), targets.flatten(),
                           ignore_index=IGNORE, reduction="none").view(targets.shape)
    return (nats.sum(1) / (targets != IGNORE).sum(1)).mean()


@torch.no_grad()
def _accuracies(
    model: ByteLM, task: Task, sizes: tuple[int, ...], samples: int
) -> dict[int, float]:
    """Share of right answers by size; samples weigh the same."""
    found = {}
    with autocast(model.device, "auto"):
        for size in sizes:
            inputs, targets = task.test(size, samples, model.device)
            right = torch.cat([
                _logits(model, part, task.asked).argmax(-1) for part in inputs.split(64)
            ]) == targets
            asked = targets != IGNORE
            found[size] = float(((right & asked).sum(1) / asked.sum(1)).double().mean())
    return found


def _mean(accuracies: dict[int, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)
