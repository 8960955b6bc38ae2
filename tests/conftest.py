"""Fixtures: a real origin and a real StreamPipe on loopback, and proof that both went away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.origin import Origin
from tests.server import Site

LEFT_OVER = 10.0  # seconds a closing upstream may need: streamlink's threads end in their own time


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    while left := set(threading.enumerate()) - before:
        for thread in left:
            with contextlib.suppress(RuntimeError):  # it is just being started
                thread.join(LEFT_OVER)
                assert not thread.is_alive(), f"{thread.name} outlived the test"


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    """Start a server: `serve({"news": address}, timeout=5)`; it is closed with the test."""
    sites: list[Site] = []

    def start(streams: Mapping[str, object], **settings: Any) -> Site:
        sites.append(Site(streams, **settings))
        return sites[-1]

    yield start
    for site in sites:
        site.close()
