"""The `sims` command: thin, one function per verb."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence

import typer

from sims_ray.cli import data, latents, measure, models, plan, report, stages, synthesis
from sims_ray.errors import SimsError

FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 130  # the shell's exit code after Ctrl-C

app = typer.Typer(
    name="sims",
    help="Self-improving diffusion models with synthetic data (SIMS), on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(stages.app)
app.add_typer(report.app)
app.add_typer(models.app)
app.add_typer(plan.app)
app.add_typer(measure.app)
data.app.add_typer(synthesis.app)
data.app.add_typer(latents.app)
app.add_typer(data.app, name="data")
app.add_typer(models.checkpoint_app, name="checkpoint")


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
        advice = "free space and run the same command again" if error.errno in FULL else "make it accessible"
        typer.echo(f"error: {error.filename or 'storage'}: {error.strerror or error}; {advice}", err=True)
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
