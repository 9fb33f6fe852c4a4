"""The model's layers and head by kernels that do what torch.compile joins, without compiling.

``fused_layer`` and ``fused_head_loss`` take the place of ``ByteLM.run_layer`` and ``run_head``. The
sum that ends a layer is not made where it ends but by the kernel that mixes and normalises it for
the next one, so that the residual stream goes through memory once a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mambabyte.model.block import Block, RMSNorm
from mambabyte.model.lm import ByteLM, head_loss, without_state
from mambabyte.model.mixer import Mixer, is_linear, is_plain, named_mixers
from mambabyte.ops.arguments import autocasts
from mambabyte.ops.fused.activation import activate
from mambabyte.ops.fused.cuda import refuse_second_derivative
from mambabyte.ops.fused.loss import cross_entropy
from mambabyte.ops.fused.norm import Mixed, Norm, Streams, mix_norm


@dataclass
class Stream:
    """A residual stream (B, L, d_model) and what is still to be added to it, times its gain."""

    x: Tensor
    y: Tensor | None = None
    gain: Tensor | None = None
    embedded: Tensor | None = None  # what the layers so far have read it from
    kept: bool = False  # whether a later layer reads the sum too: the next one then leaves it here

    def summed(self) -> Tensor:
        """The stream with that added."""
        if self.y is not None:
            self.x, self.y = _mixed(Streams(self.x, self.y, y_gain=self.gain)).total, None
        return self.x


def fused_layer(
    layer: nn.Module, x: Tensor | Stream, embedded: Tensor | None = None,
    skip: Tensor | Stream | None = None, ages: Tensor | None = None,
) -> Stream:
    """What :func:`mambabyte.model.lm.without_state` does, shapes as there, with the last sum of the
    residual stream left to what reads it. A layer with a norm of another class, as an adapter makes
    it, is called as it is."""
    stream = x if isinstance(x, Stream) else Stream(x)
    skipped = skip.summed() if isinstance(skip, Stream) else skip
    if not isinstance(layer, Block) or not is_plain(layer, Block) or not _known(
            layer.norm, layer.mlp_norm):
        return Stream(without_state(layer, stream.summed(), embedded, skipped, ages))
    if layer.stream_gain is None:
        embedded = None
    elif stream.embedded is not None:
        embedded = stream.embedded
    total, read, first, embedded = _mixed(
        Streams(stream.x, stream.y, skipped if layer.skip_gain is not None else None, embedded,
                layer.stream_gain, stream.gain, layer.skip_gain, layer.embedded_gain), layer.norm,
        first=stream.kept)
    if stream.kept:
        stream.x, stream.y = first, None
    y, _ = layer.mixer(read, None, *() if ages is None else (ages,))
    gain = layer.mixer_gain
    if layer.mlp is not None and layer.mlp_norm is not None:
        total, read, *_ = _mixed(Streams(total, y, y_gain=gain), layer.mlp_norm)
        y, gain = layer.mlp(read, activate), layer.mlp_gain
    return Stream(total, y, gain, embedded, layer.is_kept)


def fused_head_loss(
    model: ByteLM, x: Tensor | Stream, targets: Tensor, gate: nn.Module | None = None,
    offset: Tensor | None = None, predictions: Tensor | None = None,
) -> Tensor:
    """What :func:`mambabyte.model.lm.head_loss` does, arguments as there, without logits in
    float32."""
    stream = x if isinstance(x, Stream) else Stream(x)
    if not _known(model.norm_f):
        return head_loss(model, stream.summed(), targets, gate, offset, predictions)
    hidden = _mixed(Streams(stream.x, stream.y, y_gain=stream.gain), model.norm_f).normed
    share = None if gate is None else gate(hidden).flatten(0, 1)
    logits = model.uncapped(hidden).flatten(0, 1)
    del hidden  # as in head_loss
    return cross_entropy(
        logits, targets.flatten(), model.config.logit_softcap, share,
        None if offset is None else offset.flatten(0, 1), predictions)


class _Loss(nn.Module):
    """A model's loss as the forward pass of a module, whose weights can then be others."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(*batch)


class _CastAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        return _copied(dtype, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        found = iter(_copied(ctx.dtype, [g for g in grads if g is not None]))
        return None, *(None if g is None else next(found) for g in grads)


def _copied(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def cast_together(model: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss``, a method of ``model``, whose linear maps find their weights and biases cast as
    autocast would cast them, in one launch for all of them; their gradients too, back."""
    module = _Loss(model, loss)
    wide = {f"{prefix}.{name}.bias" for prefix, mixer in named_mixers(module, Mixer).items()
            for name in mixer.wide_biases}
    weights = {f"{prefix}.{name}": weight for prefix, part in module.named_modules()
               if is_linear(part) for name, weight in part.named_parameters()
               if weight.dtype == torch.float32 and f"{prefix}.{name}" not in wide}

    def run(*batch: Tensor) -> Tensor:
        if not weights or not autocasts(batch[0].device):
            return loss(*batch)
        dtype = torch.get_autocast_dtype(batch[0].device.type)
        cast = _CastAll.apply(dtype, *weights.values())
        found: Tensor = functional_call(module, dict(zip(weights, cast, strict=True)), batch)
        return found

    return run


def _known(*norms: nn.Module | None) -> bool:
    return all(norm is None or is_plain(norm, RMSNorm) or is_plain(norm, nn.LayerNorm)
               for norm in norms)


def _mixed(streams: Streams, norm: nn.Module | None = None, first: bool = False) -> Mixed:
    """The sum, and the norm of it in the type in which a linear map reads it."""
    x = streams.x
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
    if streams.y is not None:
        streams = streams._replace(y=streams.y.to(dtype))
    given = Norm()
    if isinstance(norm, nn.LayerNorm):
        given = Norm("layer", norm.eps, norm.weight, norm.bias)
    elif norm is not None:
        assert isinstance(norm, RMSNorm)
        given = Norm("rms", norm.eps, norm.weight)
    return mix_norm(streams, given, dtype, first)
