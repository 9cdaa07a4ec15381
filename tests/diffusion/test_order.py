"""The order of training: a pure function of the seed and of the images seen, that can be read in windows."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.diffusion.order import InMemory, Rows, Share, TrainingOrder, mean_weight

ONE_WINDOW = TrainingOrder(3, 100, 7)  # 15 chunks, the last of two rows
MANY_WINDOWS = TrainingOrder(3, 100, 7, 4)
ORDERS = {"one window": ONE_WINDOW, "many windows": MANY_WINDOWS, "one row": TrainingOrder(3, 1, 7)}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))


def visits(order: TrainingOrder, epochs: int) -> NDArray[np.int64]:
    """Rows in the order of their visits: [epochs, rows]."""
    return order.rows(0, epochs * order.num_rows).reshape(epochs, -1)


def rows_of(n: int, labelled: bool = True, weighted: bool = True) -> Rows:
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1).repeat(4, axis=-1)
    weights = np.linspace(0.5, 2, n, dtype=np.float32) if weighted else None
    return Rows(1000 + np.arange(n), images, np.arange(n) % 10 if labelled else None, weights)


def cut(rows: Rows, at: Sequence[int]) -> list[Rows]:
    bounds = [0, *at, len(rows.ids)]
    return [rows.take(slice(*pair)) for pair in itertools.pairwise(bounds)]


@every_order
def test_every_row_is_visited_once_per_epoch_and_epochs_differ(order: TrainingOrder) -> None:
    epochs = visits(order, 5)
    assert (np.sort(epochs, axis=1) == np.arange(order.num_rows)).all()
    assert len({tuple(epoch) for epoch in epochs}) == (5 if order.num_rows > 1 else 1)


@every_order
@pytest.mark.parametrize("batch_size", [1, 3, 24, 99, 100, 250])
def test_steps_of_any_size_one_after_another_are_one_sequence(order: TrainingOrder, batch_size: int) -> None:
    start_nimg = 57
    whole = order.rows(start_nimg, 500)
    steps = [order.rows(start_nimg + done, batch_size) for done in range(0, 500, batch_size)]
    assert (np.concatenate(steps)[:500] == whole).all()
    assert whole.dtype == np.int64


@pytest.mark.parametrize("num_rows", [1, 2, 10, 1797, 100_003])
@pytest.mark.parametrize("chunk_rows", [1024, 10**6])
def test_a_table_of_one_window_is_permuted_uniformly_by_philox_of_seed_and_epoch(
    num_rows: int, chunk_rows: int
) -> None:
    order = TrainingOrder(5, num_rows, chunk_rows)
    for epoch in (0, 1, 7):
        expected = np.random.Generator(np.random.Philox(key=[5, epoch])).permutation(num_rows)
        assert (order.rows(epoch * num_rows, num_rows) == expected).all()


def test_the_order_depends_on_the_seed_the_chunks_and_the_windows() -> None:
    others = [replace(MANY_WINDOWS, **change) for change in ({"seed": 4}, {"chunk_rows": 8}, {"window_chunks": 5})]
    orders = [tuple(order.rows(0, 100)) for order in (MANY_WINDOWS, ONE_WINDOW, *others)]
    assert len(set(orders)) == len(orders)


@every_order
def test_the_windows_of_an_epoch_are_its_visits_and_whole_chunks(order: TrainingOrder) -> None:
    for epoch in (0, 3):
        windows = order.windows(epoch)
        assert len(windows) == order.num_windows
        assert (np.concatenate([window.rows for window in windows]) == visits(order, 4)[epoch]).all()
        seen_nimg = epoch * order.num_rows
        for window in windows:
            assert window.start_nimg == seen_nimg
            seen_nimg = window.stop_nimg
            assert [row for chunk in window.chunks for row in chunk] == sorted(window.rows)
            assert 1 <= len(window.chunks) <= order.window_chunks
            for chunk in window.chunks:
                assert chunk.start % order.chunk_rows == 0
                assert chunk.stop == min(chunk.start + order.chunk_rows, order.num_rows)
        assert seen_nimg == (epoch + 1) * order.num_rows


def test_windows_are_of_about_one_size() -> None:
    sizes = [len(window.chunks) for window in TrainingOrder(0, 129, 1, 64).windows(0)]
    assert sizes == [43, 43, 43]


@every_order
def test_a_window_is_found_by_its_number_and_by_any_of_its_positions(order: TrainingOrder) -> None:
    windows = [window for epoch in range(3) for window in order.windows(epoch)]
    assert [window.number for window in windows] == list(range(3 * order.num_windows))
    for window in windows:
        assert order.window(window.number) == window
        assert all(order.window_at(nimg) == window for nimg in range(window.start_nimg, window.stop_nimg))


def test_rows_and_chunks_are_mixed_evenly() -> None:
    order = TrainingOrder(0, 16, 2, 4)  # 2 windows of 4 chunks
    epochs = visits(order, 2000)
    first = np.bincount(epochs[:, 0], minlength=16) / 2000
    assert np.abs(first - 1 / 16).max() < 0.025  # five standard deviations
    together = (epochs[:, :8] < 2).sum(1) == 2  # rows of a chunk are in one window
    assert abs(together.mean() - 0.5) < 0.06
    assert ((epochs[:, :8] < 2).sum(1) != 1).all()
    neighbours = ((epochs[:, :8] < 4).sum(1) == 4).mean()  # but two chunks are so by chance alone
    assert abs(neighbours - 3 / 14) < 0.05


def test_windows_and_epochs_are_shuffled_independently() -> None:
    order = TrainingOrder(0, 400, 1, 100)
    ranks = {tuple(np.argsort(window.rows)) for epoch in range(3) for window in order.windows(epoch)}
    assert len(ranks) == 12


@every_order
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_slices_of_all_workers_are_the_order(order: TrainingOrder, world_size: int) -> None:
    slices = [Share(order, 16, rank, world_size).rows(nimg) for nimg in range(0, 320, 16) for rank in range(world_size)]
    assert (np.concatenate(slices) == order.rows(0, 320)).all()
    assert {len(part) for part in slices} == {16 // world_size}


@pytest.mark.parametrize("cuts", [[], [50], [1, 2, 60, 99]])
@pytest.mark.parametrize("rank", [0, 1])
def test_batches_in_memory_are_the_rows_of_the_order_however_they_are_cut_into_blocks(
    cuts: list[int], rank: int
) -> None:
    rows, share = rows_of(100), Share(MANY_WINDOWS, 16, rank, 2)
    data = InMemory(cut(rows, cuts), share)
    for nimg in range(0, 320, 16):
        batch, expected = data.batch(nimg), rows.take(share.rows(nimg))
        assert (batch.ids == expected.ids).all() and (batch.images == expected.images).all()
        assert batch.labels is not None and (batch.labels == expected.labels).all()
        assert batch.weights is not None and expected.weights is not None and rows.weights is not None
        assert (batch.weights == expected.weights / np.float32(rows.weights.astype(np.float64).mean())).all()
        assert all(column is not None and column.flags.writeable for column in batch)  # a copy, not the set itself


@pytest.mark.parametrize("cuts", [[], [50]])
def test_a_set_without_labels_and_weights_has_batches_without(cuts: list[int]) -> None:
    batch = InMemory(cut(rows_of(100, False, False), cuts), Share(ONE_WINDOW, 16)).batch(0)
    assert batch.labels is None and batch.weights is None


def test_the_mean_weight_does_not_depend_on_how_the_set_is_cut() -> None:
    weights = np.random.default_rng(0).lognormal(0, 8, 200_001).astype(np.float32)
    whole = mean_weight([weights])
    assert whole == pytest.approx(float(weights.astype(np.float64).mean()), rel=1e-12)
    for parts in (2, 3, 1000):
        assert mean_weight(np.array_split(weights, parts)) == whole
    assert mean_weight([np.array([2**54, 2, 2, 2], np.float32)]) == (2**54 + 6) / 4  # no rounding on the way
