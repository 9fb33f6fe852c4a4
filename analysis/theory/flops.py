"""Floating-point operations per byte, in closed form, by module; and a count to hold it against.

Conventions, the same for every mixer so that they can be compared:

- One multiply-add is two operations. A product with an (m, n) matrix is ``2 m n`` a byte forward
  and twice that backward: one product for the gradient of the input, one for the weight's.
- Exponentials, logarithms, square roots and divisions by one (silu, softplus, softmax) run on
  other units than multiply-adds, so they are counted apart, as ``exp``.
- What a given implementation recomputes (a fused scan its states, flash attention its scores)
  is no operation of the model and is not counted.
- Attention: ``c`` is the mean number of keys that a query sees. In L bytes trained causally that
  is (L + 1) / 2; ``causal=False`` counts all L, as ``torch.utils.flop_counter`` does, or beyond
  the window what its blocks hold.

Each mixer says its own operations; here are the conventions and the rest of the model.

The selective scan has no matrix product and no counter sees it. Per byte, channel and state::

    forward    delta A (1), exp, (delta u) B (1), a h + . (2), C . h (2)            6 and 1 exp
    backward   g = carry + dy C (2), dC += dy h (2), carry = g a (1), w = carry h_prev (1),
               dA += w delta (2), ddelta += w A (2), dB += g (delta u) (2),
               d(delta u) += g B (2)                                               14

and per byte and channel: bias (1), softplus (1 and 2 exp), delta u (1), skip (2), gate (1),
silu of the gate (2 and 1 exp): 8 and 3 exp forward; twice the 8 backward.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mambabyte.config import SPECS, ModelConfig
from mambabyte.model import AttentionMixer, ByteLM, MambaMixer, Mixer
from mambabyte.model.mixer import CONVOLUTION, FORMULA, MATMUL, Operations, mixer_of
from mambabyte.ops.conv.dispatch import torch_convolution


def flops_table(config: ModelConfig, length: int, *, causal: bool = True) -> pd.DataFrame:
    """Operations per byte of training on windows of ``length`` bytes, one row a module.

    Columns: module, layers, counted_by (what can check it), forward_flops and backward_flops per
    byte over all layers of that kind, exp_per_byte forward, and share of forward + backward.
    Elementwise work outside scan and attention (norms, residuals, activations, rotary positions,
    loss) is one row; it is a few operations a channel, given to the nearest whole number.
    """
    d, hidden = config.d_model, config.mlp_hidden
    rows: list[tuple[int, Operations]] = []  # layers that have it, and it
    for letter in sorted(set(config.layers), key=list(SPECS).index):
        rows += [(config.layers.count(letter), part)
                 for part in mixer_of(letter).operations(config, length, causal)]
    rows += [
        (config.n_layer if hidden else 0, Operations("MLP", 2 * 2 * d * hidden)),
        (1, Operations("head", 2 * d * config.vocab_size)),
        (1, _elementwise(config)),
    ]
    frame = pd.DataFrame(
        {
            "module": r.module,
            "layers": layers,
            "counted_by": r.kind,
            "forward_flops_per_byte": layers * r.forward,
            "backward_flops_per_byte": layers * r.forward * r.backward_ratio,
            "exp_per_byte": layers * r.exp,
        }
        for layers, r in rows if layers
    )
    total = frame["forward_flops_per_byte"] + frame["backward_flops_per_byte"]
    return frame.assign(share=total / total.sum())


def _elementwise(config: ModelConfig) -> Operations:
    """Norms (8 a channel with a mean, 4 without), residuals, their gains, activations, loss, and
    what each mixer has of the kind."""
    d = config.d_model
    branches = config.n_layer * (2 if config.mlp_hidden else 1)
    norms = branches + 1 + config.embed_norm
    gains = (branches * config.block_scales + 3 * config.n_layer * config.residual_mix
             + 2 * sum(skip is not None for skip in config.skips))
    mixers = [mixer_of(letter).elementwise(config) for letter in config.layers]
    return Operations(
        "elementwise",
        norms * d * (8 if config.norm == "layer" else 4)
        + (branches + gains) * d
        + sum(forward for forward, _ in mixers)
        + config.n_layer * 2 * config.mlp_hidden + 5 * config.vocab_size,
        sum(exp for _, exp in mixers) + config.vocab_size, FORMULA)


def flops_per_byte(config: ModelConfig, length: int) -> float:
    """Forward and backward operations of one byte of training on windows of ``length`` bytes."""
    table = flops_table(config, length)
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


def layer_flops_crossover(
    config: ModelConfig, mixer: type[Mixer] = MambaMixer
) -> int | None:
    """The least length at which ``mixer`` trains with fewer operations than attention.

    Both are bare mixers of ``config``'s width, attention causal over the whole length. None for a
    mixer whose cost a byte grows with the length as attention's does.
    """
    wide = replace(config, attention_window=2**39)

    def cost(kind: type[Mixer], length: int) -> float:
        return sum(part.forward * (1 + part.backward_ratio)
                   for part in kind.operations(wide, length))

    low, high = 0, 1
    while cost(AttentionMixer, high) <= cost(mixer, high):
        low, high = high, 2 * high
        if high > wide.attention_window:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if cost(AttentionMixer, middle) <= cost(mixer, middle):
            low = middle
        else:
            high = middle
    return high
