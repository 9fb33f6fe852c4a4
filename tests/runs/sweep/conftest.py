"""The registry of one tiny study."""

from __future__ import annotations

import json
import os

import pytest

from analysis.studies import Study
from tests.helpers.sweeps import CELLS, PACKAGE


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny_study").mkdir()
    for name, source in PACKAGE.items():
        (folder / "tiny_study" / f"{name}.py").write_text(source)
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [],
              "execution_count": None, "metadata": {"tags": ["parameters"]} if i == 0 else {}}
             for i, source in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "tiny.ipynb").write_text(json.dumps({
        "cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}))
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", os.pathsep.join(
        filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    yield {"tiny": Study("tiny", "Tiny", "Is it?", folder / "tiny.ipynb", "tiny_study", folder)}
    patch.undo()
