"""What a training step depends on."""

from __future__ import annotations

from dataclasses import dataclass

from sims_ray.nn.ema import ema_beta, power_beta

EMA = "ema"


@dataclass(frozen=True)
class Optimization:
    """What a step depends on, counts in images.

    Attributes:
        batch_size: global batch.
        lr: Adam learning rate after the ramp.
        lr_rampup_nimg: images of linear ramp from 0.
        ema_halflife_nimg: half-life of the weight average.
        ema_rampup_ratio: half-life over images seen while training is young; None for none.
        P_mean, P_std: ln sigma ~ N(P_mean, P_std^2).
        seed: seed of data order and noise.
        lr_decay_nimg: images after which the learning rate falls as 1 / sqrt(images); 0 for never.
        adam_betas: decay of Adam's moments.
        ema_stds: relative widths of power-function averages, which then take the place of the half-life.
        gradient_limit: infinite gradients become this large, NaN becomes zero (EDM: 1e5; EDM2: 0).
        gradient_clip: longest gradient, as the norm over all parameters; 0 for any.
        loss_scale: factor of the loss, against underflow in float16; Adam does not depend on it.
        augment: probability of each of EDM's augmentations; 0 for none.
        trainable: 'all', or 'decoder' for an auxiliary that shares the base's encoder.
        trainable_resolution: with 'decoder', its layers below this resolution are shared as well.
    """

    batch_size: int
    lr: float
    lr_rampup_nimg: float
    ema_halflife_nimg: float
    ema_rampup_ratio: float | None
    P_mean: float
    P_std: float
    seed: int
    lr_decay_nimg: float = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    ema_stds: tuple[float, ...] = ()
    gradient_limit: float = 1e5
    gradient_clip: float = 0.0
    loss_scale: float = 1.0
    augment: float = 0.0
    trainable: str = "all"
    trainable_resolution: int = 0

    def learning_rate(self, nimg: int) -> float:
        """Learning rate of the step that starts at `nimg` images seen (EDM2, arXiv 2312.02696, eq. 67)."""
        lr = self.lr
        if self.lr_decay_nimg:
            lr /= max(nimg / self.lr_decay_nimg, 1) ** 0.5
        return lr * min(nimg / self.lr_rampup_nimg, 1) if self.lr_rampup_nimg else lr

    @property
    def averages(self) -> dict[str, float | None]:
        """The weight averages by name, with their relative width; None for the one with a half-life."""
        return {f"{EMA}-{std:.3f}": std for std in self.ema_stds} or {EMA: None}

    def ema_decay(self, std: float | None, nimg: int) -> float:
        """Decay of one average in the step that starts at `nimg` images seen."""
        if std is not None:
            return power_beta(std, nimg + self.batch_size, self.batch_size)
        return ema_beta(nimg, self.batch_size, self.ema_halflife_nimg, self.ema_rampup_ratio)
