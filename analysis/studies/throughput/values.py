"""The throughput study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

from analysis.runs.folders import Value
from analysis.studies.throughput import INDEXED, PASSES, Parameters, Results


def values(r: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers; None: not measured."""
    both = r.scans[(r.scans["pass"] == PASSES[1])]
    ms = both[both["batch"] == p.batch_size].pivot(index="form", columns="length", values="ms")
    exponents = r.exponents.set_index(["what", "pass"])["exponent"]
    fills = r.allocation_exponents.set_index(["what", "form"])["exponent"]
    cross = r.crossovers.set_index(["mixer", "pass"])
    stream = r.streaming.sort_values("bytes_seen").groupby("system")
    growth = (stream["ms"].last() / stream["ms"].first()).astype(float)
    state = stream["state_bytes"].last()
    windowed = next(s for s in growth.index if "last" in s)
    speed = r.training.set_index(["pattern", "form"])["bytes_per_second"]
    joules = r.training.set_index(["pattern", "form"])["joules_per_megabyte"]
    auto, every = ("M", "auto"), "attention, all keys"

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
    one = "SSM (auto)"
    attention = r.mixers[(r.mixers["mixer"] == "attention") & (r.mixers["pass"] == PASSES[1])
                         & (r.mixers["batch"] == p.batch_size)]  # one length has several
    beside = attention.set_index("length")["ms"].get(loop_length)
    loop_ms = ms.loc[INDEXED].get(loop_length) if INDEXED in ms.index else None
    wide = both[both["length"] == p.batch_length].pivot(index="batch", columns="form", values="ms")
    batches = (wide.dropna(subset=["document_chunked", "fused"]).astype(float)
               if {"document_chunked", "fused"} <= set(wide) else wide.head(0))
    return {
        "longest_length": Value(int(r.scans["length"].max()), "bytes", "longest length asked for"),
        "fused_exponent": Value(exponents.get(("fused", PASSES[1])), "",
                                "time of the fused scan, forward and backward, against length"),
        "document_exponent": Value(exponents.get(("document_chunked", PASSES[1])), "",
                                   "the same of the published chunked scan"),
        "document_fill_exponent": Value(fills.get(("zero_fill_bytes", "document_chunked")), "",
                                        "bytes of full-length slice gradients against length"),
        "loop_fill_exponent": Value(fills.get(("zero_fill_bytes", INDEXED)), "",
                                    "the same for a loop that indexes every step"),
        "split_exponent": Value(fills.get(("allocated_bytes", "corrected_cumsum")), "",
                                "bytes allocated backward when the chunks are split once"),
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
        "crossover_forward": Value(
            cross["crossover_length"].get((one, PASSES[0])), "bytes",
            "length from which the SSM mixer is faster than attention, forward"),
        "crossover_backward": Value(cross["crossover_length"].get((one, PASSES[1])), "bytes",
                                    "the same with the backward pass"),
        "crossover_operations": Value(
            cross["crossover_in_operations"].get((one, PASSES[0])), "bytes",
            "length from which the SSM layer takes fewer operations"),
        "ssm_over_attention": Value(
            cross["ssm_over_attention_there"].get((one, PASSES[1])), "times",
            "SSM mixer over attention at the longest length, both passes"),
        "stream_positions": Value(int(r.streaming["bytes_seen"].max()), "bytes",
                                  "most bytes seen before a streamed byte"),
        "stream_growth_ssm": Value(
            growth.get("SSM"), "times", "latency there over latency at the start"),
        "stream_growth_window": Value(
            growth[windowed], "times", "the same, attention with a window"),
        "stream_growth_cache": Value(growth[every], "times", "the same, attention with all keys"),
        "stream_state_bytes": Value(state.get("SSM"), "B", "state of the SSM stream"),
        "stream_cache_bytes": Value(int(state[every]), "B", "cache of all keys there"),
        "train_ssm_bytes_per_second": Value(speed.get(auto), "B/s", "whole training steps, SSM"),
        "train_ssm_over_attention": Value(
            speed[auto] / speed["A", "auto"] if auto in speed and ("A", "auto") in speed else None,
            "times", "training bytes a second, SSM over attention of equal parameters"),
        "train_fused_over_document": Value(
            speed[auto] / speed["M", "document_chunked"]
            if speed.get(("M", "document_chunked")) else None,
            "times", "training bytes a second, default scan over the published one"),
        "joules_per_megabyte": Value(joules.get(auto), "J/MB", "training the SSM, if measured"),
        "energy_source": Value(
            str(r.training["energy_source"].iloc[0]), "", "where joules come from"),
        "peers_machine": Value(r.peers_machine, "", "where the scan was timed against its peers"),
    }
