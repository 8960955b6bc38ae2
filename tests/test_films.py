"""Films: sources with an end, whose viewer pauses, and whose origin goes away in between.

A film is whole or says that it is not: nothing of it is given up because its origin was away or its
addresses expired. Everything is real, as in test_download.py; what a viewer gets is compared byte
for byte.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import media
from tests.origin import Origin, Playlist, Status
from tests.server import Site, Watch
from tests.threads import Task

MIB = 1 << 20
SEGMENTS = 10

Serve = Callable[..., Site]


def film(*sizes: int) -> Playlist:
    """Segments of these sizes, over and over."""
    segments = media.ts_segments(SEGMENTS)
    padded = [media.padded(data, sizes[n % len(sizes)]) for n, data in enumerate(segments)]
    return Playlist("film", padded)


def assert_whole(site: Site, viewer: Watch, expected: bytes) -> None:
    assert viewer.read_all() == (expected, True)
    assert site.channels.record("film").counts["gaps"] == 0


#### The origin goes away ####


@pytest.mark.long
def test_graceful_stop_of_the_origin_costs_nothing(origin: Origin, serve: Serve) -> None:
    """Transfers that run go on to their ends, and new connections are refused meanwhile.

    Segment 3 is asked for 0.6 s after the stop and tried for 2 s. Segment 4 is asked for later,
    and still tried for when the origin is back, before segment 2 has ended.
    """
    playlist = origin.add(film(200_000, 60_000, 600_000, 30_000))
    origin.rate = 100_000
    site = serve({"film": playlist.url}, timeout=2, threads=3)
    playing = Task(site.watch("/film").read_all)
    origin.wait_for(playlist.segment_path(2))
    origin.drain()

    def sent_of_segment_2() -> int:
        return next(r.sent for r in origin.requests if r.path == playlist.segment_path(2))

    origin.wait_until(lambda: sent_of_segment_2() >= 330_000, "3.3 s")
    origin.start()
    assert playing.result() == (playlist.plain(0, SEGMENTS), True)
    assert site.channels.record("film").counts["gaps"] == 0


#### Addresses expire ####


def paused(origin: Origin, site: Site) -> Watch:
    """A viewer that has stopped reading, and an upstream that has stopped asking."""
    viewer = site.watch("/film")
    seen = -1
    while seen != (seen := origin.count("*.ts")):
        with pytest.raises(AssertionError):
            origin.wait_for("*.ts", seen + 100, timeout=0.5)
    assert seen < SEGMENTS
    return viewer


@pytest.mark.parametrize("status", [401, 403, 404, 410])
@pytest.mark.parametrize("threads", [1, 4])
def test_film_goes_on_where_its_addresses_expired(
    origin: Origin, serve: Serve, status: int, threads: int
) -> None:
    playlist = origin.add(film(3 * MIB))
    playlist.renew_tokens()
    site = serve({"film": playlist.url}, threads=threads, timeout=2, ringbuffer_size=262_144)
    viewer = paused(origin, site)
    playlist.renew_tokens(status)
    assert_whole(site, viewer, playlist.plain(0, SEGMENTS))
    assert origin.count(playlist.path) == 2


@pytest.mark.parametrize("missing", [(3,), (9,), (4, 5)], ids=["one", "last", "two"])
def test_segments_that_are_missing_beside_good_ones_are_gaps(
    origin: Origin, serve: Serve, missing: tuple[int, ...]
) -> None:
    playlist = origin.add(film(30_000))
    for number in missing:
        origin.fault(playlist.segment_path(number), Status(404), times=None)
    site = serve({"film": playlist.url}, timeout=1)
    left = [playlist.plain(n, n + 1) for n in range(SEGMENTS) if n not in missing]
    answer = site.get("/film")
    assert (answer.body, answer.is_complete) == (b"".join(left), True)
    assert site.channels.record("film").counts["gaps"] == len(missing)


def test_film_that_is_refused_from_the_start_says_so(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(film(30_000))
    origin.fault("*.ts", Status(403), times=None)
    answer = serve({"film": playlist.url}).get("/film")
    assert (answer.status, answer.json) == (502, {"error": "the origin answered 403"})
