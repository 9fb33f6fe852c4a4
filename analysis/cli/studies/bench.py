"""Time the scan or the field's mixers against their peers, streaming, or training steps by parts.

    mambabyte bench scan
    mambabyte bench stream --preset mamba_byte --streams 1 64 --json
    mambabyte bench stream --checkpoint runs/first --corpus path/to/folder
    mambabyte bench step --preset mamba_byte --patterns A MA --batch-size 4
    mambabyte bench step --d-model 512 --n-layer 16 --peers mamba_ssm
    mambabyte bench mixers --shapes 16,1024,6 --peers KDA attention
    mambabyte bench scan --shapes 16,1024,384 --peers fused mamba_ssm --json
    mambabyte bench scan --device cpu --record data/records/throughput/scan-cpu

Peers that are not installed are named, not hidden. The floor is what the bytes and operations of
the scan cost at the ceilings that the run itself measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro

from analysis.cli.console import say
from analysis.cli.options import parse, pick_device, print_result

TABLE = "Selective scan and its peers: interleaved in one run, medians and quartiles"
ABOUT = ("Forward, and forward with backward through autograd, of one scan with softplus, "
         "bias, skip and gate. The floor is what its bytes and operations cost at the ceilings "
         "measured in the same run. Errors are against the float64 definition at a reduced size.")


MIXERS_TABLE = "Recurrences of the field's mixers and their peers: interleaved, medians, quartiles"
MIXERS_ABOUT = ("Forward, and forward with backward through autograd, of each family's recurrence "
                "on heads of 64 channels. Errors are against the float64 definition at a reduced "
                "size: of the output, and of the worst gradient.")


STREAM_TABLE = "Streaming: every byte waits for the one before"
STREAM_ABOUT = ("Greedy bytes fed back one by one, by every way there is on the device, against "
                "the number of texts at a time and the bytes seen before. Medians of five "
                "repeats; joules are gross, by the machine's own counter.")


STEPS_TABLE = "Training steps: interleaved in one run, medians and quartiles"
PARTS_TABLE = "Where the time of a training step goes"
STEPS_ABOUT = ("Whole training steps (forward, backward, clipping, optimizer) of systems of equal "
               "parameters on equal windows, and the self time of their operators or kernels by "
               "torch's profiler, summed into parts; kernels that overlap count twice. Joules are "
               "gross, by the machine's counter.")


@dataclass(frozen=True)
class Options:
    what: Annotated[Literal["scan", "mixers", "stream", "step"], tyro.conf.Positional]
    shapes: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """batch,length,channels, for mixers batch,length,heads; repeat for more. A grid that suits the
    device when none is given."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """bfloat16 on a GPU and float32 on a CPU when not given."""
    peers: tuple[str, ...] = ()
    """Of the scan: fused, mamba_ssm, mambapy, chunked, ...; the usual ones when none is named.
    Of the mixers: families, "SSD, 64 states", "KDA", ...; all when none is named.
    Of a training step: mamba_ssm, whose modules then take the place of the preset's SSM layers."""
    preset: str = "mamba_byte"
    """Which model is streamed or trained."""
    d_model: int = 0
    """Width of the model that is trained; the preset's own when 0."""
    n_layer: int = 0
    """Depth of the model that is trained; the preset's own when 0."""
    checkpoint: Path | None = None
    """Stream this trained model; without it, one of the preset with fresh weights."""
    corpus: str = "stdlib"
    """Where the streamed text is from: stdlib, wikitext103, a folder with wiki.*.raw, or a file."""
    batch_size: int = 0
    """Windows of a training step; the preset's own when 0."""
    context: int = 0
    """Bytes of a window; the preset's own when 0."""
    patterns: tuple[str, ...] = ()
    """Layer patterns to train beside the preset's, at equal parameters: A, MA, MMMA, ...
    Attention sees the whole context; alone it also stands with half the layers and wider MLPs, and
    where the preset's window is shorter than the context, with that window too."""
    way: Literal["eager", "graph", "compile"] | None = None
    """How a step is run; compile on a GPU and eager on a CPU when not given."""
    streams: tuple[int, ...] = (1, 8, 64, 512)
    """How many texts at a time."""
    seen: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    """After how many bytes the latency of the next one is measured."""
    characters: int = 60_000
    """How many characters are scored; 0 scores none."""
    device: str = "auto"
    repeats: int = 30
    record: Path | None = None
    """Also keep the table, with machine, date, versions, commit and command, as a record: the
    folder, such as data/records/throughput/NAME."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    from analysis.runs.records import check_record_folder
    from mambabyte.errors import UserError

    options = parse(Options, argv, "bench", __doc__)
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}: it must be at least 1")
    if options.record:
        check_record_folder(options.record)  # now, and not after the measurement
    return {"scan": bench_scan, "mixers": bench_mixers, "stream": bench_stream,
            "step": bench_step}[options.what](options)


def bench_scan(options: Options) -> int:
    from analysis.measure.bench.scan import DEFAULT_PEERS, run_bench

    frame = run_bench(
        [parse_shape(text) for text in options.shapes] or None, options.dtype,
        options.peers or DEFAULT_PEERS, pick_device(options.device), options.repeats, say,
    )
    machine = frame.attrs["machine"]
    _keep(options, machine, {}, {"bench": (TABLE, short_table(frame))},
          "The scan against its peers", ABOUT)
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for (batch, length, channels), group in frame.groupby(["batch", "length", "channels"],
                                                          sort=False):
        lines += ["", f"({batch}, {length}, {channels})"]
        lines += [describe(row) for row in group.to_dict("records")]
    return _print(options, {"bench": _rows(frame), "ceilings": machine}, lines)


def bench_mixers(options: Options) -> int:
    from analysis.measure.bench.mixers import FAMILIES, run_bench
    from analysis.measure.ceilings import describe_machine

    device = pick_device(options.device)
    machine = describe_machine(device)
    frame = run_bench(
        [parse_shape(text) for text in options.shapes] or None, options.peers or tuple(FAMILIES),
        device, options.repeats, say)
    _keep(options, machine, {}, {"bench": (MIXERS_TABLE, frame)},
          "The field's mixers and their peers", MIXERS_ABOUT)
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for shape, group in frame.groupby(["batch", "length", "heads"], sort=False):
        lines += ["", f"{shape}"]
        lines += [describe_mixer(row) for row in group.to_dict("records")]
    return _print(options, {"bench": _rows(frame), "ceilings": machine}, lines)


def describe_mixer(row: dict) -> str:
    """One line of the table on the screen."""
    name = f"  {row['family']:<18}{row['peer']:<11}{row['direction']:<18}"
    if row["note"]:
        return name + row["note"]
    line = f"{name}{row['median_seconds'] * 1e6:>12,.1f} us"
    if row["peak_bytes"] == row["peak_bytes"]:
        line += f"  peak {row['peak_bytes'] / 2**20:,.0f} MiB"
    errors = [row[f"error_{what}"] for what in ("output", "gradient")]
    return line + "".join(f"  {e:.1e}" for e in errors if e == e)


def bench_stream(options: Options) -> int:
    import torch

    from analysis.measure.bench.stream import VALUES, run_bench
    from mambabyte.checkpoint import load_model
    from mambabyte.config import get_preset
    from mambabyte.corpus import load_corpus
    from mambabyte.errors import UserError
    from mambabyte.model import ByteLM

    if min((*options.streams, *options.seen), default=1) < 1 or options.characters < 0:
        raise UserError("--streams and --seen must be 1 or more, --characters 0 or more")
    device, corpus = pick_device(options.device), load_corpus(options.corpus, say)
    torch.manual_seed(0)
    model = (load_model(options.checkpoint) if options.checkpoint
             else ByteLM(get_preset(options.preset).model))
    frame, values = run_bench(model.to(device).eval(), bytes(corpus.valid), options.streams,
                              options.seen, options.characters, say)
    _keep(options, {"preset": options.preset, "device": device, "corpus": corpus.name,
                    "trained": options.checkpoint is not None, "characters": options.characters},
          {name: (value, *VALUES[name]) for name, value in values.items()},
          {"stream": (STREAM_TABLE, stream_table(frame))},
          f"Streaming {options.preset}", STREAM_ABOUT)
    lines = [f"{row.way:20} {row.streams:5} streams {row.seen:8} seen {row.microseconds:10.1f} us "
             f"[{row.low:.1f}, {row.high:.1f}] {row.bytes_per_second:12.0f} bytes/s "
             f"{_energy(row.joules_per_megabyte)}" for row in frame.itertuples()]
    lines += [f"{about}: " + (f"{_plain(values[name])} {unit}".rstrip() if name in values
                              else "not asked for")
              for name, (unit, about) in VALUES.items()]
    return _print(options, {"stream": _rows(frame), **values}, lines)


def bench_step(options: Options) -> int:
    from dataclasses import replace

    from analysis.measure.bench.steps import bench_steps, rivals, step_values
    from mambabyte.config import get_preset
    from mambabyte.errors import UserError

    preset, device = get_preset(options.preset), pick_device(options.device)
    if not set(options.peers) <= {"mamba_ssm"}:
        raise UserError(f"--peers got {' '.join(options.peers)}: a step has the peer mamba_ssm "
                        "alone")
    model = replace(preset.model, d_model=options.d_model or preset.model.d_model,
                    n_layer=options.n_layer or preset.model.n_layer)
    recipe = replace(preset.train, batch_size=options.batch_size or preset.train.batch_size,
                     context=options.context or preset.train.context)
    way = options.way or ("compile" if device.startswith("cuda") else "eager")
    say(f"{options.preset} on {device}, {way}: {recipe.batch_size} x {recipe.context} bytes a step")
    frame, parts = bench_steps(rivals(model, options.patterns, recipe.context), recipe, device, way,
                               say=say, published=bool(options.peers))
    _keep(options, {"preset": options.preset, "d_model": model.d_model, "n_layer": model.n_layer,
                    "device": device, "way": way, "batch_size": recipe.batch_size,
                    "context": recipe.context}, step_values(frame),
          {"steps": (STEPS_TABLE, steps_table(frame)), "parts": (PARTS_TABLE, parts_table(parts))},
          f"Training steps at {model.n_layer} layers of width {model.d_model}, windows of "
          f"{recipe.context:,} bytes", STEPS_ABOUT)
    lines = []
    for row in frame.itertuples():
        lines.append(
            f"{row.system:8} {row.parameters:12,} parameters {row.ms:9.2f} ms [{row.low:.2f}, "
            f"{row.high:.2f}] x{row.times_first:.2f} {row.bytes_per_second:13,.0f} bytes/s "
            f"{_energy(row.joules_per_megabyte)}  {row.mixers}")
        lines += [f"    {part.part:22} {part.ms:9.3f} ms {part.share:6.1%}  {part.kernel[:60]}"
                  for part in parts[parts["system"] == row.system].itertuples()]
    return _print(options, {"steps": _rows(frame), "parts": parts.to_dict("records")}, lines)


def _keep(
    options: Options, parameters: dict[str, Any], values: Mapping[str, tuple[Any, str, str]],
    tables: dict[str, tuple[str, pd.DataFrame]], title: str, about: str,
) -> None:
    """The result as a record, where one was asked for."""
    from analysis.runs.folders import Run, Value, tables_of
    from analysis.runs.records import write_record_folder

    if options.record:
        write_record_folder(Run(
            "throughput", parameters, {name: Value(*value) for name, value in values.items()},
            tables_of(tables), title=title, about=about), options.record)


def _print(options: Options, found: dict[str, Any], lines: list[str]) -> int:
    from mambabyte.config.provenance import provenance

    print_result({**found, "provenance": provenance()}, options.json, lines)
    return 0


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return _measured(frame).to_dict("records")


def _energy(joules_per_megabyte: float) -> str:
    known = joules_per_megabyte == joules_per_megabyte  # not nan
    return f"{joules_per_megabyte:8.1f} J/MB" if known else "energy not measured"


def _plain(value: float) -> str:
    """Four digits, but all of a large number's, never a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def stream_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of a streaming bench in the words and units of a reader of the report."""
    return _measured(pd.DataFrame({
        "way": frame["way"], "texts at a time": frame["streams"],
        "bytes seen before": frame["seen"], "a byte of each, median (us)":
            frame["microseconds"].round(1), "quartiles (us)": _quartiles(frame["low"],
                                                                         frame["high"]),
        "all together (bytes/s)": frame["bytes_per_second"].round(0),
        "gross (J/MB)": frame["joules_per_megabyte"].round(0)}))


def steps_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of compared training steps in the words and units of a reader of the report."""
    return _measured(pd.DataFrame({
        "layers": frame["system"], "mixers": frame["mixers"], "parameters": frame["parameters"],
        "step, median (ms)": frame["ms"].round(3), "quartiles (ms)": _quartiles(
            frame["low"], frame["high"]), "times the first row": frame["times_first"].round(2),
        "text (MB/s)": (frame["bytes_per_second"] / 1e6).round(3),
        "gross (J/MB)": frame["joules_per_megabyte"].round(1),
        "peak (MiB)": (frame["peak_bytes"] / 2**20).round(0)}))


def parts_table(parts: pd.DataFrame) -> pd.DataFrame:
    """The parts of training steps, shares in percent."""
    return pd.DataFrame({
        "layers": parts["system"], "part": parts["part"], "a step (ms)": parts["ms"].round(3),
        "share (%)": (100 * parts["share"]).round(1), "longest kernel": parts["kernel"]})


def _quartiles(low: pd.Series, high: pd.Series) -> list[str]:
    return [f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True)]


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(object).where(table.notna(), None)


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
    }).pipe(_measured)


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
            + (f"x{row['ratio_to_fused']:.2f}" if row["ratio_to_fused"] == row["ratio_to_fused"]
               else "(fused not asked for)"))
    if row["fraction_of_floor"] == row["fraction_of_floor"]:
        text += f", {row['fraction_of_floor']:.0%} of the floor's speed"
    if row["peak_bytes"] == row["peak_bytes"]:
        text += f", {row['peak_bytes'] / 2**20:.0f} MiB"
    if row["error_output"] == row["error_output"]:
        text += f", error {row['error_output']:.1e} / {row['error_gradient']:.1e}"
    return text
