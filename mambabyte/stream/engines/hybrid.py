"""A ByteLM of any registered layers for ``ops/stream/hybrid.py``: its weights, states, and whether
that can run it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from mambabyte.config import SPECS
from mambabyte.model import ByteLM
from mambabyte.model.families.attention import AttentionState, rotary_table
from mambabyte.model.families.delta import DeltaState
from mambabyte.model.families.mamba import MambaState
from mambabyte.model.families.mamba2 import Mamba2State
from mambabyte.model.mixer import LayerState
from mambabyte.ops import Mamba3State
from mambabyte.ops.build.nvrtc import NvrtcError
from mambabyte.ops.stream.fitting import check_fit
from mambabyte.ops.stream.grid.packing import GUIDED, KINDS
from mambabyte.ops.stream.hybrid import HybridState, HybridStreamer


def _epsilons(model: ByteLM) -> tuple[float, float]:
    """Of the model's norms, and of norms without one."""
    tiny = torch.finfo(model.embedding.weight.dtype).eps
    eps = getattr(model.norm_f, "eps", None)
    return eps if isinstance(eps, float) else tiny, tiny


def unsupported(model: ByteLM) -> str:
    """Why the kernel cannot stream the model, in one line; empty where it can. The parts are known
    and the sizes of vocabulary and state are not asked again."""
    config, index = model.config, model.device.index
    if foreign := set(config.layers) - set(KINDS):
        return f"the kernel has no {', '.join(SPECS[letter].about for letter in sorted(foreign))}"
    if config.scan_form not in ("auto", "fused"):
        return f"scan_form {config.scan_form!r} has a kernel for Mamba layers alone"
    shapes = {name: p.to("meta") for name, p in model.named_parameters()}
    try:
        check_fit(config, shapes, *_epsilons(model), index)
    except NvrtcError as error:
        return str(error)
    return ""


def hybrid_streamer(model: ByteLM, guided: nn.Module | None = None) -> HybridStreamer:
    """What streams the model with the weights that it has now; with the other parts of
    ``guided``, the guided model that it is the network of."""
    config = model.config
    rotary = functools.partial(
        rotary_table, half=config.head_dim // 2, base=config.rope_base,
        fraction=config.rope_fraction, device=model.device)
    parameters = dict(model.named_parameters())
    if guided is not None:
        parameters |= {name: guided.get_parameter(name) for name in GUIDED}
    with torch.no_grad():
        return HybridStreamer(config, parameters, *_epsilons(model), rotary)


def hybrid_state(streamer: HybridStreamer, states: list[LayerState]) -> HybridState:
    """The model's states of layers as the streamer takes them."""
    layers: list[list[torch.Tensor]] = []
    caches, position = [], 0
    for s in states:
        if isinstance(s, AttentionState):
            s = s.alone()
            caches.append((s.k, s.v))
            position = s.position
            layers.append([])
        elif isinstance(s, DeltaState):
            layers.append([s.memory.transpose(2, 3).flatten(1, 2), torch.cat(s[:3], -1)])
        elif isinstance(s, Mamba3State):
            channels = s.ssm_state.shape[2]  # of a head, each of which has its head's k
            layers.append([s.ssm_state.flatten(1, 2), s.k_state.repeat_interleave(channels, 1),
                           s.v_state.flatten(1)[:, None]])
        else:
            layers.append([s.ssm_state.flatten(1, -2), s.conv_state])
    return streamer.state_of(layers, caches, position)


def hybrid_layers(streamer: HybridStreamer, state: HybridState) -> list[Any]:
    """The inverse of ``hybrid_state``; all float32."""
    config = streamer.config
    layers, caches = streamer.layers_of(state)
    found: list[Any] = []
    remaining = iter(caches)
    for letter, tensors in zip(config.layers, layers, strict=True):
        if letter in "AL":
            found.append(AttentionState(*next(remaining), state.position))
        elif letter == "M":
            ssm, conv = tensors
            found.append(MambaState(conv, ssm))
        elif letter == "S":
            ssm, conv = tensors
            heads = config.d_inner // config.ssd_head_dim
            found.append(Mamba2State(conv, ssm.unflatten(1, (heads, -1))))
        elif letter == "R":
            ssm, k, v = tensors
            by_head = (-1, config.ssd_head_dim)
            found.append(Mamba3State(k[:, :: config.ssd_head_dim], v[:, 0].unflatten(1, by_head),
                                     ssm.unflatten(1, by_head)))
        else:
            memory, conv = tensors
            heads = config.d_model // config.delta_head_dim
            keys, values = config.d_model, config.d_model * config.delta_expand_v
            q, k, v = conv.split([keys, keys, values], -1)
            found.append(DeltaState(
                q, k, v, memory.unflatten(1, (heads, -1)).transpose(2, 3).contiguous()))
    return found
