import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.words import sims
from tests.conftest import LOCAL, TINY


def settings() -> list[str]:
    return [word for setting in (*TINY, *LOCAL) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run made through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert sims("run", "digits", "--out", out, *settings()) == 0
    return out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "nowhere"], "no recipe 'nowhere'"),
        (["run", "digits", "--set", "train.lrr=1"], "train.lrr is not a setting; did you mean lr?"),
        (["evaluate", "digits", "--omega", "1", "--budget", "33"], "B=33 is not in the recipe"),
        (["sample", "grid.png"], "needs either --run FOLDER or --base CHECKPOINT"),
        (["sample", "grid.png", "--run", "nowhere"], "is not the result of a run"),
        (["sample", "grid.png", "--base", "nowhere.safetensors"], "no checkpoint at"),
        (["data", "inspect", "nowhere"], "nowhere has no manifest.json"),
        (["data", "import", "nowhere", "table"], "nowhere does not exist"),
    ],
)
def test_a_mistake_gets_one_sentence_and_a_failing_exit_and_leaves_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sims(*words) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_explained_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("run", "digits", "--nonsense") == 2
    assert "No such option: --nonsense" in capsys.readouterr().err


def test_run_ends_with_the_table_the_report_and_the_way_to_mlflow(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sims("run", "digits", "--out", finished, *settings()) == 0
    said = capsys.readouterr().out
    for word in ("base", "auxiliary", "SIMS", "fd_classifier@64", "3 x 64", "report.html", "mlflow ui"):
        assert word in said


def test_every_stage_command_finds_its_stage_complete(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    for verb in ("train", "synthesize", "finetune", "evaluate", "tune", "report"):
        assert sims(verb, "digits", "--out", finished, *settings()) == 0
        assert sims(verb, "digits", "--out", finished, *settings(), "--dry-run") == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before
    assert "to do" not in capsys.readouterr().out


def test_samples_of_a_run_are_a_pure_function_of_model_and_seed(finished: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert sims("sample", tmp_path / name, "--run", finished, "--n", "3", "--seed", "5", "--steps", "4") == 0
    files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "a").iterdir()}
    assert sorted(files) == ["0000000005.png", "0000000006.png", "0000000007.png"]
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "b").iterdir()} == files
    assert sims("sample", tmp_path / "base", "--run", finished, "--model", "base", "--n", "3", "--seed", "5") == 0
    assert (tmp_path / "base" / "0000000005.png").read_bytes() != (tmp_path / "a" / "0000000005.png").read_bytes()


def test_import_and_inspect_show_what_was_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((10, 12, 3), 30 * i, np.uint8)).save(tmp_path / "photos" / label / f"{i}.png")
    assert sims("data", "import", tmp_path / "photos", tmp_path / "table", "--size", "8") == 0
    assert sims("data", "inspect", tmp_path / "table", "--sheet", tmp_path / "sheet.png") == 0
    said = capsys.readouterr().out
    assert "rows: 6" in said and "num_classes: 2" in said
    assert Image.open(tmp_path / "sheet.png").size[0] > 64


def test_import_says_what_a_zip_of_latents_became(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", images=np.zeros((3, 4, 8, 8), np.float32), labels=[0, 1, 4])
    assert sims("data", "import", tmp_path / "in.npz", tmp_path / "table") == 0
    assert "table: 3 latents of shape (4, 8, 8), 5 classes" in capsys.readouterr().out
