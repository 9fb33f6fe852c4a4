"""Harm done on purpose, and a table of how it was borne: kills at random moments, damaged files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from analysis.runs.folders import load_run
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("tried", "clear", "accepted rightly", "wrong", "traceback", "crash", "hang")
PATIENCE_SECONDS = 300

# Does ``once()`` in a process of its own, again and again, and ends all but the last by a signal.
AGAIN = """
import os, random, signal, sys, threading, time
from pathlib import Path
again, run, seed, number = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def strike(delay):
    time.sleep(delay)
    os.kill(os.getpid(), number)
def again_and_again(once, longest):
    random.seed(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored behind a script's &
    for i in range(again):
        child = os.fork()
        if not child:
            if number and i < again - 1:
                threading.Thread(target=strike, args=(random.uniform(0, longest),),
                                 daemon=True).start()
            code = 1
            try:
                code = once()
            except KeyboardInterrupt:
                code = 0
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        random.seed(seed + i + 1)
"""
TRAINING = AGAIN + """
import numpy as np, torch
torch.set_num_threads(1)
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus
from mambabyte.train import train
text = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)
corpus = Corpus("shells", "", text, text[:400], text[:400])
model = ModelConfig(d_model=4, n_layer=1, d_state=2, dt_rank=1, expand=1)
recipe = TrainConfig(context=16, batch_size=2, n_steps=60, max_seconds=0, log_every=1,
                     checkpoint_every=2, precision="fp32")
def once():
    train(model, recipe, corpus, run, resume=True)
    return 0
again_and_again(once, 0.4)
"""
SWEEP = AGAIN + """
from analysis.cli import main
from analysis.studies import STUDIES, Study
study = Path(sys.argv[5])
STUDIES["tiny"] = Study("tiny", "Tiny", "Is it?", study / "tiny.ipynb", "tiny_study", study)
def once():
    status = main(["sweep", "tiny", "--grid", "n=1,2", "--root", str(run)])
    return 0 if status == 130 else status  # of an interruption
again_and_again(once, 8)
"""


def kills(number: int, count: int, seed: int = 0) -> Counter[str]:
    """One training, ended ``count`` times by a signal within its first 0.4 s and gone on with each
    time; then let end. "wrong" is a lost or doubled record, weights that differ from those of the
    training that nothing has disturbed, or a file left behind."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _again(TRAINING, 1, whole, seed, 0)
        found = _again(TRAINING, count + 1, killed, seed, number)
        if _last(whole) != _last(killed) or list(killed.rglob(".*")):
            found["wrong"] += 1
    found["accepted rightly"] = count - found["wrong"] - found["traceback"] - found["crash"]
    return found


def sweep_kills(number: int, count: int, study: Path, seed: int = 0) -> Counter[str]:
    """One sweep of two runs of the tiny study in the folder ``study``, as :func:`kills`, within
    its first 8 s. "wrong" is a run that is missing, not what it is undisturbed, or a file left
    behind."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _again(SWEEP, 1, whole, seed, 0, study)
        found = _again(SWEEP, count + 1, killed, seed, number, study)
        if _runs(whole) != _runs(killed):
            found["wrong"] += 1
    found["accepted rightly"] = count - found["wrong"] - found["traceback"] - found["crash"]
    return found


def _again(code: str, times: int, run: Path, seed: int, number: int, *more: Path) -> Counter[str]:
    """How the processes of ``code`` ended, all but the last by the signal ``number``."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(times), str(run), str(seed), str(int(number)),
         *map(str, more)], cwd=ROOT, text=True, capture_output=True, check=False,
        timeout=PATIENCE_SECONDS, env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *map(str, more)])})
    codes = [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert len(codes) == times, done.stderr
    return Counter(
        tried=times - 1, traceback=sum(code > 0 for code in codes),
        crash=sum(code < 0 and -code not in (number, signal.SIGKILL) for code in codes))


def _runs(root: Path) -> dict[str, object]:
    """What is in a sweep's folder: of each run its values, of anything else that it is there."""
    return {path.name: load_run(path).values if path.is_dir() else path.name
            for path in root.iterdir()}


def _last(run: Path) -> tuple[bytes, list[int]]:
    """The last weights, and the steps that were logged."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / "checkpoints/step_00000060/model.safetensors").read_bytes(), steps


def damage(
    path: Path, read: Callable[[], object], same: Callable[[object], bool], count: int,
    seed: int = 0,
) -> Counter[str]:
    """``read`` after each of ``count`` damages to a file: bits flipped, cut short, pieces doubled,
    zeroed or made noise. It must raise UserError ("clear") or return what is the ``same``."""
    rng, data = random.Random(seed), path.read_bytes()
    found: Counter[str] = Counter(tried=count)
    try:
        for _ in range(count):
            path.write_bytes(_damaged(data, rng))
            try:
                found["accepted rightly" if same(read()) else "wrong"] += 1
            except UserError:
                found["clear"] += 1
            except Exception:
                found["traceback"] += 1
    finally:
        path.write_bytes(data)
    return found


def _damaged(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.randrange(1, 40)
    kind = rng.choice(("flip", "cut", "double", "zero", "noise"))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:]
    if kind == "cut":
        return data[:at]
    middle = {"double": data[at: at + size] * 2, "zero": bytes(len(data[at: at + size])),
              "noise": rng.randbytes(size)}[kind]
    return data[:at] + middle + data[at + size:]


def table(rows: dict[str, Counter[str]]) -> str:
    """Markdown: a row a kind of harm."""
    lines = [f"| harm | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(str(row[c]) for c in COLUMNS)} |"
              for name, row in rows.items()]
    return "\n".join(lines)


def unharmed(row: Counter[str]) -> bool:
    return not any(row[c] for c in ("wrong", "traceback", "crash", "hang"))
