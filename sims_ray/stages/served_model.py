"""The sampler that MLflow serves: rows of (n, seed) in, one PNG per image out.

MLflow runs this file where a model that `stages.serving` saved is loaded; nothing is pickled.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from PIL import Image

from sims_ray.errors import SimsError
from sims_ray.stages.images import images_of
from sims_ray.stages.serving import AUX, BASE, SETTINGS
from sims_ray.storage.models import SimsModel

MOST_IMAGES = 10_000  # in one request


class ServedSampler(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Images for seeds, the same as `sims sample` makes."""

    def load_context(self, context: Any) -> None:
        """Find the checkpoints and the settings among the model's files."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        settings = json.loads(files[SETTINGS].read_text())
        self._sampler = settings["sampler"]
        self._model = SimsModel.of(files[BASE], files.get(AUX), **settings["guidance"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per image: its `seed`, and `png`, in base64.

        Args:
            context: MLflow's.
            model_input: a request per row: `n` images for the seeds from `seed` on.
            params: none are known.

        Raises:
            SimsError: a number of images or a seed that is out of range.
        """
        rows = []
        for n, seed in zip(model_input["n"].astype(int), model_input["seed"].astype(int), strict=True):
            if not 1 <= n <= MOST_IMAGES or seed < 0:
                raise SimsError(f"n={n}, seed={seed}: ask for 1 to {MOST_IMAGES} images from a seed of 0 or above")
            seeds = range(seed, seed + n)
            images, _ = images_of(self._model, seeds, self._sampler)
            rows += [{"seed": s, "png": _png(image)} for s, image in zip(seeds, images, strict=True)]
        return pd.DataFrame(rows)


def _png(image: Any) -> str:
    """An image, uint8 [C, H, W], as PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


mlflow.models.set_model(ServedSampler())
