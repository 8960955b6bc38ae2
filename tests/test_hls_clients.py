"""HLS with real players, real proxies and a second StreamPipe.

The tests of a missing player are skipped, but fail if CI is set in the environment.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import bench, media, test_proxies
from tests.origin import Origin, Playlist
from tests.server import Site
from tests.test_cli import ask, get_json
from tests.test_hls import LEAST, client_of, follow, listed_in
from tests.test_players import aac, aes, ffmpeg, fmp4, mpv, plain, vlc
from tests.test_proxies import SEGMENTS, TIMEOUT, Server, haproxy
from tests.test_sharing import eventually

Serve = Callable[..., Site]
Channel = Callable[..., Playlist]

# Fixtures.
channels, servers, front = test_proxies.channels, test_proxies.servers, test_proxies.front

pytestmark = pytest.mark.long

CROWD = 300


#### Players ####


def ffmpeg_plays(address: str) -> None:
    player = ffmpeg(address, 4)
    assert player.returncode == 0, player.stdout
    harmless = "MOOV Atom|Last message|out of order"  # also logged for the origin's list
    assert [line for line in player.stdout.splitlines() if not re.search(harmless, line)] == []


def mpv_plays(address: str) -> None:
    player = mpv(address, 4)
    assert player.returncode == 0, player.stdout


def vlc_plays(address: str) -> None:
    player = vlc(address, 6)
    assert player.returncode == 0, player.stdout
    assert "using audio decoder module" in player.stdout, player.stdout


def gstreamer_plays(address: str) -> None:
    """Decodes 40 frames of video or audio, then stops the player."""
    sink = ["fakesink", "silent=false", "sync=false"]
    command = ["gst-launch-1.0", "-v", "souphttpsrc", f"location={address}", "!", "decodebin"]
    with subprocess.Popen([*command, "!", *sink], stdout=subprocess.PIPE, text=True) as player:
        watchdog = threading.Timer(TIMEOUT, player.kill)
        watchdog.start()
        try:
            assert player.stdout
            decoded = (line for line in player.stdout if "last-message = chain" in line)
            assert sum(1 for _ in itertools.islice(decoded, 40)) == 40
        finally:
            watchdog.cancel()
            player.kill()


def streamlink_plays(address: str) -> None:
    """Reads 20 kB of the stream with streamlink's command."""
    command = [sys.executable, "-m", "streamlink", "--stdout", f"hls://{address}", "best"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as player:
        try:
            assert player.stdout
            assert len(player.stdout.read(20_000)) == 20_000
        finally:
            player.kill()


@pytest.mark.parametrize("channel", [plain, fmp4, aac, aes])
@pytest.mark.parametrize(
    "plays", [ffmpeg_plays, mpv_plays, vlc_plays, gstreamer_plays, streamlink_plays]
)
def test_player_plays_hls(
    origin: Origin, serve: Serve, plays: Callable[[str], None], channel: Channel
) -> None:
    playlist = origin.add(channel(mode="live", listed=5, window=12, clock=True))
    site = serve({"news": playlist.url})
    plays(f"{site.url}/news.m3u8")
    assert {viewer["kind"] for viewer in viewers_of(site)} == {"hls"}


def viewers_of(site: Site) -> list[Mapping[str, Any]]:
    channels = site.get("/status").json["streams"][0]["channels"]
    return [viewer for channel in channels for viewer in channel["viewers"]]


#### StreamPipe behind StreamPipe ####


@pytest.mark.parametrize("channel", [plain, fmp4, aac])
def test_relay_serves_the_segments_of_the_origin(
    origin: Origin, serve: Serve, channel: Channel
) -> None:
    playlist = origin.add(channel(mode="live", window=12))
    first = serve({"news": playlist.url})
    relay = serve({"news": f"{first.url}/news.m3u8"})
    client = client_of(relay, "/news.m3u8")
    oldest = follow(relay, "/news.m3u8", client)[0].number
    for _ in range(3):
        playlist.advance(1)
        follow(relay, "/news.m3u8", client)
    eventually(lambda: len(follow(relay, "/news.m3u8", client)) == 6, "six segments are listed")
    bodies = [client.bodies[number] for number in range(oldest, oldest + 6)]
    theirs = [playlist.plain(n, n + 1) for n in range(playlist.newest - 5, playlist.newest + 1)]
    if channel is plain:
        bodies = [media.without_notices(body) for body in bodies]
    assert bodies == theirs
    viewer = relay.watch("/news")
    assert viewer.status == 200


def test_gap_of_the_origin_is_a_gap_behind_a_relay(origin: Origin, serve: Serve) -> None:
    """The relay lists a gap of the origin as a discontinuity."""
    playlist = origin.add(plain(mode="live", window=12))
    first = serve({"news": playlist.url})
    relay = serve({"news": f"{first.url}/news.m3u8"})
    listed = listed_in(relay.get("/news.m3u8").body.decode())
    playlist.drop(1)
    playlist.advance(2)

    def has_new_segment() -> bool:
        return listed_in(relay.get("/news.m3u8").body.decode())[-1].number > listed[-1].number

    eventually(has_new_segment, "the relay lists a new segment")
    newest = listed_in(relay.get("/news.m3u8").body.decode())[-1]
    assert newest.discontinuities > listed[-1].discontinuities
    body = relay.get(f"/{newest.address}").body
    assert media.without_notices(body) == playlist.plain(playlist.newest, playlist.newest + 1)


#### Proxies and crowds ####


def get(port: int, path: str, agent: str = "tests") -> bytes:
    """The body of an answer whose status must be 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"User-Agent": agent})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


def test_proxy_sends_list_and_segment_requests_to_one_server(
    channels: Mapping[str, Playlist], servers: Sequence[Server], front: int
) -> None:
    for name, channel in channels.items():
        listed = listed_in(get(front, f"/{name}.m3u8").decode())
        bodies = [get(front, f"/{segment.address}") for segment in listed]
        assert media.without_notices(b"".join(bodies)) in channel.plain(0, channel.newest + 1)
        assert get(front, f"/{name}.m3u").startswith(b"#EXTM3U")
    pulled = [name for server in servers for name in server.channels()]
    assert sorted(pulled) == sorted(channels), "each channel must be pulled by one server"


def poll(port: int, agent: str, rounds: int) -> int:
    """Load the list and its new segments `rounds` times; returns the bytes of media."""
    newest = size = 0
    for _ in range(rounds):
        for segment in listed_in(get(port, "/news.m3u8", agent).decode()):
            if segment.number > newest:
                newest = segment.number
                size += len(get(port, f"/{segment.address}", agent))
    return size


def test_crowds_of_polling_and_streaming_clients_are_served(origin: Origin, tmp_path: Path) -> None:
    """300 clients poll through a real HAProxy while 300 viewers stream from the server directly."""
    channel = Playlist("news", media.ts_segments(SEGMENTS), mode="live", window=5, clock=True)
    server = Server(tmp_path / "one", {"news": origin.add(channel).url})
    rounds = 4
    with contextlib.ExitStack() as stack:
        stack.callback(server.program.close)
        front = stack.enter_context(haproxy([server] * 3, tmp_path))
        streaming = [
            stack.enter_context(contextlib.closing(ask(server.port, "/news"))) for _ in range(CROWD)
        ]
        reader = stack.enter_context(ThreadPoolExecutor(1))
        read = reader.submit(bench.throw_away, streaming, 3 * rounds)
        pollers = stack.enter_context(ThreadPoolExecutor(CROWD))
        agents = [f"player {number}" for number in range(CROWD)]
        sizes = list(pollers.map(functools.partial(poll, front, rounds=rounds), agents))
        assert min(sizes) >= (LEAST + rounds - 1) * min(map(len, media.ts_segments(SEGMENTS)))
        assert read.result()[1] == 0, "no streaming viewer may be dropped"
        stream = get_json(server.port, "/status")["streams"][0]
        assert stream["peak"] >= CROWD
    paths = [request.path for request in origin.requests if request.path.endswith(".ts")]
    assert len(paths) == len(set(paths)), "the origin sent each segment once"
