"""JSON is strict: one function writes it, and what it writes has no bare NaN or Infinity."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mambabyte.config.files import to_json

ROOT = Path(__file__).resolve().parents[2]
WRITER = "mambabyte/config/files.py"
FILES = sorted(path.relative_to(ROOT).as_posix()
               for folder in ("mambabyte", "analysis") for path in (ROOT / folder).rglob("*.py"))


def other_writers(source: str) -> set[str]:
    """Calls by which this source makes JSON itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder") and (
                isinstance(node.value, ast.Name) and "json" in node.value.id):
            found.add(node.attr)
        if isinstance(node, ast.Attribute) and node.attr == "to_json" and not (
                isinstance(node.value, ast.Name) and node.value.id in ("self", "task")):
            found.add("to_json")  # pandas has one of its own
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "orjson", "simplejson"):
            found |= {alias.name for alias in node.names}
    return found


def test_one_function_writes_json():
    found = {name: other_writers((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    assert {name: uses for name, uses in found.items() if uses} == {WRITER: {"dumps"}}
    assert other_writers("import json\njson.dump(1, f)\nfrom json import dumps\ndf.to_json()") == {
        "dump", "dumps", "to_json"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_a_word(value):
    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = {"a": [1, (value, Path("x"))], "b": {"c": value}, "d": np.int64(3)}
    read = json.loads(to_json(record), parse_constant=refuse)
    word = str(float(value))
    assert read == {"a": [1, [word, "x"]], "b": {"c": word}, "d": 3}
