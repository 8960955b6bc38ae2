"""Makes the picture at the top of README: the page with all channels beside a channel that plays.

    python -m tests.make_picture [FILE]       default: .github/picture.png; takes a minute

An origin of its own serves the channels, a real `pipe.py` relays them to some viewers, and headless
Chromium (/usr/bin/chromium) looks at both pages. ffmpeg encodes what is on television, and leaves
the picture the 256 colors that keep it small.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, sync_playwright

if __name__ == "__main__":
    # Run as a script, Python looks for modules in this folder instead of the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.origin import Origin, Playlist, Segment
from tests.program import Service, eventually
from tests.server import Watch
from tests.test_browser import ARGUMENTS, CHROMIUM

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / ".github" / "picture.png"
LARGEST = 150_000  # bytes
SECONDS = 50  # of traffic, for the charts
SEGMENT, COUNT = 2, 8  # seconds of a segment; how many there are of a channel
HEIGHT, WIDE, NARROW, GAP = 740, 860, 400, 20  # pixels

# Name: group, title, the logo's color, viewers.
CHANNELS = {
    "world": ("News", "World News", "#c0392b", 3),
    "weather": ("News", "Weather Now", "#2980b9", 1),
    "sport": ("Sport", "Sport One", "#27ae60", 5),
    "cycling": ("Sport", "Cycling Live", "#f39c12", 0),
    "cinema": ("Films", "Cinema", "#8e44ad", 2),
    "classics": ("Films", "Classics", "#34495e", 0),
}

# What is on television.
SCENE = """
<style>body { margin: 0 }</style>
<svg xmlns="http://www.w3.org/2000/svg" width="1280" height="720">
  <linearGradient id="sky" x2="0" y2="1">
    <stop stop-color="#243b6b"/><stop offset=".6" stop-color="#e8743b"/>
    <stop offset=".8" stop-color="#fbd38d"/>
  </linearGradient>
  <rect width="1280" height="720" fill="url(#sky)"/>
  <circle cx="640" cy="410" r="90" fill="#fff3c4"/>
  <path d="M0 520 Q200 330 420 480 T800 470 T1280 400 V720 H0" fill="#4a3b5c"/>
  <path d="M0 600 Q260 440 560 580 T1280 540 V720 H0" fill="#2a2440"/>
  <rect x="60" y="590" width="620" height="80" rx="8" fill="#c0392b"/>
  <text x="90" y="646" font-family="sans-serif" font-size="40" font-weight="bold" fill="#fff">
    Good evening, everybody</text>
</svg>
"""


def segments(browser: Browser, folder: Path) -> list[Segment]:
    """The scene as a channel, encoded by ffmpeg."""
    still, rate = folder / "scene.png", "3M"
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_content(SCENE)
    page.screenshot(path=still)
    command = [
        *("ffmpeg", "-v", "error", "-loop", "1", "-framerate", "25", "-i", str(still)),
        *("-f", "lavfi", "-i", "sine=frequency=330", "-t", str(SEGMENT * COUNT)),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"),
        # Filler makes up what a still picture does not need.
        *("-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", rate),
        *("-x264-params", "nal-hrd=cbr", "-g", str(25 * SEGMENT), "-sc_threshold", "0"),
        *("-c:a", "aac", "-f", "segment", "-segment_time", str(SEGMENT), str(folder / "%d.ts")),
    ]
    subprocess.run(command, check=True)
    files = [folder / f"{number}.ts" for number in range(COUNT)]
    return [Segment(file.read_bytes(), float(SEGMENT)) for file in files]


def logo(title: str, color: str) -> bytes:
    """A picture in SVG with a title's first letter."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
        f'<rect width="64" height="64" rx="14" fill="{color}"/>'
        '<text x="32" y="45" font-family="sans-serif" font-size="36" font-weight="bold"'
        f' text-anchor="middle" fill="#fff">{title[0]}</text></svg>'
    ).encode()


def streams(origin: Origin, media: list[Segment]) -> dict[str, object]:
    configured: dict[str, object] = {}
    for number, (name, (group, title, color, _)) in enumerate(CHANNELS.items(), 1):
        playlist = origin.add(Playlist(name, media, mode="live", window=6, clock=True))
        picture = f"/{name}.svg"
        origin.add_file(picture, logo(title, color), content_type="image/svg+xml")
        shown = {"title": title, "group": group, "number": number, "logo": origin.url + picture}
        configured[name] = {"url": playlist.url, **shown}
    return configured


@contextlib.contextmanager
def watched(port: int) -> Iterator[None]:
    """Viewers of the channels, who throw away what they get."""
    names = [name for name, (*_, viewers) in CHANNELS.items() for _ in range(viewers)]
    threads = [threading.Thread(target=watch, args=(port, f"/{name}")) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:  # the server has ended, and what they read with it
        for thread in threads:
            thread.join()


def watch(port: int, path: str) -> None:
    with (
        contextlib.suppress(http.client.IncompleteRead, OSError),
        Watch(port, path) as viewer,
    ):
        while viewer.response.read1(65536):
            pass


#### What the browser sees ####


def look(browser: Browser, width: int, scheme: str) -> Page:
    size = {"width": width, "height": HEIGHT}
    return browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]


def shots(browser: Browser, url: str) -> list[bytes]:
    """The page with all channels in the light, and a channel that plays in the dark."""
    playing, everything = look(browser, NARROW, "dark"), look(browser, WIDE, "light")
    try:
        playing.goto(f"{url}/{next(iter(CHANNELS))}")
        time = "document.querySelector('video').currentTime"
        eventually(lambda: float(playing.evaluate(time)) > 2, "the channel plays", timeout=60)
    except Error:  # a server without watch pages offers a download
        playing.goto(url)
    everything.goto(url, wait_until="networkidle")
    return [everything.screenshot(), playing.screenshot()]


def side_by_side(browser: Browser, pictures: Sequence[bytes], target: Path) -> None:
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for picture in pictures
    )
    page = browser.new_page(viewport={"width": WIDE + NARROW + 3 * GAP, "height": HEIGHT + 2 * GAP})
    page.set_content(
        f"<style>body {{ margin: {GAP}px; display: flex; gap: {GAP}px; background: #8a94a3 }}"
        "img { border-radius: 12px }</style>" + images
    )
    page.screenshot(path=target)


def reduce_colors(source: Path, target: Path) -> None:
    palette = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), "-vf", palette, str(target)]
    subprocess.run(command, check=True)


def make_picture(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name, Origin() as origin, sync_playwright() as player:
        folder = Path(name)
        browser = player.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        shown = {"name": "Living room", "public_url": "http://192.168.1.20:8080"}
        service = Service(folder, streams(origin, segments(browser, folder)), **shown)
        with watched(service.port), service:
            threading.Event().wait(SECONDS)
            pictures = shots(browser, f"http://127.0.0.1:{service.port}")
        whole = folder / "whole.png"
        side_by_side(browser, pictures, whole)
        browser.close()
        reduce_colors(whole, target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the picture at the top of README.")
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE)
    target: Path = parser.parse_args().file
    make_picture(target)
    size = target.stat().st_size
    sys.stdout.write(f"{target}: {size} bytes\n")
    return 0 if size < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
