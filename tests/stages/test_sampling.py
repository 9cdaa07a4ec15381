import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from sims_ray.config import ComputeSettings
from sims_ray.data.table import SampleTable
from sims_ray.stages.cells import Cell
from sims_ray.stages.evaluate import evaluate
from sims_ray.stages.synthesize import SynthesisJob, synthesize
from sims_ray.stages.tune import tune
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

ALONE = ComputeSettings(num_workers=0)


@pytest.fixture(scope="module")
def finetuned(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> SimsRun:
    """A run with everything up to the sweep, made without Ray."""
    run = SimsRun(tiny("network.conditional=true"), tmp_path_factory.mktemp("run"))
    run.finetune()
    run.make_features()
    return run


def digests(job: SynthesisJob) -> dict[str, str]:
    folder = job.set.folder.local
    assert folder is not None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


def test_actors_leave_the_same_files_as_a_plain_loop(
    finetuned: SimsRun, tiny: TinyRecipe, ray_cluster: ComputeSettings
) -> None:
    job = finetuned.plan.synthesis_job
    expected = digests(job)
    assert len(expected) == 3
    for name in [*expected, "manifest.json"]:
        job.set.folder.delete(name)
    synthesize([job], ray_cluster)
    assert digests(job) == expected


def test_only_missing_seed_ranges_are_sampled_again(finetuned: SimsRun) -> None:
    job = finetuned.plan.synthesis_job
    folder = job.set.folder.local
    assert folder is not None
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    torn, *kept = sorted(before)
    torn.unlink()
    (folder / "manifest.json").unlink()
    synthesize([job], ALONE)
    assert torn.is_file()
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


def test_synthetic_ids_are_the_seeds_and_labels_are_drawn_from_them(finetuned: SimsRun) -> None:
    samples = SampleTable(finetuned.plan.synthesis_job.set.folder).head(96)
    assert np.array_equal(samples.ids, np.arange(96))
    assert set(samples.labels) <= set(range(10)) and len(set(samples.labels)) > 5


def test_a_sweep_on_ray_tune_measures_what_a_plain_evaluation_measures(
    finetuned: SimsRun, ray_cluster: ComputeSettings, tmp_path: Path
) -> None:
    sweep = finetuned.plan.sweep
    trials = sweep.trials
    seen: list[str] = []
    tune(sweep, ray_cluster, lambda trial, outcome: seen.append(trial.name))
    assert sorted(seen) == sorted(trial.name for trial in trials) and len(seen) == 1 + 2 * 2
    on_tune = [trial.evaluation.artifact.result["distance"] for trial in trials]
    for trial in trials:
        for path in trial.evaluation.artifact.path.iterdir():
            path.unlink()
    evaluate([trial.evaluation for trial in trials], ALONE)
    assert on_tune == pytest.approx([t.evaluation.artifact.result["distance"] for t in trials], rel=1e-6)
    guided = [trial for trial in trials if trial.cell.omega > 0]
    best = min(guided, key=lambda trial: trial.evaluation.artifact.result["distance"])
    assert sweep.artifact.result["selected"]["budget_kimg"] == best.cell.budget_kimg


def test_a_trial_with_a_result_is_not_run_again(finetuned: SimsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = finetuned.plan.sweep
    evaluate([trial.evaluation for trial in sweep.trials], ALONE)
    shutil.rmtree(sweep.artifact.path, ignore_errors=True)
    monkeypatch.setattr("sims_ray.stages.tune.evaluate_here", lambda *_: pytest.fail("a trial ran twice"))
    seen: list[str] = []
    tune(sweep, ALONE, lambda trial, outcome: seen.append(trial.name))
    assert len(seen) == len(sweep.trials) and sweep.artifact.complete


def test_moments_from_actors_equal_those_of_a_plain_loop(finetuned: SimsRun, ray_cluster: ComputeSettings) -> None:
    evaluation = finetuned.plan.evaluation(range(500, 564), Cell(1.0, 1.0, 96))
    evaluate([evaluation], ALONE)
    expected = evaluation.artifact.result["distance"]
    for path in evaluation.artifact.path.iterdir():
        path.unlink()
    evaluate([evaluation], ray_cluster)
    assert evaluation.artifact.result["distance"] == pytest.approx(expected, rel=1e-6)
    assert [path.name for path in evaluation.artifact.path.glob("part-*")] == []
