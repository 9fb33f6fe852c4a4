"""Several streams in one batch go on as each alone would; beams are what trying all would find."""

from __future__ import annotations

import pytest
import torch

from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream, beam_search, feed_together
from mambabyte.task.mixture import Mixture
from mambabyte.task.ngram import count

CONFIG = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=3, n_head=2, n_kv_head=1,
                     attention_window=6, local_window=3,
                     tied_head=False)


def lm(pattern: str) -> ByteLM:
    torch.manual_seed(1)
    model = ByteLM(ModelConfig(**{**vars(CONFIG), "layer_pattern": pattern})).eval()
    with torch.no_grad():
        model.head.weight *= 30
    return model


@pytest.mark.parametrize("pattern", ["M", "MA", "AL"])
def test_streams_go_on_together_as_alone(pattern, monkeypatch):
    model = lm(pattern)
    texts = b"abc", b"abd", b"hello", b"x"
    alone, together = ([ByteStream(model) for _ in texts] for _ in range(2))
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, state=None: (
        calls.append(len(tokens)), forward(tokens, state))[1])
    for pieces in (texts, (b"1", b"2", b"3", b""), (b"de", b"fg", b"", b"hi"),
                   (b"longer", b"k", b"", b"also a"), (b"9",) * 4, (b"2468", b"13579") * 2):
        feed_together(together, pieces)
        for stream, piece in zip(alone, pieces, strict=True):
            stream.feed(piece)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.log_probs, other.log_probs, atol=1e-4)
    # Those of equally many bytes, wherever each of them is.
    assert [n for n in calls if n > 1][:3] == [2, 3, 3]
    leaver = together.pop(1)
    leaver.feed(b"alone again")
    feed_together([*together, ByteStream(model)], [b"q"] * 4)  # one leaves, one joins
    alone[0].feed(b"q")
    assert torch.allclose(alone[0].log_probs, together[0].log_probs, atol=1e-4)


def test_a_mixture_batches_what_has_seen_equally_much():
    mixture = Mixture(lm("MA"), count(b"abcabd" * 9, 3), 0.3)
    alone, together = ([ByteStream(mixture) for _ in range(3)] for _ in range(2))
    for pieces in ((b"ab", b"cd", b"e"), (b"c", b"a", b"b")):
        feed_together(together, pieces)
        for stream, piece in zip(alone, pieces, strict=True):
            stream.feed(piece)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_what_cannot_go_together_is_said():
    model = lm("M")
    stream = ByteStream(model)
    for given, data, said in (([stream], [], "one each"), ([stream, stream], [b"a"] * 2, "twice"),
                              ([stream, ByteStream(lm("M"))], [b"a"] * 2, "different models")):
        with pytest.raises(UserError, match=said):
            feed_together(given, data)
    feed_together([], [])


def test_beams_find_what_trying_all_finds():
    model = lm("MA")
    wide = beam_search(model, b"ab", 2, beams=256)
    with torch.no_grad():
        first = torch.log_softmax(model(torch.tensor([[10, 97, 98]]))[0][0, -1], -1)
        pairs = torch.tensor([[10, 97, 98, byte] for byte in range(256)])
        both = first[:, None] + torch.log_softmax(model(pairs)[0][:, -1], -1)
    best = both.flatten().topk(5)
    for beam, total, place in zip(wide, best.values, best.indices, strict=False):
        assert beam.log_prob == pytest.approx(float(total), abs=1e-3)
        assert beam.data == bytes(divmod(int(place), 256))
    narrow = beam_search(model, b"ab", 12, beams=3)
    assert [b.log_prob for b in narrow] == sorted((b.log_prob for b in narrow), reverse=True)
    assert narrow[0].log_prob > beam_search(model, b"ab", 12, 1)[0].log_prob - 1e-3
    stream = ByteStream(model)
    stream.feed(b"ab")
    assert beam_search(model, b"ab", 12, 1)[0].data == b"".join(stream.draw(12, temperature=0))
    for wrong in ({"beams": 0}, {"max_bytes": 0}):
        with pytest.raises(UserError, match="expected a whole number 1 or more"):
            beam_search(model, **wrong)
