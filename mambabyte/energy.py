"""Energy meters: NVML's counter for GPUs, RAPL for CPUs, else nothing. Nothing is estimated."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

NOT_MEASURED = "not measured"
RAPL_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Energy of an interval. ``joules`` is None when no counter could be read."""

    joules: float | None  # gross minus idle_watts * seconds
    gross_joules: float | None
    seconds: float
    idle_watts: float  # what was subtracted, in watts; 0 means gross
    source: str  # "NVML ...", "RAPL ..." or "not measured (why)"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        if self.joules is None:
            return self.source
        note = f", {self.idle_watts:g} W idle subtracted" if self.idle_watts else ""
        return f"{self.joules:.1f} J ({self.source}{note})"


class NvmlCounter:
    """Total energy of one GPU since the driver loaded, in millijoules (NVML, Volta and later)."""

    def __init__(self, index: int) -> None:
        import pynvml  # the module of the package nvidia-ml-py

        pynvml.nvmlInit()
        self._nvml = pynvml
        # CUDA_VISIBLE_DEVICES renumbers GPUs for CUDA alone; the UUID is the same for both.
        uuid = _cuda_uuid(index)
        self._handle = (pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid
                        else pynvml.nvmlDeviceGetHandleByIndex(index))
        self.source = f"NVML total energy counter, GPU {index}"
        self.joules()  # raises here, once, where the counter is missing

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def _cuda_uuid(index: int) -> str | None:
    """NVML's name of the GPU that CUDA numbers ``index``; None where CUDA does not tell."""
    import torch

    if not torch.cuda.is_available():
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


class RaplCounter:
    """Energy of all CPU packages in microjoules, unwrapped (Linux powercap; mostly root only)."""

    source = "RAPL, all CPU packages"

    def __init__(self, root: Path = RAPL_ROOT) -> None:
        zones = sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1)
        if not zones:
            raise OSError(f"no RAPL zones under {root}")
        self._files = [zone / "energy_uj" for zone in zones]
        self._range = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._last = [int(f.read_text()) for f in self._files]
        self._total_uj = 0

    def joules(self) -> float:
        """Joules since construction; right as long as it is read once per wrap (minutes)."""
        for i, file in enumerate(self._files):
            now = int(file.read_text())
            self._total_uj += (now - self._last[i]) % (self._range[i] + 1)
            self._last[i] = now
        return self._total_uj / 1e6


class EnergyMeter:
    """Measures from construction on. ``device`` "cuda" or "cuda:1" reads NVML, "cpu" RAPL."""

    def __init__(self, device: str = "cpu", idle_watts: float = 0.0) -> None:
        self.idle_watts = idle_watts
        self._counter: NvmlCounter | RaplCounter | None = None
        try:
            if device.startswith("cuda"):
                _, _, index = device.partition(":")
                self._counter = NvmlCounter(int(index or 0))
            else:
                self._counter = RaplCounter()
            self.source = self._counter.source
            self._start = self._counter.joules()
        except Exception as error:  # NVML has its own hierarchy; each means there is no counter
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.source = f"{NOT_MEASURED} ({first_line})"
        self._began = time.perf_counter()

    def read(self) -> Energy:
        """Energy since construction. The caller synchronises the device first."""
        seconds = time.perf_counter() - self._began
        if self._counter is None:
            return Energy(None, None, seconds, self.idle_watts, self.source)
        gross = self._counter.joules() - self._start
        return Energy(
            gross - self.idle_watts * seconds, gross, seconds, self.idle_watts, self.source
        )
