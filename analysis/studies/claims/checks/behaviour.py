"""Checks of what the model is and does: structure, streaming, smoke mode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.experiments.choices import parts_table
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, Claim, Finding, check, sig
from analysis.studies.claims.recorded import repeated
from mambabyte.model import ByteLM, MambaMixer, mixers
from mambabyte.train.smoke import SMOKE_BYTES, is_smoke


@check
def no_unknown_bytes(lab: Lab, claim: Claim) -> Finding:
    size = FINAL.model.vocab_size
    text = "naïve Ω 漢字 🦊"
    covered = size >= 256 and all(b < size for b in text.encode())
    return Finding(HOLDS if covered else FAILS, f"{size} entries", f"Every byte has one of the "
                   f"{size} embedding rows, so any UTF-8 text can be read.")


@check
def block_structure(lab: Lab, claim: Claim) -> Finding:
    mixer = mixers(ByteLM(FINAL.model), MambaMixer)[0]
    shapes = {"in_proj": tuple(mixer.in_proj.weight.shape),
              "conv1d": tuple(mixer.conv1d.weight.shape),
              "out_proj": tuple(mixer.out_proj.weight.shape)}
    right = shapes == {"in_proj": (768, 192), "conv1d": (384, 1, 4), "out_proj": (192, 384)}
    return Finding(HOLDS if right else FAILS, ", ".join(f"{k} {v}" for k, v in shapes.items()),
                   "Built as drawn the block has these shapes, and four of them give the quoted "
                   "parameter count.")


@check
def all_selective(lab: Lab, claim: Claim) -> Finding:
    spread = {n: lab[f"selectivity.{n}"] for n in ("dt", "B", "C")}
    verdict = HOLDS if min(spread.values()) > 1e-3 else FAILS
    words = ", ".join(f"{n} {v:.0%}" for n, v in spread.items())
    return Finding(verdict, words, f"Over the bytes of a text the untrained model varies them, "
                   f"relative to their size: {words}. A does not vary.")


@check
def norms_and_head(lab: Lab, claim: Claim) -> Finding:
    model = ByteLM(FINAL.model)
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    heads = [n for n, _ in model.named_parameters() if "head" in n]
    right = norms == FINAL.model.n_layer + 1 and not heads
    return Finding(HOLDS if right else FAILS, f"{norms} LayerNorms, {len(heads)} head matrices",
                   "One LayerNorm a block, one at the end and no head of its own agree with the "
                   "quoted parameter count.")


@check
def one_step_per_byte(lab: Lab, claim: Claim) -> Finding:
    calls, error = lab["streaming.calls_per_byte"], lab["streaming.step_error"]
    coded = lab.published("first_code")
    verdict = HOLDS if calls == 1 and error < 1e-4 else FAILS
    names = ("the text does not say how it does" if coded is None else
             f"the published script does not: it can name {coded['names']} alone")
    return Finding(verdict, f"{calls:.0f} call a byte", f"One call a byte reproduces the parallel "
                   f"pass to {sig(error, 1)}. To name a character of several bytes a model must "
                   f"look ahead; {names}.",
                   "computed here" if coded is None else str(coded["source"]))


@check
def smoke_variable(lab: Lab, claim: Claim) -> Finding:
    """Above the threshold, with the variable as the claim writes it and without."""
    with _variable("SMOKE_TEST_ONLY", None):
        without = is_smoke(SMOKE_BYTES)
    with _variable("SMOKE_TEST_ONLY", "1"):
        given = is_smoke(SMOKE_BYTES)
    verdict = HOLDS if given and not without else FAILS
    return Finding(verdict, f"{SMOKE_BYTES:,} bytes: {'on' if given else 'off'} with it, "
                   f"{'on' if without else 'off'} without", "As it is implemented here, and read "
                   "so in the published script.")


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable set, or unset, for as long as the block lasts."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@check
def smoke_runs(lab: Lab, claim: Claim) -> Finding:
    shown = {n: lab[f"smoke.{n}"] for n in ("steps", "context", "batch")}
    right = tuple(shown.values()) == claim.numbers
    return Finding(HOLDS if right else FAILS, ", ".join(f"{n} {v:.0f}" for n, v in shown.items()),
                   "485 bytes start smoke mode with these settings, and it runs to its end.")


@check
def smoke_time(lab: Lab, claim: Claim) -> Finding:
    seconds = lab["smoke.seconds"]
    verdict = HOLDS if seconds < 2 * claim.number else CAVEAT if seconds < 10 else FAILS
    return Finding(verdict, "under 1 s" if seconds < 1 else f"{seconds:.0f} s", "Two training "
                   "steps and scoring, without the start of Python, take "
                   f"{'less than a second' if seconds < 1 else f'{seconds:.0f} s'} on this CPU.")


@check
def depends_on_input(lab: Lab, claim: Claim) -> Finding:
    spread, untrained = lab["gating.dt_spread"], lab["selectivity.dt"]
    found = repeated(lab, "parts", parts_table)
    lost = found.column("without selection, bits/byte")
    verdict = FAILS if spread < 1.05 else HOLDS if min(lost) > 0 else CAVEAT
    shown = f"{min(lost):+.3f}" + (f" to {max(lost):+.3f}" if len(lost) > 1 else "")
    return Finding(verdict, f"x {spread:.1f}", f"After a short training the longest step that a "
                   f"channel takes on held-out text is {spread:.1f} times its shortest (median; a "
                   f"fixed transition has 1; untrained it varies by {untrained:.0%}), and with "
                   f"transitions that do not see the input the model is {shown} bits a byte off "
                   f"after {found.steps:,} steps ({found.seeds}).", found.source)


@check
def crashes_are_incidental(lab: Lab, claim: Claim) -> Finding:
    runs = lab["crashed.ssm_2"] and lab["crashed.ssm_3"]
    return Finding(CAVEAT if runs else FAILS, "both run" if runs else "one fails", "Read as 2:1 "
                   f"and 3:1, both {'train' if runs else 'do not train'} a step here with finite "
                   "loss and gradient. Their logs would be needed to say why they crashed there.")
