"""Channel lists and the streams made from them; pure, and compared with another parser."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipe

PANEL = "http://panel.example:8080"
LIST_URL = f"{PANEL}/get.php?username=ada.l&password=hunter2&type=m3u_plus&output=ts"


def playlist(**keys: Any) -> pipe.PlaylistSettings:
    return pipe.PlaylistSettings("tv", keys.pop("url", LIST_URL), **keys)


def parsed(text: str | bytes, piece: int = 1 << 16, **keys: Any) -> pipe.ChannelList:
    parser = pipe.ListParser(playlist(**keys))
    data = text.encode() if isinstance(text, str) else text
    for at in range(0, len(data), piece):
        parser.feed(data[at : at + piece])
    return parser.finish()


def entry(line: str, *more: str, address: str = f"{PANEL}/live/ada.l/hunter2/1.ts") -> pipe.Entry:
    """The entry of a list with this #EXTINF line, followed by `more` lines and the address."""
    text = "\n".join(["#EXTM3U", line, *more, address])
    (found,) = parsed(text).entries
    return found


def streams(text: str, **keys: Any) -> dict[str, pipe.StreamSettings]:
    config = pipe.Config(playlists={"tv": playlist(**keys)})
    found, _ = pipe.with_lists(config, {"tv": parsed(text, **keys)}, {})
    return dict(found.streams)


def titles_of(found: pipe.ChannelList) -> list[str]:
    return [each.title for each in found.entries]


def titles(text: str, **keys: Any) -> list[str]:
    return titles_of(parsed(text, **keys))


def simple(*titles: str, group: str = "") -> str:
    """A list of channels with these titles."""
    about = f' group-title="{group}"' if group else ""
    lines = [
        f"#EXTINF:-1{about},{title}\n{PANEL}/live/ada.l/hunter2/{number}.ts"
        for number, title in enumerate(titles)
    ]
    return "\n".join(["#EXTM3U", *lines, ""])


#### Whole lists, modelled on those of panels and of public collections ####

# A panel's list: every attribute exists, many are empty; with headings, films, a radio station.
OF_A_PANEL = f"""#EXTM3U url-tvg="{PANEL}/xmltv.php?username=ada.l&password=hunter2"\r
#EXTINF:-1 tvg-id="" tvg-name="##### UK #####" tvg-logo="" group-title="UK",##### UK #####\r
{PANEL}/live/ada.l/hunter2/1.ts\r
#EXTINF:-1 tvg-id="one.uk" tvg-logo="http://logo.example/1.png" group-title="UK",UK: One FHD\r
{PANEL}/live/ada.l/hunter2/2.ts\r
#EXTINF:-1 tvg-id="one.uk" tvg-name="UK: One SD" tvg-logo="" group-title="UK",UK: One SD\r
{PANEL}/live/ada.l/hunter2/3.ts\r
#EXTINF:-1 tvg-id="" tvg-name="Метро" tvg-logo="" group-title="EX-YU; NEWS",Метро\r
{PANEL}/live/ada.l/hunter2/4.ts\r
#EXTINF:-1 tvg-id="" tvg-name="A Film (1999)" tvg-logo="" group-title="VOD",A Film (1999)\r
{PANEL}/movie/ada.l/hunter2/5.mkv\r
#EXTINF:-1 tvg-id="" tvg-name="A Series S01 E01" group-title="VOD",A Series S01 E01\r
{PANEL}/series/ada.l/hunter2/6.mp4\r
#EXTINF:-1 tvg-id="r" radio="true" group-title="Radio",Jazz & Co\r
{PANEL}/live/ada.l/hunter2/7.ts\r
"""

# A public collection: various addresses, user agents, qualities in titles, comments.
OF_A_COLLECTION = """\ufeff#EXTM3U x-tvg-url="https://guide.example/a.xml.gz,https://guide.example/b.xml"
# gathered by volunteers

#EXTINF:-1 tvg-id="Allgaeu.de" tvg-logo="" group-title="General",Allgäu TV (720p) [Not 24/7]
https://cdn.example/allgaeu/index.m3u8
#EXTINF:-1 tvg-id="DW.de@EN" group-title="News;Public" http-user-agent="M/5.0",DW (1080p)
#EXTVLCOPT:http-user-agent=Mozilla/5.0 (X11; Linux)
#EXTVLCOPT:http-referrer=https://www.dw.example/
https://cdn.example/dw/index.m3u8?a=1&b=2
#EXTINF:-1,Camera on the beach
rtmp://cam.example/live/1
#EXTINF:-1 group-title="Undefined",Studio Ⓐ
#EXTGRP:Music
https://user:secret@radio.example/a.aac|User-Agent=Kodi%2F21&Referer=https://radio.example/
"""

# A list written by hand.
BY_HAND = """#EXTINF:0, First channel
http://10.0.0.2/one.m3u8
#EXTINF:-1 tvg-id=second tvg-logo=http://10.0.0.2/2.png group-title=At home,Second, the other one
#EXTGRP:Kitchen
http://10.0.0.2/two.m3u8
"""


def test_list_of_a_panel_is_parsed() -> None:
    found = parsed(OF_A_PANEL)
    assert [(e.title, e.tvg_id, e.group) for e in found.entries] == [
        ("UK: One FHD", "one.uk", "UK"),
        ("UK: One SD", "one.uk", "UK"),
        ("Метро", None, "EX-YU"),
        ("Jazz & Co", "r", "Radio"),
    ]
    assert found.entries[0].logo == "http://logo.example/1.png"
    assert found.entries[0].address == f"{PANEL}/live/ada.l/hunter2/2.ts"
    assert found.guide == f"{PANEL}/xmltv.php?username=ada.l&password=hunter2"
    assert found.summary() == "4 channels; left out: 2 films, 1 headings"
    assert list(streams(OF_A_PANEL)) == ["uk-one-fhd", "uk-one-sd", "tv-1", "jazz-co"]


def test_list_of_a_collection_is_parsed() -> None:
    found = parsed(OF_A_COLLECTION)
    assert [(e.title, e.group) for e in found.entries] == [
        ("Allgäu TV (720p) [Not 24/7]", "General"),
        ("DW (1080p)", "News"),
        ("Studio Ⓐ", "Undefined"),
    ]
    assert found.guide == "https://guide.example/a.xml.gz"
    assert found.entries[1].headers == {
        "User-Agent": "Mozilla/5.0 (X11; Linux)",
        "Referer": "https://www.dw.example/",
    }
    assert found.entries[2].headers == {
        "User-Agent": "Kodi/21",
        "Referer": "https://radio.example/",
    }
    assert found.entries[2].address == "https://user:secret@radio.example/a.aac"
    assert found.summary() == "3 channels; left out: 1 with another kind of address"
    assert list(streams(OF_A_COLLECTION)) == ["allgau-tv-720p-not-24-7", "dw-1080p", "studio-a"]


def test_list_written_by_hand_is_parsed() -> None:
    first, second = parsed(BY_HAND).entries
    assert (first.title, first.group) == ("First channel", None)
    assert (second.title, second.group) == ("Second, the other one", "At home")
    assert (second.tvg_id, second.logo) == ("second", "http://10.0.0.2/2.png")


@pytest.mark.parametrize("text", [OF_A_PANEL, OF_A_COLLECTION, BY_HAND])
@pytest.mark.parametrize("piece", [1, 7, 100])
def test_list_does_not_depend_on_how_its_bytes_arrive(text: str, piece: int) -> None:
    assert parsed(text, piece) == parsed(text)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ipytv needs Python 3.11")
def test_another_parser_agrees_on_clean_lists() -> None:
    import ipytv.playlist  # type: ignore[import-untyped]

    for text in (OF_A_PANEL, OF_A_COLLECTION.lstrip("\ufeff")):
        theirs = {c.url: c for c in ipytv.playlist.loads(text.replace("\r\n", "\n"))}
        for ours in parsed(text, films=True).entries:
            address = next(url for url in theirs if url.startswith(ours.address))
            other = theirs[address]
            assert ours.title == other.name
            assert ours.tvg_id == (other.attributes.get("tvg-id") or None)
            group = other.attributes["group-title"].split(";")[0]
            assert ours.group == group


#### Attributes ####


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('tvg-id="a" group-title="B",T', ("a", "B", "T")),
        ("tvg-id=a group-title=B,T", ("a", "B", "T")),
        ("tvg-id='a' group-title='B',T", ("a", "B", "T")),
        ('TVG-ID="a" Group-Title="B",T', ("a", "B", "T")),
        ('tvg-id="a",group-title="B",T', ("a", "B", "T")),
        ('tvg-id="a"group-title="B",T', ("a", "B", "T")),
        ('tvg-id="a" , group-title="B" ,T', ("a", "B", "T")),
        ('tvg-id="a" group-title="B, C",T, U', ("a", "B, C", "T, U")),
        ('tvg-id="say "a", b" group-title="B",T', ('say "a", b', "B", "T")),
        ('tvg-id="a" group-title="the "B" group",T', ("a", 'the "B" group', "T")),
        ('tvg-id="a" group-title="B",T "quoted", and more', ("a", "B", 'T "quoted", and more')),
        ('tvg-id="a" group-title="B",T size="big"', ("a", "B", 'T size="big"')),
        ('tvg-id="a" group-title="B,T', ("a", "B", "T")),
        ('tvg-id="a" group-title="B" T', ("a", "B", "T")),
        ('tvg-id="" tvg-id="a" group-title="B",T', ("a", "B", "T")),
        ('tvg-id="a" x="1" group-title=B radio=true,T', ("a", "B", "T")),
        ('tvg-logo="http://l.example/?x=1,2" tvg-id="a" group-title="B",T', ("a", "B", "T")),
        ('tvg-id="a" group-title="B;C; D",T', ("a", "B", "T")),
        ('tvg-id="a" group-title=" ; B",T', ("a", "B", "T")),
        ('tvg-id="a" tvg-name="T" group-title="B",', ("a", "B", "T")),
        # blanks around the equals sign
        ('tvg-id = "a" group-title= "B",T', ("a", "B", "T")),
        ("tvg-id = a group-title =B,T", ("a", "B", "T")),
        ("tvg-id='a'  group-title\t=\t'B',T", ("a", "B", "T")),
        ("tvg-id = a x = 1 group-title = B radio = true,T", ("a", "B", "T")),
        ('tvg-id = "a" group-title = "B",T size = "big"', ("a", "B", 'T size = "big"')),
        (",T = 1, tvg = 2", (None, None, "T = 1, tvg = 2")),
        # escaped quotes
        (r'tvg-id="say \"a\"" group-title="B",T', ('say "a"', "B", "T")),
        (r'tvg-id="a" group-title="the \"B\", yes",T', ("a", 'the "B", yes', "T")),
        (r'tvg-id="a" group-title="\"B\"",T, "U"', ("a", '"B"', 'T, "U"')),
        (r"tvg-id='it\'s' group-title='B\', C',T", ("it's", "B', C", "T")),
        (r'tvg-id="a\" group-title="B\",T', ("a\\", "B\\", "T")),
        ("T", (None, None, "T")),
        (",T", (None, None, "T")),
        (",T=1, tvg=2", (None, None, "T=1, tvg=2")),
        ('tvg-id="a\tb\0c\u202ed" group-title="B\u00a0B",T\x07', ("a bcd", "B B", "T")),
    ],
)
def test_attributes_are_parsed(line: str, expected: tuple[str | None, str | None, str]) -> None:
    found = entry(f"#EXTINF:-1 {line}")
    assert (found.tvg_id, found.group, found.title) == expected


@pytest.mark.parametrize("duration", ["-1", "0", "-1.5", "", " -1", "3600"])
def test_any_duration_is_accepted(duration: str) -> None:
    assert entry(f'#EXTINF:{duration} tvg-id="a",T').title == "T"
    assert entry(f"#EXTINF:{duration},T").title == "T"


def test_group_line_is_the_group_of_an_entry_without_one() -> None:
    assert entry("#EXTINF:-1,T", "#EXTGRP:B; C").group == "B"
    assert entry('#EXTINF:-1 group-title="A",T', "#EXTGRP:B").group == "A"
    assert entry('#EXTINF:-1 group-title="",T', "#EXTGRP:B").group == "B"
    assert entry("#EXTINF:-1,T", '#EXTGRP: "Our group" ').group == "Our group"


def test_group_line_before_an_entry_applies_to_all_following_entries() -> None:
    """As in Kodi.  After an #EXTINF, it applies only to that entry."""
    text = f"""#EXTM3U
#EXTGRP:News
#EXTINF:-1,A
{PANEL}/a
#EXTINF:-1,B
#EXTGRP:Sport
{PANEL}/b
#EXTINF:-1,C
{PANEL}/c
#EXTINF:-1 group-title="Films",D
{PANEL}/d
#EXTGRP:
#EXTINF:-1,E
{PANEL}/e
"""
    groups = {found.title: found.group for found in parsed(text).entries}
    assert groups == {"A": "News", "B": "Sport", "C": "News", "D": "Films", "E": None}


def test_list_may_mix_latin_1_and_utf_8() -> None:
    text = simple("Köln").encode("latin-1") + simple("Łódź").encode()
    assert [found.title for found in parsed(text).entries] == ["Köln", "Łódź"]


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("piece", [1, 3, 1 << 16])
def test_list_may_be_in_utf_16(order: str, piece: int) -> None:
    """Notepad on Windows calls it "Unicode".  Both bytes of U+0A0A are line feeds."""
    text = OF_A_COLLECTION.lstrip("\ufeff") + simple("Łódź \U0001f4fa", "\u0a0a")
    data = f"\ufeff{text}".encode(f"utf-16-{order}")
    assert parsed(data, piece) == parsed(text)


def test_truncated_utf_16_ends_with_the_last_whole_character() -> None:
    data = simple("News").encode("utf-16") + "#".encode("utf-16-le")[:1]
    assert titles_of(parsed(data)) == ["News"]


def test_lines_may_end_with_a_carriage_return() -> None:
    text = OF_A_PANEL.replace("\r\n", "\n")
    assert parsed(text.replace("\n", "\r")) == parsed(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        (" 7 ", 7),
        ("0", None),
        ("12.1", None),
        ("-3", None),
        ("x", None),
        ("1" * 30, None),
    ],
)
def test_channel_number_is_parsed(text: str, expected: int | None) -> None:
    assert entry(f'#EXTINF:-1 tvg-chno="{text}",T').number == expected


def test_channel_numbers_of_tvheadend_and_hdhomerun_are_parsed() -> None:
    assert entry('#EXTINF:-1 tvh-chnum="5",T').number == 5
    assert entry('#EXTINF:-1 channel-number="17",T').number == 17
    assert entry('#EXTINF:-1 channel-number="17" tvg-chno="3",T').number == 3


@pytest.mark.parametrize(
    ("logo", "is_kept"),
    [
        ("https://l.example/a.png", True),
        ("http://l.example:8080/a b.png?x=1,2", True),
        ("file:///etc/passwd", False),
        ("http://file:///etc/passwd", False),
        ("javascript:alert(1)", False),
        ("data:image/png;base64,AAAA", False),
        ("/local/logo.png", False),
        ("http://", False),
        ("http://user:secret@l.example/a.png", False),
        (f"{PANEL}/logo.php?username=ada.l&password=hunter2", False),
        (f"{PANEL}/hunter2/logo.png", False),
        ("http://l.example/" + 5000 * "a", False),
    ],
)
def test_logo_address_must_be_public(logo: str, is_kept: bool) -> None:
    assert entry(f'#EXTINF:-1 tvg-logo="{logo}",T').logo == (logo if is_kept else None)


#### Headers ####


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("|User-Agent=VLC/3.0&Referer=https://a.example/?x=1", {
            "User-Agent": "VLC/3.0", "Referer": "https://a.example/?x=1",
        }),
        ("|user-agent=a%20b&X-Token=c%26d", {"user-agent": "a b", "X-Token": "c&d"}),
        ("|referrer=https://a.example", {"Referer": "https://a.example"}),
        ("|User-Agent=a&user-agent=b", {"user-agent": "b"}),
        ("|User-Agent=&X=", {}),
        ("|Host=other.example&Content-Length=5&Connection=close&range=bytes", {}),
        ("|A B=c&\u00fc=d&X=\u00fc&Y=a%0d%0aZ:b", {}),
        ("|", {}),
    ],
)  # fmt: skip
def test_headers_after_the_address_are_parsed(tail: str, expected: dict[str, str]) -> None:
    address = f"{PANEL}/live/1.ts"
    found = entry("#EXTINF:-1,T", address=address + tail)
    assert found.headers == expected
    assert found.address == address + ("|" if tail == "|" else "")


def test_header_lines_are_parsed() -> None:
    found = entry(
        "#EXTINF:-1,T",
        "#EXTVLCOPT:http-user-agent=Mozilla/5.0, a=b",
        "#extvlcopt:HTTP-REFERRER = https://a.example/",
        "#EXTVLCOPT:http-origin=https://a.example",
        "#EXTVLCOPT:network-caching=1000",
        "#EXTVLCOPT:http-user-agent-x=no",
        "#KODIPROP:inputstream.adaptive.license_key=secret",
    )
    assert found.headers == {
        "User-Agent": "Mozilla/5.0, a=b",
        "Referer": "https://a.example/",
        "Origin": "https://a.example",
    }


def test_header_lines_for_kodi_are_parsed() -> None:
    found = entry(
        "#EXTINF:-1,T",
        "#KODIPROP:inputstream.adaptive.stream_headers=User-Agent=K%2F21&Referer=https://a.example/?x=1",
        "#KODIPROP:inputstream.adaptive.manifest_headers=X-Token=a b",
        "#KODIPROP:inputstream.adaptive.license_type=clearkey",
    )
    assert found.headers == {
        "User-Agent": "K/21",
        "Referer": "https://a.example/?x=1",
        "X-Token": "a b",
    }


def test_header_lines_in_json_are_parsed() -> None:
    """As lists for TiviMate and OTT Navigator have them."""
    found = entry("#EXTINF:-1,T", '#EXTHTTP:{"User-Agent": "O/1", "cookie": "a=b; c=d", "X-N": 7}')
    assert found.headers == {"User-Agent": "O/1", "cookie": "a=b; c=d", "X-N": "7"}


@pytest.mark.parametrize("line", ['{"A":', "[1]", "", '{"Host": "a"}', '{"A": null, ', "[" * 9999])
def test_header_lines_that_are_not_usable_are_counted(line: str) -> None:
    found = parsed(f"#EXTINF:-1,T\n#EXTHTTP:{line}\n{PANEL}/a\n")
    assert found.entries[0].headers == {}
    assert found.omitted == {"unusable headers": 1}


def test_headers_above_fifty_are_counted_as_unusable() -> None:
    """Each took longer to add than the one before; a list could occupy a core for hours."""
    headers = "&".join(f"X-{number}={number}" for number in range(60))
    option = f"#KODIPROP:inputstream.adaptive.stream_headers={headers}"
    found = parsed(f"#EXTINF:-1,T\n{option}\n{PANEL}/a\n")
    assert len(found.entries[0].headers) == 50
    assert found.omitted == {"unusable headers": 10}


def test_headers_in_attributes_are_parsed() -> None:
    """As the lists of iptv-org have them; a header in a line of its own counts more."""
    line = '#EXTINF:-1 user-agent="A/1" http-referrer="https://a.example/" tvg-id="t",T'
    expected = {"User-Agent": "A/1", "Referer": "https://a.example/"}
    assert entry(line).headers == expected
    assert entry(line.replace("user-agent", "http-user-agent")).headers == expected
    found = entry(line, "#EXTVLCOPT:http-user-agent=B/2")
    assert found.headers == expected | {"User-Agent": "B/2"}


@pytest.mark.parametrize(
    "line", ['#EXTVLCOPT:http-user-agent="A/1 (b)"', '#EXTHTTP:{"User-Agent": "\'A/1 (b)\'"}']
)
def test_quotes_around_a_header_are_not_part_of_it(line: str) -> None:
    assert entry("#EXTINF:-1,T", line).headers == {"User-Agent": "A/1 (b)"}
    found = entry("#EXTINF:-1,T", address=f'{PANEL}/a|user-agent="A/1 (b)"&X="')
    assert found.headers == {"user-agent": "A/1 (b)", "X": '"'}


def test_html_entities_are_replaced() -> None:
    found = entry(
        '#EXTINF:-1 tvg-id="A&amp;E.us" tvg-logo="http://l.example/a?b&amp;c" '
        'group-title="Law &amp; Order;UK",A&amp;E &#39;one&#39; &#x41; R&B &copy; &quot;two&quot;'
    )
    assert found.title == "A&E 'one' A R&B &copy; \"two\""
    assert (found.tvg_id, found.group) == ("A&E.us", "Law & Order")
    assert found.logo == "http://l.example/a?b&c"


def test_headers_apply_to_one_entry() -> None:
    text = f"#EXTINF:-1,A\n#EXTVLCOPT:http-user-agent=x\n{PANEL}/a\n#EXTINF:-1,B\n{PANEL}/b\n"
    assert [found.headers for found in parsed(text).entries] == [{"User-Agent": "x"}, {}]


def test_headers_of_stream_override_entry_and_entry_overrides_playlist() -> None:
    text = f"#EXTINF:-1,A\n{PANEL}/a|User-Agent=entry&X-One=entry\n#EXTINF:-1,B\n{PANEL}/b\n"
    keys = playlist(headers={"user-agent": "list", "X-Two": "list", "X-Three": "list"})
    config = pipe.Config(
        playlists={"tv": keys}, overrides={"a": {"headers": {"x-two": "own"}, "linger": 1.0}}
    )
    found, _ = pipe.with_lists(config, {"tv": parsed(text)}, {})
    assert found.streams["a"].headers == {
        "User-Agent": "entry",
        "X-One": "entry",
        "x-two": "own",
        "X-Three": "list",
    }
    assert found.streams["a"].options.linger == 1.0
    assert found.streams["b"].headers == keys.headers


#### Entries that are left out ####


@pytest.mark.parametrize(
    "title",
    [
        "",
        "  ",
        "-----",
        "#### SPORT ####",
        "=== UK ===",
        "* * *",
        "★★ VIP ★★",
        "|||| FR ||||",
        "· · ·",
    ],
)
def test_headings_are_omitted(title: str) -> None:
    found = parsed(simple("News", title, "Sport"))
    assert [each.title for each in found.entries] == ["News", "Sport"]
    assert found.omitted == {"headings": 1}


@pytest.mark.parametrize(
    "title",
    ["C-SPAN", "#1 Hits", "|UK| BBC ONE |HD|", "Canal++", "- News -", "24", "A&E", "E! **", "1+1"],
)
def test_titles_with_signs_are_not_headings(title: str) -> None:
    assert titles(simple(title)) == [title]


@pytest.mark.parametrize(
    "address",
    [
        *("rtmp://a.example/b", "rtp://@239.0.0.1:5000", "udp://@239.0.0.1", "plugin://video/x"),
        *("file:///etc/passwd", "/etc/passwd", "live/1.ts", "hls://file:///etc/passwd", "C:\\a.ts"),
    ],
)
def test_other_kinds_of_addresses_are_omitted(address: str) -> None:
    found = parsed(simple("News") + f"#EXTINF:-1,Other\n{address}\n")
    assert [each.title for each in found.entries] == ["News"]
    assert found.omitted == {"with another kind of address": 1}


@pytest.mark.parametrize(
    "address",
    [
        *(
            "http://",
            "http:///x",
            "http://a.example:99999/",
            "http://[::1/x",
            "http://a.example/\x07",
        ),
        *("http://file:///etc/passwd", "http://a.example/" + 5000 * "a", "https://http://~/x"),
    ],
)
def test_invalid_addresses_are_omitted(address: str) -> None:
    found = parsed(simple("News") + f"#EXTINF:-1,Other\n{address}\n")
    assert [each.title for each in found.entries] == ["News"]
    assert found.omitted == {"with an invalid address": 1}


def test_films_are_omitted_unless_wanted() -> None:
    assert len(parsed(OF_A_PANEL, films=True).entries) == 6
    text = f"#EXTINF:-1,A\n{PANEL}/live/1.ts?from=/movie/\n"
    assert titles(text) == ["A"]


def test_repeated_entries_are_omitted() -> None:
    one = f'#EXTINF:-1 group-title="G",A\n{PANEL}/a\n'
    found = parsed(one + one + one.replace('"G"', '"H"') + one.replace("/a\n", "/b\n"))
    assert [(each.title, each.group, each.address[-1]) for each in found.entries] == [
        ("A", "G", "a"),
        ("A", "H", "a"),
        ("A", "G", "b"),
    ]
    assert found.omitted == {"duplicates": 1}


def test_entry_without_an_address_ends_at_the_next_entry() -> None:
    text = '#EXTINF:-1 group-title="G",A\n#EXTVLCOPT:http-origin=x\n'
    text += f"#EXTINF:-1,B\n{PANEL}/b\n#EXTINF:-1,C"
    found = parsed(text)
    assert [(each.title, each.group) for each in found.entries] == [("B", None)]
    assert found.omitted == {"without an address": 2}


def test_entry_without_an_address_does_not_affect_the_next() -> None:
    text = "#EXTINF:-1,A\n#EXTGRP:G\n#EXTVLCOPT:http-user-agent=a\n"
    text += f"#EXTINF:-1,B\n{PANEL}/b\n#EXTVLCOPT:http-user-agent=c\n#EXTINF:-1,C\n{PANEL}/c\n"
    found = [(each.title, each.group, each.headers) for each in parsed(text).entries]
    assert found == [("B", None, {}), ("C", None, {"User-Agent": "c"})]


def test_addresses_without_a_title_are_omitted() -> None:
    found = parsed(f"#EXTM3U\n{PANEL}/0\n" + simple("A"))
    assert len(found.entries) == 1
    assert found.omitted == {"without a title": 1}


def test_overlong_line_is_omitted() -> None:
    found = parsed(simple("A", 2 * pipe.LINE_LIMIT * "x", "B"))
    assert [each.title for each in found.entries] == ["A", "B"]
    assert found.omitted == {"too long": 1, "without a title": 1}


def test_entries_beyond_the_limit_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipe.CHANNEL_LIMIT == 20_000
    monkeypatch.setattr(pipe, "CHANNEL_LIMIT", 3)
    found = parsed(simple(*"ABCDE"))
    assert [each.title for each in found.entries] == ["A", "B", "C"]
    summary = "3 channels; left out: 2 above the limit of 3 (select groups with groups:)"
    assert found.summary() == summary


#### Groups ####

GROUPS = "".join(
    f'#EXTINF:-1 group-title="{group}",{title}\n{PANEL}/{title}\n'
    for title, group in {
        "a": "News",
        "b": "UK;Sports",
        "c": "Adult XXX",
        "d": "[DE] Info",
        "e": "",
        "f": "news hd",
    }.items()
)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], "abcdef"),
        (["News"], "a"),
        (["news*"], "af"),
        (["Sports"], "b"),
        (["!Adult*"], "abdef"),
        (["!adult*", "!news"], "bdef"),
        (["*", "!UK"], "acdef"),
        (["[DE] Info"], "d"),
        (["[a-d]*"], "c"),
        (["News", "Sports", "!News"], "b"),
    ],
)
def test_groups_choose_channels(groups: Sequence[str], expected: str) -> None:
    found = parsed(GROUPS, groups=tuple(groups))
    assert "".join(each.title for each in found.entries) == expected
    assert found.omitted["in other groups"] == 6 - len(expected)


def test_wanted_group_is_shown() -> None:
    (found,) = parsed(GROUPS, groups=("Sports",)).entries
    assert found.group == "Sports"


def test_summary_names_patterns_that_match_no_group() -> None:
    found = parsed(GROUPS, groups=("news", "Sprots", "UK*", "!Adult*", "!XXX"))
    assert (
        found.summary() == "2 channels; left out: 4 in other groups; no group matches Sprots, !XXX"
    )
    assert "no group" not in parsed(GROUPS, groups=("news", "!adult*")).summary()


#### Texts that are not lists ####


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!DOCTYPE html><html><body>Login</body></html>", pipe.NOT_A_LIST),
        ("\ufeff\n  <html>", pipe.NOT_A_LIST),
        ('{"user_info": {"auth": 0}}', pipe.NOT_A_LIST),
        ("", pipe.NO_CHANNELS),
        ("#EXTM3U\n", pipe.NO_CHANNELS),
        ("INVALID ACCOUNT", pipe.NO_CHANNELS),
        ("\x00\x01\x02" * 100, pipe.NO_CHANNELS),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n1.ts\n", pipe.A_STREAM),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nlow.m3u8\n", pipe.A_STREAM),
        (f"#EXTINF:-1,Film\n{PANEL}/movie/1.mkv\n", pipe.ONLY_FILMS),
        (
            "#EXTINF:-1,Multicast\nudp://@239.0.0.1:5000\n#EXTINF:-1,A\n",
            "the list has no usable channels: 1 with another kind of address, 1 without an address",
        ),
    ],
)
def test_text_that_is_not_a_list_is_refused(text: str, reason: str) -> None:
    with pytest.raises(pipe.ListError) as caught:
        parsed(text)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("titles", "words"),
    [
        (["News"], '"News"'),
        (["News; UK", "Sport", "News", ""], '"News", "UK", "Sport" and ""'),
        (
            [f"Group {number:,}" for number in range(3000)],
            ", ".join(f'"Group {number}"' for number in range(10)) + " and 2990 more",
        ),
    ],
)
def test_list_without_the_wanted_groups_names_its_groups(titles: list[str], words: str) -> None:
    lines = ["#EXTM3U", f'#EXTINF:-1 group-title="News",Film\n{PANEL}/movie/1.mkv']
    for number, title in enumerate(titles):
        lines.append(f'#EXTINF:-1 group-title="{title}",A\n{PANEL}/live/{number}.ts')
    with pytest.raises(pipe.ListError) as caught:
        parsed("\n".join(lines), groups=("Sprot",))
    assert str(caught.value) == f"the list has none of the wanted groups, but {words}"


def test_list_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "LIST_LIMIT", 1 << 20)
    with pytest.raises(pipe.ListError, match="larger than 1 MiB"):
        parsed(b"#" * (3 << 20))


#### Accounts ####


@pytest.mark.parametrize(
    ("ours", "theirs", "is_theirs"),
    [
        ("http://p.example:80", "http://p.example", True),
        ("http://p.example", "http://p.example:80", True),
        ("https://p.example:443", "https://p.example", True),
        ("hls://http://p.example:80", "http://p.example", True),
        ("http://p.example:8080", "http://p.example", False),
        ("http://p.example:443", "https://p.example:80", False),
        ("https://p.example", "http://p.example", True),
        ("http://[::1", "http://p.example", False),
    ],
)
def test_default_port_of_an_account_may_be_written(ours: str, theirs: str, is_theirs: bool) -> None:
    tv = pipe.PlaylistSettings("tv", f"{theirs}/get.php?username=ada&password=hunter2")
    stream = pipe.StreamSettings("own", (f"{ours}/live/ada/hunter2/1.ts",))
    config = pipe.Config(streams={"own": stream}, playlists={"tv": tv})
    expected = "tv" if is_theirs else None
    assert pipe.account_name_of(config, stream, stream.urls[0]) == expected


#### Names ####


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("BBC One HD", "bbc-one-hd"),
        ("  Canal+ (FR) ", "canal-fr"),
        ("Allgäu Ärzte-TV", "allgau-arzte-tv"),
        ("Straße", "strasse"),
        ("Łódź", "odz"),
        ("RTL ᴴᴰ ²", "rtl-hd-2"),
        ("İSTANBUL", "istanbul"),
        ("status", "status-2"),
        ("Playlist", "playlist-2"),
        ("a" * 300, "a" * 60),
        ("24", "tv-1"),
        ("Первый", "tv-1"),
        ("第1频道", "tv-1"),
    ],
)
def test_name_is_made_from_the_title(title: str, name: str) -> None:
    assert list(streams(simple(title))) == [name]


def test_name_may_be_made_from_the_id() -> None:
    text = f'#EXTINF:-1 tvg-id="Perviy.ru",Первый\n{PANEL}/1\n#EXTINF:-1 tvg-id="Ж",Ж\n{PANEL}/2\n'
    assert list(streams(text)) == ["perviy-ru", "tv-1"]


def test_repeated_names_get_numbers() -> None:
    text = simple("News", "news!", "NEWS 2", "News", "Ж", "Я")
    assert list(streams(text)) == ["news", "news-2", "news-2-2", "news-3", "tv-1", "tv-2"]


def test_prefix_is_part_of_the_name() -> None:
    assert list(streams(simple("News", "Ж"), prefix="uk-")) == ["uk-news", "uk-tv-1"]


def names_after(*texts: str, **keys: Any) -> dict[str, str]:
    """Load these lists in turn; maps each stream name to the last part of its address."""
    known: dict[pipe.Identity, str] = {}
    config = pipe.Config(playlists={"tv": playlist(**keys)})
    for text in texts:
        found, known = pipe.with_lists(config, {"tv": parsed(text, **keys)}, known)
    return {name: stream.urls[0].rpartition("/")[2] for name, stream in found.streams.items()}


def numbered(*numbers: int, title: str = "News") -> str:
    return "".join(
        f'#EXTINF:-1 tvg-id="id{number}",{title}\n{PANEL}/{number}\n' for number in numbers
    )


def test_channel_keeps_its_name_if_others_are_inserted_before_it() -> None:
    assert names_after(numbered(1, 2), numbered(3, 1, 4, 2)) == {
        "news": "1",
        "news-2": "2",
        "news-3": "3",
        "news-4": "4",
    }


def test_channel_keeps_its_name_if_those_before_it_are_removed() -> None:
    assert names_after(numbered(1, 2, 3), numbered(3)) == {"news-3": "3"}
    assert names_after(numbered(1, 2), numbered(2), numbered(5, 2)) == {"news": "5", "news-2": "2"}


def test_channel_keeps_its_name_when_only_its_address_changes() -> None:
    before, after = numbered(1, 2), numbered(1, 2).replace("panel.example", "other.example")
    assert names_after(before, after) == {"news": "1", "news-2": "2"}


def test_equal_entries_keep_their_names_in_order() -> None:
    one = f"#EXTINF:-1,News\n{PANEL}/a\n#EXTINF:-1,News\n{PANEL}/b\n"
    assert names_after(one, simple("X") + one) == {"x": "0.ts", "news": "a", "news-2": "b"}


def test_streams_are_in_the_order_of_the_list() -> None:
    assert list(names_after(numbered(1, 2), numbered(2, 1))) == ["news-2", "news"]


def test_changed_prefix_renames_streams() -> None:
    config = pipe.Config(playlists={"tv": playlist()})
    lists = {"tv": parsed(simple("News"))}
    _, known = pipe.with_lists(config, lists, {})
    config = pipe.Config(playlists={"tv": playlist(prefix="uk-")})
    assert list(pipe.with_lists(config, lists, known)[0].streams) == ["uk-news"]


#### Several lists, streams of the file, numbers ####


def two_lists(first: str, second: str, **more: Any) -> pipe.Config:
    """The configuration with two loaded lists; `more` are fields of Config, or `merge`."""
    keys = {"merge": more.pop("merge", False)}
    playlists = {
        "a": pipe.PlaylistSettings("a", LIST_URL, headers={"X-Account": "aaaa"}, **keys),
        "b": pipe.PlaylistSettings("b", "http://other.example/list.m3u", **keys),
    }
    config = pipe.Config(playlists=playlists, **more)
    return pipe.with_lists(config, {"b": parsed(second), "a": parsed(first)}, {})[0]


def test_channels_without_letters_are_numbered_in_each_list() -> None:
    found = two_lists(simple("Ж", "Я"), simple("Ж"))
    assert list(found.streams) == ["a-1", "a-2", "b-1"]


def test_lists_are_in_configured_order() -> None:
    found = two_lists(simple("News", "One"), simple("News", "Two"))
    assert list(found.streams) == ["news", "one", "news-2", "two"]
    assert [stream.playlist for stream in found.streams.values()] == ["a", "a", "b", "b"]


def test_merged_entries_are_one_stream_with_several_addresses() -> None:
    text = numbered(1, 2) + f'#EXTINF:-1 group-title="G",News\n{PANEL}/3\n'
    found = streams(text, merge=True)
    assert {name: stream.urls for name, stream in found.items()} == {
        "news": (f"{PANEL}/1", f"{PANEL}/2"),
        "news-2": (f"{PANEL}/3",),
    }


def test_merged_entries_of_two_lists_keep_their_own_headers() -> None:
    """The headers of one provider's account are never sent to another provider."""
    second = "#EXTINF:-1,news\nhttp://other.example/n.ts\n"
    found = two_lists(simple("News"), second, merge=True).streams["news"]
    assert found.urls == (f"{PANEL}/live/ada.l/hunter2/0.ts", "http://other.example/n.ts")
    assert found.at(found.urls[0]).headers == {"X-Account": "aaaa"}
    assert found.at(found.urls[0]).playlist == "a"
    assert found.at(found.urls[1]).headers == {}
    assert found.at(found.urls[1]).playlist == "b"


def test_merged_entries_keep_their_name() -> None:
    before, after = numbered(1, 2), numbered(3, 2)
    assert names_after(before, after, merge=True) == {"news": "3"}


def test_stream_with_an_address_replaces_an_imported_one() -> None:
    own = pipe.StreamSettings("news", ("http://own.example/n.m3u8",), title="Own")
    found = two_lists(simple("News", "One"), simple("News"), streams={"news": own})
    assert found.streams["news"] is own
    assert list(found.streams) == ["news", "one", "news-2"]


def test_stream_without_an_address_overrides_an_imported_one() -> None:
    given = {"title": "Mine", "number": 7, "hide": True, "quality": "720p", "threads": 2}
    found = two_lists(simple("News"), simple("One"), overrides={"news": given})
    stream = found.streams["news"]
    assert (stream.title, stream.number, stream.hide, stream.quality) == ("Mine", 7, True, "720p")
    assert stream.options.threads == 2
    assert stream.urls == (f"{PANEL}/live/ada.l/hunter2/0.ts",)


def test_first_of_equal_numbers_is_kept_and_configured_numbers_first() -> None:
    text = "".join(
        f'#EXTINF:-1 tvg-chno="{number}",{title}\n{PANEL}/{title}\n'
        for number, title in [(1, "a"), (1, "b"), (2, "c"), (3, "d"), (3, "e")]
    )
    own = pipe.StreamSettings("x", ("http://own.example/n.m3u8",), number=2)
    config = pipe.Config(
        playlists={"tv": playlist()}, streams={"x": own}, overrides={"e": {"number": 4}}
    )
    found, _ = pipe.with_lists(config, {"tv": parsed(text)}, {})
    assert {name: stream.number for name, stream in found.streams.items()} == {
        "x": 2,
        "a": 1,
        "b": None,
        "c": None,
        "d": 3,
        "e": 4,
    }


@pytest.mark.parametrize(
    "text",
    [
        "https://g.example/a.xml,https://g.example/b.xml",
        "https://g.example/a.xml;https://g.example/b.xml",
        "https://g.example/a.xml ; HTTP://g.example/b.xml;",
        "a.xml;https://g.example/a.xml",
    ],
)
def test_first_of_several_guides_is_used(text: str) -> None:
    assert parsed(f'#EXTM3U url-tvg="{text}"\n{simple("A")}').guide == "https://g.example/a.xml"


def test_guide_address_may_contain_semicolons() -> None:
    guide = "https://g.example/a.php;v=1?x=1;y=2"
    assert parsed(f'#EXTM3U url-tvg="{guide}"\n{simple("A")}').guide == guide


def test_guides_are_taken_from_the_lists() -> None:
    found = two_lists(OF_A_PANEL, simple("A"))
    assert found.guides == {"a": f"{PANEL}/xmltv.php?username=ada.l&password=hunter2"}


def test_changed_headers_of_a_merged_address_are_a_change() -> None:
    found = two_lists(simple("News"), simple("News").replace("/0.ts", "/9.ts"), merge=True)
    stream = found.streams["news"]
    (address, other) = next(iter(stream.others.items()))
    changed = replace(other, headers={"X": "y"})
    assert replace(stream, others={address: changed}).pulled != stream.pulled


#### Any text ####

PIECES = st.sampled_from([
    *("#EXTM3U", "#EXTINF:-1", "#EXTINF:", "#EXTGRP:", "#EXTVLCOPT:http-user-agent=", "\n", "\r\n"),
    *(' tvg-id="', ' group-title="', " tvg-logo=", ' tvg-chno="', '"', ",", ";", "|", "=", "'"),
    *("http://a.example/", "https://b.example/movie/1", "rtmp://c", "file:///etc/passwd"),
    *("News", "####", "Ж", "12", "status", "\ufeff", "\0", " ", "http://user:pw@c.example/x"),
])  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_any_text_is_a_list_of_valid_streams_or_refused(text: str) -> None:
    try:
        found = parsed(text, films=True)
    except pipe.ListError:
        return
    config = pipe.Config(playlists={"tv": playlist(films=True)})
    result, known = pipe.with_lists(config, {"tv": found}, {})
    names = list(result.streams)
    assert all(pipe.STREAM_NAME.fullmatch(name) for name in names)
    assert not pipe.RESERVED_NAMES.intersection(names)
    addresses = [stream.urls[0] for stream in result.streams.values()]
    assert addresses == [each.address for each in found.entries]
    for stream in result.streams.values():
        assert re.match("https?://", stream.urls[0])
        assert stream.title.isprintable()
        assert all(value.isprintable() and value.isascii() for value in stream.headers.values())
    again, _ = pipe.with_lists(config, {"tv": found}, known)
    assert again == result
    numbers = [stream.number for stream in result.streams.values() if stream.number]
    assert len(numbers) == len(set(numbers))


@settings(max_examples=100, deadline=None)
@given(st.permutations(["News", "Sport", "News", "Ж", "Я", "One"]), st.integers(0, 6))
def test_names_are_kept_in_any_order(order: list[str], cut: int) -> None:
    text = "".join(
        f'#EXTINF:-1 tvg-id="{number}",{title}\n{PANEL}/{number}\n'
        for number, title in enumerate(order)
    )
    some = "".join(text.splitlines(keepends=True)[2 * cut :])
    before = names_after(text)
    after = names_after(text, some) if some else {}
    assert after.items() <= before.items()


@pytest.mark.parametrize(
    "line",
    [
        "#EXTINF:-1" + ' a="' * 12_000,
        "#EXTINF:-1 " + " " * 60_000 + ",T",
        "#EXTINF:-1 " + '"' * 60_000,
        "#EXTINF:-1 " + '", ' * 20_000,
        "#EXTINF:-1 tvg-id=" + " a" * 30_000,
        '#EXTINF:-1 tvg-id="' + '"  ' * 20_000,
        "#EXTINF:-1," + "#-" * 30_000,
        "#EXTINF:-1," + "\u0301" * 20_000,
        "#EXTM3U x-tvg-url=" + "http://," * 7_000,
    ],
)
def test_odd_lines_are_parsed_quickly(line: str) -> None:
    """A backtracking expression would take minutes; the time limit of the test is the assertion."""
    for _ in range(20):
        parser = pipe.ListParser(playlist())
        parser.feed(f"{line}\n{PANEL}/1\n".encode())
