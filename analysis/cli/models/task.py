"""Run a named system under the rules of the public task, or look at one.

    mambabyte task list
    mambabyte task run counts --corpus path/to/folder   # no network to train
    mambabyte task run ours --corpus path/to/folder --seeds 3
    mambabyte task run ours --corpus path/to/folder --seed 3   # one more
    mambabyte task run nano_plus_ngram --corpus path/to/folder --json
    mambabyte task run ours --corpus path/to/folder --record data/records/task/h200-task-new
    mambabyte task run --peer submission.py --corpus path/to/folder --characters 2000
    mambabyte task record data/records/task/h200-task-new --rows ours.json nano.json
    mambabyte task export ours --out ours.py
    mambabyte task check ours.py

``run`` trains from scratch, once a seed: training bytes in, 300 seconds at most, energy read from
the GPU's counter minus a stated idle baseline, then 60,000 characters of the validation and test
splits. ``export`` writes a submission file of the system for the public harness. ``check`` imports
such a file as the public harness does, trains it on 485 bytes and says which version of the
contract it met. ``record`` keeps what several ``run --json`` have printed on one machine as one
record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from analysis.cli.console import said_again, say
from analysis.cli.options import POSITIONAL, pick_device, print_result, subcommand
from analysis.cli.parser import Action
from mambabyte.config.checks import Count, DeviceOrAuto, NotNegative, Seed, between

if TYPE_CHECKING:
    from mambabyte.task.systems import System


@dataclass(frozen=True)
class List:
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Run:
    name: Annotated[str, POSITIONAL] = ""
    """System to run: see mambabyte task list."""
    peer: Path | None = None
    """Instead of a system a submission file to the public harness, run as it is: under either
    contract, its call of train() measured, scored character after character."""
    corpus: str = "stdlib"
    """stdlib, wikitext103, a text file, or a folder of text files or wiki.*.raw."""
    seeds: Annotated[int, between(1, 1000)] = 1
    """How many runs, each with a seed of its own."""
    seed: Seed = 0
    """The first seed; the next runs have those that follow it."""
    characters: Count = 60_000
    """How many characters of each split to score."""
    idle_watts: NotNegative = 50.0
    """Power subtracted from the measured energy; the published figures subtract 50."""
    record: Path | None = None
    """Also keep the rows as a record, the folder, such as data/records/task/NAME."""
    title: str = ""
    """The record's heading."""
    about: str = ""
    """A line on what was run and why."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Export:
    name: Annotated[str, POSITIONAL]
    """System to export: see mambabyte task list."""
    out: Path | None = None
    """The file to write; standard output if not given."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Check:
    file: Annotated[Path, POSITIONAL]
    """Submission file to check."""
    contract: Literal["distribution", "character"] = "distribution"
    """The version of the harness to stand in for, where it is not installed."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Record:
    folder: Annotated[Path, POSITIONAL]
    """Folder of the record, such as data/records/task/NAME."""
    rows: tuple[Path, ...]
    """Files with the output of mambabyte task run --json."""
    title: str = ""
    """The record's heading."""
    about: str = ""
    """A line on what was run and why."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    return subcommand(ACTIONS, argv, "task", __doc__, default="list")


def _list(options: List) -> int:
    from mambabyte.task import SYSTEMS
    from mambabyte.task.systems import ALIASES

    other = {name: " ".join(a for a, of in ALIASES.items() if of == name) for name in SYSTEMS}
    about = {name: system.about + (f" (also: {other[name]})" if other[name] else "")
             for name, system in SYSTEMS.items()}
    print_result(about, options.json, [f"{name:24} {text}" for name, text in about.items()])
    return 0


def _export(options: Export) -> int:
    from mambabyte.config.files import whole_file
    from mambabyte.harness import submission

    text = submission(options.name)
    if options.out is None:
        print(text, end="")
        return 0
    with whole_file(options.out) as part:
        part.write_text(text, encoding="utf-8")
    print_result({"file": str(options.out), "system": options.name}, options.json,
                 [f"{options.out}: the system {options.name}; mambabyte task check "
                  f"{options.out} runs it as the harness does"])
    return 0


def _check(options: Check) -> int:
    from mambabyte.harness import check

    met = check(options.file, contract=options.contract)
    print_result({"file": str(options.file), "contract": met}, options.json,
                 [f"{options.file}: predict() returns a {met}; SMOKE PASS"])
    return 0


def _run(options: Run) -> int:
    from mambabyte.errors import UserError
    from mambabyte.task import get_system
    from mambabyte.task.systems import ALIASES

    if (not options.name) == (options.peer is None):
        raise UserError("task run needs NAME, a system, or --peer, a submission file"
                        + (": not both" if options.name else ""))
    if options.seed + options.seeds > 2**63:  # now, and not after the runs before it
        raise UserError(f"the last seed is {options.seed + options.seeds - 1}: expected less than "
                        "2**63; give a smaller --seed")
    system: System | Path
    if options.peer is None:
        name = ALIASES.get(options.name, options.name)
        system = get_system(options.name)
    else:  # the public ones are all called submission.py, each in its folder
        path = options.peer.resolve()
        name = path.parent.name if path.stem == "submission" else path.stem
        system = options.peer
    if not options.record:
        return _seeds(options, name, system)

    from analysis.runs.records import check_record_folder
    from mambabyte.config.owners import only_one

    check_record_folder(options.record)  # now, and not after the runs
    with only_one(options.record.with_name(f".{options.record.name}.lock"),
                  f"makes the record {options.record.name}"):
        return _seeds(options, name, system)


def _seeds(options: Run, name: str, system: System | Path) -> int:
    """Train and score, once a seed, and keep and print the rows."""
    from mambabyte.config.provenance import provenance
    from mambabyte.corpus import load_corpus
    from mambabyte.harness import run_submission
    from mambabyte.task import run_task

    device, corpus = pick_device(options.device), load_corpus(options.corpus, say)
    rows: list[dict[str, Any]] = []
    interrupted = False
    splits = {"valid": corpus.valid, "test": corpus.test}
    try:
        with said_again(say) as report:
            rules: dict[str, Any] = {"device": device, "idle_watts": options.idle_watts,
                                     "characters": options.characters, "report": report}
            for seed in range(options.seed, options.seed + options.seeds):
                row = (run_submission(system, corpus.train, splits, **rules)
                       if isinstance(system, Path) else
                       run_task(system, corpus.train, splits, seed=seed, **rules)) | {"seed": seed}
                rows.append({"system": name, "corpus": corpus.name, **row})
    except KeyboardInterrupt:  # the seeds that ended are results: minutes and kilojoules each
        if not rows:
            raise
        say(f"interrupted; {len(rows)} of {options.seeds} seeds are done")
        interrupted = True
    record = {"system": name, "corpus": corpus.name, "runs": rows,
              "idle_watts": options.idle_watts, "characters": options.characters, **provenance()}

    def keep() -> None:
        if options.record:
            _keep(options.record, [record], options.title, options.about)

    print_result(record, options.json, [_header(), *map(_line, rows)], keep)
    return 130 if interrupted else 0


def _join(options: Record) -> int:
    """One record of what several runs have printed."""
    from mambabyte.errors import UserError

    try:
        printed = [json.loads(path.read_text(encoding="utf-8")) for path in options.rows]
        _keep(options.folder, printed, options.title, options.about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("--rows: not the output of mambabyte task run --json "
                        f"({type(error).__name__}: {error})") from None
    print_result({"record": str(options.folder)}, options.json, [str(options.folder)])
    return 0


def _keep(folder: Path, printed: Sequence[dict[str, Any]], title: str, about: str) -> None:
    """Writes what runs under the same rules on one machine have printed as a record."""
    from analysis.runs.records import write_record_folder
    from analysis.studies.task.record import task_record

    first = printed[0]
    provenance = {key: first[key] for key in ("date", "command", "commit", "versions", "machine")}
    write_record_folder(task_record(
        [row for one in printed for row in one["runs"]], provenance,
        idle_watts=first["idle_watts"], characters=first["characters"], title=title,
        about=about), folder)


def _header() -> str:
    return (f"{'seed':>4} {'GPU J':>8} {'total J':>8} {'s':>7} {'valid acc':>9} "
            f"{'b/byte':>7} {'test acc':>9} {'b/byte':>7} {'params':>10} {'bytes seen':>12} "
            f"{'peak MiB':>9}")


def _line(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"{row['seed']:4} {row['failure']}"

    def cell(key: str, width: int, form: str, scale: float = 1) -> str:
        value = row.get(key)
        return f"{'-' if value is None else format(value * scale, form):>{width}}"

    return " ".join([
        cell("seed", 4, "d"), cell("joules", 8, ".0f"), cell("total_joules", 8, ".0f"),
        cell("seconds", 7, ".1f"),
        cell("valid_accuracy", 9, ".4f"), cell("valid_bits_per_byte", 7, ".4f"),
        cell("test_accuracy", 9, ".4f"), cell("test_bits_per_byte", 7, ".4f"),
        cell("n_parameters", 10, ",d"), cell("bytes_seen", 12, ",d"),
        cell("peak_memory_bytes", 9, ".0f", 2**-20),
        *(["SMOKE: a tiny model, not this system"] if row.get("smoke") else [])])


ACTIONS = {
    "list": Action(List, _list, "The systems and what each is"),
    "run": Action(Run, _run, "Train, score and read the energy, once a seed"),
    "export": Action(Export, _export, "A submission file of a system, for the public harness"),
    "check": Action(Check, _check, "A submission file, as the harness does"),
    "record": Action(Record, _join, "Keep what several runs have printed as one record"),
}
