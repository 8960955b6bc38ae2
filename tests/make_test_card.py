"""Makes the test card of pipe.py: a clip of 1.92 s that can repeat without a seam.

48 pictures at 25 a second and 90 AAC frames at 48 kHz both last exactly 172,800 ticks of the
90 kHz clock, so that a copy of the clip with later time stamps continues both streams. The
script writes the transport stream itself, without a muxer, so that every packet has a known place.

Run it with PyAV installed; it prints the text for pipe.py, 96 characters a line.
"""

import base64
import lzma
import sys
from collections.abc import Iterator
from fractions import Fraction

import av

WIDTH, HEIGHT = 640, 360
PICTURES = 48
PICTURE_TICKS = 3_600
AAC_FRAMES = 90
AAC_FRAMES_PER_PES = 5
AAC_FRAME_TICKS = 1_920
FIRST_PTS = 126_000
PCR_LEAD = 54_000  # data arrive 0.6 s before they are due
PICTURES_PER_TABLES = 12  # PAT and PMT repeat every 0.48 s

PMT_PID, VIDEO_PID, AUDIO_PID = 0x1000, 0x100, 0x101
VIDEO_STREAM_ID, AUDIO_STREAM_ID = 0xE0, 0xC0
PACKET_SIZE = 188

Colour = tuple[int, int, int]

# Y, Cb and Cr of the 75 % colour bars of ITU-R BT.601.
BLACK: Colour = (16, 128, 128)
GREY: Colour = (44, 128, 128)
WHITE: Colour = (235, 128, 128)
BARS: list[Colour] = [
    (180, 128, 128),
    (162, 44, 142),
    (131, 156, 44),
    (112, 72, 58),
    (84, 184, 198),
    (65, 100, 212),
    (35, 212, 114),
    BLACK,
]

# A letter has five columns and seven rows. Each row is a number; the leftmost column is 16.
FONT = {
    "S": (0b01111, 0b10000, 0b10000, 0b01110, 0b00001, 0b00001, 0b11110),
    "T": (0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100),
    "R": (0b11110, 0b10001, 0b10001, 0b11110, 0b10100, 0b10010, 0b10001),
    "E": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111),
    "A": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "M": (0b10001, 0b11011, 0b10101, 0b10101, 0b10001, 0b10001, 0b10001),
    "P": (0b11110, 0b10001, 0b10001, 0b11110, 0b10000, 0b10000, 0b10000),
    "I": (0b01110, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
}


class Picture:
    """A 4:2:0 picture made of rectangles; all their coordinates are even numbers."""

    def __init__(self) -> None:
        self.planes = [
            bytearray([BLACK[0]]) * (WIDTH * HEIGHT),
            bytearray([BLACK[1]]) * (WIDTH * HEIGHT // 4),
            bytearray([BLACK[2]]) * (WIDTH * HEIGHT // 4),
        ]

    def fill(self, left: int, top: int, width: int, height: int, colour: Colour) -> None:
        for plane, value, scale in zip(self.planes, colour, (1, 2, 2), strict=True):
            row = bytes([value]) * (width // scale)
            for y in range(top // scale, (top + height) // scale):
                start = y * (WIDTH // scale) + left // scale
                plane[start : start + len(row)] = row

    def write(self, text: str, left: int, top: int, dot: int, colour: Colour) -> None:
        for place, letter in enumerate(text):
            for y, row in enumerate(FONT[letter]):
                for x in range(5):
                    if row >> (4 - x) & 1:
                        self.fill(left + (place * 6 + x) * dot, top + y * dot, dot, dot, colour)

    def frame(self, number: int) -> av.VideoFrame:
        frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
        for plane, pixels in zip(frame.planes, self.planes, strict=True):
            stride = plane.line_size
            rows = (pixels[at : at + plane.width] for at in range(0, len(pixels), plane.width))
            plane.update(b"".join(bytes(row).ljust(stride, b"\0") for row in rows))
        frame.pts = number
        return frame


def test_card(number: int) -> Picture:
    """Picture ``number``: bars, a name, and a block that moves right and back once in the clip.

    The block moves on the 16-pixel grid of the macroblocks, so that its motion costs few bits.
    """
    picture = Picture()
    bar = WIDTH // len(BARS)
    for place, colour in enumerate(BARS):
        picture.fill(place * bar, 0, bar, 224, colour)
        picture.fill(place * bar, 224, bar, 16, BARS[-1 - place] if place % 2 else BLACK)
    picture.write("STREAMPIPE", 84, 256, 8, WHITE)
    picture.fill(112, 336, 416, 16, GREY)
    step = min(number, PICTURES - number)
    picture.fill(112 + 16 * step, 336, 32, 16, WHITE)
    return picture


def without_encoder_text(access_unit: bytes) -> bytes:
    """The access unit without its SEI units (type 6), which hold only the encoder's options."""
    units = access_unit.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    return b"".join(b"\0\0\0\1" + unit for unit in units if unit[0] & 0x1F != 6)


def encode_pictures() -> list[bytes]:
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.thread_count = 1
    x264 = (
        f"keyint={PICTURES}:scenecut=0:bframes=0:ref=1:qp=20:ipratio=1:aud=1:weightp=0:8x8dct=0"
        ":no-deblock=1:aq-mode=0:sliced-threads=0:me=esa:merange=24:subme=10:trellis=2"
        ":colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m:range=tv"
    )
    encoder.options = {"preset": "veryslow", "profile": "main", "x264-params": x264}
    frames: list[av.VideoFrame | None] = [test_card(n).frame(n) for n in range(PICTURES)]
    packets = [packet for frame in [*frames, None] for packet in encoder.encode(frame)]
    assert [packet.pts for packet in packets] == list(range(PICTURES))
    assert [packet.is_keyframe for packet in packets] == [True] + [False] * (PICTURES - 1)
    return [without_encoder_text(bytes(packet)) for packet in packets]


def adts(raw: bytes) -> bytes:
    """The raw AAC-LC frame (48 kHz, stereo) with an ADTS header (ISO/IEC 14496-3, 1.A.2.2)."""
    size = len(raw) + 7
    header = 0xFFF1 << 40 | 1 << 38 | 3 << 34 | 2 << 30 | size << 13 | 0x7FF << 2
    return header.to_bytes(7, "big") + raw


def encode_silence() -> bytes:
    """One AAC frame of silence from the middle, because the encoder's first frames differ."""
    encoder = av.CodecContext.create("aac", "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = 48_000, "stereo", "fltp"
    packets = []
    for number in range(20):
        frame = av.AudioFrame("fltp", "stereo", 1024)
        frame.sample_rate, frame.pts = 48_000, number * 1024
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        packets += [bytes(packet) for packet in encoder.encode(frame)]
    assert len(set(packets[8:])) == 1
    return adts(packets[-1])


def crc32(data: bytes) -> bytes:
    """The check sum of PSI sections (ISO/IEC 13818-1, annex A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc.to_bytes(4, "big")


def section(table_id: int, body: bytes) -> bytes:
    """A PSI section of program or transport stream 1, after its pointer field."""
    length = 0xB000 | len(body) + 9
    data = bytes([table_id]) + length.to_bytes(2, "big") + b"\0\1\xc1\0\0" + body
    return b"\0" + data + crc32(data)


def pat() -> bytes:
    return section(0, b"\0\1" + (0xE000 | PMT_PID).to_bytes(2, "big"))


def pmt() -> bytes:
    body = (0xE000 | VIDEO_PID).to_bytes(2, "big") + b"\xf0\0"
    for stream_type, pid in ((0x1B, VIDEO_PID), (0x0F, AUDIO_PID)):
        body += bytes([stream_type]) + (0xE000 | pid).to_bytes(2, "big") + b"\xf0\0"
    return section(2, body)


def pes(stream_id: int, pts: int, data: bytes) -> bytes:
    """A PES packet with its length and PTS; the DTS is equal, because there are no B pictures."""
    stamp = 0x21 << 32 | 1 << 16 | 1
    stamp |= (pts >> 30 & 7) << 33 | (pts >> 15 & 0x7FFF) << 17 | (pts & 0x7FFF) << 1
    length = (len(data) + 8).to_bytes(2, "big")
    return b"\0\0\1" + bytes([stream_id]) + length + b"\x84\x80\5" + stamp.to_bytes(5, "big") + data


def pcr_field(pts: int, key: bool) -> bytes:
    """The flags of an adaptation field and the PCR, which is PCR_LEAD before the PTS."""
    flags = 0x50 if key else 0x10
    return bytes([flags]) + ((pts - PCR_LEAD) << 15 | 0x3F << 9).to_bytes(6, "big")


class Writer:
    """Cuts payloads into transport packets and counts the packets of each PID."""

    def __init__(self) -> None:
        self.stream = bytearray()
        self.counters: dict[int, int] = {}

    def tables(self) -> None:
        for pid, payload in ((0, pat()), (PMT_PID, pmt())):
            self.packet(pid, payload.ljust(PACKET_SIZE - 4, b"\xff"), True, b"")

    def write(self, pid: int, payload: bytes, adaptation: bytes = b"") -> None:
        start = True
        while payload:
            room = PACKET_SIZE - 4 - (len(adaptation) + 1 if adaptation else 0)
            self.packet(pid, payload[:room], start, adaptation)
            payload, adaptation, start = payload[room:], b"", False

    def packet(self, pid: int, payload: bytes, start: bool, adaptation: bytes) -> None:
        counter = self.counters.get(pid, 0)
        self.counters[pid] = (counter + 1) % 16
        spare = PACKET_SIZE - 4 - len(payload)
        field = b""
        if spare:
            field = bytes([spare - 1])
            flags = adaptation or b"\0" * (spare > 1)
            field += flags.ljust(spare - 1, b"\xff")
        head = 0x47 << 24 | start << 22 | pid << 8 | bool(spare) << 5 | 0x10 | counter
        self.stream += head.to_bytes(4, "big") + field + payload


def audio_until(pts: int, silence: bytes) -> Iterator[tuple[int, bytes]]:
    """The audio PES packets that are due during the picture at ``pts``."""
    ticks = AAC_FRAME_TICKS * AAC_FRAMES_PER_PES
    for at in range(FIRST_PTS, FIRST_PTS + AAC_FRAMES * AAC_FRAME_TICKS, ticks):
        if pts <= at < pts + PICTURE_TICKS:
            yield at, silence * AAC_FRAMES_PER_PES


def make_clip() -> bytes:
    writer, silence = Writer(), encode_silence()
    for number, picture in enumerate(encode_pictures()):
        pts = FIRST_PTS + number * PICTURE_TICKS
        if number % PICTURES_PER_TABLES == 0:
            writer.tables()
        data = pes(VIDEO_STREAM_ID, pts, picture)
        writer.write(VIDEO_PID, data, pcr_field(pts, number == 0))
        for at, frames in audio_until(pts, silence):
            writer.write(AUDIO_PID, pes(AUDIO_STREAM_ID, at, frames))
    return bytes(writer.stream)


def pack(clip: bytes) -> str:
    """The clip as text, compressed in the old LZMA format, whose header has the settings."""
    settings = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME}
    choices = [
        lzma.compress(clip, lzma.FORMAT_ALONE, filters=[settings | {"lc": lc, "lp": lp, "pb": pb}])
        for lc in range(5)
        for lp in range(5 - lc)
        for pb in range(5)
    ]
    return base64.b85encode(min(choices, key=len)).decode()


def main() -> None:
    clip = make_clip()
    text = pack(clip)
    sys.stdout.writelines(text[at : at + 96] + "\n" for at in range(0, len(text), 96))
    packed = len(base64.b85decode(text))
    sys.stderr.write(f"{len(clip)} bytes, {packed} compressed, {len(text)} characters\n")


if __name__ == "__main__":
    main()
