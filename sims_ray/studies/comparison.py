"""Several finished runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sims_ray.errors import SimsError
from sims_ray.report.comparison import compare_runs
from sims_ray.studies.summary import RESULT


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs; returns its path.

    Args:
        runs: output folders of finished runs.
        out: folder of the page.

    Raises:
        SimsError: two folders have the same name, or the runs' distances cannot be compared.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.resolve()) for run in runs]
    if len(set(names)) < len(names):
        raise SimsError(f"{runs[0]} is given twice; give every run once")
    summaries = [json.loads((run / RESULT).read_text()) for run in runs]
    return compare_runs(out, dict(zip(names, summaries, strict=True)))
