"""The ring between an upstream and its feeder: real threads, caught at waiting."""

from __future__ import annotations

import functools
import random

import pytest

from pipe import EventKind, ReaderBuffer, SegmentEvent
from tests.threads import TIMEOUT, Observed, Task


def segment(number: int) -> SegmentEvent:
    return SegmentEvent(EventKind.START, number)


def full_ring(limit: int = 10) -> tuple[ReaderBuffer, Observed]:
    """A ring without room, and the condition that its writers wait for."""
    ring = ReaderBuffer(limit)
    ring._not_full = room = Observed(ring._lock)
    ring.write(b"x" * limit)
    return ring, room


def empty_ring(limit: int = 10) -> tuple[ReaderBuffer, Observed]:
    """A ring without anything, and the condition that its feeder waits for."""
    ring = ReaderBuffer(limit)
    ring._not_empty = things = Observed(ring._lock)
    return ring, things


def waiting_take(ring: ReaderBuffer, things: Observed) -> Task[list[bytes | SegmentEvent]]:
    task = Task(functools.partial(ring.take, 100, TIMEOUT))
    assert things.saw_wait()
    return task


#### Order and bounds ####


def test_bytes_and_marks_come_in_the_order_they_were_given() -> None:
    ring = ReaderBuffer(100)
    ring.put_event(SegmentEvent(EventKind.INIT, 7))
    ring.write(b"init")
    ring.put_event(segment(7))
    ring.write(b"one")
    ring.write(b"two")
    ring.put_event(segment(8))
    ring.close()
    expected = [SegmentEvent(EventKind.INIT, 7), b"init", segment(7), b"one", b"two", segment(8)]
    assert ring.take(100, 0) == expected
    assert ring.take(100, 0) == []


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [b"12345"]),
        (5, [b"12345"]),
        (6, [b"12345", b"67890"]),
        (10, [b"12345", b"67890"]),
        (11, [b"12345", b"67890", segment(1), b"abc"]),
    ],
)
def test_take_stops_as_soon_as_it_has_enough(
    limit: int, expected: list[bytes | SegmentEvent]
) -> None:
    ring = ReaderBuffer(100)
    for item in (b"12345", b"67890", segment(1), b"abc", b"def"):
        if isinstance(item, SegmentEvent):
            ring.put_event(item)
        else:
            ring.write(item)
    assert ring.take(limit, 0) == expected
    assert ring.length == 16 - sum(len(i) for i in expected if not isinstance(i, SegmentEvent))


def test_length_counts_the_bytes_that_wait() -> None:
    ring = ReaderBuffer(100)
    assert ring.length == 0
    ring.write(b"12345")
    ring.put_event(segment(1))
    ring.write(b"678")
    assert ring.length == 8
    ring.take(1, 0)
    assert ring.length == 3


def test_nothing_written_is_nothing_handed_over() -> None:
    ring = ReaderBuffer(100)
    ring.write(b"")
    assert ring.length == 0
    assert ring.take(100, 0) == []


def test_nothing_written_does_not_wait_for_room() -> None:
    ring, _ = full_ring()
    Task(functools.partial(ring.write, b"")).result()


#### Back-pressure ####


def test_writer_waits_while_the_ring_is_full() -> None:
    ring, room = full_ring()
    writer = Task(functools.partial(ring.write, b"more"))
    assert room.saw_wait()
    assert ring.length == 10
    assert ring.take(1, 0) == [b"x" * 10]
    writer.result()
    assert ring.take(1, 0) == [b"more"]


def test_writer_goes_on_waiting_until_there_is_room() -> None:
    ring = ReaderBuffer(4)
    ring._not_full = room = Observed(ring._lock)
    ring.write(b"abc")
    ring.write(b"defgh")  # any room will do for the whole of it
    assert ring.length == 8
    writer = Task(functools.partial(ring.write, b"i"))
    assert room.saw_wait()
    ring.take(1, 0)  # 5 bytes are still more than 4
    with pytest.raises(TimeoutError):
        writer.result(0)
    ring.take(1, 0)
    writer.result()
    assert ring.take(1, 0) == [b"i"]


def test_marks_need_no_room() -> None:
    ring, _ = full_ring()
    Task(functools.partial(ring.put_event, segment(1))).result()
    assert ring.take(100, 0) == [b"x" * 10, segment(1)]


def test_wait_free_tells_whether_there_is_room() -> None:
    ring, _ = full_ring()
    assert not ring.wait_free(0)
    ring.take(1, 0)
    assert ring.wait_free(0)


def test_wait_free_waits_for_room() -> None:
    ring, room = full_ring()
    waiter = Task(ring.wait_free)
    assert room.saw_wait()
    ring.take(1, 0)
    assert waiter.result()


def test_room_is_told_to_all_who_wait_for_it() -> None:
    """Streamlink's worker waits for it beside its writer."""
    ring, room = full_ring()
    waiters = [Task(ring.wait_free) for _ in range(3)]
    assert all(room.saw_wait() for _ in waiters)
    ring.take(1, 0)
    assert [waiter.result() for waiter in waiters] == [True] * 3


#### Waiting for bytes ####


def test_take_waits_until_something_is_written() -> None:
    ring, things = empty_ring()
    taker = waiting_take(ring, things)
    ring.write(b"data")
    assert taker.result() == [b"data"]


def test_take_waits_until_something_is_marked() -> None:
    ring, things = empty_ring()
    taker = waiting_take(ring, things)
    ring.put_event(segment(3))
    assert taker.result() == [segment(3)]


def test_take_gives_up_in_time() -> None:
    assert ReaderBuffer(10).take(100, 0.001) == []


def test_wake_ends_the_wait_for_bytes() -> None:
    ring, things = empty_ring()
    taker = waiting_take(ring, things)
    ring.wake()
    assert taker.result() == []


def test_wake_counts_for_one_take_that_comes_later() -> None:
    ring, things = empty_ring()
    ring.wake()
    ring.wake()
    assert Task(functools.partial(ring.take, 100, TIMEOUT)).result() == []
    taker = waiting_take(ring, things)
    ring.write(b"data")
    assert taker.result() == [b"data"]


#### The end ####


def test_close_ends_the_wait_for_bytes() -> None:
    ring, things = empty_ring()
    taker = waiting_take(ring, things)
    ring.close()
    assert taker.result() == []
    assert ring.is_exhausted


def test_close_frees_a_waiting_writer_and_drops_what_it_had() -> None:
    ring, room = full_ring()
    writer = Task(functools.partial(ring.write, b"dropped"))
    assert room.saw_wait()
    ring.close()
    writer.result()
    assert ring.take(100, 0) == [b"x" * 10]
    assert ring.is_exhausted


def test_close_frees_who_waits_for_room() -> None:
    ring, room = full_ring()
    waiter = Task(ring.wait_free)
    assert room.saw_wait()
    ring.close()
    assert waiter.result()


def test_what_is_there_can_be_taken_after_close() -> None:
    ring = ReaderBuffer(100)
    ring.write(b"rest")
    ring.close()
    ring.close()
    ring.write(b"too late")
    assert ring.closed
    assert not ring.is_exhausted
    assert ring.take(100, TIMEOUT) == [b"rest"]
    assert ring.is_exhausted


def test_open_ring_is_not_exhausted() -> None:
    assert not ReaderBuffer(10).is_exhausted


#### All at once ####


@pytest.mark.parametrize("seed", range(5))
def test_any_pace_hands_over_the_same_bytes_within_the_limit(seed: int) -> None:
    dice = random.Random(seed)
    ring, most = ReaderBuffer(64), 40
    items = [bytes([n % 251]) * dice.randint(1, most) for n in range(2000)]

    def write() -> None:
        for number, item in enumerate(items):
            if number % 10 == 0:
                ring.put_event(segment(number))
            ring.write(item)
        ring.close()

    writer = Task(write)
    lengths, taken = [0], list[bytes | SegmentEvent]()
    while not ring.is_exhausted:
        lengths.append(ring.length)
        taken += ring.take(dice.randint(1, 200), TIMEOUT)
    writer.result()
    marks = [item for item in taken if isinstance(item, SegmentEvent)]
    assert marks == [segment(number) for number in range(0, 2000, 10)]
    assert [item for item in taken if not isinstance(item, SegmentEvent)] == items
    behind_marks = [taken[taken.index(mark) + 1] for mark in marks]
    assert behind_marks == items[::10]
    assert 0 < max(lengths) < 64 + most
    assert ring.length == 0
