import itertools

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.noise import SeedStreams, step_generator
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from tests.networks import small_network

FIRST_SEED = 1_000_000_000
SHAPE = (1, 8, 8)
SAMPLER = {"num_steps": 4, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "S_churn": 2.0}


def drawn(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, labels and churn noise of the first image of a batch."""
    streams = SeedStreams(range(FIRST_SEED, FIRST_SEED + batch))
    return (
        streams.randn(SHAPE, torch.float32)[0],
        streams.randint(10)[0],
        streams.randn(SHAPE, torch.float64)[0],
    )


@pytest.mark.parametrize("batch", [3, 64])
def test_noise_and_label_of_an_image_are_the_same_bits_alone_and_in_a_batch(batch: int) -> None:
    for alone, together in zip(drawn(1), drawn(batch), strict=True):
        assert torch.equal(alone, together)


def test_different_seeds_give_different_noise() -> None:
    noise = SeedStreams([0, 1, 2**32 - 1]).randn([16], torch.float32)
    for one, other in itertools.combinations(noise, 2):
        assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_a_seed_that_would_repeat_another_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed} is outside"):
        SeedStreams([0, seed])


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in() -> None:
    net = small_network(label_dim=3)

    def sampled(n: int, batch_size: int) -> tuple[Tensor, Tensor]:
        parts = list(
            generate(net, SHAPE, range(FIRST_SEED, FIRST_SEED + n), SAMPLER, label_dim=3, batch_size=batch_size)
        )
        assert [seed for part in parts for seed in part.seeds] == list(range(FIRST_SEED, FIRST_SEED + n))
        return torch.cat([part.images for part in parts]), torch.cat([part.classes for part in parts])

    images, classes = sampled(64, 64)
    assert images.dtype == torch.uint8
    assert images.shape == (64, *SHAPE)
    assert set(classes.tolist()) == {0, 1, 2}
    for batch_size, n in ((1, 4), (3, 10)):
        again, classes_again = sampled(n, batch_size)
        assert (again.int() - images[:n].int()).abs().max() <= 1
        assert torch.equal(classes_again, classes[:n])


def test_float_images_agree_between_batch_sizes_to_1e4() -> None:
    net = small_network()
    latents = SeedStreams(range(64)).randn(SHAPE, torch.float32)
    together = heun_sampler(net, latents, sigmas=sigma_schedule(4)).images
    for batch_size in (1, 3):
        apart = torch.cat(
            [heun_sampler(net, part, sigmas=sigma_schedule(4)).images for part in latents[:6].split(batch_size)]
        )
        torch.testing.assert_close(apart, together[:6], rtol=1e-4, atol=1e-4)


def test_a_step_generator_is_a_function_of_seed_images_seen_and_stream_and_differs_by_each() -> None:
    keys = list(itertools.product((0, 1, 2**32 - 1), (0, 256, 2**33), ("noise", "dropout0", "dropout1")))
    draws = [torch.randn(8, generator=step_generator(*key)) for key in keys]
    again = [torch.randn(8, generator=step_generator(*key)) for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)
