"""The recipes of docs/contributing.md, each followed once: what they leave out is not needed.

A mixer and a study are added by tests of their own, which the recipes name.
"""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from analysis import cli
from analysis.cli.parser import Action
from analysis.cli.studies import bench
from analysis.cli.studies.benched import Common, printed
from mambabyte.config.scan_forms import FORMS, Form
from mambabyte.corpus.corpora import OWN, load_corpus
from mambabyte.errors import UserError
from mambabyte.ops import selective_scan
from mambabyte.ops.scan.dispatch import SCANS
from mambabyte.task.experts.contexts import Context
from mambabyte.task.experts.gate import Mixing
from mambabyte.task.systems import SYSTEMS

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
        "A mixer", "An engine of streams", "A scan form", "A study", "A report section",
        "A command", "A bench", "A corpus", "A system of the task, an expert",
        "A record, and what is said of it"]
    for recipe in recipes:
        followed = re.search(r"^Followed by (.*)\.$", recipe, re.M)
        assert followed
        assert all((ROOT / path).is_file() for path in re.findall(r"`(.*?)`", followed[1]))


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


def test_a_bench(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Sleep(Common):
        times: int = 1
        """How often."""

    def bench_sleep(options):
        return printed(options, {"times": options.times}, [f"slept {options.times} times"])

    monkeypatch.setitem(bench.ACTIONS, "sleep", Action(Sleep, bench_sleep, "Time sleep"))
    monkeypatch.setattr(bench, "__doc__", f"{bench.__doc__}\n    mambabyte bench sleep --times 2\n")
    assert cli.main(["bench", "sleep", "--times", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "slept 2 times\n"
    with pytest.raises(SystemExit):
        cli.main(["bench", "sleep", "--help"])
    assert "mambabyte bench sleep --times 2" in capsys.readouterr().out


def test_a_corpus(monkeypatch, tmp_path, capsys):
    def shells(report):
        report("gathering shells")
        for split in ("train", "valid", "test"):
            (tmp_path / f"wiki.{split}.raw").write_text(f"she sells {split} shells")
        return tmp_path

    with pytest.raises(UserError, match="'shells' is neither stdlib, wikitext103, a folder"):
        load_corpus("shells")
    monkeypatch.setitem(OWN, "shells", ("by the sea shore", shells))
    assert cli.main(["corpus", "shells"]) == 0
    assert "by the sea shore" in capsys.readouterr().out
    assert load_corpus("shells").train.tobytes() == b"she sells train shells"


def test_a_system_of_the_task(monkeypatch, tmp_path, capsys):
    mixing = Mixing(orders=(1, 2, 3), contexts=(Context(4, skip=1),), fit_bytes=2000, steps=2)
    new = replace(SYSTEMS["counts"], about="three orders and a gap", mixing=mixing)
    monkeypatch.setitem(SYSTEMS, "counts_gap", new)
    text = tmp_path / "shells.txt"
    text.write_text("she sells sea shells by the sea shore, " * 400)
    assert cli.main(["task", "run", "counts_gap", "--corpus", str(text), "--characters", "40",
                     "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["valid_accuracy"] > 0.9
