"""The verbs that show results: the page of a run, several runs side by side, MLflow's pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from sims_ray.cli.options import WorkersOption
from sims_ray.cli.stages import BudgetsOption, DryOption, OutOption, SetOption, run
from sims_ray.errors import SimsError

app = typer.Typer()

RESULT = "result.json"
DATABASE = "mlflow.db"


@app.command(epilog="Example: sims report digits    or: sims report runs/a runs/b --out compared")
def report(
    what: Annotated[list[str], typer.Argument(help="A recipe; or the output folders of finished runs, to compare.")],
    budgets: BudgetsOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    dry_run: DryOption = False,
    workers: WorkersOption = None,
) -> None:
    """Measure the selected model on fresh seeds and write report.html (makes what is missing); or compare runs."""
    finished = [(Path(name) / RESULT).is_file() for name in what]
    if not all(finished) and len(what) == 1:
        run(what[0], budgets, set_, out, dry_run, workers)
        return
    if not all(finished):
        name = what[finished.index(False)]
        raise SimsError(f"{name} is not the folder of a finished run, as it has no {RESULT}; finish it with `sims run`")
    from sims_ray.studies.comparison import compare

    typer.echo(compare([Path(name) for name in what], out or Path("compared")))


@app.command(epilog="Example: sims ui runs/digits")
def ui(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine's loopback.")] = 5000,
) -> None:
    """Open MLflow's pages of a run, for this machine only."""
    database = folder / DATABASE
    if not database.is_file():
        raise SimsError(f"{database} is not there; give the output folder of a run that was tracked without a server")
    words = ["ui", f"--backend-store-uri=sqlite:///{database.resolve()}", "--host=127.0.0.1", f"--port={port}"]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "mlflow", *words], check=False).returncode)
