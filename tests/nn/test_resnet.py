"""Residual networks for CIFAR: the published formula, names and numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sims_ray.nn.resnet import BasicBlock, CifarResNet
from tests.shared_data import CIFAR10, WEIGHTS, cifar10_batches

RESNET20 = WEIGHTS / "resnet20-cifar10.safetensors"
STATISTICS = WEIGHTS / "resnet20-cifar10-train-stats.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_net(depth: int = 8, seed: int = 0) -> CifarResNet:
    """A network in eval mode every tensor of which matters."""
    net = CifarResNet(depth, 10, MEAN, STD)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if tensor.ndim == 1 else (noise - 0.5) / tensor[0].numel() ** 0.5)
    return net.eval().requires_grad_(False)


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_formula(w: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """Features of images in [0, 255], written out from the paper."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, scale, shift = (
            w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = (x / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    x = norm("bn1", F.conv2d(x, w["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)).clamp(min=0)
            y = norm(f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=1))
            if stride == 2:  # every second pixel; a quarter of the new channels, of zeros, on either side
                zeros = torch.zeros(len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2)


@pytest.mark.parametrize("depth", [8, 20])
def test_features_are_those_of_the_formula(depth: int) -> None:
    net, x = random_net(depth), images(3)
    expected = by_formula(dict(net.state_dict()), x.float(), (depth - 2) // 6)
    assert net.features(x).shape == (3, 64) and expected.std() > 1e-3
    torch.testing.assert_close(net.features(x), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_linear_in_the_features() -> None:
    net, x = random_net(), images(3)
    torch.testing.assert_close(net(x), net.features(x) @ net.linear.weight.T + net.linear.bias)


def test_a_block_whose_convolutions_are_zero_passes_every_second_pixel_between_channels_of_zeros() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize(("depth", "convolutions"), [(20, 19), (56, 55), (110, 109)])
def test_the_depth_counts_the_layers_with_weights(depth: int, convolutions: int) -> None:
    with torch.device("meta"):
        net = CifarResNet(depth, 10, MEAN, STD)
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == convolutions


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_depths_that_no_number_of_blocks_has_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth={depth} is not 6 n"):
        CifarResNet(depth, 10, MEAN, STD)


def test_the_normalisation_is_no_part_of_the_checkpoint() -> None:
    names = set(random_net().state_dict())
    assert not names & {"mean", "std"} and {"conv1.weight", "layer3.0.bn2.running_var", "linear.bias"} <= names


@pytest.mark.skipif(not (RESNET20.is_file() and CIFAR10.is_dir()), reason="needs the CIFAR-10 weights and images")
def test_public_weights_know_the_images_and_give_the_features_that_were_measured() -> None:
    net = CifarResNet(20, 10, MEAN, STD)
    assert all(
        name.endswith("num_batches_tracked") for name in net.load_state_dict(load_file(RESNET20), strict=False)[0]
    )
    known = np.load(STATISTICS)
    x, labels = next(cifar10_batches(500))
    with torch.inference_mode():
        features = net.eval().features(x)
        predicted = net.linear(features).argmax(1)
    assert (predicted == labels).double().mean() > known["train_acc"] - 0.01
    error = np.sqrt(np.diag(known["train_sigma"]) / len(x))  # of a mean over this many images
    assert (np.abs(features.double().numpy().mean(0) - known["train_mu"]) < 4.5 * error).all()
