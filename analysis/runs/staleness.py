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
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from mambabyte.config.files import to_json
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMPANIONS = (".c", ".cu", ".h", ".json", ".mplstyle", ".toml", ".txt")


def digest(modules: Iterable[str], notebook: Path, root: Path = ROOT) -> str:
    """Hex digest (16 digits) of a notebook's code and of all sources behind it and ``modules``."""
    names = {*modules, *_imports(ast.parse(notebook_code(notebook)), "", root)}
    total = hashlib.sha256()
    total.update(ast.dump(_bare(ast.parse(notebook_code(notebook)))).encode())
    for path in source_files(names, root):
        total.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        total.update(_content(path, path.stat().st_mtime_ns))
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo += [package, *_imports(tree, package, root)]
        found.update(_companions(tree, (path.parent, path.parent.parent, root / "data")))
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


def _imports(tree: ast.AST, package: str, root: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            # from package import module
            yield from (f"{base}.{alias.name}" for alias in node.names
                        if _module_file(f"{base}.{alias.name}", root))


def _module_file(name: str, root: Path) -> Path | None:
    if not name:
        return None
    path = root.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _companions(tree: ast.AST, folders: Iterable[Path]) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) \
                and node.value.endswith(COMPANIONS) and len(node.value) < 100:
            for folder in folders:
                found = folder.glob(node.value) if "*" in node.value else [
                    Path(os.path.normpath(folder / node.value))]
                for path in (p for p in found if p.is_file()):
                    # A record is its folder: the tables beside what says of them.
                    yield from path.parent.iterdir() if path.name == "run.json" else [path]


@cache
def _content(path: Path, _changed: int) -> bytes:
    """What counts of a file: the syntax tree without docstrings for Python, else the bytes."""
    if path.suffix != ".py":
        return path.read_bytes()
    return ast.dump(_bare(ast.parse(path.read_text(encoding="utf-8")))).encode()


def _bare(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) \
                    and isinstance(first.value.value, str):
                node.body = node.body[1:]
    return tree
