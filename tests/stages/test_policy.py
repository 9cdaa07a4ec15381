"""The policy of fine-tuning does what it says, and says what it comes to."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.nn.dropout import ImageDropout
from sims_ray.nn.networks import build_network
from sims_ray.stages.policy import effective, policy_lines, policy_params
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob
from sims_ray.storage.checkpoints import load_model, load_tensors, read_card
from sims_ray.studies.plan import Plan
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

ALONE = ComputeSettings(num_workers=0)
N_S = 96
RAMP = ("finetune.lr=1e-4", "finetune.lr_rampup_kimg=10000", "finetune.batch_size=500")

Jobs = Callable[..., TrainJob]


@pytest.fixture(scope="module")
def begun(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a base and a synthetic set."""
    out = tmp_path_factory.mktemp("policy") / "run"
    SimsRun(tiny(), out).synthesize()
    return out


@pytest.fixture
def jobs(tiny: TinyRecipe, begun: Path, tmp_path: Path) -> Jobs:
    """Builds fine-tuning jobs from overrides, in a copy of that folder."""
    shutil.copytree(begun, tmp_path / "run")

    def build(*overrides: str) -> TrainJob:
        return Plan(tiny(*overrides), tmp_path / "run").finetune_job(N_S)

    return build


def no_row(row: dict[str, float]) -> None:
    """Take a row of the log."""


def started(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The state of training before its first step."""
    seen: dict[str, torch.Tensor] = {}
    step = Training.step

    def spy(training: Training) -> None:
        if not seen:
            seen.update({name: tensor.clone() for name, tensor in training.state().items()})
        step(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", spy)
        train(job, ALONE, no_row)
    return seen


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_printed_learning_rate_is_the_one_that_the_step_at_each_budget_takes(jobs: Jobs) -> None:
    job = jobs(*RAMP, "finetune.budgets_kimg=[1000,3500,20000]")
    (line,) = [line for line in policy_lines(job) if line.startswith("lr ")]
    assert line.startswith("lr 0.0001 after a ramp over 10,000 kimg: ")
    found = re.findall(r"([\d.e-]+) \(([\d.]+) % of it\) at B=([\d,.]+) kimg", line)
    assert [budget for _, _, budget in found] == ["1,000", "3,500", "20,000"]
    for (printed, percent, _), budget in zip(found, job.budgets_kimg, strict=True):
        lr = job.optimization().learning_rate(job.snapshot_nimg(budget))
        assert float(printed) == pytest.approx(lr, rel=5e-3)
        assert float(percent) == pytest.approx(lr / 1e-4 * 100, rel=5e-3)
    assert found[1][:2] == ("3.5e-05", "35") and found[2][:2] == ("0.0001", "100")
    assert "does not end" not in line
    (short,) = [s for s in policy_lines(jobs(*RAMP, "finetune.budgets_kimg=[3500]")) if s.startswith("lr ")]
    assert short.endswith("; the ramp does not end")


def test_every_part_of_the_policy_is_said_with_what_it_comes_to(jobs: Jobs) -> None:
    settings = ("finetune.ema_rampup_ratio=0.05", "finetune.ema_halflife_kimg=100", "finetune.augment=0.1")
    job = jobs(*settings, "finetune.trainable=decoder", "finetune.dropout=0.2", "finetune.budgets_kimg=[0.64,6400]")
    text = "\n".join(policy_lines(job))
    small, large = (effective(job, job.snapshot_nimg(budget)) for budget in job.budgets_kimg)
    assert (small["ema_halflife_kimg"], large["ema_halflife_kimg"]) == (pytest.approx(0.032), 100)
    assert (small["steps"], large["steps"]) == (10, 100_000)
    assert 0 < small["trainable_parameters"] < small["parameters"]
    for words in (
        "start: the base's EMA weights; Adam starts anew",
        "lr 0.002 from the first step on",
        "at most 0.05 of the images: 0.032 kimg at B=0.64 kimg, 100 kimg at B=6,400 kimg",
        "dropout 0.2 (set for the auxiliary), label dropout 0, augmentation 0.1",
        "parameters train: the decoder",
        "batch 64: 10 steps at B=0.64 kimg, 100,000 steps at B=6,400 kimg",
    ):
        assert words in text
    power = jobs("finetune.ema_stds=[0.05,0.1]", "finetune.ema_std=0.08", "finetune.budgets_kimg=[6400]")
    assert "EMA of relative width 0.08: 512 kimg wide at B=6,400 kimg" in policy_lines(power)
    other = "\n".join(policy_lines(jobs("finetune.start=weights", "finetune.reset_optimizer=false")))
    assert "start: the weights that the base's training ended with; Adam goes on with the moments" in other
    assert "EMA half-life 10 kimg from the first step on" in other and "(as in the network)" in other


def test_the_policy_is_logged_before_and_after_fine_tuning_and_lies_in_the_cards(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    job = jobs("finetune.lr_rampup_kimg=2")
    with caplog.at_level(logging.INFO, logger="sims_ray"):
        train(job, ALONE, no_row)
    said = [record.getMessage() for record in caplog.records if "policy" in record.getMessage()]
    lines = [f"fine-tuning policy: {line}" for line in policy_lines(job)]
    assert said == [*lines, *lines]
    params = policy_params(job)
    assert list(params) == ["0.5kimg", "1kimg"]
    for budget in job.budgets_kimg:
        policy = read_card(job.snapshot(budget))["policy"]
        assert policy == json.loads(json.dumps(effective(job, job.snapshot_nimg(budget))))
        assert policy == params[f"{budget:g}kimg"]
    assert params["0.5kimg"]["lr"] == pytest.approx(2e-3 * 512 / 2000)


def test_fine_tuning_starts_by_default_from_the_bases_averages_with_adam_anew(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs()
    seen = started(job, monkeypatch)
    base = load_tensors(job.init)[0]
    assert same(part(seen, "net."), base) and same(part(seen, "ema."), base)
    assert part(seen, "adam.") == {}


def test_fine_tuning_can_start_from_the_weights_and_the_moments_that_the_base_ended_with(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs("finetune.start=weights", "finetune.reset_optimizer=false")
    state, card = load_tensors(job.init_state)
    assert card["nimg"] == 2048
    seen = started(job, monkeypatch)
    assert same(part(seen, "net."), part(state, "net.")) and same(part(seen, "ema."), part(state, "net."))
    assert same(part(seen, "adam."), part(state, "adam."))
    assert not same(part(state, "net."), load_tensors(job.init)[0])
    mixed = jobs("finetune.reset_optimizer=false")
    assert same(part(started(mixed, monkeypatch), "net."), load_tensors(job.init)[0])


def test_each_part_of_the_policy_makes_another_auxiliary(jobs: Jobs) -> None:
    policies = ((), ("start=weights",), ("reset_optimizer=false",), ("dropout=0.1",), ("dropout=0",))
    made = [jobs(*(f"finetune.{setting}" for setting in policy)) for policy in policies]
    assert len({job.artifact.fingerprint for job in made}) == len(made)
    for job in made[:4]:
        train(job, ALONE, no_row)
    weights = [load_tensors(job.snapshot(1))[0] for job in made[:4]]
    assert not any(same(one, other) for i, one in enumerate(weights) for other in weights[:i])


def test_dropout_of_fine_tuning_trains_and_is_no_part_of_what_is_sampled(jobs: Jobs) -> None:
    plain, job = jobs(), jobs("finetune.dropout=0.3")

    def dropouts(net: torch.nn.Module) -> set[float]:
        return {module.probability for module in net.modules() if isinstance(module, ImageDropout)}

    assert dropouts(job.network_at_start()) == {0.3} != dropouts(plain.network_at_start()) == {0.0}
    assert same(job.network_at_start().state_dict(), plain.network_at_start().state_dict())
    train(job, ALONE, no_row)
    net, card = load_model(job.snapshot(1))
    assert card["network"] == read_card(job.init)["network"] and dropouts(net) == {0.0}
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    other = build_network({**card["network"], "dropout": 0.3}).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x, sigma), other(x, sigma))


def test_fresh_weights_are_a_function_of_the_seed(tiny: TinyRecipe, tmp_path: Path) -> None:
    def net(seed: int) -> dict[str, torch.Tensor]:
        return Plan(tiny(f"train.seed={seed}"), tmp_path).base_job.network_at_start().state_dict()

    assert same(net(3), net(3)) and not same(net(3), net(4))


def test_a_base_without_its_last_state_is_one_sentence(jobs: Jobs) -> None:
    job = jobs("finetune.start=weights")
    job.init_state.unlink()
    for missing in (job, replace(job, init_state=None)):
        with pytest.raises(SimsError, match=r"need the base's last training state.* is not there; set them back"):
            missing.network_at_start()


# What was begun with other settings is not left behind unseen.


def unfinished(job: TrainJob, monkeypatch: pytest.MonkeyPatch, nimg: int = 576) -> None:
    """Train until the process dies."""
    step = Training.step

    def dies(training: Training) -> None:
        step(training)
        if training.nimg >= nimg:
            raise KeyError("the process dies here")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", dies)
        with pytest.raises(SimsError, match="run the same command"):
            train(job, ALONE, no_row)


def files(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_settings_while_a_training_waits_are_refused_one_by_one_and_nothing_is_written(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run = SimsRun(tiny(), out)
    run.import_data()
    unfinished(run.plan.base_job, monkeypatch)
    before = files(out)
    changed = ("train.lr=5e-3", "train.seed=7", "network.channel_mult=[1,2]", "compute.precision=bfloat16")
    other = SimsRun(tiny(*changed), out)
    for act in (other.train_base, other.synthesize, other.finetune, other.tune):
        with pytest.raises(SimsError) as refused:
            act()
    assert files(out) == before
    sentence = str(refused.value)
    assert sentence.startswith(f"{out} has an unfinished base training at 512 images with other settings: ")
    listed = sentence.partition("settings: ")[2].partition(";")[0]
    assert sorted(re.split(r", (?=[a-z]+\.)", listed)) == [
        "compute.precision unset -> bfloat16",
        "network.channel_mult [1, 1] -> [1, 2]",
        "train.lr 0.002 -> 0.005",
        "train.seed 0 -> 7",
    ]
    assert f"delete {run.plan.base_job.artifact.path} to start over, or give another --out" in sentence
    SimsRun(tiny(), out).train_base()
    SimsRun(tiny(*changed[:2]), out).train_base()  # a finished training never waits


@pytest.mark.parametrize(
    "change",
    [
        "train.checkpoint_kimg=1",
        "train.log_kimg=1",
        "train.preview_kimg=10",
        "train.duration_kimg=3",
        "compute.micro_batch=3",
        "data.reading=streaming",
        "finetune.lr=1",
        "tune.n_s=[64]",
    ],
)
def test_a_setting_that_does_not_change_the_weights_never_stops_a_training(
    change: str, tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimsRun(tiny(), tmp_path)
    run.import_data()
    unfinished(run.plan.base_job, monkeypatch)
    other = SimsRun(tiny(change), tmp_path)
    other.train_base()
    assert other.plan.base_job.artifact.path == run.plan.base_job.artifact.path


def test_an_auxiliary_that_waits_stops_one_with_other_settings_but_none_of_another_size_or_another_set(
    tiny: TinyRecipe, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    unfinished(Plan(tiny(), out).finetune_job(N_S), monkeypatch)
    with pytest.raises(SimsError, match=r"unfinished auxiliary .*: finetune\.lr 0\.002 -> 0\.001; set"):
        SimsRun(tiny("finetune.lr=1e-3"), out).finetune()
    with pytest.raises(SimsError, match=r": finetune\.dropout null -> 0\.1; set"):
        SimsRun(tiny("finetune.dropout=0.1", "tune.n_s=[64]"), out).finetune()
    SimsRun(tiny("tune.n_s=[64]"), out).finetune()
    SimsRun(tiny("sampler.num_steps=3", "finetune.lr=1e-3"), out).finetune()


def test_a_finished_auxiliary_that_was_to_be_extended_waits_too(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    train(jobs("finetune.budgets_kimg=[0.5]"), ALONE, no_row)
    unfinished(jobs(), monkeypatch, 832)
    with pytest.raises(SimsError, match=r"at 768 images with other settings: finetune\.seed 1 -> 2; "):
        train(jobs("finetune.seed=2"), ALONE, no_row)
    train(jobs(), ALONE, no_row)
    train(jobs("finetune.seed=2"), ALONE, no_row)


def test_other_images_are_another_setting_of_a_base_that_waits(
    tiny: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimsRun(tiny(), tmp_path)
    run.import_data()
    job: Any = run.plan.base_job
    unfinished(job, monkeypatch)
    elsewhere = replace(job.artifact, parents=("other",), path=job.artifact.path.with_name("train-other"))
    with pytest.raises(SimsError, match=r"other settings: data\.path \(it holds another table\); set"):
        train(replace(job, artifact=elsewhere), ALONE, no_row)


def test_images_of_another_shape_and_a_batch_that_does_not_divide_are_one_sentence_before_any_work(
    tiny: TinyRecipe, tmp_path: Path
) -> None:
    run = SimsRun(tiny(), tmp_path)
    run.import_data()
    job: Any = run.plan.base_job
    large = replace(job, network={**job.network, "img_resolution": 16})
    with pytest.raises(
        SimsError, match=r"holds images of \(1, 8, 8\), but the network of this base takes \(1, 16, 16\)"
    ):
        train(large, ALONE, no_row)
    with pytest.raises(SimsError, match=r"train\.batch_size=64 must divide by compute\.num_workers=3; change"):
        train(job, ComputeSettings(num_workers=3), no_row)
    assert not job.artifact.path.exists()
