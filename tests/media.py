"""Real media for the tests: H.264 and AAC, encoded once per process and kept in memory.

Every function returns bytes as an origin sends them. The picture is a moving gradient and the sound
a rising tone. Therefore no two segments are equal, and a comparison of bytes shows a repeated or
lost one. The video has closed GOPs without B-frames: each segment starts with a key frame and can
be decoded alone.
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
# `padded` keeps the first packets of a segment together: the tables and the key frame's start.
HEAD_PACKETS = 8


#### Raw picture and sound ####


def _picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> av.VideoFrame:
    """Frame `number` of the test picture: a gradient in each plane, each with its own speed."""
    frame = av.VideoFrame(width, height, "yuv420p")
    for index, plane in enumerate(frame.planes):
        line = bytes((x * (2 + index) + number * 5) & 255 for x in range(plane.line_size + 256))
        rows = (line[y + number % 7 :][: plane.line_size] for y in range(plane.height))
        plane.update(b"".join(rows))
    frame.pts, frame.time_base = number, Fraction(1, FPS)
    return frame


def _tone(start: int, rate: int = SAMPLE_RATE) -> av.AudioFrame:
    """One AAC frame, from sample `start`, of a tone that rises by 40 Hz a second."""
    frame = av.AudioFrame("fltp", "mono", FRAME_SAMPLES)
    times = ((start + i) / rate for i in range(FRAME_SAMPLES))
    values = (0.3 * math.sin(math.tau * (440 + 20 * t) * t) for t in times)
    frame.planes[0].update(struct.pack(f"<{FRAME_SAMPLES}f", *values))
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return frame


#### Encoding ####


@dataclass(frozen=True)
class _Recipe:
    """Settings of an encode: `count` segments of `seconds` each, and their format."""

    count: int
    seconds: float
    video: bool = True
    audio: bool = True
    fmp4: bool = False
    bitrate: int | None = None
    width: int = WIDTH
    height: int = HEIGHT
    rate: int = SAMPLE_RATE
    first_pid: int = 0x100  # the first PID of the elementary streams
    pmt_pid: int = 0x1000
    clock: float = 0.0  # seconds: the first time stamp


def _add_video(out: OutputContainer, recipe: _Recipe) -> VideoStream:
    gop = str(round(FPS * recipe.seconds))
    # One thread gives the same bytes in every run. Scene cuts would add key frames within segments.
    x264 = "threads=1:open-gop=0"
    if recipe.bitrate:
        # So small a picture needs less than this bit rate: filler adds the rest.
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
    # The encoder's first audio frame is one frame early. Without the offset, the muxer would shift
    # all streams of a file to avoid a negative time stamp, and renditions would not match.
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

    The muxer continues time stamps and continuity counters from file to file, as an encoder does.
    For fMP4, the first item is the initialization section.
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
        # Sound alone has no key frames to cut at: its last frame may start an extra file.
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
    """The segment without libav's service description, which most packagers do not write."""
    return b"".join(packet for packet in packets(segment) if pid(packet) != PID_SDT)


def ts_segments(
    count: int = 8, seconds: float = 1.0, *, bitrate: int | None = None
) -> tuple[bytes, ...]:
    """MPEG-TS segments of one timeline: PAT, PMT, then a key frame; H.264 and AAC.

    Joined, they are one valid stream with continuous time stamps and counters. `bitrate` is that of
    the video in bit/s, kept by filler; for large segments, `padded` is cheaper.
    """
    return _ts(_Recipe(count, seconds, bitrate=bitrate))


def video_only_segments(count: int = 8, seconds: float = 1.0) -> tuple[bytes, ...]:
    """Segments on the timeline of `ts_segments` with only the picture."""
    return _ts(_Recipe(count, seconds, audio=False))


def audio_only_segments(count: int = 8, seconds: float = 1.0) -> tuple[bytes, ...]:
    """Segments on the timeline of `ts_segments` with only the sound."""
    return _ts(_Recipe(count, seconds, video=False))


def advertisement_segments(
    count: int = 1, seconds: float = 1.0, *, own_pids: bool = True
) -> tuple[bytes, ...]:
    """Segments from another encoder: clock, counters, size and sample rate differ.

    Its PIDs also differ from those of `ts_segments`, unless `own_pids` is false.
    """
    recipe = _Recipe(count, seconds, width=240, height=136, rate=44_100, clock=5000.0)
    return _ts(replace(recipe, first_pid=0x200, pmt_pid=0x1100) if own_pids else recipe)


@functools.cache
def _ts(recipe: _Recipe) -> tuple[bytes, ...]:
    return tuple(map(_without_sdt, _segments(recipe)))


def _null_packet(number: int) -> bytes:
    """A null packet with its number as payload, so that no two of a segment are equal."""
    return b"\x47\x1f\xff\x10" + number.to_bytes(4, "big") * 46


def padded(segment: bytes, size: int) -> bytes:
    """`segment` with null packets up to the largest multiple of 188 that `size` allows.

    They are spread evenly after the first few packets, as in a stream of constant bit rate. A
    segment that is already large enough is returned unchanged.
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
    """The segment as written by a separate muxer: the counter of each PID begins with 0."""
    counters: dict[int, int] = {}
    out = []
    for packet in packets(segment):
        counter = counters.get(pid(packet), -1) + (packet[3] >> 4 & 1) & 0x0F
        counters[pid(packet)] = counter
        out.append(packet[:3] + bytes([packet[3] & 0xF0 | counter]) + packet[4:])
    return b"".join(out)


def spliced(*parts: bytes, is_announced: bool = True) -> bytes:
    """StreamPipe's output for parts whose clock or counters do not continue from one to the next.

    After a seam, a packet without payload that signals the discontinuity precedes the first packet
    of each PID. If this first packet is a changed PAT or PMT, a copy with another version number
    follows the signal. `is_announced=False`: only the packets show the discontinuity, neither a
    playlist nor a new opening announces it. Then no signal precedes the PIDs that continue before
    the first that does not.
    """
    data = b"".join(parts)
    jumps = {*itertools.accumulate(map(len, parts))} - {0, len(data)}
    out: list[bytes] = []
    seen: set[int] = {PID_NULL, *range(PID_NULL)}  # since the last seam
    counters: dict[int, int] = {}  # the newest of each PID
    tables: dict[bool, bytes] = {}  # the newest PAT (True) and PMT
    may_go_on = not is_announced
    for number, packet in enumerate(packets(data)):
        if number * PACKET in jumps:
            seen, may_go_on = {PID_NULL}, not is_announced
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
    """Whether a packet only signals a discontinuity of its PID, without payload."""
    return bool(packet[3] & 0x30 == 0x20 and packet[5] & 0x80)


def without_notices(data: bytes) -> bytes:
    """These whole packets without the signals that StreamPipe added."""
    return b"".join(packet for packet in packets(data) if not is_notice(packet))


def _notice(packet: bytes) -> bytes:
    """The signal before `packet`: an adaptation field with discontinuity_indicator and stuffing."""
    head = bytes([0x47, packet[1] & 0x1F, packet[2], 0x20 | _counted_back(packet)[3] & 0x0F])
    return head + b"\xb7\x80" + b"\xff" * 182


def _other_version(packet: bytes) -> bytes:
    """A copy of the table in `packet` with another version and the previous counter.

    The table must start right after the packet's header. CRC_32 is that of ISO/IEC 13818-1,
    annex A.
    """
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
    """`packet` with the counter of the previous packet of its PID.

    With payload, a packet has that counter plus one; without payload, it repeats it.
    """
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
    """Packed audio: ADTS frames without ID3, each segment as close to a second as they allow."""
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
    """The tone as frames of an encoder: `libmp3lame`, `mp2`, `ac3` or `eac3`.

    Joined, they are packed audio, because frames of these codecs contain their headers.
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
    """The 28 bits of an ID3 size, seven in each of four bytes."""
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def id3_timestamp(seconds: float, version: int = 4) -> bytes:
    """An ID3v2.`version` tag with the time stamp that starts a packed audio segment (RFC 8216 3.4).

    Version 2 names frames with three letters and has three bytes of size; 3 and 4 encode the
    frame's size differently.
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
    """A decoder's result; the times are presentation time stamps in seconds."""

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
    """Decodes all of `data`, in any container, and raises the first fault.

    A fault is an error of the decoder (`av.FFmpegError`) or a packet that the demuxer flagged as
    damaged (`ValueError`), such as one after a lost transport packet. `strict=False` ignores
    damaged packets, for streams with a seam.
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
    """The time of the first picture in `data`, and whether the first video packet is a key frame.

    `data` may end anywhere after this picture. Raises if no picture can be decoded.
    """
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
