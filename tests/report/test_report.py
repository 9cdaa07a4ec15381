"""Laws of the report: what the summary says is what the page, the plots and the CSVs say, and nothing is fetched."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sims_ray.errors import SimsError
from sims_ray.report import write_report
from sims_ray.report.numbers import number, percent
from sims_ray.report.tables import results_table, trials_table
from sims_ray.report.verdicts import comparisons, evidence, verdict
from tests.report.pages import Reader, figures, points
from tests.report.summaries import BASE, METRIC, full_summary, morph, plain_summary, previews, row, trial

EVIL = "<b>x</b></script><script>alert(1)</script>$a$"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "made", full_summary(), previews(), morph())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "plain", plain_summary(), previews())


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_trial_is_a_point_of_the_page(report: Path, plain: Path) -> None:
    for page, summary in ((report, full_summary()), (plain, plain_summary())):
        assert points(figures(page.read_text())["fd"][0]) >= {(t["omega"], t["distance"]) for t in summary["trials"]}


def test_base_line_lies_at_the_base_value_and_chosen_point_is_ringed(plain: Path) -> None:
    data = figures(plain.read_text())["fd"][0]["data"]
    (line,) = [t for t in data if t["name"].startswith("base")]
    assert (line["x"], line["y"], line["line"]["dash"]) == ([-1, 2], [BASE, BASE], "dash")
    (mark,) = [t for t in data if t["name"].startswith("chosen")]
    assert (mark["x"], mark["y"]) == ([1.0], [plain_summary()["selected"]["distance"]])


def test_error_bars_are_95_percent_intervals(report: Path) -> None:
    bars = [t["error_y"]["array"] for t in figures(report.read_text())["fd"][0]["data"] if "error_y" in t]
    assert len(bars) == 12
    assert all(bar == pytest.approx(1.96 * 0.2, rel=1e-4) for array in bars for bar in array)


def test_summary_of_the_first_version_has_no_panel_without_values(plain: Path, report: Path) -> None:
    assert figures(plain.read_text()).keys() == {"fd", "map", "cost", "loss"}
    assert figures(report.read_text()).keys() == {"fd", "map", "cost", "precision", "curves", "loss"}


def test_distances_that_are_missing_or_infinite_leave_a_readable_page(tmp_path: Path) -> None:
    odd = [trial(3.0, b, 2000, d) for b, d in ((20.0, None), (40.0, float("inf")), (80.0, float("nan")))]
    html = write_report(tmp_path, plain_summary(trials=plain_summary()["trials"] + odd), previews()).read_text()
    assert "NaN" not in json.dumps(figures(html))


def test_text_is_escaped(tmp_path: Path) -> None:
    summary = plain_summary(name=EVIL, metric=EVIL, versions={EVIL: EVIL}, settings={EVIL: EVIL}, stages_s={EVIL: 1.0})
    summary["losses"] = {EVIL: summary["losses"]["base"]}
    summary["selected"] = {**summary["selected"], "metric": EVIL}
    clean = Reader(write_report(tmp_path / "clean", plain_summary(), previews()).read_text())
    evil_page = write_report(tmp_path / "evil", summary, previews(EVIL.replace("/", "|"))).read_text()
    evil = Reader(evil_page)
    assert len(evil.of("script")) == len(clean.of("script")) == 3
    assert not evil.of("b")
    assert EVIL in "".join(text for tag, text in evil.texts if tag == "h1")
    assert "<b>" not in json.dumps(figures(evil_page))


def test_page_references_nothing_outside_itself_and_stays_below_12_mb(report: Path) -> None:
    html = report.read_text()
    page = Reader(html)
    references = [a.get(k) for _, a in page.tags for k in ("src", "href", "srcset", "poster", "data") if a.get(k)]
    assert references
    assert all(str(reference).startswith("data:") for reference in references)
    assert "@import" not in html.split("<body>")[0]
    assert "url(" not in html.split("<body>")[0]
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert str(policy).startswith("default-src 'none'")
    assert len(html) < 12e6


def test_page_has_headings_alternative_texts_captions_and_scopes(report: Path) -> None:
    page = Reader(report.read_text())
    assert len(page.of("h1")) == 1
    assert len(page.of("h2")) == 6
    assert len(page.of("img")) == 3 + 7
    assert all(image["alt"] for image in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))


def test_csvs_read_back_to_the_exact_numbers(report: Path) -> None:
    summary = full_summary()
    for found, expected in zip(_read(report.parent / "table.csv"), summary["table"], strict=True):
        assert found["model"] == expected["model"]
        for key in ("omega", "distance", "spread", "gain", "budget_kimg", "n_s", "evaluations_per_image", "minimum"):
            assert (float(found[key]) if found[key] else None) == expected.get(key)
        assert [float(found[f"block_{i}"]) for i in (1, 2, 3)] == expected["blocks"]
        low = (expected.get("difference") or {}).get("low")
        assert (float(found["difference_low"]) if found["difference_low"] else None) == low
    for found, expected in zip(_read(report.parent / "trials.csv"), summary["trials"], strict=True):
        for key in ("omega", "budget_kimg", "n_s", "distance", "nimg", "nfe", "worker_s", "standard_error"):
            assert (float(found[key]) if found[key] else None) == expected[key]
        assert float(found["recall"]) == expected["measures"]["recall"]


def test_every_plot_has_a_png_and_a_csv_of_its_points(report: Path) -> None:
    names = {p.name for p in report.parent.iterdir()}
    stems = {p.stem for p in report.parent.glob("*.csv")} - {"table", "trials"}
    assert len(stems) == sum(map(len, figures(report.read_text()).values()))
    assert {f"{stem}.png" for stem in stems} <= names
    assert not any(name.startswith(".") for name in names)
    for name in names:
        if name.endswith(".png"):
            Image.open(io.BytesIO((report.parent / name).read_bytes())).load()
    rows = _read(report.parent / "fd_vs_omega.csv")
    drawn = {(float(r["strength: ω of SIMS, w of Neon"]), float(r[f"{METRIC} (lower is better)"])) for r in rows}
    assert drawn >= {(t["omega"], t["distance"]) for t in full_summary()["trials"]}
    cells = [r for r in _read(report.parent / "heat_map_sims_2000.csv") if not r["note"]]
    assert len(cells) == 3 * 6  # three budgets; base, auxiliary and four strengths measured in full


def test_run_without_losses_has_no_training_section(tmp_path: Path) -> None:
    page = write_report(tmp_path, plain_summary(losses={"base": []}), previews())
    assert not (tmp_path / "training_loss.png").exists()
    assert len(Reader(page.read_text()).of("h2")) == 4


def test_one_block_claims_no_spread(tmp_path: Path) -> None:
    rows = [{**row(m, 1.0, [d, d]), "blocks": [d], "spread": 0.0} for m, d in (("base", 7.4), ("SIMS", 3.9))]
    summary = plain_summary(table=rows, blocks=1)
    del summary["stages_s"]  # stage times are optional
    body = write_report(tmp_path, summary, previews()).read_text().split("<script", 1)[0]
    assert "\u00b1" not in body
    assert "spread is unknown" in body


def test_verdict_says_better_worse_or_unclear_as_the_blocks_do() -> None:
    base = row("base", 0.0, [7.3, 7.4, 7.5])
    better, worse = row("SIMS", 1.0, [3.8, 3.9, 4.0]), row("SIMS", 1.0, [8.8, 8.9, 9.0])
    unclear = row("SIMS", 1.0, [7.2, 7.35, 7.4])
    assert verdict(plain_summary(table=[base, better])).startswith(
        f"SIMS lowers {METRIC} from 7.40 to 3.90 (\u221247%)"
    )
    assert verdict(plain_summary(table=[base, worse])).startswith("SIMS does not help here")
    assert verdict(plain_summary(table=[base, unclear])).startswith("SIMS makes no clear difference")
    assert "below every base block" in evidence(plain_summary(table=[base, better]))
    assert "above every base block" in evidence(plain_summary(table=[base, worse]))
    assert "chance" in evidence(plain_summary(table=[base, unclear]))


def test_paired_interval_decides_where_there_is_one() -> None:
    def told(low: float | None, high: float | None) -> str:
        difference: dict[str, Any] = {"mean": -0.1, "low": low, "high": high, "confidence": 0.9}
        sims = row("SIMS", 1.0, [7.2, 7.3, 7.4], difference=difference)
        summary = plain_summary(table=[row("base", 0.0, [7.3, 7.4, 7.5]), sims])
        return f"{verdict(summary)} {evidence(summary)}"

    assert told(-0.12, -0.08).startswith("SIMS lowers")
    assert "90% interval from \u22120.120 to \u22120.0800" in told(-0.12, -0.08)
    assert "holds 0" in told(-0.2, 0.1)
    assert "the blocks overlap" in told(None, None)


def test_matched_bases_and_the_gain_on_selection_seeds_are_told_beside_the_gain() -> None:
    sentences = comparisons(full_summary())
    assert len(sentences) == 3
    assert "7.10" in sentences[0]
    assert "6.20" in sentences[1]
    assert "\u221252%" in sentences[2]
    assert "\u221247%" in sentences[2] and sentences[2].endswith("selection flattered it by the difference.")
    fresher = full_summary()
    next(row for row in fresher["table"] if row["model"] == "SIMS")["gain_selection"] = 0.4
    assert comparisons(fresher)[2].endswith("selection did not flatter it.")
    table = results_table(full_summary())
    sims = dict(zip(table.header, table.rows[4], strict=True))
    assert (sims["On selection seeds"], sims["Difference to base"]) == (
        "\u221252%",
        "\u22123.50 (\u22124.10 to \u22122.90)",
    )
    assert comparisons(plain_summary()) == []
    assert "Difference to base" not in results_table(plain_summary()).header


def test_stopped_trials_come_after_all_others_in_the_table() -> None:
    table = trials_table(full_summary())
    stopped = [cells[table.header.index("Stopped early")] for cells in table.rows]
    assert stopped == sorted(stopped)
    assert len(set(stopped)) == 2


def test_table_without_a_sims_row_is_refused() -> None:
    with pytest.raises(SimsError, match="'SIMS'"):
        verdict(plain_summary(table=[row("base", 0.0, [7.3, 7.4])]))


def test_numbers_keep_their_significant_digits() -> None:
    assert [number(x) for x in (None, 0.0, 0.012345, 3.9, 21234.6)] == ["\u2013", "0", "0.01235", "3.900", "21,235"]
    assert [percent(x) for x in (-0.47, 0.004, 1.88)] == ["\u221247%", "+0.4%", "+188%"]
