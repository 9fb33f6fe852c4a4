"""A whole byte model on the GPU, byte after byte: ``ops/stream/stream.cu`` and ``hybrid.cu``.

Through torch a byte of a small model costs some fifty launches; here many bytes are one launch.
Models of plain Mamba layers alone go by the first kernel, all others by the second.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config.scan_forms import decays_input
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer, MambaState
from mambabyte.ops.mamba.step import MAX_TAPS
from mambabyte.ops.scan.operator import MAX_STATES, fused_available
from mambabyte.ops.stream.cuda import CudaStreamer, LayerWeights, Shape, StreamState, cluster_blocks
from mambabyte.ops.stream.feeding import VOCABULARY, nothing
from mambabyte.ops.stream.hybrid import HybridState
from mambabyte.ops.stream.server import Served
from mambabyte.stream.engines import cpu, hybrid
from mambabyte.stream.engines.base import Engine, Network, TorchEngine
from mambabyte.stream.engines.cpu import (
    NativeModel,
    foreign_layers,
    plain_parts,
    say_foreign,
    supports,
)
from mambabyte.stream.engines.layout import is_known
from mambabyte.stream.states import copy, kept_in, kind, mapped, tensors_of

_LOG = logging.getLogger(__name__)
HOST_PARAMETERS = 4_000_000  # as many are sooner read on the host than launched through torch
MOST_BYTES = 256  # fed in one call; longer texts are faster in parallel
PIECE = 4096  # bytes whose log-probabilities are fetched at a time
FIRST_DRAW = 16  # bytes of the first launch that draws: they come soon


def unsupported(model: nn.Module) -> str:
    """Why :class:`CudaEngine` cannot stream ``model``, in one line; empty where it can."""
    if type(model) is not ByteLM:
        return "only a ByteLM runs in one kernel"
    config, device = model.config, model.device
    if device.type != "cuda":
        return f"the model is on {device}, not on a GPU"
    available, reason = fused_available(device)
    if not available:
        return reason
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "the kernel needs compute capability 9.0 or later"
    if config.vocab_size != VOCABULARY:
        return f"the kernel takes {VOCABULARY} symbols"
    if config.scan_form not in ("auto", "fused") and not decays_input(config.scan_form):
        return f"scan_form {config.scan_form!r} is not the kernel's"
    if torch.is_autocast_enabled("cuda") or any(p.dtype is torch.float64
                                                for p in model.parameters()):
        return "the kernel computes in float32"
    if not is_known(model):
        return ("the model has hooks, foreign, parametrized or replaced parts, or a mixer of "
                "another form or window than its configuration")
    return "" if _is_plain(model) else hybrid.unsupported(model)


def _is_plain(model: ByteLM) -> bool:
    """Whether the kernel for Mamba layers alone, which is the quicker one, can stream it."""
    c = model.config
    return (set(c.layers) == {MambaMixer.letter} and c.dt_rank != "full" and not c.has_extras
            and c.d_model % 4 == 0 and 2 <= c.d_conv <= MAX_TAPS and c.d_state <= MAX_STATES
            and cluster_blocks(shape_of(model), model.device.index) > 0)


def shape_of(model: ByteLM) -> Shape:
    """What the kernel is compiled for."""
    c = model.config
    tiny = torch.finfo(model.embedding.weight.dtype).eps
    eps = getattr(model.norm_f, "eps", None)
    return Shape(
        c.n_layer, c.d_model, c.d_inner, c.d_state, c.dt_rank_value, c.d_conv, c.mlp_hidden,
        c.mlp_activation, c.norm == "layer", eps if isinstance(eps, float) else tiny,
        tiny if c.embed_norm else None, c.logit_softcap, decays_input(c.scan_form),
    )


def engine_for(model: Any) -> Engine:
    """What a model on a GPU streams by."""
    if names := foreign_layers(model):
        say_foreign(names)
    why = unsupported(model)
    if not why:
        return CudaEngine(model)
    if type(model) is not ByteLM:
        return TorchEngine(model, why)
    known = is_known(model) and not torch.is_autocast_enabled("cuda")
    found = _without_kernel(model, why) if known else TorchEngine(model, why)
    say_slow(found.name)
    return found


def _without_kernel(model: ByteLM, why: str) -> Engine:
    """The best there is for a model of known parts that no kernel has."""
    few = sum(p.numel() for p in model.parameters()) <= HOST_PARAMETERS
    if few and supports(on_host := deepcopy(model).cpu().float()):
        return HostEngine(model, on_host, why)
    return CapturedEngine(model, why)


@functools.cache
def say_slow(name: str) -> None:
    """Say once how a model streams that no kernel on the card has."""
    _LOG.warning("note: a model streams by %s", name)


def network_for(model: ByteLM, guided: nn.Module) -> Network:
    """What the network ``model`` of ``guided`` (task/guide.py) goes on by on a GPU."""
    if unsupported(model) or hybrid.unsupported(model):
        return Network(model)
    return CudaGuided(model, guided) if plain_parts(guided) else CudaNetwork(model)


class CudaEngine(Engine):
    """Up to MOST_BYTES bytes of a model that is not ``unsupported`` in one kernel; more by torch.

    The weights are the model's at the time of construction. Arithmetic and states are float32,
    also where the model's weights are not.
    """

    sees_nan = draws = True

    def __init__(self, model: ByteLM) -> None:
        self._parallel = TorchEngine(model)
        # Forms that decay a step's input overflow where the kernel does not: longer texts are
        # the model's own to read.
        self._most = 0 if decays_input(model.config.scan_form) else MOST_BYTES
        self._states = _States(model)
        self.streamer, self.name = self._states.streamer, self._states.name
        self.guesses = hasattr(self.streamer, "guess_and_draw")

    def for_model(self, state: Any) -> Any:
        return self._states.for_model(state)

    def __call__(
        self, data: bytes, state: Any, meanwhile: Callable[[], None] = nothing
    ) -> tuple[Tensor, Any]:
        """Also calls ``meanwhile``, while the card has the last byte."""
        if len(data) > self.streamer.alone:
            meanwhile()
            return self._several(data, state)
        feed, state = self.streamer.feed_byte, self._states.from_model(state)
        for byte in data[:-1]:  # nothing is recorded; inference mode would cost what a byte does
            state = feed(byte, state)[1]
        return feed(data[-1], state, meanwhile)

    beside = __call__

    @torch.inference_mode()
    def _several(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        if len(data) > self._most:
            return self._parallel(data, self.for_model(state))
        log_probs, state = self.streamer.feed(
            self.streamer.text(data), self._states.from_model(state))
        return log_probs[0].cpu(), state

    @torch.inference_mode()
    def each(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        parts, state = [], self._states.from_model(state)
        for start in range(0, len(data), PIECE):
            tokens = self.streamer.text(data[start : start + PIECE])
            log_probs, state = self.streamer.feed(tokens, state, all_positions=True)
            parts.append(log_probs[0])
        return torch.cat(parts).cpu(), state

    @torch.inference_mode()
    def draw(
        self, log_probs: Tensor, state: Any, length: int, temperature: float, top_k: int,
        top_p: float, seed: int,
    ) -> Iterator[tuple[bytes, Tensor, Any]]:
        state, done, piece = self._states.from_model(state), 0, FIRST_DRAW
        after = log_probs.to(self.streamer.device)[None]
        while done < length:
            piece = min(piece, length - done)
            drawn, after, state = self.streamer.draw(
                after, state, piece, temperature, top_k, top_p, seed, done)
            done, piece = done + piece, min(2 * piece, self.streamer.most_drawn)
            yield bytes(drawn[0].tolist()), after[0].cpu(), state

    @torch.inference_mode()
    def guess_and_draw(
        self, log_probs: Tensor, state: Any, length: int, past: bytes, temperature: float,
        top_k: int, top_p: float, seed: int,
    ) -> Iterator[tuple[bytes, Tensor, Any, int, int]]:
        state, done, piece = self._states.from_model(state), 0, FIRST_DRAW
        after = log_probs.to(self.streamer.device)[None]
        while done < length:
            piece = min(piece, length - done)
            drawn, after, state, counts = self.streamer.guess_and_draw(
                after, state, piece, past, temperature, top_k, top_p, seed, done)
            data = bytes(drawn[0].tolist())
            past, done, piece = past + data, done + piece, min(2 * piece, self.streamer.most_drawn)
            yield data, after[0].cpu(), state, *counts.tolist()


class OnHost(list[Any]):  # states of layers, float32
    pass


class HostEngine(Engine):
    """A small model that no kernel has, in C on the host by the weights of now: there a byte takes
    less time than its launches through torch."""

    def __init__(self, model: ByteLM, on_host: ByteLM, why: str) -> None:
        self._parallel, self._native = TorchEngine(model), NativeModel(on_host)
        self._device, self._dtype = model.device, model.embedding.weight.dtype
        self.name = f"model.c, on the host: {why}"

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        if len(data) > cpu.MOST_BYTES:
            return self._parallel(data, self.for_model(state))
        log_p, state = self._native(data, self._here(state))
        return log_p, OnHost(state)

    def ahead(self, data: bytes, state: Any) -> tuple[Tensor, Callable[[int], Any]] | None:
        """As ``NativeModel.ahead``; None for more than cpu.MOST_BYTES bytes."""
        return self._native.ahead(data, self._here(state)) if len(data) <= cpu.MOST_BYTES else None

    def for_model(self, state: Any) -> Any:
        there = mapped(lambda t: t.to(self._device), [*(state or ())])
        return [kept_in(layer, self._dtype) for layer in there] or None

    def _here(self, state: Any) -> Any:
        if state is None or isinstance(state, OnHost):
            return state
        return OnHost(mapped(lambda t: t.float().cpu().contiguous(), [*state]))


class CapturedEngine(Engine):
    """A model that no kernel has: the launches of one byte are captured once as a CUDA graph, where
    a state is as large after a byte as before it (without attention)."""

    def __init__(self, model: ByteLM, why: str) -> None:
        self._model, self._parallel = model, TorchEngine(model)
        self.name = f"torch, captured: {why}"
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kind: Hashable = None  # of the states that the graph takes

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        if len(data) > 1 or state is None:
            return self._parallel(data, state)
        with self._lock, torch.inference_mode(), torch.cuda.device(self._model.device):
            graph = self._graph or self._captured(state)
            if kind(state) != self._kind:
                return self._parallel(data, state)
            self._token.fill_(data[0])
            torch._foreach_copy_(self._before, list(tensors_of(state)))
            graph.replay()
            return self._log_p.cpu(), copy(self._after)

    def _captured(self, state: Any) -> torch.cuda.CUDAGraph:
        self._token = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        before = copy(state)
        self._before = list(tensors_of(before))

        def step() -> tuple[Tensor, Any]:
            logits, after = self._model(self._token, before)
            return torch.log_softmax(logits[0, -1].float(), -1), after

        aside = torch.cuda.Stream(self._model.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or tuned at first use
            self._log_p, self._after = step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = self._graph = torch.cuda.CUDAGraph()
        if kind(self._after) == kind(state):
            try:
                with torch.cuda.graph(graph):
                    self._log_p, self._after = step()
            except RuntimeError as error:  # a card or a torch that cannot
                say_slow(f"its step cannot be captured: {error}".splitlines()[0])
                return graph
            self._kind = kind(state)
        return graph


class CudaNetwork(Network):
    """The layers in one kernel where the bytes are those of one text, and few; the weights are
    those at the time of construction."""

    def __init__(self, model: ByteLM, guided: nn.Module | None = None) -> None:
        super().__init__(model)
        self._states = _States(model, False, guided)
        self.name = self._states.name

    def for_model(self, state: Any) -> Any:
        return self._states.for_model(state)

    @torch.inference_mode()
    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if len(x) != 1 or x.shape[1] > MOST_BYTES:
            return self._model.hidden(x, self.for_model(state))
        hidden, state = self._states.streamer.hidden(x, self._states.from_model(state))
        return hidden.to(x.dtype), state


class CudaGuided(CudaNetwork):
    """The same with what embeds the hints, and the gate, in that kernel."""

    hints = fills = True

    def guided(self, data: bytes, state: Any, hint: Sequence[Tensor]) -> tuple[Tensor, Any]:
        log_p, best, kind = hint
        # A row a byte, and one copy to the card; the two small numbers in the bytes of a float.
        small = F.pad(torch.stack([best, kind], 1), (0, 2)).view(torch.float32)
        rows = torch.cat([log_p, small], 1)
        streamer = self._states.streamer
        return streamer.guided(data, rows[None].to(streamer.device),
                               self._states.from_model(state))

    def guided_byte(
        self, data: bytes, state: Any, fill: Callable[[int, int, int], None],
        meanwhile: Callable[[], None] = nothing,
    ) -> tuple[Tensor, Any]:
        return self._states.streamer.feed_byte(
            data[0], self._states.from_model(state), meanwhile, fill)


class _States:
    """A model's streamer, and its states in and out of the model's own form."""

    def __init__(
        self, model: ByteLM, plain: bool = True, guided: nn.Module | None = None
    ) -> None:
        self._dtype = model.embedding.weight.dtype
        self.streamer: Any
        self.name = "stream.cu" if plain and _is_plain(model) else "hybrid.cu"
        if self.name == "stream.cu":
            head = model.embedding if model.head is None else model.head
            with torch.no_grad():
                self.streamer = CudaStreamer(
                    shape_of(model), model.embedding.weight, [_weights(b) for b in model.layers],
                    _norm(model.norm_f, model.embedding.weight[0]), head.weight)
        else:
            self.streamer = hybrid.hybrid_streamer(model, guided)

    def from_model(self, state: Any) -> StreamState | Served | HybridState:
        """A model's list of layer states as the kernel takes them; None is the state before the
        first byte."""
        if isinstance(state, (StreamState, Served, HybridState)):  # a union is made anew each time
            return state
        if state is None:
            return self.streamer.new_state(1)
        if isinstance(self.streamer, CudaStreamer):
            return StreamState(
                torch.stack([s.conv_state.float() for s in state]),
                torch.stack([s.ssm_state for s in state]))
        return hybrid.hybrid_state(self.streamer, state)

    def for_model(self, state: Any) -> Any:
        """The inverse of ``from_model``."""
        if isinstance(state, HybridState):
            return [kept_in(layer, self._dtype)
                    for layer in hybrid.hybrid_layers(self.streamer, state)]
        if not isinstance(state, (StreamState, Served)):
            return state
        state = self.streamer.outside(state)
        return [MambaState(conv_state.to(self._dtype), ssm_state)
                for conv_state, ssm_state in zip(state.tail, state.ssm, strict=True)]


def _norm(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer or RMS norm over ``like`` (d_model,), which may have neither."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (torch.ones_like(like) if weight is None else weight,
            torch.zeros_like(like) if bias is None else bias)


def _weights(block: Any) -> LayerWeights:
    m, mlp = block.mixer, block.mlp
    like = m.in_proj.weight[0]
    conv_bias = torch.zeros_like(m.D) if m.conv1d.bias is None else m.conv1d.bias
    return LayerWeights(
        _norm(block.norm, like), m.in_proj.weight, m.conv1d.weight.squeeze(1), conv_bias,
        m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias, -torch.exp(m.A_log.float()), m.D,
        m.out_proj.weight,
        None if block.mlp_norm is None else _norm(block.mlp_norm, like),
        None if mlp is None else mlp.up_proj.weight,
        None if mlp is None else mlp.out_proj.weight,
    )
