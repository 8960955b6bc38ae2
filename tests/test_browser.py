"""The pages for people in a real browser, headless Chromium; server and origin are real, too.

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
        page.on("requestfailed", lambda r: self.said.append(f"failed: {r.url} {r.failure}"))
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
    for color in ("h1", "h2", ".name a", ".live", ".facts", ".player", "code", ".logo b"):
        assert contrast(visit, color) >= 4.5, color
    if cards.count() > 1:
        for color in (".failed", ".note", ".groups a", ".groups b", ".quiet .name a"):
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
    touched = look(busy.url, width).page.locator("a.button:visible, li")
    boxes = [touched.nth(n).bounding_box() for n in range(touched.count())]
    assert len(boxes) >= 12 + 3
    assert all(box and min(box["width"], box["height"]) >= 40 for box in boxes)


@pytest.mark.parametrize("busy", [12], indirect=True)
def test_nothing_leaves_the_server_and_nothing_is_complained_about(
    busy: Site, look: Look, origin: Origin
) -> None:
    before = len([r for r in origin.requests if not r.path.startswith("/news/")])
    visit = look(busy.url)
    with visit.page.expect_navigation(timeout=60_000):  # the page's own refresh
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
    rate = re.search(r"(\d+(?:\.\d)?) [kM]bit/s", text)
    assert rate
    assert float(rate[1]) > 0


@pytest.mark.parametrize("token", [None, "a b&c"], ids=["open", "with token"])
def test_links_work(origin: Origin, serve: Serve, look: Look, token: str | None) -> None:
    site = serve({"news": live(origin)}, server={"token": token})
    visit = look(f"{site.url}/?token=a+b%26c")
    playlist = visit.page.locator("#news .player")
    with visit.page.expect_download(timeout=5000) as download:
        playlist.click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    address = text.split("\n")[2]
    assert site.watch(address.removeprefix(site.url)).read(188)[:1] == b"G"
    card = visit.page.locator("#news").bounding_box()
    assert card
    visit.page.mouse.click(card["x"] + card["width"] / 2, card["y"] + 3)  # the whole card
    visit.page.wait_for_url(address)
    assert visit.page.title() == "news - StreamPipe"
    visit.page.get_by_text("All streams").click()
    visit.page.wait_for_url(re.compile("#news$"))
    assert visit.page.locator("li").count() == 1


def address_shown(visit: Visit) -> Any:
    """What is selected, and can be copied, once the address is touched."""
    visit.page.locator("code").click()
    return visit.measure("getSelection().toString()")


def test_address_is_selected_by_a_touch(origin: Origin, serve: Serve, look: Look) -> None:
    site = serve({"news": live(origin)})
    assert address_shown(look(site.url)) == f"{site.url}/playlist.m3u"
    assert address_shown(look(f"{site.url}/news", 390)) == f"{site.url}/news"


#### Many streams ####


def test_sixty_streams_are_not_far_away_on_a_phone(
    origin: Origin, serve: Serve, look: Look
) -> None:
    visit = look(serve(many_streams(origin, 60)).url, 390)
    assert visit.measure("document.documentElement.scrollHeight") < 5000
    for name in ("Films and series", "News"):
        visit.page.locator(".groups a", has_text=name).click()
        heading = visit.page.locator("h2", has_text=name).bounding_box()
        links = visit.page.locator(".groups").bounding_box()
        assert heading
        assert links
        assert 0 <= links["y"] < 10, "they stay on top"
        assert links["y"] + links["height"] <= heading["y"] < 450


def test_small_groups_share_a_row(serve: Serve, look: Look) -> None:
    streams = {name: {"url": NOWHERE, "group": name} for name in "abcde"}
    sections = look(serve(streams).url).page.locator("section")
    boxes = [sections.nth(n).bounding_box() for n in range(5)]
    assert len({box["y"] for box in boxes if box}) == 1
    assert len({box["x"] for box in boxes if box}) == 5


@pytest.mark.parametrize("width", [390, 1280])
def test_refresh_keeps_the_place_and_can_be_stopped_at_once(
    serve: Serve, look: Look, width: int
) -> None:
    streams = {f"s{n}": {"url": NOWHERE, "group": f"Group {n // 5}"} for n in range(60)}
    visit = look(serve(streams).url, width)
    visit.page.locator(".groups a", has_text="Group 5").click()
    place = visit.measure("scrollY")
    assert place > 100
    with visit.page.expect_navigation(timeout=60_000):
        pass
    assert visit.measure("scrollY") == place
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_url(re.compile(r"\?refresh=0$"))
    assert visit.page.locator("meta[http-equiv]").count() == 0


#### Logos ####


def logo_box(visit: Visit, name: str) -> tuple[float, float]:
    size = "[image.getBoundingClientRect().width, image.naturalWidth]"
    width, natural = visit.page.locator(f"#{name} img").evaluate(f"image => {size}")
    return width, natural


def test_logo_lies_over_initials_that_show_where_it_does_not_load(
    origin: Origin, serve: Serve, look: Look
) -> None:
    wide = "<svg xmlns='http://www.w3.org/2000/svg' width='90' height='30'/>"
    good = origin.add_file("/logo.svg", wide.encode(), content_type="image/svg+xml")
    streams = {
        "good": {"url": NOWHERE, "logo": good},
        "missing": {"url": NOWHERE, "logo": f"{origin.url}/none.svg", "title": "My channel"},
    }
    visit = look(serve(streams).url)
    visit.page.wait_for_load_state("networkidle")
    assert logo_box(visit, "good") == (44, 90)
    assert logo_box(visit, "missing") == (0, 0), "it hides nothing"
    assert visit.page.locator("#missing .logo").inner_text() == "MC"
    assert [line for line in visit.said if "404" not in line and "none.svg" not in line] == []
    asked = [request for request in origin.requests if request.path.endswith(".svg")]
    assert {request.path for request in asked} == {"/logo.svg", "/none.svg"}
    assert not any("referer" in request.headers for request in asked)


#### The watch page ####


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_watch_page_is_readable(busy: Site, look: Look, width: int, scheme: Scheme) -> None:
    visit = look(f"{busy.url}/news", width, scheme)
    assert visit.measure("document.documentElement.scrollWidth") <= width
    for color in ("h1", ".live", ".facts", ".button", "code", ".more"):
        assert contrast(visit, color) >= 4.5, color
    video = visit.page.locator("video").bounding_box()
    links = visit.page.locator(".zap").bounding_box()
    assert video
    assert links
    assert video["width"] == pytest.approx(min(width - 32, 1200))
    assert links["y"] + links["height"] <= 900, "one need not scroll for them"


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
