"""How fast StreamPipe is, beside stock streamlink and ffmpeg in the same run, on loopback.

    python tests/bench.py [--quick]

The origin, each server and each client of streamlink or ffmpeg are processes of their own; the
viewer is this one, which throws bytes away as cheaply as it can. Two origins serve a channel of
4 s segments of 2.6 MB behind a multivariant playlist: a slow one, which answers after 50 ms and
sends 20 Mbit/s on each connection, and a fast one, which is as fast as it can be.

first byte   from the request to the first byte of media; of stock streamlink from resolving on,
             without the time its imports take; of ffmpeg with its start, which takes little
total        30 segments of a film from the slow origin, 4 threads; streamlink's
             hls-segment-stream-data has no such limit and opens a connection for each segment
CPU/GB       user and system time for each GB (10**9 bytes) pulled from the fast origin, one viewer

The second table is of crowds: so many viewers of so many live channels of 5.2 Mbit/s from the fast
origin, who throw bytes away in the kernel, from one epoll loop.

CPU/GB       user and system time of the server for each GB delivered
bare         the same for as many threads that send as much from memory, and nothing else
memory       the server's resident memory at the end; threads likewise
skips        jumps of viewers that fell behind

What is told as a median comes with how often it was measured. Absolute times differ from machine
to machine; what counts is how the rows compare.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

if __name__ == "__main__":
    # Run as a script, Python looks for modules in this folder instead of the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests import media
from tests.origin import Origin, Playlist, Segment, master

PROGRAM = Path(__file__).resolve().parent.parent / "pipe.py"

SEGMENT_SECONDS = 4.0
SEGMENT_BYTES = 2_600_000
DISTINCT = 8  # segments; longer films repeat them
THREADS = 4
DELAY = 0.05  # seconds before each answer of the slow origin
RATE = 20_000_000 / 8  # bytes a second on each of its connections
LIVE_WINDOW = 6  # segments

PATIENCE = 120.0  # seconds that any one thing may take
GB = 10**9
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    segments: int = 30  # of the film on the slow origin
    fast_segments: int = 240  # of the film on the fast one: 0.6 GB
    colds: int = 5  # first bytes of a cold channel
    warms: int = 20  # first bytes of a running channel
    crowds: tuple[tuple[int, int], ...] = ((1, 1), (100, 1), (1000, 1), (200, 20))
    crowd_seconds: float = 20


QUICK = Plan(
    segments=8, fast_segments=60, colds=3, warms=10, crowds=((20, 1), (20, 5)), crowd_seconds=6
)


@dataclass(frozen=True)
class Row:
    """A line of the table; None is what was not measured."""

    name: str
    first: float | None = None  # seconds
    total: float | None = None  # seconds
    cpu: float | None = None  # seconds for each GB


@dataclass(frozen=True)
class Pull:
    """What one reader saw of one stream."""

    first: float  # seconds to the first byte
    total: float  # seconds to the last
    size: int  # bytes


#### Processes ####


@contextlib.contextmanager
def process(*command: str, errors: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child with its output to be read, which does not outlive the block."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
    )
    timer = threading.Timer(PATIENCE, child.kill)
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
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream:
                stream.close()


def ourselves(*arguments: str) -> Sequence[str]:
    return (sys.executable, str(Path(__file__).resolve()), *arguments)


def output(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout
    return child.stdout


def children_cpu() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of(pid: int) -> float | None:
    """CPU seconds of a running process; None where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold spaces
    return (int(fields[11]) + int(fields[12])) / TICKS


#### The origin ####


@dataclass(frozen=True)
class Source:
    """Addresses at an origin."""

    film: str
    live: str
    size: int  # bytes of the film


@contextlib.contextmanager
def origin(segments: int, *, slow: bool) -> Iterator[Source]:
    """An origin in a process of its own, with a film of so many segments and a live channel."""
    speed = ["--slow"] if slow else []
    with process(*ourselves("--origin", str(segments), *speed)) as child:
        yield Source(**json.loads(output(child).readline()))


def serve_origin(segments: int, slow: bool) -> None:
    """The child's part of `origin`: until its standard input is closed."""
    parts = [
        Segment(media.padded(data, SEGMENT_BYTES), SEGMENT_SECONDS)
        for data in media.ts_segments(DISTINCT)
    ]
    film = Playlist("film", [parts[number % DISTINCT] for number in range(segments)])
    live = Playlist("live", parts, mode="live", window=LIVE_WINDOW, clock=True)
    with Origin() as running:
        if slow:
            running.delay, running.rate = DELAY, RATE
        addresses = [
            running.add(master(playlist.name + "-all", {"720p": playlist})).url
            for playlist in (film, live)
        ]
        size = sum(len(parts[number % DISTINCT].data) for number in range(segments))
        print_line(json.dumps({"film": addresses[0], "live": addresses[1], "size": size}))
        sys.stdin.read()


#### Readers ####


def pull(read: Callable[[memoryview], int], began: float, limit: float = math.inf) -> Pull:
    """Throws away what comes, to its end or until `limit` bytes of it were there."""
    room = memoryview(bytearray(1 << 20))
    first, size = 0.0, 0
    while size < limit and (count := read(room)):
        size += count
        first = first or time.monotonic() - began
    return Pull(first, time.monotonic() - began, size)


def pull_http(port: int, path: str, limit: float = math.inf) -> Pull:
    """A viewer's request, over HTTP/1.0: the body is nothing but media."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte:
                raise RuntimeError(f"no answer: {head!r}")
            head += byte
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"{path}: {head!r}")
        return pull(sock.recv_into, began, limit)


def pull_process(*command: str) -> Pull:
    """What a program writes to its standard output; its start counts."""
    began = time.monotonic()
    with process(*command, errors=subprocess.DEVNULL) as child:
        number = output(child).fileno()
        result = pull(lambda room: os.readv(number, [room]), began)
        child.wait(PATIENCE)
    return result


def complete(result: Pull, size: int) -> Pull:
    """The same, if it is all there is."""
    if result.size != size:
        raise RuntimeError(f"{result.size} bytes instead of {size}")
    return result


#### StreamPipe ####


@dataclass(frozen=True)
class Server:
    port: int
    pid: int

    def cpu(self) -> float | None:
        return cpu_of(self.pid)


@contextlib.contextmanager
def streampipe(source: Source, linger: float = 0, channels: int = 0) -> Iterator[Server]:
    """pipe.py with the origin's streams, in a process of its own; `live-N` are all the same."""
    streams = {"film": source.film, "live": source.live}
    streams |= {f"live-{number}": f"{source.live}?{number}" for number in range(channels)}
    config = {
        "server": {"host": "127.0.0.1", "port": 0, "max_viewers": 0},
        "options": {"threads": THREADS, "linger": linger},
        "streams": streams,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yml"
        file.write_text(json.dumps(config))  # which is YAML, too
        command = (sys.executable, str(PROGRAM), "-c", str(file))
        with process(*command, errors=subprocess.PIPE) as child:
            assert child.stderr
            port = listening_port(child.stderr)
            drain = threading.Thread(target=child.stderr.read, daemon=True)
            drain.start()
            yield Server(port, child.pid)
            child.terminate()
            drain.join(PATIENCE)


def listening_port(lines: IO[bytes]) -> int:
    told = b""
    for line in lines:
        told += line
        if match := re.search(rb"listens on .* port (\d+)", line):
            return int(match[1])
    raise RuntimeError(f"the server did not start: {told.decode()}")


def first_bytes(times: int, port: int, path: str) -> float:
    """The median of the time to a first byte, of viewers that leave after it."""
    return statistics.median(pull_http(port, path, limit=1).first for _ in range(times))


def measure_streampipe(plan: Plan, slow: Source, fast: Source) -> Iterator[Row]:
    with streampipe(slow) as server:
        # What has an end is opened anew for each viewer: every start is a cold one.
        first = first_bytes(plan.colds, server.port, "/film")
        whole = complete(pull_http(server.port, "/film"), slow.size)
    cold = Row(f"StreamPipe, cold ({plan.colds})", first, whole.total)
    with streampipe(fast) as server:
        yield replace(cold, cpu=server_cpu(server, fast))
    with streampipe(slow, linger=PATIENCE) as server:
        pull_http(server.port, "/live", limit=SEGMENT_BYTES)
        warm = first_bytes(plan.warms, server.port, "/live")
        yield Row(f"StreamPipe, running channel ({plan.warms})", warm)


def server_cpu(server: Server, fast: Source) -> float | None:
    """CPU seconds of the server for each GB that one viewer pulls."""
    pull_http(server.port, "/film", limit=SEGMENT_BYTES)  # what is only done once
    before = server.cpu()
    complete(pull_http(server.port, "/film"), fast.size)
    after = server.cpu()
    if before is None or after is None:
        return None
    return (after - before) / fast.size * GB


#### Stock streamlink ####


def run_streamlink(address: str, stream_data: bool) -> None:
    """The child's part: pulls a film with streamlink's API and tells what it saw."""
    from streamlink.session.session import Streamlink

    session = Streamlink()
    session.set_option("stream-segment-threads", THREADS)
    session.set_option("hls-segment-stream-data", stream_data)
    cpu, began = time.process_time(), time.monotonic()
    stream = session.streams(address)["best"].open()
    with contextlib.closing(stream):
        first, size = 0.0, 0
        while data := stream.read(65536):
            first = first or time.monotonic() - began
            size += len(data)
        told = {"first": first, "total": time.monotonic() - began, "size": size}
    print_line(json.dumps({"pull": told, "cpu": time.process_time() - cpu}))


def streamlink(address: str, size: int, *, stream_data: bool) -> tuple[Pull, float]:
    """What a child saw, and the CPU seconds it took."""
    mode = ["--stream-data"] if stream_data else []
    with process(*ourselves("--streamlink", address, *mode), errors=subprocess.DEVNULL) as child:
        told = json.loads(output(child).readline())
    return complete(Pull(**told["pull"]), size), told["cpu"]


def measure_streamlink(plan: Plan, slow: Source, fast: Source) -> Iterator[Row]:
    for name, stream_data in (("default", False), ("hls-segment-stream-data", True)):
        whole, _ = streamlink(slow.film, slow.size, stream_data=stream_data)
        _, cpu = streamlink(fast.film, fast.size, stream_data=stream_data)
        yield Row(f"streamlink, {name}", whole.first, whole.total, cpu / fast.size * GB)


#### ffmpeg ####


def ffmpeg(address: str) -> Pull:
    quiet = ["-nostdin", "-loglevel", "quiet"]
    return pull_process("ffmpeg", *quiet, "-i", address, "-c", "copy", "-f", "mpegts", "-")


def measure_ffmpeg(plan: Plan, slow: Source, fast: Source) -> Iterator[Row]:
    if not shutil.which("ffmpeg"):
        yield Row("ffmpeg (not installed)")
        return
    whole = ffmpeg(slow.film)
    before = children_cpu()
    ffmpeg(fast.film)
    # It leaves the null packets out, so the bytes are those that it pulled.
    cpu = (children_cpu() - before) / fast.size * GB
    yield Row("ffmpeg -c copy", whole.first, whole.total, cpu)


#### Crowds ####

WARM_UP = 6.0  # seconds for the burst that each viewer gets at first
BLOCK = 65_424  # bytes that a bare thread sends at once: as much as a block of a window


@dataclass(frozen=True)
class Crowd:
    """What a server did for many viewers."""

    viewers: int
    channels: int
    size: int  # bytes delivered while it was measured
    cpu: float  # seconds
    memory: int  # bytes
    threads: int
    skips: int
    bare: float  # CPU seconds for each GB


def measure_crowd(source: Source, viewers: int, channels: int, seconds: float) -> Crowd:
    bare = bare_cpu(viewers, max(1, int(GB / BLOCK / viewers)))
    with streampipe(source, channels=channels) as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(contextlib.closing(join(server.port, number % channels)))
                 for number in range(viewers)]  # fmt: skip
        throw_away(crowd, WARM_UP)
        before = server.cpu() or 0.0
        size = throw_away(crowd, seconds)
        after = server.cpu() or 0.0
        memory, threads = figures_of(server.pid)
        skips = total_of(server.port, "streampipe_viewer_skips_total")
        return Crowd(viewers, channels, size, after - before, memory, threads, skips, bare)


def join(port: int, number: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.sendall(f"GET /live-{number} HTTP/1.1\r\n\r\n".encode())
    return sock


def throw_away(crowd: Sequence[socket.socket], seconds: float) -> int:
    """Bytes that came in this time, thrown away in the kernel; raises where a viewer was let go."""
    drop = getattr(socket, "MSG_TRUNC", 0)
    room = bytearray(1 << 20)
    size = 0
    by_number = {sock.fileno(): sock for sock in crowd}
    with select.epoll() as poll:
        for number in by_number:
            poll.register(number, select.EPOLLIN)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for number, _ in poll.poll(left):
                count = by_number[number].recv_into(room, len(room), drop)
                if not count:
                    raise RuntimeError("a viewer was let go")
                size += count
    return size


def figures_of(pid: int) -> tuple[int, int]:
    """Resident bytes and threads of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"])


def total_of(port: int, name: str) -> int:
    """The sum of a metric over all streams."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def bare_cpu(viewers: int, blocks: int) -> float:
    """CPU seconds for each GB that bare threads send to as many viewers."""
    with process(*ourselves("--bare", str(viewers), "--blocks", str(blocks))) as child:
        port = int(output(child).readline())
        crowd = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(viewers)]
        with contextlib.suppress(RuntimeError):  # the first that has got all
            throw_away(crowd, PATIENCE)
        for sock in crowd:
            sock.close()
        return float(output(child).readline())


def send_bare(viewers: int, blocks: int) -> None:
    """The child's part: a thread for each viewer, who gets so many blocks."""
    block = bytes(BLOCK)
    with socket.create_server(("127.0.0.1", 0), backlog=viewers) as listener:
        print_line(str(listener.getsockname()[1]))
        crowd = [listener.accept()[0] for _ in range(viewers)]
    sent: list[int] = []

    def send(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            for _ in range(blocks):
                sock.sendall(block)
                sent.append(len(block))

    threads = [threading.Thread(target=send, args=(sock,)) for sock in crowd]
    before = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print_line(str((time.process_time() - before) / sum(sent) * GB))


def crowd_line(crowd: Crowd) -> str:
    cpu = crowd.cpu / crowd.size * GB
    values = (
        f"{cpu:.2f} s", f"{crowd.bare:.2f} s", f"{crowd.memory / 1e6:.0f} MB",
        str(crowd.threads), str(crowd.skips),
    )  # fmt: skip
    return line(f"{crowd.viewers} viewers of {crowd.channels} channels", *values)


#### The table ####


def limits(plan: Plan, slow: Source, fast: Source) -> Iterator[Row]:
    """What no client of whole segments can be faster than: two playlists, then all in parallel."""
    segment = DELAY + SEGMENT_BYTES / RATE
    rounds = math.ceil(plan.segments / THREADS)
    yield Row("limit for whole segments", 2 * DELAY + segment, 2 * DELAY + rounds * segment)


Measure = Callable[[Plan, Source, Source], Iterator[Row]]
MEASURES: tuple[Measure, ...] = (measure_streampipe, measure_streamlink, measure_ffmpeg, limits)

NAME_WIDTH = 36


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def line(name: str, *values: str) -> str:
    return name.ljust(NAME_WIDTH) + "".join(value.rjust(13) for value in values)


def shown(row: Row) -> str:
    first = "-" if row.first is None else f"{row.first * 1000:.1f} ms"
    total = "-" if row.total is None else f"{row.total:.2f} s"
    cpu = "-" if row.cpu is None else f"{row.cpu:.2f} s"
    return line(row.name, first, total, cpu)


def bench(plan: Plan) -> None:
    """Measures one thing after the other and prints each as soon as it is known."""
    print_line(f"{plan.segments} segments of {SEGMENT_BYTES / 1e6:g} MB, {THREADS} threads")
    print_line(line("", "first byte", "total", "CPU/GB"))
    slow_origin = functools.partial(origin, plan.segments, slow=True)
    with slow_origin() as slow, origin(plan.fast_segments, slow=False) as fast:
        for measure in MEASURES:
            for row in measure(plan, slow, fast):
                print_line(shown(row))
        print_line("")
        print_line(line("", "CPU/GB", "bare", "memory", "threads", "skips"))
        for viewers, channels in plan.crowds:
            crowd = measure_crowd(fast, viewers, channels, plan.crowd_seconds)
            print_line(crowd_line(crowd))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure StreamPipe beside streamlink and ffmpeg.")
    parser.add_argument("--quick", action="store_true", help="fewer segments and repetitions")
    # What this program runs as its own children.
    parser.add_argument("--origin", type=int, metavar="SEGMENTS", help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--streamlink", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--stream-data", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, metavar="VIEWERS", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.origin:
        serve_origin(arguments.origin, arguments.slow)
    elif arguments.bare:
        send_bare(arguments.bare, arguments.blocks)
    elif arguments.streamlink:
        run_streamlink(arguments.streamlink, arguments.stream_data)
    else:
        bench(QUICK if arguments.quick else Plan())


if __name__ == "__main__":
    main()
