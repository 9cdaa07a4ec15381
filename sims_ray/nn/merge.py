"""Extrapolation in weight space: Neon (arXiv 2510.03597)."""

from __future__ import annotations

import copy
import math

import torch

from sims_ray.nn.precond import Precond


@torch.no_grad()
def merge(base: Precond, aux: Precond, w: float) -> Precond:
    """A network with the weights theta_base - w (theta_aux - theta_base), computed in float32 (Neon, Algorithm 1).

    Buffers come from the base. w = 0 gives the base, w = -1 the auxiliary, each bit for bit. For a network linear
    in its parameters this is SIMS with omega = w; for others the two differ in second order of the drift. EDM2
    normalises its weights in every pass, so that of a merged EDM2 weight only the direction counts, per output
    channel; its gains are extrapolated as they are.

    Raises:
        ValueError: the networks have different parameters, or w is not finite.
    """
    if not math.isfinite(w):
        raise ValueError(f"w = {w} is not a strength; choose a finite one")
    if base.sigma_data != aux.sigma_data:
        raise ValueError(f"the networks differ: sigma_data is {base.sigma_data:g} and {aux.sigma_data:g}")
    merged = copy.deepcopy(base)
    merged.uncompile_network()
    ours, theirs = dict(merged.named_parameters()), dict(aux.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            found = [tuple(p[name].shape) if name in p else "absent" for p in (ours, theirs)]
            raise ValueError(
                f"the networks differ: {name} is {found[0]} in the base and {found[1]} in the auxiliary; "
                f"merge a base with an auxiliary fine-tuned from it"
            )
    for name, weight in ours.items():
        if w == 0:
            continue
        other = theirs[name].to(torch.float32)
        ours_32 = weight.to(torch.float32)
        weight.copy_(other if w == -1 else ours_32 - w * (other - ours_32))
    return merged
