"""A soak test: a real pipe.py, an origin in a separate process, viewers that join and leave.

    python tests/soak.py MINUTES [SEED]

Ten live channels move by the clock while their origin breaks, stalls and refuses some answers.
Viewers watch random channels for random times. The program prints the system's figures for the
server's process every five seconds. The exit status is 1 if threads, sockets, file descriptors or
memory do not return to their values at the start, if the log has an error that the origin's faults
do not explain, or if no viewer received media.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ == "__main__":  # for a script, Python looks in this folder instead of the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests import media
from tests.origin import Break, Close, Fault, Origin, Playlist, Stall, Status
from tests.program import Service
from tests.server import Watch

CHANNELS = 10
CROWD = 30  # viewers at once
WARM_UP = 10.0  # seconds before the first figures
LEAVE = 30.0  # seconds in which the figures must return to the start
PRINT = 5.0  # seconds between two lines
MORE_MEMORY = 60 << 20  # bytes that the process may grow by
FAULTS: tuple[Fault, ...] = (
    Status(503), Status(404), Close(), Close(reset=True), Break(1000), Stall(5000)
)  # fmt: skip


def serve_origin(pipe: Connection, seed: int) -> None:
    """Serve ten channels by the clock, with random faults, until the parent sends a message."""
    dice = random.Random(seed)
    segments = media.ts_segments()
    with Origin() as origin:
        playlists = [Playlist(f"c{n}", segments, mode="live", clock=True) for n in range(CHANNELS)]
        pipe.send([origin.add(playlist).url for playlist in playlists])
        while not pipe.poll(0.5):
            name = dice.choice(playlists).name
            what = dice.choice(["*.ts", "*.ts", "index.m3u8"])
            origin.fault(f"/{name}/{what}", dice.choice(FAULTS))
            if dice.random() < 0.1:
                origin.clear_faults()


@contextlib.contextmanager
def origin_process(seed: int) -> Iterator[dict[str, str]]:
    """The streams of an origin that runs in a separate process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_origin, args=(theirs, seed))
    process.start()
    try:
        yield {f"c{number}": url for number, url in enumerate(ours.recv())}
    finally:
        ours.send("end")
        process.join(20)
        process.kill()
        process.join()
        process.close()
        ours.close()
        theirs.close()


@dataclass(frozen=True)
class Figures:
    """The system's figures for the process."""

    threads: int
    sockets: int
    descriptors: int
    memory: int  # bytes

    @classmethod
    def of(cls, service: Service) -> Figures:
        return cls(service.threads, service.sockets, service.descriptors, service.memory)

    def __str__(self) -> str:
        return (
            f"{self.threads:4} threads {self.sockets:4} sockets {self.descriptors:4} descriptors"
            f" {self.memory / 2**20:7.1f} MiB"
        )

    def is_like(self, start: Figures) -> bool:
        """Whether the figures have returned to those at the start."""
        return (
            self.threads <= start.threads + 2
            and self.sockets <= start.sockets + 1
            and self.descriptors <= start.descriptors + 2
            and self.memory <= start.memory + MORE_MEMORY
        )


def visit(port: int, dice: random.Random, end: threading.Event) -> int:
    """Watch random channels one after the other, some only briefly; returns the bytes received."""
    received = 0
    while not end.is_set():
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            Watch(port, f"/c{dice.randrange(CHANNELS)}") as viewer,
        ):
            until = time.monotonic() + dice.expovariate(0.5)
            while time.monotonic() < until and not end.is_set():
                part = viewer.response.read1(dice.choice([188, 4096, 65536]))
                received += len(part) * (viewer.status == 200)
                if not part:
                    break
        end.wait(dice.uniform(0, 0.5))
    return received


def watch_figures(service: Service, seconds: float) -> None:
    began, pause = time.monotonic(), threading.Event()
    while (passed := time.monotonic() - began) < seconds:
        print_line(f"{passed:6.0f} s {Figures.of(service)}")
        pause.wait(min(PRINT, seconds - passed))


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run_crowd(service: Service, seconds: float, seed: int) -> int:
    """Let a crowd of viewers join and leave for this time; returns the bytes received."""
    end = threading.Event()
    with ThreadPoolExecutor(CROWD) as pool:
        visits = [
            pool.submit(visit, service.port, random.Random(f"{seed} {number}"), end)
            for number in range(CROWD)
        ]
        try:
            watch_figures(service, seconds)
        finally:
            end.set()
        return sum(each.result() for each in visits)


def wait_until_like(service: Service, start: Figures) -> Figures:
    deadline, pause = time.monotonic() + LEAVE, threading.Event()
    while not (figures := Figures.of(service)).is_like(start) and time.monotonic() < deadline:
        pause.wait(0.2)
    return figures


def troubles(service: Service) -> list[str]:
    """Lines of the log with errors that no fault of an origin explains."""
    words = ("Traceback", "died", "the feeder failed", "a request from ")
    return [line for line in service.lines if any(word in line for word in words)]


def soak(minutes: float, seed: int, folder: Path) -> bool:
    """Whether the process passes a soak of this many minutes, including the warm-up."""
    # Small windows are full after a minute; with larger ones, memory would grow for ten minutes.
    options = {"linger": 1, "timeout": 5, "reconnect": 5, "ringbuffer_size": 1 << 20}
    with (
        origin_process(seed) as streams,
        Service(folder, streams, options=options) as service,
    ):
        at_rest = Figures.of(service)
        run_crowd(service, WARM_UP, seed)
        warm = wait_until_like(service, at_rest)
        start = Figures(at_rest.threads, at_rest.sockets, at_rest.descriptors, warm.memory)
        print_line(f" start   {start}")
        received = run_crowd(service, 60 * minutes - WARM_UP, seed + 1)
        end = wait_until_like(service, start)
        print_line(f"   end   {end}, {received} bytes received by viewers")
        bad = troubles(service)
        print_line("\n".join(bad[:20] or ["no errors in the log"]))
    return end.is_like(start) and not bad and received > 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a server with viewers that join and leave.")
    parser.add_argument("minutes", type=float, help="at least 0.5")
    parser.add_argument("seed", type=int, nargs="?", default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if soak(arguments.minutes, arguments.seed, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
