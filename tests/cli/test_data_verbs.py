"""`sims data` verbs on disks and in an object store, as a user types them."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sims_ray.storage.folders import Folder
from tests.cli.words import sims
from tests.data.tables import commit, contents, part_of_set, random_rows, synthetic_set

RANGES = [range(0, 4), range(4, 9), range(9, 12)]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where tables lie."""
    return str(tmp_path / "place") if request.param == "disk" else request.getfixturevalue("s3_folder")


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.strip().split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_verify_accepts_a_whole_table(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_set(f"{place}/set", RANGES)
    Folder.at(f"{place}/set").put("notes.txt", b"mine")
    assert sims("data", "verify", f"{place}/set") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "notes.txt is left over: the manifest does not list it"
    assert said[1].startswith(f"{place}/set: 12 rows in 3 files, ") and said[1].endswith(" bytes, all as listed")


def test_verify_lists_every_fault_and_fails(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = synthetic_set(f"{place}/set", RANGES).file_rows
    folder = Folder.at(f"{place}/set")
    folder.put(first, b"torn")
    folder.delete(second)
    assert sims("data", "verify", f"{place}/set") == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == [first, second]
    assert f"error: {place}/set has 2 faults; remove the files named above" in shown.err
    folder.put(first, b"torn")
    folder.delete("manifest.json")
    assert sims("data", "verify", f"{place}/set") == 1
    assert "has no manifest.json" in error(capsys)


def test_merge_joins_the_parts_of_a_set(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = synthetic_set(f"{place}/whole", RANGES)
    names = list(whole.file_rows)
    part_of_set(whole, f"{place}/a", names[:1])
    part_of_set(whole, f"{place}/b", names[1:])
    assert sims("data", "merge", f"{place}/b", f"{place}/a", f"{place}/out") == 0
    assert f"{place}/out: 12 images of shape (1, 8, 8), " in capsys.readouterr().out
    assert contents(f"{place}/out") == contents(f"{place}/whole")
    assert sims("data", "merge", f"{place}/b", f"{place}/a", f"{place}/out") == 1
    assert "choose another name or remove it first" in error(capsys)
    assert sims("data", "merge", f"{place}/a", f"{place}/new") == 1
    assert "two or more tables" in error(capsys)


@pytest.mark.parametrize(("format", "name"), [("png", "out"), ("zip", "out.zip"), ("npz", "out.npz")])
def test_export_writes_what_is_asked_for(
    place: str, format: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(f"{place}/table", random_rows(5))
    assert sims("data", "export", f"{place}/table", tmp_path / name, "--format", format) == 0
    assert capsys.readouterr().out == f"{tmp_path / name}: 5 images\n"
    assert (tmp_path / name).is_dir() == (format == "png") and (tmp_path / name).exists()
    assert sims("data", "export", f"{place}/table", tmp_path / name, "--format", format) == 1
    assert "exists" in error(capsys)
    assert sims("data", "export", f"{place}/table", "s3://bucket/out", "--format", format) == 1
    assert "give a path on a disk" in error(capsys)


def test_sample_draws_by_seed_and_first_takes_the_first(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = random_rows(40, (3, 32, 32))
    commit(f"{place}/table", rows[:7], rows[7:])
    sheets = {}
    for name, words in (
        ("a", ["--seed", "1"]),
        ("b", ["--seed", "1"]),
        ("c", ["--seed", "2"]),
        ("d", ["--first"]),
        ("e", ["--n", "99"]),
    ):
        out = tmp_path / "sheets" / f"{name}.png"
        assert sims("data", "sample", f"{place}/table", out, "--n", "9", *words) == 0
        sheets[name] = np.asarray(Image.open(out))
    assert "40 of 40 images" in capsys.readouterr().out
    assert np.array_equal(sheets["a"], sheets["b"]) and not np.array_equal(sheets["a"], sheets["c"])
    assert sheets["a"].shape == (3 * 33 - 1, 3 * 33 - 1, 3) and sheets["e"].shape == (6 * 33 - 1, 7 * 33 - 1, 3)
    for i in range(9):
        y, x = i // 3 * 33, i % 3 * 33
        assert np.array_equal(sheets["d"][y : y + 32, x : x + 32], rows.images[i].transpose(1, 2, 0))


def test_a_sheet_of_latents_or_at_an_impossible_place_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path / "latents", random_rows(3, (4, 2, 2), kind="latent"))
    assert sims("data", "sample", tmp_path / "latents", tmp_path / "sheet.png") == 1
    assert "cannot show latents; decode the table first" in error(capsys)
    commit(tmp_path / "images", random_rows(3))
    assert sims("data", "sample", tmp_path / "images", tmp_path / "images" / "manifest.json" / "sheet.png") == 1
    assert "cannot be written" in error(capsys)
    assert sorted(os.listdir(tmp_path)) == ["images", "latents"]


def test_inspect_shows_tables_wherever_they_lie_and_channels_of_latents(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = random_rows(9, (4, 2, 2), kind="latent")
    commit(f"{place}/latents", latents[:5], latents[5:])
    assert sims("data", "inspect", f"{place}/latents") == 0
    facts = yaml.safe_load(capsys.readouterr().out)
    exact = latents.images.astype(np.float64)
    assert (facts["rows"], facts["files"], facts["kind"], facts["shape"]) == (9, 2, "latent", [4, 2, 2])
    assert facts["channel_mean"] == pytest.approx(exact.mean(axis=(0, 2, 3)), abs=1e-9)
    assert facts["channel_std"] == pytest.approx(exact.std(axis=(0, 2, 3)), abs=1e-9)
    commit(f"{place}/images", random_rows(4))
    assert sims("data", "inspect", f"{place}/images", "--sheet", tmp_path / "sheet.png") == 0
    assert "pixel_mean" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_table_that_is_not_there_is_named(verb: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("data", verb, f"{place}/none") == 1
    assert f"{place}/none has no manifest.json" in error(capsys)
