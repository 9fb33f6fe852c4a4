"""The ablation study: pairing, budgets, tasks, variants, byte accounting, and a tiny whole run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import ablation, documents, learning, variants
from analysis.budgets import COMPARISONS, budget_steps, compare
from analysis.few_steps import few_steps
from analysis.learning import (
    Learned,
    bits_at,
    constant_rate,
    heldout_bits,
    heldout_windows,
    position_bits,
)
from analysis.pairs import paired_difference, paired_table
from analysis.plots import ablation as figures
from analysis.run_tables import unigram_bits
from analysis.synthetic import IGNORE, accuracy, learn_task, make_task, parse_task
from analysis.tokens import (
    Pieces,
    bits_per_raw_byte,
    check_bytes,
    piece_byte_lengths,
    score_stream,
)
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, load_corpus
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.optim import learning_rate

SMALL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", n_head=2, n_kv_head=2, d_state=4,
                    attention_window=32)

# ------------------------------------------------------------------------------------- pairing


def test_paired_difference_by_hand():
    paired = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert paired.mean == 2.0
    assert paired.points == "+2.0000, +3.0000, +1.0000"
    assert paired.method.startswith("points only (3 seeds")
    assert math.isnan(paired.low)


def test_interval_of_many_pairs_is_near_students():
    rng = np.random.default_rng(1)
    a = rng.normal(0.5, 1.0, 60)
    paired = paired_difference(a.tolist(), [0.0] * 60)
    half = 2.0 * a.std(ddof=1) / math.sqrt(60)  # Student's t with 59 degrees: 2.0010
    assert paired.method == "BCa"
    assert paired.low == pytest.approx(a.mean() - half, abs=0.15 * half)
    assert paired.high == pytest.approx(a.mean() + half, abs=0.15 * half)


def test_pairing_removes_what_seeds_share():
    # Seeds differ by 10, systems by 0.1: unpaired the difference would drown.
    seeds = np.arange(6) * 10.0
    wiggle = np.array([0.01, -0.01, 0.02, -0.02, 0.0, 0.01])
    paired = paired_difference(seeds + 0.1 + wiggle, seeds)
    assert paired.low > 0.05
    assert paired.high < 0.15


def test_degenerate_interval_says_so():
    paired = paired_difference([2.0] * 6, [1.0] * 6)
    assert paired.low == paired.high == 1.0
    assert paired.method.startswith("percentile")


def test_pairs_must_pair_up():
    with pytest.raises(UserError, match="do not pair up"):
        paired_difference([1.0, 2.0], [1.0])


def test_paired_table_uses_common_seeds_and_needs_its_reference():
    frame = pd.DataFrame({"pattern": ["A", "A", "M", "M", "M"], "seed": [0, 1, 0, 1, 2],
                          "bits": [2.0, 3.0, 1.0, 1.0, 9.0]})
    table = paired_table(frame, "bits", "pattern", "A")
    assert table["mean"].tolist() == [-1.5]
    assert table["pairs"].tolist() == [2]
    with pytest.raises(UserError, match="not among"):
        paired_table(frame, "bits", "pattern", "MA")


# ------------------------------------------------------------------------------------- budgets


def learned(step_seconds: float, bits: float, joules: float | None = None) -> Learned:
    return Learned(None, [(0, 8.0), (100, bits)], 100, step_seconds, joules, "", False)


def test_budgets_are_what_the_cheapest_can_spend():
    runs = {("M", 0, 100): learned(0.2, 4.0), ("A", 0, 100): learned(0.1, 2.0)}
    table = budget_steps(runs, {"M": 1000.0, "A": 4000.0}, 20)
    steps = table.set_index(["comparison", "pattern"])["steps"]
    assert steps["steps", "M"] == steps["steps", "A"] == 100
    assert (steps["wall-clock", "M"], steps["wall-clock", "A"]) == (50, 100)
    assert (steps["FLOPs", "M"], steps["FLOPs", "A"]) == (100, 25)
    assert steps["joules", "M"] is None  # no counter: not a number made up
    bits = compare(runs, table, 100).set_index(["comparison", "pattern"])["bits_per_byte"]
    assert bits["wall-clock", "M"] == 6.0  # half way from 8 to 4
    assert bits["FLOPs", "A"] == 6.5
    assert bits["joules", "A"] is None


def test_joules_are_compared_where_they_are_measured():
    runs = {("M", 0, 100): learned(0.1, 4.0, 50.0), ("A", 0, 100): learned(0.1, 2.0, 200.0)}
    table = budget_steps(runs, {"M": 1.0, "A": 1.0}, 20)
    steps = table.set_index(["comparison", "pattern"])["steps"]
    assert (steps["joules", "M"], steps["joules", "A"]) == (100, 25)


def test_constant_rate_keeps_its_peak():
    recipe = TrainConfig(n_steps=100, lr=1e-3, warmup_fraction=0.1)
    flat = constant_rate(recipe)
    for step in range(10):
        assert learning_rate(step, flat) == pytest.approx(learning_rate(step, recipe))
    for step in (10, 50, 99):
        assert learning_rate(step, flat) == pytest.approx(1e-3, rel=1e-4)


def test_bits_at_interpolates():
    assert bits_at([(0, 8.0), (10, 4.0)], 5) == 6.0
    assert bits_at([(0, 8.0), (10, 4.0)], 99) == 4.0


# ----------------------------------------------------------------------------------- positions


def test_stream_and_fresh_windows_agree_where_both_see_the_same():
    # A window that starts at the stream's start is the stream: drift is zero there.
    torch.manual_seed(0)
    model = ByteLM(SMALL).eval()
    streams = torch.randint(0, 256, (3, 129))
    table = position_bits(model, streams, 32, piece=50)
    assert table["first_position"].tolist() == [0, 8, 16, 32, 64]
    assert table["last_position"].tolist() == [7, 15, 31, 63, 127]
    assert table["drift_bits"].isna().tolist() == [True, True, False, False, False]
    assert table["drift_bits"][2] == pytest.approx(0, abs=1e-6)
    assert abs(table["drift_bits"][4]) > 1e-7  # further on the stream knows more
    weights = table["last_position"] - table["first_position"] + 1
    with torch.no_grad():
        expected = model.loss(streams[:, :33]).item() / math.log(2)
    first = (table["bits_per_byte"] * weights)[:3].sum() / 32
    assert first == pytest.approx(expected, rel=1e-5)


def test_unbounded_cache_is_put_back():
    model = ByteLM(SMALL).eval()
    streams = torch.randint(0, 256, (1, 100))
    bounded = position_bits(model, streams, 32)
    unbounded = position_bits(model, streams, 32, unbounded=True)
    assert model.layers[1].mixer.window == 32
    assert bounded["bits_per_byte"].iloc[-1] != unbounded["bits_per_byte"].iloc[-1]
    assert bounded["bits_per_byte"].iloc[0] == unbounded["bits_per_byte"].iloc[0]


def test_heldout_bits_of_an_untrained_model():
    windows = heldout_windows(np.arange(1000, dtype=np.uint8), 50, 7)
    assert windows.shape == (7, 51)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999 % 256
    assert heldout_bits(ByteLM(SMALL), windows) == pytest.approx(8, abs=0.2)


# --------------------------------------------------------------------------------------- tasks


def test_a_seed_that_is_done_stays_in_the_mean():
    """One seed solves the task at step 20 and stops, the other stays at 0.5: the mean is 0.75."""
    rows = [(0, 10, 0.5), (0, 20, 1.0), (1, 10, 0.5), (1, 20, 0.5), (1, 30, 0.5)]
    frame = pd.DataFrame([{"task": "copy", "size": 2, "pattern": "A", "seed": seed, "step": step,
                           "accuracy": accuracy, "chance": 0.1} for seed, step, accuracy in rows])
    line = figures.tasks(frame).axes[0].lines[0]
    assert line.get_xdata().tolist() == [10, 20, 30]
    assert line.get_ydata().tolist() == [0.5, 0.75, 0.75]


def test_recall_answers_are_the_values_shown():
    task = make_task("recall", 3, 5)
    inputs, targets = task.batch(20, 0, 0)
    assert inputs.shape == (20, task.length)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(value_of) == 3
        for i in (6, 8, 10):
            assert wanted[i] == value_of[row[i]] == row[i + 1]
        assert all(w == IGNORE for i, w in enumerate(wanted) if i not in (6, 8, 10))


def test_copy_answers_are_the_text():
    task = make_task("copy", 4, 5)
    inputs, targets = task.batch(10, 0, 0)
    assert (inputs[:, 4] == 5).all()
    assert torch.equal(targets[:, 4:], inputs[:, :4])
    assert torch.equal(inputs[:, 5:], inputs[:, :3])
    assert (targets[:, :4] == IGNORE).all()


def test_tasks_are_seeded_and_checked():
    task = parse_task("copy 4", 5)
    assert torch.equal(task.batch(3, 1, 2)[0], task.batch(3, 1, 2)[0])
    assert not torch.equal(task.batch(3, 1, 2)[0], task.batch(3, 1, 3)[0])
    refused = (("copy", "kind and a size"), ("sort 3", "unknown"), ("recall 9", "distinct"))
    for bad, match in refused:
        with pytest.raises(UserError, match=match):
            parse_task(bad, 5)


def test_an_untrained_model_guesses_and_a_trained_one_copies():
    task = make_task("copy", 3, 4)
    config = replace(SMALL, d_model=32, embed_std=0.2, mlp_ratio=1.0)
    torch.manual_seed(0)
    untrained = ByteLM(replace(config, vocab_size=task.vocab_size))
    assert accuracy(untrained, task, 200, 0) < 0.5
    curve = learn_task(config, task, steps=150, batch=32, lr=5e-3, check_every=25)
    assert curve[-1][1] > 0.95


# ------------------------------------------------------------------------------------ variants


def groups(name: str) -> dict[str, set[str]]:
    variant = variants.get_variant(name)
    model = variants.build(SMALL, variant, seed=0)
    names = {p: n for n, p in model.named_parameters()}
    found = {}
    for optimizer in variants.make_optimizers(model, variant, TrainConfig()):
        owned = {names[p] for g in optimizer.param_groups for p in g["params"]}
        found[type(optimizer).__name__] = owned
    return found


def test_each_parameter_has_one_optimizer():
    every = {n for n, _ in ByteLM(SMALL).named_parameters()}
    for name in variants.VARIANTS:
        owned = groups(name)
        assert sum(map(len, owned.values())) == len(set().union(*owned.values()))
        left_out = every - set().union(*owned.values())
        frozen = variants.get_variant(name).frozen_taps
        assert left_out == ({"layers.0.mixer.conv1d.weight"} if frozen else set())


def test_muon_takes_a_log_only_when_asked():
    a_log = "layers.0.mixer.A_log"
    assert a_log not in groups("Muon")["Muon"]
    assert a_log in groups("Muon with A_log")["Muon"]
    assert "layers.0.mixer.in_proj.weight" in groups("Muon")["Muon"]
    assert "embedding.weight" not in groups("Muon")["Muon"]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_each_variant_changes_what_it_says(name):
    variant = variants.get_variant(name)
    model = variants.build(SMALL, variant, seed=0)
    settings = TrainConfig(n_steps=2, context=16, batch_size=2, lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(i))
               for i in range(2)]
    losses = variants.train_variant(
        model, variants.make_optimizers(model, variant, settings), variant, settings, batches,
        lambda step: 1.0)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    taps = "layers.0.mixer.conv1d.weight"
    after = dict(model.named_parameters())
    assert torch.equal(before[taps], after[taps]) == variant.frozen_taps
    if variant.bf16_weights:
        assert torch.equal(after["embedding.weight"],
                           after["embedding.weight"].bfloat16().float())


def test_rounded_state_is_rounded_and_nothing_else():
    exact = variants.build(SMALL, variants.get_variant("field"), seed=0).eval()
    rounded = variants.build(SMALL, variants.get_variant("bf16 state"), seed=0).eval()
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, states = exact(tokens)
        z, rounded_states = rounded(tokens)
    h = rounded_states[0].ssm
    assert torch.equal(h, h.bfloat16().float())
    assert torch.allclose(states[0].ssm, h, rtol=0.05, atol=1e-4)
    assert not torch.equal(y, z)
    assert torch.allclose(y, z, atol=1e-2)


def test_half_life_by_hand():
    model = variants.build(replace(SMALL, dt_init="mamba", dt_min=0.01, dt_max=0.01),
                           variants.get_variant("field"), seed=0)
    with torch.no_grad():
        model.layers[0].mixer.dt_proj.weight.zero_()
    life = variants.memory_half_life(model, torch.zeros(1, 8, dtype=torch.int64))
    assert life == pytest.approx(math.log(2) / 0.01, rel=1e-3)


def test_published_state_becomes_float32():
    table = variants.published_state_dtypes()
    assert table["state"].tolist() == ["bfloat16", "float32", "float32"]


def test_warm_down_by_hand():
    # 200 steps without a cap: factors (200 - s) / 1200, whose sum is 200 * 201 / 2 / 1200.
    assert variants.effective_steps(1.0, iterations=200) == (200, pytest.approx(16.75))
    # A cap of 180 s at 37 s a step: 1, then 143, 106, 69, 32 of 1200 * 37.
    steps, total = variants.effective_steps(37.0, iterations=10**6, cap_seconds=180.0)
    assert steps == 5
    assert total == pytest.approx(1 + (143 + 106 + 69 + 32) / (1200 * 37))


def test_documents_arithmetic():
    ours = documents.document_checks().set_index("key")["ours"]
    assert ours["parameters"] == 1_057_152
    assert ours["tokens"] == 65_536_000
    assert (ours["hybrid_ssm_layers"], ours["hybrid_attention_layers"]) == (7, 2)
    # in 512 x 2048, conv 5 x 1024, B and C 2 x 16 x 1024, dt 1024 x 1024 + 1024, A, D, out.
    ssm = 512 * 2048 + 5 * 1024 + 32 * 1024 + 1024 * 1024 + 1024 + 16 * 1024 + 1024 + 1024 * 512
    attention = 2 * 512 * 512 + 2 * 512 * 256
    assert ours["ssm_over_attention_parameters"] == pytest.approx(ssm / attention)


# ------------------------------------------------------------------------------------- subwords


def test_bits_per_raw_byte():
    # 3 tokens at ln 4 nats each are 6 bits; over 4 bytes, 1.5 bits a byte.
    assert bits_per_raw_byte(3 * math.log(4), 4) == pytest.approx(1.5)


def test_piece_lengths_and_their_check():
    pieces = ["<unk>", "<0x0A>", "\u2581the", "\u00e9", "\u2581"]
    lengths = piece_byte_lengths(pieces, [False, True, False, False, False],
                                 [True, False, False, False, False])
    assert lengths.tolist() == [0, 1, 4, 2, 1]
    assert check_bytes(np.array([2, 1, 3]), lengths, " the\n\u00e9") == 7
    with pytest.raises(UserError, match="stand for 4 bytes and the text has 5"):
        check_bytes(np.array([2]), lengths, " thee")
    with pytest.raises(UserError, match="stand for 0 bytes"):
        check_bytes(np.array([0]), lengths, "x")


def test_pieces_without_the_package_are_one_clear_line(monkeypatch):
    import sys

    from analysis.tokens import train_pieces

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        train_pieces(b"text " * 1000, 300)


def test_pieces_account_for_every_byte():
    pytest.importorskip("sentencepiece")
    from analysis.tokens import train_pieces

    text = "the cat and the hat, the bat\n\n\tsat  on the m\u00e4t \u2014 \U0001f600 ok\n" * 200
    pieces = train_pieces(text.encode(), 300)
    ids = pieces.encode(text)
    assert pieces.processor.decode(ids.tolist()) == text
    assert pieces.piece_bytes[ids].sum() == len(text.encode())
    assert len(ids) < len(text.encode())
    with pytest.raises(UserError, match="bits per byte"):
        pieces.encode("\u2581")


class Letters:
    """A piece model of 26 letters, enough to score with."""

    def encode(self, text):
        return [ord(c) - 97 for c in text]


def test_a_model_that_knows_nothing_has_uniform_bits():
    pieces = Pieces(Letters(), np.ones(26, dtype=np.int64))
    text = "abcxyz" * 50
    held = np.array(pieces.encode(text))
    model = ByteLM(replace(SMALL, vocab_size=26))
    torch.nn.init.zeros_(model.embedding.weight)
    assert score_stream(model, held, len(text)) == pytest.approx(math.log2(26), rel=1e-5)


def test_pieces_and_bytes_see_and_read_the_same_text(corpus_file):
    pytest.importorskip("sentencepiece")
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=(), steps=40, pieces=300,
                piece_train_bytes=20_000)
    found = ablation.run(p).tokens
    assert found["pattern"].tolist() == ["M", "A"]
    step = p.context * p.batch_size * found["bytes_per_token"]
    assert ((found["trained_raw_bytes"] - found["trained_bytes_on_bytes"]).abs() < step).all()
    assert (found["trained_tokens"] < found["trained_bytes_on_bytes"]).all()
    corpus = load_corpus(corpus_file)
    text = bytes(corpus.valid).decode()
    assert (found["raw_bytes"] == len(text.encode())).all()
    # Bits over all tokens are bits over all bytes.
    totals = found["bits_per_token"] * found["tokens"]
    assert totals.tolist() == pytest.approx(
        (found["bits_per_raw_byte"] * found["raw_bytes"]).tolist())
    assert (found["n_parameters"] - found["n_parameters_on_bytes"] == (300 - 256) * 16).all()
    assert (found["bits_per_byte_on_bytes"] < 8).all()


def test_a_stream_is_scored_the_same_in_parts():
    """On bytes against the package's own scoring, beyond one part of 4096."""
    torch.manual_seed(0)
    model = ByteLM(SMALL)
    text = "".join(chr(97 + i * i % 26) for i in range(5000))
    ours = score_stream(model, np.frombuffer(text.encode(), dtype=np.uint8), len(text))
    whole = torch.tensor([list(text.encode())])
    logits, _ = model(whole[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits[0], whole[0, 1:], reduction="sum").item()
    assert ours == pytest.approx((nats / math.log(2) + math.log2(256)) / len(text), rel=1e-5)


def test_few_steps_start_uniform_and_learn():
    pieces = Pieces(Letters(), np.ones(26, dtype=np.int64))
    split = np.frombuffer(b"abcd" * 500, dtype=np.uint8)
    corpus = Corpus("letters", "", split, split, split)
    table = few_steps({"tiny": SMALL}, pieces, corpus, steps=3, tokens_per_step=100, context=32,
                      micro_batch=2, train_bytes=2000, valid_bytes=400)
    assert table["step"].tolist() == [0, 1, 2, 3]
    assert table["tokens"].tolist() == [0, 64, 128, 192]  # whole micro-batches of 2 x 32
    bits = table["bits_per_raw_byte"]
    assert bits[0] == pytest.approx(math.log2(26), abs=0.1)
    assert bits[3] < bits[0]
    with pytest.raises(UserError, match="at least 1"):
        few_steps({}, pieces, corpus, steps=0, tokens_per_step=1, train_bytes=10)


# ------------------------------------------------------------------------------------ the study


TINY = ablation.Parameters(
    patterns=("M", "A"), d_model=16, n_layer=2, context=32, batch_size=2, steps=6,
    seeds=(0, 1), heldout_windows=2, characters=20, streams=1, stream_bytes=64,
    tasks=("copy 2",), task_steps=4, task_batch=4, variants=("field", "zero out_proj"),
    variant_steps=2, max_seconds=0.0)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} of a small text, {i * i}.\n" for i in range(400)))
    return str(path)


@pytest.mark.parametrize("decay", [False, True])
def test_a_tiny_study_end_to_end(corpus_file, decay):
    found = ablation.run(replace(TINY, corpus=corpus_file, decay=decay))
    assert set(found.comparisons["comparison"]) == set(COMPARISONS)
    assert found.systems["pattern"].tolist() == ["M", "A"]
    assert (found.systems["state_bytes"] == found.systems["state_bytes_counted"]).all()
    assert found.paired["reference"].eq("A").all()
    matmul = found.flop_check[found.flop_check["counted"] == "matrix product"]
    assert (matmul["formula_over_counter"] == 1.0).all()
    values = ablation.headline(found)
    assert values["seeds"][0] == 2
    assert values["ssm_steps"][0] is not None
    if decay:  # a run that ends earlier was trained with its own, shorter schedule
        assert len(found.runs) >= 4


@pytest.mark.parametrize(("given", "answer"), [
    ({"patterns": ("A",)}, "two or more"), ({"patterns": ("A", "M", "A")}, "each once"),
    ({"reference": "MMMA"}, "not among the patterns"), ({"seeds": ()}, "no seeds"),
    ({"context": 3}, "at least 4"), ({"stream_bytes": 63}, "past the context"),
    ({"steps": 0}, "at least 1")])
def test_what_cannot_be_compared_is_refused(given, answer):
    with pytest.raises(UserError, match=answer):
        replace(TINY, **given)


def test_the_field_alone_has_no_largest_choice(corpus_file):
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=("field",))
    values = ablation.headline(ablation.run(p))
    assert values["variant_largest"][0] is None
    assert values["half_life_field"][0] > 0


def test_unigram_bits_by_hand():
    train = np.array([65] * 3 + [66], dtype=np.uint8)
    windows = torch.tensor([[65, 65, 66]])  # the first byte is no target
    expected = -(math.log2(4 / 260) + math.log2(2 / 260)) / 2
    assert unigram_bits(train, windows) == pytest.approx(expected)


def test_the_study_is_seeded(corpus_file):
    p = replace(TINY, corpus=corpus_file, seeds=(0,), tasks=(), variants=())
    first, second = (ablation.run(p).curves["bits_per_byte"] for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(("change", "match"), [
    ({"reference": "MA"}, "not among the patterns"),
    ({"seeds": ()}, "no seeds"),
    ({"stream_bytes": 40}, "drift shows only past"),
    ({"variants": ("nothing",)}, "variant 'nothing' is unknown"),
    ({"tasks": ("copy",)}, "kind and a size"),
    ({"steps": 0}, "at least 1"),
])
def test_bad_parameters_are_one_clear_line(change, match):
    with pytest.raises(UserError, match=match):
        replace(TINY, **change)


def test_captured_steps_are_the_steps_one_by_one() -> None:
    """The step that a GPU captures, run here without capture, against the readable one."""
    config = ModelConfig(d_model=16, n_layer=2, d_state=4)
    recipe = TrainConfig(context=24, batch_size=2, n_steps=25, precision="fp32")
    corpus = load_corpus("stdlib")
    schedule = constant_rate(recipe)
    weights = []
    for advance in (learning._steps, learning._captured_steps):
        torch.manual_seed(0)
        model = ByteLM(config)
        take = advance(model, corpus.train, recipe, schedule)
        seconds = take(0, 21, math.inf) + take(21, 25, math.inf)
        assert len(seconds) == 25
        assert min(seconds) > 0
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    difference = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert difference < 1e-5, difference
