"""The closed form of the memory footprint against counts, and what it says of the document."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from analysis import gpu_memory, memory, scan_memory
from analysis.allocations import (
    allocated_bytes,
    measure_peak,
    measure_saved,
    peak_bytes,
    saved_storages,
)
from analysis.fit import ALLOWANCE_BYTES, DEVICES_GB, fit, parse_memory
from analysis.footprint import LIBRARY_BYTES, budget, state_bytes
from analysis.footprint_tables import budgets_frame, device_frames
from analysis.kept_tensors import (
    AUTOCASTS,
    STREAM_DTYPE,
    Autocast,
    rms_norm_is_cast,
    saved_terms,
)
from analysis.plots import memory as figures
from analysis.records import DATA, load_record
from analysis.scan_footprint import scan_terms, scan_workspace
from analysis.scan_memory import five_to_seven_frame, full_tensors_frame, slices_frame
from mambabyte import blocks
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops import FORMS, causal_conv, native_scan
from mambabyte.optim import role
from mambabyte.stream import ByteStream


def random_case(seed: int) -> tuple[ModelConfig, int, int, str, bool]:
    rng = random.Random(seed)
    heads = rng.choice([2, 4])
    config = ModelConfig(
        vocab_size=rng.choice([64, 256]), d_model=heads * 2 * rng.choice([4, 6]),
        n_layer=rng.choice([1, 2, 3]), layer_pattern=rng.choice(["M", "M", "A", "MA", "MMA"]),
        norm=rng.choice(["layer", "rms", "rms_plain"]), d_state=rng.choice([2, 4, 16]),
        d_conv=rng.choice([1, 2, 4]), expand=rng.choice([1, 2]),
        dt_rank=rng.choice(["auto", "full", 3]), n_head=heads,
        n_kv_head=rng.choice([1, heads]), qk_norm=rng.random() < 0.5,
        attention_window=rng.choice([8, 1024]), mlp_ratio=rng.choice([0.0, 2.0]),
        mlp_activation=rng.choice(["relu2", "gelu", "silu"]),
        logit_softcap=rng.choice([0.0, 30.0]), embed_norm=rng.random() < 0.3,
        tied_head=rng.random() < 0.7, rope_fraction=rng.choice([0.5, 1.0]),
        scan_form=list(FORMS)[seed % len(FORMS)],
        scan_chunk=rng.choice([None, 1, 2, 5, 8]))
    return (config, rng.choice([1, 2, 5]), rng.choice([2, 7, 16, 33]),
            rng.choice(AUTOCASTS), rng.random() < 0.2)


@pytest.mark.parametrize("seed", range(91))
def test_saved_bytes_are_exact(seed: int) -> None:
    config, batch, length, autocast, checkpointing = random_case(seed)
    if config.scan_form == "fused" and not native_scan.available()[0]:
        pytest.skip(native_scan.available()[1])
    predicted = sum(t.bytes for t in saved_terms(
        config, batch, length, autocast, checkpointing=checkpointing))
    counted = measure_saved(config, batch, length, autocast, checkpointing)
    assert predicted == counted


def test_the_documents_step_counted_at_its_own_size() -> None:
    preset = PRESETS["mamba_byte_original"]
    config = replace(preset.model, scan_form="document_chunked", n_layer=1)
    predicted = sum(t.bytes for t in saved_terms(config, 64, 2048))
    assert predicted == measure_saved(config, 64, 2048, shapes_only=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("pattern", "autocast", "checkpointing"), [
    ("M", "fp32", False), ("MA", "bf16", False), ("M", "fp32", True), ("MMMA", "bf16", True),
    ("MA", "fp16", True), ("A", "fp32", True)])
def test_peak_within_five_percent(
    form: str, pattern: str, autocast: str, checkpointing: bool
) -> None:
    if form == "fused" and not native_scan.available()[0]:
        pytest.skip(native_scan.available()[1])
    config = ModelConfig(d_model=48, n_layer=2, n_head=2, n_kv_head=2, layer_pattern=pattern,
                         scan_form=form, scan_chunk=32)
    batch, length = 2, 256 if form != "sequential" else 48
    step = budget(config, batch, length, autocast, checkpointing=checkpointing)
    measured = measure_peak(config, batch, length, autocast, checkpointing)
    assert (step.peak - step.weights - step.optimizer) / measured == pytest.approx(1, abs=0.05)


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
    recorded = load_record(DATA / gpu_memory.RECORDED).run.tables["cuda"].frame
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


def test_peaks_cover_patterns_and_checkpointing() -> None:
    p = memory.Parameters(forms=("chunked",), patterns=("M", "A", "MMMA"))
    frame = memory._peaks_frame(p)
    assert {*zip(frame["pattern"], frame["autocast"], frame["checkpointing"], strict=True)} == {
        (pattern, autocast, c) for pattern in ("M", "A", "MMMA") for autocast in AUTOCASTS
        for c in (False, True)}
    assert (frame["predicted / profiled"] - 1).abs().max() < 0.05


def test_a_peak_does_not_depend_on_what_was_profiled_before() -> None:
    """What an earlier profile saw allocated and only the collector releases is no release here."""
    def leave_a_cycle() -> None:
        kept: list[object] = [torch.zeros(10**6)]
        kept.append(kept)

    def collect_and_allocate() -> None:
        gc.collect()
        torch.zeros(10**6)

    gc.disable()
    try:
        assert allocated_bytes(leave_a_cycle) == 4 * 10**6
        assert peak_bytes(collect_and_allocate) == 4 * 10**6
    finally:
        gc.enable()


def test_a_checkpointed_layer_goes_forward_beside_the_gradients_above_it() -> None:
    config = replace(PRESETS["mamba_byte"].model, scan_form="corrected_cumsum")
    step = budget(config, 1, 64, checkpointing=True)
    assert step.worst_moment == "layer 0, scan forward"
    groups = config.parameter_groups()
    layers = sum(n for name, n in groups.items() if name.startswith(("ssm", "norm")))
    expected = 4 * (groups["embedding"] + layers * 3 / 4)
    assert step.gradients == pytest.approx(expected, rel=1e-2)
    assert budget(config, 1, 64).worst_moment != step.worst_moment


@pytest.mark.parametrize("what", ["batch", "context"])
def test_devices_have_hybrids_attention_and_checkpointing(what: str) -> None:
    frame = device_frames(("chunked", "fused"))[("batch", "context").index(what)]
    assert {*zip(frame["pattern"], frame["form"], strict=True)} == {
        ("M", "chunked"), ("M", "fused"), ("MMMA", "chunked"), ("MMMA", "fused"), ("A", "none")}
    for gb in DEVICES_GB:
        largest = frame.pivot_table(index=["pattern", "form", "autocast"],
                                    columns="checkpointing", values=f"{what} on {gb} GB")
        assert (largest[True] > largest[False]).all()
    assert (frame[f"{what} on 141 GB"] > frame[f"{what} on 16 GB"]).all()


def test_no_line_of_a_device_crosses_a_number_of_the_budget() -> None:
    budgets = budgets_frame(memory.SCAN_FORMS)
    figure = figures.budget_bars(budgets, "64 x 2048", (40, 80, 141))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    right = axes.get_window_extent().x1
    words = [text.get_text() for text in axes.texts]
    assert [w for w in words if w in ("40 GB", "80 GB", "141 GB")] == ["141 GB", "80 GB", "40 GB"]
    totals = [text for text in axes.texts if text.get_text().startswith(("fp32", "bf16"))]
    assert len(totals) == 2 * len(memory.SCAN_FORMS)
    assert all(text.get_window_extent().x0 >= right for text in totals)


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
    for module in (blocks, causal_conv):
        monkeypatch.setattr(module, "fused_available", lambda device: (True, ""))
    if composed:
        monkeypatch.setattr(blocks.MambaMixer, "_is_one_operator", lambda *_: False)
    config = ModelConfig(d_model=48, n_layer=1, dt_rank=dt_rank, scan_form="fused")
    with FakeTensorMode():
        layer = blocks.MambaMixer(config)
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


def test_what_the_tables_do_not_say() -> None:
    document = memory._document_frame(1)["document"]
    assert document.notna().all()
    assert (document == "not stated").any()


def test_where_no_c_compiler_is_the_fused_scan_is_not_counted(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_memory, "runnable", lambda forms: tuple(set(forms) - {"fused"}))
    counted = full_tensors_frame(64).set_index("form")["counted, full tensors"]
    assert counted["fused"] is None
    assert counted["chunked"] is not None


def test_full_tensors_of_each_form() -> None:
    frame = full_tensors_frame().set_index("form")
    kept = frame["kept, full tensors"]
    assert kept["document_chunked"] == kept["document_cumsum"] == kept["corrected_cumsum"] == 5
    assert kept["sequential"] == pytest.approx(2, abs=0.01)
    assert kept["fused"] == 1 / native_scan.TILE  # a state every few steps
    assert kept["segment_sum"] == pytest.approx(3 + 32, abs=0.1)  # T weights; masks and a state
    for form in FORMS:
        if form != "fused" or native_scan.available()[0]:
            assert frame.loc[form, "counted, full tensors"] == pytest.approx(kept[form])


def test_from_five_to_seven() -> None:
    frame = five_to_seven_frame()
    assert frame["closed form, full tensors"].tolist() == pytest.approx(
        [5, 6, 6 + 3 / 64, 7, 8 - 4 / 64])
    seen = frame.dropna()
    assert len(seen) == 3
    ratio = seen["closed form, full tensors"] / seen["measured, full tensors"].astype(float)
    assert (ratio - 1).abs().max() < 0.02


def test_the_documents_numbers() -> None:
    document = memory._document_frame(1).set_index("key")["ours"]
    assert document["tensor_gb"] == pytest.approx(3.22, abs=0.01)
    assert document["scan_kept_before_gb"] == pytest.approx(64.4, abs=0.1)
    assert document["scan_cut"] == 8  # it says 16
    assert document["scan_kept_after_gb"] == pytest.approx(8.05, abs=0.01)
    assert document["scan_kept_before_bf16_gb"] == document["scan_kept_before_gb"]
    assert document["without_concatenation"] == 1
    assert document["counted_at_size"] == 1


def test_slices_allocate_in_proportion_to_the_square_of_the_length() -> None:
    frame = slices_frame((256, 1024)).set_index(["how", "length, steps"])["in full tensors"]
    # Three full-length gradients a chunk, and a constant.
    growth = frame["slices in a loop", 1024] - frame["slices in a loop", 256]
    assert growth == pytest.approx(3 * (32 - 8), rel=0.05)
    assert frame["split", 1024] == pytest.approx(frame["split", 256], rel=0.05)


def test_weights_and_optimizer_against_the_model() -> None:
    for preset in ("mamba_byte", "hybrid_3_1", "modded_nanogpt", "nano_ssm_3_1"):
        config = replace(PRESETS[preset].model, d_model=64, n_head=2, n_kv_head=2)
        model = ByteLM(config)
        step = budget(config, 1, 8)
        n = sum(p.numel() for p in model.parameters())
        assert step.weights == 4 * n
        assert step.optimizer == 8 * n + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("pattern", ["M", "A", "MMA"])
def test_state_bytes_against_a_stream(pattern: str) -> None:
    config = ModelConfig(d_model=16, n_layer=3, layer_pattern=pattern, n_head=2, n_kv_head=1,
                         attention_window=8)
    stream = ByteStream(ByteLM(config).eval())  # has been fed its start byte
    for seen in range(1, 13):
        assert sum(state_bytes(config, seen).values()) == stream.state_bytes()
        stream.feed(b"x")


def test_fit_of_the_original_configuration() -> None:
    preset = PRESETS["mamba_byte_original"]
    document = replace(preset.model, scan_form="document_chunked")
    room = parse_memory("40GB")
    found = fit(document, preset.train, room)
    assert found.fits is False
    assert found.spare_bytes == room - found.required_bytes < 0
    assert sum(found.breakdown.values()) == found.required_bytes
    assert fit(replace(preset.model, scan_form="fused"), preset.train, room).fits is True


def test_fit_finds_the_largest_by_bisection() -> None:
    config = ModelConfig(d_model=32, n_layer=2, scan_form="chunked")
    train = TrainConfig(batch_size=4, context=64, precision="fp32")
    room = ALLOWANCE_BYTES + 2**28
    found = fit(config, train, room)
    assert found.largest_batch is not None
    assert found.largest_context is not None

    def needed(batch: int, context: int) -> int:
        return budget(config, batch, context, "fp32", "cuda").peak + ALLOWANCE_BYTES

    assert needed(found.largest_batch, 64) <= room < needed(found.largest_batch + 1, 64)
    assert needed(4, found.largest_context) <= room < needed(4, found.largest_context + 1)
    assert fit(config, train, 1).largest_batch == 0
    assert fit(config, train, None).fits is None


def test_muon_keeps_one_moment_of_the_matrices() -> None:
    config = PRESETS["nano_ssm_1_1"].model
    adamw, muon = budget(config, 1, 8), budget(config, 1, 8, optimizer="muon")
    matrices = sum(
        p.numel() for name, p in ByteLM(config).named_parameters() if role(name, p) == "muon")
    assert adamw.optimizer - muon.optimizer == pytest.approx(4 * matrices, rel=1e-3)


def test_parse_memory() -> None:
    assert parse_memory("40GB") == 40 * 10**9
    assert parse_memory("40 GiB") == 40 * 2**30
    assert parse_memory("1.5kb") == 1500
    assert parse_memory(1024) == 1024
    for bad in ("", "forty", "40XB", "-1GB", "0", "nan"):
        with pytest.raises(UserError):
            parse_memory(bad)


def test_bad_input() -> None:
    with pytest.raises(UserError):
        memory.Parameters(forms=("nothing",))
    for bad in ({"autocasts": ("fp8",)}, {"autocasts": ()}, {"patterns": ()}, {"forms": ()},
                {"batch": 0}, {"slice_lengths": (128,)}, {"slice_lengths": (128, 128)}):
        with pytest.raises(UserError):
            memory.Parameters(**bad)
    with pytest.raises(UserError):
        scan_terms("nothing", 1, 1, 1, 1, 1)


def test_workspace_of_the_published_form_is_above_that_of_split() -> None:
    size = (1, 1024, 16, 16, 32)
    assert scan_workspace("document_chunked", *size)[1] > 10 * scan_workspace(
        "corrected_cumsum", *size)[1]


def test_the_full_profile_measures_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.PROFILES["full"].cuda == "auto"
    assert set(memory.PROFILES) == {"quick", "full"}
    recorded = gpu_memory.recorded_frame()
    asked = []
    monkeypatch.setattr(memory, "gpu_frame",
                        lambda measure, report: (asked.append(measure), ("a GPU", recorded))[1])
    small = memory.Parameters(forms=("chunked",), patterns=("M",), autocasts=("fp32",),
                              slice_lengths=(64, 128), counted_layers=1)
    for has_gpu, cuda in ((True, "auto"), (False, "auto"), (True, "off"), (False, "on")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        memory.run(replace(small, cuda=cuda), lambda _: None)
    assert asked == [True, False, False, True]


def test_cases_of_a_gpu_have_names_of_their_own() -> None:
    names = [tuple(gpu_memory.case_columns(*case).values()) for case in gpu_memory.cuda_cases()]
    assert len(set(names)) == len(names)
    layers, forms = {name[0] for name in names}, {name[2] for name in names}
    assert layers == {"MMMM", "MMMA", "AAAA", "MMMAMMMAM"}
    assert forms == {*memory.SCAN_FORMS, "none"}
    assert {(name[0], name[6]) for name in names} == {(one, c) for one in layers
                                                      for c in (False, True)}
