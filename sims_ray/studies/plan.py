"""What a SIMS run consists of: every artifact and job, described from the recipe before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from sims_ray.errors import SimsError
from sims_ray.metrics.measures import Measure
from sims_ray.stages.cells import Cell, Trial
from sims_ray.stages.evaluate import Evaluation
from sims_ray.stages.sweep import Sweep
from sims_ray.stages.synthesize import SynthesisJob
from sims_ray.storage.models import SCORE, SimsModel
from sims_ray.studies.model_plan import ModelPlan
from sims_ray.studies.space import compared_cells, guided_cell, morph_strengths, search_content, sweep_lattices


class Plan(ModelPlan):
    """The artifacts and jobs of one recipe: what makes its models, and what is measured of them."""

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
