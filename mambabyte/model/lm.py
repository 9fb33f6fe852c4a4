"""ByteLM: embedding, a pattern of mixers in pre-norm blocks, final norm, tied head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.public import Layout
from mambabyte.errors import UserError
from mambabyte.model import sequence
from mambabyte.model.block import Block, RMSNorm, make_norm
from mambabyte.model.mixer import LayerState, Mixer, linear, mixer_of
from mambabyte.model.pretrained import Report, fill, open_pretrained, save_pretrained
from mambabyte.ops.arguments import Ages, document_ages, once
from mambabyte.ops.fused.linear import linear as biased
from mambabyte.ops.fused.loss import NOT_PREDICTED, cross_entropy_in_torch


class _Embed(torch.autograd.Function):
    """Rows of a table, with a gradient that is a product with the one-hot tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = table.shape[0]
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        places = ctx.saved_tensors[0].flatten()[None]
        hot = grad.new_zeros(ctx.rows, places.shape[1], dtype=torch.bfloat16)
        hot.scatter_(0, places, 1.0)  # a comparison with every row would write it twice
        return None, (hot @ grad.flatten(0, -2).to(torch.bfloat16)).to(grad.dtype)


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` (V, d) for tokens of any shape (...): (..., d).

    On a GPU, torch sorts the tokens for the gradient, which takes 20 launches and several times as
    long as a product with their one-hot form. Under bf16 autocast it is that product, in bf16 with
    sums in float32 as the gradient of every other matrix there; otherwise it is torch's.
    """
    bf16 = tokens.is_cuda and torch.is_autocast_enabled("cuda") and (
        torch.get_autocast_dtype("cuda") == torch.bfloat16)
    small = table.dtype == torch.float32 and len(table) <= 1024
    if bf16 and torch.is_grad_enabled() and small:
        return _Embed.apply(tokens, table)
    return F.embedding(tokens, table)


def symbols(tokens: Tensor, least: int = 1, device: torch.device | None = None) -> Tensor:
    """``tokens`` (B, L) of any integers as int64; UserError for another type, shape, an L below
    ``least``, or another device where one is given."""
    if not isinstance(tokens, Tensor) or tokens.is_nested or tokens.layout != torch.strided:
        kind = "of type " + type(tokens).__name__ if not isinstance(tokens, Tensor) else (
            "nested" if tokens.is_nested else str(tokens.layout))
        raise UserError(f"tokens are {kind}: expected a dense tensor of integers (batch, length), "
                        "such as torch.tensor([list(b'text')])")
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise UserError(f"tokens are {tokens.dtype}: expected integers, bytes for one")
    if tokens.ndim != 2 or tokens.shape[1] < least:
        raise UserError(f"tokens have shape {tuple(tokens.shape)}: expected (batch, length), with "
                        f"a length of at least {least}")
    if device is not None and tokens.device != device:
        raise UserError(f"tokens are on {tokens.device} and the model on {device}: move them, "
                        f"tokens.to({str(device)!r})")
    return tokens.long()


def _check_states(states: Any, layers: Sequence[Block], batch: int) -> None:
    """UserError for what is no state of these layers and ``batch`` texts."""
    if not isinstance(states, list | tuple) or len(states) != len(layers):
        size = f" of {len(states)}" if isinstance(states, list | tuple) else ""
        raise UserError(f"state is a {type(states).__name__}{size}: expected what an earlier call "
                        f"gave back, a list of {len(layers)}, one a layer; or None at the start")
    for i, (state, layer) in enumerate(zip(states, layers, strict=True)):
        if state is None:
            continue
        # A module that replaced a layer, as an adapter's, may name no kind: any state is taken.
        kind = getattr(getattr(layer, "mixer", None), "state_kind", object)
        if not isinstance(state, kind):
            raise UserError(f"state {i} is a {type(state).__name__}: expected a {kind.__name__}, "
                            "as an earlier call of this model gave back")
        rows = {len(t) for t in state if isinstance(t, Tensor)} if isinstance(state, tuple) else ()
        if any(n != batch for n in rows):
            raise UserError(f"state {i} is of {max(rows)} texts beside {batch} of tokens: expected "
                            "a row a text; mambabyte.stream.states has select and stack")


def _refuse_unknown(tokens: Tensor, size: int) -> None:
    """UserError for symbols that a model of ``size`` symbols does not have. Asked when a CPU has
    found one; a GPU ends the process with an assertion of its own."""
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= size:
        raise UserError(f"tokens are from {low} to {high}: the model has {size} symbols, from 0 "
                        "on") from None


def without_state(
    layer: nn.Module, x: Tensor, embedded: Tensor | None = None, skip: Tensor | None = None,
    ages: Tensor | None = None,
) -> Tensor:
    """A layer from the first byte on: ages (B, L), the rest (B, L, d_model). The state it ends in
    is not kept."""
    return layer(x, None, embedded, skip, ages)[0]


def head_loss(
    model: ByteLM, x: Tensor, targets: Tensor, gate: nn.Module | None = None,
    offset: Tensor | None = None, predictions: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of the bytes ``targets`` (B, L), x (B, L, d_model) behind the
    last layer. ``gate`` of what the head reads (B, L, 1) times ``offset`` (B, L, V) is added to the
    logits where they are given. With ``predictions`` it is the sum over targets that are not
    NOT_PREDICTED, divided by that number."""
    hidden = model.norm_f(x)
    share = None if gate is None else gate(hidden).flatten(0, 1)
    logits = model.uncapped(hidden).flatten(0, 1)
    del hidden  # under autocast the head keeps a cast of it: this one would live through the loss
    return cross_entropy_in_torch(
        logits, targets.flatten(), model.config.logit_softcap, share,
        None if offset is None else offset.flatten(0, 1), predictions)


class ByteLM(nn.Module):
    """A language model over bytes whose layers follow ``config.layer_pattern``.

    ``mixers`` puts other classes in place of the registered ones, by letter, for a study of them.
    """

    def __init__(
        self, config: ModelConfig, mixers: Mapping[str, type[Mixer]] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise UserError(f"config is of type {type(config).__name__}: expected a ModelConfig, "
                            "such as get_preset('mamba_byte').model")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # torch's default N(0, 1) through a tied head starts near a loss of 185, not ln(256).
        nn.init.normal_(self.embedding.weight, std=config.embed_std)
        kinds = {letter: mixer_of(letter) for letter in config.layers} | dict(mixers or {})
        self.kinds = kinds
        self.layers = nn.ModuleList(
            Block(config, kinds[letter], skip is not None, i in config.skips)
            for i, (letter, skip) in enumerate(zip(config.layers, config.skips, strict=True)))
        self.norm_f = make_norm(config)
        self.norm_embedding = RMSNorm(config.d_model) if config.embed_norm_gain else None
        self.head = None if config.tied_head else linear(
            config, config.d_model, config.vocab_size)
        if self.head is not None and config.zero_init_out:
            nn.init.zeros_(self.head.weight)
        # How training runs a layer and what is behind the last, and in which type the residual
        # stream adds up; a fast step replaces them. What is handed from layer to layer and to the
        # head is theirs to choose.
        self.run_layer: Callable[..., Any] = without_state
        self.run_head: Callable[..., Tensor] = head_loss
        self.residual_dtype: torch.dtype | None = None
        # The processes that each have a stretch of every sequence; None: this one has all of it.
        self.sequence_group: sequence.SequenceGroup | None = None

    @classmethod
    def from_pretrained(
        cls, path: Path | str, device: str = "cpu", report: Report | None = None
    ) -> ByteLM:
        """The model in a folder of transformers, mamba_ssm, MambaByte or this package, in float32.

        The folder has config.json and safetensors (docs/convert.md). ``report`` is told the share
        that is loaded. Raises UserError, before anything is loaded, for pickles, for a model that
        this package does not have, and for one that does not fit into memory.
        """
        return cast(ByteLM, fill(open_pretrained(path, cls), device, report))

    def save_pretrained(self, path: Path | str, layout: Layout = "transformers") -> Path:
        """Write the folder that ``layout``'s library loads: "transformers", "mamba_ssm", or
        "mambabyte", a checkpoint of this package.

        Weights are written in their own dtype. Raises UserError where the library has no such
        model (for another one it must be all Mamba or all Mamba-2, without MLPs), and for one whose
        modules were replaced.
        """
        with torch.device("meta"):
            expected = ByteLM(self.config).state_dict()
        weights = self.state_dict()
        if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in expected.items()}:
            odd = min(weights.keys() ^ expected.keys(), default="a shape")
            raise UserError(f"the model is not what its configuration makes ({odd}): take its "
                            "adapters or other modules out before it is written")
        return save_pretrained(path, self.config, weights.items(), layout)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return cast(list[Block], list(self.layers))

    def share_sequences(self, shared: sequence.SequenceGroup | None) -> None:
        """From now on, split the length of every sequence among these processes; None stops it.
        UserError for a mixer that cannot be split."""
        for letter, kind in self.kinds.items():
            if shared is not None and not kind.splits_length:
                raise UserError(f"layers {letter!r} ({kind.about}) cannot share a sequence among "
                                "processes: train with context_parallel 1")
        self.sequence_group = shared

    def forward(
        self, tokens: Tensor, state: list[LayerState] | None = None,
        document_starts: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """Logits of the byte after each of ``tokens``, and the state to go on from.

        tokens (B, L) integers; returns (B, L, V) and one state a layer. Feeding a sequence in
        pieces, each with the state of the one before, gives what one call gives. With a
        ``sequence_group`` all its processes give the same and get the same: each computes its
        stretch, unless there are fewer bytes than processes. States then carry no gradient.

        ``document_starts`` says where documents begin that lie one behind another in a row, bool
        (B, L), or for one row also their first places or cumulative lengths: each is read as if it
        were alone, with neither value nor gradient across, and the state that comes back is that of
        each row's last. Raises UserError for starts that do not fit.
        """
        tokens = symbols(tokens, device=self.device)
        ages = document_ages(document_starts, tokens)
        shared, length = self.sequence_group, tokens.shape[1]
        if shared is not None and length < shared.size:
            shared = None
        try:
            with sequence.split(shared, length, ages) as piece:
                x = self.embedding(sequence.own(tokens))
                hidden, states = self.hidden(x, state, sequence.own_ages(ages))
                logits = self.logits(hidden)
        except IndexError:
            _refuse_unknown(tokens, self.config.vocab_size)
            raise
        if piece is None:
            return logits, states
        return piece.gather(logits, 1), piece.last(states)

    def aligned(self, states: Sequence[list[LayerState]]) -> list[list[LayerState]]:
        """States of single texts as rows of one batch can have them; see ``Mixer.aligned``."""
        layers = [block.mixer.aligned(column) for block, column in zip(
            self.blocks, zip(*states, strict=True), strict=True)]
        return [list(state) for state in zip(*layers, strict=True)]

    def reconfigured(self, **changes: Any) -> ByteLM:
        """A model of the same weights, shared with this one, under a configuration changed in
        what shapes no weight, such as ``attention_window`` or ``scan_form``."""
        with torch.device("meta"):
            other = ByteLM(replace(self.config, **changes), self.kinds)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return other.train(self.training)

    def hidden(
        self, x: Tensor, state: list[LayerState] | None = None, ages: Tensor | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """From embedded bytes (B, L, d_model) to what the head reads, of the same shape; ``ages``
        as in :meth:`Mixer.forward`."""
        states: list[LayerState] = []
        if state is not None:
            _check_states(state, self.blocks, len(x))

        def run(layer: nn.Module, *streams: Tensor | None) -> Tensor:
            x, *read = streams
            y, after = layer(x, None if state is None else state[len(states)], *read, ages)
            states.append(after)
            return cast(Tensor, y)

        return self.norm_f(self._through(x, run)), states

    def through_layers(self, x: Tensor, ages: Tensor | None = None) -> Any:
        """For training: from embedded bytes (B, L, d_model) to what ``run_head`` reads, without
        states; layers as ``run_layer`` does."""
        return self._through(
            x if self.residual_dtype is None else x.to(self.residual_dtype),
            lambda layer, *streams: self.run_layer(layer, *streams, ages))

    def _through(self, x: Any, run: Callable[..., Any]) -> Any:
        """Embedded bytes (B, L, d_model) through the layers, each by ``run(layer, x, embedded,
        skip)``; the last two, where no layer reads them, are None."""
        config = self.config
        if self.norm_embedding is not None:
            x = self.norm_embedding(x)
        elif config.embed_norm:
            x = F.rms_norm(x, (x.shape[-1],))
        embedded = x if config.residual_mix else None
        outputs: dict[int, Any] = {}
        for i, (layer, skip) in enumerate(zip(self.layers, config.skips, strict=True)):
            x = run(layer, x, embedded, None if skip is None else outputs.pop(skip))
            if i in config.skips:
                outputs[i] = x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, V), capped where the configuration says so."""
        logits, cap = self.uncapped(hidden), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def uncapped(self, hidden: Tensor) -> Tensor:
        """:meth:`logits` before the cap."""
        table = self.embedding if self.head is None else self.head
        return biased(hidden, table.weight, getattr(table, "bias", None))

    def loss(
        self, tokens: Tensor, document_starts: Tensor | Ages | None = None,
        predictions: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens[:, 1:] from tokens[:, :-1].

        tokens (B, L + 1) integers; UserError where there is nothing to predict. With a
        ``sequence_group`` all its processes give the same tokens, and each gets its stretch's share
        of the loss, so that the mean over them is the loss; UserError for fewer than one each.

        ``document_starts`` (B, L + 1) bool is as in :meth:`forward`, or its ages where these are
        known; the first byte of a document is not predicted.
        ``predictions`` (B,), added up, is what to divide by in place of the number of predictions:
        then parts of a batch have gradients that add up to its mean's.
        """
        tokens = symbols(tokens, least=2, device=self.device)
        if not len(tokens):
            raise UserError("tokens have no rows: the mean over an empty batch is no number")
        try:
            if document_starts is not None:
                return self._loss_of_documents(tokens, document_starts, predictions)
            with sequence.split(self.sequence_group, tokens.shape[1] - 1) as piece:
                x = embed(sequence.own(tokens[:, :-1]), self.embedding.weight)
                loss = self.run_head(self, self.through_layers(x), sequence.own(tokens[:, 1:]))
                return loss if piece is None else loss * piece.weight
        except IndexError:
            _refuse_unknown(tokens, self.config.vocab_size)
            raise

    def _loss_of_documents(
        self, tokens: Tensor, document_starts: Tensor | Ages, predictions: Tensor | None
    ) -> Tensor:
        ages = document_ages(document_starts, tokens)
        assert ages is not None
        first = ages[:, 1:] == 0
        if predictions is None:
            predictions = (~first).sum().clamp(min=1)
        targets = tokens[:, 1:].masked_fill(first, NOT_PREDICTED)
        ages = ages[:, :-1].contiguous()
        if isinstance(document_starts, Ages):
            most = document_starts.most
            once(ages, "most", lambda: most)
        with sequence.split(self.sequence_group, ages.shape[1], ages):
            x = embed(sequence.own(tokens[:, :-1]), self.embedding.weight)
            loss: Tensor = self.run_head(
                self, self.through_layers(x, sequence.own_ages(ages)), sequence.own(targets),
                predictions=predictions.sum())
        return loss if self.sequence_group is None else loss * self.sequence_group.size
