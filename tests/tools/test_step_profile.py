"""The parts of a training step: named right, and adding up to the step."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch

from analysis.cli import main
from analysis.cli.studies import bench
from analysis.cli.studies.tables import parts_table
from analysis.measure.bench import steps
from analysis.measure.bench.steps import OTHER, part_of, rivals, use_published_mixers
from mambabyte.config import get_preset
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer


@pytest.mark.parametrize(("operator", "part"), [
    ("mambabyte::selective_scan_backward", "scan"), ("_ConvBackward", "convolution"),
    ("aten::mkldnn_convolution", "convolution"), ("aten::mm", "matrix products"),
    ("aten::native_layer_norm_backward", "norms"), ("aten::_foreach_lerp_", "optimizer"),
    ("Optimizer.step#AdamW.step", "optimizer"), ("aten::silu_backward", "activations"),
    ("aten::_log_softmax", "loss"), ("aten::copy_", "copies"), ("aten::add", OTHER),
    ("void tile_backward<true, true, 12, 1>(Problem, Upstream)", "scan"),
    ("conv_sums(float const*)", "convolution"), ("nvjet_sm90_tst_64x64", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
    ("void at::native::multi_tensor_apply_kernel<FusedOptimizer>", "optimizer"),
    ("triton_per_fused__to_copy_native_layer_norm_0", "norms"),
    ("triton_tem_fused_flex_attention_backward_transpose_view_5", "attention"),
    ("void norm_backward<float, bfloat16, 4>(float const*)", "norms"), ("column_sums", "norms"),
    ("void rotary_forward<bfloat16, 4, 8>(bfloat16 const*)", "attention"),
    ("void activation_backward<bfloat16, 8, 0>(bfloat16 const*)", "activations"),
    ("loss_mean(float const*, float*, int)", "loss"),
    ("triton_poi_fused_add_causal_conv_backward_view_6", "other compiled code")])
def test_operators_belong_to_parts(operator: str, part: str) -> None:
    assert part_of(operator) == part


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    preset, lines, calls = get_preset("smoke"), [], []
    config = replace(preset.model, n_layer=1)

    def interrupted(step: object, device: str, count: int = 1, last: int = 6) -> float:
        calls.append(count)
        if len(calls) > last:
            raise KeyboardInterrupt
        return float(len(calls))

    monkeypatch.setattr(steps, "seconds_of", interrupted)
    monkeypatch.setattr(steps, "training_step", lambda *_: (lambda: None, 0.0))
    given = {"first": config, "second": config}, preset.train, "cpu", "eager"
    # two to count steps, then rounds of two: the first whole, of the second one
    frame, parts = steps.bench_steps(*given, rounds=9, say=lines.append)
    assert list(frame["system"]) == ["first", "second"]
    assert list(frame["ms"]) == [4000.0, 5000.0]  # of 3 and 5, and of 4 and 6
    assert not len(parts)
    assert len(parts_table(parts)) == 0
    assert lines[-1].startswith("interrupted: the timings of before are kept, of 2 systems")
    calls[:] = [0] * 4
    with pytest.raises(KeyboardInterrupt):
        steps.bench_steps(*given, rounds=9)


def test_the_parts_add_up_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--preset", "smoke", "--device", "cpu", "--patterns", "A",
                 "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in found["steps"]] == ["M", "A", "A, half the layers"]
    sizes = [row["parameters"] for row in found["steps"]]
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=0.03)
    for row in found["steps"]:
        parts = {p["part"]: p["ms"] for p in found["parts"] if p["system"] == row["system"]}
        assert {"matrix products", "optimizer", "norms"} <= set(parts)
        assert ("scan" in parts, "attention" in parts) == (row["system"] == "M",
                                                           row["system"][0] == "A")
        kernels = {p["part"]: p["kernel"] for p in found["parts"] if p["system"] == row["system"]}
        assert all(kernels.values())
        assert "attention" not in kernels or "attention" in kernels["attention"]
        assert min(parts.values()) > 0
        assert sum(parts.values()) == pytest.approx(row["ms"])
        assert row["low"] <= row["ms"] <= row["high"]


def test_attention_is_compared_at_its_best() -> None:
    """The whole context, both matchings, and the configured window as a system of its own."""
    config = get_preset("mamba_byte").model
    found = rivals(config, ("A", "MMMA"), 8192)
    assert list(found) == ["M", "A", "MMMA", "A, half the layers", "A, window 1024",
                           "MMMA, window 1024", "A, half the layers, window 1024"]
    half = found["A, half the layers"]
    assert (half.n_layer, found["A"].n_layer) == (2, 4)
    assert 4 < half.mlp_ratio < 5.5
    assert all(s.n_parameters == pytest.approx(config.n_parameters, rel=0.01)
               for s in found.values())
    assert found["A"].attention_window == half.attention_window == 8192
    assert found["MMMA, window 1024"].attention_window == 1024
    assert list(rivals(config, ("A",), 1024)) == ["M", "A", "A, half the layers"]


def test_a_captured_step_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--preset", "smoke", "--device", "cpu", "--way", "graph"]) == 2
    assert "captures CUDA graphs" in capsys.readouterr().err


def test_a_step_on_a_gpu_is_run_as_a_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is named, or a peer's modules are to be beside, which the fused step lacks."""
    taken: list[str] = []

    def benched(configs, recipe, device, way, **others):
        taken.append(way)
        raise UserError("enough")

    monkeypatch.setattr(bench, "checked", lambda options: "cuda")
    monkeypatch.setattr(steps, "bench_steps", benched)
    for more in ([], ["--peers", "mamba_ssm"], ["--way", "graph"]):
        assert main(["bench", "step", "--preset", "smoke", *more]) == 2
    assert taken == ["fused", "compile", "graph"]


@pytest.mark.long
def test_a_peer_takes_the_place_of_the_mixers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    class Mamba(torch.nn.Module):
        """Stands for mamba-ssm's module: its constructor and its names of weights."""

        def __init__(self, d_model: int, **sizes: int) -> None:
            super().__init__()
            config = replace(get_preset("smoke").model, d_model=d_model, **sizes)
            self.own = MambaMixer(config)
            built.append(self)

        def load_state_dict(self, state, *args, **kwargs):
            return self.own.load_state_dict(state)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x, None)[0]

    step = ["bench", "step", "--preset", "smoke", "--device", "cpu", "--n-layer", "3", "--json"]
    assert main([*step, "--peers", "mamba_ssm"]) == 2
    assert "mamba_ssm is not installed" in capsys.readouterr().err
    assert main([*step, "--peers", "mambapy"]) == 2
    assert "did you mean mamba_ssm" in capsys.readouterr().err

    module = types.ModuleType("mamba_ssm")
    module.Mamba, module.__spec__ = Mamba, ModuleSpec("mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "mamba_ssm", module)
    tokens = torch.arange(40).view(2, 20)
    torch.manual_seed(0)
    model = ByteLM(get_preset("smoke").model)
    loss = model.loss(tokens)
    use_published_mixers(model)
    assert all(not isinstance(layer.mixer, MambaMixer) for layer in model.layers)
    torch.testing.assert_close(model.loss(tokens), loss)

    built.clear()
    assert main([*step, "--peers", "mamba_ssm"]) == 0
    rows = json.loads(capsys.readouterr().out)["steps"]
    assert [row["system"] for row in rows] == ["M", "M by mamba-ssm"]
    assert len(built) == 3


def test_a_step_may_have_more_bytes_than_the_text_has_else(monkeypatch, capsys):
    """It ended in torch's error of a view."""
    monkeypatch.setattr(steps, "TEXT_BYTES", 16)
    assert main(["bench", "step", "--preset", "smoke", "--device", "cpu", "--n-layer", "1",
                 "--d-model", "8", "--context", "8", "--batch-size", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["steps"]) == 1


def test_the_profiler_writes_nothing_on_the_terminal():
    """In a process of its own: its library reads at first use what it is to say."""
    source = ("import torch\nfrom analysis.measure.timing import profiling\n"
              "with profiling() as found:\n    torch.ones(3).sum()\nassert found.key_averages()")
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
