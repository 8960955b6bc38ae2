"""Real threads: a test starts them, waits for them, and sees when they wait."""

from __future__ import annotations

import contextlib
import itertools
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from unittest import mock

import pytest

TIMEOUT = 10.0  # seconds; longer than any event that a test waits for

T = TypeVar("T")


class Task(Generic[T]):
    """A function in its own thread; `result` waits for it and returns or raises its outcome."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._values.append(self._function())
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def result(self, timeout: float = TIMEOUT) -> T:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError("the thread is still running")
        if self._error:
            raise self._error
        return self._values[0]


def refuse_threads(patch: pytest.MonkeyPatch, pattern: str, allowed: int = 0) -> list[str]:
    """Let only `allowed` threads with matching names start; returns the names of the others."""
    start = threading.Thread.start
    refused: list[str] = []
    count = itertools.count()

    def limited(thread: threading.Thread) -> None:
        if re.search(pattern, thread.name) and next(count) >= allowed:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    patch.setattr(threading.Thread, "start", limited)
    return refused


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    """Serve from a thread until the end of the block; yields the address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Observed(threading.Condition):
    """A condition that replaces another one, to know when a thread waits for it.

    Once the test can take the lock after `saw_wait`, the thread has released it and is waiting.
    """

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self._waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.release()
        return super().wait(timeout)

    def saw_wait(self, timeout: float = TIMEOUT) -> bool:
        """Whether a thread begins to wait. Each wait is reported once."""
        return self._waits.acquire(timeout=timeout)


class Waits:
    """The threads that wait for conditions created within `observing()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, threading.Semaphore] = {}  # by thread

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Observe conditions that are created in this block."""
        waits = self

        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                waits._count(threading.get_ident()).release()
                return super().wait(timeout)

        with mock.patch.object(threading, "Condition", Condition):
            yield

    def _count(self, thread: int) -> threading.Semaphore:
        with self._lock:
            return self._counts.setdefault(thread, threading.Semaphore(0))

    def saw(self, task: Task[Any], timeout: float = TIMEOUT) -> bool:
        """Whether a task begins to wait. Each wait is reported once.

        A thread that can take the condition's lock afterwards knows that the task is waiting.
        """
        return self._count(task.ident).acquire(timeout=timeout)
