"""Fuzzing: raw sockets to a real server, broken bytes from a real origin; all seeds are fixed."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests import media
from tests.origin import Origin, Playlist
from tests.program import eventually
from tests.server import TIMEOUT, Site

# Without this mark, `python -m pytest` would take more than three minutes.
pytestmark = pytest.mark.long

Serve = Callable[..., Site]
Dice = random.Random

REFUSALS = {400, 404, 405, 408, 411, 413, 414, 417, 431, 501, 505}
# An odd request may still be a valid one for a page that opens no upstream; /NEWS redirects.
OPENED = {200, 204, 302}
GET = b"GET %s HTTP/1.1\r\nHost: tv\r\n\r\n"


#### Requests ####


def junk(dice: Dice, most: int = 40) -> bytes:
    return dice.randbytes(dice.randrange(1, most))


def cut_request(dice: Dice) -> bytes:
    request = GET % dice.choice([b"/news", b"/health", b"/status", b"/?token=x"])
    return request[: dice.randrange(len(request))]


def mutated_request(dice: Dice) -> bytes:
    request = bytearray(GET % b"/no-such-stream")
    for _ in range(dice.randrange(1, 6)):
        request[dice.randrange(len(request))] = dice.randrange(256)
    return bytes(request)


def odd_line(dice: Dice) -> bytes:
    words = [
        b"GET",
        b"get",
        b"G\0T",
        b"/x",
        b"*",
        b"HTTP/1.1",
        b"HTTP/9.9",
        b"HTTP/1.1.1",
        b"HTTP/",
    ]
    words += [b"http://x/y", b"\xff", b"", b"POST", b"CONNECT", b"a:443", junk(dice)]
    line = dice.choice([b" ", b"  ", b"\t"]).join(dice.choices(words, k=dice.randrange(1, 6)))
    return line + b"\r\nHost: tv\r\n\r\n"


def odd_name(dice: Dice) -> bytes:
    name = dice.choice(
        [b"/" + 30_000 * b"a", b"/\0", b"/news\0", "/n\u00e9ws".encode(), b"/NEWS", b"/\xff\xfe"]
    )
    return GET % (name + dice.choice([b"", b"/", b"?", b"#", b";", junk(dice).hex().encode()]))


def bad_escape(dice: Dice) -> bytes:
    parts = [b"%", b"%%", b"%zz", b"%f", b"%ff", b"%00", b"%c0%ae", b"%u002e", b"+", b"%25%32%65"]
    return GET % (b"/x" + b"".join(dice.choices(parts, k=dice.randrange(1, 9))))


def traversal(dice: Dice) -> bytes:
    dots = [b"..", b"%2e%2e", b"%2E.", b"..%00", b"%252e%252e", b"....", b"%c0%ae%c0%ae", b"..;"]
    slashes = [b"/", b"%2f", b"\\", b"%5c", b"//", b"%252f", b"/./"]
    steps = [dice.choice(dots) + dice.choice(slashes) for _ in range(dice.randrange(1, 8))]
    tail = dice.choice([b"etc/passwd", b"pipe.py", b"config.yml", b"windows\\win.ini"])
    return GET % (b"/" + b"".join(steps) + tail)


def header_flood(dice: Dice) -> bytes:
    line = dice.choice([b"X: y", b"X" * 3000 + b": y", b"Cookie: " + 3000 * b"c", b":", b" x"])
    return b"GET /x HTTP/1.1\r\n" + (line + b"\r\n") * dice.choice([101, 500, 5000]) + b"\r\n"


def odd_header(dice: Dice) -> bytes:
    lines = [b"Host: " + junk(dice), b"Host", b": x", junk(dice), b"A\0: b", b" folded", b"Host:"]
    lines += [b"Authorization: Basic " + junk(dice), b"Range: bytes=9-1,-", b"Expect: 100-continue"]
    lines += [b"Content-Length: -1", b"X-Forwarded-Proto: \x00", b"Connection: keep-alive"]
    chosen = dice.choices(lines, k=dice.randrange(1, 6))
    return b"GET /no-such-stream HTTP/1.1\r\n" + b"\r\n".join([*chosen, b"", b""])


def smuggling(dice: Dice) -> bytes:
    inner = GET % b"/news"
    length = dice.choice(
        [b"0", b"5", b"%d" % len(inner), b"+5", b"0x5", b"5, 6", b"9" * 40, b"\xb2"]
    )
    coding = dice.choice([b"chunked", b"Chunked", b" chunked", b"x, chunked", b"identity", b"\x0b"])
    headers = [b"Content-Length: " + length, b"Transfer-Encoding: " + coding]
    headers += [b"Content-Length: 0", b"Transfer-Encoding : chunked"]
    chosen = dice.sample(headers, dice.randrange(1, 4))
    method = dice.choice([b"POST", b"GET", b"PUT"])
    return b"\r\n".join([method + b" /x HTTP/1.1", *chosen, b"", b"0\r\n\r\n" + inner])


def pipelined(dice: Dice) -> bytes:
    return b"".join(GET % (b"/x%d" % number) for number in range(dice.randrange(2, 20)))


def noise(dice: Dice) -> bytes:
    return junk(dice, 3000) + dice.choice([b"", b"\r\n\r\n"])


KINDS: tuple[Callable[[Dice], bytes], ...] = (
    cut_request, mutated_request, odd_line, odd_name, bad_escape, traversal, header_flood,
    odd_header, smuggling, pipelined, noise,
)  # fmt: skip


def exchange(port: int, request: bytes) -> bytes:
    """Send a request and close the sending side; returns the whole answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        with contextlib.suppress(ConnectionError, OSError):
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                answer += part
    return answer


def assert_refused(request: bytes, answer: bytes) -> None:
    if not answer:
        return
    lines = re.findall(rb"^HTTP/1\.1 (?!100 )(\d{3}) ", answer, re.M)
    assert len(lines) == 1, f"{request!r} got {len(lines)} answers"
    status = int(lines[0])
    assert status in REFUSALS or status in OPENED, f"{request!r} got {answer!r}"
    body = answer.partition(b"\r\n\r\n")[2]
    assert b"root:" not in body
    assert b"import " not in body


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_requests_do_no_harm(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    caplog.set_level(logging.INFO)
    site = serve({"news": origin.add(Playlist("vod", media.ts_segments()[:1])).url})
    threads = threading.active_count()
    dice = Dice(500)
    requests = [KINDS[number % len(KINDS)](dice) for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: exchange(site.port, request), requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_refused(request, answer)
    assert sum(map(bool, answers)) > count / 3, "fewer than a third are answered"
    assert [record.getMessage() for record in caplog.records] == []
    assert origin.requests == (), "a request opened an upstream"
    eventually(lambda: threading.active_count() <= threads, "the threads end")
    assert site.get("/news").body == media.ts_segments()[0]


#### Origins ####


def mutate(dice: Dice, data: bytes) -> bytes:
    """A copy with some bytes changed, removed, doubled, inserted or cut off at the end."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 20])):
        at = dice.randrange(len(out) + 1)
        size = dice.choice([1, 1, 4, 40, 400])
        match dice.randrange(5):
            case 0:
                out[at : at + size] = dice.randbytes(len(out[at : at + size]))
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at:at] = dice.choice(TOKENS)
            case _:
                del out[at + (len(out) - at) // 2 :]
    return bytes(out)


TOKENS = [
    b"\n", b"\0", b"-1", b"99999999999999999999", b"nan", b"inf", b"#EXT-X-ENDLIST\n", b'"', b",",
    b"#EXT-X-MAP:URI=\"0.ts\",BYTERANGE=\"9@\"\n", b"#EXT-X-BYTERANGE:0@-1\n", b"\xff\xfe",
    b"#EXT-X-KEY:METHOD=AES-128,URI=\"0.ts\",IV=0xZZ\n", b"#EXT-X-MEDIA-SEQUENCE:-5\n",
    b"#EXT-X-TARGETDURATION:1e309\n", b"#EXT-X-DISCONTINUITY\n", b"#EXTINF:,\n", b"#EXTINF:-1e9,\n",
    b"#EXT-X-STREAM-INF:BANDWIDTH=x\n", b"#EXT-X-PROGRAM-DATE-TIME:0000\n", b"http://", b"//",
    b"#EXT-X-DATERANGE:ID=,START-DATE=x\n", b"G", b"ID3", b"\x00\x00\x00\x01ftyp", b"moof",
]  # fmt: skip
BAD_WORDS = ("the feeder failed", "died", "Traceback")


def playlist_text(count: int = 3, head: str = "") -> bytes:
    entries = "".join(f"#EXTINF:1.0,\n{number}.ts\n" for number in range(count))
    top = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n"
    return f"{top}{head}{entries}#EXT-X-ENDLIST\n".encode()


def master_text() -> bytes:
    inf = '#EXT-X-STREAM-INF:BANDWIDTH=90000,RESOLUTION=160x90,CODECS="avc1.42c00b"\nindex.m3u8\n'
    return f"#EXTM3U\n{inf}".encode()


def assert_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records]
    assert [text for text in texts if any(word in text for word in BAD_WORDS)] == []


COUNTS = [40, pytest.param(350, marks=pytest.mark.long)]


def ends(site: Site, path: str) -> bool:
    """Whether the answer to a viewer ends, in success or failure."""
    return site.get(path).status in (200, 404, 502, 504)


def try_all(site: Site, names: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda name: ends(site, f"/{name}"), names))


def rss() -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["playlist", "master"])
def test_mutated_playlists_do_no_harm(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, count: int, kind: str
) -> None:
    caplog.set_level(logging.WARNING)
    original = master_text() if kind == "master" else playlist_text()
    segment, dice = media.ts_segments()[0], Dice(len(kind))
    names = [f"s{number}" for number in range(count)]
    streams = {}
    for name in names:
        body = mutate(dice, original).replace(b"file:", b"")
        streams[name] = "hls://" + origin.add_file(f"/{name}/start.m3u8", body)
        origin.add_file(f"/{name}/index.m3u8", playlist_text(1))
        for number in range(3):
            origin.add_file(f"/{name}/{number}.ts", segment)
    site = serve(streams, timeout=0.5, reconnect=0.1, linger=0, server={"max_upstreams": 0})
    try_all(site, names)
    assert_no_errors(caplog)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("container", ["ts", "fmp4", "aac", "mp3", "encrypted"])
def test_mutated_segments_do_no_harm(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, container: str, count: int
) -> None:
    caplog.set_level(logging.WARNING)
    dice, head, init = Dice(len(container)), "", b""
    originals = list(islice(media.ts_segments(), 2))
    if container == "fmp4":
        init, fragments = media.fmp4()
        originals, head = list(fragments[:2]), '#EXT-X-MAP:URI="init.mp4"\n'
    elif container == "aac":
        originals = list(media.aac_segments()[:2])
    elif container == "mp3":
        originals = [b"".join(media.audio_frames("libmp3lame", 44_100))] * 2
    elif container == "encrypted":
        head = '#EXT-X-KEY:METHOD=AES-128,URI="key"\n'
    text, streams = playlist_text(2, head), {}
    for number in range(count):
        name = f"s{number}"
        streams[name] = origin.add_file(f"/{name}/index.m3u8", text)
        broken = [mutate(dice, data) for data in originals]
        for index, data in enumerate(broken):
            origin.add_file(f"/{name}/{index}.ts", data)
        origin.add_file(f"/{name}/init.mp4", mutate(dice, init) if dice.random() < 0.5 else init)
        origin.add_file(f"/{name}/key", dice.randbytes(dice.choice([16, 16, 16, 0, 5, 32])))
    site = serve(streams, timeout=0.5, reconnect=0.1, linger=0, server={"max_upstreams": 0})
    before = rss()
    try_all(site, list(streams))
    assert_no_errors(caplog)
    assert rss() - before < 100 * 2**20
