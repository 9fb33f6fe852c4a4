"""The recipes of docs/contributing.md, each followed once: what they leave out is not needed.

A mixer and a study are added by tests of their own, which the recipes name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from analysis import cli
from mambabyte.config.scan_forms import FORMS, Form
from mambabyte.errors import UserError
from mambabyte.ops import selective_scan
from mambabyte.ops.scan.dispatch import SCANS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")

COMMAND = '''"""Say hello a number of times.

    mambabyte hello --times 2
"""

from dataclasses import dataclass

from analysis.cli.options import parse, print_result


@dataclass(frozen=True)
class Options:
    times: int = 1
    """How often."""


def run(argv):
    options = parse(Options, argv, "hello", __doc__)
    print_result({"times": options.times}, False, ["hello"] * options.times)
    return 0
'''


def test_every_recipe_names_the_test_that_follows_it():
    recipes = re.split(r"^## ", RECIPES, flags=re.M)[1:]
    assert [recipe.splitlines()[0] for recipe in recipes] == [
        "A mixer", "A scan form", "A study", "A report section", "A command"]
    for recipe in recipes:
        assert re.search(r"^Followed by `tests/[\w/]+\.py`\.$", recipe, re.M)


def test_a_scan_form(monkeypatch):
    def loop(u, delta, A, B, C, state, chunk):
        outputs = []
        for t in range(u.shape[1]):
            decay = torch.exp(delta[:, t, :, None] * A)
            state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1))
        return torch.stack(outputs, 1), state

    u, delta = torch.randn(2, 9, 4), torch.rand(2, 9, 4)
    A, B, C = -torch.rand(4, 3), torch.randn(2, 9, 3), torch.randn(2, 9, 3)
    with pytest.raises(UserError, match="scan form 'loop' is unknown"):
        selective_scan(u, delta, A, B, C, form="loop")
    monkeypatch.setitem(FORMS, "loop", Form("the recurrence, written again"))
    monkeypatch.setitem(SCANS, "loop", loop)
    for found, wanted in zip(
        selective_scan(u, delta, A, B, C, form="loop"),
        selective_scan(u, delta, A, B, C, form="recurrent"), strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_a_report_section(world):
    world.section("more", "What else there is: {{ value('tiny.slope') }}.")
    world.run()
    with pytest.raises(UserError, match=r"more\.md is shown nowhere: name it in article or pages"):
        world.build()
    world.config('article = ["summary", "more"]\n[titles]\nmore = "And more"')
    assert '<h2 id="more">And more</h2>' in world.build()
    world.config('article = ["summary"]\npages = ["more"]\n[titles]\nmore = "And more"')
    page = world.page("more")
    assert '<h1 id="more">And more</h1>' in page
    assert re.search(r"What else there is: .*0\.51", page)


def test_a_command(monkeypatch, tmp_path, capsys):
    (tmp_path / "hello_command.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "hello", ("hello_command", "say hello"))
    try:
        assert cli.main(["hello", "--times", "2"]) == 0
        assert capsys.readouterr().out == "hello\nhello\n"
        assert cli.main(["--help"]) == 0
        assert "say hello" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main(["hello", "--help"])
        assert "mambabyte hello --times 2" in capsys.readouterr().out
    finally:
        sys.modules.pop("hello_command", None)
