"""Every setting: one frozen pydantic model per stage, recipes as YAML of these.

`load_recipe("digits", ["finetune.lr=1e-3"])` is the one way in; a wrong key, type or range stops here,
before any work, with its dotted name.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sims_ray.errors import SimsError

SEED_LIMIT = 2**32  # per-image generators take 32-bit seeds (the limit of diffusion.noise)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Omega = Annotated[float, Field(ge=-1, le=20)]


class Settings(BaseModel):
    """Base of every settings model: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Settings):
    """Where the real images come from."""

    path: str = Field("digits", description="'digits' (embedded) or a sample table made by `sims data import`")


class NetworkSettings(Settings):
    """DDPM++ network with EDM preconditioning; resolution and channels come from the data."""

    model_channels: Annotated[int, Field(ge=8, multiple_of=4)] = Field(128, description="base width")
    channel_mult: tuple[Count, ...] = Field(
        (2, 2, 2), min_length=1, description="width multiplier per resolution, highest first"
    )
    num_blocks: Count = Field(4, description="residual blocks per resolution")
    attn_resolutions: tuple[Count, ...] = Field((16,), description="resolutions with self-attention")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.13
    conditional: bool = Field(False, description="condition on the class labels of the data")
    sigma_data: Positive = Field(0.5, description="standard deviation of the images in [-1, 1]")


class OptimizerSettings(Settings):
    """What base training and fine-tuning share: Adam, batch, EMA, noise distribution."""

    batch_size: Count = Field(512, description="global batch; must divide by the number of workers")
    lr: Positive = Field(1e-3, description="Adam learning rate after the ramp")
    lr_rampup_kimg: NonNegative = Field(10_000, description="linear ramp of the learning rate from 0")
    ema_halflife_kimg: Positive = Field(500, description="half-life of the weight average")
    ema_rampup_ratio: Positive | None = Field(0.05, description="half-life over images seen while young; null: none")
    P_mean: float = Field(-1.2, description="mean of ln sigma in training")
    P_std: Positive = Field(1.2, description="standard deviation of ln sigma in training")
    seed: Seed = Field(0, description="seed of initial weights, data order and training noise")
    checkpoint_kimg: Positive = Field(1_000, description="images between resumable checkpoints")
    log_kimg: Positive = Field(50, description="images between progress lines")


class TrainSettings(OptimizerSettings):
    """Base training on the real images."""

    duration_kimg: Positive = Field(200_000, description="images to train for")


class FinetuneSettings(OptimizerSettings):
    """Auxiliary fine-tuning from the base's EMA weights on synthetic images only; fresh Adam state."""

    budgets_kimg: tuple[Positive, ...] = Field(min_length=1, description="budgets B: a snapshot at each, one run")
    ema_rampup_ratio: Positive | None = None

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if any(a >= b for a, b in pairwise(self.budgets_kimg)):
            raise ValueError(f"budgets_kimg={list(self.budgets_kimg)} must increase, like [10, 20, 40]")
        return self


class SamplerSettings(Settings):
    """EDM's Heun sampler."""

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


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by built-in name or YAML path and apply `section.key=value` overrides (values are YAML).

    Raises:
        SimsError: no such recipe, or a setting that is unknown, of the wrong type or out of range.
    """
    text, where = _read(source)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SimsError(f"{where} is not valid YAML ({_one_line(error)}); correct that line") from error
    if not isinstance(tree, dict):
        raise SimsError(
            f"{where} holds {type(tree).__name__}, not settings; write it as `section:` blocks of `key: value`"
        )
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        locations = {e["loc"] for e in error.errors()}
        # A container is said to be too short when it is one of its items that is wrong: say the item only.
        causes = [
            e for e in error.errors() if not any(e["loc"] == loc[: len(e["loc"])] for loc in locations - {e["loc"]})
        ]
        raise SimsError("; ".join(_explain(e) for e in causes) + f" (recipe {where})") from None


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipe_folder().iterdir() if p.name.endswith(".yaml"))


def _recipe_folder() -> Any:
    return resources.files("sims_ray") / "recipes"


def _read(source: str | Path) -> tuple[str, str]:
    if str(source) in builtin_recipes():
        return (_recipe_folder() / f"{source}.yaml").read_text(), str(source)
    path = Path(source)
    if not path.is_file():
        raise SimsError(f"no recipe {str(source)!r}: give a YAML file, or one of {', '.join(builtin_recipes())}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError:
        raise SimsError(f"{path} is not UTF-8 text; give a recipe in YAML") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SimsError(f"--set {override!r} is not of the form section.key=value; write for example train.lr=1e-3")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise SimsError(f"--set {key}: {parent} is a value, not a section; name a setting that exists")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SimsError(f"--set {key}: {value!r} is not a YAML value ({_one_line(error)})") from error


def _explain(error: Mapping[str, Any]) -> str:
    """One sentence for one pydantic error: dotted name, value found, what is allowed."""
    name = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{name} is not a setting; {hint}"
    if kind == "missing":
        return f"{name} is missing; give it in the recipe or with --set {name}=..."
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}.{message}" if name else message
    return f"{name}={error['input']!r} is not allowed: {message[0].lower()}{message[1:]}"


def _known_keys(section: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
