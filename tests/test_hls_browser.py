"""The watch page plays streams in a real browser, headless Chromium.

The tests are skipped if Chromium is missing, but fail if CI is set in the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests import media, test_browser
from tests.origin import Origin, Playlist, Segment, Status, master
from tests.program import Service
from tests.server import Site
from tests.test_browser import Look, Visit
from tests.test_proxies import free_port

# Fixtures.
browser, look = test_browser.browser, test_browser.look
browser_before_each_test = test_browser._browser_before_each_test

Serve = Callable[..., Site]

PAGES = 5  # open at once, each with its own channel
PLAYED = 15.0  # seconds that a page must play

pytestmark = pytest.mark.long


#### Channels ####


def ts(origin: Origin, name: str, **options: object) -> str:
    segments = media.ts_segments(60)
    made = Playlist(name, segments, mode="live", window=6, clock=True, **options)  # type: ignore[arg-type]
    return origin.add(made).url


def long_ts(origin: Origin, name: str) -> str:
    segments = [Segment(data, 4.0) for data in media.ts_segments(15, 4.0)]
    return origin.add(Playlist(name, segments, mode="live", window=6, clock=True)).url


def fmp4(origin: Origin, name: str) -> str:
    init, parts = media.fmp4(60)
    made = Playlist(name, parts, init=init, extension=".m4s", mode="live", window=6, clock=True)
    return origin.add(made).url


def encrypted(origin: Origin, name: str) -> str:
    return ts(origin, name, aes_key=b"0123456789abcdef")


def qualities(origin: Origin, name: str) -> str:
    segments = media.ts_segments(60)
    variants = {
        quality: Playlist(f"{name}-{quality}", segments, mode="live", window=6, clock=True)
        for quality in ("180p", "90p")
    }
    return origin.add(master(name, variants)).url


def discontinuous(origin: Origin, name: str) -> str:
    """A channel whose timestamps restart with every third segment."""
    segments = [
        Segment(data, discontinuity=number % 3 == 0)
        for number, data in enumerate(media.ts_segments(3) * 20)
    ]
    return origin.add(Playlist(name, segments, mode="live", window=6, clock=True)).url


CHANNELS = [ts, long_ts, fmp4, encrypted, qualities, discontinuous]


#### Chromium ####


# Waits until the video has played for this many more seconds, even if the page's script reloads it
# in the meantime.
WATCH = """([seconds, limit]) => new Promise(done => {
    const video = document.querySelector("video")
    let played = 0, last = video.currentTime
    video.addEventListener("timeupdate", () => {
        const step = video.currentTime - last
        if (step > 0 && step < 2) played += step
        last = video.currentTime
        if (played > seconds) done("")
    })
    const error = () => video.error?.message ?? "no error"
    setTimeout(() => done(`only ${played} of ${seconds} s, ${error()}`), 1000 * limit)
})"""


def assert_keeps_playing(visit: Visit, seconds: float = PLAYED, limit: float = 60.0) -> None:
    assert visit.page.evaluate(WATCH, [seconds, limit]) == "", reasons(visit)


def tries(visit: Visit) -> int:
    """How often the page's script has checked whether it can reload the video."""
    return sum(address.partition("?")[0].endswith(".m3u8") for address in visit.fetched)


def reasons(visit: Visit) -> list[str]:
    """The errors of the player in Chromium's developer tools."""
    found: list[str] = []
    tools = visit.page.context.new_cdp_session(visit.page)
    tools.on("Media.playerErrorsRaised", lambda event: found.append(json.dumps(event)))
    tools.send("Media.enable")
    return found


def assert_plays(visit: Visit, seconds: float = PLAYED) -> None:
    """Checks that the page plays this long, logs no errors and requests nothing unexpected.

    On a busy machine Chromium sometimes fails at the start of a channel with
    DEMUXER_ERROR_COULD_NOT_PARSE; the page's script then reloads the video once.  It is a bug of
    Chromium, at least in version 156: if the first segments take longer to load than to play,
    Chromium reloads the playlist before it has loaded all listed segments, and forgets the rest.
    If the new playlist adds a single segment, the gap before it is fatal.  A connection that
    delays each segment of 1 s by 0.5 s reproduces it on about every third page.
    """
    assert_keeps_playing(visit, seconds)
    assert tries(visit) <= 1, reasons(visit)
    assert visit.measure("document.querySelector('video').videoWidth") == media.WIDTH
    assert visit.measure("document.scripts.length") == 1
    aborted = re.compile("failed: .*ERR_ABORTED")  # Chromium often cancels a segment
    assert [words for words in visit.messages if not aborted.match(words)] == []
    server = visit.page.url.rpartition("/")[0]
    assert all(address.startswith((server, "data:")) for address in visit.requested)


@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_stream_address_opens_a_playing_page(
    origin: Origin,
    serve: Serve,
    look: Look,
    channel: Callable[[Origin, str], str],
    state: str,
) -> None:
    streams = {f"news-{number}": channel(origin, f"news-{number}") for number in range(PAGES)}
    site = serve(streams)
    if state == "warm":
        for name in streams:
            assert site.get(f"/{name}.m3u8").status == 200
    visits = [look(f"{site.url}/{name}") for name in streams]
    for visit in visits:
        assert_plays(visit)
    if shots := os.environ.get("SCREENSHOTS"):
        visits[0].page.screenshot(path=Path(shots) / f"watch-{channel.__name__}-{state}.png")


@pytest.fixture
def service(origin: Origin, tmp_path: Path) -> Service:
    return Service(tmp_path, {"news": ts(origin, "news")}, port=free_port())


def address_of(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}/news"


def test_page_keeps_playing_during_a_reload_of_the_configuration(
    origin: Origin, service: Service, look: Look
) -> None:
    with service:
        visit = look(address_of(service))
        assert_plays(visit, 3)
        service.configure({"news": f"{origin.url}/news/index.m3u8", "more": "http://h.example/x"})
        service.send(signal.SIGHUP)
        service.wait_for("reloaded")
        assert_keeps_playing(visit)


def test_page_recovers_from_an_outage_of_the_origin(
    origin: Origin, serve: Serve, look: Look
) -> None:
    site = serve({"news": ts(origin, "news")})
    visit = look(f"{site.url}/news")
    assert_plays(visit, 3)
    port = origin.port
    assert port
    origin.stop()
    visit.page.wait_for_timeout(8000)
    origin.start()
    assert_keeps_playing(visit)


def test_page_recovers_from_an_outage_longer_than_reconnect(
    origin: Origin, serve: Serve, look: Look
) -> None:
    """Chromium's player stops for good; the page's script reports it and retries."""
    site = serve({"news": ts(origin, "news")})
    visit = look(f"{site.url}/news")
    assert_plays(visit, 3)
    origin.stop()
    message = visit.page.locator("#Said")
    message.filter(has_text="The source has stopped").wait_for(timeout=60_000)
    visit.page.locator("header .waiting", has_text="gives up in").wait_for()
    message.filter(has_text="Trying again in").wait_for(timeout=90_000)
    visit.page.wait_for_timeout(30_000)
    origin.start()
    assert_keeps_playing(visit, limit=120)
    assert message.is_hidden()
    assert visit.page.locator("header .live").is_visible()


def processes_of(mark: str) -> list[int]:
    """The browser whose command line contains `mark`, and all its descendants."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number, stat = int(folder.name), (folder / "stat").read_text()
            parents[number] = int(stat.rpartition(")")[2].split()[1])
            if mark in (folder / "cmdline").read_text():
                found.append(number)
    for number in sorted(parents):
        if parents[number] in found and number not in found:
            found.append(number)
    return found


def test_page_recovers_after_its_machine_slept(
    origin: Origin, serve: Serve, browser: Browser
) -> None:
    """The browser is suspended for two minutes while the server continues."""
    site = serve({"news": ts(origin, "news")})
    mark = f"--marked-by-a-test={os.getpid()}-{site.port}"
    another = browser.browser_type.launch(
        executable_path=test_browser.CHROMIUM, args=[*test_browser.ARGUMENTS, mark]
    )
    visit = Visit(another.new_page(), f"{site.url}/news")
    assert_plays(visit, 3)
    numbers = processes_of(mark)
    assert len(numbers) >= 3
    for number in numbers:
        os.kill(number, signal.SIGSTOP)
    try:
        threading.Event().wait(120)
    finally:
        for number in numbers:
            os.kill(number, signal.SIGCONT)
    assert_keeps_playing(visit, limit=120)
    another.close()


def test_page_recovers_from_a_restart_of_the_program(
    origin: Origin, service: Service, tmp_path: Path, look: Look
) -> None:
    with service:
        visit = look(address_of(service))
        assert_plays(visit, 3)
    with Service(tmp_path, {"news": f"{origin.url}/news/index.m3u8"}, port=service.port):
        assert_keeps_playing(visit)


def test_page_recovers_from_a_long_absence_of_the_program(
    origin: Origin, service: Service, tmp_path: Path, look: Look
) -> None:
    with service:
        visit = look(address_of(service))
        assert_plays(visit, 3)
    visit.page.locator("#Said", has_text="The server does not answer").wait_for(timeout=90_000)
    with Service(tmp_path, {"news": f"{origin.url}/news/index.m3u8"}, port=service.port):
        assert_keeps_playing(visit, limit=120)


def test_page_of_a_failing_stream_plays_once_the_stream_recovers(
    origin: Origin, serve: Serve, look: Look
) -> None:
    """The page retries at growing intervals, beginning with 10 s, and shows the next one."""
    address = ts(origin, "news")
    failing = origin.fault("/news/*", Status(503), times=None)
    site = serve({"news": {"url": address, "title": "The News"}, "other": "http://h.example/x"})
    visit = look(f"{site.url}/news")
    assert visit.page.locator("h1").inner_text() == "The News"
    assert "The origin answered 503" in visit.page.locator("#Trouble").inner_text()
    assert visit.page.locator("#Trouble a", has_text="Try now").is_visible()
    assert visit.page.locator("nav a", has_text="other").is_visible()
    assert visit.page.locator("video").is_hidden()
    message = visit.page.locator("#Said")
    message.filter(has_text="in 10 s").wait_for()
    message.filter(has_text="the origin answered 503. Trying again in 20 s").wait_for()
    failing.clear()
    visit.page.locator("video").wait_for()
    assert_keeps_playing(visit)
    assert visit.page.locator("#Trouble").count() == 0
    assert message.is_hidden()


ENDED = """new Promise(done => {
    const video = document.querySelector("video")
    if (video.ended) done("")
    video.addEventListener("ended", () => done(""))
    video.addEventListener("error", () => done(video.error.message))
    setTimeout(() => done(`not ended at ${video.currentTime} s`), 60000)
})"""


def test_page_plays_to_the_end_of_a_finished_channel(
    origin: Origin, serve: Serve, look: Look
) -> None:
    playlist = Playlist("news", media.ts_segments(60), mode="live", window=6, clock=True)
    site = serve({"news": origin.add(playlist).url})
    visit = look(f"{site.url}/news")
    assert_plays(visit, 3)
    playlist.end()
    assert visit.measure(ENDED) == "", reasons(visit)
