"""The window of a channel and its viewers: real threads, which tests observe while they wait."""

from __future__ import annotations

import functools
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipe
from pipe import Join, Viewer, ViewerGone, Window, WindowEnded
from tests.threads import TIMEOUT, Task, Waits

SIZE = 10  # bytes of the blocks below
LONG = 1000.0  # seconds; no test waits as long


@pytest.fixture(autouse=True)
def _long_feeder_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting feeder must be notified, because it does not check often enough by itself."""
    monkeypatch.setattr(pipe, "FEEDER_TICK", LONG)


def block(number: int) -> bytes:
    """SIZE bytes that contain the block's number."""
    return b"%08d, " % number


def blocks(first: int, stop: int) -> list[bytes]:
    return [block(number) for number in range(first, stop)]


@dataclass(frozen=True)
class At:
    """A join point in front of block `number`."""

    number: int
    join: Join


def preamble(number: int) -> bytes:
    return b"<%d>" % number


def key_frame(number: int, ago: float = 0.0) -> At:
    """A join point at a key frame, `ago` seconds old, with a preamble of its own."""
    return At(number, Join(preamble(number), is_key_frame=True, time=time.monotonic() - ago))


def unit(number: int, ago: float = 0.0) -> At:
    """The same at the start of any other unit."""
    return At(number, Join(preamble(number), time=time.monotonic() - ago))


def enter(window: Window) -> Viewer:
    viewer = Viewer()
    window.enter(viewer)
    return viewer


def observed(
    limit: int, paused_after: float = pipe.FOREMOST_PATIENCE, **options: int
) -> tuple[Window, Waits]:
    """A window, and the record of the threads that wait for it."""
    waits = Waits()
    with waits.observing():
        window = Window(limit, paused_after=paused_after, **options)
    return window, waits


def items(first: int, stop: int, *places: At) -> list[pipe.Framed]:
    """Blocks `first` to `stop`, with these join points in front of them."""
    found: list[pipe.Framed] = []
    for number in range(first, stop + 1):
        found += [place.join for place in places if place.number == number]
        if number < stop:
            found.append(block(number))
    return found


def append(window: Window, first: int, stop: int, *places: At) -> None:
    """Append blocks `first` to `stop`; fails if the window waits for a viewer."""
    Task(functools.partial(window.append, items(first, stop, *places))).result()


def begin(window: Window, number: int) -> None:
    """Begin a segment of the origin's with block `number`, where a decoder can start."""
    window.begin(1.0)
    window.append([Join(preamble(number), at_start=True)])


def feed(window: Window, first: int, stop: int, length: int = 2) -> None:
    """Append blocks `first` to `stop`, in segments of `length` blocks."""
    for number in range(first, stop):
        if number % length == 0:
            window.finish(b"")
            begin(window, number)
        window.append([block(number)])


def segments(window: Window, first: int, stop: int, length: int = 2) -> None:
    """The same; fails if the window waits for a viewer."""
    Task(functools.partial(feed, window, first, stop, length)).result()


def pause(viewer: Viewer) -> None:
    """Make a viewer appear as if it had not taken a byte for a long time."""
    viewer.moved = time.monotonic() - LONG


def take(window: Window, viewer: Viewer) -> bytes:
    """Take once, without waiting."""
    return b"".join(window.take(viewer, 0))


def take_all(window: Window, viewer: Viewer) -> bytes:
    """Take everything that the viewer can get now."""
    return b"".join(iter(lambda: take(window, viewer), b""))


def text(first: int, stop: int) -> bytes:
    return b"".join(blocks(first, stop))


#### Taking ####


def test_reader_waits_until_a_block_arrives() -> None:
    window, waits = observed(1000)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    append(window, 0, 1)
    assert reader.result() == [block(0)]


def test_take_returns_after_its_time_out() -> None:
    window = Window(1000)
    viewer = enter(window)
    assert window.take(viewer, 0.001) == []
    append(window, 0, 1)
    assert window.take(viewer, 0.001) == [block(0)]


def test_reader_gets_every_block_once() -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    assert take(window, viewer) == text(0, 3)
    append(window, 3, 5)
    assert take(window, viewer) == text(3, 5)
    assert take(window, viewer) == b""


def test_readers_share_the_same_blocks() -> None:
    window = Window(1000)
    given = blocks(0, 3)
    readers = [enter(window) for _ in range(3)]
    window.append(given)
    for viewer in readers:
        taken = window.take(viewer, 0)
        assert all(a is b for a, b in zip(taken, given, strict=True)), "no block is copied"


def test_one_take_is_bounded() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    given = [bytes([n]) * pipe.BLOCK_LIMIT for n in range(40)]
    viewer = enter(window)
    window.append(given)
    whole = pipe.SEND_LIMIT // pipe.BLOCK_LIMIT
    assert [window.take(viewer, 0) for _ in range(3)] == [
        given[:whole], given[whole : 2 * whole], given[2 * whole :],
    ]  # fmt: skip


def test_preamble_counts_towards_the_limit_of_a_take() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    given = [bytes([n]) * pipe.BLOCK_LIMIT for n in range(40)]
    window.begin()
    window.append([Join(b"preamble", at_start=True), *given])
    viewer = enter(window)
    taken = window.take(viewer, 0)
    assert taken[0] == b"preamble"
    assert 0 < sum(map(len, taken)) <= pipe.SEND_LIMIT
    assert window.take(viewer, 0)[0] is given[len(taken) - 1]


def test_block_beyond_the_limit_is_taken_alone() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    large = bytes(2 * pipe.SEND_LIMIT)
    viewer = enter(window)
    window.append([large, b"small"])
    assert [window.take(viewer, 0), window.take(viewer, 0)] == [[large], [b"small"]]


#### Joining ####


def test_viewer_that_waited_for_the_start_gets_everything() -> None:
    window = Window(1000)
    viewer = enter(window)
    segments(window, 0, 6)
    assert take(window, viewer) == text(0, 6)


@pytest.mark.parametrize("live_edge", [1, 2, 3, 4])
def test_viewer_joins_live_edge_segments_back(live_edge: int) -> None:
    window = Window(1000)
    window.live_edge = live_edge
    segments(window, 0, 11)  # the last one, from block 10 on, is being written
    first = 10 - 2 * (live_edge - 1)
    assert take(window, enter(window)) == b"<%d>" % first + text(first, 11)


def test_viewer_joins_at_the_oldest_of_few_segments() -> None:
    window = Window(1000)
    segments(window, 0, 3)
    assert take(window, enter(window)) == b"<0>" + text(0, 3)


def test_join_point_may_be_within_a_segment() -> None:
    """It is at the key frame, after pictures that depend on the previous segment."""
    window = Window(1000)
    window.begin()
    append(window, 0, 4, key_frame(2))
    viewer = enter(window)
    assert take(window, viewer) == b"<2>" + text(2, 4)
    append(window, 4, 5)
    assert take(window, viewer) == block(4)


def test_segment_is_joined_at_its_first_key_frame() -> None:
    window = Window(1000, live_edge=2)
    for first in (0, 4):
        window.begin()
        append(window, first, first + 4, key_frame(first + 1), key_frame(first + 3))
    assert take(window, enter(window)) == b"<1>" + text(1, 8)


def test_join_point_may_be_known_after_its_blocks() -> None:
    """A segment's tables may arrive with one append() and its key frame with the next one."""
    window = Window(1000)
    append(window, 0, 2)
    window.begin()
    append(window, 2, 4)
    viewer = enter(window)
    assert take(window, viewer) == b""
    window.append([Join(at_start=True), block(4)])
    assert take(window, viewer) == text(2, 5)


def makeshift(number: int) -> At:
    return At(number, Join(preamble(number), is_makeshift=True))


@pytest.mark.parametrize("ending", ["complete", "broken off", "not told"])
def test_segment_without_key_frame_is_joined_at_its_first_picture(ending: str) -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 4, makeshift(1), makeshift(2))
    assert take(window, enter(window)) == b"", "a key frame may still follow"
    if ending == "complete":
        window.finish(b"")
    elif ending == "broken off":
        window.break_off()
    window.begin()
    append(window, 4, 5)
    assert take(window, enter(window)) == b"<1>" + text(1, 5)


def test_segment_with_a_key_frame_is_not_joined_at_another_picture() -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 4, makeshift(0), key_frame(2))
    window.finish(b"")
    assert take(window, enter(window)) == b"<2>" + text(2, 4)


def test_join_point_may_precede_its_block() -> None:
    window = Window(1000)
    append(window, 0, 2)
    begin(window, 2)
    viewer = enter(window)
    assert take(window, viewer) == b"", "a preamble alone is not media"
    append(window, 2, 4)
    assert take(window, viewer) == b"<2>" + text(2, 4)


@pytest.mark.parametrize("ending", ["complete", "broken off", "not told"])
@pytest.mark.parametrize(("live_edge", "first"), [(1, 4), (2, 2)])
def test_empty_segment_is_not_a_join_point(ending: str, live_edge: int, first: int) -> None:
    window = Window(1000, live_edge=live_edge)
    segments(window, 0, 4)
    window.begin()
    window.append([Join(b"another", at_start=True)])
    if ending == "complete":
        window.finish(b"")
    elif ending == "broken off":
        window.break_off()
    begin(window, 4)
    append(window, 4, 5)
    assert take(window, enter(window)) == preamble(first) + text(first, 5)


def test_empty_segment_is_not_a_join_point_of_a_source_without_segments() -> None:
    window = Window(1000)
    append(window, 0, 1)
    window.begin()
    window.append([Join(b"another", at_start=True)])
    window.leave_segments()
    append(window, 1, 3)
    assert take(window, enter(window)) == b""


def test_unfinished_segment_is_not_listed_and_the_next_one_is_apart() -> None:
    window = Window(1000)
    window.offer_hls(pipe.MPEG_TS, pipe.Numbering(number=1), 1.0)
    for number in range(5):
        begin(window, number)
        append(window, number, number + 1)
        if number != 2:
            window.finish(b"")
    assert [segment.first for segment in window.listed().segments] == [0, 1, 3, 4]
    assert [segment.is_apart for segment in window.listed().segments] == [True, False, True, False]


def test_join_point_without_preamble_adds_nothing() -> None:
    window = Window(1000)
    append(window, 0, 1)
    window.begin()
    window.append([Join(at_start=True), block(1)])
    assert window.take(enter(window), 0) == [block(1)]


def test_preamble_is_sent_once() -> None:
    window = Window(1000)
    segments(window, 0, 2)
    viewer = enter(window)
    assert take(window, viewer) == b"<0>" + text(0, 2)
    segments(window, 2, 4)
    assert take(window, viewer) == text(2, 4)


@pytest.mark.parametrize(
    ("ages", "chosen"),
    [
        ([30.0, 10.0, 6.5, 5.5, 1.0], 2),
        ([5.0, 3.0, 1.0], 0),
        ([30.0, 20.0], 1),
        ([0.0], 0),
    ],
    ids=["newest old enough", "oldest where none is", "all old enough", "only one"],
)
def test_without_segments_viewer_joins_at_a_key_frame_some_seconds_back(
    ages: list[float], chosen: int
) -> None:
    window = Window(1000)
    for number, ago in enumerate(ages):
        append(window, number, number + 1, key_frame(number, ago))
    first = b"<%d>" % chosen
    assert take(window, enter(window)) == first + text(chosen, len(ages))


def test_segments_take_precedence_over_key_frames() -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 2, key_frame(0, ago=20), key_frame(1, ago=10))
    assert take(window, enter(window)) == b"<0>" + text(0, 2)


def test_key_frame_older_than_half_a_minute_is_ignored() -> None:
    """With intra refresh, the only key frame is the stream's first picture."""
    window = Window(1000)
    append(window, 0, 5, key_frame(0, ago=31), unit(3, ago=8))
    assert take(window, enter(window)) == b"<3>" + text(3, 5)
    append(window, 5, 6, key_frame(5))
    assert take(window, enter(window)) == b"<5>" + text(5, 6)


def test_viewer_joins_at_a_key_frame_if_no_segment_start_is_left() -> None:
    window = Window(4 * SIZE)
    begin(window, 0)
    append(window, 0, 6, key_frame(4))
    assert take(window, enter(window)) == b"<4>" + text(4, 6)


def test_viewer_joins_at_any_unit_without_key_frames() -> None:
    window = Window(1000)
    append(window, 0, 3, unit(0, ago=20), unit(1, ago=10), unit(2))
    assert take(window, enter(window)) == b"<1>" + text(1, 3)


def test_key_frames_take_precedence_over_other_units() -> None:
    window = Window(1000)
    append(window, 0, 5, key_frame(0, ago=10), unit(3, ago=8))
    assert take(window, enter(window)) == b"<0>" + text(0, 5)


def test_viewer_joins_at_any_unit_if_no_better_join_point_is_left() -> None:
    """A source with segments or pictures was replaced by one without them, such as radio."""
    window = Window(3 * SIZE)
    segments(window, 0, 1)
    window.leave_segments()
    append(window, 1, 6, unit(4))
    assert take(window, enter(window)) == b"<4>" + text(4, 6)


def test_segments_are_ignored_after_a_source_without_segments_took_over() -> None:
    """Viewers start at the newest key frame that is some seconds old, of either source."""
    window = Window(1000)
    window.begin()
    append(window, 0, 3, key_frame(0, ago=30), key_frame(2, ago=20))
    window.begin()
    append(window, 3, 5, key_frame(3, ago=15))
    window.leave_segments()
    assert take(window, enter(window)) == b"<3>" + text(3, 5)
    append(window, 5, 8, key_frame(5, ago=8), key_frame(7, ago=1))
    assert take(window, enter(window)) == b"<5>" + text(5, 8)
    begin(window, 8)
    append(window, 8, 9)
    assert take(window, enter(window)) == b"<8>" + block(8), "the source has segments again"


def test_viewer_waits_for_a_join_point() -> None:
    window, waits = observed(1000)
    append(window, 0, 2)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    append(window, 2, 4)
    assert waits.saw(reader), "blocks without a join point are not enough"
    append(window, 4, 6, key_frame(5))
    assert b"".join(reader.result()) == b"<5>" + block(5)
    assert viewer.skips == 0


#### Eviction ####


def test_oldest_blocks_are_evicted_when_the_window_is_full() -> None:
    window = Window(5 * SIZE)
    segments(window, 0, 21)
    window.live_edge = 100
    assert take(window, enter(window)) == b"<16>" + text(16, 21)


def test_block_larger_than_the_window_is_kept_alone() -> None:
    window = Window(5 * SIZE)
    viewer = enter(window)
    append(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    Task(functools.partial(window.append, [bytes(100)])).result()
    assert take(window, viewer) == bytes(100)


def test_feeder_does_not_wait_without_viewers() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    append(window, 0, 100)


def test_feeder_does_not_wait_for_a_viewer_behind_the_foremost_one() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    slow, fast = (enter(window) for _ in range(2))
    for number in range(100):
        append(window, number, number + 1)
        assert take(window, fast) == block(number)
    assert (fast.skips, slow.skips) == (0, 0), "the slow viewer has not tried to take yet"


def test_feeder_waits_for_the_foremost_viewer_while_it_takes() -> None:
    window, waits = observed(3 * SIZE, paused_after=LONG)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 30)))
    got = b""
    while len(got) < 30 * SIZE:
        got += b"".join(window.take(viewer, TIMEOUT))
        viewer.moved = time.monotonic()
    feeder.result()
    assert waits.saw(feeder, 0), "the feeder had to wait"
    assert got == text(0, 30)
    assert viewer.skips == 0


def test_waiting_viewer_gets_the_first_blocks_of_an_append_that_waits_for_it() -> None:
    window, waits = observed(3 * SIZE, paused_after=LONG)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    feeder = Task(functools.partial(window.append, blocks(0, 4)))
    assert b"".join(reader.result()) == text(0, 3)
    feeder.result()


def test_feeder_waits_while_the_foremost_viewer_sends() -> None:
    window, waits = observed(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    append(window, 0, 2)
    assert window.take(viewer, 0) == blocks(0, 2)
    viewer.moved = time.monotonic()
    append(window, 2, 4)
    feeder = Task(functools.partial(window.append, blocks(4, 5)))
    assert waits.saw(feeder)
    assert take(window, viewer) == text(2, 4)
    feeder.result()


def test_viewer_without_anything_to_take_does_not_count_as_paused() -> None:
    """After a long silence the next blocks may arrive faster than the first of them is sent."""
    window, waits = observed(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    viewer.moved = time.monotonic() - 10 * LONG  # before the silence
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    append(window, 0, 1)
    assert reader.result() == [block(0)]
    feeder = Task(functools.partial(window.append, blocks(1, 6)))
    is_waited_for = waits.saw(feeder, 1)
    got = b""
    while feeder.is_running:
        got += take(window, viewer)
    got += take_all(window, viewer)
    feeder.result()
    assert is_waited_for
    assert got == text(1, 6)


def test_feeder_does_not_wait_for_a_paused_viewer() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    pause(viewer)
    segments(window, 2, 9)
    assert take(window, viewer) == b"<8>" + block(8)
    assert viewer.skips == 1


def test_feeder_waits_no_longer_than_its_patience() -> None:
    window, waits = observed(2 * SIZE, paused_after=0.05)
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    viewer.moved = time.monotonic()
    began = time.monotonic()
    feeder = Task(functools.partial(feed, window, 2, 9))
    feeder.result()
    assert waits.saw(feeder, 0)
    assert time.monotonic() - began >= 0.04
    assert take(window, viewer) == b"<8>" + block(8)


def test_feeder_does_not_wait_for_a_viewer_without_a_join_point() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    append(window, 0, 2)
    viewer = enter(window)
    assert take(window, viewer) == b""
    append(window, 2, 20)


def test_viewer_that_leaves_wakes_a_waiting_feeder() -> None:
    window, waits = observed(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 20)))
    assert waits.saw(feeder)
    window.leave(viewer)
    feeder.result()


def test_foremost_viewer_loses_nothing_when_another_one_joins() -> None:
    """A join point can be used as soon as its block is appended, even during append()."""
    window, waits = observed(4 * SIZE, paused_after=LONG)
    first = enter(window)
    places = [key_frame(number) for number in range(0, 8, 2)]
    feeder = Task(functools.partial(window.append, items(0, 8, *places)))
    assert waits.saw(feeder)
    second = enter(window)
    window.leave(Viewer())  # another viewer that leaves wakes the feeder
    assert waits.saw(feeder, 1), "the feeder still waits for the first viewer"
    got = {first: b"", second: b""}
    while feeder.is_running:
        for viewer in got:
            got[viewer] += take(window, viewer)
            viewer.moved = time.monotonic()
    for viewer in got:
        got[viewer] += take_all(window, viewer)
    feeder.result()
    assert (first.skips, second.skips) == (0, 0)
    assert got[first] == text(0, 8)
    assert got[second] == b"<0>" + text(0, 8)


def test_slow_viewer_does_not_delay_polling_clients() -> None:
    window = Window(4 * SIZE, paused_after=LONG, growth_factor=8)
    window.offer_hls(pipe.MPEG_TS, pipe.Numbering(number=1), 1.0)
    slow = enter(window)
    segments(window, 0, 6)
    take(window, slow)  # from now on, it takes less than arrives
    for number in range(6, 100, 2):
        window.await_listed(None, 0)
        segments(window, number, number + 2)
        slow.moved = time.monotonic()


#### Private windows ####


def test_private_window_does_not_evict_blocks_before_they_are_taken() -> None:
    window, waits = observed(2 * SIZE)
    window.make_private(2 * SIZE)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 10)))
    got = b""
    while len(got) < 8 * SIZE:  # the last two blocks need no more room
        assert waits.saw(feeder)
        pause(viewer)
        got += take(window, viewer)
    feeder.result()
    got += take(window, viewer)
    assert got == text(0, 10)
    assert viewer.skips == 0


def test_private_window_without_viewer_does_not_block_its_feeder() -> None:
    window, waits = observed(2 * SIZE)
    window.make_private(2 * SIZE)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 10)))
    assert waits.saw(feeder)
    window.leave(viewer)
    try:
        feeder.result(2)
    finally:
        window.abort()


#### Falling behind ####


@pytest.mark.parametrize("live_edge", [1, 2, 3])
def test_viewer_that_fell_behind_continues_where_a_new_one_starts(live_edge: int) -> None:
    window = Window(8 * SIZE, paused_after=0)
    window.live_edge = live_edge
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    segments(window, 2, 21)
    first = 20 - 2 * (live_edge - 1)
    assert take(window, viewer) == b"<%d>" % first + text(first, 21)
    assert take(window, enter(window)) == b"<%d>" % first + text(first, 21), (
        "it continues where a new viewer starts"
    )
    assert viewer.skips == 1


def test_viewer_at_the_oldest_block_has_not_fallen_behind() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    segments(window, 2, 6)
    assert take(window, viewer) == text(2, 6)
    assert viewer.skips == 0


def test_each_skip_is_counted() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    for number in range(5):
        segments(window, number * 10, number * 10 + 10)
        take_all(window, viewer)
        assert viewer.skips == number + 1


def test_viewer_that_fell_behind_may_continue_within_a_segment() -> None:
    window = Window(3 * SIZE, paused_after=0)
    viewer = enter(window)
    append(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    window.begin()
    append(window, 2, 9, key_frame(7))
    assert take(window, viewer) == b"<7>" + text(7, 9)


def test_viewer_that_fell_behind_waits_for_a_join_point() -> None:
    window = Window(3 * SIZE, paused_after=0)
    viewer = enter(window)
    append(window, 0, 2, key_frame(0))
    assert take(window, viewer) == text(0, 2)
    append(window, 2, 9)
    assert take(window, viewer) == b""
    append(window, 9, 11, key_frame(10))
    assert take(window, viewer) == b"<10>" + block(10)
    assert viewer.skips == 1


def test_preamble_of_an_evicted_join_point_is_not_sent() -> None:
    window = Window(4 * SIZE, paused_after=0)
    segments(window, 0, 4)
    viewer = enter(window)
    segments(window, 4, 20)
    assert take(window, viewer) == b"<16>" + text(16, 20)
    assert viewer.skips == 1


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_viewer_that_cannot_skip_is_dropped_when_it_falls_behind(taken: int) -> None:
    """fMP4. It does not matter how far it got, nor where in a segment it was."""
    window = Window(4 * SIZE, paused_after=0)
    window.can_skip = False
    viewer = enter(window)
    segments(window, 0, taken)
    assert take(window, viewer) == text(0, taken)
    segments(window, taken, 21)
    with pytest.raises(ViewerGone, match="fell behind"):
        window.take(viewer, 0)


def test_torn_segment_disconnects_only_viewers_that_have_a_part() -> None:
    """fMP4: the others continue with the next segment, and so do viewers that arrive later."""
    window = Window(100 * SIZE)
    window.can_skip = False
    begun, behind = enter(window), enter(window)
    segments(window, 0, 2)
    assert take(window, begun) == take(window, behind) == text(0, 2)
    segments(window, 2, 5)  # block 4 begins a segment
    assert take(window, begun) == text(2, 5)
    window.break_off()
    with pytest.raises(ViewerGone, match="half a segment"):
        window.take(begun, 0)
    assert window.held()[0] == 4 * SIZE
    late = enter(window)
    begin(window, 6)
    append(window, 6, 8)
    assert take(window, behind) == text(2, 4) + text(6, 8)
    assert take(window, late) == preamble(0) + text(0, 4) + text(6, 8)


def test_viewer_that_cannot_skip_continues_while_it_keeps_up() -> None:
    window = Window(100 * SIZE)
    window.can_skip = False
    viewer = enter(window)
    segments(window, 0, 1)
    assert take(window, viewer) == block(0)
    segments(window, 1, 9)
    assert take(window, viewer) == text(1, 9)


#### The end ####


@pytest.mark.parametrize("complete", [True, False])
def test_viewers_get_all_blocks_before_the_end(complete: bool) -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    window.end(complete)
    assert take(window, viewer) == text(0, 3)
    for _ in range(2):
        with pytest.raises(WindowEnded) as raised:
            window.take(viewer, None)
        assert raised.value.is_complete is complete


def test_each_viewer_gets_its_own_exception_at_the_end() -> None:
    """A shared exception would collect the traceback frames of all threads that raise it."""
    window = Window(1000)
    viewers = [enter(window) for _ in range(2)]
    window.end(True)
    raised = set()
    for viewer in viewers:
        with pytest.raises(WindowEnded) as caught:
            window.take(viewer, None)
        raised.add(caught.value)
    assert len(raised) == 2


def test_only_the_first_end_counts() -> None:
    window = Window(1000)
    window.end(True)
    window.end(False)
    with pytest.raises(WindowEnded) as raised:
        window.take(enter(window), None)
    assert raised.value.is_complete


def test_viewer_that_fell_behind_gets_the_last_segments_before_the_end() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    segments(window, 0, 20)
    window.end(True)
    assert take(window, viewer) == b"<16>" + text(16, 20)
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


def test_viewer_that_waits_for_a_join_point_gets_the_end() -> None:
    window = Window(1000)
    append(window, 0, 3)
    viewer = enter(window)
    window.end(True)
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


@pytest.mark.parametrize(
    "stop", [lambda window: window.end(False), Window.abort], ids=["end", "abort"]
)
def test_end_wakes_waiting_viewers(stop: Callable[[Window], None]) -> None:
    window, waits = observed(1000)
    viewers = [enter(window) for _ in range(3)]
    readers = [Task(functools.partial(window.take, viewer, None)) for viewer in viewers]
    assert all(waits.saw(reader) for reader in readers)
    stop(window)
    for reader in readers:
        with pytest.raises(WindowEnded):
            reader.result()


def test_viewer_that_waits_is_woken_when_it_is_removed() -> None:
    """Another thread noticed that the viewer closed its connection."""
    window, waits = observed(1000)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    window.leave(viewer)
    with pytest.raises(ViewerGone):
        reader.result()


def test_viewers_do_not_get_the_rest_after_an_abort() -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    window.abort()
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


def test_abort_overrides_an_end() -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    window.end(True)
    window.abort()
    with pytest.raises(WindowEnded) as raised:
        window.take(viewer, None)
    assert not raised.value.is_complete


@pytest.mark.parametrize("is_private", [False, True], ids=["live", "private"])
def test_abort_wakes_a_waiting_feeder(is_private: bool) -> None:
    window, waits = observed(2 * SIZE, paused_after=LONG)
    if is_private:
        window.make_private(2 * SIZE)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 20)))
    assert waits.saw(feeder)
    window.abort()
    feeder.result()
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


#### Growth ####


def grown_to(window: Window) -> int:
    """The number of blocks that the window holds."""
    return window.held()[0] // SIZE


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 10), (2, 10), (4, 17), (8, 33), (50, 31)],
    ids=["small", "fitting", "large", "larger", "too large"],
)  # fmt: skip
def test_window_grows_to_hold_the_segments_that_late_viewers_need(
    length: int, expected: int
) -> None:
    window = Window(10 * SIZE, growth_factor=8, live_edge=3)
    segments(window, 0, 400, length)
    assert grown_to(window) in range(expected, expected + length)


def test_window_grows_with_a_segment_that_is_being_written() -> None:
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 60, 100)
    assert take(window, enter(window)) == b"<0>" + text(0, 60)


def test_window_shrinks_with_the_segments() -> None:
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 80, 8)
    segments(window, 80, 200, 2)
    assert grown_to(window) in range(10, 12)


def test_window_without_segments_does_not_grow() -> None:
    window = Window(10 * SIZE, growth_factor=8)
    for number in range(100):
        append(window, number, number + 1, key_frame(number))
    assert grown_to(window) == 10


def test_window_shrinks_after_a_source_without_segments_took_over() -> None:
    """New viewers no longer start at the old segments, so the window evicts them."""
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 80, 8)
    assert grown_to(window) > 30
    window.leave_segments()
    for number in range(80, 120):
        append(window, number, number + 1, key_frame(number))
    assert grown_to(window) == 10


def test_window_does_not_grow_for_a_segment_that_is_too_large() -> None:
    """It is not worth keeping, because late viewers cannot start with the rest of it."""
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 100, 1000)
    assert grown_to(window) == 10
    assert take(window, enter(window)) == b""


#### The foremost viewer ####


def test_first_viewer_loses_nothing_if_a_late_one_is_ahead() -> None:
    """It joined ahead of the first viewer but has not caught up, so the first one is foremost."""
    window, waits = observed(4 * SIZE, paused_after=LONG, live_edge=1)
    first = enter(window)
    segments(window, 0, 4)
    late = enter(window)  # at block 2
    feeder = Task(functools.partial(window.append, blocks(4, 8)))
    assert waits.saw(feeder), "no viewer has caught up: the feeder waits for the first one"
    got = take(window, first)
    while feeder.is_running:
        got += take(window, first)
    got += take_all(window, first)
    assert got == text(0, 8)
    assert first.skips == 0
    window.leave(late)


def test_feeder_does_not_wait_for_a_paused_first_viewer_at_a_start() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    first, second = enter(window), enter(window)
    segments(window, 0, 2)
    assert take(window, first) == text(0, 2)
    pause(first)
    feeder = Task(functools.partial(window.append, blocks(2, 9)))
    got = take(window, second)
    while feeder.is_running:
        got += take(window, second)
    got += take_all(window, second)
    assert got == text(0, 9), "the second viewer is the foremost one now"


#### Memory ####


@pytest.mark.parametrize("leaves_first", [True, False])
def test_ended_window_without_viewers_frees_its_memory(leaves_first: bool) -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    steps: list[Callable[[], None]] = [lambda: window.leave(viewer), lambda: window.end(True)]
    for step in steps if leaves_first else reversed(steps):
        assert window.held()[0] == 3 * SIZE
        step()
    assert window.held()[0] == 0


#### Any order of events ####


@dataclass
class Reader:
    """A viewer and its expected position, which is None until it gets its first byte."""

    viewer: Viewer
    position: int | None = None
    skips: int = 0


@dataclass
class Model:
    """A simple model of a window, without locks, to compare with the real one."""

    window: Window
    stream: bytes = b""
    tail: int = 0
    sizes: list[int] = field(default_factory=list)  # of the blocks that are left
    joins: list[int] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    def append(self, sizes: Sequence[int], join_at: Iterable[int]) -> None:
        starts = {at % len(sizes) for at in join_at}  # blocks that segments start with
        for number, size in enumerate(sizes):
            if number in starts:
                self.joins.append(len(self.stream))
                self.window.begin()
                self.window.append([Join(self.preamble(len(self.stream)), at_start=True)])
            added = bytes((len(self.stream) + n) % 251 for n in range(size))
            while self.sizes and sum(self.sizes) + size > self.window.byte_limit:
                self.tail += self.sizes.pop(0)
            self.sizes.append(size)
            self.stream += added
            self.window.append([added])

    def preamble(self, position: int) -> bytes:
        return b"<<<%d>>>" % position

    def take(self, reader: Reader) -> None:
        """Assert that a viewer's next bytes are those of the model."""
        taken = b"".join(self.window.take(reader.viewer, 0))
        is_behind = reader.position is not None and reader.position < self.tail
        if is_behind:
            reader.skips += 1
        if reader.position is None or is_behind:
            self.join(reader, taken)
        else:
            assert taken == self.stream[reader.position :]
            reader.position = len(self.stream)
        assert reader.viewer.skips == reader.skips

    def join(self, reader: Reader, taken: bytes) -> None:
        held = [position for position in self.joins if position >= self.tail]
        if not held:
            assert taken == b""
            reader.position = None
            return
        start = held[-self.window.live_edge :][0]
        assert taken == self.preamble(start) + self.stream[start:]
        reader.position = len(self.stream)


OPERATIONS = st.one_of(
    st.tuples(
        st.just("append"),
        st.lists(st.integers(1, 40), min_size=1, max_size=4),
        st.lists(st.integers(0, 200), max_size=2),
    ),
    st.just(("enter",)),
    st.tuples(st.just("take"), st.integers(0, 9)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
)


@settings(deadline=None, max_examples=150)
@given(
    operations=st.lists(OPERATIONS, max_size=40),
    limit=st.integers(1, 300),
    live_edge=st.integers(1, 4),
)
def test_each_viewer_gets_the_stream_from_a_join_point(
    operations: list[tuple[str, ...]], limit: int, live_edge: int
) -> None:
    """It gets all of it, except for the skips that are counted."""
    model = Model(Window(limit, paused_after=0))
    model.window.live_edge = live_edge
    for name, *arguments in operations:
        if name == "append":
            sizes, joins = arguments
            model.append(sizes, joins)  # type: ignore[arg-type]
        elif name == "enter":
            reader = Reader(enter(model.window), None if model.stream else 0)
            model.take(reader)
            model.readers.append(reader)
        elif model.readers:
            reader = model.readers[int(arguments[0]) % len(model.readers)]
            model.take(reader)
            if name == "leave":
                model.window.leave(reader.viewer)
                model.readers.remove(reader)


@pytest.mark.parametrize("seed", range(3))
def test_viewers_of_different_speeds_get_the_same_stream(seed: int) -> None:
    """Viewers take at random times. They get whole blocks in order, and every gap is counted."""
    count, length = 3000, 5
    window = Window(40 * SIZE, paused_after=0)
    turns = threading.Semaphore(0)  # makes the viewers as slow as the feeder allows

    def rest(some: int) -> None:
        for _ in range(some):
            turns.acquire()

    def watch(number: int) -> None:
        dice = random.Random(seed * 100 + number)
        viewer = enter(window)
        got = take_to_the_end(window, viewer, lambda: rest(dice.randint(0, number)))
        check_gaps(got, viewer, count)

    segments(window, 0, 1, length)
    viewers = [Task(functools.partial(watch, number)) for number in range(6)]
    for number in range(1, count):
        feed(window, number, number + 1, length)
        turns.release(3)
    window.end(True)
    turns.release(100_000)
    for viewer in viewers:
        viewer.result()


def take_to_the_end(window: Window, viewer: Viewer, rest: Callable[[], None]) -> bytes:
    """All bytes that a viewer gets, with a rest after each take()."""
    got = b""
    while True:
        try:
            got += b"".join(window.take(viewer, TIMEOUT))
        except WindowEnded as ending:
            if not ending.is_complete:
                raise
            return got
        rest()


def check_gaps(got: bytes, viewer: Viewer, count: int) -> None:
    """Assert that a viewer got runs of blocks, each after a preamble, up to the last block.

    Each run after the first one must be counted as a skip.
    """
    preambles = [int(number) for number in re.findall(rb"<(\d+)>", got)]
    runs = re.split(rb"<\d+>", got)
    assert runs.pop(0) == b""
    stops = []
    for first, run in zip(preambles, runs, strict=True):
        assert run == text(first, first + len(run) // SIZE)
        stops.append(first + len(run) // SIZE)
    assert viewer.skips == len(preambles) - 1
    gaps = [start - stop for stop, start in zip(stops, preambles[1:], strict=False)]
    assert all(gap > 0 for gap in gaps)
    assert stops[-1] == count
