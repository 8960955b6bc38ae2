"""Hosts with several addresses, some of them dead.  Only the DNS look-ups are faked."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import SILENT, Fault, Origin, Playlist, Redirect, Status, silent
from tests.program import eventually
from tests.server import Site

Serve = Callable[..., Site]
Names = dict[str, list[str]]

SEGMENTS = media.ts_segments(12)
HOST = "origin.example"
REFUSING = "127.0.0.4"
GOOD = "127.0.0.1"
SOON = 3.0  # seconds; a tenth of most time-outs here, and enough on a busy machine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ignores connections beyond a full backlog"
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Addresses by host name; "!AF_INET6" fails look-ups of that family and of all families."""
    table: Names = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, family: int = 0, *more: Any, **named: Any) -> Any:
        if host not in table:
            return real(host, port, family, *more, **named)
        failing = [entry[1:] for entry in table[host] if entry.startswith("!")]
        if failing and family in (0, *(getattr(socket, name) for name in failing)):
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        found = []
        for address in table[host]:
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            if not address.startswith("!") and family in (0, kind):
                found += real(address, port, kind, socket.SOCK_STREAM)
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(pipe, "_answered", {}, raising=False)
    return table


def film(origin: Origin) -> Playlist:
    return origin.add(Playlist("film", SEGMENTS))


def at_host(url: str) -> str:
    return url.replace("127.0.0.1", HOST)


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([SILENT[0], GOOD], id="one-silent"),
        pytest.param([*SILENT, GOOD], id="two-silent"),
        pytest.param(["::1", GOOD], id="ipv6-refuses"),
        pytest.param([REFUSING, SILENT[0], GOOD], id="refusing-and-silent"),
        pytest.param([GOOD, SILENT[0]], id="good-first"),
    ],
)
def test_dead_addresses_cost_little_time(
    origin: Origin,
    serve: Serve,
    names: Names,
    addresses: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    names[HOST] = addresses
    stream = film(origin)
    with silent(origin.port):
        site = serve({"film": at_host(stream.url)}, timeout=30)
        began = time.monotonic()
        answer = site.get("/film")
        assert (answer.body, answer.is_complete) == (stream.plain(0, 12), True)
        assert time.monotonic() - began < SOON
    logged = [record for record in caplog.records if "does not answer" in record.getMessage()]
    assert bool(logged) == (addresses[0] != GOOD)
    assert len(logged) <= 8  # only by the first connections, which start together


def test_slow_look_up_costs_no_segments(
    origin: Origin, serve: Serve, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead name server costs more time than a segment lasts."""
    names[HOST] = [GOOD]
    fast = socket.getaddrinfo

    def slow(host: Any, *more: Any, **named: Any) -> Any:
        if host == HOST:
            threading.Event().wait(1.5)
        return fast(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=6))
    viewer = serve({"news": at_host(live.url)}, timeout=20).watch("/news")
    assert viewer.read(len(live.plain(3, 6))) == live.plain(3, 6)


LOGIN_COOKIE = "a=b; c=d"


def cookie_after(
    origin: Origin, serve: Serve, *redirects: Fault, target: Origin | None = None
) -> str | None:
    """The cookies that a film's playlist is requested with after these redirects.

    The first is at /login, the others at the paths that follow: /1, /2.
    """
    stream = film(target or origin)
    for path, redirect in zip(("/login", "/1", "/2"), redirects, strict=False):
        origin.fault(path, redirect, times=None)
    login = {"url": f"{origin.url}/login", "headers": {"Cookie": LOGIN_COOKIE}}
    assert serve({"film": login}).get("/film").body == stream.plain(0, 12)
    asked = (target or origin).requests
    return next(each for each in asked if each.path == stream.path).headers.get("cookie")


FILM = "/film/index.m3u8"


def test_configured_cookie_survives_a_redirect_on_its_host(origin: Origin, serve: Serve) -> None:
    assert cookie_after(origin, serve, Redirect(FILM)) == LOGIN_COOKIE


def test_configured_cookie_survives_a_redirect_to_another_port(
    origin: Origin, serve: Serve
) -> None:
    with Origin() as other:
        assert cookie_after(origin, serve, Redirect(other.url + FILM), target=other) == LOGIN_COOKIE


@pytest.mark.parametrize("hops", [1, 2])
def test_configured_cookie_is_not_sent_to_another_host(
    origin: Origin, serve: Serve, names: Names, hops: int
) -> None:
    """Not even if that host sets a cookie of the same name."""
    names[HOST] = [GOOD]
    first = Redirect(at_host(f"{origin.url}/1"))
    second = Status(302, headers=(("Location", FILM), ("Set-Cookie", "a=other; Path=/")))
    if hops == 1:
        cookies = cookie_after(origin, serve, Redirect(at_host(origin.url + FILM)))
        assert cookies is None
    else:
        assert cookie_after(origin, serve, first, second) == "a=other"


def test_configured_cookie_returns_to_its_host(origin: Origin, serve: Serve, names: Names) -> None:
    """A single sign-on redirects through another host and back."""
    names[HOST] = [GOOD]
    redirects = Redirect(at_host(f"{origin.url}/1")), Redirect(origin.url + FILM)
    assert cookie_after(origin, serve, *redirects) == LOGIN_COOKIE


def test_redirected_head_of_a_plugin_has_its_cookie(origin: Origin) -> None:
    """Some plugins send HEAD to learn where an address leads."""
    origin.fault("/login", Redirect("/film"), times=None)
    session = pipe.Http()
    session.headers["Cookie"] = LOGIN_COOKIE
    assert session.head(f"{origin.url}/login").headers["Location"].endswith("/film")
    session.cut()


def test_cookie_of_the_origin_replaces_the_configured_one(origin: Origin, serve: Serve) -> None:
    """PHP uses the first cookie of a name, so an expired session would be redirected for ever."""
    renewed = Status(302, headers=(("Location", FILM), ("Set-Cookie", "a=new; Path=/")))
    assert cookie_after(origin, serve, renewed) == "a=new; c=d"


def test_address_that_answered_is_tried_first(
    origin: Origin, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names[HOST] = [*SILENT, GOOD]
    begun: list[str] = []
    begin = pipe.begin_attempt

    def counted(address: Any, *more: Any) -> socket.socket:
        begun.append(address[4][0])
        return begin(address, *more)

    monkeypatch.setattr(pipe, "begin_attempt", counted)
    address = at_host(origin.add_file("/file", b"\0"))
    with silent(origin.port):
        for _ in range(2):
            session = pipe.Http()
            assert session.get(address).content == b"\0"
            session.cut()
    assert begun == [*SILENT, GOOD, GOOD]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        pytest.param(REFUSING, "the origin refuses connections", id="refusing"),
        pytest.param(SILENT[0], "the origin did not answer in time", id="silent"),
    ],
)
def test_dead_server_of_segments_is_shown_as_trouble(
    origin: Origin, serve: Serve, names: Names, address: str, reason: str
) -> None:
    """The playlist's server answers, but a segment's only server is dead for a while."""
    names[HOST] = [address]
    news = origin.add(Playlist("news", SEGMENTS, mode="live", target_duration=2))
    moved = at_host(origin.add_file("/moved.ts", SEGMENTS[5]))
    redirect = Status(302, headers=(("Location", moved),))
    origin.fault(news.segment_path(5), redirect, times=None)
    site = serve({"news": news.url}, timeout=30)

    def status() -> Any:
        return site.get("/status").json["streams"][0]

    with silent(origin.port):
        viewer = site.watch("/news")
        assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
        assert (status()["state"], status()["last_error"]) == ("live", None)
        news.advance()
        eventually(lambda: status()["state"] == "waiting", "the trouble is shown")
        assert status()["last_error"] == reason
        names[HOST] = [GOOD]
        news.advance()
        eventually(lambda: status()["state"] == "live", "the trouble is over")
    assert status()["restarts"] == 0


def test_host_may_move_while_a_channel_runs(origin: Origin, serve: Serve, names: Names) -> None:
    """Each new connection looks the name up, because a remembered address may be outdated."""
    names[HOST] = [GOOD]
    news = origin.add(Playlist("news", SEGMENTS, mode="live"))
    viewer = serve({"news": at_host(news.url)}, timeout=30).watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    port = origin.port
    origin.stop()
    with Origin() as other:
        successor = other.add(Playlist("news", SEGMENTS, mode="live"))
        successor.advance()
        relay = socket.create_server((SILENT[0], port))
        with contextlib.closing(relay), forwarding(relay, other.port):
            names[HOST] = [SILENT[0]]
            assert viewer.read(media.PACKET)[:1] == b"G"
            other.wait_for(successor.segment_path(5))
    origin.restart()


@contextlib.contextmanager
def forwarding(listener: socket.socket, port: int) -> Iterator[None]:
    """Forward the connections of `listener` to a port of 127.0.0.1."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                origin = socket.create_connection((GOOD, port))
                sockets.extend((client, origin))
                for pair in ((client, origin), (origin, client)):
                    threads.append(threading.Thread(target=copy, args=pair))
                    threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_look_up_may_fail_for_one_family(
    origin: Origin, serve: Serve, names: Names, family: str
) -> None:
    stream = film(origin)
    names[HOST] = [f"!{family}", GOOD, "::1"]
    site = serve({"film": at_host(stream.url)})
    if family == "AF_INET6":
        assert site.get("/film").body == stream.plain(0, 12)
    else:  # nothing listens on ::1
        assert site.get("/film").json["error"] == "the origin refuses connections"


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([REFUSING, "::1"], (502, "the origin refuses connections")),
        ([*SILENT], (504, "the origin did not answer in time")),
        ([REFUSING, SILENT[0]], (504, "the origin did not answer in time")),
        (["!AF_INET", "!AF_INET6"], (502, "the origin's host name is unknown")),
    ],
)
def test_host_without_a_good_address_is_reported_in_time(
    origin: Origin, serve: Serve, names: Names, addresses: list[str], expected: tuple[int, str]
) -> None:
    names[HOST] = addresses
    with silent(origin.port):
        site = serve({"film": at_host(film(origin).url)}, timeout=1)
        began = time.monotonic()
        answer = site.get("/film")
        assert answer.status == expected[0]
        assert answer.json["error"] in (expected[1], "no media within 1 s")
        assert time.monotonic() - began < 1 + SOON


def test_silent_host_leaves_the_backup_its_time(origin: Origin, serve: Serve, names: Names) -> None:
    names[HOST] = [*SILENT]
    stream = film(origin)
    with silent(origin.port):
        site = serve({"film": [at_host(stream.url), stream.url]}, timeout=4)
        assert site.get("/film").body == stream.plain(0, 12)


def test_cut_ends_an_attempt_to_connect(origin: Origin, names: Names) -> None:
    names[HOST] = [*SILENT]
    session = pipe.Http()
    with silent(origin.port):
        cutter = threading.Timer(0.3, session.cut)
        cutter.start()
        began = time.monotonic()
        with pytest.raises(Exception, match="closed"):
            session.get(f"http://{HOST}:{origin.port}/", timeout=30)
        assert time.monotonic() - began < SOON
        cutter.join()


def test_source_address_skips_the_other_family(origin: Origin, serve: Serve, names: Names) -> None:
    names[HOST] = ["::1", SILENT[0], GOOD]
    stream = film(origin)
    with silent(origin.port):
        site = serve({"film": at_host(stream.url)}, streamlink={"interface": "host!127.0.0.5"})
        assert site.get("/film").body == stream.plain(0, 12)


def certified(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for HOST, and the file of its certificate."""
    file, key = folder / "file.pem", folder / "key.pem"
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    command = ["openssl", "req", *kind, *subject, "-out", str(file), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return context, file


def test_cut_ends_tls_within_the_tls_of_a_proxy(names: Names, tmp_path: Path) -> None:
    """An https origin is behind an https proxy; one thread is both of them."""
    context, file = certified(tmp_path)
    names[HOST] = [GOOD]
    is_asked = threading.Event()

    def answer(listener: socket.socket) -> None:
        with contextlib.closing(context.wrap_socket(listener.accept()[0], True)) as outer:
            outer.recv(65536)
            outer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            from_client, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
            inner = context.wrap_bio(from_client, to_client, True)
            while not is_asked.is_set():
                try:
                    inner.read(65536)  # completes the handshake first
                    is_asked.set()
                except ssl.SSLWantReadError:
                    outer.sendall(to_client.read())
                    from_client.write(outer.recv(65536))
            with contextlib.suppress(OSError):
                outer.recv(1)

    with socket.create_server((GOOD, 0)) as listener:
        port = listener.getsockname()[1]
        server = threading.Thread(target=answer, args=(listener,))
        server.start()
        session = pipe.Http()
        session.proxies["https"] = f"https://{HOST}:{port}"

        def cut() -> None:
            is_asked.wait()
            session.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        began = time.monotonic()
        with pytest.raises(Exception, match=r"closed|aborted|reset"):
            session.get(f"https://{HOST}:1/", verify=str(file), timeout=30)
        assert time.monotonic() - began < 3 * SOON
        cutter.join()
        server.join()


def test_tls_handshake_follows_the_race_of_addresses(names: Names, tmp_path: Path) -> None:
    context, file = certified(tmp_path)
    names[HOST] = [*SILENT, GOOD]
    with socket.create_server((GOOD, 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with contextlib.closing(context.wrap_socket(listener.accept()[0], True)) as sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\0")
                sock.recv(1)

        server = threading.Thread(target=answer)
        server.start()
        with silent(port):
            session = pipe.Http()
            got = session.get(f"https://{HOST}:{port}/", verify=str(file))
            session.cut()
        server.join()
    assert got.content == b"\0"
