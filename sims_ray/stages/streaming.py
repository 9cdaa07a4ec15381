"""A training set that is read as it is trained on: in this process, or by Ray Data for all workers at once.

In Ray one actor runs a pipeline whose items are the windows of the training order, and hands its blocks to all
workers: every window is read once per cluster, and only a few are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sims_ray.diffusion.order import Rows, Share, joined
from sims_ray.errors import SimsError
from sims_ray.stages.cluster import as_sentence
from sims_ray.stages.training_set import TrainingSet, from_arrow, to_arrow

BLOCK_BYTES = 64 << 20  # a window is handed on, and freed, by blocks of this size
LOOKAHEAD_WINDOWS = 3  # in the object store: the one in use, and about two more
READERS = 2
ATTEMPTS = 3


class Piece(NamedTuple):
    """Rows that follow each other in the order of training, from a position on."""

    start_nimg: int
    rows: Rows

    @property
    def stop_nimg(self) -> int:
        """Position after its last row."""
        return self.start_nimg + len(self.rows.ids)


@dataclass(frozen=True)
class Streaming:
    """A set that is read as it is trained on, from the position that is asked for until the end of training.

    Attributes:
        training_set: the set.
        stop_nimg: where training ends.
        feed: the actor that reads for all workers; None to read in this process.
    """

    training_set: TrainingSet
    stop_nimg: int
    feed: Any = None

    def open(self, share: Share) -> Streamed:
        """The batches of one worker."""
        fetch = self._read if self.feed is None else partial(_fetch, self.feed, share)
        return Streamed(fetch, share, self.stop_nimg, self.training_set.mean_weight or 1.0)

    def _read(self, position: int) -> Piece:
        window = self.training_set.order.window_at(position)
        return Piece(window.start_nimg, self.training_set.window(window.number))


class Streamed:
    """A worker's share of a set that arrives in the order of training, one piece ahead.

    Args:
        fetch: gives the piece that holds a position.
        share: what the worker sees.
        stop_nimg: where training ends; nothing is fetched ahead from there on.
        mean_weight: mean of the weights of the whole set.
    """

    def __init__(self, fetch: Callable[[int], Piece], share: Share, stop_nimg: int, mean_weight: float) -> None:
        self._fetch, self._share, self._stop_nimg, self._mean_weight = fetch, share, stop_nimg, mean_weight
        self._piece: Piece | None = None
        self._ahead: Future[Piece] | None = None
        self._thread = ThreadPoolExecutor(1)

    def batch(self, nimg: int) -> Rows:
        """The worker's slice of the step at `nimg` images seen; weights are relative to their mean over the set."""
        positions, parts = self._share.positions(nimg), []
        position = positions.start
        while position < positions.stop:
            start_nimg, rows = self._at(position)
            # Copied at once: a view would keep the piece while the next ones come.
            parts.append(rows.take(np.arange(position - start_nimg, min(positions.stop - start_nimg, len(rows.ids)))))
            position += len(parts[-1].ids)
        return joined(parts).divided(self._mean_weight)

    def _at(self, position: int) -> Piece:
        if self._piece is not None and self._piece.start_nimg <= position < self._piece.stop_nimg:
            return self._piece
        self._piece = None  # frees it before the next one is waited for
        piece = self._ahead.result() if self._ahead is not None else None
        if piece is None or not piece.start_nimg <= position < piece.stop_nimg:
            piece = self._fetch(position)
        ahead = piece.stop_nimg < self._stop_nimg
        self._ahead = self._thread.submit(self._fetch, piece.stop_nimg) if ahead else None
        self._piece = piece
        return piece


class Feed:
    """The blocks of a run's windows in the order of training, for all workers; an actor of its own.

    It starts where the first worker asks, and again wherever one asks for what is gone: after a restart of the
    workers, or its own. What all workers have passed is let go.

    Args:
        training_set: what to read.
        stop_nimg: where training ends.
    """

    def __init__(self, training_set: TrainingSet, stop_nimg: int) -> None:
        self._set, self._stop_nimg = training_set, stop_nimg
        self._world_size = 0  # of the workers that ask at present
        self._asked: dict[int, int] = {}  # newest position by rank
        self._held: deque[tuple[int, int, Any]] = deque()  # first position, the one after the last, block
        self._next_nimg = -1  # position of the first row that the pipeline has not given yet
        self._blocks: Iterator[tuple[int, Any]] = iter(())

    def begin(self, position: int) -> None:
        """Read ahead of the first question; what fails will fail again when it is asked for."""
        with suppress(Exception):
            self.block(0, position, 1)

    def block(self, rank: int, position: int, world_size: int) -> tuple[int, list[Any]]:
        """The first position of the block that holds `position`, and a list with the reference to the block."""
        if position < self._asked.get(rank, -1) or world_size != self._world_size:
            self._asked.clear()  # the workers have begun anew, perhaps more or fewer of them
            self._world_size = world_size
        self._asked[rank] = position
        if self._next_nimg < 0 or position < (self._held[0][0] if self._held else self._next_nimg):
            self._start(position)
        while self._next_nimg <= position:
            if (following := next(self._blocks, None)) is None:
                self._start(position)  # what was read before ended in an error
                continue
            rows, block = following
            self._held.append((self._next_nimg, self._next_nimg + rows, block))
            self._next_nimg += rows
        answer = next((start, [block]) for start, stop, block in self._held if start <= position < stop)
        while len(self._asked) == self._world_size and self._held[0][1] <= min(self._asked.values()):
            self._held.popleft()
        return answer

    def _start(self, position: int) -> None:
        order = self._set.order
        first, last = (order.window_at(nimg) for nimg in (position, max(self._stop_nimg - 1, position)))
        self._held.clear()
        self._blocks = iter(())  # ends the pipeline before
        self._blocks = _pipeline(self._set, range(first.number, last.number + 1))
        self._next_nimg = first.start_nimg


def _pipeline(training_set: TrainingSet, windows: range) -> Iterator[tuple[int, Any]]:
    """Rows and reference of every block of some windows, in order, from Ray Data."""
    import ray.data
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    def read(numbers: pa.Table) -> Iterator[pa.Table]:
        for number in numbers["id"].to_pylist():
            yield to_arrow(training_set.window(windows[number]))

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    ahead = ExecutionResources.for_limits(object_store_memory=LOOKAHEAD_WINDOWS * training_set.window_nbytes)
    context.execution_options.resource_limits = ahead
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    with DataContext.current(context):
        numbers = ray.data.range(len(windows), override_num_blocks=len(windows))
        # No CPU is asked for: training may hold them all, and would wait for ever.
        blocks = numbers.map_batches(
            read, batch_size=None, batch_format="pyarrow", compute=TaskPoolStrategy(size=READERS), num_cpus=0
        )
        bundles = blocks.iter_internal_ref_bundles()
    for bundle in bundles:
        yield from ((entry.metadata.num_rows, entry.ref) for entry in bundle.blocks)


@contextmanager
def start_feed(training_set: TrainingSet, positions: range) -> Iterator[Any]:
    """The actor that reads for all workers, while training goes on; it runs on the node of this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Feed)
    feed = actor.remote(training_set, positions.stop)
    feed.begin.remote(positions.start)  # reads while the workers are starting
    try:
        yield feed
    finally:
        ray.kill(feed)


def _fetch(feed: Any, share: Share, position: int) -> Piece:
    """The block that holds a position, from the actor; asked for again if the node that held it is lost."""
    import ray

    lost = 0
    while True:
        try:
            start_nimg, (block,) = ray.get(feed.block.remote(share.rank, position, share.world_size))
            return Piece(start_nimg, from_arrow(ray.get(block)))
        except ray.exceptions.ObjectLostError:
            lost += 1
            if lost == ATTEMPTS:
                raise
        except ray.exceptions.RayTaskError as error:
            # Ray Data appends lines of advice of its own to the message.
            raise SimsError(str(as_sentence(error, "reading the training set")).splitlines()[0]) from error
