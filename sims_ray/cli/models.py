"""The verbs on models: sample from them, merge them, bring them in, look into their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from sims_ray.errors import SimsError

app = typer.Typer()
checkpoint_app = typer.Typer(
    help="Checkpoints: look into them, check them, convert them.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(epilog="Example: sims sample grid.png --run runs/digits --model SIMS --n 64")
def sample(
    target: Annotated[Path, typer.Argument(help="A .png for a grid, otherwise a folder of PNG files.")],
    run: Annotated[Path | None, typer.Option(help="Output folder of a finished run.")] = None,
    model: Annotated[str, typer.Option(help="With --run: base, auxiliary or SIMS, as selected there.")] = "SIMS",
    base: Annotated[Path | None, typer.Option(help="Instead of --run: checkpoint of the base.")] = None,
    aux: Annotated[Path | None, typer.Option(help="With --base: checkpoint of the auxiliary.")] = None,
    omega: Annotated[float | None, typer.Option(help="With --aux: guidance strength; 0 is the base.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others follow.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps; default those of the run, or 18.")] = None,
    solver: Annotated[
        Literal["heun", "euler", "ddim", "ddpm"] | None, typer.Option(help="Default that of the run, or heun.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="With --base: sample as this published model does.")] = None,
    sigma_lo: Annotated[float, typer.Option(help="With --base: guide at noise levels above this one only.")] = 0.0,
    sigma_hi: Annotated[
        float | None, typer.Option(help="With --base: guide at noise levels up to this one only.")
    ] = None,
) -> None:
    """Sample images from a model of a finished run, or from checkpoints."""
    if (run is None) == (base is None):
        raise SimsError("sims sample needs either --run FOLDER or --base CHECKPOINT; give one of them")
    guided = aux is not None or omega is not None or sigma_lo or sigma_hi is not None or preset is not None
    if run is not None and guided:
        raise SimsError("--aux, --omega, --sigma-* and --preset go with --base; with --run choose by --model")
    if (aux is None) != (omega is None):
        raise SimsError("--aux and --omega go together; give the auxiliary and the guidance strength, or neither")
    from sims_ray.config import SamplerSettings
    from sims_ray.storage.models import SimsModel
    from sims_ray.studies.sample import model_of_run, sample_images, sampler_of_preset

    if base is not None:
        source = SimsModel.of(base, aux, omega or 0.0, sigma_lo, sigma_hi)
        sampler = sampler_of_preset(preset) if preset else SamplerSettings()
    else:
        source, sampler = model_of_run(run or Path(), model)
    chosen = {"num_steps": steps, "solver": solver}
    sampler = sampler.model_copy(update={key: value for key, value in chosen.items() if value is not None})
    nfe = sample_images(target, source, range(seed, seed + n), sampler)
    typer.echo(f"{target}: {n} images, {nfe:g} network evaluations each")


@app.command(epilog="Example: sims merge base.safetensors aux.safetensors neon.safetensors --w 1")
def merge(
    base: Annotated[Path, typer.Argument(help="Checkpoint of the base.")],
    aux: Annotated[Path, typer.Argument(help="Checkpoint of the auxiliary, fine-tuned from that base.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write; must not exist.")],
    w: Annotated[float, typer.Option(help="Strength: 0 is the base, -1 the auxiliary.")] = 1.0,
) -> None:
    """Merge base and auxiliary into one network by Neon: theta = theta_base - w (theta_aux - theta_base)."""
    from sims_ray.storage.conversion import merge_checkpoints

    card = merge_checkpoints(base, aux, out, w)
    if card["network"].get("architecture") == "edm2_unet":
        typer.echo("note: EDM2 normalises its weights in every pass, so only their directions were extrapolated")
    typer.echo(out)


@app.command("import-nvlabs", epilog="Example: sims import-nvlabs edm2-img64-s-1073741-0.075.pkl base.safetensors")
def import_nvlabs_(
    file: Annotated[Path, typer.Argument(help="EDM or EDM2 snapshot, a .pkl.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, a .safetensors; must not exist.")],
) -> None:
    """Bring in a snapshot of EDM or EDM2 without running any code that it contains."""
    from sims_ray.storage.nvlabs import import_nvlabs

    card = import_nvlabs(file, out)
    typer.echo(f"{out}: {card['num_parameters'] / 1e6:.1f} M parameters; licence: {card['licence']}")


@checkpoint_app.command("show", epilog="Example: sims checkpoint show base.safetensors")
def show(file: Annotated[Path, typer.Argument(help="Checkpoint.")]) -> None:
    """Print the card and the size of a checkpoint."""
    from sims_ray.storage.conversion import describe_checkpoint

    typer.echo(yaml.safe_dump(describe_checkpoint(file), sort_keys=False), nl=False)


@checkpoint_app.command("verify", epilog="Example: sims checkpoint verify base.safetensors")
def verify(files: Annotated[list[Path], typer.Argument(help="Checkpoints.")]) -> None:
    """Check that checkpoints are whole, finite, fit their cards and have the digest their manifest gives."""
    from sims_ray.storage.conversion import verify_checkpoint

    for file in files:
        typer.echo(f"{file}: {verify_checkpoint(file)}")


@checkpoint_app.command("convert", epilog="Example: sims checkpoint convert weights.pt out.safetensors --preset NAME")
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint, or a bare state dict (.pt, .pth, .safetensors).")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, a .safetensors; must not exist.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Store the weights in this dtype.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="For a bare state dict: whose network it is.")] = None,
) -> None:
    """Change the dtype of a checkpoint, or make one from a bare state dict of a known network."""
    from sims_ray.storage.conversion import convert_checkpoint

    convert_checkpoint(source, out, dtype, preset)
    typer.echo(out)


@checkpoint_app.command("reconstruct", epilog="Example: ... out.safetensors average-*.safetensors --std 0.1")
def reconstruct_(
    out: Annotated[Path, typer.Argument(help="Checkpoint to write; must not exist.")],
    files: Annotated[list[Path], typer.Argument(help="Stored power-function averages of one run.")],
    std: Annotated[float, typer.Option(help="Relative width of the average to reconstruct.")],
    kimg: Annotated[float | None, typer.Option(help="Where it ends; default at the last stored one.")] = None,
) -> None:
    """Reconstruct an average of any length from stored ones, after training (EDM2)."""
    from sims_ray.storage.conversion import new_checkpoint
    from sims_ray.storage.posthoc import reconstruct

    tensors, card = reconstruct(files, std, None if kimg is None else round(kimg * 1000))
    new_checkpoint(out, tensors, card)
    typer.echo(out)
