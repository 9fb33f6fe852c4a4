"""Sequence mixers (selective SSM, attention), the MLP, and the residual block around them.

Every mixer is called as ``mixer(x, state) -> (y, state)`` with x (B, L, d_model): training is a
long call without a state, streaming a call of length 1 with one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.ops import selective_scan
from mambabyte.ops.causal_conv import causal_conv
from mambabyte.ops.mamba.fused import fused_mixer
from mambabyte.ops.mamba.step import MAX_TAPS, mamba_step
from mambabyte.ops.scan.operator import MAX_STATES, fused_available


class MambaState(NamedTuple):
    """What an SSM layer remembers: O(1) in the bytes seen."""

    tail: Tensor  # (B, K-1, D) last inputs of the convolution
    ssm: Tensor  # (B, D, N)


class AttentionState(NamedTuple):
    """What an attention layer remembers: at most ``attention_window`` keys and values."""

    k: Tensor  # (B, n_kv_head, S, head_dim), rotated
    v: Tensor  # (B, n_kv_head, S, head_dim)
    position: int  # bytes seen before


LayerState = MambaState | AttentionState


def inverse_softplus(y: Tensor) -> Tensor:
    """x of softplus(x) = y, for y > 0; accurate for small y too."""
    return y + torch.log(-torch.expm1(-y))


class MambaMixer(nn.Module):
    """Selective SSM mixer (Gu & Dao 2023, arXiv:2312.00752, section 3.4).

    in_proj -> (x, z); x -> causal depthwise convolution -> SiLU -> selective scan, gated by
    silu(z) -> out_proj. Weight names are those of the public Mamba checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_inner, d_state = config.d_model, config.d_inner, config.d_state
        self.dt_rank = 0 if config.dt_rank == "full" else config.dt_rank_value
        self.form, self.chunk = config.scan_form, config.scan_chunk

        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank_value, d_inner)
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))  # A = -(1..N), S4D-real
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

        if config.dt_init == "mamba":
            bound = config.dt_rank_value**-0.5
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            dt = torch.exp(torch.rand(d_inner) * (high - low) + low)
            with torch.no_grad():
                self.dt_proj.bias.copy_(inverse_softplus(dt))
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def scan_inputs(
        self, x: Tensor, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything the scan reads: u, delta before bias and softplus, B, C, z; and the tail."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # each (B, L, D)
        u, tail = causal_conv(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias, tail, silu=True)
        x_proj, dt_proj = self._small_projections()
        rank, d_state = dt_proj.shape[1] if self.dt_rank else 0, self.A_log.shape[1]
        low_rank, B, C = F.linear(u, x_proj).split([rank, d_state, d_state], dim=-1)
        # The bias is added inside the scan, in float32: in bf16 it would round the step size.
        delta = F.linear(low_rank if rank else u, dt_proj)
        return u, delta, B, C, z, tail

    def _small_projections(self) -> tuple[Tensor, Tensor]:
        """Weights of x_proj (R + 2N, D) and dt_proj (D, R), R on a GPU a multiple of 8."""
        x_proj, dt_proj, rank = self.x_proj.weight, self.dt_proj.weight, self.dt_rank
        if x_proj.is_cuda and rank % 8:
            # Zeros between delta's rows and those of B and C put all three on 16 bytes. Else the
            # products take kernels of half the speed, and the scan copies B and C.
            spare = -rank % 8
            x_proj = torch.cat([F.pad(x_proj[:rank], (0, 0, 0, spare)), x_proj[rank:]])
            dt_proj = F.pad(dt_proj, (0, spare))
        return x_proj, dt_proj

    def forward(self, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        if self._is_one_operator(x):
            if state is None and x.is_cuda:
                return self.from_start(x)
            if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
                return self.step(x, state)
        u, delta, B, C, z, tail = self.scan_inputs(x, None if state is None else state.tail)
        y, ssm = selective_scan(
            u, delta, -torch.exp(self.A_log.float()), B, C, self.D.float(), z,
            delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            form=self.form, chunk_size=self.chunk,
        )
        return self.out_proj(y), MambaState(tail, ssm)

    def from_start(self, x: Tensor) -> tuple[Tensor, MambaState]:
        """``forward`` without a state, as one operator between the large projections. On a GPU."""
        assert self.conv1d.bias is not None
        y, tail, ssm = fused_mixer(
            self.in_proj(x), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            *self._small_projections(), self.dt_proj.bias.float(),
            -torch.exp(self.A_log.float()), self.D.float(),
        )
        return self.out_proj(y), MambaState(tail, ssm)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """``forward`` for one byte, x (B, 1, d_model), as one operator. Inference only."""
        u, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)  # each (B, D)
        y, tail, ssm = mamba_step(
            u, z, state.tail, state.ssm, self.conv1d.weight.squeeze(1), self.conv1d.bias,
            self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias.float(),
            -torch.exp(self.A_log.float()), self.D.float(),
        )
        return self.out_proj(y)[:, None], MambaState(tail, ssm)

    def _is_one_operator(self, x: Tensor) -> bool:
        """Whether the operators for a step and for a sequence do what this layer is set to: the
        convolution, both small products and the fused scan, none of them changed by a subclass."""
        if not self.dt_rank or self.form not in ("auto", "fused"):
            return False
        if x.dtype == torch.float64 or not 2 <= self.conv1d.kernel_size[0] <= MAX_TAPS:
            return False
        if type(self).scan_inputs is not MambaMixer.scan_inputs:
            return False
        return self.A_log.shape[1] <= MAX_STATES and fused_available(x.device)[0]


def rotary_table(
    position: int, length: int, half: int, base: float, fraction: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, half) of the rotary angles from ``position`` on, in float64."""
    # float64 for the angles alone: at position 1e6 float32 would be off by 0.06 radians.
    turning = max(1, round(half * fraction))
    rate = base ** (-torch.arange(half, device=device, dtype=torch.float64) / turning)
    rate[turning:] = 0
    steps = torch.arange(position, position + length, device=device, dtype=torch.float64)
    angle = torch.outer(steps, rate)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): x (B, H, L, head_dim), head_dim even."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class AttentionMixer(nn.Module):
    """Causal attention over a sliding window, rotary positions, grouped KV heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, config.attention_window
        self.qk_norm = config.qk_norm
        self.rope_base, self.rope_fraction = config.rope_base, config.rope_fraction
        # Of the first positions, where the same length comes again and again; see keep_rotary.
        self.rotary: tuple[Tensor, Tensor] | None = None
        kv_width = self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def keep_rotary(self, length: int) -> None:
        """Compute the rotary table of sequences of this length once, for training."""
        self.rotary = None
        cos, sin = self._table(0, length, self.q_proj.weight.device)
        self.rotary = cos.float(), sin.float()

    def _table(self, position: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.rotary is not None and position == 0 and len(self.rotary[0]) == length:
            return self.rotary
        half = self.head_dim // 2
        return rotary_table(position, length, half, self.rope_base, self.rope_fraction, device)

    def forward(self, x: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        length = x.shape[1]
        seen = 0 if state is None else state.position
        q = self.q_proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, L, d)
        k = self.k_proj(x).unflatten(-1, (self.n_kv_head, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_head, -1)).transpose(1, 2)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        table = self._table(seen, length, x.device)
        q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], dim=2)
            v = torch.cat([state.v.to(v.dtype), v], dim=2)
        kept = k.shape[2] - length  # keys from before x
        if kept == 0 and length <= self.window:
            mask, causal = None, True
        else:
            age = (
                torch.arange(kept, kept + length, device=x.device)[:, None]
                - torch.arange(kept + length, device=x.device)[None, :]
            )  # of each key, as each query sees it
            mask, causal = (age >= 0) & (age < self.window), False
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.n_head != self.n_kv_head
        )
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        # The next byte sees itself and window - 1 keys from before it.
        keep = min(self.window - 1, k.shape[2])
        start = k.shape[2] - keep
        return y, AttentionState(k[:, :, start:], v[:, :, start:], seen + length)


class MLP(nn.Module):
    """Two linear maps around an activation; "relu2" is the square of a ReLU (arXiv:2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.mlp_activation
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden, bias=False)
        self.out_proj = nn.Linear(config.mlp_hidden, config.d_model, bias=False)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.activation == "relu2":
            return self.out_proj(F.relu(x).square())
        return self.out_proj(F.gelu(x) if self.activation == "gelu" else F.silu(x))


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model)
    return nn.RMSNorm(config.d_model, elementwise_affine=config.norm == "rms")


class Block(nn.Module):
    """Pre-norm residual block: ``x + mixer(norm(x))``, then the same around an MLP if any."""

    def __init__(self, config: ModelConfig, letter: str) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = MambaMixer(config) if letter == "M" else AttentionMixer(config)
        self.mlp_norm = make_norm(config) if config.mlp_hidden else None
        self.mlp = MLP(config) if config.mlp_hidden else None

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, state = self.mixer(self.norm(x), state)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state
