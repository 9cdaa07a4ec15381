"""Laws of the report: what the summary says is what the page, the plots and the CSVs say, and nothing is fetched."""

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sims_ray.errors import SimsError
from sims_ray.report.page import evidence, number, percent, verdict, write_report
from sims_ray.report.plots import omega_figure
from sims_ray.report.series import base_distance, log_ticks, needs_log, omega_series

METRIC = "fd_classifier@1k"
BASE = 7.4321
EVIL = "<b>x</b></script><script>alert(1)</script>$a$"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _trial(omega: float, budget_kimg: float | None, n_s: int | None, distance: float | None) -> dict[str, Any]:
    where = {"omega": omega, "budget_kimg": budget_kimg, "n_s": n_s}
    return {**where, "metric": METRIC, "distance": distance, "nimg": 1000}


def _row(model: str, omega: float, blocks: list[float]) -> dict[str, Any]:
    distance = float(np.mean(blocks))
    return {
        "model": model,
        "omega": omega,
        "budget_kimg": None if model == "base" else 40.0,
        "n_s": None if model == "base" else 4000,
        "distance": distance,
        "spread": float(np.std(blocks, ddof=1)),
        "blocks": blocks,
        "gain": 1 - distance / 7.4,
        "evaluations_per_image": 70 if model == "SIMS" else 35,
    }


def _summary(**changes: Any) -> dict[str, Any]:
    cells = [(o, b, n) for n in (2000, 4000) for b in (20.0, 40.0, 80.0) for o in (-1.0, 1.0, 2.0)]
    trials = [_trial(o, b, n, 4 + 3 * (o - 1) ** 2 + b / 70 + 100 / n) for o, b, n in cells]
    losses = [{"nimg": 5000 * i, "loss": 0.3 + 1 / (i * 7), "images_per_s": 2000.0} for i in range(1, 20)]
    return {
        "name": "digits",
        "metric": METRIC,
        "n_images": 1000,
        "blocks": 3,
        "num_real": 1797,
        "table": [
            _row("base", 0.0, [7.3, 7.4, 7.5]),
            _row("auxiliary", -1.0, [20.0, 21.0, 22.0]),
            _row("SIMS", 1.0, [3.8 + 1e-13, 3.9, 4.0]),
        ],
        "selected": trials[1],
        "trials": [_trial(0.0, None, None, BASE), *trials],
        "losses": {"base": losses, "auxiliary n_s=4000": losses[:8]},
        "settings": {"train": {"lr": 2e-3, "ema_rampup_ratio": None}, "name": "digits"},
        "versions": {"torch": "2.13.0"},
        "seeds": {"synthesis": [0, 4000], "selection": [10**9, 10**9 + 1000]},
        "stages_s": {"train base": 75.2},
        **changes,
    }


def _previews() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {m: rng.integers(0, 256, (16, 1, 8, 8), dtype=np.uint8) for m in ("base", "auxiliary", "SIMS")}


class _Reader(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def _figures(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found
    figures: dict[str, Any] = json.loads(found.group(1))
    return figures


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "made", _summary(), _previews())


def test_every_trial_is_a_point_of_the_page(report: Path) -> None:
    traces = _figures(report.read_text())["fd"]["data"]
    points = {(x, y) for trace in traces for x, y in zip(trace["x"], trace["y"], strict=True)}
    assert points >= {(t["omega"], t["distance"]) for t in _summary()["trials"]}


def test_base_line_lies_at_the_base_value_and_spans_the_sweep(report: Path) -> None:
    (line,) = [t for t in _figures(report.read_text())["fd"]["data"] if t["name"].startswith("base")]
    assert (line["x"], line["y"], line["line"]["dash"]) == ([-1, 2], [BASE, BASE], "dash")


def test_selected_point_is_marked(report: Path) -> None:
    (mark,) = [t for t in _figures(report.read_text())["fd"]["data"] if t["name"].startswith("chosen")]
    selected = _summary()["selected"]
    assert (mark["x"], mark["y"]) == ([selected["omega"]], [selected["distance"]])


def test_one_line_per_set_and_budget_each_through_the_base_point_in_order_of_omega() -> None:
    lines = omega_series(_summary()["trials"][::-1])
    assert len(lines) == 6 == len({line.label for line in lines}) == len({(li.color, li.dash) for li in lines})
    for line in lines:
        assert line.x == (-1.0, 0.0, 1.0, 2.0)
        assert line.y[1] == BASE


def test_sweep_without_omega_zero_has_no_base_line() -> None:
    trials = _summary()["trials"][1:]
    assert base_distance(trials) is None
    assert all(0.0 not in line.x for line in omega_series(trials))
    names = [trace["name"] for trace in omega_figure(_summary(trials=trials))["data"]]
    assert not any(name.startswith("base") for name in names)


def test_log_axis_is_chosen_beyond_a_decade_and_its_ticks_enclose_the_values() -> None:
    near = omega_series([_trial(1, 20, 10, 5), _trial(2, 20, 10, 45)])
    far = omega_series([_trial(1, 20, 10, 4), _trial(2, 20, 10, 66), _trial(3, 20, 10, None)])
    assert not needs_log(near)
    assert needs_log(far)
    assert log_ticks(far) == [2, 5, 10, 20, 50, 100]


def test_distances_that_are_missing_or_infinite_leave_a_readable_page(tmp_path: Path) -> None:
    odd = [_trial(3.0, 20.0, 2000, None), _trial(3.0, 40.0, 2000, float("inf")), _trial(3.0, 80.0, 2000, float("nan"))]
    html = write_report(tmp_path, _summary(trials=_summary()["trials"] + odd), _previews()).read_text()
    assert "NaN" not in json.dumps(_figures(html))


def test_text_is_escaped(tmp_path: Path) -> None:
    summary = _summary(name=EVIL, metric=EVIL, versions={EVIL: EVIL}, settings={EVIL: EVIL}, stages_s={EVIL: 1.0})
    summary["losses"] = {EVIL: summary["losses"]["base"]}
    summary["selected"] = {**summary["selected"], "metric": EVIL}
    clean = _Reader(write_report(tmp_path / "clean", _summary(), _previews()).read_text())
    evil = _Reader(write_report(tmp_path / "evil", summary, _previews()).read_text())
    assert len(evil.of("script")) == len(clean.of("script")) == 3
    assert not evil.of("b")
    assert EVIL in "".join(text for tag, text in evil.texts if tag == "h1")


def test_page_references_nothing_outside_itself(report: Path) -> None:
    html = report.read_text()
    page = _Reader(html)
    references = [a.get(k) for _, a in page.tags for k in ("src", "href", "srcset", "poster", "data") if a.get(k)]
    assert references
    assert all(str(reference).startswith("data:") for reference in references)
    assert "@import" not in html.split("<body>")[0]
    assert "url(" not in html.split("<body>")[0]
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert str(policy).startswith("default-src 'none'")


def test_page_has_headings_alternative_texts_captions_and_scopes(report: Path) -> None:
    page = _Reader(report.read_text())
    assert len(page.of("h1")) == 1
    assert len(page.of("h2")) == 5
    assert len(page.of("img")) == 3
    assert all(image["alt"] for image in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))


def test_csvs_read_back_to_the_exact_numbers(report: Path) -> None:
    summary = _summary()
    with (report.parent / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, summary["table"], strict=True):
        assert row["model"] == expected["model"]
        for key in ("omega", "distance", "spread", "gain", "budget_kimg", "n_s", "evaluations_per_image"):
            assert (float(row[key]) if row[key] else None) == expected[key]
        assert [float(row[f"block_{i}"]) for i in (1, 2, 3)] == expected["blocks"]
    with (report.parent / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    for trial, expected in zip(trials, summary["trials"], strict=True):
        for key in ("omega", "budget_kimg", "n_s", "distance", "nimg"):
            assert (float(trial[key]) if trial[key] else None) == expected[key]


def test_pngs_decode_and_leftovers_do_not_stay(report: Path) -> None:
    names = {"fd_vs_omega.png", "training_loss.png", *(f"samples-{m}.png" for m in _previews())}
    assert {p.name for p in report.parent.iterdir()} == names | {"report.html", "table.csv", "trials.csv"}
    for name in names:
        Image.open(io.BytesIO((report.parent / name).read_bytes())).load()


def test_run_without_losses_has_no_training_section(tmp_path: Path) -> None:
    page = write_report(tmp_path, _summary(losses={"base": []}), _previews())
    assert not (tmp_path / "training_loss.png").exists()
    assert len(_Reader(page.read_text()).of("h2")) == 4


def test_one_block_claims_no_spread(tmp_path: Path) -> None:
    rows = [{**_row(m, 1.0, [d, d]), "blocks": [d], "spread": 0.0} for m, d in (("base", 7.4), ("SIMS", 3.9))]
    summary = _summary(table=rows, blocks=1)
    del summary["stages_s"]  # stage times are optional
    body = write_report(tmp_path, summary, _previews()).read_text().split("<script", 1)[0]
    assert "\u00b1" not in body
    assert "spread is unknown" in body


def test_verdict_says_better_worse_or_unclear_as_the_blocks_do() -> None:
    base = _row("base", 0.0, [7.3, 7.4, 7.5])
    better, worse = _row("SIMS", 1.0, [3.8, 3.9, 4.0]), _row("SIMS", 1.0, [8.8, 8.9, 9.0])
    unclear = _row("SIMS", 1.0, [7.2, 7.35, 7.4])
    assert verdict(_summary(table=[base, better])).startswith(f"SIMS lowers {METRIC} from 7.40 to 3.90 (\u221247%)")
    assert verdict(_summary(table=[base, worse])).startswith("SIMS does not help here")
    assert verdict(_summary(table=[base, unclear])).startswith("SIMS makes no clear difference")
    assert "below every base block" in evidence(_summary(table=[base, better]))
    assert "above every base block" in evidence(_summary(table=[base, worse]))
    assert "chance" in evidence(_summary(table=[base, unclear]))


def test_table_without_a_sims_row_is_refused() -> None:
    with pytest.raises(SimsError, match="'SIMS'"):
        verdict(_summary(table=[_row("base", 0.0, [7.3, 7.4])]))


def test_numbers_keep_their_significant_digits() -> None:
    assert [number(x) for x in (None, 0.0, 0.012345, 3.9, 21234.6)] == ["\u2013", "0", "0.01235", "3.900", "21,235"]
    assert [percent(x) for x in (-0.47, 0.004, 1.88)] == ["\u221247%", "+0.4%", "+188%"]


def test_page_opens_in_chromium_without_console_errors(report: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Chromium: install it, or name it in the environment variable CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        for width, scheme in ((1280, "light"), (390, "dark")):
            _check_page(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), report)
        browser.close()


def _check_page(page: Any, report: Path) -> None:
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2")
    page.wait_for_load_state("networkidle")
    boxes = page.eval_on_selector_all(
        ".js-plotly-plot",
        "all => all.map(plot => { const box = plot.querySelector('svg.main-svg').getBoundingClientRect();"
        " return [box.width, box.height, plot.querySelectorAll('.scatterlayer .trace').length]; })",
    )
    assert len(boxes) == 2
    assert all(width > 200 and height > 200 and traces > 1 for width, height, traces in boxes)
    assert page.evaluate("[...document.images].length === 3 && [...document.images].every(i => i.naturalWidth > 0)")
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()
