"""What is checked of one target on one case; each check gives numbers and their bounds.

Errors are relative to the root mean square of what is expected: that of the difference, and a
tenth of its largest single element, so that one wrong element among many is found, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.measure.audit.kinds import Case, Inputs, Outputs, define, laid_out
from analysis.measure.audit.targets import Target

# Of outputs and gradients by dtype. Float32 leaves room for sums in another order, half precision
# for products in it; what is wrong is wrong by far more.
BOUNDS = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LARGEST = 10.0  # how far above the bound a single element may be
TINY = 1e-8  # where all that is expected is smaller, errors count from here
# Of a gradient the same: this share of the largest one through the same output. One that is exactly
# 0 is a difference of terms that are not.
SHARE = 1e-2


@dataclass(frozen=True)
class Measured:
    """One number of a check."""

    quantity: str  # such as "output" or "gradient of A, through the state"
    error: float
    bound: float  # 0: bits should be equal
    note: str = ""
    minor: bool = False  # worth a note, and no fault


def distance(found: Tensor | None, expected: Tensor | None, least: float = TINY) -> float:
    """How far ``found`` is from ``expected``; inf where it is missing, of another shape or nan.

    ``least`` is the scale that errors are relative to where what is expected is smaller.
    """
    if expected is None:
        return 0.0
    if found is None:
        return math.inf if bool(expected.abs().max() > least) else 0.0
    if found.shape != expected.shape:
        return math.inf
    difference = (found.detach().double() - expected.detach().double()).abs()
    expected = expected.detach().double()
    scale = expected.square().mean().sqrt().clamp_min(least)
    worst = (difference / (expected.abs() + scale)).max() / LARGEST
    error = float(torch.maximum(difference.square().mean().sqrt() / scale, worst))
    return error if math.isfinite(error) else math.inf


def leaves(x: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """``x`` to differentiate by; in memory as it is, or in ``dtype``."""
    copies = {n: t.detach() if dtype is None else t.detach().to(dtype, copy=True)
              for n, t in x.items()}
    return {name: t.requires_grad_() for name, t in copies.items()}


def cotangent(like: Tensor) -> Tensor:
    """Random weights of an output's elements (B, ...): a row's are the same in every batch."""
    rows = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(1 + row),
                        dtype=torch.float64) for row in range(len(like))]
    return torch.stack(rows).to(like.device)


def gradients(out: Tensor | None, x: Inputs) -> dict[str, Tensor | None] | None:
    """By each input, of a random projection of ``out``; None where no gradient flows."""
    if out is None or not out.requires_grad:
        return None
    loss = (out * cotangent(out).to(out.dtype)).sum()
    found = torch.autograd.grad(loss, list(x.values()), retain_graph=True, allow_unused=True)
    return dict(zip(x, found, strict=True))


def compare(
    target: Target, x: Inputs, case: Case, bound: float, through: Callable[[Inputs], Outputs]
    | None = None,
) -> Iterator[Measured]:
    """Output, state, and each gradient through each of them, against the definition in float64.

    ``through`` stands in place of a call of the target.
    """
    mine, exact = leaves(x), leaves(x, torch.float64)
    call = through or (lambda inputs: target(inputs, case.documents))
    found, expected = call(mine), define(target.kind, exact, case.documents)
    pairs: dict[str, tuple[Tensor, Tensor]] = {"output": (found[0], expected[0])}
    # Of documents some return the state of each; the definition's is that of the last.
    if found[1] is not None and expected[1] is not None and not (
            case.documents and len(found[1]) != len(expected[1])):
        pairs["state"] = (found[1], expected[1])
    for name, (out, wanted) in pairs.items():  # values before gradients, which may be refused
        yield Measured(name, distance(out, wanted), bound)
    for name, (out, wanted) in pairs.items():
        if name == "state" and not target.has("state gradient"):
            continue
        wanted_grads = gradients(wanted, exact)
        assert wanted_grads is not None
        grads = gradients(out, mine)
        if grads is None:
            yield Measured(f"gradients through the {name}", math.inf, bound, "none flow")
            continue
        least = SHARE * max(float(g.square().mean().sqrt()) for g in wanted_grads.values()
                            if g is not None)
        for leaf, grad in wanted_grads.items():
            yield Measured(f"gradient of {leaf}, through the {name}",
                           distance(grads[leaf], grad, max(TINY, least)), bound,
                           "" if grads[leaf] is not None else "it is None")


def _everything(target: Target, x: Inputs) -> dict[str, Tensor]:
    """Output, state and gradients of a call, by name."""
    mine = leaves(x)
    y, state = target(mine, ())
    total = {"output": y} | ({} if state is None else {"state": state})
    for name, out in list(total.items()):
        grads = gradients(out, mine) or {}
        total |= {f"gradient of {leaf}, through the {name}": g
                  for leaf, g in grads.items() if g is not None}
    return {name: t.detach().clone() for name, t in total.items()}


def _same(
    found: dict[str, Tensor], expected: dict[str, Tensor], bound: float, exactly: bool = True
) -> Iterator[Measured]:
    """That two calls agree: within ``bound``, and where they should, in every bit."""
    for name, wanted in expected.items():
        error = distance(found.get(name), wanted)
        equal = not exactly or torch.equal(found.get(name, wanted), wanted)
        yield Measured(name, error, bound)
        if not equal and error <= bound:
            yield Measured(name, error, 0.0, "within the bound, and not in every bit", minor=True)


def repeat(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """The same call twice: in every bit, or a note."""
    yield from _same(_everything(target, x), _everything(target, x), bound)


def apart(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """The output without gradients, and each gradient where no other is asked for."""
    mine = leaves(x)
    y, _ = target(mine)
    with torch.no_grad():
        yield Measured("output without gradients", distance(target(x)[0], y), bound)
    for name, wanted in (gradients(y, mine) or {}).items():
        one = {**x, name: x[name].detach().requires_grad_()}
        out = target(one)[0]
        grads = gradients(out, {name: one[name]}) or {}
        yield Measured(f"gradient of {name}, through the output",
                       distance(grads.get(name), wanted), bound)


def untouched(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """That a call with its backward pass leaves its inputs as they were."""
    before = {name: t.clone() for name, t in x.items()}
    _everything(target, x)
    for name, t in x.items():
        changed = not torch.equal(t, before[name])
        yield Measured(f"input {name}", math.inf if changed else 0.0, bound,
                       "it was written to" if changed else "")


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Memory that nobody has written to is nan: what torch allocates, and what it gets back."""
    before = torch.get_deterministic_debug_mode()
    sizes = [2**power for power in range(6, 22)]
    blocks = [torch.full((size,), math.nan, device=device) for size in sizes for _ in range(3)]
    del blocks
    try:
        torch.set_deterministic_debug_mode("warn")  # in which torch fills what is empty
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def poison(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """The same call in memory full of nan: nothing that was not written is read."""
    clean = _everything(target, x)
    with poisoned(str(next(iter(x.values())).device)):
        found = _everything(target, x)
    yield from _same(found, clean, bound, exactly=False)


def _rows(target: Target, x: Inputs, rows: slice) -> Inputs:
    batched = {*target.kind.streams, "initial_state"}
    return {name: t[rows] if name in batched else t for name, t in x.items()}


def _of_rows(target: Target, found: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Of what :func:`_everything` gives, what belongs to rows: no gradients of parameters."""
    batched = {*target.kind.streams, "initial_state"}
    return {name: t[rows] for name, t in found.items() if not name.startswith("gradient of ")
            or name.removeprefix("gradient of ").partition(",")[0] in batched}


def alone(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """A row by itself and in a batch."""
    one = slice(0, 1)
    in_batch = _of_rows(target, _everything(target, x), one)
    by_itself = _of_rows(target, _everything(target, _rows(target, x, one)), one)
    for name, wanted in in_batch.items():
        yield from _same({name: by_itself[name]}, {name: wanted}, bound)


def leak(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """Other rows, and the first stays as it is."""
    others = {}
    for name, t in x.items():
        others[name] = t.clone()
        if name in (*target.kind.streams, "initial_state"):
            others[name][1:] = t[1:].flip(1 if t.ndim > 1 else 0) * (
                0.5 if name in ("log_decay", "beta") else -0.7)
    if "log_decay" in others:
        others["log_decay"].clamp_(max=0.0)
    if "beta" in others:
        others["beta"].clamp_(0.0, 1.0)
    one = slice(0, 1)
    yield from _same(_of_rows(target, _everything(target, others), one),
                     _of_rows(target, _everything(target, x), one), bound)


def causal(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """Another future, and the past stays as it is."""
    cut = case.length // 2
    other = {name: t.clone() for name, t in x.items()}
    for name in target.kind.streams:
        if name in other:
            other[name][:, cut:] *= 0.5
    with torch.no_grad():
        found, expected = target(other)[0][:, :cut], target(x)[0][:, :cut]
    yield Measured(f"output before step {cut}", distance(found, expected), bound)


def handover(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """Two calls, the second from the state of the first, and one call: in value and gradients."""
    cut = case.length // 3

    def in_two(inputs: Inputs) -> Outputs:
        first, second = ({name: t[:, part] if name in target.kind.streams else t
                          for name, t in inputs.items()}
                         for part in (slice(None, cut), slice(cut, None)))
        y, state = target(first)
        assert state is not None, "it returned no state"
        rest, state = target({**second, "initial_state": state})
        return torch.cat([y, rest], 1), state

    with torch.no_grad():
        state = target(x)[1]
    if state is not None:
        yield from compare(target, x, case, bound, in_two)


def offsets(target: Target, x: Inputs, case: Case, bound: float) -> Iterator[Measured]:
    """A batch of more than 2^31 elements, whose rows are those of ``x`` again and again: its first
    and last rows are what they are alone."""
    first = x[target.kind.streams[0]]
    count = 2**31 // (first.numel() // len(first)) + 2
    one = _rows(target, x, slice(0, 1))
    batched = {*target.kind.streams, "initial_state"}
    large = {name: t.expand(count, *t.shape[1:]).contiguous() if name in batched else t
             for name, t in one.items()}
    stream = target.kind.streams[0]

    def output_and_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
        mine = {**inputs, stream: inputs[stream].detach().requires_grad_()}
        y, _ = target(mine)
        weights = cotangent(y[:1]).to(y.dtype).expand_as(y)
        (grad,) = torch.autograd.grad(y, mine[stream], weights)
        return y.detach(), grad

    expected, found = output_and_gradient(one), output_and_gradient(large)
    for name, wanted, got in zip(("output", f"gradient of {stream}"), expected, found,
                                 strict=True):
        for place, row in (("first", got[:1]), ("last", got[-1:])):
            yield Measured(f"{name}, {place} of {count} rows", distance(row, wanted), bound)


Check = Callable[[Target, Inputs, Case, float], Iterator[Measured]]
CHECKS: dict[str, Check] = {
    "definition": compare, "repeat": repeat, "one gradient": apart, "inputs": untouched,
    "poisoned memory": poison, "row alone": alone, "other rows": leak, "causality": causal,
    "handover": handover, "offsets past 2^31": offsets,
}
NEEDS = {"handover": ("initial_state", "state")}  # features of the target


def measure(
    name: str, target: Target, case: Case, x: Inputs, bound: float
) -> Iterator[Measured]:
    """The numbers of one check on inputs that are laid out as ``case`` says."""
    return CHECKS[name](target, laid_out(target.kind, case, x), case, bound)
