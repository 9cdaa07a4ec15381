"""The order in which training visits the rows of a table, and the batches that come of it.

The order is a pure function of (seed, images seen), and one that a table can be read in by large sequential pieces:
rows lie in chunks; an epoch permutes the chunks, cuts them into windows, and permutes the rows of each window
uniformly. A table of one window so gets a uniform permutation of all its rows, and a larger one never needs more than
a window at hand. Whether the rows lie in memory or are streamed never enters the mathematics.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 128  # of about 4 MB each: half a gigabyte of images is shuffled together
SUMMED_ROWS = 1 << 16


@dataclass(frozen=True)
class TrainingOrder:
    """Rows as they are trained on: each once per epoch, epochs following each other without a gap.

    Args:
        seed: seed of the order.
        num_rows: rows of the set.
        chunk_rows: rows that are read together.
        window_chunks: most chunks whose rows are shuffled together.
    """

    seed: int
    num_rows: int
    chunk_rows: int
    window_chunks: int = WINDOW_CHUNKS

    @property
    def num_windows(self) -> int:
        """Windows per epoch."""
        return math.ceil(math.ceil(self.num_rows / self.chunk_rows) / self.window_chunks)

    def rows(self, nimg: int, batch_size: int) -> NDArray[np.int64]:
        """Row numbers of the training step that starts at `nimg` images seen: int64 [batch_size]."""
        rows, done = np.empty(batch_size, dtype=np.int64), 0
        while done < batch_size:
            window = self.window_at(nimg + done)
            first = nimg + done - window.start_nimg
            part = window.rows[first : first + batch_size - done]
            rows[done : done + len(part)] = part
            done += len(part)
        return rows

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """The windows of one epoch, in order."""
        return _windows(self, epoch)

    def window(self, number: int) -> Window:
        """A window by its number among those of all epochs."""
        return self.windows(number // self.num_windows)[number % self.num_windows]

    def window_at(self, nimg: int) -> Window:
        """The window that the row after `nimg` images seen lies in."""
        windows = self.windows(nimg // self.num_rows)
        return windows[bisect_right(windows, nimg, key=lambda window: window.start_nimg) - 1]


@dataclass(frozen=True)
class Window:
    """Rows that follow each other in the order, from a few chunks of the table.

    Attributes:
        order: what it is a part of.
        number: place among the windows of all epochs.
        start_nimg: images seen before its first row.
        chunks: the rows it consists of as [start, stop), in the order of the table.
    """

    order: TrainingOrder
    number: int
    start_nimg: int
    chunks: tuple[range, ...]

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def stop_nimg(self) -> int:
        """Images seen after its last row."""
        return self.start_nimg + len(self)

    @property
    def rows(self) -> NDArray[Any]:
        """Its row numbers in the order of the visits: int32 or int64 [len], not to be written to."""
        return _window_rows(self.order, self.number)


@lru_cache(maxsize=2)
def _windows(order: TrainingOrder, epoch: int) -> tuple[Window, ...]:
    num_chunks = math.ceil(order.num_rows / order.chunk_rows)
    groups = np.array_split(_generator(order, epoch, 0, 1).permutation(num_chunks), order.num_windows)
    windows, start_nimg = [], epoch * order.num_rows
    for number, group in enumerate(groups, epoch * order.num_windows):
        starts = (np.sort(group) * order.chunk_rows).tolist()
        chunks = tuple(range(start, min(start + order.chunk_rows, order.num_rows)) for start in starts)
        windows.append(Window(order, number, start_nimg, chunks))
        start_nimg = windows[-1].stop_nimg
    return tuple(windows)


@lru_cache(maxsize=2)  # a batch may cross from one to the next
def _window_rows(order: TrainingOrder, number: int) -> NDArray[Any]:
    dtype = np.int32 if order.num_rows < 2**31 else np.int64  # of small images the row numbers are no small part
    rows = np.concatenate([np.arange(chunk.start, chunk.stop, dtype=dtype) for chunk in order.window(number).chunks])
    epoch, index = divmod(number, order.num_windows)
    _generator(order, epoch, index, 0).shuffle(rows)
    rows.flags.writeable = False
    return rows


def _generator(order: TrainingOrder, epoch: int, window: int, stream: int) -> np.random.Generator:
    """A stream of its own for each epoch and window: far apart on the counter of one key."""
    return np.random.Generator(np.random.Philox(key=[order.seed, epoch], counter=[0, 0, stream, window]))


@dataclass(frozen=True)
class Share:
    """What one worker sees of the order: its slice of every global batch.

    Args:
        order: order of the whole set.
        batch_size: global batch.
        rank, world_size: which worker of how many.
    """

    order: TrainingOrder
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def positions(self, nimg: int) -> range:
        """Places in the order that the worker's slice of the step at `nimg` images seen takes."""
        share = share_of(self.batch_size, self.rank, self.world_size)
        return range(nimg + share.start, nimg + share.stop)

    def rows(self, nimg: int) -> NDArray[np.int64]:
        """Row numbers of the worker's slice: int64 [size of the slice]."""
        positions = self.positions(nimg)
        return self.order.rows(positions.start, len(positions))


def share_of(batch_size: int, rank: int, world_size: int) -> range:
    """Places in the global batch that a worker computes; shares differ by one image where the batch does not divide."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class Rows(NamedTuple):
    """Some rows of a training set.

    Attributes:
        ids: int64 [N].
        images: uint8 [N, C, H, W], or float16 latents.
        labels: class of each image [N], or None for a set without classes.
        weights: weight of each image in the loss, float32 [N], or None for equal ones.
    """

    ids: NDArray[np.int64]
    images: NDArray[Any]
    labels: NDArray[Any] | None = None
    weights: NDArray[np.float32] | None = None

    def take(self, rows: slice | NDArray[np.int64]) -> Rows:
        """Some of the rows; a view for a slice, else a copy."""
        return Rows(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]

    def divided(self, mean_weight: float) -> Rows:
        """The rows with their weights relative to the mean."""
        return self if self.weights is None else self._replace(weights=self.weights / np.float32(mean_weight))


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several parts in one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return Rows(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


class TrainingData(Protocol):
    """Where a worker's batches come from."""

    def batch(self, nimg: int) -> Rows:
        """The worker's slice of the step at `nimg` images seen; weights are relative to their mean over the set."""
        ...


def mean_weight(parts: Iterable[NDArray[np.float32]]) -> float:
    """Mean of the weights of a whole set, exact but for the last rounding, so that it does not depend on the parts."""
    count = 0

    def values() -> Iterator[float]:
        nonlocal count
        for part in parts:
            count += len(part)
            for start in range(0, len(part), SUMMED_ROWS):
                yield from part[start : start + SUMMED_ROWS].tolist()

    return math.fsum(values()) / count


class InMemory:
    """A worker's share of a set whose rows are at hand.

    Args:
        blocks: the whole set in the order of the table, in one block or several, which nothing is written to.
        share: what the worker sees.
    """

    def __init__(self, blocks: Sequence[Rows], share: Share) -> None:
        self._blocks, self._share = blocks, share
        self._starts = np.cumsum([0, *(len(block.ids) for block in blocks[:-1])])
        weights = [block.weights for block in blocks if block.weights is not None]
        self._mean_weight = mean_weight(weights) if weights else 1.0

    def batch(self, nimg: int) -> Rows:
        """The worker's slice of the step at `nimg` images seen; weights are relative to their mean over the set."""
        rows = self._share.rows(nimg)
        block = np.searchsorted(self._starts, rows, side="right") - 1
        by_block = np.argsort(block, kind="stable")
        numbers, firsts = np.unique(block[by_block], return_index=True)
        parts = [
            self._blocks[number].take(of_block - self._starts[number])
            for number, of_block in zip(numbers, np.split(rows[by_block], firsts[1:]), strict=True)
        ]
        batch = parts[0] if len(parts) == 1 else joined(parts).take(np.argsort(by_block))
        return batch.divided(self._mean_weight)
