"""The table of a splicer's states: in its docstring, in its code and in a real splicer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipe
from pipe import Arrival, EventKind, SegmentEvent, SpliceState, SpliceStep
from tests import media

SEGMENTS = media.ts_segments(8)
HAD = 20 * media.PACKET  # bytes of segment 5 that viewers have
OPENINGS = {Arrival.OPENING, Arrival.OPENING_WITHIN, Arrival.OPENING_SHUT}
COMPARED = {Arrival.SAME, Arrival.DIFFERENT}  # these occur only in COMPARING
PAIRS = [
    (arrival, state)
    for arrival, state in itertools.product(Arrival, SpliceState)
    if arrival not in COMPARED or state is SpliceState.COMPARING
]


def documented() -> dict[tuple[Arrival, SpliceState], SpliceStep]:
    """The table in the docstring of Splicer."""
    lines = (pipe.Splicer.__doc__ or "").splitlines()
    rows = [line.split() for line in lines if line.startswith(" " * 8) and line.strip()]
    head, *rest = rows
    assert head == ["arrival", *SpliceState.__members__]
    table = {}
    for name, *cells in rest:
        for state, cell in zip(SpliceState, cells, strict=True):
            if cell != "-":
                step = SpliceStep(SpliceState[cell.rstrip("*")], is_seam=cell.endswith("*"))
                table[Arrival[name], state] = step
    return table


class Spliced:
    """A splicer of MPEG-TS, and methods that cause each state and each arrival."""

    def __init__(self) -> None:
        self.splicer = pipe.Splicer(pipe.Window(1 << 24), pipe.MPEG_TS)

    @property
    def state(self) -> SpliceState:
        return self.splicer._state

    @property
    def is_shut(self) -> bool:
        return self.splicer._framer.is_shut

    @property
    def number(self) -> int:
        return self.splicer.number or 0

    def event(self, kind: EventKind, number: int) -> None:
        self.splicer.pass_event(SegmentEvent(kind, number))

    def start(self, number: int) -> None:
        self.event(EventKind.START, number)

    def initialize(self) -> None:
        """Pass an initialization section that viewers do not have."""
        self.event(EventKind.INIT, self.number)
        self.splicer.pass_bytes(SEGMENTS[0][: 2 * media.PACKET])

    def bring_to(self, state: SpliceState) -> None:
        self.start(5)
        self.splicer.pass_bytes(SEGMENTS[5][:HAD])
        if state is SpliceState.BETWEEN:
            self.event(EventKind.END, 5)
        if state is not SpliceState.PASSING:
            self.splicer.resume()
        if state is SpliceState.LOST:
            self.event(EventKind.GAP, 5)
        if state in (SpliceState.COMPARING, SpliceState.SKIPPING):
            self.start(5)
        if state is SpliceState.SKIPPING:
            self.splicer.pass_bytes(SEGMENTS[6][:HAD])
        assert self.state is state

    def open(self, arrival: Arrival) -> None:
        """Open the upstream again, after the preparations that this arrival needs in PASSING."""
        if self.state is SpliceState.PASSING and arrival is not Arrival.OPENING_WITHIN:
            self.event(EventKind.END, self.number)
        if self.state is SpliceState.PASSING and arrival is Arrival.OPENING_SHUT:
            self.splicer.resume()
            self.start(50)
            assert self.is_shut
        self.splicer.resume()

    def bring(self, arrival: Arrival) -> None:
        number = self.number
        if arrival in OPENINGS:
            self.open(arrival)
        elif arrival is Arrival.WANTED:
            self.start(number)
        elif arrival is Arrival.CHANGED:
            self.initialize()
            self.start(number)
        elif arrival is Arrival.OTHER:
            self.start(number + 7)
        elif arrival is Arrival.BYTES:
            self.splicer.pass_bytes(SEGMENTS[5][: media.PACKET // 2])
        elif arrival is Arrival.SAME:
            self.splicer.pass_bytes(SEGMENTS[5][: HAD + 1])
        elif arrival is Arrival.DIFFERENT:
            self.splicer.pass_bytes(SEGMENTS[6][:HAD])
        elif arrival is Arrival.END:
            self.event(EventKind.END, number)
        elif arrival is Arrival.GAP:
            self.event(EventKind.GAP, number)
        else:
            self.event(EventKind.FILTERED, number + 7)


def test_docstring_has_the_table_of_the_code() -> None:
    assert documented() == pipe.STEPS
    assert pipe.STEPS.keys() == set(PAIRS), "every possible pair has a step"


@pytest.mark.parametrize(
    ("arrival", "state"),
    [pytest.param(arrival, state, id=f"{state.name}-{arrival.name}") for arrival, state in PAIRS],
)
def test_splicer_follows_the_table(arrival: Arrival, state: SpliceState) -> None:
    step = documented()[arrival, state]
    spliced = Spliced()
    spliced.bring_to(state)
    was_shut = spliced.is_shut
    spliced.bring(arrival)
    assert spliced.state is step.to
    if arrival not in OPENINGS:
        assert spliced.is_shut is (was_shut or step.is_seam)


CALLS = st.lists(
    st.one_of(
        st.just("resume"),
        st.tuples(st.sampled_from(EventKind), st.integers(0, 7)),
        st.integers(0, 7),
    ),
    max_size=20,
)


@given(CALLS)
def test_every_order_of_arrivals_has_a_step(calls: list[object]) -> None:
    spliced = Spliced()
    for call in calls:
        if isinstance(call, tuple):
            spliced.event(*call)
        elif isinstance(call, int):
            spliced.splicer.pass_bytes(SEGMENTS[call][:HAD])
        else:
            spliced.splicer.resume()
