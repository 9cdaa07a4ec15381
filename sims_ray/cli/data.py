"""`sims data`: sample tables."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

app = typer.Typer(help="Sample tables: import images, look at them.", no_args_is_help=True, rich_markup_mode=None)


@app.command("import", epilog="Example: sims data import photos/ data/photos --size 32")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of images (class = sub-folder or dataset.json), or Parquet.")],
    out: Annotated[Path, typer.Argument(help="Folder for the sample table; must not exist.")],
    size: Annotated[int | None, typer.Option(min=1, help="Resize to this many pixels square.")] = None,
    crop: Annotated[Literal["center", "none"], typer.Option(help="Crop to a square before resizing.")] = "center",
    grey: Annotated[bool, typer.Option(help="Convert to one grey channel.")] = False,
) -> None:
    """Import images into a sample table."""
    from sims_ray.data.importers import import_images

    imported = import_images(source, out, size=size, crop=crop, grey=grey, on_progress=_imported)
    typer.echo(f"{imported.folder}: {imported.rows:,} images of shape {imported.shape}, {imported.num_classes} classes")


@app.command("inspect", epilog="Example: sims data inspect data/photos --sheet sheet.png")
def inspect(
    table: Annotated[Path, typer.Argument(help="Folder of a sample table.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of the first images here.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 64,
) -> None:
    """Show rows, shape and labels of a sample table."""
    from sims_ray.data.contact_sheet import contact_sheet, describe
    from sims_ray.data.table import SampleTable

    opened = SampleTable(table)
    typer.echo(yaml.safe_dump(describe(opened), sort_keys=False), nl=False)
    if sheet is not None:
        contact_sheet(opened.head(min(n, len(opened))).images).save(sheet)
        typer.echo(f"contact sheet: {sheet}")


def _imported(nimg: int) -> None:
    logging.getLogger("sims_ray").info("import: %s images", f"{nimg:,}")
