"""Systems under the task's rules, the submission files, both versions of the contract."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.cli.models.task import run as command
from analysis.studies.task.record import parts_frame, summary_frame
from mambabyte import harness
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.evaluate import Score, score, score_streaming
from mambabyte.harness import TINY_TEXT, adapt, check, contract_of, stand_in
from mambabyte.stream import CharModel
from mambabyte.task import SYSTEMS, Ngram, build, get_system, run_task
from mambabyte.task import builder as task_builder
from mambabyte.task.guide import Guide, GuidedLM, GuidedWindows
from mambabyte.task.ngram import count
from tests.conftest import MULTIBYTE, TEXT

TINY = np.frombuffer(TINY_TEXT.encode(), np.uint8)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_runs_on_a_tiny_corpus(name):
    row = run_task(get_system(name), TINY, {"valid": TINY}, characters=60)
    assert row["valid_characters"] == 60
    assert 0 <= row["valid_accuracy"] <= 1
    assert row["within_cap"]
    assert row["joules"] is None or row["joules"] < 1e6
    assert row["failure"] is None
    assert sum(part["seconds"] for part in row["parts"].values()) <= row["seconds"]
    system = get_system(name)
    assert ("training" in row["parts"]) == (system.model is not None)
    assert ("fitting the gate" in row["parts"]) == (system.mixing is not None)


@pytest.mark.parametrize(("name", "contract"), [
    *[(name, "distribution") for name in SYSTEMS],
    *[(name, "character") for name in ("mamba_byte", "ours")],
])
def test_an_exported_submission_meets_the_contract(tmp_path, name, contract):
    path = tmp_path / f"{name}.py"
    assert command(["export", name, "--out", str(path)]) == 0
    assert len(TINY_TEXT.encode()) in (484, 485)
    assert check(path, contract=contract) == contract
    assert "wikitext" not in sys.modules


def test_contract_is_read_from_the_abstract_class(monkeypatch):
    assert contract_of(stand_in("character").CharModel) == "character"
    assert contract_of(stand_in("distribution").CharModel) == "distribution"

    class Silent:
        def predict(self): ...

    assert contract_of(Silent) == "distribution"
    monkeypatch.setenv(harness.CONTRACT_VARIABLE, "character")
    assert contract_of(Silent) == "character"
    assert contract_of(stand_in("distribution").CharModel) == "distribution"


@pytest.mark.parametrize(("source", "message"), [
    ("x = 1", "defines no function train"),
    ("def train(text, valid=None): return 1", "no CharModel"),
    ("from wikitext import CharModel\nclass M(CharModel):\n def reset(self): ...\n"
     " def observe(self, c): ...\n def predict(self): return 'ab'\n"
     "def train(t, v=None): return M()", "neither one character"),
])
def test_check_says_what_is_wrong(tmp_path, source, message):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message):
        check(path)
    with pytest.raises(UserError, match="not a Python file"):
        check(tmp_path / "absent.py")


def test_a_timeout_in_training_is_not_swallowed(monkeypatch):
    calls = []

    def late(step, config, elapsed=0.0):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("time is up")
        return 1.0

    monkeypatch.setattr(task_builder, "schedule", late)
    with pytest.raises(RuntimeError, match="time is up"):
        build(get_system("ours"), TINY)
    assert len(calls) == 2


def test_adapted_model_follows_observations():
    fitted = build(get_system("ngram"), TINY)
    model = adapt(CharModel(fitted.model), stand_in("character").CharModel)
    text = TINY_TEXT[:200]
    model.reset()
    right = 0
    for char in text:
        right += model.predict() == char
        model.observe(char)
    assert right > 150  # it has counted this very text


# --- guided training ------------------------------------------------------------------------------

COUNTED = (TEXT[:700] + MULTIBYTE).encode()
OTHER = ("the lazy dog jumps naïve over the café. " * 30).encode()


@pytest.fixture(scope="module")
def guide():
    return Guide(count(COUNTED, 6, 0.7))


def test_tabulated_hints_are_the_exact_ones(guide):
    text = torch.tensor(list(OTHER[:300]), dtype=torch.uint8)
    longest, best, kind = guide.along(text)
    table, rows = guide.tabulate(longest)
    hint = guide.hint(guide.ngram.contexts(OTHER[:300]))
    assert torch.allclose(table[rows.long()].float(), hint.log_p, atol=0.02)
    assert torch.equal(best, hint.best)
    assert torch.equal(kind, hint.kind)
    assert len(set(kind.tolist())) > 5
    assert int(kind.max()) < guide.n_kinds
    # Of contexts seen once, and of those that this text does not meet, there are no rows.
    assert len(table) <= int(sum(keep.sum() for keep in guide._keep))
    few, row = guide.tabulate(longest[:9])
    assert len(few) < len(table)
    assert torch.equal(few[row.long()], table[rows[:9].long()])


def test_best_byte_is_the_most_frequent_after_the_longest_context(guide):
    for context in (b"brown", b"caf\xc3\xa9", b"the q", b"\xff\xffjum"):
        context = context[-5:].rjust(5, b"\xfe")
        expected = None
        for m in range(5, -1, -1):  # the longest suffix that occurs in the text
            tail = context[5 - m :]
            after = [COUNTED[i + m] for i in range(len(COUNTED) - m) if COUNTED[i : i + m] == tail]
            if after:
                expected = max(sorted(set(after)), key=after.count)
                break
        got = guide.hint(torch.tensor([list(context)]))
        if m == 5:  # shorter contexts count distinct bytes before, which may order them otherwise
            assert int(got.best[0]) == expected


def test_guided_training_sees_the_hints_of_its_windows(guide):
    windows = GuidedWindows(torch.tensor(list(OTHER), dtype=torch.uint8), guide, 40)
    tokens, log_p, best, kind = windows(torch.tensor([3, 500]))
    assert tokens.shape == (2, 41)
    assert log_p.shape == (2, 40, 256)
    contexts = guide.ngram.contexts(OTHER)
    exact = guide.hint(contexts[4:44])  # before the bytes that tokens[0, 1:] are
    assert torch.equal(best[0], exact.best)
    assert torch.equal(kind[0], exact.kind)
    assert torch.allclose(log_p[0].float(), exact.log_p, atol=0.02)
    assert bytes(tokens[0, 1:].tolist()) == OTHER[4:44]


@pytest.fixture(scope="module")
def guided(guide):
    torch.manual_seed(0)
    config = replace(SYSTEMS["ours"].model, d_model=32, n_layer=2, n_head=2, n_kv_head=2)
    model = GuidedLM(config, guide.n_kinds)
    model.guide = guide
    for parameter in (model.lm.head.weight, model.gate.weight):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_guided_model_scores_alike_in_parallel_and_streaming(guided):
    text = MULTIBYTE[:60] + "the quick naive fox"
    parallel = score(guided, text.encode(), len(text), window=16)
    streaming = score_streaming(CharModel(guided), text.encode(), len(text))
    assert (parallel.hits == streaming.hits).all()
    assert parallel.bits_per_byte == pytest.approx(streaming.bits_per_byte, rel=1e-4)


def test_training_loss_is_what_scoring_measures(guided, guide):
    windows = GuidedWindows(torch.tensor(list(OTHER), dtype=torch.uint8), guide, 40)
    with torch.no_grad():
        loss = guided.loss(*windows(torch.tensor([0])))
        # From the start of the text, but for the start byte that scoring puts before it.
        state = (None, torch.full((1, guide.width), 10, dtype=torch.uint8))
        tokens = torch.tensor([list(OTHER[:41])])
        logits, _ = guided(tokens[:, :-1], state)
        expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_untrained_guided_model_is_the_n_gram(guide):
    config = replace(SYSTEMS["ours"].model, d_model=32, n_layer=1, n_head=2, n_kv_head=2)
    model = GuidedLM(config, guide.n_kinds)  # head and gate start at zero
    model.guide = guide
    logits, _ = model(torch.tensor([list(OTHER[:30])]))
    hint = guide.hint(guide.ngram.contexts(OTHER[:31], history=b"\n")[1:])
    assert torch.allclose(torch.log_softmax(logits[0], -1), hint.log_p, atol=1e-4)


def test_weight_is_chosen_on_the_end_of_the_training_text():
    data = (TEXT + MULTIBYTE).encode() * 6
    small = replace(SYSTEMS["nano_plus_ngram_chosen"].model, d_model=16, n_layer=1, n_head=1,
                    n_kv_head=1)
    system = replace(SYSTEMS["nano_plus_ngram_chosen"], model=small, ngram=Ngram(order=6))
    recipe = replace(system.train, n_steps=2, context=16, batch_size=2)
    fitted = build(replace(system, train=recipe), data)
    assert fitted.notes["ngram_weight"] > 0.9  # the network has seen next to nothing
    assert fitted.steps == 2
    assert fitted.bytes_seen == 2 * 2 * 16


# --- the command ----------------------------------------------------------------------------------


def test_command_lists_checks_and_runs(tmp_path, capsys):
    assert command(["list"]) == 0
    assert "modded_nanogpt" in capsys.readouterr().out
    path = tmp_path / "ours.py"
    assert command(["export", "ours"]) == 0
    path.write_text(capsys.readouterr().out)
    assert command(["check", str(path), "--contract", "character"]) == 0
    assert "returns a character" in capsys.readouterr().out
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_text(TINY_TEXT)
    assert command(["run", "ours", "--corpus", str(tmp_path), "--seeds", "2", "--seed", "3",
                    "--characters", "50", "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in record["runs"]] == [3, 4]
    assert set(parts_frame(record["runs"])["part"]) == {
        "counting", "tabulating hints", "training"}
    assert record["runs"][0]["test_characters"] == 50
    assert "commit" in record
    assert command(["run", "ngram", "--corpus", str(tmp_path), "--characters", "50"]) == 0
    assert "valid acc" in capsys.readouterr().out


def test_command_refuses(tmp_path):
    with pytest.raises(UserError, match="task run needs NAME"):
        command(["run"])
    with pytest.raises(UserError, match="--seeds is 0: expected a whole number from 1"):
        command(["run", "ours", "--seeds", "0"])
    with pytest.raises(UserError, match=r"the last seed is \d+: expected less than 2\*\*63"):
        command(["run", "ours", "--seed", str(2**63 - 1), "--seeds", "2"])


def test_unknown_system_and_too_little_text():
    with pytest.raises(UserError, match="unknown: choose one of mamba_byte"):
        get_system("nope")
    with pytest.raises(UserError, match="at least 64"):
        build(get_system("ours"), TINY[:20])


def test_training_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(task_builder, "_TELL_SECONDS", 0.0)
    lines = []
    build(get_system("mamba_byte"), TEXT.encode(), report=lines.append)
    assert lines[0].startswith("SMOKE mode")
    assert [line.split(",")[0].split(":")[0] for line in lines[1:]] == [
        "step 1 of 2", "step 1", "step 2 of 2"]  # the loss of the first is told


def test_an_accuracy_has_the_error_of_its_text():
    hits = np.random.default_rng(0).random(50_000) < 0.7
    found = Score(1.0, float(hits.mean()), len(hits), len(hits), 0, hits).accuracy_error
    assert found == pytest.approx((0.7 * 0.3 / len(hits)) ** 0.5, rel=0.25)  # independent ones
    alike = np.repeat(hits[::500], 500)  # neighbours that share their fate say less
    assert Score(1.0, 0.7, len(alike), len(alike), 0, alike).accuracy_error > 5 * found
    assert Score(1.0, 0.7, 1999, 1999, 0, hits[:1999]).accuracy_error is None


def test_a_model_whose_probabilities_are_no_numbers_is_a_failed_row(monkeypatch):
    def gone(*args: object) -> None:
        raise NonFiniteError("the score of the text is nan: its weights have gone nan")

    monkeypatch.setattr("mambabyte.task.run.score", gone)
    row = run_task(get_system("ngram"), TINY, {"valid": TINY}, characters=60)
    assert "gone nan" in row["failure"]
    assert row["seconds"] > 0
    assert "valid_accuracy" not in row


def test_a_seed_without_a_counter_leaves_the_mean_unmeasured():
    rows = [{"system": "a", "joules": joules, "seconds": 1.0, "valid_accuracy": 0.5,
             "valid_bits_per_byte": 1.0, "test_accuracy": 0.5} for joules in (3.0, None)]
    frame = summary_frame(rows)
    assert frame["energy (J, idle subtracted)"].isna().all()
    assert frame["time (s)"].tolist() == [1.0]
