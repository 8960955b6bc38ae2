"""Loading channel lists: a real server, and a real origin that behaves like a panel."""

from __future__ import annotations

import contextlib
import gzip
import html
import itertools
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import (
    PANELS,
    WEB_PAGE,
    Body,
    Break,
    Drip,
    Gzip,
    OneAtATime,
    Origin,
    Panel,
    Playlist,
    Redirect,
    Stall,
    StallHeaders,
    Status,
)
from tests.program import Service, eventually
from tests.server import Site
from tests.test_cli import Program
from tests.test_pages import metric
from tests.threads import refuse_threads

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(8)
ACCOUNT = "username=ada.l&password=hunter2"
PATH = "/get.php"
LIST = f"{PATH}?{ACCOUNT}&type=m3u_plus"


def listing(origin: Origin, *titles: str, guide: str = "", tail: str = "") -> bytes:
    """A panel's list, with a channel of the origin for each title."""
    head = f'#EXTM3U url-tvg="{guide}"' if guide else "#EXTM3U"
    lines = [head]
    for title in titles:
        lines += [
            f'#EXTINF:-1 tvg-id="{title}.uk" group-title="UK",{title}',
            f"{origin.url}/{title.lower()}/index.m3u8{tail}",
        ]
    return "\r\n".join([*lines, ""]).encode()


def add_channels(origin: Origin, *names: str) -> None:
    for name in names:
        origin.add(Playlist(name, SEGMENTS, mode="live", clock=True))


def add_list(origin: Origin, data: bytes) -> str:
    """Have the origin serve a list; returns its address."""
    return origin.add_file(PATH, data, content_type="audio/x-mpegurl") + LIST.removeprefix(PATH)


def paths(site: Site) -> list[str]:
    """The names of the streams in /playlist.m3u, in order."""
    lines = site.get("/playlist.m3u").body.decode().splitlines()
    return [line.rpartition("/")[2] for line in lines if line.startswith("http")]


def loaded(site: Site, *names: str) -> None:
    """Wait until the server has exactly these streams, in this order."""
    eventually(lambda: list(site.server.config.streams) == list(names), f"streams {names}")


def status(site: Site) -> dict[str, Any]:
    """The report of /status on the only list."""
    (report,) = site.get("/status").json["playlists"]
    return dict(report)


def seconds_left(each: pipe.LoadingList) -> float:
    """The seconds until the next load of a list."""
    assert each.due is not None
    return each.due - time.monotonic()


def reload(site: Site) -> None:
    """Reload an unchanged configuration, as SIGHUP does."""
    site.server.reload(site.config)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "LIST_PAUSES", (0.05, 0.1))


#### A list becomes streams ####


def test_streams_of_a_list_play(origin: Origin, serve: Serve) -> None:
    add_channels(origin, "one", "two")
    address = add_list(origin, listing(origin, "One", "Two"))
    site = serve({}, playlists={"tv": address})
    loaded(site, "one", "two")
    assert paths(site) == ["one", "two"]
    with site.watch("/two") as viewer:
        assert viewer.status == 200
        assert viewer.read(188)[0] == 0x47
    assert site.get("/health").json["streams"] == 2
    report = status(site)
    assert report.pop("loaded_seconds") < 60
    assert report == {"playlist": "tv", "channels": 2, "omitted": {}, "last_error": None}
    assert re.search(r"List tv: 2 channels, loaded (just\snow|\d+\ss\sago)", page(site))


def page(site: Site, path: str = "/") -> str:
    return site.get(path, Accept="text/html,application/xhtml+xml").body.decode()


def test_list_of_a_local_file_is_loaded(tmp_path: Path, origin: Origin, serve: Serve) -> None:
    file = tmp_path / "tv.m3u"
    file.write_bytes(listing(origin, "One"))
    site = serve({}, playlists={"tv": str(file)})
    loaded(site, "one")
    file.unlink()
    reload(site)
    eventually(lambda: status(site)["last_error"], "the failure is shown")
    assert status(site)["last_error"] == "the file cannot be read: No such file or directory"
    assert paths(site) == ["one"]


def test_device_file_is_not_read(tmp_path: Path, serve: Serve) -> None:
    link = tmp_path / "zero.m3u"
    link.symlink_to("/dev/zero")
    site = serve({}, playlists={"tv": str(link)})
    eventually(lambda: status(site)["last_error"] == "the path is not a file", "it is refused")


def test_names_stay_once_players_know_them(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that is loaded late gets other names, even if it is configured before the others."""
    monkeypatch.setattr(pipe, "FIRST_LIST_TIME", 0.5)
    late = origin.add_file("/late.m3u", listing(origin, "News"))
    other = origin.add_file("/other.m3u", listing(origin, "News", "Two"))
    waiting = origin.fault("/late.m3u", StallHeaders())
    site = serve({}, playlists={"late": late, "other": other})
    eventually(lambda: site.get("/playlist.m3u").status == 200, "the playlist is served")
    waiting.release()
    loaded(site, "news-2", "news", "two")
    assert site.server.config.streams["news"].playlist == "other"


def test_check_of_the_files_own_streams_loads_no_list(tmp_path: Path, origin: Origin) -> None:
    add_channels(origin, "own")
    text = f"streams: {{own: '{origin.url}/own/index.m3u8'}}\n"
    text += f"playlists: {{bad: '{origin.url}/none.m3u'}}\n"
    (tmp_path / "config.yml").write_text(text)
    with contextlib.closing(Program("--check", "own", cwd=tmp_path)) as program:
        assert program.wait() == 0
        (line,) = program.output().splitlines()
    assert line.startswith("own  ok")
    assert origin.count("/none.m3u") == 0


@pytest.mark.parametrize("data", [SEGMENTS[0], media.fmp4()[0], media.aac_segments(1)[0]])
def test_channel_in_place_of_a_list_is_noticed_at_once(
    origin: Origin, serve: Serve, data: bytes
) -> None:
    """Its bytes would never end."""
    address = origin.add_endless("/live.ts", lambda: itertools.repeat(data))
    site = serve({}, playlists={"tv": address})
    eventually(lambda: status(site)["last_error"] == pipe.A_STREAM, "it is refused")


def test_list_may_be_redirected_and_compressed(origin: Origin, serve: Serve) -> None:
    """All requests have the playlist's headers and user agent; the answer may take its time."""
    origin.add_file("/real.m3u", listing(origin, "One"))
    add_list(origin, b"")
    origin.fault(PATH + "*", Redirect("/real.m3u"), times=None)
    thinking = origin.fault("/real.m3u", Gzip(), StallHeaders())
    keys = {"url": f"{origin.url}{LIST}", "headers": {"X-Device": "tv"}, "user_agent": "VLC/3"}
    site = serve({}, playlists={"tv": keys})
    thinking.wait_held()
    thinking.release()
    loaded(site, "one")
    for request in origin.requests:
        assert request.headers["x-device"] == "tv"
        assert request.headers["user-agent"] == "VLC/3"
    assert site.server.config.streams["one"].headers == {"X-Device": "tv"}
    assert site.server.config.streams["one"].options.user_agent == "VLC/3"


def test_configured_streams_replace_and_hide_those_of_the_list(
    origin: Origin, serve: Serve
) -> None:
    add_channels(origin, "one", "two", "three")
    address = add_list(origin, listing(origin, "One", "Two", "Three"))
    own = {"one": f"{origin.url}/two/index.m3u8", "two": {"hide": True}, "three": {"title": "3"}}
    site = serve(own, playlists={"tv": address})
    loaded(site, "one", "two", "three")
    assert paths(site) == ["one", "three"]
    assert ",3\n" in site.get("/playlist.m3u").body.decode()
    assert "two" not in {line["GuideName"].lower() for line in site.get("/lineup.json").json}
    assert 'id="two"' not in page(site)
    with site.watch("/two") as viewer:
        assert viewer.status == 200
    assert "<video" in page(site, "/two")
    assert site.config.streams["one"].urls[0] == site.server.config.streams["one"].urls[0]


def test_override_without_a_stream_is_logged_once(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    address = add_list(origin, listing(origin, "One"))
    site = serve({"none": {"hide": True}}, playlists={"tv": address})
    loaded(site, "one")
    reload(site)
    origin.wait_for(LIST, 2)
    words = "streams.none: url is missing, and no list has this stream"
    eventually(lambda: words in caplog.text, "the warning is logged")
    assert caplog.text.count(words) == 1


#### Until the first load ####


def test_page_says_that_a_list_is_being_loaded(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, "One"))
    thinking = origin.fault(LIST, StallHeaders())
    site = serve({}, playlists={"tv": address})
    thinking.wait_held()
    shown = page(site)
    assert "<p>The list tv is being loaded: reload this page in a moment.</p>" in shown
    assert "No streams are configured" not in shown
    thinking.release()
    loaded(site, "one")
    assert "being loaded" not in page(site)


def test_page_says_why_a_list_could_not_be_loaded(tmp_path: Path, serve: Serve) -> None:
    site = serve({}, playlists={"tv": str(tmp_path / "none.m3u")})
    eventually(lambda: status(site)["last_error"], "the failure is shown")
    reason = "the file cannot be read: No such file or directory"
    shown = page(site)
    assert f"<p>The list tv could not be loaded: {reason}.</p>" in shown
    assert "No streams are configured" not in shown


def test_players_wait_for_the_first_load(origin: Origin, serve: Serve) -> None:
    add_channels(origin, "own")
    address = add_list(origin, listing(origin, "One"))
    thinking = origin.fault(LIST, StallHeaders())
    site = serve({"own": f"{origin.url}/own/index.m3u8"}, playlists={"tv": address})
    thinking.wait_held()
    for path in (
        *("/playlist.m3u", "/lineup.json", "/one", "/one.m3u8", "/one.m3u", "/nothing"),
        *("/One", "/one/", "/auto/v7"),
    ):
        answer = site.get(path)
        assert answer.status == 503, path
        assert answer.headers["Retry-After"] == "5"
        assert answer.json == {"error": "the list of channels is being loaded"}
    assert site.ask("HEAD", "/one").status == 503
    assert site.get("/Own.m3u").status == 302
    assert site.get("/health").status == 200
    assert site.get("/own.m3u").status == 200
    assert "List tv: not loaded yet" in page(site)
    thinking.release()
    loaded(site, "own", "one")
    assert paths(site) == ["own", "one"]
    assert site.get("/nothing").status == 404


def test_players_get_the_existing_streams_after_a_minute(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.FIRST_LIST_TIME == 60.0
    monkeypatch.setattr(pipe, "FIRST_LIST_TIME", 0.2)
    address = add_list(origin, listing(origin, "One"))
    thinking = origin.fault(LIST, StallHeaders())
    site = serve({"own": f"{origin.url}/own/index.m3u8"}, playlists={"tv": address})
    eventually(lambda: site.get("/playlist.m3u").status == 200, "the playlist is served")
    assert paths(site) == ["own"]
    assert site.get("/one").status == 404
    thinking.release()
    loaded(site, "own", "one")


#### Failures ####


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Status(403), "the origin answered 403"),
        (Status(458), "the origin answered 458"),
        (Body(WEB_PAGE), pipe.NOT_A_LIST),
        (Body(b""), pipe.NO_CHANNELS),
        (Break(100), "the origin's answer broke off"),
        (Redirect("file:///etc/passwd"), "the origin refers to a local file: refused"),
        (Redirect("/get.php?again"), "the origin redirects in a loop"),
    ],
    ids=["403", "458", "page", "empty", "break", "file", "loop"],
)
def test_failed_load_keeps_the_previous_list(
    origin: Origin,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    fault: Any,
    reason: str,
) -> None:
    """An outage logs one line; the page and /status show the reason, and never the account."""
    caplog.set_level(logging.INFO, "streampipe")
    address = add_list(origin, listing(origin, "One", "Two"))
    site = serve({}, playlists={"tv": address})
    loaded(site, "one", "two")
    failing = origin.fault(PATH, fault, times=None)
    reload(site)
    eventually(lambda: status(site)["last_error"] == reason, reason)
    failing.wait(failing.taken + 2)
    assert status(site)["channels"] == 2
    assert paths(site) == ["one", "two"]
    shown = page(site)
    assert f'<li>List tv: <span class="failed">{html.escape(reason)}</span></li>' in shown
    failing.clear()
    eventually(lambda: status(site)["last_error"] is None, "the list is loaded again")
    failures = [line for line in caplog.messages if "is not used" in line]
    assert failures == [f"tv: the list is not used: {reason}; the previous list stays"]
    eventually(
        lambda: caplog.text.count("tv: loaded the list: 2 channels") == 2, "both loads are logged"
    )
    for text in (caplog.text, shown, str(status(site))):
        assert "hunter2" not in text
        assert "ada.l" not in text


def test_pauses_between_failed_loads_grow(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "LIST_PAUSES", (10.0, 30.0, 60.0, 120.0, 300.0, 600.0))
    site = serve({}, playlists={"tv": origin.url + "/none"})
    each = site.server.lists._lists["tv"]
    found = []
    for count in range(1, 9):
        eventually(lambda n=count: each.refusals == n, "a load fails")  # type: ignore[misc]
        with site.server.lists._changed:
            found.append(round(seconds_left(each), -1))
            each.due = 0.0
            site.server.lists._changed.notify_all()
    assert found == [10, 30, 60, 120, 300, 600, 600, 600]


def test_changed_address_starts_with_a_clean_record(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first failure of the new address is logged, and retried after the shortest pause."""
    monkeypatch.setattr(pipe, "LIST_PAUSES", (10.0, 600.0))
    site = serve({}, playlists={"tv": origin.url + "/none"})
    each = site.server.lists._lists["tv"]

    def failed(count: int) -> float:
        """Wait for this many failures in succession; returns the seconds until the next load."""
        eventually(lambda: each.refusals == count, f"{count} loads fail")
        with site.server.lists._changed:
            return seconds_left(each)

    failed(1)
    reload(site)
    assert failed(2) > 500
    other = origin.add_file("/other", WEB_PAGE)
    settings = replace(site.config.playlists["tv"], url=other)
    site.server.reload(replace(site.config, playlists={"tv": settings}))
    assert failed(1) <= 10
    assert origin.count("/other") == 1
    settings = replace(settings, max_upstreams=2)
    site.server.reload(replace(site.config, playlists={"tv": settings}))
    assert failed(2) > 500
    failures = [line for line in caplog.messages if "is not used" in line]
    assert failures == [
        "tv: the list is not used: the origin answered 404",
        f"tv: the list is not used: {pipe.NOT_A_LIST}",
    ]


def test_list_survives_cookies_that_cannot_be_read_for_a_moment(
    tmp_path: Path, origin: Origin, serve: Serve
) -> None:
    """Another program empties the file before it writes the file anew."""
    add_channels(origin, "one")
    cookies = tmp_path / "cookies.txt"
    valid = "# Netscape HTTP Cookie File\n"
    cookies.write_text(valid)
    address = add_list(origin, listing(origin, "One"))
    streamlink = {"http-cookies-files": (str(cookies),)}
    site = serve({}, playlists={"tv": {"url": address, "streamlink": streamlink}})
    reason = "a file in http-cookies-files cannot be read"
    loaded(site, "one")

    def trouble() -> object:
        return site.get("/status").json["playlists"][0]["last_error"]

    cookies.write_text("")
    reload(site)
    eventually(lambda: trouble() == reason, "the list has failed")
    cookies.write_text(valid)
    reload(site)
    eventually(lambda: trouble() is None, "the list is loaded again")


def test_failed_lists_are_counted_in_metrics(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, "One"))
    site = serve({}, playlists={"tv": address, "none": origin.url + "/none"})
    loaded(site, "one")
    eventually(lambda: metric(site, "failed_lists") == 1, "one list has failed")
    failing = origin.fault(PATH, Status(403), times=None)
    reload(site)
    eventually(lambda: metric(site, "failed_lists") == 2, "both lists have failed")
    failing.clear()
    eventually(lambda: metric(site, "failed_lists") == 1, "one list is loaded again")
    assert metric(serve({}), "failed_lists") == 0


def test_page_reads_the_state_of_lists_once(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a list that fails in between would have two states on one page."""
    site = serve({}, playlists={"tv": origin.url + "/none"})
    eventually(lambda: status(site)["last_error"], "the failure is shown")
    lists = site.server.lists
    calls = []
    report = lists.report

    def count() -> list[dict[str, Any]]:
        calls.append(1)
        return report()

    monkeypatch.setattr(lists, "report", count)
    assert "List tv: not loaded yet" in page(site)
    assert len(calls) == 1


def test_list_that_loads_too_slowly_fails(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.LIST_TIME == 300.0
    monkeypatch.setattr(pipe, "LIST_TIME", 0.5)
    address = add_list(origin, listing(origin, "One"))
    origin.fault(LIST, Drip(0.05), times=None)
    site = serve({}, playlists={"tv": address})
    eventually(lambda: status(site)["last_error"] == pipe.TIMED_OUT, "the load times out")


def test_list_that_lost_most_channels_is_accepted_after_ten_minutes(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streampipe")
    monkeypatch.setattr(pipe, "SHRUNK_TIME", 600.0)
    address = add_list(origin, listing(origin, *"ABCDE"))
    site = serve({}, playlists={"tv": address})
    loaded(site, *"abcde")
    add_list(origin, listing(origin, "A", "X"))
    for _ in range(3):
        before = origin.count(LIST)
        reload(site)
        eventually(lambda n=before: origin.count(LIST) > n, "the list is loaded")  # type: ignore[misc]
        eventually(lambda: status(site)["last_error"], "the shrunk list is doubted")
    assert status(site)["last_error"].startswith("the list has only 2 channels instead of 5: ")
    assert list(site.server.config.streams) == list("abcde")
    assert caplog.text.count("the list has only 2 channels") == 1
    each = site.server.lists._lists["tv"]
    assert 590 < seconds_left(each) <= 600
    with site.server.lists._changed:  # ten minutes later
        each.shrunk = (each.shrunk or 0.0) - 600
        each.due = 0.0
        site.server.lists._changed.notify_all()
    loaded(site, "a", "x")
    assert status(site)["last_error"] is None


def test_list_that_shrinks_only_briefly_keeps_its_channels(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "SHRUNK_TIME", 0.3)
    full = listing(origin, *"ABCDE")
    address = add_list(origin, full)
    site = serve({}, playlists={"tv": address})
    loaded(site, *"abcde")
    short = origin.fault(LIST, Body(listing(origin, "A")))
    reload(site)
    short.wait()
    eventually(lambda: origin.count(LIST) == 3, "the list is loaded again")
    eventually(lambda: status(site)["last_error"] is None, "the full list is accepted")
    assert list(site.server.config.streams) == list("abcde")


def test_shrunk_list_that_then_fails_backs_off(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes after it shrank, its failures have the same pauses as others."""
    monkeypatch.setattr(pipe, "LIST_PAUSES", (600.0,))
    address = add_list(origin, listing(origin, *"ABCDE"))
    site = serve({}, playlists={"tv": address})
    loaded(site, *"abcde")
    add_list(origin, listing(origin, "A"))
    reload(site)
    each = site.server.lists._lists["tv"]
    eventually(lambda: each.shrunk is not None, "the shrunk list is doubted")
    failing = origin.fault(LIST, Status(403), times=None)
    with site.server.lists._changed:
        each.shrunk = (each.shrunk or 0.0) - 600
        each.due = 0.0
        site.server.lists._changed.notify_all()
    eventually(lambda: status(site)["last_error"] == "the origin answered 403", "a load fails")
    with site.server.lists._changed:
        assert 500 < seconds_left(each) <= 600
    assert failing.taken == 1


def test_changed_settings_may_reduce_the_channels(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, *"ABCDE"))
    other = origin.add_file("/other.m3u", listing(origin, "A"))
    site = serve({}, playlists={"tv": address})
    loaded(site, *"abcde")
    settings = replace(site.config.playlists["tv"], url=other)
    site.server.reload(replace(site.config, playlists={"tv": settings}))
    loaded(site, "a")


#### Reloads ####


def test_new_list_does_not_disturb_viewers_of_remaining_channels(
    origin: Origin, serve: Serve
) -> None:
    add_channels(origin, "one", "two", "three")
    address = add_list(origin, listing(origin, "One", "Two"))
    site = serve({}, playlists={"tv": {"url": address, "max_upstreams": 2}})
    loaded(site, "one", "two")
    remaining, removed = site.watch("/one"), site.watch("/two")
    assert (remaining.status, removed.status) == (200, 200)
    remaining.read(188), removed.read(188)
    add_list(origin, listing(origin, "Three", "One"))
    reload(site)
    loaded(site, "three", "one")
    _, is_complete = removed.read_all()
    assert not is_complete
    assert remaining.read(200 * 188)
    assert origin.count("/one/index.m3u8") >= 1
    assert site.get("/status?stream=one").json["streams"]


def test_list_is_reloaded_after_each_refresh_interval(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, "One"))
    site = serve({}, playlists={"tv": {"url": address, "refresh": 0.2}})
    loaded(site, "one")
    add_list(origin, listing(origin, "One", "Two"))
    loaded(site, "one", "two")
    origin.wait_for(LIST, 4)


def test_list_without_refresh_is_loaded_only_on_reload(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, "One"))
    site = serve({}, playlists={"tv": {"url": address, "refresh": 0}})
    loaded(site, "one")
    assert site.server.lists._lists["tv"].due is None
    reload(site)
    origin.wait_for(LIST, 2)


def test_playlists_are_added_and_removed_by_a_reload(origin: Origin, serve: Serve) -> None:
    first = add_list(origin, listing(origin, "One"))
    second = origin.add_file("/second.m3u", listing(origin, "One", "Two"))
    site = serve({}, playlists={"a": first})
    loaded(site, "one")
    both = {name: pipe.PlaylistSettings(name, url) for name, url in [("a", first), ("b", second)]}
    site.server.reload(replace(site.config, playlists=both))
    loaded(site, "one", "one-2", "two")
    site.server.reload(replace(site.config, playlists={"b": both["b"]}))
    loaded(site, "one-2", "two")
    names = [thread.name for thread in threading.enumerate()]
    eventually(lambda: "list-a-0" not in [t.name for t in threading.enumerate()], str(names))


def test_list_without_a_thread_is_loaded_by_the_next_reload(
    origin: Origin,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither the start nor a reload fails, and the other list is loaded each time."""
    first = add_list(origin, listing(origin, "One"))
    second = origin.add_file("/second.m3u", listing(origin, "Two"))
    with monkeypatch.context() as patch:
        refuse_threads(patch, "^list-b-0$")
        site = serve({}, playlists={"a": first, "b": second})
        loaded(site, "one")
        reload(site)
        origin.wait_for(LIST, 2)

    errors = {
        each["playlist"]: each["last_error"] for each in site.get("/status").json["playlists"]
    }
    assert errors == {"a": None, "b": pipe.TOO_MANY_THREADS}
    failures = [line for line in caplog.messages if "is not used" in line]
    assert failures == [f"b: the list is not used: {pipe.TOO_MANY_THREADS}"]
    reload(site)
    loaded(site, "one", "two")


def test_server_without_a_thread_for_its_list_can_be_closed(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_threads(patch, "^list-tv-0$")
        site = serve({}, playlists={"tv": add_list(origin, listing(origin, "One"))})
    assert site.server.lists.stop(5.0)


def test_names_do_not_depend_on_the_order_of_loads(origin: Origin, serve: Serve) -> None:
    first = origin.add_file("/first.m3u", listing(origin, "News"))
    second = origin.add_file("/second.m3u", listing(origin, "News", "Two"))
    thinking = origin.fault("/first.m3u", StallHeaders())
    site = serve({}, playlists={"a": first, "b": second})
    loaded(site, "news", "two")
    assert site.server.config.streams["news"].playlist == "b"
    thinking.release()
    loaded(site, "news", "news-2", "two")
    assert site.server.config.streams["news"].playlist == "a"
    reload(site)
    origin.wait_for("/second.m3u", 2)
    assert list(site.server.config.streams) == ["news", "news-2", "two"]


def test_closing_does_not_wait_for_a_list(origin: Origin, serve: Serve) -> None:
    address = add_list(origin, listing(origin, "One"))
    stalled = origin.fault(LIST, Stall(at=10), times=None)
    site = serve({}, playlists={"tv": address})
    stalled.wait_held()
    began = time.monotonic()
    assert site.server.lists.stop(5.0)
    assert time.monotonic() - began < 5


#### Panels ####


def test_one_connection_is_enough_for_a_list_and_its_channels(origin: Origin, serve: Serve) -> None:
    """The connection that loaded the list must be closed before a channel plays."""
    add_channels(origin, "one")
    address = add_list(origin, listing(origin, "One"))
    origin.fault("/*", OneAtATime(origin, 458), times=None)
    site = serve({}, playlists={"tv": address}, threads=1)
    loaded(site, "one")
    with site.watch("/one") as viewer:
        assert viewer.status == 200


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if "think" in habits else [])
        for name, habits in PANELS.items()
    ],
)
def test_lists_and_channels_of_panels_work(origin: Origin, serve: Serve, name: str) -> None:
    """The panels use headers, redirects, one connection, slow answers and compression."""
    origin.rate = 2_000_000
    panel = Panel(origin, name, source=lambda: itertools.cycle(SEGMENTS), **PANELS[name])
    site = serve({}, playlists={"tv": panel.url})
    names = ["bbc-one", "sky-news-hd", "arte", "rai-uno"]
    loaded(site, *names)
    assert status(site)["channels"] == 4
    for stream in names:
        with site.watch(f"/{stream}") as viewer:
            assert viewer.status == 200
            assert viewer.read(188)[0] == 0x47


def test_size_of_a_decompressed_list_is_limited(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small compressed body may contain a very large list."""
    monkeypatch.setattr(pipe, "LIST_LIMIT", 1 << 20)
    address = add_list(origin, listing(origin, "One"))
    large = b"#EXTM3U\n" + b"# \n" * (1 << 20)
    assert len(gzip.compress(large)) < 20_000
    origin.fault(LIST, Body(large), Gzip(), times=None)
    site = serve({}, playlists={"tv": address})
    reason = "the list is larger than 1 MiB"
    eventually(lambda: status(site)["last_error"] == reason, "the list is refused")


#### The program ####


def test_program_loads_lists_at_the_start_and_on_sighup(tmp_path: Path, origin: Origin) -> None:
    """The log never contains the account's data, not even at debug level."""
    add_channels(origin, "one", "two")
    tail = "|X-Secret=pa55word"
    address = add_list(origin, listing(origin, "One", tail=f"?token=s3cr3t{tail}"))
    playlists = {"tv": address}
    with Service(tmp_path, {}, level="debug", playlists=playlists) as service:
        service.wait_for_count("tv: loaded the list: 1 channel", 1)
        add_list(origin, listing(origin, "One", "Two", tail=f"?token=s3cr3t{tail}"))
        service.send(signal.SIGHUP)
        service.wait_for_count("tv: loaded the list: 2 channels", 1)
        origin.fault(LIST, Status(403), times=None)
        service.send(signal.SIGHUP)
        service.wait_for_count("the list is not used: the origin answered 403", 1)
        lines = service.lines
    for secret in ("hunter2", "ada.l", "s3cr3t", "pa55word"):
        assert not [line for line in lines if secret in line]


def test_check_includes_the_streams_of_lists(tmp_path: Path, origin: Origin) -> None:
    add_channels(origin, "one")
    address = add_list(origin, listing(origin, "One"))
    text = f"playlists:\n  tv: '{address}'\n  bad: '{origin.url}/none.m3u'\n"
    (tmp_path / "config.yml").write_text(text)
    program = Program("--check", cwd=tmp_path)
    try:
        assert program.wait() == 1
        lines = program.output().splitlines()
    finally:
        program.close()
    assert lines[0] == "bad  failed  the origin answered 404"
    assert lines[1].startswith("one  ok  video/mp2t")
