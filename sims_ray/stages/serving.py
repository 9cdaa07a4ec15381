"""Models for MLflow: a folder that `mlflow models serve` serves, and a version in the registry."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sims_ray
from sims_ray.storage.models import SimsModel

SETTINGS, BASE, AUX = "settings", "base", "aux"  # names of the model's files
CODE = "served_model.py"


def save_model(folder: Path, model: SimsModel, sampler: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a model as MLflow keeps them: its checkpoints, its settings, and the code that samples; nothing pickled.

    It takes rows of `n` and `seed`, and answers with a `seed` and a `png` in base64 for every image.

    Args:
        folder: where to; what lies there is replaced.
        model: the checkpoints and the guidance between them.
        sampler: sampler settings.
        facts: further plain values for who looks into it.
    """
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model as save
    from mlflow.types import ColSpec, Schema

    inputs = Schema([ColSpec("long", "n"), ColSpec("long", "seed")])
    outputs = Schema([ColSpec("long", "seed"), ColSpec("string", "png")])
    guidance = {"omega": model.omega, "sigma_lo": model.sigma_lo, "sigma_hi": model.sigma_hi, "space": model.space}
    with tempfile.TemporaryDirectory() as name:
        settings = Path(name) / f"{SETTINGS}.json"
        settings.write_text(json.dumps({"sampler": dict(sampler), "guidance": guidance}))
        files = {SETTINGS: settings, BASE: Path(model.base)}
        if model.aux is not None:
            files[AUX] = Path(model.aux)
        shutil.rmtree(folder, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no example of a request
            save(
                str(folder),
                python_model=str(Path(__file__).with_name(CODE)),
                artifacts={key: str(path) for key, path in files.items()},
                signature=ModelSignature(inputs, outputs),
                pip_requirements=[f"sims-ray=={sims_ray.__version__}"],
                metadata=dict(facts),
            )
