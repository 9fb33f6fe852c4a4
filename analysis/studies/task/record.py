"""Rows of ``mambabyte task run`` as a measurement record: data/README.md has the format.

    python -m analysis.studies.task.record rows.jsonl h200-task --commit abc --command "..." --gpu
    "..."

For rows that were collected on another machine, one JSON object a line, as ``run_task`` returns
them with the name of their system added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

from analysis.runs.records import write_tables

# column -> (key of the row, factor)
COLUMNS: dict[str, tuple[str, float]] = {
    "system": ("system", 1), "seed": ("seed", 1), "energy (J, idle subtracted)": ("joules", 1),
    "time (s)": ("seconds", 1), "validation accuracy": ("valid_accuracy", 1),
    "validation (bits/byte)": ("valid_bits_per_byte", 1), "test accuracy": ("test_accuracy", 1),
    "test (bits/byte)": ("test_bits_per_byte", 1),
    "held-out training text, accuracy": ("held_out_accuracy", 1),
    "held-out training text (bits/byte)": ("held_out_bits_per_byte", 1),
    "parameters": ("n_parameters", 1), "steps": ("steps", 1), "of": ("n_steps", 1),
    "bytes seen": ("bytes_seen", 1),
    "peak memory (MiB)": ("peak_memory_bytes", 2**-20), "n-gram tables (MB)": ("ngram_bytes", 1e-6),
    "step (ms)": ("ms_per_step", 1), "first 50 steps and before (s)": ("seconds_to_first_log", 1),
    "scoring (s)": ("scoring_seconds", 1), "changed": ("overrides", 1), "failure": ("failure", 1),
}
ABOUT = ("Trained on a 100 MB Wikipedia substitute in WikiText format, not on WikiText-103; scored "
         "on the first 60,000 characters of the WikiText-103 raw validation and test splits. Each "
         "run is a process of its own with empty compiler caches: compiling is in its time and "
         "energy. Energy is the GPU's own counter minus 50 W times the time.")


def rows_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line a run, in the columns of the table."""
    def cell(row: dict[str, Any], key: str, factor: float) -> Any:
        value = row.get(key)
        if isinstance(value, dict):
            return json.dumps(value) if value else None
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

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return sum(r[key] for r in runs) / len(runs)

        accuracy = [r["valid_accuracy"] for r in runs]
        lines.append({
            "system": name, "runs": len(runs), "energy (J, idle subtracted)": mean("joules"),
            "time (s)": mean("seconds"), "validation accuracy": mean("valid_accuracy"),
            "lowest": min(accuracy), "highest": max(accuracy),
            "validation (bits/byte)": mean("valid_bits_per_byte"),
            "test accuracy": mean("test_accuracy")})
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Options:
    rows: tyro.conf.Positional[Path]
    """File with one JSON object a line."""
    name: tyro.conf.Positional[str]
    """Name of the record."""
    commit: str
    command: str
    date: str
    """When they ran, ISO 8601."""
    versions: dict[str, str]
    gpu: str
    gpu_memory_bytes: int
    cpu_count: int
    memory_bytes: int
    cpu: str = "not recorded"
    folder: Path = Path("data/measurements")
    about: str = ABOUT


def write(options: Options) -> Path:
    """Write the record, and read it back."""
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    machine = {
        "cpu": options.cpu, "cpu_count": options.cpu_count, "memory_bytes": options.memory_bytes,
        "system": "Linux",
        "gpus": [{"name": options.gpu, "memory_bytes": options.gpu_memory_bytes}],
    }
    return write_tables(
        options.folder / f"{options.name}.json",
        {"systems": ("Systems under the task's rules, means over seeds", summary_frame(rows)),
         "runs": ("Every run", rows_frame(rows))},
        study="task", title="The task, on one GPU", about=options.about,
        parameters={"idle_watts": 50.0, "characters": 60_000},
        seconds=sum(r.get("seconds") or 0.0 for r in rows),
        provenance={"date": options.date, "commit": options.commit, "command": options.command,
                    "versions": options.versions, "machine": machine},
    )


if __name__ == "__main__":
    print(write(tyro.cli(Options, description=__doc__)))
