"""A site whose streams streamlink finds with a plugin: real streamlink with an additional plugin.

The plugin reads a page and an API of the site in the same way as streamlink's own plugins do.  The
sites of those plugins are out of reach for tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from streamlink.session.session import Streamlink

import pipe
from tests import media
from tests.origin import Break, Origin, Playlist, Status, master
from tests.server import Site

Serve = Callable[..., Site]

PLUGIN = """
import re
from streamlink.plugin import Plugin, pluginmatcher
from streamlink.plugin.api import validate
from streamlink.stream.ffmpegmux import MuxedStream
from streamlink.stream.hls import HLSStream
from streamlink.stream.http import HTTPStream

@pluginmatcher(re.compile(r"http://127\\.0\\.0\\.1:\\d+/site/"))
class Site(Plugin):
    def _get_streams(self):
        page = self.session.http.get(self.url, schema=validate.Schema(
            re.compile(r"data-api='([^']+)'"), validate.none_or_all(validate.get(1), validate.url())
        ))
        found = self.session.http.get(page, params={"client": "tv"}, schema=validate.Schema(
            validate.parse_json(), validate.any(
                {"hls": validate.url()}, {"picture": validate.url(), "sound": validate.url()}
            )
        ))
        if "hls" in found:
            return HLSStream.parse_variant_playlist(self.session, found["hls"])
        picture = HTTPStream(self.session, found["picture"])
        sound = HTTPStream(self.session, found["sound"])
        return {"1080p": MuxedStream(self.session, picture, sound)}

__plugin__ = Site
"""


@pytest.fixture(autouse=True)
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the plugin to each new session."""
    (tmp_path / "examplesite.py").write_text(PLUGIN, encoding="utf-8")

    class WithPlugin(Streamlink):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.plugins.load_path(tmp_path)

    monkeypatch.setattr(pipe, "Streamlink", WithPlugin)


def page_of(origin: Origin, playlist: Playlist) -> str:
    """The address of a page whose API names this playlist."""
    variants = origin.add(master(f"{playlist.name}-all", {"720p": playlist}))
    return add_page(origin, {"hls": variants.url})


def page_of_bodies(origin: Origin) -> str:
    """The address of a page whose API names the picture and the sound of a film of 8 s."""
    picture = origin.add_file("/picture.ts", b"".join(media.video_only_segments()))
    sound = origin.add_file("/sound.ts", b"".join(media.audio_only_segments()))
    return add_page(origin, {"picture": picture, "sound": sound})


def add_page(origin: Origin, facts: Mapping[str, str]) -> str:
    """Add a page, and an API that states these facts; the result is the page's address."""
    api = origin.add_file("/api", json.dumps(facts).encode(), content_type="application/json")
    page = f"<div data-api='{api}'></div>".encode()
    return origin.add_file("/site/news", page, content_type="text/html")


def test_stream_found_by_a_plugin_plays(origin: Origin, serve: Serve) -> None:
    film = Playlist("film", media.ts_segments())
    answer = serve({"news": page_of(origin, film)}).get("/news")
    assert answer.body == film.plain(0, 8)
    assert answer.is_complete


def test_page_is_read_again_when_the_stream_address_expires(origin: Origin, serve: Serve) -> None:
    old = Playlist("old", media.ts_segments(), mode="live")
    new = Playlist("new", media.ts_segments(), mode="live")
    viewer = serve({"news": page_of(origin, old)}, reconnect=20).watch("/news")
    got = viewer.read(len(old.plain(2, 5)))
    page_of(origin, new)
    origin.fault("/old/*", Status(403), times=None)
    new.advance(1)
    new.end()
    rest, is_complete = viewer.read_all()
    assert got + rest == new.plain(2, 6), "nothing may be lost or repeated"
    assert is_complete
    assert origin.count("/site/news") == 2


#### Films whose picture and sound are separate files ####


def assert_is_the_film(body: bytes) -> None:
    """`body` has every picture and all the sound of the film, once."""
    film = media.decode(b"".join(media.ts_segments()))
    decoded = media.decode(body)
    assert len(decoded.video) == len(film.video)
    assert abs(len(decoded.audio) - len(film.audio)) <= 2


def test_film_of_two_files_plays_once(origin: Origin, serve: Serve) -> None:
    site = serve({"film": page_of_bodies(origin)}, reconnect=2)
    answer = site.get("/film")
    assert answer.is_complete
    assert_is_the_film(answer.body)
    assert origin.count("/picture.ts") == origin.count("/sound.ts") == 1


@pytest.mark.parametrize("path", ["/picture.ts", "/sound.ts"])
def test_film_of_two_files_survives_a_break(origin: Origin, serve: Serve, path: str) -> None:
    site = serve({"film": page_of_bodies(origin)})
    origin.fault(path, Break(40_000))
    answer = site.get("/film")
    assert answer.is_complete
    assert_is_the_film(answer.body)
    assert origin.count(path) == 2


@pytest.mark.parametrize(("path", "size"), [("/picture.ts", 200_000), ("/sound.ts", 60_000)])
def test_film_of_two_files_does_not_begin_again(
    origin: Origin, serve: Serve, path: str, size: int
) -> None:
    """The rest of a file is gone: viewers get the beginning only once."""
    site = serve({"film": page_of_bodies(origin)}, timeout=2, reconnect=3)
    origin.fault(path, Break(size))
    origin.fault(path, Status(404), times=None)
    viewer = site.watch("/film")
    body, is_complete = viewer.read_all()
    assert not is_complete
    pictures = media.decode(body, strict=False).video
    assert list(pictures) == sorted(set(pictures))
    assert 0 < len(pictures) < len(media.decode(b"".join(media.ts_segments())).video)
