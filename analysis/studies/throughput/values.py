"""The throughput study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.runs.folders import Value
from analysis.studies.throughput import INDEXED, PASSES, Parameters, Results

FORWARD, BOTH = PASSES


def values(r: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers; None: not measured."""
    return {
        "longest_length": Value(int(r.scans["length"].max()), "bytes", "longest length asked for"),
        **_growth(r), **_scans(r, p), **_crossovers(r), **_streaming(r.streaming),
        **_training(r.training),
        "peers_machine": Value(r.peers_machine, "", "where the scan was timed against its peers"),
    }


def _growth(r: Results) -> dict[str, Value]:
    """Exponents against the length, of times and of bytes that a backward pass allocates."""
    times = r.exponents.set_index(["what", "pass"])["exponent"]
    fills = r.allocation_exponents.set_index(["what", "form"])["exponent"]
    return {
        "fused_exponent": Value(times.get(("fused", BOTH)), "",
                                "time of the fused scan, forward and backward, against length"),
        "document_exponent": Value(times.get(("document_chunked", BOTH)), "",
                                   "the same of the published chunked scan"),
        "document_fill_exponent": Value(fills.get(("zero_fill_bytes", "document_chunked")), "",
                                        "bytes of full-length slice gradients against length"),
        "loop_fill_exponent": Value(fills.get(("zero_fill_bytes", INDEXED)), "",
                                    "the same for a loop that indexes every step"),
        "split_exponent": Value(fills.get(("allocated_bytes", "corrected_cumsum")), "",
                                "bytes allocated backward when the chunks are split once"),
    }


def _scans(r: Results, p: Parameters) -> dict[str, Value]:
    """Forms of the scan over each other and over a mixer of attention, forward and backward."""
    both = r.scans[r.scans["pass"] == BOTH]
    ms = both[both["batch"] == p.batch_size].pivot(index="form", columns="length", values="ms")

    def ratio(form: str, other: str) -> tuple[float | None, int | None]:
        if form not in ms.index or other not in ms.index:
            return None, None
        shared = ms.loc[[form, other]].dropna(axis=1)
        if shared.empty:
            return None, None
        length = int(shared.columns.max())
        return float(shared.loc[form, length] / shared.loc[other, length]), length

    document, document_length = ratio("document_chunked", "fused")
    loop, loop_length = ratio(INDEXED, "fused")
    attention = r.mixers[(r.mixers["mixer"] == "attention") & (r.mixers["pass"] == BOTH)
                         & (r.mixers["batch"] == p.batch_size)]  # one length has several
    beside = attention.set_index("length")["ms"].get(loop_length)
    loop_ms = ms.loc[INDEXED].get(loop_length) if INDEXED in ms.index else None
    wide = both[both["length"] == p.batch_length].pivot(index="batch", columns="form", values="ms")
    batches = (wide.dropna(subset=["document_chunked", "fused"]).astype(float)
               if {"document_chunked", "fused"} <= set(wide) else wide.head(0))
    return {
        "document_over_fused": Value(
            document, "times", "published scan over fused, longest shared"),
        "document_over_fused_length": Value(document_length, "bytes", "the length of that ratio"),
        "loop_over_fused": Value(loop, "times", "indexed loop over fused, longest shared"),
        "loop_over_fused_length": Value(loop_length, "bytes", "the length of that ratio"),
        "loop_over_attention": Value(
            float(loop_ms / beside) if loop_ms and beside else None, "times",
            "indexed loop alone over a whole attention mixer, same length and width"),
        "document_over_fused_batch": Value(
            float(batches["document_chunked"].iloc[-1] / batches["fused"].iloc[-1])
            if len(batches) else None, "times",
            "published scan over fused at the largest batch that both ran"),
        "document_over_fused_batch_size": Value(
            int(batches.index[-1]) if len(batches) else None, "", "that batch"),
    }


def _crossovers(r: Results) -> dict[str, Value]:
    """From where on a mixer with a scan is cheaper than attention, and by how much."""
    cross = r.crossovers.set_index(["mixer", "pass"])

    def of(column: str, direction: str) -> Any:
        return cross[column].get(("SSM (auto)", direction))

    return {
        "crossover_forward": Value(
            of("crossover_length", FORWARD), "bytes",
            "length from which the SSM mixer is faster than attention, forward"),
        "crossover_backward": Value(of("crossover_length", BOTH), "bytes",
                                    "the same with the backward pass"),
        "crossover_operations": Value(
            of("crossover_in_operations", FORWARD), "bytes",
            "length from which the SSM layer takes fewer operations"),
        "ssm_over_attention": Value(
            of("ssm_over_attention_there", BOTH), "times",
            "SSM mixer over attention at the longest length, both passes"),
    }


def _streaming(streaming: pd.DataFrame) -> dict[str, Value]:
    """Latency and state after the most bytes, over those at the start."""
    systems = streaming.sort_values("bytes_seen").groupby("system")
    growth = (systems["ms"].last() / systems["ms"].first()).astype(float)
    state = systems["state_bytes"].last()
    every, windowed = "attention, all keys", next(s for s in growth.index if "last" in s)
    return {
        "stream_positions": Value(int(streaming["bytes_seen"].max()), "bytes",
                                  "most bytes seen before a streamed byte"),
        "stream_growth_ssm": Value(
            growth.get("SSM"), "times", "latency there over latency at the start"),
        "stream_growth_window": Value(
            growth[windowed], "times", "the same, attention with a window"),
        "stream_growth_cache": Value(growth[every], "times", "the same, attention with all keys"),
        "stream_state_bytes": Value(state.get("SSM"), "B", "state of the SSM stream"),
        "stream_cache_bytes": Value(int(state[every]), "B", "cache of all keys there"),
    }


def _training(training: pd.DataFrame) -> dict[str, Value]:
    """Whole training steps: bytes a second, and joules where they are counted."""
    systems = training.set_index(["pattern", "form"])
    speed, auto = systems["bytes_per_second"], ("M", "auto")
    return {
        "train_ssm_bytes_per_second": Value(speed.get(auto), "B/s", "whole training steps, SSM"),
        "train_ssm_over_attention": Value(
            speed[auto] / speed["A", "auto"] if auto in speed and ("A", "auto") in speed else None,
            "times", "training bytes a second, SSM over attention of equal parameters"),
        "train_fused_over_document": Value(
            speed[auto] / speed["M", "document_chunked"]
            if speed.get(("M", "document_chunked")) else None,
            "times", "training bytes a second, default scan over the published one"),
        "joules_per_megabyte": Value(systems["joules_per_megabyte"].get(auto), "J/MB",
                                     "training the SSM, if measured"),
        "energy_source": Value(
            str(training["energy_source"].iloc[0]), "", "where joules come from"),
    }
