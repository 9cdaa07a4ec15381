from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sims_ray.config import ComputeSettings
from sims_ray.data.table import SampleTable
from sims_ray.diffusion.order import InMemory, Rows
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.training_log import read_metrics
from sims_ray.stages.training_set import TrainingSet
from sims_ray.storage.checkpoints import load_tensors
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

ALONE = ComputeSettings(num_workers=0)


class Stopped(Exception):
    """The process dies here."""


def prepared(tiny: TinyRecipe, out: Path, *overrides: str) -> TrainJob:
    run = SimsRun(tiny(*overrides), out)
    run.import_data()
    return run.plan.base_job


def trained(job: TrainJob, compute: ComputeSettings = ALONE) -> dict[str, torch.Tensor]:
    rows: list[dict[str, float]] = []
    train(job, compute, rows.append)
    assert [row["nimg"] for row in rows] == sorted({row["nimg"] for row in rows})
    (snapshot,) = job.artifact.result["snapshots"].values()
    return load_tensors(job.artifact.path / snapshot)[0]


def test_training_stopped_anywhere_and_rerun_equals_the_undisturbed_run_bit_for_bit(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (prepared(tiny, tmp_path / name, "network.dropout=0.1") for name in ("a", "b"))
    expected = trained(straight)
    step = Training.step
    for stop_nimg in (320, 1100, 1500):

        def dies(training: Training, stop_nimg: int = stop_nimg) -> None:
            step(training)
            if training.nimg >= stop_nimg:
                raise Stopped

        monkeypatch.setattr(Training, "step", dies)
        with pytest.raises(SimsError, match="run the same command"):
            train(stopped, ALONE, lambda row: None)
    monkeypatch.setattr(Training, "step", step)
    actual = trained(stopped)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    losses = [[(r["nimg"], r["loss"]) for r in read_metrics(job.artifact.path)] for job in (straight, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_workers_train_the_same_model_as_one_and_the_same_bits_whether_they_stream_or_not(
    tiny: TinyRecipe, tmp_path: Path, ray_cluster: ComputeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_windows(monkeypatch, 300)
    readings = {"a": "auto", "b": "resident", "c": "streaming"}
    alone, together, streaming = (prepared(tiny, tmp_path / n, f"data.reading={r}") for n, r in readings.items())
    expected, actual, streamed = trained(alone), trained(together, ray_cluster), trained(streaming, ray_cluster)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(streamed[name], actual[name]), name
    first, second = (read_metrics(job.artifact.path) for job in (alone, together))
    assert [r["nimg"] for r in first] == [r["nimg"] for r in second]
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert second[-1]["loss"] == pytest.approx(first[-1]["loss"], rel=1e-3)


def test_each_budget_leaves_a_snapshot_that_equals_a_run_to_that_budget(tiny: TinyRecipe, tmp_path: Path) -> None:
    both = SimsRun(tiny(), tmp_path / "both")
    both.finetune()
    job = both.plan.finetune_job(96)
    snapshots = job.artifact.result["snapshots"]
    assert sorted(snapshots) == ["0.5", "1"]
    short = SimsRun(tiny("finetune.budgets_kimg=[0.5]"), tmp_path / "short")
    short.finetune()
    one = load_tensors(short.plan.finetune_job(96).artifact.path / snapshots["0.5"])[0]
    other, card = load_tensors(job.artifact.path / snapshots["0.5"])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert card["role"] == "auxiliary" and card["nimg"] == 512  # the first step that reaches 500 images


def test_fine_tuning_starts_from_the_base_and_sees_synthetic_rows_only(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimsRun(tiny(), tmp_path)
    run.synthesize()
    start: dict[str, torch.Tensor] = {}
    batches: list[Rows] = []
    init, batch = Training.__init__, InMemory.batch

    def spy(self: Training, net: Any, *args: Any, **kwargs: Any) -> None:
        start.update({name: value.clone() for name, value in net.state_dict().items()})
        init(self, net, *args, **kwargs)

    def seen(self: InMemory, nimg: int) -> Rows:
        batches.append(batch(self, nimg))
        return batches[-1]

    monkeypatch.setattr(Training, "__init__", spy)
    monkeypatch.setattr(InMemory, "batch", seen)
    run.finetune()
    base = load_tensors(run.plan.base)[0]
    assert all(torch.equal(start[name], base[name]) for name in base)
    synthetic = SampleTable(run.plan.synthesis_job.set.folder).head(96)
    rows = {int(i): row for row, i in enumerate(synthetic.ids)}
    at = np.array([rows[int(i)] for i in np.concatenate([batch.ids for batch in batches])])
    assert set(at) == set(range(96))
    assert (np.concatenate([batch.images for batch in batches]) == synthetic.images[at]).all()


@pytest.mark.parametrize("reading", ["resident", "streaming"])
def test_how_a_set_is_read_is_a_setting_that_the_artifacts_do_not_depend_on(
    tiny: TinyRecipe, tmp_path: Path, reading: str
) -> None:
    default, other = (prepared(tiny, tmp_path, *words) for words in ([], [f"data.reading={reading}"]))
    assert (default.reading, other.reading) == ("auto", reading)
    assert default.artifact == other.artifact


@pytest.mark.parametrize("window_rows", [None, 300])
def test_streamed_training_equals_resident_training_bit_for_bit(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_rows: int | None
) -> None:
    if window_rows:
        with_windows(monkeypatch, window_rows)
    resident, streamed = (
        trained(prepared(tiny, tmp_path / reading, f"data.reading={reading}")) for reading in ("resident", "streaming")
    )
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)


def with_windows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Small windows, of four chunks."""
    whole = TrainJob.training_set

    def cut(job: TrainJob) -> TrainingSet:
        found = whole(job)
        return replace(found, order=replace(found.order, chunk_rows=rows // 4, window_chunks=4))

    monkeypatch.setattr(TrainJob, "training_set", cut)


def test_labels_that_the_network_does_not_know_stop_training_before_it_begins(tiny: TinyRecipe, tmp_path: Path) -> None:
    job = prepared(tiny, tmp_path)
    job = replace(job, network={**job.network, "label_dim": 9})
    with pytest.raises(SimsError, match=r"has labels 0\.\.9 but the network knows 0\.\.8; import"):
        train(job, ALONE, lambda row: None)
    assert not job.artifact.path.exists()


def test_a_loss_that_explodes_stops_with_advice_and_no_artifact(tiny: TinyRecipe, tmp_path: Path) -> None:
    job = prepared(tiny, tmp_path, "train.lr=1e30", "train.lr_rampup_kimg=0")
    with pytest.raises(SimsError, match="lower the learning rate"):
        train(job, ALONE, lambda row: None)
    assert not job.artifact.complete
