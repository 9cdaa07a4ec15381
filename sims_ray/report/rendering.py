"""Templates and figures become one HTML page that fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sims_ray.report.chart import Panel
from sims_ray.report.drawings import draw_png
from sims_ray.report.numbers import number, percent, seconds
from sims_ray.report.plots import plotly_figure
from sims_ray.report.sheets import data_uri
from sims_ray.storage.beside import atomic_path


def render(template: str, panels: Iterable[Panel], values: Mapping[str, Any]) -> bytes:
    """A page of a template, with the figures of its panels; every text of the values is escaped."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sims_ray", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, seconds=seconds, data_uri=data_uri)
    figures = {panel.id: [plotly_figure(plot) for plot in panel.plots] for panel in panels}
    page = environment.get_template(template).render({**values, "figures": figures, "plotly_js": get_plotlyjs()})
    return page.encode()


def plot_files(panels: Iterable[Panel]) -> dict[str, bytes]:
    """The PNG and the CSV of every plot, by name."""
    plots = [plot for panel in panels for plot in panel.plots]
    return {f"{plot.name}.png": draw_png(plot) for plot in plots} | {f"{plot.name}.csv": plot.csv() for plot in plots}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files in their order, each whole or not at all."""
    for name, content in files.items():
        with atomic_path(folder / name) as beside:
            beside.write_bytes(content)
