"""The verbs on models: sample from them, merge them, bring them in, look into their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from sims_ray.cli.latents import LatentsOption, VaeOption
from sims_ray.cli.options import (
    AuxOption,
    BaseOption,
    ModelChoice,
    ModelOption,
    OmegaOption,
    PresetOption,
    RunOption,
    SigmaHiOption,
    SigmaLoOption,
    StepsOption,
)

app = typer.Typer()
checkpoint_app = typer.Typer(
    help="Checkpoints: look into them, check them, convert them.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(epilog="Example: sims sample grid.png --run runs/digits --model SIMS --n 64")
def sample(
    target: Annotated[Path, typer.Argument(help="A .png for a grid, otherwise a folder of PNG files.")],
    run: RunOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    aux: AuxOption = None,
    omega: OmegaOption = None,
    n: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others follow.")] = 0,
    steps: StepsOption = None,
    solver: Annotated[
        Literal["heun", "euler", "ddim", "ddpm"] | None, typer.Option(help="Default that of the run, or heun.")
    ] = None,
    preset: PresetOption = None,
    sigma_lo: SigmaLoOption = 0.0,
    sigma_hi: SigmaHiOption = None,
    vae: VaeOption = None,
    latents: LatentsOption = None,
) -> None:
    """Sample images from a model of a finished run, or from checkpoints."""
    choice = ModelChoice(run, model, base, aux, omega, sigma_lo, sigma_hi, preset)
    source, sampler = choice.open("sims sample", "SIMS", num_steps=steps, solver=solver)
    from sims_ray.studies.sample import sample_images

    nfe = sample_images(target, source, range(seed, seed + n), sampler, vae, latents)
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
