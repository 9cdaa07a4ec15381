"""The verbs on latents: `sims data decode`."""

from __future__ import annotations

from typing import Annotated

import typer

from sims_ray.cli.options import GpusOption, gpus_each

app = typer.Typer()

VaeOption = Annotated[str | None, typer.Option(help="Folder or hub name of the VAE; default the one that is named.")]
LatentsOption = Annotated[
    str | None,
    typer.Option(help="How latents relate to pixels: edm2, or YAML like '{scaling_factor: 0.18215}'."),
]


@app.command("decode", epilog="Example: sims data decode data/synthetic-latents data/synthetic --vae models/vae")
def decode(
    table: Annotated[str, typer.Argument(help="Folder or URI of a table of latents.")],
    out: Annotated[str, typer.Argument(help="Folder or URI for the table of images.")],
    vae: VaeOption = None,
    latents: LatentsOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Latents per call of the VAE.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Decode on this many Ray actors; 0: in this process.")] = 0,
    gpus: GpusOption = None,
) -> None:
    """Decode a table of latents to a table of images; run again to go on after a stop."""
    from sims_ray.config import ComputeSettings
    from sims_ray.stages.decode import decode_table

    compute = ComputeSettings(num_workers=workers, gpus_per_worker=gpus_each(gpus))
    made = decode_table(table, out, compute, vae=vae, latents=latents, batch_size=batch)
    typer.echo(f"{made.folder}: {len(made):,} images of shape {made.shape}")
