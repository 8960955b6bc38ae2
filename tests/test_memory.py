"""An ended channel leaves no memory, no thread, and no state that blocks other channels.

The tests of memory run the program as a separate process.  The other tests simulate a system that
allows no further threads (a pids limit, TasksMax of systemd).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import media
from tests.origin import Origin, Playlist
from tests.program import Service, eventually
from tests.server import Site, Watch
from tests.threads import refuse_threads

Serve = Callable[..., Site]

MIB = 1 << 20
SIZE = 15 * MIB  # bytes, a little less than the size of a window
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads figures of the Linux kernel")


#### Memory ####


@pytest.fixture
def without_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the garbage collector in Python processes that start from now on."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def zap(service: Service, path: str) -> None:
    """Watch a channel for SIZE bytes, leave it, and wait until the channel has ended."""
    with Watch(service.port, path) as viewer:
        assert (viewer.status, len(viewer.read(SIZE))) == (200, SIZE)
    eventually(lambda: not channels(service.port), "the channel ended")


def channels(port: int) -> list[dict[str, object]]:
    """All channels in /status."""
    with Watch(port, "/status") as page:
        streams = json.loads(page.read_all()[0])["streams"]
        return [channel for stream in streams for channel in stream["channels"]]


def segmented(origin: Origin, name: str) -> str:
    segments = [media.padded(segment, SIZE // 3 + 1000) for segment in media.ts_segments()[:3]]
    return origin.add(Playlist(name, segments, mode="live", window=3)).url


def relayed(origin: Origin, name: str) -> str:
    return origin.add_endless(f"/{name}", lambda: itertools.cycle(media.ts_segments()))


def broken(origin: Origin, name: str) -> str:
    count = SIZE // len(media.ts_segments()[0]) + 2
    return origin.add_endless(
        f"/{name}", lambda: itertools.islice(itertools.cycle(media.ts_segments()), count)
    )


@linux_only
@pytest.mark.long
@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("kind", [segmented, relayed, broken])
def test_zapping_through_large_channels_frees_their_memory(
    origin: Origin, tmp_path: Path, kind: Callable[[Origin, str], str]
) -> None:
    """A viewer watches twenty channels one after the other; each fills its window of 16 MiB."""
    streams = {f"tv{number}": kind(origin, f"tv{number}") for number in range(20)}
    options = {"linger": 0, "reconnect": 0}
    memory = []
    with Service(tmp_path, streams, options=options) as service:
        for name in streams:
            zap(service, f"/{name}")
            memory.append(service.memory // MIB)
    # Less than four of twenty windows: the allocator keeps some freed memory, up to 45 MiB so far.
    assert memory[-1] - memory[1] < 4 * SIZE // MIB, memory


#### Threads that cannot be started ####

Fail = Callable[[str], contextlib.AbstractContextManager[None]]


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Within `no_thread("^feed-")`, threads whose names match cannot be started."""

    @contextlib.contextmanager
    def failing(pattern: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            refuse_threads(patch, pattern)
            yield

    return failing


def live(origin: Origin) -> str:
    return origin.add(Playlist("live", media.ts_segments(), mode="live", clock=True)).url


def film(origin: Origin) -> str:
    return origin.add(Playlist("film", media.ts_segments())).url


def relay(origin: Origin) -> str:
    origin.rate = 2_000_000
    return relayed(origin, "relay")


KINDS = [live, film, relay]


def assert_plays(site: Site) -> None:
    viewer = site.watch("/news")
    assert (viewer.status, viewer.read(media.PACKET)[:1]) == (200, b"G")
    viewer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_channel_whose_thread_cannot_be_started_is_removed(
    origin: Origin, serve: Serve, no_thread: Fail, kind: Callable[[Origin], str]
) -> None:
    site = serve({"news": kind(origin)}, server={"max_upstreams": 1, "max_viewers": 1}, linger=0)
    with no_thread("^feed-"):
        for _ in range(3):
            answer = site.get("/news")
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.json == {
                "error": "the server has too many threads: raise the limit of threads"
            }
    assert (channels(site.port), origin.count("*")) == ([], 0)
    assert site.ask("GET", "/health").json["viewers"] == 0
    assert_plays(site)


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_closes_without_a_closing_thread(
    origin: Origin, serve: Serve, no_thread: Fail, kind: Callable[[Origin], str]
) -> None:
    site = serve({"news": kind(origin)}, server={"max_upstreams": 1}, linger=0)
    with no_thread("^close-"):
        assert_plays(site)
        eventually(lambda: not channels(site.port), "the channel ended")
        origin.wait_connections(0)
    assert_plays(site)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (live, "^HLSStreamWorker-"),
        (live, "^HLSStreamWriter-"),
        (live, "-executor"),
        (film, "-executor"),
        (relay, "^pump-"),
    ],
)
def test_upstream_whose_threads_cannot_be_started_fails(
    origin: Origin, serve: Serve, no_thread: Fail, kind: Callable[[Origin], str], name: str
) -> None:
    site = serve({"news": kind(origin)}, linger=0, timeout=2)
    with no_thread(name):
        assert site.get("/news").status in (502, 503)
        eventually(lambda: not channels(site.port), "the channel is removed")
        origin.wait_connections(0)
    eventually(lambda: site.watch("/news").status == 200, "the failure is forgotten")


def test_connection_whose_thread_cannot_be_started_is_refused(
    origin: Origin, serve: Serve, no_thread: Fail
) -> None:
    site = serve({"news": live(origin)}, server={"max_viewers": 1})
    with no_thread("^viewer-"):
        for _ in range(3):
            answer = site.get("/news")
            assert (answer.status, answer.json) == (
                503, {"error": "there are too many connections"},
            )  # fmt: skip
            assert int(answer.headers["Retry-After"]) > 0
    assert_plays(site)
