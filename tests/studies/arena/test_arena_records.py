"""Each headline of the arena's records, worked out once more from the trainings that they hold."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy import stats

from analysis.runs.folders import Run
from analysis.runs.records import load_records
from analysis.studies.arena.values import slug, solved

RECORDS = {name: run for name, run in load_records().items() if run.study == "arena"}


def holding(table: str) -> list[str]:
    """The records that have a table: some are of one part alone."""
    return [name for name, run in RECORDS.items() if table in run.tables]


def tuned_on(run: Run) -> int:
    """Bytes of text on which rates were tuned: the last but one budget, where none is named."""
    budgets = sorted(run.parameters["budgets"])
    return run.parameters.get("tuned_on") or budgets[max(0, len(budgets) - 2)]


def sizes(run: Run) -> list[str]:
    """Where systems were tuned."""
    return [run.parameters["size"], *run.parameters["larger"]]


def best(run: Run) -> pd.DataFrame:
    """By size, budget and system: mean validation bits at the rate with the fewest bits of held-out
    training text, seed 0, at the budget where rates are tuned."""
    cells = run.tables["cells"].frame
    done = cells[cells["status"] == "done"].astype({"chosen_by": float, "valid_bits": float})
    tuning = done[(done["seed"] == 0) & (done["budget"] == tuned_on(run))]
    rates = tuning.loc[tuning.groupby(["size", "system"])["chosen_by"].idxmin()]
    at_best = done.merge(rates[["size", "system", "optimizer", "rate"]])
    return at_best.groupby(["size", "budget", "system"])["valid_bits"].agg(["mean", "count"])


@pytest.mark.parametrize("name", holding("cells"))
def test_bits_are_those_of_the_trainings(name):
    run = RECORDS[name]
    found = best(run)
    assert len(found)
    for row in run.tables["best"].frame.itertuples():
        mine = found.loc[(row.size, row.budget, row.system)]
        assert row.bits_per_byte == pytest.approx(mine["mean"])
        assert row.seeds == mine["count"]
    for size in sizes(run):
        stem, mean = f"at_{slug(size)}", found["mean"].loc[size, tuned_on(run)]
        assert run.values[f"{stem}_best"].value == mean.idxmin()
        assert run.values[f"{stem}_order"].value == ", ".join(mean.sort_values().index)
        assert run.values[f"{stem}_range"].value == pytest.approx(mean.max() - mean.min())
        for system, bits in mean.items():
            assert run.values[f"{stem}_{slug(system)}"].value == pytest.approx(bits)


MIXERS = "MSDKR"


def intervals(size: str, budget: int) -> dict[str, tuple[float, float]]:
    """By system of `h200-arena`: the 95 % interval of its seeds at its best rate."""
    run = RECORDS["h200-arena"]
    rows, cells = run.tables["best"].frame, run.tables["cells"].frame
    found = {}
    for row in rows[(rows["size"] == size) & (rows["budget"] == budget)].itertuples():
        mine = cells[(cells["system"] == row.system) & (cells["budget"] == budget)
                     & (cells["size"] == size) & (cells["optimizer"] == row.optimizer)
                     & (cells["rate"] == row.rate)]
        bits = mine["valid_bits"].astype(float)
        assert len(bits) == 3
        found[row.system] = stats.t.interval(0.95, 2, bits.mean(), stats.sem(bits))
    return found


@pytest.mark.parametrize(("size", "mib", "ahead", "apart"), [
    ("1M", 16, "SDK", "SK"), ("1M", 64, MIXERS, MIXERS), ("10M", 16, MIXERS, "MSDK")])
def test_which_hybrids_are_ahead_is_what_the_decisions_say(size, mib, ahead, apart):
    """Their words name the mixers whose 3:1 hybrid is ahead, and where intervals overlap."""
    ends = intervals(size, mib << 20)
    assert {m for m in MIXERS if sum(ends[m * 3 + "A"]) < sum(ends[m])} == set(ahead)
    assert {m for m in MIXERS if ends[m * 3 + "A"][1] < ends[m][0]} == set(apart)


def test_on_64_mib_attention_is_between_hybrids_and_mixers_alone():
    """All hybrids but SA are ahead of it by more than the interval of seeds in pairs, and it of
    every system without it."""
    frame = RECORDS["h200-arena"].tables["paired"].frame
    rows = frame[(frame["size"] == "1M") & (frame["budget"] == 64 << 20)].set_index("system")
    ends = rows[["low", "high"]].astype(float)
    hybrids = {s for s in ends.index if "A" in s and "/" not in s}
    assert {s for s in ends.index if ends.loc[s, "high"] < 0} == hybrids - {"SA"}
    assert {s for s in ends.index if ends.loc[s, "low"] > 0} == set(ends.index) - hybrids


@pytest.mark.parametrize("name", holding("cells"))
def test_hybrids_are_beside_pure_systems_seed_by_seed(name):
    for size in sizes(RECORDS[name]):
        hybrids_beside_pure(RECORDS[name], size)


def hybrids_beside_pure(run: Run, size: str) -> None:
    frame, cells = run.tables["best"].frame, run.tables["cells"].frame
    stem, part = f"at_{slug(size)}", {}
    rows = frame[(frame["size"] == size) & (frame["budget"] == tuned_on(run))]
    for kind in ("hybrid", "pure"):
        row = rows.set_index("system").loc[run.values[f"{stem}_best_{kind}"].value]
        mine = cells[(cells["system"] == row.name) & (cells["size"] == row["size"])
                     & (cells["budget"] == row["budget"]) & (cells["rate"] == row["rate"])
                     & (cells["optimizer"] == row["optimizer"])]
        part[kind] = mine.set_index("seed")["valid_bits"].astype(float)
    apart = (part["hybrid"] - part["pure"]).dropna()
    if len(apart) < 3:
        assert run.values[f"{stem}_hybrid_minus_pure_range"].value is None
        return
    low, high = stats.t.interval(0.95, len(apart) - 1, apart.mean(), stats.sem(apart))
    assert run.values[f"{stem}_hybrid_minus_pure_range"].value == f"{low:+.4f} to {high:+.4f}"


@pytest.mark.parametrize("name", holding("clamp"))
def test_the_price_of_the_bound_has_its_interval(name):
    run = RECORDS[name]
    bits = run.tables["clamp"].frame.pivot(index="seed", columns="system", values="valid_bits")
    apart = bits["M bounded"] - bits["M"]
    low, high = stats.t.interval(0.95, len(apart) - 1, apart.mean(), stats.sem(apart))
    assert run.values["clamp_price"].value == pytest.approx(apart.mean())
    assert run.values["clamp_price_range"].value == f"{low:+.4f} to {high:+.4f}"


@pytest.mark.parametrize("name", holding("tasks"))
def test_accuracies_are_those_of_the_trainings(name):
    run = RECORDS[name]
    answers = run.tables["answers"].frame
    keys = ["task", "width", "system"]
    first = answers[answers["seed"] == 0].reset_index()
    rates = first.loc[first.groupby(keys)["chosen_by"].idxmin(), [*keys, "rate"]]
    found = answers.merge(rates).groupby([*keys, "size"])["accuracy"].mean()
    for row in run.tables["tasks"].frame.itertuples():
        assert row.accuracy == pytest.approx(found.loc[(row.task, row.width, row.system, row.size)])
    solves = dict.fromkeys(found.index.droplevel("size"), 0)
    for key in solves:
        for size, accuracy in found.loc[key].items():  # smallest first
            if accuracy < 0.95:
                break
            solves[key] = size
    for (task, width, system), size in solves.items():
        assert run.values[f"{slug(task)}_{width}_solves_{slug(system)}"].value == size


def test_a_size_is_solved_only_with_all_smaller_ones():
    rows = pd.DataFrame({"size": [16, 4, 8, 32], "accuracy": [0.2, 0.99, 0.96, 1.0]})
    assert solved(rows) == 8
    assert solved(rows[rows["size"] > 8]) == 0


@pytest.mark.parametrize("name", holding("context"))
def test_what_is_remembered_is_what_the_tables_hold(name):
    run = RECORDS[name]
    frame = run.tables["context"].frame
    for system in dict.fromkeys(frame["system"]):
        bits = dict(frame[frame["system"] == system][["reset_every", "bits_per_byte"]].to_numpy())
        enough = min(every for every, b in bits.items() if b <= min(bits.values()) + 0.01)
        assert run.values[f"context_{slug(system)}"].value == enough


@pytest.mark.parametrize("name", holding("precision"))
def test_bits_lost_are_those_of_the_table(name):
    """And are beside one stream in float32 for each system, whatever the format."""
    run = RECORDS[name]
    frame = run.tables["precision"].frame
    for row in frame.itertuples():
        name = f"lost_{slug(row.system)}_{row.kept}_{row.way}"
        assert run.values[name].value == pytest.approx(row.bits_lost)
        assert run.values[f"{name}_late"].value == pytest.approx(row.bits_lost_last_quarter)
    plain = (frame["bits_per_byte"] - frame["bits_lost"]).groupby(frame["system"])
    assert (plain.max() - plain.min()).max() < 1e-9


@pytest.mark.parametrize("name", holding("units"))
def test_bytes_and_pieces_are_those_of_the_table(name):
    run = RECORDS[name]
    frame = run.tables["units"].frame.set_index(["system", "units", "noise"])
    for system, units, noise in frame.index:
        stem = f"{units}_{slug(system)}_{noise}"
        row = frame.loc[(system, units, noise)]
        assert run.values[f"{stem}_bits"].value == pytest.approx(float(row["bits_per_raw_byte"]))
        assert run.values[f"{stem}_accuracy"].value == pytest.approx(float(row["accuracy"]))


@pytest.mark.parametrize("name", holding("points"))
def test_laws_are_judged_by_the_points_that_were_held_back(name):
    run = RECORDS[name]
    points, cells = (run.tables[name].frame for name in ("points", "cells"))
    seen = cells[cells["seed"] == 0].groupby(["system", "size", "trained_bytes"])["valid_bits"]
    for row in points.itertuples():
        bits = seen.get_group((row.system, row.size, row.trained_bytes))
        assert row.valid_bits in bits.astype(float).tolist()
    for part in run.values["law_best"].value.split("; "):
        size, names = part.split(": ")
        mine = points[points["size"] == size].sort_values("valid_bits")
        first = mine.drop_duplicates("trained_bytes").sort_values("trained_bytes")
        assert names.split(", ") == first["system"].tolist()
    held = [row for row in points.itertuples() if row.held_back]
    assert run.values["law_held_back"].value == len(held) > 0
    assert run.values["law_inside"].value == sum(r.low <= r.valid_bits <= r.high for r in held)
    assert run.values["law_worst_error"].value == pytest.approx(
        max(abs(r.by_the_law - r.valid_bits) for r in held))


@pytest.mark.parametrize("name", holding("cells"))
def test_rate_and_optimizer_are_told_apart_by_the_trainings(name):
    """From the trainings themselves; hybrids, which AdamW never saw, do not count."""
    run = RECORDS[name]
    rows = run.tables["cells"].frame
    first = rows[(rows["budget"] == tuned_on(run)) & (rows["seed"] == 0)
                 & (rows["size"] == run.parameters["size"]) & (rows["status"] == "done")]
    chosen: dict[str, dict[str, float]] = {}
    for (system, optimizer), cells in first.groupby(["system", "optimizer"]):
        best = cells.loc[cells["chosen_by"].astype(float).idxmin(), "valid_bits"]
        chosen.setdefault(system, {})[optimizer] = float(best)
    gains = {s: of["adamw"] - of["muon"] for s, of in chosen.items() if len(of) == 2}
    if not run.parameters["adamw_rates"]:
        assert "muon_gain_most" not in run.values
        return
    most = max(gains, key=gains.__getitem__)
    assert run.values["muon_gain_most_system"].value == most
    assert run.values["muon_gain_most"].value == pytest.approx(gains[most], abs=1e-9)
    assert run.values["muon_ahead"].value == sum(gain > 0 for gain in gains.values())
    assert run.values["tried_with_both"].value == len(gains)
