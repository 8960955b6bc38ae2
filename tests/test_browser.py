"""The page for people in a real browser, headless Chromium; server and origin are real, too.

Where Chromium is missing the tests are skipped, but not with CI in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests import media
from tests.origin import Origin, Playlist, Status
from tests.server import Site
from tests.test_sharing import eventually

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NOWHERE = "http://origin.example/x.m3u8"
LONG = (
    "The channel with a title that is far too long for any card, Donaudampfschifffahrtsgesellschaft"
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        assert "CI" not in os.environ, f"{CHROMIUM} must be there"
        pytest.skip(f"needs {CHROMIUM}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(autouse=True, scope="module")
def _browser_before_each_test(browser: Browser) -> None:
    """Its threads are older than any test, and may outlive it."""


class Visit:
    """A page that is looked at, and what the browser says and asks for meanwhile."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.asked: list[str] = []
        self.said: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("requestfailed", lambda request: self.said.append(f"failed: {request.url}"))
        page.goto(address)

    def measure(self, script: str) -> Any:
        return self.page.evaluate(script)


Scheme = Literal["light", "dark"]
Look = Callable[..., Visit]


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Open an address: `look(site.url, width=390, scheme="dark")`."""
    contexts = []

    def start(address: str, width: int = 1280, scheme: Scheme = "light") -> Visit:
        size: Any = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        return Visit(contexts[-1].new_page(), address)

    yield start
    for context in contexts:
        context.close()


Serve = Callable[..., Site]


def live(origin: Origin, name: str = "news") -> str:
    """A channel of large segments, for a chart that has something to show."""
    segments = [media.padded(segment, 120_000) for segment in media.ts_segments(8)]
    return origin.add(Playlist(name, segments, mode="live", window=5, clock=True)).url


def many_streams(origin: Origin, count: int) -> dict[str, object]:
    """A live one, a failing one, one of a long title, and as many others."""
    origin.fault("/bad*", Status(503), times=None)
    groups = ["News", "Sport", "Films and series", None]
    streams: dict[str, object] = {
        "news": {"url": live(origin), "title": "World News", "group": "News"},
        "bad": {"url": f"{origin.url}/bad.m3u8", "title": LONG, "group": "Sport"},
    }
    for number in range(3, count + 1):
        group = groups[number % len(groups)]
        streams[f"s{number}"] = {
            "url": NOWHERE,
            "title": f"Channel {number}" if number % 5 else LONG,
            **({"group": group} if group else {}),
        }
    return dict(list(streams.items())[:count])


@pytest.fixture(params=[1, 12, 100], ids="{} streams".format)
def busy(request: pytest.FixtureRequest, origin: Origin, serve: Serve) -> Site:
    """A server of as many streams: the first is watched, the second has failed."""
    site = serve(many_streams(origin, request.param), server={"name": "Living room"})
    site.watch("/news").read(188)
    assert request.param == 1 or site.get("/bad").status == 502
    return site


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_readable(busy: Site, look: Look, width: int, scheme: Scheme) -> None:
    visit = look(busy.url, width, scheme)
    assert visit.measure("document.documentElement.scrollWidth") <= width
    cards = visit.page.locator("li")
    assert cards.count() == len(busy.config.streams)
    for box in filter(None, (cards.nth(n).bounding_box() for n in range(min(cards.count(), 12)))):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    for color in ("h1", "h2", ".name b", ".state", ".facts", "a"):
        assert contrast(visit, color) >= 4.5, color
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        name = f"{len(busy.config.streams)}-{width}-{scheme}.png"
        shot = visit.page.screenshot(full_page=cards.count() <= 12)
        (Path(folder) / name).write_bytes(shot)
    assert visit.said == []


def luminance(color: str) -> float:
    """As the WCAG define it, of a color the browser computed."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(visit: Visit, selector: str) -> float:
    """Of a text to what lies behind it."""
    ink, paper = visit.page.locator(selector).first.evaluate(
        """element => {
            let behind = element
            const color = at => getComputedStyle(at).backgroundColor
            while (color(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement
            return [getComputedStyle(element).color, color(behind)]
        }"""
    )
    bright, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("busy", [12], indirect=True)
@pytest.mark.parametrize("width", [390, 1280])
def test_links_are_large_enough_for_fingers(busy: Site, look: Look, width: int) -> None:
    box = look(busy.url, width).page.locator("a").first.bounding_box()
    assert box
    assert min(box["width"], box["height"]) >= 40


@pytest.mark.parametrize("busy", [12], indirect=True)
def test_nothing_leaves_the_server_and_nothing_is_complained_about(
    busy: Site, look: Look, origin: Origin
) -> None:
    before = len([r for r in origin.requests if not r.path.startswith("/news/")])
    visit = look(busy.url)
    with visit.page.expect_navigation():  # the page's own refresh
        pass
    assert len(visit.asked) >= 2
    assert {url.rstrip("/") for url in visit.asked} == {busy.url}
    assert visit.said == []
    assert len([r for r in origin.requests if not r.path.startswith("/news/")]) == before


def test_chart_shows_a_viewers_traffic_after_a_refresh(
    origin: Origin, serve: Serve, look: Look
) -> None:
    site = serve({"news": live(origin)})
    visit = look(site.url)
    bars = visit.page.locator("#news svg rect")
    assert bars.count() == 0
    assert "idle" in visit.page.locator("#news").inner_text()
    site.watch("/news").read(188)

    def has_bar() -> bool:
        visit.page.reload()
        return bars.count() > 0

    eventually(has_bar, "the chart has a bar")
    box = bars.first.bounding_box()
    assert box
    assert box["height"] >= 10
    text = visit.page.locator("#news").inner_text()
    assert "live" in text
    rate = re.search(r"(\d+\.\d) Mbit/s", text)
    assert rate
    assert float(rate[1]) > 0


@pytest.mark.parametrize("token", [None, "a b&c"], ids=["open", "with token"])
def test_links_work(origin: Origin, serve: Serve, look: Look, token: str | None) -> None:
    site = serve({"news": live(origin)}, server={"token": token})
    visit = look(f"{site.url}/?token=a+b%26c")
    playlist = visit.page.locator("#news a", has_text="m3u")
    with visit.page.expect_download(timeout=5000) as download:
        playlist.click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    href = visit.page.locator("#news a").first.get_attribute("href")
    assert href
    assert text.split("\n")[2] == href
    assert site.watch(href.removeprefix(site.url)).read(188)[:1] == b"G"


def test_page_asks_for_the_password_where_there_is_a_token(browser: Browser, serve: Serve) -> None:
    site = serve({"news": NOWHERE}, server={"token": "s3cret"})
    credentials: Any = {"username": "anybody", "password": "s3cret"}
    context = browser.new_context(http_credentials=credentials)
    page = context.new_page()
    answer = page.goto(site.url)
    assert answer
    assert answer.status == 200
    assert page.locator("li").count() == 1
    context.close()
