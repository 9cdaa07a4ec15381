"""Residual networks for 32x32 images (He et al., arXiv 1512.03385, sec. 4.2), with shortcuts without parameters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = 3
RESOLUTION = 32
FEATURE_DIM = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the input itself, or every second pixel with channels of zeros around it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))  # option A
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = F.relu(self.bn2(self.conv2(x)) + shortcut)
        return out


class CifarResNet(nn.Module):
    """A ResNet of depth 6 n + 2 (20, 32, 44, 56, 110): three stages of n blocks with 16, 32 and 64 channels.

    Parameters are named `conv1`, `bn1`, `layer{1,2,3}.{block}.{conv1,bn1,conv2,bn2}` and `linear`, as in the public
    checkpoints of this family.

    Args:
        depth: layers with weights.
        num_classes: K.
        mean, std: per channel, of images in [0, 1]; the input is normalised with them.

    Raises:
        ValueError: no whole number of blocks has this depth.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 2 * STAGES)
        if blocks < 1 or rest:
            raise ValueError(f"depth={depth} is not 6 n + 2 for a whole n; take 20, 32, 44, 56 or 110")
        width = FEATURE_DIM // 4
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, FEATURE_DIM, blocks, stride=2)
        self.linear = nn.Linear(FEATURE_DIM, num_classes)
        # Not in the checkpoints.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, C, H, W] to features [B, 64] in float32: the average over the last stage's pixels."""
        x = (images.to(torch.float32) / 255 - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = x.mean(dim=(2, 3))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, C, H, W] to class logits [B, K]."""
        out: Tensor = self.linear(self.features(images))
        return out


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))
