"""The arena's answers in named values, for prose, headlines and the table of decisions."""

from __future__ import annotations

import math
import re

import pandas as pd

from analysis.measure.statistics import paired_difference
from analysis.runs.folders import Value
from analysis.studies.arena import HALF, Parameters, Results, family

Values = dict[str, Value]
SOLVED = 0.95  # accuracy of a size that a system is said to solve
HORIZON = 0.9  # share of the gradient up to its horizon
APART = 0.05  # accuracy by which seeds differ enough to be told
SURE = 0.9  # share of a bootstrap's draws from which on a crossing is told
NEAR = 0.01  # bits per byte within which a context is said to be enough


def slug(text: str) -> str:
    """A name of a value from a system's or a task's: "A/2" -> "a_half"."""
    return re.sub(r"[^a-z0-9]+", "_", text.replace(HALF, " half").lower()).strip("_")


def values(r: Results, p: Parameters) -> Values:
    """The study's answer in named numbers; None: not measured."""
    trained = r.cells[r.cells["status"] == "done"] if len(r.cells) else r.cells
    found: Values = {
        "trainings": Value(len(r.cells), "trainings", "on text, of all systems and rates"),
        "diverged": Value(int((r.cells["status"] == "diverged").sum()) if len(r.cells) else 0,
                          "trainings", "on text that diverged"),
        "training_seconds": Value(float(trained["seconds"].astype(float).sum())
                                  if len(trained) else None, "s", "of one device, all trainings"),
    }
    for size in (p.size, *p.larger):
        for budget in dict.fromkeys((p.tuning_budget, p.long_budget)):
            end = "" if budget == p.tuning_budget else "_long"
            found |= _best(r, p, size, budget, f"at_{slug(size)}{end}")
    return found | _tuning(r, p) | _equal(r) | _tasks(r) | _laws(r, p) | _units(r) | _state(r)


def _best(r: Results, p: Parameters, size: str, budget: int, stem: str) -> Values:
    """Of one size and budget: the best, each system's bits, and hybrids beside pure ones."""
    rows = r.best
    if len(rows):
        rows = rows[(rows["size"] == size) & (rows["budget"] == budget)]
    if rows.empty:
        return {f"{stem}_best": Value(None, "", "not measured")}
    bits = rows.set_index("system")["bits_per_byte"].astype(float)
    found: Values = {
        f"{stem}_best": Value(str(bits.idxmin()), "", f"best system at {size}, {budget:,} bytes"),
        f"{stem}_seeds": Value(int(rows["seeds"].min()), "seeds", "of each system, the fewest"),
        f"{stem}_systems": Value(len(rows), "systems", "that were trained"),
    }
    for system, value in bits.items():
        found[f"{stem}_{slug(str(system))}"] = Value(
            float(value), "bits/byte", f"{system} at its best rate, {size}, {budget:,} bytes")
    names = bits.sort_values().index
    found[f"{stem}_best_bits"] = Value(float(bits.min()), "bits/byte", "its bits")
    found[f"{stem}_order"] = Value(", ".join(map(str, names)), "", "systems from best to worst")
    found[f"{stem}_range"] = Value(float(bits.max() - bits.min()), "bits/byte", "worst minus best")
    kinds = [s for s in bits.index if family(s) == s]
    mixed = [s for s in bits.index if len(s) == 4 and family(s) != s]
    if kinds and mixed:
        found[f"{stem}_best_pure"] = Value(str(bits[kinds].idxmin()), "", "best pure system")
        found[f"{stem}_best_pure_bits"] = Value(float(bits[kinds].min()), "bits/byte", "its bits")
        found[f"{stem}_best_hybrid"] = Value(str(bits[mixed].idxmin()), "", "best 3:1 hybrid")
        found[f"{stem}_hybrid_minus_pure"] = Value(
            float(bits[mixed].min() - bits[kinds].min()), "bits/byte",
            "best 3:1 hybrid minus best pure system")
        found[f"{stem}_hybrid_minus_pure_range"] = Value(
            _range(*(_by_seed(r, rows, found[f"{stem}_best_{kind}"].value)
                     for kind in ("hybrid", "pure"))), "",
            "bits per byte, 95 % of it by seeds")
    pairs = [(s, family(s)) for s in mixed if family(s) in bits.index]
    if len(pairs) > 2:
        own = bits[[b for _, b in pairs]].rank().to_numpy()
        theirs = bits[[h for h, _ in pairs]].rank().to_numpy()
        found[f"{stem}_rank_correlation"] = Value(
            float(pd.Series(own).corr(pd.Series(theirs))), "",
            "rank correlation of mixers alone and in 3:1 hybrids (Spearman)")
    return found


def _by_seed(r: Results, rows: pd.DataFrame, system: object) -> pd.Series:
    """Bits of a system's trainings by seed, at the rate and budget of its row among ``rows``."""
    mine = r.cells[r.cells["status"] == "done"].merge(
        rows.loc[rows["system"] == system, ["size", "budget", "system", "optimizer", "rate"]])
    return mine.set_index("seed")["valid_bits"].astype(float)


def _range(first: pd.Series, second: pd.Series) -> str | None:
    """The interval of ``first`` minus ``second``, by the seeds that both have; None for too few."""
    pairs = pd.concat([first, second], axis=1).dropna()
    if pairs.empty:
        return None
    found = paired_difference(*pairs.T.to_numpy().tolist())
    return f"{found.low:+.4f} to {found.high:+.4f}" if math.isfinite(found.low) else None


def _tuning(r: Results, p: Parameters) -> Values:
    rows = r.tuning[r.tuning["size"] == p.size] if len(r.tuning) else r.tuning
    if rows.empty:
        return {}
    single = rows.dropna(subset=["single_rate_valid_bits"]).set_index("system")
    gain = (single["single_rate_valid_bits"] - single["valid_bits"]).astype(float)
    found = {
        "tuning_seconds": Value(float(rows["seconds"].sum()), "s", "of the searches over rates"),
        "muon_best": Value(int((rows["optimizer"] == "muon").sum()), "systems",
                           "whose best cell was trained by Muon"),
        "systems": Value(len(rows), "systems", "that were tuned"),
    }
    if len(gain):
        order = single["single_rate_valid_bits"].astype(float)
        found |= {
            "single_rate": Value(float(single["single_rate"].iloc[0]), "",
                                 "one rate of AdamW for all"),
            "single_rate_best": Value(str(order.idxmin()), "", "best system at that rate"),
            **_extremes(gain, "tuning_gain", "the best of all cells gains over one rate of AdamW"),
        }
    rates = r.sensitivity[r.sensitivity["size"] == p.size] if len(r.sensitivity) else r.sensitivity
    if len(rates):  # what of it is the rate, and what the optimizer: the best cell of either
        chosen = rates.loc[rates.dropna(subset=["chosen_by"]).groupby(
            ["system", "optimizer"])["chosen_by"].idxmin()]
        by = chosen.pivot(index="system", columns="optimizer", values="valid_bits").astype(float)
        if "adamw" in by and len(single):
            rate = (single["single_rate_valid_bits"] - by["adamw"]).dropna().astype(float)
            found |= _extremes(rate, "rate_gain", "AdamW's best rate gains over one for all")
        if {"adamw", "muon"} <= {*by}:
            both = (by["adamw"] - by["muon"]).dropna()
            found |= {
                **_extremes(both, "muon_gain", "Muon at its best rate gains over AdamW at its own"),
                "tried_with_both": Value(len(both), "systems", "tuned with AdamW and with Muon"),
                "muon_ahead": Value(int((both > 0).sum()), "systems", "of these ahead with Muon"),
            }
    return found


def _extremes(gains: pd.Series, stem: str, about: str) -> Values:
    """The least and the most of ``gains``, by system, and whose the most is."""
    if gains.empty:
        return {}
    return {f"{stem}_least": Value(float(gains.min()), "bits/byte", f"what {about}, the least"),
            f"{stem}_most": Value(float(gains.max()), "bits/byte", "the most"),
            f"{stem}_most_system": Value(str(gains.idxmax()), "", "the system that gains most")}


def _equal(r: Results) -> Values:
    found: Values = {}
    for measure, rows in r.equal.groupby("equal") if len(r.equal) else ():
        known = rows.dropna(subset=["bits_per_byte"]).set_index("system")
        bits = known["bits_per_byte"].astype(float)
        if len(bits):
            found[f"equal_{measure}_best"] = Value(  # none of some: the cheapest are what lacks
                str(bits.idxmin()) if len(known) == len(rows) else None, "",
                f"fewest bits at equal {measure}, where all systems have them")
            found[f"equal_{measure}_beyond"] = Value(
                len(rows) - len(known), "systems", "without: they would read past the longest, or "
                                                   "were not trained on it")
            for row in known.itertuples():
                name = f"equal_{measure}_{slug(str(row.Index))}"
                found[name] = Value(float(row.bits_per_byte), "bits/byte",
                                    f"{row.Index} at equal {measure}")
                if pd.notna(row.low):
                    found[f"{name}_range"] = Value(f"{row.low:.3f} to {row.high:.3f}", "",
                                                   "bits per byte, 95 % of it by seeds")
    return found


def _tasks(r: Results) -> Values:
    found: Values = {}
    for (task, width), rows in r.tasks.groupby(["task", "width"]) if len(r.tasks) else ():
        asked = rows.groupby("size")["trained"].transform("any")  # else of no system, beyond all
        stem, unit = f"{slug(task)}_{width}", str(rows["unit"].iloc[0])
        for kind, part in (("", rows[asked]), ("_beyond", rows[~asked])):
            if len(part):
                found |= _accuracies(part[part["size"] == part["size"].max()], f"{stem}{kind}")
        reach = {str(s): solved(mine) for s, mine in rows[asked].groupby("system", sort=False)}
        order = sorted(reach, key=lambda s: -reach[s])
        found[f"{stem}_solves"] = Value(
            ", ".join(f"{s} {reach[s]}" for s in order), "",
            f"{unit} up to which each system has an accuracy of {SOLVED} or more; 0 is none")
        found |= {f"{stem}_solves_{slug(s)}": Value(n, unit, f"up to which {s} has {SOLVED}")
                  for s, n in reach.items()}
    return found | _least_state(r.tasks)


def _least_state(tasks: pd.DataFrame) -> Values:
    """Of recall, by size: the model of fewest bytes of state that solves it."""
    found: Values = {}
    recall = tasks[tasks["task"] == "recall"] if len(tasks) else tasks
    for size, rows in recall[recall["accuracy"] >= SOLVED].groupby("size") if len(recall) else ():
        best = rows.sort_values("state_bytes", kind="stable").iloc[0]
        found[f"recall_state_{size}"] = Value(
            int(best["state_bytes"]), "bytes", f"least state that recalls {size} pairs")
        found[f"recall_state_{size}_of"] = Value(
            f"{best['system']} of width {best['width']}", "", "the model that has it")
    return found


def solved(rows: pd.DataFrame) -> int:
    """The largest size up to which one system's accuracy is SOLVED or more; 0 where it is not at
    the smallest."""
    right = rows.sort_values("size").set_index("size")["accuracy"].astype(float) >= SOLVED
    return max((int(size) for size in right.index[right.cummin()]), default=0)


def _accuracies(rows: pd.DataFrame, stem: str) -> Values:
    """Of all systems at one size of a task."""
    first, order = rows.iloc[0], rows.sort_values("accuracy", ascending=False)
    found = {
        f"{stem}_size": Value(int(first["size"]), str(first["unit"]), f"of {first['task']}"),
        f"{stem}_chance": Value(float(first["chance"]), "", "a guesser that knows the values"),
        f"{stem}_order": Value(
            ", ".join(f"{row.system} {row.accuracy:.2f}" for row in order.itertuples()), "",
            "accuracies from best to worst"),
        f"{stem}_seeds": Value(int(rows["seeds"].min()), "seeds", "the fewest"),
        f"{stem}_ranges": Value(", ".join(
            f"{row.system} {row.worst:.2f} to {row.best:.2f}" for row in order.itertuples()
            if row.best - row.worst >= APART) or "none", "",
            f"systems whose seeds are {APART} or more apart, worst to best"),
    }
    return found | {f"{stem}_{slug(str(row.system))}": Value(
        float(row.accuracy), "", f"accuracy of {row.system}") for row in rows.itertuples()}


def _laws(r: Results, p: Parameters) -> Values:
    if r.points.empty:
        return {}
    held = r.points[r.points["held_back"]]
    error = (held["by_the_law"] - held["valid_bits"]).abs()
    found: Values = {}
    for system, rows in r.law.groupby("system", sort=False):
        number = rows.set_index("number")[["value", "low", "high"]].astype(float)
        e, a, alpha, b, beta = number["value"]
        name = slug(str(system))
        found[f"law_{name}"] = Value(
            f"{e:.2f} + {a:.2f} N^-{alpha:.2f} + {b:.2f} D^-{beta:.2f}", "",
            f"{system}: bits a byte, N in millions of parameters, D in megabytes of text")
        for one in ("alpha", "beta"):
            low, high = number.loc[one, ["low", "high"]]
            found[f"law_{name}_{one}"] = Value(
                f"{number.loc[one, 'value']:.2f} ({low:.2f} to {high:.2f})", "",
                f"{system}: exponent of {'parameters' if one == 'alpha' else 'text'}, and 95 %")
    best = r.points.loc[r.points.groupby(["size", "trained_bytes"], sort=False)["valid_bits"]
                        .idxmin()]
    crossings = r.crossings if len(r.crossings) else pd.DataFrame(  # a single law crosses none
        {"at_parameters": [], "share_of_draws": []})
    crossed = crossings.dropna(subset=["at_parameters"])
    crossed = crossed[crossed["share_of_draws"].astype(float) >= SURE]
    return found | {
        "law_best": Value("; ".join(
            f"{size}: {', '.join(rows.sort_values('trained_bytes')['system'])}"
            for size, rows in best.groupby("size", sort=False)), "",
            "fewest bits at each size, by rising amounts of text"),
        "law_crossed": Value("; ".join(
            f"{row.first} and {row.second} at {row.text_bytes / 2**20:.3g} MiB near "
            f"{row.at_parameters / 1e6:.1f} M ({row.share_of_draws:.0%} of draws)"
            for row in crossed.itertuples()) or "none", "",
            f"laws that cross in {SURE:.0%} of draws or more, and where"),
        "law_passed": Value("; ".join(
            f"{budget / 2**20:.3g} MiB: {', '.join(_passed(rows, p.reference)) or 'nowhere'}"
            for budget, rows in r.points.groupby("trained_bytes")), "",
            f"sizes at which {p.reference} has fewer bits than every pure system, by text"),
        "law_points": Value(len(r.points), "trainings", "that the laws are about"),
        "law_systems": Value(int(r.points["system"].nunique()), "systems", "with a law"),
        "law_held_back": Value(len(held), "trainings", "left out of the fits"),
        "law_inside": Value(int(held["inside"].sum()), "trainings",
                            "of these inside their predicted interval"),
        "law_worst_error": Value(float(error.max()), "bits/byte", "of a prediction, the largest"),
        "law_crossings": Value(int(crossings["at_parameters"].notna().sum()), "pairs",
                               "of systems and amounts of text whose laws cross"),
        "law_pairs": Value(len(r.crossings), "pairs", "of systems and amounts of text"),
    }


def _passed(points: pd.DataFrame, reference: str) -> list[str]:
    """At one amount of text: the sizes at which the reference is ahead of all other pure systems,
    those without a layer of it."""
    others = points[~points["system"].str.contains(reference, regex=False)]
    first = others.groupby("size", sort=False)["valid_bits"].min()
    mine = points[points["system"] == reference].set_index("size")["valid_bits"]
    return [str(size) for size in first.index if size in mine and mine[size] < first[size]]


def _units(r: Results) -> Values:
    found: Values = {}
    for row in r.units.itertuples() if len(r.units) else ():
        stem = f"{row.units}_{slug(str(row.system))}_{row.noise}"
        what = f"{row.system} on {row.units}, noise: {row.noise}"
        found[f"{stem}_bits"] = Value(float(row.bits_per_raw_byte), "bits/byte", what)
        found[f"{stem}_accuracy"] = Value(float(row.accuracy), "", f"{what}, share of bytes right")
    for noise, rows in r.units.groupby("noise", sort=False) if len(r.units) else ():
        bits = rows.pivot(index="system", columns="units", values="bits_per_raw_byte").dropna()
        if {"bytes", "pieces"} <= set(bits):
            gain = (bits["pieces"] - bits["bytes"]).astype(float)
            found[f"pieces_minus_bytes_{noise}"] = Value(
                ", ".join(f"{s} {gain[s]:+.3f}" for s in gain.index), "",
                f"bits a raw byte of pieces minus those of bytes, noise: {noise}")
        if "minus_bytes_low" in rows and len(known := rows.dropna(subset=["minus_bytes_low"])):
            found[f"pieces_minus_bytes_{noise}_ranges"] = Value(
                ", ".join(f"{row.system} {row.minus_bytes_low:+.3f} to {row.minus_bytes_high:+.3f}"
                          for row in known.itertuples()), "", "95 % of these, by seeds in pairs")
    return found


def _state(r: Results) -> Values:
    found: Values = {}
    for system, rows in r.context.groupby("system") if len(r.context) else ():
        bits = rows.set_index("reset_every")["bits_per_byte"].astype(float).sort_index()
        name = slug(str(system))
        found |= {
            f"context_gain_{name}": Value(
                float(bits.iloc[0] - bits.iloc[-1]), "bits/byte",
                f"{system}: reset every {bits.index[0]} bytes minus every {bits.index[-1]:,}"),
            f"context_{name}": Value(
                int(bits.index[bits <= bits.min() + NEAR][0]), "bytes",
                f"{system}: reset no more often, it is within {NEAR} bits of its best")}
    for system, rows in r.half_lives.groupby("system") if len(r.half_lives) else ():
        name = slug(str(system))
        found |= {
            f"half_life_{name}": Value(float(rows["half_life_50"].median()), "bytes",
                                       f"{system}: median over channels and layers"),
            f"half_life_{name}_long": Value(float(rows["half_life_95"].max()), "bytes",
                                            f"{system}: 95 % of the slowest layer's channels")}
    for system, rows in r.horizon.groupby("system") if len(r.horizon) else ():
        within = rows[rows["share_up_to_here"] >= HORIZON]["distance"]
        found[f"horizon_{slug(str(system))}"] = Value(
            int(within.min()), "bytes", f"{system}: up to where {HORIZON:.0%} of the gradient lies")
    for row in r.precision.itertuples() if len(r.precision) else ():
        name, about = f"{slug(str(row.system))}_{row.kept}_{row.way}", f"{row.system}: state in "
        about += f"{row.kept}, {row.way}"
        found |= {f"lost_{name}": Value(float(row.bits_lost), "bits/byte", about),
                  f"lost_{name}_late": Value(float(row.bits_lost_last_quarter), "bits/byte",
                                             f"{about}, last quarter of the stream")}
    if len(r.precision):
        found["streamed_bytes"] = Value(int(r.precision["streamed_bytes"].max()), "bytes",
                                        "read with each rounded state, over all streams")
    if len(r.clamp):
        by = r.clamp.pivot(index="seed", columns="system", values="valid_bits").astype(float)
        free = r.clamp[r.clamp["system"] == "M"]
        found |= {
            "clamp_seeds": Value(int(by.dropna().shape[0]), "seeds", "free and bounded"),
            "clamp_largest": Value(float(free["largest_exponent_of_a_chunk"].max()), "",
                                   "largest exponent of 32 steps, step size free"),
            "clamp_past": Value(int(free["onset_seen"].notna().sum()), "trainings",
                                "that passed what float32 holds"),
        }
        if by.shape[1] == 2:
            found["clamp_price"] = Value(float((by["M bounded"] - by["M"]).mean()), "bits/byte",
                                         "bounded minus free")
            found["clamp_price_range"] = Value(_range(by["M bounded"], by["M"]), "",
                                               "bits per byte, 95 % of it by seeds")
    return found
