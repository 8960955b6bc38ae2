"""Using the pages on a television or a phone, in headless Chromium, with a real server and origin.

A remote control has arrow keys, Enter, Back and perhaps keys for the channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page

from tests import media, test_browser
from tests.origin import Origin, Playlist, Status
from tests.server import Site
from tests.test_browser import Look, Visit

# Fixtures.
browser, look = test_browser.browser, test_browser.look
browser_before_each_test = test_browser._browser_before_each_test

Serve = Callable[..., Site]
TELEVISION = {"width": 1920, "height": 1080}
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0"
FIREFOX_ON_ANDROID = "Mozilla/5.0 (Android 15; Mobile; rv:144.0) Gecko/144.0 Firefox/144.0"

pytestmark = pytest.mark.long


def live(origin: Origin) -> str:
    made = Playlist("news", media.ts_segments(60), mode="live", window=6, clock=True)
    return origin.add(made).url


@pytest.fixture
def site(origin: Origin, serve: Serve) -> Site:
    """A server with 300 working channels in twelve groups."""
    url = live(origin)
    streams: dict[str, object] = {}
    for n in range(1, 301):
        group = f"Group {(n - 1) // 25}"
        streams[f"s{n}"] = {"url": url, "title": f"Channel {n}", "number": n, "group": group}
    return serve(streams)


def focused(page: Page) -> str:
    """The text of the focused element; empty if no element has the focus."""
    words = page.evaluate(
        "document.activeElement === document.body ? '' : document.activeElement.innerText"
    )
    return " ".join(str(words).split())


PLACE = """element => {
    const {left, top, width, height} = element.getBoundingClientRect()
    return [left + width / 2, top + height / 2]
}"""


def go_to(page: Page, selector: str) -> int:
    """Move the focus to an element with arrow keys, as a person would; returns the key presses."""
    target = page.locator(selector)
    for count in range(60):
        if target.evaluate("element => element === document.activeElement"):
            return count
        x, y = target.evaluate(PLACE)
        at_x, at_y = page.evaluate(f"({PLACE})(document.activeElement)")
        if focused(page) == "" or abs(y - at_y) > 12:
            key = "ArrowUp" if y < at_y and focused(page) else "ArrowDown"
        else:
            key = "ArrowRight" if x > at_x else "ArrowLeft"
        page.keyboard.press(key)
    raise AssertionError(f"{selector} cannot be reached; the focus is on {focused(page)!r}")


def test_remote_control_can_find_a_channel_and_zap(site: Site, look: Look) -> None:
    visit = look(site.url, **TELEVISION)
    page = visit.page
    presses = go_to(page, "nav a:has-text('Group 8')")
    page.keyboard.press("Enter")
    presses += go_to(page, "#s217 a")
    assert presses < 30
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/s217"))
    page.keyboard.press("ArrowDown")
    assert focused(page) == "\u2039 Channel 216", (
        "the first arrow key must reach the neighbouring channels"
    )
    page.keyboard.press("ArrowRight")
    assert focused(page) == "Channel 218 \u203a"
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/s218"))
    visit.until(
        lambda: focused(page) == "Channel 219 \u203a", "the next page focuses the same link"
    )
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/s219"))
    for number in (220, 221):
        page.keyboard.press("PageUp")
        page.wait_for_url(re.compile(f"/s{number}"))
    page.keyboard.press("PageDown")
    page.wait_for_url(re.compile("/s220"))
    page.go_back()
    page.wait_for_url(re.compile("group=Group%208"))
    visit.until(lambda: "Channel 220" in focused(page), "the focus is on the channel")
    box = page.locator("#s220").bounding_box()
    assert box
    assert 0 < box["y"] < 1000


def test_digits_find_a_channel_by_its_number(site: Site, look: Look) -> None:
    """Three digits and Enter open any channel; Back returns to the results of the search."""
    visit = look(site.url, **TELEVISION)
    page = visit.page
    for digit in "217":
        page.keyboard.press(digit)
    visit.until(
        lambda: focused(page) == "C217 Group 8 217 Channel 217", "the best match is focused"
    )
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/s217$"))
    page.keyboard.press("PageUp")
    page.wait_for_url(re.compile("/s218$"))
    page.go_back()
    page.wait_for_url(re.compile(r"\?q=217$"))
    visit.until(lambda: "Channel 217" in focused(page), "the result is focused again")


def test_digits_in_the_search_field_are_text(site: Site, look: Look) -> None:
    page = look(site.url).page
    page.locator("[type=search]").press_sequentially("group 11", delay=20)
    page.locator("#Found").wait_for()
    assert page.locator("[type=search]").input_value() == "group 11"
    groups = page.locator("#Found small").all_inner_texts()
    assert groups[:25] == ["Group 11"] * 25
    page.keyboard.press("Enter")
    page.locator("#Found a:focus").wait_for()
    assert "group+11" in page.url or "group%2011" in page.url


def test_remote_control_can_switch_the_sound_on(site: Site, look: Look) -> None:
    visit = look(f"{site.url}/s2", **TELEVISION)
    page = visit.page
    page.locator("#Sound").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "Switch the sound on"
    page.keyboard.press("Enter")
    page.locator("#Sound").wait_for(state="hidden")
    assert not page.evaluate("document.querySelector('video').muted")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "Channel 3 \u203a", "the next link to zap must have the focus"


def test_back_returns_from_a_group_to_all_groups(site: Site, look: Look) -> None:
    visit = look(site.url, **TELEVISION)
    page = visit.page
    go_to(page, "nav a:has-text('Group 8')")
    page.keyboard.press("Enter")
    visit.until(lambda: "Channel 201" in focused(page), "the first card is focused")
    page.go_back()
    page.locator("#Hint").wait_for()
    assert page.locator(".group li:visible").count() == 0


def test_back_focuses_a_channel_of_another_group(site: Site, look: Look) -> None:
    visit = look(f"{site.url}/?group=Group+8", **TELEVISION)
    page = visit.page
    page.locator("#s225 a").click()
    page.wait_for_url(re.compile("/s225$"))
    page.keyboard.press("PageUp")
    page.wait_for_url(re.compile("/s226$"))
    page.go_back()
    visit.until(lambda: "Channel 226" in focused(page), "the channel is focused in its group")
    page.wait_for_url(re.compile("Group%209"))


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (390, 844)])
def test_zap_links_stay_in_place(site: Site, look: Look, width: int, height: int) -> None:
    """The link for zapping must stay under a mouse, however long the neighbours' titles are."""
    places = []
    for name in ("s2", "s99", "s300"):
        box = look(f"{site.url}/{name}", width, height=height).page.locator("[rel=next]")
        places.append(box.bounding_box())
    assert places[0]
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(("key", "name"), [("ChannelUp", "s3"), ("ChannelDown", "s1")])
def test_channel_keys_of_a_remote_control_zap(site: Site, look: Look, key: str, name: str) -> None:
    page = look(f"{site.url}/s2").page
    page.evaluate(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
    page.wait_for_url(re.compile(f"/{name}$"))


def test_page_fills_a_television_with_large_text(site: Site, look: Look) -> None:
    visit = look(f"{site.url}/?group=Group+2", **TELEVISION)
    size = "parseFloat(getComputedStyle(document.querySelector('.name')).fontSize)"
    assert visit.measure(size) >= 24
    assert visit.measure("document.querySelector('main').offsetWidth") == 1920
    cards = visit.page.locator(".group li:visible")
    last = cards.nth(3).bounding_box()
    assert last
    assert last["x"] + last["width"] > 1850
    smaller = look(site.url, 1280)
    assert smaller.measure(size) == 16


@pytest.mark.parametrize(
    ("width", "height", "share"), [(1920, 1080, 0.8), (1280, 720, 0.75), (390, 844, 0.25)]
)
def test_video_is_as_large_as_the_window_allows(
    site: Site, look: Look, width: int, height: int, share: float
) -> None:
    visit = look(f"{site.url}/s2", width, height=height)
    box = visit.page.locator("video").bounding_box()
    assert box
    picture = min(box["width"], box["height"] * 16 / 9)
    assert picture * picture * 9 / 16 >= share * width * height
    links = visit.page.locator("nav").bounding_box()
    assert links
    assert links["y"] >= box["y"] + box["height"]
    assert links["y"] + links["height"] <= height


def await_picture(visit: Visit) -> None:
    playing = "document.querySelector('video')?.currentTime > 0"
    visit.until(lambda: bool(visit.measure(playing)), "the picture moves")


def test_sound_stays_on_from_channel_to_channel(site: Site, look: Look) -> None:
    visit = look(f"{site.url}/s2")
    page = visit.page
    sound = page.locator("#Sound")
    sound.wait_for()
    muted = "document.querySelector('video').muted"
    assert page.evaluate(muted)
    sound.click()
    sound.wait_for(state="hidden")
    assert not page.evaluate(muted)
    for name in ("s3", "s4"):
        page.keyboard.press("PageUp")
        page.wait_for_url(re.compile(f"/{name}$"))
        await_picture(visit)
        assert not page.evaluate(muted)
        assert sound.is_hidden()


def test_forbidden_sound_has_a_button(site: Site, look: Look) -> None:
    """Browsers forbid sound until the user has touched the page, although sound was on before."""
    visit = look(f"{site.url}/s2")
    visit.page.evaluate("sessionStorage.sound = 'on'")
    visit.page.reload()
    await_picture(visit)
    assert visit.page.locator("#Sound").is_visible()
    assert visit.measure("document.querySelector('video').muted")
    assert visit.messages == [] or not any("Error" in words for words in visit.messages)


@pytest.mark.parametrize(
    ("agent", "has_video"), [(FIREFOX, False), (FIREFOX_ON_ANDROID, True)], ids=["desktop", "phone"]
)
@pytest.mark.parametrize("has_script", [True, False], ids=["with script", "without"])
def test_firefox_on_a_desktop_offers_a_player_and_explains_why(
    site: Site, look: Look, agent: str, has_video: bool, has_script: bool
) -> None:
    page = look(f"{site.url}/s2", agent=agent, has_script=has_script).page
    assert page.locator("video").count() == has_video
    screen = page.locator(".screen")
    if not has_video:
        assert "Firefox on a desktop does not play" in screen.inner_text()
        assert screen.locator("a[download='s2.m3u']").is_visible()
        assert page.locator(".player").count() == 1, (
            "one button is enough: the one in the video's place"
        )


def test_error_page_works_without_script(origin: Origin, serve: Serve, look: Look) -> None:
    failing = origin.fault("/news/*", Status(404), times=None)
    site = serve({"news": live(origin), "other": live(origin)})
    visit = look(f"{site.url}/news", has_script=False)
    trouble = visit.page.locator("#Trouble")
    assert "The origin answered 404" in trouble.inner_text()
    assert "get a new one" in trouble.inner_text()
    before = visit.page.locator("nav").bounding_box()
    failing.clear()
    visit.page.wait_for_timeout(2500)  # a failure is remembered for two seconds
    trouble.locator("a").click()
    visit.page.locator("video").wait_for()
    assert visit.page.locator("#Trouble").count() == 0
    after = visit.page.locator("nav").bounding_box()
    assert before
    assert after
    assert abs(after["y"] - before["y"]) < 40, "the message must take about the space of the video"


def test_each_card_is_one_tab_stop(site: Site, look: Look) -> None:
    visit = look(f"{site.url}/?group=Group+2")
    visit.page.locator("#s51 a").focus()
    for number in (52, 53):
        visit.page.keyboard.press("Tab")
        assert focused(visit.page).endswith(f"Channel {number}")
