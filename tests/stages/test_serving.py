"""A saved model gives the images of `sims sample`: loaded, and behind a real server."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from sims_ray.errors import SimsError
from sims_ray.stages.serving import save_model
from sims_ray.storage.models import SimsModel
from sims_ray.studies.sample import model_of_run, sample_images
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe
from tests.processes import end, environment

SEED, N = 7, 5


@pytest.fixture(scope="module")
def out(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its record in SQLite."""
    folder = tmp_path_factory.mktemp("run") / "run"
    SimsRun(tiny("tracking.enabled=true", "tune.w=[0,1]", "evaluate.matched=false"), folder).report()
    return folder


def sampled(out: Path, model: str, tmp_path: Path) -> list[np.ndarray]:
    """The images of `sims sample`."""
    source, sampler = model_of_run(out, model)
    sample_images(tmp_path / model, source, range(SEED, SEED + N), sampler)
    return [np.asarray(Image.open(path)) for path in sorted((tmp_path / model).iterdir())]


def decoded(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    assert [row["seed"] for row in rows] == list(range(SEED, SEED + N))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in rows]


def request() -> pd.DataFrame:
    return pd.DataFrame({"n": [N], "seed": [SEED]})


def test_the_selected_model_is_saved_and_registered_and_gives_the_images_of_sims_sample(
    out: Path, tmp_path: Path
) -> None:
    expected = sampled(out, "SIMS", tmp_path)
    assert not np.array_equal(expected[0], sampled(out, "base", tmp_path)[0])
    uri = f"sqlite:///{out / 'mlflow.db'}"
    (version,) = MlflowClient(uri).search_model_versions("name='sims-digits'")
    assert version.version in (1, "1")
    for folder in (out / "model", version.source):
        model = mlflow.pyfunc.load_model(str(folder))
        images = decoded(model.predict(request()).to_dict("records"))
        assert all(map(np.array_equal, images, expected))


def test_neon_and_the_base_are_served_as_they_are_sampled(out: Path, tmp_path: Path) -> None:
    for name in ("Neon", "base"):
        source, sampler = model_of_run(out, name)
        save_model(tmp_path / "model", source, sampler.model_dump(), {})
        images = decoded(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(request()).to_dict("records"))
        assert all(map(np.array_equal, images, sampled(out, name, tmp_path)))


def test_a_request_out_of_range_is_refused_in_one_sentence(out: Path) -> None:
    model = mlflow.pyfunc.load_model(str(out / "model"))
    for n, seed in ((0, 0), (10_001, 0), (1, -1)):
        with pytest.raises(SimsError, match=rf"n={n}, seed={seed}: ask for 1 to 10000 images"):
            model.predict(pd.DataFrame({"n": [n], "seed": [seed]}))


def test_a_saved_model_holds_no_pickle_and_only_the_networks_it_needs(out: Path, tmp_path: Path) -> None:
    names = {path.name for path in (out / "model").rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt"))]
    source, sampler = model_of_run(out, "base")
    save_model(tmp_path / "model", SimsModel.of(Path(source.base)), sampler.model_dump(), {})
    assert len(list((tmp_path / "model").rglob("*.safetensors"))) == 1
    assert len(list((out / "model").rglob("*.safetensors"))) == 2


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of the server; none of its processes is left."""
    name = uuid.uuid4().hex
    yield name
    end(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow_serves_the_registered_model_and_answers_with_the_images_of_sims_sample(
    out: Path, tmp_path: Path, mark: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"sqlite:///{out / 'mlflow.db'}"
    words = ["models", "serve", "-m", "models:/sims-digits/1", "--env-manager", "local", "--host", "127.0.0.1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an active environment
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
        env=environment(mark, MLFLOW_TRACKING_URI=uri, PATH=path),
    )
    body = json.dumps({"dataframe_split": {"columns": ["n", "seed"], "data": [[N, SEED]]}}).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                rows = json.loads(answer.read())["predictions"]
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    assert all(map(np.array_equal, decoded(rows), sampled(out, "SIMS", tmp_path)))
