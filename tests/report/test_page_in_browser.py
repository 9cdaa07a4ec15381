"""Laws of the page in a real browser: keyboard alone reaches everything, nothing is fetched, nothing overflows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sims_ray.report import write_report
from tests.report.pages import chromium
from tests.report.summaries import full_summary, morph, previews

TABS = ("fd", "map", "cost", "precision", "curves")
SHOWN = "[...document.querySelectorAll('.frame')].filter(f => f.offsetParent).map(f => f.querySelector('img').src)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("browser"), full_summary(), previews(), morph())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    opened, errors, requests = _open(browser, report, 1280, "light")
    yield opened
    assert (errors, requests) == ([], [])
    opened.close()


def _open(browser: Any, report: Path, width: int, scheme: str) -> tuple[Any, list[str], list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    requests: list[str] = []
    local = ("file:", "data:", "blob:")
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(local) else requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#fd .main-svg")
    page.wait_for_selector("#loss .main-svg")
    return page, errors, requests


def test_slider_by_keyboard_shows_another_image_at_every_strength_and_says_which(page: Any) -> None:
    page.focus("#omega")
    page.keyboard.press("Home")
    images, words = [], []
    for _ in range(7):
        (image,) = page.evaluate(SHOWN)
        images.append(image)
        words.append(page.get_attribute("#omega", "aria-valuetext"))
        assert page.inner_text("#omega-words") == words[-1]
        page.keyboard.press("ArrowRight")
    assert len(set(images)) == 7
    assert words[0] == "ω = \u22121: the auxiliary alone"
    assert [w.split(": ")[1] for w in words[2:5]] == ["the base", "between base and chosen", "the chosen strength"]
    page.focus("[data-step='2']")
    page.keyboard.press("Enter")
    assert page.get_attribute("#omega", "aria-valuetext") == words[2]
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")


def test_tabs_by_keyboard_show_one_plot_each(page: Any) -> None:
    page.focus("#tab-fd")
    for step, tab in enumerate(TABS):
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.evaluate("[...document.querySelectorAll('.panel')].filter(p => p.offsetParent).map(p => p.id)") == [
            f"panel-{tab}"
        ]
        page.wait_for_selector(f"#{tab} .main-svg")
        assert page.evaluate("[...document.querySelectorAll('[role=tab]')].map(t => t.tabIndex)").index(0) == step
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-fd"
    for key, tab in (("End", "curves"), ("Home", "fd"), ("ArrowLeft", "curves")):
        page.keyboard.press(key)
        assert page.get_attribute(f"#tab-{tab}", "aria-selected") == "true"


def test_select_by_keyboard_draws_the_other_plot(page: Any) -> None:
    page.click("#tab-cost")
    page.wait_for_selector("#cost .main-svg")
    before = page.text_content("#cost .xtitle")
    page.focus("select[data-plot=cost]")
    page.keyboard.press("End")
    page.wait_for_function("before => document.querySelector('#cost .xtitle').textContent !== before", arg=before)
    assert "seconds" in page.text_content("#cost .xtitle")


def test_tab_key_reaches_slider_tabs_and_folds_with_a_visible_focus(page: Any) -> None:
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen = "const e = document.activeElement; return [e.id || e.tagName, getComputedStyle(e).outlineStyle]"
        name, outline = page.evaluate(f"(() => {{ {seen} }})()")
        reached.add(name)
        assert name == "BODY" or outline != "none"
    assert {"omega", "tab-fd", "panel-fd", "SUMMARY", "SELECT"} <= reached


def test_print_shows_every_plot_and_the_landmarks_of_the_slider(page: Any) -> None:
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    for tab in TABS:
        page.wait_for_selector(f"#{tab} .main-svg")
    assert len(page.evaluate("[...document.querySelectorAll('.panel')].filter(p => p.offsetParent)")) == 5
    assert len(page.evaluate(SHOWN)) == 3


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_does_not_overflow_and_text_has_contrast(
    browser: Any, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    page, errors, requests = _open(browser, report, width, scheme)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    for tab in TABS:
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#{tab} .main-svg")
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        box = page.locator(f"#{tab} .main-svg").first.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 200
    pairs = "['--ink', '--soft', '--accent'].map(c => [c, '--paper']).concat([['--ink', '--card']])"
    for pair in page.evaluate(f"{pairs}.map(p => p.map(c => getComputedStyle(document.body).getPropertyValue(c)))"):
        assert _contrast(*pair) >= 4.5
    page.screenshot(path=str(tmp_path / f"report-{width}-{scheme}.png"), full_page=True)
    if folder := os.environ.get("SIMS_RAY_SHOTS"):
        page.screenshot(path=f"{folder}/report-{width}-{scheme}.png", full_page=True)
    assert (errors, requests) == ([], [])
    page.close()


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb` (WCAG 2)."""
    digits = color.strip().lstrip("#")
    digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
