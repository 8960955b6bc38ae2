"""Ordinary providers and households: radio, panels and log lines. Everything is real."""

from __future__ import annotations

import contextlib
import itertools
import select
import signal
import socketserver
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import media
from tests.origin import OneAtATime, Origin, Playlist, StallHeaders, Status
from tests.program import Service
from tests.server import TIMEOUT, Site, Watch
from tests.threads import running

Serve = Callable[..., Site]


#### Radio ####


def endless_frames(start: int) -> Iterator[bytes]:
    """Endless MP3 as a relay sends it: from any byte on, and in pieces that ignore frames."""
    frames = b"".join(media.audio_frames("libmp3lame", 44_100))
    for at in itertools.count(start, 4000):
        at %= len(frames)
        yield (frames[at:] + frames)[:4000]


def test_radio_that_starts_within_a_frame_is_shared_with_the_type_of_its_origin(
    origin: Origin, serve: Serve
) -> None:
    origin.rate = 64_000
    kind = "Audio/MPEG; charset=utf-8"
    address = origin.add_endless("/radio", lambda: endless_frames(100), content_type=kind)
    site = serve({"radio": address})
    first = site.watch("/radio")
    assert first.headers["Content-Type"] == "audio/mpeg"
    got = first.read(40_000)
    assert got == (b"".join(media.audio_frames("libmp3lame", 44_100)) * 4)[100:40_100]
    late = site.watch("/radio").read(10_000)
    assert late in got + first.read(64_000)
    assert origin.count("/radio") == 1


class Bare(socketserver.StreamRequestHandler):
    """Reads the request's head and ignores it."""

    def setup(self) -> None:
        super().setup()
        while self.rfile.readline().strip():
            pass


class Shoutcast(Bare):
    """A Shoutcast 1 server, whose answer is not quite HTTP."""

    def handle(self) -> None:
        self.wfile.write(b"ICY 200 OK\r\nicy-name:News\r\ncontent-type:audio/mpeg\r\n\r\n")
        with contextlib.suppress(OSError):
            for piece in endless_frames(100):
                self.wfile.write(piece)


def test_radio_of_an_old_shoutcast_server_plays(serve: Serve) -> None:
    with running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Shoutcast)) as address:
        site = serve({"radio": address}, linger=0)
        with site.watch("/radio") as viewer:
            assert viewer.headers["Content-Type"] == "audio/mpeg"
            frames = b"".join(media.audio_frames("libmp3lame", 44_100)) * 4
            assert viewer.read(40_000) == frames[100:40_100]


#### Panels ####


class Watched(Bare):
    """Sends some media, and then only watches its connection."""

    def handle(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(media.ts_segments()))
        poll = select.poll()
        poll.register(self.connection, 0)  # poll() always reports errors and resets
        assert isinstance(self.server, Panel)
        self.server.was_reset = bool(poll.poll(1000 * TIMEOUT))


class Panel(socketserver.ThreadingTCPServer):
    was_reset = False


def test_abandoned_connection_is_reset(serve: Serve) -> None:
    # After an orderly close, an origin with a full socket would count it for a minute or two more.
    panel = Panel(("127.0.0.1", 0), Watched)
    with (
        running(panel) as address,
        serve({"news": address}, linger=0).watch("/news") as viewer,
    ):
        viewer.read(188)
    assert panel.was_reset


@pytest.mark.parametrize("status", [403, 429, 458])
def test_lingering_channel_gives_way_if_the_panel_allows_one_connection(
    origin: Origin, serve: Serve, status: int
) -> None:
    origin.rate = 400_000
    source = b"".join(media.ts_segments())
    streams = {
        name: origin.add_endless(f"/{name}", lambda: itertools.repeat(source)) for name in "abc"
    }
    origin.fault("*", OneAtATime(origin, status), times=None)
    site = serve(streams, linger=60)
    for name in "abcab":
        with site.watch(f"/{name}") as viewer:
            assert viewer.read(20_000) == source[:20_000]


#### The log ####


def test_abandoned_segment_is_logged_with_its_channel(origin: Origin, tmp_path: Path) -> None:
    film = origin.add(Playlist("film", media.ts_segments(6)))
    origin.fault(film.segment_path(3), Status(403), times=None)
    with Service(tmp_path, {"film": film.url}, options={"timeout": 1}) as service:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/film") as response:
            response.read()
        service.wait_for_count(r" warning film: abandoned segment 3: the origin answered 403$", 1)


def test_stop_logs_no_failures_of_origins(origin: Origin, tmp_path: Path) -> None:
    """Requests that StreamPipe interrupts itself do not count as failures."""
    streams = {
        f"c{number}": origin.add(
            Playlist(f"c{number}", media.ts_segments(), mode="live", clock=True)
        ).url
        for number in range(6)
    }
    with Service(tmp_path, streams) as service, ExitStack() as viewers:
        for name in streams:
            watch = viewers.enter_context(contextlib.closing(Watch(service.port, f"/{name}")))
            assert watch.read(188)[:1] == b"G"
        hanging = origin.fault("*", StallHeaders(), times=None)
        hanging.wait_held(6)
        service.send(signal.SIGTERM)
        assert [line for line in service.errors() if " warning " in line] == []
