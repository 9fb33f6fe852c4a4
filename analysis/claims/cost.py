"""Checks of time and energy: operations, recorded speeds, and what follows from them."""

from __future__ import annotations

import pandas as pd

from analysis.claims.arithmetic import FINAL, trained_bytes
from analysis.claims.evidence import Source
from analysis.claims.lab import Lab
from analysis.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    OPEN,
    Claim,
    Finding,
    check,
    compare,
    near,
    sig,
)
from analysis.claims.published import fast_hybrids, first_run
from analysis.flops import flops_per_byte, flops_table
from mambabyte.config import get_preset
from mambabyte.evaluate import TASK_CHARACTERS

PUBLISHED = "document_chunked"
AS_WRITTEN = "mamba_byte_as_written"


def _training(lab: Lab, pattern: str, form: str) -> tuple[pd.Series, Source] | None:
    """The timed training step of the document's size on an accelerator: its row and source."""
    found = lab.table("throughput", "training", accelerator=True)
    if found is None:
        return None
    rows = found.what
    size = rows["batch"] * rows["context"] == FINAL.train.batch_size * FINAL.train.context
    rows = rows[size & (rows["pattern"] == pattern) & (rows["form"] == form) & rows["ms"].notna()]
    return (rows.iloc[0], found) if len(rows) else None


def _from_whole_steps(lab: Lab, high: float) -> Finding | None:
    """Judges "at most ``high`` times the fused scan" by whole training steps, which hold more than
    the scan: only where the rest cannot explain what is measured."""
    whole, exact = whole_run(lab), lab.task("mamba_byte")
    if whole is None or exact is None:
        return None
    written, fused = _step_ms(whole[0]), _step_ms(exact.what)
    # The scan's share of the fused step counts fully; the rest of an eager step is taken to cost
    # ten times what it costs compiled and captured.
    explained = high * fused + 10 * fused
    reason = (f"A whole step as written, run op by op, takes {written:.0f} ms; with the fused "
              f"scan, compiled and captured, {fused:.1f} ms. If the published scan took "
              f"{high:g} times the fused one and all else in the step ten times as long op by op, "
              f"that would be {explained:.0f} ms at most.")
    return Finding(FAILS if written > explained else OPEN, f"{written:.0f} ms a step against "
                   f"{fused:.1f}", reason, whole[1].text)


def _step_ms(rows: pd.DataFrame) -> float:
    """Milliseconds a step: of the steps alone where that was taken, else of the whole run."""
    if "ms_per_step" in rows and rows["ms_per_step"].notna().all():
        return float(rows["ms_per_step"].astype(float).mean())
    return 1e3 * float((rows["seconds"].astype(float) / rows["steps"].astype(float)).mean())


def _scan_ratio(lab: Lab) -> tuple[float, str, Source] | None:
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


@check
def constant_step(lab: Lab, claim: Claim) -> Finding:
    few, many = lab["streaming.bytes_moved_16"], lab["streaming.bytes_moved_512"]
    growth = lab.value("throughput", "stream_growth_ssm")
    timed = float(growth.what) if growth else None
    steady = few == many and (timed is None or timed < 1.5)
    words = f"; the latency measured after thousands of bytes is {timed:.2f} times that at the " \
            "start" if timed else ""
    return Finding(HOLDS if steady else FAILS, f"{many / 1e6:.1f} MB moved a byte", "A step reads "
                   f"and writes {few / 1e6:.2f} MB after 16 bytes and {many / 1e6:.2f} MB after "
                   f"512{words}.", growth.text if growth else "computed here")


@check
def cost_of_a_byte(lab: Lab, claim: Claim) -> Finding:
    table = flops_table(FINAL.model, FINAL.train.context).set_index("module")
    forward = table["forward_flops_per_byte"]
    share = float(forward["SSM scan"] / forward.sum())
    projections = float(sum(v for k, v in forward.items() if str(k).endswith("_proj")))
    verdict = HOLDS if share > 0.5 else FAILS
    return Finding(verdict, f"{share:.0%} of the operations", f"The scan, n_layer d_inner d_state, "
                   f"is {share:.0%} of a byte's operations; the projections, n_layer d_model "
                   f"d_inner, are {projections / forward.sum():.0%}. Both are independent of the "
                   "bytes seen.", "closed form (analysis.flops)")


@check
def linear_time(lab: Lab, claim: Claim) -> Finding:
    ours, split = lab["operations.backward_exponent"], lab["operations.split_exponent"]
    recorded = lab.value("throughput", "document_fill_exponent")
    verdict = HOLDS if ours < 1.15 else FAILS
    return Finding(verdict, f"exponent {ours:.2f} backward", "Linear forward, but the gradient of "
                   "each slice taken in the loop is a tensor of the full length: what the backward "
                   f"pass writes grows with exponent {ours:.2f} from 1024 to 4096 bytes (split "
                   f"once: {split:.2f}).", recorded.text if recorded else "computed here")


@check
def linear_complexity(lab: Lab, claim: Claim) -> Finding:
    ours, split = lab["operations.backward_exponent"], lab["operations.split_exponent"]
    verdict = FAILS if split > 1.15 else HOLDS if ours < 1.15 else CAVEAT
    return Finding(verdict, f"exponent {split:.2f}, as published {ours:.2f}", "The recurrence is "
                   f"linear, and so is a scan that is cut once (exponent {split:.2f} backward); "
                   f"the published loop of slices is not ({ours:.2f}).")


@check
def slower_than_fused(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    found = _scan_ratio(lab)
    if found is None:
        return _from_whole_steps(lab, high) or lab.undecided(
            "throughput", "The factor must be measured on a GPU (profile full)",
            f"{lab['mixers.published'] / lab['mixers.auto']:.0f} x on this CPU")
    ratio, size, source = found
    verdict = HOLDS if low <= ratio <= high else CAVEAT if ratio <= 1.5 * high else FAILS
    return Finding(verdict, f"{ratio:.0f} x at {size}", f"At {size} the published scan takes "
                   f"{ratio:.0f} times the fused one, forward and backward; not an A100, but no "
                   "device turns one into the other.", source.text)


@check
def bandwidth_bound(lab: Lab, claim: Claim) -> Finding:
    moved = lab["operations.bytes_per_element"]
    intensity = 6 / moved
    balance = lab.fact("a100", "fp32_tflops") * 1e12 / (lab.fact("a100", "bandwidth_gb_s") * 1e9)
    verdict = HOLDS if intensity < 0.2 * balance else CAVEAT if intensity < balance else FAILS
    return Finding(verdict, f"{sig(intensity, 2)} operations a byte", f"Some 6 operations and one "
                   f"exponential for {moved:.0f} bytes moved are {sig(intensity, 2)} operations a "
                   f"byte, where an A100 needs {balance:.0f} to be bound by arithmetic. Short "
                   "chunks add the time of their "
                   "launches.", "computed here; data sheet of the A100")


@check
def five_times_attention(lab: Lab, claim: Claim) -> Finding:
    quoted = lab.fact("mamba_paper", "speedup_of")
    paper = f"The paper's factor 5 is for {quoted} of large models at batch."
    found = _training(lab, "M", "auto"), _training(lab, "A", "auto")
    if found[0] is not None and found[1] is not None:
        ratio = float(found[1][0]["ms"] / found[0][0]["ms"])
        verdict = HOLDS if near(ratio, claim.number, 0.3) else CAVEAT if ratio > 1 else FAILS
        return Finding(verdict, f"{ratio:.2f} x in training", f"{paper} In training at 16 x 1024 "
                       f"with equal parameters even the fused SSM runs at {ratio:.2f} times "
                       "attention's speed.", found[0][1].text)
    kernels = _kernel_ratios(lab)
    if kernels is None:
        return lab.undecided("throughput", f"{paper} For training it takes both at one size on a "
                             "GPU (profile full)")
    ratios, source = kernels
    best = max(ratios, key=lambda size: ratios[size])
    worst = min(ratios, key=lambda size: ratios[size])
    top = ratios[best]
    verdict = HOLDS if top >= 0.7 * claim.number and ratios[worst] > 1 else (
        CAVEAT if top > 1 else FAILS)
    return Finding(verdict, f"{ratios[worst]:.2f} to {top:.2f} x", f"{paper} Its kernel against "
                   f"attention's, forward and backward at one width, is {ratios[worst]:.2f} times "
                   f"as fast at {worst} and {top:.2f} times at {best}: a matter of length.",
                   source.text)


def _kernel_ratios(lab: Lab) -> tuple[dict[str, float], Source] | None:
    """Attention's kernel time over mamba-ssm's, forward and backward, by size."""
    found = lab.table("throughput", "bench", accelerator=True)
    if found is None:
        return None
    rows = found.what[found.what["pass"] == "forward+backward"]
    wide = rows.pivot_table(index="batch x length x channels", columns="of", values="median (us)",
                            aggfunc="first")
    if not {"sdpa", "mamba_ssm"} <= set(wide.columns):
        return None
    both = wide[["sdpa", "mamba_ssm"]].dropna().astype(float)
    ratios = {str(size): float(row["sdpa"] / row["mamba_ssm"]) for size, row in both.iterrows()}
    return (ratios, found) if ratios else None


@check
def eval_is_cheap(lab: Lab, claim: Claim) -> Finding:
    table = lab.table("throughput", "streaming")
    if table is None:
        return lab.undecided("throughput", "It takes the latency of one streamed byte")
    rows = table.what.assign(ms=table.what["ms"].astype(float)).sort_values("bytes_seen")
    last = rows.groupby("system")["ms"].last()
    ssm = float(last["SSM"])
    windowed = float(last[next(s for s in last.index if "last" in s)])
    every = float(last[next(s for s in last.index if "all keys" in s)])
    seconds = ssm * TASK_CHARACTERS / 1e3
    faster = (ssm < windowed) + (ssm < every)
    verdict = (FAILS, CAVEAT, HOLDS)[faster]
    board = lab.published("leaderboard")
    beside = "" if board is None else (
        f" The baseline's published log scores {board['scoring_characters_per_second']} characters "
        f"a second, {TASK_CHARACTERS / board['scoring_characters_per_second']:.0f} s for all.")
    return Finding(verdict, f"{ssm:.2f} ms against {windowed:.2f} and {every:.2f}",
                   f"A streamed byte takes {ssm:.2f} ms, {seconds:.0f} s for 60,000; attention of "
                   f"the same width takes {windowed:.2f} ms with a window and {every:.2f} ms with "
                   f"all keys, after as many bytes as were measured.{beside}", table.text)


@check
def structural_win(lab: Lab, claim: Claim) -> Finding:
    growth = {n: lab.value("throughput", f"stream_growth_{n}") for n in ("ssm", "window", "cache")}
    if any(v is None for v in growth.values()):
        return lab.undecided("throughput", "It takes latency against bytes seen",
                             "constant state and operations")
    ssm, window, cache = (float(v.what) for v in growth.values() if v is not None)
    verdict = FAILS if ssm >= cache else HOLDS if window > 1.5 * ssm else CAVEAT
    over = "over attention in either form" if verdict == HOLDS else "over an unbounded cache only"
    return Finding(verdict, f"{ssm:.2f}, {window:.2f} and {cache:.2f}", "From the first byte to "
                   f"the last measured one latency grows {ssm:.2f} times for the SSM, {window:.2f} "
                   f"for attention with a window and {cache:.2f} with all keys: "
                   f"{'no win' if verdict == FAILS else 'a win ' + over}.",
                   growth["ssm"].text if growth["ssm"] else "")


def _pace(lab: Lab) -> tuple[float, str, Source] | None:
    """Milliseconds a step of the system as written, how that was found, and where."""
    whole, found, own = whole_run(lab), _training(lab, "M", PUBLISHED), first_run(lab)
    beside = "" if own is None else (f"; the authors' own run took {own.ms_per_step:.0f} ms on an "
                                     f"{own.gpu}")
    if whole is not None:
        ms = _step_ms(whole[0])
        return ms, f"A run of the system as written takes {ms:.0f} ms a step{beside}", whole[1]
    if found is not None:
        ms = float(found[0]["ms"])
        return ms, f"A step takes {ms:.0f} ms{beside}", found[1]
    if own is not None:
        return own.ms_per_step, (f"The authors' own run took {own.ms_per_step:.0f} ms a step; none "
                                 "was done here"), Source(own, own.source, own.gpu)
    return None


@check
def wall_clock(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    steps, found = FINAL.train.n_steps, _pace(lab)
    if found is None:
        return lab.undecided("throughput", f"{steps} steps in {low:.0f} to {high:.0f} s are "
                             f"{1e3 * low / steps:.0f} to {1e3 * high / steps:.0f} ms a step of "
                             "the published scan at 16 x 1024, on a GPU (profile full)")
    ms, how, source = found
    seconds = ms * steps / 1e3
    verdict = HOLDS if low <= seconds <= high else CAVEAT if seconds <= 300 else FAILS
    return Finding(verdict, f"{seconds:,.0f} s", f"{how}. On {source.machine} {steps} steps take "
                   f"{seconds:,.0f} s, against a cap of 300 s.", source.text)


@check
def steps_within_cap(lab: Lab, claim: Claim) -> Finding:
    steps, found = FINAL.train.n_steps, _pace(lab)
    allowed = 1e3 * claim.number / steps
    if found is None:
        return lab.undecided("throughput", f"{steps} steps in {claim.number:.0f} s allow "
                             f"{allowed:.0f} ms a step of the published scan, on a GPU (profile "
                             "full)")
    ms, how, source = found
    return Finding(HOLDS if ms <= allowed else FAILS, f"{1e3 * claim.number / ms:,.0f} steps",
                   f"{how}, and {steps} steps in {claim.number:.0f} s allow {allowed:.0f}: on "
                   f"{source.machine} the clock ends the run after "
                   f"{1e3 * claim.number / ms:,.0f}.", source.text)


@check
def energy_range(lab: Lab, claim: Claim) -> Finding:
    low, high = (1e3 * n for n in claim.range)
    whole, found, own = whole_run(lab), _training(lab, "M", PUBLISHED), first_run(lab)
    steps = FINAL.train.n_steps
    beside = "" if own is None else (f" The authors' own run had used {own.joules / 1e3:.1f} kJ "
                                     f"when it was stopped after {own.steps_done} steps.")
    if whole is not None and whole[0]["joules"].notna().all():
        rows, source = whole
        watts = float((rows["joules"].astype(float) / rows["seconds"].astype(float)).mean())
        ours, how = watts * _step_ms(rows) / 1e3 * steps, "idle power subtracted"
    elif found is not None and pd.notna(found[0].get("joules_per_megabyte")):
        ours = float(found[0]["joules_per_megabyte"]) * trained_bytes(FINAL.train) / 1e6
        source, how = found[1], "gross"
    elif own is not None:
        ours, how = own.watts * own.ms_per_step / 1e3 * steps, "idle power subtracted"
        source = Source(own, own.source, own.gpu)
    else:
        return lab.undecided("throughput", "It takes joules of the published scan at 16 x 1024 "
                             "from a GPU's counter (profile full)")
    verdict = HOLDS if low <= ours <= high else CAVEAT if ours <= 1.5 * high else FAILS
    return Finding(verdict, f"{ours / 1e3:.0f} kJ", f"At the power and the step that were read, "
                   f"{steps} steps take {ours / 1e3:.0f} kJ on {source.machine}, {how}.{beside}",
                   source.text)


@check
def training_is_cheap(lab: Lab, claim: Claim) -> Finding:
    """Joules of all 4000 steps as written over the baseline's whole run, on one machine."""
    whole, base, own = whole_run(lab), lab.task("modded_nanogpt"), first_run(lab)
    if whole is not None and base is not None and base.machine == whole[1].machine:
        rows, source = whole
        watts = float((rows["joules"].astype(float) / rows["seconds"].astype(float)).mean())
        ours = watts * _step_ms(rows) / 1e3 * FINAL.train.n_steps
        theirs, where = float(base.what["joules"].astype(float).mean()), source.text
    elif own is not None:
        ours, where = own.watts * own.ms_per_step / 1e3 * FINAL.train.n_steps, own.source
        theirs = min(float(r["joules"]) for r in lab.fact("leaderboard", "modded_nanogpt"))
    else:
        return lab.undecided("throughput", "It takes joules of both systems on one machine")
    verdict = HOLDS if ours < 0.5 * theirs else CAVEAT if ours < theirs else FAILS
    beside = "" if own is None else (
        f" The authors' own run had used {own.joules / 1e3:.1f} kJ after {own.steps_done} of them.")
    return Finding(verdict, f"{ours / theirs:.1f} x the baseline", f"All {FINAL.train.n_steps} "
                   f"steps as written would take {ours / 1e3:.0f} kJ, the baseline's whole run "
                   f"{theirs / 1e3:.1f} kJ.{beside} With a fused scan it is another matter: see "
                   "the task.", where)


@check
def overhead_cause(lab: Lab, claim: Claim) -> Finding:
    """How much of the overhead stays when the same tensors are made without slicing in a loop."""
    table = lab.table("throughput", "scan_time")
    if table is None:
        return lab.undecided("throughput", "It takes the published form, the same arithmetic cut "
                             "once, and the fused scan at one size")
    rows = table.what
    rows = rows[(rows["pass"] == "forward+backward") & (rows["batch"] == 1) & rows["ms"].notna()]
    wide = rows.pivot_table(index="length", columns="form", values="ms", aggfunc="first")
    forms = [PUBLISHED, "corrected_cumsum", "fused"]
    both = wide[forms].dropna().astype(float) if set(forms) <= set(wide.columns) else wide[:0]
    if both.empty:
        return lab.undecided("throughput", "The three forms have no length in common")
    length = int(both.index.max())
    published, cut_once, fused = (float(both.loc[length, f]) for f in forms)
    share = (cut_once - fused) / (published - fused)
    verdict = HOLDS if share > 0.9 else CAVEAT if share > 0.25 else FAILS
    return Finding(verdict, f"{share:.0%} of the overhead", f"At {length} bytes the published form "
                   f"takes {published:.0f} ms, the same tensors from a sequence that is cut once "
                   f"{cut_once:.0f} and the fused scan {fused:.1f}: materialising explains "
                   f"{share:.0%} of the overhead there, the gradients of slices the rest, and "
                   "their share grows with the length.", table.text)


@check
def energy_ranges_agree(lab: Lab, claim: Claim) -> Finding:
    low, high, other_low, other_high = claim.numbers
    verdict = HOLDS if (low, high) == (other_low, other_high) else INCONSISTENT
    return Finding(verdict, f"{low:.0f}-{high:.0f} and {other_low:.0f}-{other_high:.0f} kJ",
                   "The same paragraph opens with one range and closes with another; a third of "
                   f"the baseline's 47.3 kJ would be {47.285 / 3:.1f} kJ.",
                   "arithmetic on the stated numbers")


@check
def third_of_baseline(lab: Lab, claim: Claim) -> Finding:
    baseline, low, high = claim.numbers
    third = baseline / 3
    shares = low / baseline, high / baseline
    verdict = HOLDS if near(low, third, 0.2) and near(high, third, 0.2) else (
        INCONSISTENT if shares[1] > 0.5 else FAILS)
    return Finding(verdict, f"{shares[0]:.0%} to {shares[1]:.0%}", f"A third of {baseline:.0f} s "
                   f"is {third:.0f} s, but the wall-clock quoted, {low:.0f} to {high:.0f} s, is "
                   f"{shares[0]:.0%} to {shares[1]:.0%} of it.", "arithmetic on the stated numbers")


@check
def third_from_overhead(lab: Lab, claim: Claim) -> Finding:
    share, low, high = claim.numbers
    inside = share * low <= 1 / 3 <= share * high
    measured = _scan_ratio(lab)
    if measured is None:
        verdict, more, source = HOLDS if inside else FAILS, "", "arithmetic on the stated numbers"
    else:
        ratio, size, where = measured
        verdict = (HOLDS if low <= ratio <= high else CAVEAT) if inside else FAILS
        more, source = f"; the factor measured at {size} is {ratio:.0f}", where.text
    return Finding(verdict, f"{share * low:.0%} to {share * high:.0%}", f"{share:.0%} times "
                   f"{low:g} to {high:g} is {share * low:.0%} to {share * high:.0%}, if both use "
                   f"the card equally well{more}.", source)


@check
def third_of_energy(lab: Lab, claim: Claim) -> Finding:
    baseline, low, high = claim.numbers
    ours = baseline / 3
    verdict = HOLDS if low <= ours <= high else FAILS
    return Finding(verdict, f"{ours:.1f} kJ", f"A third of {baseline:.1f} kJ is {ours:.1f} kJ, in "
                   "the range, if the power drawn were "
                   "the same.", "arithmetic on the stated numbers")


def _elsewhere(lab: Lab, system: str) -> tuple[str | None, str, str]:
    """Our number of a system of the leaderboard on another machine: cell, sentence, source."""
    found = lab.task(system)
    if found is None or found.what["joules"].isna().any():
        return None, "", "not measured"
    joules, seconds = (float(found.what[c].astype(float).mean()) for c in ("joules", "seconds"))
    cell = f"{joules:,.0f} J, {seconds:.0f} s on {found.machine}"
    if "valid_accuracy" in found.what:
        cell += f", accuracy {float(found.what['valid_accuracy'].astype(float).mean()):.4f}"
    return cell, " Our implementation of that recipe, on another card and text.", found.text


@check
def baseline_power(lab: Lab, claim: Claim) -> Finding:
    joules, seconds = claim.range
    watts = joules / seconds
    plausible = 50 < watts < lab.fact("a100", "watts")
    runs = lab.fact("leaderboard", "modded_nanogpt")
    same = min(runs, key=lambda row: abs(row["seconds"] - seconds))
    agrees = near(float(same["joules"]), joules, 0.02)
    verdict = INCONSISTENT if not plausible else HOLDS if agrees else CAVEAT
    return Finding(verdict, f"{watts:.0f} W", f"{joules:,.0f} J in {seconds:.1f} s are {watts:.0f} "
                   f"W, {'possible' if plausible else 'impossible'} on an A100. The published run "
                   f"of about that time, {same['seconds']:.1f} s, took {same['joules']:,.0f} J.",
                   str(lab.fact("leaderboard", "source")))


@check
def leader_energy(lab: Lab, claim: Claim) -> Finding:
    cell, words, source = _elsewhere(lab, "nano_plus_ngram")
    return Finding(OPEN, cell, f"{claim.number:,.0f} J is a leaderboard's entry of which no log is "
                   f"published: it would take that system on that machine.{words}", source)


# ------------------------------------------------------------------------- the second document


@check
def loop_is_slow(lab: Lab, claim: Claim) -> Finding:
    ours = lab["mixers.loop"] / lab["mixers.attention"]
    verdict = HOLDS if ours > 3 else CAVEAT if ours > 1 else FAILS
    return Finding(verdict, f"{ours:.0f} x", f"One layer forward and backward, 256 tokens wide 128 "
                   f"on a CPU core: the loop over steps takes {ours:.0f} times as long as "
                   f"attention, the same layer with a fused scan "
                   f"{lab['mixers.auto'] / lab['mixers.attention']:.1f} times.")


@check
def fifty_times(lab: Lab, claim: Claim) -> Finding:
    found = lab.value("throughput", "loop_over_attention", accelerator=True)
    cpu = lab["mixers.loop"] / lab["mixers.attention"]
    if found is None:
        return lab.undecided("throughput", "The factor must be measured on a GPU (profile full)",
                             f"{cpu:.0f} x on this CPU")
    ratio = float(found.what)
    verdict = compare(ratio, claim.number, holds=0.3, caveat=1.0)
    return Finding(verdict, f"{ratio:.0f} x a layer", f"There the indexed loop alone takes "
                   f"{ratio:.0f} times a whole attention layer of the same width and length; in a "
                   "whole model the other parts dilute it, and longer sequences raise it.",
                   found.text)


@check
def scan_is_the_slow_path(lab: Lab, claim: Claim) -> Finding:
    share = 1 - lab["mixers.auto"] / lab["mixers.loop"]
    verdict = HOLDS if share > 0.5 else CAVEAT if share > 0.2 else FAILS
    return Finding(verdict, f"{share:.0%} of the layer", f"Replacing the loop by a fused scan "
                   f"takes away {share:.0%} of the layer's time, forward and backward, on a "
                   "CPU core.")


@check
def kernel_gain(lab: Lab, claim: Claim) -> Finding:
    stated, slow, attention = claim.numbers
    ours, other = (flops_per_byte(get_preset(name).model, 1024) for name in ("ssm_1", "attention"))
    bound = slow / (attention * ours / other)
    found = lab.value("throughput", "loop_over_fused", accelerator=True)
    measured = "" if found is None else (
        f" The fused scan alone is {float(found.what):.0f} times faster than the indexed loop.")
    verdict = compare(bound, stated, holds=0.1, caveat=0.5)
    return Finding(verdict, f"at most {bound:.0f} x", f"{slow:g} s over {attention:g} s is "
                   f"{slow / attention:.0f}. SSM-1 takes {ours / other:.2f} times the operations "
                   f"of the attention model, so with a kernel as efficient as attention's a step "
                   f"would be {bound:.0f} times faster, and the run that much "
                   f"longer.{measured}", "closed form (analysis.flops)" if found is None
                   else found.text)


@check
def kernel_feasible(lab: Lab, claim: Claim) -> Finding:
    written, exact, others = whole_run(lab), lab.task("mamba_byte"), fast_hybrids(lab)
    gain, cell, sources = 0.0, None, []
    reason = "A fused kernel against the scan in plain torch, in whole steps, was not measured"
    if written is not None and exact is not None:
        slow, fast = _step_ms(written[0]), _step_ms(exact.what)
        gain, cell = slow / fast, f"{slow:.0f} -> {fast:.1f} ms a step"
        reason = (f"For the first document's model a fused kernel in CUDA C++, with the step "
                  f"compiled and captured, brings a step from {slow:.0f} to {fast:.1f} ms")
        sources.append(exact.text)
    if others is not None:
        reason += f"; in the same competition {others[0]}"
        sources.append(others[1])
    if not sources:
        return lab.undecided("throughput", "It takes whole steps with the scan in plain torch and "
                             "with a fused one on a GPU")
    shown = others is not None and others[2]
    verdict = (HOLDS if shown else CAVEAT) if gain > 10 or shown else FAILS
    return Finding(verdict, cell, f"{reason}.", "; ".join(sources))
