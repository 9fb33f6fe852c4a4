"""The studies: what each asks, where it lives, which parameters it takes.

A study is a folder here and a notebook. The package itself imports neither torch nor matplotlib,
so that everything may loop over the registry; it has ``TITLE``, ``QUESTION``, ``NOTEBOOK``, a
frozen dataclass ``Parameters`` whose defaults are the quick values, ``PROFILES`` and a dataclass
``Results``. Its modules:

- ``compute``: ``run(parameters, report) -> Results``
- ``values``: ``values(found, parameters) -> dict[str, Value]``, the answer in named numbers
- ``tables``: ``TABLES``, name of a field of Results -> caption, for the frames that are tables (the
  others are data of figures), and ``WORDED``, name -> a function, for those kept in words
- ``figures``: ``FIGURES``, a tuple of analysis.studies.drawing.Drawing
- ``panel``, where sliders say more than a table: ``panel(parameters)``

analysis.studies.session runs, shows and keeps a study by these alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import staleness as sources
from analysis.runs.folders import ROOT, RUNS
from analysis.runs.records import RECORDS
from mambabyte.config.files import to_json
from mambabyte.errors import UserError, nearest

DEFAULT_PROFILE = "quick"
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
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


def discover(folder: Path = Path(__file__).parent, package: str = __name__) -> dict[str, Study]:
    """Every folder of studies by name, in the order of their notebooks, judges last."""
    found = []
    for path in folder.glob("*/__init__.py"):
        name = path.parent.name
        module = importlib.import_module(f"{package}.{name}")
        found.append(Study(name, module.TITLE, module.QUESTION,
                           ROOT / "notebooks" / module.NOTEBOOK, module.__name__,
                           reads_runs=getattr(module, "READS_RUNS", False)))
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
    return {name: _plain(p) for name, p in study.module().PROFILES.items()}


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

    ``overrides`` come from a command line as strings or from code as values; either must fit the
    type of the field. A tuple is written ``128,256`` or given as a list or tuple, and becomes a
    list, as in the notebook. UserError names what was got, what was expected and what is known.
    """
    if isinstance(study, str):
        study = get_study(study)
    parameters = profile_parameters(study, profile)
    hints = typing.get_type_hints(study.module().Parameters)
    for name, value in overrides.items():
        if name not in parameters:
            known = ", ".join(f"{k} ({_type_name(hints[k])})" for k in parameters)
            raise UserError(f"{study.name} has no parameter {name!r}{nearest(name, parameters)}; "
                            f"it has {known}")
        try:
            parameters[name] = _convert(value, hints[name])
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{study.name} parameter {name}: got {value!r}, expected {_type_name(hints[name])}"
                f", e.g. {_example(profile_parameters(study)[name])}") from None
    if parameters.get("seed", 0) < 0:
        raise UserError(f"{study.name} parameter seed: got {parameters['seed']}, expected 0 or "
                        "more")
    # The dataclass may check more than types, e.g. that a size is positive.
    return _plain(make_parameters(study, parameters))


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


def make_parameters(study: Study, plain: Mapping[str, Any]) -> Any:
    """The study's Parameters from plain values (lists become tuples)."""
    cls = study.module().Parameters
    hints = typing.get_type_hints(cls)
    return cls(**{k: tuple(v) if typing.get_origin(hints[k]) is tuple else v
                  for k, v in plain.items()})


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


def _plain(parameters: Any) -> dict[str, Any]:
    fields = {f.name: getattr(parameters, f.name) for f in dataclasses.fields(parameters)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; ValueError, TypeError or KeyError where it is not one.

    A string is what a command line gives and is read; anything else must be of the type already
    (an int is a float, a bool is no int).
    """
    origin = typing.get_origin(hint)
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]()").split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_convert(part, typing.get_args(hint)[0]) for part in value]
    if origin is typing.Literal:
        return _choice(value, typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return _first_that_fits(value, typing.get_args(hint))
    if hint is types.NoneType:
        if value is None or value == "none":
            return None
        raise ValueError
    if hint is bool and isinstance(value, str):
        return WORDS[value.lower()]
    if hint in (int, float) and isinstance(value, str):
        return hint(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or (isinstance(value, str) and value == str(choice)):
            return choice
    raise ValueError


def _first_that_fits(value: Any, hints: tuple[Any, ...]) -> Any:
    # str last: every command-line string would fit it
    for hint in sorted(hints, key=lambda h: h is str):
        try:
            return _convert(value, hint)
        except (ValueError, TypeError, KeyError):
            continue
    raise ValueError


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(h) for h in typing.get_args(hint))
    return {bool: "true or false", types.NoneType: "none"}.get(hint, getattr(hint, "__name__", ""))


def _example(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
