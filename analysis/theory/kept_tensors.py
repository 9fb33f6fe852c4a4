"""Every tensor that autograd keeps of a training step, in closed form.

Each mixer says what it keeps; here is the rest of the model: norms, MLPs, head and loss.
analysis.measure.allocations counts what is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mambabyte.config import ModelConfig
from mambabyte.model.mixer import FLOAT32, Step, mixer_of

Autocast = Literal["fp32", "bf16", "fp16"]
# What the streams of a layer are under each state; "fp32" is no autocast.
STREAM_DTYPE: dict[Autocast, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCASTS: tuple[Autocast, ...] = tuple(STREAM_DTYPE)
INT64 = 8  # bytes


@dataclass(frozen=True)
class Term:
    """One tensor that autograd keeps: where it is, what it is, how large."""

    layer: int  # -1: embedding, final norm, head and loss
    part: str
    tensor: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


def saved_terms(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    device: str = "cpu", checkpointing: bool = False,
) -> list[Term]:
    """Every tensor that autograd keeps between forward and backward of ``ByteLM.loss``.

    Parameters are not counted. ``checkpointing`` is torch.utils.checkpoint around every block:
    then a block keeps its input alone. Raises UserError for a form without a closed form.
    """
    step = Step(batch, length, STREAM_DTYPE[autocast], device)
    itemsize, tokens = step.itemsize, step.tokens
    d, V = config.d_model, config.vocab_size
    found: list[Term] = []
    for i, letter in enumerate(config.layers):
        if checkpointing:  # the embedded bytes are the first's input, a skip one of another's
            found.append(Term(i, "norm", "block input", tokens * d, FLOAT32))
            continue
        mixer = mixer_of(letter)
        found += [Term(i, "residual", *t) for t in _residual_terms(config, i, tokens, itemsize)]
        rows = [("norm", *t)
                for t in _norm_terms(config, tokens, device, itemsize, mixer.readers)]
        rows += mixer.kept(config, step)
        if config.mlp_hidden:
            rows += [("mlp", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
            rows += [("mlp", *t) for t in _mlp_terms(config, tokens, device, itemsize)]
            if itemsize != FLOAT32:
                rows.append(("casts", "weights, cast", 2 * d * config.mlp_hidden, itemsize))
        found += [Term(i, *row) for row in rows]
    head = [("head", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
    if config.embed_norm:
        head += [("head", "embedding before its norm", tokens * d, FLOAT32),
                 ("head", "1/rms of the embedding", tokens, FLOAT32)]
    if config.embed_norm_gain and device == "cpu":
        head.append(("head", "normalised embedding", tokens * d, FLOAT32))
    if config.logit_softcap:
        head.append(("head", "tanh of the logits", tokens * V, itemsize))
    if itemsize != FLOAT32:
        head.append(("casts", "weights, cast", V * d, itemsize))
    head += [
        ("head", "log-softmax", tokens * V, FLOAT32),
        # Flattened targets are a copy, but for a batch of one a view of the bytes.
        ("head", "bytes and targets", batch * (length + 1) + (tokens if batch > 1 else 0), INT64),
        ("head", "weight of the mean", 1, FLOAT32),
    ]
    return found + [Term(-1, *row) for row in head]


def _residual_terms(
    config: ModelConfig, layer: int, tokens: int, itemsize: int
) -> list[tuple[str, int, int]]:
    """What the gains of a layer's branches, its mix and its skip keep. The embedded bytes are the
    first layer's stream; a skip is the stream that the layer behind its source keeps, but for
    the one of two neighbours."""
    wide = tokens * config.d_model
    terms = []
    if config.residual_mix:
        terms.append(("stream before its mix", wide, FLOAT32))
    if config.skips[layer] == layer - 1:
        terms.append(("skip", wide, FLOAT32))
    if config.block_scales:
        branches = 2 if config.mlp_hidden else 1
        terms.append(("branches before their gains", branches * wide, itemsize))
    return terms


def _norm_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int, readers: int
) -> list[tuple[str, int, int]]:
    """A norm and its output; ``readers`` linear maps each keep a cast of it under autocast."""
    d = config.d_model
    terms = [("input (residual stream)", tokens * d, FLOAT32)]
    if config.norm == "layer":
        terms.append(("mean and 1/std", 2 * tokens, FLOAT32))
    else:
        terms.append(("1/rms", tokens, FLOAT32))
        # Composed of pow, rsqrt and mul there, one kernel on CUDA; the weights multiply this.
        if device == "cpu" and config.norm == "rms":
            terms.append(("normalised input", tokens * d, FLOAT32))
    copies = 1 if itemsize == FLOAT32 else readers
    return [*terms, ("output", copies * tokens * d, itemsize)]


def squares_in_float32(config: ModelConfig, itemsize: int, device: str) -> bool:
    """CUDA's autocast takes ``square`` to float32; the CPU's leaves it in bf16."""
    return config.mlp_activation == "relu2" and itemsize != FLOAT32 and device == "cuda"


def _mlp_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int
) -> list[tuple[str, int, int]]:
    hidden = tokens * config.mlp_hidden
    terms = [("hidden, before and after activation", 2 * hidden, itemsize)]
    if squares_in_float32(config, itemsize, device):
        terms.append(("hidden in float32, for its square", hidden, FLOAT32))
    return terms
