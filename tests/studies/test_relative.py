from pathlib import Path

import pytest

from sims_ray.config import ComputeSettings
from sims_ray.data.importers import import_digits
from sims_ray.storage.artifacts import Artifact
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe


@pytest.mark.slow
def test_relative_folders_mean_the_same_in_workers_as_in_the_driver(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: ComputeSettings
) -> None:
    monkeypatch.chdir(tmp_path)
    import_digits(Artifact(Path("images").resolve(), "import", {}, ()))
    run = SimsRun(tiny("data.path=images", "compute.num_workers=2", "sampler.num_steps=2"), Path("runs/relative"))
    assert run.tune()["selected"]["n_s"] == 96
    assert (tmp_path / "runs" / "relative" / "artifacts").is_dir()
