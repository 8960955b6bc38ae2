"""Accounts: the streams of one playlist share its connections.

Panels, server and players are real.  Each member of the household has its own loopback address.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Break, Origin, Panel, Playlist, Stall, StallHeaders, Status
from tests.program import eventually
from tests.server import Site
from tests.test_limits import channel_states
from tests.test_zapping import (
    LONG,
    SOURCES,
    Player,
    delay_closing,
    other_addresses,
    relay,
    waits_in_watch,
)

Serve = Callable[..., Site]

NAMES = ("bbc-one", "sky-news-hd", "arte", "rai-uno")
FULL = "this account allows 1 connection: BBC One is playing"


def raw() -> Iterable[bytes]:
    return itertools.cycle(media.ts_segments())


def panel(origin: Origin, name: str = "panel", **habits: Any) -> Panel:
    """A panel that by default allows one connection, and refuses a second one with 458."""
    origin.rate = 2_000_000
    return Panel(origin, name, source=raw, **{"connections": 1, **habits})


def household(serve: Serve, *panels: Panel, **settings: Any) -> Site:
    """A server that merges the lists of these panels.

    `limit` is the limit of each account, and `streams` are further streams; the other settings are
    options of the server.
    """
    limit = settings.pop("limit", 1)
    streams = settings.pop("streams", {})
    lists = {each.name: {"url": each.url, "merge": True, "max_upstreams": limit} for each in panels}
    site = serve(streams, playlists=lists, **{"linger": 600, **settings})
    count = sum(len(each.titles) for each in panels[:1]) + len(streams)
    eventually(lambda: len(site.server.config.streams) == count, "the lists are loaded")
    return site


@contextlib.contextmanager
def watching(site: Site, path: str, source: str = SOURCES[0]) -> Iterator[Player]:
    """A player that has received media."""
    with Player(site, path, source) as player:
        player.read_media()
        yield player


def assert_refused(site: Site, path: str, words: str = FULL) -> None:
    """Check that another member of the household is refused, with these words as the reason."""
    with site.watch(path) as viewer:
        assert viewer.status == 503, "any other answer may be endless"
        assert int(viewer.headers["Retry-After"]) > 0
        assert json.loads(viewer.read_all()[0]) == {"error": words}


def reload(site: Site, limit: int, **server: Any) -> None:
    """Reload with another limit for every account, as SIGHUP does."""
    playlists = {
        name: replace(found, max_upstreams=limit) for name, found in site.config.playlists.items()
    }
    settings = replace(site.config.server, **server)
    site.server.reload(replace(site.config, playlists=playlists, server=settings))


#### Zapping ####


def zap(site: Site, count: int) -> list[float]:
    """Play `count` channels in turn; returns the seconds until the first media of each."""
    seconds = []
    for name in itertools.islice(itertools.cycle(NAMES), count):
        began = time.monotonic()
        with Player(site, f"/{name}") as player:
            player.read_media()
            seconds.append(time.monotonic() - began)
    return seconds


@pytest.mark.parametrize("redirects", [False, True])
def test_player_zaps_with_one_connection(origin: Origin, serve: Serve, redirects: bool) -> None:
    site = household(serve, panel(origin, redirects=redirects))
    zap(site, 4)
    states = channel_states(site)
    assert [states[name] for name in NAMES] == [[], [], [], ["live"]]


def test_abandoned_channel_is_closed_before_the_next_one_opens(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panel never has two connections, even if the thread that closes one is slow."""
    may_end = delay_closing(monkeypatch)
    site = household(serve, panel(origin, connections=0))
    with watching(site, "/bbc-one"):
        pass
    with watching(site, "/arte"):
        origin.wait_connections(1)
    may_end.set()


@pytest.mark.long
def test_player_can_zap_quickly_twenty_times(origin: Origin, serve: Serve) -> None:
    """The panel counts each connection for a moment after it was closed, on all of its hosts."""
    hosts = ("127.0.0.1", "localhost")
    tv = panel(origin, redirects=True, lag=0.3, hosts=hosts)
    site = household(serve, tv)
    assert max(zap(site, 20)) < 1.5
    assert any(request.status == 458 for request in origin.requests), (
        "the panel refused at least one"
    )


def test_player_may_request_the_next_channel_before_it_leaves_the_last(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    site = household(serve, panel(origin))
    with watching(site, "/bbc-one") as old, Player(site, "/arte", SOURCES[0]) as new:
        eventually(lambda: waits_in_watch() == 1, "the new player waits for the slot")
        old.close()
        new.read_media()


@other_addresses
def test_browser_zaps_with_one_connection(origin: Origin, serve: Serve) -> None:
    """A polling client has left its channel when it requests another one."""
    text = "#EXTM3U\n"
    for name in ("One", "Two"):
        playlist = origin.add(Playlist(name, media.ts_segments(), mode="live", clock=True))
        text += f"#EXTINF:-1,{name}\n{playlist.url}\n"
    origin.add_file("/list.m3u", text.encode())
    site = serve({}, playlists={"tv": f"{origin.url}/list.m3u"}, linger=600)
    eventually(lambda: len(site.server.config.streams) == 2, "the list is loaded")
    for name in ("one", "two", "one"):
        assert site.get(f"/{name}.m3u8").status == 200
    assert channel_states(site) == {"one": ["live"], "two": []}
    with Player(site, "/two", SOURCES[1]) as somebody_else:
        assert somebody_else.status == 503, "the polling client still occupies the slot"


#### A second member of the household ####


@other_addresses
def test_refusal_says_which_channel_is_playing(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is immediate and sends no request to the panel.

    The channel that is playing remains open to everyone.
    """
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    tv = panel(origin)
    site = household(serve, tv)
    with watching(site, "/bbc-one"):
        assert_refused(site, "/arte")
        page = site.get("/arte", Accept="text/html,application/xhtml+xml")
        assert page.status == 503
        assert FULL in page.body.decode()
        assert site.get("/arte.m3u8").json == {"error": FULL}
        assert origin.count(tv.path(2)) == 0
        assert site.watch("/bbc-one").status == 200


@other_addresses
def test_refusal_names_all_channels_that_are_playing(origin: Origin, serve: Serve) -> None:
    titles = ["One", "Two", "Three", "Four", "Five", "Six"]
    site = household(serve, panel(origin, titles=titles, connections=0), limit=2)
    with watching(site, "/one"), watching(site, "/two"):
        words = "this account allows 2 connections: One and Two are playing"
        assert_refused(site, "/three", words)
        reload(site, 5)
        with watching(site, "/three"), watching(site, "/four"), watching(site, "/five"):
            words = "this account allows 5 connections: One, Two, Three and 2 more are playing"
            assert_refused(site, "/six", words)


@other_addresses
def test_viewer_of_another_account_does_not_wait(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel that the client leaves would not make room in the full account."""
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    own = relay(origin, "own")
    site = household(serve, panel(origin), streams={"own": own})
    with (
        watching(site, "/own", SOURCES[1]),
        watching(site, "/bbc-one"),
        Player(site, "/arte", SOURCES[1]) as player,
    ):
        assert player.status == 503


def test_account_may_have_no_limit(origin: Origin, serve: Serve) -> None:
    site = household(serve, panel(origin, connections=0), limit=0)
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(watching(site, f"/{name}"))


def test_configured_stream_shares_the_account(origin: Origin, serve: Serve) -> None:
    """Its address has the host, the port and the user of the panel's account."""
    tv = panel(origin)
    own = origin.url + tv.path(2)
    site = household(serve, tv, streams={"own": {"url": own}})
    with watching(site, "/bbc-one"):
        assert_refused(site, "/own")


def test_stream_of_another_user_has_its_own_account(origin: Origin, serve: Serve) -> None:
    other = panel(origin, "other", user="grace.h")
    streams = {"own": {"url": origin.url + other.path(0)}}
    site = household(serve, panel(origin), streams=streams)
    with watching(site, "/bbc-one"), watching(site, "/own"):
        assert_refused(site, "/arte")


def test_each_viewer_of_a_film_takes_a_slot(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", 0.1)
    film = origin.add(Playlist("film", media.ts_segments()))
    origin.fault(film.segment_path(2), Stall(1000), times=None)
    text = f"#EXTM3U\n#EXTINF:-1,Film\n{film.url}\n#EXTINF:-1,Other\n{relay(origin, 'other')}\n"
    origin.add_file("/list.m3u", text.encode())
    site = serve({}, playlists={"tv": f"{origin.url}/list.m3u"})
    eventually(lambda: len(site.server.config.streams) == 2, "the list is loaded")
    with site.watch("/film") as viewer:
        assert viewer.read(media.PACKET)[:1] == b"G"
        for path in ("/film", "/other"):
            words = "this account allows 1 connection: Film is playing"
            assert_refused(site, path, words)
    eventually(lambda: site.watch("/film").status == 200, "the slot is free again")


#### Channels that give way ####


def test_lingering_channel_of_the_account_gives_way(origin: Origin, serve: Serve) -> None:
    """A channel of another account does not, however long it has been idle."""
    site = household(serve, panel(origin), streams={"own": relay(origin, "own")})
    for name in ("own", "bbc-one"):
        with watching(site, f"/{name}"):
            pass
        eventually(lambda: site.get("/health").json["viewers"] == 0, f"{name} lingers")
    with watching(site, "/arte"):
        states = channel_states(site)
        assert (states["own"], states["bbc-one"], states["arte"]) == (["live"], [], ["live"])


@pytest.mark.parametrize("full", ["account", "server"])
def test_start_at_two_reached_limits_closes_one_channel(
    origin: Origin, serve: Serve, full: str
) -> None:
    """It closes the channel that makes room under both limits, even if another was idle longer."""
    server = {"max_upstreams": 2 if full == "server" else 3}
    site = household(serve, panel(origin), streams={"own": relay(origin, "own")}, server=server)
    for name in ("own", "bbc-one"):
        with watching(site, f"/{name}"):
            pass
        eventually(lambda: site.get("/health").json["viewers"] == 0, f"{name} lingers")
    with watching(site, "/arte"):
        assert channel_states(site)["own"] == ["live"]


def test_refused_start_closes_nothing(origin: Origin, serve: Serve) -> None:
    """Closing the account's lingering channel would not make room under the server's limit."""
    streams = {name: relay(origin, name) for name in ("a", "b")}
    site = household(serve, panel(origin), streams=streams)
    with watching(site, "/a"), watching(site, "/b"):
        with watching(site, "/bbc-one"):
            pass
        reload(site, 1, max_upstreams=2)
        assert_refused(site, "/arte", "there are too many upstreams")
        assert channel_states(site)["bbc-one"] == ["live"]


def test_all_channels_above_a_lowered_limit_give_way(origin: Origin, serve: Serve) -> None:
    streams = {name: relay(origin, name) for name in ("a", "b", "c")}
    site = household(serve, panel(origin), streams=streams)
    for name in streams:
        with watching(site, f"/{name}"):
            pass
        # Otherwise the server may notice the departures of viewers in a different order.
        eventually(lambda: site.get("/health").json["viewers"] == 0, "the channel lingers")
    reload(site, 1, max_upstreams=2)
    with watching(site, "/bbc-one"):
        states = channel_states(site)
        assert [states[name] for name in (*streams, "bbc-one")] == [[], [], ["live"], ["live"]]


#### Backups ####


def two_panels(origin: Origin, serve: Serve, **settings: Any) -> tuple[Panel, Panel, Site]:
    first, second = (panel(origin, name) for name in ("first", "second"))
    return first, second, household(serve, first, second, **settings)


@other_addresses
def test_backup_on_another_account_is_used_at_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one"):
        with watching(site, "/arte", SOURCES[1]):
            assert (origin.count(first.path(2)), origin.count(second.path(2))) == (0, 1)
            assert_refused(site, "/rai-uno")
        with watching(site, "/rai-uno", SOURCES[1]):
            assert channel_states(site)["arte"] == [], "arte lingered on the second account"


def test_first_account_is_used_again_after_its_viewer_has_left(
    origin: Origin, serve: Serve
) -> None:
    """The server has not noticed yet that the viewer left, but must not use a backup."""
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one"):
        pass
    with watching(site, "/arte"):
        assert (origin.count(first.path(2)), origin.count(second.path(2))) == (1, 0)


def test_start_whose_backup_fails_is_refused_because_of_the_first_account(
    origin: Origin, serve: Serve
) -> None:
    """The refusal is not remembered, because the slot may become free at any moment."""
    first, second, site = two_panels(origin, serve)
    origin.fault(second.path(2), Status(404))
    with watching(site, "/bbc-one"):
        assert_refused(site, "/arte")
    with watching(site, "/arte"):
        assert origin.count(first.path(2)) == 1


@other_addresses
def test_start_retries_the_busy_panel_if_the_backup_account_is_full(
    origin: Origin, serve: Serve
) -> None:
    """The panel may still count the connection that was just closed."""
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one") as old, watching(site, "/rai-uno", SOURCES[1]):
        old.close()
        origin.fault(first.path(2), Status(458))
        with watching(site, "/arte"):
            assert (origin.count(first.path(2)), origin.count(second.path(2))) == (2, 0)


@other_addresses
def test_channel_that_switches_to_its_backup_releases_its_slot(
    origin: Origin, serve: Serve
) -> None:
    first, second, site = two_panels(origin, serve)
    origin.fault(first.path(0), Break(1_000_000))
    gone = origin.fault(first.path(0), Status(404), times=None)
    with watching(site, "/bbc-one") as player:
        while origin.count(second.path(0)) == 0:
            player.read_some()
        gone.clear()
        with watching(site, "/arte", SOURCES[1]):
            assert (origin.count(first.path(2)), origin.count(second.path(2))) == (1, 0)
            words = "this account allows 1 connection: Arte is playing"
            assert_refused(site, "/rai-uno", words)


@other_addresses
def test_channel_waits_for_its_own_account_if_the_backup_account_is_full(
    origin: Origin, serve: Serve
) -> None:
    """The status shows the reason, and the other channel is not disturbed."""
    first, second, site = two_panels(origin, serve)
    origin.fault(first.path(0), Break(1_000_000))
    hanging = origin.fault(first.path(0), StallHeaders())
    with watching(site, "/bbc-one"), watching(site, "/arte", SOURCES[1]) as other:
        assert origin.count(second.path(2)) == 1
        hanging.wait_held()
        words = "this account allows 1 connection: Arte is playing"
        assert site.get("/status?stream=bbc-one").json["streams"][0]["last_error"] == words
        hanging.release()
        other.read_some()
        assert origin.count(second.path(0)) == 0
        assert channel_states(site)["arte"] == ["live"]


#### A reload ####


@other_addresses
def test_reload_can_raise_the_limit(origin: Origin, serve: Serve) -> None:
    site = household(serve, panel(origin, connections=0))
    with watching(site, "/bbc-one"):
        assert_refused(site, "/arte")
        reload(site, 2)
        with watching(site, "/arte", SOURCES[1]):
            words = "this account allows 2 connections: BBC One and Arte are playing"
            assert_refused(site, "/rai-uno", words)


@other_addresses
def test_reload_that_lowers_the_limit_does_not_disturb_viewers(
    origin: Origin, serve: Serve
) -> None:
    site = household(serve, panel(origin, connections=0), limit=2)
    with watching(site, "/bbc-one") as first:
        with watching(site, "/arte", SOURCES[1]) as second:
            reload(site, 1)
            first.read_some()
            second.read_some()
            words = "this account allows 1 connection: BBC One and Arte are playing"
            assert_refused(site, "/rai-uno", words)
        eventually(lambda: site.get("/health").json["viewers"] == 1, "the second viewer has left")
        assert_refused(site, "/rai-uno")
        assert channel_states(site)["bbc-one"] == ["live"]
    with watching(site, "/rai-uno"):
        states = channel_states(site)
        assert (states["bbc-one"], states["arte"], states["rai-uno"]) == ([], [], ["live"])


@other_addresses
def test_reload_can_give_a_running_stream_an_account(origin: Origin, serve: Serve) -> None:
    tv = panel(origin)
    config = {"own": {"url": origin.url + tv.path(0), "title": "BBC One"}}
    site = serve(config, linger=600)
    with watching(site, "/own"):
        playlist = pipe.PlaylistSettings("panel", tv.url)
        site.server.reload(replace(site.config, playlists={"panel": playlist}))
        eventually(lambda: len(site.server.config.streams) == 5, "the list is loaded")
        assert_refused(site, "/arte")
