"""The definition of the gated delta rule: one step after another, in any floating dtype.

Every other form is measured against this one, in float64. The state of a head is a map from keys
to values. A step lets it decay, reads what it holds at the key, and writes the share ``beta`` of
what is missing there. With one decay a head it is the rule of Gated DeltaNet (Yang et al. 2024,
arXiv:2412.06464, equation 10), with one a key channel that of Kimi Delta Attention
(arXiv:2510.26692, equation 1); without decay it is the delta rule itself (arXiv:2102.11174).
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: ``S = diag(exp(log_decay)) S``, ``S = S + beta k (v - S^T k)^T``, ``o = S^T q``.

    Shapes: q, k (B, H, K); v (B, H, V); log_decay (B, H, 1) or (B, H, K); beta (B, H); state
    (B, H, K, V). Returns o (B, H, V) and the new state; the given state is not changed.
    """
    state = torch.exp(log_decay)[..., None] * state
    missing = v - (state * k[..., None]).sum(-2)  # (B, H, V)
    state = state + k[..., None] * (beta[..., None] * missing)[..., None, :]
    return (state * q[..., None]).sum(-2), state


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The rule as L steps. Shapes as in mambabyte.ops.gated_delta_rule, with log_decay
    (B, L, H, 1 or K); no use for ``chunk``."""
    outputs = []
    # unbind, not indexing: the gradient of each index would be a tensor of the full length.
    for q_t, k_t, v_t, decay_t, beta_t in zip(
        q.unbind(1), k.unbind(1), v.unbind(1), log_decay.unbind(1), beta.unbind(1), strict=True
    ):
        o_t, state = delta_step(q_t, k_t, v_t, decay_t, beta_t, state)
        outputs.append(o_t)
    return torch.stack(outputs, dim=1), state
