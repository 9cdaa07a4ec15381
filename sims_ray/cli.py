"""The `sims` command: thin, one function per verb."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from sims_ray.config import Recipe, builtin_recipes, load_recipe
from sims_ray.errors import SimsError

INTERRUPTED = 130  # the shell's exit code after Ctrl-C

app = typer.Typer(
    name="sims",
    help="Self-improving diffusion models with synthetic data (SIMS), on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Sample tables: import images, look at them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

RecipeArg = Annotated[str, typer.Argument(help="Built-in recipe name or path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Output folder; default runs/<recipe name>.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="List all stages and which are complete; change nothing.")]


def _open(recipe: str, overrides: list[str] | None, out: Path | None) -> tuple[Recipe, Path]:
    settings = load_recipe(recipe, overrides or [])
    return settings, out or Path("runs") / settings.name


def _run(
    recipe: str, overrides: list[str] | None, out: Path | None, dry_run: bool, action: Callable[[Any], None]
) -> None:
    """Open the run, then do the action, or with `dry_run` only list the stages."""
    settings, folder = _open(recipe, overrides, out)
    from sims_ray.studies.sims import SimsRun

    run = SimsRun(settings, folder)
    if dry_run:
        typer.echo(run.describe())
    else:
        action(run)


@app.command(epilog="Example: sims run digits --out runs/digits --set tune.omega='[0,1,2]'")
def run(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Run SIMS end to end: base, synthetic set, auxiliary, sweep, report."""

    def action(run: Any) -> None:
        typer.echo(run.closing_words(run.report()))

    _run(recipe, set_, out, dry_run, action)


@app.command(epilog="Example: sims train digits --set train.duration_kimg=50")
def train(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Train the base model on the real images."""
    _run(recipe, set_, out, dry_run, lambda run: _say(run.train_base(), run.plan.base))


@app.command(epilog="Example: sims synthesize digits --set tune.n_s='[4000]'")
def synthesize(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Sample the synthetic set S from the base (trains the base first if it is not there)."""
    _run(recipe, set_, out, dry_run, lambda run: _say(run.synthesize(), run.plan.synthesis_job.artifact.path))


@app.command(epilog="Example: sims finetune digits --set finetune.budgets_kimg='[10,20]'")
def finetune(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Fine-tune the auxiliary on S, with a snapshot at each budget."""

    def action(run: Any) -> None:
        run.finetune()
        for n_s in run.recipe.tune.n_s:
            typer.echo(run.plan.finetune_job(n_s).artifact.path)

    _run(recipe, set_, out, dry_run, action)


@app.command(epilog="Example: sims evaluate digits --omega 1 --budget 40 --n-s 4000")
def evaluate(
    recipe: RecipeArg,
    omega: Annotated[float, typer.Option(help="Guidance strength; 0 is the base, -1 the auxiliary.")] = 0.0,
    budget: Annotated[float | None, typer.Option(help="Fine-tuning budget B in kimg; default the largest.")] = None,
    n_s: Annotated[int | None, typer.Option("--n-s", help="Synthetic-set size; default the largest.")] = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
) -> None:
    """Measure the Fréchet distance of one model on the report seeds."""

    def action(run: Any) -> None:
        for block, result in enumerate(run.measure(*run.plan.cell(omega, budget, n_s))):
            typer.echo(f"block {block}: {result['metric']} = {result['distance']:.3f}")

    _run(recipe, set_, out, dry_run, action)


@app.command(epilog="Example: sims tune digits --set tune.omega='[0,0.5,1,2]'")
def tune(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Search omega, B and n_s with Ray Tune."""

    def action(run: Any) -> None:
        selected = run.tune()
        typer.echo(
            f"selected omega={selected['omega']:g}, B={selected['budget_kimg']:g} kimg, n_s={selected['n_s']}: "
            f"{selected['metric']} = {selected['distance']:.3f} on the selection seeds"
        )

    _run(recipe, set_, out, dry_run, action)


@app.command(epilog="Example: sims report digits")
def report(recipe: RecipeArg, set_: SetOption = None, out: OutOption = None, dry_run: DryOption = False) -> None:
    """Measure the selected model on fresh seeds and write report.html (makes what is missing)."""
    run(recipe, set_, out, dry_run)


@app.command(epilog="Example: sims sample grid.png --run runs/digits --model SIMS --n 64")
def sample(
    target: Annotated[Path, typer.Argument(help="A .png for a grid, otherwise a folder of PNG files.")],
    run: Annotated[Path | None, typer.Option(help="Output folder of a finished run.")] = None,
    model: Annotated[str, typer.Option(help="With --run: base, auxiliary or SIMS, as selected there.")] = "SIMS",
    base: Annotated[Path | None, typer.Option(help="Instead of --run: checkpoint of the base.")] = None,
    aux: Annotated[Path | None, typer.Option(help="With --base: checkpoint of the auxiliary.")] = None,
    omega: Annotated[float, typer.Option(help="With --base: guidance strength; 0 is the base.")] = 0.0,
    n: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others follow.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Heun steps; default those of the run, or 18.")] = None,
) -> None:
    """Sample images from a model of a finished run, or from checkpoints."""
    if (run is None) == (base is None):
        raise SimsError("sims sample needs either --run FOLDER or --base CHECKPOINT; give one of them")
    if run is not None and (aux is not None or omega != 0):
        raise SimsError("--aux and --omega go with --base; with --run choose by --model base, auxiliary or SIMS")
    from sims_ray.config import SamplerSettings
    from sims_ray.storage.models import SimsModel
    from sims_ray.studies.sample import model_of_run, sample_images

    source, sampler = (
        (SimsModel.of(base, aux, omega), SamplerSettings()) if base else model_of_run(run or Path(), model)
    )
    if steps is not None:
        sampler = sampler.model_copy(update={"num_steps": steps})
    typer.echo(sample_images(target, source, range(seed, seed + n), sampler))


@app.command(epilog="Example: sims config digits --set train.lr=1e-3")
def config(recipe: RecipeArg, set_: SetOption = None) -> None:
    """Print the resolved settings of a recipe."""
    typer.echo(yaml.safe_dump(load_recipe(recipe, set_ or []).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    typer.echo("\n".join(builtin_recipes()))


@data_app.command("import", epilog="Example: sims data import photos/ data/photos --size 32")
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


@data_app.command("inspect", epilog="Example: sims data inspect data/photos --sheet sheet.png")
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


def _say(_: None, path: Path) -> None:
    typer.echo(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: one sentence for a user's error, a hint after Ctrl-C, no Ray left behind.

    Takes the words after `sims`, by default those of the command line; ends the process.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("sims_ray").setLevel(logging.INFO)
    code: int | str | None = 0
    try:
        app(arguments)
    except SystemExit as ended:  # typer's own way to end, also for a wrong option
        code = ended.code
    except SimsError as error:
        typer.echo(f"error: {error}", err=True)
        code = 1
    except OSError as error:
        typer.echo(f"error: {error.filename or 'storage'}: {error.strerror or error}; make it accessible", err=True)
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        if "ray" in sys.modules:
            from sims_ray.stages.cluster import stop_ray

            stop_ray()
    if code == INTERRUPTED:
        typer.echo("stopped; run the same command again to go on", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
