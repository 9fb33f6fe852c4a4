"""ByteLM: blocks of sequence mixers between an embedding and a head."""

from mambabyte.model.attention import AttentionMixer
from mambabyte.model.exponents import record_exponents
from mambabyte.model.lm import ByteLM, embed, head_loss, without_state
from mambabyte.model.mamba import MambaMixer
from mambabyte.model.mixer import MIXERS, LayerState, Mixer, mixers, register

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "ByteLM",
    "LayerState",
    "MambaMixer",
    "Mixer",
    "embed",
    "head_loss",
    "mixers",
    "record_exponents",
    "register",
    "without_state",
]
