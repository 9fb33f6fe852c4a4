"""Time scans and mixers against their peers, streaming, training steps, or a training's start.

    mambabyte bench scan
    mambabyte bench stream --preset mamba_byte --streams 1 64 --json
    mambabyte bench stream --checkpoint runs/first --corpus path/to/folder
    mambabyte bench stream --systems mamba_byte SSSA task:ours
    mambabyte bench stream --systems all --seconds 120 --record data/records/throughput/systems
    mambabyte bench step --preset mamba_byte --patterns A MA --batch-size 4
    mambabyte bench step --d-model 512 --n-layer 16 --peers mamba_ssm
    mambabyte bench start --systems mamba_byte task:ours --ways fused compile
    mambabyte bench mixers --shapes 16,1024,6 --peers KDA attention
    mambabyte bench scan --shapes 16,1024,384 --peers fused mamba_ssm --json
    torchrun --nproc-per-node 2 -m analysis.cli bench context --lengths 1000000
    mambabyte bench scan --device cpu --record data/records/throughput/scan-cpu

Peers that are not installed are named, not hidden. The floor is what the bytes and operations of
the scan cost at the ceilings that the run itself measures.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from analysis.cli.console import say
from analysis.cli.options import REPEATED, subcommand
from analysis.cli.parser import Action
from analysis.cli.studies.bench_context import Context, bench_context
from analysis.cli.studies.bench_systems import bench_systems
from analysis.cli.studies.benched import Common, checked, printed, run_of
from mambabyte.config.checks import (
    Count,
    CountOrNone,
    Layers,
    Positive,
    Rule,
    entries,
)
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.presets import PresetName

TABLE = "Selective scan and its peers: interleaved in one run, medians and quartiles"
ABOUT = ("Forward, and forward with backward through autograd, of one scan with softplus, "
         "bias, skip and gate. The floor is what its bytes and operations cost at the ceilings "
         "measured in the same run. Errors are against the float64 definition at a reduced size.")


MIXERS_TABLE = "Recurrences of the field's mixers and their peers: interleaved, medians, quartiles"
MIXERS_ABOUT = ("Forward, and forward with backward through autograd, of each family's recurrence "
                "on heads of 64 channels. Errors are against the float64 definition at a reduced "
                "size: of the output, and of the worst gradient. Peers that tune themselves do it "
                "at the first shape.")
SETTINGS_TABLE = "What peers that tune themselves chose"


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


STARTS_TABLE = "From the start of a process to its first training steps"
MARKS_TABLE = "When each mark was passed, and the joules until then"
PACE_TABLE = "A training step after that, interleaved in the same run: medians and quartiles"
STARTS_ABOUT = ("Seconds and gross joules from the start of a fresh process, imports and the "
                "device's context within them and named apart, until a training on one text has "
                "done steps 1 and 50. Cold: with new, empty caches of torch, Triton, the driver "
                "and this package; warm: again with the same. A GPU's counter of energy moves "
                "every tenth of a second or so.")


def _is_shape(text: str) -> bool:
    return bool(re.fullmatch(r" *[0-9]{1,12} *(, *[0-9]{1,12} *){2}", text)) and all(
        int(part) for part in text.split(","))


Shape = Annotated[str, Rule(_is_shape, lambda: "three numbers, 1 or more, e.g. 16,1024,384")]


@dataclass(frozen=True)
class Scan(Common):
    shapes: Annotated[tuple[Shape, ...], REPEATED] = ()
    """batch,length,channels; repeat for more. A grid that suits the device when none is given."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """bfloat16 on a GPU and float32 on a CPU when not given."""
    peers: tuple[str, ...] = ()
    """fused, mamba_ssm, mambapy, chunked, ...; the usual ones when none is named."""
    repeats: Count = 30
    """Timings of each, in turns; the median is shown."""


@dataclass(frozen=True)
class Mixers(Common):
    shapes: Annotated[tuple[Shape, ...], REPEATED] = ()
    """batch,length,heads; repeat for more. A grid that suits the device when none is given."""
    peers: tuple[str, ...] = ()
    """Families in quotes, 'SSD, 64 states', KDA, ...; all when none is named."""
    repeats: Count = 30
    """Timings of each, in turns; the median is shown."""


@dataclass(frozen=True)
class Stream(Common):
    preset: PresetName | None = None
    """Stream a model of this preset with fresh weights; mamba_byte when nothing else is given."""
    checkpoint: Path | None = None
    """Stream this trained model instead: run folder or checkpoint folder."""
    corpus: str = "stdlib"
    """Where the streamed text is from: stdlib, wikitext103, a folder with wiki.*.raw, or a file."""
    streams: Annotated[tuple[Count, ...], entries()] = (1, 8, 64, 512)
    """How many texts at a time."""
    seen: Annotated[tuple[Count, ...], entries()] = (100, 1000, 10_000, 100_000, 1_000_000)
    """After how many bytes the latency of the next one is measured."""
    characters: CountOrNone = 60_000
    """How many characters are scored; 0 scores none."""
    systems: Annotated[tuple[str, ...], entries()] = ()
    """Instead a row for each of these presets, patterns of layers such as R or SSSA, and systems of
    the task as task:NAME; all is every one."""
    seconds: Positive | None = None
    """With systems: begin none after so many seconds. A record has what was measured, and the same
    command goes on with the others."""


@dataclass(frozen=True)
class Step(Common):
    preset: PresetName = "mamba_byte"
    """Which model is trained."""
    d_model: Count | None = None
    """Its width; the preset's own when not given."""
    n_layer: Layers | None = None
    """Its depth; the preset's own when not given."""
    batch_size: Count | None = None
    """Windows of a training step; the preset's own when not given."""
    context: Count | None = None
    """Bytes of a window; the preset's own when not given."""
    patterns: tuple[LayerPattern, ...] = ()
    """Layer patterns to train beside the preset's, at equal parameters: A, MA, MMMA, ...
    Attention sees the whole context; alone it also stands with half the layers and wider MLPs, and
    where the preset's window is shorter than the context, with that window too."""
    way: Literal["eager", "graph", "fused", "compile"] | None = None
    """How a step is run; as a training is when not given: fused on a GPU (compile with peers, whose
    modules know no other), eager on a CPU."""
    peers: tuple[Literal["mamba_ssm"], ...] = ()
    """mamba_ssm, whose modules then also take the place of the preset's SSM layers."""


@dataclass(frozen=True)
class Start(Common):
    systems: Annotated[tuple[str, ...], entries()] = (
        "mamba_byte", "hybrid_3_1", "modded_nanogpt", "task:ours")
    """Presets, and systems of the task as task:NAME."""
    ways: Annotated[tuple[Literal["auto", "eager", "graph", "fused", "compile"], ...],
                    entries()] = ()
    """How a step is run; fused and compile on a GPU and eager on a CPU when not given."""
    corpus: str = "stdlib"
    """The text: stdlib, wikitext103, a text file, or a folder of text files or wiki.*.raw."""
    caches: Annotated[tuple[Literal["cold", "warm"], ...], entries()] = ("cold", "warm")
    """Cold is with empty caches; warm, which is after cold, with what that left."""
    pace: bool = True
    """Also time a step after the start, where a GPU runs it captured."""


def run(argv: list[str]) -> int:
    return subcommand(ACTIONS, argv, "bench", __doc__)


def bench_scan(options: Scan) -> int:
    from analysis.cli.studies.tables import rows_of, short_table
    from analysis.measure.bench.scan import DEFAULT_PEERS, run_bench

    device = checked(options)
    frame = run_bench(
        [parse_shape(text) for text in options.shapes] or None, options.dtype,
        options.peers or DEFAULT_PEERS, device, options.repeats, say,
    )
    machine = frame.attrs["machine"]
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for (batch, length, channels), group in frame.groupby(["batch", "length", "channels"],
                                                          sort=False):
        lines += ["", f"({batch}, {length}, {channels})"]
        lines += [describe(row) for row in group.to_dict("records")]
    return printed(options, {"bench": rows_of(frame), "ceilings": machine}, lines, run_of(
        machine, {}, {"bench": (TABLE, short_table(frame))},
        "The scan against its peers", ABOUT))


def bench_mixers(options: Mixers) -> int:
    import pandas as pd

    from analysis.cli.studies.tables import mixers_table, rows_of
    from analysis.measure.bench.mixers import FAMILIES, SETTINGS, run_bench
    from analysis.measure.ceilings import describe_machine

    device = checked(options)
    machine = describe_machine(device)
    frame = run_bench(
        [parse_shape(text) for text in options.shapes] or None, options.peers or tuple(FAMILIES),
        device, options.repeats, say)
    settings = frame.attrs.pop("settings")
    chosen = {"settings": (SETTINGS_TABLE, pd.DataFrame(settings, columns=list(SETTINGS)))}
    tables = {"bench": (MIXERS_TABLE, mixers_table(frame))} | (chosen if settings else {})
    lines = [f"{name}: {value}" for name, value in machine.items()]
    for shape, group in frame.groupby(["batch", "length", "heads"], sort=False):
        lines += ["", f"{shape}"]
        lines += [describe_mixer(row) for row in group.to_dict("records")]
    return printed(options, {"bench": rows_of(frame), "ceilings": machine}, lines, run_of(
        machine, {}, tables,
        "The field's mixers and their peers", MIXERS_ABOUT))


def describe_mixer(row: dict) -> str:
    """One line of the table on the screen."""
    name = f"  {row['family']:<20}{row['peer']:<11}{row['direction']:<18}"
    if row["median_seconds"] != row["median_seconds"]:
        return name + row["note"]
    line = f"{name}{row['median_seconds'] * 1e6:>12,.1f} us"
    if row["peak_bytes"] == row["peak_bytes"]:
        line += f"  peak {row['peak_bytes'] / 2**20:,.0f} MiB"
    errors = [row[f"error_{what}"] for what in ("output", "gradient")]
    line += "".join(f"  {e:.1e}" for e in errors if e == e)
    return "  ".join(filter(None, (line, row["kernel"], row["note"])))


def bench_stream(options: Stream) -> int:
    if options.systems:
        return bench_systems(options, options.systems, options.corpus, options.seconds)
    import torch

    from analysis.cli.studies.tables import rows_of, stream_table
    from analysis.measure.bench.stream import VALUES, run_bench
    from mambabyte.checkpoint import load_model
    from mambabyte.config import get_preset
    from mambabyte.corpus import load_corpus
    from mambabyte.errors import UserError
    from mambabyte.model import ByteLM

    if options.seconds:
        raise UserError("--seconds ends between two of --systems: give these too, or leave it out")
    if options.checkpoint and options.preset:
        raise UserError("--preset and --checkpoint are both given: give one, whose model is "
                        "streamed")
    preset = options.preset or "mamba_byte"
    device, corpus = checked(options), load_corpus(options.corpus, say)
    torch.manual_seed(0)
    model = (load_model(options.checkpoint) if options.checkpoint
             else ByteLM(get_preset(preset).model))
    frame, values = run_bench(model.to(device).eval(), bytes(corpus.valid), options.streams,
                              options.seen, options.characters, say)
    lines = [f"{row.way:26} {row.streams:5} streams {row.seen:8} seen {row.microseconds:10.1f} us "
             f"[{row.low:.1f}, {row.high:.1f}] {row.bytes_per_second:12.0f} bytes/s "
             f"{_energy(row.joules_per_megabyte)}" for row in frame.itertuples()]
    lines += [f"{about}: " + (f"{_plain(values[name])} {unit}".rstrip() if name in values
                              else "not asked for")
              for name, (unit, about) in VALUES.items()]
    return printed(options, {"stream": rows_of(frame), **values}, lines, run_of(
        {"preset": preset, "device": device, "corpus": corpus.name,
         "trained": options.checkpoint is not None, "characters": options.characters},
        {name: (value, *VALUES[name]) for name, value in values.items()},
        {"stream": (STREAM_TABLE, stream_table(frame))},
        f"Streaming {preset}", STREAM_ABOUT))


def bench_step(options: Step) -> int:
    from dataclasses import replace

    from analysis.cli.studies.tables import parts_table, rows_of, steps_table
    from analysis.measure.bench.steps import bench_steps, rivals, step_values
    from mambabyte.config import get_preset

    preset, device = get_preset(options.preset), checked(options)
    model = replace(preset.model, d_model=options.d_model or preset.model.d_model,
                    n_layer=options.n_layer or preset.model.n_layer)
    recipe = replace(preset.train, batch_size=options.batch_size or preset.train.batch_size,
                     context=options.context or preset.train.context)
    way = options.way or ("eager" if not device.startswith("cuda")
                          else "compile" if options.peers else "fused")
    say(f"{options.preset} on {device}, {way}: {recipe.batch_size} x {recipe.context} bytes a step")
    frame, parts = bench_steps(rivals(model, options.patterns, recipe.context), recipe, device, way,
                               say=say, published=bool(options.peers))
    lines = []
    for row in frame.itertuples():
        lines.append(
            f"{row.system:8} {row.parameters:12,} parameters {row.ms:9.2f} ms [{row.low:.2f}, "
            f"{row.high:.2f}] x{row.times_first:.2f} {row.bytes_per_second:13,.0f} bytes/s "
            f"{_energy(row.joules_per_megabyte)}  {row.mixers}")
        lines += [f"    {part.part:22} {part.ms:9.3f} ms {part.share:6.1%}  {part.kernel[:60]}"
                  for part in parts[parts["system"] == row.system].itertuples()]
    found = {"steps": rows_of(frame), "parts": parts.to_dict("records")}
    return printed(options, found, lines, run_of(
        {"preset": options.preset, "d_model": model.d_model, "n_layer": model.n_layer,
         "device": device, "way": way, "batch_size": recipe.batch_size,
         "context": recipe.context}, step_values(frame),
        {"steps": (STEPS_TABLE, steps_table(frame)), "parts": (PARTS_TABLE, parts_table(parts))},
        f"Training steps at {model.n_layer} layers of width {model.d_model}, windows of "
        f"{recipe.context:,} bytes", STEPS_ABOUT))


def bench_start(options: Start) -> int:
    import pandas as pd

    from analysis.cli.studies.tables import rows_of
    from analysis.measure.bench.start import check, paces, start_in, start_values, summary
    from mambabyte.corpus import load_corpus

    device = checked(options)
    cuda = device.startswith("cuda")
    ways = options.ways or (("fused", "compile") if cuda else ("eager",))
    check(options.systems, ways, device)
    data = bytes(load_corpus(options.corpus, say).train)
    captured = [way for way in ways if cuda and options.pace and way not in ("auto", "eager")]
    started: list[dict] = []
    paced: list[dict] = []
    with tempfile.TemporaryDirectory() as made:
        folders = {(name, way): Path(made) / str(i)
                   for i, (way, name) in enumerate(product(ways, options.systems))}
        try:
            for (name, way), folder in folders.items():  # they fill what the warm ones find
                rows = start_in(folder, name, way, "cold", device, data, say)
                started += rows if "cold" in options.caches else []
            used = {name: folders[name, captured[-1]] for name in options.systems if captured}
            for row in paces(used, captured, device, say):
                paced.append(row)
            for (name, way), folder in folders.items() if "warm" in options.caches else ():
                started += start_in(folder, name, way, "warm", device, data, say)
        except KeyboardInterrupt:
            if not started:
                raise
            say(f"interrupted: the {len(started) + len(paced)} rows of before are kept")
    frame, pace = pd.DataFrame(started), pd.DataFrame(paced)
    lines = [f"{row.system:16} {row.way:8} {row.caches:5} {row.mark:18} {row.seconds:7.2f} s "
             + (f"{row.joules:8.0f} J" if row.joules == row.joules else "  energy not measured")
             for row in frame.itertuples()]
    lines += [f"{row.system:16} {row.way:8} {row.ms:8.3f} ms a step [{row.low:.3f}, {row.high:.3f}]"
              for row in pace.itertuples()]
    found = {"starts": rows_of(frame), "pace": pace.to_dict("records")}
    return printed(options, found, lines, run_of(
        {"systems": list(options.systems), "ways": list(ways), "device": device,
         "corpus": options.corpus}, start_values(frame, pace),
        {"summary": (STARTS_TABLE, summary(frame)), "starts": (MARKS_TABLE, frame)}
        | ({"pace": (PACE_TABLE, pace)} if len(pace) else {}),
        "From the start of a process to its first training steps", STARTS_ABOUT))


def _energy(joules_per_megabyte: float) -> str:
    known = joules_per_megabyte == joules_per_megabyte  # not nan
    return f"{joules_per_megabyte:8.1f} J/MB" if known else "energy not measured"


def _plain(value: float) -> str:
    """Four digits, but all of a large number's, never a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def parse_shape(text: str) -> tuple[int, int, int]:
    """``batch,length,channels``, checked by Shape, as numbers."""
    batch, length, channels = map(int, text.split(","))
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
        text += f", error {row['error_output']:.1e}"
        if row["error_gradient"] == row["error_gradient"]:  # of a backward pass
            text += f" / {row['error_gradient']:.1e}"
    return text


ACTIONS = {
    "scan": Action(Scan, bench_scan, "Time the selective scan against its peers"),
    "mixers": Action(Mixers, bench_mixers, "Time the field's mixers against their peers"),
    "stream": Action(Stream, bench_stream, "Time streaming, byte after byte"),
    "start": Action(Start, bench_start, "Time a training from its process's start"),
    "context": Action(Context, bench_context, "Time a sequence on one device and split among all"),
    "step": Action(Step, bench_step, "Time whole training steps, and say where the time goes"),
}
