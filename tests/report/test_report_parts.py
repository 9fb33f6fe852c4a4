"""Parts of the report: numbers, tables, formulas, headings, the check of links, colours."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.report.html import tables, text
from analysis.report.html.check import check_page
from analysis.report.html.markdown import formula, to_html
from analysis.report.links import resolve
from analysis.report.parts.example import A, first_lost, repeated, worked_example
from analysis.runs.records import RECORDS, load_record
from analysis.studies import drawing
from mambabyte.errors import UserError
from mambabyte.ops.scan.recurrent import recurrent_scan

ROOT = Path(__file__).resolve().parents[2]


def test_worked_example_is_the_recurrence():
    steps = worked_example()
    columns = {k: torch.tensor([[[getattr(s, k)] for s in steps]], dtype=torch.float64)
               for k in ("u", "delta", "B", "C")}  # (1, 5, 1)
    y, state = recurrent_scan(
        columns["u"], columns["delta"], torch.tensor([[A]], dtype=torch.float64), columns["B"],
        columns["C"], torch.zeros(1, 1, 1, dtype=torch.float64))
    skip = 0.5 * columns["u"]
    expected = (y + skip).flatten().tolist()
    assert [s.y for s in steps] == pytest.approx(expected, rel=1e-12)
    assert steps[-1].h == pytest.approx(state.item(), rel=1e-12)
    assert len(steps) == 5
    assert steps[0].h == 0.5  # by hand: h = 0 + 0.5 * 1 * 1
    assert steps[1].h == pytest.approx(0.5 * math.exp(-0.5) + 1.0)


def test_the_example_goes_on_to_where_single_precision_ends():
    steps = worked_example()
    assert [s.by_factors for s in steps] == pytest.approx([s.h for s in steps], rel=1e-12)
    assert steps[0].published == pytest.approx(math.exp(-0.5) * 0.5)  # by hand: a (0 + b)
    lost = first_lost()
    before = repeated()[lost.more - 1]
    assert math.isinf(lost.total)
    assert math.isinf(lost.by_factors)
    assert lost.h == pytest.approx(before.h)  # the loop does not notice
    # exp of the next exponent is past float32, whose end is 2 to the power of 128
    assert before.exponent + 3 * 1.0 > 128 * math.log(2) - math.log(3 * 1.1)
    assert before.by_factors == pytest.approx(before.h, rel=1e-5)


def test_links_lead_to_the_page_that_has_the_part():
    pages = resolve({
        "report.html": '<a href="#here">a</a> <a href="#there">b</a> <a href="#no">c</a>'
                       '<p id="here">',
        "e/one.html": '<a class="x" href="#there">a</a> <a href="#here">b</a> <h1 id="there">',
        "e/two.html": '<a href="#there">a</a>'})
    assert re.findall('href="([^"]*)"', pages["report.html"]) == ["#here", "e/one.html#there",
                                                                 "#no"]
    assert re.findall('href="([^"]*)"', pages["e/one.html"]) == ["#there", "../report.html#here"]
    assert re.findall('href="([^"]*)"', pages["e/two.html"]) == ["one.html#there"]


@pytest.mark.parametrize(("value", "expected"), [
    (12345, "12,345"), (0, "0"), (4.0, "4"), (0.5, "0.5"), (1234.5678, "1,235"),
    (0.0132, "0.0132"), (1.5e-7, "1.5 × 10⁻⁷"), (-2.5, "\u22122.5"), (math.inf, "∞"),
    (math.nan, "nan"), (123456789.0, "1.235 × 10⁸"), (True, "yes"), (None, "not measured"),
    ([1, "a"], "1, a"), (3.14159265, "3.142"), (0.0123456, "0.01235"), (999_999.5, "1,000,000"),
    (1e6, "1 × 10⁶"), (0.001, "0.001"),
])
def test_numbers_for_people(value, expected):
    assert text.plain(value) == expected


def test_binary_bytes():
    assert [text.binary_bytes(v) for v in (0, 1023, 1536, 5 * 2**30)] == \
        ["0 B", "1,020 B", "1.5 KiB", "5 GiB"]


def test_columns_align_their_decimals():
    page = str(tables.table(pd.DataFrame({"x": ["a", "b"], "y": [0.5, 12.25]}), "t"))
    assert ">0.50<" in page
    assert ">12.25<" in page


@pytest.mark.parametrize(("column", "words"), [
    ("state_bytes_counted", "state bytes counted"), ("full_cache_bytes", "full cache, bytes"),
    ("mismatch_percent", "mismatch, %"), ("bits_per_byte", "bits per byte"), ("ms", "time, ms"),
    ("document_chunked", "document_chunked"), ("relative RMS, %", "relative RMS, %"),
    ("A_log", "A_log"), ("pattern", "pattern"),
])
def test_headers_are_words_with_units(column, words):
    assert f">{words.replace(', ', ',' + chr(160))}</th>" in str(
        tables.table(pd.DataFrame({column: [1]}), "t"))


def test_long_tables_say_what_is_left_out():
    page = str(tables.table(pd.DataFrame({"x": range(500)}), "t"))
    assert "The first 400 of 500 rows" in page
    assert page.count("<tr>") == 401


def test_formulas_are_mathml_and_money_is_not():
    assert "<msub>" in to_html("State $h_t$ grows")
    assert "<math" not in to_html("5 $ or 6 $ and $5 more")
    for block in ("$$\nh_t = a\n$$", "$$h_t = a$$", "$$\nh_t = \na\n$$", "> $$\n> a\n> $$"):
        page = to_html(block)
        assert "display=\"block\"" in page
        assert not set(re.sub(r"<[^>]*>", "", page)) & set("$>")
    assert "$h$" in to_html("`$h$`")
    assert "<math" in formula("x^2")


def test_headings_fit_below_the_section():
    assert re.findall(r"<(h\d) id=\"([^\"]+)\"", to_html("# A b\n\n## C", prefix="p", top=3)) == \
        [("h3", "p-a-b"), ("h4", "p-c")]


@pytest.mark.parametrize(("page", "match"), [
    ('<p id="a"><p id="a">', "two parts with the id 'a'"),
    ('<a href="#b">x</a>', "#b"),
    ('<img src="x.png">', "would load"),
    ('<link href="x.css">', "would load"),
])
def test_page_check_can_fail(page, match):
    with pytest.raises(UserError, match=match):
        check_page(page, "page.html", [])


def test_one_figure_is_made_where_one_is_asked_for(monkeypatch):
    """A run has dozens, and each takes tables apart for its data and words."""
    made, make = [], drawing._figure

    def noted(one, *given):
        made.append(one.name)
        return make(one, *given)

    monkeypatch.setattr(drawing, "_figure", noted)
    run = load_record(RECORDS / "throughput" / "h200-throughput")
    assert len(run.figures) > 1
    for name in run.figures:
        made.clear()
        assert drawing.figure_of(run, name).name == name
        assert made == [name]


def luminance(colour: str) -> float:
    parts = [int(colour[i: i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme):
    css = (ROOT / "analysis" / "report" / "templates" / "page.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.S)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "quiet", "link", "fail"):  # text: WCAG AA
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("ink", "quiet", "link"):
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    assert contrast(colours["warn-ink"], colours["warn"]) >= 4.5
    for name in ("blue", "vermilion", "green", "purple", "orange", "sky", "axis"):  # graphics
        assert contrast(colours[name], colours["paper"]) >= 3, name
