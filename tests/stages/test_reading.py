"""Reading for training: the same batches in the same order from memory and from a stream, and little memory."""

from __future__ import annotations

import gc
import itertools
import logging
import queue
import re
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from sims_ray.config import ComputeSettings
from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.diffusion.order import Rows, Share, TrainingOrder, joined
from sims_ray.errors import SimsError
from sims_ray.stages import reading, streaming
from sims_ray.stages.reading import Resident, choose_reading, open_source
from sims_ray.stages.streaming import Feed, Streaming
from sims_ray.stages.training_set import TrainingSet, from_arrow, to_arrow
from sims_ray.storage.artifacts import Artifact

ALONE = ComputeSettings(num_workers=0)
SIZES = (130, 1, 250)  # rows of the files
N, BATCH, SEED = 370, 32, 5  # the last rows of the table are left out
STOP_NIMG = 30 * BATCH  # in the third epoch
POSITIONS = range(STOP_NIMG)


def made(folder: Path, sizes: Sequence[int] = SIZES, shape: tuple[int, int, int] = (3, 4, 4), **facts: Any) -> Path:
    """A table whose ids are no row numbers, with labels from 0 and the weights that are given for each file."""
    random = np.random.default_rng(0)
    kind, weights = facts.get("kind", "image"), facts.get("weights", [None] * len(sizes))
    first, labels = 0, np.empty(0, np.int32)
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        images = random.integers(0, facts.get("brightest", 255) + 1, (size, *shape), dtype=np.uint8)
        of_file = np.arange(first, first + size, dtype=np.int32) % 10 + facts.get("lowest_label", 0)
        values = None if weight is None else np.full(size, weight, np.float32) + np.arange(size, dtype=np.float32)
        pixels = images if kind == "image" else (images / np.float16(64)).astype(np.float16)
        write_samples(folder / f"part-{i}.parquet", Samples(ids_of(first, size), pixels, of_file, values), {})
        first, labels = first + size, np.concatenate([labels, of_file])
    files = {f"part-{i}.parquet": {"rows": size} for i, size in enumerate(sizes)}
    Artifact(folder, "import", {}, ()).commit(files, table_result(shape, labels, first, kind))
    return folder


def ids_of(first: int, size: int) -> NDArray[np.int64]:
    return 10_000 + 3 * np.arange(first, first + size)


def windowed(folder: Path, label_dim: int = 10, chunk_rows: int = 17, window_chunks: int = 4) -> TrainingSet:
    """The first rows of a table, in windows of 60 or so."""
    found = TrainingSet.of(folder, N, SEED, label_dim)
    return replace(found, order=replace(found.order, chunk_rows=chunk_rows, window_chunks=window_chunks))


@pytest.fixture
def training_set(tmp_path: Path) -> TrainingSet:
    return windowed(made(tmp_path / "table"))


def same(actual: Rows, expected: Rows) -> bool:
    return all(
        (a is None) == (e is None) and (a is None or (a.dtype == e.dtype and np.array_equal(a, e)))
        for a, e in zip(actual, expected, strict=True)
    )


def batches(source: Any, share: Share, start_nimg: int = 0, stop_nimg: int = STOP_NIMG) -> Rows:
    """What one worker sees, in one piece."""
    data = source.open(share)
    return joined([data.batch(nimg) for nimg in range(start_nimg, stop_nimg, share.batch_size)])


def interleaved(shares: Sequence[NDArray[Any]], per_worker: int) -> NDArray[Any]:
    """The global batches, out of what each worker has seen."""
    return np.stack([share.reshape(-1, per_worker) for share in shares], axis=1).reshape(-1)


def expected_ids(training_set: TrainingSet, start_nimg: int = 0, stop_nimg: int = STOP_NIMG) -> NDArray[np.int64]:
    return ids_of(0, N)[training_set.order.rows(start_nimg, stop_nimg - start_nimg)]


# --- what a set is


@pytest.mark.parametrize("kind", ["image", "latent"])
@pytest.mark.parametrize("weights", [[None] * 3, [0.5, 1.5, 2.5], [None, None, 3.0]])
def test_a_window_is_the_rows_of_the_table_in_the_order_of_training(
    tmp_path: Path, kind: str, weights: list[float | None]
) -> None:
    found = windowed(made(tmp_path / "table", kind=kind, weights=weights))
    samples = found.table.head(N)
    whole = found.between(0, N)
    assert same(whole, Rows(samples.ids, samples.images, samples.labels, samples.weights))
    assert whole.images.dtype == (np.uint8 if kind == "image" else np.float16)
    assert found.order.num_windows == 6
    for window in (*found.order.windows(0), *found.order.windows(1)):
        assert same(found.window(window.number), whole.take(window.rows))


def test_arrow_and_back_is_exact_and_no_copy(training_set: TrainingSet) -> None:
    rows = training_set.between(0, 100)
    table = to_arrow(rows)
    assert isinstance(table.schema.field("image").type, pa.FixedShapeTensorType)
    back = from_arrow(table.slice(10, 50))
    assert same(back, rows.take(slice(10, 60)))
    assert np.shares_memory(back.images, rows.images)
    assert same(from_arrow(pa.concat_tables([table.slice(0, 40), table.slice(40)])), rows)


@pytest.mark.parametrize("weights", [[None] * 3, [0.5, 1.5, 2.5], [None, None, 3.0]])
def test_the_mean_weight_is_that_of_the_rows_in_use(tmp_path: Path, weights: list[float | None]) -> None:
    found = windowed(made(tmp_path / "table", weights=weights))
    values = found.table.head(N).weights
    if values is None:
        assert found.mean_weight is None
    else:
        assert found.mean_weight == pytest.approx(float(values.astype(np.float64).mean()), rel=1e-12)


def test_weights_that_are_all_0_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "table", (1,), weights=[0.0])
    with pytest.raises(SimsError, match=r"the weights of .*table have the mean 0; give weights above 0"):
        TrainingSet.of(folder, None, SEED, 0)


def test_labels_are_those_of_the_rows_in_use_and_checked_if_the_network_is_told_them(tmp_path: Path) -> None:
    folder = made(tmp_path / "table", (10, 5))
    for n, label_dim in ((None, 10), (7, 7), (None, 0)):
        assert TrainingSet.of(folder, n, SEED, label_dim).labelled == (label_dim > 0)
    with pytest.raises(SimsError, match=r"table has labels 0\.\.7 but the network knows 0\.\.6; import"):
        TrainingSet.of(folder, 8, SEED, 7)
    unlabelled = made(tmp_path / "unlabelled", (10,), lowest_label=-1)
    assert not TrainingSet.of(unlabelled, None, SEED, 0).labelled
    with pytest.raises(SimsError, match=r"unlabelled has labels -1\.\.8 but the network knows 0\.\.9; import"):
        TrainingSet.of(unlabelled, None, SEED, 10)


def test_labels_that_the_manifest_vouches_for_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "table", (10,))
    monkeypatch.setattr("sims_ray.stages.training_set._column", None)
    TrainingSet.of(folder, None, SEED, 10)
    with pytest.raises(TypeError):
        TrainingSet.of(folder, None, SEED, 9)


@pytest.mark.parametrize("n", [0, 16])
def test_more_rows_than_there_are_and_none_at_all_are_refused(tmp_path: Path, n: int) -> None:
    folder = made(tmp_path / "table", (10, 5))
    with pytest.raises(SimsError, match=f"table has 15 rows, {n} were asked for"):
        TrainingSet.of(folder, n, SEED, 0)


def test_chunks_are_row_groups(tmp_path: Path) -> None:
    found = TrainingSet.of(made(tmp_path / "table", (3,), (3, 64, 64)), None, SEED, 0)
    assert (found.order.chunk_rows, found.order.window_chunks) == (341, 128)


# --- which way


@pytest.mark.parametrize(
    ("asked", "nbytes", "mode"),
    [
        ("auto", 5_000_000_000, "resident"),
        ("auto", 5_000_000_001, "streaming"),
        ("resident", 8_000_000_000, "resident"),
        ("streaming", 1, "streaming"),
    ],
)
def test_a_set_is_resident_if_it_fills_at_most_half_of_the_memory_or_is_to_be(
    asked: str, nbytes: int, mode: str
) -> None:
    assert choose_reading(asked, nbytes, 10_000_000_000, "{}") == mode


def test_the_choice_is_said_in_one_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sims_ray")
    choose_reading("auto", 1_200_000_000, 7_200_000_000, "the object store of a node holds {}")
    choose_reading("streaming", 300_000, 7_200_000_000, "{} of memory are free")
    assert caplog.messages == [
        "reading: resident (1.2 GB of images, the object store of a node holds 7.2 GB)",
        "reading: streaming (0.3 MB of images, 7.2 GB of memory are free; data.reading=streaming)",
    ]


def test_a_set_that_is_to_be_resident_and_does_not_fit_is_refused(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_free_bytes", lambda: training_set.nbytes)
    with (
        pytest.raises(SimsError, match=r"^data\.reading=resident does not go: 0\.0 MB of images, .*; set"),
        open_source(training_set, "resident", POSITIONS, ALONE),
    ):
        pass


# --- in this process


@pytest.mark.parametrize("mode", ["resident", "streaming"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_slices_of_all_workers_are_the_order_and_go_on_in_mid_epoch(
    training_set: TrainingSet, mode: str, world_size: int
) -> None:
    with open_source(training_set, mode, POSITIONS, ALONE) as source:
        assert isinstance(source, Resident if mode == "resident" else Streaming)
        for start_nimg in (0, 5 * BATCH):
            seen = [
                batches(source, Share(training_set.order, BATCH, rank, world_size), start_nimg).ids
                for rank in range(world_size)
            ]
            together = interleaved(seen, BATCH // world_size)
            assert (together == expected_ids(training_set, start_nimg)).all()
    assert (np.sort(expected_ids(training_set)[:N]) == ids_of(0, N)).all()


@pytest.mark.parametrize("kind", ["image", "latent"])
@pytest.mark.parametrize("label_dim", [0, 10])
def test_streamed_batches_are_resident_batches_bit_for_bit(tmp_path: Path, kind: str, label_dim: int) -> None:
    found = windowed(made(tmp_path / "table", kind=kind, weights=[0.5, 1.5, 2.5]), label_dim)
    share = Share(found.order, BATCH)
    resident, streamed = batches(Resident(found), share), batches(Streaming(found, STOP_NIMG), share)
    assert same(streamed, resident)
    assert (resident.labels is None) == (label_dim == 0)
    assert resident.weights is not None
    assert resident.weights.astype(np.float64)[:N].mean() == pytest.approx(1, rel=1e-5)


@pytest.fixture
def windows_read(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """Numbers of the windows that are read."""
    numbers: queue.Queue[int] = queue.Queue()
    window = TrainingSet.window

    def noted(self: TrainingSet, number: int) -> Rows:
        numbers.put(number)
        return window(self, number)

    monkeypatch.setattr(TrainingSet, "window", noted)
    return numbers


def test_streaming_reads_each_window_once_one_ahead_and_none_after_the_end(
    training_set: TrainingSet, windows_read: queue.Queue[int]
) -> None:
    data = Streaming(training_set, STOP_NIMG).open(Share(training_set.order, BATCH))
    last, read = training_set.order.window_at(STOP_NIMG - 1).number, -1
    for nimg in range(0, STOP_NIMG, BATCH):
        data.batch(nimg)
        needed = min(training_set.order.window_at(nimg + BATCH - 1).number + 1, last)
        while read < needed:
            assert windows_read.get(timeout=60) == read + 1
            read += 1
        assert windows_read.empty()
    data._thread.shutdown()
    assert read == last and windows_read.empty()


def test_streaming_a_set_far_larger_than_its_window_keeps_memory_flat(tmp_path: Path) -> None:
    n = 341 * 12  # row groups
    found = TrainingSet.of(made(tmp_path / "table", (n // 4,) * 4, (3, 64, 64), brightest=1), None, SEED, 0)
    found = replace(found, order=replace(found.order, window_chunks=1))
    assert found.order.num_windows == 12
    data = Streaming(found, n).open(Share(found.order, BATCH))
    data.batch(0)
    gc.collect()
    tracemalloc.start()
    in_arrow = pa.total_allocated_bytes()
    for nimg in range(BATCH, n, BATCH):
        data.batch(nimg)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < found.nbytes / 4  # of numpy, which the windows lie in
    assert pa.total_allocated_bytes() - in_arrow < found.nbytes / 4


def test_what_cannot_be_read_ends_in_one_sentence(training_set: TrainingSet) -> None:
    assert training_set.table.folder.local is not None
    (training_set.table.folder.local / "part-2.parquet").write_bytes(b"torn")
    for mode in ("resident", "streaming"):
        with (
            pytest.raises(SimsError, match=r"part-2\.parquet is not a file of a sample table"),
            open_source(training_set, mode, POSITIONS, ALONE) as source,
        ):
            batches(source, Share(training_set.order, BATCH))
    with pytest.raises(SimsError, match=r"part-2\.parquet cannot be read"):
        TrainingSet.of(training_set.table.folder.location, N, SEED, 0)


# --- the actor that reads for all workers


class Read:
    """The blocks that a feed takes from its pipeline, each of 20 rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []
        self.taken = 0
        monkeypatch.setattr(streaming, "_pipeline", self._pipeline)

    def _pipeline(self, training_set: TrainingSet, windows: range) -> Iterator[tuple[int, Any]]:
        self.started.append(windows.start)
        for number in windows:
            window = training_set.window(number)
            for first in range(0, len(window.ids), 20):
                part = window.take(slice(first, first + 20))
                self.taken += 1
                yield len(part.ids), part.ids


def asked(feed: Feed, rank: int, position: int, world_size: int) -> int:
    """The id at a position."""
    start_nimg, (ids,) = feed.block(rank, position, world_size)
    return int(ids[position - start_nimg])


def test_a_feed_reads_once_for_all_workers_and_lets_go_what_all_have_passed(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ids = Read(monkeypatch), expected_ids(training_set)
    feed = Feed(training_set, STOP_NIMG)
    assert [asked(feed, 0, position, 3) for position in (0, 45)] == [ids[0], ids[45]]  # the first goes ahead
    assert asked(feed, 1, 0, 3) == ids[0]
    for position, rank in itertools.product(range(0, STOP_NIMG - 40, 10), range(3)):
        assert asked(feed, rank, position + 12 * rank, 3) == ids[position + 12 * rank]
        assert len(feed._held) <= 4
    assert read.started == [0]
    assert read.taken == pytest.approx(STOP_NIMG / 20, rel=0.2)  # blocks at the end of a window are smaller


def test_a_feed_lets_go_what_all_have_passed_when_workers_come_and_go(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ids = Read(monkeypatch), expected_ids(training_set)
    feed, third = Feed(training_set, STOP_NIMG), STOP_NIMG // 30 * 10
    for world_size, start in ((1, 0), (3, third), (2, 2 * third)):
        for position, rank in itertools.product(range(start, start + third - 20, 10), range(world_size)):
            assert asked(feed, rank, position, world_size) == ids[position]
            assert len(feed._held) <= 4
    assert read.started == [0]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_feed_begins_again_where_workers_ask_that_have_gone_back(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    read, ids = Read(monkeypatch), expected_ids(training_set)
    feed = Feed(training_set, STOP_NIMG)
    for position, rank in itertools.product(range(200, 400, 10), (ahead, 1 - ahead)):
        assert asked(feed, rank, position, 2) == ids[position]
    assert [asked(feed, 0, position, 2) for position in (100, 145)] == [ids[100], ids[145]]  # the first goes ahead
    assert asked(feed, 1, 100, 2) == ids[100]
    for position, rank in itertools.product(range(150, 500, 10), (0, 1)):
        assert asked(feed, rank, position, 2) == ids[position]
    order = training_set.order
    assert read.started == [order.window_at(200).number, order.window_at(100).number]


def test_a_feed_whose_reading_failed_reads_on_when_it_is_asked_again(
    training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ids = Read(monkeypatch), expected_ids(training_set)
    feed, window = Feed(training_set, STOP_NIMG), TrainingSet.window

    def fails(self: TrainingSet, number: int) -> Rows:
        raise OSError("gone")

    assert asked(feed, 0, 0, 1) == ids[0]
    monkeypatch.setattr(TrainingSet, "window", fails)
    with pytest.raises(OSError, match="gone"):
        asked(feed, 0, 100, 1)
    monkeypatch.setattr(TrainingSet, "window", window)
    assert [asked(feed, 0, position, 1) for position in (100, 300)] == [ids[100], ids[300]]
    assert len(read.started) == 2


# --- with Ray


@pytest.fixture
def workers(ray_cluster: ComputeSettings) -> ComputeSettings:
    """The settings of a cluster whose workers can run what is in this module."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return ray_cluster


def in_ray(source: Any, share: Share, start_nimg: int = 0, stop_nimg: int = STOP_NIMG) -> Any:
    """What one worker sees, from a process of its own."""
    import ray

    return ray.remote(num_cpus=0)(batches).remote(source, share, start_nimg, stop_nimg)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_workers_in_ray_see_the_batches_of_one_process_and_go_on_in_mid_epoch(
    tmp_path: Path, workers: ComputeSettings, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    import ray

    monkeypatch.setattr(reading, "BLOCK_BYTES", 8000)  # several
    found = windowed(made(tmp_path / "table", weights=[0.5, 1.5, 2.5]))
    whole = batches(Resident(found), Share(found.order, BATCH))
    with open_source(found, mode, POSITIONS, workers) as source:
        if isinstance(source, Resident):
            assert len(source.blocks) == 3
        for world_size, start_nimg in ((2, 0), (1, 7 * BATCH), (4, 2 * BATCH)):
            shares = [Share(found.order, BATCH, rank, world_size) for rank in range(world_size)]
            seen = ray.get([in_ray(source, share, start_nimg) for share in shares])
            for share, rows in zip(shares, seen, strict=True):
                at = [share.positions(nimg) for nimg in range(start_nimg, STOP_NIMG, BATCH)]
                assert same(rows, whole.take(np.concatenate(at)))


def test_a_set_that_cannot_be_read_ends_in_one_sentence_in_ray_too(
    training_set: TrainingSet, workers: ComputeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    assert training_set.table.folder.local is not None
    (training_set.table.folder.local / "part-2.parquet").write_bytes(b"torn")
    sentence = r"part-2\.parquet is not a file of a sample table"
    with pytest.raises(SimsError, match=sentence), open_source(training_set, "resident", POSITIONS, workers):
        pass
    with open_source(training_set, "streaming", POSITIONS, workers) as source:
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(in_ray(source, Share(training_set.order, BATCH)))
        assert isinstance(raised.value.cause, SimsError)
        assert re.search(sentence, str(raised.value.cause)) and "\n" not in str(raised.value.cause)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_streaming_outlives_the_actor_that_reads_and_the_actor_does_not_outlive_training(
    training_set: TrainingSet, workers: ComputeSettings
) -> None:
    import ray

    with open_source(training_set, "streaming", POSITIONS, workers) as source:
        assert isinstance(source, Streaming)
        data, seen = source.open(Share(training_set.order, BATCH)), []
        for nimg in range(0, STOP_NIMG, BATCH):
            if nimg == 10 * BATCH:
                ray.kill(source.feed, no_restart=False)
            seen.append(data.batch(nimg).ids)
    assert (np.concatenate(seen) == expected_ids(training_set)).all()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(source.feed.block.remote(0, 0, 1))


def test_no_more_than_a_few_windows_are_read_ahead(tmp_path: Path, workers: ComputeSettings) -> None:
    rows, folder = 2000, tmp_path / "log"
    n = 24 * rows
    table = SampleTable(made(tmp_path / "table", (n // 4,) * 4, (3, 8, 8)))
    folder.mkdir()
    found = Noting(table, TrainingOrder(SEED, n, rows, 1), log=folder)
    with open_source(found, "streaming", range(n), workers.model_copy(update={"num_workers": 1})) as source:
        data = source.open(Share(found.order, rows))
        for nimg in range(0, n, rows):
            data.batch(nimg)
            read = settled(folder) if nimg == rows else len(list(folder.iterdir()))
            assert read - found.order.window_at(nimg).number <= 7  # of 24
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(24))


def settled(folder: Path) -> int:
    """The number of files in a folder, once it has not changed for 3 seconds."""
    number, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 3:
        if (now := len(list(folder.iterdir()))) != number:
            number, since_s = now, time.monotonic()
    return number


@dataclass(frozen=True)
class Noting(TrainingSet):
    """A set that leaves a note of every window that is read, and fails on a second time."""

    log: Path = Path()

    def window(self, number: int) -> Rows:
        (self.log / str(number)).touch(exist_ok=False)
        return super().window(number)


def test_a_second_worker_of_a_node_shares_the_memory_of_the_resident_set(
    tmp_path: Path, workers: ComputeSettings
) -> None:
    import ray

    n = 341 * 16
    found = TrainingSet.of(made(tmp_path / "table", (n,), (3, 64, 64), brightest=1), None, SEED, 0)
    with open_source(found, "auto", range(n), workers) as source:
        assert isinstance(source, Resident)
        reader = ray.remote(num_cpus=0)(Reader)
        readers = [reader.remote(source, Share(found.order, 341, rank, 2)) for rank in range(2)]
        ray.get([reader.own_bytes.remote() for reader in readers])
        own = [ray.get(reader.own_bytes_after_an_epoch.remote()) for reader in readers]
    assert max(own) < 0.1 * found.nbytes


class Reader:
    """A worker that says how much memory it has for itself."""

    def __init__(self, source: Any, share: Share) -> None:
        self.source, self.share = source, share

    def own_bytes(self) -> int:
        """Bytes that no file and no other process holds."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))

    def own_bytes_after_an_epoch(self) -> int:
        """What reading the whole set has added to them."""
        from_arrow(to_arrow(self.source.training_set.between(0, 1)))  # loads what conversions need
        before, data = self.own_bytes(), self.source.open(self.share)
        for nimg in range(0, 2 * self.share.order.num_rows, self.share.batch_size):
            data.batch(nimg)
        return self.own_bytes() - before
