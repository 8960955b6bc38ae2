"""HTTP as clients see it: a real server and origin, raw sockets, and a check of every byte."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser

import pytest

import pipe
from tests import media
from tests.origin import (
    Body,
    Break,
    Close,
    Fault,
    Origin,
    Playlist,
    Stall,
    StallHeaders,
    Status,
    master,
)
from tests.server import BROWSER, TIMEOUT, Site
from tests.threads import Task

Serve = Callable[..., Site]

SECRET = "s3cret"
GET_NEWS = b"GET /news HTTP/1.1\r\nHost: tv.example\r\n\r\n"


@dataclass(frozen=True)
class Raw:
    """An answer as received from the socket."""

    status: int
    version: str
    headers: Message
    body: bytes

    @property
    def error(self) -> str:
        """The words of an error, which is a JSON document of the announced length."""
        assert self.headers["Content-Type"] == "application/json"
        assert int(self.headers["Content-Length"]) == len(self.body)
        assert set(json.loads(self.body)) == {"error"}
        words = json.loads(self.body)["error"]
        assert isinstance(words, str)
        assert words
        return words


def parse(data: bytes) -> Raw:
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator, f"no answer: {data!r}"
    line, _, fields = head.partition(b"\r\n")
    version, status, _ = line.decode("ascii").split(" ", 2)
    return Raw(int(status), version, BytesParser().parsebytes(fields), body)


def ask(site: Site, request: bytes) -> Raw:
    """One request and its answer; the server closes the connection."""
    return parse(site.raw(request))


def get(site: Site, target: str, version: str = "1.1", **headers: str) -> Raw:
    """A GET with an unchanged target."""
    lines = [f"GET {target} HTTP/{version}", "Host: tv.example"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ask(site, "\r\n".join([*lines, "", ""]).encode("latin-1"))


def dechunk(body: bytes) -> tuple[bytes, bool]:
    """The payload of a chunked body, and whether the body ends with the final chunk."""
    parts: list[bytes] = []
    while match := re.match(rb"([0-9a-f]+)\r\n", body):
        size, start = int(match[1], 16), match.end()
        if size == 0:
            assert body[start:] == b"\r\n", "bytes follow the final chunk"
            return b"".join(parts), True
        parts.append(body[start : start + size])
        if len(body) < start + size + 2:  # the body ends within the chunk
            return b"".join(parts), False
        assert body[start + size : start + size + 2] == b"\r\n"
        body = body[start + size + 2 :]
    assert not body
    return b"".join(parts), False


def vod(origin: Origin, name: str = "vod") -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(4)[:2]))


@pytest.fixture
def news(origin: Origin, serve: Serve) -> Site:
    """A site with one stream: a short, finite TS playlist."""
    return serve({"news": vod(origin).url}, timeout=5)


NEWS = b"".join(media.ts_segments(4)[:2])


#### Health ####


@pytest.mark.parametrize("path", ["/", "/health"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_health_reports_the_state_of_the_server(
    serve: Serve, origin: Origin, path: str, version: str
) -> None:
    url = vod(origin).url
    answer = get(serve({"news": url, "sport": url}), path, version)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    content = json.loads(answer.body)
    assert set(content) >= {"status", "streams", "viewers", "uptime_seconds"}
    assert (content["status"], content["streams"], content["viewers"]) == ("ok", 2, 0)
    assert isinstance(content["uptime_seconds"], (int, float))
    assert 0 <= content["uptime_seconds"] < 60
    assert origin.requests == ()


def test_health_counts_viewers(origin: Origin, serve: Serve) -> None:
    live = origin.add(Playlist("live", media.ts_segments(4), mode="live"))
    site = serve({"news": live.url}, timeout=5)
    watches = [site.watch("/news") for _ in range(2)]
    assert [watch.status for watch in watches] == [200, 200]
    assert site.get("/health").json["viewers"] == 2


#### Other methods ####

OF_NEWS = ["/news", "/news?quality=1080p", "/news?x=y"]


@pytest.mark.parametrize("path", OF_NEWS)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_head_of_a_stream_opens_nothing(
    news: Site, origin: Origin, path: str, version: bytes
) -> None:
    answer = ask(news, b"HEAD %b HTTP/%b\r\nHost: x\r\n\r\n" % (path.encode(), version))
    assert answer.status == 200
    assert answer.body == b""
    assert answer.headers["Content-Type"] == "video/mp2t"
    assert answer.headers["Accept-Ranges"] == "none"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Connection"] == "close"
    assert origin.requests == ()
    assert news.channels.viewer_count() == 0


def test_head_has_the_last_known_type(origin: Origin, serve: Serve) -> None:
    init, fragments = media.fmp4(4)
    playlist = origin.add(Playlist("films", fragments[:1], init=init, extension=".m4s"))
    site = serve({"films": playlist.url, "news": vod(origin).url}, timeout=5)
    assert site.get("/films").headers["Content-Type"] == "video/mp4"
    origin.clear_requests()
    assert site.ask("HEAD", "/films").headers["Content-Type"] == "video/mp4"
    assert site.ask("HEAD", "/news").headers["Content-Type"] == "video/mp2t"
    assert origin.requests == ()


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/health", 200), ("/nothing", 404), ("/../x", 404)]
)
def test_head_of_a_document_has_the_same_headers_and_no_body(
    news: Site, path: str, status: int
) -> None:
    whole = get(news, path)
    head = ask(news, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (head.status, head.body) == (status, b"")
    assert whole.status == status
    for name in ("Content-Type", "Content-Length", "Cache-Control", "Connection"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    "line",
    [
        b"OPTIONS / HTTP/1.0",
        b"OPTIONS / HTTP/1.1\r\nHost: x",
        b"OPTIONS * HTTP/1.1\r\nHost: x",
        b"OPTIONS * HTTP/1.0",
        b"OPTIONS /news HTTP/1.1\r\nHost: x",
        b"OPTIONS /nothing HTTP/1.1\r\nHost: x",
    ],
)
def test_options_lists_the_allowed_methods(news: Site, origin: Origin, line: bytes) -> None:
    answer = ask(news, line + b"\r\n\r\n")
    assert (answer.status, answer.body) == (204, b"")
    assert {"GET", "HEAD", "OPTIONS"} <= set(answer.headers["Allow"].split(", "))
    assert "Content-Length" not in answer.headers
    assert origin.requests == ()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW", "get"])
@pytest.mark.parametrize("path", ["/", "/news", "/nothing"])
def test_other_methods_are_not_allowed(news: Site, origin: Origin, method: str, path: str) -> None:
    answer = ask(news, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.status == 405
    assert answer.error
    assert {"GET", "HEAD", "OPTIONS"} <= set(answer.headers["Allow"].split(", "))
    assert origin.requests == ()


#### Names ####


@pytest.mark.parametrize(
    "target",
    [
        "/nothing",
        "/Nothing/",
        "/News/7.TS",
        "/news/news",
        "/news.TSX",
        "/news;x",
        "/news%00",
        "/news%0a",
        "/news%20",
        "/news%",
        "/news%2f",
        "/%2fnews",
        "/%20news",
        "news",
        "xnews.m3u",
        "*",
        "?news",
        "\\news",
        "/\\news",
        "/./news",
        "/../news",
        "/news/../news",
        "/%2e%2e/news",
        "/..%2fnews",
        "/..%5cnews",
        "/%252e%252e%252fnews",
        "/%c0%ae%c0%ae/news",
        "/..%c0%afnews",
        "/%ff",
        "/n\xe9ws",
        "/n\xc3\xa9ws",
        "/n%c3%a9ws",
        "/%EF%BD%8Eews",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "/file:///etc/passwd",
        "file:///etc/passwd",
        "http://[/news",
        "/%0d%0aSet-Cookie:%20a=b",
        "/health/",
        "/status/..",
        "/" + "a" * 5000,
        "/" + "../" * 1000 + "news",
    ],
    ids=lambda target: re.sub(r"[^ -~]", "?", target)[:40],
)
def test_unknown_and_malformed_names_are_not_found(news: Site, origin: Origin, target: str) -> None:
    answer = get(news, target)
    assert answer.status == 404
    assert answer.error
    assert "passwd" not in answer.error
    assert "Set-Cookie" not in answer.headers
    assert origin.requests == ()


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/News", "./news"),
        ("/%4eEWS", "./news"),
        ("/news/", "../news"),
        ("/NEWS//?a=b&token=%20x", "../../news?a=b&token=%20x"),
        ("/News.m3u8?quality=best", "./news.m3u8?quality=best"),
        ("/News.M3U", "./news.m3u"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_name_with_capitals_or_slashes_redirects_to_the_stream(
    news: Site, origin: Origin, method: str, target: str, location: str
) -> None:
    """Phone keyboards start with a capital.  A relative address is correct behind any proxy."""
    answer = ask(news, f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (answer.status, answer.headers["Location"], answer.body) == (302, location, b"")
    assert (answer.headers["Content-Length"], origin.requests) == ("0", ())
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_redirects_do_not_reveal_names_without_the_token(serve: Serve) -> None:
    site = serve({"news": "http://origin.example/x.m3u8"}, server={"token": "s3cret"})
    for target in ("/News", "/news/", "/Nothing", "/nothing/"):
        assert get(site, target).status == 401


@pytest.mark.parametrize("accept", ["*/*", BROWSER])
def test_name_may_end_in_ts(news: Site, accept: str) -> None:
    """Some players choose by the extension; a browser also gets the media at this address."""
    answer = get(news, "/news.ts", Accept=accept)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "video/mp2t")
    assert dechunk(answer.body) == (NEWS, True)
    head = ask(news, f"HEAD /news.ts HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    assert (head.status, head.headers["Content-Type"]) == (200, "video/mp2t")


@pytest.mark.parametrize("target", ["/%6eews", "http://tv.example/news", "/n%65ws?a=%2e%2e"])
def test_name_may_be_encoded_or_part_of_a_full_address(news: Site, target: str) -> None:
    answer = get(news, target)
    assert answer.status == 200
    assert dechunk(answer.body) == (NEWS, True)


QUERIES = [
    "?",
    "?x=1",
    "?quality=",
    "?quality",
    "?_=1&&;=&a=b&a=c",
    "?%ff=%ff&%00=%0d%0a",
    "?path=../../etc/passwd",
    "?Quality=1080p",
    "?" + "x" * 20_000,
]
of_every_query = pytest.mark.parametrize("query", QUERIES, ids=[query[:25] for query in QUERIES])


@of_every_query
def test_unknown_parameters_are_ignored(news: Site, query: str) -> None:
    answer = get(news, "/news" + query, "1.0")
    assert (answer.status, answer.body) == (200, NEWS)


@of_every_query
def test_health_ignores_unknown_parameters(news: Site, query: str) -> None:
    assert json.loads(get(news, "/health" + query).body)["status"] == "ok"


#### The media ####


def test_http11_body_is_chunked_and_exact(news: Site) -> None:
    answer = ask(news, GET_NEWS)
    assert (answer.status, answer.version) == (200, "HTTP/1.1")
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert dechunk(answer.body) == (NEWS, True)


@pytest.mark.parametrize("headers", [{}, {"Connection": "keep-alive"}, {"TE": "chunked"}])
def test_http10_body_is_not_chunked(news: Site, headers: dict[str, str]) -> None:
    answer = get(news, "/news", "1.0", **headers)
    assert answer.status == 200
    assert "Transfer-Encoding" not in answer.headers
    assert "Content-Length" not in answer.headers
    assert answer.headers["Connection"] == "close"
    assert answer.body == NEWS


ODD_REQUESTS: dict[str, dict[str, str]] = {
    "plain": {},
    "range from start": {"Range": "bytes=0-"},
    "range": {"Range": "bytes=10-99"},
    "suffix range": {"Range": "bytes=-5"},
    "impossible range": {"Range": "bytes=999999999-"},
    "several ranges": {"Range": "bytes=0-1,5-6"},
    "malformed range": {"Range": "lines=x"},
    "conditional range": {"Range": "bytes=0-", "If-Range": '"x"', "If-Match": '"x"'},
    "not modified": {"If-None-Match": "*", "If-Modified-Since": "Mon, 01 Jan 2090 00:00:00 GMT"},
    "icy": {"Icy-MetaData": "1"},
    "compressed": {"Accept-Encoding": "gzip, deflate, br, identity;q=0"},
    "of a type": {"Accept": "text/plain"},
    "keep alive": {"Connection": "keep-alive", "Keep-Alive": "timeout=60"},
    "upgrade": {"Connection": "Upgrade", "Upgrade": "h2c"},
}


@pytest.mark.parametrize("headers", ODD_REQUESTS.values(), ids=list(ODD_REQUESTS))
def test_request_headers_do_not_change_the_media(news: Site, headers: dict[str, str]) -> None:
    answer = get(news, "/news", **headers)
    assert answer.status == 200
    assert dechunk(answer.body) == (NEWS, True)
    names = {name.lower() for name in answer.headers}
    assert not names & {"content-length", "content-range", "content-encoding", "etag", "upgrade"}
    assert not [name for name in names if name.startswith("icy")]
    expected = {
        "Content-Type": "video/mp2t",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
        "Accept-Ranges": "none",
        "Connection": "close",
        "Transfer-Encoding": "chunked",
    }
    for name, value in expected.items():
        assert answer.headers.get_all(name) == [value]


MATROSKA = b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 2000
COVER = b"ID3\3\0\0\0\x0c\0\0" + 3 * 65536 * b"\xff"  # a tag of 192 KiB
OTHER = b"RIFF" + bytes(range(256)) * 2000
FILES: dict[str, tuple[str, Callable[[], bytes], Callable[[], bytes]]] = {
    "ts": ("video/mp2t", lambda: NEWS, lambda: NEWS),
    "ts from inside a packet": ("video/mp2t", lambda: NEWS[100:], lambda: NEWS[100:]),
    "fmp4": ("video/mp4", lambda: fmp4_file(), lambda: fmp4_file()),
    "adts": ("audio/aac", lambda: aac_file(), lambda: aac_file()),
    "id3 version 2": (
        "audio/aac", lambda: media.id3_timestamp(1, 2) + aac_file(), lambda: aac_file()
    ),
    "id3 version 4": (
        "audio/aac", lambda: media.id3_timestamp(1, 4) + aac_file(), lambda: aac_file()
    ),
    "mp3": ("audio/mpeg", lambda: audio_file("libmp3lame"), lambda: audio_file("libmp3lame")),
    "mp3 behind its cover": (
        "audio/mpeg", lambda: COVER + audio_file("libmp3lame"), lambda: audio_file("libmp3lame")
    ),
    "mp2": ("audio/mpeg", lambda: audio_file("mp2"), lambda: audio_file("mp2")),
    "ac3 behind a tag": (
        "audio/ac3", lambda: media.id3_timestamp(1, 3) + audio_file("ac3"),
        lambda: audio_file("ac3"),
    ),
    "eac3": ("audio/eac3", lambda: audio_file("eac3"), lambda: audio_file("eac3")),
    "matroska": ("video/x-matroska", lambda: MATROSKA, lambda: MATROSKA),
    "other": ("application/octet-stream", lambda: OTHER, lambda: OTHER),
    "five bytes": ("application/octet-stream", lambda: b"\0\1\2\3\4", lambda: b"\0\1\2\3\4"),
    "one byte": ("application/octet-stream", lambda: b"\0", lambda: b"\0"),
}  # fmt: skip


def fmp4_file() -> bytes:
    init, fragments = media.fmp4(4)
    return init + b"".join(fragments)


def audio_file(codec: str) -> bytes:
    return b"".join(media.audio_frames(codec))


def aac_file() -> bytes:
    return b"".join(media.aac_segments(4))


@pytest.mark.parametrize(("kind", "served", "expected"), FILES.values(), ids=list(FILES))
def test_type_is_detected_from_the_first_bytes(
    origin: Origin,
    serve: Serve,
    kind: str,
    served: Callable[[], bytes],
    expected: Callable[[], bytes],
) -> None:
    url = origin.add_file("/file", served(), content_type="text/plain")
    answer = get(serve({"file": url}, timeout=5), "/file")
    assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
    assert dechunk(answer.body) == (expected(), True)


def test_initialization_section_precedes_fmp4_segments(origin: Origin, serve: Serve) -> None:
    init, fragments = media.fmp4(4)
    url = origin.add(Playlist("films", fragments, init=init, extension=".m4s")).url
    answer = get(serve({"films": url}, timeout=5), "/films")
    assert answer.headers["Content-Type"] == "video/mp4"
    assert dechunk(answer.body) == (init + b"".join(fragments), True)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_aac_segments_are_sent_without_their_tags(
    origin: Origin, serve: Serve, version: int
) -> None:
    segments = media.aac_segments(4)
    tagged = [media.id3_timestamp(n, version) + data for n, data in enumerate(segments)]
    url = origin.add(Playlist("radio", tagged, extension=".aac")).url
    answer = get(serve({"radio": url}, timeout=5), "/radio")
    assert answer.headers["Content-Type"] == "audio/aac"
    assert dechunk(answer.body) == (b"".join(segments), True)


#### Qualities ####


def two_qualities(origin: Origin) -> str:
    small = Playlist("small", media.ts_segments(4)[:1])
    large = Playlist("large", media.ts_segments(4)[1:2])
    return origin.add(master("both", {"360p": small, "720p": large})).url


@pytest.mark.parametrize(
    ("query", "segment"),
    [
        ("", 1),
        ("?quality=best", 1),
        ("?quality=worst", 0),
        ("?quality=360p", 0),
        ("?quality=1080p,360p", 0),
        ("?quality=720p&x=y", 1),
        ("?quality=%33%36%30p", 0),
    ],
)
def test_quality_selects_a_variant(origin: Origin, serve: Serve, query: str, segment: int) -> None:
    site = serve({"news": two_qualities(origin)}, timeout=5)
    answer = get(site, "/news" + query)
    assert answer.status == 200
    assert dechunk(answer.body) == (media.ts_segments(4)[segment], True)


@pytest.mark.parametrize("wanted", ["1080p", "1080p,144p", "../etc", "%00", "<b>"])
def test_quality_that_does_not_exist_is_not_found(
    origin: Origin, serve: Serve, wanted: str
) -> None:
    site = serve({"news": two_qualities(origin)}, timeout=5)
    answer = get(site, f"/news?quality={wanted}")
    assert answer.status == 404
    assert "360p" in answer.error
    assert "720p" in answer.error
    assert dechunk(get(site, "/news").body)[1], "other qualities are served as before"


def test_configured_quality_that_does_not_exist_is_a_failed_upstream(
    origin: Origin, serve: Serve
) -> None:
    stream = {"url": two_qualities(origin), "quality": "1080p"}
    site = serve({"news": stream}, timeout=5)
    answer = get(site, "/news")
    assert answer.status == 502
    assert "360p" in answer.error
    assert dechunk(get(site, "/news?quality=360p").body)[1]


#### The upstream fails before the first byte ####


def broken(origin: Origin, fault: Fault) -> str:
    playlist = vod(origin)
    origin.fault(playlist.path, fault, times=None)
    return playlist.url


def no_origin(origin: Origin) -> str:
    url = vod(origin).url
    origin.stop()
    return url


FAILURES: dict[str, Callable[[Origin], str]] = {
    "down": no_origin,
    "forbidden": lambda origin: broken(origin, Status(403)),
    "not found": lambda origin: broken(origin, Status(404)),
    "gone": lambda origin: broken(origin, Status(410, b"Traceback: " + SECRET.encode())),
    "broken server": lambda origin: broken(origin, Status(500)),
    "closes": lambda origin: broken(origin, Close()),
    "resets": lambda origin: broken(origin, Close(reset=True)),
    "no playlist": lambda origin: broken(origin, Body(b"<html>" + SECRET.encode())),
    "no file": lambda origin: origin.url + "/nothing",
    "empty file": lambda origin: origin.add_file("/empty", b""),
}


@pytest.mark.parametrize("make", FAILURES.values(), ids=list(FAILURES))
def test_failed_upstream_is_explained_without_private_data(
    origin: Origin, serve: Serve, make: Callable[[Origin], str]
) -> None:
    url = make(origin) + f"?key={SECRET}"
    answer = get(serve({"news": url}, timeout=2), "/news")
    assert answer.status == 502
    words = answer.error
    for private in ("127.0.0.1", str(origin.port), "://", "/", SECRET, "Error", "Exception"):
        assert private not in words
    assert " " in words


@pytest.mark.parametrize("code", [403, 404, 500])
def test_error_has_the_status_of_the_origin(origin: Origin, serve: Serve, code: int) -> None:
    site = serve({"news": broken(origin, Status(code))}, timeout=2)
    assert str(code) in get(site, "/news").error


@pytest.mark.parametrize("scheme", ["htp", "rtsp", "udp"])
def test_unsupported_scheme_is_explained(serve: Serve, scheme: str) -> None:
    answer = get(serve({"news": f"{scheme}://h.example/x"}), "/news")
    assert answer.status == 502
    assert answer.error == f"{scheme}:// is not supported: use http:// or https://"


STALLS: dict[str, tuple[str, Fault]] = {
    "playlist's head": ("/vod/index.m3u8", StallHeaders()),
    "playlist": ("/vod/index.m3u8", Stall(5)),
    "segment's head": ("/vod/*.ts", StallHeaders()),
    "segment's first byte": ("/vod/*.ts", Stall(0)),
}


@pytest.mark.parametrize(("path", "fault"), STALLS.values(), ids=list(STALLS))
def test_stalled_upstream_fails_in_time(
    origin: Origin, serve: Serve, path: str, fault: Fault
) -> None:
    url = vod(origin).url
    origin.fault(path, fault, times=None)
    site = serve({"news": url}, timeout=0.5)
    began = time.monotonic()
    answer = get(site, "/news")
    assert answer.status == 504
    assert answer.error
    assert 0.4 <= time.monotonic() - began < 2


@pytest.mark.parametrize(
    "text",
    [b"", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n", b"#EXTM3U\n#EXT-X-ENDLIST\n"],
    ids=["empty", "live", "ended"],
)
def test_playlist_without_segments_fails_in_time(origin: Origin, serve: Serve, text: bytes) -> None:
    playlist = vod(origin)
    playlist.override = text
    site = serve({"news": playlist.url}, timeout=0.5)
    began = time.monotonic()
    answer = get(site, "/news")
    assert answer.status in (502, 504)
    assert answer.error
    assert time.monotonic() - began < 2


def test_waiting_viewers_share_a_failed_start(origin: Origin, serve: Serve) -> None:
    playlist = vod(origin)
    stall = origin.fault(playlist.path, StallHeaders(), Status(404), times=None)
    site = serve({"news": playlist.url}, timeout=5)
    askers = [Task(lambda: get(site, "/news")) for _ in range(5)]
    stall.wait_held()
    stall.release()
    answers = [asker.result() for asker in askers]
    assert [answer.status for answer in answers] == [502] * 5
    assert len({answer.error for answer in answers}) == 1
    assert origin.count(playlist.path) == 1


def test_failed_start_is_remembered_for_a_moment(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    playlist = vod(origin)
    origin.fault(playlist.path, Status(404))
    site = serve({"news": playlist.url}, timeout=5)
    first, second = get(site, "/news"), get(site, "/news")
    assert (first.status, second.status) == (502, 502)
    assert first.error == second.error
    assert origin.count(playlist.path) == 1
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 0.0)
    assert dechunk(get(site, "/news").body) == (NEWS, True)


#### The upstream fails later ####


def check_broken_off(answer: Raw, stream: bytes, least: int) -> None:
    """Check that a body has only the media that arrived, and no final chunk."""
    assert answer.status == 200
    payload, is_final = dechunk(answer.body)
    assert not is_final
    assert stream.startswith(payload)
    assert len(payload) >= least


LENGTH = 300 * media.PACKET


@pytest.mark.parametrize(
    ("fault", "least"),
    [(Break(LENGTH), LENGTH), (Break(LENGTH, reset=True), 1)],
    ids=["closed", "reset"],
)
def test_broken_file_has_no_final_chunk(
    origin: Origin, serve: Serve, fault: Fault, least: int
) -> None:
    stream = b"".join(media.ts_segments(4))
    url = origin.add_file("/file", stream)
    origin.fault("/file", fault)
    origin.fault("/file", Close(), times=None)
    answer = get(serve({"file": url}, timeout=1, reconnect=0), "/file")
    check_broken_off(answer, stream, least)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "bare"])
def test_live_source_that_ends_has_no_final_chunk(
    origin: Origin, serve: Serve, chunked: bool
) -> None:
    stream = b"".join(media.ts_segments(4))
    url = origin.add_endless("/relay", lambda: [stream], chunked=chunked)
    check = origin.fault("/relay", times=1)
    origin.fault("/relay", Close(), times=None)
    answer = get(serve({"relay": url}, timeout=1, reconnect=0), "/relay")
    assert check.taken == 1
    check_broken_off(answer, stream, len(stream))


def test_stream_of_a_vanished_playlist_has_no_final_chunk(origin: Origin, serve: Serve) -> None:
    live = origin.add(Playlist("live", media.ts_segments(4), mode="live", window=3))
    site = serve({"news": live.url}, timeout=0.5, reconnect=0)
    asker = Task(lambda: ask(site, GET_NEWS))
    origin.wait_for(live.segment_path(live.newest))
    origin.fault(live.path, Close(), times=None)
    stream = live.plain(live.oldest, live.newest + 1)
    check_broken_off(asker.result(), stream, len(stream))


def test_stream_of_an_ended_live_playlist_has_the_final_chunk(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    live = origin.add(Playlist("live", media.ts_segments(4), mode="live", window=3))
    site = serve({"news": live.url}, timeout=5)
    asker = Task(lambda: ask(site, GET_NEWS))
    origin.wait_for(live.segment_path(live.newest))
    live.advance()
    live.end()
    first = live.newest - 3
    assert dechunk(asker.result().body) == (live.plain(first, live.newest + 1), True)
    assert "news: the origin ended the stream" in caplog.text


#### The server stops ####


def test_stopping_server_answers_503(news: Site, origin: Origin) -> None:
    assert news.channels.stop(5)
    for path in ("/", "/health"):
        answer = get(news, path)
        assert answer.status == 503
        assert json.loads(answer.body)["status"] == "stopping"
    for request in (GET_NEWS, GET_NEWS.replace(b"GET", b"HEAD")):
        answer = ask(news, request)
        assert answer.status == 503
        assert re.fullmatch(r"[1-9]\d*", answer.headers["Retry-After"])
    assert get(news, "/news").error
    assert ask(news, b"OPTIONS / HTTP/1.0\r\n\r\n").status == 204
    assert origin.requests == ()


@pytest.mark.parametrize("http10", [False, True], ids=["1.1", "1.0"])
def test_stopping_server_disconnects_viewers(origin: Origin, serve: Serve, http10: bool) -> None:
    live = origin.add(Playlist("live", media.ts_segments(4), mode="live", window=3))
    site = serve({"news": live.url}, timeout=5)
    viewer = site.watch("/news", http10=http10)
    start = viewer.read(media.PACKET)
    assert site.channels.stop(TIMEOUT)
    rest, is_complete = viewer.read_all()
    assert live.plain(live.oldest, live.newest + 1).startswith(start + rest)
    assert is_complete is http10, "an HTTP/1.0 body ends with the connection"


def test_stop_ends_a_start_in_progress(origin: Origin, serve: Serve) -> None:
    playlist = vod(origin)
    stall = origin.fault(playlist.path, StallHeaders(), times=None)
    site = serve({"news": playlist.url}, timeout=10)
    asker = Task(lambda: ask(site, GET_NEWS))
    stall.wait_held()
    assert site.channels.stop(5)
    answer = asker.result()
    assert answer.status == 503
    assert answer.headers["Retry-After"].isdecimal()


#### Request heads ####


def test_each_answer_closes_its_connection(news: Site) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"
    assert news.raw(request * 3).count(b"HTTP/1.1 200 OK\r\n") == 1


def test_head_may_arrive_byte_by_byte(news: Site) -> None:
    with socket.create_connection(("127.0.0.1", news.port), TIMEOUT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert parse(b"".join(iter(lambda: sock.recv(4096), b""))).status == 200


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /health HTTP/1.1\n\n",
        b"GET /health HTTP/1.0\nHost: x\n\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET  /health  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 50_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(90)) + b"\r\n",
    ],
    ids=["line feeds", "line feeds 1.0", "no host", "spaces", "long", "many fields"],
)
def test_unusual_heads_are_read(news: Site, request_head: bytes) -> None:
    assert ask(news, request_head).status == 200


def test_empty_line_before_a_request_is_ignored(news: Site) -> None:
    """RFC 9112, 2.2: some old clients send one."""
    assert ask(news, b"\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n").status == 200


@pytest.mark.parametrize(
    "start", [b"", b"GET", b"GET /news HTTP/1.1\r\nHost: x\r\n", b"\0", b"GET /news\r\n"]
)
def test_head_without_an_end_is_refused_in_time(
    news: Site, origin: Origin, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(pipe, "HEAD_TIMEOUT", 0.2)
    began = time.monotonic()
    refused(news.raw(start))
    assert 0.15 <= time.monotonic() - began < 2
    assert origin.requests == ()


def test_slow_head_is_refused_in_time(news: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD_TIMEOUT is for the whole head, not for each byte."""
    monkeypatch.setattr(pipe, "HEAD_TIMEOUT", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", news.port), 0.02) as sock:
        assert drip(sock, b"GET /" + b"a" * 1000) < 1000
    assert time.monotonic() - began < 3


def drip(sock: socket.socket, data: bytes) -> int:
    """Send byte by byte; returns how many were sent until the server closed or answered."""
    for sent in range(len(data)):
        try:
            sock.sendall(data[sent : sent + 1])
            sock.recv(100)
        except TimeoutError:
            continue
        except OSError:
            pass
        return sent
    return len(data)


def refused(answer: bytes) -> None:
    """Check that the answer is a closed connection or an error in JSON."""
    if answer:
        parsed = parse(answer)
        assert parsed.status in (400, 408, 414, 431, 505)
        assert parsed.error


def exchange(site: Site, request: bytes) -> bytes:
    """The answer, or nothing if the server closed before it had read the whole request."""
    try:
        return site.raw(request)
    except (ConnectionResetError, BrokenPipeError):
        return b""


GARBAGE = {
    "empty lines": b"\r\n\r\n",
    "no words": b"   \r\n\r\n",
    "one word": b"GET\r\n\r\n",
    "no method": b"/news HTTP/1.1\r\n\r\n",
    "four words": b"GET /news HTTP/1.1 please\r\n\r\n",
    "another protocol": b"GET /news RTSP/1.0\r\n\r\n",
    "no version": b"GET /news HTTP/\r\n\r\n",
    "odd version": b"GET /news HTTP/one.one\r\n\r\n",
    "long version": b"GET /news HTTP/1.1.1\r\n\r\n",
    "large version": b"GET /news HTTP/1." + b"9" * 99 + b"\r\n\r\n",
    "http 0.9": b"GET /news\r\n\r\n",
    "http 0.9 head": b"HEAD /news\r\n\r\n",
    "http 2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http 3": b"GET /news HTTP/3.0\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    "zeros": bytes(1000) + b"\r\n\r\n",
    "high bytes": bytes(range(128, 256)) + b"\r\n\r\n",
    "media": b"\x47" * 1000 + b"\r\n\r\n",
    "line too long": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "field too long": b"GET /news HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "too many fields": b"GET /news HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "too much": b"GET /news HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "endless": b"\0" * 300_000,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_is_refused(
    news: Site, origin: Origin, garbage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "HEAD_TIMEOUT", 1.0)
    refused(exchange(news, garbage))
    assert origin.requests == ()
    assert get(news, "/health").status == 200, "the server works as before"


def test_client_that_leaves_at_once_does_no_harm(news: Site) -> None:
    for start in (b"", b"GET /he", GET_NEWS):
        with socket.create_connection(("127.0.0.1", news.port), TIMEOUT) as sock:
            sock.sendall(start)
    assert get(news, "/health").status == 200
