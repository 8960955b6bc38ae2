"""What origins do with playlists and keys, and what is said of it: redirects, pages, DRM, gaps.

Everything is real and seen from outside. Time is shortened where its length is not the matter.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import pytest
import requests

import pipe
from tests import media
from tests.origin import Origin, Playlist, Status, Tokens
from tests.server import Site
from tests.threads import Task

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(12)
LOGIN = "/login/news.m3u8"


def news(name: str = "news", **more: object) -> Playlist:
    return Playlist(name, SEGMENTS, mode="live", **more)  # type: ignore[arg-type]


def reason(site: Site, path: str = "/news") -> tuple[int, str]:
    """How a start fails."""
    answer = site.get(path)
    return answer.status, answer.json["error"]


@contextlib.contextmanager
def answering(data: bytes) -> Iterator[str]:
    """A server that answers one request with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(data)

        task = Task(answer)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        task.result()


#### Redirects ####


@pytest.mark.parametrize("uses", [1, 3])
def test_token_in_a_redirect_is_asked_for_anew(origin: Origin, serve: Serve, uses: int) -> None:
    """The address is good for a few requests: nothing is opened again, and nothing is lost."""
    live = origin.add(news())
    tokens = Tokens(live.path, uses=uses)
    origin.fault(LOGIN, tokens, times=None)
    origin.fault(live.path, tokens, times=None)
    site = serve({"news": origin.url + LOGIN})
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    for number in range(5, 9):
        live.advance()
        expected = live.plain(number, number + 1)
        assert viewer.read(len(expected)) == expected
    channel = site.get("/status").json["streams"][0]
    assert (channel["restarts"], channel["last_error"]) == (0, None)


def test_refused_target_is_not_asked_again(origin: Origin, serve: Serve) -> None:
    """Panels ban who collects refusals: after the first, the address itself is asked."""
    live = origin.add(news())
    tokens = Tokens(live.path)
    origin.fault(LOGIN, tokens, times=None)
    origin.fault(live.path, tokens, times=None)
    viewer = serve({"news": origin.url + LOGIN}).watch("/news")
    viewer.read(len(live.plain(2, 5)))
    for number in range(5, 8):
        live.advance()
        viewer.read(len(live.plain(number, number + 1)))
    assert [r.status for r in origin.requests if r.path.startswith(live.path)].count(403) == 1


def test_answer_of_the_address_decides(origin: Origin, serve: Serve) -> None:
    """Only where the address itself refuses, it is resolved anew."""
    live = origin.add(news())
    tokens = Tokens(live.path)
    origin.fault(LOGIN, tokens, times=2)
    origin.fault(live.path, tokens, times=None)
    refused = origin.fault(LOGIN, Status(403), times=1)
    origin.fault(LOGIN, tokens, times=None)
    site = serve({"news": origin.url + LOGIN})
    viewer = site.watch("/news")
    viewer.read(len(live.plain(2, 5)))
    for number in range(5, 8):
        live.advance()
        expected = live.plain(number, number + 1)
        assert viewer.read(len(expected)) == expected
    refused.wait()
    live.advance()
    assert viewer.read(len(live.plain(8, 9))) == live.plain(8, 9)
    assert site.get("/status").json["streams"][0]["restarts"] == 1


#### Who does not answer ####


def test_refused_connection_is_told(origin: Origin, serve: Serve) -> None:
    address = origin.url
    origin.stop()
    site = serve({"news": f"{address}/news.m3u8"})
    assert reason(site) == (502, "the origin refuses connections")


def test_unknown_name_is_told(serve: Serve) -> None:
    site = serve({"news": "http://nowhere.invalid/news.m3u8"})
    assert reason(site) == (502, "the origin is not found: its name is unknown")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "the origin is not reachable"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "the origin is not reachable"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "the origin closed the connection"),
    ],
)
def test_lost_connection_is_told(error: OSError, words: str) -> None:
    """What a loopback has no network for."""
    wrapped = requests.ConnectionError("Max retries exceeded with url: /secret")
    wrapped.__cause__ = error
    assert pipe.explain(wrapped) == words


@pytest.mark.parametrize("address", ["https://{}", "hls://{}", "httpstream://{}"])
def test_https_where_http_is_spoken_is_told(origin: Origin, serve: Serve, address: str) -> None:
    """Streamlink takes an address behind a prefix for https."""
    live = origin.add(news())
    site = serve({"news": address.format(live.url.removeprefix("http://"))})
    status, words = reason(site)
    assert (status, words.partition(": ")[2]) == (502, "write http:// in front of its address")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"ICY 200 OK\r\nicy-name: news\r\n\r\n", "the origin does not speak HTTP"),
        (b"", "the origin closed the connection"),
    ],
    ids=["shoutcast", "nothing"],
)
def test_other_protocol_is_told(serve: Serve, answer: bytes, words: str) -> None:
    with answering(answer) as address:
        assert reason(serve({"news": f"{address}/news"})) == (502, words)


def test_refusing_proxy_is_not_taken_for_the_origin(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    with Origin() as other:
        refusing = other.url.removeprefix("http://")
    for kind in ("http", "socks5h"):
        site = serve({"news": {"url": live.url, "proxy": f"{kind}://{refusing}"}})
        assert reason(site) == (502, "the proxy does not answer")
