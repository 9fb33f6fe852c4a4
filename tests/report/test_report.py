"""The report: its numbers, its words, its page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.runs.folders import write_record as write_run_json
from analysis.runs.records import load_record, load_records
from mambabyte.errors import UserError
from tests.helpers.report_world import PROVENANCE, write_record, write_run

ROOT = Path(__file__).resolve().parents[2]

# --- numbers in the prose ---------------------------------------------------------------------

def test_prose_takes_its_numbers_from_runs(world):
    world.run()
    world.section("summary", "A {{ value('tiny.slope') | sig(2) }} B {{ value('tiny.slope') }} "
                  "C {{ value('tiny.peak') | bytes }} D {{ value('tiny.slope') | percent }} "
                  "E {{ value('tiny.best') }} F {{ unit('tiny.slope') }} "
                  "G {{ parameter('tiny.n') }} "
                  "H {{ value('tiny.joules', missing='not measured') }} "
                  "{% if not measured('tiny.joules') %}I{% endif %} "
                  "J {{ cell('tiny.lengths', 'time, ms', {'length, bytes': 1}) }} "
                  "K {{ column('tiny.lengths', 'length, bytes') | max }}")
    page = world.build()
    assert ("A 0.51 B 0.5123 C 3 MiB D 51.2\u202f% E chunked F ms/byte G 3 H not measured I "
            "J 0.5 K 2" in page)


@pytest.mark.parametrize(("words", "match"), [
    ("{{ value('tiny.slop') }}", r"tiny\.slop is not among .*did you mean slope"),
    ("{{ value('tny.slope') }}", r"tny: nothing is known.*did you mean tiny"),
    ("{{ value('tiny.joules') }}", "was not measured: write value"),
    ("{{ value('slope') }}", "write 'study.name'"),
    ("{{ figure('tiny.absent') }}", r"there is no figure 'tiny\.absent'"),
    ("{{ parameter('tiny.m') }}", "no parameter 'm'"),
    ("{{ nothing }}", "nothing"),
    ("{{ cell('tiny.absent', 'a') }}", "there is no table 'tiny.absent'"),
    ("{{ cell('tiny.times', 'lengths') }}", "has no column 'lengths'.*length, bytes"),
    ("{{ cell('tiny.lengths', 'time, ms') }}", "2 rows are {}, not one"),
    ("{{ cell('tiny.lengths', 'energy, J', {'length, bytes': 1}) }}", "was not measured"),
    ("{{ value('tiny.slope') | wrong }}", r"summary\.md line 1: .*wrong"),
    ("{% if %}", r"sections/summary\.md line 1"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("[away](#nowhere)", "#nowhere, which does not exist"),
    ("[away](missing.html)", "missing.html"),
    (r"$\foo$", r"unknown command \\foo"),
    (r"$\frac{1}{$", "cannot be read"),
])
def test_what_is_wrong_in_the_prose_breaks_the_build(world, words, match):
    world.run()
    world.section("summary", words)
    with pytest.raises(UserError, match=match) as error:
        world.build()
    assert "\n" not in str(error.value)
    assert not world.out.exists()


def test_stale_run_breaks_the_build_and_marks_a_draft(world):
    world.run()
    world.build()
    world.notebook("x = 2")
    world.out.unlink()
    with pytest.raises(UserError, match=r"tiny: its sources changed .*`mambabyte sweep tiny`"):
        world.build()
    assert not world.out.exists()
    assert "out of date" in world.build(draft=True)
    assert "out of date" in world.page(draft=True)
    world.run("tiny-2")
    assert "out of date" not in world.build() + world.page()


def test_study_without_a_run_breaks_the_build_and_marks_a_draft(world):
    with pytest.raises(UserError, match="tiny: it has not been run: run `mambabyte sweep tiny`"):
        world.build()
    page = world.build(draft=True)
    assert "[missing: tiny.slope]" in page
    assert "No finished run" in world.page(draft=True)


def test_a_draft_computes_and_links_where_a_study_is_missing(world):
    world.section("summary", "{{ (value('tiny.slope') / value('tiny.peak')) | fixed(1) }} "
                  "{{ 1000 * value('tiny.slope') - 1 }} {{ -value('tiny.slope') }} "
                  "{% if value('tiny.slope') > 1 %}much{% endif %} [see](#tiny-figure-times)")
    page = world.build(draft=True)
    assert page.count("[missing: tiny.slope]") >= 3
    assert "much" not in page
    world.run()
    world.section("summary", "[see](#tiny-figure-absent)")
    with pytest.raises(UserError, match="#tiny-figure-absent, which does not exist"):
        world.build()


def test_full_profile_speaks_before_quick_and_newer_before_older(world):
    def slope(value):
        return {"values": {"slope": {"value": value}}}

    world.run("tiny-1", **slope(1))
    world.run("tiny-2", **slope(2), provenance={**PROVENANCE, "date": "2026-02-02"})
    assert "It is 2 ms" in world.build()
    world.run("tiny-3", **slope(3), profile="full")
    assert "It is 3 ms" in world.build()
    world.run("tiny-4", **slope(4), profile="", parameters={"n": 9})
    assert "It is 3 ms" in world.build()
    page = world.page()
    assert "Runs with other parameters" in page
    assert "tiny-4" in page


def test_missing_configuration_is_a_clear_error(world):
    world.run()
    world.config('article = ["absent"]')
    with pytest.raises(UserError, match="names the section 'absent'"):
        world.build()
    world.config("colour = 1")
    with pytest.raises(UserError, match="colour"):
        world.build()
    (world.prose / "report.toml").unlink()
    with pytest.raises(UserError, match="there is no"):
        world.build()


# --- the page ---------------------------------------------------------------------------------

def test_same_input_same_bytes(world):
    world.run()
    world.run("tiny-2", status="failed", error="boom", parameters={"n": 4})
    first = world.pages()
    assert first == world.pages()
    assert set(first) == {"report", "tiny", "machines"}
    assert all(len(page) > 5000 for page in first.values())


def test_every_figure_has_words_and_data(world):
    world.run()
    world.section("tiny", "{{ figure('tiny.times') }}")
    page = world.page()
    figure = re.search(r'<figure id="tiny-figure-times">.*?</figure>', page, re.S)[0]
    assert 'role="img"' in figure
    assert re.search(r"<title [^>]*>Time over length</title>", figure)
    assert re.search(r"<desc [^>]*>A rising line.</desc>", figure)
    assert "<figcaption>It grows.</figcaption>" in figure
    assert "Data of this figure (2 rows)" in figure
    assert '<th scope="col"' in figure
    assert "not measured" in figure
    assert ">nan<" in figure
    assert '<a href="data/tiny-1/lengths.csv">' in figure
    assert (world.evidence / "data" / "tiny-1" / "lengths.csv").read_text() == (
        world.runs / "tiny-1" / "lengths.csv").read_text()


def test_a_figure_is_there_for_wide_screens_and_for_narrow_ones(world):
    world.run()
    world.section("tiny", "{{ figure('tiny.times') }}")
    page = world.page()
    assert re.search(r'class="drawing wide"><svg [^>]*viewBox="0 0 518.4 ', page)
    assert re.search(r'class="drawing narrow"><svg [^>]*viewBox="0 0 324 ', page)


def test_prose_places_figures_once(world):
    world.run()
    world.section("tiny", "Before.\n\n{{ figure('tiny.times') }}\n\nAfter.")
    page = world.page()
    assert page.count('<figure id="tiny-figure-times">') == 1
    assert page.index("Before.") < page.index("<figure") < page.index("After.")
    world.section("tiny", "Words alone.")  # what prose does not place is data, not a figure
    assert "<figure" not in world.page()
    world.section("tiny", 2 * "{{ figure('tiny.times') }}\n\n")
    with pytest.raises(UserError, match=r"'tiny\.times' is placed twice"):
        world.build()


def test_a_finding_is_a_figure_under_what_it_shows(world):
    world.run()
    world.section("summary", "{% call finding('tiny.times') %}It takes {{ value('tiny.slope') | "
                  "sig(2) }} ms (*n* = 2){% endcall %}\n\nSo.")
    page = world.build()
    assert re.search(r'<h2 class="finding" id="[\w-]+">It takes 0\.51 ms \(<em>n</em> = 2\)</h2>',
                     page)
    figure = page[page.index("<figure"):page.index("</figure>")]
    assert "run of this machine" in figure
    assert 'href="report-evidence/tiny.html#run-tiny"' in figure
    assert 'href="report-evidence/data/tiny-1/lengths.csv"' in figure
    assert "commit 0123456789ab" in figure
    assert "<code>mambabyte sweep</code>" in figure


def test_what_this_machine_measured_is_folded_behind_the_records(world):
    folder = world.run()
    write_record(world, folder, "h200-tiny")
    world.section("tiny", "Known.\n\n# On your machine\n\nHere {{ value('tiny.best') }}.")
    page = world.page()
    folded = page[page.index('<details class="here" id="run-tiny">'):]
    assert page.index("Known.") < page.index('id="record-h200-tiny"') < page.index(folded)
    assert "Here chunked." in folded
    assert "fitted" in folded  # the values, in words
    assert page.count(">On your machine<") == 1


def test_a_folder_that_is_not_ours_is_left_alone(world):
    world.run()
    world.evidence.mkdir(parents=True)
    (world.evidence / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by this command"):
        world.build()
    assert (world.evidence / "mine.txt").read_text() == "mine"
    assert not world.out.exists()
    (world.evidence / "mine.txt").unlink()
    world.build()
    (world.evidence / "mine.txt").write_text("mine")
    other = world.run("tiny-2", parameters={"n": 5})
    world.build()
    shutil.rmtree(other)
    world.build()
    assert not (world.evidence / "data" / "tiny-2").exists()  # of an earlier report
    assert (world.evidence / "data" / "tiny-1").exists()
    assert (world.evidence / "mine.txt").read_text() == "mine"


def test_page_loads_nothing(world):
    world.run()
    page = "".join(world.pages().values())
    assert not re.search(r"<(link|iframe|object|embed|base)\b", page)
    assert not re.search(r"\b(src|srcset|poster)=", page)
    assert "@import" not in page
    assert "url(http" not in page
    assert "default-src 'none'" in page


def test_failed_runs_are_shown_as_failed(world):
    world.run()
    world.run("tiny-2", status="failed", error="ValueError: boom", parameters={"n": 4}, values={},
              tables={}, figures={})
    assert "1 of the runs failed" in world.build()
    page = world.page("machines")
    failed = page[page.index('id="failed-runs"'):]
    assert "ValueError: boom" in failed
    assert "tiny-2" in failed
    # Once the same parameters have run well, the failure is no news.
    world.run("tiny-3", parameters={"n": 4})
    assert 'id="failed-runs"' not in world.page("machines")


def test_failed_headline_says_so(world):
    world.run(status="failed", error="ValueError: boom")
    with pytest.raises(UserError, match=r"tiny-1 failed \(ValueError: boom\): run `mambabyte"):
        world.build()


def test_ledger_is_a_run_whose_tables_can_be_filtered(world):
    world.run()
    world.section("tiny", "Words.")
    write_run(world.runs, "claims-1", study="claims")
    world.section("claims", "{{ table('claims.times') }}")
    pages = world.pages()
    assert '<table class="ledger">' in pages["claims"]
    assert all('<table class="ledger">' not in page for n, page in pages.items() if n != "claims")


def test_records_are_marked_with_their_machine(world):
    machine = {"cpu": "Server CPU", "gpus": [{"name": "NVIDIA H200", "memory_bytes": 1}]}
    folder = world.run("tiny-1", provenance={**PROVENANCE, "machine": machine})
    write_record(world, folder, "h200-tiny")
    (folder / "run.json").unlink()
    world.run("tiny-2")
    world.section("summary", "{{ record('h200-tiny.slope') | sig(2) }} {{ value('tiny.slope') }}")
    world.section("tiny", "{{ figure('h200-tiny.times') }}")
    pages = world.pages()
    record = re.search(r'<section class="record" id="record-h200-tiny">.*?</section>',
                       pages["tiny"], re.S)[0]
    assert "NVIDIA H200" in record
    assert '<a href="data/h200-tiny/times.csv">' in record
    assert "NVIDIA H200" in pages["tiny"][:pages["tiny"].index("</figure>")]
    assert "0.51 0.5123" in pages["report"]
    assert pages["machines"].count("<h2 id=\"machine-") == 2


def test_record_keeps_nan_and_not_measured_apart(world):
    path = write_record(world, world.run(), "r")
    frame = load_record(path).tables["times"].frame
    assert math.isnan(frame["time, ms"][1])
    assert frame["energy, J"][0] is None
    assert (path / "times.csv").read_text() == (
        '"length, bytes","time, ms","energy, J"\n1,0.5,\n2,nan,2.0\n')
    json.loads((path / "run.json").read_text(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(("change", "match"), [
    (lambda d: d["provenance"].pop("machine"), "does not say its machine"),
    (lambda d: d.update(format=1), "format 1, this version reads 2"),
    (lambda d: d["tables"].update(absent="c"), "not a complete run folder"),
    (lambda d: d.pop("title"), "does not say its title"),
    (lambda d: d["figures"].update({'"><script>': "times"}), "figure name"),
    (lambda d: d["figures"].update(another="times"), "cannot draw its figure 'another'"),
])
def test_bad_record_is_a_clear_error(world, change, match):
    path = write_record(world, world.run(), "r")
    data = json.loads((path / "run.json").read_text())
    change(data)
    write_run_json(path, data)
    world.section("tiny", "{{ figure('r.times') }}")
    with pytest.raises(UserError, match=match):
        world.build()


def test_a_record_of_an_older_version_says_what_to_do(world):
    world.records.mkdir()
    (world.records / "h200-tiny.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"h200-tiny\.json is a record of an older version"):
        load_records(world.records)


def test_records_of_the_project_can_be_read():
    load_records()


def test_report_computes_nothing(world):
    world.run()
    code = (
        "import sys; from analysis.report import build_report\n"
        "from analysis.studies import STUDIES\n"
        "try: build_report(sys.argv[1], sys.argv[2], records_root=sys.argv[3], draft=True)\n"
        "finally: print(sorted({'torch', 'papermill',"
        " *(s.package + '.compute' for s in STUDIES.values())} & sys.modules.keys()))")
    run = subprocess.run([sys.executable, "-c", code, str(world.runs), str(world.out),
                          str(world.records)],
                         capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == "[]", run.stderr
