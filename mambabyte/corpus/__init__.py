"""Byte corpora, and bytes as characters."""

from mambabyte.corpus.corpora import (
    SPLITS,
    Corpus,
    documents_in,
    load_corpus,
    sample_starts,
    sample_windows,
    write_raw,
)

__all__ = ["SPLITS", "Corpus", "documents_in", "load_corpus", "sample_starts", "sample_windows",
           "write_raw"]
