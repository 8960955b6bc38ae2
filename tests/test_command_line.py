"""Addresses and names on the command line, with a real program, origin and sockets."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import pipe
from tests import media
from tests.origin import OneAtATime, Origin, Playlist, Status
from tests.server import Watch
from tests.test_cli import HERE, Program, get_json

SECRET = "hunter2"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start the program in an empty folder; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Program:
            program = Program(*arguments, cwd=tmp_path)
            stack.callback(program.close)
            return program

        yield start


Run = Callable[..., Program]


def live(origin: Origin, name: str) -> str:
    playlist = Playlist(name, media.ts_segments(), mode="live", window=6, clock=True)
    return origin.add(playlist).url


def raw(origin: Origin, path: str) -> str:
    source = b"".join(media.ts_segments())
    return origin.add_endless(path, lambda: itertools.repeat(source))


def channel_list(origin: Origin, path: str, channels: Mapping[str, str]) -> str:
    lines = ["#EXTM3U"]
    for title, address in channels.items():
        lines += [f"#EXTINF:-1,{title}", address]
    return origin.add_file(path, "\n".join(lines).encode(), content_type="audio/x-mpegurl")


def names_of(program: Program) -> list[str]:
    return [stream["stream"] for stream in get_json(program.listening_port(), "/status")["streams"]]


def first_bytes(program: Program, path: str) -> bytes:
    with contextlib.closing(Watch(program.listening_port(), path)) as viewer:
        assert viewer.status == 200
        return viewer.read(188)


#### Streams ####


def test_address_is_served_without_a_file(origin: Origin, run: Run) -> None:
    address = live(origin, "news").replace("index.m3u8", "index.m3u8?key=hunter2")
    program = run(*HERE, address)
    assert program.wait_for(r"open (\S+)/ in a browser")
    assert names_of(program) == ["index"]
    assert first_bytes(program, "/index")[:1] == b"G"
    program.close()
    assert SECRET not in "\n".join(program.errors())


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["https://h.example/live/news.m3u8"], ["news"]),
        (["https://h.example/live/World%20News.m3u8?x=1"], ["world-news"]),
        (["http://h.example/live/u/p/4711.ts"], ["4711"]),
        (["https://h.example/"], ["stream"]),
        (["https://h.example/", "https://i.example"], ["stream", "stream-2"]),
        (["https://h.example/playlist.m3u8"], ["stream"]),
        (["http://h.example/a.ts", "http://i.example/a.ts"], ["a", "a-2"]),
        (["bbc=http://h.example/a.ts?x=1", "http://h.example/bbc"], ["bbc", "bbc-2"]),
        (["http://h.example/bbc", "bbc=http://h.example/a.ts"], ["bbc-2", "bbc"]),
        (["hls://https://h.example/news"], ["news"]),
    ],
)
def test_stream_is_named_after_its_address(run: Run, words: list[str], names: list[str]) -> None:
    assert names_of(run(*HERE, *words)) == names


def test_addresses_are_added_to_a_file(tmp_path: Path, origin: Origin, run: Run) -> None:
    streams = {"news": live(origin, "news")}
    (tmp_path / "mine.yml").write_text(json.dumps({"streams": streams}), encoding="utf-8")
    program = run(*HERE, "-c", "mine.yml", f"sport={raw(origin, '/sport')}")
    assert names_of(program) == ["news", "sport"]
    assert first_bytes(program, "/sport")[:1] == b"G"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["news=http://127.0.0.1:9/"], "an address was given"),
        (["http://127.0.0.1:9/tv.m3u"], "an address was given"),
        (["--demo"], "--demo was given"),
    ],
)
def test_default_file_that_is_not_read_is_logged(
    tmp_path: Path, run: Run, words: list[str], reason: str
) -> None:
    """Otherwise an operator would believe that its token protects the server."""
    tree = {"server": {"token": SECRET}}
    (tmp_path / "config.yml").write_text(json.dumps(tree), encoding="utf-8")
    program = run(*HERE, *words)
    program.listening_port()
    program.close()
    (line,) = [line for line in program.errors() if "config.yml" in line]
    expected = f"config.yml is not read, because {reason}: add -c config.yml to use both"
    assert line.endswith(f" warning {expected}")


@pytest.mark.parametrize("words", [["news=http://127.0.0.1:9/"], ["--demo"]])
def test_default_file_that_is_named_or_missing_is_not_logged(
    tmp_path: Path, run: Run, words: list[str]
) -> None:
    missing = run(*HERE, *words)
    missing.listening_port()
    (tmp_path / "config.yml").write_text("server: {name: TV}", encoding="utf-8")
    named = run(*HERE, "-c", "config.yml", *words)
    named.listening_port()
    for program in (missing, named):
        program.close()
        assert [line for line in program.errors() if "config.yml" in line] == []


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["news"], "news: this is not an address: begin the address with http:// or https://"),
        (
            ["news.m3u8"],
            "news.m3u8: this is not an address: begin the address with http:// or https://",
        ),
        (["http://[::1/live.m3u8"], "ADDRESS: the address has an invalid host"),
        (["tv=http://[::1/x"], "tv: the address has an invalid host"),
        (
            ["h.example/get.php?username=ada&password=hunter2"],
            "ADDRESS: this is not an address: begin the address with http:// or https://",
        ),
        (["http:/h.example/live/ada/hunter2/1.ts"], "ADDRESS: this is not an address"),
        (["ada:hunter2@h.example/tv.ts"], "ADDRESS: this is not an address"),
        (["file:///etc/passwd"], "ADDRESS: local files are never opened"),
        (["news=/etc/passwd"], "news: begin the address with http:// or https://"),
        (["http://h.example:188100/x"], "ADDRESS: the address has an invalid port"),
        (["News=http://h.example/"], "News: a stream name may only contain a-z, 0-9 and -"),
        (["health=http://h.example/"], "health: this name is reserved"),
        (["present.m3u", "missing.m3u"], "missing.m3u: there is no such file"),
        (["http:/h.example/u/hunter2/tv.m3u"], "tv.m3u: there is no such file"),
        (["tv=missing.m3u"], "tv: there is no such file"),
        (["a=http://h.example/", "a=http://i.example/"], "a: two addresses have this name"),
        (["-c", "mine.yml", "news=http://h.example/"], "streams.news: the command line adds"),
        (["-c", "mine.yml", "tv=http://h.example/get.php"], "playlists.tv: the command line adds"),
    ],
)
def test_mistake_is_reported_in_one_line(
    tmp_path: Path, run: Run, words: list[str], mistake: str
) -> None:
    tree = {
        "streams": {"news": "http://h.example/news"},
        "playlists": {"tv": {"url": "http://h.example/tv.m3u"}},
    }
    (tmp_path / "mine.yml").write_text(json.dumps(tree), encoding="utf-8")
    (tmp_path / "present.m3u").write_text("#EXTM3U\n", encoding="utf-8")
    program = run(*words)
    assert program.wait() == 2
    (line,) = program.errors()
    assert line.startswith(mistake)


#### Lists ####


@pytest.mark.parametrize("path", ["/get.php", "/channels.m3u", "/channels.m3u8"])
def test_address_of_a_list_serves_all_its_channels(origin: Origin, run: Run, path: str) -> None:
    channels = {"World News": live(origin, "news"), "Sport": raw(origin, "/sport")}
    program = run(*HERE, f"{channel_list(origin, path, channels)}?username=u&password={SECRET}")
    program.wait_for("loaded the list: 2 channels")
    assert names_of(program) == ["world-news", "sport"]
    assert first_bytes(program, "/world-news")[:1] == b"G"
    program.close()
    assert SECRET not in "\n".join(program.errors())


def test_local_list_serves_all_its_channels(tmp_path: Path, origin: Origin, run: Run) -> None:
    text = f"#EXTM3U\n#EXTINF:-1,Sport\n{raw(origin, '/sport')}\n"
    (tmp_path / "mine.m3u").write_text(text, encoding="utf-8")
    program = run(*HERE, "mine.m3u")
    program.wait_for("loaded the list: 1 channel")
    assert first_bytes(program, "/sport")[:1] == b"G"


#### --check ####

LINE = re.compile(r"(\S+)  (ok|failed)(, [^;]+?)?  (.+)")


def checked(program: Program) -> dict[str, str]:
    """The result of `--check` for each stream: ok or failed, and how many addresses work."""
    found = {}
    for line in program.output().splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        found[match[1]] = match[2] + (match[3] or "")
    return found


def test_check_opens_every_address_of_a_stream(tmp_path: Path, origin: Origin, run: Run) -> None:
    origin.fault("/bad*", Status(404), times=None)
    bad, good = f"{origin.url}/bad.m3u8", live(origin, "good")
    other = live(origin, "other")
    streams = {"one": [bad, good], "both": [good, other], "none": [bad, f"{origin.url}/bad"]}
    (tmp_path / "config.yml").write_text(json.dumps({"streams": streams}), encoding="utf-8")
    program = run("--check")
    assert program.wait() == 1
    assert checked(program) == {
        "one": "ok, 1 of 2: the first answered 404",
        "both": "ok, 2 of 2",
        "none": "failed",
    }


def test_check_of_names_opens_only_those(tmp_path: Path, origin: Origin, run: Run) -> None:
    streams = {name: live(origin, name) for name in ("a", "b", "c")}
    (tmp_path / "config.yml").write_text(json.dumps({"streams": streams}), encoding="utf-8")
    program = run("--check", "c", "a")
    assert program.wait() == 0
    assert checked(program) == {"c": "ok", "a": "ok"}
    assert [request for request in origin.requests if request.path.startswith("/b/")] == []


def test_check_of_an_unknown_name_is_an_error(tmp_path: Path, run: Run) -> None:
    streams = {"news": "http://127.0.0.1:9/"}
    (tmp_path / "config.yml").write_text(json.dumps({"streams": streams}), encoding="utf-8")
    program = run("--check", "sport")
    assert program.wait() == 2
    assert program.errors() == ["sport: there is no stream of this name"]


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize(
    "word", ["localhost:8080/x", "h.example/news.m3u8", "news.m3u8", "localhost:8080"]
)
def test_check_of_an_address_without_a_scheme_is_an_error(
    tmp_path: Path, run: Run, word: str, has_file: bool
) -> None:
    if has_file:
        (tmp_path / "config.yml").write_text("server: {name: TV}", encoding="utf-8")
    program = run("--check", word)
    assert program.wait() == 2
    advice = "begin the address with http:// or https://"
    assert program.errors() == [f"{word}: this is not an address: {advice}"]


def test_check_that_crashes_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error within StreamPipe fails one address of a stream, and the line reports it."""

    def crash(*_: object) -> pipe.Channel:
        raise RuntimeError

    monkeypatch.setattr(pipe.Channels, "watch", crash)
    addresses = ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    stream = pipe.StreamSettings("news", addresses)
    assert pipe.run_check(pipe.Config(streams={"news": stream})) == 1
    assert capsys.readouterr().out == "news  failed  StreamPipe failed: see its log\n"
    works = pipe.Finding(True, "video/mp2t")
    crashed = pipe.Finding(False, "StreamPipe failed: see its log")
    words = "ok, 1 of 2: the second: StreamPipe failed: see its log  video/mp2t"
    assert pipe._summary([works, crashed]) == (True, words)


def test_check_of_an_address_needs_no_file(origin: Origin, run: Run) -> None:
    program = run("--check", f"news={live(origin, 'news')}")
    assert program.wait() == 0
    assert checked(program) == {"news": "ok"}


@pytest.mark.long
def test_check_respects_the_limit_of_an_account(origin: Origin, run: Run) -> None:
    """A panel that allows one connection refuses no check of its six channels."""
    origin.rate = 4_000_000
    channels = {f"Channel {number}": raw(origin, f"/c{number}") for number in range(6)}
    address = channel_list(origin, "/get.php", channels)
    panel = origin.fault("/c*", OneAtATime(origin, 458), times=None)
    program = run("--check", address)
    assert program.wait(60) == 0
    assert set(checked(program).values()) == {"ok"}
    assert panel.taken >= 6
    assert origin.peak("/c*") == 1


@pytest.mark.long
def test_check_retries_after_a_refusal_by_a_panel(origin: Origin, run: Run) -> None:
    """A panel may still count a connection that has just closed."""
    origin.fault("/news", Status(458), times=2)
    program = run("--check", raw(origin, "/news"))
    assert program.wait(60) == 0
    assert checked(program) == {"news": "ok"}
