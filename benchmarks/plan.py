"""Whether `sims plan` is right: predicted against measured time, of a scaled-down run on this machine, in one run.

    python -m benchmarks.plan

The plan measures a few steps first. Then the stages run in this process, without Ray's workers, on random images: base
training, the synthetic set, fine-tuning. Their own loops are timed, so that start-up, loading and the last checkpoint
are apart; features and distances are no part of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.reading import make_table
from sims_ray.config import Recipe, load_recipe, presets
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.training_log import read_metrics
from sims_ray.studies.console import align
from sims_ray.studies.cost_table import cost_table
from sims_ray.studies.estimate import estimate
from sims_ray.studies.outline import Outline
from sims_ray.studies.sims import SimsRun

TABLE_BYTES = 1


def scaled_down(preset: str, table: Path, options: argparse.Namespace) -> Recipe:
    """A published recipe with few images, small batches and few steps."""
    batch, n_s = options.batch, options.n_s
    overrides = {
        "data.path": table,
        "features.kind": "pixels",
        "train.batch_size": batch,
        "train.duration_kimg": options.train / 1000,
        "train.log_kimg": batch / 1000,
        "train.checkpoint_kimg": 1e6,
        "finetune.batch_size": batch,
        "finetune.budgets_kimg": [options.finetune / 1000],
        "finetune.log_kimg": batch / 1000,
        "finetune.checkpoint_kimg": 1e6,
        "sampler.num_steps": options.steps,
        "synthesize.shard_nimg": n_s,
        "tune.n_s": [n_s],
        "tune.n_images": n_s,
        "evaluate.n_images": n_s,
        "compute.num_workers": 0,
        "compute.gpus_per_worker": int(torch.cuda.is_available()),
        "compute.sampling_batch": n_s,
        "tracking.enabled": "false",
    }
    return load_recipe(preset, [f"{name}={value}" for name, value in overrides.items()])


def loop_s(job: TrainJob) -> float:
    """Seconds that a training loop took, by its own log: a line per step."""
    seen, elapsed_s = 0.0, 0.0
    for row in read_metrics(job.artifact.path):
        elapsed_s += (row["nimg"] - seen) / row["images_per_s"]
        seen = row["nimg"]
    return elapsed_s


@contextmanager
def timed(name: str, measured: dict[str, float]) -> Iterator[None]:
    """Note the seconds of the block."""
    started_s = time.perf_counter()
    yield
    measured[name] = time.perf_counter() - started_s


def main() -> None:
    """Plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="edm-cifar10-vp", choices=list(presets()))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train", type=int, default=32, help="images of base training")
    parser.add_argument("--finetune", type=int, default=16, help="images of fine-tuning")
    parser.add_argument("--n-s", type=int, default=8, help="synthetic images")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder) / "table", presets()[options.preset].shape, TABLE_BYTES)
        recipe = scaled_down(options.preset, table, options)
        planned = estimate(Outline(recipe, Path(folder) / "run"))
        print(cost_table(planned), flush=True)
        predicted = {work.stage: planned.elapsed_s(work) for work in planned.stages}
        run = SimsRun(recipe, Path(folder) / "run")
        whole: dict[str, float] = {}
        with timed("train", whole):
            run.train_base()
        run.plan.synthesis_job.model.load(
            "cuda" if torch.cuda.is_available() else "cpu"
        )  # which the stage need not then
        with timed("synthesize", whole):
            run.synthesize()
        with timed("finetune", whole):
            run.finetune()
        jobs = {"train": run.plan.base_job, "finetune": run.plan.finetune_job(options.n_s)}
        loops = {name: loop_s(job) for name, job in jobs.items() if job is not None}
    rows = [("stage", "images", "predicted (s)", "measured (s)", "predicted / measured", "with start-up (s)")]
    for work in planned.stages:
        if work.stage in whole:
            predicted_s, measured_s = predicted[work.stage], loops.get(work.stage, whole[work.stage])
            times = f"{predicted_s:.1f}", f"{measured_s:.1f}", f"{predicted_s / measured_s:.3f}"
            rows.append((work.stage, str(work.images), *times, f"{whole[work.stage]:.1f}"))
    total_s, loops_s = sum(predicted[name] for name in whole), sum({**whole, **loops}.values())
    rows.append(
        ("all", "", f"{total_s:.1f}", f"{loops_s:.1f}", f"{total_s / loops_s:.3f}", f"{sum(whole.values()):.1f}")
    )
    print(f"{options}\n{align(rows)}")


if __name__ == "__main__":
    main()
