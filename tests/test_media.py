"""Framers and the test card: real H.264 and AAC, cut in every way, without threads and sockets."""

from __future__ import annotations

import functools
import io
import itertools
import lzma
import os
import random
import shutil
import subprocess
from base64 import b85decode
from collections.abc import Callable, Iterable, Iterator, Sequence

import av
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import pipe
from pipe import Container
from tests import make_test_card, media

CONTAINERS = (pipe.MPEG_TS, pipe.FMP4, pipe.MATROSKA, *pipe.PACKED_AUDIO, pipe.OTHER_MEDIA)
PACKET = media.PACKET
SIZES = (1, 7, 187, 188, 189, 4096, 1 << 20)  # bytes fed at a time
SPLITS = st.lists(st.integers(0, 1 << 20), max_size=10)  # places to cut at, modulo the length

# Kinds of join points: the segment's first byte, a picture that depends on no other, any unit, or a
# picture that depends on others, for a segment without a key frame.
START, KEY_FRAME, UNIT, MAKESHIFT = "start", "key frame", "unit", "makeshift"

Join = tuple[int, bytes, str]  # position, preamble, kind


class Fed:
    """A framer, with the number of bytes it has passed on and its join points."""

    def __init__(self, framer: pipe.Framer) -> None:
        self.framer = framer
        self.position = 0
        self.joins: list[Join] = []
        self._start = 0  # of the segment

    def start_segment(self) -> None:
        self._start = self.position
        assert self._take(self.framer.start_segment()) == []

    def feed(self, data: bytes) -> list[pipe.Block]:
        return self._take(self.framer.feed(data))

    def feed_init_section(self, data: bytes) -> list[pipe.Block]:
        return self._take(self.framer.feed_init_section(data))

    def flush(self) -> list[pipe.Block]:
        return self._take(self.framer.flush())

    def _take(self, items: Iterable[pipe.Framed]) -> list[pipe.Block]:
        blocks: list[pipe.Block] = []
        for item in items:
            if isinstance(item, pipe.Join):
                position = self._start if item.at_start else self.position
                self.joins.append((position, item.preamble, kind_of(item)))
            else:
                blocks.append(item)
                self.position += len(item)
        return blocks


def tables_of(fed: Fed) -> pipe.ProgramTables:
    assert isinstance(fed.framer, pipe.TsFramer)
    return fed.framer.tables


def kind_of(join: pipe.Join) -> str:
    if join.is_makeshift:
        return MAKESHIFT
    if join.at_start:
        return START
    return KEY_FRAME if join.is_key_frame else UNIT


def stepwise(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def cut(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return (data[start:stop] for start, stop in itertools.pairwise(edges))


def feed(framer: Fed, parts: Iterable[bytes]) -> list[bytes]:
    """The blocks that a framer makes of a whole stream."""
    blocks = [block for part in parts for block in framer.feed(part)]
    return list(map(bytes, blocks + framer.flush()))


def feed_segments(framer: Fed, segments: Iterable[bytes], size: int = 4096) -> list[bytes]:
    """The same for a stream in segments, with the calls that a feeder makes."""
    blocks: list[pipe.Block] = []
    for segment in segments:
        blocks += framer.flush()
        framer.start_segment()
        for part in stepwise(segment, size):
            blocks += framer.feed(part)
    return list(map(bytes, blocks + framer.flush()))


def edges_of(blocks: Iterable[bytes]) -> set[int]:
    """The positions where blocks begin and end."""
    return {0, *itertools.accumulate(map(len, blocks))}


def decodes_from(join: Join, stream: bytes) -> media.Decoded:
    position, preamble, _ = join
    return media.decode(preamble + stream[position:])


#### Streams, and their parts ####


def key_frames(stream: bytes) -> list[int]:
    """The positions of the packets that start a key frame: libav sets random_access_indicator."""
    return [
        number * PACKET
        for number, packet in enumerate(media.packets(stream))
        if media.pid(packet) == 0x100 and packet[1] & 0x40 and packet[3] & 0x20 and packet[5] & 0x40
    ]


def pictures(stream: bytes) -> list[int]:
    """The positions of the packets that start a picture of any kind."""
    return [
        number * PACKET
        for number, packet in enumerate(media.packets(stream))
        if media.pid(packet) == 0x100 and packet[1] & 0x40
    ]


def without_tables(segment: bytes) -> bytes:
    return b"".join(p for p in media.packets(segment) if media.pid(p) not in (0, 0x1000))


def newest_tables(stream: bytes, position: int) -> bytes:
    """The last PAT and the last PMT in front of a position."""
    before = list(media.packets(stream[:position]))
    return b"".join([p for p in before if media.pid(p) == pid][-1] for pid in (0, 0x1000))


def adts_frames(data: bytes) -> Iterator[bytes]:
    while data:
        size = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
        yield data[:size]
        data = data[size:]


def footed(tag: bytes) -> bytes:
    """An ID3 tag of version 4 with a footer, which its size does not include."""
    tag = tag[:5] + b"\x10" + tag[6:]
    return tag + b"3DI" + tag[3:10]


TAGS = {
    "version 2": media.id3_timestamp(1, 2),
    "version 3": media.id3_timestamp(1, 3),
    "version 4": media.id3_timestamp(1, 4),
    "footer": footed(media.id3_timestamp(1, 4)),
    "empty": b"ID3\4\0\0\0\0\0\0",
    "large": b"ID3\3\0\0\0\0\2\4" + b"ID3\xff\xf1" * 52,  # 2 * 128 + 4
}

# Packed audio: its container, and a function that encodes its frames.
AUDIO: dict[str, tuple[Container, Callable[[], Sequence[bytes]]]] = {
    "aac": (pipe.AAC, lambda: list(adts_frames(b"".join(media.aac_segments(4))))),
    "mp3": (pipe.MPEG_AUDIO, lambda: media.audio_frames("libmp3lame", 44_100)),
    "mp3 320k": (pipe.MPEG_AUDIO, lambda: media.audio_frames("libmp3lame", 44_100, 320_000)),
    "mp3 mpeg-2": (pipe.MPEG_AUDIO, lambda: media.audio_frames("libmp3lame", 22_050)),
    "mp3 mpeg-2.5": (pipe.MPEG_AUDIO, lambda: media.audio_frames("libmp3lame", 11_025)),
    "mp2": (pipe.MPEG_AUDIO, lambda: media.audio_frames("mp2", 44_100)),
    "mp2 mpeg-2": (pipe.MPEG_AUDIO, lambda: media.audio_frames("mp2", 22_050)),
    "ac3": (pipe.AC3, lambda: media.audio_frames("ac3", 48_000)),
    "ac3 44.1 kHz": (pipe.AC3, lambda: media.audio_frames("ac3", 44_100, 96_000)),
    "ac3 32 kHz 640k": (pipe.AC3, lambda: media.audio_frames("ac3", 32_000, 640_000)),
    "eac3": (pipe.EAC3, lambda: media.audio_frames("eac3")),
    "eac3 44.1 kHz 640k": (pipe.EAC3, lambda: media.audio_frames("eac3", 44_100, 640_000)),
}
of_all_audio = pytest.mark.parametrize("audio", AUDIO)


def frames_of(audio: str) -> list[bytes]:
    return list(AUDIO[audio][1]())


def audio_framer(audio: str = "aac") -> Fed:
    return Fed(AUDIO[audio][0].framer())


STREAMS: dict[str, tuple[Container, Callable[[], bytes]]] = {
    "ts": (pipe.MPEG_TS, lambda: b"".join(media.ts_segments(4)[:2])),
    "ts sound": (pipe.MPEG_TS, lambda: b"".join(media.audio_only_segments(4))),
    "fmp4": (pipe.FMP4, lambda: media.fmp4(4)[0] + b"".join(media.fmp4(4)[1][:2])),
    "aac": (pipe.AAC, lambda: b"".join(media.aac_segments(4))),
    "mp3": (pipe.MPEG_AUDIO, lambda: b"".join(frames_of("mp3"))),
    "ac3": (pipe.AC3, lambda: b"".join(frames_of("ac3"))),
    "eac3": (pipe.EAC3, lambda: b"".join(frames_of("eac3"))),
    "other": (pipe.OTHER_MEDIA, lambda: bytes(range(256)) * 300),
}
of_every_stream = pytest.mark.parametrize("name", STREAMS)


def stream_of(name: str) -> tuple[Container, bytes]:
    container, make = STREAMS[name]
    return container, make()


#### Detecting containers ####


def audio_start(make: Callable[[], Sequence[bytes]], tag: bytes = b"") -> bytes:
    return tag + b"".join(make())


STARTS: dict[str, tuple[Container, Callable[[], bytes]]] = {
    "ts": (pipe.MPEG_TS, lambda: media.ts_segments(4)[0]),
    "fmp4": (pipe.FMP4, lambda: media.fmp4(4)[0]),
    "fmp4 fragment": (pipe.FMP4, lambda: media.fmp4(4)[1][0]),
    "adts": (pipe.AAC, lambda: media.aac_segments(4)[0]),
    "id3": (pipe.AAC, lambda: TAGS["version 4"] + media.aac_segments(4)[0]),
    "id3 version 2": (pipe.AAC, lambda: TAGS["version 2"] + media.aac_segments(4)[0]),
    "several tags": (pipe.AAC, lambda: b"".join(TAGS.values()) + media.aac_segments(4)[0]),
    "id3 ts": (pipe.MPEG_TS, lambda: TAGS["version 3"] + media.ts_segments(4)[0]),
    "id3 text": (pipe.OTHER_MEDIA, lambda: TAGS["version 3"] + b"no audio " * 460),
    "matroska": (pipe.MATROSKA, lambda: matroska()),
    "flv": (pipe.OTHER_MEDIA, lambda: b"FLV\1\5\0\0\0\t" + bytes(4096)),
    "one frame of mp3": (pipe.MPEG_AUDIO, lambda: b"\xff\xfb\x90\x64" + bytes(4096)),
    "mp3 without a bit rate": (pipe.OTHER_MEDIA, lambda: b"\xff\xfb\x00\x64" + bytes(4096)),
    "utf-16": (pipe.OTHER_MEDIA, lambda: ("\ufeffHello, world. " * 160).encode("utf-16-le")),
    "text": (pipe.OTHER_MEDIA, lambda: b"Good day, this is no media. Go away.\n" * 120),
}
for name, (container, make) in AUDIO.items():
    STARTS[name] = (container, functools.partial(audio_start, make))
    STARTS[f"id3 {name}"] = (container, functools.partial(audio_start, make, TAGS["version 4"]))

ENOUGH = pipe.SNIFF_LIMIT + (8 << 10)  # bytes that suffice to detect any container
of_every_start = pytest.mark.parametrize(("container", "make"), STARTS.values(), ids=list(STARTS))


def matroska() -> bytes:
    """One second of the sound, in Matroska."""
    target = io.BytesIO()
    with (
        av.open(io.BytesIO(media.aac_segments(4)[0])) as source,
        av.open(target, "w", format="matroska") as out,
    ):
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return target.getvalue()


@of_every_start
def test_container_is_detected_from_the_first_bytes(
    container: Container, make: Callable[[], bytes]
) -> None:
    assert pipe.sniff(make()[:ENOUGH]) is container


@of_every_start
def test_fewer_bytes_give_the_same_answer_or_ask_for_more(
    container: Container, make: Callable[[], bytes]
) -> None:
    start = make()[:ENOUGH]
    answers = [pipe.sniff(start[:size]) for size in range(len(start) + 1)]
    assert answers[0] is None
    assert set(answers) == {None, container}
    first = answers.index(container)
    assert answers[first:] == [container] * (len(answers) - first), (
        "more bytes never change an answer"
    )


def test_one_packet_and_a_sync_byte_are_enough_for_a_transport_stream() -> None:
    start = media.ts_segments(4)[0]
    assert pipe.sniff(start[:PACKET]) is None
    assert pipe.sniff(start[: PACKET + 1]) is pipe.MPEG_TS


def test_transport_stream_may_start_anywhere_in_a_packet() -> None:
    """Also at an ADTS header within a packet, which looks like the start of packed audio."""
    stream = media.ts_segments(4)[0]
    starts = range(len(stream) - pipe.SNIFF_LIMIT)
    wrong = {at: pipe.sniff(stream[at : at + pipe.SNIFF_LIMIT]) for at in starts}
    assert {at: told for at, told in wrong.items() if told is not pipe.MPEG_TS} == {}


AUDIO_TYPES = {
    "audio/aac": pipe.AAC,
    "audio/aacp": pipe.AAC,
    "audio/mpeg": pipe.MPEG_AUDIO,
    "Audio/MPEG; charset=utf-8": pipe.MPEG_AUDIO,
    "audio/ac3": pipe.AC3,
    "audio/eac3": pipe.EAC3,
    "audio/ogg": pipe.OTHER_MEDIA,
    "text/html": pipe.OTHER_MEDIA,
    "": pipe.OTHER_MEDIA,
}


@pytest.mark.parametrize(("kind", "container"), AUDIO_TYPES.items(), ids=list(AUDIO_TYPES))
def test_content_type_decides_for_audio_that_starts_within_a_frame(
    kind: str, container: Container
) -> None:
    start = b"the rest of a frame" * 250
    assert pipe.sniff(start[: pipe.SNIFF_LIMIT - 1], media_type=kind) is None
    answer = pipe.sniff(start[: pipe.SNIFF_LIMIT], media_type=kind)
    assert answer is (None if container is pipe.OTHER_MEDIA else container)
    assert pipe.sniff(start[: pipe.SEARCH_LIMIT], media_type=kind) is container


@of_every_start
def test_first_bytes_take_precedence_over_the_content_type(
    container: Container, make: Callable[[], bytes]
) -> None:
    if container is not pipe.OTHER_MEDIA:
        assert pipe.sniff(make()[:ENOUGH], media_type="audio/aac") is container


def tagged(size: int) -> bytes:
    """The header of an ID3 tag that claims so many bytes, such as one with a large cover."""
    return b"ID3\3\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


def test_container_is_detected_after_a_tag_up_to_the_limit() -> None:
    size = pipe.TAG_LIMIT - 10
    start = tagged(size) + bytes(size)
    frames = b"".join(frames_of("ac3")[:4])
    assert pipe.sniff(start) is None
    assert pipe.sniff(start + frames) is pipe.AC3


def test_larger_tag_belongs_to_a_music_file() -> None:
    start = (tagged(1 << 27) + bytes(pipe.TAG_LIMIT))[: pipe.TAG_LIMIT]
    assert pipe.sniff(start[:-1]) is None
    assert pipe.sniff(start) is pipe.MPEG_AUDIO


TINY = {
    "nothing": (b"", pipe.OTHER_MEDIA),
    "a byte": (b"\xff", pipe.OTHER_MEDIA),
    "half a header of adts": (b"\xff\xf1", pipe.OTHER_MEDIA),
    "a word of utf-16": ("\ufeffHello".encode("utf-16-le"), pipe.OTHER_MEDIA),
    "header of adts": (b"\xff\xf1\x50\x40\x0b\x7f", pipe.AAC),
    "id3": (b"ID3", pipe.OTHER_MEDIA),
    "empty tag": (b"ID3\4\0\0\0\0\0\0", pipe.OTHER_MEDIA),
    "half a box": (b"\0\0\0\x18fty", pipe.OTHER_MEDIA),
    "a box header": (b"\0\0\0\x18ftyp", pipe.FMP4),
    "matroska": (b"\x1a\x45\xdf\xa3", pipe.MATROSKA),
    "a picture": (b"GIF89a\1\0\1\0", pipe.OTHER_MEDIA),
    "a word": (b"Gone", pipe.OTHER_MEDIA),
    "a sentence": (b"This programme starts at 8. Good bye.", pipe.OTHER_MEDIA),
}


@pytest.mark.parametrize(("body", "container"), TINY.values(), ids=list(TINY))
def test_container_of_a_whole_body_is_detected_however_short_it_is(
    body: bytes, container: Container
) -> None:
    assert pipe.sniff(body, is_all=True) is container


@pytest.mark.parametrize("count", [1, 2, 3])
def test_whole_body_of_few_packets_is_a_transport_stream(count: int) -> None:
    body = media.ts_segments(4)[0][: count * PACKET]
    assert pipe.sniff(body, is_all=True) is pipe.MPEG_TS


@given(start=st.binary(max_size=2 * pipe.SNIFF_LIMIT), fill=st.binary(min_size=1, max_size=9))
@example(start=b"\xff\xf1\x50\x43\xff\xff", fill=b"\xff")  # the largest frame of all
def test_sniff_always_decides_in_the_end(start: bytes, fill: bytes) -> None:
    assert pipe.sniff(start, is_all=True)
    enough = (start + fill * ENOUGH)[:ENOUGH]
    assert pipe.sniff(enough) or enough[:3] == b"ID3"
    assert pipe.sniff((start + fill * pipe.TAG_LIMIT)[: pipe.TAG_LIMIT + ENOUGH])


NOISE = random.Random(1).randbytes(1 << 16)


@pytest.mark.parametrize("size", [16, 188, 1000, 3300])
def test_packets_are_found_after_noise(size: int) -> None:
    """A wrong IV spoils 16 bytes, and some packagers put an image in front of the packets."""
    start = NOISE[:size] + media.ts_segments(4)[0][size if size < PACKET else 0 :]
    assert pipe.sniff(start) is pipe.MPEG_TS
    assert pipe.sniff(start[: pipe.SEARCH_LIMIT]) is pipe.MPEG_TS
    assert pipe.media_in(start) == start


def test_media_is_distinguished_from_noise() -> None:
    """A segment that was decrypted with a wrong key is noise."""
    assert pipe.media_in(NOISE[: pipe.NOISE_LIMIT - 1]) is None
    noise = list(stepwise(NOISE, pipe.NOISE_LIMIT))
    assert [pipe.media_in(part) for part in noise] == [b""] * len(noise)
    noise = list(stepwise(NOISE, pipe.SEARCH_LIMIT))
    assert [pipe.media_in(part, is_all=True) for part in noise] == [b""] * len(noise)
    assert pipe.media_in(NOISE[:100], is_all=True) == b""
    tag = TAGS["version 4"][:10]
    assert pipe.media_in(tag) == tag, "the rest of the tag does not matter"
    assert pipe.media_in(b"WEBVTT\n") == b"WEBVTT\n"
    for container, make in STARTS.values():
        if container is not pipe.OTHER_MEDIA:
            start = make()[:ENOUGH]
            if container.is_packed_audio:  # noise may begin like a frame, but not like several
                start *= pipe.CONFIRMING_FRAMES
            assert pipe.media_in(start) == start
    frame = b"\xff\xfb\x90\x64" + NOISE
    assert pipe.media_in(frame[:1000]) is None
    assert pipe.media_in(frame) == b""
    assert pipe.media_in(frame[:1000], is_all=True) == frame[:1000], (
        "this frame may be the only one"
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_only_packets_and_audio_can_be_joined_without_segments(container: Container) -> None:
    without = {pipe.FMP4, pipe.MATROSKA, pipe.OTHER_MEDIA}
    assert container.joins_late is (container not in without)


#### All bytes, once, in order ####


@of_every_stream
@pytest.mark.parametrize("size", SIZES)
def test_stream_fed_in_equal_parts_is_unchanged(name: str, size: int) -> None:
    container, stream = stream_of(name)
    stream = stream[:40_000] if size == 1 else stream
    framer = Fed(container.framer())
    assert b"".join(feed(framer, stepwise(stream, size))) == stream
    assert framer.position == len(stream)


@of_every_stream
@settings(deadline=None, max_examples=40)
@given(places=SPLITS)
def test_any_split_gives_the_same_bytes_and_join_points(name: str, places: list[int]) -> None:
    container, stream = stream_of(name)
    whole, split = Fed(container.framer()), Fed(container.framer())
    assert b"".join(feed(split, cut(stream, places))) == stream
    feed(whole, [stream])
    # UNIT joins are left out: each feed() reports at most one, so they depend on the split.
    assert [join for join in split.joins if join[2] is not UNIT] == [
        join for join in whole.joins if join[2] is not UNIT
    ]


@of_every_stream
@settings(deadline=None, max_examples=25)
@given(places=st.lists(SPLITS, min_size=3, max_size=3))
def test_any_split_of_segments_gives_the_same_bytes_and_join_points(
    name: str, places: list[list[int]]
) -> None:
    container, stream = stream_of(name)
    thirds = stepwise(stream, len(stream) // 3 + 1)  # a segment need not begin with a unit
    whole, split = Fed(container.framer()), Fed(container.framer())
    out = []
    for third, cuts in zip(thirds, places, strict=True):
        for framer, parts in ((whole, [third]), (split, cut(third, cuts))):
            framer.start_segment()
            blocks = feed(framer, parts)
            out += blocks if framer is split else []
    assert b"".join(out) == stream
    assert [join for join in split.joins if join[2] is not UNIT] == [
        join for join in whole.joins if join[2] is not UNIT
    ]


FRAME_LIKE = st.builds(
    lambda head, rest: head + rest,
    st.sampled_from([b"\xff\xf1\x50", b"\xff\xfb\x90", b"\xff\xe3\x10", b"\x0b\x77"]),
    st.binary(max_size=200),
)
TABLE_LIKE = st.builds(
    lambda head, body: (b"G" + head + body)[:PACKET].ljust(PACKET, b"\xff"),
    st.tuples(
        st.sampled_from([0x00, 0x40, 0x50, 0x1F]),
        st.sampled_from([0x00, 0x01, 0xFF]),
        st.sampled_from([0x10, 0x20, 0x30, 0xFF]),
    ).map(bytes),
    st.binary(max_size=24),
)
GARBAGE = st.lists(
    st.binary(max_size=200)
    | FRAME_LIKE
    | TABLE_LIKE
    | st.integers(0, 300).map(lambda count: b"G" * count),
    max_size=8,
).map(b"".join)


@pytest.mark.parametrize(
    "container", [c for c in CONTAINERS if c not in (pipe.FMP4, pipe.MATROSKA)]
)
@settings(deadline=None, max_examples=200)
@given(garbage=GARBAGE, places=SPLITS, segments=st.booleans(), is_prefixed=st.booleans())
def test_garbage_passes_unchanged(
    container: Container,
    garbage: bytes,
    places: list[int],
    segments: bool,
    is_prefixed: bool,
) -> None:
    assume(not container.is_packed_audio or b"ID3" not in garbage)
    framer = Fed(container.framer())
    out = []
    for number, part in enumerate(cut(garbage, places)):
        if is_prefixed and not number:
            out += framer.feed_init_section(part)
            continue
        if segments:
            out += framer.flush()
            framer.start_segment()
        out += framer.feed(part)
    out += framer.flush()
    assert b"".join(out) == garbage
    assert framer.position == len(garbage)
    assert all(0 <= join[0] <= len(garbage) for join in framer.joins)


#### Blocks ####


@of_every_stream
@pytest.mark.parametrize("size", [5_000, 1 << 24])
def test_blocks_are_bounded(name: str, size: int) -> None:
    container, stream = stream_of(name)
    blocks = feed(Fed(container.framer()), stepwise(stream * 4, size))
    assert all(0 < len(block) <= pipe.BLOCK_LIMIT for block in blocks)
    assert max(map(len, blocks)) > min(size, 25_000) * 0.9, "blocks are not cut without need"


@pytest.mark.parametrize("size", [4_999, 1 << 24])
def test_blocks_consist_of_whole_packets(size: int) -> None:
    packets = list(media.packets(stream_of("ts")[1])) * 6
    blocks = feed(Fed(pipe.TsFramer()), stepwise(b"".join(packets), size))
    assert edges_of(blocks) <= edges_of(packets)


@pytest.mark.parametrize("name", ["ts", "fmp4"])
def test_blocks_are_views_of_the_received_bytes(name: str) -> None:
    """Another copy of each byte would cost as much as receiving it."""
    container, stream = stream_of(name)
    framer = Fed(container.framer())
    parts = list(cut(stream, [len(stream) // 2 + 1]))
    views = [memoryview(block) for part in parts for block in framer.feed(part)]
    copied = [bytes(view) for view in views if not any(view.obj is part for part in parts)]
    assert len(b"".join(copied)) <= PACKET, "the packet between the two parts"


def test_dropped_rest_of_a_packet_is_not_passed_on() -> None:
    """After a gap the next segment starts without bytes of the last one."""
    stream = stream_of("ts")[1]
    framer = Fed(pipe.TsFramer())
    framer.start_segment()
    out = framer.feed(stream[: PACKET + 100])
    framer.framer.drop()
    assert framer.flush() == []
    framer.start_segment()
    out += framer.feed(stream) + framer.flush()
    assert b"".join(out) == stream[:PACKET] + stream
    assert framer.joins[-1][2] in (START, KEY_FRAME)
    assert PACKET in {position for position, _, _ in framer.joins}


def test_drop_loses_nothing_if_everything_was_passed_on() -> None:
    framer = Fed(pipe.Framer())
    out = framer.feed(b"data")
    framer.framer.drop()
    assert out + framer.flush() == [b"data"]


#### Join points of MPEG-TS ####


@pytest.mark.parametrize("size", [1, 188, 1000, 1 << 20])
@pytest.mark.parametrize(
    "make", [media.ts_segments, media.video_only_segments, media.audio_only_segments]
)
def test_segment_that_begins_with_tables_joins_at_its_first_byte(
    make: Callable[[int], tuple[bytes, ...]], size: int
) -> None:
    segments = make(4)
    starts = itertools.accumulate(map(len, segments[:-1]), initial=0)
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments, size)
    expected = [(start, b"", START) for start in starts]
    assert framer.joins == expected
    for join in expected:
        decodes_from(join, b"".join(segments))


def test_pat_precedes_a_segment_that_has_only_a_pmt() -> None:
    first, second = media.ts_segments(4)[:2]
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, [first, second[PACKET:]])
    _, preamble, _ = framer.joins[1]
    assert [media.pid(packet) for packet in media.packets(preamble)] == [0, 0x1000]


def with_other_stream(data: bytes, kind: int) -> bytes:
    """MPEG-TS whose PMT also lists a stream of this type, with a lower PID, that never arrives."""
    entry = bytes([kind, 0xE0, 0x50, 0xF0, 0])
    packets = []
    for packet in media.packets(data):
        if media.pid(packet) == 0x1000:
            end = 8 + (int.from_bytes(packet[6:8], "big") & 0xFFF) - 4
            body = packet[13:15] + b"\xf0\0" + entry + packet[17:end]
            packet = packet[:4] + make_test_card.section(2, body).ljust(PACKET - 4, b"\xff")
        packets.append(packet)
    return b"".join(packets)


@pytest.mark.parametrize("kind", [0x05, 0x0B, 0x15, 0x0F, 0x86])
def test_clock_of_radio_is_that_of_the_sound_that_arrives(kind: int) -> None:
    framer = pipe.TsFramer()
    framer.feed(with_other_stream(b"".join(media.audio_only_segments(4)), kind))
    assert framer.last_dts is not None


def test_section_of_a_radio_station_does_not_repeat_a_backlog() -> None:
    """DVB radio has sections for HbbTV, which have no timestamps."""
    parts = [with_other_stream(data, 0x05) for data in media.audio_only_segments(8)]
    framer = pipe.TsFramer()
    framer.feed(b"".join(parts[:6]))
    framer.shut(is_backlog=True)
    tables, backlog = parts[2][: 2 * PACKET], parts[2][2 * PACKET :] + b"".join(parts[3:])
    section = bytes([0x47, 0x40, 0x50, 0x10]).ljust(PACKET, b"\xff")
    items = framer.feed(tables + section + backlog)
    passed = b"".join(item for item in items if not isinstance(item, pipe.Join))
    sound = [packet for packet in media.packets(passed) if media.pid(packet) == 0x100]
    new = [p for p in media.packets(parts[6] + parts[7]) if media.pid(p) == 0x100]
    assert new
    assert len(sound) == pytest.approx(len(new), abs=2)


@pytest.mark.parametrize("make", [media.ts_segments, media.audio_only_segments])
def test_tables_precede_a_segment_that_has_none(
    make: Callable[[int], tuple[bytes, ...]],
) -> None:
    first, *rest = make(3)
    segments = [first, *map(without_tables, rest)]
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments)
    starts = itertools.accumulate(map(len, segments[:-1]), initial=0)
    preambles = [b"", first[: 2 * PACKET], first[: 2 * PACKET]]
    assert framer.joins == [
        (start, tables, START) for start, tables in zip(starts, preambles, strict=True)
    ]
    for join in framer.joins:
        decoded = decodes_from(join, b"".join(segments))
        assert decoded.starts_with_key is (make is media.ts_segments)


def test_segment_that_begins_with_other_pictures_joins_at_its_key_frame() -> None:
    stream = b"".join(media.ts_segments(4))
    keys = key_frames(stream)
    early = [min(at for at in pictures(stream) if at > key) for key in keys[:-1]]
    segments = list(cut(stream, early))  # each starts with the second picture of a group
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments)
    first, *others = framer.joins
    assert first == (0, b"", START)
    expected = []
    for place, key in zip(early, keys[1:], strict=True):
        expected.append((place, newest_tables(stream, place), MAKESHIFT))
        expected.append((key, newest_tables(stream, key), KEY_FRAME))
    assert others == expected
    for number, join in enumerate(others[1::2], 1):
        decoded = decodes_from(join, stream)
        assert decoded.starts_with_key
        assert decoded.video_frames == (4 - number) * media.FPS


def test_segment_without_key_frame_joins_at_its_first_picture() -> None:
    first, second, *_ = media.ts_segments(4)
    middle = pictures(first)[12]
    segments = [first[:middle], first[middle:], second]
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments)
    assert framer.joins == [
        (0, b"", START),
        (middle, newest_tables(first, middle), MAKESHIFT),
        (len(first), b"", START),
    ]


def test_later_key_frames_of_a_segment_are_join_points_too() -> None:
    segments = media.ts_segments(4)
    stream = b"".join(segments)
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, [stream])
    first, *others = key_frames(stream)
    assert first == 2 * PACKET
    assert framer.joins == [
        (0, b"", START),
        *((key, newest_tables(stream, key), KEY_FRAME) for key in others),
    ]


@pytest.mark.parametrize("offset", [0, 1, 100, 187])
def test_stream_without_segments_joins_at_its_key_frames(offset: int) -> None:
    stream = b"".join(media.ts_segments(4))
    framer = Fed(pipe.TsFramer())
    feed(framer, stepwise(stream[offset:], 1000))
    found = [join for join in framer.joins if join[2] is not UNIT]
    keys = key_frames(stream)[1 if offset else 0 :]  # no join point before the first PAT
    assert found == [(key - offset, newest_tables(stream, key), KEY_FRAME) for key in keys]
    for join in found:
        assert decodes_from(join, stream[offset:]).starts_with_key


def joins_by_turns(framer: Fed, stream: bytes) -> list[Join]:
    """The join points of a stream that is fed in parts of 1000 bytes."""
    known = len(framer.joins)
    for part in stepwise(stream, 1000):
        framer.feed(part)
    return framer.joins[known:]


def test_units_are_not_join_points_after_a_key_frame() -> None:
    first, *others = media.ts_segments(4)
    early = pictures(first)[1]
    stream = first[: 2 * PACKET] + first[early:] + b"".join(others)
    found = joins_by_turns(Fed(pipe.TsFramer()), stream)
    kinds = [kind for _, _, kind in found]
    assert kinds == [UNIT] * kinds.count(UNIT) + [KEY_FRAME] * 3
    assert kinds.count(UNIT) > 3


def without_indicator(packet: bytes) -> bytes:
    """The packet with its random_access_indicator cleared."""
    has_flags = packet[3] & 0x20 and packet[4]
    return packet[:5] + bytes([packet[5] & ~0x40]) + packet[6:] if has_flags else packet


def of_unknown_type(packet: bytes) -> bytes:
    """The packet, with MPEG-4 Visual instead of H.264 if it is the PMT; no framer parses that."""
    return (
        packet.replace(b"\x1b\xe1\x00", b"\x10\xe1\x00") if media.pid(packet) == 0x1000 else packet
    )


@pytest.mark.parametrize("change", [without_indicator, of_unknown_type])
def test_key_frame_is_detected_by_its_indicator_or_its_units(
    change: Callable[[bytes], bytes],
) -> None:
    stream = b"".join(media.ts_segments(4))
    changed = b"".join(map(change, media.packets(stream)))
    assert changed != stream
    framer = Fed(pipe.TsFramer())
    feed(framer, [changed])
    found = [position for position, _, kind in framer.joins if kind is KEY_FRAME]
    assert found == key_frames(stream)


UNITS = {
    "mpeg-2": (0x02, b"\0\0\1\xb3\x2d\2\x40", b"\0\0\1\0\0\x10"),
    "h.264 sps": (0x1B, b"\0\0\0\1\x09\xf0\0\0\0\1\x67\x64", b"\0\0\0\1\x09\xf0\0\0\1\x41\x9a"),
    "h.264 idr": (0x1B, b"\0\0\1\x65\x88", b"\0\0\1\x01\x9a"),
    "h.265 vps": (0x24, b"\0\0\1\x46\1\x50\0\0\1\x40\1", b"\0\0\1\x46\1\x50\0\0\1\x02\1"),
    "h.265 idr": (0x24, b"\0\0\1\x26\1", b"\0\0\1\x00\1"),
    "h.265 cra": (0x24, b"\0\0\1\x2a\1", b"\0\0\1\x12\1"),
}


@pytest.mark.parametrize(("kind", "key", "other"), UNITS.values(), ids=list(UNITS))
def test_units_of_key_frames_are_detected(kind: int, key: bytes, other: bytes) -> None:
    card = make_test_card
    writer = card.Writer()
    pid = (0xE000 | card.VIDEO_PID).to_bytes(2, "big")
    pmt = card.section(2, pid + b"\xf0\0" + bytes([kind]) + pid + b"\xf0\0")
    for table, payload in ((0, card.pat()), (card.PMT_PID, pmt)):
        writer.packet(table, payload.ljust(PACKET - 4, b"\xff"), True, b"")
    expected = []
    for number, unit in enumerate([other, key, other, other, key]):
        if unit is key:
            expected.append(len(writer.stream))
        writer.write(card.VIDEO_PID, card.pes(card.VIDEO_STREAM_ID, number * 3600, unit))
    framer = Fed(pipe.TsFramer())
    feed(framer, [bytes(writer.stream)])
    found = [position for position, _, kind in framer.joins if kind is KEY_FRAME]
    assert found == expected


def test_stream_of_sound_joins_at_frames() -> None:
    stream = b"".join(media.audio_only_segments(4))
    found = joins_by_turns(Fed(pipe.TsFramer()), stream)
    assert len(found) >= 10
    assert {kind for _, _, kind in found} == {UNIT}
    for join in found[:-2:4]:  # from later ones, the demuxer gets too few frames
        assert join[1] == newest_tables(stream, join[0])
        packet = stream[join[0] : join[0] + PACKET]
        assert packet[1] & 0x40, "a PES starts"
        assert decodes_from(join, stream).audio_frames > 0


def without_video(stream: bytes) -> bytes:
    """The stream without video packets, like a radio channel whose PMT names video anyway."""
    return b"".join(p for p in media.packets(stream) if media.pid(p) != 0x100)


def sound_starts(stream: bytes) -> list[int]:
    return [
        number * PACKET
        for number, packet in enumerate(media.packets(stream))
        if media.pid(packet) == 0x101 and packet[1] & 0x40
    ]


def test_segments_without_the_announced_video_have_join_points() -> None:
    segments = list(map(without_video, media.ts_segments(8)))
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments)
    starts = list(itertools.accumulate(map(len, segments[:-1]), initial=0))
    expected = [(start, b"", START) for start in starts]
    assert framer.joins == expected[-len(framer.joins) :]
    assert len(framer.joins) >= 4, "the missing video is noticed within a few seconds"
    for join in expected[:-1]:
        assert decodes_from(join, b"".join(segments)).audio_frames > 0


@pytest.mark.parametrize("before", [1, 6], ids=["at once", "after a while"])
def test_video_that_starts_late_joins_at_its_key_frames(before: int) -> None:
    segments = list(media.ts_segments(10))
    segments[:before] = map(without_video, segments[:before])
    late = pictures(segments[before])[3]  # not a key frame: the segment begins with it
    segments[before] = segments[before][: 2 * PACKET] + segments[before][late:]
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, segments)
    starts = list(itertools.accumulate(map(len, segments[:-1]), initial=0))
    found = [join for join in framer.joins if join[0] > starts[before] + 2 * PACKET]
    assert found == [(start, b"", START) for start in starts[before + 1 :]]
    assert tables_of(framer).video_pid == 0x100


def test_stream_without_the_announced_video_joins_at_frames() -> None:
    stream = without_video(b"".join(media.ts_segments(8)))
    framer = Fed(pipe.TsFramer())
    found = joins_by_turns(framer, stream)
    assert {kind for _, _, kind in found} == {UNIT}
    assert {position for position, _, _ in found} <= set(sound_starts(stream))
    last = sound_starts(stream)[-1]
    assert framer.framer.last_dts == pipe.read_timestamp(
        stream, last + next(pipe.timestamp_positions(stream[last : last + PACKET]))
    ), "DTS are those of the sound"


def test_stream_that_loses_its_video_joins_at_frames() -> None:
    with_video = b"".join(media.ts_segments(4))
    stream = with_video + without_video(b"".join(media.ts_segments(8)[4:]))
    found = joins_by_turns(Fed(pipe.TsFramer()), stream)
    assert [position for position, _, kind in found if kind is KEY_FRAME] == key_frames(with_video)
    assert found[-1][2] is UNIT
    other = b"".join(media.audio_only_segments(4))  # its PMT names no video
    found = joins_by_turns(Fed(pipe.TsFramer()), with_video + other)
    assert found[-1][0] > len(with_video)
    assert found[-1][2] is UNIT


def test_video_is_not_lost_if_the_clock_jumps_back() -> None:
    first, *_, last = media.ts_segments(8)
    framer = Fed(pipe.TsFramer())
    feed(framer, [last, without_video(first)])  # sound may arrive before video
    assert tables_of(framer).video_pid == 0x100


def test_stream_without_segments_after_a_seam_has_its_own_join_points() -> None:
    first, *others = media.ts_segments(4)
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, [first])
    framer.framer.drop()
    framer.framer.leave_segments()
    framer.joins.clear()
    early = pictures(others[0])[1]  # before the first key frame, which may never arrive
    found = joins_by_turns(framer, others[0][: 2 * PACKET] + others[0][early:])
    assert len(found) > 3
    assert {kind for _, _, kind in found} == {UNIT}
    found = joins_by_turns(framer, others[1])
    assert KEY_FRAME in {kind for _, _, kind in found}
    assert {START, MAKESHIFT}.isdisjoint(kind for _, _, kind in found)


def long_section(pid: int, table_id: int, body: bytes) -> bytes:
    """A section in as many packets as it needs; the first counter is 0."""
    writer = make_test_card.Writer()
    data = make_test_card.section(table_id, body)
    data += b"\xff" * (-len(data) % (PACKET - 4))
    writer.write(pid, data)
    return bytes(writer.stream)


def long_pat() -> bytes:
    programs = [(1, 0x1000), *((number, 0x1100 + number) for number in range(2, 60))]
    return b"".join(n.to_bytes(2, "big") + (0xE000 | pid).to_bytes(2, "big") for n, pid in programs)


def long_pmt() -> bytes:
    """A PMT of the real streams, after descriptors that fill more than one packet."""
    pmt = media.ts_segments(4)[0][PACKET : 2 * PACKET]
    streams = pmt[17 : 5 + 3 + (int.from_bytes(pmt[6:8], "big") & 0xFFF) - 4]
    text = b"\x05\x04StPi" * 40
    return b"\xe1\x00" + (0xF000 | len(text)).to_bytes(2, "big") + text + streams


def split_tables(which: str) -> list[bytes]:
    pat, pmt = itertools.islice(media.packets(media.ts_segments(4)[0]), 2)
    if which != "pmt":
        pat = long_section(0, 0, long_pat())
    if which != "pat":
        pmt = long_section(0x1000, 2, long_pmt())
    return [pat, pmt]


@pytest.mark.parametrize("which", ["pat", "pmt", "both"])
@pytest.mark.parametrize("size", [1, 188, 1 << 20])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_tables_may_be_split_over_packets(which: str, size: int, apart: bool) -> None:
    pat, pmt = split_tables(which)
    assert len(pat + pmt) > 2 * PACKET
    between = media.packets(b"".join([b"\x47\x1f\xff\x10" + bytes(184)] * 9))
    packets = [*media.packets(pat), *media.packets(pmt)]
    head = b"".join(p + next(between) * apart for p in packets)
    segments = [head + without_tables(segment) for segment in media.ts_segments(4)[:2]]
    segments.append(without_tables(media.ts_segments(4)[2]))
    stream = b"".join(segments)
    framer = Fed(pipe.TsFramer())
    assert b"".join(feed_segments(framer, segments, size)) == stream
    first, second = len(segments[0]), len(segments[0] + segments[1])
    assert framer.joins == [
        (0, b"", START),
        (first, b"", START),
        (second, pat + pmt, START),
    ]
    # The counters of the tables do not continue, which does not matter where a decoder starts.
    assert media.decode(pat + pmt + stream[second:], strict=False).video_frames == media.FPS


@settings(deadline=None, max_examples=60)
@given(garbage=GARBAGE, places=SPLITS)
@example(garbage=b"G" * 400, places=[])
@example(garbage=b"G", places=[])
@example(garbage=b"\0" * 187, places=list(range(37_000, 38_500)))
def test_packets_are_found_again_after_garbage(garbage: bytes, places: list[int]) -> None:
    segments = media.ts_segments(4)
    assert not garbage.startswith(b"\xff" * PACKET)
    stream = segments[0] + garbage + segments[1] + segments[2]
    last = len(segments[0] + garbage + segments[1])
    framer = Fed(pipe.TsFramer())
    assert b"".join(feed(framer, cut(stream, places))) == stream
    position, preamble, kind = framer.joins[-1]
    assert (position, kind) == (last + 2 * PACKET, KEY_FRAME)
    assert len(preamble) % PACKET == 0


def test_garbage_in_a_segment_does_not_affect_the_next_one() -> None:
    segments = [data[:-100] for data in media.ts_segments(4)]  # each ends in half a packet
    framer = Fed(pipe.TsFramer())
    assert b"".join(feed_segments(framer, segments)) == b"".join(segments)
    starts = itertools.accumulate(map(len, segments[:-1]), initial=0)
    assert framer.joins == [(start, b"", START) for start in starts]


#### fMP4 ####


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_fmp4_segments_join_with_their_initialization_section(size: int) -> None:
    init, segments = media.fmp4(4)
    framer = Fed(pipe.FMP4.framer())
    out = list(map(bytes, framer.feed_init_section(init)))
    out += feed_segments(framer, segments, size)
    stream = init + b"".join(segments)
    assert b"".join(out) == stream
    starts = itertools.accumulate(map(len, segments[:-1]), initial=len(init))
    assert framer.joins == [(start, init, START) for start in starts]
    for number, join in enumerate(framer.joins):
        decoded = decodes_from(join, stream)
        assert decoded.starts_with_key
        assert decoded.video_frames == (4 - number) * media.FPS


def test_fmp4_stream_without_segments_has_no_join_points() -> None:
    """Late viewers cannot join it, so each viewer has an upstream of its own."""
    framer = Fed(pipe.FMP4.framer())
    feed(framer, [stream_of("fmp4")[1]])
    assert framer.joins == []


def test_initialization_section_is_not_copied_for_each_join_point() -> None:
    init, fragments = media.fmp4(4)
    framer = Fed(pipe.FMP4.framer())
    framer.feed_init_section(init)
    feed_segments(framer, fragments)
    assert len({id(preamble) for _, preamble, _ in framer.joins}) == 1


def test_announced_initialization_section_replaces_the_old_one() -> None:
    init, fragments = media.fmp4(4)
    other = init + b"\0\0\0\x10free another"
    framer = Fed(pipe.FMP4.framer())
    for head, fragment in ((init, fragments[0]), (other, fragments[1])):
        framer.flush()
        framer.feed_init_section(head)
        feed_segments(framer, [fragment])
    assert framer.joins == [
        (len(init), init, START),
        (len(init + fragments[0] + other), other, START),
    ]


#### Packed audio ####


def audio_segments(audio: str) -> list[bytes]:
    frames = frames_of(audio)
    size = len(frames) // 4 + 1
    return [b"".join(frames[at : at + size]) for at in range(0, len(frames), size)]


@of_all_audio
@pytest.mark.parametrize("size", [9, 10, 1 << 20])
def test_audio_segments_join_at_their_first_byte(audio: str, size: int) -> None:
    segments = audio_segments(audio)
    framer = audio_framer(audio)
    out = feed_segments(framer, [TAGS["version 4"] + segment for segment in segments], size)
    assert b"".join(out) == b"".join(segments)
    starts = itertools.accumulate(map(len, segments[:-1]), initial=0)
    assert framer.joins == [(start, b"", START) for start in starts]
    for join in framer.joins:
        assert decodes_from(join, b"".join(segments)).audio_frames > 0


@pytest.mark.parametrize("size", [1, 9, 10, 11, 1 << 20])
@pytest.mark.parametrize("tag", TAGS.values(), ids=list(TAGS))
def test_id3_tag_in_front_of_a_segment_is_removed(tag: bytes, size: int) -> None:
    segments = media.aac_segments(4)
    framer = audio_framer()
    out = feed_segments(framer, [tag + segment for segment in segments], size)
    assert b"".join(out) == b"".join(segments)
    starts = itertools.accumulate(map(len, segments[:-1]), initial=0)
    assert framer.joins == [(start, b"", START) for start in starts]
    assert framer.framer.preamble == tag, "HLS needs the tag"


@settings(deadline=None, max_examples=100)
@given(
    audio=st.sampled_from(sorted(AUDIO)),
    in_segments=st.booleans(),
    tags=st.lists(st.sampled_from(sorted(TAGS)), max_size=6),
    frames=st.integers(0, 4),
    places=SPLITS,
)
@example(audio="aac", in_segments=True, tags=sorted(TAGS), frames=2, places=[])
def test_only_leading_id3_tags_are_removed(
    audio: str, in_segments: bool, tags: Sequence[str], frames: int, places: list[int]
) -> None:
    """Any number of them in a row are removed."""
    sound = b"".join(frames_of(audio)[:frames])
    framer = audio_framer(audio)
    if in_segments:
        framer.start_segment()
    tagged = b"".join(TAGS[tag] for tag in tags) + sound
    assert b"".join(feed(framer, cut(tagged, places))) == sound
    assert framer.position == len(sound)


def test_frames_that_contain_the_letters_of_a_tag_are_kept() -> None:
    payload = b"ID3\4\0\0\0\0\0\x7f" * 20
    frame = make_test_card.adts(payload)
    stream = frame * 10
    for size in SIZES:
        assert b"".join(feed(audio_framer(), stepwise(stream, size))) == stream


@pytest.mark.parametrize("is_whole", [True, False], ids=["size too large", "broken off"])
def test_tag_removes_no_byte_of_the_next_segment(is_whole: bool) -> None:
    first, second, *_ = media.aac_segments(4)
    tag = b"ID3\4\0\0\0\x7f\x7f\x7f" + bytes(20)  # claims 2 MiB
    segments = [tag + first if is_whole else tag, second]
    out = b"".join(feed_segments(audio_framer(), segments))
    assert out.endswith(second)


def test_tags_of_packed_audio_of_another_kind_are_removed() -> None:
    mp3 = b"\xff\xfb\x90\x64" + bytes(range(200)) * 2
    out = feed_segments(audio_framer(), [TAGS["version 4"] + mp3 * 3] * 3, 100)
    assert b"".join(out) == mp3 * 9


@pytest.mark.parametrize("size", [1, 333, 1 << 20])
def test_audio_without_segments_can_be_joined_anywhere(size: int) -> None:
    """The stream begins within a frame, and has other bytes between its frames."""
    stream = (b"".join(frames_of("aac")) + b"no frame at all" + b"".join(frames_of("aac")))[100:]
    framer = audio_framer()
    for at, part in zip(range(0, len(stream), size), stepwise(stream, size), strict=True):
        assert b"".join(framer.feed(part)) == part, "no byte is held back"
        assert framer.joins == [(at, b"", UNIT)], "each feed() reports one join point"
        framer.joins.clear()
    for at in (0, 1000, len(stream) // 2):
        assert media.decode(stream[at:], strict=False).audio_frames > 0


def test_audio_without_segments_after_a_seam_has_its_own_join_points() -> None:
    frames = frames_of("aac")
    framer = audio_framer()
    feed_segments(framer, [b"".join(frames[:40])])
    start = framer.position
    framer.framer.drop()
    framer.framer.leave_segments()
    framer.joins.clear()
    found = joins_by_turns(framer, TAGS["version 3"] + b"".join(frames))
    assert {kind for _, _, kind in found} == {UNIT}
    assert found[0][0] == start
    assert framer.position == start + len(b"".join(frames)), "the tag is removed"


#### Other containers ####


def test_unknown_container_joins_at_segments_with_its_initialization_section() -> None:
    framer = Fed(pipe.Framer())
    framer.feed_init_section(b"head")
    assert b"".join(feed_segments(framer, [b"one", b"two"])) == b"onetwo"
    assert framer.joins == [
        (4, b"head", START),
        (7, b"head", START),
    ]


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        (pipe.MPEG_TS, pipe.TsFramer),
        (pipe.FMP4, pipe.Framer),
        (pipe.AAC, pipe.AudioFramer),
        (pipe.MPEG_AUDIO, pipe.AudioFramer),
        (pipe.AC3, pipe.AudioFramer),
        (pipe.EAC3, pipe.AudioFramer),
        (pipe.MATROSKA, pipe.Framer),
        (pipe.OTHER_MEDIA, pipe.Framer),
    ],
    ids=lambda value: getattr(value, "media_type", ""),
)
def test_each_container_has_its_framer(container: Container, kind: type[pipe.Framer]) -> None:
    assert type(container.framer()) is kind


#### Time stamps ####


@given(value=st.integers(0, pipe.TIMESTAMP_MODULUS - 1), size=st.integers(0, 100))
def test_time_stamp_is_read_as_it_was_written(value: int, size: int) -> None:
    """The adaptation field before it may have any size, and no other byte changes."""
    field = bytes([size, *size * b"\xff"])
    head = b"G\x41\x00\x30" + field + b"\0\0\1\xe0\0\0\x80\x80\5"
    packet = bytearray(head + b"\x21\0\1\0\1").ljust(PACKET, b"\xa5")
    pipe.delay_timestamps(packet, value)
    assert pipe.read_timestamp(packet, len(head)) == value
    stamp, rest = packet[len(head) : len(head) + 5], packet[len(head) + 5 :]
    assert (stamp[0] & 0xF1, stamp[2] & 1, stamp[4] & 1) == (0x21, 1, 1), (
        "marker bits do not change"
    )
    assert packet[: len(head)] == head
    assert set(rest) == {0xA5}


def test_time_stamp_is_coded_as_in_the_standard() -> None:
    pes = make_test_card.pes(0xE0, 0x1_2345_6789, b"")
    assert pipe.read_timestamp(pes, 9) == 0x1_2345_6789


#### The test card ####

WRAP = pipe.TIMESTAMP_MODULUS // pipe.TEST_CARD_TICKS - 2  # two loops before time stamps wrap


def stamps(stream: bytes, pid: int) -> list[int]:
    """The PTS of a PID's PES packets."""
    found = []
    for packet in media.packets(stream):
        if media.pid(packet) == pid and packet[1] & 0x40:
            start = 5 + packet[4] if packet[3] & 0x20 else 4
            assert packet[start : start + 3] == b"\0\0\1"
            found.append(pipe.read_timestamp(packet, start + 9))
    return found


def clock(stream: bytes) -> list[int]:
    """All PCR values, in ticks of 90 kHz."""
    return [
        int.from_bytes(packet[6:12], "big") >> 15
        for packet in media.packets(stream)
        if packet[3] & 0x20 and packet[4] and packet[5] & 0x10
    ]


def steps(values: Sequence[int]) -> set[int]:
    pairs = itertools.pairwise(values)
    return {(after - before) % pipe.TIMESTAMP_MODULUS for before, after in pairs}


def loops(first: int, count: int) -> bytes:
    return b"".join(pipe.test_card_segment(first + number) for number in range(count))


across_loops = pytest.mark.parametrize("first", [0, 1000, WRAP], ids=["start", "later", "wrap"])


@across_loops
def test_counters_of_the_test_card_are_continuous(first: int) -> None:
    last: dict[int, int] = {}
    for packet in media.packets(loops(first, 20)):
        pid = media.pid(packet)
        assert packet[3] & 0x10, "each packet has a payload, so each increments the counter"
        assert packet[3] & 15 == (last.get(pid, packet[3] - 1) + 1) & 15
        last[pid] = packet[3] & 15
    assert len(last) == 4


@across_loops
def test_time_stamps_of_the_test_card_are_continuous(first: int) -> None:
    stream = loops(first, 5)
    card = make_test_card
    pictures, sounds = stamps(stream, card.VIDEO_PID), stamps(stream, card.AUDIO_PID)
    assert len(pictures) == 5 * card.PICTURES
    assert steps(pictures) == {card.PICTURE_TICKS}
    assert steps(sounds) == {card.AAC_FRAME_TICKS * card.AAC_FRAMES_PER_PES}
    assert steps(clock(stream)) == {card.PICTURE_TICKS}
    assert (pictures[0] - clock(stream)[0]) % pipe.TIMESTAMP_MODULUS == card.PCR_LEAD


def test_time_stamps_of_the_test_card_wrap() -> None:
    found = stamps(loops(WRAP, 5), make_test_card.VIDEO_PID)
    assert found[0] > found[-1]


@across_loops
def test_test_card_decodes_across_its_loops(first: int) -> None:
    decoded = media.decode(loops(first, 10))
    assert decoded.starts_with_key
    assert decoded.video_frames == 10 * make_test_card.PICTURES
    assert decoded.audio_frames == 10 * make_test_card.AAC_FRAMES
    for times, step in ((decoded.video, 1 / 25), (decoded.audio, 1024 / 48_000)):
        assert all(b - a == pytest.approx(step, abs=1e-4) for a, b in itertools.pairwise(times))


def test_each_loop_of_the_test_card_starts_with_its_tables() -> None:
    for number in (0, 7):
        pat, pmt, picture = itertools.islice(media.packets(pipe.test_card_segment(number)), 3)
        assert [media.pid(pat), media.pid(pmt)] == [0, make_test_card.PMT_PID]
        assert media.pid(picture) == make_test_card.VIDEO_PID
    framer = Fed(pipe.TsFramer())
    feed_segments(framer, [pipe.test_card_segment(number) for number in range(3)])
    size = len(pipe.test_card_segment(0))
    assert framer.joins == [(n * size, b"", START) for n in range(3)]


@pytest.mark.long
def test_two_minutes_of_the_test_card_decode_without_a_warning() -> None:
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg and "CI" not in os.environ:
        pytest.skip("there is no ffmpeg")
    command = [ffmpeg or "ffmpeg", "-v", "warning", "-xerror", "-i", "-", "-f", "null", "-"]
    ran = subprocess.run(command, input=loops(0, 63), capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


#### The test card and the program that made it ####


def test_clip_has_the_properties_of_make_test_card() -> None:
    card = make_test_card
    clip = lzma.decompress(b85decode("".join(pipe.TEST_CARD.split())))
    assert len(clip) % PACKET == 0
    assert clip == pipe.test_card_segment(0)
    assert {media.pid(packet) for packet in media.packets(clip)} == {
        0, card.PMT_PID, card.VIDEO_PID, card.AUDIO_PID,
    }  # fmt: skip
    assert stamps(clip, card.VIDEO_PID)[0] == card.FIRST_PTS
    assert stamps(clip, card.AUDIO_PID)[0] == card.FIRST_PTS
    assert len(stamps(clip, card.VIDEO_PID)) == card.PICTURES
    assert len(stamps(clip, card.AUDIO_PID)) == card.AAC_FRAMES // card.AAC_FRAMES_PER_PES


def test_clip_has_the_tables_of_make_test_card() -> None:
    card = make_test_card
    writer = card.Writer()
    for _ in range(card.PICTURES // card.PICTURES_PER_TABLES):
        writer.tables()
    written = media.packets(pipe.test_card_segment(0))
    of_tables = [packet for packet in written if media.pid(packet) in (0, card.PMT_PID)]
    assert b"".join(of_tables) == bytes(writer.stream)


def test_pictures_and_sound_of_a_loop_last_equally_long() -> None:
    card = make_test_card
    assert card.PICTURES * card.PICTURE_TICKS == pipe.TEST_CARD_TICKS
    assert card.AAC_FRAMES * card.AAC_FRAME_TICKS == pipe.TEST_CARD_TICKS


def test_clip_is_compressed_as_by_make_test_card() -> None:
    packed = b85decode("".join(pipe.TEST_CARD.split()))
    assert lzma.decompress(packed, lzma.FORMAT_ALONE) == pipe.test_card_segment(0)
    *lines, last = pipe.TEST_CARD.split()
    assert {len(line) for line in lines} == {96}
    assert len(last) <= 96
