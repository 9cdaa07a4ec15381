"""Zip and tar: what comes in is what was put in, whatever the container; and memory stays flat."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from containers import (
    chw,
    edm_zip,
    file_names,
    imported,
    index,
    make_tar,
    make_zip,
    npy,
    parquet,
    png,
    save,
    stack,
    webdataset,
)

from sims_ray.data.importers import import_images
from sims_ray.data.table import SampleTable

LABELS = [3, 0, -1, 1, 3]


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_images_have_the_same_fingerprint_in_every_container(
    tmp_path: Path, channels: int, labels: list[int] | None
) -> None:
    images = stack(5, channels)
    for name, image in zip(file_names(5), images, strict=True):
        save(tmp_path / "folder" / f"{name}.png", image)
    pairs = [[f"{name}.png", label] for name, label in zip(file_names(5), LABELS, strict=True)]
    (tmp_path / "folder" / "dataset.json").write_bytes(index(pairs if labels else None))
    given = {"labels": np.array(labels)} if labels else {}
    np.savez(tmp_path / "last.npz", images=images, **given)
    given = {"y": np.array(labels)} if labels else {}
    np.savez_compressed(tmp_path / "first.npz", x=np.stack([chw(image) for image in images]), **given)
    rows = [{"bytes": png(image), "path": None} for image in images]
    sources = [
        tmp_path / "folder",
        edm_zip(tmp_path / "edm.zip", images, labels),
        tmp_path / "last.npz",
        tmp_path / "first.npz",
        webdataset(tmp_path / "web.tar", images, labels),
        webdataset(tmp_path / "web.tar.gz", images, labels),
        parquet(tmp_path / "hub.parquet", image=rows, **({"label": labels} if labels else {})),
    ]
    if labels is None:
        np.save(tmp_path / "rows.npy", images)
        sources.append(tmp_path / "rows.npy")
    summaries = [import_images(source, tmp_path / f"{source.name}-table") for source in sources]
    assert len({summary.fingerprint for summary in summaries}) == 1
    table = SampleTable(tmp_path / "edm.zip-table").head(5)
    assert np.array_equal(table.images, [chw(image) for image in images])
    assert table.labels.tolist() == (labels or [-1] * 5) and table.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_without_an_index_has_its_folders_as_classes(tmp_path: Path, method: int) -> None:
    members = {f"{name}/0.png": png(image) for name, image in zip(["dog", "cat"], stack(2), strict=True)}
    more = {"dog/": b"", "__MACOSX/dog/._0.png": b"junk", "cat/.hidden.png": b"junk", "readme.txt": b"hello"}
    summary = import_images(make_zip(tmp_path / "in.zip", {**members, **more}, method), tmp_path / "out")
    table = SampleTable(tmp_path / "out").head(2)
    assert summary.classes == ["cat", "dog"] and table.labels.tolist() == [0, 1]
    assert np.array_equal(table.images, [chw(stack(2)[1]), chw(stack(2)[0])])


def test_a_zip_of_arrays_is_latents_with_their_labels(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
    names = [f"{name}.npy" for name in file_names(3)]
    members = {name: npy(latent) for name, latent in zip(names, latents, strict=True)}
    pairs = [[name, label] for name, label in zip(names, (5, 6, 7), strict=True)][::-1]  # the order is the names'
    summary = import_images(make_zip(tmp_path / "in.zip", {**members, "dataset.json": index(pairs)}), tmp_path / "out")
    table = SampleTable(tmp_path / "out")
    assert (summary.kind, table.kind, table.shape, table.num_classes) == ("latent", "latent", (8, 4, 4), 8)
    assert np.array_equal(table.head(3).images, latents.astype(np.float16))
    assert table.head(3).images.dtype == np.float16 and table.head(3).labels.tolist() == [5, 6, 7]


def test_paths_written_on_windows_are_the_same_paths(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "in.zip", {"a\\0.png": png(stack(1)[0]), "dataset.json": index([["a/0.png", 2]])})
    assert imported(source).labels.tolist() == [2]


# --- WebDataset -----------------------------------------------------------------------------------------------


def test_webdataset_takes_the_image_and_the_label_of_a_key(tmp_path: Path) -> None:
    images = stack(4)
    members = [
        ("./", b""),
        ("./README", b"hello"),
        ("./a/0.1/x.cls", b" 7\n"),
        ("./a/0.1/x.PNG", png(images[0])),
        ("./a/0.1/x.seg.png", b"not looked at"),
        ("./a/0.1/y.json", json.dumps({"label": 4, "caption": "text"}).encode()),
        ("./a/0.1/y.png", png(images[1])),
        ("./._z.png", b"junk"),
        ("./z.png", png(images[2])),
        ("./z.json", b'{"caption": "no label"}'),
        ("./zz.json", b'{"label": 1}'),
        ("./zz.cls", b"2"),
        ("./zz.png", png(images[3])),
    ]
    samples = imported(make_tar(tmp_path / "in.tar", [m for m in members if m[0] != "./"]))
    assert samples.labels.tolist() == [7, 4, -1, 2]
    assert np.array_equal(samples.images, [chw(image) for image in images])


def test_a_folder_of_tars_is_one_source_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = stack(6)
    (tmp_path / "in").mkdir()
    webdataset(tmp_path / "in" / "b.tgz", images[2:4], [2, 3])
    webdataset(tmp_path / "in" / "a.tar", images[:2], [0, 1])
    webdataset(tmp_path / "in" / "c.tar.gz", images[4:], [4, 5])
    samples = imported(tmp_path / "in")
    assert samples.ids.tolist() == samples.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(samples.images, [chw(image) for image in images])


def test_kinds_are_told_from_content_where_names_say_nothing(tmp_path: Path) -> None:
    images = stack(2)
    np.save(tmp_path / "x.npy", images)
    made = [
        edm_zip(tmp_path / "z", images, None),
        webdataset(tmp_path / "t", images, None),
        webdataset(tmp_path / "g.tgz", images, None).rename(tmp_path / "g"),
        parquet(tmp_path / "p", image=[png(image) for image in images]),
        (tmp_path / "x.npy").rename(tmp_path / "n"),
    ]
    assert len({import_images(source, tmp_path / f"{source.name}-out").fingerprint for source in made}) == 1


# --- sizes ----------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from sims_ray.data import importers

def peak_kb():  # not ru_maxrss, which begins with the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

importers.PART_BYTES = 1 << 20
importers.import_images(Path(sys.argv[1]), Path(sys.argv[3]))
before = peak_kb()
importers.import_images(Path(sys.argv[2]), Path(sys.argv[4]))
print(peak_kb() - before)
"""


def make_source(folder: Path, kind: str, n: int) -> Path:
    """About 50 KB of random pixels for each of n images."""
    values = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)
    images = np.lib.stride_tricks.as_strided(values, (n // 16, *values.shape), (0, *values.strides))
    folder.mkdir(exist_ok=True)
    if kind == "npz":
        np.savez(folder / f"{n}.npz", images=images.reshape(n, 128, 128, 3))
        return folder / f"{n}.npz"
    if kind == "npy":
        np.save(folder / f"{n}.npy", images.reshape(n, 128, 128, 3))
        return folder / f"{n}.npy"
    encoded = [png(image, compress_level=0) for image in values]
    members = [(f"{i:06d}.png", encoded[i % 16]) for i in range(n)]
    return make_tar(folder / f"{n}.tar", members) if kind == "tar" else make_zip(folder / f"{n}.zip", dict(members))


def growth_mb(tmp_path: Path, kind: str, small: int, large: int) -> float:
    """By how much the peak is higher where a source has more images."""
    sources = [make_source(tmp_path, kind, n) for n in (small, large)]
    command = [sys.executable, "-c", PEAK, *sources, tmp_path / "out-small", tmp_path / "out-large"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e3


@pytest.mark.parametrize("kind", ["npz", "tar"])
def test_memory_does_not_grow_with_the_size_of_the_source(tmp_path: Path, kind: str) -> None:
    assert growth_mb(tmp_path, kind, 128, 896) < 20  # of 38


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "npy", "tar", "zip"])
def test_memory_stays_flat_for_200_mb(tmp_path: Path, kind: str) -> None:
    assert growth_mb(tmp_path, kind, 256, 4096) < 25
