"""How many workers there are, and how many images go through at once, never enters the mathematics."""

import socket
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from sims_ray.diffusion.order import InMemory, Rows, share_of
from sims_ray.diffusion.training import Training
from sims_ray.nn.precond import Precond
from tests.diffusion.runs import SETTINGS, gradients, recorded, trainable, training, weights

STEPS = 50
RANDOM = replace(SETTINGS, batch_size=16, augment=0.5, lr=1e-3, gradient_clip=50.0)


def noisy_network() -> Precond:
    """A network with every kind of randomness in training."""
    return trainable(dropout=0.3, label_dropout=0.3, augment_dim=9)


def run_of(rank: int, world_size: int, micro_batch: int | None = None, **options: Any) -> Training:
    run = training(noisy_network(), RANDOM, rank=rank, world_size=world_size, **options)
    run.micro_batch = micro_batch
    return run


def losses_and_ids(run: Training, ids: list[list[int]]) -> tuple[list[float], list[list[int]]]:
    """Loss of the first step, and the mean of each ten steps."""
    batch = InMemory.batch

    def seen(self: InMemory, nimg: int) -> Rows:
        rows = batch(self, nimg)
        ids.append(rows.ids.tolist())
        return rows

    InMemory.batch = seen  # type: ignore[method-assign]
    try:
        run.step()
        losses = [run.pop_loss()]
        for step in range(1, STEPS + 1):
            run.step()
            if step % 10 == 0:
                losses.append(run.pop_loss())
    finally:
        InMemory.batch = batch  # type: ignore[method-assign]
    return losses, ids


def worker(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    run = run_of(rank, world_size, wrap=DistributedDataParallel)
    run.warm_up((1, 8, 8), 2)
    losses, ids = losses_and_ids(run, [])
    torch.save((losses, ids, weights(run.net), weights(run.ema)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], list[list[int]], torch.Tensor, torch.Tensor]:
    run = run_of(0, 1)
    losses, ids = losses_and_ids(run, [])
    return losses, ids, weights(run.net), weights(run.ema)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_workers_see_the_same_ids_and_have_the_losses_of_one_and_the_same_average(
    world_size: int, tmp_path: Path, alone: tuple[list[float], list[list[int]], torch.Tensor, torch.Tensor]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world_size, port, str(tmp_path)), nprocs=world_size)
    team = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    losses, ids, _, _ = alone
    assert [list(chain(*parts)) for parts in zip(*(each[1] for each in team), strict=True)] == ids
    for each in team:
        assert each[0] == team[0][0]
        assert torch.equal(each[2], team[0][2]) and torch.equal(each[3], team[0][3])
    assert team[0][0][0] == pytest.approx(losses[0], rel=1e-6)
    assert team[0][0] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [4, 5, 1])
def test_gradients_of_passes_add_up_to_those_of_the_whole_batch(
    micro_batch: int, alone: tuple[list[float], list[list[int]], torch.Tensor, torch.Tensor]
) -> None:
    losses, ids = losses_and_ids(run_of(0, 1, micro_batch), [])
    assert ids == alone[1]
    assert losses[0] == pytest.approx(alone[0][0], rel=1e-6)
    assert losses == pytest.approx(alone[0], rel=1e-4)


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_a_batch_that_does_not_divide_is_shared_whole_and_its_gradients_average_to_those_of_one(
    world_size: int,
) -> None:
    shares = [share_of(16, rank, world_size) for rank in range(world_size)]
    assert [place for share in shares for place in share] == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) == 1
    settings = replace(RANDOM, gradient_clip=0.0)
    whole = training(noisy_network(), settings)
    whole.step()
    team = [training(noisy_network(), settings, rank=rank, world_size=world_size) for rank in range(world_size)]
    for run in team:
        run.step()
    averaged = torch.stack([gradients(run) for run in team]).mean(0)
    torch.testing.assert_close(averaged, gradients(whole), rtol=1e-3, atol=1e-5 * float(gradients(whole).abs().max()))


@pytest.mark.parametrize("probability", [0.1, 0.7])
def test_labels_are_hidden_from_the_network_with_the_probability_of_its_settings(probability: float) -> None:
    settings = replace(SETTINGS, batch_size=400)
    run, recorder = recorded(trainable(label_dropout=probability), settings)
    for _ in range(3):
        run.step()
    labels = torch.cat([arguments[3] for arguments in recorder.seen])
    told = labels.sum(1)
    assert set(told.tolist()) == {0.0, 1.0}
    assert float(told.mean()) == pytest.approx(1 - probability, abs=5 * (0.25 / 1200) ** 0.5)
    assert not torch.equal(told[:400], told[400:800])


def test_warming_up_changes_nothing_that_a_run_depends_on() -> None:
    for architecture in ("ddpmpp", "edm2"):
        cold, warm = (training(trainable(architecture=architecture, dropout=0.2)) for _ in range(2))
        warm.warm_up((1, 8, 8), 3)
        for run in (cold, warm):
            run.step()
        assert torch.equal(weights(warm.net), weights(cold.net))
        assert torch.equal(weights(warm.ema), weights(cold.ema))
        assert warm.pop_loss() == cold.pop_loss()


def test_channels_last_is_the_same_run_up_to_rounding_and_goes_on_from_its_own_state() -> None:
    plain, last = training(trainable()), training(trainable(), channels_last=True)
    for run in (plain, last):
        run.step()
        run.step()
    assert last.pop_loss() == pytest.approx(plain.pop_loss(), rel=1e-5)
    assert float((weights(last.net) - weights(plain.net)).abs().mean()) < 1e-3 * SETTINGS.lr  # Adam turns by signs
    resumed = training(trainable(9), channels_last=True)
    resumed.load_state({name: tensor.contiguous() for name, tensor in last.state().items()}, last.nimg)
    for run in (resumed, last):
        run.step()
    assert torch.equal(weights(resumed.net), weights(last.net))


def test_a_gradient_is_clipped_to_the_length_that_is_set_and_keeps_its_direction() -> None:
    free, clipped = (training(trainable(), replace(SETTINGS, gradient_clip=clip)) for clip in (0.0, 0.5))
    for run in (free, clipped):
        run.step()
    assert float(gradients(free).norm()) > 1
    assert float(gradients(clipped).norm()) == pytest.approx(0.5, rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(gradients(free), gradients(clipped), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
