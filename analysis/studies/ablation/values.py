"""The ablation study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

import pandas as pd

from analysis.runs.folders import Value
from analysis.studies.ablation import COMPARISONS, Parameters, Results
from mambabyte.model.mixer import MATMUL

Values = dict[str, Value]


def values(r: Results, p: Parameters) -> Values:
    """The study's answer in named numbers; None: not measured."""
    reference = str(r.paired["reference"].iloc[0])
    return {
        **_system_values(r, reference), **_text_values(r), **_lead_values(r.accuracy, reference),
        **_size_values(r, reference), **_difference_values(r, reference),
        **_drift_values(r.positions), **_task_values(r.tasks), **_variant_values(r.variants),
        **_token_values(r.tokens), **_piece_values(r.tokens), **_few_step_values(r.few_steps),
    }


def _system_values(r: Results, reference: str) -> Values:
    """What was compared, the best and the reference at equal steps."""
    bits = r.systems.set_index("pattern")["bits_per_byte"]
    best = str(bits.idxmin())
    accuracy = r.runs.dropna(subset=["char_accuracy"]).groupby("pattern")["char_accuracy"].mean()
    return {
        "n_parameters": Value(
            int(r.systems["n_parameters"].iloc[0]), "", "of every system, nearly"),
        "worst_mismatch_percent": Value(float(r.systems["mismatch_percent"].abs().max()), "%",
                                        "largest difference from the common parameter count"),
        "seeds": Value(int(r.runs["seed"].nunique()), "", "seeds of every system"),
        "best_pattern": Value(best, "", "layer pattern with the fewest bits at equal steps"),
        "best_bits": Value(float(bits[best]), "bits/byte", "its held-out bits per byte"),
        "reference": Value(reference, "", "pattern that the others are compared with"),
        "reference_bits": Value(float(bits[reference]), "bits/byte", "its held-out bits per byte"),
        "ssm_char_accuracy": Value(_get(accuracy, "M"), "", "greedy next-character accuracy, M"),
        "reference_char_accuracy": Value(
            _get(accuracy, reference), "", "the same of the reference"),
    }


def _text_values(r: Results) -> Values:
    """The held-out text, and how well it tells systems apart."""
    return {
        "heldout_bytes": Value(int(r.text["held-out bytes"].iloc[0]), "bytes",
                               "held-out text that every system was scored on"),
        "text_error": Value(float(r.text["error over the text"].max()), "bits/byte",
                            "standard error that this text leaves in a system's mean, the largest"),
        "difference_text_error": Value(
            float(r.text["its error"].dropna().astype(float).max()), "bits/byte",
            "the same of a difference to the reference on the same windows"),
        "unigram_bits": Value(r.unigram_bits, "bits/byte",
                              "of byte frequencies alone: what is reached without any context"),
    }


def _size_values(r: Results, reference: str) -> Values:
    """States, operations, and what the documents' own sizes come to."""
    state = r.systems.set_index("pattern")["state_bytes"]
    products = r.flop_check[r.flop_check["counted"] == MATMUL]["formula_over_counter"]
    documents = r.documents.set_index("key")["ours"]
    return {
        "state_ratio": Value(float(state[reference] / state.min()), "times",
                             "state of the reference over the smallest, after one context"),
        "flop_ratio_low": Value(float(products.min()), "", "closed form over counter, smallest"),
        "flop_ratio_high": Value(float(products.max()), "", "closed form over counter, largest"),
        "run_flops": Value(float(documents["run_flops"]), "FLOPs", "the document's run, counted"),
        "effective_steps_capped": Value(float(documents["rate_sum_capped"]), "steps",
                                        "full-rate steps in 180 s at 37 s a step"),
        "ssm_over_attention_parameters": Value(float(documents["ssm_over_attention_parameters"]),
                                               "times", "parameters of the hybrid's mixers"),
        "published_state": Value(str(r.state_dtypes["state"].iloc[-1]), "",
                                 "dtype of the second document's state after its first steps"),
    }


def _difference_values(r: Results, reference: str) -> Values:
    """The SSM, and the best hybrid, minus the reference in each comparison."""
    values: Values = {}
    hybrids = [pattern for pattern in r.systems["pattern"] if len(set(pattern)) > 1]
    for comparison in COMPARISONS:
        name = comparison.replace("-", "_").lower()
        rows = r.paired[r.paired["comparison"] == comparison].set_index("pattern")["mean"]
        values[f"ssm_{name}"] = Value(_get(rows, "M"), "bits/byte",
                                      f"M minus {reference} at equal {comparison}")
        hybrid = [bits for pattern in hybrids if (bits := _get(rows, pattern)) is not None]
        values[f"hybrid_{name}"] = Value(
            min(hybrid, default=None), "bits/byte",
            f"best hybrid minus {reference} at equal {comparison}")
    return values


def _token_values(tokens: pd.DataFrame) -> Values:
    """The text in pieces, and the runs on them."""
    one = tokens.iloc[0] if len(tokens) else {}
    return {
        "bytes_per_piece": Value(one.get("bytes_per_token"), "bytes", "held-out text, sp1024"),
        "pieces_uniform_bits": Value(one.get("uniform_bits_per_raw_byte"), "bits/byte",
                                     "on pieces, of a model that knows nothing"),
        **{f"pieces_{kind}_bits": Value(one.get(f"{kind}_bits_per_raw_byte"), "bits/byte",
                                        f"of held-out text by counting {what}")
           for kind, what in (("unigram", "pieces"), ("bigram", "pairs of pieces"))},
        "pieces_bits": Value(float(tokens["bits_per_raw_byte"].min()) if len(tokens) else None,
                             "bits/byte", "best run on pieces, per raw byte"),
        "pieces_raw_bytes": Value(one.get("raw_bytes"), "bytes", "held-out text that both read"),
        "pieces_tokens": Value(one.get("tokens"), "pieces", "that text in pieces"),
        "pieces_steps": Value(one.get("steps"), "steps", "of a run on pieces"),
        "pieces_trained_bytes": Value(one.get("trained_raw_bytes"), "bytes",
                                      "raw bytes that a run on pieces was trained on"),
    }


def _few_step_values(few_steps: pd.DataFrame) -> Values:
    """The few large steps of the second document."""
    last = few_steps[few_steps["step"] == few_steps["step"].max()] if len(few_steps) else None
    return {
        "few_steps": Value(None if last is None else int(last["step"].iloc[0]), "steps",
                           "large steps with the second document's choices"),
        "few_steps_tokens": Value(None if last is None else
                                  int(last["tokens"].iloc[0] / last["step"].iloc[0]), "tokens",
                                  "of one of these steps; the second document's has 524,288"),
        "few_steps_best_bits": Value(
            None if last is None else float(last["bits_per_raw_byte"].min()), "bits/byte",
            "best system after them, at full learning rate"),
    }


def _piece_values(tokens: pd.DataFrame) -> Values:
    """Means over seeds, SSM and attention: on pieces, on bytes, and the difference."""
    values: Values = {}
    for pattern, name in (("M", "ssm"), ("A", "attention")):
        rows = tokens[tokens["pattern"] == pattern] if len(tokens) else tokens
        for column, end, what in (("bits_per_raw_byte", "bits", "on pieces"),
                                  ("bits_per_byte_on_bytes", "bits_on_bytes", "on bytes"),
                                  ("pieces_minus_bytes", "difference", "pieces minus bytes")):
            values[f"pieces_{name}_{end}"] = Value(
                float(rows[column].mean()) if len(rows) else None, "bits/byte",
                f"{pattern} {what}, per raw byte, mean over seeds")
    return values


def _lead_values(accuracy: pd.DataFrame, reference: str) -> Values:
    """Accuracy of the SSM minus the reference's at the two ends of the scored stream."""
    lead = None
    if {"M", reference} <= set(accuracy):
        lead = accuracy["M"] - accuracy[reference]
    return {
        f"lead_{name}": Value(
            None if lead is None else float(lead.iloc[i]), "",
            f"accuracy of M minus {reference} in the {name} characters of a stream")
        for i, name in ((0, "first"), (-1, "last"))}


def _get(series: pd.Series, key: str) -> float | None:
    return None if series.get(key) is None or pd.isna(series[key]) else float(series[key])


def _drift_values(positions: pd.DataFrame) -> Values:
    """Stream minus fresh windows in the last bin, the mean over seeds."""
    values: Values = {}
    known = positions[positions["drift_bits"].notna()].astype({"drift_bits": float})
    for cache, pattern, name in (("state", "M", "drift_ssm"), ("window", "A", "drift_window"),
                                 ("all keys", "A", "drift_all_keys")):
        one = known[(known["cache"] == cache) & (known["pattern"] == pattern)]
        last = one[one["last_position"] == one["last_position"].max()]["drift_bits"]
        values[name] = Value(float(last.mean()) if len(last) else None, "bits/byte",
                        f"stream minus fresh windows at the end, {pattern} with {cache}")
    values["drift_position"] = Value(int(positions["last_position"].max()) + 1, "bytes",
                                "end of the stream")
    return values


def _task_values(tasks: pd.DataFrame) -> Values:
    """Final accuracy on the largest task of each kind: SSM, attention, the best hybrid."""
    values: Values = {}
    for kind in ("recall", "copy"):
        final = tasks[tasks["final"] & (tasks["task"] == kind)] if len(tasks) else tasks
        size = int(final["size"].max()) if len(final) else None
        found = (final[final["size"] == size].groupby("pattern")["accuracy"].mean()
                 if len(final) else pd.Series(dtype=float))
        hybrids = found[[len(set(p)) == 2 for p in found.index]]
        chance = (float(final.loc[final["size"] == size, "chance"].iloc[0]) if len(final)
                  else None)
        values |= {
            f"{kind}_size": Value(size, "", f"size of the largest {kind} task"),
            f"{kind}_chance": Value(
                chance, "", "accuracy of a guess that knows which answers are left"),
            f"{kind}_ssm": Value(_get(found, "M"), "", f"accuracy on {kind}, pure SSM"),
            **_each_seed(kind, final[final["size"] == size] if len(final) else final),
            f"{kind}_attention": Value(_get(found, "A"), "", f"accuracy on {kind}, pure attention"),
            f"{kind}_hybrid": Value(float(hybrids.max()) if len(hybrids) else None, "",
                                    f"accuracy on {kind}, best hybrid"),
        }
    return values


def _each_seed(kind: str, final: pd.DataFrame) -> Values:
    """The pure SSM's accuracy of its worst and best seed: a mean of both says little."""
    ssm = final[final["pattern"] == "M"]["accuracy"] if len(final) else pd.Series(dtype=float)
    return {
        f"{kind}_seeds": Value(len(ssm), "seeds", f"of the pure SSM on {kind}"),
        f"{kind}_ssm_low": Value(float(ssm.min()) if len(ssm) else None, "", "its worst seed"),
        f"{kind}_ssm_high": Value(float(ssm.max()) if len(ssm) else None, "", "its best seed"),
    }


def _variant_values(variants: pd.DataFrame) -> Values:
    if variants.empty or "difference_to_field" not in variants:
        names = ("variant_largest", "variant_largest_change", "variant_published",
                 "half_life_field", "half_life_torch_init")
        return dict.fromkeys(names, Value(None, "", "left out of this run"))
    change = variants.groupby("variant")["difference_to_field"].mean()
    life = variants.groupby("variant")["half_life_bytes_at_start"].mean()
    single = change.drop(["field", "published"], errors="ignore")
    largest = str(single.abs().idxmax()) if len(single) else None
    return {
        "variant_largest": Value(largest, "", "single choice that changes most"),
        "variant_largest_change": Value(float(single[largest]) if largest else None, "bits/byte",
                                        "its change"),
        "variant_published": Value(_get(change, "published"), "bits/byte", "all choices together"),
        "half_life_field": Value(
            _get(life, "field"), "bytes", "median half-life of the slowest state"),
        "half_life_torch_init": Value(
            _get(life, "dt torch init"), "bytes", "the same, torch's init"),
    }
