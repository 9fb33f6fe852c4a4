"""Fetch, build or look at a corpus: its splits, sizes and digests.

    mambabyte corpus stdlib
    mambabyte corpus wikitext103 --json
    mambabyte corpus path/to/folder
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from analysis.cli.console import say
from analysis.cli.options import POSITIONAL, parse, print_result


@dataclass(frozen=True)
class Options:
    name: Annotated[str, POSITIONAL] = "stdlib"
    """stdlib, wikitext103, a text file, or a folder of text files or wiki.*.raw."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "corpus", __doc__)

    from mambabyte.corpus import SPLITS, load_corpus

    corpus = load_corpus(options.name, say)
    digest = corpus.digest()
    record = {"name": corpus.name, "about": corpus.about, "splits": {
        s: {"bytes": len(corpus.split(s)), "sha256": digest[s]} for s in SPLITS}}
    lines = [f"{corpus.name}: {corpus.about}"]
    lines += [f"  {s:5} {len(corpus.split(s)):>12,} bytes  sha256 {digest[s]}" for s in SPLITS]
    print_result(record, options.json, lines)
    return 0
