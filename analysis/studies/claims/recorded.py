"""Recorded times and comparisons that several checks read: steps, scans, trained systems, runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.lab import Lab
from mambabyte.config import get_preset

PUBLISHED = "document_chunked"
AS_WRITTEN = "mamba_byte_as_written"
BOTH = "forward+backward"
SIZE = FINAL.train.batch_size, FINAL.train.context
SECOND = get_preset("ssm_1").model  # the second document's widths
# The public baseline, and the same recipe and size with SSM layers.
SCALE = {"A": "modded_nanogpt", "M": "nano_ssm", "MA": "nano_ssm_1_1"}


def joined(*sources: Source | None) -> str:
    """The names of several sources, each once."""
    return "; ".join(dict.fromkeys(s.text for s in sources if s is not None))


def one_job(*sources: Source | None) -> bool:
    """Whether all were measured in one job: a ratio of times, joules or bytes needs that."""
    jobs = [s.job for s in sources if s is not None]
    return all(job is not None and jobs[0] is not None and jobs[0].same(job) for job in jobs)


def mean(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].dropna().astype(float).mean())


def count_of(n: int, what: str) -> str:
    """"one seed", "3 seeds"."""
    return f"one {what}" if n == 1 else f"{n} {what}s"


# -------------------------------------------------------------------------------- training steps


def training_step(lab: Lab, pattern: str, form: str) -> tuple[pd.Series, Source] | None:
    """The timed training step of the document's size on an accelerator: its row and source."""
    found = lab.table("throughput", "training", accelerator=True)
    if found is None:
        return None
    rows = found.what
    size = rows["batch"] * rows["context"] == FINAL.train.batch_size * FINAL.train.context
    rows = rows[size & (rows["pattern"] == pattern) & (rows["form"] == form) & rows["ms"].notna()]
    return (rows.iloc[0], found) if len(rows) else None


def compiled_steps(lab: Lab) -> dict[int, tuple[float, float, Source]]:
    """Milliseconds of compiled steps of the document's model and of attention of its size on an
    accelerator, by length of the windows."""
    model = FINAL.model
    like = {"way": "compile", "batch_size": FINAL.train.batch_size, "d_model": model.d_model,
            "n_layer": model.n_layer}
    found: dict[int, tuple[float, float, Source]] = {}
    for source in lab.each("throughput", "ms_m", "ms_a", accelerator=True, like=like):
        found.setdefault(int(source.parameters["context"]), (
            float(source.what["ms_m"]), float(source.what["ms_a"]), source))
    return dict(sorted(found.items()))


def half_depth_ratios(lab: Lab) -> str:
    """Words on attention matched as the field does it, half the layers with wider MLPs: its time
    for a compiled step of the SSM's, by length; empty where no record has it."""
    ratios = [f"{float(s.what['ms_a_half_the_layers']) / ssm:.2f} with {n} bytes"
              for n, (ssm, _, s) in compiled_steps(lab).items() if "ms_a_half_the_layers" in s.what]
    return ("" if not ratios else " Against attention of half the layers with wider MLPs, as the "
            f"field matches them, it is {', '.join(ratios)}.")


def step_ms(rows: pd.DataFrame) -> float:
    """Milliseconds a step: of the steps alone where that was taken, else of the whole run."""
    if "ms_per_step" in rows and rows["ms_per_step"].notna().all():
        return float(rows["ms_per_step"].astype(float).mean())
    return 1e3 * float((rows["seconds"].astype(float) / rows["steps"].astype(float)).mean())


def watts_of(rows: pd.DataFrame) -> float:
    return float((rows["joules"].astype(float) / rows["seconds"].astype(float)).mean())


# ------------------------------------------------------------------------------------- scans


@dataclass(frozen=True)
class ScanCost:
    """The published scan beside a fused kernel, forward and backward, in milliseconds."""

    published: float
    kernel: float
    name: str  # of the kernel
    size: str
    how: str  # the published scan's time was found
    source: str
    rival: str = ""  # words on a kernel of another job, of which no ratio is made

    @property
    def ratio(self) -> float:
        return self.published / self.kernel

    @property
    def words(self) -> str:
        return (f"At {self.size} the published scan takes {self.published:.3g} ms a layer forward "
                f"and backward{self.how}, {self.name} {self.kernel:.2g}: {self.ratio:.0f} times as "
                f"long{self.rival}")


def scan_times(lab: Lab, *forms: str) -> tuple[pd.Series, str, Source] | None:
    """Milliseconds of scan forms, forward and backward, on an accelerator: at the document's size,
    else its length, else the largest size that all were timed at."""
    found = lab.table("throughput", "scan_time", accelerator=True)
    if found is None:
        return None
    rows = found.what[(found.what["pass"] == BOTH) & found.what["ms"].notna()]
    wide = rows.pivot_table(index=["batch", "length"], columns="form", values="ms", aggfunc="first")
    if not set(forms) <= set(wide.columns):
        return None
    shared = wide[list(forms)].dropna().astype(float)
    if shared.empty:
        return None
    at = max(shared.index, key=lambda i: (i == SIZE, i[1] == SIZE[1], i[0] * i[1]))
    return shared.loc[at], f"{at[0]} x {at[1]}", found


def kernel_times(lab: Lab) -> tuple[pd.DataFrame, Source] | None:
    """Milliseconds of kernels, forward and backward, by ``mambabyte bench scan`` on an accelerator:
    one row a size "batch x length x channels", a column each."""
    size = "batch x length x channels"
    found = lab.table("throughput", "bench", accelerator=True, column=size)
    if found is None:
        return None
    rows = found.what[found.what["pass"] == BOTH]
    wide = rows.pivot_table(index=size, columns="of", values="median (us)", aggfunc="first")
    return wide.astype(float) / 1e3, found


def _kernels_there(lab: Lab) -> tuple[dict[str, float], Source | None]:
    """The kernels' milliseconds at the document's size."""
    found = kernel_times(lab)
    size = f"{SIZE[0]} x {SIZE[1]} x {FINAL.model.d_inner}"
    if found is None or size not in found[0].index:
        return {}, None
    return found[0].loc[size].dropna().to_dict(), found[1]


def scan_cost(lab: Lab) -> ScanCost | None:
    """The published scan against mamba-ssm's kernel where that was timed in the same job, else
    against ours, at the document's size: by a measurement, or by the difference of two steps. Else
    at another size."""
    kernels, bench = _kernels_there(lab)
    timed = scan_times(lab, PUBLISHED, "fused")
    steps = _by_difference(lab, kernels.get("fused"), bench)
    own_size = f"{SIZE[0]} x {SIZE[1]}"
    if timed is not None and (timed[1] == own_size or steps is None):
        times, size, source = timed
        published, ours, how = float(times[PUBLISHED]), float(times["fused"]), ""
    elif steps is not None:
        published, how, source = steps
        ours, size = kernels["fused"], own_size
    else:
        return None
    if "mamba_ssm" in kernels and size == own_size and one_job(source, bench):
        return ScanCost(published, kernels["mamba_ssm"], "mamba-ssm's kernel", size, how,
                        joined(source, bench))
    rival = ("" if "mamba_ssm" not in kernels or size != own_size else
             f"; mamba-ssm's kernel took {kernels['mamba_ssm']:.2g} in another command")
    return ScanCost(published, ours, "this project's fused scan", size, how,
                    joined(source, bench if rival else None), rival)


def _by_difference(
    lab: Lab, fused_ms: float | None, bench: Source | None
) -> tuple[float, str, Source] | None:
    """Milliseconds of one published scan from captured steps with it and with the fused one, how
    that was found, and where."""
    whole, fused = training_step(lab, "M", PUBLISHED), training_step(lab, "M", "auto")
    if whole is None or fused is None or fused_ms is None or not one_job(whole[1], bench):
        return None
    slow, fast = float(whole[0]["ms"]), float(fused[0]["ms"])
    layers = FINAL.model.n_layer
    return ((slow - fast) / layers + fused_ms, f" (captured steps of {layers} layers take "
            f"{slow:.1f} ms with it and {fast:.1f} with a fused one)", whole[1])


# ---------------------------------------------------------------------------------- whole runs


def whole_run(lab: Lab) -> tuple[pd.DataFrame, Source] | None:
    """Finished runs of the first document's system as written, under the task's rules."""
    found = lab.task(AS_WRITTEN)
    if found is None:
        return None
    rows = found.what
    if "failure" in rows:
        rows = rows[rows["failure"].isna()]
    return (rows, found) if len(rows) and "steps" in rows else None


@dataclass(frozen=True)
class Scale:
    """Attention, SSM and 1:1 hybrid by the baseline's recipe, at its size and in as many steps."""

    steps: int
    runs: dict[str, Source]  # by pattern

    def gap(self, pattern: str, column: str) -> float:
        """A pattern minus attention, means over seeds."""
        return mean(self.runs[pattern].what, column) - mean(self.runs["A"].what, column)

    def seeds(self, *patterns: str) -> int:
        """Of the pattern with the fewest."""
        return min(len(self.runs[p].what) for p in patterns)

    @property
    def text(self) -> str:
        return joined(*self.runs.values())


def at_scale(lab: Lab, *columns: str, ending: str = "") -> Scale | None:
    """Whole runs by the baseline's recipe, or its start with the ``ending`` "_500"; None unless all
    took as many steps and measured ``columns``."""
    found = lab.tasks(*(name + ending for name in SCALE.values()))
    if found is None or any(c not in f.what or f.what[c].isna().any()
                            for f in found for c in (*columns, "steps")):
        return None
    steps = {int(n) for f in found for n in f.what["steps"]}
    return Scale(steps.pop(), dict(zip(SCALE, found, strict=True))) if len(steps) == 1 else None


# ------------------------------------------------------------- this study's own paired trainings


@dataclass(frozen=True)
class Repeated:
    """A paired comparison of this study: its table, a row a seed, from the longest training."""

    rows: pd.DataFrame
    source: str

    @property
    def steps(self) -> int:
        return int(self.rows["steps"].iloc[0])

    @property
    def seeds(self) -> str:
        return count_of(len(self.rows), "seed")

    def column(self, name: str) -> list[float]:
        return [float(x) for x in self.rows[name]]


def repeated(lab: Lab, table: str, here: Callable[[Lab], pd.DataFrame]) -> Repeated:
    """The recorded table of that name where it was trained longer, or over more seeds, than this
    run's own settings have it; else the table that is made here."""
    found = lab.table("claims", table)
    settings = lab.settings
    steps = {"parts": settings.parts_steps, "streamed": settings.streamed_steps}[table]
    if found is not None and (int(found.what["steps"].iloc[0]), len(found.what)) > (
            steps, settings.paired_seeds):
        return Repeated(found.what, found.text)
    return Repeated(here(lab), "computed here")


# ------------------------------------------------------------------------------------ ablation


def second_widths(
    lab: Lab, pattern: str, reference: str = "A"
) -> tuple[list[float], Source] | None:
    """Held-out bits a byte of a pattern minus those of another at equal steps, seed by seed, for
    models of the second document's width and depth; None where it was not measured."""
    found = lab.table("ablation", "runs", most="steps", like={
        "d_model": SECOND.d_model, "n_layer": SECOND.n_layer})
    if found is None:
        return None
    bits = found.what.pivot_table(index="seed", columns="pattern", values="heldout_bits_per_byte",
                                  aggfunc="first")
    if not {pattern, reference} <= set(bits.columns):
        return None
    gaps = (bits[pattern] - bits[reference]).dropna().astype(float)
    return (gaps.tolist(), found) if len(gaps) else None
