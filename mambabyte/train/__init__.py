"""Training: the loop and what it is made of."""

from mambabyte.train.loop import NonFiniteError, Progress, train, train_step
from mambabyte.train.precision import autocast

__all__ = ["NonFiniteError", "Progress", "autocast", "train", "train_step"]
