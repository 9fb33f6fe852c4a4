"""One validator for every way in: types, choices, ranges, and the line that refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.checks import (
    Checked,
    Device,
    above,
    at_least,
    between,
    entries,
    fit,
    from_plain,
    read,
    words,
)
from mambabyte.errors import UserError

Lengths = Annotated[tuple[Annotated[int, at_least(1)], ...], entries(2, rising=True)]


@pytest.mark.parametrize("wrong", [
    {"norm": "batch"}, {"dt_init": "Linear"}, {"tied_head": "no"}, {"d_model": True},
    {"d_model": 10**9}, {"n_layer": 10**9}, {"layer_pattern": ["M"]}, {"dt_rank": 0},
    {"dt_rank": "most"}, {"scan_form": "chunkd"}, {"rope_base": 10**400}, {"rope_base": math.nan},
    {"mlp_ratio": 1e308}, {"norm_eps": -1.0}, {"d_state": 2.0},
    {"mlp_activation": None}, {"scan_chunk": 0},
    {"optimizer": "sgd"}, {"schedule": "linear"}, {"precision": "fp16"}, {"parallel": "fsdp"},
    {"step": "Graph"}, {"betas": 0.9}, {"betas": (0.9,)}, {"betas": ("0.9", "0.95")},
    {"lr": 10**5000}, {"lr": "1e-3"}, {"seed": 2**64}, {"time_aware": 1}, {"context": 0},
], ids=lambda wrong: "".join(wrong))
def test_a_wrong_value_is_one_line_that_names_the_field(wrong):
    name = next(iter(wrong))
    cls = TrainConfig if hasattr(TrainConfig, name) else ModelConfig
    with pytest.raises(UserError) as error:
        cls(**wrong)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400
    assert line.startswith(f"{name} is ") or "parameters, more than" in line
    with pytest.raises(UserError, match=r"^config\.json: "):  # the same rule for a file
        from_plain(cls, wrong, "config.json")


def test_what_fits_becomes_what_is_declared():
    config = TrainConfig(betas=[0.5, 0], lr=1, context=np.int64(8), weight_decay=np.float32(0.5))
    assert (config.betas, config.lr, config.context, config.weight_decay) == ((0.5, 0.0), 1, 8, 0.5)
    assert [type(v) for v in (config.betas, config.lr, config.context, config.weight_decay)] == [
        tuple, float, int, float]


@pytest.mark.parametrize(("text", "hint", "value"), [
    ("1,2, 3", Lengths, (1, 2, 3)), (["1", "2"], Lengths, (1, 2)), ("[1,2]", Lengths, (1, 2)),
    ("yes", bool, True), ("FALSE", bool, False), ("none", int | None, None), ("7", int | None, 7),
    ("full", int | Literal["auto", "full"], "full"), ("1e-3", float, 1e-3), ("cuda:1", Device,
                                                                             "cuda:1"),
])
def test_words_are_read_by_type(text, hint, value):
    assert read(text, hint, "x") == value


@pytest.mark.parametrize(("rule", "fits", "not_these", "said"), [
    (between(1, 3), (1, 3), (0.999, 3.001), "from 1 to 3"),
    (above(0), (1e-300, 1e300), (0, -1), "above 0"),
    (above(0, 1), (1e-9, 1), (0, 1.001), "above 0 and at most 1"),
    (at_least(1), (1, 10**9), (0.999,), "1 or more"),
    (at_least(0, 1), (0, 0.999), (-0.001, 1), "at least 0 and below 1"),
])
def test_a_rule_of_numbers_holds_at_its_ends(rule, fits, not_these, said):
    hint = Annotated[float, rule]
    assert [read(str(float(n)), hint, "x") for n in fits] == [float(n) for n in fits]
    for n in not_these:
        with pytest.raises(UserError, match=f"^x is .*: expected a finite number {said}$"):
            read(str(float(n)), hint, "x")


@pytest.mark.parametrize(("text", "hint"), [
    ("2,1", Lengths), ("1,1", Lengths), ("1", Lengths), ("", Lengths), ("1,x", Lengths),
    ("1,0", Lengths), ("maybe", bool), ("3.5", int), ("inf", float), ("nan", float), ("", int),
    ("9" * 5000, int), ("cudaX", Device), ("cuda:", Device), ("tpu", Device), ("2", Literal["a"]),
])
def test_words_that_do_not_fit_are_refused(text, hint):
    with pytest.raises(UserError, match=r"^x is .*: expected "):
        read(text, hint, "x")


def test_a_word_is_no_list_of_its_letters():
    with pytest.raises(UserError, match=r"patterns is 'MMA': expected a list, each text"):
        fit("MMA", tuple[str, ...], "patterns")


def test_a_list_without_a_rule_has_no_empty_one():
    hint = Annotated[tuple[int, ...], object()]
    assert words(hint) == "a list, each a whole number"


def test_a_near_word_is_suggested():
    with pytest.raises(UserError, match=r"scan_form is 'chunkd' \(did you mean chunked\?\)"):
        ModelConfig(scan_form="chunkd")


def test_fields_of_a_file():
    @dataclass(frozen=True)
    class Small(Checked):
        n: int = 1

    assert from_plain(Small, {"n": 2}, "f") == Small(2)
    with pytest.raises(UserError, match="expected an object"):
        from_plain(Small, [1], "f")
    with pytest.raises(UserError, match="unknown field 'm'"):
        from_plain(Small, {"m": 2}, "f")
    with pytest.raises(UserError, match="unknown field 3"):
        from_plain(Small, {3: 2}, "f")
