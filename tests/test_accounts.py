"""Accounts: the streams of one playlist share its connections.

Panels, server and players are real.  Other members of the household are other loopback addresses.
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
    """A panel that allows one connection and refuses a second one with 458."""
    origin.rate = 2_000_000
    return Panel(origin, name, source=raw, **{"connections": 1, **habits})


def household(serve: Serve, *panels: Panel, **settings: Any) -> Site:
    """A server with the list of each panel, merged; `settings` are more of its options.

    `limit` is each account's, `streams` are more streams.
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
    """A player that has media."""
    with Player(site, path, source) as player:
        player.read_media()
        yield player


def refusal(site: Site, path: str, words: str = FULL) -> None:
    """Assert that another member of the household is refused, and told why."""
    with site.watch(path) as viewer:
        assert viewer.status == 503, "or its answer has no end"
        assert int(viewer.headers["Retry-After"]) > 0
        assert json.loads(viewer.read_all()[0]) == {"error": words}


def reload(site: Site, limit: int, **server: Any) -> None:
    """Another limit of every account, as SIGHUP uses it."""
    playlists = {
        name: replace(found, max_upstreams=limit) for name, found in site.config.playlists.items()
    }
    settings = replace(site.config.server, **server)
    site.server.reload(replace(site.config, playlists=playlists, server=settings))


#### Zapping ####


def zap(site: Site, count: int) -> list[float]:
    """Seconds until the first media of each of so many channels, one after the other."""
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


def test_channel_that_was_left_is_closed_before_the_next_one_opens(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panel never has two connections, also if the thread that closes one takes a while."""
    may_end = delay_closing(monkeypatch)
    site = household(serve, panel(origin, connections=0))
    with watching(site, "/bbc-one"):
        pass
    with watching(site, "/arte"):
        origin.wait_connections(1)
    may_end.set()


@pytest.mark.long
def test_player_zaps_twenty_times_in_good_time(origin: Origin, serve: Serve) -> None:
    """The panel counts a connection for a moment after it was closed, whatever host it went to."""
    hosts = ("127.0.0.1", "localhost")
    tv = panel(origin, redirects=True, lag=0.3, hosts=hosts)
    site = household(serve, tv)
    assert max(zap(site, 20)) < 1.5
    assert any(request.status == 458 for request in origin.requests), "it was not too easy"


def test_player_asks_for_the_next_channel_before_it_leaves_the_last(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    site = household(serve, panel(origin))
    with watching(site, "/bbc-one") as old, Player(site, "/arte", SOURCES[0]) as new:
        eventually(lambda: waits_in_watch() == 1, "it waits for the slot")
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
        assert somebody_else.status == 503, "the polling client watches"


#### A second member of the household ####


@other_addresses
def test_second_viewer_is_told_what_is_playing(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, without a request to the panel; the channel that is playing stays open to all."""
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    tv = panel(origin)
    site = household(serve, tv)
    with watching(site, "/bbc-one"):
        refusal(site, "/arte")
        page = site.get("/arte", Accept="text/html,application/xhtml+xml")
        assert page.status == 503
        assert FULL in page.body.decode()
        assert site.get("/arte.m3u8").json == {"error": FULL}
        assert origin.count(tv.path(2)) == 0
        assert site.watch("/bbc-one").status == 200


@other_addresses
def test_refusal_names_everything_that_is_playing(origin: Origin, serve: Serve) -> None:
    titles = ["One", "Two", "Three", "Four", "Five", "Six"]
    site = household(serve, panel(origin, titles=titles, connections=0), limit=2)
    with watching(site, "/one"), watching(site, "/two"):
        words = "this account allows 2 connections: One and Two are playing"
        refusal(site, "/three", words)
        reload(site, 5)
        with watching(site, "/three"), watching(site, "/four"), watching(site, "/five"):
            words = "this account allows 5 connections: One, Two, Three and 2 more are playing"
            refusal(site, "/six", words)


@other_addresses
def test_viewer_of_another_account_does_not_wait(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that leaves its channel would not make room in the account that is full."""
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    own = relay(origin, "own")
    site = household(serve, panel(origin), streams={"own": own})
    with (
        watching(site, "/own", SOURCES[1]),
        watching(site, "/bbc-one"),
        Player(site, "/arte", SOURCES[1]) as player,
    ):
        assert player.status == 503


def test_account_without_a_limit(origin: Origin, serve: Serve) -> None:
    site = household(serve, panel(origin, connections=0), limit=0)
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(watching(site, f"/{name}"))


def test_stream_of_the_file_shares_the_account(origin: Origin, serve: Serve) -> None:
    """Its address has the panel's host and port, and the user in its path."""
    tv = panel(origin)
    own = origin.url + tv.path(2)
    site = household(serve, tv, streams={"own": {"url": own}})
    with watching(site, "/bbc-one"):
        refusal(site, "/own")


def test_stream_of_another_user_has_its_own_account(origin: Origin, serve: Serve) -> None:
    other = panel(origin, "other", user="grace.h")
    streams = {"own": {"url": origin.url + other.path(0)}}
    site = household(serve, panel(origin), streams=streams)
    with watching(site, "/bbc-one"), watching(site, "/own"):
        refusal(site, "/arte")


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
            refusal(site, path, words)
    eventually(lambda: site.watch("/film").status == 200, "the slot is free again")


#### Who gives way ####


def test_lingering_channel_of_the_account_gives_way(origin: Origin, serve: Serve) -> None:
    """Not one of another account, however long it has been idle."""
    site = household(serve, panel(origin), streams={"own": relay(origin, "own")})
    for name in ("own", "bbc-one"):
        with watching(site, f"/{name}"):
            pass
        eventually(lambda: site.get("/health").json["viewers"] == 0, f"{name} lingers")
    with watching(site, "/arte"):
        states = channel_states(site)
        assert (states["own"], states["bbc-one"], states["arte"]) == (["live"], [], ["live"])


@pytest.mark.parametrize("full", ["account", "server"])
def test_start_at_two_full_limits_closes_one_channel(
    origin: Origin, serve: Serve, full: str
) -> None:
    """The one that makes room under both limits, although others have been idle for longer."""
    server = {"max_upstreams": 2 if full == "server" else 3}
    site = household(serve, panel(origin), streams={"own": relay(origin, "own")}, server=server)
    for name in ("own", "bbc-one"):
        with watching(site, f"/{name}"):
            pass
        eventually(lambda: site.get("/health").json["viewers"] == 0, f"{name} lingers")
    with watching(site, "/arte"):
        assert channel_states(site)["own"] == ["live"]


def test_refused_start_closes_nothing(origin: Origin, serve: Serve) -> None:
    """A lingering channel of the account would not make room under the server's limit."""
    streams = {name: relay(origin, name) for name in ("a", "b")}
    site = household(serve, panel(origin), streams=streams)
    with watching(site, "/a"), watching(site, "/b"):
        with watching(site, "/bbc-one"):
            pass
        reload(site, 1, max_upstreams=2)
        refusal(site, "/arte", "there are too many upstreams")
        assert channel_states(site)["bbc-one"] == ["live"]


def test_all_channels_above_a_lowered_limit_give_way(origin: Origin, serve: Serve) -> None:
    streams = {name: relay(origin, name) for name in ("a", "b", "c")}
    site = household(serve, panel(origin), streams=streams)
    for name in streams:
        with watching(site, f"/{name}"):
            pass
        # The server may notice that two viewers left in another order than they did.
        eventually(lambda: site.get("/health").json["viewers"] == 0, "it lingers")
    reload(site, 1, max_upstreams=2)
    with watching(site, "/bbc-one"):
        states = channel_states(site)
        assert [states[name] for name in (*streams, "bbc-one")] == [[], [], ["live"], ["live"]]


#### Backups ####


def two_panels(origin: Origin, serve: Serve, **settings: Any) -> tuple[Panel, Panel, Site]:
    first, second = (panel(origin, name) for name in ("first", "second"))
    return first, second, household(serve, first, second, **settings)


@other_addresses
def test_backup_on_another_account_takes_over_at_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one"):
        with watching(site, "/arte", SOURCES[1]):
            assert (origin.count(first.path(2)), origin.count(second.path(2))) == (0, 1)
            refusal(site, "/rai-uno")
        with watching(site, "/rai-uno", SOURCES[1]):
            assert channel_states(site)["arte"] == [], "it lingered on the second account"


def test_first_account_is_used_once_its_viewer_has_left(origin: Origin, serve: Serve) -> None:
    """Nobody noticed yet that the viewer left: a backup is not needed for that."""
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one"):
        pass
    with watching(site, "/arte"):
        assert (origin.count(first.path(2)), origin.count(second.path(2))) == (1, 0)


def test_start_whose_backup_fails_is_refused_for_the_first_account(
    origin: Origin, serve: Serve
) -> None:
    """The refusal is not remembered: the slot may be free again any moment."""
    first, second, site = two_panels(origin, serve)
    origin.fault(second.path(2), Status(404))
    with watching(site, "/bbc-one"):
        refusal(site, "/arte")
    with watching(site, "/arte"):
        assert origin.count(first.path(2)) == 1


@other_addresses
def test_start_asks_the_busy_panel_again_if_the_backups_account_is_full(
    origin: Origin, serve: Serve
) -> None:
    """The panel still counts the connection that was just closed."""
    first, second, site = two_panels(origin, serve)
    with watching(site, "/bbc-one") as old, watching(site, "/rai-uno", SOURCES[1]):
        old.close()
        origin.fault(first.path(2), Status(458))
        with watching(site, "/arte"):
            assert (origin.count(first.path(2)), origin.count(second.path(2))) == (2, 0)


@other_addresses
def test_channel_that_moves_to_its_backup_gives_its_slot_back(origin: Origin, serve: Serve) -> None:
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
            refusal(site, "/rai-uno", words)


@other_addresses
def test_channel_whose_backups_account_is_full_waits_for_its_own(
    origin: Origin, serve: Serve
) -> None:
    """It says why, and it disturbs nobody."""
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
def test_reload_that_raises_the_limit(origin: Origin, serve: Serve) -> None:
    site = household(serve, panel(origin, connections=0))
    with watching(site, "/bbc-one"):
        refusal(site, "/arte")
        reload(site, 2)
        with watching(site, "/arte", SOURCES[1]):
            words = "this account allows 2 connections: BBC One and Arte are playing"
            refusal(site, "/rai-uno", words)


@other_addresses
def test_reload_that_lowers_the_limit_disturbs_nobody(origin: Origin, serve: Serve) -> None:
    site = household(serve, panel(origin, connections=0), limit=2)
    with watching(site, "/bbc-one") as first:
        with watching(site, "/arte", SOURCES[1]) as second:
            reload(site, 1)
            first.read_some()
            second.read_some()
            words = "this account allows 1 connection: BBC One and Arte are playing"
            refusal(site, "/rai-uno", words)
        eventually(lambda: site.get("/health").json["viewers"] == 1, "one has left")
        refusal(site, "/rai-uno")
        assert channel_states(site)["bbc-one"] == ["live"]
    with watching(site, "/rai-uno"):
        states = channel_states(site)
        assert (states["bbc-one"], states["arte"], states["rai-uno"]) == ([], [], ["live"])


@other_addresses
def test_reload_that_gives_a_running_stream_an_account(origin: Origin, serve: Serve) -> None:
    tv = panel(origin)
    config = {"own": {"url": origin.url + tv.path(0), "title": "BBC One"}}
    site = serve(config, linger=600)
    with watching(site, "/own"):
        playlist = pipe.PlaylistSettings("panel", tv.url)
        site.server.reload(replace(site.config, playlists={"panel": playlist}))
        eventually(lambda: len(site.server.config.streams) == 5, "the list is loaded")
        refusal(site, "/arte")
