"""The sequence mixers by pattern letter, as far as a configuration must know them.

In a pattern such as "MMMA" each letter names the mixer of a layer. What is here needs no torch:
whether a configuration fits the mixer, and the shapes of its parameters, from which every count
follows. The modules are in mambabyte.model, one class a mixer that extends its entry here.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from mambabyte.config.architecture import Architecture
from mambabyte.config.checks import Rule
from mambabyte.errors import UserError

Shape = tuple[int, ...]
# How an optimizer treats a parameter: Muon where it is used, else AdamW with weight decay; AdamW
# with weight decay always; AdamW without.
Role = Literal["muon", "decay", "free"]


class MixerSpec:
    """What is known of a mixer without its module; every mixer class extends one."""

    letter: ClassVar[str] = ""  # in a layer pattern; set when it is registered
    about: ClassVar[str] = ""  # in a few words, such as "causal attention"
    name: ClassVar[str] = ""  # in a table's cell, such as "attention"; ``about`` where it is empty
    uses_scan_form: ClassVar[bool] = False  # whether ``scan_form`` and ``scan_chunk`` concern it
    uses_window: ClassVar[bool] = False  # whether ``attention_window`` does
    # Matrices that are no linear maps, by name: weight decay and Muon leave them alone.
    not_decayed: ClassVar[frozenset[str]] = frozenset()
    # Matrices that AdamW trains where Muon takes the others.
    not_by_muon: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check(cls, config: Architecture) -> None:
        """Raise UserError where ``config`` has no such mixer."""

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        """The shape of every parameter of one mixer, by its name in the module."""
        raise NotImplementedError(f"{cls.__name__} does not say its parameters' shapes")

    @classmethod
    def group(cls, name: str) -> str:
        """The role under which ``ModelConfig.parameter_groups`` counts a parameter."""
        return cls.about

    @classmethod
    def role(cls, name: str, dimensions: int) -> Role:
        """How an optimizer treats the parameter of that name.

        Muon is for matrices that map activations to activations. One-dimensional parameters
        (biases, gains) have no weight decay.
        """
        if dimensions < 2 or name in cls.not_decayed:
            return "free"
        return "muon" if dimensions == 2 and name not in cls.not_by_muon else "decay"

    @classmethod
    def n_parameters(cls, config: Architecture) -> int:
        """Parameters of one mixer."""
        return sum(map(math.prod, cls.shapes(config).values()))


SPECS: dict[str, type[MixerSpec]] = {}  # by letter


def spec_of(letter: str) -> type[MixerSpec]:
    """The entry of a pattern letter; a UserError lists the letters when there is none."""
    if letter not in SPECS:
        raise UserError(f"no mixer has the letter {letter!r}: choose among {letters_in_words()}")
    return SPECS[letter]


def _instead(name: str, given: int, size: int) -> str:
    """What to do, in a message about a part that does not divide ``size``: the next smaller one."""
    fits = next((part for part in range(min(given, size), 0, -1) if size % part == 0), None)
    return "" if fits is None else f"; give {name} {fits}, for one"


def letters_in_words() -> str:
    """Every letter and what it stands for, for a message."""
    return ", ".join(f"{letter} ({spec.about})" for letter, spec in SPECS.items())


LayerPattern = Annotated[str, Rule(
    lambda text: bool(text) and set(text) <= SPECS.keys(),
    lambda: f"one letter a layer, at least one, each of {letters_in_words()}, e.g. MMMA")]


def kind_of(pattern: str) -> str:
    """The kinds of mixers in a pattern, such as "SSM and attention"."""
    return " and ".join(spec.name or spec.about for letter, spec in SPECS.items()
                        if letter in pattern)


def uses_scan_form(pattern: str) -> bool:
    """Whether any layer of ``pattern`` has a scan whose form can be chosen."""
    return any(spec_of(letter).uses_scan_form for letter in pattern)


def uses_window(pattern: str) -> bool:
    """Whether any layer of ``pattern`` looks back over ``attention_window`` and no further."""
    return any(spec_of(letter).uses_window for letter in pattern)


def add_spec(letter: str, spec: type[MixerSpec]) -> None:
    """Give ``letter`` to a mixer. Raises ValueError for one that is taken or is no letter."""
    if len(letter) != 1 or not (letter.isascii() and letter.isalpha()):
        raise ValueError(f"{letter!r} is no letter: a pattern has one letter a layer")
    if letter in SPECS and not issubclass(spec, SPECS[letter]):
        raise ValueError(f"the letter {letter!r} is taken by {SPECS[letter].about}")
    spec.letter = letter
    SPECS.setdefault(letter, spec)


class MambaSpec(MixerSpec):
    """The selective SSM; names and shapes are those of the public Mamba checkpoints."""

    about = "selective SSM"
    name = "SSM"
    uses_scan_form = True
    not_decayed = frozenset({"A_log"})  # decay rates
    # It spreads a few numbers over all channels: an orthogonal update would move every step size
    # of the SSM at once.
    not_by_muon = frozenset({"dt_proj.weight"})

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        d, D, N, R = config.d_model, config.d_inner, config.d_state, config.dt_rank_value
        low_rank = 0 if config.dt_rank == "full" else R
        return {
            "in_proj.weight": (2 * D, d),
            "conv1d.weight": (D, 1, config.d_conv), "conv1d.bias": (D,),
            "x_proj.weight": (low_rank + 2 * N, D),
            "dt_proj.weight": (D, R), "dt_proj.bias": (D,),
            "A_log": (D, N), "D": (D,),
            "out_proj.weight": (d, D),
            **({"in_proj.bias": (2 * D,), "out_proj.bias": (d,)} if config.ssm_bias else {}),
        }

    @classmethod
    def group(cls, name: str) -> str:
        part = name.partition(".")[0]
        return "ssm_conv" if part == "conv1d" else f"ssm_{part}"


class AttentionSpec(MixerSpec):
    """Causal attention with rotary positions and grouped heads."""

    about = "causal attention"
    name = "attention"
    uses_window = True

    @classmethod
    def window_of(cls, config: Architecture) -> int:
        """How many bytes back a layer looks, the byte itself included."""
        return config.attention_window

    @classmethod
    def check(cls, config: Architecture) -> None:
        if config.d_model % config.n_head or config.head_dim % 2:
            pairs = 0 if config.d_model % 2 else config.d_model // 2
            raise UserError(
                f"d_model {config.d_model} does not split into {config.n_head} heads of even width"
                ": rotary positions need d_model / n_head to be an even whole number"
                + _instead("n_head", config.n_head, pairs))
        if config.n_head % config.n_kv_head:
            raise UserError(
                f"n_head {config.n_head} is not a multiple of n_kv_head {config.n_kv_head}"
                + _instead("n_kv_head", config.n_kv_head, config.n_head))

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        d, kv = config.d_model, config.n_kv_head * config.head_dim
        maps: dict[str, Shape] = {
            "q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "out_proj": (d, d)}
        found = {f"{name}.weight": shape for name, shape in maps.items()}
        if config.linear_bias:
            found |= {f"{name}.bias": shape[:1] for name, shape in maps.items()}
        return found | ({"q_gain": (config.n_head,)} if config.qk_gain else {})

    @classmethod
    def group(cls, name: str) -> str:
        return "attention"


class LocalAttentionSpec(AttentionSpec):
    """Attention over the last ``local_window`` bytes alone."""

    about = name = "local attention"

    @classmethod
    def window_of(cls, config: Architecture) -> int:
        return config.local_window

    @classmethod
    def group(cls, name: str) -> str:
        return "local_attention"


def check_heads(about: str, config: Architecture) -> None:
    """Raise UserError where d_inner does not split into heads, and these into groups."""
    if config.d_inner % config.ssd_head_dim:
        raise UserError(f"d_inner {config.d_inner} does not split into heads of ssd_head_dim "
                        f"{config.ssd_head_dim} channels"
                        + _instead("ssd_head_dim", config.ssd_head_dim, config.d_inner))
    heads = config.d_inner // config.ssd_head_dim
    if heads % config.ssd_groups:
        raise UserError(f"{heads} heads of {about} do not split into ssd_groups "
                        f"{config.ssd_groups}" + _instead("ssd_groups", config.ssd_groups, heads))


class Mamba2Spec(MixerSpec):
    """Mamba-2; names and shapes are those of the public checkpoints."""

    about = "Mamba-2"

    @classmethod
    def check(cls, config: Architecture) -> None:
        check_heads(cls.about, config)

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        d, D, heads = config.d_model, config.d_inner, config.d_inner // config.ssd_head_dim
        conv = D + 2 * config.ssd_groups * config.ssd_d_state  # x, B and C
        return {
            "in_proj.weight": (D + conv + heads, d),  # z, x, B, C and dt
            "conv1d.weight": (conv, 1, config.d_conv), "conv1d.bias": (conv,),
            "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (D,),
            "out_proj.weight": (d, D),
            **({"in_proj.bias": (D + conv + heads,), "out_proj.bias": (d,)}
               if config.ssm_bias else {}),
        }

    @classmethod
    def group(cls, name: str) -> str:
        part = name.partition(".")[0]
        return "mamba2_conv" if part == "conv1d" else f"mamba2_{part}"


class Mamba3Spec(MixerSpec):
    """Mamba-3 of one input and one output a head; names and shapes are those of the public
    module."""

    about = "Mamba-3"
    not_decayed = frozenset({"B_bias", "C_bias"})  # biases, of a shape for several inputs a head

    @classmethod
    def check(cls, config: Architecture) -> None:
        check_heads(cls.about, config)
        if config.ssd_d_state % 2 or not cls.pairs(config):
            raise UserError(
                f"ssd_d_state {config.ssd_d_state} with ssd_rope_fraction "
                f"{config.ssd_rope_fraction} has {cls.pairs(config)} pairs of states that turn: "
                "Mamba-3 needs an even ssd_d_state and at least one pair")

    @classmethod
    def pairs(cls, config: Architecture) -> int:
        """Pairs of states that turn."""
        return int(config.ssd_d_state * config.ssd_rope_fraction) // 2

    @classmethod
    def widths(cls, config: Architecture) -> tuple[int, ...]:
        """What in_proj makes: z, x, B, C, and of dt, decay, mix and angle."""
        D, shared = config.d_inner, config.ssd_groups * config.ssd_d_state
        heads = D // config.ssd_head_dim
        return D, D, shared, shared, heads, heads, heads, cls.pairs(config)

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        d, D, N = config.d_model, config.d_inner, config.ssd_d_state
        heads = D // config.ssd_head_dim
        return {
            "in_proj.weight": (sum(cls.widths(config)), d), "dt_bias": (heads,),
            "B_bias": (heads, 1, N), "C_bias": (heads, 1, N), "D": (heads,),
            "B_norm.weight": (N,), "C_norm.weight": (N,), "out_proj.weight": (d, D),
        }

    @classmethod
    def group(cls, name: str) -> str:
        return f"mamba3_{name.partition('.')[0]}"


class DeltaSpec(MixerSpec):
    """Layers around the gated delta rule; a subclass says what makes its gates."""

    # Each row makes the gate of one head, or spreads a few numbers over all channels: an
    # orthogonal update would move every gate at once.
    not_by_muon = frozenset({"a_proj.weight", "b_proj.weight", "f_proj.1.weight"})

    @classmethod
    def check(cls, config: Architecture) -> None:
        if config.d_model % config.delta_head_dim:
            raise UserError(f"d_model {config.d_model} does not split into heads of "
                            f"delta_head_dim {config.delta_head_dim} channels"
                            + _instead("delta_head_dim", config.delta_head_dim, config.d_model))

    @classmethod
    def widths(cls, config: Architecture) -> tuple[int, int, int]:
        """Heads, and key and value channels of all of them."""
        return (config.d_model // config.delta_head_dim, config.d_model,
                config.d_model * config.delta_expand_v)

    @classmethod
    def gate_shapes(cls, config: Architecture) -> dict[str, Shape]:
        """Parameters of the decays and of the output's gate."""
        raise NotImplementedError(f"{cls.__name__} does not say the shapes of its gates")

    @classmethod
    def shapes(cls, config: Architecture) -> dict[str, Shape]:
        d, K = config.d_model, config.d_conv
        heads, keys, values = cls.widths(config)
        return {
            "q_proj.weight": (keys, d), "k_proj.weight": (keys, d), "v_proj.weight": (values, d),
            "q_conv1d.weight": (keys, 1, K), "k_conv1d.weight": (keys, 1, K),
            "v_conv1d.weight": (values, 1, K), "b_proj.weight": (heads, d), "A_log": (heads,),
            **cls.gate_shapes(config),
            "o_norm.weight": (values // heads,), "o_proj.weight": (d, values),
        }

    @classmethod
    def group(cls, name: str) -> str:
        part = name.partition(".")[0]
        return f"delta_{'conv' if part.endswith('conv1d') else part}"


class GatedDeltaNetSpec(DeltaSpec):
    """Gated DeltaNet: one decay a head."""

    about = "Gated DeltaNet"

    @classmethod
    def gate_shapes(cls, config: Architecture) -> dict[str, Shape]:
        heads, _, values = cls.widths(config)
        return {"a_proj.weight": (heads, config.d_model), "dt_bias": (heads,),
                "g_proj.weight": (values, config.d_model)}


class KimiDeltaSpec(DeltaSpec):
    """Kimi Delta Attention: a decay for each key channel, from a projection of low rank."""

    about = "Kimi Delta Attention"

    @classmethod
    def gate_shapes(cls, config: Architecture) -> dict[str, Shape]:
        heads, keys, values = cls.widths(config)
        rank = values // heads
        return {"f_proj.0.weight": (rank, config.d_model), "f_proj.1.weight": (keys, rank),
                "dt_bias": (keys,),
                "g_proj.0.weight": (rank, config.d_model), "g_proj.1.weight": (values, rank),
                "g_proj.1.bias": (values,)}


add_spec("M", MambaSpec)
add_spec("A", AttentionSpec)
add_spec("L", LocalAttentionSpec)
add_spec("S", Mamba2Spec)
add_spec("R", Mamba3Spec)
add_spec("D", GatedDeltaNetSpec)
add_spec("K", KimiDeltaSpec)
