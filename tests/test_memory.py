"""What a channel that ended leaves behind: no memory, no thread, and no state that others wait for.

The program runs as a process of its own where its memory is measured.  Threads that cannot be
started stand for a system that allows no more of them (a pids limit, TasksMax of systemd).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import media
from tests.origin import Origin, Playlist
from tests.program import Service, eventually
from tests.server import Site, Watch

Serve = Callable[..., Site]

MIB = 1 << 20
SIZE = 15 * MIB  # bytes, a little less than a window holds
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads figures of Linux' kernel")


#### Memory ####


@pytest.fixture
def without_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that start from now on never look for cycles."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def zap(service: Service, path: str) -> None:
    """Watch a channel until SIZE of it has come, and leave it; waits until nothing is left of it."""
    with Watch(service.port, path) as viewer:
        assert (viewer.status, len(viewer.read(SIZE))) == (200, SIZE)
    eventually(lambda: not channels(service.port), "the channel ended")


def channels(port: int) -> list[dict[str, object]]:
    """All that the status page knows of."""
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
def test_zapping_through_large_channels_gives_memory_back(
    origin: Origin, tmp_path: Path, kind: Callable[[Origin, str], str]
) -> None:
    """Twenty, one after the other, of which each fills its window of 16 MiB."""
    streams = {f"tv{number}": kind(origin, f"tv{number}") for number in range(20)}
    options = {"linger": 0, "reconnect": 0}
    memory = []
    with Service(tmp_path, streams, options=options) as service:
        for name in streams:
            zap(service, f"/{name}")
            memory.append(service.memory // MIB)
    assert memory[-1] - memory[1] < 2 * SIZE // MIB, memory
