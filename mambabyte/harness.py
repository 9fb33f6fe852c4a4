"""The contract of the public harness, and an adapter for both versions of it.

The harness imports a file by its path, with a module ``wikitext`` importable that defines the
abstract class CharModel (reset, predict, observe). It calls ``train(train_text, valid_text=None)``
under a time limit, whose RuntimeError arrives once, and then asks the returned CharModel character
by character. In one version of it predict() returns a dict of probabilities, in another the
character itself: ``contract_of`` reads that off the abstract class, and ``check`` says which one
was met.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import signal
import sys
import threading
import time
import traceback
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mambabyte.corpus.utf8 import as_bytes, first_characters
from mambabyte.energy import EnergyMeter, total_joules
from mambabyte.errors import UserError
from mambabyte.evaluate import TASK_CHARACTERS
from mambabyte.stream import CharModel
from mambabyte.task import build, get_system
from mambabyte.task.run import CAP_SECONDS, IDLE_WATTS

Contract = Literal["distribution", "character"]
_TELL_SECONDS = 2.0
CONTRACT_VARIABLE = "MAMBABYTE_PREDICT"  # says which, where the abstract class does not
_PARAGRAPH = (
    " = Byte models = \n\n A model of bytes reads text as it is stored : no word is unknown to it ,"
    " and a name such as Dvořák is six letters or eight bytes . \n It was seen @-@ in 1 @,@ 024"
    " bytes of context – that a state of fixed size is enough . \n\n"
)
# 485 bytes with every kind of character that training text has, cut between characters.
TINY_TEXT = (_PARAGRAPH * 2).encode()[:485].decode(errors="ignore")


def contract_of(base: type) -> Contract:
    """What ``base.predict`` is declared to return; else what MAMBABYTE_PREDICT says; else a
    distribution, as the harness documents."""
    declared: Any = None
    try:
        declared = typing.get_type_hints(getattr(base, "predict", None)).get("return")
    except (NameError, AttributeError, TypeError):
        declared = getattr(getattr(base, "predict", None), "__annotations__", {}).get("return")
    if declared in (str, "str"):
        return "character"
    if declared is None and os.environ.get(CONTRACT_VARIABLE, "").startswith("char"):
        return "character"
    return "distribution"


def adapt(model: CharModel, base: type) -> Any:
    """``model`` as an instance of the harness's abstract class ``base``."""
    contract = contract_of(base)

    def predict(self: Any) -> Any:
        return model.greedy() if contract == "character" else model.predict()

    adapted = types.new_class("SubmittedCharModel", (base,), {}, lambda body: body.update(
        reset=lambda self: model.reset(), predict=predict,
        observe=lambda self, char: model.observe(char), contract=contract))
    return adapted()


def submit(name: str, train_text: str, base: type) -> Any:
    """Train the system called ``name`` on the GPU if there is one, as the harness asks."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fitted = build(get_system(name), as_bytes(train_text), device)
    return adapt(CharModel(fitted.model), base)


SUBMISSION = '''"""Submission to the public task: the system "{name}" of mambabyte.task."""

from __future__ import annotations

import importlib.util
import sys

from wikitext import CharModel

if importlib.util.find_spec("mambabyte") is None:  # not installed: the checkout that wrote this
    sys.path.insert(0, {root!r})

from mambabyte.harness import submit


def train(train_text: str, valid_text: str | None = None) -> CharModel:
    """Train on ``train_text`` alone; the validation text is not looked at."""
    return submit("{name}", train_text, CharModel)
'''


def submission(name: str) -> str:
    """Text of a submission file for the system called ``name``; UserError for an unknown one."""
    get_system(name)
    return SUBMISSION.format(name=name, root=str(Path(__file__).resolve().parents[1]))


def stand_in(contract: Contract) -> types.ModuleType:
    """A module ``wikitext`` with the abstract class of one version of the harness."""

    class AbstractCharModel(ABC):
        @abstractmethod
        def reset(self) -> None: ...

        @abstractmethod
        def predict(self) -> Any: ...

        @abstractmethod
        def observe(self, char: str) -> None: ...

    AbstractCharModel.predict.__annotations__["return"] = (
        str if contract == "character" else dict[str, float])
    AbstractCharModel.__name__ = "CharModel"
    module = types.ModuleType("wikitext")
    module.CharModel = AbstractCharModel  # type: ignore[attr-defined]
    return module


def check(path: Path, text: str = TINY_TEXT, contract: Contract = "distribution") -> Contract:
    """Run a submission file as the harness does, on a tiny text; returns the contract it met.

    A module ``wikitext`` that can be imported is used, else a stand-in of the version ``contract``.
    Raises UserError with what is wrong.
    """
    with imported(path, contract) as train:
        model = train(text)
    return _asked(path, model, text[:20])[1]


@contextmanager
def imported(path: Path, contract: Contract) -> Iterator[Callable[..., Any]]:
    """The function ``train`` of a submission file, called as the harness calls it, with a module
    ``wikitext`` in place meanwhile: the one that can be imported, else a stand-in of the version
    ``contract``. UserError for a file that is no submission, or fails."""
    if importlib.util.find_spec("wikitext") is not None:
        module = importlib.import_module("wikitext")
    else:
        module = stand_in(contract)
    before = sys.modules.get("wikitext")
    sys.modules["wikitext"] = module
    try:
        spec = importlib.util.spec_from_file_location("submission_under_check", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"{path} is not a Python file: give a submission, a file that ends in "
                            ".py")
        submission = importlib.util.module_from_spec(spec)
        with _blamed(path, "importing it"):
            sys.modules[spec.name] = submission  # dataclasses look their module up
            spec.loader.exec_module(submission)
        given = getattr(submission, "train", None)
        if not callable(given):
            raise UserError(f"{path} defines no function train(train_text, valid_text=None)")

        def train(text: str, valid_text: str | None = None) -> Any:
            with _blamed(path, "calling train(train_text, valid_text=None)"):
                takes = inspect.signature(given).parameters
                model = given(text, valid_text=valid_text) if "valid_text" in takes else given(text)
            if not isinstance(model, module.CharModel):
                raise UserError(f"{path}: train returned {type(model).__name__}, which is no "
                                "CharModel")
            return model

        yield train
    finally:
        sys.modules.pop("submission_under_check", None)
        if before is None:
            del sys.modules["wikitext"]
        else:
            sys.modules["wikitext"] = before


def _asked(
    path: Path, model: Any, text: str, report: Callable[[str], None] = lambda line: None
) -> tuple[int, Contract]:
    """How many characters of ``text`` the model says before it is told each, and its contract; of
    a distribution the most probable character counts, the first of equals."""
    met: Contract | None = None
    right, told = 0, time.perf_counter()
    with _blamed(path, "asking its model"):
        model.reset()
        for i, char in enumerate(text):
            got = model.predict()
            now = _met(path, got)
            if met is not None and now != met:
                raise UserError(f"{path}: predict() returns now a character, now a distribution")
            met = now
            right += (got if isinstance(got, str) else max(got, key=got.__getitem__)) == char
            model.observe(char)
            if not i % 100 and time.perf_counter() > told + _TELL_SECONDS:
                told = time.perf_counter()
                report(f"{i:,} of {len(text):,} characters, {right / (i + 1):.4f} of them right")
    if met is None:
        raise UserError("there is nothing to score: the text is empty")
    return right, met


def run_submission(
    path: Path, train_data: bytes | np.ndarray, splits: Mapping[str, np.ndarray], *,
    device: str = "cpu", idle_watts: float = IDLE_WATTS, characters: int = TASK_CHARACTERS,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a submission file and score it as the public harness does; its row of the result table.

    The file is run as it is, under either contract, with ``CAP_SECONDS`` for training, of which it
    is told by a RuntimeError in the main thread. Energy is that of its call of train(): importing
    it comes before, as in the harness. ``device`` says which counter is read. As many characters
    of each split of ``splits`` are asked for; "valid" whole is handed to train(). As for systems,
    the context of a GPU is there before.
    """
    text, valid = (bytes(data).decode(errors="surrogateescape") for data in (
        train_data, splits.get("valid", np.empty(0, np.uint8))))
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    # What a file prints is no part of our result.
    with redirect_stdout(sys.stderr), imported(path, "character") as train:
        report(f"calling train() of {path.name}")
        meter, host = EnergyMeter(device, idle_watts), EnergyMeter("cpu")
        try:
            with _within(CAP_SECONDS):
                model, failure = train(text, valid or None), None
        except UserError as error:
            if not isinstance(error.__cause__, _TimeIsUp):
                raise
            model, failure = None, f"not done after {CAP_SECONDS:g} s"
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        energy = meter.read(at="the end of training")
        total, cpu_joules, cpu_source = total_joules(energy, host.read())
        report(f"trained in {energy.seconds:.1f} s: {energy}")
        row: dict[str, Any] = {
            "about": f"the submission {path.name}", "smoke": False, "seed": 0, "device": device,
            "joules": energy.joules, "gross_joules": energy.gross_joules,
            "idle_watts": idle_watts, "energy_source": energy.source, "cpu_joules": cpu_joules,
            "cpu_source": cpu_source, "total_joules": total, "seconds": energy.seconds,
            "within_cap": failure is None, "failure": failure,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        began = time.perf_counter()
        for name, data in splits.items() if model is not None else ():
            wanted = first_characters(bytes(data), characters)
            right, row["contract"] = _asked(path, model, wanted, report)
            row |= {f"{name}_accuracy": right / len(wanted), f"{name}_characters": len(wanted)}
            report(f"{name}: {right / len(wanted):.4f}")
        return row | {"scoring_seconds": time.perf_counter() - began}


class _TimeIsUp(RuntimeError):
    """What the harness raises, once, when training takes longer than it may."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """_TimeIsUp in the body after as many seconds; nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise _TimeIsUp(f"training took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _blamed(path: Path, doing: str) -> Iterator[None]:
    """Whatever the submission raises as a UserError that names the line of its file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [str(f.lineno) for f in traceback.extract_tb(error.__traceback__)
                 if Path(f.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError):
            lines = [] if error.lineno is None else [str(error.lineno)]
        where = f", line {lines[-1]}" if lines else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        raise UserError(f"{path}{where}: {doing} failed with {type(error).__name__}: "
                        f"{what}") from error


def _met(path: Path, got: Any) -> Contract:
    if isinstance(got, str) and len(got) <= 1:  # "" is to say nothing, which is wrong
        return "character"
    if isinstance(got, Mapping) and got and all(
            isinstance(c, str) and len(c) == 1 and 0 <= p <= 1 + 1e-6 for c, p in got.items()):
        return "distribution"
    raise UserError(f"{path}: predict() returned {str(got)[:60]!r}, neither one character nor "
                    "probabilities of characters")
