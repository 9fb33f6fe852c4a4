"""Training: the loop, and the steps, schedules and run folders that it works with."""

from mambabyte.errors import NonFiniteError
from mambabyte.train.loop import Ended, optimise
from mambabyte.train.metrics import Progress, read_metrics
from mambabyte.train.precision import autocast
from mambabyte.train.run import train
from mambabyte.train.step import (
    EagerStep,
    Reading,
    Step,
    text_batches,
    text_step,
    train_step,
)

__all__ = ["EagerStep", "Ended", "NonFiniteError", "Progress", "Reading", "Step", "autocast",
           "optimise", "read_metrics", "text_batches", "text_step", "train", "train_step"]
