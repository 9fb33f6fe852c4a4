"""Runs kernels of a CUDA source on the CPU, lane by lane (see ``lanes.h``): slow, exact about
layouts, barriers and asynchronous copies, blind to speed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import struct
import subprocess
from pathlib import Path

LANES = tuple(Path(__file__).parent / "lanes" / name for name in ("lanes.h", "fibers.cpp"))
TAPS = 4  # of the emulated convolution
# The instruction that a piece of inline assembly is about -> its function in lanes.h. First match.
INSTRUCTIONS = {
    r"^$": "nothing",
    r"griddepcontrol": "nothing",
    r"setmaxnreg": "nothing",
    r"fence\.mbarrier_init": "nothing",
    r"barrier\.cluster": "cluster_barrier",
    r"bar\.sync": "bar_sync",
    r"mapa": "mapa",
    r"st\.async": "st_async",
    r"fence\.proxy": "nothing",
    r"elect\.sync": "elect",
    r"cp\.async\.bulk\.tensor\.4d": "copy_box",
    r"cp\.async\.bulk\.shared": "copy_bulk",
    r"mbarrier\.arrive\.expect_tx": "mbarrier_arrive_expect",
    r"mad\.wide\.s32": "mad_wide",
    r"cvt\.f32\.f16": "cvt_f32_f16",
    r"cvt\.rn\.f16\.f32": "cvt_f16_f32",
    r"cvt\.rn\.bf16\.f32": "cvt_bf16_f32",
    r"cvt\.rn\.bf16x2": "cvt_bf16x2_f32",
    r"ex2\.approx": "ex2",
    r"rcp\.approx": "rcp",
    r"fma\.rn\.bf16x2": "fma_bf16x2",
    r"max\.NaN\.bf16x2": "max_nan_bf16x2",
    r"mma\.sync.*m16n8k16.*bf16": "mma_bf16",
    r"mma\.sync.*m16n8k8.*tf32": "mma_tf32_k8",
    r"mma\.sync.*m16n8k4.*tf32": "mma_tf32_k4",
    r"movmatrix": "movmatrix",
    r"ldmatrix.*x2\.shared": "ldmatrix_x2",
    r"ldmatrix.*x4\.shared": "ldmatrix_x4",
    r"ldmatrix.*x4\.trans": "ldmatrix_x4_trans",
    r"ld\.shared\.v4": "ld_shared_v4",
    r"ld\.shared\.v2": "ld_shared_v2",
    r"st\.shared\.v4": "st_shared_v4",
    r"st\.global\.v4": "st_global_v4",
    r"st\.shared\.v2": "st_shared_v2",
    r"st\.global\.b32": "st_global_if",
    r"st\.relaxed\.gpu\.global\.b128": "st_relaxed_b128",
    r"ld\.relaxed\.gpu\.global\.b128": "ld_relaxed_b128",
    r"ld\.volatile\.global\.v2": "ld_volatile_v2",
    r"cp\.async\.mbarrier\.arrive": "cp_async_arrive",
    r"cp\.async\.wait_all": "cp_async_wait_all",
    r"cp\.async\.wait_group": "cp_async_wait_group",
    r"cp\.async\.commit_group": "cp_async_commit",
    r"cp\.async\.c[ag]": "cp_async",
    r"mbarrier\.init": "mbarrier_init",
    r"mbarrier\.arrive": "mbarrier_arrive",
    r"mbarrier\.t\w+_wait": "mbarrier_try_wait",
}


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes; strings do not count."""
    depth, quoted = 0, False
    for at in range(start, len(text)):
        if text[at] == '"':
            quoted = not quoted
        elif not quoted:
            depth += (text[at] == "(") - (text[at] == ")")
            if depth == 0:
                return at
    raise ValueError(f"no closing parenthesis: {text[start : start + 60]!r}")


def _call(assembly: str) -> str:
    """A call of the emulated instruction with the operands of one asm statement, in their order."""
    strings = re.match(r'\s*((?:"[^"]*"\s*)+)', assembly)
    assert strings, assembly
    code = "".join(re.findall(r'"([^"]*)"', strings[1]))
    operands, at = [], strings.end()
    while found := re.search(r'"[+=]?[a-z]"\s*\(', assembly[at:]):
        opening = at + found.end() - 1
        at = _closing(assembly, opening) + 1
        operands.append(assembly[opening + 1 : at - 1])
    for pattern, function in INSTRUCTIONS.items():
        if re.search(pattern, code):
            given = "" if function == "nothing" else ", ".join(operands)
            return f"ptx::{function}({given})"
    raise ValueError(f"lanes.h does not know {code!r}")


def translate(source: str) -> str:
    """CUDA C++ -> C++ on top of ``lanes.h``."""
    source = re.sub(r"//[^\n]*", "", source)
    source = re.sub(r"extern __shared__ [^;]*;", "", source)  # lanes.h has it
    parts, at = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile)?\s*\(", source):
        closing = _closing(source, found.end() - 1)
        parts += [source[at : found.start()], _call(source[found.end() : closing])]
        at = closing + 1
    return "".join([*parts, source[at:]])


COMPILE = ("g++", "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")


def _digest(*texts: str) -> str:
    """A name for what is compiled from ``texts`` on this kind of machine."""
    made_from = "\0".join([*COMPILE, platform.machine(), *texts])
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


class Emulator:
    """Launches kernels of ``source``; builds each one at first use in ``folder``, and keeps it in
    ``kept`` under a digest of what it was made from."""

    def __init__(self, source: Path, folder: Path, kept: Path, cluster: int = 1) -> None:
        self.folder, self.kept, self.seed, self.cluster = folder, kept, 0, cluster
        self.launched: list[tuple[str, int]] = []  # names and numbers of blocks
        self._text = '#include "lanes.h"\n' + translate(source.read_text(encoding="utf-8"))
        self._lanes = [path.read_text(encoding="utf-8") for path in LANES]
        self._built = functools.cache(self._build)

    @functools.cached_property
    def _compiled(self) -> Path:
        """A folder with what all kernels share, compiled once: lanes.h and the scheduler."""
        folder = self.kept / f"lanes-{_digest(*self._lanes)}"
        folder.mkdir(exist_ok=True)
        header, fibers = LANES
        for name, kind in (("lanes.h.gch", ("-x", "c++-header", str(header))),
                           ("fibers.o", ("-c", str(fibers)))):
            if not (folder / name).exists():
                self._compile(folder / name, *kind)
        return folder

    def _compile(self, made: Path, *arguments: str) -> None:
        partial = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILE, *arguments, "-o", str(partial)], check=True, timeout=300)
        partial.replace(made)  # atomic: another process may build the same

    def _build(self, name: str) -> ctypes.CDLL:
        entry = f"launch({name}, blocks, threads, packed, seed, {self.cluster});"
        text = (
            f'{self._text}\nextern "C" __attribute__((visibility("default"))) void go('
            f"int blocks, int threads, const char *packed, unsigned seed) {{ {entry} }}\n"
        )
        library = self.kept / f"{_digest(*self._lanes, text)}.so"
        if not library.exists():
            source = (self.folder / re.sub(r"\W+", "_", name)).with_suffix(".cpp")
            source.write_text(text, encoding="utf-8")
            self._compile(library, "-shared", f"-I{self._compiled}", str(source),
                          str(self._compiled / "fibers.o"))
        return ctypes.CDLL(str(library))

    def launch(
        self,
        device: object,
        name: str,
        parameters: str,
        blocks: int,
        threads: tuple[int, int],
        shared: int,
        *args: int,
        overlap: bool = False,
    ) -> None:
        """Like the package's launch: ``parameters`` is the struct format of ``args``."""
        assert shared <= 1 << 18
        self.seed += 1
        self.launched.append((name, blocks))
        packed = struct.pack("<" + parameters.replace("P", "Q"), *args)
        packed += bytes(8)  # a structure may end in a gap
        self._built(name).go(blocks, threads[0] * threads[1], packed, self.seed)
