"""What another part of a program sets for torch's new tensors reaches no number of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mambabyte.config import ModelConfig
from mambabyte.evaluate import bits_per_byte, score
from mambabyte.model import ByteLM
from mambabyte.stream import beam_search, generate
from mambabyte.task.experts import Context, ExpertLM, Experts, Matches, count_contexts, fit_gate
from mambabyte.task.experts.contexts import PADDING, padded
from mambabyte.task.mixture import Mixture, NgramLM
from mambabyte.task.ngram import count
from tests.conftest import TEXT

DATA = TEXT[:300].encode()


@contextmanager
def other_defaults(dtype: torch.dtype) -> Iterator[None]:
    """New tensors of ``dtype``, and on no memory at all: one that follows is soon found."""
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    plain = ByteLM(ModelConfig(layer_pattern="MSRDKAL", n_layer=7, d_model=32, n_head=2,
                               n_kv_head=2, local_window=8, delta_head_dim=16)).eval()
    text = torch.tensor(list(DATA), dtype=torch.uint8)
    counted = count(text, 4, None)
    experts = Experts(counted, (2, 4), [count_contexts(text, Context(5))], Matches((3,), reach=90))
    gate, _ = fit_gate(experts, padded(text), PADDING + 40, None, steps=5, hidden=8)
    return {"layers": plain, "counts": NgramLM(counted),
            "mixture": Mixture(plain, count(DATA, 3), 0.5),
            "experts": ExpertLM(experts, gate, None).eval()}


def numbers(model: torch.nn.Module) -> list[object]:
    """What is drawn and scored, by the engine for streams and in one pass."""
    found: list[object] = ["".join(generate(model, DATA[:20], 24, seed=3)),
                           bits_per_byte(model, DATA[:60]), score(model, DATA[:60]).as_dict(),
                           beam_search(model, DATA[:9], 3, 2)]
    tokens = torch.tensor([list(DATA[:40])], device="cpu")
    return [*found, model(tokens)[0].tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_streams_and_scores_do_not_follow_them(dtype: torch.dtype) -> None:
    for name, model in models().items():
        expected = numbers(model)
        with other_defaults(dtype):
            found = numbers(model)
        assert found == expected, name


def test_a_gate_is_fitted_on_the_cpu_whatever_they_are() -> None:
    text = padded(torch.tensor(list(DATA), dtype=torch.uint8))
    experts = Experts(count(text[PADDING:], 3, None), (2, 3), [], Matches((3,), reach=90))

    def fitted() -> list[object]:
        gate, bits = fit_gate(experts, text, PADDING + 40, None, steps=5, hidden=8)
        return [bits, *(p.tolist() for p in gate.parameters())]

    expected = fitted()
    with other_defaults(torch.float32):
        assert fitted() == expected


def test_counting_does_not_follow_them() -> None:
    expected = count(DATA, 5).digest()
    with other_defaults(torch.bfloat16):
        assert count(DATA, 5).digest() == expected
