"""Panels of sliders for the notebooks, where a slider says more than a table.

A panel stands beside a static result and calls the study's own functions; each is a module here,
so that a notebook depends on its own study alone. It needs the optional package ipywidgets and
somebody to move it: a batch run, which has a run folder, shows none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MISSING = "(pip install ipywidgets, and run this cell again, for a panel of sliders)"


def show(panel: Callable[..., Any], *arguments: Any, run_dir: str) -> None:
    """Display ``panel(*arguments)``; nothing in a batch run, a line where ipywidgets is missing.

    ``run_dir`` is the notebook's parameter: who runs a notebook in batch names a folder.
    """
    if run_dir:
        return
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print(MISSING)
        return
    from IPython.display import display

    display(panel(*arguments))
