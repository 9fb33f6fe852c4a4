"""Smoke mode: when, with what model, and checks of the parts, as a few steps prove little."""

from __future__ import annotations

import math
import os
from dataclasses import asdict

import numpy as np
import torch

from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.corpus import sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM, Mixer, mixers
from mambabyte.ops.compare import relative_rms

SMOKE_BYTES = 10_000  # fewer training bytes than this mean smoke mode
# float32 scans agree with float64 to about 1e-7; a wrong recurrence is off by 1e-3 or more.
SCAN_TOLERANCE = 1e-5


def is_smoke(train_bytes: int) -> bool:
    """Smoke mode: a tiny corpus, or SMOKE_TEST_ONLY=1 in the environment."""
    return train_bytes < SMOKE_BYTES or os.environ.get("SMOKE_TEST_ONLY") == "1"


def smoke_configs(config: ModelConfig, train_bytes: int) -> tuple[ModelConfig, TrainConfig]:
    """The smoke configuration with the scan form of ``config``; context clamped to the corpus.

    Raises UserError for a text that is too short for a window.
    """
    preset = PRESETS["smoke"]
    context = max(8, min(preset.train.context, train_bytes // 4))
    if train_bytes <= context:
        raise UserError(f"the corpus has {train_bytes} training bytes: expected {context + 1} or "
                        f"more to check the parts, and {SMOKE_BYTES:,} to train")
    model = ModelConfig(**{**asdict(preset.model), "scan_form": config.scan_form,
                           "scan_chunk": config.scan_chunk})
    return model, TrainConfig(**{**asdict(preset.train), "context": context})


def scan_errors(model: ByteLM, tokens: torch.Tensor) -> dict[str, float]:
    """Relative RMS error of each mixer's own operator on its own inputs against the definition.

    Of tokens (B, L), the largest over layers: output, final state, and the gradient of the
    inputs; see ``Mixer.against_definition``.
    """
    worst = {"output": 0.0, "state": 0.0, "gradient": 0.0}
    inputs: list[tuple[Mixer, torch.Tensor]] = []
    handles = [mixer.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0])))
               for mixer in mixers(model, Mixer)]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    for mixer, x in inputs:
        for name, pairs in mixer.against_definition(x).items():
            for found, expected in pairs:
                error = relative_rms(found, expected)
                # not (error <= worst): a nan must not pass
                worst[name] = error if not error <= worst[name] else worst[name]
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
