"""Agreement with the reference vectors of EDM and EDM2: networks, samplers and seeds, number for number."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import EDM2Precond, Precond

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = (
    "ddpmpp_uncond_r16", "ddpmpp_cond_r16", "ncsnpp_uncond_r16", "adm_cond_r16", "edm2_cond_r16", "edm2_uncond_r16",
)  # fmt: skip
ARCHITECTURES = {"SongUNet": "song_unet", "DhariwalUNet": "adm_unet", None: "edm2_unet"}


def network_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A golden file's network in the terms of a checkpoint card."""
    settings = {key: value for key, value in config.items() if key not in ("use_fp16", "model_type")}
    return {"architecture": ARCHITECTURES[config.get("model_type")], **settings}


class Reference:
    """One golden file: tensors, settings and the two networks."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.base, self.aux = self._network("base."), self._network("aux.")

    @property
    def state_dtype(self) -> torch.dtype:
        """Precision of the sampler's state: float64 in the EDM files, float32 in those of EDM2."""
        return self.tensors["heun18"].dtype

    def _network(self, prefix: str) -> Precond:
        net = build_network(network_settings(self.config["network"]))
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
        sigmas = (sigma_schedule(18) if schedule is None else schedule).to(self.state_dtype)
        denoiser = sims_guidance(self.base, self.aux, omega)
        return heun_sampler(denoiser, latents, labels, sigmas=sigmas, streams=streams, **churn).images


EDM, EDM2 = NAMES[:4], NAMES[4:]


@cache
def opened(name: str) -> Reference:
    torch.set_num_threads(1)
    return Reference(name)


@pytest.fixture
def edm(request: pytest.FixtureRequest) -> Reference:
    return opened(request.param)


@pytest.fixture
def edm2(request: pytest.FixtureRequest) -> Reference:
    return opened(request.param)


@pytest.fixture(params=NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return opened(request.param)


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
    streams = SeedStreams(reference.config["seeds"])
    assert torch.equal(streams.randn(t["latents"].shape[1:], torch.float32), t["latents"])
    if "seed_labels" in t:
        assert torch.equal(streams.randint(10), t["seed_labels"].argmax(1))


def test_18_step_images_equal_the_reference_to_1e4(reference: Reference) -> None:
    assert relative_error(reference.sample(), reference.tensors["heun18"]) < 1e-4


@pytest.mark.parametrize("edm", EDM, indirect=True)
def test_churned_images_equal_the_reference_to_1e4(edm: Reference) -> None:
    assert relative_error(edm.sample(**edm.config["churn"]), edm.tensors["heun18_churn"]) < 1e-4


@pytest.mark.parametrize("edm", EDM, indirect=True)
def test_images_over_another_sigma_range_equal_the_reference_to_1e4(edm: Reference) -> None:
    images = edm.sample(schedule=sigma_schedule(**edm.config["heun5"]))
    assert relative_error(images, edm.tensors["heun5"]) < 1e-4


@pytest.mark.parametrize("edm2", EDM2, indirect=True)
def test_the_uncertainty_of_edm2_equals_the_reference_to_1e5(edm2: Reference) -> None:
    assert isinstance(edm2.base, EDM2Precond)
    logvar = edm2.tensors["logvar"].flatten()
    assert relative_error(edm2.base.logvar(edm2.tensors["sigma"]), logvar) < 1e-5
    assert logvar.std() > 0.01


@pytest.mark.parametrize("edm2", EDM2, indirect=True)
def test_a_training_pass_of_edm2_normalises_its_weights_as_the_reference_to_1e5(edm2: Reference) -> None:
    t, net = edm2.tensors, copy.deepcopy(edm2.base).train().requires_grad_(True)
    with torch.no_grad():
        assert relative_error(net(t["x"], t["sigma"], t.get("labels")), t["denoised_train"]) < 1e-5
    prefix = "base_after_train_forward."
    weights = {name.removeprefix(prefix): weight for name, weight in t.items() if name.startswith(prefix)}
    assert len(weights) > 30
    for name, weight in weights.items():
        assert relative_error(net.get_parameter(name).detach(), weight) < 1e-5, name
    moved = [name for name, weight in weights.items() if not torch.equal(weight, edm2.base.get_parameter(name))]
    assert len(moved) > 30


@pytest.mark.parametrize("edm2", EDM2, indirect=True)
def test_a_frozen_edm2_network_keeps_its_weights_in_training_mode(edm2: Reference) -> None:
    net = copy.deepcopy(edm2.base).train()
    net(edm2.tensors["x"], edm2.tensors["sigma"], edm2.tensors.get("labels"))
    for name, weight in edm2.base.named_parameters():
        assert torch.equal(net.get_parameter(name), weight), name


@pytest.mark.parametrize("omega", [-1.0, 0.8, 1.5])
def test_guided_images_equal_the_reference_to_1e4(reference: Reference, omega: float) -> None:
    assert relative_error(reference.sample(omega), reference.tensors[f"guided_w{omega:.1f}"]) < 1e-4
