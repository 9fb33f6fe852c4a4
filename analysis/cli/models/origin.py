"""Where a checkpoint comes from: its run folder, and the text that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.console import say
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from mambabyte.corpus import Corpus


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint folder, or ``checkpoint`` itself."""
    path = checkpoint.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def corpus_of(checkpoint: Path, asked: str) -> Corpus:
    """The corpus that was asked for; with "auto" the run's own. Says which it is, and where it is
    not what the run was trained on.

    Raises UserError where the run does not say what it was trained on, or that is gone.
    """
    from analysis.runs.trainings import read_json
    from mambabyte.corpus import load_corpus

    folder = run_folder(checkpoint)
    origin, source = read_json(folder / "provenance.json"), asked
    if asked == "auto":
        source = read_json(folder / "config.json").get("corpus", "")
        if not source:
            raise UserError(f"{checkpoint} does not say where the text is that it was trained on"
                            f"{_named(origin)}: name it with --corpus")
    try:
        corpus = load_corpus(source, say)
    except UserError as error:
        if asked != "auto":
            raise
        raise UserError(f"the run's own corpus cannot be opened ({error}); name one with --corpus"
                        ) from None
    if asked == "auto":
        say(f"corpus: {corpus.name}, the run's own")
    trained_on = (origin.get("corpus_sha256") or {}).get("train")
    if trained_on and trained_on != corpus.digest()["train"]:
        say(f"note: the run was trained on another text than {corpus.name} is now"
            f"{_named(origin)}; the held-out part may hold what it has seen")
    return corpus


def _named(origin: dict) -> str:
    return f" (it was called {origin['corpus']})" if origin.get("corpus") else ""
