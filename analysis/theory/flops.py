"""Floating-point operations per byte, in closed form, by module; and a count to hold it against.

Conventions, the same for every mixer so that they can be compared:

- One multiply-add is two operations. A product with an (m, n) matrix is ``2 m n`` a byte forward
  and twice that backward: one product for the gradient of the input, one for the weight's.
- Exponentials, logarithms, square roots and divisions by one (silu, softplus, softmax) run on
  other units than multiply-adds, so they are counted apart, as ``exp``.
- What a given implementation recomputes (a fused scan its states, flash attention its scores)
  is no operation of the model and is not counted.
- Attention: ``c`` is the mean number of keys that a query sees. In a window of L bytes trained
  causally that is (L + 1) / 2; ``causal=False`` counts all L, as a dense implementation computes
  and as ``torch.utils.flop_counter`` counts.

The selective scan has no matrix product and no counter sees it. Per byte, channel and state::

    forward    delta A (1), exp, (delta u) B (1), a h + . (2), C . h (2)            6 and 1 exp
    backward   g = carry + dy C (2), dC += dy h (2), carry = g a (1), w = carry h_prev (1),
               dA += w delta (2), ddelta += w A (2), dB += g (delta u) (2),
               d(delta u) += g B (2)                                               14

and per byte and channel: bias (1), softplus (1 and 2 exp), delta u (1), skip (2), gate (1),
silu of the gate (2 and 1 exp): 8 and 3 exp forward; twice the 8 backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops.causal_conv import torch_convolution

SCAN_FORWARD_PER_STATE = 6
SCAN_BACKWARD_PER_STATE = 14
SCAN_EXP_PER_STATE = 1
SCAN_FORWARD_PER_CHANNEL = 8
SCAN_EXP_PER_CHANNEL = 3

# How a row can be checked: flop_counter counts matrix products and convolutions, and no others.
MATMUL, CONVOLUTION, FORMULA = "matrix product", "convolution", "formula only"


@dataclass(frozen=True)
class _Row:
    module: str
    layers: int
    forward: float  # operations a byte and layer
    exp: float = 0.0
    kind: str = MATMUL
    backward_ratio: float = 2.0


def mean_keys(length: int, window: int, causal: bool = True) -> float:
    """Mean number of keys that a query of a sequence of ``length`` sees.

    Query t (from 1) sees min(t, window) keys; ``causal=False`` gives the dense ``length``.
    """
    if length < 1 or window < 1:
        raise UserError(f"length {length} and window {window}: both must be at least 1")
    if not causal:
        return float(length)
    w = min(length, window)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def flops_table(config: ModelConfig, length: int, *, causal: bool = True) -> pd.DataFrame:
    """Operations per byte of training on windows of ``length`` bytes, one row a module.

    Columns: module, layers, counted_by (what can check it), forward_flops and backward_flops per
    byte over all layers of that kind, exp_per_byte forward, and share of forward + backward.
    Elementwise work outside scan and attention (norms, residuals, activations, rotary positions,
    loss) is one row; it is a few operations a channel, given to the nearest whole number.
    """
    d, d_in, n = config.d_model, config.d_inner, config.d_state
    m, a = config.layers.count("M"), config.layers.count("A")
    low_rank = 0 if config.dt_rank == "full" else config.dt_rank_value
    kv = config.n_kv_head * config.head_dim
    keys = mean_keys(length, config.attention_window, causal)
    hidden, v = config.mlp_hidden, config.vocab_size

    rows = [
        _Row("SSM in_proj", m, 2 * d * 2 * d_in),
        _Row("SSM convolution", m, 2 * d_in * config.d_conv, kind=CONVOLUTION),
        _Row("SSM x_proj", m, 2 * d_in * (low_rank + 2 * n)),
        _Row("SSM dt_proj", m, 2 * config.dt_rank_value * d_in),
        _Row("SSM scan", m,
             d_in * (n * SCAN_FORWARD_PER_STATE + SCAN_FORWARD_PER_CHANNEL),
             exp=d_in * (n * SCAN_EXP_PER_STATE + SCAN_EXP_PER_CHANNEL), kind=FORMULA,
             backward_ratio=(n * SCAN_BACKWARD_PER_STATE + 2 * SCAN_FORWARD_PER_CHANNEL)
             / (n * SCAN_FORWARD_PER_STATE + SCAN_FORWARD_PER_CHANNEL)),
        _Row("SSM out_proj", m, 2 * d_in * d),
        _Row("attention projections", a, 2 * d * (2 * d + 2 * kv)),
        _Row("attention scores", a, 2 * 2 * keys * d),
        # scale, running maximum, subtraction, sum, normalisation; a score and a head
        _Row("attention softmax", a, 5 * keys * config.n_head, exp=keys * config.n_head,
             kind=FORMULA, backward_ratio=1.0),
        _Row("MLP", config.n_layer if hidden else 0, 2 * 2 * d * hidden),
        _Row("head", 1, 2 * d * v),
        _elementwise(config),
    ]
    frame = pd.DataFrame(
        {
            "module": r.module,
            "layers": r.layers,
            "counted_by": r.kind,
            "forward_flops_per_byte": r.layers * r.forward,
            "backward_flops_per_byte": r.layers * r.forward * r.backward_ratio,
            "exp_per_byte": r.layers * r.exp,
        }
        for r in rows if r.layers
    )
    total = frame["forward_flops_per_byte"] + frame["backward_flops_per_byte"]
    return frame.assign(share=total / total.sum())


def _elementwise(config: ModelConfig) -> _Row:
    """Norms (8 a channel with a mean, 4 without), residuals, activations, rotation, loss."""
    d, m, a = config.d_model, config.layers.count("M"), config.layers.count("A")
    norms = config.n_layer * (2 if config.mlp_hidden else 1) + 1
    rotated = d + config.n_kv_head * config.head_dim
    return _Row(
        "elementwise", 1,
        norms * d * (8 if config.norm == "layer" else 4)
        + config.n_layer * d * (2 if config.mlp_hidden else 1)
        + m * 2 * config.d_inner + a * 3 * rotated
        + config.n_layer * 2 * config.mlp_hidden + 5 * config.vocab_size,
        exp=m * config.d_inner + config.vocab_size, kind=FORMULA,
    )


def flops_per_byte(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """Forward and backward operations of one byte of training on windows of ``length`` bytes."""
    table = flops_table(config, length, causal=causal)
    return float(table["forward_flops_per_byte"].sum() + table["backward_flops_per_byte"].sum())


def count_flops(config: ModelConfig, length: int, batch: int = 1) -> pd.DataFrame:
    """The formula beside ``torch.utils.flop_counter`` for what that counts, and their ratio.

    Runs one forward and backward of a model of ``config`` on the CPU. Attention runs on torch's
    "math" route, because the CPU's fused attention is not counted at all (it shows as zero), and
    over all keys; the convolution is torch's, which is counted. The counter takes the weight
    gradient of a depthwise convolution for that of a dense one, a factor of d_inner too much; that
    row is shown and its ratio says so.
    """
    torch.manual_seed(0)
    model = ByteLM(config)
    tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), torch_convolution():
        with FlopCounterMode(display=False) as forward:
            loss = model.loss(tokens)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    table = flops_table(config, length, causal=False)
    rows = []
    for kind in (MATMUL, CONVOLUTION):
        mine = table[table["counted_by"] == kind]
        if mine.empty:
            continue
        for direction, counter in (("forward", forward), ("backward", backward)):
            counted = sum(
                number for operator, number in counter.get_flop_counts()["Global"].items()
                if ("convolution" in str(operator)) == (kind == CONVOLUTION)
            )
            formula = float(mine[f"{direction}_flops_per_byte"].sum()) * batch * length
            rows.append({
                "counted": kind, "pass": direction, "formula_flops": formula,
                "counter_flops": float(counted), "formula_over_counter": formula / counted,
            })
    return pd.DataFrame(rows)


def layer_flops_crossover(config: ModelConfig) -> int:
    """The least length at which an SSM layer trains with fewer operations than an attention layer.

    Both are bare mixers of ``config``'s width, attention causal over the whole length. It exists
    because attention's cost a byte grows with the length and the SSM's does not.
    """
    mixers = replace(config, n_layer=1, mlp_ratio=0.0, attention_window=2**40)

    def cost(pattern: str, length: int) -> float:
        table = flops_table(replace(mixers, layer_pattern=pattern), length)
        own = table[~table["module"].isin(["head", "elementwise"])]
        return float((own["forward_flops_per_byte"] + own["backward_flops_per_byte"]).sum())

    ssm = cost("M", 1)
    low, high = 0, 1
    while cost("A", high) <= ssm:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost("A", middle) <= ssm else (low, middle)
    return high
