"""Laws of the sweep on Ray Tune: distances on the way, early stopping, a search, and going on where it was."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.config import ComputeSettings
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.features import image_features
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.kid import kid
from sims_ray.metrics.manifold import manifold_scores
from sims_ray.metrics.moments import Moments
from sims_ray.stages.cells import Cell, Trial
from sims_ray.stages.evaluate import Evaluation, MomentsWorker, evaluate_here
from sims_ray.stages.features import load_extractor, load_real_features, load_reference
from sims_ray.stages.images import images_of
from sims_ray.stages.sweep import Sweep
from sims_ray.stages.tune import tune
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

ALONE = ComputeSettings(num_workers=0)
OMEGAS = "tune.omega=[-1,0,0.5,1,1.5,2,3]"
STEPPED = ("tune.n_images=96", "tune.fidelities=[24,48]", OMEGAS)


@pytest.fixture(scope="module")
def folder(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with everything up to the sweep."""
    out = tmp_path_factory.mktemp("run")
    run = SimsRun(tiny(), out)
    run.finetune()
    run.make_features()
    return out


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


def sweep_of(tiny: TinyRecipe, out: Path, *overrides: str) -> Sweep:
    return SimsRun(tiny(*STEPPED, *overrides), out).plan.sweep


def run(sweep: Sweep, compute: ComputeSettings) -> dict[str, Mapping[str, Any]]:
    """Outcomes by the trial's name, as they are told."""
    told: dict[str, Mapping[str, Any]] = {}

    def on_trial(trial: Trial, outcome: Mapping[str, Any]) -> None:
        assert trial.name not in told, "a trial was told twice"
        told[trial.name] = outcome

    tune(sweep, compute, on_trial)
    return told


def test_distances_on_the_way_are_those_of_evaluations_of_so_many_images(tiny: TinyRecipe, fresh: Path) -> None:
    plan = SimsRun(tiny(*STEPPED), fresh).plan
    trial = next(trial for trial in plan.sweep.trials if trial.cell.guided)
    points: list[dict[str, Any]] = []
    evaluate_here(trial.evaluation, MomentsWorker(ALONE), points.append)
    assert [point["nimg"] for point in points] == [24, 48, 96]
    assert trial.evaluation.curve == points
    for point in points:
        seeds = plan.seeds["selection"][: point["nimg"]]
        alone = Evaluation(plan.store.artifact("alone", point), trial.evaluation.model, plan.sampler, seeds,
                           plan.features.path, 1000)  # fmt: skip
        evaluate_here(alone, MomentsWorker(ALONE))
        assert alone.artifact.result["distance"] == pytest.approx(point["distance"], rel=1e-6)


def test_an_evaluation_that_was_left_on_the_way_samples_only_the_rest(
    tiny: TinyRecipe, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = sweep_of(tiny, fresh).trials[1].evaluation

    def leave(point: Mapping[str, Any]) -> None:
        if point["nimg"] == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_here(evaluation, MomentsWorker(ALONE), leave)
    assert [point["nimg"] for point in evaluation.curve] == [24, 48] and not evaluation.artifact.complete
    sampled: list[range] = []
    worker = MomentsWorker(ALONE)
    batches = worker._sampler.batches
    monkeypatch.setattr(
        worker._sampler,
        "batches",
        lambda model, seeds, sampler: sampled.append(seeds) or batches(model, seeds, sampler),
    )
    evaluate_here(evaluation, worker)
    assert sum(map(len, sampled)) == 48 and evaluation.artifact.result["nimg"] == 96
    assert {path.name for path in evaluation.artifact.path.iterdir()} == {"manifest.json", "moments.npz"}


def test_early_stopping_spends_less_and_selects_only_what_was_measured_in_full(
    tiny: TinyRecipe, fresh: Path, ray_cluster: ComputeSettings
) -> None:
    sweep = sweep_of(tiny, fresh, "tune.stop_early=true", "tune.reduction_factor=3")
    told = run(sweep, ray_cluster)
    assert set(told) == {trial.name for trial in sweep.trials}
    stopped = [outcome for outcome in told.values() if outcome["stopped"]]
    whole = [outcome for outcome in told.values() if not outcome["stopped"]]
    assert stopped and whole and all(outcome["nimg"] in (24, 48) for outcome in stopped)
    assert all(outcome["curve"][-1]["nimg"] == outcome["nimg"] for outcome in told.values())
    assert all(outcome["metric"] == f"fd_classifier@{outcome['nimg']}" for outcome in told.values())
    selected = sweep.artifact.result["selected"]
    guided = [outcome for outcome in whole if outcome["omega"] > 0]
    assert selected["distance"] == min(outcome["distance"] for outcome in guided) and not selected["stopped"]
    assert told["base"]["nimg"] == 96  # which all others are compared with, and is measured first


def test_a_search_goes_on_after_a_stop_and_runs_no_trial_twice(
    tiny: TinyRecipe, fresh: Path, ray_cluster: ComputeSettings
) -> None:
    settings = ("tune.search=optuna", "tune.num_trials=6")
    sweep = sweep_of(tiny, fresh, *settings)
    first = run(sweep, ray_cluster)
    assert len(first) == 7
    (sweep.artifact.path / "manifest.json").unlink()
    for trial in [trial for trial in sweep.trials if trial.name in list(first)[4:]]:  # as if it had stopped there
        sweep.note(trial).unlink()
        shutil.rmtree(trial.evaluation.artifact.path)
    notes = {path: path.stat().st_mtime_ns for path in sweep.artifact.path.glob("trial-*.json")}
    again = sweep_of(tiny, fresh, *settings)
    told = run(again, ray_cluster)
    assert len(told) == 7 and again.artifact.complete  # the base and six others
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in notes.items())


def test_neon_is_searched_beside_sims_and_each_has_its_own_best(tiny: TinyRecipe, fresh: Path) -> None:
    sweep = sweep_of(tiny, fresh, "tune.w=[0,0.5,1]", "tune.omega=[0,1]", "finetune.budgets_kimg=[1]")
    told = run(sweep, ALONE)
    assert set(told) == {"base", *(f"{s} B=1kimg n_s=96" for s in ("omega=1", "w=0.5", "w=1"))}
    best = sweep.artifact.result["best"]
    assert best["weight"]["omega"] in (0.5, 1) and best["weight"]["space"] == "weight"
    assert best["score"]["omega"] == 1 and "space" not in best["score"]
    assert told["w=1 B=1kimg n_s=96"]["nfe"] * 2 == told["omega=1 B=1kimg n_s=96"]["nfe"]  # one network, not two


def test_cells_with_other_intervals_and_steps_are_cells_of_their_own(tiny: TinyRecipe, folder: Path) -> None:
    sweep = sweep_of(
        tiny, folder, "tune.omega=[-1,0,1]", "finetune.budgets_kimg=[1]", "tune.num_steps=[4,8]",
        "tune.intervals=[{sigma_lo: 0.1}, {sigma_lo: 0.1, sigma_hi: 5}]",
    )  # fmt: skip
    cells = [trial.cell for trial in sweep.trials]
    bases = [cell for cell in cells if cell.omega == 0]
    assert {cell.num_steps for cell in bases} == {None, 8} and len(bases) == 2  # 4 is the recipe's own
    assert len([cell for cell in cells if cell.omega == -1]) == 2  # which no interval touches
    assert len({trial.evaluation.artifact.fingerprint for trial in sweep.trials}) == len(cells)
    assert {(cell.sigma_lo, cell.sigma_hi) for cell in cells if cell.omega == 1} == {(0.1, None), (0.1, 5.0)}


def test_what_goes_wrong_with_an_outcome_is_not_lost_in_ray_tune(
    tiny: TinyRecipe, fresh: Path, ray_cluster: ComputeSettings
) -> None:
    def refuse(trial: Trial, outcome: Mapping[str, Any]) -> None:
        if trial.cell.guided:
            raise OSError("no space left")

    sweep = sweep_of(tiny, fresh, "tune.omega=[0,1]", "finetune.budgets_kimg=[1]")
    with pytest.raises(OSError, match="no space left"):
        tune(sweep, ray_cluster, refuse)
    assert not sweep.artifact.complete


def test_a_search_needs_ray_and_says_so(tiny: TinyRecipe, folder: Path) -> None:
    with pytest.raises(SimsError, match=r"tune\.search=optuna runs on Ray Tune; set compute\.num_workers"):
        tune(sweep_of(tiny, folder, "tune.search=optuna"), ALONE, lambda trial, outcome: None)


def test_a_trial_that_is_noted_is_told_and_not_measured(tiny: TinyRecipe, fresh: Path) -> None:
    sweep = sweep_of(tiny, fresh, "tune.omega=[0,1]", "finetune.budgets_kimg=[1]")
    run(sweep, ALONE)
    (guided,) = [trial for trial in sweep.trials if trial.cell != Cell()]
    noted = {**json.loads(sweep.note(guided).read_text()), "distance": 123.0}
    sweep.note(guided).write_text(json.dumps(noted))
    (sweep.artifact.path / "manifest.json").unlink()
    assert run(sweep, ALONE)[guided.name]["distance"] == 123.0


def test_what_is_measured_besides_is_that_of_the_images_features(tiny: TinyRecipe, fresh: Path) -> None:
    plan = SimsRun(tiny("evaluate.part_nimg=20"), fresh).plan
    evaluation = plan.evaluation(plan.report_blocks[0], Cell())
    evaluate_here(evaluation, MomentsWorker(ALONE))
    images, _ = images_of(evaluation.model, evaluation.seeds, plan.sampler)
    features = image_features(load_extractor(plan.features.path).features, images)
    real = load_real_features(plan.features.path)
    assert len(real) == len(np.unique(real, axis=0)) == 1797
    measures = evaluation.artifact.result["measures"]
    scores = manifold_scores(real[:64], features, 5)
    assert measures["kid"] == pytest.approx(kid(real, features), rel=1e-3)
    assert measures["precision"] == pytest.approx(scores.precision, abs=0.05)
    assert measures["recall"] == pytest.approx(scores.recall, abs=0.05)
    assert set(measures) == {"kid", "precision", "recall", "density", "coverage", "fd_inf"}


def test_the_first_of_the_kept_real_features_are_a_fair_choice(tiny: TinyRecipe, fresh: Path) -> None:
    plan = SimsRun(tiny(), fresh).plan
    real, reference = load_real_features(plan.features.path), load_reference(plan.features.path)
    assert frechet_distance(Moments.of(real), reference) == pytest.approx(0, abs=1e-6)
    table = SampleTable(plan.inputs.table).head(1797)
    in_order = image_features(load_extractor(plan.features.path).features, table.images)
    assert not np.array_equal(in_order[:200], real[:200])
