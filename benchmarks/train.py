"""What Ray Train adds to training, what a second worker gives, and which ways of computing are faster, as ratios.

    python -m benchmarks.train ray        # Ray Train against the same steps under torchrun, with the same workers
    python -m benchmarks.train scaling    # torchrun: 2 workers of one thread against 1
    python -m benchmarks.train variants   # one process: memory format, optimizer, compilation

The network is DDPM++ for 32x32 images with random weights, the images are noise; neither matters to the cost. Start-up
is apart: a rate counts from the second line of the training log on. The competitors take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sims_ray.config import ComputeSettings, load_recipe
from sims_ray.data.importers import import_images
from sims_ray.diffusion.order import InMemory, Share
from sims_ray.diffusion.training import Training
from sims_ray.stages.cluster import start_ray, stop_ray
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.training_log import TrainingLog, read_metrics
from sims_ray.studies.console import align
from sims_ray.studies.sims import SimsRun

ROWS = 512
SHAPE = (3, 32, 32)


def job_in(folder: Path, options: argparse.Namespace) -> TrainJob:
    """A base training of a few steps, on a table of noise."""
    table = folder / "table"
    if not (table / "manifest.json").is_file():
        images = np.random.default_rng(0).integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8)
        np.save(folder / "noise.npy", images)
        import_images(folder / "noise.npy", table)
    kimg = options.steps * options.batch / 1000
    overrides = [
        f"data.path={table}",
        f"network.model_channels={options.channels}",
        f"train.batch_size={options.batch}",
        f"train.duration_kimg={kimg}",
        f"train.checkpoint_kimg={10 * kimg}",
        f"train.log_kimg={options.batch * 2 / 1000}",
        "features.kind=pixels",
    ]
    job = SimsRun(load_recipe("images32", overrides), folder / "out").plan.base_job
    if job is None:
        raise RuntimeError("the recipe trains no base")
    return job


def rate(folder: Path) -> float:
    """Images per second of a finished run, without its first two log lines."""
    rows = read_metrics(folder)[2:]
    return statistics.median(row["images_per_s"] for row in rows)


def with_ray(options: argparse.Namespace, workers: int) -> float:
    """Images per second of the training stage."""
    with tempfile.TemporaryDirectory() as name:
        job = job_in(Path(name), options)
        train(job, ComputeSettings(num_workers=workers), lambda row: None)
        return rate(job.artifact.path)


def with_torchrun(options: argparse.Namespace, workers: int) -> float:
    """Images per second of the same steps in processes of torchrun."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job_in(folder, options)
        arguments = [f"--{key}={getattr(options, key)}" for key in ("steps", "batch", "channels")]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        subprocess.run(
            [sys.executable, *launch, "-m", "benchmarks.train", "worker", f"--folder={folder}", *arguments],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        return rate(folder)


def worker(options: argparse.Namespace) -> None:
    """One process of torchrun: the steps of the training stage, and nothing around them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    job = job_in(options.folder, options)
    training = build(job, rank, world_size)
    training.warm_up(SHAPE, options.batch // world_size)
    log = TrainingLog(options.folder, 0) if rank == 0 else None
    for step in range(1, options.steps + 1):
        training.step()
        if step % 2 == 0:
            loss = training.pop_loss()
            if log is not None:
                log.write(training.nimg, loss)
    torch.distributed.destroy_process_group()


def build(job: TrainJob, rank: int = 0, world_size: int = 1, channels_last: bool = False) -> Training:
    """The run of one worker."""
    training_set = job.training_set()
    share = Share(training_set.order, job.settings.batch_size, rank, world_size)
    ddp = torch.nn.parallel.DistributedDataParallel
    return Training(
        job.network_at_start(),
        job.optimization(),
        InMemory([training_set.between(0, training_set.order.num_rows)], share),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        channels_last=channels_last,
        wrap=ddp if world_size > 1 else lambda module: module,
    )


def ray(options: argparse.Namespace) -> None:
    """Ray Train against torchrun."""
    start_ray(ComputeSettings(num_workers=options.workers))
    rates: dict[str, list[float]] = {"torchrun": [], "Ray Train": []}
    for _ in range(options.turns):
        rates["torchrun"].append(with_torchrun(options, options.workers))
        rates["Ray Train"].append(with_ray(options, options.workers))
    stop_ray()
    show(rates, options)


def scaling(options: argparse.Namespace) -> None:
    """Two workers of one thread against one."""
    rates: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
    for _ in range(options.turns):
        rates["1 worker"].append(with_torchrun(options, 1))
        rates["2 workers"].append(with_torchrun(options, 2))
    show(rates, options)
    best = {name: max(values) for name, values in rates.items()}
    print(f"scaling efficiency: {best['2 workers'] / best['1 worker'] / 2:.3f}")


def variants(options: argparse.Namespace) -> None:
    """Ways of computing the same step in one process of one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        job = replace(job_in(Path(name), options))
        ways: dict[str, Callable[[], Training]] = {
            "plain, Adam in a loop": lambda: looped(build(job)),
            "fused Adam": lambda: build(job),
            "fused Adam, channels last": lambda: build(job, channels_last=True),
            "fused Adam, blocks compiled": lambda: compiled(build(job), "blocks"),
            "fused Adam, whole network compiled": lambda: compiled(build(job), "whole"),
            "fused Adam, channels last, whole network compiled": lambda: compiled(
                build(job, channels_last=True), "whole"
            ),
        }
        runs, start_s = {}, {}
        for way, make in ways.items():
            started_s = time.perf_counter()
            runs[way] = make()
            runs[way].step()
            start_s[way] = time.perf_counter() - started_s
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.steps):
            for way, run in runs.items():
                started_s = time.perf_counter()
                run.step()
                seconds[way].append(time.perf_counter() - started_s)
    show({way: [options.batch / s for s in values] for way, values in seconds.items()}, options)
    print(align([("way", "first step (s)"), *((way, f"{s:.1f}") for way, s in start_s.items())]))


def looped(training: Training) -> Training:
    """The same with an optimizer that visits one parameter after the other."""
    group = training.optimizer.param_groups[0]
    training.optimizer = torch.optim.Adam(
        group["params"], lr=group["lr"], betas=group["betas"], eps=group["eps"], foreach=False, fused=False
    )
    return training


def compiled(training: Training, what: str) -> Training:
    """The same with torch.compile."""
    training.compile(what)
    return training


def show(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the fastest and the median of each, against the first."""
    first = next(iter(rates.values()))
    rows = [("", "images/s, best", "ratio", "images/s, median", "ratio")]
    for name, values in rates.items():
        words = []
        for figure in (max, statistics.median):
            words += [f"{figure(values):.2f}", f"{figure(values) / figure(first):.3f}"]
        rows.append((name, *words))
    print(options)
    print(align(rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ray", "scaling", "variants", "worker"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    {"ray": ray, "scaling": scaling, "variants": variants, "worker": worker}[options.what](options)


if __name__ == "__main__":
    main()
