"""What a sequence mixer is: one class that answers every question about itself, and the registry.

Adding one is writing a class that extends :class:`Mixer` and registering it under a letter::

    @register("E")
    class MovingAverage(Mixer):
        about = "moving average"
        ...

From then on "E" may stand in ``layer_pattern``. Training, scoring, streaming, checkpoints and the
closed forms of parameters, operations and memory ask the class, and nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import SPECS, MixerSpec, Shape, add_spec, letters_in_words
from mambabyte.errors import UserError
from mambabyte.ops.arguments import without_autocast
from mambabyte.ops.fused.linear import linear as biased

FLOAT32 = 4  # bytes
# What can check a closed form of operations: torch's counter sees matrix products and
# convolutions, and no others.
MATMUL, CONVOLUTION, FORMULA = "matrix product", "convolution", "formula only"

# A layer's state: a named tuple of tensors with the batch first, and of whole numbers.
LayerState = Any


class Operations(NamedTuple):
    """Floating-point operations of one part of a mixer, for one byte and one layer."""

    module: str
    forward: float
    exp: float = 0.0  # exponentials, logarithms, roots and divisions of the forward pass
    kind: str = MATMUL  # what can check it: MATMUL, CONVOLUTION or FORMULA
    backward_ratio: float = 2.0  # backward operations for one forward


class Kept(NamedTuple):
    """One tensor that autograd keeps of a layer's forward pass for its backward pass."""

    part: str
    tensor: str
    elements: int
    itemsize: int


@dataclass(frozen=True)
class Step:
    """The training step that a closed form of memory is about."""

    batch: int
    length: int  # bytes in a sequence
    dtype: torch.dtype = torch.float32  # of a layer's streams: autocast's where there is autocast
    device: str = "cpu"  # or "cuda"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Around:
    """Bytes that are there besides, when a step's memory is at its mixer."""

    held: int  # kept by the layers below and by this one whole
    mlp: int  # of these, this layer's MLP's, free once the backward pass is at the mixer
    residual: int  # one gradient or copy of the residual stream
    done: int  # gradients of weights behind the mixer, at the backward pass
    above: int  # gradients of weights of the layers above alone
    checkpointing: bool  # the layer goes forward a second time, in the backward pass


class Mixer(nn.Module, MixerSpec):
    """A causal map of sequences with a state. One function for training, scoring and streaming.

    A subclass gives ``__init__(config)``, ``forward``, and as class methods ``shapes`` (from
    MixerSpec), ``state_shapes``, ``operations`` and ``kept``. The rest has defaults. Its names of
    parameters decide how optimizers treat them: see ``MixerSpec.role``.
    """

    # Linear maps that read the normalised input: each keeps a cast of it under autocast.
    readers: ClassVar[int] = 1
    has_decays: ClassVar[bool] = False  # whether ``exponent`` has an answer
    state_name: ClassVar[str] = "state"  # what its state is called in tables of sizes
    state_kind: ClassVar[type] = object  # what its state is; another's is refused
    # Whether to use kernels that join what torch.compile would; set by a fast step.
    fused: bool = False
    # Linear maps whose bias it adds by itself, in float32 whatever autocast says.
    wide_biases: ClassVar[tuple[str, ...]] = ()
    # Whether ``forward`` asks mambabyte.model.sequence for what comes before its stretch.
    splits_length: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(
        self, x: Tensor, state: LayerState | None, ages: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, L, d_model) after ``state``, None before the first byte: y (B, L, d_model) and the
        state to go on from. One call and the same bytes in pieces give the same.

        ``ages`` (B, L) uint8, where documents lie one behind another in a row: how many bytes each
        is behind the start of its own, of ``document_ages`` (mambabyte.ops.arguments). Nothing may
        cross a start, an age of 0: each document is as if it were alone, and the state that comes
        back is that of the last. It is given where there are documents, else left out."""
        raise NotImplementedError(f"{type(self).__name__} has no forward pass")

    # ---------------------------------------------------------------- what training asks for

    def prepare(self, context: int) -> None:
        """Get ready for many sequences of ``context`` bytes; values do not change."""

    def aligned(self, states: Sequence[LayerState]) -> list[LayerState]:
        """States of single texts as rows of one batch can have them: of equal shapes and counts of
        bytes. What each text goes on with stays the same, up to rounding."""
        return list(states)

    def as_configured(self, config: ModelConfig) -> bool:
        """Whether it still computes what ``config`` says: attributes can be changed."""
        return True

    def exponent(self, x: Tensor, state: LayerState | None, chunk: int) -> float | None:
        """The largest exponent that a log-cumsum over ``chunk`` steps would take on these inputs
        of ``forward``; None for a mixer without decays."""
        return None

    def log_decays(self, x: Tensor) -> Tensor | None:
        """Logarithm of the share that each step keeps of each number of the state, on inputs x
        (B, L, d_model) of a sequence from its first byte: (B, L, ...), float32, none above 0, its
        last axes the first of the state's; None for a mixer without decays."""
        return None

    def against_definition(self, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(found, by the definition in float64) of its own operator on x (B, L, d_model), by what
        is compared: "output", "state", "gradient". Empty for a mixer that is its definition."""
        return {}

    # -------------------------------------------------------------------------- closed forms

    @classmethod
    def state_shapes(cls, config: ModelConfig, seen: int) -> dict[str, Shape]:
        """Shapes of the tensors of one stream's state after ``seen`` bytes, all float32."""
        raise NotImplementedError(f"{cls.__name__} does not say the shapes of its state")

    @classmethod
    def knows_documents(cls) -> bool:
        """Whether ``forward`` takes ``ages``."""
        return "ages" in inspect.signature(cls.forward).parameters

    @classmethod
    def state_bytes(cls, config: ModelConfig, seen: int) -> int:
        """Bytes of one layer's state of one stream after ``seen`` bytes."""
        return FLOAT32 * sum(map(math.prod, cls.state_shapes(config, seen).values()))

    @classmethod
    def operations(
        cls, config: ModelConfig, length: int, causal: bool = True
    ) -> Sequence[Operations]:
        """Operations a byte on sequences of ``length`` bytes, by part. ``causal=False`` counts
        what is computed and then masked as well, as a counter does."""
        raise NotImplementedError(f"{cls.__name__} does not say its operations")

    @classmethod
    def elementwise(cls, config: ModelConfig) -> tuple[float, float]:
        """(operations, exponentials) a byte between its parts, such as activations."""
        return 0.0, 0.0

    @classmethod
    def kept(cls, config: ModelConfig, step: Step) -> list[Kept]:
        """Every tensor that autograd keeps of one mixer; its normalised input is not its own."""
        raise NotImplementedError(f"{cls.__name__} does not say what it keeps")

    @classmethod
    def kernel_name(
        cls, config: ModelConfig, length: int, device: str = "cpu", compiled: bool = False
    ) -> str:
        """How a sequence of ``length`` bytes is mixed from its first byte on, for tables;
        ``compiled`` is whether the whole step is."""
        return f"{cls.about}, torch"

    @classmethod
    def moments(
        cls, config: ModelConfig, step: Step, around: Around
    ) -> dict[str, tuple[int, int]]:
        """The moments at which a step's memory can peak in this mixer: by name, bytes of
        activations and workspace, and bytes of gradients of weights."""
        return {"mixer backward": (around.held - around.mlp + around.residual, around.done)}


MIXERS: dict[str, type[Mixer]] = {}  # by letter
Module = TypeVar("Module", bound=nn.Module)
_M = TypeVar("_M", bound=Mixer)


def register(letter: str) -> Callable[[type[_M]], type[_M]]:
    """Give a pattern letter to the class below. Raises ValueError where it is taken."""

    def add(mixer: type[_M]) -> type[_M]:
        if letter in MIXERS:
            raise ValueError(f"the letter {letter!r} is taken by {MIXERS[letter].__name__}")
        add_spec(letter, mixer)
        MIXERS[letter] = mixer
        return mixer

    return add


def unregister(letter: str) -> None:
    """Take a letter back, as a test does."""
    del MIXERS[letter], SPECS[letter]


def mixer_of(letter: str) -> type[Mixer]:
    """The class of a pattern letter. Raises UserError where there is none."""
    if letter not in MIXERS:
        raise UserError(f"no mixer has the letter {letter!r}: choose among {letters_in_words()}")
    return MIXERS[letter]


def named_mixers(model: nn.Module, kind: type[_M]) -> dict[str, _M]:
    """The mixers of one kind in a model by their names, first layer first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def mixers(model: nn.Module, kind: type[_M]) -> list[_M]:
    """The mixers of one kind in a model, first layer first."""
    return list(named_mixers(model, kind).values())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what ``kind`` does with its weights, and nothing else."""
    return type(module) is kind and "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks)


class Linear(nn.Linear):
    """``nn.Linear`` whose bias has its gradient from a kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return biased(x, self.weight, self.bias)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map of its weights, and nothing else."""
    return is_plain(module, nn.Linear) or is_plain(module, Linear)


def linear(
    config: ModelConfig, inputs: int, outputs: int, bias: bool | None = None
) -> nn.Linear:
    """A linear map, with a bias that starts at 0 where ``bias`` says so, or else ``config``."""
    layer = Linear(inputs, outputs, config.linear_bias if bias is None else bias)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def widened(x: Tensor) -> Tensor:
    """In float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMS norm of the last axis without weights, in x's dtype: some releases of torch take it to
    float32 under autocast."""
    with without_autocast(x.device):
        return F.rms_norm(x, x.shape[-1:], eps=eps)


def largest_exponent(log_decay: Tensor, chunk: int) -> float:
    """The largest exponent of a log-cumsum over chunks of ``chunk`` steps of log-decays (B, L,
    ...), none above 0."""
    steps = min(chunk, log_decay.shape[1])
    ends = range(steps, log_decay.shape[1] + steps, steps)
    return max(float(-log_decay[:, end - steps : end].sum(1).min()) for end in ends)


def operator_against_definition(
    operator: Callable[..., tuple[Tensor, Tensor]], inputs: Mapping[str, Tensor], **options: Any
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What :meth:`Mixer.against_definition` gives, of an operator with a form "recurrent"; the
    gradient is that of a random projection of outputs and final state, of each input in turn."""
    mine = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    y, h = operator(**mine, **options)
    y_ref, h_ref = operator(**exact, **options | {"form": "recurrent"})
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32,
                         device="cpu").to(y.device)
    grads = torch.autograd.grad((y * weight).sum() + h.sum(), list(mine.values()))
    grads_ref = torch.autograd.grad(
        (y_ref * weight.double()).sum() + h_ref.sum(), list(exact.values()))
    return {"output": [(y, y_ref)], "state": [(h, h_ref)],
            "gradient": list(zip(grads, grads_ref, strict=True))}


def in_float32(make: Callable[[], Module]) -> Module:
    """What ``make`` makes, on the CPU and in float32 whatever torch's defaults are: a checkpoint
    is of that type, and what a seed draws there is not what it draws on a card."""
    with torch.device("cpu"):
        return make().float()


def detached(state: LayerState) -> LayerState:
    """A layer's state, cut off from the graph that made it."""
    return type(state)(*(t.detach() if isinstance(t, Tensor) else t for t in state))
