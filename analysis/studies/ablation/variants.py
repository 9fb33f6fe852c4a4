"""What the second document's code does that a reader would not expect, one choice at a time.

The published script (github.com/openai/parameter-golf, commit 0c09a7b, record folder
2026-03-31_MambaSSMHybrid) was read for these; none of its text is here. Starting from a hybrid
with the choices of the Mamba paper, each variant changes one thing:

- the step size comes from a full d_inner x d_inner projection, not from a rank-R one;
- its bias and weight keep torch's default initialisation, so dt starts near softplus(0) = 0.69
  where the paper draws it from [0.001, 0.1]: 7 to 690 times larger, and the slowest state
  (A = -1) halves in ln 2 / 0.69 = 1.0 bytes instead of 7 to 690;
- output projections start at zero, so every block starts as the identity;
- the tied embedding starts at std 0.005 (0.02 in the first document) and trains at 0.05;
- matrices train by Muon at 0.04; A_log is two-dimensional, so the script's rule "2-D goes to
  Muon" catches it, although it holds decay rates and is no linear map;
- the convolution's taps are three-dimensional, so the script's two rules (2-D: Muon; below 2-D:
  Adam) both miss them: they are in no optimizer and stay as initialised;
- the weights of dt, B and C, the embedding, the taps and A_log are stored in bfloat16, because
  the script casts the model and then restores only its CastedLinear class and 1-D parameters;
- the state is allocated in the activations' dtype. ``published_state_dtypes`` shows what becomes
  of that.

U-Net skips, residual mixing with the embedding and per-channel block scales of the script are
not modelled here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.measure.exponents import ssm_layers, step_sizes
from analysis.studies.ablation import PUBLISHED_MATRIX_LR, Variant
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer, MambaState
from mambabyte.ops.scan.recurrent import scan_step
from mambabyte.train import EagerStep, NonFiniteError, optimise
from mambabyte.train.optim import MuonAdamW, roles
from mambabyte.train.step import Batches


class _RoundedStateMixer(MambaMixer):
    """A Mamba mixer whose state is rounded to bfloat16 after every step (a Python loop)."""

    def forward(
        self, x: Tensor, state: MambaState | None, ages: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        u, delta, B, C, z, conv_state = self.scan_inputs(
            x, None if state is None else state.conv_state, ages)
        A = -torch.exp(self.A_log.float())
        dt = nn.functional.softplus(delta.float() + self.dt_proj.bias.float())
        h = u.new_zeros(u.shape[0], *A.shape) if state is None else state.ssm_state
        ys = []
        for u_t, dt_t, B_t, C_t in zip(
            u.float().unbind(1), dt.unbind(1), B.float().unbind(1), C.float().unbind(1),
            strict=True,
        ):
            y_t, h = scan_step(u_t, dt_t, A, B_t, C_t, h)
            h = h.bfloat16().float()
            ys.append(y_t)
        y = torch.stack(ys, 1) + self.D.float() * u
        return self.out_proj((y * nn.functional.silu(z)).to(u.dtype)), MambaState(conv_state, h)


WARMDOWN = 1200  # steps over which the script's rate falls to zero
BF16_STORED = ("embedding.weight", "dt_proj.weight", "x_proj.weight", "conv1d.weight", "A_log")


def build(base: ModelConfig, variant: Variant, seed: int, device: str = "cpu") -> ByteLM:
    """A model of ``base`` with the variant's change, from the same random numbers for a seed."""
    torch.manual_seed(seed)
    mixer = _RoundedStateMixer if variant.bf16_state else MambaMixer
    model = ByteLM(replace(base, **variant.model), {mixer.letter: mixer})
    if variant.bf16_weights:
        round_weights(model)
    return model.to(device)


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round what the script stores in bfloat16; called after every step, it is that storage.

    (Its arithmetic in those weights is bfloat16 too, under autocast; here it stays float32, so
    this shows the cost of storage alone.)
    """
    for name, p in model.named_parameters():
        if name.endswith(BF16_STORED):
            p.copy_(p.bfloat16())


def make_optimizer(model: ByteLM, variant: Variant, recipe: TrainConfig) -> MuonAdamW:
    """AdamW as in mambabyte.train.optim, or Muon for block matrices and AdamW for the rest.

    Each group carries its own peak rate as "peak_lr". Muon has the script's momentum, 0.95, its
    Newton-Schulz iteration and its scale, max(1, rows / columns)^0.5.
    """
    of = roles(model)
    by_kind: dict[str, list[Tensor]] = {"muon": [], "decay": [], "free": [], "embedding": []}
    for name, p in model.named_parameters():
        if name.endswith("conv1d.weight") and variant.frozen_taps:
            continue
        in_block = name.startswith("layers.") and p.ndim == 2
        if name == "embedding.weight" and variant.embed_lr:
            by_kind["embedding"].append(p)
        elif variant.muon and in_block and (variant.muon_a_log or not name.endswith("A_log")):
            by_kind["muon"].append(p)
        else:
            by_kind["free" if of[name] == "free" else "decay"].append(p)
    rates = {"muon": PUBLISHED_MATRIX_LR, "decay": recipe.lr,
             "free": variant.scalar_lr or recipe.lr, "embedding": variant.embed_lr}
    return MuonAdamW([
        {"params": by_kind[kind], "lr": lr, "peak_lr": lr, "muon": kind == "muon",
         "weight_decay": recipe.weight_decay if kind == "decay" else 0.0,
         **({"momentum": 0.95, "first_momentum": 0.85, "momentum_steps": variant.momentum_steps}
            if kind == "muon" else {})}
        for kind, lr in rates.items()], recipe.betas)


def variant_step(
    model: ByteLM, variant: Variant, recipe: TrainConfig, batches: Batches
) -> EagerStep:
    """The eager step with the variant's optimizer."""
    return EagerStep(model, make_optimizer(model, variant, recipe), batches, recipe)


def train_variant(
    model: ByteLM, variant: Variant, recipe: TrainConfig, batches: Batches,
    share: Callable[[int], float] = lambda step: 1.0,
    after: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Train for ``recipe.n_steps`` on the windows ``batches(step)``; every step's loss in nats.

    ``share(step)`` scales every group's peak rate. A loss or gradient that is not finite ends the
    training and the list, with nan: a diverged variant is a result here.
    """
    losses: list[float] = []
    step = variant_step(model, variant, recipe, batches)

    def look(done: int) -> None:
        if variant.bf16_weights:
            round_weights(model)
        losses.append(step.read().loss)
        after(done)

    try:
        optimise(step, share, recipe.n_steps, after=look)
    except NonFiniteError:
        losses.append(math.nan)
    return losses


def memory_half_life(model: ByteLM, tokens: Tensor) -> float:
    """Bytes until the slowest state of a channel has decayed to half, the median over channels.

    The decay of state n is exp(dt A_n) a byte, so the half-life is ln 2 / (dt |A|); dt is averaged
    over ``tokens`` (B, L) for every channel of every SSM layer, and |A| is its smallest.
    """
    lives: list[Tensor] = []
    for mixer, dt in zip(ssm_layers(model), step_sizes(model, tokens), strict=True):
        slowest = mixer.A_log.detach().float().exp().amin(-1)  # |A|, (D,)
        lives.append(math.log(2) / (dt.mean((0, 1)) * slowest))
    return float(torch.cat(lives).median()) if lives else float("nan")


def published_state_dtypes() -> pd.DataFrame:
    """The dtype of the script's state before and after each of two steps, by the same promotions.

    The state starts in the activations' dtype (bfloat16), the decay comes from float32 ``A``, and
    bfloat16 times float32 is float32: from the first step on the state is float32, so what looks
    like a bfloat16 recurrence is not one.
    """
    activations = torch.ones(1, dtype=torch.bfloat16)
    A = -torch.exp(torch.zeros(1, dtype=torch.bfloat16).float())
    h = torch.zeros(1, dtype=activations.dtype)
    rows = [{"after_step": 0, "decay": "", "state": str(h.dtype).removeprefix("torch.")}]
    for step in (1, 2):
        decay = torch.exp(A * activations)
        h = decay * h + activations * activations
        rows.append({"after_step": step, "decay": str(decay.dtype).removeprefix("torch."),
                     "state": str(h.dtype).removeprefix("torch.")})
    return pd.DataFrame(rows)


def warmdown_multiplier(
    step: int, elapsed_seconds: float, *, iterations: int, cap_seconds: float
) -> float:
    """Learning-rate factor of the script's schedule before step ``step`` (from 0).

    The last WARMDOWN steps fall linearly to zero; with a wall-clock cap the steps that are
    left are those that fit into it at the mean pace so far. A run of fewer steps than
    WARMDOWN is all warm-down: it never reaches its rate. Before the first step no pace is
    known, so under a cap that step alone has factor 1.
    """
    if not cap_seconds:
        start = max(iterations - WARMDOWN, 0)
        return max((iterations - step) / WARMDOWN, 0.0) if step >= start else 1.0
    needed = WARMDOWN * elapsed_seconds / max(step, 1)
    left = max(cap_seconds - elapsed_seconds, 0.0)
    return left / max(needed, 1e-9) if left <= needed else 1.0


def effective_steps(
    step_seconds: float, *, iterations: int, cap_seconds: float = 0.0
) -> tuple[int, float]:
    """Steps taken at a constant pace, and the sum of their learning-rate factors."""
    total, step = 0.0, 0
    while step < iterations and (not cap_seconds or step * step_seconds < cap_seconds):
        total += warmdown_multiplier(step, step * step_seconds, iterations=iterations,
                                     cap_seconds=cap_seconds)
        step += 1
    return step, total
