"""The page that plays a stream, and the error pages; server and origin are real.

Tests that need a browser are in test_browser.py.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import av
import pytest
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from tests import media
from tests.origin import Origin, Playlist, Segment, Status, master
from tests.server import Answer, Site
from tests.test_pages import (
    HOSTILE,
    HTML,
    NOWHERE,
    PROGRAMS,
    QUOTED_TOKEN,
    TOKEN,
    Document,
    live,
    policy,
)
from tests.test_sharing import feeders

Serve = Callable[..., Site]
QUERY = f"?token={QUOTED_TOKEN}"


def watch_page(site: Site, path: str = "/news") -> Document:
    answer = site.ask("GET", path, **HTML)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    return Document(answer.body)


def video(found: Document) -> dict[str, str]:
    (attributes,) = found.all("video")
    return attributes


#### The page ####


@pytest.mark.parametrize("headers", PROGRAMS.values(), ids=list(PROGRAMS))
def test_players_receive_the_media(origin: Origin, serve: Serve, headers: dict[str, Any]) -> None:
    site = serve({"news": live(origin).url})
    viewer = site.watch("/news", **headers)
    assert viewer.headers["Content-Type"] == "video/mp2t"
    assert viewer.read(188)[:1] == b"G"


def test_browsers_get_a_page_that_plays_it(origin: Origin, serve: Serve) -> None:
    site = serve({"news": {"url": live(origin).url, "title": "The News", "number": 7}})
    found = watch_page(site)
    flags = dict.fromkeys(("controls", "autoplay", "muted", "playsinline"), "")
    assert video(found) == {"src": "news.m3u8", **flags}
    assert not {"iframe", "object", "form"} & {tag for tag, _ in found.tags}
    assert found.all("meta", **{"http-equiv": "refresh"}) == [], "a reload would interrupt playback"
    assert "The News - StreamPipe" in found.text
    assert "The News live · 1 viewer" in found.text
    assert f"enter {site.url}/news " in found.text
    for words in ("Chrome and Edge", "142", "Safari", "Android", "Firefox"):
        assert words in found.text
    assert found.links() == ["./#news", "news.m3u"]
    assert found.all("a", href="news.m3u", download="news.m3u")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ""),
        ("?quality=720p", "?quality=720p"),
        ("?quality=720p&quality=480p&x=y", "?quality=480p"),
        ("?quality=", ""),
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "with token"])
def test_links_keep_quality_and_token(
    origin: Origin, serve: Serve, query: str, expected: str, token: str | None
) -> None:
    low, high = (live(origin, name) for name in ("low", "high"))
    channel = origin.add(master("news", {"480p": low, "720p": high}))
    site = serve({"news": channel.url}, server={"token": token})
    path = f"/news{query}&token={QUOTED_TOKEN}" if query else f"/news{QUERY}"
    found = watch_page(site, path)
    if token:
        expected += ("&" if expected else "?") + f"token={QUOTED_TOKEN}"
    assert video(found)["src"] == f"news.m3u8{expected}"
    assert f"enter {site.url}/news{expected} " in found.text
    query = QUERY if token else ""
    assert f"./{query}#news" in found.links()
    assert f"news.m3u{query}" in found.links()


def test_unknown_quality_is_an_error_page(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    answer = site.ask("GET", "/news?quality=%22%3E%3Cscript%3E", **HTML)
    error_page(answer, 404, "no such quality; available: ")


def test_page_shows_an_address_that_the_client_can_reach(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, server={"public_url": "https://tv.example/sub"})
    found = watch_page(site)
    assert "enter https://tv.example/sub/news " in found.text
    assert video(found)["src"] == "news.m3u8", "the page's policy allows only its own address"


def test_page_links_to_the_previous_and_next_streams(origin: Origin, serve: Serve) -> None:
    url = live(origin).url
    streams = {name: {"url": url, "title": name.upper()} for name in ("one", "two", "three")}
    site = serve(streams)
    assert watch_page(site, "/two").links("button") == ["one", "three", "./#two"]
    assert watch_page(site, "/one").links("button") == ["three", "two", "./#one"]
    assert "\u2039 ONE THREE \u203a" in watch_page(site, "/two").text


def test_page_offers_the_qualities_found_by_the_latest_start(origin: Origin, serve: Serve) -> None:
    low, high = (live(origin, name) for name in ("low", "high"))
    site = serve({"news": origin.add(master("news", {"480p": low, "720p": high})).url})
    links = {link["href"]: link for link in watch_page(site).all("a", **{"class": "button"})}
    assert sorted(links) == ["./#news", "news?quality=480p", "news?quality=720p"]
    assert "aria-current" in links["news?quality=720p"], "720p is playing"
    assert "aria-current" not in links["news?quality=480p"]


def test_page_shows_the_state_of_its_stream(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(503), times=None)
    site = serve({"news": live(origin).url, "bad": f"{origin.url}/bad.m3u8"})
    site.watch("/news").read(188)
    assert site.get("/bad").status == 502
    text = watch_page(site).text
    assert "news live · 2 viewers" in text
    assert "bit/s" not in text, "bitrates belong on the status page"
    error_page(site.ask("GET", "/bad", **HTML), 502, "the origin answered 503")


def test_error_page_gives_advice(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(404), times=None)
    site = serve({"bad": f"{origin.url}/bad.m3u8"})
    text = error_page(site.ask("GET", "/bad", **HTML), 502, "the origin answered 404").text
    assert "in their country. Try now" in text
    assert re.search(r"bad failed (just now|\d s ago) the origin", text)


def test_page_says_that_sound_is_missing(origin: Origin, serve: Serve) -> None:
    picture = Playlist("picture", media.video_only_segments(4))
    sound = Playlist("sound", media.audio_only_segments(4))
    url = origin.add(master("news", {"720p": picture}, audio=sound)).url
    site = serve({"news": url}, streamlink={"ffmpeg-ffmpeg": "/nonexistent"})
    assert "no sound: install ffmpeg" in watch_page(site).text


def test_page_shows_the_logo(origin: Origin, serve: Serve) -> None:
    url, logo = live(origin).url, "https://logo.example/l.png"
    site = serve({"news": {"url": url, "title": "A News", "logo": logo}, "other": url})
    polite = {"alt": "", "loading": "lazy", "referrerpolicy": "no-referrer"}
    assert watch_page(site).all("img") == [{"src": logo, **polite}]
    assert video(watch_page(site))["poster"] == logo, "a radio shows it while it plays"
    assert "AN" in watch_page(site).text
    assert watch_page(site, "/other").all("img") == []
    allowed = policy(site.ask("GET", "/news", **HTML))
    assert allowed["img-src"].split() == ["data:", "https://logo.example"]


def test_page_escapes_configured_text(origin: Origin, serve: Serve) -> None:
    stream = {"url": live(origin).url, "title": HOSTILE}
    site = serve({"a": stream, "b": stream}, server={"name": HOSTILE})
    found = watch_page(site, "/a")
    assert len(found.scripts) == 1
    assert found.all("img") == []
    assert found.text.count(" ".join(HOSTILE.split())) == 4, "two at the top, a heading, a link"


def test_page_hides_the_origins_address(origin: Origin, serve: Serve) -> None:
    site = serve({"news": f"http://user:hunter2@127.0.0.1:{origin.port}/hush/x.m3u8?key=hunter2"})
    body = site.ask("GET", "/news", **HTML).body.decode()
    assert not any(word in body for word in ("hunter2", "hush", str(origin.port)))


def test_head_request_does_not_start_the_stream(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url})
    head, _, body = site.raw(
        b"HEAD /news HTTP/1.1\r\nHost: h\r\nAccept: application/xhtml+xml\r\n\r\n"
    ).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: text/html; charset=utf-8" in head
    assert (body, origin.requests, feeders()) == (b"", (), [])


#### Streams that browsers cannot play ####


Frame = TypeVar("Frame", av.VideoFrame, av.AudioFrame)


def _blank(frame: Frame) -> Frame:
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    return frame


@functools.cache
def coded(video: str, audio: str, **options: str) -> bytes:
    """Four seconds of MPEG-TS in these codecs, with a key frame every second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts", options=options) as out:
        fast = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=25:bframes=0"}
        picture = out.add_stream(video, rate=25, options=fast if video == "libx265" else {})
        sound = out.add_stream(audio, rate=48_000)
        assert isinstance(picture, VideoStream)
        assert isinstance(sound, AudioStream)
        picture.width, picture.height, picture.pix_fmt, picture.gop_size = 160, 96, "yuv420p", 25
        sound.layout = "mono"
        for number in range(100):
            frame = av.VideoFrame(160, 96, "yuv420p")
            frame.pts = number
            out.mux(picture.encode(_blank(frame)))
        for number in range(187):
            tone = av.AudioFrame(sound.format.name, "mono", 1024)
            tone.sample_rate, tone.pts = 48_000, number * 1024
            out.mux(sound.encode(_blank(tone)))
        out.mux(picture.encode(None))
        out.mux(sound.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("codecs", "options", "words"),
    [
        pytest.param(("libx264", "aac"), {}, "", id="H.264 and AAC"),
        pytest.param(("libx264", "mp2"), {}, "", id="MPEG audio"),
        pytest.param(("libx264", "ac3"), {}, "AC-3", id="AC-3"),
        pytest.param(("libx264", "eac3"), {}, "E-AC-3", id="E-AC-3"),
        pytest.param(
            ("libx264", "ac3"), {"mpegts_flags": "system_b"}, "AC-3", id="AC-3 as DVB sends it"
        ),
        pytest.param(
            ("libx264", "eac3"), {"mpegts_flags": "system_b"}, "E-AC-3", id="E-AC-3 as DVB does"
        ),
        pytest.param(("libx265", "aac"), {}, "HEVC", id="HEVC"),
        pytest.param(("libx265", "ac3"), {}, "AC-3 and HEVC", id="neither"),
        pytest.param(("mpeg2video", "mp2"), {}, "MPEG-2", id="MPEG-2"),
    ],
)
def test_page_names_codecs_that_browsers_cannot_play(
    origin: Origin, serve: Serve, codecs: tuple[str, str], options: dict[str, str], words: str
) -> None:
    body = coded(*codecs, **options)
    channel = Playlist("news", [Segment(body, discontinuity=n > 0) for n in range(4)], mode="live")
    text = watch_page(serve({"news": origin.add(channel).url})).text
    note = f"It has {words}, which browsers cannot play: open it in a player."
    assert (note in text) == bool(words)
    assert ("which browsers cannot play" in text) == bool(words)


@pytest.mark.parametrize("kind", ["TS", "fMP4", "radio"])
def test_page_without_hls_plays_the_stream_itself_if_possible(
    origin: Origin, serve: Serve, kind: str
) -> None:
    """Browsers can play plain fMP4 and radio, but not MPEG-TS."""
    init, fragments = media.fmp4()
    films = {
        "TS": Playlist("film", media.ts_segments()),
        "fMP4": Playlist("film", fragments, init=init, extension=".m4s"),
    }
    if kind == "radio":
        url = origin.add_endless("/radio", lambda: itertools.repeat(media.aac_segments()[0]))
    else:
        url = origin.add(films[kind]).url
    found = watch_page(serve({"news": url}))
    assert [attributes["src"] for attributes in found.all("video")] == ["news"] * (kind != "TS")
    assert ("Browsers cannot play this recording" in found.text) == (kind == "TS")
    assert ("No picture?" in found.text) == (kind != "TS"), "help is shown only beside a video"


#### Errors ####


def error_page(answer: Answer, status: int, reason: str) -> Document:
    assert (answer.status, answer.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    found = Document(answer.body)
    found.check_scripts(answer)
    assert found.all("img") == []
    assert found.all("meta", **{"http-equiv": "refresh"}) == []
    assert reason in found.text
    return found


@pytest.mark.parametrize("path", ["/nobody", "/nobody.m3u", "/Nobody/", "/../etc"])
def test_unknown_stream_is_an_error_page_for_browsers(serve: Serve, path: str) -> None:
    site = serve({"news": NOWHERE}, server={"token": TOKEN})
    found = error_page(site.ask("GET", path + QUERY, **HTML), 404, "there is no such stream")
    home = "./" if path.count("/") == 1 else "../"
    assert found.links() == [f"{home}{QUERY}"]
    assert found.all("form") == [], "no search for a single stream"
    answer = site.ask("GET", path + QUERY)
    assert (answer.status, answer.json) == (404, {"error": "there is no such stream"})


def test_error_page_of_unknown_address_has_a_search(serve: Serve) -> None:
    site = serve({"news": NOWHERE, "sport": NOWHERE}, server={"name": "My TV", "token": TOKEN})
    answer = site.ask("GET", "/no/body" + QUERY, **HTML)
    found = error_page(answer, 404, "there is no such stream")
    assert "My TV" in found.text
    assert [form["action"] for form in found.all("form")] == ["../"]
    assert [field["value"] for field in found.all("input", type="hidden")] == [TOKEN]
    stranger = Document(site.ask("GET", "/nobody", **HTML).body)
    assert stranger.all("form") == []
    assert "My TV" not in stranger.text


def test_page_of_a_temporary_error_retries(serve: Serve) -> None:
    site = serve({"news": NOWHERE})
    assert site.channels.stop(1)
    answer = site.ask("GET", "/news", **HTML)
    found = error_page(answer, 503, "the server is shutting down")
    (about,) = found.all("main")
    assert (about["data-trouble"], about["data-source"]) == ("503", "news.m3u8")
    assert "Try now" in found.text
    assert answer.headers["Retry-After"] == "5"
    assert site.get("/news").json == {"error": "the server is shutting down"}
    assert site.ask("HEAD", "/news", **HTML).status == 503


@pytest.mark.parametrize("path", ["/", "/news", "/nobody", "/status", "/playlist.m3u"])
@pytest.mark.parametrize(
    ("query", "start"),
    [("", "a token is required: add "), ("?token=wrong", "the token is wrong: add the right one ")],
)
def test_missing_token_is_an_error_page(serve: Serve, path: str, query: str, start: str) -> None:
    site = serve({"news": NOWHERE}, server={"token": TOKEN})
    answer = site.ask("GET", path + query, **HTML)
    assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
    found = error_page(answer, 401, start)
    assert found.links() == [], "links would lead to the same error"
    if path != "/":
        assert site.ask("GET", path + query).json["error"].startswith(start)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/news", 401), ("POST", "/news", 405), ("PUT", "/", 405), ("POST", "/%ff", 405)],
)
def test_error_pages_do_not_reveal_the_token(
    serve: Serve, method: str, path: str, status: int
) -> None:
    answer = serve({"news": NOWHERE}, server={"token": TOKEN}).ask(method, path, **HTML)
    found = error_page(answer, status, "")
    assert found.links() == [], "links would lead to a 401"
    assert QUOTED_TOKEN not in answer.body.decode()
    assert TOKEN not in f"{answer.headers}"


def test_error_for_an_unreadable_request_is_not_a_page(serve: Serve) -> None:
    answer = serve({}).raw(b"GET / HTTP/9.9\r\nAccept: application/xhtml+xml\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 505 ")
    assert b"Content-Type: application/json" in answer
