"""`sims data synthesize`: any model, on disks and in object stores; what cannot work ends before any work."""

from pathlib import Path

import numpy as np
import pytest

from sims_ray.data.table import SampleTable
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.folders import Folder
from sims_ray.storage.stores import open_store
from tests.cli.words import sims
from tests.networks import SETTINGS, small_network

HERE = ("--workers", "0", "--gpus", "0", "--steps", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    net = small_network(0, label_dim=3)
    save_tensors(path, net.state_dict(), {"role": "base", "network": {**SETTINGS, "label_dim": 3}, "nimg": 0})
    return path


def test_a_set_is_made_and_a_larger_n_extends_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    for n in (20, 50):
        assert sims("data", "synthesize", out, "--base", base, "--n", n, "--seed", 5, *HERE) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 50 images of shape (1, 8, 8)"
    assert np.array_equal(SampleTable(out).head(50).ids, np.arange(5, 55))


def test_a_set_in_an_object_store_is_the_one_on_the_disk(base: Path, tmp_path: Path, s3_folder: str) -> None:
    out = tmp_path / "set"
    for where in (s3_folder, out):
        assert sims("data", "synthesize", where, "--base", base, "--n", 50, "--shard-nimg", 20, *HERE) == 0
    there, here = Folder.at(s3_folder), Folder.at(out)
    assert {name: there.read(name) for name in there.files()} == {name: here.read(name) for name in here.files()}
    torn = "seeds-000000000020-000000000039.parquet"
    there.put(torn, there.read(torn)[:-20])
    assert sims("data", "synthesize", s3_folder, "--base", base, "--n", 50, "--shard-nimg", 20, *HERE) == 0
    assert there.read(torn) == here.read(torn)


def test_wrong_credentials_end_in_one_sentence_before_anything_is_sampled(
    base: Path,
    s3_folder: str,
    s3_checks_credentials: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    open_store.cache_clear()
    monkeypatch.setattr("sims_ray.diffusion.generate.SeedStreams", lambda _: pytest.fail("sampling began"))
    assert sims("data", "synthesize", s3_folder, "--base", base, "--n", 50, *HERE) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment" in said[0]


def test_labels_and_attributes_are_given_as_words(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = ("--labels", "{quotas: {0: 3, 1: 1}}", "--micro-batch", "8")
    assert sims("data", "synthesize", out, "--base", base, "--n", 40, *words, *HERE) == 0
    assert np.array_equal(np.bincount(SampleTable(out).head(40).labels), [30, 10])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needs either --run FOLDER or --base CHECKPOINT"),
        (("--base", "BASE", "--labels", "{probabilities: [0.5]}"), "probabilities add up to 0.5"),
        (("--base", "BASE", "--labels", "{probabilities: [0.5, 0.5]}"), "2 values and the network 3 classes"),
        (("--base", "BASE", "--labels", "{quotas: {7: 1}}"), "names label 7"),
        (("--base", "BASE", "--labels", "often"), "--labels often"),
        (("--base", "BASE", "--workers", "3:2"), "--workers 3:2 is not a number of workers"),
        (("--base", "BASE", "--workers", "many"), "--workers many is not a number of workers"),
        (("--base", "BASE", "--shares", "{0: 1}"), "give --classifier too"),
        (("--base", "BASE", "--classifier", "absent.safetensors"), "absent.safetensors"),
        (("--base", "absent.safetensors"), "absent.safetensors"),
        (("--base", "BASE", "--omega", "1"), "--aux and --omega go together"),
        (("--base", "BASE", "--seed", "4294967290"), "is beyond 4294967295"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(
    words: tuple[str, ...], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    words = tuple(str(base) if word == "BASE" else word for word in words)
    assert sims("data", "synthesize", out, "--n", 20, *HERE[2:], *words) == 1
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_sampled(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("sims_ray.diffusion.generate.SeedStreams", lambda _: pytest.fail("sampling began"))
    assert sims("data", "synthesize", tmp_path / "file" / "set", "--base", base, "--n", 20, *HERE) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"
