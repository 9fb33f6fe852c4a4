"""The registry, typed parameters and identities of runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from analysis import studies
from analysis.runs import staleness as sources
from analysis.studies import (
    COMPUTING,
    STUDIES,
    Study,
    check_device,
    command,
    get_study,
    profile_of,
    run_id,
    validate,
)
from analysis.studies.session import measure
from analysis.sweep.run import run_sweep
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Parameters:
    n: int = 3
    rate: float = 1
    corpus: str = "stdlib"
    timed: bool = True
    sizes: tuple[int, ...] = (128, 256)
    forms: tuple[str, ...] = ("chunked",)
    form: Literal["chunked", "recurrent"] = "chunked"
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n is {self.n}: it must be at least 1")


@pytest.fixture
def study(monkeypatch, tmp_path) -> Study:
    module = SimpleNamespace(
        Parameters=Parameters, PROFILES={"quick": Parameters(), "full": Parameters(n=30)})
    monkeypatch.setattr(Study, "module", lambda study, name="": module)
    return Study("tiny", "Tiny", "Is it?", tmp_path / "tiny.ipynb", "tiny", tmp_path)


def notebook(path: Path, *cells: str) -> Path:
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": c} for c in cells]}))
    return path


@pytest.mark.parametrize(("name", "given", "expected"), [
    ("n", "12", 12), ("n", 12, 12), ("rate", "1e-3", 1e-3), ("rate", 2, 2.0),
    ("timed", "no", False), ("timed", True, True), ("sizes", "1, 2,3", [1, 2, 3]),
    ("sizes", (4, 5), [4, 5]), ("sizes", "[6]", [6]), ("forms", "a,b", ["a", "b"]),
    ("corpus", "7", "7"), ("form", "recurrent", "recurrent"), ("cap", "none", None),
    ("cap", "5", 5),
])
def test_values_are_typed(study, name, given, expected):
    value = validate(study, {name: given})[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(("name", "given"), [
    ("n", "1e-3"), ("n", "many"), ("n", 1.5), ("n", True), ("n", None), ("n", [1]),
    ("rate", "fast"), ("timed", "perhaps"), ("timed", 1), ("sizes", "1,x"), ("sizes", 5),
    ("corpus", 7), ("form", "fused"), ("cap", "x"),
])
def test_wrong_types_say_what_was_got_and_expected(study, name, given):
    with pytest.raises(UserError) as error:
        validate(study, {name: given})
    assert f"tiny parameter {name} is {given!r}: expected " in str(error.value)


def test_unknown_parameter_names_the_known_and_the_nearest(study):
    with pytest.raises(UserError, match=r"no parameter 'size' \(did you mean sizes\?\).* has n,"):
        validate(study, {"size": 1})


def test_values_are_checked_by_the_study(study):
    with pytest.raises(UserError, match="n is 0"):
        validate(study, {"n": "0"})


def test_profiles(study):
    assert validate(study, {}, "full")["n"] == 30
    assert profile_of(study, validate(study, {"n": 30})) == "full"
    assert profile_of(study, validate(study, {"n": 31})) == ""
    with pytest.raises(UserError, match=r"no profile 'ful' \(did you mean full\?\)"):
        validate(study, {}, "ful")


def test_plain_values_become_the_studys_parameters(study):
    assert studies.make_parameters(study, validate(study, {"sizes": "1,2"})) == \
        Parameters(sizes=(1, 2))


def test_command_repeats_the_run(study):
    parameters = validate(study, {"n": 5, "sizes": "1,2", "corpus": "a b"})
    assert command(study, parameters) == \
        "mambabyte study tiny --set n=5 --set corpus='a b' --set sizes=1,2"


def test_unknown_study():
    with pytest.raises(UserError, match=r"no study 'memry' \(did you mean memory\?\)"):
        get_study("memry")


def test_identity_follows_parameters_sources_and_notebook(study, tmp_path):
    (tmp_path / "tiny.py").write_text("import helper\nx = 1\n")
    (tmp_path / "helper.py").write_text("y = 1\n")
    notebook(study.notebook, "import tiny")
    base = run_id(study, {"n": 1, "m": 2})
    assert base == run_id(study, {"m": 2, "n": 1})
    assert base != run_id(study, {"n": 2, "m": 2})
    (tmp_path / "helper.py").write_text('"""Now with words."""\ny = 1  # and a comment\n')
    assert base == run_id(study, {"n": 1, "m": 2})
    (tmp_path / "helper.py").write_text("y = 3\n")
    changed = run_id(study, {"n": 1, "m": 2})
    assert base != changed
    notebook(study.notebook, "import tiny", "tiny.x")
    assert changed != run_id(study, {"n": 1, "m": 2})


def test_sources_are_followed(tmp_path):
    files = {
        "a/__init__.py": "", "a/top.py": "from a import mid\nfrom . import near\n",
        "a/mid.py": "def f():\n    import a.deep\n", "a/near.py": "from .below import x\n",
        "a/below.py": "x = 1\n",
        "a/deep.py": 'x = "kernel.c"\nimport os\n', "a/kernel.c": "int x;",
        "a/other.py": "", "b.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [p.relative_to(tmp_path).as_posix() for p in sources.source_files(["a.top"], tmp_path)]
    assert found == ["a/__init__.py", "a/below.py", "a/deep.py", "a/kernel.c", "a/mid.py",
                     "a/near.py", "a/top.py"]


def test_a_study_of_results_depends_on_the_results(study, tmp_path):
    (tmp_path / "tiny.py").write_text("x = 1\n")
    notebook(study.notebook, "import tiny")
    runs, records = tmp_path / "runs", tmp_path / "records"
    records.mkdir()

    def put(name: str, **entries) -> None:
        (runs / name).mkdir(parents=True, exist_ok=True)
        (runs / name / "run.json").write_text(json.dumps(entries))

    def digests() -> tuple[str, str]:
        judge = dataclasses.replace(study, reads_runs=True)
        return study.sources_digest(runs, records), judge.sources_digest(runs, records)

    own, before = digests()
    put("other-1", study="other", status="done", values={"x": {"value": 1}})
    own_after, after = digests()
    assert own == own_after  # a study that measures for itself does not care
    assert before != after
    put("other-2", study="other", status="failed")
    put("tiny-1", study="tiny", status="done")
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    assert digests()[1] == after
    put("other-1", study="other", status="done", values={"x": {"value": 2}})
    changed = digests()[1]
    assert changed != after
    (records / "task" / "gpu").mkdir(parents=True)
    (records / "task" / "gpu" / "run.json").write_text("{}")
    assert digests()[1] != changed


def test_not_a_notebook(tmp_path):
    with pytest.raises(UserError, match="there is no notebook"):
        sources.notebook_code(tmp_path / "absent.ipynb")
    (tmp_path / "bad.ipynb").write_text("{}")
    with pytest.raises(UserError, match="not a notebook"):
        sources.notebook_code(tmp_path / "bad.ipynb")


def test_registry_is_light():
    code = ("import sys, analysis.studies, analysis.runs.staleness, analysis.runs.folders;"
            "print(sorted({'torch', 'matplotlib', 'papermill'} & sys.modules.keys()))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         check=True)
    assert run.stdout.strip() == "[]"


# The modules that make a study's numbers beside its own: a change in one must re-run it.
MEASURING = {
    "ablation": (
        "studies/ablation/budgets", "studies/ablation/learning", "theory/matching",
        "measure/statistics", "studies/ablation/trained", "studies/ablation/synthetic",
        "studies/ablation/tokens", "studies/ablation/variants"
    ),
    "gradients": (
        "studies/gradients/boundary", "studies/gradients/scan_against_step",
        "studies/gradients/truncation"
    ),
    "memory": (
        "measure/allocations", "theory/fit", "theory/step_memory",
        "studies/memory/tables", "studies/memory/gpu", "theory/kept_tensors",
        "studies/memory/scans"
    ),
    "overflow": (
        "theory/bounds", "studies/overflow/error_map", "measure/exponents"
    ),
}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.long
def test_a_study_depends_on_what_it_measures(name):
    study = STUDIES[name]
    assert study.notebook.exists()
    names = {p.relative_to(ROOT).as_posix()
             for p in sources.source_files([f"{study.package}.{part}" for part in COMPUTING])}
    assert f"analysis/studies/{name}/compute.py" in names
    assert names >= {f"analysis/{module}.py" for module in MEASURING.get(name, ())}
    assert f"analysis/studies/{name}/values.py" in names
    assert f"analysis/studies/{name}/figures.py" not in names  # drawn when somebody looks
    assert any(n.startswith("mambabyte/") for n in names)
    assert not any(n.startswith(("analysis/report", "analysis/sweep", "tests")) for n in names)


def by_papermill(name: str, **given) -> dict:
    """A notebook's globals after papermill has put in the cell of what it was given."""
    lines = ["# Parameters", *(f"{key} = {value!r}" for key, value in given.items())]
    scope = studies.profiles(get_study(name))["quick"]
    return {**scope, "run_dir": "", **given, "In": ["", "x = 1", "\n".join(lines) + "\n"]}


@pytest.mark.parametrize(("name", "given"), [
    ("memory", {"patern": ["M"]}), ("memory", {"batch": 2.5}), ("overflow", {"chunks": 16}),
    ("overflow", {"decays": [0.1, float("inf")]}), ("ablation", {"tasks": ["recall 99"]}),
    ("task", {"In": 1}),
])
def test_papermill_is_refused_as_the_command_line_is(name, given):
    with pytest.raises(UserError) as same:
        validate(name, given)
    with pytest.raises(UserError) as error:
        measure(name, by_papermill(name, **given))
    assert str(error.value) == str(same.value)
    assert "\n" not in str(error.value)
    assert error.value._render_traceback_() == [f"error: {same.value}"]


@pytest.mark.parametrize("given", [{"patterns": "MMA"}, {"patterns": "M,A"}, {"batch": "2"}])
def test_papermill_gives_values_not_words(given):
    """What is typed stands as it is in the notebook: MMA is not the patterns M, M and A."""
    name, value = next(iter(given.items()))
    with pytest.raises(UserError, match=f"memory parameter {name} is '{value}': expected"):
        measure("memory", by_papermill("memory", **given))


@pytest.mark.parametrize("name", [
    name for name, study in STUDIES.items() if hasattr(study.module().Parameters(), "device")])
def test_a_gpu_that_is_not_here_is_said_before_anything_runs(name, monkeypatch, tmp_path):
    """In a record as in a sweep, whose notebooks take their time to begin."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    study = get_study(name)
    monkeypatch.setattr(study.module("compute"), "run", lambda *_: pytest.fail("it ran"))
    said = f"{name} parameter device is 'cuda', and no CUDA device is available: set device=cpu"
    with pytest.raises(UserError, match=said):
        measure(study, validate(study, {"device": "cuda"}))
    with pytest.raises(UserError, match=said):
        run_sweep([name], overrides={"device": "cuda"}, root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_card_beyond_the_last_is_said(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device(get_study("ablation"), "cuda:1")
    with pytest.raises(UserError, match="is 'cuda:2', and there are 2, from cuda:0 on"):
        check_device(get_study("ablation"), "cuda:2")
