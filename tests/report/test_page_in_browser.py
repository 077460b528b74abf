"""The report as a person sees it: in Chromium, at desktop and phone width, in light and dark, opened as a file."""

from __future__ import annotations

import html.parser
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Browser, start_browser
from helpers.reported_run import make_eventful_run

from dpgen.report.writing import write_report

WIDTHS = {"desktop": 1280, "phone": 390}

# What JavaScript sees of the page: marks of its charts with their sizes, how wide things are, and contrasts.
PROBE = """
(() => {
  const drawn = [...document.querySelectorAll('svg path, svg rect, svg circle')].map(mark => {
    const box = mark.getBoundingClientRect();
    return [mark.closest('section').id, mark.getAttribute('class'), box.width, box.height, box.left, box.right];
  });
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const findBackground = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const contrasts = [...document.querySelectorAll('body *')].filter(node => node.checkVisibility()
      && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())).map(node => {
    const style = getComputedStyle(node), isDrawn = node instanceof SVGElement;
    const [a, b] = [isDrawn ? style.fill : style.color, findBackground(node)].map(luminance);
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.tagName, node.textContent.slice(0, 40)];
  });
  const width = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll('body *')].filter(node => !node.closest('.scroll, title')
      && node.getBoundingClientRect().right > width + 1).map(node => [node.tagName, node.className.toString()]);
  const ticks = [...document.querySelectorAll('svg.plot, svg.axis')].flatMap(chart => {
    const boxes = [...chart.querySelectorAll('text')].map(text => text.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
        && a.top < b.bottom - 2 && b.top < a.bottom - 2).map(b => [chart.getAttribute('aria-label'), a.left, b.left]));
  });
  return {drawn, outside, overlapping: ticks,
    worst: contrasts.sort((a, b) => a[0] - b[0])[0],
    scroll: [document.documentElement.scrollWidth, width],
    foreign: document.querySelectorAll('script, img, iframe, base, link, object, [onerror], [style]').length,
    refresh: document.querySelectorAll('meta[http-equiv=refresh]').length,
    background: getComputedStyle(document.body).backgroundColor,
    title: document.title, text: document.body.innerText};
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with start_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report on a run with deaths, retries, errors and hostile texts."""
    folder = tmp_path_factory.mktemp("run")
    run = make_eventful_run(folder / "run")
    write_report(run.path, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_the_page_is_drawn_and_readable(device: str, scheme: str, browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, width=WIDTHS[device], scheme=scheme)
    seen: dict[str, Any] = browser.evaluate(PROBE)
    browser.take_screenshot(tmp_path / f"{device}_{scheme}.png")

    for section, least in {
        "throughput": 3,
        "timeline": 20,
        "time": 5,
        "lengths": 10,
        "prompts": 10,
        "latencies": 4,
    }.items():
        visible = [mark for mark in seen["drawn"] if mark[0] == section and mark[2] > 0.5 and mark[3] > 0.5]
        assert len(visible) >= least, f"{section}: {visible}"
        assert max(right for *_, right in visible) - min(left for *_, left, _ in visible) > 0.7 * 0.4 * WIDTHS[device]
    for kind in ("k-start", "k-generate", "k-tail", "k-idle", "k-end", "restart"):
        assert any(mark[:2] == ["timeline", kind] and mark[2] > 1 for mark in seen["drawn"]), (
            f"no {kind} in the timeline"
        )
    assert seen["scroll"][0] <= seen["scroll"][1] == WIDTHS[device] and not seen["outside"], "something overflows"
    assert not seen["overlapping"], "texts of a chart lie over each other"
    assert seen["worst"][0] >= 4.5, "a text is hard to read"
    is_dark = sum(map(int, seen["background"][4:-1].split(","))) < 200
    assert is_dark == (scheme == "dark")
    assert count_colours(tmp_path / f"{device}_{scheme}.png") > 10, "the screenshot is blank"


def test_hostile_text_is_text(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, scheme="light")
    browser.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    seen = browser.evaluate(PROBE)
    assert (seen["foreign"], seen["refresh"]) == (0, 0), "text became elements"
    assert not browser.list_complaints(), "a dialog, an error, or a violation of the page's policy"
    assert browser.list_requests() == [page.as_uri()], "the page asks for nothing but itself"
    for text in ("</script><script>alert(1)</script>", "{{ 7 * 7 }} {% raw %} ]]> &amp;", "<style>body{display:none}"):
        assert text in seen["text"]
    assert "\\x1b[31mred" in seen["text"] and "\\u202e" in seen["text"], "control characters are shown as escapes"
    assert not set(seen["text"]) & {"\0", "\x1b", "\x07", "\u202e", "\u2066"}
    assert "org/<b>model</b>" in seen["text"] and "node-<0>" in seen["text"]


def test_the_page_of_a_thousand_ranks_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run", num_ranks=1_000)
    write_report(run.path, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 400_000
    browser.open(tmp_path / "report.html", width=390, scheme="light")
    seen = browser.evaluate(PROBE)
    assert seen["scroll"][0] <= 390 and not seen["outside"]
    assert "1,000 ranks" in seen["text"] and "24 ranks that generated for the shortest time" in seen["text"]
    assert browser.evaluate("document.querySelectorAll('svg.lane').length") == 25
    summary = [mark for mark in seen["drawn"] if mark[0] == "timeline" and mark[3] > 40]
    assert {mark[1] for mark in summary} >= {"k-start", "k-generate", "k-tail"}, "all ranks together are drawn"


class _TagChecker(html.parser.HTMLParser):
    """Check that elements are closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.problems.append(f"{tag} has an attribute twice: {names}")
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")


def test_the_page_is_valid_and_has_a_strict_policy(browser: Browser, page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    checker = _TagChecker()
    checker.feed(content)
    assert not checker.problems and not checker.open
    assert "default-src 'none'; style-src 'sha256-" in content and "unsafe" not in content
    browser.open(page, width=1280, scheme="light")
    assert browser.evaluate("document.compatMode") == "CSS1Compat"
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))


def count_colours(path: Path) -> int:
    """Return how many colours a picture has, of those that at least 50 of its pixels have."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).reshape(-1, 3).astype(np.int64)
    _, counts = np.unique(pixels @ np.array([65_536, 256, 1]), return_counts=True)
    return int((counts >= 50).sum())
