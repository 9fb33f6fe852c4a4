"""The public task: systems, their runs, and n-gram models beside networks."""

from mambabyte.task.run import SYSTEMS, Fit, Ngram, System, build, fit, get_system, run_task

__all__ = ["SYSTEMS", "Fit", "Ngram", "System", "build", "fit", "get_system", "run_task"]
