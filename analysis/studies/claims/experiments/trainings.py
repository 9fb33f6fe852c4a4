"""Small experiments that initialise or train a model: seconds each, on one CPU core."""

from __future__ import annotations

import io
import math
import time
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.measure.exponents import ssm_layers, step_sizes
from analysis.measure.timing import in_turns, quartiles, seconds_of
from analysis.studies.ablation import get_variant, variants
from analysis.studies.claims.experiments.scan import CHUNK, TEXT, tokens
from analysis.studies.claims.lab import Settings, experiment
from mambabyte.config import PRESETS, ModelConfig, TrainConfig, get_preset
from mambabyte.config.files import scratch_dir
from mambabyte.corpus import Corpus, load_corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.evaluate import score
from mambabyte.model import AttentionMixer, ByteLM, MambaMixer, record_exponents
from mambabyte.train import optimise, text_batches, text_step, train, train_step
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule
from mambabyte.train.smoke import smoke_check, smoke_configs

FOX = "the quick brown fox jumps over the lazy dog. "
FOX_STEPS = 80
SECOND_STOPS = (5, 40, 250)  # steps after which the second document's small hybrid is looked at
ZLIB_LEVEL = 9  # of the second document's artefact (facts.second_script)


@experiment
def initial(settings: Settings) -> dict[str, float]:
    """The first document's model as initialised: losses, step sizes, decays, exponents."""
    config = PRESETS["mamba_byte"].model
    losses, unit_losses, highest, largest, biases = [], [], [], [], []
    first_overflow = math.inf
    x = tokens(257, 2)
    for seed in range(settings.seed, settings.seed + settings.initial_seeds):
        torch.manual_seed(seed)
        model = ByteLM(config).eval()
        with torch.no_grad(), record_exponents(model, CHUNK) as exponents:
            losses.append(model.loss(x).item())
        highest.append(max(exponents.values()))
        for dt, layer_bias in _step_sizes(model, x[:, :-1]):
            largest.append(float(dt.max()))
            biases.append(F.softplus(layer_bias).detach())
            summed = dt.cumsum(1).amax((0, 2)) * config.d_state
            past = (summed > math.log(torch.finfo(torch.float32).max)).nonzero()
            if len(past):  # the published exponent stops one step short of cs
                first_overflow = min(first_overflow, float(past[0]) + 2)
        torch.manual_seed(seed)
        with torch.no_grad():
            unit_losses.append(ByteLM(replace(config, embed_std=1.0)).eval().loss(x).item())
    torch.manual_seed(settings.seed)
    mixer = ssm_layers(ByteLM(config))[0]
    A = -mixer.A_log.detach().exp()
    bias = torch.cat(biases)
    return {
        "loss": float(np.mean(losses)), "loss_low": min(losses), "loss_high": max(losses),
        "unit_loss": float(np.mean(unit_losses)),
        "bias_low": float(bias.min()), "bias_high": float(bias.max()),
        "bias_median": float(bias.median()), "bias_mean": float(bias.mean()),
        "dt_high": max(largest), "exponent": max(highest),
        "whole_overflows_at": first_overflow,
        "A_low": float(A.min()), "A_high": float(A.max()),
        "A_is_range": float(torch.allclose(A[0], -torch.arange(1.0, config.d_state + 1))),
    }


def _step_sizes(model: ByteLM, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Step sizes (B, L, D) and biases of every SSM layer."""
    biases = [mixer.dt_proj.bias for mixer in ssm_layers(model)]
    return list(zip(step_sizes(model, x), biases, strict=True))


def _fox(
    form: str, settings: Settings, lr: float = 3e-4,
    change: Callable[[ByteLM], None] = lambda model: None,
) -> dict[str, float]:
    """80 steps on the repeated sentence; ``accuracy`` is greedy, over one pass of characters."""
    recipe = TrainConfig(context=48, batch_size=settings.fox_batch, n_steps=FOX_STEPS, lr=lr,
                         precision="fp32", allow_study_form=True, seed=settings.seed)
    torch.manual_seed(settings.seed)
    model = ByteLM(replace(PRESETS["mamba_byte"].model, scan_form=form))
    change(model)
    data = np.frombuffer((FOX * 200).encode(), dtype=np.uint8)
    losses: list[float] = []
    accuracy_then, steps_then = math.nan, math.inf
    step = text_step(model, data, recipe)

    def look(done: int) -> None:
        nonlocal accuracy_then, steps_then
        losses.append(step.read().loss)
        if accuracy_then != accuracy_then and losses[-1] <= 3.97:
            accuracy_then = score(model, (FOX * 8).encode()).char_accuracy
            steps_then = done

    optimise(step, partial(schedule, config=recipe), FOX_STEPS, after=look)
    text = torch.tensor([list((FOX * 6).encode())])
    with torch.no_grad(), record_exponents(model, CHUNK) as exponents:
        parallel = model.loss(text).item()
    exact = ByteLM(replace(model.config, scan_form="auto"))
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        streamed = exact.loss(text).item()
    return {
        "first_loss": losses[0], "last_loss": float(np.mean(losses[-3:])),
        "accuracy_at_their_loss": accuracy_then, "steps_to_their_loss": steps_then,
        "accuracy": score(exact, (FOX * 8).encode()).char_accuracy,
        "exponent": max(exponents.values()), "parallel_loss": parallel, "streamed_loss": streamed,
        "dt_high": max(float(dt.max()) for dt, _ in _step_sizes(model, text)),
    }


@experiment
def fox(settings: Settings) -> dict[str, float]:
    """The sanity check with the model's own recurrence."""
    return _fox("auto", settings)


@experiment
def fox_published(settings: Settings) -> dict[str, float]:
    """The same with the published formula, which computes another recurrence."""
    return _fox("document_chunked", settings)


@experiment
def fox_fast(settings: Settings) -> dict[str, float]:
    """The same at ten times the learning rate: how far training can move the exponents."""
    return _fox("auto", settings, lr=3e-3)


def drop_scans(model: ByteLM) -> None:
    """Leave y = D x of every scan: C is held at zero, so that no state is read."""
    for mixer in ssm_layers(model):
        rows = torch.ones_like(mixer.x_proj.weight)
        rows[-mixer.A_log.shape[1]:] = 0
        with torch.no_grad():
            mixer.x_proj.weight.mul_(rows)
        mixer.x_proj.weight.register_hook(lambda grad, rows=rows: grad * rows)


@experiment
def fox_no_scan(settings: Settings) -> dict[str, float]:
    """The same without a scan: what is left of a block is a convolution over four and a gate."""
    return _fox("auto", settings, change=drop_scans)


@experiment
def fox_text(settings: Settings) -> dict[str, float]:
    """The repeated sentence itself: its entropy, and the share of next bytes that k before name."""
    text = np.frombuffer((FOX * 200).encode(), dtype=np.uint8).astype(np.int64)
    share = np.bincount(text) / len(text)
    share = share[share > 0]
    found = {"entropy": float(-(share * np.log(share)).sum()), "uniform": math.log(len(share))}
    for k in (1, 2):
        pairs, n = np.unique(_contexts(text, k) * 256 + text[k:], return_counts=True)
        best: dict[int, int] = {}
        for context, times in zip((pairs // 256).tolist(), n.tolist(), strict=True):
            best[context] = max(best.get(context, 0), times)
        found[f"accuracy_{k}"] = sum(best.values()) / (len(text) - k)
    return found


@experiment
def smoke(settings: Settings) -> dict[str, float]:
    """Smoke mode on 485 bytes: does it train, how long does it take, what does it catch?"""
    text = (TEXT * 2)[:485]
    data = np.frombuffer(text, dtype=np.uint8)
    model, recipe = smoke_configs(ModelConfig(), len(data))
    began = time.perf_counter()
    with scratch_dir() as folder, redirect_stdout(io.StringIO()):
        corpus = Corpus("tiny", "485 bytes", data, data[:100], data[:100])
        result = train(model, recipe, corpus, folder / "run", evaluate_bytes=100)
    seconds = time.perf_counter() - began

    def passes(form: str) -> float:
        torch.manual_seed(settings.seed)
        try:
            smoke_check(ByteLM(replace(model, scan_form=form)), data)
        except UserError:
            return 0.0
        return 1.0

    return {
        "steps": result["steps"], "seconds": seconds, "context": recipe.context,
        "batch": recipe.batch_size, "n_parameters": result["n_parameters"],
        "published_passes_check": passes("document_chunked"), "exact_passes_check": passes("auto"),
    }


@experiment
def mixers(settings: Settings) -> dict[str, float]:
    """Milliseconds of one layer forward and backward, 256 bytes, width 128: median of 5."""
    config = replace(PRESETS["mamba_byte"].model, d_model=128, n_head=4, n_kv_head=4)
    x = torch.randn(1, 256, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kinds: dict[str, nn.Module] = {"attention": AttentionMixer(config)}
    for name, form in (("loop", "recurrent"), ("published", "document_chunked"), ("auto", "auto")):
        kinds[name] = MambaMixer(replace(config, scan_form=form))

    def once(mixer: nn.Module) -> float:
        return seconds_of(lambda: mixer(x, None)[0].sum().backward(), "cpu")

    took = in_turns({name: partial(once, mixer) for name, mixer in kinds.items()}, 6)
    return {name: 1e3 * quartiles(t[1:])[1] for name, t in took.items()}  # the first warms up


@experiment
def second_steps(settings: Settings) -> dict[str, float]:
    """Held-out bits per byte of a small 1:1 hybrid with the second document's choices."""
    corpus = load_corpus("stdlib")
    base = replace(PRESETS["mamba_byte"].model, d_model=48, n_layer=2, n_head=4, n_kv_head=4,
                   layer_pattern="MA", norm="rms", qk_norm=True, mlp_ratio=2.0, logit_softcap=30.0)
    held_out = sample_windows(corpus.valid, 128, 16, settings.seed, 0)
    variant = get_variant("published")
    recipe = TrainConfig(context=128, batch_size=8, n_steps=250, lr=3e-3, precision="fp32",
                         seed=settings.seed)
    model = variants.build(base, variant, settings.seed)
    found = {}

    @torch.no_grad()
    def look(done: int) -> None:
        if done in SECOND_STOPS:
            found[f"bits_{done}"] = model.loss(held_out).item() / math.log(2)

    variants.train_variant(model, variant, recipe, text_batches(corpus.train, recipe, "cpu"),
                           after=look)
    return found


@experiment
def artefact(settings: Settings) -> dict[str, float]:
    """Bytes a parameter in the second document's artefact: int8 rows under zlib, of one layer of
    each kind, untrained and after five steps. A row's scale is at least 1/127 in its script, so
    small weights take few of the 256 values and compress well; growing ones do so less."""
    config = replace(get_preset("hybrid_3_1").model, vocab_size=1024, layer_pattern="MA",
                     n_layer=2)
    variant = get_variant("published")
    model = variants.build(config, variant, settings.seed)
    corpus = load_corpus("stdlib")
    recipe = TrainConfig(context=64, batch_size=1, n_steps=5, lr=3e-3, precision="fp32",
                         seed=settings.seed)
    untrained = _packed(model)
    variants.train_variant(model, variant, recipe, text_batches(corpus.train, recipe, "cpu"))
    return {"untrained": untrained, "after_5": _packed(model)}


def _packed(model: nn.Module) -> float:
    """Compressed bytes for each entry of a model's matrices."""
    raw, packed = 0, 0
    for parameter in model.parameters():
        weights = parameter.detach().float()
        if weights.ndim == 2:
            scale = (weights.abs().amax(1, keepdim=True) / 127).clamp_min(1 / 127)
            rows = torch.round(weights / scale).to(torch.int8).numpy().tobytes()
            raw, packed = raw + len(rows), packed + len(zlib.compress(rows, ZLIB_LEVEL))
    return packed / raw


@experiment
def counts(settings: Settings) -> dict[str, float]:
    """Bits per byte and greedy accuracy from the k bytes before, k = 0..5, on held-out prose."""
    corpus = load_corpus("stdlib")
    train_bytes = np.asarray(corpus.train[:1_000_000], dtype=np.int64)
    test = np.asarray(corpus.valid[:20_000], dtype=np.int64)
    found: dict[str, float] = {}
    backoff = np.full(len(test), int(np.bincount(train_bytes).argmax()))
    for k in range(6):
        keys, places = _contexts(train_bytes, k), _contexts(test, k)
        pairs, n = np.unique(keys * 256 + train_bytes[k:], return_counts=True)
        context = pairs // 256
        if k < 2:  # add-one bits of the low orders
            size = np.bincount(keys, minlength=256**k)
            hit = np.zeros(256 ** (k + 1))
            hit[pairs] = n
            p = (hit[places * 256 + test[k:]] + 1) / (size[places] + 256)
            found[f"bits_{k}"] = float(-np.log2(p).mean())
        order = np.lexsort((n, context))  # the last of each context is its most frequent byte
        last = np.append(context[order][1:] != context[order][:-1], True)
        best = dict(zip(context[order][last].tolist(), (pairs % 256)[order][last].tolist(),
                        strict=True))
        backoff[k:] = [best.get(c, b)
                       for c, b in zip(places.tolist(), backoff[k:].tolist(), strict=True)]
        found[f"accuracy_{k}"] = float((backoff[k:] == test[k:]).mean())
    return found


def _contexts(data: np.ndarray, k: int) -> np.ndarray:
    """The k bytes before each position from k on, as one integer."""
    code = np.zeros(len(data) - k, dtype=np.int64)
    for i in range(k):
        code = code * 256 + data[i:len(data) - k + i]
    return code


@experiment
def crashed(settings: Settings) -> dict[str, float]:
    """One training step of the two ablations that crashed, at their depth and a small width."""
    found = {}
    for name in ("ssm_2", "ssm_3"):
        config = replace(get_preset(name).model, d_model=64)
        torch.manual_seed(settings.seed)
        model = ByteLM(config)
        recipe = TrainConfig(context=64, batch_size=1, n_steps=2, precision="fp32")
        loss, norm, _ = train_step(model, make_optimizer(model, recipe), tokens(65), recipe, 0)
        found[name] = float(math.isfinite(loss) and math.isfinite(norm))
    return found
