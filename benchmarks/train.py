"""What Ray Train adds to training, what a second worker gives, and which ways of computing are faster, as ratios.

    python -m benchmarks.train ray        # Ray Train against the same steps under torchrun, with the same workers
    python -m benchmarks.train scaling    # torchrun: 2 workers of one thread against 1
    python -m benchmarks.train variants   # one process: memory format, optimizer, compilation

The network is DDPM++ for 32x32 images with random weights, the images are noise; neither matters to the cost. Start-up
is apart: rates count from the third line of the training log on. The competitors take turns of a line each, while the
workers of the other are stopped; Ray's services run all the time, as they do on a cluster.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
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
from sims_ray.stages.training_log import METRICS, TrainingLog
from sims_ray.studies.console import align
from sims_ray.studies.sims import SimsRun

ROWS = 512
SHAPE = (3, 32, 32)
WORKER = rb"^ray::RayTrainWorker|-m\x00?.*benchmarks.train\x00worker"
# The allocator's habits differ by chance from process to process, and by up to 5 % of the time of a step.
SAME_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
START_LINES = 2  # lines that belong to the start-up


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
        f"train.log_kimg={options.batch * options.line_steps / 1000}",
        "features.kind=pixels",
    ]
    job = SimsRun(load_recipe("images32", overrides), folder / "out").plan.base_job
    if job is None:
        raise RuntimeError("the recipe trains no base")
    return job


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for one in found:  # grows as it goes
        found += children.get(one, [])
    return found


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of a competitor that train."""
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(process.pid)}
    return [pid for pid, command in commands.items() if re.search(WORKER, command.read_bytes())]


def signal_to(pids: Iterable[int], number: signal.Signals) -> None:
    """Stop processes, let them go on, or end them."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a competitor with all that it has started."""
    signal_to(descendants(process.pid), signal.SIGKILL)


def take_turns(commands: dict[str, list[str]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of competitors that take turns of one log line; the workers of the other are stopped."""
    rates: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        runs: dict[str, tuple[subprocess.Popen[bytes], Path, list[int]]] = {}
        for competitor, command in commands.items():
            folder = Path(name) / str(len(runs))
            folder.mkdir()
            job_in(folder, options)  # the table lies there before the workers look for it
            errors = stack.enter_context((folder / "errors.txt").open("wb"))
            arguments = [
                f"--{key}={getattr(options, key.replace('-', '_'))}"
                for key in ("steps", "batch", "channels", "line-steps")
            ]
            process = subprocess.Popen(
                [sys.executable, *command, f"--folder={folder}", *arguments],
                env={**os.environ, **SAME_MEMORY, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            stack.callback(end, process)
            wait_for_line(process, folder, START_LINES)
            runs[competitor] = process, folder, workers_of(process)
            signal_to(runs[competitor][2], signal.SIGSTOP)
        for line in range(START_LINES + 1, options.steps // options.line_steps + 1):
            for competitor, (process, folder, pids) in runs.items():
                signal_to(pids, signal.SIGCONT)
                started_s = time.perf_counter()
                wait_for_line(process, folder, line)
                rates[competitor].append(options.line_steps * options.batch / (time.perf_counter() - started_s))
                signal_to(pids, signal.SIGSTOP)
        for process, _, pids in runs.values():
            signal_to(pids, signal.SIGCONT)
            process.wait()
    return rates


def wait_for_line(process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    """Return when the log of a competitor has that many lines."""
    while True:
        with suppress(StopIteration):
            if next(folder.rglob(METRICS)).read_bytes().count(b'"nimg"') >= number:
                return
        if process.poll() is not None:
            raise RuntimeError((folder / "errors.txt").read_text())
        time.sleep(0.003)


def worker(options: argparse.Namespace) -> None:
    """One process of torchrun: the steps of the training stage, and nothing around them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    job = job_in(options.folder, options)
    training = build(job, rank, world_size, apart=options.apart)
    training.warm_up(SHAPE, options.batch // world_size)
    log = TrainingLog(options.folder, 0) if rank == 0 else None
    for step in range(1, options.steps + 1):
        training.step()
        if step % options.line_steps == 0:
            loss = training.pop_loss()
            if log is not None:
                log.write(training.nimg, loss)
    torch.distributed.destroy_process_group()


def build(
    job: TrainJob, rank: int = 0, world_size: int = 1, channels_last: bool = False, apart: bool = False
) -> Training:
    """The run of one worker; `apart`, it keeps its gradients to itself."""
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
        wrap=ddp if world_size > 1 and not apart else lambda module: module,
    )


def torchrun(workers: int) -> list[str]:
    """The command of so many processes under torchrun."""
    return [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        "-m",
        "benchmarks.train",
        "worker",
    ]


def with_ray(options: argparse.Namespace) -> None:
    """The training stage, on a Ray of its own."""
    compute = ComputeSettings(num_workers=options.workers)
    start_ray(compute)
    train(job_in(options.folder, options), compute, lambda row: None)
    stop_ray()


def ray(options: argparse.Namespace) -> None:
    """Ray Train against torchrun."""
    with_ray = ["-m", "benchmarks.train", "with-ray", f"--workers={options.workers}"]
    show(take_turns({"torchrun": torchrun(options.workers), "Ray Train": with_ray}, options), options)


def scaling(options: argparse.Namespace) -> None:
    """Two workers of one thread against one; and two that exchange nothing, which is what the machine can give."""
    commands = {"1 worker": torchrun(1), "2 workers": torchrun(2), "2 workers apart": [*torchrun(2), "--apart"]}
    rates = take_turns(commands, options)
    show(rates, options)
    for name in ("2 workers", "2 workers apart"):
        ratios = [two / one / 2 for two, one in zip(rates[name], rates["1 worker"], strict=True)]
        print(f"scaling efficiency, {name}: {statistics.median(ratios):.3f}")


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
        }
        runs = {}
        for way, make in ways.items():
            started_s = time.perf_counter()
            runs[way] = make()
            runs[way].step()
            print(f"{way}: first step after {time.perf_counter() - started_s:.1f} s", flush=True)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.steps):
            for way, run in runs.items():
                started_s = time.perf_counter()
                run.step()
                seconds[way].append(time.perf_counter() - started_s)
    show({way: [options.batch / s for s in values] for way, values in seconds.items()}, options)


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
    """Print the rates, and the median of their ratios to the first competitor, turn by turn."""
    first = next(iter(rates.values()))
    rows = [("", "images/s", "ratio", "of half the turns")]
    for name, values in rates.items():
        low, middle, high = statistics.quantiles([one / other for one, other in zip(values, first, strict=True)], n=4)
        rows.append((name, f"{statistics.median(values):.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"))
    print(options)
    print(align(rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ray", "scaling", "variants", "worker", "with-ray"])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--line-steps", type=int, default=2, help="steps between two lines of the log: one turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--apart", action="store_true")
    options = parser.parse_args()
    ways = {"ray": ray, "scaling": scaling, "variants": variants, "worker": worker, "with-ray": with_ray}
    ways[options.what](options)


if __name__ == "__main__":
    main()
