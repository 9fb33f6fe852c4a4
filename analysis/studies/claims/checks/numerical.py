"""Checks of initialisation, of the recurrence that is computed, and of where it overflows."""

from __future__ import annotations

import math
from collections.abc import Callable

from analysis.studies.claims.checks.published import FirstRun, first_run
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.experiments.scan import CHUNK
from analysis.studies.claims.experiments.streamed import COLUMNS, streamed_table
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    Claim,
    Finding,
    check,
    compare,
    sig,
)
from analysis.studies.claims.recorded import Repeated, joined, repeated
from mambabyte.config import PRESETS

MODEL = PRESETS["mamba_byte"].model
ROUNDING = 1e-4  # a relative difference that float32 arithmetic can explain, generously


# ------------------------------------------------------------------------------ the recurrence


@check
def naive_formula(lab: Lab, claim: Claim) -> Finding:
    wrong, early = lab["formula.whole_to_definition"], lab["formula.whole_to_early_decay"]
    verdict = HOLDS if wrong < ROUNDING else FAILS
    return Finding(verdict, f"{wrong:.0%} off in float64", "exp(cs_t - cs_{k-1}) decays input k by "
                   "its own step as well: the formula computes h_t = a_t (h_{t-1} + b_t), to "
                   f"{sig(early, 1)}, and is {wrong:.0%} away from h_t = a_t h_{{t-1}} + b_t.")


@check
def chunked_formula(lab: Lab, claim: Claim) -> Finding:
    ours = lab["formula.chunked_to_whole"]
    wrong = lab["formula.whole_to_definition"]
    verdict = HOLDS if max(wrong, ours) < ROUNDING else FAILS
    carry = "the carry is right" if ours < ROUNDING else "the carry is wrong"
    return Finding(verdict, f"{wrong:.0%} off in float64", "It is the scan of another recurrence, "
                   f"h_t = a_t (h_{{t-1}} + b_t), {wrong:.0%} from the model's: the document's "
                   "main error. Cutting into chunks and carrying the state changes that by "
                   f"{sig(ours, 1)}: {carry}.")


@check
def scan_against_step(lab: Lab, claim: Claim) -> Finding:
    ours = lab["scan_step.published_32"]
    verdict = HOLDS if ours <= claim.number else CAVEAT if ours < 5 * claim.number else FAILS
    return Finding(verdict, f"{ours:.2%} (probabilities {lab['scan_step.probability_32']:.2%})",
                   f"Logits of the untrained model differ by {ours:.2%} relative RMS at length 80, "
                   f"probabilities by {lab['scan_step.probability_32']:.2%}: of the size that is "
                   "reported. Weights, text and norm of the document are not known.")


@check
def rounding_explains(lab: Lab, claim: Claim) -> Finding:
    single, double = lab["scan_step.published_32"], lab["scan_step.published_64"]
    right = lab["scan_step.corrected_32"]
    verdict = HOLDS if double < 0.01 * single else FAILS
    return Finding(verdict, f"{double:.2%} in float64 too", f"The difference is {single:.2%} in "
                   f"float32 and {double:.2%} in float64; with the formula corrected float32 "
                   f"leaves {sig(right, 1)}. It is the formula.")


def streamed_loss(lab: Lab) -> Repeated:
    """Trained in parallel by the published scan and streamed by the step, seed by seed."""
    return repeated(lab, "streamed", streamed_table)


def lost_by_streaming(found: Repeated) -> tuple[list[float], list[float]]:
    """Bits per byte lost, and accuracy lost, when that model goes from its own scan to the step."""
    _, _, _, own, streamed, accuracy, later = COLUMNS
    bits = [b - a for a, b in zip(found.column(own), found.column(streamed), strict=True)]
    return bits, [a - b for a, b in zip(found.column(accuracy), found.column(later), strict=True)]


@check
def below_noise(lab: Lab, claim: Claim) -> Finding:
    """Below noise is what rounding leaves, or what no seed's held-out text shows."""
    found = streamed_loss(lab)
    bits, accuracy = lost_by_streaming(found)
    rounding = lab["scan_step.published_32"] / max(lab["scan_step.corrected_32"], 1e-12)
    mean = sum(bits) / len(bits)
    verdict = HOLDS if rounding < 10 else FAILS if mean > 0.01 else CAVEAT
    shown, share = ", ".join(f"{b:+.3f}" for b in bits), ", ".join(f"{a:.1%}" for a in accuracy)
    return Finding(verdict, f"{rounding:,.0f} x rounding; {mean:+.3f} bits",
                   f"It is {rounding:,.0f} times what rounding leaves. A small model trained with "
                   f"the published scan and streamed by the step, as the system is, loses {shown} "
                   f"bits a byte and {share} of accuracy after {found.steps:,} steps on text "
                   f"({found.seeds}).", found.source)


@check
def published_operations(lab: Lab, claim: Claim) -> Finding:
    calls, single = lab["operations.calls"], lab["operations.in_float32"]
    right = lab["operations.built_from_both"] and lab["operations.all_of_torch"]
    return Finding(HOLDS if right else FAILS, f"{calls:.0f} operations", "The scan runs on exp, "
                   f"cumsum and elementwise products: {calls:.0f} tensor operations for one layer "
                   f"at 1024 bytes, exp and cumsum in {'float32' if single else 'bfloat16'}.")


@check
def fuses(lab: Lab, claim: Claim) -> Finding:
    calls, single = lab["operations.calls"], lab["operations.in_float32"]
    moved = lab["operations.bytes_per_element"]
    verdict = FAILS if calls > 100 and single else CAVEAT if calls > 20 else HOLDS
    return Finding(verdict, f"{calls:.0f} launches, {moved:.0f} B an element", "Run as written "
                   f"nothing is fused: {calls:.0f} operations a layer and pass, which read and "
                   f"write {moved:.0f} bytes for every state element, and autocast leaves exp and "
                   f"cumsum in {'float32' if single else 'bfloat16'}. A compiler could do better; "
                   "none is mentioned.")


# ------------------------------------------------------------------------------------- overflow

# The first document's own model, but for the batch, which a record's parameters tell.
DOCUMENT = {"d_model": 192, "n_layer": 4, "context": 1024, "schedule_steps": 4000}


def _followed(lab: Lab) -> Callable[[str], Source | None]:
    """Values of study overflow by name: of a run of the document's own model if there is one."""
    own = lab.value("overflow", "highest_exponent", like=DOCUMENT) is not None
    return lambda name: lab.value("overflow", name, like=DOCUMENT if own else None)


def _lost(lab: Lab) -> FirstRun | None:
    """The authors' own run if its loss was lost, else None."""
    run = first_run(lab)
    return run if run is not None and math.isfinite(run.first_lost_step) else None


def _crossing(lab: Lab) -> str:
    """Words on the step from which the followed exponent is past float32, or none."""
    crossed = _followed(lab)("stable_crossed")
    return "" if crossed is None else f", and is past it from step {crossed.what:.0f}"


def _own_ending(lab: Lab) -> str:
    """Words on how training with the published form itself ended where it was followed, or none."""
    followed = _followed(lab)
    crossed, ending = followed("document_crossed"), followed("document_ending")
    if crossed is None or ending is None:
        return ""
    end = str(ending.what).split(",")[0]  # what was lost first follows the comma
    return (f" Trained with the published form itself it is past the bound at step "
            f"{crossed.what:.0f} and ends so: {end}.")


@check
def step_bound(lab: Lab, claim: Claim) -> Finding:
    start, trained = lab["initial.dt_high"], lab["fox_fast.dt_high"]
    verdict = HOLDS if max(start, trained) <= claim.number * 1.05 else FAILS
    return Finding(verdict, f"{start:.3f} at the start, {trained:.3f} after 80 fast steps",
                   "0.1 bounds softplus(bias) at initialisation only: with the projection added "
                   f"the largest step is {start:.3f} before training and {trained:.3f} after 80 "
                   "steps at learning rate 3e-3.")


@check
def comfortable_range(lab: Lab, claim: Claim) -> Finding:
    limit, start = lab["overflow.log_max"], lab["initial.exponent"]
    trained = max(lab["fox.exponent"], lab["fox_fast.exponent"])
    recorded = _followed(lab)("highest_exponent")
    worst = max(trained, float(recorded.what)) if recorded else trained
    verdict = FAILS if max(start, worst) >= limit else HOLDS if worst < limit / 2 else CAVEAT
    where = recorded.text if recorded else "computed here"
    return Finding(verdict, f"{start:.0f} of {limit:.0f}, then {worst:.0f}", "The exponent of the "
                   f"untrained model is {start:.1f}, where float32 ends at {limit:.1f}; in "
                   f"training it was seen at {worst:.1f}. Nothing but the weights "
                   "bounds it.", where)


@check
def chunks_do_not_overflow(lab: Lab, claim: Claim) -> Finding:
    limit, start = lab["overflow.log_max"], lab["initial.exponent"]
    margin = limit / start
    recorded, lost = _followed(lab)("highest_exponent"), _lost(lab)
    worst = float(recorded.what) if recorded else start
    verdict = FAILS if margin <= 1 or worst >= limit or lost else HOLDS if margin > 3 else CAVEAT
    trained = "" if recorded is None else (
        f" In training it is seen at {worst:.0f}{_crossing(lab)}.{_own_ending(lab)}")
    author = "" if lost is None else (
        f" The authors' own run is lost between steps {lost.last_finite_step:.0f} and "
        f"{lost.first_lost_step:.0f}.")
    later = "" if recorded is None else f", {limit / worst:.2f} x in training"
    return Finding(verdict, f"{margin:.2f} x at the start{later}", f"With chunks of 32 the largest "
                   f"exponent at the start is {start:.1f} of {limit:.1f}: step sizes {margin:.2f} "
                   f"times larger overflow.{trained}{author} The chunks postpone the overflow, "
                   "they do not exclude it.", recorded.text if recorded else
                   lost.source if lost else "computed here")


@check
def chunk_limit(lab: Lab, claim: Claim) -> Finding:
    """The longest chunk whose exponent float32 holds: of the model as it starts, in training, and
    at the step sizes that torch's own initialisation gives."""
    limit, start = lab["overflow.log_max"], lab["initial.exponent"]
    recorded = _followed(lab)("highest_exponent")
    first = int(CHUNK * limit / start)
    later = first if recorded is None else int(CHUNK * limit / float(recorded.what))
    at_torch = int(limit / (math.log(2) * MODEL.d_state)) + 1
    verdict = HOLDS if claim.number <= later else CAVEAT if claim.number <= first and (
        recorded is None) else FAILS
    trained = "" if recorded is None else f", {later} in training"
    return Finding(verdict, f"{first} at the start{trained}", f"The longest chunk in float32's "
                   f"range is {first} for the untrained model{trained}, and {at_torch} at the step "
                   "sizes near ln 2 that torch's default gives, as in the second document: a limit "
                   "of the weights, not of the length.",
                   recorded.text if recorded else "computed here")


@check
def bounded_inner(lab: Lab, claim: Claim) -> Finding:
    """Over a whole chunk: the exponent of the untrained model, of models in training, and the
    authors' own run."""
    fails_at, limit = lab["overflow.chunk_fails_at_decay"], lab["overflow.log_max"]
    start, recorded, lost = lab["initial.exponent"], _followed(lab)("highest_exponent"), _lost(lab)
    worst = max(start, float(recorded.what)) if recorded else start
    verdict = (HOLDS if math.isinf(fails_at) else FAILS if worst >= limit or lost else CAVEAT)
    author = "" if lost is None else (
        f" The authors' own run is nan by step {lost.first_lost_step:.0f}.")
    trained = "" if recorded is None else f" and {worst:.0f} in training{_crossing(lab)}"
    return Finding(verdict, f"{start:.0f}{'' if recorded is None else f', then {worst:.0f}'} of "
                   f"{limit:.0f}", "Nothing bounds it but the weights. A chunk of 32 stops being "
                   f"finite at a mean log-decay of {fails_at:.2f} a step, an exponent of "
                   f"{limit:.1f} in all; the untrained model's largest is {start:.1f}{trained}."
                   f"{author}", joined(recorded) + ("; " if recorded and lost else "")
                   + (lost.source if lost else "") or "computed here")


@check
def saturates(lab: Lab, claim: Claim) -> Finding:
    fails_at, zero_at = lab["overflow.chunk_fails_at_decay"], lab["overflow.exp_cs_zero_at_decay"]
    verdict = HOLDS if zero_at < fails_at else FAILS
    return Finding(verdict, f"inf at {fails_at:.2f} a step, exp(cs) = 0 at {zero_at:.2f}",
                   f"exp(-cs) overflows first: from a log-decay of {fails_at:.2f} a step the "
                   f"output is inf or nan, and exp(cs) reaches 0 only at {zero_at:.2f}. Loud, not "
                   "vanishing; and the length of the context does not enter, only the chunk's.")


@check
def benign(lab: Lab, claim: Claim) -> Finding:
    limit = lab["overflow.log_max"]
    followed = _followed(lab)
    recorded = followed("highest_exponent")
    fast = lab["fox_fast.exponent"]
    lost_run = _lost(lab)
    if lost_run is not None:
        ours = "" if recorded is None else (
            f" Ours, trained with a scan that does not mind, needs an exponent of "
            f"{float(recorded.what):.0f} where float32 ends at {limit:.1f}{_crossing(lab)}."
            f"{_own_ending(lab)}")
        return Finding(FAILS, f"nan by step {lost_run.first_lost_step:.0f}", "The authors' own run "
                       f"of this configuration has a finite loss at step "
                       f"{lost_run.last_finite_step:.0f} and nan at step "
                       f"{lost_run.first_lost_step:.0f} of 4000, and stays there.{ours}",
                       lost_run.source if recorded is None else
                       f"{lost_run.source}; {recorded.text}")
    whole = lab.task("mamba_byte_as_written")
    failures = whole.what.get("failure") if whole else None
    lost = [] if failures is None else failures.dropna().tolist()
    if whole is not None and lost:
        return Finding(FAILS, f"{len(lost)} of {len(whole.what)} runs lost", "The configuration "
                       f"trained with the published scan does not finish: {lost[0]}", whole.text)
    if recorded is None:
        verdict = FAILS if fast >= limit else CAVEAT
        return Finding(verdict, f"{fast:.0f} of {limit:.0f} after 80 fast steps", "In 80 steps at "
                       f"ten times the learning rate the exponent goes to {fast:.1f} of "
                       f"{limit:.1f}; the trajectory over 4000 steps is what study overflow "
                       "follows.")
    worst = float(recorded.what)
    end, crossed = followed("extrapolated_exponent"), followed("stable_crossed")
    last, steps = float(end.what) if end else worst, followed("trained_steps")
    # Of the published form itself where it was followed: its formula slows down what speeds up.
    own = followed("document_exponent")
    verdict = (FAILS if own and float(own.what) >= limit
               else CAVEAT if max(worst, last) > limit / 2 else HOLDS)
    reason = (f"Study overflow follows the exponent while a model trains with a scan that does not "
              f"mind it: it reaches {worst:.1f} of {limit:.1f}")
    if steps:
        reason += f" in {steps.what:.0f} steps"
    if end:
        reason += f", and by a line {last:.1f} at the end of the schedule"
    if crossed:
        reason += f"; it is first seen past the bound at step {crossed.what:.0f}"
    if own:
        reason += f"; trained with the published formula it reaches {float(own.what):.1f}"
    reason += (f".{_own_ending(lab)} Ten times the learning rate takes ours to {fast:.1f} in 80 "
               "steps.")
    return Finding(verdict, f"{worst:.0f} of {limit:.0f}", reason, recorded.text)


@check
def less_bulletproof(lab: Lab, claim: Claim) -> Finding:
    error, fails_at = lab["overflow.stable_error_there"], lab["overflow.chunk_fails_at_decay"]
    verdict = HOLDS if error < 1e-4 and math.isfinite(fails_at) else FAILS
    return Finding(verdict, sig(error, 1), f"Where the published chunk is lost (log-decay "
                   f"{fails_at:.2f} a step) a form without positive exponents is right to "
                   f"{sig(error, 1)}; fused kernels multiply decays step by step as well.")


# ------------------------------------------------------------------------------- initialisation


@check
def initial_loss(lab: Lab, claim: Claim) -> Finding:
    ours = lab["initial.loss"]
    verdict = compare(ours, claim.number, holds=0.01, caveat=0.03)
    return Finding(verdict, f"{ours:.2f}", f"Over {lab.settings.initial_seeds} seeds "
                   f"{lab['initial.loss_low']:.2f} to "
                   f"{lab['initial.loss_high']:.2f}; the logits are not quite zero, which costs "
                   f"{ours - math.log(256):+.3f} nats on ln 256.")


@check
def initial_losses_agree(lab: Lab, claim: Claim) -> Finding:
    low, high = lab["initial.loss_low"], lab["initial.loss_high"]
    spread = max(claim.numbers) - min(claim.numbers)
    inside = all(low - 0.03 <= n <= high + 0.03 for n in claim.numbers)
    run = first_run(lab)
    more = "" if run is None else f" The authors' own run begins at {run.first_loss:.4f}."
    return Finding(HOLDS if inside else INCONSISTENT, f"{low:.2f} to {high:.2f}", f"The three are "
                   f"{spread:.2f} apart; the seeds of this experiment lie between {low:.2f} and "
                   f"{high:.2f} on one text, and texts differ.{more}")


@check
def unit_embedding(lab: Lab, claim: Claim) -> Finding:
    ours = lab["initial.unit_loss"]
    return Finding(compare(ours, claim.number, holds=0.05, caveat=0.2), f"{ours:.0f}",
                   "With N(0, 1) the tied head gives the byte just read a logit near d_model = "
                   f"{MODEL.d_model}: the loss starts at {ours:.0f}.")


@check
def bias_range(lab: Lab, claim: Claim) -> Finding:
    low, high = lab["initial.bias_low"], lab["initial.bias_high"]
    inside = claim.range[0] * 0.99 <= low and high <= claim.range[1] * 1.01
    return Finding(HOLDS if inside else FAILS, f"[{sig(low)}, {sig(high)}]",
                   f"softplus(bias) of the initialised model lies in [{sig(low)}, {sig(high)}].")


@check
def bias_distribution(lab: Lab, claim: Claim) -> Finding:
    low, high = MODEL.dt_min, MODEL.dt_max
    uniform, logarithmic = (low + high) / 2, math.sqrt(low * high)
    coded = lab.published("first_code")
    draw = "unknown" if coded is None else str(coded["dt_draw"])
    below = math.log(0.01 / low) / math.log(high / low)  # share of log-uniform steps below 0.01
    verdict = {"uniform": HOLDS, "log-uniform": FAILS}.get(draw, CAVEAT)
    return Finding(verdict, f"{draw}, median {logarithmic if draw != 'uniform' else uniform:.2g}",
                   f"The published script draws {draw}, as Mamba's own code does; the paper's "
                   f"section says uniform. The median is {logarithmic:.4f} for one and "
                   f"{uniform:.4f} for the other (ours, log-uniform: "
                   f"{lab['initial.bias_median']:.4f}), and {below:.0%} of the channels start "
                   f"below 0.01 for one and {(0.01 - low) / (high - low):.0%} for the other.",
                   "computed here" if coded is None else str(coded["source"]))


@check
def decay_initialisation(lab: Lab, claim: Claim) -> Finding:
    right = lab["initial.A_is_range"] == 1.0
    verdict = CAVEAT if right else FAILS
    return Finding(verdict, f"-1 .. {lab['initial.A_low']:.0f}", "-(1..N) is S4D-Real, the "
                   "eigenvalues of the HiPPO-LegS matrix on a diagonal; S4's own initialisation is "
                   "that matrix in normal plus low-rank form, with complex eigenvalues.")
