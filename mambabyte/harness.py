"""The contract of the public harness, and an adapter for both versions of it.

The harness imports a file by its path, with a module ``wikitext`` importable that defines the
abstract class CharModel (reset, predict, observe). It calls ``train(train_text, valid_text=None)``
under a time limit, whose RuntimeError arrives once, and then asks the returned CharModel character
by character. In one version of it predict() returns a dict of probabilities, in another the
character itself: ``contract_of`` reads that off the abstract class, and ``check`` says which one
was met.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mambabyte.corpus.utf8 import as_bytes
from mambabyte.errors import UserError
from mambabyte.stream import CharModel
from mambabyte.task import build, get_system

Contract = Literal["distribution", "character"]
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
            spec.loader.exec_module(submission)
        if not callable(getattr(submission, "train", None)):
            raise UserError(f"{path} defines no function train(train_text, valid_text=None)")
        with _blamed(path, "calling train(train_text, valid_text=None)"):
            inspect.signature(submission.train).bind(text, None)
            model = submission.train(text)
    finally:
        if before is None:
            del sys.modules["wikitext"]
        else:
            sys.modules["wikitext"] = before
    if not isinstance(model, module.CharModel):
        raise UserError(f"{path}: train returned {type(model).__name__}, which is no CharModel")
    met: set[Contract] = set()
    with _blamed(path, "asking its model"):
        model.reset()
        for char in text[:20]:
            met.add(_met(path, model.predict()))
            model.observe(char)
    if len(met) != 1:
        raise UserError(f"{path}: predict() returns now a character, now a distribution")
    return met.pop()


@contextmanager
def _blamed(path: Path, doing: str) -> Iterator[None]:
    """Whatever the submission raises as a UserError that names the line of its file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [str(f.lineno) for f in traceback.extract_tb(error.__traceback__)
                 if Path(f.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError):
            lines = [str(error.lineno)]
        where = f", line {lines[-1]}" if lines else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        raise UserError(f"{path}{where}: {doing} failed with {type(error).__name__}: "
                        f"{what}") from error


def _met(path: Path, got: Any) -> Contract:
    if isinstance(got, str) and len(got) == 1:
        return "character"
    if isinstance(got, Mapping) and got and all(
            isinstance(c, str) and len(c) == 1 and 0 <= p <= 1 + 1e-6 for c, p in got.items()):
        return "distribution"
    raise UserError(f"{path}: predict() returned {str(got)[:60]!r}, neither one character nor "
                    "probabilities of characters")
