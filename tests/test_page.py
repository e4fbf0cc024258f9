"""The comparison page as a browser and a reader without a network see it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_compare import PYTHIA, make_result, make_run

from sinkpretrain import figures
from sinkpretrain.compare import compare

PROBE = {
    "first_mass": [0.3, 0.2],
    "prefix_mass": [0.3, 0.2],
    "column_mass": [0.1, 0.2],
    "sink_share": 0.4,
    "uniform_floor": 0.06,
    "entropy": [1.0, 2.0],
    "value_norm": [0.5, 0.4],
    "massive": [5.0, 80.0, 200.0],
    "norm": [1.0, 3.0, 2.0],
    "kurtosis": [3.0, 4.0, 5.0],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of section, and a name that would be markup if it were not escaped."""
    folder = tmp_path_factory.mktemp("page")
    settings = {"0+1024": 1235.0, "0+1024-nocolumn": 31000.0, "1+1023": 18.0, "2+1022": 18.0, "4+1020": 18.0}
    for name, mechanism in (("a", "vanilla"), ("<b>&", "zero_sink"), ("long-name-" * 8, "sink_tokens(n=1)")):
        make_result(folder / mechanism, mechanism, settings, PYTHIA, name=name)
        make_run(
            folder / "runs" / mechanism.partition("(")[0], mechanism.partition("(")[0], {"train_sha256": "1"}, PROBE
        )
    compare([folder], folder / "out")
    return folder / "out" / "index.html"


class Reader(HTMLParser):
    """Collects what the page refers to, its ids, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_outside_of_the_page_is_needed(page: Path) -> None:
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.references
    assert all(r.startswith(("#", "data:")) for r in reader.references), reader.references
    assert set(re.findall(r"url\(([^)#]*)", text)) <= {""}
    assert not re.search(r"@import|<script|<iframe|@font-face", text)
    targets = {r.removeprefix("#") for r in reader.references if r.startswith("#")}
    assert targets <= set(reader.ids)
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text


def test_every_colour_of_a_figure_follows_the_pages_scheme(page: Path) -> None:
    """A colour that is no variable would be as dark on dark as it is on light."""
    svgs = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(svgs) == 5
    for svg in svgs:
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", svg)) <= set()
        assert "var(--ink)" in svg
        assert "var(--series-" in svg
    for name, (light, dark) in figures.PALETTE.items():
        for colour, ground in ((light, "#ffffff"), (dark, "#14171a")):
            assert contrast(colour, ground) > (1.2 if name == "grid" else 2.0), (name, colour)
    assert contrast(figures.PALETTE["ink"][1], "#14171a") > 7


def contrast(a: str, b: str) -> float:
    """Ratio of relative luminances, as in WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here; apt-get install chromium")
    assert found, "CI must have Chromium: .ci/run installs it"
    return found


def browse(
    chromium: str, page: Path, width: int, dark: bool = False, extra: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """What a window of this width measures of the page, and what the console says.

    The page is in a frame, since a window of Chromium's is never narrower than 500 pixels.
    """
    framed, host = page.with_name("framed.html"), page.with_name("host.html")
    framed.write_text(page.read_text().replace("</body>", f"{extra}{MEASURE}</body>"))
    host.write_text(
        '<!DOCTYPE html><meta name="color-scheme" content="light dark">'
        '<script>addEventListener("message", e => document.title = e.data)</script>'
        f'<iframe src="framed.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    )
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom"),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000"),
            f"file://{host}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    measured: dict[str, Any] = json.loads(html.unescape(title[1]))
    return measured, re.findall(r"CONSOLE.*", done.stderr)


MEASURE = """<script>
  console.log("measured");
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll > *")
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + "." + e.className);
  parent.postMessage(JSON.stringify({inner: innerWidth, page: document.documentElement.scrollWidth, wide,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
    label: Math.max(...[...document.querySelectorAll("td.label:first-child")].map(e => e.offsetWidth)),
    text: Math.min(...[...document.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height))}), "*");
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_the_page_fits_its_window_in_both_schemes(page: Path, chromium: str, width: int, dark: bool) -> None:
    """No console message but our own, nothing wider than the window, and colours of the scheme that was asked for."""
    found, said = browse(chromium, page, width, dark)
    assert len(said) == 1, said
    assert "measured" in said[0]
    assert found["inner"] == width
    assert found["page"] <= width
    assert found["wide"] == []
    assert (found["ground"], found["ink"]) == (
        ("rgb(20, 23, 26)", "rgb(230, 232, 235)") if dark else ("rgb(255, 255, 255)", "rgb(36, 41, 47)")
    )
    assert found["label"] < width / 2  # the column that stays leaves room for those that scroll
    assert found["text"] > 8  # pixels: figures scroll on a phone rather than shrink


@pytest.mark.browser
def test_a_page_that_overflows_or_complains_would_be_noticed(page: Path, chromium: str) -> None:
    """The control of the test above."""
    extra = '<div style="width: 2000px">wide</div><script>console.error("wrong"); none.such</script>'
    found, said = browse(chromium, page, 390, extra=extra)
    assert len(said) == 3
    assert found["wide"] == ["DIV."]
    assert found["page"] > 390
