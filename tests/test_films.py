"""Films: finite sources, whose viewer may pause, and whose origin may be down for a while.

A viewer gets all bytes of a film, or sees that it is incomplete. No segment is abandoned because
the origin was down or addresses expired. Everything is real, as in test_download.py.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest

import pipe
from tests import media
from tests.memory import traced_memory
from tests.origin import (
    Body,
    Break,
    Close,
    Fault,
    Origin,
    Playlist,
    Redirect,
    Status,
    Think,
    Validators,
)
from tests.program import eventually
from tests.server import Site, Watch
from tests.test_download import Outcome, download, opened
from tests.threads import Task

MIB = 1 << 20
SEGMENTS = 10

Serve = Callable[..., Site]


def film(*sizes: int) -> Playlist:
    """Ten segments, which have these sizes in turn."""
    segments = media.ts_segments(SEGMENTS)
    padded = [media.padded(data, sizes[n % len(sizes)]) for n, data in enumerate(segments)]
    return Playlist("film", padded)


def assert_whole(site: Site, viewer: Watch, expected: bytes) -> None:
    assert viewer.read_all() == (expected, True)
    assert site.channels.record("film").counts["gaps"] == 0


def wait_until_abandoned(site: Site) -> None:
    """Wait until the film's source, or one of its segments, is abandoned."""

    def is_abandoned() -> bool:
        gaps = site.channels.record("film").counts["gaps"]
        return gaps > 0 or site.get("/status").json["streams"][0]["state"] == "waiting"

    eventually(is_abandoned, "the source or a segment is abandoned")


#### Outages of the origin ####


@pytest.mark.long
def test_graceful_stop_of_the_origin_loses_nothing(origin: Origin, serve: Serve) -> None:
    """Running transfers continue to their ends, and new connections are refused meanwhile.

    Segment 3 is requested 0.6 s after the stop and tried for 2 s. Segment 4 is requested later,
    and still tried when the origin is back, before segment 2 has ended.
    """
    playlist = origin.add(film(200_000, 60_000, 600_000, 30_000))
    origin.rate = 100_000
    site = serve({"film": playlist.url}, timeout=2, threads=3)
    playing = Task(site.watch("/film").read_all)
    for number in range(3):  # they are requested at the same time, in any order
        origin.wait_for(playlist.segment_path(number))
    origin.drain()

    def sent_of_segment_2() -> int:
        return next(r.sent for r in origin.requests if r.path == playlist.segment_path(2))

    origin.wait_until(lambda: sent_of_segment_2() >= 330_000, "3.3 s of segment 2 were sent")
    origin.start()
    assert playing.result() == (playlist.plain(0, SEGMENTS), True)
    assert site.channels.record("film").counts["gaps"] == 0


BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Another process that uses all CPU time it can get."""
    with subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) as process:
        yield
        process.kill()


@pytest.mark.long
@pytest.mark.parametrize("run", range(20))
@pytest.mark.usefixtures("busy_machine")
def test_graceful_stop_on_a_busy_machine_loses_nothing(
    origin: Origin, serve: Serve, run: int
) -> None:
    """The origin stops at another moment in each run, while segments are requested."""
    playlist = origin.add(film(60_000, 30_000, 90_000, 20_000))
    origin.rate = 100_000
    site = serve({"film": playlist.url}, timeout=0.7, threads=3)
    playing = Task(site.watch("/film").read_all)
    origin.wait_for(playlist.segment_path(2 + run % 5))
    origin.drain()
    wait_until_abandoned(site)
    origin.start()
    assert playing.result() == (playlist.plain(0, SEGMENTS), True)
    assert site.channels.record("film").counts["gaps"] == 0


def test_answers_on_open_connections_do_not_prove_that_the_origin_works(
    origin: Origin, serve: Serve
) -> None:
    """A server that stops may answer on open connections although it refuses new ones.

    Here the connections of one segment fail while others are answered.
    """
    playlist = origin.add(film(30_000))
    down = origin.fault(playlist.segment_path(3), Close(), times=None)
    site = serve({"film": playlist.url}, timeout=0.7)
    playing = Task(site.watch("/film").read_all)
    wait_until_abandoned(site)
    down.clear()
    assert playing.result() == (playlist.plain(0, SEGMENTS), True)
    assert site.channels.record("film").counts["gaps"] == 0


@pytest.mark.parametrize("threads", [1, 4])
def test_long_failure_of_all_segments_loses_nothing(
    origin: Origin, serve: Serve, threads: int
) -> None:
    """The playlist is available, and all segments answer 503 for longer than each is tried."""
    playlist = origin.add(film(30_000))
    site = serve({"film": playlist.url}, timeout=0.7, threads=threads)
    down = [origin.fault(playlist.segment_path(n), Status(503), times=None) for n in range(3, 10)]
    playing = Task(site.watch("/film").read_all)
    wait_until_abandoned(site)
    for fault in down:
        fault.clear()
    assert playing.result() == (playlist.plain(0, SEGMENTS), True)
    assert site.channels.record("film").counts["gaps"] == 0


def test_file_that_breaks_near_its_end_is_not_fetched_again(origin: Origin, serve: Serve) -> None:
    """This holds even if the origin is down for a while after the break."""
    body = film(MIB).plain(0, SEGMENTS)
    address = origin.add_file("/film.ts", body)
    origin.fault("/film.ts", Break(len(body) * 9 // 10))
    origin.fault("/film.ts", Close(), times=3)
    site = serve({"film": address})
    assert site.watch("/film").read_all() == (body, True)
    assert sum(request.sent for request in origin.requests) == len(body)
    assert site.channels.record("film").counts["restarts"] == 0


#### Addresses expire ####


def paused_viewer(origin: Origin, site: Site) -> Watch:
    """A viewer that does not read, after its upstream has stopped sending requests."""
    viewer = site.watch("/film")
    seen = -1
    while seen != (seen := origin.count("*.ts")):
        with pytest.raises(AssertionError):
            origin.wait_for("*.ts", seen + 100, timeout=0.5)
    assert seen < SEGMENTS
    return viewer


@pytest.mark.parametrize("status", [401, 403, 404, 410])
@pytest.mark.parametrize("threads", [1, 4])
def test_film_continues_after_its_addresses_expired(
    origin: Origin, serve: Serve, status: int, threads: int
) -> None:
    playlist = origin.add(film(3 * MIB))
    playlist.renew_tokens()
    site = serve({"film": playlist.url}, threads=threads, timeout=2, ringbuffer_size=262_144)
    viewer = paused_viewer(origin, site)
    playlist.renew_tokens(status)
    assert_whole(site, viewer, playlist.plain(0, SEGMENTS))
    assert origin.count(playlist.path) == 2


@pytest.mark.parametrize("listed", [1, 5])
def test_film_that_became_shorter_does_not_begin_again(
    origin: Origin, serve: Serve, listed: int
) -> None:
    """It continues once its playlist lists the rest again."""
    playlist = origin.add(Playlist("film", media.ts_segments(SEGMENTS)))
    refusals = [
        origin.fault(playlist.segment_path(number), Status(403), times=None)
        for number in range(6, SEGMENTS)
    ]
    playing = Task(serve({"film": playlist.url}, timeout=2).watch("/film").read_all)
    refusals[0].wait()
    origin.add(Playlist("film", media.ts_segments()[:listed]))
    loads = origin.count(playlist.path)
    origin.wait_for(playlist.path, loads + 2)
    for refusal in refusals:
        refusal.clear()
    origin.add(playlist)
    body, is_complete = playing.result()
    assert body.replace(pipe.NULL_PACKET, b"") == playlist.plain(0, SEGMENTS)
    assert is_complete


FILE = b"".join(media.ts_segments(SEGMENTS))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Body(b"", "video/mp2t"), id="empty"),
        pytest.param(Body(FILE[: len(FILE) // 4], "video/mp2t"), id="a clip"),
        pytest.param(Redirect("/stream"), id="without a length"),
    ],
)
def test_file_that_is_opened_again_continues_only_with_the_same_file(
    origin: Origin, serve: Serve, answer: Fault
) -> None:
    origin.add_endless("/stream", lambda: [FILE])
    address = origin.add_file("/film.ts", FILE)
    outage = origin.fault("/film.ts", Break(len(FILE) // 2))
    refused = origin.fault("/film.ts", Status(403), times=None)
    playing = Task(serve({"film": address}, timeout=1, reconnect=30).watch("/film").read_all)
    outage.wait()
    origin.wait_for("/film.ts", 6)
    other = origin.fault("/film.ts", answer, times=2)
    refused.clear()
    other.wait(2)
    body, is_complete = playing.result()
    assert body.replace(pipe.NULL_PACKET, b"") == FILE
    assert is_complete


def test_rest_of_a_file_is_requested_although_the_panel_sends_no_validator(
    origin: Origin, serve: Serve
) -> None:
    """Xtream panels answer like this for films."""
    address = origin.add_file("/film.ts", FILE)
    half = len(FILE) // 2
    origin.habit("/film.ts", Validators("none", dated=False))
    origin.fault("/film.ts", Break(half))
    assert serve({"film": address}).watch("/film").read_all() == (FILE, True)
    _, second = origin.requests
    assert second.headers["range"] == f"bytes={half}-"
    assert "if-range" not in second.headers


def test_recording_that_grows_continues_when_it_is_opened_again(
    origin: Origin, serve: Serve
) -> None:
    """The recording is still being made."""
    half = len(FILE) // 2 // media.PACKET * media.PACKET
    address = origin.add_file("/film.ts", FILE[:half])
    origin.fault("/film.ts", Break(half // 2))
    refused = origin.fault("/film.ts", Status(403), times=None)
    playing = Task(serve({"film": address}, timeout=1, reconnect=30).watch("/film").read_all)
    origin.wait_for("/film.ts", 6)
    origin.add_file("/film.ts", FILE)
    refused.clear()
    body, is_complete = playing.result()
    assert body.replace(pipe.NULL_PACKET, b"") == FILE
    assert is_complete


def test_slate_in_segments_does_not_continue_a_file(origin: Origin, serve: Serve) -> None:
    address = origin.add_file("/film.ts", FILE)
    slate = origin.add(Playlist("slate", media.ts_segments(3)))
    origin.fault("/film.ts", Break(len(FILE) // 2))
    refused = origin.fault("/film.ts", Status(403), times=None)
    playing = Task(serve({"film": address}, timeout=1, reconnect=30).watch("/film").read_all)
    origin.wait_for("/film.ts", 6)
    shown = origin.fault("/film.ts", Redirect(slate.url), times=2)
    refused.clear()
    shown.wait(2)
    body, is_complete = playing.result()
    assert body.replace(pipe.NULL_PACKET, b"") == FILE
    assert is_complete


def test_wrong_total_of_a_range_costs_one_more_request(origin: Origin, serve: Serve) -> None:
    address = origin.add_file("/film.ts", FILE)
    origin.habit("/film.ts", Validators("none", dated=False))
    origin.fault("/film.ts", Break(len(FILE) // 2))
    wrong = ("Content-Range", f"bytes {len(FILE) // 2}-{len(FILE) - 1}/{len(FILE) + 1}")
    origin.fault("/film.ts", Status(206, headers=(wrong,)))
    assert serve({"film": address}).watch("/film").read_all() == (FILE, True)
    assert origin.count("/film.ts") == 3


def test_file_of_another_length_is_fetched_from_its_beginning(origin: Origin, serve: Serve) -> None:
    address = origin.add_file("/film.ts", FILE)
    origin.habit("/film.ts", Validators("none", dated=False))
    origin.fault("/film.ts", Break(len(FILE) // 2))
    refused = origin.fault("/film.ts", Status(503), times=None)
    playing = Task(serve({"film": address}).watch("/film").read_all)
    refused.wait()
    longer = FILE + FILE[: media.PACKET]
    origin.add_file("/film.ts", longer)
    refused.clear()
    assert playing.result() == (longer, True)
    *_, rest, whole = origin.requests
    assert "range" in rest.headers
    assert "range" not in whole.headers


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("missing", [(8, 9), (3, 4), (3, 4, 5, 6)], ids=["last", "two", "four"])
def test_run_of_missing_segments_does_not_hold_up_a_film(
    origin: Origin, serve: Serve, missing: tuple[int, ...], threads: int
) -> None:
    playlist = origin.add(Playlist("film", media.ts_segments(SEGMENTS)))
    for number in missing:
        origin.fault(playlist.segment_path(number), Status(404), times=None)
    site = serve({"film": playlist.url}, timeout=2, reconnect=30, threads=threads)
    answer = site.get("/film")
    rest = playlist.plain(0, missing[0])
    if missing[-1] < SEGMENTS - 1:
        rest = media.spliced(rest, playlist.plain(missing[-1] + 1, SEGMENTS))
    assert answer.body.replace(pipe.NULL_PACKET, b"") == rest
    assert answer.is_complete
    assert site.channels.record("film").counts["gaps"] == len(missing)


@pytest.mark.parametrize("missing", [(3,), (9,), (4, 5)], ids=["one", "last", "two"])
def test_missing_segments_among_others_are_gaps(
    origin: Origin, serve: Serve, missing: tuple[int, ...]
) -> None:
    playlist = origin.add(film(30_000))
    for number in missing:
        origin.fault(playlist.segment_path(number), Status(404), times=None)
    site = serve({"film": playlist.url}, timeout=1)
    edges = itertools.pairwise([-1, *missing, SEGMENTS])
    left = media.spliced(*(playlist.plain(before + 1, after) for before, after in edges))
    answer = site.get("/film")
    assert (answer.body, answer.is_complete) == (left, True)
    assert site.channels.record("film").counts["gaps"] == len(missing)


def test_film_with_only_refused_segments_is_answered_with_502(origin: Origin, serve: Serve) -> None:
    playlist = origin.add(film(30_000))
    origin.fault("*.ts", Status(403), times=None)
    answer = serve({"film": playlist.url}).get("/film")
    assert (answer.status, answer.json) == (502, {"error": "the origin answered 403"})


#### Memory ####


FILM = 256 * MIB
KERNEL = 8 * MIB  # bytes that the buffers of two sockets hold at most


@functools.cache
def compressed() -> bytes:
    """A film of null packets, compressed to half a MiB."""
    packer = zlib.compressobj(wbits=31)
    part = pipe.NULL_PACKET * (MIB // media.PACKET)
    packed = [packer.compress(part) for _ in range(FILM // len(part))]
    return b"".join([*packed, packer.flush()])


@pytest.mark.parametrize("kind", ["segment", "file"])
def test_compressed_film_does_not_fill_the_memory(origin: Origin, kind: str) -> None:
    """No viewer reads, so only the bytes in the buffers are decompressed."""
    text = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/film\n#EXT-X-ENDLIST\n"
    origin.add_file("/one.m3u8", text)
    origin.add_file("/film", compressed())
    encoding = Status(200, compressed(), (("Content-Encoding", "gzip"),))
    origin.fault("/film", encoding, times=None)
    address = {"segment": f"{origin.url}/one.m3u8", "file": f"httpstream://{origin.url}/film"}
    gc.collect()
    with traced_memory(), opened(address[kind], ringbuffer_size=MIB) as upstream:
        buffer = upstream.buffer
        with buffer._lock:
            assert buffer._not_empty.wait_for(lambda: buffer.length >= buffer.limit, 10)
        with pytest.raises(AssertionError):
            origin.wait_for("/film", 2, timeout=1.0)
        assert tracemalloc.get_traced_memory()[1] < pipe.BODY_LIMIT + 8 * MIB


#### Other answers of origins ####

BLOCKS = [bytes([n]) * 1_000 for n in range(50)]


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "no-length"])
def test_body_without_a_length_is_complete(origin: Origin, chunked: bool) -> None:
    origin.add_endless("/body", lambda: BLOCKS, chunked=chunked)
    assert download(origin, "/body") == Outcome(b"".join(BLOCKS))
    assert origin.count("/body") == 1


@pytest.mark.parametrize(
    ("chunked", "reset"),
    [
        pytest.param(True, False, id="chunked-closed"),
        pytest.param(True, True, id="chunked-reset"),
        pytest.param(False, True, id="no-length-reset"),
    ],
)
def test_body_without_a_length_that_breaks_is_fetched_again(
    origin: Origin, chunked: bool, reset: bool
) -> None:
    """An orderly close without a length cannot be distinguished from the end of the body."""
    origin.add_endless("/body", lambda: BLOCKS, chunked=chunked)
    origin.fault("/body", Break(20_000, reset=reset))
    assert download(origin, "/body") == Outcome(b"".join(BLOCKS))
    assert "range" not in origin.requests[-1].headers


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_burst_of_refusals_loses_nothing(origin: Origin, serve: Serve, status: int) -> None:
    """With a rate limit, or while a server starts, all segments fail for a while."""
    playlist = origin.add(film(30_000))
    origin.fault("*.ts", Status(status, headers=(("Retry-After", "1"),)), times=12)
    site = serve({"film": playlist.url})
    assert_whole(site, site.watch("/film"), playlist.plain(0, SEGMENTS))


def test_multipart_answer_is_not_used_for_the_range(origin: Origin) -> None:
    """An answer of multipart/byteranges, which was not requested, has no Content-Range."""
    body = bytes(range(250)) * 200
    origin.add_file("/body", body)
    origin.fault("/body", Break(20_000))
    parts = b"--x\r\nContent-Range: bytes 20000-49999/50000\r\n\r\n" + body[20_000:] + b"\r\n--x--"
    origin.fault("/body", Status(206, parts, (("Content-Type", "multipart/byteranges"),)))
    assert download(origin, "/body") == Outcome(body)


#### Missing segments ####


@pytest.mark.parametrize(
    "delays",
    [(0.0, 0.0, 0.0), (0.1, 0.1, 0.1), (0.3, 0.3, 0.3), (0.122, 0.105, 0.105)],
    ids=["at once", "soon", "late", "later than the last tries wait"],
)
def test_consecutive_missing_segments_lose_nothing_else(
    origin: Origin, serve: Serve, delays: tuple[float, ...]
) -> None:
    """The film continues after them, however long the origin takes to refuse them.

    With the last delays, each segment's last try begins when less time is left than the origin
    takes, the first segment's after those of the other two.
    """
    short = origin.add(Playlist("film", media.ts_segments()))
    for number, delay in enumerate(delays, 3):
        path = short.segment_path(number)
        origin.fault(path, Think(delay), Status(404), times=None)
    site = serve({"film": short.url}, timeout=2)
    answer = site.get("/film")
    rest = media.spliced(short.plain(0, 3), short.plain(6, 8))
    assert answer.body.replace(pipe.NULL_PACKET, b"") == rest
    assert answer.is_complete
