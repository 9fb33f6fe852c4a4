"""Checks that read what the documents' authors published beside them: run, code, leaderboard.

These are outside facts (data/claims.toml), not measurements of this project; every finding that
rests on one names its source.
"""

from __future__ import annotations

import math

import torch

from analysis.studies.claims.checks.arithmetic import FINAL
from analysis.studies.claims.lab import Lab
from analysis.studies.claims.ledger import (
    CAVEAT,
    FAILS,
    HOLDS,
    INCONSISTENT,
    OPEN,
    Claim,
    Finding,
    FirstRun,
    check,
    compare,
    near,
)
from mambabyte.model import ByteLM
from mambabyte.train.optim import roles


def first_run(lab: Lab) -> FirstRun | None:
    """The run of facts.first_run in derived numbers, or None where the ledger has none."""
    facts = lab.published("first_run")
    if facts is None:
        return None
    steps, elapsed, losses = (list(facts[key]) for key in ("steps", "elapsed_s", "losses"))
    # From the second line of the log on: the first step pays for starting up.
    pace = (elapsed[-1] - elapsed[1]) / (steps[-1] - steps[1])
    lost = [s for s, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    kept = [s for s, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    seconds, joules = float(facts["seconds"]), float(facts["joules"])
    done = min(int(steps[-1] + (seconds - elapsed[-1]) / pace), FINAL.train.n_steps)
    return FirstRun(
        1e3 * pace, done, joules, seconds,
        joules / seconds, float(kept[-1]), float(lost[0]) if lost else math.inf, float(losses[0]),
        str(facts["disqualified"]), str(facts["gpu"]), str(facts["source"]))


# ------------------------------------------------------------------------------- its whole run


@check
def disqualified(lab: Lab, claim: Claim) -> Finding:
    run = first_run(lab)
    if run is None:
        return Finding(OPEN, None, "It would take a run of the system under the task's rules, for "
                       "which 300 s of a GPU are enough.", "not measured")
    if not run.disqualified:
        return Finding(FAILS, None, "The authors' own run was not disqualified.", run.source)
    clock = "time" in run.disqualified
    return Finding(CAVEAT if clock else HOLDS, f"disqualified: {run.disqualified}",
                   f"It was disqualified, {'by the clock and not' if clock else ''} by the floor: "
                   f"the authors' own run on an {run.gpu} was stopped after {run.seconds:.0f} s at "
                   f"step {run.steps_done} of {FINAL.train.n_steps}, its loss lost by step "
                   f"{run.first_lost_step:.0f}.", run.source)


@check
def trained_tokens(lab: Lab, claim: Claim) -> Finding:
    run = first_run(lab)
    if run is None:
        return Finding(OPEN, None, "It would take the log of the authors' run.", "not measured")
    seen = run.steps_done * FINAL.train.batch_size * FINAL.train.context
    verdict = compare(seen, claim.number, holds=0.05, caveat=0.2)
    return Finding(verdict, f"{seen / 1e6:.1f} M", f"That is the plan. The authors' own run took "
                   f"{run.ms_per_step:.0f} ms a step and was stopped after about "
                   f"{run.steps_done} steps: {seen / 1e6:.1f} M bytes.", run.source)


@check
def implied_power(lab: Lab, claim: Claim) -> Finding:
    low_joules, high_joules, low_s, high_s, joules, seconds = claim.numbers
    stated = 1e3 * low_joules / low_s, 1e3 * high_joules / high_s
    baseline = joules / seconds
    run = first_run(lab)
    power = baseline if run is None else run.watts
    verdict = HOLDS if near(min(stated), power, 0.2) and near(max(stated), power, 0.2) else (
        INCONSISTENT if max(stated) < 0.8 * baseline else FAILS)
    more = "" if run is None else f" The authors' own run drew {run.watts:.0f} W."
    return Finding(verdict, f"{min(stated):.0f} to {max(stated):.0f} W", f"{low_joules:g} kJ in "
                   f"{low_s:g} s and {high_joules:g} kJ in {high_s:g} s are {min(stated):.0f} to "
                   f"{max(stated):.0f} W; the baseline quoted beside them drew {baseline:.0f} W."
                   f"{more}", "arithmetic on the stated numbers" if run is None else run.source)


# ------------------------------------------------------------------------------ the leaderboard


@check
def published_baseline(lab: Lab, claim: Claim) -> Finding:
    """``theirs`` ends in the unit, which says which of the leaderboard's columns is meant."""
    facts = lab.fact("leaderboard", "modded_nanogpt")
    column = {"J": "joules", "s": "seconds"}.get(claim.theirs.split()[-1], "accuracy")
    found = [float(row[column]) for row in facts]
    closest = min(found, key=lambda x: abs(x - claim.number))
    verdict = compare(closest, claim.number, holds=0.01, caveat=0.15)
    digits = ".4f" if column == "accuracy" else ",.0f"
    unit = {"joules": " J", "seconds": " s"}.get(column, "")
    shown = ", ".join(f"{x:{digits}}" for x in found) + unit
    cell, words = _ours(lab, "modded_nanogpt", column)
    return Finding(verdict, cell or shown, f"Runs that are published have {shown}; the nearest is "
                   f"{abs(closest / claim.number - 1):.1%} away from {claim.theirs}.{words}",
                   str(lab.fact("leaderboard", "source")))


@check
def published_leader(lab: Lab, claim: Claim) -> Finding:
    found = float(lab.fact("leaderboard", "nano_plus_ngram_accuracy"))
    verdict = compare(found, claim.number, holds=0.001, caveat=0.01)
    cell, words = _ours(lab, "nano_plus_ngram", "accuracy")
    return Finding(verdict, cell or f"{found:.4f}", f"A later submission of the same authors notes "
                   f"{found:.4f} for it.{words}", str(lab.fact("leaderboard", "source")))


def _ours(lab: Lab, system: str, column: str) -> tuple[str, str]:
    """Our own number of a system of the leaderboard: cell and sentence, empty where unmeasured."""
    found = lab.task(system)
    column = {"accuracy": "valid_accuracy"}.get(column, column)
    if found is None or column not in found.what or found.what[column].isna().any():
        return "", ""
    value = float(found.what[column].astype(float).mean())
    unit = {"joules": " J", "seconds": " s"}.get(column, "")
    text = f"{value:.4f}" if column == "valid_accuracy" else f"{value:,.0f}{unit}"
    return f"{text} on {found.machine}", (f" Our implementation of the recipe has {text} on "
                                          f"{found.machine}, on another training text.")


# ------------------------------------------------------------------------------ image and code


@check
def image_contents(lab: Lab, claim: Claim) -> Finding:
    version, packages = str(lab.fact("image", "torch")), list(lab.fact("image", "packages"))
    right = version in claim.theirs and not any("mamba" in p for p in packages)
    return Finding(HOLDS if right else FAILS, f"torch {version}, {len(packages)} packages",
                   f"The image is built with torch {version} and "
                   f"{', '.join(p for p in packages if p != 'torch')}; mamba-ssm is "
                   f"{'not among them' if right else 'among them'}.",
                   str(lab.fact("image", "source")))


@check
def bound_to_torch(lab: Lab, claim: Claim) -> Finding:
    parts = list(lab.fact("mamba_ssm", "wheels_named_by"))
    bound = any("torch" in p for p in parts) and any("ABI" in p for p in parts)
    return Finding(HOLDS if bound else FAILS, ", ".join(parts), f"Its ready-made wheels are named "
                   f"by version of {', '.join(parts)}: {'each' if bound else 'none'} fits one "
                   "torch and one ABI, and where none fits the source is compiled against the "
                   "torch that is there.", str(lab.fact("mamba_ssm", "source")))


@check
def installing(lab: Lab, claim: Claim) -> Finding:
    low, high = claim.range
    build = float(lab.fact("mamba_ssm", "build_seconds"))
    verdict = HOLDS if low <= build <= high else CAVEAT if build > high else FAILS
    return Finding(verdict, f"about {build:.0f} s to build", f"Building its extension from source "
                   f"for one architecture took about {build:.0f} s, {build / 300:.0%} of the 300 s "
                   f"cap; {low:.0f} to {high:.0f} s can only be a download of a ready-made wheel, "
                   "which was not timed. The reason stands, the number is low.",
                   str(lab.fact("mamba_ssm", "build_source")))


@check
def recipe_as_coded(lab: Lab, claim: Claim) -> Finding:
    """The table's optimizer against the published script's and against ours."""
    lr, beta1, beta2, decay, clip = claim.numbers
    coded = lab.published("first_code")
    ours = (FINAL.train.lr, *FINAL.train.betas, FINAL.train.weight_decay, FINAL.train.grad_clip)
    given = (lr, beta1, beta2, decay, clip)
    theirs = given if coded is None else (
        coded["lr"], *coded["betas"], coded["weight_decay"], coded["grad_clip"])
    right = all(near(float(a), b, 1e-9) for a, b in zip(theirs, given, strict=True))
    model = ByteLM(FINAL.model)
    of = roles(model)
    free = sum(p.numel() for n, p in model.named_parameters() if of[n] == "free")
    verdict = (HOLDS if tuple(ours) == given else CAVEAT) if right else INCONSISTENT
    return Finding(verdict, f"{free:,} parameters undecayed", "The published script has the same "
                   f"five numbers. What the table leaves out: A_log, D, biases and norms, "
                   f"{free:,} parameters, are not decayed; convolution taps, step-size projection "
                   "and the tied embedding are.",
                   "computed here" if coded is None else str(coded["source"]))


@check
def batch_first_carry(lab: Lab, claim: Claim) -> Finding:
    """What ``h[-1]`` and ``h[:, -1]`` pick from states of layout (batch, time, channel, state)."""
    batch, time, channels, states = 2, 5, 3, 4
    h = torch.arange(batch * time * channels * states).view(batch, time, channels, states)
    first, second = h[-1], h[:, -1]
    same = first.shape == second.shape and bool((first == second).all())
    axes: dict[tuple[int, ...], str] = {
        (batch, channels, states): "the last step of every sequence",
        (time, channels, states): "every step of the last sequence"}
    return Finding(HOLDS if same else INCONSISTENT,
                   f"{tuple(first.shape)} and {tuple(second.shape)}", "On states of shape (batch, "
                   f"time, channel, state) h[-1] is {axes[tuple(first.shape)]} and h[:, -1] "
                   f"{axes[tuple(second.shape)]}. The published script has the second, which is "
                   "right; the first is right only if time comes first.")


# -------------------------------------------------------------------------- the second document


def _fits_the_review(lab: Lab, lines: tuple[float, ...]) -> bool:
    """Whether the scan and the class have, in the published file, the lines that were quoted of the
    reviewed one: first and last of each."""
    first, last, class_first, class_last = lines
    quoted = (last - first + 1, class_first - last - 1, class_last - class_first + 1)
    return quoted == tuple(lab.fact("second_script", name) for name in (
        "scan_lines", "lines_between", "class_lines"))


def _same_file(lab: Lab, claim: Claim) -> str:
    """A sentence on the reviewed file where the claim has the quoted lines."""
    return " By the lines that the author quotes of it, the file that was reviewed is this one." \
        if len(claim.numbers) == 4 and _fits_the_review(lab, claim.numbers) else ""


@check
def quoted_lines(lab: Lab, claim: Claim) -> Finding:
    first, last, class_first, class_last = (int(n) for n in claim.numbers)
    fits = _fits_the_review(lab, claim.numbers)
    scan, between, whole = (lab.fact("second_script", name) for name in (
        "scan_lines", "lines_between", "class_lines"))
    return Finding(HOLDS if fits else FAILS, f"{scan}, {between} and {whole} lines", f"In the "
                   f"published script the loop over time steps has {scan} lines, {between} follow "
                   f"before HybridBlock, which has {whole}; {first}-{last} and {class_first}-"
                   f"{class_last} {'fit that to the line' if fits else 'do not fit that'}.",
                   str(lab.fact("second_script", "source")))


@check
def script_name(lab: Lab, claim: Claim) -> Finding:
    named, audited = claim.theirs.split(" and ")
    stored = str(lab.fact("second_script", "name"))
    verdict = HOLDS if named == audited == stored else INCONSISTENT
    return Finding(verdict, stored, f"The credits name {named}, the review read {audited}; the "
                   f"published folder holds {stored}.{_same_file(lab, claim)} Which of them gave "
                   "3.3168 is not said.", str(lab.fact("second_script", "source")))


@check
def requested_direction(lab: Lab, claim: Claim) -> Finding:
    asked = [str(item) for item in lab.fact("second_requests", "items")]
    found = [item for item in asked if claim.theirs in item]
    return Finding(HOLDS if found else FAILS, "; ".join(found) or "not asked for",
                   f"The competition's README asks for {len(asked)} things that nobody had done, "
                   f"since {lab.fact('second_requests', 'date')}"
                   + (f": among them {found[0]}." if found else "; this is none of them."),
                   str(lab.fact("second_requests", "source")))


@check
def ratio_in_block(lab: Lab, claim: Claim) -> Finding:
    place = str(lab.fact("second_script", "ratio_in"))
    verdict = HOLDS if place == "HybridBlock" else FAILS
    return Finding(verdict, f"in {place}", f"In the published script the ratio is in {place}, "
                   "which tells each block whether it is an SSM block; HybridBlock itself takes "
                   "one flag and knows no ratio.", str(lab.fact("second_script", "source")))


@check
def pure_neural(lab: Lab, claim: Claim) -> Finding:
    parts = list(lab.fact("second_script", "parts"))
    extra = [p for p in parts if any(w in p.lower() for w in ("n-gram", "ttt", "slot", "cache"))]
    return Finding(FAILS if extra else HOLDS, ", ".join(extra or parts), "Read in the published "
                   f"script: {', '.join(parts)}. "
                   f"{'It has ' + ', '.join(extra) if extra else 'None of the three is in it'}; "
                   f"whether the scored run used this file is not shown.{_same_file(lab, claim)}",
                   str(lab.fact("second_script", "source")))


def fast_hybrids(lab: Lab) -> tuple[str, str, bool] | None:
    """Hybrids with fast kernels in the second document's competition: words, source, and whether
    all of them are below its baseline; None where the ledger has none."""
    facts = lab.published("same_competition")
    if facts is None or not facts["hybrids"]:
        return None
    baseline = float(facts["baseline_bpb"])
    words = ", ".join(f"{h['bpb']:.4f} with {h['kernel']} (#{h['pull_request']})"
                      for h in facts["hybrids"])
    below = all(float(h["bpb"]) < baseline for h in facts["hybrids"])
    return (f"others report {words}, where its naive baseline has {baseline:.4f}",
            str(facts["source"]), below)


@check
def kernels_unavailable(lab: Lab, claim: Claim) -> Finding:
    found = fast_hybrids(lab)
    if found is None:
        return Finding(OPEN, None, "It would take an installation of mamba-ssm in the "
                       "competition's environment.", "not measured")
    words, source, _ = found
    return Finding(FAILS, "used by others", f"In the same competition {words}: the kernels could "
                   "be had.", source)
