"""One configuration at the sizes of a study, fit for every mixer. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mambabyte.config import ModelConfig


def at_size(
    config: ModelConfig, d_model: int, n_layer: int, n_head: int, n_kv_head: int = 0,
    **changes: Any,
) -> ModelConfig:
    """``config`` at this width and depth: every mixer that has heads has them d_model / n_head
    channels wide, so that any letter may stand in its pattern."""
    wide = max(1, d_model // n_head)
    return replace(config, d_model=d_model, n_layer=n_layer, n_head=n_head,
                   n_kv_head=n_kv_head or n_head, ssd_head_dim=wide, delta_head_dim=wide, **changes)
