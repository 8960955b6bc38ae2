"""A small run of tests/bench.py, which fails if the speed drops by a factor of two.

No bound is an absolute time. Counts are exact. Times are ratios to other times of the same run,
such as those of streamlink or bare threads. Each bound is about twice the measured ratio, or more;
the measured ratio is in parentheses.
"""

from __future__ import annotations

import pytest

from tests import bench, peers

pytestmark = pytest.mark.long

PLAN = bench.QUICK
VIEWERS = 100
SECONDS = 8.0  # two segments


def test_film_is_pulled_faster_than_by_streamlink() -> None:
    with (
        peers.origin(PLAN.segments, slow=True) as slow,
        peers.origin(PLAN.fast_segments, slow=False) as fast,
    ):
        ours = bench.film_of_streampipe(PLAN, slow, fast)
        stock = bench.film_of_streamlink(slow, fast)
    assert ours.requests == 2 + PLAN.segments, "not two playlists and each segment once"
    assert ours.first < 0.3 * stock.first, "the first byte waits for a whole segment (0.15)"
    assert ours.total < 1.4 * stock.total, "segments are not fetched in parallel (0.99)"
    assert ours.cpu < 0.6 * stock.cpu, "too much CPU time for each byte (0.3)"


def test_crowd_costs_little_more_than_bare_threads() -> None:
    with peers.origin(1, slow=False) as source:
        with peers.streampipe(source) as server:
            one = bench.watch_crowd(server, source, 1, SECONDS)
        with peers.streampipe(source) as server:
            many = bench.watch_crowd(server, source, VIEWERS, SECONDS)
    assert many.skips == 0
    assert many.requests <= one.requests + 60 / SECONDS * 2, (
        "more than one further segment and playlist"
    )
    assert many.threads - one.threads <= VIEWERS + 1, (
        "more than a thread for each viewer and one that leaves"
    )
    assert (many.memory - one.memory) / VIEWERS < 200_000, "too many bytes for each viewer"
    assert many.cpu < 4 * bench.bare_cpu(VIEWERS, PLAN.bare_bytes), (
        "too much CPU time for each byte (2)"
    )


def test_polling_client_costs_little_more_than_a_viewer() -> None:
    with peers.origin(1, slow=False) as source:
        with peers.streampipe(source) as server:
            streaming = bench.watch_crowd(server, source, VIEWERS, SECONDS)
        with peers.streampipe(source) as server:
            polling = bench.polling_cpu(server, VIEWERS, SECONDS)
    assert polling < 3 * streaming.cpu, "its requests cost too much (1.8)"


def test_long_list_costs_little() -> None:
    """A list with a quarter of the channels in README's table."""
    found = bench.measure_list(2000, 20)
    assert (found.lost, found.starved) == (0, 0)
    assert found.memory < 150_000_000
    assert found.playlist < found.answer, "slower than a start (0.1)"
    assert found.reload < 4 * found.answer, "slower than four starts (0.5)"
