"""Outages of a running channel: real origins, streamlink, StreamPipe and sockets.

Time limits are those of the program, except the pauses before reopening and those a test shortens.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import pipe
from tests import media
from tests.make_test_card import crc32
from tests.origin import (
    Answer,
    Body,
    Close,
    Edit,
    Origin,
    Playlist,
    StallHeaders,
    Status,
    Think,
    master,
    misstated,
)
from tests.program import eventually
from tests.server import BROWSER, Site, Watch
from tests.test_faults import delayed, without_nulls

Serve = Callable[..., Site]
SEGMENTS = 12  # of one timeline, a second each
HALF_A_MINUTE = 30 * 90_000  # ticks
HOUR = 3600 * 90_000  # ticks


@pytest.fixture
def backup() -> Iterator[Origin]:
    """A second origin."""
    with Origin() as running:
        yield running


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """Returns StreamPipe's log lines from level INFO up that match a pattern."""
    caplog.set_level(logging.INFO, "streampipe")

    def matching(pattern: str) -> list[str]:
        found = (record.getMessage() for record in caplog.records if record.levelno >= 20)
        return [message for message in found if re.search(pattern, message)]

    return matching


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.1, 0.2))


def live(name: str = "news", **options: Any) -> Playlist:
    """A live channel. A test adds each new segment with advance()."""
    return Playlist(name, media.ts_segments(SEGMENTS), mode="live", **options)


def segments(first: int, stop: int) -> bytes:
    return b"".join(media.ts_segments(SEGMENTS)[first:stop])


def relay(origin: Origin, bodies: Sequence[bytes]) -> str:
    """A raw live stream: each connection gets the next of these bodies, and is closed after it."""
    left = itertools.chain(bodies, itertools.repeat(bodies[-1]))
    return f"httpstream://{origin.add_endless('/relay', lambda: [next(left)])}"


def read_stream(viewer: Watch, size: int) -> bytes:
    """Read so many bytes of the origin's media, without packets that signal discontinuities."""
    data = b""
    while len(data) < size:
        data += media.without_notices(viewer.read(media.PACKET))
    return data


def status(site: Site) -> Any:
    return site.get("/status").json["streams"][0]


#### A relay never truly ends ####


@pytest.mark.parametrize(
    "answer",
    [Body(b""), Body(segments(0, 2), "video/mp2t")],
    ids=["nothing, with a length", "a clip that viewers have had, with a length"],
)
def test_live_relay_does_not_end_after_a_body_with_a_length(
    origin: Origin, serve: Serve, answer: Body
) -> None:
    address = relay(origin, [segments(0, 4), segments(4, 8)])
    viewer = serve({"news": address}, timeout=5).watch("/news")
    refused = origin.fault("/relay", answer, times=2)
    start = read_stream(viewer, len(segments(0, 8)))
    assert start == segments(0, 8)
    assert refused.taken == 2


#### A quality that is missing for a while ####


@pytest.mark.parametrize("query", ["?quality=720p", ""], ids=["asked for", "configured"])
def test_reopened_channel_waits_for_its_quality(origin: Origin, serve: Serve, query: str) -> None:
    """A transcoder starts one rendition after the other."""
    small, large = live("small"), live("large")
    all_of_it = origin.add(master("all", {"360p": small, "720p": large}))
    stream = {"url": all_of_it.url, "quality": "720p"}
    site = serve({"news": all_of_it.url if query else stream}, timeout=5)
    viewer = site.watch(f"/news{query}")
    assert viewer.read(len(segments(2, 5))) == segments(2, 5)
    half = master("all", {"360p": small})
    half.attach(origin)
    content = half.find(half.path)
    assert content
    lacking = origin.fault(all_of_it.path, Body(content.body), times=2)
    origin.fault(large.path, Status(404))  # the address has expired: it is resolved again
    large.advance()
    assert read_stream(viewer, len(segments(5, 6))) == segments(5, 6)
    assert lacking.taken == 2


#### A dead origin with a backup ####


@pytest.mark.long
@pytest.mark.parametrize("seconds", [1, 2])
def test_backup_takes_over_after_two_target_durations_of_failures(
    origin: Origin, serve: Serve, backup: Origin, seconds: int
) -> None:
    """The backup does not wait for `timeout`, which is much longer here."""
    media_segments = media.ts_segments(SEGMENTS, float(seconds))
    channels = [Playlist("news", media_segments, mode="live") for _ in range(2)]
    first, second = origin.add(channels[0]), backup.add(channels[1])
    site = serve({"news": {"url": [first.url, second.url]}}, timeout=600, reconnect=600)
    viewer = site.watch("/news")
    start = b"".join(media_segments[2:5])
    assert viewer.read(len(start)) == start
    origin.stop()
    second.advance()
    assert read_stream(viewer, len(media_segments[5])) == media_segments[5]


#### Status and log ####


def test_failed_reload_appears_in_the_status_at_once(
    origin: Origin, serve: Serve, lines: Callable[[str], list[str]]
) -> None:
    news = origin.add(live(target_duration=1))
    site = serve({"news": news.url}, timeout=30)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(2, 5))) == segments(2, 5)
    assert (status(site)["state"], status(site)["last_error"]) == ("live", None)
    origin.fault(news.path, Status(503), times=None)
    eventually(lambda: status(site)["state"] == "waiting", "the status shows the failed reload")
    assert status(site)["last_error"] == "the origin answered 503"
    page = re.sub(r"<[^>]*>", "", site.get("/", Accept=BROWSER).body.decode())
    assert re.search(r"waiting for \d+\ss, gives up in \d+\ss\sthe origin answered 503", page)
    assert status(site)["viewers"] == 1
    eventually(lambda: origin.count(news.path) >= 4, "the playlist is loaded again")
    assert lines(r"1 of 1 ") == ["news: address 1 of 1 (127.0.0.1): the origin answered 503"]


def test_failed_start_writes_one_log_line(
    origin: Origin, serve: Serve, lines: Callable[[str], list[str]]
) -> None:
    origin.fault("/bad.m3u8", Status(503), times=None)
    names = {"480p": origin.add(live())}
    streams = {"bad": f"{origin.url}/bad.m3u8", "two": origin.add(master("two", names)).url}
    site = serve(streams, timeout=5)
    assert site.get("/bad").status == 502
    assert site.get("/two?quality=4k").status == 404
    eventually(
        lambda: not any(t.name.startswith("feed-") for t in threading.enumerate()),
        "the channels end",
    )
    assert lines("^bad: ") == ["bad: address 1 of 1 (127.0.0.1): the origin answered 503"]
    assert lines("^two: ") == ["two: not started: no such quality; available: 480p"]


def test_short_outage_writes_two_log_lines_with_the_lost_segments(
    origin: Origin, serve: Serve, lines: Callable[[str], list[str]]
) -> None:
    news = origin.add(live(window=3, listed=3, keep=0))
    site = serve({"news": news.url}, timeout=30)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 3))) == segments(0, 3)
    down = origin.fault(news.path, Close(), times=3)
    eventually(lambda: down.taken == 3, "three loads have failed")
    news.advance(6)  # segments 3, 4 and 5 have left the playlist
    assert read_stream(viewer, len(segments(6, 7))) == segments(6, 7)
    eventually(lambda: status(site)["state"] == "live", "the channel recovers")
    told = [
        line
        for line in lines("^news: ")
        if "started watching" not in line and "video/mp2t" not in line
    ]
    assert len(told) == 2, told
    assert re.fullmatch(r"news: address 1 of 1 \(127\.0\.0\.1\): .+", told[0])
    assert re.fullmatch(r"news: recovered after \d+\.\d s; 3 segments lost", told[1])
    assert status(site)["gaps"] == 3
    assert status(site)["last_error"]


def test_single_failed_reload_appears_in_the_status_and_disappears(
    origin: Origin, serve: Serve, lines: Callable[[str], list[str]]
) -> None:
    news = origin.add(live(target_duration=1))
    site = serve({"news": news.url}, timeout=30)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(2, 5))) == segments(2, 5)
    for number in (5, 6):
        origin.wait_for(news.path, origin.count(news.path) + 1)
        origin.fault(news.path, Status(503))  # for the next reload
        eventually(lambda: status(site)["state"] == "waiting", "the status shows the failure")
        assert status(site)["last_error"] == "the origin answered 503"
        news.advance()
        assert viewer.read(len(segments(number, number + 1))) == segments(number, number + 1)
        eventually(lambda: status(site)["state"] == "live", "the status is live again")
    told = [re.sub(r"[\d.]+ s", "N s", line) for line in lines("1 of 1 |recovered")]
    assert told == 2 * [
        "news: address 1 of 1 (127.0.0.1): the origin answered 503",
        "news: recovered after N s",
    ]


def test_segments_lost_between_two_reloads_are_logged(
    origin: Origin, serve: Serve, lines: Callable[[str], list[str]]
) -> None:
    """The origin always answers, but segments leave its playlist too soon."""
    news = origin.add(live(window=3, listed=3, keep=0))
    site = serve({"news": news.url}, timeout=30)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 3))) == segments(0, 3)
    news.advance(5)  # segments 3 and 4 have left the playlist
    assert read_stream(viewer, len(segments(5, 8))) == segments(5, 8)
    eventually(lambda: bool(lines("lost")), "the log names the lost segments")
    assert lines("lost") == ["news: 2 segments lost between two loads of the playlist"]
    assert (status(site)["gaps"], status(site)["state"]) == (2, "live")
    down = origin.fault(news.path, Close(), times=2)
    eventually(lambda: down.taken == 2, "two loads have failed")
    news.advance()
    assert read_stream(viewer, len(segments(8, 9))) == segments(8, 9)
    eventually(lambda: bool(lines("recovered after [0-9]")), "the channel recovers")
    assert lines("lost") == ["news: 2 segments lost between two loads of the playlist"], (
        "no segment was lost in the outage"
    )


@pytest.mark.parametrize(
    ("seconds", "missing"), [pytest.param(0.0, 9, id="zero"), pytest.param(2.0, 40, id="long")]
)
def test_count_of_lost_segments_does_not_depend_on_stated_durations(
    origin: Origin,
    serve: Serve,
    lines: Callable[[str], list[str]],
    seconds: float,
    missing: int,
) -> None:
    """The playlist says at most 10 s, and 0 or 2 s for each segment; actually they last 1 s."""
    media_segments = misstated(media.ts_segments(SEGMENTS), seconds)
    options: dict[str, Any] = {"mode": "live", "window": 3, "target_duration": 10, "keep": 0}
    news = origin.add(Playlist("news", media_segments, **options))
    site = serve({"news": news.url}, timeout=30)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(0, 3))) == segments(0, 3)
    news.advance(2)
    assert read_stream(viewer, len(segments(3, 5))) == segments(3, 5)
    down = origin.fault(news.path, Close(), times=2)
    eventually(lambda: down.taken == 2, "two loads have failed")
    news.advance(missing + 3)
    read_stream(viewer, media.PACKET)
    eventually(lambda: bool(lines("recovered after [0-9]")), "the channel recovers")
    assert status(site)["gaps"] == missing
    assert lines("recovered after [0-9]")[0].endswith(f"; {missing} segments lost")


def test_switch_to_a_backup_with_other_numbers_counts_no_gaps(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    """A backup with other numbers does not count as a gap."""
    first, second = origin.add(live()), backup.add(live(first_sequence=5000))
    site = serve({"news": {"url": [first.url, second.url]}}, timeout=5)
    viewer = site.watch("/news")
    assert viewer.read(len(segments(2, 5))) == segments(2, 5)
    origin.fault(first.path, Status(404), times=None)
    read_stream(viewer, len(segments(0, 1)))
    assert status(site)["gaps"] == 0
    assert status(site)["restarts"] == 1


#### Reopened relays without key frames, or with another clock ####


def test_relay_without_key_frames_continues_after_a_while(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With intra refresh, only the first picture is a key frame."""
    monkeypatch.setattr(pipe, "SEAM_PATIENCE", 1.0)
    (whole,) = media.ts_segments(1, 10.0)
    cut = len(whole) // 2 // media.PACKET * media.PACKET
    rest = whole[:940] + whole[cut:]  # its tables first

    def trickle() -> Iterator[bytes]:
        for packet in itertools.cycle(media.packets(rest)):
            yield packet
            time.sleep(0.002)

    bodies = iter([iter([whole[:cut]])])
    address = origin.add_endless("/relay", lambda: next(bodies, trickle()))
    site = serve({"news": f"httpstream://{address}"}, timeout=5)
    viewer = site.watch("/news")
    assert viewer.read(cut) == whole[:cut]
    eventually(
        lambda: status(site)["state"] == "waiting",
        "the relay was reopened, and nothing is passed on yet",
    )
    data = read_stream(viewer, 100 * media.PACKET)
    assert set(map(media.pid, media.packets(data))) - {media.PID_NULL} > {0}
    eventually(lambda: status(site)["state"] == "live", "media is passed on again")


def test_clock_that_jumped_back_by_an_hour_is_accepted_at_once(
    origin: Origin, serve: Serve
) -> None:
    later = delayed(segments(0, 4), HOUR)
    viewer = serve({"news": relay(origin, [later, segments(4, 8)])}, timeout=5).watch("/news")
    assert viewer.read(len(later)) == later
    assert read_stream(viewer, len(segments(4, 8))) == segments(4, 8)


def test_clock_that_jumped_back_by_less_than_a_minute_is_accepted_after_ten_seconds(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slate may have any clock; but within ten seconds the media may be a backlog."""
    assert pipe.SEAM_PATIENCE == 10.0
    monkeypatch.setattr(pipe, "SEAM_PATIENCE", 1.0)
    slate = delayed(segments(0, 4), HALF_A_MINUTE)

    def trickle() -> Iterator[bytes]:
        for packet in media.packets(segments(4, SEGMENTS)):
            yield packet
            time.sleep(0.002)

    bodies = iter([iter([slate])])
    address = origin.add_endless("/relay", lambda: next(bodies, trickle()))
    viewer = serve({"news": f"httpstream://{address}"}, timeout=5).watch("/news")
    assert viewer.read(len(slate)) == slate
    data = read_stream(viewer, 100 * media.PACKET)
    assert data[20 * media.PACKET :] in segments(4, SEGMENTS)


def test_two_seams_in_a_row_repeat_nothing(origin: Origin, serve: Serve) -> None:
    """The second opening breaks off before it delivers new media."""
    address = relay(origin, [segments(0, 5), segments(1, 4), segments(2, 10)])
    viewer = serve({"news": address}, timeout=5).watch("/news")
    assert read_stream(viewer, len(segments(0, 10))) == segments(0, 10)
    assert origin.count("/relay") >= 3


#### Late viewers ####


def with_video_in_its_pmt(segment: bytes) -> bytes:
    """Sound with a PMT that also names a video stream, which has no packets."""
    pmt = next(p for p in media.packets(segment) if media.pid(p) == 0x1000)
    section = bytearray(pmt[5 : 5 + 3 + ((pmt[6] & 0x0F) << 8 | pmt[7])])
    section[-4:-4] = bytes([0x1B, 0xE1, 0x10, 0xF0, 0x00])  # H.264 at PID 0x110
    section[2] += 5
    body = bytes(section[:-4])
    whole = body + crc32(body)
    packet = pmt[:5] + whole + b"\xff" * (183 - len(whole))
    return segment.replace(pmt, packet)


@pytest.mark.parametrize("has_segments", [True, False], ids=["hls", "relay"])
def test_late_viewer_can_join_radio_with_video_in_its_pmt(
    origin: Origin, serve: Serve, has_segments: bool
) -> None:
    sound = [with_video_in_its_pmt(segment) for segment in media.audio_only_segments(SEGMENTS)]
    playlist = origin.add(Playlist("radio", sound, mode="live", window=10))
    if has_segments:
        address = playlist.url
    else:
        origin.rate = 40_000
        address = f"httpstream://{origin.add_endless('/radio', lambda: itertools.cycle(sound))}"
    site = serve({"radio": address}, timeout=8)
    first = site.watch("/radio")
    playlist.advance(2)  # after three seconds without video the framer expects none
    got = first.read(len(sound[0]) * 5)
    assert media.decode(got, strict=False).audio_frames
    late = site.watch("/radio")
    assert late.status == 200
    assert media.decode(late.read(len(sound[0])), strict=False).audio_frames


def test_late_viewer_can_join_after_packed_audio_failed_over_to_a_relay(
    origin: Origin, serve: Serve, backup: Origin
) -> None:
    sound = media.aac_segments(SEGMENTS)
    news = origin.add(Playlist("radio", sound, mode="live", extension=".aac"))
    backup.rate = 20_000
    spare = backup.add_endless("/radio", lambda: itertools.cycle(sound))
    urls = [news.url, f"httpstream://{spare}"]
    site = serve({"radio": {"url": urls, "ringbuffer_size": 262_144}}, timeout=5)
    first = site.watch("/radio")
    first.read(10_000)
    origin.fault(news.path, Status(404), times=None)
    eventually(lambda: status(site)["restarts"] == 1, "the backup has taken over")
    first.read(300_000)  # no segment is left in the window
    with site.watch("/radio") as late:
        assert late.status == 200
        assert late.read(5_000) in 2 * b"".join(sound)


#### Requests that are never answered, and addresses that expire soon ####


@pytest.mark.long
def test_playlist_request_that_is_never_answered_costs_nothing(
    origin: Origin, serve: Serve
) -> None:
    """`timeout` is 20 s, which is longer than the origin keeps a segment listed."""
    news = origin.add(Playlist("news", media.ts_segments(30), mode="live", window=8, clock=True))
    site = serve({"news": news.url}, timeout=20)
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(5, 8))) == news.plain(5, 8)
    origin.fault(news.path, StallHeaders()).wait_held()
    wanted = news.plain(8, 20)
    assert without_nulls(viewer, len(wanted)) == wanted


@pytest.mark.long
def test_slow_playlists_are_awaited(origin: Origin, serve: Serve) -> None:
    """Each answer takes longer than a reload's first time-out."""
    news = origin.add(Playlist("news", media.ts_segments(40), mode="live", window=16, clock=True))
    site = serve({"news": news.url}, timeout=20)
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(13, 16))) == news.plain(13, 16)
    origin.habit(news.path, Think(pipe.LEAST_PLAYLIST_TIME + 1))
    wanted = news.plain(16, 36)
    assert without_nulls(viewer, len(wanted)) == wanted
    assert site.get("/status").json["streams"][0]["restarts"] == 0


class Sessions:
    """A master playlist names a new address each time, which is valid for some seconds."""

    def __init__(self, origin: Origin, seconds: float, playlist: Playlist) -> None:
        self._seconds = seconds
        self._begun: list[float] = []
        self.master = origin.add(master("all", {"720p": origin.add(playlist)}))
        origin.habit(self.master.path, self)
        origin.habit(playlist.path, self)

    def apply(self, answer: Answer) -> None:
        path, _, number = answer.path.partition("?s=")
        if path == self.master.path:
            Edit(r"index\.m3u8", f"index.m3u8?s={len(self._begun)}").apply(answer)
            self._begun.append(time.monotonic())
        elif time.monotonic() - self._begun[int(number)] > self._seconds:
            Status(403).apply(answer)


@pytest.mark.long
def test_addresses_that_expire_soon_do_not_lengthen_the_pauses(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.3, 3600.0))
    news = Playlist("news", media.ts_segments(30), mode="live", window=6, clock=True)
    sessions = Sessions(origin, 6.0, news)
    site = serve({"news": sessions.master.url})
    viewer = site.watch("/news")
    wanted = news.plain(3, 22)
    assert viewer.read(len(wanted)) == wanted
    assert origin.count(sessions.master.path) >= 3
