"""Checks of what models learn: recorded comparisons, and small trainings done here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from analysis.studies.claims.checks.published import first_run
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.experiments.choices import PARTS, parts_table
from analysis.studies.claims.experiments.trainings import SECOND_STOPS
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
    AS_WRITTEN,
    count_of,
    joined,
    mean,
    repeated,
    second_widths,
    whole_run,
)


@check
def fox_loss(lab: Lab, claim: Claim) -> Finding:
    start, end = claim.range
    first, last = lab["fox.first_loss"], lab["fox.last_loss"]
    steps, batch = lab["fox.steps_to_their_loss"], lab.settings.fox_batch
    entropy, uniform = lab["fox_text.entropy"], lab["fox_text.uniform"]
    begins = near(first, start, 0.03)
    verdict = (HOLDS if begins and near(last, end, 0.15)
               else CAVEAT if begins and last < end else FAILS)
    return Finding(verdict, f"{first:.2f} -> {last:.2f}", "With the table's optimizer, batch "
                   f"{batch} and 48 bytes of context, 80 steps go from {first:.2f} to {last:.2f} "
                   f"and pass {end:.2f} at step {steps:.0f}: the fall is real, and theirs is slow. "
                   f"Knowing only which characters the string has costs {uniform:.2f} nats, and "
                   f"how often each comes {entropy:.2f}. Their batch, context and learning rate "
                   "are not given.")


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
    reached, steps = mean(rows, "valid_accuracy"), mean(rows, "steps")
    words = f"The system as written, given {mean(rows, 'seconds'):.0f} s, reaches " \
            f"{reached:.3f} after {steps:,.0f} steps"
    exact = lab.task("mamba_byte")
    if exact is not None and "valid_accuracy" in exact.what:
        better = mean(exact.what, "valid_accuracy")
        words += f"; with an exact fused scan and {mean(exact.what, 'steps'):,.0f} steps it is " \
                 f"{better:.3f}"
        if better > reached and steps < mean(exact.what, "steps"):
            reached, source = better, exact
    return reached, f"{words}. Trained on the text that the record names.", source


@check
def target_accuracy(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    found = _task_accuracy(lab)
    if found is None:
        small = lab.value("ablation", "ssm_char_accuracy", most="steps")
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
    own = first_run(lab)
    beside = "" if own is None or not own.disqualified else (
        f" The authors' own run was disqualified by the clock ({own.seconds:.0f} s), with its loss "
        "lost long before.")
    return Finding(HOLDS if below else CAVEAT, f"{accuracy:.3f}",
                   f"It lands {where} the floor of {claim.number:.2f}. {words}{beside}",
                   source.text)


@check
def short_range(lab: Lab, claim: Claim) -> Finding:
    four, none = lab["counts.accuracy_4"], lab["counts.accuracy_0"]
    share = four / 0.70
    verdict = HOLDS if share > 0.9 else CAVEAT if share > 0.5 else FAILS
    return Finding(verdict, f"{four:.2f} from four bytes", f"Counting what followed the last four "
                   f"bytes predicts {four:.0%} of held-out prose greedily (no context: "
                   f"{none:.0%}), {share:.0%} of the 0.70 floor. Our prose is not the task's text.")


@check
def tying_is_neutral(lab: Lab, claim: Claim) -> Finding:
    """By a recorded longer training where there is one; else only while it is not catching up."""
    recorded = lab.table("claims", "tied")
    early, late = lab["tying.early"], lab["tying.late"]
    first, last = lab.settings.tied_steps[0], lab.settings.tied_steps[-1]
    start = (f"Small models on one text: the tied one is {early:+.2f} bits a byte from one with a "
             f"head of its own ({lab['tying.head_parameters']:,.0f} parameters more) after "
             f"{first} steps and {late:+.2f} after {last}")
    if recorded is not None and int(recorded.what.iloc[-1]["steps"]) >= last:
        row = recorded.what.iloc[-1]
        end, steps = float(row["tied minus own, bits/byte"]), int(row["steps"])
        verdict = HOLDS if end <= 0.01 else CAVEAT if end <= 0.05 else FAILS
        return Finding(verdict, f"{end:+.3f} bits after {steps:,} steps", f"{start}; in a longer "
                       f"training {end:+.3f} after {steps:,}. "
                       f"{'Slow to start, then nearly level.' if verdict == CAVEAT else ''}",
                       recorded.text)
    if late <= 0.01:
        verdict = HOLDS
    else:  # behind: what is still catching up may end level
        verdict = OPEN if late < 0.9 * early else FAILS
    return Finding(verdict, f"{early:+.2f}, then {late:+.2f} bits", f"{start}. Where it ends takes "
                   "a whole training of both.")


@check
def tying_couples(lab: Lab, claim: Claim) -> Finding:
    share, cosine = lab["tying.smaller_share"], lab["tying.cosine"]
    verdict = HOLDS if share > 0.05 else CAVEAT if share > 0 else FAILS
    return Finding(verdict, f"{share:.0%} of the gradient", f"The tied matrix gets one gradient as "
                   f"an embedding and one as a head. At the start the smaller is {share:.0%} of "
                   f"the sum of their sizes, and their cosine is {cosine:.2f}: two tasks pull at "
                   "one matrix, in different directions.")


@check
def paper_reports(lab: Lab, claim: Claim) -> Finding:
    sets = lab.fact("mambabyte_paper", "datasets")
    verdict = HOLDS if any("enwik8" in s.lower() for s in sets) else FAILS
    return Finding(verdict, ", ".join(sets), f"The paper's tables are on {', '.join(sets)}, in "
                   "bits per byte: there is no enwik8 number in them to be competitive with.",
                   f"paper: {lab.fact('mambabyte_paper', 'source')}")


# ------------------------------------------------------------------------- the second document


@check
def gating_is_key(lab: Lab, claim: Claim) -> Finding:
    """Decided against where every seed loses less than half without selection of what it loses
    without another part; in favour where selection is what each seed owes most to."""
    found = repeated(lab, "parts", parts_table)
    lost = {part: found.column(f"without {part}, bits/byte") for part in PARTS}
    mine = lost.pop("selection")
    rows = list(zip(mine, *lost.values(), strict=True))
    if all(own > max(others) for own, *others in rows):
        verdict = HOLDS
    elif all(own < 0.5 * max(others) for own, *others in rows):
        verdict = FAILS if len(rows) >= 3 else OPEN
    else:
        verdict = CAVEAT
    shown = {part: f"{min(bits):+.3f} to {max(bits):+.3f}" if len(bits) > 1 else f"{bits[0]:+.3f}"
             for part, bits in (("selection", mine), *lost.items())}
    words = ", ".join(f"with fixed transitions {bits}" if part == "selection" else
                      f"without the {part} {bits}" for part, bits in shown.items())
    more = "" if verdict != OPEN else " One seed does not decide it."
    return Finding(verdict, f"{shown['selection']} bits", f"A small model after {found.steps:,} "
                   f"steps on text, {found.seeds}, bits a byte against the whole block: {words} "
                   f"(the gate goes with a third of the block's parameters).{more} On recall, at "
                   "the document's size or at equal parameters it may differ.", found.source)


@check
def signs_of_life(lab: Lab, claim: Claim) -> Finding:
    none, one = lab["counts.bits_0"], lab["counts.bits_1"]
    uniform = lab.value("ablation", "pieces_uniform_bits")
    small, steps = (lab.value("ablation", n) for n in ("pieces_ssm_bits", "pieces_steps"))
    unigram, bigram = (lab.value("ablation", f"pieces_{n}gram_bits") for n in ("uni", "bi"))
    # On pieces, as theirs, where that was counted; a byte says less than a piece of them.
    first, second = (none, one - 1.0) if unigram is None or bigram is None else (
        float(unigram.what), float(bigram.what))
    verdict = FAILS if claim.number >= first else CAVEAT if claim.number > second else HOLDS
    pieces = "" if uniform is None or small is None or steps is None else (
        f" On 1,024 pieces knowing nothing costs {float(uniform.what):.2f}, so it has learned "
        f"{float(uniform.what) - claim.number:.2f} bits; a small SSM of ours on pieces is at "
        f"{float(small.what):.2f} after {float(steps.what):.0f} steps.")
    if unigram is not None and bigram is not None:
        pieces += (f" Counting pieces costs {first:.3f} bits a raw byte, pairs of them "
                   f"{second:.3f}: it is {first - claim.number:.2f} better than knowing how often "
                   f"each piece comes and {claim.number - second:.2f} worse than knowing what "
                   "follows it.")
    if (log := lab.published("naive_baseline")) is not None:
        pieces += (f" The competition's own attention passes it between steps 10 "
                   f"({_logged(log, 10):.2f}) and 50 ({_logged(log, 50):.2f}).")
    counted = (f"{first:.2f} and {second:.2f} by counting pieces" if bigram is not None
               else f"{none:.2f} and {one:.2f} by counting")
    return Finding(verdict, counted, f"Byte counts alone give "
                   f"{none:.2f} bits a byte on held-out prose, counts after one byte {one:.2f}: "
                   f"{claim.number:.4f} is {none - claim.number:.2f} below letter frequencies and "
                   f"{one - claim.number:.2f} below pairs of bytes.{pieces} The texts differ.",
                   joined(small, unigram) or "computed here")


@check
def five_steps(lab: Lab, claim: Claim) -> Finding:
    five, more, none = (lab["second_steps.bits_5"], lab["second_steps.bits_40"],
                        lab["counts.bits_0"])
    log = lab.published("naive_baseline")
    beside = "" if log is None else (
        f" The competition's log of the script's attention alone, {log['tokens']:,} tokens a step, "
        f"is at {_logged(log, 5):.2f} bits a byte in step 5 and at {log['valid_bits'][0]} after "
        f"{log['valid_steps'][0]}.")
    large = lab.value("ablation", "few_steps_best_bits")
    tokens = lab.value("ablation", "few_steps_tokens")
    if large is not None and tokens is not None:
        best = float(large.what)
        verdict = HOLDS if best <= claim.number * 1.1 else INCONSISTENT
        return Finding(verdict, f"{best:.2f} after 5 steps", "With the choices that the record "
                       f"has, steps of {tokens.what:,} tokens, the full learning rate and pieces, "
                       f"the best of their systems is at {best:.2f} bits a raw byte after five; a "
                       f"small hybrid here at {five:.2f}.{beside}", large.text)
    verdict = HOLDS if five <= claim.number * 1.1 else INCONSISTENT
    return Finding(verdict, f"{five:.2f} after 5 steps, {more:.2f} after 40", f"A small hybrid "
                   f"with the document's choices is at {five:.2f} bits a byte after five steps "
                   f"(byte counts: {none:.2f}), at {more:.2f} after 40 and at "
                   f"{lab['second_steps.bits_250']:.2f} after 250. Five steps to "
                   f"{claim.number:.2f} is not believable; 200 large ones may be.{beside}")


def _logged(log: Mapping[str, Any], step: int) -> float:
    """Bits per byte of a training loss in the log, at the bytes a piece of its validation."""
    nats = dict(zip(log["train_steps"], log["train_nats"], strict=True))[step]
    return float(nats * log["valid_bits"][0] / log["valid_nats"][0])


@check
def best_of_runs(lab: Lab, claim: Claim) -> Finding:
    text = ("Their 22 logs would show who is lowest; that they were run with one step count is not "
            "shown")
    own = second_widths(lab, "MA")
    if own is not None:
        gaps, source = own
        ours = sum(gaps) / len(gaps)
        return Finding(OPEN, f"{ours:+.3f} bits against attention", f"{text}. At SSM-1's width, "
                       f"depth and ratio and equal parameters ours is {ours:+.3f} bits a byte from "
                       f"attention after {int(source.parameters['steps']):,} equal steps "
                       f"({count_of(len(gaps), 'seed')}).", source.text)
    small = lab.value("ablation", "hybrid_steps", most="steps")
    return Finding(OPEN, f"{float(small.what):+.3f} bits against attention, small models"
                   if small else None, f"{text}.", small.text if small else "not measured")


@check
def longer_training(lab: Lab, claim: Claim) -> Finding:
    """From 5 steps on: 8 times as many, or the factor that the claim gives (50)."""
    steps = round(5 * claim.number) if claim.numbers else 40
    if steps not in SECOND_STOPS:
        return Finding(OPEN, None, f"It would take {steps} steps; the small hybrid was looked at "
                       f"after {', '.join(map(str, SECOND_STOPS))}.", "not measured")
    five, more = lab["second_steps.bits_5"], lab[f"second_steps.bits_{steps}"]
    gain = five - more
    verdict = HOLDS if gain > 0.1 else FAILS
    return Finding(verdict, f"{gain:.2f} bits from 5 to {steps} steps", f"{steps // 5} times the "
                   f"steps take a small hybrid with the document's choices from {five:.2f} to "
                   f"{more:.2f} bits a byte. So would any model that is still learning: it is no "
                   "argument for SSMs.")


@check
def sharp_difference(lab: Lab, claim: Claim) -> Finding:
    first, second = claim.range
    gap = first - second
    verdict = INCONSISTENT if gap > 0.5 else HOLDS
    return Finding(verdict, f"{gap:.2f} bits apart", f"{first:.4f} in 180 s on one card and "
                   f"{second:.4f} after '5 effective steps' on a slower one differ by {gap:.2f} "
                   f"bits, a factor {math.exp2(gap):.1f} in probability per byte: the two runs "
                   "cannot have trained about equally long.", "arithmetic on the stated numbers")
