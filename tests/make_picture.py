"""Makes the picture at the top of README, and screenshots of every page for a design review.

    python -m tests.make_picture [FILE]       default: .github/picture.png; takes a minute
    python -m tests.make_picture --pages FOLDER       takes a few minutes

The picture shows the page with all channels beside a channel that plays.  The script's origin
serves the channels, a real `pipe.py` relays them to some viewers, and headless Chromium
(/usr/bin/chromium) takes screenshots of the pages.  ffmpeg encodes the television programme, and
reduces the picture to 256 colors to keep it small.
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
    # For a script, Python looks for modules in this folder instead of the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.origin import Origin, Playlist, Segment, Status
from tests.program import Service, eventually
from tests.server import Watch
from tests.test_browser import ARGUMENTS, CHROMIUM

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / ".github" / "picture.png"
LARGEST = 150_000  # bytes
SECONDS = 50  # of traffic, for the charts
SEGMENT, COUNT = 2, 8  # seconds of a segment; segments of a channel
HEIGHT, WIDE, NARROW, GAP = 740, 860, 400, 20  # pixels

# Name: group, title, the logo's color, viewers.
CHANNELS = {
    "world": ("News", "World News", "#c0392b", 3),
    "weather": ("News", "Weather Now", "#2980b9", 1),
    "local": ("News", "Local News", "#16a085", 0),
    "sport": ("Sport", "Sport One", "#27ae60", 5),
    "cycling": ("Sport", "Cycling Live", "#f39c12", 0),
    "tennis": ("Sport", "Tennis", "#7f8c1d", 1),
    "cinema": ("Films", "Cinema", "#8e44ad", 2),
    "classics": ("Films", "Classics", "#34495e", 0),
    "series": ("Films", "Series", "#d35488", 0),
}

# The picture of every channel.
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
        # A still picture needs less than this bit rate: filler adds the rest.
        *("-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", rate),
        *("-x264-params", "nal-hrd=cbr", "-g", str(25 * SEGMENT), "-sc_threshold", "0"),
        *("-c:a", "aac", "-f", "segment", "-segment_time", str(SEGMENT), str(folder / "%d.ts")),
    ]
    subprocess.run(command, check=True)
    files = [folder / f"{number}.ts" for number in range(COUNT)]
    return [Segment(file.read_bytes(), float(SEGMENT)) for file in files]


def logo(title: str, color: str) -> bytes:
    """An SVG logo with the title's first letter."""
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
def viewing(port: int, names: Sequence[str]) -> Iterator[None]:
    """A viewer for each of these names, which discards the media."""
    threads = [threading.Thread(target=watch, args=(port, f"/{name}")) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:  # the server has ended, and with it the viewers' streams
        for thread in threads:
            thread.join()


def watch(port: int, path: str) -> None:
    with (
        contextlib.suppress(http.client.IncompleteRead, OSError),
        Watch(port, path) as viewer,
    ):
        while viewer.response.read1(65536):
            pass


#### The picture of README ####


def look(browser: Browser, width: int, scheme: str, height: int = HEIGHT) -> Page:
    size = {"width": width, "height": height}
    return browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]


def shots(browser: Browser, url: str) -> list[bytes]:
    """The page with all channels in light colors, and a channel that plays in dark colors."""
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
        names = [name for name, (*_, viewers) in CHANNELS.items() for _ in range(viewers)]
        with viewing(service.port, names), service:
            threading.Event().wait(SECONDS)
            pictures = shots(browser, f"http://127.0.0.1:{service.port}")
        whole = folder / "whole.png"
        side_by_side(browser, pictures, whole)
        browser.close()
        reduce_colors(whole, target)


#### Every page ####

GROUPS = [
    *("News", "Sport", "Films and series", "Kids", "Music", "Documentaries", "Regional"),
    *("Deutschland", "France", "España", "Shopping", "Radio"),
]
SHAPES = [(90, 30), (64, 64), (30, 60)]  # pixels of logos: wide, square, high
PLAYING, FAILING, WAITING = (1, 4, 5), (3, 6, 8, 9), 2  # streams, by number
LONG = "The very long title of channel {}, Donaudampfschifffahrtsgesellschaft live and in color"
RIGHT_TO_LEFT = "\u05e2\u05e8\u05d5\u05e5 {}"  # "channel" in Hebrew
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0"
# Streams, width, height.
SIZES = [
    *((count, width, height) for count in (1, 300) for width, height in ((390, 844), (1280, 720))),
    *((1, 1920, 1080), (300, 1920, 1080), (12, 1280, 720), (60, 1280, 720)),
    *((12, 390, 844), (8000, 390, 844), (8000, 1280, 720)),
]


def title_of(n: int) -> str:
    if n % 7 == 0:
        return LONG.format(n)
    if n % 11 == 0:
        return RIGHT_TO_LEFT.format(n)
    return f"Channel {n}"


def household(origin: Origin, media: list[Segment], count: int) -> dict[str, object]:
    """This many streams in groups: a third has a logo, another third has one that does not load."""
    configured: dict[str, object] = {}
    for n in range(1, count + 1):
        stream: dict[str, object] = {
            "url": f"{origin.url}/c{n}/index.m3u8",
            "title": title_of(n),
            "number": n,
            "group": GROUPS[(n - 1) * len(GROUPS) // max(count, 4 * len(GROUPS))],
        }
        if n % 3 == 0:
            width, height = SHAPES[n % 9 // 3]
            color = f"hsl({n * 37 % 360},60%,45%)"
            drawn = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
                f'<rect width="100%" height="100%" rx="6" fill="{color}"/></svg>'
            )
            address = f"/logo{n}.svg"
            origin.add_file(address, drawn.encode(), content_type="image/svg+xml")
            stream["logo"] = origin.url + address
        elif n % 3 == 1:
            stream["logo"] = f"{origin.url}/none{n}.svg"
        if n in PLAYING or n == WAITING:
            origin.add(Playlist(f"c{n}", media, mode="live", window=6, clock=True))
        configured[f"s{n}"] = stream
    return configured


def pages_of(count: int, *, is_well: bool) -> dict[str, str]:
    """The pages to show: the path by the name for the file."""
    if is_well:
        pages = {"list": "/", "watch": "/s1"}
        if count > 60:
            pages |= {"group": "/?group=Sport", "search": "/?q=channel+21", "number": "/?q=217"}
        return pages
    pages = {"list": "/", "nobody": "/nobody"}
    if count > 1:
        pages |= {"watch": f"/s{FAILING[0]}", "waiting": f"/s{WAITING}"}
    return pages


def take_shots(
    browser: Browser, port: int, folder: Path, size: tuple[int, int, int], *, is_well: bool
) -> None:
    count, width, height = size
    for scheme in ("light", "dark"):
        for name, path in pages_of(count, is_well=is_well).items():
            page = look(browser, width, scheme, height)
            page.goto(f"http://127.0.0.1:{port}{path}")
            page.wait_for_timeout(3000)
            state = "well" if is_well else "trouble"
            page.screenshot(path=folder / f"{count}-{width}-{name}-{state}-{scheme}.png")
            page.close()
    if is_well and count == 12:
        context = browser.new_context(user_agent=FIREFOX)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/s1")
        page.screenshot(path=folder / "firefox.png")
        context.close()


def look_at_all(folder: Path) -> None:
    """Take a screenshot of each page, with few and many streams, with and without trouble."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        media = segments(browser, Path(name))
        for count in sorted({size[0] for size in SIZES}):
            with Origin() as origin:
                streams = household(origin, media, count)
                service = Service(Path(name), streams, name="Living room")
                numbers = [n for n in (*PLAYING, WAITING) if n <= count]
                with viewing(service.port, [f"s{n}" for n in numbers]), service:
                    threading.Event().wait(15)
                    sizes = [size for size in SIZES if size[0] == count]
                    for size in sizes:
                        take_shots(browser, service.port, folder, size, is_well=True)
                    origin.fault(f"/c{WAITING if count > 1 else 1}/*", Status(503), times=None)
                    for n in FAILING:
                        with Watch(service.port, f"/s{n}"):
                            pass
                    threading.Event().wait(6)
                    for size in sizes:
                        take_shots(browser, service.port, folder, size, is_well=False)
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the picture at the top of README.")
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE)
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="screenshots of every page")
    arguments = parser.parse_args()
    if arguments.pages:
        look_at_all(arguments.pages)
        return 0
    target: Path = arguments.file
    make_picture(target)
    size = target.stat().st_size
    sys.stdout.write(f"{target}: {size} bytes\n")
    return 0 if size < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
