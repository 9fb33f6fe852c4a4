"""Run-time compilation without a GPU: every CUDA source compiles, and the cache survives harm."""

from __future__ import annotations

import os
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambabyte import ops
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.model.fused import cast_together
from mambabyte.ops.build import catalogue, kernel, nvrtc, shipped
from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.delta import cuda as cuda_delta
from mambabyte.ops.fused import cuda as cuda_fused
from mambabyte.ops.fused import linear as fused_linear
from mambabyte.ops.fused import norm as fused_norm
from mambabyte.ops.mamba import cuda as cuda_step
from mambabyte.ops.mamba import fused as mixer
from mambabyte.ops.scan import cuda as cuda_scan
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.cuda import launch as scan_launch
from mambabyte.ops.ssd import cuda as cuda_ssd
from mambabyte.ops.ssd import gates as cuda_gates
from mambabyte.ops.ssd.mamba3 import inputs as cuda_inputs
from mambabyte.ops.stream import cuda as cuda_stream
from mambabyte.task.systems import SYSTEMS
from mambabyte.train.captured import prepare

AVAILABLE, REASON = nvrtc.nvrtc_available()
needs_nvrtc = pytest.mark.skipif(not AVAILABLE, reason=REASON)

ARCHS = ("sm_80", "sm_90", "sm_100")
# A large program takes seconds a card: the daily suite compiles it for one.
ONE_DAILY = [arch if arch == "sm_90" else pytest.param(arch, marks=pytest.mark.long)
             for arch in ARCHS]
SCALE = "template <int N> __global__ void scale(float *x) { x[threadIdx.x] *= N; }"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@needs_nvrtc
@pytest.mark.parametrize("arch", ONE_DAILY)
@pytest.mark.parametrize("dtype", list(cuda_conv.ELEMENTS))
@pytest.mark.long  # what is shipped was compiled; a test of the daily suite tells what is stale
def test_convolution_and_step_compile(arch: str, dtype: torch.dtype) -> None:
    for program in (cuda_conv.program(dtype, 4), cuda_step.program(dtype), cuda_gates.program(),
                    cuda_inputs.program()):
        cubin = program.compile(arch)
        assert cubin.image[:4] == b"\x7fELF"
        assert set(cubin.lowered) == set(program.names)
        assert all(mangled.encode() in cubin.image for mangled in cubin.lowered.values())


@needs_nvrtc
@pytest.mark.long  # seconds each; what is shipped was compiled, the daily suite tells what is stale
@pytest.mark.parametrize("arch", ONE_DAILY)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("states", cuda_ssd.STATES)
def test_ssd_compiles(arch: str, states: int, turned: bool) -> None:
    kind = cuda_ssd.Kind(states, turned)
    cubin = cuda_ssd.program(kind).compile(arch)
    assert set(cubin.lowered) == set(cuda_ssd.names(kind))


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("arch", ONE_DAILY)
def test_the_delta_rule_compiles(arch: str) -> None:
    cubin = cuda_delta.program().compile(arch)
    assert set(cubin.lowered) == set(cuda_delta.NAMES)


STREAMED = [
    cuda_stream.Shape(4, 192, 384, 16, 12, 4),
    cuda_stream.Shape(2, 32, 64, 8, 2, 4, cap=15.0),
    cuda_stream.Shape(3, 100, 200, 40, 70, 3, 275, "gelu", False, 1e-7, 1e-7),
]


@needs_nvrtc
@pytest.mark.parametrize("arch", ONE_DAILY[1:])
@pytest.mark.parametrize("blocks", cuda_stream.CLUSTERS)
@pytest.mark.parametrize("shape", STREAMED, ids=str)
@pytest.mark.long
def test_the_streaming_model_compiles(arch: str, blocks: int, shape: cuda_stream.Shape) -> None:
    plan = cuda_stream.plan(shape, blocks, 2, 227 * 1024)
    assert plan is not None
    assert plan.shared_bytes <= 227 * 1024
    assert plan.program().compile(arch).image[:4] == b"\x7fELF"  # its sizes are checked in there


def test_a_model_whose_exchanges_do_not_fit_has_no_plan() -> None:
    assert cuda_stream.plan(STREAMED[0], 16, 8, 130 * 1024) is None


def scan_kernels(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, trained: bool = False
) -> set[str]:
    """Names of the kernels that the scan launches, read off calls whose launches do nothing;
    ``trained`` as in training, from no state."""
    names: set[str] = set()
    monkeypatch.setattr(scan_launch, "launch", lambda device, name, *_, **__: names.add(name))
    monkeypatch.setattr(scan_launch, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(scan_launch, "takes_boxes", lambda device: hopper)
    monkeypatch.setattr(scan_launch, "encode", lambda *_: bytes(128))
    monkeypatch.setattr(cuda_plan, "block_shared", lambda device: 227 << 10)
    for dtype, length, channels, multiprocessors in (
        (torch.bfloat16, 8, 32, 132),
        (torch.bfloat16, 4096, 32, 132),
        (torch.bfloat16, 64, 192, 1),  # few multiprocessors, so wide blocks fill them
        (torch.bfloat16, 64, 96, 1),
        (torch.float32, 4096, 32, 132),
    ):
        monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device, n=multiprocessors: n)
        u = torch.zeros(1, length, channels, dtype=dtype)
        B = torch.zeros(1, length, 16, dtype=dtype)
        A, D = torch.zeros(channels, 16), torch.zeros(channels)
        first = None if trained else torch.zeros(1, channels, 16)
        inputs = (u, u, A, B, B, D, u, D, first)
        _, state, saved = cuda_scan.forward(*inputs, True, True)
        cuda_scan.backward(u, None if trained else state, *inputs, saved, True)
    return names


@needs_nvrtc
@pytest.mark.long  # 14 s; the daily suite runs these kernels emulated
@pytest.mark.parametrize("arch", ONE_DAILY)
def test_the_scan_compiles(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = scan_kernels(monkeypatch, hopper=arch != "sm_80")
    assert len(names) >= 12
    cubin = kernel.Program.from_file("scan/scan.cu", names=sorted(names)).compile(arch)
    assert cubin.image[:4] == b"\x7fELF"


@needs_nvrtc
def test_a_kernel_has_its_mangled_name_and_ptx_can_be_had() -> None:
    cubin = nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<3>", "scale<4>"))
    assert len(set(cubin.lowered.values())) == 2
    ptx = nvrtc.compile_cubin(SCALE, arch="compute_80", names=("scale<3>",))
    assert b".target sm_80" in ptx.image


def test_no_kernel_calls_what_fast_math_makes_coarse() -> None:
    """Its tanhf has 11 bits, which no emulator shows: angles of Mamba-3 had that error."""
    sources = [*Path(ops.__file__).parent.rglob("*.cu"), *Path(ops.__file__).parent.rglob("*.h")]
    assert len(sources) > 20
    for path in sources:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"\btanhf?\s*\(", code), path

@needs_nvrtc
def test_a_compile_error_is_one_line_with_the_log_attached() -> None:
    first = r"^bad.cu does not compile for sm_90: bad.cu\(1\)"
    with pytest.raises(nvrtc.NvrtcError, match=first) as e:
        nvrtc.compile_cubin("__global__ void f() { nothing; }", arch="sm_90", filename="bad.cu")
    assert "\n" not in str(e.value)
    assert "nothing" in e.value.log
    with pytest.raises(nvrtc.NvrtcError):
        nvrtc.compile_cubin(SCALE, arch="sm_1")


@needs_nvrtc
def test_the_cache_is_used_and_keyed_by_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile_cubin(SCALE, (), "sm_90", ("scale<3>",))
    compiled = []

    def count(*args: object) -> nvrtc.Cubin:
        compiled.append(args)
        return first

    monkeypatch.setattr(nvrtc, "_compile", count)
    assert nvrtc.compile_cubin(SCALE, (), "sm_90", ("scale<3>",)) == first
    assert not compiled
    nvrtc.compile_cubin(SCALE + " ", (), "sm_90", ("scale<3>",))
    nvrtc.compile_cubin(SCALE, ("-DX=1",), "sm_90", ("scale<3>",))
    nvrtc.compile_cubin(SCALE, (), "sm_80", ("scale<3>",))
    nvrtc.compile_cubin(SCALE, (), "sm_90", ("scale<4>",))
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (99, 0))
    nvrtc.compile_cubin(SCALE, (), "sm_90", ("scale<3>",))
    assert len(compiled) == 5


@needs_nvrtc
@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 1000])
def test_a_damaged_cache_is_compiled_again(damage: bytes) -> None:
    first = nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<3>",))
    (entry,) = nvrtc.cache_folder().iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<3>",)) == first
    assert entry.read_bytes() == whole


@needs_nvrtc
def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<3>",)).image

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "replace", refuse)
    assert nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<3>",)).image
    assert list(nvrtc.cache_folder().iterdir()) == []  # no temporary file is left


@needs_nvrtc
def test_many_threads_compile_the_same_source() -> None:
    found: list[nvrtc.Cubin] = []

    def work() -> None:
        found.append(nvrtc.compile_cubin(SCALE, arch="sm_90", names=("scale<7>",)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(list(nvrtc.cache_folder().iterdir())) == 1


def test_a_missing_nvrtc_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cached in (nvrtc._nvrtc, nvrtc.nvrtc_version, nvrtc.supported_archs):
        cached.cache_clear()
    monkeypatch.setattr(nvrtc, "_nvrtc_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    available, reason = nvrtc.nvrtc_available()
    with pytest.raises(nvrtc.NvrtcError) as error:
        nvrtc.compile_cubin(SCALE, arch="sm_90")
    nvrtc._nvrtc.cache_clear()
    assert not available
    assert "pip install nvidia-cuda-nvrtc" in reason
    assert "\n" not in reason
    assert "/nowhere/libnvrtc.so" in error.value.log


def test_sources_use_no_headers_and_are_packaged() -> None:
    folder = Path(ops.__file__).parent
    sources = sorted(folder.rglob("*.cu"))
    names = {"angles.cu", "conv.cu", "delta.cu", "gates.cu", "scan.cu", "ssd.cu", "step.cu",
             "stream.cu"}
    assert names <= {path.name for path in sources}
    for path in sources:
        assert not re.search(r"^\s*#\s*include", path.read_text(), re.MULTILINE), path.name


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(kernel, "_make_context_current", made.append)

    def function(answer: int) -> int:
        return answer if made else kernel._INVALID_CONTEXT

    assert kernel._in_context(3, function, 0) == 0
    assert made == [3]
    assert kernel._in_context(3, function, 1) == 1  # another failure is handed on
    assert made == [3]


@pytest.mark.parametrize("arch", catalogue.ARCHS)
def test_machine_code_that_is_shipped_is_of_the_present_sources(arch: str) -> None:
    wanted = {program.digest: f"{program.filename} {program.names[0]}"
              for program in catalogue.programs(arch)}
    stale = sorted(wanted[digest] for digest in wanted.keys() - shipped.digests(arch))
    assert not stale, f"{arch}: run `make cubins`; compiled at run time until then: {stale}"
    assert not shipped.digests(arch) - wanted.keys()


def test_what_is_shipped_has_every_kernel_and_is_small() -> None:
    for arch in catalogue.ARCHS:
        program = next(catalogue.programs(arch))
        found = shipped.find(arch, program.digest)
        assert found is not None
        image, lowered = found
        assert image[:4] == b"\x7fELF"
        assert all(lowered[name].encode() in image for name in program.names)
    assert sum(path.stat().st_size for path in shipped.FOLDER.iterdir()) < 4 << 20


@pytest.mark.parametrize("hopper", [False, True])
def test_every_scan_of_a_training_is_among_what_is_shipped(
    hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {name for name in scan_kernels(monkeypatch, hopper, trained=True)
                if name.startswith("tile")}
    assert len(launched) >= 6
    assert launched <= set(scan_launch.trained(hopper))


def _trainings() -> dict[str, tuple[ModelConfig, str]]:
    """What models people train on a card without a word of their own: presets and systems."""
    found = {name: (preset.model, "bf16") for name, preset in PRESETS.items()}
    return found | {f"task:{name}": (system.model, system.train.precision)
                    for name, system in SYSTEMS.items()
                    if system.model is not None and name not in PRESETS}


@pytest.mark.parametrize("name", [
    name if name in ("modded_nanogpt", "hybrid_3_1", "task:ours")
    else pytest.param(name, marks=pytest.mark.long) for name in _trainings()])
def test_every_program_of_a_training_step_is_shipped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the joined kernels, which are asked for and not run; so whatever else comes of
    them is no number."""
    asked: dict[str, str] = {}

    def asked_for(self: kernel.Program, name: str, device: object, parameters: str) -> object:
        asked[self.digest] = name
        return SimpleNamespace(allow_shared=lambda *_: None, launch=lambda *_, **__: None)

    monkeypatch.setattr(kernel.Program, "kernel", asked_for)
    for module in (cuda_conv, scan_launch, cuda_fused):
        monkeypatch.setattr(module, "_kernel", module._kernel.__wrapped__)  # nothing is kept
        monkeypatch.setattr(module, "raw_stream", lambda device: 0)
    for module in (cuda_conv, fused_linear, fused_norm, cuda_plan):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda_plan, "block_shared", lambda device: 227 << 10)
    monkeypatch.setattr(scan_launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(scan_launch, "takes_boxes", lambda device: True)
    monkeypatch.setattr(scan_launch, "encode", lambda *_: bytes(128))
    monkeypatch.setattr(cuda_fused, "takes", lambda *tensors: True)
    monkeypatch.setattr(mixer, "DEVICES", ("cpu",))
    monkeypatch.setattr(MambaMixer, "forward", lambda self, x, *_: self.from_start(x))

    config, precision = _trainings()[name]
    kinds = "".join(dict.fromkeys(config.layers))  # a layer of each
    assert {*kinds} <= {"M", "A"}, "say here how the others are reached without a card"
    model = ByteLM(replace(config, layer_pattern=kinds, n_layer=len(kinds)))
    prepare(model, TrainConfig(context=16, step="fused", precision=precision))
    tokens = torch.randint(0, 256, (1, 17))
    with torch.library._scoped_library("mambabyte", "IMPL") as library, \
            torch.autocast("cpu", torch.bfloat16):
        library.impl("mixer", mixer.forward, "CPU")
        library.impl("mixer_backward", mixer.backward, "CPU")
        cast_together(model, model.loss)(tokens).backward()
    assert asked
    missing = [asked[digest] for digest in asked.keys() - shipped.digests("sm_90")]
    assert not missing, "compiled at the start of a training: add to what the catalogue has"


class Driver:
    """Loads what it is given, but not the images that it ``refuses``."""

    def __init__(self, refuses: bytes = b"") -> None:
        self.refuses, self.loaded = refuses, []

    def cuModuleLoadData(self, module: object, image: bytes) -> int:
        self.loaded.append(image)
        return 200 if image == self.refuses else 0

    def cuThreadExchangeStreamCaptureMode(self, mode: object) -> int:
        return 0


@pytest.mark.parametrize(("known", "refuses", "loaded"), [
    (True, b"", [b"shipped"]), (True, b"shipped", [b"shipped", b"compiled"]),
    (False, b"", [b"compiled"])])
def test_what_is_shipped_comes_first(
    known: bool, refuses: bytes, loaded: list[bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source that was changed, and a driver that cannot load what is there, compile."""
    program = kernel.Program("a source", ("f",))
    with zipfile.ZipFile(tmp_path / "sm_87.zip", "w") as file:
        file.writestr(program.digest if known else "other", shipped.packed(b"shipped", {"f": "_f"}))
    driver = Driver(refuses)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(kernel, "_driver", lambda: driver)
    monkeypatch.setattr(kernel, "_make_context_current", lambda device: None)
    monkeypatch.setattr(kernel, "device_arch", lambda device: "sm_87")
    monkeypatch.setattr(kernel.torch.cuda, "init", lambda: None)
    monkeypatch.setattr(kernel.torch.cuda, "get_device_capability", lambda device: (8, 7))
    monkeypatch.setattr(kernel.Program, "compile",
                        lambda *_: kernel.Cubin("sm_87", b"compiled", {"f": "_f"}))
    shipped.digests.cache_clear()
    program._load(0)
    shipped.digests.cache_clear()
    assert driver.loaded == loaded
