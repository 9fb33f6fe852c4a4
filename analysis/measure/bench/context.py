"""One long sequence on one device, and its length split among several.

Forward and backward of a model, with the mean of the gradients where there are several processes.
Three ways in turn: "alone", the whole sequence on the first process's device; "split" among all;
and "stretch", a sequence of a stretch's length alone, which is what "split" would take if nothing
had to be exchanged or worked out for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
import torch.distributed as dist

from analysis.measure.timing import in_turns, quartiles, release, seconds_of
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.model.distributed import World
from mambabyte.train.captured import prepare
from mambabyte.train.precision import autocast

COLUMNS = {
    "layers": "layer pattern",
    "length": "bytes of the sequence",
    "way": "alone, split, or a stretch alone",
    "processes": "that are at work",
    "ms": "median of forward and backward",
    "low": "lower quartile, ms",
    "high": "upper quartile, ms",
    "peak_bytes": "of the first process's device",
    "messages_ms": "in kernels that exchange, of the process that waits least in them",
    "note": "why there is no number",
}
WAYS = ("alone", "split", "stretch")


def bench_context(
    model: ModelConfig, patterns: Sequence[str], lengths: Sequence[int], world: World, device: str,
    rounds: int = 7, say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """A row a pattern, length and way, with the COLUMNS; all processes call together, and the first
    one's table is whole. What does not fit alone is a row that says so. UserError for one process.
    """
    if world.size < 2:
        raise UserError("a context is split among processes: start this with torchrun "
                        "--nproc-per-node 2 -m analysis.cli bench context")
    rows = []
    for pattern in patterns:
        torch.manual_seed(0)
        built = ByteLM(ModelConfig(**vars(model) | {"layer_pattern": pattern})).to(device)
        for length in lengths:
            rows += _of_length(built, length, world, device, rounds, say)
        del built
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_length(
    model: ByteLM, length: int, world: World, device: str, rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, object]]:
    config = TrainConfig(context=length, batch_size=1)
    prepare(model, config)
    tokens = torch.randint(256, (1, length + 1), device=device,
                           generator=torch.Generator(device).manual_seed(0))

    def step(way: str) -> None:
        shared = way == "split"
        if not shared and not world.first:
            return
        model.share_sequences(world.sequence_group(world.size) if shared else None)
        stretch = -(-length // world.size) if way == "stretch" else length
        with autocast(torch.device(device), config.precision):
            loss = model.loss(tokens[:, : stretch + 1])
        loss.backward()
        if shared:
            world.average([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)

    def together(way: str) -> float:
        world.wait()
        return seconds_of(partial(step, way), device)

    rows: dict[str, dict[str, object]] = {}
    for way in WAYS:  # warms up as well
        row = rows[way] = {
            "layers": model.config.layer_pattern, "length": length, "way": way, "note": "",
            "processes": world.size if way == "split" else 1}
        say(f"{model.config.layer_pattern}, {length:,} bytes, {way}")
        on_cuda = device.startswith("cuda")
        release(device)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            failed = ""
            try:
                together(way)
            except torch.OutOfMemoryError:
                failed = "out of memory"
                model.zero_grad(set_to_none=True)
            row["note"] = world.agree(failed)
            if row["note"]:
                break
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if on_cuda else float("nan")
        if way == "split" and not row["note"]:
            row["messages_ms"] = _messages_ms(partial(together, way), world)
    timed = [way for way, row in rows.items() if not row["note"]]
    took = in_turns({way: partial(together, way) for way in timed}, rounds)
    for way in timed:
        low, median, high = (1e3 * seconds for seconds in quartiles(took[way]))
        rows[way] |= {"low": low, "ms": median, "high": high}
    return list(rows.values())


def _messages_ms(call: Callable[[], object], world: World) -> float:
    """Milliseconds in NCCL's kernels, or in what gloo does, of the process with the fewest: the
    others wait in theirs for it."""
    with torch.profiler.profile() as profile:
        call()
    of_nccl = dist.get_backend() == "nccl"
    total = sum(
        event.self_device_time_total if of_nccl else event.cpu_time_total
        for event in profile.key_averages()
        if event.key.startswith("ncclDevKernel" if of_nccl else "gloo:"))
    return min(world.gather(total / 1e3))
