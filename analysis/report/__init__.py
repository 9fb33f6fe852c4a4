"""The HTML report, made from run folders and prose alone: no torch, no study is imported."""

from analysis.report.build import build_report

__all__ = ["build_report"]
