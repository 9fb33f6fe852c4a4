"""What processes find that share sequences, and the tiny models and runs that they share.

A task is ``PATTERN/LENGTH/DTYPE``: a model of that layer pattern alone and split, on the same
tokens; ``train=EACH``: a tiny run, EACH processes a sequence, into FOLDER/train-EACH;
``documents=EACH``: the same of many documents, into FOLDER/documents-EACH; or ``bench``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from analysis.measure.parallel import run_jobs
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.model import ByteLM
from mambabyte.model.distributed import current
from mambabyte.train import train

TINY: dict[str, Any] = {
    "d_model": 16, "d_state": 4, "n_head": 2, "n_kv_head": 1, "delta_head_dim": 8,
    "ssd_head_dim": 8, "ssd_d_state": 4, "ssd_groups": 2, "attention_window": 9, "local_window": 4}
CORPORA = {"train": "text.txt", "documents": "texts.jsonl"}
RECIPE = TrainConfig(context=21, batch_size=2, n_steps=3, checkpoint_every=2, log_every=1, lr=1e-2)


def model_of(pattern: str, dtype: torch.dtype = torch.float32) -> ByteLM:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=len(pattern), layer_pattern=pattern, **TINY)
    model = ByteLM(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def far(found: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def alone_and_split(task: str) -> dict[str, float]:
    pattern, length, dtype = task.split("/")
    model, world = model_of(pattern, getattr(torch, dtype)), current()
    tokens = torch.randint(0, 256, (2, int(length) + 1))
    weights = list(model.parameters())

    starts = torch.rand(tokens.shape) < 4 / int(length)  # some stretches have none, and some two

    def loss_and_gradients() -> list[Tensor]:
        found = []
        for documents in (None, starts):
            loss = model.loss(tokens, documents)
            found += [loss.detach(), *torch.autograd.grad(loss, weights)]
        world.average(found)
        return found

    @torch.inference_mode()
    def in_pieces() -> list[Tensor]:
        half = int(length) // 2
        found: list[Tensor] = []
        for documents in (None, starts):
            state = None
            for places in torch.arange(int(length) + 1).split(
                    [half, int(length) - 1 - half, 2]):  # two are too few to be split
                logits, state = model(tokens[:, places], state, None if documents is None
                                      else documents[:, places])
                found.append(logits)
            assert state is not None
            found += [x for layer in state for x in layer if isinstance(x, Tensor)]
        return found

    alone = loss_and_gradients(), in_pieces()
    model.share_sequences(world.sequence_group(world.size))
    split = loss_and_gradients(), in_pieces()
    names = ["loss", *(name for name, _ in model.named_parameters())]
    names += [f"{name} of documents" for name in names]
    errors = {n: far(a, b) for n, a, b in zip(names, split[0], alone[0], strict=True)}
    return errors | {"forward": max(
        far(a.double(), b.double()) for a, b in zip(split[1], alone[1], strict=True))}


def bench() -> list[dict[str, Any]]:
    """The rows of a bench, one of whose sequences does not fit one process."""
    from analysis.measure.bench.context import bench_context

    whole = ByteLM.loss

    def loss(model: ByteLM, tokens: Tensor) -> Tensor:
        if model.sequence_group is None and tokens.shape[1] > 50:
            raise torch.OutOfMemoryError
        return whole(model, tokens)

    ByteLM.loss = loss  # type: ignore[method-assign]
    found = bench_context(model_of("M").config, ["M"], [40, 60], current(), "cpu", rounds=1)
    rows: list[dict[str, Any]] = json.loads(found.to_json(orient="records"))
    return rows


def run(size: int, folder: Path, *tasks: str) -> dict[str, Any]:
    """What the first of ``size`` processes found, by task."""
    (folder / "text.txt").write_text("one long text, many hands. " * 400)
    (folder / "texts.jsonl").write_text("".join(
        json.dumps({"text": "of many texts, " * (1 + i % 5)}) + "\n" for i in range(300)))
    return next(run_jobs(work, [(rank, size, folder, tasks) for rank in range(size)], size))


def work(rank: int, size: int, folder: Path, tasks: tuple[str, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=size)
    found: dict[str, Any] = {}
    for task in tasks:
        kind, _, each = task.partition("=")
        if kind in CORPORA:
            config = TrainConfig(**vars(RECIPE) | {"context_parallel": int(each)})
            found[task] = train(model_of("MA").config, config,
                                load_corpus(str(folder / CORPORA[kind])), folder / f"{kind}-{each}")
        elif task == "bench":
            found[task] = bench()
        else:
            found[task] = alone_and_split(task)
    dist.barrier()
    return found
