"""The studies: what each asks, where it lives, which parameters it takes.

A study is a folder here and a notebook. The package itself imports neither torch nor matplotlib,
so that everything may loop over the registry; it has ``TITLE``, ``QUESTION``, ``NOTEBOOK``, a
frozen dataclass ``Parameters`` whose defaults are the quick values, ``PROFILES`` and a dataclass
``Results``; ``TIMED = True`` where it says how long something takes, ``READS_RUNS = True`` where it
judges what the others left. Its modules:

- ``compute``: ``run(parameters, report) -> Results``
- ``values``: ``values(found, parameters) -> dict[str, Value]``, the answer in named numbers
- ``tables``: ``TABLES``, name of a field of Results -> caption, for the frames that are tables (the
  others are data of figures), ``WORDED``, name -> a function, for those kept in words, and
  ``SHOWN``, for those that readers see with what follows from their cells
- ``figures``: ``FIGURES``, a tuple of analysis.studies.drawing.Drawing
- ``panel``, where sliders say more than a table: ``panel(parameters)``

analysis.studies.session runs, shows and keeps a study by these alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shlex
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import staleness as sources
from analysis.runs.folders import ROOT, RUNS
from analysis.runs.records import RECORDS
from mambabyte.config.checks import fit, hints, read, shown, texts
from mambabyte.config.files import to_json
from mambabyte.errors import UserError, nearest

DEFAULT_PROFILE = "quick"
RUN_DIR = "folder of the run; empty is reports/runs, in a folder of its own"
WIDTH = 100
COMPUTING = ("compute", "values", "tables")  # what a result depends on; drawings are made later


@dataclass(frozen=True)
class Study:
    """One study. ``notebook`` is absolute; ``root`` is where its sources are looked for."""

    name: str
    title: str
    question: str
    notebook: Path
    package: str
    root: Path = ROOT
    reads_runs: bool = False  # it judges what the other studies left, so it comes after them
    timed: bool = False  # it says how long something takes, so on a machine it runs alone

    def sources_digest(self, runs: Path = RUNS, records: Path = RECORDS) -> str:
        """Digest of everything that the results depend on except the parameters."""
        modules = [self.package, *(f"{self.package}.{name}" for name in COMPUTING)]
        own = sources.digest(modules, self.notebook, self.root)
        return sources.with_results(own, self.name, runs, records) if self.reads_runs else own

    def module(self, name: str = "") -> Any:
        """The study's package, or a module of it; UserError where there is none."""
        path = f"{self.package}.{name}" if name else self.package
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise UserError(f"the study {self.name!r} has no module {path}") from None


def discover() -> dict[str, Study]:
    """Every folder of studies by name, in the order of their notebooks, judges last."""
    found = []
    for path in Path(__file__).parent.glob("*/__init__.py"):
        name = path.parent.name
        module = importlib.import_module(f"{__name__}.{name}")
        found.append(Study(name, module.TITLE, module.QUESTION,
                           ROOT / "notebooks" / module.NOTEBOOK, module.__name__,
                           reads_runs=getattr(module, "READS_RUNS", False),
                           timed=getattr(module, "TIMED", False)))
    found.sort(key=lambda study: (study.reads_runs, study.notebook.name))
    return {study.name: study for study in found}


STUDIES: dict[str, Study] = discover()


def get_study(name: str, studies: Mapping[str, Study] = STUDIES) -> Study:
    """The study of that name; UserError with the known names and the nearest one."""
    if name not in studies:
        raise UserError(f"there is no study {name!r}{nearest(name, studies)}; "
                        f"the studies are {', '.join(studies)}")
    return studies[name]


def profiles(study: Study) -> dict[str, dict[str, Any]]:
    """Profile name -> plain parameters, as a notebook and run.json hold them."""
    return {name: plain(p) for name, p in study.module().PROFILES.items()}


def profile_parameters(study: Study, profile: str = DEFAULT_PROFILE) -> dict[str, Any]:
    """Parameters of one profile; UserError where the study has none of that name."""
    known = profiles(study)
    if profile not in known:
        raise UserError(f"{study.name} has no profile {profile!r}{nearest(profile, known)}; "
                        f"it has {', '.join(known)}")
    return known[profile]


def profile_of(study: Study, parameters: Mapping[str, Any]) -> str:
    """The profile that the parameters equal, "" for none."""
    return next((name for name, p in profiles(study).items() if p == dict(parameters)), "")


def validate(
    study: Study | str, overrides: Mapping[str, Any], profile: str = DEFAULT_PROFILE
) -> dict[str, Any]:
    """All parameters of a run, typed and plain: the profile's, replaced where given.

    ``overrides`` come from a command line as strings, which are read, or from code as values. A
    tuple is written ``128,256`` and becomes a list, as in the notebook. UserError names what was
    got, what was expected and what is known.
    """
    if isinstance(study, str):
        study = get_study(study)
    parameters = profile_parameters(study, profile)
    types = hints(study.module().Parameters)
    check_names(study, overrides)
    for name, value in overrides.items():
        parameters[name] = read(value, types[name], f"{study.name} parameter {name}") \
            if isinstance(value, str) else value
    return plain(make_parameters(study, parameters))


def check_device(study: Study, device: Any) -> None:
    """UserError where a study is asked to run on a GPU that is not here."""
    if not str(device).startswith("cuda"):
        return
    import torch

    known = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(str(device).partition(":")[2] or 0) >= known:
        there = f"there are {known}, from cuda:0 on" if known else "no CUDA device is available"
        raise UserError(f"{study.name} parameter device is {shown(device)}, and {there}: set "
                        "device=cpu, or use the quick profile")


def check_names(study: Study, names: Iterable[str]) -> None:
    """UserError for a name that is no parameter of the study: the nearest, and all there are."""
    types = hints(study.module().Parameters)
    for name in names:
        if name not in types:
            raise UserError(f"{study.name} has no parameter {shown(name)}{nearest(name, types)}; "
                            f"it has {', '.join(types)}")


def split_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """``name=value`` texts as a dict; UserError for anything else."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{option} got {pair!r}: expected name=value")
        if name in result:
            raise UserError(f"{option} gives {name} twice")
        result[name] = value
    return result


def read_file(path: Path | None) -> dict[str, Any]:
    """Parameters by name from a TOML, JSON or YAML file; none where there is no path."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml  # papermill's own

            found = yaml.safe_load(text)
        else:
            raise UserError(f"{path}: expected a file that ends in .toml, .json or .yaml")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:  # each format has errors of its own
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {shown(found)}: expected parameters by name")
    return found


def make_parameters(study: Study, plain: Mapping[str, Any]) -> Any:
    """The study's Parameters from plain values (lists become tuples), each checked."""
    cls = study.module().Parameters
    fitted = {name: fit(plain[name], hint, f"{study.name} parameter {name}")
              for name, hint in hints(cls).items()}
    try:
        return cls(**fitted)
    except UserError as error:  # what must hold between them
        raise UserError(f"{study.name}: {error}") from None


def run_id(study: Study, parameters: Mapping[str, Any], sources_digest: str = "") -> str:
    """STUDY-hash: the same for the same parameters, sources and notebook, and only then."""
    canonical = to_json(dict(parameters), sort_keys=True)
    key = "\0".join([study.name, canonical, sources_digest or study.sources_digest()])
    return f"{study.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def command(study: Study, parameters: Mapping[str, Any]) -> str:
    """The command that repeats a run: the parameters that are not the quick ones are spelled out.
    """
    quick = profile_parameters(study)
    parts = [f"--set {name}={shlex.quote(_example(value))}"
             for name, value in parameters.items() if value != quick[name]]
    return " ".join(["mambabyte study", study.name, *parts])


def parameters_cell(study: Study) -> str:
    """The source of the notebook's cell of parameters, with types and help, as papermill reads it.

    ``papermill --help-notebook`` takes the last line of a value for its help, and no equals sign.
    """
    cls, quick = study.module().Parameters, profile_parameters(study)
    said = texts(cls) | {"run_dir": RUN_DIR}
    types = {name: _type_of(hint) for name, hint in hints(cls).items()} | {"run_dir": "str"}
    lines = []
    for name, value in (quick | {"run_dir": ""}).items():
        head, tail = f"{name}: {types[name]} = ", f"  # {said[name]}" if said[name] else ""
        whole = _literal(value)
        if len(head + whole + tail) <= WIDTH or not isinstance(value, list):
            lines.append(head + whole + tail)
            continue
        wrapped = textwrap.wrap(whole[1:-1] + ",", WIDTH - 4, break_long_words=False,
                                break_on_hyphens=False)
        lines += [f"{head}[", *(f"    {line}" for line in wrapped), f"]{tail}"]
    return "\n".join(lines)


def _type_of(hint: Any) -> str:
    """The type of a field as papermill can read it: a name, or list[name]."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"list[{_type_of(inner[0])}]"
    if origin is typing.Literal:
        return type(inner[0]).__name__
    return _type_of(inner[0]) if inner else hint.__name__


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return to_json(value) if isinstance(value, str) else repr(value)


def plain(parameters: Any) -> dict[str, Any]:
    """A study's Parameters as a notebook and run.json hold them: by name, tuples as lists."""
    fields = {f.name: getattr(parameters, f.name) for f in dataclasses.fields(parameters)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _example(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
