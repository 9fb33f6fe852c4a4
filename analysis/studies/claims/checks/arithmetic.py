"""Checks that only calculate: counts from the configuration, products, ratios, ranges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    OPEN,
    Claim,
    Finding,
    check,
    compare,
    near,
    sig,
)
from analysis.theory.flops import flops_per_byte
from mambabyte.config import PRESETS, ModelConfig, TrainConfig, get_preset
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train.schedule import learning_rate
from mambabyte.train.smoke import SMOKE_BYTES, is_smoke

FINAL, ORIGINAL = PRESETS["mamba_byte"], PRESETS["mamba_byte_original"]
CHUNK = 32
FOX_BYTES = len("the quick brown fox jumps over the lazy dog. ") * 200


def trained_bytes(recipe: TrainConfig) -> int:
    """Bytes that a recipe reads: batch x context x steps."""
    return recipe.batch_size * recipe.context * recipe.n_steps


def _count(lab: Lab, claim: Claim, ours: float, what: str, tolerance: float = 0.005) -> Finding:
    """The usual judgement of a number that was counted: exact up to the digits quoted."""
    verdict = compare(ours, claim.number, holds=tolerance, caveat=5 * tolerance)
    return Finding(verdict, f"{ours:,.10g}", f"{what} {ours:,.10g}; quoted as {claim.theirs}.")


# ------------------------------------------------------------------------------- configuration


@check
def parameters(lab: Lab, claim: Claim) -> Finding:
    n = sum(p.numel() for p in ByteLM(FINAL.model).parameters())
    return _count(lab, claim, n, "The model built from the table has this many parameters:")


@check
def table_gives_count(lab: Lab, claim: Claim) -> Finding:
    """Do the six values give the quoted count, and would others?"""
    names = ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand")
    given: dict[str, Any] = dict(zip(names, map(int, claim.numbers), strict=True))
    quoted = 1.06e6

    def count(**changed: Any) -> int:
        return replace(FINAL.model, **{**given, **changed}).n_parameters

    try:
        ours = count()
    except UserError as error:
        return Finding(INCONSISTENT, None, f"No model has these values: {error}.")
    loose = [name for name in names
             if round(count(**{name: given[name] + 1}) / 1e6, 2) == quoted / 1e6]
    verdict = HOLDS if round(ours / 1e6, 2) == quoted / 1e6 else INCONSISTENT
    unseen = f" (the count does not tell {', '.join(loose)} from one more)" if loose else ""
    return Finding(verdict, f"{ours:,} parameters", f"Together they give {ours:,} parameters, "
                   f"quoted as 1.06M{unseen}.")


@check
def halved_and_quartered(lab: Lab, claim: Claim) -> Finding:
    context, half, batch, quarter = claim.numbers
    right = context == 2 * half and batch == 4 * quarter
    same = (half, quarter) == (FINAL.train.context, FINAL.train.batch_size)
    return Finding(HOLDS if right and same else INCONSISTENT,
                   f"{context / half:g} and {batch / quarter:g}",
                   f"{context:.0f} / {half:.0f} is {context / half:g} and {batch:.0f} / "
                   f"{quarter:.0f} is {batch / quarter:g}.", "arithmetic on the stated numbers")


@check
def smoke_parameters(lab: Lab, claim: Claim) -> Finding:
    n = PRESETS["smoke"].model.n_parameters
    verdict = HOLDS if round(n / 1e6, 2) == claim.number else FAILS
    return Finding(verdict, f"{n:,}", f"The smoke model has {n:,} parameters, which rounds to "
                   f"{n / 1e6:.2f} M.")


@check
def inner_width(lab: Lab, claim: Claim) -> Finding:
    return _count(lab, claim, FINAL.model.d_inner, "expand x d_model is")


@check
def step_rank(lab: Lab, claim: Claim) -> Finding:
    return _count(lab, claim, FINAL.model.dt_rank_value, "ceil(d_model / 16) is")


@check
def schedule(lab: Lab, claim: Claim) -> Finding:
    steps = FINAL.train.n_steps
    peak = max(range(steps), key=lambda s: learning_rate(s, FINAL.train)) + 1
    last = learning_rate(steps - 1, FINAL.train) / FINAL.train.lr
    verdict = HOLDS if near(peak / steps, claim.number, 0.01) and last < 1e-3 else FAILS
    coded = lab.published("first_code")
    idle = coded is not None and coded["first_rate"] == 0
    return Finding(verdict, f"peak at step {peak}, end at {last:.0e} of it",
                   f"A linear warm-up over {peak} of {steps} steps is {peak / steps:.1%}, and the "
                   f"cosine ends at {last:.0e} of the peak."
                   + (" In the published script the first step has rate 0 and changes nothing; of "
                      "smoke mode's two steps that is one." if idle else ""))


@check
def identifiers(lab: Lab, claim: Claim) -> Finding:
    stated, identifier = (int(n) for n in claim.range)
    year, month = 2000 + identifier // 100, identifier % 100
    verdict = HOLDS if year == stated else CAVEAT if stated == year + 1 else FAILS
    words = "" if verdict != CAVEAT else f"; {stated} is the year of its conference version"
    return Finding(verdict, f"{year}-{month:02d}", "An arXiv identifier begins with year and "
                   f"month: this one was posted in {year}-{month:02d}{words}.")


# --------------------------------------------------------------------------------------- tokens


@check
def final_tokens(lab: Lab, claim: Claim) -> Finding:
    n = trained_bytes(FINAL.train)
    verdict = compare(n, claim.number, holds=0.01, caveat=0.05)
    return Finding(verdict, f"{n / 1e6:.1f} M", f"16 x 1024 x 4000 is {n:,} bytes, "
                   f"{n / 1e6:.1f} M (or {n / 2**20:.1f} Mi).")


@check
def original_tokens(lab: Lab, claim: Claim) -> Finding:
    n = trained_bytes(ORIGINAL.train)
    verdict = compare(n, claim.number, holds=0.01, caveat=0.05)
    return Finding(verdict, f"{n / 1e6:.1f} M", f"64 x 2048 x 1500 is {n:,} bytes.")


@check
def token_ratio(lab: Lab, claim: Claim) -> Finding:
    ratio = trained_bytes(ORIGINAL.train) / trained_bytes(FINAL.train)
    return Finding(compare(ratio, claim.number, holds=0.05, caveat=0.2), f"{ratio:.2f}",
                   f"The planned run reads {ratio:.2f} times the bytes of the final one.")


@check
def steps_recover(lab: Lab, claim: Claim) -> Finding:
    before = 1500 * FINAL.train.batch_size * FINAL.train.context
    planned, now = trained_bytes(ORIGINAL.train), trained_bytes(FINAL.train)
    verdict = HOLDS if now >= planned else CAVEAT if now > before else FAILS
    return Finding(verdict, f"{before / planned:.1%} -> {now / planned:.1%}",
                   f"With 1500 steps {before / planned:.1%} of the planned bytes would be read, "
                   f"with 4000 {now / planned:.1%}; all of them take "
                   f"{planned // (FINAL.train.batch_size * FINAL.train.context):,} steps.")


@check
def longer_context(lab: Lab, claim: Claim) -> Finding:
    theirs, baseline = claim.range
    ours = FINAL.train.context
    verdict = HOLDS if ours >= theirs else INCONSISTENT
    return Finding(verdict, f"{ours}", f"The configuration that is run has a context of {ours}, "
                   f"against {baseline:.0f} of the transformer it is to surpass.")


@check
def smaller_step(lab: Lab, claim: Claim) -> Finding:
    def per_step(recipe: TrainConfig) -> float:
        size = recipe.batch_size * recipe.context
        return size * flops_per_byte(FINAL.model, recipe.context)

    ratio = per_step(ORIGINAL.train) / per_step(FINAL.train)
    return Finding(compare(ratio, claim.number, holds=0.01, caveat=0.1), f"{ratio:.2f}",
                   f"4 x 2 fewer bytes a step, at the same operations a byte: {ratio:.2f} times "
                   "fewer operations.")


# -------------------------------------------------------------------------- exponents and ranges


@check
def logarithm_of_vocabulary(lab: Lab, claim: Claim) -> Finding:
    ours = math.log(256)
    return Finding(compare(ours, claim.number, holds=1e-3), f"{ours:.4f}", f"ln 256 = {ours:.4f}.")


@check
def overflow_threshold(lab: Lab, claim: Claim) -> Finding:
    ours = lab["overflow.log_max"]
    verdict = compare(ours, claim.number, holds=2e-3, caveat=0.03)
    return Finding(verdict, f"{ours:.2f}", "exp leaves float32 above ln(3.4e38) = "
                   f"{ours:.2f}: {claim.theirs} is {'beyond' if claim.number > ours else 'below'} "
                   "the edge.")


@check
def exponential_of_90(lab: Lab, claim: Claim) -> Finding:
    ours = math.exp(90)
    verdict = HOLDS if claim.number <= ours < 10 * claim.number else FAILS
    return Finding(verdict, sig(ours), f"exp(90) = {sig(ours)}; float32 ends at 3.4e38 before it.")


@check
def exponential_of_26(lab: Lab, claim: Claim) -> Finding:
    ours = math.exp(-26)
    return Finding(compare(ours, claim.number, holds=0.05), sig(ours), f"exp(-26) = {sig(ours)}.")


@check
def fastest_decay(lab: Lab, claim: Claim) -> Finding:
    """Inconsistent where it is the smoke configuration's number, wrong where it is neither's."""
    ours, smoke = lab["initial.A_low"], PRESETS["smoke"].model.d_state
    verdict = (HOLDS if near(ours, claim.number, 0.01)
               else INCONSISTENT if near(-smoke, claim.number, 0.01) else FAILS)
    return Finding(verdict, f"{ours:.0f}", f"A = -(1..N) with N = {FINAL.model.d_state} reaches "
                   f"{ours:.0f}; -{smoke} belongs to the smoke configuration (N = {smoke}).")


@check
def step_decay(lab: Lab, claim: Claim) -> Finding:
    ours = FINAL.model.dt_max * lab["initial.A_low"]
    smoke = -FINAL.model.dt_max * PRESETS["smoke"].model.d_state
    verdict = (HOLDS if near(ours, claim.number, 0.01)
               else INCONSISTENT if near(smoke, claim.number, 0.01) else FAILS)
    return Finding(verdict, f"{ours:.1f} (0.1 x 16)", "0.1 x 8 = 0.8, but the document's own A "
                   f"reaches {lab['initial.A_low']:.0f}: {ours:.1f} a step.")


@check
def overflow_length(lab: Lab, claim: Claim) -> Finding:
    limit = lab["overflow.log_max"]
    stated, real = lab["overflow.whole_fails_at_8"], lab["overflow.whole_fails_at_16"]
    model = lab["initial.whole_overflows_at"]
    if near(stated, claim.number, 0.15):
        verdict = HOLDS
    else:
        verdict = INCONSISTENT if near(model, claim.number, 0.15) else FAILS
    return Finding(verdict, f"{stated:.0f} from their numbers, {real:.0f} with A = -16, "
                   f"{model:.0f} in the model",
                   f"At 0.8 a step the scan fails at byte {stated:.0f} ({limit:.1f} / 0.8), at the "
                   f"true 1.6 at byte {real:.0f}, and in the initialised model, whose steps exceed "
                   f"0.1, at byte {model:.0f}: the length fits the code, not the numbers "
                   "beside it.")


@check
def chunk_bound(lab: Lab, claim: Claim) -> Finding:
    theirs = CHUNK * 0.8
    ours = CHUNK * FINAL.model.dt_max * -lab["initial.A_low"]
    verdict = HOLDS if ours <= claim.number * 1.02 else INCONSISTENT
    return Finding(verdict, f"{ours:.1f}", f"32 x 0.8 = {theirs:.1f}, but with A = "
                   f"{lab['initial.A_low']:.0f} it is {ours:.1f}, and cs itself is negative.")


@check
def range_of_exp_cs(lab: Lab, claim: Claim) -> Finding:
    """The number is the exponent of the range's lower end."""
    exponent = CHUNK * FINAL.model.dt_max * -lab["initial.A_low"]
    verdict = HOLDS if exponent <= claim.number * 1.02 else FAILS
    return Finding(verdict, f"[{sig(math.exp(-exponent))}, 1]", "exp(cs) is at most 1; with A = "
                   f"{lab['initial.A_low']:.0f} its lower end at dt = 0.1 is exp(-{exponent:.1f}) "
                   f"= {sig(math.exp(-exponent))}.")


@check
def range_of_exp_inner(lab: Lab, claim: Claim) -> Finding:
    steps = (CHUNK - 1) * FINAL.model.dt_max
    theirs, ours = math.exp(steps * 8), math.exp(steps * -lab["initial.A_low"])
    verdict = HOLDS if ours <= claim.range[1] * 1.01 else FAILS
    return Finding(verdict, f"[1, {sig(ours)}]", "log_decay - cs is minus the sum of the earlier "
                   "log-decays, which is positive: the factor lies in [1, "
                   f"{sig(theirs)}] by their numbers and reaches {sig(ours)} with A = "
                   f"{lab['initial.A_low']:.0f}.")


@check
def length_80(lab: Lab, claim: Claim) -> Finding:
    chunks = math.ceil(claim.number / CHUNK)
    return Finding(HOLDS if chunks > 1 else FAILS, f"{chunks} chunks",
                   f"{claim.number:.0f} steps in chunks of {CHUNK} are {chunks} chunks.")


# --------------------------------------------------------------------------------- smoke and fox


@check
def smoke_threshold(lab: Lab, claim: Claim) -> Finding:
    size, threshold = claim.range
    works = is_smoke(int(size)) and threshold == SMOKE_BYTES and not is_smoke(int(threshold))
    return Finding(HOLDS if works else FAILS, f"{size:.0f} < {threshold:,.0f}",
                   f"{size:.0f} training bytes are fewer than {threshold:,.0f}: smoke mode.")


@check
def fox_is_smoke(lab: Lab, claim: Claim) -> Finding:
    size = FOX_BYTES if claim.number == 200 else round(FOX_BYTES * claim.number / 200)
    verdict = HOLDS if size >= SMOKE_BYTES else INCONSISTENT
    return Finding(verdict, f"{size:,} bytes", f"45 characters x {claim.number:.0f} are {size:,} "
                   f"bytes; by the document's rule fewer than {SMOKE_BYTES:,} bytes mean smoke "
                   "mode with 2 steps, so this was not run through its own train().")


# --------------------------------------------------------------------------- operations, baseline


def baseline_model() -> ModelConfig:
    """The public baseline's shape: 6 layers of attention and MLP, width 384."""
    return ModelConfig(d_model=384, n_layer=6, layer_pattern="A", n_head=6, n_kv_head=6,
                       mlp_ratio=4.0)


@check
def parameter_product(lab: Lab, claim: Claim) -> Finding:
    ours = trained_bytes(FINAL.train) * FINAL.model.n_parameters
    return Finding(compare(ours, claim.number, holds=0.02, caveat=0.1), sig(ours),
                   f"The product is {sig(ours)}.")


@check
def product_is_operations(lab: Lab, claim: Claim) -> Finding:
    """Operations by the closed form. A number that is parameters times bytes is one multiply-add of
    the six a parameter takes: right as a measure of size, not as FLOPs."""
    per_byte = flops_per_byte(FINAL.model, FINAL.train.context)
    ours = per_byte * trained_bytes(FINAL.train)
    product = trained_bytes(FINAL.train) * FINAL.model.n_parameters
    verdict = compare(ours, claim.number, holds=0.1, caveat=0.3)
    if verdict == FAILS and near(product, claim.number, 0.02):
        verdict = CAVEAT
    share = claim.number / _baseline_operations(lab)
    return Finding(verdict, sig(ours), f"A byte of training takes {sig(per_byte)} operations, "
                   f"{per_byte / FINAL.model.n_parameters:.1f} per parameter: two a multiply-add, "
                   f"three passes, and the scan; together {sig(ours)}, {ours / claim.number:.1f} "
                   f"times the number given, which is parameters times bytes. As operations it "
                   f"would be {share:.1%} of the baseline's, not 10 %.",
                   f"closed form; baseline: {lab.fact('baseline', 'source')}")


def _baseline_bytes(lab: Lab) -> float:
    return float(lab.fact("baseline", "steps") * lab.fact("baseline", "batch")
                 * lab.fact("baseline", "context"))


def _baseline_operations(lab: Lab) -> float:
    """Operations of the baseline's training, by the closed form."""
    return _baseline_bytes(lab) * flops_per_byte(
        baseline_model(), int(lab.fact("baseline", "context")))


@check
def share_of_baseline(lab: Lab, claim: Claim) -> Finding:
    product = (trained_bytes(FINAL.train) * FINAL.model.n_parameters
               / (_baseline_bytes(lab) * lab.fact("baseline", "parameters")))
    full = (trained_bytes(FINAL.train) * flops_per_byte(FINAL.model, FINAL.train.context)
            / _baseline_operations(lab))
    verdict = compare(full, claim.number, holds=0.25, caveat=0.75)
    return Finding(verdict, f"{full:.1%}", f"By parameters x bytes the share is {product:.1%}, "
                   f"with scan and attention counted {full:.1%}.",
                   f"closed form; baseline: {lab.fact('baseline', 'source')}")


@check
def tied_head(lab: Lab, claim: Claim) -> Finding:
    table = FINAL.model.vocab_size * FINAL.model.d_model
    share = table / FINAL.model.n_parameters
    separate = len({id(p) for n, p in ByteLM(FINAL.model).named_parameters() if "head" in n})
    verdict = CAVEAT if separate == 0 else FAILS
    return Finding(verdict, f"{2 * table:,} -> {table:,}", "Tying halves embedding and head "
                   f"together; the head's own count falls from {table:,} to 0, {share:.1%} of the "
                   "model.")


@check
def compiled_loop(lab: Lab, claim: Claim) -> Finding:
    """Open: what is measured is how large a graph compiling would have had to deal with."""
    context = lab.fact("second_batch", "context")
    layers = get_preset("ssm_1").model.layers.count("M")
    calls = lab["operations.loop_per_step"] * context * layers
    return Finding(OPEN, f"{calls:,.0f} operations", f"Unrolled, the loop of SSM-1 is a graph of "
                   f"{calls:,.0f} operations forward and backward for {context:,} pieces "
                   f"({lab['operations.loop_per_step']:.0f} a step and layer). It would take: "
                   f"{claim.note}", "computed here")


@check
def open_statement(lab: Lab, claim: Claim) -> Finding:
    """A statement about something that cannot be had here; the note says what would decide."""
    return Finding(OPEN, None, f"It would take: {claim.note}", "not measured")
