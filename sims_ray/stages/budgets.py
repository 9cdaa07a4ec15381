"""Budgets of a training: which snapshots are there, the runs that make the others, and the manifest that lists them.

A snapshot counts once the manifest lists it, or if a run that was killed left it whole. The manifest is replaced when
the runs have ended, so that what it lists stays valid while more is made.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sims_ray.stages.train_job import SNAPSHOTS, TrainJob, budget_name, snapshot_name
from sims_ray.storage.artifacts import MANIFEST, new_manifest, sha256_file, write_json
from sims_ray.storage.checkpoints import CorruptFile, verify_tensors
from sims_ray.storage.posthoc import PATTERN
from sims_ray.storage.training_states import TrainingStates, state_path

logger = logging.getLogger("sims_ray")

BETWEEN = "between"  # where a run works that ends behind the newest state, so that it touches nothing that is there


@dataclass(frozen=True)
class Run:
    """One stretch of training.

    Attributes:
        job: the budgets that it makes; it works in the folder of this job's artifact.
        start_nimg: images seen at the state that it goes on from.
    """

    job: TrainJob
    start_nimg: int

    @property
    def between(self) -> bool:
        """Whether it makes budgets that longer training has passed."""
        return self.job.artifact.path.name == BETWEEN


def prepare_runs(job: TrainJob) -> list[Run]:
    """What is to be trained until every budget has its snapshot: behind the newest state, then from it on.

    A torn state is named in a warning, and the one before it counts.

    Raises:
        SimsError: a committed file is missing or has another size.
    """
    position = TrainingStates(job.artifact.path).newest_nimg()
    missing = [budget for budget in job.missing_kimg if not _left_whole(job, budget)]
    behind = tuple(budget for budget in missing if job.snapshot_nimg(budget) <= position)
    ahead = tuple(budget for budget in missing if budget not in behind)
    found = [_run_between(job, behind)] if behind else []
    return [*found, Run(replace(job, budgets_kimg=ahead), position)] if ahead else found


def settle(job: TrainJob, run: Run) -> None:
    """Move what a run between has made to where it belongs; other runs work there."""
    if not run.between:
        return
    made, budgets = run.job, run.job.budgets_kimg
    averages = [path for budget in budgets for path in made.average_paths(made.snapshot_nimg(budget))]
    for path in (*averages, *_end_states(made, budgets)):
        if not (target := job.artifact.path / path.name).exists():
            os.replace(path, target)
    for budget in budgets:  # last, as a snapshot says that the rest is there
        os.replace(made.snapshot(budget), job.snapshot(budget))
    shutil.rmtree(made.artifact.path)


def commit(job: TrainJob) -> None:
    """List the job's snapshots in the manifest, beside what it lists already, and remove states that nothing needs.

    The log is not listed: it grows while more is made.
    """
    folder, artifact = job.artifact.path, job.artifact
    old = artifact.manifest if (folder / MANIFEST).is_file() else {"files": {}, "result": {SNAPSHOTS: {}}}
    snapshots = old["result"][SNAPSHOTS] | {budget_name(b): snapshot_name(b) for b in job.budgets_kimg}
    budgets = [float(name) for name in snapshots]
    states = TrainingStates(folder)
    needed = [state_path(folder, states.newest_nimg(quiet=True)), *_end_states(job, budgets)]
    paths = [*map(job.snapshot, budgets), *folder.glob(PATTERN), *needed]
    files = {path.name: old["files"].get(path.name) or _entry(path) for path in paths if path.is_file()}
    last = replace(job, budgets_kimg=(max(budgets),))
    row = last.log_rows()[-1]
    result = {SNAPSHOTS: snapshots, "nimg": last.stop_nimg, "loss": row["loss"]}
    write_json(folder / MANIFEST, new_manifest(artifact.stage, artifact.settings, artifact.parents, files, result))
    for path in states.paths().values():
        if path.name not in files:
            path.unlink(missing_ok=True)


def _left_whole(job: TrainJob, budget_kimg: float) -> bool:
    """Whether a run that was killed left the snapshot of this budget."""
    path = job.snapshot(budget_kimg)
    if not path.is_file():
        return False
    try:
        card = verify_tensors(path)
    except CorruptFile as error:
        logger.warning("%s is torn (%s); it is made again", path, error.reason)
        return False
    return card.get("training") == job.artifact.fingerprint and card.get("nimg") == job.snapshot_nimg(budget_kimg)


def _run_between(job: TrainJob, budgets_kimg: tuple[float, ...]) -> Run:
    """A run to budgets that were passed, in a folder of its own that has what it goes on from."""
    folder = job.artifact.path / BETWEEN
    made = replace(job, artifact=replace(job.artifact, path=folder), budgets_kimg=budgets_kimg)
    folder.mkdir(exist_ok=True)
    states = TrainingStates(job.artifact.path).paths(made.first_nimg)
    for path in (*states.values(), *job.average_paths(made.stop_nimg)):
        if path.is_file() and not (folder / path.name).exists():
            _link(path, folder / path.name)
    return Run(made, TrainingStates(folder).newest_nimg(made.first_nimg, quiet=True))


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _end_states(job: TrainJob, budgets_kimg: Iterable[float]) -> list[Path]:
    """The states at a base's budgets, whose weights and moments an auxiliary may start from."""
    paths = [replace(job, budgets_kimg=(budget,)).end_state for budget in budgets_kimg]
    return [path for path in paths if job.role == "base" and path.is_file()]


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
