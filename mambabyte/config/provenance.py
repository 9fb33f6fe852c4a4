"""Where a number came from: machine, versions, commit, command, date."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mambabyte", "torch", "triton", "numpy", "safetensors", "sentencepiece")


@cache
def cpu_name() -> str:
    """The processor's name as Linux has it, elsewhere what Python knows of it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@cache
def commit() -> str:
    """The commit of the checkout this package runs from, marked when the tree differs from it.

    Where there is no checkout, as in a container, it is what $MAMBABYTE_COMMIT says.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: git would tell of what the environment stands in
        return os.environ.get("MAMBABYTE_COMMIT", "unknown (not a git checkout)")
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("MAMBABYTE_COMMIT", "unknown (not a git checkout)")
    return run.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES that are installed, and of torch's CUDA once it is loaded.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if (torch := _torch()) and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine() -> dict[str, object]:
    """What the numbers were measured on. No host or user names. Threads and GPUs are torch's: a
    process that has not loaded it, which takes seconds, has used none."""
    about: dict[str, object] = {
        "cpu": cpu_name(), "cpu_count": os.cpu_count(), "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}"}
    if torch := _torch():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())
                 ] if torch.cuda.is_available() else []
        about |= {"threads": torch.get_num_threads(), "gpus": [
            {"name": p.name, "memory_bytes": p.total_memory,
             "multiprocessors": p.multi_processor_count} for p in cards]}
    return about


def _torch() -> Any:
    """The module where it is loaded."""
    return sys.modules.get("torch")


@cache
def job() -> dict[str, str]:
    """Identity of this command, drawn anew in each process, and of the machine since it started.

    What is compared in time, joules or bytes must share the first (analysis.runs.jobs); no option
    sets it. The machine's is a digest: no host name.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = ""
    host = hashlib.sha256(f"{started} {platform.node()}".encode()).hexdigest()[:12]
    return {"id": uuid.uuid4().hex[:12], "host": host if started else ""}


def provenance() -> dict[str, object]:
    """One record of where and when, for every run folder and measurement."""
    name = Path(sys.argv[0]).name
    command = ["mambabyte" if name == "cli.py" else name, *sys.argv[1:]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "commit": commit(),
        "job": job(),
        "versions": versions(),
        "machine": machine(),
    }
