"""Laws of the comparison of runs."""

import csv
from pathlib import Path

import pytest

from sims_ray.errors import SimsError
from sims_ray.report import compare_runs
from sims_ray.report.comparison import runs_panel, settings_table
from tests.report.pages import Reader, figures, points
from tests.report.summaries import full_summary, plain_summary

OTHER = plain_summary(settings={"train": {"lr": 1e-3, "ema_rampup_ratio": None}, "name": "digits", "more": 1})


def test_page_has_every_model_of_every_run_and_a_line_per_run(tmp_path: Path) -> None:
    html = compare_runs(tmp_path, {"a<b>": full_summary(), "b": OTHER}).read_text()
    page = Reader(html)
    assert len([cell for cell in page.of("th") if cell["scope"] == "row"]) == 6 + 3 + 3
    assert not page.of("b")
    ((figure,),) = figures(html).values()
    assert [trace["name"] for trace in figure["data"]] == ["a&lt;b&gt;", "b"]
    assert (1.0, OTHER["selected"]["distance"]) in points(figure)
    with (tmp_path / "compare.csv").open(newline="") as file:
        found = [(row["run"], row["model"], float(row["distance"])) for row in csv.DictReader(file)]
    assert found[-1] == ("b", "SIMS", OTHER["table"][-1]["distance"])
    assert (tmp_path / "compare_fd_vs_omega.png").is_file()


def test_only_settings_that_differ_are_shown() -> None:
    rows = settings_table({"a": plain_summary(), "b": OTHER}).rows
    assert rows == (("train.lr", "0.002", "0.001"), ("features.seed", "0", "\u2013"), ("more", "\u2013", "1"))


def test_unequal_metrics_and_features_are_refused_naming_both(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match=r"fd_classifier@1k.*fd_pixels@1k"):
        compare_runs(tmp_path, {"a": plain_summary(), "b": plain_summary(metric="fd_pixels@1k")})
    with pytest.raises(SimsError, match=r"features.seed is 0 in a and 1 in b"):
        compare_runs(tmp_path, {"a": plain_summary(), "b": plain_summary(settings={"features": {"seed": 1}})})
    with pytest.raises(SimsError, match="two or more"):
        compare_runs(tmp_path, {"a": plain_summary()})
    assert not list(tmp_path.iterdir())


def test_searches_of_unequal_distances_are_not_drawn_together(tmp_path: Path) -> None:
    other = plain_summary(selected={**plain_summary()["selected"], "metric": "fd_classifier@500"})
    assert runs_panel({"a": plain_summary(), "b": other}) is None
    assert "not drawn together" in compare_runs(tmp_path, {"a": plain_summary(), "b": other}).read_text()
