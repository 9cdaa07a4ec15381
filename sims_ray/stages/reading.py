"""How the images reach the training workers: resident once per node, or streamed; both give the same batches."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.order import InMemory, Share, TrainingData
from sims_ray.errors import SimsError
from sims_ray.stages.cluster import as_sentence, object_store_bytes
from sims_ray.stages.streaming import Streaming, start_feed
from sims_ray.stages.training_set import TrainingSet, from_arrow, to_arrow

logger = logging.getLogger("sims_ray")

RESIDENT_SHARE = 0.5  # of the memory at hand that a set may take without being asked to
FULL_SHARE = 0.8  # of it; beyond that, Ray moves objects to disks
BLOCK_BYTES = 1 << 30
LOADS = 4  # blocks that are read at a time, each in the memory of a process of its own


class Source(Protocol):
    """A set that every worker can open."""

    @property
    def training_set(self) -> TrainingSet:
        """The set."""
        ...

    def open(self, share: Share) -> TrainingData:
        """The batches of one worker."""
        ...


@dataclass(frozen=True)
class Resident:
    """A set in memory: in the object store of each node, or without Ray in that of this process.

    Attributes:
        training_set: the set.
        blocks: references to its rows in the order of the table, as Arrow; none without Ray.
    """

    training_set: TrainingSet
    blocks: tuple[Any, ...] = ()

    def open(self, share: Share) -> InMemory:
        """The batches of one worker."""
        if not self.blocks:
            return InMemory([self.training_set.between(0, self.training_set.order.num_rows)], share)
        import ray

        return InMemory([from_arrow(block) for block in ray.get(list(self.blocks))], share)


def choose_reading(reading: str, nbytes: int, memory_bytes: int, memory: str) -> str:
    """'resident' or 'streaming', for a set of some bytes; says which, and why, in the log.

    Args:
        reading: 'resident' or 'streaming' to have that; 'auto' for what the sizes suggest.
        nbytes: bytes of the set.
        memory_bytes: bytes of the memory that it would be resident in.
        memory: what that memory is, with {} for its size.

    Raises:
        SimsError: the set is to be resident, and does not fit.
    """
    sizes = f"{in_words(nbytes)} of images, {memory.format(in_words(memory_bytes))}"
    if reading == "resident" and nbytes > FULL_SHARE * memory_bytes:
        raise SimsError(f"data.reading=resident does not go: {sizes}; set data.reading=streaming or give more memory")
    mode = reading
    if reading == "auto":
        mode = "resident" if nbytes <= RESIDENT_SHARE * memory_bytes else "streaming"
    logger.info("reading: %s (%s%s)", mode, sizes, "" if reading == "auto" else f"; data.reading={reading}")
    return mode


def in_words(nbytes: int) -> str:
    """A number of bytes as one reads it."""
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:.1f} {name}"


@contextmanager
def open_source(
    training_set: TrainingSet, reading: str, positions: range, compute: ComputeSettings
) -> Iterator[Source]:
    """The set, read as `choose_reading` says, while training goes on.

    Args:
        training_set: what to read.
        reading: 'auto', 'resident' or 'streaming'.
        positions: images seen when training goes on, and when it ends.
        compute: number of workers, on the cluster that this process is connected to; 0 for this process.

    Raises:
        SimsError: the set is to be resident and does not fit, or cannot be read.
    """
    in_ray = compute.num_workers > 0
    memory_bytes = object_store_bytes() if in_ray else _free_bytes()
    memory = "the object store of a node holds {}" if in_ray else "{} of memory are free"
    if choose_reading(reading, training_set.nbytes, memory_bytes, memory) == "resident":
        yield Resident(training_set, _load(training_set) if in_ray else ())
    elif in_ray:
        with start_feed(training_set, positions) as feed:
            yield Streaming(training_set, positions.stop, feed)
    else:
        yield Streaming(training_set, positions.stop)


def _load(training_set: TrainingSet) -> tuple[Any, ...]:
    """References to the rows of the set as Arrow blocks in the object store, as few as may be."""
    import ray

    # No CPU is asked for, so that a lost block can be read again while training holds them all.
    task = ray.remote(num_cpus=0, num_returns=2, scheduling_strategy="SPREAD")(_read_block)
    blocks: list[Any] = []
    reading: dict[Any, Any] = {}  # by what says that a block is read
    num_rows = training_set.order.num_rows
    step = math.ceil(num_rows / math.ceil(training_set.nbytes / BLOCK_BYTES))
    for start in range(0, num_rows, step):
        if len(reading) == LOADS:
            (done,), _ = ray.wait(list(reading))
            _check_read(done, reading.pop(done))
        block, done = task.remote(training_set, start, min(start + step, num_rows))
        blocks.append(block)
        reading[done] = block
    for done, block in reading.items():
        _check_read(done, block)
    return tuple(blocks)


def _check_read(done: Any, block: Any) -> None:
    """Wait until a block is read, and leave it where it is."""
    import ray

    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        with suppress(ray.exceptions.RayError):
            ray.get(block)  # or Ray prints that nobody has looked at its error
        raise as_sentence(error, "reading the training set") from error


def _read_block(training_set: TrainingSet, start: int, stop: int) -> tuple[pa.Table, bool]:
    return to_arrow(training_set.between(start, stop)), True


def _free_bytes() -> int:
    """Memory of this machine that is free or can be freed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
