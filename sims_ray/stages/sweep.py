"""Sweeps: what is searched, what its trials came to, and which of them is chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sims_ray.config import TuneSettings
from sims_ray.config.search import GRID
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Cell, Lattice, Trial
from sims_ray.stages.evaluate import spent
from sims_ray.stages.search import trials_left
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, Artifact
from sims_ray.storage.models import SCORE, Space

Outcome = dict[str, Any]
BASE = Cell()


@dataclass(frozen=True)
class Sweep:
    """What is searched, and where the outcome lands.

    Attributes:
        artifact: the sweep.
        trials: every cell that can be measured, each once, the base among them.
        lattices: the cells of SIMS and of Neon as a search algorithm sees them.
        settings: of the search.
    """

    artifact: Artifact
    trials: tuple[Trial, ...]
    lattices: Mapping[Space, Lattice]
    settings: TuneSettings

    @property
    def base(self) -> Trial:
        """The trial of the base."""
        return next(trial for trial in self.trials if trial.cell == BASE)

    @property
    def outcomes(self) -> dict[Cell, Outcome]:
        """What the trials that were run came to, also of an unfinished sweep."""
        notes = {trial.cell: self.note(trial) for trial in self.trials}
        return {cell: json.loads(path.read_text()) for cell, path in notes.items() if path.is_file()}

    def note(self, trial: Trial) -> Path:
        """The file that says what a trial came to."""
        return self.artifact.path / f"trial-{trial.evaluation.artifact.fingerprint[:FINGERPRINT_CHARS]}.json"

    def most_trials(self) -> int:
        """How many trials there will be at most, the base among them."""
        if self.settings.search == GRID:
            return len(self.trials)
        return 1 + sum(trials_left(self.settings, lattice, {}) for lattice in self.lattices.values())


def outcome_of(trial: Trial) -> Outcome:
    """What a trial came to: its last distance, the ones on the way, and what was spent on it."""
    evaluation = trial.evaluation
    curve, stopped = evaluation.curve, not evaluation.artifact.complete
    last = {"metric": evaluation.metric_at(int(curve[-1]["nimg"])), "distance": curve[-1]["distance"]}
    found = {**trial.cell.params, **last, **spent(evaluation), "curve": curve, "stopped": stopped}
    measures = {} if stopped else dict(evaluation.artifact.result.get("measures", {}))
    if (error := measures.pop("fd_error", None)) is not None:
        found["standard_error"] = error
    return {**found, "measures": measures} if measures else found


def chosen(sweep: Sweep, outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """The outcome of a sweep: all trials, and of each space the best guided cell that was measured in full.

    Raises:
        SimsError: a space has none.
    """
    trials = [outcomes[trial.cell] for trial in sweep.trials if trial.cell in outcomes]
    best = {}
    for space in sweep.lattices:
        whole = [
            outcome
            for cell, outcome in outcomes.items()
            if cell.space == space and cell.omega > 0 and not outcome["stopped"]
        ]
        if not whole:
            raise SimsError(
                f"no guided trial of the {space} space was measured in full; raise tune.num_trials, or set "
                f"tune.stop_early=false"
            )
        best[space] = min(whole, key=lambda outcome: outcome["distance"])
    return {"trials": trials, "selected": best[SCORE], "best": best}
