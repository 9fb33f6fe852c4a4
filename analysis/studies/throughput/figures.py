"""Figures of the throughput study: DataFrames in, matplotlib Figures out."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots import (
    INK,
    label_axes,
    label_lines,
    legend_below,
    log2_axis,
    look,
    looks,
    mark_line,
    new_figure,
    tick_bytes,
    tick_with,
)
from analysis.runs.folders import Run
from analysis.studies.drawing import Drawing
from analysis.studies.throughput import PASSES
from mambabyte.config.mixers import kind_of, uses_scan_form

# One order for all figures, so that a form looks the same in each. There are seven looks, so
# seven forms are drawn; the others, which coincide with some of these, are in the data.
FORMS = ("fused", "chunked", "recurrent", "indexed loop", "document_chunked", "associative",
         "corrected_cumsum")
MIXERS = ("SSM (auto)", "attention")


def _present(order: Sequence[str], names: pd.Series) -> list[str]:
    found = list(dict.fromkeys(names))
    return [n for n in order if n in found] + [n for n in found if n not in order]


def _lines(axes: Axes, frame: pd.DataFrame, name: str, value: str, order: Sequence[str],
           x: str = "length", named: bool = True) -> None:
    """A line a name over ``x`` on log axes, each named at its right end if ``named``."""
    ends = {}
    style = looks(order)
    for key in order:
        one = frame[(frame[name] == key) & frame[value].notna()].sort_values(x)
        if one.empty:
            continue
        y = one[value].astype(float)
        axes.plot(one[x], y, **style[key], label=key)
        ends[key] = (float(one[x].iloc[-1]), float(y.iloc[-1]), style[key]["color"])
    log2_axis(axes, sorted(frame[x].unique()))
    axes.set_yscale("log")
    axes.tick_params(axis="x", rotation=45)
    if named:
        label_lines(axes, ends)


def scan_time(scans: pd.DataFrame, batch_size: int) -> Figure:
    """Time a call of every form against length, forward and with backward."""
    some = scans[scans["batch"] == batch_size]
    figure, axes = new_figure(1, 2, size=(10.0, 4.4), sharey=True)
    for ax, direction in zip(axes, PASSES, strict=True):
        _lines(ax, some[some["pass"] == direction], "form", "ms", _present(FORMS, some["form"])[:7],
               named=False)
        label_axes(ax, "length, bytes", "time of a call, ms", direction)
    legend_below(figure)
    return figure


def allocations(frame: pd.DataFrame) -> Figure:
    """Bytes that one backward pass allocates, by form and length."""
    figure, ax = new_figure()
    _lines(ax, frame, "form", "allocated_bytes", _present(FORMS, frame["form"])[:7])
    ax.set_yscale("log", base=2)
    label_axes(ax, "length, bytes", "allocated by one backward pass, bytes")
    tick_bytes(ax.yaxis)
    return figure


def mixer_time(mixers: pd.DataFrame, crossovers: pd.DataFrame, batch_size: int) -> Figure:
    """Mixers against length; the line marks where the first takes attention's operations."""
    order = _present(MIXERS, mixers["mixer"])
    some = mixers[mixers["batch"] == batch_size]
    figure, axes = new_figure(1, 2, size=(10.0, 4.4), sharey=True)
    for ax, direction in zip(axes, PASSES, strict=True):
        _lines(ax, some[some["pass"] == direction], "mixer", "ms", order, named=False)
        if len(crossovers):
            mark_line(ax, x=float(crossovers["crossover_in_operations"].iloc[0]),
                      text="equal operations")
        label_axes(ax, "length, bytes", "time of a call, ms", direction)
    legend_below(figure)
    return figure


def batch_time(scans: pd.DataFrame, mixers: pd.DataFrame, length: int) -> Figure:
    """Time of a window of ``length`` against the batch, both passes: scan forms, and mixers."""
    figure, axes = new_figure(1, 2, size=(10.0, 4.4))
    panels = (("scan alone", scans, "form", FORMS), ("whole mixer", mixers, "mixer", MIXERS))
    for ax, (title, frame, name, order) in zip(axes, panels, strict=True):
        some = frame[(frame["length"] == length) & (frame["pass"] == PASSES[1])]
        some = some.assign(window=some["ms"].astype(float) / some["batch"])
        _lines(ax, some, name, "window", _present(order, some[name])[:7], x="batch")
        label_axes(ax, f"batch, windows of {length:,} bytes", "time of a window, ms", title)
    return figure


def energy(mixers: pd.DataFrame, scans: pd.DataFrame, batch_size: int) -> Figure:
    """Gross joules per megabyte against length, forward with backward: scan forms, and mixers."""
    figure, axes = new_figure(1, 2, size=(10.0, 4.4))
    panels = (("scan alone", scans, "form", FORMS), ("whole mixer", mixers, "mixer", MIXERS))
    for ax, (title, frame, name, order) in zip(axes, panels, strict=True):
        some = frame[(frame["batch"] == batch_size) & (frame["pass"] == PASSES[1])]
        _lines(ax, some, name, "joules_per_megabyte", _present(order, some[name])[:7])
        label_axes(ax, "length, bytes", "joules per megabyte (gross)", title)
    return figure


def streaming(frame: pd.DataFrame) -> Figure:
    """Latency of one byte, and the state it carries, against bytes seen."""
    figure, axes = new_figure(1, 2, size=(10.0, 4.2))
    names = list(dict.fromkeys(frame["system"]))
    style = looks(names)
    seen = sorted(frame["bytes_seen"].unique())
    place = {s: i for i, s in enumerate(seen)}  # zero has no place on a logarithmic axis
    for name in names:
        one = frame[frame["system"] == name]
        x = one["bytes_seen"].map(place)
        axes[0].plot(x, one["ms"].astype(float), label=name, **style[name])
        axes[1].plot(x, one["state_bytes"], label=name, **style[name])
    for ax in axes:
        ax.set_xticks(range(len(seen)), [f"{s:,}" for s in seen])
    axes[0].set_yscale("log")
    tick_with(axes[0].yaxis, lambda ms: f"{ms:g}")
    axes[1].set_yscale("log", base=2)
    tick_bytes(axes[1].yaxis)
    label_axes(axes[0], "bytes seen before", "latency of one byte, ms")
    label_axes(axes[1], "bytes seen before", "state, bytes")
    legend_below(figure)
    return figure


def training(frame: pd.DataFrame) -> Figure:
    """Training throughput of parameter-matched systems, by pattern and scan form."""
    some = frame[frame["bytes_per_second"].notna()]
    figure, ax = new_figure(size=(7.2, 0.55 * len(some) + 1.2))
    names = [f"{p} ({f})" if uses_scan_form(p) else p
             for p, f in zip(some["pattern"], some["form"], strict=True)]
    values = some["bytes_per_second"].astype(float) / 1e3
    for i, value in enumerate(values):
        ax.barh(i, value, color=look(0)["color"], height=0.6)
        ax.annotate(f"{value:,.0f}" if value >= 100 else f"{value:.1f}", (value, i),
                    xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(right=1.15 * float(values.max()))
    label_axes(ax, "trained text, kB/s (kilobytes a second)", "layer pattern (scan form)")
    return figure


def training_steps(frame: pd.DataFrame) -> Figure:
    """Milliseconds and, where a counter was read, joules of a training step against length."""
    measured = frame["joules_per_step"].notna().any()
    columns = {"ms": "a training step, ms"}
    if measured:
        columns["joules_per_step"] = "a training step, J"
    figure, axes = new_figure(1, len(columns), size=(5.0 * len(columns), 3.6), squeeze=False)
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        for i, pattern in enumerate(dict.fromkeys(frame["pattern"])):
            one = frame[(frame["pattern"] == pattern) & frame[column].notna()]
            ax.plot(one["context"], one[column].astype(float), **look(i),
                    label=kind_of(pattern))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        tick_with(ax.xaxis, lambda length: f"{length:,.0f}")
        tick_with(ax.yaxis, lambda value: f"{value:g}")
        label_axes(ax, "context, bytes", label)
    axes[0][0].legend()
    return figure


PEERS = {"fused": "fused (this project)", "fused, recompute": "fused, recomputed backward",
         "mamba_ssm": "mamba-ssm", "sdpa": "attention of the same width (SDPA)"}


def scan_peers(bench: pd.DataFrame) -> Figure:
    """Median of a call by shape and peer on a log axis, and the machine's floor of the scan."""
    shape = "batch x length x channels"
    shapes = list(dict.fromkeys(bench[shape]))[::-1]
    figure, axes = new_figure(1, 2, size=(10.0, 0.45 * len(shapes) + 2.0), sharey=True)
    present = [name for name in PEERS if name in set(bench["of"])]
    for ax, direction in zip(axes, PASSES, strict=True):
        some = bench[bench["pass"] == direction]
        for i, name in enumerate(present):
            # Recomputation is of the backward pass: forward it is the same call.
            hidden = name == "fused, recompute" and direction == PASSES[0]
            one = some[(some["of"] == name) & (not hidden)]
            y = [shapes.index(s) for s in one[shape]]
            ax.plot(one["median (us)"].astype(float) / 1e3, y,
                    **{**look(i), "linestyle": "none", "markersize": 8},
                    label=PEERS[name] if ax is axes[0] else None)
        floor = some[some["floor (us)"].notna()].drop_duplicates(shape)
        ax.plot(floor["floor (us)"].astype(float) / 1e3, [shapes.index(s) for s in floor[shape]],
                linestyle="none", marker="|", markersize=18, color=INK,
                label="floor of the scan here" if ax is axes[0] else None)
        ax.set_xscale("log")
        tick_with(ax.xaxis, lambda ms: f"{ms:g}")
        ax.set_yticks(range(len(shapes)), shapes)
        ax.set_ylim(-0.6, len(shapes) - 0.4)
        label_axes(ax, "median of a call, ms", shape, direction)
    axes[1].set_ylabel("")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _peers_caption(run: Run) -> str:
    return (f"Measured on {run.values['peers_machine'].value}, not on this machine: median of a "
            "call, log axis. The floor is the scan's; attention does other work.")


FIGURES = (
    Drawing(
        "scan_time", scan_time, ("scans", "batch_size"),
        "Time of every scan form against length",
        caption="Median of a call (on a GPU a captured graph), log-log, forward alone and with the "
                "backward pass. Lines end where the guard ended the series. Seven forms are drawn; "
                "the data have the others.",
        alt="Two log-log panels of time against length, one line a scan form."),
    Drawing(
        "allocations", allocations, ("allocations",), "Bytes allocated by one backward pass",
        caption="New tensors made by the operators of a backward pass, batch 1. Forms that slice "
                "or index in a loop grow faster than the length.",
        alt="Log-log lines of allocated bytes against length; two are steeper than the others."),
    Drawing(
        "scan_peers", scan_peers, ("peers",), "The scan against its peers, recorded on a GPU",
        caption=_peers_caption,
        alt="Two panels of dots on a log axis of time, one row a shape: the fused scan, its "
            "variant that recomputes, mamba-ssm and attention, and a tick for the floor."),
    Drawing(
        "bench", scan_peers, ("bench",), "The scan beside its peers",
        caption="Median of a call, log axis. The floor is the scan's; attention does other work.",
        alt="Two panels of dots on a log axis of time, one row a shape: the fused scan, its "
            "variant that recomputes, mamba-ssm and attention, and a tick for the floor."),
    Drawing(
        "mixers", mixer_time, ("mixers", "crossovers", "batch_size"), "Mixers against length",
        caption="Median of a call (on a GPU a captured graph), log-log. 'auto' is the default form "
                "of the scan; the dashed line is the length at which the first mixer and attention "
                "take equal operations.",
        alt="Two log-log panels of time against length, one line a mixer, the SSM by scan form."),
    Drawing(
        "batch", batch_time, ("scans", "mixers", "batch_length"),
        "Time of a window against the batch",
        caption="Median of a call, forward and backward, over the batch, log-log. Where a line "
                "falls the device was not full; a flat line is a full one.",
        alt="Two log-log panels of time a window against batch: scan forms, and whole mixers.",
        data=lambda scans, mixers, length: scans[scans["length"] == length]),
    Drawing(
        "streaming", streaming, ("streaming",), "Latency and state of streaming",
        caption="Left: median latency of one more byte. Right: the bytes carried from one byte to "
                "the next.",
        alt="Two panels against bytes seen: latency, and state in bytes on a log axis, one line a "
            "mixer; attention with a window and with all keys."),
    Drawing(
        "energy", energy, ("mixers", "scans", "batch_size"), "Joules per megabyte against length",
        caption="Gross joules per megabyte (1e6 bytes) of a call, forward and backward, log-log: "
                "scan forms alone, and whole mixers. Flat is linear; a short call leaves most of "
                "the device idle.",
        alt="Two log-log panels of joules per megabyte against length: scan forms, and mixers.",
        when=lambda mixers, scans, _: bool(scans["joules_per_megabyte"].notna().any())),
    Drawing(
        "training", training, ("training",), "Training throughput at equal parameters",
        caption="Thousand bytes of text a second, by layer pattern and form of the scan. 'chunked' "
                "and 'document_chunked' show what the default form is worth.",
        alt="Horizontal bars of training throughput for each system."),
)
