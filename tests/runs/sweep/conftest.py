"""The registry of one tiny study."""

from __future__ import annotations

import os

import pytest

from analysis.studies import Study
from tests.helpers.sweeps import write_tiny


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_tiny(folder)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", os.pathsep.join(
        filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    yield {"tiny": Study("tiny", "Tiny", "Is it?", folder / "tiny.ipynb", "tiny_study", folder)}
    patch.undo()
