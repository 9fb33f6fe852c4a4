"""Corpora: splits that do not leak, digests, bad input; the offline default; WikiText writing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path, PurePath

import numpy as np
import pytest

from mambabyte.corpus import corpora as module
from mambabyte.corpus import files, load_corpus, sample_windows, write_raw
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte
from mambabyte.task.ngram import count

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "corpus"


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield load_corpus("stdlib")
    patch.undo()


@pytest.mark.long
def test_stdlib_is_large_prose(stdlib):
    assert len(stdlib.train) > 1_000_000
    assert min(len(stdlib.valid), len(stdlib.test)) > 20_000
    bytes(stdlib.train).decode("utf-8")


@pytest.mark.long  # nine seconds to make it again
def test_stdlib_is_the_same_each_time(stdlib, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_corpus("stdlib").digest() == stdlib.digest()


@pytest.mark.long
def test_held_out_text_is_not_in_training(stdlib):
    train = bytes(stdlib.train)
    seen = {train[i : i + 64] for i in range(0, len(train) - 64)}
    for split in (stdlib.valid, stdlib.test):
        data = bytes(split)
        shared = sum(data[i : i + 64] in seen for i in range(0, len(data) - 64, 16))
        # Stock phrases recur; copied documents would share nearly everything.
        assert shared / (len(data) / 16) < 0.03


def test_file_is_cut_in_order_between_characters(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("é日🙂" * 500, encoding="utf-8")
    c = load_corpus(str(path))
    parts = [bytes(c.split(s)) for s in module.SPLITS]
    assert b"".join(parts) == path.read_bytes()
    for part in parts:
        part.decode("utf-8")
    assert len(parts[0]) == pytest.approx(0.9 * path.stat().st_size, abs=4)


def test_folder(tmp_path):
    for split in module.SPLITS:
        (tmp_path / f"wiki.{split}.raw").write_text(split)
    c = load_corpus(str(tmp_path))
    assert bytes(c.valid) == b"valid"
    assert c.digest()["test"] == hashlib.sha256(b"test").hexdigest()
    (tmp_path / "wiki.test.raw").unlink()
    with pytest.raises(UserError, match=r"lacks wiki\.test\.raw"):
        load_corpus(str(tmp_path))


def test_bad_corpora(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        load_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="neither stdlib"):
        load_corpus(str(tmp_path / "none.txt"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="write it into a file first"):
        load_corpus(str(tmp_path / "pipe"))
    for split in module.SPLITS:
        (tmp_path / f"wiki.{split}.raw").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        load_corpus(str(tmp_path))
    with pytest.raises(UserError, match="split 'dev' is unknown"):
        module.Corpus("", "", *[np.zeros(1, np.uint8)] * 3).split("dev")


def test_windows_are_seeded_in_range_and_memory_mapped(text_file):
    c = load_corpus(str(text_file))
    assert isinstance(c.train, np.memmap)
    a = sample_windows(c.train, 16, 4, seed=1, step=2)
    assert a.shape == (4, 17)
    assert (a == sample_windows(c.train, 16, 4, seed=1, step=2)).all()
    assert not (a == sample_windows(c.train, 16, 4, seed=1, step=3)).all()
    assert not (a == sample_windows(c.train, 16, 4, seed=2, step=2)).all()
    data = np.arange(18, dtype=np.uint8)
    starts = {int(w[0]) for s in range(60) for w in sample_windows(data, 16, 2, 0, s)}
    assert starts == {0, 1}  # every position, the last one included
    with pytest.raises(UserError, match="context 18 needs at least 19 bytes"):
        sample_windows(data, 18, 1, 0, 0)


def test_gzip_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "t.txt.gz"
    text = b"some text of many lines\n" * 100
    for content in (text, text[:-24]):  # the second time the file is another
        path.write_bytes(gzip.compress(content))
        c = load_corpus(str(path))
        assert b"".join(bytes(c.split(s)) for s in module.SPLITS) == content
    path.write_bytes(gzip.compress(text)[:-30])
    with pytest.raises(UserError, match="cannot unpack"):
        load_corpus(str(path))
    assert len(list((tmp_path / "cache/mambabyte/corpora").iterdir())) == 1  # nothing half written


def test_a_folder_of_many_files_is_gone_through_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_bytes(b"x")
    compared: list[int] = []
    path_hash = PurePath.__hash__
    monkeypatch.setattr(PurePath, "__hash__", lambda path: compared.append(0) or path_hash(path))
    assert len(files.open_texts(folder)[1]) == 200
    assert len(compared) < 10 * 200


def test_a_folder_of_text_files_is_one_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x").write_text("hidden")
    (folder / "b.md").write_text("last")
    (folder / "a.txt").write_text("no line end")
    (folder / "sub" / "c.gz").write_bytes(gzip.compress("packed é\n".encode()))
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "old.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 of 6 .*left out \(image.png, old.txt\)"):
        c = load_corpus(str(folder))
    assert b"".join(bytes(c.split(s)) for s in module.SPLITS).decode() == (
        "no line end\nlast\npacked é\n")
    for name in ("a.txt", "b.md", "sub/c.gz"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="nor any file of UTF-8 text"):
        load_corpus(str(folder))


def test_half_of_a_folder_is_no_corpus(tmp_path, forbid):
    for name in ("a", "b", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("some words " * 90)
    forbid(tmp_path / ".hidden")
    assert len(load_corpus(str(tmp_path)).train) > 990
    forbid(tmp_path / "b")
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'b'}: Permission denied"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(("data", "what"), [
    ("text é\n" * 50, "UTF-16 text"), (b"caf\xe9 au lait, " * 90, "Latin-1 or another encoding"),
    ("text\n".encode("utf-16-le") * 50, "zero bytes"), (bytes(range(1, 256)) * 9, "a binary file"),
    (b"PK\x03\x04 and so on", "a zip archive"), ("fine é ".encode() * 90 + b"\xe2\x82", "damaged"),
    (b"a" * (1 << 20) + b"\xff", "no UTF-8 from about byte 1048576"),
])
def test_what_is_no_utf8_text_is_read_as_it_is_and_said(tmp_path, data, what):
    path = tmp_path / "t.txt"
    path.write_bytes(data.encode("utf-16") if isinstance(data, str) else data)
    with pytest.warns(UserWarning, match=what):
        c = load_corpus(str(path))
    assert what in c.about
    assert b"".join(bytes(c.split(s)) for s in module.SPLITS) == path.read_bytes()
    for split in module.SPLITS:
        (tmp_path / f"wiki.{split}.raw").write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match=what):
        assert load_corpus(str(tmp_path)).about.partition("; valid is ")[2].count(what) == 2


def test_a_character_across_the_blocks_is_whole(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode())
    assert load_corpus(str(path)).about == "one text file, cut 90/5/5"


def test_a_corpus_that_is_cut_while_it_is_read_is_one_clear_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"some text. " * 2000)
    c = load_corpus(str(path))
    with path.open("r+b") as file:
        file.truncate(100)
    for use in (c.digest, lambda: sample_windows(c.train, 16, 2, 0, 0),
                lambda: bits_per_byte(None, c.valid), lambda: count(c.train, 2)):
        with pytest.raises(UserError, match=r"had 22000 bytes when it was opened and has 100 now"):
            use()


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, monkeypatch):
    documents = [(f"m{i}", f"documentation of module {i}, " * 9) for i in range(60)]
    monkeypatch.setattr(module, "_stdlib_documents", lambda: documents)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    whole = load_corpus("stdlib", said.append).digest()
    assert len(said) == 1
    assert load_corpus("stdlib", said.append).digest() == whole
    assert len(said) == 1  # kept
    [path] = tmp_path.rglob("wiki.valid.raw")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    assert load_corpus("stdlib", said.append).digest() == whole
    assert len(said) == 2


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": rows}), path)


def test_parquet_becomes_the_raw_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["", " = Title = \n", ""])
    write_parquet(tmp_path / "b.parquet", [" Text é . \n"])
    expected = " \n = Title = \n \n Text é . \n".encode()
    raw = tmp_path / "wiki.valid.raw"
    write_raw([tmp_path / "a.parquet", tmp_path / "b.parquet"], raw,
              hashlib.sha256(expected).hexdigest())
    assert raw.read_bytes() == expected
    with pytest.raises(UserError, match="not the published data set"):
        write_raw([tmp_path / "a.parquet"], tmp_path / "other.raw", "0" * 64)
    assert not (tmp_path / "other.raw").exists()


def test_wikitext_end_to_end_from_a_local_export(tmp_path, monkeypatch):
    export = tmp_path / "export"
    export.mkdir()
    registry = {"base_url": f"file://{export}/", "files": {}, "raw_sha256": {}}
    for split in module.SPLITS:
        write_parquet(export / f"{split}.parquet", ["", f" {split} \n"])
        data = f" \n {split} \n".encode()
        registry["files"][split] = [{
            "path": f"{split}.parquet",
            "sha256": hashlib.sha256((export / f"{split}.parquet").read_bytes()).hexdigest()}]
        registry["raw_sha256"][split] = hashlib.sha256(data).hexdigest()
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    monkeypatch.setattr(module, "WIKITEXT_REGISTRY", tmp_path / "registry.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    import pooch

    def retrieve(url, known_hash, path, progressbar):
        source = Path(url.removeprefix("file://"))
        if known_hash and hashlib.sha256(source.read_bytes()).hexdigest() != known_hash:
            raise ValueError("SHA256 hash does not match")
        return str(source)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    said = []
    c = load_corpus("wikitext103", said.append)
    assert bytes(c.test) == b" \n test \n"
    assert any("downloading" in line for line in said)
    said.clear()
    assert bytes(load_corpus("wikitext103", said.append).test) == b" \n test \n"
    assert not said  # the second time nothing is fetched


def test_wikitext_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    import pooch

    def retrieve(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"Network is unreachable.*put wiki"):
        load_corpus("wikitext103")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_registry_digests_are_those_of_the_published_splits(split):
    registry = json.loads(module.WIKITEXT_REGISTRY.read_text())
    sums = SHARED / "SHA256SUMS"
    if not sums.exists():
        assert len(registry["raw_sha256"][split]) == 64
        return
    known = dict(reversed(line.split()) for line in sums.read_text().splitlines())
    assert registry["raw_sha256"][split] == known[f"wiki.{split}.raw"]
    assert all(len(f["sha256"]) == 64 for f in registry["files"]["train"])
