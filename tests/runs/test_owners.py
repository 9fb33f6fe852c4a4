"""Files that say whose they are: what is removed, what is locked, who ends with whom."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mambabyte.config import owners
from mambabyte.config.files import put_in_place, scratch_dir, temporary_dir, whole_dir, whole_file
from mambabyte.config.owners import ended, only_one, remove_leftovers, tag
from mambabyte.errors import UserError

PLACE, PID, STARTED = tag().split("-")
AGAIN = f"{PLACE}-{PID}-{int(STARTED) + 1}"  # a process that had this one's number before
ELSEWHERE = f"00000000-{PID}-{STARTED}"


def test_a_process_that_ended_is_told_from_one_with_its_number():
    assert ended(tag()) is False
    assert ended(AGAIN) is True
    assert ended(ELSEWHERE) is None
    child = subprocess.Popen(["true"])
    its = f"{PLACE}-{child.pid}-{STARTED}"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # over, and not yet reaped
    assert ended(its) is True
    child.wait()
    assert ended(its) is True


def test_what_is_hidden_from_us_is_asked_for(monkeypatch):
    """As where /proc shows a user its own processes alone, or there is none."""
    monkeypatch.setattr(owners, "_started", lambda pid: None)
    assert ended(f"{PLACE}-{os.getppid()}-0") is False
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError()))
    assert ended(f"{PLACE}-1-0") is False
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(ProcessLookupError()))
    assert ended(f"{PLACE}-1-0") is True


def test_only_leftovers_of_ended_processes_are_removed(tmp_path: Path):
    kept = [".git.tmp", ".tiny-000000000000.1.tmp", ".a.tmp", "step_1.bak",
            f".run.abcdefgh.{tag()}.tmp", f".run.abcdefgh.{ELSEWHERE}.tmp",
            f"run.abcdefgh.{AGAIN}.tmp", f".run.abcdefgh.{AGAIN}.tmp.txt"]
    for name in (*kept, f".run.abcdefgh.{AGAIN}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("work")
    (tmp_path / f".page.html.abcd_fgh.{AGAIN}.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    remove_leftovers(tmp_path / "nowhere")


def test_a_link_that_was_left_is_removed_and_not_what_it_leads_to(tmp_path: Path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    (tmp_path / f".run.abcdefgh.{AGAIN}.tmp").symlink_to(tmp_path / "work")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    assert (tmp_path / "work" / "thesis.txt").exists()


def test_a_kill_between_the_two_renames_loses_neither(tmp_path: Path, monkeypatch):
    with whole_dir(tmp_path / "record") as folder:
        (folder / "numbers").write_text("old")
    monkeypatch.setattr(owners, "tag", lambda: AGAIN)  # what follows is of an ended process
    new = temporary_dir(tmp_path / "record")
    new.mkdir()
    (new / "numbers").write_text("new")
    real = os.replace

    def killed(source, target):
        if Path(source) == new:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put_in_place(new, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["record"]
    assert (tmp_path / "record" / "numbers").read_text() == "old"


def test_files_and_folders_reach_the_disk_before_their_names(tmp_path: Path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[-1])
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    with whole_file(tmp_path / "a.txt") as path:
        path.write_text("a")
    assert done == ["tmp", "replace", tmp_path.name]
    done.clear()
    with whole_dir(tmp_path / "b") as path:
        (path / "c.txt").write_text("c")
    assert done == ["txt", "tmp", "replace", tmp_path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_whole_may_be_read_by_whom_the_umask_allows(mask, tmp_path):
    """Whatever a library that wrote it thinks: safetensors makes files for their user alone."""
    before = os.umask(mask)
    try:
        with whole_dir(tmp_path / "run") as path:
            (path / "inner").mkdir(mode=0o700)
            (path / "inner" / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "inner").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "run" / "inner" / "weights").stat().st_mode & 0o777 == 0o666 & ~mask


def test_names_as_long_as_the_system_takes(tmp_path: Path):
    path = tmp_path / ("x" * 250 + ".txt")
    with whole_file(path) as temporary:
        temporary.write_text("a")
    assert path.read_text() == "a"
    with pytest.raises(UserError, match="File name too long"), whole_file(tmp_path / ("x" * 256)):
        pass


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path):
    """A user's link into a larger disk stays one, whether or not anything is there yet."""
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder", "new", "new_folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "disk" / "folder").mkdir()
    (tmp_path / "disk" / "folder" / "user.txt").write_text("kept")
    for name in ("file", "new"):
        with whole_file(tmp_path / name) as temporary:
            temporary.write_text("a")
        assert (tmp_path / "disk" / name).read_text() == "a"
    for name in ("folder", "new_folder"):
        with whole_dir(tmp_path / name) as temporary:
            (temporary / "a.txt").write_text("a")
        assert (tmp_path / "disk" / name / "a.txt").read_text() == "a"
    assert (tmp_path / "folder" / "user.txt").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_symlink()) == [
        "file", "folder", "new", "new_folder"]
    assert len(list(tmp_path.iterdir())) == 5
    assert len(list((tmp_path / "disk").iterdir())) == 4


def test_devices_pipes_and_what_is_read_only_are_not_replaced(tmp_path: Path, monkeypatch):
    """Renaming asks for no right to the file, and root may put a file in the place of /dev/null."""
    pipe, kept, folder = tmp_path / "pipe", tmp_path / "kept.txt", tmp_path / "record"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(UserError, match="it is a device or a pipe"), whole_file(path):
            pass
        with pytest.raises(UserError, match="File exists"), whole_dir(path):
            pass
    assert pipe.is_fifo()
    kept.write_text("measured")
    folder.mkdir()
    can = os.access
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) not in (kept, folder) and can(
        path, how))  # for root every file is writable
    with pytest.raises(UserError, match="the file there is read-only"), whole_file(kept):
        pass
    with pytest.raises(UserError, match="record: permission denied"), whole_dir(folder):
        pass
    assert kept.read_text() == "measured"


def test_a_folder_with_too_long_a_name_is_refused_in_words(tmp_path: Path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=r"cannot write .*too long"), whole_dir(path):
        pass


def test_a_scratch_folder_of_a_killed_process_goes_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(owners, "tag", lambda: AGAIN)
        patch.setattr("shutil.rmtree", lambda *a, **k: None)  # as a kill does
        with scratch_dir() as left:
            pass
    assert left.exists()
    with scratch_dir() as mine:
        assert [*tmp_path.iterdir()] == [mine]
    assert not list(tmp_path.iterdir())


def test_one_at_a_time_and_none_after_a_kill(tmp_path: Path):
    lock = tmp_path / ".lock"
    (tmp_path / f".lock.{AGAIN}").touch()  # a killed one's
    (tmp_path / ".lock.bak").touch()
    (tmp_path / ".lock").touch()  # as earlier versions left it
    with only_one(lock, "trains"):
        with pytest.raises(UserError, match=rf"another process \({PID}\) trains in"), \
                only_one(lock, "trains"):
            pass
        assert (tmp_path / f".lock.{tag()}").exists()
    with only_one(lock, "trains"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".lock.bak"]


def test_of_another_process_that_lives_one_keeps_away(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(owners.time, "sleep", lambda seconds: None)
    its = f"{PLACE}-{os.getppid()}-{owners._started(os.getppid())}"
    (tmp_path / f".lock.{its}").touch()
    with pytest.raises(UserError, match=rf"\({os.getppid()}\) trains"), \
            only_one(tmp_path / ".lock", "trains"):
        raise AssertionError
    assert [p.name for p in tmp_path.iterdir()] == [f".lock.{its}"]


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_shows_that_it_lives(tmp_path: Path, monkeypatch, alive):
    path = tmp_path / f".lock.{ELSEWHERE}"
    path.touch()
    waited: list[float] = []

    def sleep(seconds):
        waited.append(seconds)
        if alive and sum(waited) >= 2 * owners.BEAT_SECONDS:
            os.utime(path, (sum(waited), sum(waited)))

    monkeypatch.setattr(owners.time, "sleep", sleep)
    if alive:
        with pytest.raises(UserError, match="another process"), only_one(tmp_path / ".lock", "x"):
            pass
    else:
        with only_one(tmp_path / ".lock", "x"):
            assert not path.exists()
        assert sum(waited) >= 2 * owners.BEAT_SECONDS


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch):
    touched = threading.Event()
    monkeypatch.setattr(owners, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(os, "utime", lambda path: touched.set())
    with only_one(tmp_path / ".lock", "trains"):
        assert touched.wait(60)


def test_a_process_ends_with_its_parent():
    """Also where the parent has ended before anybody looked."""
    code = ("import sys, time; from mambabyte.config.owners import end_with;"
            "end_with(int(sys.argv[1])); time.sleep(60)")
    child = subprocess.run([sys.executable, "-c", code, "1"], check=False, timeout=50)
    assert child.returncode == -15
