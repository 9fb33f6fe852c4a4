"""Every example of README, docs and help is read as the command line reads it, and runs.

The daily suite reads all and runs those that are quick; the long one runs those of the commands'
help, in their order, each at the smallest values that show what it shows.
"""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.cli import COMMANDS, main
from analysis.cli.parser import parse
from analysis.studies import STUDIES, validate
from mambabyte.config import ModelConfig, get_preset
from mambabyte.config.files import write_json
from mambabyte.evaluate import bits_per_byte
from mambabyte.model import ByteLM
from mambabyte.ops import selective_scan
from mambabyte.ops.compat import selective_scan_fn
from tests.studies.test_other_values import SMALL

ROOT = Path(__file__).resolve().parents[2]
_LINE = re.compile(
    r"^ *(?:torchrun .*-m analysis\.cli|mambabyte) (?=[a-z])(.+?)(?:  +#.*)?$", re.M)
TEXT = "some words of a small text, again and again. " * 300
FILES = {"chunks.toml": "chunks = [2, 4]\n", "grid.toml": "seed = 1\ngrid.chunks = [[2], [4]]\n",
         "answers.txt": TEXT, "question.txt": TEXT[:90]}
# Examples that want more processes, a package, a card, a cluster, a public file or hours, and those
# that other tests run.
ELSEWHERE = re.compile(
    r"--peers mamba_ssm|sharded|context-parallel|bench context|runs events|--ways|slurm|mamba-130m|"
    r"submission\.py|--profile full|record |report|(study memory|sweep)$")


def examples(pages: Sequence[str] = ("README.md", "docs/*.md")) -> list[str]:
    """What follows ``mambabyte`` in each of the pages and in the commands' help, once."""
    texts = [page.read_text(encoding="utf-8") for name in pages for page in sorted(ROOT.glob(name))]
    texts += [importlib.import_module(module).__doc__ or "" for module, _ in COMMANDS.values()]
    found = [line.split("|")[0].strip() for text in texts for line in _LINE.findall(text)]
    return list(dict.fromkeys(line for line in found if line.split()[0] in COMMANDS))


def test_there_are_examples_of_every_command():
    assert {line.split()[0] for line in examples()} == set(COMMANDS)
    assert "study overflow --set chunks=16,32,64" in examples()  # of README


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", examples())
def test_an_example_is_read(example, folder, monkeypatch):
    """Its options are, and the parameters of every study and point of a grid that it names."""
    def every_point(names, *, profile, overrides, grid=None, **_):
        for name in names or STUDIES:
            for point in itertools.product(*(grid or {}).values()):
                validate(name, {**overrides, **dict(zip(grid or {}, point, strict=True))}, profile)
        return []

    command, *words = shlex.split(example)
    if command in ("study", "sweep") and "--record" not in words:
        monkeypatch.setattr("analysis.sweep.run.run_sweep", every_point)
        assert main([command, *words]) == 0
        return
    module = importlib.import_module(COMMANDS[command][0])
    actions = getattr(module, "ACTIONS", None)
    options = module.Options if actions is None else actions[
        words.pop(0) if words else "list"].options
    parse(options, words, command, "")


QUICK = [line for line in examples() if re.match(
    r"memory -|task (list|export)|study \w+ --parameters", line)]


@pytest.mark.parametrize("example", QUICK)
def test_a_quick_example_runs(example, folder, capsys):
    assert main(shlex.split(example)) == 0
    assert capsys.readouterr().out or (folder / "ours.py").stat().st_size


@pytest.mark.parametrize("example", [x for x in examples() if x.startswith("memory runs/")])
def test_a_forecast_of_the_first_run_is_made(example, folder):
    """Of what ``mambabyte train --out runs/first`` is on a CPU, whose batch is the smallest."""
    recipe = get_preset("quick_start")
    for name in ("first", "it"):
        write_json(folder / "runs" / name / "config.json",
                   {"model": asdict(recipe.model), "train": asdict(recipe.train)})
    assert main(shlex.split(example)) == 0


MORE = {  # what makes a command small
    "train": "--train.n-steps 4 --train.context 32 --train.batch-size 4 --model.n-layer 1 "
             "--model.d-model 32 --model.n-head 2 --model.n-kv-head 2 --model.dt-rank 2",
    "eval": "--characters 40", "generate": "--bytes 8", "ngram": "--bytes 90", "corpus": "",
    "memory": "", "report": "--draft", "task": "", "task run": "--characters 20",
    "bench scan": "--shapes 1,8,4 --repeats 1", "bench mixers": "--shapes 1,8,1 --repeats 1",
    "bench stream": "--streams 1 --seen 4 --characters 5",
    "bench step": "--d-model 48 --n-layer 1 --batch-size 1 --context 16",
}


def smallest(example: str, text: Path) -> list[str]:
    """An example's words with small texts, models and numbers; an option of its own stays."""
    words = shlex.split(example)
    kind = " ".join(words[:2]) if words[0] in ("bench", "task") else words[0]
    texts = {"stdlib", "wikitext103", "path/to/folder", "path/to/text.txt", "wiki/"}
    small = {"path/to/runs": "runs"} | dict.fromkeys(texts, str(text))
    if kind == "task run":
        small |= dict.fromkeys(("ours", "nano_plus_ngram"), "ngram")
    words = [small.get(word, word) for word in words]
    extra = [shlex.split(part) for part in re.split(
        " (?=--)", MORE.get(kind, MORE.get(words[0], "")))]
    if words[0] in ("study", "sweep"):
        given = {pair.split("=")[0] for pair in words if "=" in pair} | {"chunks"}
        for name in [w for w in words if w in STUDIES] or STUDIES:
            extra += [["--set", f"{key}=" + (",".join(map(str, value)) if isinstance(value, list)
                                             else str(value))]
                      for key, value in SMALL.get(name, {}).items() if key not in given]
    return words + [w for part in extra if part and (part[0] == "--set" or part[0] not in words)
                    for w in part]


@pytest.mark.parametrize("page", ["README.md", "docs/packing.md", "docs/state.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """README's by itself; in the others a model and its inputs are there already."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    source, = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(source, {} if page == "README.md" else given_to_pages(page))


def given_to_pages(page: str) -> dict[str, Any]:
    """What the text around the pages' Python speaks of, one row of 41 bytes for places in it."""
    torch.manual_seed(0)
    starts = torch.zeros(1, 41, dtype=torch.bool)
    starts[0, [0, 17]] = True
    scan = {"u": torch.randn(1, 41, 4), "delta": torch.rand(1, 41, 4), "A": -torch.rand(4, 2),
            "B": torch.randn(1, 41, 2), "C": torch.randn(1, 41, 2)}
    rows = 1 if page == "docs/packing.md" else 3
    return {"model": ByteLM(ModelConfig(d_model=16, n_layer=2, d_state=4)).eval(),
            "tokens": torch.randint(0, 256, (rows, 41)), "starts": starts, "torch": torch,
            "bits_per_byte": bits_per_byte, "selective_scan": selective_scan,
            "selective_scan_fn": selective_scan_fn, "seq_idx": starts.cumsum(1).int(), **scan}


@pytest.mark.long
def test_all_examples_of_the_help_run(folder, capsys):
    """In its order, in which each finds what it names; those of the pages name folders of a
    reader's own."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    for example in examples(pages=()):
        if not ELSEWHERE.search(example):
            assert main(smallest(example, text)) == 0, (example, capsys.readouterr().err)
