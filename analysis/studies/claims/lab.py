"""The laboratory: every number that a check reads, measured once and when first asked for.

Numbers are named EXPERIMENT.quantity; an experiment returns all its quantities at once. Any of
them can be given from outside instead, which is how the tests see a verdict change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.studies.claims.evidence import Evidence, Source
from analysis.studies.claims.ledger import OPEN, Finding
from mambabyte.errors import UserError

Experiment = Callable[["Settings"], dict[str, float]]
EXPERIMENTS: dict[str, Experiment] = {}


@dataclass(frozen=True)
class Settings:
    """How the experiments of this study are run."""

    seed: int = 0
    device: str = "cpu"  # of the paired trainings
    initial_seeds: int = 4
    fox_batch: int = 1
    tied_steps: tuple[int, ...] = (60, 180)  # where the tied head is looked at
    paired_seeds: int = 1  # of the two comparisons below
    parts_steps: int = 150  # with each part of the block and without
    streamed_steps: int = 60  # trained by the published scan, then streamed by the step


def experiment(function: Experiment) -> Experiment:
    """Registers an experiment under its name."""
    EXPERIMENTS[function.__name__] = function
    return function


class Lab:
    """``lab["fox.last_loss"]`` runs the experiment ``fox`` once and gives that quantity."""

    def __init__(
        self, settings: Settings | None = None, evidence: Evidence | None = None,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
        given: Mapping[str, float] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings = settings or Settings()
        self.evidence = evidence or Evidence()
        self._facts = facts or {}
        self._given = dict(given or {})
        self._measured: dict[str, dict[str, float]] = {}
        self._report = report

    def __getitem__(self, name: str) -> float:
        if name in self._given:
            return self._given[name]
        group, _, quantity = name.partition(".")
        if group not in self._measured:
            if group not in EXPERIMENTS:
                raise UserError(f"there is no experiment {group!r} for {name!r}")
            self._report(f"experiment {group}")
            self._measured[group] = EXPERIMENTS[group](self.settings)
        if quantity not in self._measured[group]:
            raise UserError(f"experiment {group!r} has no quantity {quantity!r}")
        return self._measured[group][quantity]

    def fact(self, name: str, key: str) -> Any:
        """An outside fact of data/claims.toml, e.g. a data sheet's number."""
        try:
            return self._facts[name][key]
        except KeyError:
            raise UserError(f"data/claims.toml has no fact {name}.{key}") from None

    def published(self, name: str) -> Mapping[str, Any] | None:
        """An outside fact as a whole, or None where the ledger has none of that name."""
        return self._facts.get(name)

    def value(
        self, study: str, *names: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None, most: str = "",
    ) -> Source | None:
        """A recorded value of another study, of a run with the parameters ``like`` where they are
        given, of the run with the largest parameter ``most``; None where there is none."""
        return self.evidence.value(study, *names, accelerator=accelerator, like=like, most=most)

    def each(
        self, study: str, *names: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None,
    ) -> list[Source]:
        """Every run of another study that has measured all of ``names``: its values by name."""
        return self.evidence.each(study, *names, accelerator=accelerator, like=like)

    def table(
        self, study: str, name: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None, most: str = "", column: str = "",
    ) -> Source | None:
        """A recorded table of another study, chosen as a value is; None where there is none."""
        return self.evidence.table(study, name, accelerator, like, most, column)

    def parameter(self, study: str, name: str) -> Source | None:
        """A parameter of a run of another study; None where none was given it."""
        return self.evidence.parameter(study, name)

    def task(self, system: str) -> Source | None:
        """Whole runs of a system under the public task's rules; None where none is recorded."""
        return self.evidence.task(system)

    def tasks(self, *systems: str) -> list[Source] | None:
        """Whole runs of several systems, of one record where one has them all."""
        return self.evidence.tasks(*systems)

    def undecided(self, study: str, what: str, ours: str | None = None) -> Finding:
        """The finding of a check whose run is missing: it says what to run."""
        why = "its run is out of date" if study in self.evidence.stale else "no run has measured it"
        return Finding(OPEN, ours, f"{what}; {why}: run study {study}.", f"study {study}")
