"""The mixer of Mamba-3, one input and one output a head, and its costs in closed form.

Symbols: D = d_inner = H P, H heads of P channels; N states, of which S pairs turn; G groups of
heads, each with its own B and C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import Mamba3Spec, Shape
from mambabyte.model import sequence
from mambabyte.model.families.delta import HeadNorm
from mambabyte.model.families.mamba2 import (
    SCAN_BACKWARD_PER_STATE,
    SCAN_FORWARD_PER_STATE,
    gates_in_one_kernel,
    has_kernel,
    in_whole_rows,
)
from mambabyte.model.families.shared import first_dt_bias
from mambabyte.model.mixer import (
    FLOAT32,
    FORMULA,
    Around,
    Kept,
    Mixer,
    Operations,
    Step,
    is_plain,
    largest_exponent,
    operator_against_definition,
    register,
    widened,
)
from mambabyte.ops import Mamba3State, mamba3_scan
from mambabyte.ops.ssd.chunked import CHUNK
from mambabyte.ops.ssd.cuda import CHUNK as KERNEL_CHUNK
from mambabyte.ops.ssd.decay import chunk_length
from mambabyte.ops.ssd.mamba3.inputs import mamba3_inputs
from mambabyte.ops.ssd.mamba3.operator import per_head
from mambabyte.ops.ssd.recurrent import angles, less_than_a_turn


@register("R")
class Mamba3Mixer(Mixer, Mamba3Spec):
    """Mamba-3 (Lahoti et al. 2026, arXiv:2603.15569, section 3), the public module's without norm
    before out_proj; its sign of angles, the opposite of the paper's.

    in_proj -> (z, x, B, C, dt, decay, mix, angle); B and C -> RMS norm -> bias a head -> scan with
    complex decays and both ends of each step -> gate silu(z) -> out_proj. No convolution.
    """

    has_decays = True
    state_name = "ssm"
    state_kind = Mamba3State
    splits_length = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.parts, self.groups = self.widths(config), config.ssd_groups
        self.heads = config.d_inner // config.ssd_head_dim
        self.in_proj = nn.Linear(config.d_model, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(first_dt_bias(config, self.heads))
        self.B_bias = nn.Parameter(torch.ones(self.heads, 1, config.ssd_d_state))
        self.C_bias = nn.Parameter(torch.ones(self.heads, 1, config.ssd_d_state))
        self.B_norm = HeadNorm(config.ssd_d_state)
        self.C_norm = HeadNorm(config.ssd_d_state)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def scan_inputs(self, x: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What :func:`mambabyte.ops.mamba3_scan` reads of x (B, L, d_model), by name; and z (B, L,
        D)."""
        projected = in_whole_rows(self.in_proj, x)
        inner, _, *rest = self.parts
        z, u, tail, _ = projected.split(
            [inner, inner, sum(rest), projected.shape[-1] - sum(self.parts)], dim=-1)
        found = mamba3_inputs(
            tail, widened(self.dt_bias), widened(self.B_norm.weight),
            widened(self.C_norm.weight), self.groups)._asdict()
        parts = tail.split(rest, dim=-1)
        for name, norm, part in (("B", self.B_norm, parts[0]), ("C", self.C_norm, parts[1])):
            if not is_plain(norm, HeadNorm):  # replaced, or with hooks: it must be called
                found[name] = norm(part.unflatten(-1, (self.groups, -1)))
        return {
            "x": u.unflatten(-1, (self.heads, -1)), **found,
            "B_bias": widened(self.B_bias).squeeze(1), "C_bias": widened(self.C_bias).squeeze(1),
        }, z

    def forward(
        self, x: Tensor, state: Mamba3State | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        inputs, z = self.scan_inputs(x)
        piece = sequence.current()
        if piece is not None:
            state = self.entering(piece, inputs, state, ages)
        y, state = mamba3_scan(**inputs, D=widened(self.D), initial_state=state, ages=ages)
        return self.out_proj(y.flatten(2) * F.silu(z)), state

    def entering(
        self, piece: sequence.Piece, inputs: dict[str, Any], state: Mamba3State | None,
        ages: Tensor | None,
    ) -> Mamba3State:
        """The state before the own stretch, where the one before the sequence is ``state``."""
        B, u = inputs["B"], inputs["x"]
        k = per_head(widened(B[:, -1:]), inputs["B_bias"], self.heads)
        sizes = [self.heads * k.shape[3], self.heads * u.shape[3]]
        last = torch.cat([k.flatten(2), widened(u[:, -1:]).flatten(2)], 2)
        tail = None if state is None else torch.cat(
            [state.k_state.flatten(1), state.v_state.flatten(1)], 1)[:, None]
        tail = sequence.tail_before(last, 2, tail)
        assert tail is not None
        k_state, v_state = (t.unflatten(1, (self.heads, -1))
                            for t in tail.squeeze(1).split(sizes, 1))
        nothing = k.new_zeros(*v_state.shape, k.shape[3])
        _, end = mamba3_scan(
            **inputs, initial_state=Mamba3State(k_state, v_state, nothing), ages=ages)
        # What the stretch makes of a state: of each pair (N / 2, 2) a turn, decayed.
        angle = less_than_a_turn(angles(inputs["theta"], inputs["dt"]).sum(1), k.dtype)
        angle = F.pad(angle, (0, k.shape[3] // 2 - angle.shape[2]))
        cos, sin = torch.cos(angle), torch.sin(angle)
        turn = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))
        decay = torch.exp(inputs["log_decay"].sum(1))[..., None, None, None] * turn
        h = piece.arriving(
            sequence.unbroken(decay, ages), _by_pair(end),
            None if state is None else _by_pair(state), matrices=True)
        return Mamba3State(k_state, v_state, h.flatten(2, 3).mT)

    @torch.no_grad()
    def exponent(self, x: Tensor, state: Mamba3State | None, chunk: int) -> float:
        return largest_exponent(self.scan_inputs(x)[0]["log_decay"], chunk)

    def log_decays(self, x: Tensor) -> Tensor:
        found: Tensor = self.scan_inputs(x)[0]["log_decay"]
        return found

    def against_definition(self, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        def scan(**inputs: Any) -> tuple[Tensor, Tensor]:
            y, state = mamba3_scan(**inputs)
            return y, state.ssm_state

        return operator_against_definition(scan, self.scan_inputs(x)[0])

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        head, N = config.ssd_head_dim, config.ssd_d_state
        heads = config.d_inner // head
        return {"k_state": (heads, N), "v_state": (heads, head), "ssm_state": (heads, head, N)}

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> list[Operations]:
        d, D, N, S = config.d_model, config.d_inner, config.ssd_d_state, cls.pairs(config)
        heads = D // config.ssd_head_dim
        # Beside the state: the step's own part and the skip. Of each head B and C with bias (2 N),
        # turned (12 S) and decayed (N), their product (2 N), angles (3 S), gates.
        around = 2 * D + heads * (5 * N + 15 * S + 10)
        forward = SCAN_FORWARD_PER_STATE * D * N + around
        backward = SCAN_BACKWARD_PER_STATE * D * N + 2 * around
        return [
            Operations("Mamba-3 in_proj", 2 * d * sum(cls.widths(config))),
            # Two softplus, a sigmoid and a decay a head, sine and cosine of its pairs, one tanh.
            Operations("Mamba-3 scan", forward, heads * (7 + 2 * S) + S, FORMULA,
                       backward / forward),
            Operations("Mamba-3 out_proj", 2 * D * d),
        ]

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        # The norms of B and C; SiLU of the gate (2 and 1), the gate.
        D, groups = config.d_inner, config.ssd_groups
        return 4 * 2 * groups * config.ssd_d_state + 3 * D, D + 2 * groups

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        ours = has_kernel(config, Step(1, length, torch.bfloat16, device))
        return f"{cls.about}, {'kernels for bf16' if ours else 'torch'}"

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        d, D, N, S = config.d_model, config.d_inner, config.ssd_d_state, cls.pairs(config)
        heads, shared = D // config.ssd_head_dim, 2 * config.ssd_groups * N
        tokens, itemsize, half = step.tokens, step.itemsize, step.itemsize != FLOAT32
        joined = gates_in_one_kernel(step)  # the norms of B and C too
        terms = [
            ("projection", "output of in_proj", tokens * sum(cls.widths(config)), itemsize),
            ("scan input", "B and C", tokens * shared, itemsize),
            ("scan input", "step sizes, log-decays and mixes", 3 * tokens * heads, FLOAT32),
            ("scan input", "angles a unit of time", tokens * S, FLOAT32),
            ("gate", "y and silu(z)", 2 * tokens * D, itemsize),
            ("projection", "input of out_proj", tokens * D, itemsize),
        ]
        if not joined:
            terms += [("norm", "1/rms of B and C", 2 * tokens * config.ssd_groups, FLOAT32),
                      ("norm", "B and C, normalised", tokens * shared, itemsize),
                      ("scan input", "what gates are made of", 3 * tokens * heads, FLOAT32),
                      ("scan input", "tanh of angles", tokens * S, FLOAT32)]
        if half:
            weights = (sum(cls.widths(config)) + D) * d + (0 if joined else 2 * N)
            terms.append(("casts", "weights, cast", weights, itemsize))
            if not joined:
                terms.append(
                    ("scan input", "rates before their softplus", tokens * heads, FLOAT32))
            if step.device == "cpu":  # it norms in float32
                terms.append(("norm", "B and C before their norm", tokens * shared, FLOAT32))
        if has_kernel(config, step):
            chunks = step.batch * -(-step.length // KERNEL_CHUNK)
            terms.append(("scan", "states between chunks", chunks * D * N, itemsize))
        return [Kept(*term) for term in terms]

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        wide = step.tokens * config.d_inner * step.itemsize
        # Gone: what is behind the scan, y and silu(z) and their product. There: the gradients of y
        # and z.
        there = around.held - around.mlp - 3 * wide + around.residual + 2 * wide
        return {"scan backward": (there + scan_workspace(config, step),
                                  around.done + FLOAT32 * config.d_inner * config.d_model)}


def _by_pair(state: Mamba3State) -> Tensor:
    """(B, H, P, N) -> (B, H, N / 2, 2, P)."""
    return state.ssm_state.mT.unflatten(2, (-1, 2))


def scan_workspace(config: ModelConfig, step: Step) -> int:
    """Bytes that the scan's backward pass takes above what is kept.

    Of the kernels: B and C of each head, turned, and their gradients, those of x and of states
    between chunks, each step's angles and their gradients, and six numbers of gates. Of the
    chunked form the intermediate tensors of a second forward: numbers a channel, a state of a head,
    a pair of steps in a chunk and a state of a chunk, fitted to the profiler's count at 13 sizes on
    a CPU; whole steps come out within 8 %.
    """
    D, N, heads = config.d_inner, config.ssd_d_state, config.d_inner // config.ssd_head_dim
    kernels = has_kernel(config, step)
    chunk = KERNEL_CHUNK if kernels else chunk_length(CHUNK, step.length)
    chunks = step.batch * -(-step.length // chunk)
    if kernels:
        of_heads = 4 * step.itemsize * N + FLOAT32 * (2 * Mamba3Spec.pairs(config) + 6)
        return step.tokens * (heads * of_heads + step.itemsize * D) + chunks * D * N * step.itemsize
    a_step = 7.2 * D + heads * (8.4 * N + 5.5 * chunk)
    return round(FLOAT32 * (chunks * chunk * a_step + 2.9 * chunks * D * N))
