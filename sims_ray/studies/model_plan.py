"""What makes the models of a SIMS run: every artifact and job up to the auxiliaries, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sims_ray.config import OptimizerSettings, Recipe
from sims_ray.config.labels import LabelSettings
from sims_ray.data.synthetic import STAGE, SyntheticSet
from sims_ray.diffusion.labels import check_labels
from sims_ray.errors import SimsError
from sims_ray.stages.features import feature_content
from sims_ray.stages.preview import Preview
from sims_ray.stages.synthesize import SynthesisJob
from sims_ray.stages.train_job import TrainJob
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, Artifact, Store, fingerprint, sha256_file
from sims_ray.storage.folders import Folder, absolute
from sims_ray.storage.models import SimsModel
from sims_ray.studies.inputs import Inputs

OWN_BASE = "base.safetensors"
HALFLIFE = {"ema_halflife_kimg", "ema_rampup_ratio"}
POWER_FUNCTION = {"ema_std", "ema_snapshot_kimg"}
NOT_CONTENT = {"checkpoint_kimg", "log_kimg", "preview_kimg", "preview_distance_nimg"}
TOLD_OTHERWISE = {"checkpoint"}
BUDGETS = {"duration_kimg", "budgets_kimg"}  # how long is trained, which a training can be extended in


def label_content(labels: LabelSettings) -> dict[str, Any]:
    """The settings of labels that the images depend on, as plain values."""
    return labels.model_dump(mode="json", exclude_none=True)


class ModelPlan:
    """The features, the base, the synthetic set and the auxiliaries of one recipe, each with the job that makes it.

    Args:
        recipe: the resolved settings.
        out: output folder; artifacts lie under `out/artifacts`.
        inputs: makes the inputs that the recipe describes.

    Raises:
        SimsError: the images or the synthetic labels do not fit the network, there is no table at data.path, or
            fine-tuning is to start from more than the user's base has.
    """

    def __init__(self, recipe: Recipe, out: Path, inputs: Callable[[Recipe, Store], Inputs] = Inputs) -> None:
        # Absolute, because Ray's workers run in folders of their own.
        self.recipe, self.out = recipe, out.resolve()
        self.store = Store(self.out / "artifacts")
        self.seeds = recipe.seed_ledger()
        self.inputs = inputs(recipe, self.store)
        check_labels(label_content(recipe.synthesize.labels), self.inputs.network["label_dim"])
        self._check_start()

    @cached_property
    def sampler(self) -> dict[str, Any]:
        """Sampler settings as plain values."""
        return self.recipe.sampler.model_dump(mode="json")

    @cached_property
    def features(self) -> Artifact:
        """The feature extractor and the real images' moments."""
        return self.store.artifact("features", feature_content(self.recipe.features), [self.inputs.data_fingerprint])

    @cached_property
    def base_job(self) -> TrainJob | None:
        """Base training; None where the user brings a base."""
        settings = self.recipe.train
        if settings.checkpoint is not None:
            return None
        artifact = self.store.artifact("train", self._identity(settings), [self.inputs.data_fingerprint])
        return TrainJob(
            "base",
            artifact,
            self.inputs.network,
            settings,
            (settings.duration_kimg,),
            self.inputs.table,
            precision=self.inputs.precision,
            reading=self.recipe.data.reading,
            preview=self._preview(settings),
        )

    @cached_property
    def base_artifact(self) -> Artifact:
        """The artifact that the base checkpoint lies in: of its training, or a copy of the user's."""
        if self.base_job is not None:
            return self.base_job.artifact
        digest = sha256_file(Path(str(self.recipe.train.checkpoint)))
        return self.store.artifact("base", {"sha256": digest})

    @cached_property
    def base(self) -> Path:
        """The base checkpoint: EMA weights at the end of training, or the user's."""
        if self.base_job is None:
            return self.base_artifact.path / OWN_BASE
        return self.base_job.snapshot(self.recipe.train.duration_kimg)

    @cached_property
    def base_fingerprint(self) -> str:
        """What names the base checkpoint for all that is made from it: a training and how long it was, or a file."""
        if self.base_job is None:
            return self.base_artifact.fingerprint
        return self.base_job.snapshot_fingerprint(self.recipe.train.duration_kimg)

    @cached_property
    def synthesis_job(self) -> SynthesisJob:
        """The synthetic set S for the largest n_s."""
        settings = self.recipe.synthesize
        content: dict[str, Any] = {"sampler": self.sampler, **self._forced_precision}
        if settings.labels.kind != "seed":
            content["labels"] = label_content(settings.labels)
        root = absolute(settings.root or self.store.root)
        seeds, parents = self.seeds["synthesis"], (self.base_fingerprint,)
        target = self._set(root, STAGE, content, seeds, parents)
        return SynthesisJob(target, SimsModel.of(self.base), len(seeds), settings.shard_nimg)

    def finetune_job(self, n_s: int) -> TrainJob:
        """Auxiliary fine-tuning on the first `n_s` rows of S, with a snapshot at each budget."""
        settings, synthetic = self.recipe.finetune, self.synthesis_job.set
        artifact = self.store.artifact(
            "train", self._identity(settings, n_s=n_s), [self.base_fingerprint, synthetic.fingerprint]
        )
        return TrainJob(
            "auxiliary",
            artifact,
            self.inputs.network,
            settings,
            settings.budgets_kimg,
            synthetic.folder.location,
            n_s,
            self.base,
            self.inputs.precision,
            self.recipe.data.reading,
            self.base_job.end_state if self.base_job else None,
            self._preview(settings),
        )

    def longer_base_job(self, extra_kimg: float) -> TrainJob:
        """The base trained on for longer with real images: its own training extended, or the user's fine-tuned."""
        total = self._longer_kimg(extra_kimg)
        if self.base_job is not None:
            return replace(self.base_job, budgets_kimg=(*self.base_job.budgets_kimg, total))
        settings = self.recipe.finetune
        artifact = self.store.artifact(
            "train", self._identity(settings, on="real"), [self.base_fingerprint, self.inputs.data_fingerprint]
        )
        return TrainJob(
            "longer base",
            artifact,
            self.inputs.network,
            settings,
            (total,),
            self.inputs.table,
            init=self.base,
            precision=self.inputs.precision,
            reading=self.recipe.data.reading,
        )

    def _preview(self, settings: OptimizerSettings) -> Preview | None:
        """What a training shows of itself while it runs."""
        if settings.preview_kimg is None:
            return None
        wanted = settings.preview_distance_nimg
        start, compute = self.recipe.seeds.preview, self.recipe.compute
        seeds = range(start, start + (wanted or self.recipe.seeds.preview_nimg))
        features = self.features.path if settings.shows_distance else None
        return Preview(settings.preview_kimg, self.sampler, seeds, features, compute)

    def _longer_kimg(self, extra_kimg: float) -> float:
        """Where the longer training of the base ends, counted as its snapshots are."""
        return extra_kimg + (self.recipe.train.duration_kimg if self.base_job is not None else 0.0)

    def _set(
        self, root: str, prefix: str, content: Mapping[str, Any], seeds: range, parents: tuple[str, ...]
    ) -> SyntheticSet:
        settings = json.loads(json.dumps({**content, "first_seed": seeds.start}))  # as a manifest gives them back
        name = f"{prefix}-{fingerprint(STAGE, settings, parents)[:FINGERPRINT_CHARS]}"
        folder = Folder.at(root).child(name)
        return SyntheticSet(folder, settings, parents, self.inputs.shape, self.inputs.kind, self.inputs.latents)

    def _identity(self, settings: OptimizerSettings, **extra: Any) -> dict[str, Any]:
        unused = HALFLIFE if settings.ema_stds else POWER_FUNCTION
        content = settings.model_dump(mode="json", exclude=NOT_CONTENT | TOLD_OTHERWISE | BUDGETS | unused)
        precision = {"precision": self.inputs.precision, **self._forced_precision}
        return {"network": self.inputs.network, **precision, **content, **extra}

    def _check_start(self) -> None:
        """The user's base is one checkpoint, without its training state."""
        s, own = self.recipe.finetune, self.recipe.train.checkpoint
        unknown = {"start=weights": s.start == "weights", "reset_optimizer=false": not s.reset_optimizer}
        for setting, asked in unknown.items():
            if own is not None and asked:
                raise SimsError(
                    f"finetune.{setting} needs the training state of a base that was trained here, but "
                    f"train.checkpoint={own} has its EMA weights only; leave one of them out"
                )

    @property
    def _forced_precision(self) -> dict[str, str]:
        """The precision that the user forces, which changes results by more than the rounding of float32."""
        forced = self.recipe.compute.precision
        return {} if forced == "auto" else {"forced_precision": forced}
