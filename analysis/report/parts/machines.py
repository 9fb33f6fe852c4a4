"""The machines of a report, each once: what it is, and which runs and records took place on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from analysis.report.html.text import html, number, plain
from analysis.runs.folders import Run
from analysis.runs.records import machine_name

_COUNTED = ("gpus", "cpu", "cpu_count", "memory_bytes")  # shown by name, the rest as it is


@dataclass
class Machine:
    """One machine; ``facts`` are (name, value) in order, ``served`` (name, anchor or "")."""

    id: str
    name: str
    about: list[Mapping[str, Any]] = field(default_factory=list)
    served: list[tuple[str, str]] = field(default_factory=list)

    def rows(self) -> list[tuple[str, Any]]:
        """Facts for a reader, in order: name, and text or Markup; None where no run said it."""
        gpus: dict[str, None] = {}
        for about in self.about:
            for line in _gpus(about):
                gpus.setdefault(line)
        rows: list[tuple[str, Any]] = [("GPU", " or ".join(gpus))] if gpus else []
        rows.append(("processor", self._all("cpu", plain)))
        rows.append(("CPUs", self._all("cpu_count", plain)))
        rows.append(("memory", self._all("memory_bytes", gigabytes)))
        others = {key: None for about in self.about for key in about if key not in _COUNTED}
        rows += [(str(key).replace("_", " "), self._all(key, plain)) for key in others]
        links = ", ".join(f'<a href="#{html(anchor)}">{html(name)}</a>' if anchor else html(name)
                          for name, anchor in dict.fromkeys(self.served))
        return [*rows, ("runs and records", Markup(links))]

    def _all(self, key: str, text: Any) -> str | None:
        """Every value that runs gave, each once; None where none did."""
        found = dict.fromkeys(text(about[key]) for about in self.about
                              if about.get(key) is not None)
        # "Linux" says no more than "Linux x86_64".
        said = [a for a in found if not any(b.startswith(f"{a} ") for b in found)]
        return ", ".join(said) or None


class Machines:
    """Runs come in, distinct machines come out, in order of appearance."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Machine] = {}

    def add(self, run: Run, name: str, anchor: str) -> None:
        """A run or record called ``name``, which the page shows at ``anchor`` ("" nowhere)."""
        machine = self.found.setdefault(
            _key(run), Machine(f"machine-{len(self.found) + 1}", _title(run)))
        about = run.provenance.get("machine")
        if isinstance(about, dict):
            machine.about.append(about)
        machine.served.append((name, anchor))

    def id_of(self, run: Run) -> str:
        return self.found[_key(run)].id


def gigabytes(value: Any) -> str:
    """Bytes as GB (1e9), whole from 10 on: 150109880320 -> "150 GB"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return plain(value)
    return f"{number(round(value / 1e9, 0 if value >= 1e10 else 2))} GB"


def _key(run: Run) -> tuple[Any, ...]:
    """What tells machines apart. Threads are a run's choice, and drivers differ in the last
    bytes of a card's memory."""
    about = run.provenance.get("machine")
    if not isinstance(about, dict):
        return ("unknown",)
    return machine_name(run), plain(about.get("cpu")), plain(about.get("cpu_count"))


def _title(run: Run) -> str:
    about = run.provenance.get("machine")
    name = machine_name(run)
    if isinstance(about, dict) and about.get("gpus"):
        return f"{name}; {plain(about.get('cpu'))}, {plain(about.get('cpu_count'))} CPUs"
    return name


def _gpus(about: Mapping[str, Any]) -> Iterable[str]:
    cards = about.get("gpus")
    if not isinstance(cards, list) or not cards:
        return []
    lines = [_card(card) if isinstance(card, dict) else plain(card) for card in cards]
    return [f"{lines.count(line)} × {line}" if lines.count(line) > 1 else line
            for line in dict.fromkeys(lines)]


def _card(card: Mapping[str, Any]) -> str:
    """Name and memory; what else there is (multiprocessors) is the model's, not the machine's."""
    return f"{plain(card.get('name'))}, {gigabytes(card.get('memory_bytes'))}"
