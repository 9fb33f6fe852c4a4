"""Checks of the second document that calculate or look up: layers, parameters, ratios, facts."""

from __future__ import annotations

from dataclasses import replace

from analysis.studies.ablation.variants import effective_steps as rate_sum
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
    near,
)
from analysis.theory.step_memory import budget
from mambabyte.config import ModelConfig, get_preset


def layers(pattern: str) -> str:
    """The second document's nine layers under a pattern."""
    return ModelConfig(d_model=512, n_layer=9, layer_pattern=pattern, n_head=8, n_kv_head=4).layers


@check
def six_and_three(lab: Lab, claim: Claim) -> Finding:
    found = layers("MMMA")
    m, a = found.count("M"), found.count("A")
    verdict = HOLDS if (m, a) == claim.range else INCONSISTENT
    stated = claim.range[0] / claim.range[1]
    return Finding(verdict, f"{m} + {a} ({found})", f"Cycling three SSM layers and one of "
                   f"attention over nine gives {m} and {a}; {claim.range[0]:.0f} and "
                   f"{claim.range[1]:.0f} would be {stated:.0f}:1, not the 3:1 of the same "
                   "sentence.")


@check
def hybrid_ratio(lab: Lab, claim: Claim) -> Finding:
    found = layers("MMMA")
    ratio = found.count("M") / found.count("A")
    verdict = compare(ratio, claim.number, holds=0.01, caveat=0.25)
    return Finding(verdict, f"{ratio:.2f}:1", f"Nine layers cannot be split 3:1: the pattern gives "
                   f"{found.count('M')} to {found.count('A')}, {ratio:.2f}:1.")


@check
def equal_ratio(lab: Lab, claim: Claim) -> Finding:
    found = layers("MA")
    ratio = found.count("M") / found.count("A")
    verdict = compare(ratio, claim.number, holds=0.01, caveat=0.3)
    return Finding(verdict, f"{ratio:.2f}:1", f"Nine layers in turns are {found.count('M')} SSM "
                   f"and {found.count('A')} attention layers.")


@check
def same_architecture(lab: Lab, claim: Claim) -> Finding:
    """SSM-1, of which the results are, beside the submission, under which they are told."""
    ssm_1, submitted = (layers(p) for p in ("MA", "MMMA"))
    counts = [_with_pieces(n) / 1e6 for n in ("ssm_1", "hybrid_3_1")]
    return Finding(HOLDS if ssm_1 == submitted else CAVEAT, f"{ssm_1} and {submitted}",
                   f"SSM-1 has {ssm_1.count('M')} SSM layers of {len(ssm_1)} and {counts[0]:.1f} M "
                   f"parameters, the submission {submitted.count('M')} and {counts[1]:.1f} M: what "
                   "is said of one rests on the other.")


@check
def ahead_or_closer(lab: Lab, claim: Claim) -> Finding:
    """To be best of all is to be ahead of attention; to come closer to it is to be behind."""
    best, submitted = claim.numbers
    baseline = float(lab.fact("same_competition", "baseline_bpb"))
    verdict = INCONSISTENT if best <= baseline else CAVEAT
    return Finding(verdict, f"{best - baseline:+.2f} and {submitted - baseline:+.2f} bits from "
                   f"{baseline:.4f}", "If attention is among the seven, SSM-1 is ahead of it; and "
                   "at equal steps, where speed is no handicap, a kernel changes nothing. Both can "
                   "be true only of two baselines: the ablation's own, and the competition's with "
                   f"{baseline:.4f}, to which {best:.4f} and {submitted:.4f} stand as said here.",
                   str(lab.fact("same_competition", "source")))


@check
def times_slower(lab: Lab, claim: Claim) -> Finding:
    ssm, attention = claim.numbers[1:]
    ratio = ssm / attention
    return Finding(compare(ratio, claim.numbers[0], holds=0.1, caveat=0.3), f"{ratio:.1f}",
                   f"{ssm:g} s / {attention:g} s = {ratio:.1f}.")


@check
def effective_steps(lab: Lab, claim: Claim) -> Finding:
    stated, iterations, step = claim.numbers
    hours, cap = iterations * step / 3600, 180 / step
    _, full_rate = rate_sum(step, iterations=int(iterations))
    verdict = HOLDS if near(stated, iterations, 0.05) else INCONSISTENT
    return Finding(verdict, f"{iterations:.0f} steps in {hours:.1f} h", f"{iterations:.0f} "
                   f"iterations at {step:.0f} s are {iterations:.0f} steps in {hours:.1f} h, worth "
                   f"{full_rate:.0f} at full learning rate under the published warm-down. About "
                   f"{cap:.0f} is what a cap of 180 s allows; then 200 were not done. In the time "
                   f"of {iterations:.0f} attention steps of 0.7 s it would be "
                   f"{iterations * 0.7 / step:.0f}, but those are not the steps of this run.",
                   "arithmetic on the stated numbers; schedule as published")


@check
def three_times(lab: Lab, claim: Claim) -> Finding:
    gain, slower = claim.range
    verdict = HOLDS if near(gain, slower, 0.3) else INCONSISTENT
    return Finding(verdict, f"{gain:g} against {slower:g}", f"If the scan makes the step "
                   f"{slower:g} times slower than attention, a kernel at attention's speed gains "
                   f"about {slower:g} times, not {gain:g}.")


@check
def fewer_parameters(lab: Lab, claim: Claim) -> Finding:
    model = get_preset("hybrid_3_1").model
    groups = model.parameter_groups()
    m, a = model.layers.count("M"), model.layers.count("A")
    ssm = sum(v for k, v in groups.items() if k.startswith("ssm_")) / m
    attention = groups["attention"] / a
    verdict = HOLDS if ssm < attention else FAILS
    return Finding(verdict, f"{ssm:,.0f} against {attention:,.0f}", "At width 512, expand 2, a "
                   f"full step-size projection and 8 heads over 4 KV heads, an SSM mixer has "
                   f"{ssm:,.0f} parameters, {ssm / attention:.1f} times attention's "
                   f"{attention:,.0f}.")


@check
def no_kv_projection(lab: Lab, claim: Claim) -> Finding:
    """The projection saved, and what an SSM mixer has in the same places."""
    model = get_preset("hybrid_3_1").model
    groups, m = model.parameter_groups(), model.layers.count("M")
    kv = 2 * model.d_model * model.n_kv_head * model.head_dim
    selective = sum(groups[k] for k in ("ssm_x_proj", "ssm_dt_proj")) / m
    verdict = HOLDS if selective < kv else CAVEAT
    return Finding(verdict, f"{kv:,} saved, {selective:,.0f} added", f"True by name: keys and "
                   f"values would take {kv:,} parameters. But B, C and the step sizes, which an "
                   f"SSM computes from its input instead, take {selective:,.0f}.")


@check
def steps_in_budget(lab: Lab, claim: Claim) -> Finding:
    budget, ssm, attention = claim.numbers
    slow, fast = budget / ssm, budget / attention
    return Finding(HOLDS if slow < 0.5 * fast else FAILS, f"{slow:.1f} and {fast:.0f} steps",
                   f"{budget:g} s hold {slow:.1f} steps of {ssm:g} s and {fast:.0f} of "
                   f"{attention:g} s. (The two times are of another machine than the budget.)",
                   "arithmetic on the stated numbers")


@check
def overnight(lab: Lab, claim: Claim) -> Finding:
    runs, steps, slow, fast = claim.numbers
    one, least = steps * slow / 3600, steps * (slow + (runs - 1) * fast) / 3600
    verdict = HOLDS if least < 12 else FAILS
    return Finding(verdict, f"{least:.1f} h at least", f"One run of {steps:.0f} steps at {slow:g} "
                   f"s takes {one:.1f} h, {runs - 1:.0f} others at {fast:g} s "
                   f"{least - one:.1f} h. So a night was enough for all {steps:.0f} steps of it, "
                   "which is why '5 effective steps' needs another explanation.",
                   "arithmetic on the stated numbers")


@check
def larger_model(lab: Lab, claim: Claim) -> Finding:
    totals = {p: _with_pieces(n) / 1e6
              for p, n in (("A", "attention"), ("MA", "ssm_1"), ("MMMA", "hybrid_3_1"))}
    rising = totals["A"] < totals["MA"] < totals["MMMA"]
    verdict = FAILS if rising else HOLDS
    return Finding(verdict, ", ".join(f"{p} {n:.1f} M" for p, n in totals.items()),
                   "At the same depth and width 3:1 takes "
                   f"{totals['MMMA'] / totals['A']:.1f} times the parameters of attention alone, "
                   f"so {claim.number:.0f} MB hold a smaller model, not a larger one.")


@check
def artefact_size(lab: Lab, claim: Claim) -> Finding:
    parameters = _with_pieces("hybrid_3_1") / 1e6
    untrained, after = (parameters * lab[f"artefact.{n}"] for n in ("untrained", "after_5"))
    verdict = FAILS if untrained > claim.number else HOLDS if after < 0.6 * claim.number else CAVEAT
    return Finding(verdict, f"{untrained:.1f}, then {after:.1f} MB", f"{parameters:.1f} M "
                   f"parameters at one byte each do not fit {claim.number:.0f} MB. Packed by its "
                   f"rule (int8 rows with a smallest scale, zlib) the untrained weights take "
                   f"{untrained:.1f} MB and {after:.1f} after five steps; they grow with training, "
                   "so a barely trained model fits. The size that the run logged is not published.",
                   f"computed here; rule: {lab.fact('second_script', 'source')}")


def _with_pieces(preset: str) -> int:
    """Parameters of one of the second document's systems with its 1024 pieces."""
    return replace(get_preset(preset).model, vocab_size=1024).n_parameters


@check
def hardware(lab: Lab, claim: Claim) -> Finding:
    memory = [float(m) for m in lab.fact("rtx_5090", "memory_gb")]
    architecture = lab.fact("rtx_5090", "architecture")
    verdict = HOLDS if claim.number in memory and architecture in claim.theirs else FAILS
    return Finding(verdict, f"{architecture}, {' or '.join(f'{m:.0f}' for m in memory)} GB",
                   f"An RTX 5090 is a {architecture} card with {memory[0]:.0f} GB (the laptop part "
                   f"{memory[-1]:.0f} GB); {claim.theirs} names another card. The submission's "
                   f"own files say {lab.fact('second_submission', 'hardware')} alone, so the card "
                   "is not known.", f"data sheet: {lab.fact('rtx_5090', 'source')}; "
                   f"{lab.fact('second_submission', 'source')}")


@check
def batch_on_the_card(lab: Lab, claim: Claim) -> Finding:
    """One micro-batch of the script's default batch, forward and backward, by the closed form."""
    facts = {key: lab.fact("second_batch", key) for key in ("tokens", "micro_batches", "context")}
    batch = facts["tokens"] // facts["micro_batches"] // facts["context"]
    model = replace(get_preset("hybrid_3_1").model, vocab_size=1024, scan_form="recurrent")
    step = budget(model, batch, facts["context"], "bf16", "cuda", optimizer="muon")
    peak, room = step.peak / 1e9, claim.number * 2**30 / 1e9
    verdict = HOLDS if peak < room else INCONSISTENT
    one = budget(model, 1, facts["context"], "bf16", "cuda", optimizer="muon").peak / 1e9
    return Finding(verdict, f"{peak:.0f} GB", f"By default the script takes {facts['tokens']:,} "
                   f"tokens a step, {batch} windows of {facts['context']:,} at a time. With a loop "
                   f"that keeps decay and state of every step the peak is {peak:.0f} GB, where the "
                   f"card has {room:.1f}; one window at a time takes {one:.1f}. So the run had "
                   "another batch, or another card, than is said.",
                   "closed form (analysis.theory.step_memory); "
                   f"{lab.fact('second_batch', 'source')}")


@check
def switched_off(lab: Lab, claim: Claim) -> Finding:
    """Our reading of the script with attention alone, counted, against the baseline's own log."""
    ours, logged = _with_pieces("attention"), lab.fact("naive_baseline", "parameters")
    verdict = HOLDS if ours == claim.number == logged else FAILS
    return Finding(verdict, f"{ours:,} parameters", f"With attention in all nine layers the model "
                   f"has {ours:,} parameters; the competition's baseline logged {logged:,}. "
                   "It keeps the skips, gains and mixing that the text does not name, so a "
                   "comparison with it is one of layers alone.",
                   f"computed here; {lab.fact('naive_baseline', 'source')}")


@check
def unseen_by_the_clock(lab: Lab, claim: Claim) -> Finding:
    """What the script does before its clock starts: warm-up steps, which it then undoes."""
    budget, step = claim.numbers
    steps = lab.fact("second_script", "warmup_steps")
    before = steps * step
    verdict = HOLDS if before < 0.1 * budget else CAVEAT if before < budget else FAILS
    return Finding(verdict, f"{before:.0f} s before it", f"The clock of {budget:.0f} s covers "
                   f"training steps alone: not the {steps} steps that warm the script up, "
                   f"{before:.0f} s at {step:g} s a step, nor validation, nor compiling. (The step "
                   "was timed on another card.)", str(lab.fact("second_script", "source")))


@check
def production_ratio(lab: Lab, claim: Claim) -> Finding:
    ratios = lab.fact("production_hybrids", "ratios")
    verdict = HOLDS if all(near(r, claim.number, 0.2) for r in ratios) else CAVEAT
    return Finding(verdict, ", ".join(f"{r:g}:1" for r in ratios), "Published ratios of linear to "
                   f"full attention layers: {', '.join(f'{r:g}:1' for r in ratios)}.",
                   f"publications: {lab.fact('production_hybrids', 'source')}")


@check
def production_kernels(lab: Lab, claim: Claim) -> Finding:
    mixers = lab.fact("production_hybrids", "mixers")
    verdict = HOLDS if any("Mamba" in m for m in mixers) else FAILS
    return Finding(verdict, ", ".join(mixers), f"Their linear layers are {' and '.join(mixers)}, "
                   "delta rules over matrix states; Mamba-2's scan is another recurrence.",
                   f"publications: {lab.fact('production_hybrids', 'source')}")
