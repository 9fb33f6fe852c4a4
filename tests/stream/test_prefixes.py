"""The prefix cache: what was read is not read again, nothing changes, nothing in it is trusted."""

from __future__ import annotations

import itertools
import logging
import math
import os
from dataclasses import replace

import pytest
import torch

from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.evaluate import score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.stream import CharModel, PrefixCache, prefixes
from mambabyte.stream.prefixes import places

CONFIG = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=3, n_head=2, n_kv_head=1,
                     attention_window=6)
TEXT = bytes(range(32, 120)) * 3


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST", 16)


def lm(seed: int = 1) -> ByteLM:
    torch.manual_seed(seed)
    return ByteLM(CONFIG).eval()


def states(folder):
    return sorted(folder.glob("*.state"))


def test_places_are_few_and_near_each_other(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST", 1024)
    found = list(places(1_000_000))
    assert found[:3] == [1024, 2048, 3072]
    assert found[-1] == 1_000_000
    assert len(found) < 200
    gaps = [(b - a) / b for a, b in itertools.pairwise(found) if a >= 16 * 1024]
    assert max(gaps) <= 1 / 16
    assert list(places(1_000_001))[:-1] == found[:-1]  # of the beginning alone
    assert (list(places(0)), list(places(5)), list(places(1024))) == ([], [5], [1024])


def test_what_was_read_is_not_read_again_and_no_bit_changes(tmp_path):
    first = PrefixCache(tmp_path / "none").read(lm(), TEXT)
    cache = PrefixCache(tmp_path / "c")
    for prompt, computed in ((TEXT[:100], 100), (TEXT[:100], 0), (TEXT[:90] + b"!", 91 - 80),
                             (TEXT, len(TEXT) - 96), (b"", 0)):
        before = cache.read_bytes
        stream = cache.read(lm(), prompt)  # another model of the same weights
        assert cache.read_bytes - before == computed, prompt
    assert cache.found_bytes == 100 + 80 + 96
    for text in (TEXT, TEXT[:100]):
        again = cache.read(lm(), text)
        fresh = PrefixCache(tmp_path / str(len(text))).read(lm(), text)
        for stream in (again, fresh):
            stream.feed(b"next")
        assert torch.equal(again.log_probs, fresh.log_probs)
    assert first.log_probs.isfinite().all()


def test_other_weights_find_nothing(tmp_path):
    cache = PrefixCache(tmp_path)
    cache.read(lm(), TEXT[:40])
    cache.read(lm(2), TEXT[:40])
    cache.read(ByteLM(replace(CONFIG, attention_window=5)), TEXT[:40])
    assert (cache.read_bytes, cache.found_bytes) == (120, 0)


def _break(path, how):
    if how == "cut":
        os.truncate(path, 100)
    elif how == "another's":  # a sound state of the same model, of another text
        other = PrefixCache(path.parent.parent / "other")
        other.read(lm(), b"another text")
        path.write_bytes(states(other.folder)[0].read_bytes())
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a link to nothing":
        path.unlink()
        path.symlink_to("gone")


@pytest.mark.parametrize("how", ["cut", "another's", "a folder", "a pipe", "a link to nothing"])
def test_what_is_no_state_is_said_and_read_anew(how, tmp_path, caplog):
    wanted = PrefixCache(tmp_path / "c").read(lm(), TEXT[:40])
    for path in states(tmp_path / "c"):
        _break(path, how)
    cache = PrefixCache(tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        stream = cache.read(lm(), TEXT[:40])
    assert torch.equal(stream.log_probs, wanted.log_probs)
    assert cache.read_bytes == 40
    said = [r.getMessage() for r in caplog.records]
    assert len(said) >= 1
    assert all("\n" not in line and str(tmp_path) in line for line in said)


def test_the_size_is_bounded_and_what_is_used_stays(tmp_path):
    kept = PrefixCache(tmp_path)
    kept.read(lm(), TEXT[:16])
    (used,) = states(tmp_path)
    size = used.stat().st_size
    (tmp_path / "mine.txt").write_text("mine")
    os.utime(used, (1, 1))
    small = PrefixCache(tmp_path, int(3.5 * size))
    small.read(lm(), TEXT[:16])  # now the newest
    small.read(lm(), TEXT[:16] + TEXT)
    assert len(states(tmp_path)) == 3
    assert used not in states(tmp_path)  # many newer ones came
    assert (tmp_path / "mine.txt").exists()
    none = PrefixCache(tmp_path / "none", 10)
    none.read(lm(), TEXT[:40])
    assert not states(tmp_path / "none")


def test_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    def refuse(path, *args):
        raise UserError(f"cannot write {path}: no room")

    monkeypatch.setattr(prefixes, "save_state", refuse)
    with caplog.at_level(logging.WARNING):
        PrefixCache(tmp_path / "c").read(lm(), TEXT)
    assert sum("not kept" in r.getMessage() for r in caplog.records) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        PrefixCache(tmp_path / "file")


def test_the_folder_is_for_its_user_alone(tmp_path):
    PrefixCache(tmp_path / "c").read(lm(), TEXT[:20])
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


def test_scoring_after_a_context_is_the_end_of_scoring_it_all(tmp_path):
    """By both ways; the second time the context is not read."""
    model, cache = lm(), PrefixCache(tmp_path)
    context, text = TEXT[:50], "né à la fin: 日本".encode()
    with torch.no_grad():
        whole = torch.log_softmax(model(torch.tensor([[10, *context, *text[:-1]]]))[0][0], -1)
    rows = whole[len(context) :]
    bits = -float(rows[torch.arange(len(text)), list(text)].mean()) / math.log(2)
    for found in (score(model, text, context=context),
                  score(model, text, window=5, context=context, cache=cache),
                  score(model, text, context=context, cache=cache),
                  score_streaming(CharModel(model), text, context=context),
                  score_streaming(CharModel(model), text, context=context, cache=cache)):
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
        assert found.bytes == len(text)
    assert (cache.read_bytes, cache.found_bytes) == (49 + 2, 49 + 48)
    assert bits != pytest.approx(score(model, text).bits_per_byte, rel=1e-3)
