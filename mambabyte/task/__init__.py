"""The public task: systems, their runs, and n-gram models beside networks."""

from mambabyte.task.builder import Fit, build, fit
from mambabyte.task.run import run_task
from mambabyte.task.systems import SYSTEMS, Ngram, System, get_system

__all__ = ["SYSTEMS", "Fit", "Ngram", "System", "build", "fit", "get_system", "run_task"]
