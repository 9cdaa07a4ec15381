"""Exports hold every pixel and label where other programs look for them, and appear whole or not at all."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.export import export
from sims_ray.data.importers import import_images
from sims_ray.data.samples import Samples, concatenate
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST
from tests.data.tables import commit, random_rows


def parts(shape: tuple[int, int, int] = (3, 8, 8), kind: str = "image") -> list[Samples]:
    return [random_rows(n, shape, first, kind) for n, first in ((3, 0), (1, 10), (4, 20))]


def decoded(content: bytes) -> NDArray[np.uint8]:
    """Pixels [C, H, W] of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and image.mode in ("L", "RGB")
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def read_edm_zip(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Images and labels as EDM's loader finds them: sorted names, labels by name."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        images = np.stack([decoded(archive.read(name)) for name in names])
        labels = json.loads(archive.read("dataset.json"))["labels"]
    if labels is None:
        return images, None
    by_name = dict(labels)
    return images, np.array([by_name[name] for name in names])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_a_folder_of_png_has_every_pixel_and_label(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    whole = concatenate(parts(shape))
    seen: list[int] = []
    out = export(commit(tmp_path / "table", *parts(shape)), tmp_path / "out", "png", seen.append)
    assert seen == [3, 4, 8] and out == tmp_path / "out"
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert labels == [[f"00000/img{row:08d}.png", label] for row, label in enumerate(whole.labels.tolist())]
    for (name, _), image in zip(labels, whole.images, strict=True):
        assert np.array_equal(decoded((out / name).read_bytes()), image)
    assert len([path for path in out.rglob("*") if path.is_file()]) == len(whole) + 1


def test_sub_folders_hold_a_thousand_images_each(tmp_path: Path) -> None:
    out = export(commit(tmp_path / "table", random_rows(2001, (1, 2, 2))), tmp_path / "out", "png")
    assert [len(list((out / name).iterdir())) for name in ("00000", "00001", "00002")] == [1000, 1000, 1]
    assert (out / "00002" / "img00002000.png").is_file()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_a_zip_is_one_of_edm_and_is_not_compressed(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    table, whole = commit(tmp_path / "table", *parts(shape)), concatenate(parts(shape))
    images, labels = read_edm_zip(export(table, tmp_path / "out.zip", "zip"))
    assert np.array_equal(images, whole.images) and labels is not None and np.array_equal(labels, whole.labels)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    export(table, tmp_path / "again.zip", "zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (4, 3, 3)])
def test_an_npz_is_what_numpy_reads(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    whole = concatenate(parts(shape))
    with np.load(export(commit(tmp_path / "table", *parts(shape)), tmp_path / "out.npz", "npz")) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and np.array_equal(images, whole.images.transpose(0, 2, 3, 1))
    assert labels.dtype == np.int64 and np.array_equal(labels, whole.labels)


def test_latents_are_exported_as_npz_with_channels_first(tmp_path: Path) -> None:
    whole = concatenate(parts((4, 3, 2), "latent"))
    table = commit(tmp_path / "table", *parts((4, 3, 2), "latent"))
    with np.load(export(table, tmp_path / "out.npz", "npz")) as arrays:
        assert arrays["arr_0"].dtype == np.float16 and np.array_equal(arrays["arr_0"], whole.images)
    for format in ("png", "zip"):
        with pytest.raises(SimsError, match="decode first with sims data decode"):
            export(table, tmp_path / "out", format)  # type: ignore[arg-type]


def test_rows_without_any_label_have_none_outside_either(tmp_path: Path) -> None:
    table = commit(tmp_path / "table", random_rows(3, labels=np.full(3, -1, np.int32)))
    assert json.loads((export(table, tmp_path / "png", "png") / "dataset.json").read_text()) == {"labels": None}
    assert read_edm_zip(export(table, tmp_path / "a.zip", "zip"))[1] is None
    with np.load(export(table, tmp_path / "a.npz", "npz")) as arrays:
        assert list(arrays) == ["arr_0"]


@pytest.mark.parametrize(("format", "name"), [("png", "out"), ("zip", "out.zip"), ("npz", "out.npz")])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_what_is_exported_can_be_imported_again(
    tmp_path: Path, format: Any, name: str, shape: tuple[int, int, int]
) -> None:
    whole = concatenate(parts(shape))
    export(commit(tmp_path / "table", *parts(shape)), tmp_path / name, format)
    import_images(tmp_path / name, tmp_path / "imported")
    again = SampleTable(tmp_path / "imported").head(len(whole))
    assert np.array_equal(again.images, whole.images) and np.array_equal(again.labels, whole.labels)


def test_a_table_in_an_object_store_is_exported_from_there_and_not_to_there(tmp_path: Path, s3_folder: str) -> None:
    table = commit(s3_folder, *parts())
    images, _ = read_edm_zip(export(table, tmp_path / "out.zip", "zip"))
    assert np.array_equal(images, concatenate(parts()).images)
    with pytest.raises(SimsError, match=r"an export cannot be written to s3://.*give a path on a disk"):
        export(table, f"{s3_folder}/out.zip", "zip")


@pytest.mark.parametrize("format", ["png", "zip", "npz"])
def test_an_export_that_fails_leaves_nothing_and_one_that_is_there_is_left_alone(tmp_path: Path, format: Any) -> None:
    table = commit(tmp_path / "table", *parts())
    last = tmp_path / "table" / "part-00002.parquet"
    content = last.read_bytes()
    last.write_bytes(content[:-9])
    for damaged in (b"", content[:-9], (tmp_path / "table" / "part-00000.parquet").read_bytes()):
        last.write_bytes(damaged)
        with pytest.raises(SimsError, match=r"part-00002.parquet is not "):
            export(table, tmp_path / "out", format)
        assert [path.name for path in tmp_path.iterdir()] == ["table"]
    last.write_bytes(content)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SimsError, match="exists"):
        export(table, tmp_path / "out", format)
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(SimsError, match=r"cannot be (made|written)"):
        export(table, tmp_path / "out" / "inner", format)


def test_what_png_cannot_hold_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    table = commit(tmp_path / "table", random_rows(2, (4, 2, 2)))
    with pytest.raises(SimsError, match="has images of 4 channels, which PNG cannot hold"):
        export(table, tmp_path / "out.zip", "zip")
    with pytest.raises(SimsError, match="choose png, zip, npz"):
        export(table, tmp_path / "out", "tar")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["table"] and (tmp_path / "table" / MANIFEST).is_file()
