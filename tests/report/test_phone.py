"""Figures for a phone: as wide as its screen, every panel and every word on it."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from analysis import plots
from analysis.plots.phone import WIDTH, phone_layout
from analysis.plots.svg import wide_and_narrow
from analysis.studies.ablation import figures as ablation


def panels(count: int, **subplots):
    figure, axes = plots.new_figure(1, count, size=(3.5 * count, 4.0), **subplots)
    for i, ax in enumerate(axes):
        ax.plot([1, 1000], [1, 2], label=f"curve {i}")
        plots.label_axes(ax, "length of what is read, bytes", "time, ms" if i == 0 else "time, s",
                         f"panel {i} with a rather long title")
    plots.label_lines(axes[-1], {"the last curve": (1000, 2, plots.BLUE)})
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.long),
                                   pytest.param(9, marks=pytest.mark.long)])
def test_everything_is_on_the_screen(count):
    figure = panels(count) if count > 1 else one_panel()
    before = words(figure)
    narrow = phone_layout(figure)
    narrow.draw_without_rendering()
    assert narrow.get_figwidth() == WIDTH
    page = narrow.bbox
    texts = [t for ax in narrow.axes for t in
             (*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title,
              *ax.get_yticklabels()) if t.get_text() and t.get_visible()]
    texts += [t for legend in narrow.legends for t in legend.get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 - 1, text
        assert box.x1 <= page.x1 + 1, text
    assert words(figure) == before  # the wide one stays as it is


def words(figure) -> list[str]:
    """Size and words of the drawing."""
    return re.findall(r'viewBox="[^"]+"|>([^<>]+)</text>', figure._repr_svg_())


def one_panel():
    figure, ax = plots.new_figure()
    ax.barh(["a rather long name of a scan form", "another"], [1, 2])
    plots.label_axes(ax, "bytes of one training step at 64 x 2048 and then some, GB", "scan form")
    return figure


def test_panels_stand_in_one_column_with_axes_of_their_own():
    narrow = phone_layout(panels(3, sharey=True))
    narrow.draw_without_rendering()
    tops = [ax.get_position().y1 for ax in narrow.axes]
    assert tops == sorted(tops, reverse=True)
    assert len({round(ax.get_position().x0, 3) for ax in narrow.axes}) == 1
    assert all(any(t.get_visible() and t.get_text() for t in ax.get_yticklabels())
               for ax in narrow.axes)


def test_words_break_between_words_only():
    figure, axes = plots.new_figure(2, 3)
    for ax in axes.flat:
        plots.label_axes(ax, "log-decay per step, nats", "time, ms", "a_name_that_cannot_be_broken")
    for ax in phone_layout(figure).axes:
        assert ax.get_title(loc="left") == "a_name_that_cannot_be_broken"
        assert ax.get_xlabel().split() == ["log-decay", "per", "step,", "nats"]


def test_crowded_ticks_are_turned():
    figure, ax = plots.new_figure(size=(12.0, 4.0))
    ax.set_xticks(range(20), [f"{i:,}" for i in range(1000, 1020)])
    turned = phone_layout(figure).axes[0].get_xticklabels()
    assert {label.get_rotation() for label in turned} == {90}
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0}


def test_drawings_are_the_same_bytes_and_tell_their_ids_apart():
    first, second = (wide_and_narrow(panels(2), "tiny.times") for _ in range(2))
    assert first == second
    wide, narrow = (set(re.findall(r'clip-path="url\(#(\w+)\)"', svg)) for svg in first)
    assert wide
    assert not wide & narrow


def test_four_comparisons_stand_two_by_two():
    kinds = ["steps", "wall-clock", "FLOPs", "joules"]
    points = pd.DataFrame([{"comparison": k, "pattern": p, "seed": 0, "bits_per_byte": 2.0}
                           for k in kinds for p in "MA"])
    figure = ablation.differences(points, ("M", "A"), "A")
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 2)
    assert figure.get_figwidth() * 72 <= 792  # points: what the page's column shows whole
