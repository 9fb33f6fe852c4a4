"""Count a Kneser-Ney byte n-gram model, and score it by order.

    mambabyte ngram --corpus stdlib --order 12
    mambabyte ngram --corpus path/to/folder --order 14 --discount 0.85 --save kn.safetensors
    mambabyte ngram --load kn.safetensors --split test --json

The row of order n uses the counts of the whole model up to contexts of n - 1 bytes: orders below
the highest count distinct bytes before them, as Kneser-Ney has it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from analysis.cli.console import Bar, say
from analysis.cli.options import parse, pick_device, print_result
from mambabyte.config.checks import Count, DeviceOrAuto, above, between


@dataclass(frozen=True)
class Options:
    corpus: str = "stdlib"
    """stdlib, wikitext103, a text file, or a folder of text files or wiki.*.raw."""
    order: Annotated[int, between(1, 255)] = 12
    """Longest context and the byte after it."""
    discount: Annotated[float, above(0, 1)] = 0.5
    """Taken off every count."""
    continuation: bool = True
    """Count distinct bytes before shorter contexts; without it plain absolute discounting."""
    split: Literal["valid", "test"] = "valid"
    """Which part of the corpus is scored."""
    bytes: Count = 60_000
    """How many bytes of the split to score, from its start."""
    save: Path | None = None
    """Write the model to this file."""
    load: Path | None = None
    """Score the model of this file instead of counting."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "ngram", __doc__)

    from mambabyte.config.files import check_file
    from mambabyte.corpus import load_corpus
    from mambabyte.task import ngram_file
    from mambabyte.task.ngram import count

    device, corpus = pick_device(options.device), load_corpus(options.corpus, say)
    if options.save is not None:
        check_file(options.save)  # now, and not after the counting
    began = time.perf_counter()
    if options.load is None:
        say(f"counting {len(corpus.train):,} bytes to order {options.order}")
        with Bar("counting") as bar:
            model = count(corpus.train, options.order, options.discount, device,
                          continuation=options.continuation, report=bar)
    else:
        model = ngram_file.load(options.load, device)
    seconds = time.perf_counter() - began
    if options.save is not None:
        ngram_file.save(model, options.save)
    text = corpus.split(options.split)[: options.bytes]
    with Bar("scoring") as bar:
        scores = model.scores_by_order(text, bar)
    record: dict[str, Any] = {
        "corpus": corpus.name, "split": options.split, "bytes": len(text),
        "split_bytes": len(corpus.split(options.split)), "bytes_counted": model.bytes_counted,
        "seconds": seconds, "table_bytes": model.n_bytes, "discount": model.discount,
        "orders": scores}
    what = "counted" if options.load is None else "loaded; counted from"
    print_result(record, options.json, [
        f"{what} {model.bytes_counted:,} bytes in {seconds:.1f} s, {model.n_bytes / 1e6:.1f} MB of "
        "tables",
        f"{'order':>5} {'bits/byte':>9} {'accuracy':>8}   ({options.split} of {corpus.name})",
        *(f"{s['order']:5} {s['bits_per_byte']:9.4f} {s['byte_accuracy']:8.4f}" for s in scores)])
    return 0
