"""Averages of weights over training: with a half-life (EDM), or power-function with post-hoc reconstruction (EDM2)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

LONGEST_STD = 0.28  # the flattest profile, gamma = 0, has a relative width of 1 / sqrt(12) = 0.2887


def ema_beta(nimg: int, batch_size: int, halflife_nimg: float, rampup_ratio: float | None) -> float:
    """Decay of one step: 0.5**(batch_size / h), h = min(halflife_nimg, rampup_ratio * nimg).

    With a ramp-up ratio the average is short while training is young, so that the random initial weights
    are forgotten (EDM, arXiv 2206.00364, App. F.2; `nimg` counts the images before this step).
    """
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return float(0.5 ** (batch_size / max(halflife_nimg, 1e-8)))


def power_exponent(std: float) -> float:
    """Exponent gamma of the profile p(t) ~ t^gamma whose relative width is `std`: the inverse of `power_std`.

    The largest real root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + (12 - std^-2)
    (EDM2, arXiv 2312.02696, eq. 126).

    Raises:
        ValueError: a width outside (0, 0.28].
    """
    if not 0 < std <= LONGEST_STD:
        raise ValueError(f"an EMA of relative width {std:g} does not exist; choose one above 0, up to {LONGEST_STD:g}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def power_std(gamma: float) -> float:
    """Relative width of the profile p(t) ~ t^gamma on [0, 1] (EDM2 eq. 123)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def power_beta(std: float, nimg: float, batch_size: float) -> float:
    """Decay of the step that ends at `nimg` images seen: (1 - batch_size / nimg)^(gamma + 1) (EDM2 eq. 127)."""
    return float((1 - batch_size / nimg) ** (power_exponent(std) + 1))


def posthoc_weights(in_nimg: ArrayLike, in_std: ArrayLike, out_nimg: float, out_std: float) -> NDArray[np.float64]:
    """Weights [N] of N stored averages whose sum comes closest to an average of another length (EDM2 App. C.3).

    Args:
        in_nimg: images seen at each stored average, [N].
        in_std: relative width of each, [N].
        out_nimg: end of the average to reconstruct, in images seen.
        out_std: its relative width.

    Raises:
        ValueError: lengths differ, an average is given twice, or the end lies beyond every stored one.
    """
    t = np.asarray(in_nimg, dtype=np.float64)
    stds = np.asarray(in_std, dtype=np.float64)
    if t.shape != stds.shape or t.ndim != 1 or not len(t):
        raise ValueError(f"{t.shape} ends and {stds.shape} widths do not describe the same averages; give one of each")
    if len(set(zip(t, stds, strict=True))) < len(t):
        raise ValueError("a stored average is given twice; leave one out")
    if out_nimg > t.max():
        raise ValueError(f"no stored average reaches {out_nimg:,.0f} images; the last one ends at {t.max():,.0f}")
    gamma = np.array([power_exponent(std) for std in stds])
    matrix = _correlation(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    target = _correlation(t, gamma, np.array(float(out_nimg)), np.array(power_exponent(out_std)))
    weights = np.linalg.solve(matrix, target)
    return np.asarray(weights / weights.sum())


def _correlation(
    t_a: NDArray[np.float64], g_a: NDArray[np.float64], t_b: NDArray[np.float64], g_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Inner product of two power-function profiles (EDM2 eq. 151)."""
    exponent = np.where(t_a < t_b, g_b, -g_a)
    ratio = (t_a / t_b) ** exponent
    return np.asarray((g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b)))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """Move every parameter of `ema` to beta * ema + (1 - beta) * net; copy the buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
    for target, source in zip(ema.buffers(), net.buffers(), strict=True):
        target.copy_(source)
