"""Figures that would stop whoever reads or draws them, and what a page may do."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.plots import svg
from analysis.plots.training import curves
from analysis.report.html.svg import inline_svg
from analysis.report.parts import drawings
from mambabyte.errors import UserError
from tests.helpers.report_world import World

BOMBS = {
    "use": "".join(f'<g id="a{i}">' + f'<use href="#a{i + 1}"/>' * 10 + "</g>" for i in range(9))
           + '<g id="a9"><path d="M0 0"/></g>',
    "pattern": "".join(f'<pattern id="a{i}">' + f'<rect fill="url(#a{i + 1})"/>' * 10
                       + "</pattern>" for i in range(9)) + '<pattern id="a9"/>',
    "itself": '<g id="a0"><use href="#a0"/></g>',
    "one another": '<g id="a0"><use href="#b"/></g><g id="b"><use href="#a0"/></g>',
    "nested": "<g>" * 5000 + "</g>" * 5000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_figure_that_grows_without_end_is_refused(name):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{}<use href="#a0"/></svg>'
    with pytest.raises(UserError, match=r"figure p (draws more|has elements)"):
        inline_svg(svg.format(BOMBS[name]), "p", "t", "a")


def test_a_mark_used_many_times_is_drawn():
    marks = '<defs><path id="m" d="M0 0"/></defs>' + '<use href="#m" x="1"/>' * 2000
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{marks}</svg>'
    assert inline_svg(svg, "p", "t", "a").count("<use") == 2000


@pytest.mark.parametrize("attribute", ['style="font: {}"', 'd="{}"', 'x="{}"', 'style="fill: {}"'])
@pytest.mark.parametrize("text", ["1" * 300_000, "url(" * 80_000, " " * 300_000, "-1." * 100_000])
def test_long_attributes_take_no_longer_than_their_length(attribute, text):
    """Done within a moment, where the square of the length would be hours."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><path {attribute.format(text)}/></svg>'
    assert "<path" in inline_svg(svg, "p", "t", "a")


def test_no_page_sends_or_loads_anything(world: World):
    (world.run() / "notebook.ipynb").write_text(
        '{"cells": [{"cell_type": "markdown", "source": "[there](https://example.org)"}]}')
    pages = world.pages()
    assert "notebook-tiny-1" in pages
    for page in pages.values():
        policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].split('"')[0]
        for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
            assert rule in policy.split("; ")


def test_an_appendix_passes_the_check_of_the_page(world: World):
    (world.run() / "notebook.ipynb").write_text(
        '{"cells": [{"cell_type": "markdown", "source": "[gone](#nowhere)"}]}')
    with pytest.raises(UserError, match="leads to #"):
        world.build()
    assert not world.out.exists()


def test_drawings_made_ahead_by_other_processes_are_the_same(tmp_path, monkeypatch):
    """What fails there is left to be said where it is drawn."""
    monkeypatch.setattr(drawings, "FEWEST", 1)
    monkeypatch.setattr(drawings, "MOST", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, shown = pd.DataFrame({"seconds": [1, 2], "loss": [2, 1]}), {"loss": "loss, nats"}
    line, fails = (partial(curves, {"a run": frame}, shown) for frame in (run, pd.DataFrame()))
    wanted = [(SimpleNamespace(key=partial(str, name), draw=draw), None, name)
              for name, draw in (("one", line), ("two", fails), ("three", line))]
    done: list[float] = []
    drawings.draw_ahead(wanted, done.append)
    assert done == [1 / 3, 2 / 3, 1]
    assert len(list((tmp_path / "mambabyte" / "drawings").iterdir())) == 2
    with monkeypatch.context() as patch:  # found, not made
        patch.setattr(drawings, "wide_and_narrow", None)
        one, three = (drawings.drawn(*wanted[i]) for i in (0, 2))
    assert one == svg.wide_and_narrow(line(), "one")
    assert one != three
    with pytest.raises(KeyError):
        drawings.drawn(*wanted[1])
    monkeypatch.setattr(drawings, "ProcessPoolExecutor", None)  # nor asked for again
    drawings.draw_ahead([wanted[0], wanted[2]])


def test_drawings_in_another_users_cache_are_not_shown(tmp_path, monkeypatch):
    """A report would carry what somebody has put there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(drawings, "wide_and_narrow", lambda figure, anchor: ("wide", "narrow"))
    monkeypatch.setattr(drawings, "_code", lambda study: "")
    figure = SimpleNamespace(key=lambda: "key", draw=lambda: None)
    assert drawings.drawn(figure, None, "a") == ("wide", "narrow")
    (kept,) = (tmp_path / "mambabyte" / "drawings").iterdir()
    good = kept.read_text()
    other = good.replace('"key": "', '"key": "0')
    for damage in ("", "{", "[]", good.replace("key", "kay"), other):
        kept.write_text(damage)
        assert drawings.drawn(figure, None, "a") == ("wide", "narrow")
    kept.write_text(good.replace("wide", "planted").replace("narrow", "planted"))
    assert drawings.drawn(figure, None, "a") == ("planted", "planted")
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert drawings.drawn(figure, None, "a") == ("wide", "narrow")
    assert "planted" in kept.read_text()
