"""Which run speaks for each study, and what is wrong where none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from analysis.runs.folders import Run


@dataclass
class Selection:
    """The runs of a report, sorted by what they are."""

    headline: dict[str, Run] = field(default_factory=dict)  # the run whose numbers the prose uses
    others: dict[str, list[Run]] = field(default_factory=dict)  # same study, other parameters
    failed: list[Run] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # study -> why it has no headline
    stale: set[str] = field(default_factory=set)  # studies whose headline is out of date (drafts)


def select(
    runs: Sequence[Run], current: Mapping[str, str], profiles: Sequence[str],
    draft: bool = False,
) -> Selection:
    """Sorts runs. ``profiles`` is the order of preference, e.g. full before quick.

    ``current`` is the digest of the sources of each study of the registry as they are now. A run
    is stale when they changed since; in a draft a stale run speaks for its study where there is
    no better one. Studies outside the registry are never stale.
    """
    found = Selection()
    fresh = {r.folder: current.get(r.study, r.sources) == r.sources for r in runs}

    for name in [*current, *sorted({r.study for r in runs} - current.keys())]:
        mine = [r for r in runs if r.study == name]
        done = [r for r in mine if r.status == "done"]
        usable = [r for r in done if fresh[r.folder]]
        if not usable and done and draft:
            usable = done
            found.stale.add(name)
        if usable:
            head = min(usable, key=lambda r: _rank(r, profiles))
            found.headline[name] = head
            found.others[name] = sorted(
                (r for r in usable if r is not head), key=lambda r: (r.profile, r.run_id))
        else:
            found.problems[name] = _problem(mine, done)
        # An old failure that a newer run of the same parameters has made up for is no news.
        found.failed += [r for r in mine if r.status == "failed" and not any(
            d.parameters == r.parameters and fresh[d.folder] for d in done)]
    return found


def _rank(run: Run, profiles: Sequence[str]) -> tuple[int, str, str]:
    place = profiles.index(run.profile) if run.profile in profiles else len(profiles)
    # Newest first among equals: a later date must sort lower.
    date = "".join(chr(0x10FFFF - ord(c)) for c in str(run.provenance.get("date", "")))
    return place, date, run.run_id


def _problem(runs: Sequence[Run], done: Sequence[Run]) -> str:
    if done:
        return f"its sources changed since its run {done[0].folder.name}"
    if runs:
        return f"its run {runs[0].folder.name} failed ({runs[0].error})"
    return "it has not been run"


def advice(name: str, problem: str) -> str:
    """The one line of an error about a study without a usable run."""
    return f"{name}: {problem}: run `mambabyte sweep {name}`, or build a draft (--draft)"
