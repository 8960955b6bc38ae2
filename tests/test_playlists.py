"""What origins do with playlists and keys, and what is said of it: redirects, pages, DRM, gaps.

Everything is real and seen from outside. Time is shortened where its length is not the matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import media
from tests.origin import Origin, Playlist, Status, Tokens
from tests.server import Site

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(12)
LOGIN = "/login/news.m3u8"


def news(name: str = "news", **more: object) -> Playlist:
    return Playlist(name, SEGMENTS, mode="live", **more)  # type: ignore[arg-type]


def reason(site: Site, path: str = "/news") -> tuple[int, str]:
    """How a start fails."""
    answer = site.get(path)
    return answer.status, answer.json["error"]


#### Redirects ####


@pytest.mark.parametrize("uses", [1, 3])
def test_token_in_a_redirect_is_asked_for_anew(origin: Origin, serve: Serve, uses: int) -> None:
    """The address is good for a few requests: nothing is opened again, and nothing is lost."""
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


def test_refused_target_is_not_asked_again(origin: Origin, serve: Serve) -> None:
    """Panels ban who collects refusals: after the first, the address itself is asked."""
    live = origin.add(news())
    tokens = Tokens(live.path)
    origin.fault(LOGIN, tokens, times=None)
    origin.fault(live.path, tokens, times=None)
    viewer = serve({"news": origin.url + LOGIN}).watch("/news")
    viewer.read(len(live.plain(2, 5)))
    for number in range(5, 8):
        live.advance()
        viewer.read(len(live.plain(number, number + 1)))
    assert [r.status for r in origin.requests if r.path.startswith(live.path)].count(403) == 1


def test_answer_of_the_address_decides(origin: Origin, serve: Serve) -> None:
    """Only where the address itself refuses, it is resolved anew."""
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
