"""The closed form of a GPU's memory: against the recorded card, and by tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from analysis.measure.allocations import saved_storages
from analysis.runs.records import DATA, load_record
from analysis.studies.memory import PROFILES, SCAN_FORMS
from analysis.studies.memory import compute as memory
from analysis.studies.memory import gpu as gpu_memory
from analysis.theory.kept_tensors import (
    AUTOCASTS,
    STREAM_DTYPE,
    Autocast,
    saved_terms,
)
from analysis.theory.step_memory import LIBRARY_BYTES, budget
from mambabyte.config import PRESETS, ModelConfig
from mambabyte.errors import UserError
from mambabyte.model.families import mamba
from mambabyte.model.families.attention import rms_norm_is_cast
from mambabyte.ops.conv import dispatch as causal_conv


def test_closed_form_against_the_recorded_gpu() -> None:
    found = gpu_memory.recorded_frame()
    assert set(found["outcome"]) == {gpu_memory.FITS}
    assert (found["kept, closed form / measured"] - 1).abs().max() < 0.02
    assert (found["peak, closed form / measured"] - 1).abs().max() < 0.05
    # Without the libraries' workspaces the smallest steps would be far off.
    small = found[found["peak, measured, MB"] < 500]
    bare = small["peak, closed form, MB"] - LIBRARY_BYTES / 1e6
    assert (bare / small["peak, measured, MB"] < 0.8).all()


def test_closed_form_reads_only_what_the_record_measured() -> None:
    """Another day's closed form in the record changes nothing."""
    recorded = load_record((DATA / gpu_memory.RECORDED).parent).tables["cuda"].frame
    ours = [name for name in recorded if "closed form" in name] + ["worst moment"]
    assert len(ours) == 5
    stale = recorded.assign(**dict.fromkeys(ours, 0.0))
    pd.testing.assert_frame_equal(gpu_memory.beside_closed_form(stale), gpu_memory.recorded_frame())


def test_the_fitted_constant_is_judged_by_steps_that_it_was_not_fitted_to() -> None:
    found = gpu_memory.recorded_frame()
    frame = gpu_memory.libraries_frame(found).set_index("fitted to")
    assert (frame["steps fitted"] + frame["steps judged"] == len(found)).all()
    assert frame["largest error of their peaks"].max() < 0.05
    assert frame["the same with no constant"].max() > 0.2
    # Peaks that are the closed form and 50 MB: every split finds the 50, and errs by nothing.
    bare = found["peak, closed form, MB"] - LIBRARY_BYTES / 1e6
    exact = gpu_memory.libraries_frame(found.assign(**{"peak, measured, MB": bare + 50}))
    assert exact["constant, MB"].tolist() == pytest.approx([50] * len(frame))
    assert exact["largest error of their peaks"].max() < 1e-12
    # A step that did not fit has no peak to fit to.
    found.loc[0, "outcome"] = gpu_memory.TOO_LARGE
    fewer = gpu_memory.libraries_frame(found)
    assert (fewer["steps fitted"] + fewer["steps judged"] == len(found) - 1).all()


def test_a_recorded_row_of_no_case_is_an_error() -> None:
    row = gpu_memory.recorded_frame().iloc[[0]].assign(
        d_model=7, **dict.fromkeys(gpu_memory.MEASURED, 1.0))
    with pytest.raises(UserError, match="no case of this study"):
        gpu_memory.beside_closed_form(row)


def test_a_step_that_did_not_fit_stays_in_the_table() -> None:
    row = gpu_memory.case_columns(*gpu_memory.cuda_cases()[0])
    row |= {**dict.fromkeys(gpu_memory.MEASURED), "outcome": gpu_memory.TOO_LARGE}
    found = gpu_memory.beside_closed_form(pd.DataFrame([row]))
    assert found["outcome"].tolist() == ["out of memory"]
    assert found["peak, measured, MB"].isna().all()
    assert found["peak, closed form / measured"].isna().all()
    assert found["peak, closed form, MB"].iloc[0] > 0


@contextmanager
def autocast_on_cuda(autocast: Autocast = "bf16") -> Iterator[None]:
    """With no card either, where torch.autocast would refuse."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", STREAM_DTYPE[autocast])
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


def test_what_autocast_on_cuda_takes_to_float32() -> None:
    """Asked of torch's dispatcher with tensors that have a device and no memory."""
    with FakeTensorMode(), torch.no_grad(), autocast_on_cuda():
        x = torch.empty(2, 4, device="cuda", dtype=torch.bfloat16)
        assert F.relu(x).dtype == torch.bfloat16
        assert x.square().dtype == torch.float32
        assert (F.rms_norm(x, (4,)).dtype == torch.float32) == rms_norm_is_cast()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("dt_rank", [8, 12, "full"])
@pytest.mark.parametrize("composed", [False, True])
def test_saved_bytes_of_a_layer_on_cuda_are_exact(
    composed: bool, dt_rank: int | str, autocast: Autocast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensors that have a device and no memory. As one operator it keeps what its parts keep."""
    for module in (mamba, causal_conv):
        monkeypatch.setattr(module, "fused_available", lambda device: (True, ""))
    if composed:
        monkeypatch.setattr(mamba.MambaMixer, "_is_one_operator", lambda *_: False)
    config = ModelConfig(d_model=48, n_layer=1, dt_rank=dt_rank, scan_form="fused")
    with FakeTensorMode():
        layer = mamba.MambaMixer(config)
        for module in layer.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda")))
        x = torch.empty(2, 20, config.d_model, device="cuda", requires_grad=True)
        with nullcontext() if autocast == "fp32" else autocast_on_cuda(autocast):
            counted = sum(size for _, size in saved_storages(lambda: layer(x, None)[0], layer))
    terms = [t for t in saved_terms(config, 2, 20, autocast, "cuda") if t.layer == 0]
    outside = [t for t in terms if t.part == "norm" and t.tensor != "output"]
    assert counted == sum(t.bytes for t in terms) - sum(t.bytes for t in outside)


def test_libraries_are_counted_on_cuda_alone() -> None:
    config = PRESETS["mamba_byte"].model
    assert budget(config, 2, 64, "fp32", "cuda").libraries == LIBRARY_BYTES
    assert budget(config, 2, 64, "fp32", "cpu").libraries == 0


@pytest.mark.long
def test_the_full_profile_measures_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PROFILES["full"].cuda == "auto"
    assert set(PROFILES) == {"quick", "full"}
    recorded = gpu_memory.recorded_frame()
    asked = []
    monkeypatch.setattr(memory, "gpu_frame",
                        lambda measure, report: (asked.append(measure), ("a GPU", recorded))[1])
    small = memory.Parameters(forms=("chunked",), patterns=("M",), autocasts=("fp32",),
                              slice_lengths=(64, 128), counted_layers=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.run(replace(small, cuda="auto"), lambda _: None)
    assert asked == [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [memory.measures_gpu(cuda) for cuda in ("auto", "off", "on")] == [False, False, True]


def test_cases_of_a_gpu_have_names_of_their_own() -> None:
    names = [tuple(gpu_memory.case_columns(*case).values()) for case in gpu_memory.cuda_cases()]
    assert len(set(names)) == len(names)
    layers, forms = {name[0] for name in names}, {name[2] for name in names}
    assert layers == {"MMMM", "MMMA", "AAAA", "MMMAMMMAM"}
    assert forms == {*SCAN_FORMS, "none"}
    assert {(name[0], name[6]) for name in names} == {(one, c) for one in layers
                                                      for c in (False, True)}
