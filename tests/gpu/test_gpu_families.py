"""Kernels of SSD, Mamba-3 and the delta rule on a GPU: against float64, by parts, captured."""

from __future__ import annotations

import pytest
import torch
from scan_cases import poison
from torch import Tensor

from analysis.measure.audit.kinds import draw
from analysis.measure.audit.run import LARGE, Audit, check_case
from analysis.measure.audit.targets import find_target
from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.ops import gated_delta_rule, mamba3_scan, ssd_scan
from mambabyte.ops.build.kernel import multiprocessors
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.delta import operator as delta_operator
from mambabyte.ops.ssd import cuda as ssd_kernels
from mambabyte.ops.ssd import operator as ssd_operator
from tests.helpers.family_cases import (
    GATES,
    OPERATORS,
    Inputs,
    in_dtype,
    make_inputs,
    results,
    size_without_luck,
)

# What torch itself warns of depends on the machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
# bf16 sequences; in the kernels states and decays of a chunk are bf16 factors too.
LIMIT = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


def made(family: str, batch: int, length: int, states: int = 64, dtype=torch.bfloat16, **more):
    return make_inputs(family, batch, length, heads=4, keys=states, values=64, dtype=dtype,
                       device="cuda", **more)


def assert_right(
    family: str, inputs: Inputs, limit: float, finite_only: tuple[str, ...] = ()
) -> None:
    """The operator against the chunked form in float64, which the CPU's tests hold to the
    recurrence at 1e-12."""
    found = results(family, inputs, "fused")
    wanted = results(family, in_dtype(inputs, torch.float64), "chunked")
    errors = {}
    for name, true in wanted.items():
        assert torch.isfinite(found[name]).all(), name
        # Below 1e-20 it is gone in float32 too.
        if name in finite_only or true.abs().max() <= 1e-20:
            continue
        errors[name] = relative_rms(found[name], true)
        if errors[name] >= limit and name == "dA":
            size = float(true.square().mean().sqrt())
            errors[name] *= size / size_without_luck(family, inputs, name)
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("states", [16, 32, 64, 128])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_ssd_kernels(states: int, length: int) -> None:
    inputs = made("ssd", 2, length, states, groups=2)
    assert ssd_operator.has_kernel(inputs["x"], inputs["B"])
    poison()
    assert_right("ssd", inputs, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("gates", list(GATES))
def test_ssd_kernels_survive_every_gate(gates: str) -> None:
    inputs = made("ssd", 2, 200, gates=gates)
    # Gradients of decays are there what is left of e^-20 and less, below a factor's rounding.
    faint = ("ddt", "dA") if gates in ("strong", "zero", "mixed") else ()
    assert_right("ssd", inputs, LIMIT[torch.bfloat16], faint)


@pytest.mark.parametrize("family", ["ssd", "mamba3"])
def test_ssd_kernels_repeat_to_the_bit(family: str) -> None:
    inputs = made(family, 3, 500)
    one, two = (results(family, inputs, "fused") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("states", [16, 32, 64, 128])
@pytest.mark.parametrize("family", ["ssd", "mamba3"])
def test_states_walk_from_chunk_to_chunk(
    monkeypatch: pytest.MonkeyPatch, family: str, states: int, length: int
) -> None:
    """As they do where a card is full of sequences: the same bits as by a pass over all chunks; of
    Mamba-3 but for the last ones, as compilers join the operations of a turn as they like."""
    inputs = made(family, 2, length, states, groups=2)
    found = []
    for blocks in (0, 1 << 30):
        monkeypatch.setattr(ssd_kernels, "WALK_BLOCKS", blocks)
        found.append(results(family, inputs, "fused"))
    for name, one in found[0].items():
        if family == "ssd":
            assert torch.equal(one, found[1][name]), name
        else:
            assert relative_rms(one, found[1][name]) < 1e-3, name


@pytest.mark.parametrize("states", [16, 32, 64, 128])
def test_ssd_by_heads_of_a_block(monkeypatch: pytest.MonkeyPatch, states: int) -> None:
    """The same bits by one head in a block, by all of a group, and as the card has room."""
    inputs = made("ssd", 2, 200, states)
    found = [results("ssd", inputs, "fused")]
    room = ssd_kernels._output_at_once(0, ssd_kernels.Kind(states), 0)
    assert room >= multiprocessors(0)
    for at_once in (1, 1 << 30):
        monkeypatch.setattr(ssd_kernels, "_output_at_once", lambda *_, n=at_once: n)
        found.append(results("ssd", inputs, "fused"))
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name
        assert torch.equal(one, found[2][name]), name


@pytest.mark.parametrize("length", [1, 64, 65, 1000])
@pytest.mark.parametrize("states", [16, 32, 64, 128])
def test_mamba3_kernels(states: int, length: int) -> None:
    # Of one step in two sequences there would be eight numbers of each gate, and their luck.
    inputs = made("mamba3", 64 if length == 1 else 2, length, states, groups=2)
    assert ssd_operator.has_kernel(inputs["x"], inputs["B"])
    poison()
    assert_right("mamba3", inputs, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("gates", list(GATES))
def test_mamba3_survives_every_gate(gates: str) -> None:
    inputs = made("mamba3", 2, 200, gates=gates)
    faint = ("ddt", "dlog_decay", "dtheta") if gates in ("strong", "zero", "mixed") else ()
    assert_right("mamba3", inputs, LIMIT[torch.bfloat16], faint)


DELTA = [family for family in OPERATORS if family not in ("ssd", "mamba3")]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("family", DELTA)
def test_delta_kernels(family: str, length: int) -> None:
    inputs = made(family, 2, length)
    assert delta_operator.has_kernel(inputs["q"], inputs["v"])
    poison()
    assert_right(family, inputs, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("repeated_keys", [False, True])
@pytest.mark.parametrize("gates", list(GATES))
@pytest.mark.parametrize("family", DELTA)
def test_delta_kernels_survive_every_gate(family: str, gates: str, repeated_keys: bool) -> None:
    """One key for all steps too, with shares up to 1, as layers make them."""
    inputs = made(family, 2, 200, gates=gates, repeated_keys=repeated_keys)
    if repeated_keys:
        inputs["beta"] = inputs["beta"] - 1
    faint = ("dlog_decay",) if gates in ("strong", "zero", "mixed") else ()
    if repeated_keys and gates == "one":  # a sum over a chunk cancels to what one step adds
        faint = ("dv", "dbeta")
    assert_right(family, inputs, LIMIT[torch.bfloat16], faint)


@pytest.mark.parametrize("family", DELTA)
def test_delta_kernels_repeat_to_the_bit(family: str) -> None:
    inputs = made(family, 3, 500)
    one, two = (results(family, inputs, "fused") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", DELTA)
def test_delta_kernels_of_strided_and_unaligned_inputs(family: str) -> None:
    inputs = made(family, 2, 100)
    wide = torch.randn(2, 100, 4, 192, device="cuda").bfloat16()
    inputs |= {"v": wide[..., 64:128], "q": inputs["q"].mT.contiguous().mT}
    assert_right(family, inputs, LIMIT[torch.bfloat16])
    inputs["v"] = wide[..., 1:65]
    assert_right(family, inputs, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("family", DELTA)
def test_delta_without_a_kernel(family: str) -> None:
    odd = make_inputs(family, 2, 100, heads=2, keys=32, values=64, dtype=torch.bfloat16,
                      device="cuda")
    assert not delta_operator.has_kernel(odd["q"], odd["v"])
    assert_right(family, odd, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(OPERATORS))
def test_operators(family: str, dtype: torch.dtype) -> None:
    inputs = made(family, 2, 150, 64, dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_right(family, inputs, LIMIT[dtype])


@pytest.mark.parametrize("family", ["ssd", "mamba3"])
def test_strided_inputs_and_those_without_a_kernel(family: str) -> None:
    inputs = made(family, 2, 100)
    wide = torch.randn(2, 100, 512, device="cuda").bfloat16()  # as a layer cuts it
    inputs |= {"x": wide[..., 128:384].unflatten(-1, (4, 64)),
               "B": wide[..., None, :64], "C": wide[..., None, 64:128]}
    assert_right(family, inputs, LIMIT[torch.bfloat16])
    inputs["B"] = wide[..., None, 1:65]  # on no 16 bytes
    assert_right(family, inputs, LIMIT[torch.bfloat16])
    odd = make_inputs(family, 2, 100, heads=2, keys=24, values=40, dtype=torch.bfloat16,
                      device="cuda")
    assert not ssd_operator.has_kernel(odd["x"], odd["B"])
    assert_right(family, odd, LIMIT[torch.bfloat16])


@pytest.mark.parametrize("family", ["ssd", "mamba3"])
def test_ssd_split_equals_whole(family: str) -> None:
    inputs = made(family, 2, 300)
    y, last = OPERATORS[family](**inputs, form="fused")
    ys, state = [], inputs["initial_state"]
    for start, end in ((0, 128), (128, 129), (129, 300)):
        part = {n: t[:, start:end] if t.ndim > 1 and t.shape[1] == 300 else t
                for n, t in inputs.items()}
        piece, state = OPERATORS[family](**part | {"initial_state": state}, form="fused")
        ys.append(piece)
    assert relative_rms(torch.cat(ys, 1), y) < LIMIT[torch.bfloat16]
    assert relative_rms(state, last) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("family", ["ssd", "mamba3"])
@pytest.mark.parametrize("walks", [False, True])
def test_ssd_past_two_to_the_31(
    monkeypatch: pytest.MonkeyPatch, family: str, walks: bool
) -> None:
    """One sequence of 2^31 and some elements: its end is what its second half alone gives."""
    length, heads = 720_000, 48
    monkeypatch.setattr(ssd_kernels, "WALK_BLOCKS", 0 if walks else 1 << 30)
    x = torch.randn(1, length, heads, 64, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    B, C = torch.randn(2, 1, length, 1, 16, device="cuda").bfloat16()
    dt = torch.rand(1, length, heads, device="cuda")
    A = -torch.rand(heads, device="cuda")
    half = length // 2
    with torch.no_grad():
        if family == "ssd":
            def scan(part: slice, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
                return ssd_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part],
                                initial_state=state, form="fused")
        else:
            theta, log_decay = torch.rand(1, length, 4, device="cuda"), dt * A

            def scan(part: slice, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
                return mamba3_scan(*(t[:, part] for t in (x, dt, log_decay, B, C, theta, dt)),
                                   initial_state=state, form="fused")
        y, last = scan(slice(None))
        _, state = scan(slice(half))
        end, last_2 = scan(slice(half, None), state)
    assert relative_rms(y[:, -1000:], end[:, -1000:]) < LIMIT[torch.bfloat16]
    for one, other in zip(last, last_2, strict=True):  # of Mamba-3, three tensors
        assert relative_rms(one, other) < LIMIT[torch.bfloat16]


def test_delta_past_two_to_the_31() -> None:
    length, heads = 720_000, 48
    x = torch.randn(1, length, heads, 64, device="cuda", dtype=torch.bfloat16) / 8
    assert x.numel() > 2**31
    gate, beta = -torch.rand(1, length, heads, device="cuda"), torch.rand(1, length, heads).cuda()
    half = length // 2
    with torch.no_grad():
        o, last = gated_delta_rule(x, x, x, gate, beta, form="fused")
        first, second = ([t[:, :half] for t in (x, x, x, gate, beta)],
                         [t[:, half:] for t in (x, x, x, gate, beta)])
        _, state = gated_delta_rule(*first, form="fused")
        end, last_2 = gated_delta_rule(*second, initial_state=state, form="fused")
    assert relative_rms(o[:, -1000:], end[:, -1000:]) < LIMIT[torch.bfloat16]
    assert relative_rms(last, last_2) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize(("name", "kind"), [
    ("mambabyte.ops.conv.dispatch:causal_conv", None), ("mambabyte.ops:ssd_scan", None),
    ("mambabyte.ops:gated_delta_rule", "delta"), ("mambabyte.ops:gated_delta_rule", "kda")])
def test_rows_past_two_to_the_31(name: str, kind: str | None) -> None:
    """First and last row of a batch of more elements are what they are alone, gradients too."""
    target = find_target(name, kind)
    x = target.taken(draw(target.kind, LARGE, torch.bfloat16, "cuda"))
    found = check_case(target, "offsets past 2^31", LARGE, x, LIMIT[torch.bfloat16], None,
                       Audit("", "", "", {}, []))
    if any(f.note == "out of memory" for f in found):
        pytest.skip("needs most of 140 GiB of GPU memory")
    assert {f.verdict for f in found} == {"ok"}


@pytest.mark.parametrize("family", list(OPERATORS))
def test_captured_in_a_graph(family: str) -> None:
    inputs = made(family, 2, 130)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}

    def call() -> list[Tensor]:
        y, state = OPERATORS[family](**leaves)
        return [y.detach(), *torch.autograd.grad(
            y.float().sum() + state.sum(), list(leaves.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = [t.clone() for t in call()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    for one, two in zip(found, wanted, strict=True):
        assert relative_rms(one, two) < 1e-6


def test_opcheck() -> None:
    x, dt, A, B, C, D, state = made("ssd", 1, 70).values()
    tensors = (x, dt.float(), dt.float() * A, B, C, D, state)
    torch.library.opcheck(torch.ops.mambabyte.ssd.default,
                          (*(t.detach().requires_grad_() for t in tensors), True))
    x, dt, log_decay, B, C, theta, mix, *others, state = made("mamba3", 1, 70).values()
    states = state.split([64, 64, 64 * 64], 2)
    tensors = (x, dt, log_decay, theta, mix, B, C, *others, *states[:2],
               states[2].unflatten(2, (64, 64)))
    torch.library.opcheck(torch.ops.mambabyte.mamba3.default,
                          (*(t.detach().requires_grad_() for t in tensors), True))
    for family in DELTA:
        q, k, v, gate, beta, state = made(family, 1, 70).values()
        tensors = (q, k, v, gate if gate.ndim == 4 else gate.unsqueeze(-1), beta.float(), state)
        ages = torch.arange(70, dtype=torch.uint8, device="cuda").view(1, 70) % 9
        torch.library.opcheck(torch.ops.mambabyte.gated_delta_rule.default,
                              (*(t.detach().requires_grad_() for t in tensors), ages, True))


@pytest.mark.parametrize("letter", "SRDK")
def test_a_layer_streams_what_it_computes_at_once_under_autocast(letter: str) -> None:
    model = ByteLM(ModelConfig(d_model=128, n_layer=2, layer_pattern=letter)).cuda()
    tokens = torch.randint(0, 256, (2, 140), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        whole, _ = model(tokens)
        start, state = model(tokens[:, :139])
        step, _ = model(tokens[:, 139:], state)
    exact_whole, _ = ByteLM.forward(model.double(), tokens)
    assert relative_rms(torch.cat([start, step], 1), exact_whole) < 2e-2
    assert relative_rms(whole, exact_whole) < 2e-2
