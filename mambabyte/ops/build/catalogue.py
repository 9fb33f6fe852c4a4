"""Which programs come with the package as machine code, and the command that builds it.

They are what a training of any preset launches in bf16. ``make cubins`` builds those that are
missing, or whose source was changed, by NVRTC and without a GPU: some minutes.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator

import torch

from mambabyte.ops.build import shipped
from mambabyte.ops.build.kernel import Program
from mambabyte.ops.conv import cuda as conv
from mambabyte.ops.delta import cuda as delta
from mambabyte.ops.fused import cuda as fused
from mambabyte.ops.scan.cuda import launch as scan
from mambabyte.ops.ssd import cuda as ssd
from mambabyte.ops.ssd import gates
from mambabyte.ops.ssd.mamba3 import inputs

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def programs(arch: str) -> Iterator[Program]:
    """Every program that there shall be machine code of for ``arch``."""
    yield conv.program(torch.bfloat16, 4)
    yield from (ssd.program(ssd.Kind(64, turned)) for turned in (False, True))
    yield gates.program()
    yield inputs.program()
    yield delta.program()
    yield from map(scan.program, scan.trained(hopper=int(arch.removeprefix("sm_")) >= 90))
    yield from map(fused.program, fused.trained())


def build(arch: str) -> tuple[int, int]:
    """Bring the archive of ``arch`` up to date; (programs in it, compiled of these)."""
    wanted = {program.digest: program for program in programs(arch)}
    entries = {}
    for digest, program in wanted.items():
        known = shipped.find(arch, digest)
        if known is None:
            cubin = program.compile(arch)
            known = cubin.image, cubin.lowered
        entries[digest] = shipped.packed(*known)
    made = set(wanted) - shipped.digests(arch)
    if made or set(wanted) != shipped.digests(arch):
        path = shipped.FOLDER / f"{arch}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
            for digest, payload in sorted(entries.items()):  # the same bytes from the same code
                file.writestr(zipfile.ZipInfo(digest), payload, zipfile.ZIP_LZMA)
        shipped.digests.cache_clear()
    return len(wanted), len(made)


if __name__ == "__main__":
    for each in sys.argv[1:] or ARCHS:
        count, compiled = build(each)
        print(f"{each}: {count} programs, {compiled} compiled", flush=True)
