"""Nested locks, compared with the map in pipe.py: a thread takes one while it holds another."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist
from tests.program import eventually
from tests.server import TIMEOUT, Site

Serve = Callable[..., Site]
Pair = tuple[str, str]

LOCK, RLOCK = threading.Lock, threading.RLock
MADE = re.compile(r"self\.(\w+) = threading\.(?:Lock|RLock|Condition)\(")


def codes_of(owner: type) -> list[object]:
    return [getattr(each, "__code__", None) for each in vars(owner).values()]


class Trace:
    """Records the pairs of nested locks, the outer one first."""

    def __init__(self) -> None:
        self.pairs: set[Pair] = set()
        self._held = threading.local()

    def held(self) -> list[Traced]:
        """The locks that this thread holds, in the order of acquisition."""
        if not hasattr(self._held, "locks"):
            self._held.locks = []
        found: list[Traced] = self._held.locks
        return found

    def make(self, make: Callable[[], Any]) -> Any:
        """A lock; it is traced if a line of pipe.py assigns it to an attribute of an object."""
        frame = sys._getframe(2)
        while frame.f_back and frame.f_code.co_filename == threading.__file__:
            frame = frame.f_back
        found = MADE.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
        if frame.f_code.co_filename != pipe.__file__ or not found:
            return make()
        classes = type(frame.f_locals["self"]).__mro__
        owners = [each.__name__ for each in classes if frame.f_code in codes_of(each)]
        return Traced(self, f"{owners[0]}.{found[1]}", make())


class Traced:
    """A lock that records the other locks of its thread.  It has the methods for conditions."""

    def __init__(self, trace: Trace, name: str, lock: Any) -> None:
        self._trace, self.name, self._lock = trace, name, lock
        if hasattr(lock, "_release_save"):  # a reentrant lock
            self._release_save, self._acquire_restore = self._save, self._restore
            self._is_owned = lock._is_owned

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        is_taken: bool = self._lock.acquire(blocking, timeout)
        if is_taken:
            self._note(1)
        return is_taken

    def release(self) -> None:
        self._trace.held().remove(self)
        self._lock.release()

    def locked(self) -> bool:
        return bool(self._lock.locked())

    def _note(self, times: int) -> None:
        held = self._trace.held()
        if self not in held:
            self._trace.pairs.update((outer.name, self.name) for outer in held)
        held.extend([self] * times)

    def _save(self) -> tuple[Any, int]:
        held = self._trace.held()
        times = held.count(self)
        held[:] = [lock for lock in held if lock is not self]
        return self._lock._release_save(), times

    def _restore(self, saved: tuple[Any, int]) -> None:
        self._lock._acquire_restore(saved[0])
        self._note(saved[1])

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    trace = Trace()
    monkeypatch.setattr(threading, "Lock", lambda: trace.make(LOCK))
    monkeypatch.setattr(threading, "RLock", lambda: trace.make(RLOCK))
    return trace


def pairs_of_the_map() -> set[Pair]:
    """The pairs in the section Locks of pipe.py's docstring: `A > B, C` allows A, then B or C."""
    assert pipe.__doc__
    (section,) = re.findall(r"^Locks\n(.*?)^\S", pipe.__doc__, re.M | re.S)
    return {
        (outer, inner)
        for outer, inners in re.findall(r"^ +([\w.]+) > (.*)$", section, re.M)
        for inner in inners.split(", ")
    }


def test_every_lock_of_the_map_exists() -> None:
    """Its class assigns it to this attribute."""
    names = {name for pair in pairs_of_the_map() for name in pair}
    assert len(names) >= 7
    for name in names:
        owner, _, attribute = name.partition(".")
        assert f"self.{attribute} = threading." in inspect.getsource(getattr(pipe, owner)), name


def live(origin: Origin, name: str) -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(), mode="live"))


def use(site: Site, news: Playlist) -> None:
    """Use the server: viewers, polling clients, reports, a failed start, reloads."""
    viewers = [site.watch("/news") for _ in range(3)]
    for _ in range(3):
        news.advance()
        assert all(viewer.read(188)[:1] == b"G" for viewer in viewers)
    playlist = site.get("/news.m3u8")
    (segment,) = re.findall(r"^[^#\n].*$", playlist.body.decode(), re.M)[:1]
    assert site.get(f"/{segment}").status == 200
    assert site.get("/film").is_complete
    assert site.get("/lost").status == 502
    for path in ("/status", "/metrics", "/health", "/playlist.m3u"):
        assert site.get(path).status == 200
    viewers.pop().close()
    site.server.reload(pipe.Config(streams={"news": site.config.streams["news"]}))
    assert site.get("/film").status == 404
    changed = pipe.StreamSettings("news", ("http://127.0.0.1:9/other.m3u8",))
    site.server.reload(pipe.Config(streams={"news": changed}))
    eventually(lambda: site.get("/health").json["viewers"] == 0, "the viewers are disconnected")


def test_locks_are_only_nested_as_in_the_map(origin: Origin, serve: Serve, trace: Trace) -> None:
    news, film = live(origin, "news"), origin.add(Playlist("film", media.ts_segments()))
    streams = {"news": news.url, "film": film.url, "lost": f"{origin.url}/lost.m3u8"}
    site = serve(streams, linger=0)
    use(site, news)
    assert site.channels.stop(TIMEOUT)
    assert ("Channels.changed", "Window._lock") in trace.pairs, "the locks are not traced"
    unknown = sorted(trace.pairs - pairs_of_the_map())
    assert unknown == [], f"pipe.py's docstring lacks these: {unknown}"
