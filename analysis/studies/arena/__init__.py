"""Study: which mixer to train on bytes, each at the rate that suits it, and what each can do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pandas as pd

from mambabyte.config.checks import (
    Checked,
    Count,
    CountOrNone,
    Device,
    Layers,
    NotNegative,
    Positive,
    Rule,
    Threads,
    Workers,
    entries,
    one_of,
)
from mambabyte.config.mixers import SPECS
from mambabyte.errors import UserError

TITLE = "The arena: every mixer at the rate that suits it"
QUESTION = "Which mixer should be trained on bytes, at which size, for which budget, and why?"
NOTEBOOK = "08_arena.ipynb"
TIMED = True

# Width, layers and width of a head; a multiple of four layers, for hybrids of 3:1. On a GPU heads
# are 64 wide: the one width that its kernels of Mamba-2 and the delta rule have.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (32, 4, 16), "0.25M": (64, 8, 64), "1M": (192, 4, 64), "10M": (448, 8, 64),
    "30M": (640, 12, 64),
}
HALF = "/2"  # a system at half of the layers, and MLPs that make up for it: the field's matching

_SYSTEM = re.compile(rf"([A-Za-z]+)({HALF})?\Z")


def pattern_of(system: str) -> tuple[str, bool]:
    """Layer pattern of a system's name, and whether it has half of the layers."""
    found = _SYSTEM.match(system)
    if found is None or not set(found[1]) <= SPECS.keys():
        raise UserError(f"system {system!r}: write a layer pattern such as DDDA, and {HALF} behind "
                        "it for half of the layers")
    return found[1], bool(found[2])


def family(system: str) -> str:
    """What a system's rate is tuned with: of a hybrid its other mixer, else the system itself."""
    pattern, _ = pattern_of(system)
    others = sorted(set(pattern) - {"A"})
    return others[0] if len(set(pattern)) > 1 else system


TASKS = ("recall", "noisy recall", "selective copy", "induction", "parity", "permutations",
         "memorisation")  # see trainings/tasks.py
LARGEST = 4096  # size of a task


def task_size(text: str) -> tuple[str, int]:
    """Name and largest size of a task written such as ``recall 256``."""
    name, _, size = text.rpartition(" ")
    if name not in TASKS or not size.isdecimal() or not 1 <= int(size) <= LARGEST:
        raise UserError(f"task {text!r}: write one of {', '.join(TASKS)} and its largest size, up "
                        f"to {LARGEST}, such as 'recall 64'")
    return name, int(size)


def _holds(check: Callable[[str], object]) -> Callable[[str], bool]:
    def fits(text: str) -> bool:
        try:
            check(text)
        except UserError:
            return False
        return True

    return fits


TaskName = Annotated[str, Rule(_holds(task_size), lambda: f"one of {', '.join(TASKS)} and its "
                               f"largest size, up to {LARGEST}, such as 'recall 64'")]
SystemName = Annotated[str, Rule(_holds(pattern_of), lambda: "a layer pattern such as DDDA, and "
                                 f"{HALF} behind it for half of the layers")]
SizeName = Annotated[str, one_of(lambda: SIZES)]
Part = Literal["text", "long", "costs", "tasks", "memory", "precision", "clamp", "scaling",
               "pieces"]
Rates = Annotated[tuple[Positive, ...], entries(rising=True)]
RatesOrNone = Annotated[tuple[Positive, ...], entries(0, rising=True)]


@dataclass(frozen=True)
class Parameters(Checked):
    """What is trained, at which rates. Defaults are the quick profile: a CPU and seconds, which
    show that it works and no more."""

    corpus: str = "stdlib"
    """text: stdlib, wikitext103, a folder or a file"""
    device: Device = "cpu"
    """where it runs: cpu, cuda:N, or cuda for a worker on each GPU"""
    threads: Threads = 1
    """of torch on the CPU; 0 leaves torch's own choice"""
    workers: Workers = 1
    """processes beside each other on a device"""
    work: str = ""
    """folder that keeps each training, so that the next run goes on; empty is none"""
    continues: str = ""
    """record whose trainings on text and costs are taken as done; empty is none"""
    max_seconds: NotNegative = 0.0
    """after which no training is begun; 0 is no limit"""
    parts: Annotated[tuple[Part, ...], entries()] = ("text", "long", "costs", "tasks")
    """text, long, costs, tasks, memory, precision, clamp, scaling, pieces"""
    systems: Annotated[tuple[SystemName, ...], entries()] = ("M", "A", "MMMA")
    """layer patterns that are compared; /2 behind one is half of the layers with wider MLPs"""
    reference: SystemName = "A"
    """what the others are compared with, seed by seed"""
    size: SizeName = "tiny"
    """where every system is tuned, with both optimizers"""
    larger: Annotated[tuple[SizeName, ...], entries(0)] = ()
    """where all but 1:1 hybrids are tuned again, with the better optimizer"""
    scaling: Annotated[tuple[SizeName, ...], entries(0)] = ()
    """sizes of the law of parameters and text"""
    budgets: Annotated[tuple[Count, ...], entries(rising=True)] = (1_024, 2_048)
    """bytes of training text"""
    tuned_on: CountOrNone = 0
    """the one of budgets on which rates are tuned; 0 is the last but one"""
    adamw_rates: RatesOrNone = (1.6e-2, 3.2e-2, 6.4e-2)
    """learning rates of AdamW, each twice the one before; empty is Muon alone"""
    muon_rates: RatesOrNone = ()
    """of Muon; AdamW has a tenth for the rest; may be empty"""
    seeds: Count = 1
    """trainings of every system at its best rate"""
    context: Count = 64
    """bytes of a window"""
    batch_size: Count = 4
    """windows of a step"""
    heldout_windows: Count = 16
    """windows on which rates are chosen, and as many of validation text"""
    tasks: Annotated[tuple[TaskName, ...], entries(0)] = ("recall 4",)
    """name and largest size, such as recall 256; see trainings/tasks.py"""
    task_systems: Annotated[tuple[SystemName, ...], entries(0)] = ("M", "A")
    """layer patterns that are asked"""
    task_widths: Annotated[tuple[Count, ...], entries()] = (32,)
    """widths of their models; of two layers"""
    task_rates: Rates = (4e-3,)
    """learning rates of AdamW"""
    task_steps: Count = 20
    """most steps on a size of a task; fewer once it is solved"""
    task_batch: Count = 8
    """samples of a step; fewer where each asks much"""
    task_layers: Layers = 2
    """layers of the models"""
    stream_bytes: Count = 2_048
    """bytes of text on which memory and precision are looked at"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in self.systems:
            raise UserError(f"reference is {self.reference!r}: expected one of the systems, "
                            f"{', '.join(self.systems)}")
        if not (self.adamw_rates or self.muon_rates):
            raise UserError("adamw_rates and muon_rates are empty: give the rates of one optimizer")
        if self.budgets[0] < self.context * self.batch_size:
            raise UserError(f"budgets begin with {self.budgets[0]:,} bytes: expected a step or "
                            f"more, {self.context * self.batch_size:,} bytes")
        if self.tuned_on and self.tuned_on not in self.budgets:
            raise UserError(f"tuned_on is {self.tuned_on:,}: expected 0 or one of budgets, "
                            f"{', '.join(map(str, self.budgets))}")
        missing = {family(s) for s in self.systems} - set(self.systems)
        if missing:
            raise UserError(f"systems has hybrids of {', '.join(sorted(missing))} and not these "
                            "themselves: the rate of a hybrid is looked for around theirs")

    @property
    def tuning_budget(self) -> int:
        return self.tuned_on or self.budgets[max(0, len(self.budgets) - 2)]

    @property
    def longer_budgets(self) -> tuple[int, ...]:
        """Those above the tuning budget; that one where there are none."""
        return tuple(b for b in self.budgets if b > self.tuning_budget) or (self.tuning_budget,)

    @property
    def long_budget(self) -> int:
        """Where every system is trained again at its best rate: the first above the tuning one."""
        return self.longer_budgets[0]


PROFILES = {
    "quick": Parameters(),
    # An hour of one H200, six trainings beside each other, but for ``costs``, which asks for
    # workers=1, and ``precision``, two to three minutes a system beside others.
    "full": Parameters(
        corpus="wikitext103", device="cuda", threads=0, workers=6,
        parts=("text", "long", "scaling", "clamp", "pieces", "tasks", "memory", "costs"),
        systems=("M", "S", "D", "K", "R", "A", "A/2", "L", "MMMA", "SSSA", "DDDA", "KKKA", "RRRA",
                 "MA", "SA", "DA", "KA", "RA"),
        size="1M", larger=("10M",), scaling=("0.25M", "1M", "10M", "30M"),
        budgets=(4_194_304, 16_777_216, 67_108_864), tuned_on=16_777_216,
        adamw_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), muon_rates=(5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
        seeds=3, context=1024, batch_size=16, heldout_windows=256,
        tasks=("recall 256", "selective copy 32", "noisy recall 64", "induction 128", "parity 32",
               "permutations 32", "memorisation 4096"),
        task_systems=("A", "M", "S", "D", "K", "R", "L", "MA", "SA", "DA", "KA", "RA"),
        task_widths=(64, 128), task_rates=(5e-4, 1e-3, 2e-3, 4e-3), task_steps=1000, task_batch=64,
        stream_bytes=1_048_576),
    # Trained in a minute on a CPU, to look at what it remembers.
    "memory": replace(Parameters(), parts=("text", "memory"), systems=("M", "A"),
                      budgets=(65_536, 131_072), adamw_rates=(8e-3,), stream_bytes=16_384),
}


@dataclass(frozen=True)
class Results:
    """Tables of the study; an empty one was not asked for, ``None`` in a cell is not measured."""

    cells: pd.DataFrame  # every training on text: what it was, what it cost, what it reached
    best: pd.DataFrame  # the best of every system at every size and budget
    tuning: pd.DataFrame  # what the search of each system cost and gave
    sensitivity: pd.DataFrame  # bits per byte by rate
    paired: pd.DataFrame  # differences to the reference, seed by seed
    costs: pd.DataFrame  # time and joules of a byte of every system, one job
    equal: pd.DataFrame  # the best runs at equal bytes, time, operations and joules
    answers: pd.DataFrame  # accuracy of every training on a task, by size
    tasks: pd.DataFrame  # the same at each system's best rate
    law: pd.DataFrame  # bits by parameters and text: the numbers of each system's law
    points: pd.DataFrame  # what the laws are fitted to, and what they predict
    crossings: pd.DataFrame  # where laws cross
    context: pd.DataFrame  # bits per byte by how often the state is reset
    half_lives: pd.DataFrame  # of each layer's channels
    horizon: pd.DataFrame  # gradient by distance
    maps: pd.DataFrame  # how much each output depends on each input
    precision: pd.DataFrame  # bits lost by what the state is kept in
    state_errors: pd.DataFrame  # of the state itself, by half-life
    units: pd.DataFrame  # bytes and pieces, on clean and on noisy text
    clamp: pd.DataFrame  # largest exponents, with and without a bound on the step size
    followed: pd.DataFrame  # step size times decay while training
