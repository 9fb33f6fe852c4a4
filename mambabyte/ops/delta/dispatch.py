"""The gated delta rule: one signature, several forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import (
    FLOATS,
    ages_of,
    check_chunk_size,
    check_tensors,
    chosen_form,
    wide_dtype,
    without_autocast,
)
from mambabyte.ops.delta.chunked import CHUNK, chunked_delta
from mambabyte.ops.delta.operator import fused_delta
from mambabyte.ops.delta.recurrent import recurrent_delta
from mambabyte.ops.ssd.decay import without_past

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_delta, "chunked": chunked_delta}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | Sequence[int] | None = None,
    ages: Tensor | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Delta rule with decay (arXiv:2412.06464; a gate a channel: arXiv:2510.26692, KDA).

    With state S (K, V) for each head::

        S'  = diag(exp(log_decay_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
        o_t = S_t^T q_t

    Shapes: q, k (B, L, H, K); v (B, L, H, V); log_decay, not above 0, (B, L, H) for one gate a
    head or (B, L, H, K) for one a key channel; beta (B, L, H); initial_state (B, H, K, V), zero
    when None. Neither are q and k normalised nor q scaled here; the rule is stable for
    ``beta |k|^2`` in [0, 2]. Returns o (B, L, H, V) in v's dtype and the state after the last step
    (B, H, K, V) in float32 (float64 when any input is float64). Gradients flow to every input
    and through both results.

    ``document_starts`` says where documents begin that lie one behind another in a row: each goes
    on from a state of zeros and nothing crosses, neither value nor gradient; see ``document_ages``
    of mambabyte.ops.arguments, and for ``ages``, which say the same. The state that comes back is
    that of the last.

    ``form`` is "recurrent", the definition; "chunked", of ``chunk_size`` steps rounded down to a
    power of two; "fused", one operator that keeps its inputs alone for the backward pass; or
    "auto": fused, a single step recurrent.

    Raises UserError for shapes that do not agree, an unknown form, or a chunk size below 1.
    """
    for name, tensor in (("k", k), ("v", v), ("log_decay", log_decay)):
        check_tensors(name, tensor, None, FLOATS)
    if k.ndim != 4 or k.shape[1] < 1:
        raise UserError(f"k has shape {tuple(k.shape)}: expected (batch, length >= 1, heads, "
                        "key channels)")
    if v.ndim != 4:
        raise UserError(f"v has shape {tuple(v.shape)}: expected (batch, length, heads, value "
                        "channels)")
    batch, length, heads, keys = k.shape
    gates = (batch, length, heads)
    check_tensors("k", k, None, FLOATS, (
        ("q", q, tuple(k.shape), None), ("v", v, (*gates, v.shape[3]), None),
        ("beta", beta, gates, None),
        ("log_decay", log_decay, gates if log_decay.ndim == 3 else tuple(k.shape), None),
        ("initial_state?", initial_state, (batch, heads, keys, v.shape[3]), None)))
    check_chunk_size(chunk_size)
    form = chosen_form("delta rule", form, ("fused", *FORMS), length)

    wide = wide_dtype(q, k, v, log_decay, beta, initial_state)
    ages = ages_of(document_starts, ages, v)
    gate = log_decay.to(wide)
    gate = gate if gate.ndim == 4 else gate.unsqueeze(-1)
    state = None if initial_state is None else initial_state.to(wide)
    if form == "fused":
        dtype = wide
        if wide == torch.float32:
            dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        o, state = fused_delta(
            q.to(dtype), k.to(dtype), v.to(dtype), gate, beta.to(wide), state, ages)
        return o.to(v.dtype), state
    # Autocast would take the products to bf16; the state accumulates in float32 or better.
    with without_autocast(v.device):
        if state is None:
            state = v.new_zeros(batch, heads, keys, v.shape[3], dtype=wide)
        o, state = FORMS[form](
            q.to(wide), k.to(wide), v.to(wide), without_past(gate, ages), beta.to(wide), state,
            chunk_size or CHUNK)
        return o.to(v.dtype), state
