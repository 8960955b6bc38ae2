"""Short texts that origins send instead of media; real server and origin, tested from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

import pipe
from tests import media
from tests.origin import PANEL_TEXT, WEB_PAGE, Body, Break, Gzip, Origin, Playlist, Redirect, Status
from tests.program import eventually
from tests.server import Site

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(12)
REASON = "the origin sent text, not a stream"

TEXTS = {
    "panel": PANEL_TEXT,
    "panel-line": b"FAILED TO CONNECT\r\n",
    "sixteen": b"CONNECTION ERROR",  # as long as a key
    "umlauts": "Verbindung fehlgeschlagen: ungültiges Gerät".encode(),
    "number": b"0",
    "short-json": b'{"a": 1}',
    "pls": b"[playlist]\nNumberOfEntries=1\nFile1=http://radio.example/live\nTitle1=Radio\n",
    "headless": b"".join(b"#EXTINF:-1,TV %d\nhttp://h.example/%d.ts\n" % (n, n) for n in range(60)),
    "long": b"Notice: connection limit reached. " * 120,  # just under 4 KiB
}


def live(origin: Origin, name: str = "news", **more: object) -> Playlist:
    settings = {"segments": SEGMENTS, "mode": "live", **more}
    return origin.add(Playlist(name, **settings))  # type: ignore[arg-type]


def reason(site: Site, path: str = "/news") -> tuple[int, str]:
    answer = site.get(path)
    return answer.status, answer.json["error"]


#### At a start ####


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
@pytest.mark.parametrize("place", ["{}/news", "{}/news.m3u8", "httpstream://{}/news"])
def test_text_is_not_a_stream(origin: Origin, serve: Serve, place: str, text: bytes) -> None:
    origin.fault("/news*", Body(text, "video/mp2t"), times=None)
    site = serve({"news": place.format(origin.url)})
    assert reason(site) == (502, REASON)


@pytest.mark.parametrize("chunked", [False, True])
def test_text_without_a_length_is_not_a_stream(origin: Origin, serve: Serve, chunked: bool) -> None:
    address = origin.add_endless("/news", lambda: [PANEL_TEXT, b"\n" * 60], chunked=chunked)
    assert reason(serve({"news": address})) == (502, REASON)


def test_compressed_text_is_not_a_stream(origin: Origin, serve: Serve) -> None:
    origin.fault("/news", Body(PANEL_TEXT), Gzip(), times=None)
    assert reason(serve({"news": f"{origin.url}/news"})) == (502, REASON)


def test_text_instead_of_a_variant_is_reported(origin: Origin, serve: Serve) -> None:
    """Only streamlink's worker thread requests the playlist of a variant."""
    address = origin.add_file(
        "/tv.m3u8", b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000000\n/news.m3u8\n"
    )
    origin.fault("/news.m3u8", Body(PANEL_TEXT), times=None)
    assert reason(serve({"news": address})) == (502, REASON)


def test_check_reports_a_text_as_failed(origin: Origin, capsys: pytest.CaptureFixture[str]) -> None:
    origin.fault("/news", Body(PANEL_TEXT), times=None)
    stream = pipe.StreamSettings("news", (f"{origin.url}/news",))
    assert pipe.run_check(pipe.Config(streams={"news": stream})) == 1
    assert capsys.readouterr().out == f"news  failed  {REASON}\n"


@pytest.mark.parametrize("place", ["/news", "/news/index.m3u8", "/news/*.ts"])
def test_backup_replaces_an_address_that_sends_text(
    origin: Origin, serve: Serve, place: str
) -> None:
    news = live(origin)
    origin.fault(place, Body(PANEL_TEXT), times=None)
    origin.fault("/news", Redirect(news.url), times=None)
    with Origin() as other:
        backup = live(other)
        site = serve({"news": [f"{origin.url}/news", backup.url]}, timeout=8)
        viewer = site.watch("/news")
        assert viewer.status == 200
        assert viewer.read(len(backup.plain(2, 5))) == backup.plain(2, 5)


def test_first_words_of_a_text_are_logged_only_at_debug(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    text = b"CHANNEL OFFLINE see http://h.example/user/hunter2 or token=hunter2"
    origin.fault("/news.m3u8", Body(text), times=None)
    answer = serve({"news": f"{origin.url}/news.m3u8"}).get("/news")
    assert answer.json == {"error": REASON}
    telling = [record for record in caplog.records if "OFFLINE" in record.getMessage()]
    assert telling
    assert {record.levelno for record in telling} == {logging.DEBUG}
    assert "hunter2" not in "".join(record.getMessage() for record in telling)


#### Segments ####


@pytest.mark.parametrize("text", [PANEL_TEXT, WEB_PAGE, b"#EXTM3U\n"], ids=["text", "page", "list"])
@pytest.mark.parametrize("mode", ["live", "vod"])
def test_stream_of_only_texts_is_reported_at_once(
    origin: Origin, serve: Serve, mode: str, text: bytes
) -> None:
    """The start must not wait for two target durations, or for `timeout`."""
    news = live(origin, mode=mode, target_duration=10)
    origin.fault("/news/*.ts", Body(text, "video/mp2t"), times=None)
    words = pipe.WEB_PAGE if text == WEB_PAGE else REASON
    assert reason(serve({"news": news.url}, timeout=6)) == (502, words)


def test_start_does_not_wait_for_a_segment_that_is_a_text(origin: Origin, serve: Serve) -> None:
    news = live(origin, target_duration=10)
    origin.fault(news.segment_path(2), Body(PANEL_TEXT), times=None)
    viewer = serve({"news": news.url}, timeout=6).watch("/news")
    assert viewer.read(len(news.plain(3, 5))) == news.plain(3, 5)


@pytest.mark.parametrize("place", ["playlist", "segment"])
def test_text_in_a_running_stream_is_an_outage(origin: Origin, serve: Serve, place: str) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    path = news.path if place == "playlist" else news.segment_path(5)
    text = origin.fault(path, Body(PANEL_TEXT), times=2)
    if place == "playlist":
        text.wait()

        def is_shown() -> bool:
            stream = site.get("/status").json["streams"][0]
            return (stream["state"], stream["last_error"]) == ("waiting", REASON)

        eventually(is_shown, "the status shows the text as the reason")
    news.advance()
    assert viewer.read(len(news.plain(5, 6))) == news.plain(5, 6)
    assert text.taken == 2


def test_segment_that_remains_a_text_is_a_gap(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    origin.fault(news.segment_path(5), Body(PANEL_TEXT), times=None)
    news.advance(2)
    packet = viewer.read(media.PACKET)
    assert packet[:1] == b"G"
    assert site.get("/status").json["streams"][0]["gaps"] == 1


def test_text_instead_of_an_initialization_section_is_reported(
    origin: Origin, serve: Serve
) -> None:
    init, fragments = media.fmp4()
    news = live(origin, segments=fragments, init=init, extension=".m4s", target_duration=10)
    text = origin.fault(news.init_path, Body(PANEL_TEXT), times=None)
    status, words = reason(serve({"news": news.url}, timeout=6))
    assert (status, words.endswith(REASON)) == (502, True)
    assert text.taken


def test_text_is_not_taken_as_the_rest_of_a_segment(origin: Origin, serve: Serve) -> None:
    """A panel answers the request for the rest of a segment with status 200 and a message."""
    film = live(origin, mode="vod")
    origin.fault(film.segment_path(3), Break(1000), times=1)
    text = origin.fault(film.segment_path(3), Body(PANEL_TEXT), times=2)
    answer = serve({"news": film.url}).get("/news")
    assert (answer.body, answer.is_complete, text.taken) == (film.plain(0, 12), True, 2)


def test_film_is_resolved_again_if_texts_replace_its_segments(origin: Origin, serve: Serve) -> None:
    film = live(origin, mode="vod")
    origin.fault("/film", Redirect(film.url), times=None)
    site = serve({"news": f"{origin.url}/film"}, threads=2)
    origin.rate = 400_000
    viewer = site.watch("/news")
    start = viewer.read(len(film.plain(0, 2)))
    texts = origin.fault("/news/*.ts", Body(PANEL_TEXT), times=None)
    texts.wait(2)
    eventually(lambda: origin.count("/film") > 1, "the address is resolved again")
    texts.clear()
    rest, is_complete = viewer.read_all()
    assert (start + rest, is_complete) == (film.plain(0, 12), True)


#### Media that may look like a text ####


@pytest.mark.parametrize("start", [b"abcd", b"G" * 40, "ü".encode() * 20], ids=["a", "g", "u"])
def test_media_that_begins_like_a_text_is_media(origin: Origin, serve: Serve, start: bytes) -> None:
    data = start + b"".join(SEGMENTS)
    answer = serve({"news": origin.add_file("/news", data)}).get("/news")
    assert (answer.status, answer.body) == (200, data)


def test_status_of_a_refusal_matters_more_than_its_text(origin: Origin, serve: Serve) -> None:
    origin.fault("/news", Status(403, PANEL_TEXT), times=None)
    assert reason(serve({"news": f"{origin.url}/news"})) == (502, "the origin answered 403")
