"""The pages in a real browser, headless Chromium, with a real server and origin.

The tests are skipped if Chromium is missing, but fail if CI is set in the environment.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, Request, Response, sync_playwright

import pipe
from tests import media
from tests.origin import Origin, Playlist, StallHeaders, Status
from tests.server import Site

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
        assert "CI" not in os.environ, f"CI must install {CHROMIUM}"
        pytest.skip(f"needs {CHROMIUM}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(autouse=True, scope="module")
def _browser_before_each_test(browser: Browser) -> None:
    """Start the browser before any test, because its threads may outlive each of them."""


class Visit:
    """An open page, its requests, and the messages and errors of the browser."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.requested: list[str] = []
        self.fetched: list[str] = []  # requested by the page's script
        self.messages: list[str] = []
        page.on("request", self._note)
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("requestfailed", lambda r: self.messages.append(f"failed: {r.url} {r.failure}"))
        page.goto(address)

    def _note(self, request: Request) -> None:
        self.requested.append(request.url)
        if request.resource_type == "fetch":
            self.fetched.append(request.url)

    def measure(self, script: str) -> Any:
        return self.page.evaluate(script)

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Wait, while the browser runs, until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
            self.page.wait_for_timeout(50)


Scheme = Literal["light", "dark"]
Look = Callable[..., Visit]


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Opens an address: `look(site.url, width=390, scheme="dark")`."""
    contexts = []

    def start(
        address: str,
        width: int = 1280,
        scheme: Scheme = "light",
        *,
        height: int = 900,
        has_script: bool = True,
        agent: str | None = None,
    ) -> Visit:
        size: Any = {"width": width, "height": height}
        context = browser.new_context(
            viewport=size, color_scheme=scheme, java_script_enabled=has_script, user_agent=agent
        )
        contexts.append(context)
        return Visit(context.new_page(), address)

    yield start
    for context in contexts:
        context.close()


Serve = Callable[..., Site]


def live(origin: Origin, name: str = "news") -> str:
    """A live channel whose segments are large enough for a visible chart."""
    segments = [media.padded(segment, 120_000) for segment in media.ts_segments(8)]
    return origin.add(Playlist(name, segments, mode="live", window=5, clock=True)).url


def many_streams(origin: Origin, count: int) -> dict[str, object]:
    """`count` streams: a live one, a failing one with a long title, and others never opened."""
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
    """A server with 1, 12 or 100 streams: the first has a viewer, the second has failed."""
    site = serve(many_streams(origin, request.param), server={"name": "Living room"})
    site.watch("/news").read(188)
    assert request.param == 1 or site.get("/bad").status == 502
    return site


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_readable(busy: Site, look: Look, width: int, scheme: Scheme) -> None:
    visit = look(busy.url, width, scheme)
    assert visit.measure("document.documentElement.scrollWidth") <= width
    cards = visit.page.locator(".group li")
    assert cards.count() == len(busy.config.streams)
    for box in filter(None, (cards.nth(n).bounding_box() for n in range(min(cards.count(), 12)))):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    for color in ("h1", "h2", ".name", ".live", ".facts", "code", ".logo b", "#Viewers summary"):
        assert contrast(visit, color) >= 4.5, color
    if cards.count() > 1:
        for color in (".failed", ".note", "nav a", "nav b", "#Attention summary"):
            assert contrast(visit, color) >= 4.5, color
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        name = f"{len(busy.config.streams)}-{width}-{scheme}.png"
        shot = visit.page.screenshot(full_page=cards.count() <= 12)
        (Path(folder) / name).write_bytes(shot)
    assert visit.messages == []


def luminance(color: str) -> float:
    """The relative luminance, as defined by WCAG, of a color computed by the browser."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(visit: Visit, selector: str) -> float:
    """The contrast of a text to its background.

    One script reads both colors, because the page may replace the element between two calls.
    """
    ink, paper = visit.page.evaluate(
        """selector => {
            const element = document.querySelector(selector)
            let behind = element
            const color = at => getComputedStyle(at).backgroundColor
            while (color(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement
            return [getComputedStyle(element).color, color(behind)]
        }""",
        selector,
    )
    bright, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("busy", [12], indirect=True)
@pytest.mark.parametrize("width", [390, 1280])
def test_links_are_large_enough_for_fingers(busy: Site, look: Look, width: int) -> None:
    boxes = look(busy.url, width).measure(
        """[...document.querySelectorAll("a.button, .group li, input, button, summary")]
        .filter(each => each.offsetParent)
        .map(each => [each.outerHTML, each.offsetWidth, each.offsetHeight])"""
    )
    assert len(boxes) >= 12 + 3
    assert [box for box in boxes if min(box[1:]) < 44] == []


@pytest.mark.parametrize("busy", [12], indirect=True)
def test_page_requests_only_the_server_and_logs_no_errors(
    busy: Site, look: Look, origin: Origin
) -> None:
    before = len([r for r in origin.requests if not r.path.startswith("/news/")])
    visit = look(busy.url)
    updates = f"{busy.url}/status?active=1&html=1"
    visit.until(lambda: visit.requested.count(updates) >= 2, "the page requests updates")
    assert {url.rstrip("/") for url in visit.requested} == {busy.url, updates}
    assert visit.messages == []
    assert len([r for r in origin.requests if not r.path.startswith("/news/")]) == before


def test_page_updates_states_and_numbers_in_place(origin: Origin, serve: Serve, look: Look) -> None:
    """Updates keep the focus and the scroll position, and do not reload the page."""
    streams = {f"s{n}": NOWHERE for n in range(50)}
    bad = {"url": f"{origin.url}/bad.m3u8", "title": "Broken"}
    site = serve({**streams, "news": live(origin), "bad": bad})
    visit = look(site.url, 390)
    visit.page.locator("#news a").focus()
    place = visit.measure("scrollY")
    assert place > 100
    assert visit.page.locator("#news").inner_text().strip() == "NEWS\nnews"
    assert visit.page.locator("#Attention").is_hidden()
    site.watch("/news").read(188)
    origin.fault("/bad*", Status(404), times=None)
    assert site.get("/bad").status == 502
    visit.page.locator("#news .live").wait_for()
    visit.page.locator("#Attention a", has_text="Broken").wait_for(state="attached")
    assert "1 failed" in visit.page.locator("#Attention summary").inner_text()
    text = visit.page.locator("#news").inner_text()
    assert "1\u00a0viewer" in text
    visit.page.locator("#news path").wait_for(state="attached")
    assert "52 streams, 1 viewer" in visit.page.locator("#Summary").inner_text()
    assert "127.0.0.1" in (visit.page.locator("#Viewers").text_content() or "")
    assert visit.measure("document.activeElement.closest('li').id") == "news"
    assert visit.measure("document.querySelector('#news').getBoundingClientRect().top") > 0
    assert [url for url in visit.requested if "/status?" not in url] == [f"{site.url}/"]
    assert visit.messages == []


def test_hidden_page_sends_no_requests(serve: Serve, look: Look) -> None:
    """A page is hidden in a background tab or on a locked phone."""
    visit = look(serve({"news": NOWHERE}).url)
    visit.measure("""() => {
        Object.defineProperty(document, "hidden", {get: () => true})
        const real = setTimeout
        window.timers = 0
        window.setTimeout = (...given) => { window.timers++; return real(...given) }
    }""")
    before = len(visit.requested)
    visit.until(lambda: visit.measure("timers") >= 2, "the page's timer fires again")
    visit.page.wait_for_timeout(1000)
    assert visit.measure("timers") <= 3
    assert len(visit.requested) == before


def test_updates_cost_less_than_a_kilobyte_a_second(
    origin: Origin, serve: Serve, look: Look
) -> None:
    url = live(origin)
    site = serve({f"s{n}": url for n in range(60)})
    for n in range(60):
        site.watch(f"/s{n}").read(188)
    visit = look(site.url)
    sizes: list[int] = []
    times: list[float] = []

    def note(response: Response) -> None:
        if "/status?" in response.url:
            sizes.append(int(response.headers["content-length"]))
            times.append(time.monotonic())

    visit.page.on("response", note)
    visit.until(lambda: len(times) >= 2, "two updates arrive")
    assert sizes[0] / (times[1] - times[0]) < 1000


@pytest.mark.parametrize("token", [None, "a b&c"], ids=["open", "with token"])
def test_links_work(origin: Origin, serve: Serve, look: Look, token: str | None) -> None:
    site = serve({"news": live(origin)}, server={"token": token})
    visit = look(f"{site.url}/?token=a+b%26c")
    card = visit.page.locator("#news").bounding_box()
    assert card
    visit.page.mouse.click(card["x"] + card["width"] / 2, card["y"] + 3)  # anywhere on it
    visit.page.wait_for_url(re.compile("/news"))
    assert visit.page.title() == "news - StreamPipe"
    with visit.page.expect_download(timeout=5000) as download:
        visit.page.locator(".player").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    address = text.split("\n")[2]
    assert visit.page.url == address
    assert site.watch(address.removeprefix(site.url)).read(188)[:1] == b"G"
    visit.page.get_by_text("All streams").click()
    visit.page.wait_for_url(re.compile("#news$"))
    assert visit.page.locator("li").count() == 1
    visit.until(lambda: any("/status?" in url for url in visit.requested), "an update is requested")
    assert not any("401" in words for words in visit.messages)


def selected_address(visit: Visit) -> Any:
    """The text that a click on the address selects for copying."""
    visit.page.locator("code").click()
    return visit.measure("getSelection().toString()")


def test_click_selects_the_address(origin: Origin, serve: Serve, look: Look) -> None:
    site = serve({"news": live(origin)})
    assert selected_address(look(site.url)) == f"{site.url}/playlist.m3u"
    assert selected_address(look(f"{site.url}/news", 390)) == f"{site.url}/news"


#### Many streams ####


def test_sixty_streams_are_easy_to_reach_on_a_phone(
    origin: Origin, serve: Serve, look: Look
) -> None:
    visit = look(serve(many_streams(origin, 60)).url, 390)
    assert visit.measure("document.documentElement.scrollHeight") < 6000
    assert shown_cards(visit) == 60
    for name in ("Films and series", "News"):
        visit.page.locator("nav a", has_text=name).click()
        visit.page.wait_for_url(re.compile("group=" + name.partition(" ")[0]))
        heading = visit.page.locator("h2:visible")
        assert heading.all_inner_texts() == [name]
        assert 0 < shown_cards(visit) < 30
    visit.page.locator("nav a", has_text="All").click()
    visit.page.wait_for_url(re.compile("/#$"))
    assert shown_cards(visit) == 60


def shown_cards(visit: Visit) -> int:
    return visit.page.locator("#List li:visible").count()


def three_hundred() -> dict[str, object]:
    """300 streams in twelve groups."""
    return {
        f"s{n}": {
            "url": NOWHERE,
            "title": f"Kanal {n} Zürich" if n == 217 else f"Channel {n}",
            "number": n,
            "group": f"Group {(n - 1) // 25}",
        }
        for n in range(1, 301)
    }


@pytest.mark.parametrize("extra", [0, 300], ids=["three hundred", "six hundred"])
def test_playing_streams_are_listed_until_a_group_is_chosen(
    origin: Origin, serve: Serve, look: Look, extra: int
) -> None:
    more = {f"x{n}": {"url": NOWHERE, "group": "More"} for n in range(extra)}
    site = serve({**three_hundred(), **more, "news": {"url": live(origin), "title": "The News"}})
    visit = look(site.url)
    playing = visit.page.locator("#Playing li")
    assert playing.count() == 0
    site.watch("/news").read(188)
    playing.wait_for()  # the page is not reloaded
    assert re.match(r"TN\s+The News\s+live\s.\s1\sviewer$", playing.inner_text())
    visit.page.locator("[type=search]").fill("kanal 217")
    visit.page.locator("#s217").wait_for()
    assert playing.is_hidden()
    visit.page.locator("[type=search]").fill("")
    playing.wait_for()
    visit.page.locator("nav a", has_text="Group 8").click()
    visit.page.wait_for_url(re.compile("group=Group%208"))
    visit.page.locator("#s217").wait_for()
    assert playing.is_hidden()
    visit.page.goto(site.url)
    playing.locator("a").click()
    visit.page.wait_for_url(re.compile("/news$"))


@pytest.fixture(params=[True, False], ids=["with script", "without"])
def has_script(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("width", [390, 1280])
def test_any_of_three_hundred_channels_is_two_steps_away(
    serve: Serve, look: Look, width: int, has_script: bool
) -> None:
    site = serve(three_hundred())
    visit = look(site.url, width, has_script=has_script)
    assert shown_cards(visit) == 0
    assert visit.measure("document.documentElement.scrollHeight") <= 1000
    visit.page.locator("nav a", has_text="Group 8").click()
    visit.page.wait_for_url(re.compile("group=Group%208"))
    assert shown_cards(visit) == 25
    assert visit.page.locator("#s217").is_visible()
    visit.page.locator("nav a", has_text="Group 9").click()
    visit.page.wait_for_url(re.compile("group=Group%209"))
    assert shown_cards(visit) == 25
    assert visit.page.locator("#s217").is_hidden()
    visit.page.locator("[type=search]").fill("zurich 217")
    if not has_script:
        visit.page.keyboard.press("Enter")
    visit.page.wait_for_url(re.compile("q=zurich"))
    assert shown_cards(visit) == 1
    visit.page.locator("[type=search]").fill("nobody")
    if not has_script:
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_url(re.compile("q=nobody"))
    visit.page.locator("#Nothing").wait_for()
    assert shown_cards(visit) == 0
    assert visit.messages == []


def test_search_finds_any_of_thousands(serve: Serve, look: Look, has_script: bool) -> None:
    """The page contains only the cards that match."""
    streams = {f"s{n}": {"url": NOWHERE, "group": f"Group {n % 7}"} for n in range(2000)}
    visit = look(serve(streams).url, has_script=has_script)
    assert visit.page.locator("#List li").count() == 0
    visit.page.locator("[type=search]").fill("S1234")
    if not has_script:
        visit.page.keyboard.press("Enter")
    visit.page.locator("#s1234").wait_for()
    assert visit.page.locator("#List li").count() == 1
    visit.page.locator("nav a", has_text="Group 3").click()
    visit.page.wait_for_url(re.compile("group=Group%203"))
    assert visit.page.locator(".group li").count() == 200
    assert "86 more" in visit.page.locator("#List").inner_text()


def test_search_results_are_in_view_despite_many_groups(serve: Serve, look: Look) -> None:
    streams = {f"s{n}": {"url": NOWHERE, "group": f"Group number {n % 60}"} for n in range(600)}
    visit = look(serve(streams).url, height=720)
    visit.page.locator("nav a", has_text="Group number 59").click()
    visit.page.locator("#s59").wait_for()
    visit.until(lambda: visit.measure("scrollY") > 0, "the page scrolls to the group")
    card = visit.page.locator("#s59").bounding_box()
    assert card
    assert 0 < card["y"] < 720
    visit.page.locator("[type=search]").fill("s123")
    visit.page.locator("#s123").wait_for()
    found = visit.page.locator("#s123").bounding_box()
    assert found
    assert 0 < found["y"] < 400


def test_search_works_again_after_a_proxy_answered_for_the_server(serve: Serve, look: Look) -> None:
    visit = look(serve(three_hundred()).url)
    bad = {"status": 502, "content_type": "text/html", "body": "<html>Bad gateway</html>"}
    visit.page.route("**/*q=*", lambda route: route.fulfill(**bad))
    with visit.page.expect_response("**/*q=*"):
        visit.page.locator("[type=search]").fill("zurich")
    visit.page.unroute("**/*q=*")
    visit.page.locator("[type=search]").fill("zurich 217")
    visit.page.locator("#s217").wait_for()
    assert shown_cards(visit) == 1


def test_chosen_group_is_marked_although_the_list_has_changed(serve: Serve, look: Look) -> None:
    site = serve(three_hundred())
    visit = look(site.url)
    extra = pipe.StreamSettings("x", (NOWHERE,), group="A new group")
    site.server.reload(replace(site.config, streams={"x": extra, **site.config.streams}))
    visit.page.locator("nav a", has_text="Group 8").click()
    visit.page.wait_for_url(re.compile("group=Group%208"))
    (marked,) = visit.page.locator("nav a[aria-current]").all_inner_texts()
    assert "Group 8" in marked


def test_group_chosen_just_after_typing_is_shown(serve: Serve, look: Look) -> None:
    visit = look(serve(three_hundred()).url)
    visit.measure("""() => {
        const search = document.querySelector("[type=search]")
        search.value = "kanal"
        search.oninput()
        document.querySelectorAll("nav a")[3].onclick()
    }""")
    visit.page.wait_for_url(re.compile("group=Group%203"))
    visit.page.wait_for_timeout(500)  # longer than a pause in typing
    assert "group=Group%203" in visit.page.url
    assert shown_cards(visit) == 25


def test_each_failed_stream_takes_one_line_on_a_phone(
    origin: Origin, serve: Serve, look: Look
) -> None:
    site = serve(many_streams(origin, 3))
    assert site.get("/bad").status == 502
    visit = look(site.url, 390)
    box = visit.page.locator("#Attention li").bounding_box()
    assert box
    assert box["height"] < 60
    assert visit.page.locator("#Attention li .failed").is_visible()
    assert visit.measure("document.documentElement.scrollWidth") <= 390


def test_long_titles_do_not_hide_the_arrows_of_zap_links(serve: Serve, look: Look) -> None:
    visit = look(
        f"{serve({'a': NOWHERE, 'b': {'url': NOWHERE, 'title': LONG}, 'c': NOWHERE}).url}/a"
    )
    link = visit.page.locator("[rel=next]")
    assert link.evaluate("link => link.scrollWidth <= link.clientWidth"), (
        "the arrow must not be cut off"
    )
    assert link.inner_text().endswith("\u203a")


#### Logos ####


def logo_box(visit: Visit, name: str) -> tuple[float, float]:
    size = "[image.getBoundingClientRect().width, image.naturalWidth]"
    width, natural = visit.page.locator(f"#{name} img").evaluate(f"image => {size}")
    return width, natural


def test_logo_covers_the_initials_unless_it_fails_to_load(
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
    assert logo_box(visit, "good") == (64, 90)
    assert logo_box(visit, "missing") == (0, 0), "a missing logo must not cover the initials"
    assert visit.page.locator("#missing .logo").inner_text() == "MC"
    assert [line for line in visit.messages if "404" not in line and "none.svg" not in line] == []
    logos = [request for request in origin.requests if request.path.endswith(".svg")]
    assert {request.path for request in logos} == {"/logo.svg", "/none.svg"}
    assert not any("referer" in request.headers for request in logos)


def test_initials_are_visible_until_the_logo_has_loaded(
    origin: Origin, serve: Serve, look: Look, has_script: bool
) -> None:
    square = "<svg xmlns='http://www.w3.org/2000/svg' width='30' height='30'/>"
    good = origin.add_file("/logo.svg", square.encode(), content_type="image/svg+xml")
    slow = origin.add_file("/slow.svg", square.encode(), content_type="image/svg+xml")
    stalled = origin.fault("/slow.svg", StallHeaders(), times=None)
    streams = {"good": {"url": NOWHERE, "logo": good}, "slow": {"url": NOWHERE, "logo": slow}}
    site = serve(streams)
    visit = look("about:blank", has_script=has_script)
    visit.page.goto(site.url, wait_until="commit")
    shown = "name => getComputedStyle(document.querySelector(`#${name} img`)).opacity"
    visit.page.locator("#good img").wait_for()
    visit.until(lambda: visit.page.evaluate(shown, "good") == "1", "the logo is visible")
    assert visit.page.evaluate(shown, "slow") == ("0" if has_script else "1")
    fit = "getComputedStyle(document.querySelector('#good img')).objectFit"
    assert visit.measure(fit) == "contain"
    stalled.clear()


def test_edges_of_all_cards_line_up(origin: Origin, serve: Serve, look: Look) -> None:
    """Cards of playing and failed streams are as wide as the others."""
    site = serve(many_streams(origin, 30))
    site.watch("/news").read(188)
    assert site.get("/bad").status == 502
    boxes = look(site.url).measure(
        """[...document.querySelectorAll(".group li")]
        .map(each => each.getBoundingClientRect())
        .map(box => [Math.round(box.left), Math.round(box.width)])"""
    )
    assert len(boxes) == 30
    assert len({left for left, _ in boxes}) == 5
    assert len({width for _, width in boxes}) <= 2, "widths may differ by rounding"


#### The watch page ####


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_watch_page_is_readable(busy: Site, look: Look, width: int, scheme: Scheme) -> None:
    visit = look(f"{busy.url}/news", width, scheme)
    assert visit.measure("document.documentElement.scrollWidth") <= width
    for color in ("h1", ".live", ".facts", ".button", "code", ".more"):
        assert contrast(visit, color) >= 4.5, color
    video = visit.page.locator("video").bounding_box()
    links = visit.page.locator("nav").bounding_box()
    assert video
    assert links
    assert video["width"] == width
    assert links["y"] + links["height"] <= 900, "the links must be visible without scrolling"


def test_browser_can_send_the_token_as_password(browser: Browser, serve: Serve) -> None:
    site = serve({"news": NOWHERE}, server={"token": "s3cret"})
    credentials: Any = {"username": "anybody", "password": "s3cret"}
    context = browser.new_context(http_credentials=credentials)
    page = context.new_page()
    answer = page.goto(site.url)
    assert answer
    assert answer.status == 200
    assert page.locator("li").count() == 1
    context.close()
