import copy

import pytest
import torch
from torch import nn

from sims_ray.nn.ema import ema_beta, update_ema

BATCH_SIZE = 32


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(torch.randn_like(parameter))
    return ema, net


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("k", [1, 7, 100])
def test_after_k_steps_to_constant_weights_the_average_is_its_closed_form(k: int) -> None:
    ema, net = pair()
    start, target = flat(ema).double(), flat(net).double()
    beta = ema_beta(0, BATCH_SIZE, 1000, None)
    assert beta == 0.5 ** (BATCH_SIZE / 1000)
    for _ in range(k):
        update_ema(ema, net, beta)
    torch.testing.assert_close(flat(ema).double(), target + beta**k * (start - target), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 320])
def test_the_distance_to_constant_weights_halves_with_every_half_life_of_images_whatever_the_batch_size(
    batch_size: int,
) -> None:
    ema, net = pair()
    start = flat(ema) - flat(net)
    for halving in (1, 2):
        for _ in range(320 // batch_size):
            update_ema(ema, net, ema_beta(0, batch_size, 320, None))
        torch.testing.assert_close(flat(ema) - flat(net), start / 2**halving, rtol=0, atol=1e-5)


def test_with_a_rampup_ratio_the_first_step_forgets_the_initial_weights() -> None:
    ema, net = pair()
    beta = ema_beta(0, BATCH_SIZE, 500_000, 0.05)
    assert beta == 0
    update_ema(ema, net, beta)
    assert torch.equal(flat(ema), flat(net))


@pytest.mark.parametrize("nimg", [32, 1000, 9_999, 10_000, 1_000_000])
def test_the_half_life_is_the_ratio_of_images_seen_until_it_reaches_its_limit(nimg: int) -> None:
    assert ema_beta(nimg, BATCH_SIZE, 500, 0.05) == pytest.approx(0.5 ** (BATCH_SIZE / min(500, 0.05 * nimg)))


def test_buffers_are_copied_not_averaged() -> None:
    ema, net = pair()
    net.train()(torch.randn(16, 5))
    update_ema(ema, net, 0.9)
    for averaged, source in zip(ema.buffers(), net.buffers(), strict=True):
        assert torch.equal(averaged, source)
    assert any(buffer.abs().sum() > 0 for buffer in net.buffers())


def test_an_update_leaves_the_network_as_it_is() -> None:
    ema, net = pair()
    before = flat(net).clone()
    update_ema(ema, net, 0.5)
    assert torch.equal(flat(net), before)
