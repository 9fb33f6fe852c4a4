"""Names that figures use, with what the package says of them: scan forms and layer patterns.

Read from the sources without running them, as the report imports no torch; a test holds the
tables against the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
_PATTERN = re.compile(r"[MA]+\Z")


def scan_forms() -> pd.DataFrame:
    """Every form of mambabyte.ops.FORMS with its line, the one that "auto" takes, and the second
    document's loop, which the throughput study times beside them."""
    ops = _tree("mambabyte/ops/__init__.py")
    rows = [(name, about, _keyword(call, "chunk", 0), not _keyword(call, "study", False))
            for name, about, call in _calls(ops, "FORMS")]
    loops = _tree("analysis/scan_timing.py")
    rows.append((ast.literal_eval(_value(loops, "INDEXED")), _line(loops, "indexed_scan"), 0,
                 False))
    rows.append(("auto", _line(ops, "default_form").partition(": ")[2], 0, True))
    frame = pd.DataFrame(rows, columns=["name in figures", "what it is", "chunk, steps", "use"])
    frame["chunk, steps"] = [str(n) if n else "none" for n in frame["chunk, steps"]]
    frame["use"] = ["training" if trains else "study only" for trains in frame["use"]]
    return frame


def layer_patterns() -> pd.DataFrame:
    """Every layer pattern of the presets: its layers, and the presets that have it. The second
    document's SSM-k is the preset ssm_k."""
    config = _tree("mambabyte/config.py")
    mixers = ast.literal_eval(_value(config, "MIXERS"))
    presets: dict[str, list[str]] = {}
    for name, pattern in preset_patterns().items():
        presets.setdefault(pattern, []).append(name)
    rows = []
    for pattern, names in sorted(presets.items(), key=lambda p: (len(p[0]), p[0] != "M", p[0])):
        runs = [f"{len(list(some))} {mixers[letter]}" for letter, some in groupby(pattern)]
        layers = ("every layer: " + mixers[pattern] if len(pattern) == 1
                  else ", then ".join(runs) + ", repeated")
        document = [n.upper().replace("_", "-") for n in names if n.startswith("ssm_")]
        rows.append((pattern, layers, ", ".join(document) or "", ", ".join(names)))
    return pd.DataFrame(rows, columns=["name in figures", "layers", "second document", "presets"])


def preset_patterns() -> dict[str, str]:
    """Layer pattern of every preset by name."""
    config = _tree("mambabyte/config.py")
    model = next(n for n in config.body if isinstance(n, ast.ClassDef) and n.name == "ModelConfig")
    default = next(ast.literal_eval(n.value) for n in model.body if isinstance(n, ast.AnnAssign)
                   and n.value and getattr(n.target, "id", "") == "layer_pattern")
    return {name: _pattern_in(node, config) or default
            for name, node in _entries(config, "PRESETS")}


def _pattern_in(node: ast.expr, tree: ast.Module) -> str:
    """The pattern that a preset's expression names, itself or through what it is made from."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) \
                and _PATTERN.match(part.value):
            return part.value
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    if "_nano" in names:
        names.append("_NANO")
    values = [_value(tree, name) for name in names if name.startswith("_") and name.isupper()]
    return next(filter(None, (_pattern_in(v, tree) for v in values)), "")


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _value(tree: ast.Module, name: str) -> ast.expr:
    """What is assigned to ``name`` at the top of a module."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else \
            [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign))
            assert node.value
            return node.value
    raise KeyError(name)


def _entries(tree: ast.Module, name: str) -> Iterator[tuple[str, ast.expr]]:
    table = _value(tree, name)
    assert isinstance(table, ast.Dict)
    for key, node in zip(table.keys, table.values, strict=True):
        assert key is not None
        yield ast.literal_eval(key), node


def _calls(tree: ast.Module, name: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Entries of a dictionary of calls: key, second argument, the call."""
    for key, node in _entries(tree, name):
        assert isinstance(node, ast.Call)
        yield key, ast.literal_eval(node.args[1]), node


def _keyword(call: ast.Call, name: str, default: int) -> int:
    found = [k.value for k in call.keywords if k.arg == name]
    return ast.literal_eval(found[0]) if found else default


def _line(tree: ast.Module, function: str) -> str:
    """The first line of a function's docstring, as a phrase."""
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    line = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
    return line[:1].lower() + line[1:]
