"""Compiled code in the cache: whose it is, what it was made from, and compilers that hang."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mambabyte.config.files import cache_dir, private_dir
from mambabyte.ops.build import c, store

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_dir()


def kept(folder: Path, content: bytes = b"code", made_from: str = "scan-1") -> Path:
    return store.keep(folder, made_from, lambda path: path.write_bytes(content), ".so")


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077, 0o777])
def test_the_cache_is_its_users_alone_whatever_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        folder = tmp_path / "mambabyte"
        assert private_dir(folder)
        path = kept(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert store.find(folder, "scan-1", ".so") == (path, b"code")


def test_a_folder_that_was_open_is_closed_before_it_is_read(folder: Path):
    folder.chmod(0o777)
    assert store.usable(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"", b"cod", b"codf", b"code and more"])
def test_what_was_cut_or_damaged_is_not_used(content, folder: Path):
    path = kept(folder)
    path.write_bytes(content)
    assert store.find(folder, "scan-1", ".so") is None
    assert kept(folder) == path


def test_what_was_made_from_other_sources_is_not_used(folder: Path):
    path = kept(folder)
    path.rename(folder / path.name.replace("scan-1", "scan-2"))
    assert store.find(folder, "scan-2", ".so") is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_what_others_may_write_is_not_used(mode, folder: Path):
    kept(folder).chmod(mode)
    assert store.find(folder, "scan-1", ".so") is None


def test_links_pipes_and_folders_are_not_used(folder: Path):
    path = kept(folder)
    for plant in (lambda: path.symlink_to(path.rename(folder.parent / "elsewhere")),
                  lambda: os.mkfifo(path), lambda: path.mkdir()):
        plant()
        assert store.find(folder, "scan-1", ".so") is None
        if path.is_symlink():
            path.unlink()


def test_what_belongs_to_another_user_is_not_used(folder: Path, monkeypatch):
    kept(folder)
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    assert not store.usable(folder)
    assert store.find(folder, "scan-1", ".so") is None


@pytest.mark.skipif(os.getuid() != 0, reason="two users: only root can be another")
@pytest.mark.parametrize("whole", [False, True], ids=["a file", "the whole folder"])
def test_what_another_user_planted_is_not_used(whole, tmp_path: Path):
    """Where group or others can write to the cache, or to the folder above it."""
    for path in (tmp_path, *tmp_path.parents):  # let them come so far
        if path.stat().st_uid == os.getuid() and "pytest" in str(path):
            path.chmod(path.stat().st_mode | 0o011)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    folder = open_to_all / "mambabyte"
    name = store._name("scan-1", b"evil", ".so")
    if not whole:
        folder.mkdir()
        folder.chmod(0o777)
    child = os.fork()
    if not child:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"evil")
            (folder / name).chmod(0o755)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (folder / name).read_bytes() == b"evil"
    assert store.usable(folder) == (not whole)
    assert store.find(folder, "scan-1", ".so") is None


def test_a_compiler_that_hangs_is_waited_for_once(tmp_path: Path, folder, monkeypatch):
    script, asked = tmp_path / "cc", tmp_path / "asked"
    script.write_text(f"#!/bin/sh\necho once >> {asked}\nsleep 1000 & wait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(c, "PATIENCE_SECONDS", 0.5)
    source = tmp_path / "x.c"
    source.write_text("int x;")
    for _ in range(2):
        assert c.load(source) == (f"{script} failed: it gave no answer in 0.5 seconds and is not "
                                  "asked again")
    assert asked.read_text() == "once\n"
    assert not list(folder.iterdir())


def test_a_linker_says_why(tmp_path: Path, folder, monkeypatch):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2\n"
                      "echo 'collect2: error: ld returned 1 exit status' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    source = tmp_path / "x.c"
    source.write_text("int x;")
    assert c.load(source) == f"{script} failed: ld: final link failed: No space left on device"


def test_a_library_cut_short_is_compiled_again(tmp_path: Path, folder):
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    if isinstance(first := c.load(source), str):
        pytest.skip(first)
    (path,) = folder.glob("seven-*.so")
    whole = path.read_bytes()
    for damage in (b"", whole[: len(whole) // 2]):
        path.unlink()  # this process has it open
        path.write_bytes(damage)
        path.chmod(0o700)
        assert c.load(source).seven() == 7  # type: ignore[union-attr]
        assert path.read_bytes() == whole
