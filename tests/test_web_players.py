"""Web players on a page of another origin, in Chromium: hls.js, shaka, video.js, mpegts.js.

Players, browser, server and origin are real.  `tests/package.json` lists the players.  Their page
has a different origin from StreamPipe, so every answer needs a CORS header.  The tests are skipped
if npm or Chromium is missing, but fail if CI is set in the environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests import media, test_browser
from tests.origin import Origin, Playlist, Segment
from tests.server import Site
from tests.test_browser import Look, Visit

# Fixtures.
browser, look = test_browser.browser, test_browser.look
browser_before_each_test = test_browser._browser_before_each_test

Serve = Callable[..., Site]

TESTS = Path(__file__).parent
INSTALL_TIME = 300.0  # seconds that npm may take to install the packages
OUTAGE = 8000  # milliseconds without the origin
PLAYED = 6.0  # seconds that each player must play, also after an outage

# Options of a channel that stays live for the whole test.
LIVE: dict[str, Any] = {"mode": "live", "window": 6, "clock": True}

pytestmark = pytest.mark.long


#### The page that plays ####


PAGE = """<!doctype html>
<title>A page of another origin</title>
<video muted playsinline width="320"></video>
<script>
    const video = document.querySelector("video")
    const address = {address!r}
    const errors = []  // fatal errors
    const asides = []  // errors from which the player recovers by itself
</script>
<script src="/node_modules/{script}"></script>
<script>{play}</script>
"""

# For each player: its script, the ending of the address that it plays, and the page's code.
PLAYERS = {
    "hls.js": (
        "hls.js/dist/hls.min.js",
        ".m3u8",
        """
        const player = new Hls()
        player.on(Hls.Events.ERROR, (event, data) => {
            (data.fatal ? errors : asides).push(`${data.type}: ${data.details}`)
        })
        player.loadSource(address)
        player.attachMedia(video)
        video.play()
        """,
    ),
    "shaka-player": (
        "shaka-player/dist/shaka-player.compiled.js",
        ".m3u8",
        """
        const player = new shaka.Player()
        const note = error => {
            const isCritical = error.severity === shaka.util.Error.Severity.CRITICAL;
            (isCritical ? errors : asides).push(`${error.category}: ${error.code}`)
        }
        player.addEventListener("error", event => note(event.detail))
        player.attach(video).then(() => player.load(address)).then(() => video.play()).catch(note)
        """,
    ),
    "video.js": (
        "video.js/dist/video.min.js",
        ".m3u8",
        """
        const player = videojs(video, {muted: true})
        player.on("error", () => errors.push(player.error().message))
        player.src({src: address, type: "application/x-mpegURL"})
        player.ready(() => player.play())
        """,
    ),
    "mpegts.js": (
        "mpegts.js/dist/mpegts.js",
        "",
        """
        const player = mpegts.createPlayer({type: "mpegts", isLive: true, url: address})
        player.on(mpegts.Events.ERROR, (type, detail) => errors.push(`${type}: ${detail}`))
        player.attachMediaElement(video)
        player.load()
        player.play()
        """,
    ),
}


@pytest.fixture(scope="session")
def packages(request: pytest.FixtureRequest) -> Path:
    """The folder with the installed packages, which is kept in pytest's cache."""
    if not shutil.which("npm"):
        assert "CI" not in os.environ, "CI must install npm"
        pytest.skip("needs npm")
    cache = request.config.cache
    assert cache
    worker = os.environ.get("PYTEST_XDIST_WORKER", "one")
    folder = Path(cache.mkdir(f"web-players-{worker}"))
    shutil.copy(TESTS / "package.json", folder)
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=INSTALL_TIME,
    )
    return folder


class _PageHandler(SimpleHTTPRequestHandler):
    """Serves the players' files and, at `/play`, a page that uses one of them."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path != "/play":
            super().do_GET()
            return
        query = parse_qs(parts.query)
        script, _, play = PLAYERS[query["player"][0]]
        page = PAGE.format(address=query["address"][0], script=script, play=play).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: Chromium requests hundreds of files."""


@pytest.fixture
def pages(packages: Path) -> Iterator[str]:
    """The address of a web server that is not StreamPipe."""

    def handler(*arguments: Any) -> _PageHandler:
        return _PageHandler(*arguments, directory=str(packages))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = False  # so that closing the server joins them
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


#### Results of players ####


# Resolves with "" once the video has played up to `until` seconds, or with an error.
PLAYS_UNTIL = """until => new Promise(done => {
    const look = () => {
        if (errors.length > 0) done(`${errors}`)
        else if (video.error) done(video.error.message || "an error")
        else if (video.currentTime > until) done("")
    }
    const timer = setInterval(look, 100)
    setTimeout(() => done(`only ${video.currentTime} of ${until} s; ${asides}`), 60000)
    look()
})"""


def plays(visit: Visit, seconds: float = PLAYED) -> str:
    """Wait until the page has played for this long; returns "" or an error."""
    now = visit.measure("video.currentTime")
    return str(visit.page.evaluate(PLAYS_UNTIL, now + seconds))


def open_players(pages: str, site: Site, look: Look, players: list[str]) -> dict[str, Visit]:
    """Open one page for each player."""
    visits = {}
    for player in players:
        address = f"{site.url}/news{PLAYERS[player][1]}"
        visits[player] = look(f"{pages}/play?player={player}&address={address}")
    return visits


def playback_errors(visits: dict[str, Visit]) -> dict[str, str]:
    """The error of each player that does not play."""
    results = {player: plays(visit) for player, visit in visits.items()}
    return {player: result for player, result in results.items() if result}


#### Channels ####


def ts(origin: Origin) -> str:
    segments = [Segment(data, 2.0) for data in media.ts_segments(40, 2.0)]
    return origin.add(Playlist("ts", segments, **LIVE)).url


def fmp4(origin: Origin) -> str:
    init, parts = media.fmp4(40, 2.0)
    segments = [Segment(data, 2.0) for data in parts]
    made = Playlist("fmp4", segments, init=init, extension=".m4s", **LIVE)
    return origin.add(made).url


def discontinuous(origin: Origin) -> str:
    """A channel whose timestamps restart with every third segment."""
    segments = [
        Segment(data, 2.0, discontinuity=number % 3 == 0)
        for number, data in enumerate(media.ts_segments(3, 2.0) * 14)
    ]
    return origin.add(Playlist("jumps", segments, **LIVE)).url


# mpegts.js 1.8 ignores discontinuity_indicator, so it stops when the timestamps of `/news` restart.
HLS_PLAYERS = ["hls.js", "shaka-player", "video.js"]


@pytest.mark.parametrize(
    ("channel", "players"),
    [(ts, list(PLAYERS)), (fmp4, HLS_PLAYERS), (discontinuous, HLS_PLAYERS)],
    ids=["ts", "fmp4", "discontinuous"],
)
def test_players_on_a_page_of_another_origin_play(
    origin: Origin,
    serve: Serve,
    look: Look,
    pages: str,
    channel: Callable[[Origin], str],
    players: list[str],
) -> None:
    site = serve({"news": channel(origin)})
    visits = open_players(pages, site, look, players)
    assert playback_errors(visits) == {}


@pytest.mark.parametrize(
    ("channel", "players"), [(ts, list(PLAYERS)), (fmp4, HLS_PLAYERS)], ids=["ts", "fmp4"]
)
def test_players_on_a_page_of_another_origin_survive_an_outage(
    origin: Origin,
    serve: Serve,
    look: Look,
    pages: str,
    channel: Callable[[Origin], str],
    players: list[str],
) -> None:
    site = serve({"news": channel(origin)})
    visits = open_players(pages, site, look, players)
    assert playback_errors(visits) == {}
    origin.stop()
    next(iter(visits.values())).page.wait_for_timeout(OUTAGE)
    origin.start()
    assert playback_errors(visits) == {}


@pytest.mark.parametrize("player", list(PLAYERS))
def test_page_of_another_origin_sees_the_status_of_a_failure(
    serve: Serve, look: Look, pages: str, player: str
) -> None:
    """Without a CORS header, a script sees a network failure and no status."""
    site = serve({"news": "http://127.0.0.1:9/x.m3u8"})
    visit = open_players(pages, site, look, [player])[player]
    status = visit.page.evaluate("fetch(address).then(answer => answer.status)")
    assert status == 502
