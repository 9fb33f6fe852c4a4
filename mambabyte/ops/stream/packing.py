"""The weights of a model of any layers as ``hybrid.cu`` reads them, and the constants that it is
compiled with: each block's share of every matrix in tiles, small weights together."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.ops.build.kernel import Program
from mambabyte.ops.stream.cuda import ACTIVATIONS, split
from mambabyte.ops.stream.feeding import VOCABULARY

THREADS = 512
KINDS = {"M": 0, "A": 1, "L": 1, "S": 2, "D": 3, "K": 4}  # as in the kernel, by letter
TILE = 4096  # floats of a tile of several rows; a longer row is one alone
PAST = 4096  # bytes in which a guess is looked for; a power of two
COPIES = 2  # of a packet that is exchanged: so many fewer blocks look at each
# Parameters of a guided model (task/guide.py) beside its network's.
GUIDED = ("prior.weight", "best.weight", "kind.weight", "gate.weight", "gate.bias")
_LOG2E = 1.4426950408889634
# What lies among a layer's small weights; 0 where it has none.
_SMALL = ("MIX_GAIN", "MIX_BIAS", "MLP_GAIN", "MLP_BIAS", "STREAM", "EMBEDDED", "SKIP",
          "UP_BIAS", "OWN", "M_CONV", "M_CONV_BIAS", "M_DT", "M_DT_BIAS", "M_SKIP", "M_RATE",
          "A_GAIN", "S_CONV", "S_CONV_BIAS", "S_DT_BIAS", "S_RATE", "S_SKIP", "D_CONV", "D_RATE",
          "D_DT_BIAS", "D_GATE")  # fmt: skip


def _pad(n: int) -> int:
    """Floats that a row of n columns takes: a whole number of vectors."""
    return -(-n // 32) * 32 if n <= 96 else -(-n // 128) * 128


def _slices(units: int) -> int:
    """Into how many slices of columns a row of so many times 32 is cut, as in the kernel."""
    n = 1
    while n < THREADS // 32 and units > 8 * n:
        n *= 2
    return n


def _part(n: int, blocks: int) -> int:
    """The share of n channels that a block has."""
    return -(-n // blocks)


def _up(n: int) -> int:
    return -(-n // 4) * 4


# --------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed:
    """A model's weights as the kernel reads them, by blocks, and the constants that say where."""

    resident: Tensor  # (blocks, floats): tables and small weights
    tiles: Tensor  # (blocks, floats): the matrices, tile after tile
    sizes: tuple[int, ...]  # floats of each tile
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
        return self.blocks * _part(n, self.blocks)

    def every(self, x: Tensor) -> Tensor:
        return x.expand(self.blocks, *x.shape)

    def matrix(self, w: Tensor, width: int | None = None) -> None:
        """Rows (blocks, rows, columns) into tiles, in the order of their use."""
        columns = _pad(width or w.shape[2])
        self.sums = max(self.sums, (w.shape[1] + 1) * _slices(columns // 32))
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
        sizes = [len(part) for part in parts]
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
                 "D": self.delta, "K": self.delta}[c.layers[i]]
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
        part, heads = functools.partial(_part, blocks=self.blocks), d // c.delta_head_dim
        rows = 2 * part(d) + part(values) + part(heads) + max(
            part(heads) + part(values), 2 * part(c.delta_head_dim * c.delta_expand_v))
        room = max(heads, part(d))
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
        sizes = _sizes(c, self.blocks)
        tables, at, states, caches = [], _up(7 * c.n_layer + 2 * d + head_bias.shape[1]), 0, 0
        slots = {skip: j for j, skip in enumerate(s for s in c.skips if s is not None)}
        for i, (letter, small) in enumerate(zip(c.layers, layers, strict=True)):
            skip = c.skips[i]
            window = {"A": c.attention_window, "L": c.local_window}.get(letter, 0)
            tables += [KINDS[letter], window, -1 if skip is None else slots[skip],
                       slots.get(i, -1), at, states, caches]
            at += small.shape[1]
            states += state_floats(c, letter, self.blocks)
            caches += letter in "AL"
        numbers = torch.tensor(tables, dtype=torch.int32).view(torch.float32).to(self.like.device)
        model = torch.cat([self.every(numbers), self.every(stem), self.every(first), head_bias], 1)
        resident = torch.cat([F.pad(model, (0, -model.shape[1] % 4)), *layers], 1)
        sizes_of = tuple(t.shape[1] for t in self.tiles)
        constants = sizes | self.offsets | {
            "CL": self.blocks, "S": 1, "T": THREADS, "PASS": 1, "PAST": PAST, "TILE": TILE,
            "TILES": len(sizes_of),
            "GUIDED": int(guided), "CACHES": max(1, caches), "RESIDENT": resident.shape[1],
            "STATE": _up(states), "BLOB": sum(sizes_of), "SUMMED": self.sums,
            "EPS": self.eps, "TINY": self.tiny, "SSD_EPS": float(c.ssd_norm_eps),
            "CAP": c.logit_softcap}
        norm = torch.stack([self.get("norm_f.weight", 1.0, (d,)),
                            self.get("norm_f.bias", 0.0, (d,))])
        best, kind = (self.get(f"{name}.weight", 0.0, (0, d)).contiguous()
                      for name in ("best", "kind"))
        return Packed(resident.contiguous(), torch.cat(self.tiles, 1).contiguous(), sizes_of,
                      best, kind, norm.contiguous(), tuple(constants.items()))


def _room(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[1]))


def _sizes(c: ModelConfig, blocks: int) -> dict[str, int]:
    """The constants of the kernel that the configuration decides; 1 for layers that it lacks."""
    has = {name: bool(set(c.layers) & set(letters)) for name, letters in (
        ("M", "M"), ("A", "AL"), ("SS", "S"), ("D", "D"), ("KDA", "K"))}
    delta = has["D"] or has["KDA"]
    full = c.dt_rank == "full"
    return {
        "LAYERS": c.n_layer, "DM": c.d_model, "H": c.mlp_hidden,
        "ACTIVATION": ACTIVATIONS.index(c.mlp_activation), "CENTERED": int(c.norm == "layer"),
        "STEM": int(c.embed_norm), "MIXED": int(c.residual_mix),
        "SLOTS": sum(s is not None for s in c.skips),
        "DI": c.d_inner if has["M"] or has["SS"] else 1, "N": c.d_state if has["M"] else 1,
        "R": (0 if full else c.dt_rank_value) if has["M"] else 1, "K": c.d_conv,
        "HEADS": c.n_head if has["A"] else 1, "KVH": c.n_kv_head if has["A"] else 1,
        "HD": c.head_dim if has["A"] else 2, "QKNORM": int(c.qk_norm),
        "SH": c.d_inner // c.ssd_head_dim if has["SS"] else 1,
        "SG": c.ssd_groups if has["SS"] else 1, "SN": c.ssd_d_state if has["SS"] else 1,
        "DH": c.d_model // c.delta_head_dim if delta else 1,
        "DV": c.delta_head_dim * c.delta_expand_v if delta else 1,
        **{name: int(value) for name, value in has.items()},
    }  # fmt: skip


def _strides(z: Mapping[str, Any]) -> dict[str, int]:
    """From one byte of a pass to the next, in vectors that layers of several kinds share."""
    part = functools.partial(_part, blocks=z["CL"])
    rows, channels, values = part(z["DM"]), part(z["DI"]), part(z["DH"] * z["DV"])
    heads, low = part(z["DH"]), part(z["DV"])
    return {
        "LOCALS": max(2 * channels + part(2 * z["SG"] * z["SN"]) + part(z["SH"]),
                      2 * rows + values + heads + max(heads + values, 2 * low)),
        "YS": _pad(z["CL"] * max(channels, rows, values)),
        "PACKETS": -(-z["PASS"] * _sent(z) // 3),  # of three numbers, of a block
        "DTS_STRIDE": z["CL"] * max(part(z["SH"]), heads, rows),
    }


def _sent(z: Mapping[str, Any]) -> int:
    """Numbers that a block sends of a byte, in the exchange with the most."""
    part = functools.partial(_part, blocks=z["CL"])
    rows, heads, low = part(z["DM"]), part(z["DH"]), part(z["DV"])
    return max(part(z["DI"]), part(z["R"] + 2 * z["N"]), rows + 2 * part(z["KVH"] * z["HD"]),
               part(2 * z["SG"] * z["SN"]) + part(z["SH"]),
               2 * rows + heads + max(heads, 2 * low), 2 * part(z["DH"] * z["DV"]), part(z["H"]),
               part(VOCABULARY + z["GUIDED"]))


def _regions(z: Mapping[str, Any]) -> dict[str, int]:
    """Floats of each part of shared memory behind the tiles and the resident weights."""
    part = functools.partial(_part, blocks=z["CL"])
    blocks, rows, channels = z["CL"], part(z["DM"]), part(z["DI"])
    kv, values = part(z["KVH"] * z["HD"]), part(z["DH"] * z["DV"])
    delta, warps = max(z["D"], z["KDA"]), z["T"] // 32
    each = {  # of each byte of a pass
        "X": _pad(blocks * rows), "XN": _pad(blocks * rows), "EMB": rows,
        "SLOT": z["SLOTS"] * rows, "LOCAL": z["LOCALS"],
        "LOW": blocks * part(z["R"] + 2 * z["N"]), "STEP": channels,
        "ALL_U": z["M"] * _pad(blocks * channels), "Q": blocks * rows,
        "KEY": blocks * max(kv, rows), "VALUE": blocks * kv, "TURN": z["HD"],
        "PARTIAL": z["A"] * 3 * rows * _chunks(z), "BC": blocks * part(2 * z["SG"] * z["SN"]),
        "DTS": z["DTS_STRIDE"], "BETA": blocks * part(z["DH"]), "F": _pad(blocks * part(z["DV"])),
        "GL": _pad(blocks * part(z["DV"])), "GATES": delta * blocks * values, "Y": z["YS"],
        "HIDDEN": _pad(blocks * part(z["H"])), "SUMS": z["SUMMED"],
        "LOGIT": _up(blocks * part(VOCABULARY + z["GUIDED"])),
    }  # fmt: skip
    # Queries to one head's keys that a warp's registers hold.
    held = min(z["PASS"] * z["HEADS"] // z["KVH"], max(1, 32 // -(-z["HD"] // 8)))
    guesses = z["PASS"] > 1
    return {
        "STATES": z["STATE"], "OUT": 3 * z["PACKETS"],
        **{name: z["PASS"] * size for name, size in each.items()},
        "GROUP": z["A"] * held * warps * (z["HD"] + 2),
        "HINTS": z["GUIDED"] * VOCABULARY, "LIKELY": z["GUIDED"] * VOCABULARY,
        "PROB": VOCABULARY, "KEPT": VOCABULARY, "BYTE": 4, "ENDED": 4,
        "SEEN": guesses * z["PAST"] // 4, "ENDINGS": guesses * warps,
        "SCHEDULE": 4 * z["TILES"], "BARS": 4 * z["TILES"] + 2,
    }  # fmt: skip


def _chunks(z: Mapping[str, Any]) -> int:
    """Blocks that share the keys of a head."""
    return max(1, z["CL"] // z["KVH"])


def pack(
    config: ModelConfig, parameters: Mapping[str, Tensor], eps: float, tiny: float, blocks: int
) -> Packed:
    """The parameters of a ByteLM, by their names in it, as ``blocks`` blocks read them; ``eps`` is
    that of its norms, ``tiny`` that of norms without one."""
    return _Packer(config, parameters, eps, tiny, blocks).pack()


class Built(NamedTuple):
    """The kernel for some constants, and what a launch needs to know of it."""

    program: Program
    space: int  # floats of a block's shared memory for tiles; negative where the rest does not fit
    shared_bytes: int  # a block
    packets: int  # that blocks exchange numbers in


@functools.cache
def program(constants: tuple[tuple[str, float], ...], shared_bytes: int) -> Built:
    """The kernel for these constants where a block may have ``shared_bytes`` of shared memory."""
    z: dict[str, Any] = dict(constants)
    z |= _strides(z)
    at, places = 0, {}
    for name, size in _regions(z).items():
        places[name] = at
        at += _up(size)
    packets = 2 * COPIES * z["CL"] * z["PACKETS"]  # and those of attention
    packets += z["A"] * _chunks(z) * z["PASS"] * z["HEADS"] * z["HD"]
    places["COPIES"] = COPIES
    space = min(z["BLOB"], (shared_bytes // 4 - z["RESIDENT"] - at) // 4 * 4)
    whole = {n: v for n, v in (z | places | {"SPACE": space}).items() if isinstance(v, int)}
    real = {n: v for n, v in z.items() if isinstance(v, float)}
    sizes = "constexpr int " + ", ".join(f"{n} = {v}" for n, v in whole.items())
    sizes += "; constexpr float " + ", ".join(f"{n} = {v!r}f" for n, v in real.items()) + ";"
    made = Program.from_file(
        "build/types.cu", "stream/cluster.cu",
        *(f"stream/grid/{name}.cu" for name in ("block", "mamba", "attention", "mamba2", "delta")),
        "stream/hybrid.cu", names=("stream_hybrid",),
        options=(f"-DSIZES={sizes}",))
    return Built(made, space, 4 * (space + z["RESIDENT"] + at), packets)


def state_floats(c: ModelConfig, letter: str, blocks: int) -> int:
    """Floats that a block keeps of a layer's state, keys and values apart."""
    part = functools.partial(_part, blocks=blocks)
    taps, channels = c.d_conv - 1, part(c.d_inner)
    if letter == "M":
        return channels * (c.d_state + taps)
    if letter == "S":
        return channels * c.ssd_d_state + taps * (
            channels + part(2 * c.ssd_groups * c.ssd_d_state))
    if letter in "DK":
        values = part(c.d_model * c.delta_expand_v)
        return values * c.delta_head_dim + taps * (2 * part(c.d_model) + values)
    return 0
