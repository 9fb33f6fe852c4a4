"""Checks of whole runs: seconds and joules against what the documents expect."""

from __future__ import annotations

import pandas as pd

from analysis.studies.claims.checks.arithmetic import FINAL, trained_bytes
from analysis.studies.claims.checks.published import first_run
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    OPEN,
    Claim,
    Finding,
    check,
    near,
)
from analysis.studies.claims.recorded import (
    PUBLISHED,
    joined,
    one_job,
    scan_cost,
    step_ms,
    training_step,
    watts_of,
    whole_run,
)


def _pace(lab: Lab) -> tuple[float, str, Source] | None:
    """Milliseconds a step of the system as written, how that was found, and where."""
    whole, found, own = whole_run(lab), training_step(lab, "M", PUBLISHED), first_run(lab)
    beside = "" if own is None else (f"; the authors' own run took {own.ms_per_step:.0f} ms on an "
                                     f"{own.gpu}")
    if whole is not None:
        ms = step_ms(whole[0])
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
    whole, found, own = whole_run(lab), training_step(lab, "M", PUBLISHED), first_run(lab)
    steps = FINAL.train.n_steps
    beside = "" if own is None else (f" The authors' own run had used {own.joules / 1e3:.1f} kJ "
                                     f"when it was stopped after {own.steps_done} steps.")
    if whole is not None and whole[0]["joules"].notna().all():
        rows, source = whole
        seconds = step_ms(rows) / 1e3 * steps
        ours, how = watts_of(rows) * seconds, _idle(lab, source, watts_of(rows), seconds)
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


def _idle(lab: Lab, source: Source, watts: float, seconds: float) -> str:
    """What was subtracted for an idle card, and what another subtraction would give."""
    assumed = source.parameters.get("idle_watts")
    if assumed is None:
        return "idle power subtracted"
    words = f"an assumed {float(assumed):g} W of idle power subtracted"
    seen = lab.parameter("task", "idle_measured_watts")
    if seen is None:
        return words
    other = (watts + float(assumed) - float(seen.what)) * seconds / 1e3
    return f"{words} ({other:.0f} kJ with the {float(seen.what):g} W that an idle card drew)"


@check
def training_is_cheap(lab: Lab, claim: Claim) -> Finding:
    """Joules of all 4000 steps as written beside the baseline's whole run: a ratio only where both
    are of one job."""
    whole, base, own = whole_run(lab), lab.task("modded_nanogpt"), first_run(lab)
    together = whole is not None and one_job(whole[1], base)
    if whole is not None and base is not None and base.machine == whole[1].machine:
        rows, source = whole
        ours = watts_of(rows) * step_ms(rows) / 1e3 * FINAL.train.n_steps
        theirs, where = float(base.what["joules"].astype(float).mean()), joined(source, base)
    elif own is not None:
        ours, where = own.watts * own.ms_per_step / 1e3 * FINAL.train.n_steps, own.source
        theirs = min(float(r["joules"]) for r in lab.fact("leaderboard", "modded_nanogpt"))
    else:
        return lab.undecided("throughput", "It takes joules of both systems on one machine")
    verdict = HOLDS if ours < 0.5 * theirs else CAVEAT if ours < theirs else FAILS
    beside = "" if own is None else (
        f" The authors' own run had used {own.joules / 1e3:.1f} kJ after {own.steps_done} of them.")
    cell = (f"{ours / theirs:.1f} x the baseline" if together
            else f"{ours / 1e3:.0f} kJ and {theirs / 1e3:.1f} kJ, two jobs")
    return Finding(verdict, cell, f"All {FINAL.train.n_steps} "
                   f"steps as written would take {ours / 1e3:.0f} kJ, the baseline's whole run "
                   f"{theirs / 1e3:.1f} kJ.{beside} With a fused scan it is another matter: see "
                   "the task.", where)


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
    """All steps at the pace that was measured, on the authors' card where their log tells it, over
    the baseline's time; without any, whether the stated numbers agree."""
    share, baseline, low, high = claim.numbers
    third, shares = baseline * share, (low / baseline, high / baseline)
    own, found = first_run(lab), _pace(lab)
    stated = (f"{share:.0%} of {baseline:.0f} s is {third:.0f} s, and the wall-clock quoted is "
              f"{shares[0]:.0%} to {shares[1]:.0%} of it")
    if found is None:
        verdict = HOLDS if near(low, third, 0.2) and near(high, third, 0.2) else INCONSISTENT
        return Finding(verdict, f"{shares[0]:.0%} to {shares[1]:.0%}", f"By the numbers {stated}.",
                       "arithmetic on the stated numbers")
    ms, where, source = ((own.ms_per_step, own.gpu, own.source) if own is not None
                         else (found[0], found[2].machine, found[2].text))
    seconds = ms * FINAL.train.n_steps / 1e3
    ratio = seconds / baseline
    verdict = HOLDS if near(ratio, share, 0.25) else CAVEAT if ratio < 2 * share else FAILS
    return Finding(verdict, f"{ratio:.1f} times the baseline", f"At {ms:.0f} ms a step on an "
                   f"{where} {FINAL.train.n_steps} steps take {seconds:,.0f} s, {ratio:.1f} times "
                   f"the baseline's {baseline:.0f} s; by the numbers {stated}.", source)


@check
def third_from_overhead(lab: Lab, claim: Claim) -> Finding:
    share, low, high = claim.numbers
    inside = share * low <= 1 / 3 <= share * high
    cost = scan_cost(lab)
    if cost is None:
        verdict, more, source = HOLDS if inside else FAILS, "", "arithmetic on the stated numbers"
    else:
        verdict = (HOLDS if low <= cost.ratio <= high else CAVEAT) if inside else FAILS
        more, source = f"; the factor measured at {cost.size} is {cost.ratio:.0f}", cost.source
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
