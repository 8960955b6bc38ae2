"""A channel as HLS: the playlists and segments for polling clients, and clients as viewers.

`Follower` checks the rules of RFC 8216; it remembers everything that the playlists said.
"""

from __future__ import annotations

import itertools
import logging
import re
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urljoin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipe
from tests import media
from tests.origin import Body, Origin, Playlist, Segment, Stall, StallHeaders, Status, master
from tests.server import BROWSER, Answer, Site
from tests.test_sharing import eventually
from tests.threads import Task

Serve = Callable[..., Site]
Fetch = Callable[[str], bytes | None]
LEAST, MOST = 3, 8  # segments of a playlist


#### The rules ####


@dataclass(frozen=True)
class Listed:
    """A segment as a playlist describes it."""

    number: int
    discontinuities: int  # up to this segment, including its own
    duration: float
    address: str
    init: str | None  # address


def listed_in(text: str) -> list[Listed]:
    """The segments of a media playlist; fails if the playlist alone breaks a rule."""
    lines = text.splitlines()
    assert lines[0] == "#EXTM3U"
    tags = dict(re.findall(r"^#EXT-X-([A-Z-]+):(\d+)$", text, re.M))
    number = int(tags["MEDIA-SEQUENCE"])
    discontinuities = int(tags["DISCONTINUITY-SEQUENCE"])
    init, duration, found = None, None, []
    for line in lines:
        if line == "#EXT-X-DISCONTINUITY":
            discontinuities += 1
        elif line.startswith("#EXT-X-MAP:"):
            assert int(tags["VERSION"]) >= 6
            init = re.findall(r'URI="(.*?)"', line)[0]
        elif line.startswith("#EXTINF:"):
            duration = float(line[8:].rstrip(","))
            assert int(duration + 0.5) <= int(tags["TARGETDURATION"])
        elif not line.startswith("#"):
            assert duration is not None
            found.append(Listed(number, discontinuities, duration, line, init))
            number, duration = number + 1, None
    assert LEAST <= len(found) <= MOST
    return found


class Follower:
    """A client that loads a playlist repeatedly and checks each change."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self.known: dict[int, Listed] = {}
        self.bodies: dict[int, bytes] = {}
        self.inits: dict[str, bytes] = {}
        self._target = 0
        self._last: list[Listed] = []
        self._asked = 0.0
        self._left: list[tuple[float, Listed]] = []  # must stay available until these times

    def follow(self, text: str) -> list[Listed]:
        """Check a newer playlist."""
        listed = listed_in(text)
        target = re.findall(r"^#EXT-X-TARGETDURATION:(\d+)$", text, re.M)
        assert int(target[0]) >= self._target, "the target duration decreased"
        self._target = int(target[0])
        if self._last:
            assert listed[0].number >= self._last[0].number, "the media sequence number decreased"
            assert listed[-1].number >= self._last[-1].number, (
                "a listed segment is missing at the end"
            )
        for segment in listed:
            known = self.known.setdefault(segment.number, segment)
            assert known == segment, "a listed segment changed"
        self._check_availability(listed)
        self._last = listed
        return listed

    def _check_availability(self, listed: list[Listed]) -> None:
        now, seconds = time.monotonic(), sum(segment.duration for segment in self._last)
        gone = (old for old in self._last if old.number < listed[0].number)
        self._left += [(self._asked + seconds, old) for old in gone]
        self._asked = now
        for until, old in self._left:
            if now < until - 0.5:
                self._check_body(old)
        for segment in listed:
            self._check_body(segment)

    def _check_body(self, segment: Listed) -> None:
        body = self._fetch(segment.address)
        assert body, f"{segment} is not available"
        assert self.bodies.setdefault(segment.number, body) == body
        if segment.init:
            init = self._fetch(segment.init)
            assert init, f"{segment.init} is not available"
            assert self.inits.setdefault(segment.init, init) == init


def client_of(site: Site, path: str) -> Follower:
    def fetch(address: str) -> bytes | None:
        answer = site.get(urljoin(path, address))
        return answer.body if answer.status == 200 else None

    return Follower(fetch)


def follow(site: Site, path: str, client: Follower) -> list[Listed]:
    answer = site.get(path)
    assert answer.status == 200
    return client.follow(answer.body.decode())


def follow_until(site: Site, path: str, client: Follower, newest: int) -> None:
    eventually(lambda: newest_of(site, path) == newest, "the playlist has the newest segment")
    follow(site, path, client)


def newest_of(site: Site, path: str) -> int:
    return listed_in(site.get(path).body.decode())[-1].number


#### Random channels ####

INIT, FRAGMENTS = media.fmp4(4)
SEGMENTS = media.ts_segments(4)
SIXTEEN = media.ts_segments(16)


class Feed:
    """A channel's splicer and window as in the program, without an origin and a thread."""

    def __init__(self, container: pipe.Container, limit: int = 1 << 20) -> None:
        self.container = container
        self.limit = limit  # bytes of the window
        self.numbering = pipe.Numbering()
        self.numbers = itertools.count(100)
        self.open()

    def open(self) -> None:
        self.window = pipe.Window(self.limit, growth_factor=8)
        self.window.offer_hls(self.container, self.numbering, 2.0)
        self.splicer = pipe.Splicer(self.window, self.container)
        if self.container is pipe.FMP4:
            self.pass_init()

    def pass_init(self) -> None:
        self.splicer.pass_event(pipe.SegmentEvent(pipe.EventKind.INIT, 0))
        self.splicer.pass_bytes(INIT)

    def start_segment(self, duration: float, is_discontinuous: bool = False) -> None:
        self.number = next(self.numbers)
        start = pipe.SegmentEvent(pipe.EventKind.START, self.number, is_discontinuous, duration)
        self.splicer.pass_event(start)

    @property
    def body(self) -> bytes:
        """The media of the open segment."""
        bodies = SEGMENTS if self.container is pipe.MPEG_TS else FRAGMENTS
        return bodies[self.number % len(bodies)]

    def pass_half(self) -> None:
        """Pass the first ten packets of the open segment."""
        self.splicer.pass_bytes(self.body[: 10 * media.PACKET])

    def end_segment(self) -> None:
        self.splicer.pass_bytes(self.body)
        self.splicer.pass_event(pipe.SegmentEvent(pipe.EventKind.END, self.number))

    def segment(self, duration: float, end: pipe.EventKind, is_discontinuous: bool = False) -> None:
        self.start_segment(duration, is_discontinuous)
        if end is pipe.EventKind.END:
            self.end_segment()
        else:
            self.pass_half()
            self.splicer.pass_event(pipe.SegmentEvent(end, self.number))

    def act(self, action: str, duration: float) -> None:
        if action == "seam":
            self.splicer.resume()
            next(self.numbers)
            if self.container is pipe.FMP4:
                self.pass_init()
        elif action == "reopen":
            self.open()
        else:
            end = pipe.EventKind.GAP if action == "gap" else pipe.EventKind.END
            self.segment(duration, end, is_discontinuous=action == "jump")

    def playlist(self) -> str:
        return pipe.media_playlist(self.window, "news", "")[1]

    def fetch(self, address: str) -> bytes | None:
        number, extension = re.findall(r"^news/(\d+)\.(\w+)$", address)[0]
        return b"".join(self.window.find(int(number), extension)) or None


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from([*["segment"] * 8, "jump", "gap", "seam"]),
        st.sampled_from(
            [1.0, 1.96, 2.0, 2.4, 7.0]
        ),  # seconds; the last exceeds the target duration
    ),
    max_size=40,
)


@pytest.mark.parametrize("container", [pipe.MPEG_TS, pipe.FMP4])
@given(before=ACTIONS, after=ACTIONS)
@settings(max_examples=100, deadline=None)
def test_playlists_follow_the_rules(
    container: pipe.Container, before: list[tuple[str, float]], after: list[tuple[str, float]]
) -> None:
    feed = Feed(container)
    for action in before:
        feed.act(*action)
    client = Follower(feed.fetch)
    for action in after:
        feed.act(*action)
        if feed.window.await_listed(0, 0):
            client.follow(feed.playlist())
    whole = SEGMENTS if container is pipe.MPEG_TS else FRAGMENTS
    bodies = list(client.bodies.values())
    if container is pipe.MPEG_TS:
        bodies = [media.without_notices(body) for body in bodies]
    assert all(body in whole for body in bodies)
    assert set(client.inits.values()) <= {INIT}


@given(st.lists(st.integers(3, 12), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_numbers_do_not_repeat_after_reopening(counts: list[int]) -> None:
    feed = Feed(pipe.MPEG_TS)
    newest, discontinuities = 0, 0
    for count in counts:
        feed.act("reopen", 0)
        for _ in range(count):
            feed.act("segment", 1.0)
        listed = listed_in(feed.playlist())
        assert listed[0].number > newest
        assert listed[0].discontinuities > discontinuities
        newest, discontinuities = listed[-1].number, listed[-1].discontinuities


def test_discontinuities_mark_jumps_gaps_and_seams() -> None:
    feed = Feed(pipe.MPEG_TS)
    for action in ("segment", "segment", "jump", "segment", "gap", "segment", "seam", "segment"):
        feed.act(action, 1.0)
    listed = listed_in(feed.playlist())
    first = listed[0].discontinuities
    assert [segment.discontinuities - first for segment in listed] == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1, 8), (2, 8), (3, 8), (4, 6), (5, 5), (6, 4), (8, 3), (12, 3)]
)
def test_playlist_lasts_24_seconds_within_three_to_eight_segments(
    seconds: int, expected: int
) -> None:
    feed = Feed(pipe.MPEG_TS)
    for count in range(1, 20):
        feed.act("segment", float(seconds))
        if count >= LEAST:
            assert len(listed_in(feed.playlist())) == min(count, expected)


def room_for(segments: float) -> int:
    """The `limit` of a window that can grow to hold so many segments."""
    return int(segments * max(map(len, SEGMENTS)) / 8)


def fetchable(feed: Feed, newest: int) -> list[int]:
    return [n for n in range(newest - 40, newest + 1) if feed.fetch(f"news/{n}.ts")]


@pytest.mark.parametrize(("room", "listed", "kept"), [(7.2, 3, 3), (9.2, 4, 4), (6.2, 3, 2)])
def test_playlist_of_large_segments_shrinks_to_three(room: float, listed: int, kept: int) -> None:
    """As many unlisted segments are kept, fewer only if three are listed, within the window."""
    feed = Feed(pipe.MPEG_TS, room_for(room))
    for _ in range(20):
        feed.act("segment", 1.0)
        feed.fetch("news/0.ts")  # a client polls
        assert feed.window.held()[0] <= 8 * feed.limit
    told = listed_in(feed.playlist())
    assert len(told) == listed
    newest = told[-1].number
    feed.start_segment(1.0)
    feed.splicer.pass_bytes(feed.body)  # all of it has arrived, but not its end event
    assert fetchable(feed, newest) == list(range(newest - listed - kept + 1, newest + 1))
    assert feed.window.held()[0] <= 8 * feed.limit


def test_playlist_lists_no_segment_that_a_small_window_has_evicted() -> None:
    feed = Feed(pipe.MPEG_TS, room_for(2.5))
    for _ in range(10):
        feed.act("segment", 1.0)
        feed.start_segment(1.0)
        feed.splicer.pass_bytes(feed.body)
        names = re.findall(r"^news/.*", feed.playlist(), re.M)
        assert names
        assert all(map(feed.fetch, names))
        feed.splicer.pass_event(pipe.SegmentEvent(pipe.EventKind.END, feed.number))
    assert not feed.window.await_listed(0, 0), "a first playlist needs three segments"


def test_source_without_segments_has_hls_even_in_a_small_window() -> None:
    """A segment of 2 s is larger than the window, which grows while a client polls."""
    feed = Feed(pipe.MPEG_TS, room_for(15))
    first = feed.numbering.number
    stream = b"".join(SIXTEEN[:9])
    for at in range(0, len(stream), 10 * media.PACKET):
        feed.fetch("news/0.ts")  # a client polls
        feed.splicer.pass_bytes(stream[at : at + 10 * media.PACKET])
    assert len(listed_in(feed.playlist())) == LEAST
    assert fetchable(feed, first + 3) == list(range(first, first + 4))


def test_segments_stay_only_while_a_client_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later the window shrinks to its size without HLS."""
    clock = Clock()
    monkeypatch.setattr(pipe, "time", clock)
    feed = Feed(pipe.MPEG_TS, room_for(30))
    size = max(map(len, SEGMENTS))
    for _ in range(25):
        feed.act("segment", 1.0)
        clock.pass_by(1.0)
    few = 6 * size  # hls-live-edge and two more, for new viewers, and the next one to be evicted
    assert feed.window.held()[0] <= few
    for _ in range(25):
        feed.playlist()
        feed.act("segment", 1.0)
        clock.pass_by(1.0)
    newest = listed_in(feed.playlist())[-1].number
    assert len(fetchable(feed, newest)) in (2 * MOST, 2 * MOST + 1)
    assert feed.window.held()[0] <= (2 * MOST + 2) * size
    for _ in range(40):
        feed.act("segment", 1.0)
        clock.pass_by(1.0)
    assert feed.window.held()[0] <= few


class Clock:
    """The program's clock, which a test can advance."""

    def __init__(self) -> None:
        self._passed = 0.0

    def pass_by(self, seconds: float) -> None:
        self._passed += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def time(self) -> float:
        return time.time() + self._passed


def test_ended_playlist_and_its_segments_stay_until_hls_closes() -> None:
    feed = Feed(pipe.MPEG_TS)
    viewer = pipe.Viewer()
    feed.window.enter(viewer)
    for _ in range(4):
        feed.act("segment", 1.0)
    feed.window.end(True)
    feed.window.leave(viewer)
    text = feed.playlist()
    assert text.endswith("#EXT-X-ENDLIST\n")
    Follower(feed.fetch).follow(text)
    feed.window.close_hls()
    assert feed.window.held()[0] == 0
    assert not any(feed.fetch(segment.address) for segment in listed_in(text))
    with pytest.raises(pipe.WindowEnded):
        feed.playlist()


@pytest.mark.parametrize("ends_first", [True, False])
def test_streaming_viewers_get_the_rest_after_hls_closes(ends_first: bool) -> None:
    feed = Feed(pipe.MPEG_TS)
    viewer = pipe.Viewer()
    feed.window.enter(viewer)
    for _ in range(3):
        feed.act("segment", 1.0)
    for step in (feed.window.close_hls, lambda: feed.window.end(True))[:: -1 if ends_first else 1]:
        step()
    assert media.without_notices(b"".join(feed.window.take(viewer, 0)))
    with pytest.raises(pipe.WindowEnded):
        feed.window.take(viewer, None)
    feed.window.leave(viewer)
    assert feed.window.held()[0] == 0


@pytest.mark.parametrize("piece", [1_000, 1 << 20])
def test_rest_of_a_source_without_segments_is_listed_at_its_end(piece: int) -> None:
    """ffmpeg's output is such a source, for a channel with separate sound."""
    feed = Feed(pipe.MPEG_TS)
    stream = b"".join(SIXTEEN[:9])
    for at in range(0, len(stream), piece):
        feed.splicer.pass_bytes(stream[at : at + piece])
    before = listed_in(feed.playlist())
    feed.splicer.flush()
    feed.window.end(True)
    text = feed.playlist()
    listed = listed_in(text)
    assert [segment.duration for segment in before] == [2.0] * 4
    assert [segment.duration for segment in listed] == [2.0] * 4 + [pytest.approx(1.0, abs=0.1)]
    assert text.endswith("#EXT-X-ENDLIST\n")
    bodies = b"".join(feed.fetch(segment.address) or b"" for segment in listed)
    assert without_tables(bodies) == without_tables(stream)


def test_aborted_window_numbers_no_more_segments() -> None:
    """By then another channel may use the same numbers."""
    feed = Feed(pipe.MPEG_TS)
    feed.act("segment", 1.0)
    before = feed.numbering.number
    feed.start_segment(1.0)
    feed.window.abort()
    feed.end_segment()
    feed.act("segment", 1.0)
    assert feed.numbering.number == before
    with pytest.raises(pipe.WindowEnded):
        feed.window.await_listed(0, 0)


#### Playlists and segments for clients ####


def live(origin: Origin, name: str = "news", **options: object) -> Playlist:
    segments = options.pop("segments", media.ts_segments())
    made = Playlist(name, segments, mode="live", **options)  # type: ignore[arg-type]
    return origin.add(made)


def fmp4_channel(origin: Origin) -> Playlist:
    init, fragments = media.fmp4()
    return live(origin, segments=fragments, init=init, extension=".m4s")


def aac_channel(origin: Origin) -> Playlist:
    tagged = [
        media.id3_timestamp(number) + segment for number, segment in enumerate(media.aac_segments())
    ]
    return live(origin, segments=tagged, extension=".aac")


def bare_aac_channel(origin: Origin) -> Playlist:
    """Packed audio without the tags that carry its time."""
    return live(origin, segments=media.aac_segments(), extension=".aac")


COVER = b"ID3\4\0\0" + bytes((1, 64, 0, 0)) + bytes(3 << 20)  # a tag as large as a picture


def music_channel(origin: Origin) -> Playlist:
    """Packed audio with tags that are too large to be kept."""
    frames = media.audio_frames("libmp3lame", 44_100)
    second = COVER + b"".join(frames[:38])
    return live(origin, segments=[second] * 12, extension=".mp3")


def bare_ts_channel(origin: Origin) -> Playlist:
    """Only every fourth segment has tables, among them the first one that is fetched."""
    segments = media.ts_segments()
    bare = [s if n % 4 == 2 else s[2 * media.PACKET :] for n, s in enumerate(segments)]
    return live(origin, segments=bare)


CHANNELS = {
    "ts": (live, "video/mp2t", "ts"),
    "bare-ts": (bare_ts_channel, "video/mp2t", "ts"),
    "fmp4": (fmp4_channel, "video/mp4", "m4s"),
    "aac": (aac_channel, "audio/aac", "aac"),
    "bare-aac": (bare_aac_channel, "audio/aac", "aac"),
    "music": (music_channel, "audio/mpeg", "mp3"),
}


def time_and_audio(body: bytes) -> tuple[int, bytes]:
    """The time in the ID3 tag in front of packed audio, in ticks, and the audio after it."""
    tag = media.id3_timestamp(0)
    assert body.startswith(tag[:-8])
    return struct.unpack(">Q", body[len(tag) - 8 : len(tag)])[0], body[len(tag) :]


def test_hls_works_on_a_machine_whose_clock_is_not_set(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = serve({"news": live(origin).url})
    # A small computer has no clock of its own and asks a time server later.
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert site.get("/news.m3u8").status == 200


@pytest.mark.parametrize("kind", CHANNELS)
def test_segments_are_those_of_the_origin(origin: Origin, serve: Serve, kind: str) -> None:
    make, content_type, extension = CHANNELS[kind]
    playlist = make(origin)
    site = serve({"news": playlist.url})
    answer = site.get("/news.m3u8")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/vnd.apple.mpegurl"
    client = client_of(site, "/news.m3u8")
    listed = client.follow(answer.body.decode())
    first = playlist.newest - len(listed) + 1
    for segment, number in zip(listed, itertools.count(first)):
        body, theirs = client.bodies[segment.number], playlist.plain(number, number + 1)
        assert segment.duration == 1.0
        assert segment.address == f"news/{segment.number}.{extension}"
        if kind == "bare-ts":
            assert [media.pid(p) for p in media.packets(body)][:2] == [0, 0x1000]
            assert body.endswith(theirs)
            assert len(body) - len(theirs) in (0, 2 * media.PACKET)
            media.decode(body)
        elif kind in ("bare-aac", "music"):
            seconds = segment.number - listed[0].number
            assert time_and_audio(body) == (seconds * 90_000, theirs.removeprefix(COVER))
        else:
            assert body == theirs
    segment_answer = site.get(f"/{listed[0].address}")
    assert segment_answer.headers["Content-Type"] == content_type
    if kind == "fmp4":
        assert set(client.inits.values()) == {media.fmp4()[0]}
        assert len({segment.init for segment in listed}) == 1


@pytest.mark.parametrize("kind", CHANNELS)
def test_playlist_moves_with_the_origin(origin: Origin, serve: Serve, kind: str) -> None:
    playlist = CHANNELS[kind][0](origin)
    site = serve({"news": playlist.url})
    client = client_of(site, "/news.m3u8")
    newest = follow(site, "/news.m3u8", client)[-1].number
    for _ in range(3):
        playlist.advance(1)
        newest += 1
        follow_until(site, "/news.m3u8", client, newest)
    assert len(client.known) == LEAST + 3


def raw(origin: Origin, bodies: tuple[bytes, ...]) -> str:
    """A source without segments, whose connection stays open after these bytes."""
    body = b"".join(bodies)
    origin.fault("/raw", Stall(len(body)), times=None)
    return origin.add_endless("/raw", lambda: [body, body])


def test_raw_ts_is_cut_at_key_frames(origin: Origin, serve: Serve) -> None:
    bodies = media.ts_segments(12)
    site = serve({"news": raw(origin, bodies)})
    client = client_of(site, "/news.m3u8")
    listed = follow(site, "/news.m3u8", client)
    for segment in listed:
        body = client.bodies[segment.number]
        assert segment.duration == pytest.approx(2.0)
        assert media.first_picture(body)[1], "it starts with a key frame"
    joined = b"".join(client.bodies[segment.number] for segment in listed)
    assert without_tables(joined) in without_tables(b"".join(bodies))


def test_jump_of_the_clock_does_not_count_as_duration(origin: Origin, serve: Serve) -> None:
    """It would raise the target duration for good, and clients would poll too rarely."""
    bodies = media.ts_segments(16)
    bodies = bodies[:8] + tuple(later(body, seconds=30) for body in bodies[8:])
    site = serve({"news": raw(origin, bodies)})
    client = client_of(site, "/news.m3u8")
    eventually(lambda: len(follow(site, "/news.m3u8", client)) == 6, "six segments are listed")
    assert {segment.duration for segment in client.known.values()} == {2.0}
    before = [segment.discontinuities for segment in client.known.values()]
    assert [number - before[0] for number in before] == [0, 0, 0, 1, 1, 1]


def later(segment: bytes, seconds: int) -> bytes:
    moved = bytearray()
    for packet in map(bytearray, media.packets(segment)):
        if packet[1] & 0x40 and media.pid(bytes(packet)) not in (0, 0x1000):
            pipe.delay_timestamps(packet, seconds * 90_000)
        moved += packet
    return bytes(moved)


def without_tables(data: bytes) -> bytes:
    return b"".join(p for p in media.packets(data) if media.pid(p) not in (0, 0x1000))


def test_raw_audio_has_no_hls(origin: Origin, serve: Serve) -> None:
    """Browsers play the stream itself."""
    site = serve({"radio": raw(origin, media.aac_segments(12))})
    answer = site.get("/radio.m3u8")
    assert answer.status == 404
    assert "/radio" in answer.json["error"]


def test_answers_suit_browsers_and_televisions(origin: Origin, serve: Serve) -> None:
    playlist = live(origin)
    site = serve({"news": playlist.url})
    listed = listed_in(site.get("/news.m3u8").body.decode())
    for path in ("/news.m3u8", f"/{listed[0].address}"):
        ranged = site.get(path, Range="bytes=0-")
        head = site.ask("HEAD", path)
        for answer in (ranged, head):
            assert answer.status == 200
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert int(ranged.headers["Content-Length"]) == len(ranged.body)
        assert head.body == b""
        assert head.headers["Content-Type"] == ranged.headers["Content-Type"]


def test_head_request_does_not_start_a_channel(origin: Origin, serve: Serve) -> None:
    playlist = live(origin)
    site = serve({"news": playlist.url})
    assert site.ask("HEAD", "/news.m3u8").status == 200
    assert origin.count(playlist.path) == 0


def test_first_playlist_waits_for_three_segments(origin: Origin, serve: Serve) -> None:
    playlist = live(origin)
    stalled = origin.fault(playlist.segment_path(playlist.newest), StallHeaders())
    site = serve({"news": playlist.url})
    watch = threading.Thread(target=lambda: answers.append(site.get("/news.m3u8")))
    answers: list[Answer] = []
    watch.start()
    stalled.wait_held()
    assert not answers
    stalled.release()
    watch.join(20)
    assert len(listed_in(answers[0].body.decode())) == LEAST


def test_next_playlist_waits_for_the_next_segment(origin: Origin, serve: Serve) -> None:
    """Chromium stops if its first two requests get the same playlist."""
    playlist = live(origin, target_duration=4)
    site = serve({"news": playlist.url})
    newest = newest_of(site, "/news.m3u8")
    answers: list[int] = []
    ask = threading.Thread(target=lambda: answers.append(newest_of(site, "/news.m3u8")))
    ask.start()
    ask.join(0.5)
    assert not answers
    playlist.advance(1)
    ask.join()
    assert answers == [newest + 1]
    assert newest_of(site, "/news.m3u8") == newest + 1, (
        "a request waits for a target duration at most"
    )


def test_many_new_segments_are_listed_three_at_a_time(origin: Origin, serve: Serve) -> None:
    """Given more, Chromium jumps to the last three and fails at the gap."""
    playlist = live(origin)
    site = serve({"news": playlist.url})
    newest = newest_of(site, "/news.m3u8")
    playlist.advance(5)
    viewer = site.watch("/news")
    viewer.read(len(playlist.plain(playlist.newest - 7, playlist.newest + 1)))
    assert [newest_of(site, "/news.m3u8") for _ in range(2)] == [newest + 3, newest + 5]
    answer = site.ask("GET", "/news.m3u8", **{"User-Agent": "another"})
    assert listed_in(answer.body.decode())[-1].number == newest + 5, (
        "a new client gets all segments"
    )


def test_source_with_too_few_segments_is_answered_with_504(origin: Origin, serve: Serve) -> None:
    playlist = live(origin, window=2)
    site = serve({"news": playlist.url}, timeout=1)
    assert site.get("/news.m3u8").status == 504


def test_finite_stream_has_no_hls(origin: Origin, serve: Serve) -> None:
    film = origin.add(Playlist("film", media.ts_segments()))
    site = serve({"film": film.url})
    answer = site.get("/film.m3u8")
    assert answer.status == 404
    assert "/film" in answer.json["error"]
    assert site.get("/film").is_complete


def test_failed_start_is_answered_with_502(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad.m3u8", Status(503), times=None)
    site = serve({"bad": f"{origin.url}/bad.m3u8"}, timeout=2)
    assert site.get("/bad.m3u8").status == 502


def test_unknown_names_and_numbers_are_answered_with_404(origin: Origin, serve: Serve) -> None:
    news, sport = live(origin), live(origin, "sport")
    site = serve({"news": news.url, "sport": sport.url})
    listed = listed_in(site.get("/news.m3u8").body.decode())
    number = listed[0].number
    site.get("/sport.m3u8")
    for path in (
        *("/none.m3u8", f"/none/{number}.ts", "/news/0.ts", "/news/1.ts"),
        *(f"/news/{number + 100}.ts", f"/news/{number}.m4s", f"/news/{number}.mp4", "/news/0.mp4"),
        *(
            f"/news/{number}",
            "/news/x.ts",
            f"/news/-{number}.ts",
            f"/news/../{number}.ts",
        ),
        *(f"/news/%2e%2e/news/{number}.ts", f"/news/{number}.ts/"),
        *(f"/news/{number}.ts%00", f"/news/{'9' * 40}.ts", f"/news/{number}.ts?quality=none"),
    ):
        assert site.get(path).status == 404, path


def test_token_and_quality_are_in_every_address(origin: Origin, serve: Serve) -> None:
    init, fragments = media.fmp4()
    variants = {
        name: Playlist(name, fragments, init=init, extension=".m4s", mode="live")
        for name in ("180p", "90p")
    }
    origin.add(master("all", variants))
    site = serve({"news": f"{origin.url}/all/master.m3u8"}, server={"token": "a b&c"})
    assert site.get("/news.m3u8").status == 401
    answer = site.get("/news.m3u8?token=a+b%26c&quality=90p")
    for segment in listed_in(answer.body.decode()):
        assert segment.init
        for address in (segment.address, segment.init):
            assert site.get(f"/{address.partition('?')[0]}").status == 401
            assert site.get(f"/{address}").status == 200
    assert origin.count("/180p/*.m4s") == 0
    assert site.get("/news.m3u8?token=a+b%26c&quality=4k").status == 404


def wait_closed(site: Site) -> None:
    eventually(
        lambda: site.get("/status").json["streams"][0]["channels"] == [], "the channel is closed"
    )


def cut_at(*seconds: int, share: float = 1.0) -> list[float]:
    """The durations that are listed of a source with key frames this far apart.

    `share`: the part of that time that passes between their arrivals.
    """
    window = pipe.Window(1 << 20, growth_factor=8)
    window.offer_hls(pipe.MPEG_TS, pipe.Numbering(number=1), 1.0)
    for at in itertools.accumulate(seconds, initial=0):
        window.append([pipe.Join(b"", True, at * 90_000, time=at * share), b"group"])
    try:
        return [segment.duration for segment in window.listed().segments]
    except pipe.WindowEnded:
        return []


def test_source_without_segments_is_cut_at_rare_key_frames() -> None:
    """Some cameras send a key frame every 16 s; but a clock may jump as far, or media may lack."""
    assert cut_at(11, 11, 11, 11, 11, share=0.0) == [11.0] * 3
    assert cut_at(16, 16, 16, 16, 16) == [16.0] * 3
    assert cut_at(16, 16, 16, 16, 16, share=0.1) == []
    assert cut_at(31, 31, 31, 31) == []
    assert cut_at(2, 2, 2, 18, 2) == [2.0] * 4
    assert cut_at(2, 2, 2, 18, 2, 18, 2) == [2.0] * 5
    assert cut_at(4, 4, 4, 16, 16, 16)[-2:] == [16.0] * 2, "a scene without motion"


#### Over seams, closings and restarts ####


def test_playlist_continues_after_a_seam(origin: Origin, serve: Serve) -> None:
    playlist = live(origin)
    site = serve({"news": playlist.url}, timeout=2)
    client = client_of(site, "/news.m3u8")
    first = follow(site, "/news.m3u8", client)
    playlist.restart(1000)
    eventually(
        lambda: follow(site, "/news.m3u8", client)[-1].number > first[-1].number,
        "a new segment is listed",
    )
    listed = follow(site, "/news.m3u8", client)
    assert listed[-1].discontinuities > first[-1].discontinuities


def test_end_of_a_live_channel_is_in_the_playlist(origin: Origin, serve: Serve) -> None:
    """Polling clients have some time to fetch the last segments; then the channel closes."""
    playlist = live(origin, segments=SIXTEEN)
    site = serve({"news": playlist.url}, linger=0)
    client = client_of(site, "/news.m3u8")
    follow(site, "/news.m3u8", client)
    first = playlist.newest - LEAST + 1
    viewer = site.watch("/news")
    playlist.advance(5)
    playlist.end()
    assert viewer.read_all()[1], "the streaming viewer gets the end"
    texts = [""]
    while "#EXT-X-ENDLIST" not in texts[-1]:
        texts.append(site.get("/news.m3u8").body.decode())
        client.follow(texts[-1])
    assert len(texts) == 1 + 2, "five more segments, at most three at a time"
    assert b"".join(client.bodies.values()) == playlist.plain(first, playlist.newest + 1)
    another = site.ask("GET", "/news.m3u8", **{"User-Agent": "another"})
    assert another.status == 404, "a new client finds a film, which has no HLS"
    assert site.get(f"/{listed_in(texts[-1])[-1].address}").status == 200
    wait_closed(site)
    assert site.get(f"/{listed_in(texts[-1])[-1].address}").status == 404


def wait_ended(site: Site) -> None:
    def states() -> list[str]:
        return [channel["state"] for channel in site.get("/status").json["streams"][0]["channels"]]

    eventually(lambda: states() == ["closed"], "the channel ends while a client polls")


def test_end_is_listed_while_another_viewer_starts_the_stream(origin: Origin, serve: Serve) -> None:
    """The start of the other viewer hangs."""
    playlist = live(origin, segments=SIXTEEN)
    site = serve({"news": playlist.url}, linger=0, timeout=5)
    site.get("/news.m3u8")
    playlist.advance(2)
    playlist.end()
    wait_ended(site)
    stalled = origin.fault("/news/*.ts", StallHeaders(), times=None)
    viewer = threading.Thread(target=lambda: answers.append(site.get("/news")))
    answers: list[Answer] = []
    viewer.start()
    stalled.wait_held()
    text = site.get("/news.m3u8").body.decode()
    assert "#EXT-X-ENDLIST" in text
    assert not answers
    stalled.clear()
    stalled.release()
    viewer.join()


def test_end_stays_listed_if_a_new_start_finds_other_qualities(
    origin: Origin, serve: Serve
) -> None:
    variants = {name: Playlist(name, SIXTEEN, mode="live") for name in ("180p", "90p")}
    both = origin.add(master("both", variants))
    site = serve({"news": both.url}, linger=0, timeout=5)
    listed = listed_in(site.get("/news.m3u8").body.decode())
    variants["180p"].end()
    wait_ended(site)
    origin.fault(both.path, Body(f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{variants['90p'].url}"
                                 .encode()), times=None)  # fmt: skip
    assert site.ask("GET", "/news.m3u8", **{"User-Agent": "another"}).status == 200
    assert site.get(f"/{listed[-1].address}").status == 200
    assert "#EXT-X-ENDLIST" in site.get("/news.m3u8").body.decode()


def runs(function: str) -> bool:
    """Whether any thread is in a function of this name."""
    stacks = (traceback.walk_stack(frame) for frame in sys._current_frames().values())
    return any(frame.f_code.co_name == function for stack in stacks for frame, _ in stack)


@pytest.mark.parametrize("listed", [LEAST, LEAST - 1], ids=["next playlist", "first playlist"])
def test_waiting_client_gets_the_playlist_of_the_changed_stream(
    origin: Origin, serve: Serve, listed: int
) -> None:
    """An error would stop many players."""
    playlist = live(origin, segments=SIXTEEN, window=listed, target_duration=10)
    other = live(origin, "other", segments=SIXTEEN)
    site, another = serve({"news": playlist.url}), serve({"news": other.url})
    before = newest_of(site, "/news.m3u8") if listed == LEAST else 0
    request = Task(lambda: newest_of(site, "/news.m3u8"))
    eventually(lambda: runs("await_listed"), "the request waits for a segment")
    site.server.reload(another.config)
    assert request.result() > before


def test_reload_that_changes_an_ended_stream_causes_no_error(origin: Origin, serve: Serve) -> None:
    """There is no error even before the channel's thread notices that it must end."""
    playlist, other = live(origin, segments=SIXTEEN), live(origin, "other")
    site, another = serve({"news": playlist.url}, linger=0), serve({"news": other.url})
    before = newest_of(site, "/news.m3u8")
    playlist.end()
    wait_ended(site)
    with site.channels.changed:
        site.server.reload(another.config)
        assert site.channels.channels_to_poll(another.config.streams["news"], None) == []
    assert newest_of(site, "/news.m3u8") > before


@pytest.mark.parametrize("how", ["page", "playlist"])
def test_client_that_plays_again_after_the_end_gets_the_new_stream(
    origin: Origin, serve: Serve, how: str
) -> None:
    """A reloaded page plays again at once, and a player after the ended playlist is gone."""
    playlist = live(origin, segments=SIXTEEN, target_duration=2)
    site = serve({"news": playlist.url}, linger=0)
    before = newest_of(site, "/news.m3u8")
    playlist.end()
    wait_ended(site)
    playlist.restart(1000)
    first = listed_in(site.get("/news.m3u8").body.decode())
    if how == "page":
        assert site.get("/news", Accept=BROWSER).status == 200
    eventually(lambda: newest_of(site, "/news.m3u8") > before, "a new channel plays")
    # A page starts a new channel while the ended one stays, so other clients can still load it.
    assert site.get(f"/{first[0].address}").status == (200 if how == "page" else 404)
    assert "#EXT-X-ENDLIST" not in site.get("/news.m3u8").body.decode()


@pytest.mark.long
@pytest.mark.parametrize(("target", "linger"), [(2, 0), (1, 6)])
def test_ended_playlist_stays_for_three_target_durations_or_linger(
    origin: Origin, serve: Serve, target: int, linger: int
) -> None:
    """It does not matter if its client has seen ENDLIST, nor how long the client polls."""
    playlist = live(origin, segments=SIXTEEN, target_duration=target)
    site = serve({"news": playlist.url}, linger=linger)
    newest = listed_in(site.get("/news.m3u8").body.decode())[-1]
    playlist.end()
    wait_ended(site)
    origin.fault(playlist.path, Status(503), times=None)
    since = time.monotonic()
    eventually(lambda: site.get(f"/{newest.address}").status == 404, "the segments are gone")
    assert 5 < time.monotonic() - since < 10
    assert site.get("/news.m3u8").status == 502, "the playlist is gone with them"


def test_ended_playlist_does_not_change_while_it_stays(origin: Origin, serve: Serve) -> None:
    playlist = live(origin, segments=SIXTEEN)
    site = serve({"news": playlist.url}, linger=4)
    site.get("/news.m3u8")
    playlist.end()
    wait_ended(site)
    origin.fault(playlist.path, Status(503), times=None)
    answers: list[Answer] = []

    def has_gone() -> bool:
        answers.append(site.get("/news.m3u8"))
        return answers[-1].status != 200

    since = time.monotonic()
    eventually(has_gone, "the playlist is gone")
    assert time.monotonic() - since > 3.5, (
        "it stays for `linger`, which is longer than three seconds"
    )
    assert {answer.body for answer in answers[:-1]} == {answers[0].body}
    assert answers[0].body.endswith(b"#EXT-X-ENDLIST\n")


@pytest.mark.long
def test_numbers_grow_after_a_channel_or_the_server_restarts(origin: Origin, serve: Serve) -> None:
    playlist = live(origin, clock=True)
    newest = 0
    for openings in (2, 1):
        site = serve({"news": playlist.url}, linger=0)
        for _ in range(openings):
            listed = listed_in(site.get("/news.m3u8").body.decode())
            assert listed[0].number > newest
            assert listed[-1].number < 2**31
            newest = listed[-1].number
            wait_closed(site)


#### A polling client is a viewer ####


SAFARI = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1"
)
APPLES_PLAYER = "AppleCoreMedia/1.0.0.21F79 (iPhone; U; CPU OS 17_5 like Mac OS X; en_us)"
IPADS_PLAYER = APPLES_PLAYER.replace("iPhone", "iPad")
APPLE_TV = "AppleCoreMedia/1.0.0.21L580 (Apple TV; U; CPU OS 17_5 like Mac OS X; en_us)"
MACS_SAFARI = (
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Version/17.5 Safari/605.1.15"
)


def two_channels(origin: Origin, serve: Callable[..., Site], linger: float = 60) -> Site:
    """Two channels, one of which may be open at once."""
    addresses = {}
    for name in ("news", "sport"):
        playlist = Playlist(name, media.ts_segments(), mode="live", clock=True, window=6)
        addresses[name] = origin.add(playlist).url
    return serve(addresses, server={"max_upstreams": 1}, linger=linger)


@pytest.mark.parametrize(
    ("browser", "player"),
    [(SAFARI, APPLES_PLAYER), (MACS_SAFARI, IPADS_PLAYER)],
    ids=["iPhone", "iPad"],
)
def test_apples_device_changes_channels_from_page_to_page(
    origin: Origin, serve: Callable[..., Site], browser: str, player: str
) -> None:
    """Its pages and its media have different user agents."""
    site = two_channels(origin, serve)
    for name in ("news", "sport", "news"):
        page = {"Accept": BROWSER, "User-Agent": browser}
        assert site.ask("GET", f"/{name}", **page).status == 200
        playlist = site.ask("GET", f"/{name}.m3u8", **{"User-Agent": player})
        assert playlist.status == 200


def test_page_takes_no_slot_from_another_of_apples_devices(
    origin: Origin, serve: Callable[..., Site]
) -> None:
    site = two_channels(origin, serve)
    assert site.ask("GET", "/news.m3u8", **{"User-Agent": APPLE_TV}).status == 200
    page = {"Accept": BROWSER, "User-Agent": MACS_SAFARI}
    assert site.ask("GET", "/sport", **page).status == 503
    assert site.ask("GET", "/news.m3u8", **{"User-Agent": APPLE_TV}).status == 200


def test_apples_page_that_is_still_open_does_not_take_the_slot_back(
    origin: Origin, serve: Callable[..., Site]
) -> None:
    """Its browser requests the page once; after that, only the system's player polls."""
    site = two_channels(origin, serve, linger=5)
    media_of = {"User-Agent": APPLES_PLAYER}
    for name in ("news", "sport"):
        assert site.ask("GET", f"/{name}", Accept=BROWSER, **{"User-Agent": SAFARI}).status == 200
        assert site.ask("GET", f"/{name}.m3u8", **media_of).status == 200

    def has_only_media() -> bool:
        assert site.ask("GET", "/sport.m3u8", **media_of).status == 200
        return len(viewers_of(site, stream=1)) == 1

    eventually(has_only_media, "the browser is no longer counted")
    assert site.ask("GET", "/news.m3u8", **media_of).status == 503
    assert site.ask("GET", "/sport.m3u8", **media_of).status == 200


def test_two_starts_of_one_client_do_not_take_the_slot_from_each_other(
    origin: Origin, serve: Callable[..., Site]
) -> None:
    """Two televisions of one model behind one address look alike: the later start wins."""
    hanging = origin.fault("*/index.m3u8", StallHeaders(), times=None)
    site = two_channels(origin, serve)
    first = Task(lambda: site.ask("GET", "/news.m3u8").status)
    hanging.wait_held(1)
    second = Task(lambda: site.ask("GET", "/sport.m3u8").status)
    assert first.result() == 503
    hanging.clear()
    hanging.release()
    assert second.result() == 200
    assert origin.count("/news/index.m3u8") == 1


def test_tab_that_is_still_open_does_not_take_the_slot_back(
    origin: Origin, serve: Callable[..., Site]
) -> None:
    site = two_channels(origin, serve)
    for name in ("news", "sport"):
        assert site.ask("GET", f"/{name}", Accept=BROWSER).status == 200
        assert site.ask("GET", f"/{name}.m3u8").status == 200
    assert site.ask("GET", "/news.m3u8").status == 503
    assert site.ask("GET", "/sport.m3u8").status == 200
    assert site.ask("GET", "/news", Accept=BROWSER).status == 200


def viewers_of(site: Site, stream: int = 0) -> list[dict[str, object]]:
    channels = site.get("/status").json["streams"][stream]["channels"]
    return [viewer for channel in channels for viewer in channel["viewers"]]


def test_polling_client_is_one_viewer(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    playlist = live(origin)
    site = serve({"news": playlist.url}, linger=0.5)
    client = client_of(site, "/news.m3u8")
    for _ in range(3):
        follow(site, "/news.m3u8", client)
    site.ask("GET", "/news.m3u8", **{"User-Agent": "Television/1.0"})
    taken = sum(map(len, client.bodies.values())) * 3
    assert [(v["user_agent"], v["kind"], v["bytes"]) for v in viewers_of(site)] == [
        ("", "hls", taken),
        ("Television/1.0", "hls", 0),
    ]
    assert site.get("/health").json["viewers"] == 2
    eventually(lambda: site.get("/health").json["viewers"] == 0, "both clients have left")

    def count_of(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    eventually(lambda: count_of(" left: ") == 2, "their departures are logged")
    assert count_of("started watching") == 2
    assert count_of("news: viewer 127.0.0.1 started watching (HLS)") == 2
    assert count_of("news: viewer 127.0.0.1 left: ") == 2
    metrics = site.get("/metrics").body.decode()
    assert f'streampipe_sent_bytes_total{{stream="news"}} {taken}' in metrics
    assert 'streampipe_viewer_connections_total{stream="news"} 2' in metrics


def test_client_that_polls_at_a_larger_target_duration_has_not_left(
    origin: Origin, serve: Serve
) -> None:
    """Without segments, the target duration is not known yet when the first client polls."""
    site = serve({"news": raw(origin, media.ts_segments(4, 6.0))}, linger=0)
    viewer = site.get("/news.m3u8")
    assert b"#EXT-X-TARGETDURATION:6" in viewer.body
    eventually(
        lambda: cast(float, viewers_of(site)[0]["since_seconds"]) > 4,
        "the client still counts as a viewer",
    )


def test_channel_closes_after_its_polling_client_left(origin: Origin, serve: Serve) -> None:
    playlist = live(origin, clock=True)
    site = serve({"news": playlist.url}, linger=0)
    site.get("/news.m3u8")
    eventually(
        lambda: site.get("/status").json["streams"][0]["state"] == "idle", "the channel is closed"
    )
    idle = origin.count(playlist.path)
    site.get("/health")
    assert origin.count(playlist.path) == idle


def test_polling_client_shares_the_upstream_and_counts_for_the_limit(
    origin: Origin, serve: Serve
) -> None:
    playlist = live(origin)
    site = serve({"news": playlist.url}, server={"max_viewers": 2})
    stream = site.watch("/news")
    listed = listed_in(site.get("/news.m3u8").body.decode())
    assert site.ask("GET", "/news.m3u8", **{"User-Agent": "another"}).status == 503
    assert site.get("/news.m3u8").status == 200
    assert site.get(f"/{listed[0].address}").status == 200
    assert [viewer["kind"] for viewer in viewers_of(site)] == ["stream", "hls"]
    assert stream.read(188)[:1] == b"G"
    assert origin.count(playlist.segment_path(playlist.newest)) == 1


def test_client_that_polls_another_channel_has_left_the_first(origin: Origin, serve: Serve) -> None:
    """A browser can switch channels even if only one upstream is allowed."""
    names = ("news", "sport")
    streams = {name: live(origin, name).url for name in names}
    site = serve(streams, server={"max_upstreams": 1}, linger=60)
    for name in (*names, *names):
        assert site.get(f"/{name}.m3u8").status == 200
    viewer = site.watch("/sport")
    assert site.get("/news.m3u8").status == 503, "a streaming viewer has not left"
    assert viewer.status == 200


def test_clients_behind_a_proxy_are_distinguished(origin: Origin, serve: Serve) -> None:
    """A household has several equal telephones, all with the proxy's address."""
    names = ("news", "sport")
    streams = {name: live(origin, name).url for name in names}
    site = serve(streams, server={"max_upstreams": 1, "proxies": ["127.0.0.1/32"]})

    def ask(name: str, behind: str) -> int:
        return site.ask("GET", f"/{name}.m3u8", **{"X-Forwarded-For": behind}).status

    assert ask("news", "192.0.2.1") == ask("news", "192.0.2.2") == 200
    assert len(viewers_of(site)) == 2
    assert ask("sport", "192.0.2.2") == 503, "the other client still watches"


def test_feeder_does_not_wait_for_polling_clients(origin: Origin, serve: Serve) -> None:
    """The channel advances at once, even if its only viewer has not requested the segments."""
    segments = [media.padded(segment, 120_000) for segment in media.ts_segments()]
    playlist = live(origin, segments=segments, window=8)
    site = serve({"news": playlist.url}, ringbuffer_size=262_144)
    client = client_of(site, "/news.m3u8")
    newest = follow(site, "/news.m3u8", client)[-1].number
    for _ in range(4):
        playlist.advance(3)
        newest += 3
        origin.wait_for(playlist.segment_path(playlist.newest), 1)
        follow_until(site, "/news.m3u8", client, newest)
    assert len(client.known) == LEAST + 12


def test_first_playlist_lists_three_large_segments(origin: Origin, serve: Serve) -> None:
    """Without a polling client, the window would hold only two of them."""
    segments = [media.padded(segment, 480_000) for segment in media.ts_segments()]
    playlist = live(origin, segments=segments, window=4, clock=True)
    options = {"ringbuffer_size": 262_144, "timeout": 8, "streamlink": {"hls-live-edge": 1}}
    site = serve({"news": playlist.url}, **options)
    follow(site, "/news.m3u8", client_of(site, "/news.m3u8"))


@pytest.mark.parametrize("size", [3, 9], ids=["three", "one"])
def test_error_for_too_large_segments_names_ringbuffer_size(
    origin: Origin, serve: Serve, size: int
) -> None:
    segments = [media.padded(segment, size * 262_144) for segment in media.ts_segments()]
    playlist = live(origin, segments=segments)
    site = serve({"news": playlist.url}, ringbuffer_size=262_144, timeout=3)
    answer = site.get("/news.m3u8")
    assert answer.status == 504
    assert "ringbuffer_size" in answer.json["error"]


def test_polling_client_has_no_thread_between_requests(origin: Origin, serve: Serve) -> None:
    playlist = live(origin)
    site = serve({"news": playlist.url})
    site.get("/news.m3u8")
    before = threading.active_count()
    for number in range(10):
        site.ask("GET", "/news.m3u8", **{"User-Agent": f"player {number}"})
    eventually(lambda: threading.active_count() <= before, "the ten requests have left no thread")
    assert len(viewers_of(site)) == 11


def test_playlist_has_the_segments_of_the_origin(serve: Serve, origin: Origin) -> None:
    """Durations are those of the origin's playlist, too."""
    told = [Segment(data, 0.96 + number / 100) for number, data in enumerate(media.ts_segments())]
    playlist = live(origin, segments=told)
    site = serve({"news": playlist.url})
    listed = listed_in(site.get("/news.m3u8").body.decode())
    numbers = range(playlist.newest - len(listed) + 1, playlist.newest + 1)
    assert [s.duration for s in listed] == [pytest.approx(0.96 + n % 8 / 100) for n in numbers]
