"""Which trainings are wanted, and what the tables make of those that are done."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.studies.arena import PROFILES, Parameters, family
from analysis.studies.arena.compute import tables
from analysis.studies.arena.outcome import (
    best_table,
    costs_table,
    equal_table,
    tuning_table,
)
from analysis.studies.arena.trainings.plan import (
    Cell,
    Done,
    chosen,
    clamp_cells,
    memory_cells,
    plan,
)
from analysis.studies.arena.values import values
from mambabyte.errors import UserError

P = replace(Parameters(), parts=("text", "long"), systems=("M", "A", "MMMA"), budgets=(1000, 4000),
            context=10, batch_size=10, adamw_rates=(1e-3, 2e-3, 4e-3), muon_rates=(1e-2, 2e-2),
            seeds=2)
OPTIMUM = {"M": 2e-3, "A": 8e-3, "MMMA": 2e-3}


def row(cell: Cell, **more):
    """A made-up training: best at its system's optimum of AdamW, Muon always worse; what is
    validated says the opposite, and must choose nothing."""
    off = abs(math.log2(cell.rate / OPTIMUM[cell.system])) if cell.rate else 0.0
    bits = 2 + 0.1 * off + (cell.optimizer == "muon") - 0.01 * cell.seed + (
        -0.2 if cell.budget == 4000 else 0.0)
    return {**vars(cell), "status": "done", "chosen_by": bits, "valid_bits": 10 - bits,
            "n_parameters": 100, "state_bytes": 8, "seconds": 1.0, "joules": None,
            "train_flops": 5.0 * cell.budget, "trained_bytes": cell.budget, "alone": True,
            "job": "a", "optimizer": cell.optimizer, "ms_per_step": 1.0, **more}


def finished(p=P, change=lambda cell: {}):
    rows = {}
    while todo := [c for c in plan(p, list(rows.values())) if c.name not in rows]:
        for cell in todo:
            rows[cell.name] = row(cell, **change(cell))
    return rows


def test_rates_go_on_beyond_an_end_and_hybrids_stay_around_their_mixers():
    rows = finished()
    tried = {(r["system"], r["optimizer"], r["rate"]) for r in rows.values()}
    assert {rate for s, o, rate in tried if s == "A" and o == "adamw"} == {
        1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2}  # best at 8e-3, with a worse one on either side
    assert {rate for s, o, rate in tried if s == "MMMA"} == {1e-3, 2e-3, 4e-3}
    assert {o for s, o, _ in tried if s == "MMMA"} == {"adamw"}


def test_rates_of_tasks_and_pieces_go_on_beyond_an_end_as_well():
    p = replace(P, parts=("text", "tasks", "scaling", "pieces"), scaling=("tiny",),
                tasks=("parity 4",), task_systems=("M", "A"), task_rates=(1e-3, 2e-3, 4e-3))
    rows = finished(p, lambda cell: {"chosen_by": -cell.rate}
                    if cell.kind in ("parity 4", "pieces") else {}).values()
    tried = {kind: {r["rate"] for r in rows if r["system"] == "A" and r["kind"] == kind}
             for kind in ("parity 4", "pieces")}
    assert tried == {"parity 4": {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2},
                     "pieces": {4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2}}
    assert {r["rate"] for r in rows if r["kind"] == "parity 4" and r["seed"]} == {1.6e-2}


def test_more_seeds_and_the_longer_budget_are_at_the_best_rate_alone():
    rows = finished()
    for name, best in OPTIMUM.items():
        more = {(r["rate"], r["seed"], r["budget"]) for r in rows.values()
                if r["system"] == name and (r["seed"] or r["budget"] == 4000)}
        assert more == {(best, 1, 1000), (best, 0, 4000), (best, 1, 4000)}


def test_the_longer_budget_is_of_the_smallest_tuned_size_alone():
    rows = finished(replace(P, larger=("0.25M",), parts=("text", "long"))).values()
    assert {(r["size"], r["budget"]) for r in rows} == {
        ("tiny", 1000), ("tiny", 4000), ("0.25M", 1000)}


def test_rates_are_tuned_on_the_budget_that_is_named_and_laws_take_all():
    three = replace(P, budgets=(1000, 4000, 9000), tuned_on=1000, scaling=("tiny",),
                    parts=("text", "long", "scaling", "pieces"))
    rows = finished(three)
    budgets = {kind: {r["budget"] for r in rows.values() if r["kind"] == kind}
               for kind in ("text", "pieces")}
    assert budgets == {"text": {1000, 4000, 9000}, "pieces": {9000}}
    assert len({r["rate"] for r in rows.values() if r["budget"] == 1000}) > 3
    for name in ("M", "A"):
        assert {(r["rate"], r["seed"]) for r in rows.values() if r["system"] == name
                and r["kind"] == "text" and r["budget"] == 9000} == {(OPTIMUM[name], 0)}
    with pytest.raises(UserError, match=r"tuned_on is 5: .* 1000, 4000, 9000"):
        replace(three, tuned_on=5)


def test_every_part_has_a_first_answer_before_any_has_more_seeds():
    cells = plan(replace(P, parts=("text", "clamp", "tasks")), list(finished().values()))
    seeds = [cell.seed > 0 for cell in cells]
    assert seeds == sorted(seeds)
    assert {cell.kind for cell in cells if not cell.seed} > {"text", "clamp"}


def test_validation_text_chooses_nothing():
    done = Done(finished().values())
    assert chosen(P, done, "M", "tiny").rate == 2e-3
    table = best_table(P, done)
    assert set(table["rate"]) == {2e-3, 8e-3}
    assert table["seeds"].tolist() == [2] * 6


def test_one_optimizer_alone_may_be_tried():
    muon = replace(P, adamw_rates=(), parts=("text",), muon_rates=(1e-3, 2e-3, 4e-3))
    rows = list(finished(muon).values())
    found = tables(muon, rows)
    assert {row["optimizer"] for row in rows} == {"muon"}
    assert set(found.best["system"]) == {"M", "A", "MMMA"}
    assert found.tuning["single_rate_valid_bits"].isna().all()
    said = values(found, muon)
    assert said["muon_best"].value == 3
    assert not {"single_rate", "muon_gain_least"} & said.keys()


def test_a_diverged_training_is_never_the_best_and_is_counted():
    def diverge(cell):
        return {"status": "diverged", "chosen_by": None} if cell.rate == 2e-3 else {}

    done = Done(finished(change=diverge).values())
    assert chosen(P, done, "M", "tiny").rate in (1e-3, 4e-3)
    assert tuning_table(P, done).set_index("system").loc["M", "diverged"] == 1


def test_a_system_that_always_diverges_is_left_out_and_its_hybrids_with_it():
    def diverge(cell):
        return {"status": "diverged", "chosen_by": None} if "M" in cell.system else {}

    done = Done(finished(change=diverge).values())
    assert set(best_table(P, done)["system"]) == {"A"}


def test_equal_budgets_are_between_two_whole_trainings():
    """M costs twice as much a byte: at equal time A may read twice the text, which is half way from
    the tuning budget to four times that; at a tenth of M's cost it would have to go beyond."""
    done = Done(finished().values())
    costs = pd.DataFrame([
        {"system": s, "optimizer": "adamw", "seconds_per_byte": t, "joules_per_byte": None}
        for s, t in (("M", 2.0), ("A", 1.0), ("MMMA", 0.1))])
    table = equal_table(P, done, costs).set_index(["equal", "system"])
    assert set(table.index.get_level_values(0)) == {"bytes", "time", "operations"}  # no joules
    time = table.loc["time"]
    ends = [best_table(P, done).query("system == 'A' and budget == @b")["bits_per_byte"].iloc[0]
            for b in P.budgets]
    assert time.loc["A", "bytes"] == 2000
    assert time.loc["A", "bits_per_byte"] == pytest.approx(sum(ends) / 2)
    assert time.loc["MMMA", "bits_per_byte"] is None
    assert time.loc["M", "bytes"] == 1000
    assert time.loc["A", "low"] is None  # of two seeds

    three = replace(P, seeds=3)
    noisy = Done(finished(three, lambda cell: {"valid_bits": cell.seed**2 + cell.budget / 1000})
                 .values())
    row = equal_table(three, noisy, costs).set_index(["equal", "system"]).loc[("time", "A")]
    middle = [2.5, 3.5, 6.5]  # each seed half way between its two
    low, high = stats.t.interval(0.95, 2, np.mean(middle), stats.sem(middle))
    assert (row["bits_per_byte"], row["low"], row["high"]) == pytest.approx((12.5 / 3, low, high))


def test_costs_are_of_one_job_and_measured_where_nothing_runs_beside():
    p = replace(P, parts=("text", "costs"))
    cells = [c for c in plan(p, list(finished().values())) if c.kind == "costs"]
    assert [(c.system, c.optimizer) for c in cells] == [("M,A,MMMA", "adamw")]
    assert plan(replace(p, workers=2, parts=("costs",)), list(finished().values())) == []
    assert plan(replace(p, parts=("costs",)), []) == []  # the optimizer is not known yet

    def costs(system, job, *names):
        cell = replace(cells[0], system=system)
        return {**vars(cell), "status": "done", "job": job, "costs": [
            {"system": name, "ms_per_step": 1.0, "low": 0.9, "high": 1.1, "seconds_per_byte": 2.0,
             "joules_per_byte": None} for name in names]}

    rows = [costs("M,A,MMMA", "a", "M", "A", "MMMA"), costs("M", "b", "M")]
    table = costs_table(p, Done(rows))
    assert table["system"].tolist() == ["M", "A", "MMMA"]  # of two jobs there is no ratio
    assert set(table["job"]) == {"a"}


def test_nobody_is_first_at_equal_cost_while_others_are_not_read_there():
    """M alone was trained on the long budget, and is not what costs most a byte."""
    def change(cell):
        return {"train_flops": {"M": 5.0, "A": 5.0, "MMMA": 6.0}[cell.system] * cell.budget}

    rows = list(finished(change=change).values())
    found = values(tables(P, rows), P)
    assert found["equal_operations_best"].value is not None
    less = [r for r in rows if r["budget"] == P.budgets[0] or r["system"] == "M"]
    found = values(tables(P, less), P)
    assert found["equal_operations_best"].value is None
    assert found["equal_operations_beyond"].value == 1
    assert (found["at_tiny_systems"].value, found["at_tiny_long_systems"].value) == (3, 1)


def test_what_a_folder_has_of_other_budgets_and_rates_is_in_no_table():
    """A folder may have been tuned on another budget, or at fewer rates, before."""
    p = replace(P, parts=("text", "memory", "clamp", "pieces", "tasks"), task_steps=10)
    unit = {"units": "bytes", "noise": "none", "accuracy": 0.5}
    looked = {"memory": {"context": [{"reset_every": 32, "bits_per_byte": 2.0}]},
              "noise": {"units": [unit | {"bits_per_raw_byte": 2.0}]},
              "clamp": {"followed": [{"step": 0, "largest": 1.0, "largest_in_chunk": 2.0}],
                        "onset_seen": None, "onset_predicted": None, "steps": 1}}
    mine = [row(c, **looked["memory"]) for c in memory_cells(p, Done(finished().values()))]
    mine += [row(replace(c, system="M"), **looked["clamp"]) | {"system": c.system}
             for c in clamp_cells(p, Done(finished().values()))]
    mine += [row(Cell("noise", "M", "tiny", "adamw", 2e-3, seed, 4000), **looked["noise"])
             for seed in (0, 1)]
    mine.append({**vars(Cell("recall 4", "A", "32", "adamw", 4e-3, 0, 10)), "status": "done",
                 "chosen_by": 0.5, "n_parameters": 1, "accuracies": [
                     {"task": "recall", "unit": "pairs", "size": 4, "accuracy": 0.5, "chance": 0.2,
                      "trained": True, "steps": 10, "state_bytes": 1}]})
    others = [{**one, "budget": 9 * one["budget"], "chosen_by": 0.0} for one in mine]
    others += [{**one, "rate": 1.0} for one in mine if one["kind"] in ("memory", "clamp")]
    others += [{**one, "optimizer": "muon", "seed": 1} for one in mine if one["kind"] == "noise"]
    alone, beside = (tables(p, [*finished().values(), *more]) for more in (mine, mine + others))
    for name in ("context", "clamp", "followed", "units", "answers", "tasks"):
        assert len(getattr(alone, name))
        pd.testing.assert_frame_equal(getattr(alone, name), getattr(beside, name))


def test_pieces_are_beside_bytes_seed_by_seed():
    p = replace(P, parts=("pieces",), seeds=3)

    def made(kind, rate, seed, bits):
        return row(Cell(kind, "M", "tiny", "adamw", rate, seed, 4000),
                   chosen_by={2e-3: 2.0, 1e-3: 3.0}.get(rate, 1.0),
                   units=[{"units": "bytes" if kind == "noise" else "pieces", "noise": "none",
                           "bits_per_raw_byte": bits, "accuracy": 0.5}])

    rows = [made("noise", 2e-3, seed, bits) for seed, bits in enumerate((1.0, 1.5, 1.2))]
    rows += [made("pieces", 4e-3, seed, bits) for seed, bits in enumerate((1.1, 1.7, 1.5))]
    rows += [made("pieces", 2e-3, 0, 9.0), made("pieces", 1e-3, 0, 9.0)]
    table = tables(p, rows).units.set_index("units")
    assert table.loc["bytes", ["minus_bytes", "at_the_end_of_the_range"]].tolist() == [None, False]
    pieces = table.loc["pieces"]
    assert pieces["at_the_end_of_the_range"]  # 4e-3 is the largest that was tried
    for columns, points in ((("bits_per_raw_byte", "low", "high"), [1.1, 1.7, 1.5]),
                            (("minus_bytes", "minus_bytes_low", "minus_bytes_high"),
                             [0.1, 0.2, 0.3])):
        ends = stats.t.interval(0.95, 2, np.mean(points), stats.sem(points))
        assert pieces[list(columns)].astype(float).tolist() == pytest.approx(
            [np.mean(points), *ends])
    beyond = {**made("pieces", 8e-3, 0, 9.0), "status": "diverged", "chosen_by": None}
    further = tables(p, [*rows, beyond]).units.set_index("units").loc["pieces"]
    assert not further["at_the_end_of_the_range"]  # beyond it no training came to an end
    found = values(tables(p, rows), p)
    assert found["pieces_minus_bytes_none_ranges"].value == "M -0.048 to +0.448"


def test_costs_of_another_optimizer_are_no_price():
    done = Done(finished().values())
    costs = pd.DataFrame([{"system": s, "optimizer": "muon", "seconds_per_byte": 1.0,
                           "joules_per_byte": 1.0} for s in P.systems])
    assert set(equal_table(P, done, costs)["equal"]) == {"bytes", "operations"}


def test_every_wanted_cell_has_a_name_of_its_own():
    p = PROFILES["full"]
    cells = plan(p, [])
    assert len({c.name for c in cells}) == len(cells)
    assert {family(s) for s in p.systems} == {"M", "S", "D", "K", "A", "A/2", "L", "R"}


@pytest.mark.parametrize(("given", "words"), [
    ({"systems": ("A", "DDDA")}, "hybrids of D and not these"), ({"reference": "M"}, "reference"),
    ({"systems": ("A", "X/2")}, "systems"),
    ({"adamw_rates": ()}, "rates of one optimizer"), ({"budgets": (1,)}, "expected a step or more"),
    ({"tasks": ("recal 4",)}, "tasks"),
])
def test_parameters_that_do_not_fit_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        replace(Parameters(), **{"systems": ("A",), **given})
