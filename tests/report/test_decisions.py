"""The table of decisions: from records; what was not measured says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.report.decisions import details, load_decisions, table
from analysis.runs.folders import Run, Value
from mambabyte.errors import UserError

RUN = Run("arena", {}, {"best": Value("D", ""), "bits": Value(1.23456, "bits/byte"),
                        "gone": Value(None)}, run_id="a-record")
ROW = '[[decision]]\nquestion = "Which?"\nrecord = "{record}"\nanswer = "{answer}"\n' \
      'details = "{details}"\nn = "3 seeds"\nlimits = "elsewhere"\n'


def written(folder: Path, record: str, answer: str, details: str = "") -> Path:
    path = folder / "decisions.toml"
    path.write_text(ROW.replace("{record}", record).replace("{answer}", answer)
                    .replace("{details}", details))
    return path


def test_an_answer_has_the_numbers_of_its_record(tmp_path):
    path = written(tmp_path, "a-record", "{best} at {bits:.2f}")
    shown = table(load_decisions({"a-record": RUN}, path))
    assert shown.splitlines()[-1] == "| Which? | D at 1.23 | 3 seeds | elsewhere | `a-record` |"


def test_details_stand_below_the_table(tmp_path):
    found = load_decisions({"a-record": RUN},
                           written(tmp_path, "a-record", "{best}", "It has {bits:.3f}."))
    assert details(found) == "- **Which?** It has 1.235."
    assert "1.235" not in table(found)
    assert details(load_decisions({"a-record": RUN}, written(tmp_path, "a-record", "D"))) == ""


@pytest.mark.parametrize(("record", "answer", "words"), [
    ("a-record", "{gone}", "has not measured gone"), ("a-record", "{other}", "other"),
    ("another", "D", "there is no record 'another'"), ("", "D", "must begin with 'not measured'"),
    ("a-record", "{bits:q}", "Which"),
])
def test_what_was_not_measured_is_no_answer(tmp_path, record, answer, words):
    with pytest.raises(UserError, match=words):
        load_decisions({"a-record": RUN}, written(tmp_path, record, answer))


def test_a_row_has_all_of_its_columns(tmp_path):
    (tmp_path / "decisions.toml").write_text('[[decision]]\nquestion = "Which?"\n')
    with pytest.raises(UserError, match="question, record, answer, details, n, limits"):
        load_decisions({}, tmp_path / "decisions.toml")
