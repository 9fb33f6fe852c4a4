"""AdamW and Muon, which parameter goes where, and the rate of each group."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mambabyte.config import TrainConfig
from mambabyte.config.mixers import Role
from mambabyte.model.mixer import Mixer, named_mixers


class Optimizer(Protocol):
    """What a step asks of an optimizer; each group has ``lr`` and ``peak_lr`` (see set_rates)."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> object: ...


def roles(model: nn.Module) -> dict[str, Role]:
    """How an optimizer treats each parameter of a model, by name.

    "muon": the matrices inside the layers, which map activations to activations; AdamW takes them
    with weight decay where there is no Muon. "decay": AdamW with weight decay, always: embedding
    and head, whose rows are looked up or compared one by one, and what a mixer says, such as the
    taps of a convolution, where each channel has its own and there is nothing to orthogonalise.
    "free": AdamW without decay: biases, gains of norms, and what a mixer says.
    """
    found: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        inside = ".layers." in f".{name}" and parameter.ndim == 2
        found[name] = "free" if parameter.ndim < 2 else "muon" if inside else "decay"
    for prefix, mixer in named_mixers(model, Mixer).items():
        for name, parameter in mixer.named_parameters():
            found[f"{prefix}.{name}"] = mixer.role(name, parameter.ndim)
    return found


def make_optimizer(
    model: nn.Module, config: TrainConfig, on_device: bool = False
) -> MuonAdamW:
    """The optimizer of a recipe; every parameter is in exactly one group.

    Each group has ``peak_lr``: its rate where the schedule is 1. With ``on_device`` the rates are
    tensors beside the parameters, so that a captured step can be given others.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    of = roles(model)

    def group(parameters: list[Tensor], decay: float, lr: float, **more: Any) -> dict[str, Any]:
        rate = torch.tensor(
            lr, dtype=torch.float32, device=named[0][1].device) if on_device else lr
        return {"params": parameters, "weight_decay": decay, "lr": rate, "peak_lr": lr, **more}

    muon = config.optimizer == "muon"
    rates: dict[str, float | None] = {
        "embedding.weight": config.embed_lr, "head.weight": config.head_lr}
    scalar_lr = config.lr if config.scalar_lr is None else config.scalar_lr
    # By weight decay and rate; these first, which every recipe has.
    by_kind: dict[tuple[str, float], list[Tensor]] = {
        ("decay", config.lr): [], ("free", scalar_lr): []}
    by_muon: list[Tensor] = []
    for name, parameter in named:
        if muon and of[name] == "muon":
            by_muon.append(parameter)
        elif of[name] == "free":
            by_kind["free", scalar_lr].append(parameter)
        else:
            lr = rates.get(name)
            by_kind.setdefault(("decay", config.lr if lr is None else lr), []).append(parameter)
    rest = [group(parameters, config.weight_decay if kind == "decay" else 0.0, lr)
            for (kind, lr), parameters in by_kind.items()]
    if not muon:
        return MuonAdamW(rest, config.betas)
    decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
    first = group(by_muon, decay, config.muon_lr, muon=True, momentum=config.muon_momentum)
    if config.muon_momentum_steps:
        first |= {"first_momentum": config.muon_first_momentum,
                  "momentum_steps": config.muon_momentum_steps}
    return MuonAdamW([first, *rest], config.betas)


class MuonAdamW:
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) for the groups marked ``muon``, AdamW
    (Loshchilov and Hutter 2017, arXiv:1711.05101) for the others, as one optimizer: one state to
    save, one list of groups to schedule. A group has "params", "lr" and "weight_decay".

    No torch.optim.Optimizer: to make one imports torch's compiler, which takes as long as all else
    that a training on a CPU imports (docs/log/cpu.md). AdamW is torch's own fused kernel: one pass
    over each parameter, a quarter of the time on a CPU. It is given steps and rates as tensors on
    the device, so that a captured step can be replayed.

    Muon: the gradient goes into a momentum buffer, the Nesterov combination of the two is replaced
    by the nearest matrix with singular values near 1, and that, times lr and
    max(1, rows / columns)^0.5, is subtracted. Decay is decoupled. A group with "momentum_steps"
    raises its momentum to "momentum" from "first_momentum" over that many of its first steps, and
    has in "done" how many there were.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.param_groups = [{"muon": False, **group} for group in groups if group["params"]]
        for group in self.param_groups:
            if group.get("momentum_steps"):  # counted there, so that a captured step counts too
                group["done"] = torch.zeros(
                    (), dtype=torch.float32, device=group["params"][0].device)
        self.betas = betas
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(group, parameters)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's: the state by a parameter's number, and the groups."""
        number = {p: i for i, p in enumerate(self._parameters())}
        return {"state": {number[p]: values for p, values in self.state.items()},
                "param_groups": [{**group, "params": [number[p] for p in group["params"]]}
                                 for group in self.param_groups]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        parameters = self._parameters()
        for group, given in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in given.items() if k != "params"})
        self.state = {parameters[i]: {k: v.to(parameters[i].device) for k, v in values.items()}
                      for i, values in saved["state"].items()}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if p not in self.state:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                 "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        means, squares, steps = ([self.state[p][name] for p in parameters]
                                 for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters, [p.grad for p in parameters if p.grad is not None], means, squares, [],
            steps, lr=group["lr"],
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=group["weight_decay"],
            eps=1e-8, amsgrad=False, maximize=False)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        buffers = []
        for p in parameters:
            state = self.state.setdefault(p, {})
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffers.append(state["momentum"])
        grads = [p.grad for p in parameters if p.grad is not None]
        # lr may be a tensor on the device, so that a captured step can be given another.
        lr, beta = group["lr"], _momentum(group)
        fresh, old = 1 - beta, beta
        if isinstance(beta, Tensor):
            fresh, old = [fresh] * len(grads), [old] * len(grads)
        torch._foreach_lerp_(buffers, grads, fresh)
        updates = torch._foreach_lerp(grads, buffers, old)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, p in enumerate(parameters):
            by_shape[(min(p.shape), max(p.shape))].append(i)
        for indices in by_shape.values():
            _subtract([parameters[i] for i in indices], [updates[i] for i in indices], lr)


def _subtract(parameters: list[Tensor], updates: list[Tensor], lr: Any) -> None:
    """Move matrices of one shape, some of them transposed, against their orthogonal updates; a
    function of its own, so that one shape's stack is freed before the next one's is made."""
    tall = [p.shape[0] > p.shape[1] for p in parameters]
    stacked = torch.stack([u.mT if t else u for u, t in zip(updates, tall, strict=True)])
    for p, t, o in zip(parameters, tall, orthogonalise(stacked), strict=True):
        rows, columns = p.shape
        scale = max(1.0, rows / columns) ** 0.5
        p.sub_((o.mT if t else o) * (lr * scale))


def _momentum(group: dict[str, Any]) -> Any:
    """Of the next step: a number, or of a group that warms up a tensor on the device."""
    steps = group.get("momentum_steps", 0)
    if not steps:
        return group["momentum"]
    share = (group["done"] / steps).clamp(max=1.0)
    group["done"] += 1
    return group["first_momentum"] + share * (group["momentum"] - group["first_momentum"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Near-orthogonal matrices (n, rows, columns) with the singular vectors of the given ones.

    Five steps of a quintic Newton-Schulz iteration, in bf16 on a GPU and in float32 on a CPU, where
    products of bf16 can take tens of times as long. Its coefficients are chosen for its slope at 0:
    it brings singular values into about [0.7, 1.2], and not to 1 (Jordan 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Give every group this share of its peak rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(share * group["peak_lr"])
        else:
            group["lr"] = share * group["peak_lr"]
