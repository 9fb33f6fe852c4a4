"""Nothing is measured."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from tests.helpers.tiny import Parameters, Results


def run(p: Parameters, report: Callable[[str], None]) -> Results:
    report(f"{p.n} lengths")
    lengths = pd.DataFrame({"length, bytes": range(1, p.n + 1)})
    return Results(lengths.assign(**{"time, ms": 0.5 * lengths["length, bytes"]}),
                   pd.DataFrame({"lengths": [p.n]}), pd.DataFrame())
