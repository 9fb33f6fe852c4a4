"""ByteLM: blocks of sequence mixers between an embedding and a head."""

from mambabyte.model.exponents import record_exponents
from mambabyte.model.lm import ByteLM, embed, head_loss, without_state

__all__ = ["ByteLM", "embed", "head_loss", "record_exponents", "without_state"]
