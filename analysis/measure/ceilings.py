"""What a machine reaches at best, measured in a few seconds: bytes, exponentials, multiply-adds."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch

from analysis.measure.timing import device_seconds_of
from mambabyte.ops.build.kernel import Program, raw_stream
from mambabyte.ops.build.nvrtc import nvrtc_available
from mambabyte.ops.scan.operator import fused_available

_FMAS_OF_EXP2 = 8
_SOURCE = """
extern "C" __global__ void exps(float *out, int loops) {
    float x[8];
    for (int i = 0; i < 8; i++) x[i] = threadIdx.x * 1e-3f + i;
    for (int l = 0; l < loops; l++)
#pragma unroll
        for (int i = 0; i < 8; i++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += x[i];
    if (sum == 1.25f) out[0] = sum;
}
extern "C" __global__ void fmas(float *out, int loops) {
    float x[8], a = threadIdx.x * 1e-3f, b = a + 1.f;
    for (int i = 0; i < 8; i++) x[i] = i;
    for (int l = 0; l < loops; l++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x[i]) : "f"(a), "f"(b));
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += x[i];
    if (sum == 1.25f) out[0] = sum;
}
"""


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes copied (read and written), exp2 and fp32 multiply-adds a second.

    On a GPU by a copy of 1 GiB and two kernels of nothing else. On a CPU by a copy and a float32
    matrix product; a CPU has no exponential, and a polynomial one takes some 8 multiply-adds.
    """
    on_gpu = device.type == "cuda"
    source = torch.zeros((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / _best(functools.partial(target.copy_, source), device)
    del source, target
    if on_gpu and nvrtc_available()[0]:
        index = device.index if device.index is not None else torch.cuda.current_device()
        blocks = 8 * torch.cuda.get_device_properties(index).multi_processor_count
        threads, loops, out = 256, 4096, torch.zeros(1, device=device)
        program = Program(_SOURCE, ("exps", "fmas"), filename="ceilings.cu")
        rates = []
        for name in ("exps", "fmas"):
            kernel = program.kernel(name, index, "Pi")
            grid, block, stream = (blocks, 1, 1), (threads, 1, 1), raw_stream(index)
            launch = functools.partial(kernel.launch, grid, block, 0, stream)
            seconds = _best(functools.partial(launch, out.data_ptr(), loops), device)
            rates.append(blocks * threads * loops * 8 / seconds)
        exps, fmas = rates
    else:
        a = torch.rand(1024, 1024, device=device)
        fmas = 1024**3 / _best(lambda: a @ a, device)
        exps = fmas / _FMAS_OF_EXP2
    return {
        "copy_bytes_per_second": copy,
        "exp2_per_second": exps,
        "fp32_fma_per_second": fmas,
    }


def _best(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Least seconds of a few calls: a ceiling is the best that was seen."""
    run()
    flush = torch.empty(1, device=device) if device.type == "cuda" else None
    return min(device_seconds_of(run, flush) for _ in range(repeats))


def describe_machine(device: str | torch.device | None = None) -> dict[str, object]:
    """What the numbers were measured on: device, versions, and its ceilings, measured now.

    The device is the GPU if there is one and none is given.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        details = f"{properties.multi_processor_count} multiprocessors"
    else:
        name = platform.processor() or platform.machine()
        details = f"{torch.get_num_threads()} threads"
    return {
        "device": name,
        "details": details,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": fused_available(device)[1],
        **measure_ceilings(device),
    }
