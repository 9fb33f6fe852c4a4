"""Sliding-window attention by blocks: the dense mask is its definition; its cost is linear."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.measure.allocations import saved_storages
from mambabyte.config import ModelConfig
from mambabyte.model import AttentionMixer, ByteLM
from mambabyte.model.mixer import Step
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.fused import attention
from mambabyte.ops.fused.attention import mean_keys, windowed_attention
from tests.helpers.family_cases import backward_of

CONFIG = ModelConfig(d_model=32, n_layer=1, layer_pattern="A", n_head=4, n_kv_head=2,
                     attention_window=8)


def dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The definition: every score, and a mask of length by length."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    age = torch.arange(before, before + length)[:, None] - torch.arange(before + length)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1) @ v


def inputs(length: int, before: int = 0, batch: int = 2, heads: int = 4, groups: int = 2,
           width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + 100 * before)

    def normal(n: int, positions: int) -> Tensor:
        return torch.randn(batch, n, positions, width, generator=generator,
                           dtype=torch.float64).requires_grad_()

    return (normal(heads, length), normal(groups, before + length),
            normal(groups, before + length))


@pytest.mark.parametrize("before", [0, 1, 6, 7, 12])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("window", [1, 5, 8, 40])
def test_blocks_equal_the_dense_mask(window: int, length: int, before: int) -> None:
    """In values and in the gradients of queries, keys and values, those kept from before too."""
    found, expected = inputs(length, before), inputs(length, before)
    y, reference = windowed_attention(*found, window), dense(*expected, window)
    assert relative_rms(y, reference) < 1e-12
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weight).sum().backward()
    (reference * weight).sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        # (a window of one has the gradient 0 in queries and keys)
        assert (mine.grad - theirs.grad).norm() <= 1e-12 * (1 + theirs.grad.norm())


@pytest.mark.filterwarnings("ignore:attention with window")
@pytest.mark.parametrize("before", [0, 5, 19])
def test_a_wide_window_goes_in_smaller_blocks_and_says_so(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_BLOCK", 4)
    q, k, v = inputs(33, before)
    with pytest.warns(RuntimeWarning, match="window 20 builds a mask of 4 by 24"):
        assert relative_rms(windowed_attention(q, k, v, 20), dense(q, k, v, 20)) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windowed_attention(*inputs(33), 33)
        windowed_attention(*inputs(33), 4)


def test_no_mask_is_wider_than_two_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[tuple[int, ...]] = []
    real = F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        if attn_mask is not None:
            masks.append(tuple(attn_mask.shape))
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for length in (8, 9, 200):
        windowed_attention(*inputs(length), 8)
    assert set(masks) == {(8, 16)}
    masks.clear()
    windowed_attention(*inputs(1, 7), 8)  # a byte of a stream
    windowed_attention(*inputs(2048, batch=1, heads=1, groups=1), 4096)
    assert masks == []


def test_operations_and_memory_are_linear_in_the_length() -> None:
    def cost(length: int) -> tuple[int, int]:
        q, k, v = inputs(length)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            windowed_attention(q, k, v, 8).sum().backward()
        kept = sum(size for _, size in saved_storages(lambda: windowed_attention(q, k, v, 8).sum()))
        return counter.get_total_flops(), kept

    flops, kept = zip(*(cost(8 * n) for n in (3, 13, 23)), strict=True)
    assert flops[2] - flops[1] == flops[1] - flops[0]
    assert kept[2] - kept[1] == kept[1] - kept[0]
    # Scores and their sums, forward (2) and backward (4), of 4 heads of 8 channels in 2 rows.
    length = 8 * 23
    assert flops[2] == 2 * 3 * 2 * 4 * 8 * 2 * length * mean_keys(length, 8, causal=False)


@pytest.mark.parametrize("pieces", [[1] * 29, [29], [8, 21], [3, 9, 1, 16], [7, 1, 1, 20]])
def test_a_stream_equals_one_call(pieces: list[int]) -> None:
    model = ByteLM(replace(CONFIG, embed_std=1.0)).double()
    tokens = torch.randint(0, 256, (2, 29), generator=torch.Generator().manual_seed(0))
    whole, _ = model(tokens)
    state, parts = None, []
    for piece in tokens.split(pieces, 1):
        logits, state = model(piece, state)
        parts.append(logits)
        assert state[0].k.shape[2] == min(CONFIG.attention_window - 1, state[0].position)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-12


@pytest.mark.parametrize("window", [1, 2, 100, 128, 129, 200, 256, 257, 500])
@pytest.mark.parametrize("length", [1, 128, 129, 500])
def test_tiles_are_those_that_the_window_reaches(window: int, length: int) -> None:
    size = -(-length // attention.TILE) * attention.TILE
    age = torch.arange(size)[:, None] - torch.arange(size)
    seen = ((age >= 0) & (age < window)).unflatten(1, (-1, attention.TILE)).unflatten(
        0, (-1, attention.TILE)).transpose(1, 2).flatten(2)
    reached, whole = attention.window_tiles(length, window, torch.device("cpu"))
    assert torch.equal(reached, seen.any(-1))
    assert torch.equal(whole, seen.all(-1))


@torch.no_grad()
@pytest.mark.filterwarnings("default")  # torch's word that it should be compiled
def test_a_compiled_step_attends_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = AttentionMixer(replace(CONFIG, d_model=64)).bfloat16()
    x = torch.randn(2, 20, 64, dtype=torch.bfloat16)
    wanted = mixer(x, None)[0]
    mixer.prepare(20)
    assert mixer.flex is None  # a CPU has no gradients of it
    mixer.flex, calls = attention.flex_window(20, 8, x.device), []
    monkeypatch.setattr(mixer, "flex", lambda *qkv, flex=mixer.flex: calls.append(0) or flex(*qkv))
    assert torch.equal(mixer(x, None)[0], wanted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative_rms(mixer(x, None)[0], wanted) < 1e-2
    mixer(x[:, :9], None)  # another length, and behind a state
    mixer(x, mixer(x, None)[1])
    assert len(calls) == 2


def flash_on_a_cpu(
    q: Tensor, k: Tensor, v: Tensor, lengths: None, also: None, queries: int, keys: int,
    dropout: float, causal: bool, debug: bool = False, *, window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """What torch's kernel is asked for whole sequences, q (B, L, H, d), k, v (B, S, G, d)."""
    assert lengths is None
    assert also is None
    assert (queries, keys, dropout, causal) == (q.shape[1], k.shape[1], 0.0, True)
    assert window_size_right == 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return dense(q, k, v, window_size_left + 1).transpose(1, 2), *torch.empty(4)


@pytest.mark.parametrize(("window", "length", "before"), [(8, 33, 0), (8, 9, 3), (8, 5, 12)])
def test_a_window_by_flash_attention(
    window: int, length: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How heads, window and gradients are handed to kernels that come with torch; what these
    compute is for tests/gpu/test_gpu_attention.py."""
    heads = inputs(length, before)
    assert attention.flash_window(*heads, window) is None  # on a CPU
    monkeypatch.setattr(attention, "_takes_flash", lambda *qkv: True)
    metas = [x.detach().to("meta").requires_grad_() for x in heads]
    asked = attention.flash_window(*metas, window)
    assert asked is not None
    asked.sum().backward()  # torch's own operators take their arguments
    assert [x.grad.shape for x in metas if x.grad is not None] == [x.shape for x in heads]
    for way, stand_in in (("forward", flash_on_a_cpu), ("backward", backward_of(flash_on_a_cpu))):
        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{way}", stand_in)
    found, wanted = attention.flash_window(*heads, window), dense(*heads, window)
    assert found is not None
    weight = torch.randn_like(wanted)
    for one, two in zip((found, *torch.autograd.grad(found, heads, weight)),
                        (wanted, *torch.autograd.grad(wanted, heads, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_a_plain_window_goes_by_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the window, behind a state too; up to it torch chooses, and a byte is causal."""
    mixer, asked = AttentionMixer(CONFIG), []

    def flash(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        asked.append((q.shape[1], k.shape[1]))
        return windowed_attention(*(x.transpose(1, 2) for x in (q, k, v)), 8).transpose(1, 2)

    monkeypatch.setattr(attention, "_takes_flash", lambda *qkv: True)
    monkeypatch.setattr(attention._Flash, "apply", flash)
    x = torch.randn(2, 9, 32)
    _, state = mixer(x, None)
    mixer(x[:, :8], None)
    mixer(x[:, :1], state)
    mixer(x[:, :2], state)
    assert asked == [(9, 9), (2, 9)]


def test_no_blocks_are_kept_where_there_are_none() -> None:
    def of_blocks(dtype: torch.dtype, device: str) -> list[str]:
        return [term.tensor for term in AttentionMixer.kept(CONFIG, Step(3, 33, dtype, device))
                if "blocks" in term.tensor or "spare" in term.tensor or "mask" in term.tensor]

    assert of_blocks(torch.bfloat16, "cuda") == []
    assert of_blocks(torch.float32, "cuda") == of_blocks(torch.bfloat16, "cpu") != []


def test_a_mixer_names_its_kernel() -> None:
    assert AttentionMixer.kernel_name(CONFIG, 8) == "attention, causal"
    assert AttentionMixer.kernel_name(CONFIG, 9) == "attention, blocks of 8 by 16"
    assert AttentionMixer.kernel_name(CONFIG, 9, "cuda") == (
        "attention, window 8 by FlashAttention")
    assert AttentionMixer.kernel_name(CONFIG, 9, "cuda", compiled=True) == (
        "attention, window 8 by FlexAttention")


def test_weights_under_another_window_are_shared() -> None:
    model = ByteLM(CONFIG)
    wide = model.reconfigured(attention_window=64)
    tokens = torch.randint(0, 256, (1, 30))
    assert wide.blocks[0].mixer.window == 64
    with torch.no_grad():
        near, far = model(tokens)[0], wide(tokens)[0]
    assert relative_rms(far[:, :8], near[:, :8]) < 1e-6
    assert relative_rms(far[:, 8:], near[:, 8:]) > 1e-4
    for mine, theirs in zip(model.parameters(), wide.parameters(), strict=True):
        assert mine is theirs
