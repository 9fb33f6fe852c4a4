"""Smoke mode: when, with what model, and checks of the parts, as a few steps prove little."""

from __future__ import annotations

import math
import os
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.block import Block, MambaMixer
from mambabyte.ops import selective_scan

SMOKE_BYTES = 10_000  # fewer training bytes than this mean smoke mode
# float32 scans agree with float64 to about 1e-7; a wrong recurrence is off by 1e-3 or more.
SCAN_TOLERANCE = 1e-5


def is_smoke(train_bytes: int) -> bool:
    """Smoke mode: a tiny corpus, or SMOKE_TEST_ONLY=1 in the environment."""
    return train_bytes < SMOKE_BYTES or os.environ.get("SMOKE_TEST_ONLY") == "1"


def smoke_configs(config: ModelConfig, train_bytes: int) -> tuple[ModelConfig, TrainConfig]:
    """The smoke configuration with the scan form of ``config``; context clamped to the corpus."""
    preset = PRESETS["smoke"]
    context = max(8, min(preset.train.context, train_bytes // 4))
    model = ModelConfig(**{**asdict(preset.model), "scan_form": config.scan_form,
                           "scan_chunk": config.scan_chunk})
    return model, TrainConfig(**{**asdict(preset.train), "context": context})


def relative_rms(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the error over that of the reference, in float64; nan if either is."""
    value, reference = value.detach().double(), reference.detach().double()
    scale = reference.square().mean().sqrt()
    return float((value - reference).square().mean().sqrt() / scale.clamp_min(1e-300))


def scan_errors(model: ByteLM, tokens: torch.Tensor) -> dict[str, float]:
    """Relative RMS error of the model's own scan on its own inputs against the definition.

    For every SSM layer, with tokens (B, L): output, final state, and the gradient of the inputs
    of a random projection of both; float64 sequential scan as the reference.
    """
    worst = {"output": 0.0, "state": 0.0, "gradient": 0.0}
    x = model.embedding(tokens)
    for layer in model.layers:
        assert isinstance(layer, Block)
        mixer = layer.mixer
        if isinstance(mixer, MambaMixer):
            u, delta, B, C, _, _ = (t.detach() for t in mixer.scan_inputs(layer.norm(x), None))
            inputs = [u, F.softplus(delta + mixer.dt_proj.bias).detach(),
                      -mixer.A_log.exp().detach(), B, C]
            mine = [t.clone().requires_grad_() for t in inputs]
            exact = [t.double().requires_grad_() for t in inputs]
            y, h = selective_scan(*mine, form=mixer.form, chunk_size=mixer.chunk)
            y_ref, h_ref = selective_scan(*exact, form="sequential")
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)
                                 ).to(y.device)
            grads = torch.autograd.grad((y * weight).sum() + h.sum(), mine)
            grads_ref = torch.autograd.grad((y_ref * weight.double()).sum() + h_ref.sum(), exact)
            errors = {
                "output": relative_rms(y, y_ref),
                "state": relative_rms(h, h_ref),
                "gradient": max(map(relative_rms, grads, grads_ref)),
            }
            # not (error <= worst): a nan must not pass
            worst = {k: v if not v <= worst[k] else worst[k] for k, v in errors.items()}
        x, _ = layer(x, None)
    return worst


def smoke_check(model: ByteLM, data: np.ndarray) -> dict[str, float]:
    """Check an untrained model end to end on ``data``; returns what was measured.

    Initial loss near ln(vocab), the scan against its definition in value, state and gradient,
    and byte-by-byte streaming against one parallel call. Raises UserError at the first failure.
    """
    context = min(48, len(data) - 1)
    tokens = sample_windows(data, context, 2, seed=0, step=0).to(model.embedding.weight.device)
    found = {"initial_loss": model.loss(tokens).item()}
    found |= {f"scan_{k}_error": v for k, v in scan_errors(model, tokens[:, :-1]).items()}
    with torch.no_grad():
        parallel, _ = model(tokens)
        state, steps = None, []
        for t in range(tokens.shape[1]):
            logits, state = model(tokens[:, t : t + 1], state)
            steps.append(logits)
    found["streaming_error"] = relative_rms(torch.cat(steps, 1), parallel)

    expected = math.log(model.config.vocab_size)
    if not abs(found["initial_loss"] - expected) < 0.1:
        raise UserError(f"smoke: initial loss {found['initial_loss']:.3f}, expected "
                        f"{expected:.3f} +- 0.1: the initialisation is wrong")
    for name in ("scan_output_error", "scan_state_error", "scan_gradient_error",
                 "streaming_error"):
        if not found[name] < SCAN_TOLERANCE:
            raise UserError(f"smoke: {name} is {found[name]:.1e}, expected below "
                            f"{SCAN_TOLERANCE:.0e}: scan form {model.config.scan_form!r} does "
                            "not compute the recurrence")
    return found
