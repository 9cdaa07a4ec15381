"""A small convolutional classifier whose last hidden layer serves as image features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureClassifier(nn.Module):
    """Three 3x3 convolutions, pooling to a 2x2 grid, one hidden layer of features, then logits.

    The features are bounded (tanh): with unbounded ones a few odd images carry the covariance, and distances of
    1,000 digits scatter four times as much from one block of seeds to the next.

    Args:
        img_channels: C of the images.
        num_classes: K.
        width: channels of the first convolution.
        feature_dim: width of the feature layer.
    """

    def __init__(self, img_channels: int, num_classes: int, width: int = 32, feature_dim: int = 64) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(img_channels, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width * 2, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(width * 2, width * 2, 3, padding=1)
        self.hidden = nn.Linear(width * 2 * 4, feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, C, H, W] to features [B, feature_dim] in float32."""
        x = images.to(torch.float32) / 127.5 - 1
        x = F.relu(self.conv0(x))
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return torch.tanh(self.hidden(x))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, C, H, W] to class logits [B, K]."""
        out: Tensor = self.head(self.features(images))
        return out
