"""The set of images that a model and its settings make: what counts as made, what is missing, what is torn."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.data.samples import Samples, encode_samples
from sims_ray.data.synthetic import SyntheticSet, shard_facts, shard_name
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.folders import Folder

SHAPE = (1, 2, 2)


def a_set(folder: Path, first_seed: int = 0, **settings: Any) -> SyntheticSet:
    return SyntheticSet(Folder.at(folder), {"first_seed": first_seed, **settings}, ("model",), SHAPE)


def rows(seeds: range) -> Samples:
    ids = np.arange(seeds.start, seeds.stop)
    images = np.random.default_rng(seeds.start).integers(0, 256, (len(ids), *SHAPE), dtype=np.uint8)
    return Samples(ids, images, (ids % 3).astype(np.int32))


def put(target: SyntheticSet, *ranges: range) -> dict[str, dict[str, Any]]:
    """Make files as workers do; returns their facts."""
    facts = {}
    for seeds in ranges:
        samples = rows(seeds)
        data = encode_samples(samples, {"fingerprint": target.fingerprint})
        target.folder.put(shard_name(seeds), data)
        facts[shard_name(seeds)] = shard_facts(samples, data)
    return facts


def ranges(stop: int, step: int, start: int = 0) -> list[range]:
    return [range(i, min(i + step, stop)) for i in range(start, stop, step)]


def test_the_number_of_images_is_not_part_of_what_a_set_is_and_everything_else_is(tmp_path: Path) -> None:
    plain = a_set(tmp_path)
    put(plain, *ranges(10, 5))
    before = plain.fingerprint
    plain.commit(plain.survey().kept)
    assert plain.fingerprint == before == a_set(tmp_path / "elsewhere").fingerprint
    others = [a_set(tmp_path, 1), a_set(tmp_path, sampler={"num_steps": 3})]
    assert len({other.fingerprint for other in others} | {before}) == 3


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize(("n", "step"), [(1, 5), (10, 5), (12, 5), (5, 8)])
def test_an_empty_folder_misses_every_seed_once_in_pieces_that_end_at_multiples(
    tmp_path: Path, first: int, n: int, step: int
) -> None:
    missing = a_set(tmp_path, first).missing([], n, step)
    assert [seed for piece in missing for seed in piece] == list(range(first, first + n))
    assert all((piece.stop - first) % step == 0 for piece in missing[:-1])


def test_files_and_gaps_together_hold_every_seed_once_whatever_was_made_with_other_sizes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    target = a_set(tmp_path, 3)
    for _ in range(200):
        edges = np.unique(random.integers(3, 80, 6))
        kept = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
        n, step = int(random.integers(1, 100)), int(random.integers(1, 20))
        missing = target.missing(map(shard_name, kept), n, step)
        covered = sorted(seed for piece in [*kept, *missing] for seed in piece)
        assert len(covered) == len(set(covered)) and set(covered) >= set(range(3, 3 + n))
        assert all(len(piece) <= step for piece in missing) and all(len(piece) for piece in missing)


def test_an_extended_set_keeps_its_files_and_begins_with_the_smaller_one(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    target.commit(put(target, *target.missing([], 12, 5)))
    small = SampleTable(tmp_path).head(12)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("*.parquet")}
    assert target.complete(12) and not target.complete(13)
    kept = target.survey().kept
    more = target.missing(kept, 23, 5)
    assert [seed for piece in more for seed in piece] == list(range(12, 23)) and more[0] == range(12, 15)
    target.commit({**kept, **put(target, *more)})
    assert target.complete(23) and target.complete(12)
    large = SampleTable(tmp_path).head(12)
    assert np.array_equal(large.images, small.images) and np.array_equal(large.ids, small.ids)
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == time for path, time in before.items())


def torn(data: bytes, how: str) -> bytes:
    middle = len(data) // 3
    return {
        "empty": b"",
        "half": data[: len(data) // 2],
        "one byte less": data[:-1],
        "flipped byte": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "not Parquet": b"x" * len(data),
    }[how]


@pytest.mark.parametrize("how", ["empty", "half", "one byte less", "flipped byte", "not Parquet"])
def test_a_torn_file_that_no_manifest_lists_is_named_and_its_seeds_are_missing(tmp_path: Path, how: str) -> None:
    target = a_set(tmp_path)
    big = range(0, 4000)  # so that a third of the file lies in the pixels
    put(target, big, range(4000, 4010))
    name = shard_name(big)
    target.folder.put(name, torn(target.folder.read(name), how))
    survey = target.survey()
    assert list(survey.torn) == [name] and str(tmp_path / name) in survey.torn[name]
    assert target.missing(survey.kept, 4010, 4000) == [big]


@pytest.mark.parametrize("how", ["empty", "half", "removed"])
def test_a_listed_file_of_another_size_is_named_and_its_seeds_are_missing(tmp_path: Path, how: str) -> None:
    target = a_set(tmp_path)
    target.commit(put(target, *ranges(10, 5)))
    name = shard_name(range(5, 10))
    if how == "removed":
        target.folder.delete(name)
    else:
        target.folder.put(name, torn(target.folder.read(name), how))
    assert not target.complete(10)
    survey = target.survey()
    assert list(survey.torn) == [name] and target.missing(survey.kept, 10, 5) == [range(5, 10)]


def test_a_file_with_other_seeds_than_its_name_says_does_not_count(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    put(target, range(0, 5), range(5, 10))
    (tmp_path / shard_name(range(0, 5))).rename(tmp_path / shard_name(range(20, 25)))
    survey = target.survey()
    assert list(survey.kept) == [shard_name(range(5, 10))] and "other seeds than its name" in str(survey.torn)


def test_what_another_model_made_is_refused_and_stays(tmp_path: Path) -> None:
    other = a_set(tmp_path, sampler={"num_steps": 3})
    put(other, range(0, 5))
    with pytest.raises(SimsError, match="another model; choose another folder"):
        a_set(tmp_path).survey()
    other.commit(other.survey().kept)
    for look in (a_set(tmp_path).survey, lambda: a_set(tmp_path).complete(5)):
        with pytest.raises(SimsError, match="another model; choose another folder"):
            look()
    assert other.complete(5)


def test_of_files_that_share_seeds_one_counts_and_a_listed_one_goes_first(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    listed = put(target, range(4, 8))
    target.commit({**listed, **put(target, range(0, 4))})
    put(target, range(0, 8), range(6, 12), range(8, 12))
    survey = target.survey()
    assert list(survey.kept) == [shard_name(seeds) for seeds in (range(0, 4), range(4, 8), range(8, 12))]
    assert sorted(survey.left_over) == [shard_name(range(0, 8)), shard_name(range(6, 12))]


def test_a_driver_with_a_smaller_set_does_not_unlist_what_another_committed_meanwhile(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    facts = put(target, *ranges(20, 5))
    target.commit(facts)
    target.commit({name: facts[name] for name in list(facts)[:2]})
    assert target.complete(20)


def test_a_set_with_a_gap_is_committed_up_to_it_and_one_without_its_beginning_not_at_all(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    facts = put(target, range(5, 10))
    with pytest.raises(SimsError, match="holds no images from seed 0 on"):
        target.commit(facts)
    target.commit({**facts, **put(target, range(0, 5), range(15, 20))})
    assert len(SampleTable(tmp_path)) == 10 and target.complete(10)


def test_the_manifest_says_of_each_file_its_digest_rows_and_labels_and_of_all_what_a_table_needs(
    tmp_path: Path,
) -> None:
    target = a_set(tmp_path)
    target.commit(put(target, *ranges(10, 5)))
    table = SampleTable(tmp_path)
    assert (len(table), table.shape, table.kind, table.num_classes, table.unlabelled) == (10, SHAPE, "image", 3, 0)
    for name, facts in table.manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert (facts["sha256"], facts["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert facts["rows"] == 5
    assert table.fingerprint == target.fingerprint


def test_checking_a_file_gives_the_facts_that_its_maker_gave(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    made = put(target, range(0, 5))
    assert {name: target.check(name) for name in made} == made


def test_every_second_one_of_many_files_leaves_the_others_to_be_made(tmp_path: Path) -> None:
    names = [shard_name(seeds) for seeds in ranges(12_000 * 10, 10)]
    assert a_set(tmp_path).missing(names[::2], 120_000, 10) == ranges(120_000, 10)[1::2]


def test_a_file_that_another_driver_removed_meanwhile_is_not_listed(tmp_path: Path) -> None:
    target = a_set(tmp_path)
    facts = put(target, *ranges(10, 5))
    target.folder.delete(shard_name(range(5, 10)))
    target.commit(facts)
    assert len(SampleTable(tmp_path)) == 5 and target.complete(5) and not target.complete(10)
