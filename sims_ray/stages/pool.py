"""One pool of actors for units of work: as many as there are nodes for, each of them restarted when it dies."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from sims_ray.config import ComputeSettings
from sims_ray.stages.cluster import as_sentence, start_ray

Work = TypeVar("Work")
IN_FLIGHT = 2  # units per actor: one at work, one waiting, which is what makes the pool grow


class Worker(Protocol):
    """What an actor holds: made once per process, then given one unit of work after the other."""

    def run(self, work: Any, /) -> dict[str, Any]:
        """Do one unit of work; returns plain facts about it."""
        ...


class _Actor:
    """Ray Data's calling convention around a worker."""

    def __init__(self, make: Callable[[ComputeSettings], Worker], compute: ComputeSettings, works: Any) -> None:
        import ray

        self._worker, self._works = make(compute), ray.get(works[0])

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "facts": json.dumps(self._worker.run(self._works[row["index"]]))}


def run_on_pool(
    works: Sequence[Work], make: Callable[[ComputeSettings], Worker], compute: ComputeSettings, doing: str
) -> Iterator[tuple[Work, dict[str, Any]]]:
    """Do units of work in any order on an actor pool, or in this process with `num_workers` 0.

    A unit whose actor or node is lost is done again elsewhere.

    Args:
        works: the units, which must survive being sent to another process.
        make: makes a worker in the actor's process.
        compute: number and resources of the actors.
        doing: what is being done, for messages.

    Yields:
        each unit when it is done, with the facts that the worker returned.
    """
    if not works:
        return
    if not compute.num_workers:
        worker = make(compute)
        for work in works:
            yield work, worker.run(work)
        return
    start_ray(compute)
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing it set it up anew
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    least, most = (min(n, len(works)) for n in compute.sampling_workers)
    rows = ray.data.from_items([{"index": i} for i in range(len(works))], override_num_blocks=len(works))
    done = rows.map(
        _Actor,
        fn_constructor_args=(make, compute, [ray.put(list(works))]),
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=compute.cpus_per_worker,
        num_gpus=compute.gpus_per_worker,
    )
    try:
        for row in done.iter_rows():
            yield works[row["index"]], json.loads(row["facts"])
    except ray.exceptions.RayError as error:
        raise as_sentence(error, doing) from error
