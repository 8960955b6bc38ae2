"""Failures of origins. Everything is real: origins, streamlink, StreamPipe and viewers' sockets.

Most tests run two channels on one source, one channel with one viewer and the other with three.
They compare the bytes that each viewer receives with those of the origin's media. Pauses between
tries and the time until a failure is noticed are shortened if their length does not matter. Only
the last part tests units, in situations that no origin can cause.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import random
import re
import shutil
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
from streamlink.stream.hls.hls import HLSStreamWorker, HLSStreamWriter
from streamlink.stream.hls.m3u8 import parse_m3u8

import pipe
from tests import media
from tests.memory import traced_memory
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
    Think,
    WrongLength,
    master,
)
from tests.program import eventually
from tests.server import TIMEOUT, Site, Watch
from tests.test_discontinuities import jumps
from tests.test_players import PROGRAM, listening_address, vlc
from tests.test_sharing import feeders
from tests.threads import Task

# With these tests, `python -m pytest` would take more than three minutes.
pytestmark = pytest.mark.long

SEGMENTS = 12  # of one timeline, a second each; then they repeat
KEY = bytes(range(16))
# A failure is noticed after `timeout`, but not before two target durations, which are 2 s.
QUICK: Mapping[str, Any] = {"timeout": 2, "reconnect": 20, "linger": 0.1}
PAUSES = (0.05, 0.1, 0.2)
CUT = 10_000  # bytes into a segment
WHOLE = CUT - CUT % media.PACKET  # bytes in the whole packets among these

Serve = Callable[..., Site]


#### Media ####


def news(**options: Any) -> Playlist:
    """A live channel. A test adds each new segment with advance()."""
    settings: dict[str, Any] = {"mode": "live", **options}
    return Playlist("news", media.ts_segments(SEGMENTS), **settings)


def film(**options: Any) -> Playlist:
    return Playlist("film", media.ts_segments(SEGMENTS)[:6], **options)


def other_media() -> Sequence[bytes]:
    """Media with the same timeline but different bytes."""
    return media.video_only_segments(SEGMENTS)


def segment(number: int) -> bytes:
    return media.ts_segments(SEGMENTS)[number]


def segments(first: int, stop: int) -> bytes:
    return b"".join(media.ts_segments(SEGMENTS)[first:stop])


#### Viewers, and the log ####


NAMES = ("one", "three")


def both(*addresses: str, **stream: Any) -> dict[str, object]:
    """Two channels with the same addresses; the query shows which one sent a request."""
    return {name: {"url": [f"{url}?{name}" for url in addresses], **stream} for name in NAMES}


class Audience:
    """A viewer of one channel, and three viewers of another channel with the same source.

    All must receive the same bytes and keep their connections.
    """

    def __init__(self, site: Site) -> None:
        self.viewers = [site.watch(f"/{name}") for name in ("one", "three", "three", "three")]
        self.got = bytearray()
        assert {viewer.status for viewer in self.viewers} == {200}

    def expect(self, wanted: bytes) -> None:
        """Assert that these are the next bytes."""
        for viewer in self.viewers:
            assert viewer.read(len(wanted)) == wanted
        self.got += wanted

    def after_a_seam(self, wanted: bytes) -> bytes:
        """These bytes as viewers receive them if they do not continue the last ones."""
        return media.spliced(bytes(self.got), wanted)[len(self.got) :]

    def expect_end(self, wanted: bytes = b"", *, is_complete: bool = True) -> None:
        """Assert that these are the last bytes."""
        assert [viewer.read_all() for viewer in self.viewers] == 4 * [(wanted, is_complete)]
        self.got += wanted

    def assert_pictures_in_order(self, pictures: int) -> None:
        """Assert that all bytes so far decode to that many pictures, in order."""
        times = media.decode(bytes(self.got), strict=False).video
        assert list(times) == sorted(set(times))
        assert len(times) == pictures


class Journal(logging.Handler):
    """Collects the messages that StreamPipe logs; tests can wait for them."""

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
        """Wait until so many lines match."""
        with self._grown:
            came = self._grown.wait_for(lambda: self.count(pattern) >= times, TIMEOUT)
            assert came, "\n".join([f"not logged: {pattern}", *self._lines])

    def wait_failed(self, position: str = "1 of 1") -> None:
        """Wait until both channels have logged a failure of that address."""
        for name in NAMES:
            self.wait_for(rf"^{name}: address {position} \(\S+\): (?!recovered)")

    def failures(self) -> int:
        return self.count(r"^\w+: address \d of \d \(\S+\): (?!recovered)")


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
    monkeypatch.setattr(pipe, "JUDGE_GRACE", 0.1)
    wait = HLSStreamWorker.wait
    monkeypatch.setattr(HLSStreamWorker, "wait", lambda worker, time: wait(worker, time / 5))


@pytest.fixture
def backup() -> Iterator[Origin]:
    """A second origin."""
    with Origin() as running:
        yield running


def pauses_between(origin: Origin, path: str) -> list[float]:
    """Seconds between the requests for a path, which may have a query."""
    times = [request.time for request in origin.requests if request.path == path]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def assert_paced(origin: Origin, path: str, *least: float) -> None:
    """Assert that the first requests for a path are so many seconds apart, apart from jitter."""
    pauses = pauses_between(origin, path)[: len(least)]
    assert all(pause >= 0.79 * wanted for pause, wanted in zip(pauses, least, strict=True))


def assert_calm(origin: Origin, path: str) -> None:
    """Assert that every try waited for its pause, whatever the jitter."""
    for name in NAMES:
        assert min(pauses_between(origin, f"{path}?{name}"), default=1.0) >= 0.7 * PAUSES[0]


#### A segment fails ####


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
def test_viewers_do_not_notice_a_hiccup_of_a_segment(
    origin: Origin, serve: Serve, mode: str, answers: tuple[tuple[Fault, ...], ...]
) -> None:
    playlist = origin.add(news(mode=mode, window=5, target_duration=2))
    first, stop = (0, SEGMENTS) if mode == "vod" else (2, 5)
    for faults in answers:
        for _ in range(4 if mode == "vod" else 2):  # upstreams
            origin.fault(playlist.segment_path(3), *faults)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "timeout": 4}))
    audience.expect(playlist.plain(first, stop))
    audience.assert_pictures_in_order((stop - first) * media.FPS)


def test_pauses_between_tries_of_a_segment_grow(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    failing = origin.fault(live.segment_path(4), Status(503), times=4)
    viewer = serve({"news": live.url}, timeout=5).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    assert failing.taken == 4
    assert_paced(origin, live.segment_path(4), 0.1, 0.2, 0.4, 0.8)


LOST: dict[str, tuple[tuple[Fault, ...], int]] = {
    "answers-404": ((Status(404),), 0),
    "answers-500": ((Status(500),), 0),
    "stalls-in-its-headers": ((StallHeaders(),), 0),
    "stalls-in-its-body": ((NoRange(), Stall(CUT)), WHOLE),
    "breaks-at-the-same-place": ((NoRange(), Break(CUT)), WHOLE),
}


@pytest.mark.parametrize(("faults", "size"), LOST.values(), ids=list(LOST))
def test_segment_that_always_fails_causes_one_gap(
    origin: Origin, serve: Serve, faults: tuple[Fault, ...], size: int
) -> None:
    live = origin.add(news())
    origin.fault(live.segment_path(3), *faults, times=None)
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 6}))
    audience.expect(live.plain(2, 3) + segment(3)[:size])
    audience.expect(audience.after_a_seam(live.plain(4, 5)))
    live.advance()
    live.end()
    audience.expect_end(live.plain(5, 6))


@pytest.mark.parametrize(("faults", "size"), LOST.values(), ids=list(LOST))
def test_film_segment_that_always_fails_causes_one_gap(
    origin: Origin, serve: Serve, faults: tuple[Fault, ...], size: int
) -> None:
    playlist = origin.add(film())
    origin.fault(playlist.segment_path(3), *faults, times=None)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "timeout": 2.5}))
    audience.expect_end(media.spliced(segments(0, 3) + segment(3)[:size], segments(4, 6)))


def test_fmp4_viewer_is_dropped_after_a_torn_segment(origin: Origin, serve: Serve) -> None:
    """Its player would look for the rest of the box in all following segments."""
    init, fragments = media.fmp4(SEGMENTS)
    live = Playlist("news", fragments, mode="live", init=init, extension=".m4s")
    origin.add(live)
    origin.fault(live.segment_path(4), NoRange(), Stall(CUT), times=None)
    site = serve(both(live.url), **{**QUICK, "timeout": 6, "linger": 20})
    audience = Audience(site)
    audience.expect(init + live.plain(2, 4) + live.plain(4, 5)[:CUT])
    audience.expect_end(is_complete=False)
    live.advance()
    late = site.watch("/one")
    wanted = init + live.plain(2, 4) + live.plain(5, 6)
    assert late.read(len(wanted)) == wanted
    dropped = b'streampipe_viewer_drops_total{stream="three",reason="torn"} 3'
    eventually(lambda: dropped in site.get("/metrics").body, "three drops are counted")


def test_segment_is_not_tried_after_it_left_the_playlist(origin: Origin, serve: Serve) -> None:
    """Otherwise it would be tried for two target durations, 20 s."""
    live = origin.add(news(window=4, target_duration=10))
    failing = origin.fault(live.segment_path(3), Status(404), times=None)
    often = {"hls-playlist-reload-time": "segment"}
    site = serve(both(live.url), **{**QUICK, "timeout": 30, "streamlink": often})
    audience = Audience(site)
    audience.expect(live.plain(1, 3))
    failing.wait(2)
    live.advance(4)
    began = time.monotonic()
    audience.expect(audience.after_a_seam(live.plain(4, 8)))
    assert time.monotonic() - began < 5


def test_stream_recovers_after_every_segment_failed_for_a_while(
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
    seams = {audience.after_a_seam(live.plain(number, 9)) for number in range(6, 9)}
    assert bodies <= {(body, True) for body in (live.plain(5, 9), *seams)}


#### The playlist or the whole origin fails ####

HTML = b"<!DOCTYPE html><title>maintenance</title>"
NO_SEGMENTS = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n"


@dataclass(frozen=True)
class Outage:
    """The faults of all requests for the playlist for a while; without any, it is frozen."""

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
    "without-segments": Outage((Body(NO_SEGMENTS),)),
    "hangs-up": Outage((Close(reset=True),)),
    "stalls": Outage((StallHeaders(),)),
    "401": Outage((Status(401),)),
    "404": Outage((Status(404),)),
    "410": Outage((Status(410),)),
    "503": Outage((Status(503),)),
    "nothing": Outage((Body(b""),)),
    "cut-off": Outage((Break(30),)),
    "stalls-in-its-body": Outage((Stall(30),)),
    "403": Outage((Status(403),)),
    "500": Outage((Status(500, HTML),)),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=list(OUTAGES))
def test_stream_continues_after_an_outage(
    origin: Origin, serve: Serve, journal: Journal, outage: Outage
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    outage.begin(origin, live)
    journal.wait_failed()
    live.advance(2)
    live.end()
    outage.end(origin)
    audience.expect_end(live.plain(5, 7))
    audience.assert_pictures_in_order(5 * media.FPS)
    assert_calm(origin, live.path)
    assert origin.count(live.segment_path(4)) == len(NAMES), "no segment is fetched twice"


def test_short_outage_does_not_reopen_the_upstream(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    site = serve(both(live.url), **{**QUICK, "timeout": 10})
    audience = Audience(site)
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(503), times=len(NAMES))
    failing.wait(len(NAMES))
    live.advance()
    audience.expect(live.plain(5, 6))
    assert origin.count(live.segment_path(4)) == len(NAMES), "no segment is fetched twice"
    assert all(stream["restarts"] == 0 for stream in site.get("/status").json["streams"])
    assert journal.failures() == len(NAMES), "each channel logs the failed reload once"


def test_long_outage_causes_one_gap_between_segments(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """The next segment has already left the playlist."""
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    live.advance(6)
    failing.clear()
    audience.expect(audience.after_a_seam(live.plain(8, 11)))
    live.end()
    audience.expect_end()
    audience.assert_pictures_in_order(6 * media.FPS)


def test_tries_wait_for_their_pauses(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.2, 0.4, 0.8))
    live = origin.add(news())
    viewer = serve({"news": live.url}, **QUICK).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    origin.fault(live.path, Status(404), times=None)
    origin.clear_requests()
    origin.wait_for(live.path, 5)
    assert_paced(origin, live.path, 0.2, 0.4, 0.8, 0.8)


def test_pauses_are_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = list(itertools.islice(pipe._reopen_pauses(), 8))
    wanted = (0.5, 1, 2, 4, 8, 10, 10, 10)
    assert pauses == [pytest.approx(seconds, rel=0.5) for seconds in wanted]
    assert pauses[5:] != 3 * pauses[5:6], "channels must not retry in step"


#### The origin restarts ####


@pytest.mark.parametrize(
    ("faults", "loads"),
    [
        pytest.param(0, 3, id="the-third-time"),
        pytest.param(1, 2, id="at-once-after-a-failed-load"),
    ],
)
def test_restart_with_lower_numbers_is_accepted(
    origin: Origin, serve: Serve, journal: Journal, faults: int, loads: int
) -> None:
    live = origin.add(news(first_sequence=100))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(102, 105))
    for name in NAMES:
        origin.fault(f"{live.path}?{name}", Status(503), times=faults)
    live.restart(0)
    origin.clear_requests()
    audience.expect(audience.after_a_seam(live.plain(2, 5)))
    paths = [request.path for request in origin.requests]
    asked = paths[: paths.index(live.segment_path(2))]
    assert max(asked.count(f"{live.path}?{name}") for name in NAMES) == loads + 1, (
        "reopening loads the playlist once more"
    )
    live.advance()
    audience.expect(live.plain(5, 6))


@pytest.mark.parametrize("age", [1, 2])
def test_stale_playlist_of_a_cache_is_not_a_restart(
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


def test_recording_in_place_of_a_live_stream_is_an_outage(origin: Origin, serve: Serve) -> None:
    """Some providers show one while a channel is down."""
    live = origin.add(news(first_sequence=496))
    recording = origin.add(Playlist("recording", other_media(), mode="vod"))
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(498, 501))
    for name in NAMES:
        # The running channel loads it LOWER_PLAYLISTS times; the reopened one, twice.
        loads = pipe.LOWER_PLAYLISTS + 2
        shown = origin.fault(f"{live.path}?{name}", Redirect(recording.url), times=loads)
        shown.wait(loads)
    live.advance()
    audience.expect(live.plain(501, 502))


def test_stream_continues_within_a_segment_after_the_origin_restarted(
    origin: Origin, serve: Serve
) -> None:
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
    audience.assert_pictures_in_order(5 * media.FPS)


#### A new opening continues in the middle of a segment ####


def cut_in_the_middle(origin: Origin, live: Playlist, audience: Audience) -> None:
    """Stall segment 5 after CUT bytes, then fail the playlist: the opening fails at once."""
    audience.expect(live.plain(2, 5))
    stall = origin.fault(live.segment_path(5), Stall(CUT), times=None)
    live.advance()
    stall.wait_held(len(NAMES))
    audience.expect(segment(5)[:WHOLE])
    origin.fault(live.path, Status(404), times=None)


def test_same_bytes_continue_in_the_middle_of_a_segment(
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
    audience.assert_pictures_in_order(5 * media.FPS)


def test_different_bytes_cause_one_cut_before_the_next_segment(
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
    audience.expect_end(audience.after_a_seam(b"".join(other_media()[6:8])))


@pytest.mark.parametrize("container", ["aes-128", "fmp4"])
def test_other_containers_continue_in_the_middle_of_a_segment(
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
    audience.assert_pictures_in_order(5 * media.FPS)


def test_changed_initialization_section_is_sent_again(
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
    """A raw stream: each connection gets the next of these bodies, and is closed after it.

    If no body is left, a connection gets the last one again.
    """
    left = itertools.chain(bodies, itertools.repeat(bodies[-1]))
    return origin.add_endless(path, lambda: [next(left)], **options)


@pytest.mark.parametrize("prefix", ["", "httpstream://"], ids=["bare", "httpstream"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["closing", "chunked"])
def test_backlog_of_a_reopened_relay_is_not_repeated(
    origin: Origin, serve: Serve, prefix: str, is_chunked: bool
) -> None:
    bodies = segments(0, 4), segments(1, 7), segments(5, 9)
    streams = {
        name: prefix + add_relay(origin, f"/{name}", *bodies, chunked=is_chunked) for name in NAMES
    }
    audience = Audience(serve(streams, **QUICK))
    audience.expect(segments(0, 9))
    audience.assert_pictures_in_order(9 * media.FPS)


def test_relay_that_closes_within_a_packet_continues_at_a_key_frame(
    origin: Origin, serve: Serve
) -> None:
    bodies = segments(0, 3) + segment(3)[:CUT], segments(1, 7)
    audience = Audience(
        serve({name: add_relay(origin, f"/{name}", *bodies) for name in NAMES}, **QUICK)
    )
    parts = segments(0, 3) + segment(3)[:WHOLE], segments(4, 7)
    audience.expect(media.spliced(*parts, is_announced=False))


def test_stalled_relay_is_reopened(origin: Origin, serve: Serve) -> None:
    bodies = segments(0, 4), segments(2, 6)
    streams = {name: add_relay(origin, f"/{name}", *bodies) for name in NAMES}
    stalls = [origin.fault(f"/{name}", Stall(len(bodies[0]))) for name in NAMES]
    audience = Audience(serve(streams, **QUICK))
    audience.expect(segments(0, 6))
    assert [stall.taken for stall in stalls] == [1, 1]


def test_tries_of_a_relay_wait_for_their_pauses(origin: Origin, serve: Serve) -> None:
    site = serve({"news": add_relay(origin, "/relay", segments(0, 2))}, **QUICK)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 2))) == segments(0, 2)
    origin.wait_for("/relay", 4)
    assert_paced(origin, "/relay", *PAUSES)


def test_broken_file_continues_at_its_byte(origin: Origin, serve: Serve) -> None:
    body = segments(0, 6)
    address = origin.add_file("/film", body)
    origin.fault("/film", Break(at=100_000), times=4)
    audience = Audience(serve(both(f"httpstream://{address}"), **QUICK))
    audience.expect_end(body)


def test_relay_that_only_repeats_itself_is_abandoned(origin: Origin, serve: Serve) -> None:
    """Repeated bytes, which no viewer gets, do not extend `reconnect`."""
    streams = {name: add_relay(origin, f"/{name}", segments(0, 2)) for name in NAMES}
    audience = Audience(serve(streams, **{**QUICK, "reconnect": 1}))
    audience.expect_end(segments(0, 2), is_complete=False)


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
        audience = Audience(serve(dict.fromkeys(NAMES, address), **QUICK))
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
    audience.assert_pictures_in_order(6 * media.FPS)


#### An address expires ####


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_expired_address_is_resolved_again(origin: Origin, serve: Serve, status: int) -> None:
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


#### Backup addresses ####


def test_backup_with_the_same_bytes_continues_in_the_middle_of_a_segment(
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
    audience.assert_pictures_in_order(5 * media.FPS)
    fetched = [backup.count(spare.segment_path(number)) for number in range(7)]
    assert fetched == [0, 0, 0, 0, 0, 2, 2]


def test_backup_with_different_bytes_continues_with_the_next_segment(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live = origin.add(news())
    spare = backup.add(Playlist("news", other_media(), mode="live"))
    spare.advance(2)
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    cut_in_the_middle(origin, live, audience)
    audience.expect(audience.after_a_seam(spare.plain(6, 7)))
    spare.end()
    audience.expect_end()


@pytest.mark.parametrize("behind", [1, 2])
def test_backup_that_is_slightly_behind_repeats_nothing(
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


@pytest.mark.parametrize("behind", [1, 2])
def test_stale_playlist_after_an_outage_repeats_nothing(
    origin: Origin, serve: Serve, journal: Journal, behind: int
) -> None:
    """Behind one address, each cache of a CDN may have another playlist."""
    live = origin.add(news(window=4))
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(1, 4))
    stale = live.find(live.path)
    assert stale
    live.advance(behind)
    audience.expect(live.plain(4, 4 + behind))
    for name in NAMES:
        address = f"{live.path}?{name}"
        origin.fault(address, Status(404))
        # More loads than LOWER_PLAYLISTS: an old playlist is not a restart either.
        origin.fault(address, Body(stale.body), times=4)
    journal.wait_failed()
    live.advance()
    audience.expect(live.plain(4 + behind, 5 + behind))
    live.end()
    audience.expect_end()
    assert journal.failures() == len(NAMES)


@pytest.mark.parametrize("first", [1000, 0], ids=["higher", "lower"])
def test_backup_with_unrelated_numbers_continues_at_its_live_edge(
    origin: Origin, serve: Serve, backup: Origin, first: int
) -> None:
    live = origin.add(news(first_sequence=500))
    spare = backup.add(Playlist("news", other_media(), mode="live", first_sequence=first))
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    # Segment 504 is the first segment of the timeline again.
    audience.expect(media.spliced(live.plain(502, 504), live.plain(504, 505)))
    origin.fault(live.path, Status(404), times=None)
    audience.expect(audience.after_a_seam(spare.plain(first + 2, first + 5)))
    spare.end()
    audience.expect_end()


def test_each_failure_moves_to_the_next_address(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """A channel stays at a working address, and moves to the next one in the list if it fails."""
    lives = [origin.add(Playlist(f"news-{n}", media.ts_segments(SEGMENTS), mode="live"))
             for n in range(3)]  # fmt: skip
    addresses = [live.url for live in lives]
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


def test_backup_is_tried_even_if_a_failure_is_noticed_late(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    """Two target durations of a playlist that does not change are longer than `reconnect`."""
    live = origin.add(news(target_duration=3))
    spare = backup.add(news(target_duration=3))
    site = serve({"news": {"url": [live.url, spare.url]}}, timeout=2, reconnect=4)
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    spare.advance()
    assert viewer.read(len(segment(5))) == segment(5)


def test_a_few_empty_playlists_are_no_reason_for_the_backup(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live, spare = origin.add(news(target_duration=3)), backup.add(news(target_duration=3))
    site = serve({"news": {"url": [live.url, spare.url]}}, timeout=20)
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    empty = origin.fault(live.path, Body(b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:5\n"), times=4)
    empty.wait(4)
    live.advance()
    assert viewer.read(len(segment(5))) == segment(5)
    assert backup.requests == ()


def test_channel_survives_cookies_that_cannot_be_read_for_a_moment(
    origin: Origin, serve: Serve, journal: Journal, tmp_path: Path
) -> None:
    """Another program empties the file before it writes the file anew."""
    live = origin.add(news())
    cookies, valid = tmp_path / "cookies.txt", "# Netscape HTTP Cookie File\n"
    cookies.write_text(valid)
    streamlink = {"http-cookies-files": [str(cookies)]}
    audience = Audience(serve(both(live.url, streamlink=streamlink), **QUICK))
    audience.expect(live.plain(2, 5))
    cookies.write_text("")
    for name in NAMES:
        origin.fault(f"{live.path}?{name}", Status(404))
    for name in NAMES:
        journal.wait_for(f"^{name}: .*: a file in http-cookies-files cannot be read")
    cookies.write_text(valid)
    live.advance()
    audience.expect(live.plain(5, 6))


def test_hanging_backup_leaves_time_for_the_next_one(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    """The failure of the first address is noticed late."""
    live, spare = origin.add(news(target_duration=3)), backup.add(news(target_duration=3))
    hanging = f"{backup.url}/hanging.m3u8"
    backup.fault("/hanging.m3u8", StallHeaders(), times=None)
    site = serve({"news": {"url": [live.url, hanging, spare.url]}}, timeout=4, reconnect=4)
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    spare.advance()
    assert viewer.read(len(segment(5))) == segment(5)


def test_relay_may_pause_although_the_addresses_shared_the_time_of_the_start(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    """A panel that makes a relay of HLS sends a burst for each segment."""
    may_continue = threading.Event()

    def bursts() -> Iterator[bytes]:
        yield segments(0, 4)
        may_continue.wait(TIMEOUT)
        yield segments(4, 6)

    relay = origin.add_endless("/relay", bursts)
    spare = add_relay(backup, "/relay", segments(0, 6))
    site = serve({"news": {"url": [relay, *[f"{spare}?{n}" for n in range(9)]]}}, timeout=5)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 4))) == segments(0, 4)
    with pytest.raises(AssertionError):
        backup.wait_for("/relay*", timeout=1.5)  # three times the time of an address
    may_continue.set()
    assert viewer.read(len(segments(4, 6))) == segments(4, 6)
    assert backup.requests == ()


def test_playlist_may_be_slow_although_the_addresses_shared_the_time_of_the_start(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live, spare = origin.add(news()), backup.add(news())
    addresses = [live.url, *[f"{spare.url}?{n}" for n in range(9)]]
    viewer = serve({"news": {"url": addresses}}, timeout=5).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    origin.fault(live.path, Think(1.0), times=None)  # twice the time of an address
    live.advance()
    assert viewer.read(len(segment(5))) == segment(5)
    assert backup.requests == ()


def test_backup_is_tried_without_a_pause(
    origin: Origin, serve: Serve, backup: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (3600.0,))  # longer than this test may take
    live, spare = origin.add(news()), backup.add(news())
    viewer = serve({"news": {"url": [live.url, spare.url]}}, **QUICK).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    origin.fault(live.path, Status(404), times=None)
    backup.wait_for(spare.path)


def test_second_round_of_addresses_has_growing_pauses(
    origin: Origin, serve: Serve, backup: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.3, 0.6))
    live, spare = origin.add(news()), backup.add(news())
    viewer = serve({"news": {"url": [live.url, spare.url]}}, **QUICK).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    # Before the first address fails, or else the backup would take over.
    backup.fault(spare.path, Status(404), times=None)
    origin.fault(live.path, Status(404), times=None)
    backup.wait_for(spare.path, 2)
    _, third = (request.time for request in origin.requests if request.status == 404)
    second, fourth = (request.time for request in backup.requests)
    assert third - second >= 0.8 * 0.3
    assert fourth - third >= 0.8 * 0.6


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [pytest.param(60.0, 1, id="within-a-minute"), pytest.param(0.0, 0, id="later")],
)
def test_new_start_skips_an_address_that_failed_recently(
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
    """Wait until no channel has a feeder."""
    eventually(lambda: not feeders(), "all channels are closed")


def test_backup_gets_its_full_time(
    origin: Origin, serve: Serve, backup: Origin, journal: Journal
) -> None:
    """The time of silence starts again: each answer of the backup takes most of `timeout`."""
    live, spare = origin.add(news()), backup.add(news())
    audience = Audience(serve(both(live.url, spare.url), **QUICK))
    audience.expect(live.plain(2, 5))
    spare.advance()
    backup.delay = 0.8
    journal.wait_failed("1 of 2")
    audience.expect(live.plain(5, 6))
    assert journal.count(r"address 2 of 2 \(\S+\): (?!recovered)") == 0


#### Starting with several addresses ####


def test_addresses_share_the_time_of_a_start(origin: Origin, serve: Serve, backup: Origin) -> None:
    live, spare = origin.add(news()), backup.add(news())
    origin.fault(live.path, StallHeaders(), times=None)
    began = time.monotonic()
    viewer = serve({"news": {"url": [live.url, spare.url]}}, **QUICK).watch("/news")
    assert viewer.read(len(spare.plain(2, 5))) == spare.plain(2, 5)
    assert 0.9 < time.monotonic() - began < 1.9


def test_answer_is_502_as_soon_as_all_addresses_failed(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live, spare = origin.add(news()), backup.add(news())
    handles = [place.fault("*", Close(), times=None) for place in (origin, backup)]
    site = serve({"news": {"url": [live.url, spare.url]}}, **{**QUICK, "timeout": 30})
    began = time.monotonic()
    assert site.get("/news").status == 502
    assert time.monotonic() - began < 5
    assert [handle.taken for handle in handles] == [1, 1], "each address is tried once"


def test_start_with_silent_addresses_ends_in_time(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    live, spare = origin.add(news()), backup.add(news())
    handles = [place.fault("*", StallHeaders(), times=None) for place in (origin, backup)]
    site = serve({"news": {"url": [live.url, spare.url]}}, **QUICK)
    began = time.monotonic()
    assert site.get("/news").status in (502, 504), "both fail just when the time is over"
    assert 1.8 < time.monotonic() - began < 4
    assert [handle.taken for handle in handles] == [1, 1], "each address is tried once"


#### The end ####


def test_ended_stream_sends_its_rest_and_the_final_chunk(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    live.advance(2)
    live.end()
    audience.expect_end(live.plain(2, 7))


def test_source_that_ended_during_an_outage_ends_the_stream(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """The playlist lists no new segment when the origin is back."""
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    live.end()
    failing.clear()
    audience.expect_end()


def test_new_opening_completes_the_last_segment_and_ends(
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


def playlist_referring_to(what: str, file: str) -> bytes:
    """A playlist that refers to a file as a segment, key or map."""
    lines = NAMED[what].format(file=file, entry="#EXTINF:1,\n")
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n" + lines.encode()


@pytest.mark.parametrize("what", list(NAMED))
def test_local_file_in_a_reloaded_playlist_is_refused(
    origin: Origin, serve: Serve, journal: Journal, secret: str, what: str
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    live.override = playlist_referring_to(what, secret)
    journal.wait_failed()
    journal.wait_for("local file: refused", len(NAMES))
    live.override = None
    live.advance()
    live.end()
    audience.expect_end(live.plain(5, 6))


@pytest.mark.parametrize("what", list(NAMED))
def test_local_file_in_the_first_playlist_is_refused(
    origin: Origin, serve: Serve, secret: str, what: str
) -> None:
    live = origin.add(news())
    live.override = playlist_referring_to(what, secret)
    answer = serve({"news": live.url}, **QUICK).get("/news")
    assert answer.status == 502
    assert answer.json == {"error": "the origin refers to a local file: refused"}


@pytest.mark.parametrize("path", ["index.m3u8", "key", "init.mp4", "*.m4s"])
def test_redirect_to_a_local_file_is_refused(
    origin: Origin, serve: Serve, journal: Journal, secret: str, path: str
) -> None:
    init, fragments = media.fmp4(SEGMENTS)
    options: dict[str, Any] = {"init": init, "extension": ".m4s", "aes_key": KEY}
    live = origin.add(Playlist("news", fragments, mode="live", **options))
    redirect = origin.fault(f"/news/{path}", Redirect(secret), times=None)
    answer = serve({"news": live.url}, **{**QUICK, "timeout": 4, "reconnect": 1}).get("/news")
    assert redirect.taken
    assert answer.status in (502, 504)
    assert SECRET[:22] not in answer.body
    journal.wait_for("local file: refused")


def test_segment_redirected_to_a_local_file_causes_a_gap(
    origin: Origin, serve: Serve, secret: str
) -> None:
    live = origin.add(news())
    origin.fault(live.segment_path(3), Redirect(secret), times=None)
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 6}))
    audience.expect(media.spliced(live.plain(2, 3), live.plain(4, 5)))


@pytest.mark.parametrize("what", list(NAMED))
def test_http_within_https_is_explained(what: str) -> None:
    text = playlist_referring_to(what, "http://a.example/1.ts").decode()
    with pytest.raises(ValueError, match="insecure") as caught:
        parse_m3u8(text, base_uri="https://a.example/index.m3u8")
    assert pipe.explain(caught.value).endswith("configure the http:// address")


#### Time limits ####


def test_viewers_are_disconnected_after_reconnect_seconds(
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


def test_new_viewers_join_during_an_outage(origin: Origin, serve: Serve, journal: Journal) -> None:
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


def test_failed_upstream_without_viewers_is_not_reopened(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    site = serve({"news": live.url}, **{**QUICK, "linger": 60})
    with site.watch("/news") as viewer:
        assert viewer.read(188) == segment(2)[:188]
    eventually(lambda: site.channels.viewer_count() == 0, "the viewer is gone")
    origin.fault(live.path, Status(404), times=None)
    origin.clear_requests()
    wait_closed(site)
    assert origin.count(live.path) == 1
    assert journal.failures() == 1


def test_film_continues_at_its_segment_and_byte(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(film())
    stall = origin.fault(playlist.segment_path(1), Stall(CUT), times=4)
    audience = Audience(serve(both(playlist.url), **QUICK))
    stall.wait_held(4)
    audience.expect((segments(0, 2))[: len(segment(0)) + WHOLE])
    origin.restart()
    audience.expect_end(segments(0, 6)[len(audience.got) :])
    audience.assert_pictures_in_order(6 * media.FPS)


def test_film_continues_after_an_outage(origin: Origin, serve: Serve, journal: Journal) -> None:
    """The origin is down for longer than a segment is tried."""
    playlist = origin.add(film())
    stall = origin.fault(playlist.segment_path(1), Stall(CUT), times=4)
    audience = Audience(serve(both(playlist.url), **{**QUICK, "threads": 2}))
    stall.wait_held(4)
    audience.expect((segments(0, 2))[: len(segment(0)) + WHOLE])
    origin.stop()
    for name, count in (("one", 1), ("three", 3)):
        journal.wait_for(rf"^{name}: address 1 of 1 \(\S+\): (?!recovered)", count)
    origin.start()
    audience.expect_end(segments(0, 6)[len(audience.got) :])
    audience.assert_pictures_in_order(6 * media.FPS)


#### A silent source ####


@pytest.fixture
def _silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "SILENCE", 0.3)


@pytest.mark.usefixtures("_silence")
def test_null_packets_fill_silence(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 20}))
    audience.expect(live.plain(2, 5))
    times = []
    for _ in range(2):
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
    """Read `size` bytes of packets from the source, skipping null packets."""
    body = b""
    while len(body) < size:
        packet = viewer.read(media.PACKET)
        body += packet if media.pid(packet) != media.PID_NULL else b""
    return body


@pytest.mark.usefixtures("_silence")
@pytest.mark.parametrize("container", ["fmp4", "aac"])
def test_nothing_fills_the_silence_of_other_containers(
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


#### Failures that streamlink does not report ####


def test_dead_worker_fails_the_upstream_at_once(
    origin: Origin, serve: Serve, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 60, "reconnect": 60}))
    audience.expect(live.plain(2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(HLSStreamWorker, "valid_segment", fail)
        journal.wait_failed()
    live.advance()
    audience.expect(live.plain(5, 6))


def fail(*_: object) -> bool:
    raise KeyError("a plugin's mistake")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_writer_fails_the_upstream_at_once(
    origin: Origin, serve: Serve, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = origin.add(news())
    audience = Audience(serve(both(live.url), **{**QUICK, "timeout": 60, "reconnect": 60}))
    audience.expect(live.plain(2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(HLSStreamWriter, "iter_segment_content", leave)
        live.advance()
        journal.wait_failed()
    audience.expect(live.plain(5, 6))


def leave(*_: object) -> None:
    """End the thread without an error message."""
    raise SystemExit


def test_segments_left_out_on_purpose_show_that_the_upstream_works(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    names = [f"/{number}.ts" for number in range(5, 100)]
    options = {"hls-segment-ignore-names": names}
    audience = Audience(serve(both(live.url), **QUICK, streamlink=options))
    audience.expect(live.plain(2, 5))
    began = time.monotonic()
    while time.monotonic() - began < 2.6:
        live.advance()
        origin.clear_requests()
        for name in NAMES:
            origin.wait_for(f"{live.path}?{name}")
    assert journal.failures() == 0
    live.restart(98)
    live.end()
    audience.expect_end(audience.after_a_seam(live.plain(100, 103)))


def test_frozen_playlist_with_only_filtered_segments_is_a_failure(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    live = origin.add(news())
    options = {"hls-segment-ignore-names": ["/5.ts"]}
    audience = Audience(serve(both(live.url), **QUICK, streamlink=options))
    audience.expect(live.plain(2, 5))
    live.advance()
    journal.wait_failed()
    live.advance()
    audience.expect(audience.after_a_seam(live.plain(6, 7)))


@pytest.mark.parametrize("times", [1, 6], ids=["once", "for-longer-than-it-is-tried"])
def test_stream_waits_for_an_initialization_section_that_fails(
    origin: Origin, serve: Serve, journal: Journal, times: int
) -> None:
    """No later segment could be decoded without it: instead of a gap, the upstream is reopened."""
    init, fragments = media.fmp4(SEGMENTS)
    live = origin.add(Playlist("news", fragments, mode="live", init=init, extension=".m4s"))
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(init + live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    journal.wait_failed()
    broken = origin.fault(live.init_path, Status(503), times=times * len(NAMES))
    live.advance()
    live.end()
    failing.clear()
    audience.expect_end(live.plain(5, 6))
    assert broken.taken == times * len(NAMES)


def test_stream_waits_for_a_key_that_fails(origin: Origin, serve: Serve, journal: Journal) -> None:
    live = origin.add(news(aes_key=KEY))
    audience = Audience(serve(both(live.url), **QUICK))
    audience.expect(live.plain(2, 5))
    failing = origin.fault(live.path, Status(404), times=None)
    broken = origin.fault(live.key_path, Status(503), times=None)
    journal.wait_failed()
    live.advance()
    live.end()
    failing.clear()
    broken.wait(2)
    broken.clear()
    audience.expect_end(live.plain(5, 6))


#### Separate tracks for picture and sound ####


@pytest.fixture(scope="session")
def _muxer() -> None:
    """Skip without ffmpeg. streamlink's check for it leaves a thread that idles for 10 s."""
    if FFMPEGMuxer.is_usable(Streamlink()):
        return
    assert "CI" not in os.environ, "ffmpeg must be installed"
    pytest.skip("needs ffmpeg")


EDGE = 8  # segments: ffmpeg reads 5 s of each track before it writes anything


@dataclass
class Apart:
    """Live picture and sound, each in a playlist of its own."""

    origin: Origin
    picture: Playlist = field(init=False)
    sound: Playlist = field(init=False)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"mode": "live", "window": EDGE}
        self.picture = Playlist("picture", media.video_only_segments(2 * EDGE), **options)
        self.sound = Playlist("sound", media.audio_only_segments(2 * EDGE), **options)
        self.url = self.origin.add(master("apart", {"360p": self.picture}, self.sound)).url

    def advance(self, count: int) -> None:
        self.picture.advance(count)
        self.sound.advance(count)

    def end(self) -> None:
        self.picture.end()
        self.sound.end()

    def fail(self, *faults: Fault) -> None:
        for playlist in (self.picture, self.sound):
            self.origin.fault(playlist.path, *faults, times=None)

    def serve(self, serve: Serve, **options: Any) -> Site:
        engine = {"hls-live-edge": EDGE, **options.pop("streamlink", {})}
        return serve({"news": self.url}, **{**QUICK, **options}, streamlink=engine)


@pytest.mark.usefixtures("_muxer")
@pytest.mark.parametrize("fault", [StallHeaders(), Status(404)], ids=["stalls", "fails"])
def test_stream_with_separate_sound_continues_after_an_outage(
    origin: Origin, serve: Serve, journal: Journal, fault: Fault
) -> None:
    apart = Apart(origin)
    viewer = apart.serve(serve).watch("/news")
    apart.fail(fault)
    journal.wait_for(r"^news: address 1 of 1 \(\S+\): (?!recovered)")
    apart.advance(4)
    apart.end()
    origin.clear_faults()
    body, is_complete = viewer.read_all()
    assert is_complete
    assert_shown(body, EDGE + 4)


@pytest.mark.usefixtures("_muxer")
def test_stream_with_separate_sound_is_listed_to_its_end(origin: Origin, serve: Serve) -> None:
    """HLS clients get the last part, too, although no key frame follows it."""
    apart = Apart(origin)
    site = apart.serve(serve)
    viewer, text = site.watch("/news"), site.get("/news.m3u8").body.decode()
    apart.advance(4)
    apart.end()
    assert viewer.read_all()[1]
    while "#EXT-X-ENDLIST" not in text:
        answer = site.get("/news.m3u8")
        assert answer.status == 200
        text = answer.body.decode()
    addresses = re.findall("^news/.*", text, re.M)
    assert_shown(b"".join(site.get(f"/{address}").body for address in addresses), EDGE + 4)


def assert_shown(body: bytes, seconds: int) -> None:
    """Assert that all pictures and sounds arrived, none twice; ending ffmpeg loses up to 0.5 s."""
    shown = media.decode(body, strict=False)
    for frames, rate in (
        (shown.video, media.FPS),
        (shown.audio, media.SAMPLE_RATE / media.FRAME_SAMPLES),
    ):
        assert (seconds - 0.5) * rate <= len(frames) <= seconds * rate + 1


@pytest.mark.usefixtures("_muxer")
@pytest.mark.parametrize("track", ["picture", "sound"])
def test_track_that_ends_alone_is_a_failure(
    origin: Origin, serve: Serve, journal: Journal, track: str
) -> None:
    """The other track continues, and so would ffmpeg."""
    apart = Apart(origin)
    viewer = apart.serve(serve, timeout=60, reconnect=60).watch("/news")
    ended: Playlist = getattr(apart, track)
    origin.fault(ended.path, Status(410))
    journal.wait_for(r"^news: address 1 of 1 \(\S+\): (?!recovered)")
    apart.advance(4)
    apart.end()
    body, is_complete = viewer.read_all()
    assert is_complete
    assert_shown(body, EDGE + 4)


@pytest.mark.usefixtures("_muxer")
def test_film_without_the_key_of_its_sound_plays_its_picture(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """The key is missing from the start: the sound is left out, and the log says why."""
    picture = Playlist("picture", media.video_only_segments())
    sound = Playlist("sound", media.audio_only_segments(), aes_key=bytes(range(16)))
    both = origin.add(master("apart", {"360p": picture}, sound))
    origin.fault("/sound/key", Status(404), times=None)
    answer = serve({"news": both.url}, timeout=5, reconnect=1).get("/news")
    assert answer.status == 200
    shown = media.decode(answer.body, strict=False)
    assert (len(shown.video), len(shown.audio)) == (8 * media.FPS, 0)
    journal.wait_for("left out a track: the key cannot be fetched")
    journal.wait_for("news: no sound")


@pytest.mark.usefixtures("_muxer")
@pytest.mark.parametrize("pattern", ["*.ts", "*.m3u8"])
def test_stalled_tracks_do_not_delay_closing(origin: Origin, serve: Serve, pattern: str) -> None:
    apart = Apart(origin)
    site = apart.serve(serve, timeout=60)
    stall = origin.fault(f"/*/{pattern}", Stall(100), times=None)
    asked = Task(lambda: site.get("/news"))
    stall.wait_held()
    began = time.monotonic()
    site.close()
    assert time.monotonic() - began < 3
    assert asked.result().status == 503


def test_without_ffmpeg_the_picture_plays_alone(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    apart = Apart(origin)
    site = apart.serve(serve, streamlink={"ffmpeg-ffmpeg": "/nonexistent"})
    viewer = site.watch("/news")
    picture = apart.picture.plain(0, EDGE)
    assert viewer.read(len(picture)) == picture
    apart.end()
    assert viewer.read_all() == (b"", True)
    journal.wait_for("no sound: install ffmpeg")


#### Random faults ####

RANDOM_FAULTS = 40
SEED = 20


class Recorder:
    """A viewer that reads all bytes into a file, on a thread of its own."""

    def __init__(self, viewer: Watch, file: Path) -> None:
        self.viewer, self.file = viewer, file
        # Guards the count; notified with each piece.
        self._grown = threading.Condition()
        self._size = 0
        self._task = Task(self._record)

    def _record(self) -> bool:
        with self.file.open("wb") as file:
            try:
                while piece := self.viewer.response.read1(65536):
                    file.write(piece)
                    with self._grown:
                        self._size += len(piece)
                        self._grown.notify_all()
            except OSError:
                return False
        return True

    def wait_more(self, size: int) -> None:
        """Wait until so many more bytes arrived."""
        with self._grown:
            wanted = self._size + size
            assert self._grown.wait_for(lambda: self._size >= wanted, 2 * TIMEOUT), (
                "the stream stopped"
            )

    def result(self) -> tuple[bytes, bool]:
        is_complete = self._task.result(TIMEOUT)
        return self.file.read_bytes(), is_complete


def at_playlist(*faults: Fault) -> Callable[[Origin, Playlist, int], None]:
    def begin(origin: Origin, live: Playlist, times: int) -> None:
        origin.fault(live.path, *faults, times=times).wait(times, TIMEOUT)

    return begin


def at_segments(*faults: Fault) -> Callable[[Origin, Playlist, int], None]:
    def begin(origin: Origin, live: Playlist, times: int) -> None:
        origin.fault("/news/*.ts", *faults, times=times).wait(1, TIMEOUT)

    return begin


def restart_process(origin: Origin, live: Playlist, times: int) -> None:
    origin.restart()


def restart_numbers(origin: Origin, live: Playlist, times: int) -> None:
    live.restart(100 * times if live.newest < 100 else 0)


MISHAPS: tuple[Callable[[Origin, Playlist, int], None], ...] = (
    *(at_playlist(fault) for outage in OUTAGES.values() for fault in outage.faults),
    *(at_segments(*faults) for answers in HICCUPS.values() for faults in answers[:1]),
    *(at_segments(*faults) for faults, _ in LOST.values()),
    restart_process,
    restart_numbers,
)


def test_viewers_survive_forty_random_faults(origin: Origin, serve: Serve, tmp_path: Path) -> None:
    live = origin.add(news(clock=True))
    site = serve({"news": live.url}, **QUICK, ringbuffer_size=262_144)
    recorders = [Recorder(site.watch("/news"), tmp_path / f"{n}.ts") for n in range(3)]
    chance = random.Random(SEED)
    memory = []
    snapshots = []  # after ten faults and at the end
    faulthandler.cancel_dump_traceback_later()  # this test takes longer than its time limit
    with traced_memory():
        for _ in range(RANDOM_FAULTS):
            chance.choice(MISHAPS)(origin, live, chance.randint(1, 3))
            origin.clear_faults()
            for recorder in recorders:
                recorder.wait_more(len(segment(0)))
            origin.clear_requests()
            # The session of a failed opening is a reference cycle of 170 KB, which stays in memory
            # until the garbage collector runs.
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
            if len(memory) in (10, RANDOM_FAULTS):
                snapshots.append(tracemalloc.take_snapshot())
    live.end()
    bodies = [recorder.result() for recorder in recorders]
    assert all(is_complete for _, is_complete in bodies), "no viewer was dropped"
    for body, _ in bodies:
        assert_pieces_of_segments(body)
    growth = snapshots[1].compare_to(snapshots[0], "lineno")[:8]
    assert sorted(memory[-10:])[5] < sorted(memory[:10])[5] + (1 << 20), "\n".join(map(str, growth))


def assert_pieces_of_segments(body: bytes) -> None:
    """Assert that the body consists of starts of segments, most of them whole, without holes.

    If one does not continue the previous one, all PIDs signal a discontinuity.
    """
    heads = {data[:752]: data for data in media.ts_segments(SEGMENTS)}
    kept = b"".join(p for p in media.packets(body) if media.pid(p) != media.PID_NULL)
    assert jumps(kept) == []
    parts = split_at_notices(kept)
    assert media.spliced(*parts) == kept
    kept, at, cuts = b"".join(parts), 0, 0
    while at < len(kept):
        whole = heads[kept[at : at + 752]]
        size = common(whole, kept[at : at + len(whole)])
        cuts += size < len(whole)
        at += size
    assert cuts <= RANDOM_FAULTS


def split_at_notices(data: bytes) -> list[bytes]:
    """The parts between the packets that signal a discontinuity, without those packets."""
    parts = [bytearray()]
    for packet in media.packets(data):
        if not media.is_notice(packet):
            parts[-1] += packet
        elif media.pid(packet) == 0:
            parts.append(bytearray())
    return list(map(bytes, parts))


def common(one: bytes, other: bytes) -> int:
    """The length of the common start, in bytes of whole packets."""
    different = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    size = next(different, min(len(one), len(other)))
    return size - size % media.PACKET


#### A killed process, and real players ####

START = 60.0  # seconds: an origin's process needs up to this long to encode its media


@dataclass
class OriginProcess:
    """tests/origin.py as a separate process, whose channels advance by the clock."""

    port: int
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            str(PROGRAM.parent / "tests/origin.py"),
            "--port",
            f"{self.port}",
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        assert self._process.stdout
        assert self._process.stdout.readline().startswith("http"), (
            "the origin listens and has its media"
        )

    def kill(self) -> None:
        """Send SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.communicate(timeout=TIMEOUT)
            self._process = None


@pytest.fixture
def origin_process() -> Iterator[OriginProcess]:
    process = OriginProcess(free_port())
    process.start()
    yield process
    process.kill()


class Frames:
    """An ffmpeg process that decodes an endless stream; counts the pictures."""

    def __init__(self, address: str) -> None:
        if not shutil.which("ffmpeg"):
            assert "CI" not in os.environ, "ffmpeg must be installed"
            pytest.skip("needs ffmpeg")
        command = ["ffmpeg", "-nostdin", "-v", "quiet", "-i", address, "-map", "0:v"]
        self._process = subprocess.Popen(
            [*command, "-flush_packets", "1", "-f", "framecrc", "-"], stdout=subprocess.PIPE
        )
        self._grown = threading.Condition()  # guards the count
        self._count = 0
        self._task = Task(self._read)

    def _read(self) -> None:
        assert self._process.stdout
        for _ in self._process.stdout:
            with self._grown:
                self._count += 1
                self._grown.notify_all()

    def wait_more(self, count: int) -> None:
        """Wait until so many more pictures were decoded."""
        with self._grown:
            wanted = self._count + count
            assert self._grown.wait_for(lambda: self._count >= wanted, START), "the stream stopped"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT)
        self._task.result()


def test_players_survive_a_killed_origin(origin_process: OriginProcess, tmp_path: Path) -> None:
    """ffmpeg and VLC play one channel, whose origin is killed and started again."""
    config = tmp_path / "config.yml"
    address = f"http://127.0.0.1:{origin_process.port}/live-ts/index.m3u8"
    config.write_text(f"streams:\n  news: {address}\n")
    command = [sys.executable, str(PROGRAM), "-c", str(config), "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*command, "--port", "0"], stderr=subprocess.PIPE, encoding="utf-8"
    ) as server:
        try:
            url = f"{listening_address(server)}/news"
            frames, player = Frames(url), Task(lambda: vlc(url, 1000))
            log = Task(lambda: server.communicate()[1])
            play_over_a_kill(origin_process, frames)
        finally:
            server.terminate()
        assert log.result(TIMEOUT).count("viewer 127.0.0.1 started watching") == 2, (
            "neither player had to reconnect"
        )
    played = player.result(START)
    assert played.returncode == 0, played.stdout
    assert played.stdout.count("Received first picture") == 2, (
        "VLC shows a picture before the kill and one after it"
    )


def play_over_a_kill(origin_process: OriginProcess, frames: Frames) -> None:
    """Play more after the kill than the window and a player's cache can hold."""
    try:
        frames.wait_more(8 * media.FPS)
        origin_process.kill()
        origin_process.start()
        frames.wait_more(10 * media.FPS)
    finally:
        frames.close()


#### Units ####


def event(kind: str, number: int) -> pipe.SegmentEvent:
    return pipe.SegmentEvent(pipe.EventKind[kind], number)


class Passed:
    """A splicer with a window that evicts nothing, fed with segment events and bytes."""

    def __init__(self, container: pipe.Container = pipe.MPEG_TS) -> None:
        self._window = pipe.Window(1 << 24)
        self._viewer = pipe.Viewer()
        self._window.enter(self._viewer)
        self.splicer = pipe.Splicer(self._window, container)

    def pass_on(self, *items: bytes | pipe.SegmentEvent) -> None:
        for item in items:
            if isinstance(item, pipe.SegmentEvent):
                self.splicer.pass_event(item)
            else:
                self.splicer.pass_bytes(item)

    def resume(self) -> None:
        self.splicer.resume()

    @property
    def body(self) -> bytes:
        self._window.end(True)
        body = b""
        try:
            while True:
                body += b"".join(self._window.take(self._viewer, 0))
        except pipe.WindowEnded:
            return body


def test_seam_survives_a_second_failure_before_a_decoder_can_start() -> None:
    """The bytes that were held back do not count as passed on: the seam is still to follow."""
    passed = Passed()
    passed.pass_on(event("START", 5), segment(5), event("END", 5))
    passed.resume()
    passed.pass_on(event("START", 50), segment(6)[:100])
    passed.resume()
    passed.pass_on(event("START", 50), segment(6), event("END", 50))
    assert passed.body == media.spliced(segment(5), segment(6))


@pytest.mark.parametrize("number", [5, 20], ids=["the-open-one", "another"])
def test_new_opening_may_begin_with_a_filtered_segment(number: int) -> None:
    passed = Passed()
    passed.pass_on(event("START", 5), segment(5)[:CUT])
    passed.resume()
    passed.pass_on(event("FILTERED", number), event("START", number + 1), segment(6))
    assert passed.body == media.spliced(segment(5)[:WHOLE], segment(6))


def test_shorter_segment_of_a_new_opening_causes_one_cut() -> None:
    passed = Passed()
    passed.pass_on(event("START", 5), segment(5)[:CUT])
    passed.resume()
    passed.pass_on(event("START", 5), segment(5)[: CUT - 1], event("END", 5))
    passed.pass_on(event("START", 6), segment(6), event("END", 6))
    assert passed.body == media.spliced(segment(5)[:WHOLE], segment(6))


def test_gap_starts_after_a_whole_packet() -> None:
    passed = Passed()
    passed.pass_on(event("START", 5), segment(5)[:CUT], event("GAP", 5))
    passed.pass_on(event("START", 6), segment(6), event("END", 6))
    assert passed.body == media.spliced(segment(5)[:WHOLE], segment(6))


def test_source_without_segments_continues_at_a_later_key_frame() -> None:
    passed = Passed()
    passed.pass_on(event("START", 5), segment(5), event("END", 5))
    passed.resume()
    passed.pass_on(segments(3, 8))
    assert passed.body == segments(5, 8)


def test_closed_buffer_accepts_neither_bytes_nor_events() -> None:
    """An event after dropped bytes would suggest that they were received."""
    buffer = pipe.ReaderBuffer(1000)
    buffer.write(b"first")
    buffer.close()
    buffer.write(b"second")
    buffer.put_event(event("END", 1))
    assert buffer.take(1000, 0) == [b"first"]


def delayed(data: bytes, ticks: int) -> bytes:
    """The same packets with their timestamps moved by `ticks`."""
    packets = [bytearray(packet) for packet in media.packets(data)]
    for packet in packets:
        pipe.delay_timestamps(packet, ticks)
    return b"".join(packets)


@pytest.mark.parametrize(
    ("after", "opens_at"),
    [
        pytest.param(None, 0, id="nothing-passed-yet"),
        pytest.param(-1, 0, id="all-of-it-is-later"),
        pytest.param(0, 1, id="its-first-key-frame-was-passed"),
        pytest.param(2.5, 3, id="in-the-middle"),
        pytest.param(7.9, None, id="all-was-passed"),
    ],
)
@pytest.mark.parametrize("start", [0, (1 << 33) - 200_000], ids=["plain", "clock-wraps"])
def test_framer_opens_at_the_first_later_key_frame(
    after: float | None, opens_at: int | None, start: int
) -> None:
    parts = [delayed(data, start) for data in media.ts_segments(SEGMENTS)[:8]]
    first = first_dts(parts[0])
    last = None if after is None else int(first + after * 90_000) % (1 << 33)
    framer = shut_framer(last)
    opened = framer.feed(b"".join(parts))
    assert media_in(opened) == b"".join([] if opens_at is None else parts[opens_at:])
    assert framer.is_shut is (opens_at is None)


def shut_framer(last: int | None) -> pipe.TsFramer:
    """A framer that passed on packets up to this DTS and expects a backlog."""
    framer = pipe.TsFramer()
    framer.last_dts = last
    framer.shut(is_backlog=True)
    return framer


@pytest.mark.parametrize("again", [50, 5])
def test_tables_of_an_unchanged_section_open_the_framer(again: int) -> None:
    """PAT and PMT are only in EXT-X-MAP, and the source is opened again at another segment."""
    tables = segment(5)[: 2 * media.PACKET]

    def bare(number: int) -> bytes:
        return segment(number)[2 * media.PACKET :]

    passed = Passed()
    passed.pass_on(event("INIT", 5), tables, event("START", 5), bare(5)[: 9 * media.PACKET])
    passed.resume()
    passed.pass_on(event("INIT", again), tables, event("START", again), bare(6))
    passed.pass_on(event("END", again), event("START", again + 1), bare(7))
    assert bare(7) in media.without_notices(passed.body)


def test_dropped_packets_do_not_count_as_passed_on() -> None:
    """This also holds at a second seam while the framer is shut."""
    framer = shut_framer(first_dts(segment(5)))
    assert framer.feed(segments(0, 4)) == []
    framer.shut(is_backlog=True)
    assert framer.last_dts == first_dts(segment(5))
    assert media_in(framer.feed(segments(2, 8))) == segments(6, 8)


def test_tables_of_another_source_do_not_open_the_framer() -> None:
    """A key frame opens it only after the tables of the same opening."""
    framer = pipe.TsFramer()
    framer.feed(segment(0))
    framer.shut(is_backlog=True)
    bare = b"".join(p for p in media.packets(segment(1)) if media.pid(p) not in (0, 0x1000))
    assert framer.feed(bare) == []
    assert media_in(framer.feed(segment(2))) == segment(2)


def first_dts(data: bytes) -> int:
    joins = [item for item in pipe.TsFramer().feed(data) if isinstance(item, pipe.Join)]
    return next(join.dts for join in joins if join.dts is not None)


def media_in(items: Iterable[pipe.Framed]) -> bytes:
    """The bytes that a framer passed on, without the join points."""
    return b"".join(item for item in items if not isinstance(item, pipe.Join))


def test_framer_opens_after_the_patience_for_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "SEAM_PATIENCE", 0.0)
    framer = shut_framer(first_dts(segment(5)))
    assert media_in(framer.feed(segments(0, 2))) == segments(0, 2)


def test_fingerprint_does_not_depend_on_the_pieces() -> None:
    whole, pieces = pipe.Fingerprint(), pipe.Fingerprint()
    whole.add(segment(0))
    for at in range(0, len(segment(0)), 1000):
        pieces.add(segment(0)[at : at + 1000])
    assert whole == pieces
    other = pipe.Fingerprint()
    other.add(segment(1)[: len(segment(0))].ljust(len(segment(0)), b"\0"))
    assert whole != other
