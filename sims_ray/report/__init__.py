"""Plots and the HTML page of a run, and of several runs side by side."""

from sims_ray.report.comparison import compare_runs
from sims_ray.report.page import write_report

__all__ = ["compare_runs", "write_report"]
