"""Checks of operations and speed: the scan, a step, a streamed byte."""

from __future__ import annotations

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.checks.published import fast_hybrids
from analysis.studies.claims.evidence import Source
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check, compare
from analysis.studies.claims.recorded import joined, one_job, step_ms, whole_run
from analysis.theory.flops import flops_per_byte, flops_table
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
                   "bytes seen.", "closed form (analysis.theory.flops)")


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


def _streamed_as_documented(lab: Lab) -> tuple[float, Source] | None:
    """Milliseconds of one streamed byte through torch, a call a byte, as the document does it."""
    found = lab.table("throughput", "stream", accelerator=True)
    if found is None:
        return None
    rows = found.what[(found.what["way"] == "torch, a call a byte")
                      & (found.what["texts at a time"] == 1)]
    return (float(rows["a byte of each, median (us)"].iloc[0]) / 1e3, found) if len(rows) else None


@check
def eval_is_cheap(lab: Lab, claim: Claim) -> Finding:
    """A byte streamed in plain torch, as documented, against attention streamed in torch."""
    table = (lab.table("throughput", "streaming", accelerator=True)
             or lab.table("throughput", "streaming"))
    if table is None:
        return lab.undecided("throughput", "It takes the latency of one streamed byte")
    rows = table.what.assign(ms=table.what["ms"].astype(float)).sort_values("bytes_seen")
    last = rows.groupby("system")["ms"].last()
    windowed = float(last[next(s for s in last.index if "last" in s)])
    every = float(last[next(s for s in last.index if "all keys" in s)])
    written = _streamed_as_documented(lab)
    ssm = float(last["SSM"]) if written is None else written[0]
    how = ("with this project's kernel, not as the document does it" if written is None else
           f"in plain torch, as the document does it ({float(last['SSM']):.2f} ms with this "
           "project's kernel)")
    seconds = ssm * TASK_CHARACTERS / 1e3
    faster = (ssm < windowed) + (ssm < every)
    clear = written is not None and windowed > 2 * ssm
    verdict = (FAILS, CAVEAT, HOLDS if clear else CAVEAT)[faster]
    board = lab.published("leaderboard")
    beside = "" if board is None else (
        f" The baseline's published log scores {board['scoring_characters_per_second']} characters "
        f"a second, {TASK_CHARACTERS / board['scoring_characters_per_second']:.0f} s for all, on "
        "another card.")
    speed = (f", {windowed / ssm:.1f} x attention's speed"
             if written is None or one_job(written[1], table) else "")
    return Finding(verdict, f"{seconds:.0f} s{speed}",
                   f"A streamed byte takes {ssm:.2f} ms {how}: {seconds:.0f} s for "
                   f"{TASK_CHARACTERS:,}, {seconds / 300:.0%} of what training may take. Attention "
                   f"of the same width takes {windowed:.2f} ms with a window and {every:.2f} with "
                   f"all keys, after as many bytes as were measured.{beside}",
                   joined(None if written is None else written[1], table))


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
                   f"longer.{measured}", "closed form (analysis.theory.flops)" if found is None
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
        sources.append(joined(written[1], exact))
    if others is not None:
        reason += f"; in the same competition {others[0]}"
        sources.append(others[1])
    if not sources:
        return lab.undecided("throughput", "It takes whole steps with the scan in plain torch and "
                             "with a fused one on a GPU")
    shown = others is not None and others[2]
    verdict = (HOLDS if shown else CAVEAT) if gain > 10 or shown else FAILS
    return Finding(verdict, cell, f"{reason}.", "; ".join(sources))
