"""What a plan makes of a recipe: which settings make other artifacts, and that the presets can be run."""

from pathlib import Path

import numpy as np
import pytest

from sims_ray.config import load_recipe, presets
from sims_ray.data.samples import IMAGE_CHANNELS, Samples, write_samples
from sims_ray.data.table import table_result
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Cell
from sims_ray.storage.artifacts import Store
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.models import SimsModel
from sims_ray.studies.inputs import Inputs
from sims_ray.studies.plan import Plan
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe
from tests.networks import SETTINGS, small_network

CELL = Cell(1.0, 1.0, 96)


def table_like(folder: Path, shape: tuple[int, int, int], num_classes: int, dtype: type = np.uint8) -> Path:
    """A sample table of a few blank images or latents."""
    rows = max(num_classes, 2)
    artifact = Store(folder).artifact("import", {"shape": shape, "classes": num_classes})
    labels = np.arange(rows) if num_classes else np.full(rows, -1)
    samples = Samples(np.arange(rows), np.zeros((rows, *shape), dtype), labels.astype(np.int32))
    write_samples(artifact.path / "part.parquet", samples, {})
    artifact.commit({"part.parquet": {"rows": rows}}, table_result(shape, samples.labels, rows, samples.kind))
    return artifact.path


@pytest.mark.parametrize("name", list(presets()))
def test_every_preset_runs_on_a_table_of_its_own_shape(name: str, tmp_path: Path) -> None:
    preset = presets()[name]
    dtype = np.uint8 if preset.shape[0] in IMAGE_CHANNELS else np.float16
    recipe = load_recipe(name, [f"data.path={table_like(tmp_path, preset.shape, preset.num_classes, dtype)}"])
    network = Inputs(recipe, Store(tmp_path)).network
    assert (network["img_channels"], network["img_resolution"]) == preset.shape[:2]


def test_images_of_four_channels_are_refused_and_latents_of_four_are_not_measured(tmp_path: Path) -> None:
    preset = presets()["edm2-img512-xs"]
    images = table_like(tmp_path / "images", preset.shape, preset.num_classes)
    with pytest.raises(SimsError, match="images are grey or RGB"):
        Inputs(load_recipe("edm2-img512-xs", [f"data.path={images}"]), Store(tmp_path))
    latents = table_like(tmp_path / "latents", preset.shape, preset.num_classes, np.float16)
    run = SimsRun(load_recipe("edm2-img512-xs", [f"data.path={latents}"]), tmp_path / "run")
    assert run.plan.synthesis_job.set.kind == "latent"
    with pytest.raises(SimsError, match="decode with `sims data decode`"):
        run.make_features()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("compute.precision=float16", {"base", "synthesis", "finetune", "evaluation"}),
        ("network.precision=bfloat16", {"base", "synthesis", "finetune", "evaluation"}),
        ("guidance.sigma_hi=5", {"evaluation"}),
        ("finetune.trainable=decoder", {"finetune", "evaluation"}),
        ("sampler.solver=euler", {"synthesis", "finetune", "evaluation"}),
        ("train.ema_std=0.2", set()),  # without power-function averages it means nothing
        ("compute.num_workers=2", set()),
        ("compute.micro_batch=8", set()),
        ("synthesize.shard_nimg=50", set()),
        ("synthesize.root=elsewhere", set()),
        ("tune.n_s=[96,1000]", set()),
        ("seeds.synthesis=5", {"synthesis", "finetune", "evaluation"}),
        ("train.duration_kimg=3", {"synthesis", "finetune", "evaluation"}),  # the base is extended, or has a snapshot
        ("finetune.budgets_kimg=[1,2]", set()),
        ("finetune.start=weights", {"finetune", "evaluation"}),
        ("finetune.reset_optimizer=false", {"finetune", "evaluation"}),
        ("finetune.dropout=0", {"finetune", "evaluation"}),
        ("finetune.checkpoint_kimg=3", set()),
        ("compute.compile=true", set()),
    ],
)
def test_a_setting_makes_other_artifacts_exactly_where_it_changes_their_content(
    override: str, changed: set[str], out: Path, tiny: TinyRecipe
) -> None:
    def prints(*overrides: str) -> dict[str, str]:
        plan = Plan(tiny(*overrides), out)
        seeds = plan.seeds["selection"]
        artifacts = {
            "base": plan.base_artifact,
            "finetune": plan.finetune_job(96).artifact,
            "evaluation": plan.evaluation(seeds, plan.cell(1.0, 1.0, 96)).artifact,
        }
        prints = {name: artifact.fingerprint for name, artifact in artifacts.items()}
        return {**prints, "synthesis": plan.synthesis_job.fingerprint}

    before, after = prints(), prints(override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_what_is_made_from_a_training_depends_on_how_long_it_was(out: Path, tiny: TinyRecipe) -> None:
    short, long = (Plan(tiny(f"train.duration_kimg={duration}"), out) for duration in (100, 200))
    assert short.base_artifact == long.base_artifact and short.base != long.base
    assert short.synthesis_job.set.folder != long.synthesis_job.set.folder
    assert short.synthesis_job.model.base == str(short.base)
    assert short.finetune_job(96).init_state != long.finetune_job(96).init_state
    seeds = short.seeds["selection"]
    budgets = [short.evaluation(seeds, Cell(1.0, budget, 96)).artifact for budget in (0.5, 1.0)]
    assert budgets[0].parents[:2] == budgets[1].parents[:2] and budgets[0].parents[2] != budgets[1].parents[2]
    previews = [plan.preview_jobs({"score": CELL.params}) for plan in (short, long)]
    assert all(previews[0][name].fingerprint != previews[1][name].fingerprint for name in previews[0])


@pytest.mark.parametrize("setting", ["start=weights", "reset_optimizer=false"])
def test_a_base_of_the_users_has_no_training_state_to_start_from(setting: str, out: Path, tiny: TinyRecipe) -> None:
    path = out.parent / "mine.safetensors"
    save_tensors(path, small_network().state_dict(), {"role": "base", "network": SETTINGS, "nimg": 5})
    with pytest.raises(
        SimsError, match=rf"finetune\.{setting} needs the training state of a base.*leave one of them out"
    ):
        Plan(tiny(f"finetune.{setting}", f"train.checkpoint={path}"), out)
    assert Plan(tiny(f"train.checkpoint={path}"), out).finetune_job(96).init_state is None
    assert not out.exists()


def test_the_auxiliary_of_the_table_is_not_touched_by_a_guidance_interval(out: Path, tiny: TinyRecipe) -> None:
    plain, interval = (Plan(tiny(*extra), out) for extra in ((), ("guidance.sigma_lo=0.1", "guidance.sigma_hi=5")))
    seeds = plain.seeds["selection"]
    alone = Cell(-1.0, 1.0, 96)
    assert plain.evaluation(seeds, alone).artifact == interval.evaluation(seeds, alone).artifact
    assert isinstance(interval.model(alone), SimsModel)


def test_labels_make_another_set_and_are_refused_at_once_where_the_network_does_not_know_them(
    out: Path, tiny: TinyRecipe
) -> None:
    conditional, uniform = "network.conditional=true", "synthesize.labels.kind=uniform"
    plain, chosen = Plan(tiny(conditional), out), Plan(tiny(conditional, uniform), out)
    assert plain.synthesis_job.fingerprint != chosen.synthesis_job.fingerprint
    assert plain.base_artifact == chosen.base_artifact
    with pytest.raises(SimsError, match="needs a class-conditional network"):
        Plan(tiny(uniform), out)
