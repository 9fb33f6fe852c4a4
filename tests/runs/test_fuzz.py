"""Wrong words, files and arguments, by surface: a clear line or a right result, never a traceback.
"""

from __future__ import annotations

import warnings

import pytest

from tests.helpers.fuzz import Surfaces, counts, outcome


@pytest.mark.parametrize("surface", [name for name in vars(Surfaces)
                                     if not name.startswith("_") and name != "all"])
def test_a_few_inputs_of_every_surface(surface, tmp_path, capsys):
    take = getattr(Surfaces(tmp_path), surface)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of numbers that are not finite
        found = [outcome(take, seed) for seed in range(25)]
    assert not {what for what in found if what not in ("clear", "accepted")}
    assert "clear" in found  # or nothing wrong was tried


@pytest.mark.long
def test_ten_thousand_inputs(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = counts(tmp_path, 800, first=1000)
    assert sum(sum(c.values()) for c in found.values()) >= 9600
    with capsys.disabled():
        for name, c in found.items():
            print(f"{name:24} {c['clear']:6} clear {c['accepted']:6} accepted")
    assert not {name: extra for name, c in found.items()
                if (extra := {k: n for k, n in c.items() if k not in ("clear", "accepted")})}
