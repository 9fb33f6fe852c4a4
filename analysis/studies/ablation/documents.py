"""Statements of the two documents that arithmetic alone can judge: theirs beside ours.

Quality, speed and energy need runs; these do not. Each row is one quoted quantity, computed again
from the quantities that the same document gives, or from the real model's parameters.
"""

from __future__ import annotations

import math

import pandas as pd

from analysis.studies.ablation.variants import effective_steps
from analysis.theory.flops import flops_per_byte, flops_table
from mambabyte.config import ModelConfig, get_preset
from mambabyte.config.mixers import spec_of

# The public task's transformer baseline, for the document's "~10 % of its compute".
BASELINE_PARAMETERS = 10.84e6
BASELINE_TOKENS = 2150 * 32 * 1024
SP_PIECES = 1024


def mixer_parameters(config: ModelConfig, letter: str) -> int:
    """Parameters of one mixer of ``config``, by its letter, without its norm and MLP."""
    return spec_of(letter).n_parameters(config)


def document_checks() -> pd.DataFrame:
    """key, statement, theirs, ours, unit, note; ``theirs`` None where the text gives no number."""
    byte = get_preset("mamba_byte")
    hybrid = get_preset("hybrid_3_1").model
    tokens = byte.train.n_steps * byte.train.batch_size * byte.train.context
    original = get_preset("mamba_byte_original").train
    planned = original.n_steps * original.batch_size * original.context
    per_byte = flops_per_byte(byte.model, byte.train.context)
    forward = flops_table(byte.model, byte.train.context).set_index("module")[
        "forward_flops_per_byte"]
    ratio = mixer_parameters(hybrid, "M") / mixer_parameters(hybrid, "A")
    low_rank = ModelConfig(**{**vars(hybrid), "dt_rank": "auto"})
    pieces = ModelConfig(**{**vars(hybrid), "vocab_size": SP_PIECES})
    capped_steps, capped = effective_steps(37.0, iterations=20_000, cap_seconds=180.0)
    _, uncapped = effective_steps(37.0, iterations=200)
    dt = math.log(2)  # softplus(0)

    rows = [
        ("parameters", "~1.06M parameters in total", 1.06e6, byte.model.n_parameters, "", ""),
        ("tokens", "64M training tokens after the memory fix", 64e6, tokens, "bytes", ""),
        ("planned_tokens", "197M tokens originally targeted", 197e6, planned, "bytes", ""),
        ("token_cut", "~3x fewer tokens", 3.0, planned / tokens, "times", ""),
        ("step_cut", "an 8x cut in per-step compute", 8.0,
         original.batch_size * original.context / (byte.train.batch_size * byte.train.context),
         "times", ""),
        ("run_flops", "4000 * 16 * 1024 * 1.06M, about 7e13 FLOPs", 7e13, tokens * per_byte,
         "FLOPs", "theirs is bytes times parameters; training takes some 6 operations a "
         "parameter and byte"),
        ("flops_per_parameter", "operations a parameter and byte", 1.0,
         per_byte / byte.model.n_parameters, "", "forward, backward and the scan"),
        ("baseline_share", "~10 % of the baseline's compute", 0.10,
         tokens * byte.model.n_parameters / (BASELINE_TOKENS * BASELINE_PARAMETERS), "",
         "bytes times parameters on both sides, so the missing factor cancels"),
        ("scan_share", "per-byte cost is O(n_layer d_inner d_state)", None,
         float(forward["SSM scan"] / forward.sum()), "",
         "share of the scan in the forward operations: the projections, O(n_layer d_model "
         "d_inner), are the rest"),
        ("energy_third", "a third of the baseline's GPU time, so 10-20 kJ", 15_000.0, 47_285 / 3,
         "J", "the same page also says 10-25 kJ; a time share is not an energy share"),
        ("conv_state", "conv_state holds the last 4 inputs", 4, byte.model.d_conv - 1, "",
         "the next output needs d_conv - 1 earlier inputs"),
        ("hybrid_ssm_layers", "9 layers at 3:1 are 6 SSM layers", 6, hybrid.layers.count("M"), "",
         "the published loop gives MMMAMMMAM"),
        ("hybrid_attention_layers", "and 3 attention layers", 3, hybrid.layers.count("A"), "", ""),
        ("ssm_over_attention_parameters", "SSM blocks have fewer parameters than attention", 1.0,
         ratio, "times", "the mixers of the hybrid, full-rank dt projection"),
        ("low_rank_ssm_over_attention", "the same with the Mamba paper's low-rank dt", 1.0,
         mixer_parameters(low_rank, "M") / mixer_parameters(low_rank, "A"), "times", ""),
        ("int8_megabytes", "fits 16 MB (int8)", 16.0, pieces.n_parameters / 1e6, "MB",
         "one byte a parameter before compression, 1024 pieces"),
        ("slowdown", "50x slower (37 s against 700 ms)", 50.0, 37 / 0.7, "times", ""),
        ("steps_in_cap", "about 5 effective steps in 200 iterations", 5.0, capped_steps, "steps",
         "at 37 s a step 5 steps fill the 180 s cap of the first run; 200 take over two hours"),
        ("rate_sum_capped", "steps at full learning rate, 180 s cap", 5.0, capped, "steps",
         "sum of the schedule's factors: the warm-down spans 1200 steps, so after the first step "
         "the rate is below 0.4 % of its peak"),
        ("rate_sum_200", "steps at full learning rate, 200 iterations, no cap", 200.0, uncapped,
         "steps", "200 of 1200 warm-down steps: the rate starts at a sixth of its peak"),
        ("claimed_speedup", "a kernel would roughly 3x the throughput", 3.0, 37 / 0.7, "times",
         "inconsistent with 50x slower: at equal speed with attention it would be up to that"),
        ("dt_start_low", "dt starts 7 times the paper's largest", 7.0, dt / 0.1, "times",
         "softplus(0) = ln 2 over dt_max"),
        ("dt_start_high", "and 690 times its smallest", 690.0, dt / 1e-3, "times",
         "ln 2 over dt_min"),
    ]
    columns = ["key", "statement", "theirs", "ours", "unit", "note"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(theirs=frame["theirs"].astype(object).where(frame["theirs"].notna(), None))
