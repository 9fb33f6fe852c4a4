"""Training steps of several systems in one run, and where the time of each goes.

Every system takes the same windows; rounds are interleaved, so a slow minute meets all of them.
The parts are self times by torch's profiler, summed over what an operator's or a kernel's name
says it belongs to, so that they add up to the step. On CUDA they are the times of kernels, inside
a captured step too, and what the step takes beyond them is a part of its own: the gaps.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from analysis.measure.bench.peers import kernel_name
from analysis.measure.timing import in_turns, profiling, quartiles, release, seconds_of
from analysis.theory.matching import GPU_WIDTHS, match_parameters, match_patterns
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.mixers import MambaSpec, Role, spec_of, uses_window
from mambabyte.energy import EnergyMeter
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.model.mixer import Mixer, mixer_of, named_mixers
from mambabyte.train import train_step
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer

Way = Literal["eager", "graph", "fused", "compile"]
_STEPS = 1 << 14  # starts drawn for a captured step: more than a benchmark ever takes

# The first pattern that is found in a name of an operator (CPU) or a kernel (CUDA) names its part.
PARTS: tuple[tuple[str, str], ...] = (
    ("attention", r"flex_attention"),
    ("norms", r"^triton_.*norm"),
    ("other compiled code", r"^triton_"),
    ("scan", r"selective_scan|_Scan|(tile|any)_(forward|backward|adjoint|carry|sums)"),
    ("convolution", r"conv|_Conv"),
    ("attention",
     r"scaled_dot_product|sdpa|flash|fmha|efficient_attention|fort_native|rotary_(for|back)ward"),
    ("matrix products",
     r"::(mm|addmm|bmm|baddbmm|matmul|linear)$|MmBackward|gemm|nvjet|cutlass|cublas|splitK"),
    ("optimizer", r"Optimizer|_foreach|_fused_adam|multi_tensor|lerp|addcdiv|addcmul|::sqrt|::div"),
    ("loss", r"softmax|nll_loss|cross_entropy|loss_(forward|mean|backward)"),
    ("norms", r"norm|GammaBeta|column_sums"),
    ("embedding's gradient", r"embedding|radix_sort|[Ss]catter"),
    ("activations", r"silu|gelu|relu|tanh|sigmoid|softplus|activation_"),
    ("copies", r"copy|cat$|contiguous|_to_copy|clone|fill_|zero|Memset|Memcpy|FillFunctor"),
)
OTHER, GAPS = "everything else", "between kernels"
PROFILED_STEPS = 3
TEXT_BYTES = 1 << 20  # of which windows are drawn; more where a step has more
PUBLISHED = "{} by mamba-ssm"  # a system with that project's modules


def part_of(name: str) -> str:
    """The part of a step that an operator or kernel belongs to, by its name.

    What torch.compile fused carries the names of all it was made of; with a norm among them it
    counts as the norm's.
    """
    return next((part for part, pattern in PARTS if re.search(pattern, name)), OTHER)


def equal_sized(config: ModelConfig, patterns: tuple[str, ...]) -> dict[str, ModelConfig]:
    """Each pattern at the parameters of ``config``, whose own pattern comes first.

    Others get what their kernels are fastest at: heads 64 wide where they divide d_model, and an
    MLP whose width is a GPU's, so that the parameters agree to a percent or so.
    """
    heads = config.d_model // 64 if config.d_model % 64 == 0 else config.n_head
    base = replace(config, n_head=heads, n_kv_head=heads)
    wanted = tuple(dict.fromkeys((config.layer_pattern, *patterns)))
    matched = match_patterns(base, wanted, target=config.n_parameters, multiple=GPU_WIDTHS)
    return {p: m.config for p, m in matched.items()} | {config.layer_pattern: config}


def rivals(
    config: ModelConfig, patterns: tuple[str, ...], context: int
) -> dict[str, ModelConfig]:
    """``equal_sized`` with attention at its best: what a step on windows of ``context`` compares.

    Attention sees the whole context, for which it has its fastest kernel. A pattern of attention
    alone stands in both matchings: at the same depth, and as the field matches it, half the layers
    with wider MLPs (two Mamba blocks are one attention layer with its MLP; Gu & Dao 2023,
    arXiv:2312.00752, section 3.4). Where the configuration's own window is shorter than the
    context, the systems that have it stand there with it too.
    """
    whole = replace(config, attention_window=max(config.attention_window, context))
    systems = equal_sized(whole, patterns)
    for pattern in patterns:
        if all(spec_of(letter).uses_window for letter in pattern) and config.n_layer > 1:
            half = replace(systems[pattern], n_layer=config.n_layer // 2)
            systems[f"{pattern}, half the layers"] = match_parameters(
                half, config.n_parameters, multiple=GPU_WIDTHS).config
    if config.attention_window < context:
        systems |= {f"{name}, window {config.attention_window}":
                    replace(system, attention_window=config.attention_window)
                    for name, system in systems.items() if uses_window(system.layers)}
    return systems


class _PublishedMixer(Mixer, MambaSpec):
    """mamba-ssm's own module in place of ours, with our weights. Training from the first byte."""

    def __init__(self, mixer: MambaMixer, config: ModelConfig) -> None:
        super().__init__(config)
        from mamba_ssm import Mamba

        self.mamba = Mamba(config.d_model, d_state=config.d_state, d_conv=config.d_conv,
                           expand=config.expand, dt_rank=config.dt_rank_value)
        self.mamba.load_state_dict(mixer.state_dict())

    @torch.compiler.disable  # its kernels are no operators that torch could trace
    def forward(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        return self.mamba(x), state

    @classmethod
    def role(cls, name: str, dimensions: int) -> Role:
        return super().role(name.removeprefix("mamba."), dimensions)


def use_published_mixers(model: ByteLM) -> None:
    """Swap every SSM mixer of a model for mamba-ssm's module, which runs on GPUs alone."""
    if importlib.util.find_spec("mamba_ssm") is None:
        raise UserError("mamba_ssm is not installed: leave --peers out, or install it first")
    for name, mixer in named_mixers(model, MambaMixer).items():
        model.set_submodule(name, _PublishedMixer(mixer, model.config))


def mixers_as_run(config: ModelConfig, context: int, device: str, compiled: bool) -> str:
    """How a step of ``context`` bytes runs each kind of mixer that a model has."""
    kind = torch.device(device).type
    names = [mixer_of(letter).kernel_name(config, context, kind, compiled)
             for letter in config.layers]
    return "; ".join(dict.fromkeys(names))


def bench_steps(
    configs: dict[str, ModelConfig], recipe: TrainConfig, device: str, way: Way, rounds: int = 7,
    seconds: float = 0.0, say: Callable[[str], None] = lambda line: None, published: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(steps, parts). With ``published`` the first system is also timed with mamba-ssm's modules.

    steps: as of ``time_steps``.
    parts: (system, part, ms, share, kernel), largest first; ``kernel`` is the one that took most of
    it, as the profiler names it. On the CPU the parts are scaled to the clock's total, which takes
    out what the profiler costs; ``ms`` of a part on CUDA is the kernels' own. An interruption keeps
    what was timed before it, without parts; KeyboardInterrupt where that is nothing.
    """
    changes: dict[str, Callable[[ByteLM], None]] = {}
    if published:
        first = next(iter(configs))
        configs = configs | {PUBLISHED.format(first): configs[first]}
        changes[PUBLISHED.format(first)] = use_published_mixers
    frame, steppers = time_steps(configs, recipe, device, way, rounds, seconds, say, changes)
    ms = dict(zip(frame["system"], frame["ms"], strict=True))
    parts = [row for name, step in steppers.items() for row in _parts(name, step, device, ms[name])]
    return frame, pd.DataFrame(parts, columns=["system", "part", "ms", "share", "kernel"])


def time_steps(
    configs: Mapping[str, ModelConfig], recipe: TrainConfig, device: str, way: Way, rounds: int = 7,
    seconds: float = 0.0, say: Callable[[str], None] = lambda line: None,
    changes: Mapping[str, Callable[[ByteLM], None]] | None = None,
) -> tuple[pd.DataFrame, dict[str, Callable[[], Any]]]:
    """Time a step of every system, in turns; and a call that takes one more, by system.

    ``seconds`` is how long each system runs in all rounds together; 0 is one second on the CPU,
    and one second a round on a GPU, whose energy counter moves only every tenth of a second.
    ``changes`` are done to the new models of the systems that they name.

    A row a system, with ms (median over rounds and quartiles), bytes/s, gross joules per megabyte
    (nan where the machine does not count them), peak memory (nan on the CPU) and how its mixers
    run. An interruption keeps what was timed before it, and gives no calls; KeyboardInterrupt where
    that is nothing.
    """
    if way != "eager" and not device.startswith("cuda"):
        raise UserError(f"--way {way} captures CUDA graphs: use eager on {device}")
    size, changes = recipe.batch_size * recipe.context, changes or {}
    seconds = seconds or (float(rounds) if device.startswith("cuda") else 1.0)
    steppers: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        steppers[name], peak = training_step(config, recipe, device, way, changes.get(name))
        rows.append({"system": name, "parameters": config.n_parameters, "peak_bytes": peak,
                     "mixers": "scan, mamba-ssm" if name in changes
                     else mixers_as_run(config, recipe.context, device, way == "compile")})
        say(f"{name}: {config.n_parameters:,} parameters, ready")
    joules = dict.fromkeys(configs, 0.0)
    counts = {name: max(1, round(seconds / rounds / seconds_of(stepper, device, 2)))
              for name, stepper in steppers.items()}

    took: dict[str, list[float]] = {name: [] for name in configs}

    def once(name: str) -> float:
        meter = EnergyMeter(device)
        seconds = seconds_of(steppers[name], device, counts[name])
        gross = meter.read().gross_joules
        took[name].append(seconds)
        joules[name] += float("nan") if gross is None else gross
        return seconds

    try:
        in_turns({name: partial(once, name) for name in steppers}, rounds,
                 round_done=lambda number: say(f"round {number} of {rounds}"))
    except KeyboardInterrupt:
        rows, steppers = [row for row in rows if took[row["system"]]], {}
        if not rows:
            raise
        say(f"interrupted: the timings of before are kept, of {len(rows)} systems, without parts")
    for row in rows:
        name = row["system"]
        low, median, high = quartiles(took[name])
        row |= {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high,
                "bytes_per_second": size / median,
                "joules_per_megabyte": joules[name] / (len(took[name]) * counts[name] * size) * 1e6}
        row["times_first"] = row["ms"] / rows[0]["ms"]
    return pd.DataFrame(rows), steppers


def step_values(frame: pd.DataFrame) -> dict[str, tuple[float, str, str]]:
    """Milliseconds a step, joules per megabyte and peak memory of every system: name -> (value,
    unit, about)."""
    values = {}
    for row in frame.to_dict("records"):
        name = re.sub(r"[ ,]+", "_", row["system"].lower())
        values[f"ms_{name}"] = (row["ms"], "ms", f"a step of {row['system']}, median")
        if row["joules_per_megabyte"] == row["joules_per_megabyte"]:  # not nan
            values[f"joules_{name}"] = (
                row["joules_per_megabyte"], "J/MB", f"training {row['system']}, gross")
        if row["peak_bytes"] == row["peak_bytes"]:
            values[f"peak_{name}"] = (
                round(row["peak_bytes"] / 2**20), "MiB", f"most memory of {row['system']}")
    return values


def training_step(
    config: ModelConfig, recipe: TrainConfig, device: str, way: Way,
    change: Callable[[ByteLM], None] | None = None,
) -> tuple[Callable[[], Any], float]:
    """A call that takes one step on random bytes, warmed up, and its peak memory in bytes (nan on
    the CPU). A step that is not eager is captured: it runs on a GPU alone. ``change`` is done to
    the new model first."""
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.init()  # else there are no statistics to reset
        release(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    model = ByteLM(config)
    if change is not None:
        change(model)
    model.to(device).train()
    recipe = replace(recipe, step=way, n_steps=_STEPS, first_context=0, first_batch_size=0)
    optimizer = make_optimizer(model, recipe, on_device=way != "eager")
    size = max(TEXT_BYTES, recipe.batch_size * (recipe.context + 1))
    text = torch.randint(0, 256, (size,), dtype=torch.uint8)
    if way == "eager":
        tokens = text[: recipe.batch_size * (recipe.context + 1)].long()
        tokens = tokens.view(recipe.batch_size, -1).to(device)

        def step() -> Any:
            return train_step(model, optimizer, tokens, recipe, 0)  # reads the loss, so it waits
    else:
        if way == "compile":
            torch._dynamo.reset()  # each system has its own shapes
        prepare(model, recipe)
        windows = Windows(text.to(device), recipe.context)
        fast = CapturedStep(model, model.loss, optimizer, windows,
                        window_starts(len(text), recipe), recipe)

        def step() -> Any:
            fast(1.0)
    for _ in range(2 if way == "eager" else 5):
        step()
    return step, torch.cuda.max_memory_allocated(device) - before if cuda else float("nan")


def _parts(
    system: str, step: Callable[[], Any], device: str, ms: float
) -> list[dict[str, Any]]:
    cuda = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profiling(activities=[activity]) as profiler:
        seconds_of(step, device, PROFILED_STEPS)
    spent: dict[str, float] = defaultdict(float)
    longest: dict[str, tuple[float, str]] = {}
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CPU) == cuda:
            continue  # on CUDA the host's rows repeat the time of the kernels that they launched
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micro:
            part = part_of(event.key)
            spent[part] += micro / 1e3 / PROFILED_STEPS
            longest[part] = max(longest.get(part, (0.0, "")), (micro, event.key))
    total = sum(spent.values())
    if cuda:
        spent[GAPS] = max(0.0, ms - total)
    else:
        spent = {part: value * ms / total for part, value in spent.items()}
    whole = sum(spent.values())
    return [{"system": system, "part": part, "ms": value, "share": value / whole,
             "kernel": kernel_name(longest.get(part, (0.0, ""))[1])}
            for part, value in sorted(spent.items(), key=lambda item: -item[1])]
