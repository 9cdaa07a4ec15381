"""CIFAR-10: both versions give the same images in the order of the batches."""

from pathlib import Path

import numpy as np
import pytest
from containers import binary_batch, chw, imported, make_tar, pickled_batch, pickled_meta, stack

from sims_ray.data.importers import import_images
from sims_ray.data.table import SampleTable

NAMES = [f"class{i}" for i in range(10)]
OUT_OF_ORDER = [4, 2, 3, 5, 1]  # the order in the file that its authors publish is such a one
IMAGES = stack(24, side=32)
LABELS = [i % 10 for i in range(24)]
FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}


def batch(version: str, rows: slice) -> bytes:
    make = pickled_batch if version == "python" else binary_batch
    return make(IMAGES[rows], LABELS[rows])


def cifar(path: Path, version: str, order: list[int] = OUT_OF_ORDER, test: bool = True) -> Path:
    """Five batches of 4 images and a test batch of 4."""
    folder, suffix = FOLDERS[version], "" if version == "python" else ".bin"
    names = pickled_meta(NAMES) if version == "python" else "\n".join([*NAMES, ""]).encode()
    members = [(f"{folder}/data_batch_{i}{suffix}", batch(version, slice(4 * i - 4, 4 * i))) for i in order]
    members.insert(1, (f"{folder}/readme.html", b"<html></html>"))
    members.insert(2, (f"{folder}/batches.meta" + ("" if version == "python" else ".txt"), names))
    if test:
        members.insert(3, (f"{folder}/test_batch{suffix}", batch(version, slice(20, 24))))
    return make_tar(path, members)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_the_training_batches_come_in_the_order_of_their_numbers(tmp_path: Path, version: str, suffix: str) -> None:
    summary = import_images(cifar(tmp_path / f"in.{suffix}", version), tmp_path / "out")
    table = SampleTable(tmp_path / "out")
    assert np.array_equal(table.head(20).images, [chw(image) for image in IMAGES[:20]])
    assert table.head(20).labels.tolist() == LABELS[:20] and table.head(20).ids.tolist() == list(range(20))
    assert (summary.rows, summary.classes, summary.num_classes) == (20, NAMES, 10)


def test_both_versions_and_an_array_of_the_same_images_have_one_fingerprint(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", images=IMAGES[:20], labels=LABELS[:20])
    sources = [cifar(tmp_path / f"{version}.tar.gz", version) for version in FOLDERS]
    prints = {import_images(s, tmp_path / f"{s.name}-out").fingerprint for s in [*sources, tmp_path / "in.npz"]}
    assert len(prints) == 1


@pytest.mark.parametrize("version", ["python", "binary"])
def test_the_test_batch_is_taken_where_it_is_alone(tmp_path: Path, version: str) -> None:
    samples = imported(cifar(tmp_path / "in.tar", version, order=[]))
    assert np.array_equal(samples.images, [chw(image) for image in IMAGES[20:]])
    assert samples.labels.tolist() == LABELS[20:]


def test_batches_pickled_by_python_3_are_read_too(tmp_path: Path) -> None:
    import pickle

    data = IMAGES[:4].transpose(0, 3, 1, 2).reshape(4, 3072)
    content = pickle.dumps({"labels": LABELS[:4], "data": data, "filenames": ["a", "b"]}, protocol=4)
    samples = imported(make_tar(tmp_path / "in.tar", [("data_batch_1", content)]))
    assert np.array_equal(samples.images, [chw(image) for image in IMAGES[:4]])


def test_the_pickles_of_the_fixture_are_what_python_reads(tmp_path: Path) -> None:
    import pickle

    loaded = pickle.loads(batch("python", slice(0, 4)), encoding="latin1")
    assert loaded["labels"] == LABELS[:4]
    assert np.array_equal(loaded["data"].reshape(4, 3, 32, 32), [chw(image) for image in IMAGES[:4]])
    assert pickle.loads(pickled_meta(NAMES))["label_names"] == NAMES
