"""What the public functions of models, streams and scores do not take: one line, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambabyte.config import ModelConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte, score
from mambabyte.model import ByteLM
from mambabyte.stream import (
    ByteStream,
    CharModel,
    PrefixCache,
    beam_search,
    feed_together,
    generate,
    states,
    stream_engine,
)
from mambabyte.stream.generation import Repetitions

MODEL = ByteLM(ModelConfig(layer_pattern="M", d_model=16, n_layer=1, d_state=2)).eval()
WEIRD: list[Any] = [None, -1, 1.5, math.nan, math.inf, "abc", b"abc", [1.5], torch.tensor([1, 2]),
                    object(), {"a": 1}, np.array([1.5])]
# By name: what is called with a value, and which of WEIRD it takes, by type.
CALLS: dict[str, tuple[Callable[[Any], Any], tuple[type, ...]]] = {
    "a model": (ByteStream, ()), "to score by": (lambda v: bits_per_byte(v, b"abc"), ()),
    "to draw by": (lambda v: "".join(generate(v, b"a", 3)), ()), "of characters": (CharModel, ()),
    "to go on by": (stream_engine, ()), "a configuration": (ByteLM, ()),
    "weights": (ByteLM.from_pretrained, ()), "characters": (CharModel(MODEL).observe, (str,)),
    "max_bytes": (lambda v: "".join(generate(MODEL, b"a", v)), ()),
    "bytes with guesses": (
        lambda v: "".join(generate(MODEL, b"a", v, guesser=Repetitions())), ()),
    "top_k": (lambda v: "".join(generate(MODEL, b"a", 3, top_k=v)), ()),
    "top_p": (lambda v: "".join(generate(MODEL, b"a", 3, top_p=v)), ()),
    "temperature": (lambda v: "".join(generate(MODEL, b"a", 3, temperature=v)), (float,)),
    "seed": (lambda v: "".join(generate(MODEL, b"a", 3, seed=v)), ()),
    "a state's file": (lambda v: ByteStream.load(v, MODEL), ()),
    "a cache": (lambda v: PrefixCache("cache", v), ()), "its folder": (PrefixCache, (str,)),
    "rows": (lambda v: states.select(MODEL(torch.tensor([[1], [2], [3]]))[1], v),
             (torch.Tensor,)),
    "states": (states.stack, (list,)), "streams": (lambda v: feed_together(v, [b"abc"]), ()),
    "texts": (lambda v: feed_together([ByteStream(MODEL)], v), ()),
    "beams": (lambda v: beam_search(MODEL, b"a", 3, v), ()),
    "bytes of a beam": (lambda v: beam_search(MODEL, b"a", v, 2), ()),
    "characters to score": (lambda v: score(MODEL, b"abcdef", v), ()),
    "a context": (lambda v: score(MODEL, b"abcdef", 5, context=v), (bytes, str)),
    "a window": (lambda v: bits_per_byte(MODEL, b"abc", v), ()),
    "a window of a score": (lambda v: score(MODEL, b"abc", 3, v), (type(None),)),
    "a corpus": (load_corpus, ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, taken = CALLS[name]
    for value in WEIRD:
        if type(value) in taken and not (isinstance(value, float) and not math.isfinite(value)):
            call(value)
            continue
        with pytest.raises(UserError) as caught:
            call(value)
        assert "\n" not in str(caught.value), value


def test_a_number_of_numpy_is_one() -> None:
    text = "".join(generate(
        MODEL, b"a", np.int64(5), np.float32(0.5), np.int64(3), seed=np.int64(1)))
    assert text == "".join(generate(MODEL, b"a", 5, 0.5, 3, seed=1))
    assert score(MODEL, b"abcdef", np.int64(2)).characters == 2
