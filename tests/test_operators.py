"""What an operator learns of a running server; server, origin, signals and sockets are real."""

from __future__ import annotations

import base64
import copy
import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist, Status
from tests.program import Service, eventually
from tests.server import BROWSER, TIMEOUT, Site, Watch
from tests.test_docs import section

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
    """A browser begins without a token, and asks its person only then."""
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
    """A request with a wrong token through a proxy, from each of these."""
    for address in addresses:
        headers: dict[str, Any] = {"X-Forwarded-For": address}
        assert site.get(f"/status?token={GUESS}", **headers).status == 401


def test_wrong_tokens_are_one_line_in_ten_seconds_for_each_address(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.REPEAT_TIME == 10.0
    site = serve({"news": NEWS}, server=PROXIES)
    guess_from(site, *3 * ["203.0.113.7", "2001:470::7", "::ffff:203.0.113.7"])
    assert guessers(caplog) == ["203.0.113.7", "2001:470::7"]
    monkeypatch.setattr(pipe, "REPEAT_TIME", 0.0)  # as if they had passed
    guess_from(site, "203.0.113.7")
    assert guessers(caplog) == ["203.0.113.7", "2001:470::7", "203.0.113.7"]


def test_addresses_that_sent_wrong_tokens_cost_a_bounded_memory(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody with a network of IPv6 has more addresses than a server has memory."""
    monkeypatch.setattr(pipe, "GUESSERS", 2)
    site = serve({"news": NEWS}, server=PROXIES)
    first, *others = [f"2001:470::{number}" for number in range(1, 4)]
    guess_from(site, first, *others, others[-1], first)
    assert guessers(caplog) == [first, *others, first], "the oldest is forgotten"


def fail2ban(tool: str, *arguments: str | Path) -> str:
    """What one of fail2ban's tools prints; fails if the tool finds a mistake."""
    if not shutil.which(tool):
        assert "CI" not in os.environ, "fail2ban must be there"
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


def test_fail2ban_takes_the_jail_of_readme(tmp_path: Path) -> None:
    fail2ban("fail2ban-client", "--version")  # or skip before its files are needed
    folder = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", folder)
    (folder / "jail.d" / "defaults-debian.conf").unlink(missing_ok=True)  # wants a log of sshd
    rules, jail = fail2ban_files()
    (folder / "filter.d" / "streampipe.conf").write_text(rules, encoding="utf-8")
    (folder / "jail.d" / "streampipe.conf").write_text(jail, encoding="utf-8")
    fail2ban("fail2ban-client", "-c", folder, "--test")
    commands = fail2ban("fail2ban-client", "-c", folder, "--dp")
    assert "['set', 'streampipe', 'addjournalmatch'" in commands
    assert "['start', 'streampipe']" in commands


def banned(log: Path, rules: Path) -> list[str]:
    """The addresses that fail2ban finds in a log with a filter, in its order."""
    return fail2ban("fail2ban-regex", "--out", "ip", log, rules).split()


def test_fail2ban_finds_wrong_tokens_with_the_filter_of_readme(tmp_path: Path) -> None:
    """In a log with times, as a terminal or a container has it, and in systemd's journal."""
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
    # What fail2ban makes of an entry of the journal; the date is only for the tool.
    entries = [re.sub(r"^([\d-]+ [\d:,]+) ", r"\1 tv python[77]: ", line) for line in lines]
    log.write_text("\n".join([*entries, ""]), encoding="utf-8")
    assert banned(log, rules) == guessed
