"""The window of a channel and the viewers in it: real threads, caught at waiting."""

from __future__ import annotations

import functools
import math
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
def _nobody_looks_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feeder that waits learns what happened by being told, not by looking now and then."""
    monkeypatch.setattr(pipe, "FEEDER_TICK", LONG)


def block(number: int) -> bytes:
    """SIZE bytes that tell their number."""
    return b"%08d, " % number


def blocks(first: int, stop: int) -> list[bytes]:
    return [block(number) for number in range(first, stop)]


@dataclass(frozen=True)
class At:
    """A place in front of a block where a decoder can start."""

    number: int
    join: Join


def preamble(number: int) -> bytes:
    return b"<%d>" % number


def key_frame(number: int, ago: float = 0.0) -> At:
    """A place at a key frame, `ago` seconds old, with a preamble of its own."""
    return At(number, Join(preamble(number), is_key_frame=True, time=time.monotonic() - ago))


def unit(number: int, ago: float = 0.0) -> At:
    """The same where any unit starts."""
    return At(number, Join(preamble(number), time=time.monotonic() - ago))


def enter(window: Window) -> Viewer:
    viewer = Viewer()
    window.enter(viewer)
    return viewer


def observed(
    limit: int, paused_after: float = pipe.FOREMOST_PATIENCE, **options: int
) -> tuple[Window, Waits]:
    """A window, and which threads wait for it."""
    waits = Waits()
    with waits.observing():
        window = Window(limit, paused_after=paused_after, **options)
    return window, waits


def items(first: int, stop: int, *places: At) -> list[pipe.Framed]:
    """Blocks `first` to `stop`, with these places in front of them."""
    found: list[pipe.Framed] = []
    for number in range(first, stop + 1):
        found += [place.join for place in places if place.number == number]
        if number < stop:
            found.append(block(number))
    return found


def append(window: Window, first: int, stop: int, *places: At) -> None:
    """Blocks `first` to `stop`; fails where the window waits for a viewer."""
    Task(functools.partial(window.append, items(first, stop, *places))).result()


def begin(window: Window, number: int) -> None:
    """A segment of the origin's begins with block `number`, and a decoder can start there."""
    window.begin(1.0)
    window.append([Join(preamble(number), at_start=True)])


def feed(window: Window, first: int, stop: int, length: int = 2) -> None:
    """Blocks `first` to `stop`, of which each `length` make a segment."""
    for number in range(first, stop):
        if number % length == 0:
            window.finish(b"")
            begin(window, number)
        window.append([block(number)])


def segments(window: Window, first: int, stop: int, length: int = 2) -> None:
    """The same; fails where the window waits for a viewer."""
    Task(functools.partial(feed, window, first, stop, length)).result()


def pause(viewer: Viewer) -> None:
    """Make a viewer one that has not taken a byte for long."""
    viewer.moved = time.monotonic() - LONG


def take(window: Window, viewer: Viewer) -> bytes:
    """What there is for the viewer now."""
    return b"".join(window.take(viewer, 0))


def take_all(window: Window, viewer: Viewer) -> bytes:
    """All there is for the viewer now."""
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


def test_take_gives_up_in_time() -> None:
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
        assert all(a is b for a, b in zip(taken, given, strict=True)), "none is a copy"


def test_one_take_is_bounded() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    given = [bytes([n]) * pipe.BLOCK_LIMIT for n in range(40)]
    viewer = enter(window)
    window.append(given)
    whole = pipe.SEND_LIMIT // pipe.BLOCK_LIMIT
    assert [window.take(viewer, 0) for _ in range(3)] == [
        given[:whole], given[whole : 2 * whole], given[2 * whole :],
    ]  # fmt: skip


def test_preamble_counts_for_the_bound_of_a_take() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    given = [bytes([n]) * pipe.BLOCK_LIMIT for n in range(40)]
    window.begin()
    window.append([Join(b"preamble", at_start=True), *given])
    viewer = enter(window)
    taken = window.take(viewer, 0)
    assert taken[0] == b"preamble"
    assert 0 < sum(map(len, taken)) <= pipe.SEND_LIMIT
    assert window.take(viewer, 0)[0] is given[len(taken) - 1]


def test_block_beyond_the_bound_is_taken_alone() -> None:
    window = Window(100 * pipe.SEND_LIMIT)
    large = bytes(2 * pipe.SEND_LIMIT)
    viewer = enter(window)
    window.append([large, b"small"])
    assert [window.take(viewer, 0), window.take(viewer, 0)] == [[large], [b"small"]]


#### Joining ####


def test_viewer_who_waited_for_the_start_gets_everything() -> None:
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


def test_viewer_joins_at_the_oldest_segment_where_there_are_few() -> None:
    window = Window(1000)
    segments(window, 0, 3)
    assert take(window, enter(window)) == b"<0>" + text(0, 3)


def test_join_point_may_be_within_a_segment() -> None:
    """At its key frame, behind pictures that need those of the segment before it."""
    window = Window(1000)
    window.begin()
    append(window, 0, 4, key_frame(2))
    viewer = enter(window)
    assert take(window, viewer) == b"<2>" + text(2, 4)
    append(window, 4, 5)
    assert take(window, viewer) == block(4)


def test_first_key_frame_of_a_segment_is_its_start() -> None:
    window = Window(1000, live_edge=2)
    for first in (0, 4):
        window.begin()
        append(window, first, first + 4, key_frame(first + 1), key_frame(first + 3))
    assert take(window, enter(window)) == b"<1>" + text(1, 8)


def test_decoder_may_start_with_blocks_that_came_before_this_was_known() -> None:
    """A segment's tables come in one turn, its key frame in the next one."""
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
def test_picture_that_needs_others_has_to_do_for_a_segment_without_key_frame(ending: str) -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 4, makeshift(1), makeshift(2))
    assert take(window, enter(window)) == b"", "a key frame may still come"
    if ending == "complete":
        window.finish(b"")
    elif ending == "broken off":
        window.break_off()
    window.begin()
    append(window, 4, 5)
    assert take(window, enter(window)) == b"<1>" + text(1, 5)


def test_picture_that_needs_others_counts_for_nothing_beside_a_key_frame() -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 4, makeshift(0), key_frame(2))
    window.finish(b"")
    assert take(window, enter(window)) == b"<2>" + text(2, 4)


def test_join_point_may_be_behind_the_newest_block() -> None:
    window = Window(1000)
    append(window, 0, 2)
    begin(window, 2)
    viewer = enter(window)
    assert take(window, viewer) == b"", "nothing but a preamble is no media"
    append(window, 2, 4)
    assert take(window, viewer) == b"<2>" + text(2, 4)


@pytest.mark.parametrize("ending", ["complete", "broken off", "not told"])
@pytest.mark.parametrize(("live_edge", "first"), [(1, 4), (2, 2)])
def test_segment_of_which_nothing_came_is_no_place_to_start(
    ending: str, live_edge: int, first: int
) -> None:
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


def test_segment_of_which_nothing_came_is_no_place_in_a_source_without_segments() -> None:
    window = Window(1000)
    append(window, 0, 1)
    window.begin()
    window.append([Join(b"another", at_start=True)])
    window.leave_segments()
    append(window, 1, 3)
    assert take(window, enter(window)) == b""


def test_segment_that_is_not_finished_is_not_listed_and_the_next_one_is_apart() -> None:
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


def test_key_frames_count_for_nothing_beside_segments() -> None:
    window = Window(1000)
    window.begin()
    append(window, 0, 2, key_frame(0, ago=20), key_frame(1, ago=10))
    assert take(window, enter(window)) == b"<0>" + text(0, 2)


def test_key_frame_of_half_a_minute_ago_counts_as_none() -> None:
    """Intra refresh: the only key frame is the stream's first picture."""
    window = Window(1000)
    append(window, 0, 5, key_frame(0, ago=31), unit(3, ago=8))
    assert take(window, enter(window)) == b"<3>" + text(3, 5)
    append(window, 5, 6, key_frame(5))
    assert take(window, enter(window)) == b"<5>" + text(5, 6)


def test_key_frame_has_to_do_where_no_segment_start_is_left() -> None:
    window = Window(4 * SIZE)
    begin(window, 0)
    append(window, 0, 6, key_frame(4))
    assert take(window, enter(window)) == b"<4>" + text(4, 6)


def test_any_unit_is_a_join_point_where_no_key_frame_was_seen() -> None:
    window = Window(1000)
    append(window, 0, 3, unit(0, ago=20), unit(1, ago=10), unit(2))
    assert take(window, enter(window)) == b"<1>" + text(1, 3)


def test_other_units_count_for_nothing_beside_key_frames() -> None:
    window = Window(1000)
    append(window, 0, 5, key_frame(0, ago=10), unit(3, ago=8))
    assert take(window, enter(window)) == b"<0>" + text(0, 5)


def test_any_unit_has_to_do_where_no_better_one_is_left() -> None:
    """A source with segments or pictures gave way to one without (a relay of a radio)."""
    window = Window(3 * SIZE)
    segments(window, 0, 1)
    window.leave_segments()
    append(window, 1, 6, unit(4))
    assert take(window, enter(window)) == b"<4>" + text(4, 6)


def test_segments_count_for_nothing_once_a_source_without_them_took_over() -> None:
    """Its viewers start at the newest key frame that is some seconds old, of whichever source."""
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
    assert take(window, enter(window)) == b"<8>" + block(8), "segments again"


def test_viewer_waits_for_a_join_point_where_there_is_none() -> None:
    window, waits = observed(1000)
    append(window, 0, 2)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    append(window, 2, 4)
    assert waits.saw(reader), "blocks alone are not enough"
    append(window, 4, 6, key_frame(5))
    assert b"".join(reader.result()) == b"<5>" + block(5)
    assert viewer.skips == 0


#### Eviction ####


def test_oldest_blocks_leave_when_the_window_is_full() -> None:
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


def test_nobody_is_waited_for_without_viewers() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    append(window, 0, 100)


def test_slow_viewer_is_not_waited_for_where_another_is_ahead() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    slow, fast = (enter(window) for _ in range(2))
    for number in range(100):
        append(window, number, number + 1)
        assert take(window, fast) == block(number)
    assert (fast.skips, slow.skips) == (0, 0), "the slow one has not come back yet"


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


def test_waiting_viewer_gets_the_blocks_of_a_turn_that_waits_for_it() -> None:
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


def test_viewer_that_had_nothing_to_take_is_not_a_paused_one() -> None:
    """After a long silence the next blocks may come faster than the first of them is sent."""
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


def test_paused_viewer_is_not_waited_for() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    pause(viewer)
    segments(window, 2, 9)
    assert take(window, viewer) == b"<8>" + block(8)
    assert viewer.skips == 1


def test_viewer_that_stops_taking_is_waited_for_no_longer_than_patience() -> None:
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


def test_viewer_that_waits_for_a_join_point_holds_nothing_up() -> None:
    window = Window(2 * SIZE, paused_after=LONG)
    append(window, 0, 2)
    viewer = enter(window)
    assert take(window, viewer) == b""
    append(window, 2, 20)


def test_leaving_frees_a_waiting_feeder() -> None:
    window, waits = observed(2 * SIZE, paused_after=LONG)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 20)))
    assert waits.saw(feeder)
    window.leave(viewer)
    feeder.result()


def test_another_viewer_does_not_make_the_foremost_one_lose_bytes() -> None:
    """Join points of a turn can be used as soon as their blocks are there."""
    window, waits = observed(4 * SIZE, paused_after=LONG)
    first = enter(window)
    places = [key_frame(number) for number in range(0, 8, 2)]
    feeder = Task(functools.partial(window.append, items(0, 8, *places)))
    assert waits.saw(feeder)
    second = enter(window)
    window.leave(Viewer())  # somebody else's leaving makes the feeder look again
    assert waits.saw(feeder, 1), "it waits for the first viewer"
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


#### A viewer's own window ####


def test_private_window_keeps_what_its_viewer_has_not_taken() -> None:
    window, waits = observed(2 * SIZE, paused_after=math.inf)
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


def test_private_window_without_viewer_holds_up_nobody() -> None:
    window, waits = observed(2 * SIZE, paused_after=math.inf)
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
def test_position_before_tail_means_fell_behind(live_edge: int) -> None:
    window = Window(8 * SIZE, paused_after=0)
    window.live_edge = live_edge
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    segments(window, 2, 21)
    first = 20 - 2 * (live_edge - 1)
    assert take(window, viewer) == b"<%d>" % first + text(first, 21)
    assert take(window, enter(window)) == b"<%d>" % first + text(first, 21), "as a new viewer"
    assert viewer.skips == 1


def test_oldest_block_left_is_not_fallen_behind() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    segments(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    segments(window, 2, 6)
    assert take(window, viewer) == text(2, 6)
    assert viewer.skips == 0


def test_each_fall_is_counted() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    for number in range(5):
        segments(window, number * 10, number * 10 + 10)
        take_all(window, viewer)
        assert viewer.skips == number + 1


def test_skipped_bytes_are_those_the_viewer_does_not_get() -> None:
    """Also where the join point is within a segment."""
    window = Window(3 * SIZE, paused_after=0)
    viewer = enter(window)
    append(window, 0, 2)
    assert take(window, viewer) == text(0, 2)
    window.begin()
    append(window, 2, 9, key_frame(7))
    assert take(window, viewer) == b"<7>" + text(7, 9)


def test_viewer_that_fell_behind_waits_where_no_join_point_is_left() -> None:
    window = Window(3 * SIZE, paused_after=0)
    viewer = enter(window)
    append(window, 0, 2, key_frame(0))
    assert take(window, viewer) == text(0, 2)
    append(window, 2, 9)
    assert take(window, viewer) == b""
    append(window, 9, 11, key_frame(10))
    assert take(window, viewer) == b"<10>" + block(10)
    assert viewer.skips == 1


def test_pending_preamble_of_a_place_that_is_gone_is_not_sent() -> None:
    window = Window(4 * SIZE, paused_after=0)
    segments(window, 0, 4)
    viewer = enter(window)
    segments(window, 4, 20)
    assert take(window, viewer) == b"<16>" + text(16, 20)
    assert viewer.skips == 1


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_viewer_that_cannot_skip_is_let_go(taken: int) -> None:
    """fMP4: whatever it had, and wherever in a segment it was."""
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


def test_viewer_that_cannot_skip_goes_on_while_it_keeps_up() -> None:
    window = Window(100 * SIZE)
    window.can_skip = False
    viewer = enter(window)
    segments(window, 0, 1)
    assert take(window, viewer) == block(0)
    segments(window, 1, 9)
    assert take(window, viewer) == text(1, 9)


#### The end ####


@pytest.mark.parametrize("complete", [True, False])
def test_viewers_get_the_rest_before_the_end(complete: bool) -> None:
    window = Window(1000)
    viewer = enter(window)
    append(window, 0, 3)
    window.end(complete)
    assert take(window, viewer) == text(0, 3)
    for _ in range(2):
        with pytest.raises(WindowEnded) as raised:
            window.take(viewer, None)
        assert raised.value.is_complete is complete


def test_each_viewer_learns_of_the_end_by_an_exception_of_its_own() -> None:
    """One that all raise would collect the frames of a thousand threads."""
    window = Window(1000)
    viewers = [enter(window) for _ in range(2)]
    window.end(True)
    raised = set()
    for viewer in viewers:
        with pytest.raises(WindowEnded) as caught:
            window.take(viewer, None)
        raised.add(caught.value)
    assert len(raised) == 2


def test_first_end_counts() -> None:
    window = Window(1000)
    window.end(True)
    window.end(False)
    with pytest.raises(WindowEnded) as raised:
        window.take(enter(window), None)
    assert raised.value.is_complete


def test_viewer_that_fell_behind_gets_the_rest_before_the_end() -> None:
    window = Window(4 * SIZE, paused_after=0)
    viewer = enter(window)
    segments(window, 0, 20)
    window.end(True)
    assert take(window, viewer) == b"<16>" + text(16, 20)
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


def test_viewer_that_waits_for_a_join_point_learns_of_the_end() -> None:
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


def test_leaving_wakes_a_waiting_viewer() -> None:
    """Somebody else noticed that it closed its connection."""
    window, waits = observed(1000)
    viewer = enter(window)
    reader = Task(functools.partial(window.take, viewer, None))
    assert waits.saw(reader)
    window.leave(viewer)
    with pytest.raises(ViewerGone):
        reader.result()


def test_abort_leaves_the_rest() -> None:
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


@pytest.mark.parametrize("patience", [LONG, math.inf], ids=["live", "private"])
def test_abort_frees_a_waiting_feeder(patience: float) -> None:
    window, waits = observed(2 * SIZE, patience)
    viewer = enter(window)
    feeder = Task(functools.partial(window.append, blocks(0, 20)))
    assert waits.saw(feeder)
    window.abort()
    feeder.result()
    with pytest.raises(WindowEnded):
        window.take(viewer, None)


#### Growing ####


def grown_to(window: Window) -> int:
    """Blocks that the window holds."""
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


def test_window_shrinks_once_a_source_without_segments_took_over() -> None:
    """Nobody starts at the old segments, so nobody needs them."""
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 80, 8)
    assert grown_to(window) > 30
    window.leave_segments()
    for number in range(80, 120):
        append(window, number, number + 1, key_frame(number))
    assert grown_to(window) == 10


def test_segment_that_is_too_large_leaves_no_more_than_the_window() -> None:
    """Late viewers could not start with the rest of it."""
    window = Window(10 * SIZE, growth_factor=8)
    segments(window, 0, 100, 1000)
    assert grown_to(window) == 10
    assert take(window, enter(window)) == b""


#### The foremost viewer ####


def test_late_viewer_that_is_further_along_makes_nobody_lose_bytes() -> None:
    """It joined ahead of the first viewer and has not caught up yet: the first one counts."""
    window, waits = observed(4 * SIZE, paused_after=LONG, live_edge=1)
    first = enter(window)
    segments(window, 0, 4)
    late = enter(window)  # at block 2
    feeder = Task(functools.partial(window.append, blocks(4, 8)))
    assert waits.saw(feeder), "nobody has caught up: it waits for the one that came first"
    got = take(window, first)
    while feeder.is_running:
        got += take(window, first)
    got += take_all(window, first)
    assert got == text(0, 8)
    assert first.skips == 0
    window.leave(late)


def test_paused_first_viewer_is_not_waited_for_at_a_start() -> None:
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
    assert got == text(0, 9), "the second one takes, and is the foremost now"


#### Memory ####


@pytest.mark.parametrize("leaves_first", [True, False])
def test_memory_returns_when_a_window_has_ended_and_nobody_is_left(leaves_first: bool) -> None:
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
    """A viewer and what it should have: `position` is None until it got its first byte."""

    viewer: Viewer
    position: int | None = None
    skips: int = 0


@dataclass
class Model:
    """A window without locks, in plain numbers, beside the real one."""

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
        """The next bytes of a viewer are those that the plain numbers say."""
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
def test_each_viewer_gets_the_stream_from_a_join_point_on(
    operations: list[tuple[str, ...]], limit: int, live_edge: int
) -> None:
    """All of it, but for what is counted as skipped."""
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
def test_many_viewers_of_any_pace_get_the_same_stream(seed: int) -> None:
    """Threads that take when they happen to run: whole blocks, in order, and every gap counted."""
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
    """All that a viewer gets, resting after each take."""
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
    """Runs of blocks, each behind the preamble of its join point and counted, up to the last."""
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
