"""SIMS end to end (arXiv 2408.16333, Algorithm 1): base, synthetic set, auxiliary, sweep, report.

Each stage finds its artifact complete or makes it; running again after any stop goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sims_ray.config import Recipe
from sims_ray.data.importers import import_digits
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.report.page import write_report
from sims_ray.stages.cells import Cell, Trial
from sims_ray.stages.evaluate import evaluate
from sims_ray.stages.features import load_real_features, make_features
from sims_ray.stages.serving import save_model
from sims_ray.stages.synthesize import SynthesisJob, synthesize
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.tune import tune
from sims_ray.stages.unfinished import check_settings
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, adopt, fingerprint, write_json
from sims_ray.storage.locks import alone
from sims_ray.storage.models import SCORE
from sims_ray.studies.console import closing_words, stages_overview
from sims_ray.studies.model_plan import OWN_BASE
from sims_ray.studies.plan import Plan
from sims_ray.studies.record import RunRecord
from sims_ray.studies.set_metrics import warn_of_few
from sims_ray.studies.space import SIMS
from sims_ray.studies.summary import RESULT, summarise

logger = logging.getLogger("sims_ray")

REPORT_FOLDER = "report"
PAGE = "report.html"
LOCKS = "locks"
MODEL_FOLDER = "model"


class Completable(Protocol):
    """What a stage makes."""

    @property
    def complete(self) -> bool:
        """Whether it is there."""
        ...

    @property
    def fingerprint(self) -> str:
        """What names it."""
        ...


class SimsRun:
    """One run of a recipe in one output folder.

    Args:
        recipe: the resolved settings.
        out: output folder on storage that every worker sees.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.plan = Plan(recipe, out)
        self.recipe, self.out = recipe, self.plan.out
        self.record = RunRecord(self.plan)

    def import_data(self) -> None:
        """Write the embedded digits as a sample table; a table of the user's is there already."""
        digits = self.plan.inputs.digits
        if digits is not None and not digits.complete:
            import_digits(digits)

    def make_features(self) -> None:
        """The feature extractor and the real images' moments."""
        if self.plan.inputs.kind == "latent":
            raise SimsError(
                f"{self.recipe.data.path} holds latents, which distances cannot be measured in yet; run `sims train`, "
                f"`sims synthesize` and `sims finetune`, and decode with `sims data decode`"
            )
        self.import_data()
        artifact, settings = self.plan.features, self.recipe.features
        self._ensure(
            artifact, "features", lambda: make_features(artifact, settings, self.plan.inputs.table, self.recipe.compute)
        )

    def train_base(self) -> None:
        """Algorithm 1, step 1."""
        self._check_settings([self.plan.base_job])
        self.import_data()
        if self.plan.base_job is not None:
            if self.recipe.train.shows_distance:
                self.make_features()
            self._train(self.plan.base_job, "train base")
            return
        source, artifact = Path(str(self.recipe.train.checkpoint)), self.plan.base_artifact
        self._ensure(artifact, "base", lambda: adopt(source, artifact, OWN_BASE))

    def synthesize(self) -> None:
        """Algorithm 1, step 2: n_s images from the base."""
        self.train_base()
        job = self.plan.synthesis_job
        self._ensure(job, "synthesize", lambda: synthesize([job], self.recipe.compute))
        self.record.synthesis(job)

    def finetune(self) -> None:
        """Algorithm 1, step 3: an auxiliary per n_s, with a snapshot per budget."""
        jobs = {n_s: self.plan.finetune_job(n_s) for n_s in self.recipe.tune.n_s}
        self._check_settings([self.plan.base_job, *jobs.values()])
        self.synthesize()
        if self.recipe.finetune.shows_distance:
            self.make_features()
        for n_s, job in jobs.items():
            self._train(job, f"finetune n_s={n_s}")

    def tune(self) -> dict[str, Any]:
        """The sweep over omega, B and n_s; returns its outcome: all trials and the best of each space."""
        self._check_settings([self.plan.base_job, *map(self.plan.finetune_job, self.recipe.tune.n_s)])
        self.make_features()  # first, because it is cheap and looks at the labels
        self.finetune()
        sweep = self.plan.sweep
        run = self.record.stage(sweep.artifact, "sweep", {"tune": self.recipe.tune.model_dump(mode="json")})

        def log_trial(trial: Trial, outcome: Mapping[str, Any]) -> None:
            self.record.trial(trial, outcome, run)

        self._ensure(sweep.artifact, "sweep", lambda: tune(sweep, self.recipe.compute, log_trial))
        if not run.finished:
            for trial in sweep.trials:
                if (outcome := sweep.outcomes.get(trial.cell)) is not None:
                    log_trial(trial, outcome)
            run.finish()
        return sweep.artifact.result

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        """The distance of one model on each report block, making what it needs first."""
        self.make_features()
        if cell.omega == 0:
            self.train_base()
        else:
            self.finetune()
        evaluations = [self.plan.evaluation(block, cell) for block in self.plan.report_blocks]
        evaluate(evaluations, self.recipe.compute)
        return [e.artifact.result for e in evaluations]

    def train_longer(self, cells: Iterable[Cell]) -> None:
        """The base trained on for longer with real images, where a cell is of that."""
        for extra_kimg in sorted({cell.extra_kimg for cell in cells if cell.extra_kimg is not None}):
            self._train(self.plan.longer_base_job(extra_kimg), "train base longer")

    def report(self) -> dict[str, Any]:
        """Measure the selected models on fresh seeds, write the page; returns the summary of the whole run."""
        best = self.tune()["best"]
        cells = self.plan.compared(best)
        self.train_longer(cells.values())
        measured = self.plan.report_evaluations(best)
        self._ensure_all(
            [e.artifact for blocks in measured.values() for e in blocks],
            "evaluate",
            lambda: evaluate([e for blocks in measured.values() for e in blocks], self.recipe.compute),
        )
        previews = self._preview_jobs(best)
        self._ensure_all(previews, "preview", lambda: synthesize(previews, self.recipe.compute, "preview"))
        for name, cell in cells.items():
            for i, evaluation in enumerate(measured[name]):
                self.record.evaluation(evaluation, f"report {name} block {i}", cell.params)
        summary = summarise(self.plan, best)
        page = self.out / REPORT_FOLDER / PAGE
        if not page.is_file() or _read(self.out / RESULT) != json.loads(json.dumps(summary)):
            real, base = load_real_features(self.plan.features.path), summary["table"][0]
            warn_of_few(summary["metric"], base["distance"], real, summary["n_images"])
            write_report(page.parent, summary, self.previews(best), self.morph(best))
            write_json(self.out / RESULT, summary)
        model = self.out / MODEL_FOLDER
        if not model.is_dir():
            winner, sampler = self.plan.model(cells[SIMS]), self.plan.sampler_of(cells[SIMS])
            save_model(model, winner, sampler, {"name": self.recipe.name, **best[SCORE]})
        self.record.report(summary, page.parent, model)
        return summary

    def previews(self, best: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[np.uint8]]:
        """The preview images of each compared model, uint8 [N, C, H, W], from the same seeds."""
        jobs = self.plan.preview_jobs(best)
        return {name: SampleTable(job.set.folder).head(job.n).images for name, job in jobs.items()}

    def morph(self, best: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The same seeds at growing strengths: `omegas`, `images` uint8 [len(omegas), N, C, H, W], and `selected`."""
        jobs = self.plan.morph_jobs(best)
        images = [SampleTable(job.set.folder).head(job.n).images for job in jobs.values()]
        return {"omegas": list(jobs), "images": np.stack(images), "selected": best[SCORE]["omega"]}

    def _preview_jobs(self, best: Mapping[str, Mapping[str, Any]]) -> list[SynthesisJob]:
        """Each set of preview images once."""
        jobs = [*self.plan.preview_jobs(best).values(), *self.plan.morph_jobs(best).values()]
        return list({job.fingerprint: job for job in jobs}.values())

    def pause(self) -> None:
        """Say in the record that no more is to come from this process."""
        self.record.pause()

    def describe(self) -> str:
        """The stages, and which are complete; changes nothing."""
        return stages_overview(self.plan)

    def closing_words(self, summary: Mapping[str, Any]) -> str:
        """What to print at the end: the table and where results lie."""
        return closing_words(summary, self.out, self.out / REPORT_FOLDER / PAGE, self.record.uri)

    def _ensure(self, artifact: Completable, label: str, make: Callable[[], None]) -> None:
        self._ensure_all([artifact], label, make)

    def _ensure_all(self, artifacts: Sequence[Completable], label: str, make: Callable[[], None]) -> None:
        """Run `make` unless every artifact is complete; say which of the two, and how long it took."""
        if all(artifact.complete for artifact in artifacts):
            logger.info("%s: complete", label)
            return
        name = fingerprint("lock", {}, [artifact.fingerprint for artifact in artifacts])
        with alone(self.out / LOCKS / f"{name[:FINGERPRINT_CHARS]}.lock", label):
            if all(artifact.complete for artifact in artifacts):
                logger.info("%s: complete, made by another process meanwhile", label)
                return
            started_s = time.monotonic()
            make()
            logger.info("%s: done in %.0f s", label, time.monotonic() - started_s)

    def _check_settings(self, jobs: Sequence[TrainJob | None]) -> None:
        """Before any work: no other training of these roles waits to be gone on with."""
        for job in jobs:
            if job is not None and not job.complete:
                check_settings(job)

    def _train(self, job: TrainJob, label: str) -> None:
        run = self.record.training(job, label)
        self._ensure(job, label, lambda: train(job, self.recipe.compute, lambda row: run.log([row])))
        self.record.trained(run, job)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
