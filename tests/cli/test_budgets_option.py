"""The option `--budgets`: how many images, in words."""

from pathlib import Path

import pytest

from sims_ray.cli.stages import budgets_kimg
from sims_ray.errors import SimsError
from tests.cli.words import sims


def test_budgets_are_images_in_thousands_or_millions() -> None:
    assert budgets_kimg("10k,20k,0.5M, 3.5M") == [10, 20, 500, 3500]
    assert budgets_kimg("1.1k,.5M,0.0011M") == [1.1, 500, 1.1]


@pytest.mark.parametrize("text", ["", "10", "k", "10k,", "10k 20k", "-1k", "1e3k", "10m", "10kk", "0k", "nank"])
def test_words_that_are_no_budgets_are_one_sentence(text: str) -> None:
    with pytest.raises(SimsError, match=r"^--budgets .* is not a number of images; write thousands with k") as error:
        budgets_kimg(text)
    assert "\n" not in str(error.value)


def test_the_option_sets_the_budgets_of_the_recipe_and_the_recipe_checks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for verb in ("run", "finetune", "tune", "report", "evaluate"):
        assert sims(verb, "digits", "--out", out, "--dry-run", "--budgets", "1k,2k,4k") == 0
        assert "sweep, 0 of 37 trials" in capsys.readouterr().out  # 6 strengths, 3 budgets, 2 sizes, the base
    assert sims("finetune", "digits", "--out", out, "--budgets", "20k,10k") == 1
    error = capsys.readouterr().err
    assert "finetune.budgets_kimg=[20.0, 10.0] must increase" in error and error.count("\n") == 1
    assert not out.exists()
