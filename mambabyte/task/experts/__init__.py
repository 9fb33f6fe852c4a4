"""A mixture of counted experts, with or without a network, joined by a small learned gate."""

from mambabyte.task.experts.contexts import Context, count_contexts
from mambabyte.task.experts.gate import Experts, Gate, Mixing, fit_gate
from mambabyte.task.experts.matches import Matches, find_matches
from mambabyte.task.experts.model import ExpertLM

__all__ = ["Context", "ExpertLM", "Experts", "Gate", "Matches", "Mixing", "count_contexts",
           "find_matches", "fit_gate"]
