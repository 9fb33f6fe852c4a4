"""The table of docs/transforms.md, cell by cell: right, and computed by what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.ops import selective_scan
from mambabyte.ops.conv import cpu as native_conv
from mambabyte.ops.conv.dispatch import causal_conv, torch_convolution
from mambabyte.ops.scan import cpu as native_scan
from mambabyte.ops.scan.operator import fused_available

AVAILABLE, REASON = fused_available("cpu")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"no native scan here: {REASON}")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transforms.md"
ROWS = [[cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", PAGE.read_text(encoding="utf-8"), re.M)]
CELLS = [(row[0], column, word) for row in ROWS[2:]
         for column, word in zip(ROWS[0][1:], row[1:], strict=True)]

# Scalar functions f(x, sample), and how large x is.
Function = Callable[[Tensor, Tensor], Tensor]


def draw(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).double()


def scan(form: str) -> Function:
    A, B, C = -draw(2, 2).exp(), draw(1, 3, 2), draw(1, 3, 2).cos()

    def f(x: Tensor, sample: Tensor) -> Tensor:
        u = x.view(1, 3, 2)
        y, state = selective_scan(u * sample, u.sin(), A, B, C, form=form)
        return y.sin().sum() + state.cos().sum()

    return f


def convolution() -> Function:
    weight, bias = draw(2, 3), draw(2)

    def f(x: Tensor, sample: Tensor) -> Tensor:
        y, last = causal_conv(x.view(1, 3, 2) * sample, weight, bias, None, True)
        return y.sin().sum() + last.cos().sum()

    return f


def whole_model(scan_form: str) -> Function:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(
        vocab_size=4, d_model=2, n_layer=1, d_state=2, scan_form=scan_form)).double()
    tokens, name = torch.tensor([[1, 2, 0]]), "layers.0.mixer.in_proj.weight"
    assert name in dict(model.named_parameters())

    def f(x: Tensor, sample: Tensor) -> Tensor:
        weight = x.repeat(3)[:16].view(8, 2) * sample
        return functional_call(model, {name: weight}, (tokens,))[0].sin().sum()

    return f


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "backward": lambda f, x, s: torch.autograd.grad(f(x.requires_grad_(), s), x)[0],
    "grad": lambda f, x, s: grad(f)(x, s),
    "jvp": lambda f, x, s: jvp(lambda t: f(t, s), (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x, s: jacfwd(f)(x, s),
    "jacrev": lambda f, x, s: jacrev(f)(x, s),
    "hessian": lambda f, x, s: hessian(f)(x, s),
    "vmap": lambda f, x, s: vmap(f, (0, None))(torch.stack([x, 2 * x]), s),
    "vmap over grad": lambda f, x, s: vmap(grad(f), (0, None))(torch.stack([x, 2 * x]), s),
    "per-sample gradients": lambda f, x, s: vmap(grad(f), (None, 0))(x, torch.stack([s, 2 * s])),
    "double backward": lambda f, x, s: torch.autograd.grad(torch.autograd.grad(
        f(x.requires_grad_(), s), x, create_graph=True)[0].square().sum(), x)[0],
}


def functions(column: str) -> tuple[Function, Function]:
    """What a column is about, and its definition."""
    if column.startswith("scan, "):
        return scan(column.removeprefix("scan, ")), scan("recurrent")
    if column == "convolution":
        return convolution(), convolution()
    return whole_model("auto"), whole_model("recurrent")


def test_the_table_has_every_transform() -> None:
    assert [row[0] for row in ROWS[2:]] == list(TRANSFORMS)


@pytest.mark.parametrize(("name", "column", "word"), CELLS)
def test_a_cell(name: str, column: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, definition = functions(column)
    with torch_convolution():
        wanted = TRANSFORMS[name](definition, draw(6), draw(1))
    native: list[str] = []  # kernels that ran
    for kernels in (native_scan, native_conv):
        for way in ("forward", "backward"):
            kernel = getattr(kernels, way)

            def noted(
                *args: Any, kernel: Callable[..., Any] = kernel, way: str = way, **more: Any
            ) -> Any:
                native.append(way)
                return kernel(*args, **more)

            monkeypatch.setattr(kernels, way, noted)
    found = TRANSFORMS[name](function, draw(6), draw(1))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    if name != "double backward":  # whose first forward is the kernel's
        assert bool(native) == (word == "native")


def second_derivatives(letter: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a model of one layer: half the gradient of its gradient's square, which is H g, by
    reverse mode alone and by forward over reverse; and 0 where forward mode gives g g."""
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(
        vocab_size=4, d_model=4, n_layer=1, layer_pattern=letter, d_state=2, ssd_head_dim=4,
        ssd_d_state=4, n_head=1, n_kv_head=1, delta_head_dim=4, local_window=2)).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.tensor([[1, 2, 0, 3, 1]])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in weights.values()])
        own = {n: x.view_as(p) for (n, p), x in zip(weights.items(), parts, strict=True)}
        return functional_call(model, own, (tokens,))[0].sin().sum()

    at = torch.cat([p.flatten() for p in weights.values()])
    g = grad(loss)(at)
    at = at.requires_grad_()
    squares = torch.autograd.grad(loss(at), at, create_graph=True)[0].square().sum()
    reverse, = torch.autograd.grad(squares, at)
    at = at.detach()
    along = jvp(loss, (at,), (g,))[1] - g @ g
    return reverse / 2, jvp(grad(loss), (at,), (g,))[1], along


@pytest.mark.parametrize("letter", "MSRDKAL")
def test_whole_models_of_every_mixer(letter: str) -> None:
    if letter in "AL":
        with pytest.raises(RuntimeError, match="scaled_dot_product"):  # as the page says
            second_derivatives(letter)
    with sdpa_kernel(SDPBackend.MATH):
        reverse, forward, along = second_derivatives(letter)
    assert reverse.norm() > 0
    torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=1e-9)
    assert abs(along) < 1e-9
