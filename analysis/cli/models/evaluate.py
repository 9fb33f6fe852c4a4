"""Bits per byte and greedy next-character accuracy of a checkpoint.

    mambabyte eval runs/first
    mambabyte eval runs/first --corpus stdlib --split test
    mambabyte eval runs/first --corpus wiki/ --characters 60000 --mode streaming --json
    mambabyte eval runs/first --corpus answers.txt --context question.txt --prompt-cache kept/
    torchrun --nproc-per-node 2 -m analysis.cli eval runs/first --characters 1000000

The task scores the first 60,000 characters of a split. Both modes give the same predictions:
"parallel" runs windows with the state carried along, "streaming" goes byte by byte through the
CharModel contract. The processes of torchrun share the length of each window.
Of a corpus of many documents each is scored from its own first byte on.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from analysis.cli.console import Bar, say
from analysis.cli.options import POSITIONAL, parse, pick_device, print_result
from mambabyte.config.checks import Count, DeviceOrAuto
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from mambabyte.model import ByteLM


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
    context: Path | None = None
    """File whose bytes come before the text and are not scored, such as a question."""
    prompt_cache: Path | None = None
    """Folder for states of contexts, up to 1 GiB: what a context begins with, and was read before,
    is not read again."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "eval", __doc__)

    from mambabyte.checkpoint import load_model
    from mambabyte.model import distributed

    if options.prompt_cache is not None and options.context is None:
        raise UserError("--prompt-cache keeps what comes before the text: give that with --context")
    device = pick_device(options.device)
    with distributed.joined(device) as world:
        if world.size > 1 and (options.mode == "streaming" or options.context is not None):
            raise UserError("streaming and a context go byte by byte: score with --mode parallel "
                            "and without --context, or in one process")
        model = load_model(options.checkpoint, world.device(device))
        model.share_sequences(world.sequence_group(world.size))
        return _score(options, model, world.first)


def _score(options: Options, model: ByteLM, first: bool) -> int:
    """Score the model; of several processes only the first one talks."""
    from analysis.cli.models.origin import corpus_of
    from mambabyte.evaluate import score, score_streaming
    from mambabyte.stream import CharModel, PrefixCache

    corpus = corpus_of(options.checkpoint, options.corpus)
    whole = corpus.split(options.split)
    data = corpus.documents(options.split, options.bytes or 4 * options.characters + 3)
    count = options.bytes or options.characters  # no text has more characters than bytes
    context = b"" if options.context is None else _bytes_of(options.context)
    cache = None if options.prompt_cache is None else PrefixCache(options.prompt_cache)
    if context:
        say(f"reading {len(context):,} bytes of context")
    with Bar("scoring") if first else nullcontext(lambda done: None) as bar:
        if options.mode == "parallel":
            result = score(model, data, count, report=bar, context=context, cache=cache)
        else:
            result = score_streaming(CharModel(model), data, count, bar, context=context,
                                     cache=cache)
    if cache is not None:
        say(f"context: {len(context):,} bytes, {cache.found_bytes:,} of them from "
            f"{options.prompt_cache}")
    if not first:
        return 0
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


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--context {path} cannot be read: {error.strerror}") from None
