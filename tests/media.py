"""Real media for the tests: H.264 and AAC, encoded once per process and kept in memory.

Every function returns bytes as an origin would send them. The picture is a moving gradient and the
sound a rising tone, so that no two segments are alike and a repeated or lost one is seen in a
comparison of bytes. All of it is closed GOPs without B-frames: each segment starts with a key frame
and can be decoded on its own.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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
# Packets of a segment that `padded` keeps together: the tables and the start of the key frame.
HEAD_PACKETS = 8


#### Raw picture and sound ####


def _picture(number: int) -> av.VideoFrame:
    """Frame `number` of the test picture: gradients that move at their own speed in each plane."""
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
    for index, plane in enumerate(frame.planes):
        line = bytes((x * (2 + index) + number * 5) & 255 for x in range(plane.line_size + 256))
        rows = (line[y + number % 7 :][: plane.line_size] for y in range(plane.height))
        plane.update(b"".join(rows))
    frame.pts, frame.time_base = number, Fraction(1, FPS)
    return frame


def _tone(start: int) -> av.AudioFrame:
    """One AAC frame of a tone that rises by 40 Hz a second, from sample `start` on."""
    frame = av.AudioFrame("fltp", "mono", FRAME_SAMPLES)
    times = ((start + i) / SAMPLE_RATE for i in range(FRAME_SAMPLES))
    values = (0.3 * math.sin(math.tau * (440 + 20 * t) * t) for t in times)
    frame.planes[0].update(struct.pack(f"<{FRAME_SAMPLES}f", *values))
    frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
    return frame


#### Encoding ####


def _add_video(out: OutputContainer, seconds: float, bitrate: int | None) -> VideoStream:
    gop = str(round(FPS * seconds))
    # One thread: the same bytes in every run. Scene cuts would add key frames between the cuts.
    x264 = "threads=1:open-gop=0"
    if bitrate:
        # Filler makes up what so small a picture does not need.
        kbit = bitrate // 1000
        x264 += f":nal-hrd=cbr:bitrate={kbit}:vbv-maxrate={kbit}:vbv-bufsize={kbit}"
    options = {"preset": "ultrafast", "bf": "0", "g": gop, "sc_threshold": "0"}
    stream = out.add_stream("libx264", rate=FPS, options=options | {"x264-params": x264})
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    return stream


def _add_audio(out: OutputContainer) -> AudioStream:
    stream = out.add_stream("aac", rate=SAMPLE_RATE)
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
            out.mux(video.encode(_picture(number)))
        while audio and sample * FPS < (number + 1) * SAMPLE_RATE:
            out.mux(audio.encode(_tone(sample)))
            sample += FRAME_SAMPLES
    if video:
        out.mux(video.encode(None))
    if audio:
        out.mux(audio.encode(None))


@dataclass(frozen=True)
class _Recipe:
    """What to encode: `count` segments of `seconds` each."""

    count: int
    seconds: float
    video: bool = True
    audio: bool = True
    fmp4: bool = False
    bitrate: int | None = None


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
        }
        with av.open(str(folder / "index.m3u8"), "w", format="hls", options=options) as out:
            video = _add_video(out, recipe.seconds, recipe.bitrate) if recipe.video else None
            audio = _add_audio(out) if recipe.audio else None
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
