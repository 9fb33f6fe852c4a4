"""The mixture of experts as a byte model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.stream import ByteModel, advance_of
from mambabyte.stream.streams import engine_name, own_form
from mambabyte.task.experts.contexts import PADDING
from mambabyte.task.experts.engine import Engine
from mambabyte.task.experts.gate import Experts, Gate, engine_of, mixed
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
        self._engine: Engine | None = None
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
            self._engine = engine_of(self.experts, int(self.network is not None), self.gate)
            self._ready = True
        whole = np.concatenate([_PADDING, text])
        begin, end = len(whole) - last + 1, len(whole) + 1
        if self._engine is not None:
            return self._engine.log_p(whole, begin, end, others)
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

    def streamed(self) -> Callable[[bytes, Any], tuple[Tensor, Any]]:
        """How a stream goes on (``stream.advance_of``), the network by its own fast way."""
        network = None if self.network is None else advance_of(cast(ByteModel, self.network))

        def advance(data: bytes, state: Any) -> tuple[Tensor, Any]:
            inner, last = state or (None, b"")
            last = as_text(last)
            others = None
            if network is not None:
                log_p, inner = network(data, inner)
                others = torch.exp(log_p)[None, None]
            last = (last + data)[-self.reach :]
            return self.after(np.frombuffer(last, np.uint8), 1, others)[0], (inner, last)

        def for_model(state: tuple) -> tuple:
            inner, last = state
            return (None if network is None else own_form(network, inner)), as_tensor(last)

        advance.for_model = for_model  # type: ignore[attr-defined]
        advance.engine = "experts on the host" + (  # type: ignore[attr-defined]
            "" if network is None else f"; {engine_name(network)}")
        return advance
