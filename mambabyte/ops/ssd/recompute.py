"""Backward passes that run the forward a second time: an operator keeps nothing but its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_again(
    function: Callable[..., tuple[Tensor, ...]],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs`` through ``function(*inputs)``, whose results have the gradients
    ``upstream``; None for an input that is None. For use inside an operator's kernel."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    present = [t for t in leaves if t is not None]
    # The dispatcher leaves autograd out below an operator; it is wanted here, autocast is not.
    keys = torch._C.DispatchKey
    left_out = (torch._C._dispatch_tls_local_exclude_set()
                - torch._C._dispatch_keys(present[0])
                | torch._C.DispatchKeySet(keys.AutocastCPU)
                | torch._C.DispatchKeySet(keys.AutocastCUDA))
    guard = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), left_out)
    with guard, torch.enable_grad():
        pairs = [(r, g) for r, g in zip(function(*leaves), upstream, strict=True)
                 if g is not None]
        found = iter(torch.autograd.grad(
            [r for r, _ in pairs], present, [g for _, g in pairs], materialize_grads=True))
    return tuple(None if t is None else next(found) for t in inputs)
