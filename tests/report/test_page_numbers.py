"""Numbers in pages of docs/ are those of the records that the pages name, each at its place.

Tables are made again from their records and compared as they stand, so that a number that another
row of the record happens to have does not pass.
"""

from __future__ import annotations

import pytest

from analysis.report.parts.page_tables import BOTH, FORWARD, TABLES, rewritten, row_of, write_pages
from analysis.runs.folders import ROOT
from analysis.runs.records import load_records
from mambabyte.errors import UserError

RECORDS = load_records()


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def table_of(text: str, head: str) -> list[list[str]]:
    """The cells of the rows below a table's heading, which begins with ``head``."""
    _, found, rest = text.partition(f"\n{head}")
    assert found, f"no table is headed {head}"
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_records(name):
    """As `mambabyte report --readme README.md` writes them, over any other number."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert rewritten(text, name, RECORDS) == text
    for head in TABLES[name]:
        rows = table_of(text, head)
        assert len(rows) >= 4
        row = next(line for line in text.splitlines() if line.startswith(f"| {rows[1][0]} |"))
        cells = row.split("|")
        other = cells[-3].translate(str.maketrans("0123456789", "1234567890"))
        wrong = "|".join([*cells[:-3], other, *cells[-2:]])
        assert wrong != row
        assert rewritten(text.replace(row, wrong), name, RECORDS) == text
        with pytest.raises(UserError, match="has no table headed"):
            rewritten(text.replace(head, "| else |"), name, RECORDS)


def test_a_row_that_the_record_lacks_is_said():
    text = page("kernels").replace("| `quick_start` |", "| `slow_start` |")
    with pytest.raises(UserError, match=r"0 rows of h200-stream-systems are .*slow_start"):
        rewritten(text, "kernels.md", RECORDS)
    with pytest.raises(UserError, match="there is no record 'h200-scan'"):
        rewritten(page("kernels"), "kernels.md", {})


def test_the_pages_are_written_where_they_are(tmp_path):
    (tmp_path / "task.md").write_text(page("task").replace("0.7086", "0.9999"))
    assert write_pages(tmp_path, RECORDS) == [tmp_path / "task.md"]
    assert table_of((tmp_path / "task.md").read_text(), "| system | runs |") == table_of(
        page("task"), "| system | runs |")


# ------------------------------------------------------------------------------------- kernels.md
def test_what_is_said_of_all_shapes_of_the_scan():
    def least_and_most(name: str, peer: str, way: str, digits: int) -> str:
        frame = RECORDS[name].tables["bench"].frame
        times = frame[(frame["of"] == peer) & (frame["pass"] == way)]["times the fused scan"]
        return f"{times.min():.{digits}f} to {times.max():.{digits}f}"

    summary = page("kernels").split("*Summary")[1].split("*\n")[0].replace("\n", " ")
    assert f"{least_and_most('h200-scan', 'mamba_ssm', BOTH, 1)} times as fast" in summary
    assert f"forward alone {least_and_most('h200-scan', 'mamba_ssm', FORWARD, 1)};" in summary
    assert f"{least_and_most('cpu-scan', 'mambapy', BOTH, 0)} times mamba.py's" in summary


def test_streams():
    rows = table_of(page("kernels"), "| system | engine | parameters | generation")
    assert len(rows) >= 20
    assert f"{len(RECORDS['h200-stream-systems'].tables['systems'].frame)} rows" in page("kernels")
    large, small = (1e6 / row_of(RECORDS, "h200-stream-systems", "systems", system=name)[
        "generation (bytes/s)"] for name in ("hybrid_3_1", "nano_plus_ngram"))
    assert f"drawn takes {large:.0f} us of `hybrid_3_1` (30 M) and {small:.0f} us of" in page(
        "kernels")


def test_steps_of_attention():
    """How many times as long attention takes, by way and window."""
    text = page("kernels").replace("\n", " ")

    def times(name: str) -> list[str]:
        values = RECORDS[name].values
        return [f"{values[theirs].value / values['ms_m'].value:.2f}"  # type: ignore[operator]
                for theirs in ("ms_a", "ms_a_half_the_layers")]

    short, long = times("h200-step-1024-fused"), times("h200-step-8192-fused")
    assert (f"attention of as many layers takes {short[0]} times as long at 1,024 bytes and "
            f"{long[0]} times at 8,192, half the layers with wider MLPs {short[1]} and {long[1]} "
            "times (") in text
    families = {name: value("h200-step-families", f"ms_{name.lower()}") for name in "MSRDKA"}
    half_of_them = value("h200-step-families", "ms_a_half_the_layers")
    assert ("`h200-step-families`): " + ", ".join(f"{m} {ms:.2f}" for m, ms in families.items())
            + f", with half the layers {half_of_them:.2f}.") in text
    whole, half = times("h200-step-1024")
    assert f"Compiled by torch, {whole} and {half} times at 1,024 bytes (" in text


# ------------------------------------------------------------------------------------- records.md
def value(record: str, name: str) -> float:
    found = RECORDS[record].values[name].value
    assert isinstance(found, (int, float))
    return float(found)


def without_a_rival() -> dict[str, str]:
    """By record, the cell that stands in the page."""
    step, = (row for row in RECORDS["cpu-step"].tables["steps"].frame.to_dict("records")
             if row["layers"] == "M")
    part = {row["part"]: row["share (%)"] for row in RECORDS["cpu-step"].tables["parts"].frame
            .to_dict("records") if row["layers"] == "M"}
    gpus = {(row["GPUs"], row["windows a step, all together"]): row["bytes/s, median"]
            for row in RECORDS["h200-scaling"].tables["scaling"].frame.to_dict("records")}
    million = {row["way"]: row for row in RECORDS["h200-context"].tables["context"].frame
               .to_dict("records") if row["bytes"] == 1_000_000}
    took = "forward and backward, median (ms)"
    alone, split = million["alone"][took], million["split"][took]
    streaming = RECORDS["h200-streaming"].tables["stream"].frame

    def rate(way: str, texts: int, seen: int) -> float:
        return float(row_of(RECORDS, "h200-streaming", "stream", **{
            "way": way, "texts at a time": texts, "bytes seen before": seen}
        )["all together (bytes/s)"])

    fed = rate("stream, a byte fed", 1, 10_000)
    assert set(streaming["texts at a time"]) == {1, 8, 64, 512}
    later = float(row_of(RECORDS, "h200-stream-systems", "systems", system="mamba_byte")[
        "streaming (bytes/s)"])
    drawn = {seen: f"{rate('stream, bytes drawn', 1, seen) / 1e3:.0f}" for seen in (100, 10**6)}
    assert len(set(drawn.values())) == 1
    assert value("h200-streaming", "different_hits") == 0
    crossed = {form: value("h200-overflow", f"{form}_crossed") for form in ("stable", "document")}
    ending = RECORDS["h200-overflow"].values["document_ending"].value
    at = int(crossed["document"]) + 1
    assert isinstance(ending, str)
    assert ending.startswith(f"step {at}: loss nan")
    systems = RECORDS["h200-task-all"].tables["systems"].frame.set_index("system")
    right = {name: f"{systems.loc[name, 'validation accuracy']:.3f}" for name in systems.index}
    assert [systems.loc[name, "runs"] for name in (
        "ours", "modded_nanogpt", "nano_ssm", "nano_ssm_1_1")] == [3, 3, 1, 1]
    return {
        "`cpu-step`":
            f"{4 * 1024 / step['step, median (ms)']:.0f} kB/s; matrix products take "
            f"{part['matrix products']:.0f} % of it, the scan {part['scan']:.0f} %",
        "`h200-scaling`":
            f"{gpus[2, 128] / gpus[1, 64]:.2f} times as fast at an equal batch each, "
            f"{gpus[2, 128] / gpus[1, 128]:.2f} at one batch between them",
        "`h200-context`":
            f"{split:.1f} ms against {alone:.1f} on one, {alone / split:.2f} times as fast; "
            f"{million['split']['of it in messages (ms)']:.2f} of it in messages",
        "`h200-streaming`, a byte":
            f"one text {rate('kernel, bytes drawn', 1, 1) / 1e3:.0f} kB/s in one launch, 512 texts "
            f"{rate('kernel, bytes drawn', 512, 1) / 1e6:.2f} MB/s; as a stream {drawn[100]} kB/s, "
            f"after 100 bytes as after a million; a byte that is fed takes {1e6 / fed:.0f} us "
            f"({fed / 1e3:.0f} kB/s), in a later job {1e6 / later:.0f} (`h200-stream-systems`)",
        "`h200-streaming`, scored":
            f"{value('h200-streaming', 'scoring_seconds'):.2f} s byte after byte, "
            f"{value('h200-streaming', 'window_seconds'):.2f} s in windows "
            f"({value('h200-streaming', 'scored_characters'):,.0f} of them), no prediction differs",
        "`h200-overflow`, `cpu-overflow-4000`":
            f"past float32 from step {crossed['stable']:.0f} of "
            f"{value('h200-overflow', 'trained_steps'):,.0f} on a card, "
            f"{value('cpu-overflow-4000', 'stable_crossed'):.0f} on a CPU; the published scan "
            f"passes it at {crossed['document']:.0f} and its loss is nan at {at}",
        "`h200-task-all`":
            f"`ours` {right['ours']} and a transformer by a recipe close to the baseline's "
            f"{right['modded_nanogpt']} (three seeds each); a pure SSM by that recipe "
            f"{right['nano_ssm']}, a 1:1 hybrid {right['nano_ssm_1_1']} (a single seed each)",
    }


def test_numbers_without_a_rival():
    rows = table_of(page("records"), "| what | measured | record |")
    expected = without_a_rival()
    assert [row[2] for row in rows] == [name.split(", a byte")[0].split(", scored")[0]
                                        for name in expected]
    assert [row[1] for row in rows] == [*expected.values()]


# ---------------------------------------------------------------------------------------- task.md
def test_systems_of_the_task():
    joules = "energy (J, idle subtracted)"
    runs = RECORDS["h200-task-mixed"].tables["runs"].frame
    all_ = RECORDS["h200-task-all"].tables["systems"].frame.set_index("system")
    text = page("task").replace("\n", " ")
    assert (f"pure SSM ({all_.loc['nano_ssm', 'validation accuracy']:.3f}) to a 1:1 hybrid "
            f"({all_.loc['nano_ssm_1_1', 'validation accuracy']:.3f};") in text
    counts = runs[runs["system"] == "counts"]
    for column, words in ((joules, " of its GPU joules"), ("total energy (J)", " in all")):
        dearer = counts[column].max()
        share = [100 * dearer / row_of(RECORDS, "h200-task-mixed", "systems", system=name)[column]
                 for name in ("subset_70_mkn", "gpu_ngram_w31_k11", "paq8_gpu")]
        assert f"{share[0]:.0f} %, {share[1]:.0f} % and {share[2]:.0f} %{words}" in text
