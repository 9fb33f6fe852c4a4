"""Bits per byte and greedy next-character accuracy of a checkpoint.

    mambabyte eval runs/first
    mambabyte eval runs/first --corpus stdlib --split test
    mambabyte eval runs/first --corpus wiki/ --characters 60000 --mode streaming --json

The task scores the first 60,000 characters of a split. Both modes give the same predictions:
"parallel" runs windows with the state carried along, "streaming" goes byte by byte through the
CharModel contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from analysis.cli.console import Bar
from analysis.cli.options import POSITIONAL, parse, pick_device, print_result
from mambabyte.config.checks import Count, DeviceOrAuto


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, POSITIONAL]
    """Run folder or checkpoint folder."""
    corpus: str = "auto"
    """The run's own with auto; else stdlib, wikitext103, a text file, or a folder of text files or
    wiki.*.raw."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which part of the corpus."""
    characters: Count = 60_000
    """How many characters of the split to score, from its start."""
    bytes: Count | None = None
    """Score so many bytes instead; training scores the first 100,000 of the split "valid"."""
    mode: Literal["parallel", "streaming"] = "parallel"
    """In windows with the state carried along, or byte by byte."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "eval", __doc__)

    from analysis.cli.models.origin import corpus_of
    from mambabyte.checkpoint import load_model
    from mambabyte.evaluate import score, score_streaming
    from mambabyte.stream import CharModel

    model = load_model(options.checkpoint, pick_device(options.device))
    corpus = corpus_of(options.checkpoint, options.corpus)
    whole = corpus.split(options.split)
    data = whole[: options.bytes or 4 * options.characters + 3]
    count = options.bytes or options.characters  # no text has more characters than bytes
    with Bar("scoring") as bar:
        if options.mode == "parallel":
            result = score(model, data, count, report=bar)
        else:
            result = score_streaming(CharModel(model), data, count, report=bar)
    record = {**result.as_dict(), "corpus": corpus.name, "split": options.split,
              "split_bytes": len(whole), "mode": options.mode, "checkpoint": options.checkpoint}
    stray = [f"{result.bytes_not_utf8} of the bytes belong to no UTF-8 character: each is scored, "
             "and counts as a character that was not predicted"] if result.bytes_not_utf8 else []
    print_result(record, options.json, [
        f"{result.bits_per_byte:.4f} bits/byte over {result.bytes} bytes of {len(whole)}",
        f"{result.char_accuracy:.4f} character accuracy over {result.characters} characters "
        f"of {corpus.name} {options.split}", *stray,
    ])
    return 0
