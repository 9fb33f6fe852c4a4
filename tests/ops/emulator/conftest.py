"""The kernels of the convolution, SSD, the delta rule and the scan, emulated in place of a GPU's.

The cases of the GPU tests serve the emulated kernels as well. `make test` takes the first case of
each test, `make test-long` the others. All of them::

    pytest tests/ops/emulator -m "long or not long"
"""

from __future__ import annotations

import struct
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulate import TAPS, Emulator

from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.delta import cuda as cuda_delta
from mambabyte.ops.fused import cuda as cuda_fused
from mambabyte.ops.fused import linear as fused_linear
from mambabyte.ops.fused import norm as fused_norm
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.cuda import launch as scan_launch
from mambabyte.ops.ssd import cuda as cuda_ssd
from mambabyte.ops.ssd import gates as cuda_gates
from mambabyte.ops.ssd.mamba3 import inputs as cuda_inputs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "gpu"))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases of a test besides its first are long."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if HERE in item.path.parents:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for item in chain.from_iterable(some[1:] for some in cases.values()):
        item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where built kernels stay: pytest's cache (``--cache-clear`` empties it) if it has one."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("emulated") if cache else tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="session")
def built_convolution(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    folder = tmp_path_factory.mktemp("convolution")
    given = f"#define TAPS {TAPS}\n#define AHEAD {cuda_conv._AHEAD}\n#define BLOCKS 1\n"
    here = Path(cuda_conv.__file__).parent
    sources = [(here.parent / name).read_text() for name in ("build/types.cu", "conv/conv.cu")]
    (folder / "conv.cu").write_text(given + "\n".join(sources))
    return Emulator(folder / "conv.cu", folder, kept)


@pytest.fixture
def convolution(built_convolution: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(name: str, dtype: torch.dtype, taps: int, width: int, device: object) -> object:
        assert taps == TAPS
        full = name if name == "conv_sums" else f"{name}<{cuda_conv.ELEMENTS[dtype]}, {width}>"

        def launch(grid, block, shared, stream, *args) -> None:
            built_convolution.launch(
                device, full, cuda_conv._PARAMETERS[name], grid[0], block[:2], shared, *args)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(cuda_conv, "_kernel", kernel)
    monkeypatch.setattr(cuda_conv, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cuda_conv, "raw_stream", lambda device: 0)


def built(names: tuple[str, ...], folder: Path, kept: Path) -> Emulator:
    here = Path(cuda_ssd.__file__).parent.parent
    sources = [(here / name).read_text() for name in names]
    (folder / "joined.cu").write_text("\n".join(sources))
    return Emulator(folder / "joined.cu", folder, kept)


CHUNKS = ("build/types.cu", "build/mma.cu", "build/chunks.cu")


@pytest.fixture(scope="session")
def built_gates(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    return built(("build/types.cu", "ssd/gates.cu"), tmp_path_factory.mktemp("gates"), kept)


@pytest.fixture
def gates(built_gates: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device, name, blocks, *args) -> None:
        parameters = cuda_gates._PARAMETERS[name.partition("<")[0]]
        built_gates.launch(device, name, parameters, blocks, (128, 1), 0, *args)

    monkeypatch.setattr(cuda_gates, "_launch", launch)


@pytest.fixture(scope="session")
def built_inputs(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    names = ("build/types.cu", "ssd/mamba3/inputs.cu")
    return built(names, tmp_path_factory.mktemp("inputs"), kept)


@pytest.fixture
def inputs(built_inputs: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device, name, blocks, shared, *args) -> None:
        parameters = cuda_inputs._PARAMETERS[name.partition("<")[0]]
        built_inputs.launch(device, name, parameters, blocks, (256, 1), shared, *args)

    monkeypatch.setattr(cuda_inputs, "_launch", launch)


@pytest.fixture(scope="session")
def built_ssd(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    names = (*CHUNKS, "ssd/mamba3/angles.cu", "ssd/ssd.cu")
    return built(names, tmp_path_factory.mktemp("ssd"), kept)


@pytest.fixture(scope="session")
def built_delta(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    return built((*CHUNKS, "delta/delta.cu"), tmp_path_factory.mktemp("delta"), kept)


@pytest.fixture
def delta(built_delta: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device, name, blocks, shared, *args) -> None:
        family = name.partition("<")[0]
        built_delta.launch(device, name, cuda_delta._PARAMETERS[family], blocks,
                           (cuda_delta._THREADS[family], 1), shared, *args)

    monkeypatch.setattr(cuda_delta, "_launch", launch)


@pytest.fixture
def ssd(built_ssd: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device, name, kind, blocks, shared, *args) -> None:
        family = name.partition("<")[0]
        built_ssd.launch(device, name, cuda_ssd._PARAMETERS[family], blocks,
                         (cuda_ssd._THREADS[family], 1), shared, *args)

    monkeypatch.setattr(cuda_ssd, "_launch", launch)
    monkeypatch.setattr(cuda_ssd, "_output_at_once", lambda device, kind, shared: 1)


@pytest.fixture(scope="session")
def built_fused(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> dict[str, Emulator]:
    folder = tmp_path_factory.mktemp("fused")
    ops = Path(cuda_fused.__file__).parent.parent
    for name in cuda_fused.SOURCES:
        sources = [(ops / file).read_text() for file in ("build/types.cu", f"fused/{name}.cu")]
        (folder / f"{name}.cu").write_text("\n".join(sources))
    return {name: Emulator(folder / f"{name}.cu", folder, kept) for name in cuda_fused.SOURCES}


@pytest.fixture
def fused(built_fused: dict[str, Emulator], monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(name, device, blocks, threads, *args) -> None:
        kernel = name.partition("<")[0]
        source = next(source for source, kernels in cuda_fused.SOURCES.items() if kernel in kernels)
        built_fused[source].launch(
            device, name, cuda_fused.PARAMETERS[kernel], blocks, (threads, 1), 0, *args)

    monkeypatch.setattr(cuda_fused, "_launch", launch)
    for module in (fused_linear, fused_norm):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cuda_fused, "takes", lambda *tensors: True)


@pytest.fixture(scope="session")
def built_scan(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Emulator:
    source = Path(cuda_plan.__file__).with_name("scan.cu")
    return Emulator(source, tmp_path_factory.mktemp("kernels"), kept)


def encode(
    device: object, address: int, batch: int, length: int, channels: int, by_batch: int,
    by_time: int, groups: int,
) -> bytes:  # fmt: skip
    """What lanes.h takes for a tensor map; refuses what the driver would."""
    assert by_time > 0
    assert by_batch > 0 or batch == 1
    sizes, steps = (8, length, channels // 8, batch), (2 * by_time, 16, 2 * by_batch)
    return struct.pack("<Q7Q4I", address, *sizes, *steps, 8, 8, groups, 1).ljust(128, b"\0")


@pytest.fixture(params=["hopper", "older"])
def emulator(
    request: pytest.FixtureRequest, built_scan: Emulator, monkeypatch: pytest.MonkeyPatch
) -> Emulator:
    """The scan's kernels; how many multiprocessors there are is left to the test."""
    monkeypatch.setattr(scan_launch, "launch", built_scan.launch)
    monkeypatch.setattr(scan_launch, "is_hopper", lambda device: request.param == "hopper")
    monkeypatch.setattr(scan_launch, "takes_boxes", lambda device: request.param == "hopper")
    monkeypatch.setattr(scan_launch, "encode", encode)
    monkeypatch.setattr(cuda_plan, "block_shared", lambda device: 227 << 10)
    built_scan.launched.clear()
    return built_scan
