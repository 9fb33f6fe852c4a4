"""Streaming: one byte in, one distribution out, and the same over characters."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mambabyte.config.checks import CountOrNone, NotNegative, Seed, Share, above, fit, shown
from mambabyte.corpus.files import bytes_of
from mambabyte.corpus.utf8 import (
    START_BYTE,
    as_bytes,
    continuation_range,
    utf8_length,
)
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.model import ByteLM
from mambabyte.ops.stream.feeding import NOT_NUMBERS
from mambabyte.stream.engines import cpu, cuda
from mambabyte.stream.engines.base import ByteModel, Engine, Network, TorchEngine, place_of
from mambabyte.stream.saved import Kept, load_state, save_state
from mambabyte.stream.states import n_bytes


def check_draws(
    max_bytes: int, temperature: float, top_k: int, top_p: float, seed: int
) -> tuple[int, float, int, float, int]:
    """How ``ByteStream.draw`` draws; UserError for what it cannot draw by."""
    return (fit(max_bytes, CountOrNone, "max_bytes"), fit(temperature, NotNegative, "temperature"),
            fit(top_k, CountOrNone, "top_k"), fit(top_p, Annotated[float, above(0, 1)], "top_p"),
            fit(seed, Seed, "seed"))


_ASCII = [chr(byte) for byte in range(0x80)]


def stream_engine(model: ByteModel) -> Engine:
    """What a stream of ``model`` goes on by: the fastest way that there is, equal to the model
    itself up to rounding. UserError for what is no model, or whose ``streamed`` is no Engine."""
    device = place_of(model).type
    streamed = getattr(model, "streamed", None)
    if streamed is not None:
        found = streamed()
        if not isinstance(found, Engine):
            raise UserError(f"streamed() of {type(model).__name__} returned {shown(found)}: "
                            "expected an Engine (mambabyte.stream.Engine)")
        return found
    return {"cpu": cpu.engine_for, "cuda": cuda.engine_for}.get(device, TorchEngine)(model)


def network_engine(model: ByteLM, guided: nn.Module) -> Network:
    """What the network ``model`` of a guided model (task/guide.py) goes on by."""
    found = cuda if place_of(model).type == "cuda" else cpu
    return found.network_for(model, guided)


class ByteStream:
    """Log-probabilities of the next byte, one fed byte at a time; state is O(1) in their number.

    ``log_probs`` is (V,) float32 on the CPU. A stream can be branched by ``fork``.
    """

    def __init__(self, model: ByteModel) -> None:
        self._model, self._engine = model, stream_engine(model)
        self._state: Any = None
        self.log_probs = torch.empty(0, device="cpu")
        self.feed(bytes([START_BYTE]))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the model and the place; how it goes on is found anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine = stream_engine(self._model)

    def feed(self, data: bytes) -> None:
        """Advance by ``data`` in one call; nothing happens when it is empty."""
        if type(data) is not bytes:
            data = bytes_of(data)
        if data:
            self.log_probs, self._state = self._engine(data, self._state)
            if len(data) > 1 or not self._engine.sees_nan:
                numbers(self.log_probs)  # one byte's are looked at by some engines, at less cost

    def read(self, data: bytes) -> Tensor | None:
        """Advance by ``data`` byte after byte; log p (L, V) before each of its bytes.

        None, and nothing happens, where the model has no quick way to do so.
        """
        found = self._engine.each(data, self._state) if data else None
        if found is None:
            return None
        each, self._state = found
        numbers(each)
        before = torch.cat([self.log_probs[None], each[:-1]])
        self.log_probs = each[-1]
        return before

    @property
    def engine(self) -> str:
        """What computes the next byte, in a line."""
        return self._engine.name

    @property
    def draws_itself(self) -> bool:
        """Whether ``draw`` is the engine's own: bytes are drawn where they are computed."""
        return self._engine.draws

    @torch.inference_mode()
    def ahead(self, data: bytes) -> tuple[Tensor, Callable[[int], Any]]:
        """One pass over ``data``, a byte or more, that moves nothing: log p (L, V) after each of
        its bytes, and what says the state after the first n of them, asked once; None where the
        engine has the last one alone."""
        found = self._engine.ahead(data, self._state)
        if found is None:
            tokens = torch.tensor([list(data)], device=self._model.device)
            logits, last = self._model(tokens, self.kept.state)
            found = (torch.log_softmax(logits[0].float(), -1).cpu(),
                     lambda count: last if count == len(data) else None)
        numbers(found[0])
        return found

    def move(self, state: Any, log_probs: Tensor) -> None:
        """Stand at a place that ``ahead`` has been to."""
        self._state, self.log_probs = state, log_probs

    def draw(
        self, max_bytes: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[bytes]:
        """Advance by bytes drawn from the model itself, yielded as they come; see ``generate``."""
        max_bytes, temperature, top_k, top_p, seed = check_draws(
            max_bytes, temperature, top_k, top_p, seed)
        if self._engine.draws:
            pieces = self._engine.draw(
                self.log_probs, self._state, max_bytes, temperature, top_k, top_p, seed)
            for data, log_probs, state in pieces:
                self.log_probs, self._state = numbers(log_probs), state
                yield data
            return
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_bytes):
            byte = sample_byte(self.log_probs, temperature, top_k, top_p, generator)
            self.feed(bytes([byte]))
            yield bytes([byte])

    @property
    def guesses_itself(self) -> bool:
        """Whether ``guess_and_draw`` is there: the engine checks guesses where it draws."""
        return self._engine.guesses

    def guess_and_draw(
        self, past: bytes, max_bytes: int, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0,
    ) -> Iterator[tuple[bytes, int, int]]:
        """As ``draw``, the same bytes, with guesses of what followed equal endings in the text so
        far, of which ``past`` are the last bytes: pieces, passes of each, bytes guessed."""
        max_bytes, temperature, top_k, top_p, seed = check_draws(
            max_bytes, temperature, top_k, top_p, seed)
        pieces = self._engine.guess_and_draw(
            self.log_probs, self._state, max_bytes, past, temperature, top_k, top_p, seed)
        for data, log_probs, state, passes, guessed in pieces:
            self.log_probs, self._state = numbers(log_probs), state
            yield data, passes, guessed

    def fork(self) -> ByteStream:
        """An independent stream at the same place. States are values, so this copies nothing."""
        other = object.__new__(ByteStream)
        other.__dict__.update(self.__dict__)
        return other

    @classmethod
    def at(cls, model: ByteModel, kept: Kept) -> ByteStream:
        """A stream of ``model`` at a place that ``kept`` is of; UserError for several texts."""
        if len(kept.log_probs) != 1:
            raise UserError(f"the state is of {len(kept.log_probs)} texts: a stream is one of them "
                            "(states.split)")
        stream = object.__new__(cls)
        stream._model, stream._engine = model, stream_engine(model)
        stream._state, stream.log_probs = kept.state, kept.log_probs[0]
        return stream

    @property
    def model(self) -> ByteModel:
        """What the stream goes on by."""
        return self._model

    @property
    def kept(self) -> Kept:
        """The present place as a value, in the model's own form whatever engine got here."""
        return Kept(self._engine.for_model(self._state), self.log_probs[None])

    def save(self, path: Path | str) -> None:
        """Keep the present place in a file; see ``saved.save_state``."""
        save_state(path, self._model, self.kept)

    @classmethod
    def load(cls, path: Path | str, model: ByteModel) -> ByteStream:
        """A stream that goes on where ``save`` was called; see ``saved.load_state``."""
        return cls.at(model, load_state(path, model))

    def state_bytes(self) -> int:
        """Bytes held by the state now."""
        return n_bytes(self._state)


def numbers(log_probs: Tensor) -> Tensor:
    """``log_probs`` as they are; NonFiniteError where one is nan. -inf is a probability of 0."""
    if math.isnan(float(log_probs.sum())):  # a sum is nan if any is: one pass, no copy
        raise NonFiniteError(NOT_NUMBERS)
    return log_probs


class CharModel:
    """Next-character prediction: ``predict()`` strictly before each ``observe(char)``.

    The distribution covers every single-byte character, and each longer one that matters: every
    one that could be the most probable, and every one under a prefix of probability above
    ``detail``. Its probability is the product over its whole UTF-8 sequence, for which the
    model is run ahead from the present state.
    """

    def __init__(self, model: ByteModel, detail: float = 0.01) -> None:
        place_of(model)
        self.model = model.eval()
        self.detail = fit(detail, Share, "detail")
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next character is the first of a text."""
        self.seek(ByteStream(self.model))

    def seek(self, stream: ByteStream) -> None:
        """Go to the place of ``stream``, which must stand between two characters."""
        self._stream = stream.fork()
        self._ahead: dict[bytes, ByteStream] = {}  # streams already run ahead by these bytes

    def predict(self) -> dict[str, float]:
        """Probability of each character that may come next; the argmax is exact.

        Insertion order is by code point among single bytes, then as found; it decides ties.
        """
        first = self._stream.log_probs.exp().tolist()
        result = dict(zip(_ASCII, first))  # noqa: B905  # as many as there are characters
        best = max(first[:0x80])
        leads = first[0xC2:0xF5]
        if max(leads) <= min(best, self.detail):  # nearly always, in English
            return result
        # Longer characters by best-first search: a prefix's probability bounds what is under it,
        # so once the bound falls below the best character found, no argmax is missed. What is below
        # it already is not looked at.
        frontier = [(-p, bytes([byte])) for byte, p in enumerate(leads, 0xC2)
                    if p > best or p > self.detail]
        heapq.heapify(frontier)
        while frontier:
            negative, prefix = heapq.heappop(frontier)
            probability = -negative
            if probability <= best and probability <= self.detail:
                break
            if len(prefix) == utf8_length(prefix[0]):
                result[prefix.decode("utf-8")] = probability
                best = max(best, probability)
                continue
            following = self._run_ahead(prefix).log_probs.exp().tolist()
            for byte in continuation_range(prefix):
                bound = probability * following[byte]
                if bound > best or bound > self.detail:
                    heapq.heappush(frontier, (-bound, prefix + bytes([byte])))
        return result

    def observe(self, char: str) -> None:
        """Advance by the character that came."""
        data = as_bytes(char)
        for known in range(len(data) - 1, 0, -1):  # reuse what was run ahead
            if data[:known] in self._ahead:
                self._stream = self._ahead[data[:known]]
                data = data[known:]
                break
        self._ahead = {}
        self._stream.feed(data)

    def log_prob(self, char: str) -> float:
        """Natural log of the probability of ``char`` coming next, over its UTF-8 sequence."""
        data = as_bytes(char)
        return sum(
            float(self._run_ahead(data[:i]).log_probs[byte]) for i, byte in enumerate(data)
        )

    def greedy(self) -> str:
        """The most probable next character, the first of equals."""
        first = self._stream.log_probs[:0xF5].numpy()
        best = int(first[:0x80].argmax())
        if first[0xC2:].max() <= first[best]:  # what begins a longer one is no likelier than this
            return chr(best)
        distribution = self.predict()
        return max(distribution, key=distribution.__getitem__)

    def _run_ahead(self, prefix: bytes) -> ByteStream:
        if not prefix:
            return self._stream
        if prefix not in self._ahead:
            stream = self._run_ahead(prefix[:-1]).fork()
            stream.feed(prefix[-1:])
            self._ahead[prefix] = stream
        return self._ahead[prefix]


def sample_byte(
    log_probs: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw a byte from log_probs (V,) after temperature, top-k and nucleus (top-p) filters.

    Symbols beyond the 256 bytes, where a model has them, are never drawn.
    """
    log_probs = numbers(log_probs[:256])
    if temperature < torch.finfo(log_probs.dtype).tiny:  # 0 as well: what it divides is not finite
        return int(log_probs.argmax())
    scaled = (log_probs - log_probs.max()) / temperature  # from 0 down: finite or -inf
    ordered, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    total = ordered.cumsum(-1)
    kept = min(top_k or len(total), len(total))
    if top_p < 1:  # the smallest set that reaches top_p, the most probable one in any case
        kept = max(1, min(kept, int((total - ordered < top_p).sum())))
    # The inverse of the distribution function: a third of multinomial's time.
    uniform = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu")
    drawn = float(uniform) * float(total[kept - 1])
    return int(order[min(int(torch.searchsorted(total[:kept], drawn, right=True)), kept - 1)])
