"""The tables of a bench in the words and units of a reader of the report."""

from __future__ import annotations

from typing import Any

import pandas as pd


def stream_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of a streaming bench in the words and units of a reader of the report."""
    return _measured(pd.DataFrame({
        "way": frame["way"], "texts at a time": frame["streams"],
        "bytes seen before": frame["seen"], "a byte of each, median (us)":
            frame["microseconds"].round(1), "quartiles (us)": _quartiles(frame["low"],
                                                                         frame["high"]),
        "all together (bytes/s)": frame["bytes_per_second"].round(0),
        "gross (J/MB)": frame["joules_per_megabyte"].round(0)}))


def systems_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of streamed presets and systems in the words of a reader of the report."""
    return _measured(frame.round({name: 0 for name in frame if name.endswith("_per_second")})
                     .rename(columns=_SYSTEMS))


def systems_frame(table: pd.DataFrame) -> pd.DataFrame:
    """The inverse of ``systems_table``, up to rounding."""
    return table.rename(columns={about: name for name, about in _SYSTEMS.items()})


_SYSTEMS = {"seen": "bytes seen before", "generation_bytes_per_second": "generation (bytes/s)",
            "streaming_bytes_per_second": "streaming (bytes/s)",
            "characters_per_second": "predict and observe (characters/s)"}


def steps_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of compared training steps in the words and units of a reader of the report."""
    return _measured(pd.DataFrame({
        "layers": frame["system"], "mixers": frame["mixers"], "parameters": frame["parameters"],
        "step, median (ms)": frame["ms"].round(3), "quartiles (ms)": _quartiles(
            frame["low"], frame["high"]), "times the first row": frame["times_first"].round(2),
        "text (MB/s)": (frame["bytes_per_second"] / 1e6).round(3),
        "gross (J/MB)": frame["joules_per_megabyte"].round(1),
        "peak (MiB)": (frame["peak_bytes"] / 2**20).round(0)}))


def context_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of a bench of split sequences in the words and units of a reader."""
    return _measured(pd.DataFrame({
        "layers": frame["layers"], "bytes": frame["length"], "way": frame["way"],
        "devices": frame["processes"], "forward and backward, median (ms)": frame["ms"].round(2),
        "quartiles (ms)": _quartiles(frame["low"], frame["high"]),
        "of it in messages (ms)": frame["messages_ms"].round(3),
        "peak (MiB)": (frame["peak_bytes"] / 2**20).round(0), "note": frame["note"]}))


def parts_table(parts: pd.DataFrame) -> pd.DataFrame:
    """The parts of training steps, shares in percent."""
    return pd.DataFrame({
        "layers": parts["system"], "part": parts["part"], "a step (ms)": parts["ms"].round(3),
        "share (%)": (100 * parts["share"]).round(1), "longest kernel": parts["kernel"]})


def _quartiles(low: pd.Series, high: pd.Series) -> list[str]:
    return [f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True)]


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(object).where(table.notna(), None)


def short_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of a bench of the scan that a reader of the report wants, in its units."""
    return _of_peers(frame, "channels", {
        "times the fused scan": frame["ratio_to_fused"].round(3),
        "floor (us)": (1e6 * frame["floor_seconds"]).round(1)})


def mixers_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The same of a bench of the field's mixers; times are of this project's operator of the same
    family, shape and direction."""
    keys = ["batch", "length", "heads", "family", "direction"]
    ours = frame[frame["peer"] == "fused"].set_index(keys)["median_seconds"]
    own = ours.reindex(pd.MultiIndex.from_frame(frame[keys])).to_numpy()
    return _of_peers(frame, "heads", {"times this project's": (
        frame["median_seconds"] / own).round(3)}, {"longest kernel": frame["kernel"]})


def _of_peers(
    frame: pd.DataFrame, width: str, beside: dict[str, pd.Series],
    behind: dict[str, pd.Series] | None = None,
) -> pd.DataFrame:
    """What benches of peers share; ``width`` is the last column of a shape."""
    shape = frame[["batch", "length", width]].astype(str).agg(" x ".join, axis=1)
    micro = frame[["median_seconds", "low_seconds", "high_seconds"]] * 1e6
    family = {"family": frame["family"]} if "family" in frame else {}
    return pd.DataFrame({
        f"batch x length x {width}": shape, **family, "of": frame["peer"],
        "pass": frame["direction"], "median (us)": micro["median_seconds"].round(1),
        "quartiles (us)": [f"{a:.1f} to {b:.1f}" if a == a else None for a, b in
                           zip(micro["low_seconds"], micro["high_seconds"], strict=True)],
        **beside, "peak (MiB)": (frame["peak_bytes"] / 2**20).round(1),
        "relative error of output": frame["error_output"],
        "worst relative error of a gradient": frame["error_gradient"], **(behind or {}),
        "note": frame["note"],
    }).pipe(_measured)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as they are printed as JSON."""
    return _measured(frame).to_dict("records")
