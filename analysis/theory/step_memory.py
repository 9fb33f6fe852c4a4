"""The bytes of one training step and of a streaming state, in closed form.

Every term is derived from the formulas but one, LIBRARY_BYTES, which was measured.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from analysis.theory.kept_tensors import (
    STREAM_DTYPE,
    Autocast,
    Term,
    saved_terms,
    squares_in_float32,
)
from mambabyte.config import ModelConfig
from mambabyte.model.families.mamba import resolve_form
from mambabyte.model.mixer import FLOAT32, Around, Step, mixer_of

# What the matrix libraries hold inside torch's allocator. This one number is not derived: it was
# read off the peaks recorded on an H200 (data/records/memory/h200-memory, torch 2.11), so these
# peaks alone cannot confirm it; analysis.studies.memory.gpu.libraries_frame fits it to some of them
# and judges the others. 67 MB of it are cuBLAS workspaces of 32 MiB, one for the thread of the
# forward pass and one for that of the backward pass (torch's default on Hopper; 8 MiB each on
# earlier cards). The rest has no explanation yet.
LIBRARY_BYTES = 92 * 10**6

# By moment, bytes of activations and workspace, and of the gradients of weights: these appear from
# the head down, and all of them exist at the end.
Moments = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Budget:
    """Bytes of one training step by category; ``peak`` is what an allocator sees at most."""

    form: str
    autocast: Autocast
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept between forward and backward
    workspace: int  # above all of these at the worst moment
    libraries: int  # what the matrix libraries hold for themselves; none on the CPU
    worst_moment: str

    @property
    def peak(self) -> int:
        return (self.weights + self.gradients + self.optimizer + self.activations
                + self.workspace + self.libraries)


def budget(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    device: str = "cpu", checkpointing: bool = False, optimizer: str = "adamw",
    micro_batches: int = 1,
) -> Budget:
    """The closed form of one training step: every category, and the moment of the peak.

    ``optimizer`` is that of TrainConfig, and ``micro_batches`` how many parts of ``batch``
    sequences each a step has. Steps are taken as written, not compiled.

    The peak is looked for at the moments that can be it: the loss (going forward, where the
    output of the last norm and the logits are alive as variables, and going backward), each
    layer's mixer at the moments that it names, its MLP going backward, the embedding, and the
    optimizer's step.
    Layers after the one at hand are not yet there (forward) or no longer (backward). A
    checkpointed layer goes forward a second time, in the backward pass.
    """
    n_bytes = config.n_parameters * FLOAT32
    terms = saved_terms(config, batch, length, autocast, device, checkpointing)
    whole = terms if not checkpointing else saved_terms(config, batch, length, autocast, device)
    kept = sum(t.bytes for t in terms)
    step = Step(batch, length, STREAM_DTYPE[autocast], device)
    moments = _moments_around(config, step, kept, optimizer) | _moments_of_layers(
        config, step, terms, whole, checkpointing)
    if micro_batches > 1:
        # The parts before left every gradient. A new one is freed as soon as it is added to theirs,
        # but for a tied head's, which waits for that of the rows.
        rows, table = _table_gradients(config)
        new = {"loss,": 0, "head,": rows, "layer": table, "optimizer": 0}
        moments = {name: (taken, n_bytes + new.get(name.split()[0], gradients - n_bytes + rows))
                   for name, (taken, gradients) in moments.items()}
    libraries = LIBRARY_BYTES if device == "cuda" else 0
    moment = max(moments, key=lambda name: sum(moments[name]))
    taken, gradients = moments[moment]
    left = 0 if moment.startswith(("embedding", "optimizer")) else kept
    return Budget(
        resolve_form(config, device), autocast, n_bytes, gradients,
        _optimizer_bytes(config, optimizer), left, taken - left, libraries, moment)


def _table_gradients(config: ModelConfig) -> tuple[int, int]:
    """Bytes of the gradient of the head, and of the second that a tied table has: of the head and
    of the rows looked up, until they are added."""
    rows = config.vocab_size * config.d_model * FLOAT32
    return rows, rows if config.tied_head else 0


def _moments_around(config: ModelConfig, step: Step, kept: int, optimizer: str) -> Moments:
    """The moments of the loss, the embedding and the optimizer; ``kept`` for the backward pass."""
    tokens, itemsize, d = step.tokens, step.itemsize, config.d_model
    n_bytes = config.n_parameters * FLOAT32
    rows, table = _table_gradients(config)
    moments = {
        "loss, forward": (kept + tokens * config.vocab_size * FLOAT32 + (
            0 if itemsize == FLOAT32 else
            tokens * (d * FLOAT32 + config.vocab_size * itemsize)), 0),
        "loss, backward": (kept + 2 * tokens * config.vocab_size * FLOAT32, 0),
        "head, backward": (kept + tokens * d * FLOAT32, rows),
        "embedding, backward": (tokens * d * FLOAT32, n_bytes + table),
        "optimizer step": (
            _muon_workspace(config, step.device) if optimizer == "muon" else 0, n_bytes),
    }
    if config.tied_head and itemsize == FLOAT32:
        # The head's gradient is a transposed product, into which autograd does not add in place.
        moments["embedding, sum of its gradients"] = (0, n_bytes + 2 * table)
    return moments


def _moments_of_layers(
    config: ModelConfig, step: Step, terms: list[Term], whole: list[Term],
    checkpointing: bool,
) -> Moments:
    """The moments of each layer's backward pass: ``terms`` are kept until then, ``whole`` is what
    a layer has that is made again."""
    per_layer = [sum(t.bytes for t in whole if t.layer == i) for i in range(config.n_layer)]
    mlp = [sum(t.bytes for t in whole if t.layer == i and t.part == "mlp")
           for i in range(config.n_layer)]
    stays = [sum(t.bytes for t in terms if t.layer == i) for i in range(config.n_layer)]
    residual = step.tokens * config.d_model * FLOAT32
    above = _gradients_above(config)
    moments: Moments = {}
    for i, letter in enumerate(config.layers):
        # What lies below, and this layer whole: under checkpointing it is there for a while, made
        # again from its input, which its norm keeps in any case.
        held = sum(stays[:i]) + per_layer[i]
        done = above[i]  # and of this layer what lies behind the moment
        if config.mlp_hidden:
            done += 2 * config.d_model * config.mlp_hidden * FLOAT32
            # d(x^2) = grad * (2 * x^1): the gradient, both factors and the product, all at once.
            wide = squares_in_float32(config, step.itemsize, step.device)
            hidden = step.tokens * config.mlp_hidden
            moments[f"layer {i}, MLP backward"] = (held + residual + hidden * (
                4 * (FLOAT32 if wide else step.itemsize) - step.itemsize), done)
        around = Around(held, mlp[i], residual, done, above[i], checkpointing)
        moments |= {f"layer {i}, {name}": taken for name, taken
                    in mixer_of(letter).moments(config, step, around).items()}
    return moments


def _gradients_above(config: ModelConfig) -> list[int]:
    """Bytes of the gradients that exist when the backward pass comes to each layer."""
    groups = config.parameter_groups()
    around = (groups["mlp"] + groups["norm"] + groups.get("residual", 0)) / config.n_layer
    # A tied head has its gradient first. The rows of an embedding of its own come last of all.
    found: list[float] = [groups.get("head", groups["embedding"])]
    for letter in reversed(config.layers):
        found.append(found[-1] + mixer_of(letter).n_parameters(config) + around)
    return [int(n * FLOAT32) for n in reversed(found[:-1])]


def _optimizer_bytes(config: ModelConfig, optimizer: str) -> int:
    """Two moments a weight and a step count of 4 bytes a tensor with AdamW.

    Muon keeps one moment, and no step count, of the matrices that it takes.
    """
    by_muon = _muon_shapes(config) if optimizer == "muon" else []
    saved = sum(math.prod(shape) + 1 for shape in by_muon)
    return (2 * config.n_parameters + _n_tensors(config) - saved) * FLOAT32


def _muon_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """The matrices that Muon takes: what each mixer says, and the MLPs'."""
    mlp = 2 * [(config.d_model, config.mlp_hidden)] if config.mlp_hidden else []
    return [shape for letter in config.layers for mixer in [mixer_of(letter)]
            for shape in [*mlp, *(shape for name, shape in mixer.shapes(config).items()
                                  if mixer.role(name, len(shape)) == "muon")]]


def _muon_workspace(config: ModelConfig, device: str) -> int:
    """Bytes that Muon's step takes: the updates of all matrices, and for those of one shape, which
    are orthogonalised at once, a stack in float32, and in the dtype of ``orthogonalise`` the
    iterate, the next one, their Gram matrix and its polynomial."""
    itemsize = FLOAT32 if device == "cpu" else 2
    shapes = Counter((min(shape), max(shape)) for shape in _muon_shapes(config))

    def stack(rows: int, columns: int, count: int) -> int:
        wide, gram = (count * rows * n for n in (columns, rows))
        return FLOAT32 * wide + itemsize * 2 * (wide + gram)

    updates = sum(FLOAT32 * math.prod(shape) * count for shape, count in shapes.items())
    return updates + max((stack(*shape, count) for shape, count in shapes.items()), default=0)


def _n_tensors(config: ModelConfig) -> int:
    """Parameter tensors: AdamW keeps a step count of 4 bytes for each."""
    norm = {"layer": 2, "rms": 1, "rms_plain": 0}[config.norm]
    bias, gains = config.linear_bias, config.block_scales
    block = norm + gains + 2 * config.residual_mix
    block += 2 * (1 + bias) + norm + gains if config.mlp_hidden else 0
    ends = (1 if config.tied_head else 2 + bias) + norm + config.embed_norm_gain
    ends += sum(skip is not None for skip in config.skips)
    return ends + sum(block + len(mixer_of(letter).shapes(config)) for letter in config.layers)


def state_bytes(config: ModelConfig, seen: int) -> dict[str, int]:
    """Bytes of one stream's float32 state after ``seen`` bytes, by the mixers' names for it:
    {"ssm": ..., "kv_cache": ...}, one each that the model has."""
    found: dict[str, int] = {}
    for letter in config.layers:
        mixer = mixer_of(letter)
        found[mixer.state_name] = (
            found.get(mixer.state_name, 0) + mixer.state_bytes(config, seen))
    return found
