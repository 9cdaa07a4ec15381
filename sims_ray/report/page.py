"""The report of a run: one HTML page that opens offline, its plots and samples as PNG, its numbers as CSV.

`write_report(folder, summary, previews, morph)` is the one way in. Nothing is computed here that is not a
rendering of `summary`: what a number means is said on the page beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.report.numbers import flatten
from sims_ray.report.panels import loss_panel, panels
from sims_ray.report.rendering import plot_files, render, write_files
from sims_ray.report.sheets import file_sheets, morph_of, page_sheets
from sims_ray.report.tables import blocks_table, results_table, table_csv, trials_csv, trials_table
from sims_ray.report.verdicts import comparisons, evidence, verdict

PAGE = "report.html"


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    previews: Mapping[str, NDArray[np.uint8]],
    morph: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html`, the PNGs and the CSVs of a run into `folder`.

    Args:
        folder: made if it does not exist; files of an earlier report there are replaced.
        summary: the run's results as JSON values: `table`, `selected`, `best`, `trials`, `losses`, `settings`, ...;
            the paired `difference` of a row is the model's distance less the base's.
        previews: model name -> uint8 [N, C, H, W], the same seeds index by index.
        morph: `omegas`, `images` uint8 [len(omegas), N, C, H, W] of the same seeds, and the `selected` omega.

    Returns:
        The path of `report.html`: self-contained, it may be moved without the other files.

    Raises:
        SimsError: the table has no base or no SIMS row, a preview is not an image batch, or the morph does not fit.
    """
    shown, loss = panels(summary), loss_panel(summary)
    every = [*shown, *([loss] if loss else [])]
    steps = None if morph is None else morph_of(morph)
    files = {**file_sheets(previews), **plot_files(every)}
    files |= {frame.file: frame.png for frame in steps.frames} if steps else {}
    files |= {"table.csv": table_csv(summary["table"]), "trials.csv": trials_csv(summary["trials"])}
    values = {
        "stages_s": None,
        **summary,
        "verdict": verdict(summary),
        "evidence": evidence(summary),
        "comparisons": comparisons(summary),
        "results": results_table(summary),
        "block_results": blocks_table(summary),
        "trial_results": trials_table(summary),
        "panels": shown,
        "loss": loss,
        "morph": steps,
        "sheets": page_sheets(previews),
        "settings": list(flatten(summary["settings"])),
        "files": sorted(files),
    }
    files[PAGE] = render("page.html.j2", every, values)  # last: where the page is, the rest is
    write_files(folder, files)
    return folder / PAGE
