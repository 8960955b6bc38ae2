"""A small run of tests/bench.py: a loss of speed by a factor of two fails here.

Nothing is held against the clock. Counts are exact; times are ratios to what streamlink or bare
threads took in the same run, with bounds of about twice what was measured.
"""

from __future__ import annotations

import pytest

from tests import bench, peers

pytestmark = pytest.mark.long

PLAN = bench.QUICK
VIEWERS = 100
SECONDS = 8.0  # two segments


def test_a_film_is_pulled_faster_than_by_streamlink() -> None:
    with (
        peers.origin(PLAN.segments, slow=True) as slow,
        peers.origin(PLAN.fast_segments, slow=False) as fast,
    ):
        ours = bench.film_of_streampipe(PLAN, slow, fast)
        stock = bench.film_of_streamlink(slow, fast)
    assert ours.requests == 2 + PLAN.segments, "two playlists, and each segment once"
    assert ours.first < 0.3 * stock.first, "as it arrives, not once a segment is whole (0.15)"
    assert ours.total < 1.4 * stock.total, "segments in parallel (0.99)"
    assert ours.cpu < 0.6 * stock.cpu, "CPU for each byte (0.3)"


def test_a_crowd_costs_little_more_than_bare_threads() -> None:
    with peers.origin(1, slow=False) as source:
        with peers.streampipe(source) as server:
            one = bench.watch_crowd(server, source, 1, SECONDS)
        with peers.streampipe(source) as server:
            many = bench.watch_crowd(server, source, VIEWERS, SECONDS)
    assert many.skips == 0
    assert many.requests <= one.requests + 60 / SECONDS * 2, "a segment and a playlist more"
    assert many.threads - one.threads <= VIEWERS + 1, "a thread each; the one that joined leaves"
    assert (many.memory - one.memory) / VIEWERS < 200_000, "bytes for each viewer (SPEC 5)"
    assert many.cpu < 4 * bench.bare_cpu(VIEWERS, PLAN.bare_bytes), "CPU for each byte (2)"


def test_who_polls_costs_little_more_than_who_streams() -> None:
    with peers.origin(1, slow=False) as source:
        with peers.streampipe(source) as server:
            streaming = bench.watch_crowd(server, source, VIEWERS, SECONDS)
        with peers.streampipe(source) as server:
            polling = bench.polling_cpu(server, VIEWERS, SECONDS)
    assert polling < 3 * streaming.cpu, "a request for each list and segment (1.8)"


def test_a_long_list_costs_little() -> None:
    """A quarter of the channels that the table is about, with bounds of four times its figures."""
    found = bench.measure_list(2000, 20)
    assert (found.lost, found.starved) == (0, 0)
    assert found.memory < 150_000_000
    assert found.playlist < found.answer, "a few times as fast as a start (a tenth)"
    assert found.reload < 4 * found.answer, "(a half)"
