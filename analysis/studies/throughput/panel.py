"""Length and batch by slider: time and energy of a training step, SSM beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.studies.throughput import Parameters, figures
from analysis.studies.throughput.compute import steps_at

SHORTEST = 64
MOST_MS = 2000.0  # a longer step is not timed: the notebook would stand still for minutes


def panel(p: Parameters) -> Any:
    """Sliders for batch and longest context: a step is timed where they stand, on this machine."""
    from ipywidgets import SelectionSlider, interactive

    powers = [2**n for n in range(17)]
    return interactive(
        lambda batch, context: _show_steps(p, batch, context),
        batch=SelectionSlider(options=powers[:8], value=p.train_batch, continuous_update=False),
        context=SelectionSlider(options=powers[6:], value=p.train_context,
                                continuous_update=False))


def _show_steps(p: Parameters, batch: int, context: int) -> pd.DataFrame:
    from IPython.display import display

    lengths = tuple(context // 2**n for n in (3, 2, 1, 0) if context // 2**n >= SHORTEST)
    # An energy counter moves a few times a second: a reading over less says nothing.
    longer = replace(p, energy_seconds=max(p.energy_seconds, 1.0))
    frames: list[pd.DataFrame] = []
    for length in lengths:
        slowest = max(frames[-1]["ms"].astype(float)) if frames else 0.0
        if 2 * slowest > MOST_MS:  # twice the bytes take twice the time at least
            print(f"{length:,} bytes and more: left out, since a step would take more than "
                  f"{MOST_MS / 1e3:g} s here")
            break
        print(f"timing steps of {batch} x {length:,} bytes ...", flush=True)
        frames.append(steps_at(longer, batch, (length,)))
    found = pd.concat(frames, ignore_index=True)
    display(figures.training_steps(found))
    ratio = found.pivot(index="context", columns="pattern", values="ms").dropna().astype(float)
    for length, row in ratio.iterrows():
        print(f"{length:,} bytes: SSM {row['M']:.1f} ms, attention {row['A']:.1f} ms, "
              f"{row['M'] / row['A']:.2f} times")
    if found["joules_per_step"].isna().all():
        print(f"energy: {found['energy_source'].iloc[0]}")
    return found
