"""Budgets are snapshots of one training, which can be extended; a budget's weights depend on nothing but the budget."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.stages.budgets import BETWEEN
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob, budget_name, snapshot_name
from sims_ray.storage.artifacts import MANIFEST, sha256_file
from sims_ray.storage.checkpoints import load_tensors, read_card
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

ALONE = ComputeSettings(num_workers=0)
N_S = 96
BATCH = 64
KINDS = [
    pytest.param((), id="half-life"),
    pytest.param(("finetune.dropout=0.1",), id="dropout"),
    pytest.param(("finetune.ema_stds=[0.05,0.1]", "finetune.ema_snapshot_kimg=0.2"), id="power-function"),
]

Jobs = Callable[..., TrainJob]


class Stopped(Exception):
    """The process dies here."""


@pytest.fixture(scope="module")
def begun(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a base and a synthetic set."""
    out = tmp_path_factory.mktemp("budgets") / "run"
    SimsRun(tiny(), out).synthesize()
    return out


@pytest.fixture
def jobs(tiny: TinyRecipe, begun: Path, tmp_path: Path) -> Jobs:
    """Builds fine-tuning jobs, by budgets in kimg, in a copy of that folder named by `where`."""

    def build(*budgets_kimg: float, where: str = "run", settings: tuple[str, ...] = ()) -> TrainJob:
        out = tmp_path / where
        if not out.exists():
            shutil.copytree(begun, out)
        overrides = (f"finetune.budgets_kimg={list(budgets_kimg)}", *settings)
        return SimsRun(tiny(*overrides), out).plan.finetune_job(N_S)

    return build


def trained(job: TrainJob) -> list[dict[str, float]]:
    """The rows of the log that training passed on."""
    rows: list[dict[str, float]] = []
    train(job, ALONE, rows.append)
    assert job.complete
    return rows


def weights(job: TrainJob, budget_kimg: float) -> dict[str, torch.Tensor]:
    tensors, card = load_tensors(job.snapshot(budget_kimg))
    assert card["nimg"] == job.snapshot_nimg(budget_kimg)
    return tensors


def assert_same(job: TrainJob, other: TrainJob, *budgets_kimg: float) -> None:
    for budget in budgets_kimg:
        first, second = weights(job, budget), weights(other, budget)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), budget


@contextmanager
def stopped_at(nimg: int) -> Iterator[list[int]]:
    """Training dies in the step that reaches `nimg`; yields the images seen before each step."""
    step, starts = Training.step, []

    def dies(training: Training) -> None:
        starts.append(training.nimg)
        step(training)
        if training.nimg >= nimg:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", dies)
        yield starts


def watched() -> Any:
    """The images seen before each step of what runs inside."""
    return stopped_at(1 << 60)


def contents(job: TrainJob) -> dict[str, tuple[int, str]]:
    """Time and digest of each file that the manifest lists."""
    paths = [job.artifact.path / name for name in job.artifact.manifest["files"]]
    return {path.name: (path.stat().st_mtime_ns, sha256_file(path)) for path in paths}


@pytest.mark.parametrize("settings", KINDS)
def test_one_run_with_four_snapshots_equals_runs_that_were_extended_bit_for_bit(
    settings: tuple[str, ...], jobs: Jobs
) -> None:
    at_once = jobs(0.3, 0.5, 0.7, 1, settings=settings)
    trained(at_once)
    for budgets in ([0.5], [0.5, 1], [0.3, 0.7, 1]):  # to 512; on to 1024; then what lies between
        extended = jobs(*budgets, where="extended", settings=settings)
        trained(extended)
    assert extended.artifact.path.name == at_once.artifact.path.name
    assert_same(at_once, extended, 0.3, 0.5, 0.7, 1)
    alone = jobs(0.7, where="alone", settings=settings)
    trained(alone)
    assert_same(at_once, alone, 0.7)


def test_an_extension_goes_on_from_the_last_state_and_adds_to_what_is_there(jobs: Jobs) -> None:
    short = jobs(0.5)
    with watched() as steps:
        trained(short)
    before = contents(short)
    assert steps == list(range(0, 512, BATCH))
    with watched() as steps:
        trained(jobs(0.5, 1))
    assert steps == list(range(512, 1024, BATCH))
    job, after = jobs(0.5, 1), contents(jobs(0.5, 1))
    assert after[snapshot_name(0.5)] == before[snapshot_name(0.5)]
    states = [path.name for path in job.artifact.path.glob("state-*")]
    assert states == ["state-000000001024.safetensors"] and states[0] in after
    assert sorted(job.artifact.result["snapshots"]) == ["0.5", "1"]
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: entry["sha256"] for name, entry in job.artifact.manifest["files"].items()
    }


@pytest.mark.parametrize("settings", KINDS)
def test_a_budget_that_was_passed_is_made_without_touching_what_is_there(settings: tuple[str, ...], jobs: Jobs) -> None:
    trained(jobs(1, settings=settings))
    before = contents(jobs(1, settings=settings))
    log = jobs(1, settings=settings).log_rows()
    rows = trained(jobs(0.5, settings=settings))
    assert rows == []  # they were passed on when the longer run was made
    after = contents(jobs(0.5, 1, settings=settings))
    assert {name: after[name] for name in before} == before
    assert snapshot_name(0.5) in after
    assert jobs(1, settings=settings).log_rows() == log
    assert not (jobs(1, settings=settings).artifact.path / BETWEEN).exists()


def test_a_smaller_budget_of_a_base_goes_on_from_the_newest_state_before_it(tiny: TinyRecipe, tmp_path: Path) -> None:
    def base(duration_kimg: float, where: str = "run") -> TrainJob:
        run = SimsRun(tiny(f"train.duration_kimg={duration_kimg}"), tmp_path / where)
        run.import_data()
        return run.plan.base_job

    for duration in (0.5, 2):
        trained(base(duration))
    with watched() as steps:
        trained(base(1.2))
    assert steps == list(range(512, 1216, BATCH))
    trained(base(1.2, "straight"))
    assert_same(base(1.2), base(1.2, "straight"), 1.2)
    states = {path.name for path in base(2).artifact.path.glob("state-*")}  # an auxiliary may start from any of them
    assert states == {f"state-{nimg:012d}.safetensors" for nimg in (512, 1216, 2048)}
    assert states < set(base(2).artifact.manifest["files"])


def test_budgets_that_are_there_are_not_trained_again_whatever_is_asked_for_beside_them(
    tiny: TinyRecipe, begun: Path, tmp_path: Path, jobs: Jobs
) -> None:
    trained(jobs(0.3, 0.5, 1))
    artifacts = tmp_path / "run" / "artifacts"
    files = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    subset = jobs(0.3, 1)
    assert subset.complete and subset.missing_kimg == ()
    run = SimsRun(tiny("finetune.budgets_kimg=[0.3,1]"), tmp_path / "run")
    run.finetune()
    assert {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()} == files
    assert jobs(0.3, 0.7, 2).missing_kimg == (0.7, 2.0)


@pytest.mark.parametrize("stop_nimg", [576, 832])
def test_a_run_killed_while_it_extends_leaves_the_old_artifact_valid_and_goes_on_to_the_same_weights(
    stop_nimg: int, jobs: Jobs
) -> None:
    short = jobs(0.5)
    trained(short)
    manifest, before = (short.artifact.path / MANIFEST).read_bytes(), contents(short)
    with stopped_at(stop_nimg) as steps, pytest.raises(SimsError, match="run the same command"):
        trained(jobs(0.5, 0.7, 1))
    assert steps[0] == 512 and steps[-1] == stop_nimg - BATCH
    assert (short.artifact.path / MANIFEST).read_bytes() == manifest
    assert short.complete and contents(short) == before
    assert jobs(0.5, 0.7, 1).missing_kimg == (0.7, 1.0)
    with watched() as steps:
        rows = trained(jobs(0.5, 0.7, 1))
    assert steps[0] == (768 if stop_nimg > 768 else 512)
    straight = jobs(0.5, 0.7, 1, where="straight")
    trained(straight)
    assert_same(jobs(0.5, 0.7, 1), straight, 0.5, 0.7, 1)
    assert [row["nimg"] for row in rows] == sorted({row["nimg"] for row in rows})


def test_a_run_killed_between_two_budgets_goes_on_there_and_nothing_of_it_is_left(jobs: Jobs) -> None:
    trained(jobs(1))
    before = contents(jobs(1))
    with stopped_at(576), pytest.raises(SimsError, match="run the same command"):
        trained(jobs(0.7, 1))
    assert contents(jobs(1)) == before
    with watched() as steps:
        trained(jobs(0.7, 1))
    assert steps[0] == 512  # the checkpoint of the killed run
    straight = jobs(0.7, where="straight")
    trained(straight)
    assert_same(jobs(0.7), straight, 0.7)
    assert {path.name for path in jobs(1).artifact.path.iterdir() if path.is_dir()} == set()


def test_a_snapshot_that_a_killed_run_left_counts_if_it_is_whole(jobs: Jobs) -> None:
    with stopped_at(896), pytest.raises(SimsError):
        trained(jobs(0.5, 0.7, 1))
    job = jobs(0.5, 0.7, 1)
    whole, torn = job.snapshot(0.5), job.snapshot(0.7)
    before = whole.stat().st_mtime_ns
    torn.write_bytes(torn.read_bytes()[:-100])
    assert job.missing_kimg == job.budgets_kimg  # as nothing is committed
    trained(job)
    assert whole.stat().st_mtime_ns == before
    straight = jobs(0.5, 0.7, 1, where="straight")
    trained(straight)
    assert_same(job, straight, 0.5, 0.7, 1)


def test_the_log_of_a_training_that_was_extended_has_every_row_once(jobs: Jobs) -> None:
    trained(jobs(0.5, 1, where="straight"))
    first = trained(jobs(0.5))
    rows = trained(jobs(0.5, 1))
    assert rows[: len(first)] == first
    keys = [
        [(row["nimg"], row["loss"]) for row in found] for found in (rows, jobs(0.5, 1, where="straight").log_rows())
    ]
    assert keys[0] == keys[1]
    assert jobs(0.5).log_rows() == first  # what a shorter run shows does not change
    result = jobs(1).artifact.result
    assert (result["nimg"], result["loss"]) == keys[0][-1]


def test_each_snapshot_is_the_first_whole_batch_at_its_budget_and_has_a_name_of_its_own(jobs: Jobs) -> None:
    job = jobs(0.3, 1)
    assert (job.first_nimg, job.stop_nimg) == (320, 1024)
    settings = job.settings.model_copy(update={"batch_size": 1100})
    assert replace(job, budgets_kimg=(1.1,), settings=settings).stop_nimg == 1100  # 1.1 * 1000 is a little more
    assert budget_name(1073741.824) != budget_name(1073741.825)
    assert [budget_name(b) for b in (0.5, 40.0, 200000.0)] == ["0.5", "40", "200000"]
    assert len({job.snapshot_fingerprint(budget) for budget in (0.3, 0.5, 1)}) == 3
    assert job.snapshot_fingerprint(1) == job.snapshot_fingerprint(1.02)  # the same step
    assert job.snapshot_fingerprint(1) == jobs(0.5, 1, 2).snapshot_fingerprint(1.0)


def test_the_cards_of_an_extended_run_are_those_of_one_run(jobs: Jobs) -> None:
    for budgets in ([0.5], [1]):
        trained(jobs(*budgets, where="extended"))
    trained(jobs(0.5, 1))
    one, other = (read_card(jobs(1, where=where).snapshot(1)) for where in ("run", "extended"))
    assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
