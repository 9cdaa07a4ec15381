"""Importers: what comes in, what is refused, and that a refusal leaves nothing behind."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import chw, imported, parquet, pixels, png, save
from PIL import Image

from sims_ray.data import importers
from sims_ray.data.importers import import_digits, import_images
from sims_ray.data.samples import read_samples
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Artifact, Store, sha256_file
from sims_ray.storage.folders import Folder

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "train-0.parquet"
EXIF_ORIENTATION = 0x0112

# --- digits -------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path: Path) -> Artifact:
    artifact = Store(tmp_path).artifact("import", {"source": "digits"})
    import_digits(artifact)
    return artifact


def test_digits_are_scikit_learns_digits_scaled_to_255(digits: Artifact) -> None:
    from sklearn.datasets import load_digits

    table, theirs = SampleTable(digits.path), load_digits()
    ours = table.head(len(table))
    assert digits.complete and digits.result["source"] == "digits"
    assert (len(table), table.shape, table.num_classes) == (1797, (1, 8, 8), 10)
    assert np.array_equal(ours.labels, theirs.target) and np.array_equal(ours.ids, np.arange(1797))
    expected = [[round(v * 255 / 16) for v in image.ravel()] for image in theirs.images]
    assert np.array_equal(ours.images.reshape(1797, 64), expected)


def test_importing_digits_again_changes_nothing(digits: Artifact) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in digits.path.iterdir()}
    import_digits(digits)
    assert before == {p.name: p.stat().st_mtime_ns for p in digits.path.iterdir()}


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [("png", 1), ("png", 3), ("BMP", 1), ("BMP", 3), ("tiff", 1), ("tiff", 3), ("pgm", 1), ("ppm", 3), ("webp", 3)],
)
def test_folder_import_keeps_every_pixel_of_lossless_images(tmp_path: Path, suffix: str, channels: int) -> None:
    arrays = [pixels(i, channels=channels) for i in range(5)]
    for i, array in enumerate(arrays):
        save(tmp_path / "in" / f"{i}.{suffix}", array, **({"lossless": True} if suffix == "webp" else {}))
    samples = imported(tmp_path / "in")
    assert np.array_equal(samples.images, [chw(a) for a in arrays])
    assert np.array_equal(samples.ids, np.arange(5)) and np.all(samples.labels == -1)


def test_a_palette_counts_as_colour(tmp_path: Path) -> None:
    array = pixels(0, channels=1)
    save(tmp_path / "in" / "0.gif", array)
    assert np.array_equal(imported(tmp_path / "in").images[0], np.repeat(chw(array), 3, axis=0))


def test_classes_are_the_sub_folders_in_sorted_order(tmp_path: Path) -> None:
    for i, name in enumerate(["b/x.png", "a/y.png", "a/deeper/z.png", "c/x.png"]):
        save(tmp_path / "in" / name, pixels(i))
    (tmp_path / "in" / "no-images-here").mkdir()
    summary = import_images(tmp_path / "in", tmp_path / "out")
    table = SampleTable(tmp_path / "out")
    assert table.head(4).labels.tolist() == [0, 0, 1, 2]
    assert np.array_equal(table.head(4).images[0], chw(pixels(2)))  # a/deeper/z.png sorts before a/y.png
    assert summary.classes == table.manifest["result"]["classes"] == ["a", "b", "c"]
    assert summary.num_classes == table.num_classes == 3


def test_dataset_json_gives_the_labels(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"0000{i}" / "x.png", pixels(i))
    labels = [["00002/x.png", 0], ["00000/x.png", 7], ["00001\\x.png", -1]]
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": labels}))
    samples = imported(tmp_path / "in")
    assert samples.labels.tolist() == [7, -1, 0]
    assert np.array_equal(samples.images[0], chw(pixels(0)))


def test_dataset_json_without_labels_means_none(tmp_path: Path) -> None:
    save(tmp_path / "in" / "00000" / "x.png", pixels(0))
    (tmp_path / "in" / "dataset.json").write_text('{"labels": null}')
    assert imported(tmp_path / "in").labels.tolist() == [-1]


def test_other_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", pixels(0))
    for name in ("notes.txt", ".hidden.png", "._a.png"):
        (tmp_path / "in" / name).write_text("no image")
    assert len(imported(tmp_path / "in")) == 1


def test_images_are_grey_only_if_all_are_or_grey_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "in" / "0.png", pixels(0, channels=1))
    save(tmp_path / "in" / "1.png", pixels(1))
    mixed = imported(tmp_path / "in").images
    assert mixed.shape == (2, 3, 8, 8)
    assert np.array_equal(mixed[0], np.repeat(chw(pixels(0, channels=1)), 3, axis=0))
    import_images(tmp_path / "in", tmp_path / "grey", grey=True)
    grey = SampleTable(tmp_path / "grey").head(2).images
    assert np.array_equal(grey[1, 0], np.asarray(Image.fromarray(pixels(1)).convert("L")))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned 90 degrees clockwise
    save(tmp_path / "in" / "0.png", pixels(0), exif=exif)
    assert np.array_equal(imported(tmp_path / "in").images[0], chw(np.rot90(pixels(0), -1)))


@pytest.mark.parametrize("crop", ["center", "none"])
def test_resizing_is_lanczos_of_the_central_square_or_the_whole(tmp_path: Path, crop: str) -> None:
    array = pixels(0, height=20, width=31)
    save(tmp_path / "in" / "0.png", array)
    square = array[:, 5:25] if crop == "center" else array
    expected = np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(imported(tmp_path / "in", size=8, crop=crop).images[0], chw(expected))


def test_resizing_to_the_size_an_image_has_keeps_every_pixel(tmp_path: Path) -> None:
    save(tmp_path / "in" / "0.png", pixels(0))
    assert np.array_equal(imported(tmp_path / "in", size=8).images[0], chw(pixels(0)))


# --- Parquet ------------------------------------------------------------------------------------------------


def encoded(n: int) -> list[bytes]:
    return [png(pixels(i)) for i in range(n)]


def test_parquet_rows_keep_index_label_and_pixels(tmp_path: Path) -> None:
    source = parquet(tmp_path / "in.parquet", image=encoded(3), label=[4, None, 0], index=[30, 10, 20])
    samples = imported(source)
    assert samples.ids.tolist() == [30, 10, 20] and samples.labels.tolist() == [4, -1, 0]
    assert np.array_equal(samples.images, [chw(pixels(i)) for i in range(3)])


def test_parquet_structs_without_label_count_their_rows_over_files(tmp_path: Path) -> None:
    rows = [{"bytes": data, "path": None} for data in encoded(4)]
    parquet(tmp_path / "in" / "0.parquet", image=rows[:3])
    parquet(tmp_path / "in" / "1.parquet", image=rows[3:])
    samples = imported(tmp_path / "in")
    assert samples.ids.tolist() == [0, 1, 2, 3] and np.all(samples.labels == -1)
    assert np.array_equal(samples.images[3], chw(pixels(3)))


@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"{CIFAR10} is not here")
def test_cifar10_parquet_comes_in_exactly(tmp_path: Path) -> None:
    rows = next(pq.ParquetFile(CIFAR10).iter_batches(200))
    pq.write_table(pa.Table.from_batches([rows]), tmp_path / "cifar.parquet")
    samples = imported(tmp_path / "cifar.parquet")
    theirs = rows.to_pydict()
    decoded = [chw(np.asarray(Image.open(io.BytesIO(data)))) for data in theirs["image"]]
    assert samples.images.shape == (200, 3, 32, 32) and np.array_equal(samples.images, decoded)
    assert samples.labels.tolist() == theirs["label"] and samples.ids.tolist() == theirs["index"]


# --- what is written ----------------------------------------------------------------------------------------


def test_the_same_content_has_the_same_fingerprint_wherever_it_came_from(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "some" / "where" / f"{i}.png", pixels(i))
        save(tmp_path / "else" / f"{i}.bmp", pixels(i if i < 2 else 99))
    parquet(tmp_path / "in.parquet", image=encoded(3))
    sources = (tmp_path / "some" / "where", tmp_path / "in.parquet", tmp_path / "else")
    folder, table, other = (import_images(s, tmp_path / f"out{i}").fingerprint for i, s in enumerate(sources))
    assert folder == table != other


def test_the_manifest_is_complete_true_and_free_of_machine_paths(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "0.png", pixels(0))
    summary = import_images(tmp_path / "in", tmp_path / "new" / "out", size=8)
    manifest = json.loads((summary.folder / "manifest.json").read_text())
    keys = {"format", "stage", "fingerprint", "settings", "parents", "files", "result", "versions"}
    assert manifest.keys() == keys and manifest["stage"] == "import" and manifest["parents"] == []
    assert manifest["settings"] == {"source": "in", "size": 8, "crop": "center", "grey": False}
    facts = {"rows": 1, "shape": [3, 8, 8], "kind": "image", "num_classes": 1, "unlabelled": 0, "classes": ["a"]}
    assert manifest["result"] == facts
    part = summary.folder / "part-00000.parquet"
    assert manifest["files"] == {part.name: {"rows": 1, "bytes": part.stat().st_size, "sha256": sha256_file(part)}}
    for file in summary.folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_parts_hold_bounded_pixels_and_progress_counts_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "PART_BYTES", 2 * 3 * 8 * 8 + 1)
    monkeypatch.setattr(importers, "PROGRESS_NIMG", 3)
    source, told = parquet(tmp_path / "in.parquet", image=encoded(5)), list[int]()
    summary = import_images(source, tmp_path / "out", on_progress=told.append)
    assert (summary.files, summary.rows) == (3, 5) and told == [2, 3, 4, 5]
    names = [f"part-0000{i}.parquet" for i in range(3)]
    assert [len(read_samples(tmp_path / "out" / name)) for name in names] == [2, 2, 1]
    assert SampleTable(tmp_path / "out").head(5).ids.tolist() == [0, 1, 2, 3, 4]


# --- what is refused ----------------------------------------------------------------------------------------


def two_sizes(path: Path) -> None:
    for i, side in enumerate((8, 8, 9)):
        save(path / f"{i}.png", pixels(i, side, side))


def truncated(path: Path) -> None:
    save(path / "0.png", pixels(0))
    save(path / "1.png", pixels(1, 64, 64))
    data = (path / "1.png").read_bytes()
    (path / "1.png").write_bytes(data[: len(data) // 2])


def no_image(path: Path) -> None:
    save(path / "0.png", pixels(0))
    (path / "1.jpg").write_text("no image at all")


def postscript(path: Path) -> None:
    path.mkdir()
    (path / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")


def sixteen_bits(path: Path) -> None:
    save(path / "0.png", np.zeros((8, 8), np.uint16))


def flat_and_classes(path: Path) -> None:
    save(path / "0.png", pixels(0))
    save(path / "a" / "0.png", pixels(0))


def images_and_parquet(path: Path) -> None:
    save(path / "0.png", pixels(0))
    parquet(path / "0.parquet", image=encoded(1))


def listed(*labels: Any, text: str | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save(path / "0.png", pixels(0))
        save(path.parent / "beside.png", pixels(0))
        (path / "dataset.json").write_text(text or json.dumps({"labels": labels}))

    return make


def rows(**columns: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        parquet(path / "0.parquet", **columns)

    return make


def sample_table(path: Path) -> None:
    save(path.parent / "first" / "0.png", pixels(0))
    import_images(path.parent / "first", path)


def damaged_parquet(path: Path) -> None:
    rows(image=encoded(3))(path)
    data = (path / "0.parquet").read_bytes()
    (path / "0.parquet").write_bytes(data[:-40])


ONE = encoded(1)
BROKEN: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "nothing there": (lambda path: None, {}, "does not exist"),
    "neither folder nor Parquet": (lambda path: path.write_text("zip"), {}, "neither a folder"),
    "empty folder": (lambda path: path.mkdir(), {}, "holds no images"),
    "size 0": (two_sizes, {"size": 0}, "size=0"),
    "unknown crop": (two_sizes, {"size": 8, "crop": "left"}, "crop='left'"),
    "two sizes": (two_sizes, {}, r"in/0.png is 8x8 but .*in/2.png is 9x9; give --size"),
    "not square": (lambda path: save(path / "0.png", pixels(0, 8, 9)), {}, r"0.png is 9x8, not square; give --size"),
    "truncated image": (truncated, {"size": 8}, "1.png is not a readable image"),
    "text called jpg": (no_image, {}, "1.jpg is not a readable image"),
    "PostScript called png": (postscript, {"size": 8}, "0.png is not a readable image"),
    "16 bits": (sixteen_bits, {}, "more than 8 bits"),
    "images beside classes": (flat_and_classes, {}, "beside its sub-folders"),
    "images beside Parquet": (images_and_parquet, {}, "holds both"),
    "dataset.json: no JSON": (listed(text="{"), {}, "dataset.json is not JSON"),
    "dataset.json: a list": (listed(text="[]"), {}, "dataset.json is not JSON"),
    "dataset.json: labels no list": (listed(text='{"labels": 3}'), {}, "lists '3'"),
    "dataset.json: no pair": (listed(["0.png"]), {}, "write each as"),
    "dataset.json: missing file": (listed(["0.png", 0], ["gone.png", 1]), {}, "gone.png, which is not there"),
    "dataset.json: outside": (listed(["0.png", 0], ["../beside.png", 1]), {}, r"\.\./beside.png, outside"),
    "dataset.json: absolute": (listed(["/etc/x.png", 0]), {}, "/etc/x.png, outside"),
    "dataset.json: twice": (listed(["0.png", 0], ["./0.png", 1]), {}, "twice"),
    "dataset.json: unlisted": (listed(), {}, "no entry for 0.png"),
    "dataset.json: label -2": (listed(["0.png", -2]), {}, "label -2"),
    "dataset.json: label 1.0": (listed(["0.png", 1.0]), {}, "label 1.0"),
    "dataset.json: label true": (listed(["0.png", True]), {}, "label True"),
    "Parquet: no image column": (rows(img=ONE), {}, "no column `image`, only img"),
    "Parquet: image is text": (rows(image=["a.png"]), {}, "column `image` is string"),
    "Parquet: image is null": (rows(image=pa.array([None], pa.binary())), {}, "row 0 has no image bytes"),
    "Parquet: broken image": (rows(image=[*ONE, b"junk"]), {}, "row 1 is not a readable image"),
    "Parquet: text labels": (rows(image=ONE, label=["cat"]), {}, "column `label` is string"),
    "Parquet: label -5": (rows(image=ONE, label=[-5]), {}, "row 0 has label -5"),
    "Parquet: label too large": (rows(image=ONE, label=[2**31]), {}, "row 0 has label 2147483648"),
    "Parquet: index repeats": (rows(image=ONE * 2, index=[4, 4]), {}, "index 4 more than once"),
    "Parquet: index negative": (rows(image=ONE, index=[-1]), {}, "index -1"),
    "Parquet: no rows": (rows(image=pa.array([], pa.binary())), {}, "holds no images"),
    "Parquet: sample table": (sample_table, {}, "already part of a sample table"),
    "Parquet: damaged": (damaged_parquet, {}, "not readable Parquet"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_failed_import_leaves_nothing_behind(tmp_path: Path, broken: str) -> None:
    make, options, message = BROKEN[broken]
    make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SimsError, match=message) as error:
        import_images(tmp_path / "in", tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [40, 20])  # Pillow warns above the limit and raises above twice the limit
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save(tmp_path / "in" / "0.png", pixels(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(SimsError, match=f"0.png claims to have more than {limit} pixels"):
        import_images(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_import_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    save(tmp_path / "in" / "0.png", pixels(0))
    with pytest.raises(KeyboardInterrupt):
        import_images(tmp_path / "in", tmp_path / "out", on_progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_existing_folder_is_filled_only_if_empty(tmp_path: Path) -> None:
    save(tmp_path / "in" / "0.png", pixels(0))
    (tmp_path / "out").mkdir()
    first = import_images(tmp_path / "in", tmp_path / "out")
    for taken in (tmp_path / "out", tmp_path / "in" / "0.png"):
        with pytest.raises(SimsError, match="exists and is not an empty folder"):
            import_images(tmp_path / "in", taken)
    assert SampleTable(tmp_path / "out").fingerprint == first.fingerprint


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    save(tmp_path / "in" / "0.png", pixels(0))
    with pytest.raises(SimsError, match=r"0.png/out cannot be made"):
        import_images(tmp_path / "in", tmp_path / "in" / "0.png" / "out")


# --- object stores ------------------------------------------------------------------------------------------


def test_a_table_in_an_object_store_has_the_same_content(tmp_path: Path, s3_folder: str) -> None:
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", pixels(i))
    here, there = import_images(tmp_path / "in", tmp_path / "out"), import_images(tmp_path / "in", s3_folder)
    local, remote = SampleTable(tmp_path / "out"), SampleTable(s3_folder)
    assert here.fingerprint == there.fingerprint == remote.fingerprint
    assert remote.manifest == local.manifest and np.array_equal(remote.head(3).images, local.head(3).images)
    assert sorted(Folder.at(s3_folder).files()) == ["manifest.json", "part-00000.parquet"]
    with pytest.raises(SimsError, match=r"holds manifest.json; choose another name"):
        import_images(tmp_path / "in", s3_folder)


@pytest.mark.parametrize("fault", [SimsError, KeyboardInterrupt])
def test_a_failed_import_removes_its_parts_from_an_object_store(
    tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    monkeypatch.setattr(importers, "PART_BYTES", 3 * 8 * 8)
    source, seen = parquet(tmp_path / "in.parquet", image=encoded(3)), list[str]()

    def stop(done: int) -> None:
        seen.extend(Folder.at(s3_folder).files())
        if done == 2:
            raise fault("stopped")

    with pytest.raises(fault, match="stopped"):
        import_images(source, s3_folder, on_progress=stop)
    assert "part-00001.parquet" in seen and Folder.at(s3_folder).files() == {}


def test_a_store_that_cannot_be_written_to_is_named_before_any_work(tmp_path: Path, s3: str) -> None:
    save(tmp_path / "in" / "0.png", pixels(0))
    (tmp_path / "in" / "1.png").write_text("no image, and not looked at")
    with pytest.raises(SimsError, match="no-such-bucket/table"):
        import_images(tmp_path / "in", "s3://no-such-bucket/table")
