"""Bits per byte and greedy next-character accuracy of a checkpoint.

    mambabyte eval runs/first --corpus stdlib --split valid
    mambabyte eval runs/first --corpus wiki/ --characters 60000 --mode streaming --json

The task scores the first 60,000 characters of a split. Both modes give the same predictions:
"parallel" runs windows with the state carried along, "streaming" goes byte by byte through the
CharModel contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from analysis.cli.console import Bar, say
from analysis.cli.options import parse, pick_device, print_result


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder or checkpoint folder."""
    corpus: str = "stdlib"
    """stdlib, wikitext103, a folder with wiki.*.raw, or a text file."""
    split: Literal["train", "valid", "test"] = "valid"
    characters: int = 60_000
    """How many characters of the split to score, from its start."""
    mode: Literal["parallel", "streaming"] = "parallel"
    device: str = "auto"
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "eval", __doc__)

    from mambabyte.checkpoint import load_model
    from mambabyte.corpus import load_corpus
    from mambabyte.errors import UserError
    from mambabyte.evaluate import score, score_streaming
    from mambabyte.stream import CharModel

    if options.characters < 1:
        raise UserError(f"--characters is {options.characters}: it must be at least 1")
    model = load_model(options.checkpoint, pick_device(options.device))
    corpus = load_corpus(options.corpus, say)
    data = corpus.split(options.split)[: 4 * options.characters + 3]
    with Bar("scoring") as bar:
        if options.mode == "parallel":
            result = score(model, data, options.characters, report=bar)
        else:
            result = score_streaming(CharModel(model), data, options.characters, report=bar)
    record = {**result.as_dict(), "corpus": corpus.name, "split": options.split,
              "mode": options.mode, "checkpoint": options.checkpoint}
    print_result(record, options.json, [
        f"{result.bits_per_byte:.4f} bits/byte over {result.bytes} bytes",
        f"{result.char_accuracy:.4f} character accuracy over {result.characters} characters "
        f"of {corpus.name} {options.split}",
    ])
    return 0
