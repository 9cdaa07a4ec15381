"""The published models in one table."""

from __future__ import annotations

from collections.abc import Mapping

from sims_ray.config import Preset, Recipe, load_recipe, preset_network
from sims_ray.nn.networks import describe_network, num_parameters
from sims_ray.studies.console import align

HEADER = (
    "preset", "data", "network", "params", "images", "batch", "lr", "dropout", "augment", "EMA", "precision", "steps",
    "NFE", "FID", "SIMS FID", "SIMS at",
)  # fmt: skip
NOTE = (
    "images: base training; NFE: network evaluations per image of the base, twice as many for SIMS; FID: as published "
    "for the base; SIMS: as published, where it was. Use a name as a recipe: sims run NAME --set data.path=TABLE"
)


def presets_table(known: Mapping[str, Preset]) -> str:
    """One line per published model: network, training, sampling, reported scores."""
    rows = [_row(preset, load_recipe(name)) for name, preset in known.items()]
    return f"{align([HEADER, *rows])}\n{NOTE}"


def _row(preset: Preset, recipe: Recipe) -> tuple[str, ...]:
    network, train, sampler = recipe.network, recipe.train, recipe.sampler
    params = num_parameters(describe_network(preset_network(preset.name))) / 1e6
    ema = f"half-life {train.ema_halflife_kimg / 1000:g}M"
    if train.ema_stds:  # a width that is ours, not published, is not shown
        ema = f"std {train.ema_std:.3f}" if "ema_std" in preset.recipe["train"] else "-"
    published = preset.published
    return (
        preset.name,
        preset.dataset,
        f"{network.architecture} {network.model_channels}{' cond' if network.conditional else ''}",
        f"{params:.1f}M",
        f"{train.duration_kimg / 1000:.0f}M",
        str(train.batch_size),
        f"{train.lr:g}",
        f"{network.dropout:g}",
        f"{train.augment:g}",
        ema,
        network.precision,
        str(sampler.num_steps),
        str(2 * sampler.num_steps - 1),
        *("-" if published[key] is None else str(published[key]) for key in ("fid", "sims_fid", "sims")),
    )
