"""Wrong words, files and arguments, by surface: a clear line or a right result, never a traceback.
"""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest
import torch

from analysis.cli import main
from mambabyte import checkpoint
from mambabyte.config import PRESETS
from mambabyte.config.files import cache_dir
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, distributed
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


@pytest.mark.parametrize(("variables", "line"), [
    ({"WORLD_SIZE": "abc"}, r"\$WORLD_SIZE is 'abc': expected a whole number"),
    ({"WORLD_SIZE": "0"}, r"\$WORLD_SIZE is 0: expected"),
    ({"WORLD_SIZE": "2", "RANK": ""}, r"\$WORLD_SIZE is 2, and \$RANK is '': expected"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, r"\$LOCAL_RANK is 'x': expected"),
])
def test_a_world_that_cannot_be_joined_is_one_line(variables, line, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line), distributed.joined("cpu"):
        pass


def test_an_empty_home_is_not_the_root(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir().is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2000 + "y", "\udcff", "-"])
@pytest.mark.parametrize("command", [["corpus"], ["eval"], ["runs", "show"], ["task", "check"],
                                     ["study", "memory", "--parameters", "-f"]])
def test_a_path_that_cannot_be_is_one_line(command, name, capfd):
    assert main([*command, name]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err


def test_a_run_whose_path_is_no_utf8_is_loaded(tmp_path):
    folder = tmp_path / os.fsdecode(b"r\xff")
    model = ByteLM(PRESETS["smoke"].model)
    optimizer = torch.optim.SGD(model.parameters())
    saved = checkpoint.save_training(folder, model, optimizer, {"step": 1})
    assert torch.equal(checkpoint.load_model(saved).embedding.weight, model.embedding.weight)
