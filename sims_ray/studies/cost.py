"""What a run does, stage by stage, before it does it: images, network evaluations, operations, bytes on storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from sims_ray.data.samples import KINDS
from sims_ray.metrics.features import pixel_features
from sims_ray.nn.flops import NetworkFlops, network_flops
from sims_ray.nn.networks import describe_network, num_parameters
from sims_ray.stages.evaluate import Evaluation
from sims_ray.stages.train_job import KIMG, TrainJob
from sims_ray.storage.models import SCORE, SimsModel
from sims_ray.studies.passes import passes
from sims_ray.studies.plan import Plan
from sims_ray.studies.space import AUXILIARY, BASE, NEON, SIMS

FLOAT_BYTES, HALF_BYTES, DOUBLE_BYTES = 4, 2, 8
ID_AND_LABEL_BYTES = 12
ADAM_MOMENTS = 2
FEATURE_DIMS = {"checkpoint": 64, "inception": 2048, "dinov2": 1024}
STATES_IN_PASSING = 2  # beside the last one: the one before it, and one that is being written


@dataclass(frozen=True)
class Work:
    """What one stage does.

    Attributes:
        stage: its name, most often that of the command.
        detail: which of several of that name.
        images: images trained on, or sampled.
        evaluations: network evaluations in all; in training forward passes.
        flops: floating-point operations in all.
        training: whether it trains or samples.
        left_bytes: what it leaves on storage.
        passing_bytes: what lies there besides while it runs.
    """

    stage: str
    detail: str
    images: int
    evaluations: float
    flops: float
    training: bool = False
    left_bytes: float = 0.0
    passing_bytes: float = 0.0

    @property
    def evaluations_per_image(self) -> float:
        """Network evaluations per image."""
        return self.evaluations / self.images if self.images else 0.0


class Workload:
    """The work of every stage of a plan.

    Args:
        plan: the run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recipe = plan.recipe

    @cached_property
    def flops(self) -> NetworkFlops:
        """Operations of one network evaluation per image."""
        return network_flops(self.plan.inputs.network, self.recipe.finetune.trainable_resolution)

    @cached_property
    def parameters(self) -> int:
        """Parameters of one network."""
        return num_parameters(describe_network(self.plan.inputs.network))

    def stages(self) -> list[Work]:
        """The work of every stage, in the order of a run; a base that the user brings costs none."""
        plan, job = self.plan, self.plan.synthesis_job
        row_bytes = math.prod(plan.inputs.shape) * KINDS[plan.inputs.kind].itemsize + ID_AND_LABEL_BYTES
        set_bytes = 0 if self.recipe.synthesize.root else job.n * row_bytes  # else it lies elsewhere
        shown = [*plan.preview_jobs(self._best).values(), *plan.morph_jobs(self._best).values()]
        previews = {job.fingerprint: job for job in shown}.values()
        preview_bytes = self.recipe.seeds.preview_nimg * row_bytes * len(previews)
        return [
            *(self._training("train", "base", plan.base_job) if plan.base_job else []),
            self._sampling("synthesize", "", [(job.model, plan.sampler, job.n)], set_bytes),
            *(work for n_s in self.recipe.tune.n_s for work in self._finetuning(n_s)),
            *(self._evaluations("tune", f"{name}, trials", some) for name, some in self._sweep.items()),
            *self._longer,
            *(self._evaluations("report", f"{name}, blocks", some) for name, some in self._report.items()),
            self._sampling(
                "preview", "", [(job.model, job.set.settings["sampler"], job.n) for job in previews], preview_bytes
            ),
        ]

    @property
    def _best(self) -> dict[str, dict[str, Any]]:
        """A guided cell of each space; all of them cost the same but for the number of steps."""
        where = {"budget_kimg": max(self.recipe.finetune.budgets_kimg), "n_s": max(self.recipe.tune.n_s)}
        strengths = {space: max(lattice.axes["omega"]) for space, lattice in self.plan.sweep.lattices.items()}
        return {space: {**where, "omega": omega, "space": space} for space, omega in strengths.items()}

    @property
    def _sweep(self) -> dict[str, list[Evaluation]]:
        """Every cell by its kind; a search tries fewer."""
        kinds: dict[str, list[Evaluation]] = {}
        for trial in self.plan.sweep.trials:
            guided = SIMS if trial.cell.space == SCORE else NEON
            kind = {0.0: BASE, -1.0: AUXILIARY}.get(trial.cell.omega, guided)
            kinds.setdefault(kind, []).append(trial.evaluation)
        return kinds

    @property
    def _report(self) -> dict[str, list[Evaluation]]:
        return self.plan.report_evaluations(self._best)

    @property
    def _longer(self) -> list[Work]:
        """The base trained on for longer, to compare with; what is there of it by then costs nothing."""
        job = self.plan.base_job
        works = []
        for cell in self.plan.compared(self._best).values():
            if cell.extra_kimg is not None:
                longer = self.plan.longer_base_job(cell.extra_kimg)
                nimg = longer.stop_nimg - (job.stop_nimg if job else 0)
                flops = nimg * self.flops.training(longer.trainable)
                left_bytes = self.parameters * FLOAT_BYTES
                works.append(Work("train longer", "base", nimg, nimg, flops, True, left_bytes))
        return works

    def _finetuning(self, n_s: int) -> list[Work]:
        return self._training("finetune", f"n_s={n_s}", self.plan.finetune_job(n_s))

    def _training(self, stage: str, detail: str, job: TrainJob) -> list[Work]:
        """The training, and the previews that are sampled while it goes on."""
        network_bytes = self.parameters * FLOAT_BYTES
        settings, nimg = job.settings, job.stop_nimg
        averages = len(job.optimization().averages)
        state_bytes = (1 + averages + ADAM_MOMENTS) * network_bytes
        stored = len(settings.ema_stds) * (nimg // (settings.ema_snapshot_kimg * KIMG) + len(job.budgets_kimg))
        checkpoints = min(math.ceil(nimg / (settings.checkpoint_kimg * KIMG)) - 1, STATES_IN_PASSING)
        works = [
            Work(
                stage,
                detail,
                nimg,
                nimg,
                nimg * self.flops.training(job.trainable),
                training=True,
                left_bytes=len(job.budgets_kimg) * network_bytes + stored * self.parameters * HALF_BYTES + state_bytes,
                passing_bytes=checkpoints * state_bytes,
            )
        ]
        if job.preview is not None and (count := int(nimg // (job.preview.every_kimg * KIMG))):
            parts = [(SimsModel(""), self.plan.sampler, count * len(job.preview.seeds))]
            works.append(self._sampling(stage, f"previews of {detail}: {count}", parts, 0))
        return works

    def _sampling(
        self, stage: str, detail: str, parts: Iterable[tuple[SimsModel, Mapping[str, Any], int]], left_bytes: float
    ) -> Work:
        images, evaluations, flops = 0, 0.0, 0.0
        for model, sampler, nimg in parts:
            tally = passes(sampler, model, self.recipe.finetune.trainable == "decoder")
            images += nimg
            evaluations += nimg * tally.nfe
            flops += nimg * (tally.encoders * self.flops.shared + tally.decoders * self.flops.own)
        return Work(stage, detail, images, evaluations, flops, left_bytes=left_bytes)

    def _evaluations(self, stage: str, kind: str, some: Sequence[Evaluation]) -> Work:
        """Evaluations of one kind of model; the moments of their parts lie there until they are merged."""
        moments_bytes = self._feature_dim**2 * DOUBLE_BYTES
        at_once = min(len(some), max(self.recipe.compute.num_workers, 1)) if stage == "tune" else len(some)
        work = self._sampling(
            stage, f"{kind}: {len(some)}", [(e.model, e.sampler, len(e.seeds)) for e in some], len(some) * moments_bytes
        )
        return replace(work, passing_bytes=at_once * len(some[0].parts()) * moments_bytes)

    @cached_property
    def _feature_dim(self) -> int:
        if self.plan.inputs.kind == "latent":  # whose distances are not measured
            return 0
        features = self.recipe.features
        if features.kind == "classifier":
            return features.feature_dim
        if features.kind in FEATURE_DIMS:
            return FEATURE_DIMS[features.kind]
        return pixel_features(torch.zeros(1, *self.plan.inputs.shape)).shape[1]


def storage_bytes(stages: Sequence[Work]) -> tuple[float, float]:
    """What a run leaves on storage, and the most that lies there while it runs."""
    left = sum(work.left_bytes for work in stages)
    report = sum(work.passing_bytes for work in stages if work.stage == "report")  # measured together
    return left, left + max(report, *(work.passing_bytes for work in stages))
