"""Whether autocast is on, and arithmetic without it, on any device; some, as meta, have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# torch.amp.is_autocast_available would say so, but torch 2.11's compiler cannot look into it.
_WITHOUT = ("meta",)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    return device.type not in _WITHOUT and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operators compute in the types of their arguments."""
    if device.type in _WITHOUT:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
