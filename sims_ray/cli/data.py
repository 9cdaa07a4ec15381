"""`sims data`: sample tables."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
import yaml

from sims_ray.errors import SimsError

if TYPE_CHECKING:
    from sims_ray.data.table import SampleTable

Table = Annotated[str, typer.Argument(help="Folder of a sample table, or s3://... or gs://...")]

app = typer.Typer(
    help="Sample tables: import, look at, verify, merge and export them.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("import", epilog="Example: sims data import photos/ data/photos --size 32")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images (class = sub-folder or dataset.json), the same as a zip, Parquet, .npy or .npz, "
            "CIFAR-10's tar, or WebDataset tars (one, or a folder of them). Float arrays are latents."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder for the sample table, or s3://... or gs://...; must not exist.")],
    size: Annotated[int | None, typer.Option(min=1, help="Resize to this many pixels square.")] = None,
    crop: Annotated[Literal["center", "none"], typer.Option(help="Crop to a square before resizing.")] = "center",
    grey: Annotated[bool, typer.Option(help="Convert to one grey channel.")] = False,
) -> None:
    """Import images or latents into a sample table."""
    from sims_ray.data.importers import import_images

    imported = import_images(source, out, size=size, crop=crop, grey=grey, on_progress=_imported)
    kind, shape = f"{imported.kind}s", imported.shape
    typer.echo(f"{imported.folder}: {imported.rows:,} {kind} of shape {shape}, {imported.num_classes} classes")


@app.command("inspect", epilog="Example: sims data inspect data/photos --sheet sheet.png")
def inspect(
    table: Table,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of the first images here.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 64,
) -> None:
    """Show rows, shape and labels of a sample table."""
    from sims_ray.data.contact_sheet import contact_sheet, describe, save_sheet
    from sims_ray.data.table import SampleTable

    opened = SampleTable(table)
    typer.echo(yaml.safe_dump(describe(opened), sort_keys=False), nl=False)
    if sheet is not None:
        save_sheet(contact_sheet(opened.head(min(n, len(opened))).images), sheet)
        typer.echo(f"contact sheet: {sheet}")


@app.command("sample", epilog="Example: sims data sample runs/synthetic sheet.png --n 64 --seed 0")
def sample(
    table: Table,
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    n: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Which images are drawn.")] = 0,
    first: Annotated[bool, typer.Option("--first", help="Take the first images instead.")] = False,
) -> None:
    """Write a contact sheet of images drawn from a sample table."""
    from sims_ray.data.contact_sheet import contact_sheet, random_rows, read_rows, save_sheet
    from sims_ray.data.table import SampleTable

    opened = SampleTable(table)
    rows = range(min(n, len(opened))) if first else random_rows(opened, n, seed)
    samples = read_rows(opened, rows)
    save_sheet(contact_sheet(samples.images), out)
    typer.echo(f"{out}: {len(samples)} of {len(opened):,} images")


@app.command("verify", epilog="Example: sims data verify s3://bucket/synthetic")
def verify(table: Table) -> None:
    """Read every file of a sample table again and compare it with the manifest."""
    from sims_ray.data.table import SampleTable
    from sims_ray.data.verify import verify as verify_table

    opened = SampleTable(table)
    found = verify_table(opened, _progress("verify", opened))
    for fault in found.faults:
        typer.echo(fault)
    for name in found.left_over:
        typer.echo(f"{name} is left over: the manifest does not list it")
    if found.faults:
        count = f"{len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"
        advice = "remove the files named above and run the command that made them, or make the table again"
        raise SimsError(f"{opened.folder} has {count}; {advice}")
    typer.echo(f"{opened.folder}: {found.rows:,} rows in {found.files} files, {found.bytes:,} bytes, all as listed")


@app.command("merge", epilog="Example: sims data merge data/photos runs/synthetic data/both")
def merge(
    tables: Annotated[list[str], typer.Argument(help="Two or more sample tables: folders, s3://... or gs://...")],
    out: Annotated[str, typer.Argument(help="Folder for the new table, or s3://... or gs://...; must not exist.")],
) -> None:
    """Make one sample table of several; parts of one synthetic set become that set."""
    from sims_ray.data.merge import merge as merge_tables
    from sims_ray.data.table import SampleTable

    opened = [SampleTable(table) for table in tables]
    merged = merge_tables(opened, out, _progress("merge", *opened))
    kind, shape = f"{merged.kind}s", merged.shape
    typer.echo(f"{merged.folder}: {len(merged):,} {kind} of shape {shape}, {merged.num_classes} classes")


@app.command("export", epilog="Example: sims data export runs/synthetic synthetic.zip --format zip")
def export(
    table: Table,
    out: Annotated[str, typer.Argument(help="Folder or file to make; must not exist.")],
    format: Annotated[
        Literal["png", "zip", "npz"],
        typer.Option(help="A folder of PNGs with dataset.json, EDM's zip of the same, or arrays arr_0 and arr_1."),
    ],
) -> None:
    """Write a sample table in a form that other programs read."""
    from sims_ray.data.export import export as export_table
    from sims_ray.data.table import SampleTable

    opened = SampleTable(table)
    made = export_table(opened, out, format, _progress("export", opened))
    typer.echo(f"{made}: {len(opened):,} {opened.kind}s")


def _imported(nimg: int) -> None:
    logging.getLogger("sims_ray").info("import: %s images", f"{nimg:,}")


def _progress(label: str, *tables: SampleTable) -> Callable[[int], None]:
    from sims_ray.stages.progress import Progress

    progress = Progress(label, sum(map(len, tables)))
    progress.update(0)  # the speed is counted from here
    return progress.update
