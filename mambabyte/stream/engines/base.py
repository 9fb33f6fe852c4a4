"""What a stream goes on by: one interface, whatever computes the next byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from mambabyte.config.checks import shown
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops.stream.feeding import nothing


class ByteModel(Protocol):
    """What is streamed and scored: ByteLM, an n-gram model, or a mixture of the two.

    ``model(tokens (B, L), state) -> (logits (B, L, V), state)``; the state is a value, None before
    the first byte, whose tensors have the batch first. Logits may be log-probabilities. A model
    made of others has a method ``streamed()`` that returns an :class:`Engine` made of theirs.
    """

    training: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...

    def eval(self) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...


def place_of(model: ByteModel) -> torch.device:
    """The device of a model's weights; UserError for what is no model, and where weights have no
    numbers."""
    if isinstance(model, type) or not callable(model) or not hasattr(model, "device"):
        raise UserError(f"the model is {shown(model)}: expected one of bytes, such as a ByteLM")
    if model.device.type == "meta":
        raise UserError("the model is on the device meta, where weights have no numbers: load a "
                        "checkpoint, or make it on cpu or cuda")
    return model.device


class Engine:
    """Advances one text: ``engine(data, state) -> (log p of the next byte, state)``.

    ``data`` has a byte or more; log p is (V,) float32 on the CPU. The state is None before the
    first byte, or one that the engine or the model itself returned; it is a value, never written
    to. What is below is what an engine has that can do no more than that.
    """

    name = "torch, a call a byte"  # what computes the next byte, in a line
    sees_nan = False  # whether it raises NonFiniteError itself where log p after one byte is nan
    draws = False  # whether ``draw`` is there: bytes are drawn where they are computed
    guesses = False  # whether ``guess_and_draw`` is there too

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def beside(
        self, data: bytes, state: Any, meanwhile: Callable[[], None]
    ) -> tuple[Tensor, Any]:
        """As the call; ``meanwhile`` is called once, on the host, where it costs least."""
        meanwhile()
        return self(data, state)

    def for_model(self, state: Any) -> Any:
        """A state that the engine returned, as the model itself has it."""
        return state

    def ahead(self, data: bytes, state: Any) -> tuple[Tensor, Callable[[int], Any]] | None:
        """Log p (L, V) after each of ``data``, and what says the state after the first n of them,
        to be asked once; None where the engine has no way to it."""
        return None

    def each(self, data: bytes, state: Any) -> tuple[Tensor, Any] | None:
        """Log p (L, V) after each of ``data``, strictly byte after byte, and the state; None where
        there is no quicker way than a call a byte."""
        return None

    def draw(
        self, log_probs: Tensor, state: Any, length: int, temperature: float, top_k: int,
        top_p: float, seed: int,
    ) -> Iterator[tuple[bytes, Tensor, Any]]:
        """Draw ``length`` bytes in pieces: each with the log p (V,) and the state after it."""
        raise NotImplementedError

    def guess_and_draw(
        self, log_probs: Tensor, state: Any, length: int, past: bytes, temperature: float,
        top_k: int, top_p: float, seed: int,
    ) -> Iterator[tuple[bytes, Tensor, Any, int, int]]:
        """As ``draw``, with guesses of what followed equal endings in the text so far, of which
        ``past`` are the last bytes: also the passes that a piece took and the bytes guessed."""
        raise NotImplementedError


class TorchEngine(Engine):
    """The model itself, called for each piece of text; ``why`` is why no other has it."""

    def __init__(self, model: ByteModel, why: str = "") -> None:
        self._model, self._device = model, place_of(model)
        if why:
            self.name = f"{Engine.name}: {why}"

    @torch.inference_mode()
    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        logits, state = self._model(torch.tensor([list(data)], device=self._device), state)
        return torch.log_softmax(logits[0, -1].float(), -1).cpu(), state


class Network:
    """The layers of ``model`` for a model around it (task/guide.py), without gradients.

    The call is ``ByteLM.hidden``: x (B, L, d_model) and state in, the same out. An engine may also
    take bytes with their hints, which is what is said of the byte after each of them: log p
    (L, 256) float32, best byte and kind (L,) uint8.
    """

    name = Engine.name
    hints = False  # whether ``guided`` is there
    fills = False  # whether ``guided_byte`` is there, which sees nan itself

    def __init__(self, model: ByteLM) -> None:
        self._model = model

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self._model.hidden(x, state)

    def for_model(self, state: Any) -> Any:
        """A state that the engine returned, as the model itself has it."""
        return state

    def guided(self, data: bytes, state: Any, hint: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Log p (256,) of the byte after ``data``, which has few bytes, and the state."""
        raise NotImplementedError

    def guided_byte(
        self, data: bytes, state: Any, fill: Callable[[int, int, int], None],
        meanwhile: Callable[[], None] = nothing,
    ) -> tuple[Tensor, Any]:
        """As ``guided`` of one byte, whose hint ``fill`` writes to the addresses of log p (256
        float32), best byte and kind (uint8); ``meanwhile`` is called while a card has the byte."""
        raise NotImplementedError
