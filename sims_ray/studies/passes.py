"""How many network evaluations an image takes, as the sampler itself counts them, before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, Evaluations, count_evaluations, record
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import guidance_interval, sims_guidance
from sims_ray.storage.models import SCORE, SimsModel


def passes(sampler: Mapping[str, Any], model: SimsModel, decoder_only: bool = False) -> Evaluations:
    """Passes through each half of a network that an image takes, as the sampler itself counts them on one pixel.

    Args:
        sampler: sampler settings.
        model: whose guidance counts; its checkpoints are not opened.
        decoder_only: the auxiliary shares the base's encoder.
    """
    guided = model.omega not in (0, -1) and model.space == SCORE
    interval = (model.sigma_lo, model.sigma_hi) if guided else None
    return _passes(json.dumps(sampler, sort_keys=True), interval, guided and decoder_only)


def steps_that_take(nfe: float, sampler: Mapping[str, Any]) -> int:
    """The fewest solver steps in which the base takes `nfe` network evaluations per image, or more.

    Args:
        nfe: network evaluations per image.
        sampler: sampler settings, whose number of steps does not matter: every step but the last costs the same.
    """
    one, two = (passes({**sampler, "num_steps": steps}, SimsModel("")).nfe for steps in (1, 2))
    return 1 + max(0, math.ceil((nfe - one) / (two - one)))


@cache
def _passes(sampler: str, interval: tuple[float, float | None] | None, decoder_only: bool) -> Evaluations:
    denoiser: Denoiser = _nothing
    if interval is not None:
        sigma_lo, sigma_hi = interval
        guided = _shared_encoder if decoder_only else sims_guidance(_nothing, _nothing, 1.0)
        denoiser = guidance_interval(guided, _nothing, sigma_lo, math.inf if sigma_hi is None else sigma_hi)
    with count_evaluations() as tally:
        list(generate(denoiser, (1, 1, 1), range(1), json.loads(sampler)))
    return tally


def _nothing(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """A denoiser that costs no time."""
    return torch.zeros_like(x)


def _shared_encoder(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """One that costs none either, counted as guidance with a shared encoder."""
    record(encoders=1, decoders=2)
    return torch.zeros_like(x)
