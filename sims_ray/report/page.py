"""The report of a run: one HTML page that opens offline, its plots and samples as PNG, its tables as CSV.

`write_report(folder, summary, previews)` is the one way in. Nothing is computed here that is not a
rendering of `summary`: what a number means is said on the page beside it.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.errors import SimsError
from sims_ray.report.plots import loss_figure, loss_png, omega_figure, omega_png
from sims_ray.storage.folders import atomic_path

TABLE_COLUMNS = ("model", "omega", "budget_kimg", "n_s", "distance", "spread", "gain", "evaluations_per_image")
TRIAL_COLUMNS = ("omega", "budget_kimg", "n_s", "metric", "distance", "nimg")
SHEET_PIXELS = 2048  # a sheet of large images shows the first that fit into this square
SMALL_PIXELS = 64  # images up to this size are magnified without smoothing
MINUS = "\N{MINUS SIGN}"


def write_report(folder: Path, summary: Mapping[str, Any], previews: Mapping[str, NDArray[np.uint8]]) -> Path:
    """Write `report.html`, the PNGs and the CSVs of a run into `folder`.

    Args:
        folder: made if it does not exist; files of an earlier report there are replaced.
        summary: the run's results as JSON values: `table`, `selected`, `trials`, `losses`, `settings`, ...
        previews: model name -> uint8 [N, C, H, W], the same seeds index by index.

    Returns:
        The path of `report.html`: self-contained, it may be moved without the other files.

    Raises:
        SimsError: the table has no base or no SIMS row, or a preview is not an image batch.
    """
    sheets = {model: _sheet(images) for model, images in previews.items()}
    files = {f"samples-{model}.png": sheet for model, sheet in sheets.items()}
    files["fd_vs_omega.png"] = omega_png(summary)
    if (loss := loss_png(summary)) is not None:
        files["training_loss.png"] = loss
    files["table.csv"] = _csv(*_table_rows(summary["table"]))
    files["trials.csv"] = _csv(TRIAL_COLUMNS, ([t.get(c) for c in TRIAL_COLUMNS] for t in summary["trials"]))
    files["report.html"] = render_page(summary, sheets, _sheet_facts(previews)).encode()
    for name, content in files.items():  # the page last: where it is, the rest is
        with atomic_path(folder / name) as beside:
            beside.write_bytes(content)
    return folder / "report.html"


def render_page(summary: Mapping[str, Any], sheets: Mapping[str, bytes], facts: Mapping[str, Any]) -> str:
    """The page as HTML text; every text of `summary` is escaped.

    Args:
        summary: as in `write_report`.
        sheets: model name -> PNG of its samples.
        facts: `shown` images per sheet and whether they are `small`.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, percent=percent, seconds=seconds)
    template = environment.from_string((resources.files("sims_ray.report") / "page.html.j2").read_text("utf-8"))
    return template.render(
        {**summary, "trials": sorted(summary["trials"], key=_by_distance)},
        rows=summary["table"],
        verdict=verdict(summary),
        evidence=evidence(summary),
        settings=list(flatten(summary["settings"])),
        sheets={model: base64.b64encode(png).decode() for model, png in sheets.items()},
        facts=facts,
        figures={"fd": omega_figure(summary), "loss": loss_figure(summary)},
        plotly_js=get_plotlyjs(),
    )


def verdict(summary: Mapping[str, Any]) -> str:
    """What came out, in one sentence.

    Raises:
        SimsError: the table has no base or no SIMS row.
    """
    base, sims = _row(summary, "base"), _row(summary, "SIMS")
    change = f"from {number(base['distance'], 3)} to {number(sims['distance'], 3)} ({percent(-sims['gain'])})"
    if separated(base, sims) is False:
        return f"SIMS makes no clear difference: {summary['metric']} goes {change} and the blocks overlap."
    if sims["gain"] > 0:
        return f"SIMS lowers {summary['metric']} {change}, without one more real image."
    return f"SIMS does not help here: {summary['metric']} goes {change}; lower is better."


def evidence(summary: Mapping[str, Any]) -> str:
    """How far the verdict can be trusted and what it costs, in two sentences."""
    base, sims = _row(summary, "base"), _row(summary, "SIMS")
    cost = (
        f"One image costs {sims['evaluations_per_image']} network evaluations with SIMS "
        f"and {base['evaluations_per_image']} with the base."
    )
    apart = separated(base, sims)
    if apart is None:
        return f"It was measured on one block of seeds, so its spread is unknown. {cost}"
    if not apart:
        return f"Where the blocks of two models overlap, their difference may be chance. {cost}"
    side = "below" if sims["distance"] < base["distance"] else "above"
    return f"Each of the {len(sims['blocks'])} SIMS blocks lies {side} every base block. {cost}"


def separated(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether the two rows' blocks do not overlap; none if either has fewer than two blocks."""
    a, b = one["blocks"], other["blocks"]
    if min(len(a), len(b)) < 2:
        return None
    return bool(max(a) < min(b) or max(b) < min(a))


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant digits, thousands separated; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(share: float) -> str:
    """A signed percentage, whole from 10 % on."""
    return f"{share:+.{0 if abs(share) >= 0.0995 else 1}%}".replace("-", MINUS)


def seconds(duration_s: float) -> str:
    """A duration in the unit a person would use."""
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    return f"{duration_s / 60:.1f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _row(summary: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    for row in summary["table"]:
        if row["model"] == model:
            found: Mapping[str, Any] = row
            return found
    raise SimsError(f"the results have no row for {model!r}, so there is nothing to compare; measure that model first")


def _by_distance(trial: Mapping[str, Any]) -> float:
    """Sort key that puts a trial without a finite distance last."""
    distance = trial["distance"]
    return math.inf if distance is None or not math.isfinite(distance) else float(distance)


def _table_rows(table: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    blocks = max((len(row["blocks"]) for row in table), default=0)
    header = [*TABLE_COLUMNS, *(f"block_{i + 1}" for i in range(blocks))]
    return header, [[*(row[c] for c in TABLE_COLUMNS), *row["blocks"]] for row in table]


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV whose numbers read back exactly; none is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _shown(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    across = max(1, SHEET_PIXELS // max(images.shape[-2:]))
    return images[: across * across]


def _sheet(images: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    contact_sheet(_shown(images)).save(buffer, format="PNG")
    return buffer.getvalue()


def _sheet_facts(previews: Mapping[str, NDArray[np.uint8]]) -> dict[str, Any]:
    shown = {model: len(_shown(images)) for model, images in previews.items()}
    return {"shown": shown, "small": all(max(p.shape[-2:]) <= SMALL_PIXELS for p in previews.values())}
