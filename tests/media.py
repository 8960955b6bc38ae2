"""Real media for the tests: H.264 and AAC, encoded once per process and kept in memory.

Every function returns bytes as an origin would send them. The picture is a moving gradient and the
sound a rising tone, so that no two segments are alike and a repeated or lost one is seen in a
comparison of bytes. All of it is closed GOPs without B-frames: each segment starts with a key frame
and can be decoded on its own.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream

WIDTH, HEIGHT, FPS = 160, 90, 25
SAMPLE_RATE, FRAME_SAMPLES = 48_000, 1024

PACKET = 188
PID_SDT, PID_NULL = 0x0011, 0x1FFF
PIDS_OF_TABLES = (0x0000, 0x1000, 0x1100)  # PAT, and PMT of the programme and the advertisement
# Packets of a segment that `padded` keeps together: the tables and the start of the key frame.
HEAD_PACKETS = 8


#### Raw picture and sound ####


def _picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> av.VideoFrame:
    """Frame `number` of the test picture: gradients that move at their own speed in each plane."""
    frame = av.VideoFrame(width, height, "yuv420p")
    for index, plane in enumerate(frame.planes):
        line = bytes((x * (2 + index) + number * 5) & 255 for x in range(plane.line_size + 256))
        rows = (line[y + number % 7 :][: plane.line_size] for y in range(plane.height))
        plane.update(b"".join(rows))
    frame.pts, frame.time_base = number, Fraction(1, FPS)
    return frame


def _tone(start: int, rate: int = SAMPLE_RATE) -> av.AudioFrame:
    """One AAC frame of a tone that rises by 40 Hz a second, from sample `start` on."""
    frame = av.AudioFrame("fltp", "mono", FRAME_SAMPLES)
    times = ((start + i) / rate for i in range(FRAME_SAMPLES))
    values = (0.3 * math.sin(math.tau * (440 + 20 * t) * t) for t in times)
    frame.planes[0].update(struct.pack(f"<{FRAME_SAMPLES}f", *values))
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return frame


#### Encoding ####


@dataclass(frozen=True)
class _Recipe:
    """What to encode: `count` segments of `seconds` each."""

    count: int
    seconds: float
    video: bool = True
    audio: bool = True
    fmp4: bool = False
    bitrate: int | None = None
    width: int = WIDTH
    height: int = HEIGHT
    rate: int = SAMPLE_RATE
    first_pid: int = 0x100  # of the elementary streams
    pmt_pid: int = 0x1000
    clock: float = 0.0  # seconds at which it starts


def _add_video(out: OutputContainer, recipe: _Recipe) -> VideoStream:
    gop = str(round(FPS * recipe.seconds))
    # One thread: the same bytes in every run. Scene cuts would add key frames between the cuts.
    x264 = "threads=1:open-gop=0"
    if recipe.bitrate:
        # Filler makes up what so small a picture does not need.
        kbit = recipe.bitrate // 1000
        x264 += f":nal-hrd=cbr:bitrate={kbit}:vbv-maxrate={kbit}:vbv-bufsize={kbit}"
    options = {"preset": "ultrafast", "bf": "0", "g": gop, "sc_threshold": "0"}
    stream = out.add_stream("libx264", rate=FPS, options=options | {"x264-params": x264})
    stream.width, stream.height, stream.pix_fmt = recipe.width, recipe.height, "yuv420p"
    return stream


def _add_audio(out: OutputContainer, rate: int = SAMPLE_RATE) -> AudioStream:
    stream = out.add_stream("aac", rate=rate)
    stream.layout, stream.bit_rate = "mono", 32_000
    return stream


def _encode(
    out: OutputContainer, seconds: float, video: VideoStream | None, audio: AudioStream | None
) -> None:
    """Fills the streams with `seconds` of picture and sound, interleaved, and flushes them."""
    # The encoder's first frame lies one frame early; without the offset the muxer would move all
    # streams of a file to avoid a negative time stamp, and renditions would not match.
    sample = FRAME_SAMPLES
    for number in range(round(seconds * FPS)):
        if video:
            out.mux(video.encode(_picture(number, video.width, video.height)))
        while audio and sample * FPS < (number + 1) * audio.sample_rate:
            out.mux(audio.encode(_tone(sample, audio.sample_rate)))
            sample += FRAME_SAMPLES
    if video:
        out.mux(video.encode(None))
    if audio:
        out.mux(audio.encode(None))


@functools.cache
def _segments(recipe: _Recipe) -> tuple[bytes, ...]:
    """The files of one continuous encode, cut at key frames by libav's hls muxer.

    The muxer keeps time stamps and continuity counters going from file to file, as an encoder
    does. For fMP4 the initialization section comes first.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suffix = "m4s" if recipe.fmp4 else "ts"
        options = {
            "hls_time": str(recipe.seconds),
            "hls_list_size": "0",
            "hls_segment_type": "fmp4" if recipe.fmp4 else "mpegts",
            "hls_segment_filename": str(folder / f"%05d.{suffix}"),
            "output_ts_offset": str(recipe.clock),
        }
        if not recipe.fmp4:
            pids = f"mpegts_start_pid={recipe.first_pid}:mpegts_pmt_start_pid={recipe.pmt_pid}"
            options["hls_segment_options"] = pids
        with av.open(str(folder / "index.m3u8"), "w", format="hls", options=options) as out:
            video = _add_video(out, recipe) if recipe.video else None
            audio = _add_audio(out, recipe.rate) if recipe.audio else None
            _encode(out, recipe.count * recipe.seconds, video, audio)
        # Sound alone has no key frames to cut at: the last frame may open one file too many.
        files = sorted(folder.glob(f"*.{suffix}"))[: recipe.count]
        heads = [folder / "init.mp4"] if recipe.fmp4 else []
        return tuple(file.read_bytes() for file in (*heads, *files))


#### MPEG-TS ####


def packets(data: bytes) -> Iterator[bytes]:
    """The transport packets of `data`, which must be whole ones."""
    if len(data) % PACKET:
        raise ValueError(f"{len(data)} bytes are not a multiple of {PACKET}")
    for at in range(0, len(data), PACKET):
        packet = data[at : at + PACKET]
        if packet[0] != 0x47:
            raise ValueError(f"no sync byte at {at}")
        yield packet


def pid(packet: bytes) -> int:
    """The packet identifier of a transport packet."""
    return int.from_bytes(packet[1:3], "big") & 0x1FFF


def _without_sdt(segment: bytes) -> bytes:
    """libav writes a service description in front of the PAT; most packagers do not."""
    return b"".join(packet for packet in packets(segment) if pid(packet) != PID_SDT)


def ts_segments(
    count: int = 8, seconds: float = 1.0, *, bitrate: int | None = None
) -> tuple[bytes, ...]:
    """MPEG-TS segments of one timeline: PAT, PMT, then a key frame; H.264 and AAC.

    Joined they are one valid stream with continuous time stamps and counters. `bitrate` is the
    video's in bit/s, held by filler; for large segments `padded` is cheaper.
    """
    return _ts(_Recipe(count, seconds, bitrate=bitrate))


def video_only_segments(count: int = 8, seconds: float = 1.0) -> tuple[bytes, ...]:
    """The same timeline as `ts_segments`, with the picture alone."""
    return _ts(_Recipe(count, seconds, audio=False))


def audio_only_segments(count: int = 8, seconds: float = 1.0) -> tuple[bytes, ...]:
    """The same timeline as `ts_segments`, with the sound alone."""
    return _ts(_Recipe(count, seconds, video=False))


def advertisement_segments(
    count: int = 1, seconds: float = 1.0, *, own_pids: bool = True
) -> tuple[bytes, ...]:
    """What another encoder made: its clock, counters, size and sample rate are others than those of
    `ts_segments`, and so are its PIDs, unless it was asked to use the same."""
    recipe = _Recipe(count, seconds, width=240, height=136, rate=44_100, clock=5000.0)
    return _ts(replace(recipe, first_pid=0x200, pmt_pid=0x1100) if own_pids else recipe)


@functools.cache
def _ts(recipe: _Recipe) -> tuple[bytes, ...]:
    return tuple(map(_without_sdt, _segments(recipe)))


def _null_packet(number: int) -> bytes:
    """A null packet whose payload tells its number, so that no two of a segment are equal."""
    return b"\x47\x1f\xff\x10" + number.to_bytes(4, "big") * 46


def padded(segment: bytes, size: int) -> bytes:
    """`segment` grown to the multiple of 188 nearest below `size` with null packets.

    They are spread evenly behind the first few packets, as in a stream of constant bit rate. A
    segment that is large enough comes back as it is.
    """
    whole = list(packets(segment))
    gaps = max(1, len(whole) - HEAD_PACKETS)
    extra = max(0, size // PACKET - len(whole))
    grown, used = whole[:HEAD_PACKETS], 0
    for done, packet in enumerate(whole[HEAD_PACKETS:], 1):
        grown.append(packet)
        due = extra * done // gaps
        grown.extend(map(_null_packet, range(used, due)))
        used = due
    return b"".join(grown)


def with_counters_from_zero(segment: bytes) -> bytes:
    """The segment as a muxer of its own writes it: the counter of each PID begins with 0."""
    counters: dict[int, int] = {}
    out = []
    for packet in packets(segment):
        counter = counters.get(pid(packet), -1) + (packet[3] >> 4 & 1) & 0x0F
        counters[pid(packet)] = counter
        out.append(packet[:3] + bytes([packet[3] & 0xF0 | counter]) + packet[4:])
    return b"".join(out)


def spliced(*parts: bytes, is_told: bool = True) -> bytes:
    """What StreamPipe makes of parts whose clock or counters do not go on from one to the next.

    Behind a seam a packet without payload that says so comes in front of the first one of each PID.
    Where that is another PAT or PMT than before, this comes with another version in between.
    `is_told=False`: only the packets tell, and PIDs that go on before the first that does not have
    nothing in front of them.
    """
    data = b"".join(parts)
    jumps = {*itertools.accumulate(map(len, parts))} - {0, len(data)}
    out: list[bytes] = []
    seen: set[int] = {PID_NULL, *range(PID_NULL)}  # since the last seam
    counters: dict[int, int] = {}  # the newest of each PID
    tables: dict[bool, bytes] = {}  # the newest PMT and PAT
    may_go_on = not is_told
    for number, packet in enumerate(packets(data)):
        if number * PACKET in jumps:
            seen, may_go_on = {PID_NULL}, not is_told
        table = packet[:3] + packet[4:]
        is_table = pid(packet) in PIDS_OF_TABLES
        if pid(packet) not in seen:
            seen.add(pid(packet))
            is_new = is_table and tables.get(pid(packet) == 0) != table
            may_go_on &= counters.get(pid(packet)) == _counted_back(packet)[3] & 0x0F and not is_new
            first = _other_version(packet) if is_new else packet
            out += [_notice(first), first][: 0 if may_go_on else 1 + is_new]
        if is_table:
            tables[pid(packet) == 0] = table
        counters[pid(packet)] = packet[3] & 0x0F
        out.append(packet)
    return b"".join(out)


def is_notice(packet: bytes) -> bool:
    """Whether a packet says that its PID does not go on, and carries nothing."""
    return bool(packet[3] & 0x30 == 0x20 and packet[5] & 0x80)


def without_notices(data: bytes) -> bytes:
    """What the origin sent of these whole packets."""
    return b"".join(packet for packet in packets(data) if not is_notice(packet))


def _notice(packet: bytes) -> bytes:
    """An adaptation field of 183 bytes: discontinuity_indicator, and stuffing."""
    head = bytes([0x47, packet[1] & 0x1F, packet[2], 0x20 | _counted_back(packet)[3] & 0x0F])
    return head + b"\xb7\x80" + b"\xff" * 182


def _other_version(packet: bytes) -> bytes:
    """A table that starts right behind its header, with another version and the packet's number
    before; CRC_32 as ISO/IEC 13818-1 draws it in annex A."""
    data = bytearray(_counted_back(packet))
    end = 8 + (data[6] << 8 & 0x0F00 | data[7]) - 4
    data[10] ^= 2
    register = 0xFFFF_FFFF
    for byte in data[5:end]:
        for bit in range(8):
            feedback = register >> 31 ^ byte >> 7 - bit & 1
            register = (register << 1 & 0xFFFF_FFFF) ^ 0x04C1_1DB7 * feedback
    data[end : end + 4] = register.to_bytes(4, "big")
    return bytes(data)


def _counted_back(packet: bytes) -> bytes:
    """Its head as that of the packet before it of its PID, which it follows where it has payload
    and whose number it repeats where it has none."""
    number = packet[3] - bool(packet[3] & 0x10) & 0x0F
    return bytes([0x47, packet[1], packet[2], packet[3] & 0xF0 | number]) + packet[4:]


#### fMP4 and packed audio ####


def fmp4(
    count: int = 8, seconds: float = 1.0, *, video: bool = True, audio: bool = True
) -> tuple[bytes, tuple[bytes, ...]]:
    """The initialization section (ftyp, moov) and the media segments (moof, mdat) of fMP4."""
    init, *media = _segments(_Recipe(count, seconds, video, audio, fmp4=True))
    return init, tuple(media)


def _adts_frames(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at + 3 : at + 6], "big") >> 5 & 0x1FFF
        yield data[at : at + length]
        at += length


@functools.cache
def aac_segments(count: int = 8) -> tuple[bytes, ...]:
    """Packed audio: ADTS frames without ID3, each segment as near to a second as they allow."""
    file = io.BytesIO()
    with av.open(file, "w", format="adts") as out:
        _encode(out, count, None, _add_audio(out))
    segments = [bytearray() for _ in range(count)]
    for number, frame in enumerate(_adts_frames(file.getvalue())):
        segments[min(number * FRAME_SAMPLES // SAMPLE_RATE, count - 1)] += frame
    return tuple(map(bytes, segments))


@functools.cache
def audio_frames(
    codec: str, rate: int = SAMPLE_RATE, bit_rate: int = 64_000, seconds: float = 2
) -> tuple[bytes, ...]:
    """The frames that an encoder makes of the tone: `libmp3lame`, `mp2`, `ac3` or `eac3`.

    Joined they are packed audio, as these codecs write their headers themselves.
    """
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.AudioCodecContext)
    formats = encoder.codec.audio_formats
    assert formats
    encoder.format, encoder.layout = formats[0], av.AudioLayout("mono")
    encoder.sample_rate, encoder.bit_rate = rate, bit_rate
    encoder.open()
    resampler = av.AudioResampler(formats[0], "mono", rate, encoder.frame_size)
    tones = map(_tone, range(0, round(seconds * SAMPLE_RATE), FRAME_SAMPLES))
    packets = [
        packet
        for tone in (*tones, None)
        for frame in resampler.resample(tone)
        for packet in encoder.encode(frame)
    ]
    return tuple(map(bytes, packets + encoder.encode(None)))


def _synchsafe(number: int) -> bytes:
    """The 28 bits of an ID3 size in four bytes of seven."""
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def id3_timestamp(seconds: float, version: int = 4) -> bytes:
    """An ID3v2.`version` tag with the time stamp that opens a packed audio segment (RFC 8216 3.4).

    Version 2 has frames of three letters with three bytes of size; 3 and 4 differ in how the
    frame's size is written.
    """
    owner = b"com.apple.streaming.transportStreamTimestamp\0"
    payload = owner + struct.pack(">Q", round(seconds * 90_000) & (2**33 - 1))
    if version == 2:
        frame = b"PRV" + len(payload).to_bytes(3, "big") + payload
    else:
        size = _synchsafe(len(payload)) if version >= 4 else struct.pack(">I", len(payload))
        frame = b"PRIV" + size + b"\0\0" + payload
    return b"ID3" + bytes((version, 0, 0)) + _synchsafe(len(frame)) + frame


#### Decoding ####


@dataclass(frozen=True)
class Decoded:
    """What a decoder made of some media; the times are presentation time stamps in seconds."""

    video: tuple[float, ...]
    audio: tuple[float, ...]
    starts_with_key: bool  # the first video packet is a key frame; False without video

    @property
    def video_frames(self) -> int:
        return len(self.video)

    @property
    def audio_frames(self) -> int:
        return len(self.audio)


def decode(data: bytes, *, strict: bool = True) -> Decoded:
    """Decodes everything in `data`, of any container, and raises for the first fault found.

    A fault is an error of the decoder (`av.FFmpegError`) or a packet that the demuxer flagged as
    damaged (`ValueError`), such as one after a lost transport packet. `strict=False` lets the
    latter pass, for streams with a seam.
    """
    times: dict[str, list[float]] = {"video": [], "audio": []}
    first_key: bool | None = None
    with av.open(io.BytesIO(data), options={"err_detect": "explode"}) as container:
        for stream in container.streams:
            stream.codec_context.options = {"err_detect": "explode"}
        for packet in container.demux():
            if strict and packet.is_corrupt:
                raise ValueError(f"damaged {packet.stream.type} packet at {packet.dts}")
            if packet.stream.type == "video" and first_key is None:
                first_key = packet.is_keyframe
            for frame in packet.decode():
                times[packet.stream.type].append(_seconds(frame))
    return Decoded(tuple(times["video"]), tuple(times["audio"]), bool(first_key))


def first_picture(data: bytes) -> tuple[float, bool]:
    """The time of the first picture in `data`, which may break off anywhere behind it, and whether
    a key frame came first. Raises where no picture can be decoded."""
    with av.open(io.BytesIO(data), options={"err_detect": "explode"}) as container:
        is_key: bool | None = None
        for packet in container.demux(video=0):
            is_key = packet.is_keyframe if is_key is None else is_key
            for frame in packet.decode():
                return _seconds(frame), is_key
    raise ValueError("no picture")


def _seconds(frame: object) -> float:
    """The presentation time of a decoded frame, which must have one."""
    if not isinstance(frame, (av.VideoFrame, av.AudioFrame)) or frame.time is None:
        raise ValueError(f"no time stamp: {frame!r}")
    return frame.time
