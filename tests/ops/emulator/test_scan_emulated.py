"""The CUDA scan's kernels, run on the CPU lane by lane: right, whatever the order of the warps."""

from __future__ import annotations

import functools
import shutil

import pytest
import scan_cases
import torch
from emulate import Emulator, translate
from scan_cases import NAMES, Inputs, assert_close

from mambabyte.ops import selective_scan
from mambabyte.ops.arguments import document_ages
from mambabyte.ops.scan import cuda as cuda_scan
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.cuda import launch as scan_launch
from mambabyte.ops.scan.cuda.call import Scan

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
make_inputs = functools.partial(scan_cases.make_inputs, device="cpu", dtype=torch.bfloat16)
Tensors = dict[str, torch.Tensor]


def card(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """A small card has few segments and wide blocks, a large one many and narrow ones."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: multiprocessors)


def weights(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of the final state: those of the definition in scan_cases."""
    u, A = inputs["u"], inputs["A"]
    assert u is not None
    assert A is not None
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(u.shape, generator=generator).to(u.dtype)
    return dy, torch.randn((u.shape[0], *A.shape), generator=generator)


def results(
    inputs: Inputs, save: bool = True, dy: torch.Tensor | None = None,
    ages: torch.Tensor | None = None,
) -> Tensors:
    given = [inputs[name] for name in NAMES]
    y, state, saved = cuda_scan.forward(*given, True, save, ages=ages)
    default, dh = weights(inputs)
    gradients = cuda_scan.backward(
        default if dy is None else dy, dh, *given, saved, True, ages=ages)
    found = zip((f"d{name}" for name in NAMES), gradients, strict=True)
    return {"y": y, "final_state": state} | {k: v for k, v in found if v is not None}


@pytest.mark.parametrize(
    ("shape", "multiprocessors", "kernels"),
    [
        ((1, 140, 40), 8, ("tile_carry<false", "tile_forward<true, true, 4,", "tile_carry<true")),
        ((1, 43, 192), 1, ("tile_forward<true, true, 24, 1,",)),
        ((2, 43, 96), 1, ("tile_forward<true, true, 12, 2,",)),
        # Eight warps a block where whole sequences fill the card, not where they are cut.
        ((2, 43, 64), 1, ("tile_forward<true, true, 8, 2,", "tile_backward<true, true, 8, 1,")),
        ((1, 140, 64), 8, ("tile_carry<true", "tile_backward<true, true, 4, 3,")),
    ],
)
def test_parity(
    shape: tuple[int, int, int],
    multiprocessors: int,
    kernels: tuple[str, ...],
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card(monkeypatch, multiprocessors)
    inputs = make_inputs(*shape)
    wanted = scan_cases.definition(inputs)
    found = results(inputs)
    assert_close(found, wanted, torch.bfloat16)
    names = " ".join(name for name, _ in emulator.launched)
    assert all(kernel in names for kernel in kernels), names
    again = results(inputs)  # the warps in another order
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize(("dtype", "shape", "multiprocessors", "save"), [
    (torch.bfloat16, (2, 43, 16), 1, True),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (torch.bfloat16, (2, 140, 40), 16, True),  # cut in time
        (torch.bfloat16, (2, 64, 8), 1, False),  # recomputed
        (torch.float32, (2, 70, 5, 3), 16, True))),
])
def test_documents(
    dtype: torch.dtype, shape: tuple[int, ...], multiprocessors: int, save: bool,
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch,
) -> None:
    card(monkeypatch, multiprocessors)
    inputs = make_inputs(*shape, dtype=dtype)
    assert inputs["A"] is not None
    inputs["A"][:2] = 0.0  # what never decays is left behind all the same
    starts = torch.zeros(shape[:2], dtype=torch.bool)
    starts[0, [0, 1, 5, 16, 17, 40]] = True
    starts[1, [7, 32, shape[1] - 1]] = True
    monkeypatch.setattr(scan_cases, "selective_scan", functools.partial(
        selective_scan, document_starts=starts))
    ages = document_ages(starts, starts)
    found = results(inputs, save, ages=ages)
    assert_close(found, scan_cases.definition(inputs), dtype)
    assert not found["dinitial_state"][0].any()  # the first row begins with a document
    # Nothing crosses: what comes before does not matter, not in the last bit.
    for name in ("u", "delta", "B", "C", "z"):
        tensor = inputs[name]
        assert tensor is not None
        tensor[0, :16] = 3 * tensor[0, :16] + 1
    other = results(inputs, save, ages=ages)
    for name in ("y", "du", "ddelta", "dB", "dC", "dz"):
        assert torch.equal(found[name][0, 16:], other[name][0, 16:]), name
    assert torch.equal(found["final_state"], other["final_state"])


@pytest.mark.long
def test_parity_of_the_other_family(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 8)
    inputs = make_inputs(1, 70, 5, 3, dtype=torch.float32)
    assert_close(results(inputs), scan_cases.definition(inputs), torch.float32)
    assert any("any_adjoint" in name for name, _ in emulator.launched)


@pytest.mark.parametrize(("batch", "again"), [(1, 7 + 8), (3, 3 * (2 + 3)), (9, 5)])
def test_parity_with_recomputation(
    batch: int, again: int, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine sequences go two by two. Fewer than eight are cut in time: a forward for the states
    between the pieces, and one for each piece."""
    card(monkeypatch, 1)
    inputs = make_inputs(batch, 128, 8, without=("initial_state",))
    assert_close(results(inputs, save=False), scan_cases.definition(inputs), torch.bfloat16)
    assert sum("tile_forward" in name for name, _ in emulator.launched) == 1 + again


def test_nan_crosses_segments_that_forget(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its namesake on the GPU; the definition says where nan belongs, but for its own chunk."""
    card(monkeypatch, 8)
    inputs = make_inputs(1, 200, 16)
    delta, u = inputs["delta"], inputs["u"]
    assert delta is not None
    assert u is not None
    delta += 5
    dy = weights(inputs)[0]
    dy[0, 190, 3] = float("nan")
    du = results(inputs, dy=dy)["du"][0]
    assert not du[:191, 3].isfinite().any()
    assert du[:, 4:].isfinite().all()
    u[0, 4, 3] = float("nan")
    y = results(inputs)["y"][0]
    assert not y[4:, 3].isfinite().any()
    assert y[:, 4:].isfinite().all()
    assert any("tile_carry" in name and blocks > 1 for name, blocks in emulator.launched)


def test_expanded_tensors(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient, B or C that all sequences share, and a delta that all steps share."""
    card(monkeypatch, 8)
    inputs = make_inputs(3, 24, 32)
    dy = weights(inputs)[0]
    for name in ("B", "C", "delta", "dy"):
        tensor = dy if name == "dy" else inputs[name]
        assert tensor is not None
        wide = (tensor[:, :1] if name == "delta" else tensor[:1]).expand_as(tensor)
        assert 0 in wide.stride()
        given = [inputs | {name: x} for x in (wide, wide.contiguous())]
        found, wanted = (results({n: g[n] for n in NAMES}, dy=g.get("dy", dy)) for g in given)
        assert all(torch.equal(found[k], wanted[k]) for k in wanted), name


def test_a_driver_that_takes_no_map(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 8)
    inputs = make_inputs(2, 24, 32)
    wanted = results(inputs)
    emulator.launched.clear()
    monkeypatch.setattr(scan_launch, "encode", lambda *_: b"")
    found = results(inputs)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (name,) = [name for name, _ in emulator.launched if "tile_backward" in name]
    assert name.endswith("false>")


def test_unknown_assembly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know 'brkpt;'"):
        translate('void f() { asm volatile("brkpt;"); }')


@pytest.mark.long
def test_parity_with_hand_overs_in_pieces(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, 2)
    inputs = make_inputs(5, 517, 16)
    assert_close(results(inputs), scan_cases.definition(inputs), torch.bfloat16)
    carries = [blocks for name, blocks in emulator.launched if "tile_carry" in name]
    # Of five sequences: two pieces each of two segments; four of one.
    assert carries == [5 * 2 * 2, 5 * 4]


@pytest.mark.long
def test_short_sequences_are_walked_as_one(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of them in two rounds; the results are those of each on its own, to the bit."""
    inputs = make_inputs(4, 40, 96, without=("initial_state",))
    given = [inputs[name] for name in NAMES]
    dy = weights(inputs)[0]

    def run() -> tuple[torch.Tensor, ...]:
        y, state, saved = cuda_scan.forward(*given, True, True)
        gradients = cuda_scan.backward(dy, None, *given, saved, True)
        return tuple(x for x in (y, state, saved, *gradients) if x is not None)

    def flags() -> list[str]:
        """FOLDED of the forward and of the backward: the fifth and the sixth template argument."""
        names = [name.rstrip(">").split(", ") for name, _ in emulator.launched if "ward<" in name]
        return [name[4 if "forward" in name[0] else 5] for name in names]

    card(monkeypatch, 1)
    folded = run()
    assert flags() == ["true", "true"]
    emulator.launched.clear()
    monkeypatch.setattr(Scan, "fold_sequences", lambda *_: None)
    whole = run()
    assert flags() == ["false", "false"]
    for one, two in zip(folded, whole, strict=True):
        if one.dtype == torch.bfloat16 or one.ndim == 4:
            assert torch.equal(one, two)
        else:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
