"""The selective state-space mixer of Mamba, and its costs in closed form.

Symbols: B batch, L length, d = d_model, D = d_inner, N = d_state, R = dt_rank, K = d_conv.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import MambaSpec, Shape
from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError
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
    is_plain,
    linear,
    operator_against_definition,
    register,
    widened,
)
from mambabyte.ops import default_form, selective_scan
from mambabyte.ops.conv.dispatch import causal_conv
from mambabyte.ops.mamba.fused import fused_mixer
from mambabyte.ops.mamba.split import split_mixer
from mambabyte.ops.mamba.step import MAX_TAPS, mamba_step
from mambabyte.ops.scan.memory import PER_CHANNEL, partial_sums, scan_terms, scan_workspace
from mambabyte.ops.scan.operator import MAX_STATES, fused_available

# Operations of the scan, a byte: see analysis.theory.flops for what they are.
SCAN_FORWARD_PER_STATE = 6
SCAN_BACKWARD_PER_STATE = 14
SCAN_EXP_PER_STATE = 1
SCAN_FORWARD_PER_CHANNEL = 8
SCAN_EXP_PER_CHANNEL = 3


class MambaState(NamedTuple):
    """What an SSM layer remembers: O(1) in the bytes seen."""

    conv_state: Tensor  # (B, K-1, D) last inputs of the convolution
    ssm_state: Tensor  # (B, D, N)


@register("M")
class MambaMixer(Mixer, MambaSpec):
    """Selective SSM mixer (Gu & Dao 2023, arXiv:2312.00752, section 3.4).

    in_proj -> (x, z); x -> causal depthwise convolution -> SiLU -> selective scan, gated by
    silu(z) -> out_proj. Weight names are those of the public Mamba checkpoints.
    """

    has_decays = True
    state_name = "ssm"
    state_kind = MambaState
    wide_biases = ("dt_proj",)
    splits_length = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d_model, d_inner, d_state = config.d_model, config.d_inner, config.d_state
        self.dt_rank = 0 if config.dt_rank == "full" else config.dt_rank_value
        self.form, self.chunk, self.d_conv = config.scan_form, config.scan_chunk, config.d_conv

        self.in_proj = linear(config, d_model, 2 * d_inner, config.ssm_bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank_value, d_inner)
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))  # A = -(1..N), S4D-real
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = linear(config, d_inner, d_model, config.ssm_bias)

        if config.dt_init == "mamba":
            bound = config.dt_rank_value**-0.5
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
            with torch.no_grad():
                self.dt_proj.bias.copy_(first_dt_bias(config, d_inner))
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def scan_inputs(
        self, x: Tensor, conv_state: Tensor | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan reads of x (B, L, d_model): u (B, L, D), delta (B, L, D) before bias and
        softplus, B and C (B, L, N), z (B, L, D); and the convolution's next state."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # each (B, L, D)
        if not self._has_plain_parts():
            return self._inputs_by_modules(u, z, conv_state, ages)
        u, conv_state = causal_conv(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias,
            sequence.tail_before(u, self.d_conv, conv_state), silu=True,
            ages=ages)
        x_proj, dt_proj = self._small_projections()
        rank, d_state = dt_proj.shape[1] if self.dt_rank else 0, self.A_log.shape[1]
        low_rank, B, C = F.linear(u, x_proj).split([rank, d_state, d_state], dim=-1)
        # The bias is added inside the scan, in float32: in bf16 it would round the step size.
        delta = F.linear(low_rank if rank else u, dt_proj)
        return u, delta, B, C, z, conv_state

    def _inputs_by_modules(
        self, u: Tensor, z: Tensor, conv_state: Tensor | None, ages: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """:meth:`scan_inputs` behind in_proj by calls of the modules, whatever took their place."""
        taps, length = self.d_conv, u.shape[1]
        if ages is not None and not is_plain(self.conv1d, nn.Conv1d):
            raise UserError("conv1d has been replaced or hooked, and by itself it reads across the "
                            "starts of documents: give each document a row of its own")
        conv_state = sequence.tail_before(u, taps, conv_state)
        if ages is not None:
            u, tail = causal_conv(
                u, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state, silu=True,
                ages=ages)
        else:
            if conv_state is None:
                conv_state = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
            padded = torch.cat([conv_state.to(u.dtype), u], dim=1)  # (B, K-1+L, D)
            u = F.silu(self.conv1d(padded.transpose(1, 2)).transpose(1, 2))
            tail = padded[:, length:].clone()
        d_state = self.A_log.shape[1]
        low_rank, B, C = self.x_proj(u).split([self.dt_rank, d_state, d_state], dim=-1)
        delta = self.dt_proj(low_rank if self.dt_rank else u)  # with its bias: see dt_bias
        return u, delta, B, C, z, tail

    def _has_plain_parts(self) -> bool:
        """Whether the convolution and both small projections are what their weights say, so that
        an operator may take those: no adapter, quantised module, hook or parametrization."""
        return (is_plain(self.conv1d, nn.Conv1d) and is_plain(self.x_proj, nn.Linear)
                and is_plain(self.dt_proj, nn.Linear) and self.x_proj.bias is None)

    @property
    def dt_bias(self) -> Tensor | None:
        """What the scan adds to the delta of :meth:`scan_inputs` (D,); None where it is in it."""
        return self.dt_proj.bias if self._has_plain_parts() else None

    def step_size(self, delta: Tensor) -> Tensor:
        """softplus(delta + bias) (B, L, D) of the delta that :meth:`scan_inputs` returns."""
        bias = self.dt_bias
        return F.softplus(delta if bias is None else delta + bias)

    def _small_projections(self) -> tuple[Tensor, Tensor]:
        """Weights of x_proj (R + 2N, D) and dt_proj (D, R), R on a GPU a multiple of 8."""
        x_proj, dt_proj, rank = self.x_proj.weight, self.dt_proj.weight, self.dt_rank
        if x_proj.is_cuda and rank % 8:
            # Zeros between delta's rows and those of B and C put all three on 16 bytes. Else the
            # products take kernels of half the speed, and the scan copies B and C.
            spare = -rank % 8
            low, rest = x_proj.split([rank, len(x_proj) - rank])  # its backward is one launch
            x_proj = torch.cat([low, low.new_zeros(spare, low.shape[1]), rest])
            dt_proj = F.pad(dt_proj, (0, spare))
        return x_proj, dt_proj

    def forward(
        self, x: Tensor, state: MambaState | None, ages: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        piece = sequence.current()
        if self._is_one_operator(x):
            if state is None:
                if x.is_cuda and (piece is None or ages is None):
                    return self.from_start(x, ages)
            elif (self.dt_rank and piece is None and ages is None and x.shape[1] == 1
                  and not torch.is_grad_enabled()):
                return self.step(x, state)
        # (A subclass whose scan_inputs knows no documents does without where there are none.)
        u, delta, B, C, z, conv_state = self.scan_inputs(
            x, None if state is None else state.conv_state, *() if ages is None else (ages,))
        bias, A = self.dt_bias, -torch.exp(widened(self.A_log))
        options: dict[str, Any] = {
            "delta_bias": None if bias is None else widened(bias), "delta_softplus": True,
            "form": self.form, "chunk_size": self.chunk}
        ssm_state = None if state is None else state.ssm_state
        if piece is not None:
            _, end = selective_scan(u, delta, A, B, C, ages=ages, **options)
            steps = self.step_size(delta.to(end.dtype)).sum(1)  # (B, D)
            decay = sequence.unbroken(torch.exp(steps[..., None] * A), ages)
            ssm_state = piece.arriving(decay, end, ssm_state)
        y, ssm_state = selective_scan(
            u, delta, A, B, C, widened(self.D), z, initial_state=ssm_state,
            ages=ages, **options)
        return self.out_proj(y), MambaState(conv_state, ssm_state)

    def from_start(self, x: Tensor, ages: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """``forward`` without a state, as one operator between the large projections. On a GPU."""
        assert self.conv1d.bias is not None
        x_proj, dt_proj = self._small_projections()
        low_rank: Tensor | None = dt_proj
        if not self.dt_rank:  # both read the same: one product, whose backward adds up nothing
            x_proj, low_rank = torch.cat([dt_proj, x_proj]), None
        piece = sequence.current()
        operator = fused_mixer if piece is None else functools.partial(split_mixer, piece)
        y, conv_state, ssm_state = operator(
            self.in_proj(x), self.conv1d.weight.squeeze(1), self.conv1d.bias,
            x_proj, low_rank, self.dt_proj.bias.float(),
            -torch.exp(self.A_log.float()), self.D.float(), *() if ages is None else (ages,),
        )
        return self.out_proj(y), MambaState(conv_state, ssm_state)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """``forward`` for one byte, x (B, 1, d_model), as one operator. Inference only."""
        u, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)  # each (B, D)
        y, conv_state, ssm_state = mamba_step(
            u, z, state.conv_state, state.ssm_state,
            self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight,
            self.dt_proj.weight, self.dt_proj.bias.float(), -torch.exp(self.A_log.float()),
            self.D.float(),
        )
        return self.out_proj(y)[:, None], MambaState(conv_state, ssm_state)

    def _is_one_operator(self, x: Tensor) -> bool:
        """Whether the operators for a step and for a sequence do what this layer is set to: the
        convolution, both small products and the fused scan, none of them changed by a subclass."""
        if self.form not in ("auto", "fused"):
            return False
        if x.dtype == torch.float64 or not 2 <= self.d_conv <= MAX_TAPS:
            return False
        if type(self).scan_inputs is not MambaMixer.scan_inputs or not self._has_plain_parts():
            return False
        return self.A_log.shape[1] <= MAX_STATES and fused_available(x.device)[0]

    def as_configured(self, config: ModelConfig) -> bool:
        return (self.form, self.chunk) == (config.scan_form, config.scan_chunk)

    @torch.no_grad()
    def exponent(self, x: Tensor, state: MambaState | None, chunk: int) -> float:
        _, delta, *_ = self.scan_inputs(x, None if state is None else state.conv_state)
        dt = self.step_size(delta.float())
        steps = min(chunk, dt.shape[1])
        chunks = F.pad(dt, (0, 0, 0, -dt.shape[1] % steps)).unflatten(1, (-1, steps))
        fastest = self.A_log.float().exp().amax(-1)  # (D,)
        return float((chunks.sum(2) * fastest).max())

    def log_decays(self, x: Tensor) -> Tensor:
        """Of every state of every channel, (B, L, D, N)."""
        _, delta, *_ = self.scan_inputs(x, None)
        return -self.step_size(delta.float())[..., None] * self.A_log.float().exp()

    def against_definition(self, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        u, delta, B, C, _, _ = self.scan_inputs(x, None)
        inputs = {"u": u, "delta": self.step_size(delta), "A": -self.A_log.exp(), "B": B, "C": C}
        return operator_against_definition(
            selective_scan, inputs, form=self.form, chunk_size=self.chunk)

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        return {"conv_state": (config.d_conv - 1, config.d_inner),
                "ssm_state": (config.d_inner, config.d_state)}

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> list[Operations]:
        d, D, N, R = config.d_model, config.d_inner, config.d_state, config.dt_rank_value
        low_rank = 0 if config.dt_rank == "full" else R
        scan = N * SCAN_FORWARD_PER_STATE + SCAN_FORWARD_PER_CHANNEL
        return [
            Operations("SSM in_proj", 2 * d * 2 * D),
            Operations("SSM convolution", 2 * D * config.d_conv, kind=CONVOLUTION),
            Operations("SSM x_proj", 2 * D * (low_rank + 2 * N)),
            Operations("SSM dt_proj", 2 * R * D),
            Operations("SSM scan", D * scan, D * (N * SCAN_EXP_PER_STATE + SCAN_EXP_PER_CHANNEL),
                       FORMULA, (N * SCAN_BACKWARD_PER_STATE + 2 * SCAN_FORWARD_PER_CHANNEL)
                       / scan),
            Operations("SSM out_proj", 2 * D * d),
        ]

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        return 2 * config.d_inner, config.d_inner  # SiLU behind the convolution

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        return f"scan, {resolve_form(config, device)}"

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        d, D, N = config.d_model, config.d_inner, config.d_state
        batch, length, dtype, device = step.batch, step.length, step.dtype, step.device
        tokens, itemsize = step.tokens, step.itemsize
        form = resolve_form(config, device)
        full_rank = config.dt_rank == "full"
        rank = low_rank_width(config, device)
        fused, half = form == "fused", itemsize != FLOAT32
        terms = [
            ("scan input", "u", tokens * D, itemsize if fused else FLOAT32),
            ("scan input", "exp(A_log) and A", 2 * D * N, FLOAT32),
            ("projection", "input of out_proj", tokens * D, itemsize),
        ]
        one_kernel = convolves_in_one_kernel(config, device, itemsize)
        if one_kernel:  # reads u where in_proj left it, writes (B, L, D)
            copies = 0 if fused or not half else 1
        else:
            terms += [
                ("conv", "input, padded", batch * (length + config.d_conv - 1) * D, itemsize),
                ("conv", "output", tokens * D, itemsize),
            ]
            # torch's convolution leaves (B, D, L) in memory and each linear map copies u; for a
            # batch of one the CPU leaves it in (L, D) order and the copies are u itself.
            copies = 2 if full_rank else 1
            if batch == 1 and device == "cpu":
                copies = 0 if fused or not half else 1
        terms.append(("projection", "u, copied for x_proj and dt_proj", copies * tokens * D,
                      itemsize))
        # z, B, C and the low-rank step are views: each keeps the whole output that it was cut from.
        if rank or fused or (form != "chunked" and not half):
            terms.append(("projection", "output of x_proj", tokens * (rank + 2 * N), itemsize))
        if fused or not half or one_kernel:
            terms.append(("gate", "output of in_proj (u and z)", tokens * 2 * D, itemsize))
        if fused:
            terms.append(("scan input", "delta", tokens * D, itemsize))
        else:
            terms += [
                ("scan input", "softplus input and output", 2 * tokens * D, FLOAT32),
                ("gate", "y and silu(z)", 2 * tokens * D, FLOAT32),
            ]
            if half:
                terms.append(("gate", "z in float32", tokens * D, FLOAT32))
            if half and form != "chunked":
                terms.append(("scan input", "B and C in float32", 2 * tokens * N, FLOAT32))
        small = D * (rank + 2 * N) + D * (rank or D)  # x_proj and dt_proj, as they are used
        if half:
            taps = 0 if one_kernel else D * config.d_conv
            terms.append(("casts", "weights, cast", 2 * D * d + taps + small + D * d, itemsize))
        elif device == "cuda" and fused and rank != config.dt_rank_value:
            terms.append(("casts", "small weights, padded or joined", small, itemsize))
        chunk = config.scan_chunk or FORMS[form].chunk
        for name, elements, size in scan_terms(
                form, batch, length, D, N, chunk, device, dtype):
            terms.append(("scan input" if name in PER_CHANNEL else "scan", name, elements, size))
        return [Kept(*term) for term in terms]

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        D, N, tokens, itemsize = config.d_inner, config.d_state, step.tokens, step.itemsize
        form, device = resolve_form(config, step.device), step.device
        held, mlp, residual = around.held, around.mlp, around.residual
        done = around.done + D * config.d_model * FLOAT32  # out_proj
        stream = tokens * D * itemsize
        chunk = config.scan_chunk or FORMS[form].chunk
        forward, backward = scan_workspace(form, step.batch, step.length, D, N, chunk)
        if form == "fused":
            # dy, du, ddelta, dz, dB, dC and the partial sums of the last two. On CUDA there is
            # room beside dB and dC for the gradient of the low-rank step, or of full rank for dx.
            columns = 2 * N
            if device == "cuda":
                columns += D if config.dt_rank == "full" else low_rank_width(config, device)
            sums = columns * tokens * itemsize + FLOAT32 * partial_sums(
                step.batch, step.length, D, N, device, step.dtype)
            # And u in (L, D) order where torch's convolution left it in (D, L) order.
            torchs = device == "cpu" and not convolves_in_one_kernel(config, device, itemsize)
            copied = stream if torchs and step.batch > 1 else 0
            if device == "cpu" and step.dtype == torch.float16:
                # The C code reads bf16 and float32: u, delta, z, dy, B and C are copied, and the
                # gradients of the first three are made in float32 and then cast.
                copied = FLOAT32 * tokens * (7 * D + 2 * N)
            return {"scan backward": (held - mlp + residual + 3 * stream + copied + sums, done)}
        # Not yet there, or gone: y, silu(z), the input of out_proj, and the MLP's.
        after = 2 * tokens * D * FLOAT32 + stream + mlp
        again = (residual, around.above) if around.checkpointing else (0, 0)
        grads = residual + 3 * tokens * D * FLOAT32  # dy, dz, the skip's du
        return {
            "scan forward": (held - after + 2 * stream + forward + again[0], again[1]),
            "gate backward": (held - mlp - stream + grads, done),
            "scan backward": (held - after + grads + backward, done),
        }


def resolve_form(config: ModelConfig, device: str) -> str:
    """The scan form that runs there; "auto" on CUDA means the fused kernels."""
    if config.scan_form != "auto":
        return config.scan_form
    return "fused" if device == "cuda" else default_form(device)


def low_rank_width(config: ModelConfig, device: str) -> int:
    """Columns of x_proj's output before B and C."""
    rank = 0 if config.dt_rank == "full" else config.dt_rank_value
    return rank + (-rank % 8 if device == "cuda" else 0)  # zeros that put B and C on 16 bytes
