"""What a SIMS run consists of: every artifact and job, described from the recipe before anything runs."""

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
from sims_ray.metrics.measures import Measure
from sims_ray.stages.cells import Cell, Trial
from sims_ray.stages.evaluate import Evaluation
from sims_ray.stages.features import feature_content
from sims_ray.stages.preview import Preview
from sims_ray.stages.sweep import Sweep
from sims_ray.stages.synthesize import SynthesisJob
from sims_ray.stages.train_job import TrainJob
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, Artifact, Store, fingerprint, sha256_file
from sims_ray.storage.folders import Folder, absolute
from sims_ray.storage.models import SCORE, SimsModel
from sims_ray.studies.inputs import Inputs
from sims_ray.studies.space import compared_cells, guided_cell, morph_strengths, search_content, sweep_lattices

OWN_BASE = "base.safetensors"
HALFLIFE = {"ema_halflife_kimg", "ema_rampup_ratio"}
POWER_FUNCTION = {"ema_std", "ema_snapshot_kimg"}
NOT_CONTENT = {"checkpoint_kimg", "log_kimg", "preview_kimg", "preview_distance_nimg"}
TOLD_OTHERWISE = {"checkpoint"}
BUDGETS = {"duration_kimg", "budgets_kimg"}  # how long is trained, which a training can be extended in


def label_content(labels: LabelSettings) -> dict[str, Any]:
    """The settings of labels that the images depend on, as plain values."""
    return labels.model_dump(mode="json", exclude_none=True)


class Plan:
    """The artifacts and jobs of one recipe.

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

    def _preview(self, settings: OptimizerSettings) -> Preview | None:
        """What a training shows of itself while it runs."""
        if settings.preview_kimg is None:
            return None
        wanted = settings.preview_distance_nimg
        start, compute = self.recipe.seeds.preview, self.recipe.compute
        seeds = range(start, start + (wanted or self.recipe.seeds.preview_nimg))
        features = self.features.path if settings.shows_distance else None
        return Preview(settings.preview_kimg, self.sampler, seeds, features, compute)

    def model(self, cell: Cell) -> SimsModel:
        """The model of a cell; the auxiliary is left out at omega 0."""
        if cell.extra_kimg is not None:
            return SimsModel.of(self.longer_base_job(cell.extra_kimg).snapshot(self._longer_kimg(cell.extra_kimg)))
        if cell.omega == 0 or cell.budget_kimg is None or cell.n_s is None:
            return SimsModel.of(self.base)
        aux = self.finetune_job(cell.n_s).snapshot(cell.budget_kimg)
        return SimsModel.of(self.base, aux, cell.omega, cell.sigma_lo, cell.sigma_hi, cell.space)

    def sampler_of(self, cell: Cell) -> dict[str, Any]:
        """Sampler settings of a cell as plain values."""
        return self.sampler if cell.num_steps is None else {**self.sampler, "num_steps": cell.num_steps}

    def evaluation(
        self, seeds: range, cell: Cell, fidelities: tuple[int, ...] = (), measures: tuple[Measure, ...] | None = None
    ) -> Evaluation:
        """The distance of one model on given seeds, and what is measured besides: on report seeds unless told."""
        content, parents = self._content(cell)
        measures = self.recipe.evaluate.measures if measures is None else measures
        content |= {"measures": list(measures)} if measures else {}
        settings = {**content, "seeds": [seeds.start, seeds.stop]}
        artifact = self.store.artifact("evaluate", settings, [self.features, *parents])
        part_nimg = self.recipe.evaluate.part_nimg
        return Evaluation(
            artifact,
            self.model(cell),
            self.sampler_of(cell),
            seeds,
            self.features.path,
            part_nimg,
            fidelities,
            measures,
        )

    @cached_property
    def sweep(self) -> Sweep:
        """The search over cells, measured on the selection seeds."""
        settings = self.recipe.tune
        lattices = sweep_lattices(self.recipe)
        cells = dict.fromkeys([Cell(), *(cell for lattice in lattices.values() for cell in lattice.cells)])
        trials = [
            Trial(cell, self.evaluation(self.seeds["selection"], cell, settings.stops, settings.measures))
            for cell in cells
        ]
        artifact = self.store.artifact(
            "tune", search_content(settings), [trial.evaluation.artifact for trial in trials]
        )
        return Sweep(artifact, tuple(trials), lattices, settings)

    def cell(self, omega: float, budget_kimg: float | None, n_s: int | None) -> Cell:
        """A point of the search space with defaults filled in: the largest budget and set.

        Raises:
            SimsError: a budget or set size that the recipe does not make.
        """
        if omega == 0:
            return Cell()
        budgets, sizes = self.recipe.finetune.budgets_kimg, self.recipe.tune.n_s
        budget_kimg, n_s = budget_kimg or max(budgets), n_s or max(sizes)
        for name, value, known in (("B", budget_kimg, budgets), ("n_s", n_s, sizes)):
            if value not in known:
                raise SimsError(
                    f"{name}={value:g} is not in the recipe, which has {list(known)}; choose one or --set more"
                )
        return guided_cell(self.recipe.guidance, omega=omega, budget_kimg=budget_kimg, n_s=n_s)

    @cached_property
    def report_blocks(self) -> list[range]:
        """The disjoint seed blocks of the reported distances."""
        seeds, n = self.seeds["report"], self.recipe.evaluate.n_images
        return [range(start, start + n) for start in range(seeds.start, seeds.stop, n)]

    def compared(self, best: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
        """The models of the final table by name; `best` has the best trial of each space."""
        return compared_cells(self.recipe, {space: Cell.of(trial) for space, trial in best.items()})

    def report_evaluations(self, best: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Evaluation]]:
        """For each compared model, its evaluation on each report block."""
        return {
            name: [self.evaluation(block, cell) for block in self.report_blocks]
            for name, cell in self.compared(best).items()
        }

    def preview_jobs(self, best: Mapping[str, Mapping[str, Any]]) -> dict[str, SynthesisJob]:
        """For each compared model, a few images from the same seeds."""
        return {name: self._preview_job(cell) for name, cell in self.compared(best).items()}

    def morph_jobs(self, best: Mapping[str, Mapping[str, Any]]) -> dict[float, SynthesisJob]:
        """By strength, the preview images of SIMS from the auxiliary over the base to beyond the optimum."""
        sims = Cell.of(best[SCORE])
        return {
            omega: self._preview_job(replace(sims, omega=omega) if omega else Cell(num_steps=sims.num_steps))
            for omega in morph_strengths(sims.omega)
        }

    def _preview_job(self, cell: Cell) -> SynthesisJob:
        seeds, nimg = self.seeds["preview"], self.recipe.seeds.preview_nimg
        content, parents = self._content(cell)
        target = self._set(str(self.store.root), "preview", content, seeds, parents)
        return SynthesisJob(target, self.model(cell), nimg, nimg)

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

    def _longer_kimg(self, extra_kimg: float) -> float:
        """Where the longer training of the base ends, counted as its snapshots are."""
        return extra_kimg + (self.recipe.train.duration_kimg if self.base_job is not None else 0.0)

    def _content(self, cell: Cell) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What the images of a model depend on beside their seeds: settings, and the fingerprints of its networks."""
        settings: dict[str, Any] = {
            "sampler": self.sampler_of(cell),
            "omega": cell.omega,
            "budget": cell.budget_kimg,
            **self._forced_precision,
        }
        if cell.extra_kimg is not None:
            job = self.longer_base_job(cell.extra_kimg)
            return settings, (job.snapshot_fingerprint(self._longer_kimg(cell.extra_kimg)),)
        aux = []
        if cell.omega != 0 and cell.budget_kimg is not None and cell.n_s is not None:
            aux.append(self.finetune_job(cell.n_s).snapshot_fingerprint(cell.budget_kimg))
        if aux and cell.guided:  # the auxiliary alone is not
            settings["guidance"] = {"sigma_lo": cell.sigma_lo, "sigma_hi": cell.sigma_hi}
            if cell.space != SCORE:
                settings["space"] = cell.space
        return settings, (self.base_fingerprint, *aux)

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
