"""StreamPipe and its peers, each in separate processes, and the origin that they read from.

An origin serves a film and a live channel on loopback, each with a multivariant playlist, 5.2
Mbit/s and segments of 4 s. The slow origin answers after 50 ms and sends 20 Mbit/s on each
connection, like a CDN. The fast origin has no limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests import media
from tests.origin import Origin, Playlist, Segment, master
from tests.program import Service, status_of

FOLDER = Path(__file__).resolve().parent.parent

SEGMENT_SECONDS = 4.0
BITRATE = 5_000_000  # bit/s of the picture alone
DISTINCT = 8  # segments; longer media repeats them
LIVE_WINDOW = 6  # segments
DELAY = 0.05  # seconds before each answer of the slow origin
RATE = 20_000_000 / 8  # bytes a second on each connection of the slow origin
THREADS = 4  # downloads at once, if a program supports this

PATIENCE = 60.0  # seconds that an answer may take
LIFE = 3600.0  # seconds after which a process is killed in any case
CPUCLOCK_SCHED = 2  # Linux: a CPU clock that counts nanoseconds


#### Processes ####


@contextlib.contextmanager
def process(
    *command: str, as_nobody: bool = False, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that ends with the block; its output can be read.

    `more` are further environment variables. Use `as_nobody` for VLC and Icecast, which refuse to
    run as root.
    """
    user = "nobody" if as_nobody and os.geteuid() == 0 else None
    child = subprocess.Popen(
        command, cwd=FOLDER, bufsize=0, env={**os.environ, **more}, user=user,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        extra_groups=None if user is None else [],
    )  # fmt: skip
    timer = threading.Timer(LIFE, child.kill)
    timer.daemon = True
    timer.start()
    try:
        yield child
    finally:
        timer.cancel()
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()


@contextlib.contextmanager
def drained(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Read and discard the child's output, so that it never blocks on a full pipe."""
    reader = threading.Thread(target=output(child).read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        child.terminate()
        reader.join(PATIENCE)


def output(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout
    return child.stdout


def wait_for_line(child: subprocess.Popen[bytes], pattern: bytes) -> bytes:
    """The match of the pattern's group in the first line that has it."""
    lines = b""
    for line in output(child):
        lines += line
        if match := re.search(pattern, line):
            return match[1]
    raise RuntimeError(f"it did not start: {lines.decode()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


#### The origin ####


@dataclass(frozen=True)
class Source:
    """A running origin, with the addresses of its streams."""

    film: str
    live: str
    size: int  # bytes of the film
    segments: int  # of the film
    child: subprocess.Popen[bytes]

    def requests(self) -> int:
        """The number of requests since the last call."""
        assert self.child.stdin
        self.child.stdin.write(b"\n")
        return int(output(self.child).readline())


@contextlib.contextmanager
def origin(segments: int, *, slow: bool) -> Iterator[Source]:
    """An origin with a film of `segments` segments and a live channel."""
    kind = "slow" if slow else "fast"
    with process(sys.executable, "-m", "tests.peers", str(segments), kind) as child:
        yield Source(**json.loads(output(child).readline()), segments=segments, child=child)


def serve_origin(segments: int, kind: str) -> None:
    """The child's part of `origin`: serves until its standard input is closed."""
    distinct = media.ts_segments(DISTINCT, SEGMENT_SECONDS, bitrate=BITRATE)
    parts = [Segment(data, SEGMENT_SECONDS) for data in distinct]
    film = [parts[number % DISTINCT] for number in range(segments)]
    playlists = {
        "film": Playlist("film", film),
        "live": Playlist("live", parts, mode="live", window=LIVE_WINDOW, clock=True),
    }
    with Origin() as running:
        if kind == "slow":
            running.delay, running.rate = DELAY, RATE
        facts: dict[str, object] = {
            name: running.add(master(f"{name}-all", {"720p": playlist})).url
            for name, playlist in playlists.items()
        }
        print_line(json.dumps(facts | {"size": sum(len(part.data) for part in film)}))
        for _ in sys.stdin:
            print_line(str(len(running.requests)))
            running.clear_requests()


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


#### Programs that serve ####


Place = tuple[int, str]  # port and path of a stream


@dataclass(frozen=True)
class Server:
    """A program, made of these processes, that serves live channels or the film."""

    processes: tuple[int, ...]
    channels: tuple[Place, ...] = ()
    film: Place = (0, "")

    def cpu(self) -> float:
        """User and system seconds so far."""
        return sum(_cpu_of(number) for number in self.processes)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return 1024 * sum(status_of(number, "VmRSS") for number in self.processes)

    @property
    def threads(self) -> int:
        return sum(status_of(number, "Threads") for number in self.processes)


def _cpu_of(number: int) -> float:
    """The CPU seconds of a process, by the clock that clock_getcpuclockid(3) returns.

    /proc counts in ticks of 10 ms, and a small crowd uses only four or five of them in 8 s.
    """
    return time.clock_gettime((~number << 3) | CPUCLOCK_SCHED)


@contextlib.contextmanager
def streampipe(source: Source, channels: int = 1) -> Iterator[Server]:
    """pipe.py with this many live channels and the film."""
    live = {f"live-{number}": f"{source.live}?{number}" for number in range(channels)}
    options = {"threads": THREADS, "linger": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        Service(
            Path(folder), {**live, "film": source.film}, options=options, max_viewers=0
        ) as service,
    ):
        places = tuple((service.port, f"/{name}") for name in live)
        yield Server((service.number,), places, film=(service.port, "/film"))


@contextlib.contextmanager
def streamlink(source: Source, *options: str) -> Iterator[Server]:
    """streamlink's built-in server, which has one viewer at a time, with the film."""
    with tempfile.TemporaryDirectory() as home:
        command = (
            sys.executable, "-m", "streamlink", "--stream-segment-threads", str(THREADS), *options,
            "--player-external-http", "--player-external-http-interface", "127.0.0.1",
            source.film, "best",
        )  # fmt: skip
        with process(*command, HOME=home, PYTHONUNBUFFERED="1") as child:
            port = int(wait_for_line(child, rb"  http://127\.0\.0\.1:(\d+)/"))
            with drained(child):
                yield Server((child.pid,), film=(port, "/"))


@contextlib.contextmanager
def vlc(source: Source, channels: int) -> Iterator[Server]:
    """VLC's HTTP output: a process for each channel."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)
        places, numbers = [], []
        for _ in range(channels):
            place = free_port(), "/live"
            output_to = f"#standard{{access=http,mux=ts,dst=127.0.0.1:{place[0]}{place[1]}}}"
            command = ("cvlc", "--intf", "dummy", "--no-color", source.live, "--sout", output_to)
            child = stack.enter_context(process(*command, as_nobody=True, HOME=home))
            stack.enter_context(drained(child))
            places.append(place)
            numbers.append(child.pid)
        for place in places:
            wait_for_media(*place)
        yield Server(tuple(numbers), tuple(places))


ICECAST = """<icecast>
<limits><clients>4096</clients><sources>64</sources><queue-size>8388608</queue-size></limits>
<authentication><source-password>bench</source-password><admin-user>admin</admin-user>
<admin-password>bench</admin-password></authentication><hostname>localhost</hostname>
<listen-socket><port>{port}</port><bind-address>127.0.0.1</bind-address></listen-socket>
<paths><logdir>{folder}</logdir><webroot>{folder}</webroot><adminroot>{folder}</adminroot></paths>
</icecast>"""


@contextlib.contextmanager
def icecast(source: Source, channels: int) -> Iterator[Server]:
    """Icecast, with an ffmpeg for each channel; it disconnects viewers that are 8 MiB behind."""
    port = free_port()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        file = Path(folder) / "icecast.xml"
        file.write_text(ICECAST.format(port=port, folder=folder))
        children = [stack.enter_context(process("icecast2", "-c", str(file), as_nobody=True))]
        wait_for(port)
        places = [(port, f"/live-{number}.ts") for number in range(channels)]
        for _, path in places:
            target = f"icecast://source:bench@127.0.0.1:{port}{path}"
            command = (
                "ffmpeg", "-nostdin", "-loglevel", "quiet", "-i", source.live, "-c", "copy",
                "-f", "mpegts", "-content_type", "video/mp2t", target,
            )  # fmt: skip
            children.append(stack.enter_context(process(*command)))
        for child in children:
            stack.enter_context(drained(child))
        for place in places:
            wait_for_media(*place)
        yield Server(tuple(child.pid for child in children), tuple(places))


def wait_for(port: int) -> None:
    _until(lambda: socket.create_connection(("127.0.0.1", port), PATIENCE).close())


def wait_for_media(port: int, path: str) -> None:
    _until(lambda: pull(port, path, limit=1))


def _until(attempt: Callable[[], object]) -> None:
    """Retry until the attempt succeeds; once PATIENCE is over, raises its last error."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while True:
        try:
            attempt()
        except (OSError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            pause.wait(0.1)
        else:
            return


#### Viewers ####


@dataclass(frozen=True)
class Pull:
    """What one viewer measured for one stream."""

    first: float  # seconds from the request to the first byte of media
    total: float  # seconds to the last
    size: int  # bytes


def pull(port: int, path: str, limit: float = float("inf")) -> Pull:
    """Receives a stream, or `limit` bytes of it, over HTTP/1.0: its body is only media."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (byte := sock.recv(1)):
                raise RuntimeError(f"no answer: {head!r}")
            head += byte
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"{path}: {head!r}")
        return _throw_away(sock.recv_into, began, limit)


def pull_ffmpeg(address: str) -> Pull:
    """The same for the standard output of ffmpeg; the times include its start."""
    began = time.monotonic()
    quiet = ("ffmpeg", "-nostdin", "-loglevel", "quiet")
    with process(*quiet, "-i", address, "-c", "copy", "-f", "mpegts", "-") as child:
        number = output(child).fileno()
        result = _throw_away(lambda room: os.readv(number, [room]), began)
        child.wait(PATIENCE)
    return result


def _throw_away(
    read: Callable[[memoryview], int], began: float, limit: float = float("inf")
) -> Pull:
    room = memoryview(bytearray(1 << 20))
    first, size = 0.0, 0
    while size < limit and (count := read(room)):
        size += count
        first = first or time.monotonic() - began
    return Pull(first, time.monotonic() - began, size)


def first_byte(port: int, path: str, times: int) -> float:
    """The median of the seconds to a first byte, for viewers that leave after it."""
    return statistics.median(pull(port, path, limit=1).first for _ in range(times))


def is_installed(program: str) -> bool:
    return shutil.which(program) is not None


if __name__ == "__main__":
    serve_origin(int(sys.argv[1]), sys.argv[2])
