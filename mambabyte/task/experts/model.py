"""The mixture of experts as a byte model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.stream import ByteModel, Engine, stream_engine
from mambabyte.stream.streams import numbers
from mambabyte.task.experts.contexts import PADDING
from mambabyte.task.experts.gate import Experts, Gate, mixed, native_experts
from mambabyte.task.experts.native import NativeExperts
from mambabyte.task.mixture import as_tensor, as_text, only_bytes
from mambabyte.task.ngram import digest

_PADDING = bytes([START_BYTE]) * PADDING
_SPARE = 4096  # bytes beyond the reach that a text grows by before they are cut off


class ExpertLM(nn.Module):
    """A byte model: tokens and state in, log-probabilities and state out.

    The state is the network's, if there is one, and the last bytes, (B, n) uint8 on the CPU. When
    the model is first used, the tables move to the host, where looking up what a byte needs takes
    some 50 microseconds. There is no gradient.
    """

    def __init__(self, experts: Experts, gate: Gate, network: ByteModel | None = None) -> None:
        super().__init__()
        self.experts, self.gate = experts, gate
        self.network = cast("nn.Module | None", network)
        self._native: NativeExperts | None = None
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what is in C has addresses of these tensors, and is made anew."""
        return self.__dict__ | {"_native": None, "_ready": False}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.network is None else cast(
            torch.device, self.network.device)

    def digest(self) -> str:
        """For ``weights_digest``: what the experts have counted is no parameter."""
        named = {f"{i}.{part}": getattr(table, part).cpu()
                 for i, table in enumerate(self.experts.tables) for part in ("key", "count")}
        return digest(named, {"ngram": self.experts.ngram.digest(),
                              "experts": repr((self.experts.orders, self.experts.matches,
                                               [t.context for t in self.experts.tables]))})

    @property
    def reach(self) -> int:
        """Bytes that a state keeps."""
        return max(self.experts.matches.reach, PADDING)

    def on_host(self) -> NativeExperts | None:
        """The experts and the gate, moved to the host, in C; None where there is no compiler."""
        if not self._ready:
            self.experts, self.gate = self.experts.near, self.gate.cpu()
            self._native = native_experts(self.experts, int(self.network is not None), self.gate)
            self._ready = True
        return self._native

    @torch.no_grad()
    def after(self, text: bytes, last: int, others: Tensor | None) -> Tensor:
        """Log p (last, V) float32 after each of the ``last`` bytes at the end of text, which is
        behind PADDING more; others (last, 1, V) are the network's probabilities there."""
        native, whole = self.on_host(), np.frombuffer(text, np.uint8)
        begin, end = len(whole) - last + 1, len(whole) + 1
        if native is not None:
            return native.log_p(whole, begin, end, others)
        return mixed(self.experts, self.gate, torch.tensor(whole, device="cpu"), begin, others)

    def forward(self, tokens: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """tokens (B, L); returns log p of the byte after each, (B, L, V), and the state."""
        tokens = only_bytes(tokens)
        inner, last = state or (
            None, torch.zeros((len(tokens), 0), dtype=torch.uint8, device="cpu"))
        others = None
        if self.network is not None:
            logits, inner = self.network(tokens, inner)
            others = torch.softmax(logits.float(), -1).cpu()
        text = torch.cat([last, tokens.to("cpu", torch.uint8)], 1)
        log_p = [self.after(_PADDING + row.numpy().tobytes(), tokens.shape[1],
                            None if others is None else others[i, :, None])
                 for i, row in enumerate(text)]
        return torch.stack(log_p).to(tokens.device), (inner, text[:, -self.reach :])

    def streamed(self) -> Engine:
        """What a stream goes on by, the network by its own fast way."""
        network = self.network
        return _Experts(self, None if network is None else stream_engine(cast(ByteModel, network)))


class _Experts(Engine):
    """The experts on the host, looked up while a card has the network's byte; the last bytes are
    kept as such, behind PADDING."""

    sees_nan = True

    def __init__(self, model: ExpertLM, network: Engine | None) -> None:
        self._model, self._network = model, network
        self._most = PADDING + model.reach + _SPARE
        self.name = "experts on the host" + ("" if network is None else f"; {network.name}")

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        native, found = self._model.on_host(), list[Tensor]()
        inner, text = (None, _PADDING) if state is None else state
        if not isinstance(text, bytes):
            text = _PADDING + as_text(text)
        text, others = self._within_reach(text + data), None

        def look_up() -> None:
            if native is not None:
                found.append(native.look_up(text))

        if self._network is None:
            look_up()
        else:
            log_p, inner = self._network.beside(data, inner, look_up)
            others = torch.exp(log_p)
        if native is not None:
            return native.mix(found[0], others), (inner, text)
        log_p = self._model.after(text, 1, None if others is None else others[None, None])[0]
        return numbers(log_p), (inner, text)

    def _within_reach(self, text: bytes) -> bytes:
        """Without what no expert looks at, cut off seldom, as that is a copy."""
        return text if len(text) <= self._most else text[-PADDING - self._model.reach :]

    def for_model(self, state: tuple) -> tuple:
        inner, text = state
        if isinstance(text, bytes):
            text = as_tensor(text[PADDING:][-self._model.reach :])
        return None if self._network is None else self._network.for_model(inner), text
