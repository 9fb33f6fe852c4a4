"""Numbers in pages of docs/ are those of the records that the pages name, each at its place.

A table of a page is made again from its record and compared cell by cell, so that a number that
another row of the record happens to have does not pass.
"""

from __future__ import annotations

import pandas as pd

from analysis.runs.folders import ROOT, Run
from analysis.runs.records import load_records

RECORDS = load_records()
FORWARD, BOTH = "forward", "forward+backward"


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def table_of(text: str, head: str) -> list[list[str]]:
    """The cells of the rows below a table's heading, which begins with ``head``."""
    _, found, rest = text.partition(f"\n{head}")
    assert found, f"no table is headed {head}"
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def row_of(run: Run, table: str, **cells: object) -> pd.Series:
    frame = run.tables[table].frame
    for column, cell in cells.items():
        frame = frame[frame[column] == cell]
    assert len(frame) == 1, (run.folder, cells, len(frame))
    return frame.iloc[0]


def test_a_cell_is_found_by_its_place():
    text = "\n| a | b |\n|---|---|\n| x | 1 |\n| y | 2 |\n\nmore"
    assert table_of(text, "| a |") == [["x", "1"], ["y", "2"]]


# ------------------------------------------------------------------------------------- kernels.md
def bench(run: Run, shape: str, of: str, way: str, family: str = "") -> pd.Series:
    heads = "heads" if family else "channels"
    return row_of(run, "bench", **{f"batch x length x {heads}": shape, "of": of, "pass": way}, **(
        {"family": family} if family else {}))


def test_scans():
    """The last round's column, and what the summary says of all shapes and of the CPU."""
    run = RECORDS["h200-scan"]
    rows = table_of(page("kernels"), "| (batch, length, channels) | first")
    assert len(rows) == 6
    for name, _, _, cell, _ in rows:
        ours, theirs = (bench(run, name.strip("()").replace(", ", " x "), of, BOTH)["median (us)"]
                        for of in ("fused", "mamba_ssm"))
        assert cell == f"{ours:.0f}, {theirs / ours:.2f}x"

    def least_and_most(name: str, peer: str, way: str, digits: int) -> str:
        frame = RECORDS[name].tables["bench"].frame
        times = frame[(frame["of"] == peer) & (frame["pass"] == way)]["times the fused scan"]
        return f"{times.min():.{digits}f} to {times.max():.{digits}f}"

    summary = page("kernels").split("*Summary")[1].split("*\n")[0].replace("\n", " ")
    assert f"{least_and_most('h200-scan', 'mamba_ssm', BOTH, 1)} times as fast" in summary
    assert f"forward alone {least_and_most('h200-scan', 'mamba_ssm', FORWARD, 1)};" in summary
    assert f"{least_and_most('cpu-scan', 'mambapy', BOTH, 0)} times mamba.py's" in summary


def test_mixers():
    run = RECORDS["h200-mixers"]
    families = {"SSD, 64 states": "mamba_ssm", "SSD, 128 states": "mamba_ssm",
                "Mamba-3, 64 states": "mamba_ssm", "Mamba-3, 128 states": "mamba_ssm",
                "KDA": "fla", "gated delta rule": "fla"}
    rows = table_of(page("kernels"), "| batch x length x heads |")
    assert len(rows) == 4
    for shape, *cells in rows:
        for cell, (family, peer) in zip(cells, families.items(), strict=True):
            ways = [[bench(run, shape, of, way, family) for way in (FORWARD, BOTH)]
                    for of in ("fused", peer)]
            ours, theirs = ([row["median (us)"] for row in rows] for rows in ways)
            said = ", ".join(f"{one:,.0f}" for one in ours)
            if pd.notna(theirs).all():
                said += "; " + ", ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs, strict=True))
            assert cell == said, (shape, family)


def test_streams():
    run, checked = RECORDS["h200-stream-systems"], 0
    rows = table_of(page("kernels"), "| system | engine | parameters | generation")
    for name, engine, parameters, generation, streaming, characters, seconds in rows:
        row = row_of(run, "systems", system=name.split(",")[0].strip("`"))
        assert engine == row["engine"]
        million = row["parameters"] / 1e6  # a gate's some thousands are not shown
        assert parameters == ("" if million < 0.1 else f"{million:.{1 if million > 10 else 2}f} M")
        assert generation == f"{row['generation (bytes/s)']:,.0f}"
        assert streaming == f"{row['streaming (bytes/s)']:,.0f}"
        a_second = row["predict and observe (characters/s)"]
        assert characters == f"{a_second:,.0f}"
        assert seconds == f"{60_000 / a_second:.1f} s"
        checked += 1
    assert checked >= 20
    large, small = (1e6 / row_of(run, "systems", system=name)["generation (bytes/s)"]
                    for name in ("hybrid_3_1", "nano_plus_ngram"))
    assert f"drawn takes {large:.0f} us of `hybrid_3_1` (30 M) and {small:.0f} us of" in page(
        "kernels")
    assert f"{len(run.tables['systems'].frame)} rows" in page("kernels")


def test_starts_and_steps():
    run = RECORDS["h200-start"]
    rows = table_of(page("kernels"), "| | fused, cold |")
    assert len(rows) == 4
    for name, *cells in rows:
        kinds = [(way, caches) for caches in ("cold", "warm") for way in ("fused", "compile")]
        for cell, (way, caches) in zip(cells, kinds, strict=True):
            row = row_of(run, "summary", system=name.strip("`"), way=way, caches=caches)
            seconds = row["text to step 1 (s)"]
            digits = 2 if seconds < 5 else 1
            joules = row["process to step 50 (J)"]
            assert cell.replace("*", "") == f"{seconds:.{digits}f} s, {joules:,.0f} J", name
    rows = table_of(page("kernels"), "| | fused | torch.compile |")
    assert len(rows) == 4
    for name, *cells in rows:
        for cell, way in zip(cells, ("fused", "compile"), strict=True):
            row = row_of(run, "pace", system=name.strip("`"), way=way)
            digits = 3 if name == "`mamba_byte`" else 2
            assert cell.replace("*", "") == (
                f"{row['ms']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]")


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
        return float(row_of(RECORDS["h200-streaming"], "stream", **{
            "way": way, "texts at a time": texts, "bytes seen before": seen}
        )["all together (bytes/s)"])

    fed = rate("stream, a byte fed", 1, 10_000)
    assert set(streaming["texts at a time"]) == {1, 8, 64, 512}
    later = float(row_of(RECORDS["h200-stream-systems"], "systems", system="mamba_byte")[
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
    run, joules = RECORDS["h200-task-mixed"], "energy (J, idle subtracted)"
    runs = run.tables["runs"].frame
    rows = table_of(page("task"), "| system | runs | GPU J |")
    assert len(rows) == 6
    for name, times, gpu, total, seconds, accuracy, bits in rows:
        system = name.split(",")[0].strip("`")
        row, mine = row_of(run, "systems", system=system), runs[runs["system"] == system]
        alike = len(mine) > 1 and mine["validation accuracy"].nunique() == 1
        assert times == {(2, True): "twice the same"}.get((len(mine), alike), str(len(mine)))
        first = (", ".join(f"{x:,.0f}" for x in mine[joules]) if times == "twice the same" else
                 f"{mine[joules].min():,.0f} to {mine[joules].max():,.0f}")
        assert gpu == f"{row[joules]:,.0f}" + (f" ({first})" if len(mine) > 1 else "")
        assert total.partition(" (")[0] == f"{row['total energy (J)']:,.0f}"
        assert seconds == f"{row['time (s)']:.1f}"
        assert accuracy.partition(" (")[0] == f"{row['validation accuracy']:.4f}"
        if "(" in accuracy:
            assert accuracy.partition(" (")[2] == (
                f"{row['lowest']:.4f} to {row['highest']:.4f})")
        known = row["validation (bits/byte)"]
        assert bits == (f"{known:.3f}" if pd.notna(known) else "")
    all_ = RECORDS["h200-task-all"].tables["systems"].frame.set_index("system")
    text = page("task").replace("\n", " ")
    assert (f"pure SSM ({all_.loc['nano_ssm', 'validation accuracy']:.3f}) to a 1:1 hybrid "
            f"({all_.loc['nano_ssm_1_1', 'validation accuracy']:.3f};") in text
    counts = runs[runs["system"] == "counts"]
    for column, words in ((joules, " of its GPU joules"), ("total energy (J)", " in all")):
        dearer = counts[column].max()
        share = [100 * dearer / row_of(run, "systems", system=name)[column]
                 for name in ("subset_70_mkn", "gpu_ngram_w31_k11", "paq8_gpu")]
        assert f"{share[0]:.0f} %, {share[1]:.0f} % and {share[2]:.0f} %{words}" in text
