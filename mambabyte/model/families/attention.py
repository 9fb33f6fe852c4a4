"""Causal attention over a sliding window, and its costs in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import AttentionSpec, LocalAttentionSpec, Shape
from mambabyte.model import sequence
from mambabyte.model.mixer import (
    FLOAT32,
    FORMULA,
    Around,
    Kept,
    Mixer,
    Operations,
    Step,
    is_linear,
    linear,
    register,
)
from mambabyte.ops.arguments import FLOATS, check_tensors, once
from mambabyte.ops.fused import attention
from mambabyte.ops.fused.attention import (
    blocks_of,
    flash_takes,
    mean_keys,
    windowed_attention,
)
from mambabyte.ops.fused.linear import linear as linear_map
from mambabyte.ops.fused.rotary import rotary_table, rotate, rotate_qkv


class AttentionState(NamedTuple):
    """What an attention layer remembers: the last ``attention_window`` - 1 keys and values."""

    k: Tensor  # (B, n_kv_head, S, head_dim), rotated
    v: Tensor  # (B, n_kv_head, S, head_dim)
    position: int  # bytes seen before
    # (B,) of these keys, how many first ones are of documents before the one that goes on; None:
    # of no row any.
    others: Tensor | None = None

    def alone(self) -> AttentionState:
        """The state of one row without the keys of other documents."""
        if self.others is None:
            return self
        first = int(self.others)
        return AttentionState(self.k[:, :, first:], self.v[:, :, first:], self.position)


def _others_after(
    ages: Tensor | None, others: Tensor | None, keys: int, start: int
) -> Tensor | None:
    """Of ``keys`` keys from ``start`` on, how many come before the last document's, (B,); ages (B,
    L) are of the last L of all, ``others`` as in a state."""
    if ages is None:
        return None if others is None else (others - start).clamp(min=0)

    def begins(ages: Tensor = ages) -> Tensor:
        place = torch.arange(keys - start - ages.shape[1], keys - start, device=ages.device)
        return torch.where(ages == 0, place, 0).amax(1).clamp(min=0)

    if others is not None:
        return begins().maximum(others - start)
    return begins() if torch.compiler.is_compiling() else once(ages, (keys, start), begins)


@register("A")
class AttentionMixer(Mixer, AttentionSpec):
    """Causal attention over a sliding window, rotary positions, grouped KV heads (Ainslie et al.
    2023, arXiv:2305.13245)."""

    readers = 3
    state_name = "kv_cache"
    state_kind = AttentionState
    splits_length = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, self.window_of(config)
        self.qk_norm = config.qk_norm
        self.rope_base, self.rope_fraction = config.rope_base, config.rope_fraction
        # Of the first positions, where the same length comes again and again; see prepare.
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.flex: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # the same; on a GPU
        kv_width = self.n_kv_head * self.head_dim
        self.q_proj = linear(config, config.d_model, config.d_model)
        self.k_proj = linear(config, config.d_model, kv_width)
        self.v_proj = linear(config, config.d_model, kv_width)
        self.out_proj = linear(config, config.d_model, config.d_model)
        self.q_gain = nn.Parameter(torch.full((self.n_head,), config.qk_gain)) \
            if config.qk_gain else None
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def prepare(self, context: int) -> None:
        """Compute the rotary table of sequences of this length once, and on a GPU which tiles the
        window reaches."""
        device = self.q_proj.weight.device
        self.rotary = None
        cos, sin = self._table(0, context, device)
        self.rotary = cos.float(), sin.float()
        longer = device.type == "cuda" and context > self.window
        self.flex = attention.flex_window(context, self.window, device) if longer else None

    def _table(self, position: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.rotary is not None and position == 0 and len(self.rotary[0]) == length:
            return self.rotary
        half = self.head_dim // 2
        return rotary_table(position, length, half, self.rope_base, self.rope_fraction, device)

    def forward(
        self, x: Tensor, state: AttentionState | None, ages: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        length = x.shape[1]
        seen = 0 if state is None else state.position
        piece = sequence.current()
        if piece is not None:
            seen += piece.start
        table = self._table(seen, length, x.device)
        if self.fused:
            q, k, v = rotate_qkv(self._qkv(x), (self.n_head, self.n_kv_head), table, self.q_gain,
                                 self.qk_norm)
        else:
            q = self.q_proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, L, d)
            k = self.k_proj(x).unflatten(-1, (self.n_kv_head, -1)).transpose(1, 2)
            v = self.v_proj(x).unflatten(-1, (self.n_kv_head, -1)).transpose(1, 2)
            if self.qk_norm:
                q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
            q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
            if self.q_gain is not None:
                q = q * self.q_gain.to(q.dtype)[:, None, None]
        others = None if state is None else state.others
        if piece is not None:
            both = torch.cat([k, v], -1)
            both = torch.cat([piece.before(both, self.window - 1, 2), both], 2)
            k, v = both.chunk(2, -1)
            if ages is not None:
                others = self._others_before(piece, state)
        if state is not None:
            rows = state.k.shape[2] if isinstance(state.k, Tensor) and state.k.ndim == 4 else 0
            kept = (len(x), self.n_kv_head, rows, self.head_dim)
            check_tensors("x", x, None, FLOATS, (
                ("k of the state", state.k, kept, None), ("v of the state", state.v, kept, None)))
            k = torch.cat([state.k.to(k.dtype), k], dim=2)
            v = torch.cat([state.v.to(v.dtype), v], dim=2)
        if ages is not None or others is not None:
            y = self._by_documents(q, k, v, ages, others)
        elif self.flex is not None and self._takes_flex(q, k):
            y = self.flex(q, k, v)
        else:
            by_flash = attention.flash_window(q, k, v, self.window)
            y = windowed_attention(q, k, v, self.window) if by_flash is None else by_flash
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        # The next byte sees itself and window - 1 keys from before it.
        keep = min(self.window - 1, k.shape[2])
        start = k.shape[2] - keep
        others = _others_after(ages, others, k.shape[2], start)
        after = AttentionState(k[:, :, start:], v[:, :, start:], seen + length, others)
        return y, after.alone() if len(x) == 1 and x.device.type == "cpu" else after

    def _others_before(self, piece: sequence.Piece, state: AttentionState | None) -> Tensor:
        """How many keys are of other documents than that which goes on, of those of ``state`` and
        then of earlier stretches."""
        start = piece.last_start(self.window - 1)
        if state is None:
            return start.clamp(min=0)
        others = torch.where(start < 0, 0, start + state.k.shape[2])
        return others if state.others is None else others.maximum(state.others)

    def _by_documents(
        self, q: Tensor, k: Tensor, v: Tensor, ages: Tensor | None, others: Tensor | None
    ) -> Tensor:
        """Attention within documents, ``others`` as in a state."""
        batch, _, length, _ = q.shape
        if ages is not None:
            packed = attention.flash_documents(q, k, v, self.window, ages)
            if packed is not None:
                return packed
        if others is None:
            others = torch.zeros(batch, dtype=torch.int64, device=q.device)
        starts = (torch.zeros(batch, length, dtype=torch.bool, device=q.device)
                  if ages is None else ages == 0)
        if q.is_cuda and self._takes_flex(q, k):
            return attention.flex_documents(q, k, v, self.window, starts.cumsum(1))
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            attend = functools.partial(windowed_attention, window=self.window)
            return attention.each_document(attend, q, k, v, starts, others)
        # masked: nothing should wait to see where documents begin
        ids = starts.cumsum(1)  # 0 for what goes on
        passed = torch.arange(k.shape[2] - length, device=q.device) < others[:, None]
        return windowed_attention(q, k, v, self.window, torch.cat([-passed.to(ids.dtype), ids], 1))

    def aligned(self, states: Sequence[AttentionState]) -> list[AttentionState]:
        """Keys are turned on to the furthest position, as scores depend on distances alone; in
        front of fewer keys stand some that count as another document's."""
        position = max(state.position for state in states)
        rows = max(state.k.shape[2] for state in states)
        found = []
        for k, v, seen, others in states:
            if seen != position:
                table = rotary_table(position - seen, 1, self.head_dim // 2, self.rope_base,
                                     self.rope_fraction, k.device)
                k = rotate(k, table)
            missing = rows - k.shape[2]
            before = torch.zeros(len(k), dtype=torch.int64, device=k.device) \
                if others is None else others
            k, v = (F.pad(x, (0, 0, missing, 0)) for x in (k, v))
            found.append(AttentionState(k, v, position, before + missing))
        return found

    def _qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, (B, L, d_model + 2 G head_dim): of plain linear
        maps one product, so that the backward has one too and adds up nothing."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if not all(map(is_linear, parts)):
            return torch.cat([part(x) for part in parts], -1)
        bias = None if self.q_proj.bias is None else torch.cat([part.bias for part in parts])
        return linear_map(x, torch.cat([part.weight for part in parts]), bias)

    def _takes_flex(self, q: Tensor, k: Tensor) -> bool:
        # Its own compilation would cost seconds where the step is not compiled anyway.
        return (torch.compiler.is_compiling() and q.dtype != torch.float32
                and self.rotary is not None and q.shape[2] == k.shape[2] == len(self.rotary[0]))

    def as_configured(self, config: ModelConfig) -> bool:
        return self.window == self.window_of(config)

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        shape = (config.n_kv_head, min(seen, cls.window_of(config) - 1), config.head_dim)
        return {"k": shape, "v": shape}

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> list[Operations]:
        d, kv = config.d_model, config.n_kv_head * config.head_dim
        keys = mean_keys(length, cls.window_of(config), causal)
        return [
            Operations("attention projections", 2 * d * (2 * d + 2 * kv)),
            Operations("attention scores", 2 * 2 * keys * d),
            # scale, running maximum, subtraction, sum, normalisation; a score and a head
            Operations("attention softmax", 5 * keys * config.n_head, keys * config.n_head,
                       FORMULA, 1.0),
        ]

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        rotation = 3 * (config.d_model + config.n_kv_head * config.head_dim)
        return rotation + (config.d_model if config.qk_gain else 0), 0

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        """Causal up to the window; beyond it on a GPU in half precision FlashAttention, or
        FlexAttention in compiled steps; else blocks of which torch chooses the kernel."""
        window = cls.window_of(config)
        _, count, block = blocks_of(length, window)
        if count and device == "cuda" and compiled:
            return f"attention, window {window} by FlexAttention"
        if count and device == "cuda" and flash_takes(torch.bfloat16, config.head_dim):
            return f"attention, window {window} by FlashAttention"
        reach = window + block
        return f"attention, blocks of {block} by {reach}" if count else "attention, causal"

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        d, kv = config.d_model, config.n_kv_head * config.head_dim
        tokens, length, itemsize, device = step.tokens, step.length, step.itemsize, step.device
        terms = [
            ("attention", "q and k, rotated", tokens * (d + kv), itemsize),
            ("attention", "v", tokens * kv, itemsize),
            ("attention", "output", tokens * d, itemsize),
            ("attention", "log-sum-exp", tokens * config.n_head, FLOAT32),
            ("attention", "cos and sin", 4 * length * (config.head_dim // 2), itemsize),
            ("projection", "input of out_proj", tokens * d, itemsize),
        ]
        if config.qk_norm:
            # The CPU computes the norm, and keeps its input, in float32 in any case.
            wide = device == "cpu" or rms_norm_is_cast()
            terms.append(("attention", "q and k before their norm", tokens * (d + kv),
                          FLOAT32 if wide else itemsize))
            heads = config.n_head + config.n_kv_head
            terms.append(("attention", "1/rms of q and k", tokens * heads, FLOAT32))
        if config.qk_gain:
            terms.append(("attention", "q before its gain", tokens * d, itemsize))
            if itemsize != FLOAT32:
                terms.append(("casts", "gain of q, cast", config.n_head, itemsize))
        _, count, block = blocks_of(length, cls.window_of(config))
        if count and not (device == "cuda" and flash_takes(step.dtype, config.head_dim)):
            terms += _kept_of_blocks(config, step, cls.window_of(config), count, block)
        if itemsize != FLOAT32:
            terms.append(("casts", "weights, cast", 2 * d * d + 2 * d * kv, itemsize))
        return [Kept(*term) for term in terms]

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        d, itemsize = config.d_model, step.itemsize
        # The gradients of output, q, k and v; the input of out_proj is gone. The kernel that CUDA
        # takes in half precision sums the gradient of q in float32.
        summed = FLOAT32 if step.device == "cuda" and itemsize != FLOAT32 else 0
        taken = around.residual + step.tokens * d * (3 * itemsize + summed)
        return {"attention backward": (around.held - around.mlp + taken,
                                       around.done + d * d * FLOAT32)}


@register("L")
class LocalAttentionMixer(AttentionMixer, LocalAttentionSpec):
    """Attention over a window of its own, ``local_window``, beside layers that see further."""


def rms_norm_is_cast() -> bool:
    """Whether CUDA's autocast takes rms_norm to float32: torch 2.11 did not, 2.13 does."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def _kept_of_blocks(
    config: ModelConfig, step: Step, window: int, count: int, block: int
) -> list[tuple[str, str, int, int]]:
    """What ``windowed_attention`` keeps beyond its window besides what a causal call of that
    length keeps: ``count`` blocks of queries behind the first window."""
    d, kv = config.d_model, config.n_kv_head * config.head_dim
    batch = step.batch
    queries = count * block
    spare = queries - (step.length - window)  # filled up, and computed for nothing
    terms = [
        ("attention", "window mask", block * (window + block), step.itemsize),
        ("attention", "output of spare queries", batch * spare * d, step.itemsize),
        ("attention", "log-sum-exp of spare queries", batch * spare * config.n_head, FLOAT32),
    ]
    if batch > 1 and count > 1:  # else the blocks are views, of what is filled up
        terms += [
            ("attention", "q, by blocks", batch * queries * d, step.itemsize),
            ("attention", "k and v, by blocks",
             2 * batch * count * (window + block) * kv, step.itemsize),
        ]
    elif spare:
        terms += [
            ("attention", "q, filled up", batch * queries * d, step.itemsize),
            ("attention", "k and v, filled up", 2 * batch * (window + queries) * kv,
             step.itemsize),
        ]
    return terms
