"""Checks of what flows back across the chunks, and of what a wrong recurrence costs training."""

from __future__ import annotations

from analysis.claims.evidence import Source
from analysis.claims.lab import Lab
from analysis.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check, sig

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
    """Loss with the published formula minus loss with the exact scan on the same batches of text,
    the mean of the last ten steps that study overflow recorded for both, and the last of them."""
    found = lab.table("overflow", "headroom")
    if found is None:
        return None
    rows = found.what
    wide = rows[rows["layer"] == rows["layer"].min()].pivot(
        index="step", columns="form", values="loss, nats")
    if not {"auto", "document_chunked"} <= set(wide.columns):
        return None
    both = wide[["auto", "document_chunked"]].dropna().astype(float).tail(10)
    if both.empty:
        return None
    gap = float((both["document_chunked"] - both["auto"]).mean())
    return gap, int(both.index.max()), found


@check
def training_suffers(lab: Lab, claim: Claim) -> Finding:
    gap = lab["fox_published.last_loss"] - lab["fox.last_loss"]
    streamed = lab["fox_published.streamed_loss"] - lab["fox_published.parallel_loss"]
    text = _on_text(lab)
    largest = gap if text is None else max(gap, text[0])
    verdict = HOLDS if largest > 0.05 else CAVEAT if text is None or largest > 0.005 else FAILS
    words = "" if text is None else f" and {text[0]:+.4f} on text, on the same batches to step " \
        f"{text[1]}"
    return Finding(verdict, f"{gap:+.4f} nats after 80 steps{'' if text is None else '; '}"
                   f"{'' if text is None else f'{text[0]:+.4f} on text'}", "It does diverge from "
                   f"the recurrence, but training adapts to it: {gap:+.4f} nats against the exact "
                   f"scan after 80 steps on one sentence{words}. What it costs is elsewhere: "
                   f"{streamed:+.4f} nats when the trained weights are streamed by the exact step.",
                   "computed here" if text is None else text[2].text)


@check
def sanity_discriminates(lab: Lab, claim: Claim) -> Finding:
    wrong, exact = lab["fox_published.last_loss"], lab["fox.last_loss"]
    both = lab["fox_published.accuracy"]
    verdict = FAILS if abs(wrong - exact) < 0.1 else HOLDS
    return Finding(verdict, f"{wrong:.2f} and {exact:.2f}", "A scan of another recurrence passes "
                   f"the same check: loss {wrong:.2f} against {exact:.2f} and accuracy "
                   f"{both:.0%}. It cannot tell a right scan from a wrong one.")


@check
def smoke_proves(lab: Lab, claim: Claim) -> Finding:
    steps, caught = lab["smoke.steps"], not lab["smoke.published_passes_check"]
    verdict = CAVEAT if caught else HOLDS
    return Finding(verdict, f"{steps:.0f} steps", f"{steps:.0f} steps show that it runs. Compared "
                   "with the definition, the published scan "
                   f"{'fails' if caught else 'passes'} the same smoke configuration.")
