"""A site whose streams streamlink finds with a plugin: real streamlink with an additional plugin.

The plugin reads a page and an API of the site in the same way as streamlink's own plugins do.  The
sites of those plugins are out of reach for tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlink.session.session import Streamlink

import pipe
from tests import media
from tests.origin import Origin, Playlist, Status, master
from tests.server import Site

Serve = Callable[..., Site]

PLUGIN = """
import re
from streamlink.plugin import Plugin, pluginmatcher
from streamlink.plugin.api import validate
from streamlink.stream.hls import HLSStream

@pluginmatcher(re.compile(r"http://127\\.0\\.0\\.1:\\d+/site/"))
class Site(Plugin):
    def _get_streams(self):
        page = self.session.http.get(self.url, schema=validate.Schema(
            re.compile(r"data-api='([^']+)'"), validate.none_or_all(validate.get(1), validate.url())
        ))
        address = self.session.http.get(page, params={"client": "tv"}, schema=validate.Schema(
            validate.parse_json(), {"hls": validate.url()}, validate.get("hls")
        ))
        return HLSStream.parse_variant_playlist(self.session, address)

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
    facts = json.dumps({"hls": variants.url})
    api = origin.add_file("/api", facts.encode(), content_type="application/json")
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
