"""Separate playlists for sound and picture, which ffmpeg muxes.

Tests compare the numbers of packets that viewers get with those that the origin has.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
from streamlink.session.session import Streamlink
from streamlink.stream.ffmpegmux import FFMPEGMuxer

import pipe
from tests import media, test_faults
from tests.origin import (
    WEB_PAGE,
    Body,
    Fault,
    Origin,
    Playlist,
    Segment,
    Stall,
    StallHeaders,
    Status,
    master,
)
from tests.program import eventually
from tests.server import Site
from tests.test_cli import Program
from tests.test_download import join_all, opened
from tests.test_faults import Journal
from tests.threads import Task

Serve = Callable[..., Site]
journal = test_faults.journal
LONG = 120.0  # seconds; more than any of these streams


@pytest.fixture(scope="session", autouse=True)
def _ffmpeg() -> None:
    """Skip without ffmpeg. streamlink's check for it leaves a thread that idles for 10 s."""
    if not FFMPEGMuxer.is_usable(Streamlink()):
        assert "CI" not in os.environ, "ffmpeg must be installed"
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
    """Picture and sound, each in a playlist of its own."""

    origin: Origin
    picture: Playlist
    sound: Playlist

    @property
    def url(self) -> str:
        return self.add_master("apart")

    def add_master(self, name: str) -> str:
        """Add a master playlist to the origin; returns its address."""
        return self.origin.add(master(name, {"360p": self.picture}, self.sound)).url

    def sent(self, first: int, stop: int) -> Counter[str]:
        """The number of packets of each kind in these segments of the origin."""
        return count(self.picture.plain(first, stop)) + count(self.sound.plain(first, stop))


def film(origin: Origin, segments: int = 12, seconds: float = 1.0) -> Apart:
    picture = Playlist("picture", media.video_only_segments(segments, seconds))
    return Apart(origin, picture, Playlist("sound", media.audio_only_segments(segments, seconds)))


def fmp4_film(origin: Origin, segments: int = 12) -> Apart:
    picture, sound = (
        Playlist(name, parts, init=init, extension=".m4s")
        for name, (init, parts) in (
            ("picture", media.fmp4(segments, audio=False)),
            ("sound", media.fmp4(segments, video=False)),
        )
    )
    return Apart(origin, picture, sound)


def live(origin: Origin, segments: int, seconds: float, listed: int = 3) -> Apart:
    """A live channel that ends with its media, so that all of its packets can be counted."""
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
def test_film_is_complete_after_a_track_stalled(
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
def test_dash_film_is_complete_after_its_sound_stalled(origin: Origin, serve: Serve) -> None:
    """The stall is longer than streamlink's time-out, but shorter than the channel's patience."""
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


@pytest.mark.parametrize(
    "missing",
    [(4, 5, 6, 7), (30, 31, 32, 33), (38, 39)],
    ids=["at-the-start", "in-the-middle", "at-the-end"],
)
def test_film_plays_on_after_segments_of_its_sound_are_missing(
    origin: Origin, serve: Serve, missing: tuple[int, ...]
) -> None:
    apart = film(origin, 40)
    for number in missing:
        origin.fault(f"/sound/{number}.ts", Status(404), times=None)
    site = serve({"news": apart.url}, timeout=5, reconnect=10)
    body, is_complete = Task(site.watch("/news").read_all).result(LONG)
    assert is_complete
    found = count(body)
    assert found["video"] == 40 * media.FPS
    sent = apart.sent(0, 40)["audio"]
    assert found["audio"] >= sent * (40 - len(missing)) // 40 - 2


def test_film_resumes_after_the_addresses_of_its_sound_expired(
    origin: Origin, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some panels answer an expired address with 404."""
    monkeypatch.setattr(pipe, "FRESH_TIME", 0.0)
    apart = film(origin, 40)
    expired = origin.fault("/sound/2?.ts", Status(404), times=None)
    reading = Task(serve({"news": apart.url}, timeout=5, reconnect=10).watch("/news").read_all)
    origin.wait_for("/apart/master.m3u8", 2)
    expired.clear()
    body, is_complete = reading.result(LONG)
    assert is_complete
    found, sent = count(body), apart.sent(0, 40)
    assert 0 <= found["video"] - sent["video"] <= 1  # a seam may repeat one picture
    assert abs(found["audio"] - sent["audio"]) <= 3


#### Encrypted tracks, each with its own key ####

PICTURE_KEY, SOUND_KEY = bytes(range(16)), bytes(range(100, 116))


def encrypted_film(origin: Origin, **sound: Any) -> Apart:
    """A film whose tracks have different keys; `sound` has more options for the sound."""
    parts = media.audio_only_segments(12)
    return Apart(
        origin,
        Playlist("picture", media.video_only_segments(12), aes_key=PICTURE_KEY, pads_all=False),
        Playlist("sound", parts, aes_key=SOUND_KEY, **sound),
    )


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["bare", "line-break"])
def test_each_track_is_decrypted_with_its_key(origin: Origin, serve: Serve, end: bytes) -> None:
    apart = encrypted_film(origin, named_key=SOUND_KEY + end, pads_all=not end)
    site = serve({"news": apart.url})
    body, is_complete = site.watch("/news").read_all()
    assert is_complete
    assert count(body) == apart.sent(0, 12)
    assert site.get("/status").json["streams"][0]["gaps"] == 0


@pytest.mark.parametrize("key", [PICTURE_KEY, SOUND_KEY + SOUND_KEY], ids=["wrong", "aes-256"])
def test_sound_that_cannot_be_decrypted_is_left_out(
    origin: Origin, serve: Serve, journal: Journal, key: bytes
) -> None:
    apart = encrypted_film(origin, named_key=key)
    body, is_complete = serve({"news": apart.url}).watch("/news").read_all()
    assert is_complete
    assert count(body) == Counter(video=12 * media.FPS)
    journal.wait_for("news: no sound")


#### A track that is missing at the start ####


def film_without_its_sound(
    origin: Origin, serve: Serve, fault: Fault, path: str = "/sound/index.m3u8", **options: Any
) -> Site:
    origin.fault(path, fault, times=None)
    return serve({"news": film(origin).url}, **options)


MISSING: dict[str, Fault] = {
    "refused": Status(404),
    "page": Body(WEB_PAGE, "text/html"),
    "empty": Body(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n"),
    "silent": StallHeaders(),
}


@pytest.mark.parametrize("kind", MISSING)
def test_picture_plays_without_its_missing_sound(origin: Origin, serve: Serve, kind: str) -> None:
    site = film_without_its_sound(origin, serve, MISSING[kind], timeout=4)
    viewer = site.watch("/news")
    viewer.read(188)
    (channel,) = site.get("/status").json["streams"][0]["channels"]
    assert channel["note"] == "no sound"
    body, is_complete = viewer.read_all()
    assert is_complete
    assert count(body) == Counter(video=12 * media.FPS)


def test_sound_whose_segments_are_missing_is_left_out(origin: Origin, serve: Serve) -> None:
    site = film_without_its_sound(origin, serve, Status(404), "/sound/*.ts", timeout=10)
    body, is_complete = site.watch("/news").read_all()
    assert is_complete
    assert count(body) == Counter(video=12 * media.FPS)


def test_reopened_channel_stays_without_its_sound(origin: Origin, serve: Serve) -> None:
    """The sound stays out even if its playlist is back: players would not expect it."""
    stall = origin.fault("/picture/9.ts", Stall(1000), times=None)
    lost = origin.fault("/sound/index.m3u8", Status(404), times=None)
    site = serve({"news": film(origin).url}, timeout=2, reconnect=30)
    reading = Task(site.watch("/news").read_all)
    stall.wait_held()
    lost.clear()
    origin.wait_for("/apart/master.m3u8", 2)
    stall.clear()
    stall.release()
    body, is_complete = reading.result(LONG)
    assert is_complete
    assert set(count(body)) == {"video"}


def test_reopened_channel_stays_without_sound_if_ffmpeg_works_again(
    origin: Origin, serve: Serve, tmp_path: Path
) -> None:
    installed = shutil.which("ffmpeg")
    assert installed
    for path in ("/picture/[89].ts", "/picture/1?.ts"):
        origin.fault(path, Status(403), times=None)
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\nexit 1\n")
    ffmpeg.chmod(0o755)
    stream = {"url": film(origin).url, "streamlink": {"ffmpeg-ffmpeg": str(ffmpeg)}}
    site = serve({"news": stream}, timeout=2, reconnect=30)
    reading = Task(site.watch("/news").read_all)
    origin.wait_for("/picture/8.ts")
    ffmpeg.unlink()
    ffmpeg.symlink_to(installed)
    origin.wait_for("/apart/master.m3u8", 2)
    origin.clear_faults()
    body, is_complete = reading.result(LONG)
    assert is_complete
    assert count(body) == Counter(video=12 * media.FPS)


def test_sound_may_be_missing_from_a_master_within_a_master(origin: Origin, serve: Serve) -> None:
    """Its playlist is refused, or ffmpeg is missing."""
    inner = film(origin).url
    text = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000\n{inner}\n"
    outer = origin.add_file("/outer.m3u8", text.encode())
    origin.fault("/sound/index.m3u8", Status(404), times=None)
    without = {"streamlink": {"ffmpeg-ffmpeg": "/nonexistent"}}
    site = serve({"refused": outer, "ffmpeg": {"url": outer, **without}})
    notes = {}
    for name in ("refused", "ffmpeg"):
        viewer = site.watch(f"/{name}")
        viewer.read(188)
        streams = site.get("/status").json["streams"]
        (channel,) = next(s["channels"] for s in streams if s["stream"] == name)
        notes[name] = channel["note"]
        body, is_complete = viewer.read_all()
        assert is_complete
        assert count(body) == Counter(video=12 * media.FPS)
    assert notes == {"refused": "no sound", "ffmpeg": "no sound: install ffmpeg"}


def test_missing_picture_is_a_failure(origin: Origin, serve: Serve) -> None:
    origin.fault("/picture/index.m3u8", Status(404), times=None)
    answer = serve({"news": film(origin).url}).get("/news")
    assert answer.status == 502
    assert "404" in answer.json["error"]


def test_chosen_renditions_play_without_a_missing_one(origin: Origin, serve: Serve) -> None:
    """The first of two renditions is missing; the second one still plays with the picture."""
    apart = film(origin)
    second = origin.add(Playlist("second", media.audio_only_segments(12)))
    both = master("both", {"360p": apart.picture}, apart.sound)
    address = origin.add(both).url
    more = f'#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="sound",NAME="B",LANGUAGE="de",URI="{second.path}"\n'
    found = both.find(both.path)
    assert found
    both.override = found.body.replace(b"#EXT-X-STREAM", more.encode() + b"#EXT-X-STREAM")
    origin.fault("/sound/index.m3u8", Status(404), times=None)
    site = serve({"news": address}, streamlink={"hls-audio-select": ["*"]})
    body = site.get("/news").body
    assert count(body) == count(apart.picture.plain(0, 12)) + count(second.plain(0, 12))


#### Tracks that fail ####


@pytest.mark.parametrize("track", ["picture", "sound"])
def test_stream_breaks_off_if_a_track_cannot_continue(
    origin: Origin, serve: Serve, track: str
) -> None:
    """The new key of the track is missing. ffmpeg alone would continue with the other track."""
    apart = film(origin)
    lost = '#EXT-X-KEY:METHOD=AES-128,URI="/lost"'
    whole: Playlist = getattr(apart, track)
    parts = [Segment(whole.plain(n, n + 1), tags=(lost,) if n == 9 else ()) for n in range(12)]
    setattr(apart, track, Playlist(track, parts))
    viewer = serve({"news": apart.url}, timeout=3, reconnect=1).watch("/news")
    body, is_complete = viewer.read_all()
    assert not is_complete
    assert body


#### The temporary folder for ffmpeg's FIFOs ####

FOLDER = "needs a writable temporary folder: mount one at /tmp"


@pytest.mark.parametrize("make", [lambda origin: film(origin).url, dash_film], ids=["hls", "dash"])
def test_error_names_a_missing_temporary_folder(
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
    """This holds if the stream plays, and if its sound stalls and ffmpeg waits for it."""
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


#### Synchronization ####


@pytest.mark.parametrize("late", ["picture", "sound"])
@pytest.mark.parametrize("container", ["ts", "fmp4"])
def test_tracks_that_start_at_different_times_stay_synchronous(
    origin: Origin, serve: Serve, late: str, container: str
) -> None:
    """One playlist is three segments ahead, as if a cache were slow."""
    apart = film(origin) if container == "ts" else fmp4_film(origin)
    getattr(apart, late).drop(3)
    body = serve({"news": apart.url}).get("/news").body
    first = {kind: times(body, kind)[0] for kind in ("video", "audio")}
    expected = 3 if late == "picture" else -3
    assert first["video"] - first["audio"] == pytest.approx(expected, abs=0.05)
    last = [times(body, kind)[-1] for kind in ("video", "audio")]
    assert last[0] == pytest.approx(last[1], abs=0.1)


def test_sound_without_a_clock_starts_with_the_picture(origin: Origin, serve: Serve) -> None:
    """The sound is packed audio without tags, and the picture's clock starts at 12 s."""
    picture = Playlist("picture", media.video_only_segments(24)[12:])
    sound = Playlist("sound", media.aac_segments(12), extension=".aac")
    body = serve({"news": Apart(origin, picture, sound).url}).get("/news").body
    assert times(body, "audio")[0] == pytest.approx(times(body, "video")[0], abs=0.05)
    assert count(body) == count(picture.plain(0, 12)) + count(sound.plain(0, 12))


def test_clock_that_restarts_loses_no_sound(origin: Origin, serve: Serve) -> None:
    """The programme continues after an advertisement with another clock, in both tracks."""
    order = [*range(10, 16), *range(3), *range(16, 22)]
    picture, sound = (
        Playlist(name, [Segment(parts[n], discontinuity=n in (0, 16)) for n in order])
        for name, parts in (
            ("picture", media.video_only_segments(24)),
            ("sound", media.audio_only_segments(24)),
        )
    )
    apart = Apart(origin, picture, sound)
    body = serve({"news": apart.url}).get("/news").body
    assert count(body) == apart.sent(0, len(order))
    for kind in ("video", "audio"):
        assert times(body, kind) == sorted(times(body, kind))
        assert times(body, kind)[-1] - times(body, kind)[0] == pytest.approx(len(order), abs=0.2)


def test_every_chosen_rendition_arrives(origin: Origin, serve: Serve) -> None:
    """There are two languages, the second three segments late, and subtitles not asked for."""
    apart = film(origin)
    second = origin.add(Playlist("second", media.audio_only_segments(12)))
    second.drop(3)
    both = master("both", {"360p": apart.picture}, apart.sound)
    address = origin.add(both).url
    more = (
        '#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="sound",NAME="Second",LANGUAGE="de",'
        f'URI="{second.path}"\n'
        '#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="words",NAME="Words",URI="/words.m3u8"\n'
    )
    found = both.find(both.path)
    assert found
    both.override = found.body.replace(b"#EXT-X-STREAM", more.encode() + b"#EXT-X-STREAM")
    site = serve({"news": address}, streamlink={"hls-audio-select": ["*"]})
    body = site.get("/news").body
    with av.open(io.BytesIO(body)) as container:
        kinds = [stream.type for stream in container.streams]
        starts = [float(s.start_time * s.time_base) for s in container.streams if s.time_base]
    assert kinds == ["video", "audio", "audio"]
    assert starts[1:] == pytest.approx([starts[0], starts[0] + 3], abs=0.05)


#### Continuing after a failure ####


def assert_complete_with_few_repeats(body: bytes, apart: Apart, segments: int) -> None:
    """Assert that all packets arrive except up to 0.2 s that ffmpeg keeps.

    Up to two segments may arrive twice, because interrupted segments are fetched again.
    """
    for kind, sent in apart.sent(0, segments).items():
        kept = 0.2 * sent / segments
        assert sent - kept <= count(body)[kind] <= sent * (segments + 2) / segments, kind


@pytest.mark.parametrize("tracks", ["*", "sound", "picture"])
def test_film_with_separate_sound_continues_at_its_segment(
    origin: Origin, serve: Serve, journal: Journal, tracks: str
) -> None:
    """It neither starts again nor has a gap."""
    apart = film(origin, 20)
    stall = origin.fault(f"/{tracks}/12.ts", Stall(1000), times=None)
    viewer = serve({"news": apart.url}, timeout=5).watch("/news")
    stall.wait_held(2 if tracks == "*" else 1)
    stall.clear()
    origin.stop()
    journal.wait_for(r"address 1 of 1 \(\S+\): (?!recovered)")
    origin.start()
    body, is_complete = viewer.read_all()
    assert is_complete
    assert_complete_with_few_repeats(body, apart, 20)
    assert origin.count("/picture/3.ts") == origin.count("/sound/3.ts") == 1


def test_live_channel_with_separate_sound_continues_at_its_segment(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """Its playlists fail for a while; then it continues with the next segment for its viewers."""
    apart = live(origin, 20, 1.0, listed=8)
    viewer = serve({"news": apart.url}, streamlink={"hls-live-edge": 8}).watch("/news")
    away = [origin.fault(p.path, Status(404), times=None) for p in (apart.picture, apart.sound)]
    journal.wait_for(r"address 1 of 1 \(\S+\): (?!recovered)")
    for playlist in (apart.picture, apart.sound):
        playlist.advance(12)
        playlist.end()
    for fault in away:
        fault.clear()
    body, is_complete = viewer.read_all()
    assert is_complete
    assert_complete_with_few_repeats(body, apart, 20)


def test_lost_segments_of_tracks_are_counted(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """The playlists advance by ten segments but list eight; one of the sound's is a gap."""
    sounds = [Segment(data) for data in media.audio_only_segments(20)]
    sounds[11] = Segment(sounds[11].data, tags=("#EXT-X-GAP",))
    options: dict[str, Any] = {"mode": "live", "window": 8, "keep": 0}
    picture = Playlist("picture", media.video_only_segments(20), **options)
    sound = Playlist("sound", sounds, **options)
    site = serve({"news": Apart(origin, picture, sound).url}, streamlink={"hls-live-edge": 8})
    viewer = site.watch("/news")
    assert viewer.read(media.PACKET)
    picture.advance(10)
    sound.advance(10)
    journal.wait_for("news: . segments? lost between two loads of the playlist")

    def gaps() -> int:
        return int(site.get("/status").json["streams"][0]["gaps"])

    eventually(lambda: gaps() == 5, "two segments of each track and the gap are counted")
    assert site.get("/status").json["streams"][0]["state"] == "live"


def children() -> list[int]:
    """The process numbers of this process's children."""
    found = Path("/proc/self/task").glob("*/children")
    return [int(number) for file in found for number in file.read_text().split()]


def test_stream_continues_after_ffmpeg_was_killed(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    """ffmpeg has received all of the film, and the playlists have ended. A new ffmpeg continues."""
    apart = film(origin)
    viewer = serve({"news": apart.url}).watch("/news")
    origin.wait_for("/sound/11.ts")
    (ffmpeg,) = children()
    os.kill(ffmpeg, signal.SIGKILL)
    journal.wait_for(r"address 1 of 1 \(\S+\): ffmpeg failed")
    _, is_complete = viewer.read_all()
    assert is_complete


def test_closed_upstream_is_freed_without_garbage_collection(origin: Origin) -> None:
    address, before = film(origin).url, set(threading.enumerate())
    gc.collect()
    gc.disable()
    try:
        with opened(address) as upstream:
            assert upstream.read(5)
        closed = weakref.ref(upstream)
        del upstream
        join_all(before)
        assert closed() is None
    finally:
        gc.enable()
