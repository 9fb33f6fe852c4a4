"""How far a result is from the definition's, in the one measure used by checks and tables."""

from __future__ import annotations

from torch import Tensor

__all__ = ["relative_rms"]


def relative_rms(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the error over that of the reference, in float64; nan if either is.

    Tensors of one shape, or of shapes that broadcast, on one device.
    """
    value, reference = value.detach().double(), reference.detach().double()
    scale = reference.square().mean().sqrt()
    return float((value - reference).square().mean().sqrt() / scale.clamp_min(1e-300))
