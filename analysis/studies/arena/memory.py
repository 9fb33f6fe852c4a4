"""What a trained model remembers: how far back, in which channels, which inputs an output reads.

All of it asks the model and its mixers alone, so that every letter has an answer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.ablation.learning import LN2
from mambabyte.model import ByteLM, Mixer, mixers
from mambabyte.train import autocast

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAP_BYTES = 48
TOKENS = 1 << 16  # of a call of the model


@torch.no_grad()
def effective_context(model: ByteLM, text: np.ndarray, first: int = 32) -> list[dict[str, Any]]:
    """Bits per byte of ``text`` where the state is reset every so many bytes, doubling from
    ``first`` to 16,384 or the whole text; the same bytes are scored for each."""
    found = []
    longest = min(16_384, (len(text) - 1) // first * first)
    every = first
    scored = (len(text) - 1) // longest * longest
    while every <= longest:
        count = scored // every
        windows = np.stack([text[i * every : (i + 1) * every + 1] for i in range(count)])
        nats = 0.0
        for part in torch.from_numpy(windows).split(max(1, TOKENS // every)):
            tokens = part.to(model.device).long()
            with autocast(model.device, "auto"):
                logits, _ = model(tokens[:, :-1])
            nats += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(),
                                    reduction="sum").item()
        found.append({"reset_every": every, "bits_per_byte": nats / LN2 / (count * every)})
        every *= 2
    return found


@torch.no_grad()
def log_decays(model: ByteLM, tokens: Tensor) -> list[Tensor | None]:
    """By layer: the mean over tokens (B, L) of the log-decay of what the state has; None for a
    mixer without decays."""
    found: list[Tensor | None] = []

    def look(mixer: Mixer, args: tuple[Any, ...]) -> None:
        decay = mixer.log_decays(args[0])
        found.append(None if decay is None else decay.float().mean((0, 1)))

    handles = [mixer.register_forward_pre_hook(look) for mixer in mixers(model, Mixer)]
    try:
        with autocast(model.device, "auto"):
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def half_lives(model: ByteLM, tokens: Tensor) -> list[dict[str, Any]]:
    """Bytes until what the state holds has decayed to half: quantiles over channels, by layer."""
    rows = []
    for layer, decay in enumerate(log_decays(model, tokens)):
        if decay is None:
            continue
        lives = (LN2 / -decay.double()).clamp(max=1e9).flatten()
        at = torch.quantile(lives, torch.tensor(QUANTILES, dtype=lives.dtype, device=lives.device))
        rows.append({"layer": layer, "mixer": model.config.layers[layer], "channels": len(lives),
                     **{f"half_life_{round(100 * q)}": x
                        for q, x in zip(QUANTILES, at.tolist(), strict=True)},
                     "share_above_1000": float((lives > 1000).double().mean())})
    return rows


def gradient_horizon(model: ByteLM, tokens: Tensor) -> list[dict[str, Any]]:
    """The gradient of the last byte's loss with respect to the embedded bytes before it.

    tokens (B, L + 1). A row a bin of distances, which double: the mean over bytes of the gradient's
    norm, relative to that of the nearest, and the share of all that lies up to here.
    """
    model.zero_grad()
    x = model.embedding(tokens[:, :-1].to(model.device)).detach().requires_grad_()
    with autocast(model.device, "auto"):
        hidden, _ = model.hidden(x)
        loss = F.cross_entropy(model.logits(hidden[:, -1]).float(),
                               tokens[:, -1].to(model.device).long(), reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    norm = grad.double().norm(dim=-1).mean(0).flip(0).cpu()  # (L,) by distance, nearest first
    rows, low = [], 0
    while low < len(norm):
        high = min(max(1, 2 * low), len(norm))
        rows.append({"distance": high, "relative_gradient": float(norm[low:high].mean() / norm[0]),
                     "share_up_to_here": float(norm[:high].sum() / norm.sum())})
        low = high
    return rows


def implicit_attention(mixer: Mixer, x: Tensor) -> Tensor:
    """How much each output of a mixer depends on each input, (L, L), rows of outputs that add up
    to 1: the norm of the gradient of a random projection of output t with respect to input s.

    x (L, d_model). One pass over L copies of the sequence, of which copy t is asked for output t.
    For attention this is near its map; for a mixer with a state it is what takes its place, with
    what the input does to gates and decays in it.
    """
    length = len(x)
    copies = x.detach().expand(length, -1, -1).clone().requires_grad_()
    y, _ = mixer(copies, None)
    weight = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0)).to(y)
    (grad,) = torch.autograd.grad((y.diagonal(dim1=0, dim2=1).T * weight).sum(), copies)
    norm = grad.float().norm(dim=-1)
    return norm / norm.sum(1, keepdim=True)


def attention_map(model: ByteLM, tokens: Tensor, layer: int) -> Tensor:
    """``implicit_attention`` of a layer's mixer on what it reads of tokens (L,)."""
    mixer = mixers(model, Mixer)[layer]
    read: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda m, args: read.append(args[0][0]))
    try:
        with torch.no_grad():
            model(tokens[None].to(model.device))
    finally:
        handle.remove()
    return implicit_attention(mixer, read[0])


def remembered(model: ByteLM, text: np.ndarray, context: int) -> dict[str, Any]:
    """What a model remembers of ``text``, as rows of a sweep."""
    model.eval()
    windows = torch.from_numpy(np.stack([
        text[s : s + context + 1] for s in np.linspace(0, len(text) - context - 1, 16).astype(int)
    ])).long()
    layer = model.config.n_layer // 2
    shown = attention_map(model, windows[0, :MAP_BYTES], layer).cpu()
    return {
        "context": effective_context(model, text[: 1 << 17]),
        "half_lives": half_lives(model, windows[:4, :-1].to(model.device)),
        "horizon": gradient_horizon(model, windows),
        "maps": [{"layer": layer, "output": t, "input": s, "share": round(float(shown[t, s]), 5)}
                 for t in range(len(shown)) for s in range(t + 1)],
    }


def stagnation_half_life(mantissa_bits: int) -> float:
    """The half-life in bytes from which a number rounded to nearest loses no more by decay.

    One step takes 1 - 2^(-1/h), about ln 2 / h, of a number. Rounding to nearest puts it back where
    that is less than half of a unit in the last place, at most 2^-(mantissa_bits + 1) of it.
    """
    return math.log(2) * 2 ** (mantissa_bits + 1)
