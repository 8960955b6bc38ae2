"""Intervals between loads of a live playlist, and segments that are lost between two loads.

Everything is real and tested from outside: origins that advance by the clock, and viewers' bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist, Segment, misstated
from tests.server import Site

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(30)
LONG_SEGMENTS = [Segment(data, 2.0) for data in media.ts_segments(10, 2.0)]

# Segments, number of listed segments, target duration, and number of segments that a viewer gets.
CASES: dict[str, tuple[Sequence[bytes | Segment], int, int, int]] = {
    "long target": (SEGMENTS, 6, 10, 16),
    "one segment": (LONG_SEGMENTS, 1, 6, 6),
    "two segments": (SEGMENTS, 2, 5, 10),
    "durations too short": (misstated(SEGMENTS, 0.1), 3, 1, 8),
    "durations of zero": (misstated(SEGMENTS, 0.0), 3, 10, 14),
    "durations a little long": (misstated(SEGMENTS, 2.5), 5, 10, 14),
}


def live(origin: Origin, segments: Sequence[bytes | Segment], **more: Any) -> Playlist:
    return origin.add(Playlist("news", segments, mode="live", clock=True, **more))


def gaps(site: Site) -> int:
    return int(site.get("/status").json["streams"][0]["gaps"])


def assert_calm(origin: Origin, playlist: Playlist) -> None:
    """Assert that the playlist is not loaded more often than twice a second."""
    times = [request.time for request in origin.requests if request.path == playlist.path]
    assert len(times) <= 3 + (times[-1] - times[0]) / 0.5


@pytest.mark.long
@pytest.mark.parametrize(("segments", "window", "target", "count"), CASES.values(), ids=list(CASES))
def test_no_segment_is_lost_between_two_loads(
    origin: Origin,
    serve: Serve,
    segments: Sequence[bytes | Segment],
    window: int,
    target: int,
    count: int,
) -> None:
    news = live(origin, segments, window=window, target_duration=target)
    first = max(0, window - 3)
    site = serve({"news": news.url}, timeout=8)
    viewer = site.watch("/news")
    expected = news.plain(first, first + count)
    assert viewer.read(len(expected)) == expected
    assert gaps(site) == 0
    assert_calm(origin, news)


@pytest.mark.long
def test_low_latency_playlist_is_played_in_whole_segments(origin: Origin, serve: Serve) -> None:
    news = live(origin, SEGMENTS, window=4, target_duration=4, low_latency=True)
    site = serve({"news": news.url}, timeout=8)
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(1, 10))) == news.plain(1, 10)
    assert (gaps(site), origin.count("*.part.ts"), origin.count("*_HLS*")) == (0, 0, 0)
    assert_calm(origin, news)


@pytest.mark.long
def test_skipped_segments_are_counted_and_the_interval_shrinks(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """The playlist states eight times the true durations, so the first intervals are too long."""
    news = live(origin, misstated(SEGMENTS, 8.0), window=4)
    site = serve({"news": news.url}, timeout=20)
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(1, 4))) == news.plain(1, 4)
    origin.wait_for(news.path, 6, timeout=25)
    loads = [request.time for request in origin.requests if request.path == news.path]
    intervals = [later - earlier for earlier, later in itertools.pairwise(loads)]
    # The interval is halved at least once; a timer may be late by milliseconds.
    assert intervals[-1] < intervals[0] * 0.6
    lost = gaps(site)
    assert lost >= 3
    lines = [re.search(r"news: (\d+) segments? lost", line) for line in caplog.messages]
    assert sum(int(line[1]) for line in lines if line) == lost


def skip_seven(serve: Serve, news: Playlist) -> Site:
    """A server with a viewer whose channel loads no playlist while seven segments are listed."""
    site = serve({"news": news.url}, timeout=8)
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(0, 3))) == news.plain(0, 3)
    news.advance(7)
    assert viewer.read(media.PACKET)
    return site


def test_skip_in_a_running_channel_is_counted_and_logged(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    site = skip_seven(serve, origin.add(Playlist("news", SEGMENTS, mode="live", window=3, keep=0)))
    assert gaps(site) == 4
    assert "news: 4 segments lost between two loads of the playlist" in caplog.messages
    assert site.get("/status").json["streams"][0]["state"] == "live"


def test_losses_without_end_do_not_stop_the_loads(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loss doubles the divisor of the interval, which once became too large for a float."""
    monkeypatch.setattr(pipe.WatchedWorker, "_interval_divisor", 2**1023)
    site = skip_seven(serve, origin.add(Playlist("news", SEGMENTS, mode="live", window=3, keep=0)))
    stream = site.get("/status").json["streams"][0]
    assert (stream["state"], stream["last_error"]) == ("live", None)


def test_segments_lost_before_a_marked_gap_are_counted(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """The marked gap is counted as well."""
    marked = [
        Segment(data, tags=("#EXT-X-GAP",) if n == 7 else ()) for n, data in enumerate(SEGMENTS)
    ]
    site = skip_seven(serve, origin.add(Playlist("news", marked, mode="live", window=3, keep=0)))
    assert gaps(site) == 5
    assert "news: 4 segments lost between two loads of the playlist" in caplog.messages


def test_configured_interval_takes_precedence(origin: Origin, serve: Serve) -> None:
    news = origin.add(Playlist("news", SEGMENTS, mode="live", window=1, target_duration=6))
    options = {"hls-playlist-reload-time": 3}
    viewer = serve({"news": news.url}, timeout=8, streamlink=options).watch("/news")
    assert viewer.read(len(news.plain(0, 1))) == news.plain(0, 1)
    loads = [request.time for request in origin.requests if request.path == news.path]
    news.advance()
    assert viewer.read(len(news.plain(1, 2))) == news.plain(1, 2)
    later = [request.time for request in origin.requests if request.path == news.path]
    assert len(later) == len(loads) + 1
    assert later[-1] - loads[-1] > 2.5
