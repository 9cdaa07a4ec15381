"""A base that the user brings: improved without being trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Store
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe
from tests.networks import SETTINGS, small_network


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "mine.safetensors"
    card = {"role": "base", "network": SETTINGS, "nimg": 5, "licence": "CC BY-NC-SA 4.0"}
    save_tensors(path, small_network().state_dict(), card)
    return path


def test_a_base_of_the_users_is_improved_without_training_and_hands_on_its_licence(
    base: Path, out: Path, tiny: TinyRecipe
) -> None:
    recipe = tiny(f"train.checkpoint={base}")
    run = SimsRun(recipe, out)
    assert "train base" not in run.describe()
    summary = run.report()
    copied, card = load_tensors(run.plan.base)
    assert all(torch.equal(copied[name], tensor) for name, tensor in load_tensors(base)[0].items())
    matched = ["base, matched evaluations", "base, matched training"]
    assert [row["model"] for row in summary["table"]] == ["base", *matched, "auxiliary", "SIMS"]
    assert len({row["distance"] for row in summary["table"]}) == 5
    _, aux_card = load_tensors(run.plan.finetune_job(96).artifact.path / "ema-1kimg.safetensors")
    assert aux_card["licence"] == card["licence"]
    assert "base" not in summary["losses"]
    base.unlink()  # the output folder is complete in itself
    assert len(SampleTable(run.plan.synthesis_job.set.folder)) == 96


def test_another_base_makes_other_artifacts_and_the_same_one_under_another_name_the_same(
    base: Path, tmp_path: Path, out: Path, tiny: TinyRecipe
) -> None:
    renamed, other = tmp_path / "renamed.safetensors", tmp_path / "other.safetensors"
    renamed.write_bytes(base.read_bytes())
    save_tensors(other, small_network(1).state_dict(), {"role": "base", "network": SETTINGS, "nimg": 5})
    paths = [SimsRun(tiny(f"train.checkpoint={path}"), out).plan.base for path in (base, renamed, other)]
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize(
    ("settings", "card", "sentence"),
    [
        ({"img_resolution": 16}, {}, r"makes images of \(1, 16, 16\), but digits holds \(1, 8, 8\)"),
        ({"label_dim": 3}, {}, "knows 3 classes, but digits has 10"),
        ({}, {"finetune.augment": 0.1}, "is not told augmentations"),
    ],
)
def test_a_base_that_does_not_fit_the_images_is_refused_before_any_work(
    settings: dict[str, int], card: dict[str, float], sentence: str, tmp_path: Path, out: Path, tiny: TinyRecipe
) -> None:
    path = tmp_path / "mine.safetensors"
    network = {**SETTINGS, **settings}
    save_tensors(path, small_network(**settings).state_dict(), {"role": "base", "network": network, "nimg": 5})
    overrides = [f"{key}={value}" for key, value in card.items()]
    with pytest.raises(SimsError, match=sentence):
        SimsRun(tiny(f"train.checkpoint={path}", *overrides), out)
    assert not out.exists()


def test_a_base_whose_card_says_no_precision_runs_in_float32(base: Path, out: Path, tiny: TinyRecipe) -> None:
    assert SimsRun(tiny(f"train.checkpoint={base}"), out).plan.finetune_job(96).precision == "float32"


def test_a_missing_base_is_refused_before_any_work(out: Path, tiny: TinyRecipe) -> None:
    with pytest.raises(SimsError, match="no checkpoint at nowhere"):
        SimsRun(tiny("train.checkpoint=nowhere.safetensors"), out)
    assert not out.exists()


def test_a_base_of_latents_is_fine_tuned_on_its_own_latents_and_hands_on_how_they_are_decoded(
    tmp_path: Path, out: Path, tiny: TinyRecipe
) -> None:
    path, table = tmp_path / "latent.safetensors", Store(tmp_path).artifact("import", {})
    latents = {"vae": "a/vae", "scaling_factor": 0.2, "pixel_range": [-1, 1]}
    card = {"role": "base", "network": {**SETTINGS, "img_channels": 4}, "nimg": 5, "latents": latents}
    save_tensors(path, small_network(img_channels=4).state_dict(), card)
    real = Samples(np.arange(8), np.zeros((8, 4, 8, 8), np.float16), np.full(8, -1, np.int32))
    write_samples(table.path / "part.parquet", real, {})
    table.commit({"part.parquet": {"rows": 8}}, table_result((4, 8, 8), real.labels, 8, "latent"))
    run = SimsRun(tiny(f"train.checkpoint={path}", f"data.path={table.path}", "features.kind=pixels"), out)
    run.finetune()
    synthetic = SampleTable(run.plan.synthesis_job.set.folder)
    assert synthetic.kind == "latent" and synthetic.head(96).images.dtype == np.float16
    _, aux_card = load_tensors(run.plan.finetune_job(96).artifact.path / "ema-1kimg.safetensors")
    assert aux_card["latents"] == synthetic.manifest["result"]["latents"] == latents
