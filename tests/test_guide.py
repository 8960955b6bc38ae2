"""The programme guide at /epg.xml; real server and origin, tested from outside."""

from __future__ import annotations

import gzip
import itertools
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import pipe
from tests.origin import WEB_PAGE, Body, Break, Origin, Redirect, StallHeaders, Status
from tests.program import Service, eventually
from tests.server import Answer, Site, Watch

Serve = Callable[..., Site]

ACCOUNT = "username=ada.l&password=hunter2"
XMLTV = "/xmltv.php"
GUIDE = f"{XMLTV}?{ACCOUNT}"
TEXT = (
    b'<?xml version="1.0"?>\n<tv>' + random.Random(1).randbytes(300_000).hex().encode() + b"</tv>"
)

XHTML_PAGE = b"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN"
 "http://www.w3.org/TR/xhtml1/DTD/xhtml1-strict.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><body>Sign in</body></html>
"""


def add_guide(origin: Origin, data: bytes, path: str = XMLTV) -> str:
    return origin.add_file(path, data, content_type="application/xml") + f"?{ACCOUNT}"


def add_list(origin: Origin, guide: str, path: str = "/list.m3u", title: str = "One") -> str:
    text = f'#EXTM3U x-tvg-url="{guide}"\n#EXTINF:-1,{title}\n{origin.url}/{title}.m3u8\n'
    return origin.add_file(path, text.encode())


def guides(site: Site) -> list[str]:
    """The paths of the guides in the head of /playlist.m3u."""
    head = site.get("/playlist.m3u").body.decode().splitlines()[0]
    if head == "#EXTM3U":
        return []
    found = re.fullmatch(r'#EXTM3U x-tvg-url="([^"]+)" url-tvg="([^"]+)"', head)
    assert found
    assert found[1] == found[2]
    return [address.removeprefix(site.url) for address in found[1].split(",")]


def get(site: Site, headers: dict[str, str]) -> Answer:
    with Watch(site.port, "/epg.xml", **headers) as viewer:  # type: ignore[arg-type]
        body, is_complete = viewer.read_all()
        return Answer(viewer.status, viewer.headers, body, is_complete)


def loaded(site: Site, count: int) -> None:
    eventually(lambda: len(site.server.config.streams) == count, "the lists are loaded")


def test_configured_guide_is_forwarded(origin: Origin, serve: Serve) -> None:
    address = add_guide(origin, TEXT)
    site = serve({}, server={"epg": address}, user_agent="VLC/3")
    assert guides(site) == ["/epg.xml"]
    answer = site.get("/epg.xml")
    assert answer.status == 200
    assert answer.is_complete
    assert answer.body == TEXT
    assert answer.headers["Content-Type"] == "application/xml"
    assert answer.headers["Content-Length"] == str(len(TEXT))
    (request,) = origin.requests
    assert request.path == GUIDE
    assert request.headers["user-agent"] == "VLC/3"


def test_guides_of_lists_are_forwarded(origin: Origin, serve: Serve) -> None:
    first = add_list(origin, add_guide(origin, b"<tv>1</tv>", "/1.xml"), "/1.m3u")
    second = add_list(origin, add_guide(origin, b"<tv>2</tv>", "/2.xml"), "/2.m3u", "Two")
    keys = {"url": second, "headers": {"X-Account": "b"}}
    site = serve({}, playlists={"a": first, "b": keys})
    loaded(site, 2)
    assert guides(site) == ["/epg.xml", "/epg/b.xml"]
    assert site.get("/epg.xml").body == b"<tv>1</tv>"
    assert site.get("/epg/a.xml").body == b"<tv>1</tv>"
    assert site.get("/epg/b.xml").body == b"<tv>2</tv>"
    assert site.get("/epg/c.xml").status == 404
    accounts = [r.headers.get("x-account") for r in origin.requests if r.path.startswith("/2.xml")]
    assert accounts == ["b"]


def test_configured_guide_precedes_those_of_lists(origin: Origin, serve: Serve) -> None:
    of_list = add_list(origin, add_guide(origin, b"<tv>1</tv>", "/1.xml"))
    own = add_guide(origin, b"<tv>own</tv>")
    site = serve({}, playlists={"a": of_list}, server={"epg": own, "token": "t0ken"})
    loaded(site, 1)
    head = site.get("/playlist.m3u?token=t0ken").body.decode().splitlines()[0]
    paths = f"{site.url}/epg.xml?token=t0ken,{site.url}/epg/a.xml?token=t0ken"
    assert head == f'#EXTM3U x-tvg-url="{paths}" url-tvg="{paths}"'
    assert site.get("/epg.xml?token=t0ken").body == b"<tv>own</tv>"
    assert site.get("/epg/a.xml?token=t0ken").body == b"<tv>1</tv>"
    assert site.get("/epg.xml").status == 401
    assert site.get("/epg/a.xml").status == 401


def test_missing_guide_is_404(origin: Origin, serve: Serve) -> None:
    site = serve({})
    assert guides(site) == []
    assert site.get("/epg.xml").status == 404


def test_guide_of_a_list_that_is_not_loaded_yet_is_503(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, add_guide(origin, TEXT))
    thinking = origin.fault("/list.m3u", StallHeaders())
    site = serve({}, playlists={"a": address})
    thinking.wait_held()
    assert site.get("/epg.xml").status == 503
    assert site.get("/epg/a.xml").headers["Retry-After"] == "5"
    thinking.release()
    loaded(site, 1)
    assert site.get("/epg.xml").status == 200


def test_head_of_a_guide_sends_no_request(origin: Origin, serve: Serve) -> None:
    site = serve({}, server={"epg": add_guide(origin, TEXT)})
    answer = site.ask("HEAD", "/epg.xml")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Type"] == "application/xml"
    assert origin.requests == ()


@pytest.mark.parametrize("members", [1, 3])
def test_guide_is_decompressed_if_necessary(origin: Origin, serve: Serve, members: int) -> None:
    """A guide is forwarded unchanged, or decompressed for a client that does not accept gzip."""
    third = len(TEXT) // members
    pieces = [TEXT[n * third : (n + 1) * third] for n in range(members - 1)]
    pieces.append(TEXT[(members - 1) * third :])
    packed = b"".join(gzip.compress(piece) for piece in pieces)
    site = serve({}, server={"epg": add_guide(origin, packed)})
    as_it_is = get(site, {"Accept-Encoding": "deflate, gzip"})
    assert as_it_is.body == packed
    assert as_it_is.headers["Content-Encoding"] == "gzip"
    assert as_it_is.headers["Content-Length"] == str(len(packed))
    assert as_it_is.headers["Vary"] == "Accept-Encoding"
    plain = site.get("/epg.xml")
    assert plain.is_complete
    assert plain.body == TEXT
    assert plain.headers["Content-Encoding"] is None
    assert plain.headers["Transfer-Encoding"] == "chunked"
    assert plain.headers["ETag"] == f"W/{as_it_is.headers['ETag']}"
    old = site.get("/epg.xml", http10=True)
    assert old.body == TEXT
    assert old.headers["Transfer-Encoding"] is None


def test_guide_with_a_content_encoding_is_decoded(origin: Origin, serve: Serve) -> None:
    site = serve({}, server={"epg": add_guide(origin, TEXT)})
    packed = Body(gzip.compress(TEXT))

    class Encoded:
        def apply(self, answer: object) -> None:
            packed.apply(answer)  # type: ignore[arg-type]
            answer.headers["Content-Encoding"] = "gzip"  # type: ignore[attr-defined]

    origin.fault(XMLTV, Encoded(), times=None)
    assert site.get("/epg.xml").body == TEXT
    answer = get(site, {"Accept-Encoding": "gzip"})
    assert zlib.decompress(answer.body, 31) == TEXT


def test_validators_are_forwarded(origin: Origin, serve: Serve) -> None:
    site = serve({}, server={"epg": add_guide(origin, TEXT)})
    answer = site.get("/epg.xml")
    etag, date = answer.headers["ETag"], answer.headers["Last-Modified"]
    assert etag.startswith('"')
    assert date.endswith("GMT")
    get(site, {"If-None-Match": etag, "If-Modified-Since": date})
    assert origin.requests[1].headers["if-none-match"] == etag
    assert origin.requests[1].headers["if-modified-since"] == date
    origin.fault(XMLTV, Status(304, headers=(("ETag", etag),)))
    again = get(site, {"If-None-Match": etag})
    assert (again.status, again.body) == (304, b"")
    assert again.headers["ETag"] == etag


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Status(403), "the origin answered 403"),
        (Body(WEB_PAGE), "the origin sent a web page, not a guide"),
        (Body(XHTML_PAGE), "the origin sent a web page, not a guide"),
        (Redirect("file:///etc/passwd"), "the origin refers to a local file: refused"),
    ],
    ids=["403", "page", "xhtml", "file"],
)
def test_guide_that_fails_is_a_502(
    origin: Origin, serve: Serve, fault: object, reason: str
) -> None:
    site = serve({}, server={"epg": add_guide(origin, TEXT)})
    origin.fault(XMLTV, fault)  # type: ignore[arg-type]
    answer = site.get("/epg.xml")
    assert (answer.status, answer.json) == (502, {"error": reason})


@pytest.mark.parametrize("is_packed", [False, True])
def test_interrupted_guide_is_incomplete(origin: Origin, serve: Serve, is_packed: bool) -> None:
    data = gzip.compress(TEXT) if is_packed else TEXT
    site = serve({}, server={"epg": add_guide(origin, data)})
    origin.fault(XMLTV, Break(100_000))
    answer = site.get("/epg.xml")
    assert answer.status == 200
    missing = int(answer.headers["Content-Length"] or 0) - len(answer.body)
    assert missing > 0 or not answer.is_complete
    assert TEXT.startswith(answer.body)


@pytest.mark.parametrize("accepted", ["gzip", "identity"])
@pytest.mark.parametrize("size", [0, 100_000])
def test_compressed_web_page_is_no_guide(
    origin: Origin, serve: Serve, accepted: str, size: int
) -> None:
    noise = random.Random(1).randbytes(size)
    site = serve({}, server={"epg": add_guide(origin, gzip.compress(WEB_PAGE + noise))})
    answer = get(site, {"Accept-Encoding": accepted})
    assert answer.status == 502
    assert answer.json == {"error": "the origin sent a web page, not a guide"}


def test_corrupt_gzip_file_is_incomplete(origin: Origin, serve: Serve) -> None:
    packed = bytearray(gzip.compress(TEXT))
    packed[50_000:50_100] = bytes(100)
    site = serve({}, server={"epg": add_guide(origin, bytes(packed))})
    assert not site.get("/epg.xml").is_complete


@pytest.mark.long
def test_large_guide_is_not_held_in_memory(tmp_path: Path, origin: Origin) -> None:
    """One guide of 40 MB is compressed to 40 kB; another one cannot be compressed."""
    origin.add_file("/zeros.gz", gzip.compress(b"<tv>" + bytes(40_000_000)))
    noise = random.Random(1).randbytes(1 << 20)
    origin.add_endless("/noise", lambda: itertools.repeat(noise, 40), chunked=True)
    text = f'#EXTM3U url-tvg="{origin.url}/noise"\n#EXTINF:-1,One\n{origin.url}/1.m3u8\n'
    lists = {"tv": origin.add_file("/list.m3u", text.encode())}
    with Service(tmp_path, {}, epg=origin.url + "/zeros.gz", playlists=lists) as service:
        service.wait_for_count("tv: loaded the list", 1)
        before = service.memory
        sizes = {"/epg.xml": 40_000_004, "/epg/tv.xml": 40 << 20}
        for path, size in sizes.items():
            received = peak = 0
            with Watch(service.port, path) as viewer:
                while part := viewer.response.read(1 << 20):
                    received += len(part)
                    peak = max(peak, service.memory)
            assert received == size
            assert peak - before < 10_000_000


def test_account_in_a_guide_address_is_not_logged(tmp_path: Path, origin: Origin) -> None:
    address = add_list(origin, add_guide(origin, TEXT))
    origin.fault(XMLTV, Status(403))
    with Service(tmp_path, {}, level="debug", playlists={"tv": address}) as service:
        service.wait_for_count("tv: loaded the list", 1)
        with Watch(service.port, "/epg.xml") as viewer:
            assert viewer.status == 502
        with Watch(service.port, "/epg.xml") as viewer:
            assert viewer.status == 200
        service.wait_for_count("GET /epg.xml: 200", 1)
        lines = service.lines
    assert not [line for line in lines if "hunter2" in line or "ada.l" in line]


@pytest.mark.parametrize("size", [1, 100, 65536])
def test_decompression_is_bounded(size: int) -> None:
    packed = gzip.compress(bytes(3_000_000)) + gzip.compress(b"end")
    parts = (packed[at : at + size] for at in range(0, len(packed), size))
    found = list(pipe.unpacked(parts))
    assert max(map(len, found)) <= 65536
    assert b"".join(found) == bytes(3_000_000) + b"end"
