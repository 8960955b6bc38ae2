"""Playlists of odd packagers: strange numbers, blanks, lengths and attributes; and garbled ones.

A real origin serves them, and the real streamlink reads them. ffmpeg plays each of the odd ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipe
from tests import media
from tests.origin import (
    IMAGES,
    ODD_PLAYLISTS,
    Break,
    Edit,
    Fault,
    Origin,
    Playlist,
    Preface,
    Segment,
    StallHeaders,
    Status,
    WrongLength,
)
from tests.program import eventually
from tests.server import Site

Serve = Callable[..., Site]

SEGMENTS = media.ts_segments(6)


#### Playlists of segments ####


@pytest.mark.parametrize("name", ODD_PLAYLISTS)
def test_odd_playlist_of_a_film_plays_completely(origin: Origin, serve: Serve, name: str) -> None:
    film = origin.add(Playlist("film", SEGMENTS, byte_ranges=name.startswith("range")))
    origin.fault(film.path, ODD_PLAYLISTS[name], times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert is_complete
    assert body == film.plain(0, 6)


def test_event_with_a_negative_duration_is_not_a_channel_list(origin: Origin, serve: Serve) -> None:
    event = origin.add(Playlist("event", SEGMENTS, mode="event", listed=4))
    origin.fault(event.path, ODD_PLAYLISTS["negative-length"], times=None)
    viewer = serve({"event": event.url}).watch("/event")
    assert viewer.read(len(event.plain(1, 4))) == event.plain(1, 4)


@pytest.mark.parametrize(
    "edit",
    [
        Edit(r"(SEQUENCE:)(\d+)", lambda match: f"{match[1]}{int(match[2]) - 20}"),
        Edit(r"(SEQUENCE:\d+)", r"\1.0"),
        Edit(r"(SEQUENCE):", r"\1 : "),
    ],
    ids=["negative", "with a fraction", "with blanks"],
)
def test_live_playlist_with_odd_numbers_plays(origin: Origin, serve: Serve, edit: Edit) -> None:
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=3, first_sequence=6))
    origin.fault(live.path, edit, times=None)
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(live.plain(6, 9))) == live.plain(6, 9)
    live.advance()
    assert viewer.read(len(live.plain(9, 10))) == live.plain(9, 10)


@pytest.mark.parametrize(
    "attributes", [',URI="",IV=', ",IV=0x", ",IV=None,URI=none", ' ,URI="key"']
)
def test_attributes_of_a_key_without_encryption_are_ignored(
    origin: Origin, serve: Serve, attributes: str
) -> None:
    # An insert without encryption, after encrypted segments.
    film = Playlist("film", SEGMENTS[:3], aes_key=b"k" * 16)
    insert = f"#EXT-X-KEY:METHOD=NONE{attributes}\n#EXTINF:1.0,\n/insert.ts\n#EXT-X-ENDLIST"
    origin.add_file("/insert.ts", SEGMENTS[3], content_type="video/mp2t")
    origin.add(film)
    origin.fault(film.path, Edit("#EXT-X-ENDLIST", insert), times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert is_complete
    assert body == b"".join(SEGMENTS[:4])


def test_variables_are_replaced(origin: Origin, serve: Serve) -> None:
    """EXT-X-DEFINE, with a value, a parameter of the address and the master playlist's variable."""
    film = origin.add(Playlist("film", SEGMENTS, aes_key=b"k" * 16))
    define = '#EXT-X-DEFINE:QUERYPARAM="auth"\n#EXT-X-DEFINE:IMPORT="folder"\n'
    define += '#EXT-X-DEFINE:NAME="key-name",VALUE="{$folder}/key"\n#EXT-X-DEFINE:IMPORT="none"\n'
    with_variables = (
        Edit("(#EXT-X-TARGETDURATION)", define + r"\1"),
        Edit(r'URI="[^"]*key"', 'URI="/{$key-name}"'),
        Edit(r"^(\d+)\.ts$", r"/{$folder}/\1.ts?auth={$auth}&x={$none}"),
    )
    origin.fault(film.path, *with_variables, times=None)
    lines = [
        '#EXTM3U\n#EXT-X-DEFINE:NAME="folder",VALUE="film"\n#EXT-X-DEFINE:QUERYPARAM="auth"',
        f"#EXT-X-STREAM-INF:BANDWIDTH=1\n/{{$folder}}/{film.path.rpartition('/')[2]}?auth={{$auth}}",
    ]
    master = origin.add_file("/master.m3u8", "\n".join(lines).encode())
    body, is_complete = serve({"film": f"{master}?auth=a.b"}).watch("/film").read_all()
    assert (body, is_complete) == (film.plain(0, 6), True)
    assert origin.count("/film/0.ts?auth=a.b&x=%7B$none%7D") == 1


def test_variables_do_not_fill_the_memory(origin: Origin, serve: Serve) -> None:
    """Each variable would have ten times the length of the one before."""
    film = origin.add(Playlist("film", SEGMENTS))
    lines = ['#EXT-X-DEFINE:NAME="v0",VALUE="' + "x" * 1000 + '"']
    for number in range(1, 12):
        value = f"{{$v{number - 1}}}" * 10
        lines.append(f'#EXT-X-DEFINE:NAME="v{number}",VALUE="{value}"')
    define = "\n".join(lines)
    origin.fault(film.path, Edit("(#EXT-X-TARGETDURATION)", define + r"\n\1"), times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert (body, is_complete) == (film.plain(0, 6), True)


def test_iv_may_lack_its_prefix(origin: Origin, serve: Serve) -> None:
    film = origin.add(Playlist("film", SEGMENTS, aes_key=b"k" * 16, aes_iv=bytes(range(16))))
    origin.fault(film.path, Edit("IV=0x", "IV="), times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert is_complete
    assert body == film.plain(0, 6)


def test_backslashes_in_the_path_of_an_address_become_slashes(origin: Origin, serve: Serve) -> None:
    # Browsers and servers on Windows read addresses this way.  A query does not change.
    film = origin.add(Playlist("film", SEGMENTS))
    origin.fault(film.path, Edit(r"^(\d+)\.ts$", r"..\\film\\\1.ts?day=a\\b"), times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert is_complete
    assert body == film.plain(0, 6)
    assert origin.count("/film/0.ts?day=a%5Cb") == 1


def test_backslashes_in_the_address_of_a_variant_become_slashes(
    origin: Origin, serve: Serve
) -> None:
    film = origin.add(Playlist("film", SEGMENTS))
    lines = ["#EXTM3U", "#EXT-X-STREAM-INF:BANDWIDTH=1", film.path.replace("/", "\\"), ""]
    site = serve({"film": origin.add_file("/master.m3u8", "\n".join(lines).encode())})
    assert site.watch("/film").read_all() == (film.plain(0, 6), True)


#### Interrupted transfers of playlists ####


def test_playlist_of_a_film_with_endlist_is_complete_despite_its_length(
    origin: Origin, serve: Serve
) -> None:
    film = origin.add(Playlist("film", SEGMENTS))
    origin.fault(film.path, WrongLength(100), times=None)
    body, is_complete = serve({"film": film.url}).watch("/film").read_all()
    assert is_complete
    assert body == film.plain(0, 6)


def test_live_playlist_with_a_wrong_length_is_used(origin: Origin, serve: Serve) -> None:
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=3))
    origin.fault(live.path, WrongLength(100), times=None)
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(live.plain(0, 3))) == live.plain(0, 3)
    live.advance()
    assert viewer.read(len(live.plain(3, 4))) == live.plain(3, 4)


@pytest.mark.parametrize("size", [0, 3, 20], ids=["line", "address", "tag"])
def test_playlist_of_a_film_that_breaks_off_is_an_error(
    origin: Origin, serve: Serve, size: int
) -> None:
    film = origin.add(Playlist("film", SEGMENTS))
    text = film.find(film.path)
    assert text
    broken = Break(text.body.index(b"#EXT-X-ENDLIST") - size)
    origin.fault(film.path, broken, times=1)
    answer = serve({"film": film.url}).get("/film")
    assert (answer.status, answer.json["error"]) == (502, "the origin's answer broke off")


@pytest.mark.parametrize("size", [1, 6, 12], ids=["line-end", "address", "tag"])
def test_live_playlist_that_breaks_off_within_an_entry_is_an_error(
    origin: Origin, serve: Serve, size: int
) -> None:
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=3))
    text = live.find(live.path)
    assert text
    origin.fault(live.path, Break(len(text.body) - size), times=1)
    answer = serve({"news": live.url}).get("/news")
    assert (answer.status, answer.json["error"]) == (502, "the origin's answer broke off")


#### Segments that begin with an image ####


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("key", [None, b"k" * 16], ids=["plain", "encrypted"])
def test_image_in_front_of_packets_is_removed(
    origin: Origin, serve: Serve, name: str, key: bytes | None
) -> None:
    # ffmpeg would take the whole stream for the image.
    film = [Segment(IMAGES[name] + data) for data in SEGMENTS]
    playlist = origin.add(Playlist("film", film, aes_key=key))
    viewer = serve({"film": playlist.url}).watch("/film")
    assert viewer.headers["Content-Type"] == "video/mp2t"
    body, is_complete = viewer.read_all()
    assert is_complete
    assert body == b"".join(SEGMENTS)


def test_images_in_a_live_stream_are_removed(origin: Origin, serve: Serve) -> None:
    live = origin.add(Playlist("news", SEGMENTS, mode="live", window=4))
    origin.fault("/news/*.ts", Preface(IMAGES["png"]), times=None)
    viewer = serve({"news": live.url}).watch("/news")
    assert viewer.read(len(live.plain(1, 4))) == live.plain(1, 4)
    live.advance()
    assert viewer.read(len(live.plain(4, 5))) == live.plain(4, 5)


@pytest.mark.parametrize("size", [1, 7, 188, 5000])
def test_packets_after_an_image_are_found_in_pieces_of_any_size(size: int) -> None:
    data = IMAGES["jpeg"] + SEGMENTS[0]
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert b"".join(pipe.behind_image(pieces)) == SEGMENTS[0]


@pytest.mark.parametrize("data", [IMAGES["png"], IMAGES["gif"] * 900, b"", b"\x89PNG"])
def test_image_without_packets_is_kept(data: bytes) -> None:
    assert b"".join(pipe.behind_image([data[:500], data[500:]])) == data


#### Master playlists ####


@pytest.mark.parametrize(
    ("first", "second", "qualities"),
    [
        ("", "", ["variant-1", "variant-2"]),
        ("BANDWIDTH=None", "PROGRAM-ID=1", ["variant-1", "variant-2"]),
        ("BANDWIDTH=,RESOLUTION=640x360", "BANDWIDTH=2e6,RESOLUTION=1280x720", ["360p", "720p"]),
        (
            "CODECS=avc1.42e01e, mp4a.40.2,RESOLUTION=640x360",
            "RESOLUTION=1280x720,CODECS=avc1.42e01e, mp4a.40.2",
            ["360p", "720p"],
        ),
        ("RESOLUTION=low,BANDWIDTH=360000", "RESOLUTION=HD,BANDWIDTH=720000", ["360k", "720k"]),
        (
            "FRAME-RATE=inf,RESOLUTION=640x360",
            "FRAME-RATE=fast,RESOLUTION=1280x720",
            ["360p", "720p"],
        ),
        ('RESOLUTION=640x360,NAME="', 'RESOLUTION=1280x720,X="\u2603",Y', ["360p", "720p"]),
    ],
    ids=["none", "bandwidth", "empty", "comma", "resolution", "frame-rate", "quotes"],
)
def test_odd_attribute_does_not_affect_the_others(
    origin: Origin, serve: Serve, first: str, second: str, qualities: list[str]
) -> None:
    films = [origin.add(Playlist(name, SEGMENTS[n:][:5])) for n, name in enumerate(("a", "b"))]
    lines = ["#EXTM3U", f"#EXT-X-STREAM-INF:{first}", films[0].path]
    lines += [f"#EXT-X-STREAM-INF:{second}", films[1].path, ""]
    site = serve({"film": origin.add_file("/master.m3u8", "\n".join(lines).encode())})
    for film, quality in zip(films, qualities, strict=True):
        body, _ = site.watch(f"/film?quality={quality}").read_all()
        assert body == film.plain(0, 5)
    best = films[0] if "variant-1" in qualities else films[1]
    assert site.watch("/film").read_all()[0] == best.plain(0, 5)
    assert site.get("/film?quality=nope").json["error"].endswith(", ".join(qualities))


@pytest.mark.parametrize("names", [("high-1", "high-2"), ("Tres Bien!", "\u9ad8\u6e05")])
def test_odd_name_loses_no_variant(origin: Origin, serve: Serve, names: tuple[str, str]) -> None:
    films = [origin.add(Playlist(name, SEGMENTS[n:][:5])) for n, name in enumerate(("a", "b"))]
    lines = ["#EXTM3U"]
    for name, film in zip(names, films, strict=True):
        lines += [
            f'#EXT-X-MEDIA:TYPE=VIDEO,GROUP-ID="{film.name}",NAME="{name}"',
            f'#EXT-X-STREAM-INF:VIDEO="{film.name}"',
            film.path,
        ]
    site = serve({"film": origin.add_file("/master.m3u8", "\n".join(lines).encode())})
    *_, offered = site.get("/film?quality=nope").json["error"].partition("available: ")
    bodies = [site.watch(f"/film?quality={name}").read_all()[0] for name in offered.split(", ")]
    assert sorted(bodies) == sorted(film.plain(0, 5) for film in films)


def copies(origin: Origin, names: str, attributes: str = "") -> tuple[list[Playlist], str]:
    """Live playlists of the same media, and the address of a master that lists them as copies."""
    given = {"mode": "live", "window": 6, "first_sequence": 12}
    lists = [origin.add(Playlist(name, media.ts_segments(12), **given)) for name in names]  # type: ignore[arg-type]
    attributes = attributes or 'BANDWIDTH=1280000,RESOLUTION=1280x720,CODECS="avc1.42e01e"'
    lines = [f"#EXT-X-STREAM-INF:{attributes}\n{playlist.path}" for playlist in lists]
    body = "\n".join(["#EXTM3U", *lines, ""]).encode()
    return lists, origin.add_file("/master.m3u8", body)


@pytest.mark.parametrize("fault", [Status(503), Status(404), StallHeaders()], ids=str)
def test_copy_of_a_variant_takes_over_at_a_start(
    origin: Origin, serve: Serve, fault: Fault
) -> None:
    (first, second), address = copies(origin, "ab")
    origin.fault(f"/{first.name}/*", fault, times=None)
    viewer = serve({"news": address}, timeout=4).watch("/news")
    assert viewer.read(len(second.plain(15, 18))) == second.plain(15, 18)


def test_copy_of_a_variant_takes_over_in_a_running_channel(
    origin: Origin, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    (first, second), address = copies(origin, "ab")
    viewer = serve({"news": address}, timeout=2).watch("/news")
    assert viewer.read(len(first.plain(15, 18))) == first.plain(15, 18)
    origin.fault(f"/{first.name}/*", Status(404), times=None)
    first.advance()
    second.advance()
    assert viewer.read(len(first.plain(18, 19))) == first.plain(18, 19)
    assert "address 1 of 1 (127.0.0.1), copy 1 of 2: the origin answered 404" in caplog.text


def test_start_begins_with_the_copy_that_worked_last(origin: Origin, serve: Serve) -> None:
    (first, second, _), address = copies(origin, "abc")
    down = origin.fault(f"/{first.name}/*", Status(404), times=None)
    site = serve({"news": address}, timeout=4, linger=0)
    for _ in range(2):
        viewer = site.watch("/news")
        assert viewer.read(len(second.plain(15, 18))) == second.plain(15, 18)
        viewer.close()
        eventually(lambda: not site.get("/status").json["streams"][0]["channels"], "it is closed")
    assert down.taken == 1


def test_all_copies_are_tried_before_the_next_address(origin: Origin, serve: Serve) -> None:
    """The second copy is in use when it fails. The first copy is tried before the backup."""
    (first, second), address = copies(origin, "ab")
    backup = origin.add(Playlist("c", media.ts_segments(12), mode="live", window=6))
    origin.fault(first.path, Status(404))
    viewer = serve({"news": {"url": [address, backup.url]}}, timeout=4).watch("/news")
    assert viewer.read(len(second.plain(15, 18))) == second.plain(15, 18)
    origin.fault(f"/{second.name}/*", Status(404), times=None)
    first.advance()
    second.advance()
    assert viewer.read(len(first.plain(18, 19))) == first.plain(18, 19)
    assert origin.count(backup.path) == 0


def test_backup_takes_over_at_a_start_after_all_copies_failed(origin: Origin, serve: Serve) -> None:
    lists, address = copies(origin, "ab")
    for playlist in lists:
        origin.fault(playlist.path, Status(404), times=None)
    backup = origin.add(Playlist("c", media.ts_segments(12), mode="live", window=6))
    viewer = serve({"news": {"url": [address, backup.url]}}, timeout=4).watch("/news")
    assert viewer.read(len(backup.plain(3, 6))) == backup.plain(3, 6)
    assert [origin.count(playlist.path) for playlist in lists] == [1, 1]


def test_variants_without_a_bandwidth_are_not_copies(origin: Origin, serve: Serve) -> None:
    _, address = copies(origin, "ab", "RESOLUTION=1280x720")
    answer = serve({"news": address}).get("/news?quality=nope")
    assert answer.json["error"].endswith("720p_alt, 720p")


def test_master_of_a_master_is_followed_once(origin: Origin, serve: Serve) -> None:
    (first, *_), _ = copies(origin, "a")
    inner = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n"
    outer = origin.add_file("/outer.m3u8", inner.format("/master.m3u8").encode())
    viewer = serve({"news": outer}).watch("/news")
    assert viewer.read(len(first.plain(15, 18))) == first.plain(15, 18)
    outermost = origin.add_file("/outermost.m3u8", inner.format("/outer.m3u8").encode())
    answer = serve({"news": outermost}).get("/news")
    assert answer.status == 502
    assert answer.json["error"] == "the origin's playlist lists no playable stream"


#### Garbled playlists ####

TAGS = (
    "#EXT-X-VERSION:6",
    "#EXT-X-TARGETDURATION:2",
    "#EXT-X-MEDIA-SEQUENCE:7",
    "#EXT-X-DISCONTINUITY-SEQUENCE:1",
    "#EXT-X-PLAYLIST-TYPE:VOD",
    "#EXT-X-START:TIME-OFFSET=1.5,PRECISE=YES",
    '#EXT-X-DATERANGE:ID="a",START-DATE="2026-01-01T00:00:00Z",DURATION=2.0,PLANNED-DURATION=2',
    "#EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:00.000Z",
    '#EXT-X-KEY:METHOD=AES-128,URI="key",IV=0x00000000000000000000000000000001',
    '#EXT-X-MAP:URI="init.mp4",BYTERANGE="100@0"',
    "#EXT-X-BYTERANGE:1000@0",
    "#EXT-X-DISCONTINUITY",
    "#EXT-X-GAP",
    "#EXTINF:2.0,title",
)
MASTER_TAGS = (
    '#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="A",LANGUAGE="en",DEFAULT=YES,URI="a.m3u8"',
    '#EXT-X-STREAM-INF:BANDWIDTH=1280000,RESOLUTION=1280x720,FRAME-RATE=50.000,CODECS="a,b"',
    '#EXT-X-I-FRAME-STREAM-INF:BANDWIDTH=1000,URI="i.m3u8"',
    '#EXT-X-SESSION-KEY:METHOD=AES-128,URI="key"',
)


@st.composite
def garbled(draw: st.DrawFn, tags: tuple[str, ...], last: str) -> str:
    """A playlist with a random change in the value of one tag."""
    lines = list(tags)
    index = draw(st.integers(0, len(lines) - 1))
    name, colon, value = lines[index].partition(":")
    start = draw(st.integers(0, len(value)))
    stop = draw(st.integers(start, len(value)))
    odd = draw(st.text(max_size=8) | st.sampled_from(["nan", "inf", "-1", "9" * 400, "1e999", '"']))
    lines[index] = f"{name}{colon or ':'}{value[:start]}{odd}{value[stop:]}"
    return "\n".join(["#EXTM3U", *lines, last, ""])


def parsed(text: str) -> Any:
    """The parsed playlist, or None if it has one clear reason why it cannot be played."""
    parser = pipe.VariantStream.__parser__
    try:
        return parser("http://origin.example/index.m3u8").parse(text)
    except ValueError as error:
        reason = pipe.explain(error)
    assert reason != "the origin's stream cannot be opened"
    return None


@given(garbled(TAGS, "1.ts"))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbled_tag_leaves_a_playable_playlist_or_one_reason(text: str) -> None:
    playlist = parsed(text)
    if playlist is not None:
        assert playlist.segments[0].num >= 0
        assert 0 < playlist.targetduration < 100_000
        assert all(0 <= segment.duration < 100_000 for segment in playlist.segments)


@given(garbled(MASTER_TAGS, "variant.m3u8"))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbled_tag_of_a_master_loses_no_variant(text: str) -> None:
    playlist = parsed(text)
    if playlist is not None:
        (variant,) = (p for p in playlist.playlists if not p.is_iframe)
        assert variant.get_name(key="name")
