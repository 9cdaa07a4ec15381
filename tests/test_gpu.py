"""Half precision, compiled networks and asynchrony, measured where there is a GPU: `pytest -m gpu -s`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import guidance_interval, shared_encoder_guidance, sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.nn.networks import build_network, decoder_parameters
from sims_ray.nn.precond import Precond
from tests.diffusion.runs import SETTINGS, gradients, trainable, training
from tests.networks import NCSNPP

DEVICE = "cuda"
CLASSES = 10
SEEDS = range(256)
SCHEDULE = {"num_steps": 18, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
CHURN = {"S_churn": 20.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
# Networks of 32x32 RGB images: the one of the paper for DDPM++, small ones for the rest.
SMALL = {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [16]}
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
    "ncsnpp": {**SMALL, **NCSNPP},
    "adm": {**SMALL, "architecture": "adm_unet"},
    "edm2": {**SMALL, "architecture": "edm2_unet"},
}
# Mean absolute difference in grey levels: six times what networks of one block per resolution showed on a CPU (0.2 to
# 0.33 and 0.02 to 0.05), as deeper ones round more often.
GREY_LEVELS = {torch.bfloat16: 2.0, torch.float16: 0.3}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device on this machine: bf16/fp16 and compile are checked where there is one",
    ),
    pytest.mark.timeout(1200),  # the first use of a compiled network takes minutes
]
each_network = pytest.mark.parametrize("name", NETWORKS)
Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """TF32, on by default in convolutions, keeps no more bits than float16."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def network(name: str, seed: int = 0, **settings: Any) -> Precond:
    """A conditional network on the GPU whose weights are far from their near-zero initial values."""
    settings = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": CLASSES,
        "dropout": 0.0,
        **NETWORKS[name],
        **settings,
    }
    net = build_network(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = math.prod(parameter.shape[1:])
            centre = 0.0 if key.endswith("bias") else 1.0
            parameter.copy_(centre + 0.15 * noise if parameter.ndim < 2 else noise / math.sqrt(fan_in))
        for buffer in net.buffers():  # random frequencies and phases come from the global stream
            if buffer.ndim == 1:
                buffer.copy_(4 * torch.randn(buffer.shape, generator=generator))
    return net.eval().requires_grad_(False).to(DEVICE)


def images(denoiser: Denoiser, seeds: range = SEEDS, device: str = DEVICE, **churn: float) -> Tensor:
    """Grey levels of the images of these seeds, [N, 3, 32, 32], on the host."""
    options = {"label_dim": CLASSES, "batch_size": len(seeds), "device": device}
    batch = next(generate(denoiser, (3, 32, 32), seeds, {**SCHEDULE, **churn}, **options))
    return batch.images.float()


def seconds(denoiser: Denoiser) -> float:
    """Time to sample all seeds, after one run to warm up."""
    images(denoiser)
    start = time.perf_counter()
    images(denoiser)  # ends with a copy to the host, which waits for the device
    return time.perf_counter() - start


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises inside the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def report(record: Record, name: str, value: float) -> None:
    record(name, value)
    print(f"{name}: {value:.4g}")


# --- half precision


@each_network
@pytest.mark.parametrize("precision", list(GREY_LEVELS), ids=str)
def test_images_in_half_precision_differ_from_those_in_float32_by_a_few_grey_levels(
    name: str, precision: torch.dtype, record_property: Record
) -> None:
    net = network(name)
    expected = images(net)
    net.precision = precision
    difference = (images(net) - expected).abs()
    report(record_property, f"{name} {precision} mean difference, grey levels", float(difference.mean()))
    report(record_property, f"{name} {precision} largest difference, grey levels", float(difference.max()))
    assert expected.std() > 10
    assert 0 < float(difference.mean()) < GREY_LEVELS[precision]


@each_network
@pytest.mark.parametrize("precision", list(GREY_LEVELS), ids=str)
def test_guided_images_in_half_precision_differ_by_a_few_grey_levels_too(
    name: str, precision: torch.dtype, record_property: Record
) -> None:
    base, aux = network(name), nearby(network(name))
    expected = images(sims_guidance(base, aux, 1.0))
    base.precision = aux.precision = precision
    difference = (images(sims_guidance(base, aux, 1.0)) - expected).abs()
    report(record_property, f"{name} {precision} guided, mean difference, grey levels", float(difference.mean()))
    assert 0 < float(difference.mean()) < 3 * GREY_LEVELS[precision]  # |1 + omega| + |omega| = 3


def nearby(net: Precond, names: set[str] | None = None) -> Precond:
    """The same network with its weights, or those of these names, slightly moved, as fine-tuning would."""
    moved = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in moved.named_parameters():
        if names is None or name in names:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.02 * parameter.abs().mean() * noise)
    return moved


# --- compiled networks


@pytest.mark.parametrize(
    ("name", "precision"),
    [("ddpmpp", torch.bfloat16), ("ddpmpp", torch.float32), ("adm", torch.float16), ("edm2", torch.float16)],
    ids=str,
)
def test_a_compiled_network_samples_the_images_of_the_eager_one(
    name: str, precision: torch.dtype, record_property: Record
) -> None:
    eager, compiled = network(name), network(name)
    eager.precision = compiled.precision = precision
    compiled.compile_network()
    difference = (images(compiled) - images(eager)).abs()
    slow, fast = seconds(eager), seconds(compiled)
    report(record_property, f"{name} {precision} compiled, mean difference, grey levels", float(difference.mean()))
    report(record_property, f"{name} {precision} eager, images per second", len(SEEDS) / slow)
    report(record_property, f"{name} {precision} compiled, images per second", len(SEEDS) / fast)
    report(record_property, f"{name} {precision} compiled, speed-up", slow / fast)
    assert float(difference.mean()) < 1


def test_compiled_networks_share_an_encoder_as_eager_ones_do() -> None:
    base = network("edm2")
    aux = nearby(base, decoder_parameters(base))
    expected = images(shared_encoder_guidance(base, aux, 1.0))
    for net in (base, aux):
        net.compile_network()
    assert float((images(shared_encoder_guidance(base, aux, 1.0)) - expected).abs().mean()) < 1


# --- asynchrony


@each_network
@pytest.mark.parametrize("guidance", ["base", "sims", "shared encoder", "interval"])
def test_the_sampler_never_waits_for_the_device(name: str, guidance: str) -> None:
    base = network(name)
    aux = nearby(base, decoder_parameters(base))
    guided = sims_guidance(base, aux, 1.0)
    denoiser = {
        "base": base,
        "sims": guided,
        "shared encoder": shared_encoder_guidance(base, aux, 1.0),
        "interval": guidance_interval(guided, base, 0.1, 10.0),
    }[guidance]
    sigmas = sigma_schedule(6)

    def sample() -> Tensor:
        return heun_sampler(denoiser, latents, labels, sigmas=sigmas, streams=streams, **CHURN).images

    streams = SeedStreams(range(4))
    latents = streams.randn((3, 32, 32), torch.float32, DEVICE)
    labels = F.one_hot(streams.randint(CLASSES), CLASSES).to(DEVICE, torch.float32)
    sample()  # the libraries' set-up on first use may wait
    with no_waiting():
        x = sample()
    assert x.isfinite().all()


def test_waiting_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchron"), no_waiting():
        float(torch.ones((), device=DEVICE))


# --- the same on every device


@each_network
@pytest.mark.parametrize("churn", [{}, CHURN], ids=["deterministic", "churned"])
def test_images_of_seeds_on_the_gpu_are_those_of_the_cpu(name: str, churn: dict[str, float]) -> None:
    net, seeds = network(name, **SMALL), range(4)
    on_gpu = images(net, seeds, **churn)
    on_cpu = images(net.to("cpu"), seeds, device="cpu", **churn)
    difference = (on_gpu - on_cpu).abs()
    assert float(difference.mean()) < 0.02
    assert float(difference.max()) <= 2
    assert on_cpu.std() > 10


def test_noise_of_seeds_is_the_same_bits_on_every_device() -> None:
    for dtype in (torch.float32, torch.float64):
        on_gpu, on_cpu = (SeedStreams(range(3)).randn((3, 8, 8), dtype, device) for device in (DEVICE, "cpu"))
        assert on_gpu.device.type == DEVICE
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_a_training_step_on_the_gpu_has_the_gradients_of_the_cpu(name: str) -> None:
    on_cpu = training(trainable(architecture=name))
    on_gpu = training(trainable(architecture=name).to(DEVICE), SETTINGS, device=torch.device(DEVICE))
    for run in (on_cpu, on_gpu):
        run.step()
    expected = gradients(on_cpu)
    torch.testing.assert_close(gradients(on_gpu).cpu(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert on_gpu.pop_loss() == pytest.approx(on_cpu.pop_loss(), rel=1e-4)
