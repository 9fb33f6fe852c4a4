"""Mixers around the gated delta rule, Gated DeltaNet and Kimi Delta Attention, and their costs.

Symbols: H heads of K key channels and V value channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import DeltaSpec, GatedDeltaNetSpec, KimiDeltaSpec, Shape
from mambabyte.model import sequence
from mambabyte.model.families.mamba2 import gates_in_one_kernel
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
    largest_exponent,
    operator_against_definition,
    register,
    rms_norm,
    widened,
)
from mambabyte.ops import gated_delta_rule
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.delta import cuda as kernels
from mambabyte.ops.delta.chunked import CHUNK
from mambabyte.ops.ssd.decay import chunk_length
from mambabyte.ops.ssd.gates import gates

# Operations of the rule for each number of the state: decay, reading at the key (2), writing (2),
# reading at the query (2).
RULE_FORWARD_PER_STATE = 7
# Of o = S^T q: dS (2), dq (2); of the write: dk (2), dwrite (2); of the read at the key: dS (2),
# dk (2); of the decay: dS (1), da (2).
RULE_BACKWARD_PER_STATE = 15
NORM_EPS = 1e-5
KEY_EPS = 1e-6  # added to the square of a key's length


class DeltaState(NamedTuple):
    """What a layer remembers: O(1) in the bytes seen."""

    q_conv_state: Tensor  # (B, d_conv - 1, H K) last inputs of the convolutions
    k_conv_state: Tensor  # (B, d_conv - 1, H K)
    v_conv_state: Tensor  # (B, d_conv - 1, H V)
    memory: Tensor  # (B, H, K, V)


def convolved(
    x: Tensor, weight: Tensor, tail: Tensor | None, ages: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal convolution of x (B, L, D) with weight (D, K) behind ``tail``, and the
    tail to go on with."""
    return causal_conv(
        x, weight, None, sequence.tail_before(x, weight.shape[1], tail), silu=True,
        ages=ages)


class HeadNorm(nn.Module):
    """RMS norm of each head's channels, with the same weights for all heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, NORM_EPS) * self.weight.to(x.dtype)


class DeltaMixer(Mixer, DeltaSpec):
    """Queries, keys and values -> causal depthwise convolutions -> SiLU; queries and keys at unit
    length -> gated delta rule -> RMS norm of each head, gated -> o_proj.

    A subclass makes the decays and the output's gate.
    """

    has_decays = True
    state_name = "delta"
    state_kind = DeltaState
    splits_length = True
    readers = 6

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.heads, keys, values = self.widths(config)
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.q_conv1d = nn.Conv1d(keys, keys, config.d_conv, groups=keys, bias=False)
        self.k_conv1d = nn.Conv1d(keys, keys, config.d_conv, groups=keys, bias=False)
        self.v_conv1d = nn.Conv1d(values, values, config.d_conv, groups=values, bias=False)
        self.b_proj = nn.Linear(d, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.make_gates(config)
        self.o_norm = HeadNorm(values // self.heads)
        self.o_proj = nn.Linear(values, d, bias=False)
        if config.zero_init_out:
            nn.init.zeros_(self.o_proj.weight)

    def make_gates(self, config: ModelConfig) -> None:
        """Set up the parameters of ``log_decay`` and ``output_gate``."""
        raise NotImplementedError(f"{type(self).__name__} has no gates")

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, H) or (B, L, H, K), float32, not above 0."""
        raise NotImplementedError(f"{type(self).__name__} has no decay")

    def output_gate(self, x: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, H V)."""
        raise NotImplementedError(f"{type(self).__name__} has no output gate")

    def rule_inputs(
        self, x: Tensor, state: DeltaState | None, ages: Tensor | None = None
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
        """What :func:`mambabyte.ops.gated_delta_rule` reads of x (B, L, d_model), by name; and the
        next states of the convolutions."""
        before = (None, None, None) if state is None else state[:3]
        (q, q_tail), (k, k_tail), (v, v_tail) = (
            convolved(projection(x), conv.weight.squeeze(1), tail, ages)
            for projection, conv, tail in zip(
                (self.q_proj, self.k_proj, self.v_proj),
                (self.q_conv1d, self.k_conv1d, self.v_conv1d), before, strict=True))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        keys = k.shape[3]
        # x / |x| is the RMS norm over sqrt(keys); a query is divided by sqrt(keys) once more.
        q = rms_norm(q, KEY_EPS / keys) / keys
        k = rms_norm(k, KEY_EPS / keys) / math.sqrt(keys)
        inputs = {"q": q, "k": k, "v": v, "log_decay": self.log_decay(x),
                  "beta": torch.sigmoid(widened(self.b_proj(x)))}
        return inputs, (q_tail, k_tail, v_tail)

    def forward(
        self, x: Tensor, state: DeltaState | None, ages: Tensor | None = None
    ) -> tuple[Tensor, DeltaState]:
        inputs, tails = self.rule_inputs(x, state, ages)
        memory = None if state is None else state.memory
        piece = sequence.current()
        if piece is not None:
            _, end = gated_delta_rule(**inputs, ages=ages)
            # What becomes of a state where nothing is written: of each of its key channels.
            one = torch.eye(end.shape[2], dtype=end.dtype, device=end.device)
            nothing = torch.zeros_like(inputs["k"])
            _, decay = gated_delta_rule(
                **inputs | {"v": nothing}, initial_state=one.repeat(*end.shape[:2], 1, 1),
                ages=ages)
            memory = piece.arriving(decay, end, memory, matrices=True)
        o, memory = gated_delta_rule(**inputs, initial_state=memory, ages=ages)
        y = self.o_norm(o).flatten(2) * self.output_gate(x)  # (B, L, H V)
        return self.o_proj(y), DeltaState(*tails, memory)

    @torch.no_grad()
    def exponent(self, x: Tensor, state: DeltaState | None, chunk: int) -> float:
        return largest_exponent(self.log_decay(x), chunk)

    def log_decays(self, x: Tensor) -> Tensor:
        return self.log_decay(x)

    def against_definition(self, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        return operator_against_definition(gated_delta_rule, self.rule_inputs(x, None)[0])

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        heads, keys, values = cls.widths(config)
        taps = config.d_conv - 1
        return {"q_conv_state": (taps, keys), "k_conv_state": (taps, keys),
                "v_conv_state": (taps, values),
                "memory": (heads, keys // heads, values // heads)}

    @classmethod
    def gates(cls, config: ModelConfig) -> int:
        """Decays a byte."""
        raise NotImplementedError(f"{cls.__name__} does not say its decays")

    @classmethod
    def gate_width(cls, config: ModelConfig) -> int:
        """Numbers a byte that the gates of the output, and projections of low rank, keep."""
        raise NotImplementedError(f"{cls.__name__} does not say what its gates keep")

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> list[Operations]:
        heads, keys, values = cls.widths(config)
        state = keys * values // heads
        products = sum(2 * math.prod(shape) for name, shape in cls.shapes(config).items()
                       if len(shape) == 2)
        # Beside the state: what is missing, times beta; of the gates bias, softplus and rate.
        gates = cls.gates(config)
        forward = RULE_FORWARD_PER_STATE * state + 2 * values + 3 * gates
        backward = RULE_BACKWARD_PER_STATE * state + 2 * (2 * values + 3 * gates)
        return [
            Operations(f"{cls.about} projections", products),
            Operations(f"{cls.about} convolutions", 2 * (2 * keys + values) * config.d_conv,
                       kind=CONVOLUTION),
            Operations(f"{cls.about} rule", forward, 3 * gates + heads, FORMULA,
                       backward / forward),
        ]

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        # SiLU behind the convolutions (2 and 1), the norms of q, k and o, the gate.
        heads, keys, values = cls.widths(config)
        return 2 * (2 * keys + values) + 4 * 2 * keys + 7 * values, (
            2 * keys + 2 * values + 3 * heads)

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        ours = has_kernel(cls, config, Step(1, length, torch.bfloat16, device))
        return f"{cls.about}, {'kernels for bf16' if ours else 'torch'}"

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        heads, keys, values = cls.widths(config)
        tokens, itemsize, half = step.tokens, step.itemsize, step.itemsize != FLOAT32
        one_kernel = convolves_in_one_kernel(config, step.device, itemsize)
        wide = 2 * keys + values
        normed = FLOAT32 if step.device == "cpu" else itemsize  # a CPU norms in float32
        if one_kernel:
            terms = [("conv", "projected q, k and v", tokens * wide, itemsize)]
        else:
            padded = step.batch * (step.length + config.d_conv - 1)
            terms = [("conv", "input, padded", padded * wide, itemsize),
                     ("conv", "output", tokens * wide, itemsize)]
        terms += [
            ("norm", "q and k before their norm", 2 * tokens * keys, normed),
            ("norm", "1/rms of q and k", 2 * tokens * heads, FLOAT32),
            ("rule input", "q, k and v", tokens * wide, itemsize),
            ("rule input", "beta", tokens * heads, FLOAT32),
            ("rule input", "log-decays", tokens * cls.gates(config), FLOAT32),
            ("rule input", "exp(A_log) and rates", 2 * heads, FLOAT32),
            ("norm", "output of the rule", tokens * values, normed),
            ("norm", "1/rms of the output", tokens * heads, FLOAT32),
            ("gate", "normalised output, before and after its weights",
             2 * tokens * values, itemsize),
            ("gate", "gate, and what it is made of", tokens * cls.gate_width(config), itemsize),
            ("projection", "input of o_proj", tokens * values, itemsize),
        ]
        if cls.gates(config) == heads and gates_in_one_kernel(step):
            terms.append(("rule input", "gates", tokens * heads, itemsize))
        else:
            terms.append(("rule input", "softplus input and output",
                          2 * tokens * cls.gates(config), FLOAT32))
        if half:
            shapes = cls.shapes(config)
            cast = sum(math.prod(shape) for name, shape in shapes.items()
                       if len(shape) == 2 or name == "o_norm.weight"
                       or (len(shape) == 3 and not one_kernel))
            terms.append(("casts", "weights, cast", cast, itemsize))
        if has_kernel(cls, config, step):
            chunks = step.batch * -(-step.length // kernels.CHUNK) * heads
            tiles, decays = (7, 1) if cls.gates(config) == keys else (4, 3)
            terms += [("rule", "matrices and states of chunks",
                       tiles * chunks * kernels.CHUNK * kernels.CHANNELS, itemsize),
                      ("rule", "decays of chunks", decays * chunks * kernels.CHANNELS, FLOAT32)]
        return [Kept(*term) for term in terms]

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        _, _, values = cls.widths(config)
        tokens, itemsize = step.tokens, step.itemsize
        wide = FLOAT32 if step.device == "cpu" else itemsize
        # Gone: what is behind the rule. There: the gradients of its output and of the gate.
        behind = tokens * (values * (3 * itemsize + wide) + cls.gate_width(config) * itemsize)
        there = around.held - around.mlp - behind + around.residual + 2 * tokens * values * itemsize
        done = around.done + FLOAT32 * values * config.d_model
        return {"rule backward": (there + rule_workspace(cls, config, step), done)}


def has_kernel(mixer: type[DeltaMixer], config: ModelConfig, step: Step) -> bool:
    """Whether the rule of a step runs in its own kernels."""
    heads, keys, values = mixer.widths(config)
    return (step.device == "cuda" and step.dtype == torch.bfloat16
            and keys == values == heads * kernels.CHANNELS)


def rule_workspace(mixer: type[DeltaMixer], config: ModelConfig, step: Step) -> int:
    """Bytes that the backward pass of the rule takes above what is kept.

    Of the kernels they are gradients: of the states between chunks, and of the inputs. Of the
    chunked form they are the intermediate tensors of a second forward: numbers a key channel (where
    each has a gate, in every round of the halving), a value channel, a pair of steps in a chunk and
    a state of a chunk, fitted to the profiler's count at eight sizes; whole steps come out within
    8 %.
    """
    heads, keys, values = mixer.widths(config)
    if has_kernel(mixer, config, step):
        chunks = step.batch * -(-step.length // kernels.CHUNK)
        return (step.itemsize * (chunks * values * kernels.CHANNELS
                                 + step.tokens * (2 * keys + values))
                + FLOAT32 * step.tokens * (mixer.gates(config) + heads))
    chunk = chunk_length(CHUNK, step.length)
    chunks = step.batch * -(-step.length // chunk)
    padded = chunks * chunk
    a_key, a_pair = (27, 4) if mixer.gates(config) == keys else (6.5, 7.5)
    return round(FLOAT32 * (
        padded * (a_key * keys + 9 * values + a_pair * heads * chunk)
        + 3 * chunks * keys * values // heads))


@register("D")
class GatedDeltaNetMixer(DeltaMixer, GatedDeltaNetSpec):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464, section 3.4): one decay a head, and SiLU
    for the output's gate."""

    def make_gates(self, config: ModelConfig) -> None:
        self.a_proj = nn.Linear(config.d_model, self.heads, bias=False)
        self.dt_bias = nn.Parameter(first_dt_bias(config, self.heads))
        self.g_proj = nn.Linear(config.d_model, self.widths(config)[2], bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        rate = -torch.exp(widened(self.A_log))
        return gates(self.a_proj(x), rate, widened(self.dt_bias), softplus=True)[1]

    def output_gate(self, x: Tensor) -> Tensor:
        return F.silu(self.g_proj(x))

    @classmethod
    def gates(cls, config: ModelConfig) -> int:
        return cls.widths(config)[0]

    @classmethod
    def gate_width(cls, config: ModelConfig) -> int:
        return 2 * cls.widths(config)[2]  # SiLU keeps its input


@register("K")
class KimiDeltaMixer(DeltaMixer, KimiDeltaSpec):
    """Kimi Delta Attention (arXiv:2510.26692, section 4): a decay for each key channel, of low
    rank as the output's gate is, which is a sigmoid."""

    def make_gates(self, config: ModelConfig) -> None:
        _, keys, values = self.widths(config)
        d, rank = config.d_model, values // self.heads
        self.f_proj = nn.Sequential(
            nn.Linear(d, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.dt_bias = nn.Parameter(first_dt_bias(config, keys))
        self.g_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, values))

    def log_decay(self, x: Tensor) -> Tensor:
        dt = F.softplus(widened(self.f_proj(x)) + widened(self.dt_bias))
        return (-torch.exp(widened(self.A_log))[:, None]
                * dt.unflatten(-1, (self.heads, -1)))

    def output_gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.g_proj(x))

    @classmethod
    def gates(cls, config: ModelConfig) -> int:
        return cls.widths(config)[1]

    @classmethod
    def gate_width(cls, config: ModelConfig) -> int:
        heads, _, values = cls.widths(config)
        return values + 2 * (values // heads)
