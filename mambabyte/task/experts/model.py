"""The mixture of experts as a byte model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.stream import ByteModel, Engine, stream_engine
from mambabyte.task.experts.contexts import PADDING
from mambabyte.task.experts.gate import Experts, Gate, mixed, native_experts
from mambabyte.task.experts.native import NativeExperts
from mambabyte.task.mixture import as_tensor, as_text, only_bytes
from mambabyte.task.ngram import digest

_PADDING = np.full(PADDING, START_BYTE, np.uint8)


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

    @torch.no_grad()
    def after(self, text: np.ndarray, last: int, others: Tensor | None) -> Tensor:
        """Log p (last, V) float32 after each of the ``last`` bytes at the end of text (L,) uint8;
        others (last, 1, V) are the network's probabilities there."""
        if not self._ready:
            self.experts, self.gate = self.experts.to("cpu"), self.gate.cpu()
            self._native = native_experts(self.experts, int(self.network is not None), self.gate)
            self._ready = True
        whole = np.concatenate([_PADDING, text])
        begin, end = len(whole) - last + 1, len(whole) + 1
        if self._native is not None:
            return self._native.log_p(whole, begin, end, others)
        return mixed(self.experts, self.gate, torch.from_numpy(whole), begin, others)

    def forward(self, tokens: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """tokens (B, L); returns log p of the byte after each, (B, L, V), and the state."""
        tokens = only_bytes(tokens)
        inner, last = state or (None, torch.zeros((len(tokens), 0), dtype=torch.uint8))
        others = None
        if self.network is not None:
            logits, inner = self.network(tokens, inner)
            others = torch.softmax(logits.float(), -1).cpu()
        text = torch.cat([last, tokens.to("cpu", torch.uint8)], 1)
        log_p = [self.after(row.numpy(), tokens.shape[1],
                            None if others is None else others[i, :, None])
                 for i, row in enumerate(text)]
        return torch.stack(log_p).to(tokens.device), (inner, text[:, -self.reach :])

    def streamed(self) -> Engine:
        """What a stream goes on by, the network by its own fast way."""
        network = self.network
        return _Experts(self, None if network is None else stream_engine(cast(ByteModel, network)))


class _Experts(Engine):
    """The experts on the host, beside the engine of their network; the last bytes are kept as
    such."""

    def __init__(self, model: ExpertLM, network: Engine | None) -> None:
        self._model, self._network = model, network
        self.name = "experts on the host" + ("" if network is None else f"; {network.name}")

    def __call__(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        inner, last = state or (None, b"")
        others = None
        if self._network is not None:
            log_p, inner = self._network(data, inner)
            others = torch.exp(log_p)[None, None]
        last = (as_text(last) + data)[-self._model.reach :]
        return self._model.after(np.frombuffer(last, np.uint8), 1, others)[0], (inner, last)

    def for_model(self, state: tuple) -> tuple:
        inner, last = state
        return (None if self._network is None else self._network.for_model(inner),
                as_tensor(last))
