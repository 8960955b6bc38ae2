"""Fixtures: a real origin and a real StreamPipe on loopback, and checks that both have ended."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.origin import Origin
from tests.server import Site

# Locks between the test processes; see _alone_if_marked().
NEXT, RUNNING = "next.lock", "running.lock"

LEFT_OVER = 10.0  # seconds that streamlink's threads may need to end after their upstream closed


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    while left := set(threading.enumerate()) - before:
        for thread in left:
            with contextlib.suppress(RuntimeError):  # it is starting
                thread.join(LEFT_OVER)
                assert not thread.is_alive(), f"{thread.name} outlived the test"


@pytest.fixture(autouse=True)
def _alone_if_marked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Run a test that is marked `alone` while no other process runs a test.

    Every test holds RUNNING while it runs: a marked test exclusively, the other tests shared.
    Each test first takes NEXT and holds it while it waits for RUNNING.  Therefore a marked test
    waits only for tests that are already running, and not for later ones.
    """
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # all workers have their folders in it
    is_alone = request.node.get_closest_marker("alone") is not None
    with open(folder / NEXT, "w") as turn, open(folder / RUNNING, "w") as running:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    """Start a server: `serve({"news": address}, timeout=5)`; it closes with the test."""
    sites: list[Site] = []

    def start(streams: Mapping[str, object], **settings: Any) -> Site:
        sites.append(Site(streams, **settings))
        return sites[-1]

    yield start
    for site in sites:
        site.close()
