"""The bench of one sequence on one device and on several: ``mambabyte bench context``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from analysis.cli.console import say
from analysis.cli.studies.benched import Common, checked, printed, run_of
from mambabyte.config.checks import Count, Layers, entries
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.presets import PresetName

TABLE = "One sequence alone and split: interleaved in one run, medians and quartiles"
ABOUT = ("Forward and backward of one sequence on one device, and with its length split "
                 "among all with the mean of the gradients; a stretch is a sequence of the share "
                 "of one device, alone, which is what the split would take if nothing had to be "
                 "exchanged. Messages are the time in the kernels that exchange.")


@dataclass(frozen=True)
class Context(Common):
    preset: PresetName = "mamba_byte"
    """Which model."""
    d_model: Count | None = None
    """Its width; the preset's own when not given."""
    n_layer: Layers | None = None
    """Its depth; the preset's own when not given."""
    patterns: tuple[LayerPattern, ...] = ()
    """Layer patterns in place of the preset's: M, S, MMMA, ..."""
    lengths: Annotated[tuple[Count, ...], entries()] = (1_000_000,)
    """Bytes of a sequence."""
    repeats: Count = 7
    """Timings of each, in turns; the median is shown."""


def bench_context(options: Context) -> int:
    from dataclasses import replace

    from analysis.cli.studies.tables import context_table, rows_of
    from analysis.measure.bench import context
    from mambabyte.config import get_preset
    from mambabyte.model import distributed

    preset, device = get_preset(options.preset).model, checked(options)
    model = replace(preset, d_model=options.d_model or preset.d_model,
                    n_layer=options.n_layer or preset.n_layer)
    with distributed.joined(device) as world:
        frame = context.bench_context(
            model, options.patterns or (preset.layer_pattern,), options.lengths, world,
            world.device(device), options.repeats, say=say if world.first else lambda line: None)
        if not world.first:
            return 0
    lines = [f"{row.layers:6} {row.length:11,} bytes {row.way:8} x{row.processes} "
             + (row.note or f"{row.ms:10.2f} ms [{row.low:.2f}, {row.high:.2f}]")
             + (f", {row.messages_ms:.2f} ms in messages" if row.way == "split" else "")
             + (f", peak {row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes > 0 else "")
             for row in frame.itertuples()]
    return printed(options, {"context": rows_of(frame)}, lines, run_of(
        {"preset": options.preset, "d_model": model.d_model, "n_layer": model.n_layer,
         "device": device, "processes": world.size}, {},
        {"context": (TABLE, context_table(frame))},
        f"One sequence on one device and on {world.size}", ABOUT))
