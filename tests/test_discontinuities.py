"""Discontinuities of clocks and counters: StreamPipe signals them, and players continue.

`media.spliced` defines the added packets; these tests check their places and their effect.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pipe
from tests import media
from tests.media import PACKET
from tests.origin import Origin, Playlist, Segment, Status
from tests.server import Site
from tests.test_players import curl, mpv, run, vlc

BLOCKS = 11  # alternately of the programme and of an advertisement
SECONDS = 8.0  # of each block
PICTURES = round(SECONDS * media.FPS)  # of each block
QUICK = {"timeout": 2, "reconnect": 20, "linger": 0.1}

Serve = Callable[..., Site]

own_pids = pytest.mark.parametrize("own_pids", [True, False], ids=["own-pids", "same-pids"])


def jumps(data: bytes) -> list[tuple[int, int]]:
    """The unsignalled discontinuities of a PID's counter: positions in bytes, and PIDs."""
    found, last = [], dict[int, int]()
    for number, packet in enumerate(media.packets(data)):
        pid, counter = media.pid(packet), packet[3] & 0x0F
        is_announced = packet[3] & 0x20 and packet[4] and packet[5] & 0x80
        expected = last.get(pid, -1) + (packet[3] >> 4 & 1) & 0x0F
        if pid in last and pid != media.PID_NULL and not is_announced and counter != expected:
            found.append((number * PACKET, pid))
        last[pid] = counter
    return found


def notices(data: bytes) -> list[int]:
    """The PIDs of the packets without payload that signal a discontinuity."""
    return [media.pid(packet) for packet in media.packets(data) if media.is_notice(packet)]


#### Segments of separate muxers ####


@pytest.mark.parametrize("make", [media.ts_segments, media.audio_only_segments])
def test_counters_that_restart_in_each_segment_are_signalled(
    origin: Origin, serve: Serve, tmp_path: Path, make: Callable[[int], Sequence[bytes]]
) -> None:
    anew = [media.with_counters_from_zero(segment) for segment in make(12)]
    body, is_complete = (
        serve({"film": origin.add(Playlist("film", anew)).url}).watch("/film").read_all()
    )
    assert is_complete
    assert media.without_notices(body) == b"".join(anew)
    assert jumps(body) == []
    assert len(jumps(b"".join(anew))) > 12
    if make is media.ts_segments:
        assert "corrupt" in warnings_of_ffmpeg(tmp_path, b"".join(anew))
    assert "corrupt" not in warnings_of_ffmpeg(tmp_path, body)


def test_counters_that_continue_are_not_signalled(origin: Origin, serve: Serve) -> None:
    """This includes PIDs without packets at the end of a segment, and large segments."""
    segments = [media.padded(segment, 600_000) for segment in media.ts_segments(6)]
    body, _ = serve({"film": origin.add(Playlist("film", segments)).url}).watch("/film").read_all()
    assert body == b"".join(segments)


def warnings_of_ffmpeg(folder: Path, stream: bytes) -> str:
    file = folder / "stream.ts"
    file.write_bytes(stream)
    command = ["ffmpeg", "-v", "warning", "-i", str(file), "-map", "0", "-c", "copy"]
    done = subprocess.run(
        [*command, "-f", "null", "-"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stderr


#### A film with ten discontinuities, and players ####


def broadcast(seconds: float, own_pids: bool) -> list[bytes]:
    """Blocks of the programme, with the same advertisement between them."""
    programme = iter(media.ts_segments(BLOCKS // 2 + 1, seconds))
    (advertisement,) = media.advertisement_segments(seconds=seconds, own_pids=own_pids)
    return [advertisement if number % 2 else next(programme) for number in range(BLOCKS)]


def film(blocks: Sequence[bytes], seconds: float) -> Playlist:
    return Playlist("film", [Segment(data, seconds, discontinuity=True) for data in blocks])


@pytest.fixture
def address(request: pytest.FixtureRequest, origin: Origin, serve: Serve, own_pids: bool) -> str:
    """The address of a film with ten discontinuities, one every eight seconds."""
    blocks = broadcast(SECONDS, own_pids)
    return serve({"film": origin.add(film(blocks, SECONDS)).url}).url + "/film"


@own_pids
def test_discontinuities_of_all_pids_are_signalled(
    origin: Origin, serve: Serve, own_pids: bool
) -> None:
    blocks = broadcast(1.0, own_pids)
    assert len(jumps(b"".join(blocks))) > 10
    answer = serve({"film": origin.add(film(blocks, 1.0)).url}).get("/film")
    assert answer.body == media.spliced(*blocks)
    assert answer.is_complete
    assert jumps(answer.body) == []
    assert len(notices(answer.body)) == 4 * (BLOCKS - 1)


@pytest.mark.long
@own_pids
def test_ffmpeg_plays_a_film_with_discontinuities_without_errors(address: str) -> None:
    player = run("ffmpeg", "-nostdin", "-v", "warning", "-i", address, "-f", "null", "-")
    assert player.returncode == 0, player.stdout
    assert not re.search("corrupt|continuity|invalid|error", player.stdout, re.I), player.stdout


@pytest.mark.long
@own_pids
def test_vlc_plays_a_film_with_discontinuities(address: str, own_pids: bool) -> None:
    """VLC logs a change of tracks; if the tracks stay the same, it logs only losses."""
    log = vlc(address, 300, "--rate=8").stdout
    assert "Received first picture" in log, log
    assert "EOF reached" in log, log
    assert not re.search("discontinuity received|lost synchro|garbage", log), log
    for pid in (0x200, 0x201) if own_pids else ():
        assert log.count(f"enabling pid {pid} from program") >= BLOCKS // 2, log


@pytest.mark.long
@own_pids
def test_mpv_plays_a_film_with_discontinuities(
    address: str, own_pids: bool, tmp_path: Path
) -> None:
    """mpv keeps the tracks it chose, so it skips advertisements with PIDs of their own.

    If the clock of a track jumps, mpv restarts and drops some pictures, more at higher speeds.
    """
    player = mpv(
        address, 10_000, "--speed=4", "--framedrop=no", "--vo=image", "--vo-image-format=png",
        f"--vo-image-outdir={tmp_path}", "--msg-level=statusline=status",
        "--term-status-msg=sound of ${audio-params/samplerate}",
    )  # fmt: skip
    assert player.returncode == 0, player.stdout
    rates = [
        int(rate) for rate, _ in itertools.groupby(re.findall(r"sound of (\d+)", player.stdout))
    ]
    widths = Counter(int.from_bytes(file.read_bytes()[16:20], "big") for file in tmp_path.iterdir())
    if own_pids:
        assert rates == [48_000]
        assert widths == {160: 6 * PICTURES}
    else:
        assert rates == [48_000, 44_100] * 5 + [48_000]
        assert widths[160] > 6 * PICTURES / 2
        assert widths[240] > 5 * PICTURES / 4


@pytest.mark.long
@own_pids
def test_gstreamer_plays_a_film_with_discontinuities(address: str, tmp_path: Path) -> None:
    """It plays the film from a file.

    GStreamer 1.22 stalls now and then at a change of PIDs if the bytes before it arrive with
    pauses.  It does so with the same bytes from a plain HTTP server, too.
    """
    saved, picture, sound = (tmp_path / name for name in ("saved", "picture", "sound"))
    assert curl("--output", str(saved), address).returncode == 0
    size, rate = 16, 8000
    player = run(
        "gst-launch-1.0", "playbin", f"uri={saved.as_uri()}",
        f"video-sink=videoscale ! videoconvert ! video/x-raw,format=GRAY8,width={size},"
        f"height={size} ! filesink location={picture}",
        f"audio-sink=audioresample ! audioconvert ! audio/x-raw,format=U8,rate={rate},"
        f"channels=1 ! filesink location={sound}",
    )  # fmt: skip
    assert player.returncode == 0, player.stdout
    assert picture.stat().st_size == BLOCKS * PICTURES * size * size
    assert sound.stat().st_size == pytest.approx(BLOCKS * SECONDS * rate, rel=0.01)


#### Live ####


@own_pids
def test_discontinuities_are_signalled_to_early_and_late_viewers(
    origin: Origin, serve: Serve, own_pids: bool
) -> None:
    blocks = broadcast(1.0, own_pids)
    parts = [Segment(data, discontinuity=True) for data in blocks]
    live = origin.add(Playlist("live", parts, mode="live", window=5))
    site = serve({"news": live.url}, **QUICK)
    start, whole = media.spliced(*blocks[2:5]), media.spliced(*blocks[2:8])
    early = [site.watch("/news"), site.watch("/news")]
    assert [viewer.read(len(start)) for viewer in early] == [start, start]
    live.advance(3)
    size = len(whole) - len(start)
    assert [viewer.read(size) for viewer in early] == 2 * [whole[len(start) :]]
    late = site.watch("/news")
    expected = whole[-len(media.spliced(*blocks[4:8])) + len(blocks[4]) :]
    assert late.read(len(expected)) == expected
    live.end()
    assert [viewer.read_all() for viewer in (*early, late)] == 3 * [(b"", True)]
    assert jumps(expected) == []
    first = next(p for p in media.packets(expected) if p[3] & 0x10)
    assert media.pid(first) == 0
    assert media.first_picture(expected)[1]


def test_start_of_a_channel_is_not_a_discontinuity(origin: Origin, serve: Serve) -> None:
    first = Segment(media.ts_segments()[0], discontinuity=True)
    assert (
        serve({"film": origin.add(Playlist("film", [first])).url}).get("/film").body == first.data
    )


#### Seams and lost segments ####


def fail_over(origin: Origin, serve: Serve, backup: Sequence[bytes]) -> tuple[bytes, bytes]:
    """A viewer's bytes from the first address, and then from the second, after segment 4."""
    one = origin.add(Playlist("one", media.ts_segments(), mode="live"))
    two = origin.add(Playlist("two", backup, mode="live"))
    viewer = serve({"news": {"url": [one.url, two.url]}}, **QUICK).watch("/news")
    start = viewer.read(len(one.plain(2, 5)))
    origin.fault("/one/*", Status(404), times=None)
    two.advance(2)
    two.end()
    rest, is_complete = viewer.read_all()
    assert is_complete
    return start, rest


@own_pids
def test_switch_to_a_backup_of_another_encoder_is_signalled(
    origin: Origin, serve: Serve, own_pids: bool
) -> None:
    backup = media.advertisement_segments(8, own_pids=own_pids)
    start, rest = fail_over(origin, serve, backup)
    together = b"".join(backup[5:7])
    if own_pids:  # the counters of PAT and PMT continue by chance, as with many encoders
        assert start + rest == media.spliced(start, together)
    else:
        assert jumps(start + together)
        assert jumps(start + rest) == []
        assert notices(rest) == [0x100, 0x101]


def test_switch_to_a_backup_with_the_same_media_is_not_signalled(
    origin: Origin, serve: Serve
) -> None:
    _, rest = fail_over(origin, serve, media.ts_segments())
    assert rest == b"".join(media.ts_segments()[5:7])


def test_relay_with_another_clock_is_signalled(origin: Origin, serve: Serve) -> None:
    bodies = b"".join(media.ts_segments()[:3]), b"".join(media.advertisement_segments(3))
    left = itertools.chain(bodies, itertools.repeat(b""))
    address = origin.add_endless("/relay", lambda: [next(left)])
    expected = media.spliced(*bodies)
    assert serve({"news": address}, **QUICK).watch("/news").read(len(expected)) == expected
    assert len(notices(expected)) == 4


def test_relay_that_repeats_itself_continues_without_a_signal(origin: Origin, serve: Serve) -> None:
    segments = media.ts_segments()
    bodies = b"".join(segments[:4]), b"".join(segments[2:8])
    left = itertools.chain(bodies, itertools.repeat(b""))
    address = origin.add_endless("/relay", lambda: [next(left)])
    expected = b"".join(segments)
    assert serve({"news": address}, **QUICK).watch("/news").read(len(expected)) == expected


@pytest.mark.parametrize("lost", [1, 3])
def test_lost_segments_are_signalled(origin: Origin, serve: Serve, lost: int) -> None:
    playlist = origin.add(Playlist("film", media.ts_segments()))
    for number in range(3, 3 + lost):
        origin.fault(playlist.segment_path(number), Status(404), times=None)
    answer = serve({"film": playlist.url}, timeout=0.7).get("/film")
    assert answer.body == media.spliced(playlist.plain(0, 3), playlist.plain(3 + lost, 8))
    media.decode(answer.body)  # strict: fails if anything is damaged


def test_segments_that_were_never_listed_are_signalled(origin: Origin, serve: Serve) -> None:
    live = origin.add(Playlist("live", media.ts_segments(), mode="live", window=3))
    viewer = serve({"news": live.url}, **QUICK).watch("/news")
    start = viewer.read(len(live.plain(0, 3)))
    live.advance(5)
    live.end()
    rest, _ = viewer.read_all()
    assert start + rest == media.spliced(start, live.plain(5, 8))


#### Bytes that stay unchanged ####


@pytest.mark.parametrize("kind", ["fmp4", "aac"])
def test_nothing_is_added_to_other_containers(origin: Origin, serve: Serve, kind: str) -> None:
    init, parts = media.fmp4() if kind == "fmp4" else (None, media.aac_segments())
    jumping = [Segment(data, discontinuity=number == 4) for number, data in enumerate(parts)]
    extension = ".m4s" if kind == "fmp4" else ".aac"
    film = origin.add(Playlist("film", jumping, init=init, extension=extension))
    before, behind = b"".join(parts[:4]), b"".join(parts[4:])
    again = init or b""  # the media after the discontinuity may need it
    assert serve({"film": film.url}).get("/film").body == again + before + again + behind


def rest_after(*media_of: bytes, is_certain: bool = True, size: int = 1 << 20) -> bytes:
    """The output of a framer for the last of these bodies, with a jump before each of them."""
    framer = pipe.TsFramer()
    for data in media_of:
        framer.expect_jump(is_certain)
        out = [item for at in range(0, len(data), size) for item in framer.feed(data[at:][:size])]
    return b"".join(item for item in out if not isinstance(item, pipe.Join))


def packet(pid: int, counter: int, body: bytes = b"", *, starts: bool = False) -> bytes:
    """A packet with this payload, or with stuffing only."""
    head = bytes([0x47, 0x40 * starts | pid >> 8, pid & 0xFF])
    if not body:
        return head + bytes([0x20 | counter]) + b"\xb7\0" + b"\xff" * 182
    return head + bytes([0x10 | counter]) + body.ljust(184, b"\xff")


PES = b"\0\0\1\xe0\0\0\x80\0\0"


@pytest.mark.parametrize("size", [188, 1000, 1 << 20])
def test_signal_precedes_the_first_packet_of_each_pid(size: int) -> None:
    """Sound often continues within a unit, and DVB tables may appear anywhere."""
    segment = media.ts_segments()[0]
    late = packet(0x101, 9, b"within a unit") + packet(0x11, 3, b"\0\x42", starts=True)
    body = segment[: 3 * PACKET] + late + segment[3 * PACKET :]
    out = rest_after(segment, body, size=size)
    assert out == media.spliced(segment, body)[len(segment) :]
    assert notices(out) == [0, 0x1000, 0x100, 0x101, 0x11]


def test_signal_before_a_packet_without_payload_repeats_its_counter() -> None:
    """The PCR may have a packet of its own."""
    segment = media.ts_segments()[0]
    body = segment[: 2 * PACKET] + packet(0x100, 5) + packet(0x100, 6, PES, starts=True)
    out = rest_after(segment, body)
    assert out[2 * 2 * PACKET :][3] == 0x25
    assert out == media.spliced(segment, body)[len(segment) :]


def test_discontinuity_that_the_origin_signals_is_not_signalled_again() -> None:
    one, two = media.ts_segments()[0], media.ts_segments()[4]
    announced = media.spliced(one, two)[len(one) :]
    assert rest_after(one, announced, is_certain=False) == announced
    assert rest_after(one, announced) == announced


def test_discontinuities_of_null_packets_are_not_signalled() -> None:
    one, two = (media.padded(media.ts_segments()[n], 100_000) for n in (0, 4))
    assert media.PID_NULL not in notices(rest_after(one, two))


def test_expected_jump_is_signalled_only_if_it_happens() -> None:
    segments = media.ts_segments()
    assert rest_after(*segments[:2], is_certain=False) == segments[1]
    assert (
        rest_after(segments[0], segments[3], is_certain=False)
        == (media.spliced(segments[0], segments[3])[len(segments[0]) :])
    )


def test_packets_are_searched_only_for_a_while_for_a_missing_pid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For JUMP_SEARCH bytes only, the framer searches for the first packet of each PID."""
    looked_at = 0

    def count(data: bytes) -> int:
        nonlocal looked_at
        looked_at += 1
        return pid_of(data)

    pid_of = pipe.pid_of
    monkeypatch.setattr(pipe, "pid_of", count)
    silent = media.padded(without(0x101, media.ts_segments()[0]), 20_000_000)
    rest_after(silent, silent, size=1 << 16)
    assert looked_at < 2 * pipe.JUMP_SEARCH / PACKET + 1000


def without(pid: int, data: bytes) -> bytes:
    return b"".join(packet for packet in media.packets(data) if media.pid(packet) != pid)
