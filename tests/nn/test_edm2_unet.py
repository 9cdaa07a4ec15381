import math

import pytest
import torch
from torch import Tensor

from sims_ray.nn.edm2_unet import Block, EDM2UNet
from sims_ray.nn.mp_layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from sims_ray.nn.precond import EDM2Precond
from tests.networks import ARCHITECTURES, small_network

# How far a sampled root mean square may lie from 1: three standard errors of the smallest sample below are 1 %.
TOLERANCE = 0.02
LAYERS = {"linear": (), "1x1": (1, 1), "3x3": (3, 3)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def layer(kernel: tuple[int, ...], in_channels: int = 64, out_channels: int = 96) -> MPConv:
    torch.manual_seed(0)
    return MPConv(in_channels, out_channels, kernel).eval().requires_grad_(False)


def unet(**settings: float) -> EDM2Precond:
    net = small_network(label_dim=3, **{**ARCHITECTURES["edm2"], **settings})
    assert isinstance(net, EDM2Precond)
    return net


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, noise levels and labels."""
    return normal(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.eye(3)[[1, 0, 2]]


# --- layers


@pytest.mark.parametrize(("shape", "dim"), [((5, 7), None), ((5, 7, 3, 3), None), ((5, 7, 3, 3), [1])])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
def test_normalize_gives_unit_root_mean_square_over_its_axes_and_keeps_the_direction(
    shape: tuple[int, ...], dim: list[int] | None, scale: float
) -> None:
    x = scale * normal(*shape)
    unit = normalize(x, dim)
    axes = dim or list(range(1, x.ndim))
    squares = unit.square().mean(axes)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=0.01, atol=0)
    ratio = (x / unit).broadcast_to(x.shape)
    torch.testing.assert_close(ratio, ratio.mean(axes, keepdim=True).expand_as(ratio), rtol=1e-5, atol=0)
    assert (ratio > 0).all()


def test_normalize_neither_divides_by_zero_nor_overflows_in_half_precision() -> None:
    assert torch.equal(normalize(torch.zeros(2, 9)), torch.zeros(2, 9))
    large = torch.full((2, 900), 3e4, dtype=torch.float16)  # its squares are beyond float16
    assert torch.equal(normalize(large), torch.ones_like(large))


def test_silu_keeps_unit_magnitude() -> None:
    assert rms(mp_silu(normal(1000, 1000))) == pytest.approx(1, rel=0.003)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_sum_keeps_unit_magnitude_and_mixes_by_its_share(t: float) -> None:
    a, b = normal(200_000), normal(200_000, seed=1)
    mixed = mp_sum(a, b, t)
    assert rms(mixed) == pytest.approx(1, rel=TOLERANCE)
    amplitudes = [float((mixed * part).mean()) for part in (a, b)]
    expected = [share / math.hypot(t, 1 - t) for share in (1 - t, t)]
    assert amplitudes == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_a_concatenation_keeps_unit_magnitude_and_its_share_does_not_depend_on_the_widths(t: float) -> None:
    for n_a, n_b in ((16, 16), (48, 8)):
        joined = mp_cat(normal(200, n_a, 8, 8), normal(200, n_b, 8, 8, seed=1), t)
        assert joined.shape == (200, n_a + n_b, 8, 8)
        assert rms(joined) == pytest.approx(1, rel=TOLERANCE)
        energies = torch.stack([part.square().sum() for part in joined.split([n_a, n_b], dim=1)])
        assert float(energies[1] / energies.sum()) == pytest.approx(t**2 / (t**2 + (1 - t) ** 2), abs=TOLERANCE)


def test_fourier_features_have_unit_magnitude_at_every_noise_level() -> None:
    torch.manual_seed(0)
    features = MPFourier(20_000)(torch.linspace(-2, 2, 9))
    for level in features:
        assert rms(level) == pytest.approx(1, rel=TOLERANCE)
    assert (features[0] - features[1]).abs().max() > 1


@pytest.mark.parametrize("kernel", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_a_layer_keeps_the_magnitude_of_its_input_times_its_gain(kernel: tuple[int, ...], gain: float) -> None:
    x = normal(2000, 64) if not kernel else normal(4, 64, 24, 24)
    y = layer(kernel)(x, gain=torch.tensor(gain))
    inside = y if not kernel else y[:, :, 1:-1, 1:-1]  # at the border some taps meet zeros
    assert rms(inside) == pytest.approx(gain, rel=0.03)


@pytest.mark.parametrize("kernel", LAYERS.values(), ids=LAYERS)
def test_a_layer_does_not_depend_on_the_scale_of_a_weight_row(kernel: tuple[int, ...]) -> None:
    conv, x = layer(kernel), normal(2, 64, *[5 for _ in kernel])
    before = conv(x)
    scales = torch.tensor([0.5, 1.0, 3.0, 100.0]).repeat(24).reshape(-1, *[1] * (conv.weight.ndim - 1))
    conv.weight.mul_(scales)
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)


def test_a_layer_depends_on_the_direction_of_its_weights() -> None:
    conv, x = layer((3, 3)), normal(2, 64, 5, 5)
    before = conv(x)
    conv.weight.neg_()
    assert torch.equal(conv(x), -before)


@pytest.mark.parametrize("flavor", ["enc", "dec"])
def test_a_fresh_block_keeps_the_magnitude_of_its_input(flavor: str) -> None:
    torch.manual_seed(0)
    block = Block(64, 96, 32, flavor=flavor, attention=True, channels_per_head=16).requires_grad_(False)
    assert rms(block(normal(4, 64, 16, 16), normal(4, 32))) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("clip_act", [1.5, 256.0, None])
def test_activations_are_clipped_at_clip_act(clip_act: float | None) -> None:
    torch.manual_seed(0)
    block = Block(8, 8, 8, flavor="dec", clip_act=clip_act).requires_grad_(False)
    y = block(1e4 * normal(2, 8, 4, 4), normal(2, 8))
    largest, smallest = float(y.max()), float(y.min())
    if clip_act is None:
        assert largest > 1e3 and smallest < -1e3
    else:
        assert (largest, smallest) == (clip_act, -clip_act)


# --- the network


def test_a_training_pass_leaves_unit_weights_and_the_output_as_it_was() -> None:
    net = unet()
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.mul_(10)  # the epsilon of the norm matters less then
    before = net(*batch())
    net.train().requires_grad_(True)
    in_training = net(*batch()).detach()
    net.logvar(torch.ones(1))
    scale = float(before.abs().max())
    torch.testing.assert_close(in_training, before, rtol=0, atol=1e-3 * scale)
    torch.testing.assert_close(net.eval()(*batch()).detach(), before, rtol=0, atol=1e-3 * scale)
    rows = {name: weight.detach() for name, weight in net.named_parameters() if weight.ndim > 1}
    assert len(rows) > 20
    for name, weight in rows.items():
        per_channel = weight.flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(per_channel, torch.ones_like(per_channel), rtol=0, atol=1e-3, msg=name)


def test_a_training_pass_leaves_frozen_weights_and_gains_untouched() -> None:
    net = unet().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".dec." in name)
    net(*batch())
    for name, tensor in net.state_dict().items():
        kept = ".dec." not in name or tensor.ndim < 2
        assert torch.equal(tensor, before[name]) == kept, name


def test_evaluation_leaves_all_weights_untouched() -> None:
    net = unet().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net(*batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_an_output_gain_of_0_makes_the_network_0_and_the_denoiser_the_wiener_filter() -> None:
    net, (x, sigma, labels) = unet(), batch()
    assert net.unet(x, sigma, labels).abs().max() > 0.1
    net.unet.out_gain.zero_()
    assert torch.equal(net.unet(x, sigma, labels), torch.zeros_like(x))
    torch.testing.assert_close(net(x, sigma, labels), x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1))


def test_a_fresh_network_answers_0() -> None:
    net = EDM2UNet(8, 1, model_channels=8, channel_mult=[1], num_blocks=1)
    assert torch.equal(net(normal(2, 1, 8, 8), torch.zeros(2)), torch.zeros(2, 1, 8, 8))


def test_the_output_grows_linearly_with_the_output_gain() -> None:
    net, (x, sigma, labels) = unet(), batch()
    net.unet.out_gain.fill_(0.5)
    half = net.unet(x, sigma, labels)
    net.unet.out_gain.fill_(1.5)
    torch.testing.assert_close(net.unet(x, sigma, labels), 3 * half, rtol=1e-4, atol=1e-5)


def test_the_label_matters_and_no_label_is_a_label_of_zeros() -> None:
    net, (x, sigma, _) = unet(), batch()
    answers = [net(x, sigma, torch.eye(3)[[k, k, k]]) for k in range(3)] + [net(x, sigma, torch.zeros(3, 3))]
    for i, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-2 for other in answers[:i])
    assert torch.equal(net(x, sigma), answers[-1])


def test_the_channel_of_ones_stands_in_for_a_bias() -> None:
    net = unet()
    first = net.unet.enc["8x8_conv"]
    features = net.unet.encode(torch.zeros(1, 1, 8, 8), torch.zeros(1)).skips[0]
    inside = normalize(first.weight)[:, 1].sum((1, 2)) / math.sqrt(first.weight[0].numel())
    torch.testing.assert_close(features[0, :, 4, 4], inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_the_uncertainty_is_a_function_of_each_sigma_alone(shape: tuple[int, ...]) -> None:
    net, sigma = unet(), torch.tensor([0.05, 0.5, 5.0, 0.5])
    logvar = net.logvar(sigma.reshape(shape))
    assert logvar.shape == (4,)
    alone = torch.cat([net.logvar(one) for one in sigma])
    torch.testing.assert_close(logvar, alone, rtol=1e-5, atol=1e-6)
    assert len({round(float(u), 4) for u in alone}) == 3  # equal for equal sigma, different for different ones
    for parameter in net.unet.parameters():
        parameter.normal_()
    assert torch.equal(net.logvar(sigma), logvar)
