"""Real threads that a test starts, waits for and catches at waiting."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from unittest import mock

TIMEOUT = 10.0  # seconds; nothing a test waits for takes as long

T = TypeVar("T")


class Task(Generic[T]):
    """A function that runs in a thread of its own; `result` waits for it and has its outcome."""

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
            raise TimeoutError("the thread still runs")
        if self._error:
            raise self._error
        return self._values[0]


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    """Serve until the end of the block, from a thread; yields the address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Observed(threading.Condition):
    """A condition in the place of another, to know when a thread waits for it.

    Once `saw_wait` is true, the thread has let go of the lock: whoever takes it now finds the
    thread waiting.
    """

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self._waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.release()
        return super().wait(timeout)

    def saw_wait(self, timeout: float = TIMEOUT) -> bool:
        """Whether a thread begins to wait, counting each time once."""
        return self._waits.acquire(timeout=timeout)


class Waits:
    """Which threads wait for conditions that were made within `observing()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, threading.Semaphore] = {}  # by thread

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Have conditions that are made in this block observed."""
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
        """Whether a task begins to wait, counting each time once.

        Then it has let go of the lock: a thread that takes the lock now finds the task waiting.
        """
        return self._count(task.ident).acquire(timeout=timeout)
