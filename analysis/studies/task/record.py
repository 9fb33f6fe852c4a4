"""Rows of ``mambabyte task run`` as a record: one dictionary a run, as ``run_task`` returns it with
the name of its system added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.runs.folders import Run, tables_of
from analysis.runs.frames import not_measured
from mambabyte.config.files import to_json

# column -> (key of the row, factor)
COLUMNS: dict[str, tuple[str, float]] = {
    "system": ("system", 1), "seed": ("seed", 1), "energy (J, idle subtracted)": ("joules", 1),
    "total energy (J)": ("total_joules", 1), "CPU (J)": ("cpu_joules", 1),
    "CPU, from": ("cpu_source", 1),
    "time (s)": ("seconds", 1), "validation accuracy": ("valid_accuracy", 1),
    "its error over the text": ("valid_accuracy_error", 1),
    "validation (bits/byte)": ("valid_bits_per_byte", 1),
    "validation characters": ("valid_characters", 1), "test accuracy": ("test_accuracy", 1),
    "test (bits/byte)": ("test_bits_per_byte", 1),
    "held-out training text, accuracy": ("held_out_accuracy", 1),
    "held-out training text (bits/byte)": ("held_out_bits_per_byte", 1),
    "parameters": ("n_parameters", 1), "steps": ("steps", 1), "of": ("n_steps", 1),
    "bytes seen": ("bytes_seen", 1),
    "peak memory (MiB)": ("peak_memory_bytes", 2**-20), "n-gram tables (MB)": ("ngram_bytes", 1e-6),
    "step (ms)": ("ms_per_step", 1), "first 50 steps and before (s)": ("seconds_to_first_log", 1),
    "scoring (s)": ("scoring_seconds", 1), "changed": ("overrides", 1), "failure": ("failure", 1),
    "public file (SHA-256)": ("sha256", 1),
}
ABOUT = ("Whole runs under the task's rules. Energy is the GPU's own counter from the start of "
         "training to its end, compiling included, minus {:g} W times the time. The total adds the "
         "CPU's counter, or the public rule's estimate of 42 W, and is never below 50 W times the "
         "time.")


def rows_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line a run, in the columns of the table."""
    def cell(row: dict[str, Any], key: str, factor: float) -> Any:
        value = row.get(key)
        if isinstance(value, dict):
            return to_json(value) if value else None
        return value * factor if isinstance(value, float | int) and factor != 1 else value

    return pd.DataFrame([{c: cell(row, key, f) for c, (key, f) in COLUMNS.items()}
                         for row in rows], dtype=object)


def summary_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line a system: means over its seeds, and the range of the accuracy."""
    lines = []
    for name in dict.fromkeys(row["system"] for row in rows):
        runs = [r for r in rows if r["system"] == name and not r.get("failure")]
        if not runs:
            continue

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float | None:
            # of a seed without a counter there is no mean
            known = [r[key] for r in runs if r.get(key) is not None]
            return sum(known) / len(known) if len(known) == len(runs) else None

        accuracy = [r["valid_accuracy"] for r in runs]
        lines.append({
            "system": name, "runs": len(runs), "energy (J, idle subtracted)": mean("joules"),
            "total energy (J)": mean("total_joules"), "time (s)": mean("seconds"),
            "validation accuracy": mean("valid_accuracy"),
            "lowest": min(accuracy), "highest": max(accuracy),
            "validation (bits/byte)": mean("valid_bits_per_byte"),
            "test accuracy": mean("test_accuracy")})
    return not_measured(pd.DataFrame(lines))


def parts_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line a part of a run: where its seconds and joules went."""
    return pd.DataFrame([
        {"system": row["system"], "seed": row["seed"], "part": part, "time (s)": took["seconds"],
         "GPU (J, idle subtracted)": took["joules"]}
        for row in rows for part, took in (row.get("parts") or {}).items()])


def task_record(
    rows: Sequence[dict[str, Any]], provenance: Mapping[str, Any], *, idle_watts: float,
    characters: int, title: str = "", about: str = "",
) -> Run:
    """Rows as a run that can be kept as a record: every run, and means over the seeds of each
    system; and, where they say so, the parts of each. ``provenance`` is that of the machine where
    they took place."""
    parts = parts_frame(rows)
    tables = {
        "systems": ("Systems under the task's rules, means over seeds", summary_frame(rows)),
        "runs": ("Every run", rows_frame(rows))}
    if len(parts):
        tables["parts"] = ("Where the seconds and joules of each run went", parts)
    return Run(
        "task", {"idle_watts": idle_watts, "characters": characters},
        tables=tables_of(tables),
        provenance=dict(provenance), seconds=sum(row.get("seconds") or 0.0 for row in rows),
        title=title or "The task", about=about or ABOUT.format(idle_watts))
