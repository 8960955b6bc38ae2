"""Sound that comes apart from its picture: two playlists, put together by ffmpeg.

Packets are counted in what viewers get and in what the origin has: all of them have to be there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
from streamlink.session.session import Streamlink
from streamlink.stream.ffmpegmux import FFMPEGMuxer

import pipe
from tests import media
from tests.origin import Origin, Playlist, Segment, Stall, master
from tests.server import Site
from tests.test_cli import Program
from tests.threads import Task

Serve = Callable[..., Site]
LONG = 120.0  # seconds; more than any of these streams


@pytest.fixture(scope="session", autouse=True)
def _ffmpeg() -> None:
    """Needs ffmpeg; streamlink looks for it once, with a thread that idles for 10 s then."""
    if not FFMPEGMuxer.is_usable(Streamlink()):
        assert "CI" not in os.environ, "ffmpeg must be there"
        pytest.skip("needs ffmpeg")


def packets_of(data: bytes) -> Iterator[tuple[str, float]]:
    """Each packet's kind and presentation time in seconds."""
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                yield packet.stream.type, float(packet.pts * packet.time_base)


def count(data: bytes) -> Counter[str]:
    return Counter(kind for kind, _ in packets_of(data))


def times(data: bytes, kind: str) -> list[float]:
    return [time for found, time in packets_of(data) if found == kind]


@dataclass
class Apart:
    """A picture and its sound in playlists of their own."""

    origin: Origin
    picture: Playlist
    sound: Playlist

    @property
    def url(self) -> str:
        return self.named("apart")

    def named(self, name: str) -> str:
        """Its address on the origin."""
        return self.origin.add(master(name, {"360p": self.picture}, self.sound)).url

    def sent(self, first: int, stop: int) -> Counter[str]:
        """How many packets the origin has of each kind in these segments."""
        return count(self.picture.plain(first, stop)) + count(self.sound.plain(first, stop))


def film(origin: Origin, segments: int = 12, seconds: float = 1.0) -> Apart:
    picture = Playlist("picture", media.video_only_segments(segments, seconds))
    return Apart(origin, picture, Playlist("sound", media.audio_only_segments(segments, seconds)))


def live(origin: Origin, segments: int, seconds: float, listed: int = 3) -> Apart:
    """By the clock; ends with its media, so that all of it can be counted."""
    tracks = (
        media.video_only_segments(segments, seconds),
        media.audio_only_segments(segments, seconds),
    )
    picture, sound = (
        Playlist(name, [Segment(data, seconds) for data in track], mode="event", window=listed)
        for name, track in zip(("picture", "sound"), tracks, strict=True)
    )
    return Apart(origin, picture, sound)


#### Everything arrives ####


@pytest.mark.long
@pytest.mark.parametrize("seconds", [2.0, 6.0])
def test_live_channel_has_all_its_sound(origin: Origin, serve: Serve, seconds: float) -> None:
    apart = live(origin, round(60 / seconds), seconds)
    site = serve({"news": apart.url})
    apart.picture.run_by_clock()
    apart.sound.run_by_clock()
    viewer = site.watch("/news")
    body, is_complete = Task(viewer.read_all).result(LONG)
    assert is_complete
    assert count(body) == apart.sent(0, round(60 / seconds))
    assert site.get("/status").json["streams"][0]["restarts"] == 0


@pytest.mark.long
@pytest.mark.parametrize("track", ["picture", "sound"])
@pytest.mark.parametrize("silence", [5, 27])
def test_film_whose_track_stalls_is_whole(
    origin: Origin, serve: Serve, track: str, silence: float
) -> None:
    apart = film(origin)
    stall = origin.fault(f"/{track}/9.ts", Stall(1000), times=None)
    viewer = serve({"news": apart.url}, timeout=30).watch("/news")
    reading = Task(viewer.read_all)
    stall.wait_held()
    threading.Event().wait(silence)
    stall.release()
    body, is_complete = reading.result(LONG)
    assert is_complete
    assert count(body) == apart.sent(0, 12)


def dash_film(origin: Origin, segments: int = 12) -> str:
    """A static DASH manifest of a picture and its sound; segments count from 1."""
    sets = ""
    for name, kind in (("picture", "video/mp4"), ("sound", "audio/mp4")):
        is_video = name == "picture"
        init, parts = media.fmp4(segments, video=is_video, audio=not is_video)
        origin.add_file(f"/{name}/init.mp4", init)
        for number, part in enumerate(parts, 1):
            origin.add_file(f"/{name}/{number}.m4s", part)
        rate = 'codecs="avc1.42c00b" width="160" height="90"' if is_video else 'codecs="mp4a.40.2"'
        sets += (
            f'<AdaptationSet mimeType="{kind}" contentType="{kind[:5]}"><SegmentTemplate '
            f'media="/{name}/$Number$.m4s" initialization="/{name}/init.mp4" duration="1" '
            f'startNumber="1"/><Representation id="{name}" bandwidth="100000" {rate}/>'
            "</AdaptationSet>"
        )
    manifest = (
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" minBufferTime="PT1S" '
        f'mediaPresentationDuration="PT{segments}S" profiles="urn:mpeg:dash:profile:full:2011">'
        f"<Period>{sets}</Period></MPD>"
    )
    return origin.add_file("/film.mpd", manifest.encode(), content_type="application/dash+xml")


@pytest.mark.long
def test_dash_film_whose_sound_stalls_is_whole(origin: Origin, serve: Serve) -> None:
    """For longer than streamlink's time-out, and for less than the channel's patience."""
    address = dash_film(origin)
    stall = origin.fault("/sound/9.m4s", Stall(100), times=None)
    viewer = serve({"news": address}, timeout=4).watch("/news")
    reading = Task(viewer.read_all)
    stall.wait_held()
    threading.Event().wait(4.7)
    stall.release()
    body, is_complete = reading.result(LONG)
    assert is_complete
    assert count(body) == Counter(video=12 * media.FPS, audio=len(times(body, "audio")))
    assert times(body, "audio")[-1] == pytest.approx(times(body, "video")[-1], abs=0.1)


#### Nothing else ends a track ####


@pytest.mark.parametrize("track", ["picture", "sound"])
def test_track_that_cannot_go_on_is_no_end(origin: Origin, serve: Serve, track: str) -> None:
    """Its key changes and cannot be had: ffmpeg would go on with the other track, to its end."""
    apart = film(origin)
    lost = '#EXT-X-KEY:METHOD=AES-128,URI="/lost"'
    whole: Playlist = getattr(apart, track)
    parts = [Segment(whole.plain(n, n + 1), tags=(lost,) if n == 9 else ()) for n in range(12)]
    setattr(apart, track, Playlist(track, parts))
    viewer = serve({"news": apart.url}, timeout=1, reconnect=1).watch("/news")
    body, is_complete = viewer.read_all()
    assert not is_complete
    assert body


#### The temporary folder, where ffmpeg's FIFOs are ####

FOLDER = "needs a writable temporary folder: mount one at /tmp"


@pytest.mark.parametrize("make", [lambda origin: film(origin).url, dash_film], ids=["hls", "dash"])
def test_missing_temporary_folder_is_told(
    origin: Origin,
    serve: Serve,
    make: Callable[[Origin], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = serve({"news": make(origin)})
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    answer = site.get("/news")
    assert answer.status == 502
    assert FOLDER in answer.json["error"]
    assert pipe.run_check(site.config) == 1
    assert FOLDER in capsys.readouterr().out


@pytest.mark.parametrize("is_stalling", [False, True], ids=["plays", "stalls"])
def test_check_leaves_nothing_in_the_temporary_folder(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stalling: bool
) -> None:
    """Neither where a stream plays nor where its sound stalls and ffmpeg waits for it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    apart = live(origin, 8, 2.0)
    if is_stalling:
        origin.fault("/sound/*.ts", Stall(100), times=None)
    tree = {"streams": {"news": apart.url}, "options": {"timeout": 2.0 if is_stalling else 15.0}}
    (tmp_path / "config.yml").write_text(json.dumps(tree), encoding="utf-8")
    with contextlib.closing(Program("--check", cwd=tmp_path)) as program:
        assert program.wait() == is_stalling
        assert program.output().startswith(f"news  {'failed' if is_stalling else 'ok'}  ")
    assert list(folder.iterdir()) == []
