"""Limits: a real server and origin on loopback, real sockets, and the kernel's own figures.

The tests replace only constants, to reach a limit sooner, and functions that other platforms lack.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import itertools
import logging
import queue
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media, soak
from tests.origin import Origin, Playlist, Segment, Stall
from tests.program import Service, eventually
from tests.server import TIMEOUT, Answer, Site, Watch
from tests.test_sharing import paced
from tests.threads import Task, refuse_threads

# Without this mark, `python -m pytest` would take more than three minutes.
pytestmark = pytest.mark.long

Serve = Callable[..., Site]

KIB, MIB = 1 << 10, 1 << 20
STALLED = 20  # seconds until a viewer that reads nothing is disconnected: twice pipe.HEAD_TIMEOUT
UNSENT = 0x894B  # SIOCOUTQNSD of Linux: bytes that were written but not sent
PACKET = media.PACKET
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads figures of the Linux kernel")


def live(origin: Origin, name: str = "news", size: int | None = None) -> Playlist:
    """A live channel; its segments have `size` bytes, if given."""
    segments = media.ts_segments()
    if size:
        segments = tuple(media.padded(segment, size // PACKET * PACKET) for segment in segments)
    return origin.add(Playlist(name, segments, mode="live"))


def endless(origin: Origin, path: str = "/relay") -> str:
    return origin.add_endless(path, lambda: itertools.cycle(media.ts_segments()))


def viewers(site: Site) -> int:
    count = site.ask("GET", "/health").json["viewers"]
    assert isinstance(count, int)
    return count


def assert_refused(answer: Answer, words: str) -> None:
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json == {"error": words}


def connect(port: int, host: str = "127.0.0.1", room: int | None = None) -> socket.socket:
    """A connection; `room` is its receive buffer in bytes."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if room:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    sock.settimeout(TIMEOUT)
    sock.connect((host, port))
    return sock


def idle_viewer(
    port: int, path: str, version: str = "1.1", room: int | None = 4096
) -> socket.socket:
    """A viewer that has read the start of the answer's head and then stops reading."""
    sock = connect(port, room=room)
    sock.sendall(f"GET {path} HTTP/{version}\r\nHost: tv\r\n\r\n".encode())
    assert sock.recv(12) == b"HTTP/1.1 200"
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def viewer_threads() -> int:
    return sum(thread.name.startswith("viewer-") for thread in threading.enumerate())


#### max_viewers ####


def test_viewer_beyond_the_limit_gets_503_with_retry_after(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={"max_viewers": 2})
    first, second = site.watch("/news"), site.watch("/news")
    assert (first.status, second.status) == (200, 200)
    assert_refused(site.get("/news"), "there are too many viewers")
    health = site.get("/health")
    assert (health.status, health.json["viewers"]) == (200, 2)
    assert site.ask("HEAD", "/news").status == 200, "a probe does not count as a viewer"


def test_viewer_that_left_frees_its_slot(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={"max_viewers": 1})
    first = site.watch("/news")
    first.read(PACKET)
    first.close()
    eventually(lambda: viewers(site) == 0, "the viewer's departure is noticed")
    assert site.watch("/news").status == 200


def test_refused_viewer_opens_no_upstream(origin: Origin, serve: Serve) -> None:
    streams = {"news": live(origin).url, "other": live(origin, "other").url}
    site = serve(streams, server={"max_viewers": 1})
    site.watch("/news").read(PACKET)
    assert_refused(site.get("/other"), "there are too many viewers")
    assert origin.count("/other/*") == 0


def test_viewer_counts_until_it_has_read_everything(origin: Origin, serve: Serve) -> None:
    """Its upstream may have been closed long before."""
    body = media.padded(media.ts_segments()[0], 5000 * PACKET)
    site = serve({"file": origin.add_file("/file.ts", body)}, server={"max_viewers": 1})
    with contextlib.closing(idle_viewer(site.port, "/file", "1.0")) as slow:
        origin.wait_connections(0)
        assert viewers(site) == 1
        assert_refused(site.get("/file"), "there are too many viewers")
        assert read_to_end(slow).endswith(body[-PACKET:])
    eventually(lambda: viewers(site) == 0, "no viewer is left")


def test_max_viewers_of_zero_means_no_limit(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={"max_viewers": 0})
    assert {site.watch("/news").status for _ in range(5)} == {200}


#### max_upstreams ####


def test_upstream_beyond_the_limit_is_refused(origin: Origin, serve: Serve) -> None:
    streams = {"news": live(origin).url, "other": live(origin, "other").url}
    site = serve(streams, server={"max_upstreams": 1})
    site.watch("/news").read(PACKET)
    assert_refused(site.get("/other"), "there are too many upstreams")
    assert origin.count("/other/*") == 0
    assert site.watch("/news").status == 200, (
        "another viewer of a channel needs no further upstream"
    )


def test_lingering_channel_gives_way(origin: Origin, serve: Serve) -> None:
    names = ("first", "second", "third")
    site = serve(
        {name: live(origin, name).url for name in names}, server={"max_upstreams": 2}, linger=600
    )
    for count, name in enumerate(names[:2]):
        with site.watch(f"/{name}") as viewer:
            viewer.read(PACKET)
            assert viewers(site) == 1
        eventually(lambda: viewers(site) == 0, "the viewer's departure is noticed")
        assert upstreams(site) == count + 1, "the channel does not linger"
    assert site.watch("/third").status == 200
    eventually(
        lambda: channel_states(site)["first"] == [], "the channel idle for longest is closed"
    )
    assert channel_states(site)["second"] == ["live"]
    origin.clear_requests()
    site.watch("/second").read(PACKET)
    assert origin.count("/second/*.ts") == 0, "the viewer must join the lingering channel"


def channel_states(site: Site) -> dict[str, list[str]]:
    streams = site.get("/status").json["streams"]
    return {s["stream"]: [channel["state"] for channel in s["channels"]] for s in streams}


def upstreams(site: Site) -> int:
    return sum(map(len, channel_states(site).values()))


def test_each_viewer_of_a_finite_stream_counts_as_an_upstream(origin: Origin, serve: Serve) -> None:
    vod = origin.add(Playlist("vod", media.ts_segments()))
    origin.fault(vod.segment_path(2), Stall(1000), times=None)
    site = serve({"vod": vod.url}, server={"max_upstreams": 2})
    watching = [site.watch("/vod"), site.watch("/vod")]
    assert [viewer.read(PACKET)[:1] for viewer in watching] == [b"G", b"G"]
    assert_refused(site.get("/vod"), "there are too many upstreams")
    watching[0].close()
    eventually(lambda: upstreams(site) == 1, "its upstream is closed")
    assert site.watch("/vod").status == 200


#### Connections ####


@pytest.fixture
def four_connections(origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site for one viewer that accepts three further connections."""
    monkeypatch.setattr(pipe, "SPARE_CONNECTIONS", 3)
    return serve({"news": live(origin).url}, server={"max_viewers": 1})


def refusal(port: int) -> bytes:
    """The answer to a client that sends no request."""
    with contextlib.closing(connect(port)) as sock:
        return read_to_end(sock)


def test_connection_beyond_the_limit_is_refused_without_a_thread(four_connections: Site) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(contextlib.closing(connect(four_connections.port)))
        for _ in range(3):
            head, _, body = refusal(four_connections.port).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert re.search(rb"\r\nRetry-After: \d+\r\n", head)
            assert body == b'{"error": "there are too many connections"}\n'
        assert viewer_threads() == 4
    eventually(lambda: viewer_threads() == 0, "the threads end with their connections")
    assert four_connections.get("/health").status == 200


def test_connections_are_limited_even_if_viewers_are_not(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "MOST_CONNECTIONS", 2)
    site = serve({"news": live(origin).url}, server={"max_viewers": 0})
    with contextlib.closing(connect(site.port)), contextlib.closing(connect(site.port)):
        assert refusal(site.port).startswith(b"HTTP/1.1 503 ")


def test_limits_have_the_documented_values() -> None:
    assert (pipe.SPARE_CONNECTIONS, pipe.MOST_CONNECTIONS) == (256, 4096)
    assert (pipe.HEAD_TIMEOUT, pipe.HEAD_LIMIT) == (10.0, 64 * KIB)
    assert pipe.Server.request_queue_size == 1024


def test_health_answers_while_the_server_is_full(four_connections: Site) -> None:
    four_connections.watch("/news").read(PACKET)
    assert_refused(four_connections.get("/news"), "there are too many viewers")
    assert four_connections.get("/health").json["viewers"] == 1


def test_server_recovers_from_a_lack_of_threads(
    four_connections: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_threads(patch, "^viewer-")
        for _ in range(6):
            assert refusal(four_connections.port).startswith(b"HTTP/1.1 503 ")
    assert four_connections.get("/health").status == 200, "each refusal must free its connection"


#### The request head ####


def test_head_of_nearly_64_kib_is_read(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    head = b"GET /health HTTP/1.1\r\nHost: tv\r\n" + 8 * (b"X: " + 8000 * b"x" + b"\r\n") + b"\r\n"
    assert len(head) < pipe.HEAD_LIMIT
    assert site.raw(head).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "line",
    [b"X: " + 8000 * b"x" + b"\r\n", b"X: y\r\n", b" \r\n", b"\0"],
    ids=["long fields", "short fields", "continued lines", "zeros"],
)
def test_head_above_64_kib_is_refused_at_once(origin: Origin, serve: Serve, line: bytes) -> None:
    """This holds for any kind of lines, and the server does not wait for the end of the head."""
    site = serve({"news": live(origin).url})
    flood = b"GET /news HTTP/1.1\r\n" + line * (2 * pipe.HEAD_LIMIT // len(line))
    began = time.monotonic()
    with contextlib.closing(connect(site.port)) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(flood)
        assert b" 200 " not in read_to_end(sock)
    assert time.monotonic() - began < pipe.HEAD_TIMEOUT / 2
    assert origin.requests == ()


def test_slow_head_is_searched_only_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of the whole head after each byte would let a few clients use up a core."""
    searches: queue.SimpleQueue[int] = queue.SimpleQueue()  # the bytes of each search
    empty_line = pipe.EMPTY_LINE

    class Counting:
        def search(self, text: bytearray, position: int) -> re.Match[bytes] | None:
            searches.put(len(text) - position)
            return empty_line.search(text, position)

    monkeypatch.setattr(pipe, "EMPTY_LINE", Counting())
    site = serve({"news": live(origin).url})
    head = b"GET /health HTTP/1.1\r\nHost: tv\r\nX: " + 1000 * b"x" + b"\r\n\r\n"
    searched = 0
    with contextlib.closing(connect(site.port)) as sock:
        for byte in head:  # each one is sent after the search of those before
            searched += searches.get(timeout=TIMEOUT)
            sock.sendall(bytes([byte]))
        assert read_to_end(sock).startswith(b"HTTP/1.1 200 ")
    assert searched <= 4 * len(head), "a search may only repeat the three bytes before the new ones"


def test_silent_connections_end_in_time(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "HEAD_TIMEOUT", 0.3)
    site = serve({"news": live(origin).url})
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(contextlib.closing(connect(site.port))) for _ in range(20)]
        assert [read_to_end(sock) for sock in crowd] == 20 * [b""]
    eventually(lambda: viewer_threads() == 0, "the threads of the connections end")


#### Viewers that do not read ####


def test_viewer_that_reads_nothing_is_disconnected(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    site = serve({"relay": endless(origin)}, viewer_timeout=0.5)
    healthy = Task(lambda: site.get("/relay"))
    with contextlib.closing(idle_viewer(site.port, "/relay")) as stuck:
        eventually(lambda: "read nothing for 0.5 s" in caplog.text, "the viewer is disconnected")
        assert healthy.is_running
        assert not read_to_end(stuck).endswith(b"\r\n0\r\n\r\n"), (
            "without a final chunk, players reconnect"
        )
    dropped = b'streampipe_viewer_drops_total{stream="relay",reason="timeout"} 1\n'
    assert dropped in site.get("/metrics").body
    site.channels.stop(TIMEOUT)
    healthy.result()


def test_slow_viewer_stays_connected(origin: Origin, serve: Serve) -> None:
    """A viewer that keeps reading a little makes progress."""
    site = serve({"relay": endless(origin)}, viewer_timeout=0.5)
    until = time.monotonic() + 1.5
    pause = threading.Event()
    with contextlib.closing(idle_viewer(site.port, "/relay", "1.0")) as slow:
        while time.monotonic() < until:
            assert slow.recv(16384)
            pause.wait(0.02)
    assert b'reason="timeout"' not in site.get("/metrics").body


def test_viewer_that_pauses_at_the_end_gets_the_final_chunk(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, filled, has_left = threading.Event(), threading.Event(), pipe.has_left

    def look_and_fill(sock: socket.socket) -> bool:
        answer, timeout = has_left(sock), sock.gettimeout()
        if answered.is_set() and not filled.is_set():
            fill(sock)
            sock.settimeout(timeout)
            filled.set()
        return answer

    monkeypatch.setattr(pipe, "has_left", look_and_fill)
    news = live(origin)
    site = serve({"news": news.url})
    with contextlib.closing(idle_viewer(site.port, "/news", room=None)) as paused:
        answered.set()
        assert filled.wait(TIMEOUT)
        news.end()
        origin.wait_connections(0)
        assert read_to_end(paused).endswith(b"0\r\n\r\n")


def fill(sock: socket.socket) -> None:
    """Fill the kernel's send buffer, as a burst just before a silence does."""
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(65536 * b"x")


#### Options of sockets ####


def server_side(site: Site) -> socket.socket:
    """The server's socket of its only connection."""
    (sock,) = site.server._open
    return sock


def unsent(site: Site) -> int:
    """Bytes that the kernel holds for the only viewer and has not sent."""
    answer = fcntl.ioctl(server_side(site), UNSENT, bytes(4))
    return int(struct.unpack("i", answer)[0])


@linux_only
def test_unsent_data_in_the_kernel_is_bounded(origin: Origin, serve: Serve) -> None:
    site = serve({"relay": endless(origin)})
    with contextlib.closing(idle_viewer(site.port, "/relay")):
        eventually(lambda: unsent(site) >= pipe.UNSENT_LIMIT // 2, "the kernel's buffer fills")
        received = origin.requests[0].sent
        origin.wait_until(
            lambda: origin.requests[0].sent > received + 4 * MIB, "the server reads 4 MiB more"
        )
        assert unsent(site) <= pipe.UNSENT_LIMIT + pipe.SEND_LIMIT


@pytest.mark.parametrize("seconds", [1.0, 600.0, 86400.0])
def test_kernel_detects_dead_peers_and_keeps_paused_players(
    origin: Origin, serve: Serve, seconds: float
) -> None:
    site = serve({"news": live(origin).url}, viewer_timeout=seconds)
    site.watch("/news").read(PACKET)
    sock = server_side(site)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    bounds = {
        "TCP_NODELAY": (1, 1),
        "TCP_NOTSENT_LOWAT": (1, 256 * KIB),
        "TCP_USER_TIMEOUT": ((seconds + 30) * 1000, 1 << 31),  # the server decides first
        "TCP_KEEPIDLE": (1, max(30, seconds)),
    }
    for name, (least, most) in bounds.items():
        if option := getattr(socket, name, None):
            value = sock.getsockopt(socket.IPPROTO_TCP, option)
            assert least <= value <= most, name


#### Segments larger than the window ####

RATE = 25_000_000 // 8  # bytes a second of the channel
SEGMENT_SECONDS = 10


def large_segments(count: int, *, is_fmp4: bool) -> tuple[bytes | None, list[bytes]]:
    """An initialization section and segments of ten seconds, which repeat three segments."""
    size = SEGMENT_SECONDS * RATE
    if is_fmp4:
        init, fragments = media.fmp4()
        large = [fragment + box(b"free", size - len(fragment)) for fragment in fragments[:3]]
    else:
        init, large = None, [media.padded(segment, size) for segment in media.ts_segments()[:3]]
    return init, list(itertools.islice(itertools.cycle(large), count))


def announced(segments: list[bytes]) -> list[bytes]:
    """MPEG-TS segments as viewers receive them: with a signal at each restart of counters."""
    out = segments[:1]
    for before, segment in itertools.pairwise(segments):
        out.append(media.spliced(before, segment, is_announced=False)[len(before) :])
    return out


def box(kind: bytes, size: int) -> bytes:
    return size.to_bytes(4, "big") + kind + bytes(size - 8)


def watch_whole(port: int, count: int, init: bytes, segments: list[bytes], rate: float) -> None:
    """Read this many segments at a rate; fails if a byte after the start is missing."""
    with Watch(port, "/news") as viewer:
        assert viewer.read(len(init)) == init
        start = viewer.read(4096)
        first = next(n for n, segment in enumerate(segments) if segment.startswith(start))
        for number in range(first, first + count):
            expected = memoryview(segments[number])[len(start) if number == first else 0 :]
            for at, part in paced(viewer, len(expected), rate):
                assert part == expected[at : at + len(part)], f"at {at} of segment {number}"


@pytest.mark.parametrize("speed", [5, 1], ids=["scaled", "real-length"])
@pytest.mark.parametrize("is_fmp4", [False, True], ids=["ts", "fmp4"])
def test_viewers_lose_nothing_of_segments_larger_than_the_window(
    origin: Origin, tmp_path: Path, is_fmp4: bool, speed: int
) -> None:
    """Two viewers at 1.5 times real time lose nothing; the second joins two segments late."""
    count = 12
    init, segments = large_segments(count, is_fmp4=is_fmp4)
    playlist = Playlist(
        "live",
        [Segment(segment, SEGMENT_SECONDS / speed) for segment in segments],
        mode="live", window=3, init=init, extension=".m4s" if is_fmp4 else ".ts", clock=True,
    )  # fmt: skip
    with Service(tmp_path, {"news": origin.add(playlist).url}) as service:
        expected = segments if is_fmp4 else announced(segments)
        arguments = init or b"", expected, 1.5 * speed * RATE
        first = Task(lambda: watch_whole(service.port, 9, *arguments))
        origin.wait_for(playlist.segment_path(4), timeout=5 * SEGMENT_SECONDS)
        second = Task(lambda: watch_whole(service.port, 7, *arguments))
        for task in (first, second):
            task.result(12 * SEGMENT_SECONDS)
        wrong = "[1-9][0-9]* skips|fell behind"
        assert [line for line in service.lines if re.search(wrong, line)] == []


#### Host and port ####


def ipv6_works() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_ipv6_host_also_serves_ipv4(origin: Origin, serve: Serve, client: str) -> None:
    site = serve({"news": live(origin).url}, server={"host": "::"})
    with contextlib.closing(connect(site.port, client)) as sock:
        sock.sendall(b"GET /playlist.m3u HTTP/1.0\r\n\r\n")
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 200 ")
    shown = "[::1]" if ":" in client else r"(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\])"
    shown = shown.replace("[::1]", r"\[::1\]")
    assert re.search(rf"\nhttp://{shown}:{site.port}/news\n".encode(), answer)


def test_port_zero_means_a_free_port(serve: Serve) -> None:
    first, second = serve({}), serve({})
    assert 0 < first.port != second.port > 0
    assert [site.get("/health").status for site in (first, second)] == [200, 200]


#### Other platforms ####

LINUX_OPTIONS = (
    "TCP_USER_TIMEOUT",
    "TCP_NOTSENT_LOWAT",
    "TCP_KEEPIDLE",
    "TCP_KEEPINTVL",
    "TCP_KEEPCNT",
    "MSG_DONTWAIT",
)


def test_viewers_are_served_without_functions_of_linux(
    origin: Origin,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Windows also lacks sendmsg()."""
    for name in LINUX_OPTIONS:
        monkeypatch.delattr(socket, name, raising=False)
    monkeypatch.setattr(
        pipe, "hasattr", lambda thing, name: name != "sendmsg" and builtins.hasattr(thing, name),
        raising=False,
    )  # fmt: skip
    vod = origin.add(Playlist("vod", media.ts_segments()))
    for http10 in (False, True):
        answer = serve({"vod": vod.url}).get("/vod", http10=http10)
        assert (answer.body, answer.is_complete) == (vod.plain(0, 8), True)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("missing", [[], ["MSG_DONTWAIT"]], ids=["here", "on-windows"])
def test_closed_socket_shows_that_a_viewer_left(
    monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    for name in missing:
        monkeypatch.delattr(socket, name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        player = connect(listener.getsockname()[1])
        sock, _ = listener.accept()
        with sock, player:
            pipe.tune(sock, 600.0)
            assert not pipe.has_left(sock)
            player.send(b"more")
            eventually(lambda: sock.recv(1, socket.MSG_PEEK) == b"m", "the bytes arrive")
            assert not pipe.has_left(sock), "a viewer that sends bytes has not left"
            player.send(b"more")
            player.shutdown(socket.SHUT_WR)
            eventually(lambda: pipe.has_left(sock), "the departure is noticed")


def test_option_that_the_system_refuses_is_ignored() -> None:
    class Picky(socket.socket):
        refused: list[int]

        def setsockopt(self, level: int, option: int, value: Any, *more: Any) -> None:
            self.refused.append(option)
            raise OSError("not supported")

    with Picky() as sock:
        sock.refused = []
        pipe.tune(sock, 600.0)
        assert len(sock.refused) > 1


def test_end_signals_work_without_sighup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    before = {number: signal.getsignal(number) for number in pipe.END_SIGNALS}
    try:
        received = pipe.collect_signals()
        signal.raise_signal(signal.SIGTERM)
        assert pipe.next_signal(received) == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


#### Crowds ####


@linux_only
@pytest.mark.long
@pytest.mark.alone
def test_crowd_that_does_not_read_does_not_affect_other_viewers(
    origin: Origin, tmp_path: Path
) -> None:
    """50 healthy viewers lose no byte next to 200 that never read and 500 idle connections.

    All viewers are still connected when the idle connections have timed out: if the 200 had been
    disconnected by then, the server would accept another viewer.
    """
    news = live(origin, size=100 * KIB)
    with Service(
        tmp_path,
        {"news": news.url},
        max_viewers=250,
        options={"viewer_timeout": STALLED, "linger": 0},
    ) as service:
        with Watch(service.port, "/news") as first:
            first.read(PACKET)
        origin.wait_connections(0)
        before = service.threads, service.memory
        start = news.newest - 2
        with ThreadPoolExecutor(550) as pool, contextlib.ExitStack() as stack:
            healthy = [stack.enter_context(Watch(service.port, "/news")) for _ in range(50)]
            reads = [pool.submit(viewer.read_all) for viewer in healthy]
            for _ in range(200):
                stack.enter_context(contextlib.closing(idle_viewer(service.port, "/news")))
            idle = [connect(service.port) for _ in range(500)]
            for sock in idle:
                stack.enter_context(sock)
            answers = list(pool.map(read_to_end, idle))
            assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == 500 - 256
            assert [answer for answer in answers if answer and b" 503 " not in answer] == []
            assert service.threads <= 250 + 256 + 30
            with Watch(service.port, "/news") as refused:
                assert refused.status == 503
            with Watch(service.port, "/health") as health:
                assert (health.status, b'"viewers": 250' in health.read_all()[0]) == (200, True)
            for _ in range(20):
                news.advance()
                origin.wait_for(news.segment_path(news.newest))
            news.end()
            edges = [
                start,
                *range(8, news.newest + 1, 8),
                news.newest + 1,
            ]  # repetitions of the media
            turns = itertools.starmap(news.plain, itertools.pairwise(edges))
            expected = media.spliced(*turns), True
            for body, is_complete in (read.result() for read in reads):
                # Null packets fill the silence while the idle connections time out.
                assert (body.replace(pipe.NULL_PACKET, b""), is_complete) == expected
            service.wait_for_count(f"read nothing for {STALLED} s|left: ", 1)
        eventually(lambda: service.threads <= before[0] + 1, "the threads end", 40)
        grown = service.memory - before[1]
        assert grown < 60 * MIB, f"{grown} bytes more than before"


@pytest.mark.long
def test_viewers_join_and_leave_during_the_teardown(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """15 viewers join and leave 200 times around the end of their channel's linger time."""
    caplog.set_level(logging.WARNING)
    origin.rate = 4_000_000
    linger = 0.05
    site = serve({"relay": endless(origin)}, linger=linger)
    dice, pause, before = random.Random(5), threading.Event(), threading.active_count()

    def visit(delay: float, together: threading.Barrier) -> None:
        pause.wait(delay)
        with Watch(site.port, "/relay") as viewer:
            assert viewer.read(PACKET)[:1] == b"G"
            together.wait(TIMEOUT)

    with ThreadPoolExecutor(15) as pool:
        for number in range(200):
            starts = origin.count("/relay")
            together = threading.Barrier(15)
            delays = [dice.uniform(0, 3 * linger) for _ in range(15)]
            visits = [pool.submit(visit, delay, together) for delay in delays]
            for each in visits:
                each.result(TIMEOUT)
            assert origin.count("/relay") <= starts + 1, f"a second upstream in round {number}"
    origin.wait_connections(0)
    assert [record.getMessage() for record in caplog.records] == []
    eventually(lambda: threading.active_count() <= before, "the threads end")


@linux_only
@pytest.mark.long
def test_soak_of_a_minute_succeeds(tmp_path: Path) -> None:
    assert soak.soak(1, 1, tmp_path)
