"""Weights of other libraries: the same numbers, in and out; and what is refused, and how."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.cli import main
from mambabyte.checkpoint import load_model
from mambabyte.config import ModelConfig
from mambabyte.config.public import from_public
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, pretrained
from mambabyte.ops.compare import relative_rms

PUBLIC = Path(__file__).parent / "public"  # made by transformers 5.24, with the logits it gives
SIZES: dict[str, Any] = {"d_model": 8, "n_layer": 2, "d_state": 3, "norm_eps": 1e-5,
                         "ssd_head_dim": 4, "ssd_d_state": 3, "ssd_groups": 2}


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PUBLIC / "mamba", tmp_path / "mamba"))


def small(**changes: Any) -> ByteLM:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(**{**SIZES, "norm": "rms", **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not Ellipsis}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_logits_are_those_of_transformers_whole_and_byte_by_byte(kind: str) -> None:
    model = ByteLM.from_pretrained(PUBLIC / kind)
    stored = json.loads((PUBLIC / kind / "logits.json").read_text())
    tokens, expected = torch.tensor(stored["tokens"]), torch.tensor(stored["logits"])
    assert relative_rms(model(tokens)[0], expected) < 1e-6
    found, state = model(tokens[:, :4])
    steps = [found]
    for token in tokens[:, 4:].unbind(1):
        found, state = model(token[:, None], state)
        steps.append(found)
    assert relative_rms(torch.cat(steps, 1), expected) < 1e-6


@pytest.mark.parametrize(("layout", "changes"), [
    ("transformers", {"layer_pattern": "M", "norm_eps": None, "dt_rank": 3, "ssm_bias": True}),
    ("transformers", {"layer_pattern": "S", "tied_head": False, "vocab_size": 37}),
    ("mamba_ssm", {"layer_pattern": "M", "norm": "layer", "expand": 3, "d_conv": 3}),
    ("mamba_ssm", {"layer_pattern": "S", "vocab_size": 37}),
    ("mamba_ssm", {"layer_pattern": "R", "vocab_size": 37, "ssd_d_state": 6}),
    ("mambabyte", {"layer_pattern": "MSA", "n_head": 2, "n_kv_head": 1, "mlp_ratio": 2.0}),
])
def test_written_and_read_again(layout: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = small(**changes)
    model.save_pretrained(tmp_path / "out", layout)
    for other in (ByteLM.from_pretrained(tmp_path / "out"), load_model(tmp_path / "out")):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())
        tokens = torch.arange(7)[None]
        assert relative_rms(other(tokens)[0], model(tokens)[0]) < 1e-6
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (
        layout == "mamba_ssm" or (layout == "transformers" and not model.config.tied_head))
    assert ("backbone.embeddings.weight" in names) == (layout == "transformers")


@pytest.mark.parametrize(("changes", "message"), [
    ({"layer_pattern": "MS"}, "layer_pattern is 'MS'.*all of Mamba"),
    ({"mlp_ratio": 2.0}, r"mlp_ratio is 2\.0: transformers has 0\.0 alone"),
    ({"norm": "layer"}, "norm is 'layer'"), ({"dt_rank": "full"}, "dt_rank is 'full'"),
    ({"layer_pattern": "S", "ssd_norm_eps": 1e-3}, r"ssd_norm_eps is 0\.001"),
    ({"unet_skips": True}, "unet_skips is True"), ({"logit_softcap": 3.0}, "logit_softcap is 3"),
])
def test_a_model_that_they_do_not_have_is_not_written(changes, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        small(**changes).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_other_modules_is_not_written(tmp_path: Path) -> None:
    model = small()
    model.blocks[0].mixer.out_proj = torch.nn.Sequential(model.blocks[0].mixer.out_proj)
    with pytest.raises(UserError, match=r"out_proj.*take its adapters"):
        model.save_pretrained(tmp_path / "out")


def test_shards(tmp_path: Path) -> None:
    model = small(layer_pattern="S")
    out = pretrained.save_pretrained(
        tmp_path / "out", model.config, model.state_dict().items(), "transformers", 1500)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    tensors = {n: t for f in files for n, t in load_file(out / f).items()}
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in tensors.values())
    tokens = torch.arange(7)[None]
    assert torch.equal(load_model(out)(tokens)[0], model(tokens)[0])
    model.save_pretrained(out)  # of the shards nothing stays
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]
    index["weight_map"]["backbone.norm_f.weight"] = "../model.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no weight_map of names to files beside it"):
        ByteLM.from_pretrained(out)


# ------------------------------------------------------------------------- layouts and names


def test_mambabyte_has_names_and_sizes_of_its_own(tmp_path: Path) -> None:
    """Those of github.com/jxiw/MambaByte: LayerNorm, a head of its own, 53 layers of 1,024."""
    for d_model, layers, million in ((1024, 53, 353), (1792, 48, 972)):
        config = from_public({"vocab_size": 256, "d_state": 16, "d_conv": 4, "norm_eps": 1e-5,
                              "d_model": d_model, "num_layers": layers, "expand": 2})
        assert config.n_parameters // 10**6 == pytest.approx(million, abs=3)
    model = small(norm="layer", tied_head=False)
    tensors = {re.sub("^(?!head)", "mambabyte.", name).replace("head.", "lm_head.").replace(
        "embedding.", "token_embedding.").replace("norm_f.", "final_norm."): t
        for name, t in model.state_dict().items()}
    assert tensors.keys() >= {"mambabyte.token_embedding.weight", "mambabyte.final_norm.bias",
                              "mambabyte.layers.1.mixer.A_log", "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"d_model": 8, "num_layers": 2, "vocab_size": 256, "d_state": 3, "is_generating": True}))
    tokens = torch.arange(7)[None]
    assert torch.equal(ByteLM.from_pretrained(tmp_path)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("around", ["", "module.backbone.", "_orig_mod.backbone."])
def test_names_of_a_bare_or_wrapped_model(around: str, public: Path) -> None:
    before = ByteLM.from_pretrained(public).state_dict()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("backbone.", around)] = tensors.pop(name)

    edit_weights(public, rename)
    assert all(torch.equal(t, before[n])
               for n, t in ByteLM.from_pretrained(public).state_dict().items())


def test_half_precision_is_widened_and_padding_is_what_the_weights_have(public: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()
        tensors["backbone.embeddings.weight"] = torch.nn.functional.pad(
            tensors["backbone.embeddings.weight"], (0, 0, 0, 5))

    edit_weights(public, change)
    edit(public, pad_vocab_size_multiple=3)
    with pytest.raises(UserError, match=r"embedding.weight of shape \(16, 8\).*says \(11, 8\)"):
        ByteLM.from_pretrained(public)
    edit(public, pad_vocab_size_multiple=16)
    model = ByteLM.from_pretrained(public)
    assert model.config.vocab_size == 16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_of_pieces_is_said_to_be_one(tmp_path: Path, caplog) -> None:
    small(vocab_size=600).save_pretrained(tmp_path / "pieces")
    small().save_pretrained(tmp_path / "bytes")
    load_model(tmp_path / "bytes")
    assert not caplog.records
    load_model(tmp_path / "pieces")
    assert "600 symbols of a tokenizer" in caplog.text


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("backbone.norm_f.weight"), r"lacks 1 \(norm_f.weight\)"),
    (lambda t: t.update({"backbone.extra": torch.zeros(1)}), r"has besides 1 \(extra\)"),
    (lambda t: t.update({"embedding.weight": torch.zeros(11, 8)}), "two tensors that are embedd"),
    (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(9)}), r"norm_f.weight of shape"),
    (lambda t: t["backbone.norm_f.weight"].fill_(float("nan")), "nan or inf in norm_f.weight"),
    (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(8).char()}), "quantised"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(11, 8)}), "a head that is not its embed"),
])
def test_weights_that_are_not_the_models(change: Any, message: str, public: Path) -> None:
    edit_weights(public, change)
    with pytest.raises(UserError, match=message):
        ByteLM.from_pretrained(public)


@pytest.mark.parametrize(("entries", "message"), [
    ({"hidden_act": "gelu"}, "config.json: the public configuration has hidden_act 'gelu'"),
    ({"num_hidden_layers": 10**9}, "n_layer is 1000000000"),
    ({"num_hidden_layers": 900}, "900 layers: the weights have 26 tensors"),
    ({"vocab_size": ...}, "does not say vocab_size"), ({"model_type": "llama"}, "model_type"),
    ({"use_bias": False}, r"has besides 4 \(layers.0.mixer.in_proj.bias\)"),
])
def test_configurations_that_are_not_the_weights(entries, message, public: Path) -> None:
    edit(public, **entries)
    with pytest.raises(UserError, match=message):
        ByteLM.from_pretrained(public)


def test_how_weights_started_does_not_matter_to_trained_ones(public: Path) -> None:
    edit(public, time_step_scale=2.0, rescale_prenorm_residual=True, time_step_floor=0.5)
    assert ByteLM.from_pretrained(public).config.n_layer == 2


def test_a_pickle_is_refused_with_the_way_to_convert_it(public: Path, capsys) -> None:
    before = ByteLM.from_pretrained(public).state_dict()
    torch.save(load_file(public / "model.safetensors"), public / "pytorch_model.bin")
    (public / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"a pickle, pytorch_model\.bin, .*any program") as error:
        ByteLM.from_pretrained(public)
    program = re.search(r'python -c "(.*)"$', str(error.value))
    assert program is not None
    exec(program[1])
    assert all(torch.equal(t, before[n])
               for n, t in ByteLM.from_pretrained(public).state_dict().items())


def test_folders_that_are_none(public: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nothing is downloaded"):
        ByteLM.from_pretrained("state-spaces/mamba-130m")
    data = (public / "model.safetensors").read_bytes()
    (public / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        ByteLM.from_pretrained(public)
    (public / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        ByteLM.from_pretrained(public)


def test_a_model_too_large_says_so_before_it_loads(public: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "free_bytes", lambda device: 5000)
    monkeypatch.setattr(pretrained, "_tensor", lambda *place: pytest.fail(f"loaded {place}"))
    with pytest.raises(UserError, match=r"1,\d\d\d parameters, .*in float32, and cpu has 5\.0 kB"):
        ByteLM.from_pretrained(public)


def test_free_memory_is_known_here() -> None:
    found = pretrained.free_bytes("cpu")
    assert found is not None
    assert 2**20 < found < 2**50


# ------------------------------------------------------------------------------ the command


def test_the_command_both_ways(public: Path, tmp_path: Path, capsys) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["convert", str(public), str(ours)]) == 0
    assert main(["convert", str(ours), str(theirs), "--to", "transformers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layout"] == "transformers"
    first, last = (load_file(p / "model.safetensors") for p in (public, theirs))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[n], last[n]) for n in first)
    assert main(["convert", str(ours), str(theirs)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["generate", str(theirs), "--prompt", "\t", "--bytes", "4"]) == 0


# --------------------------------------------------------------------------- the live library


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "changes"), [
    ("Mamba", {}), ("Mamba2", {"n_groups": 2}),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("Mamba", {"use_bias": True, "use_conv_bias": False, "vocab_size": 37}),
        ("Mamba", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "conv_kernel": 6}),
        ("Mamba", {"residual_in_fp32": False, "time_step_rank": 5, "expand": 3, "conv_kernel": 3}),
        ("Mamba2", {"tie_word_embeddings": True, "n_groups": 4}),
        ("Mamba2", {"use_bias": True, "use_conv_bias": False, "n_groups": 1, "chunk_size": 4}),
        ("Mamba2", {"layer_norm_epsilon": 1e-3, "residual_in_fp32": False, "conv_kernel": 2,
                    "n_groups": 1})))])
def test_against_transformers_itself(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install -e .[test]")
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "state_size": 4,
                             "num_hidden_layers": 2}
    sizes |= {"num_heads": 4, "head_dim": 8} if kind == "Mamba2" else {}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**sizes, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            plain = p.ndim < 2 or "A_log" in name
            p.copy_(p + 0.3 * noise if plain else noise * p.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path / "in")
    ours = ByteLM.from_pretrained(tmp_path / "in")
    tokens = torch.randint(0, 32, (2, 37), generator=generator)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert relative_rms(ours(tokens)[0], expected) < 1e-5
        out = theirs(tokens[:, :9], use_cache=True)
        argument = "cache_params" if "cache_params" in out else "cache"
        _, state = ours(tokens[:, :9])
        for i in range(9, 20):
            out = theirs(tokens[:, i : i + 1], use_cache=True, **{argument: out[argument]})
            found, state = ours(tokens[:, i : i + 1], state)
            assert relative_rms(found, out.logits) < 1e-5
    ours.save_pretrained(tmp_path / "out")
    again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert relative_rms(again.eval()(tokens).logits, expected) < 1e-6
