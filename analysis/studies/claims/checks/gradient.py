"""Checks of what flows back across the chunks, and of what a wrong recurrence costs training."""

from __future__ import annotations

from analysis.studies.claims.checks.numerical import DOCUMENT, streamed_loss
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.experiments.streamed import COLUMNS
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check, sig

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
    found = (lab.table("overflow", "followed", like=DOCUMENT, most="batch")
             or lab.table("overflow", "followed"))
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
    """The whole system against an ideal selective scan: trained in parallel by the published scan
    and streamed by the step, less the same model trained and streamed by the exact one."""
    found = streamed_loss(lab)
    exact, own, streamed = (found.column(c) for c in COLUMNS[2:5])
    behind = [s - e for s, e in zip(streamed, exact, strict=True)]
    adapted = [o - e for o, e in zip(own, exact, strict=True)]
    mean = sum(behind) / len(behind)
    verdict = ((HOLDS if min(behind) > 0 else CAVEAT) if mean > 0.01
               else CAVEAT if mean > 0.005 else FAILS)
    text = _on_text(lab)
    words = "" if text is None else (
        f" (on the document's own model {text[0]:+.4f} nats to step {text[1]:,}, on the same "
        "batches)")
    def shown(bits: list[float]) -> str:
        return ", ".join(f"{b:+.3f}" for b in bits)
    return Finding(verdict, f"{mean:+.3f} bits", "It does diverge from the recurrence. Small "
                   f"models after {found.steps:,} steps on text ({found.seeds}): streamed by the "
                   f"step, as the system is, {shown(behind)} bits a byte behind an ideal scan; "
                   f"scored by its own scan {shown(adapted)}{words}: training adapts to the wrong "
                   "recurrence, and streaming has the right one.",
                   found.source if text is None else f"{found.source}; {text[2].text}")


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
    """Whether smoke mode prints the line, and whether it would catch a wrong scan."""
    steps, caught = lab["smoke.steps"], not lab["smoke.published_passes_check"]
    coded = lab.published("first_code")
    lines = None if coded is None else list(coded["smoke_prints"])
    printed = lines is None or any("SMOKE PASS" in line for line in lines)
    verdict = FAILS if not printed else CAVEAT if caught else HOLDS
    words = "" if lines is None or printed else (
        f"The published script never prints that line; smoke mode prints {' and '.join(lines)}. ")
    return Finding(verdict, "not printed" if not printed else f"{steps:.0f} steps", f"{words}"
                   f"{steps:.0f} steps show that it runs. Compared with the definition, the "
                   f"published scan {'fails' if caught else 'passes'} the same smoke "
                   "configuration.",
                   "computed here" if coded is None else str(coded["source"]))
