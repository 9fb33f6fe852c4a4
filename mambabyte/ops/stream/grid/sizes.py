"""The constants that ``hybrid.cu`` is compiled with, from a model's sizes: where each vector lies
in a block's shared memory, and how many packets an exchange has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from mambabyte.config import ModelConfig
from mambabyte.config.mixers import Mamba3Spec
from mambabyte.ops.build.kernel import Program
from mambabyte.ops.stream.cuda import ACTIVATIONS
from mambabyte.ops.stream.feeding import VOCABULARY

THREADS = 256  # of a block that compute
BESIDE = 128  # one of which asks for tiles; see packets.cu
PAST = 4096  # bytes in which a guess is looked for; a power of two
COPIES = 2  # of a packet that is exchanged: so many fewer blocks look at each
WORDS = 16  # of an order to a kernel that stays


def pad(n: int) -> int:
    """Floats that a row of n columns takes: a whole number of vectors."""
    return -(-n // 32) * 32 if n <= 96 else -(-n // 128) * 128


def slices(units: int) -> int:
    """Into how many slices of columns a row of so many times 32 is cut, as in the kernel."""
    n = 1
    while n < THREADS // 32 and units > 8 * n:
        n *= 2
    return n


def part(n: int, blocks: int) -> int:
    """The share of n channels that a block has."""
    return -(-n // blocks)


def up(n: int) -> int:
    return -(-n // 4) * 4


def model_sizes(c: ModelConfig, blocks: int) -> dict[str, int]:
    """The constants of the kernel that the configuration decides; 1 for layers that it lacks."""
    has = {name: bool(set(c.layers) & set(letters)) for name, letters in (
        ("M", "M"), ("A", "AL"), ("SS", "S"), ("D", "D"), ("KDA", "K"), ("M3", "R"))}
    delta, ssd = has["D"] or has["KDA"], has["SS"] or has["M3"]
    full = c.dt_rank == "full"
    return {
        "LAYERS": c.n_layer, "DM": c.d_model, "H": c.mlp_hidden,
        "ACTIVATION": ACTIVATIONS.index(c.mlp_activation), "CENTERED": int(c.norm == "layer"),
        "STEM": int(c.embed_norm), "MIXED": int(c.residual_mix),
        "SLOTS": sum(s is not None for s in c.skips),
        "DI": c.d_inner if has["M"] or ssd else 1, "N": c.d_state if has["M"] else 1,
        "R": (0 if full else c.dt_rank_value) if has["M"] else 1, "K": c.d_conv,
        "HEADS": c.n_head if has["A"] else 1, "KVH": c.n_kv_head if has["A"] else 1,
        "HD": c.head_dim if has["A"] else 2, "QKNORM": int(c.qk_norm),
        "SH": c.d_inner // c.ssd_head_dim if ssd else 1, "SG": c.ssd_groups if ssd else 1,
        "SN": c.ssd_d_state if ssd else 1, "SP": Mamba3Spec.pairs(c) if has["M3"] else 1,
        "DH": c.d_model // c.delta_head_dim if delta else 1,
        "DV": c.delta_head_dim * c.delta_expand_v if delta else 1,
        **{name: int(value) for name, value in has.items()},
    }  # fmt: skip


def _strides(z: Mapping[str, Any]) -> dict[str, int]:
    """From one byte of a pass to the next, in vectors that layers of several kinds share."""
    share = functools.partial(part, blocks=z["CL"])
    rows, channels, values = share(z["DM"]), share(z["DI"]), share(z["DH"] * z["DV"])
    heads, low = share(z["DH"]), share(z["DV"])
    return {
        "LOCALS": max(2 * channels + share(2 * z["SG"] * z["SN"]) + share(z["SH"]),
                      2 * rows + values + heads + max(heads + values, 2 * low)),
        "ORDER_PACKETS": -(-(WORDS + z["GUIDED"] * (VOCABULARY + 1)) // 3),
        "YS": pad(z["CL"] * max(channels, rows, values)),
        "PACKETS": -(-z["PASS"] * _sent(z) // 3),  # of three numbers, of a block
        "DTS_STRIDE": z["CL"] * max(3 * share(z["SH"]) + share(z["SP"]), heads, rows),
    }


def _sent(z: Mapping[str, Any]) -> int:
    """Numbers that a block sends of a byte, in the exchange with the most."""
    share = functools.partial(part, blocks=z["CL"])
    rows, heads, low = share(z["DM"]), share(z["DH"]), share(z["DV"])
    return max(share(z["DI"]), share(z["R"] + 2 * z["N"]), rows + 2 * share(z["KVH"] * z["HD"]),
               share(2 * z["SG"] * z["SN"]) + 3 * share(z["SH"]) + share(z["SP"]),
               2 * rows + heads + max(heads, 2 * low), 2 * share(z["DH"] * z["DV"]), share(z["H"]),
               share(VOCABULARY + z["GUIDED"]))


def _regions(z: Mapping[str, Any]) -> dict[str, int]:
    """Floats of each part of shared memory behind the tiles and the resident weights."""
    share = functools.partial(part, blocks=z["CL"])
    blocks, rows, channels = z["CL"], share(z["DM"]), share(z["DI"])
    kv, values = share(z["KVH"] * z["HD"]), share(z["DH"] * z["DV"])
    delta, warps = max(z["D"], z["KDA"]), z["T"] // 32
    each = {  # of each byte of a pass
        "X": pad(blocks * rows), "XN": pad(blocks * rows), "EMB": rows,
        "SLOT": z["SLOTS"] * rows, "LOCAL": z["LOCALS"],
        "LOW": blocks * share(z["R"] + 2 * z["N"]), "STEP": channels,
        "ALL_U": z["M"] * pad(blocks * channels), "Q": blocks * rows,
        "KEY": blocks * max(kv, rows), "VALUE": blocks * kv, "TURN": z["HD"],
        "PARTIAL": z["A"] * 3 * rows * _chunks(z), "BC": blocks * share(2 * z["SG"] * z["SN"]),
        "DTS": z["DTS_STRIDE"], "BETA": blocks * share(z["DH"]), "F": pad(blocks * share(z["DV"])),
        "GL": pad(blocks * share(z["DV"])), "GATES": delta * blocks * values, "Y": z["YS"],
        "HIDDEN": pad(blocks * share(z["H"])), "SUMS": z["SUMMED"],
        "LOGIT": up(blocks * share(VOCABULARY + z["GUIDED"])),
    }  # fmt: skip
    # Queries to one head's keys that a warp's registers hold.
    held = min(z["PASS"] * z["HEADS"] // z["KVH"], max(1, 16 // -(-z["HD"] // 8)))
    guesses = z["PASS"] > 1
    return {
        "STATES": z["STATE"], "OUT": 3 * z["PACKETS"],
        **{name: z["PASS"] * size for name, size in each.items()},
        "GROUP": z["A"] * held * warps * (z["HD"] + 2),
        "HINTS": z["GUIDED"] * VOCABULARY, "LIKELY": z["GUIDED"] * VOCABULARY,
        "PROB": VOCABULARY, "KEPT": VOCABULARY, "BYTE": 4, "ENDED": 4,
        "ORDER": 3 * z["ORDER_PACKETS"],
        "SEEN": guesses * z["PAST"] // 4, "ENDINGS": guesses * warps,
        "SCHEDULE": 4 * z["TILES"], "BARS": 4 * z["TILES"] + 2,
    }  # fmt: skip


def _chunks(z: Mapping[str, Any]) -> int:
    """Blocks that share the keys of a head."""
    return max(1, z["CL"] // z["KVH"])


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
        at += up(size)
    packets = 2 * COPIES * z["CL"] * z["PACKETS"]  # and those of attention
    packets += z["A"] * _chunks(z) * z["PASS"] * z["HEADS"] * z["HD"]
    places["COPIES"], places["ORDERS"] = COPIES, packets  # which lie behind all others
    packets += z["ORDER_PACKETS"]
    space = min(z["BLOB"], (shared_bytes // 4 - z["RESIDENT"] - at) // 4 * 4)
    whole = {n: v for n, v in (z | places | {"SPACE": space}).items() if isinstance(v, int)}
    real = {n: v for n, v in z.items() if isinstance(v, float)}
    sizes = "constexpr int " + ", ".join(f"{n} = {v}" for n, v in whole.items())
    sizes += "; constexpr float " + ", ".join(f"{n} = {v!r}f" for n, v in real.items()) + ";"
    made = Program.from_file(
        "build/types.cu", "stream/cluster.cu",
        *(f"stream/grid/{name}.cu" for name in (
            "packets", "block", "mamba", "attention", "mamba2", "mamba3", "delta")),
        "stream/hybrid.cu", names=("stream_hybrid",),
        options=(f"-DSIZES={sizes}",), own=True)
    return Built(made, space, 4 * (space + z["RESIDENT"] + at), packets)


def state_floats(c: ModelConfig, letter: str, blocks: int) -> int:
    """Floats that a block keeps of a layer's state, keys and values apart."""
    share = functools.partial(part, blocks=blocks)
    taps, channels = c.d_conv - 1, share(c.d_inner)
    if letter == "M":
        return channels * (c.d_state + taps)
    if letter == "S":
        return channels * c.ssd_d_state + taps * (
            channels + share(2 * c.ssd_groups * c.ssd_d_state))
    if letter == "R":
        return channels * (2 * c.ssd_d_state + 1)
    if letter in "DK":
        values = share(c.d_model * c.delta_expand_v)
        return values * c.delta_head_dim + taps * (2 * share(c.d_model) + values)
    return 0
