"""Requests of players and media servers, and real players.

Clients that cannot be installed are replayed request by request, over real sockets.  The tests of a
missing player are skipped, but fail if CI is set in the environment.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tests import media
from tests.origin import Origin, Playlist, Status
from tests.server import Site
from tests.test_players import aac, ffmpeg, fmp4, mpv, plain, run, vlc
from tests.test_sharing import eventually

Serve = Callable[..., Site]
TIMEOUT = 20.0  # seconds; longer than anything a test waits for
LAVF = {
    "User-Agent": "Lavf/59.27.100",
    "Accept": "*/*",
    "Range": "bytes=0-",
    "Connection": "close",
    "Icy-MetaData": "1",
}
CHROME = {"User-Agent": "Mozilla/5.0 Chrome/122.0.0.0 Safari/537.36"}
KODI = {"User-Agent": "Kodi/21.0 (X11; Linux x86_64)"}
TVHEADEND = {"User-Agent": "Tvheadend", "Connection": "close"}
VLC = {"Accept": "*/*", "Accept-Language": "en_US", "User-Agent": "VLC/3.0.24 LibVLC/3.0.24"}
EXOPLAYER = {"User-Agent": "TiviMate/5.0 (Linux; Android 12)", "Accept-Encoding": "identity"}


#### On the wire ####


class Exchange:
    """A client's request, and its answer: all of the body or its first `size` bytes."""

    def __init__(
        self,
        site: Site,
        line: str,
        headers: Mapping[str, str],
        size: int = 0,
    ) -> None:
        method = line.partition(" ")[0]
        lines = [line, f"Host: 127.0.0.1:{site.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with socket.create_connection(("127.0.0.1", site.port), TIMEOUT) as sock:
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            response = http.client.HTTPResponse(sock, method=method)
            with contextlib.closing(response):
                response.begin()
                self.status, self.headers = response.status, response.headers
                self.reason = response.reason
                self.is_chunked = bool(response.chunked)
                self.body = response.read(size) if size else response.read()


def get(site: Site, headers: Mapping[str, str], size: int, version: str = "1.1") -> Exchange:
    return Exchange(site, f"GET /news HTTP/{version}", headers, size)


def head(site: Site, headers: Mapping[str, str]) -> Exchange:
    return Exchange(site, "HEAD /news HTTP/1.1", headers)


ONE_SEGMENT = len(media.ts_segments(8)[0])


def assert_plays(answer: Exchange) -> None:
    assert answer.status == 200, "never 206: TVHeadend would discard it, and ffmpeg would seek"
    assert answer.headers["Content-Type"] == "video/mp2t"
    assert "icy-metaint" not in answer.headers
    assert "Content-Range" not in answer.headers
    assert media.decode(answer.body, strict=False).starts_with_key


def kodi(site: Site) -> None:
    """IPTV Simple zaps: HEAD, a first look at the media, HEAD again, and then ffmpeg plays."""
    assert head(site, KODI).status == 200
    assert len(get(site, KODI, 1024).body) == 1024
    probed = head(site, KODI)
    assert probed.headers["Content-Type"] == "video/mp2t"
    assert probed.headers["Accept-Ranges"] == "none"
    assert_plays(get(site, {**LAVF, **KODI}, ONE_SEGMENT))


def jellyfin(site: Site) -> None:
    """Jellyfin shares one connection between its viewers if HEAD answers video/MP2T."""
    probed = head(site, CHROME)
    assert probed.status == 200
    assert probed.headers["Content-Type"].lower() == "video/mp2t"
    assert_plays(get(site, CHROME, ONE_SEGMENT))


def emby(site: Site) -> None:
    """Emby's probe opens and closes the stream; then its player opens it again."""
    for _ in range(2):
        assert_plays(get(site, LAVF, ONE_SEGMENT))


def tvheadend(site: Site) -> None:
    answer = get(site, TVHEADEND, ONE_SEGMENT)
    assert answer.reason, "TVHeadend needs three words in the status line"
    assert answer.headers["Connection"] == "close"
    assert_plays(answer)


def exoplayer(site: Site) -> None:
    """ExoPlayer tries to resume with a Range; a live stream starts again instead."""
    assert_plays(get(site, EXOPLAYER, ONE_SEGMENT))
    resumed = {**EXOPLAYER, "Range": f"bytes={ONE_SEGMENT}-"}
    assert_plays(get(site, resumed, ONE_SEGMENT))


def plex(site: Site) -> None:
    """Plex follows HDHomeRun's documents to a channel; each document contains the next address."""

    def document(path: str, method: str = "GET") -> Any:
        answer = Exchange(site, f"{method} {path} HTTP/1.1", {"User-Agent": "PlexMediaServer"})
        assert answer.status == 200
        return json.loads(answer.body)

    def path_of(address: str) -> str:
        assert address.startswith(f"{site.url}/"), "every address must be absolute"
        return address.removeprefix(site.url)

    found = document("/discover.json")
    assert type(found["TunerCount"]) is int
    assert found["BaseURL"] == site.url
    device = Exchange(site, "GET /device.xml HTTP/1.1", {"User-Agent": "PlexMediaServer"})
    space = {"u": "urn:schemas-upnp-org:device-1-0"}
    model = ElementTree.fromstring(device.body).findtext("u:device/u:modelName", namespaces=space)
    assert model == found["ModelNumber"]
    assert document("/lineup_status.json")["ScanInProgress"] == 0
    assert document("/lineup.post?scan=start&source=Cable", "POST") == {}
    (channel,) = document(path_of(found["LineupURL"]))
    assert channel["GuideNumber"].isdecimal()
    line = f"GET {path_of(channel['URL'])}?transcode=none HTTP/1.1"
    assert_plays(Exchange(site, line, LAVF, ONE_SEGMENT))


def haproxy(site: Site) -> None:
    """HAProxy sends its default health check, without Host, before a viewer connects."""
    answer = site.raw(b"OPTIONS / HTTP/1.0\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 2\d\d ", answer)
    assert_plays(get(site, LAVF, ONE_SEGMENT, version="1.0"))


def relay(site: Site) -> None:
    """Streamlink's httpstream:// accepts compressed answers."""
    answer = get(site, {"Accept-Encoding": "gzip, deflate", "Accept": "*/*"}, ONE_SEGMENT)
    assert "Content-Encoding" not in answer.headers
    assert_plays(answer)


CLIENTS = [kodi, jellyfin, emby, tvheadend, exoplayer, plex, haproxy, relay]


def live(origin: Origin, name: str = "news") -> Playlist:
    segments = media.ts_segments(8)
    return origin.add(Playlist(name, segments, mode="live", window=5, clock=True))


def assert_pulled_once(origin: Origin, channel: Playlist) -> None:
    """Checks that no segment was requested twice; a second upstream would request it again."""
    paths = [request.path for request in origin.requests if request.path.endswith(".ts")]
    assert paths
    assert sorted(set(paths)) == sorted(paths)
    assert all(path.startswith(f"/{channel.name}/") for path in paths)


@pytest.mark.parametrize("client", CLIENTS)
def test_client_plays_with_one_upstream(
    origin: Origin, serve: Serve, client: Callable[[Site], None]
) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    client(site)
    assert_pulled_once(origin, news)
    assert status_of(site)["restarts"] == 0


def test_all_clients_together_have_one_upstream(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    for client in CLIENTS:
        client(site)
    assert_pulled_once(origin, news)


def status_of(site: Site) -> Any:
    return site.get("/status").json["streams"][0]


def test_repeated_request_after_an_error_does_not_start_again(origin: Origin, serve: Serve) -> None:
    """After an error, VLC repeats its request at once with HTTP/1.0."""
    fault = origin.fault("/news*", Status(503), times=None)
    site = serve({"news": f"hls://{origin.url}/news.m3u8"})
    first = get(site, {**VLC, "Range": "bytes=0-"}, 0)
    tries = fault.taken
    assert tries >= 1
    second = get(site, {**VLC, "Icy-MetaData": "1"}, 0, version="1.0")
    assert (first.status, second.status) == (502, 502)
    assert not second.is_chunked
    assert fault.taken == tries


def test_second_request_of_vlc_is_answered_without_chunks(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    answer = get(site, {**VLC, "Icy-MetaData": "1"}, ONE_SEGMENT, version="1.0")
    assert not answer.is_chunked
    assert_plays(answer)


@pytest.mark.parametrize("path", ["/", "/health", "/news", "/playlist.m3u"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_requests_of_monitors_open_nothing(
    origin: Origin, serve: Serve, path: str, version: str
) -> None:
    """UptimeRobot's free checks send HEAD."""
    site = serve({"news": live(origin).url})
    answer = site.raw(f"HEAD {path} HTTP/{version}\r\nHost: h\r\n\r\n".encode())
    assert answer.split()[1] == b"200"
    assert answer.endswith(b"\r\n\r\n")
    assert origin.requests == ()


def test_kodis_regular_load_of_the_playlist_opens_nothing(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    for _ in range(5):
        assert Exchange(site, "GET /playlist.m3u HTTP/1.1", KODI).status == 200
    assert origin.requests == ()


#### Real players ####


def gstreamer(address: str, buffers: int = 40) -> subprocess.CompletedProcess[str]:
    """Decodes this many frames of video or audio."""
    sink = ["fakesink", f"num-buffers={buffers}", "sync=false"]
    source = ["souphttpsrc", f"location={address}"]
    return run("gst-launch-1.0", "-q", *source, "!", "decodebin", "!", *sink)


def ffmpeg_decodes(site: Site, path: str) -> None:
    player = ffmpeg(f"{site.url}{path}", 3)
    assert (player.returncode, player.stdout) == (0, "")


def mpv_decodes(site: Site, path: str) -> None:
    player = mpv(f"{site.url}{path}", 3)
    assert (player.returncode, player.stdout.strip()) == (0, "")


def vlc_decodes(site: Site, path: str) -> None:
    player = vlc(f"{site.url}{path}", 4)
    assert player.returncode == 0, player.stdout
    assert "using audio decoder module" in player.stdout, player.stdout
    assert re.findall(".*(?:lost synchro|garbage).*", player.stdout) == []


def gstreamer_decodes(site: Site, path: str) -> None:
    player = gstreamer(f"{site.url}{path}")
    assert (player.returncode, player.stdout) == (0, "")


# mpv prints "Audio/Video desynchronisation", and GStreamer 1.22 stalls now and then, if other tests
# take the processor from the player.
alone = pytest.mark.alone

Decodes = Callable[[Site, str], None]
Channel = Callable[..., Playlist]


@pytest.mark.long
@pytest.mark.parametrize("channel", [plain, fmp4, aac])
@pytest.mark.parametrize(
    ("decodes", "path"),
    [
        pytest.param(ffmpeg_decodes, "/news", id="ffmpeg"),
        pytest.param(mpv_decodes, "/playlist.m3u", id="mpv-playlist", marks=alone),
        pytest.param(mpv_decodes, "/news.m3u", id="mpv-m3u", marks=alone),
        pytest.param(vlc_decodes, "/playlist.m3u", id="vlc-playlist"),
        pytest.param(vlc_decodes, "/news.m3u", id="vlc-m3u"),
        pytest.param(gstreamer_decodes, "/news", id="gstreamer", marks=alone),
    ],
)
def test_player_decodes(
    origin: Origin, serve: Serve, decodes: Decodes, path: str, channel: Channel
) -> None:
    news = origin.add(channel(mode="live", listed=3, window=12, clock=True))
    decodes(serve({"news": news.url}), path)


def ffmpeg_in_background(site: Site) -> subprocess.Popen[bytes]:
    quiet: Sequence[str] = ("-nostdin", "-v", "quiet")
    command = ["ffmpeg", *quiet, "-i", f"{site.url}/news", "-f", "null", "-"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


@pytest.mark.long
def test_killed_and_restarted_player_does_not_disturb_other_viewers(
    origin: Origin, serve: Serve
) -> None:
    if run("ffmpeg", "-version").returncode:
        pytest.fail("ffmpeg does not run")
    news = live(origin)
    site = serve({"news": news.url})
    other = site.watch("/news")
    body = other.read(ONE_SEGMENT)
    for _ in range(2):
        with ffmpeg_in_background(site) as player:
            try:
                eventually(lambda: status_of(site)["viewers"] == 2, "the player is a viewer")
                body += other.read(ONE_SEGMENT)
            finally:
                player.send_signal(signal.SIGKILL)
        eventually(lambda: status_of(site)["viewers"] == 1, "the killed player has been removed")
        body += other.read(ONE_SEGMENT)
    assert body in news.plain(0, news.newest + 1)
    assert_pulled_once(origin, news)
