"""The program as a real process that serves a configuration, and the system's figures for it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from tests.server import TIMEOUT
from tests.test_cli import Program


def eventually(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Return once `condition` holds; polls, because nothing notifies of the change.

    `what` completes the message "not within 20 s: ...".
    """
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        pause.wait(0.01)


def status_of(number: int, name: str) -> int:
    """A field of a process's status in Linux: its threads, or KiB of memory."""
    text = Path(f"/proc/{number}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)", text, re.M)
    assert found
    return int(found[1])


class Service(Program):
    """A running `python pipe.py` with these streams on a free port."""

    def __init__(
        self, folder: Path, streams: Mapping[str, object], *, level: str = "info", **more: object
    ) -> None:
        self._folder = folder
        self.configure(streams, **more)
        super().__init__("--log-level", level, cwd=folder)
        try:
            self.port = self.listening_port()
        except BaseException:
            self.close()
            raise

    def configure(self, streams: Mapping[str, object], **more: object) -> None:
        """Write the file; `more` are its other sections, or settings of `server:`."""
        sections: dict[str, object] = {}
        for key in ("options", "playlists"):
            if key in more:
                sections[key] = more.pop(key)
        server = {"host": "127.0.0.1", "port": 0, **more}
        tree = {"server": server, "streams": dict(streams), **sections}
        self.write(yaml.safe_dump(tree, sort_keys=False))

    def write(self, text: str) -> None:
        (self._folder / "config.yml").write_text(text, encoding="utf-8")

    def wait_for_count(self, pattern: str, count: int) -> None:
        """Wait until `count` lines on stderr match the pattern."""
        with self._read:
            self._read.wait_for(lambda: self._is_closed or self.count(pattern) >= count, TIMEOUT)
            assert self.count(pattern) >= count, f"{pattern!r} is not in {self._lines}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in tuple(self._lines))

    @property
    def lines(self) -> list[str]:
        """The lines on stderr so far."""
        with self._read:
            return list(self._lines)

    # Figures that Linux has for every process.

    @property
    def number(self) -> int:
        return self._process.pid

    @property
    def threads(self) -> int:
        return status_of(self.number, "Threads")

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return 1024 * status_of(self.number, "VmRSS")

    @property
    def descriptors(self) -> int:
        return len(self._open_files())

    @property
    def sockets(self) -> int:
        return sum(name.startswith("socket:") for name in self._open_files())

    def _open_files(self) -> list[str]:
        return list(self._links(Path(f"/proc/{self.number}/fd")))

    @staticmethod
    def _links(folder: Path) -> Iterator[str]:
        for entry in folder.iterdir():
            with suppress(OSError):  # it was closed in the meantime
                yield str(entry.readlink())

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
