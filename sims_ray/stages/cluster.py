"""Starting and leaving Ray."""

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError

DATA_SLOTS = 2  # CPUs that Ray Data's own read and write tasks need beside the actors, or it can hang

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for one controller poll
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the core's log on stderr; errors reach the user as exceptions
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command line's to handle
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the artifacts hold the metrics
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def start_ray(compute: ComputeSettings) -> Any:
    """Connect to the cluster of `RAY_ADDRESS`, or start a local one; returns the `ray` module.

    Does nothing when this process is connected already.

    Raises:
        SimsError: the cluster of `RAY_ADDRESS` cannot be reached, or a local one lacks the GPUs asked for.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    quiet_ray()
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address, **common)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise SimsError(f"no Ray cluster at RAY_ADDRESS={address} ({reason}); start one, or unset it") from None
        return ray
    workers = max(1, round(compute.num_workers * compute.cpus_per_worker))
    ray.init(
        "local",
        num_cpus=max(os.cpu_count() or 1, workers + DATA_SLOTS),
        include_dashboard=compute.dashboard,
        object_store_memory=None if compute.object_store_mb is None else compute.object_store_mb << 20,
        **common,
    )
    _check_gpus(ray, compute)
    return ray


def quiet_ray() -> None:
    """Keep what Ray's libraries tell of their work off the console; their errors reach the user as exceptions."""
    for library in ("ray.data", "ray.tune", "ray.train"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _check_gpus(ray: Any, compute: ComputeSettings) -> None:
    """A local cluster gets no more GPUs by waiting."""
    asked, found = compute.num_workers * compute.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if asked > found:
        stop_ray()
        raise SimsError(
            f"compute.num_workers x compute.gpus_per_worker = {asked:g} GPUs, but this machine has {found:g}; "
            f"lower either, or set RAY_ADDRESS to a cluster that has them"
        )


def object_store_bytes() -> int:
    """Size of the object store of the smallest node of the cluster that this process is connected to."""
    import ray

    return int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Ctrl-C stays KeyboardInterrupt although Ray Train installs a handler that exits, and leaves it behind."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def as_sentence(error: BaseException, doing: str) -> SimsError:
    """What went wrong in a worker, out of the layers that Ray wraps around it."""
    cause = _root_cause(error)
    if isinstance(cause, SimsError):
        return cause
    reason = " ".join(str(cause).split())[:500]
    return SimsError(
        f"{doing} failed ({type(cause).__name__}: {reason}); what was finished is kept, run the same command to go on"
    )


def _root_cause(error: BaseException) -> BaseException:
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _root_cause(next(iter(failures.values())))
    inner = getattr(error, "cause", None) or error.__cause__
    return _root_cause(inner) if isinstance(inner, BaseException) else error


@contextmanager
def ray_folder(beside: Path) -> Iterator[dict[str, str]]:
    """`name` and `storage_path` for Ray's own bookkeeping of one execution; the artifact holds what counts."""
    storage = beside.parent.resolve() / ".ray"
    name = f"{beside.name}-{os.getpid()}-{time.time_ns()}"
    try:
        yield {"name": name, "storage_path": str(storage)}
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)
        with suppress(OSError):
            storage.rmdir()  # only when it is empty


def stop_ray() -> None:
    """Leave Ray; a local cluster of this process ends with it."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
