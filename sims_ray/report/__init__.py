"""Plots and the HTML page of a run."""

from sims_ray.report.page import write_report

__all__ = ["write_report"]
