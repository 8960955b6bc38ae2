"""Zapping: players that switch channels quickly while one upstream or one viewer is allowed.

Everything is real; other households are other loopback addresses.  Tests replace time limits to
distinguish an immediate answer from one after a wait.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest
import yaml

import pipe
from tests import media
from tests.origin import (
    Multivariant,
    OneAtATime,
    Origin,
    Playlist,
    Stall,
    StallHeaders,
    Status,
    master,
)
from tests.program import eventually
from tests.server import TIMEOUT, Site, Watch
from tests.threads import Task

Serve = Callable[..., Site]

LONG = 1000.0  # seconds; no test waits as long
CHANNELS = ("a", "b", "c", "d", "e")
ONE = [{"max_upstreams": 1}, {"max_viewers": 1}]
SOURCES = ("127.0.0.2", "127.0.0.3") if sys.platform == "linux" else 2 * ("127.0.0.1",)
other_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="the other systems have one loopback address"
)


class Player:
    """A connection that requests a stream; the test decides how much of the answer it reads."""

    def __init__(self, site: Site, path: str, source: str = "127.0.0.1") -> None:
        self._sock = socket.create_connection(("127.0.0.1", site.port), TIMEOUT, (source, 0))
        self._sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        self._start = b""

    @property
    def status(self) -> int:
        """The status of its answer; waits for it."""
        while len(self._start) < 12:
            data = self._sock.recv(12 - len(self._start))
            assert data, "no answer"
            self._start += data
        return int(self._start[9:12])

    def read_media(self) -> None:
        """Read the first bytes of media; fails if there are none."""
        assert self.status == 200
        data = b""
        while not re.search(rb"\r\n\r\nG", data):
            more = self._sock.recv(4096)
            assert more, "the answer has no media"
            data += more

    def read_some(self) -> None:
        """Read more media, after read_media()."""
        assert self._sock.recv(65536), "the answer has ended"

    def say(self, more: bytes) -> None:
        """Send more bytes after its request."""
        self._sock.sendall(more)

    def finish_sending(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def relay(origin: Origin, name: str) -> str:
    return origin.add_endless(f"/{name}", lambda: itertools.cycle(media.ts_segments()))


def live(name: str) -> Playlist:
    return Playlist(name, media.ts_segments(), mode="live", clock=True)


def segmented(origin: Origin, name: str) -> str:
    return origin.add(live(name)).url


def household(
    origin: Origin, serve: Serve, kind: Callable[[Origin, str], str], **settings: object
) -> Site:
    """Five channels; `linger` is so long that no channel closes because of it."""
    origin.rate = 2_000_000
    return serve({name: kind(origin, name) for name in CHANNELS}, **{"linger": 600, **settings})


def watch(site: Site, path: str) -> Watch:
    """A viewer that has received the first packet."""
    viewer = site.watch(path)
    assert (viewer.status, viewer.read(media.PACKET)[:1]) == (200, b"G")
    return viewer


def viewers(site: Site) -> int:
    count = site.ask("GET", "/health").json["viewers"]
    assert isinstance(count, int)
    return count


def upstreams(site: Site) -> int:
    streams = site.get("/status").json["streams"]
    return sum(len(stream["channels"]) for stream in streams)


#### The same player requests the next channel ####


@pytest.mark.parametrize("limits", ONE, ids=lambda limits: next(iter(limits)))
@pytest.mark.parametrize("kind", [relay, segmented])
def test_channel_without_viewers_gives_way_to_the_next_one(
    origin: Origin, serve: Serve, kind: Callable[[Origin, str], str], limits: dict[str, int]
) -> None:
    site = household(origin, serve, kind, server=limits)
    statuses = []
    for number, name in enumerate(itertools.islice(itertools.cycle(CHANNELS), 10)):
        with Player(site, f"/{name}", SOURCES[number % 2]) as player:
            statuses.append(player.status)
            player.read_media()
    assert statuses == 10 * [200]


@pytest.mark.parametrize("limits", ONE, ids=lambda limits: next(iter(limits)))
def test_player_may_request_a_channel_before_it_leaves_the_last_one(
    origin: Origin, serve: Serve, limits: dict[str, int]
) -> None:
    """Players with a buffer close the old connection when the new one answers, or soon after."""
    site = household(origin, serve, relay, server=limits)
    current, statuses = Player(site, "/a"), []
    pause = threading.Event()
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(itertools.islice(itertools.cycle(CHANNELS), 1, 11)):
            stack.callback(current.close)
            current.read_media()
            following = Player(site, f"/{name}")
            stack.callback(following.close)
            pause.wait(0.1 + 0.02 * number)
            current.close()
            statuses.append(following.status)
            current = following
    assert statuses == 10 * [200]


@pytest.mark.parametrize("limits", ONE, ids=lambda limits: next(iter(limits)))
@pytest.mark.parametrize("fault", [StallHeaders(), Stall(100)], ids=["head", "body"])
def test_hanging_start_without_viewers_frees_its_place(
    origin: Origin,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    fault: StallHeaders | Stall,
) -> None:
    """Its departure is noticed when a place is needed, without waiting for START_TICK."""
    monkeypatch.setattr(pipe, "START_TICK", LONG)
    site = household(origin, serve, relay, server=limits)
    hanging = origin.fault("/a", fault)
    with Player(site, "/a"):
        hanging.wait_held()
    with Player(site, "/b") as player:
        player.read_media()
        assert viewers(site) == 1
    hanging.release()


def test_health_does_not_count_viewers_that_left_a_start(origin: Origin, serve: Serve) -> None:
    site = household(origin, serve, relay, timeout=600)
    hanging = origin.fault("/a", StallHeaders())
    with Player(site, "/a"):
        hanging.wait_held()
        assert viewers(site) == 1
    eventually(lambda: viewers(site) == 0, "the viewer that left is not counted")
    hanging.release()


@other_addresses
@pytest.mark.parametrize("limits", ONE, ids=lambda limits: next(iter(limits)))
def test_place_that_another_household_holds_is_refused_at_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    site = household(origin, serve, relay, server=limits)
    with Player(site, "/a", "127.0.0.2") as somebody:
        somebody.read_media()
        with Player(site, "/b", "127.0.0.3") as player:
            assert player.status == 503
        with Player(site, "/b", "127.0.0.2") as waiting:
            eventually(lambda: waits_in_watch() == 1, "a player of the same household waits")
            with Player(site, "/b", "127.0.0.3") as player:
                assert player.status == 503, "a waiting player holds no place"
            somebody.close()
            assert waiting.status == 200


def waits_in_watch() -> int:
    """The number of threads that wait for a place."""
    stacks = [
        {frame.f_code.co_name for frame, _ in traceback.walk_stack(frame)}
        for frame in sys._current_frames().values()
    ]
    return sum("watch" in names and "_await_start" not in names for names in stacks)


def test_player_that_leaves_while_it_waits_for_a_place_takes_none(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ZAPPING_TIME", LONG)
    site = household(origin, serve, relay, server={"max_upstreams": 1})
    with Player(site, "/a") as player:
        player.read_media()
        with Player(site, "/b"):
            eventually(lambda: waits_in_watch() == 1, "the player waits")
        eventually(lambda: waits_in_watch() == 0, "the player is gone")
    with Player(site, "/c") as player:
        player.read_media()
    assert origin.count("/b") == 0


def test_player_waits_two_seconds_at_most_for_a_place(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.ZAPPING_TIME == 2.0
    monkeypatch.setattr(pipe, "ZAPPING_TIME", 0.2)
    site = household(origin, serve, relay, server={"max_upstreams": 1})
    with Player(site, "/a") as player:
        player.read_media()
        with Player(site, "/b") as second:
            assert second.status == 503


def delay_closing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Delay the end of channels, as on a busy machine, until the event is set."""
    may_end, close = threading.Event(), pipe.Channel._close_upstream
    monkeypatch.setattr(
        pipe.Channel, "_close_upstream", lambda channel: may_end.wait(TIMEOUT) and close(channel)
    )
    return may_end


@pytest.mark.parametrize("linger", [0, 600])
def test_connection_of_an_abandoned_channel_closes_before_the_next_one_opens(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, linger: int
) -> None:
    """A provider that allows one connection would refuse the second one."""
    may_end = delay_closing(monkeypatch)
    site = household(origin, serve, relay, server={"max_upstreams": 1}, linger=linger)
    with Player(site, "/a") as player:
        player.read_media()
    if linger == 0:
        eventually(lambda: upstreams(site) == 0, "the channel is closed")
    with Player(site, "/b") as player:
        player.read_media()
        origin.wait_connections(1)
    may_end.set()


#### Odd players ####


@pytest.mark.parametrize("linger", [0, 0.05])
def test_channel_can_be_requested_again_while_it_closes(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, linger: float
) -> None:
    may_end = delay_closing(monkeypatch)
    site = household(origin, serve, relay, server={"max_upstreams": 1}, linger=linger)
    for _ in range(5):
        with Player(site, "/a") as player:
            player.read_media()
        eventually(lambda: upstreams(site) == 0, "the channel closes")
    assert origin.count("/a") == 5
    origin.wait_connections(0)
    may_end.set()


def test_player_may_open_a_channel_twice(origin: Origin, serve: Serve) -> None:
    """The first connection is a probe, which is closed after the player itself connected."""
    site = household(origin, serve, relay, server={"max_upstreams": 1})
    for name in ("a", "b", "a"):
        with Player(site, f"/{name}") as probe, Player(site, f"/{name}") as player:
            assert (probe.status, player.status) == (200, 200)
            probe.close()
            player.read_media()
    assert [request.path for request in origin.requests] == ["/a", "/b", "/a"]


def test_channel_that_fails_gives_way_to_the_next_one(origin: Origin, serve: Serve) -> None:
    site = household(origin, serve, relay, server={"max_upstreams": 1, "max_viewers": 1})
    origin.fault("/b", Status(404), times=None)
    for name, status in [("a", 200), ("b", 502), ("b", 502), ("c", 200), ("b", 502), ("a", 200)]:
        with Player(site, f"/{name}") as player:
            assert player.status == status
    assert origin.count("/b") == 1


def test_failed_start_frees_its_place_for_a_waiting_player(origin: Origin, serve: Serve) -> None:
    site = household(origin, serve, relay, server={"max_upstreams": 1})
    hanging = origin.fault("/a", StallHeaders(), Status(404))
    with Player(site, "/a") as failing:
        hanging.wait_held()
        with Player(site, "/b") as player:
            eventually(lambda: waits_in_watch() == 1, "the player waits for the place")
            hanging.release()
            assert (failing.status, player.status) == (502, 200)


@pytest.mark.parametrize("extra", [b"", b"\r\n", b"GET /b HTTP/1.1\r\n\r\n"])
def test_player_that_closed_its_sending_side_frees_its_place(
    origin: Origin, serve: Serve, extra: bytes
) -> None:
    """It counts as gone, as with other servers, even if it sent more bytes before."""
    site = household(origin, serve, relay, server={"max_viewers": 1})
    with Player(site, "/a", SOURCES[0]) as half:
        half.read_media()
        half.say(extra)
        half.finish_sending()
        with Player(site, "/b", SOURCES[1]) as player:
            player.read_media()


#### A quality that does not exist ####


ONLY_TWO = "no such quality; available: 360p, 720p"


def two_qualities(origin: Origin, name: str) -> Multivariant:
    return origin.add(master(name, {"360p": live(f"{name}-360"), "720p": live(f"{name}-720")}))


def test_addresses_with_different_qualities_do_not_stop_the_server(
    origin: Origin, serve: Serve
) -> None:
    """The default quality means another one at the second address, where a start has it already."""
    one = origin.add(master("one", {"720p": live("one-720"), "1080p": live("one-1080")}))
    two = origin.add(master("two", {"480p": live("two-480"), "720p": live("two-720")}))
    stalled = origin.fault("/one-720/*.ts", StallHeaders(), times=None)
    site = serve({"news": {"url": [one.url, two.url]}})
    with Player(site, "/news?quality=720p") as first:
        stalled.wait_held()
        origin.fault(one.path, Status(458))
        with Player(site, "/news") as second:
            origin.wait_for(two.path)
            health = Task(lambda: site.get("/health").status)
            assert health.result() == 200
            stalled.clear()
            stalled.release()
            first.read_media()
            second.read_media()


@other_addresses
def test_start_at_a_backup_chooses_the_quality_anew(origin: Origin, serve: Serve) -> None:
    """So viewers share the channel, as if the first address did not exist."""
    dead = live("one-1080")
    one = origin.add(master("one", {"1080p": dead}))
    two = origin.add(master("two", {"720p": live("two-720"), "1080p": live("two-1080")}))
    origin.fault(dead.path, Status(404), times=None)
    news = {"url": [one.url, two.url], "quality": "720p,best"}
    site = serve({"news": news}, server={"max_upstreams": 1})
    with Player(site, "/news", SOURCES[0]) as first, Player(site, "/news", SOURCES[1]) as second:
        first.read_media()
        second.read_media()
        with Player(site, "/news", SOURCES[1]) as late:
            late.read_media()
        (channel,) = site.get("/status").json["streams"][0]["channels"]
        assert channel["variant"] == "720p"


def test_connection_of_an_abandoned_start_closes_before_the_next_one_opens(
    origin: Origin, serve: Serve
) -> None:
    """The origin allows one connection, and sends the first byte late."""
    site = household(origin, serve, relay)
    for name in ("a", "b"):
        origin.habit(f"/{name}", OneAtATime(origin, 458, "/[ab]"))
    hanging = origin.fault("/a", StallHeaders())
    with Player(site, "/a"):
        hanging.wait_held()
    eventually(lambda: viewers(site) == 0, "the player has left")
    with Player(site, "/b") as player:
        origin.wait_until(lambda: any(r.status == 458 for r in origin.requests), "it is refused")
        eventually(lambda: upstreams(site) == 1, "the abandoned start is closed")
        hanging.release()
        player.read_media()


def test_film_goes_to_the_viewer_that_can_play_it(origin: Origin, serve: Serve) -> None:
    """A page requests its playlist first, and a film has none."""
    film = origin.add(Playlist("film", media.ts_segments()))
    hanging = origin.fault(film.path, StallHeaders())
    site = serve({"film": film.url}, server={"max_upstreams": 1})
    page = Task(lambda: site.get("/film.m3u8").status)
    hanging.wait_held()
    with Player(site, "/film") as player:
        eventually(lambda: viewers(site) == 2, "both wait")
        hanging.release()
        player.read_media()
        assert page.result() == 404
    assert origin.count(film.segment_path(0)) == 1


def test_unknown_quality_of_a_running_channel_causes_no_request(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds long after the start, too."""
    news = two_qualities(origin, "news")
    site = serve({"news": news.url})
    watch(site, "/news")
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 0.0)
    origin.clear_requests()
    for number in range(20):
        answer = site.get(f"/news?quality=nope{number}")
        assert answer.status == 404
        assert answer.json["error"] == ONLY_TWO
    assert origin.count(news.path) == 0


@pytest.mark.parametrize("is_lingering", [True, False], ids=["lingering", "watched"])
def test_unknown_quality_closes_no_other_channel(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, is_lingering: bool
) -> None:
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 0.0)
    site = serve(
        {name: two_qualities(origin, name).url for name in ("a", "b")},
        server={"max_upstreams": 2}, linger=600,
    )  # fmt: skip
    for name in ("a", "b"):
        viewer = watch(site, f"/{name}")
        if is_lingering:
            viewer.close()
    if is_lingering:
        eventually(lambda: viewers(site) == 0, "both channels linger")
    assert site.get("/a?quality=nope").status == 404
    assert upstreams(site) == 2


def test_unknown_qualities_of_an_idle_stream_cause_one_request(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The playlist is loaded once within FAILURE_MEMORY, whatever names are requested."""
    assert pipe.FAILURE_MEMORY == 2.0
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", LONG)
    news = two_qualities(origin, "news")
    site = serve({"news": news.url})
    answers = [site.get(f"/news?quality=nope{number}") for number in range(20)]
    assert {answer.status for answer in answers} == {404}
    assert {answer.json["error"] for answer in answers} == {ONLY_TWO}
    assert origin.count("*") == 1
    watch(site, "/news?quality=360p")


def test_unknown_quality_of_an_idle_stream_is_requested_again_later(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its origin may offer other qualities by then."""
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", 0.2)
    news = two_qualities(origin, "news")
    site = serve({"news": news.url})
    assert site.get("/news?quality=240p").status == 404
    tiny = Playlist("tiny", media.ts_segments(), mode="live", clock=True)
    origin.add(master("news", {"240p": tiny}))
    eventually(lambda: site.watch("/news?quality=240p").status == 200, "the new quality is found")


def test_running_channel_can_be_joined_even_if_the_newest_start_did_not_list_it(
    origin: Origin, serve: Serve
) -> None:
    """A transcoder that restarts lists one rendition after the other."""
    news = two_qualities(origin, "news")
    site = serve({"news": news.url})
    watch(site, "/news")
    origin.add(master("news", {"360p": news.variants[0].playlist}))
    watch(site, "/news?quality=360p")
    loads = origin.count(news.path)
    watch(site, "/news?quality=720p")
    assert site.get("/news?quality=240p").status == 404
    assert origin.count(news.path) == loads


#### Several qualities during one start ####


def test_simultaneous_requests_for_qualities_share_a_start(origin: Origin, serve: Serve) -> None:
    """A viewer of the other quality waits for the first start, and then causes a second one."""
    news = two_qualities(origin, "news")
    small, large = (variant.playlist for variant in news.variants)
    hanging = origin.fault(news.path, StallHeaders())
    site = serve({"news": news.url})
    paths = ["/news?quality=360p", "/news?quality=720p", "/news?quality=best", "/news?quality=nope"]
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(Player(site, path)) for path in paths]
        eventually(lambda: viewers(site) == len(paths), "all players wait")
        hanging.wait_held()
        assert (upstreams(site), origin.count(news.path)) == (1, 1)
        hanging.release()
        assert [player.status for player in players] == [200, 200, 200, 404]
        variants = site.get("/status").json["streams"][0]["channels"]
        assert {c["variant"]: len(c["viewers"]) for c in variants} == {"360p": 1, "720p": 2}
    assert origin.count(news.path) == 2
    assert origin.count(small.path) >= 1 <= origin.count(large.path)


def test_waiting_viewers_of_every_quality_get_the_error_of_a_failed_start(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", LONG)
    news = two_qualities(origin, "news")
    hanging = origin.fault(news.path, StallHeaders(), Status(404))
    site = serve({"news": news.url})
    paths = ["/news?quality=360p", "/news?quality=720p", "/news"]
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(Player(site, path)) for path in paths]
        eventually(lambda: viewers(site) == len(paths), "all players wait")
        hanging.release()
        assert [player.status for player in players] == [502, 502, 502]
    assert [site.get(path).status for path in paths] == [502, 502, 502]
    assert origin.count(news.path) == 1


def test_viewer_that_leaves_while_it_waits_for_another_quality_is_not_counted(
    origin: Origin, serve: Serve
) -> None:
    news = two_qualities(origin, "news")
    hanging = origin.fault(news.path, StallHeaders())
    site = serve({"news": news.url}, timeout=600)
    with Player(site, "/news?quality=360p") as player:
        hanging.wait_held()
        with Player(site, "/news?quality=720p"):
            eventually(lambda: viewers(site) == 2, "both players wait")
        eventually(lambda: viewers(site) == 1, "one player has left")
        hanging.release()
        player.read_media()
    assert origin.count(news.path) == 1


def waiting_seconds(site: Site) -> float:
    """Seconds since the newest viewer of the first channel arrived."""
    channel = site.get("/status").json["streams"][0]["channels"][0]
    return float(channel["viewers"][-1]["since_seconds"])


def test_time_spent_waiting_for_another_quality_counts(origin: Origin, serve: Serve) -> None:
    """Its deadline counts from its own request, whichever start it waits for."""
    news = two_qualities(origin, "news")
    large = news.variants[1].playlist
    hanging = origin.fault(news.path, StallHeaders())
    stalled = origin.fault(large.path, StallHeaders(), times=None)
    site = serve({"news": news.url}, timeout=3)
    with Player(site, "/news?quality=360p") as small:
        hanging.wait_held()
        early = Task(lambda: site.get("/news?quality=720p").status)
        eventually(lambda: viewers(site) == 2, "the early viewer waits")
        eventually(lambda: waiting_seconds(site) > 1, "it has waited for a second")
        hanging.release()
        assert small.status == 200
        stalled.wait_held()  # the second start, which has a time limit of its own
        late = Task(lambda: site.watch("/news?quality=720p").status)
        assert early.result() == 504
        stalled.clear()
        stalled.release()
        assert late.result() == 200, "the start had time left"


#### A reload during a start ####


def reload(site: Site, stream: dict[str, object], **server: object) -> None:
    """Reload the configuration with another stream `news`, as the program does."""
    text = yaml.safe_dump({"server": {"host": "127.0.0.1", **server}, "streams": {"news": stream}})
    site.server.reload(pipe.ConfigReader("test.yml", pipe.engine_options()).read(text))


def test_viewer_that_waits_for_a_start_gets_the_new_default_quality(
    origin: Origin, serve: Serve
) -> None:
    news = two_qualities(origin, "news")
    hanging = origin.fault(news.path, StallHeaders(), times=None)
    site = serve({"news": {"url": news.url, "quality": "720p"}})
    paths = ["/news", "/news", "/news?quality=best", "/news?quality=nope"]
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(Player(site, path)) for path in paths]
        eventually(lambda: viewers(site) == len(paths), "all players wait")
        hanging.wait_held()
        assert origin.count(news.path) == 1, "there is one start for all viewers"
        hanging.clear()
        reload(site, {"url": news.url, "quality": "360p"})
        assert [player.status for player in players] == [200, 200, 200, 404]
        variants = site.get("/status").json["streams"][0]["channels"]
        assert {c["variant"]: len(c["viewers"]) for c in variants} == {"360p": 2, "720p": 1}
    hanging.release()


def test_viewer_of_a_stream_that_a_reload_removes_gets_404(origin: Origin, serve: Serve) -> None:
    hanging = origin.fault("/a", StallHeaders())
    site = serve({"a": relay(origin, "a")})
    with Player(site, "/a") as player:
        hanging.wait_held()
        reload(site, {"url": relay(origin, "b")})
        assert player.status == 404
    hanging.release()


def test_viewer_that_waits_for_a_join_point_gets_the_reloaded_stream(
    origin: Origin, serve: Serve
) -> None:
    """The channel runs, but sends no tables and no key frame to start with."""

    def source() -> Iterator[bytes]:
        yield media.ts_segments()[0][media.HEAD_PACKETS * media.PACKET :]
        while True:
            yield pipe.NULL_PACKET
            time.sleep(0.02)

    site = serve({"news": origin.add_endless("/news", source)})
    watch(site, "/news")
    with Player(site, "/news") as player:
        eventually(lambda: viewers(site) == 2, "both viewers are attached")
        reload(site, {"url": relay(origin, "b")})
        player.read_media()


def test_waiting_viewers_of_every_quality_get_the_reloaded_stream(
    origin: Origin, serve: Serve
) -> None:
    """The stream is removed, or has another address."""
    old, new = two_qualities(origin, "old"), two_qualities(origin, "new")
    hanging = origin.fault(old.path, StallHeaders(), times=None)
    site = serve({"news": old.url, "sport": old.url})
    paths = ["/news?quality=360p", "/news?quality=720p", "/sport?quality=360p", "/sport"]
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(Player(site, path)) for path in paths]
        eventually(lambda: viewers(site) == len(paths), "all players wait")
        hanging.wait_held(2)
        assert origin.count(old.path) == 2, "there is one start for each stream"
        reload(site, {"url": new.url})
        assert [player.status for player in players] == [200, 200, 404, 404]
        variants = site.get("/status").json["streams"][0]["channels"]
        assert {c["variant"]: len(c["viewers"]) for c in variants} == {"360p": 1, "720p": 1}
    hanging.clear()
    hanging.release()


def test_address_that_a_reload_interrupted_does_not_count_as_failed(
    origin: Origin, serve: Serve
) -> None:
    urls = [relay(origin, "first"), relay(origin, "second")]
    hanging = origin.fault("/first", StallHeaders())
    site = serve({"news": {"url": urls}})
    with Player(site, "/news") as player:
        hanging.wait_held()
        reload(site, {"url": urls, "headers": {"X-New": "yes"}})
        player.read_media()
    assert [request.path for request in origin.requests] == ["/first", "/first"]
    stream = site.get("/status").json["streams"][0]
    assert (stream["restarts"], stream["last_error"]) == (0, None)
    hanging.release()


def test_reload_forgets_that_an_address_failed(origin: Origin, serve: Serve) -> None:
    """The reload may have repaired the address."""
    urls = [relay(origin, "first"), relay(origin, "second")]
    origin.fault("/first", Status(403))
    site = serve({"news": {"url": urls}})
    with Player(site, "/news") as player:
        player.read_media()
    reload(site, {"url": urls, "headers": {"X-New": "yes"}})
    with Player(site, "/news") as player:
        player.read_media()
    assert [request.path for request in origin.requests] == ["/first", "/second", "/first"]


def test_new_qualities_are_available_at_once_after_a_reload(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "FAILURE_MEMORY", LONG)
    site = serve({"news": two_qualities(origin, "news").url})
    assert site.get("/news?quality=240p").status == 404
    tiny = Playlist("tiny", media.ts_segments(), mode="live", clock=True)
    reload(site, {"url": origin.add(master("other", {"240p": tiny})).url})
    watch(site, "/news?quality=240p")


def test_new_qualities_are_available_while_the_old_channel_ends(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = delay_closing(monkeypatch)
    site = serve({"news": two_qualities(origin, "news").url})
    watch(site, "/news")
    tiny = Playlist("tiny", media.ts_segments(), mode="live", clock=True)
    reload(site, {"url": origin.add(master("other", {"240p": tiny})).url})
    watch(site, "/news?quality=240p")
    may_end.set()


def test_reloaded_channel_waits_until_the_panel_forgets_the_old_connection(
    origin: Origin, serve: Serve
) -> None:
    origin.rate = 2_000_000
    source = relay(origin, "a")
    origin.habit("/a", OneAtATime(origin, 458, "/a", 0.3))
    site = serve({"news": source})
    watch(site, "/news")
    reload(site, {"url": source, "headers": {"X-New": "yes"}})
    watch(site, "/news")
    assert any(request.status == 458 for request in origin.requests), (
        "the panel refused a connection"
    )


def test_channel_that_a_reload_ends_frees_its_slot_at_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections are closed at once, although its thread may take longer to end."""
    may_end = delay_closing(monkeypatch)
    origin.rate = 2_000_000
    site = serve({"news": relay(origin, "a")}, server={"max_upstreams": 1})
    with Player(site, "/news", SOURCES[0]) as player:
        player.read_media()
        reload(site, {"url": relay(origin, "b")}, max_upstreams=1)
        with Player(site, "/news", SOURCES[1]) as newcomer:
            newcomer.read_media()
            origin.wait_connections(1)
        may_end.set()


#### A failed start ####


def test_each_waiting_viewer_gets_an_exception_of_its_own(origin: Origin, serve: Serve) -> None:
    """A shared exception would collect the traceback frames of all viewers."""
    hanging = origin.fault("/a", StallHeaders(), Status(404))
    site = serve({"a": relay(origin, "a")})
    stream = site.config.streams["a"]

    def watch() -> BaseException:
        with pytest.raises(pipe.StreamError) as caught:
            site.channels.watch(stream, None, pipe.Viewer())
        return caught.value

    tasks = [Task(watch) for _ in range(5)]
    eventually(lambda: viewers(site) == 5, "all players wait")
    hanging.release()
    errors = [task.result() for task in tasks] + [watch() for _ in range(5)]
    assert len(set(map(id, errors))) == 10
    assert len({len(list(traceback.walk_tb(error.__traceback__))) for error in errors}) <= 2
