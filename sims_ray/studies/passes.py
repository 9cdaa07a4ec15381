"""How many network evaluations an image takes, as the sampler itself counts them, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, Evaluations, count_evaluations, record
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import guidance_interval, sims_guidance
from sims_ray.storage.models import SimsModel


def passes(sampler: Mapping[str, Any], model: SimsModel, decoder_only: bool = False) -> Evaluations:
    """Passes through each half of a network that an image takes, as the sampler itself counts them on one pixel.

    Args:
        sampler: sampler settings.
        model: whose guidance counts; its checkpoints are not opened.
        decoder_only: the auxiliary shares the base's encoder.
    """
    guided: Denoiser = _nothing
    if model.omega not in (0, -1):
        guided = _shared_encoder if decoder_only else sims_guidance(_nothing, _nothing, model.omega)
    sigma_hi = math.inf if model.sigma_hi is None else model.sigma_hi
    with count_evaluations() as tally:
        list(generate(guidance_interval(guided, _nothing, model.sigma_lo, sigma_hi), (1, 1, 1), range(1), sampler))
    return tally


def steps_that_take(nfe: float, sampler: Mapping[str, Any]) -> int:
    """The fewest solver steps in which the base takes `nfe` network evaluations per image, or more.

    Args:
        nfe: network evaluations per image.
        sampler: sampler settings, whose number of steps does not matter.
    """
    enough = (steps for steps in count(1) if passes({**sampler, "num_steps": steps}, SimsModel("")).nfe >= nfe)
    return next(enough)


def _nothing(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """A denoiser that costs no time."""
    return torch.zeros_like(x)


def _shared_encoder(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """One that costs none either, counted as guidance with a shared encoder."""
    record(encoders=1, decoders=2)
    return torch.zeros_like(x)
