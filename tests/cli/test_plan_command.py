"""`sims plan` on the command line."""

from pathlib import Path

import pytest

from sims_ray.studies import measurement
from tests.cli.words import sims


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["digits", "--gpu", "abacus"], "known are v100, a100, h100, h200, l40s, rtx4090"),
        (["digits", "--gpu", "h100", "--measure"], "give one of them"),
        (["images32", "--gpu", "h100"], "give --shape C,H,W to plan without them"),
        (["images32", "--gpu", "h100", "--shape", "3x32"], "give three numbers like 3,32,32"),
        (["images32", "--gpu", "h100", "--shape", "3,30,30"], "need squares that divide by 4"),
        (["edm-cifar10-vp", "--gpu", "h100", "--workers", "7"], "must divide by compute.num_workers=7"),
        (["nothing", "--gpu", "h100"], "no recipe 'nothing'"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sims("plan", *words) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and "\n" not in error


def columns(said: str) -> dict[str, list[str]]:
    """The cells of the table of stages, by stage and detail."""
    rows = said.split("\n\n")[0].split("\n")
    start = next(i for i, row in enumerate(rows) if row.startswith("stage "))
    names = ("images", "NFE", "evaluations", "MAC", "FLOP", "time", "GPU-hours", "storage")
    found = {}
    for row in rows[start + 1 :]:
        if row.startswith("total"):
            break
        cells = [row[rows[start].index(name) :].split("  ")[0].strip() for name in names]
        found[row[: rows[start].index("images")].strip().replace("   ", "")] = cells
    return found


def test_the_plan_of_cifar10_is_the_papers_in_one_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sims("plan", "edm-cifar10-vp", "--gpu", "v100", "--workers", "8") == 0
    said = capsys.readouterr().out
    name, _ = [row for row in columns(said) if row.startswith("train")]  # the other is the base trained on, to compare
    images, nfe, evaluations, macs, flops, time, hours, _ = columns(said)[name]
    assert (images, nfe, evaluations, time, hours) == ("200,000,000", "1", "2e+08", "2 d", "384")
    assert float(macs) == pytest.approx(1.28e19, rel=0.01) and float(flops) == pytest.approx(2 * float(macs), rel=0.01)
    assert "One distance on 50,000 images takes 3.7e+16 MAC of the base and 7.4e+16 of SIMS." in said
    assert "warning" not in said
    assert list(tmp_path.iterdir()) == []


def test_digits_are_planned_on_this_machine_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measurement, "MEASURED_S", 0.05)
    assert sims("plan", "digits", "--workers", "1", "--set", "train.batch_size=32") == 0
    said = capsys.readouterr().out
    assert "1 x this machine's CPU, threads: 1, float32" in said and "worker-hours" in said and "measured on" in said
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_warns_and_is_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("plan", "edm2-img512-xxl", "--gpu", "rtx4090", "--workers", "8") == 0
    said = capsys.readouterr().out
    assert "warning: training does not fit" in said and "total" in said


def test_own_images_are_planned_before_they_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan", "images32", "--gpu", "L40S", "--shape", "3,32,32"
    assert sims(*words) == 0
    said = capsys.readouterr().out
    assert sims(*words, "--set", "compute.gpus_per_worker=1") == 0  # a GPU that is named is one for each worker
    assert said == capsys.readouterr().out
    assert "3x32x32 images; 2 x l40s, float32" in said and "NVIDIA L40S data sheet" in said
