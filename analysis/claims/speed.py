"""Checks of operations and speed: the scan, a step, a streamed byte."""

from __future__ import annotations

import math

from analysis.claims.arithmetic import FINAL
from analysis.claims.evidence import Source
from analysis.claims.lab import Lab
from analysis.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    OPEN,
    Claim,
    Finding,
    check,
    compare,
    near,
    sig,
)
from analysis.claims.published import fast_hybrids
from analysis.claims.recorded import (
    PUBLISHED,
    scan_ratio,
    step_ms,
    training_step,
    whole_run,
)
from analysis.flops import flops_per_byte, flops_table
from mambabyte.config import get_preset
from mambabyte.evaluate import TASK_CHARACTERS


@check
def constant_step(lab: Lab, claim: Claim) -> Finding:
    few, many = lab["streaming.bytes_moved_16"], lab["streaming.bytes_moved_512"]
    growth = lab.value("throughput", "stream_growth_ssm")
    timed = float(growth.what) if growth else None
    steady = few == many and (timed is None or timed < 1.5)
    words = f"; the latency measured after thousands of bytes is {timed:.2f} times that at the " \
            "start" if timed else ""
    return Finding(HOLDS if steady else FAILS, f"{many / 1e6:.1f} MB moved a byte", "A step reads "
                   f"and writes {few / 1e6:.2f} MB after 16 bytes and {many / 1e6:.2f} MB after "
                   f"512{words}.", growth.text if growth else "computed here")


@check
def cost_of_a_byte(lab: Lab, claim: Claim) -> Finding:
    table = flops_table(FINAL.model, FINAL.train.context).set_index("module")
    forward = table["forward_flops_per_byte"]
    share = float(forward["SSM scan"] / forward.sum())
    projections = float(sum(v for k, v in forward.items() if str(k).endswith("_proj")))
    verdict = HOLDS if share > 0.5 else FAILS
    return Finding(verdict, f"{share:.0%} of the operations", f"The scan, n_layer d_inner d_state, "
                   f"is {share:.0%} of a byte's operations; the projections, n_layer d_model "
                   f"d_inner, are {projections / forward.sum():.0%}. Both are independent of the "
                   "bytes seen.", "closed form (analysis.flops)")


@check
def linear_time(lab: Lab, claim: Claim) -> Finding:
    ours, split = lab["operations.backward_exponent"], lab["operations.split_exponent"]
    recorded = lab.value("throughput", "document_fill_exponent")
    verdict = HOLDS if ours < 1.15 else FAILS
    return Finding(verdict, f"exponent {ours:.2f} backward", "Linear forward, but the gradient of "
                   "each slice taken in the loop is a tensor of the full length: what the backward "
                   f"pass writes grows with exponent {ours:.2f} from 1024 to 4096 bytes (split "
                   f"once: {split:.2f}).", recorded.text if recorded else "computed here")


@check
def linear_complexity(lab: Lab, claim: Claim) -> Finding:
    ours, split = lab["operations.backward_exponent"], lab["operations.split_exponent"]
    verdict = FAILS if split > 1.15 else HOLDS if ours < 1.15 else CAVEAT
    return Finding(verdict, f"exponent {split:.2f}, as published {ours:.2f}", "The recurrence is "
                   f"linear, and so is a scan that is cut once (exponent {split:.2f} backward); "
                   f"the published loop of slices is not ({ours:.2f}).")


@check
def slower_than_fused(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    found = scan_ratio(lab)
    if found is None:
        return _from_whole_steps(lab, high) or lab.undecided(
            "throughput", "The factor must be measured on a GPU (profile full)",
            f"{lab['mixers.published'] / lab['mixers.auto']:.0f} x on this CPU")
    ratio, size, source = found
    verdict = HOLDS if low <= ratio <= high else CAVEAT if ratio <= 1.5 * high else FAILS
    return Finding(verdict, f"{ratio:.0f} x at {size}", f"At {size} the published scan takes "
                   f"{ratio:.0f} times the fused one, forward and backward; not an A100, but no "
                   "device turns one into the other.", source.text)


def _from_whole_steps(lab: Lab, high: float) -> Finding | None:
    """Judges "at most ``high`` times the fused scan" by whole training steps, which hold more than
    the scan: only where the rest cannot explain what is measured."""
    whole, exact = whole_run(lab), lab.task("mamba_byte")
    if whole is None or exact is None:
        return None
    written, fused = step_ms(whole[0]), step_ms(exact.what)
    # The scan's share of the fused step counts fully; the rest of an eager step is taken to cost
    # ten times what it costs compiled and captured.
    explained = high * fused + 10 * fused
    reason = (f"A whole step as written, run op by op, takes {written:.0f} ms; with the fused "
              f"scan, compiled and captured, {fused:.1f} ms. If the published scan took "
              f"{high:g} times the fused one and all else in the step ten times as long op by op, "
              f"that would be {explained:.0f} ms at most.")
    return Finding(FAILS if written > explained else OPEN, f"{written:.0f} ms a step against "
                   f"{fused:.1f}", reason, whole[1].text)


@check
def overhead_cause(lab: Lab, claim: Claim) -> Finding:
    """How much of the overhead stays when the same tensors are made without slicing in a loop."""
    table = lab.table("throughput", "scan_time")
    if table is None:
        return lab.undecided("throughput", "It takes the published form, the same arithmetic cut "
                             "once, and the fused scan at one size")
    rows = table.what
    rows = rows[(rows["pass"] == "forward+backward") & (rows["batch"] == 1) & rows["ms"].notna()]
    wide = rows.pivot_table(index="length", columns="form", values="ms", aggfunc="first")
    forms = [PUBLISHED, "corrected_cumsum", "fused"]
    both = wide[forms].dropna().astype(float) if set(forms) <= set(wide.columns) else wide[:0]
    if both.empty:
        return lab.undecided("throughput", "The three forms have no length in common")
    length = int(both.index.max())
    published, cut_once, fused = (float(both.loc[length, f]) for f in forms)
    share = (cut_once - fused) / (published - fused)
    verdict = HOLDS if share > 0.9 else CAVEAT if share > 0.25 else FAILS
    return Finding(verdict, f"{share:.0%} of the overhead", f"At {length} bytes the published form "
                   f"takes {published:.0f} ms, the same tensors from a sequence that is cut once "
                   f"{cut_once:.0f} and the fused scan {fused:.1f}: materialising explains "
                   f"{share:.0%} of the overhead there, the gradients of slices the rest, and "
                   "their share grows with the length.", table.text)


@check
def bandwidth_bound(lab: Lab, claim: Claim) -> Finding:
    moved = lab["operations.bytes_per_element"]
    intensity = 6 / moved
    balance = lab.fact("a100", "fp32_tflops") * 1e12 / (lab.fact("a100", "bandwidth_gb_s") * 1e9)
    verdict = HOLDS if intensity < 0.2 * balance else CAVEAT if intensity < balance else FAILS
    return Finding(verdict, f"{sig(intensity, 2)} operations a byte", f"Some 6 operations and one "
                   f"exponential for {moved:.0f} bytes moved are {sig(intensity, 2)} operations a "
                   f"byte, where an A100 needs {balance:.0f} to be bound by arithmetic. Short "
                   "chunks add the time of their "
                   "launches.", "computed here; data sheet of the A100")


@check
def five_times_attention(lab: Lab, claim: Claim) -> Finding:
    quoted = lab.fact("mamba_paper", "speedup_of")
    paper = f"The paper's factor 5 is for {quoted} of large models at batch."
    found = training_step(lab, "M", "auto"), training_step(lab, "A", "auto")
    if found[0] is not None and found[1] is not None:
        ratio = float(found[1][0]["ms"] / found[0][0]["ms"])
        verdict = HOLDS if near(ratio, claim.number, 0.3) else CAVEAT if ratio > 1 else FAILS
        return Finding(verdict, f"{ratio:.2f} x in training", f"{paper} In training at 16 x 1024 "
                       f"with equal parameters even the fused SSM runs at {ratio:.2f} times "
                       "attention's speed.", found[0][1].text)
    kernels = _kernel_ratios(lab)
    if kernels is None:
        return lab.undecided("throughput", f"{paper} For training it takes both at one size on a "
                             "GPU (profile full)")
    ratios, source = kernels
    best = max(ratios, key=lambda size: ratios[size])
    worst = min(ratios, key=lambda size: ratios[size])
    top = ratios[best]
    verdict = HOLDS if top >= 0.7 * claim.number and ratios[worst] > 1 else (
        CAVEAT if top > 1 else FAILS)
    return Finding(verdict, f"{ratios[worst]:.2f} to {top:.2f} x", f"{paper} Its kernel against "
                   f"attention's, forward and backward at one width, is {ratios[worst]:.2f} times "
                   f"as fast at {worst} and {top:.2f} times at {best}: a matter of length.",
                   source.text)


def _kernel_ratios(lab: Lab) -> tuple[dict[str, float], Source] | None:
    """Attention's kernel time over mamba-ssm's, forward and backward, by size."""
    found = lab.table("throughput", "bench", accelerator=True)
    if found is None:
        return None
    rows = found.what[found.what["pass"] == "forward+backward"]
    wide = rows.pivot_table(index="batch x length x channels", columns="of", values="median (us)",
                            aggfunc="first")
    if not {"sdpa", "mamba_ssm"} <= set(wide.columns):
        return None
    both = wide[["sdpa", "mamba_ssm"]].dropna().astype(float)
    ratios = {str(size): float(row["sdpa"] / row["mamba_ssm"]) for size, row in both.iterrows()}
    return (ratios, found) if ratios else None


@check
def eval_is_cheap(lab: Lab, claim: Claim) -> Finding:
    table = lab.table("throughput", "streaming")
    if table is None:
        return lab.undecided("throughput", "It takes the latency of one streamed byte")
    rows = table.what.assign(ms=table.what["ms"].astype(float)).sort_values("bytes_seen")
    last = rows.groupby("system")["ms"].last()
    ssm = float(last["SSM"])
    windowed = float(last[next(s for s in last.index if "last" in s)])
    every = float(last[next(s for s in last.index if "all keys" in s)])
    seconds = ssm * TASK_CHARACTERS / 1e3
    faster = (ssm < windowed) + (ssm < every)
    verdict = (FAILS, CAVEAT, HOLDS)[faster]
    board = lab.published("leaderboard")
    beside = "" if board is None else (
        f" The baseline's published log scores {board['scoring_characters_per_second']} characters "
        f"a second, {TASK_CHARACTERS / board['scoring_characters_per_second']:.0f} s for all.")
    return Finding(verdict, f"{ssm:.2f} ms against {windowed:.2f} and {every:.2f}",
                   f"A streamed byte takes {ssm:.2f} ms, {seconds:.0f} s for 60,000; attention of "
                   f"the same width takes {windowed:.2f} ms with a window and {every:.2f} ms with "
                   f"all keys, after as many bytes as were measured.{beside}", table.text)


@check
def structural_win(lab: Lab, claim: Claim) -> Finding:
    growth = {n: lab.value("throughput", f"stream_growth_{n}") for n in ("ssm", "window", "cache")}
    if any(v is None for v in growth.values()):
        return lab.undecided("throughput", "It takes latency against bytes seen",
                             "constant state and operations")
    ssm, window, cache = (float(v.what) for v in growth.values() if v is not None)
    verdict = FAILS if ssm >= cache else HOLDS if window > 1.5 * ssm else CAVEAT
    over = "over attention in either form" if verdict == HOLDS else "over an unbounded cache only"
    return Finding(verdict, f"{ssm:.2f}, {window:.2f} and {cache:.2f}", "From the first byte to "
                   f"the last measured one latency grows {ssm:.2f} times for the SSM, {window:.2f} "
                   f"for attention with a window and {cache:.2f} with all keys: "
                   f"{'no win' if verdict == FAILS else 'a win ' + over}.",
                   growth["ssm"].text if growth["ssm"] else "")


@check
def loop_is_slow(lab: Lab, claim: Claim) -> Finding:
    ours = lab["mixers.loop"] / lab["mixers.attention"]
    verdict = HOLDS if ours > 3 else CAVEAT if ours > 1 else FAILS
    return Finding(verdict, f"{ours:.0f} x", f"One layer forward and backward, 256 tokens wide 128 "
                   f"on a CPU core: the loop over steps takes {ours:.0f} times as long as "
                   f"attention, the same layer with a fused scan "
                   f"{lab['mixers.auto'] / lab['mixers.attention']:.1f} times.")


@check
def fifty_times(lab: Lab, claim: Claim) -> Finding:
    attention = training_step(lab, "A", "auto")
    steps = {form: row for form in (PUBLISHED, "chunked")
             if (row := training_step(lab, "M", form)) is not None}
    if attention is None or not steps:
        cpu = lab["mixers.loop"] / lab["mixers.attention"]
        return lab.undecided("throughput", "The factor must be measured on a GPU (profile full)",
                             f"{cpu:.0f} x on this CPU")
    ratios = {form: row["ms"] / attention[0]["ms"] for form, (row, _) in steps.items()}
    nearest = min(ratios.values(), key=lambda ratio: abs(math.log(ratio / claim.number)))
    verdict = compare(nearest, claim.number, holds=0.3, caveat=0.5)
    if verdict == HOLDS and max(ratios.values()) > 2 * min(ratios.values()):
        verdict = CAVEAT
    words = {PUBLISHED: "the first document's chunked sums", "chunked": "our stable chunked form"}
    return Finding(
        verdict, ", ".join(f"{ratio:.0f} x" for ratio in ratios.values()),
        "A captured training step of a pure SSM against one of attention of equal parameters takes "
        + " and ".join(f"{ratio:.0f} times as long with {words[form]}"
                       for form, ratio in ratios.items())
        + ", both in torch alone: the factor is the form's.", attention[1].text)


@check
def scan_is_the_slow_path(lab: Lab, claim: Claim) -> Finding:
    share = 1 - lab["mixers.auto"] / lab["mixers.loop"]
    verdict = HOLDS if share > 0.5 else CAVEAT if share > 0.2 else FAILS
    return Finding(verdict, f"{share:.0%} of the layer", f"Replacing the loop by a fused scan "
                   f"takes away {share:.0%} of the layer's time, forward and backward, on a "
                   "CPU core.")


@check
def kernel_gain(lab: Lab, claim: Claim) -> Finding:
    stated, slow, attention = claim.numbers
    ours, other = (flops_per_byte(get_preset(name).model, 1024) for name in ("ssm_1", "attention"))
    bound = slow / (attention * ours / other)
    found = lab.value("throughput", "loop_over_fused", accelerator=True)
    measured = "" if found is None else (
        f" The fused scan alone is {float(found.what):.0f} times faster than the indexed loop.")
    verdict = compare(bound, stated, holds=0.1, caveat=0.5)
    return Finding(verdict, f"at most {bound:.0f} x", f"{slow:g} s over {attention:g} s is "
                   f"{slow / attention:.0f}. SSM-1 takes {ours / other:.2f} times the operations "
                   f"of the attention model, so with a kernel as efficient as attention's a step "
                   f"would be {bound:.0f} times faster, and the run that much "
                   f"longer.{measured}", "closed form (analysis.flops)" if found is None
                   else found.text)


@check
def kernel_feasible(lab: Lab, claim: Claim) -> Finding:
    written, exact, others = whole_run(lab), lab.task("mamba_byte"), fast_hybrids(lab)
    gain, cell, sources = 0.0, None, []
    reason = "A fused kernel against the scan in plain torch, in whole steps, was not measured"
    if written is not None and exact is not None:
        slow, fast = step_ms(written[0]), step_ms(exact.what)
        gain, cell = slow / fast, f"{slow:.0f} -> {fast:.1f} ms a step"
        reason = (f"For the first document's model a fused kernel in CUDA C++, with the step "
                  f"compiled and captured, brings a step from {slow:.0f} to {fast:.1f} ms")
        sources.append(exact.text)
    if others is not None:
        reason += f"; in the same competition {others[0]}"
        sources.append(others[1])
    if not sources:
        return lab.undecided("throughput", "It takes whole steps with the scan in plain torch and "
                             "with a fused one on a GPU")
    shown = others is not None and others[2]
    verdict = (HOLDS if shown else CAVEAT) if gain > 10 or shown else FAILS
    return Finding(verdict, cell, f"{reason}.", "; ".join(sources))
