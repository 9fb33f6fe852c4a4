"""Names that figures use, with what the package says of them: scan forms and layer patterns."""

from __future__ import annotations

from itertools import groupby

import pandas as pd

from analysis.studies.throughput import INDEXED, INDEXED_ABOUT
from mambabyte.config import PRESETS, SPECS
from mambabyte.config.scan_forms import AUTO_ABOUT, FORMS


def scan_forms() -> pd.DataFrame:
    """Every form of mambabyte.ops.FORMS with its line, the one that "auto" takes, and the second
    document's loop, which the throughput study times beside them."""
    rows = [(name, form.about, form.chunk, not form.study) for name, form in FORMS.items()]
    rows += [(INDEXED, INDEXED_ABOUT, 0, False), ("auto", AUTO_ABOUT, 0, True)]
    frame = pd.DataFrame(rows, columns=["name in figures", "what it is", "chunk, steps", "use"])
    frame["chunk, steps"] = [str(n) if n else "none" for n in frame["chunk, steps"]]
    frame["use"] = ["training" if trains else "study only" for trains in frame["use"]]
    return frame


def layer_patterns() -> pd.DataFrame:
    """Every layer pattern of the presets: its layers, and the presets that have it. The second
    document's SSM-k is the preset ssm_k."""
    presets: dict[str, list[str]] = {}
    for name, preset in PRESETS.items():
        presets.setdefault(preset.model.layer_pattern, []).append(name)
    rows = []
    for pattern, names in sorted(presets.items(), key=lambda p: (len(p[0]), p[0] != "M", p[0])):
        runs = [f"{len(list(some))} {SPECS[letter].about}" for letter, some in groupby(pattern)]
        layers = ("every layer: " + SPECS[pattern].about if len(pattern) == 1
                  else ", then ".join(runs) + ", repeated")
        document = [n.upper().replace("_", "-") for n in names if n.startswith("ssm_")]
        rows.append((pattern, layers, ", ".join(document) or "", ", ".join(names)))
    return pd.DataFrame(rows, columns=["name in figures", "layers", "second document", "presets"])
