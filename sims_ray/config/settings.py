"""Every setting: one frozen pydantic model per stage."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEED_LIMIT = 2**32  # per-image generators take 32-bit seeds (the limit of diffusion.noise)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Probability = Annotated[float, Field(ge=0, lt=1)]
EmaStd = Annotated[float, Field(gt=0, le=0.28)]
Precision = Literal["float32", "bfloat16", "float16"]
Omega = Annotated[float, Field(ge=-1, le=20)]


class Settings(BaseModel):
    """Base of every settings model: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Settings):
    """Where the real images come from."""

    path: str = Field("digits", description="'digits' (embedded) or a sample table made by `sims data import`")


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

    @model_validator(mode="after")
    def _heads(self) -> Self:
        lowest = self.model_channels * self.channel_mult[-1]
        if self.architecture in ("adm", "edm2") and lowest < self.channels_per_head:
            raise ValueError(
                f"channels_per_head={self.channels_per_head} exceeds the {lowest} channels of the lowest resolution, "
                f"which would be left without attention; lower it, or widen the network"
            )
        return self


class OptimizerSettings(Settings):
    """What base training and fine-tuning share: Adam, batch, EMA, noise distribution."""

    batch_size: Count = Field(512, description="global batch; must divide by the number of workers")
    lr: Positive = Field(1e-3, description="Adam learning rate after the ramp")
    lr_rampup_kimg: NonNegative = Field(10_000, description="linear ramp of the learning rate from 0")
    lr_decay_kimg: NonNegative = Field(0, description="lr falls as 1/sqrt(images) from here on (EDM2); 0: constant")
    adam_beta2: Probability = Field(0.999, description="decay of Adam's second moment (EDM2: 0.99)")
    gradient_limit: NonNegative = Field(1e5, description="infinite gradients become this large (EDM2: 0)")
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

    @model_validator(mode="after")
    def _distinct_averages(self) -> Self:
        if len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError(f"ema_stds={list(self.ema_stds)} must not repeat a width")
        return self


class TrainSettings(OptimizerSettings):
    """Base training on the real images."""

    duration_kimg: Positive = Field(200_000, description="images to train for")
    checkpoint: str | None = Field(
        None, description="a base that exists already, like one from `sims import-nvlabs`; nothing is trained then"
    )


class FinetuneSettings(OptimizerSettings):
    """Auxiliary fine-tuning from the base's EMA weights on synthetic images only; fresh Adam state."""

    budgets_kimg: tuple[Positive, ...] = Field(min_length=1, description="budgets B: a snapshot at each, one run")
    ema_rampup_ratio: Positive | None = None
    trainable: Literal["all", "decoder"] = Field(
        "all", description="'decoder': the encoder stays the base's, so that SIMS runs it once for both"
    )

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if any(a >= b for a, b in pairwise(self.budgets_kimg)):
            raise ValueError(f"budgets_kimg={list(self.budgets_kimg)} must increase, like [10, 20, 40]")
        return self


class SamplerSettings(Settings):
    """How images are drawn from a model."""

    solver: Literal["heun", "euler", "ddim", "ddpm"] = Field("heun", description="heun and euler know S_churn")
    state_dtype: Literal["float64", "float32"] = Field("float64", description="of the image between steps")
    num_steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    S_churn: NonNegative = 0.0
    S_min: NonNegative = 0.0
    S_max: NonNegative = 1e9
    S_noise: Positive = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}")
        if self.S_min > self.S_max:
            raise ValueError(f"S_min={self.S_min:g} must not exceed S_max={self.S_max:g}")
        if self.S_churn and self.solver not in ("heun", "euler"):
            raise ValueError(f"S_churn={self.S_churn:g} means nothing to solver={self.solver}; set it to 0")
        return self


class GuidanceSettings(Settings):
    """Where SIMS guidance acts; its strength is searched."""

    sigma_lo: NonNegative = Field(0.0, description="no guidance at noise levels up to this one")
    sigma_hi: Positive | None = Field(None, description="no guidance at noise levels above this one; null: no limit")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.sigma_hi is not None and self.sigma_lo >= self.sigma_hi:
            raise ValueError(f"sigma_lo={self.sigma_lo:g} must be below sigma_hi={self.sigma_hi:g}")
        return self


class SynthesizeSettings(Settings):
    """The synthetic set S; its prefixes are the smaller sets."""

    shard_nimg: Count = Field(8192, description="images per Parquet file, the unit of work")


class FeatureSettings(Settings):
    """What distances are measured in."""

    kind: Literal["classifier", "pixels"] = Field(
        "classifier", description="'classifier': trained on the real images' labels; 'pixels': raw pixels"
    )
    feature_dim: Annotated[int, Field(ge=2)] = 64
    width: Count = 32
    steps: Count = 600
    batch_size: Count = 128
    lr: Positive = 1e-3
    seed: Seed = 0


class EvaluateSettings(Settings):
    """The reported distance."""

    n_images: Annotated[int, Field(ge=2)] = Field(50_000, description="images per report block")
    blocks: Count = Field(3, description="disjoint seed blocks; the spread over them is reported")
    part_nimg: Count = Field(1_000, description="images per unit of work")


class TuneSettings(Settings):
    """The search over guidance strength, budget (finetune.budgets_kimg) and synthetic-set size."""

    omega: tuple[Omega, ...] = Field(min_length=1, description="guidance strengths")
    n_s: tuple[Count, ...] = Field(min_length=1, description="synthetic-set sizes; prefixes of the largest")
    n_images: Annotated[int, Field(ge=2)] = Field(10_000, description="images per trial, on the selection seeds")

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if not any(omega > 0 for omega in self.omega):
            raise ValueError(f"omega={list(self.omega)} needs a value above 0, or there is nothing to choose")
        for name in ("omega", "n_s"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must not repeat a value")
        return self


class SeedSettings(Settings):
    """First seed of each disjoint range."""

    synthesis: Seed = 0
    selection: Seed = 1_000_000_000
    report: Seed = 2_000_000_000
    preview: Seed = 3_000_000_000
    preview_nimg: Count = Field(64, description="images per preview grid")


class ComputeSettings(Settings):
    """Where the work runs; changes what is computed by float rounding only, and by the masks of dropout."""

    num_workers: Annotated[int, Field(ge=0)] = Field(2, description="training workers and sampling actors; 0: no Ray")
    cpus_per_worker: Positive = 1
    gpus_per_worker: NonNegative = 0
    sampling_batch: Count = Field(250, description="images per network call in sampling")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the network; auto: network.precision on a GPU, float32 on a CPU"
    )
    compile: bool = Field(False, description="compile the network for sampling; pays off on a GPU")
    max_failures: Annotated[int, Field(ge=-1)] = Field(3, description="restarts after lost workers; -1: no limit")
    dashboard: bool = Field(False, description="serve the Ray dashboard of a local cluster")
    object_store_mb: Annotated[int, Field(ge=80)] = Field(500, description="object store of a local cluster")


class TrackingSettings(Settings):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(None, description="tracking server; null: SQLite in the output folder")
    experiment: str = "sims"


class Recipe(Settings):
    """Everything a run needs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
    data: DataSettings = DataSettings()
    network: NetworkSettings = NetworkSettings()
    train: TrainSettings
    finetune: FinetuneSettings
    sampler: SamplerSettings = SamplerSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    synthesize: SynthesizeSettings = SynthesizeSettings()
    features: FeatureSettings = FeatureSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    tune: TuneSettings
    seeds: SeedSettings = SeedSettings()
    compute: ComputeSettings = ComputeSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        workers = max(self.compute.num_workers, 1)
        for name, stage in (("train", self.train), ("finetune", self.finetune)):
            if stage.batch_size % workers:
                raise ValueError(
                    f"{name}.batch_size={stage.batch_size} must divide by compute.num_workers={workers}; change either"
                )
            if stage.augment and self.network.architecture == "edm2":
                raise ValueError(f"{name}.augment={stage.augment:g}: edm2 is not told augmentations; set it to 0")
        self.seed_ledger()
        return self

    def seed_ledger(self) -> dict[str, range]:
        """Seed range of every use; the ranges are disjoint and below 2**32.

        Raises:
            ValueError: two ranges overlap, or one passes the limit.
        """
        report_nimg = self.evaluate.n_images * self.evaluate.blocks
        sizes = {
            "synthesis": max(self.tune.n_s),
            "selection": self.tune.n_images,
            "report": report_nimg,
            "preview": self.seeds.preview_nimg,
        }
        ledger = {use: range(getattr(self.seeds, use), getattr(self.seeds, use) + n) for use, n in sizes.items()}
        in_order = sorted(ledger.items(), key=lambda item: item[1].start)
        for (use, seeds), (next_use, next_seeds) in pairwise(in_order):
            if seeds.stop > next_seeds.start:
                raise ValueError(
                    f"seeds {seeds.start}..{seeds.stop - 1} of {use} overlap {next_seeds.start}..{next_seeds.stop - 1} "
                    f"of {next_use}; move seeds.{next_use} to {seeds.stop} or beyond"
                )
        if in_order[-1][1].stop > SEED_LIMIT:
            raise ValueError(f"seeds.{in_order[-1][0]} ends beyond {SEED_LIMIT - 1}; start it lower")
        return ledger
