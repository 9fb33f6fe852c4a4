"""The untrained model by its parallel scan against one step at a time: the document's 0.13 %."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from analysis.measure.exponents import ssm_layers
from mambabyte.config import PRESETS
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.model import ByteLM
from mambabyte.model.block import Block
from mambabyte.model.families.shared import inverse_softplus
from mambabyte.ops import selective_scan
from mambabyte.ops.compare import relative_rms


@torch.no_grad()
def scan_against_step(corpus_name: str, seed: int, draws: int) -> pd.DataFrame:
    """The untrained mamba_byte model on 80 bytes: parallel scan against one step at a time.

    The steps are the recurrence itself. For each draw of the weights, precision and scan form:
    relative difference of the logits, and of the scan's output alone in the first layer. If
    float64 shows the same difference as float32, it is not rounding.
    """
    corpus = load_corpus(corpus_name)
    rows = []
    for draw in range(draws):
        tokens = sample_windows(corpus.train, 80, 1, seed, draw)[:, :-1]
        for uniform in (False, True):
            for precision in ("float32", "float64"):
                for form in ("document_chunked", "corrected_cumsum", "chunked"):
                    torch.manual_seed(seed + draw)
                    model = ByteLM(replace(PRESETS["mamba_byte"].model, scan_form=form))
                    if uniform:
                        _draw_uniform(model, seed + draw)
                    model = model.to(getattr(torch, precision))
                    scan, step = _logits_and_scan(model, tokens)
                    rows.append({
                        "draw": draw, "dt": "uniform" if uniform else "log-uniform",
                        "precision": precision, "form": form,
                        "logits, relative RMS, %": 100 * relative_rms(scan[0], step[0]),
                        "logits, largest over largest, %": 100 * float(
                            (scan[0] - step[0]).abs().max() / step[0].abs().max()),
                        "scan alone, relative RMS, %": 100 * relative_rms(scan[1], step[1])})
    return pd.DataFrame(rows)


def _logits_and_scan(
    model: ByteLM, tokens: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits, first layer's scan output) by the model's form, and one step at a time."""
    layer = model.layers[0]
    assert isinstance(layer, Block)
    mixers = ssm_layers(model)
    mixer = mixers[0]
    found = []
    for name in (mixer.form, "recurrent"):
        for each in mixers:
            each.form = name
        logits, _ = model(tokens)
        u, delta, B, C, _, _ = mixer.scan_inputs(layer.norm(model.embedding(tokens)), None)
        y, _ = selective_scan(u, delta, -mixer.A_log.exp(), B, C, delta_bias=mixer.dt_proj.bias,
                              delta_softplus=True, form=name)
        found.append((logits, y))
    return found[0], found[1]


def _draw_uniform(model: ByteLM, seed: int) -> None:
    """Redraw softplus(dt bias) uniformly, as the document's words say, instead of log-uniformly."""
    g = torch.Generator().manual_seed(seed)
    for mixer in ssm_layers(model):
        dt = torch.rand(mixer.dt_proj.bias.shape, generator=g) * (0.1 - 1e-3) + 1e-3
        mixer.dt_proj.bias.copy_(inverse_softplus(dt))
