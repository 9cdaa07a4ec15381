"""Trainings that were begun and not finished: what they were begun with, and that no other takes their place unseen.

A note beside the states says it from the first moment on, as the manifest comes only at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sims_ray.errors import SimsError
from sims_ray.stages.tracking import flatten
from sims_ray.stages.train_job import SNAPSHOTS, TrainJob, budget_name
from sims_ray.storage.artifacts import MANIFEST, read_manifest, write_json
from sims_ray.storage.training_states import TrainingStates

NOTE = "settings.json"
SECTIONS = {"base": "train", "auxiliary": "finetune", "longer base": "finetune"}
ELSEWHERE = {"precision": "network.precision", "forced_precision": "compute.precision"}
SET_SIZE = "n_s"  # an auxiliary of another set size is another point of the same search
UNSET = "unset"


def note_settings(job: TrainJob) -> None:
    """Leave what the training is begun with in its folder."""
    note = {
        "role": job.role,
        "settings": dict(job.artifact.settings),
        "parents": list(job.artifact.parents),
        "budgets": [budget_name(budget) for budget in job.budgets_kimg],
    }
    if _read(job.artifact.path) != note:
        write_json(job.artifact.path / NOTE, note)


def check_settings(job: TrainJob) -> None:
    """Make sure that no training of this role waits in the same output folder to be gone on with.

    An auxiliary of another base or another synthetic set is another one; a finished training never waits.

    Raises:
        SimsError: there is one with other settings; the sentence names each with both values.
    """
    artifact = job.artifact
    for folder in sorted(artifact.path.parent.glob(f"{artifact.stage}-*")):
        if folder == artifact.path or (note := _read(folder)) is None or note["role"] != job.role:
            continue
        changed = list(_changes(job, note))
        if changed and (nimg := _stopped_at(folder, note)):
            raise SimsError(
                f"{artifact.path.parent.parent} has an unfinished {job.role} training at {nimg:,} images with other "
                f"settings: {', '.join(changed)}; set them back to go on with it, delete {folder} to start over, or "
                f"give another --out"
            )


def _changes(job: TrainJob, note: Mapping[str, Any]) -> Iterator[str]:
    """The settings in which a training differs from one that a note tells of, like 'train.lr 0.001 -> 0.002'."""
    other_parents = note["parents"] != list(job.artifact.parents)
    if other_parents and job.role != "base":
        return
    if other_parents:
        yield "data.path (it holds another table)"
    old, new = (flatten(settings) for settings in (note["settings"], job.artifact.settings))
    for name in [*new, *(name for name in old if name not in new)]:
        if name != SET_SIZE and old.get(name, UNSET) != new.get(name, UNSET):
            yield f"{_setting(job.role, name)} {_text(old, name)} -> {_text(new, name)}"


def _setting(role: str, name: str) -> str:
    """A setting as a recipe names it."""
    return name if name.startswith("network.") else ELSEWHERE.get(name, f"{SECTIONS[role]}.{name}")


def _text(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name, UNSET)
    return value if isinstance(value, str) else json.dumps(value)


def _stopped_at(folder: Path, note: Mapping[str, Any]) -> int:
    """Images seen at the last state of a training that lacks budgets; 0 if it lacks none, or has no state."""
    if (folder / MANIFEST).is_file():
        listed = read_manifest(folder)["result"].get(SNAPSHOTS, {})
        if all(budget in listed for budget in note["budgets"]):
            return 0
    return max(TrainingStates(folder).paths(), default=0)


def _read(folder: Path) -> dict[str, Any] | None:
    """The note in a folder; None where there is none that can be read."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text())
        return note if {"role", "settings", "parents", "budgets"} <= note.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
