"""Documents one behind another in a row: each as if it were alone, in value and every gradient."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mambabyte.config import ModelConfig
from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError
from mambabyte.model import MIXERS, ByteLM
from mambabyte.ops import gated_delta_rule, selective_scan, ssd_scan
from mambabyte.ops.arguments import cumulative_lengths, document_ages, once
from mambabyte.ops.conv.dispatch import causal_conv, torch_convolution
from mambabyte.ops.fused.attention import (
    each_document,
    flash_documents,
    flex_documents,
    packed_attention,
    windowed_attention,
)
from tests.helpers.family_cases import backward_of, make_inputs

LENGTH = 41  # odd, and beyond the 16 and 32 steps of tiles and chunks
# Of each row: at 0, next to each other, at the last step; at edges of chunks, none at 0.
STARTS = ((0, 1, 2, 11, 40), (16, 17, 32))
Operator = Callable[..., tuple[Tensor, Tensor]]


def starts_of(rows: tuple[tuple[int, ...], ...], length: int) -> Tensor:
    found = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, begins in zip(found, rows, strict=True):
        row[list(begins)] = True
    return found


def scan_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {"u": normal(2, LENGTH, 5), "delta": normal(2, LENGTH, 5), "A": -normal(5, 3).exp(),
            "B": normal(2, LENGTH, 3), "C": normal(2, LENGTH, 3), "D": normal(5),
            "z": normal(2, LENGTH, 5), "delta_bias": normal(5), "initial_state": normal(2, 5, 3)}


def conv_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    shapes = {"x": (2, LENGTH, 5), "weight": (5, 4), "bias": (5,), "tail": (2, 3, 5)}
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()}


def separately(
    operator: Operator, inputs: dict[str, Tensor], state: str, starts: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The definition: a call for each document of each row, which begins without a state."""
    length = starts.shape[1]
    ys, states = [], []
    for row, begun in enumerate(starts):
        of_row, after = [], inputs[state][row : row + 1]
        places = sorted({0, *begun.nonzero().flatten().tolist(), length})
        for begin, end in itertools.pairwise(places):
            one = {name: t[row : row + 1, begin:end] if t.ndim > 2 and t.shape[1] == length else t
                   for name, t in inputs.items()}
            one[state] = torch.zeros_like(after) if begun[begin] else after
            y, after = operator(**one, **options)
            of_row.append(y)
        ys.append(torch.cat(of_row, 1))
        states.append(after)
    return torch.cat(ys), torch.cat(states)


def results(run: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
            inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y, state = run(leaves)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
               for t in (y, state)]
    gradients = torch.autograd.grad((y, state), list(leaves.values()), weights)
    return {"y": y.detach(), "state": state.detach(),
            **{f"d{name}": t for name, t in zip(leaves, gradients, strict=True)}}


def compare(operator: Operator, inputs: dict[str, Tensor], state: str, *,
            equal: tuple[str, ...] = (), limit: float = 1e-13, **options: Any) -> None:
    """Packed and separate: the names in ``equal`` bit for bit, the rest within ``limit``."""
    starts = starts_of(STARTS, LENGTH)
    found = results(lambda x: operator(**x, document_starts=starts, **options), inputs)
    wanted = results(lambda x: separately(operator, x, state, starts, **options), inputs)
    for name, value in wanted.items():
        if name in equal:
            assert torch.equal(found[name], value), name
        scale = max(float(value.abs().max()), 1e-30)
        assert float((found[name] - value).abs().max()) <= limit * scale, name


@pytest.mark.parametrize("form", FORMS)
def test_scan(form: str) -> None:
    inputs = scan_inputs(torch.float64)
    if form not in ("recurrent", "chunked", "fused"):
        inputs["delta"] = inputs["delta"] - 5  # what these can compute
    # (torch's exponential depends on the place in a vector, by a unit in the last place.)
    compare(selective_scan, inputs, "initial_state", form=form, delta_softplus=True, limit=1e-12,
            equal=("y", "state", "du", "dB", "dinitial_state") if form == "fused" else ())


def test_fused_scan_in_float32() -> None:
    compare(selective_scan, scan_inputs(torch.float32), "initial_state", form="fused",
            delta_softplus=True, equal=("y", "state", "du", "dB", "dinitial_state"), limit=2e-6)


@pytest.mark.parametrize("silu", [False, True])
def test_convolution(silu: bool) -> None:
    inputs = conv_inputs(torch.float64)
    compare(causal_conv, inputs, "tail", silu=silu, equal=("y", "state", "dx", "dtail"))
    with torch_convolution():
        compare(causal_conv, inputs, "tail", silu=silu)


@pytest.mark.parametrize("form", ["recurrent", "chunked", "fused"])
@pytest.mark.parametrize("family", ["ssd", "gated delta", "channel gates"])
def test_ssd_and_delta_rule(family: str, form: str) -> None:
    inputs = make_inputs(family, 2, LENGTH, heads=2, keys=4, values=3)
    operator = ssd_scan if family == "ssd" else gated_delta_rule
    compare(operator, inputs, "initial_state", form=form, limit=1e-12)


def test_ages() -> None:
    starts = starts_of(((0, 2), (3,)), 5)
    ages = document_ages(starts, starts)
    assert ages.tolist() == [[0, 1, 0, 1, 2], [255, 255, 255, 0, 1]]
    assert document_ages(None, starts) is None
    for given in ([0, 2], [0, 2, 5], torch.tensor([0, 2, 2, 5])):  # cumulative lengths too
        assert torch.equal(document_ages(given, starts[:1]), ages[:1])
    long = document_ages([3], torch.empty(1, 300))[0]
    assert long[:3].tolist() == [255] * 3
    assert long[3 + 254 :].tolist() == [254] + [255] * 42


@pytest.mark.parametrize(("starts", "words"), [
    (torch.zeros(1, 4, dtype=torch.bool), r"has shape \(1, 4\): expected \(1, 5\)"),
    (torch.zeros(1, 5), "torch.float32 of shape"),
    (torch.zeros(1, 5, dtype=torch.uint8), "torch.uint8 of shape .* expected bool"),
    ([0, 7], "to at most 5.*got .0, 7."),
    ([3, 1], "must ascend"), ([-1, 2], "must ascend"),
    (torch.zeros(1, 5, dtype=torch.bool, device="meta"), r"move it, document_starts.to\('cpu'\)"),
])  # fmt: skip
def test_what_is_no_documents_is_refused(starts: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        document_ages(starts, torch.empty(1, 5))
    inputs = {name: t[:1, :5] if t.ndim > 2 and t.shape[1] == LENGTH else t
              for name, t in scan_inputs(torch.float32).items()}
    with pytest.raises(UserError, match=words):
        selective_scan(**inputs | {"initial_state": None}, document_starts=starts)


CONFIG = ModelConfig(
    d_model=16, n_layer=1, n_head=4, n_kv_head=2, expand=2, dt_rank=4, d_state=4, ssd_head_dim=8,
    ssd_d_state=4, delta_head_dim=8, attention_window=12, local_window=3)


def model_of(pattern: str, dtype: torch.dtype = torch.float64) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(replace(CONFIG, layer_pattern=pattern, n_layer=len(pattern))).to(dtype)


def row_of(state: Any, row: int) -> Any:
    return [type(s)(*(t[row : row + 1] if isinstance(t, Tensor) else t for t in s)) for s in state]


def logits_separately(
    model: ByteLM, tokens: Tensor, starts: Tensor, states: list[Any] | None = None
) -> tuple[Tensor, list[list[Any]]]:
    """Logits and the state of each row by a call for each document."""
    rows, ends = [], []
    for row, begun in enumerate(starts):
        state = None if states is None else states[row]
        parts = []
        for begin, end in itertools.pairwise(
                sorted({0, *begun.nonzero().flatten().tolist(), tokens.shape[1]})):
            state = None if begun[begin] else state
            logits, state = model(tokens[row : row + 1, begin:end], state)
            parts.append(logits)
        rows.append(torch.cat(parts, 1))
        ends.append(state)
    return torch.cat(rows), ends


@pytest.mark.parametrize("letter", sorted(MIXERS))
def test_every_mixer(letter: str) -> None:
    """Value, gradients and what comes after, with a state before and one behind."""
    model = model_of(letter)
    g = torch.Generator().manual_seed(2)
    tokens, next_tokens = (torch.randint(256, (2, n), generator=g) for n in (LENGTH, 20))
    before = torch.randint(256, (2, 9), generator=g)
    starts, next_starts = starts_of(STARTS, LENGTH), starts_of(((), (6,)), 20)
    weights = [torch.randn(2, n, 256, generator=g, dtype=torch.float64) for n in (LENGTH, 20)]

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, list(model.parameters()), weights))

    _, state = model(before)
    first, state = model(tokens, state, starts)
    second, state = model(next_tokens, state, next_starts)
    third, _ = model(next_tokens[:, :1], state)  # a byte after it
    found = [first, second, third, *gradients([first, second])]
    _, state = model(before)
    first, states = logits_separately(model, tokens, starts, [row_of(state, 0), row_of(state, 1)])
    second, states = logits_separately(model, next_tokens, next_starts, states)
    third = torch.cat([model(next_tokens[row : row + 1, :1], s)[0] for row, s in enumerate(states)])
    wanted = [first, second, third, *gradients([first, second])]
    limit = 1e-6 if letter == "M" else 1e-12  # M's rates are float32
    for one, two in zip(found, wanted, strict=True):
        assert float((one - two).detach().norm()) <= limit * (1 + float(two.detach().norm()))
    # In a state before a document that begins at 0 nothing is read.
    again, _ = model(tokens, None, starts)
    torch.testing.assert_close(again[0], first[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("letter", ["A", "L"])
def test_attention_under_masks(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU and a compiler take, where none waits to see where documents begin."""
    model = model_of(letter)
    tokens, starts = torch.randint(256, (2, LENGTH)), starts_of(STARTS, LENGTH)
    wanted, (before,) = model(tokens, None, starts)
    follow, _ = model(tokens, [before], starts_of(((), ()), LENGTH))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, (state,) = model(tokens, None, starts)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(tokens, [state])[0], follow, rtol=1e-10, atol=1e-12)


@pytest.mark.long  # it loads the compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_documents_by_flex_attention() -> None:
    """Its tiles and mask, by its form without a compiler."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 300, 8, generator=g) for heads in (4, 2, 2))
    starts = starts_of(((0, 127, 128, 129, 299), (200,)), 300)
    for window in (50, 1000):
        found = flex_documents(q, k, v, window, starts.cumsum(1))
        attend = functools.partial(windowed_attention, window=window)
        wanted = each_document(attend, q, k, v, starts, torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(found, wanted)


def test_where_documents_begin_in_all_rows() -> None:
    ages = document_ages(starts_of(((0, 3), (2, 4)), 5), torch.empty(2, 5))
    assert ages is not None
    assert cumulative_lengths(ages.clone()) is None  # nobody knows how many there are
    once(ages, "most", lambda: 7)
    lengths = cumulative_lengths(ages)
    assert lengths is not None
    # A row's first step is a start too, and the last ones are empty.
    assert lengths.tolist() == [0, 3, 5, 7, 9, 10, 10, 10]
    assert cumulative_lengths(ages) is lengths  # once for all layers
    assert flash_documents(*torch.randn(3, 2, 1, 5, 8), 5, ages) is None  # on a CPU


def flash_on_a_cpu(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, also: Tensor, most: int, as_well: int,
    dropout: float, causal: bool, *rest: Any, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """What torch's kernel for sequences of many lengths is asked, q, k, v (all rows, heads, d)."""
    assert lengths is also
    assert (as_well, dropout, causal) == (most, 0.0, True)
    window = most if window_size_left is None else window_size_left + 1
    each = [windowed_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), window)
            for a, b in itertools.pairwise(lengths.tolist()) if b > a]
    return torch.cat(each, 2)[0].transpose(0, 1), *torch.empty(4)


@pytest.mark.parametrize("window", [6, LENGTH - 1, LENGTH, 1000])
def test_documents_by_flash_attention(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How rows, heads, lengths, window and gradients are handed to kernels that come with torch;
    what these compute is for tests/gpu/test_gpu_attention.py."""
    starts = starts_of(STARTS, LENGTH)
    ages = document_ages(starts, torch.empty(2, LENGTH))
    assert ages is not None
    once(ages, "most", lambda: 9)
    lengths = cumulative_lengths(ages)
    assert lengths is not None
    heads = [torch.randn(2, n, LENGTH, 8, dtype=torch.float64, requires_grad=True)
             for n in (4, 2, 2)]
    metas = [x.detach().to("meta").requires_grad_() for x in heads]
    asked = packed_attention(*metas, window, lengths.to("meta"))
    asked.sum().backward()  # torch's own operators take their arguments
    assert [x.grad.shape for x in metas if x.grad is not None] == [x.shape for x in heads]
    for way, stand_in in (("forward", flash_on_a_cpu), ("backward", backward_of(flash_on_a_cpu))):
        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{way}", stand_in)
    attend = functools.partial(windowed_attention, window=window)
    wanted = each_document(attend, *heads, starts, torch.zeros(2, dtype=torch.int64))
    found = packed_attention(*heads, window, lengths)
    weight = torch.randn_like(wanted)
    for one, two in zip((found, *torch.autograd.grad(found, heads, weight)),
                        (wanted, *torch.autograd.grad(wanted, heads, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_loss_leaves_out_what_no_byte_announces() -> None:
    model = model_of("MA")
    tokens, starts = torch.randint(256, (2, LENGTH)), starts_of(STARTS, LENGTH)
    loss = model.loss(tokens, starts)
    logits, _ = model(tokens[:, :-1], None, starts[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    asked = ~starts[:, 1:].flatten()
    torch.testing.assert_close(loss, each[asked].mean())
    # Parts of a batch add up to its mean, however their documents differ in number.
    predictions = asked.sum() / 2 * torch.ones(2, dtype=torch.float64)
    parts = [model.loss(tokens[i : i + 1], starts[i : i + 1], predictions[i : i + 1])
             for i in range(2)]
    torch.testing.assert_close(sum(parts) / 2, loss)
    alone = torch.ones(1, 3, dtype=torch.bool)  # nothing to predict
    assert model.loss(tokens[:1, :3], alone).item() == 0


def test_replaced_modules() -> None:
    """An adapter at a projection is asked with documents too; a convolution cannot be."""
    model, tokens = model_of("M"), torch.randint(256, (1, 9))
    mixer = model.blocks[0].mixer
    wanted, _ = model(tokens, None, [0, 4])
    mixer.x_proj.register_forward_hook(lambda module, args, output: output)
    torch.testing.assert_close(model(tokens, None, [0, 4])[0], wanted)
    mixer.conv1d.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(UserError, match="conv1d has been replaced"):
        model(tokens, None, [0, 4])


def test_no_more_operations_than_without() -> None:
    """By torch's counter, which sees products and torch's own convolution and attention."""
    model = model_of("MAL", torch.float32)
    tokens = torch.randint(256, (2, 65))
    starts = starts_of(((0, 20, 41), (33,)), 65)

    def counted(*documents: Tensor) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.loss(tokens, *documents).backward()
        return counter.get_total_flops()

    assert counted(starts) <= counted()
