"""What an operator learns of a running server; server, origin, signals and sockets are real."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist, Status
from tests.program import Service, eventually
from tests.server import BROWSER, Site

Serve = Callable[..., Site]
SEGMENTS = 30  # of one timeline, a second each


def live(origin: Origin, name: str = "news", **options: Any) -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(SEGMENTS), mode="live", **options))


def states(site: Site) -> dict[str, str]:
    """The state of each stream, as /status has it."""
    return {each["stream"]: each["state"] for each in site.get("/status").json["streams"]}


#### A reload ####


def reload(site: Site, config: pipe.Config) -> None:
    """As SIGHUP does once the file is read."""
    pipe.reload(site.server, lambda: config)


def test_reload_of_an_unchanged_file_keeps_every_failure(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 1000.0)
    broken = origin.fault("/broken.m3u8", Status(404), times=None)
    news = live(origin)
    two = [f"{origin.url}/broken.m3u8", news.url]
    site = serve({"broken": two[0], "news": {"url": two}, "idle": two[0]}, linger=0)
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
    assert site.get("/broken").status == 502
    eventually(lambda: states(site)["news"] == "idle", "the channel closes")
    assert broken.taken == 2
    reload(site, copy.deepcopy(site.config))
    assert states(site) == {"broken": "failed", "news": "idle", "idle": "idle"}
    (report, *_) = site.get("/status").json["streams"]
    assert report["last_error"] == "the origin answered 404"
    assert "the origin answered 404" in site.get("/", Accept=BROWSER).body.decode()
    assert site.get("/broken").status == 502
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
    assert broken.taken == 2, "the failed start is remembered, and the failed address is tried last"


def test_reload_forgets_the_failures_of_a_changed_stream_alone(
    origin: Origin, serve: Serve
) -> None:
    origin.fault("/*.m3u8", Status(503), times=None)
    site = serve({name: f"{origin.url}/{name}.m3u8" for name in ("same", "other")})
    for path in ("/same", "/other"):
        assert site.get(path).status == 502
    other = replace(site.config.streams["other"], quality="worst")
    reload(site, replace(site.config, streams={**site.config.streams, "other": other}))
    assert states(site) == {"same": "failed", "other": "idle"}


def test_new_channel_list_keeps_the_failures_of_unchanged_streams(
    origin: Origin, serve: Serve
) -> None:
    def add_list(*names: str) -> str:
        lines = [f"#EXTINF:-1,{name}\n{origin.url}/{name}.m3u8\n" for name in names]
        text = "#EXTM3U\n" + "".join(lines)
        return origin.add_file("/list.m3u", text.encode(), content_type="audio/x-mpegurl")

    origin.fault("/one.m3u8", Status(503), times=None)
    site = serve({}, playlists={"tv": add_list("one")})
    eventually(lambda: states(site) == {"one": "idle"}, "the list is loaded")
    assert site.get("/one").status == 502
    add_list("one", "two")
    reload(site, site.config)
    eventually(lambda: "two" in states(site), "the new list is loaded")
    assert states(site) == {"one": "failed", "two": "idle"}


NEWS, SPORT = "http://origin.example/secret/news.m3u8", "http://origin.example/secret/sport.m3u8"
# Each file is loaded after the one before; the line says what is different.
FILES: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({"news": NEWS}, {}, "no change"),
    ({"news": NEWS, "sport": SPORT}, {}, "1 stream added"),
    ({"news": SPORT, "a": NEWS, "b": NEWS}, {"token": "s3cret"},
     "2 streams added, 1 removed, 1 changed, token changed"),
    ({"news": {"url": SPORT, "title": "News"}, "a": NEWS, "b": NEWS},
     {"token": "t0ken", "max_viewers": 9}, "1 stream with new details, max_viewers changed, "
     "token changed"),
    ({"news": SPORT}, {"token": "t0ken", "max_viewers": 9, "options": {"threads": 2}},
     "2 streams removed, 1 changed, threads changed"),
    ({"news": SPORT}, {"options": {"threads": 2}, "playlists": {"tv": "/nowhere/list.m3u"}},
     "1 playlist added, max_viewers changed, token changed"),
    ({"news": SPORT, "one": {"title": "One"}},
     {"options": {"threads": 2}, "playlists": {"tv": {"url": "/nowhere/list.m3u", "refresh": 9}}},
     "1 stream with new details, 1 playlist changed"),
]  # fmt: skip


def test_reload_says_what_changed(tmp_path: Path) -> None:
    with Service(tmp_path, {"news": NEWS}) as service:
        for number, (streams, more, words) in enumerate(FILES, 1):
            service.configure(streams, **more)
            service.send(signal.SIGHUP)
            service.wait_for_count("reloaded: ", number)
            (line,) = [line for line in service.lines if "reloaded: " in line][number - 1 :]
            assert line.rstrip().partition("reloaded: ")[2] == words
        assert "s3cret" not in "".join(service.lines)
