"""Systems of equal size: the same parameter count from different layer patterns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from analysis.theory.flops import flops_per_byte
from analysis.theory.sizes import at_size
from analysis.theory.step_memory import state_bytes
from mambabyte.config import ModelConfig
from mambabyte.errors import UserError

CLOSE = 0.01  # as much above what was asked for counts as it, for lack of an MLP to make narrower
GPU_WIDTHS = 8  # a GPU's products are slow on rows of bf16 that do not begin at 16 bytes


@dataclass(frozen=True)
class Matched:
    """A configuration and how far its parameter count is from what was asked for."""

    config: ModelConfig
    target: int

    @property
    def mismatch(self) -> float:
        """(parameters - target) / target."""
        return self.config.n_parameters / self.target - 1


def match_parameters(
    config: ModelConfig, target: int, by: str = "mlp", multiple: int = 1
) -> Matched:
    """``config`` with the width that brings its parameter count nearest to ``target``.

    ``by="mlp"`` keeps d_model and depth and sets the hidden width of the MLP in every block, so
    what a mixer saves goes into MLPs (an attention layer with its MLP is then what a bare SSM
    layer is compared with, as in the field); hidden widths are multiples of ``multiple``. A pattern
    that is up to CLOSE above the target has no MLP.
    ``by="d_model"`` keeps the MLP's ratio and sets d_model, in steps that keep heads of even
    width. Raises UserError when no width reaches it.
    """
    if by == "mlp":
        widths = [0, multiple, 2 * multiple]
        sizes = [replace(config, mlp_ratio=w / config.d_model).n_parameters for w in widths]
        if sizes[0] > (1 + CLOSE) * target:
            raise UserError(
                f"pattern {config.layer_pattern} has {sizes[0]:,} parameters without an MLP, more "
                f"than the {target:,} asked for: raise the target, or match by d_model")
        slope = sizes[2] - sizes[1]
        nearest = max(1, 1 + round((target - sizes[1]) / slope))
        if abs(sizes[0] - target) <= abs(sizes[1] + (nearest - 1) * slope - target):
            nearest = 0
        return Matched(replace(config, mlp_ratio=nearest * multiple / config.d_model), target)
    if by == "d_model":
        step = 2 * config.n_head
        widths = list(range(step, 64 * step + config.d_model * 4, step))
        sized = [at_size(config, w, config.n_layer, config.n_head, config.n_kv_head)
                 for w in widths]
        return Matched(min(sized, key=lambda c: abs(c.n_parameters - target)), target)
    raise UserError(f"match {by!r} is unknown: choose mlp or d_model")


def match_patterns(
    base: ModelConfig, patterns: tuple[str, ...], *, target: int = 0, by: str = "mlp",
    multiple: int = 1,
) -> dict[str, Matched]:
    """Each pattern at the size ``target``; 0 means the size of the largest pattern as ``base`` is.

    With ``by="mlp"`` the largest pattern then keeps its MLP and all others get wider ones, in
    multiples of ``multiple``.
    """
    if not patterns:
        raise UserError("no layer patterns are given: name at least one, such as M or MA")
    configs = {p: replace(base, layer_pattern=p) for p in patterns}
    target = target or max(c.n_parameters for c in configs.values())
    return {p: match_parameters(c, target, by, multiple) for p, c in configs.items()}


def systems_table(systems: dict[str, Matched], context: int) -> pd.DataFrame:
    """Size, cost and state of every matched system, trained on windows of ``context`` bytes.

    ``full_cache_bytes`` is the state of a stream of 60,000 bytes if attention kept every key.
    """
    rows = []
    for name, matched in systems.items():
        config = matched.config
        unbounded = replace(config, attention_window=2**31)
        rows.append({
            "pattern": name, "layers": config.layers, "d_model": config.d_model,
            "mlp_hidden": config.mlp_hidden, "n_parameters": config.n_parameters,
            "mismatch_percent": 100 * matched.mismatch,
            "train_flops_per_byte": flops_per_byte(config, context),
            "state_bytes": sum(state_bytes(config, context).values()),
            "full_cache_bytes": sum(state_bytes(unbounded, 60_000).values()),
        })
    return pd.DataFrame(rows)
