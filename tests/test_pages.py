"""The pages around the streams, options of single streams, and --check.

Server, origin and proxy are real.
Real parsers read the answers for other programs: Prometheus's own, one of XML and one of HTML.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import ipaddress
import itertools
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pipe
from tests import media
from tests.origin import Fault, Origin, Playlist, Segment, StallHeaders, Status, master
from tests.server import BROWSER, Answer, Site
from tests.test_cli import PIPE, Program
from tests.test_sharing import Sluggish, eventually, feeders
from tests.threads import running

Serve = Callable[..., Site]
TIMEOUT = 20.0  # seconds; longer than anything a test waits for
TOKEN = "t&k n/1"
QUOTED_TOKEN = "t%26k%20n%2F1"
NOWHERE = "http://origin.example/secret-path/x.m3u8"  # configured and never opened
HTML = {"Accept": BROWSER}
PROGRAMS: dict[str, dict[str, str]] = {
    "no header": {},
    "any type": {"Accept": "*/*"},
    "JSON": {"Accept": "application/json"},
    "image": {"Accept": "image/png"},
    "Java before 17.0.12": {"Accept": "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"},
    "Delphi": {"Accept": "text/html, */*"},
    "page's script": {**HTML, "Sec-Fetch-Dest": "empty", "Sec-Fetch-Mode": "cors"},
    "page's video": {"Accept": "*/*", "Sec-Fetch-Dest": "video", "Sec-Fetch-Mode": "no-cors"},
    "without destination": {**HTML, "Sec-Fetch-Site": "cross-site"},
}
BROWSERS: dict[str, dict[str, str]] = {
    "by Accept": HTML,
    "by Accept in capitals": {"Accept": "Text/HTML,Application/XHTML+XML"},
    "by destination": {"Accept": "*/*", "Sec-Fetch-Dest": "document"},
    "in a frame": {"Accept": "text/html", "Sec-Fetch-Dest": "iframe"},
}
PAGES = [
    *("/playlist.m3u", "/news.m3u", "/discover.json", "/lineup.json", "/lineup_status.json"),
    *("/lineup.post", "/device.xml", "/status", "/metrics"),
]


def live(origin: Origin, name: str = "news", **options: Any) -> Playlist:
    """A live channel with a segment a second; old segments remain available."""
    settings: dict[str, Any] = {"mode": "live", "window": 5, "clock": True} | options
    return origin.add(Playlist(name, media.ts_segments(8), **settings))


#### Playlists for players ####


@dataclass(frozen=True)
class Entry:
    attributes: Mapping[str, str]
    title: str
    url: str


def playlist(answer: Answer) -> tuple[str, list[Entry]]:
    """The first line and the entries of an M3U; checks the form of every line."""
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "audio/x-mpegurl"
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    head, *lines = answer.body.decode("utf-8").removesuffix("\n").split("\n")
    entries = []
    for line, url in zip(lines[::2], lines[1::2], strict=True):
        found = re.fullmatch(r'#EXTINF:-1((?: [a-z-]+="[^"]+")*),([^\r\n]*)', line)
        assert found, line
        entries.append(Entry(dict(re.findall(r'([a-z-]+)="([^"]+)"', found[1])), found[2], url))
    return head, entries


def test_playlist_lists_every_stream_in_configured_order(serve: Serve) -> None:
    full = {"title": "Zwölf", "logo": "https://x.example/l.png", "group": "News", "number": 12}
    site = serve({"z12": {"url": NOWHERE, "tvg_id": "z.example", **full}, "a": NOWHERE})
    assert playlist(site.get("/playlist.m3u")) == (
        "#EXTM3U",
        [
            Entry(
                {
                    "tvg-id": "z.example",
                    "channel-id": "z12",
                    "tvg-name": "Zwölf",
                    "tvg-logo": "https://x.example/l.png",
                    "tvg-chno": "12",
                    "group-title": "News",
                },
                "Zwölf",
                f"{site.url}/z12",
            ),
            Entry({"channel-id": "a", "tvg-name": "a"}, "a", f"{site.url}/a"),
        ],
    )


def test_playlist_of_one_stream_has_only_that_stream(serve: Serve) -> None:
    site = serve({"one": {"url": NOWHERE, "group": "G"}, "two": NOWHERE})
    head, entries = playlist(site.get("/one.m3u"))
    assert head == "#EXTM3U"
    attributes = {"channel-id": "one", "tvg-name": "one", "group-title": "G"}
    assert entries == [Entry(attributes, "one", f"{site.url}/one")]


@pytest.mark.parametrize(
    "path", ["/three.m3u", "/.m3u", "/playlist.ts", "/playlist.M3U", "/x/one.m3u"]
)
def test_playlist_of_unknown_stream_is_not_found(serve: Serve, path: str) -> None:
    assert serve({"one": NOWHERE}).get(path).status == 404


def test_playlist_without_streams_is_one_line(serve: Serve) -> None:
    assert serve({}).get("/playlist.m3u").body == b"#EXTM3U\n"


def test_playlist_names_the_guide(serve: Serve) -> None:
    epg = "https://guide.example/xmltv.gz?a=1&b=2"
    head, _ = playlist(serve({"one": NOWHERE}, server={"epg": epg}).get("/playlist.m3u"))
    ours = re.escape("http://127.0.0.1:") + r"\d+/epg\.xml"
    assert re.fullmatch(f'#EXTM3U x-tvg-url="{ours}" url-tvg="{ours}"', head)


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        pytest.param('The "Best" of', "The 'Best' of", id="quotes"),
        pytest.param("A\nhttp://evil.example/", "A http://evil.example/", id="line feed"),
        pytest.param("A\r\n#EXTINF:-1,B", "A #EXTINF:-1 B", id="line of its own"),
        pytest.param("Crime, Drama,", "Crime Drama", id="commas"),
        pytest.param("A\u2028B\x85C\x0bD", "A B C D", id="other line breaks"),
        pytest.param("  A  ", "A", id="space around"),
    ],
)
def test_values_cannot_break_out_of_their_line(serve: Serve, written: str, cleaned: str) -> None:
    site = serve({"one": {"url": NOWHERE, "title": written, "group": written, "tvg_id": written}})
    _, (entry,) = playlist(site.get("/playlist.m3u"))
    values = dict.fromkeys(("tvg-name", "group-title", "tvg-id"), cleaned)
    assert entry.attributes == {**values, "channel-id": "one"}
    assert entry.title == cleaned
    assert entry.url == f"{site.url}/one"


@pytest.mark.parametrize("key", ["group", "tvg_id"])
@pytest.mark.parametrize("value", [" ", "\n", "\u2028 "], ids=["space", "line feed", "others"])
def test_empty_values_are_omitted(serve: Serve, key: str, value: str) -> None:
    _, (entry,) = playlist(serve({"one": {"url": NOWHERE, key: value}}).get("/playlist.m3u"))
    assert entry.attributes == {"channel-id": "one", "tvg-name": "one"}


def test_title_of_only_commas_is_replaced_by_the_name(serve: Serve) -> None:
    _, (entry,) = playlist(serve({"one": {"url": NOWHERE, "title": ",,"}}).get("/one.m3u"))
    assert (entry.title, entry.attributes["tvg-name"]) == ("one", "one")


@pytest.mark.parametrize(
    ("logo", "shown"),
    [
        ("https://l.example/a,b.png", "https://l.example/a%2Cb.png"),
        ('https://l.example/"c".png?d="e"', "https://l.example/%22c%22.png?d=%22e%22"),
    ],
    ids=["comma", "quotes"],
)
def test_logo_address_is_quoted(serve: Serve, logo: str, shown: str) -> None:
    """mpv ends an entry's attributes at the first comma."""
    _, (entry,) = playlist(serve({"one": {"url": NOWHERE, "logo": logo}}).get("/one.m3u"))
    assert entry.attributes.get("tvg-logo") == shown


def jellyfins_title(line: str) -> str:
    """The title as Jellyfin's M3uParser reads it: the text after the last comma."""
    return line.rpartition(",")[2].strip()


def mpvs_title(line: str) -> str:
    """The title as mpv's demux_playlist reads it: the text after the first comma."""
    return line.partition(",")[2].strip()


def test_players_that_split_at_commas_see_the_whole_title(serve: Serve) -> None:
    stream = {"url": NOWHERE, "title": 'Crime, "Drama"', "group": "A, B", "logo": "http://h/a,b"}
    (line,) = serve({"one": stream}).get("/one.m3u").body.decode().split("\n")[1:2]
    assert jellyfins_title(line) == mpvs_title(line) == "Crime 'Drama'"


@pytest.mark.parametrize("path", ["/playlist.m3u8", "/lineup.m3u"])
def test_playlist_has_aliases(serve: Serve, path: str) -> None:
    site = serve({"one": NOWHERE, "two": {"url": NOWHERE, "group": "G"}})
    assert playlist(site.get(path)) == playlist(site.get("/playlist.m3u"))


def test_stream_named_lineup_has_its_own_playlist(serve: Serve) -> None:
    site = serve({"lineup": NOWHERE, "two": NOWHERE})
    _, entries = playlist(site.get("/lineup.m3u"))
    assert [entry.title for entry in entries] == ["lineup"]


PUBLIC = {"public_url": "https://tv.example/sub/"}
FORWARDED = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "tv.example:8443"}


@pytest.mark.parametrize(
    ("server", "headers", "base"),
    [
        pytest.param(PUBLIC, FORWARDED, "https://tv.example/sub", id="public_url"),
        pytest.param({}, FORWARDED, "https://tv.example:8443", id="X-Forwarded"),
        pytest.param(
            {},
            {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "outer.example, inner"},
            "https://outer.example",
            id="two proxies",
        ),
        pytest.param(
            {}, {"X-Forwarded-Proto": "https", "Host": "h.example"}, "https://h.example", id="proto"
        ),
        pytest.param({}, {"X-Forwarded-Proto": "gopher", "Host": "h"}, "http://h", id="odd proto"),
        pytest.param({}, {"Host": "h.example:99"}, "http://h.example:99", id="Host"),
        pytest.param({}, {"Host": "[::1]:99"}, "http://[::1]:99", id="IPv6 Host"),
    ],
)
@pytest.mark.parametrize("path", ["/playlist.m3u", "/one.m3u"])
def test_playlist_uses_addresses_that_the_client_can_reach(
    serve: Serve, server: dict[str, str], headers: dict[str, str], base: str, path: str
) -> None:
    _, (entry,) = playlist(serve({"one": NOWHERE}, server=server).ask("GET", path, **headers))
    assert entry.url == f"{base}/one"


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_address_without_host_header_is_the_socket_address(serve: Serve, host: str) -> None:
    site = serve({"one": NOWHERE}, server={"host": host})
    answer = site.raw(b"GET /playlist.m3u HTTP/1.0\r\n\r\n")
    entry = f'#EXTINF:-1 channel-id="one" tvg-name="one",one\n{site.url}/one\n'
    assert answer.endswith(f"\r\n\r\n#EXTM3U\n{entry}".encode())


@pytest.mark.parametrize("header", ["Host", "X-Forwarded-Host"])
@pytest.mark.parametrize(
    "value",
    [
        *('"><script>', "a b", "evil.example/x?", "u@evil.example", "a:b", "a:99x", "h\tx", "[::1"),
        *("[x]:1", "a#b", "h%0d%0aX", ".example:80:80", "h\\x", "b\xe4d"),
    ],
)
def test_invalid_host_is_not_repeated(serve: Serve, header: str, value: str) -> None:
    site = serve({"one": NOWHERE})
    _, (entry,) = playlist(site.ask("GET", "/playlist.m3u", **{"Host": "", header: value}))
    assert entry.url == f"{site.url}/one"


#### The token ####


def closed(serve: Serve, **server: object) -> Site:
    return serve({"news": NOWHERE}, server={"token": TOKEN, **server})


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer x"}, {"Authorization": basic("x")}], ids=repr
)
@pytest.mark.parametrize("path", PAGES)
def test_pages_require_the_token(serve: Serve, path: str, headers: dict[str, str]) -> None:
    answer = closed(serve).ask("GET", path, **headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(
    ("query", "headers"),
    [
        pytest.param(f"?token={QUOTED_TOKEN}", {}, id="query"),
        pytest.param("", {"Authorization": f"Bearer {TOKEN}"}, id="Bearer"),
        pytest.param("", {"Authorization": basic(TOKEN)}, id="Basic"),
    ],
)
def test_token_opens_the_pages(
    serve: Serve, path: str, query: str, headers: dict[str, str]
) -> None:
    assert closed(serve).ask("GET", path + query, **headers).status == 200


@pytest.mark.parametrize("path", PAGES)
def test_trusted_network_needs_no_token(serve: Serve, path: str) -> None:
    assert closed(serve, trusted=["127.0.0.0/8"]).get(path).status == 200


def test_trust_depends_on_the_socket_and_not_on_headers(serve: Serve) -> None:
    site = closed(serve, trusted=["10.0.0.0/8"])
    assert site.ask("GET", "/status", **{"X-Forwarded-For": "10.0.0.1"}).status == 401


@pytest.mark.parametrize("path", ["/playlist.m3u", "/news.m3u"])
def test_playlist_carries_the_token(serve: Serve, path: str) -> None:
    site = closed(serve, trusted=["127.0.0.1/32"])
    _, (entry,) = playlist(site.get(path))
    assert entry.url == f"{site.url}/news?token={QUOTED_TOKEN}"


def test_token_of_the_playlist_opens_the_stream(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={"token": TOKEN})
    _, (entry,) = playlist(site.get(f"/playlist.m3u?token={QUOTED_TOKEN}"))
    assert site.watch("/news").status == 401
    assert site.watch(entry.url.removeprefix(site.url)).status == 200


def test_health_shows_little_without_the_token(serve: Serve) -> None:
    site = closed(serve)
    assert site.get("/health").json == site.get("/").json == {"status": "ok", "streams": 1}


def test_status_page_requires_the_token(serve: Serve) -> None:
    site = closed(serve)
    assert site.ask("GET", "/", **HTML).status == 401
    assert site.ask("GET", f"/?token={QUOTED_TOKEN}", **HTML).status == 200


#### HDHomeRun ####


@pytest.mark.parametrize(
    ("server", "count"),
    [
        pytest.param({"max_upstreams": 5, "max_viewers": 7}, 5, id="max_upstreams"),
        pytest.param({"max_upstreams": 0, "max_viewers": 7}, 7, id="max_viewers"),
        pytest.param({"max_upstreams": 0, "max_viewers": 0}, 16, id="neither"),
        pytest.param({}, 64, id="defaults"),
    ],
)
def test_tuner_count_is_an_integer(serve: Serve, server: dict[str, int], count: int) -> None:
    shown = serve({}, server=server).get("/discover.json").json["TunerCount"]
    assert (type(shown), shown) == (int, count)


@pytest.mark.parametrize(
    ("limits", "own", "count"),
    [
        pytest.param((1, 2), {}, 3, id="sum"),
        pytest.param((1, 0), {}, 64, id="no-limit"),
        pytest.param((40, 40), {}, 64, id="above-the-servers"),
        pytest.param((1, 2), {"own": "https://example.com/own.m3u8"}, 64, id="own-stream"),
    ],
)
def test_tuner_count_is_at_most_the_sum_of_account_limits(
    serve: Serve, tmp_path: Path, limits: Sequence[int], own: dict[str, str], count: int
) -> None:
    file = tmp_path / "list.m3u"
    file.write_text("#EXTM3U\n#EXTINF:-1,News\nhttps://example.com/news.m3u8\n")
    names = ("first", "second")
    site = serve(own, playlists={
        name: {"url": str(file), "max_upstreams": limit}
        for name, limit in zip(names, limits, strict=True)
    })  # fmt: skip
    eventually(lambda: len(site.server.config.streams) == len(own) + 2, "the lists are loaded")
    assert site.get("/discover.json").json["TunerCount"] == count


def test_discover_has_the_fields_that_clients_need(serve: Serve) -> None:
    site = serve({}, server={"name": "My TV"})
    answer = site.get("/discover.json")
    assert answer.headers["Content-Type"] == "application/json"
    found = answer.json
    assert re.fullmatch("[0-9A-F]{8}", found["DeviceID"])
    assert "HDTC" not in found["ModelNumber"]
    assert (found["FriendlyName"], found["BaseURL"]) == ("My TV", site.url)
    assert found["LineupURL"] == f"{site.url}/lineup.json"
    others = ("FirmwareName", "FirmwareVersion", "DeviceAuth", "ModelNumber")
    assert all(isinstance(found[key], str) and found[key] for key in others)


def guide_numbers(site: Site) -> dict[str, str]:
    """The guide number of each stream, in the order of the lineup."""
    lineup = site.get("/lineup.json").json
    return {urllib.parse.urlsplit(each["URL"]).path[1:]: each["GuideNumber"] for each in lineup}


def number_of(name: str) -> int:
    """The guide number of a stream with this name, unless it is taken."""
    return 10000 + zlib.crc32(name.encode()) % 90000


def test_lineup_lists_every_stream_in_configured_order(serve: Serve) -> None:
    site = serve({"c": NOWHERE, "a": {"url": NOWHERE, "number": 7, "title": "A!"}})
    assert site.get("/lineup.json").json == [
        {"GuideNumber": str(number_of("c")), "GuideName": "c", "URL": f"{site.url}/c"},
        {"GuideNumber": "7", "GuideName": "A!", "URL": f"{site.url}/a"},
    ]


def test_inserted_stream_does_not_change_other_guide_numbers(serve: Serve) -> None:
    """Plex maps its guide by number."""
    names = [f"stream-{number}" for number in range(60)]
    before = guide_numbers(serve(dict.fromkeys(names, NOWHERE)))
    assert all(10000 <= int(number) <= 99999 for number in before.values())
    more = dict.fromkeys(["new-1", *names[30:], "new-2", *names[:30]], NOWHERE)
    after = guide_numbers(serve(more))
    assert {name: after[name] for name in names} == before
    assert len(set(after.values())) == len(more)


def colliding() -> tuple[str, str]:
    """Two names that have the same number_of()."""
    seen: dict[int, str] = {}
    for name in (f"s{count}" for count in itertools.count()):
        if number_of(name) in seen:
            return seen[number_of(name)], name
        seen[number_of(name)] = name
    raise AssertionError


@pytest.mark.parametrize("is_reversed", [False, True])
def test_colliding_names_get_consecutive_numbers_in_name_order(
    serve: Serve, is_reversed: bool
) -> None:
    pair = sorted(colliding())
    found = guide_numbers(serve(dict.fromkeys(pair[::-1] if is_reversed else pair, NOWHERE)))
    assert found == {pair[0]: str(number_of(pair[0])), pair[1]: str(number_of(pair[0]) + 1)}


def test_configured_guide_number_is_reserved(serve: Serve) -> None:
    number = number_of("a")
    found = guide_numbers(serve({"a": NOWHERE, "b": {"url": NOWHERE, "number": number}}))
    assert found == {"a": str(number + 1), "b": str(number)}


def test_guide_numbers_wrap_around_after_the_last() -> None:
    last = next(name for name in (f"s{n}" for n in itertools.count()) if number_of(name) == 99999)
    streams = [pipe.StreamSettings("a", (), number=99999), pipe.StreamSettings(last, ())]
    assert pipe.guide_numbers(streams) == {"a": 99999, last: 10000}


def test_tuner_plays_a_channel_by_its_number(origin: Origin, serve: Serve) -> None:
    """Channels DVR constructs these addresses itself."""
    site = serve({"news": live(origin).url, "seven": {"url": NOWHERE, "number": 7}})
    number = guide_numbers(site)["news"]
    assert site.watch(f"/auto/v{number}?transcode=none").read(188)[:1] == b"G"
    assert site.ask("HEAD", "/auto/v7").status == 200
    for path in ("/auto/v8", "/auto/v", "/auto/v07x", "/auto/seven", "/auto", f"/auto/v{10**20}"):
        assert site.get(path).status == 404


def test_hidden_channel_does_not_shift_the_numbers_of_the_tuner(
    origin: Origin, serve: Serve
) -> None:
    """The numbers that are made from these two names collide."""
    site = serve({"ch-1522": {"url": NOWHERE, "hide": True}, "ch-34": live(origin).url})
    number = guide_numbers(site)["ch-34"]
    assert site.watch(f"/auto/v{number}").read(188)[:1] == b"G"


def test_tuner_requires_the_token(serve: Serve) -> None:
    assert closed(serve).get(f"/auto/v{number_of('news')}").status == 401


def device_id(site: Site) -> str:
    found = site.get("/discover.json").json["DeviceID"]
    assert isinstance(found, str)
    return found


def test_device_id_depends_on_machine_and_port(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = serve({}, server={"name": "A"}), serve({}, server={"name": "A"})
    before = device_id(one)
    assert before != device_id(two), "two servers on one machine must be two tuners"
    monkeypatch.setattr(one.server, "config", replace(one.config, streams={}))
    settings = replace(one.config.server, name="B")
    monkeypatch.setattr(one.server, "config", replace(one.config, server=settings))
    assert one.get("/discover.json").json["FriendlyName"] == "B"
    assert device_id(one) == before
    other = tmp_path / "machine-id"
    other.write_text("0123456789abcdef0123456789abcdef\n", encoding="ascii")
    monkeypatch.setattr(pipe, "MACHINE_ID", other)
    on_other_machine = device_id(one)
    assert on_other_machine != before
    assert device_id(one) == on_other_machine


@pytest.mark.parametrize("text", [None, "", "uninitialized\n"], ids=["none", "empty", "not yet"])
def test_device_id_without_machine_id_depends_on_the_network_card(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """Containers often have no machine ID."""
    file = tmp_path / "machine-id"
    if text is not None:
        file.write_text(text, encoding="ascii")
    monkeypatch.setattr(pipe, "MACHINE_ID", file)
    site = serve({})
    found = set()
    for card in (0x0242AC110002, 0x0242AC110003, 0x0242AC110002):
        monkeypatch.setattr(uuid, "getnode", lambda card=card: card)
        found.add(device_id(site))
    assert len(found) == 2


@pytest.mark.parametrize("query", ["", "?scan=start", "?scan=abort"])
def test_scan_is_accepted(serve: Serve, query: str) -> None:
    answer = serve({}).ask("POST", f"/lineup.post{query}")
    assert (answer.status, answer.json) == (200, {})
    assert int(answer.headers["Content-Length"]) == len(answer.body) > 0


def test_scan_may_be_posted_with_a_body(serve: Serve) -> None:
    request = b"POST /lineup.post?scan=start HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nscan"
    assert serve({}).raw(request).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/lineup.json", "/status", "/playlist.m3u", "/news"])
def test_post_is_refused_everywhere_else(serve: Serve, path: str) -> None:
    answer = serve({"news": NOWHERE}).ask("POST", path)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


def test_lineup_status_is_that_of_an_idle_tuner(serve: Serve) -> None:
    assert serve({}).get("/lineup_status.json").json == {
        "ScanInProgress": 0,
        "ScanPossible": 1,
        "Source": "Cable",
        "SourceList": ["Cable"],
    }


def test_device_describes_itself(serve: Serve) -> None:
    site = serve({}, server={"name": 'R&D <"TV">'})
    answer = site.get("/device.xml")
    assert answer.headers["Content-Type"].startswith("application/xml")
    space = {"u": "urn:schemas-upnp-org:device-1-0"}
    root = ElementTree.fromstring(answer.body)
    assert root.findtext("u:device/u:friendlyName", namespaces=space) == 'R&D <"TV">'
    assert root.findtext("u:URLBase", namespaces=space) == site.url
    udn = root.findtext("u:device/u:UDN", namespaces=space) or ""
    assert re.fullmatch("uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", udn)
    assert udn[5:13].upper() == site.get("/discover.json").json["DeviceID"]


#### Status for programs ####

NUMBER = (int, float)
SERVER_SHAPE = {
    "name": str,
    "version": str,
    "uptime_seconds": NUMBER,
    "streams": list,
    "playlists": list,
}
STREAM_SHAPE = {
    **dict.fromkeys(("stream", "title", "state"), str),
    **dict.fromkeys(("group", "last_error"), (str, type(None))),
    "last_error_seconds": (float, type(None)),
    **dict.fromkeys(("viewers", "peak", "bytes_in", "bytes_out", "restarts", "gaps"), int),
    "bitrate": NUMBER,
    "channels": list,
}
CHANNEL_SHAPE = {
    **dict.fromkeys(("variant", "state"), str),
    "note": (str, type(None)),
    **dict.fromkeys(("waiting_seconds", "gives_up_seconds"), (float, type(None))),
    **dict.fromkeys(("restarts", "window_bytes"), int),
    **dict.fromkeys(("uptime_seconds", "window_seconds"), NUMBER),
    "viewers": list,
}
VIEWER_SHAPE = {
    **dict.fromkeys(("address", "user_agent", "kind"), str),
    "since_seconds": NUMBER,
    **dict.fromkeys(("bytes", "skips"), int),
}


def check_shape(found: Mapping[str, object], shape: Mapping[str, Any]) -> None:
    assert set(found) == set(shape)
    wrong = {key: value for key, value in found.items() if not isinstance(value, shape[key])}
    assert wrong == {}
    assert not any(isinstance(value, bool) for value in found.values())


def status(site: Site) -> Any:
    answer = site.get("/status")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return answer.json


def test_idle_server_has_a_complete_status(serve: Serve) -> None:
    site = serve({"news": {"url": NOWHERE, "title": "N", "group": "G"}}, server={"name": "TV"})
    found = status(site)
    check_shape(found, SERVER_SHAPE)
    assert (found["name"], found["version"]) == ("TV", pipe.__version__)
    (stream,) = found["streams"]
    check_shape(stream, STREAM_SHAPE)
    idle = dict.fromkeys(("viewers", "peak", "bytes_in", "bytes_out", "bitrate", "restarts"), 0)
    texts = {"stream": "news", "title": "N", "group": "G", "state": "idle"}
    nothing = dict.fromkeys(("last_error", "last_error_seconds"))
    assert stream == {**texts, **nothing, **idle, "gaps": 0, "channels": []}


def test_status_shows_channels_and_viewers(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url, "other": NOWHERE})
    agent: dict[str, Any] = {"User-Agent": "TV/1 (é)"}
    viewer = site.watch("/news", **agent)
    viewer.read(len(media.ts_segments(8)[0]))
    site.watch("/news").read(188)
    stream, other = status(site)["streams"]
    check_shape(stream, STREAM_SHAPE)
    (channel,) = stream["channels"]
    check_shape(channel, CHANNEL_SHAPE)
    for each in channel["viewers"]:
        check_shape(each, VIEWER_SHAPE)
    assert (stream["state"], channel["state"], other["state"]) == ("live", "live", "idle")
    assert (stream["viewers"], stream["peak"], len(channel["viewers"])) == (2, 2, 2)
    first = channel["viewers"][0]
    assert (first["address"], first["user_agent"]) == ("127.0.0.1", "TV/1 (é)")
    assert first["bytes"] > 0
    assert stream["bytes_in"] >= channel["window_bytes"] > 0
    assert stream["bytes_out"] >= sum(each["bytes"] for each in channel["viewers"][:1])


def bitrate(site: Site) -> int:
    found = status(site)["streams"][0]["bitrate"]
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("seconds", [2, 6, 10])
def test_bitrate_does_not_depend_on_segment_duration(
    origin: Origin, serve: Serve, seconds: int
) -> None:
    """It is right from the start, when several segments arrive at once, and for uneven sizes."""
    sizes = [2_000_000 + 300_000 * (number % 4) for number in range(8)]
    bodies = map(media.padded, media.ts_segments(), sizes)
    segments = [Segment(body, float(seconds)) for body in bodies]
    news = origin.add(Playlist("news", segments, mode="live", target_duration=seconds))
    site = serve({"news": news.url}, streamlink={"hls-playlist-reload-time": 2})
    viewer = site.watch("/news")
    for first, end in [(2, 5), (5, 6), (6, 8)]:
        if first > 2:
            news.advance(end - first)
        viewer.read(len(news.plain(first, end)))
        eventually(lambda: bitrate(site) > 0, "the bitrate is known")
        assert bitrate(site) == pytest.approx(8 * 2_450_000 / seconds, rel=0.15)
    assert f"{bitrate(site) / 1e6:.1f} Mbit/s" in page(site).text


@pytest.mark.long
@pytest.mark.parametrize("pause", [0.0, 1.5], ids=["evenly", "in-bursts"])
def test_bitrate_of_a_source_without_segments_is_measured(
    origin: Origin, serve: Serve, pause: float
) -> None:
    """The backlog that the source sends first is not counted."""
    event, seconds = threading.Event(), pause or 0.1
    backlog, piece = media.ts_segments(8), media.padded(media.ts_segments()[0], 1_000_000)

    def relay() -> Iterator[bytes]:
        yield from backlog
        size = int(1_000_000 * seconds) // media.PACKET * media.PACKET
        while not event.wait(seconds):
            yield (piece + piece)[:size]

    site = serve({"news": origin.add_endless("/relay", relay)})
    site.watch("/news").read(media.PACKET)
    eventually(lambda: bitrate(site) > 0, "the bitrate is known")
    assert bitrate(site) == pytest.approx(8_000_000, rel=0.2)
    event.set()
    eventually(lambda: bitrate(site) == 0, "the bitrate drops to zero once nothing arrives")


def test_status_shows_the_length_of_the_window(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    site.watch("/news").read(188)

    def seconds() -> float:
        return float(status(site)["streams"][0]["channels"][0]["window_seconds"])

    eventually(lambda: seconds() >= 1, "a whole segment is in the window")
    assert seconds() < TIMEOUT


def test_status_keeps_totals_after_viewers_leave(origin: Origin, serve: Serve) -> None:
    film = origin.add(Playlist("film", media.ts_segments(4)))
    site = serve({"film": film.url})
    size = len(site.get("/film").body)
    eventually(lambda: status(site)["streams"][0]["viewers"] == 0, "the viewer has left")
    (stream,) = status(site)["streams"]
    assert (stream["bytes_in"], stream["bytes_out"], stream["peak"]) == (size, size, 1)


def test_status_shows_the_last_error_without_the_address(origin: Origin, serve: Serve) -> None:
    origin.fault("/news/*", Status(503), times=None)
    site = serve({"news": f"{origin.url}/news/index.m3u8?key=hunter2"})
    assert site.get("/news").status == 502
    (stream,) = status(site)["streams"]
    assert stream["last_error"] == "the origin answered 503"
    assert 0 <= stream["last_error_seconds"] < TIMEOUT
    assert (stream["state"], stream["viewers"]) == ("failed", 0)


def test_stream_is_failed_until_media_arrives_again(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url, "idle": NOWHERE}, linger=0)

    def states() -> list[str]:
        return [stream["state"] for stream in status(site)["streams"]]

    origin.fault(news.path, Status(503), times=1)
    assert site.get("/news").status == 502
    assert states() == ["failed", "idle"]
    site.channels.reload(site.config)
    assert states() == ["failed", "idle"], "an unchanged configuration keeps the state"
    changed = replace(site.config.streams["news"], headers={"X-Key": "new"})
    site.channels.reload(replace(site.config, streams={**site.config.streams, "news": changed}))
    assert states() == ["idle", "idle"], "a changed stream starts without a state"
    origin.fault(news.path, Status(503), times=1)
    assert site.get("/news").status == 502
    with site.watch("/news?quality=worst") as viewer:  # "best" still gets the remembered failure
        viewer.read(188)
        assert states() == ["live", "idle"]
    eventually(lambda: states() == ["idle", "idle"], "the channel closes")


def test_unknown_quality_does_not_mark_the_stream_as_failed(origin: Origin, serve: Serve) -> None:
    site = serve({"news": two_qualities(origin)})
    assert site.get("/news?quality=4k").status == 404
    assert status(site)["streams"][0]["state"] == "idle"


#### Metrics ####

Key = tuple[str, frozenset[tuple[str, str]]]


def metrics(site: Site) -> dict[Key, float]:
    """All samples, read by Prometheus's parser; checks that each appears only once."""
    answer = site.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: dict[Key, float] = {}
    for family in text_string_to_metric_families(answer.body.decode("utf-8")):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = float(sample.value)
    return samples


def metric(site: Site, name: str, **labels: str) -> float:
    return metrics(site)[f"streampipe_{name}", frozenset(labels.items())]


def two_qualities(origin: Origin) -> str:
    low, high = (live(origin, name) for name in ("low", "high"))
    return origin.add(master("news", {"480p": low, "720p": high})).url


def test_metrics_follow_the_conventions(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(503), times=None)
    site = serve({"news": two_qualities(origin), "bad": f"{origin.url}/bad.m3u8"})
    site.watch("/news").read(188)
    assert site.get("/bad").status == 502
    families = list(text_string_to_metric_families(site.get("/metrics").body.decode()))
    assert len({family.name for family in families}) == len(families) >= 12
    for family in families:
        assert re.fullmatch(r"streampipe_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search("milli|kilo|mega|minutes|bits|percent", family.name)
        for sample in family.samples:
            assert set(sample.labels) <= {"stream", "state", "reason", "code", "le", "version"}
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert sample.value >= 0


def test_metrics_of_a_server_without_streams_can_be_read(serve: Serve) -> None:
    assert metric(serve({}), "build_info", version=pipe.__version__) == 1


def test_start_time_is_a_unix_time(serve: Serve) -> None:
    assert metric(serve({}), "start_time_seconds") == pytest.approx(time.time(), abs=TIMEOUT)


def test_qualities_of_a_stream_are_summed(origin: Origin, serve: Serve) -> None:
    site = serve({"news": two_qualities(origin)})
    for query in ("?quality=480p", "?quality=720p", "?quality=720p"):
        site.watch(f"/news{query}").read(188)
    assert metric(site, "viewers", stream="news") == 3
    assert metric(site, "upstreams", stream="news") == 2
    assert metric(site, "viewer_connections_total", stream="news") == 3


def test_failures_are_counted_by_reason(origin: Origin, serve: Serve) -> None:
    origin.fault("/news*", Status(503), times=None)
    site = serve({"news": f"{origin.url}/news.m3u8"})
    site.get("/news")
    key = {"stream": "news", "reason": "the origin answered 503"}
    assert metric(site, "upstream_errors_total", **key) == 1
    assert metric(site, "http_requests_total", code="502") == 1


def test_first_byte_times_are_a_histogram(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    for _ in range(2):
        site.watch("/news").read(188)
    found = metrics(site)
    name = "streampipe_first_byte_seconds"
    buckets = {
        float(dict(labels)["le"]): value
        for (sample, labels), value in found.items()
        if sample == f"{name}_bucket"
    }
    ordered = [buckets[bound] for bound in sorted(buckets)]
    assert ordered == sorted(ordered)
    assert ordered[-1] == buckets[float("inf")] == found[f"{name}_count", frozenset()] == 2
    assert 0 < found[f"{name}_sum", frozenset()] < 2 * TIMEOUT


def fallen(before: Mapping[Key, float], after: Mapping[Key, float]) -> dict[Key, float]:
    """The counters that fell or vanished; Prometheus would treat that as a restart."""
    counters = {k: v for k, v in before.items() if k[0].endswith(("_total", "_bucket", "_count"))}
    return {k: v for k, v in counters.items() if after.get(k, -1.0) < v}


def test_counters_never_fall_when_viewers_and_channels_leave(origin: Origin, serve: Serve) -> None:
    site = serve({"news": two_qualities(origin)}, linger=0.3)
    viewers = [site.watch(f"/news?quality={quality}") for quality in ("480p", "720p", "480p")]
    seen = [metrics(site)]
    for viewer in viewers:
        viewer.read(188)
        viewer.close()
        seen.append(metrics(site))
    eventually(lambda: not feeders(), "all channels are closed")
    seen.append(metrics(site))
    assert seen[-1]["streampipe_upstreams", frozenset({("stream", "news")})] == 0
    for before, after in itertools.pairwise(seen):
        assert fallen(before, after) == {}


def test_counters_never_fall_while_a_viewer_reads_the_rest(origin: Origin, serve: Serve) -> None:
    """The upstream has ended, but its viewer still reads from the window."""
    large = [media.padded(segment, 220_000) for segment in media.ts_segments(8)[:4]]
    film = origin.add(Playlist("film", large))
    site = serve({"film": film.url})
    with Sluggish(site, "/film") as viewer:
        viewer.read(1000)
        before = metrics(site)
        origin.wait_for(film.segment_path(3))
        eventually(lambda: origin.peak_transfers > 0 and not feeders(), "the upstream has ended")
        after = metrics(site)
        assert fallen(before, after) == {}
        assert after["streampipe_viewers", frozenset({("stream", "film")})] == 1
        assert site.get("/health").json["viewers"] == 1


def test_promtool_has_no_complaints(origin: Origin, serve: Serve) -> None:
    if not shutil.which("promtool"):
        assert "CI" not in os.environ, "CI must install promtool"
        pytest.skip("needs promtool")
    origin.fault("/bad*", Status(503), times=None)
    site = serve({"news": live(origin).url, "bad": f"{origin.url}/bad.m3u8"})
    site.watch("/news").read(188)
    site.get("/bad")
    command = ["promtool", "check", "metrics"]
    text = site.get("/metrics").body
    done = subprocess.run(command, input=text, capture_output=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


#### The page for people ####


class Document(HTMLParser):
    """A parsed page: its tags with their attributes, and its visible text."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self._texts: list[str] = []
        self.feed(body.decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        kind = self.tags[-1][0] if self.tags else ""
        if kind == "script" and data.strip():
            self.scripts.append(data)
        elif kind != "style":
            self._texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of each `tag` that has these attributes, among others."""
        found = (have for name, have in self.tags if name == tag)
        return [have for have in found if attributes.items() <= have.items()]

    def links(self, kind: str | None = None) -> list[str]:
        """The targets of all links, or only of those with this class."""
        return [have["href"] for have in self.all("a") if kind in (None, have.get("class"))]

    def check_scripts(self, answer: Answer) -> None:
        """Checks that the page has one script, allowed by its hash, and no inline handlers."""
        assert self.all("script") == [{}]
        (script,) = self.scripts
        assert len(script.encode()) <= 8192
        digest = hashlib.sha256(script.encode()).digest()
        assert policy(answer)["script-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
        assert [name for _, have in self.tags for name in have if name.startswith("on")] == []


def page(site: Site, query: str = "") -> Document:
    answer = site.ask("GET", f"/{query}", **HTML)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    return Document(answer.body)


@pytest.mark.parametrize("headers", PROGRAMS.values(), ids=list(PROGRAMS))
def test_root_is_json_for_programs(serve: Serve, headers: dict[str, str]) -> None:
    assert serve({}).ask("GET", "/", **headers).json["status"] == "ok"


@pytest.mark.parametrize("headers", BROWSERS.values(), ids=list(BROWSERS))
def test_root_is_a_page_for_browsers(serve: Serve, headers: dict[str, str]) -> None:
    answer = serve({}).ask("GET", "/", **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")


def test_health_is_json_for_browsers_too(serve: Serve) -> None:
    assert serve({}).ask("GET", "/health", **HTML).json["status"] == "ok"


def test_page_is_one_document_that_loads_only_logos(origin: Origin, serve: Serve) -> None:
    logo = "https://logo.example/l.png?a=1&b=2"
    site = serve({"news": {"url": live(origin).url, "logo": logo}, "other": NOWHERE})
    site.watch("/news").read(188)
    found = page(site)
    assert [tag for tag, _ in found.tags][:2] == ["html", "head"]
    assert not {"iframe", "object"} & {tag for tag, _ in found.tags}
    found.check_scripts(site.ask("GET", "/", **HTML))
    loads = [a.get(name, "") for _, a in found.tags for name in ("src", "href", "data", "action")]
    assert {urllib.parse.urlsplit(each).netloc for each in loads} == {"", "logo.example"}
    assert [have["action"] for have in found.all("form")] == ["./"]
    polite = {"alt": "", "loading": "lazy", "referrerpolicy": "no-referrer"}
    assert found.all("img") == [{"src": logo, **polite}]
    style = site.ask("GET", "/", **HTML).body.decode()
    assert not re.search(r"url\(|@import|javascript:", style)


def policy(answer: Answer) -> dict[str, str]:
    """The directives of a page's Content-Security-Policy."""
    parts = answer.headers["Content-Security-Policy"].split(";")
    return dict(part.strip().partition(" ")[::2] for part in parts)


@pytest.mark.parametrize("path", ["/", "/news", "/nobody"], ids=["status", "watch", "error"])
def test_page_has_a_strict_policy(serve: Serve, path: str) -> None:
    answer = serve({"news": NOWHERE}).ask("GET", path, **HTML)
    Document(answer.body).check_scripts(answer)
    found = policy(answer)
    assert found["default-src"] == "'none'"
    assert found["style-src"] == "'unsafe-inline'"
    assert found["media-src"] == "'self'"
    assert found["connect-src"] == found["form-action"] == "'self'"
    assert found["frame-ancestors"] == found["base-uri"] == "'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("logo", "allowed"),
    [
        pytest.param("https://logo.example/l.png?x;y", "https://logo.example", id="host"),
        pytest.param("http://l.example:8080", "http://l.example:8080", id="port"),
        pytest.param("https://u:p;q@l.example/l.png", "https://l.example", id="user"),
        pytest.param("https://l.example;script-src/x", "", id="no host"),
        pytest.param("https://l.example script-src *", "", id="more than a host"),
        pytest.param("https://l\u00f6go.example/l.png", "", id="not ASCII"),
    ],
)
def test_policy_allows_only_the_hosts_of_logos(serve: Serve, logo: str, allowed: str) -> None:
    site = serve({"a": {"url": NOWHERE, "logo": logo}, "b": {"url": NOWHERE, "logo": logo}})
    assert policy(site.ask("GET", "/", **HTML))["img-src"].split() == ["data:", *allowed.split()]
    assert page(site).all("img")[0]["src"] == logo


def test_policy_names_no_hosts_to_clients_without_the_token(serve: Serve) -> None:
    """The host of a logo may be that of the panel."""
    site = serve({"a": {"url": NOWHERE, "logo": "http://panel.example:8080/l.png"}},
                 server={"token": "secret"})  # fmt: skip
    answer = site.ask("GET", "/", **HTML)
    assert answer.status == 401
    assert policy(answer)["img-src"].split() == ["data:"]


@pytest.mark.parametrize("path", ["/", "/s7", "/nobody"], ids=["status", "watch", "error"])
def test_response_head_does_not_grow_with_the_configuration(serve: Serve, path: str) -> None:
    """Some proxies accept only 4 KiB.  Logos are shown nevertheless."""
    site = serve({
        f"s{number}": {"url": NOWHERE, "logo": f"https://logos-{number}.example/l.png"}
        for number in range(500)
    })  # fmt: skip
    request = f"GET {path} HTTP/1.0\r\nAccept: {BROWSER}\r\n\r\n"
    head, _, _ = site.raw(request.encode()).partition(b"\r\n\r\n")
    assert len(head) < 2048
    allowed = policy(site.ask("GET", path, **HTML))
    assert allowed["img-src"].split() == ["data:", "http:", "https:"]
    assert allowed["default-src"] == "'none'"


#### Compression ####

MANY = {f"stream-{number}": NOWHERE for number in range(300)}
COMPRESSED = ["/", "/playlist.m3u", "/status", "/metrics", "/lineup.json"]


@pytest.mark.parametrize("path", COMPRESSED)
@pytest.mark.parametrize("accepted", ["gzip", "deflate, GZip;q=0.5, br", "x-gzip"])
def test_page_is_compressed_if_the_client_accepts_gzip(
    serve: Serve, path: str, accepted: str
) -> None:
    site = serve(MANY)
    plain = site.ask("GET", path, **HTML)
    answer = site.ask("GET", path, **HTML, **{"Accept-Encoding": accepted})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
    assert int(answer.headers["Content-Length"]) == len(answer.body) < len(plain.body) / 3
    body = gzip.decompress(answer.body)
    assert len(body) == pytest.approx(len(plain.body), abs=400)
    assert body[:20] == plain.body[:20]
    head = site.ask("HEAD", path, **HTML, **{"Accept-Encoding": accepted})
    assert (head.headers["Content-Encoding"], head.body) == ("gzip", b"")


@pytest.mark.parametrize("accepted", ["", "identity", "deflate, br", "gzip;q=0", "gzip; q=0.0"])
@pytest.mark.parametrize("path", COMPRESSED)
def test_page_is_plain_if_the_client_does_not_accept_gzip(
    serve: Serve, path: str, accepted: str
) -> None:
    answer = serve(MANY).ask("GET", path, **HTML, **{"Accept-Encoding": accepted})
    assert "Content-Encoding" not in answer.headers
    # A stream has no metrics before its first request.
    assert (b"streampipe_build_info" if path == "/metrics" else b"stream-299") in answer.body


@pytest.mark.parametrize("path", ["/news", "/news.m3u8", "/health"])
def test_media_and_short_answers_are_never_compressed(
    origin: Origin, serve: Serve, path: str
) -> None:
    site = serve({"news": live(origin).url})
    headers: dict[str, Any] = {"Accept-Encoding": "gzip"}
    answer = site.watch(path, **headers)
    assert (answer.status, answer.headers["Content-Encoding"]) == (200, None)


def test_page_hides_the_origins_address(origin: Origin, serve: Serve) -> None:
    address = f"http://user:hunter2@127.0.0.1:{origin.port}/hush/x.m3u8?key=hunter2"
    site = serve({"bad": address, "idle": NOWHERE})
    assert site.get("/bad").status == 502
    for path, headers in [("/", HTML), *((path, {}) for path in ("/status", "/metrics"))]:
        body = site.ask("GET", path, **headers).body.decode()
        assert not re.search(rf"hunter2|hush|{origin.port}|origin\.example|secret-path", body)


HOSTILE = """</b><script>alert("1")</script><img src=x onerror='y'>&amp;"""


def test_page_escapes_configured_text(serve: Serve) -> None:
    stream = {"url": NOWHERE, "title": HOSTILE, "group": HOSTILE}
    found = page(serve({"one": stream}, server={"name": HOSTILE}))
    assert len(found.scripts) == 1
    assert found.all("img") == []
    shown = " ".join(HOSTILE.split())
    assert found.text.count(shown) == 4, "in the title, the heading, the group and the stream"


def test_page_shows_the_status_that_an_origin_answered(origin: Origin, serve: Serve) -> None:
    origin.fault("/news*", Status(418), times=None)
    site = serve({"news": f"{origin.url}/news.m3u8"})
    site.get("/news")
    assert "the origin answered 418" in page(site).text


Group = tuple[str, str, list[str]]


def groups(site: Site) -> list[Group]:
    """The id, heading and streams of each group, in the order of the page."""
    text = site.ask("GET", "/", **HTML).body.decode()
    found = re.findall(r'class="group" id="([^"]*)".*?<h2>(.*?)</h2>(.*?)</details>', text, re.S)
    return [(name, head, re.findall(r'<li id="([^"]*)"', rest)) for name, head, rest in found]


def test_page_groups_the_streams(serve: Serve) -> None:
    streams = {
        name: {"url": NOWHERE, "group": group} for name, group in zip("abc", "XYX", strict=True)
    }
    site = serve({**streams, "d": NOWHERE})
    found = groups(site)
    assert [group[1:] for group in found] == [("X", ["a", "c"]), ("Y", ["b"]), ("Streams", ["d"])]
    links = [f"./?group={name}#{group[0]}" for name, group in zip("XY", found, strict=False)]
    assert page(site).links("button") == ["./#", *links, f"./?group=Streams#{found[2][0]}"]


def test_card_stays_in_its_group_in_every_state(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(503), times=None)
    streams = {
        "idle": {"url": NOWHERE, "group": "Failed"},
        "news": {"url": live(origin).url, "group": "News", "number": 7},
        "bad": {"url": f"{origin.url}/bad.m3u8", "group": "News"},
    }
    site = serve(streams)
    site.watch("/news").read(188)
    assert site.get("/bad").status == 502
    found = [group[1:] for group in groups(site)]
    assert found == [("Failed", ["idle"]), ("News", ["news", "bad"])]
    text = page(site).text
    assert re.search(r"bad failed (just now|\d s ago) the origin answered 503", text)
    assert "last error" not in text
    assert "7 news live · 1 viewer" in text
    assert "0 viewers" not in text
    assert "idle idle" not in text, "the state idle is not displayed"


@pytest.mark.parametrize("group", ["Films & series", 'a"b', "<b>", "x y%20z", "\u00e9#?"], ids=repr)
def test_links_to_groups_work_for_any_name(serve: Serve, group: str) -> None:
    site = serve({"a": {"url": NOWHERE, "group": group}, "b": NOWHERE})
    found = page(site)
    address, _, target = found.links("button")[1].partition("#")
    assert not re.search(r"\s", target)
    assert len(found.all("details", id=target)) == 1
    assert found.text.count(" ".join(group.split())) == 2
    chosen = page(site, address.removeprefix("./"))
    hidden = {have["id"]: "hidden" in have for have in chosen.all("details", **{"class": "group"})}
    assert hidden == {target: False, ":Streams": True}
    assert [have["href"] for have in chosen.all("a", **{"aria-current": "true"})] == [
        f"{address}#{target}"
    ]


def test_page_of_one_group_has_no_links_to_groups(serve: Serve) -> None:
    assert page(serve({"a": NOWHERE, "b": NOWHERE})).all("nav") == []


def test_page_shows_the_state_of_a_stream(origin: Origin, serve: Serve) -> None:
    site = serve({"news": {"url": live(origin).url, "title": "The News"}}, server={"name": "My TV"})
    site.watch("/news").read(188)
    found = page(site)
    assert re.search(r"My TV 1 stream, 1 viewer, up \d+ s ", found.text)
    assert re.search(r"The News live · 1 viewer( · \d+ kbit/s)? \d+ .bit/s \d+ s up", found.text)
    assert [tag for tag, _ in found.tags].count("svg") == 1


def test_number_stays_on_one_line_with_its_unit(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    site.watch("/news").read(188)
    body = site.ask("GET", "/", **HTML).body.decode()
    assert "live</span></span>\u00a0\u00b7 <span>1\u00a0viewer</span>" in body


def test_all_charts_share_one_scale_with_its_unit(origin: Origin, serve: Serve) -> None:
    large = [media.padded(segment, 900_000) for segment in media.ts_segments(8)]
    news = origin.add(Playlist("news", large, mode="live", window=5, clock=True))
    radio = Playlist("radio", media.aac_segments(8), mode="live", clock=True, extension=".aac")
    site = serve({"news": news.url, "radio": origin.add(radio).url})
    for name in ("news", "radio"):
        site.watch(f"/{name}").read(188)

    def scales() -> list[str]:
        charts = page(site).all("div", role="img")
        labels = (chart["aria-label"] for chart in charts)
        beginning = "Bitrate of the last 5 minutes, on a scale to "
        return [label.removeprefix(beginning) for label in labels]

    eventually(lambda: any("Mbit/s" in scale for scale in scales()), "the chart has bars")
    first, second = scales()
    assert first == second, "both charts must use the same scale"
    assert re.fullmatch(r"[125]0* Mbit/s", first)
    assert len(re.findall(rf"{first} \d+ s up 5 minutes ago now", page(site).text)) == 2


def test_no_page_reloads_itself(origin: Origin, serve: Serve) -> None:
    """A reload loses the focus, which users of remote controls and screen readers depend on."""
    site = serve({"news": live(origin).url, "bad": "http://127.0.0.1:9/x.m3u8"})
    for path in ("/", "/news", "/bad", "/nobody"):
        found = Document(site.ask("GET", path, **HTML).body)
        assert found.all("meta", **{"http-equiv": "refresh"}) == []


def cards(site: Site, query: str = "") -> list[str]:
    """The streams whose cards the page shows."""
    found = page(site, query).all("li")
    return [have["id"] for have in found if "id" in have and "hidden" not in have]


CHANNELS = {
    "zdf": {"url": NOWHERE, "title": "ZDF Z\u00fcrich", "group": "\u00d6ffentlich", "number": 12},
    "arte": {"url": NOWHERE, "title": "Arte", "group": "Kultur", "number": 217},
    "one": {"url": NOWHERE, "title": "One & Two", "group": "Kultur"},
}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param("zurich", ["zdf"], id="without accents"),
        pytest.param("Z%C3%9CRICH", ["zdf"], id="in capitals"),
        pytest.param("217", ["arte"], id="number"),
        pytest.param("kultur", ["arte", "one"], id="group"),
        pytest.param("two+kultur", ["one"], id="all words"),
        pytest.param("two+zdf", [], id="no stream has both"),
        pytest.param("%26+one", ["one"], id="a character of HTML"),
        pytest.param("", ["zdf", "arte", "one"], id="nothing"),
    ],
)
def test_search_finds_streams(serve: Serve, words: str, found: list[str]) -> None:
    site = serve(CHANNELS)
    assert cards(site, f"?q={words}") == found
    shown = page(site, f"?q={words}").all("input", type="search")[0]["value"]
    assert shown == urllib.parse.unquote_plus(words), "the search field keeps the words"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param("12", ["n12", "sky12", "n120", "group", "n112"], id="number"),
        pytest.param("zdf", ["zdf", "hd", "neo", "old"], id="title"),
        pytest.param("kanal+12", ["group"], id="words of title and group"),
    ],
)
def test_search_lists_the_best_matches_first(serve: Serve, words: str, found: list[str]) -> None:
    """Results form one list across all groups; each card shows its group."""
    streams: dict[str, dict[str, object]] = {
        "group": {"title": "Twelve", "group": "Kanal 12"},
        "old": {"title": "The oldZDF", "group": "A"},
        "n112": {"title": "x", "number": 112, "group": "B"},
        "n120": {"title": "12th street"},
        "neo": {"title": "ZDFneo", "group": "A"},
        "sky12": {"title": "Sky 12", "group": "B"},
        "hd": {"title": "My ZDF HD", "group": "B"},
        "n12": {"title": "Sport", "number": 12, "group": "A"},
        "zdf": {"title": "ZDF", "group": "C"},
    }
    site = serve({name: {"url": NOWHERE, **stream} for name, stream in streams.items()})
    assert cards(site, f"?q={words}") == found
    shown = page(site, f"?q={words}")
    assert len(shown.all("small")) == len(found)
    assert shown.all("details", **{"class": "group"}) == []
    assert f"{len(found)} channel" in shown.text


def test_search_without_matches_says_so(serve: Serve) -> None:
    found = page(serve(CHANNELS), "?q=xyz")
    assert "No channel matches" in found.text
    assert found.all("li", id="arte") == []


def test_search_is_the_page_for_scripts_too(serve: Serve) -> None:
    """The page's script requests it; such a request looks like a program's."""
    headers: dict[str, Any] = PROGRAMS["page's script"]
    assert b'<li id="arte"' in serve(CHANNELS).ask("GET", "/?q=arte", **headers).body
    site = closed(serve)
    assert site.ask("GET", "/?q=", **headers).status == 401


def opened(found: Document) -> list[str]:
    """The ids of the open groups."""
    return [have["id"] for have in found.all("details", **{"class": "group"}) if "open" in have]


@pytest.mark.parametrize("groups", ["AB", "AA"])
def test_group_that_no_longer_exists_hides_nothing(serve: Serve, groups: str) -> None:
    streams = {f"s{n}": {"url": NOWHERE, "group": group} for n, group in enumerate(groups)}
    found = page(serve(streams), "?group=Gone")
    assert opened(found) == [f":{group}" for group in dict.fromkeys(groups)]
    assert [have for have in found.all("details", **{"class": "group"}) if "hidden" in have] == []


@pytest.mark.parametrize("count", [60, 61, 500, 501])
def test_page_opens_groups_by_the_number_of_streams(serve: Serve, count: int) -> None:
    streams = {f"s{n}": {"url": NOWHERE, "group": "AB"[n % 2]} for n in range(count)}
    site = serve(streams)
    found = page(site)
    has_all = count <= 500
    assert len(cards(site)) == (count if has_all else 0)
    assert opened(found) == ([":A", ":B"] if count <= 60 else [])
    chosen = page(site, "?group=B")
    assert opened(chosen) == [":B"]
    assert len(chosen.all("li")) == (count if has_all else 200)
    assert cards(site, "?q=s57") == ["s57"]


@pytest.mark.parametrize("count", [61, 501])
def test_a_single_group_is_open(serve: Serve, count: int) -> None:
    """There are no links to groups that could open it."""
    site = serve({f"s{n}": NOWHERE for n in range(count)})
    found = page(site)
    assert opened(found) == [":Streams"]
    assert len(cards(site)) == min(count, 200 if count > 500 else count)
    assert "Choose a group" not in found.text
    assert ("301 more" in found.text) == (count > 500)


@pytest.mark.parametrize(
    ("title", "initials"),
    [
        ("ZDF", "ZDF"),
        ("arte", "ARTE"),
        ("BBC One", "BO"),
        ("Channel 2", "C2"),
        ("Channel 217", "C217"),
        ("Channel 2171", "C2171"),
        ("Sky Sport Bundesliga 10", "SS10"),
        ("MTV 80s", "M80"),
        ("[de] Das Erste", "DD"),
        ("Z\u00fcrich", "Z"),
    ],
)
def test_initials_distinguish_channels(serve: Serve, title: str, initials: str) -> None:
    text = page(serve({"a": {"url": NOWHERE, "title": title}})).text
    assert f"Streams {initials} {title} " in text


def test_page_of_three_hundred_streams_is_small_and_fast(serve: Serve) -> None:
    words = ["World", "Sport", "Film", "Kids", "Music", "Nature", "Local", "Life", "Shop", "Tech"]
    streams = {
        f"{words[n % 10].lower()}-{n * 7919 % 1000}": {
            "url": NOWHERE,
            "title": f"{words[n % 10]} {words[n // 10 % 10]} {n * 7919 % 1000}",
            "logo": f"https://logos.example/{zlib.crc32(str(n).encode()):x}.png",
            "group": words[n // 30],
            "number": n + 1,
        }
        for n in range(300)
    }
    site = serve(streams)
    gzipped: dict[str, Any] = {**HTML, "Accept-Encoding": "gzip"}
    assert len(site.ask("GET", "/", **gzipped).body) < 20_000
    began = time.thread_time()
    for _ in range(10):
        pipe.status_page(pipe.Site(site.server, site.config, site.url, site.url, True, {}))
    assert time.thread_time() - began < 10 * 0.06


@pytest.mark.parametrize("query", [{}, {"group": ["Group 3"]}, {"q": ["77"]}], ids=str)
def test_pages_of_thousands_of_streams_are_fast(serve: Serve, query: dict[str, list[str]]) -> None:
    site = serve({"s1": NOWHERE})
    streams = {}
    for n in range(8000):
        logo, group = f"https://logo.example/{n}.png", f"Group {n % 20}"
        streams[f"s{n}"] = pipe.StreamSettings(f"s{n}", (NOWHERE,), logo=logo, group=group)
    config = replace(site.config, streams=streams)
    shown = pipe.Site(site.server, config, site.url, site.url, True, query)
    began = time.thread_time()
    found = pipe.status_page(shown)
    updates = pipe.update_page(shown)
    pipe.status_json(shown)
    assert time.thread_time() - began < 3 * 0.3
    assert len(gzip.compress(found.body)) < 20_000
    assert len(updates.body) < 1000


def test_status_can_be_filtered(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url, "idle": NOWHERE, "other": NOWHERE})
    site.watch("/news").read(188)

    def names(query: str) -> list[str]:
        return [stream["stream"] for stream in site.get(f"/status?{query}").json["streams"]]

    assert names("") == ["news", "idle", "other"]
    assert names("active=1") == ["news"]
    assert names("stream=idle") == ["idle"]
    assert names("stream=idle&active=1") == names("stream=nobody") == []
    assert names("active=0&x=y") == names("")


def test_status_shows_how_long_a_channel_waits_and_will_wait(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url}, reconnect=50)
    site.watch("/news").read(188)
    (channel,) = status(site)["streams"][0]["channels"]
    assert channel["waiting_seconds"] is channel["gives_up_seconds"] is None
    origin.fault("/news*", Status(503), times=None)
    eventually(lambda: status(site)["streams"][0]["state"] == "waiting", "the channel waits")
    (channel,) = status(site)["streams"][0]["channels"]
    assert channel["waiting_seconds"] + channel["gives_up_seconds"] == pytest.approx(50, abs=0.2)
    text = page(site).text
    assert re.search(r"1 waiting news waiting for \d+ s, gives up in \d+ s the origin", text)


def test_old_failure_needs_no_attention(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin.fault("/bad*", Status(404), times=None)
    site = serve({"bad": f"{origin.url}/bad.m3u8"})
    assert site.get("/bad").status == 502
    assert page(site).all("span", **{"class": "failed"})
    assert "hidden" not in page(site).all("details", id="Attention")[0]
    monkeypatch.setattr(pipe, "ATTENTION_TIME", -1.0)
    found = page(site)
    assert "hidden" in found.all("details", id="Attention")[0]
    assert re.search(
        r"bad failed (just now|\d s ago), not tried since the origin answered 404", found.text
    )
    assert found.all("span", **{"class": "failed"}) == [], "an old failure is not highlighted"


def test_attention_is_folded_if_it_lists_many_streams(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(404), times=None)
    site = serve({f"s{n}": f"{origin.url}/bad{n}.m3u8" for n in range(4)})
    for n in range(3):
        site.get(f"/s{n}")
    assert "open" in page(site).all("details", id="Attention")[0]
    site.get("/s3")
    assert "open" not in page(site).all("details", id="Attention")[0]
    assert "4 failed" in page(site).text


def test_page_lists_the_viewers(origin: Origin, serve: Serve) -> None:
    site = serve({"news": {"url": live(origin).url, "title": "The News"}})
    assert "hidden" in page(site).all("details", id="Viewers")[0]
    agent: dict[str, Any] = {"User-Agent": "VLC/3.0.18 LibVLC/3.0.18"}
    site.watch("/news", **agent).read(188)
    found = page(site)
    assert "open" not in found.all("details", id="Viewers")[0]
    row = r"The News 127\.0\.0\.1 VLC/3\.0\.18 \d s [\d.]+ [kM]bit/s 0"
    assert re.search(f"Who is watching: 1 viewer .* {row}", found.text)


@pytest.mark.parametrize(
    ("agent", "player"),
    [
        ("VLC/3.0.18 LibVLC/3.0.18", "VLC/3.0.18"),
        ("Mozilla/5.0 (X11) AppleWebKit/537.36 Chrome/142.0.0.0 Safari/537.36", "Chrome 142"),
        ("Mozilla/5.0 AppleWebKit/537 Chrome/142.0 Safari/537 Edg/142.0.1", "Edge 142"),
        ("Mozilla/5.0 (Windows NT 10.0; rv:144.0) Gecko/20100101 Firefox/144.0", "Firefox 144"),
        ("Mozilla/5.0 (iPhone) AppleWebKit/605 Version/17.5 Safari/604.1", "Safari"),
        ("", "unknown"),
    ],
)
def test_player_is_recognized_by_its_user_agent(agent: str, player: str) -> None:
    assert pipe.player_of(agent) == player


@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "with token"])
def test_page_links_to_each_stream(serve: Serve, token: str | None) -> None:
    site = serve({"a": {"url": NOWHERE, "title": "A!"}, "b": NOWHERE}, server={"token": token})
    query = f"?token={QUOTED_TOKEN}" if token else ""
    found = page(site, query)
    assert found.links() == [f"{path}{query}" for path in ("a", "b")], "one link in each card"
    fields = [have["value"] for have in found.all("input", type="hidden", name="token")]
    assert fields == ([token] if token else [])


@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "with token"])
def test_page_shows_the_address_for_televisions(serve: Serve, token: str | None) -> None:
    server = {"token": token, "public_url": "https://tv.example/sub/"}
    query = f"?token={QUOTED_TOKEN}" if token else ""
    text = page(serve({"a": NOWHERE}, server=server), query).text
    assert f"For TVs and players, enter https://tv.example/sub/playlist.m3u{query}" in text


def test_large_list_reaches_a_client_that_reads_slowly(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is for a client that reads nothing, not for the whole answer."""
    monkeypatch.setattr(pipe, "HEAD_TIMEOUT", 0.5)
    site = serve({f"s{n}": {"url": NOWHERE, "title": "t" * 2000} for n in range(3000)})
    answer = b""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", site.port))
        sock.sendall(b"GET /playlist.m3u HTTP/1.0\r\n\r\n")
        while data := sock.recv(1 << 16):
            answer += data
            threading.Event().wait(0.005)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head + b"\r\n"


def test_page_without_streams_says_so(serve: Serve) -> None:
    assert "No streams are configured" in page(serve({})).text


def test_page_whose_streams_are_all_hidden_says_so(serve: Serve) -> None:
    shown = page(serve({"news": {"url": NOWHERE, "hide": True}})).text
    assert "All streams are hidden" in shown
    assert "configured" not in shown


#### HEAD ####


@pytest.mark.parametrize("path", [*PAGES, "/", "/health"])
@pytest.mark.parametrize("accept", ["*/*", BROWSER])
def test_head_has_the_headers_of_get_but_no_body(
    origin: Origin, serve: Serve, path: str, accept: str
) -> None:
    site = serve({"news": f"{origin.url}/news.m3u8"})
    request = f"HEAD {path} HTTP/1.1\r\nHost: h\r\nAccept: {accept}\r\n\r\n"
    head, _, body = site.raw(request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b""
    answer = site.get(path, Accept=accept, Host="h")
    received = dict(re.findall(r"^([A-Za-z-]+): (.*)$", head.decode().replace("\r", ""), re.M))
    varies = ("Date", "Content-Length")
    assert {k: v for k, v in received.items() if k not in varies} == {
        k: v for k, v in answer.headers.items() if k not in varies
    }
    assert int(received["Content-Length"]) == pytest.approx(len(answer.body), abs=60)
    assert origin.requests == ()


@pytest.mark.parametrize("path", PAGES)
def test_head_without_the_token_is_refused(serve: Serve, path: str) -> None:
    head, _, body = (
        closed(serve).raw(f"HEAD {path} HTTP/1.0\r\n\r\n".encode()).partition(b"\r\n\r\n")
    )
    assert (head.split()[1], body) == (b"401", b"")


#### A stream's own options ####


@dataclass
class Proxied:
    """A forward proxy on loopback, and the addresses requested through it."""

    port: int
    seen: list[str] = field(default_factory=list)


@pytest.fixture
def forward_proxy() -> Iterator[Proxied]:
    class Forward(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            proxied.seen.append(self.path)
            target = urllib.parse.urlsplit(self.path)
            assert ipaddress.ip_address(target.hostname or "").is_loopback
            connection = http.client.HTTPConnection(target.netloc, timeout=TIMEOUT)
            with contextlib.closing(connection):
                connection.request("GET", target.path)
                response = connection.getresponse()
                body = response.read()
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    proxied = Proxied(server.server_address[1])
    with running(server):
        yield proxied


def film(origin: Origin, name: str = "film", **options: Any) -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(4), **options))


def test_stream_can_have_its_own_proxy(
    origin: Origin, serve: Serve, forward_proxy: Proxied
) -> None:
    one, two = film(origin, "one"), film(origin, "two")
    proxy = f"http://127.0.0.1:{forward_proxy.port}"
    site = serve({"one": {"url": one.url, "proxy": proxy}, "two": two.url})
    assert site.get("/one").body == one.plain(0, 4)
    assert site.get("/two").body == two.plain(0, 4)
    paths = [one.path, *map(one.segment_path, range(4))]
    assert set(forward_proxy.seen) == {origin.url + path for path in paths}


def test_stream_can_have_its_own_headers(origin: Origin, serve: Serve) -> None:
    one, two = film(origin, "one"), film(origin, "two")
    headers = {"Referer": "https://r.example/", "X-Key": "k"}
    site = serve(
        {"one": {"url": one.url, "headers": headers, "user_agent": "Own/1"}, "two": two.url}
    )
    site.get("/one"), site.get("/two")
    for request in origin.requests:
        sent = [request.headers.get(name) for name in ("referer", "x-key", "user-agent")]
        is_one = request.path.startswith("/one/")
        assert sent == (
            ["https://r.example/", "k", "Own/1"] if is_one else [None, None, "StreamPipe/1.0"]
        )


def test_stream_can_have_its_own_threads(origin: Origin, serve: Serve) -> None:
    origin.delay = 0.05
    one, two = (
        origin.add(Playlist(name, media.ts_segments(8), mode="vod")) for name in ("one", "two")
    )
    site = serve({"one": {"url": one.url, "threads": 1}, "two": two.url}, threads=4)
    site.get("/one"), site.get("/two")
    assert origin.peak("/one/*.ts") == 1
    assert 2 <= origin.peak("/two/*.ts") <= 4


def test_stream_can_have_its_own_timeout(origin: Origin, serve: Serve) -> None:
    origin.fault("/one*", StallHeaders(), times=None)
    site = serve({"one": {"url": f"{origin.url}/one.m3u8", "timeout": 0.5}}, timeout=TIMEOUT)
    began = time.monotonic()
    assert site.get("/one").status in (502, 504)
    assert time.monotonic() - began < TIMEOUT / 2


def test_stream_can_have_its_own_linger(origin: Origin, serve: Serve) -> None:
    one, two = live(origin, "one"), live(origin, "two")
    site = serve({"one": {"url": one.url, "linger": 0}, "two": two.url}, linger=TIMEOUT)
    for name in ("one", "two"):
        with site.watch(f"/{name}") as viewer:
            viewer.read(188)
    eventually(lambda: metric(site, "upstreams", stream="one") == 0, "the first channel closes")
    assert metric(site, "upstreams", stream="two") == 1


def test_engine_options_of_a_stream_override_the_global_ones(origin: Origin, serve: Serve) -> None:
    one, two, three = (live(origin, name, clock=False) for name in ("one", "two", "three"))
    site = serve(
        {
            "one": {"url": one.url, "streamlink": {"hls-live-edge": 1}},
            "two": {"url": two.url, "streamlink": {"http-headers": {"X-Own": "1"}}},
            "three": {"url": three.url, "streamlink": {"stream-segment-threads": 1}, "threads": 3},
        },
        streamlink={"hls-live-edge": 2},
    )
    for name in ("one", "two", "three"):
        site.watch(f"/{name}").read(188)
    first = {
        name: min(re.findall(rf"/{name}/(\d+)\.ts", " ".join(r.path for r in origin.requests)))
        for name in ("one", "two", "three")
    }
    assert first == {"one": "4", "two": "3", "three": "3"}
    assert {r.headers.get("x-own") for r in origin.requests if "/two/" in r.path} == {"1"}


@pytest.mark.parametrize(
    ("quality", "query", "wanted"),
    [
        pytest.param(None, "", "high", id="best by default"),
        pytest.param("480p", "", "low", id="configured"),
        pytest.param("4k,480p,best", "", "low", id="first that exists"),
        pytest.param("480p", "?quality=720p", "high", id="asked for"),
        pytest.param(None, "?x=1&quality=worst", "low", id="asked for by a synonym"),
    ],
)
def test_requested_quality_overrides_the_configured_one(
    origin: Origin, serve: Serve, quality: str | None, query: str, wanted: str
) -> None:
    stream = {"url": two_qualities(origin), **({"quality": quality} if quality else {})}
    site = serve({"news": stream})
    site.watch(f"/news{query}").read(188)
    pulled = {request.path.split("/")[1] for request in origin.requests} - {"news"}
    assert pulled == {wanted}


def test_window_keeps_no_more_than_late_viewers_need(origin: Origin, serve: Serve) -> None:
    large = [media.padded(segment, 300_000) for segment in media.ts_segments(8)]
    news = origin.add(Playlist("news", large, mode="live", window=8))
    size = 1 << 20
    site = serve({"news": {"url": news.url, "ringbuffer_size": size, "threads": 1}})
    viewer = site.watch("/news")
    viewer.read(300_000)
    for _ in range(6):
        news.advance()
    viewer.read(1_800_000)
    assert size < metric(site, "window_bytes", stream="news") <= 5 * 300_000 + pipe.BLOCK_LIMIT


#### --check ####

LINE = re.compile(r"(\S+)  (ok|failed)  (.+)")


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Callable[..., tuple[int, list[str], list[str]]]]:
    """Runs --check with a configuration; returns the exit status and the lines of both outputs."""
    with contextlib.ExitStack() as stack:

        def run(
            streams: Mapping[str, object], **options: object
        ) -> tuple[int, list[str], list[str]]:
            tree = {"streams": dict(streams), "options": {"timeout": 5.0, **options}}
            (tmp_path / "config.yml").write_text(json.dumps(tree), encoding="utf-8")
            program = Program("--check", cwd=tmp_path)
            stack.callback(program.close)
            return program.wait(), program.output().splitlines(), program.errors()

        yield run


Check = Callable[..., tuple[int, list[str], list[str]]]


def seconds_of(words: str) -> float:
    found = re.search(r"first byte after (\d+\.\d\d) s", words)
    assert found, words
    return float(found[1])


def test_check_describes_each_stream(origin: Origin, check: Check) -> None:
    init, fragments = media.fmp4(4)
    radio = Playlist("radio", media.aac_segments(4), extension=".aac")
    streams = {
        "two": two_qualities(origin),
        "boxes": origin.add(Playlist("boxes", fragments, init=init, extension=".m4s")).url,
        "radio": origin.add(radio).url,
    }
    status, output, errors = check(streams)
    assert (status, errors) == (0, [])
    found = [match.groups() for match in map(LINE.fullmatch, output) if match]
    assert [(name, word) for name, word, _ in found] == [(name, "ok") for name in streams]
    words = {name: rest for name, _, rest in found}
    assert words["two"].startswith("video/mp2t; ")
    assert {"480p", "720p"} <= set(re.split(r"[;,] ", words["two"]))
    assert words["boxes"].startswith("video/mp4; ")
    assert words["radio"].startswith("audio/aac; ")
    assert all(0 < seconds_of(each) < 5 for each in words.values())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(Status(404), "the origin answered 404", id="404"),
        pytest.param(Status(500), "the origin answered 500", id="500"),
        pytest.param(StallHeaders(), None, id="silence"),
    ],
)
def test_check_shows_why_a_stream_failed(
    origin: Origin, check: Check, fault: Fault, reason: str | None
) -> None:
    origin.fault("/bad/*", fault, times=None)
    bad = f"http://user:hunter2@127.0.0.1:{origin.port}/bad/x.m3u8?key=hunter2"
    status, output, errors = check({"good": live(origin).url, "bad": bad}, timeout=2.0)
    assert status == 1
    good, failed = [match.groups() for match in map(LINE.fullmatch, output) if match]
    assert good[:2] == ("good", "ok")
    assert failed[:2] == ("bad", "failed")
    assert failed[2] == reason if reason else failed[2]
    assert "hunter2" not in "".join(output + errors)


def test_check_lists_the_qualities_if_the_configured_one_is_missing(
    origin: Origin, check: Check
) -> None:
    status, (line,), _ = check({"news": {"url": two_qualities(origin), "quality": "4k"}})
    assert status == 1
    assert line.startswith("news  failed  ")
    assert "480p" in line
    assert "720p" in line


def test_check_says_that_sound_needs_ffmpeg(origin: Origin, check: Check) -> None:
    picture = Playlist("picture", media.video_only_segments(8), mode="live", clock=True)
    sound = Playlist("sound", media.audio_only_segments(8), mode="live", clock=True)
    news = origin.add(master("news", {"720p": picture}, audio=sound))
    status, (line,), _ = check({"news": news.url}, streamlink={"ffmpeg-ffmpeg": "/nonexistent"})
    assert status == 0
    assert line.endswith("; no sound: install ffmpeg")


def test_check_opens_several_streams_at_once(origin: Origin, check: Check) -> None:
    origin.delay = 0.2
    streams = {f"s{n}": live(origin, f"s{n}").url for n in range(9)}
    status, output, _ = check(streams)
    assert (status, len(output)) == (0, 9)
    assert [line.split()[0] for line in output] == list(streams)
    assert 2 <= origin.peak("*/index.m3u8") <= 8


def test_check_of_no_streams_fails(check: Check) -> None:
    status, output, errors = check({})
    assert (status, output) == (1, [])
    assert "no streams are configured: add some under streams:" in errors[-1]


def test_check_of_an_invalid_configuration_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text("streams: {a: {titel: x}}", encoding="utf-8")
    program = Program("--check", cwd=tmp_path)
    with contextlib.closing(program):
        assert (program.wait(), program.output()) == (2, "")


def test_check_of_the_demo_succeeds(tmp_path: Path) -> None:
    program = Program("--check", "--demo", cwd=tmp_path)
    with contextlib.closing(program):
        assert program.wait() == 0
        assert program.output().startswith("test-card  ok  video/mp2t; ")


def test_check_shows_its_progress_only_on_a_terminal(origin: Origin, tmp_path: Path) -> None:
    streams = {name: film(origin, name).url for name in ("one", "two")}
    (tmp_path / "config.yml").write_text(json.dumps({"streams": streams}), encoding="utf-8")
    leader, follower = pty.openpty()
    try:
        program = subprocess.Popen(
            [sys.executable, str(PIPE), "--check"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=follower,
            text=True,
        )
        output, _ = program.communicate(timeout=TIMEOUT)
        shown = os.read(leader, 65536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert program.returncode == 0
    assert [line.split()[0] for line in output.splitlines()] == ["one", "two"]
    assert "checked" not in output
    about, *counts = shown.splitlines()
    assert re.fullmatch(r"checking 2 addresses, about \d+ s", about)
    assert re.fullmatch(r"(1 of 2 checked, \d+ s left )?2 of 2 checked", "".join(counts).strip())
