"""Checks of what flows back across the chunks, and of what a wrong recurrence costs training."""

from __future__ import annotations

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


@check
def training_suffers(lab: Lab, claim: Claim) -> Finding:
    published, exact = lab["fox_published.last_loss"], lab["fox.last_loss"]
    gap = published - exact
    streamed = lab["fox_published.streamed_loss"] - lab["fox_published.parallel_loss"]
    verdict = HOLDS if gap > 0.05 else CAVEAT
    return Finding(verdict, f"{gap:+.4f} nats after 80 steps", "It does diverge from the "
                   f"recurrence, but training adapts to it: {gap:+.4f} nats against the exact scan "
                   f"after 80 steps. The cost appears when the trained weights are streamed by the "
                   f"exact step: {streamed:+.4f} nats.")


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
