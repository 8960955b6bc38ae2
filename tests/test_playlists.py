"""Odd answers of origins for playlists, keys and segments: redirects, pages, DRM, gaps.

Server and origin are real and tested from outside.  Times are shortened if they do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

import pipe
from tests import media
from tests.origin import (
    WEB_PAGE,
    Body,
    Drip,
    DripHead,
    Fault,
    Origin,
    Playlist,
    Preface,
    Redirect,
    Segment,
    Status,
    Tokens,
    master,
)
from tests.program import Service, eventually
from tests.server import Site, Watch
from tests.threads import Task

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(12)
LOGIN = "/login/news.m3u8"


def news(name: str = "news", **more: object) -> Playlist:
    return Playlist(name, SEGMENTS, mode="live", **more)  # type: ignore[arg-type]


def reason(site: Site, path: str = "/news") -> tuple[int, str]:
    """The status and the reason of a start that fails."""
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
def test_new_token_is_requested_from_the_redirect(origin: Origin, serve: Serve, uses: int) -> None:
    """A token is valid for a few requests.  The upstream is not reopened, and nothing is lost."""
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


def test_token_of_a_redirect_is_used_once(origin: Origin, serve: Serve) -> None:
    """Panels ban clients after too many refusals, so no reload may send an old token."""
    live = origin.add(news())
    tokens = Tokens(live.path)
    origin.fault(LOGIN, tokens, times=None)
    origin.fault(live.path, tokens, times=None)
    viewer = serve({"news": origin.url + LOGIN}).watch("/news")
    viewer.read(len(live.plain(2, 5)))
    for number in range(5, 8):
        live.advance()
        viewer.read(len(live.plain(number, number + 1)))
    assert {r.status for r in origin.requests if r.path.startswith(live.path)} == {200}


def test_refusal_by_the_configured_address_reopens_the_upstream(
    origin: Origin, serve: Serve
) -> None:
    """The upstream is reopened only if the configured address itself refuses."""
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


#### Origins that do not answer ####


def test_refused_connection_is_reported(origin: Origin, serve: Serve) -> None:
    address = origin.url
    origin.stop()
    site = serve({"news": f"{address}/news.m3u8"})
    assert reason(site) == (502, "the origin refuses connections")


def test_unknown_host_name_is_reported(serve: Serve) -> None:
    site = serve({"news": "http://nowhere.invalid/news.m3u8"})
    assert reason(site) == (502, "the origin's host name is unknown")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.EHOSTUNREACH, "No route to host"),
            "there is no network route to the origin",
        ),
        (
            OSError(errno.ENETUNREACH, "Network is unreachable"),
            "there is no network route to the origin",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "the origin closed the connection"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "the server has too many open files: raise the limit of open files",
        ),
    ],
)
def test_network_errors_are_explained(error: OSError, words: str) -> None:
    """These errors cannot be produced on a loopback interface."""
    wrapped = requests.ConnectionError("Max retries exceeded with url: /secret")
    wrapped.__cause__ = error
    assert pipe.explain(wrapped) == words


@pytest.mark.parametrize("address", ["https://{}", "hls://{}", "httpstream://{}"])
def test_https_to_an_http_server_is_reported(origin: Origin, serve: Serve, address: str) -> None:
    """Streamlink assumes https for an address without a scheme after its prefix."""
    live = origin.add(news())
    site = serve({"news": address.format(live.url.removeprefix("http://"))})
    status, words = reason(site)
    assert (status, words.partition(": ")[2]) == (502, "write http:// in front of its address")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the origin does not speak HTTP"),
        (b"", "the origin closed the connection"),
    ],
    ids=["ssh", "nothing"],
)
def test_other_protocol_is_reported(serve: Serve, answer: bytes, words: str) -> None:
    with answering(answer) as address:
        assert reason(serve({"news": f"{address}/news"})) == (502, words)


def test_plain_text_declared_as_gzip_is_reported(serve: Serve) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\n\r\n#EXTM3U\n"
    with answering(answer) as address:
        words = "the origin's answer cannot be decompressed"
        assert reason(serve({"news": f"{address}/news.m3u8"})) == (502, words)


def test_refusal_by_a_proxy_is_not_blamed_on_the_origin(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    with Origin() as other:
        refusing = other.url.removeprefix("http://")
    for kind in ("http", "socks5h"):
        site = serve({"news": {"url": live.url, "proxy": f"{kind}://{refusing}"}})
        assert reason(site) == (502, "the proxy does not answer")


#### Pages instead of streams ####

PAGES = {
    "html": WEB_PAGE,
    "fragment": b"\n <div class='error'>expired: account 4711</div>" + 64 * b" ",
    "xml": b"\xef\xbb\xbf<?xml version='1.0'?><error code='17'>expired</error>",
    "json": b'{"user_info": {"auth": 0, "status": "Expired"}}',
    "list": b'[{"error": "no such channel"}]',
}


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
@pytest.mark.parametrize("place", ["{}/news", "{}/news.m3u8", "httpstream://{}/news"])
def test_page_is_not_a_stream(origin: Origin, serve: Serve, place: str, page: bytes) -> None:
    origin.fault("/news*", Body(page, "video/mp2t"), times=None)
    site = serve({"news": place.format(origin.url)})
    assert reason(site) == (502, "the origin sent a web page, not a stream")


@pytest.mark.parametrize("kind", ["variant", "key"])
def test_page_instead_of_a_variant_or_key_is_reported(
    origin: Origin, serve: Serve, kind: str
) -> None:
    live = origin.add(news(aes_key=bytes(16)))
    channel = origin.add(master("tv", {"720p": live}))
    origin.fault(live.key_path if kind == "key" else live.path, Body(WEB_PAGE), times=None)
    status, words = reason(serve({"news": channel.url}, timeout=4))
    assert (status, words.endswith("the origin sent a web page, not a stream")) == (502, True)


def test_check_reports_a_page_as_failed(origin: Origin, capsys: pytest.CaptureFixture[str]) -> None:
    origin.fault("/news", Body(WEB_PAGE, "text/html"), times=None)
    stream = pipe.StreamSettings("news", (f"{origin.url}/news",))
    assert pipe.run_check(pipe.Config(streams={"news": stream})) == 1
    output = capsys.readouterr().out
    assert output == "news  failed  the origin sent a web page, not a stream\n"


@pytest.mark.parametrize("place", ["playlist", "segment"])
def test_captive_portal_during_a_stream_is_an_outage(
    origin: Origin, serve: Serve, place: str
) -> None:
    """A captive portal answers every request with 200 and a page, which no viewer may receive."""
    live = origin.add(news())
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    pattern = live.path if place == "playlist" else live.segment_path(5)
    portal = origin.fault(pattern, Body(WEB_PAGE, "text/html"), times=2)
    live.advance()
    assert viewer.read(len(live.plain(5, 6))) == live.plain(5, 6)
    assert portal.taken == 2


def test_media_that_begins_like_a_page_is_media(origin: Origin, serve: Serve) -> None:
    """A relay's first bytes may be from the middle of a packet."""
    data = b"<a " + b"".join(SEGMENTS)[3:]
    site = serve({"news": origin.add_file("/news", data)})
    answer = site.get("/news")
    assert (answer.status, answer.body) == (200, data)


#### Text before a playlist ####

PREFACES = {
    "bom": b"\xef\xbb\xbf",
    "blanks": b"\r\n \n\t",
    "comments": b"\xef\xbb\xbf# made by a panel\r\n\n#EXT-X-SOMETHING\n" + 900 * b"#\n",
}


@pytest.mark.parametrize("preface", PREFACES.values(), ids=list(PREFACES))
@pytest.mark.parametrize("address", ["media", "multivariant", "unknown"])
def test_playlist_may_begin_with_other_text(
    origin: Origin, serve: Serve, address: str, preface: bytes
) -> None:
    live = origin.add(news())
    channel = origin.add(master("tv", {"720p": live}))
    origin.fault("/unknown", Redirect(live.url), times=None)
    origin.fault("*.m3u8", Preface(preface), times=None)
    addresses = {"media": live.url, "multivariant": channel.url}
    site = serve({"news": addresses.get(address, f"{origin.url}/unknown")})
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    for number in (5, 6):
        live.advance()
        expected = live.plain(number, number + 1)
        assert viewer.read(len(expected)) == expected
    assert site.get("/status").json["streams"][0]["last_error"] is None


#### Answers that arrive very slowly ####


@pytest.mark.parametrize("fault", [DripHead(0.2), Drip(0.2)], ids=["head", "body"])
@pytest.mark.parametrize("address", ["/tv/master.m3u8", "/news/index.m3u8", "/unknown"])
def test_slow_address_leaves_time_for_the_backup(
    origin: Origin, serve: Serve, address: str, fault: Fault
) -> None:
    live = origin.add(news())
    origin.add(master("tv", {"720p": live}))
    dripping = origin.fault(address, fault, times=None)
    with Origin() as other:
        backup = other.add(news())
        site = serve({"news": [origin.url + address, backup.url]}, timeout=3)
        viewer = site.watch("/news")
        assert (viewer.status, dripping.taken) == (200, 1)
        assert viewer.read(len(backup.plain(2, 5))) == backup.plain(2, 5)


def test_slow_reload_is_an_outage_until_it_ends(origin: Origin, serve: Serve) -> None:
    live = origin.add(news())
    viewer = serve({"news": live.url}, timeout=1.5).watch("/news")
    viewer.read(len(live.plain(2, 5)))
    dripping = origin.fault(live.path, DripHead(0.2), times=1)
    dripping.wait()
    live.advance()
    assert viewer.read(len(live.plain(5, 6))) == live.plain(5, 6)


def test_slow_head_of_a_segment_is_noticed_by_the_channel(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """The channel reopens its upstream and continues at that segment."""
    live = origin.add(news(target_duration=1))
    site = serve({"news": live.url}, timeout=2)
    viewer = site.watch("/news")
    viewer.read(len(live.plain(2, 5)))
    dripping = origin.fault(live.segment_path(5), DripHead(0.2), times=1)
    live.advance()
    assert viewer.read(len(live.plain(5, 6))) == live.plain(5, 6)
    assert (dripping.taken, site.channels.record("news").counts["restarts"]) == (1, 1)
    # A download that was cut on purpose must not be logged as a failure.
    assert "abandoned segment" not in caplog.text


#### Nothing to play ####


def failing(origin: Origin, serve: Serve, text: str, **options: object) -> tuple[int, str]:
    return reason(serve({"news": origin.add_file("/list.m3u8", text.encode())}, **options))


UNREADABLE = "an invalid key, map or byte range"


def playlist_of(*lines: str) -> str:
    return "\n".join(["#EXTM3U", "#EXT-X-TARGETDURATION:2", *lines, ""])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["#EXT-X-I-FRAMES-ONLY", "#EXTINF:2,", "1.ts"], "no playable stream"),
        (["#EXTINF:2,", "#EXT-X-BYTERANGE:all", "1.ts"], UNREADABLE),
        (["#EXT-X-MAP:BYTERANGE=1", "#EXTINF:2,", "1.m4s"], UNREADABLE),
        (['#EXT-X-MAP:URI="1.mp4",BYTERANGE="-1@0"', "#EXTINF:2,", "1.m4s"], UNREADABLE),
        (['#EXT-X-KEY:URI="key"', "#EXTINF:2,", "1.ts"], UNREADABLE),
        (['#EXT-X-KEY:METHOD=AES-128,URI="key",IV=12', "#EXTINF:2,", "1.ts"], UNREADABLE),
        (["#EXT-X-KEY:METHOD=AES-128", "#EXTINF:2,", "1.ts"], UNREADABLE),
        (['#EXT-X-I-FRAME-STREAM-INF:BANDWIDTH=1,URI="1.m3u8"'], "no playable stream"),
        (["#EXTINF:2,", "http://["], "an unsupported kind of address"),
    ],
    ids=[
        *("i-frames", "byte-range", "map", "map-range", "key", "iv", "key-address", "variants"),
        "address",
    ],
)
def test_useless_playlist_is_explained(
    origin: Origin, serve: Serve, lines: list[str], words: str
) -> None:
    status, message = failing(origin, serve, playlist_of(*lines))
    assert status == 502
    assert words in message


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        (playlist_of(), 504, "no media within 1.5 s: the origin's playlist is empty"),
        ("", 502, "the origin sent an empty answer"),
    ],
    ids=["no-segments", "no-bytes"],
)
def test_empty_playlist_is_reported(
    origin: Origin, serve: Serve, text: str, status: int, words: str
) -> None:
    assert failing(origin, serve, text, timeout=1.5) == (status, words)


def test_start_waits_for_a_playlist_that_is_empty_at_first(origin: Origin, serve: Serve) -> None:
    """An encoder that has just started lists no segments yet."""
    live = origin.add(news())
    empty = origin.fault(live.path, Body(playlist_of().encode()), times=2)
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    assert empty.taken == 2


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ('METHOD=SAMPLE-AES,URI="skd://key"', "SAMPLE-AES"),
        ('METHOD=SAMPLE-AES-CTR,URI="data:text/plain;base64,AA"', "SAMPLE-AES-CTR"),
        ('METHOD=AES-128,URI="key",KEYFORMAT="com.apple.streamingkeydelivery"', "AES-128"),
    ],
)
def test_drm_is_reported_at_once(origin: Origin, serve: Serve, key: str, method: str) -> None:
    live = origin.add(news())
    lines = [f"#EXT-X-KEY:{key}", "#EXTINF:2,", live.segment_path(0)]
    words = f"the stream is DRM-protected ({method}) and cannot be played"
    assert failing(origin, serve, playlist_of(*lines)) == (502, words)


def test_channel_list_is_reported(origin: Origin, serve: Serve) -> None:
    """Played as HLS, the channels of a provider's list would follow each other."""
    channel = origin.add(news())
    body = f'#EXTM3U\n#EXTINF:-1 group-title="News",The News\n{channel.url}\n'
    origin.fault("/get.m3u", Body(body.encode()), times=None)
    words = "the address is a channel list: put it under playlists:, not under streams:"
    assert reason(serve({"news": f"{origin.url}/get.m3u"})) == (502, words)


def test_initialization_section_applies_beyond_a_discontinuity(
    origin: Origin, serve: Serve
) -> None:
    """It applies until the next EXT-X-MAP (RFC 8216, 4.3.2.5)."""
    init, fragments = media.fmp4(6)
    live = Playlist("news", fragments, init=init, extension=".m4s", mode="live", window=6)
    origin.add(live).advance(4)  # the media start over within the list, before the viewer starts
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(init)) == init


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *itertools.product(["segments", "key"], [401, 403, 404, 410]),
        *itertools.product(["initialization section"], [401, 403, 410]),
    ],
)
@pytest.mark.parametrize("mode", ["live", "vod"])
def test_refusal_of_all_requests_is_reported_at_once(
    origin: Origin, serve: Serve, status: int, kind: str, mode: str
) -> None:
    init, fragments = media.fmp4(6)
    if kind == "initialization section":
        channel = Playlist("news", fragments, mode=mode, init=init, extension=".m4s")  # type: ignore[arg-type]
    else:
        channel = Playlist("news", SEGMENTS, mode=mode, aes_key=bytes(16))  # type: ignore[arg-type]
    origin.add(channel)
    paths = {"segments": "*.ts", "key": channel.key_path}
    refused = origin.fault(paths.get(kind, channel.init_path), Status(status), times=None)
    answered, words = reason(serve({"news": channel.url}))
    assert answered == 502
    assert words.endswith(f"the origin answered {status}")
    assert refused.taken <= 20  # far fewer than if the start waited for its time-out


def test_wrong_key_is_reported(origin: Origin, serve: Serve) -> None:
    live = origin.add(news(aes_key=bytes(16)))
    origin.fault(live.key_path, Body(b"too short"), times=None)
    status, words = reason(serve({"news": live.url}, timeout=4))
    assert (status, words) == (
        502,
        "the key cannot be fetched: the decryption key is not an AES-128 key",
    )


def test_wrong_key_is_requested_again_by_the_next_start(origin: Origin, serve: Serve) -> None:
    live = origin.add(news(aes_key=bytes(16)))
    wrong = origin.fault(live.key_path, Body(b"too short"))
    site = serve({"news": live.url})
    words = "the key cannot be fetched: the decryption key is not an AES-128 key"
    assert reason(site) == (502, words)  # at once, because a retry would not help
    eventually(lambda: site.watch("/news").status == 200, "the next start has the right key")
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(2, 5))) == live.plain(2, 5)
    assert (wrong.taken, origin.count(live.key_path)) == (1, 2)


#### Missing segments ####


@pytest.mark.parametrize("mode", ["live", "vod"])
def test_missing_first_segment_does_not_delay_the_start(
    origin: Origin, serve: Serve, mode: str
) -> None:
    channel = origin.add(Playlist("news", SEGMENTS[:6], mode=mode, target_duration=10))  # type: ignore[arg-type]
    first = 2 if mode == "live" else 0
    missing = origin.fault(channel.segment_path(first), Status(404), times=None)
    site = serve({"news": channel.url}, timeout=8)
    viewer = site.watch("/news")
    expected = channel.plain(first + 1, 5)
    assert viewer.read(len(expected)) == expected
    assert missing.taken <= 2
    assert site.get("/status").json["streams"][0]["gaps"] == 1


def test_newest_segment_may_be_late(origin: Origin, serve: Serve) -> None:
    """A cache may list a segment before it can serve it."""
    live = origin.add(news())
    late = origin.fault(live.segment_path(4), Status(404), times=2)
    site = serve({"news": live.url}, streamlink={"hls-live-edge": 1})
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(4, 5))) == live.plain(4, 5)
    assert late.taken == 2


def with_gaps(*numbers: int) -> list[Segment]:
    tags = ("#EXT-X-GAP",)
    return [Segment(d, tags=tags if n in numbers else ()) for n, d in enumerate(SEGMENTS)]


@pytest.mark.parametrize("gap", [2, 3])
def test_marked_gap_is_skipped_at_once(origin: Origin, serve: Serve, gap: int) -> None:
    live = origin.add(Playlist("news", with_gaps(gap), mode="live", target_duration=10))
    missing = origin.fault(live.segment_path(gap), Status(404), times=None)
    site = serve({"news": live.url}, timeout=8)
    viewer = site.watch("/news")
    expected = media.spliced(live.plain(2, gap), live.plain(gap + 1, 5))
    assert viewer.read(len(expected)) == expected
    assert missing.taken == 0
    assert site.get("/status").json["streams"][0]["gaps"] == 1


def test_marked_gap_in_a_film_of_long_segments_is_counted(origin: Origin, serve: Serve) -> None:
    film = origin.add(Playlist("film", with_gaps(2)[:5], target_duration=100))
    site = serve({"film": film.url})
    answer = site.get("/film")
    left = media.spliced(film.plain(0, 2), film.plain(3, 5))
    assert (answer.body, answer.is_complete) == (left, True)
    assert site.get("/status").json["streams"][0]["gaps"] == 1


def test_marked_gaps_do_not_end_the_upstream(origin: Origin, serve: Serve) -> None:
    """Two of the six listed segments are gaps."""
    live = origin.add(Playlist("news", with_gaps(5, 6), mode="live", window=6, listed=6))
    origin.fault(live.segment_path(5), Status(404), times=None)
    origin.fault(live.segment_path(6), Status(404), times=None)
    site = serve({"news": live.url})
    viewer = site.watch("/news")
    live.advance(4)
    expected = media.spliced(live.plain(3, 5), live.plain(7, 10))
    assert viewer.read(len(expected)) == expected
    stream = site.get("/status").json["streams"][0]
    assert (stream["gaps"], stream["restarts"]) == (2, 0)


#### Numbers and offsets ####


def test_first_byte_range_may_have_no_offset(origin: Origin, serve: Serve) -> None:
    """It follows the range listed before it, even if that is not played (RFC 8216, 4.3.2.2)."""
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=6, byte_ranges=True))
    site = serve({"news": live.url}, streamlink={"hls-live-edge": 3})
    viewer = site.watch("/news")
    assert viewer.read(len(live.plain(3, 6))) == live.plain(3, 6)
    assert site.get("/status").json["streams"][0]["gaps"] == 0


@pytest.mark.parametrize("mode", ["live", "vod"])
def test_start_offset_applies_only_to_the_start(origin: Origin, serve: Serve, mode: str) -> None:
    channel = Playlist("news", SEGMENTS[:10], mode=mode, window=8)  # type: ignore[arg-type]
    origin.add(channel)
    first = 4 if mode == "live" else 3
    stop = 8 if mode == "live" else 10
    broken = origin.fault(channel.segment_path(stop - 1), Status(500), times=None)
    options = {"hls-start-offset": 3.0}
    site = serve({"news": channel.url}, streamlink=options, timeout=1)
    viewer = site.watch("/news")
    assert viewer.read(len(channel.plain(first, stop - 1))) == channel.plain(first, stop - 1)
    expired = origin.fault(channel.path, Status(403))
    broken.wait()
    if mode == "vod":
        origin.restart()
    else:
        expired.wait()
    broken.clear()
    assert viewer.read(len(channel.plain(stop - 1, stop))) == channel.plain(stop - 1, stop)


#### The log ####


@pytest.mark.parametrize("level", ["info", "debug"])
def test_streamlinks_messages_on_playlists_are_logged_only_at_debug(
    origin: Origin, tmp_path: Path, level: str
) -> None:
    """Streamlink reports failed reloads, jumps of the numbers and invalid attributes."""
    live = origin.add(
        Playlist("news", [Segment(d, tags=("#EXT-X-START:?",)) for d in SEGMENTS], mode="live")
    )
    with Service(tmp_path, {"news": live.url}, level=level) as service:
        with Watch(service.port, "/news") as viewer:
            start = viewer.read(len(live.plain(2, 5)))
            failing = origin.fault(live.path, Status(503), times=2)
            failing.wait(2)
            live.advance(8)
            parts = (2, 5), (8, len(SEGMENTS)), (len(SEGMENTS), 13)  # the media start over
            expected = media.spliced(*(live.plain(*part) for part in parts))
            assert start + viewer.read(len(expected) - len(start)) == expected
        lines = service.lines
    words = "Reloading failed|Sequence gap|attributes list|pool"
    found = [line for line in lines if re.search(words, line)]
    assert bool(found) == (level == "debug"), found
    assert any(
        "news: address 1 of 1 (127.0.0.1): the origin answered 503" in line for line in lines
    )


#### Names ####


@pytest.mark.parametrize("name", ["a-executor", "executor-0", "x-executor-0"])
def test_stream_name_cannot_lift_the_limit_of_playlists(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(pipe, "PLAYLIST_LIMIT", 100_000)
    live = origin.add(news())
    site = serve({name: live.url})
    viewer = site.watch(f"/{name}")
    viewer.read(len(live.plain(2, 5)))
    live.override = playlist_of(*(50_000 * ["# much"])).encode()
    reloads = origin.count(live.path)
    origin.wait_for(live.path, reloads + 2)
    assert site.get("/status").json["streams"][0]["last_error"] == (
        "the origin's playlist is too large"
    )
