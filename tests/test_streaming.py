"""Streams of every kind. Everything is real: origin, streamlink, StreamPipe, ffmpeg and sockets.

Tests compare the bytes that viewers receive with those of the origin's media.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from streamlink.session.session import Streamlink
from streamlink.stream.ffmpegmux import FFMPEGMuxer

from tests import media
from tests.memory import traced_memory
from tests.origin import Break, Origin, Playlist, Segment, Status, master
from tests.server import TIMEOUT, Site

KEY, IV = bytes(range(16)), bytes(range(16, 32))
MIB = 1 << 20

BUFFER_SIZES = (8192, 1, 187, 188, 189, 65536)
LIVE_EDGE = 3  # segments; streamlink's default

Serve = Callable[..., Site]


#### Media ####


@dataclass(frozen=True)
class Show:
    """Segments as the origin sends them (`sent`), and as a viewer must get them (`got`)."""

    sent: Sequence[bytes | Segment]
    got: Sequence[bytes]
    init: bytes = b""
    options: Mapping[str, Any] = field(default_factory=dict)  # of its playlist
    kind: str = "video/mp2t"

    def playlist(self, mode: Literal["vod", "event", "live"] = "vod", **more: Any) -> Playlist:
        init = self.init or None
        return Playlist("news", self.sent, mode=mode, init=init, **{**self.options, **more})

    def body(self, first: int = 0, stop: int | None = None) -> bytes:
        """The bytes for a viewer that starts with segment `first` and ends before `stop`."""
        return self.init + b"".join(self.got[first:stop])


def ts(**options: Any) -> Show:
    segments = media.ts_segments()
    return Show(segments, segments, options=options)


def fmp4() -> Show:
    init, fragments = media.fmp4()
    return Show(fragments, fragments, init, {"extension": ".m4s"}, kind="video/mp4")


def aac(tag: Callable[[int], bytes]) -> Show:
    """Packed audio with a tag in front of each segment, which viewers must not get."""
    frames = media.aac_segments()
    tagged = [tag(number) + data for number, data in enumerate(frames)]
    return Show(tagged, frames, options={"extension": ".aac"}, kind="audio/aac")


def id3(version: int, number: int) -> bytes:
    return media.id3_timestamp(float(number), version)


def two_tags(number: int) -> bytes:
    return id3(4, number) + id3(3, number)


def jumping() -> Show:
    segments = media.ts_segments()
    jumps = [number % 3 == 1 for number in range(len(segments))]
    sent = [Segment(data, discontinuity=jump) for data, jump in zip(segments, jumps, strict=True)]
    got = [after_a_jump(data) if jump else data for data, jump in zip(segments, jumps, strict=True)]
    return Show(sent, got)


def after_a_jump(segment: bytes) -> bytes:
    """A segment as viewers get it if it does not continue one with the same tables."""
    tables = segment[: 2 * media.PACKET]
    return media.spliced(tables, segment)[len(tables) :]


SHOWS: dict[str, Callable[[], Show]] = {
    "ts": ts,
    "fmp4": fmp4,
    "aac": lambda: aac(lambda number: b""),
    "aac-id3v2.2": lambda: aac(functools.partial(id3, 2)),
    "aac-id3v2.3": lambda: aac(functools.partial(id3, 3)),
    "aac-id3v2.4": lambda: aac(functools.partial(id3, 4)),
    "aac-two-tags": lambda: aac(two_tags),
    "aes-128": lambda: ts(aes_key=KEY, first_sequence=7),
    "aes-128-iv": lambda: ts(aes_key=KEY, aes_iv=IV),
    "byte-ranges": lambda: ts(byte_ranges=True),
    "aes-128-byte-ranges": lambda: ts(byte_ranges=True, aes_key=KEY, aes_iv=IV),
    "discontinuities": jumping,
}


@pytest.fixture(params=list(SHOWS.values()), ids=list(SHOWS))
def show(request: pytest.FixtureRequest) -> Show:
    result: Show = request.param()
    return result


def first_pids(data: bytes, count: int = 3) -> list[int]:
    return [media.pid(packet) for packet in media.packets(data[: count * media.PACKET])]


def assert_starts_like_a_segment(data: bytes) -> None:
    """Assert that there are a PAT, a PMT and then a key frame that can be decoded."""
    assert first_pids(data) == first_pids(media.ts_segments()[0])
    assert media.first_picture(data)[1]


#### Finite streams ####


def test_finite_stream_arrives_byte_for_byte(origin: Origin, serve: Serve, show: Show) -> None:
    site = serve({"news": origin.add(show.playlist()).url})
    answer = site.get("/news")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == show.kind
    assert answer.body == show.body()
    assert answer.is_complete


@pytest.mark.parametrize("size", BUFFER_SIZES)
def test_bytes_do_not_depend_on_the_buffer_size(origin: Origin, serve: Serve, size: int) -> None:
    body = ts().body()
    streams = {
        "segments": origin.add(ts().playlist()).url,
        "raw": origin.add_file("/raw", body),
        "uneven": origin.add_file("/uneven", body[:-100]),
    }
    site = serve(streams, buffer_size=size)
    assert site.get("/segments").body == body
    assert site.get("/raw").body == body
    assert site.get("/uneven").body == body[:-100], "the last packet is incomplete"


@pytest.mark.parametrize("name", ["ts", "fmp4", "aac-id3v2.4"])
def test_http10_viewer_gets_an_unframed_body(origin: Origin, serve: Serve, name: str) -> None:
    show = SHOWS[name]()
    site = serve({"news": origin.add(show.playlist()).url})
    head, _, body = site.raw(b"GET /news HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.")
    assert b"\r\ntransfer-encoding:" not in head.lower()
    assert body == show.body()


def test_http11_viewer_gets_chunks(origin: Origin, serve: Serve) -> None:
    site = serve({"news": origin.add(ts().playlist()).url})
    head, _, framed = site.raw(b"GET /news HTTP/1.1\r\nHost: pipe\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\ntransfer-encoding: chunked" in head.lower()
    assert b"".join(chunks(framed)) == ts().body()


def chunks(framed: bytes) -> Iterator[bytes]:
    """The chunks of a body, which must end with the final chunk."""
    while True:
        size, _, rest = framed.partition(b"\r\n")
        chunk, framed = rest[: int(size, 16)], rest[int(size, 16) :]
        assert framed[:2] == b"\r\n"
        framed = framed[2:]
        if not chunk:
            assert framed == b""
            return
        yield chunk


#### Live ####


def test_live_channel_starts_at_the_live_edge_and_continues_to_its_end(
    origin: Origin, serve: Serve, show: Show
) -> None:
    playlist = origin.add(show.playlist("live", listed=5, first_sequence=0))
    viewer = serve({"news": playlist.url}).watch("/news")
    start = show.body(5 - LIVE_EDGE, 5)
    assert viewer.headers["Content-Type"] == show.kind
    assert viewer.read(len(start)) == start
    playlist.advance(2)
    playlist.end()
    assert viewer.read_all() == (b"".join(show.got[5:7]), True)


def test_event_playlist_is_shared_like_a_live_channel(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(ts().playlist("event", listed=4))
    site = serve({"news": playlist.url})
    viewers = [site.watch("/news"), site.watch("/news")]
    start = playlist.plain(4 - LIVE_EDGE, 4)
    assert [viewer.read(len(start)) for viewer in viewers] == [start, start]
    playlist.advance(3)
    playlist.end()
    rest = playlist.plain(4, 7)
    assert [viewer.read_all() for viewer in viewers] == [(rest, True), (rest, True)]
    assert origin.count(playlist.segment_path(3)) == 1, "a live channel is shared"


@pytest.mark.parametrize("name", ["ts", "fmp4", "aac-id3v2.4"])
def test_live_channel_plays_over_http10(origin: Origin, serve: Serve, name: str) -> None:
    show = SHOWS[name]()
    playlist = origin.add(show.playlist("live"))
    viewer = serve({"news": playlist.url}).watch("/news", http10=True)
    start = show.body(5 - LIVE_EDGE, 5)
    assert viewer.read(len(start)) == start
    playlist.advance()
    playlist.end()
    assert viewer.read_all()[0] == show.got[5]


@pytest.mark.parametrize("edge", [1, LIVE_EDGE, 5])
def test_viewers_start_at_the_configured_live_edge(origin: Origin, serve: Serve, edge: int) -> None:
    playlist = origin.add(ts().playlist("live", window=6))
    site = serve({"news": playlist.url}, streamlink={"hls-live-edge": edge})
    first = site.watch("/news")
    start = playlist.plain(6 - edge, 6)
    assert first.read(len(start)) == start, "a cold start"
    playlist.advance(2)
    news = playlist.plain(6, 8)
    assert first.read(len(news)) == news
    late = site.watch("/news")
    start = playlist.plain(8 - edge, 8)
    assert late.read(len(start)) == start, "a late viewer"
    playlist.end()
    assert [first.read_all(), late.read_all()] == [(b"", True), (b"", True)]


def test_live_stream_that_fails_ends_without_the_final_chunk(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(ts().playlist("live"))
    viewer = serve({"news": playlist.url}, timeout=2, reconnect=0).watch("/news")
    start = playlist.plain(5 - LIVE_EDGE, 5)
    assert viewer.read(len(start)) == start
    origin.stop()
    body, is_complete = viewer.read_all()
    assert not is_complete
    assert {media.pid(packet) for packet in media.packets(body)} <= {media.PID_NULL}


#### Multivariant ####


@pytest.mark.parametrize(
    ("configured", "query", "expected"),
    [
        pytest.param(None, "", "720p", id="best-by-default"),
        pytest.param(None, "?quality=best", "720p", id="best"),
        pytest.param(None, "?quality=worst", "360p", id="worst"),
        pytest.param(None, "?quality=480p", "480p", id="by-name"),
        pytest.param(None, "?token=x&quality=480p&_=1", "480p", id="among-other-parameters"),
        pytest.param(None, "?quality=", "720p", id="empty"),
        pytest.param("360p", "", "360p", id="configured"),
        pytest.param("1080p,480p,best", "", "480p", id="first-of-the-configured-that-exists"),
        pytest.param("360p", "?quality=best", "720p", id="asked-for-wins-over-configured"),
    ],
)
def test_quality_is_chosen_by_query_or_configuration(
    origin: Origin, serve: Serve, configured: str | None, query: str, expected: str
) -> None:
    segments = media.ts_segments()
    variants = {
        "360p": Playlist("small", segments[:2]),
        "480p": Playlist("middle", segments[2:4]),
        "720p": Playlist("large", segments[4:6]),
    }
    address = origin.add(master("all", variants)).url
    quality = {"quality": configured} if configured else {}
    answer = serve({"news": {"url": address, **quality}}).get(f"/news{query}")
    assert answer.body == variants[expected].plain(0, 2)
    assert answer.is_complete


@pytest.fixture(scope="session")
def _ffmpeg() -> None:
    """Skip without ffmpeg. streamlink's check for it leaves a thread that idles for 10 s."""
    if not FFMPEGMuxer.is_usable(Streamlink()):
        assert "CI" not in os.environ, "ffmpeg must be installed"
        pytest.skip("needs ffmpeg")


@pytest.mark.usefixtures("_ffmpeg")
def test_separate_sound_is_muxed_with_the_picture(origin: Origin, serve: Serve) -> None:
    picture = Playlist("picture", media.video_only_segments())
    sound = Playlist("sound", media.audio_only_segments())
    both = origin.add(master("apart", {"360p": picture}, sound))
    answer = serve({"news": both.url}).get("/news")
    assert answer.headers["Content-Type"] == "video/mp2t"
    assert answer.is_complete
    assert_same_show(answer.body, ts().body())


@pytest.mark.usefixtures("_ffmpeg")
def test_live_channel_with_separate_sound_is_shared(origin: Origin, serve: Serve) -> None:
    picture = Playlist("picture", media.video_only_segments(), mode="live", window=8)
    sound = Playlist("sound", media.audio_only_segments(), mode="live", window=8)
    both = origin.add(master("apart", {"360p": picture}, sound))
    # ffmpeg reads 5 s of each track before it writes anything.
    site = serve({"news": both.url}, streamlink={"hls-live-edge": 8})
    viewers = [site.watch("/news"), site.watch("/news")]
    picture.end()
    sound.end()
    bodies = [viewer.read_all() for viewer in viewers]
    for body, is_complete in bodies:
        assert is_complete
        assert_same_show(body, ts().body())
    assert origin.count(picture.segment_path(0)) == 1
    assert origin.count(sound.segment_path(0)) == 1


@pytest.mark.usefixtures("_ffmpeg")
def test_closed_channel_with_separate_sound_leaves_no_process(origin: Origin, serve: Serve) -> None:
    picture = Playlist("picture", media.video_only_segments(), mode="live", window=8)
    sound = Playlist("sound", media.audio_only_segments(), mode="live", window=8)
    both = origin.add(master("apart", {"360p": picture}, sound))
    site = serve({"news": both.url}, streamlink={"hls-live-edge": 8})
    assert site.watch("/news").status == 200
    site.close()
    for thread in threading.enumerate():
        if thread.name.startswith("close-"):
            thread.join(TIMEOUT)
    with pytest.raises(ChildProcessError):  # not even a zombie
        os.waitpid(-1, os.WNOHANG)


def assert_same_show(muxed: bytes, sent: bytes) -> None:
    """Assert that pictures and sounds are the same, apart from one common delay."""
    got, wanted = media.decode(muxed), media.decode(sent)
    delay = got.video[0] - wanted.video[0]
    assert got.starts_with_key
    assert got.video == pytest.approx([time + delay for time in wanted.video], abs=0.001)
    assert got.audio == pytest.approx([time + delay for time in wanted.audio], abs=0.001)


#### Raw HTTP ####


def endless_ts() -> Iterator[bytes]:
    """A transport stream that repeats without end, in pieces that are not whole packets."""
    body = ts().body()
    return itertools.cycle(body[at : at + 1000] for at in range(0, len(body), 1000))


def begun(size: int) -> bytes:
    """The first bytes of `endless_ts`."""
    body = ts().body()
    return (body * (size // len(body) + 1))[:size]


@pytest.mark.parametrize("chunked", [False, True], ids=["closing", "chunked"])
@pytest.mark.parametrize("prefix", ["", "httpstream://"], ids=["bare", "httpstream"])
def test_endless_body_plays(origin: Origin, serve: Serve, prefix: str, chunked: bool) -> None:
    origin.rate = 2_000_000
    address = origin.add_endless("/feed", endless_ts, chunked=chunked)
    site = serve({"relay": prefix + address}, linger=0)
    viewer = site.watch("/relay")
    assert viewer.headers["Content-Type"] == "video/mp2t"
    assert viewer.read(400_000) == begun(400_000)
    late = site.watch("/relay")
    assert_starts_like_a_segment(late.read(100_000))
    assert origin.count("/feed") == 1, "a live channel is shared"


def test_endless_body_is_kept_within_the_window(origin: Origin, serve: Serve) -> None:
    """50 MiB pass through in less than 3 MiB of memory, including the origin in this process."""
    address = origin.add_endless("/feed", lambda: itertools.repeat(piece))
    piece = b"".join(media.padded(segment, 128 * 1024) for segment in media.ts_segments())
    site = serve({"relay": address}, ringbuffer_size=262_144, linger=0)
    viewer = site.watch("/relay")
    assert viewer.read(len(piece)) == piece
    with traced_memory():
        for at in itertools.islice(itertools.cycle(range(0, len(piece), 47 * 188)), 6000):
            wanted = piece[at : at + 47 * 188]
            assert viewer.read(len(wanted)) == wanted
        _, peak = tracemalloc.get_traced_memory()
    assert peak < 3 * MIB


@pytest.mark.parametrize("prefix", ["", "httpstream://"], ids=["bare", "httpstream"])
def test_file_arrives_byte_for_byte_for_each_viewer(
    origin: Origin, serve: Serve, prefix: str
) -> None:
    body = ts().body()
    site = serve({"film": prefix + origin.add_file("/film", body)})
    assert [site.get("/film").body for _ in range(2)] == [body, body]
    assert site.get("/film").is_complete
    assert origin.count("/film") == 3


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param(lambda: fmp4().body(), "video/mp4", id="fmp4"),
        pytest.param(lambda: id3(4, 0) + b"".join(media.aac_segments()), "audio/aac", id="aac"),
        pytest.param(lambda: b"\x1a\x45\xdf\xa3" + bytes(5000), "video/x-matroska", id="matroska"),
        pytest.param(lambda: b"none of them\0" * 100, "application/octet-stream", id="anything"),
        pytest.param(lambda: b"\0", "application/octet-stream", id="a-byte"),
    ],
)
def test_content_type_is_detected_from_the_first_bytes(
    origin: Origin, serve: Serve, content: Callable[[], bytes], kind: str
) -> None:
    sent = content()
    tag = len(id3(4, 0)) if sent.startswith(b"ID3") else 0
    answer = serve({"film": origin.add_file("/film", sent, content_type="text/html")}).get("/film")
    assert answer.headers["Content-Type"] == kind
    assert answer.body == sent[tag:]
    assert answer.is_complete


def test_file_that_breaks_off_has_no_final_chunk(origin: Origin, serve: Serve) -> None:
    body = ts().body()
    address = origin.add_file("/film", body)
    origin.fault("/film", Break(at=100_000))
    origin.fault("/film", Status(503), times=None)
    site = serve({"film": f"httpstream://{address}"}, timeout=0.5, reconnect=0)
    answer = site.get("/film")
    assert answer.body == body[: len(answer.body)]
    assert 100_000 - media.PACKET < len(answer.body) <= 100_000
    assert not answer.is_complete


def test_endless_body_that_closes_has_no_final_chunk(origin: Origin, serve: Serve) -> None:
    address = origin.add_endless("/feed", lambda: [ts().body()])
    origin.fault("/feed", times=1)
    origin.fault("/feed", Status(503), times=None)
    site = serve({"relay": f"httpstream://{address}"}, timeout=0.5, reconnect=0)
    answer = site.get("/relay")
    assert answer.body == ts().body()
    assert not answer.is_complete


@pytest.mark.parametrize("prefix", ["", "hls://"], ids=["bare", "hls"])
@pytest.mark.parametrize("content_type", ["application/vnd.apple.mpegurl", "text/plain"])
def test_playlist_at_an_address_without_extension_is_detected(
    origin: Origin, serve: Serve, prefix: str, content_type: str
) -> None:
    playlist = origin.add(ts().playlist())
    content = playlist.find(playlist.path)
    assert content
    address = origin.add_file("/news/watch", content.body, content_type=content_type)
    answer = serve({"news": f"{prefix}{address}?session=1"}).get("/news")
    assert answer.body == ts().body()
    assert answer.is_complete
