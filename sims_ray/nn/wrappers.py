"""Bring your own network: one that predicts the noise, the velocity or the clean image becomes a denoiser."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sims_ray.nn.schedules import DiscreteVP, Schedule

LabelKind = Literal["one-hot", "index"]


class NetworkDenoiser(nn.Module):
    """D(x; sigma) from a network of x_t = a x, x = x0 + sigma n; see the three subclasses.

    The network gets float32 and is called as network(a x, time), or network(a x, time, labels) where it has classes.

    Args:
        network: x_t [B, ...], time [B], and labels if label_dim > 0, to a prediction [B, ...].
        schedule: what mixes x_t and counts the time.
        label_dim: number of classes K; 0 for an unconditional network.
        label_kind: what the network takes: "one-hot" [B, K], zeros where there is no label; or "index" [B], int64,
            K where there is no label (the usual null class).
        sigma_data: standard deviation of the training data.

    Raises:
        ValueError: an unknown label_kind.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        label_dim: int = 0,
        label_kind: LabelKind = "one-hot",
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if label_kind not in get_args(LabelKind):
            raise ValueError(f"label_kind is {label_kind!r}; choose one of {', '.join(get_args(LabelKind))}")
        self.network = network
        self.schedule = schedule
        self.label_dim = label_dim
        self.label_kind = label_kind
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate the clean data from x [B, ...] at sigma [B]; labels are one-hot [B, K]. Returns float32."""
        x = x.to(torch.float32)
        sigma = sigma.reshape(-1).expand(x.shape[0])
        time = self.schedule.time(sigma)
        inputs = [_column(self.schedule.scale(sigma), x) * x, time.float() if time.is_floating_point() else time]
        if self.label_dim > 0:
            inputs.append(self._network_labels(labels, x))
        return self.clean(self.network(*inputs).to(torch.float32), x, sigma)

    def clean(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean data that the network's prediction implies."""
        raise NotImplementedError

    def _network_labels(self, labels: Tensor | None, x: Tensor) -> Tensor:
        if labels is None:
            labels = torch.zeros(x.shape[0], self.label_dim, device=x.device)
        labels = labels.to(torch.float32).reshape(-1, self.label_dim)
        if self.label_kind == "one-hot":
            return labels
        return torch.where((labels != 0).any(1), labels.argmax(1), self.label_dim)


class EpsilonDenoiser(NetworkDenoiser):
    """A network that predicts the noise n: D = x - sigma n (DDPM, arXiv 2006.11239, eq. 15 at x = x_t / a)."""

    def clean(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D = x - sigma n."""
        return x - _column(sigma, x) * prediction


class VelocityDenoiser(NetworkDenoiser):
    """A network that predicts v = a' x0 + b' n: D = a (b' x - sigma v) / (a b' - a' b).

    This is the solution of x_t = a x0 + b n and v for x0; it is D = a^2 x - b v under a VP schedule (Salimans & Ho,
    arXiv 2202.00512, App. D) and D = a x - b v for a rectified flow.
    """

    def clean(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D = a (b' x - sigma v) / (a b' - a' b), where a cancels: b = sigma a."""
        da, db = self.schedule.velocity(sigma)
        determinant = db - da * sigma
        return _column(db / determinant, x) * x - _column(sigma / determinant, x) * prediction


class X0Denoiser(NetworkDenoiser):
    """A network that predicts the clean data: D is its answer."""

    def clean(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D = x0."""
        return prediction


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] as float32 that broadcast over x [B, ...]."""
    return values.to(torch.float32).reshape(-1, *[1] * (x.ndim - 1))


class _DiffusersNetwork(nn.Module):
    """A diffusers network under the plain calling convention."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        output: Tensor = self.unet(x, time, class_labels=labels).sample
        return output[:, : x.shape[1]]  # networks that also learn the variance answer it in further channels


PREDICTIONS: dict[str, type[NetworkDenoiser]] = {
    "epsilon": EpsilonDenoiser,
    "v_prediction": VelocityDenoiser,
    "sample": X0Denoiser,
}


def diffusers_denoiser(
    unet: nn.Module, scheduler: Any, label_dim: int | None = None, sigma_data: float = 0.5
) -> NetworkDenoiser:
    """Make a denoiser of diffusers' `UNet2DModel` and the scheduler it was trained with.

    Args:
        unet: a `UNet2DModel`, unconditional or with `num_class_embeds` classes.
        scheduler: anything with `alphas_cumprod` [T] and `config.prediction_type`: DDPM, DDIM, DPM-Solver, ...
        label_dim: number of classes; default: all of `num_class_embeds`. Give one less where the last is a null class.
        sigma_data: standard deviation of the training data.

    Raises:
        ValueError: a scheduler without alphas_cumprod, a prediction type or a kind of class embedding not known here.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod; give the DDPMScheduler of the training")
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; known are {', '.join(PREDICTIONS)}")
    settings: Any = unet.config
    if settings.class_embed_type is not None:
        raise ValueError(f"class_embed_type is {settings.class_embed_type!r}; only a table of classes (None) is known")
    alpha_bar = scheduler.alphas_cumprod.double()
    # A chain that ends in pure noise (arXiv 2305.08891) has no last sigma: twice the one before stands for it.
    alpha_bar = torch.where(alpha_bar > 0, alpha_bar, alpha_bar[-2] / 4)
    schedule = DiscreteVP(alpha_bar, rounding=settings.time_embedding_type == "learned")
    classes = label_dim if label_dim is not None else settings.num_class_embeds or 0
    return PREDICTIONS[prediction_type](_DiffusersNetwork(unet), schedule, classes, "index", sigma_data)
