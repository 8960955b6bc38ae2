"""Everything is real: origins that fail, streamlink, StreamPipe, and viewers on sockets.

Most tests run two channels on one source, for one viewer and for three, and compare what all of
them get byte for byte with what the origin meant. Time is shortened where its length is not the
matter: pauses between tries, and how long a failure is waited for. Only the last part is about
units, for what no origin can bring about.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from streamlink.session.session import Streamlink
from streamlink.stream.ffmpegmux import FFMPEGMuxer
from streamlink.stream.hls.m3u8 import parse_m3u8

import pipe
from tests import media
from tests.origin import (
    Body,
    Break,
    Close,
    Fault,
    NoRange,
    Origin,
    Playlist,
    Redirect,
    Stall,
    StallHeaders,
    Status,
    WrongLength,
    master,
)
from tests.server import TIMEOUT, Site, Watch
from tests.threads import Task

SEGMENTS = 12  # of one timeline, a second each; then they repeat
KEY = bytes(range(16))
# A failure is noticed after `timeout`, but not before two target durations, which are 2 s.
QUICK: Mapping[str, Any] = {"timeout": 2, "reconnect": 20, "linger": 0.1}
PAUSES = (0.05, 0.1, 0.2)
CUT = 10_000  # bytes into a segment
WHOLE = CUT - CUT % media.PACKET  # as much of them as are whole packets

Serve = Callable[..., Site]


#### What is played ####


def news(**options: Any) -> Playlist:
    """A live channel that moves when a test says so."""
    settings: dict[str, Any] = {"mode": "live", **options}
    return Playlist("news", media.ts_segments(SEGMENTS), **settings)


def film(**options: Any) -> Playlist:
    return Playlist("film", media.ts_segments(SEGMENTS)[:6], **options)


def other_media() -> Sequence[bytes]:
    """The same timeline in other bytes."""
    return media.video_only_segments(SEGMENTS)


def segment(number: int) -> bytes:
    return media.ts_segments(SEGMENTS)[number]


def segments(first: int, stop: int) -> bytes:
    return b"".join(media.ts_segments(SEGMENTS)[first:stop])


#### Who watches, and what is logged ####


NAMES = ("one", "three")


def both(*addresses: str, **stream: Any) -> dict[str, object]:
    """Two channels with the same addresses; their queries tell the origin's log which asks."""
    return {name: {"url": [f"{url}?{name}" for url in addresses], **stream} for name in NAMES}


class Audience:
    """A viewer of one channel and three of another with the same source.

    All shall get the same and keep their connections.
    """

    def __init__(self, site: Site) -> None:
        self.viewers = [site.watch(f"/{name}") for name in ("one", "three", "three", "three")]
        self.got = bytearray()
        assert {viewer.status for viewer in self.viewers} == {200}

    def expect(self, wanted: bytes) -> None:
        """These are the next bytes."""
        for viewer in self.viewers:
            assert viewer.read(len(wanted)) == wanted
        self.got += wanted

    def expect_end(self, wanted: bytes = b"", *, is_complete: bool = True) -> None:
        """These are the last bytes."""
        assert [viewer.read_all() for viewer in self.viewers] == 4 * [(wanted, is_complete)]
        self.got += wanted

    def assert_time_goes_on(self, pictures: int) -> None:
        """All that came can be decoded, in order, and has that many pictures."""
        times = media.decode(bytes(self.got), strict=False).video
        assert list(times) == sorted(set(times))
        assert len(times) == pictures


class Journal(logging.Handler):
    """What StreamPipe logs, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        # Guards the lines; reentrant, for count() within wait_for().
        self._grown = threading.Condition(threading.RLock())
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._grown:
            self._lines.append(record.getMessage())
            self._grown.notify_all()

    def count(self, pattern: str) -> int:
        with self._grown:
            return sum(bool(re.search(pattern, line)) for line in self._lines)

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Until so many lines match."""
        with self._grown:
            came = self._grown.wait_for(lambda: self.count(pattern) >= times, TIMEOUT)
            assert came, "\n".join([f"not logged: {pattern}", *self._lines])

    def wait_failed(self, position: str = "1 of 1") -> None:
        """Until both channels have seen that address fail."""
        for name in NAMES:
            self.wait_for(rf"^{name}: \S+, {position}: (?!goes on)")

    def failures(self) -> int:
        return self.count(r"^\w+: \S+, \d of \d: (?!goes on)")


@pytest.fixture
def journal() -> Iterator[Journal]:
    handler, level = Journal(), pipe.log.level
    pipe.log.addHandler(handler)
    pipe.log.setLevel(logging.INFO)
    yield handler
    pipe.log.removeHandler(handler)
    pipe.log.setLevel(level)


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", PAUSES)
    monkeypatch.setattr(pipe, "SILENCE", 60.0)


@pytest.fixture
def backup() -> Iterator[Origin]:
    """A second origin."""
    with Origin() as running:
        yield running


def pauses_between(origin: Origin, path: str) -> list[float]:
    """Seconds between the requests for a path, which may have a query."""
    times = [request.time for request in origin.requests if request.path == path]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def assert_calm(origin: Origin, path: str) -> None:
    """No try comes before its pause, whatever the jitter."""
    for name in NAMES:
        assert min(pauses_between(origin, f"{path}?{name}"), default=1.0) >= 0.7 * PAUSES[0]


#### A segment ####


HICCUPS: dict[str, tuple[tuple[Fault, ...], ...]] = {
    "closes": ((Break(CUT),),),
    "resets": ((Break(CUT, reset=True),),),
    "breaks-again-and-again": ((Break(CUT),), (Break(1),), (Break(0),)),
    "breaks-and-ignores-range": ((Break(CUT),), (NoRange(),)),
    "ends-early": ((WrongLength(1000),),),
    "answers-404-for-a-while": ((Status(404),), (Status(404),)),
    "answers-503-for-a-while": ((Status(503),), (Status(503),), (Status(503),)),
    "hangs-up": ((Close(),), (Close(reset=True),)),
    "stalls-in-its-headers": ((StallHeaders(),),),
    "stalls-in-its-body": ((Stall(CUT),),),
}


@pytest.mark.parametrize("answers", HICCUPS.values(), ids=list(HICCUPS))
@pytest.mark.parametrize("mode", ["live", "vod"])
def test_hiccup_of_a_segment_is_not_seen(
    origin: Origin, serve: Serve, mode: str, answers: tuple[tuple[Fault, ...], ...]
) -> None:
    playlist = origin.add(news(mode=mode, window=5, target_duration=2))
    first, stop = (0, SEGMENTS) if mode == "vod" else (2, 5)
    for faults in answers:
        for _ in range(4 if mode == "vod" else 2):  # upstreams
            origin.fault(playlist.segment_path(3), *faults)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "timeout": 4}))
    audience.expect(playlist.plain(first, stop))
    audience.assert_time_goes_on((stop - first) * media.FPS)


def test_segment_is_tried_again_with_pauses(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    failing = origin.fault(live.segment_path(4), Status(503), times=4)
    viewer = serve({"news": live.url}, timeout=5).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    assert failing.taken == 4
    pauses = pauses_between(origin, live.segment_path(4))
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True))


LOST: dict[str, tuple[tuple[Fault, ...], int]] = {
    "answers-404": ((Status(404),), 0),
    "answers-500": ((Status(500),), 0),
    "stalls-in-its-headers": ((StallHeaders(),), 0),
    "stalls-in-its-body": ((NoRange(), Stall(CUT)), WHOLE),
    "breaks-at-the-same-place": ((NoRange(), Break(CUT)), WHOLE),
}


@pytest.mark.parametrize(("faults", "size"), LOST.values(), ids=list(LOST))
def test_segment_that_fails_for_ever_is_one_gap(
    origin: Origin, serve: Serve, faults: tuple[Fault, ...], size: int
) -> None:
    live = origin.add(news())
    origin.fault(live.segment_path(3), *faults, times=None)
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 6}))
    audience.expect(live.plain(2, 3) + segment(3)[:size] + live.plain(4, 5))
    live.advance()
    live.end()
    audience.expect_end(live.plain(5, 6))


@pytest.mark.parametrize(("faults", "size"), LOST.values(), ids=list(LOST))
def test_segment_of_vod_that_fails_for_ever_is_one_gap(
    origin: Origin, serve: Serve, faults: tuple[Fault, ...], size: int
) -> None:
    playlist = origin.add(film())
    origin.fault(playlist.segment_path(3), *faults, times=None)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "timeout": 2.5}))
    audience.expect_end(segments(0, 3) + segment(3)[:size] + segments(4, 6))


def test_segment_is_tried_no_longer_than_it_is_listed(origin: Origin, serve: Serve) -> None:
    """Two target durations would be 20 s."""
    live = origin.add(news(window=4, target_duration=10))
    failing = origin.fault(live.segment_path(3), Status(404), times=None)
    often = {"hls-playlist-reload-time": "segment"}
    site = serve(both(live.url), **{**QUICK, "timeout": 30, "streamlink": often})
    audience = Audience(site)
    audience.expect(live.plain(1, 3))
    failing.wait(2)
    live.advance(4)
    began = time.monotonic()
    audience.expect(live.plain(4, 8))
    assert time.monotonic() - began < 5


def test_playlist_that_moves_on_while_every_segment_fails(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault("/news/*.ts", Status(500), times=None)
    for number in range(5, 8):
        live.advance()
        failing.wait(2 * (number - 4))
    journal.wait_failed()
    failing.clear()
    live.advance()
    live.end()
    bodies = {viewer.read_all() for viewer in audience.viewers}
    assert bodies <= {(live.plain(number, 9), True) for number in range(5, 9)}


#### The playlist, and the whole origin ####

HTML = b"<!DOCTYPE html><title>maintenance</title>"
NO_SEGMENTS = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n"


@dataclass(frozen=True)
class Outage:
    """What goes wrong for a while with all requests for the playlist; nothing: it is frozen."""

    faults: tuple[Fault, ...] = ()
    is_down: bool = False

    def begin(self, origin: Origin, playlist: Playlist) -> None:
        if self.is_down:
            origin.stop()
        elif self.faults:
            origin.fault(playlist.path, *self.faults, times=None)

    def end(self, origin: Origin) -> None:
        origin.start()
        origin.clear_faults()


OUTAGES = {
    "down": Outage(is_down=True),
    "frozen": Outage(),
    "html": Outage((Body(HTML, "text/html"),)),
    "nothing": Outage((Body(b""),)),
    "without-segments": Outage((Body(NO_SEGMENTS),)),
    "cut-off": Outage((Break(30),)),
    "hangs-up": Outage((Close(reset=True),)),
    "stalls": Outage((StallHeaders(),)),
    "stalls-in-its-body": Outage((Stall(30),)),
    "401": Outage((Status(401),)),
    "404": Outage((Status(404),)),
    "410": Outage((Status(410),)),
    "500": Outage((Status(500, HTML),)),
    "503": Outage((Status(503),)),
}


@pytest.fixture(params=OUTAGES.values(), ids=list(OUTAGES))
def outage(request: pytest.FixtureRequest) -> Outage:
    result: Outage = request.param
    return result


def test_stream_goes_on_after_an_outage(
    origin: Origin, serve: Serve, journal: Journal, outage: Outage
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    outage.begin(origin, live)
    journal.wait_failed()
    live.advance(2)
    outage.end(origin)
    audience.expect(live.plain(5, 7))
    live.advance()
    live.end()
    audience.expect_end(live.plain(7, 8))
    audience.assert_time_goes_on(6 * media.FPS)
    assert_calm(origin, live.path)
    assert origin.count(live.segment_path(4)) == len(NAMES), "nothing is fetched a second time"


def test_outage_that_ends_soon_costs_no_opening(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 10}))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(503), times=len(NAMES))
    failing.wait(len(NAMES))
    live.advance()
    audience.expect(live.plain(5, 6))
    assert journal.failures() == 0


def test_long_outage_is_one_gap_at_a_segments_edge(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """The segment to go on with has left the playlist."""
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    live.advance(6)
    failing.clear()
    audience.expect(live.plain(8, 11))
    live.end()
    audience.expect_end()
    audience.assert_time_goes_on(6 * media.FPS)


def test_tries_follow_their_pauses(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.2, 0.4, 0.8))
    live = origin.add(news())
    viewer = serve({"news": live.url}, **QUICK).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    origin.fault(live.path, Status(404), times=None)
    origin.clear_requests()
    origin.wait_for(live.path, 5)
    pauses = pauses_between(origin, live.path)
    assert all(pause >= 0.8 * least for pause, least in zip(pauses, (0.2, 0.4, 0.8, 0.8)))


def test_documented_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = list(itertools.islice(pipe._pauses(), 8))
    wanted = (0.5, 1, 2, 4, 8, 10, 10, 10)
    assert pauses == [pytest.approx(seconds, rel=0.5) for seconds in wanted]
    assert pauses[5:] != 3 * pauses[5:6], "a thousand channels shall not try in step"


#### The origin starts anew ####


def test_restart_with_lower_numbers_is_believed_the_third_time(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news(first_sequence=100))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(102, 105))
    live.restart(0)
    origin.clear_requests()
    audience.expect(live.plain(2, 5))
    for name in NAMES:
        assert origin.count(f"{live.path}?{name}") >= 4, "three, and the new opening's"
    live.advance()
    audience.expect(live.plain(5, 6))


def test_restart_is_believed_at_once_after_a_failed_load(origin: Origin, serve: Serve) -> None:
    live = origin.add(news(first_sequence=100))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(102, 105))
    failing = [origin.fault(f"{live.path}?{name}", Status(503)) for name in NAMES]
    live.restart(0)
    origin.clear_requests()
    audience.expect(live.plain(2, 5))
    assert [fault.taken for fault in failing] == [1, 1]
    for name in NAMES:
        loads = [r.time for r in origin.requests if r.path == f"{live.path}?{name}"]
        assert loads[2] - loads[1] < 0.8, "the second load was enough"


@pytest.mark.parametrize("age", [1, 2])
def test_playlist_of_a_cache_is_no_restart(
    origin: Origin, serve: Serve, journal: Journal, age: int
) -> None:
    live = origin.add(news(window=4))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(1, 4))
    stale = live.find(live.path)
    assert stale
    live.advance(age)
    audience.expect(live.plain(4, 4 + age))
    old = [origin.fault(f"{live.path}?{name}", Body(stale.body), times=2) for name in NAMES]
    live.advance()
    audience.expect(live.plain(4 + age, 5 + age))
    assert [fault.taken for fault in old] == [2, 2]
    assert journal.failures() == 0


def test_restarted_process_goes_on_in_the_middle_of_a_segment(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    stall = origin.fault(live.segment_path(5), Stall(CUT), times=len(NAMES))
    live.advance()
    stall.wait_held(len(NAMES))
    audience.expect(segment(5)[:WHOLE])
    origin.restart()
    live.advance()
    live.end()
    audience.expect_end(segments(5, 7)[WHOLE:])
    audience.assert_time_goes_on(5 * media.FPS)


#### Going on in the middle of a segment, at another opening ####


def cut_in_the_middle(origin: Origin, live: Playlist, audience: Audience) -> None:
    """Segment 5 stalls half-way, then the playlist is gone: the opening fails at once."""
    audience.expect(live.plain(2, 5))
    stall = origin.fault(live.segment_path(5), Stall(CUT), times=None)
    live.advance()
    stall.wait_held(len(NAMES))
    audience.expect(segment(5)[:WHOLE])
    origin.fault(live.path, Status(404), times=None)


def test_same_bytes_go_on_in_the_middle_of_a_segment(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    journal.wait_failed()
    live.advance()
    live.end()
    origin.clear_faults()
    audience.expect_end(segments(5, 7)[WHOLE:])
    audience.assert_time_goes_on(5 * media.FPS)


def test_other_bytes_are_one_cut_before_the_next_segment(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    journal.wait_failed()
    live.restart(1, segments=other_media())
    live.advance(2)
    live.end()
    origin.clear_faults()
    audience.expect_end(b"".join(other_media()[6:8]))


@pytest.mark.parametrize("container", ["aes-128", "fmp4"])
def test_other_containers_go_on_in_the_middle_of_a_segment(
    origin: Origin, serve: Serve, journal: Journal, container: str
) -> None:
    init, fragments = media.fmp4(SEGMENTS)
    if container == "fmp4":
        live = origin.add(Playlist("news", fragments, mode="live", init=init, extension=".m4s"))
    else:
        live, init = origin.add(news(aes_key=KEY)), b""
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(init + live.plain(2, 5))
    stall = origin.fault(live.segment_path(5), Stall(CUT), times=None)
    live.advance()
    stall.wait_held(len(NAMES))
    audience.expect(live.plain(5, 6)[: CUT - 400])
    origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    live.advance()
    live.end()
    origin.clear_faults()
    audience.expect_end(live.plain(5, 7)[CUT - 400 :])
    audience.assert_time_goes_on(5 * media.FPS)


def test_initialization_section_that_changed_is_sent_again(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    init, fragments = media.fmp4(SEGMENTS)
    options: dict[str, Any] = {"mode": "live", "extension": ".m4s"}
    live = origin.add(Playlist("news", fragments, init=init, **options))
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(init + live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    changed = init + b"\0\0\0\x0cfree\1\2\3\4"
    live.restart(1, segments=fragments, init=changed)
    failing.clear()
    audience.expect(changed + live.plain(5, 6))
    live.end()
    audience.expect_end()


#### Relays and raw streams ####


def add_relay(origin: Origin, path: str, *bodies: bytes, **options: Any) -> str:
    """A raw stream: each connection gets the next of these bodies, the last one again and again,
    and is closed behind it."""
    left = itertools.chain(bodies, itertools.repeat(bodies[-1]))
    return origin.add_endless(path, lambda: [next(left)], **options)


RELAYS = {
    "closes-between-segments": 4 * (0,) + (segments(0, 4),),
}


@pytest.mark.parametrize("prefix", ["", "httpstream://"], ids=["bare", "httpstream"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["closing", "chunked"])
def test_relay_that_sends_its_backlog_again_repeats_nothing(
    origin: Origin, serve: Serve, prefix: str, is_chunked: bool
) -> None:
    bodies = segments(0, 4), segments(1, 7), segments(5, 9)
    streams = {
        name: prefix + add_relay(origin, f"/{name}", *bodies, chunked=is_chunked) for name in NAMES
    }
    audience = Audience(serve(streams, **QUICK))
    audience.expect(segments(0, 9))
    audience.assert_time_goes_on(9 * media.FPS)


def test_relay_that_closes_within_a_packet_goes_on_at_a_key_frame(
    origin: Origin, serve: Serve
) -> None:
    bodies = segments(0, 3) + segment(3)[:CUT], segments(1, 7)
    audience = Audience(
        serve({name: add_relay(origin, f"/{name}", *bodies) for name in NAMES}, **QUICK)
    )
    audience.expect(segments(0, 3) + segment(3)[:WHOLE] + segments(4, 7))


def test_relay_that_stalls_is_opened_again(origin: Origin, serve: Serve) -> None:
    bodies = 4 * (segments(0, 4),) + (segments(2, 6),)
    streams = {name: add_relay(origin, f"/{name}", *bodies[3:]) for name in NAMES}
    stalls = [origin.fault(f"/{name}", Stall(len(bodies[0]))) for name in NAMES]
    audience = Audience(serve(streams, **QUICK))
    audience.expect(segments(0, 6))
    assert [stall.taken for stall in stalls] == [1, 1]


def test_tries_of_a_relay_follow_their_pauses(origin: Origin, serve: Serve) -> None:
    site = serve({"news": add_relay(origin, "/relay", segments(0, 2))}, **QUICK)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 2))) == segments(0, 2)
    origin.wait_for("/relay", 4)
    pauses = pauses_between(origin, "/relay")
    assert all(pause >= 0.8 * least for pause, least in zip(pauses, PAUSES))


def test_file_goes_on_at_its_byte(origin: Origin, serve: Serve) -> None:
    body = segments(0, 6)
    address = origin.add_file("/film", body)
    origin.fault("/film", Break(at=100_000), times=4)
    audience = Audience(serve(both(f"httpstream://{address}"), **QUICK))
    audience.expect_end(body)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_relay_of_a_streampipe_survives_its_restart(origin: Origin, serve: Serve) -> None:
    live = origin.add(news(listed=4))
    port = free_port()
    settings: dict[str, Any] = {**QUICK, "server": {"port": port}}
    near = Site({"news": live.url}, **settings)
    try:
        address = f"httpstream://http://127.0.0.1:{port}/news"
        audience = Audience(serve({name: address for name in NAMES}, **QUICK))
        audience.expect(live.plain(1, 4))
        near.close()
        live.advance(2)
        near = Site({"news": live.url}, **settings)
        audience.expect(live.plain(4, 6))
        live.advance()
        audience.expect(live.plain(6, 7))
        late = near.watch("/news")
        assert media.first_picture(late.read(len(segment(4))))[1]
    finally:
        near.close()
    audience.assert_time_goes_on(6 * media.FPS)


#### An address that expires ####


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_expired_address_is_resolved_anew(origin: Origin, serve: Serve, status: int) -> None:
    live = origin.add(news())
    for signature, times in ((1, len(NAMES)), (2, None)):
        origin.fault("/watch.m3u8", Redirect(f"{live.path}?signed={signature}"), times=times)
    audience = Audience(serve(both(f"{origin.url}/watch.m3u8"), **QUICK))
    audience.expect(live.plain(2, 5))
    origin.fault(f"{live.path}?signed=1", Status(status), times=None)
    live.advance(2)
    audience.expect(live.plain(5, 7))
    assert origin.count("/watch.m3u8") == 2 * len(NAMES)
    assert origin.count(f"{live.path}?signed=2") >= len(NAMES)


#### A backup ####


def test_backup_with_the_same_bytes_goes_on_in_the_middle_of_a_segment(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live, spare = origin.add(news()), backup.add(news())
    spare.advance()
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    audience.expect(segment(5)[WHOLE:])
    spare.advance()
    spare.end()
    audience.expect_end(segment(6))
    audience.assert_time_goes_on(5 * media.FPS)
    fetched = [backup.count(spare.segment_path(number)) for number in range(7)]
    assert fetched == [0, 0, 0, 0, 0, 2, 2]


def test_backup_with_other_bytes_goes_on_with_the_next_segment(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live = origin.add(news())
    spare = backup.add(Playlist("news", other_media(), mode="live"))
    spare.advance(2)
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    audience.expect(spare.plain(6, 7))
    spare.end()
    audience.expect_end()


@pytest.mark.parametrize("behind", [1, 2])
def test_backup_that_is_a_little_behind_repeats_nothing(
    origin: Origin, serve: Serve, backup: Origin, behind: int
) -> None:
    live, spare = origin.add(news(window=6)), backup.add(news(listed=6 - behind, window=6))
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    audience.expect(live.plain(3, 6))
    origin.stop()
    backup.wait_for(spare.path, 3)
    spare.advance(behind + 1)
    audience.expect(live.plain(6, 7))
    spare.end()
    audience.expect_end()


@pytest.mark.parametrize("first", [1000, 0], ids=["higher", "lower"])
def test_backup_with_unrelated_numbers_goes_on_at_its_live_edge(
    origin: Origin, serve: Serve, backup: Origin, first: int
) -> None:
    live = origin.add(news(first_sequence=500))
    spare = backup.add(Playlist("news", other_media(), mode="live", first_sequence=first))
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    audience.expect(live.plain(502, 505))
    origin.fault(live.path, Status(404), times=None)
    audience.expect(spare.plain(first + 2, first + 5))
    spare.end()
    audience.expect_end()


def test_failures_go_round_the_list(origin: Origin, serve: Serve, journal: Journal) -> None:
    """No return to the preferred address while another works; the list is gone through in turn."""
    lives = [origin.add(Playlist(f"news-{n}", media.ts_segments(SEGMENTS), mode="live"))
             for n in range(3)]  # fmt: skip
    addresses = [f"{live.url}" for live in lives]
    viewer = serve({"news": {"url": addresses}}, **QUICK).watch("/news")
    start = segments(2, 5)
    assert viewer.read(len(start)) == start
    for turn, number in enumerate((5, 6, 7)):
        failed, next_one = lives[turn], lives[(turn + 1) % 3]
        fault = origin.fault(failed.path, Status(404))
        for live in lives:
            live.advance()
        assert viewer.read(len(segment(number))) == segment(number)
        assert fault.taken == 1
        assert origin.count(next_one.segment_path(number)) == 1
    counts = [[origin.count(live.segment_path(n)) for n in (5, 6, 7)] for live in lives]
    assert counts == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_backup_is_tried_at_once_and_then_with_pauses(
    origin: Origin, serve: Serve, backup: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.3, 0.6))
    live, spare = origin.add(news()), backup.add(news())
    viewer = serve({"news": {"url": [live.url, spare.url]}}, **QUICK).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    for place, playlist in ((origin, live), (backup, spare)):
        place.fault(playlist.path, Status(404), times=None)
    origin.clear_requests()
    origin.wait_for(live.path, 2)
    backup.wait_for(spare.path, 2)
    first, third = (request.time for request in origin.requests[:2])
    second, fourth = (request.time for request in backup.requests[:2])
    assert second - first < 0.2
    assert third - second >= 0.8 * 0.3
    assert fourth - third >= 0.8 * 0.6


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [pytest.param(60.0, 1, id="within-a-minute"), pytest.param(0.0, 0, id="later")],
)
def test_new_start_begins_with_what_did_not_fail_lately(
    origin: Origin,
    serve: Serve,
    backup: Origin,
    monkeypatch: pytest.MonkeyPatch,
    memory: float,
    wanted: int,
) -> None:
    monkeypatch.setattr(pipe, "BAD_TIME", memory)
    live, spare = origin.add(news()), backup.add(news())
    broken = origin.fault(live.path, Close())
    site = serve({"news": {"url": [live.url, spare.url]}}, **{**QUICK, "linger": 0})
    with site.watch("/news") as viewer:
        assert viewer.read(188) == segment(2)[:188]
    wait_closed(site)
    assert broken.taken == 1
    origin.clear_requests()
    backup.clear_requests()
    with site.watch("/news") as viewer:
        assert viewer.read(188) == segment(2)[:188]
    assert [bool(origin.requests), bool(backup.requests)] == [wanted == 0, wanted == 1]


def wait_closed(site: Site) -> None:
    """Until no channel is fed any more."""
    channels = site.channels
    with channels._retired:
        assert channels._retired.wait_for(lambda: not channels._fed, TIMEOUT)


def test_backup_gets_its_full_time(
    origin: Origin, serve: Serve, backup: Origin, journal: Journal
) -> None:
    """Silence is counted anew: each answer of the backup takes most of `timeout`."""
    live, spare = origin.add(news()), backup.add(news())
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    audience.expect(live.plain(2, 5))
    spare.advance()
    backup.delay = 0.8
    journal.wait_failed("1 of 2")
    audience.expect(live.plain(5, 6))
    assert journal.count("2 of 2: (?!goes on)") == 0


#### Starting with several addresses ####


def test_addresses_share_the_time_of_a_start(origin: Origin, serve: Serve, backup: Origin) -> None:
    live, spare = origin.add(news()), backup.add(news())
    origin.fault(live.path, StallHeaders(), times=None)
    began = time.monotonic()
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    audience.expect(spare.plain(2, 5))
    assert 0.9 < time.monotonic() - began < 1.9


@pytest.mark.parametrize(
    ("fault", "least", "most"),
    [
        pytest.param(Close(), 0.0, 2.0, id="at-once"),
        pytest.param(StallHeaders(), 1.8, 4.0, id="after-the-time-they-share"),
    ],
)
def test_answer_is_502_as_soon_as_all_addresses_failed(
    origin: Origin, serve: Serve, backup: Origin, fault: Fault, least: float, most: float
) -> None:
    live, spare = origin.add(news()), backup.add(news())
    handles = [place.fault("*", fault, times=None) for place in (origin, backup)]
    timeout = 20 if most == 2.0 else 2
    site = serve({"news": {"url": [live.url, spare.url]}}, **{**QUICK, "timeout": timeout})
    began = time.monotonic()
    answer = site.get("/news")
    assert answer.status == 502
    assert least <= time.monotonic() - began < most
    assert [handle.taken for handle in handles] == [1, 1], "each is tried once"


#### The end ####


def test_end_is_the_rest_and_the_final_chunk(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    live.advance(2)
    live.end()
    audience.expect_end(live.plain(2, 7))


def test_end_while_the_origin_was_down_is_an_end(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """Nothing new is listed when it comes back."""
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    live.end()
    failing.clear()
    audience.expect_end()


def test_end_in_the_middle_of_a_segment_at_another_opening(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    journal.wait_failed()
    live.end()
    origin.clear_faults()
    audience.expect_end(segment(5)[WHOLE:])


#### Local files, and https ####

SECRET = b"nobody shall read this" * 100


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """The address of a file on this machine."""
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    return file.as_uri()


NAMED = {
    "segment": "{entry}{file}\n",
    "key": '#EXT-X-KEY:METHOD=AES-128,URI="{file}"\n{entry}0.ts\n',
    "map": '#EXT-X-MAP:URI="{file}"\n{entry}0.ts\n',
}


def naming(what: str, file: str) -> bytes:
    """A playlist that names a file in the place of a segment, key or map."""
    lines = NAMED[what].format(file=file, entry="#EXTINF:1,\n")
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n" + lines.encode()


@pytest.mark.parametrize("what", list(NAMED))
def test_local_file_named_by_a_playlist_is_refused(
    origin: Origin, serve: Serve, journal: Journal, secret: str, what: str
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    live.override = naming(what, secret)
    journal.wait_failed()
    journal.wait_for("local file: refused", len(NAMES))
    live.override = None
    live.advance()
    live.end()
    audience.expect_end(live.plain(5, 6))


@pytest.mark.parametrize("what", list(NAMED))
def test_local_file_named_at_a_start_is_refused(
    origin: Origin, serve: Serve, secret: str, what: str
) -> None:
    live = origin.add(news())
    live.override = naming(what, secret)
    answer = serve({"news": live.url}, **QUICK).get("/news")
    assert answer.status == 502
    assert answer.json == {"error": "the origin names a local file: refused"}


@pytest.mark.parametrize("path", ["index.m3u8", "key", "init.mp4", "*.m4s"])
def test_redirect_to_a_local_file_is_refused(
    origin: Origin, serve: Serve, journal: Journal, secret: str, path: str
) -> None:
    init, fragments = media.fmp4(SEGMENTS)
    live = origin.add(
        Playlist("news", fragments, mode="live", init=init, extension=".m4s", aes_key=KEY)
    )
    redirect = origin.fault(f"/news/{path}", Redirect(secret), times=None)
    answer = serve({"news": live.url}, **{**QUICK, "timeout": 1}).get("/news")
    assert redirect.taken
    assert answer.status in (502, 504)
    assert SECRET[:22] not in answer.body
    assert journal.count("local file: refused"), "logged"


def test_redirect_of_a_segment_to_a_local_file_is_a_gap(
    origin: Origin, serve: Serve, secret: str
) -> None:
    live = origin.add(news())
    origin.fault(live.segment_path(3), Redirect(secret), times=None)
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 6}))
    audience.expect(live.plain(2, 3) + live.plain(4, 5))


@pytest.mark.parametrize("what", list(NAMED))
def test_http_within_https_is_explained(what: str) -> None:
    text = naming(what, "http://a.example/1.ts").decode()
    with pytest.raises(ValueError, match="insecure") as caught:
        parse_m3u8(text, base_uri="https://a.example/index.m3u8")
    assert pipe.explain(caught.value).endswith("configure the http:// address")


#### Patience ####


def test_viewers_are_let_go_after_reconnect_seconds(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 0.0)
    live = origin.add(news())
    site = serve(both(live.url), **{**QUICK, "reconnect": 2})
    audience = Audience(site)
    audience.expect(live.plain(2, 5))
    began = time.monotonic()
    failing = origin.fault(live.path, Status(404), times=None)
    audience.expect_end(is_complete=False)
    assert 1.0 < time.monotonic() - began < 4.0
    wait_closed(site)
    assert site.get("/one").status == 502
    failing.clear()
    assert site.watch("/one").read(188) == segment(2)[:188]


def test_new_viewers_join_while_the_upstream_is_opened_again(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    site = serve({"one": live.url}, **QUICK)
    first = site.watch("/one")
    assert first.read(len(live.plain(2, 5))) == live.plain(2, 5)
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_for("^one: ", 3)
    late = site.watch("/one")
    assert late.status == 200
    assert late.read(len(live.plain(2, 5))) == live.plain(2, 5)
    live.advance()
    failing.clear()
    for viewer in (first, late):
        assert viewer.read(len(segment(5))) == segment(5)


def test_failed_upstream_without_viewers_is_not_opened_again(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    site = serve({"news": live.url}, **{**QUICK, "linger": 60})
    with site.watch("/news") as viewer:
        assert viewer.read(188) == segment(2)[:188]
    assert site.ask("GET", "/health").json["streams"] == 1
    origin.fault(live.path, Status(404), times=None)
    origin.clear_requests()
    wait_closed(site)
    assert origin.count(live.path) == 1
    assert journal.failures() == 1


def test_vod_goes_on_at_its_segment_and_byte(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(film())
    stall = origin.fault(playlist.segment_path(1), Stall(CUT), times=4)
    audience = Audience(serve(both(playlist.url), **QUICK))
    stall.wait_held(4)
    audience.expect((segments(0, 2))[: len(segment(0)) + WHOLE])
    origin.restart()
    audience.expect_end(segments(0, 6)[len(audience.got) :])
    audience.assert_time_goes_on(6 * media.FPS)


def test_vod_goes_on_after_an_outage(origin: Origin, serve: Serve, journal: Journal) -> None:
    """The origin is away for longer than a segment is tried again."""
    playlist = origin.add(film())
    stall = origin.fault(playlist.segment_path(1), Stall(CUT), times=4)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "threads": 2}))
    stall.wait_held(4)
    audience.expect((segments(0, 2))[: len(segment(0)) + WHOLE])
    origin.stop()
    for name, count in (("one", 1), ("three", 3)):
        journal.wait_for(rf"^{name}: \S+, 1 of 1: (?!goes on)", count)
    origin.start()
    audience.expect_end(segments(0, 6)[len(audience.got) :])
    audience.assert_time_goes_on(6 * media.FPS)


#### Silence ####


@pytest.fixture
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "SILENCE", 0.3)


@pytest.mark.usefixtures("_silence")
def test_null_packets_fill_silence(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(2, 5))
    times = []
    for _ in range(3):
        audience.expect(pipe.NULL_PACKET)
        times.append(time.monotonic())
    assert all(later - earlier > 0.8 for earlier, later in itertools.pairwise(times))
    stall = origin.fault(live.segment_path(5), Stall(CUT), times=len(NAMES))
    live.advance()
    stall.wait_held(len(NAMES))
    bodies = {without_nulls(viewer, WHOLE) for viewer in audience.viewers}
    assert bodies == {segment(5)[:WHOLE]}
    audience.expect(pipe.NULL_PACKET)


def without_nulls(viewer: Watch, size: int) -> bytes:
    """The next packets of the source, `size` bytes of them."""
    body = b""
    while len(body) < size:
        packet = viewer.read(media.PACKET)
        body += packet if media.pid(packet) != media.PID_NULL else b""
    return body


@pytest.mark.usefixtures("_silence")
@pytest.mark.parametrize("container", ["fmp4", "aac"])
def test_silence_of_other_containers_stays_silent(
    origin: Origin, serve: Serve, container: str
) -> None:
    init, parts = media.fmp4() if container == "fmp4" else (b"", media.aac_segments())
    extension = {"fmp4": ".m4s", "aac": ".aac"}[container]
    live = origin.add(Playlist("news", parts, mode="live", init=init or None, extension=extension))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(init + live.plain(2, 5))
    origin.clear_requests()
    for name in NAMES:
        origin.wait_for(f"{live.path}?{name}", 2)
    live.advance()
    live.end()
    audience.expect_end(live.plain(5, 6))


#### What streamlink does not report ####


def test_dead_worker_is_a_failure_at_once(
    origin: Origin, serve: Serve, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 60, "reconnect": 60}))
    audience.expect(live.plain(2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(pipe.HLSStreamWorker, "valid_segment", fail)
        journal.wait_failed()
    live.advance()
    audience.expect(live.plain(5, 6))


def fail(*_: object) -> bool:
    raise KeyError("a plugin's mistake")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_writer_is_a_failure_at_once(
    origin: Origin, serve: Serve, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 60, "reconnect": 60}))
    audience.expect(live.plain(2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(pipe.HLSStreamWriter, "_queue_get", leave)
        journal.wait_failed()
    live.advance()
    audience.expect(live.plain(5, 6))


def leave(*_: object) -> None:
    """End the thread, without a report."""
    raise SystemExit


def test_segments_left_out_on_purpose_are_a_sign_of_life(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    names = [f"/{number}.ts" for number in range(5, 9)]
    options = {"hls-segment-ignore-names": names}
    audience = Audience(serve(both(live.url), **QUICK, streamlink=options))
    audience.expect(live.plain(2, 5))
    for _ in names:
        live.advance()
        origin.clear_requests()
        for name in NAMES:
            origin.wait_for(f"{live.path}?{name}")
    assert journal.failures() == 0
    live.advance()
    live.end()
    audience.expect_end(live.plain(9, 10))


def test_endless_filtering_of_a_frozen_playlist_is_a_failure(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    options = {"hls-segment-ignore-names": ["/5.ts"]}
    audience = Audience(serve(both(live.url), **QUICK, streamlink=options))
    audience.expect(live.plain(2, 5))
    live.advance()
    journal.wait_failed()
    live.advance()
    audience.expect(live.plain(6, 7))
