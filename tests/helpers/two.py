"""What each of two processes that train together does: a run of every kind."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.model.distributed import joined
from mambabyte.train import train

MODEL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=4, n_head=2, n_kv_head=1)
RECIPE = TrainConfig(context=32, batch_size=4, n_steps=4, checkpoint_every=2, log_every=2, lr=1e-2)


def work(rank: int, port: str, corpus_path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with joined("cpu") as world:
        assert world.size == 2
        corpus = load_corpus(str(corpus_path))
        for step, parallel in (("eager", "data"), ("graph", "data"), ("auto", "sharded")):
            recipe = replace(RECIPE, step=step, parallel=parallel)
            run = out / (parallel if parallel == "sharded" else step)
            train(MODEL, recipe, corpus, run)
        if world.first:
            (run / "checkpoints/step_00000004").rename(run / "whole")
        world.wait()
        train(MODEL, recipe, corpus, run, resume=True)

        clocks = []

        def schedule(step: int, config: TrainConfig, elapsed_seconds: float) -> float:
            clocks.append(elapsed_seconds)
            return 1.0

        module = sys.modules["mambabyte.train.run"]
        module.schedule, module._AGREE_EVERY = schedule, 2
        recipe = replace(RECIPE, step="graph", time_aware=True)
        train(MODEL, recipe, corpus, out / "clock")
        (out / f"clock{world.rank}").write_text(str(clocks))
