"""Rare mistakes of packagers, panels and caches, which a channel must survive.

Everything is real and tested from outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import media
from tests.make_test_card import crc32
from tests.origin import (
    Body,
    Break,
    Origin,
    Playlist,
    Preface,
    Redirect,
    Segment,
    Stall,
    StallHeaders,
    Status,
    with_insert,
)
from tests.program import eventually
from tests.server import Site

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(12)
WRAP = 95_443.717  # seconds until a clock of 33 bits at 90 kHz wraps
OTHER_PID = 0x1100  # of tables that are missing


def live(origin: Origin, **more: object) -> Playlist:
    more = {"segments": SEGMENTS, "mode": "live", **more}
    return origin.add(Playlist("news", **more))  # type: ignore[arg-type]


def gaps(site: Site) -> int:
    return int(site.get("/status").json["streams"][0]["gaps"])


#### Inserts of another container ####

INIT, FRAGMENTS = media.fmp4()
AAC = [media.id3_timestamp(n) + data for n, data in enumerate(media.aac_segments())]
HLS_OF = {"ts": (None, SEGMENTS), "fmp4": (INIT, FRAGMENTS), "aac": (None, AAC)}
PAIRS = [(own, insert) for own in HLS_OF for insert in HLS_OF if own != insert]


def inserted(origin: Origin, own: str, insert: str, **more: object) -> Playlist:
    """Six segments of one container, with two of another container after the third."""
    (init, programme), (insert_init, other) = HLS_OF[own], HLS_OF[insert]
    options: dict[str, Any] = {"init": init, "mode": "live", "window": 3, **more}
    playlist = with_insert(origin, "news", programme[:6], insert_init, other[6:8], **options)
    return origin.add(playlist)


def without_tags(body: bytes) -> bytes:
    for tag in (audio[: -len(bare)] for audio, bare in zip(AAC, media.aac_segments(), strict=True)):
        body = body.replace(tag, b"")
    return body


@pytest.mark.parametrize(("own", "insert"), PAIRS)
def test_insert_of_another_container_is_a_gap(
    origin: Origin, serve: Serve, own: str, insert: str
) -> None:
    init, programme = HLS_OF[own]
    news = inserted(origin, own, insert)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    first = (init or b"") + without_tags(b"".join(programme[:3]))
    assert viewer.read(len(first)) == first
    news.advance(2)
    eventually(lambda: gaps(site) == 2, "the insert is counted")
    stream = site.get("/status").json["streams"][0]
    assert stream["state"] == "waiting"
    assert "switched to" in stream["last_error"]
    news.advance(3)
    rest = without_tags(b"".join(programme[3:6]))
    if own == "ts":
        rest = media.spliced(first, rest)[len(first) :]
    elif own == "fmp4":
        rest = INIT + rest
    assert viewer.read(len(rest)) == rest
    assert site.get("/status").json["streams"][0]["state"] == "live"


def test_film_with_an_insert_ends_with_its_final_chunk(origin: Origin, serve: Serve) -> None:
    film = inserted(origin, "ts", "fmp4", mode="vod")
    site = serve({"film": film.url})
    body, is_complete = site.watch("/film").read_all()
    assert body == media.spliced(b"".join(SEGMENTS[:3]), b"".join(SEGMENTS[3:6]))
    assert is_complete
    assert gaps(site) == 2


@pytest.mark.parametrize("insert", ["aac", "fmp4"])
def test_outage_during_an_insert_ends_with_the_insert_at_the_latest(
    origin: Origin, serve: Serve, insert: str
) -> None:
    news = inserted(origin, "ts", insert, listed=3, window=8)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    first = b"".join(SEGMENTS[:3])
    assert viewer.read(len(first)) == first
    news.advance(1)
    eventually(lambda: gaps(site) == 1, "the insert has begun")
    origin.fault(news.path, Status(403))
    loads = origin.count(news.path)
    origin.wait_for(news.path, loads + 2)
    news.advance(1)
    eventually(lambda: gaps(site) == 2, "the rest of the insert is counted")
    news.advance(3)
    rest = media.spliced(first, b"".join(SEGMENTS[3:6]))[len(first) :]
    assert viewer.read(len(rest)) == rest


def test_slate_in_another_container_is_an_outage(origin: Origin, serve: Serve) -> None:
    """Some panels redirect to a slate while they still count the previous connection."""
    news = live(origin, first_sequence=480)
    slate = origin.add(Playlist("slate", FRAGMENTS, mode="live", init=INIT, extension=".m4s"))
    site = serve({"news": news.url}, reconnect=30)
    viewer = site.watch("/news")
    first = news.plain(news.newest - 2, news.newest + 1)
    assert viewer.read(len(first)) == first
    origin.fault(news.path, Status(403))
    shown = origin.fault(news.path, Redirect(slate.url))
    shown.wait()
    news.advance()
    rest = news.plain(news.newest, news.newest + 1)
    assert viewer.read(len(rest)) == rest


def test_channel_ends_if_the_container_does_not_return(origin: Origin, serve: Serve) -> None:
    media_list = [*SEGMENTS[:3], *media.aac_segments()]
    news = live(origin, segments=media_list, window=3, clock=True)
    site = serve({"news": news.url}, reconnect=2)
    body, is_complete = site.watch("/news").read_all()
    assert body == b"".join(SEGMENTS[:3])
    assert not is_complete


#### Segments ####


def test_segment_with_an_empty_answer_is_requested_again(origin: Origin, serve: Serve) -> None:
    film = origin.add(Playlist("film", SEGMENTS))
    empty = origin.fault(film.segment_path(5), Body(b""))
    site = serve({"film": film.url})
    assert site.get("/film").body == film.plain(0, 12)
    assert (empty.taken, gaps(site)) == (1, 0)


def test_wrong_iv_spoils_only_sixteen_bytes_of_each_segment(origin: Origin, serve: Serve) -> None:
    key, iv = b"0123456789abcdef", bytes(range(16))
    news = live(origin, aes_key=key, aes_iv=iv, named_iv=bytes(range(100, 116)))
    viewer = serve({"news": news.url}).watch("/news")
    assert viewer.headers["Content-Type"] == "video/mp2t"
    spoiled = [
        bytes(a ^ b ^ c for a, b, c in zip(s, iv, range(100, 116), strict=False)) + s[16:]
        for s in SEGMENTS
    ]
    wanted = b"".join(spoiled[2:5])
    got = viewer.read(len(wanted))
    assert media.decode(got, strict=False).video_frames > 2 * media.FPS
    assert got == wanted


def test_initialization_section_with_an_empty_answer_is_requested_again(
    origin: Origin, serve: Serve
) -> None:
    init, fragments = media.fmp4()
    news = live(origin, segments=fragments, init=init, extension=".m4s")
    origin.fault(news.init_path, Body(b""))
    assert serve({"news": news.url}).watch("/news").read(len(init)) == init


def test_segment_that_stays_empty_is_a_gap(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    origin.fault(news.segment_path(5), Body(b""), times=None)
    news.advance(2)
    assert viewer.read(media.PACKET)  # from the next segment
    assert gaps(site) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_bytes_in_front_of_each_segment_are_harmless(
    origin: Origin, serve: Serve, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    news = live(origin)
    origin.fault("/news/*.ts", Preface(size * b"\n"), times=None)
    site = serve({"news": news.url})
    listed = site.get("/news.m3u8").body.decode()
    segment = site.get("/" + re.findall(r"news/\d+\.ts", listed)[0]).body
    assert segment.endswith(news.plain(2, 3))
    assert not [record for record in caplog.records if record.exc_info]


def test_unknown_media_has_no_hls(origin: Origin, serve: Serve) -> None:
    news = live(origin, segments=[b"?" * 5000] * 12)
    site = serve({"news": news.url})
    assert site.get("/news.m3u8").status == 404
    assert site.watch("/news").headers["Content-Type"] == "application/octet-stream"


def test_silence_is_filled_after_a_torn_packet(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipe.SILENCE", 0.3)
    torn = [Segment(data + b"G" * 10) for data in SEGMENTS]
    viewer = serve({"news": live(origin, segments=torn).url}).watch("/news")
    viewer.read(sum(len(segment.data) for segment in torn[2:5]))
    assert media.pid(viewer.read(media.PACKET)) == media.PID_NULL


def test_next_try_uses_the_token_of_the_newest_playlist(origin: Origin, serve: Serve) -> None:
    news = live(origin, window=8, target_duration=2)
    news.renew_tokens()
    viewer = serve({"news": news.url}).watch("/news")
    assert viewer.read(len(news.plain(5, 8))) == news.plain(5, 8)
    stalled = origin.fault("/news/8.ts*", Stall(2000), Break(3000))
    news.advance()
    stalled.wait_held()
    news.renew_tokens()
    loads = origin.count(news.path)
    eventually(lambda: origin.count(news.path) > loads + 1, "a playlist with new tokens was loaded")
    stalled.release()
    assert viewer.read(len(news.plain(8, 9))) == news.plain(8, 9)


#### Keys ####


def test_key_that_hangs_is_requested_again(origin: Origin, serve: Serve) -> None:
    news = live(origin, aes_key=bytes(16))
    hung = origin.fault(news.key_path, StallHeaders())
    viewer = serve({"news": news.url}).watch("/news")
    assert viewer.status == 200
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    hung.release()


def test_new_key_at_the_same_address_loses_one_segment(origin: Origin, serve: Serve) -> None:
    news = live(origin, aes_key=bytes(16))
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    news.change_key(bytes(range(16)))
    news.advance(3)
    body = b""
    while news.plain(7, 8) not in body:
        body += viewer.read(media.PACKET)
    # Before it is segment 5, decrypted with the old key.
    start = body.index(news.plain(6, 7)[: media.PACKET])
    whole = body[start : body.index(news.plain(7, 8))]
    assert media.without_notices(whole) == news.plain(6, 7)
    assert gaps(site) == 1


#### Playlists ####


def test_duration_of_a_wrapped_clock_delays_no_reload(origin: Origin, serve: Serve) -> None:
    segments = [Segment(data, WRAP if n == 4 else 1.0) for n, data in enumerate(SEGMENTS)]
    news = live(origin, segments=segments)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    viewer.read(len(news.plain(2, 5)))
    listed = site.get("/news.m3u8").body.decode()
    assert "#EXT-X-TARGETDURATION:1\n" in listed
    news.advance()
    assert viewer.read(len(news.plain(5, 6))) == news.plain(5, 6)


LENGTHS = {
    "none": "",
    "zero": "#EXT-X-TARGETDURATION:0",
    "infinite": "#EXT-X-TARGETDURATION:inf",
    "no-number": "#EXT-X-TARGETDURATION:nan",
    "huge": "#EXT-X-TARGETDURATION:1e30",
}


@pytest.mark.parametrize("line", LENGTHS.values(), ids=LENGTHS)
def test_useless_target_duration_is_replaced(origin: Origin, serve: Serve, line: str) -> None:
    def text(first: int, end: str = "") -> bytes:
        head = ["#EXTM3U", line, f"#EXT-X-MEDIA-SEQUENCE:{first}"]
        entries = [f"#EXTINF:1,\n{n}.ts" for n in range(first, first + 3)]
        return "\n".join([*head, *entries, end]).encode()

    for number, data in enumerate(SEGMENTS[:8]):
        origin.add_file(f"/{number}.ts", data)
    origin.add_file("/news.m3u8", text(0))
    origin.fault("/3.ts", Break(20_000))
    origin.fault("/3.ts", Status(404), times=None)
    site = serve({"news": f"{origin.url}/news.m3u8"})
    viewer = site.watch("/news")
    start = b"".join(SEGMENTS[:3])
    assert viewer.read(len(start)) == start
    assert site.get("/news.m3u8").status == 200
    origin.add_file("/news.m3u8", text(3))
    origin.fault("/news.m3u8", Body(text(5, "#EXT-X-ENDLIST")), times=None)
    body, is_complete = viewer.read_all()
    assert is_complete
    assert body.endswith(SEGMENTS[7])
    assert len(body) % media.PACKET == 0


def test_end_of_an_older_playlist_is_ignored(origin: Origin, serve: Serve) -> None:
    news = live(origin, first_sequence=100)
    viewer = serve({"news": news.url}).watch("/news")
    assert viewer.read(len(news.plain(102, 105))) == news.plain(102, 105)
    old = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:3\n#EXTINF:1,\n3.ts\n"
    cached = origin.fault(news.path, Body(old + b"#EXT-X-ENDLIST\n"))
    cached.wait()
    news.advance()
    assert viewer.read(len(news.plain(105, 106))) == news.plain(105, 106)


@pytest.mark.parametrize("seconds", ["18446744073709551.615", "abc"])
def test_invalid_mark_of_an_advertisement_is_harmless(
    origin: Origin, serve: Serve, seconds: str
) -> None:
    mark = f'#EXT-X-DATERANGE:ID="ad",START-DATE="2026-01-01T00:00:00Z",DURATION={seconds}'
    segments = [Segment(data, tags=(mark,) if n == 5 else ()) for n, data in enumerate(SEGMENTS)]
    news = live(origin, segments=segments)
    viewer = serve({"news": news.url}).watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    news.advance()
    assert viewer.read(len(news.plain(5, 6))) == news.plain(5, 6)


def test_blanks_around_an_address_are_removed(origin: Origin, serve: Serve) -> None:
    origin.add_file("/1.ts", SEGMENTS[0])
    text = b"#EXTM3U \n#EXT-X-TARGETDURATION:1 \n#EXTINF:1, \n 1.ts \n#EXT-X-ENDLIST \n"
    address = origin.add_file("/news.m3u8", text)
    assert serve({"news": address}).get("/news").body == SEGMENTS[0]


#### Tables ####


def with_another_program(segment: bytes) -> Iterator[bytes]:
    """The packets of a segment, with a PAT that first names another program, without packets."""
    for packet in media.packets(segment):
        if media.pid(packet) == 0:
            programs = b"\0\1" + (0xE000 | OTHER_PID).to_bytes(2, "big") + packet[13:17]
            section = b"\0\xb0\x11" + packet[8:13] + programs
            section += crc32(section)
            packet = (packet[:5] + section).ljust(media.PACKET, b"\xff")
        yield packet


def test_viewers_join_the_program_of_a_multiplex_that_has_packets(
    origin: Origin, serve: Serve
) -> None:
    segments = [b"".join(with_another_program(data)) for data in SEGMENTS]
    news = live(origin, segments=segments)
    site = serve({"news": news.url})
    assert site.watch("/news").read(len(segments[2])) == segments[2]
    assert site.watch("/news").read(len(segments[2])) == segments[2]
    assert site.get("/news.m3u8").status == 200


def test_stream_without_tables_continues_after_a_seam(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipe.SEAM_PATIENCE", 1.0)
    bare = [
        b"".join(p for p in media.packets(data) if media.pid(p) not in (0, 0x1000))
        for data in SEGMENTS
    ]
    news = live(origin, segments=[SEGMENTS[0], *bare[1:]], clock=True)
    viewer = serve({"news": news.url}, timeout=1).watch("/news")
    viewer.read(len(SEGMENTS[0]))
    origin.stop()
    news.advance(8)  # the open segment is no longer listed
    origin.start()
    body = b""
    while not any(data in body for data in bare):
        body += viewer.read(media.PACKET)
