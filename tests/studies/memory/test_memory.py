"""The closed form of the memory footprint against counts, and what it says of the document."""

from __future__ import annotations

import gc
import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.cli import main
from analysis.cli.models.train import _forecast
from analysis.measure.allocations import allocated_bytes, measure_peak, measure_saved, peak_bytes
from analysis.studies.memory import SCAN_FORMS, figures
from analysis.studies.memory import compute as memory
from analysis.studies.memory import scans as scan_memory
from analysis.studies.memory.closed_form import budgets_frame, device_frames
from analysis.studies.memory.scans import five_to_seven_frame, full_tensors_frame, slices_frame
from analysis.theory.fit import ALLOWANCE_BYTES, DEVICES_GB, fit, parse_memory
from analysis.theory.kept_tensors import AUTOCASTS, saved_terms
from analysis.theory.step_memory import budget, state_bytes
from mambabyte.config import PRESETS, SPECS, ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops import FORMS
from mambabyte.ops.scan import cpu as native_scan
from mambabyte.ops.scan.memory import scan_terms, scan_workspace
from mambabyte.stream import ByteStream
from mambabyte.train.optim import roles
from mambabyte.train.step import text_step


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
    if rng.random() < 0.5:
        config = replace(
            config, block_scales=rng.random() < 0.5, residual_mix=rng.random() < 0.5,
            unet_skips=rng.random() < 0.5, linear_bias=rng.random() < 0.5,
            qk_gain=rng.choice([0.0, 1.5]),
            embed_norm_gain=config.embed_norm and rng.random() < 0.5)
    return (config, rng.choice([1, 2, 5]), rng.choice([2, 7, 16, 33]),
            rng.choice(AUTOCASTS), rng.random() < 0.2)


# (pattern, autocast, checkpointing) of the steps whose peaks are profiled
PEAKS = (("M", "fp32", False), ("MA", "bf16", False), ("M", "fp32", True), ("MMMA", "bf16", True),
         ("MA", "fp16", True), ("A", "fp32", True))


@pytest.mark.parametrize("seed", range(98))
def test_saved_bytes_are_exact(seed: int) -> None:
    config, batch, length, autocast, checkpointing = random_case(seed)
    if config.scan_form == "fused" and not native_scan.available()[0]:
        pytest.skip(native_scan.available()[1])
    predicted = sum(t.bytes for t in saved_terms(
        config, batch, length, autocast, checkpointing=checkpointing))
    counted = measure_saved(config, batch, length, autocast, checkpointing)
    assert predicted == counted


@pytest.mark.long
def test_the_documents_step_counted_at_its_own_size() -> None:
    preset = PRESETS["mamba_byte_original"]
    config = replace(preset.model, scan_form="document_chunked", n_layer=1)
    predicted = sum(t.bytes for t in saved_terms(config, 64, 2048))
    assert predicted == measure_saved(config, 64, 2048, shapes_only=True)


@pytest.mark.parametrize(("form", "pattern", "autocast", "checkpointing"), [
    # a step of every form daily, and every kind of step in the form that is used
    pytest.param(form, *step, marks=() if form == "chunked" or step == PEAKS[0] else
                 pytest.mark.long)
    for form in FORMS for step in PEAKS])
def test_peak_within_five_percent(
    form: str, pattern: str, autocast: str, checkpointing: bool
) -> None:
    if form == "fused" and not native_scan.available()[0]:
        pytest.skip(native_scan.available()[1])
    config = ModelConfig(d_model=48, n_layer=2, n_head=2, n_kv_head=2, layer_pattern=pattern,
                         scan_form=form, scan_chunk=32)
    batch, length = 2, 256 if form != "recurrent" else 48
    step = budget(config, batch, length, autocast, checkpointing=checkpointing)
    measured = measure_peak(config, batch, length, autocast, checkpointing)
    assert (step.peak - step.weights - step.optimizer) / measured == pytest.approx(1, abs=0.05)


@pytest.mark.long  # the chunked form above has every kind of step
def test_peaks_cover_patterns_and_checkpointing() -> None:
    p = memory.Parameters(forms=("chunked",), patterns=("M", "A", "MMMA"), autocasts=AUTOCASTS)
    _, frame = memory._counted_frames(p)
    assert {*zip(frame["pattern"], frame["autocast"], frame["checkpointing"], strict=True)} == {
        (pattern, autocast, c) for pattern in ("M", "A", "MMMA") for autocast in AUTOCASTS
        for c in (False, True)}
    assert (frame["predicted / profiled"] - 1).abs().max() < 0.05


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", ["fp32", "bf16"])
def test_the_gradients_of_a_large_table_are_counted(tied: bool, autocast: str) -> None:
    """A tied table has the head's gradient, that of its rows, and in float32 their sum."""
    config = ModelConfig(vocab_size=4096, d_model=32, n_layer=1, d_state=2, tied_head=tied)
    table = 4096 * 32 * 4
    step = budget(config, 1, 8, autocast)
    measured = measure_peak(config, 1, 8, autocast)
    assert step.worst_moment.startswith("embedding")
    assert step.gradients + step.activations + step.workspace == pytest.approx(measured, rel=5e-3)
    extra = {(True, "fp32"): 2, (True, "bf16"): 1}.get((tied, autocast), 0)
    assert step.gradients == 4 * config.n_parameters + extra * table


def test_a_cpu_has_no_context_and_no_autocast() -> None:
    on = {device: fit(ModelConfig(), TrainConfig(), None, device) for device in ("cpu", "cuda")}
    assert on["cpu"].breakdown["allowance"] == on["cpu"].breakdown["libraries"] == 0
    assert on["cuda"].breakdown["allowance"] == ALLOWANCE_BYTES
    assert on["cpu"].required_bytes == on["cpu"].budget.peak
    assert {device: found.budget.autocast for device, found in on.items()} == {
        "cpu": "fp32", "cuda": "bf16"}


@pytest.mark.parametrize(("optimizer", "micro_batches", "tied", "pattern"), [
    ("adamw", 4, True, "A"), ("adamw", 4, False, "M"), ("muon", 1, True, "M"),
    ("muon", 2, True, "SA")])
def test_peak_of_a_whole_step(
    optimizer: str, micro_batches: int, tied: bool, pattern: str
) -> None:
    """With the gradients of the parts before, and with what the optimizer's step takes."""
    config = ModelConfig(d_model=96, n_layer=2, n_head=2, n_kv_head=2, layer_pattern=pattern,
                         d_state=4, mlp_ratio=4, tied_head=tied, vocab_size=512)
    recipe = TrainConfig(batch_size=4, context=16, micro_batches=micro_batches, precision="fp32",
                         optimizer=optimizer)
    step = text_step(ByteLM(config), np.arange(2000) % 251, recipe)
    step(1.0)  # the optimizer has its moments, kernels are compiled
    step.optimizer.zero_grad()
    found = fit(config, recipe, None, "cpu")
    kept = found.budget.weights + found.budget.optimizer
    assert found.required_bytes == pytest.approx(kept + peak_bytes(lambda: step(1.0)), rel=0.03)


def test_a_batch_that_fits_divides_into_its_micro_batches() -> None:
    recipe = TrainConfig(batch_size=16, micro_batches=4)
    one = fit(ModelConfig(), replace(recipe, batch_size=4, micro_batches=1), None).budget
    found = fit(ModelConfig(), recipe, 10**10)
    assert found.budget.activations == one.activations
    assert found.budget.gradients >= 4 * ModelConfig().n_parameters > one.gradients
    assert found.largest_batch
    assert found.largest_batch % 4 == 0
    assert fit(ModelConfig(), replace(recipe, batch_size=found.largest_batch), 10**10).fits


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
@pytest.mark.long
def test_devices_have_hybrids_attention_and_checkpointing(what: str) -> None:
    frame = device_frames(("chunked", "fused"))[("batch", "context").index(what)]
    assert {*zip(frame["pattern"], frame["form"], strict=True)} == {
        ("M", "chunked"), ("M", "fused"), ("MMMA", "chunked"), ("MMMA", "fused"),
        *((letter, "none") for letter in SPECS if letter != "M")}
    for gb in DEVICES_GB:
        largest = frame.pivot_table(index=["pattern", "form", "autocast"],
                                    columns="checkpointing", values=f"{what} on {gb} GB")
        assert (largest[True] > largest[False]).all()
    assert (frame[f"{what} on 141 GB"] > frame[f"{what} on 16 GB"]).all()


def test_no_line_of_a_device_crosses_a_number_of_the_budget() -> None:
    budgets = budgets_frame(SCAN_FORMS)
    figure = figures.budget_bars(budgets, "64 x 2048", (40, 80, 141))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    right = axes.get_window_extent().x1
    words = [text.get_text() for text in axes.texts]
    assert [w for w in words if w in ("40 GB", "80 GB", "141 GB")] == ["141 GB", "80 GB", "40 GB"]
    totals = [text for text in axes.texts if text.get_text().startswith(("fp32", "bf16"))]
    assert len(totals) == 2 * len(SCAN_FORMS)
    assert all(text.get_window_extent().x0 >= right for text in totals)


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


@pytest.mark.long
def test_full_tensors_of_each_form() -> None:
    frame = full_tensors_frame().set_index("form")
    kept = frame["kept, full tensors"]
    assert kept["document_chunked"] == kept["document_cumsum"] == kept["corrected_cumsum"] == 5
    assert kept["document_as_coded"] == 6
    assert kept["recurrent"] == pytest.approx(2, abs=0.01)
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


@pytest.fixture(scope="module")
def documents_frame() -> pd.DataFrame:
    return memory._document_frame(1).set_index("key")


def test_the_documents_numbers(documents_frame: pd.DataFrame) -> None:
    document = documents_frame["ours"]
    assert document["tensor_gb"] == pytest.approx(3.22, abs=0.01)
    assert document["scan_kept_before_gb"] == pytest.approx(64.4, abs=0.1)
    assert document["scan_cut"] == 8  # it says 16
    assert document["scan_kept_after_gb"] == pytest.approx(8.05, abs=0.01)
    assert document["scan_kept_before_bf16_gb"] == document["scan_kept_before_gb"]
    assert document["without_concatenation"] == 1
    assert document["counted_at_size"] == 1


def test_the_scripts_own_order_keeps_a_sixth_tensor(documents_frame: pd.DataFrame) -> None:
    ours, coded = documents_frame["ours"], documents_frame[memory.AS_CODED]
    assert (ours["kept_per_layer"], coded["kept_per_layer"]) == (5, 6)
    assert coded["counted_at_size"] == 1  # hooks, at the document's own size
    assert ours["peak_before_gb"] == pytest.approx(82, abs=0.5)
    assert coded["peak_before_gb"] == pytest.approx(94.2, abs=0.5)
    assert ours["peak_after_gb"] == pytest.approx(10.3, abs=0.1)
    assert coded["peak_after_gb"] == pytest.approx(11.85, abs=0.1)


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


def test_what_has_no_closed_form_is_refused_and_a_small_step_has_digits(capsys) -> None:
    with pytest.raises(UserError, match="a sharded model has no closed form"):
        fit(ModelConfig(), TrainConfig(parallel="sharded"), None)
    small = ["--model.d-model", "16", "--model.n-layer", "1", "--device", "cpu"]
    assert main(["memory", *small]) == 0
    needed = fit(ModelConfig(d_model=16, n_layer=1), TrainConfig(), None, "cpu").required_bytes
    assert f"needed       {needed / 1e6:10.3f} MB" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "recipe", "words"), [
    ({}, {"batch_size": 2**17}, r"--train.batch-size [1-9]\d*, or more --train.micro-batches,"),
    ({}, {"context": 10**9, "batch_size": 1}, r"--train.context [1-9]\d*"),
    ({"d_model": 2**15, "n_layer": 99}, {}, "a smaller model"),
])
def test_what_would_fit_is_more_than_nothing(model, recipe, words, monkeypatch) -> None:
    line = rf"[\d,]+ GB of [\d.]+ GB: it will not fit; {words} would"
    with pytest.raises(UserError, match=rf"{line}\. The system would end this process"):
        _forecast(ModelConfig(**model), TrainConfig(**recipe), "cpu")
    monkeypatch.setattr("mambabyte.model.pretrained.free_bytes", lambda device: 10**20)
    assert re.search(f"{line}$", _forecast(ModelConfig(**model), TrainConfig(**recipe), "cpu"))


def test_muon_keeps_one_moment_of_the_matrices() -> None:
    config = PRESETS["nano_ssm_1_1"].model
    adamw, muon = budget(config, 1, 8), budget(config, 1, 8, optimizer="muon")
    model = ByteLM(config)
    of = roles(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if of[name] == "muon")
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
