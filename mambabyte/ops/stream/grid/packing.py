"""The weights of a model of any layers as ``hybrid.cu`` reads them: each block's share of every
matrix in tiles, small weights together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import Mamba3Spec
from mambabyte.ops.stream.cuda import split
from mambabyte.ops.stream.feeding import VOCABULARY
from mambabyte.ops.stream.grid.sizes import (
    PAST,
    THREADS,
    model_sizes,
    pad,
    part,
    slices,
    state_floats,
    up,
)

KINDS = {"M": 0, "A": 1, "L": 1, "S": 2, "D": 3, "K": 4, "R": 5}  # as in the kernel, by letter
TILE = 4096  # floats of a tile of several rows; a longer row is one alone
# Parameters of a guided model (task/guide.py) beside its network's.
GUIDED = ("prior.weight", "best.weight", "kind.weight", "gate.weight", "gate.bias")
_LOG2E = 1.4426950408889634
# What lies among a layer's small weights; 0 where it has none.
_SMALL = ("MIX_GAIN", "MIX_BIAS", "MLP_GAIN", "MLP_BIAS", "STREAM", "EMBEDDED", "SKIP",
          "UP_BIAS", "OWN", "M_CONV", "M_CONV_BIAS", "M_DT", "M_DT_BIAS", "M_SKIP", "M_RATE",
          "A_GAIN", "S_CONV", "S_CONV_BIAS", "S_DT_BIAS", "S_RATE", "S_SKIP", "D_CONV", "D_RATE",
          "D_DT_BIAS", "D_GATE", "R_DT_BIAS", "R_SKIP", "R_B_NORM", "R_C_NORM", "R_B_BIAS",
          "R_C_BIAS")  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A model's weights as the kernel reads them, by blocks, and the constants that say where."""

    resident: Tensor  # (blocks, floats): tables and small weights
    tiles: Tensor  # (blocks, floats): the matrices, tile after tile
    sizes: tuple[int, ...]  # floats of each tile
    embedding: Tensor  # (256, d_model), normed where that depends on the byte alone
    best: Tensor  # of a guided model, (256, d_model); else empty, as is
    kind: Tensor  # (kinds, d_model)
    final_norm: Tensor  # (2, d_model) weight and bias
    constants: tuple[tuple[str, float], ...]


class _Packer:
    def __init__(
        self, config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float,
        blocks: int,
    ) -> None:
        self.config, self.parameters, self.blocks = config, parameters, blocks
        self.eps, self.tiny = eps, tiny
        embedding = parameters["embedding.weight"]
        self.like = embedding.new_zeros((), dtype=torch.float32)
        self.tiles: list[Tensor] = []
        self.sums = 0  # that the threads of a block make of one matrix, for a byte
        self.offsets: dict[str, int] = dict.fromkeys(_SMALL, 0)

    # ------------------------------------------------------------------------------- parts

    def get(self, name: str, default: float | None = None, shape: tuple[int, ...] = ()) -> Tensor:
        found = self.parameters.get(name)
        if found is not None:
            return found.float()
        assert default is not None, name
        return self.like.new_full(shape, default)

    def share(self, x: Tensor, dim: int = 0) -> Tensor:
        return split(x, dim, self.blocks)

    def padded(self, n: int) -> int:
        """The shares of n channels together."""
        return self.blocks * part(n, self.blocks)

    def every(self, x: Tensor) -> Tensor:
        return x.expand(self.blocks, *x.shape)

    def matrix(self, w: Tensor, width: int | None = None) -> None:
        """Rows (blocks, rows, columns) into tiles, in the order of their use."""
        columns = pad(width or w.shape[2])
        self.sums = max(self.sums, (w.shape[1] + 1) * slices(columns // 32))
        w = F.pad(w, (0, columns - w.shape[2]))
        fit = max(1, TILE // columns)
        self.tiles += [w[:, at : at + fit].flatten(1) for at in range(0, w.shape[1], fit)]

    def behind(self, norm: str, w: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection (rows, d_model) with the norm before it multiplied in."""
        d = self.config.d_model
        weight, bias = self.get(f"{norm}.weight", 1.0, (d,)), self.get(f"{norm}.bias", 0.0, (d,))
        return (w.double() * weight).float(), (w.double() @ bias.double()).float()

    def rows(self, norm: str, parts: list[Tensor], bias: Tensor | None = None) -> Tensor:
        """Projections of one normalised input, each cut into the blocks' shares; returns the shares
        of their biases (blocks, rows)."""
        weight, shift = self.behind(norm, torch.cat(parts))
        shift = shift if bias is None else shift + bias
        sizes = [len(w) for w in parts]
        self.matrix(torch.cat([self.share(w) for w in weight.split(sizes)], 1))
        return torch.cat([self.share(b) for b in shift.split(sizes)], 1)

    def small(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Small weights (blocks, ...) of a layer, one after another, noting where."""
        at, found = 0, []
        for name, x in pieces.items():
            self.offsets[name] = at
            x = x.float().flatten(1)
            found.append(F.pad(x, (0, -x.shape[1] % 4)))
            at += found[-1].shape[1]
        return torch.cat(found, 1)

    # ------------------------------------------------------------------------------- layers

    def layer(self, i: int) -> Tensor:
        """Put a layer's matrices into tiles; returns its small weights."""
        c, d = self.config, self.config.d_model
        mixer = {"M": self.mamba, "A": self.attention, "L": self.attention, "S": self.mamba2,
                 "D": self.delta, "K": self.delta, "R": self.mamba3}[c.layers[i]]
        name = f"layers.{i}"
        own = mixer(f"{name}.mixer.", f"{name}.norm")
        up_bias = self.every(self.like.new_zeros(1))
        if c.mlp_hidden:
            bias = self.get(f"{name}.mlp.up_proj.bias", 0.0, (c.mlp_hidden,))
            up_bias = self.rows(f"{name}.mlp_norm", [self.get(f"{name}.mlp.up_proj.weight")], bias)
            self.matrix(self.share(self.get(f"{name}.mlp.out_proj.weight")),
                        self.padded(c.mlp_hidden))

        def channels(which: str, default: float) -> Tensor:
            return self.share(self.get(which, default, (d,)))

        after = f"layers.{i + 1}"
        return self.small({
            "MIX_GAIN": channels(f"{name}.mixer_gain", 1.0),
            "MIX_BIAS": channels(f"{name}.mixer.out_proj.bias", 0.0),
            "MLP_GAIN": channels(f"{name}.mlp_gain", 1.0),
            "MLP_BIAS": channels(f"{name}.mlp.out_proj.bias", 0.0),
            "STREAM": channels(f"{after}.stream_gain", 1.0),
            "EMBEDDED": channels(f"{after}.embedded_gain", 0.0),
            "SKIP": channels(f"{after}.skip_gain", 0.0), "UP_BIAS": up_bias, **own})

    def mamba(self, at: str, norm: str) -> dict[str, Tensor]:
        c = self.config
        full = c.dt_rank == "full"
        bias = self.rows(norm, list(self.get(at + "in_proj.weight").chunk(2)),
                         self.get(at + "in_proj.bias", 0.0, (2 * c.d_inner,)))
        dt = self.get(at + "dt_proj.weight")
        padded = self.padded(c.d_inner)
        projections = [self.get(at + "x_proj.weight"), *([dt] if full else [])]
        self.matrix(torch.cat([self.share(w) for w in projections], 1), padded)
        self.matrix(self.share(self.get(at + "out_proj.weight")), padded)
        return {
            "OWN": bias, "M_CONV": self.share(self.get(at + "conv1d.weight").squeeze(1)),
            "M_CONV_BIAS": self.share(self.get(at + "conv1d.bias", 0.0, (c.d_inner,))),
            "M_DT": self.share(dt[:, :0] if full else dt),
            "M_DT_BIAS": self.share(self.get(at + "dt_proj.bias")),
            "M_SKIP": self.share(self.get(at + "D")),
            "M_RATE": self.share(self.rates(at))}

    def rates(self, at: str) -> Tensor:
        """Decay rates to the base of 2, in which the kernel takes powers."""
        return (-_LOG2E * torch.exp(self.get(at + "A_log").double())).float()

    def attention(self, at: str, norm: str) -> dict[str, Tensor]:
        c = self.config
        weights = [self.get(f"{at}{name}_proj.weight") for name in "qkv"]
        bias = torch.cat([self.get(f"{at}{name}_proj.bias", 0.0, (len(w),))
                          for name, w in zip("qkv", weights, strict=True)])
        shift = self.rows(norm, weights, bias)
        self.matrix(self.share(self.get(at + "out_proj.weight")))
        gain = self.get(at + "q_gain", 1.0, (c.n_head,)) * (_LOG2E / math.sqrt(c.head_dim))
        return {"OWN": shift, "A_GAIN": self.every(gain)}

    def mamba2(self, at: str, norm: str) -> dict[str, Tensor]:
        c = self.config
        D, shared = c.d_inner, 2 * c.ssd_groups * c.ssd_d_state
        sizes = [D, D, shared, D // c.ssd_head_dim]
        z, x, bc, dt = self.get(at + "in_proj.weight").split(sizes)
        own = self.get(at + "in_proj.bias", 0.0, (sum(sizes),)).split(sizes)
        bias = self.rows(norm, [x, z, bc, dt], torch.cat([own[1], own[0], *own[2:]]))
        conv, conv_bias = self.get(at + "conv1d.weight").squeeze(1), self.get(
            at + "conv1d.bias", 0.0, (D + shared,))
        out = self.get(at + "out_proj.weight") * self.get(at + "norm.weight")
        self.matrix(self.share(out), self.padded(D))
        return {
            "OWN": bias,
            "S_CONV": torch.cat([self.share(w) for w in conv.split([D, shared])], 1),
            "S_CONV_BIAS": torch.cat([self.share(b) for b in conv_bias.split([D, shared])], 1),
            "S_DT_BIAS": self.every(self.get(at + "dt_bias")),
            "S_RATE": self.every(self.rates(at)), "S_SKIP": self.every(self.get(at + "D"))}

    def mamba3(self, at: str, norm: str) -> dict[str, Tensor]:
        c = self.config
        z, x, B, C, *gates = self.get(at + "in_proj.weight").split(list(Mamba3Spec.widths(c)))
        bias = self.rows(norm, [x, z, torch.cat([B, C]), *gates])
        self.matrix(self.share(self.get(at + "out_proj.weight")), self.padded(c.d_inner))
        of_channels = {f"R_{name}_BIAS": self.share(
            self.get(f"{at}{name}_bias").squeeze(1).repeat_interleave(c.ssd_head_dim, 0))
            for name in "BC"}
        return {
            "OWN": bias, "R_DT_BIAS": self.every(self.get(at + "dt_bias")),
            "R_SKIP": self.every(self.get(at + "D")),
            "R_B_NORM": self.every(self.get(at + "B_norm.weight")),
            "R_C_NORM": self.every(self.get(at + "C_norm.weight")), **of_channels}

    def delta(self, at: str, norm: str) -> dict[str, Tensor]:
        c, d = self.config, self.config.d_model
        kimi = at + "f_proj.0.weight" in self.parameters
        values = d * c.delta_expand_v
        gates = ["f_proj.0", "g_proj.0"] if kimi else ["a_proj", "g_proj"]
        bias = self.rows(norm, [self.get(f"{at}{name}.weight") for name in (
            "q_proj", "k_proj", "v_proj", "b_proj", *gates)])
        rates, dt_bias = self.rates(at), self.get(at + "dt_bias")
        if kimi:
            low = self.padded(c.delta_head_dim * c.delta_expand_v)
            self.matrix(self.share(self.get(at + "f_proj.1.weight")), low)
            self.matrix(self.share(self.get(at + "g_proj.1.weight")), low)
            rates = rates.repeat_interleave(c.delta_head_dim)
        out = self.get(at + "o_proj.weight") * self.get(at + "o_norm.weight").repeat(
            values // (c.delta_head_dim * c.delta_expand_v))
        self.matrix(self.share(out), self.padded(values))
        gate = self.get(at + "g_proj.1.bias", 0.0, (values,))
        put = self.share if kimi else self.every
        # What follows lies alike in both kinds.
        heads = d // c.delta_head_dim
        of_model, of_values, of_heads, of_low = (
            part(n, self.blocks) for n in (d, values, heads, c.delta_head_dim * c.delta_expand_v))
        rows = 2 * of_model + of_values + of_heads + max(of_heads + of_values, 2 * of_low)
        room = max(heads, of_model)
        return {
            "OWN": _room(bias, rows),
            "D_CONV": torch.cat([self.share(self.get(f"{at}{name}_conv1d.weight").squeeze(1))
                                 for name in "qkv"], 1),
            "D_RATE": _room(put(rates), room), "D_DT_BIAS": _room(put(dt_bias), room),
            "D_GATE": self.share(gate)}

    # ------------------------------------------------------------------------------- all

    def pack(self) -> Packed:
        c, d = self.config, self.config.d_model
        if guided := GUIDED[0] in self.parameters:
            self.matrix(self.share(self.get("prior.weight")))
        layers = [self.layer(i) for i in range(c.n_layer)]
        tied = "head.weight" not in self.parameters
        bias = self.get("head.bias", 0.0, (VOCABULARY,))
        head = self.get("embedding.weight" if tied else "head.weight")
        if guided:
            head = torch.cat([head, self.get("gate.weight")])
            bias = torch.cat([bias, self.get("gate.bias")])
        head_bias = self.rows("norm_f", [head], bias)
        stem = self.get("norm_embedding.weight", 1.0, (d,))
        first = stem * (self.get("layers.0.stream_gain", 1.0, (d,))
                        + self.get("layers.0.embedded_gain", 0.0, (d,)))
        sizes = model_sizes(c, self.blocks)
        tables, at, states, caches = [], up(7 * c.n_layer + 2 * d + head_bias.shape[1]), 0, 0
        slots = {skip: j for j, skip in enumerate(s for s in c.skips if s is not None)}
        for i, (letter, small) in enumerate(zip(c.layers, layers, strict=True)):
            skip = c.skips[i]
            window = {"A": c.attention_window, "L": c.local_window}.get(letter, 0)
            tables += [KINDS[letter], window, -1 if skip is None else slots[skip],
                       slots.get(i, -1), at, states, caches]
            at += small.shape[1]
            states += state_floats(c, letter, self.blocks)
            caches += letter in "AL"
        numbers = torch.tensor(
            tables, dtype=torch.int32, device=self.like.device).view(torch.float32)
        model = torch.cat([self.every(numbers), self.every(stem), self.every(first), head_bias], 1)
        resident = torch.cat([F.pad(model, (0, -model.shape[1] % 4)), *layers], 1)
        sizes_of = tuple(t.shape[1] for t in self.tiles)
        constants = sizes | self.offsets | {
            "CL": self.blocks, "S": 1, "T": THREADS, "PASS": 1, "PAST": PAST, "TILE": TILE,
            "TILES": len(sizes_of),
            "GUIDED": int(guided), "CACHES": max(1, caches), "RESIDENT": resident.shape[1],
            "STATE": up(states), "BLOB": sum(sizes_of), "SUMMED": self.sums,
            "EPS": self.eps, "TINY": self.tiny, "SSD_EPS": float(c.ssd_norm_eps),
            "CAP": c.logit_softcap}
        norm = torch.stack([self.get("norm_f.weight", 1.0, (d,)),
                            self.get("norm_f.bias", 0.0, (d,))])
        best, kind = (self.get(f"{name}.weight", 0.0, (0, d)).contiguous()
                      for name in ("best", "kind"))
        embedding = self.get("embedding.weight")
        if c.embed_norm and not guided:
            squares = embedding.double().square().mean(1, keepdim=True)
            embedding = (embedding * (squares + self.tiny).rsqrt()).float()
        return Packed(resident.contiguous(), torch.cat(self.tiles, 1).contiguous(), sizes_of,
                      embedding.contiguous(), best, kind, norm.contiguous(),
                      tuple(constants.items()))


def _room(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[1]))


def pack(
    config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float, blocks: int
) -> Packed:
    """The parameters of a ByteLM, by their names in it, as ``blocks`` blocks read them; ``eps`` is
    that of its norms, ``tiny`` that of norms without one."""
    return _Packer(config, parameters, eps, tiny, blocks).pack()
