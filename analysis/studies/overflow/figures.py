"""Figures of the overflow study. Each takes a DataFrame of its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from analysis import plots
from analysis.runs.folders import Run
from analysis.studies.drawing import Drawing
from analysis.studies.overflow import PRECISIONS
from analysis.studies.overflow.error_tables import (
    KEYS,
    NOISE_CHUNK,
    PARTS,
    WHOLE,
    outcome_counts,
    slug,
)
from analysis.theory import bounds

# Outcomes of a cell -> what the legend says, colour, hatching; from harmless to lost. Each limit
# is twice the recurrence's own error in that arithmetic where that is more: no form is better.
ROUGH = 1e-3
OWN_ERRORS = 2.0
LOOKS = (
    (("right",), "right, within 0.1 %", "#f2f4f7", ""),
    (("rough",), "off by 0.1 to 1 %", plots.SKY, ""),
    (("silent",), "silent: finite, further off", plots.ORANGE, "////"),
    (("inf", "nan"), "loud: inf or nan", plots.VERMILION, "xxxx"),
)
_COLUMNS = 4
# Forms whose gradient of A is drawn: two that lose it, three that keep it.
NOISY = ("corrected_cumsum", "pairwise", "segment_sum", "associative", "chunked")


def outcomes_of(errors: pd.DataFrame, precision: str, kind: str) -> pd.DataFrame:
    """The errors of a precision and kind of decay as outcomes, by limits that fit the precision."""
    rows = _part(errors, precision, kind)
    decays = [column for column in rows if column not in KEYS]
    own = rows[rows["form"] == "recurrent"].groupby("of")[decays].max()
    found = rows[rows["form"] != "recurrent"]
    error = found[decays].to_numpy(float)
    rest = np.nan_to_num(OWN_ERRORS * own.reindex(found["of"]).to_numpy(float))
    names = np.select(
        [np.isnan(error), np.isinf(error), error <= np.maximum(ROUGH, rest),
         error <= np.maximum(bounds.SILENT, rest)], ["nan", "inf", "right", "rough"], "silent")
    return found.assign(**{decay: names[:, i] for i, decay in enumerate(decays)})


def right_everywhere(outcomes: pd.DataFrame) -> dict[str, list[str]]:
    """Form -> its parts without a failing cell: a map of these would be empty."""
    decays = [column for column in outcomes if column not in KEYS]
    right = outcomes[decays].isin(("right",)).all(axis=1).groupby(
        [outcomes["form"], outcomes["of"]], sort=False).all()
    found: dict[str, list[str]] = {}
    for form, part in right[right].index:
        found.setdefault(form, []).append(part)
    return found


def error_maps(errors: pd.DataFrame, precision: str, kind: str) -> Figure:
    """Chunk size against decay, a map of the value of each form and one of its worst gradient, with
    the analytic bound over them; a map without a failure is left out."""
    cells = outcomes_of(errors, precision, kind)
    right = right_everywhere(cells)
    every = [(form, part) for form in dict.fromkeys(cells["form"]) for part in PARTS]
    panels = [(form, part) for form, part in every if part not in right.get(form, ())] or every
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = plots.new_figure(
        rows, _COLUMNS, size=(10.0, 1.55 * rows + 1.1), sharex=True, sharey=True, squeeze=False)
    chunked = cells[~cells["form"].isin(WHOLE)]
    chunks = np.unique((chunked if len(chunked) else cells)["chunk"].to_numpy(float))
    for axes, (form, part) in zip(grid.ravel(), panels, strict=False):
        _map(axes, cells[(cells["form"] == form) & (cells["of"] == part)], chunks,
             partial(bounds.boundary, form, dtype=precision))
        axes.set_title(f"{form}\n{part}", fontsize=9.5, pad=4)
    for axes in grid.ravel()[len(panels):]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("chunk, steps", fontsize=9.5)
        axes.tick_params(left=True)
    for i, axes in enumerate(grid.ravel()[:len(panels)]):
        if i + _COLUMNS >= len(panels):
            axes.set_xlabel("log-decay, nats a step", fontsize=9.5)
            axes.tick_params(labelbottom=True, bottom=True)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white" if h else plots.MUTED, label=name)
               for _, name, c, h in LOOKS]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _map(
    axes: plots.Axes, rows: pd.DataFrame, chunks: np.ndarray, bound: Callable[[float], float],
) -> None:
    """One map. A form that has no chunks fills the height."""
    outcomes = rows.set_index("chunk").drop(columns=list(KEYS[:-1]))
    x, y = _edges(np.array([float(decay) for decay in outcomes])), _edges(chunks)
    across = y[[0, -1]] if set(rows["form"]) <= {*WHOLE} else y
    cells = outcomes.to_numpy(object)
    for names, _, colour, hatch in LOOKS:
        boxes = _boxes(np.isin(cells.astype(str), names), x, across)
        if boxes:  # one path of few boxes: a fine map need not be a large file
            axes.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=colour,
                                     hatch=hatch, edgecolor="white", linewidth=0))
    line = np.geomspace(x[0], x[-1], 40)
    limits = np.array([bound(v) for v in line])
    seen = (limits > y[0] / 2) & (limits < y[-1] * 2)
    if seen.any():
        axes.plot(line[seen], limits[seen], color=plots.BLACK, linestyle="--", linewidth=1.4,
                  marker="")
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    axes.grid(False)
    ticks = [v for v in chunks if np.log2(v) % 2 == 0] or list(chunks)
    axes.set_yticks(ticks, [f"{v:g}" for v in ticks])
    axes.set_xticks([v for v in (0.01, 0.1, 1.0, 10.0) if x[0] <= v <= x[-1]])
    plots.tick_with(axes.xaxis, "{:g}".format)
    axes.tick_params(labelsize=9.5, bottom=False, left=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(plots.mpl.ticker.NullLocator())


def _part(outcomes: pd.DataFrame, precision: str, kind: str) -> pd.DataFrame:
    return outcomes[(outcomes["precision"] == precision) & (outcomes["kind"] == kind)]


def _boxes(cells: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[Path]:
    """The set cells as few rectangles; ``cells`` (rows, columns) bool, ``x`` and ``y`` the edges.
    """
    rows, columns = _blocks(cells), [(c, d, a, b) for a, b, c, d in _blocks(cells.T)]
    boxes = []
    for bottom, top, left, right in min(rows, columns, key=len):
        corners = [(x[left], y[bottom]), (x[right], y[bottom]), (x[right], y[top]),
                   (x[left], y[top])]
        boxes.append(Path([*corners, corners[0]], closed=True))
    return boxes


def _blocks(cells: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Runs of set cells along the rows, joined where the next row has the same run: first row,
    row after the last, first column, column after the last."""
    spans: list[set[tuple[int, int]]] = []
    for row in cells:
        steps = np.diff(np.concatenate([[0], row.astype(int), [0]]))
        spans.append({(int(a), int(b)) for a, b in zip(
            (steps == 1).nonzero()[0], (steps == -1).nonzero()[0], strict=True)})
    blocks = []
    for i, row_spans in enumerate(spans):
        for span in sorted(row_spans - (spans[i - 1] if i else set())):
            end = i
            while end < len(spans) and span in spans[end]:
                end += 1
            blocks.append((i, end, *span))
    return blocks


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges of cells around logarithmically placed centres."""
    logs = np.log(centres)
    if len(logs) == 1:
        return np.exp(np.array([logs[0] - 0.5, logs[0] + 0.5]))
    middle = (logs[1:] + logs[:-1]) / 2
    first, last = 2 * logs[0] - middle[0], 2 * logs[-1] - middle[-1]
    return np.exp(np.concatenate([[first], middle, [last]]))


def gradient_noise(noise: pd.DataFrame) -> Figure:
    """Error of the gradient of A over the decay: noise where the truth is small, then nan."""
    figure, axes = plots.new_figure()
    chosen = noise[noise["kind"] == "constant"]
    forms = [form for form in NOISY if form in set(chosen["form"])]
    ends = {}
    for form, look in plots.looks(forms).items():
        rows = chosen[chosen["form"] == form].sort_values("decay")
        rows = rows[np.isfinite(rows["error of d A"])]
        axes.plot(rows["decay"], rows["error of d A"], **look)
        if len(rows):
            ends[form] = (rows["decay"].iloc[-1], rows["error of d A"].iloc[-1], look["color"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    plots.label_axes(axes, "log-decay per step, nats", "relative error of the gradient of A")
    plots.mark_line(axes, y=1e-2, text="1 %")
    plots.label_lines(axes, ends)
    return figure


def error_by_position(positions: pd.DataFrame, chunk: int) -> Figure:
    """Error of y by position on a log axis, chunks as bands; what is inf or nan is marked above."""
    figure, axes = plots.new_figure()
    x, error = positions["position"].to_numpy(), positions["error"].to_numpy(float)
    for start in range(0, len(x), 2 * chunk):
        axes.axvspan(start - 0.5, min(start + chunk, len(x)) - 0.5, color=plots.PANEL, zorder=0)
    finite = np.isfinite(error)
    axes.plot(x[finite], error[finite].clip(1e-9), marker="", color=plots.BLUE)
    axes.plot(x[~finite], np.ones((~finite).sum()), "x", color=plots.VERMILION,
              label="inf or nan")
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(x) - 0.5)
    axes.set_ylim(5e-10, max(2.0, error[finite].max(initial=0.0) * 2))
    axes.grid(axis="x", visible=False)
    plots.mark_line(axes, y=1e-2, text="1 %")
    plots.label_axes(axes, "position, steps", "relative error of y")
    if not finite.all():
        axes.legend(loc="lower right")
    return figure


def pair_shares(pairs: pd.DataFrame) -> Figure:
    """Share of pairs past the bound over the length: closed form, counted, and channels lost."""
    figure, axes = plots.new_figure()
    names = {
        "closed form, share of pairs": "pairs, closed form",
        "counted, share of pairs": "pairs, counted",
        "counted, share of channels": "channels, counted",
    }
    ends = {}
    for (column, name), look in zip(names.items(), map(plots.look, range(3)), strict=True):
        axes.plot(pairs["length, steps"], 100 * pairs[column], **look)
        ends[name] = (pairs["length, steps"].iloc[-1], 100 * pairs[column].iloc[-1],
                      look["color"])
    plots.log2_axis(axes, [16, 32, 64, 128, 256, 512, 1024])
    plots.label_axes(axes, "length, steps", "past the bound of float32, %")
    plots.label_lines(axes, ends)
    return figure


def exponent_lines(followed: pd.DataFrame) -> Figure:
    """The largest exponent of a chunk of 32 while a model trains, a line each form, and the bound.

    Where a curve ends in the first half of the longest, a second panel shows the first steps.
    """
    bound = bounds.log_max()
    names = list(dict.fromkeys(followed["form"]))
    lines = {name: followed[followed["form"] == name].groupby("step")[
        "largest exponent in 32 steps"].max() for name in names}
    longest = max(int(line.index[-1]) for line in lines.values())
    short = [name for name, line in lines.items() if line.index[-1] < longest / 2]
    figure, grid = plots.new_figure(
        1, 2 if short else 1, squeeze=False, **({"width_ratios": (3, 2)} if short else {}))
    whole = grid[0, 0]
    end = max(line.iloc[-1] for line in lines.values() if line.index[-1] == longest)
    _exponents(whole, lines, bound, right=end > 1.5 * bound)  # where no curve crosses the words
    plots.label_lines(whole, {
        _trained(name): (lines[name].index[-1], lines[name].iloc[-1], look["color"])
        for name, look in plots.looks(names).items() if name not in short})
    if short:
        early = grid[0, 1]
        last = max(int(lines[name].index[-1]) for name in short)
        limit = min(50 * math.ceil(1.5 * last / 50), longest)
        _exponents(early, {name: line[line.index <= limit] for name, line in lines.items()}, bound)
        for name in short:
            early.plot(lines[name].index[-1], lines[name].iloc[-1], "x", color=plots.INK,
                       markersize=9, label="ended here" if name == short[0] else None)
        whole.set_title("all steps")
        early.set_title(f"the first {limit} steps")
        early.legend(loc="lower right")
    return figure


def _trained(form: str) -> str:
    return "stable (auto)" if form == "auto" else form


def _exponents(
    axes: plots.Axes, lines: dict[str, pd.Series], bound: float, right: bool = False
) -> None:
    """``lines``: form -> largest exponent by step; ``right``: where the bound is named."""
    for (name, line), look in zip(lines.items(), plots.looks(list(lines)).values(), strict=True):
        axes.plot(line.index, line, markevery=max(1, len(line) // 10), label=_trained(name), **look)
    top = max(line.max() for line in lines.values())
    axes.set_ylim(0, max(bound * 1.1, top * 1.05))
    plots.mark_line(axes, y=bound, text="float32 overflows", right=right)
    plots.label_axes(axes, "training step", "largest cumulated log-decay, nats")


def _map_drawing(precision: str, kind: str) -> Drawing:
    """Float32 is drawn with both kinds of decay; the lower precisions, whose maps differ less by
    kind, with constant decay."""
    parts = ["map", *([precision] if precision != "float32" else []),
             *([kind] if kind != "constant" else [])]
    def caption(run: Run) -> str:
        right = right_everywhere(outcomes_of(run.tables["errors"].frame, precision, kind))
        whole = [form for form, parts in right.items() if set(parts) == set(PARTS)]
        half = [f"the {parts[0]} of {form}" for form, parts in right.items() if form not in whole]
        return (f"Dashed: the analytic bound. Without a failure, and so not drawn: recurrent (the "
                f"recurrence itself), {', '.join([*whole, *half]) or 'nothing else'}. A limit is "
                f"twice the recurrence's own error in this arithmetic where that is more.")

    return Drawing(
        slug("_".join(parts)), partial(error_maps, precision=precision, kind=kind), ("errors",),
        f"What each form makes of a chunk: {precision}, {kind} decay", caption=caption,
        alt="Maps of chunk size against decay, one a form, coloured and hatched by "
            "outcome, with the analytic bound as a dashed curve. The table counts the cells.",
        data=lambda errors: outcome_counts(outcomes_of(errors, precision, kind)),
        when=lambda errors: len(outcomes_of(errors, precision, kind)) > 0)


FIGURES = (
    *(_map_drawing(precision, "constant") for precision in PRECISIONS),
    _map_drawing("float32", "data-dependent"),
    Drawing(
        "gradient_noise", gradient_noise, ("noise",),
        f"Error of the gradient of A at chunk {NOISE_CHUNK}",
        caption="Forms that take differences of cumulated sums lose the gradient of the decay "
                "where it is small; the others keep it.",
        alt="Lines of relative error against decay: flat near rounding for segment sums, "
            "associative and stable chunks, rising for the corrected cumsum and pairwise "
            "differences.",
        when=lambda noise: bool(((noise["kind"] == "constant") & noise["form"].isin(NOISY)).any())),
    Drawing(
        "pairs", pair_shares, ("pairs",), "Past the bound for the whole-sequence trick, untrained "
        "model",
        caption="Share of (channel, state) pairs and of channels whose exponent overflows float32.",
        alt="Rising curves from zero at length 56; counted and closed form of the pairs coincide."),
    Drawing(
        "exponent", exponent_lines, ("followed",), "Exponent of 32 steps while training",
        caption="Largest cumulated log-decay over batch, channels, states and layers. Training "
                "makes fast states faster. A curve that ends at the bound ended in nan there.",
        alt="One line a form of the scan, rising from above 50 over the training steps; the stable "
            "one passes 88.7, a form that takes the exponent ends where it comes there."),
)
