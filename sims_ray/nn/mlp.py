"""The small network of the 2-D experiments of SIMS and Neon."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Noise predictor for points in the plane: [B, dim] and time [B] to [B, dim].

    Linear(dim + 1, hidden), `num_layers` times (Linear(hidden, hidden), ReLU), Linear(hidden, dim), as in the
    notebooks that SIMS (arXiv 2408.16333, sec. 4.2.1; hidden 64) and Neon (arXiv 2510.03597, App.; hidden 32) use.
    The time enters as it is given, appended to the point.

    Args:
        dim: coordinates of a point.
        hidden: width.
        num_layers: hidden layers with ReLU.
    """

    def __init__(self, dim: int = 2, hidden: int = 64, num_layers: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(dim + 1, hidden)]
        for _ in range(num_layers):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x [B, dim] at time t [B]."""
        time = t.to(x.dtype).reshape(-1, 1).expand(x.shape[0], 1)
        out: Tensor = self.layers(torch.cat([x, time], dim=1))
        return out
