"""ByteLM: blocks of sequence mixers between an embedding and a head."""

from mambabyte.model.exponents import record_exponents
from mambabyte.model.families.attention import AttentionMixer, LocalAttentionMixer
from mambabyte.model.families.delta import GatedDeltaNetMixer, KimiDeltaMixer
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.model.families.mamba2 import Mamba2Mixer
from mambabyte.model.families.mamba3 import Mamba3Mixer
from mambabyte.model.lm import ByteLM, embed, head_loss, without_state
from mambabyte.model.mixer import MIXERS, LayerState, Mixer, mixers, register

__all__ = [
    "MIXERS", "AttentionMixer", "ByteLM", "GatedDeltaNetMixer", "KimiDeltaMixer", "LayerState",
    "LocalAttentionMixer", "Mamba2Mixer", "Mamba3Mixer", "MambaMixer", "Mixer", "embed",
    "head_loss", "mixers", "record_exponents", "register", "without_state",
]
