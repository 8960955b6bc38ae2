"""Security and logs: real servers, origins and processes; the tests search all their output."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import pipe
from tests import media
from tests.origin import (
    Body,
    Close,
    Fault,
    Origin,
    Playlist,
    Redirect,
    StallHeaders,
    Status,
)
from tests.program import Service
from tests.server import BROWSER, TIMEOUT, Answer, Site, Watch
from tests.test_cli import EXIT_TIME, LOG_LINE

# Without this mark, `python -m pytest` would take more than three minutes.
pytestmark = pytest.mark.long

Serve = Callable[..., Site]

SECRET = "hunter2hunter2"
TOKEN = "s3cret-token"
PACKET = media.PACKET


def live(origin: Origin, name: str = "news") -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(), mode="live"))


def basic(token: str, user: str = "tv") -> dict[str, str]:
    pair = base64.b64encode(f"{user}:{token}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


#### The token ####

PAGES = {
    "/status": "GET",
    "/metrics": "GET",
    "/playlist.m3u": "GET",
    "/news.m3u": "GET",
    "/discover.json": "GET",
    "/lineup.json": "GET",
    "/lineup_status.json": "GET",
    "/device.xml": "GET",
    "/lineup.post": "POST",
}
WAYS_IN = {
    "parameter": (f"?token={TOKEN}", {}),
    "parameter among others": (f"?a=b&token={TOKEN}&quality=", {}),
    "second parameter": (f"?token=wrong&token={TOKEN}", {}),
    "bearer": ("", bearer(TOKEN)),
    "bearer in small letters": ("", {"Authorization": f"bearer {TOKEN}"}),
    "basic": ("", basic(TOKEN)),
    "basic of another user": ("", basic(TOKEN, "somebody")),
    "basic of nobody": ("", basic(TOKEN, "")),
}
WRONG = {
    "wrong": ("?token=wrong", {}),
    "start": (f"?token={TOKEN[:-1]}", {}),
    "more": (f"?token={TOKEN}x", {}),
    "other case": (f"?token={TOKEN.upper()}", {}),
    "odd bytes": ("?token=%ff%fe%00", {}),
    "bearer": ("", bearer("wrong")),
    "basic": ("", basic("wrong")),
}
MISSING = {
    "nothing": ("", {}),
    "empty": ("?token=", {}),
    "other name": (f"?Token={TOKEN}", {}),
    "as the user": ("", basic("", TOKEN)),
    "broken base64": ("", {"Authorization": "Basic %%%"}),
    "base64 of no text": ("", {"Authorization": "Basic //79/A=="}),
    "another scheme": ("", {"Authorization": f"Digest {TOKEN}"}),
    "no scheme": ("", {"Authorization": TOKEN}),
    "forwarded for": ("", {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}),
}


@pytest.fixture
def closed(origin: Origin, serve: Serve) -> Site:
    """A site with a token; its trusted network does not include the tests' client."""
    vod = origin.add(Playlist("vod", media.ts_segments()[:2]))
    return serve(
        {"news": vod.url}, server={"token": TOKEN, "trusted": ["192.0.2.0/24"], "max_viewers": 9}
    )


NO_TOKEN = (
    "a token is required: add ?token=... to the address, or enter it as the password, leaving the "
    "user name empty"
)
WRONG_TOKEN = (
    "the token is wrong: add the right one to the address as ?token=..., or enter it as the "
    "password, leaving the user name empty"
)


def assert_closed(answer: Answer, words: str = NO_TOKEN) -> None:
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
    if answer.headers["Content-Type"].startswith("text/html"):
        assert answer.body == b"" or f">{words}<".encode() in answer.body
        assert TOKEN.encode() not in answer.body
    else:
        assert answer.body in (b"", b'{"error": "%s"}\n' % words.encode())


@pytest.mark.parametrize(("query", "headers"), WAYS_IN.values(), ids=list(WAYS_IN))
def test_token_gives_access(closed: Site, query: str, headers: dict[str, str]) -> None:
    answer = closed.ask("GET", f"/news{query}", **headers)
    assert answer.status == 200
    assert answer.body == b"".join(media.ts_segments()[:2])
    assert closed.ask("HEAD", f"/news{query}", **headers).status == 200


@pytest.mark.parametrize(("query", "headers"), MISSING.values(), ids=list(MISSING))
def test_request_without_a_token_is_refused(
    closed: Site, origin: Origin, query: str, headers: dict[str, str]
) -> None:
    assert_closed(closed.ask("GET", f"/news{query}", **headers))
    assert origin.requests == ()


@pytest.mark.parametrize(("query", "headers"), WRONG.values(), ids=list(WRONG))
def test_request_with_a_wrong_token_is_refused(
    closed: Site, origin: Origin, query: str, headers: dict[str, str]
) -> None:
    assert_closed(closed.ask("GET", f"/news{query}", **headers), WRONG_TOKEN)
    assert origin.requests == ()


@pytest.mark.parametrize("path", ["/news", "/unknown", "/", *PAGES])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_path_requires_the_token(closed: Site, method: str, path: str) -> None:
    method = PAGES.get(path, "GET") if method == "GET" else method
    assert_closed(closed.ask(method, path, Accept=BROWSER))
    opened = closed.ask(method, path, Accept=BROWSER, **bearer(TOKEN))
    assert opened.status == (404 if path == "/unknown" else 200)


def test_options_need_no_token(closed: Site) -> None:
    assert closed.ask("OPTIONS", "/news").status == 204
    assert closed.raw(b"OPTIONS / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 204 ")


@pytest.mark.parametrize("path", ["/", "/health"])
def test_health_needs_no_token_and_shows_less_without_it(closed: Site, path: str) -> None:
    assert closed.ask("GET", path).json == {"status": "ok", "streams": 1}
    assert set(closed.ask("GET", f"{path}?token={TOKEN}").json) == {
        "status", "streams", "viewers", "uptime_seconds",
    }  # fmt: skip


def test_token_is_compared_in_constant_time(closed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.extend([one, other])
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for way in ({"path": "/news?token=abc"}, {"path": "/news", **bearer("abc")}):
        assert_closed(closed.ask("GET", **way), WRONG_TOKEN)
        assert set(compared) == {b"abc", TOKEN.encode()}
        compared.clear()


SPECIAL = ["a b", "a+b&c=d#e?f/g%41", "pa:ss:word", "quo\"te's", "t\u00f6ken-\u20ac"]


@pytest.mark.parametrize("token", SPECIAL)
def test_token_may_have_any_characters(origin: Origin, serve: Serve, token: str) -> None:
    site = serve({"news": live(origin).url}, server={"token": token})
    assert site.ask("HEAD", f"/news?token={quote(token, safe='')}").status == 200
    assert site.ask("HEAD", "/news", **basic(token)).status == 200
    assert site.ask("HEAD", "/news?token=wrong").status == 401
    as_sent = token.encode().decode("latin-1")  # the library sends this as UTF-8 bytes
    assert site.ask("HEAD", "/news", **bearer(as_sent)).status == 200


@pytest.mark.parametrize(
    "token",
    ["t\u00f6ken-\u20ac", "a+b", "a+b c+d", "\u00c5lesund", "\u0445\u043e\u0440", "voil\u00e0"],
)
def test_token_may_be_sent_unencoded(origin: Origin, serve: Serve, token: str) -> None:
    """Kodi does not encode a token, and people type a plus, which means a space in a query."""
    site = serve({"news": live(origin).url}, server={"token": token})
    for typed, status in ((token, b"200"), (token + "x", b"401")):
        query = typed.replace(" ", "%20").encode()
        answer = site.raw(b"HEAD /news?token=" + query + b" HTTP/1.1\r\nHost: tv\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_password_of_basic_may_be_latin_1(origin: Origin, serve: Serve, encoding: str) -> None:
    """OkHttp, requests and aiohttp send Latin-1, although the challenge asks for UTF-8."""
    site = serve({"news": live(origin).url}, server={"token": "t\u00f6ken"})
    for password, status in (("t\u00f6ken", 200), ("t\u00f6kex", 401)):
        credentials = base64.b64encode(f"tv:{password}".encode(encoding)).decode()
        headers = {"Authorization": f"Basic {credentials}"}
        assert site.ask("HEAD", "/news", **headers).status == status


@pytest.mark.parametrize("token", [TOKEN, *SPECIAL])
def test_links_contain_the_token(origin: Origin, serve: Serve, token: str) -> None:
    site = serve({"news": live(origin).url}, server={"token": token})
    carried = quote(token, safe="")
    pages = {
        path: site.ask("GET", f"{path}?token={carried}", Accept=BROWSER).body.decode()
        for path in ("/", "/playlist.m3u", "/news.m3u", "/lineup.json")
    }
    for path, page in pages.items():
        links = re.findall(rf"http://127\.0\.0\.1:{site.port}[^\s\"'<>]*news[^\s\"'<>]*", page)
        links = links or re.findall(r'href="(/?news[^"]*)"', page)
        assert links, f"{path} has no link: {page}"
        for link in links:
            target = re.sub(r"^http://[^/]*", "", link).replace("&amp;", "&")
            target = target if target.startswith("/") else f"/{target}"
            assert site.ask("HEAD", target).status == 200, f"{link} of {path}"


def test_trusted_networks_need_no_token(origin: Origin, serve: Serve) -> None:
    server = {"token": TOKEN, "trusted": ["192.0.2.0/24", "127.0.0.0/8"]}
    site = serve({"news": live(origin).url}, server=server)
    assert site.watch("/news").status == 200
    assert "viewers" in site.ask("GET", "/health").json
    assert site.ask("GET", "/status", **{"X-Forwarded-For": "203.0.113.1"}).status == 200


@pytest.mark.parametrize(
    ("address", "networks", "expected"),
    [
        ("192.0.2.7", ["192.0.2.0/24"], True),
        ("192.0.3.7", ["192.0.2.0/24"], False),
        ("::ffff:192.0.2.7", ["192.0.2.0/24"], True),
        ("::ffff:192.0.3.7", ["192.0.2.0/24"], False),
        ("fe80::1%eth0", ["fe80::/10"], True),
        ("2001:db8::1", ["192.0.2.0/24", "2001:db8::/32"], True),
        ("2001:db8::1", ["0.0.0.0/0"], False),
        ("192.0.2.7", [], False),
    ],
)
def test_address_is_compared_with_networks(
    address: str, networks: list[str], expected: bool
) -> None:
    assert pipe.is_in(address, networks) is expected


def test_trusted_ipv4_network_applies_on_an_ipv6_socket(origin: Origin, serve: Serve) -> None:
    server = {"host": "::", "token": TOKEN, "trusted": ["127.0.0.1/32"]}
    try:
        site = serve({"news": live(origin).url}, server=server)
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert site.ask("GET", "/status").status == 200
    with contextlib.suppress(OSError), socket.create_connection(("::1", site.port), 5) as sock:
        sock.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 401"


#### Secrets ####


def all_output(service: Service, names: list[str]) -> str:
    """The answers for each stream and page, then the process's whole output and log."""
    output = []
    streams, others = [f"/{name}" for name in names], ("/status", "/metrics", "/playlist.m3u", "/")
    asked = [
        *((path, "*/*") for path in streams),
        *((path, BROWSER) for path in (*streams, *others)),
    ]
    for path, accept in asked:
        with Watch(service.port, path, Accept=accept, Authorization=f"Bearer {TOKEN}") as watch:
            head = f"{watch.status} {watch.headers}"
            output.append(head + watch.response.read(20_000).decode("latin-1"))
    service.send(signal.SIGTERM)
    assert service.wait(EXIT_TIME) == 0
    return "\n".join([*output, service.output(), *service.errors()])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def failing(origin: Origin) -> dict[str, tuple[object, Fault | None]]:
    """Streams that fail, each with its secret in a different place, and their origin's fault."""
    host = f"127.0.0.1:{origin.port}"
    nowhere = f"127.0.0.1:{free_port()}"
    plain = f"http://{host}/{{}}/index.m3u8"
    where = f"{SECRET}/x.m3u8?token={SECRET}&a={SECRET}#{SECRET}"
    return {
        "user": (f"http://{SECRET}:pw@{host}/a/x.m3u8", Status(401)),
        "password": (f"http://tv:{SECRET}@{host}/b/x.m3u8", Status(403)),
        "path": (f"http://{host}/c/{where}", Status(404)),
        "gone": (f"http://{host}/d/{where}", Close(reset=True)),
        "refused": (f"http://tv:{SECRET}@{nowhere}/{where}", None),
        "tls": (f"https://tv:{SECRET}@{host}/e/{where}", None),
        "late": (f"http://{host}/f/{where}", StallHeaders()),
        "hls-prefix": (f"hls://http://tv:{SECRET}@{nowhere}/{where}", None),
        "http-prefix": (f"httpstream://http://tv:{SECRET}@{nowhere}/{where}", None),
        "raw": (f"httpstream://http://{host}/g/{where}", Status(500)),
        "header": ({"url": plain.format("h"), "headers": {"X-Key": SECRET}}, Status(400)),
        "cookie": ({"url": plain.format("i"), "headers": {"Cookie": f"a={SECRET}"}}, Close()),
        "proxy": (
            {"url": f"http://{host}/j/{where}", "proxy": f"http://tv:{SECRET}@{nowhere}"},
            None,
        ),
        "engine": (
            {
                "url": plain.format("k"),
                "streamlink": {
                    "http-cookies": {"session": SECRET},
                    "http-query-params": {"auth": SECRET},
                    "http-headers": {"X-Auth": SECRET},
                },
            },
            Status(500),
        ),
        "redirect": (plain.format("l"), Redirect(f"http://tv:{SECRET}@{nowhere}/{where}")),
        "file": (plain.format("m"), Redirect(f"file:///{where}")),
        "odd": (plain.format("n"), Redirect(f"gopher://x.example/{where}")),
        "broken": (plain.format("o"), Redirect(f"http:///{where}")),
        "no-playlist": (plain.format("p"), Body(b"#EXTM3U\n" + SECRET.encode())),
        "backup": ([f"http://{nowhere}/{where}", f"http://tv:{SECRET}@{nowhere}/"], None),
    }  # fmt: skip


def test_secrets_of_a_failing_upstream_stay_hidden(origin: Origin, tmp_path: Path) -> None:
    streams = failing(origin)
    for letter, (_, fault) in zip(_letters(streams), streams.values(), strict=True):
        if fault and letter:
            origin.fault(f"/{letter}/*", fault, times=None)
    config = {name: settings for name, (settings, _) in streams.items()}
    more = {"token": TOKEN, "options": {"timeout": 0.5}}
    with Service(tmp_path, config, level="debug", **more) as service:
        output = all_output(service, list(config))
    assert_each_failed(output, config)
    for secret in (SECRET, TOKEN):
        shown = [line for line in output.splitlines() if secret in line]
        # Links and the search form contain the token.
        carried = re.compile(rf'(\?|&amp;)token={TOKEN}|type="hidden" name="token" value="{TOKEN}"')
        shown = [line for line in shown if not carried.search(line)]
        assert shown == []


def assert_each_failed(output: str, streams: Iterable[str]) -> None:
    for name in streams:
        pattern = rf"(?m) (?i:debug) (?:\S+ )?127\.0\.0\.1: GET /{name}: 50[24]$"
        assert re.search(pattern, output), name


def _letters(streams: dict[str, tuple[object, Fault | None]]) -> Iterator[str]:
    """The folder of the origin in each stream's address, or an empty text."""
    for settings, _ in streams.values():
        found = re.search(r"127\.0\.0\.1:\d+/([a-z])/", str(settings))
        yield found[1] if found else ""


def secret_playlist(line: str) -> bytes:
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:1\n"
    return f"{head}{line}\n".encode()


def test_secrets_of_a_playlist_stay_hidden(origin: Origin, tmp_path: Path) -> None:
    """The addresses of keys, maps and segments that cannot be fetched stay hidden."""
    nowhere = f"http://tv:{SECRET}@127.0.0.1:{free_port()}/{SECRET}?sig={SECRET}"
    here = f"/x/{SECRET}?sig={SECRET}"
    lines = {
        "key": f'#EXT-X-KEY:METHOD=AES-128,URI="{nowhere}"\n#EXTINF:1,\n{here}',
        "missing-key": f'#EXT-X-KEY:METHOD=AES-128,URI="{here}"\n#EXTINF:1,\n{here}',
        "map": f'#EXT-X-MAP:URI="{nowhere}"\n#EXTINF:1,\n{here}',
        "segment": f"#EXTINF:1,\n{nowhere}",
        "missing": f"#EXTINF:1,\n{here}",
        "odd": f"#EXTINF:1,\ngopher://x.example/{SECRET}",
        "broken": f"#EXTINF:1,\nhttp:{SECRET}",
    }
    config = {}
    for name, line in lines.items():
        origin.fault(f"/{name}/index.m3u8", Body(secret_playlist(line)), times=None)
        config[name] = f"{origin.url}/{name}/index.m3u8"
    more = {"token": TOKEN, "options": {"timeout": 0.5, "reconnect": 1}}
    with Service(tmp_path, config, level="debug", **more) as service:
        output = all_output(service, list(config))
    assert_each_failed(output, config)
    assert [line for line in output.splitlines() if SECRET in line] == []


MESSAGES = [
    "HTTPConnectionPool(host='a.example', port=80): Max retries exceeded with url: /{0}?t={0} (x)",
    "404 Client Error: Not Found for url: http://tv:{0}@a.example/{0}?token={0}",
    "Unable to open URL: https://a.example/{0} ({0})",
    "No connection adapters were found for 'gopher://{0}/{0}'",
    "Failed to reload playlist: hls://http://{0}@a.example/{0}",
]


@pytest.mark.parametrize("secret", [SECRET, "p@ss-word", "it's-secret", "br(ack)et", "50%-off"])
@pytest.mark.parametrize("message", MESSAGES)
def test_secret_is_removed_from_a_library_message(message: str, secret: str) -> None:
    config = pipe.ConfigReader("x.yml", pipe.engine_options()).read(
        "streams: {news: {url: 'http://a.example/', headers: {X-Key: "
        + json.dumps(secret) + "}}}"
    )  # fmt: skip
    formatter = pipe.LogFormatter()
    formatter.secrets = pipe.secrets_of(config)
    record = logging.LogRecord("urllib3", 30, "", 0, message.format(secret), None, None)
    line = formatter.format(record)
    assert secret[-4:] not in line
    assert secret[:4] not in line


@pytest.mark.parametrize(
    ("secrets", "text", "expected"),
    [
        (["hunter2"], "a hunter2, hunter2b hunter", "a ***, ***b hunter"),
        (["hunter2", "hunter2b"], "hunter2b", "***"),
        (["abcd", "cdefgh"], "_abcdefgh_", "_***_"),
        (["abcdef", "bcde"], "_abcdef_", "_***_"),
        (["abcd"], "abcdabcd", "******"),
        (["abc"], "abc", "abc"),
        ([], "abcd", "abcd"),
        (["abcd"], "abc", "abc"),
    ],
)
def test_secrets_are_hidden_anywhere_in_a_text(
    secrets: list[str], text: str, expected: str
) -> None:
    assert pipe.Secrets(secrets).hide(text) == expected


def test_control_characters_of_clients_are_escaped(origin: Origin, tmp_path: Path) -> None:
    with Service(tmp_path, {"news": live(origin).url}, level="debug") as service:
        agent = "TV\x1b[2J\x07\x08\x9b"
        for target in ("/news", "/\x1b[31m\x07", "/news?\x1b"):
            with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
                request = f"GET {target} HTTP/1.1\r\nHost: tv\r\nUser-Agent: {agent}\r\n\r\n"
                sock.sendall(request.encode("latin-1"))
                assert sock.recv(1)
        service.wait_for(r"\\x1b\[31m")
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        text = "".join(service.errors())
    assert [char for char in text if ord(char) < 32 or 127 <= ord(char) < 160] == []


#### Local files and other hosts ####

NAMED = {
    "segment": "#EXTINF:1,\n{0}",
    "key": '#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:1,\n0.ts',
    "map": '#EXT-X-MAP:URI="{0}"\n#EXTINF:1,\n0.ts',
    "variant": "#EXT-X-STREAM-INF:BANDWIDTH=1\n{0}",
}


@pytest.mark.parametrize("form", ["file://{0}", "FILE://{0}", "file://localhost{0}", "file:{0}"])
@pytest.mark.parametrize("what", list(NAMED))
def test_local_file_is_never_read(
    origin: Origin, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    what: str, form: str,
) -> None:  # fmt: skip
    secret = tmp_path / "secret"
    secret.write_bytes(b"".join(media.ts_segments(1)) + SECRET.encode())
    body = secret_playlist(NAMED[what].format(form.format(secret)) + "\n#EXT-X-ENDLIST")
    address = origin.add_file("/x/index.m3u8", body)
    answer = serve({"news": address}, timeout=1, reconnect=1).get("/news")
    assert answer.status == 502
    assert SECRET.encode() not in answer.body
    assert re.search(
        r"news: address 1 of 1 \(127\.0\.0\.1\): .*(local file|unsupported kind of address)",
        caplog.text,
    )


# After a refused redirect, only the garbage collector closes the library's socket.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", ["/x/index.m3u8", "/x/key", "/x/init.mp4", "/x/0.ts"])
@pytest.mark.parametrize("form", ["file://{0}", "//localhost{0}"])
def test_redirect_to_a_local_file_is_never_followed(
    origin: Origin, serve: Serve, tmp_path: Path, path: str, form: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"".join(media.ts_segments(1)) + SECRET.encode())
    lines = ['#EXT-X-KEY:METHOD=AES-128,URI="key"', '#EXT-X-MAP:URI="init.mp4"', "#EXTINF:1,"]
    wanted = lines[:1] if "key" in path else lines[1:2] if "init" in path else []
    body = secret_playlist("\n".join([*wanted, lines[2], "0.ts", "#EXT-X-ENDLIST"]))
    address = origin.add_file("/x/index.m3u8", body)
    for name in ("key", "init.mp4", "0.ts"):
        origin.add_file(f"/x/{name}", 16 * b"k")
    fault = origin.fault(path, Redirect(form.format(secret)), times=None)
    answer = serve({"news": address}, timeout=0.4, reconnect=1).get("/news")
    fault.wait()
    assert answer.status in (502, 504)
    assert SECRET.encode() not in answer.body


#### Logs ####


def test_log_has_one_tagged_line_for_an_event(origin: Origin, tmp_path: Path) -> None:
    news = live(origin)
    with Service(tmp_path, {"news": news.url, "tv-2": live(origin, "b").url}) as service:
        for name in ("news", "tv-2"):
            with Watch(service.port, f"/{name}") as viewer:
                viewer.read(PACKET)
            service.wait_for(
                rf" info {name}: viewer 127\.0\.0\.1 started watching$".replace("info", "(?i:info)")
            )
            service.wait_for(
                rf" {name}: viewer 127\.0\.0\.1 left: \d+ bytes in \d+\.\d s, 0 skips$"
            )
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        assert [line for line in service.errors() if not LOG_LINE.fullmatch(line)] == []


def test_messages_of_streamlink_are_tagged(origin: Origin, tmp_path: Path) -> None:
    news = live(origin, "tv-2")
    options = {"linger": 0}
    with Service(tmp_path, {"tv-2": news.url}, level="debug", options=options) as service:
        with Watch(service.port, "/tv-2") as viewer:
            viewer.read(PACKET)
        service.wait_for("Closing writer thread|Closing worker thread")
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        about = re.compile(r"thread|playlist(?!\.m3u)|egment")
        engine = [line for line in service.errors() if about.search(line)]
    assert len(engine) > 3
    assert [line for line in engine if not re.search(r" (?i:debug|info) tv-2: ", line)] == []


def test_each_of_many_viewers_is_logged(origin: Origin, tmp_path: Path) -> None:
    news = live(origin)
    with Service(tmp_path, {"news": news.url}) as service:
        with Watch(service.port, "/news") as stays:
            stays.read(PACKET)
            for _ in range(40):
                with Watch(service.port, "/news") as viewer:
                    viewer.read(PACKET)
            service.wait_for_count(" left: ", 40)
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        assert sum(" started watching" in line for line in service.errors()) == 41


def test_refusals_of_a_stream_are_logged_once(origin: Origin, tmp_path: Path) -> None:
    """A player that retries forty times a second must not fill a disk."""
    streams = {"news": live(origin).url, "tv": live(origin, "tv").url}
    with Service(tmp_path, streams, max_viewers=1, trusted=["::1"]) as service:
        with Watch(service.port, "/news") as stays:
            stays.read(PACKET)
            for name in ("news", "tv"):
                with Watch(service.port, f"/{name}") as refused:
                    assert refused.status == 503
            with ThreadPoolExecutor(20) as pool:
                answers = pool.map(lambda _: refusal(service.port), range(20))
                assert set(answers) == {503}
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        refusals = [line for line in service.errors() if " refused: " in line]
    logged = [re.sub(r".* (?i:warning) ", "", line) for line in refusals]
    wanted = "{}: viewer 127.0.0.1 refused: there are too many viewers"
    assert logged == [wanted.format(name) for name in streams]


def refusal(port: int) -> int:
    with Watch(port, "/news") as refused:
        return refused.status


def test_failed_starts_of_a_stream_are_logged_once(origin: Origin, tmp_path: Path) -> None:
    missing = origin.url + "/missing"
    with Service(tmp_path, {"news": {"url": missing, "quality": "best"}}) as service:
        for number in range(10):  # each quality is a separate start
            with Watch(service.port, f"/news?quality=q{number}") as failed:
                assert failed.status == 502
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        assert sum("address 1 of 1 (127.0.0.1): " in line for line in service.errors()) == 1


def test_monitoring_is_only_logged_at_debug(origin: Origin, tmp_path: Path) -> None:
    paths = ("/health", "/", "/status", "/metrics", "/playlist.m3u", "/news.m3u")
    with Service(tmp_path, {"news": live(origin).url}) as service:
        before = len(service.lines)
        for path in (*paths, "/unknown"):
            with Watch(service.port, path) as watch:
                watch.read_all()
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        assert ["shutting down" in line for line in service.errors()[before:]] == [True]
    with Service(tmp_path, {"news": live(origin).url}, level="debug") as service:
        for path in paths:
            Watch(service.port, path).close()
            service.wait_for(rf" client 127\.0\.0\.1: GET {re.escape(path)}: 200$")


#### Reload ####


def reload(service: Service, streams: dict[str, Any], **more: object) -> None:
    done = service.count("reloaded")
    service.configure(streams, **more)
    service.send(signal.SIGHUP)
    service.wait_for_count("reloaded", done + 1)


def test_reload_does_not_interrupt_an_unchanged_stream(origin: Origin, tmp_path: Path) -> None:
    """Settings that do not affect the upstream may change."""
    news = live(origin)
    before = {"url": news.url, "title": "Old"}
    with Service(tmp_path, {"news": before}) as service, Watch(service.port, "/news") as viewer:
        assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
        after = {"url": news.url, "title": "New", "logo": "http://x.example/l.png", "group": "G"}
        options = {"linger": 0.3, "viewer_timeout": 50, "reconnect": 5}
        reload(service, {"news": after, "other": live(origin, "b").url}, options=options)
        news.advance()
        assert viewer.read(len(news.plain(5, 6))) == news.plain(5, 6)
        with Watch(service.port, "/playlist.m3u") as playlist:
            text = playlist.read_all()[0].decode()
        assert "New" in text
        assert "l.png" in text
        assert "/other\n" in text
        with Watch(service.port, "/other") as other:
            assert other.read(PACKET)[:1] == b"G"
        news.advance()
        news.end()
        assert viewer.read_all() == (news.plain(6, 7), True)
        assert origin.count(news.segment_path(2)) == 1, "the stream was opened again"


def test_reload_ignores_a_file_that_is_being_written(origin: Origin, tmp_path: Path) -> None:
    """The file is empty for a moment; without its token, the server would be open."""
    news = live(origin)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, {"news": news.url}, token=TOKEN))
        viewer = stack.enter_context(Watch(service.port, f"/news?token={TOKEN}"))
        viewer.read(len(news.plain(2, 5)))
        service.write("")
        service.send(signal.SIGHUP)
        service.wait_for("not reloaded: the file no longer has any streams")
        news.advance()
        assert viewer.read(len(news.plain(5, 6))) == news.plain(5, 6)
        with Watch(service.port, "/status") as status:
            assert status.status == 401


def test_reload_ignores_a_file_that_was_emptied_after_a_reload(
    origin: Origin, tmp_path: Path
) -> None:
    """The same holds if the server started without streams."""
    news = live(origin)
    with Service(tmp_path, {}, token=TOKEN) as service:
        service.configure({"news": news.url}, token=TOKEN)
        service.send(signal.SIGHUP)
        service.wait_for("reloaded: 1 stream added")
        service.write("")
        service.send(signal.SIGHUP)
        service.wait_for("not reloaded: the file no longer has any streams")
        with Watch(service.port, "/status") as status:
            assert status.status == 401


def test_reload_changes_the_linger_of_a_running_channel(origin: Origin, tmp_path: Path) -> None:
    news = live(origin)
    with Service(tmp_path, {"news": news.url}, options={"linger": 600}) as service:
        with Watch(service.port, "/news") as viewer:
            viewer.read(PACKET)
        service.wait_for(" left: ")
        reload(service, {"news": news.url}, options={"linger": 0})
        origin.wait_connections(0)


CHANGES: dict[str, dict[str, object]] = {
    "url": {"url": "{other}"},
    "one more url": {"url": ["{url}", "{other}"]},
    "quality": {"quality": "live,best"},
    "headers": {"headers": {"X-Key": "new"}},
    "proxy": {"proxy": "http://127.0.0.1:9"},
    "upstream option": {"streamlink": {"hls-live-edge": 2}},
    "threads": {"threads": 2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changed_stream_disconnects_its_viewers(
    origin: Origin, serve: Serve, change: dict[str, object]
) -> None:
    news, other = live(origin), live(origin, "other")
    site = serve({"news": news.url, "stays": other.url})
    texts = json.dumps({"url": news.url, **change})
    settings = json.loads(texts.replace("{url}", news.url).replace("{other}", other.url))
    changed = serve({"news": settings, "stays": other.url}).config
    viewer, neighbour = site.watch("/news"), site.watch("/stays")
    neighbour.read(len(other.plain(2, 5)))
    viewer.read(len(news.plain(2, 5)))
    site.server.reload(changed)
    assert viewer.read_all() == (b"", False), "without a final chunk, players reconnect"
    other.advance()
    other.end()
    assert neighbour.read_all() == (other.plain(5, 6), True)


def test_removed_stream_disconnects_its_viewers(origin: Origin, tmp_path: Path) -> None:
    streams = {"news": live(origin).url, "old": live(origin, "old").url}
    with Service(tmp_path, streams) as service, Watch(service.port, "/old") as viewer:
        viewer.read(PACKET)
        reload(service, {"news": streams["news"]})
        assert not viewer.read_all()[1]
        with Watch(service.port, "/old") as gone:
            assert gone.status == 404
        service.wait_for("old: viewer 127.0.0.1 disconnected by the server: ")


def test_stream_that_a_reload_corrects_plays_at_once(origin: Origin, serve: Serve) -> None:
    """The failure of an old start in progress does not count for the corrected stream."""
    news = live(origin)
    hung = origin.fault("/hung", StallHeaders(), times=None)
    site = serve({"news": f"{origin.url}/hung"})
    repaired = serve({"news": news.url}).config
    waiting = socket.create_connection(("127.0.0.1", site.port), TIMEOUT)
    with contextlib.closing(waiting):
        waiting.sendall(b"GET /news HTTP/1.1\r\nHost: tv\r\n\r\n")
        hung.wait_held()
        site.server.reload(repaired)
        assert waiting.recv(12)
        assert site.watch("/news").status == 200


def test_reload_of_a_broken_file_changes_nothing(origin: Origin, tmp_path: Path) -> None:
    news = live(origin)
    with Service(tmp_path, {"news": news.url}) as service, Watch(service.port, "/news") as viewer:
        viewer.read(len(news.plain(2, 5)))
        for count, text in enumerate(("streams: [", "streams: {news: 5}\nserver: {prot: 1}"), 1):
            service.write(text)
            service.send(signal.SIGHUP)
            service.wait_for_count("not reloaded: config.yml:", count)
        service.wait_for("not reloaded: .*server.prot: unknown key: did you mean port")
        news.advance()
        news.end()
        assert viewer.read_all() == (news.plain(5, 6), True)


def test_reload_of_a_missing_file_changes_nothing(origin: Origin, tmp_path: Path) -> None:
    with Service(tmp_path, {"news": live(origin).url}) as service:
        (tmp_path / "config.yml").unlink()
        service.send(signal.SIGHUP)
        service.wait_for("not reloaded: config.yml: no such file")
        with Watch(service.port, "/news") as viewer:
            assert viewer.status == 200


def test_change_of_the_port_needs_a_restart(origin: Origin, tmp_path: Path) -> None:
    streams = {"news": live(origin).url}
    with Service(tmp_path, streams) as service:
        reload(service, streams, port=free_port())
        words = "changes to server.host and server.port take effect after a restart"
        service.wait_for(f"(?i)warning {words}")
        reload(service, streams)
        assert service.count(words) == 1, "no warning: the file has the port in use"
        with Watch(service.port, "/health") as watch:
            assert watch.status == 200


def test_new_token_applies_at_once(origin: Origin, tmp_path: Path) -> None:
    streams = {"news": live(origin).url}
    with Service(tmp_path, streams, level="debug") as service:
        with Watch(service.port, "/news") as viewer:
            viewer.read(PACKET)
            reload(service, streams, token=TOKEN)
            for path, status in (("/news", 401), (f"/news?token={TOKEN}", 200)):
                with Watch(service.port, path) as watch:
                    assert watch.status == status
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0
        assert TOKEN not in "".join(service.errors())


#### The end ####


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_server_with_many_viewers_ends_in_time(origin: Origin, tmp_path: Path, count: int) -> None:
    news = live(origin)
    hung = origin.fault("/hung", StallHeaders(), times=None)
    streams = {"news": news.url, "hung": f"{origin.url}/hung"}
    with Service(tmp_path, streams, max_viewers=2000) as service, contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", service.port), TIMEOUT)
            stack.enter_context(sock)
            sock.sendall(b"GET /news HTTP/1.1\r\nHost: tv\r\n\r\n")
        waiting = stack.enter_context(
            socket.create_connection(("127.0.0.1", service.port), TIMEOUT)
        )
        waiting.sendall(b"GET /hung HTTP/1.1\r\nHost: tv\r\n\r\n")
        hung.wait_held()
        with Watch(service.port, "/health") as health:
            expected = json.loads(health.read_all()[0])["streams"]
        assert expected == 2
        news.end()
        service.send(signal.SIGTERM)
        assert service.wait(EXIT_TIME) == 0


def test_new_requests_are_refused_during_a_shutdown(origin: Origin, tmp_path: Path) -> None:
    with Service(tmp_path, {"news": live(origin).url}) as service:
        with Watch(service.port, "/news") as viewer:
            viewer.read(PACKET)
            service.send(signal.SIGTERM)
            assert not viewer.read_all()[1]
        with Watch(service.port, "/news") as late:
            assert late.status == 503
            assert int(late.headers["Retry-After"]) > 0
        with Watch(service.port, "/health") as health:
            assert health.status == 503
            assert json.loads(health.read_all()[0])["status"] == "stopping"
        assert service.wait(EXIT_TIME) == 0
