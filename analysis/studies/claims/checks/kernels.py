"""Checks of the scan against fused kernels and attention: factors, their causes, context length."""

from __future__ import annotations

import pandas as pd

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.checks.hybrid import layers
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check, near, sig
from analysis.studies.claims.recorded import (
    BOTH,
    PUBLISHED,
    SIZE,
    compiled_steps,
    half_depth_ratios,
    joined,
    kernel_times,
    one_job,
    scan_cost,
    scan_times,
    training_step,
)

# ------------------------------------------------------------------------ against a fused kernel


@check
def slower_than_fused(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    paper = lab.published("mamba_paper")
    beside = "" if paper is None else (
        f" The Mamba paper itself gives {paper['scan_speedup'][0]} to {paper['scan_speedup'][1]} "
        f"times over {paper['scan_speedup_of']}.")
    cost = scan_cost(lab)
    if cost is None:
        found = lab.undecided("throughput", "The factor must be measured on a GPU (profile full)",
                              f"{lab['mixers.published'] / lab['mixers.auto']:.0f} x on this CPU")
        return Finding(found.verdict, found.ours, found.reason + beside, found.source)
    verdict = HOLDS if low <= cost.ratio <= high else CAVEAT if cost.ratio <= 1.5 * high else FAILS
    return Finding(verdict, f"{cost.ratio:.0f} x at {cost.size}", f"{cost.words}. Not an A100, but "
                   f"no device turns one into the other.{beside}", cost.source)


@check
def overhead_cause(lab: Lab, claim: Claim) -> Finding:
    """How much of the overhead stays when the same tensors are made without slicing in a loop: by
    time where an accelerator has timed the forms, else by the bytes that they read and write."""
    published, cut_once = (lab[f"operations.bytes_{n}"] for n in ("published", "cut_once"))
    share, source = cut_once / published, "computed here"
    words = (f"Forward and backward over {SIZE[1]} bytes the published form reads and writes "
             f"{published:,.0f} bytes a state element, the same tensors from a sequence that is "
             f"cut once {cut_once:,.0f}")
    timed = scan_times(lab, PUBLISHED, "corrected_cumsum", "fused")
    if timed is not None:
        ms, size, found = timed
        share = float((ms["corrected_cumsum"] - ms["fused"]) / (ms[PUBLISHED] - ms["fused"]))
        words += (f"; timed at {size}, {ms[PUBLISHED]:.1f} and {ms['corrected_cumsum']:.1f} ms, "
                  f"{ms['fused']:.2f} with the fused scan")
        source = found.text
    verdict = HOLDS if share > 0.9 else CAVEAT if share > 0.5 else FAILS
    most = "" if timed is not None else "at most "
    return Finding(verdict, f"{most}{share:.0%} of the overhead", f"{words}: materialising is "
                   f"{most}{share:.0%} of the overhead, the full-length gradients of slices are "
                   "the rest, and their share grows with the length.", source)


@check
def bandwidth_bound(lab: Lab, claim: Claim) -> Finding:
    """By operations a byte; and by a recorded step where the machine's bandwidth is known too."""
    moved = lab["operations.bytes_per_element"]
    intensity = 6 / moved
    balance = lab.fact("a100", "fp32_tflops") * 1e12 / (lab.fact("a100", "bandwidth_gb_s") * 1e9)
    verdict = HOLDS if intensity < 0.2 * balance else CAVEAT if intensity < balance else FAILS
    words, source = "", "computed here; data sheet of the A100"
    recorded = _copying(lab)
    if recorded is not None:
        explained, measured, where = recorded
        share = explained / measured
        verdict = FAILS if verdict == FAILS or share < 0.25 else (
            verdict if share > 0.5 else CAVEAT)
        words = (f" On a GPU that was measured the bytes of its scans, forward and backward, take "
                 f"{explained:.0f} ms at the speed of copying, of {measured:.0f} ms that they add "
                 f"to a captured step: {share:.0%}.")
        source = f"{where}; data sheet of the A100"
    return Finding(verdict, f"{sig(intensity, 2)} operations a byte", f"Some 6 operations and one "
                   f"exponential for {moved:.0f} bytes moved are {sig(intensity, 2)} operations a "
                   f"byte, where an A100 needs {balance:.0f} to be bound by arithmetic.{words} "
                   "Short chunks add the time of their launches.", source)


def _copying(lab: Lab) -> tuple[float, float, str] | None:
    """Milliseconds that the bytes of a step's published scans take at the speed of copying, and
    those that the scans add to a captured step on the same machine."""
    written, fused = training_step(lab, "M", PUBLISHED), training_step(lab, "M", "auto")
    bench = lab.table("throughput", "bench", accelerator=True)
    speed = None if bench is None else bench.parameters.get("copy_bytes_per_second")
    if (written is None or fused is None or bench is None or not speed
            or bench.machine != written[1].machine):
        return None
    model = FINAL.model
    elements = SIZE[0] * SIZE[1] * model.d_inner * model.d_state * model.n_layer
    explained = 1e3 * lab["operations.bytes_published"] * elements / float(speed)
    return explained, float(written[0]["ms"] - fused[0]["ms"]), joined(written[1], bench)


# ------------------------------------------------------------------------------ against attention


def _kernel_ratios(lab: Lab) -> tuple[dict[str, float], Source] | None:
    """Attention's kernel time over mamba-ssm's, forward and backward, by size."""
    found = kernel_times(lab)
    if found is None or not {"sdpa", "mamba_ssm"} <= set(found[0].columns):
        return None
    both = found[0][["sdpa", "mamba_ssm"]].dropna()
    ratios = {str(size): float(row["sdpa"] / row["mamba_ssm"]) for size, row in both.iterrows()}
    return (ratios, found[1]) if ratios else None


def _own_size(ratios: dict[str, float]) -> float | None:
    return ratios.get(f"{SIZE[0]} x {SIZE[1]} x {FINAL.model.d_inner}")


@check
def five_times_attention(lab: Lab, claim: Claim) -> Finding:
    """By whole compiled steps where there are any, else by the kernels alone: at the document's
    own size, with the rest beside it."""
    paper = f"The paper's factor 5 is for {lab.fact('mamba_paper', 'speedup_of')}."
    steps = {n: attention / ssm for n, (ssm, attention, _) in compiled_steps(lab).items()}
    kernels = _kernel_ratios(lab)
    if SIZE[1] in steps:
        own, others = steps[SIZE[1]], [f"{r:.2f} with {n} bytes" for n, r in steps.items()
                                       if n != SIZE[1]]
        source = joined(*(s for _, _, s in compiled_steps(lab).values()))
        words = (f"In training, with equal parameters and both steps compiled, a fused SSM runs at "
                 f"{own:.2f} times attention's speed with {SIZE[0]} windows of {SIZE[1]} bytes")
        words += f" ({', '.join(others)}): a matter of length." if others else "."
        words += half_depth_ratios(lab)
    elif kernels is not None and (there := _own_size(kernels[0])) is not None:
        own, source = there, kernels[1].text
        best = max(kernels[0], key=lambda size: kernels[0][size])
        words = (f"Its kernel against attention's, forward and backward at one width, is "
                 f"{own:.2f} times as fast at the document's size and {kernels[0][best]:.2f} times "
                 f"at {best}: a matter of length.")
    else:
        return lab.undecided("throughput", f"{paper} For training it takes both at one size on a "
                             "GPU (profile full)")
    verdict = HOLDS if near(own, claim.number, 0.3) else CAVEAT if own > 1.1 else FAILS
    return Finding(verdict, f"{own:.2f} x in training", f"{paper} {words}", source)


@check
def headline_of_kernel(lab: Lab, claim: Claim) -> Finding:
    """Whether the paper's factor is the scan kernel's: by what it is said to be of, and by that
    kernel beside attention's."""
    of, why = lab.fact("mamba_paper", "speedup_of"), lab.fact("mamba_paper", "speedup_because")
    generation = "generation" in of
    words = f"The paper's factor is for {of}: {why}."
    if generation:
        words += " Generating moves the state a step at a time and runs no scan kernel."
    kernels = _kernel_ratios(lab)
    own = None if kernels is None else _own_size(kernels[0])
    reached = own is not None and own >= 0.7 * claim.number
    verdict = (CAVEAT if reached else FAILS) if generation else (
        HOLDS if own is None or reached else FAILS)
    if kernels is None or own is None:
        return Finding(verdict, None, words, f"paper: {lab.fact('mamba_paper', 'source')}")
    best = max(kernels[0], key=lambda size: kernels[0][size])
    return Finding(verdict, f"its kernel {own:.2f} x attention's speed", f"{words} Forward and "
                   f"backward mamba-ssm's kernel runs at {own:.2f} times the speed of attention's "
                   f"at the document's size, and at {kernels[0][best]:.1f} times at {best}.",
                   f"{kernels[1].text}; paper: {lab.fact('mamba_paper', 'source')}")


@check
def longer_window_speed(lab: Lab, claim: Claim) -> Finding:
    """Whether bytes a second stay when the windows get longer, for the SSM and for attention."""
    steps = compiled_steps(lab)
    if len(steps) < 2:
        return lab.undecided("throughput", "It takes training steps of both with short and with "
                             "long windows on a GPU (bench step)")
    rates = {n: tuple(SIZE[0] * n / ms / 1e3 for ms in pair[:2]) for n, pair in steps.items()}
    short, long = min(rates), max(rates)
    kept, attention = (rates[long][i] / rates[short][i] for i in (0, 1))
    written = lab["operations.backward_exponent"]
    fails = kept < 0.8 or rates[long][0] < rates[long][1]
    verdict = FAILS if fails else HOLDS if written < 1.15 else CAVEAT
    together = one_job(steps[short][2], steps[long][2])
    cell = (f"{kept:.2f} x and {attention:.2f} x" if together else
            ", ".join(f"{a:.1f} and {b:.1f} MB/s with {n}" for n, (a, b) in (
                (short, rates[short]), (long, rates[long]))))
    times = f", {kept:.2f} times as many a second" if together else " (another command)"
    return Finding(verdict, cell, f"With a fused scan the SSM "
                   f"trains on {rates[long][0]:.1f} MB/s with windows of {long} bytes and "
                   f"{rates[short][0]:.1f} with {short}{times}; "
                   f"attention on {rates[long][1]:.1f} and {rates[short][1]:.1f}. At {short} the "
                   f"two are {rates[short][0] / rates[short][1]:.2f} to 1. With the scan as "
                   f"published what the backward pass writes grows with exponent {written:.2f}, "
                   f"so with it longer windows do cost time.{half_depth_ratios(lab)}",
                   joined(*(s for _, _, s in steps.values())))


@check
def fifty_times(lab: Lab, claim: Claim) -> Finding:
    """Their ratio is of whole steps, of SSM-1 and of attention alone; what it says of a layer is
    arithmetic, and the published loop beside attention is a record of study throughput."""
    stated, slow, fast = claim.numbers
    mixed = layers("MA")
    ssm, others = mixed.count("M"), mixed.count("A")
    layer = fast / len(mixed)
    own = (slow - others * layer) / ssm
    implied = own / layer
    words = (f"{slow:g} s and {fast:g} s are whole steps, and SSM-1 has {ssm} SSM and {others} "
             f"attention layers: a layer of attention takes {layer:.3f} s, so an SSM layer of it "
             f"{own:.1f} s, {implied:.0f} times as long")
    found = _loop_over_attention(lab)
    if found is None:
        return lab.undecided("throughput", f"{words}. The published loop, which indexes every "
                             "step, must be timed beside attention on a GPU (profile full)",
                             f"{implied:.0f} x a layer, by their own numbers")
    ratios, source = found
    every = [r for of in ratios.values() for r in of.values()]
    low, high = min(every), max(every)
    verdict = (HOLDS if all(near(r, stated, 0.3) for r in (implied, *every))
               else CAVEAT if low / 1.3 <= stated <= 1.3 * high else FAILS)
    shown = "; ".join(f"{what} " + ", ".join(
        f"{r:.0f} at {batch} x {length:,}" for (batch, length), r in of.items())
        for what, of in ratios.items())
    return Finding(verdict, f"{low:.0f} to {high:.0f} x", f"{words}. Forward and backward, so many "
                   f"times as long as a mixer of attention of the same width takes: {shown}. The "
                   "factor is the loop's and the size's, not the recurrence's.", source.text)


def _loop_over_attention(
    lab: Lab,
) -> tuple[dict[str, dict[tuple[int, int], float]], Source] | None:
    """Time of the loop over steps over that of an attention mixer, forward and backward, by how
    the loop is written and by (batch, length): what one record on an accelerator has of both."""
    mixers = lab.table("throughput", "mixers", accelerator=True)
    if mixers is None:
        return None
    loops = {"a mixer whose steps are split once": _milliseconds(
        mixers.what, "mixer", "SSM (recurrent)")}
    indexed: dict[tuple[int, int], float] = {}
    for name in ("scan_time", "batch"):
        scans = lab.table("throughput", name, accelerator=True)
        if scans is not None and scans.name == mixers.name:
            indexed |= _milliseconds(scans.what, "form", "indexed loop")
    loops["the published loop alone, which indexes every step,"] = indexed
    attention = _milliseconds(mixers.what, "mixer", "attention")
    found = {what: {size: ms[size] / attention[size] for size in sorted(ms.keys() & attention)}
             for what, ms in loops.items()}
    found = {what: of for what, of in found.items() if of}
    return (found, mixers) if found else None


def _milliseconds(
    frame: pd.DataFrame, column: str, name: str
) -> dict[tuple[int, int], float]:
    """By (batch, length), where it was measured."""
    rows = frame[(frame[column] == name) & (frame["pass"] == BOTH) & frame["ms"].notna()]
    return {(int(b), int(n)): float(ms)
            for b, n, ms in zip(rows["batch"], rows["length"], rows["ms"], strict=True)}
