"""Byte-level language models built from selective state-space layers and attention.

Glossary: the one meaning of each symbol, in code, comments and reports.

======  ====================================================================================
symbol  meaning
======  ====================================================================================
B       batch size (also the input matrix of the SSM, (B, L, N), as in the Mamba paper)
L       sequence length in bytes
D       channels of a mixer, ``d_inner = expand * d_model``
N       states per channel, ``d_state``
R       rank of the step-size projection, ``dt_rank``
K       taps of the causal convolution, ``d_conv``
V       vocabulary size, 256 for bytes
u       input of the scan, (B, L, D)
delta   step size of the scan, (B, L, D), positive once softplus has been applied
A       continuous decay rates, (D, N), negative
C       output matrix of the scan, (B, L, N)
z       gate, (B, L, D)
h       SSM state, (B, D, N)
======  ====================================================================================

The recurrence (Gu & Dao 2023, arXiv:2312.00752, section 3, with the simplified
discretisation of B that the paper's code uses)::

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
    y_t = C_t . h_t + D_skip u_t
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambabyte.config import PRESETS as PRESETS
    from mambabyte.config import ModelConfig as ModelConfig
    from mambabyte.config import TrainConfig as TrainConfig
    from mambabyte.config import get_preset as get_preset
    from mambabyte.model import ByteLM as ByteLM
    from mambabyte.ops import selective_scan as selective_scan
    from mambabyte.stream import ByteStream as ByteStream
    from mambabyte.stream import generate as generate

__version__ = "0.1.0"

# Where each public name is. Loaded when used: what needs no torch does not wait for it.
_PUBLIC = {
    "PRESETS": "config", "ModelConfig": "config", "TrainConfig": "config", "get_preset": "config",
    "ByteLM": "model", "selective_scan": "ops", "ByteStream": "stream", "generate": "stream",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(
        importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
