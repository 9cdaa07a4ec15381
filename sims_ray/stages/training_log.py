"""The log that training leaves beside its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class TrainingLog:
    """Rank 0's log of loss and speed, one JSON line each; a resumed run repeats lines, the last one counts.

    Args:
        folder: the training artifact's.
        nimg: images seen at the start.
        image_flops: floating-point operations of training on one image; 0 if they are not known.
        peak_flops: operations per second that all workers could do at best; 0 if it is not known.
    """

    def __init__(self, folder: Path, nimg: int, image_flops: float = 0.0, peak_flops: float = 0.0) -> None:
        self._path = folder / METRICS
        if self._path.is_file() and not self._path.read_text().endswith("\n"):
            with self._path.open("a") as file:  # a killed process was writing this line
                file.write("\n")
        self._nimg, self._time_s = nimg, time.monotonic()
        self._image_flops, self._peak_flops = image_flops, peak_flops

    def write(self, nimg: int, loss: float) -> None:
        """Add a line."""
        now_s = time.monotonic()
        rate = (nimg - self._nimg) / max(now_s - self._time_s, 1e-9)
        self._nimg, self._time_s = nimg, now_s
        row = {"nimg": nimg, "loss": loss, "images_per_s": round(rate, 1)}
        if self._image_flops:
            row["tflops"] = round(rate * self._image_flops / 1e12, 4)
        if self._image_flops and self._peak_flops:
            row["peak_share"] = round(rate * self._image_flops / self._peak_flops, 4)
        self._append(row)

    def note(self, text: str) -> None:
        """Add a sentence about how training runs; it is shown to the user, and is no part of the result."""
        self._append({"note": text})

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The training log in order of images seen; torn lines are passed over, repeated ones count once."""
    rows = {row["nimg"]: row for row in _lines(folder) if "nimg" in row}
    return [rows[nimg] for nimg in sorted(rows)]


def read_notes(folder: Path) -> list[str]:
    """The sentences of the training log in the order in which they were written."""
    return [row["note"] for row in _lines(folder) if "note" in row]


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / METRICS
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row
