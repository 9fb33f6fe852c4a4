"""Machine code that comes with the package, so that a first training need not compile its kernels.

``cubins/sm_90.zip`` and its like hold one entry a program, named by a hash of source, options and
kernel names: a source that was changed since finds none, and is compiled by NVRTC as before. What
is in them is listed in ``list.py``, which also builds them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mambabyte.config.files import to_json

FOLDER = Path(__file__).with_name("cubins")


def digest(source: str, options: Sequence[str], names: Sequence[str]) -> str:
    """What a program is known by: a hash of all that decides its machine code but the compiler."""
    made_from = to_json([source, list(options), sorted(names)])
    return hashlib.sha256(made_from.encode()).hexdigest()[:32]


@functools.cache
def digests(arch: str) -> frozenset[str]:
    """The programs that there is machine code of for ``arch``, such as "sm_90"."""
    path = FOLDER / f"{arch}.zip"
    if not path.is_file():
        return frozenset()
    with zipfile.ZipFile(path) as file:
        return frozenset(file.namelist())


def find(arch: str, program: str) -> tuple[bytes, dict[str, str]] | None:
    """Machine code of the program with that digest, and the mangled name of each of its kernels;
    None where there is none."""
    if program not in digests(arch):
        return None
    with zipfile.ZipFile(FOLDER / f"{arch}.zip") as file:
        return unpacked(file.read(program))


def packed(image: bytes, lowered: dict[str, str]) -> bytes:
    """Machine code and names of kernels as one; :func:`unpacked` takes them apart."""
    header = to_json(lowered).encode()
    return struct.pack("<I", len(header)) + header + image


def unpacked(payload: bytes) -> tuple[bytes, dict[str, str]]:
    (length,) = struct.unpack_from("<I", payload)
    return payload[4 + length :], json.loads(payload[4 : 4 + length])
