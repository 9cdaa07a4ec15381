"""Arrays: every layout comes in as the same pixels, latents as the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import chw, imported, make_zip, npy, pixels, save, stack
from PIL import Image

from sims_ray.data import arrays
from sims_ray.data.importers import import_images
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError


@pytest.mark.parametrize(("layout", "channels"), [("NHWC", 1), ("NHWC", 3), ("NCHW", 1), ("NCHW", 3), ("NHW", 1)])
def test_every_layout_has_the_same_pixels(tmp_path: Path, layout: str, channels: int) -> None:
    images = stack(5, channels)
    first = np.stack([chw(image) for image in images])
    made = {"NHWC": first.transpose(0, 2, 3, 1), "NCHW": first, "NHW": images}[layout]
    np.save(tmp_path / "in.npy", np.ascontiguousarray(made))
    samples = imported(tmp_path / "in.npy")
    assert np.array_equal(samples.images, first) and samples.images.dtype == np.uint8
    assert np.all(samples.labels == -1) and samples.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keys", [("images", "labels"), ("arr_0", "arr_1"), ("x", "y"), ("images", "y")])
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "<i2"])
@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_npz_labels_of_any_integer_type_come_in(
    tmp_path: Path, save_npz: Any, dtype: str, keys: tuple[str, str]
) -> None:
    save_npz(tmp_path / "in.npz", **{keys[0]: stack(3), keys[1]: np.array([2, 0, 127], dtype)})
    assert imported(tmp_path / "in.npz").labels.tolist() == [2, 0, 127]


def test_unlabelled_rows_stay_unlabelled(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", images=stack(3), labels=[4, -1, 0])
    summary = import_images(tmp_path / "in.npz", tmp_path / "out")
    table = SampleTable(tmp_path / "out")
    assert table.head(3).labels.tolist() == [4, -1, 0]
    assert (summary.num_classes, table.num_classes, table.unlabelled) == (5, 5, 1)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4"])
def test_latents_are_the_same_numbers_in_float16(tmp_path: Path, dtype: str) -> None:
    latents = np.random.default_rng(0).normal(size=(5, 4, 8, 8)).astype(dtype)
    latents[0, 0, 0, :2] = 65504, -65504
    np.save(tmp_path / "in.npy", latents)
    np.savez(tmp_path / "in.npz", images=latents)
    members = {f"{i}.npy": npy(latent) for i, latent in enumerate(latents)}
    make_zip(tmp_path / "in.zip", members)
    (tmp_path / "in").mkdir()
    for name, content in members.items():
        (tmp_path / "in" / name).write_bytes(content)
    sources = [tmp_path / name for name in ("in", "in.npy", "in.npz", "in.zip")]
    summaries = [import_images(source, tmp_path / f"{source.name}-out") for source in sources]
    table = SampleTable(tmp_path / "in.npy-out")
    assert len({summary.fingerprint for summary in summaries}) == 1
    assert (table.kind, table.shape, summaries[0].kind) == ("latent", (4, 8, 8), "latent")
    assert np.array_equal(table.head(5).images, latents.astype(np.float16))


def test_rows_are_the_same_whatever_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "in.npz", images=stack(7))
    whole = import_images(tmp_path / "in.npz", tmp_path / "whole").fingerprint
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2 * 8 * 8 * 3 + 1)
    assert import_images(tmp_path / "in.npz", tmp_path / "chunks").fingerprint == whole


def test_a_value_that_is_none_is_named_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = np.zeros((7, 4, 8, 8), np.float32)
    latents[5, 3, 7, 7] = np.nan
    np.save(tmp_path / "in.npy", latents)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2 * 4 * 8 * 8 * 4)
    with pytest.raises(SimsError, match=r"in.npy row 5 has the value nan"):
        import_images(tmp_path / "in.npy", tmp_path / "out")


def test_decoded_images_are_resized_and_made_grey_like_encoded_ones(tmp_path: Path) -> None:
    wide = np.stack([pixels(i, 12, 20) for i in range(3)])
    np.save(tmp_path / "in.npy", wide)
    for i, image in enumerate(wide):
        save(tmp_path / "in" / f"{i}.png", image)
    for i, options in enumerate([{"size": 8}, {"size": 8, "crop": "none"}, {"size": 16, "grey": True}]):
        ours = import_images(tmp_path / "in.npy", tmp_path / f"ours{i}", **options)
        assert ours.fingerprint == import_images(tmp_path / "in", tmp_path / f"theirs{i}", **options).fingerprint


def test_grey_arrays_among_colour_ones_become_colour(tmp_path: Path) -> None:
    grey, colour = pixels(0, channels=1), pixels(1)
    source = make_zip(tmp_path / "in.zip", {"0.npy": npy(grey), "1.npy": npy(colour)})
    expected = np.asarray(Image.fromarray(grey).convert("RGB"))
    assert np.array_equal(imported(source).images, [chw(expected), chw(colour)])
