"""Files of text: looked at when they are opened, unpacked or joined where needed, and mapped."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np

from mambabyte.config.files import cache_dir, whole_file
from mambabyte.errors import UserError

Data = TypeVar("Data", bytes, np.ndarray, bytes | np.ndarray)

_BLOCK = 1 << 20  # bytes looked at or copied at a time
_GZIP = b"\x1f\x8b"
_BEGINNINGS = {  # of files whose first bytes say what they are; the longer of two first
    b"\xff\xfe\x00\x00": "UTF-32 text", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
    _GZIP: "a gzip archive", b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive", b"%PDF-": "a PDF file", b"PAR1": "a parquet file",
}
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))  # in no text, or hardly


def mapped(path: Path, source: Path | None = None) -> np.ndarray:
    """The bytes of a file, read only and not copied; UserError where there are none, which names
    the ``source`` that they were unpacked from."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: expected a UTF-8 text file")
    if path.stat().st_size == 0:
        raise UserError(f"{source or path} is empty: expected text to train on")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def present(data: Data) -> Data:
    """``data``; UserError where it maps a file that has been cut since, so that to read what is
    gone would kill the process (SIGBUS)."""
    file = getattr(data, "_mmap", None)
    if file is not None and file.size() < len(file):
        raise UserError(f"{getattr(data, 'filename', 'a file')} had {len(file)} bytes when it was "
                        f"opened and has {file.size()} now: leave a corpus as it is while it is "
                        "read, and start again, with --resume where there is a checkpoint")
    return data


def bytes_of(text: object) -> bytes:
    """The bytes of a text in memory: bytes or what is like them, or an array of uint8. UserError
    for anything else: of a number n bytes() makes n zeros, of an array of tokens its memory."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if isinstance(text, np.ndarray) and text.dtype == np.uint8:
        return bytes(present(text))
    got = f"an array of {text.dtype}" if isinstance(text, np.ndarray) else type(text).__name__
    raise UserError(f"a text is {got}: expected bytes or an array of uint8"
                    + ("; encode it first" if isinstance(text, str) else ""))


def open_text(path: Path) -> tuple[np.ndarray, str]:
    """A file as it is, and what it is where it is no UTF-8 text; "" where it is. gzip is unpacked
    into the cache. A warning says what the bytes of a file in another encoding are taken for."""
    packed = path.is_file() and _begins(path, _GZIP)
    data = mapped(joined([path], path)[0] if packed else path, source=path)
    what = not_utf8(data)
    if what:
        warnings.warn(f"{path} is {what}: it is read as the bytes that it has; convert text to "
                      "UTF-8 first, as with iconv", UserWarning, stacklevel=4)
    return data, what


def _below(folder: Path) -> Iterator[Path]:
    """What is no folder under one, without what is hidden; UserError where a folder cannot be
    read, as half of a text is another text."""
    def stop(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for here, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def open_texts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All text files under a folder, sorted by path, one behind another, and the places (n,) at
    which documents begin: each file is one, of a file of records (:func:`has_records`) each record.
    Files of gzip are unpacked.

    Hidden files are not looked at. A warning says which others are no UTF-8 text and were left
    out. Raises UserError where no file is left.
    """
    files = sorted(p for p in _below(folder) if p.is_file())
    texts: list[Path] = []
    other: list[str] = []
    for path in files:
        head = next(_blocks(path), b"")
        if head and not_utf8(head, whole=False):
            other.append(str(path.relative_to(folder)))
        elif head:
            texts.append(path)
    if not texts:
        raise UserError(f"{folder} holds neither wiki.train.raw, wiki.valid.raw and wiki.test.raw "
                        "nor any file of UTF-8 text: name another folder, or a file")
    if other:
        warnings.warn(f"{folder}: {len(other)} of {len(files)} files are no UTF-8 text and were "
                      f"left out ({', '.join(other[:3])}{', ...' if len(other) > 3 else ''})",
                      UserWarning, stacklevel=4)
    whole, begins = joined(texts, folder)
    return mapped(whole, source=folder), begins


def has_records(path: Path) -> bool:
    """Whether a file is one of records, JSON Lines by its name, packed by gzip or not."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def open_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The texts of a file of records one behind another, and the places (n,) at which they begin.
    UserError for a line that is no record with a text."""
    whole, begins = joined([path], path)
    return mapped(whole, source=path), begins


def _documents(path: Path) -> Iterator[Iterator[bytes]]:
    """The documents of a file, each in pieces."""
    if not has_records(path):
        yield _blocks(path)
        return
    number, rest = 0, b""
    for block in itertools.chain(_blocks(path), [b"\n"]):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield iter([_text_of(line, f"line {number} of {path}")])


def _text_of(line: bytes, where: str) -> bytes:
    try:
        record = json.loads(line)
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a character, a lone surrogate: expected whole ones"
                        ) from None
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}): expected one record a line, "
                        '{"text": "..."}') from None
    raise UserError(f'{where} has no text: expected one record a line, {{"text": "..."}}')


def joined(files: Sequence[Path], source: Path) -> tuple[Path, np.ndarray]:
    """Files one after another, unpacked, in the cache under the name of their ``source``, and where
    each document of them begins: a line. Written anew whenever it is opened: what is in the cache
    is never trusted."""
    key = hashlib.sha256(str(source.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = cache_dir() / "corpora" / f"joined-{key}.raw"
    with whole_file(path) as temporary, temporary.open("wb") as out:
        last, begins = b"\n", []
        for document in itertools.chain.from_iterable(map(_documents, files)):
            if last != b"\n":
                out.write(b"\n")
            begins.append(out.tell())
            for block in document:
                out.write(block)
                last = block[-1:] or last
        size = out.tell()
    found = np.unique(np.array(begins, dtype=np.int64))  # (an empty one is none)
    return path, found[found < size]


def not_utf8(data: np.ndarray | bytes, whole: bool = True) -> str:
    """What ``data`` is if it is no UTF-8 text, else "". Without ``whole`` it may end inside a
    character."""
    head = bytes(present(data)[: 1 << 16])
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    if 0 in head:
        return "no text, as it has zero bytes (a binary file, or UTF-16 without its mark)"
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _BLOCK):
        try:
            decoder.decode(bytes(present(data)[start : start + _BLOCK]),
                           final=whole and start + _BLOCK >= len(data))
        except UnicodeDecodeError as error:
            control = sum(head.count(byte) for byte in _CONTROL)
            return (f"no UTF-8 from about byte {start + error.start} on ("
                    + ("a binary file" if control > len(head) // 100 else
                       "Latin-1 or another encoding, or damaged") + ")")
    return ""


def unchanged(folder: Path, sha256: Mapping[str, str]) -> bool:
    """Whether ``folder`` has these files with these digests."""
    for name, expected in sha256.items():
        path = folder / name
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return False
    return bool(sha256)


def _begins(path: Path, beginning: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces, of gzip what is packed in it."""
    try:
        packed = _begins(path, _GZIP)
        with cast(IO[bytes], gzip.open(path) if packed else path.open("rb")) as file:
            while block := file.read(_BLOCK):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"cannot unpack {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
