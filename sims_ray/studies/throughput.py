"""How fast a worker computes: from a GPU's data sheet and published costs of training, or measured (`measurement`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sims_ray.config import load_recipe, preset_network
from sims_ray.errors import SimsError
from sims_ray.nn.flops import Gpu, gpu_named, network_flops
from sims_ray.stages.train_job import KIMG

HOUR_S = 3600
EDM = "EDM (arXiv 2206.00364)"


@dataclass(frozen=True)
class Fact:
    """A number of a plan, and where it is from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Throughput:
    """What one worker does.

    Attributes:
        device: what it runs on, for people.
        on_gpu: whether that is a GPU.
        training_flops_per_s, sampling_flops_per_s: operations per second.
        memory_bytes: memory that the worker may use.
        facts: what these numbers are made of.
    """

    device: str
    on_gpu: bool
    training_flops_per_s: float
    sampling_flops_per_s: float
    memory_bytes: float
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class PublishedCost:
    """What base training took its authors.

    Attributes:
        preset: the published model.
        gpu: kind of GPU.
        precision: dtype of the network.
        gpu_hours: of the whole training.
        source: where that is said.
    """

    preset: str
    gpu: str
    precision: str
    gpu_hours: float
    source: str


PUBLISHED = (
    PublishedCost("edm-cifar10-vp", "v100", "float32", 384, f"{EDM}: 8 V100 for about 2 days"),
    PublishedCost("edm-ffhq64-vp", "v100", "float32", 768, f"{EDM}: 8 V100 for about 4 days"),
    PublishedCost("edm-imagenet64-adm", "a100", "float16", 9984, f"{EDM}: 32 A100 for about 13 days"),
)


def published_cost(name: str, precision: str) -> PublishedCost:
    """The published cost to go by: of this model, else of the first that was trained in float32, or in less."""
    alike = [cost for cost in PUBLISHED if (cost.precision == "float32") == (precision == "float32")]
    return next((cost for cost in alike if cost.preset == name), alike[0])


@cache
def share_of_peak(cost: PublishedCost) -> float:
    """Share of its GPUs' peak that a published training got, by the operations counted here."""
    train = load_recipe(cost.preset).train
    flops = train.duration_kimg * KIMG * network_flops(preset_network(cost.preset)).training()
    return flops / (cost.gpu_hours * HOUR_S * gpu_named(cost.gpu).peak_flops[cost.precision])


def table_throughput(gpu: Gpu, cost: PublishedCost, precision: str, gpus: float = 1) -> Throughput:
    """A worker on a GPU of the table that gets the share of the peak that a published training got.

    Args:
        gpu: kind of GPU.
        cost: the published training.
        precision: dtype of the network.
        gpus: GPUs per worker; of more than one it uses one.

    Raises:
        SimsError: the GPU does not know this dtype.
    """
    if precision not in gpu.peak_flops:
        raise SimsError(f"a {gpu.name} does not compute in {precision}; set compute.precision to float32 or float16")
    share, peak, part = share_of_peak(cost), gpu.peak_flops[precision], min(gpus, 1)
    beyond = "; beyond 100 %, as convolutions can do with fewer operations than are counted" if share > 1 else ""
    facts = (
        Fact(f"peak of a {gpu.name} in {precision}", f"{peak / 1e12:g} TFLOP/s", gpu.source),
        Fact("share of it in training", f"{share:.1%}", f"{cost.source}, {cost.gpu_hours:g} GPU-hours{beyond}"),
        Fact("share of it in sampling", f"{share:.1%}", "assumed to be that of training"),
        Fact(f"memory of a {gpu.name}", f"{gpu.memory_bytes / 1e9:g} GB", gpu.source),
    )
    rate = peak * share * part
    return Throughput(gpu.name, True, rate, rate, gpu.memory_bytes * part, facts)
