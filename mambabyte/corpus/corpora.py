"""Byte corpora: train, valid and test splits as memory-mapped files.

A corpus is named by ``stdlib`` (offline default), ``wikitext103``, a folder that holds
``wiki.{train,valid,test}.raw``, or any text file (cut 90 / 5 / 5, in order). Held-out bytes
are never sampled for training: splits are disjoint files or disjoint ranges of one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambabyte.config.files import cache_dir, whole_dir, whole_file
from mambabyte.errors import UserError

SPLITS = ("train", "valid", "test")
WIKITEXT_REGISTRY = Path(__file__).parent / "wikitext103.json"


@dataclass(frozen=True)
class Corpus:
    """Three splits of bytes, each a read-only memory map, and what they are."""

    name: str
    about: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def split(self, name: str) -> np.ndarray:
        if name not in SPLITS:
            raise UserError(f"split {name!r} is unknown: choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def digest(self) -> dict[str, str]:
        """SHA-256 of each split, recorded with every run."""
        return {name: hashlib.sha256(self.split(name).data).hexdigest() for name in SPLITS}


def load_corpus(name: str = "stdlib", report: Callable[[str], None] = lambda line: None) -> Corpus:
    """Open a corpus by name, folder or file. ``report`` is told of anything that takes time.

    Raises UserError when there is nothing there, when it is empty or when it is not a file.
    """
    if name == "stdlib":
        return _open_folder(_build_stdlib(report), "stdlib", "documentation of Python's library")
    if name == "wikitext103":
        return _open_folder(_fetch_wikitext(report), "wikitext103", "WikiText-103 raw")
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, path.name, "wiki.{train,valid,test}.raw in a folder")
    if path.is_file():
        return _open_file(path)
    raise UserError(
        f"corpus {name!r} is neither stdlib, wikitext103, a folder nor a file: check the path"
    )


def sample_windows(data: np.ndarray, context: int, batch: int, seed: int, step: int) -> Tensor:
    """A batch of windows of context + 1 bytes at random offsets, (batch, context + 1) int64.

    A pure function of (seed, step): a resumed run sees what the unbroken run would have seen.
    Reads only the bytes it returns. Raises UserError when a window does not fit.
    """
    starts = sample_starts(len(data), context, batch, seed, step)
    return torch.from_numpy(np.stack([data[s : s + context + 1] for s in starts])).long()


def sample_starts(length: int, context: int, batch: int, seed: int, step: int) -> np.ndarray:
    """First byte of each window of ``sample_windows`` in a text of ``length`` bytes, (batch,)."""
    if length < context + 1:
        raise UserError(
            f"context {context} needs at least {context + 1} bytes and the split has {length}:"
            " choose a shorter context or a larger corpus"
        )
    return np.random.default_rng([seed, step]).integers(0, length - context, size=batch)


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is not a file: expected a UTF-8 text file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: expected text to train on")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _open_folder(folder: Path, name: str, about: str) -> Corpus:
    paths = {split: folder / f"wiki.{split}.raw" for split in SPLITS}
    missing = [p.name for p in paths.values() if not p.exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a corpus folder holds "
                        "wiki.train.raw, wiki.valid.raw and wiki.test.raw")
    return Corpus(name, about, **{split: _map(path) for split, path in paths.items()})


def _open_file(path: Path) -> Corpus:
    data = _map(path)
    valid, test = int(len(data) * 0.90), int(len(data) * 0.95)

    def boundary(i: int) -> int:  # never inside a character: skip continuation bytes
        while i < len(data) and 0x80 <= data[i] < 0xC0:
            i += 1
        return i

    valid, test = boundary(valid), boundary(test)
    return Corpus(path.name, "one text file, cut 90/5/5",
                  data[:valid], data[valid:test], data[test:])


def _stdlib_documents() -> list[tuple[str, str]]:
    """(name, prose) of every documented object of the standard library, in a fixed order."""
    import ast
    import sysconfig

    documents: list[tuple[str, str]] = []
    try:
        from pydoc_data.topics import topics

        documents += [(f"topic.{name}", text) for name, text in sorted(topics.items())]
    except ImportError:  # some distributions leave it out; the docstrings remain
        pass
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
            "lib2to3", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts[:-1]) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    parts.append(f"= {getattr(node, 'name', relative.stem)} =\n\n{text}")
        if parts:
            documents.append((".".join(relative.with_suffix("").parts), "\n\n".join(parts)))
    return documents


def _build_stdlib(report: Callable[[str], None]) -> Path:
    import platform

    version = platform.python_version()
    folder = cache_dir() / "corpora" / f"stdlib-{version}"
    if (folder / "wiki.test.raw").exists():
        return folder
    report(f"assembling the offline corpus from the documentation of Python {version}")
    documents = _stdlib_documents()
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for name, text in documents:
        # Identical paragraphs (inherited docstrings, boilerplate) would leak between splits.
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= 40 and key in seen:
                continue
            seen.add(key)
            kept.append(paragraph)
        # The split depends on the name alone, so it is the same wherever the document exists.
        bucket = hashlib.sha256(name.encode()).digest()[0]
        split = "valid" if bucket < 13 else "test" if bucket < 26 else "train"
        splits[split].append(f"= {name} =\n\n" + "\n\n".join(kept) + "\n\n")
    if not all(splits.values()):
        raise UserError("this Python has no standard library sources to read: name a text file "
                        "with --corpus instead")
    with whole_dir(folder) as temporary:
        for split, parts in splits.items():
            (temporary / f"wiki.{split}.raw").write_bytes("".join(parts).encode("utf-8"))
    return folder


def _fetch_wikitext(report: Callable[[str], None]) -> Path:
    """Download the parquet export, check it, and write wiki.{train,valid,test}.raw."""
    folder = cache_dir() / "corpora" / "wikitext103"
    if all((folder / f"wiki.{split}.raw").exists() for split in SPLITS):
        return folder
    if importlib.util.find_spec("pooch") is None or importlib.util.find_spec("pyarrow") is None:
        raise UserError("wikitext103 needs pooch and pyarrow: pip install pooch pyarrow")
    import pooch

    registry = json.loads(WIKITEXT_REGISTRY.read_text())
    parts: dict[str, list[Path]] = {}
    for split in SPLITS:
        parts[split] = []
        for file in registry["files"][split]:
            report(f"downloading {file['path']}")
            try:
                got = pooch.retrieve(registry["base_url"] + file["path"], file["sha256"],
                                     path=folder / "parquet", progressbar=False)
            except Exception as error:  # requests, ssl and socket each have their own classes
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"could not download wikitext103 ({first}): check the network, or put "
                    "wiki.{train,valid,test}.raw into a folder and name that folder"
                ) from None
            parts[split].append(Path(got))
    for split in SPLITS:
        report(f"writing wiki.{split}.raw")
        write_raw(parts[split], folder / f"wiki.{split}.raw", registry["raw_sha256"][split])
    shutil.rmtree(folder / "parquet", ignore_errors=True)
    return folder


def write_raw(parquet: list[Path], raw: Path, sha256: str | None = None) -> None:
    """One line of text a row, as in the original archive, where an empty line is " \\n".

    Raises UserError when the result does not have the given SHA-256.
    """
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    with whole_file(raw) as temporary:
        with temporary.open("wb") as out:
            for path in parquet:
                for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                    for row in batch.column(0).to_pylist():
                        line = (row or " \n").encode("utf-8")
                        digest.update(line)
                        out.write(line)
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(f"{raw.name} has SHA-256 {digest.hexdigest()}, expected {sha256}: "
                            "the download is not the published data set; delete it and try again")
