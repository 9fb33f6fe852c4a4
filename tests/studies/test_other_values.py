"""Studies at other parameters than their profiles': they run, answer and draw, or refuse in a line.

Each parameter is changed by itself, from a small run: every other choice, a single entry of a list
and its last ones, a smaller number and a larger one.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

from analysis.runs.folders import Run, load_run, tables_of
from analysis.studies import STUDIES, get_study, profiles, validate
from analysis.studies.drawing import drawings, figures
from analysis.studies.session import measure, save
from mambabyte.config.checks import hints
from mambabyte.errors import UserError

# By study; one that is not here runs at its quick profile, which may take a minute a value.
SMALL: dict[str, dict[str, Any]] = {
    "memory": {"forms": ["chunked", "document_chunked"], "patterns": ["M"], "autocasts": ["fp32"],
               "batch": 1, "context": 8, "d_model": 16, "n_layer": 1, "slice_lengths": [64, 128],
               "counted_layers": 1},
    "overflow": {"forms": ["recurrent", "chunked", "corrected_cumsum"],
                 "low_precision_forms": ["chunked"], "precisions": ["float32", "bfloat16"],
                 "chunks": [4, 8], "decays": [0.1, 6.4], "length": 16,
                 "fraction_lengths": [16, 64], "crossings": [60.0, 90.0], "d_model": 16,
                 "n_layer": 1, "batch": 1, "context": 32, "schedule_steps": 40,
                 "trained_steps": [4, 4, 4], "every": 2},
    "gradients": {"forms": ["recurrent", "chunked", "document_chunked"], "length": 16, "chunk": 4,
                  "channels": 2, "states": 2, "draws": 1, "segments": [2, 8], "recall_length": 8,
                  "recall_far": 2, "recall_steps": 24, "recall_seeds": 1},
    "ablation": {"patterns": ["M", "A"], "d_model": 16, "n_layer": 2, "context": 16,
                 "batch_size": 1, "steps": 4, "seeds": [0], "heldout_windows": 1, "characters": 10,
                 "streams": 1, "stream_bytes": 32, "tasks": ["copy 2"], "task_steps": 3,
                 "task_batch": 2, "variants": ["field", "zero out_proj"], "variant_steps": 2,
                 "workers": 1},
    "throughput": {"d_model": 8, "d_state": 2, "n_layer": 1, "lengths": [8, 16], "batches": [1, 2],
                   "batch_length": 8, "forms": ["recurrent", "chunked"], "mixers": ["M", "K"],
                   "mixer_forms": ["auto"],
                   "rounds": 1, "allocation_lengths": [8, 16], "stream_positions": [0, 4],
                   "stream_steps": 2, "stream_window": 4, "patterns": ["M", "A"],
                   "training_forms": ["auto"], "train_context": 8, "train_batch": 1,
                   "train_steps": 1, "energy_seconds": 0.0},
    "arena": {"systems": ["M", "A"], "budgets": [32, 64], "adamw_rates": [0.01],
              "context": 8, "batch_size": 1, "heldout_windows": 1, "tasks": ["recall 2"],
              "task_systems": ["M"], "task_widths": [16], "task_steps": 2, "task_batch": 2,
              "task_layers": 1, "stream_bytes": 64},
}
# What no small run can change: the text, the device, what needs a package or minutes.
FIXED = {"corpus", "device", "cuda", "preset", "workers", "threads", "pieces", "piece_train_bytes",
         "few_steps", "few_tokens", "few_presets", "runs_root", "max_seconds", "seed",
         "parts", "work", "continues"}


def others(hint: Any, value: Any) -> Iterator[Any]:
    """Values that a parameter might have instead."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        yield from (choice for choice in typing.get_args(hint) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, list):
        yield from (value[:1], value[-1:], [])
        yield from ([value[0], other] for last in value[-1:]
                    for other in others(typing.get_args(hint)[0], last) if other not in value)
    elif isinstance(value, int):
        yield from (1, value + 1, 3 * value)
    elif isinstance(value, float):
        yield from (value / 3, value * 2)


def cases() -> Iterator[tuple[str, str, Any]]:
    for name, study in STUDIES.items():
        start = {**profiles(study)["quick"], **SMALL.get(name, {})}
        for parameter, hint in hints(study.module().Parameters).items():
            if parameter not in FIXED and name != "claims":
                yield from ((name, parameter, v) for v in others(hint, start[parameter]))


def run_at(name: str, values: dict[str, Any], folder: Any) -> None:
    """Measures, keeps, reads back and draws all figures; a refusal is a line that names itself."""
    refusal = ""
    try:
        parameters = validate(name, values)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(name)
        return
    run = measure(get_study(name), {**parameters, "run_dir": str(folder)}, lambda line: None)
    for drawing in (figures(run), figures(load_run(save(run)))):
        for figure in drawing.values():
            figure.draw()


@pytest.mark.long
@pytest.mark.parametrize(("name", "parameter", "value"), [*cases()], ids=str)
def test_a_study_runs_at_another_value(name, parameter, value, corpus_file, tmp_path):
    text = {"corpus": corpus_file} if "corpus" in profiles(STUDIES[name])["quick"] else {}
    run_at(name, {**SMALL.get(name, {}), **text, parameter: value}, tmp_path / "run")


def test_a_map_whose_chunks_are_shorter_than_the_scan(tmp_path):
    """The recurrence has one row, whose "chunk" is the whole length, and the others have three."""
    from analysis.studies.overflow import Grid
    from analysis.studies.overflow import figures as drawn
    from analysis.studies.overflow.error_map import error_map
    from analysis.studies.overflow.error_tables import errors_by_decay, gradient_noise

    grid = Grid(forms=("recurrent", "chunked"), precisions=("float32",), kinds=("constant",),
                chunks=(2, 4, 8), decays=(0.1, 1.6), length=16)
    errors = error_map(grid, lambda line: None)
    figure = drawn.error_maps(errors_by_decay(errors), "float32", "constant")
    heights = {axes.get_ylim() for axes in figure.axes if axes.get_visible()}
    assert len(heights) == 1
    low, high = heights.pop()
    assert low < 2
    assert 8 < high < 16  # the axis is that of the chunks, not of the recurrence's length
    # ... and no form of the figure of the gradient of A is in this run
    noise = next(d for d in drawn.FIGURES if d.name == "gradient_noise")
    assert not noise.when(gradient_noise(errors).assign(form="recurrent"))


def test_a_figure_of_nothing_is_not_drawn():
    """The recurrence is what maps compare with, the field's choices what variants do."""
    errors = pd.DataFrame({"form": ["recurrent"], "of": ["y"], "precision": ["float32"],
                           "kind": ["constant"], "chunk": [8], "0.1": [0.0]})
    some = {"variant": ["zero out_proj"]}
    for study, name, frame in (
            ("overflow", "map", errors), ("ablation", "variants", pd.DataFrame(some)),
            ("ablation", "variants", pd.DataFrame({"variant": ["field"],
                                                   "difference_to_field": [0.0]}))):
        drawing = drawings(get_study(study))[name]
        assert not drawing.is_in(Run(study, {}, {}, tables_of({drawing.of[0]: ("", frame)})))
