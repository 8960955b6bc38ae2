"""The headers of reverse proxies that a server believes; server and origin are real.

test_proxies.py has real proxies.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

import pipe
from tests.origin import Origin
from tests.server import BROWSER, Site
from tests.test_pages import NOWHERE, TOKEN, live, playlist
from tests.test_sharing import eventually

Serve = Callable[..., Site]
PROXIES = {"proxies": ["127.0.0.0/8", "192.0.2.0/28", "2001:db8::/32"]}

CHAINS = {
    "one proxy": ("203.0.113.7", "203.0.113.7"),
    "the client claims another": ("127.0.0.1, 198.51.100.1, 203.0.113.7", "203.0.113.7"),
    "two proxies": ("198.51.100.1, 203.0.113.7, 192.0.2.3", "203.0.113.7"),
    "viewer in the proxies' network": ("192.0.2.9, 192.0.2.3", "192.0.2.9"),
    "with a port": ("203.0.113.7:49152", "203.0.113.7"),
    "IPv6": ("2001:470::7", "2001:470::7"),
    "IPv6 in brackets": ("[2001:470::7]", "2001:470::7"),
    "IPv6 with a port": ("[2001:470::7]:49152", "2001:470::7"),
    "IPv4 in IPv6": ("::ffff:203.0.113.7", "203.0.113.7"),
    "a proxy with a port": ("203.0.113.7:1, 192.0.2.3:2", "203.0.113.7"),
    "empty entries": (" , 203.0.113.7,,", "203.0.113.7"),
    "unknown": ("203.0.113.7, unknown", "127.0.0.1"),
    "hidden behind a proxy": ("_hidden, 192.0.2.3", "192.0.2.3"),
    "nonsense": ("'; drop, 203.0.113.300", "127.0.0.1"),
    "empty": ("", "127.0.0.1"),
}


def viewers_of(site: Site) -> list[str]:
    """The addresses of all viewers."""
    streams = site.server.channels.status(site.config.streams["news"])
    return [viewer["address"] for channel in streams["channels"] for viewer in channel["viewers"]]


@pytest.mark.parametrize(("chain", "address"), CHAINS.values(), ids=list(CHAINS))
def test_viewer_is_the_last_address_before_the_proxies(
    origin: Origin, serve: Serve, chain: str, address: str
) -> None:
    site = serve({"news": live(origin).url}, server=PROXIES)
    header: dict[str, Any] = {"X-Forwarded-For": chain}
    site.watch("/news", **header).read(188)
    assert viewers_of(site) == [address]


def test_header_may_be_repeated(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={**PROXIES, "token": TOKEN, "trusted": []})
    lines = ["X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 203.0.113.7"]
    request = [
        "GET /news.m3u8 HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {TOKEN}",
        *lines,
        "",
        "",
    ]
    assert b" 200 OK\r\n" in site.raw("\r\n".join(request).encode())
    assert viewers_of(site) == ["203.0.113.7"]


@pytest.mark.parametrize("proxies", [[], ["192.0.2.0/24"]], ids=["none", "others"])
def test_header_of_an_unknown_proxy_is_ignored(
    origin: Origin, serve: Serve, proxies: list[str]
) -> None:
    site = serve({"news": live(origin).url}, server={"proxies": proxies})
    for behind in ("203.0.113.7", "203.0.113.8"):
        header = {"X-Forwarded-For": behind}
        assert site.ask("GET", "/news.m3u8", **header).status == 200
    assert viewers_of(site) == ["127.0.0.1"], "the header must not make two polling clients of one"


def test_requests_from_different_ports_are_one_viewer(origin: Origin, serve: Serve) -> None:
    """Some proxies add the client's port, which differs for each request."""
    site = serve({"news": live(origin).url}, server={**PROXIES, "max_viewers": 2})
    for port in range(49152, 49158):
        header = {"X-Forwarded-For": f"203.0.113.7:{port}"}
        assert site.ask("GET", "/news.m3u8", **header).status == 200
    assert viewers_of(site) == ["203.0.113.7"]


@pytest.mark.parametrize(
    ("behind", "status"),
    [("192.168.1.7", 200), ("203.0.113.7", 401), ("192.168.1.7, 203.0.113.7", 401), ("", 401)],
)
def test_trust_depends_on_the_address_of_the_viewer(serve: Serve, behind: str, status: int) -> None:
    server = {**PROXIES, "token": TOKEN, "trusted": ["192.168.0.0/16"]}
    site = serve({"news": NOWHERE}, server=server)
    assert site.ask("GET", "/status", **{"X-Forwarded-For": behind}).status == status


def test_log_names_the_viewer(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streampipe")
    site = serve({"news": live(origin).url}, server=PROXIES)
    header: dict[str, Any] = {"X-Forwarded-For": "203.0.113.7"}
    site.watch("/news", **header).read(188)
    assert site.ask("GET", "/health", **header).status == 200
    eventually(
        lambda: "news: viewer 203.0.113.7 started watching" in caplog.text, "the viewer is logged"
    )
    eventually(
        lambda: "client 203.0.113.7: GET /health: 200" in caplog.text, "the request is logged"
    )
    assert "127.0.0.1" not in caplog.text


#### The server's own address ####


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({"X-Forwarded-Prefix": "/tv"}, "http://h.example/tv"),
        ({"X-Forwarded-Prefix": "/tv/"}, "http://h.example/tv"),
        ({"X-Forwarded-Prefix": "/a-1/b_2.c~/%C3%BC"}, "http://h.example/a-1/b_2.c~/%C3%BC"),
        ({"X-Forwarded-Prefix": "/"}, "http://h.example"),
        ({"X-Forwarded-Prefix": "/outer, /inner"}, "http://h.example/outer"),
        ({"X-Forwarded-Prefix": "tv"}, "http://h.example"),
        ({"X-Forwarded-Prefix": "//evil.example"}, "http://h.example"),
        ({"X-Forwarded-Prefix": '/"><script>'}, "http://h.example"),
        ({"X-Forwarded-Prefix": "/a b"}, "http://h.example"),
        ({"X-Forwarded-Prefix": "/.."}, "http://h.example"),
        ({"X-Forwarded-Proto": "HTTPS"}, "https://h.example"),
        ({"X-Forwarded-Port": "8443"}, "http://h.example:8443"),
        ({"X-Forwarded-Port": "80"}, "http://h.example"),
        ({"X-Forwarded-Port": "443", "X-Forwarded-Proto": "https"}, "https://h.example"),
        ({"X-Forwarded-Port": "8443", "X-Forwarded-Proto": "https"}, "https://h.example:8443"),
        ({"X-Forwarded-Port": "80", "X-Forwarded-Proto": "https"}, "https://h.example"),
        ({"X-Forwarded-Port": "8443, 80"}, "http://h.example:8443"),
        ({"X-Forwarded-Port": "99999"}, "http://h.example"),
        ({"X-Forwarded-Port": "8o"}, "http://h.example"),
        ({"X-Forwarded-Port": "0"}, "http://h.example"),
        ({"X-Forwarded-Port": "8" * 5000}, "http://h.example"),
        ({"X-Forwarded-Port": "8443", "Host": "h.example:99"}, "http://h.example:99"),
        ({"X-Forwarded-Port": "8443", "Host": "[::1]"}, "http://[::1]:8443"),
        ({"X-Forwarded-Port": "8443", "X-Forwarded-Host": "o.example"}, "http://o.example:8443"),
    ],
    ids=repr,
)
def test_links_have_the_address_of_the_proxy(
    serve: Serve, headers: dict[str, str], base: str
) -> None:
    site = serve({"news": NOWHERE})
    headers = {"Host": "h.example", **headers}
    _, (entry,) = playlist(site.ask("GET", "/playlist.m3u", **headers))
    assert entry.url == f"{base}/news"
    found = site.ask("GET", "/discover.json", **headers).json
    assert (found["BaseURL"], found["LineupURL"]) == (base, f"{base}/lineup.json")


@pytest.mark.parametrize(
    ("target", "forwarded", "base"),
    [
        ("http://t.example:8080/playlist.m3u", "", "http://t.example:8080"),
        ("http://[::1]:8080/playlist.m3u", "", "http://[::1]:8080"),
        ("http://t.example/playlist.m3u", "X-Forwarded-Host: o.example\r\n", "http://o.example"),
        ("http://a@t.example/playlist.m3u", "", "http://h.example"),
        ('http://"><b/playlist.m3u', "", "http://h.example"),
    ],
)
def test_absolute_target_replaces_host(
    serve: Serve, target: str, forwarded: str, base: str
) -> None:
    site = serve({"news": NOWHERE})
    request = f"GET {target} HTTP/1.1\r\nHost: h.example\r\n{forwarded}\r\n"
    _, _, body = site.raw(request.encode()).partition(b"\r\n\r\n")
    assert f"{base}/news\n".encode() in body


def test_public_url_overrides_the_headers(serve: Serve) -> None:
    site = serve({"news": NOWHERE}, server={"public_url": "https://tv.example/sub"})
    headers = {"X-Forwarded-Prefix": "/tv", "X-Forwarded-Port": "8443"}
    _, (entry,) = playlist(site.ask("GET", "/playlist.m3u", **headers))
    assert entry.url == "https://tv.example/sub/news"


#### A machine without IPv4 ####


@pytest.fixture
def only_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes as on a machine whose network has only IPv6."""
    connect, getsockname = socket.socket.connect, socket.socket.getsockname

    def fake_connect(sock: socket.socket, address: Any) -> None:
        if sock.type != socket.SOCK_DGRAM:
            connect(sock, address)
        elif sock.family == socket.AF_INET:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def fake_getsockname(sock: socket.socket) -> Any:
        is_routed = (sock.family, sock.type) == (socket.AF_INET6, socket.SOCK_DGRAM)
        return ("2001:470::7", 9, 0, 0) if is_routed else getsockname(sock)

    monkeypatch.setattr(socket.socket, "connect", fake_connect)
    monkeypatch.setattr(socket.socket, "getsockname", fake_getsockname)


@pytest.mark.usefixtures("only_ipv6")
@pytest.mark.parametrize(
    ("host", "expected"), [("::", "[2001:470::7]"), ("0.0.0.0", "localhost")], ids=["all", "IPv4"]
)
def test_machine_without_ipv4_shows_its_ipv6_address(
    serve: Serve, caplog: pytest.LogCaptureFixture, host: str, expected: str
) -> None:
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    caplog.set_level(logging.INFO, "streampipe")
    site = serve({}, server={"host": host})
    pipe.announce(site.config, site.server)
    assert f"open http://{expected}:{site.port}/ in a browser" in caplog.text
    page = site.ask("GET", "/", Accept=BROWSER, Host=f"localhost:{site.port}").body.decode()
    assert f"http://{expected}:{site.port}/playlist.m3u" in page
