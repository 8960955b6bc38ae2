"""The buffer between an upstream and its feeder: real threads, which tests observe as they wait."""

from __future__ import annotations

import functools
import random
import threading

import pytest

from pipe import EventKind, Items, ReaderBuffer, SegmentEvent, UpstreamError, fill
from tests.threads import TIMEOUT, Observed, Task


def segment(number: int) -> SegmentEvent:
    return SegmentEvent(EventKind.START, number)


def full_buffer(limit: int = 10) -> tuple[ReaderBuffer, Observed]:
    """A full buffer, and the condition that its writers wait for."""
    buffer = ReaderBuffer(limit)
    buffer._not_full = room = Observed(buffer._lock)
    buffer.write(b"x" * limit)
    return buffer, room


def empty_buffer(limit: int = 10) -> tuple[ReaderBuffer, Observed]:
    """An empty buffer, and the condition that its feeder waits for."""
    buffer = ReaderBuffer(limit)
    buffer._not_empty = things = Observed(buffer._lock)
    return buffer, things


def waiting_take(buffer: ReaderBuffer, things: Observed) -> Task[list[bytes | SegmentEvent]]:
    task = Task(functools.partial(buffer.take, 100, TIMEOUT))
    assert things.saw_wait()
    return task


#### Order and bounds ####


def test_bytes_and_events_keep_their_order() -> None:
    buffer = ReaderBuffer(100)
    buffer.put_event(SegmentEvent(EventKind.INIT, 7))
    buffer.write(b"init")
    buffer.put_event(segment(7))
    buffer.write(b"one")
    buffer.write(b"two")
    buffer.put_event(segment(8))
    buffer.close()
    expected = [SegmentEvent(EventKind.INIT, 7), b"init", segment(7), b"one", b"two", segment(8)]
    assert buffer.take(100, 0) == expected
    assert buffer.take(100, 0) == []


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
    buffer = ReaderBuffer(100)
    for item in (b"12345", b"67890", segment(1), b"abc", b"def"):
        if isinstance(item, SegmentEvent):
            buffer.put_event(item)
        else:
            buffer.write(item)
    assert buffer.take(limit, 0) == expected
    assert buffer.length == 16 - sum(len(i) for i in expected if not isinstance(i, SegmentEvent))


def test_length_counts_the_waiting_bytes() -> None:
    buffer = ReaderBuffer(100)
    assert buffer.length == 0
    buffer.write(b"12345")
    buffer.put_event(segment(1))
    buffer.write(b"678")
    assert buffer.length == 8
    buffer.take(1, 0)
    assert buffer.length == 3


def test_empty_write_hands_over_nothing() -> None:
    buffer = ReaderBuffer(100)
    buffer.write(b"")
    assert buffer.length == 0
    assert buffer.take(100, 0) == []


def test_empty_write_does_not_wait_for_room() -> None:
    buffer, _ = full_buffer()
    Task(functools.partial(buffer.write, b"")).result()


#### Back-pressure ####


def test_writer_waits_while_the_buffer_is_full() -> None:
    buffer, room = full_buffer()
    writer = Task(functools.partial(buffer.write, b"more"))
    assert room.saw_wait()
    assert buffer.length == 10
    assert buffer.take(1, 0) == [b"x" * 10]
    writer.result()
    assert buffer.take(1, 0) == [b"more"]


def test_writer_waits_until_there_is_room() -> None:
    buffer = ReaderBuffer(4)
    buffer._not_full = room = Observed(buffer._lock)
    buffer.write(b"abc")
    buffer.write(b"defgh")  # any free room suffices for a whole write
    assert buffer.length == 8
    writer = Task(functools.partial(buffer.write, b"i"))
    assert room.saw_wait()
    buffer.take(1, 0)  # 5 bytes are still more than 4
    with pytest.raises(TimeoutError):
        writer.result(0)
    buffer.take(1, 0)
    writer.result()
    assert buffer.take(1, 0) == [b"i"]


def test_events_need_no_room() -> None:
    buffer, _ = full_buffer()
    Task(functools.partial(buffer.put_event, segment(1))).result()
    assert buffer.take(100, 0) == [b"x" * 10, segment(1)]


def test_wait_free_returns_whether_there_is_room() -> None:
    buffer, _ = full_buffer()
    assert not buffer.wait_free(0)
    buffer.take(1, 0)
    assert buffer.wait_free(0)


def test_wait_free_waits_for_room() -> None:
    buffer, room = full_buffer()
    waiter = Task(buffer.wait_free)
    assert room.saw_wait()
    buffer.take(1, 0)
    assert waiter.result()


def test_free_room_wakes_all_waiting_threads() -> None:
    """streamlink's worker and its writer may wait at the same time."""
    buffer, room = full_buffer()
    waiters = [Task(buffer.wait_free) for _ in range(3)]
    assert all(room.saw_wait() for _ in waiters)
    buffer.take(1, 0)
    assert [waiter.result() for waiter in waiters] == [True] * 3


#### Waiting for bytes ####


def test_take_waits_until_something_is_written() -> None:
    buffer, things = empty_buffer()
    taker = waiting_take(buffer, things)
    buffer.write(b"data")
    assert taker.result() == [b"data"]


def test_take_waits_for_an_event() -> None:
    buffer, things = empty_buffer()
    taker = waiting_take(buffer, things)
    buffer.put_event(segment(3))
    assert taker.result() == [segment(3)]


def test_take_returns_after_its_time_out() -> None:
    assert ReaderBuffer(10).take(100, 0.001) == []


def test_wake_ends_the_wait_for_bytes() -> None:
    buffer, things = empty_buffer()
    taker = waiting_take(buffer, things)
    buffer.wake()
    assert taker.result() == []


def test_wake_ends_one_later_take() -> None:
    buffer, things = empty_buffer()
    buffer.wake()
    buffer.wake()
    assert Task(functools.partial(buffer.take, 100, TIMEOUT)).result() == []
    taker = waiting_take(buffer, things)
    buffer.write(b"data")
    assert taker.result() == [b"data"]


#### The end ####


def test_close_ends_the_wait_for_bytes() -> None:
    buffer, things = empty_buffer()
    taker = waiting_take(buffer, things)
    buffer.close()
    assert taker.result() == []
    assert buffer.is_exhausted


def test_close_frees_a_waiting_writer_and_drops_its_bytes() -> None:
    buffer, room = full_buffer()
    writer = Task(functools.partial(buffer.write, b"dropped"))
    assert room.saw_wait()
    buffer.close()
    writer.result()
    assert buffer.take(100, 0) == [b"x" * 10]
    assert buffer.is_exhausted


def test_close_ends_the_wait_for_room() -> None:
    buffer, room = full_buffer()
    waiter = Task(buffer.wait_free)
    assert room.saw_wait()
    buffer.close()
    assert waiter.result()


def test_remaining_bytes_can_be_taken_after_close() -> None:
    buffer = ReaderBuffer(100)
    buffer.write(b"rest")
    buffer.close()
    buffer.close()
    buffer.write(b"too late")
    assert buffer.closed
    assert not buffer.is_exhausted
    assert buffer.take(100, TIMEOUT) == [b"rest"]
    assert buffer.is_exhausted


def test_open_buffer_is_not_exhausted() -> None:
    assert not ReaderBuffer(10).is_exhausted


@pytest.mark.parametrize("failure", [None, "it broke off"])
def test_only_the_first_end_counts_for_the_failure(failure: str | None) -> None:
    buffer = ReaderBuffer(100)
    buffer.write(b"rest")
    buffer.end(failure)
    buffer.end("another")
    buffer.close()
    assert (buffer.closed, buffer.failure) == (True, failure)
    assert buffer.take(100, TIMEOUT) == [b"rest"]
    assert buffer.is_exhausted


def test_close_without_end_is_a_failure() -> None:
    buffer = ReaderBuffer(100)
    buffer.close()
    assert buffer.failure


def test_discard_drops_waiting_bytes_and_frees_the_writer() -> None:
    buffer, room = full_buffer()
    writer = Task(functools.partial(buffer.write, b"dropped"))
    assert room.saw_wait()
    buffer.discard()
    writer.result()
    buffer.put_event(segment(1))
    assert buffer.is_exhausted
    assert buffer.length == 0
    assert buffer.take(100, TIMEOUT) == []


def test_discard_ends_the_wait_for_bytes() -> None:
    buffer, things = empty_buffer()
    taker = waiting_take(buffer, things)
    buffer.discard()
    assert taker.result() == []


#### Filling ####


def test_fill_writes_all_items_in_order_and_ends() -> None:
    buffer = ReaderBuffer(100)
    fill(buffer, (item for item in (segment(1), b"one", segment(2), b"two")))
    assert buffer.take(100, 0) == [segment(1), b"one", segment(2), b"two"]
    assert (buffer.is_exhausted, buffer.failure) == (True, None)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (UpstreamError("the origin went home"), "the origin went home"),
        (TimeoutError("after 3 s at http://secret/"), "the origin did not answer in time"),
        (SystemExit(), "the origin's stream cannot be opened"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fill_explains_an_error_of_its_source(error: BaseException, failure: str) -> None:
    def items() -> Items:
        yield b"first"
        raise error

    buffer = ReaderBuffer(100)
    fill(buffer, items())
    assert buffer.take(100, 0) == [b"first"]
    assert (buffer.is_exhausted, buffer.failure) == (True, failure)


def test_fill_closes_its_source_when_the_buffer_is_discarded() -> None:
    buffer, room = full_buffer()
    is_source_closed = threading.Event()

    def items() -> Items:
        try:
            while True:
                yield b"more"
        finally:
            is_source_closed.set()

    filler = Task(functools.partial(fill, buffer, items()))
    assert room.saw_wait()
    buffer.discard()
    filler.result()
    assert is_source_closed.is_set()


#### All at once ####


@pytest.mark.parametrize("seed", range(5))
def test_bytes_and_limit_do_not_depend_on_the_speed(seed: int) -> None:
    dice = random.Random(seed)
    buffer, most = ReaderBuffer(64), 40
    items = [bytes([n % 251]) * dice.randint(1, most) for n in range(2000)]

    def write() -> None:
        for number, item in enumerate(items):
            if number % 10 == 0:
                buffer.put_event(segment(number))
            buffer.write(item)
        buffer.close()

    writer = Task(write)
    lengths, taken = [0], list[bytes | SegmentEvent]()
    while not buffer.is_exhausted:
        lengths.append(buffer.length)
        taken += buffer.take(dice.randint(1, 200), TIMEOUT)
    writer.result()
    events = [item for item in taken if isinstance(item, SegmentEvent)]
    assert events == [segment(number) for number in range(0, 2000, 10)]
    assert [item for item in taken if not isinstance(item, SegmentEvent)] == items
    behind_events = [taken[taken.index(event) + 1] for event in events]
    assert behind_events == items[::10]
    assert 0 < max(lengths) < 64 + most
    assert buffer.length == 0
