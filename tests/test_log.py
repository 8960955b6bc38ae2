"""The log, and readers of it that stop, leave or have no room: the server does not wait."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import http.client
import io
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
import tty
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO, cast

import pytest
import yaml

import pipe
from tests import media
from tests.origin import Origin, Playlist
from tests.program import eventually
from tests.server import TIMEOUT, Site, Watch
from tests.test_cli import EXIT_TIME, LOG_LINE
from tests.threads import Task

PIPE = Path(pipe.__file__)
PIPE_ROOM = 65536  # bytes that a pipe holds, on Linux
DROPPED = re.compile(r"\bdropped (\d+) log lines?\b")

Serve = Callable[..., Site]


def live(origin: Origin, name: str = "news") -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(), mode="live"))


#### The program with various kinds of stderr ####


class Program:
    """`python pipe.py` in a separate folder; a test may read `stderr` or leave it unread."""

    def __init__(
        self,
        folder: Path,
        stderr: int | IO[bytes],
        *,
        streams: dict[str, str] | None = None,
        level: str = "debug",
        prefix: Iterable[str] = (),
    ) -> None:
        server = {"host": "127.0.0.1", "port": 0}
        text = yaml.safe_dump({"server": server, "streams": streams or {}})
        (folder / "config.yml").write_text(text, encoding="utf-8")
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(PIPE), "--log-level", level],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
        self.number = self._process.pid
        self._ports: list[int] = []

    @property
    def port(self) -> int:
        """Wait for the port; it is read from the system, because the log may be unreadable."""
        eventually(lambda: bool(self._ports) or self._find_port(), "the program listens")
        return self._ports[0]

    def _find_port(self) -> bool:
        assert self._process.poll() is None, "the program ended"
        own = set()
        for entry in Path(f"/proc/{self.number}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed in the meantime
                own.add(str(entry.readlink()))
        for line in Path(f"/proc/{self.number}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # it listens
                self._ports.append(int(fields[1].partition(":")[2], 16))
        return bool(self._ports)

    def ask(self, path: str = "/health") -> int:
        """The status of an answer, which must arrive within EXIT_TIME."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=EXIT_TIME)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def end(self) -> None:
        """End the program; it must end cleanly and in time."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(EXIT_TIME) == 0

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT)


class Lines:
    """Reads a log up to a line with a pattern, or to its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def until(self, pattern: str) -> list[str]:
        """All lines up to the first with the pattern."""
        return Task(lambda: self._read(re.compile(pattern))).result(TIMEOUT)

    def all(self) -> list[str]:
        return Task(lambda: self._read(None)).result(TIMEOUT)

    def _read(self, wanted: re.Pattern[str] | None) -> list[str]:
        lines: list[str] = []
        while not (wanted and lines and wanted.search(lines[-1])):
            line, end, rest = self._rest.partition(b"\n")
            if end:
                lines.append(line.decode())
                self._rest = rest
                continue
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # the end of a terminal
                data = b""
            if not data:
                assert not wanted, f"{wanted} is not in {lines[-20:]}"
                return lines
            self._rest += data
        return lines


@pytest.fixture
def pipe_ends() -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_ROOM)
    with os.fdopen(reader, "rb", 0), os.fdopen(writer, "wb", 0):
        yield reader, writer


def unread(descriptor: int) -> int:
    """The number of unread bytes in a pipe."""
    buffer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    return int.from_bytes(buffer, sys.byteorder)


def dropped_in(lines: Iterable[str]) -> int:
    return sum(int(found[1]) for line in lines if (found := DROPPED.search(line)))


@pytest.mark.long
def test_unread_log_does_not_stop_the_server(
    origin: Origin, tmp_path: Path, pipe_ends: tuple[int, int]
) -> None:
    """A viewer receives, 20,000 requests are answered, and the program ends in time."""
    reader, writer = pipe_ends
    news = live(origin)
    requests, rounds = 20_000, 20
    with Program(tmp_path, writer, streams={"news": news.url}) as program:
        with Watch(program.port, "/news") as viewer, ThreadPoolExecutor(4) as clients:
            viewer.read(len(media.ts_segments()[0]))
            size = sum(map(len, media.ts_segments())) // 8
            for _ in range(rounds):
                paths = requests // rounds * ["/health"]
                assert set(clients.map(program.ask, paths)) == {200}
                news.advance()
                assert len(viewer.read(size // 2)) == size // 2
        assert unread(reader) > PIPE_ROOM - 4096, "the pipe must be full"
        log = Lines(reader)
        first = log.until(DROPPED.pattern)
        kept = log.until(r"/no-such-stream: 404") if program.ask("/no-such-stream") else []
        assert dropped_in(first) + len(first) + len(kept) > requests
        assert len(first) + len(kept) < 15_000
        with ThreadPoolExecutor(4) as clients:
            assert set(clients.map(program.ask, 2_000 * ["/health"])) == {200}
        assert unread(reader) > PIPE_ROOM - 4096, "the pipe must be full again"
        program.end()


def test_stopped_terminal_does_not_stop_the_server(origin: Origin, tmp_path: Path) -> None:
    """Ctrl+S stops a terminal, and Ctrl+Q continues it."""
    leader, follower = os.openpty()
    with os.fdopen(leader, "r+b", 0), os.fdopen(follower, "wb", 0):
        tty.setraw(follower)
        mode = termios.tcgetattr(follower)
        mode[0] |= termios.IXON
        termios.tcsetattr(follower, termios.TCSANOW, mode)
        news = live(origin)
        with Program(tmp_path, follower, streams={"news": news.url}) as program:
            log = Lines(leader)
            log.until("listening on")
            os.write(leader, b"\x13")
            assert [program.ask(f"/x{number}") for number in range(9)] == 9 * [404]
            with Watch(program.port, "/news") as viewer:
                assert viewer.read(188)[:1] == b"G"
            os.write(leader, b"\x11")
            lines = log.until("news: .* left: ")
            asked = [line for line in lines if re.search(r"GET /x\d: 404", line)]
            assert len(asked) == 9, "a line is lost"
            os.write(leader, b"\x13")
            program.ask()
            program.end()


def test_log_continues_after_its_reader_leaves_and_returns(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with open(fifo, "wb", buffering=0) as writer:
        os.set_blocking(first, True)
        program = Program(tmp_path, writer)
    with program:
        Lines(first).until("listening on")
        os.close(first)
        assert [program.ask(f"/x{number}") for number in range(5)] == 5 * [404]
        second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # the program keeps the other end
        os.set_blocking(second, True)
        with os.fdopen(second, "rb", 0):
            assert program.ask("/y") == 404
            lines = Lines(second).until("GET /y: 404")
        # A request's line is written after its answer: the last lines may be written late.
        assert dropped_in(lines) + sum("GET /x" in line for line in lines) == 5
        assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []
        program.end()


LIMIT = 20_000  # bytes


def test_full_disk_costs_only_lines_of_the_log(tmp_path: Path) -> None:
    """A file that cannot grow may end within a line; once it has room, whole lines follow."""
    file = tmp_path / "log"
    with open(file, "ab") as log:
        program = Program(tmp_path, log)
        resource.prlimit(program.number, resource.RLIMIT_FSIZE, (LIMIT, 2 * LIMIT))
    with program:
        for number in range(500):
            assert program.ask(f"/x{number}") == 404
        assert file.stat().st_size == LIMIT
        resource.prlimit(program.number, resource.RLIMIT_FSIZE, (2 * LIMIT, 2 * LIMIT))
        assert program.ask("/y") == 404
        eventually(lambda: "GET /y: 404" in file.read_text(), "the line is written")
        program.end()
    before, after = file.read_bytes()[:LIMIT].decode(), file.read_bytes()[LIMIT:].decode()
    assert after.startswith("\n"), "the incomplete line must end before the next one"
    written = len(re.findall(r"GET /x\d+: 404\n", before + after))
    # The incomplete line counts as dropped, however much of it was written.
    assert dropped_in(after.splitlines()) + written == 500
    lines = [*before.splitlines()[:-1], *after.splitlines()[1:]]
    assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []


def test_disk_without_any_room_does_not_stop_the_server(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full, Program(tmp_path, full) as program:
        assert [program.ask() for _ in range(9)] == 9 * [200]
        program.end()


def test_stderr_may_be_closed(tmp_path: Path) -> None:
    """No socket takes its number; otherwise a viewer would receive other programs' messages."""
    prefix = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    with Program(tmp_path, subprocess.DEVNULL, prefix=prefix) as program:
        assert [program.ask() for _ in range(9)] == 9 * [200]
        assert Path(f"/proc/{program.number}/fd/2").readlink() == Path(os.devnull)
        program.end()


def test_mistake_is_not_written_if_stderr_is_closed(tmp_path: Path) -> None:
    """stdout stays empty, because another program may read it."""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, str(PIPE)]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (2, b"")


def test_non_blocking_pipe_loses_nothing(tmp_path: Path, pipe_ends: tuple[int, int]) -> None:
    """Another user of the pipe may have set this mode. The pipe cannot hold 2,000 lines."""
    reader, writer = pipe_ends
    os.set_blocking(writer, False)
    count = 2_000
    with Program(tmp_path, writer) as program, ThreadPoolExecutor(4) as clients:
        paths = [f"/x{number}" for number in range(count)]
        assert set(clients.map(program.ask, paths)) == {404}
        assert unread(reader) > PIPE_ROOM - 4096, "the pipe must be full"
        log = Lines(reader)
        assert program.ask("/y") == 404
        lines = log.until("GET /y: 404")
        found = {match[1] for line in lines if (match := re.search(r"GET (/x\d+): 404$", line))}
        assert found == set(paths)
        assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []
        program.end()


def test_failure_of_a_finalizer_is_written_to_the_log() -> None:
    """Python itself would write it to stderr, and block the thread until stderr is read."""
    lines = (
        "import pipe, logging",
        "pipe.set_up_logging('info')",
        "Odd = type('Odd', (), {'__del__': lambda self: 1 / 0})",
        "odd = Odd()",
        "del odd",
        "logging.shutdown()",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=PIPE.parent, capture_output=True, encoding="utf-8", check=True, timeout=TIMEOUT,
    )  # fmt: skip
    written = done.stderr.splitlines()
    assert LOG_LINE.fullmatch(written[0])
    assert "Exception ignored in" in written[0]
    assert written[-1] == "ZeroDivisionError: division by zero"


#### Under systemd ####


def journal(descriptor: int) -> list[str]:
    """The start of a command; its environment states that the journal reads this stream."""
    status = os.fstat(descriptor)
    return ["env", f"JOURNAL_STREAM={status.st_dev}:{status.st_ino}"]


def test_journal_lines_have_a_priority_and_no_time(
    tmp_path: Path, pipe_ends: tuple[int, int]
) -> None:
    reader, writer = pipe_ends
    streams = {"news": "http://127.0.0.1:1/news.m3u8"}
    with Program(tmp_path, writer, streams=streams, prefix=journal(writer)) as program:
        assert program.ask("/y") == 404
        assert program.ask("/news") == 502
        lines = Lines(reader).until("<4>warning news: ")
        assert [line for line in lines if not re.match(r"<[3467]>(?!\d{4}-)", line)] == []
        assert [line for line in lines if re.match("<6>info StreamPipe .* listening on ", line)]
        assert [line for line in lines if re.match("<7>debug .*GET /y: 404$", line)]
        program.end()


def test_each_journal_line_of_a_traceback_has_a_priority(pipe_ends: tuple[int, int]) -> None:
    """The journal reads each line separately; a line without a priority would count as info."""
    reader, writer = pipe_ends
    lines = (
        "import pipe, logging, threading",
        "pipe.set_up_logging('info')",
        "thread = threading.Thread(target=lambda: 1 / 0)",
        "thread.start()",
        "thread.join()",
        "logging.shutdown()",
    )
    command = [*journal(writer), sys.executable, "-c", "\n".join(lines)]
    subprocess.run(command, cwd=PIPE.parent, stderr=writer, check=True, timeout=TIMEOUT)
    found = Lines(reader).until("ZeroDivisionError")
    assert len(found) > 3
    assert {line[:3] for line in found} == {"<3>"}


def test_mistakes_are_errors_in_the_journal(tmp_path: Path, pipe_ends: tuple[int, int]) -> None:
    reader, writer = pipe_ends
    command = [*journal(writer), sys.executable, str(PIPE)]
    done = subprocess.run(command, cwd=tmp_path, stderr=writer, check=False, timeout=TIMEOUT)
    assert done.returncode == 2
    assert Lines(reader).until("no such file")[0].startswith("<3>config.yml: no such file; ")


def test_lines_have_times_if_stderr_is_not_the_journal(
    tmp_path: Path, pipe_ends: tuple[int, int]
) -> None:
    """A program with a redirected stderr still inherits the journal's variable."""
    reader, writer = pipe_ends
    with open(os.devnull, "rb") as other:
        prefix = journal(other.fileno())
    with Program(tmp_path, writer, prefix=prefix) as program:
        assert program.ask("/y") == 404
        lines = Lines(reader).until("GET /y: 404$")
        assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []
        program.end()


#### The handler ####


class Reader(io.RawIOBase):
    """A stream whose reader stops at a text, until `reads_on` is set."""

    def __init__(self, stops_at: str = "") -> None:
        self._stops_at = stops_at.encode()
        self._data = bytearray()
        self.has_stopped, self.reads_on = threading.Event(), threading.Event()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._stops_at in bytes(data):
            self.has_stopped.set()
            self.reads_on.wait(2 * TIMEOUT)
        self._data += data
        return len(data)

    @property
    def lines(self) -> list[str]:
        return self._data.decode().splitlines()


def text_of(reader: Reader, encoding: str) -> TextIO:
    return io.TextIOWrapper(cast(Any, reader), encoding)


class Log:
    """A log that writes to a reader; the reader has stopped at the first line."""

    def __init__(self) -> None:
        self.reader = Reader()
        before = set(threading.enumerate())
        self.handler = pipe.LogHandler(text_of(self.reader, "ascii"))
        self.handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        (self._thread,) = set(threading.enumerate()) - before
        self.write(logging.INFO, "first")
        assert self.reader.has_stopped.wait(TIMEOUT)

    def write(self, level: int, words: str, *arguments: object, error: Any = None) -> None:
        record = logging.LogRecord("x", level, __file__, 1, words, arguments, error)
        self.handler.handle(record)

    def read_on(self) -> list[str]:
        """All lines after the first, once the log is closed and its thread has ended."""
        self.reader.reads_on.set()
        self.handler.close()
        self._thread.join(TIMEOUT)
        assert self.reader.lines[0] == "info first"
        return self.reader.lines[1:]


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    log.reader.reads_on.set()
    log.handler.close()


def test_log_keeps_ten_thousand_waiting_lines(log: Log) -> None:
    for number in range(10_007):
        log.write(logging.INFO, "line %d", number)
    report, *lines = log.read_on()
    assert re.fullmatch(r"warning dropped 7 log lines: .*", report)
    assert lines == [f"info line {number}" for number in range(10_000)]


def test_dropped_lines_are_reported_once(log: Log) -> None:
    for number in range(10_001):
        log.write(logging.INFO, "line %d", number)
    log.reader.reads_on.set()
    eventually(lambda: log.reader.lines[-1:] == ["info line 9999"], "all lines are written")
    assert "dropped 1 log line:" in log.reader.lines[1]
    log.write(logging.INFO, "another")
    assert log.read_on()[-2:] == ["info line 9999", "info another"]


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_warnings_and_errors_displace_the_oldest_lesser_lines(log: Log, level: int) -> None:
    log.write(level, "before")
    for number in range(9_999):
        log.write(logging.DEBUG if number % 2 else logging.INFO, "line %d", number)
    for number in range(3):
        log.write(level, "trouble %d", number)
    report, before, *lines = log.read_on()
    name = logging.getLevelName(level)
    assert "dropped 3 log lines:" in report
    assert before == f"{name} before", "an older line of the same level must stay"
    assert [line.split(" ", 1)[1] for line in lines[:-3]] == [f"line {n}" for n in range(3, 9_999)]
    assert lines[-3:] == [f"{name} trouble {number}" for number in range(3)]


def test_lesser_lines_displace_nothing(log: Log) -> None:
    for number in range(10_000):
        log.write(logging.DEBUG, "line %d", number)
    log.write(logging.INFO, "another")
    _, *lines = log.read_on()
    assert lines == [f"debug line {number}" for number in range(10_000)]


def test_error_displaces_a_warning_if_there_is_no_lesser_line(log: Log) -> None:
    for number in range(10_000):
        log.write(logging.WARNING, "line %d", number)
    log.write(logging.WARNING, "another")
    log.write(logging.ERROR, "trouble")
    report, *lines = log.read_on()
    assert "dropped 2 log lines:" in report
    assert lines == [*(f"warning line {number}" for number in range(1, 10_000)), "error trouble"]


def test_waiting_lines_are_bounded_in_bytes(log: Log) -> None:
    """At debug level, clients determine the length of a line."""
    for _ in range(1_000):
        log.write(logging.DEBUG, "%s", 65_536 * "x")
    log.write(logging.ERROR, "trouble")
    report, *lines = log.read_on()
    assert sum(map(len, lines)) < 16 * 1024 * 1024
    assert dropped_in([report]) == 1_001 - len(lines)
    assert lines[-1] == "error trouble"


def test_waiting_line_keeps_no_objects_alive(log: Log) -> None:
    """A record with a traceback would keep all local variables of its frames."""

    class Window: ...

    def fail() -> tuple[weakref.ref[Window], tuple[type, Exception, TracebackType | None]]:
        window = Window()
        try:
            raise RuntimeError("broken")
        except RuntimeError as error:
            return weakref.ref(window), (type(error), error, error.__traceback__)

    window, error = fail()
    log.write(logging.ERROR, "failed: %s", window(), error=error)
    del error
    gc.collect()
    assert window() is None
    assert "RuntimeError: broken" in log.read_on()


def test_line_that_cannot_be_formatted_is_reported_in_the_log(log: Log) -> None:
    log.write(logging.INFO, "%d lines", "no")
    log.write(logging.INFO, "another")
    report, another = log.read_on()
    assert report == "error a log line of test_log.py:1 cannot be formatted"
    assert another == "info another"


def test_characters_outside_the_encoding_are_escaped(log: Log) -> None:
    log.write(logging.INFO, "Zürich")
    assert log.read_on() == [r"info Z\xfcrich"]


def test_flush_waits_at_most_a_second(log: Log) -> None:
    log.write(logging.INFO, "another")
    flush = Task(log.handler.flush)
    flush.result(TIMEOUT)
    assert log.reader.lines == []
    assert log.read_on() == ["info another"], "the flush must lose nothing"


def test_finalizer_may_log_while_another_line_is_formatted(log: Log) -> None:
    """The garbage collector runs it in any thread, even in one that holds the log's lock."""

    class Odd:
        def __str__(self) -> str:
            log.write(logging.WARNING, "within")
            return "odd"

    Task(lambda: log.write(logging.INFO, "%s", Odd())).result()
    assert log.read_on() == ["warning within", "info odd"]


#### A server whose log is stuck ####


@pytest.mark.parametrize("words", ["started watching (HLS)", " left: "])
def test_stuck_log_does_not_delay_answers(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    """Even the client that the line is about does not wait."""
    caplog.set_level(logging.INFO, "streampipe")
    stuck = Reader(words)
    handler = pipe.LogHandler(text_of(stuck, "utf-8"))
    pipe.log.addHandler(handler)
    site = serve({"news": live(origin).url}, linger=0)
    try:
        assert Task(lambda: site.get("/news.m3u8").status).result(TIMEOUT) == 200
        assert stuck.has_stopped.wait(TIMEOUT)
        assert site.get("/health").status == 200
        assert site.watch("/news").read(188)[:1] == b"G"
        assert [line for line in stuck.lines if words in line] == []
    finally:
        stuck.reads_on.set()
        pipe.log.removeHandler(handler)
        handler.flush()
        handler.close()
    assert [words in line for line in stuck.lines].count(True) >= 1
