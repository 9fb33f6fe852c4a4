"""``mambabyte bench stream --systems``: a row for each preset and system of the task."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.cli.console import say
from analysis.cli.studies.benched import Common, checked, keep, printed

TABLE = "Streaming by preset and system: one text at a time"
ABOUT = ("Generation: the engine draws its own bytes, greedily. Streaming: a byte in, a "
         "distribution out. Characters: predict and observe of the task's contract, a distribution "
         "each. One text, after 2,000 bytes; medians of five repeats. Presets have fresh weights; "
         "systems of the task are built on 2 MB of text with a step of training.")
ALL = "all"


def bench_systems(options: Common, systems: Sequence[str], corpus: str) -> int:
    """Stream each of ``systems``, or every one, and print and keep the table."""
    import torch

    from analysis.cli.studies.tables import rows_of, systems_table
    from analysis.measure.bench.systems import check, every, run_bench
    from mambabyte.corpus import load_corpus

    names = every() if list(systems) == [ALL] else systems
    check(names)
    device, text = checked(options), load_corpus(corpus, say)
    torch.manual_seed(0)
    frame = run_bench(names, bytes(text.train), bytes(text.valid), device, say)
    values = {f"{row.system.replace(':', '_')}_{what}_per_second": (
        getattr(row, f"{what}_per_second"), "1/s", f"{row.system}: {what.replace('_', ' ')}")
        for row in frame.itertuples()
        for what in ("generation_bytes", "streaming_bytes", "characters")}
    keep(options, {"systems": list(names), "device": device, "corpus": text.name}, values,
         {"systems": (TABLE, systems_table(frame))}, TABLE, ABOUT)
    lines = [f"{row.system:28} {row.parameters / 1e6:7.2f} M  generation "
             f"{row.generation_bytes_per_second:10,.0f} B/s  streaming "
             f"{row.streaming_bytes_per_second:10,.0f} B/s  characters "
             f"{row.characters_per_second:9,.0f}/s (60,000 in "
             f"{60_000 / row.characters_per_second:,.1f} s)" for row in frame.itertuples()]
    return printed(options, {"systems": rows_of(frame)}, lines)
