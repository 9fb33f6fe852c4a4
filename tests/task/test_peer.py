"""Public submission files run as they are, and the energy that their rule counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from analysis.cli.models.task import run as command
from mambabyte import harness
from mambabyte.energy import CPU_WATTS, Energy, total_joules
from mambabyte.errors import UserError
from mambabyte.harness import run_submission

FILE = '''"""A submission whose model says the same always."""
from __future__ import annotations
import dataclasses
from wikitext import CharModel

print("this goes to standard output")

@dataclasses.dataclass
class Seen:
    characters: int = 0

class Model(CharModel):
    def reset(self) -> None: self.seen = Seen()
    def predict(self): return {answer}
    def observe(self, char: str) -> None: self.seen.characters += 1

def train({arguments}) -> CharModel:
    {body}
    return Model()
'''
TEXT = np.frombuffer("abc été abba".encode() * 9, np.uint8)
SPLITS = {"valid": TEXT[:30], "test": TEXT}


@pytest.fixture
def submission(tmp_path):
    def write(answer="'a'", arguments="train_text, valid_text=None", body="pass"):
        path = tmp_path / "constant" / "submission.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILE.format(answer=answer, arguments=arguments, body=body))
        return path

    return write


@pytest.mark.parametrize(("answer", "contract", "right"), [
    ("'a'", "character", "a"), ("{'b': 0.5, 'a': 0.25}", "distribution", "b"),
    ("{'é': 0.5, 'b': 0.5}", "distribution", "é"), ("''", "character", None)])
def test_either_contract_is_scored(submission, answer, contract, right):
    row = run_submission(submission(answer), TEXT, SPLITS, characters=40)
    whole = bytes(TEXT).decode()[:40]
    assert row["contract"] == contract
    assert row["test_characters"] == 40
    assert row["test_accuracy"] == pytest.approx(sum(c == right for c in whole) / 40)
    assert row["valid_characters"] == len(bytes(TEXT[:30]).decode())
    assert row["total_joules"] >= 50 * row["seconds"]
    assert (row["failure"], row["within_cap"]) == (None, True)


def test_the_harness_gives_what_the_file_takes(submission):
    check = "assert train_text.startswith('abc été') and valid_text == train_text[:{n}]"
    n = len(bytes(TEXT[:30]).decode())
    run_submission(submission(body=check.format(n=n)), TEXT, SPLITS)
    run_submission(submission(arguments="train_text", body="len(train_text)"), TEXT, SPLITS)
    with pytest.raises(UserError, match=r"calling train.* failed with SystemExit: 3"):
        run_submission(submission(body="raise SystemExit(3)"), TEXT, SPLITS)
    with pytest.raises(UserError, match=r"submission\.py: calling train.*missing 1"):
        run_submission(submission(arguments="text, other", body="pass"), TEXT, SPLITS)


def test_training_ends_at_the_cap(submission, monkeypatch):
    monkeypatch.setattr(harness, "CAP_SECONDS", 0.05)
    row = run_submission(submission(body="\n    while True: pass"), TEXT, SPLITS)
    assert row["failure"].startswith("not done after 0.05 s")
    assert not row["within_cap"]
    assert "valid_accuracy" not in row


def test_the_command_runs_a_file(submission, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"wiki.{split}.raw").write_bytes(bytes(TEXT))
    arguments = ["run", "--corpus", str(tmp_path / "text"), "--characters", "20", "--device",
                 "cpu", "--json"]
    record = tmp_path / "record"
    assert command([*arguments, "--peer", str(submission()), "--record", str(record)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["system"] == "constant"
    assert '"total energy (J)"' in (record / "runs.csv").read_text()
    for wrong in ([], ["ngram", "--peer", str(submission())]):
        with pytest.raises(UserError, match="task run needs NAME, a system, or --peer"):
            command([*arguments, *wrong])
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1")
    with pytest.raises(UserError, match="no function train"):
        command([*arguments, "--peer", str(bad)])


def test_total_joules_are_those_of_the_rule():
    gpu = Energy(300.0, 400.0, 2.0, 50.0, "NVML")
    unread = Energy(None, None, 2.0, 0.0, "not measured")
    assert total_joules(gpu, unread) == (300 + 2 * CPU_WATTS, 2 * CPU_WATTS, "estimated, 42 W")
    assert total_joules(gpu, Energy(70.0, 70.0, 2.0, 0.0, "RAPL"))[0] == 370
    idle = Energy(-10.0, 90.0, 2.0, 50.0, "NVML")
    assert total_joules(idle, unread)[0] == 100  # never below 50 W
    alone = Energy(70.0, 70.0, 1.0, 0.0, "RAPL")
    assert total_joules(alone, alone)[0] == 70  # a CPU's counter is not counted twice


def test_a_file_of_other_bytes_is_said(tmp_path):
    path = tmp_path / "submission.py"
    path.write_bytes(b"# \0\n")
    with pytest.raises(UserError, match=r"py(, line 1)?: importing it failed with Synta"):
        run_submission(path, TEXT, SPLITS)
