from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.stages.evaluate import Evaluation, evaluate
from sims_ray.stages.preview import PREVIEWS, read_previews, sheet_name, show
from sims_ray.stages.train import train
from sims_ray.storage.checkpoints import load_tensors
from sims_ray.storage.models import SimsModel
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

SHOWN = ("train.preview_kimg=0.6", "train.preview_distance_nimg=80", "features.kind=pixels")
EVERY = [640, 1216, 1856]  # whole batches of 64 that reach 600, 1200 and 1800 images


def shown_run(tiny: TinyRecipe, out: Path, *overrides: str) -> SimsRun:
    run = SimsRun(tiny(*SHOWN, *overrides), out)
    run.make_features()
    return run


def test_previews_come_at_their_images_with_a_distance_and_change_nothing_of_the_model(
    tiny: TinyRecipe, tmp_path: Path
) -> None:
    run, plain = shown_run(tiny, tmp_path / "shown"), SimsRun(tiny(), tmp_path / "plain")
    rows: list[dict[str, float]] = []
    train(run.plan.base_job, ComputeSettings(num_workers=0), rows.append)
    plain.train_base()
    found = read_previews(run.plan.base_artifact.path)
    assert [row["nimg"] for row in found] == EVERY
    assert all(row["fd_pixels@80"] > 0 for row in found)
    assert [row for row in rows if "fd_pixels@80" in row] == found
    sizes = [Image.open(run.plan.base_artifact.path / sheet_name(nimg)).size for nimg in EVERY]
    assert set(sizes) == {(8 * 33 - 1, 8 * 33 - 1)}  # 64 images of 8 pixels, four times as large
    assert run.plan.base_fingerprint == plain.plan.base_fingerprint
    shown, expected = (load_tensors(each.plan.base)[0] for each in (run, plain))
    assert all(torch.equal(shown[name], expected[name]) for name in expected)


def test_a_preview_s_distance_is_that_of_an_evaluation_on_its_seeds(tiny: TinyRecipe, tmp_path: Path) -> None:
    run = shown_run(tiny, tmp_path)
    run.train_base()
    preview = run.plan.base_job.preview
    row = show(preview, run.plan.base, tmp_path, 7)
    artifact = run.plan.store.artifact("evaluate", {"of": "a preview"})
    evaluation = Evaluation(
        artifact, SimsModel.of(run.plan.base), run.plan.sampler, preview.seeds, run.plan.features.path, 1000
    )
    evaluate([evaluation], run.recipe.compute)
    assert row["fd_pixels@80"] == pytest.approx(artifact.result["distance"], rel=1e-6)
    assert row["nimg"] == 7


def test_without_a_distance_images_are_shown_all_the_same(tiny: TinyRecipe, tmp_path: Path) -> None:
    run = SimsRun(tiny("train.preview_kimg=1.5"), tmp_path)
    run.train_base()
    assert read_previews(run.plan.base_artifact.path) == [{"nimg": 1536.0}]
    pixels = np.asarray(Image.open(run.plan.base_artifact.path / sheet_name(1536)))
    assert pixels.std() > 1


def test_a_line_that_is_being_written_is_passed_over_and_a_repeated_one_counts_once(tmp_path: Path) -> None:
    (tmp_path / PREVIEWS).write_text('{"nimg": 20.0, "fd": 1.0}\n{"nimg": 10.0}\n{"nimg": 20.0, "fd": 2.0}\n{"nimg": 3')
    assert read_previews(tmp_path) == [{"nimg": 10.0}, {"nimg": 20.0, "fd": 2.0}]


def test_seeds_of_a_preview_s_distance_are_in_the_ledger(tiny: TinyRecipe, tmp_path: Path) -> None:
    recipe = tiny(*SHOWN)
    assert len(recipe.seed_ledger()["preview"]) == 80
    with pytest.raises((SimsError, ValueError), match="overlap"):
        tiny(*SHOWN, "seeds.preview=40", "seeds.synthesis=0")


@pytest.mark.slow
def test_ray_samples_previews_while_training_goes_on(
    tiny: TinyRecipe, tmp_path: Path, ray_cluster: ComputeSettings
) -> None:
    alone = shown_run(tiny, tmp_path / "alone")
    alone.train_base()
    together = shown_run(tiny, tmp_path / "together", "compute.num_workers=2")
    together.train_base()
    found, expected = (read_previews(run.plan.base_artifact.path) for run in (together, alone))
    assert [row["nimg"] for row in found] == EVERY
    for row, other in zip(found, expected, strict=True):
        assert row["fd_pixels@80"] == pytest.approx(other["fd_pixels@80"], rel=0.02)
        assert (together.plan.base_artifact.path / sheet_name(int(row["nimg"]))).is_file()
