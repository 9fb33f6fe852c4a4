"""What the scan is timed against: peers get the same inputs, each in its own layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops import selective_scan
from mambabyte.ops.scan.operator import fused_available, fused_scan

Shape = tuple[int, int, int]  # B, L, D
GPU_ONLY = ("mamba_ssm", "fla")


@dataclass(frozen=True)
class Peer:
    """Something to time. ``prepare`` turns inputs (B, L, D) into what ``call`` takes and gives."""

    about: str
    call: Callable[..., Tensor]
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: inputs
    restore: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    needs: str = ""  # a module
    stores_states: bool = False  # all B L D N of them
    is_scan: bool = True


def torch_form(form: str) -> Callable[..., Tensor]:
    def call(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=True, form=form
        )[0]

    return call


def _recompute(u, delta, A, B, C, D, z, delta_bias):
    return fused_scan(u, delta, A, B, C, D, z, delta_bias, None, True, recompute=True)[0]


def _mamba_ssm(u, delta, A, B, C, D, z, delta_bias):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True)


def _mambapy(u, delta, A, B, C, D, z, delta_bias):
    from mambapy.pscan import pscan

    dt = F.softplus(delta.float() + delta_bias)
    x = u.float()
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (B, L, D, N)
    drive = (dt * x).unsqueeze(-1) * B.float().unsqueeze(2)
    y = (pscan(decay, drive) @ C.float().unsqueeze(-1)).squeeze(3) + D * x
    return (y * F.silu(z.float())).to(u.dtype)


def _sdpa(u: Tensor, delta: Tensor, z: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(u, delta, z, is_causal=True)


def _channels_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for n, t in inputs.items()}


def _heads(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of the same width: (B, L, D) -> (B, D / 64, L, 64)."""
    width = 64 if inputs["u"].shape[2] % 64 == 0 else inputs["u"].shape[2]
    return {
        name: inputs[name].unflatten(2, (-1, width)).transpose(1, 2).contiguous()
        for name in ("u", "delta", "z")
    }


def _channels_last(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor


PEERS: dict[str, Peer] = {
    "fused": Peer("this project's kernels", torch_form("fused")),
    "fused, recompute": Peer("the same, keeping no states for the backward", _recompute),
    "mamba_ssm": Peer(
        "state-spaces/mamba, CUDA", _mamba_ssm, _channels_first, _channels_last, "mamba_ssm"
    ),
    "mambapy": Peer("mamba.py's parallel scan", _mambapy, needs="mambapy", stores_states=True),
    "chunked": Peer("stable torch form", torch_form("chunked"), stores_states=True),
    "document_chunked": Peer(
        "log-cumsum in chunks, as published", torch_form("document_chunked"), stores_states=True
    ),
    "sdpa": Peer("causal attention of the same width, for scale", _sdpa, _heads, is_scan=False),
}


def peer_installed(peer: Peer, device: torch.device) -> str:
    """Why that peer cannot be imported or not run on the device, in one line; "" if it can."""
    if peer.needs and importlib.util.find_spec(peer.needs) is None:
        return f"{peer.needs} is not installed"
    if peer.needs in GPU_ONLY and device.type != "cuda":
        return f"{peer.needs} runs on GPUs only"
    return ""


def peer_available(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether that peer can be run on the device, and if not why, in one line."""
    if missing := peer_installed(PEERS[name], device):
        return False, missing
    if name == "mamba_ssm" and importlib.util.find_spec("selective_scan_cuda") is None:
        return False, "mamba_ssm was installed without its Mamba-1 kernel"
    if name.startswith("fused"):
        return fused_available(device)
    return True, ""


def make_inputs(
    shape: Shape, states: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs as a trained layer has them, in (B, L, D)."""
    batch, length, channels = shape
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    rates = torch.arange(1, states + 1, device=device, dtype=torch.float32)
    return {
        "u": normal(batch, length, channels).to(dtype),
        "delta": normal(batch, length, channels).to(dtype),
        "A": -rates.repeat(channels, 1),
        "B": normal(batch, length, states).to(dtype),
        "C": normal(batch, length, states).to(dtype),
        "D": normal(channels),
        "z": normal(batch, length, channels).to(dtype),
        "delta_bias": normal(channels) - 3,
    }
