"""What a study depends on, found without running it: the digest that makes a result stale.

A study may also read what the others left: then their results count too.

The walk starts at a module and a notebook and follows imports of modules that live in the
checkout, those within functions too. A file that a module names in a string (a C source, a
style sheet, a pattern of records) counts as well. Comments, docstrings and layout do not change
the digest, so a corrected comment re-runs nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from analysis.runs.kept import kept
from mambabyte.config.files import to_json
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMPANIONS = (".c", ".cu", ".h", ".json", ".mplstyle", ".toml", ".txt")


def digest(modules: Iterable[str], notebook: Path, root: Path = ROOT) -> str:
    """Hex digest (16 digits) of a notebook's code and of all sources behind it and ``modules``."""
    tree = ast.parse(notebook_code(notebook))
    names = {*modules, *_imports(_named(tree), "", root)}
    total = hashlib.sha256()
    total.update(ast.dump(tree).encode())
    for path in source_files(names, root):
        total.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        total.update(_read(path, path.stat().st_mtime_ns)[1].encode() if path.suffix == ".py" else
                     path.read_bytes())
    return total.hexdigest()[:16]


def with_results(own: str, study: str, runs: Path, records: Path) -> str:
    """``own`` together with the finished runs of other studies and the records."""
    total = hashlib.sha256(own.encode())
    for path in sorted(runs.glob("[!.]*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["status"] == "done" and record["study"] != study:
                part = [path.parent.name, record.get("sources"), record.get("values")]
                total.update(to_json(part, sort_keys=True).encode())
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run; the report says so
    for path in sorted(p for p in records.rglob("*") if p.is_file()):
        total.update(path.relative_to(records).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def source_files(modules: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Every file under ``root`` that the modules depend on, in order of path."""
    found: set[Path] = set()
    todo = list(modules)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        path = None if name in seen else _module_file(name, root)
        seen.add(name)
        if path is None:
            continue
        found.add(path)
        named, _ = _read(path, path.stat().st_mtime_ns)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo += [package, *_imports(named, package, root)]
        found.update(_companions(named, (path.parent, path.parent.parent, root / "data")))
    return sorted(found)


def notebook_code(notebook: Path) -> str:
    """The code cells of a notebook as one program; magics are left out."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        raise UserError(f"there is no notebook {notebook}") from None
    except (ValueError, KeyError):
        raise UserError(f"{notebook} is not a notebook") from None
    lines = [line for cell in cells if cell["cell_type"] == "code"
             for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@dataclass
class _Named:
    """What a program names of other files: module, dots before it and names taken of it of each
    import, and the strings that may be a file's name."""

    imports: list[tuple[str, int, list[str]]] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)


def _named(tree: ast.AST) -> _Named:
    """Takes docstrings out of the tree on its way, which no longer count."""
    named = _Named()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) \
                    and isinstance(first.value.value, str):
                node.body = node.body[1:]
        elif isinstance(node, ast.Import):
            named.imports += [(alias.name, 0, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            named.imports.append((node.module or "", node.level, names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) \
                and node.value.endswith(COMPANIONS) and len(node.value) < 100:
            named.strings.append(node.value)
    return named


@cache
def _read(path: Path, _changed: int) -> tuple[_Named, str]:
    """What a Python file names, and a digest of what counts of it, its syntax tree without
    docstrings. Read once: every study and drawing depends on most of them."""
    def make() -> tuple[dict[str, Any], str]:
        tree = ast.parse(text)
        named = vars(_named(tree))
        return named, hashlib.sha256(ast.dump(tree).encode()).hexdigest()

    text = path.read_text(encoding="utf-8")
    key = f"{sys.version_info} {hashlib.sha256(text.encode()).hexdigest()}"
    named, content = kept("sources", key, make)
    return _Named(**named), content


def _imports(named: _Named, package: str, root: Path) -> Iterator[str]:
    for base, level, names in named.imports:
        if level:
            parts = package.split(".")
            parents = parts[: len(parts) - level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        yield base
        # from package import module
        yield from (f"{base}.{name}" for name in names
                    if _module_file(f"{base}.{name}", root))


def _module_file(name: str, root: Path) -> Path | None:
    if not name:
        return None
    path = root.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _companions(named: _Named, folders: Iterable[Path]) -> Iterator[Path]:
    for name in named.strings:
        for folder in folders:
            found = folder.glob(name) if "*" in name else [Path(os.path.normpath(folder / name))]
            for path in (p for p in found if p.is_file()):
                # A record is its folder: the tables beside what says of them.
                yield from path.parent.iterdir() if path.name == "run.json" else [path]
