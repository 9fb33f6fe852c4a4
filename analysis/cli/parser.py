"""Options of a command from a dataclass: read, explained, and completed in a shell.

A field is an option by its name (``batch_size`` is ``--batch-size``), its annotation says what it
takes (mambabyte.config.checks) and the string below it in the source is its help. A field without a
default is required; one that is a dataclass itself is a group, ``--train.lr``. A list takes all the
words that follow it. In ``Annotated``, ``POSITIONAL`` is read by its place, and ``REPEATED`` is a
list that takes one word each time it is given.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mambabyte.config.checks import Rule, hints, read, texts
from mambabyte.errors import UserError, nearest

T = TypeVar("T")
POSITIONAL, REPEATED = object(), object()
SHORT = {"-f": "--file"}


@dataclass(frozen=True)
class Option:
    """One option: ``name`` is the path of fields, such as ``train.lr``; ``default`` None may be
    one, and MISSING is none."""

    name: str
    hint: Any
    about: str
    default: Any

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def off(self) -> str:
        """What turns it off, ``--train.no-time-aware``."""
        group, dot, name = self.flag[2:].rpartition(".")
        return f"--{group}{dot}no-{name}"

    @property
    def positional(self) -> bool:
        return POSITIONAL in getattr(self.hint, "__metadata__", ())

    @property
    def repeated(self) -> bool:
        return REPEATED in getattr(self.hint, "__metadata__", ())

    @property
    def plain(self) -> Any:
        """The type without its annotations."""
        hint = self.hint
        while typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        return hint

    @property
    def many(self) -> bool:
        return typing.get_origin(self.plain) is tuple

    @property
    def choices(self) -> list[str]:
        """The words that it takes, where they are few and known."""
        found: list[str] = []
        for hint in (self.hint, *typing.get_args(self.plain)):
            for rule in getattr(hint, "__metadata__", ()):
                found += rule.known() if isinstance(rule, Rule) and rule.known else ()
            while typing.get_origin(hint) is Annotated:
                hint = typing.get_args(hint)[0]
            if typing.get_origin(hint) is typing.Literal:
                found += map(str, typing.get_args(hint))
        return found


def options_of(cls: type, defaults: Mapping[str, Any] | None = None) -> list[Option]:
    """The options of a dataclass, its groups after the others; ``defaults``, by field, stand in
    place of its own."""
    said, own, groups = texts(cls), [], []
    for field in dataclasses.fields(cls):
        hint = hints(cls)[field.name]
        value = (defaults or {}).get(field.name, field.default)
        if dataclasses.is_dataclass(hint):
            groups += [replace(o, name=f"{field.name}.{o.name}") for o in options_of(
                typing.cast(type, hint), None if value is MISSING else vars(value))]
        else:
            own.append(Option(field.name, hint, said[field.name], value))
    return own + groups


def parse(cls: type[T], argv: Sequence[str], command: str, about: str | None,
          **defaults: Any) -> T:
    """``cls`` from the words after ``mambabyte COMMAND``; ``defaults``, by field, replace its own.

    Prints the help and leaves where it is asked for. UserError, one line, for a word that is no
    option or no value, for an option given twice, and for one that is missing.
    """
    options = options_of(cls, defaults)
    if "--help" in argv or "-h" in argv:
        print(help_text(options, command, about))
        raise SystemExit(0)
    given = _words(options, argv, command)
    values = {o.name: read(given[o.name], o.hint, o.flag) for o in options if o.name in given}
    for option in options:
        if option.name not in given and option.default is MISSING:
            raise UserError(f"{command} needs {usage(option)}: {option.about} "
                            f"(mambabyte {command} --help)")
    for name, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            inside = {o: values.pop(o) for o in [*values] if o.startswith(f"{name}.")}
            values[name] = replace(defaults.get(name) or typing.cast(Any, hint)(), **{
                o.partition(".")[2]: value for o, value in inside.items()})
    return cls(**{**defaults, **values})


def _words(options: list[Option], argv: Sequence[str], command: str) -> dict[str, Any]:
    """The words that each option was given, by name; a list for those that take several."""
    by_flag = {o.flag: o for o in options if not o.positional}
    off = {o.off: o for o in by_flag.values() if o.plain is bool}
    places = [o for o in options if o.positional]
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not is_flag(word):
            if not places:
                raise UserError(f"{command} takes no {word!r} here: see mambabyte {command} --help")
            if places[0].many:
                given.setdefault(places[0].name, []).append(word)
            else:
                given[places.pop(0).name] = word
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        option = by_flag.get(SHORT.get(flag, flag)) or off.get(flag)
        if option is None:
            raise UserError(f"{command} has no option {flag}{nearest(flag, by_flag)}: see "
                            f"mambabyte {command} --help")
        if option.name in given and not option.many:
            raise UserError(f"{option.flag} is given twice: give it once")
        if option.plain is bool and not equals:
            given[option.name] = "false" if flag in off else "true"
            continue
        taken = [value] if equals else []
        while rest and not is_flag(rest[0]) and not equals and (not taken or (
                option.many and not option.repeated)):
            taken.append(rest.pop(0))
        if not taken:
            raise UserError(f"{option.flag} needs a value: {usage(option)}")
        given[option.name] = [*given.get(option.name, []), *taken] if option.many else taken[0]
    return given


def is_flag(word: str) -> bool:
    """Whether a word names an option; -1 and a lone - are values."""
    return (word.startswith("--") and len(word) > 2) or word in SHORT


@dataclass(frozen=True)
class Action:
    """One of a command's own commands: its options, what runs it, and what it does in a line."""

    options: type
    run: Callable[[Any], int]
    about: str


def subcommand(actions: Mapping[str, Action], argv: Sequence[str], command: str,
               about: str | None, default: str = "") -> int:
    """Run ``mambabyte COMMAND ACTION``, whose options are the action's alone; ``default`` is what
    is run where none is named."""
    if default and (not argv or (is_flag(argv[0]) and argv[0] != "--help")):
        argv = [default, *argv]
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {key:8} {action.about}" for key, action in actions.items())
        print(f"usage: mambabyte {command} ACTION [options]\n\n{(about or '').strip()}\n\n"
              f"actions:\n{listed}\n\nmambabyte {command} ACTION --help shows its options.")
        raise SystemExit(0)
    if name not in actions:
        wrong = f"has no action {name!r}" if name else "needs an action"
        raise UserError(f"{command} {wrong}{nearest(name, actions)}: one of {', '.join(actions)}")
    action = actions[name]
    own = re.compile(rf" +(mambabyte|torchrun .*-m analysis\.cli) {command} {name}( |$)")
    shown = [line for line in (about or "").splitlines() if own.match(line)]
    return action.run(parse(action.options, rest, f"{command} {name}",
                            "\n".join([f"{action.about}.", "", *shown])))


# --------------------------------------------------------------------------------------- help


def usage(option: Option) -> str:
    """An option with what it takes: ``--lr NUMBER``."""
    if option.plain is bool:
        return f"{option.flag}, {option.off}" if option.default is True else option.flag
    inner = typing.get_args(option.plain)[0] if option.many else option.plain
    word = _kind(inner)
    if option.positional:
        return option.flag + " ..." * option.many
    return f"{option.flag} {word}" + " ..." * (option.many and not option.repeated)


def _kind(hint: Any) -> str:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    inner = [h for h in typing.get_args(hint) if h is not type(None)]
    if inner:
        return "|".join(map(_kind, inner))
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def help_text(options: list[Option], command: str, about: str | None) -> str:
    """Everything about a command: usage, its docstring, and its options by group."""
    width = min(shutil.get_terminal_size().columns, 100)
    needed = [usage(o) for o in options if o.default is MISSING]
    places = [f"[{usage(o)}]" for o in options if o.positional and o.default is not MISSING]
    parts = [" ".join(["usage: mambabyte", command, *needed, *places, "[options]"]), "",
             (about or "").strip(), ""]
    for title in dict.fromkeys(o.name.rpartition(".")[0] for o in options):
        parts.append(f"{title} options (advanced):" if title else "options:")
        for option in options:
            if option.name.rpartition(".")[0] == title:
                parts += [f"  {usage(option)}", *textwrap.wrap(
                    f"{option.about} {_default(option)}".strip(), width - 8,
                    initial_indent=" " * 6, subsequent_indent=" " * 6)]
        parts.append("")
    return "\n".join([*parts, "  -h, --help\n      This text."])


def _default(option: Option) -> str:
    value = option.default
    if value is MISSING:
        return "(required)"
    if value is None or value in ((), "") or value is False:
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {'yes' if value is True else shown})"


def complete(options: list[Option], words: Sequence[str]) -> list[str]:
    """What may stand next, after the whole ``words``: an option's choices, or the options."""
    last = next((o for o in options if words and o.flag == words[-1]), None)
    if last is not None and last.plain is not bool:
        return last.choices
    places = [c for o in options if o.positional for c in o.choices]
    return [*places, *(o.flag for o in options if not o.positional), "--help"]
