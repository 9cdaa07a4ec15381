"""Contact sheets show every pixel where it belongs; descriptions equal the direct computation."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data import contact_sheet as module
from sims_ray.data.contact_sheet import contact_sheet, describe, random_rows, read_rows, save_sheet
from sims_ray.data.importers import import_images
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from tests.data import tables


def images(n: int, channels: int = 3, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, channels, height, width), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_lies_in_its_cell_pixel_for_pixel(channels: int) -> None:
    batch = images(5, channels, 6, 4)
    sheet = np.atleast_3d(np.asarray(contact_sheet(batch, columns=3, scale=2)))
    assert sheet.shape == (2 * 12 + 1, 3 * 8 + 2, channels)
    for i, image in enumerate(batch):
        y, x = i // 3 * 13, i % 3 * 9
        assert np.array_equal(sheet[y : y + 12 : 2, x : x + 8 : 2], image.transpose(1, 2, 0))
        assert np.array_equal(sheet[y + 1 : y + 12 : 2, x + 1 : x + 8 : 2], image.transpose(1, 2, 0))


def test_gaps_and_empty_cells_are_neutral_grey() -> None:
    sheet = np.asarray(contact_sheet(images(5, 3, 6, 4), columns=3, scale=1))
    assert np.all(sheet[6] == 128) and np.all(sheet[:, 4] == 128) and np.all(sheet[7:, 10:] == 128)


@pytest.mark.parametrize(("side", "cell"), [(1, 32), (8, 32), (12, 36), (31, 62), (32, 32), (64, 64)])
def test_small_images_are_magnified_to_at_least_32_pixels(side: int, cell: int) -> None:
    assert contact_sheet(images(1, 3, side, side)).size == (cell, cell)


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (64, 8, 8)])
def test_the_grid_is_about_square(n: int, columns: int, rows: int) -> None:
    assert contact_sheet(images(n), scale=1).size == (columns * 9 - 1, rows * 9 - 1)


def test_grey_images_make_a_grey_sheet() -> None:
    assert (contact_sheet(images(2, 1)).mode, contact_sheet(images(2, 3)).mode) == ("L", "RGB")


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (images(0), {}),
        (images(2, channels=2), {}),
        (images(2)[0], {}),
        (images(2).astype(np.float32), {}),
        (images(2), {"columns": 0}),
        (images(2), {"scale": 0}),
    ],
    ids=["none", "two channels", "no batch", "floats", "no columns", "no scale"],
)
def test_what_cannot_be_shown_is_refused(batch: NDArray[np.uint8], options: dict[str, int]) -> None:
    with pytest.raises(SimsError, match="a contact sheet cannot"):
        contact_sheet(batch, **options)


def test_a_description_equals_the_direct_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = images(5)
    for i, image in enumerate(batch):
        path = tmp_path / "in" / "abb"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    monkeypatch.setattr("sims_ray.data.importers.PART_BYTES", 2 * 3 * 8 * 8)
    monkeypatch.setattr(module, "COUNT_CHUNK", 100)
    summary = import_images(tmp_path / "in", tmp_path / "out")
    facts = describe(SampleTable(tmp_path / "out"))
    scaled = batch / 127.5 - 1
    assert facts.pop("pixel_mean") == pytest.approx(scaled.mean(), abs=1e-12)
    assert facts.pop("pixel_std") == pytest.approx(scaled.std(), abs=1e-12)
    assert facts == {
        "rows": 5,
        "files": 3,
        "kind": "image",
        "shape": [3, 8, 8],
        "num_classes": 2,
        "label_counts": {0: 2, 1: 3},
        "fingerprint": summary.fingerprint,
    }
    json.dumps(facts)


def test_a_description_of_latents_has_a_mean_and_a_spread_for_each_channel(tmp_path: Path) -> None:
    latents = tables.random_rows(150, (3, 4, 2), kind="latent")
    latents.images[:, 1] += 2
    facts = describe(tables.commit(tmp_path / "table", latents[:9], latents[9:]))
    exact = latents.images.astype(np.float64)
    assert facts["channel_mean"] == pytest.approx(exact.mean(axis=(0, 2, 3)), abs=1e-9)
    assert facts["channel_std"] == pytest.approx(exact.std(axis=(0, 2, 3)), abs=1e-9)
    assert facts["kind"] == "latent" and "pixel_mean" not in facts
    json.dumps(facts)


def test_random_rows_are_a_function_of_the_seed_without_repetition(tmp_path: Path) -> None:
    table = tables.commit(tmp_path / "table", tables.random_rows(50))
    drawn = [random_rows(table, 20, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for rows in drawn:
        assert len(set(rows)) == 20 and rows == sorted(rows) and rows[0] >= 0 and rows[-1] < 50
    assert random_rows(table, 50, 3).tolist() == random_rows(table, 99, 4).tolist() == list(range(50))
    seen = np.concatenate([random_rows(table, 5, seed) for seed in range(200)])
    assert np.bincount(seen, minlength=50).min() > 5  # every row is drawn, also the first and the last


def test_rows_are_read_from_their_row_groups_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims_ray.data.samples.ROW_GROUP_BYTES", 4 * 3 * 8 * 8)
    whole = tables.random_rows(30)
    table = tables.commit(tmp_path / "table", whole[:10], whole[10:11], whole[11:])
    reads: list[tuple[str, int, int]] = []
    read = SampleTable.read

    def watched(self: SampleTable, name: str, start: int = 0, stop: int | None = None) -> tables.Samples:
        assert stop is not None
        reads.append((name, start // 4, (stop - 1) // 4))
        return read(self, name, start, stop)

    monkeypatch.setattr(SampleTable, "read", watched)
    for rows in ([0], [4, 7], [3, 4], [9, 10, 11], [1, 2, 12, 29], list(range(30))):
        reads.clear()
        found = read_rows(table, np.array(rows))
        assert found.ids.tolist() == rows and np.array_equal(found.images, whole.images[rows])
        assert all(first == last for _, first, last in reads) and len(set(reads)) == len(reads)
    reads.clear()
    read_rows(table, [12, 29])
    assert reads == [("part-00002.parquet", 0, 0), ("part-00002.parquet", 4, 4)]


def test_no_rows_and_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match="has no rows to show"):
        read_rows(tables.commit(tmp_path / "table", tables.random_rows(0)), [])
    with pytest.raises(SimsError, match="cannot show latents; decode the table first with sims data decode"):
        contact_sheet(tables.random_rows(2, (4, 2, 2), kind="latent").images)


def test_a_sheet_is_written_as_png_whole_or_not_at_all(tmp_path: Path) -> None:
    sheet = contact_sheet(images(4))
    save_sheet(sheet, tmp_path / "new" / "sheet")
    with Image.open(tmp_path / "new" / "sheet") as written:
        assert written.format == "PNG" and np.array_equal(np.asarray(written), np.asarray(sheet))
    with pytest.raises(SimsError, match="cannot be written"):
        save_sheet(sheet, tmp_path / "new" / "sheet" / "inner.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet"]
