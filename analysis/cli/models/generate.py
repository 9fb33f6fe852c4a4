"""Stream text from a checkpoint to the terminal, as it comes, always whole characters.

    mambabyte generate runs/first
    mambabyte generate runs/first --prompt "The " --bytes 400 --temperature 0.8
    echo "The state" | mambabyte generate runs/first --prompt - --top-p 0.9

Without --prompt it goes on from the first line of the run's own held-out text. On a terminal,
control characters are shown as escapes: what a model draws is not to be obeyed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.cli.console import escaped, say
from analysis.cli.models.origin import corpus_of
from analysis.cli.options import POSITIONAL, parse, pick_device
from mambabyte.config.checks import CountOrNone, DeviceOrAuto, NotNegative, above, between
from mambabyte.errors import UserError

PROMPT_BYTES = 80


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, POSITIONAL]
    """Run folder or checkpoint folder."""
    prompt: str | None = None
    """Text to go on from, "" for none; - reads it from standard input, whatever its bytes are."""
    bytes: CountOrNone = 256
    """How many bytes to generate."""
    temperature: NotNegative = 1.0
    """0 takes the most probable byte each time."""
    top_k: CountOrNone = 0
    """Keep the k most probable bytes; 0 keeps all."""
    top_p: Annotated[float, above(0, 1)] = 1.0
    """Keep the smallest set of bytes with this probability."""
    seed: Annotated[int, between(-2**63, 2**64 - 1)] = 0
    """Of the draws; the same seed gives the same text."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "generate", __doc__)

    from mambabyte.checkpoint import load_model
    from mambabyte.stream import generate

    model = load_model(options.checkpoint, pick_device(options.device))
    prompt = _prompt(options)
    shown = escaped if sys.stdout.isatty() else str
    sys.stdout.write(shown(prompt.decode("utf-8", "replace")))
    sys.stdout.flush()
    for text in generate(model, prompt, options.bytes, options.temperature, options.top_k,
                         options.top_p, options.seed):
        sys.stdout.write(shown(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _prompt(options: Options) -> bytes:
    """Bytes, since neither a pipe nor an argument need be UTF-8 and the model reads bytes anyway.
    """
    if options.prompt == "-":
        return sys.stdin.buffer.read()
    if options.prompt is not None:
        return os.fsencode(options.prompt)
    try:
        corpus = corpus_of(options.checkpoint, "auto")
    except UserError as error:  # a prompt is a convenience
        say(f"note: no prompt, since {error}")
        return b""
    say("prompt: the first line of its held-out text (--prompt TEXT for another)")
    line = bytes(corpus.valid[:PROMPT_BYTES]).strip().partition(b"\n")[0]
    return line.decode("utf-8", "ignore").encode("utf-8")  # without a character cut at its end
