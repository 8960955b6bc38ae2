"""Real players, as separate processes, with `python pipe.py` and real origins.

The tests of a missing player are skipped, but fail if CI is set in the environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import media
from tests.origin import PANELS, Origin, Panel, Playlist, paced
from tests.program import eventually
from tests.server import Site

PROGRAM = Path(__file__).parent.parent / "pipe.py"
TIMEOUT = 50.0  # seconds; longer than any player has to play

Serve = Callable[..., Site]


#### Players ####


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs a player until it exits; skips the test if the player is not installed."""
    if not shutil.which(command[0]):
        assert "CI" not in os.environ, f"CI must install {command[0]}"
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT,
        check=False,
        **more,
    )


def ffmpeg(address: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Decodes a stream with ffmpeg, which fails at the first error."""
    strict = ["-nostdin", "-v", "warning", "-xerror", "-err_detect", "explode"]
    return run("ffmpeg", *strict, "-i", address, "-t", str(seconds), "-f", "null", "-")


def frames(address: str, seconds: float, track: str) -> int:
    """The number of frames that ffmpeg decodes of a track ("v" or "a")."""
    player = run(
        "ffmpeg", "-nostdin", "-v", "error", "-xerror", "-i", address, "-t", str(seconds),
        "-map", f"0:{track}", "-f", "framecrc", "-",
    )  # fmt: skip
    assert player.returncode == 0, player.stdout
    return len(re.findall(r"^\d", player.stdout, re.MULTILINE))


def vlc(address: str, seconds: float, *more: str) -> subprocess.CompletedProcess[str]:
    """Plays without window and sound; as user `nobody` instead of root, which VLC refuses."""
    nobody = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    silent = ["--intf", "dummy", "--vout", "dummy", "--aout", "dummy", "--no-color"]
    command = ["cvlc", "-vv", *silent, *more, f"--run-time={seconds:g}", address, "vlc://quit"]
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)
        environment = {"HOME": home, "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        return run(*command, env=environment, cwd="/", **nobody)


def mpv(address: str, seconds: float, *more: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--no-config", "--msg-level=all=warn", "--term-status-msg="]
    return run("mpv", *quiet, "--vo=null", "--ao=null", *more, f"--length={seconds:g}", address)


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("curl", "--silent", "--show-error", *arguments)


#### The demo ####


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of a server that was started with --demo."""
    command = [sys.executable, str(PROGRAM), "--demo", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    ) as server:
        try:
            yield listening_address(server)
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=TIMEOUT)[1]
        finally:
            server.kill()
    assert server.returncode == 0, log
    assert not re.search("traceback|error|warning", log, re.IGNORECASE), log


def listening_address(server: subprocess.Popen[str]) -> str:
    assert server.stderr
    log = []
    for line in server.stderr:
        log.append(line)
        if found := re.search(r"listening on (\S+) port (\d+)", line):
            return f"http://{found[1]}:{found[2]}"
    raise AssertionError("".join(log))


@pytest.mark.long
def test_ffmpeg_plays_the_test_card(demo: str) -> None:
    player = ffmpeg(f"{demo}/test-card", 10)
    assert (player.returncode, player.stdout) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("track", "rate"), [("v", 25), ("a", 48_000 / 1024)], ids=["video", "audio"]
)
def test_no_frame_of_the_test_card_is_missing(demo: str, track: str, rate: float) -> None:
    assert frames(f"{demo}/test-card", 8, track) == pytest.approx(8 * rate, abs=2)


@pytest.mark.long
def test_vlc_plays_the_test_card(demo: str) -> None:
    player = vlc(f"{demo}/test-card", 10)
    log = player.stdout
    assert player.returncode == 0, log
    assert "Received first picture" in log
    assert "using audio decoder module" in log
    assert re.findall(".*(?:lost synchro|garbage|discontinuity).*", log) == []


@pytest.mark.alone  # mpv prints "Audio/Video desynchronisation" if others take the processor
@pytest.mark.long
def test_mpv_plays_the_test_card(demo: str) -> None:
    player = mpv(f"{demo}/test-card", 10)
    assert (player.returncode, player.stdout.strip()) == (0, "")


def test_curl_reads_the_health_page(demo: str) -> None:
    player = curl("--fail", f"{demo}/health")
    assert player.returncode == 0
    assert json.loads(player.stdout)["status"] == "ok"


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1"])
def test_curl_reads_the_head_of_an_answer(demo: str, version: str) -> None:
    player = curl(version, "--head", f"{demo}/test-card")
    status, *headers = player.stdout.rstrip().split("\n")
    assert player.returncode == 0
    assert status.split()[1] == "200"
    assert "content-type: video/mp2t" in map(str.lower, map(str.strip, headers))


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1"])
def test_curl_receives_packets(demo: str, version: str, tmp_path: Path) -> None:
    """The first three segments of the test card arrive; then `head` closes the connection."""
    file = tmp_path / "card.ts"
    size = 3 * 14_664
    command = f"curl -sN {version} {demo}/test-card | head -c {size} > {file}"
    assert run("sh", "-c", command).returncode == 0
    decoded = media.decode(file.read_bytes())
    assert decoded.starts_with_key
    assert decoded.video_frames == 3 * 48


#### A provider's list ####


@pytest.fixture
def imported(origin: Origin, serve: Serve) -> str:
    """The address of a playlist imported from a panel that combines all habits of panels."""
    segments = media.ts_segments(60)
    panel = Panel(origin, "panel-all", source=lambda: paced(segments), **PANELS["panel-all"])
    site = serve({}, playlists={"tv": panel.url})
    eventually(lambda: len(site.server.config.streams) == len(panel.titles), "the list is loaded")
    return f"{site.url}/playlist.m3u"


def assert_all_were_played(origin: Origin) -> None:
    """Checks that each channel was played once, although the panel allows one connection."""
    played = [r.path for r in origin.requests if "/edge/" in r.path and r.status == 200]
    assert [path.partition("?")[0] for path in played] == [
        f"/panel-all/edge/{number}.ts" for number in range(4)
    ]


@pytest.mark.alone
@pytest.mark.long
def test_mpv_plays_an_imported_list(origin: Origin, imported: str) -> None:
    player = mpv(imported, 3)
    assert (player.returncode, player.stdout.strip()) == (0, "")
    assert_all_were_played(origin)


@pytest.mark.long
def test_vlc_plays_an_imported_list(origin: Origin, imported: str) -> None:
    player = vlc(imported, 4)
    assert player.returncode == 0, player.stdout
    assert player.stdout.count("Received first picture") == 4
    assert_all_were_played(origin)


#### Other containers ####


def fmp4(**options: Any) -> Playlist:
    init, fragments = media.fmp4(12)
    return Playlist("fmp4", fragments, init=init, extension=".m4s", **options)


def aac(**options: Any) -> Playlist:
    frames = media.aac_segments(12)
    tagged = [media.id3_timestamp(number) + data for number, data in enumerate(frames)]
    return Playlist("aac", tagged, extension=".aac", **options)


def aes(**options: Any) -> Playlist:
    return Playlist("aes", media.ts_segments(12), aes_key=bytes(range(16)), **options)


def plain(**options: Any) -> Playlist:
    return Playlist("plain", media.ts_segments(12), **options)


CHANNELS = [plain, fmp4, aac, aes]


@pytest.mark.parametrize("channel", CHANNELS)
def test_ffmpeg_plays_finite_streams(
    origin: Origin, serve: Serve, channel: Callable[..., Playlist]
) -> None:
    site = serve({"film": origin.add(channel()).url})
    player = ffmpeg(f"{site.url}/film", 60)
    assert (player.returncode, player.stdout) == (0, "")
    track, rate = ("a", 48_000 / 1024) if channel is aac else ("v", media.FPS)
    assert frames(f"{site.url}/film", 60, track) == pytest.approx(12 * rate, abs=2)


@pytest.mark.long
@pytest.mark.parametrize("channel", CHANNELS)
def test_ffmpeg_plays_live_streams(
    origin: Origin, serve: Serve, channel: Callable[..., Playlist]
) -> None:
    playlist = origin.add(channel(mode="live", listed=3, window=12, clock=True))
    site = serve({"news": playlist.url}, linger=0)
    player = ffmpeg(f"{site.url}/news", 6)
    assert (player.returncode, player.stdout) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("channel", [fmp4, aac])
def test_vlc_recognizes_the_container(
    origin: Origin, serve: Serve, channel: Callable[..., Playlist]
) -> None:
    site = serve({"film": origin.add(channel()).url})
    player = vlc(f"{site.url}/film", 3)
    assert player.returncode == 0, player.stdout
    seen = "Received first picture" if channel is fmp4 else "using audio decoder module"
    assert seen in player.stdout, player.stdout
