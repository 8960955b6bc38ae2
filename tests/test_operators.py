"""Logs and metrics for an operator, with a real server, origin, signals and sockets."""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import pipe
from tests import media
from tests.origin import Origin, Playlist, StallHeaders, Status
from tests.program import Service, eventually
from tests.server import BROWSER, TIMEOUT, Site, Watch
from tests.test_docs import blocks, section
from tests.test_pages import Key, metric, metrics
from tests.test_readme import promtool
from tests.threads import Task

Serve = Callable[..., Site]
SEGMENTS = 30  # on one timeline, one second each


def live(origin: Origin, name: str = "news", **options: Any) -> Playlist:
    return origin.add(Playlist(name, media.ts_segments(SEGMENTS), mode="live", **options))


def states(site: Site) -> dict[str, str]:
    """The state of each stream in /status."""
    return {each["stream"]: each["state"] for each in site.get("/status").json["streams"]}


#### A reload ####


def reload(site: Site, config: pipe.Config) -> None:
    """Reload this configuration, as after SIGHUP."""
    pipe.reload(site.server, lambda: config)


def test_reload_of_an_unchanged_file_keeps_all_failures(
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
    assert broken.taken == 2, "the failed start or the order of the addresses is forgotten"


def test_reload_forgets_only_the_failures_of_a_changed_stream(origin: Origin, serve: Serve) -> None:
    origin.fault("/*.m3u8", Status(503), times=None)
    site = serve({name: f"{origin.url}/{name}.m3u8" for name in ("same", "other")})
    for path in ("/same", "/other"):
        assert site.get(path).status == 502
    other = replace(site.config.streams["other"], quality="worst")
    reload(site, replace(site.config, streams={**site.config.streams, "other": other}))
    assert states(site) == {"same": "failed", "other": "idle"}


def add_list(origin: Origin, **urls: str) -> str:
    """Serve a channel list of these streams; returns its address."""
    text = "#EXTM3U\n" + "".join(f"#EXTINF:-1,{name}\n{url}\n" for name, url in urls.items())
    return origin.add_file("/list.m3u", text.encode(), content_type="audio/x-mpegurl")


def test_new_channel_list_keeps_the_failures_of_unchanged_streams(
    origin: Origin, serve: Serve
) -> None:
    one, two = f"{origin.url}/one.m3u8", f"{origin.url}/two.m3u8"
    origin.fault("/one.m3u8", Status(503), times=None)
    site = serve({}, playlists={"tv": add_list(origin, one=one)})
    eventually(lambda: states(site) == {"one": "idle"}, "the list is loaded")
    assert site.get("/one").status == 502
    add_list(origin, one=one, two=two)
    reload(site, site.config)
    eventually(lambda: "two" in states(site), "the new list is loaded")
    assert states(site) == {"one": "failed", "two": "idle"}


NEWS, SPORT = "http://origin.example/secret/news.m3u8", "http://origin.example/secret/sport.m3u8"
# Each file is loaded after the one before; the text is the log line about the differences.
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


def test_reload_logs_the_changes(tmp_path: Path) -> None:
    with Service(tmp_path, {"news": NEWS}) as service:
        for number, (streams, more, words) in enumerate(FILES, 1):
            service.configure(streams, **more)
            service.send(signal.SIGHUP)
            service.wait_for_count("reloaded: ", number)
            (line,) = [line for line in service.lines if "reloaded: " in line][number - 1 :]
            assert line.rstrip().partition("reloaded: ")[2] == words
        assert "s3cret" not in "".join(service.lines)


#### A wrong token ####

TOKEN = "s3cret-token"
GUESS = "my-gu3ss"
PROXIES = {"token": TOKEN, "proxies": ["127.0.0.0/8"]}
GUESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "parameter": (f"/status?token={GUESS}", {}),
    "bearer": ("/status", {"Authorization": f"Bearer {GUESS}"}),
    "basic": (
        "/status",
        {"Authorization": f"Basic {base64.b64encode(f'tv:{GUESS}'.encode()).decode()}"},
    ),
    "stream": (f"/news?token={GUESS}", {}),
    "unknown path": (f"/nope?token={GUESS}", {}),
    "health, which is open": (f"/health?token={GUESS}", {}),
    "JSON of the front page, which is open": (f"/?token={GUESS}", {}),
}
NO_GUESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "no token": ("/status", {}),
    "empty token": ("/status?token=", {}),
    "empty password": ("/status", {"Authorization": f"Basic {base64.b64encode(b'tv:').decode()}"}),
    "right token": (f"/status?token={TOKEN}", {}),
    "right token beside another": (f"/status?token={GUESS}&token={TOKEN}", {}),
}


def guessers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The addresses in the warnings about wrong tokens."""
    found = []
    for record in caplog.records:
        match = re.fullmatch("wrong token from (.+)", record.getMessage())
        if match:
            assert record.levelno == logging.WARNING
            found.append(match[1])
    return found


@pytest.mark.parametrize(("path", "headers"), GUESSES.values(), ids=list(GUESSES))
def test_wrong_token_is_logged_with_the_address(
    serve: Serve, caplog: pytest.LogCaptureFixture, path: str, headers: dict[str, Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    site = serve({"news": NEWS}, server={"token": TOKEN})
    is_open = path.startswith(("/health", "/?"))
    assert site.get(path, **headers).status == (200 if is_open else 401)
    assert guessers(caplog) == ["127.0.0.1"]
    assert GUESS not in caplog.text
    assert headers.get("Authorization", "none").split()[-1] not in caplog.text


@pytest.mark.parametrize(("path", "headers"), NO_GUESSES.values(), ids=list(NO_GUESSES))
def test_request_without_a_guess_is_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, path: str, headers: dict[str, Any]
) -> None:
    """A browser first sends a request without a token, and then asks its user for it."""
    site = serve({"news": NEWS}, server={"token": TOKEN})
    site.get(path, **headers)
    assert guessers(caplog) == []


def test_wrong_token_of_a_trusted_client_is_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    site = serve({"news": NEWS}, server={"token": TOKEN, "trusted": ["127.0.0.0/8"]})
    assert site.get(f"/status?token={GUESS}").status == 200
    assert guessers(caplog) == []


def guess_from(site: Site, *addresses: str) -> None:
    """Send a request with a wrong token through a proxy from each of these addresses."""
    for address in addresses:
        headers: dict[str, Any] = {"X-Forwarded-For": address}
        assert site.get(f"/status?token={GUESS}", **headers).status == 401


def test_wrong_tokens_of_an_address_are_logged_once_in_ten_seconds(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.REPEAT_TIME == 10.0
    site = serve({"news": NEWS}, server=PROXIES)
    guess_from(site, *3 * ["203.0.113.7", "2001:470::7", "::ffff:203.0.113.7"])
    assert guessers(caplog) == ["203.0.113.7", "2001:470::7"]
    monkeypatch.setattr(pipe, "REPEAT_TIME", 0.0)  # as if ten seconds had passed
    guess_from(site, "203.0.113.7")
    assert guessers(caplog) == ["203.0.113.7", "2001:470::7", "203.0.113.7"]


def test_record_of_wrong_tokens_has_a_bounded_size(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with an IPv6 network has more addresses than a server can store."""
    monkeypatch.setattr(pipe, "GUESSERS", 2)
    site = serve({"news": NEWS}, server=PROXIES)
    first, *others = [f"2001:470::{number}" for number in range(1, 4)]
    guess_from(site, first, *others, others[-1], first)
    assert guessers(caplog) == [first, *others, first], "the oldest address must be forgotten"


def fail2ban(tool: str, *arguments: str | Path) -> str:
    """The output of a tool of fail2ban; fails if the tool finds a mistake."""
    if not shutil.which(tool):
        assert "CI" not in os.environ, "CI must install fail2ban"
        pytest.skip("needs fail2ban")
    command = [tool, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stderr
    return done.stdout


def fail2ban_files() -> tuple[str, str]:
    """README's filter and jail."""
    text = section("Security")
    rules, jail = re.findall(r"^```conf\n(.*?)^```$", text, re.M | re.S)
    names = re.findall(r"`/etc/fail2ban/(\w+\.d/[a-z.]+)`", text)
    assert names == ["filter.d/streampipe.conf", "jail.d/streampipe.conf"]
    return rules, jail


def test_fail2ban_accepts_the_jail_of_readme(tmp_path: Path) -> None:
    fail2ban("fail2ban-client", "--version")  # skips the test if fail2ban is missing
    folder = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", folder)
    (folder / "jail.d" / "defaults-debian.conf").unlink(missing_ok=True)  # needs sshd's log
    rules, jail = fail2ban_files()
    (folder / "filter.d" / "streampipe.conf").write_text(rules, encoding="utf-8")
    (folder / "jail.d" / "streampipe.conf").write_text(jail, encoding="utf-8")
    fail2ban("fail2ban-client", "-c", folder, "--test")
    commands = fail2ban("fail2ban-client", "-c", folder, "--dp")
    assert "['set', 'streampipe', 'addjournalmatch'" in commands
    assert "['start', 'streampipe']" in commands


def banned(log: Path, rules: Path) -> list[str]:
    """The addresses that fail2ban finds in a log with a filter, in the order of the log."""
    return fail2ban("fail2ban-regex", "--out", "ip", log, rules).split()


def test_fail2ban_finds_wrong_tokens_with_the_filter_of_readme(tmp_path: Path) -> None:
    """The filter works in a log with times, as in a terminal or container, and in the journal."""
    rules = tmp_path / "streampipe.conf"
    rules.write_text(fail2ban_files()[0], encoding="utf-8")
    guessed = ["203.0.113.7", "2001:470::7"]
    bait = "/x%20warning%20wrong%20token%20from%20198.51.100.9"
    with Service(tmp_path, {"news": NEWS}, level="debug", **PROXIES) as service:
        for address in guessed:
            headers: dict[str, Any] = {
                "X-Forwarded-For": address,
                "User-Agent": "wrong token from 198.51.100.9",
            }
            for path in (bait, f"/status?token={GUESS}"):
                with Watch(service.port, path, **headers) as answer:
                    assert answer.status == 401
        service.wait_for_count("wrong token", len(guessed))
        lines = service.lines
    assert sum("198.51.100.9" in line for line in lines) == len(guessed)
    log = tmp_path / "log"
    log.write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert banned(log, rules) == guessed
    # fail2ban's form of a journal entry; the date is only for the tool.
    entries = [re.sub(r"^([\d-]+ [\d:,]+) ", r"\1 tv python[77]: ", line) for line in lines]
    log.write_text("\n".join([*entries, ""]), encoding="utf-8")
    assert banned(log, rules) == guessed


#### Metrics of an outage ####


def state(site: Site, stream: str = "news") -> str:
    """The state of a stream in /metrics, where exactly one is 1."""
    samples = metrics(site)
    found = {
        dict(labels)["state"]: value
        for (name, labels), value in samples.items()
        if name == "streampipe_stream_state" and dict(labels)["stream"] == stream
    }
    assert set(found) == {"live", "waiting", "failed", "idle"}
    assert sorted(found.values()) == [0, 0, 0, 1]
    return max(found, key=lambda name: found[name])


def wait_for_state(site: Site, stream: str, name: str) -> None:
    eventually(lambda: state(site, stream) == name, f"{stream} is {name}")


def drops(site: Site, stream: str = "news") -> dict[str, float]:
    """Viewers of a stream that were disconnected, by reason."""
    return {
        dict(labels)["reason"]: value
        for (name, labels), value in metrics(site).items()
        if name == "streampipe_viewer_drops_total" and dict(labels)["stream"] == stream
    }


def test_stream_without_a_request_has_no_samples(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url, "idle": NEWS})
    assert not any("stream" in dict(labels) for _, labels in metrics(site))
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
        streams = {dict(labels).get("stream", "news") for _, labels in metrics(site)}
        assert streams == {"news"}


def test_metrics_have_the_state_of_a_stream(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.1, 0.2))
    news = live(origin, target_duration=1)
    held = origin.fault(news.path, StallHeaders())
    site = serve({"news": news.url}, timeout=5, linger=0, reconnect=2)
    viewer = Task(lambda: site.watch("/news"))
    held.wait_held()
    assert (state(site), metric(site, "upstreams", stream="news")) == ("waiting", 0)
    held.release()
    with viewer.result() as watch:
        assert watch.read(len(news.plain(2, 5))) == news.plain(2, 5)
        assert (state(site), metric(site, "upstreams", stream="news")) == ("live", 1)
        assert metric(site, "upstream_slots") == 1
        origin.stop()
        eventually(lambda: state(site) == "waiting", "the outage is shown")
        assert metric(site, "upstreams", stream="news") == 0, (
            "an upstream in trouble does not count"
        )
        assert metric(site, "upstream_slots") == 1, "the channel must keep its slot"
        assert watch.read_all()[1] is False
    eventually(lambda: state(site) == "failed", "the channel has failed")
    assert metric(site, "upstream_slots") == 0
    assert drops(site) == {"reconnect": 1}


def test_private_stream_is_live_and_then_idle(origin: Origin, serve: Serve) -> None:
    large = [media.padded(segment, 400_000) for segment in media.ts_segments(8)]
    film = origin.add(Playlist("film", large))
    site = serve({"film": film.url})
    with site.watch("/film") as viewer:
        assert viewer.read(media.PACKET)
        assert (state(site, "film"), metric(site, "upstreams", stream="film")) == ("live", 1)
    eventually(lambda: state(site, "film") == "idle", "the film is closed")
    assert drops(site, "film") == {}


def test_polling_client_that_an_outage_disconnects_counts_as_a_drop(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.1, 0.2))
    news = live(origin, target_duration=1)
    site = serve({"news": news.url}, timeout=3, reconnect=1)
    assert site.get("/news.m3u8").status == 200
    origin.stop()
    eventually(lambda: drops(site) == {"reconnect": 1}, "the client is counted")


def test_viewers_of_a_changed_stream_count_as_drops(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    assert site.get("/news.m3u8").status == 200
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
        changed = replace(site.config.streams["news"], headers={"X-Key": "new"})
        reload(site, replace(site.config, streams={"news": changed}))
        assert viewer.read_all()[1] is False
    eventually(lambda: drops(site) == {"reload": 2}, "both viewers are counted")


def test_viewer_of_a_source_that_cannot_be_resumed_counts_as_a_drop(
    origin: Origin, serve: Serve
) -> None:
    """fMP4 without segments or a length has no known position to continue from."""
    init, segments = media.fmp4(2)
    data = b"".join([init, *segments])
    address = origin.add_endless("/film", lambda: [data])
    site = serve({"film": f"httpstream://{address}"})
    with site.watch("/film") as viewer:
        assert viewer.read_all() == (data, False)
    eventually(lambda: drops(site, "film") == {"failed": 1}, "the viewer is counted")


def test_viewer_that_a_shutdown_disconnects_counts_as_a_drop(origin: Origin, serve: Serve) -> None:
    news = live(origin)
    site = serve({"news": news.url})
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
        assert site.channels.stop(TIMEOUT)
        assert viewer.read_all()[1] is False
        eventually(lambda: drops(site) == {"shutdown": 1}, "the viewer is counted")


def test_viewer_that_leaves_does_not_count_as_a_drop(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url}, linger=0)
    with site.watch("/news") as viewer:
        assert viewer.read(media.PACKET)
    eventually(lambda: state(site) == "idle", "the channel closes")
    assert drops(site) == {}


def test_metrics_have_limits_and_refusals(origin: Origin, serve: Serve) -> None:
    urls = {name: live(origin, name).url for name in ("one", "two", "three")}
    site = serve(urls, server={"max_viewers": 2, "max_upstreams": 1})
    assert (metric(site, "max_viewers"), metric(site, "max_upstreams")) == (2, 1)
    for limit in pipe.LIMITS:
        assert metric(site, "refusals_total", reason=limit) == 0
    with site.watch("/one") as viewer:
        assert viewer.read(media.PACKET)
        assert site.get("/two").status == 503
        assert metric(site, "refusals_total", reason="max_upstreams") == 1
        with site.watch("/one") as second:
            assert second.read(media.PACKET)
            assert site.get("/one").status == 503
            assert metric(site, "refusals_total", reason="max_viewers") == 1


def test_metrics_have_the_refusals_of_an_account(origin: Origin, serve: Serve) -> None:
    urls = {name: live(origin, name).url for name in ("one", "two")}
    site = serve({}, playlists={"tv": {"url": add_list(origin, **urls), "max_upstreams": 1}})
    eventually(lambda: set(states(site)) == set(urls), "the list is loaded")
    with site.watch("/one") as viewer:
        assert viewer.read(media.PACKET)
        assert site.get("/two").status == 503
    assert metric(site, "refusals_total", reason="account") == 1
    assert metric(site, "refusals_total", reason="max_upstreams") == 0


def test_refused_connections_are_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "SPARE_CONNECTIONS", 0)
    site = serve({}, server={"max_viewers": 1})
    with socket.create_connection(("127.0.0.1", site.port), TIMEOUT) as silent:
        silent.sendall(b"GET")
        assert b" 503 " in site.raw(b"GET /health HTTP/1.1\r\n\r\n")

    def count() -> int:
        """The number of refused connections; 0 if the page itself is refused."""
        page = site.get("/metrics").body.decode()
        found = re.search(r'^streampipe_refusals_total\{reason="connections"\} (\d+)', page, re.M)
        return int(found[1]) if found else 0

    eventually(lambda: count() >= 1, "the refused connection is counted")


def broken_file() -> NoReturn:
    raise pipe.ConfigError(["config.yml:1: streams: found a tab: use spaces"])


def test_metrics_have_the_last_reload(serve: Serve) -> None:
    site = serve({"news": NEWS})

    def last() -> tuple[float, float]:
        found = metrics(site)
        name = "streampipe_last_reload"
        result = found[f"{name}_successful", frozenset()]
        return result, found[f"{name}_timestamp_seconds", frozenset()]

    begun = last()
    assert begun[0] == 1, "the start must count as a reload"
    assert begun[1] == pytest.approx(time.time(), abs=TIMEOUT)
    pipe.reload(site.server, broken_file)
    failed = last()
    assert failed[0] == 0
    assert failed[1] > begun[1]
    reload(site, site.config)
    assert last()[0] == 1
    assert last()[1] > failed[1]


#### README's alerts ####

STEP = 15  # seconds between two scrapes; the pages are real, but the tests do not wait this long
INSTANCE = {"instance": "tv:8080", "job": "streampipe"}


class Scrapes:
    """Real pages of /metrics, as input series for promtool's tests of rules."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._pages: list[dict[Key, float]] = []

    def take(self, count: int = 1) -> None:
        """Read the page once, and use it for this many scrapes.

        Time stamps are converted to promtool's clock, which starts at 0.
        """
        page = metrics(self._site)
        shift = STEP * len(self._pages) - time.time()
        for key in page:
            if key[0].endswith("_timestamp_seconds"):
                page[key] += shift
        self._pages += count * [page]

    def time(self, back: int = 0) -> str:
        """The time of the newest scrape, or of the one `back` scrapes earlier."""
        return f"{STEP * (len(self._pages) - 1 - back)}s"

    @property
    def names(self) -> set[str]:
        return {name for page in self._pages for name, _ in page}

    def series(self) -> list[dict[str, str]]:
        keys = {key: None for page in self._pages for key in page}
        return [
            {
                "series": f"{name}{{{self._labels(dict(labels))}}}",
                "values": " ".join(self._value(page.get((name, labels))) for page in self._pages),
            }
            for name, labels in keys
        ]

    @staticmethod
    def _labels(labels: dict[str, str]) -> str:
        return ",".join(
            f"{name}={json.dumps(text)}" for name, text in {**labels, **INSTANCE}.items()
        )

    @staticmethod
    def _value(value: float | None) -> str:
        return "_" if value is None else f"{value:f}"


def alert(rules: Any, time: str, name: str, *found: dict[str, str]) -> dict[str, Any]:
    """A case for promtool: at this time, this alert fires with these labels, or not at all."""
    (rule,) = [rule for rule in rules["groups"][0]["rules"] if rule["alert"] == name]
    expected = []
    for labels in found:
        summary = rule["annotations"]["summary"]
        for label, text in labels.items():
            summary = summary.replace(f"{{{{ $labels.{label} }}}}", text)
        expected.append({"exp_labels": labels, "exp_annotations": {"summary": summary}})
    return {"eval_time": time, "alertname": name, "exp_alerts": expected}


@pytest.mark.long
def test_alerts_of_readme_fire_in_an_outage(
    origin: Origin, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "REOPEN_PAUSES", (0.1, 0.2))
    (text,) = [text for text in blocks("yaml") if "- alert: " in text]
    rules = yaml.safe_load(text)
    news, frozen = live(origin), live(origin, "frozen")
    urls = {"news": news.url, "frozen": frozen.url, "idle": NEWS}
    site = serve(urls, server={"max_viewers": 2}, timeout=12, reconnect=3)
    scrapes = Scrapes(site)
    waits, no_bytes = "StreamPipeViewersWait", "StreamPipeNoBytes"
    limit, failed = "StreamPipeLimitReached", "StreamPipeReloadFailed"
    tests: list[dict[str, Any]] = []
    two = [{"instance": "tv:8080", "stream": stream} for stream in ("news", "frozen")]

    viewer, other = site.watch("/news"), site.watch("/frozen")
    assert viewer.read(len(news.plain(2, 5))) == news.plain(2, 5)
    assert other.read(len(frozen.plain(2, 5))) == frozen.plain(2, 5)
    for number in range(5, 15):  # the frozen playlist does not change, which is not a failure yet
        news.advance()
        assert viewer.read(len(news.plain(number, number + 1))) == news.plain(number, number + 1)
        scrapes.take()
    tests.append(alert(rules, scrapes.time(), no_bytes, {**INSTANCE, "stream": "frozen"}))
    tests += [alert(rules, scrapes.time(), name) for name in (waits, limit, failed)]

    assert site.get("/news").status == 503
    origin.stop()
    for stream in ("news", "frozen"):
        wait_for_state(site, stream, "waiting")
    scrapes.take(4)
    tests.append(alert(rules, scrapes.time(), waits, *two))
    tests.append(alert(rules, scrapes.time(), limit, {**INSTANCE, "reason": "max_viewers"}))
    tests.append(alert(rules, scrapes.time(), failed))

    for watch in (viewer, other):
        assert watch.read_all()[1] is False
    for stream in ("news", "frozen"):
        wait_for_state(site, stream, "failed")
    pipe.reload(site.server, broken_file)
    scrapes.take(24)
    tests.append(alert(rules, scrapes.time(20), waits, *two))
    tests.append(alert(rules, scrapes.time(), waits))  # no request for five minutes
    tests.append(alert(rules, scrapes.time(), no_bytes))
    tests.append(alert(rules, scrapes.time(), failed, INSTANCE))

    used = set(
        re.findall(r"streampipe_\w+", " ".join(r["expr"] for r in rules["groups"][0]["rules"]))
    )
    assert len(used) == 6
    assert used <= scrapes.names
    (tmp_path / "rules.yml").write_text(text, encoding="utf-8")
    case = {"interval": f"{STEP}s", "input_series": scrapes.series(), "alert_rule_test": tests}
    content = {"rule_files": ["rules.yml"], "evaluation_interval": f"{STEP}s", "tests": [case]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", str(tmp_path / "tests.yml"))
