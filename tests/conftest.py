"""Fixtures that several test files use."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run of continuous integration: a failure there is a change's.
# No deadline anywhere: how long an example takes is the machine's affair.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
# Two-, three- and four-byte characters among ASCII.
MULTIBYTE = "naïve café – “déjà vu” costs 5 €, 日本語 🙂 and plain text again. " * 6


# The files that take longest, which begin first: one that began last would be waited for alone.
LONGEST = (
    "test_own_pages.py", "test_browser.py", "test_sweep.py", "test_distributed.py",
    "test_scan_emulated.py", "test_field_mixers.py", "test_ssd_emulated.py",
    "test_mixer_emulated.py", "test_families.py", "test_context_parallel.py",
    "test_memory.py", "test_gradients.py", "test_overflow.py", "test_throughput.py",
    "test_claims.py", "test_report.py", "test_cli.py", "test_report_hostile.py",
    "test_fused_emulated.py", "test_delta_emulated.py", "test_step_profile.py",
    "test_native_scan.py", "test_native_build.py", "test_pretrained.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: -place for place, name in enumerate(reversed(LONGEST), 1)}
    items.sort(key=lambda item: place.get(item.path.name, 0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    # A shell has what a script puts behind & ignore SIGINT, nohup SIGHUP; tests send both.
    ignored = [each for each in (signal.SIGINT, signal.SIGHUP)
               if signal.getsignal(each) == signal.SIG_IGN]
    for each in ignored:
        signal.signal(
            each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors of the tests are tiny: a second thread costs more than it does.
    torch.set_num_threads(1)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A corpus large enough not to be smoke mode."""
    path = tmp_path / "text.txt"
    path.write_text((TEXT + MULTIBYTE) * 12, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a short text, for studies that take a corpus by name."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} of a small text, {i * i}.\n" for i in range(400)))
    return str(path)


@pytest.fixture
def world(tmp_path: Path):
    from tests.helpers.report_world import World

    return World(tmp_path)


@pytest.fixture
def forbid(monkeypatch):
    """``forbid(path)``: what reads this file or lists this folder is told as one who has no right
    to; root, as whom tests may run, has every right."""
    forbidden = []

    def guard(module, name):
        function = getattr(module, name)

        def guarded(path=".", *args, **options):
            if isinstance(path, str | Path) and Path(path) in forbidden:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *args, **options)

        monkeypatch.setattr(module, name, guarded)

    for module, name in ((os, "listdir"), (os, "scandir"), (io, "open")):
        guard(module, name)
    return forbidden.append
