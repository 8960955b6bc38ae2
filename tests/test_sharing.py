"""Viewers that share a live channel: they join it, fall behind and leave it. Everything is real.

Tests observe the origin and the viewers' sockets. One test counts the open channels in Channels,
and some shorten a time limit.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist, Segment, StallHeaders, Status, intra_refresh, master
from tests.server import TIMEOUT, Site, Watch

LIVE_EDGE = 3  # segments; streamlink's default
MIB = 1 << 20
LEAST_RING = 262_144  # bytes: the smallest ringbuffer_size

Serve = Callable[..., Site]
T = TypeVar("T")


#### Viewers ####


def all_at_once(actions: Sequence[Callable[[], T]]) -> list[T]:
    """The results of these functions, which start at the same moment, each on its own thread."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], T]) -> T:
        barrier.wait(TIMEOUT)
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait by polling until `condition` holds."""
    deadline, pause = time.monotonic() + TIMEOUT, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what}"
        pause.wait(0.005)


def wait_until_all_left(site: Site) -> None:
    eventually(lambda: site.ask("GET", "/health").json["viewers"] == 0, "no viewer is left")


class Sluggish:
    """A viewer that reads only if the test calls a method, with a tiny receive buffer."""

    def __init__(self, site: Site, path: str) -> None:
        self._sock = socket.socket()
        self._sock.settimeout(TIMEOUT)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.connect(("127.0.0.1", site.port))
        self._sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        self.head = b""
        while not self.head.endswith(b"\r\n\r\n"):
            self.head += self.read(1)

    def read(self, size: int) -> bytes:
        data = self._sock.recv(size, socket.MSG_WAITALL)
        assert data, "the server closed the connection"
        return data

    def read_all(self) -> bytes:
        """Read the rest, with a larger receive buffer: otherwise each 2 KiB would need a packet."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        return b"".join(iter(lambda: self._sock.recv(65536), b""))

    def __enter__(self) -> Sluggish:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def endless_ts() -> Iterator[bytes]:
    return itertools.cycle(media.ts_segments())


def first_pids(data: bytes, count: int = 3) -> list[int]:
    return [media.pid(packet) for packet in media.packets(data[: count * media.PACKET])]


def assert_starts_like_a_segment(data: bytes) -> None:
    """Assert that there are a PAT, a PMT and then a key frame that can be decoded."""
    assert first_pids(data) == first_pids(media.ts_segments()[0])
    assert media.first_picture(data)[1]


#### One upstream for a live channel ####


def joined(site: Site, path: str, size: int) -> tuple[Watch, bytes]:
    viewer = site.watch(path)
    return viewer, viewer.read(size)


@pytest.mark.parametrize(
    "queries",
    [
        pytest.param([""], id="alike"),
        pytest.param(["", "?quality=best", "?quality=720p"], id="by-three-names-of-a-variant"),
    ],
)
def test_fifty_simultaneous_viewers_cause_one_start(
    origin: Origin, serve: Serve, queries: list[str]
) -> None:
    small = Playlist("small", media.ts_segments(), mode="live")
    large = Playlist("large", media.ts_segments(), mode="live")
    variants = origin.add(master("all", {"360p": small, "720p": large}))
    site = serve({"news": variants.url})
    paths = [f"/news{query}" for query in itertools.islice(itertools.cycle(queries), 50)]
    start = large.plain(5 - LIVE_EDGE, 5)
    arrivals = all_at_once([partial(joined, site, path, len(start)) for path in paths])
    assert {body for _, body in arrivals} == {start}
    large.advance(2)
    large.end()
    assert {viewer.read_all() for viewer, _ in arrivals} == {(large.plain(5, 7), True)}
    fetched = [origin.count(large.segment_path(number)) for number in range(7)]
    assert fetched == [0, 0, 1, 1, 1, 1, 1]
    assert origin.count(variants.path) == 1
    assert origin.count(small.path) == 0


def test_each_variant_has_a_channel_of_its_own(origin: Origin, serve: Serve) -> None:
    small = Playlist("small", media.ts_segments()[:4], mode="live", window=3)
    large = Playlist("large", media.ts_segments()[4:], mode="live", window=3)
    site = serve({"news": origin.add(master("all", {"360p": small, "720p": large})).url}, linger=0)
    bodies = [
        site.watch(f"/news?quality={quality}").read(len(playlist.plain(0, 3)))
        for quality, playlist in [("worst", small), ("best", large), ("360p", small)]
    ]
    assert bodies == [small.plain(0, 3), large.plain(0, 3), small.plain(0, 3)]
    assert origin.count(small.segment_path(0)) == origin.count(large.segment_path(0)) == 1


#### Late viewers ####


def test_late_viewer_starts_with_tables_and_a_key_frame(origin: Origin, serve: Serve) -> None:
    segments = [media.padded(segment, MIB) for segment in media.ts_segments()]
    playlist = origin.add(Playlist("live", segments, mode="live"))
    site = serve({"news": playlist.url})
    first = site.watch("/news")
    assert first.read(len(playlist.plain(2, 5))) == playlist.plain(2, 5)
    playlist.advance()
    assert first.read(len(playlist.plain(5, 6))) == playlist.plain(5, 6)
    start = site.watch("/news").read(2 * MIB)
    assert_starts_like_a_segment(start)
    assert start == playlist.plain(3, 6)[: 2 * MIB]
    assert media.first_picture(start)[0] == media.decode(segments[3]).video[0]


def test_late_viewer_gets_the_initialization_section_first(origin: Origin, serve: Serve) -> None:
    init, fragments = media.fmp4()
    playlist = Playlist("live", fragments, mode="live", init=init, extension=".m4s")
    site = serve({"news": origin.add(playlist).url})
    first = site.watch("/news")
    start = init + playlist.plain(2, 5)
    assert first.read(len(start)) == start
    playlist.advance()
    assert first.read(len(fragments[5])) == fragments[5]
    late = site.watch("/news")
    start = init + playlist.plain(3, 6)
    assert late.read(len(start)) == start
    assert media.decode(start).video[0] == media.decode(init + fragments[3]).video[0]
    assert origin.count(playlist.init_path) == 1


def test_late_viewer_of_intra_refresh_does_not_start_at_the_old_key_frame(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "KEY_FRAME_LIFE", 1.0)
    address = origin.add_endless("/relay", lambda: intra_refresh(0.002))
    site = serve({"news": f"httpstream://{address}"})
    first = site.watch("/news")
    key_frame = first.read(10 * media.PACKET)[2 * media.PACKET : 3 * media.PACKET]

    def starts_later() -> bool:
        with site.watch("/news") as late:
            tables_and_unit = late.read(3 * media.PACKET)
        unit = tables_and_unit[2 * media.PACKET :]
        assert media.pid(tables_and_unit) == 0
        assert unit[1] & 0x40, "a PES starts"
        return unit != key_frame

    eventually(starts_later, "the old key frame is ignored")


def test_late_viewer_of_a_source_without_segments_starts_at_a_key_frame(
    origin: Origin, serve: Serve
) -> None:
    origin.rate = 4_000_000
    site = serve({"relay": origin.add_endless("/feed", endless_ts)}, linger=0)
    site.watch("/relay").read(500_000)
    for viewer in [site.watch("/relay") for _ in range(5)]:
        assert_starts_like_a_segment(viewer.read(100_000))
    assert origin.count("/feed") == 1


#### Finite streams are not shared ####


def test_each_viewer_of_a_film_gets_all_of_it(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("film", media.ts_segments()))
    site = serve({"film": playlist.url})
    answers = all_at_once([partial(site.get, "/film")] * 6)
    assert all(answer.is_complete for answer in answers)
    assert {answer.body for answer in answers} == {playlist.plain(0, 8)}
    assert {origin.count(playlist.segment_path(number)) for number in range(8)} == {6}


def test_log_says_whether_a_channel_is_finite(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    film = origin.add(Playlist("film", media.ts_segments()))
    live = Playlist("live", media.ts_segments(), mode="live")
    news = origin.add(master("news", {"720p": live}))
    site = serve({"film": film.url, "news": news.url})
    site.get("/film")
    with site.watch("/news") as viewer:
        viewer.read(media.PACKET)
    assert "film: finite, single quality, video/mp2t" in caplog.messages
    assert "news: live, 720p, video/mp2t" in caplog.messages


def long_film(origin: Origin) -> Playlist:
    """60 segments of 512 KiB: more than streamlink's queue and the kernel's buffers hold."""
    segments = [media.padded(segment, MIB // 2) for segment in media.ts_segments()]
    return origin.add(Playlist("film", list(itertools.islice(itertools.cycle(segments), 60))))


def test_viewer_of_a_film_that_stops_reading_stops_the_downloads(
    origin: Origin, serve: Serve
) -> None:
    film = long_film(origin)
    # Its media repeats every eight segments.
    loops = [film.plain(first, min(first + 8, 60)) for first in range(0, 60, 8)]
    body = media.spliced(*loops, is_announced=False)
    site = serve({"film": film.url}, ringbuffer_size=LEAST_RING)
    with Sluggish(site, "/film") as viewer:
        others = []
        for _ in range(2):  # each takes longer than the first viewer would need to fetch everything
            assert site.get("/film").body == body
            others.append(origin.count("/film/*.ts"))
        fetched_by_first = others[0] - 60
        assert 0 < fetched_by_first < 60
        assert others[1] == fetched_by_first + 120, "the first viewer fetches no more segments"
        assert viewer.read_all() == body
    assert origin.count("/film/*.ts") == 180


@pytest.mark.parametrize("kind", ["segments", "raw"])
def test_upstream_of_a_film_closes_with_its_viewer(origin: Origin, serve: Serve, kind: str) -> None:
    film = long_film(origin)
    body = film.plain(0, 60)
    address = film.url if kind == "segments" else origin.add_file("/film", body)
    viewer = serve({"film": f"{'' if kind == 'segments' else 'httpstream://'}{address}"}).watch(
        "/film"
    )
    assert viewer.read(MIB) == body[:MIB]
    viewer.close()
    origin.wait_connections(0)


#### Linger ####


def large_segments() -> list[bytes]:
    """Each needs several sends; the second one fails if the viewer has left."""
    return [media.padded(segment, MIB) for segment in media.ts_segments()]


def test_lingering_channel_can_be_joined_without_a_request(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("live", large_segments(), mode="live"))
    site = serve({"news": playlist.url})
    first = site.watch("/news")
    assert first.read(len(playlist.plain(2, 5))) == playlist.plain(2, 5)
    first.close()
    playlist.advance()  # sending it shows that the viewer has left
    wait_until_all_left(site)
    origin.fault("*", StallHeaders(), times=None)
    again = site.watch("/news")
    assert again.read(len(playlist.plain(3, 6))) == playlist.plain(3, 6)
    origin.clear_faults()
    playlist.advance()
    playlist.end()
    assert again.read_all() == (playlist.plain(6, 7), True)
    assert {origin.count(playlist.segment_path(number)) for number in range(2, 7)} == {1}


@pytest.mark.parametrize("linger", [0, 0.5], ids=["at-once", "later"])
def test_upstream_closes_after_linger(origin: Origin, serve: Serve, linger: float) -> None:
    origin.rate = 4_000_000
    site = serve({"relay": origin.add_endless("/feed", endless_ts)}, linger=linger)
    viewer = site.watch("/relay")
    assert_starts_like_a_segment(viewer.read(100_000))
    assert origin.connections == 1
    left = time.monotonic()
    viewer.close()
    origin.wait_connections(0)
    assert linger <= time.monotonic() - left < linger + 2
    assert_starts_like_a_segment(site.watch("/relay").read(100_000))
    assert origin.count("/feed") == 2


def test_segmented_upstream_closes_after_linger(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("live", large_segments(), mode="live"))
    viewer = serve({"news": playlist.url}, linger=0).watch("/news")
    assert viewer.read(len(playlist.plain(2, 5))) == playlist.plain(2, 5)
    viewer.close()
    playlist.advance()
    origin.wait_connections(0)


def test_viewers_may_join_and_leave_while_a_channel_closes(
    origin: Origin,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pipe, "Channels", Census)
    origin.rate = 4_000_000
    site = serve({"relay": origin.add_endless("/feed", endless_ts)}, linger=0)
    dice, pause = random.Random(1), threading.Event()

    def arrive(seconds: float) -> Watch:
        # Some viewers arrive before the channel closes, some meanwhile, some later.
        pause.wait(seconds)
        viewer = site.watch("/relay")
        assert_starts_like_a_segment(viewer.read(20_000))
        return viewer

    crowd: list[Watch] = []
    for _ in range(20):
        base = dice.uniform(0, 0.1)
        delays = [base + dice.uniform(0, 0.02) for _ in range(15)]
        moves: list[Callable[[], Watch | None]] = [partial(arrive, delay) for delay in delays]
        moves += [partial(Watch.close, viewer) for viewer in crowd]
        arrivals = all_at_once(moves)
        crowd = [viewer for viewer in arrivals if viewer]
    for viewer in crowd:
        viewer.close()
    origin.wait_connections(0)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []
    assert isinstance(site.channels, Census)
    assert site.channels.most_open == 1
    assert site.channels.joined == {pipe.State.LIVE}
    assert 1 < origin.count("/feed") <= 20 * 15


class Census(pipe.Channels):
    """Counts the open or starting channels whenever a channel is opened.

    After the decision to close a channel it delays the end, so that viewers may arrive meanwhile.
    """

    def __init__(self, config: pipe.Config) -> None:
        super().__init__(config)
        self.most_open = 0
        self.joined: set[pipe.State] = set()  # states of channels when a viewer was attached

    def watch(self, *arguments: Any, **more: Any) -> pipe.Channel:
        channel = super().watch(*arguments, **more)
        self.joined.add(channel.state)
        return channel

    def note_variants(self, channel: pipe.Channel, *arguments: Any, **more: Any) -> None:
        try:
            super().note_variants(channel, *arguments, **more)
        finally:
            with self.changed:
                states = [channel.state for channel in self._channels]
            is_open = [state in (pipe.State.STARTING, pipe.State.LIVE) for state in states]
            self.most_open = max(self.most_open, sum(is_open))

    def close_if_abandoned(self, channel: pipe.Channel) -> None:
        super().close_if_abandoned(channel)
        if channel.stopped.is_set():
            threading.Event().wait(0.02)


#### Failed starts ####


def test_failed_start_is_shared_and_remembered(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(Playlist("live", media.ts_segments(), mode="live"))
    failing = origin.fault(playlist.path, StallHeaders(), Status(404), times=None)
    site = serve({"news": playlist.url})
    with ThreadPoolExecutor(10) as pool:
        waiting = [pool.submit(site.get, "/news") for _ in range(10)]
        eventually(lambda: site.channels.viewer_count() == 10, "ten viewers wait for the start")
        failing.release()
        answers = [answer.result(TIMEOUT) for answer in waiting]
    failed = time.monotonic()
    assert {answer.status for answer in answers} == {502}
    assert origin.count("*") == 1
    assert {site.get("/news").status for _ in range(5)} == {502}
    assert origin.count("*") == 1, "the remembered failure is the answer"
    failing.clear()
    eventually(lambda: site.watch("/news").status == 200, "the failure is forgotten")
    assert 1.5 < time.monotonic() - failed < 4


#### Viewers that fall behind ####

SEGMENTS = 120  # 12 MB; two fit into the smallest window, and the kernel holds up to 4 MiB


def small_segments() -> list[bytes]:
    return [media.padded(segment, 100_000) for segment in media.ts_segments(SEGMENTS, 0.2)]


def jumps(got: bytes, segments: Sequence[bytes]) -> int:
    """How often `got` omits a part of these segments.

    It must consist of whole packets, begin with the first one and end with the last one, and
    continue with the start of a later segment after each omission.
    """
    whole, starts = b"".join(segments), list(itertools.accumulate(map(len, segments), initial=0))
    at = count = 0
    while True:
        run = run_of_equal(got, whole[at:])
        # The tables of two segments may be equal, but not their key frames.
        run -= next((behind for behind in TABLES if at + run - behind in starts), 0)
        at, got = at + run, got[run:]
        if not got:
            assert at == len(whole)
            return count
        count += 1
        assert_starts_like_a_segment(got)
        at = next(start for start in starts if start >= at and whole.startswith(got[:4000], start))


TABLES = (media.PACKET, 2 * media.PACKET)  # bytes after a segment's start


def run_of_equal(got: bytes, wanted: bytes) -> int:
    """The length of the common start, in bytes of whole packets."""
    pairs = itertools.zip_longest(media.packets(got), media.packets(wanted))
    return sum(media.PACKET for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Tap:
    """A body that sends one more piece after each open(), and ends after the last one."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._due = threading.Semaphore(0)

    def __call__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            assert self._due.acquire(timeout=TIMEOUT)
            yield piece

    def open(self, count: int = 1) -> None:
        self._due.release(count)


def test_stalled_viewer_delays_no_other_one_and_skips_to_a_segment(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    segments = small_segments()
    tap = Tap(segments)
    address = f"httpstream://{origin.add_endless('/feed', tap)}"
    site = serve({"relay": address}, ringbuffer_size=LEAST_RING, reconnect=0)
    tap.open()
    with Sluggish(site, "/relay") as stalled:
        other = site.watch("/relay")
        for segment in segments:
            assert other.read(len(segment)) == segment
            tap.open()
        assert other.read_all() == (b"", False)
        jumped = jumps(stalled.read_all(), segments)
    wait_until_all_left(site)
    assert jumped >= 1
    assert sorted(map(int, re.findall(r"(\d+) skips", caplog.text))) == [0, jumped]


def test_channel_continues_while_its_only_viewer_is_paused(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_patience(monkeypatch, 0.2)
    segments = small_segments()
    busy = Playlist("busy", segments, mode="live", window=SEGMENTS, listed=LIVE_EDGE)
    site = serve({"news": origin.add(busy).url}, ringbuffer_size=LEAST_RING)
    with Sluggish(site, "/news") as paused:
        busy.advance(SEGMENTS - LIVE_EDGE)
        busy.end()
        # It is requested only after nearly all others were evicted from the window.
        origin.wait_for(busy.segment_path(SEGMENTS - 1))
        eventually(lambda: not feeders(), "the feeder has reached the end")
        assert jumps(paused.read_all(), segments) >= 1


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed-")]


def set_patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Change FOREMOST_PATIENCE for channels that are opened later."""
    monkeypatch.setattr(pipe, "FOREMOST_PATIENCE", seconds)


def test_only_viewer_slightly_faster_than_the_stream_loses_nothing(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel starts with three segments of 25 MB, four times the window of 18 MiB.

    The model is a stream of 20 Mbit/s in segments of 10 s, with a player that reads 1.2 times as
    fast. All sizes are real, and all times are divided by ten: a segment each second, 30 MB/s for
    the viewer and a patience of 0.5 s. The ratios of sizes, rates and patience, which decide
    whether bytes are lost, stay the same. Only the loopback's rate, which is far higher, is not
    scaled.
    """
    set_patience(monkeypatch, pipe.FOREMOST_PATIENCE / 10)
    large = [media.padded(segment, 25_000_000) for segment in media.ts_segments()[:3]]
    segments = [Segment(data, duration=1.0) for data in large]
    playlist = Playlist("live", segments, mode="live", window=LIVE_EDGE, clock=True)
    site = serve({"news": origin.add(playlist).url}, ringbuffer_size=18 * MIB, linger=0)
    viewer = site.watch("/news")
    tables = large[0][: 2 * media.PACKET]
    again = media.spliced(tables, large[0])[len(tables) :]  # signals that the media restarts
    for number, expected in enumerate([*large, again, large[1]]):
        for at, part in paced(viewer, len(expected), 30_000_000):
            assert part == expected[at : at + len(part)], f"at {at} of segment {number}"


def paced(viewer: Watch, size: int, rate: float) -> Iterator[tuple[int, bytes]]:
    """Read `size` bytes at this rate, in parts; a late part does not speed up the next ones."""
    pause, due = threading.Event(), time.monotonic()
    for at in range(0, size, 65536):
        pause.wait(max(0.0, due - time.monotonic()))
        part = viewer.read(min(65536, size - at))
        due = max(due, time.monotonic() - 0.01) + len(part) / rate
        yield at, part
