"""Segments that arrive more slowly than they play, while others do not.

Everything is real, as in test_download.py. A stuck connection sends 2 KB/s, so that a segment would
take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
from streamlink.stream.hls.hls import HLSStreamWorker

import pipe
from tests import media
from tests.origin import Origin, Playlist, Segment, Stall, Status, Trickle
from tests.server import Site
from tests.test_download import behave, by_origin, requests_for

SEGMENT = 500_000  # bytes, which play for 2 s
SECONDS = 2.0
STUCK = Trickle(2_000)

Serve = Callable[..., Site]


def live(
    origin: Origin, target_duration: int = 2, tags: Mapping[int, str] = MappingProxyType({})
) -> Playlist:
    """A playlist of five segments; a channel starts with the third one.

    `tags` precede the segment of that number, and every eighth segment after it.
    """
    segments = [
        Segment(
            media.padded(data, SEGMENT), SECONDS, tags=(tags[number],) if number in tags else ()
        )
        for number, data in enumerate(media.ts_segments(8))
    ]
    playlist = Playlist("news", segments, mode="live", target_duration=target_duration)
    return origin.add(playlist)


def gaps(site: Site) -> int:
    return site.channels.record("news").counts["gaps"]


@by_origin
def test_rest_of_a_slow_segment_is_requested_again(
    origin: Origin, serve: Serve, conduct: Mapping[str, bool]
) -> None:
    behave(origin, conduct)
    playlist = live(origin)
    path = playlist.segment_path(3)
    origin.fault(path, STUCK)
    site = serve({"news": playlist.url})
    viewer = site.watch("/news")
    origin.wait_for(path, 2)
    expected = playlist.plain(2, 5)
    assert viewer.read(len(expected)) == expected
    first, second = requests_for(origin, path)
    assert first.connection != second.connection
    assert first.sent < SEGMENT / 10
    if not conduct:
        assert second.headers["range"].startswith("bytes=")
        assert second.sent < SEGMENT - pipe.SLOW_TIME * STUCK.rate / 2
    assert gaps(site) == 0


@pytest.mark.long
def test_slow_segment_is_abandoned_when_it_is_no_longer_listed(
    origin: Origin, serve: Serve
) -> None:
    """It is requested more than once, and the other segments play."""
    playlist = live(origin)
    origin.fault(playlist.segment_path(3), STUCK, times=None)
    site = serve({"news": playlist.url}, threads=2)
    viewer = site.watch("/news")
    start = playlist.plain(2, 3)
    assert viewer.read(len(start)) == start
    loads = origin.count(playlist.path)
    playlist.advance(2)
    origin.wait_for(playlist.path, loads + 1)  # the playlist now begins with segment 2
    origin.wait_for(playlist.segment_path(3), 2)
    playlist.advance(2)
    playlist.end()
    body, is_complete = viewer.read_all()
    assert is_complete
    rest = playlist.plain(4, 9)
    notices = sum(map(media.is_notice, media.packets(body))) * media.PACKET
    kept = body[: -len(rest) - notices]
    parts = playlist.plain(4, 8), playlist.plain(8, 9)  # the media repeats from segment 8
    assert start + body == media.spliced(start + kept, *parts)
    assert playlist.plain(3, 4).startswith(kept)
    assert len(kept) < SEGMENT / 10
    assert gaps(site) == 1


def test_playlist_is_reloaded_while_all_slots_are_full(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that leaves the playlist while it waits in line is still requested once.

    It is a gap only if it needs a new initialization section, which is probably gone.  A segment is
    tried for two target durations, a minute.
    """
    wait = HLSStreamWorker.wait
    monkeypatch.setattr(HLSStreamWorker, "wait", lambda worker, time: wait(worker, time / 5))
    origin.add_file("/news/init.ts", pipe.NULL_PACKET)
    maps = {0: '#EXT-X-MAP:URI="init.ts"', 5: '#EXT-X-MAP:URI="gone.ts"'}
    playlist = live(origin, target_duration=30, tags=maps)
    stuck = origin.fault(playlist.segment_path(2), Stall(at=188 * 1000))
    options = {"hls-playlist-reload-time": "segment"}
    site = serve({"news": playlist.url}, threads=1, timeout=60, streamlink=options)
    viewer = site.watch("/news")
    stuck.wait_held()
    for _ in range(4):
        loads = origin.count(playlist.path)
        playlist.advance(2)
        origin.wait_for(playlist.path, loads + 2)
    stuck.release()
    playlist.end()
    body, is_complete = viewer.read_all()
    assert is_complete
    kept = playlist.plain(2, 5), playlist.plain(8, 13)  # 5, 6 and 7 need a new section
    assert body == media.spliced(*(pipe.NULL_PACKET + part for part in kept))
    assert gaps(site) == 3


def test_segment_that_left_the_playlist_while_it_waited_is_requested_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one thread and a short playlist. If the segment is refused, it is a gap at once."""
    wait = HLSStreamWorker.wait
    monkeypatch.setattr(HLSStreamWorker, "wait", lambda worker, time: wait(worker, time / 5))
    playlist = live(origin, target_duration=30)
    stuck = origin.fault(playlist.segment_path(2), Stall(at=188 * 1000))
    gone = origin.fault(playlist.segment_path(5), Status(404), times=None)
    options = {"hls-playlist-reload-time": "segment"}
    site = serve({"news": playlist.url}, threads=1, timeout=60, streamlink=options)
    viewer = site.watch("/news")
    stuck.wait_held()
    for _ in range(4):
        loads = origin.count(playlist.path)
        playlist.advance(1)
        origin.wait_for(playlist.path, loads + 2)
    playlist.advance(2)  # the playlist begins with segment 6
    playlist.end()
    loads = origin.count(playlist.path)
    origin.wait_for(playlist.path, loads + 1)
    stuck.release()
    body, is_complete = viewer.read_all()
    parts = playlist.plain(2, 5), playlist.plain(6, 8), playlist.plain(8, 11)
    assert (body, is_complete) == (media.spliced(*parts), True)
    assert (gaps(site), gone.taken) == (1, 1)
