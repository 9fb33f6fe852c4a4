"""Checks of what models learn: recorded comparisons, and small trainings done here."""

from __future__ import annotations

import math

from analysis.claims.choices import STEPS as CHOICE_STEPS
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
from analysis.claims.published import fast_hybrids, first_run
from analysis.claims.recorded import (
    AS_WRITTEN,
    Scale,
    at_scale,
    count_of,
    joined,
    mean,
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
    verdict = HOLDS if begins and near(last, end, 0.15) else CAVEAT if last < end else FAILS
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


def _whole_or_start(lab: Lab, column: str) -> list[Scale]:
    """The baseline's recipe with SSM layers: all of its steps, and its first 500; what there is."""
    found = at_scale(lab, column), at_scale(lab, column, ending="_500")
    return [scale for scale in found if scale is not None]


def _at_that_size(scales: list[Scale], column: str, unit: str) -> str:
    """Words on the differences that these runs show."""
    parts = [f"after {s.steps:,} steps the pure SSM is {s.gap('M', column):+.3f} and the 1:1 "
             f"hybrid {s.gap('MA', column):+.3f}{unit} from attention "
             f"({count_of(s.seeds('M', 'MA'), 'seed')})" for s in scales]
    return (f" By the baseline's recipe, which was made for attention, at its size: "
            f"{'; '.join(parts)}." if parts else "")


@check
def home_turf(lab: Lab, claim: Claim) -> Finding:
    """Greedy characters, which weigh what is near; what repeats is another row."""
    ssm = lab.value("ablation", "ssm_char_accuracy", most="steps")
    attention = lab.value("ablation", "reference_char_accuracy", most="steps")
    if ssm is None or attention is None:
        return lab.undecided("ablation", "It takes greedy character accuracy of both at equal "
                             "parameters and steps")
    a, b = float(ssm.what), float(attention.what)
    scales = _whole_or_start(lab, "valid_accuracy")
    gaps = [a - b, *(s.gap("M", "valid_accuracy") for s in scales[:1])]
    verdict = HOLDS if max(gaps) < -0.005 else FAILS if min(gaps) > 0.005 else CAVEAT
    return Finding(verdict, " and ".join(f"{gap:+.3f}" for gap in gaps), f"At equal parameters and "
                   f"steps the small SSM's greedy accuracy is {a:.3f} and attention's {b:.3f}."
                   f"{_at_that_size(scales, 'valid_accuracy', '')} The metric is the task's own, "
                   "greedy characters.",
                   joined(ssm, attention) + "".join(f"; {s.text}" for s in scales))


@check
def repetition(lab: Lab, claim: Claim) -> Finding:
    """Copying a string, the hardest that was tried."""
    found = {n: lab.value("ablation", f"copy_{n}", most="task_symbols")
             for n in ("attention", "ssm", "hybrid", "size", "chance")}
    attention, ssm, hybrid, size, chance = found.values()
    if attention is None or ssm is None or size is None or chance is None:
        return lab.undecided("ablation", "It takes a string to be copied, by both")
    gap = float(attention.what) - float(ssm.what)
    verdict = HOLDS if gap > 0.05 else FAILS if gap < -0.05 else CAVEAT
    beside = "" if hybrid is None else f", a hybrid in {float(hybrid.what):.2f}"
    return Finding(verdict, f"{float(attention.what):.2f} against {float(ssm.what):.2f}",
                   f"Copying {float(size.what):.0f} symbols, small models of one size name the "
                   f"right one in {float(attention.what):.2f} of the places with attention and in "
                   f"{float(ssm.what):.2f} with a pure SSM{beside} (chance "
                   f"{float(chance.what):.2f}).", joined(attention, ssm))


@check
def tying_is_neutral(lab: Lab, claim: Claim) -> Finding:
    """By a recorded longer training where there is one; else only while it is not catching up."""
    recorded = lab.table("claims", "tied")
    early, late = lab["tying.early"], lab["tying.late"]
    first, last = lab.settings.tied_steps[0], lab.settings.tied_steps[-1]
    start = (f"Small models on one text: the tied one is {early:+.2f} bits a byte from one with a "
             f"head of its own ({lab['tying.head_parameters']:,.0f} parameters more) after "
             f"{first} steps and {late:+.2f} after {last}")
    if recorded is not None:
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
    lost = {part: lab[f"gating.without_{part}"] for part in ("selection", "gate", "convolution")}
    most = max(lost, key=lambda part: lost[part])
    if most == "selection":
        verdict = HOLDS
    elif lost["selection"] <= 0:
        verdict = FAILS
    else:  # it helps; what it would be worth later, or where something must be recalled, is open
        verdict = OPEN if lost["selection"] < 0.5 * lost[most] else CAVEAT
    words = ", ".join(f"without the {part} {bits:+.3f}" if part != "selection" else
                      f"with fixed transitions {bits:+.3f}" for part, bits in lost.items())
    return Finding(verdict, f"{lost['selection']:+.3f} bits", f"A small model after "
                   f"{CHOICE_STEPS} steps on text, one seed, bits a byte against the whole block: "
                   f"{words} (the gate goes with a third of the block's parameters). What it owes "
                   f"most to there is its {most}. To decide takes the same at the document's size "
                   "and length, with equal parameters and several seeds, on text and on recall.")


@check
def signs_of_life(lab: Lab, claim: Claim) -> Finding:
    none, one = lab["counts.bits_0"], lab["counts.bits_1"]
    uniform = lab.value("ablation", "pieces_uniform_bits")
    small, steps = (lab.value("ablation", n) for n in ("pieces_ssm_bits", "pieces_steps"))
    verdict = FAILS if claim.number >= none else CAVEAT if claim.number > one - 1.0 else HOLDS
    pieces = "" if uniform is None or small is None or steps is None else (
        f" On 1,024 pieces knowing nothing costs {float(uniform.what):.2f}, so it has learned "
        f"{float(uniform.what) - claim.number:.2f} bits; a small SSM of ours on pieces is at "
        f"{float(small.what):.2f} after {float(steps.what):.0f} steps on a CPU.")
    return Finding(verdict, f"{none:.2f} and {one:.2f} by counting", f"Byte counts alone give "
                   f"{none:.2f} bits a byte on held-out prose, counts after one byte {one:.2f}: "
                   f"{claim.number:.4f} is {none - claim.number:.2f} below letter frequencies and "
                   f"{one - claim.number:.2f} below pairs of bytes.{pieces} The texts differ.",
                   "computed here" if small is None else small.text)


@check
def five_steps(lab: Lab, claim: Claim) -> Finding:
    five, more, none = (lab["second_steps.bits_5"], lab["second_steps.bits_40"],
                        lab["counts.bits_0"])
    large = lab.value("ablation", "few_steps_best_bits")
    tokens = lab.value("ablation", "few_steps_tokens")
    if large is not None and tokens is not None:
        best = float(large.what)
        verdict = HOLDS if best <= claim.number * 1.1 else INCONSISTENT
        return Finding(verdict, f"{best:.2f} after 5 steps", "With all of their choices, steps of "
                       f"{tokens.what:,} tokens, the full learning rate and pieces, the best of "
                       f"their systems is at {best:.2f} bits a raw byte after five; a small hybrid "
                       f"here at {five:.2f}.", large.text)
    verdict = HOLDS if five <= claim.number * 1.1 else INCONSISTENT
    return Finding(verdict, f"{five:.2f} after 5 steps, {more:.2f} after 40", f"A small hybrid "
                   f"with the document's choices is at {five:.2f} bits a byte after five steps "
                   f"(byte counts: {none:.2f}), at {more:.2f} after 40 and at "
                   f"{lab['second_steps.bits_250']:.2f} after 250. Five steps to "
                   f"{claim.number:.2f} is not believable; 200 large ones may be.")


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
def quality_not_limit(lab: Lab, claim: Claim) -> Finding:
    """At equal steps, where speed does not count: small models, the document's own widths, and the
    baseline's recipe. The document's systems are hybrids; a pure SSM is a caveat."""
    steps = lab.value("ablation", "ssm_steps", most="steps")
    hybrid = lab.value("ablation", "hybrid_steps", most="steps")
    if steps is None or hybrid is None:
        return lab.undecided("ablation", "It takes paired differences to attention at equal steps")
    hybrids, pure = {"small": float(hybrid.what)}, [float(steps.what)]
    words, sources = "", joined(steps, hybrid)
    if (own := second_widths(lab, "MA")) is not None:
        hybrids["its own widths"] = sum(own[0]) / len(own[0])
        words = (f" At the document's own widths SSM-1 is {hybrids['its own widths']:+.3f} after "
                 f"{int(own[1].parameters['steps']):,} steps ({count_of(len(own[0]), 'seed')}).")
        sources += f"; {own[1].text}"
    scales = _whole_or_start(lab, "valid_bits_per_byte")
    for scale in scales[:1]:
        hybrids["the baseline's recipe"] = scale.gap("MA", "valid_bits_per_byte")
        pure.append(scale.gap("M", "valid_bits_per_byte"))
    sources += "".join(f"; {s.text}" for s in scales)
    verdict = (HOLDS if max(*hybrids.values(), *pure) < -0.005
               else FAILS if min(hybrids.values()) > 0.03 else CAVEAT)
    return Finding(verdict, ", ".join(f"{gap:+.3f} bits ({name})" for name, gap in hybrids.items()),
                   f"At equal parameters and steps, where speed does not count, the small SSM is "
                   f"{pure[0]:+.3f} and the best hybrid {hybrids['small']:+.3f} bits a byte from "
                   f"attention.{words}{_at_that_size(scales, 'valid_bits_per_byte', ' bits')}",
                   sources)


@check
def competitive_if_fast(lab: Lab, claim: Claim) -> Finding:
    """The 1:1 hybrid against attention by one recipe under the task's rules, with a fused scan;
    else at equal wall-clock in study ablation."""
    whole = at_scale(lab, "valid_accuracy", "valid_bits_per_byte", "joules")
    if whole is not None:
        return _by_one_recipe(lab, whole)
    found = lab.value("ablation", "hybrid_wall_clock", most="steps")
    steps = lab.value("ablation", "hybrid_steps", most="steps")
    if found is None or steps is None:
        return lab.undecided("ablation", "It takes differences at equal wall-clock with a fused "
                             "scan")
    gap = float(found.what)
    verdict = HOLDS if gap <= 0 else CAVEAT if gap < 0.05 else FAILS
    return Finding(verdict, f"{gap:+.3f} bits at equal time", f"With a fused scan the best hybrid "
                   f"is {gap:+.3f} bits a byte from attention at equal wall-clock and "
                   f"{float(steps.what):+.3f} at equal steps.", found.text)


def _by_one_recipe(lab: Lab, whole: Scale) -> Finding:
    gain, bits = (whole.gap("MA", c) for c in ("valid_accuracy", "valid_bits_per_byte"))
    cost = mean(whole.runs["MA"].what, "joules") / mean(whole.runs["A"].what, "joules")
    seeds = whole.seeds("MA")
    if gain >= -0.005:
        verdict = HOLDS if cost < 1.1 and seeds >= 3 else CAVEAT
    else:
        verdict = CAVEAT if gain > -0.02 and cost < 1 else FAILS
    words, sources = "", whole.text
    if (own := second_widths(lab, "MA")) is not None:
        words = (f" At the document's own widths it is {sum(own[0]) / len(own[0]):+.3f} bits from "
                 f"attention at equal steps ({count_of(len(own[0]), 'seed')}).")
        sources += f"; {own[1].text}"
    if (others := fast_hybrids(lab)) is not None:
        words += f" In the second document's competition {others[0]}."
        sources += f"; {others[1]}"
    return Finding(verdict, f"{bits:+.3f} bits at {cost:.2f} x the energy", f"With a fused scan "
                   f"and the baseline's recipe, in {whole.steps:,} steps each, the 1:1 hybrid is "
                   f"{bits:+.3f} bits a byte and {gain:+.4f} in accuracy from attention, for "
                   f"{cost:.2f} times its joules ({count_of(seeds, 'seed')}).{words}", sources)


@check
def ratio_again(lab: Lab, claim: Claim) -> Finding:
    """3:1 against 1:1 at equal parameters and steps, seed by seed."""
    found = second_widths(lab, "MMMA", "MA")
    if found is None:
        return lab.undecided("ablation", "It takes 3:1 and 1:1 at equal parameters and steps")
    gaps, source = found
    gain = sum(gaps) / len(gaps)
    verdict = FAILS if gain >= 0 else HOLDS if max(gaps) < -0.05 else CAVEAT
    shown = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return Finding(verdict, f"{gain:+.3f} bits", f"At equal parameters and steps 3:1 is "
                   f"{gain:+.3f} bits a byte from 1:1 at the document's width and depth (by seed "
                   f"{shown}). Its own runs cannot say so: the ablations of other ratios than 1:1 "
                   "crashed.", source.text)


@check
def longer_training(lab: Lab, claim: Claim) -> Finding:
    """From 5 steps on: 8 times as many, or the factor that the claim gives (50)."""
    steps = 5 * int(claim.number) if claim.numbers else 40
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
