"""The names that the package itself offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mambabyte


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has after running ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_every_public_name_is_there():
    for name in mambabyte.__all__:
        assert getattr(mambabyte, name) is not None
        assert name in dir(mambabyte)
    from mambabyte import ByteLM, get_preset, selective_scan
    from mambabyte import model as package

    assert ByteLM is package.ByteLM
    assert get_preset("smoke").model.n_layer == 2
    assert selective_scan.__module__.startswith("mambabyte.ops")
    with pytest.raises(AttributeError, match="has no attribute 'Bytelm'"):
        mambabyte.Bytelm  # noqa: B018


@pytest.mark.parametrize("code", [
    "import mambabyte", "import mambabyte.config, mambabyte.errors",
    "from mambabyte import get_preset; get_preset('hybrid_3_1').model.n_parameters"])
def test_what_needs_no_torch_does_not_load_it(code):
    assert "torch" not in loaded_by(code)


def test_a_name_that_needs_torch_loads_it():
    assert "torch" in loaded_by("from mambabyte import ByteLM")


HELP = """
import contextlib, io
from analysis.cli import COMMANDS, main
for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
"""


def test_no_commands_help_loads_torch():
    assert "torch" not in loaded_by(HELP)


@pytest.mark.long  # tests/report/test_report.py: building one computes nothing
def test_a_report_is_built_without_torch(world, tmp_path):
    world.run()
    world.runs.rename(tmp_path / "done")
    assert "torch" not in loaded_by(f"""
from pathlib import Path
from tests.helpers.report_world import World
world = World(Path({str(tmp_path / "new")!r}))
world.runs = Path({str(tmp_path / "done")!r})
assert "It is" in world.build()
""")
