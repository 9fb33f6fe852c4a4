"""A program may set torch's default type and device; what is no parameter does not follow them."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Numbers of the default type, and what is on the default device (frombuffer never is).
TYPED = {"empty", "zeros", "ones", "rand", "randn", "linspace"}
PLACED = TYPED | {"full", "tensor", "as_tensor", "arange", "randint", "randperm", "eye"}
# Where parameters are made, which follow both as torch's own layers do.
PARAMETERS = ("mambabyte/model/families/", "mambabyte/model/block.py")


def left_to_defaults(source: str) -> list[str]:
    """Calls of torch that leave type or device to the defaults; an empty list has no numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, named = node.func.attr, {keyword.arg for keyword in node.keywords}
        sizeless = [ast.unparse(a) for a in node.args] == ["0"]
        if (name in PLACED and "device" not in named) or (
                name in TYPED and "dtype" not in named and not sizeless):
            found.append(ast.unparse(node))
    return found


def test_only_parameters_follow_the_defaults_of_torch() -> None:
    found = {}
    for path in sorted((ROOT / "mambabyte").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(PARAMETERS):
            calls = left_to_defaults(path.read_text(encoding="utf-8"))
            found |= {name: calls} if calls else {}
    assert not found, "give dtype= and device=: a default may be another program's"


def test_a_call_that_is_left_to_them_is_seen() -> None:
    assert len(left_to_defaults("torch.empty(2, 3, device='cpu')")) == 1
    assert left_to_defaults("torch.arange(3)") == ["torch.arange(3)"]
    assert not left_to_defaults("torch.arange(3, device=d); torch.empty(0, device=d)")
