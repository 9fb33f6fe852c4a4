"""Stream text from a checkpoint to the terminal, as it comes, always whole characters.

    mambabyte generate runs/first
    mambabyte generate runs/first --prompt "The " --bytes 400 --temperature 0.8
    echo "The state" | mambabyte generate runs/first --prompt - --top-p 0.9
    cat book.txt | mambabyte generate runs/first --prompt - --prompt-cache kept/
    mambabyte generate runs/first --save-state story.state
    mambabyte generate runs/first --state story.state --temperature 0 --guess text

Without --prompt or --state it goes on from the first line of the run's own held-out text. On a
terminal, control characters are shown as escapes: what a model draws is not to be obeyed.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from analysis.cli.console import Bar, escaped, say
from analysis.cli.models.origin import corpus_of
from analysis.cli.options import POSITIONAL, parse, pick_device
from mambabyte.config.checks import CountOrNone, DeviceOrAuto, NotNegative, Seed, above
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from mambabyte.model import ByteLM
    from mambabyte.stream import ByteStream
    from mambabyte.stream.generation import Guesser

PROMPT_BYTES = 80
LONG_PROMPT = 1 << 15  # bytes that take seconds to read


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
    seed: Seed = 0
    """Of the draws; the same seed gives the same text."""
    state: Path | None = None
    """Go on where this file was saved, before --prompt, if any."""
    save_state: Path | None = None
    """Keep the place behind the last byte in this file, for --state and the same checkpoint."""
    prompt_cache: Path | None = None
    """Folder for states of prompts, up to 1 GiB: what a prompt begins with, and was read before,
    is not read again. The text is the same the first and every time."""
    guess: str | None = None
    """Let one pass of the model check several guessed bytes; the text stays what it is. text
    guesses repetitions, a file of `mambabyte ngram --save` from its counts too."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "generate", __doc__)

    from mambabyte.checkpoint import load_model
    from mambabyte.config.files import check_file
    from mambabyte.stream.generation import Speculation, text_of

    if options.state is not None and options.prompt_cache is not None:
        raise UserError("--state and --prompt-cache are both given: the text begins with the state "
                        "or with a prompt that is kept; give one")
    if options.save_state is not None:
        check_file(options.save_state)  # now, and not after the drawing
    model = load_model(options.checkpoint, pick_device(options.device))
    draws = None if options.guess is None else Speculation(_guesser(options.guess))
    prompt = b"" if options.state is not None and options.prompt is None else _prompt(options)
    stream = _begin(options, model, prompt)
    shown = escaped if sys.stdout.isatty() else str
    sys.stdout.write(shown(prompt.decode("utf-8", "replace")))
    sys.stdout.flush()
    how = (options.bytes, options.temperature, options.top_k, options.top_p, options.seed)
    if draws is not None:
        draws.guesser.read(prompt)
    for text in text_of(stream.draw(*how) if draws is None else draws.draw(stream, *how)):
        sys.stdout.write(shown(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    if draws is not None:
        say(f"{draws.drawn} bytes in {draws.passes} passes of the model, {draws.right} of "
            f"{draws.guessed} guessed bytes right"
            if stream.guesses_itself or not stream.draws_itself else
            "nothing was guessed: bytes are drawn where they are computed, on the GPU")
    if options.save_state is not None:
        stream.save(options.save_state)
    return 0


def _reading(prompt: bytes) -> Any:
    """A bar for a prompt that takes seconds to read."""
    return Bar("reading") if len(prompt) > LONG_PROMPT else nullcontext(lambda done: None)


def _begin(options: Options, model: ByteLM, prompt: bytes) -> ByteStream:
    """A stream behind the state and the prompt that were asked for."""
    from mambabyte.stream import ByteStream, PrefixCache
    from mambabyte.stream.generation import begin, read_on

    if options.state is not None:
        stream = ByteStream.load(options.state, model)
        with _reading(prompt) as bar:
            read_on(stream, prompt, bar)
        return stream
    cache = None if options.prompt_cache is None else PrefixCache(options.prompt_cache)
    with _reading(prompt) as bar:
        stream, _ = begin(model, prompt, cache, bar)
    if cache is not None:
        say(f"prompt: {len(prompt):,} bytes, {cache.found_bytes:,} of them from "
            f"{options.prompt_cache}")
    return stream


def _guesser(source: str) -> Guesser:
    from mambabyte.stream.generation import FirstOf, Repetitions
    from mambabyte.task import ngram_file
    from mambabyte.task.guesses import NgramGuesses

    if source == "text":
        return Repetitions()
    if not Path(source).exists():
        raise UserError(f"--guess is {source!r}: expected text, or a file of `mambabyte ngram "
                        "--save`")
    return FirstOf(Repetitions(), NgramGuesses(ngram_file.load(Path(source))))


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
