"""Weights of other libraries, read and written: the public layouts of Mamba and Mamba-2.

A public checkpoint is a folder with config.json and safetensors, one file or several with
``model.safetensors.index.json``. Names of tensors differ between the libraries in what stands
around the layers, which is all that is translated here; those inside a layer are the same ones
everywhere:

=============  ==================================  ====================  ============
mambabyte      transformers                        mamba_ssm             MambaByte
=============  ==================================  ====================  ============
``embedding``  ``backbone.embeddings``             backbone.embedding    mambabyte.token_embedding
``layers.N``   ``backbone.layers.N``               the same              mambabyte.layers.N
``norm_f``     ``backbone.norm_f``                 the same              mambabyte.final_norm
``head``       ``lm_head``                         the same              the same
=============  ==================================  ====================  ============

Headers are read first, without the numbers: what does not fit, in names, shapes or memory, is said
before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.config.checks import from_plain, path_of, shown
from mambabyte.config.files import whole_dir, write_json, write_manifest
from mambabyte.config.public import Layout, from_public, is_public, padded_vocabulary, to_public
from mambabyte.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
_AROUND = re.compile(r"(module\.|_orig_mod\.)*(backbone\.|mambabyte\.)?")
_OURS = (("embeddings.", "embedding."), ("token_embedding.", "embedding."),
         ("final_norm.", "norm_f."), ("lm_head.", "head."))
_HOW = ("convert it once with: python -c \"import torch; from safetensors.torch import save_file; "
        "save_file({{k: v.clone().contiguous() for k, v in torch.load('{path}', "
        "map_location='cpu', weights_only=True).items()}}, '{out}')\"")
Report = Callable[[float, str], None]


class Entry(NamedTuple):
    """A tensor of a checkpoint that is not loaded yet."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint of which the headers are read: its model, and its tensors under our names."""

    folder: Path
    config: ModelConfig
    skeleton: nn.Module  # the model on torch's device "meta": shapes without numbers
    entries: dict[str, Entry]  # what ``skeleton`` has, and no more

    @property
    def bytes(self) -> int:
        """Of all tensors in float32, as which they are loaded."""
        return sum(4 * math.prod(entry.shape) for entry in self.entries.values())

    def check_memory(self, device: str = "cpu") -> None:
        """UserError where a model in float32 is larger than what ``device`` has free."""
        free = free_bytes(device)
        if free is not None and self.bytes > free:
            raise UserError(
                f"{self.folder} is a model of {self.bytes // 4:,} parameters, "
                f"{in_words(self.bytes)} in float32, and {device} has {in_words(free)} free: free "
                "some, or load it on a larger machine")

    def tensors(self, report: Report | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor in float32, one at a time. UserError for nan and inf."""
        done = 0
        for name, entry in self.entries.items():
            try:
                tensor = entry.load().float()
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder} cannot be read at {name} ({error}): the file is "
                                "damaged or incomplete; fetch it again") from None
            if not tensor.isfinite().all():
                raise UserError(f"{self.folder} has nan or inf in {name}: the file is damaged, or "
                                "its training diverged")
            yield name, tensor
            done += 4 * tensor.numel()
            if report is not None:
                report(done / self.bytes, name)


def open_pretrained(
    path: Path | str, build: Callable[[ModelConfig], nn.Module]
) -> Pretrained:
    """The checkpoint in a folder, of transformers, mamba_ssm, MambaByte or this package.

    ``build`` makes the model of a configuration. Raises UserError for a folder without weights,
    for pickles, with the way to convert them, for configurations that this package does not have,
    and for names and shapes that are not those of the model that config.json says.
    """
    folder = path_of(path, "the folder of weights")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: expected one with config.json and {WEIGHTS} "
                        "on this machine; nothing is downloaded")
    found = _headers(folder)
    values = _read_object(folder / "config.json")
    try:
        config = _config_of(values, found)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    with torch.device("meta"):
        skeleton = build(config)
    without_bias = is_public(values) and not _convolution_has_bias(values)
    expected = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    return Pretrained(folder, config, skeleton, _fitting(
        expected, found, folder, without_bias, config.tied_head))


def fill(source: Pretrained, device: str = "cpu", report: Report | None = None) -> nn.Module:
    """The model of ``source`` with its weights, in float32 on ``device``. UserError where it does
    not fit into memory, before anything is loaded."""
    source.check_memory(device)
    weights = {name: tensor.to(device) for name, tensor in source.tensors(report)}
    source.skeleton.load_state_dict(weights, assign=True)
    return source.skeleton


def _config_of(values: dict[str, Any], found: Mapping[str, Entry]) -> ModelConfig:
    if not is_public(values):
        return from_plain(ModelConfig, values, "config.json")
    config = from_public(values, trained=True)
    # What a configuration says of padding and what was saved need not agree.
    rows = next(iter(found["embedding.weight"].shape), 0) if "embedding.weight" in found else 0
    said, multiple = values["vocab_size"], values.get("pad_vocab_size_multiple", 8)
    if rows in (said, padded_vocabulary({"vocab_size": said, "pad_vocab_size_multiple": multiple})):
        config = replace(config, vocab_size=rows)
    if config.n_layer > len(found):
        raise UserError(f"it says {config.n_layer} layers: the weights have {len(found)} tensors")
    return config


def _convolution_has_bias(values: Mapping[str, Any]) -> bool:
    inner = values.get("ssm_cfg") or {}
    return {**values, **inner}.get("use_conv_bias", inner.get("conv_bias", True)) is not False


def _fitting(
    expected: Mapping[str, tuple[int, ...]], found: dict[str, Entry], folder: Path,
    without_bias: bool, tied: bool,
) -> dict[str, Entry]:
    """``found`` in the order of ``expected``; UserError that names what does not fit."""
    if without_bias:  # a convolution without biases is one whose biases are 0
        for name, shape in expected.items():
            if name.endswith("conv1d.bias") and name not in found:
                found[name] = Entry(shape, lambda shape=shape: torch.zeros(  # type: ignore[misc]
                    shape, dtype=torch.float32, device="cpu"))
    if tied and "head.weight" in found and "embedding.weight" in found:
        _check_tied(found.pop("head.weight"), found["embedding.weight"], folder)
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unknown:
        words = [f"{what} {len(names)} ({min(names)})"
                 for what, names in (("lacks", missing), ("has besides", unknown)) if names]
        raise UserError(f"{folder} is not the model that its config.json says: of its tensors, by "
                        f"our names, it {' and '.join(words)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{folder} has {name} of shape {found[name].shape}: its config.json "
                            f"says {shape}")
    return {name: found[name] for name in expected}


def _check_tied(head: Entry, embedding: Entry, folder: Path) -> None:
    if head.shape != embedding.shape or not torch.equal(head.load(), embedding.load()):
        raise UserError(f"{folder} has a head that is not its embedding, and its config.json says "
                        "that they are one: set tie_word_embeddings, or tie_embeddings, to false")


# --------------------------------------------------------------------------------- writing


def save_pretrained(
    folder: Path | str, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]],
    layout: Layout = "transformers", shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint, complete or not at all: config.json and safetensors, for another library
    in shards of at most ``shard_bytes`` (or one tensor). Returns the folder.

    ``tensors`` are names of ours and tensors, of which no more than a shard is held. Raises
    UserError where ``layout``'s library has no such model.
    """
    values, folder = to_public(config, layout), path_of(folder, "the folder of weights")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}: expected at least 1")
    with whole_dir(folder, ours=_weights_in(folder)) as temporary:
        names: dict[str, int] = {}  # the shard of each tensor
        shard: dict[str, Tensor] = {}
        held = total = count = 0
        for name, tensor in _under_their_names(tensors, layout, config.tied_head):
            size = tensor.numel() * tensor.element_size()
            if shard and held + size > shard_bytes and layout != "mambabyte":
                _write_shard(temporary / f"{count}.safetensors", shard)
                shard, held, count = {}, 0, count + 1
            shard[name], names[name] = tensor.detach().cpu().contiguous(), count
            held, total = held + size, total + size
        _write_shard(temporary / f"{count}.safetensors", shard)
        final = [WEIGHTS] if not count else [
            f"model-{i + 1:05d}-of-{count + 1:05d}.safetensors" for i in range(count + 1)]
        for number, name in enumerate(final):
            (temporary / f"{number}.safetensors").rename(temporary / name)
        if count:
            write_json(temporary / INDEX, {
                "metadata": {"total_size": total},
                "weight_map": {name: final[number] for name, number in names.items()}})
        write_json(temporary / "config.json", values)
        if layout == "mambabyte":
            write_manifest(temporary)
    return folder


def _under_their_names(
    tensors: Iterable[tuple[str, Tensor]], layout: Layout, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if layout == "mambabyte":
            yield name, tensor
        elif name == "embedding.weight":
            word = "embeddings" if layout == "transformers" else "embedding"
            yield f"backbone.{word}.weight", tensor
            if tied and layout == "mamba_ssm":  # its state has both names; transformers' files one
                yield "lm_head.weight", tensor.clone()
        else:
            yield "lm_head.weight" if name == "head.weight" else f"backbone.{name}", tensor


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    save_file(shard, path, metadata={"format": "pt"})


def _weights_in(folder: Path) -> set[str]:
    """Names of an older checkpoint's weights there, which are not to stay beside new ones."""
    return {p.name for p in folder.glob("model*.safetensors*")} if folder.is_dir() else set()


# --------------------------------------------------------------------------------- reading


def _headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the safetensors in ``folder`` under our names, none of them loaded."""
    if (folder / INDEX).is_file():
        places = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(
                isinstance(p, str) and Path(p).name == p for p in places.values()):
            raise UserError(f"{folder / INDEX} has no weight_map of names to files beside it: "
                            "fetch it again")
        files = {name: sorted(n for n, p in places.items() if p == name)
                 for name in sorted(set(places.values()))}
    elif (folder / WEIGHTS).is_file():
        files = {WEIGHTS: []}
    else:
        raise UserError(_no_weights(folder))
    found: dict[str, Entry] = {}
    for file, wanted in files.items():
        for name, entry in _header(folder / file, wanted):
            ours = our_name(name)
            if ours in found:
                raise UserError(f"{folder} has two tensors that are {ours} here, one of them "
                                f"{name}: it is no single model")
            found[ours] = entry
    return found


def _header(path: Path, wanted: list[str]) -> Iterator[tuple[str, Entry]]:
    """Names and entries of one file, of ``wanted`` alone where there are any."""
    try:
        with safe_open(path, "pt") as file:
            kept = sorted(file.keys())
            if not set(wanted) <= set(kept):
                lost = min(set(wanted) - set(kept))
                raise UserError(f"{path} has no {lost}, which {INDEX} says: fetch them again")
            for name in wanted or kept:
                part = file.get_slice(name)
                if part.get_dtype() not in FLOATS:
                    raise UserError(f"{path} has {name} in {part.get_dtype()}: expected one of "
                                    f"{', '.join(FLOATS)}; quantised weights are not read")
                yield name, Entry(tuple(part.get_shape()), partial(_tensor, path, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): it is missing, "
                        "damaged or incomplete; fetch it again") from None


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def our_name(name: str) -> str:
    """The name here of a tensor of any of the layouts; another one stays as it is."""
    bare = _AROUND.sub("", name, count=1)
    for theirs, ours in _OURS:
        if bare.startswith(theirs):
            return ours + bare.removeprefix(theirs)
    return bare


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir()
                     if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return (f"{folder} has its weights as a pickle, {pickles[0]}, which could run any program "
                f"when it is read: {_HOW.format(path=folder / pickles[0], out=folder / WEIGHTS)}")
    return f"{folder} holds no weights: expected {WEIGHTS}, or {INDEX} and the files that it names"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {shown(values)}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected the model's "
                        'configuration, for MambaByte {"d_model": 1024, "num_layers": 53, '
                        '"vocab_size": 256}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON object ({error}): fetch it again") from None
    return values


# --------------------------------------------------------------------------------- memory


def in_words(size: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"


def free_bytes(device: str) -> int | None:
    """Memory that is free on ``device``; None where this machine does not say.

    On a CPU what Linux calls available, or less where the process's control group has a limit.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        said = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        found.append(int(said[1]) * 1024)  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text())
                     - int((group / "memory.current").read_text()))
    return min(found, default=None)
