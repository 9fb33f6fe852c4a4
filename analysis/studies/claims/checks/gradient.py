"""Checks of what flows back across the chunks, and of what a wrong recurrence costs training."""

from __future__ import annotations

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.checks.numerical import DOCUMENT
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, OPEN, Claim, Finding, check, sig

ROUNDING = 1e-4


@check
def gradient_flows(lab: Lab, claim: Claim) -> Finding:
    share = lab["gradient.document_chunked_nonzero_64"]
    off = lab["gradient.document_chunked_across_64"]
    verdict = HOLDS if share > 0.99 else CAVEAT if share > 0 else FAILS
    return Finding(verdict, f"{share:.0%} of entries", "The gradient of the third chunk's outputs "
                   f"with respect to the first chunk's inputs is not zero in {share:.0%} of the "
                   f"entries. (How right it is, is another row: {off:.1%} off.)")


@check
def gradient_matches(lab: Lab, claim: Claim) -> Finding:
    across, double = (lab[f"gradient.document_chunked_across_{b}"] for b in (32, 64))
    everything = lab["gradient.document_chunked_all_64"]
    right = lab["gradient.corrected_cumsum_across_32"]
    verdict = HOLDS if across < ROUNDING else FAILS
    return Finding(verdict, f"{double:.1%} across two boundaries, {everything:.0%} overall",
                   f"Against the recurrence in float64 the gradient across chunks is {across:.1%} "
                   f"off, all gradients together {everything:.0%}, and no less in float64: not the "
                   f"same mathematics. With the formula corrected it agrees to {sig(right, 1)}.")


def _on_text(lab: Lab) -> tuple[float, int, Source] | None:
    """Loss with the published formula minus loss with the exact scan on the same batches of text:
    the mean over the last quarter of the recorded steps, and the last of them. The untrained
    model's loss is not one of them."""
    found = (lab.table("overflow", "headroom", like=DOCUMENT, most="batch")
             or lab.table("overflow", "headroom"))
    if found is None:
        return None
    rows = found.what
    wide = rows[rows["layer"] == rows["layer"].min()].pivot(
        index="step", columns="form", values="loss, nats")
    if not {"auto", "document_chunked"} <= set(wide.columns):
        return None
    both = wide[["auto", "document_chunked"]].dropna().astype(float)
    both = both[both.index > 0.75 * both.index.max()] if len(both) else both
    if both.empty:
        return None
    gap = float((both["document_chunked"] - both["auto"]).mean())
    return gap, int(both.index.max()), found


@check
def training_suffers(lab: Lab, claim: Claim) -> Finding:
    """A loss is decided where it is seen; that there is none only over most of the schedule."""
    gap = lab["fox_published.last_loss"] - lab["fox.last_loss"]
    streamed = lab["fox_published.streamed_loss"] - lab["fox_published.parallel_loss"]
    text, schedule = _on_text(lab), FINAL.train.n_steps
    seen = 0 if text is None else text[1]
    largest = gap if text is None else max(gap, text[0])
    if largest > 0.05:
        verdict = HOLDS
    else:
        verdict = OPEN if seen < schedule / 2 else CAVEAT if largest > 0.005 else FAILS
    words = "" if text is None else f" and {text[0]:+.4f} on text, on the same batches to step " \
        f"{seen:,}"
    more = "" if verdict != OPEN else (
        f" Whether it stays so takes both trained over the {schedule:,} steps of the schedule: the "
        "published recurrence is the exact scan of inputs that are decayed once more, and as such "
        "cannot overflow.")
    return Finding(verdict, f"{gap:+.4f} nats after 80 steps{'' if text is None else '; '}"
                   f"{'' if text is None else f'{text[0]:+.4f} on text'}", "It does diverge from "
                   f"the recurrence; in what was seen training adapts to it: {gap:+.4f} nats "
                   f"against the exact scan after 80 steps on one sentence{words}. Streamed by the "
                   f"exact step the trained weights lose {streamed:+.4f} nats.{more}",
                   "computed here" if text is None else text[2].text)


@check
def sanity_discriminates(lab: Lab, claim: Claim) -> Finding:
    """Whether the check fails with another recurrence, and with no scan at all."""
    exact, wrong, none = (lab[f"{n}.last_loss"] for n in ("fox", "fox_published", "fox_no_scan"))
    sees_wrong, sees_none = (abs(loss - exact) >= 0.1 for loss in (wrong, none))
    verdict = HOLDS if sees_wrong and sees_none else CAVEAT if sees_none else FAILS
    one, two = lab["fox_text.accuracy_1"], lab["fox_text.accuracy_2"]
    return Finding(verdict, f"{exact:.2f}, {wrong:.2f} and {none:.2f}", f"The loss ends at "
                   f"{exact:.2f}, with a scan of another recurrence at {wrong:.2f} and with none "
                   f"(y = D x) at {none:.2f}; the accuracy at {lab['fox.accuracy']:.0%}, "
                   f"{lab['fox_published.accuracy']:.0%} and {lab['fox_no_scan.accuracy']:.0%}. "
                   f"On this string the byte before names {one:.0%} of the next ones and two "
                   f"{two:.0%}, which a convolution over four sees without a state.")


@check
def smoke_proves(lab: Lab, claim: Claim) -> Finding:
    steps, caught = lab["smoke.steps"], not lab["smoke.published_passes_check"]
    verdict = CAVEAT if caught else HOLDS
    return Finding(verdict, f"{steps:.0f} steps", f"{steps:.0f} steps show that it runs. Compared "
                   "with the definition, the published scan "
                   f"{'fails' if caught else 'passes'} the same smoke configuration.")
