"""Time the selective scan against its peers, streaming a model, or the parts of a training step.

    mambabyte bench scan
    mambabyte bench stream --preset mamba_byte --streams 1 64 --json
    mambabyte bench step --preset mamba_byte --batch-size 4
    mambabyte bench scan --shapes 16,1024,384 --peers fused mamba_ssm --json
    mambabyte bench scan --device cpu --record data/measurements/scan-cpu.json

Peers that are not installed are named, not hidden. The floor is what the bytes and operations of
the scan cost at the ceilings that the run itself measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro

from analysis.commands import parse, pick_device, print_result
from analysis.console import say

TABLE = "Selective scan and its peers: interleaved in one run, medians and quartiles"
ABOUT = ("Forward, and forward with backward through autograd, of one scan with softplus, "
         "bias, skip and gate. The floor is what its bytes and operations cost at the ceilings "
         "measured in the same run. Errors are against the float64 definition at a reduced size.")


STREAM_TABLE = "Streaming: every byte waits for the one before"
STREAM_ABOUT = ("Greedy bytes fed back one by one, by every way there is on the device, against "
                "the number of texts at a time and the bytes seen before. Medians of five "
                "repeats; joules are gross, by the machine's own counter.")


STEP_TABLE = "A training step by its parts"
STEP_ABOUT = ("Self time of every operator by torch's profiler, summed into parts of the model; "
              "the readable step, not compiled.")


@dataclass(frozen=True)
class Options:
    what: Annotated[Literal["scan", "stream", "step"], tyro.conf.Positional]
    shapes: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """batch,length,channels; repeat for more. A grid that suits the device when none is given."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """bfloat16 on a GPU and float32 on a CPU when not given."""
    peers: tuple[str, ...] = ()
    """fused, mamba_ssm, mambapy, chunked, sdpa, ...; the usual ones when none is named."""
    preset: str = "mamba_byte"
    """Which model is streamed or trained."""
    batch_size: int = 0
    """Windows of a training step; the preset's own when 0."""
    streams: tuple[int, ...] = (1, 8, 64, 512)
    """How many texts at a time."""
    seen: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    """After how many bytes the latency of the next one is measured."""
    characters: int = 60_000
    """How many characters are scored; 0 scores none."""
    device: str = "auto"
    repeats: int = 30
    record: Path | None = None
    """Also write the table, with machine, date, versions, commit and command, to this file."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "bench", __doc__)
    return {"scan": bench_scan, "stream": bench_stream, "step": bench_step}[options.what](options)


def bench_scan(options: Options) -> int:
    from analysis.bench_scan import DEFAULT_PEERS, run_bench
    from analysis.records import write_tables
    from mambabyte.provenance import provenance

    frame = run_bench(
        [parse_shape(text) for text in options.shapes] or None, options.dtype,
        options.peers or DEFAULT_PEERS, pick_device(options.device), options.repeats, say,
    )
    machine = frame.attrs["machine"]
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    record = {"bench": rows, "ceilings": machine, "provenance": provenance()}
    if options.record:
        write_tables(
            options.record, {"bench": (TABLE, short_table(frame))}, study="throughput",
            title="The scan against its peers", about=ABOUT, parameters=machine,
            provenance=provenance())
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for (batch, length, channels), group in frame.groupby(["batch", "length", "channels"],
                                                          sort=False):
        lines += ["", f"({batch}, {length}, {channels})"]
        lines += [describe(row) for row in group.to_dict("records")]
    print_result(record, options.json, lines)
    return 0


def bench_stream(options: Options) -> int:
    from analysis.bench_stream import run_bench
    from analysis.records import write_tables
    from mambabyte.config import get_preset
    from mambabyte.errors import UserError
    from mambabyte.provenance import provenance

    if min((*options.streams, *options.seen), default=1) < 1 or options.characters < 0:
        raise UserError("--streams and --seen must be 1 or more, --characters 0 or more")
    device = pick_device(options.device)
    frame, values = run_bench(get_preset(options.preset).model, device, options.streams,
                              options.seen, options.characters, say)
    if options.record:
        units = {"scoring_seconds": ("s", f"streaming score of {options.characters} characters")}
        write_tables(
            options.record, {"stream": (STREAM_TABLE, frame)}, study="throughput",
            title=f"Streaming {options.preset}", about=STREAM_ABOUT,
            parameters={"preset": options.preset, "device": device}, provenance=provenance(),
            values={name: (value, *units[name]) for name, value in values.items()})
    record = {"stream": frame.astype(object).where(frame.notna(), None).to_dict("records"),
              **values, "provenance": provenance()}
    lines = [f"{row.way:20} {row.streams:5} streams {row.seen:8} seen {row.microseconds:10.1f} us "
             f"[{row.low:.1f}, {row.high:.1f}] {row.bytes_per_second:12.0f} bytes/s "
             f"{row.joules_per_megabyte:8.1f} J/MB" for row in frame.itertuples()]
    lines += [f"{name}: {value:.2f}" for name, value in values.items()]
    print_result(record, options.json, lines)
    return 0


def bench_step(options: Options) -> int:
    from dataclasses import replace

    from analysis.records import write_tables
    from analysis.step_profile import profile_step
    from mambabyte.config import get_preset
    from mambabyte.provenance import provenance

    preset, device = get_preset(options.preset), pick_device(options.device)
    recipe = replace(preset.train, batch_size=options.batch_size or preset.train.batch_size)
    size = recipe.batch_size * recipe.context
    say(f"{options.preset} on {device}: steps of {recipe.batch_size} x {recipe.context} bytes")
    frame, ms = profile_step(preset.model, recipe, device)
    values = {"ms_per_step": ms, "bytes_per_second": size / ms * 1e3}
    if options.record:
        units = {"ms_per_step": ("ms", "one training step, without the profiler"),
                 "bytes_per_second": ("bytes/s", "of training text")}
        write_tables(
            options.record, {"step": (STEP_TABLE, frame)}, study="throughput",
            title=f"The parts of a training step of {options.preset}", about=STEP_ABOUT,
            parameters={"preset": options.preset, "device": device,
                        "batch_size": recipe.batch_size, "context": recipe.context},
            provenance=provenance(),
            values={name: (value, *units[name]) for name, value in values.items()})
    record = {"step": frame.to_dict("records"), **values, "provenance": provenance()}
    lines = [f"{row.part:18} {row.ms:10.2f} ms {row.share:6.1%}" for row in frame.itertuples()]
    print_result(record, options.json, [
        f"{ms:.1f} ms a step, {values['bytes_per_second']:,.0f} bytes/s", *lines])
    return 0


def short_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader of the report wants, in its units."""
    shape = frame[["batch", "length", "channels"]].astype(str).agg(" x ".join, axis=1)
    micro = frame[["median_seconds", "low_seconds", "high_seconds", "floor_seconds"]] * 1e6
    return pd.DataFrame({
        "batch x length x channels": shape, "of": frame["peer"], "pass": frame["direction"],
        "median (us)": micro["median_seconds"].round(1),
        "quartiles (us)": [f"{a:.1f} to {b:.1f}" if a == a else None for a, b in
                           zip(micro["low_seconds"], micro["high_seconds"], strict=True)],
        "times the fused scan": frame["ratio_to_fused"].round(3),
        "floor (us)": micro["floor_seconds"].round(1),
        "peak (MiB)": (frame["peak_bytes"] / 2**20).round(1),
        "relative error of output": frame["error_output"],
        "worst relative error of a gradient": frame["error_gradient"],
        "note": frame["note"],
    }).astype(object).where(lambda t: t.notna(), None)


def parse_shape(text: str) -> tuple[int, int, int]:
    """``batch,length,channels`` as numbers."""
    from mambabyte.errors import UserError

    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"--shapes got {text!r}: expected batch,length,channels, e.g. 16,1024,384")
    batch, length, channels = map(int, parts)
    return batch, length, channels


def describe(row: dict) -> str:
    """One line of the table for people: time and spread, ratio, floor, memory, error."""
    head = f"  {row['peer']:18} {row['direction']:17}"
    if row["median_seconds"] != row["median_seconds"]:  # nan: not measured
        return f"{head} not measured: {row['note']}"
    text = (f"{head} {row['median_seconds'] * 1e6:11.1f} us "
            f"[{row['low_seconds'] * 1e6:.1f}, {row['high_seconds'] * 1e6:.1f}] "
            f"x{row['ratio_to_fused']:.2f}")
    if row["fraction_of_floor"] == row["fraction_of_floor"]:
        text += f", {row['fraction_of_floor']:.0%} of the floor's speed"
    if row["peak_bytes"] == row["peak_bytes"]:
        text += f", {row['peak_bytes'] / 2**20:.0f} MiB"
    if row["error_output"] == row["error_output"]:
        text += f", error {row['error_output']:.1e} / {row['error_gradient']:.1e}"
    return text
