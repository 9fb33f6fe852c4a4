"""Checks of bytes: what is kept, what fits, what the fix saves."""

from __future__ import annotations

from dataclasses import replace

from analysis.studies.claims.checks.arithmetic import FINAL, ORIGINAL
from analysis.studies.claims.evidence import Source
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
from analysis.theory.kept_tensors import Autocast, saved_terms
from analysis.theory.step_memory import budget, state_bytes
from mambabyte.config import ModelConfig, TrainConfig

# The scan in the order of the published script, which verdicts go by; and in ours, beside it, which
# is the one that records have measured.
PUBLISHED = replace(FINAL.model, scan_form="document_as_coded")
OURS = replace(FINAL.model, scan_form="document_chunked")
CLOSED = "closed form (analysis.theory.step_memory, held against counts by study memory)"
GB = 1e9


def full_tensor(recipe: TrainConfig) -> int:
    """Bytes of one float32 (B, L, d_inner, d_state) tensor."""
    return recipe.batch_size * recipe.context * FINAL.model.d_inner * FINAL.model.d_state * 4


def kept(
    recipe: TrainConfig, autocast: Autocast = "bf16", part: str = "",
    model: ModelConfig = PUBLISHED,
) -> int:
    """Bytes kept between the passes by the published scan, one part of the layers or all."""
    return sum(t.bytes for t in saved_terms(
        model, recipe.batch_size, recipe.context, autocast, "cuda") if part in ("", t.part))


def peak(
    recipe: TrainConfig, checkpointing: bool = False, model: ModelConfig = PUBLISHED
) -> float:
    """Peak GB of a training step on a GPU under bf16 autocast."""
    return budget(model, recipe.batch_size, recipe.context, "bf16", "cuda",
                  checkpointing).peak / GB


def allocator_peak(
    lab: Lab, recipe: TrainConfig, checkpointing: bool = False, model: ModelConfig = PUBLISHED
) -> tuple[float, Source] | None:
    """The peak GB of that step by a GPU's allocator, bf16 autocast, where a record has it."""
    found = lab.table("memory", "cuda", accelerator=True)
    if found is None:
        return None
    rows = found.what
    rows = rows[(rows["form"] == model.scan_form) & (rows["d_model"] == model.d_model)
                & (rows["layers"] == model.layers) & (rows["batch"] == recipe.batch_size)
                & (rows["context"] == recipe.context) & (rows["autocast"] == "bf16")
                & (rows["checkpointing"] == checkpointing)]
    return (float(rows["peak, measured, MB"].iloc[0]) / 1e3, found) if len(rows) else None


def _beside(
    lab: Lab, recipe: TrainConfig, checkpointing: bool = False
) -> tuple[float, str, str]:
    """The peak GB of a step, by a GPU's allocator where a record has it; words and source for that
    and for the same step in our order."""
    gb, sources, words = peak(recipe, checkpointing), [], []
    if (coded := allocator_peak(lab, recipe, checkpointing)) is not None:
        gb = coded[0]
        words.append(f"{coded[0]:.1f} by the allocator of {coded[1].machine}")
        sources.append(coded[1].text)
    words.append(f"{peak(recipe, checkpointing, OURS):.1f} with the inputs as (delta u) x B")
    if (ours := allocator_peak(lab, recipe, checkpointing, OURS)) is not None:
        words[-1] += f", {ours[0]:.1f} by the allocator of {ours[1].machine}"
        sources.append(ours[1].text)
    return gb, f" ({', '.join(words)})", "; ".join(dict.fromkeys([*sources, CLOSED]))


def device(sold_as: float) -> float:
    """GB (1e9 bytes) of a card: the GB that it is sold with are GiB."""
    return sold_as * 2**30 / GB


@check
def tensors_kept(lab: Lab, claim: Claim) -> Finding:
    coded, ours = lab["kept.full_tensors"], lab["kept.full_tensors_ours"]
    low, high = claim.range
    verdict = HOLDS if low - 0.1 <= coded <= high + 0.1 else FAILS
    return Finding(verdict, f"{coded:.2f}", f"Hooks count {coded:.2f} such tensors per scan: delta "
                   "x B, b, exp(log_decay - cs), exp(cs), the bracket and h. With the inputs as "
                   f"(delta u) x B it would be {ours:.2f}. log_decay is one more during the "
                   "forward pass; gradients of slices add to them in the backward pass.")


@check
def concatenation(lab: Lab, claim: Claim) -> Finding:
    ratio = lab["kept.without_concatenation"]
    verdict = HOLDS if ratio < 0.5 else FAILS
    return Finding(verdict, f"{ratio:.2f} without concatenation", "With each chunk's output summed "
                   f"at once and nothing joined, {ratio:.0%} of the bytes are kept: the tensors "
                   "are saved by the products and exponentials inside the chunks.")


@check
def full_sequence_kept(lab: Lab, claim: Claim) -> Finding:
    ratio = lab["kept.twice_length"]
    return Finding(HOLDS if near(ratio, 2, 0.05) else FAILS, f"{ratio:.2f}", "Twice the length "
                   f"keeps {ratio:.2f} times the bytes at the same chunk: chunking saves nothing.")


@check
def footprint_product(lab: Lab, claim: Claim) -> Finding:
    ours = 5 * full_tensor(ORIGINAL.train) * FINAL.model.n_layer / GB
    return Finding(compare(ours, claim.number, holds=0.02, caveat=0.1), f"{ours:.1f} GB",
                   f"The product is {ours:.1f} GB ({ours * GB / 2**30:.1f} GiB).")


@check
def footprint_total(lab: Lab, claim: Claim) -> Finding:
    scan, everything = (kept(ORIGINAL.train, "bf16", p) / GB for p in ("scan", ""))
    ours, ours_all = (kept(ORIGINAL.train, "bf16", p, OURS) / GB for p in ("scan", ""))
    verdict = compare(everything, claim.number, holds=0.05, caveat=0.25)
    return Finding(verdict, f"{everything:.1f} GB", f"The scans as coded keep {scan:.1f} GB, six "
                   f"tensors and not five; convolutions, projections, gates and logits bring it to "
                   f"{everything:.1f} GB. With the inputs as (delta u) x B it would be {ours:.1f} "
                   f"and {ours_all:.1f}.", CLOSED)


@check
def over_budget(lab: Lab, claim: Claim) -> Finding:
    product = 5 * full_tensor(ORIGINAL.train) * FINAL.model.n_layer
    decimal, binary = product / 40e9, product / (GB * device(40))
    verdict = HOLDS if binary > claim.number else CAVEAT if decimal > claim.number else FAILS
    return Finding(verdict, f"{decimal:.2f} (40 GB), {binary:.3f} (40 GiB)", f"The product is "
                   f"{decimal:.2f} times 40 GB; of the 40 GiB that such a card has it is "
                   f"{binary:.3f} times, {'more' if binary > claim.number else 'not more'} than "
                   f"{claim.number:g}.")


@check
def runs_out_of_memory(lab: Lab, claim: Claim) -> Finding:
    step = budget(PUBLISHED, ORIGINAL.train.batch_size, ORIGINAL.train.context, "bf16", "cuda")
    ours = step.peak / GB
    layer, room = kept(ORIGINAL.train) / GB / FINAL.model.n_layer, device(claim.number)
    full = min(int(room / layer) + 1, FINAL.model.n_layer)
    used, words, source = _beside(lab, ORIGINAL.train)
    verdict = HOLDS if used > room else FAILS
    return Finding(verdict, f"{ours:.0f} GB", f"The step needs {ours:.0f} GB at its peak "
                   f"({step.worst_moment}){words}, {ours / room:.1f} times the device; at "
                   f"{layer:.0f} GB kept a layer the forward pass ends in layer {full}, in its "
                   "scan.", source)


@check
def training_state_matters(lab: Lab, claim: Claim) -> Finding:
    step = budget(PUBLISHED, ORIGINAL.train.batch_size, ORIGINAL.train.context, "bf16", "cuda")
    state = 4 * step.weights / GB
    share = state / (step.peak / GB)
    other = (kept(ORIGINAL.train) - kept(ORIGINAL.train, part="scan")) / GB
    verdict = HOLDS if share > 0.05 else CAVEAT
    return Finding(verdict, f"{1e3 * state:.0f} MB", f"Parameters, gradients and AdamW's moments "
                   f"are {1e3 * state:.0f} MB, {share:.2%} of the step; the other activations are "
                   f"{other:.1f} GB.", CLOSED)


@check
def sixteenfold_cut(lab: Lab, claim: Claim) -> Finding:
    ours = kept(ORIGINAL.train, "bf16", "scan") / kept(FINAL.train, "bf16", "scan")
    verdict = compare(ours, claim.number, holds=0.05)
    if verdict == FAILS and near(ours, 64 / 8, 0.05):
        verdict = INCONSISTENT
    return Finding(verdict, f"{ours:.1f}", f"The tensors are proportional to B x L, which falls by "
                   f"{ours:.1f}; the document's own 64 GB and 8 GB give the same.", CLOSED)


@check
def final_footprint(lab: Lab, claim: Claim) -> Finding:
    product = 5 * full_tensor(FINAL.train) * FINAL.model.n_layer / GB
    everything, top = kept(FINAL.train) / GB, peak(FINAL.train)
    verdict = compare(everything, claim.number, holds=0.05)
    if verdict == FAILS and near(product, claim.number, 0.05):
        verdict = CAVEAT
    return Finding(verdict, f"{product:.1f} GB of five tensors, {everything:.1f} GB in all",
                   f"Five tensors are {product:.2f} GB, the six that are kept "
                   f"{kept(FINAL.train, part='scan') / GB:.1f}; with everything else "
                   f"{everything:.1f} GB are kept and {top:.1f} GB needed at the peak (ours: "
                   f"{kept(FINAL.train, model=OURS) / GB:.1f} and "
                   f"{peak(FINAL.train, model=OURS):.1f}).", CLOSED)


@check
def fits_forty(lab: Lab, claim: Claim) -> Finding:
    used, words, source = _beside(lab, FINAL.train)
    ours, room = peak(FINAL.train), device(claim.number)
    verdict = HOLDS if used < 0.6 * room else CAVEAT if used < room else FAILS
    return Finding(verdict, f"{ours:.1f} GB", f"The peak of the step is {ours:.1f} of "
                   f"{room:.1f} GB ({claim.number:.0f} GiB){words}.", source)


@check
def safety_margin(lab: Lab, claim: Claim) -> Finding:
    theirs, ours = 40 / 8, device(40) / peak(FINAL.train)
    if near(ours, claim.number, 0.15):
        verdict = CAVEAT
    else:
        verdict = HOLDS if near(theirs, claim.number, 0.1) else INCONSISTENT
    return Finding(verdict, f"{ours:.1f}", f"Their 40 / 8 is {theirs:.0f}; the card's "
                   f"{device(40):.1f} GB are {ours:.1f} times the real peak "
                   f"({device(40) / peak(FINAL.train, model=OURS):.1f} with the inputs as (delta "
                   "u) x B).", CLOSED)


@check
def deeper_fixes(lab: Lab, claim: Claim) -> Finding:
    before, after = peak(ORIGINAL.train), peak(ORIGINAL.train, checkpointing=True)
    over = after > device(claim.number)
    verdict = HOLDS if over else CAVEAT
    return Finding(verdict, f"{after:.0f} GB with checkpointing", "The smaller step fits, so it "
                   "was enough; but checkpointing each layer alone takes the original step from "
                   f"{before:.0f} to {after:.0f} GB, "
                   f"{'over' if over else 'within'} the device and with all of its "
                   "bytes.", CLOSED)


@check
def fix_fits(lab: Lab, claim: Claim) -> Finding:
    """The original step with the one fix that the claim's identity names."""
    fixed = {
        "fix-checkpointing": lambda: peak(ORIGINAL.train, checkpointing=True),
        "fix-recurrent": lambda: _peak(replace(PUBLISHED, scan_form="recurrent")),
        "fix-d-state-8": lambda: _peak(replace(PUBLISHED, d_state=8)),
    }[claim.id]()
    before = peak(ORIGINAL.train)
    words, source = (_beside(lab, ORIGINAL.train, checkpointing=True)[1:]
                     if claim.id == "fix-checkpointing" else
                     (f" ({_peak(replace(OURS, d_state=8)):.1f} with the inputs as (delta u) x B)",
                      CLOSED) if claim.id == "fix-d-state-8" else ("", CLOSED))
    room = device(claim.number)
    verdict = HOLDS if fixed < 0.9 * room else CAVEAT if fixed < room else FAILS
    close = ", with next to no room" if verdict == CAVEAT else ""
    return Finding(verdict, f"{fixed:.0f} GB", f"Alone it takes the original step's peak from "
                   f"{before:.0f} to {fixed:.0f} GB{words}: "
                   f"{'over' if verdict == FAILS else 'within'} the card's {room:.1f} GB{close}.",
                   source)


def _peak(model: ModelConfig) -> float:
    """Peak GB of the original step with another model."""
    return budget(model, ORIGINAL.train.batch_size, ORIGINAL.train.context, "bf16",
                  "cuda").peak / GB


@check
def both_cuts_needed(lab: Lab, claim: Claim) -> Finding:
    half = peak(replace(ORIGINAL.train, context=ORIGINAL.train.context // 2))
    quarter = peak(replace(ORIGINAL.train, batch_size=ORIGINAL.train.batch_size // 4))
    both = peak(FINAL.train)
    ours = peak(replace(ORIGINAL.train, context=ORIGINAL.train.context // 2), model=OURS)
    room = device(claim.number)
    enough = [name for name, gb in (("the context", half), ("the batch", quarter)) if gb < room]
    verdict = FAILS if both > room else CAVEAT if enough else HOLDS
    alone = f"{' or '.join(enough)} alone would have done" if enough else "neither alone would do"
    if half > room > ours:
        alone += f"; half the context would fit by a hair with (delta u) x B, {ours:.1f} GB"
    return Finding(verdict, f"{half:.1f}, {quarter:.1f} and {both:.1f} GB", f"Half the context "
                   f"alone would need {half:.1f} GB, a quarter of the batch alone {quarter:.1f} "
                   f"GB, both {both:.1f} GB, where the card has {room:.1f}: {alone}.",
                   CLOSED)


@check
def bf16_shadows(lab: Lab, claim: Claim) -> Finding:
    scan32, scan16 = (kept(ORIGINAL.train, a, "scan") / GB for a in ("fp32", "bf16"))
    all32, all16 = (kept(ORIGINAL.train, a) / GB for a in ("fp32", "bf16"))
    verdict = HOLDS if all16 > all32 + 0.01 else FAILS
    return Finding(verdict, f"{all16 - all32:+.1f} GB", f"Autocast adds no copies of the scan's "
                   f"tensors ({scan16:.1f} GB with it, {scan32:.1f} without), and the activations "
                   f"that it makes bf16 are smaller: {all16:.1f} GB are kept in all, {all32:.1f} "
                   "without autocast.", CLOSED)


@check
def tensor_per_layer(lab: Lab, claim: Claim) -> Finding:
    one = full_tensor(ORIGINAL.train) / GB
    layer = lab["kept.full_tensors"] * one
    verdict = HOLDS if near(layer, claim.number, 0.1) else (
        INCONSISTENT if near(one, claim.number, 0.02) else FAILS)
    return Finding(verdict, f"{one:.2f} GB a tensor, {layer:.1f} GB a layer", f"64 x 2048 x 384 x "
                   f"16 x 4 B is {one:.2f} GB for one tensor; a layer keeps "
                   f"{lab['kept.full_tensors']:.0f} of them, as the document says elsewhere.")


@check
def stale_configuration(lab: Lab, claim: Claim) -> Finding:
    final, quoted = full_tensor(FINAL.train) / GB, claim.number
    verdict = HOLDS if near(final, quoted, 0.05) else INCONSISTENT
    return Finding(verdict, f"{final:.2f} GB", f"'Our config' is 16 x 1024 by then, where the "
                   f"tensor is {final:.2f} GB; {quoted:.1f} GB belongs to the configuration that "
                   "was given up.")


@check
def smaller_in_bf16(lab: Lab, claim: Claim) -> Finding:
    scan32, scan16 = (kept(ORIGINAL.train, a, "scan") / GB for a in ("fp32", "bf16"))
    all32, all16 = (kept(ORIGINAL.train, a) / GB for a in ("fp32", "bf16"))
    verdict = FAILS if near(scan16, scan32, 0.02) else HOLDS
    return Finding(verdict, f"{scan32:.1f} -> {scan16:.1f} GB", "exp, cumsum and what they meet "
                   f"stay float32 under autocast: the scan keeps {scan16:.1f} of {scan32:.1f} GB, "
                   f"and everything together {all16:.1f} of {all32:.1f} GB.", CLOSED)


@check
def linear_memory(lab: Lab, claim: Claim) -> Finding:
    length, channels, states = (lab[f"kept.twice_{n}"] for n in ("length", "channels", "states"))
    linear = near(length, 2, 0.1) and near(states, 2, 0.1)
    verdict = FAILS if not linear else HOLDS if near(channels, 1, 0.1) else INCONSISTENT
    return Finding(verdict, f"x {channels:.1f} for twice d_inner", f"Twice n keeps {length:.1f} "
                   f"times the bytes and twice d_state {states:.1f}, but so does twice d_inner "
                   f"({channels:.1f}): O(n d_inner d_state), as the same sentence has it for time "
                   "and the document's own (B, L, d_inner, d_state) for the tensors that are kept. "
                   "A fused kernel keeps O(n d_inner).")


@check
def convolution_state(lab: Lab, claim: Claim) -> Finding:
    ours, error = lab["streaming.tail_inputs"], lab["streaming.step_error"]
    right = error < 1e-4
    verdict = HOLDS if ours == claim.number else CAVEAT if right and ours < claim.number else FAILS
    return Finding(verdict, f"{ours:.0f} inputs", f"A kernel of 4 needs the current input and "
                   f"{ours:.0f} before it: with {ours:.0f} kept, streaming equals the parallel "
                   f"pass to {error:.0e}. Four works too and holds one that is not read.")


@check
def ssm_state(lab: Lab, claim: Claim) -> Finding:
    ours = (lab["streaming.ssm_channels"], lab["streaming.ssm_states"])
    verdict = HOLDS if ours == claim.range else FAILS
    return Finding(verdict, f"{ours[0]:.0f} x {ours[1]:.0f}", f"The running state of a layer is "
                   f"{ours[0]:.0f} x {ours[1]:.0f} float32, "
                   f"{4 * ours[0] * ours[1] / 1024:.0f} KiB.")


@check
def constant_state(lab: Lab, claim: Claim) -> Finding:
    few, many = lab["streaming.state_bytes_16"], lab["streaming.state_bytes_512"]
    return Finding(HOLDS if few == many else FAILS, f"{many:,.0f} B", f"{few:,.0f} bytes after 16 "
                   f"bytes of text and {many:,.0f} after 512.")


@check
def tiny_state(lab: Lab, claim: Claim) -> Finding:
    ssm = sum(state_bytes(FINAL.model, 1024).values())
    attention = replace(FINAL.model, layer_pattern="A", attention_window=2**21)
    cache = sum(state_bytes(attention, 1024).values())
    crossover = ssm / (cache / 1024)
    verdict = HOLDS if cache > 10 * ssm else CAVEAT if cache > ssm else FAILS
    return Finding(verdict, f"{ssm / 1024:.0f} KiB against {cache / 1024:.0f} KiB", f"Attention of "
                   f"the same width caches {cache / ssm:.0f} times as much after 1024 bytes; the "
                   f"SSM state is the larger one only for the first {crossover:.0f} bytes.", CLOSED)


@check
def no_window(lab: Lab, claim: Claim) -> Finding:
    same = lab["streaming.state_bytes_16"] == lab["streaming.state_bytes_512"]
    if not same:
        return Finding(FAILS, None, "The state grows with the bytes seen.")
    source = lab.value("ablation", "drift_ssm", most="stream_bytes")
    seen = lab.value("ablation", "drift_position", most="stream_bytes")
    drift = (" Whether quality lasts past the training windows is measured by study ablation."
             if source is None else
             f" A stream of {float(seen.what) if seen else 0:,.0f} bytes drifts by "
             f"{float(source.what):+.4f} bits a byte from fresh windows of the training length.")
    lasts = source is None or float(source.what) < 0.05
    return Finding(HOLDS if lasts else CAVEAT, "constant state", "Nothing is cached, so nothing is "
                   f"trimmed; but training windows end at {FINAL.train.context} bytes.{drift}",
                   source.text if source else "computed here")
