"""Recorded times that several checks read: training steps, scans and whole runs."""

from __future__ import annotations

import pandas as pd

from analysis.claims.arithmetic import FINAL
from analysis.claims.evidence import Source
from analysis.claims.lab import Lab

PUBLISHED = "document_chunked"
AS_WRITTEN = "mamba_byte_as_written"


def training_step(lab: Lab, pattern: str, form: str) -> tuple[pd.Series, Source] | None:
    """The timed training step of the document's size on an accelerator: its row and source."""
    found = lab.table("throughput", "training", accelerator=True)
    if found is None:
        return None
    rows = found.what
    size = rows["batch"] * rows["context"] == FINAL.train.batch_size * FINAL.train.context
    rows = rows[size & (rows["pattern"] == pattern) & (rows["form"] == form) & rows["ms"].notna()]
    return (rows.iloc[0], found) if len(rows) else None


def step_ms(rows: pd.DataFrame) -> float:
    """Milliseconds a step: of the steps alone where that was taken, else of the whole run."""
    if "ms_per_step" in rows and rows["ms_per_step"].notna().all():
        return float(rows["ms_per_step"].astype(float).mean())
    return 1e3 * float((rows["seconds"].astype(float) / rows["steps"].astype(float)).mean())


def scan_ratio(lab: Lab) -> tuple[float, str, Source] | None:
    """Published scan over fused, forward and backward, at the largest size both were timed at."""
    found = lab.table("throughput", "scan_time", accelerator=True)
    if found is None:
        return None
    rows = found.what[(found.what["pass"] == "forward+backward") & found.what["ms"].notna()]
    wide = rows.pivot_table(index=["batch", "length"], columns="form", values="ms", aggfunc="first")
    if not {PUBLISHED, "fused"} <= set(wide.columns):
        return None
    both = wide[[PUBLISHED, "fused"]].dropna().astype(float)
    if both.empty:
        return None
    near_size = [i for i in both.index if i == (16, 1024)] or [max(both.index, key=lambda i:
                                                                   i[0] * i[1])]
    batch, length = near_size[0]
    row = both.loc[(batch, length)]
    return float(row[PUBLISHED] / row["fused"]), f"{batch} x {length}", found


def whole_run(lab: Lab) -> tuple[pd.DataFrame, Source] | None:
    """Finished runs of the first document's system as written, under the task's rules."""
    found = lab.task(AS_WRITTEN)
    if found is None:
        return None
    rows = found.what
    if "failure" in rows:
        rows = rows[rows["failure"].isna()]
    return (rows, found) if len(rows) and "steps" in rows else None
