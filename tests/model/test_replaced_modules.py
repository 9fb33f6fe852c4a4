"""A module in place of a projection or the convolution is called, whatever fused path there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.stream import ByteStream
from mambabyte.stream.streams import START_BYTE

PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
CONFIG = ModelConfig(d_model=16, n_layer=2, d_state=4)


class Adapter(nn.Module):
    """A low-rank update beside a layer, as LoRA (arXiv:2106.09685) has it; zero when made."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def made() -> tuple[ByteLM, Tensor]:
    torch.manual_seed(0)
    return ByteLM(CONFIG), torch.randint(256, (2, 9))


@pytest.mark.parametrize("part", [p for p in PARTS if p != "conv1d"])
def test_an_adapter_is_the_layer_until_it_learns_and_then_not(part: str) -> None:
    model, tokens = made()
    plain = model(tokens)[0].detach()
    adapters = []
    for layer in model.layers:
        adapters.append(Adapter(getattr(layer.mixer, part)))
        setattr(layer.mixer, part, adapters[-1])
    torch.testing.assert_close(model(tokens)[0], plain)
    model.loss(tokens).backward()
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().sum() > 0
        nn.init.normal_(adapter.up.weight)
    whole = model(tokens)[0]
    assert not torch.allclose(whole, plain, rtol=0, atol=1e-5)
    with torch.no_grad():  # byte after byte too
        state, steps = None, []
        for t in range(tokens.shape[1]):
            logits, state = model(tokens[:, t : t + 1], state)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_and_a_parametrization_are_heard(part: str) -> None:
    model, tokens = made()
    plain = model(tokens)[0]
    module = getattr(model.layers[0].mixer, part)
    with module.register_forward_hook(lambda m, args, out: 2 * out):
        hooked = model(tokens)[0]
    assert not torch.allclose(hooked, plain, rtol=0, atol=1e-5)
    parametrize.register_parametrization(module, "weight", Twice())
    assert not torch.allclose(model(tokens)[0], plain, rtol=0, atol=1e-5)


def test_a_native_stream_hears_them_too() -> None:
    model, tokens = made()
    mixer = model.layers[1].mixer
    mixer.x_proj = Adapter(mixer.x_proj)
    nn.init.normal_(mixer.x_proj.up.weight)
    tokens[0, 0] = START_BYTE
    with torch.no_grad():
        wanted = model(tokens[:1])[0][0, -1].log_softmax(-1)
        stream = ByteStream(model)
        stream.feed(bytes(tokens[0, 1:].tolist()))
    torch.testing.assert_close(stream.log_probs.flatten().float(), wanted, rtol=1e-3, atol=1e-4)
