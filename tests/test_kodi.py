"""Kodi with its IPTV Simple Client, on a virtual screen: it loads the list, plays and zaps.

Kodi, server, origin and media are real.  The tests read the screen to see whether the picture
moves.  They are skipped if Kodi is missing, but fail if CI is set in the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import media
from tests.origin import Origin, Panel, Playlist, Segment, paced
from tests.program import eventually
from tests.server import Site
from tests.test_proxies import free_port

Serve = Callable[..., Site]

ADDON = "pvr.iptvsimple"
WIDTH, HEIGHT = 640, 360  # pixels of the screen
START_TIME = 90.0  # seconds that Kodi may take to start, and again to load the list
PICTURE_TIME = 30.0  # seconds that a picture may take to move
ZAPS = 10

# Kodi accepts JSON-RPC on a port of its own.
ADVANCED_SETTINGS = """<advancedsettings>
  <jsonrpc><tcpport>{port}</tcpport></jsonrpc>
</advancedsettings>
"""
ADDON_SETTINGS = """<settings version="2">
  <setting id="m3uPathType">1</setting>
  <setting id="m3uUrl">{address}</setting>
  <setting id="m3uCache">false</setting>
</settings>
"""

pytestmark = pytest.mark.long


class Screen:
    """An X server without a monitor."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        command = [
            "Xvfb", "-displayfd", str(writing), "-screen", "0", f"{WIDTH}x{HEIGHT}x24",
            "-nolisten", "tcp",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
        os.close(writing)
        with os.fdopen(reading) as answer:
            self.name = f":{answer.readline().strip()}"

    def picture_moves(self) -> bool:
        """Whether a tenth of the screen changes within half a second."""
        command = [
            "ffmpeg", "-nostdin", "-v", "error", "-f", "x11grab", "-framerate", "2",
            "-video_size", f"{WIDTH}x{HEIGHT}", "-i", self.name, "-frames:v", "2",
            "-pix_fmt", "gray", "-f", "rawvideo", "-",
        ]  # fmt: skip
        shots = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        size = WIDTH * HEIGHT
        first, second = shots[:size], shots[size : 2 * size]
        changed = sum(abs(a - b) > 8 for a, b in zip(first, second, strict=True))
        return changed > size / 10

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)


class Kodi:
    """A running Kodi whose IPTV Simple Client has a channel list at `address`."""

    def __init__(self, home: Path, address: str) -> None:
        self.screen = Screen()
        self._port = free_port()
        self._connection: socket.socket | None = None
        self._calls = 0
        self._received = ""  # text that has not been parsed yet
        userdata = home / ".kodi" / "userdata"
        addon = userdata / "addon_data" / ADDON
        addon.mkdir(parents=True)
        (userdata / "advancedsettings.xml").write_text(ADVANCED_SETTINGS.format(port=self._port))
        (addon / "settings.xml").write_text(ADDON_SETTINGS.format(address=address))
        environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "DISPLAY": self.screen.name,
            "LC_ALL": "C.UTF-8",
        }
        self._process = subprocess.Popen(
            ["kodi", "--standalone", "--windowing=x11"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self) -> None:
        """Connect once Kodi listens, and enable the add-on, which is disabled at first."""

        def listens() -> bool:
            try:
                self._connection = socket.create_connection(("127.0.0.1", self._port), 20)
            except OSError:
                return False
            return True

        eventually(listens, "Kodi listens", START_TIME)
        self.call("Addons.SetAddonEnabled", addonid=ADDON, enabled=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a JSON-RPC call; raises AssertionError with Kodi's error."""
        assert self._connection
        self._calls += 1
        request = {"jsonrpc": "2.0", "id": self._calls, "method": method, "params": parameters}
        self._connection.sendall(json.dumps(request).encode())
        while True:
            message = self._receive()
            if message.get("id") == self._calls:  # the others are notifications
                assert "result" in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message; Kodi sends messages without separators."""
        assert self._connection
        while True:
            try:
                message, end = json.JSONDecoder().raw_decode(self._received)
            except ValueError:
                self._received += self._connection.recv(65536).decode()
            else:
                self._received = self._received[end:].lstrip()
                return dict(message)

    def load_channels(self, group: str, count: int) -> dict[str, int]:
        """Wait until the group (`alltv` or `allradio`) has `count` channels; maps titles to ids."""
        found: dict[str, int] = {}

        def are_loaded() -> bool:
            try:
                result = self.call("PVR.GetChannels", channelgroupid=group)
            except AssertionError:  # the add-on is still starting
                return False
            for channel in result.get("channels", []):
                found[channel["label"]] = channel["channelid"]
            return len(found) == count

        eventually(are_loaded, f"Kodi loads its channels, {found}", START_TIME)
        return found

    def play(self, channel: int) -> None:
        self.call("Player.Open", item={"channelid": channel})

    def played(self) -> str:
        """The title and the codecs of the playing channel, as reported by Kodi."""
        labels = ["VideoPlayer.ChannelName", "VideoPlayer.VideoCodec", "VideoPlayer.AudioCodec"]
        found = self.call("XBMC.GetInfoLabels", labels=labels)
        return " ".join(found[label] for label in labels)

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        os.killpg(self._process.pid, signal.SIGKILL)  # Kodi's start script and Kodi
        self._process.wait(timeout=20)
        self.screen.close()


@pytest.fixture
def start_kodi(tmp_path: Path) -> Iterator[Callable[[str], Kodi]]:
    """Starts a Kodi that loads the channel list at an address."""
    for program in ("kodi", "Xvfb", "ffmpeg"):
        if not shutil.which(program):
            assert "CI" not in os.environ, f"CI must install {program}"
            pytest.skip(f"needs {program}")
    started: list[Kodi] = []

    def start(address: str) -> Kodi:
        started.append(Kodi(tmp_path, address))
        started[-1].start()
        return started[-1]

    yield start
    for kodi in started:
        kodi.close()


def moving_segments(count: int) -> list[Segment]:
    return [Segment(data, 2.0) for data in media.ts_segments(count, 2.0)]


def channels(origin: Origin) -> dict[str, object]:
    """Two live TS channels, a live fMP4 channel and a film."""
    init, parts = media.fmp4(60, 2.0)
    fragments = [Segment(data, 2.0) for data in parts]
    live: dict[str, Any] = {"mode": "live", "window": 6, "clock": True}
    ts = origin.add(Playlist("ts", moving_segments(60), **live))
    other = origin.add(Playlist("other", moving_segments(60), **live))
    fmp4 = origin.add(Playlist("fmp4", fragments, init=init, extension=".m4s", **live))
    film = origin.add(Playlist("film", moving_segments(60)))
    return {
        "ts": {"url": ts.url, "title": "Plain", "number": 1},
        "other": {"url": other.url, "title": "Other, with a comma", "number": 2},
        "fmp4": {"url": fmp4.url, "title": "Fragments", "number": 3},
        "film": {"url": film.url, "title": "Film", "number": 4},
    }


def test_kodi_loads_the_list_and_zaps(
    origin: Origin, serve: Serve, start_kodi: Callable[[str], Kodi]
) -> None:
    site = serve(channels(origin))
    zap(start_kodi(f"{site.url}/playlist.m3u"), ZAPS)


def zap(kodi: Kodi, times: int) -> None:
    """Switch `times` times between four channels."""
    numbers = list(kodi.load_channels("alltv", 4).items())
    assert len(numbers) == 4
    for zap in range(times):
        title, channel = numbers[zap % len(numbers)]
        kodi.play(channel)

        def is_playing(title: str = title) -> bool:
            return kodi.played().startswith(title)

        eventually(is_playing, f"{title} plays", PICTURE_TIME)
        eventually(kodi.screen.picture_moves, f"the picture of {title} moves", PICTURE_TIME)
        assert "h264" in kodi.played()


def test_kodi_zaps_within_an_account_of_one_connection(
    origin: Origin, serve: Serve, start_kodi: Callable[[str], Kodi]
) -> None:
    segments = media.ts_segments(60)
    panel = Panel(origin, "panel", source=lambda: paced(segments), redirects=True, connections=1)
    site = serve({}, playlists={"tv": panel.url})
    eventually(lambda: len(site.server.config.streams) == 4, "the list is loaded")
    zap(start_kodi(f"{site.url}/playlist.m3u"), 5)


def test_kodi_plays_radio(origin: Origin, serve: Serve, start_kodi: Callable[[str], Kodi]) -> None:
    """The play time of live AAC advances."""
    frames = media.aac_segments(60)
    playlist = origin.add(
        Playlist("aac", frames, extension=".aac", mode="live", window=6, clock=True)
    )
    site = serve({"radio": {"url": playlist.url, "title": "Radio", "number": 1}})
    kodi = start_kodi(f"{site.url}/playlist.m3u")
    (channel,) = kodi.load_channels("alltv", 1).values()
    kodi.play(channel)

    def has_played() -> bool:
        time = kodi.call("XBMC.GetInfoLabels", labels=["Player.Time"])["Player.Time"]
        return str(time) >= "00:05"

    eventually(has_played, "five seconds have been played", PICTURE_TIME)
    assert "aac" in kodi.played()
