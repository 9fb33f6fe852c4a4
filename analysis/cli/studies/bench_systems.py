"""``mambabyte bench stream --systems``: a row for each preset and system of the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.console import say
from analysis.cli.studies.benched import Common, checked, keep, printed, run_of

if TYPE_CHECKING:
    import pandas as pd

TABLE = "Streaming by preset and system: one text at a time"
ABOUT = ("Generation: the engine draws its own bytes, greedily. Streaming: a byte in, a "
         "distribution out. Characters: predict and observe of the task's contract, a distribution "
         "each. One text, after 2,000 bytes; medians of five repeats. Presets have fresh weights, "
         "as have patterns of mamba_byte's width and depth; systems of the task are built on 2 MB "
         "of text with a step of training.")
ALL = "all"


def bench_systems(
    options: Common, systems: Sequence[str], corpus: str, seconds: float | None
) -> int:
    """Stream each of ``systems``, or every one, and print and keep the table, as far as it goes in
    ``seconds``; rows that the record has are not measured again where it lacks others."""
    import torch

    from analysis.cli.studies.tables import rows_of, systems_table
    from analysis.measure.bench.systems import check, every, run_bench
    from mambabyte.corpus import load_corpus

    names = every() if list(systems) == [ALL] else systems
    check(names)
    device, text = checked(options), load_corpus(corpus, say)
    torch.manual_seed(0)
    parameters = {"systems": list(names), "device": device, "corpus": text.name}

    def record(frame: pd.DataFrame) -> None:
        values = {f"{row.system.replace(':', '_').lower()}_{what}_per_second": (
            getattr(row, f"{what}_per_second"), "1/s", f"{row.system}: {what.replace('_', ' ')}")
            for row in frame.itertuples()
            for what in ("generation_bytes", "streaming_bytes", "characters")}
        keep(options, run_of(
            parameters, values, {"systems": (TABLE, systems_table(frame))}, TABLE, ABOUT))

    frame = run_bench(
        names, bytes(text.train), bytes(text.valid), device, say, seconds=seconds or math.inf,
        known=_measured(options.record, parameters), after=record)
    lines = [f"{row.system:28} {row.parameters / 1e6:7.2f} M  generation "
             f"{row.generation_bytes_per_second:10,.0f} B/s  streaming "
             f"{row.streaming_bytes_per_second:10,.0f} B/s  characters "
             f"{row.characters_per_second:9,.0f}/s (60,000 in "
             f"{60_000 / row.characters_per_second:,.1f} s)  {row.engine}"
             for row in frame.itertuples()]
    if absent := [name for name in names if name not in set(frame["system"])]:
        lines.append(f"not measured: {', '.join(absent)}"
                     + (": the same command goes on with them" if options.record else ""))
    return printed(options, {"systems": rows_of(frame)}, lines)


def _measured(folder: Path | None, parameters: dict[str, Any]) -> pd.DataFrame | None:
    """What a record of the same command, of the same sources on the same machine, has measured, if
    something is left to measure."""
    from analysis.cli.studies.tables import systems_frame
    from analysis.runs.folders import RECORD
    from analysis.runs.records import load_record
    from mambabyte.config.provenance import provenance

    if folder is None or not (folder / RECORD).is_file():
        return None
    run, now = load_record(folder), provenance()
    frame = systems_frame(run.tables["systems"].frame) if "systems" in run.tables else None
    if frame is None or run.parameters != parameters or any(
            run.provenance.get(key) != now.get(key) for key in ("commit", "machine")):
        return None
    if set(parameters["systems"]) <= set(frame["system"]):
        return None
    say(f"{folder} has {len(frame)} systems: going on with the others")
    return frame
