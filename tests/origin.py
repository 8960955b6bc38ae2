"""A real HLS origin on loopback, with faults on command.

    with Origin() as origin:
        news = origin.add(Playlist("news", ts_segments(), mode="live"))
        stall = origin.fault(news.segment_path(6), Stall(at=1000))
        news.advance()
        ...
        stall.release()

`Playlist` is one media playlist and its segments under /<name>/. It moves when a test calls
`advance`, or by the clock. `Origin` serves playlists, files and endless bodies over HTTP/1.1 with
persistent connections, Range and validators. It keeps a log of the requests, and applies a `Fault`
to chosen requests. `python tests/origin.py` serves ready-made channels for manual tests.

Threads: one accepts connections, and each connection has one that serves it. `Origin.stop` ends
all of them, even while they wait. Locks: each `Playlist` guards its own position;
`Origin._changed` guards everything else.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fnmatch
import gzip
import io
import itertools
import math
import re
import selectors
import socket
import socketserver
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeVar

if __name__ == "__main__" and not (find_spec("Crypto") and find_spec("av")):
    sys.exit(
        "tests/origin.py needs packages that are missing: pip install -r tests/requirements.txt"
    )

from Crypto.Cipher import AES
from Crypto.Util.Padding import pad

PIECE = 64 * 1024  # bytes of a body written at once
TICK = 0.02  # seconds: a capped rate sends bursts as long as this
PARTS = 4  # parts of each segment in a low-latency playlist
MODIFIED = 1_700_000_000  # Unix time of every Last-Modified; old enough for a strong validator

TYPES = {
    ".m3u8": "application/vnd.apple.mpegurl",
    ".ts": "video/mp2t",
    ".m4s": "video/iso.segment",
    ".mp4": "video/mp4",
    ".aac": "audio/aac",
}
DEFAULT_TYPE = "application/octet-stream"


#### Content ####


@dataclass(frozen=True)
class Content:
    """A body of known length."""

    body: bytes
    type: str = DEFAULT_TYPE

    @cached_property
    def etag(self) -> str:
        """A strong validator: equal for equal bytes, also after a restart of the origin."""
        return f'"{zlib.crc32(self.body):08x}-{len(self.body)}"'


@dataclass(frozen=True)
class Endless:
    """A body without a length; each request reads its own iterator."""

    source: Callable[[], Iterable[bytes]]
    type: str | None = None
    chunked: bool = False


class Served(Protocol):
    """An object that serves some paths of the origin."""

    def attach(self, origin: Origin) -> None:
        """Called once, when the origin adds it."""

    def find(self, path: str) -> Content | None:
        """The current content at `path` (without a query)."""


ServedT = TypeVar("ServedT", bound=Served)


#### Playlists ####


@dataclass(frozen=True)
class Segment:
    """The media of one segment as a viewer must receive it, and its entry in the playlist."""

    data: bytes
    duration: float = 1.0
    discontinuity: bool = False
    tags: tuple[str, ...] = ()  # further lines before its address
    stated: float | None = None  # seconds in EXTINF; None: the true duration


def misstated(segments: Sequence[bytes], seconds: float, duration: float = 1.0) -> list[Segment]:
    """Segments of this `duration` for which the playlist states `seconds`."""
    return [Segment(data, duration, stated=seconds) for data in segments]


class Playlist:
    """One media playlist at /<name>/index.m3u8 and its segments at /<name>/<number><extension>.

    `vod` lists all segments and ends. `event` and `live` begin with `listed` segments (default:
    `window`) and grow by `advance`; `live` lists only the newest `window` segments. The media
    repeats endlessly, with a discontinuity at each repetition.

    The media of a number: `vod` and `event` count from `first_sequence`; in `live`, number k is
    segments[k % len(segments)], so that two origins of one channel agree.

    The playlist states `named_iv` in place of the true `aes_iv`. The origin serves `named_key` in
    place of the true `aes_key`; a text is the key's address. Without `pads_all`, only media whose
    length is no multiple of 16 is padded, as SRS does. With `encrypts_init`, the key also applies
    to the initialization section.

    The newest `keep` segments that left the list can still be fetched (None: all); others are 404.
    """

    def __init__(
        self,
        name: str,
        segments: Sequence[bytes | Segment],
        *,
        mode: Literal["vod", "event", "live"] = "vod",
        window: int = 5,
        first_sequence: int = 0,
        init: bytes | None = None,
        extension: str = ".ts",
        aes_key: bytes | None = None,
        aes_iv: bytes | None = None,
        named_iv: bytes | None = None,
        named_key: bytes | str | None = None,
        pads_all: bool = True,
        encrypts_init: bool = False,
        byte_ranges: bool = False,
        target_duration: int | None = None,
        listed: int | None = None,
        keep: int | None = None,
        clock: bool = False,
        low_latency: bool = False,
    ) -> None:
        if (byte_ranges or encrypts_init) and aes_key and not aes_iv:
            raise ValueError("one file for all segments cannot be encrypted by their numbers")
        self.name = name
        self.override: bytes | None = None  # served instead of the playlist
        self._mode, self._extension, self._keep = mode, extension, keep
        self._window = window if mode == "live" else None
        self._initial = len(segments) if mode == "vod" else window if listed is None else listed
        self._aes_key, self._aes_iv, self._byte_ranges = aes_key, aes_iv, byte_ranges
        self._named_iv = named_iv or aes_iv
        self._pads_all, self._encrypts_init = pads_all, encrypts_init
        self._key_address = named_key if isinstance(named_key, str) else "key"
        self._served_key = named_key if isinstance(named_key, bytes) else aes_key
        self._target_duration, self._low_latency = target_duration, low_latency
        self._origin: Origin | None = None
        # Guards everything below. Reentrant: public methods use each other.
        self._lock = threading.RLock()
        self._due: float | None = None  # when the clock publishes the next segment
        self._token = 0  # in the addresses of segments; 0: no token
        self._load_locked(segments, init)
        self._number_locked(first_sequence)
        if clock:
            self.run_by_clock()

    def _load_locked(self, segments: Sequence[bytes | Segment], init: bytes | None) -> None:
        self._media = [s if isinstance(s, Segment) else Segment(s) for s in segments]
        type_ = TYPES.get(self._extension, DEFAULT_TYPE)
        # Kept because they cache their validators, which are costly for large segments.
        self._contents = [Content(media.data, type_) for media in self._media]
        self._files: dict[str, Content] = {}
        if init is not None:
            body = self._encrypted(init, 0) if self._encrypts_init else init
            self._files["init.mp4"] = Content(body, TYPES[".mp4"])
        if self._served_key:
            self._files["key"] = Content(self._served_key)
        if self._byte_ranges:
            bodies = [self._encrypted(media.data, 0) for media in self._media]
            self._offsets = [0, *itertools.accumulate(map(len, bodies))]
            self._files[f"all{self._extension}"] = Content(b"".join(bodies), type_)

    def _number_locked(self, first: int) -> None:
        self._first = self._oldest = self._stop = first
        self._discontinuities = 0  # how many have left the list
        self._ended = self._mode == "vod"
        self._publish_locked(self._initial)

    # Position. `_oldest` to `_stop` (excluded) are listed.

    def _publish_locked(self, count: int) -> None:
        self._stop += count
        if self._window is not None:
            self._leave_locked(self._stop - self._window)

    def _leave_locked(self, oldest: int) -> None:
        """Removes the numbers below `oldest` from the list."""
        for number in range(self._oldest, min(oldest, self._stop)):
            self._discontinuities += self._is_discontinuity_locked(number)
            self._oldest = number + 1

    def _index_locked(self, number: int) -> int:
        base = 0 if self._mode == "live" else self._first
        return (number - base) % len(self._media)

    def _is_discontinuity_locked(self, number: int) -> bool:
        index = self._index_locked(number)
        return self._media[index].discontinuity or (index == 0 and number != self._first)

    def _follow_clock_locked(self) -> None:
        while self._due is not None and time.monotonic() >= self._due and not self._ended:
            self._due += self._media[self._index_locked(self._stop)].duration
            self._publish_locked(1)
            used_up = self._stop - self._first >= len(self._media)
            self._ended = self._mode == "event" and used_up

    def advance(self, count: int = 1) -> None:
        """Publishes `count` more segments."""
        with self._lock:
            self._publish_locked(count)

    def drop(self, count: int = 1) -> None:
        """Removes the `count` oldest segments from the list early."""
        with self._lock:
            self._leave_locked(self._oldest + count)

    def end(self) -> None:
        """Adds EXT-X-ENDLIST."""
        with self._lock:
            self._ended = True

    def restart(
        self,
        first_sequence: int = 0,
        *,
        segments: Sequence[bytes | Segment] | None = None,
        init: bytes | None = None,
    ) -> None:
        """Numbers again from `first_sequence`, as a restarted encoder does.

        `segments` (and `init`) replace the media.
        """
        with self._lock:
            if segments is not None:
                self._load_locked(segments, init)
            self._number_locked(first_sequence)

    def change_key(self, key: bytes) -> None:
        """Serves another key at the same address, and encrypts with it, from now on."""
        with self._lock:
            self._aes_key, self._files["key"] = key, Content(key)

    def renew_tokens(self, status: int = 403) -> None:
        """Lists segments with a new token from now on; requests with an older one are refused."""
        if self._origin is None:
            raise RuntimeError(f"{self.name} was not added to an origin")
        with self._lock:
            old, self._token = self._token, self._token + 1
        if old:
            pattern = f"/{self.name}/*?token={old}"
            self._origin.fault(pattern, Status(status), times=None)

    def run_by_clock(self) -> None:
        """From now on, publishes a segment whenever its duration has passed.

        An `event` ends with its media.
        """
        with self._lock:
            self._due = time.monotonic() + self._media[self._index_locked(self._stop)].duration

    @property
    def oldest(self) -> int:
        """The first number listed."""
        with self._lock:
            self._follow_clock_locked()
            return self._oldest

    @property
    def newest(self) -> int:
        """The last number listed; `oldest` - 1 if the list is empty."""
        with self._lock:
            self._follow_clock_locked()
            return self._stop - 1

    # Addresses and media that tests expect.

    @property
    def path(self) -> str:
        return f"/{self.name}/index.m3u8"

    @property
    def url(self) -> str:
        return self._absolute(self.path)

    @property
    def init_path(self) -> str:
        return f"/{self.name}/init.mp4"

    @property
    def key_path(self) -> str:
        return f"/{self.name}/key"

    def segment_path(self, number: int) -> str:
        """The path of segment `number`; with byte ranges, all segments share one."""
        return f"/{self.name}/{self._file(number)}"

    def segment_url(self, number: int) -> str:
        return self._absolute(self.segment_path(number))

    def plain(self, first: int, stop: int) -> bytes:
        """The media of the segments `first` to `stop` (excluded), as a viewer must receive it."""
        with self._lock:
            numbers = range(first, stop)
            return b"".join(self._media[self._index_locked(n)].data for n in numbers)

    def _file(self, number: int) -> str:
        return f"{'all' if self._byte_ranges else number}{self._extension}"

    def _absolute(self, path: str) -> str:
        if self._origin is None:
            raise RuntimeError(f"{self.name} was not added to an origin")
        return self._origin.url + path

    # Serving.

    def attach(self, origin: Origin) -> None:
        self._origin = origin

    def find(self, path: str) -> Content | None:
        folder, _, file = path.rpartition("/")
        if folder != f"/{self.name}":
            return None
        with self._lock:
            self._follow_clock_locked()
            if file == "index.m3u8":
                text = self._text_locked().encode() if self.override is None else self.override
                return Content(text, TYPES[".m3u8"])
            return self._files.get(file) or self._segment_locked(file)

    def _segment_locked(self, file: str) -> Content | None:
        stem = file.removesuffix(self._extension)
        if self._byte_ranges or stem == file or not stem.isdecimal():
            return None
        number = int(stem)
        kept = self._first if self._keep is None else self._oldest - self._keep
        if not max(self._first, kept) <= number < self._stop:
            return None
        content = self._contents[self._index_locked(number)]
        if self._aes_key:
            return Content(self._encrypted(content.body, number), content.type)
        return content

    def _encrypted(self, data: bytes, number: int) -> bytes:
        if not self._aes_key:
            return data
        iv = self._aes_iv or number.to_bytes(16, "big")
        padded = pad(data, 16) if self._pads_all or len(data) % 16 else data
        encrypted: bytes = AES.new(self._aes_key, AES.MODE_CBC, iv).encrypt(padded)
        return encrypted

    def _text_locked(self) -> str:
        lines = list(self._head_locked())
        for number in range(self._oldest, self._stop):
            lines.extend(self._entry_locked(number))
        if self._low_latency and not self._ended:  # one part of the next segment exists
            lines.extend(self._parts_locked(self._stop, 1))
            lines.append(f'#EXT-X-PRELOAD-HINT:TYPE=PART,URI="{self._stop}.1.part.ts"')
        if self._ended:
            lines.append("#EXT-X-ENDLIST")
        return "\n".join([*lines, ""])

    def _head_locked(self) -> Iterator[str]:
        longest = max(media.stated or media.duration for media in self._media)
        has_map = "init.mp4" in self._files
        yield "#EXTM3U"
        yield f"#EXT-X-VERSION:{6 if has_map else 4 if self._byte_ranges else 3}"
        yield f"#EXT-X-TARGETDURATION:{self._target_duration or max(1, round(longest))}"
        yield f"#EXT-X-MEDIA-SEQUENCE:{self._oldest}"
        if self._discontinuities:
            yield f"#EXT-X-DISCONTINUITY-SEQUENCE:{self._discontinuities}"
        if self._mode != "live":
            yield f"#EXT-X-PLAYLIST-TYPE:{self._mode.upper()}"
        if self._low_latency:
            yield "#EXT-X-SERVER-CONTROL:CAN-BLOCK-RELOAD=YES,CAN-SKIP-UNTIL=24,PART-HOLD-BACK=1"
            yield f"#EXT-X-PART-INF:PART-TARGET={longest / PARTS:.3f}"
        section = ['#EXT-X-MAP:URI="init.mp4"'] if has_map else []
        if not self._encrypts_init:  # before the key, which would apply to it
            yield from section
        if self._aes_key:
            iv = f",IV=0x{self._named_iv.hex()}" if self._named_iv else ""
            yield f'#EXT-X-KEY:METHOD=AES-128,URI="{self._key_address}"{iv}'
        if self._encrypts_init:
            yield from section

    def _entry_locked(self, number: int) -> Iterator[str]:
        media = self._media[self._index_locked(number)]
        if self._is_discontinuity_locked(number):
            yield "#EXT-X-DISCONTINUITY"
        yield from media.tags
        if self._low_latency and number >= self._stop - 3:
            yield from self._parts_locked(number, PARTS)
        stated = media.duration if media.stated is None else media.stated
        yield f"#EXTINF:{stated:.6f},"
        if self._byte_ranges:
            yield self._range_locked(number)
        yield self._file(number) + (f"?token={self._token}" if self._token else "")

    def _parts_locked(self, number: int, count: int) -> Iterator[str]:
        """A segment's first parts, for players of low-latency HLS (RFC 8216bis, 4.4.4.9)."""
        duration = self._media[self._index_locked(number)].duration / PARTS
        for part in range(count):
            yield f'#EXT-X-PART:DURATION={duration:.3f},URI="{number}.{part}.part.ts"'

    def _range_locked(self, number: int) -> str:
        """The byte range of a segment.

        Even numbers state their offset. Odd ones omit it, unless they are the first in the list.
        """
        index = self._index_locked(number)
        start, stop = self._offsets[index : index + 2]
        implicit = number % 2 and index and number != self._oldest
        return f"#EXT-X-BYTERANGE:{stop - start}" + ("" if implicit else f"@{start}")


def with_insert(
    origin: Origin,
    name: str,
    programme: Sequence[bytes],
    insert_init: bytes | None,
    insert: Sequence[bytes],
    **options: Any,
) -> Playlist:
    """A programme whose first half is followed by an insert in another container.

    The playlist names the insert's initialization section from there on.
    """
    half = len(programme) // 2
    media = [Segment(data) for data in (*programme[:half], *insert, *programme[half:])]
    tags: tuple[str, ...] = ()
    if insert_init is not None:
        url = origin.add_file(f"/{name}/insert.mp4", insert_init)
        tags = (f'#EXT-X-MAP:URI="{url}"',)
    media[half] = replace(media[half], discontinuity=True, tags=tags)
    media[half + len(insert)] = replace(media[half + len(insert)], discontinuity=True)
    return Playlist(name, media, **options)


@dataclass(frozen=True)
class Variant:
    """A playlist of a multivariant playlist, with the attributes that identify it."""

    playlist: Playlist
    bandwidth: int
    resolution: tuple[int, int] | None = None
    codecs: str = "avc1.42c00b,mp4a.40.2"


class Multivariant:
    """A multivariant playlist at /<name>/master.m3u8.

    `audio` is a separate rendition of the sound of all variants. `Origin.add` also adds its
    playlists.
    """

    def __init__(
        self, name: str, variants: Sequence[Variant], audio: Playlist | None = None
    ) -> None:
        self.name, self.variants, self.audio = name, tuple(variants), audio
        self.override: bytes | None = None  # served instead of the playlist
        self._origin: Origin | None = None

    @property
    def path(self) -> str:
        return f"/{self.name}/master.m3u8"

    @property
    def url(self) -> str:
        if self._origin is None:
            raise RuntimeError(f"{self.name} was not added to an origin")
        return self._origin.url + self.path

    def attach(self, origin: Origin) -> None:
        self._origin = origin
        for playlist in dict.fromkeys(variant.playlist for variant in self.variants):
            origin.add(playlist)
        if self.audio:
            origin.add(self.audio)

    def find(self, path: str) -> Content | None:
        if path != self.path:
            return None
        text = "\n".join([*self._lines(), ""]).encode()
        return Content(text if self.override is None else self.override, TYPES[".m3u8"])

    def _lines(self) -> Iterator[str]:
        yield "#EXTM3U"
        if self.audio:
            media = 'TYPE=AUDIO,GROUP-ID="sound",NAME="Sound",DEFAULT=YES,AUTOSELECT=YES'
            yield f'#EXT-X-MEDIA:{media},URI="{self.audio.path}"'
        for variant in self.variants:
            attributes = f'BANDWIDTH={variant.bandwidth},CODECS="{variant.codecs}"'
            if variant.resolution:
                attributes += ",RESOLUTION={}x{}".format(*variant.resolution)
            if self.audio:
                attributes += ',AUDIO="sound"'
            yield f"#EXT-X-STREAM-INF:{attributes}"
            yield variant.playlist.path


def master(
    name: str, variants: Mapping[str, Playlist], audio: Playlist | None = None
) -> Multivariant:
    """A multivariant playlist of variants named by height ("720p"), 16:9, at a plausible rate."""
    heights = {int(key.removesuffix("p")): playlist for key, playlist in variants.items()}
    return Multivariant(
        name,
        [
            Variant(playlist, height * 5000, (height * 16 // 9, height))
            for height, playlist in heights.items()
        ],
        audio,
    )


#### Faults ####


@dataclass
class Answer:
    """The planned answer to one request, from the state at the request's arrival.

    Faults change it before its first byte is sent.
    """

    content: Content | Endless
    path: str = ""  # the requested path, with the query
    asked: Mapping[str, str] = field(default_factory=dict)  # the request's headers, in lower case
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    validators: bool = True
    etags: Literal["strong", "weak", "none"] = "strong"
    dated: bool = True  # with Last-Modified
    changed: bool = False  # with different validators
    length_error: int = 0  # added to the true Content-Length
    hang_up: bool = False  # close the connection before the status line
    stall_headers: bool = False
    stall_at: int | None = None  # bytes of the body
    break_at: int | None = None  # bytes of the body
    reset: bool = False  # close with a TCP reset
    think: float = 0.0  # seconds before the status line
    byte_pause: float = 0.0  # seconds before each byte
    head_pause: float = 0.0  # seconds before each byte of the head
    rate: float = 0.0  # bytes of the body a second; 0: the origin's rate

    def etag(self) -> str | None:
        if not self.validators or not isinstance(self.content, Content) or self.etags == "none":
            return None
        tag = f'"changed-{self.content.etag[1:]}' if self.changed else self.content.etag
        return f"W/{tag}" if self.etags == "weak" else tag

    def last_modified(self) -> str | None:
        if not self.validators or not isinstance(self.content, Content) or not self.dated:
            return None
        return formatdate(MODIFIED + 3600 * self.changed, usegmt=True)


class Fault(Protocol):
    """A fault that changes the answer to a request; several may be combined."""

    def apply(self, answer: Answer) -> None: ...


@dataclass(frozen=True)
class Status:
    """An answer with another status."""

    code: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()

    def apply(self, answer: Answer) -> None:
        answer.status, answer.content = self.code, Content(self.body, "text/plain")
        answer.headers |= dict(self.headers)


@dataclass(frozen=True)
class Redirect:
    """A redirect to `url`, absolute or not."""

    url: str
    code: int = 302

    def apply(self, answer: Answer) -> None:
        Status(self.code, headers=(("Location", self.url),)).apply(answer)


class Tokens:
    """Addresses that are valid for a while, as from panels and CDNs.

    Apply it to /login and to `target`. The first redirects to the second with a token. The second
    refuses a request without a token, or if the token was used `uses` times or is older than
    `seconds`.
    """

    def __init__(self, target: str, *, uses: float = 1, seconds: float = math.inf) -> None:
        self._target, self._uses, self._seconds = target, uses, seconds
        self._lock = threading.Lock()
        self._given: list[tuple[float, int]] = []  # each token's time and number of uses

    def apply(self, answer: Answer) -> None:
        path, _, query = answer.path.partition("?token=")
        with self._lock:
            if path != self._target:
                Redirect(f"{self._target}?token={len(self._given)}").apply(answer)
                self._given.append((time.monotonic(), 0))
            elif not self._take_locked(query):
                Status(403).apply(answer)

    def _take_locked(self, query: str) -> bool:
        if not query.isdecimal() or int(query) >= len(self._given):
            return False
        given, uses = self._given[int(query)]
        self._given[int(query)] = given, uses + 1
        return uses < self._uses and time.monotonic() - given < self._seconds


@dataclass(frozen=True)
class OneAtATime:
    """A panel that allows one connection: it refuses a request while it serves another one.

    Only requests for `path`, exact or a pattern, count. A served request counts until `lag`
    seconds after its end.
    """

    origin: Origin
    status: int = 403
    path: str = "*"
    lag: float = 0.0

    def apply(self, answer: Answer) -> None:
        requests = [r for r in self.origin.requests if _matches(r.path, self.path)]
        since = time.monotonic() - self.lag
        busy = sum(not request.done for request in requests)
        busy += sum(r.done and r.status == 200 and r.ended > since for r in requests)
        if busy > 1:
            Status(self.status).apply(answer)


@dataclass(frozen=True)
class Think:
    """A panel that waits before it answers."""

    seconds: float

    def apply(self, answer: Answer) -> None:
        answer.think = self.seconds


@dataclass(frozen=True)
class Demand:
    """A panel that refuses requests without these headers (names in lower case)."""

    headers: Mapping[str, str]

    def apply(self, answer: Answer) -> None:
        if any(answer.asked.get(name) != value for name, value in self.headers.items()):
            Status(403).apply(answer)


@dataclass(frozen=True)
class Body:
    """Another body, even if `path` has no content."""

    body: bytes
    content_type: str = DEFAULT_TYPE

    def apply(self, answer: Answer) -> None:
        answer.status, answer.content = 200, Content(self.body, self.content_type)


@dataclass(frozen=True)
class Preface:
    """Data before the body: a byte order mark, blanks, comments."""

    data: bytes

    def apply(self, answer: Answer) -> None:
        if isinstance(answer.content, Content):
            answer.content = Content(self.data + answer.content.body, answer.content.type)


@dataclass(frozen=True)
class Cut:
    """The last `size` bytes are missing without a sign: Content-Length fits the shorter body."""

    size: int

    def apply(self, answer: Answer) -> None:
        if isinstance(answer.content, Content):
            answer.content = Content(answer.content.body[: -self.size], answer.content.type)


@dataclass(frozen=True)
class Edit:
    """A text body with all matches of a pattern replaced, as by re.sub()."""

    pattern: str
    replacement: str | Callable[[re.Match[str]], str]

    def apply(self, answer: Answer) -> None:
        if isinstance(answer.content, Content):
            text = re.sub(self.pattern, self.replacement, answer.content.body.decode(), flags=re.M)
            answer.content = Content(text.encode(), answer.content.type)


# Errors in media playlists that packagers make and players tolerate.
ODD_PLAYLISTS: Mapping[str, Edit] = {
    "blank-lines": Edit(r"$", "\r\n  \r\n"),
    "version-nan": Edit(r"VERSION:.*", "VERSION:NaN"),
    "no-sequence": Edit(r"MEDIA-SEQUENCE:.*", "MEDIA-SEQUENCE:"),
    "odd-sequence": Edit(r"MEDIA-SEQUENCE:.*", "MEDIA-SEQUENCE:latest"),
    "negative-sequence": Edit(r"MEDIA-SEQUENCE:.*", "MEDIA-SEQUENCE:-11"),
    "no-target": Edit(r"TARGETDURATION:.*", "TARGETDURATION:"),
    "odd-target": Edit(r"TARGETDURATION:.*", "TARGETDURATION:nan"),
    "odd-start": Edit(r"(#EXT-X-VERSION.*)", "\\1\n#EXT-X-START:TIME-OFFSET=early"),
    "negative-length": Edit(r"\A((?:.*\n)*?#EXTINF:).*", "\\g<1>-23334,"),
    "odd-length": Edit(r"EXTINF:.*", "EXTINF:NaN,"),
    "odd-tag-of-a-length": Edit(r"\A((?:.*\n)*?)#EXTINF:.*", "\\1#EXTIF:2,"),
    "zeros": Edit(r"(EXT-X-ENDLIST)", "\\1\n" + "\0" * 5000),
    "odd-line-ends": Edit(r"(EXTINF:.*)", "\\1title\u2028of two lines"),
    "key-of-no-method": Edit(r"(#EXTINF)", '#EXT-X-KEY:METHOD=none,URI="",IV=\n\\1'),
    "commented-tag": Edit(r"(#EXTINF)", "# EXT-X-ENDLIST\n# EXT-X-GAP\n\\1"),
    "blanks-around-colons": Edit(r"^(#EXT[A-Z-]*):", r"\1 : "),
    "range-with-blanks": Edit(r"BYTERANGE:(\d+)@(\d+)", r"BYTERANGE: \1 @ \2"),
    "range-without-offset": Edit(r"(BYTERANGE:\d+)@\d+", "\\1"),
}

# Sites that store their segments on image hosts put an image of one pixel before each segment.
IMAGES: Mapping[str, bytes] = {
    "png": bytes.fromhex(
        "89504e470d0a1a0a0000000d494844520000000100000001080200000090775"
        "3de0000000c49444154789c6360606000000004000127340a270000000049454e44ae426082"
    ),
    "png-and-blanks": b"\x89PNG\r\n\x1a\n".ljust(376, b"\xff"),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + b"Pixel" * 300 + b"\xff\xd9",
    "gif": b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00;",
}
WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>Please log in</title></head></html>\n"
PANEL_TEXT = b"FAILED TO CONNECT"  # a panel's body, with status 200, while its source is down


@dataclass(frozen=True)
class Gzip:
    """Compressed without a request for it. Length, ranges and ETag are the compressed body's."""

    def apply(self, answer: Answer) -> None:
        if isinstance(answer.content, Content):
            body = gzip.compress(answer.content.body, mtime=0)
            answer.content = Content(body, answer.content.type)
            answer.headers["Content-Encoding"] = "gzip"


@dataclass(frozen=True)
class Close:
    """The connection closes before the status line."""

    reset: bool = False

    def apply(self, answer: Answer) -> None:
        answer.hang_up, answer.reset = True, self.reset


@dataclass(frozen=True)
class Break:
    """The connection closes after `at` bytes of this answer's body."""

    at: int
    reset: bool = False

    def apply(self, answer: Answer) -> None:
        answer.break_at, answer.reset = self.at, self.reset


@dataclass(frozen=True)
class StallHeaders:
    """The origin sends no byte until the fault's handle is released."""

    def apply(self, answer: Answer) -> None:
        answer.stall_headers = True


@dataclass(frozen=True)
class Stall:
    """The origin pauses after `at` bytes of this answer's body until the handle is released."""

    at: int = 0

    def apply(self, answer: Answer) -> None:
        answer.stall_at = self.at


@dataclass(frozen=True)
class Drip:
    """The body is sent byte by byte."""

    per_byte_seconds: float

    def apply(self, answer: Answer) -> None:
        answer.byte_pause = self.per_byte_seconds


@dataclass(frozen=True)
class DripHead:
    """The status line and the headers are sent byte by byte."""

    per_byte_seconds: float

    def apply(self, answer: Answer) -> None:
        answer.head_pause = self.per_byte_seconds


@dataclass(frozen=True)
class Trickle:
    """The body is sent at `rate` bytes a second: one connection is stuck, others are not."""

    rate: float

    def apply(self, answer: Answer) -> None:
        answer.rate = self.rate


@dataclass(frozen=True)
class WrongLength:
    """Content-Length is `extra` bytes too large (negative: too small); the connection closes."""

    extra: int

    def apply(self, answer: Answer) -> None:
        answer.length_error = self.extra


@dataclass(frozen=True)
class NoRange:
    """The origin ignores Range."""

    def apply(self, answer: Answer) -> None:
        answer.ranges = False


@dataclass(frozen=True)
class Validators:
    """Only these validators: a strong ETag, a weak one or none, and perhaps Last-Modified."""

    etags: Literal["strong", "weak", "none"] = "strong"
    dated: bool = False

    def apply(self, answer: Answer) -> None:
        answer.etags, answer.dated = self.etags, self.dated


@dataclass(frozen=True)
class ChangedValidator:
    """ETag and Last-Modified differ from those of an answer without this fault."""

    def apply(self, answer: Answer) -> None:
        answer.changed = True


class _Bell:
    """An event that a selector can watch beside sockets. Once rung, it stays rung."""

    def __init__(self) -> None:
        self._watched, self._rung = socket.socketpair()

    def fileno(self) -> int:
        return self._watched.fileno()

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # closed
            self._rung.send(b"!")

    def close(self) -> None:
        self._watched.close()
        self._rung.close()


class FaultHandle:
    """A fault that was set with `Origin.fault`."""

    def __init__(
        self, origin: Origin, pattern: str, faults: tuple[Fault, ...], times: int | None
    ) -> None:
        self.pattern, self.faults = pattern, faults
        self._origin = origin
        self._released = _Bell()
        # Guarded by the origin's condition:
        self._left = times
        self._taken = self._held = 0

    @property
    def taken(self) -> int:
        """The number of requests that met the fault."""
        with self._origin._changed:
            return self._taken

    @property
    def held(self) -> int:
        """The number of requests that stall now."""
        with self._origin._changed:
            return self._held

    def wait(self, times: int = 1, timeout: float = 10) -> None:
        """Waits until `times` requests have met the fault."""
        what = f"{times} requests meet the fault on {self.pattern}"
        self._origin.wait_until(lambda: self._taken >= times, what, timeout)

    def wait_held(self, count: int = 1, timeout: float = 10) -> None:
        """Waits until `count` requests stall at the same time; all earlier bytes were sent."""
        what = f"{count} requests stall on {self.pattern}"
        self._origin.wait_until(lambda: self._held >= count, what, timeout)

    def release(self) -> None:
        """Answers that stall continue; later ones do not stall."""
        self._released.ring()

    def clear(self) -> None:
        """No further request meets the fault; stalled answers stay stalled."""
        with self._origin._changed:
            self._left = 0

    def _take_locked(self, path: str) -> bool:
        if self._left == 0 or not _matches(path, self.pattern):
            return False
        self._left = self._left and self._left - 1
        self._taken += 1
        return True


def _matches(path: str, pattern: str) -> bool:
    """Whether `pattern`, exact or with wildcards, matches `path` with or without its query."""
    candidates = (path, path.partition("?")[0])
    return pattern in candidates or any(fnmatch.fnmatchcase(c, pattern) for c in candidates)


#### The log ####


@dataclass(frozen=True)
class Request:
    """The state of a request at one moment."""

    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # names in lower case
    connection: int  # equal for requests on one connection
    time: float  # time.monotonic() when its head was read
    sent: int  # bytes of the body so far; counted just after they were sent
    status: int  # 0 before the status line
    done: bool  # the answer has ended
    ended: float  # time.monotonic() when it was done; infinite before


@dataclass
class _Record:
    """The state behind a `Request`; guarded by the origin's condition."""

    method: str
    path: str
    headers: Mapping[str, str]
    connection: int
    time: float
    began: int  # its position in the order of all beginnings and ends
    ended: int | None = None
    ended_time: float = math.inf
    sent: int = 0
    status: int = 0

    def snapshot(self) -> Request:
        return Request(
            self.method,
            self.path,
            self.headers,
            self.connection,
            self.time,
            self.sent,
            self.status,
            self.ended is not None,
            self.ended_time,
        )


def _most_at_once(records: Iterable[_Record]) -> int:
    """The largest number of requests that were answered at the same time."""
    steps = []
    for record in records:
        steps.append((record.began, 1))
        if record.ended is not None:
            steps.append((record.ended, -1))
    return max(itertools.accumulate(step for _, step in sorted(steps)), default=0)


#### Serving a connection ####


class _HangUp(Exception):
    """The connection must close now."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client. It runs in its own thread."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._origin = self.server.origin
        self._paid_until = 0.0  # when the capped rate allows the next piece

    def handle(self) -> None:
        # The client has left, or the origin stops: there is nothing to answer.
        with contextlib.suppress(OSError, _HangUp):
            super().handle()

    def do_GET(self) -> None:
        record, handle = self._origin._arrived(self)
        try:
            answer = self._origin._answer(self.path)
            answer.asked = record.headers
            for fault in self._origin._habits_of(self.path):
                fault.apply(answer)
            for fault in handle.faults if handle else ():
                fault.apply(answer)
            self._send(answer, record, handle)
        finally:
            self._origin._ended(record)
            self.close_connection |= self.server.finish(self.connection)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the log is `Origin.requests`."""

    def _send(self, answer: Answer, record: _Record, handle: FaultHandle | None) -> None:
        self._wait(self._origin.delay + answer.think)
        if answer.stall_headers and handle:
            self._stall(handle)
        if answer.hang_up:
            self._hang_up(answer)
        body = self._select(answer)
        self._send_head(answer, body)
        self._origin._progress(record, status=answer.status)
        if self.command != "HEAD":
            self._send_body(answer, body, record, handle)
        if answer.length_error:
            self._hang_up(answer)

    def _hang_up(self, answer: Answer) -> None:
        if answer.reset:
            # A socket with a linger time of zero resets its connection when it is closed. The
            # server's orderly shutdown, which would otherwise be first, then finds it closed.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        raise _HangUp

    # Head.

    def _select(self, answer: Answer) -> memoryview | Endless:
        """The part of the content to send. Sets the status to 206 for a range, or to 416."""
        if isinstance(answer.content, Endless):
            return answer.content
        body = memoryview(answer.content.body)
        if not answer.ranges or answer.status != 200:
            return body
        answer.headers["Accept-Ranges"] = "bytes"
        wanted = self._wanted_range(len(body)) if self._range_holds(answer) else None
        if wanted is None:
            return body
        if not wanted:
            answer.status, answer.content = 416, Content(b"")
            answer.headers["Content-Range"] = f"bytes */{len(body)}"
            return memoryview(b"")
        answer.status = 206
        last = wanted.stop - 1
        answer.headers["Content-Range"] = f"bytes {wanted.start}-{last}/{len(body)}"
        return body[wanted.start : wanted.stop]

    def _range_holds(self, answer: Answer) -> bool:
        """RFC 9110 13.1.5: If-Range needs the strong entity tag or the exact date."""
        condition = self.headers["If-Range"]
        if self.command != "GET" or "Range" not in self.headers:
            return False
        strong = {answer.etag() if answer.etags == "strong" else None, answer.last_modified()}
        return condition is None or condition in strong

    def _wanted_range(self, length: int) -> range | None:
        """The requested bytes; an empty range if they do not exist.

        None for a Range that may be ignored: malformed, or several ranges at once.
        """
        unit, _, spec = self.headers["Range"].partition("=")
        first, dash, last = spec.strip().partition("-")
        numbers = [text for text in (first, last) if text]
        if unit != "bytes" or not dash or not numbers or not all(map(str.isdecimal, numbers)):
            return None
        if not first:
            return range(max(0, length - int(last)), length)
        if last and int(last) < int(first):
            return None
        return range(int(first), min(length, int(last) + 1 if last else length))

    def _send_head(self, answer: Answer, body: memoryview | Endless) -> None:
        connection, self.wfile = self.wfile, io.BytesIO()
        self._write_head(answer, body)
        head, self.wfile = self.wfile.getvalue(), connection
        size = 1 if answer.head_pause else len(head)
        for at in range(0, len(head), size):
            self._wait(answer.head_pause)
            self.wfile.write(head[at : at + size])

    def _write_head(self, answer: Answer, body: memoryview | Endless) -> None:
        self.send_response(answer.status)
        for name, value in (answer.headers | self._usual_headers(answer)).items():
            self.send_header(name, value)
        if isinstance(body, memoryview):
            self.send_header("Content-Length", str(len(body) + answer.length_error))
        elif self._is_chunked(body):
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()

    def _usual_headers(self, answer: Answer) -> dict[str, str]:
        headers = {"Content-Type": answer.content.type}
        if answer.status in (200, 206):
            headers |= {"ETag": answer.etag(), "Last-Modified": answer.last_modified()}
        return {name: value for name, value in headers.items() if value is not None}

    def _is_chunked(self, body: memoryview | Endless) -> bool:
        new_enough = self.request_version != "HTTP/1.0"
        return isinstance(body, Endless) and body.chunked and new_enough

    # Body.

    def _send_body(
        self,
        answer: Answer,
        body: memoryview | Endless,
        record: _Record,
        handle: FaultHandle | None,
    ) -> None:
        chunked = self._is_chunked(body)
        sent = 0
        self._reach(sent, answer, handle)
        with _blocks(body) as blocks:
            for piece in self._pieces(blocks, answer):
                self._pace(len(piece), answer)
                self._write(piece, chunked)
                sent += len(piece)
                self._origin._progress(record, sent=len(piece))
                self._reach(sent, answer, handle)
        if answer.break_at is not None:  # beyond the end of the body
            self._hang_up(answer)
        if chunked:
            self._write(memoryview(b""), chunked)

    def _write(self, piece: memoryview, chunked: bool) -> None:
        framed = b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")) if chunked else piece
        self.connection.sendall(framed)

    def _reach(self, sent: int, answer: Answer, handle: FaultHandle | None) -> None:
        """Stalls or hangs up if this is due after `sent` bytes of the body."""
        if answer.stall_at == sent and handle:
            self._stall(handle)
        if answer.break_at == sent:
            self._hang_up(answer)

    def _pieces(self, blocks: Iterable[memoryview], answer: Answer) -> Iterator[memoryview]:
        """Cuts the body into pieces to write at once. Stalls and breaks are also cuts."""
        marks = [mark for mark in (answer.stall_at, answer.break_at) if mark is not None]
        done = 0
        for block in blocks:
            while block:
                to_marks = [mark - done for mark in marks if mark > done]
                size = min([self._piece_size(answer), *to_marks])
                yield block[:size]
                done += len(block[:size])
                block = block[size:]

    def _piece_size(self, answer: Answer) -> int:
        if answer.byte_pause:
            return 1
        rate = answer.rate or self._origin.rate
        return min(PIECE, max(1, int(rate * TICK))) if rate else PIECE

    def _pace(self, size: int, answer: Answer) -> None:
        """Waits until `size` more bytes are due. A thread that woke late catches up, one tick."""
        self._wait(answer.byte_pause)
        rate = answer.rate or self._origin.rate
        if rate:
            self._wait(self._paid_until - time.monotonic())
            self._paid_until = max(self._paid_until, time.monotonic() - TICK) + size / rate

    # Waiting.

    def _stall(self, handle: FaultHandle) -> None:
        self._origin._hold(handle, 1)
        try:
            self._wait(None, handle._released)
        finally:
            self._origin._hold(handle, -1)

    def _wait(self, seconds: float | None, bell: _Bell | None = None) -> None:
        """Waits for the time or for the bell.

        Raises `_HangUp` as soon as the origin stops or the client has left.
        """
        if seconds is not None and seconds <= 0:
            return
        with selectors.DefaultSelector() as selector:
            for source in filter(None, (self.connection, self.server.stopping, bell)):
                selector.register(source, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(seconds)}
        if self.server.stopping in ready or self.connection in ready:
            # No client of these tests sends ahead: a readable socket means the connection ended.
            raise _HangUp


@contextlib.contextmanager
def _blocks(body: memoryview | Endless) -> Iterator[Iterable[memoryview]]:
    """The blocks of a body. If an endless source is a generator, it is closed at the end."""
    if isinstance(body, memoryview):
        yield (body,)
        return
    source = body.source()
    try:
        yield map(memoryview, source)
    finally:
        if isinstance(source, Generator):
            source.close()


class _Server(ThreadingHTTPServer):
    """The listener of an `Origin` and its connections, from a start to the next stop."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_port = False  # a port that is already in use must be an error

    def __init__(self, origin: Origin, port: int) -> None:
        self.origin = origin
        self.stopping = _Bell()
        # Guarded by the origin's condition:
        self._numbers: dict[socket.socket, int] = {}
        self._busy: set[socket.socket] = set()  # connections with an answer in progress
        self._is_draining = False
        self._handlers: list[threading.Thread] = []  # the accepting thread's until it ends
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError:
            self.stopping.close()
            raise
        self._acceptor = threading.Thread(
            target=self.serve_forever, args=(0.05,), name="origin-accept", daemon=True
        )

    def start(self) -> None:
        self._acceptor.start()

    def drain(self) -> None:
        """Closes the listener, and each connection once it has no answer to send."""
        # If the system allows it, this wakes the accepting thread, which otherwise polls.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self._acceptor.join()
        self.server_close()
        with self.origin._changed:
            self._is_draining = True
            self._hang_up(self._numbers.keys() - self._busy)

    def _hang_up(self, connections: Iterable[socket.socket]) -> None:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def begin(self, connection: socket.socket) -> int:
        """Notes that an answer begins; returns the connection's number.

        The caller holds the condition.
        """
        self._busy.add(connection)
        return self._numbers[connection]

    def finish(self, connection: socket.socket) -> bool:
        """Notes that the answer was sent; returns whether the connection must close now."""
        with self.origin._changed:
            self._busy.discard(connection)
            return self._is_draining

    def stop(self) -> None:
        """Closes the listener and every connection, and waits for their threads."""
        self.stopping.ring()
        self.drain()
        with self.origin._changed:
            self._hang_up(self._numbers)
        for thread in self._handlers:
            thread.join()
        self.stopping.close()

    def open_connections(self) -> int:
        return len(self._numbers)

    def server_bind(self) -> None:
        """Skips the base class's look-up of the machine's name, which may ask a name server."""
        socketserver.TCPServer.server_bind(self)

    # Overridden because socketserver does not keep daemon threads.

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.origin._changed:
            self._numbers[request] = self.origin._connected(len(self._numbers) + 1)
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="origin-connection",
            daemon=True,
        )
        self._handlers = [*filter(threading.Thread.is_alive, self._handlers), thread]
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self.origin._changed:
            self._numbers.pop(request, None)
            self.origin._changed.notify_all()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps an error of the origin itself (or of an endless source) for `Origin.close`."""
        error = sys.exc_info()[1]
        if error is not None:
            self.origin._errors.append(error)


#### The origin ####


class Origin:
    """An HTTP/1.1 origin on 127.0.0.1; a context manager that starts and closes it.

    The settings may change at any time. They apply from the next answer (`rate`: next piece) on.
    """

    def __init__(self, port: int = 0) -> None:
        self.delay = 0.0  # seconds before each status line
        self.rate = 0.0  # bytes of bodies a second on each connection; 0: no cap
        self.ranges = True  # False: Range is ignored
        self.validators = True  # whether ETag and Last-Modified are sent
        self._port = port
        self._server: _Server | None = None  # while it runs
        self._drained: list[_Server] = []  # drained servers, until the origin stops
        self._errors: list[BaseException] = []
        # Guards everything below, the servers' connections and the faults' counts. Notified when
        # any of it changes, for `wait_until`. Reentrant: the conditions of `wait_until` may use
        # properties.
        self._changed = threading.Condition(threading.RLock())
        self._served: list[Served] = []
        self._files: dict[str, Content | Endless] = {}
        self._handles: list[FaultHandle] = []
        self._habits: list[tuple[str, Fault]] = []  # path and fault
        self._records: list[_Record] = []
        self._steps = itertools.count()
        self._connection_numbers = itertools.count(1)
        self._peak_connections = 0

    # Life.

    def start(self) -> None:
        """Listens; after a stop, on the same port as before."""
        if self._server is None:
            self._server = _Server(self, self._port)
            self._port = self._server.server_address[1]
            self._server.start()

    def stop(self) -> None:
        """Closes the listener and every connection, and joins all threads. `start` may follow."""
        self.drain()
        while self._drained:
            self._drained.pop().stop()

    def drain(self) -> None:
        """A graceful stop: refuses new connections and closes the others after their answers.

        `start` may follow at once.
        """
        if self._server is not None:
            self._server.drain()
            self._drained.append(self._server)
            self._server = None

    def restart(self) -> None:
        """A crash: all connections close, and the origin serves the same content again at once."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stops for good. Raises the first error inside the origin, if there was one."""
        self.stop()
        for handle in self._handles:
            handle._released.close()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Origin:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        if not self._port:
            raise RuntimeError("the origin was not started")
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # Content.

    def add(self, served: ServedT) -> ServedT:
        """Serves a playlist, or a multivariant playlist with all of its playlists.

        It replaces an earlier one of the same name.
        """
        served.attach(self)
        with self._changed:
            self._served.insert(0, served)
        return served

    def add_file(self, path: str, data: bytes, *, content_type: str = DEFAULT_TYPE) -> str:
        """Serves `data` at `path`, replacing earlier content, and returns the address."""
        with self._changed:
            self._files[path] = Content(data, content_type)
        return self.url + path

    def add_endless(
        self,
        path: str,
        source: Callable[[], Iterable[bytes]],
        *,
        content_type: str | None = None,
        chunked: bool = False,
    ) -> str:
        """Serves the output of a new iterator of `source` to each request.

        The answer ends when the iterator ends, the client leaves or the origin stops. A closed
        connection marks the end, or with `chunked` the final chunk. A source must not block for
        long: `stop` waits for it.
        """
        with self._changed:
            self._files[path] = Endless(source, content_type, chunked)
        return self.url + path

    # Faults.

    def fault(self, path: str, *faults: Fault, times: int | None = 1) -> FaultHandle:
        """The next `times` requests (None: all) for `path`, exact or a pattern, meet all `faults`.

        Several calls for the same path are used up one after the other, the oldest first.
        """
        handle = FaultHandle(self, path, faults, times)
        with self._changed:
            self._handles.append(handle)
        return handle

    def habit(self, path: str, *faults: Fault) -> None:
        """All requests for `path`, exact or a pattern, meet these faults before those of `fault`.

        They are permanent: `clear_faults` does not remove them.  A habit cannot stall.
        """
        with self._changed:
            self._habits += [(path, fault) for fault in faults]

    def clear_faults(self) -> None:
        """Removes all faults; answers that stall continue."""
        with self._changed:
            for handle in self._handles:
                handle.clear()
                handle.release()

    # The log.

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests so far, in the order of arrival."""
        with self._changed:
            return tuple(record.snapshot() for record in self._records)

    def clear_requests(self) -> None:
        """Clears the log and the peaks."""
        with self._changed:
            self._records.clear()
            self._peak_connections = self.connections

    def count(self, path: str) -> int:
        """The number of requests so far for `path`, exact or a pattern."""
        return sum(_matches(request.path, path) for request in self.requests)

    def wait_for(self, path: str, times: int = 1, timeout: float = 10) -> None:
        """Waits until clients have requested `path`, exact or a pattern, `times` times."""
        self.wait_until(lambda: self.count(path) >= times, f"{times} requests of {path}", timeout)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 10) -> None:
        """Waits until `condition` holds, and checks it again after each event at the origin.

        Fails with the description `what` and the log of requests.
        """
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise AssertionError(f"not within {timeout} s: {what}\n{self.log()}")

    def log(self) -> str:
        """The requests as text, one a line."""
        lines = [
            f"  #{request.connection} {request.method} {request.path}"
            f" {request.headers.get('range', '')} -> {request.status or '-'}"
            f" {request.sent} bytes{'' if request.done else ' ...'}"
            for request in self.requests
        ]
        return "\n".join([f"{len(lines)} requests:", *lines])

    @property
    def connections(self) -> int:
        """The number of open connections."""
        with self._changed:
            return self._server.open_connections() if self._server else 0

    def wait_connections(self, count: int, timeout: float = 10) -> None:
        """Waits until exactly `count` connections are open."""
        self.wait_until(lambda: self.connections == count, f"{count} connections", timeout)

    @property
    def peak_connections(self) -> int:
        with self._changed:
            return self._peak_connections

    @property
    def peak_transfers(self) -> int:
        """The largest number of requests that were answered at the same time."""
        return self.peak("*")

    def peak(self, path: str) -> int:
        """Like `peak_transfers`, for the requests for `path`, exact or a pattern."""
        with self._changed:
            return _most_at_once(r for r in self._records if _matches(r.path, path))

    # For the connections' threads.

    def _connected(self, now_open: int) -> int:
        """Counts a new connection and returns its number. The caller holds the condition."""
        self._peak_connections = max(self._peak_connections, now_open)
        self._changed.notify_all()
        return next(self._connection_numbers)

    def _arrived(self, handler: _Handler) -> tuple[_Record, FaultHandle | None]:
        """Logs a request and finds the fault that applies to it."""
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._changed:
            number = handler.server.begin(handler.connection)
            moment, step = time.monotonic(), next(self._steps)
            record = _Record(handler.command, handler.path, headers, number, moment, step)
            self._records.append(record)
            handle = next((h for h in self._handles if h._take_locked(handler.path)), None)
            self._changed.notify_all()
        return record, handle

    def _habits_of(self, path: str) -> list[Fault]:
        with self._changed:
            return [fault for pattern, fault in self._habits if _matches(path, pattern)]

    def _answer(self, path: str) -> Answer:
        content = self._find(path.partition("?")[0])
        answer = Answer(content or Content(b"not found\n", "text/plain"), path)
        answer.status = 200 if content else 404
        answer.ranges, answer.validators = self.ranges, self.validators
        return answer

    def _find(self, path: str) -> Content | Endless | None:
        with self._changed:
            file, served = self._files.get(path), list(self._served)
        found = (owner.find(path) for owner in served)
        return file or next(filter(None, found), None)

    def _progress(self, record: _Record, *, status: int | None = None, sent: int = 0) -> None:
        with self._changed:
            record.status = status or record.status
            record.sent += sent
            self._changed.notify_all()

    def _ended(self, record: _Record) -> None:
        with self._changed:
            record.ended, record.ended_time = next(self._steps), time.monotonic()
            self._changed.notify_all()

    def _hold(self, handle: FaultHandle, change: int) -> None:
        with self._changed:
            handle._held += change
            self._changed.notify_all()


#### Addresses that never answer ####

SILENT = ("127.0.0.2", "127.0.0.3")


@contextlib.contextmanager
def silent(port: int, addresses: Sequence[str] = SILENT) -> Iterator[None]:
    """Connections to this port of these addresses wait forever: the backlog is full (Linux)."""
    with contextlib.ExitStack() as stack:
        for address in addresses:
            listener = stack.enter_context(socket.create_server((address, port), backlog=0))
            fill = stack.enter_context(socket.socket())
            fill.connect(listener.getsockname())
            late = stack.enter_context(socket.socket())
            late.setblocking(False)
            late.connect_ex(listener.getsockname())
        yield


#### Panels ####

PANEL_TITLES = ("BBC One", "Sky News HD", "Arte", "RAI Uno")


class Panel:
    """An account at a provider's panel: its list of channels and their raw streams.

      /NAME/get.php?username=...&password=...   the list
      /NAME/live/USER/PASSWORD/NUMBER.ts        a channel; a redirect if `redirects` is true
      /NAME/edge/NUMBER.ts?token=...            its target; each token is valid for one request

    `connections` is 1 or 0: the panel refuses a second channel with 458, or allows any number.  It
    counts a channel until `lag` seconds after its end.  The channels' addresses use the `hosts` in
    turn.
    The panel waits `think` seconds before it sends the list.  The list has these `headers` after
    each address, and the panel refuses a channel without them.  `redirects` also applies to the
    list; `packed` compresses it.
    """

    def __init__(
        self,
        origin: Origin,
        name: str,
        titles: Sequence[str] = PANEL_TITLES,
        *,
        source: Callable[[], Iterable[bytes]],
        user: str = "ada.l",
        connections: int = 0,
        lag: float = 0.0,
        hosts: Sequence[str] = ("127.0.0.1",),
        think: float = 0.0,
        headers: Mapping[str, str] | None = None,
        redirects: bool = False,
        packed: bool = False,
    ) -> None:
        self.origin, self.name, self.user = origin, name, user
        self.titles = tuple(titles)
        self._headers = dict(headers or {})
        self._hosts = tuple(hosts)
        path = f"/{name}/get.php"
        if redirects:
            origin.add_file(path, b"")
            origin.habit(path, Redirect(f"/{name}/list.m3u"))
            path = f"/{name}/list.m3u"
        origin.add_file(path, self.text(), content_type="audio/x-mpegurl")
        if think:
            origin.habit(path, Think(think))
        if packed:
            origin.habit(path, Gzip())
        for number in range(len(self.titles)):
            path = self._add_channel(number, source, redirects)
            if connections:
                origin.habit(path, OneAtATime(origin, 458, self.channels, lag))

    def _add_channel(
        self, number: int, source: Callable[[], Iterable[bytes]], redirects: bool
    ) -> str:
        """Serves a channel; returns the path of its media."""
        path = self.path(number)
        demand = Demand({name.lower(): value for name, value in self._headers.items()})
        if redirects:
            target = f"/{self.name}/edge/{number}.ts"
            tokens = Tokens(target, uses=1)
            self.origin.add_file(path, b"")
            self.origin.habit(path, tokens, demand)
            self.origin.habit(target, tokens)
            path = target
        self.origin.add_endless(path, source, content_type="video/mp2t")
        self.origin.habit(path, demand)
        return path

    def path(self, number: int) -> str:
        """The path of the channel at this position of the list."""
        return f"/{self.name}/live/{self.user}/hunter2/{number}.ts"

    @property
    def channels(self) -> str:
        """A pattern that matches the requests for channels, before and after a redirect."""
        return f"/{self.name}/[le]*/*.ts"

    @property
    def url(self) -> str:
        """The address of the list."""
        account = f"username={self.user}&password=hunter2&type=m3u_plus"
        return f"{self.origin.url}/{self.name}/get.php?{account}"

    def text(self) -> bytes:
        """The list."""
        lines = ["#EXTM3U"]
        tail = "|" + "&".join(f"{name}={value}" for name, value in self._headers.items())
        for number, title in enumerate(self.titles):
            about = f'tvg-id="{self.name}-{number}" tvg-chno="{number + 1}" group-title="UK"'
            lines.append(f"#EXTINF:-1 {about},{title}")
            host = self._hosts[number % len(self._hosts)]
            address = f"http://{host}:{self.origin.port}{self.path(number)}"
            lines.append(address + tail if self._headers else address)
        return "\r\n".join([*lines, ""]).encode()


# Habits of panels, each of them in a separate panel.
PANELS: Mapping[str, Mapping[str, Any]] = {
    "panel-headers": {"headers": {"User-Agent": "IPTV/2.1", "X-Device": "tv"}},
    "panel-redirects": {"redirects": True},
    "panel-one-connection": {"connections": 1, "lag": 0.5},
    "panel-slow": {"think": 5.0},
    "panel-gzip": {"packed": True},
    "panel-all": {
        "headers": {"User-Agent": "IPTV/2.1", "X-Device": "tv"},
        "redirects": True,
        "connections": 1,
        "think": 5.0,
        "packed": True,
    },
}


def paced(segments: Sequence[bytes], seconds: float = 1.0, ahead: int = 3) -> Iterator[bytes]:
    """A raw stream of segments: the first `ahead` at once, the others at playing speed."""
    for number, segment in enumerate(itertools.cycle(segments)):
        size = max(1, len(segment) // 20)
        for at in range(0, len(segment), size):
            yield segment[at : at + size]
            if number >= ahead:
                time.sleep(seconds * size / len(segment))


#### By hand ####


def intra_refresh(pause: float = 0.01) -> Iterator[bytes]:
    """A raw stream whose first picture is its only key frame, with a pause before each packet."""
    from tests import media

    (first,) = media.ts_segments(1, 10.0)
    packets = list(media.packets(first))
    rest = packets[len(packets) // 2 :]
    for packet in itertools.chain(packets, itertools.cycle([*packets[:2], *rest])):
        yield packet
        time.sleep(pause)


TOKEN_SECONDS = 20.0  # how long the addresses of `vod-tokens` are valid


def _add_channels(origin: Origin) -> list[str]:
    """Adds a channel of each kind, moved by the clock, and returns their addresses."""
    from tests import media

    ts = media.ts_segments(30)
    init, fragments = media.fmp4(30)
    key = bytes(range(16))
    key_text = base64.b64encode(key).decode()
    aac = media.aac_segments(30)
    anew = [media.with_counters_from_zero(segment) for segment in ts]
    jumping = [Segment(data, discontinuity=n % 5 == 0) for n, data in enumerate(ts)]
    # From another encoder, with different PIDs: every second block of eight seconds.
    advertised = [
        Segment(data, 8.0, discontinuity=True)
        for programme in media.ts_segments(6, 8.0)
        for data in (programme, *media.advertisement_segments(seconds=8.0))
    ]
    playlists = [
        Playlist("advertisements", advertised, mode="live", clock=True),
        Playlist("live-ts", ts, mode="live", clock=True),
        Playlist("live-fmp4", fragments, mode="live", init=init, extension=".m4s", clock=True),
        Playlist("live-aac", aac, mode="live", extension=".aac", clock=True),
        Playlist("vod-ts", ts),
        Playlist("vod-fmp4", fragments, init=init, extension=".m4s"),
        Playlist("vod-aes", ts, aes_key=key),
        Playlist(
            "wrong-iv", ts, mode="live", aes_key=key, aes_iv=key, named_iv=key[::-1], clock=True
        ),
        Playlist("key-line-break", ts, aes_key=key, named_key=key + b"\r\n"),
        Playlist("key-data", ts, aes_key=key, named_key=f"data:;base64,{key_text}"),
        Playlist("key-wrong", ts, aes_key=key, named_key=key[::-1]),
        Playlist("unpadded", ts, aes_key=key, pads_all=False),
        Playlist("vod-byterange", ts, byte_ranges=True),
        Playlist("counters-restart", anew, mode="live", clock=True),
        with_insert(origin, "insert-fmp4", ts[:10], init, fragments[:3], mode="live", clock=True),
        with_insert(origin, "insert-aac", ts[:10], None, aac[:3], mode="live", clock=True),
        Playlist("event", ts, mode="event", clock=True),
        Playlist("discontinuity", jumping, mode="live", clock=True),
        Playlist("live-trickle", ts, mode="live", clock=True),
        Playlist("long-target", ts, mode="live", window=6, target_duration=10, clock=True),
        Playlist("one-listed", ts, mode="live", window=1, target_duration=3, clock=True),
        Playlist("told-long", misstated(ts, 8.0), mode="live", clock=True),
        Playlist("told-short", misstated(ts, 0.1), mode="live", clock=True),
        Playlist("told-zero", misstated(ts, 0.0), mode="live", target_duration=10, clock=True),
        Playlist("low-latency", ts, mode="live", low_latency=True, clock=True),
    ]
    origin.fault("/live-trickle/*5.ts", Trickle(2_000), times=None)
    sound = Playlist("sound", media.audio_only_segments(30), mode="live", clock=True)
    picture = Playlist("picture", media.video_only_segments(30), mode="live", clock=True)
    lost = Playlist("lost", media.audio_only_segments(30), mode="live", clock=True)
    origin.fault("/lost/*", Status(404), times=None)
    small = Playlist("small", ts, mode="live", clock=True)
    large = Playlist("large", ts, mode="live", clock=True)
    masters = [
        master("multivariant", {"360p": small, "720p": large}),
        master("separate-audio", {"360p": picture}, audio=sound),
        master("missing-audio", {"360p": picture}, audio=lost),
        Multivariant("copies", [Variant(p, 1_280_000, (640, 360)) for p in (small, large)]),
    ]
    addresses = [origin.add(playlist).url for playlist in playlists]
    addresses += [origin.add(multivariant).url for multivariant in masters]
    addresses.append(origin.add_endless("/intra-refresh", intra_refresh))
    addresses += _add_odd_answers(origin, ts)
    for name, habits in PANELS.items():
        addresses.append(Panel(origin, name, source=lambda: paced(ts), **habits).url)
    return addresses


def _add_odd_answers(origin: Origin, ts: Sequence[bytes]) -> list[str]:
    """Adds live channels with the faults of panels, CDNs and captive portals; the faults stay."""

    def odd(name: str, *faults: Fault, path: str = "index.m3u8", tags: str = "") -> str:
        media = [
            Segment(data, tags=(tags,) if tags and n % 6 < 2 else ()) for n, data in enumerate(ts)
        ]
        playlist = origin.add(Playlist(name, media, mode="live", clock=True))
        if faults:
            origin.fault(f"/{name}/{path}", *faults, times=None)
        return playlist.url

    def tokens(name: str, **limits: float) -> str:
        odd(name)
        given = Tokens(f"/{name}/index.m3u8", **limits)
        for path in (f"/login/{name}.m3u8", f"/{name}/index.m3u8"):
            origin.fault(path, given, times=None)
        return f"{origin.url}/login/{name}.m3u8"

    return [
        tokens("token-once", uses=1),
        tokens("token-20s", uses=math.inf, seconds=20),
        odd("web-page", Body(WEB_PAGE, "text/html")),
        odd("page-segments", Body(WEB_PAGE, "text/html"), path="*.ts"),
        odd("text", Body(PANEL_TEXT, "text/html")),
        odd("text-segments", Body(PANEL_TEXT, "video/mp2t"), path="*.ts"),
        odd("preface", Preface(b"\xef\xbb\xbf\r\n# made by a panel\n")),
        odd("image-segments", Preface(IMAGES["png"]), path="*.ts"),
        odd("empty", Body(b"#EXTM3U\n")),
        odd("dripping-head", DripHead(1.0)),
        odd("refused-segments", Status(403), path="*.ts"),
        odd("gaps", tags="#EXT-X-GAP"),
        odd("one-connection", OneAtATime(origin)),
        *(odd(name, edit) for name, edit in ODD_PLAYLISTS.items() if "range" not in name),
        odd("drm", tags='#EXT-X-KEY:METHOD=SAMPLE-AES,URI="skd://key"'),
    ]


def _renew_tokens(playlist: Playlist) -> NoReturn:
    """Renews the tokens every TOKEN_SECONDS.

    To try it, pause a player of `vod-tokens` for longer than that, then continue.
    """
    while True:
        playlist.renew_tokens()
        time.sleep(TOKEN_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve ready-made HLS channels on loopback.")
    parser.add_argument("--port", type=int, default=0, help="default: any free port")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes/s on each connection")
    arguments = parser.parse_args()
    from tests import media

    with Origin(arguments.port) as origin, contextlib.suppress(KeyboardInterrupt):
        origin.delay, origin.rate = arguments.delay, arguments.rate
        tokens = origin.add(Playlist("vod-tokens", media.ts_segments(60)))
        sys.stdout.write("\n".join([*_add_channels(origin), tokens.url, ""]))
        sys.stdout.flush()
        _renew_tokens(tokens)


if __name__ == "__main__":
    # For a script, Python looks for modules in this folder instead of the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    main()
