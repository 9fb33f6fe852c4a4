"""Wrong input by surface: made at random from what is right, and what comes of each.

A surface takes a random generator, makes one input that is right or nearly so, and gives it to the
code that reads such input. What comes of it is "clear" (a UserError of one line), "accepted", or a
traceback, which no input may cause. Binary files are not here: tests of checkpoints, n-grams and
kernels have them.
"""

from __future__ import annotations

import importlib
import json
import random
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.cli import COMMANDS
from analysis.cli.parser import options_of, parse
from analysis.cli.recipe import recipe
from analysis.report.headlines import FILE, load_headlines
from analysis.runs.folders import Run, load_run
from analysis.runs.records import RECORDS, load_records
from analysis.runs.trainings import read_training, summary
from analysis.studies import STUDIES, profiles, read_file, validate
from analysis.studies.claims.ledger import load_ledger
from mambabyte import checkpoint
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.config.checks import from_plain, hints
from mambabyte.errors import UserError
from mambabyte.ops import FORMS, selective_scan

ROOT = Path(__file__).resolve().parents[2]
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-400, 1e308, float("nan"), float("inf"),
    -float("inf"), 2**31, 2**63, 2**64, 10**400, "", " ", "x", "nan", "1e999", "None", "M", "MMA",
    "é", "\ud800", "\x00", "a\nb", "9" * 5000, [], [1], [[]], [None], ["M", "M"], (), {}, {"a": 1},
    {"step": {}}, object(), np.float32(2), np.int64(-3), np.array([1, 2]), b"x", 1j, range(3),
]
PLAIN = [v for v in STRANGE if isinstance(v, (type(None), bool, int, float, str, list, dict))
         and v not in (10**400, "\ud800")]
WORDS = ["", "-", "--", "-1", "x", "0", "1e999", "nan", "1,2", ",", "=", "a=b", "é", "\udcff",
         "9" * 5000, "true", "--=", "--no-", "---", "M", "seed=1", "chunks=", "--help=1", "\n"]


def changed(rng: random.Random, value: Any) -> Any:
    """``value``, an object of a JSON file, with one thing in it lost, renamed or replaced."""
    value = json.loads(json.dumps(value))
    place: Any = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return rng.choice(PLAIN)
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        what = rng.random()
        if what < 0.6:
            place[key] = rng.choice(PLAIN)
        elif what < 0.8 or isinstance(place, list):
            del place[key]
        else:
            place[rng.choice(["", "x", str(key) + "s", "é" * 50])] = place.pop(key)
        return value


def damaged(rng: random.Random, text: str) -> bytes:
    """A text file cut off, with a piece lost or doubled, or with bytes of anything."""
    data = text.encode()
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 40)
    what = rng.randrange(4)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[at + size:]
    if what == 2:
        return data[:at] + data[max(0, at - size):at] + data[at:]
    return data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at + size % 3:]


def written(rng: random.Random, path: Path, value: Any) -> None:
    """A JSON file of ``value``, changed as JSON or damaged as text."""
    if rng.random() < 0.5:
        path.write_text(json.dumps(changed(rng, value)))
    else:
        path.write_bytes(damaged(rng, json.dumps(value, indent=1)))


@cache
def _records() -> dict[str, Run]:
    return load_records()


class Surfaces:
    """Every surface by name; ``folder`` is where their files are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small = {"n_layer": 1, "d_model": 8, "layer_pattern": "M"}
        self.config = {**vars(ModelConfig()), **small}
        self.progress = {"step": 3, "seconds": 1.5, "joules": None, "train": vars(TrainConfig()),
                         "text": "0" * 64}
        self.record = min(RECORDS.glob("*/*/run.json"), key=lambda p: p.stat().st_size)

    def all(self) -> dict[str, Callable[[random.Random], object]]:
        return {name: getattr(self, name) for name in vars(type(self))
                if not name.startswith("_") and name != "all"}

    def words_of_commands(self, rng: random.Random) -> object:
        module = importlib.import_module(rng.choice([*COMMANDS.values()])[0])
        actions = getattr(module, "ACTIONS", None)
        cls = module.Options if actions is None else rng.choice([*actions.values()]).options
        flags = [o.flag for o in options_of(cls)]
        words = [rng.choice(flags) if rng.random() < 0.5 else rng.choice(WORDS)
                 for _ in range(rng.randrange(6))]
        return parse(cls, words, "test", "")

    def study_parameters(self, rng: random.Random) -> object:
        study = rng.choice([*STUDIES.values()])
        names = [*profiles(study)["quick"], "x", "", "In"]
        return validate(study, {rng.choice(names): rng.choice(STRANGE)
                                for _ in range(rng.randrange(1, 3))})

    def python_configurations(self, rng: random.Random) -> object:
        cls = rng.choice([ModelConfig, TrainConfig])
        return cls(**{name: rng.choice(STRANGE) for name in rng.sample([*hints(cls)], 1)})

    def configuration_files(self, rng: random.Random) -> object:
        written(rng, self.folder / "config.json", self.config)
        return checkpoint.load_config(self.folder)

    def progress_files(self, rng: random.Random) -> object:
        path = self.folder / "progress.json"
        written(rng, path, self.progress)
        progress = checkpoint._load_progress(self.folder)
        return from_plain(TrainConfig, progress["train"], str(path))

    def recipes(self, rng: random.Random) -> object:
        path = self.folder / "recipe.json"
        written(rng, path, {"preset": "smoke", "corpus": "stdlib", "device": "cpu",
                            "model": self.config, "train": vars(TrainConfig())})
        return recipe(rng.choice([None, *PRESETS]), path)

    def parameter_files(self, rng: random.Random) -> object:
        suffix = rng.choice([".json", ".toml", ".yaml", ".txt", ""])
        path = self.folder / f"parameters{suffix}"
        path.write_bytes(damaged(rng, 'chunks = [1, 2]\nseed = 3\ndevice = "cpu"\n'
                                 if suffix == ".toml" else '{"chunks": [1, 2], "seed": 3}'))
        found = read_file(path)
        found.pop("grid", None)
        return validate("overflow", found)

    def run_records(self, rng: random.Random) -> object:
        run = self.folder / "run"
        run.mkdir(exist_ok=True)
        for path in self.record.parent.iterdir():
            if path.suffix == ".csv" and rng.random() < 0.3:
                (run / path.name).write_bytes(damaged(rng, path.read_text()))
            else:
                (run / path.name).write_bytes(path.read_bytes())
        if rng.random() < 0.7:
            written(rng, run / "run.json", json.loads(self.record.read_text()))
        return load_run(run)

    def training_folders(self, rng: random.Random) -> object:
        run = self.folder / "training"
        run.mkdir(exist_ok=True)
        written(rng, run / "config.json", {"model": self.config, "train": vars(TrainConfig())})
        written(rng, run / "result.json", {"steps": 3, "seconds": 1.0, "stopped_by": "n_steps",
                                           "joules": None, "valid_bits_per_byte": 2.0})
        (run / "metrics.jsonl").write_bytes(damaged(
            rng, '{"step": 1, "loss": 2.0, "joules": null}\n{"step": 2, "loss": 1.0}\n'))
        return summary(read_training(run))

    def ledgers(self, rng: random.Random) -> object:
        text = (ROOT / "data" / "claims.toml").read_text(encoding="utf-8")
        path = self.folder / "claims.toml"
        at = rng.randrange(max(1, len(text) - 4000))
        start = text.find("[[claim]]", at)
        path.write_bytes(damaged(rng, text[max(start, 0):max(start, 0) + 4000]))
        if rng.random() < 0.4:
            row = {"id": "a", "document": "first", "where": "x", "claim": "y", "kind": "memory",
                   "check": "c", "numbers": [1.0]}
            row = changed(rng, row)
            lines = [f"{json.dumps(str(k))} = {json.dumps(v)}" for k, v in row.items()
                     if v is not None] if isinstance(row, dict) else ["x"]
            path.write_text("\n".join(["[[claim]]", *lines]))
        return load_ledger(path)

    def headlines(self, rng: random.Random) -> object:
        path = self.folder / "headlines.toml"
        path.write_bytes(damaged(rng, FILE.read_text(encoding="utf-8")))
        return load_headlines(_records(), path)

    def scan_arguments(self, rng: random.Random) -> object:
        B, L, D, N = (rng.choice([1, 1, 2, 3]) for _ in range(4))
        make = {"u": (B, L, D), "delta": (B, L, D), "A": (D, N), "B": (B, L, N), "C": (B, L, N),
                "D": (D,), "z": (B, L, D), "delta_bias": (D,), "initial_state": (B, D, N)}
        given: dict[str, Any] = {name: torch.rand(shape) for name, shape in make.items()}
        for name in rng.sample([*make], rng.randrange(1, 3)):
            given[name] = rng.choice([
                *STRANGE[:20], torch.rand(rng.randrange(4), 2), torch.ones(make[name]).long(),
                torch.ones(make[name], dtype=torch.complex64), torch.rand(make[name]).double(),
                torch.rand(make[name]).half(), torch.rand(*make[name][::-1]), torch.rand(()),
                torch.rand(make[name], device="meta"), torch.rand(make[name]).to_sparse(),
                torch.ones(make[name]).bool(), np.ones(make[name])])
        if rng.random() < 0.3:
            given[rng.choice(["form", "chunk_size", "delta_softplus"])] = rng.choice(
                [*STRANGE, *FORMS])
        return selective_scan(**given)


def outcome(surface: Callable[[random.Random], object], seed: int) -> str:
    """What comes of the input of that number: "clear", "accepted", or where a traceback ended."""
    try:
        surface(random.Random(seed))
    except UserError as error:
        return "clear" if "\n" not in str(error) else f"more than a line: {str(error)[:80]!r}"
    except SystemExit:
        return "accepted"  # help
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
        return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: " \
            f"{str(error)[:80]!r}"
    return "accepted"


def counts(folder: Path, inputs: int, first: int = 0) -> dict[str, Counter[str]]:
    """Surface -> how often each outcome, over so many inputs of each."""
    return {name: Counter(outcome(surface, seed) for seed in range(first, first + inputs))
            for name, surface in Surfaces(folder).all().items()}
