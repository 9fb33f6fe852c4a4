"""The n-gram model against a dictionary, its mixture, its files."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from analysis.cli.models.ngram import run as command
from mambabyte.config import ModelConfig
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.errors import UserError
from mambabyte.evaluate import byte_log_probs, score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import CharModel
from mambabyte.task import ngram, ngram_file, ngram_native
from mambabyte.task.guide import Guide
from mambabyte.task.mixture import Mixture, NgramLM, best_weight, mix
from mambabyte.task.ngram import count
from tests.conftest import MULTIBYTE, TEXT

DATA = ("abracadabra alakazam " * 3 + TEXT[:120] + MULTIBYTE[:150]).encode()
UNSEEN = b"the quick abraham naive caf\xc3\xa9 zzz"


class Dictionary:
    """Interpolated Kneser-Ney by the book: sets and dictionaries of tuples; ``discounts`` for
    counts of 1, 2, and 3 or more at each length of context."""

    def __init__(self, data: bytes, order: int, discounts: list, continuation: bool) -> None:
        self.discounts = discounts
        text = bytes([START_BYTE] * (order - 1)) + data
        grams = Counter(text[i : i + order] for i in range(len(data)))
        self.counts: list[dict[bytes, Counter]] = []
        for _ in range(order):
            table: dict[bytes, Counter] = defaultdict(Counter)
            for gram, times in grams.items():
                table[gram[:-1]][gram[-1]] = times
            self.counts.insert(0, table)
            shorter: Counter = Counter()
            for gram, times in grams.items():  # distinct bytes before each shorter one, or times
                shorter[gram[1:]] += 1 if continuation else times
            grams = shorter

    def p(self, context: bytes, byte: int, m: int) -> float:
        if m < 0:
            return 1 / 256
        shorter = self.p(context, byte, m - 1)
        seen = self.counts[m].get(context[len(context) - m :])
        if not seen:
            return shorter
        total = sum(seen.values())
        off = {other: self.discounts[m][min(times, 3) - 1] for other, times in seen.items()}
        return ((seen[byte] - off[byte] if byte in off else 0) / total
                + sum(off.values()) / total * shorter)


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def either(request, monkeypatch):
    """Counting in C, and by torch's sort, which GPUs use."""
    if request.param:
        if ngram_native.library() is None:
            pytest.skip("no C compiler")
    else:
        monkeypatch.setattr(ngram_native, "library", lambda: None)


@pytest.mark.parametrize("continuation", [True, False])
@pytest.mark.parametrize(("order", "discount"), [(1, 0.5), (2, 0.5), (5, 0.75), (9, 0.5),
                                                  (16, 0.3), (5, None)])
def test_equals_a_dictionary(either, order, discount, continuation):
    fast = count(DATA, order, discount, continuation=continuation)
    discounts = fast.discounts if discount is None else [(discount,) * 3] * order
    slow = Dictionary(DATA, order, discounts, continuation)
    history = bytes([START_BYTE] * (order - 1))
    for data in (DATA[:40], UNSEEN):
        got = fast.log_probs(data).exp()
        for i in range(0, len(data), 3):
            context = (history + data)[i : i + order - 1]
            expected = [slow.p(context, byte, order - 1) for byte in range(256)]
            assert got[i].tolist() == pytest.approx(expected, rel=1e-5)


def test_hand_worked_bigram():
    # "aab": pairs (start, a), (a, a), (a, b); continuation counts a: 2, b: 1.
    model = count(b"aab", 2)
    p1 = {"a": 1.5 / 3 + 0.5 * 2 / 3 / 256, "b": 0.5 / 3 + 0.5 * 2 / 3 / 256}
    p = model.probabilities(torch.tensor([[ord("a")]]))[0]
    assert float(p[ord("a")]) == pytest.approx(0.5 / 2 + 0.5 * p1["a"])
    assert float(p[ord("b")]) == pytest.approx(0.5 / 2 + 0.5 * p1["b"])
    assert float(p.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("counts", "expected"), [
    ([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9], (0.5, 1.25, 2.0)),
    ([1] * 8 + [2] * 4, (0.5, 0.5, 0.5)),  # none to tell the others by: that of the one before
    ([2] * 4 + [3] * 2, (0.5, 0.5, 0.5)),
    ([1] * 2 + [2] * 30 + [3] * 900 + [4] * 9, (1 / 31, 0.01, 2.99))])  # bounded
def test_modified_discounts_by_hand(counts, expected):
    found = ngram.modified_discounts(torch.tensor(counts, dtype=torch.int32))
    assert found == pytest.approx(expected, rel=1e-5)


def test_distributions_sum_to_one_at_every_order():
    p = count(DATA, 12).probabilities(torch.randint(97, 123, (50, 11)), orders=True)
    assert p.shape == (12, 50, 256)
    assert torch.allclose(p.sum(-1), torch.ones(12, 50, dtype=torch.float64))
    assert (p > 0).all()


@pytest.mark.parametrize("order", [1, 2, 3, 8, 9, 16])
def test_both_ways_of_counting_agree(order, monkeypatch):
    data = torch.randint(0, 4, (3000,), dtype=torch.uint8) * 80  # high bytes as well
    native = count(data, order)
    monkeypatch.setattr(ngram_native, "library", lambda: None)
    for a, b in zip(native.levels, count(data, order).levels, strict=True):
        for name, tensor in vars(a).items():
            assert torch.equal(tensor, getattr(b, name)), name
            assert tensor.dtype == getattr(b, name).dtype


def test_a_copy_looks_up_in_tables_of_its_own():
    model = count(DATA, 6)
    wanted = model.after(UNSEEN[:5])
    other = copy.deepcopy(model)
    for level in model.levels:
        level.count.zero_()
    assert torch.equal(other.after(UNSEEN[:5]), wanted)


def test_scores_by_order_match_models_of_that_context():
    model = count(DATA, 6)
    scores = model.scores_by_order(UNSEEN)
    picked = model.log_probs(UNSEEN)[torch.arange(len(UNSEEN)), torch.tensor(list(UNSEEN))]
    assert scores[-1]["bits_per_byte"] == pytest.approx(-picked.mean().item() / math.log(2), 1e-5)
    assert scores[-1]["byte_accuracy"] == pytest.approx(
        (model.log_probs(UNSEEN).argmax(-1) == torch.tensor(list(UNSEEN))).float().mean().item())
    assert [s["order"] for s in scores] == list(range(1, 7))
    assert scores[3]["bits_per_byte"] < scores[0]["bits_per_byte"]


def test_lookup_in_pieces_is_lookup_at_once(monkeypatch):
    model = count(DATA, 5)
    whole = model.log_probs(UNSEEN)
    monkeypatch.setattr(ngram, "_ROWS", 3)
    assert torch.equal(model.log_probs(UNSEEN), whole)
    assert torch.equal(model.log_probs(UNSEEN[10:], history=UNSEEN[:10]), whole[10:])


def test_files_round_trip_and_refuse_what_is_not_a_model(tmp_path):
    model, path = count(DATA, 4), tmp_path / "n.safetensors"
    ngram_file.save(model, path)
    again = ngram_file.load(path)
    assert torch.equal(again.log_probs(UNSEEN), model.log_probs(UNSEEN))
    assert (again.order, again.discount, again.bytes_counted) == (4, 0.5, len(DATA))
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="no n-gram model"):
            ngram_file.load(path)
    with pytest.raises(UserError, match="no n-gram model"):
        ngram_file.load(tmp_path / "absent")
    model.levels[2].start[3] = 10**6  # whole as a file, and would read past the end of the tables
    ngram_file.save(model, path)
    with pytest.raises(UserError, match="order 3 do not agree"):
        ngram_file.load(path)


WRONG = {
    "nan discount": lambda t, about: about.update(discount="nan"),
    "negative discount": lambda t, about: about.update(discount="-0.5"),
    "cut order": lambda t, about: about.update(order="3"),
    "cut tables": lambda t, about: (about.update(order="3"), [t.pop(k) for k in list(t)
                                                              if k.startswith("3.")]),
    "long order": lambda t, about: about.update(order=str(10**12)),
    "no order": lambda t, about: (about.update(order="0"), t.clear()),
    "other bytes": lambda t, about: about.update(bytes_counted="7"),
    "totals": lambda t, about: t["2.total"].add_(1),
    "counts": lambda t, about: (t["2.count"].add_(1), t["2.total"].add_(
        t["2.start"][1:] - t["2.start"][:-1])),
    "dtype": lambda t, about: t.update({"1.total": t["1.total"].float()}),
    "symbols": lambda t, about: t["0.symbol"].copy_(t["0.symbol"].flip(0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_tables_that_do_not_agree_are_not_scored(name, tmp_path, caplog):
    """Of a file without a checksum: with one nothing could be changed at all."""
    path = tmp_path / "n.safetensors"
    ngram_file.save(count(DATA, 4), path)
    with safe_open(path, "pt") as file:
        tensors, about = load_file(path), file.metadata()
    about.pop("sha256")
    save_file(tensors, path, about)
    ngram_file.load(path)
    assert "has no checksum" in caplog.text
    WRONG[name](tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(UserError, match="no n-gram model"):
        ngram_file.load(path)


def test_a_flipped_bit_of_a_file_is_told(tmp_path):
    path = tmp_path / "n.safetensors"
    ngram_file.save(count(DATA, 4), path)
    whole = path.read_bytes()
    checksum = whole.index(b"sha256")  # elsewhere each time
    chosen = np.random.default_rng(0).integers(0, len(whole), size=60)
    for position in [*range(checksum, checksum + 6), *chosen]:
        changed = bytearray(whole)
        changed[position] ^= 1 << int(position % 8)
        path.write_bytes(changed)
        with pytest.raises(UserError):
            ngram_file.load(path)


@pytest.mark.parametrize("kwargs", [{"order": 0}, {"discount": 0.0}, {"discount": 1.0}])
def test_bad_input(kwargs):
    with pytest.raises(UserError):
        count(DATA, **kwargs)
    with pytest.raises(UserError, match="nothing to count"):
        count(b"")


def test_command_counts_saves_and_scores(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(DATA * 4)
    corpus, model = str(tmp_path / "text.txt"), str(tmp_path / "kn.safetensors")
    common = ["--corpus", corpus, "--device", "cpu", "--json"]
    assert command([*common, "--order", "5", "--save", model]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert [row["order"] for row in counted["orders"]] == [1, 2, 3, 4, 5]
    assert command([*common, "--load", model]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["orders"] == counted["orders"]
    assert loaded["bytes_counted"] == counted["bytes_counted"]
    with pytest.raises(UserError, match="--bytes is 0: expected a whole number from 1"):
        command(["--corpus", corpus, "--bytes", "0"])


# --- as a byte model ------------------------------------------------------------------------------

SMALL = ModelConfig(d_model=32, n_layer=1, d_state=4)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_mixture_scores_alike_in_parallel_and_streaming(weight):
    model = Mixture(ByteLM(SMALL), count(DATA, 5), weight)
    data = (MULTIBYTE[40:80] + "abracadabra").encode()
    text = data.decode()
    parallel = score(model, data, len(text), window=16)
    streaming = score_streaming(CharModel(model), data, len(text))
    assert (parallel.hits == streaming.hits).all()
    assert parallel.bits_per_byte == pytest.approx(streaming.bits_per_byte, rel=1e-5)


def test_mixture_is_the_weighted_mean():
    neural, counted = ByteLM(SMALL), count(DATA, 5)
    a, b = byte_log_probs(neural, UNSEEN), counted.log_probs(UNSEEN)
    got = byte_log_probs(Mixture(neural, counted, 0.3), UNSEEN)
    assert torch.allclose(got.exp(), 0.7 * a.exp() + 0.3 * b.exp(), atol=1e-6)
    assert torch.allclose(byte_log_probs(NgramLM(counted), UNSEEN), b, atol=1e-6)
    with pytest.raises(UserError, match="weight"):
        Mixture(neural, counted, 1.5)


def test_best_weight_finds_the_maximum():
    neural, counted = torch.rand(400).log(), torch.rand(400).log()
    best = best_weight(neural, counted)
    others = [float(mix(neural, counted, w / 100).mean()) for w in range(101)]
    assert others[round(100 * best)] == pytest.approx(max(others), abs=1e-6)
    assert best_weight(neural, neural - 1) == 0.0
    assert best_weight(neural - 1, neural) == 1.0


def test_symbols_that_are_no_bytes_are_refused():
    model = NgramLM(count(b"abcabc", 3))
    assert torch.equal(model(torch.tensor([[97, 98]]).to(torch.uint8))[0],
                       model(torch.tensor([[97, 98]]))[0])
    for token in (300, -1):  # they would wrap around
        with pytest.raises(UserError, match="bytes alone, from 0 to 255"):
            model(torch.tensor([[token, 98]]))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_counting_says_how_far_it_is(order):
    told: list[float] = []
    count(b"abracadabra" * 20, order, report=told.append)
    assert told == sorted(told)
    assert all(0 < done <= 1 for done in told)
    assert len(told) >= 2 * (order - 1)


def test_one_of_many_contexts_is_found_where_it_is_and_no_other_is():
    letters = np.array([0, 97, 98, 99, 200, 255], np.uint8)
    generator = np.random.default_rng(3)
    model = count(letters[generator.integers(0, 6, 20_000)].tobytes(), 6)
    if model.tables is None:
        pytest.skip("no C compiler")
    assert len(model.levels[4].key) > 10 * ngram_native.SHARED
    rows = generator.choice([0, 1, 97, 98, 99, 100, 200, 254, 255], (3000, 5)).astype(np.uint8)
    rows[::2] = letters[generator.integers(0, 6, (1500, 5))]
    contexts = torch.from_numpy(rows)
    wanted = model.probabilities(contexts.long()).log().float()
    assert torch.allclose(model.log_probs_after(contexts), wanted, atol=1e-5)
    hints = Guide(model)
    natively, alike = hints.hint(contexts), hints._longest(model.find(contexts.long()))
    assert torch.equal(natively.best, alike[0])
    assert torch.equal(natively.kind, alike[1])
