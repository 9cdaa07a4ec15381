"""Guidance: functions from denoisers to a denoiser, combinable with each other.

All are D = D_main + w (D_main - D_guide): SIMS steers away from a self-trained copy, autoguidance from a weaker
model, classifier-free guidance from the same model without its label. The scale w is 0 for no guidance here;
papers that write D = w D_main + (1 - w) D_guide call the same thing w + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, at_step, evaluate, record
from sims_ray.nn.networks import UNCERTAINTY, decoder_parameters
from sims_ray.nn.precond import Precond


@dataclass(frozen=True)
class Extrapolation:
    """D = D_main + weight (D_main - D_guide); two network evaluations."""

    main: Denoiser
    guide: Denoiser
    weight: float

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise x [B, C, H, W] at sigma [B]."""
        d_main = evaluate(self.main, x, sigma, labels)
        return d_main + self.weight * (d_main - evaluate(self.guide, x, sigma, labels))

    def at_step(self, sigma: float) -> Denoiser:
        """The extrapolation of what both denoisers are in this step."""
        return replace(self, main=at_step(self.main, sigma), guide=at_step(self.guide, sigma))


@dataclass(frozen=True)
class Interval:
    """One denoiser for sigma in (sigma_lo, sigma_hi], another elsewhere."""

    inside: Denoiser
    outside: Denoiser
    sigma_lo: float
    sigma_hi: float

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise each image at its own sigma; samplers decide once per step instead, by `at_step`."""
        within = ((sigma > self.sigma_lo) & (sigma <= self.sigma_hi)).expand(x.shape[0])
        if within.all():
            return evaluate(self.inside, x, sigma, labels)
        if not within.any():
            return evaluate(self.outside, x, sigma, labels)
        mask = within.reshape(-1, *[1] * (x.ndim - 1))
        inside, outside = (evaluate(denoiser, x, sigma, labels) for denoiser in (self.inside, self.outside))
        return torch.where(mask, inside, outside)

    def at_step(self, sigma: float) -> Denoiser:
        """One of the two."""
        return at_step(self.inside if self.sigma_lo < sigma <= self.sigma_hi else self.outside, sigma)


@dataclass(frozen=True)
class SharedEncoder:
    """Extrapolation of two networks that differ in their decoders only: one encoder pass, two decoder passes.

    The first `layers` layers of the decoder are the same too and run once. They are counted with the decoder.
    """

    base: Precond
    aux: Precond
    weight: float
    layers: int = 0

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise x [B, C, H, W] at sigma [B]."""
        features = self.base.encode(x, sigma, labels, self.layers)
        d_base = self.base.decode(features)
        record(encoders=1, decoders=2)
        return d_base + self.weight * (d_base - self.aux.decode(features))


@dataclass(frozen=True)
class Unlabelled:
    """A conditional denoiser that is never told the label."""

    denoiser: Denoiser

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise x [B, C, H, W] at sigma [B] without a label."""
        return evaluate(self.denoiser, x, sigma, None)

    def at_step(self, sigma: float) -> Denoiser:
        """The same for what the denoiser is in this step."""
        return Unlabelled(at_step(self.denoiser, sigma))


def sims_guidance(base: Denoiser, aux: Denoiser | None, omega: float) -> Denoiser:
    """Extrapolate away from the self-trained auxiliary: D = (1 + omega) D_base - omega D_aux.

    SIMS, arXiv 2408.16333, Algorithm 1 step 4, in denoiser space (D = x + sigma^2 * score, affine, so the
    coefficients are those of the score). omega = 0 returns the base and never calls the auxiliary;
    omega = -1 returns the auxiliary. Costs two evaluations.

    Raises:
        ValueError: omega != 0 without an auxiliary.
    """
    if omega == 0:
        return base
    if aux is None:
        raise ValueError(f"omega = {omega:g} needs an auxiliary model; give one, or set omega = 0 for the base alone")
    return aux if omega == -1 else Extrapolation(base, aux, omega)


def shared_encoder_guidance(base: Precond, aux: Precond, omega: float) -> Denoiser:
    """SIMS with an auxiliary whose decoder alone was fine-tuned: the encoder runs once, 1.5 evaluations.

    SIMS, arXiv 2408.16333, App. A ("decoder-only"). omega = 0 returns the base, omega = -1 the auxiliary. Decoder
    layers that are equal in both, from the lowest resolution on, run once as well.

    Raises:
        ValueError: the two networks differ outside their decoders.
    """
    if different := encoder_difference(base, aux):
        raise ValueError(
            f"the networks differ in {different}, outside their decoders; "
            f"fine-tune the decoder alone to share the encoder, or use sims_guidance"
        )
    if omega in (0, -1):
        return aux if omega else base
    return SharedEncoder(base, aux, omega, _equal_layers(base, aux))


def encoder_difference(base: Precond, aux: Precond) -> str | None:
    """Name of the first tensor outside the decoder, by the alphabet, in which two networks differ, or None."""
    if base.sigma_data != aux.sigma_data:
        return "sigma_data"
    own, others = base.state_dict(), aux.state_dict()
    decoder = decoder_parameters(base)
    for name in sorted((own.keys() | others.keys()) - decoder):
        if name.startswith(UNCERTAINTY):  # plays no part in denoising
            continue
        if name not in own or name not in others or not torch.equal(own[name], others[name]):
            return name
    return None


def _equal_layers(base: Precond, aux: Precond) -> int:
    """How many layers the two decoders have in common before the first difference."""
    pairs = zip(base.network.dec.values(), aux.network.dec.values(), strict=True)
    count = 0
    for ours, theirs in pairs:
        others = theirs.state_dict()
        if not all(torch.equal(tensor, others[name]) for name, tensor in ours.state_dict().items()):
            break
        count += 1
    return count


def autoguidance(main: Denoiser, guide: Denoiser | None, scale: float) -> Denoiser:
    """Guide a model by a weaker version of itself: D = scale D_main + (1 - scale) D_guide (arXiv 2406.02507).

    The guide is a smaller network trained more briefly on the same data and labels. scale = 1 returns the main
    model and never calls the guide.

    Raises:
        ValueError: scale != 1 without a guide.
    """
    if scale == 1:
        return main
    if guide is None:
        raise ValueError(f"a guidance scale of {scale:g} needs a guide; give one, or set the scale to 1")
    return Extrapolation(main, guide, scale - 1)


def classifier_free_guidance(conditional: Denoiser, scale: float, unconditional: Denoiser | None = None) -> Denoiser:
    """Steer away from the unlabelled answer: D = scale D(x, label) + (1 - scale) D(x) (arXiv 2207.12598).

    `unconditional` defaults to the conditional model without its label, which must have been trained with
    label dropout. scale = 1 returns the conditional model.
    """
    return autoguidance(conditional, Unlabelled(unconditional or conditional), scale)


def guidance_interval(
    guided: Denoiser, unguided: Denoiser, sigma_lo: float = 0.0, sigma_hi: float = math.inf
) -> Denoiser:
    """Guide for sigma in (sigma_lo, sigma_hi] only (arXiv 2404.07724); elsewhere the guide is not evaluated.

    The sampler decides once per step, by the noise level the step starts from; both evaluations of a Heun step
    follow. The whole range returns `guided` itself.

    Raises:
        ValueError: an empty interval.
    """
    if sigma_lo >= sigma_hi:
        raise ValueError(f"the guidance interval ({sigma_lo:g}, {sigma_hi:g}] is empty; sigma_lo must be the smaller")
    if guided is unguided or (sigma_lo <= 0 and sigma_hi == math.inf):
        return guided
    return Interval(guided, unguided, sigma_lo, sigma_hi)
