"""The ledger, the machines and the names of the report."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from analysis.report.html.text import powers
from analysis.report.pages import unique_labels
from analysis.report.parts.ledger import ledger
from analysis.report.parts.machines import gigabytes
from analysis.report.parts.names import layer_patterns, scan_forms
from analysis.studies.throughput import INDEXED
from mambabyte.config import PRESETS
from mambabyte.errors import UserError
from mambabyte.ops import FORMS
from tests.helpers.report_world import PROVENANCE, write_record

CLAIM = {"claim": "exp(-cs) exceeds 1e39.", "verdict": "holds", "theirs": "1e39",
         "ours": "1.22e+39", "reason": "It is 1.22 x 10^39.", "source": "h200-task (H200); run-1",
         "document": "first", "kind": "numerical", "id": "exceeds-1e39", "note": ""}


def test_a_claim_is_one_body_with_its_reason_below():
    page = str(ledger(pd.DataFrame([CLAIM]), {"h200-task": "record-h200-task"}))
    assert page.count("<tbody") == 1
    assert '<tbody id="claim-exceeds-1e39" data-verdict="holds" data-kind="numerical" ' \
        'data-document="first">' in page
    first, second = re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:]
    assert "exceeds" in first
    assert "It is" not in first
    assert '<td colspan="4"><p>It is' in second
    assert '<a href="#record-h200-task">h200-task</a> (H200); run-1' in second
    assert '<a href="#claim-exceeds-1e39">exceeds-1e39</a>' in second
    assert "note" not in second  # an empty one is not shown
    assert page.count("1.22 × 10³⁹") == 2  # one style, however it was written
    assert "e+39" not in page


def test_what_matters_most_comes_first_with_the_sentence_judged():
    other = {**CLAIM, "id": "minor", "verdict": "does not hold"}
    page = str(ledger(pd.DataFrame([other, CLAIM]), {}, {"exceeds-1e39": 'It "exceeds" <1e39>.'}))
    assert re.findall('<tbody id="([^"]+)"', page) == ["claim-exceeds-1e39", "claim-minor"]
    assert page.count('data-importance="matters most"') == 1
    assert "<q>It &#34;exceeds&#34; &lt;1e39&gt;.</q>" in page
    # A verdict is a word, and a sign beside it.
    assert re.findall('</span> (holds|does not hold)</td>', page) == ["holds", "does not hold"]
    with pytest.raises(UserError, match=r"quotes the claim 'exceed'.*did you mean exceeds-1e39"):
        ledger(pd.DataFrame([CLAIM]), {}, {"exceed": "It does."})


def test_claims_of_one_id_have_one_anchor():
    page = str(ledger(pd.DataFrame([CLAIM, CLAIM]), {}))
    assert page.count('id="claim-exceeds-1e39"') == 1


@pytest.mark.parametrize(("text", "expected"), [
    ("1.22e+39", "1.22 × 10³⁹"), ("[5e-12, 1]", "[5 × 10⁻¹², 1]"), ("2 x 10^39", "2 × 10³⁹"),
    ("7e13 FLOPs", "7 × 10¹³ FLOPs"), ("sp1024e3", "sp1024e3"),
    ("commit 9a50e25", "commit 9a50e25"),
    ("2e-07.", "2 × 10⁻⁷."), ("1e3x", "1e3x"), ("0.5", "0.5"),
])
def test_powers_of_ten_have_one_style(text, expected):
    assert powers(text) == expected


def test_forms_are_those_of_the_package():
    table = scan_forms().set_index("name in figures")
    assert list(table.index) == [*FORMS, INDEXED, "auto"]
    for name, form in FORMS.items():
        assert table.loc[name, "what it is"] == form.about
        assert table.loc[name, "chunk, steps"] == (str(form.chunk) if form.chunk else "none")
        assert table.loc[name, "use"] == ("study only" if form.study else "training")
    assert all(table["what it is"].str.len() > 20)


def test_patterns_are_those_of_the_presets():
    table = layer_patterns().set_index("name in figures")
    listed = {n for names in table["presets"] for n in names.split(", ")}
    assert listed == set(PRESETS)
    assert {"M", "A", "MMMA", "MA"} <= set(table.index)
    assert table["second document"][["MA", "MMA", "MMMA"]].tolist() == ["SSM-1", "SSM-2", "SSM-3"]
    assert table.loc["MMMA", "layers"] == "3 selective SSM, then 1 causal attention, repeated"


def test_one_machine_is_one_entry_with_what_took_place_on_it(world):
    gpu = {"name": "NVIDIA H200", "memory_bytes": 150109880320}
    about = {"cpu": "Xeon", "cpu_count": 32, "memory_bytes": 270334464000, "gpus": [gpu]}
    for name, threads in (("a", 8), ("b", 4)):
        folder = world.run(f"tiny-{name}", provenance={
            **PROVENANCE, "machine": {**about, "threads": threads}})
        write_record(world, folder, f"h200-{name}")
        (folder / "run.json").unlink()
    world.run("tiny-1")
    machines = world.page("machines")
    assert machines.count('<h2 id="machine-') == 2
    assert machines.count("NVIDIA H200, 150 GB") == 1
    assert "270 GB" in machines
    assert not re.search(r"\d{9}", machines)
    for name in ("a", "b"):
        assert f'<a href="tiny.html#record-h200-{name}">h200-{name}</a>' in machines
    assert "8, 4" in machines or "4, 8" in machines
    assert '<a href="tiny.html#tiny">Tiny</a>' in machines


def test_gigabytes():
    assert [gigabytes(v) for v in (150109880320, 4_250_000_000, "many", True)] == \
        ["150 GB", "4.25 GB", "many", "yes"]


def test_regions_have_names_of_their_own():
    region = '<div role="region" tabindex="0" aria-label="{}">'
    names = ["a", "b", "a", "a (2)", "a"]
    page = unique_labels("".join(map(region.format, names)))
    found = re.findall(r'aria-label="([^"]*)"', page)
    assert found[:3] == ["a", "b", "a (2)"]
    assert len(set(found)) == len(found)
