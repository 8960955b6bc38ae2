"""The origin and the media that all other tests rely on."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from streamlink.session.session import Streamlink
from streamlink.stream.stream import StreamIO

from tests import media
from tests.origin import (
    PANELS,
    Body,
    Break,
    ChangedValidator,
    Close,
    Drip,
    Fault,
    Gzip,
    NoRange,
    Origin,
    Panel,
    Playlist,
    Redirect,
    Segment,
    Stall,
    StallHeaders,
    Status,
    WrongLength,
    master,
)

KEY, IV = bytes(range(16)), bytes(range(16, 32))
DATA = bytes(itertools.islice(itertools.cycle(range(251)), 200_000))
RESET = Break(70_000, reset=True)

Client = http.client.HTTPConnection


@pytest.fixture
def origin() -> Iterator[Origin]:
    before = set(threading.enumerate())
    with Origin() as origin:
        yield origin
    assert not set(threading.enumerate()) - before, "a thread outlived the origin"


@pytest.fixture
def client(origin: Origin) -> Iterator[Client]:
    client = Client("127.0.0.1", origin.port, timeout=10)
    yield client
    client.close()


def get(client: Client, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    client.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = client.getresponse()
    return response, response.read()


#### Media ####


def test_ts_segments_are_one_stream() -> None:
    segments = media.ts_segments()
    decoded = media.decode(b"".join(segments))
    assert len(segments) == 8
    assert decoded.starts_with_key
    assert decoded.video_frames == 8 * media.FPS
    for times in (decoded.video, decoded.audio):
        assert all(a < b < a + 0.05 for a, b in itertools.pairwise(times)), "a gap or a repeat"


@pytest.mark.parametrize("number", range(8))
def test_each_ts_segment_starts_with_its_tables_and_a_key_frame(number: int) -> None:
    segment = media.ts_segments()[number]
    pat, pmt, video = itertools.islice(media.packets(segment), 3)
    assert media.pid(pat) == 0
    assert media.pid(pmt) == int.from_bytes(pat[15:17], "big") & 0x1FFF
    assert video[1] & 0x40, "no PES packet starts here"
    assert media.decode(segment).starts_with_key


def test_ts_counters_are_continuous() -> None:
    last: dict[int, int] = {}
    for packet in media.packets(b"".join(media.ts_segments())):
        pid, counter = media.pid(packet), packet[3] & 15
        assert counter == (last.get(pid, counter - 1) + 1) % 16
        last[pid] = counter


def test_lost_packet_is_a_decoding_error() -> None:
    whole = media.ts_segments()[0]
    with pytest.raises(ValueError, match="damaged"):
        media.decode(whole[: 188 * 50] + whole[188 * 53 :])


def test_segments_keep_the_bitrate_and_the_length() -> None:
    segments = media.ts_segments(2, 2.0, bitrate=800_000)
    assert [len(segment) for segment in segments] == pytest.approx([225_000] * 2, rel=0.15)
    assert media.decode(b"".join(segments)).video_frames == 4 * media.FPS


def test_renditions_share_a_timeline() -> None:
    video = media.decode(b"".join(media.video_only_segments()))
    audio = media.decode(b"".join(media.audio_only_segments()))
    assert (video.audio, audio.video) == ((), ())
    assert video.video == media.decode(b"".join(media.ts_segments())).video
    assert audio.audio == media.decode(b"".join(media.ts_segments())).audio


def test_padding_does_not_change_the_media() -> None:
    plain = b"".join(media.ts_segments()[:2])
    grown = b"".join(media.padded(segment, 300_000) for segment in media.ts_segments()[:2])
    assert len(grown) == 2 * (300_000 // 188 * 188)
    assert media.decode(grown) == media.decode(plain)
    kept = (p for p in media.packets(grown) if media.pid(p) != media.PID_NULL)
    assert b"".join(kept) == plain
    assert media.padded(plain, 1000) == plain


def test_fmp4_decodes_from_any_segment() -> None:
    init, segments = media.fmp4()
    assert init[4:8] == b"ftyp"
    assert media.decode(init + b"".join(segments)).video_frames == 8 * media.FPS
    assert media.decode(init + segments[5]).video[0] == pytest.approx(5.0)


def test_packed_audio_decodes() -> None:
    segments = media.aac_segments()
    assert len(set(segments)) == 8
    assert all(segment[:2] == b"\xff\xf1" for segment in segments)
    assert media.decode(b"".join(segments)).audio_frames == 8 * 48_000 // 1024


@pytest.mark.parametrize("version", [2, 3, 4])
def test_id3_tag_has_its_length(version: int) -> None:
    tag = media.id3_timestamp(1.5, version)
    assert tag[:4] == b"ID3" + bytes([version])
    assert len(tag) == 10 + tag[9]
    assert tag.endswith(b"transportStreamTimestamp\0" + (135_000).to_bytes(8, "big"))


#### streamlink reads it ####


def open_stream(url: str) -> StreamIO:
    session = Streamlink({"hls-live-edge": 2})
    opened: StreamIO = session.streams(f"hls://{url}")["best"].open()
    return opened


def read_all(url: str) -> bytes:
    with contextlib.closing(open_stream(url)) as stream:
        return rest_of(stream)


def rest_of(stream: StreamIO) -> bytes:
    return b"".join(iter(lambda: stream.read(65536), b""))


TS = media.ts_segments()
VOD = {
    "ts": lambda: Playlist("vod", TS),
    "renumbered": lambda: Playlist("vod", TS, first_sequence=3),
    "fmp4": lambda: Playlist("vod", media.fmp4()[1], init=media.fmp4()[0], extension=".m4s"),
    "aac": lambda: Playlist("vod", media.aac_segments(), extension=".aac"),
    "aes": lambda: Playlist("vod", TS, aes_key=KEY, first_sequence=7),
    "aes-iv": lambda: Playlist("vod", TS, aes_key=KEY, aes_iv=IV),
    "byte-ranges": lambda: Playlist("vod", TS, byte_ranges=True),
    "byte-ranges-odd": lambda: Playlist("vod", TS, byte_ranges=True, first_sequence=1),
    "discontinuity": lambda: Playlist("vod", [TS[0], Segment(TS[5], discontinuity=True)]),
}


@pytest.mark.parametrize("kind", VOD)
def test_streamlink_reads_vod_byte_exact(origin: Origin, kind: str) -> None:
    playlist = origin.add(VOD[kind]())
    init = media.fmp4()[0] if kind == "fmp4" else b""
    expected = init + playlist.plain(playlist.oldest, playlist.newest + 1)
    assert read_all(playlist.url) == expected


def test_streamlink_follows_a_live_playlist(origin: Origin) -> None:
    live = origin.add(Playlist("live", TS, mode="live", window=3, listed=6, first_sequence=2))
    assert (live.oldest, live.newest) == (5, 7)
    expected = live.plain(6, 11)  # two at the live edge and the next three
    got = bytearray()
    with contextlib.closing(open_stream(live.url)) as stream:
        while len(got) < len(live.plain(6, 8)):
            got += stream.read(65536)
        live.advance(3)
        live.end()
        got += rest_of(stream)
    assert bytes(got) == expected
    assert origin.count(live.path) >= 2


def test_streamlink_takes_the_best_variant(origin: Origin) -> None:
    large = Playlist("large", TS[:2])
    tv = origin.add(master("tv", {"360p": Playlist("small", TS[2:4]), "720p": large}))
    assert read_all(tv.url) == large.plain(0, 2)
    assert origin.count("/small/*") == 0


def test_master_names_its_separate_audio(origin: Origin) -> None:
    sound = Playlist("sound", media.audio_only_segments())
    tv = origin.add(master("tv", {"360p": Playlist("picture", TS)}, audio=sound))
    with urlopen(tv.url) as response:
        text = response.read().decode()
    assert 'TYPE=AUDIO,GROUP-ID="sound"' in text
    assert 'URI="/sound/index.m3u8"' in text
    assert "RESOLUTION=640x360" in text
    assert sound.url == f"{origin.url}/sound/index.m3u8"


#### Playlists ####


def text_of(playlist: Playlist) -> str:
    content = playlist.find(playlist.path)
    assert content is not None
    return content.body.decode()


def numbers_of(playlist: Playlist) -> list[int]:
    return [int(line[:-3]) for line in text_of(playlist).splitlines() if line.endswith(".ts")]


def test_live_window_slides_and_repeats() -> None:
    live = Playlist("live", TS, mode="live", window=3)
    assert numbers_of(live) == [0, 1, 2]
    live.advance(7)
    assert numbers_of(live) == [7, 8, 9]
    assert "#EXT-X-DISCONTINUITY\n#EXTINF:1.000000,\n8.ts" in text_of(live)
    assert live.plain(7, 9) == TS[7] + TS[0]
    live.advance(2)
    assert "#EXT-X-DISCONTINUITY-SEQUENCE:1\n" in text_of(live)
    assert live.find(live.segment_path(0)), "a segment that left the list is missing"
    assert not live.find(live.segment_path(12)), "a segment exists before it is published"
    live.drop(2)
    assert numbers_of(live) == [11]


def test_live_playlist_restarts_and_keeps_old_segments() -> None:
    live = Playlist("live", TS, mode="live", window=3, first_sequence=100, keep=1)
    live.advance(4)
    assert live.find(live.segment_path(103))
    assert not live.find(live.segment_path(102))
    live.restart(1, segments=TS[:5])
    assert numbers_of(live) == [1, 2, 3]
    assert live.plain(4, 6) == TS[4] + TS[0]


def test_event_grows_until_its_end() -> None:
    event = Playlist("event", TS, mode="event", listed=2, first_sequence=5)
    event.advance()
    assert numbers_of(event) == [5, 6, 7]
    assert event.plain(5, 6) == TS[0]
    assert "ENDLIST" not in text_of(event)
    event.end()
    assert text_of(event).endswith("#EXT-X-ENDLIST\n")


def test_clock_moves_a_playlist(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live = Playlist("live", TS, mode="live", clock=True)
    event = Playlist("event", TS, mode="event", clock=True)
    assert live.newest == 4
    now += 2.5
    assert (live.newest, event.newest) == (6, 6)
    now += 10
    assert live.newest == 16
    assert event.newest == 7
    assert "ENDLIST" in text_of(event)


def test_override_replaces_the_playlist(origin: Origin) -> None:
    live = origin.add(Playlist("live", TS, mode="live"))
    live.override = b"#EXTM3U\nbroken"
    with urlopen(live.url) as response:
        assert response.read() == live.override
    live.override = None
    assert text_of(live).count("#EXTINF") == 5


#### HTTP ####


def test_connections_persist_and_requests_are_logged(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    for _ in range(2):
        response, body = get(client, "/file?a=1", X_Name="Value")
        assert (response.status, body) == (200, DATA)
    first, second = origin.requests
    assert (first.method, first.path, first.status) == ("GET", "/file?a=1", 200)
    assert first.headers["x-name"] == "Value"
    assert first.connection == second.connection
    assert first.time < second.time
    origin.wait_until(lambda: all(r.done for r in origin.requests), "all requests are done")
    assert [r.sent for r in origin.requests] == [len(DATA)] * 2
    assert [origin.count(p) for p in ("/file", "/file?a=1", "/f*", "/other")] == [2, 2, 2, 0]
    assert (origin.connections, origin.peak_connections, origin.peak_transfers) == (1, 1, 1)


def test_head_has_no_body_and_an_unknown_path_is_404(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA, content_type="text/x")
    client.request("HEAD", "/file", headers={"Range": "bytes=0-1"})
    response = client.getresponse()
    assert (response.status, response.read()) == (200, b"")
    assert response.headers["Content-Length"] == str(len(DATA))
    assert response.headers["Content-Type"] == "text/x"
    assert get(client, "/none")[0].status == 404


@pytest.mark.parametrize(
    ("wanted", "status", "start", "stop"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=1000-1999", 206, 1000, 2000),
        ("bytes=199000-", 206, 199_000, 200_000),
        ("bytes=-5", 206, 199_995, 200_000),
        ("bytes=199990-300000", 206, 199_990, 200_000),
        ("bytes=200000-", 416, 0, 0),
        ("bytes=5-4", 200, 0, 200_000),
        ("bytes=0-1,4-5", 200, 0, 200_000),
        ("lines=0-1", 200, 0, 200_000),
    ],
)
def test_range_selects_bytes(
    origin: Origin, client: Client, wanted: str, status: int, start: int, stop: int
) -> None:
    origin.add_file("/file", DATA)
    response, body = get(client, "/file", Range=wanted)
    assert (response.status, body) == (status, DATA[start:stop])
    expected = {206: f"bytes {start}-{stop - 1}/200000", 416: "bytes */200000"}.get(status)
    assert response.headers["Content-Range"] == expected


def test_if_range_needs_a_strong_validator(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    response, _ = get(client, "/file")
    etag, modified = response.headers["ETag"], response.headers["Last-Modified"]
    wanted = {"Range": "bytes=5-"}

    def status(condition: str) -> int:
        return get(client, "/file", **wanted, If_Range=condition)[0].status

    assert [status(etag), status(modified)] == [206, 206]
    assert [status(f"W/{etag}"), status('"other"'), status("Sat, 01 Jan 2000 00:00:00 GMT")] == (
        [200, 200, 200]
    )
    origin.fault("/file", ChangedValidator(), times=2)
    assert [status(etag), status(modified)] == [200, 200]
    origin.validators = False
    response, _ = get(client, "/file", **wanted)
    assert (response.status, response.headers["ETag"]) == (206, None)
    assert status(etag) == 200
    origin.ranges = False
    response, body = get(client, "/file", **wanted)
    assert (response.status, response.headers["Accept-Ranges"], body) == (200, None, DATA)


@pytest.mark.parametrize("chunked", [False, True])
def test_endless_body_continues_until_the_client_leaves(
    origin: Origin, client: Client, chunked: bool
) -> None:
    closed = threading.Event()

    def source() -> Iterator[bytes]:
        try:
            yield from map(str.encode, map(str, itertools.count()))
        finally:
            closed.set()

    origin.add_endless("/endless", source, content_type="video/mp2t", chunked=chunked)
    client.request("GET", "/endless")
    response = client.getresponse()
    assert response.read(12) == b"012345678910"
    assert response.headers["Content-Type"] == "video/mp2t"
    assert (response.headers["Transfer-Encoding"] == "chunked") == chunked
    response.close()
    client.close()
    assert closed.wait(10), "the iterator is still open after the client left"


@pytest.mark.parametrize("chunked", [False, True])
def test_body_without_a_length_ends(origin: Origin, client: Client, chunked: bool) -> None:
    origin.add_endless("/relay", lambda: [b"abc", b"def"], chunked=chunked)
    for _ in range(2):
        assert get(client, "/relay")[1] == b"abcdef"
    origin.fault("/relay", Break(4))
    if not chunked:
        assert get(client, "/relay")[1] == b"abcd"
        return
    with pytest.raises(http.client.IncompleteRead) as error:
        get(client, "/relay")
    assert error.value.partial == b"abcd"


def test_rate_and_delay_slow_an_answer(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    origin.rate, origin.delay = 1_000_000, 0.1
    began = time.monotonic()
    assert get(client, "/file")[1] == DATA
    assert 0.25 < time.monotonic() - began < 3, "not 0.1 s of delay and 0.2 s of body, less a burst"


#### Faults ####


def test_faults_change_status_and_body(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    origin.fault("/f*", Status(503, b"busy", (("Retry-After", "1"),)), times=2)
    origin.fault("/file", Redirect("/other"))
    origin.fault("/file", Body(b"<html>", "text/html"))
    for _ in range(2):
        response, body = get(client, "/file")
        assert (response.status, body, response.headers["Retry-After"]) == (503, b"busy", "1")
    response, _ = get(client, "/file")
    assert (response.status, response.headers["Location"]) == (302, "/other")
    response, body = get(client, "/file")
    assert (response.status, body, response.headers["Content-Type"]) == (
        (200, b"<html>", "text/html")
    )
    assert get(client, "/file")[1] == DATA


def test_faults_compress_the_body_and_ignore_range(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    origin.fault("/file", Gzip())
    origin.fault("/file", NoRange())
    response, body = get(client, "/file")
    assert response.headers["Content-Encoding"] == "gzip"
    assert len(body) == int(response.headers["Content-Length"]) < len(DATA)
    assert get(client, "/file", Range="bytes=1-2")[0].status == 200
    assert get(client, "/file", Range="bytes=1-2")[0].status == 206


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        (Break(0), 0),
        (Break(70_000), 70_000),
        (RESET, 70_000),
        (WrongLength(10), 200_000),
    ],
)
def test_body_ends_early(origin: Origin, client: Client, fault: Fault, size: int) -> None:
    origin.add_file("/file", DATA)
    origin.fault("/file", fault)
    client.request("GET", "/file")
    response = client.getresponse()
    assert response.length is not None
    assert response.length > size
    got = bytearray()
    with contextlib.suppress(ConnectionResetError) if fault == RESET else contextlib.nullcontext():
        for piece in iter(lambda: response.read1(10_000), b""):
            got += piece
        assert fault != RESET, "the body ended without a reset"
    response.close()
    client.close()
    assert got == DATA[:size]
    assert get(client, "/file")[1] == DATA
    origin.wait_until(lambda: origin.requests[0].sent == size, "the log has the size sent")


@pytest.mark.parametrize("fault", [Close(), Close(reset=True)])
def test_connection_closes_before_the_headers(origin: Origin, client: Client, fault: Fault) -> None:
    origin.add_file("/file", DATA)
    origin.fault("/file", fault)
    with pytest.raises(ConnectionError):
        get(client, "/file")
    client.close()
    assert get(client, "/file")[1] == DATA


def test_stall_delays_the_rest_of_the_body(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    stall = origin.fault("/file", Stall(1000), times=None)
    client.request("GET", "/file")
    response = client.getresponse()
    assert response.read(1000) == DATA[:1000]
    stall.wait_held()
    assert (origin.requests[0].sent, origin.requests[0].done) == (1000, False)
    stall.release()
    assert response.read() == DATA[1000:]
    assert (stall.taken, stall.held) == (1, 0)
    assert get(client, "/file")[1] == DATA


def test_clearing_the_faults_releases_stalled_headers(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    stall = origin.fault("/file", StallHeaders())
    client.request("GET", "/file")
    stall.wait_held()
    assert origin.requests[0].status == 0
    origin.clear_faults()
    assert client.getresponse().read() == DATA


def test_stall_ends_when_the_client_leaves(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    stall = origin.fault("/file", StallHeaders())
    client.request("GET", "/file")
    stall.wait_held()
    client.close()
    origin.wait_connections(0)
    assert stall.held == 0


def test_drip_pauses_after_each_byte(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA[:5])
    drip = origin.fault("/file", Drip(0.01))
    began = time.monotonic()
    assert get(client, "/file")[1] == DATA[:5]
    assert time.monotonic() - began >= 0.05
    drip.wait()


def test_one_request_meets_several_faults(origin: Origin, client: Client) -> None:
    origin.add_file("/file", DATA)
    stall = origin.fault("/file", NoRange(), Stall(10), Break(20))
    client.request("GET", "/file", headers={"Range": "bytes=100-"})
    stall.wait_held()
    stall.release()
    response = client.getresponse()
    with pytest.raises(http.client.IncompleteRead) as error:
        response.read()
    assert error.value.partial == DATA[:20]


#### Life ####


def test_restart_keeps_port_and_content(origin: Origin, client: Client) -> None:
    url = origin.add_file("/file", DATA)
    origin.fault("/file", Stall(10))
    client.request("GET", "/file")
    response = client.getresponse()
    origin.restart()
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    with urlopen(url) as answer:
        assert answer.read() == DATA
    origin.stop()
    assert origin.connections == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", origin.port)).close()
    origin.start()
    client.close()
    assert get(client, "/file")[1] == DATA


def test_stop_ends_connections_in_every_state(origin: Origin) -> None:
    origin.add_file("/stalled", DATA)
    origin.add_file("/unread", DATA * 200)
    origin.add_file("/late", DATA)
    origin.fault("/stalled", StallHeaders())
    origin.fault("/late", Drip(100))
    clients = [Client("127.0.0.1", origin.port) for _ in range(4)]
    for client, path in zip(clients, ("/stalled", "/unread", "/late"), strict=False):
        client.request("GET", path)
    clients[3].connect()
    origin.wait_connections(4)
    origin.wait_for("*", 3)
    assert origin.peak("/stalled") == 1
    began = time.monotonic()
    origin.stop()
    assert time.monotonic() - began < 5
    for client in clients:
        client.close()


def test_simultaneous_transfers_are_counted(origin: Origin) -> None:
    origin.add_file("/a/1", DATA)
    origin.add_file("/a/2", DATA)
    stall = origin.fault("/a/*", StallHeaders(), times=None)
    clients = [Client("127.0.0.1", origin.port) for _ in range(2)]
    for number, client in enumerate(clients, 1):
        client.request("GET", f"/a/{number}")
    stall.wait_held(2)
    stall.release()
    for client in clients:
        assert client.getresponse().read() == DATA
        assert get(client, "/a/1")[1] == DATA
        client.close()
    assert (origin.peak_transfers, origin.peak("/a/2"), origin.peak_connections) == (2, 1, 2)


def test_expired_wait_shows_the_log(origin: Origin, client: Client) -> None:
    get(client, "/none")
    with pytest.raises(AssertionError, match="GET /none"):
        origin.wait_for("/other", timeout=0.01)


def test_errors_of_the_origin_itself_are_raised() -> None:
    def source() -> Iterator[bytes]:
        yield b"abc"
        raise ZeroDivisionError

    origin = Origin()
    origin.start()
    origin.add_endless("/broken", source)
    with urlopen(f"{origin.url}/broken") as response:
        assert response.read() == b"abc"
    with pytest.raises(ZeroDivisionError):
        origin.close()


#### Panels ####


def panel(origin: Origin, **habits: Any) -> Panel:
    """A panel whose channels are endless and have a low bit rate."""

    def source() -> Iterator[bytes]:
        while True:
            yield DATA

    origin.rate = 20_000
    return Panel(origin, "panel", ("One", "Two"), source=source, **habits)


def path_of(address: str) -> str:
    return "/" + address.split("/", 3)[3]


def test_panel_refuses_a_request_without_its_headers(origin: Origin, client: Client) -> None:
    tv = panel(origin, headers={"X-Device": "tv"})
    text = get(client, path_of(tv.url))[1].decode()
    assert f"{origin.url}{tv.path(0)}|X-Device=tv\r\n" in text
    assert get(client, tv.path(0))[0].status == 403
    client.request("GET", tv.path(0), headers={"X-Device": "tv"})
    assert client.getresponse().status == 200


def test_panel_refuses_a_second_connection_for_a_while(origin: Origin, client: Client) -> None:
    tv = panel(origin, connections=1, lag=0.3)
    with urlopen(origin.url + tv.path(0)) as first:
        assert first.read(3) == DATA[:3]
        assert get(client, tv.path(1))[0].status == 458
        assert get(client, path_of(tv.url))[0].status == 200, "the list counts as a channel"
    origin.wait_until(lambda: origin.requests[0].done, "the first request ended")
    assert get(client, tv.path(1))[0].status == 458
    ended = origin.requests[0].ended
    origin.wait_until(lambda: time.monotonic() - ended > 0.3, "the lag passed", 0.5)
    client.request("GET", tv.path(1))
    assert client.getresponse().status == 200


def test_panel_redirects_with_tokens_for_one_request(origin: Origin, client: Client) -> None:
    tv = panel(origin, redirects=True)
    with urlopen(tv.url) as answer:
        assert answer.read() == tv.text()
        assert answer.url == f"{origin.url}/panel/list.m3u"
    moved = get(client, tv.path(1))[0]
    assert moved.status == 302
    location = moved.headers["Location"]
    with urlopen(origin.url + location) as channel:
        assert channel.read(3) == DATA[:3]
    assert get(client, location)[0].status == 403


def test_panel_compresses_its_list_and_delays_it(origin: Origin, client: Client) -> None:
    tv = panel(origin, packed=True, think=0.2)
    began = time.monotonic()
    assert gzip.decompress(get(client, path_of(tv.url))[1]) == tv.text()
    assert time.monotonic() - began >= 0.2


@pytest.mark.long
def test_script_prints_the_addresses_of_its_panels() -> None:
    program = Path(media.__file__).with_name("origin.py")
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        missing = set(PANELS)
        while missing:
            line = process.stdout.readline().decode()
            assert line, f"no address of {missing}"
            missing -= {name for name in PANELS if f"/{name}/get.php?" in line}
        process.kill()


def test_script_without_its_packages_says_how_to_install_them() -> None:
    program = Path(media.__file__).with_name("origin.py")
    done = subprocess.run(
        [sys.executable, "-S", str(program)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "tests/origin.py needs packages that are missing: pip install -r tests/requirements.txt\n"
    )
