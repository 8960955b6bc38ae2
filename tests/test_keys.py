"""AES-128 as origins use it: odd keys, missing padding, cut bodies, and wrong keys or IVs."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from Crypto.Cipher import AES

from tests import media, test_faults
from tests.origin import Body, Break, Cut, Edit, Fault, Origin, Playlist, Stall, Status
from tests.program import eventually
from tests.server import TIMEOUT, Site
from tests.test_faults import Journal
from tests.threads import Task

Serve = Callable[..., Site]
journal = test_faults.journal

KEY = bytes(range(65, 81))
OTHER_KEY = bytes(range(16))
IV, OTHER_IV = bytes(range(30, 46)), bytes(range(100, 116))
NOT_A_KEY = "the decryption key is not an AES-128 key"
WRONG_KEY = "decryption failed: wrong key"
CUT_OFF = "decryption failed: the segment is incomplete"
SEGMENTS = media.ts_segments(12)
INIT, FRAGMENTS = media.fmp4()
AAC = media.aac_segments()
NULL = b"G\x1f\xff\x10" + b"\xff" * (media.PACKET - 4)
CONTAINERS: dict[str, dict[str, Any]] = {
    "ts": {"segments": SEGMENTS},
    "fmp4": {"segments": FRAGMENTS, "init": INIT, "extension": ".m4s"},
    "aac": {"segments": AAC, "extension": ".aac"},
}
BY_CONTAINER = pytest.mark.parametrize("container", CONTAINERS)


def encrypted(origin: Origin, container: str = "ts", **more: Any) -> Playlist:
    return origin.add(Playlist("news", **{**CONTAINERS[container], "aes_key": KEY, **more}))


def gaps(site: Site) -> int:
    return int(site.get("/status").json["streams"][0]["gaps"])


def whole(film: Playlist, container: str) -> bytes:
    init: bytes = CONTAINERS[container].get("init", b"")
    return init + film.plain(0, len(CONTAINERS[container]["segments"]))


def failure(site: Site) -> str:
    """The error of a start that is answered with 502."""
    answer = site.get("/news")
    assert answer.status == 502
    return str(answer.json["error"])


#### Keys ####

ODD_KEYS: dict[str, bytes | str] = {
    "line-feed": KEY + b"\n",
    "carriage-return": KEY + b"\r",
    "both": KEY + b"\r\n",
    "base64": "data:;base64," + base64.b64encode(KEY).decode(),
    "base64-of-text": "data:text/plain;base64," + base64.b64encode(KEY).decode(),
    "base64-without-padding": "data:;base64," + base64.b64encode(KEY).decode().rstrip("="),
    "percent": "data:," + "".join(f"%{byte:02X}" for byte in KEY),
    "percent-base64": "data:;base64," + quote_from_bytes(base64.b64encode(KEY), safe=""),
    "capitals": "DATA:;BASE64," + base64.b64encode(KEY).decode(),
    "plain-text": "data:text/plain," + KEY.decode(),
    "line-feed-in-base64": "data:;base64," + base64.b64encode(KEY + b"\n").decode(),
}


@pytest.mark.parametrize("name", ODD_KEYS)
def test_key_in_an_odd_form_is_accepted(origin: Origin, serve: Serve, name: str) -> None:
    film = encrypted(origin, named_key=ODD_KEYS[name])
    site = serve({"news": film.url})
    answer = site.get("/news")
    assert (answer.status, answer.body, answer.is_complete) == (200, whole(film, "ts"), True)
    assert gaps(site) == 0


HOPELESS_KEYS: dict[str, tuple[bytes | str, str]] = {
    "nine-bytes": (b"nine-byte", NOT_A_KEY),
    "two-line-breaks": (KEY + b"\n\n\n", NOT_A_KEY),
    "aes-192": (KEY + bytes(8), NOT_A_KEY),
    "aes-256": (KEY + KEY, NOT_A_KEY),
    "web-page": (b"<html>log in</html>", "the origin sent a web page, not a stream"),
    "short-data": ("data:;base64,AAAA", NOT_A_KEY),
    "long-data": ("data:;base64," + base64.b64encode(KEY + KEY).decode(), NOT_A_KEY),
    "broken-base64": ("data:;base64,A", NOT_A_KEY),
    "unknown-scheme": ("skd://key", "the origin refers to an unsupported kind of address"),
}


@pytest.mark.parametrize("name", HOPELESS_KEYS)
def test_invalid_key_fails_at_once(origin: Origin, serve: Serve, name: str) -> None:
    named, words = HOPELESS_KEYS[name]
    film = encrypted(origin, named_key=named)
    site = serve({"news": film.url}, timeout=TIMEOUT)
    began = time.monotonic()
    assert failure(site) == f"the key cannot be fetched: {words}"
    assert time.monotonic() - began < TIMEOUT / 4  # a missing key is tried for TIMEOUT
    assert origin.count(film.key_path) <= 1


def test_invalid_new_key_is_fetched_again_without_another_gap(origin: Origin, serve: Serve) -> None:
    """The only gap is the segment that reveals the new key."""
    news = encrypted(origin, mode="live", window=3)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    before = news.plain(0, 3)
    assert viewer.read(len(before)) == before
    news.change_key(OTHER_KEY)
    none = origin.fault(news.key_path, Body(b"too short"))
    news.advance(3)
    after = media.spliced(before, news.plain(4, 6))[len(before) :]
    assert viewer.read(len(after)) == after
    assert (none.taken, origin.count(news.key_path)) == (1, 3)
    eventually(lambda: gaps(site) == 1, "the segment of the old key is counted")


#### Padding ####


def in_whole_blocks(data: bytes, container: str, end: bytes = b"\0") -> bytes:
    """Media extended to a multiple of 16 bytes by a packet, box or frame that ends with `end`."""
    if container == "ts":
        last = NULL[: -len(end)] + end
        return data + NULL * (-(len(data) // media.PACKET + 1) % 4) + last
    size = 32 + -len(data) % 16
    if container == "fmp4":
        return data + (size.to_bytes(4, "big") + b"free").ljust(size - len(end), b"\0") + end
    header = bytearray(AAC[0][:7])
    header[3:6] = (int.from_bytes(header[3:6], "big") & 0xFC001F | size << 5).to_bytes(3, "big")
    return data + bytes(header).ljust(size - len(end), b"\0") + end


@BY_CONTAINER
def test_segments_without_padding_are_complete(
    origin: Origin, serve: Serve, container: str
) -> None:
    segments = [in_whole_blocks(data, container) for data in CONTAINERS[container]["segments"]]
    # This one is padded, because its length is usually not a multiple of 16 bytes.
    segments[1] = CONTAINERS[container]["segments"][1]
    film = encrypted(origin, container, segments=segments, pads_all=False)
    site = serve({"news": film.url})
    answer = site.get("/news")
    wanted = CONTAINERS[container].get("init", b"") + film.plain(0, len(segments))
    assert (answer.body, answer.is_complete) == (wanted, True)
    assert (gaps(site), origin.count(film.key_path)) == (0, 1)


@BY_CONTAINER
@pytest.mark.parametrize("end", [b"\1", b"\2\2", b"\x10" * 16], ids=["one", "two", "block"])
def test_end_that_looks_like_padding_is_kept(
    origin: Origin, serve: Serve, container: str, end: bytes
) -> None:
    """It belongs to the last packet, frame or box, which ends with the last block."""
    segments = [in_whole_blocks(data, container, end) for data in CONTAINERS[container]["segments"]]
    film = encrypted(origin, container, segments=segments, pads_all=False)
    answer = serve({"news": film.url}).get("/news")
    wanted = CONTAINERS[container].get("init", b"") + film.plain(0, len(segments))
    assert (answer.body, answer.is_complete) == (wanted, True)


def test_end_that_looks_like_padding_is_kept_after_a_tag(origin: Origin, serve: Serve) -> None:
    tags = [media.id3_timestamp(number) for number in range(len(AAC))]
    segments = [
        in_whole_blocks(tag + frames, "aac", b"\1") for tag, frames in zip(tags, AAC, strict=True)
    ]
    film = encrypted(origin, "aac", segments=segments, pads_all=False)
    shown = [data[len(tag) :] for tag, data in zip(tags, segments, strict=True)]
    assert serve({"news": film.url}).get("/news").body == b"".join(shown)


@BY_CONTAINER
def test_padding_is_removed_whatever_its_length(
    origin: Origin, serve: Serve, container: str
) -> None:
    """This holds even if padding extends a segment to a length that packets may have."""
    data = CONTAINERS[container]["segments"][0]
    unit = media.PACKET if container == "ts" else 1
    sizes = range(len(data) - 190 * unit, len(data), unit)
    film = encrypted(origin, container, segments=[data, *(data[:size] for size in sizes)])
    body = serve({"news": film.url}).get("/news").body
    init = CONTAINERS[container].get("init", b"")
    if container == "ts":
        body = media.without_notices(body)
    assert body == init + film.plain(0, 191)


#### Incomplete bodies ####


@BY_CONTAINER
@pytest.mark.parametrize("size", [5, 1000], ids=["the last block", "much"])
def test_body_that_ends_within_a_block_is_requested_again(
    origin: Origin, serve: Serve, container: str, size: int
) -> None:
    film = encrypted(origin, container)
    cut = origin.fault(film.segment_path(3), Cut(size), times=2)
    site = serve({"news": film.url})
    answer = site.get("/news")
    assert (answer.body, answer.is_complete) == (whole(film, container), True)
    assert (cut.taken, gaps(site)) == (2, 0)


def test_body_that_stays_incomplete_is_a_gap(
    origin: Origin, serve: Serve, journal: Journal
) -> None:
    film = encrypted(origin)
    cut = origin.fault(film.segment_path(3), Cut(5), times=None)
    site = serve({"news": film.url}, timeout=2)
    body, is_complete = site.watch("/news").read_all()
    assert is_complete
    assert media.without_notices(body).endswith(film.plain(4, 12))
    assert body.startswith(film.plain(0, 3) + film.plain(3, 4)[:1000])
    assert cut.taken > 1
    assert gaps(site) == 1
    journal.wait_for(f"abandoned segment 3: {CUT_OFF}")


def test_byte_range_that_ends_within_a_block_is_a_gap(origin: Origin, serve: Serve) -> None:
    """The range has no more bytes, so it is not requested again."""
    film = encrypted(origin, segments=SEGMENTS[:11], aes_iv=IV, byte_ranges=True)
    last = r"BYTERANGE:(\d+)@(.*\n.*\n#EXT-X-ENDLIST)"
    less = Edit(last, lambda found: f"BYTERANGE:{int(found[1]) - 5}@{found[2]}")
    origin.fault(film.path, less, times=None)
    site = serve({"news": film.url})
    body, is_complete = site.watch("/news").read_all()
    assert is_complete
    assert body.startswith(film.plain(0, 10))
    assert gaps(site) == 1
    assert origin.count("/news/all.ts") == 11


#### Wrong IVs ####


def fragments_alone(segments: tuple[bytes, ...]) -> list[bytes]:
    """Segments of fMP4 without the boxes in front of the first fragment."""
    return [data[data.index(b"moof") - 4 :] for data in segments]


def without_first_frame(data: bytes, header: bytes) -> bytes:
    return data[data.index(header, len(header)) :]


MP3_FRAMES, AC3_FRAMES = media.audio_frames("libmp3lame"), media.audio_frames("ac3")
SPOILED: dict[str, tuple[dict[str, Any], str, list[bytes]]] = {
    "fmp4": (CONTAINERS["fmp4"], "video/mp4", [INIT, *fragments_alone(FRAGMENTS)]),
    "aac": (CONTAINERS["aac"], "audio/aac", [without_first_frame(s, s[:2]) for s in AAC]),
    "aac-tags": (
        {"segments": [media.id3_timestamp(n) + s for n, s in enumerate(AAC)], "extension": ".aac"},
        "audio/aac",
        list(AAC),
    ),
    "mp3": (
        {"segments": [b"".join(MP3_FRAMES)], "extension": ".mp3"},
        "audio/mpeg",
        list(MP3_FRAMES[1:]),
    ),
    "ac3": (
        {"segments": [b"".join(AC3_FRAMES)], "extension": ".ac3"},
        "audio/ac3",
        list(AC3_FRAMES[1:]),
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_wrong_iv_loses_only_the_spoiled_box_or_frame(
    origin: Origin, serve: Serve, name: str
) -> None:
    options, kind, shown = SPOILED[name]
    film = origin.add(Playlist("news", **options, aes_key=KEY, aes_iv=IV, named_iv=OTHER_IV))
    site = serve({"news": film.url})
    answer = site.get("/news")
    assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
    assert (answer.body, answer.is_complete) == (b"".join(shown), True)
    assert gaps(site) == 0


def test_wrong_iv_that_spoils_the_only_fragment_is_an_error(origin: Origin, serve: Serve) -> None:
    """No decoder can play the rest."""
    segments = fragments_alone(FRAGMENTS)
    film = encrypted(origin, "fmp4", segments=segments, aes_iv=IV, named_iv=OTHER_IV)
    assert failure(serve({"news": film.url})) == WRONG_KEY


#### Wrong keys ####


@BY_CONTAINER
@pytest.mark.parametrize("pads_all", [True, False], ids=["padded", "unpadded"])
def test_wrong_key_at_a_start_is_an_error(
    origin: Origin, serve: Serve, container: str, pads_all: bool
) -> None:
    film = encrypted(origin, container, named_key=OTHER_KEY, pads_all=pads_all)
    assert failure(serve({"news": film.url})) == WRONG_KEY


@BY_CONTAINER
def test_changed_key_causes_one_gap_and_no_noise(
    origin: Origin, serve: Serve, container: str
) -> None:
    news = encrypted(origin, container, mode="live", window=3)
    site = serve({"news": news.url})
    viewer = site.watch("/news")
    before = CONTAINERS[container].get("init", b"") + news.plain(0, 3)
    assert viewer.read(len(before)) == before
    news.change_key(OTHER_KEY)
    news.advance(3)
    after = news.plain(4, 6)
    if container == "ts":
        after = media.spliced(before, after)[len(before) :]
    assert viewer.read(len(after)) == after
    eventually(lambda: gaps(site) == 1, "the segment of the old key is counted")
    assert origin.count(news.key_path) == 2


LOOKS: dict[str, bytes] = {
    "mp3": b"\xff\xfb\x90\x44",
    "aac": AAC[0][:7],
    "ac3": AC3_FRAMES[0][:7],
    "eac3": media.audio_frames("eac3")[0][:7],
}


@pytest.mark.parametrize("look", LOOKS)
def test_noise_that_begins_like_a_frame_is_detected(
    origin: Origin, serve: Serve, look: str
) -> None:
    """The first block, decrypted with a wrong key, depends on the IV and can have any bytes."""
    block = SEGMENTS[0][:16]
    assert all(data[:3] == block[:3] for data in SEGMENTS)
    first = AES.new(KEY, AES.MODE_CBC, IV).encrypt(block)
    noise = AES.new(OTHER_KEY, AES.MODE_ECB).decrypt(first)
    wanted = LOOKS[look].ljust(16, b"\0")
    iv = bytes(a ^ b for a, b in zip(noise, wanted, strict=True))
    film = encrypted(origin, segments=SEGMENTS[:1], aes_iv=IV, named_iv=iv, named_key=OTHER_KEY)
    assert failure(serve({"news": film.url})) == WRONG_KEY


def test_large_segments_of_noise_leave_nothing_behind(origin: Origin, serve: Serve) -> None:
    """Their downloads, which wait because their buffers are full, end as well."""
    large = [media.padded(data, 9 * 1024 * 1024) for data in SEGMENTS[:3]]
    news = encrypted(origin, segments=large, mode="live", window=3, named_key=OTHER_KEY)
    assert failure(serve({"news": news.url})) == WRONG_KEY


def test_encrypted_initialization_section_plays(origin: Origin, serve: Serve) -> None:
    film = encrypted(origin, "fmp4", aes_iv=IV, encrypts_init=True)
    assert serve({"news": film.url}).get("/news").body == whole(film, "fmp4")


def test_initialization_section_of_noise_is_an_error(origin: Origin, serve: Serve) -> None:
    film = encrypted(origin, "fmp4", aes_iv=IV, encrypts_init=True, named_key=OTHER_KEY)
    assert failure(serve({"news": film.url})) == WRONG_KEY


BREAKS: dict[str, list[Fault]] = {"refused": [Status(503)], "closed": [Break(0)]}


@pytest.mark.parametrize("kind", BREAKS)
def test_wrong_key_is_the_error_even_if_the_body_breaks_off_later(
    origin: Origin, serve: Serve, kind: str
) -> None:
    """Two segments arrive far enough to be noise, and then fail while the first one stalls."""
    film = encrypted(origin, segments=SEGMENTS[:3], named_key=OTHER_KEY)
    stall = origin.fault(film.segment_path(0), Stall(100))
    for number in (1, 2):
        origin.fault(film.segment_path(number), Break(20_000))
    refused = [
        origin.fault(film.segment_path(number), *BREAKS[kind], times=None) for number in (1, 2)
    ]
    site = serve({"news": film.url})
    starting = Task(lambda: failure(site))
    for fault in refused:
        fault.wait(2)
    stall.release()
    assert starting.result(TIMEOUT) == WRONG_KEY
