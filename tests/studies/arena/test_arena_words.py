"""What the decisions and the report say in words of `h200-arena`, worked out from its trainings."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.runs.records import load_records

RECORDS = load_records()
RUN = RECORDS["h200-arena"]
MIB, MIXERS = 1 << 20, "MSDKR"
HYBRIDS = [m * 3 + "A" for m in MIXERS]


def frame(name: str) -> pd.DataFrame:
    return RUN.tables[name].frame


def tuned() -> pd.DataFrame:
    """The trainings at each system's best rate, by size: fewest held-out bits of the first seed."""
    cells = frame("cells").astype({"chosen_by": float, "valid_bits": float})
    first = cells[(cells["seed"] == 0) & (cells["budget"] == 16 * MIB)]
    best = first.loc[first.groupby(["size", "system"])["chosen_by"].idxmin()]
    return cells.merge(best[["size", "system", "optimizer", "rate"]])


def bits(size: str, mib: int) -> pd.DataFrame:
    """Validation bits, a row a seed and a column a system."""
    rows = tuned()
    rows = rows[(rows["size"] == size) & (rows["budget"] == mib * MIB)]
    return rows.pivot(index="seed", columns="system", values="valid_bits")


def interval(values: pd.Series) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def told(found: pd.DataFrame, one: str) -> tuple[set[str], set[str]]:
    """Which systems `one` is ahead of, and which it is behind, by seeds in pairs."""
    ends = {s: interval(found[s] - found[one]) for s in found if s != one}
    return {s for s in ends if ends[s][0] > 0}, {s for s in ends if ends[s][1] < 0}


def apart(found: pd.DataFrame, one: str) -> set[str]:
    """Systems whose interval has nothing in common with that of `one`."""
    low, high = interval(found[one])
    return {s for s in found if s != one
            and (interval(found[s])[0] > high or interval(found[s])[1] < low)}


def test_the_first_at_1_m_on_16_mib_and_what_its_lead_is_worth():
    found = bits("1M", 16)
    assert told(found, "KKKA")[0] == set(found) - {"KKKA", "KA"}
    assert apart(found, "KKKA") == set(found) - {"KKKA", "KA"}
    assert interval(found["KA"])[0] < interval(found["KKKA"])[0]  # and holds it
    assert interval(found["KA"])[1] > interval(found["KKKA"])[1]
    assert apart(found, "A") == {"KKKA"}
    order = found.mean().sort_values().index
    without = found.loc[1:].mean().sort_values().index
    assert list(without[:4]) == list(order[:4])
    assert "DDDA" not in told(found, "SSSA")[0]
    spread = found.max() - found.min()
    assert set(spread.nlargest(2).index) == {"A", "KA"}
    assert spread["M"] < 0.01
    assert found.loc[0, "A"] == found["A"].min()


def test_on_4_mib_mamba_is_first_and_attention_last_but_one():
    best = RECORDS["h200-arena-4mib"].tables["best"].frame
    best = best[best["size"] == "1M"].set_index("system")["bits_per_byte"].sort_values()
    assert best.index[0] == "M"
    assert list(best.index[-3:]) == ["L", "A", "A/2"]


def test_whose_hybrid_is_ahead_by_seeds_in_pairs():
    ahead = {(size, mib): {m for m in MIXERS if m in told(bits(size, mib), m * 3 + "A")[0]}
             for size, mib in (("1M", 16), ("1M", 64), ("10M", 16))}
    assert ahead == {("1M", 16): set("SDK"), ("1M", 64): set(MIXERS), ("10M", 16): set("MSDK")}


def test_hybrids_on_64_mib():
    """Which mixer they have says little, and Mamba-2's is behind; whose seeds more text parts."""
    found, mean = bits("1M", 64), bits("1M", 64).mean()
    level = ["RRRA", "KKKA", "MMMA", "DDDA"]
    for one in level:
        assert not set(level) & set.union(*told(found, one))
        assert "SSSA" in told(found, one)[0]
    assert max(mean[level]) < min(mean[["MA", "SA", "DA", "KA", "RA"]])
    spread, before = (b.max() - b.min() for b in (found, bits("1M", 16)))
    assert spread["A"] < before["A"] / 5
    assert all(spread[s] > before[s] for s in "KL")


def test_what_is_told_apart_at_10_m():
    found = bits("10M", 16)
    ahead, behind = told(found, "A")
    assert behind == {"KKKA"}
    assert ahead == set(found) - {"A", "KKKA", "DDDA", "SSSA"}
    assert "DDDA" not in told(found, "KKKA")[0]
    assert list(found.mean().nsmallest(5).index) == ["KKKA", "DDDA", "SSSA", "A", "MMMA"]
    assert found["SSSA"].mean() > found["DDDA"].mean()


def at_equal(cost: pd.Series) -> pd.DataFrame:
    """Bits of each seed at what the dearest system's 16 MiB cost, linear in the log of bytes."""
    more = np.log(cost.max() / cost) / np.log(4)
    return (1 - more) * bits("1M", 16) + more * bits("1M", 64)


def test_equal_costs_by_seeds_in_pairs():
    costs, cells = frame("costs").set_index("system"), frame("cells")
    flops = cells[(cells["size"] == "1M") & (cells["budget"] == 16 * MIB)]
    found = {"time": at_equal(costs["seconds_per_byte"].astype(float)),
             "joules": at_equal(costs["joules_per_byte"].astype(float)),
             "operations": at_equal(flops.groupby("system")["train_flops"].first().astype(float))}
    for row in frame("equal").itertuples():
        if row.equal in found:
            mine = found[row.equal][row.system]
            assert (row.low, row.high) == pytest.approx(interval(mine), abs=1e-6)
            assert row.bits_per_byte == pytest.approx(mine.mean(), abs=1e-6)
    time, joules, operations = found.values()
    assert time.mean().idxmin() == joules.mean().idxmin() == "A"
    assert told(time, "A")[0] == set(time) - {"A", "SSSA"}
    assert not apart(time, "A") & {"MMMA", "SSSA", "MA"}
    alike = set(joules) - {"A"} - told(joules, "A")[0]
    assert "SSSA" in alike
    assert len(alike) == 7
    assert all("A" in s for s in alike)
    assert told(operations, "KKKA")[0] == set(operations) - {"KKKA"}
    assert operations.mean().rank()["A"] == len(operations.columns) - 1
    assert set(costs["ms_per_step"].nlargest(3).index) == {"K", "KKKA", "D"}


def ends() -> set[tuple[str, int, str, str]]:
    """Searches of the tasks whose best rate is the smallest or the largest that was tried."""
    rows = frame("answers")
    rows = rows[rows["seed"] == 0].drop_duplicates(["task", "width", "system", "rate"])
    found = set()
    for (task, width, system), mine in rows.reset_index().groupby(["task", "width", "system"]):
        best, rates = mine.loc[mine["chosen_by"].idxmin(), "rate"], mine["rate"]
        if best in (rates.min(), rates.max()):
            found.add((task, width, system, "least" if best == rates.min() else "largest"))
    return found


def test_where_a_best_rate_is_at_an_end():
    """Of text nowhere; of tasks where all are right, and in Mamba-2's recall."""
    cells = frame("cells").astype({"chosen_by": float})
    first = cells[(cells["seed"] == 0) & (cells["budget"] == 16 * MIB)
                  & cells["size"].isin(["1M", "10M"])]
    for _, mine in first.groupby(["size", "system", "optimizer"]):
        best = mine.loc[mine["chosen_by"].idxmin(), "rate"]
        assert mine["rate"].min() < best < mine["rate"].max()
    found = ends()
    assert {end for end in found if end[0] != "induction"} == {
        ("recall", 64, "S", "largest"), ("recall", 64, "SA", "largest"),
        ("recall", 128, "S", "largest")}
    cells = RECORDS["h200-arena-4mib"].tables["cells"].frame.astype({"chosen_by": float})
    mine = cells[(cells["system"] == "M") & (cells["size"] == "1M") & (cells["seed"] == 0)
                 & (cells["optimizer"] == "muon")]
    assert mine.loc[mine["chosen_by"].idxmin(), "rate"] == mine["rate"].max()


def seeds(task: str, size: int, width: int = 128) -> dict[str, list[float]]:
    """By system: the accuracy of each seed at the best rate."""
    rows = frame("answers")
    rows = rows[(rows["task"] == task) & (rows["width"] == width)].reset_index(drop=True)
    first = rows[rows["seed"] == 0]
    best = first.loc[first.groupby("system")["chosen_by"].idxmin(), ["system", "rate"]]
    at = rows.merge(best)
    at = at[at["size"] == size].sort_values("seed")
    return at.groupby("system")["accuracy"].apply(list).to_dict()


def test_recall_by_seeds_where_a_mean_hides_them():
    found = seeds("recall", 256)
    assert min(found["A"] + found["SA"] + found["S"]) > 0.95
    assert sorted(a > 0.95 for a in found["D"]) == [False, True, True]
    assert min(found["D"]) < 0.01
    assert min(seeds("recall", 128)["D"]) > 0.95
    assert sorted(a > 0.95 for a in found["MA"]) == [False, False, True]
    for system in "MR":  # one seed of each stays at 16 pairs
        assert sorted(a > 0.95 for a in seeds("recall", 16)[system]) == [False, True, True]
    assert sorted(a > 0.95 for a in seeds("recall", 128)["R"]) == [False, True, True]
    rows = frame("tasks")
    state = rows[(rows["task"] == "recall") & (rows["width"] == 128) & (rows["size"] == 256)]
    state = state.set_index("system")["state_bytes"]
    assert 0.5 < state["D"] / state["S"] < 0.55


def test_at_small_rates_mamba_2_recalls_less_than_the_delta_rules():
    rows = frame("answers")
    rows = rows[(rows["task"] == "recall") & (rows["width"] == 128) & (rows["seed"] == 0)
                & (rows["size"] == 256) & rows["rate"].isin([0.0005, 0.001, 0.002])]
    found = rows.pivot(index="rate", columns="system", values="accuracy")
    assert len(found) == 3
    assert (found["S"] < found[["D", "K"]].min(axis=1)).all()


def test_noise_between_the_pairs():
    found, plain = seeds("noisy recall", 64), seeds("recall", 64)
    assert all(min(found[s]) > 0.98 for s in set(found) - {"M", "MA", "L"})
    less = {s for s in ("M", "MA", "L") if np.mean(found[s]) < np.mean(plain[s])}
    assert less == {"MA", "L"}


def test_parity_permutations_and_copying_by_seeds():
    found = seeds("parity", 32)
    assert min(found["R"]) > 0.99
    assert max(found["A"]) < 0.9
    assert sum(a > 0.95 for a in found["S"]) == 1
    assert all(min(found[s]) > 0.93 for s in ("D", "K", "DA", "KA", "M"))
    assert max(found["RA"]) < min(found["R"])
    assert sum(a < 0.9 for a in found["MA"]) == 1
    assert np.mean(found["SA"]) < np.mean(found["S"])
    assert found["L"] == found["A"]  # its window is longer than these samples
    assert max(a for each in seeds("permutations", 8).values() for a in each) < 0.95
    third = seeds("permutations", 32)
    assert {s for s in third if min(third[s]) > 0.3} == {"R", "KA"}
    copied = seeds("selective copy", 32)
    assert all(np.mean(copied[s]) > np.mean(copied["A"]) for s in ("R", "MA", "SA", "DA", "KA",
                                                                   "RA"))
    assert sorted(a > 0.95 for a in copied["A"]) == [False, True, True]
    assert min(copied["M"]) > max(copied["S"])


def test_what_one_reset_costs_grows_little_beyond_512_bytes():
    """A reset every n bytes instead of every 2 n: one more in 2 n bytes, behind n of context."""
    bits = frame("context").pivot(index="reset_every", columns="system", values="bits_per_byte")
    assert (bits.diff().dropna() < 0).all(axis=None)  # no state does harm
    cost = pd.DataFrame({n: 2 * n * (bits.loc[n] - bits.loc[2 * n]) for n in bits.index[:-1]}).T
    growth = cost.loc[512:].max() / cost.loc[512]
    assert growth.max() < 1.5
    alone = growth[[s for s in growth.index if "A" not in s]]
    assert alone.idxmax() == "K"
    assert cost.loc[512, "A"] > 6 * cost.loc[32, "A"]
    for system in ("A", *HYBRIDS):
        assert RUN.values[f"context_{system.lower()}"].value == 8192
    for system in "MSDRL":
        assert RUN.values[f"context_{system.lower()}"].value == 2048


def test_laws_miss_what_they_were_fitted_to():
    points = frame("points").astype({"by_the_law": float})
    points["off"] = (points["valid_bits"] - points["by_the_law"]).abs()
    held = points[points["held_back"].astype(bool)].groupby("system")["off"].max()
    assert held["RRRA"] < 0.01
    assert held["M"] < held["R"] < 0.065
    assert 0.09 < held["A"] < 0.105
    fitted = points[~points["held_back"].astype(bool)]
    worst = fitted.loc[fitted.groupby("system")["off"].idxmax()]
    assert (worst["off"] > 0.03).all()
    assert set(worst["size"]) == {"0.25M"}
    assert set(worst["trained_bytes"]) == {4 * MIB}
    law = frame("law").set_index(["system", "number"])["low"]
    bounded = [law[s, n] < 0.021 for s in ("M", "R", "RRRA", "A") for n in ("E", "alpha", "beta")]
    assert sum(bounded) > len(bounded) / 2
    tuned_there = RECORDS["h200-arena-4mib"].values["at_1m_a"].value
    at = points[(points["size"] == "1M") & (points["trained_bytes"] == 4 * MIB)]
    assert at.set_index("system").loc["A", "valid_bits"] > tuned_there + 0.1


def test_most_is_gained_by_muon_where_the_seed_was_luckiest():
    """By the mean of seeds attention gains less than by the one that was tried with AdamW."""
    cells = frame("cells").astype({"chosen_by": float, "valid_bits": float})
    first = cells[(cells["optimizer"] == "adamw") & (cells["size"] == "1M")
                  & (cells["seed"] == 0) & (cells["budget"] == 16 * MIB)]
    best = first.loc[first.groupby("system")["chosen_by"].idxmin()].set_index("system")
    gains = best["valid_bits"] - bits("1M", 16).mean()[best.index]
    assert gains.idxmax() == "A"
    assert gains["A"] < RUN.values["muon_gain_most"].value
    assert (gains > 0).all()
    assert best.loc["A", "rate"] == 0.002


def test_steps_without_a_bound_pass_what_float32_holds():
    rows = frame("clamp").astype({"onset_seen": float, "onset_predicted": float})
    free = rows[rows["system"] == "M"]
    assert set(free["onset_seen"]) == {42, 84}
    assert free.set_index("seed")["onset_seen"][0] == 42
    assert (free["onset_predicted"] < free["onset_seen"]).sum() == 4
    bound = rows[rows["system"] != "M"]
    assert bound["onset_seen"].isna().all()
    assert bound["onset_predicted"].notna().all()
    low, high = RUN.values["clamp_price_range"].value.split(" to ")
    assert float(low) < 0 < float(high)


def test_systems_of_a_size_have_as_many_parameters():
    sizes = frame("cells").groupby("size")["n_parameters"].agg(["min", "max"])
    assert (sizes["max"] / sizes["min"] < 1.02).all()


def test_pieces_are_behind_and_where_noise_does_not_widen_it():
    units = frame("units").astype({"bits_per_raw_byte": float})
    units = units.set_index(["units", "system", "noise"])["bits_per_raw_byte"]
    behind = (units["pieces"] - units["bytes"]).unstack()
    assert (behind > 0).all(axis=None)
    low = frame("units").set_index(["units", "system", "noise"])["minus_bytes_low"].loc["pieces"]
    sure = low.astype(float).unstack() > 0
    assert set(sure.index[sure["none"]]) == {"M", "RRRA"}
    assert sure.drop(columns="none").drop(index="A").all(axis=None)
    assert not sure.loc["A"].any()
    more = behind.drop(columns="none").gt(behind["none"], axis=0)
    assert {key for key, wider in more.stack().items() if not wider} == {("A", "typos")}
    assert (units["bytes"].unstack().drop(columns="none").sub(units["bytes"].unstack()["none"],
                                                              axis=0) > 0.5).all(axis=None)
