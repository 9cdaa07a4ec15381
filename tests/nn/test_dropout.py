import pytest
import torch

from sims_ray.nn.dropout import KEY_LIMIT, ImageDropout, keep_mask, set_dropout_keys
from tests.networks import ARCHITECTURES, small_network

N = 40_000


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(KEY_LIMIT, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["ddpmpp", "adm", "edm2"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_image_s_masks_do_not_depend_on_the_batch_that_it_is_in(architecture: str, size: int) -> None:
    net = small_network(**{**ARCHITECTURES[architecture], "dropout": 0.3}).train()
    x, sigma, images = torch.randn(8, 1, 8, 8), torch.full((8,), 0.7), keys(8)
    set_dropout_keys(net, images)
    together = net(x, sigma)
    parts = []
    for start in range(0, 8, size):
        set_dropout_keys(net, images[start : start + size])
        parts.append(net(x[start : start + size], sigma[start : start + size]))
    torch.testing.assert_close(torch.cat(parts), together, rtol=1e-4, atol=1e-5)
    set_dropout_keys(net, images.flip(0))
    assert (net(x, sigma) - together).abs().max() > 1e-3


@pytest.mark.parametrize("probability", [0.02, 0.13, 0.5, 0.9])
def test_the_share_that_is_zeroed_is_the_probability_and_the_mean_is_kept(probability: float) -> None:
    layer = ImageDropout(probability).train()
    layer.keys = keys(4)
    out = layer(torch.ones(4, N))
    spread = (probability * (1 - probability) / (4 * N)) ** 0.5
    assert float((out == 0).float().mean()) == pytest.approx(probability, abs=5 * spread)
    assert float(out.mean()) == pytest.approx(1, abs=5 * spread / (1 - probability))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - probability)])


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, 4096])
def test_the_values_of_a_mask_do_not_depend_on_each_other(lag: int) -> None:
    kept = keep_mask(keys(8), N, 0.5).double() * 2 - 1
    assert float((kept[:, lag:] * kept[:, :-lag]).mean()) == pytest.approx(0, abs=5 / (8 * N) ** 0.5)


@pytest.mark.parametrize("pair", [(0, 1), (5, 6), (1 << 30, (1 << 30) + 1), (123, 123 ^ (1 << 16))])
def test_masks_of_neighbouring_keys_have_nothing_in_common(pair: tuple[int, int]) -> None:
    first, second = keep_mask(torch.tensor(pair, dtype=torch.int32), N, 0.5).double() * 2 - 1
    assert float((first * second).mean()) == pytest.approx(0, abs=5 / N**0.5)


def test_every_layer_of_a_network_has_masks_of_its_own() -> None:
    net = small_network(dropout=0.5).train()
    set_dropout_keys(net, keys(1))
    layers = [module for module in net.modules() if isinstance(module, ImageDropout)]
    assert len(layers) > 3
    masks = torch.stack([layer(torch.ones(1, N))[0] - 1 for layer in layers]).double()
    common = masks @ masks.T / N - torch.eye(len(layers))
    assert float(common.abs().max()) < 5 / N**0.5 + 0.02


def test_dropout_acts_in_training_only_and_not_at_probability_0() -> None:
    x = torch.randn(4, 100)
    for layer in (ImageDropout(0.5).eval(), ImageDropout(0.0).train()):
        layer.keys = keys(4)
        assert layer(x) is x


def test_without_keys_masks_are_torch_s_own() -> None:
    torch.manual_seed(0)
    out = ImageDropout(0.5).train()(torch.ones(100))
    torch.manual_seed(0)
    assert torch.equal(out, torch.nn.functional.dropout(torch.ones(100), 0.5))
