"""Settings of the network, of base training and of fine-tuning."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import Count, EmaStd, NonNegative, Positive, Precision, Probability, Seed, Settings


class NetworkSettings(Settings):
    """Network with EDM preconditioning; resolution and channels come from the data."""

    architecture: Literal["ddpmpp", "ncsnpp", "adm", "edm2"] = Field(
        "ddpmpp", description="DDPM++, NCSN++ or ADM as in EDM, or EDM2's magnitude-preserving U-Net"
    )
    model_channels: Annotated[int, Field(ge=8, multiple_of=4)] = Field(128, description="base width")
    channel_mult: tuple[Count, ...] = Field(
        (2, 2, 2), min_length=1, description="width multiplier per resolution, highest first"
    )
    num_blocks: Count = Field(4, description="residual blocks per resolution")
    attn_resolutions: tuple[Count, ...] = Field((16,), description="resolutions with self-attention")
    dropout: Probability = 0.13
    conditional: bool = Field(False, description="condition on the class labels of the data")
    label_dropout: Probability = Field(0.0, description="share of labels hidden in training, for guidance by labels")
    channels_per_head: Count = Field(64, description="attention width of adm and edm2")
    sigma_data: Positive = Field(0.5, description="standard deviation of the images in [-1, 1]")
    precision: Precision = Field("float32", description="dtype the network runs in on a GPU")


class OptimizerSettings(Settings):
    """What base training and fine-tuning share: Adam, batch, EMA, noise distribution."""

    batch_size: Count = Field(512, description="global batch; must divide by the number of workers")
    lr: Positive = Field(1e-3, description="Adam learning rate after the ramp")
    lr_rampup_kimg: NonNegative = Field(10_000, description="linear ramp of the learning rate from 0")
    lr_decay_kimg: NonNegative = Field(0, description="lr falls as 1/sqrt(images) from here on (EDM2); 0: constant")
    adam_beta2: Probability = Field(0.999, description="decay of Adam's second moment (EDM2: 0.99)")
    gradient_limit: NonNegative = Field(1e5, description="infinite gradients become this large (EDM2: 0)")
    gradient_clip: NonNegative = Field(0, description="longest gradient, as the norm over all parameters; 0: any")
    loss_scale: Positive = Field(1.0, description="factor of the loss, against underflow in float16 (ADM: 100)")
    augment: Probability = Field(0.0, description="probability of each of EDM's augmentations, told to the network")
    ema_halflife_kimg: Positive = Field(500, description="half-life of the weight average")
    ema_rampup_ratio: Positive | None = Field(0.05, description="half-life over images seen while young; null: none")
    ema_stds: tuple[EmaStd, ...] = Field(
        (), description="power-function averages of these relative widths (EDM2) in place of the half-life"
    )
    ema_std: EmaStd = Field(0.1, description="relative width to reconstruct from them for the snapshots")
    ema_snapshot_kimg: Positive = Field(8_388.608, description="images between stored averages, for ema_stds")
    P_mean: float = Field(-1.2, description="mean of ln sigma in training")
    P_std: Positive = Field(1.2, description="standard deviation of ln sigma in training")
    seed: Seed = Field(0, description="seed of initial weights, data order and training noise")
    checkpoint_kimg: Positive = Field(1_000, description="images between resumable checkpoints")
    log_kimg: Positive = Field(50, description="images between progress lines")
    preview_kimg: Positive | None = Field(
        None, description="images between previews, sampled while training goes on; null: none"
    )
    preview_distance_nimg: Annotated[int, Field(ge=2)] | None = Field(
        None, description="images per preview that a distance to the real ones is measured on; null: no distance"
    )

    @property
    def shows_distance(self) -> bool:
        """Whether previews are measured."""
        return self.preview_kimg is not None and self.preview_distance_nimg is not None

    @model_validator(mode="after")
    def _distinct_averages(self) -> Self:
        if len({round(std, 3) for std in self.ema_stds}) < len(self.ema_stds):  # as their files are named
            raise ValueError(f"ema_stds={list(self.ema_stds)} must not repeat a width")
        return self


class TrainSettings(OptimizerSettings):
    """Base training on the real images."""

    duration_kimg: Positive = Field(200_000, description="images to train for")
    checkpoint: str | None = Field(
        None, description="a base that exists already, like one from `sims import-nvlabs`; nothing is trained then"
    )


class FinetuneSettings(OptimizerSettings):
    """Auxiliary fine-tuning on synthetic images only: by default from the base's EMA weights, Adam anew."""

    start: Literal["ema", "weights"] = Field(
        "ema", description="start from the base's EMA weights, or from those that its training ended with"
    )
    reset_optimizer: bool = Field(True, description="Adam starts anew; false: it goes on with the base's moments")
    dropout: Probability | None = Field(
        None, description="dropout of the auxiliary's training; null: network.dropout; sampling has none"
    )
    budgets_kimg: tuple[Positive, ...] = Field(min_length=1, description="budgets B: a snapshot at each, one run")
    ema_rampup_ratio: Positive | None = None
    trainable: Literal["all", "decoder"] = Field(
        "all", description="'decoder': the encoder stays the base's, so that SIMS runs it once for both"
    )
    trainable_resolution: Annotated[int, Field(ge=0)] = Field(
        0, description="with trainable=decoder: decoder layers below this resolution stay the base's as well"
    )

    @model_validator(mode="after")
    def _decoder_only(self) -> Self:
        if self.trainable_resolution and self.trainable == "all":
            raise ValueError(
                f"trainable_resolution={self.trainable_resolution} is for trainable=decoder; set that, or leave it 0"
            )
        return self

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if any(a >= b for a, b in pairwise(self.budgets_kimg)):
            raise ValueError(f"budgets_kimg={list(self.budgets_kimg)} must increase, like [10, 20, 40]")
        return self
