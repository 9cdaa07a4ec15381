"""`sims measure`, as a user types it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from sims_ray.config import FeatureSettings
from sims_ray.storage.folders import Folder
from sims_ray.studies.measure import measure_images
from sims_ray.studies.measure_request import Request
from tests.cli.words import sims
from tests.data.tables import commit, random_rows

SHAPE = (1, 6, 6)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    """Random images that all have a label."""
    sizes = {"set": (120, 0), "real": (500, 1000)}
    for name, (n, first_id) in sizes.items():
        commit(tmp_path / name, random_rows(n, SHAPE, first_id, labels=np.arange(n, dtype=np.int32) % 2))
    return {name: tmp_path / name for name in sizes}


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and "; " in error
    return error


def test_the_table_and_the_json_hold_every_value(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "values.json"
    words = ("--against", tables["real"], "--features", "pixels", "--n", "100", "--per", "label", "--copies")
    assert sims("measure", tables["set"], *words, "--json", out) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    expected = measure_images(
        Request(
            str(tables["set"]), str(tables["real"]), FeatureSettings(kind="pixels"), None, 100, per="label", copies=True
        )
    )
    assert lines[0].split()[:3] == ["metric", "of", "value"]
    assert [line.split()[0] for line in lines[1:]] == [v.metric for v in expected.values]
    assert {"fd_pixels@100", "kid_pixels@100", "coverage_pixels@100", "copies_pixels@100"} <= {
        line.split()[0] for line in lines
    }
    written = json.loads(out.read_text())
    assert [v["value"] for v in written["values"]] == [v.value for v in expected.values]
    assert expected.bias is not None and written["bias"]["mean"] == expected.bias.mean
    assert written["settings"]["nimg"] == 100 and written["settings"]["features"]["kind"] == "pixels"
    assert set(written["settings"]["fingerprints"]) == {str(path) for path in tables.values()}
    assert written["features"] == "pixels"


def test_the_warning_of_few_images_is_on_the_log(tables: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    words = ("--against", tables["real"], "--features", "pixels", "--measures", "fd")
    assert sims("measure", tables["set"], *words) == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("fd_pixels@120 is ") and "bias of few images" in warning


@pytest.mark.parametrize(
    ("measures", "names"),
    [("fd", ["fd"]), ("kid", ["fd", "kid"]), ("fd_inf, kid", ["fd", "kid", "fd_inf"])],
)
def test_the_measures_are_those_asked_for(
    measures: str, names: list[str], tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--against", tables["real"], "--features", "pixels", "--measures", measures)
    assert sims("measure", tables["set"], *words) == 0
    lines = capsys.readouterr().out.strip().split("\n")[1:]
    assert [line.split()[0] for line in lines] == [f"{name}_pixels@120" for name in names]


def test_statistics_are_written_without_a_set_and_measured_against(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "real.npz"
    assert sims("measure", "--against", tables["real"], "--features", "pixels", "--write-statistics", file) == 0
    assert capsys.readouterr().out.strip() == f"{file}: statistics of the real images in pixels features"
    values = []
    for against in (file, tables["real"]):
        out = tmp_path / "values.json"
        assert sims("measure", tables["set"], "--against", against, "--features", "pixels", "--json", out) == 0
        values.append(json.loads(out.read_text())["values"][0])
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-9)
    assert values[0]["metric"] == "fd_pixels@120" and values[0]["reference_nimg"] == 500


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--run", "x", "--features", "pixels"), "go without --run"),
        (("--run", "x", "--weights", "y"), "go without --run"),
        (("--run", "x"), "x/result.json is not the result of a run"),
        (("--weights", "y"), "--weights are of a kind of features; give --features checkpoint"),
        (("--features", "checkpoint"), "--features checkpoint needs weights; set --weights to"),
        (
            ("--features", "pixels", "--weights", "y"),
            "--features pixels takes no weights; leave --weights out, or give",
        ),
        (("--features", "checkpoint", "--weights", "nowhere/a"), "give the weights with --weights FILE"),
        (("--features", "pixels", "--measures", "kid,fjd"), "'fjd' is not known; choose among fd, kid,"),
        (("--features", "pixels", "--n", "121"), "has 120 images; give --n from 2"),
        ((), "give --against TABLE"),
    ],
)
def test_a_mistake_gets_one_sentence_in_the_words_of_the_options(
    words: tuple[str, ...], reason: str, tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    against = () if not words or "x" in words else ("--against", tables["real"])
    assert sims("measure", tables["set"], *against, *words) == 1
    error = refused(capsys)
    assert reason in error and "features." not in error and "--set" not in error


@pytest.mark.parametrize(
    "words",
    [("--n", "5"), ("--copies",), ("--lpips",), ("--per", "label"), ("--measures", "kid"), ("--json", "values.json")],
)
def test_options_of_a_set_without_one_are_named(
    words: tuple[str, ...], tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "real.npz"
    assert sims("measure", "--against", tables["real"], "--write-statistics", file, *words) == 1
    assert f"{words[0]}: of which set of images is not said; give SET" in refused(capsys) and not file.exists()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ("--against", tables["real"], "--features", "pixels")
    for option in ("--json", "--write-statistics"):
        assert sims("measure", tables["set"], *words, option, tmp_path / "file" / "x.npz") == 1
        said = capsys.readouterr()
        assert "error: " in said.err and str(tmp_path / "file") in said.err
        assert said.out == "" and "images/s" not in said.err


def test_tables_and_statistics_in_an_object_store_give_the_same(
    tables: dict[str, Path], tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where the copy of what lies there is kept
    remote = commit(f"{s3_folder}/set", random_rows(120, SHAPE, labels=np.arange(120, dtype=np.int32) % 2))
    pixels, values = ("--features", "pixels", "--measures", "fd"), []
    words = ("--against", tables["real"], *pixels, "--write-statistics", tmp_path / "real.npz")
    assert sims("measure", remote.folder.location, *words, "--json", tmp_path / "one.json") == 0
    Folder.at(s3_folder).put("real.npz", (tmp_path / "real.npz").read_bytes())
    words = ("--against", f"{s3_folder}/real.npz", "--features", "pixels", "--json", tmp_path / "two.json")
    assert sims("measure", tables["set"], *words) == 0
    for name in ("one", "two"):
        values.append(json.loads((tmp_path / f"{name}.json").read_text())["values"][0]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-9)
