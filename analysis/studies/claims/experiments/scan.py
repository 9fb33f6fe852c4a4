"""Small experiments on the scan itself: formula, overflow, gradients, kept bytes, operations.

Each takes a second or less on one CPU core and is deterministic for a seed. Sizes are small where
size does not matter, and the first document's where it does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.studies.claims.lab import Settings, experiment
from mambabyte.config import PRESETS
from mambabyte.model import ByteLM, MambaMixer, mixers
from mambabyte.ops import selective_scan
from mambabyte.ops.compare import relative_rms

CHUNK = 32  # the first document's SCAN_CHUNK
TEXT = (
    b"A selective state-space layer reads a text byte by byte and keeps a small state in every "
    b"channel. At each byte it forgets a part of the state, adds a part of the input and reads the "
    b"result. What it forgets, adds and reads is computed from the text itself; a fixed filter "
    b"would treat a comma as it treats a name. 1,057,152 parameters learn these three choices. "
)


def tokens(length: int, batch: int = 1) -> Tensor:
    """Windows of varied prose, (batch, length)."""
    text = TEXT * (length // len(TEXT) + 2)
    return torch.tensor([list(text[37 * i:37 * i + length]) for i in range(batch)])


def scan_inputs(
    length: int, channels: int = 8, states: int = 16, seed: int = 0,
    dtype: torch.dtype = torch.float32, delta: float | None = None,
) -> list[Tensor]:
    """u, delta, A, B, C; delta log-uniform in [1e-3, 1e-1] as at initialisation, or constant."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(1, length, channels, generator=g, dtype=torch.float64)
    dt = 10 ** (torch.rand(1, length, channels, generator=g, dtype=torch.float64) * 2 - 3)
    if delta is not None:
        dt = torch.full_like(dt, delta)
    A = -torch.arange(1.0, states + 1, dtype=torch.float64).repeat(channels, 1)
    B, C = (torch.randn(1, length, states, generator=g, dtype=torch.float64) for _ in "BC")
    return [t.to(dtype).requires_grad_() for t in (u, dt, A, B, C)]


@experiment
def scan_step(settings: Settings) -> dict[str, float]:
    """The whole model, length 80: the published scan in parallel against one step at a time."""
    found: dict[str, float] = {"chunks": math.ceil(80 / CHUNK)}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        torch.manual_seed(settings.seed)
        config = PRESETS["mamba_byte"].model
        published = ByteLM(replace(config, scan_form="document_chunked")).to(dtype).eval()
        models = {
            form: ByteLM(replace(config, scan_form=form)).to(dtype).eval()
            for form in ("recurrent", "corrected_cumsum")}
        x = tokens(80)
        with torch.no_grad():
            for model in models.values():
                model.load_state_dict(published.state_dict())
            state, logits = None, []
            for t in range(80):
                y, state = models["recurrent"](x[:, t:t + 1], state)
                logits.append(y)
            step = torch.cat(logits, 1)
            parallel, _ = published(x)
            corrected, _ = models["corrected_cumsum"](x)
        found[f"published_{bits}"] = relative_rms(parallel, step)
        found[f"corrected_{bits}"] = relative_rms(corrected, step)
        p, q = parallel.softmax(-1), step.softmax(-1)
        found[f"probability_{bits}"] = float((p - q).abs().max() / q.max())
    return found


@experiment
def formula(settings: Settings) -> dict[str, float]:
    """What the published formulas compute, in float64, against the two recurrences."""
    inputs = [t.detach() for t in scan_inputs(30, dtype=torch.float64, seed=settings.seed)]
    u, delta, A, B, C = inputs
    y, _ = selective_scan(*inputs, form="recurrent")
    whole, _ = selective_scan(*inputs, form="document_cumsum")
    chunked, _ = selective_scan(*inputs, form="document_chunked", chunk_size=8)
    early = torch.zeros(1, u.shape[2], A.shape[1], dtype=torch.float64)  # a_t (h_{t-1} + b_t)
    out = []
    for t in range(u.shape[1]):
        b = (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        early = torch.exp(delta[:, t, :, None] * A) * (early + b)
        out.append((early * C[:, t, None]).sum(-1))
    return {
        "whole_to_definition": relative_rms(whole, y),
        "whole_to_early_decay": relative_rms(whole, torch.stack(out, 1)),
        "chunked_to_whole": relative_rms(chunked, whole),
    }


@experiment
def overflow(settings: Settings) -> dict[str, float]:
    """Where the published form leaves float32, and how, at constant step size."""
    found: dict[str, float] = {"log_max": math.log(torch.finfo(torch.float32).max)}
    for fastest in (8, 16):
        inputs = [t.detach() for t in scan_inputs(160, 2, fastest, settings.seed, delta=0.1)]
        y, _ = selective_scan(*inputs, form="document_cumsum")
        bad = (~torch.isfinite(y)).any(-1).flatten().nonzero()
        found[f"whole_fails_at_{fastest}"] = float(bad[0] + 1) if len(bad) else math.inf
    # One chunk of 32 steps at rising decay: the smallest at which the output is not finite, and
    # exp(cs) there; then the smallest at which exp(cs) is 0.
    for decay in torch.arange(2.0, 4.0, 0.01).tolist():
        inputs = [t.detach() for t in scan_inputs(CHUNK, 2, 1, settings.seed, delta=decay)]
        y, _ = selective_scan(*inputs, form="document_chunked", chunk_size=CHUNK)
        if not torch.isfinite(y).all() and "chunk_fails_at_decay" not in found:
            stable, _ = selective_scan(*inputs, form="chunked", chunk_size=CHUNK)
            exact, _ = selective_scan(*(t.double() for t in inputs), form="recurrent")
            found |= {
                "chunk_fails_at_decay": decay, "is_nan": float(torch.isnan(y).any()),
                "exp_cs_there": float(torch.exp(torch.tensor(-CHUNK * decay))),
                "stable_error_there": relative_rms(stable, exact),
            }
        if float(torch.exp(torch.tensor(-CHUNK * decay))) == 0.0:
            found["exp_cs_zero_at_decay"] = decay
            break
    found.setdefault("chunk_fails_at_decay", math.inf)
    return found


@experiment
def gradient(settings: Settings) -> dict[str, float]:
    """Gradient of the last chunk's outputs with respect to the first chunk's inputs."""
    def first_to_last(form: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = scan_inputs(3 * CHUNK, seed=settings.seed, dtype=dtype)
        y, _ = selective_scan(*inputs, form=form, chunk_size=CHUNK)
        weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
        across = torch.autograd.grad(
            (y * weight)[:, 2 * CHUNK:].sum(), inputs[0], retain_graph=True)[0][:, :CHUNK]
        everything = torch.autograd.grad((y * weight).sum(), inputs)
        return across, torch.cat([g.flatten() / g.abs().max() for g in everything])

    exact, exact_all = first_to_last("recurrent", torch.float64)
    found = {}
    for form in ("document_chunked", "corrected_cumsum"):
        for bits, dtype in ((32, torch.float32), (64, torch.float64)):
            across, everything = first_to_last(form, dtype)
            found[f"{form}_across_{bits}"] = relative_rms(across, exact)
            found[f"{form}_all_{bits}"] = relative_rms(everything, exact_all)
            found[f"{form}_nonzero_{bits}"] = float((across != 0).float().mean())
    return found


class _Operations(TorchDispatchMode):
    """Counts tensor operations, and the elements they write and read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes_moved = 0
        self.allocated = 0
        self.dtypes: set[torch.dtype] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):
            return out  # a view moves nothing
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out])
                   if isinstance(t, Tensor)]
        reads = [t for t in args if isinstance(t, Tensor)]
        self.calls += 1
        self.names.add(func.overloadpacket.__name__)
        self.allocated += sum(t.numel() * t.element_size() for t in results)
        self.bytes_moved += sum(t.numel() * t.element_size() for t in (*results, *reads))
        if func.overloadpacket.__name__ in ("exp", "cumsum"):
            self.dtypes |= {t.dtype for t in results}
        return out


def _kept(
    length: int, channels: int, states: int, joined: bool = True, form: str = "document_as_coded"
) -> float:
    """Bytes with a state axis that autograd keeps of one published scan, each storage once."""
    inputs = scan_inputs(length, channels, states)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim > 2 and tensor.shape[-2:] == (channels, states):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        if joined:
            total = selective_scan(*inputs, form=form, chunk_size=CHUNK)[0].sum()
        else:  # every chunk's output is summed at once: nothing is concatenated
            u, delta, A, B, C = inputs
            state, total = None, torch.zeros(())
            for u_k, dt_k, B_k, C_k in zip(*(t.split(CHUNK, 1) for t in (u, delta, B, C)),
                                           strict=True):
                y, state = selective_scan(u_k, dt_k, A, B_k, C_k, initial_state=state, form=form,
                                          chunk_size=CHUNK)
                total = total + y.sum()
    total.sum().backward()  # the storages must stay alive until here to have one address each
    return float(sum(storages.values()))


def _backward(form: str, length: int, channels: int = 4, states: int = 4) -> _Operations:
    inputs = scan_inputs(length, channels, states)
    y, _ = selective_scan(*inputs, form=form, chunk_size=CHUNK)
    with _Operations() as counter:
        torch.autograd.grad(y.sum(), inputs)
    return counter


@experiment
def kept(settings: Settings) -> dict[str, float]:
    """What the published scan keeps for its backward pass, and how that grows."""
    length, channels, states = 8 * CHUNK, 4, 4
    full = length * channels * states * 4
    base = _kept(length, channels, states)
    return {
        "full_tensors": base / full,
        "full_tensors_ours": _kept(length, channels, states, form="document_chunked") / full,
        "without_concatenation": _kept(length, channels, states, joined=False) / base,
        "twice_length": _kept(2 * length, channels, states) / base,
        "twice_channels": _kept(length, 2 * channels, states) / base,
        "twice_states": _kept(length, channels, 2 * states) / base,
    }


@experiment
def operations(settings: Settings) -> dict[str, float]:
    """Operations of one published scan under bf16 autocast, the growth of its backward pass, and
    the bytes that it and a scan of a sequence that is cut once move for a state element."""
    mixer = _mixer("document_chunked")
    x = torch.randn(1, 1024, mixer.in_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16), _Operations() as forward, torch.no_grad():
        mixer(x, None)
    short, long = (_backward("document_chunked", n) for n in (1024, 4096))
    split = [_backward("corrected_cumsum", n) for n in (1024, 4096)]
    return {
        "calls": forward.calls,
        "in_float32": float(forward.dtypes == {torch.float32}),
        "built_from_both": float({"exp", "cumsum"} <= forward.names),
        # An operator of another library than torch would be a kernel after all.
        "all_of_torch": float(all(hasattr(torch.ops.aten, name) for name in forward.names)),
        "backward_exponent": math.log2(long.allocated / short.allocated) / 2,
        "split_exponent": math.log2(split[1].allocated / split[0].allocated) / 2,
        "bytes_per_element": _moved_per_element("document_chunked", backward=False),
        "bytes_published": _moved_per_element("document_chunked"),
        "bytes_cut_once": _moved_per_element("corrected_cumsum"),
        "loop_per_step": (_loop_calls(48) - _loop_calls(16)) / 32,
    }


def _loop_calls(length: int) -> int:
    """Operations of a layer, forward and backward, whose scan is a loop over ``length`` steps."""
    mixer = _mixer("recurrent")
    x = torch.randn(1, length, mixer.in_proj.in_features, requires_grad=True)
    with _Operations() as counter:
        mixer(x, None)[0].sum().backward()
    return counter.calls


def _mixer(form: str) -> MambaMixer:
    torch.manual_seed(0)
    config = replace(PRESETS["mamba_byte"].model, d_model=16, n_layer=1, scan_form=form)
    return mixers(ByteLM(config), MambaMixer)[0]


def _moved_per_element(form: str, backward: bool = True) -> float:
    """Bytes read and written per (b, t, d, n) by a scan over 1024 bytes."""
    inputs = scan_inputs(1024, 8, 16)
    if not backward:
        inputs = [t.detach() for t in inputs]
    with _Operations() as counter:
        y, _ = selective_scan(*inputs, form=form, chunk_size=CHUNK)
        if backward:
            torch.autograd.grad(y.sum(), inputs)
    return counter.bytes_moved / (1024 * 8 * 16)


@experiment
def streaming(settings: Settings) -> dict[str, float]:
    """The streaming state and the operations of one step after few and after many bytes."""
    torch.manual_seed(settings.seed)
    model = ByteLM(PRESETS["mamba_byte"].model).eval()
    found: dict[str, float] = {}
    with torch.inference_mode():
        for seen in (16, 512):
            _, state = model(tokens(seen))
            with _Operations() as counter:
                _, after = model(tokens(1), state)
            found[f"state_bytes_{seen}"] = sum(
                t.numel() * t.element_size() for layer in after for t in layer)
            found[f"bytes_moved_{seen}"] = counter.bytes_moved
        x = tokens(48)
        whole, _ = model(x)
        state, parts = None, []
        for t in range(48):
            y, state = model(x[:, t:t + 1], state)
            parts.append(y)
        found["calls_per_byte"] = len(parts) / 48
        found["step_error"] = relative_rms(torch.cat(parts, 1), whole)
        conv_state, ssm_state = state[0]
        found |= {"tail_inputs": conv_state.shape[1], "tail_channels": conv_state.shape[2],
                  "ssm_channels": ssm_state.shape[1], "ssm_states": ssm_state.shape[2]}
    return found


@experiment
def selectivity(settings: Settings) -> dict[str, float]:
    """How much dt, B and C vary over the bytes of a text, each relative to its mean size."""
    torch.manual_seed(settings.seed)
    model = ByteLM(PRESETS["mamba_byte"].model).eval()
    mixer = mixers(model, MambaMixer)[0]
    with torch.no_grad():
        x = model.blocks[0].norm(model.embedding(tokens(256)))
        _, delta, B, C, _, _ = mixer.scan_inputs(x, None)
        dt = torch.nn.functional.softplus(delta + mixer.dt_proj.bias)
    return {name: float(t.std(1).mean() / t.abs().mean())
            for name, t in (("dt", dt), ("B", B), ("C", C))}
