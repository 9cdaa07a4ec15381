"""What guidance costs per image, against the base, in one run.

    python -m benchmarks.guidance_cost --preset edm-cifar10-vp

Random weights: the cost does not depend on them. The variants take turns, and the fastest turn of each counts, so that
other load on the machine falls on none of them in particular.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from sims_ray.config import preset_network, presets
from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.guidance import guidance_interval, shared_encoder_guidance, sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import Sampled, heun_sampler, sigma_schedule
from sims_ray.nn.flops import flop_counter
from sims_ray.nn.merge import merge
from sims_ray.nn.networks import build_network, decoder_parameters
from sims_ray.nn.precond import Precond
from sims_ray.studies.console import align

OMEGA = 1.0


def drifted(base: Precond, names: set[str]) -> Precond:
    """A copy of the base with other values in the named parameters."""
    aux = copy.deepcopy(base)
    for name, parameter in aux.named_parameters():
        if name in names:
            parameter.add_(0.01 * torch.randn_like(parameter))
    return aux


def variants(base: Precond, resolution: int) -> dict[str, Denoiser]:
    """The denoisers to compare."""
    everything = {name for name, _ in base.named_parameters()}
    aux = drifted(base, everything)
    decoder = drifted(base, decoder_parameters(base))
    upper = drifted(base, decoder_parameters(base, resolution))
    sims = sims_guidance(base, aux, OMEGA)
    return {
        "base": base,
        "SIMS": sims,
        "SIMS, sigma in (0.2, 5]": guidance_interval(sims, base, 0.2, 5.0),
        "SIMS, decoder trained": shared_encoder_guidance(base, decoder, OMEGA),
        f"SIMS, decoder trained from {resolution} px up": shared_encoder_guidance(base, upper, OMEGA),
        "Neon": merge(base, aux, OMEGA),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="edm-cifar10-vp", choices=list(presets()))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = presets()[options.preset]
    base = build_network(preset_network(options.preset)).eval().requires_grad_(False).to(options.device)
    base.run_in("float32")
    denoisers = variants(base, preset.shape[1])
    sigmas = sigma_schedule(options.steps)
    latents = SeedStreams(range(options.batch)).randn(preset.shape, torch.float32, options.device)

    def sample(denoiser: Denoiser) -> tuple[float, Sampled]:
        started_s = time.perf_counter()
        sampled = heun_sampler(denoiser, latents, sigmas=sigmas)
        sampled.images.sum().item()  # waits for a GPU
        return (time.perf_counter() - started_s) / options.batch, sampled

    fastest_s: dict[str, float] = {}
    for turn in range(options.turns + 1):
        for name, denoiser in denoisers.items():
            seconds, _ = sample(denoiser)
            if turn:  # the first turn warms up
                fastest_s[name] = min(seconds, fastest_s.get(name, float("inf")))
    rows = [("variant", "NFE", "GFLOP/image", "ratio", "s/image", "time ratio")]
    flops = {}
    for name, denoiser in denoisers.items():
        with flop_counter() as counter:
            _, sampled = sample(denoiser)
        flops[name] = counter.get_total_flops() / options.batch / 1e9
        rows.append(
            (
                name,
                f"{sampled.nfe:g}",
                f"{flops[name]:.1f}",
                f"{flops[name] / flops['base']:.3f}",
                f"{fastest_s[name]:.3f}",
                f"{fastest_s[name] / fastest_s['base']:.3f}",
            )
        )
    print(f"{options.preset}, {options.steps} Heun steps, batch {options.batch}, {options.device}, {options}")
    print(align(rows))


if __name__ == "__main__":
    main()
