"""Streaming: one byte in, one distribution out."""

from mambabyte.stream.engines.base import ByteModel, Engine
from mambabyte.stream.generation import generate
from mambabyte.stream.prefixes import PrefixCache
from mambabyte.stream.saved import Kept, load_state, save_state
from mambabyte.stream.states import tensors_of, weights_digest
from mambabyte.stream.streams import ByteStream, CharModel, sample_byte, stream_engine
from mambabyte.stream.together import beam_search, feed_together

__all__ = ["ByteModel", "ByteStream", "CharModel", "Engine", "Kept", "PrefixCache", "beam_search",
           "feed_together", "generate", "load_state", "sample_byte", "save_state", "stream_engine",
           "tensors_of", "weights_digest"]
