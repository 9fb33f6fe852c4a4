"""Operators as functions of tensors, one folder a family; the names here are the public ones."""

from mambabyte.config.scan_forms import FORMS, Form
from mambabyte.ops.compat import selective_scan_fn
from mambabyte.ops.delta.dispatch import gated_delta_rule
from mambabyte.ops.scan.dispatch import default_form, selective_scan
from mambabyte.ops.scan.recurrent import selective_scan_step
from mambabyte.ops.ssd.dispatch import ssd_scan
from mambabyte.ops.ssd.mamba3.dispatch import mamba3_scan
from mambabyte.ops.ssd.recurrent import Mamba3State

__all__ = ["FORMS", "Form", "Mamba3State", "default_form", "gated_delta_rule", "mamba3_scan",
           "selective_scan", "selective_scan_fn", "selective_scan_step", "ssd_scan"]
