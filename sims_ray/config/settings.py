"""Every setting: one frozen pydantic model per stage."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import SEED_LIMIT, Count, NonNegative, Positive, Seed, Settings
from sims_ray.config.evaluation import EvaluateSettings, FeatureSettings
from sims_ray.config.labels import LabelSettings
from sims_ray.config.sampling import GuidanceSettings, SamplerSettings
from sims_ray.config.search import TuneSettings
from sims_ray.config.training import FinetuneSettings, NetworkSettings, TrainSettings


class DataSettings(Settings):
    """Where the real images come from."""

    path: str = Field("digits", description="'digits' (embedded) or a sample table made by `sims data import`")
    reading: Literal["auto", "resident", "streaming"] = Field(
        "auto",
        description="how training reads a set; resident: it lies in memory, once per node; streaming: a window of it "
        "does; auto: resident where it fills at most half of the memory. The results are the same",
    )


class SynthesizeSettings(Settings):
    """The synthetic set S; its prefixes are the smaller sets."""

    shard_nimg: Count | None = Field(
        None, description="images per Parquet file, the unit of work; null: what a worker makes in 150 s"
    )
    root: str | None = Field(
        None, description="folder or URI (s3://bucket/sets) that S is put in; null: the output folder"
    )
    labels: LabelSettings = LabelSettings()


class SeedSettings(Settings):
    """First seed of each disjoint range."""

    synthesis: Seed = 0
    selection: Seed = 1_000_000_000
    report: Seed = 2_000_000_000
    preview: Seed = 3_000_000_000
    preview_nimg: Count = Field(64, description="images per preview grid")


class ComputeSettings(Settings):
    """Where the work runs; changes what is computed by float rounding only (precision: of its dtype)."""

    num_workers: Annotated[int, Field(ge=0)] = Field(2, description="training workers and sampling actors; 0: no Ray")
    cpus_per_worker: Positive = 1
    gpus_per_worker: NonNegative = 0
    max_workers: Count | None = Field(
        None, description="workers and actors that an autoscaling cluster may grow to; null: num_workers"
    )
    resize_s: Positive = Field(60, description="with max_workers: seconds between looks whether training can grow")
    sampling_batch: Count | None = Field(
        None, description="images sampled at once; null: as many as a GPU's memory holds, 250 on a CPU"
    )
    micro_batch: Count | None = Field(
        None, description="images per network call, the last ones padded; then sampling_batch does not change a bit"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the network; auto: network.precision on a GPU, float32 on a CPU"
    )
    training_micro_batch: Count | None = Field(
        None, description="images per pass in training; null: as many as a GPU's memory holds, the share on a CPU"
    )
    channels_last: bool | None = Field(None, description="memory format of images in training; null: on a GPU")
    compile: bool = Field(False, description="compile the network for sampling; pays off on a GPU")
    compile_training: Literal["auto", "off", "blocks", "whole"] = Field(
        "auto", description="what torch.compile gets in training; auto: the blocks, on a GPU and in long runs"
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(3, description="restarts after lost workers; -1: no limit")
    dashboard: bool = Field(False, description="serve the Ray dashboard of a local cluster")
    object_store_mb: Annotated[int, Field(ge=80)] | None = Field(
        None, description="object store of a local cluster; null: Ray's own choice, 30 % of the memory"
    )

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.max_workers is not None and self.max_workers < max(self.num_workers, 1):
            raise ValueError(
                f"max_workers={self.max_workers} is below num_workers={self.num_workers}; raise it, or leave it out"
            )
        return self

    def check_batch(self, name: str, batch_size: int) -> None:
        """Make sure that a global batch can be shared among the training workers.

        Raises:
            ValueError: it does not divide by a fixed number of them, or is smaller than the most there may be.
        """
        least, most = self.sampling_workers
        if least == most and batch_size % max(least, 1):
            raise ValueError(f"{name}={batch_size} must divide by compute.num_workers={least}; change either")
        if batch_size < most:
            raise ValueError(f"{name}={batch_size} is below compute.max_workers={most}; change either")

    @property
    def training_workers(self) -> int | tuple[int, int]:
        """Training workers, or the least and the most of them."""
        least, most = self.sampling_workers
        return (least, most) if 0 < least < most else least

    @property
    def sampling_workers(self) -> tuple[int, int]:
        """Least and most sampling actors."""
        return self.num_workers, self.max_workers or self.num_workers


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
        for name, stage in (("train", self.train), ("finetune", self.finetune)):
            self.compute.check_batch(f"{name}.batch_size", stage.batch_size)
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
        distances = (stage.preview_distance_nimg or 0 for stage in (self.train, self.finetune))
        sizes = {
            "synthesis": max(self.tune.n_s),
            "selection": self.tune.n_images,
            "report": report_nimg,
            "preview": max(self.seeds.preview_nimg, *distances),
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
