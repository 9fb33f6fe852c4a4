"""The scan forms that studies compare, by name."""

from __future__ import annotations

from mambabyte.config.scan_forms import FORMS

# All but the form that takes the whole sequence as one chunk, whatever chunk is asked for, and the
# one that differs from document_chunked in what it keeps alone.
ANY_CHUNK = tuple(name for name in FORMS if name not in ("document_cumsum", "document_as_coded"))
# Forms that compute h_t = a_t (h_{t-1} + b_t), see mambabyte.ops.scan.cumsum.
PUBLISHED = ("document_chunked", "document_as_coded", "document_cumsum")
# The order of the inputs whose gradients are compared.
INPUTS = ("u", "delta", "A", "B", "C", "initial state")
