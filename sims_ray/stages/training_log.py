"""The log that training leaves beside its checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

METRICS = "metrics.jsonl"


class TrainingLog:
    """Rank 0's log of loss and speed, one JSON line each; a resumed run repeats lines, the last one counts.

    Args:
        folder: the training artifact's.
        nimg: images seen at the start.
    """

    def __init__(self, folder: Path, nimg: int) -> None:
        self._path = folder / METRICS
        if self._path.is_file() and not self._path.read_text().endswith("\n"):
            with self._path.open("a") as file:  # a killed process was writing this line
                file.write("\n")
        self._nimg, self._time_s = nimg, time.monotonic()

    def write(self, nimg: int, loss: float) -> None:
        """Add a line."""
        now_s = time.monotonic()
        rate = (nimg - self._nimg) / max(now_s - self._time_s, 1e-9)
        self._nimg, self._time_s = nimg, now_s
        with self._path.open("a") as file:
            file.write(json.dumps({"nimg": nimg, "loss": loss, "images_per_s": round(rate, 1)}) + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The training log in order of images seen; torn lines are passed over, repeated ones count once."""
    path = folder / METRICS
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[row["nimg"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [rows[nimg] for nimg in sorted(rows)]
