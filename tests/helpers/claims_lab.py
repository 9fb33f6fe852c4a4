"""What tests of the claims ledger share: a laboratory with typical numbers, runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.runs.folders import Run, Table, Value
from analysis.studies.claims import compute as claims
from analysis.studies.claims.evidence import Evidence
from analysis.studies.claims.lab import Lab, Settings
from analysis.studies.claims.ledger import load_ledger

LEDGER = load_ledger()
BY_ID = {claim.id: claim for claim in LEDGER.claims}
CHEAP = ("formula", "overflow", "gradient", "kept", "selectivity", "operations", "fox_text")

# What the experiments give, so that the tests of judgement need not run them.
TYPICAL = {
    "scan_step.published_32": 2.2e-3, "scan_step.published_64": 2.2e-3,
    "scan_step.corrected_32": 9e-7, "scan_step.probability_32": 1.6e-3,
    "formula.whole_to_definition": 0.36, "formula.whole_to_early_decay": 3e-16,
    "formula.chunked_to_whole": 3e-16,
    "overflow.log_max": 88.72, "overflow.whole_fails_at_8": 112, "overflow.whole_fails_at_16": 57,
    "overflow.chunk_fails_at_decay": 2.8, "overflow.exp_cs_zero_at_decay": 3.25,
    "overflow.stable_error_there": 4e-8,
    "gradient.document_chunked_across_32": 0.071, "gradient.document_chunked_across_64": 0.071,
    "gradient.document_chunked_all_64": 0.35, "gradient.document_chunked_nonzero_64": 1.0,
    "gradient.corrected_cumsum_across_32": 1.6e-7,
    "kept.full_tensors": 6.0, "kept.full_tensors_ours": 5.0,
    "kept.without_concatenation": 1.0, "kept.twice_length": 2.0,
    "kept.twice_channels": 2.0, "kept.twice_states": 2.0,
    "operations.calls": 363, "operations.in_float32": 1, "operations.backward_exponent": 1.95,
    "operations.built_from_both": 1, "operations.all_of_torch": 1,
    "operations.split_exponent": 1.0, "operations.bytes_per_element": 99,
    "operations.loop_per_step": 27,
    "operations.bytes_published": 1923, "operations.bytes_cut_once": 341,
    "streaming.state_bytes_16": 116736, "streaming.state_bytes_512": 116736,
    "streaming.bytes_moved_16": 5.1e6, "streaming.bytes_moved_512": 5.1e6,
    "streaming.calls_per_byte": 1, "streaming.step_error": 9e-7, "streaming.tail_inputs": 3,
    "streaming.ssm_channels": 384, "streaming.ssm_states": 16,
    "selectivity.dt": 0.05, "selectivity.B": 0.9, "selectivity.C": 0.9,
    "initial.loss": 5.576, "initial.loss_low": 5.56, "initial.loss_high": 5.59,
    "initial.unit_loss": 185.5, "initial.bias_low": 1.001e-3, "initial.bias_high": 0.0999,
    "initial.bias_median": 0.0099, "initial.bias_mean": 0.0217, "initial.dt_high": 0.147,
    "initial.exponent": 60.4, "initial.whole_overflows_at": 49, "initial.A_low": -16,
    "initial.A_high": -1, "initial.A_is_range": 1,
    "fox.first_loss": 5.64, "fox.last_loss": 0.69, "fox.accuracy_at_their_loss": 0.99,
    "fox.steps_to_their_loss": 9, "fox.accuracy": 0.997, "fox.exponent": 62.9,
    "fox_published.last_loss": 0.69, "fox_published.accuracy": 0.997,
    "fox_published.parallel_loss": 0.6621, "fox_published.streamed_loss": 0.6633,
    "fox_no_scan.last_loss": 0.69, "fox_no_scan.accuracy": 0.997,
    "fox_text.entropy": 3.048, "fox_text.uniform": 3.332,
    "fox_text.accuracy_1": 0.711, "fox_text.accuracy_2": 0.978,
    "fox_fast.exponent": 72.8, "fox_fast.dt_high": 0.21,
    "smoke.steps": 2, "smoke.context": 64, "smoke.batch": 2, "smoke.seconds": 0.04,
    "smoke.published_passes_check": 0,
    "mixers.attention": 4.7, "mixers.loop": 45.0, "mixers.published": 70.0, "mixers.auto": 6.6,
    "second_steps.bits_5": 4.59, "second_steps.bits_40": 3.26,
    "second_steps.bits_250": 2.75, "artefact.untrained": 0.32, "artefact.after_5": 0.37,
    "tying.early": 0.46, "tying.late": 0.3, "tying.tied_after_60": 4.0, "tying.own_after_60": 3.54,
    "tying.tied_after_180": 3.5, "tying.own_after_180": 3.2, "tying.head_parameters": 12288,
    "tying.smaller_share": 0.45, "tying.cosine": 0.15,
    "gating.dt_spread": 1.7, "gating.without_selection_0": 0.064, "gating.without_gate_0": 0.31,
    "gating.without_convolution_0": 0.24,
    "streamed.exact_bits_0": 3.2, "streamed.published_bits_0": 3.21,
    "streamed.streamed_bits_0": 3.26, "streamed.published_accuracy_0": 0.45,
    "streamed.streamed_accuracy_0": 0.44,
    "counts.bits_0": 4.65, "counts.bits_1": 3.78, "counts.accuracy_0": 0.16,
    "counts.accuracy_4": 0.60, "crashed.ssm_2": 1, "crashed.ssm_3": 1,
}


# What was published beside the documents decides some claims on its own; most tests ask what our
# measurements say, so they do without the authors' run.
OUR_FACTS = {name: fact for name, fact in LEDGER.facts.items() if name != "first_run"}


def lab(evidence: Evidence | None = None, *, facts: dict | None = None, **given: float) -> Lab:
    """A laboratory with typical numbers; ``fox__exponent=99`` replaces fox.exponent."""
    other = {name.replace("__", "."): value for name, value in given.items()}
    return Lab(Settings(), evidence, facts or OUR_FACTS, {**TYPICAL, **other})


def verdict(claim: str, evidence: Evidence | None = None, **given: float) -> str:
    return claims.judge(BY_ID[claim], lab(evidence, **given)).verdict


def run_of(study: str, values: dict | None = None, tables: dict | None = None,
           device: str = "cpu", name: str = "run", **entries) -> Run:
    return Run(
        folder=Path(name), study=study, parameters={"device": device}, run_id=name,
        values={k: Value(v) for k, v in (values or {}).items()},
        tables={k: Table(k, "", pd.DataFrame(v)) for k, v in (tables or {}).items()}, **entries)


def training(ms: float, joules: float | None = None, **other: float) -> dict[str, list[dict]]:
    rows = [{"pattern": "M", "form": "document_chunked", "batch": 16, "context": 1024, "ms": ms,
             "joules_per_megabyte": joules}]
    rows += [{"pattern": p, "form": "auto", "batch": 16, "context": 1024, "ms": v,
              "joules_per_megabyte": None} for p, v in other.items()]
    return {"training": rows}


def on_gpu(values: dict | None = None, tables: dict | None = None, study: str = "throughput"):
    return Evidence((run_of(study, values, tables, device="cuda"),))


def task(*rows: dict, job: str = "one") -> Evidence:
    """A record of whole runs, of one job unless told; what a row lacks is as on a good day."""
    good = {"system": "mamba_byte_as_written", "seconds": 200.0, "joules": 15e3, "steps": 4000,
            "valid_accuracy": 0.7, "failure": None}
    record = run_of("task", name="gpu-task")
    frame = pd.DataFrame([{**good, **row} for row in rows])
    return Evidence((), (replace(record, tables={"runs": Table("runs", "", frame)},
                                 provenance={"job": {"id": job}} if job else {}),))
