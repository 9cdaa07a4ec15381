"""Agreement with the reference vectors of EDM: networks, samplers and seeds, number for number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.nn.precond import EDMPrecond, build_network

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORK_KEYS = (
    "img_resolution", "img_channels", "label_dim", "augment_dim", "model_channels", "channel_mult",
    "num_blocks", "attn_resolutions", "dropout", "resample_filter", "sigma_data",
)  # fmt: skip


class Reference:
    """One golden file: tensors, settings and the two networks."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.base, self.aux = self._network("base."), self._network("aux.")
        self.streams = SeedStreams(self.config["seeds"])

    def _network(self, prefix: str) -> EDMPrecond:
        net = build_network({key: self.config["network"][key] for key in NETWORK_KEYS})
        state = {k.removeprefix(prefix): v.float() for k, v in self.tensors.items() if k.startswith(prefix)}
        net.load_state_dict(state, strict=True)
        return net.eval().requires_grad_(False)

    def sample(self, omega: float = 0.0, schedule: Tensor | None = None, **churn: float) -> Tensor:
        """Images from the file's seeds, drawn in the documented order."""
        net = self.config["network"]
        streams = SeedStreams(self.config["seeds"])
        latents = streams.randn([net["img_channels"], net["img_resolution"], net["img_resolution"]], torch.float32)
        labels = None
        if net["label_dim"]:
            labels = torch.nn.functional.one_hot(streams.randint(net["label_dim"]), net["label_dim"]).float()
        sigmas = sigma_schedule(18) if schedule is None else schedule
        denoiser = sims_guidance(self.base, self.aux, omega)
        return heun_sampler(denoiser, latents, labels, sigmas=sigmas, streams=streams, **churn)


@pytest.fixture(scope="module", params=["ddpmpp_uncond_r16", "ddpmpp_cond_r16"])
def reference(request: pytest.FixtureRequest) -> Reference:
    torch.set_num_threads(1)
    return Reference(request.param)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_denoised_equals_the_reference_to_1e5(reference: Reference) -> None:
    t = reference.tensors
    assert relative_error(reference.base(t["x"], t["sigma"], t.get("labels")), t["denoised"]) < 1e-5
    if "augment_labels" in t:
        denoised = reference.base(t["x"], t["sigma"], t.get("labels"), t["augment_labels"])
        assert relative_error(denoised, t["denoised_augmented"]) < 1e-5


def test_latents_and_labels_from_seeds_equal_the_reference_bit_for_bit(reference: Reference) -> None:
    t = reference.tensors
    assert torch.equal(reference.streams.randn(t["latents"].shape[1:], torch.float32), t["latents"])
    if "seed_labels" in t:
        assert torch.equal(reference.streams.randint(10), t["seed_labels"].argmax(1))


def test_18_step_images_equal_the_reference_to_1e4(reference: Reference) -> None:
    assert relative_error(reference.sample(), reference.tensors["heun18"]) < 1e-4


def test_churned_images_equal_the_reference_to_1e4(reference: Reference) -> None:
    assert relative_error(reference.sample(**reference.config["churn"]), reference.tensors["heun18_churn"]) < 1e-4


def test_images_over_another_sigma_range_equal_the_reference_to_1e4(reference: Reference) -> None:
    images = reference.sample(schedule=sigma_schedule(**reference.config["heun5"]))
    assert relative_error(images, reference.tensors["heun5"]) < 1e-4


@pytest.mark.parametrize("omega", [-1.0, 0.8, 1.5])
def test_guided_images_equal_the_reference_to_1e4(reference: Reference, omega: float) -> None:
    assert relative_error(reference.sample(omega), reference.tensors[f"guided_w{omega:.1f}"]) < 1e-4
