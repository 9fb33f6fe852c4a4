"""Tables of benches: every number in the unit that its column names, by hand."""

from __future__ import annotations

from math import nan

import pandas as pd
import pytest

from analysis.cli.studies import tables

PEER = {"batch": 2, "length": 1024, "direction": "forward", "peer": "fused", "note": "",
        "median_seconds": 2.5e-4, "low_seconds": 2.4e-4, "high_seconds": 2.62e-4,
        "peak_bytes": 3 * 2**20, "error_output": 1e-3, "error_gradient": 2e-3}
PEER_SAID = {"pass": "forward", "of": "fused", "median (us)": 250.0,
             "quartiles (us)": "240.0 to 262.0", "peak (MiB)": 3.0, "note": "",
             "relative error of output": 1e-3, "worst relative error of a gradient": 2e-3}
CASES = {
    "stream": (tables.stream_table, {
        "way": "fed", "streams": 8, "seen": 100, "microseconds": 12.345, "low": 11.0,
        "high": 1234.56, "bytes_per_second": 81_004.4, "joules_per_megabyte": 812.6}, {
        "way": "fed", "texts at a time": 8, "bytes seen before": 100,
        "a byte of each, median (us)": 12.3, "quartiles (us)": "11 to 1235",
        "all together (bytes/s)": 81_004.0, "gross (J/MB)": 813.0}),
    "systems": (tables.systems_table, {
        "system": "ours", "seen": 100, "generation_bytes_per_second": 1234.6,
        "streaming_bytes_per_second": 99.4, "characters_per_second": 7.5}, {
        "system": "ours", "bytes seen before": 100, "generation (bytes/s)": 1235.0,
        "streaming (bytes/s)": 99.0, "predict and observe (characters/s)": 8.0}),
    "steps": (tables.steps_table, {
        "system": "M", "mixers": "fused", "parameters": 1000, "ms": 1.23456, "low": 1.2,
        "high": 1.25, "times_first": 1.239, "bytes_per_second": 13_270_400.0,
        "joules_per_megabyte": 41.26, "peak_bytes": 5204.4 * 2**20}, {
        "layers": "M", "mixers": "fused", "parameters": 1000, "step, median (ms)": 1.235,
        "quartiles (ms)": "1.2 to 1.25", "times the first row": 1.24, "text (MB/s)": 13.27,
        "gross (J/MB)": 41.3, "peak (MiB)": 5204.0}),
    "context": (tables.context_table, {
        "layers": "MA", "length": 10**6, "way": "split", "processes": 2, "ms": 12.345, "low": 12.0,
        "high": 13.0, "messages_ms": 0.12345, "peak_bytes": nan, "note": ""}, {
        "layers": "MA", "bytes": 10**6, "way": "split", "devices": 2,
        "forward and backward, median (ms)": 12.34, "quartiles (ms)": "12 to 13",
        "of it in messages (ms)": 0.123, "peak (MiB)": None, "note": ""}),
    "parts": (tables.parts_table, {
        "system": "M", "part": "scan", "ms": 1.23456, "share": 0.2345, "kernel": "tile_forward"}, {
        "layers": "M", "part": "scan", "a step (ms)": 1.235, "share (%)": 23.4,
        "longest kernel": "tile_forward"}),
    "scan": (tables.short_table, {
        **PEER, "channels": 384, "ratio_to_fused": 1.2345, "floor_seconds": 1.555e-4}, {
        **PEER_SAID, "batch x length x channels": "2 x 1024 x 384", "times the fused scan": 1.234,
        "floor (us)": 155.5}),
    "mixers": (tables.mixers_table, {
        **PEER, "heads": 6, "family": "KDA", "kernel": "delta_forward"}, {
        **PEER_SAID, "batch x length x heads": "2 x 1024 x 6", "family": "KDA",
        "times this project's": 1.0, "longest kernel": "delta_forward"}),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_in_the_units_of_their_columns(name: str) -> None:
    table, row, said = CASES[name]
    (found,) = table(pd.DataFrame([row])).to_dict("records")
    assert found == pytest.approx(said)


def test_a_peer_is_compared_with_ours_of_its_own_row() -> None:
    rows = [{**PEER, "heads": heads, "family": family, "peer": peer, "kernel": "",
             "median_seconds": seconds}
            for heads, family, peer, seconds in (
                (6, "KDA", "fused", 1.0), (6, "KDA", "fla", 3.0), (12, "KDA", "fused", 2.0),
                (12, "KDA", "fla", 3.0), (6, "SSD", "mamba_ssm", 5.0))]
    found = tables.mixers_table(pd.DataFrame(rows))["times this project's"].tolist()
    assert found == [1.0, 3.0, 1.0, 1.5, None]


def test_what_was_not_timed_is_not_measured() -> None:
    row = {**PEER, "channels": 384, "ratio_to_fused": nan, "floor_seconds": nan,
           **dict.fromkeys(("median_seconds", "low_seconds", "high_seconds", "peak_bytes",
                            "error_output", "error_gradient"), nan), "note": "not installed"}
    (found,) = tables.short_table(pd.DataFrame([row])).to_dict("records")
    assert {name for name, cell in found.items() if cell is None} == {
        "median (us)", "quartiles (us)", "times the fused scan", "floor (us)", "peak (MiB)",
        "relative error of output", "worst relative error of a gradient"}


def test_systems_are_read_back_from_their_table() -> None:
    table, row, _ = CASES["systems"]
    assert list(tables.systems_frame(table(pd.DataFrame([row])))) == list(row)
