"""Streaming: one byte in, one distribution out."""

from mambabyte.stream.generation import generate
from mambabyte.stream.prefixes import PrefixCache
from mambabyte.stream.saved import Kept, load_state, save_state
from mambabyte.stream.states import tensors_of, weights_digest
from mambabyte.stream.streams import (
    ByteModel,
    ByteStream,
    CharModel,
    advance_of,
    sample_byte,
)
from mambabyte.stream.together import beam_search, feed_together

__all__ = ["ByteModel", "ByteStream", "CharModel", "Kept", "PrefixCache", "advance_of",
           "beam_search", "feed_together", "generate", "load_state", "sample_byte", "save_state",
           "tensors_of", "weights_digest"]
