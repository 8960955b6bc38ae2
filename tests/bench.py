"""The speed of StreamPipe, beside its peers in the same run, on loopback.

    python -m tests.bench [--quick]           the table; it takes twelve minutes, or two
    python -m tests.bench --crowd MINUTES     1,000 viewers of one channel for this time
    python -m tests.bench --lists             a provider's list of 8,000 channels

Origin, servers and viewers are separate processes; `tests/peers.py` describes the media that they
serve. Programs that are not installed are omitted. The rows and columns of the table:

cold first byte     from a request to the first byte of media, for a film without other viewers;
                    ffmpeg's time includes its start
film of N segments  seconds for the whole film from the slow origin with 4 downloads at once;
                    streamlink's hls-segment-stream-data has no limit of downloads. The column
                    "limit" has the least time for a client of whole segments: two playlists, and
                    then the segments, 4 at a time
requests for it     requests to the origin for the film
warm first byte     like the cold first byte, for a live channel with another viewer
CPU/GB              user and system seconds of the server's processes for each GB (10**9 bytes):
                    pulled from the fast origin by one viewer, or sent to a crowd of viewers of
                    live channels. The viewers discard bytes in the kernel, from one epoll loop.
                    "1000 of a channel" is a crowd of 1,000 viewers of one channel. The column
                    "bare threads" is for as many threads that only send as much from memory
requests a minute   requests to the origin for the live channels
one more viewer     first byte of a viewer that joins the crowd
skips               jumps of viewers that fell behind, plus disconnected viewers (with VLC and
                    Icecast only these)

Absolute times differ between machines; the ratios between the columns matter.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # For a script, Python looks for modules in this folder instead of the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests import peers
from tests.origin import Origin
from tests.peers import PATIENCE, THREADS, Server, Source, print_line
from tests.program import Service, eventually

GB = 10**9
TS_PACKET = 188  # bytes
BLOCK = 65_424  # bytes that a bare thread sends at once: the size of a window's block
ROOM = bytearray(1 << 20)  # for bytes to discard
SETTLE = 8.0  # seconds for the first burst of each viewer
JOINS = 3  # viewers that join a crowd, one after the other
LOOK = 30.0  # seconds between two lines of --crowd
MORE_MEMORY = 20_000_000  # bytes that a server may grow by during --crowd


@dataclass(frozen=True)
class Plan:
    """The amounts to measure."""

    segments: int = 30  # of the film on the slow origin
    fast_segments: int = 400  # of the film on the fast origin: 1 GB
    colds: int = 5  # first bytes of a cold channel
    warms: int = 10  # first bytes of a running channel
    crowds: tuple[tuple[int, int], ...] = ((1, 1), (100, 1), (1000, 1), (200, 20))
    pollers: int = 200  # polling clients of one channel
    seconds: float = 20  # of each crowd
    bare_bytes: int = 3 * GB


QUICK = Plan(
    segments=8, fast_segments=100, colds=3, warms=5, crowds=((20, 1), (20, 5)), pollers=20,
    seconds=8, bare_bytes=GB,
)  # fmt: skip


#### One viewer ####


@dataclass(frozen=True)
class Film:
    """A program's figures for one viewer of the film."""

    first: float  # seconds
    total: float  # seconds, from the slow origin
    requests: int  # to the slow origin
    cpu: float  # seconds for each GB, from the fast origin


def film_of_streampipe(plan: Plan, slow: Source, fast: Source) -> Film:
    with peers.streampipe(slow) as server:
        # A finite stream is opened again for each viewer: every start is cold.
        first = peers.first_byte(*server.film, plan.colds)
        total, requests = whole(server, slow)
    with peers.streampipe(fast) as server:
        return Film(first, total.total, requests, cpu_per_gb(server, fast))


def film_of_streamlink(slow: Source, fast: Source, *options: str) -> Film:
    with peers.streamlink(slow, *options) as server:
        whole(server, slow)  # not measured: its stream was resolved before the request
        total, requests = whole(server, slow)
    with peers.streamlink(fast, *options) as server:
        return Film(total.first, total.total, requests, cpu_per_gb(server, fast))


def film_of_ffmpeg(plan: Plan, slow: Source, fast: Source) -> Film:
    slow.requests()
    total = peers.pull_ffmpeg(slow.film)
    requests = slow.requests()
    before = cpu_of_children()
    peers.pull_ffmpeg(fast.film)
    cpu = (cpu_of_children() - before) / fast.size * GB
    return Film(total.first, total.total, requests, cpu)


def whole(server: Server, source: Source) -> tuple[peers.Pull, int]:
    """Pull the whole film; returns the times and the number of requests to the origin."""
    source.requests()
    result = peers.pull(*server.film)
    # The counters restart at each repetition of the film's segments. StreamPipe signals this with a
    # packet for each PID.
    excess = result.size - source.size
    if not 0 <= excess <= source.size / 10_000 or excess % TS_PACKET:
        raise RuntimeError(f"{result.size} bytes instead of {source.size}")
    return result, source.requests()


def cpu_per_gb(server: Server, source: Source) -> float:
    """CPU seconds for each GB that one viewer pulls."""
    before = server.cpu()
    whole(server, source)
    return (server.cpu() - before) / source.size * GB


def cpu_of_children() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def film_limit(source: Source) -> float:
    """The least seconds for two playlists and then whole segments, THREADS at a time."""
    segment = peers.DELAY + source.size / source.segments / peers.RATE
    return 2 * peers.DELAY + math.ceil(source.segments / THREADS) * segment


#### Crowds ####


@dataclass(frozen=True)
class Crowd:
    """A server's figures for many viewers."""

    cpu: float  # seconds for each GB delivered
    memory: int  # bytes
    threads: int
    requests: float  # to the origin, in a minute
    joined: float  # seconds to the first byte of one more viewer
    skips: int


def watch_crowd(server: Server, source: Source, viewers: int, seconds: float) -> Crowd:
    """Let viewers receive their first burst, then measure them for this time."""
    with crowd_of(server, viewers) as crowd:
        throw_away(crowd, SETTLE)
        source.requests()
        before = server.cpu()
        size, lost = throw_away(crowd, seconds)
        cpu = (server.cpu() - before) / size * GB
        requests = source.requests() / seconds * 60
        joined = peers.first_byte(*server.channels[0], JOINS)
        return Crowd(cpu, server.memory, server.threads, requests, joined, lost + skips_of(server))


@contextlib.contextmanager
def crowd_of(server: Server, viewers: int) -> Iterator[list[socket.socket]]:
    """Connect this many viewers, evenly on all channels; they do not read yet."""
    with contextlib.ExitStack() as stack:
        crowd = []
        for number in range(viewers):
            port, path = server.channels[number % len(server.channels)]
            sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
            crowd.append(stack.enter_context(sock))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        yield crowd


def throw_away(crowd: Sequence[socket.socket], seconds: float) -> tuple[int, int]:
    """Discard the bytes that arrive in this time, in the kernel.

    Returns their number and the number of viewers that were disconnected.
    """
    size = lost = 0
    with select.epoll() as poll:
        by_number = {sock.fileno(): sock for sock in crowd}
        for number in by_number:
            poll.register(number, select.EPOLLIN)
        end = time.monotonic() + seconds
        while lost < len(crowd) and (left := end - time.monotonic()) > 0:
            for number, _ in poll.poll(left):
                count = 0
                with contextlib.suppress(ConnectionError):
                    count = by_number[number].recv_into(ROOM, len(ROOM), socket.MSG_TRUNC)
                size += count
                if not count:
                    poll.unregister(number)
                    lost += 1
    return size, lost


def polling_cpu(server: Server, viewers: int, seconds: float) -> float:
    """CPU seconds for each GB that polling clients fetch; each fetches every segment once.

    As in watch_crowd, the measurement starts after the first burst of each client.
    """
    crowd = [Poller(*server.channels[0], number) for number in range(viewers)]
    with select.epoll() as poll, contextlib.ExitStack() as stack:
        by_number = {}
        for poller in crowd:
            stack.callback(poller.close)
            by_number[poller.ask(poll)] = poller
        take_turns(poll, by_number, SETTLE)
        before = server.cpu()
        size = take_turns(poll, by_number, seconds)
        return (server.cpu() - before) / size * GB


def take_turns(poll: select.epoll, by_number: dict[int, Poller], seconds: float) -> int:
    """The number of bytes that these pollers receive in this time."""
    size, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for number, _ in poll.poll(left):
            poller = by_number[number]
            count = poller.take()
            size += count
            if not count:
                del by_number[number]
                by_number[poller.ask(poll)] = poller
    return size


class Poller:
    """A polling client: requests the playlist, then its new segments, and discards them."""

    def __init__(self, port: int, path: str, number: int) -> None:
        self.port, self.path, self.number = port, path, number
        self.newest = 0
        self.wanted: list[str] = []  # addresses of segments
        self.listed: bytearray | None = None  # the answer with the playlist, while it arrives
        self.sock = socket.socket()

    def close(self) -> None:
        self.sock.close()

    def ask(self, poll: select.epoll) -> int:
        """Send the next request on a new connection; returns the number of its socket."""
        self.close()
        self.listed = None if self.wanted else bytearray()
        path = f"/{self.wanted.pop(0)}" if self.wanted else f"{self.path}.m3u8"
        self.sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        head = f"GET {path} HTTP/1.1\r\nHost: bench\r\nUser-Agent: viewer {self.number}\r\n\r\n"
        self.sock.sendall(head.encode())
        poll.register(self.sock, select.EPOLLIN)
        return self.sock.fileno()

    def take(self) -> int:
        """Receive bytes; returns their number, or 0 at the end of an answer."""
        if self.listed is None:
            return self.sock.recv_into(ROOM, len(ROOM), socket.MSG_TRUNC)
        data = self.sock.recv(1 << 16)
        self.listed += data
        if not data:
            addresses = re.findall(r"^[\w-]+/(\d+)\.ts$", self.listed.decode(), re.M)
            self.wanted = [f"{self.path[1:]}/{n}.ts" for n in addresses if int(n) > self.newest]
            self.newest = max(self.newest, *map(int, addresses))
        return len(data)


def skips_of(server: Server) -> int:
    """Jumps of viewers that fell behind; only StreamPipe reports them."""
    address = f"http://127.0.0.1:{server.channels[0][0]}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0
    skips = (line for line in lines if line.startswith("streampipe_viewer_skips_total{"))
    return sum(int(line.rpartition(" ")[2]) for line in skips)


def bare_cpu(viewers: int, size: int) -> float:
    """CPU seconds for each GB that bare threads send to as many viewers."""
    blocks = max(1, size // BLOCK // viewers)
    command = (sys.executable, "-m", "tests.bench", "--bare", str(viewers), str(blocks))
    with peers.process(*command) as child, contextlib.ExitStack() as stack:
        place = "127.0.0.1", int(peers.output(child).readline())
        crowd = [
            stack.enter_context(socket.create_connection(place, PATIENCE)) for _ in range(viewers)
        ]
        throw_away(crowd, PATIENCE)
        return float(peers.output(child).readline())


def send_bare(viewers: int, blocks: int) -> None:
    """The child's part: a thread for each viewer sends it this many blocks."""
    with socket.create_server(("127.0.0.1", 0), backlog=viewers) as listener:
        print_line(str(listener.getsockname()[1]))
        crowd = [listener.accept()[0] for _ in range(viewers)]
    block, go = bytes(BLOCK), threading.Event()

    def send(sock: socket.socket) -> None:
        go.wait()
        with sock:
            for _ in range(blocks):
                sock.sendall(block)

    threads = [threading.Thread(target=send, args=(sock,)) for sock in crowd]
    for thread in threads:
        thread.start()
    before = time.process_time()
    go.set()
    for thread in threads:
        thread.join()
    print_line(str((time.process_time() - before) / (viewers * blocks * BLOCK) * GB))


def long_crowd(viewers: int, minutes: float) -> bool:
    """Measure viewers of one channel for this time, with a line every LOOK seconds.

    Returns whether no viewer lost data and the memory stayed within MORE_MEMORY.
    """
    print_line(
        f"{'':>8}{'CPU/GB':>10}{'memory':>12}{'threads':>10}{'skips':>8}{'lost':>8}{'to join':>12}"
    )
    with (
        peers.origin(1, slow=False) as source,
        peers.streampipe(source) as server,
        crowd_of(server, viewers) as crowd,
    ):
        channel = server.channels[0]
        all_lost = throw_away(crowd, SETTLE)[1]
        began, memory = time.monotonic(), server.memory
        while not all_lost and (left := 60 * minutes - (time.monotonic() - began)) > 0:
            cpu = server.cpu()
            size, lost = throw_away(crowd, min(LOOK, left))
            cpu = (server.cpu() - cpu) / size * GB
            all_lost += lost
            joined = peers.first_byte(*channel, JOINS)
            print_line(
                f"{time.monotonic() - began:6.0f} s{cpu:8.2f} s{server.memory / 1e6:9.1f} MB"
                f"{server.threads:10}{skips_of(server):8}{all_lost:8}{joined * 1000:9.1f} ms"
            )
        return not all_lost and not skips_of(server) and server.memory < memory + MORE_MEMORY


#### The table ####

STREAMPIPE, STREAMLINK, STREAM_DATA = "StreamPipe", "streamlink", "streamlink, stream-data"
FFMPEG, VLC, ICECAST, BARE, LIMIT = "ffmpeg", "VLC", "Icecast", "bare threads", "limit"
NAMES = (STREAMPIPE, STREAMLINK, STREAM_DATA, FFMPEG, VLC, ICECAST, BARE, LIMIT)
NAME_WIDTH = 34

Serve = Callable[[Source, int], contextlib.AbstractContextManager[Server]]


def servers() -> dict[str, Serve]:
    """The installed programs that serve a live channel to more than one viewer."""
    found: dict[str, Serve] = {STREAMPIPE: peers.streampipe}
    if peers.is_installed("cvlc"):
        found[VLC] = peers.vlc
    if peers.is_installed("icecast2") and peers.is_installed("ffmpeg"):
        found[ICECAST] = peers.icecast
    return found


def print_row(name: str, values: Mapping[str, object]) -> None:
    """A line of the table, which is Markdown."""
    cells = (str(values.get(column, "")).rjust(max(8, len(column))) for column in NAMES)
    print_line(f"| {name.ljust(NAME_WIDTH)} | {' | '.join(cells)} |")


def print_figures(name: str, unit: str, values: Mapping[str, float], scale: float = 1) -> None:
    digits = 0 if unit in ("", "MB") else 1 if unit == "ms" else 2
    shown = {column: f"{value * scale:.{digits}f} {unit}" for column, value in values.items()}
    print_row(name, {column: text.strip() for column, text in shown.items()})


def bench(plan: Plan) -> None:
    """Measure one row after the other; prints each row as soon as it is known."""
    print_row("", {name: name for name in NAMES})
    print_line(
        f"|{'-' * (NAME_WIDTH + 2)}|" + "".join(f"{'-' * (max(8, len(n)) + 1)}:|" for n in NAMES)
    )
    with (
        peers.origin(plan.segments, slow=True) as slow,
        peers.origin(plan.fast_segments, slow=False) as fast,
    ):
        bench_film(plan, slow, fast)
        bench_warm(plan, slow)
        for viewers, channels in plan.crowds:
            bench_crowd(plan, fast, viewers, channels)
        with peers.streampipe(fast) as server:
            cpu = polling_cpu(server, plan.pollers, plan.seconds)
        print_figures(f"CPU/GB, {plan.pollers} polling clients", "s", {STREAMPIPE: cpu})


def bench_film(plan: Plan, slow: Source, fast: Source) -> None:
    films = {
        STREAMPIPE: film_of_streampipe(plan, slow, fast),
        STREAMLINK: film_of_streamlink(slow, fast),
        STREAM_DATA: film_of_streamlink(slow, fast, "--hls-segment-stream-data"),
    }
    if peers.is_installed("ffmpeg"):
        films[FFMPEG] = film_of_ffmpeg(plan, slow, fast)
    print_figures("cold first byte", "ms", {n: film.first for n, film in films.items()}, 1000)
    totals = {name: film.total for name, film in films.items()}
    totals[LIMIT] = film_limit(slow)
    print_figures(f"film of {plan.segments} segments", "s", totals)
    print_figures("requests for it", "", {name: film.requests for name, film in films.items()})
    print_figures("CPU/GB, pulled", "s", {name: film.cpu for name, film in films.items()})


def bench_warm(plan: Plan, source: Source) -> None:
    firsts = {}
    for name, serve in servers().items():
        with serve(source, 1) as server, crowd_of(server, 1) as crowd:
            throw_away(crowd, 1)
            firsts[name] = peers.first_byte(*server.channels[0], plan.warms)
    print_figures("warm first byte", "ms", firsts, 1000)


def bench_crowd(plan: Plan, source: Source, viewers: int, channels: int) -> None:
    crowds = {}
    for name, serve in servers().items():
        with serve(source, channels) as server:
            crowds[name] = watch_crowd(server, source, viewers, plan.seconds)
    who = f"{viewers} of {channels} channels" if channels > 1 else f"{viewers} of a channel"
    cpu = {name: crowd.cpu for name, crowd in crowds.items()}
    cpu[BARE] = bare_cpu(viewers, plan.bare_bytes)
    print_figures(f"CPU/GB, {who}", "s", cpu)
    print_figures("- memory", "MB", {n: crowd.memory for n, crowd in crowds.items()}, 1e-6)
    print_figures("- threads", "", {name: crowd.threads for name, crowd in crowds.items()})
    print_figures("- requests a minute", "", {n: crowd.requests for n, crowd in crowds.items()})
    print_figures("- one more viewer", "ms", {n: crowd.joined for n, crowd in crowds.items()}, 1000)
    print_figures("- skips", "", {name: crowd.skips for name, crowd in crowds.items()})


#### A provider's list ####

LIST_CHANNELS = 8000
LIST_VIEWERS = 200


@dataclass(frozen=True)
class ListFigures:
    """The costs of a list of many channels; times are seconds."""

    answer: float  # from the start to the first answer
    loaded: float  # from the start until the server has all channels of the list
    playlist: float  # for /playlist.m3u
    reload: float  # from SIGHUP until the list is loaded and applied again
    memory: int  # bytes after a reload without viewers
    lost: int  # viewers that were disconnected after the reload
    starved: int  # viewers without data in the two segments' time after it


def channel_list(channels: int, address: str) -> bytes:
    """A panel's list; its channels have different addresses of the same stream."""
    lines = ["#EXTM3U"]
    for number in range(channels):
        lines += [
            f'#EXTINF:-1 tvg-id="ch{number}.uk" tvg-name="UK: Channel {number} HD" '
            f'tvg-logo="http://logo.example/{number}.png" tvg-chno="{number + 1}" '
            f'group-title="Group {number % 40}",UK: Channel {number} HD',
            f"{address}?live/username/password/{number}.ts",
        ]
    return "\r\n".join(lines).encode()


def measure_list(channels: int, viewers: int) -> ListFigures:
    """Start a server with a list of this many channels, and reload it while viewers watch one."""
    with (
        peers.origin(1, slow=False) as source,
        Origin() as origin,
        tempfile.TemporaryDirectory() as folder,
    ):
        address = origin.add_file("/list.m3u", channel_list(channels, source.live))
        playlists = {"tv": {"url": address, "max_upstreams": 0}}
        began = time.monotonic()
        with Service(Path(folder), {}, level="debug", playlists=playlists) as service:
            ask(service, "/health")
            answer = time.monotonic() - began
            service.wait_for_count("loaded the list", 1)
            eventually(
                lambda: f'"streams": {channels},' in ask(service, "/health"), "the list's channels"
            )
            loaded = time.monotonic() - began
            began = time.monotonic()
            text = ask(service, "/playlist.m3u")
            playlist = time.monotonic() - began
            assert text.count("#EXTINF") == channels
            first = reload_list(service, 1)
            memory = service.memory
            server = Server((service.number,), ((service.port, "/uk-channel-0-hd"),))
            with crowd_of(server, viewers) as crowd:
                throw_away(crowd, SETTLE)
                second = reload_list(service, 2)
                counts = [0] * viewers
                lost = count_bytes(crowd, counts, 2 * peers.SEGMENT_SECONDS)
    return ListFigures(answer, loaded, playlist, max(first, second), memory, lost, counts.count(0))


def ask(service: Service, path: str) -> str:
    address = f"http://127.0.0.1:{service.port}{path}"
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def reload_list(service: Service, before: int) -> float:
    """Reload a server whose list was loaded `before` times; returns the seconds it took."""
    began = time.monotonic()
    service.send(signal.SIGHUP)
    service.wait_for_count("loaded the list", before + 1)
    service.wait_for_count("reloaded: ", before)
    return time.monotonic() - began


def count_bytes(crowd: Sequence[socket.socket], counts: list[int], seconds: float) -> int:
    """Add the bytes that each viewer receives in this time to `counts`.

    Returns the number of viewers that were disconnected.
    """
    lost = 0
    ends = time.monotonic() + seconds
    with select.epoll() as poll:
        places = {sock.fileno(): place for place, sock in enumerate(crowd)}
        for number in places:
            poll.register(number, select.EPOLLIN)
        while (left := ends - time.monotonic()) > 0:
            for number, _ in poll.poll(left):
                place = places[number]
                count = 0
                with contextlib.suppress(ConnectionError):
                    count = crowd[place].recv_into(ROOM, len(ROOM), socket.MSG_TRUNC)
                counts[place] += count
                if not count:
                    poll.unregister(number)
                    lost += 1
    return lost


def bench_list() -> None:
    found = measure_list(LIST_CHANNELS, LIST_VIEWERS)
    print_line(f"a list of {LIST_CHANNELS:,} channels")
    print_line(f"start to first answer  {found.answer:.2f} s")
    print_line(f"start to all channels  {found.loaded:.2f} s")
    print_line(f"/playlist.m3u          {1000 * found.playlist:.0f} ms")
    print_line(f"reload                 {found.reload:.2f} s")
    print_line(f"memory                 {found.memory / 1e6:.0f} MB")
    viewers = f"{LIST_VIEWERS} viewers of a channel"
    print_line(
        f"{viewers}: {found.lost} disconnected by a reload, {found.starved} without data after it"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure StreamPipe beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer segments and smaller crowds")
    parser.add_argument(
        "--crowd", type=float, metavar="MINUTES", help="1,000 viewers for this time"
    )
    parser.add_argument("--viewers", type=int, default=1000, help="number for --crowd")
    parser.add_argument("--lists", action="store_true", help="only a list of 8,000 channels")
    # For the child process of bare_cpu().
    parser.add_argument("--bare", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.bare:
        send_bare(*arguments.bare)
    elif arguments.lists:
        bench_list()
    elif arguments.crowd:
        return 0 if long_crowd(arguments.viewers, arguments.crowd) else 1
    else:
        bench(QUICK if arguments.quick else Plan())
    return 0


if __name__ == "__main__":
    sys.exit(main())
