"""pyproject.toml, environment.yml and constraints.txt say the same thing; threads that wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def test_environment_yml_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    lines = (ROOT / "environment.yml").read_text().splitlines()
    pip = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    assert pip[-1] == "-e ."
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                if "==" in line)
    expected = []
    for requirement in dict.fromkeys(wanted):  # two extras may want the same
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group()
        expected.append(f"{requirement},=={pins[name]}" if name in pins else requirement)
    assert sorted(pip[:-1]) == sorted(expected)
    python = project["requires-python"]
    assert f"  - python{python}" in lines


def test_the_lock_pins_every_package_with_its_hashes():
    """``make LOCKED=1`` installs what is here and nothing else; ``make lock`` writes it anew."""
    text = (ROOT / "requirements.lock").read_text()
    pins = {}
    for entry in text.replace("\\\n", " ").splitlines():
        name, version = re.match(r"([a-z0-9.-]+)==(\S+)", entry).groups()
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
        pins.setdefault(name, set()).add(version)
    assert "://" not in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], "setuptools>=77"]
    for requirement in map(Requirement, wanted):
        versions = pins[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(v) for v in versions), requirement
    assert f"torch=={next(iter(pins['torch']))}" in (ROOT / "constraints.txt").read_text()


def test_version_is_one():
    from mambabyte import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


@pytest.mark.parametrize(("asked", "count"), [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_commands_spin_for_microseconds_unless_asked_otherwise(asked, count):
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | asked
    # Set before torch is imported, which is when OpenMP reads it.
    code = ("import sys, os, analysis.cli; assert 'torch' not in sys.modules; "
            "print(os.environ.get('GOMP_SPINCOUNT'))")
    got = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True,
                         capture_output=True, check=True)
    assert got.stdout.strip() == str(count)


@pytest.mark.parametrize("command", ["study", "sweep", "report"])
def test_an_installed_package_says_what_needs_a_checkout(command, tmp_path, monkeypatch, capsys):
    from analysis import cli

    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main([command, "--json"]) == 2
    assert "needs the project's checkout" in capsys.readouterr().err


def test_an_installed_package_is_not_of_the_repository_it_stands_in(tmp_path, monkeypatch):
    from mambabyte.config import provenance

    installed = tmp_path / "lib" / "mambabyte" / "config" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(installed))
    monkeypatch.delenv("MAMBABYTE_COMMIT", raising=False)
    assert provenance.commit.__wrapped__() == "unknown (not a git checkout)"


def test_jupyterlab_saves_notebooks_as_git_has_them():
    import json
    from types import SimpleNamespace

    path = next((ROOT / "notebooks").glob("01_*.ipynb"))
    before = json.loads(path.read_text())
    ran = json.loads(path.read_text())
    for number, cell in enumerate(ran["cells"]):
        cell["metadata"]["trusted"] = True
        if cell["cell_type"] == "code":
            cell |= {"execution_count": number, "outputs": [{"output_type": "stream"}]}
    ran["metadata"] |= {"widgets": {}, "language_info": {"name": "python", "version": "3.11.2"}}
    manager = SimpleNamespace()
    given = {"get_config": lambda: SimpleNamespace(FileContentsManager=manager)}
    exec((ROOT / "notebooks" / "lab_config.py").read_text(), given)
    manager.pre_save_hook({"type": "notebook", "content": ran}, path="x", contents_manager=None)
    assert ran == before
    manager.pre_save_hook({"type": "file", "content": "text"})
