"""Stream text from a checkpoint to the terminal, as it comes, always whole characters.

    mambabyte generate runs/first
    mambabyte generate runs/first --prompt "The " --bytes 400 --temperature 0.8
    echo "The state" | mambabyte generate runs/first --prompt - --top-p 0.9

Without --prompt it goes on from the first line of the run's own held-out text. On a terminal,
control characters are shown as escapes: what a model draws is not to be obeyed.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from analysis.cli.console import escaped, say
from analysis.cli.models.origin import corpus_of
from analysis.cli.options import parse, pick_device
from mambabyte.errors import UserError

PROMPT_BYTES = 80


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder or checkpoint folder."""
    prompt: str | None = None
    """Text to go on from, "" for none; - reads it from standard input, whatever its bytes are."""
    bytes: int = 256
    """How many bytes to generate."""
    temperature: float = 1.0
    """0 takes the most probable byte each time."""
    top_k: int = 0
    """Keep the k most probable bytes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of bytes with this probability."""
    seed: int = 0
    device: str = "auto"


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "generate", __doc__)

    from mambabyte.checkpoint import load_model
    from mambabyte.stream import generate

    for name in ("bytes", "temperature", "top_k"):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be 0 or more")
    if not -2**63 <= options.seed < 2**64:
        raise UserError(f"--seed is {options.seed}: it must fit into 64 bits")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p is {options.top_p}: it must be in (0, 1]")
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
