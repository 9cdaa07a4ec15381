"""The verbs that make the stages of a run, and those that show recipes."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from sims_ray.cli.options import WorkersOption, workers_settings
from sims_ray.config import builtin_recipes, load_recipe, presets
from sims_ray.errors import SimsError

app = typer.Typer()

BUDGET = re.compile(r"(\d+|\d*\.\d+)(k|M)")
KIMG = {"k": 1, "M": 1000}

RecipeArg = Annotated[str, typer.Argument(help="Built-in recipe name or path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Output folder; default runs/<recipe name>.")]
BudgetsOption = Annotated[
    str | None,
    typer.Option(
        "--budgets",
        help="Fine-tuning budgets B in images, like 10k,20k,40k or 3.5M: a snapshot at each of one run; "
        "sets finetune.budgets_kimg.",
    ),
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="List all stages and which are complete; change nothing.")]


def _run(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    dry_run: bool,
    workers: str | None,
    action: Callable[[Any], None],
    budgets: str | None = None,
) -> None:
    """Open the run, then do the action, or with `dry_run` only list the stages."""
    of_workers = [f"compute.{name}={value}" for name, value in workers_settings(workers).items()]
    of_budgets = [] if budgets is None else [f"finetune.budgets_kimg={budgets_kimg(budgets)}"]
    settings = load_recipe(recipe, [*(overrides or []), *of_workers, *of_budgets])
    from sims_ray.studies.sims import SimsRun

    run = SimsRun(settings, out or Path("runs") / settings.name)
    if dry_run:
        typer.echo(run.describe())
    else:
        action(run)
        run.pause()


def budgets_kimg(text: str) -> list[float]:
    """Budgets in kimg from words like `10k,20k,3.5M`: k is a thousand images, M a million.

    Raises:
        SimsError: a word is no number with a unit, or is 0.
    """
    found = []
    for word in text.split(","):
        match = BUDGET.fullmatch(word.strip())
        if match is None or not Decimal(match[1]):
            raise SimsError(
                f"--budgets {text}: {word.strip()!r} is not a number of images; write thousands with k and millions "
                f"with M, like 10k,20k or 3.5M"
            )
        found.append(float(Decimal(match[1]) * KIMG[match[2]]))
    return found


@app.command(epilog="Example: sims run digits --out runs/digits --set tune.omega='[0,1,2]'")
def run(
    recipe: RecipeArg,
    budgets: BudgetsOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Run SIMS end to end: base, synthetic set, auxiliary, sweep, report."""

    def action(run: Any) -> None:
        typer.echo(run.closing_words(run.report()))

    _run(recipe, set_, out, dry_run, workers, action, budgets)


@app.command(epilog="Example: sims train digits --set train.duration_kimg=50")
def train(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Train the base model on the real images."""
    _run(recipe, set_, out, dry_run, workers, lambda run: _say(run.train_base(), run.plan.base))


@app.command(epilog="Example: sims synthesize digits --set tune.n_s='[4000]'")
def synthesize(
    recipe: RecipeArg,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Sample the synthetic set S from the base (trains the base first if it is not there)."""
    _run(recipe, set_, out, dry_run, workers, lambda run: _say(run.synthesize(), run.plan.synthesis_job.set.folder))


@app.command(epilog="Example: sims finetune digits --budgets 20k,40k,80k")
def finetune(
    recipe: RecipeArg,
    budgets: BudgetsOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Fine-tune the auxiliary on S, with a snapshot at each budget."""

    def action(run: Any) -> None:
        run.finetune()
        for n_s in run.recipe.tune.n_s:
            typer.echo(run.plan.finetune_job(n_s).artifact.path)

    _run(recipe, set_, out, dry_run, workers, action, budgets)


@app.command(epilog="Example: sims evaluate digits --omega 1 --budget 40 --n-s 4000")
def evaluate(
    recipe: RecipeArg,
    omega: Annotated[float, typer.Option(help="Guidance strength; 0 is the base, -1 the auxiliary.")] = 0.0,
    budget: Annotated[float | None, typer.Option(help="Fine-tuning budget B in kimg; default the largest.")] = None,
    n_s: Annotated[int | None, typer.Option("--n-s", help="Synthetic-set size; default the largest.")] = None,
    budgets: BudgetsOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Measure the Fréchet distance of one model on the report seeds."""

    def action(run: Any) -> None:
        for block, result in enumerate(run.measure(run.plan.cell(omega, budget, n_s))):
            typer.echo(f"block {block}: {result['metric']} = {result['distance']:.3f}")

    _run(recipe, set_, out, dry_run, workers, action, budgets)


@app.command(epilog="Example: sims tune digits --set tune.omega='[0,0.5,1,2]'")
def tune(
    recipe: RecipeArg,
    budgets: BudgetsOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Search omega, B and n_s with Ray Tune."""

    def action(run: Any) -> None:
        for best in run.tune()["best"].values():
            strength = "w" if best.get("space") == "weight" else "omega"
            typer.echo(
                f"selected {strength}={best['omega']:g}, B={best['budget_kimg']:g} kimg, n_s={best['n_s']}: "
                f"{best['metric']} = {best['distance']:.3f} on the selection seeds"
            )

    _run(recipe, set_, out, dry_run, workers, action, budgets)


@app.command(epilog="Example: sims config digits --set train.lr=1e-3")
def config(recipe: RecipeArg, set_: SetOption = None) -> None:
    """Print the resolved settings of a recipe."""
    typer.echo(yaml.safe_dump(load_recipe(recipe, set_ or []).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    typer.echo("\n".join(builtin_recipes()))


@app.command("presets")
def presets_() -> None:
    """Show the published models that are built in: network, training, sampling and reported scores."""
    from sims_ray.studies.presets import presets_table

    typer.echo(presets_table(presets()))


def _say(_: None, path: Path) -> None:
    typer.echo(path)
