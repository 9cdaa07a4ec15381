"""Guidance: functions from denoisers to a denoiser."""

from torch import Tensor

from sims_ray.diffusion.sampler import Denoiser


def sims_guidance(base: Denoiser, aux: Denoiser | None, omega: float) -> Denoiser:
    """Extrapolate away from the self-trained auxiliary: D = (1 + omega) D_base - omega D_aux.

    SIMS, arXiv 2408.16333, Algorithm 1 step 4, in denoiser space (D = x + sigma^2 * score, affine, so the
    coefficients are those of the score). omega = 0 returns the base and never calls the auxiliary;
    omega = -1 returns the auxiliary.

    Raises:
        ValueError: omega != 0 without an auxiliary.
    """
    if omega == 0:
        return base
    if aux is None:
        raise ValueError(f"omega = {omega:g} needs an auxiliary model; give one, or set omega = 0 for the base alone")
    if omega == -1:
        return aux

    def guided(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        d_base = base(x, sigma, labels)
        return d_base + omega * (d_base - aux(x, sigma, labels))

    return guided
