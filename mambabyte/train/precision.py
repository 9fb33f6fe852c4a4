"""Which arithmetic training uses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast where the precision asks for it ("auto": on CUDA), else nothing."""
    if precision.startswith("bf16") or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
