"""Downloads of segments and files. Everything is real: the origin, streamlink and the viewers.

Most tests look at a viewer's bytes and at the origin's log of requests. Tests of one body, or of
the requests of an upstream, read its buffer instead of running a feeder. The tests of
check_engine() replace a method of streamlink with one that has another signature.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from streamlink.session.session import Streamlink
from streamlink.stream.ffmpegmux import FFMPEGMuxer, MuxedStream
from streamlink.stream.hls.hls import (
    HLSStream,
    HLSStreamReader,
    HLSStreamWorker,
    HLSStreamWriter,
)
from streamlink.stream.hls.segment import HLSSegment

import pipe
from tests import media
from tests.memory import traced_memory
from tests.origin import (
    Body,
    Break,
    ChangedValidator,
    Close,
    Content,
    Drip,
    Fault,
    FaultHandle,
    Gzip,
    NoRange,
    Origin,
    Playlist,
    Redirect,
    Request,
    Segment,
    Stall,
    StallHeaders,
    Status,
    Validators,
    WrongLength,
    master,
)
from tests.server import TIMEOUT, Site
from tests.threads import Task, refuse_threads

KEY, IV = bytes(range(16)), bytes(range(16, 32))
MIB = 1 << 20
PACKET = media.PACKET
LIVE_EDGE = 3  # segments; streamlink's default

CLOSING = 0.5  # seconds that closing may take, whatever the origin does
GAP = pipe.EventKind.GAP
QUIET = 0.3  # seconds without an event until a test assumes that it does not happen

SEGMENTS = "/news/*.ts"

Serve = Callable[..., Site]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between tries, but not the time after which a try is abandoned."""
    monkeypatch.setattr(pipe, "RETRY_PAUSES", (0.02, 0.05))


#### Media ####


def show() -> bytes:
    """All media of the usual eight segments."""
    return b"".join(media.ts_segments())


def pieces(count: int, data: bytes) -> list[bytes]:
    """Real media, cut between packets into many small segments. No two of them are equal."""
    packets = list(media.packets(data))
    cuts = sorted(random.Random(1).sample(range(1, len(packets)), count - 1))
    bounds = itertools.pairwise([0, *cuts, len(packets)])
    return [b"".join(packets[start:stop]) for start, stop in bounds]


def large(count: int, size: int) -> list[bytes]:
    return [media.padded(segment, size) for segment in media.ts_segments(count)]


def other(data: bytes) -> bytes:
    """Packets of the same length as `data`, in which only the first packet is the same."""
    packets = list(media.packets(data))
    return b"".join([packets[0], *(p[:4] + bytes(b ^ 0xFF for b in p[4:]) for p in packets[1:])])


# How the origin stores the segments of a playlist.
KINDS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "aes-128": {"aes_key": KEY, "aes_iv": IV},
    "byte-ranges": {"byte_ranges": True},
}
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# How an origin handles Range and If-Range.
ORIGINS: dict[str, Mapping[str, bool]] = {
    "validators": {},
    "no-validators": {"validators": False},
    "range-ignored": {"ranges": False},
    "neither": {"ranges": False, "validators": False},
}
by_origin = pytest.mark.parametrize("conduct", ORIGINS.values(), ids=ORIGINS)


def behave(origin: Origin, conduct: Mapping[str, bool]) -> None:
    for name, value in conduct.items():
        setattr(origin, name, value)


def file_of(playlist: Playlist, number: int) -> bytes:
    """The body that the origin sends for a segment, encrypted if it has a key."""
    content = playlist.find(playlist.segment_path(number))
    assert content
    return content.body


#### Viewers, and upstreams without viewers ####


@dataclass
class Played:
    """The bytes that a viewer got, and the gaps that its channel counted."""

    body: bytes
    is_complete: bool
    gaps: int


class Watcher:
    """A viewer without HTTP: it takes blocks as a viewer's thread does, and exposes its channel."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._viewer = pipe.Viewer("127.0.0.1")
        stream = site.config.streams["news"]
        self.channel = site.channels.watch(stream, None, self._viewer)
        self.body = b""  # so far

    def take(self) -> None:
        blocks = self.channel.window.take(self._viewer, TIMEOUT)
        assert blocks, "nothing arrived"
        self.body += b"".join(blocks)

    def take_until(self, size: int) -> None:
        """Take blocks until there are `size` bytes."""
        while len(self.body) < size:
            self.take()

    def leave(self) -> None:
        self._site.channels.leave(self.channel, self._viewer)

    def finish(self) -> Played:
        """Watch to the end, and leave."""
        try:
            while True:
                self.take()
        except pipe.WindowEnded as ending:
            return Played(self.body, ending.is_complete, self.channel.record.counts["gaps"])
        finally:
            self.leave()


def play(site: Site) -> Played:
    return Watcher(site).finish()


@contextlib.contextmanager
def opened(address: str, **options: object) -> Iterator[pipe.Upstream]:
    """An upstream without a feeder: its bytes and events wait in its buffer."""
    tree = {"streams": {"news": address}, "options": options}
    config = pipe.ConfigReader("test.yml", pipe.engine_options()).read(yaml.safe_dump(tree))
    session = pipe.Session(config.streams["news"], TIMEOUT)
    session.resolve(address)
    with contextlib.closing(session.open("best")) as upstream:
        yield upstream


def everything(upstream: pipe.Upstream) -> Iterator[bytes | pipe.SegmentEvent]:
    """All items that an upstream hands over, up to the true end of its source."""
    try:
        while True:
            items = upstream.read(TIMEOUT)
            assert items, "nothing arrived"
            yield from items
    except pipe.SourceEnded:
        return


def drain(upstream: pipe.Upstream) -> bytes:
    """All bytes up to the end."""
    return b"".join(item for item in everything(upstream) if isinstance(item, bytes))


def assert_no_more_requests(origin: Origin, path: str, count: int) -> None:
    """Assert that there are exactly `count` requests for `path`, even after QUIET seconds."""
    with pytest.raises(AssertionError):
        origin.wait_for(path, count + 1, timeout=QUIET)
    assert origin.count(path) == count


def requests_for(origin: Origin, path: str) -> list[Request]:
    """The requests for exactly this path, in order of arrival."""
    return [request for request in origin.requests if request.path == path]


def abandoned_segments(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log messages about abandoned segments."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "abandoned segment" in message]


#### Bodies that break off ####


@by_origin
@by_kind
def test_two_hundred_breaks_neither_lose_nor_repeat_bytes(
    origin: Origin, serve: Serve, kind: Mapping[str, Any], conduct: Mapping[str, bool]
) -> None:
    behave(origin, conduct)
    chance = random.Random(3)
    body = b"".join(media.ts_segments()[:3])
    playlist = origin.add(Playlist("news", pieces(200, body), **kind))
    sizes = [len(file_of(playlist, number)) for number in range(200)]
    breaks = [
        origin.fault(playlist.segment_path(number), Break(chance.randrange(sizes[number])))
        for number in range(200)
    ]
    played = play(serve({"news": playlist.url}, threads=16))
    assert (played.body, played.is_complete, played.gaps) == (body, True, 0)
    assert sum(handle.taken for handle in breaks) == 200


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@by_kind
def test_large_bodies_that_break_repeatedly_are_complete(
    origin: Origin, serve: Serve, kind: Mapping[str, Any], reset: bool
) -> None:
    """Each body needs several reads, and breaks at a third, at a third of the rest, and so on."""
    playlist = origin.add(Playlist("news", large(4, 700_000), **kind))
    for number in range(4):
        for at in (233_333, 155_555, 1, 100_000):
            origin.fault(playlist.segment_path(number), Break(at, reset=reset))
    played = play(serve({"news": playlist.url}))
    assert (played.body, played.is_complete, played.gaps) == (playlist.plain(0, 4), True, 0)


@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["aes-128"]], ids=["plain", "aes-128"])
def test_broken_body_is_resumed_at_its_byte_if_it_did_not_change(
    origin: Origin, serve: Serve, kind: Mapping[str, Any]
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments(), **kind))
    origin.fault(playlist.segment_path(2), Break(12_345))
    assert serve({"news": playlist.url}).get("/news").body == show()
    first, second = requests_for(origin, playlist.segment_path(2))
    content = playlist.find(playlist.segment_path(2))
    assert content
    assert not {"range", "if-range"} & first.headers.keys()
    assert second.headers["range"] == "bytes=12345-"
    assert second.headers["if-range"] == content.etag
    assert (second.status, second.sent) == (206, len(content.body) - 12_345)


def test_broken_byte_range_is_resumed_within_itself(origin: Origin, serve: Serve) -> None:
    segments = media.ts_segments()
    playlist = origin.add(Playlist("news", segments, byte_ranges=True))
    origin.fault(playlist.segment_path(0), Break(12_345))
    assert serve({"news": playlist.url}, threads=1).get("/news").body == show()
    first, second, *_ = requests_for(origin, playlist.segment_path(0))
    last = len(segments[0]) - 1
    assert first.headers["range"] == f"bytes=0-{last}"
    assert "if-range" not in first.headers
    assert second.headers["range"] == f"bytes=12345-{last}"
    assert second.headers["if-range"]


@pytest.mark.parametrize(
    "fault",
    [Stall(at=0), Stall(at=10_000), StallHeaders(), WrongLength(1), WrongLength(5_000)],
    ids=["stalls-at-once", "stalls", "no-headers", "closes-a-byte-early", "closes-early"],
)
@by_kind
def test_stalled_or_short_body_is_resumed(
    origin: Origin, serve: Serve, kind: Mapping[str, Any], fault: Fault
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments(), **kind))
    handle = origin.fault(playlist.segment_path(2), fault)
    played = play(serve({"news": playlist.url}, timeout=0.6))
    assert (played.body, played.is_complete, played.gaps) == (show(), True, 0)
    assert handle.taken == 1


@pytest.mark.parametrize(
    "fault",
    [
        Status(404, b"not yet"),
        Status(403, b"no"),
        Status(500, b"oops"),
        Status(503, b"busy"),
        Close(),
        Close(reset=True),
    ],
    ids=["404", "403", "500", "503", "closed", "reset"],
)
def test_segments_that_fail_at_first_are_not_lost(
    origin: Origin, serve: Serve, fault: Fault
) -> None:
    """The first segment is not tried again after 404 or 403, so it does not fail here."""
    playlist = origin.add(Playlist("news", media.ts_segments()))
    for number in range(fault in (Status(404, b"not yet"), Status(403, b"no")), 8):
        origin.fault(playlist.segment_path(number), fault, times=2)
    played = play(serve({"news": playlist.url}, threads=4))
    assert (played.body, played.is_complete, played.gaps) == (show(), True, 0)
    assert origin.peak(SEGMENTS) <= 4
    assert origin.peak_connections <= 4 + 1, "the connection of an error is reused or closed"


def test_key_that_fails_at_first_does_not_end_the_stream(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments(), aes_key=KEY))
    origin.fault(playlist.key_path, Status(503, b"busy"))
    origin.fault(playlist.key_path, Close())
    played = play(serve({"news": playlist.url}))
    assert (played.body, played.is_complete, played.gaps) == (show(), True, 0)


@pytest.mark.parametrize("at", [50, 5_000], ids=["start", "middle"])
def test_unrequested_gzip_is_decoded(origin: Origin, serve: Serve, at: int) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    for number in range(8):
        origin.fault(playlist.segment_path(number), Gzip(), Break(at))
        origin.fault(playlist.segment_path(number), Gzip(), times=None)
    played = play(serve({"news": playlist.url}))
    assert (played.body, played.is_complete, played.gaps) == (show(), True, 0)
    assert all("range" not in request.headers for request in origin.requests)
    assert {r.headers["accept-encoding"] for r in origin.requests if r.path.endswith(".ts")} == {
        "identity"
    }


@pytest.mark.parametrize("prefix", ["", "httpstream://"], ids=["bare", "httpstream"])
@by_origin
def test_file_that_breaks_is_resumed_at_its_byte(
    origin: Origin, serve: Serve, conduct: Mapping[str, bool], prefix: str
) -> None:
    behave(origin, conduct)
    body = show()
    address = origin.add_file("/film", body)
    broken = [len(body) // 3, len(body) // 3]
    for at in broken:
        origin.fault("/film", Break(at))
    answer = serve({"news": prefix + address}).get("/news")
    assert (answer.body, answer.is_complete) == (body, True)
    first, *others = requests_for(origin, "/film")
    assert "range" not in first.headers
    if not conduct:
        ranges = [f"bytes={at}-" for at in itertools.accumulate(broken)]
        assert [request.headers["range"] for request in others] == ranges
        assert all(request.headers["if-range"] for request in others)
        assert sum(request.sent for request in (first, *others)) == len(body)


def test_file_that_stalls_is_resumed_at_its_byte(origin: Origin, serve: Serve) -> None:
    address = origin.add_file("/film", show())
    origin.fault("/film", Stall(at=10_000))
    answer = serve({"news": address}, timeout=0.6).get("/news")
    assert (answer.body, answer.is_complete) == (show(), True)
    assert requests_for(origin, "/film")[1].headers["range"] == "bytes=10000-"


@pytest.mark.parametrize("size", [100, 100_000, 9 * MIB])
def test_error_keeps_its_status_whatever_its_body(origin: Origin, serve: Serve, size: int) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    origin.fault(playlist.path, Status(403, bytes(size)), times=None)
    answer = serve({"news": playlist.url}).get("/news")
    assert (answer.status, answer.json) == (502, {"error": "the origin answered 403"})
    origin.wait_connections(0)


#### Segments that are lost ####


def assert_one_gap(played: Played, expected: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert len(played.body) % PACKET == 0
    assert played.body == expected
    assert played.is_complete
    assert played.gaps == 1
    assert len(abandoned_segments(caplog)) == 1


@pytest.mark.parametrize("at", [188 * 40, 188 * 40 + 1, 188 * 41 - 1])
@by_origin
@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["aes-128"]], ids=["plain", "aes-128"])
def test_changed_segment_is_abandoned_after_a_whole_packet(
    origin: Origin,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    kind: Mapping[str, Any],
    conduct: Mapping[str, bool],
    at: int,
) -> None:
    behave(origin, conduct)
    playlist = origin.add(Playlist("news", media.ts_segments(), **kind))
    path = playlist.segment_path(3)
    origin.fault(path, Break(at))
    changed = Origin().add(Playlist("news", [*map(other, media.ts_segments())], **kind))
    origin.fault(path, Body(file_of(changed, 3)), times=None)
    played = play(serve({"news": playlist.url}))
    taken = (at - 1) // 16 * 16 if kind else at  # a cipher block is held back
    kept = playlist.plain(3, 4)[: taken // PACKET * PACKET]
    assert_one_gap(played, media.spliced(playlist.plain(0, 3) + kept, playlist.plain(4, 8)), caplog)
    assert origin.count(path) == 2, "the change is noticed at once"


@by_origin
def test_changed_byte_range_is_abandoned_after_a_whole_packet(
    origin: Origin,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    conduct: Mapping[str, bool],
) -> None:
    behave(origin, conduct)
    segments = media.ts_segments()
    playlist = origin.add(Playlist("news", segments, byte_ranges=True))
    before = 0 if origin.ranges else sum(map(len, segments[:3]))
    for _ in range(3):  # the first three do not fail; one thread requests them in order
        origin.fault(playlist.segment_path(0))
    origin.fault(playlist.segment_path(0), Break(before + 188 * 40 + 100))
    origin.fault(playlist.segment_path(0), Body(other(show())))
    played = play(serve({"news": playlist.url}, threads=1))
    kept = segments[3][: 188 * 40]
    assert_one_gap(played, media.spliced(playlist.plain(0, 3) + kept, playlist.plain(4, 8)), caplog)


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        pytest.param(Status(404), 3, id="404-middle"),
        pytest.param(Status(503), 7, id="503-last"),
        pytest.param(Close(), 3, id="closed-middle"),
    ],
)
def test_segment_that_always_fails_is_a_single_gap(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, fault: Fault, number: int
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    origin.fault(playlist.segment_path(number), fault, times=None)
    played = play(serve({"news": playlist.url}, timeout=0.7))
    expected = media.spliced(playlist.plain(0, number), playlist.plain(number + 1, 8))
    assert_one_gap(played, expected, caplog)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "kept", "number"),
    [
        pytest.param(StallHeaders(), 0, 7, id="headers-last"),
        pytest.param(Stall(at=188 * 40 + 100), 188 * 40, 7, id="rest-of-the-body-last"),
    ],
)
def test_segment_that_always_stalls_is_a_single_gap(
    origin: Origin,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    kept: int,
    number: int,
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    path = playlist.segment_path(number)
    origin.fault(path, fault)
    origin.fault(path, Stall(at=0), times=None)  # no later try gets more bytes
    played = play(serve({"news": playlist.url}, timeout=2.2, reconnect=4))
    rest = playlist.plain(number, number + 1)[:kept]
    expected = media.spliced(playlist.plain(0, number) + rest, playlist.plain(number + 1, 8))
    assert_one_gap(played, expected, caplog)


@pytest.mark.long
def test_live_segment_is_tried_for_two_target_durations(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    missing = 3
    playlist = origin.add(Playlist("news", media.ts_segments(), mode="live"))
    origin.fault(playlist.segment_path(missing), Status(404), times=None)
    watcher = Watcher(serve({"news": playlist.url}, linger=0))
    expected = media.spliced(playlist.plain(2, missing), playlist.plain(missing + 1, 5))
    watcher.take_until(len(expected))
    tries = requests_for(origin, playlist.segment_path(missing))
    playlist.end()
    assert_one_gap(watcher.finish(), expected, caplog)
    assert 1.0 < tries[-1].time - tries[0].time < 2.0 + 0.5


@pytest.mark.long
def test_live_stream_does_not_wait_for_a_segment_that_left_the_playlist(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise it would be tried for two target durations, a minute."""
    playlist = origin.add(Playlist("news", media.ts_segments(), mode="live", target_duration=30))
    origin.fault(playlist.segment_path(3), Status(404), times=None)
    options = {"hls-playlist-reload-time": "segment"}
    watcher = Watcher(serve({"news": playlist.url}, linger=0, threads=8, streamlink=options))
    playlist.advance(2)
    origin.wait_for(playlist.segment_path(6))
    assert abandoned_segments(caplog) == []
    playlist.advance(2)  # the oldest is number 4 now
    parts = [(2, 3), (4, 8), (8, 9)]  # segment 8 is the first of the media again
    expected = media.spliced(*(playlist.plain(*part) for part in parts))
    watcher.take_until(len(expected))
    playlist.end()
    assert_one_gap(watcher.finish(), expected, caplog)


#### One body ####


@dataclass(frozen=True)
class Outcome:
    """The bytes received of a body, and whether StreamPipe takes them for the whole body."""

    body: bytes
    is_whole: bool = True


def download(
    origin: Origin, path: str, *, first: int = 0, last: int | None = None, patience: float = 2.0
) -> Outcome:
    """The bytes that an upstream hands over for one segment, or for a range of its bytes."""
    lines = ["#EXTM3U", "#EXT-X-VERSION:4", "#EXT-X-TARGETDURATION:1", "#EXTINF:1.0,"]
    if last is not None:
        lines.append(f"#EXT-X-BYTERANGE:{last - first + 1}@{first}")
    text = "\n".join([*lines, path, "#EXT-X-ENDLIST", ""]).encode()
    with opened(origin.add_file("/one.m3u8", text), timeout=patience) as upstream:
        items = list(everything(upstream))
    gaps = [item for item in items if isinstance(item, pipe.SegmentEvent) and item.kind is GAP]
    return Outcome(b"".join(item for item in items if isinstance(item, bytes)), not gaps)


DATA = random.Random(5).randbytes(50_000)
PART = Break(20_000)


@pytest.mark.parametrize(
    ("usual", "if_range"),
    [
        pytest.param(Validators("strong"), "etag", id="etag"),
        pytest.param(Validators("strong", dated=True), "etag", id="etag-and-date"),
        pytest.param(Validators("none", dated=True), "date", id="date"),
        pytest.param(Validators("weak"), None, id="weak-etag"),
        pytest.param(Validators("none"), None, id="nothing"),
    ],
)
def test_only_strong_validators_are_used(
    origin: Origin, usual: Validators, if_range: str | None
) -> None:
    origin.add_file("/body", DATA)
    origin.fault("/body", usual, PART)
    origin.fault("/body", usual, times=None)
    assert download(origin, "/body") == Outcome(DATA)
    _, second = requests_for(origin, "/body")
    condition = second.headers.get("if-range")
    known = {"etag": Content(DATA).etag, "date": "Tue, 14 Nov 2023 22:13:20 GMT", None: None}
    assert condition == known[if_range]
    assert second.headers.get("range") == (condition and "bytes=20000-")
    assert second.status == (206 if condition else 200)


def part_of(data: bytes, start: int, stop: int, shown: str | None = None) -> Status:
    """A 206 with these bytes. `shown` replaces its Content-Range; "" leaves it out."""
    text = f"bytes {start}-{stop - 1}/{len(data)}" if shown is None else shown
    headers = (("Content-Range", text),) if text else ()
    return Status(206, data[start:stop], headers)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(part_of(DATA, 30_000, 50_000), id="later"),
        pytest.param(part_of(DATA, 10_000, 50_000), id="earlier"),
        pytest.param(part_of(DATA, 0, 50_000), id="from-the-start"),
        pytest.param(part_of(DATA, 20_000, 30_000), id="shorter-than-asked"),
        pytest.param(part_of(DATA, 30_000, 50_000, ""), id="none"),
        pytest.param(part_of(DATA, 30_000, 50_000, "bytes */50000"), id="star"),
        pytest.param(part_of(DATA, 30_000, 50_000, "20000-49999"), id="garbled"),
        pytest.param(Status(416, b"none"), id="416"),
        pytest.param(NoRange(), id="ignored"),
        pytest.param(ChangedValidator(), id="other-validator-same-bytes"),
        pytest.param(Gzip(), id="compressed-now"),
    ],
)
def test_strange_answer_to_a_range_loses_nothing(origin: Origin, answer: Fault) -> None:
    origin.add_file("/body", DATA)
    origin.fault("/body", PART)
    origin.fault("/body", answer)
    assert download(origin, "/body") == Outcome(DATA)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(part_of(DATA, 2_000, 3_000), id="later"),
        pytest.param(part_of(DATA, 0, 1_000), id="earlier"),
        pytest.param(part_of(DATA, 1_000, 1_500), id="shorter"),
        pytest.param(part_of(DATA, 1_000, 2_000, ""), id="none"),
        pytest.param(part_of(DATA, 1_000, 9_000), id="more-than-asked"),
        pytest.param(Status(416), id="416"),
        pytest.param(NoRange(), id="ignored"),
    ],
)
def test_strange_answer_to_a_byte_range_loses_nothing(origin: Origin, answer: Fault) -> None:
    origin.add_file("/body", DATA)
    origin.fault("/body", answer)
    assert download(origin, "/body", first=1_000, last=1_999) == Outcome(DATA[1_000:2_000])


def test_whole_body_is_requested_after_a_refused_range(origin: Origin) -> None:
    origin.add_file("/body", DATA)
    origin.fault("/body", PART)
    origin.fault("/body", Status(416, b"none"))
    assert download(origin, "/body") == Outcome(DATA)
    assert "range" not in requests_for(origin, "/body")[2].headers


def test_body_with_too_large_a_length_is_complete(origin: Origin) -> None:
    """Its end looks like a break, and there is no range after its last byte."""
    origin.add_file("/body", DATA)
    origin.fault("/body", WrongLength(100))
    assert download(origin, "/body") == Outcome(DATA)


@by_origin
@pytest.mark.parametrize(
    ("now", "expected"),
    [
        pytest.param(DATA + b"more", Outcome(DATA + b"more"), id="longer"),
        pytest.param(DATA[:30_000], Outcome(DATA[:30_000]), id="shorter"),
        pytest.param(DATA[:20_000], Outcome(DATA[:20_000]), id="no-longer-than-what-came"),
        pytest.param(DATA[:10_000], Outcome(DATA[:20_000], False), id="shorter-than-that"),
        pytest.param(b"", Outcome(DATA[:20_000], False), id="empty"),
        pytest.param(DATA[::-1], Outcome(DATA[:20_000], False), id="different"),
        pytest.param(
            DATA[:19_900] + bytes(30_100), Outcome(DATA[:20_000], False), id="from-some-byte-on"
        ),
        pytest.param(DATA[1:], Outcome(DATA[:20_000], False), id="moved-by-a-byte"),
    ],
)
def test_changed_body_is_compared_with_the_received_bytes(
    origin: Origin,
    conduct: Mapping[str, bool],
    now: bytes,
    expected: Outcome,
) -> None:
    behave(origin, conduct)
    origin.add_file("/body", DATA)
    origin.fault("/body", PART)
    origin.fault("/body", Body(now), times=None)
    assert download(origin, "/body") == expected


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.integers(1, 3_000),  # an empty answer does not count as a segment
    breaks=st.lists(st.integers(0, 3_000), max_size=3),
    conduct=st.sampled_from([*ORIGINS.values()]),
    bounds=st.none() | st.tuples(st.integers(0, 2_999), st.integers(0, 2_999)),
)
def test_any_breaks_give_the_same_body(
    origin: Origin,
    size: int,
    breaks: list[int],
    conduct: Mapping[str, bool],
    bounds: tuple[int, int] | None,
) -> None:
    behave(origin, {"validators": True, "ranges": True} | dict(conduct))
    body = bytes(byte & 7 for byte in DATA[:size])  # no text has such bytes
    first, last = sorted(bounds) if bounds and max(bounds) < size else (0, None)
    origin.add_file("/body", body)
    handles = [origin.fault("/body", Break(at)) for at in breaks]
    stop = size if last is None else last + 1
    assert download(origin, "/body", first=first, last=last, patience=5) == Outcome(
        body[first:stop]
    )
    for handle in handles:
        handle.clear()  # a body may be complete before all of them occurred


#### The first byte ####


def fmp4_playlist() -> Playlist:
    init, fragments = media.fmp4()
    return Playlist("news", fragments, init=init, extension=".m4s")


HALVES: dict[str, Callable[[], Playlist]] = {
    "plain": lambda: Playlist("news", large(4, 400_000)),
    "aes-128": lambda: Playlist("news", large(4, 400_000), aes_key=KEY),
    "byte-ranges": lambda: Playlist("news", large(4, 400_000), byte_ranges=True),
    "fmp4": fmp4_playlist,
    "aac": lambda: Playlist("news", media.aac_segments(), extension=".aac"),
}


@pytest.mark.parametrize("make", HALVES.values(), ids=HALVES)
def test_bytes_are_passed_on_while_the_rest_of_the_segment_is_missing(
    origin: Origin, serve: Serve, make: Callable[[], Playlist]
) -> None:
    playlist = origin.add(make())
    half = len(playlist.plain(0, 1)) // 2
    stall = origin.fault(playlist.segment_path(0), Stall(at=half))
    viewer = serve({"news": playlist.url}).watch("/news")
    init = playlist.find(playlist.init_path)
    whole = (init.body if init else b"") + playlist.plain(0, 4 if half > 100_000 else 8)
    # A part of a packet or frame may be held back.
    early = len(init.body if init else b"") + half - 1000
    assert viewer.read(early) == whole[:early]
    assert stall.held == 1, "the origin still holds the rest"
    stall.release()
    assert viewer.read_all() == (whole[early:], True)


def test_later_segments_are_passed_on_as_they_arrive(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("news", large(4, 200_000)))
    stalls = [origin.fault(playlist.segment_path(n), Stall(at=100_000)) for n in range(4)]
    viewer = serve({"news": playlist.url}, threads=4).watch("/news")
    for stall in stalls:
        stall.wait_held()
    for number, stall in enumerate(stalls):
        segment = playlist.plain(number, number + 1)
        assert viewer.read(99_000) == segment[:99_000]
        assert stall.held == 1
        stall.release()
        assert viewer.read(len(segment) - 99_000) == segment[99_000:]
    assert viewer.read_all() == (b"", True)


#### Parallel downloads ####


@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["aes-128"]], ids=["plain", "aes-128"])
def test_eight_threads_make_at_most_eight_transfers(
    origin: Origin, serve: Serve, kind: Mapping[str, Any]
) -> None:
    playlist = origin.add(Playlist("news", large(32, 64_000), **kind))
    stall = origin.fault(SEGMENTS, Stall(at=2_000), times=None)
    viewer = serve({"news": playlist.url}, threads=8).watch("/news")
    stall.wait_held(8)
    assert_no_more_requests(origin, SEGMENTS, 8)
    origin.rate = 1_000_000
    stall.release()
    assert viewer.read_all() == (playlist.plain(0, 32), True)
    assert origin.peak(SEGMENTS) == 8
    assert origin.peak_connections <= 8 + 1


@pytest.mark.parametrize("threads", [1, 4])
def test_breaks_and_errors_open_no_more_connections(
    origin: Origin, serve: Serve, threads: int
) -> None:
    playlist = origin.add(Playlist("news", pieces(40, show())))
    origin.rate = 500_000
    for number in range(40):
        origin.fault(playlist.segment_path(number), Break(100))
        if number % 4 == 0:
            origin.fault(playlist.segment_path(number), Status(503, b"busy"))
    assert serve({"news": playlist.url}, threads=threads).get("/news").body == show()
    assert origin.peak(SEGMENTS) <= threads
    assert origin.peak_connections <= threads + 1


def test_explicit_engine_option_sets_the_number_of_threads(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("news", large(12, 64_000)))
    stall = origin.fault(SEGMENTS, Stall(at=2_000), times=None)
    options = {"stream-segment-threads": 2, "hls-segment-stream-data": True}
    viewer = serve({"news": playlist.url}, threads=8, streamlink=options).watch("/news")
    stall.wait_held(2)
    assert_no_more_requests(origin, SEGMENTS, 2)
    stall.release()
    assert viewer.read_all() == (playlist.plain(0, 12), True)


#### Memory ####


@pytest.mark.parametrize("threads", [1, 3])
def test_segments_without_room_in_the_buffer_are_not_requested(
    origin: Origin, threads: int
) -> None:
    """A segment keeps its place until its last byte is in the buffer."""
    size = len(media.padded(media.ts_segments(8)[0], MIB))
    playlist = origin.add(Playlist("news", large(8, MIB)))
    ring = 262_144
    with opened(playlist.url, threads=threads, ringbuffer_size=ring) as upstream:
        origin.wait_for(SEGMENTS, threads + 1)
        assert_no_more_requests(origin, SEGMENTS, threads + 1)
        taken = bytearray()
        while len(taken) < 3 * size:
            taken += b"".join(i for i in upstream.read(TIMEOUT) if isinstance(i, bytes))
            handed_on = (len(taken) + ring + pipe.PART_LIMIT) // size
            assert origin.count(SEGMENTS) <= threads + 1 + handed_on
        origin.wait_for(SEGMENTS, threads + 1 + 3)
        assert bytes(taken) + drain(upstream) == playlist.plain(0, 8)


KERNEL = 8 * MIB  # bytes that the buffers of two sockets hold at most


@pytest.mark.parametrize("kind", ["segment", "file"])
def test_large_body_is_not_buffered_beyond_the_limit(origin: Origin, kind: str) -> None:
    body = bytes(40 * MIB)
    text = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/body\n#EXT-X-ENDLIST\n"
    origin.add_file("/one.m3u8", text)
    origin.add_file("/body", body)
    address = {"segment": f"{origin.url}/one.m3u8", "file": f"httpstream://{origin.url}/body"}
    with opened(address[kind], ringbuffer_size=262_144) as upstream:
        origin.wait_for("/body")
        seen = -1
        while seen != (seen := requests_for(origin, "/body")[0].sent):
            with pytest.raises(AssertionError):
                origin.wait_for("/body", 2, timeout=QUIET)
        assert seen < pipe.BODY_LIMIT + KERNEL + 2 * MIB
        assert drain(upstream) == body


def plain_film(origin: Origin) -> str:
    return origin.add(Playlist("news", large(12, MIB))).url


def fmp4_film(origin: Origin) -> str:
    """A film with an initialization section of 6 MiB, close to the limit."""
    init, parts = media.fmp4()
    init += (6 * MIB).to_bytes(4, "big") + b"free" + bytes(6 * MIB - 8)
    return origin.add(Playlist("news", parts, init=init, extension=".m4s")).url


def film_in_a_file(origin: Origin) -> str:
    return "httpstream://" + origin.add_file("/film", b"".join(large(12, MIB)))


@pytest.mark.parametrize("make", [plain_film, fmp4_film, film_in_a_file])
def test_closing_frees_memory_without_garbage_collection(
    origin: Origin, make: Callable[[Origin], str]
) -> None:
    address = make(origin)
    with opened(address):
        pass  # create everything that is created only once
    before = set(threading.enumerate())
    gc.collect()
    gc.disable()
    try:
        with traced_memory():
            with opened(address, threads=4, ringbuffer_size=4 * MIB) as upstream:
                buffer = upstream.buffer
                with buffer._lock:
                    full = buffer._not_empty.wait_for(
                        lambda: buffer.length >= buffer.limit, TIMEOUT
                    )
                assert full
                assert tracemalloc.get_traced_memory()[0] > 2 * MIB
            join_all(before)
            origin.clear_requests()
            assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        gc.enable()
    assert upstream.buffer.is_exhausted


@pytest.mark.long
def test_thousand_segments_leave_nothing_behind(origin: Origin, serve: Serve) -> None:
    """Some bodies break. Memory and threads are the same after 200 segments and at the end."""
    segments = pieces(1_000, b"".join(large(8, 800_000)))
    playlist = origin.add(Playlist("news", segments))
    for number in range(0, 1_000, 20):
        origin.fault(playlist.segment_path(number), Break(100))
    site = serve({"news": playlist.url}, threads=4, ringbuffer_size=262_144)
    viewer = site.watch("/news")
    sizes: list[int] = []
    threads: list[set[str]] = []
    with traced_memory():
        for number, segment in enumerate(segments, 1):
            assert viewer.read(len(segment)) == segment
            if number in (200, 400, 600, 800):
                origin.clear_requests()
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
                threads.append({thread.name for thread in channel_threads(set())})
    assert viewer.read_all() == (b"", True)
    assert max(sizes[1:]) < sizes[0] + MIB // 2
    assert len(threads[-1]) <= len(threads[0])


def channel_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """The threads of a stream: all threads except the origin's and those that ran before."""
    current = {threading.current_thread(), threading.main_thread()}
    running = set(threading.enumerate()) - before - current
    return [thread for thread in running if not thread.name.startswith("origin-")]


def join_all(before: set[threading.Thread], seconds: float = TIMEOUT) -> None:
    """Wait until the stream has no thread."""
    deadline = time.monotonic() + seconds
    while running := channel_threads(before):
        left = deadline - time.monotonic()
        with contextlib.suppress(RuntimeError):  # a thread that has not started yet
            running[0].join(max(0.0, left))
        assert left > 0, f"still running: {', '.join(thread.name for thread in running)}"


#### Closing ####


@dataclass
class Stuck:
    """A stream whose upstream hangs once the fault of `handle` has met a request."""

    address: str
    handle: FaultHandle

    def wait(self) -> None:
        """Wait until the upstream hangs."""
        self.handle.wait()


def stuck_segments(origin: Origin, fault: Fault, **kind: Any) -> Stuck:
    """The first segment arrives, the others do not."""
    playlist = origin.add(Playlist("news", large(8, 64_000), **kind))
    return Stuck(playlist.url, origin.fault("/news/[1-9].ts", fault, times=None))


def stuck_start(origin: Origin, path: str, fault: Fault, **kind: Any) -> Stuck:
    """Nothing arrives."""
    playlist = origin.add(Playlist("news", media.ts_segments(), **kind))
    return Stuck(playlist.url, origin.fault(path, fault, times=None))


def stuck_playlist(origin: Origin, fault: Fault) -> Stuck:
    """The first playlist arrives, the second does not."""
    playlist = origin.add(Playlist("news", media.ts_segments(), mode="live"))
    origin.fault(playlist.path, times=1)
    return Stuck(playlist.url, origin.fault(playlist.path, fault, times=None))


def stuck_body(origin: Origin, fault: Fault) -> Stuck:
    address = origin.add_file("/news", show())
    return Stuck(address, origin.fault("/news", fault, times=None))


Cases = dict[str, Callable[[Origin], Stuck]]
HANGING_STREAMS: Cases = {
    "headers": lambda origin: stuck_segments(origin, StallHeaders()),
    "body": lambda origin: stuck_segments(origin, Stall(at=1_000)),
    "encrypted-body": lambda origin: stuck_segments(origin, Stall(at=1_000), aes_key=KEY),
    "dripping-body": lambda origin: stuck_segments(origin, Drip(0.05)),
    "errors": lambda origin: stuck_segments(origin, Status(503)),
    "playlist-headers": lambda origin: stuck_playlist(origin, StallHeaders()),
    "playlist-body": lambda origin: stuck_playlist(origin, Stall(at=20)),
    "playlist-drips": lambda origin: stuck_playlist(origin, Drip(0.05)),
    "raw-body": lambda origin: stuck_body(origin, Stall(at=50_000)),
}
HANGING_STARTS: Cases = {
    "first-playlist": lambda o: stuck_start(o, "/news/index.m3u8", StallHeaders()),
    "first-segment-headers": lambda o: stuck_start(o, SEGMENTS, StallHeaders()),
    "first-segment-body": lambda o: stuck_start(o, SEGMENTS, Stall(at=100)),
    "init": lambda o: stuck_start(o, "/news/init.mp4", Stall(at=10), init=b"init" * 100),
    "key": lambda o: stuck_start(o, "/news/key", StallHeaders(), aes_key=KEY),
    "raw-headers": lambda o: stuck_body(o, StallHeaders()),
    "raw-first-bytes": lambda o: stuck_body(o, Stall(at=100)),
}


def assert_everything_ends(origin: Origin, before: set[threading.Thread], began: float) -> None:
    """Assert that the stream has no thread and no connection CLOSING seconds after `began`."""
    join_all(before, began + CLOSING - time.monotonic())
    origin.wait_connections(0, max(0.0, began + CLOSING - time.monotonic()))


@pytest.mark.parametrize("case", [*HANGING_STREAMS.values()], ids=[*HANGING_STREAMS])
def test_upstream_ends_at_once_when_the_last_viewer_leaves(
    origin: Origin, serve: Serve, case: Callable[[Origin], Stuck]
) -> None:
    stuck = case(origin)
    site = serve({"news": stuck.address}, linger=0)
    before = set(threading.enumerate())
    watcher = Watcher(site)
    watcher.take()
    stuck.wait()
    began = time.monotonic()
    watcher.leave()
    assert_everything_ends(origin, before, began)


@pytest.mark.parametrize(
    "case",
    [*HANGING_STREAMS.values(), *HANGING_STARTS.values()],
    ids=[*HANGING_STREAMS, *HANGING_STARTS],
)
def test_shutdown_ends_every_upstream_at_once(
    origin: Origin, serve: Serve, case: Callable[[Origin], Stuck]
) -> None:
    stuck = case(origin)
    site = serve({"news": stuck.address})
    before = set(threading.enumerate())
    watching = Task(lambda: site.get("/news"))
    stuck.wait()
    began = time.monotonic()
    assert site.channels.stop(CLOSING)
    answer = watching.result(CLOSING)
    assert answer.status == 503 or not answer.is_complete
    assert_everything_ends(origin, before, began)


def test_closing_wakes_a_writer_whose_ring_is_full(origin: Origin) -> None:
    playlist = origin.add(Playlist("news", large(8, 400_000)))
    before = set(threading.enumerate())
    with opened(playlist.url, ringbuffer_size=262_144):
        origin.wait_for(SEGMENTS, 4)
        origin.wait_until(
            lambda: all(r.done for r in origin.requests), "the origin has sent everything"
        )
        began = time.monotonic()
    assert_everything_ends(origin, before, began)


def test_closing_at_any_moment_leaves_nothing_behind(origin: Origin) -> None:
    """The worker, the writer and the downloads may be in any state."""
    playlist = origin.add(Playlist("news", pieces(300, show())))
    origin.rate = 1_000_000
    chance = random.Random(7)
    for _ in range(15):
        before = set(threading.enumerate())
        wanted = origin.count(SEGMENTS) + chance.randrange(0, 40)
        with opened(playlist.url, threads=8):
            origin.wait_for(SEGMENTS, wanted)
            began = time.monotonic()
        assert_everything_ends(origin, before, began)


#### Threads that cannot be started ####


def plain_address(origin: Origin) -> str:
    return origin.add(Playlist("news", media.ts_segments())).url


def file_address(origin: Origin) -> str:
    return "httpstream://" + origin.add_file("/film", show())


def muxed_address(origin: Origin) -> str:
    picture = Playlist("picture", media.video_only_segments())
    return origin.add(master("apart", {"360p": picture}, sound_ts())).url


def leftovers(folder: Path) -> list[str]:
    """The FIFOs that streamlink's muxer has left behind."""
    return [path.name for path in folder.glob("streamlinkpipe-*")]


@pytest.mark.usefixtures("_ffmpeg")
@pytest.mark.parametrize(
    ("make", "pattern", "allowed"),
    [
        pytest.param(plain_address, "^HLSStreamWriter-news-[0-9]+$", 0, id="writer"),
        pytest.param(plain_address, "^HLSStreamWorker-", 0, id="worker"),
        pytest.param(plain_address, "-executor_", 0, id="first-download"),
        pytest.param(plain_address, "-executor_", 1, id="second-download"),
        pytest.param(file_address, "^pump-", 0, id="pump"),
        pytest.param(muxed_address, "^HLSStreamWorker-", 1, id="worker-of-the-sound"),
        pytest.param(muxed_address, "copy_to_pipe", 0, id="muxer"),
        pytest.param(muxed_address, "copy_to_pipe", 1, id="muxer-of-the-sound"),
        pytest.param(muxed_address, "^pump-", 0, id="pump-of-the-muxer"),
    ],
)
def test_failed_start_of_a_thread_leaves_nothing_behind(
    origin: Origin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Origin], str],
    pattern: str,
    allowed: int,
) -> None:
    address, before = make(origin), set(threading.enumerate())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        refused = refuse_threads(patch, pattern, allowed)
        with (
            pytest.raises(pipe.UpstreamError, match="too many threads"),
            opened(address) as upstream,
        ):
            drain(upstream)
    assert refused
    join_all(before)
    origin.wait_connections(0)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("_ffmpeg")
@pytest.mark.parametrize("make", [plain_address, file_address, muxed_address])
def test_upstream_closes_even_if_no_thread_can_be_started_for_it(
    origin: Origin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Origin], str],
) -> None:
    address, before = make(origin), set(threading.enumerate())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, opened(address) as upstream:
        assert upstream.read(TIMEOUT)
        refused = refuse_threads(patch, "^close-")
        upstream.close()
        join_all(before)  # a cancelled timer's thread still ends
    assert refused
    origin.wait_connections(0)
    assert leftovers(tmp_path) == []


#### Features of playlists ####


def with_init(init: bytes, number: int) -> bytes:
    """A different initialization section for the same media: it has one more box, to be ignored."""
    return init + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")


def mapped(data: bytes, name: str, discontinuity: bool = False) -> Segment:
    return Segment(data, discontinuity=discontinuity, tags=(f'#EXT-X-MAP:URI="{name}"',))


def test_initialization_section_is_sent_again_when_it_changes(origin: Origin, serve: Serve) -> None:
    init, parts = media.fmp4()
    first, second = with_init(init, 1), with_init(init, 2)
    order = ["a", "a", "b", "b", "a", "a", "b", "b"]
    segments = [mapped(data, f"{name}.mp4") for data, name in zip(parts, order, strict=True)]
    playlist = origin.add(Playlist("news", segments, extension=".m4s"))
    origin.add_file("/news/a.mp4", first)
    origin.add_file("/news/b.mp4", second)
    answer = serve({"news": playlist.url}, threads=1).get("/news")
    expected = [first, *parts[:2], second, *parts[2:4], first, *parts[4:6], second, *parts[6:]]
    assert answer.body == b"".join(expected)
    assert answer.is_complete


def test_initialization_section_is_sent_again_at_a_discontinuity(
    origin: Origin, serve: Serve
) -> None:
    init, parts = media.fmp4()
    segments = [mapped(data, "init.mp4", n in (2, 5)) for n, data in enumerate(parts)]
    playlist = origin.add(Playlist("news", segments, init=init, extension=".m4s"))
    answer = serve({"news": playlist.url}).get("/news")
    assert answer.body == b"".join([init, *parts[:2], init, *parts[2:5], init, *parts[5:]])
    assert origin.count(playlist.init_path) == 1


def test_broken_initialization_section_is_resumed(origin: Origin, serve: Serve) -> None:
    init, parts = media.fmp4()
    playlist = origin.add(Playlist("news", parts, init=init, extension=".m4s"))
    origin.fault(playlist.init_path, Status(404))
    origin.fault(playlist.init_path, Break(500))
    origin.fault(playlist.init_path, Break(100))
    assert serve({"news": playlist.url}).get("/news").body == init + b"".join(parts)


def test_missing_initialization_section_is_requested_again(origin: Origin, serve: Serve) -> None:
    """Players need it for the segments after it: the stream waits until it can be fetched."""
    init, parts = media.fmp4()
    first, second = with_init(init, 1), with_init(init, 2)
    names = ["a"] * 4 + ["b"] * 4
    segments = [mapped(data, f"{name}.mp4") for data, name in zip(parts, names, strict=True)]
    playlist = origin.add(Playlist("news", segments, extension=".m4s"))
    origin.add_file("/news/a.mp4", first)
    origin.add_file("/news/b.mp4", second)
    origin.fault("/news/b.mp4", Status(404), times=4)
    answer = serve({"news": playlist.url}, timeout=0.5).get("/news")
    assert answer.body == b"".join([first, *parts[:4], second, *parts[4:]])
    assert answer.is_complete
    assert origin.count("/news/b.mp4") == 5


def test_initialization_section_that_is_too_large_is_refused(origin: Origin, serve: Serve) -> None:
    parts = media.fmp4()[1]
    init = bytes(pipe.BODY_LIMIT + 1)
    playlist = origin.add(Playlist("news", parts, init=init, extension=".m4s"))
    answer = serve({"news": playlist.url}, reconnect=1).get("/news")
    assert answer.status == 502
    expected = "the initialization section cannot be fetched: it is larger than 8 MiB"
    assert answer.json == {"error": expected}


def test_initialization_section_may_be_a_byte_range_of_the_segments_file(
    origin: Origin, serve: Serve
) -> None:
    """Its byte range does not affect the offsets of the segments."""
    init, parts = media.fmp4(4)
    whole = b"".join([init, *parts])
    offsets = itertools.accumulate(map(len, parts), initial=len(init))
    lines = ["#EXTM3U", "#EXT-X-VERSION:6", "#EXT-X-TARGETDURATION:1"]
    lines.append(f'#EXT-X-MAP:URI="all.mp4",BYTERANGE="{len(init)}@0"')
    for data, offset in zip(parts, offsets, strict=False):
        lines += ["#EXTINF:1.0,", f"#EXT-X-BYTERANGE:{len(data)}@{offset}", "all.mp4"]
    text = "\n".join([*lines, "#EXT-X-ENDLIST", ""]).encode()
    origin.add_file("/film/all.mp4", whole)
    address = origin.add_file("/film/index.m3u8", text)
    for at in (100, 700, 20_000, 1):
        origin.fault("/film/all.mp4", Break(at))
    answer = serve({"news": address}, threads=4).get("/news")
    assert answer.body == whole
    assert answer.is_complete


@pytest.mark.parametrize(
    "left_out", [(3, 5), (0,), (0, 1), (7,), (6, 7)], ids=lambda numbers: f"{numbers}"
)
def test_segments_with_ignored_names_are_not_requested(
    origin: Origin, serve: Serve, left_out: Sequence[int]
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    names = [f"/{number}.ts" for number in left_out]
    site = serve({"news": playlist.url}, streamlink={"hls-segment-ignore-names": names})
    played = play(site)
    edges = [0, *(number + 1 for number in left_out)], [*left_out, 8]
    assert played.body == media.spliced(*map(playlist.plain, *edges))
    assert (played.is_complete, played.gaps) == (True, 0)
    assert all(not origin.count(playlist.segment_path(number)) for number in left_out)


@pytest.mark.parametrize("left_out", [(0,), (3,), (0, 1, 2)], ids=lambda numbers: f"{numbers}")
def test_initialization_section_of_ignored_segments_is_sent(
    origin: Origin, serve: Serve, left_out: Sequence[int]
) -> None:
    init, parts = media.fmp4()
    playlist = origin.add(Playlist("news", parts, init=init, extension=".m4s"))
    names = [f"/{number}.m4s" for number in left_out]
    site = serve({"news": playlist.url}, streamlink={"hls-segment-ignore-names": names})
    rest = [data for number, data in enumerate(parts) if number not in left_out]
    assert site.get("/news").body == init + b"".join(rest)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_body_may_break_anywhere_in_a_tag_of_packed_audio(
    origin: Origin, serve: Serve, version: int
) -> None:
    frames = media.aac_segments()
    tagged = [media.id3_timestamp(float(n), version) + data for n, data in enumerate(frames)]
    playlist = origin.add(Playlist("news", tagged, extension=".aac"))
    tag = len(tagged[0]) - len(frames[0])
    for number, at in enumerate((1, 3, 9, 10, 11, tag - 1, tag, tag + 1)):
        origin.fault(playlist.segment_path(number), Break(at))
    played = play(serve({"news": playlist.url}))
    assert (played.body, played.is_complete, played.gaps) == (b"".join(frames), True, 0)


#### Plugins' own streams ####


class AdvertWriter(HLSStreamWriter):
    """A filter like Twitch's: it detects advertisements by their titles in the playlist."""

    def should_filter_segment(self, segment: HLSSegment) -> bool:
        is_advert = "advert" in (segment.title or "")
        return is_advert or super().should_filter_segment(segment)


class CountingWorker(HLSStreamWorker):
    seen = 0

    def process_segments(self, playlist: Any) -> None:
        CountingWorker.seen += 1
        super().process_segments(playlist)


class AdvertReader(HLSStreamReader):
    __writer__ = AdvertWriter
    __worker__ = CountingWorker


class AdvertStream(HLSStream):
    __reader__ = AdvertReader


def with_titles(playlist: Playlist, adverts: Sequence[int]) -> bytes:
    """The playlist's text with titles that mark the advertisements."""
    content = playlist.find(playlist.path)
    assert content
    parts = content.body.decode().split("#EXTINF:1.000000,")
    titled = ["#EXTINF:1.0," + "advert" * (n in adverts) + p for n, p in enumerate(parts[1:])]
    return "".join([parts[0], *titled]).encode()


@contextlib.contextmanager
def opened_as(
    kind: type[HLSStream], address: str, *, threads: int = 4, **arguments: Any
) -> Iterator[pipe.Upstream]:
    """An upstream of a plugin's stream, created as the plugin creates it."""
    settings = pipe.StreamSettings("news", (address,), options=pipe.Options(threads=threads))
    session = pipe.Session(settings, TIMEOUT)
    stream = kind(session.engine, address, **arguments)
    with contextlib.closing(pipe.SegmentedUpstream(session, stream)) as upstream:
        upstream.start()
        yield upstream


def test_plugins_filter_leaves_out_its_advertisements(origin: Origin) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    playlist.override = with_titles(playlist, (2, 3, 6))
    CountingWorker.seen = 0
    with opened_as(AdvertStream, playlist.url) as upstream:
        body = drain(upstream)
    wanted = (0, 1, 4, 5, 7)
    assert body == b"".join(playlist.plain(number, number + 1) for number in wanted)
    assert {r.path for r in origin.requests if r.path.endswith(".ts")} == {
        playlist.segment_path(number) for number in wanted
    }
    assert CountingWorker.seen == 1, "the plugin's own worker is used, too"


def test_plugins_filter_works_with_broken_bodies(origin: Origin) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments(), aes_key=KEY))
    playlist.override = with_titles(playlist, (0, 4))
    for number in range(8):
        origin.fault(playlist.segment_path(number), Break(1_000 * number + 1))
    with opened_as(AdvertStream, playlist.url) as upstream:
        assert drain(upstream) == playlist.plain(1, 4) + playlist.plain(5, 8)


def test_streams_own_headers_do_not_disturb_byte_ranges(origin: Origin) -> None:
    """Six rounds to provoke a race: threads of streamlink's own writer share their headers."""
    playlist = origin.add(
        Playlist("news", pieces(60, show()), byte_ranges=True, aes_key=KEY, aes_iv=IV)
    )
    headers = {"X-Own": "1"}
    for _ in range(6):
        for at in (10, 500):
            origin.fault(playlist.segment_path(0), Break(at))
        with opened_as(HLSStream, playlist.url, headers=headers) as upstream:
            assert drain(upstream) == show()
    assert all(request.headers["x-own"] == "1" for request in origin.requests)
    others = [r for r in origin.requests if r.path != playlist.segment_path(0)]
    assert {request.path for request in others} == {playlist.path, playlist.key_path}
    assert not any("range" in request.headers for request in others)
    assert headers == {"X-Own": "1"}


#### Separate tracks for sound and picture ####


@pytest.fixture(scope="session")
def _ffmpeg() -> None:
    """Skip without ffmpeg. streamlink's check for it leaves a thread that idles for 10 s."""
    if not FFMPEGMuxer.is_usable(Streamlink()):
        assert "CI" not in os.environ, "ffmpeg must be installed"
        pytest.skip("needs ffmpeg")


def sound_ts() -> Playlist:
    return Playlist("sound", media.audio_only_segments())


def sound_aac(version: int) -> Playlist:
    """A tag in front of each segment; streamlink reads only tags of version 4."""
    tag = functools.partial(media.id3_timestamp, version=version)
    tagged = [tag(1.4 + n) + data for n, data in enumerate(media.aac_segments())]
    return Playlist("sound", tagged, extension=".aac")


SOUNDS: dict[str, Callable[[], Playlist]] = {
    "ts": sound_ts,
    "aac-id3v2.2": lambda: sound_aac(2),
    "aac-id3v2.3": lambda: sound_aac(3),
    "aac-id3v2.4": lambda: sound_aac(4),
}


@pytest.mark.usefixtures("_ffmpeg")
@pytest.mark.parametrize("make", SOUNDS.values(), ids=SOUNDS)
def test_broken_bodies_of_both_tracks_are_resumed(
    origin: Origin, serve: Serve, make: Callable[[], Playlist]
) -> None:
    chance = random.Random(11)
    picture, sound = Playlist("picture", media.video_only_segments()), make()
    both = origin.add(master("apart", {"360p": picture}, sound))
    for track, number in itertools.product((picture, sound), range(8)):
        size = len(track.plain(number, number + 1))
        origin.fault(track.segment_path(number), Break(chance.randrange(size)))
    answer = serve({"news": both.url}).get("/news")
    assert answer.is_complete
    decoded, sent = media.decode(answer.body), media.decode(show())
    assert decoded.starts_with_key
    assert decoded.video_frames == sent.video_frames
    assert decoded.audio_frames == pytest.approx(sent.audio_frames, abs=1)


#### The playlist ####


def behind_redirect(origin: Origin, playlist: Playlist) -> str:
    origin.fault("/entry.m3u8", Redirect(playlist.path), times=None)
    return f"{origin.url}/entry.m3u8"


def without_extension(origin: Origin, playlist: Playlist) -> str:
    origin.fault("/watch", Redirect(playlist.path), times=None)
    return f"{origin.url}/watch"


def among_variants(origin: Origin, playlist: Playlist) -> str:
    return origin.add(master("all", {"720p": playlist})).url


ENTRIES: dict[str, tuple[Callable[[Origin, Playlist], str], str]] = {
    "direct": (lambda origin, playlist: playlist.url, ""),
    "hls-prefix": (lambda origin, playlist: f"hls://{playlist.url}", ""),
    "redirect": (behind_redirect, "/entry.m3u8"),
    "no-extension": (without_extension, "/watch"),
    "variant": (among_variants, "/all/master.m3u8"),
}
by_entry = pytest.mark.parametrize(("enter", "entry"), ENTRIES.values(), ids=ENTRIES)


@by_entry
def test_playlist_of_a_film_is_loaded_once(
    origin: Origin, serve: Serve, enter: Callable[[Origin, Playlist], str], entry: str
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    assert serve({"news": enter(origin, playlist)}).get("/news").body == show()
    assert origin.count(playlist.path) == 1
    assert not entry or origin.count(entry) == 1


@by_entry
def test_start_of_a_live_channel_loads_its_playlist_once(
    origin: Origin, serve: Serve, enter: Callable[[Origin, Playlist], str], entry: str
) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments(), mode="live", target_duration=15))
    viewer = serve({"news": enter(origin, playlist)}, linger=0).watch("/news")
    start = playlist.plain(5 - LIVE_EDGE, 5)
    assert viewer.read(len(start)) == start
    assert origin.count(playlist.path) == 1
    assert not entry or origin.count(entry) == 1


def test_each_start_loads_the_playlist_again(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("news", media.ts_segments()))
    site = serve({"news": playlist.url})
    assert [site.get("/news").body for _ in range(2)] == [show(), show()]
    assert origin.count(playlist.path) == 2


def test_reloads_follow_the_redirect_each_time(origin: Origin, serve: Serve) -> None:
    """Each reload requests the configured address again, which may redirect to another one."""
    old = origin.add(Playlist("old", media.ts_segments(), mode="live"))
    new = origin.add(Playlist("new", media.ts_segments(), mode="live"))
    origin.fault("/entry.m3u8", Redirect(old.path), times=2)
    origin.fault("/entry.m3u8", Redirect(new.path), times=None)
    viewer = serve({"news": f"{origin.url}/entry.m3u8"}, linger=0).watch("/news")
    start = old.plain(5 - LIVE_EDGE, 5)
    assert viewer.read(len(start)) == start
    origin.wait_for(new.path, 1)
    new.advance(2)
    new.end()
    assert viewer.read_all() == (new.plain(5, 7), True)
    loads = [request.path for request in origin.requests if request.path.endswith(".m3u8")]
    assert loads[0::2] == len(loads[0::2]) * ["/entry.m3u8"]
    assert loads[1::2] == 2 * [old.path] + (len(loads[1::2]) - 2) * [new.path]


#### Unsupported versions of streamlink ####


def test_installed_streamlink_is_supported() -> None:
    pipe.check_engine()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (HLSStreamWriter, "put"),
        (HLSStreamWriter, "run"),
        (HLSStreamWriter, "close"),
        (HLSStreamWriter, "should_filter_segment"),
        (HLSStreamWriter, "create_decryptor"),
        (HLSStreamWriter, "iter_segment_content"),
        (HLSStreamWorker, "run"),
        (HLSStreamWorker, "reload"),
        (HLSStreamWorker, "process_segments"),
        (HLSStreamReader, "close"),
        (MuxedStream, "_open_streams"),
        (HTTPAdapter, "get_connection_with_tls_context"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_streamlink_is_detected(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    def strange(this: object, what: object) -> None: ...

    monkeypatch.setattr(owner, name, strange)
    with pytest.raises(pipe.PipeError, match="pip install -r"):
        pipe.check_engine()


def test_program_exits_with_advice_if_streamlink_is_unsupported() -> None:
    lines = (
        "from streamlink.stream.hls.hls import HLSStreamWriter",
        "HLSStreamWriter.put = lambda this, what, more: None",
        "import pipe",
        "raise SystemExit(pipe.main(['--demo', '--check']))",
    )
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(
        command, cwd=Path(pipe.__file__).parent, capture_output=True, encoding="utf-8", check=False
    )
    (line,) = done.stderr.splitlines()
    assert pipe.engine_version in line
    assert "pip install -r requirements.txt" in line
    assert (done.returncode, done.stdout) == (1, ""), "no stream was opened"
