"""The mixer of Mamba-2, and its costs in closed form.

Symbols: D = d_inner = H P, H heads of P channels; N states; G groups of heads, each with its own
B and C.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import Mamba2Spec, Shape
from mambabyte.model import sequence
from mambabyte.model.families.shared import convolves_in_one_kernel, first_dt_bias
from mambabyte.model.mixer import (
    CONVOLUTION,
    FLOAT32,
    FORMULA,
    Around,
    Kept,
    Mixer,
    Operations,
    Step,
    is_linear,
    largest_exponent,
    linear,
    operator_against_definition,
    register,
    rms_norm,
    widened,
)
from mambabyte.ops import ssd_scan
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.fused.linear import linear as biased
from mambabyte.ops.ssd import cuda as ssd_kernels
from mambabyte.ops.ssd.chunked import CHUNK
from mambabyte.ops.ssd.decay import chunk_length
from mambabyte.ops.ssd.gates import DTYPES as GATE_DTYPES

# Operations of the scan for each number of the state: decay, two of the write, two of the read.
SCAN_FORWARD_PER_STATE = 5
# g = carry + dy C (2), dC += dy h (2), carry = g a (1), da += g h (2), dB += g dt x (2),
# d(dt x) += g B (2).
SCAN_BACKWARD_PER_STATE = 11


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers: O(1) in the bytes seen."""

    conv_state: Tensor  # (B, d_conv - 1, D + 2 G N) last inputs of the convolution
    ssm_state: Tensor  # (B, H, P, N)


class GatedRMSNorm(nn.Module):
    """RMS norm of ``x silu(z)``, over each of ``groups`` equal parts of the channels."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and z (..., D) -> (..., D)."""
        gated = (x * F.silu(z)).unflatten(-1, (self.groups, -1))
        return rms_norm(gated, self.eps).flatten(-2) * self.weight.to(gated.dtype)


@register("S")
class Mamba2Mixer(Mixer, Mamba2Spec):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 7).

    in_proj -> (z, x, B, C, dt); x, B and C -> causal depthwise convolution -> SiLU -> scan with a
    decay a head -> RMS norm gated by silu(z) -> out_proj.
    """

    has_decays = True
    state_name = "ssm"
    state_kind = Mamba2State
    splits_length = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, head = config.d_inner, config.ssd_head_dim
        self.heads, self.groups, self.d_state = D // head, config.ssd_groups, config.ssd_d_state
        conv = D + 2 * self.groups * self.d_state
        self.in_proj = linear(config, config.d_model, D + conv + self.heads, config.ssm_bias)
        self.conv1d = nn.Conv1d(conv, conv, config.d_conv, groups=conv)
        self.dt_bias = nn.Parameter(first_dt_bias(config, self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(D, self.groups, config.ssd_norm_eps)
        self.out_proj = linear(config, D, config.d_model, config.ssm_bias)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def scan_inputs(
        self, x: Tensor, conv_state: Tensor | None, ages: Tensor | None = None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """What :func:`mambabyte.ops.ssd_scan` reads of x (B, L, d_model), by name; z (B, L, D); and
        the convolution's next state."""
        shared = self.groups * self.d_state
        inner = self.norm.weight.shape[0]
        projected = in_whole_rows(self.in_proj, x)
        parts = [inner, inner + 2 * shared, self.heads]
        z, xBC, dt, _ = projected.split([*parts, projected.shape[-1] - sum(parts)], dim=-1)
        xBC, conv_state = causal_conv(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias,
            sequence.tail_before(xBC, self.conv1d.kernel_size[0], conv_state), silu=True,
            ages=ages)
        u, B, C = xBC.split([inner, shared, shared], dim=-1)
        inputs = {
            "x": u.unflatten(-1, (self.heads, -1)), "dt": dt, "A": -torch.exp(widened(self.A_log)),
            "B": B.unflatten(-1, (self.groups, -1)), "C": C.unflatten(-1, (self.groups, -1)),
            "dt_bias": widened(self.dt_bias),
        }
        return inputs, z, conv_state

    def forward(
        self, x: Tensor, state: Mamba2State | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        inputs, z, conv_state = self.scan_inputs(
            x, None if state is None else state.conv_state, ages)
        ssm_state = None if state is None else state.ssm_state
        piece = sequence.current()
        if piece is not None:
            _, end = ssd_scan(**inputs, dt_softplus=True, ages=ages)
            decay = sequence.unbroken(torch.exp(self.log_decay(inputs).sum(1)), ages)  # (B, H)
            ssm_state = piece.arriving(decay[..., None, None], end, ssm_state)
        y, ssm_state = ssd_scan(
            **inputs, D=widened(self.D), dt_softplus=True, initial_state=ssm_state,
            ages=ages)
        return self.out_proj(self.norm(y.flatten(2), z)), Mamba2State(conv_state, ssm_state)

    @torch.no_grad()
    def exponent(self, x: Tensor, state: Mamba2State | None, chunk: int) -> float:
        inputs, _, _ = self.scan_inputs(x, None if state is None else state.conv_state)
        return largest_exponent(self.log_decay(inputs), chunk)

    def log_decay(self, inputs: dict[str, Any]) -> Tensor:
        """(B, L, H), not above 0, of what :meth:`scan_inputs` gives."""
        dt: Tensor = F.softplus(widened(inputs["dt"]) + inputs["dt_bias"]) * inputs["A"]
        return dt

    def log_decays(self, x: Tensor) -> Tensor:
        return self.log_decay(self.scan_inputs(x, None)[0])

    def against_definition(self, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        inputs, _, _ = self.scan_inputs(x, None)
        return operator_against_definition(ssd_scan, inputs, dt_softplus=True)

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        D, head, N = config.d_inner, config.ssd_head_dim, config.ssd_d_state
        return {"conv_state": (config.d_conv - 1, D + 2 * config.ssd_groups * N),
                "ssm_state": (D // head, head, N)}

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> list[Operations]:
        d, D, N = config.d_model, config.d_inner, config.ssd_d_state
        heads, shared = D // config.ssd_head_dim, config.ssd_groups * N
        # Beside the state: dt x and the skip; bias, softplus and log-decay of each head.
        forward = SCAN_FORWARD_PER_STATE * D * N + 3 * D + 3 * heads
        backward = SCAN_BACKWARD_PER_STATE * D * N + 2 * (3 * D + 3 * heads)
        return [
            Operations("Mamba-2 in_proj", 2 * d * (2 * D + 2 * shared + heads)),
            Operations("Mamba-2 convolution", 2 * (D + 2 * shared) * config.d_conv,
                       kind=CONVOLUTION),
            Operations("Mamba-2 scan", forward, 3 * heads, FORMULA, backward / forward),
            Operations("Mamba-2 out_proj", 2 * D * d),
        ]

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        # SiLU behind the convolution and of the gate (2 and 1 each), the gate and the norm.
        D, conv = config.d_inner, config.d_inner + 2 * config.ssd_groups * config.ssd_d_state
        return 2 * conv + 7 * D, conv + D + config.ssd_groups

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        ours = has_kernel(config, Step(1, length, torch.bfloat16, device))
        return f"{cls.about}, {'kernels for bf16' if ours else 'torch'}"

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        d, D, N, groups = config.d_model, config.d_inner, config.ssd_d_state, config.ssd_groups
        heads, conv = D // config.ssd_head_dim, D + 2 * groups * N
        tokens, itemsize, half = step.tokens, step.itemsize, step.itemsize != FLOAT32
        terms = [
            ("projection", "output of in_proj", tokens * (D + conv + heads), itemsize),
            ("scan input", "x, B and C", tokens * conv, itemsize),
            ("scan input", "step sizes and log-decays", 2 * tokens * heads, FLOAT32),
            ("scan input", "exp(A_log) and A", 2 * heads, FLOAT32),
            ("gate", "y and silu(z)", 2 * tokens * D, itemsize),
            # A CPU norms in float32.
            ("norm", "input", tokens * D, FLOAT32 if step.device == "cpu" else itemsize),
            ("norm", "1/rms", tokens * groups, FLOAT32),
            ("norm", "normalised", tokens * D, itemsize),
            ("projection", "input of out_proj", tokens * D, itemsize),
        ]
        if not gates_in_one_kernel(step):
            terms.append(("scan input", "softplus input", tokens * heads, FLOAT32))
        taps = 0
        if not convolves_in_one_kernel(config, step.device, itemsize):
            taps = conv * config.d_conv
            padded = step.batch * (step.length + config.d_conv - 1)
            terms += [("conv", "input, padded", padded * conv, itemsize),
                      ("conv", "output", tokens * conv, itemsize)]
        if half:
            weights = (D + conv + heads) * d + taps + D + D * d
            terms.append(("casts", "weights, cast", weights, itemsize))
        if has_kernel(config, step):
            chunks = step.batch * -(-step.length // ssd_kernels.CHUNK)
            terms.append(("scan", "states between chunks", chunks * D * N, itemsize))
        return [Kept(*term) for term in terms]

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        D, tokens, itemsize = config.d_inner, step.tokens, step.itemsize
        wide = FLOAT32 if step.device == "cpu" else itemsize
        # Gone: what is behind the scan. There: the gradients of y and z.
        behind = tokens * D * (4 * itemsize + wide)
        there = around.held - around.mlp - behind + around.residual + 2 * tokens * D * itemsize
        return {"scan backward": (there + scan_workspace(config, step),
                                  around.done + FLOAT32 * D * config.d_model)}


def in_whole_rows(projection: nn.Module, x: Tensor) -> Tensor:
    """``projection`` of x; on a GPU with zeros behind that put rows on 16 bytes. Else the product
    takes a kernel of half the speed, and what reads it reads number by number."""
    if x.is_cuda and isinstance(projection, nn.Linear) and is_linear(projection):
        weight, bias = projection.weight, projection.bias
        spare = -len(weight) % 8
        if spare:
            return biased(x, F.pad(weight, (0, 0, 0, spare)),
                          None if bias is None else F.pad(bias, (0, spare)))
    found: Tensor = projection(x)
    return found


def gates_in_one_kernel(step: Step) -> bool:
    """Whether the gates of heads come out of one kernel, which keeps what it reads alone."""
    return step.device == "cuda" and step.dtype in GATE_DTYPES


def has_kernel(config: ModelConfig, step: Step) -> bool:
    """Whether the scan of a step runs in SSD's own kernels."""
    return (step.device == "cuda" and step.dtype == torch.bfloat16
            and config.ssd_head_dim == ssd_kernels.CHANNELS
            and config.ssd_d_state in ssd_kernels.STATES)


def scan_workspace(config: ModelConfig, step: Step) -> int:
    """Bytes that the scan's backward pass takes above what is kept.

    Of the kernels: gradients of states, with what chunks add to them where no block walks from one
    to the next, and dB and dC of each block. Of the chunked form the intermediate tensors of a
    second forward: numbers a channel, a pair of steps in a chunk and a state of a chunk, fitted to
    the profiler's count at nine sizes; whole steps come out within 8 %.
    """
    D, N, heads = config.d_inner, config.ssd_d_state, config.d_inner // config.ssd_head_dim
    chunk = ssd_kernels.CHUNK if has_kernel(config, step) else chunk_length(CHUNK, step.length)
    chunks = step.batch * -(-step.length // chunk)
    if has_kernel(config, step):
        parts = heads // ssd_kernels.heads_of_a_block(
            heads // config.ssd_groups, chunks * heads)
        added = 0 if ssd_kernels.walk(step.batch * heads, N)[1] else FLOAT32
        return N * (chunks * D * (added + step.itemsize)
                    + 2 * step.itemsize * step.tokens * parts)
    padded = chunks * chunk
    return FLOAT32 * (13 * padded * D // 2 + 6 * padded * heads * chunk + 4 * chunks * D * N)
