"""Byte corpora: train, valid and test splits as memory-mapped files.

A corpus is named by ``stdlib`` (offline default), ``wikitext103``, a folder that holds
``wiki.{train,valid,test}.raw``, or any text file or folder of text files, packed by gzip or not
(cut 90 / 5 / 5 in order), where each file of a folder, and each record of a JSON Lines file, is a
document by itself. Held-out bytes are never sampled for training: splits are
disjoint files or disjoint ranges of one. What is kept in the cache is checked by its digest when
opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambabyte.config.checks import path_of
from mambabyte.config.files import cache_dir, whole_dir, whole_file, write_json
from mambabyte.corpus.files import (
    has_records,
    mapped,
    open_records,
    open_text,
    open_texts,
    present,
    unchanged,
)
from mambabyte.corpus.utf8 import next_begin
from mambabyte.errors import UserError

SPLITS = ("train", "valid", "test")
SUMS = "sha256.json"  # digests of the files beside it, of what this package has written
WIKITEXT_REGISTRY = Path(__file__).parent / "wikitext103.json"


@dataclass(frozen=True)
class Corpus:
    """Three splits of bytes, each a read-only memory map, and what they are."""

    name: str
    about: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    source: str = ""  # what ``load_corpus`` opens it by, from any folder; "" for one made otherwise
    # By split, the places (n,) at which documents begin, ascending; a split without is one text.
    begins: Mapping[str, np.ndarray] = field(default_factory=dict)

    def split(self, name: str) -> np.ndarray:
        if name not in SPLITS:
            raise UserError(f"split {name!r} is unknown: choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def documents(self, name: str, most: int | None = None) -> list[np.ndarray]:
        """The documents of the first ``most`` bytes of a split, by default of all, in order."""
        data = self.split(name)[:most]
        inner = [at for at in self.begins.get(name, ()) if 0 < at < len(data)]
        return [data[begin:end] for begin, end in itertools.pairwise([0, *inner, len(data)])]

    def digest(self) -> dict[str, str]:
        """SHA-256 of each split, recorded with every run."""
        return {name: hashlib.sha256(present(self.split(name)).data).hexdigest() for name in SPLITS}


def load_corpus(name: str = "stdlib", report: Callable[[str], None] = lambda line: None) -> Corpus:
    """Open a corpus by name, folder or file. ``report`` is told of anything that takes time.

    A file that is no UTF-8 text is read as the bytes that it has, and a warning says what it is.
    Raises UserError when there is nothing there, when it is empty or when it is not a file.
    """
    if isinstance(name, str) and name in OWN:
        about, make = OWN[name]
        return _open_own(make(report), name, about)
    path = path_of(name, f"corpus (give {', '.join(OWN)}, a folder or a file)").expanduser()
    if path.is_dir():
        if any((path / f"wiki.{split}.raw").exists() for split in SPLITS):
            return _open_folder(path, path.name, "wiki.{train,valid,test}.raw in a folder")
        data, begins = open_texts(path)
        return _cut(data, path, "the text files of a folder", begins)
    if path.is_file() and has_records(path):
        data, begins = open_records(path)
        return _cut(data, path, "the records of one file", begins)
    if path.is_file():
        data, what = open_text(path)
        return _cut(data, path, f"one file, {what}" if what else "one text file")
    if path.exists():
        raise UserError(f"corpus {name!r} is a device or a pipe, and a text is gone through again "
                        "and again: write it into a file first")
    raise UserError(
        f"corpus {name!r} is neither {', '.join(OWN)}, a folder nor a file: check the path"
    )


def sample_windows(data: np.ndarray, context: int, batch: int, seed: int, step: int) -> Tensor:
    """A batch of windows of context + 1 bytes at random offsets, (batch, context + 1) int64.

    A pure function of (seed, step): a resumed run sees what the unbroken run would have seen.
    Reads only the bytes it returns. Raises UserError when a window does not fit.
    """
    starts = sample_starts(len(present(data)), context, batch, seed, step)
    return torch.from_numpy(np.stack([data[s : s + context + 1] for s in starts])).long()


def sample_starts(length: int, context: int, batch: int, seed: int, step: int) -> np.ndarray:
    """First byte of each window of ``sample_windows`` in a text of ``length`` bytes, (batch,)."""
    if length < context + 1:
        raise UserError(
            f"context {context} needs at least {context + 1} bytes and the split has {length}:"
            " choose a shorter context or a larger corpus"
        )
    return np.random.default_rng([seed, step]).integers(0, length - context, size=batch)


def documents_in(begins: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """Where documents that begin at ``begins`` (n,), ascending, do so in the windows of
    ``sample_windows`` at ``starts`` (batch,): (batch, context + 1) bool."""
    found = np.zeros((len(starts), context + 1), dtype=bool)
    edges = np.searchsorted(begins, np.stack([starts, starts + context + 1]))
    for row, (start, first, last) in enumerate(zip(starts, *edges, strict=True)):
        found[row, begins[first:last] - start] = True
    return found


def _open_own(folder: Path, name: str, about: str) -> Corpus:
    train, valid, test = (mapped(folder / f"wiki.{split}.raw") for split in SPLITS)
    return Corpus(name, about, train, valid, test, source=name)


def _open_folder(folder: Path, name: str, about: str) -> Corpus:
    paths = {split: folder / f"wiki.{split}.raw" for split in SPLITS}
    missing = [p.name for p in paths.values() if not p.exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a folder that holds one of "
                        "wiki.train.raw, wiki.valid.raw and wiki.test.raw holds all three")
    opened = {split: open_text(path) for split, path in paths.items()}
    odd = (f"{split} is {what}" for split, (_, what) in opened.items() if what)
    train, valid, test = (opened[split][0] for split in SPLITS)
    return Corpus(name, "; ".join([about, *odd]), train, valid, test, str(folder.absolute()))


def _cut(
    data: np.ndarray, path: Path, about: str, begins: np.ndarray | None = None
) -> Corpus:
    """A corpus from one text: 90 % to train on, 5 % to choose by, 5 % to test, in order. Of several
    documents, ``begins`` is where they begin; a cut within one leaves a part on each side."""
    valid, test = (next_begin(data, int(len(data) * share)) for share in (0.90, 0.95))
    parts, found = ((0, valid), (valid, test), (test, len(data))), {}
    if begins is not None and len(begins) > 1:
        about += f", {len(begins)} documents"
        found = {name: begins[(first <= begins) & (begins < last)] - first
                 for name, (first, last) in zip(SPLITS, parts, strict=True)}
    return Corpus(path.name, f"{about}, cut 90/5/5", data[:valid], data[valid:test], data[test:],
                  str(path.absolute()), found)


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
    if _as_written(folder):
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
    sums: dict[str, str] = {}
    with whole_dir(folder) as temporary:
        for split, parts in splits.items():
            data = "".join(parts).encode("utf-8")
            (temporary / f"wiki.{split}.raw").write_bytes(data)
            sums[f"wiki.{split}.raw"] = hashlib.sha256(data).hexdigest()
        write_json(temporary / SUMS, sums)
    return folder


def _as_written(folder: Path) -> bool:
    """Whether a folder of the cache is still what its list of digests says."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return isinstance(sums, dict) and unchanged(folder, sums)
    except (OSError, ValueError):
        return False


def _fetch_wikitext(report: Callable[[str], None]) -> Path:
    """Download the parquet export, check it, and write wiki.{train,valid,test}.raw."""
    folder = cache_dir() / "corpora" / "wikitext103"
    registry = json.loads(WIKITEXT_REGISTRY.read_text())
    sums = registry["raw_sha256"]
    if unchanged(folder, {f"wiki.{split}.raw": sums[split] for split in SPLITS}):
        return folder
    if importlib.util.find_spec("pooch") is None or importlib.util.find_spec("pyarrow") is None:
        raise UserError("wikitext103 needs pooch and pyarrow: pip install pooch pyarrow")
    import pooch

    parts: dict[str, list[Path]] = {}
    for split in SPLITS:
        parts[split] = []
        for file in registry["files"][split]:
            report(f"downloading {file['path']}")
            try:
                got = pooch.retrieve(registry["base_url"] + file["path"], file["sha256"],
                                     path=folder / "parquet", progressbar=False)
            except Exception as error:  # requests, ssl and socket each have their own classes
                raise UserError(
                    f"could not download wikitext103 ({_cause(error)}): check the network, put "
                    "wiki.{train,valid,test}.raw into a folder and name that, or use stdlib, which "
                    "needs no network"
                ) from None
            parts[split].append(Path(got))
    for split in SPLITS:
        report(f"writing wiki.{split}.raw")
        write_raw(parts[split], folder / f"wiki.{split}.raw", sums[split])
    shutil.rmtree(folder / "parquet", ignore_errors=True)
    return folder


def _cause(error: BaseException) -> str:
    """The first cause of an error in a few words. Each layer of a network library wraps the one
    below and quotes it whole: the innermost has the system's own word."""
    seen: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in seen:
        seen.append(inner)
        inner = inner.__cause__ or inner.__context__
    text = getattr(seen[-1], "strerror", None) or str(seen[-1]) or type(seen[-1]).__name__
    return text.splitlines()[0][:100]


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


# Corpora with a name of their own: what each is, and what makes a folder with wiki.*.raw of it in
# the cache, or finds it there; it tells ``report`` of what takes time.
OWN: dict[str, tuple[str, Callable[[Callable[[str], None]], Path]]] = {
    "stdlib": ("documentation of Python's library", _build_stdlib),
    "wikitext103": ("WikiText-103 raw", _fetch_wikitext),
}
