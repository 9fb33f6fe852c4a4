"""Energy meters: NVML's counter for GPUs, RAPL for CPUs, else nothing. Nothing is estimated."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
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
    source: str  # "NVML ...", "RAPL ..." or "not measured (why)", "not measured from ... on (why)"

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
        self.identity = uuid or f"GPU {index} of {socket.gethostname()}"
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


def _current() -> int:
    """What torch takes "cuda" to be; 0 where it sees none."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


class _Zone:
    """One RAPL counter: microjoules since construction, unwrapped."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.span = int((folder / "max_energy_range_uj").read_text()) + 1
        self.now = int(self._file.read_text())
        self.total = 0
        self.mirror = True  # of the first die of its package, until they differ

    def advance(self) -> None:
        last, self.now = self.now, int(self._file.read_text())
        self.total += (self.now - last) % self.span


class RaplCounter:
    """Energy of all CPU packages in microjoules, unwrapped (Linux powercap; mostly root only).

    A zone "psys" is the whole platform, packages included, and is left out. The dies of a package
    have counters of their own on some processors, and all show the package's on others (AMD EPYC
    before Linux 6.10): a die whose counter is always between two readings of the first die's is
    the same counter, and is not added.
    """

    source = "RAPL, all CPU packages"

    def __init__(self, root: Path | None = None) -> None:
        root = root or RAPL_ROOT
        packages: dict[str, list[_Zone]] = {}
        for folder in sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1):
            file = folder / "name"
            name = file.read_text().strip() if file.exists() else folder.name
            if name != "psys":
                packages.setdefault(name.partition("-die-")[0], []).append(_Zone(folder))
        if not packages:
            raise OSError(f"no RAPL zones under {root}")
        self._packages = list(packages.values())
        self.identity = f"RAPL of {socket.gethostname()}"

    def joules(self) -> float:
        """Joules since construction; right as long as it is read once per wrap (minutes)."""
        total = 0
        for first, *others in self._packages:
            first.advance()
            low = first.now
            for die in others:
                die.advance()
            if others:
                first.advance()
            total += first.total
            for die in others:
                die.mirror &= (die.now - low) % die.span <= (first.now - low) % first.span
                total += 0 if die.mirror else die.total
        return total / 1e6


class EnergyMeter:
    """Measures from construction on. ``device`` "cuda" or "cuda:1" reads NVML, "cpu" RAPL.

    A counter that fails later, or runs backwards, is not read again: from then on nothing is
    measured, and ``source`` says since when.
    """

    def __init__(self, device: str = "cpu", idle_watts: float = 0.0) -> None:
        self.idle_watts = idle_watts
        self.identity = ""  # which counter this is, on all machines; "" for none
        self._counter: NvmlCounter | RaplCounter | None = None
        self._start = self._last = 0.0
        try:
            if device.startswith("cuda"):
                _, _, index = device.partition(":")
                counter: NvmlCounter | RaplCounter = NvmlCounter(
                    int(index) if index else _current())
            else:
                counter = RaplCounter()
            self._start = self._last = counter.joules()
            self._counter, self.source, self.identity = counter, counter.source, counter.identity
        except Exception as error:  # NVML has its own hierarchy; each means there is no counter
            self.source = f"{NOT_MEASURED} ({_first_line(error)})"
        self._began = time.perf_counter()

    def read(self, at: str = "") -> Energy:
        """Energy since construction. The caller synchronises the device first.

        ``at`` says where in the work this is, as in "step 20": what ``source`` names if the counter
        fails here.
        """
        seconds = time.perf_counter() - self._began
        gross = self._gross(at)
        net = None if gross is None else gross - self.idle_watts * seconds
        return Energy(net, gross, seconds, self.idle_watts, self.source)

    def _gross(self, at: str) -> float | None:
        if self._counter is None:
            return None
        try:
            now = self._counter.joules()
            if not now >= self._last:
                raise OSError(f"the counter went from {self._last:g} J to {now:g} J")
        except Exception as error:  # as at construction: the work goes on without a counter
            self._counter = None
            self.source = f"{NOT_MEASURED} from {at or 'here'} on ({_first_line(error)})"
            return None
        self._last = now
        return now - self._start


def total(meters: Iterable[tuple[str, float | None]]) -> float | None:
    """Joules of several processes from the ``identity`` and the reading of each one's meter.

    A counter that several have read counts once; None where any has none.
    """
    found = dict(meters)
    known = [joules for joules in found.values() if joules is not None]
    return sum(known) if known and len(known) == len(found) else None


CPU_WATTS = 42.0  # the public rule's estimate of a host, where its counter cannot be read
FLOOR_WATTS = 50.0  # no run of the public rule counts as less


def total_joules(gpu: Energy, cpu: Energy) -> tuple[float, float, str]:
    """Joules of a run under the public rule of 2026-05, those of its CPU in them, and where the
    latter are from: the GPU's net of idle, and the CPU's counter or ``CPU_WATTS`` over the time,
    but never below ``FLOOR_WATTS`` over the time. A run on a CPU alone has no GPU's."""
    if cpu.gross_joules is None:
        host, source = CPU_WATTS * gpu.seconds, f"estimated, {CPU_WATTS:g} W"
    else:
        host, source = cpu.gross_joules, cpu.source
    net = gpu.joules if gpu.joules is not None and gpu.source != cpu.source else 0.0
    return max(net + host, FLOOR_WATTS * gpu.seconds), host, source


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
