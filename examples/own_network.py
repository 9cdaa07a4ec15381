"""Guide your own network away from a copy of it: `python examples/own_network.py`.

Any torch module f(x_t, t) that predicts the noise of a DDPM becomes a denoiser, and denoisers are all that guidance and
samplers know. Put your own network for the toy below, and for the perturbed copy one fine-tuned on its own samples.
"""

from copy import deepcopy

import torch

from sims_ray.diffusion import guidance, sampler
from sims_ray.nn import schedules, wrappers


class MyNetwork(torch.nn.Module):
    """Predicts the noise in x [B, 3, H, W] at step t [B] of 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Any function of x and t."""
        return x - self.conv(x) * (1 - t / 1000).reshape(-1, 1, 1, 1)


base = wrappers.EpsilonDenoiser(MyNetwork(), schedules.DiscreteVP.linear(num_steps=1000))
aux = deepcopy(base)
torch.nn.init.normal_(aux.network.conv.bias, std=0.1)
guided = guidance.sims_guidance(base, aux, omega=1.0)
images = sampler.heun_sampler(guided, torch.randn(4, 3, 8, 8), sigmas=sampler.sigma_schedule(18)).images
