"""Shared fixtures: a recipe of seconds, and one local Ray cluster for the whole session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on few cores its threads are in each other's way

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sims_ray.config import ComputeSettings, Recipe, load_recipe
from tests.s3 import s3, s3_checks_credentials, s3_folder

__all__ = ["s3", "s3_checks_credentials", "s3_folder"]

TINY = (
    "network.model_channels=8",
    "network.channel_mult=[1,1]",
    "train.duration_kimg=2",
    "train.batch_size=64",
    "train.checkpoint_kimg=0.5",
    "train.log_kimg=0.25",
    "finetune.budgets_kimg=[0.5,1]",
    "finetune.batch_size=64",
    "finetune.checkpoint_kimg=0.25",
    "sampler.num_steps=4",
    "synthesize.shard_nimg=32",
    "features.steps=40",
    "evaluate.n_images=64",
    "evaluate.part_nimg=32",
    "tune.omega=[-1,0,1]",
    "tune.w=[]",
    "tune.n_s=[96]",
    "tune.n_images=64",
    "seeds.preview_nimg=9",
)
LOCAL = ("compute.num_workers=0", "tracking.enabled=false")

TinyRecipe = Callable[..., Recipe]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes: a file stays in one, and all files of the Ray cluster in the same."""
    ray_files = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in ray_files else str(item.path)))


@pytest.fixture(scope="session")
def tiny() -> TinyRecipe:
    """Builds the digits recipe at a scale of seconds; takes further overrides. No Ray, no MLflow unless overridden."""

    def build(*overrides: str) -> Recipe:
        return load_recipe("digits", [*TINY, *LOCAL, *overrides])

    return build


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComputeSettings]:
    """One local Ray cluster, ended with the session; yields settings that use two workers of it."""
    from sims_ray.stages.cluster import start_ray, stop_ray

    os.environ.pop("RAY_ADDRESS", None)
    compute = ComputeSettings(num_workers=2, object_store_mb=200)
    start_ray(compute)
    yield compute
    stop_ray()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder."""
    return tmp_path / "run"
