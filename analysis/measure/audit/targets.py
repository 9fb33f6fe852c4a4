"""A function of any library, called by the signature of its kind.

The protocol for a function that none of the adapters knows: it takes the inputs of its kind by
their names in mambabyte.ops (``selective_scan``, ``ssd_scan``, ``gated_delta_rule``, and
``causal_conv`` with ``initial_state`` for its tail; attention q, k and v (B, L, H, width)), and
returns y or (y, state). What it does not name is not asked of it, or done around it: D, z, biases
and the softplus of step sizes. Documents in a row are asked of one that names ``document_starts``
(bool, B x L), ``seq_idx`` (int32, B x L, the number of each one) or ``cu_seqlens`` (int32,
cumulative lengths).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.audit.kinds import KINDS, Inputs, Kind, Outputs
from mambabyte.errors import UserError, nearest

Call = Callable[[Callable[..., Any], Inputs, Tensor | None], Any]
PACKED = ("document_starts", "seq_idx", "cu_seqlens")


@dataclass(frozen=True)
class Adapter:
    """How functions of one library are called; ``starts`` (B, L) says where documents begin."""

    kind: str
    call: Call
    # What they do not have: "initial_state", "state", "documents", "log_decay", "state gradient".
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """A function to audit."""

    name: str
    function: Callable[..., Any]
    kind: Kind
    adapter: Adapter

    def has(self, feature: str) -> bool:
        return feature not in self.adapter.lacks

    def taken(self, x: Inputs) -> Inputs:
        """The inputs that it has."""
        return {name: t for name, t in x.items() if self.has(name)}

    def __call__(self, x: Inputs, documents: tuple[int, ...] = ()) -> Outputs:
        stream = x[self.kind.streams[0]]
        starts = None
        if documents:
            starts = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
            starts[:, [sum(documents[:i]) for i in range(len(documents))]] = True
        found = self.adapter.call(self.function, x, starts)
        y, *rest = found if isinstance(found, tuple) else (found,)
        state = rest[0] if rest else None
        if not isinstance(y, Tensor) or not isinstance(state, Tensor | None):
            raise UserError(f"it returned {type(y).__name__} and {type(state).__name__}: expected "
                            "a tensor, or a tensor and a state that is one")
        return y, state if self.kind.has_state and self.has("state") else None


# --------------------------------------------------------------------------- the protocol


def _protocol(kind: str, function: Callable[..., Any]) -> Adapter:
    """The adapter of a function that says by its parameters what it has."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"{function} has no signature that can be read: give --adapter") from None
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def names(name: str) -> bool:
        return name in parameters or (any_name and name not in PACKED)

    packed = next((name for name in PACKED if name in parameters), None)
    taken = {"initial_state"} if KINDS[kind].has_state else set()
    taken |= {"log_decay"} & set(KINDS[kind].streams)
    lacks = {name for name in taken if not names(name)}
    softplus = {"scan": "delta_softplus", "ssd": "dt_softplus"}.get(kind)
    size, bias = ("delta", "delta_bias") if kind == "scan" else ("dt", "dt_bias")

    def call(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
        given: dict[str, Any] = dict(x)
        if softplus and names(softplus):
            given[softplus] = True
        if softplus and not names(bias):
            given[size] = given[size] + given.pop(bias)
        if softplus and not names(softplus):
            given[size] = F.softplus(given[size] + given.pop(bias, 0.0))
        around = {name: given.pop(name) for name in ("D", "z") if name in given
                  and not names(name)}
        if starts is not None and packed:
            given[packed] = _boundaries(starts)[packed]
        found = function(**given)
        if not around:
            return found
        y, *state = found if isinstance(found, tuple) else (found,)
        if "D" in around:
            y = y + (around["D"] if kind == "scan" else around["D"][:, None]) * x[
                "u" if kind == "scan" else "x"]
        y = y * F.silu(around["z"]) if "z" in around else y
        return (y, *state)

    return Adapter(kind, call, frozenset(lacks | (set() if packed else {"documents"})))


def _boundaries(starts: Tensor) -> dict[str, Tensor]:
    """Documents (B, L) as each library says them."""
    last = torch.tensor([starts.shape[1]], device=starts.device)
    ends = torch.cat([starts[0].nonzero()[:, 0], last])
    return {"document_starts": starts, "seq_idx": (starts.int().cumsum(1) - 1).int(),
            "cu_seqlens": ends.int()}


# ---------------------------------------------------------------------------- the libraries


def _time_last(x: Inputs, *names: str) -> list[Tensor | None]:
    return [x[name].transpose(1, 2) if name in x else None for name in names]


def _mamba_ssm_scan(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    u, delta, B, C, z = _time_last(x, "u", "delta", "B", "C", "z")
    y, state = function(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], True, True)
    return y.transpose(1, 2), state


def _mamba_ssm_ssd(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    more = {} if starts is None else {"seq_idx": _boundaries(starts)["seq_idx"]}
    return function(
        *(x[name] for name in ("x", "dt", "A", "B", "C")), chunk_size=64, D=x["D"],
        dt_bias=x["dt_bias"], initial_states=x.get("initial_state"), dt_softplus=True,
        return_final_states=True, **more)


def _fla_delta(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    gates = {"g": x["log_decay"]} if "log_decay" in x else {}
    more = {} if starts is None else {"cu_seqlens": _boundaries(starts)["cu_seqlens"].long()}
    return function(
        q=x["q"], k=x["k"], v=x["v"], beta=x["beta"], scale=1.0, output_final_state=True,
        initial_state=x.get("initial_state"), **gates, **more)


def _transformers_delta(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    q = x["q"] * x["q"].shape[-1] ** 0.5  # which it divides by
    return function(q, x["k"], x["v"], x["log_decay"], x["beta"], output_final_state=True,
                    initial_state=x.get("initial_state"))


def _pscan(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    dt = F.softplus(x["delta"] + x["delta_bias"])[..., None]
    states = function(torch.exp(dt * x["A"]), dt * x["B"][:, :, None] * x["u"][..., None])
    y = (states * x["C"][:, :, None]).sum(-1) + x["D"] * x["u"]
    return y * F.silu(x["z"]), states[:, -1]


def _causal_conv1d(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    (stream,) = _time_last(x, "x")
    return function(stream, x["weight"], x["bias"], activation="silu").transpose(1, 2)


def _our_conv(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    return function(x["x"], x["weight"], x["bias"], x.get("initial_state"), silu=True,
                    document_starts=starts)


def _torch_attention(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    return function(*(x[n].transpose(1, 2) for n in "qkv"), is_causal=True).transpose(1, 2)


def _flash_attention(function: Callable[..., Any], x: Inputs, starts: Tensor | None) -> Any:
    return function(x["q"], x["k"], x["v"], causal=True)


def _without(*features: str) -> frozenset[str]:
    return frozenset(features)


_NO_STATE_IN = _without("initial_state", "documents")
ADAPTERS = {
    # mamba-ssm says of its last state that the gradient through it is not considered.
    "mamba_ssm.scan": Adapter("scan", _mamba_ssm_scan, _NO_STATE_IN | {"state gradient"}),
    "transformers.scan": Adapter("scan", _mamba_ssm_scan, _NO_STATE_IN),
    "mamba_ssm.ssd": Adapter("ssd", _mamba_ssm_ssd),
    "transformers.ssd": Adapter("ssd", _mamba_ssm_ssd, _without("documents")),
    "mambapy.pscan": Adapter("scan", _pscan, _NO_STATE_IN),
    "fla.gated_delta": Adapter("delta", _fla_delta),
    "fla.kda": Adapter("kda", _fla_delta),
    "fla.delta": Adapter("delta", _fla_delta, _without("log_decay")),
    "transformers.delta": Adapter("delta", _transformers_delta, _without("documents")),
    "causal_conv1d": Adapter("conv", _causal_conv1d,
                             _without("initial_state", "state", "documents")),
    "mambabyte.conv": Adapter("conv", _our_conv),
    "torch.attention": Adapter("attention", _torch_attention, _without("documents")),
    "flash_attention": Adapter("attention", _flash_attention, _without("documents")),
}
# By the function's name, so that a fork of a library is known as well; else by the protocol.
BY_NAME = {
    "selective_scan_fn": "mamba_ssm.scan", "selective_scan_ref": "transformers.scan",
    "mamba_selective_scan": "transformers.scan", "mamba_chunk_scan_combined": "mamba_ssm.ssd",
    "mamba2_chunk_scan": "transformers.ssd", "pscan": "mambapy.pscan",
    "chunk_gated_delta_rule": "fla.gated_delta",
    "fused_recurrent_gated_delta_rule": "fla.gated_delta", "chunk_kda": "fla.kda",
    "fused_recurrent_kda": "fla.kda", "chunk_delta_rule": "fla.delta",
    "fused_recurrent_delta_rule": "fla.delta",
    "torch_chunk_gated_delta_rule": "transformers.delta",
    "torch_recurrent_gated_delta_rule": "transformers.delta",
    "causal_conv1d_fn": "causal_conv1d", "causal_conv": "mambabyte.conv",
    "scaled_dot_product_attention": "torch.attention", "flash_attn_func": "flash_attention",
}
KIND_BY_NAME = {"selective_scan": "scan", "ssd_scan": "ssd", "gated_delta_rule": "delta"}


def find_target(name: str, kind: str | None = None, adapter: str | None = None) -> Target:
    """The function ``name``, "module:function" or "file.py:function", and how it is called.

    ``kind`` and ``adapter`` are what its name does not say. Raises UserError where there is no such
    function, or nobody knows its kind.
    """
    function = _import(name)
    last = name.rpartition(":")[2].rpartition(".")[2]
    if adapter is not None and adapter not in ADAPTERS:
        raise UserError(f"there is no adapter {adapter!r}{nearest(adapter, ADAPTERS)}: choose one "
                        f"of {', '.join(ADAPTERS)}")
    if adapter is None and kind is None:
        adapter, kind = BY_NAME.get(last), KIND_BY_NAME.get(last)
    if adapter is not None:
        found = ADAPTERS[adapter]
        if kind not in (None, found.kind):
            raise UserError(f"adapter {adapter} is of kind {found.kind}, not {kind}: give one")
        return Target(name, function, KINDS[found.kind], found)
    if kind is None:
        raise UserError(f"what {name} is does not follow from its name: give --kind, one of "
                        f"{', '.join(KINDS)}, for a function of the protocol, or --adapter, one of "
                        f"{', '.join(ADAPTERS)}")
    return Target(name, function, KINDS[kind], _protocol(kind, function))


def _import(name: str) -> Callable[..., Any]:
    place, colon, path = name.rpartition(":")
    if not colon or not place or not path:
        raise UserError(f"target {name!r} names no function: expected module:function or "
                        "file.py:function, such as mambabyte.ops:selective_scan")
    try:
        found = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever another's module does when imported
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{place} cannot be imported ({type(error).__name__}: {first}): install "
                        "it, or run this where it is") from None
    for part in path.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{place} has no {path}{nearest(part, known)}: name one of its "
                            "functions")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}: expected a function")
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    module_name = f"audited_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where its classes look for it
    spec.loader.exec_module(module)
    return module
