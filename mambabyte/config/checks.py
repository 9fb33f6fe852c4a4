"""What a field may hold, said where it is declared and checked alike for every way in.

    steps: Annotated[int, between(1, 10_000)] = 100
    kinds: Annotated[tuple[Kind, ...], entries(1)] = ("constant",)

The annotation is the whole rule: its type, and in ``Annotated`` what else must hold. A dataclass
that extends ``Checked`` is fitted to its annotations when it is made, from Python, a notebook or a
file; ``read`` makes values out of the words of a command line. Only what holds between fields is
left to code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import numbers
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mambabyte.errors import UserError, nearest

T = TypeVar("T")
SHOWN = 60  # characters of a value in a message
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold of a value besides its type, and how a message puts it."""

    fits: Callable[[Any], bool]
    words: Callable[[], str]
    known: Callable[[], Iterable[str]] | None = None  # the words that fit, where they are few
    renamed: Mapping[str, str] = dataclasses.field(  # old word -> what it is called now
        default_factory=dict, compare=False)


def between(least: float, most: float) -> Rule:
    return Rule(lambda x: least <= x <= most, lambda: f"from {least} to {_short(most)}")


def above(least: float, most: float = math.inf) -> Rule:
    return Rule(lambda x: least < x <= most, lambda: f"above {least}" + (
        f" and at most {most}" if most < math.inf else ""))


def at_least(least: float, below: float = math.inf) -> Rule:
    return Rule(lambda x: least <= x < below, lambda: (
        f"{least} or more" if below == math.inf else f"at least {least} and below {below}"))


def multiple_of(step: int) -> Rule:
    return Rule(lambda x: x > 0 and x % step == 0, lambda: f"that is a multiple of {step}")


def one_of(names: Callable[[], Iterable[str]], renamed: Mapping[str, str] | None = None) -> Rule:
    """A word of a registry, which is asked when a value is checked: it may grow. Words of earlier
    versions, the keys of ``renamed``, are read as what they are called now."""
    return Rule(lambda x: x in list(names()), lambda: f"one of {', '.join(names())}", names,
                renamed or {})


def entries(least: int = 1, *, once: bool = True, rising: bool = False) -> Rule:
    """How a list must be: so many entries at least, each once, in rising order."""
    def fits(values: tuple[Any, ...]) -> bool:
        apart = len(set(values)) == len(values) or not once
        return len(values) >= least and apart and (not rising or list(values) == sorted(values))

    parts = [f"{least} or more" if least else "", "each once" if once else "",
             "in rising order" if rising else ""]
    return Rule(fits, lambda: ", ".join(filter(None, parts)))


def _short(number: float) -> str:
    return f"{number:g}" if number > 10**9 else str(number)


# What many fields are. Above these no machine has room, and a seed no bits.
Count = Annotated[int, between(1, 10**15)]
CountOrNone = Annotated[int, between(0, 10**15)]  # 0 stands for none, or for a default
Seed = Annotated[int, between(0, 2**63 - 1)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Share = Annotated[float, between(0, 1)]
Layers = Annotated[int, between(1, 10_000)]
Threads = Annotated[int, between(0, 1024)]  # 0 leaves torch's own choice
Workers = Annotated[int, between(1, 1024)]
Some = Annotated[int, at_least(1)]


_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
Device = Annotated[str, Rule(lambda text: bool(_DEVICE.fullmatch(text)),
                             lambda: "cpu, cuda or cuda:N")]
DeviceOrAuto = Annotated[str, Rule(lambda text: text == "auto" or bool(_DEVICE.fullmatch(text)),
                                   lambda: "auto, cpu, cuda or cuda:N")]


class Checked:
    """Base of a dataclass whose values fit its annotations, or it is not made.

    A list becomes a tuple and a whole number a float where the annotation says so. UserError names
    the field, what it was given and what it takes.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, fit(getattr(self, name), hint, name))


def hints(cls: Any) -> dict[str, Any]:
    """The annotation of every field of a dataclass by name, in order."""
    return _hints(cls)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def texts(cls: type) -> dict[str, str]:
    """What is said of every field of a dataclass: the string below it in its source, in one line.
    """
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore
        for field, said in itertools.pairwise(body):
            match field, said:
                case (ast.AnnAssign(target=ast.Name(id=name)),
                      ast.Expr(value=ast.Constant(value=str(text)))):
                    found[name] = " ".join(text.split())
    return {name: found.get(name, "") for name in hints(cls)}


def fit(value: Any, hint: Any, name: str) -> Any:
    """``value`` as what the annotation ``hint`` says; UserError that begins with ``name``."""
    try:
        return _fit(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {shown(value)}{_hint_at(value, hint)}: expected "
                        f"{words(hint)}") from None


def path_of(value: Any, name: str) -> Path:
    """``value`` as a path; UserError that begins with ``name`` for what is none, or is empty."""
    try:
        if not isinstance(value, str) or value:  # an empty one would be the working folder
            return Path(value)
    except TypeError:
        pass
    raise UserError(f"{name} is {shown(value)}: expected a path")


def read(text: str | list[str], hint: Any, name: str) -> Any:
    """The value that words of a command line stand for; a list is ``1,2,3`` or a list of words."""
    try:
        value = _read(text, hint)
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{name} is {shown(text)}{_hint_at(text, hint)}: expected "
                        f"{words(hint)}") from None
    return fit(value, hint, name)


def from_plain(cls: type[T], values: Any, name: str) -> T:
    """A Checked dataclass from what a file holds; UserError that begins with ``name``."""
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {shown(values)}: expected an object of named values")
    for key in values:
        if key not in hints(cls):
            raise UserError(f"{name} has an unknown field {shown(key)}"
                            f"{nearest(str(key), hints(cls))}: it is of another version of this "
                            "package, or was edited")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def words(hint: Any) -> str:
    """An annotation in words, as a message ends: "a whole number from 1 to 64"."""
    origin, rules = typing.get_origin(hint), getattr(hint, "__metadata__", ())
    rules = [rule for rule in rules if isinstance(rule, Rule)]
    if origin is Annotated:
        base = typing.get_args(hint)[0]
        if base is str and rules:
            return ", ".join(rule.words() for rule in rules)
        if typing.get_origin(base) is tuple:
            said = ", ".join(filter(None, (rule.words() for rule in rules)))
            return words(base).replace("a list", f"a list ({said})" if said else "a list", 1)
        return " ".join([words(base), *(rule.words() for rule in rules)])
    if origin is tuple:
        inner = typing.get_args(hint)
        return f"{'a list' if inner[-1] is ... else f'{len(inner)} values'}, each {words(inner[0])}"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(words(h) for h in typing.get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
            types.NoneType: "none", Path: "a path"}.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """A value in a message: its first characters in one line, whatever it is."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except Exception:  # an object's own, or a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _fit(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        value = _fit(value, typing.get_args(hint)[0])
        for rule in hint.__metadata__:
            if isinstance(rule, Rule):
                value = rule.renamed.get(value, value) if rule.renamed else value
                if not rule.fits(value):
                    raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):  # a word is no list of its letters
            raise TypeError
        return tuple(_fit(v, h) for v, h in zip(value, _each(hint, len(value)), strict=True))
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice
                   for choice in typing.get_args(hint)):
            raise ValueError
        return value
    if origin in (types.UnionType, typing.Union):
        return _first(_fit, value, typing.get_args(hint))
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(
                value, numbers.Integral if hint is int else numbers.Real):
            raise TypeError
        number = hint(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if hint is Path and isinstance(value, str) and value:  # an empty one would be this folder
        return Path(value)
    if not isinstance(value, hint):
        raise TypeError
    return value


def _read(text: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _read(text, typing.get_args(hint)[0])
    if origin is tuple:
        if isinstance(text, str):
            text = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
        return tuple(_read(t, h) for t, h in zip(text, _each(hint, len(text)), strict=True))
    if not isinstance(text, str):
        raise TypeError
    if origin is typing.Literal:
        return next((c for c in typing.get_args(hint) if text == str(c)), text)
    if origin in (types.UnionType, typing.Union):
        # str last: every word would fit it
        return _first(lambda t, h: _fit(_read(t, h), h), text, sorted(
            typing.get_args(hint), key=lambda h: h is str))
    if hint is types.NoneType:
        return {"none": None}[text.lower()]
    if hint is Path:
        return text
    if hint is bool:
        return WORDS[text.lower()]
    return hint(text)


def _each(hint: Any, size: int) -> tuple[Any, ...]:
    inner = typing.get_args(hint)
    return (inner[0],) * size if inner[-1] is ... else inner


def _first(take: Callable[[Any, Any], Any], value: Any, options: Iterable[Any]) -> Any:
    for option in options:
        try:
            return take(value, option)
        except (TypeError, ValueError, KeyError, OverflowError):
            continue
    raise ValueError


def _hint_at(value: Any, hint: Any) -> str:
    """" (did you mean X?)" where the words that fit are few and one is near."""
    known: list[str] = []
    for part in _parts(hint):
        if typing.get_origin(part) is typing.Literal:
            known += map(str, typing.get_args(part))
        for rule in getattr(part, "__metadata__", ()):
            known += rule.known() if isinstance(rule, Rule) and rule.known else ()
    given = value if isinstance(value, (list, tuple)) else [value]
    hints_found = (nearest(v, known, 0.6) for v in given if isinstance(v, str) and v not in known)
    return next(filter(None, hints_found), "") if known else ""


def _parts(hint: Any) -> Iterable[Any]:
    yield hint
    if typing.get_origin(hint) is not typing.Literal:
        for inner in typing.get_args(hint)[:1 if typing.get_origin(hint) is Annotated else None]:
            yield from _parts(inner)
