"""Starting and leaving Ray."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError

DATA_SLOTS = 2  # CPUs that Ray Data's own read and write tasks need beside the actors, or it can hang

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for one controller poll
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the core's log on stderr; errors reach the user as exceptions
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the artifacts hold the metrics
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def start_ray(compute: ComputeSettings) -> Any:
    """Connect to the cluster of `RAY_ADDRESS`, or start a local one; returns the `ray` module.

    Does nothing when this process is connected already.

    Raises:
        SimsError: the cluster of `RAY_ADDRESS` cannot be reached.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    for library in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address, **common)
        except ConnectionError as error:
            raise SimsError(
                f"no Ray cluster at RAY_ADDRESS={address} ({error}); start one or unset RAY_ADDRESS"
            ) from None
        return ray
    workers = max(1, round(compute.num_workers * compute.cpus_per_worker))
    ray.init(
        "local",
        num_cpus=max(os.cpu_count() or 1, workers + DATA_SLOTS),
        include_dashboard=compute.dashboard,
        object_store_memory=compute.object_store_mb << 20,
        **common,
    )
    return ray


@contextmanager
def ray_folder(beside: Path) -> Iterator[dict[str, str]]:
    """`name` and `storage_path` for Ray's own bookkeeping of one execution; the artifact holds what counts."""
    storage = beside.parent.resolve() / ".ray"
    name = f"{beside.name}-{os.getpid()}-{time.time_ns()}"
    try:
        yield {"name": name, "storage_path": str(storage)}
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)


def stop_ray() -> None:
    """Leave Ray; a local cluster of this process ends with it."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
