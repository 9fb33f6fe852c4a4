"""States as values: rows, stacks and files, of every mixer's; what is no such file is one line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.model import MIXERS, ByteLM
from mambabyte.stream import ByteStream, load_state, save_state, saved, tensors_of, weights_digest
from mambabyte.stream.saved import Kept
from mambabyte.stream.states import batch_of, copy, kind, mapped, select, split, stack
from mambabyte.task.guide import Guide, GuidedLM
from mambabyte.task.mixture import Mixture
from mambabyte.task.ngram import count
from tests.conftest import TEXT

ALL = "".join(MIXERS)
CONFIG = ModelConfig(d_model=16, n_layer=1, d_state=3, n_head=2, n_kv_head=1, attention_window=6,
                     local_window=3, ssd_head_dim=8, ssd_d_state=4, delta_head_dim=8)
DATA = TEXT[:40].encode()


def lm(letters: str, **changes) -> ByteLM:
    torch.manual_seed(1)
    return ByteLM(replace(CONFIG, n_layer=len(letters), layer_pattern=letters, **changes)).eval()


def after(model, *texts: bytes, state=None):
    with torch.inference_mode():
        return model(torch.tensor([list(text) for text in texts]), state)


def same(a, b) -> bool:
    return kind(a) == kind(b) and all(
        torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def read_on(model, state) -> torch.Tensor:
    return after(model, *[b"fox"] * batch_of(state), state=state)[0]


@pytest.mark.parametrize("letters", [*MIXERS, ALL])
def test_rows_of_a_state_are_the_texts(letters):
    """Reordered, repeated, taken apart and put together, a text goes on as it would alone."""
    model = lm(letters)
    texts = b"the quick", b"brown fox", b"jumps ove"
    _, three = after(model, *texts)
    whole = read_on(model, three)
    again = read_on(model, select(three, [2, 0, 0]))
    assert torch.allclose(again, whole[[2, 0, 0]], atol=1e-6)
    apart = split(three)
    assert [batch_of(state) for state in apart] == [1, 1, 1]
    assert same(stack(apart), three)
    alone = torch.cat([read_on(model, after(model, text)[1]) for text in texts])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)  # else any row would do


def test_rows_carry_gradients_and_copies_none():
    model = lm("MA")
    _, state = model(torch.tensor([list(b"abc"), list(b"def")]))
    chosen = select(state, torch.tensor([1]))
    read = model(torch.tensor([[1]]), chosen)[0].sum()
    assert torch.autograd.grad(read, model.embedding.weight)[0][list(b"def")].abs().sum() > 0
    ours = copy(state)
    assert not any(t.requires_grad for t in tensors_of(ours))
    assert not {t.data_ptr() for t in tensors_of(ours)} & {t.data_ptr() for t in tensors_of(state)}


def test_what_cannot_be_one_batch_is_said():
    model, pure = lm("MA"), lm("M")
    longer, shorter = (after(model, text)[1] for text in (b"abcd", b"abc"))
    with pytest.raises(UserError, match="equally many bytes"):
        stack([longer, shorter])
    assert batch_of(stack([after(pure, text)[1] for text in (b"abcd", b"abc")])) == 2
    with pytest.raises(UserError, match="expected a list of one or more"):
        stack([])
    for rows in ([1], [-1], [[0]]):
        with pytest.raises(UserError, match="rows"):
            select(longer, rows)
    assert select(None, [0, 0]) is None  # before the first byte


@pytest.mark.parametrize("letters", [*MIXERS, ALL])
def test_a_saved_stream_goes_on_bit_for_bit(letters, tmp_path):
    model = lm(letters)
    stream = ByteStream(model)
    stream.feed(DATA[:3])
    for more in (b"", DATA[3:7], DATA[7:]):  # within windows, at their ends, beyond
        stream.feed(more)
        stream.save(tmp_path / "s")
        other = ByteStream.load(tmp_path / "s", lm(letters))  # another model of the same weights
        assert same(other.kept, stream.kept)
        branch = stream.fork()
        for one in (branch, other):
            one.feed(b"over")
        assert torch.equal(branch.log_probs, other.log_probs)


def test_a_window_of_one_and_a_batch_are_saved_too(tmp_path):
    model = ByteLM(replace(CONFIG, layer_pattern="A", attention_window=1))
    logits, state = after(model, b"abc", b"abd")
    kept = Kept(state, torch.log_softmax(logits[:, -1], -1))
    save_state(tmp_path / "s", model, kept)
    assert same(load_state(tmp_path / "s", model), kept)
    with pytest.raises(UserError, match="of 2 texts"):
        ByteStream.load(tmp_path / "s", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_of_other_types_are_saved_as_they_are(dtype, tmp_path):
    model = lm("MA").to(dtype)
    stream = ByteStream(model)
    stream.feed(DATA)
    stream.save(tmp_path / "s")
    other = ByteStream.load(tmp_path / "s", model)
    assert same(other.kept, stream.kept)
    with pytest.raises(UserError, match="other weights"):
        load_state(tmp_path / "s", lm("MA"))


def test_guided_and_mixed_models_are_told_by_their_tables_too(tmp_path):
    tables = [count(text, 3) for text in (b"abcabc", b"abcabd")]
    guided = GuidedLM(CONFIG, 12).eval()
    first, second = guided, Mixture(lm("M"), tables[0], 0.5)
    guided.guide = Guide(tables[0])
    for model in (first, second):
        stream = ByteStream(model)
        stream.feed(b"abcab")
        stream.save(tmp_path / "s")
        other = ByteStream.load(tmp_path / "s", model)
        stream.feed(b"c")
        other.feed(b"c")
        assert torch.equal(stream.log_probs, other.log_probs)
    digests = {weights_digest(second), weights_digest(Mixture(lm("M"), tables[1], 0.5)),
               weights_digest(Mixture(lm("M"), tables[0], 0.4)), weights_digest(guided)}
    guided.guide = Guide(tables[1])
    assert len({*digests, weights_digest(guided)}) == 5
    with pytest.raises(UserError, match="no torch module"):
        weights_digest(object())


def test_the_digest_is_of_what_is_computed():
    model = lm("MA")
    digest = weights_digest(model)
    assert digest == weights_digest(lm("MA"))
    assert digest == weights_digest(lm("MA", scan_form="recurrent"))
    assert digest != weights_digest(lm("MA", attention_window=5))
    assert digest != weights_digest(lm("MA").bfloat16())
    with torch.no_grad():
        model.layers[1].mixer.k_proj.weight[0, 0] += 1e-6
    assert digest != weights_digest(model)


def rewritten(path: Path, about=lambda a: a, tensors=lambda t: t, checksum=True) -> None:
    """The file with other metadata or tensors, and a checksum that fits."""
    with safe_open(path, "pt") as file:
        said, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said, held = about(dict(said)), tensors(held)
    old = said.pop("sha256", "")
    save_file(held, path, {**said, "sha256": saved._checksum(held, said) if checksum else old})


def _other_numbers(**numbers):
    return lambda about: {**about, "numbers": json.dumps(numbers)}


def _with(name: str, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


SSM = "state.0.ssm_state"
HARM = {
    "cut": (lambda p: os.truncate(p, 900), "no streaming state"),
    "cut header": (lambda p: os.truncate(p, 5), "no streaming state"),
    "empty": (lambda p: p.write_bytes(b""), "no streaming state"),
    "text": (lambda p: p.write_text("a state?" * 40), "no streaming state"),
    "weights instead": (lambda p: save_file(lm("M").state_dict(), p), "another format"),
    "gone": (lambda p: p.unlink(), "no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "no such file"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "no such file"),
    "version": (lambda p: rewritten(p, lambda a: {**a, "version": "2"}), "version '2', expected 1"),
    "one bit": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t + 1e-6), checksum=False),
                "not what was written"),
    "layer gone": (lambda p: rewritten(p, tensors=lambda t: {
        n: x for n, x in t.items() if n != SSM}), "another model.*ssm_state"),
    "one more": (lambda p: rewritten(p, tensors=lambda t: {**t, "x": torch.ones(1)}),
                 "another model.*first x"),
    "shape": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t[:, :1].clone())),
              r"expected torch.float32 \(1, 32, 3\)"),
    "scalar": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t.sum())), "rows"),
    "rows": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t.repeat(2, 1, 1))), "rows"),
    "type": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t.half())), "float16"),
    "nan": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t * math.nan)), "gone nan"),
    "infinite": (lambda p: rewritten(p, tensors=_with(SSM, lambda t: t.fill_(-math.inf))),
                 "nan or inf"),
    "keys beyond": (lambda p: rewritten(p, _other_numbers(**{"state.1.position": 2})),
                    r"expected torch.float32 \(1, 1, n, 8\)"),
    "backwards": (lambda p: rewritten(p, _other_numbers(**{"state.1.position": -1})), "cannot be"),
    "no count": (lambda p: rewritten(p, _other_numbers(**{"state.1.position": "9"})), "cannot be"),
    "no counts": (lambda p: rewritten(p, _other_numbers()), "another model.*position"),
    "no json": (lambda p: rewritten(p, lambda a: {**a, "numbers": "[1"}), "whole numbers"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_is_no_state_of_this_model_is_one_clear_line(name, tmp_path):
    model, path = lm("MA"), tmp_path / "s"
    stream = ByteStream(model)
    stream.feed(b"abc")
    stream.save(path)
    harm, said = HARM[name]
    harm(path)
    with pytest.raises(UserError, match=said) as error:
        load_state(path, model)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "read the text again" in str(error.value) or "another model" in str(error.value)


def test_a_state_of_other_weights_is_refused(tmp_path):
    ByteStream(lm("M")).save(tmp_path / "s")
    torch.manual_seed(2)
    with pytest.raises(UserError, match="other weights"):
        load_state(tmp_path / "s", ByteLM(replace(CONFIG, layer_pattern="M")))


def test_a_byte_that_cannot_come_next_is_no_fault_of_a_state(tmp_path):
    model = lm("M")
    kept = ByteStream(model).kept
    log_probs = kept.log_probs.clone()
    log_probs[:, 7] = -math.inf
    save_state(tmp_path / "s", model, Kept(kept.state, log_probs))
    assert load_state(tmp_path / "s", model).log_probs.equal(log_probs)


def test_a_state_that_has_gone_nan_is_not_saved(tmp_path):
    model = lm("M")
    kept = ByteStream(model).kept
    broken = mapped(lambda t: t * math.nan, kept.state)
    with pytest.raises(UserError, match="gone nan"):
        save_state(tmp_path / "s", model, Kept(broken, kept.log_probs))
    with pytest.raises(UserError, match="state to save is a state of another model"):
        save_state(tmp_path / "s", lm("A"), kept)
    assert not list(tmp_path.iterdir())
