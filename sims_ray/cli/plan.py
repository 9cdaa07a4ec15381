"""The verb that says what a run will cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sims_ray.cli.options import WorkersOption, workers_settings
from sims_ray.cli.stages import OutOption, RecipeArg, SetOption
from sims_ray.config import load_recipe
from sims_ray.errors import SimsError

SHAPE = re.compile(r"^([1-9]\d*),([1-9]\d*),([1-9]\d*)$")

app = typer.Typer()


@app.command(epilog="Example: sims plan edm-cifar10-vp --gpu h100 --workers 8")
def plan(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = None,
    workers: WorkersOption = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, like h100; default: measure this machine.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine; the default without --gpu.")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="C,H,W of the images, where they are not there yet.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="With --shape: number of classes.")] = None,
) -> None:
    """Say what a run will cost: images, evaluations, operations, hours, storage, memory; changes nothing."""
    if measure and gpu is not None:
        raise SimsError("--measure is about this machine and --gpu about another; give one of them")
    from sims_ray.nn.flops import gpu_named
    from sims_ray.studies.cost_table import cost_table
    from sims_ray.studies.estimate import estimate
    from sims_ray.studies.outline import Outline

    kind = None if gpu is None else gpu_named(gpu)
    of_workers = [f"compute.{name}={value}" for name, value in workers_settings(workers).items()]
    settings = load_recipe(recipe, [*(set_ or []), *of_workers])
    if kind is not None and not settings.compute.gpus_per_worker:
        settings = load_recipe(recipe, [*(set_ or []), *of_workers, "compute.gpus_per_worker=1"])
    outline = Outline(settings, out or Path("runs") / settings.name, _parsed(shape), classes)
    typer.echo(cost_table(estimate(outline, kind)))


def _parsed(shape: str | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    if (match := SHAPE.match(shape.replace(" ", ""))) is None:
        raise SimsError(f"--shape {shape!r} is not channels, height and width; give three numbers like 3,32,32")
    return int(match[1]), int(match[2]), int(match[3])
