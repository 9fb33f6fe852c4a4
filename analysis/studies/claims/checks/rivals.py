"""Checks of SSMs and hybrids against attention and each other, at equal size and steps or time."""

from __future__ import annotations

from analysis.studies.claims.checks.published import fast_hybrids
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check
from analysis.studies.claims.recorded import (
    Scale,
    at_scale,
    count_of,
    joined,
    mean,
    one_job,
    second_widths,
)


def _whole_or_start(lab: Lab, column: str) -> list[Scale]:
    """A recipe close to the baseline's with SSM layers: all its steps, its first 500, if any."""
    found = at_scale(lab, column), at_scale(lab, column, ending="_500")
    return [scale for scale in found if scale is not None]


def _at_that_size(scales: list[Scale], column: str, unit: str) -> str:
    """Words on the differences that these runs show."""
    parts = [f"after {s.steps:,} steps the pure SSM is {s.gap('M', column):+.3f} and the 1:1 "
             f"hybrid {s.gap('MA', column):+.3f}{unit} from attention "
             f"({count_of(s.seeds('M', 'MA'), 'seed')})" for s in scales]
    return (f" By a recipe close to the baseline's, which was made for attention, at its size: "
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
        hybrids["a recipe close to the baseline's"] = scale.gap("MA", "valid_bits_per_byte")
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
    cost = (mean(whole.runs["MA"].what, "joules") / mean(whole.runs["A"].what, "joules")
            if one_job(*whole.runs.values()) else None)
    seeds = whole.seeds("MA")
    if gain >= -0.005:
        verdict = HOLDS if cost is not None and cost < 1.1 and seeds >= 3 else CAVEAT
    else:
        verdict = CAVEAT if gain > -0.02 and (cost is None or cost < 1) else FAILS
    energy = ("; their joules are of several commands" if cost is None
              else f", for {cost:.2f} times its joules")
    words, sources = "", whole.text
    if (own := second_widths(lab, "MA")) is not None:
        words = (f" At the document's own widths it is {sum(own[0]) / len(own[0]):+.3f} bits from "
                 f"attention at equal steps ({count_of(len(own[0]), 'seed')}).")
        sources += f"; {own[1].text}"
    if (others := fast_hybrids(lab)) is not None:
        words += f" In the second document's competition {others[0]}."
        sources += f"; {others[1]}"
    cell = f"{bits:+.3f} bits" + ("" if cost is None else f" at {cost:.2f} x the energy")
    return Finding(verdict, cell, f"With a fused scan "
                   f"and a recipe close to the baseline's, in {whole.steps:,} steps each, the 1:1 "
                   f"hybrid is {bits:+.3f} bits a byte and {gain:+.4f} in accuracy from attention"
                   f"{energy} ({count_of(seeds, 'seed')}).{words}", sources)


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
