"""Checks of what models learn: recorded comparisons, and small trainings done here."""

from __future__ import annotations

import math

import pandas as pd

from analysis.claims.cost import AS_WRITTEN, whole_run
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
    near,
)


@check
def fox_loss(lab: Lab, claim: Claim) -> Finding:
    start, end = claim.range
    first, last = lab["fox.first_loss"], lab["fox.last_loss"]
    steps, batch = lab["fox.steps_to_their_loss"], lab.settings.fox_batch
    begins = near(first, start, 0.03)
    verdict = HOLDS if begins and near(last, end, 0.15) else CAVEAT if last < end else FAILS
    return Finding(verdict, f"{first:.2f} -> {last:.2f}", "With the table's optimizer, batch "
                   f"{batch} and 48 bytes of context, 80 steps go from {first:.2f} to {last:.2f} "
                   f"and pass {end:.2f} at step {steps:.0f}: the fall is real, and theirs is slow. "
                   "Its batch, context and learning rate are not given.")


@check
def fox_accuracy(lab: Lab, claim: Claim) -> Finding:
    at_loss, end = lab["fox.accuracy_at_their_loss"], lab["fox.accuracy"]
    verdict = HOLDS if at_loss >= claim.number - 0.1 else CAVEAT if end >= claim.number else FAILS
    return Finding(verdict, f"{at_loss:.0%} at that loss", "A high accuracy at a high loss is "
                   "possible: near-uniform probabilities whose largest is right. When our loss "
                   f"passes 3.97 the greedy character is right {at_loss:.0%} of the time, after 80 "
                   f"steps {end:.0%}.")


def _task_accuracy(lab: Lab) -> tuple[float, str, Source] | None:
    """What the first document's system reaches, how, and where that was measured.

    A run as written that the clock stopped is judged by the same model with an exact fused scan,
    which has done all its steps.
    """
    whole = whole_run(lab)
    if whole is None or "valid_accuracy" not in whole[0]:
        return None
    rows, source = whole
    reached, steps = _mean(rows, "valid_accuracy"), _mean(rows, "steps")
    words = f"The system as written, given {_mean(rows, 'seconds'):.0f} s, reaches " \
            f"{reached:.3f} after {steps:,.0f} steps"
    exact = lab.task("mamba_byte")
    if exact is not None and "valid_accuracy" in exact.what:
        better = _mean(exact.what, "valid_accuracy")
        words += f"; with an exact fused scan and {_mean(exact.what, 'steps'):,.0f} steps it is " \
                 f"{better:.3f}"
        if better > reached and steps < _mean(exact.what, "steps"):
            reached, source = better, exact
    return reached, f"{words}. Trained on the text that the record names.", source


def _mean(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].dropna().astype(float).mean())


@check
def target_accuracy(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    found = _task_accuracy(lab)
    if found is None:
        small = lab.value("ablation", "ssm_char_accuracy")
        ours = f"{float(small.what):.3f} by study ablation's model" if small else None
        return lab.undecided("ablation", "It takes the document's whole run and 60,000 characters: "
                             f"`mambabyte task run {AS_WRITTEN}` on a GPU", ours)
    accuracy, words, source = found
    verdict = HOLDS if low <= accuracy <= high else CAVEAT if near(accuracy, low, 0.02) else FAILS
    return Finding(verdict, f"{accuracy:.3f}", words, source.text)


@check
def floor_risk(lab: Lab, claim: Claim) -> Finding:
    found = _task_accuracy(lab)
    if found is None:
        return lab.undecided("ablation", "It takes the accuracy of the document's whole run: "
                             f"`mambabyte task run {AS_WRITTEN}` on a GPU")
    accuracy, words, source = found
    below = accuracy <= claim.number
    where = "at or below" if below else "above"
    return Finding(HOLDS if below else CAVEAT, f"{accuracy:.3f}",
                   f"It lands {where} the floor of {claim.number:.2f}. {words}", source.text)


@check
def short_range(lab: Lab, claim: Claim) -> Finding:
    four, none = lab["counts.accuracy_4"], lab["counts.accuracy_0"]
    share = four / 0.70
    verdict = HOLDS if share > 0.9 else CAVEAT if share > 0.5 else FAILS
    return Finding(verdict, f"{four:.2f} from four bytes", f"Counting what followed the last four "
                   f"bytes predicts {four:.0%} of held-out prose greedily (no context: "
                   f"{none:.0%}), {share:.0%} of the 0.70 floor. Our prose is not the task's text.")


@check
def home_turf(lab: Lab, claim: Claim) -> Finding:
    ssm = lab.value("ablation", "ssm_char_accuracy")
    other = lab.value("ablation", "reference_char_accuracy")
    if ssm is None or other is None:
        return lab.undecided("ablation", "It takes accuracies at equal parameters and steps")
    gap = float(ssm.what) - float(other.what)
    verdict = HOLDS if gap < -0.01 else CAVEAT if gap < 0.01 else FAILS
    return Finding(verdict, f"{gap:+.3f}", f"At equal parameters and steps the SSM's greedy "
                   f"accuracy is {float(ssm.what):.3f}, attention's "
                   f"{float(other.what):.3f}.", ssm.text)


@check
def paper_reports(lab: Lab, claim: Claim) -> Finding:
    sets = lab.fact("mambabyte_paper", "datasets")
    verdict = HOLDS if any("enwik8" in s.lower() for s in sets) else FAILS
    return Finding(verdict, ", ".join(sets), f"The paper's tables are on {', '.join(sets)}, in "
                   "bits per byte: there is no enwik8 number in them to be competitive with.",
                   f"paper: {lab.fact('mambabyte_paper', 'source')}")


# ------------------------------------------------------------------------- the second document


@check
def signs_of_life(lab: Lab, claim: Claim) -> Finding:
    none, one = lab["counts.bits_0"], lab["counts.bits_1"]
    verdict = FAILS if claim.number >= none else CAVEAT if claim.number > one - 1.0 else HOLDS
    return Finding(verdict, f"{none:.2f} and {one:.2f} by counting", f"Byte counts alone give "
                   f"{none:.2f} bits a byte on held-out prose, counts after one byte {one:.2f}: "
                   f"{claim.number:.4f} is more than letter frequencies and little more than pairs "
                   "of bytes. The texts differ.")


@check
def five_steps(lab: Lab, claim: Claim) -> Finding:
    five, more, none = (lab["second_steps.bits_5"], lab["second_steps.bits_40"],
                        lab["counts.bits_0"])
    large = lab.value("ablation", "few_steps_best_bits")
    if large is not None:
        best = float(large.what)
        verdict = HOLDS if best <= claim.number * 1.1 else INCONSISTENT
        return Finding(verdict, f"{best:.2f} after 5 large steps", "With steps of the published "
                       "size, at full learning rate and on pieces, the best of their systems is at "
                       f"{best:.2f} bits a raw byte after five; a small hybrid here at {five:.2f}.",
                       large.text)
    verdict = HOLDS if five <= claim.number * 1.1 else INCONSISTENT
    return Finding(verdict, f"{five:.2f} after 5 steps, {more:.2f} after 40", f"A small hybrid "
                   f"with the document's choices is at {five:.2f} bits a byte after five steps "
                   f"(byte counts: {none:.2f}) and at {more:.2f} after 40. Five steps to "
                   f"{claim.number:.2f} is not believable; 200 steps may be.")


@check
def best_of_runs(lab: Lab, claim: Claim) -> Finding:
    ssm = lab.value("ablation", "hybrid_steps", accelerator=True)
    small = lab.value("ablation", "hybrid_steps")
    ours = f"{float(small.what):+.3f} bits against attention, small models" if small else None
    text = "Their 22 logs would show who is lowest"
    if ssm is not None:
        ours = f"{float(ssm.what):+.3f} bits against attention at equal steps"
    source = ssm or small
    return Finding(OPEN, ours, f"{text}; that they were run with one step count is not shown.",
                   source.text if source else "not measured")


@check
def quality_not_limit(lab: Lab, claim: Claim) -> Finding:
    steps, hybrid = lab.value("ablation", "ssm_steps"), lab.value("ablation", "hybrid_steps")
    if steps is None or hybrid is None:
        return lab.undecided("ablation", "It takes paired differences to attention at equal steps")
    best = min(float(steps.what), float(hybrid.what))
    verdict = HOLDS if best < -0.005 else CAVEAT if best < 0.03 else FAILS
    return Finding(verdict, f"SSM {float(steps.what):+.3f}, hybrid {float(hybrid.what):+.3f} bits",
                   f"At equal parameters and steps, where speed does not count, the SSM is "
                   f"{float(steps.what):+.3f} and the best hybrid {float(hybrid.what):+.3f} bits a "
                   "byte from attention.", steps.text)


@check
def competitive_if_fast(lab: Lab, claim: Claim) -> Finding:
    found = lab.value("ablation", "hybrid_wall_clock")
    steps = lab.value("ablation", "hybrid_steps")
    if found is None or steps is None:
        return lab.undecided("ablation", "It takes differences at equal wall-clock with a fused "
                             "scan")
    ours = float(found.what)
    verdict = HOLDS if ours <= 0 else CAVEAT if ours < 0.05 else FAILS
    return Finding(verdict, f"{ours:+.3f} bits at equal time", f"With a fused scan the best hybrid "
                   f"is {ours:+.3f} bits a byte from attention at equal wall-clock and "
                   f"{float(steps.what):+.3f} at equal steps.", found.text)


@check
def longer_training(lab: Lab, claim: Claim) -> Finding:
    five, more = lab["second_steps.bits_5"], lab["second_steps.bits_40"]
    gain = five - more
    verdict = HOLDS if gain > 0.1 else FAILS
    return Finding(verdict, f"{gain:.2f} bits from 5 to 40 steps", f"Eight times the steps take a "
                   f"small hybrid with the document's choices from {five:.2f} to {more:.2f} bits a "
                   "byte. So would any model that is still learning: it is no argument for SSMs.")


@check
def sharp_difference(lab: Lab, claim: Claim) -> Finding:
    first, second = claim.range
    gap = first - second
    verdict = INCONSISTENT if gap > 0.5 else HOLDS
    return Finding(verdict, f"{gap:.2f} bits apart", f"{first:.4f} in 180 s on one card and "
                   f"{second:.4f} after '5 effective steps' on a slower one differ by {gap:.2f} "
                   f"bits, a factor {math.exp2(gap):.1f} in probability per byte: the two runs "
                   "cannot have trained about equally long.", "arithmetic on the stated numbers")
