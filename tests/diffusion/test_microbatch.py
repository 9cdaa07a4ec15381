"""Images that do not depend on how many are sampled at once."""

import math

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, count_evaluations, evaluate
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import guidance_interval, sims_guidance
from sims_ray.diffusion.microbatch import CPU_BATCH, MAX_BATCH, MicroBatched, batch_for_memory, power_of_two
from tests.networks import small_network

SHAPE = (1, 8, 8)
SAMPLER = {"num_steps": 4, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "S_churn": 4.0}


def guided() -> Denoiser:
    base, aux = small_network(0, label_dim=3), small_network(1, label_dim=3)
    return guidance_interval(sims_guidance(base, aux, 0.8), base, 0.1, math.inf)


def images(denoiser: Denoiser, batch_size: int, micro_batch: int | None, n: int = 300) -> tuple[Tensor, set[float]]:
    batches = list(
        generate(denoiser, SHAPE, range(5, 5 + n), SAMPLER, label_dim=3, batch_size=batch_size, micro_batch=micro_batch)
    )
    return torch.cat([batch.images for batch in batches]), {batch.nfe for batch in batches}


@pytest.mark.parametrize("micro_batch", [16, 50])
def test_with_a_fixed_micro_batch_no_bit_depends_on_the_batch_size(micro_batch: int) -> None:
    expected, nfe = images(guided(), 64, micro_batch)
    for batch_size in (7, 256):
        found, found_nfe = images(guided(), batch_size, micro_batch)
        assert torch.equal(found, expected) and found_nfe == nfe


def test_without_one_the_batch_size_changes_at_most_a_grey_level_of_a_thousandth_of_the_pixels() -> None:
    expected, nfe = images(guided(), 64, None)
    for batch_size in (7, 256):
        found, found_nfe = images(guided(), batch_size, None)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3 and found_nfe == nfe


def test_micro_batches_are_of_the_same_size_and_counted_as_one_evaluation_of_each_network() -> None:
    sizes: list[int] = []

    def network(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        sizes.append(len(x))
        assert len(sigma) == len(x) and labels is not None and len(labels) == len(x)
        return x * sigma.reshape(-1, 1, 1, 1) + labels.sum(dim=1).reshape(-1, 1, 1, 1)

    x, sigma, labels = torch.randn(10, *SHAPE), torch.rand(10), torch.rand(10, 3)
    with count_evaluations() as tally:
        found = evaluate(MicroBatched(sims_guidance(network, network, 0.5), 4), x, sigma, labels)
    assert sizes == [4] * 6 and tally.nfe == 2
    torch.testing.assert_close(found, network(x, sigma, labels))


def test_guidance_in_an_interval_stays_so_in_micro_batches() -> None:
    plain, micro = images(guided(), 64, None), images(guided(), 64, 64)
    assert plain[1] == micro[1] and plain[1] != images(small_network(0, label_dim=3), 64, 64)[1]


def test_a_given_class_changes_the_label_and_not_the_noise() -> None:
    network = small_network(0, label_dim=3)
    drawn = next(generate(network, SHAPE, range(20), SAMPLER, label_dim=3))
    assert drawn.classes is not None
    again = next(generate(network, SHAPE, range(20), SAMPLER, label_dim=3, classes=drawn.classes))
    other = next(generate(network, SHAPE, range(20), SAMPLER, label_dim=3, classes=(drawn.classes + 1) % 3))
    assert torch.equal(again.images, drawn.images) and not torch.equal(other.images, drawn.images)
    blind = small_network(0)  # churn noise comes after the label in an image's stream
    conditional = next(generate(lambda x, s, _=None: blind(x, s), SHAPE, range(20), SAMPLER, label_dim=3))
    chosen = next(
        generate(
            lambda x, s, _=None: blind(x, s), SHAPE, range(20), SAMPLER, label_dim=3, classes=torch.zeros(20).long()
        )
    )
    assert torch.equal(conditional.images, chosen.images)


def test_given_classes_are_those_of_the_seeds_in_every_batch() -> None:
    classes = torch.arange(50) % 3
    network = small_network(0, label_dim=3)
    batches = generate(network, SHAPE, range(50), SAMPLER, label_dim=3, classes=classes, batch_size=7)
    assert torch.equal(torch.cat([batch.classes for batch in batches if batch.classes is not None]), classes)


@pytest.mark.parametrize(("limit", "power"), [(0.3, 1), (1, 1), (3.9, 2), (256, 256), (1e9, MAX_BATCH)])
def test_the_batch_for_a_memory_is_the_power_of_two_below(limit: float, power: int) -> None:
    assert power_of_two(limit) == power


def test_on_a_cpu_the_batch_does_not_depend_on_the_machine() -> None:
    assert batch_for_memory(small_network(), SHAPE, 0, "cpu") == CPU_BATCH
