"""All checks of a target on all cases, and the inputs on which one failed, as files."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from analysis.measure.audit.checks import BOUNDS, NEEDS, Measured, measure
from analysis.measure.audit.kinds import Case, Inputs, Kind, draw
from analysis.measure.audit.targets import ADAPTERS, Target, find_target
from analysis.measure.audit.tuning import one_setting
from mambabyte.config.files import make_dir, to_json, whole_file
from mambabyte.errors import UserError

Verdict = Literal["ok", "fault", "note", "refused"]
MOST_FILES = 8  # one a check and a case, of those that fail first
# By which a function says that it does not take an input; any other exception is a fault.
REFUSALS = (UserError, NotImplementedError, ValueError, AssertionError)
# What offsets of 32 bits do not reach; of a row that is drawn.
LARGE = Case("more than 2^31 elements", 8192, batch=1, widths="wide")
_ALL = ("definition", "repeat", "one gradient", "inputs", "poisoned memory", "row alone",
        "other rows", "causality", "handover")


def plan(kind: Kind, device: str) -> list[tuple[Case, tuple[str, ...]]]:
    """Cases, and which checks each has; on a card, whose kernels are for wide heads, all are wide
    but the odd one."""
    on_card = torch.device(device).type == "cuda"
    cases = list(_plan(kind))
    if on_card:
        cases = [(case if case.widths == "odd" else replace(case, widths="wide"), checks)
                 for case, checks in cases if case.widths != "wide"]
    if on_card and kind.name != "attention":
        cases.append((LARGE, ("offsets past 2^31",)))
    return cases


def _plan(kind: Kind) -> Iterator[tuple[Case, tuple[str, ...]]]:
    only = ("definition",)
    yield Case("usual", 64), _ALL
    for length in (1, 2, 3):
        yield Case(f"short, {length}", length), only
    for length in (63, 65, 127, 129):
        yield Case(f"beside a chunk, {length}", length), only
    yield Case("odd", 61, batch=3, widths="odd"), ("definition", "row alone", "other rows")
    for gates in ("slow", "fast", "mixed"):
        yield Case(f"{gates} gates", 130, gates=gates), (
            "definition", "handover") if gates == "mixed" else only
    for layout in ("transposed", "in nan", "expanded"):
        yield Case(layout, 33, layout=layout), only
    yield Case("wide", 130, widths="wide"), only
    yield Case("packed", 130, batch=1, documents=(1, 63, 1, 64, 1)), only
    yield Case("packed, odd", 97, batch=1, documents=(33, 31, 33), gates="mixed"), only
    yield Case("long", 1025 if kind.name == "attention" else 2049), ("definition", "handover")


@dataclass(frozen=True)
class Finding:
    """One number, or one refusal, and what it means."""

    check: str
    case: str
    dtype: str
    quantity: str
    error: float
    bound: float
    verdict: Verdict
    note: str = ""
    file: Path | None = None


@dataclass
class Audit:
    """All that was found of a target."""

    target: str
    kind: str
    device: str
    versions: dict[str, str]
    lacks: list[str]  # features that the target does not have, and was not asked for
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)  # cases whose checks did not all end
    interrupted: bool = False
    settings: dict[str, str] = field(default_factory=dict)  # of kernels that tune themselves

    def of(self, verdict: Verdict) -> list[Finding]:
        return [f for f in self.findings if f.verdict == verdict]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit(
    target: Target, dtypes: list[torch.dtype], device: str, folder: Path | None = None,
    tolerance: float | None = None, report: Callable[[float, str], None] | None = None,
    seconds: float = math.inf,
) -> Audit:
    """Check ``target`` in each of ``dtypes``; inputs that fail go to ``folder`` where there is one.

    ``tolerance`` takes the place of the bounds of all dtypes. After ``seconds``, or when it is
    interrupted, what has been found is returned, with the cases that were not reached. Raises
    UserError where the target takes no input at all.
    """
    start = time.monotonic()
    for old in folder.glob("fault-??.safetensors") if folder is not None else ():
        if _is_kept(old):
            old.unlink()
    found = _begun(target, device)
    todo = [(dtype, case, checks) for dtype in dtypes
            for case, checks in plan(target.kind, device) if _asked(target, case, dtype)]
    todo.sort(key=lambda item: item[1] is LARGE)  # last: a crash of the card ends what follows
    names = [f"{case.name}, {str(dtype).removeprefix('torch.')}" for dtype, case, _ in todo]
    number = 0
    try:
        with one_setting() as found.settings:
            for number, (dtype, case, checks) in enumerate(todo):
                if report is not None:
                    report(number / len(todo), names[number])
                x = target.taken(draw(target.kind, case, dtype, device))
                for check in checks:
                    if time.monotonic() - start > seconds:
                        raise TimeoutError
                    if all(map(target.has, NEEDS.get(check, ()))):
                        found.findings += check_case(
                            target, check, case, x, tolerance or BOUNDS[dtype], folder, found)
            number = len(todo)
    except TimeoutError:
        if not found.findings:
            raise UserError(f"{seconds:g} seconds are over before the first number: give more "
                            "with --max-seconds") from None
    except KeyboardInterrupt:
        if not found.findings:
            raise
        found.interrupted = True
    found.unreached = names[number:]
    if all(f.quantity == "call" for f in found.findings):
        first = found.findings[0]
        raise UserError(f"{target.name} takes no input of kind {target.kind.name} ({first.note}): "
                        "give --kind or --adapter that fits, or a function of the protocol around "
                        "it (docs/audit.md)")
    if target.kind.has_state and not any(f.quantity == "state" for f in found.findings):
        found.lacks = sorted({*found.lacks, "state"})
    found.seconds = time.monotonic() - start
    return found


def _begun(target: Target, device: str) -> Audit:
    """An audit without findings yet, with the versions of what computes."""
    package = target.name.partition(":")[0].partition(".")[0]
    versions = {name: str(sys.modules[name].__version__) for name in ("torch", "triton", package)
                if hasattr(sys.modules.get(name), "__version__")}
    return Audit(target.name, target.kind.name, device, versions, sorted(target.adapter.lacks))


def _asked(target: Target, case: Case, dtype: torch.dtype) -> bool:
    if case.documents and not target.has("documents"):
        return False
    return case is not LARGE or dtype in (torch.bfloat16, torch.float16)


def check_case(
    target: Target, check: str, case: Case, x: Inputs, bound: float, folder: Path | None,
    found: Audit,
) -> list[Finding]:
    """The findings of one check on one case."""
    dtype = str(x[target.kind.streams[0]].dtype).removeprefix("torch.")
    findings: list[Finding] = []
    try:
        for measured in measure(check, target, case, x, bound):  # what ends with an error as well
            findings.append(_judged(measured, check, case, dtype))
    except torch.OutOfMemoryError:
        findings.append(Finding(check, case.name, dtype, "call", math.nan, bound, "refused",
                                "out of memory"))
    except (Exception, SystemExit) as error:  # whatever the target raises is what is found
        first = (str(error).splitlines() or [""])[0]
        findings.append(_judged(
            Measured("call", math.inf, bound, f"{type(error).__name__}: {first}"), check, case,
            dtype, "refused" if isinstance(error, REFUSALS) else "fault"))
    faults = [f for f in findings if f.verdict == "fault"]
    kept = {f.file for f in found.findings if f.file}
    if faults and folder is not None and len(kept) < MOST_FILES and case is not LARGE:
        path = _keep(folder, len(kept) + 1, target, check, case, x, bound)
        findings = [Finding(**{**vars(f), "file": path}) if f.verdict == "fault" else f
                    for f in findings]
    return findings


def _judged(
    m: Measured, check: str, case: Case, dtype: str, verdict: Verdict | None = None
) -> Finding:
    if verdict is None:
        verdict = "ok" if m.error <= m.bound else "note" if m.minor else "fault"
    return Finding(check, case.name, dtype, m.quantity, m.error, m.bound, verdict, m.note)


# --------------------------------------------------------------------- inputs that failed


def _keep(
    folder: Path, number: int, target: Target, check: str, case: Case, x: Inputs, bound: float
) -> Path:
    """Write the inputs of a check, with what is needed to run it again."""
    make_dir(folder)
    path = folder / f"fault-{number:02d}.safetensors"
    adapter = next((n for n, a in ADAPTERS.items() if a is target.adapter), None)
    about = {"target": target.name, "kind": target.kind.name, "adapter": adapter, "check": check,
             "case": asdict(case), "bound": bound}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in x.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"audit": to_json(about)})
    return path


def _is_kept(path: Path) -> bool:
    """Whether an audit wrote this file: another of its name is the user's."""
    try:
        with safe_open(path, "pt") as file:
            return "audit" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def reproduce(path: Path, device: str) -> Audit:
    """Run the check whose inputs are in ``path``, as :func:`audit` wrote it, once more."""
    try:
        with safe_open(path, "pt", device=device) as file:
            about = json.loads((file.metadata() or {})["audit"])
            x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        case = Case(**{**about["case"], "documents": tuple(about["case"]["documents"])})
        adapter = about["adapter"]
        target = find_target(about["target"], None if adapter else about["kind"], adapter)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no inputs of an audit ({type(error).__name__}): expected a "
                        "file that mambabyte audit --out wrote") from None
    found = _begun(target, device)
    x = {name: x[name] for name in draw(target.kind, Case("", 1), torch.float32, "cpu")
         if name in x}  # in the order of the kind
    found.findings = check_case(target, about["check"], case, x, about["bound"], None, found)
    return found
