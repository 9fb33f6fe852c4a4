"""Streaming: one byte in, one distribution out."""

from mambabyte.stream.streams import (
    ByteModel,
    ByteStream,
    CharModel,
    advance_of,
    generate,
    sample_byte,
    tensors_of,
)

__all__ = ["ByteModel", "ByteStream", "CharModel", "advance_of", "generate", "sample_byte",
           "tensors_of"]
