"""The configuration, without a server. streamlink's options are real; files are in tmp_path."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlink.session.session import Streamlink

import pipe

ENGINE = pipe.engine_options()
URL = "http://origin.example/live.m3u8"
SECRET = "hunter2"


def read(text: str) -> pipe.Config:
    return pipe.ConfigReader("test.yml", ENGINE).read(text)


def mistakes(text: str) -> list[str]:
    """The mistakes that are reported for a text."""
    with pytest.raises(pipe.ConfigError) as caught:
        read(text)
    return list(caught.value.mistakes)


def server(keys: str) -> str:
    return f"server: {{{keys}}}"


def options(keys: str) -> str:
    return f"options: {{{keys}}}"


def engine(keys: str) -> str:
    return f"options: {{streamlink: {{{keys}}}}}"


def stream(keys: str) -> str:
    """A stream `a` with an address and these keys."""
    return f'streams: {{a: {{url: "{URL}", {keys}}}}}'


def read_stream(keys: str) -> pipe.StreamSettings:
    return read(stream(keys)).streams["a"]


def test_only_keys_that_do_not_affect_the_upstream_apply_to_a_running_channel() -> None:
    keys = [item.name for item in dataclasses.fields(pipe.StreamSettings)]
    options = [item.name for item in dataclasses.fields(pipe.Options)]
    one = pipe.StreamSettings("news", (URL,))
    other: Any = object()
    changed = {
        key: dataclasses.replace(one, **{key: other}) for key in keys[1:] if key != "options"
    }
    changed["others"] = dataclasses.replace(one, others={URL: one})
    for key in options:
        changed[key] = dataclasses.replace(
            one, options=dataclasses.replace(one.options, **{key: other})
        )
    kept = {key for key, stream in changed.items() if stream.pulled == one.pulled}
    shown = {"title", "logo", "group", "tvg_id", "number", "hide", "playlist"}
    assert kept == shown | {"linger", "reconnect", "viewer_timeout"}


#### Defaults ####


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "null\n", "server: {}\nstreams: {}\noptions: {}\n"]
)
def test_empty_file_means_the_defaults(text: str) -> None:
    config = read(text)
    assert dataclasses.asdict(config.server) == {
        "host": "0.0.0.0",
        "port": 8080,
        "max_viewers": 1000,
        "max_upstreams": 64,
        "token": None,
        "trusted": (),
        "proxies": (),
        "public_url": None,
        "name": "StreamPipe",
        "epg": None,
    }
    assert dataclasses.asdict(config.options) == {
        "user_agent": "StreamPipe/1.0",
        "threads": 4,
        "timeout": 20.0,
        "buffer_size": 8192,
        "ringbuffer_size": 16777216,
        "linger": 10.0,
        "reconnect": 60.0,
        "viewer_timeout": 600.0,
        "streamlink": {},
    }
    assert config.streams == {}


def test_stream_with_only_an_address_has_the_defaults() -> None:
    expected = pipe.StreamSettings("a", (URL,), title="a")
    assert read(f"streams: {{a: '{URL}'}}").streams == {"a": expected}
    assert dataclasses.asdict(expected) == {
        "name": "a",
        "urls": (URL,),
        "title": "a",
        "logo": None,
        "group": None,
        "tvg_id": None,
        "number": None,
        "quality": "best",
        "headers": {},
        "proxy": None,
        "hide": False,
        "options": dataclasses.asdict(pipe.Options()),
        "playlist": None,
        "others": {},
    }


@pytest.mark.parametrize(
    "key", sorted(field.name for field in dataclasses.fields(pipe.ServerSettings))
)
@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_means_the_default(key: str, null: str) -> None:
    assert read(server(f"{key}: {null}")) == pipe.Config()


@pytest.mark.parametrize("keys", ["threads: ~", "number: ~", "proxy: ~", "streamlink: {ipv4: ~}"])
def test_null_in_a_stream_or_in_options_means_the_default(keys: str) -> None:
    if "streamlink" in keys:
        assert read(options(keys)) == pipe.Config()
    else:
        assert read_stream(keys) == pipe.StreamSettings("a", (URL,), title="a")


#### Every key ####

SERVER_VALUES: dict[str, tuple[str, object]] = {
    "host": ('"::1"', "::1"),
    "port": ("81", 81),
    "max_viewers": ("0", 0),
    "max_upstreams": ("7", 7),
    "token": ("s3cret", "s3cret"),
    "trusted": ('["10.0.0.0/8", "::1"]', ("10.0.0.0/8", "::1")),
    "proxies": ('["10.0.0.2", "fd00::/8"]', ("10.0.0.2", "fd00::/8")),
    "public_url": ("https://tv.example/x", "https://tv.example/x"),
    "name": ('"My TV"', "My TV"),
    "epg": ("http://epg.example/x.xml", "http://epg.example/x.xml"),
}
OPTION_VALUES: dict[str, tuple[str, object]] = {
    "user_agent": ("VLC/3", "VLC/3"),
    "threads": ("8", 8),
    "timeout": ("2.5", 2.5),
    "buffer_size": ("1", 1),
    "ringbuffer_size": ("1048576", 1048576),
    "linger": ("0", 0.0),
    "reconnect": ("5", 5.0),
    "viewer_timeout": ("1e2", 100.0),
    "streamlink": ("{hls-live-edge: 2}", {"hls-live-edge": 2}),
}
STREAM_VALUES: dict[str, tuple[str, object]] = {
    "title": ('"Channel Two"', "Channel Two"),
    "logo": ("https://e.example/2.png", "https://e.example/2.png"),
    "group": ("News", "News"),
    "tvg_id": ("two.example", "two.example"),
    "number": ("2", 2),
    "quality": ('"720p,best"', "720p,best"),
    "headers": ('{Referer: "https://e.example/"}', {"Referer": "https://e.example/"}),
    "proxy": ('"socks5h://127.0.0.1:1080"', "socks5h://127.0.0.1:1080"),
    "hide": ("true", True),
}
PLAYLIST_VALUES: dict[str, tuple[str, object]] = {
    "groups": ('["News", "!Adult*"]', ("News", "!Adult*")),
    "refresh": ("0", 0.0),
    "max_upstreams": ("3", 3),
    "prefix": ("uk-", "uk-"),
    "merge": ("true", True),
    "films": ("yes", True),
    **{key: STREAM_VALUES[key] for key in ("quality", "headers", "proxy")},
}


def keys_and_values(values: Mapping[str, tuple[str, object]]) -> pytest.MarkDecorator:
    cases = [(key, text, value) for key, (text, value) in values.items()]
    return pytest.mark.parametrize(("key", "text", "value"), cases, ids=list(values))


def field_names(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def test_every_key_has_a_test() -> None:
    assert set(SERVER_VALUES) == field_names(pipe.ServerSettings)
    assert set(OPTION_VALUES) == field_names(pipe.Options)
    assert set(STREAM_VALUES) == set(pipe.readers_of(pipe.StreamSettings))
    assert set(PLAYLIST_VALUES) == set(pipe.readers_of(pipe.PlaylistSettings))


@keys_and_values(SERVER_VALUES)
def test_server_key_sets_only_its_field(key: str, text: str, value: Any) -> None:
    assert read(server(f"{key}: {text}")).server == pipe.ServerSettings(**{key: value})


@keys_and_values(OPTION_VALUES)
def test_option_sets_only_its_field(key: str, text: str, value: Any) -> None:
    assert read(options(f"{key}: {text}")).options == pipe.Options(**{key: value})


@keys_and_values(STREAM_VALUES)
def test_stream_key_sets_only_its_field(key: str, text: str, value: Any) -> None:
    expected = dataclasses.replace(pipe.StreamSettings("a", (URL,), title="a"), **{key: value})
    assert read_stream(f"{key}: {text}") == expected


@keys_and_values(OPTION_VALUES)
def test_stream_has_its_own_options(key: str, text: str, value: Any) -> None:
    config = read(stream(f"{key}: {text}"))
    assert config.streams["a"].options == pipe.Options(**{key: value})
    assert config.options == pipe.Options()


def test_options_apply_to_every_stream_that_does_not_override_them() -> None:
    config = read(f"""
        streams:
          a: {{url: "{URL}", threads: 2}}
          b: {URL}
        options: {{threads: 8, timeout: 5}}
    """)
    assert config.options == pipe.Options(threads=8, timeout=5.0)
    assert config.streams["a"].options == pipe.Options(threads=2, timeout=5.0)
    assert config.streams["b"].options == config.options


def test_streamlink_options_of_a_stream_override_the_global_ones() -> None:
    config = read(f"""
        options: {{streamlink: {{hls-live-edge: 2, stream-segment-attempts: 5}}}}
        streams: {{a: {{url: "{URL}", streamlink: {{hls-live-edge: 6}}}}}}
    """)
    merged = {"hls-live-edge": 6, "stream-segment-attempts": 5}
    assert config.streams["a"].options.streamlink == merged
    assert config.options.streamlink == {"hls-live-edge": 2, "stream-segment-attempts": 5}


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        pytest.param(URL, (URL,), id="text"),
        pytest.param(f"['{URL}', 'hls://b']", (URL, "hls://b"), id="list"),
        pytest.param(f"{{url: '{URL}'}}", (URL,), id="map"),
        pytest.param(f"{{url: ['{URL}', 'hls://b']}}", (URL, "hls://b"), id="map with a list"),
        pytest.param(f"'  {URL} '", (URL,), id="blanks around it"),
    ],
)
def test_address_may_be_text_or_list_or_map(value: str, urls: tuple[str, ...]) -> None:
    assert read(f"streams: {{a: {value}}}").streams["a"].urls == urls


def test_streams_keep_the_order_of_the_file() -> None:
    assert list(read("streams: {z: hls://u, a: hls://u, m: hls://u}").streams) == ["z", "a", "m"]


#### As written ####


@pytest.mark.parametrize(
    "name", ["on", "yes", "no", "null", "123", "007", "1e3", "2020-01-01", "a-b", "-"]
)
def test_name_is_read_as_written(name: str) -> None:
    streams = read(f"streams:\n  {name}: {URL}\n").streams
    assert streams == {name: pipe.StreamSettings(name, (URL,), title=name)}


@pytest.mark.parametrize("value", ["0123", "on", "1e3", "0x1F", "2020-01-01", "1_000", "12:30"])
def test_text_is_read_as_written(value: str) -> None:
    assert read(server(f"token: {value}")).server.token == value
    assert read_stream(f"title: {value}").title == value
    assert read_stream(f"headers: {{X: {value}}}").headers == {"X": value}


@pytest.mark.parametrize("value", ["0123", "on", "2020-01-01", "1_000"])
def test_text_in_a_map_of_streamlink_is_read_as_written(value: str) -> None:
    maps = ("http-headers", "http-cookies", "http-query-params")
    found = read(engine(", ".join(f"{option}: {{X: {value}}}" for option in maps)))
    assert found.options.streamlink == {option: {"X": value} for option in maps}


@pytest.mark.parametrize("value", ["0123", "127.0.0.1", "on"])
def test_text_for_streamlink_is_read_as_written(value: str) -> None:
    assert read(engine(f"ffmpeg-fout: {value}")).options.streamlink == {"ffmpeg-fout": value}


def test_number_with_leading_zeros_is_decimal() -> None:
    assert read(server("port: 0080")).server.port == 80
    assert read(server("port: '81'")).server.port == 81


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ipv4: true", True),
        ("hls-live-edge: 2", 2),
        ("stream-timeout: 5", 5),
        ("stream-timeout: 0.5", 0.5),
        ("hls-audio-select: [en, de]", ("en", "de")),
        ("http-cookies: {a: b}", {"a": "b"}),
        ("http-proxy: http://p.example", "http://p.example"),
    ],
)
def test_streamlink_value_has_the_type_of_its_option(text: str, value: object) -> None:
    assert list(read(engine(text)).options.streamlink.values()) == [value]


ENGINE_BOUNDS: list[tuple[str, str, list[str], list[str]]] = [  # good and bad values
    ("ringbuffer-size", "a whole number from 262144 to ", ["262144"], ["0", "-1", "1e6", "16M"]),
    ("stream-segment-threads", "a whole number from 1 to 64", ["1", "64"], ["0", "-1", "65"]),
    ("stream-segment-attempts", "a whole number, 0 or more", ["1", "9"], ["-1", "1.5"]),
    ("stream-segment-timeout", "a number from 0.1 to 3600", ["0.1"], ["0", "-1", "nan", "1e9"]),
    ("stream-segmented-duration", "a number, 0 or more", ["0", "9.5"], ["-1", "inf", "1e999"]),
    ("stream-segmented-queue-deadline", "a number, 0 or more", ["0", "2.5"], ["-1", "nan"]),
    ("stream-timeout", "a number from 0.1 to 3600", ["0.1"], ["0", "-5", "1e9"]),
    ("http-timeout", "a number from 0.1 to 3600", ["0.1"], ["0", "-5", "1e9"]),
    ("ffmpeg-validation-timeout", "a number, 0 or more", ["4"], ["-5", "nan"]),
    ("hls-live-edge", "a whole number, 1 or more", ["1"], ["0", "-1", "2.5"]),
    ("hls-start-offset", "a number from -604800 to 604800", ["-30", "1.5"], ["nan", "1e9"]),
    ("hls-playlist-reload-attempts", "a whole number, 0 or more", ["0"], ["-1"]),
    ("dash-manifest-reload-attempts", "a whole number, 0 or more", ["0"], ["-1"]),
    ("http-proxy", "an address that starts with http:// or socks5h://",
     ["http://p:1", "socks5h://p:1"], ["p:1", "ftp://p", "''"]),
    ("locale", "a language and a country", ["en_US", "de_AT"], ["xx_YY_zz", "xx_YY", "de", "''"]),
    ("ffmpeg-loglevel", "a log level of ffmpeg", ["error", "quiet"], ["loud", "''"]),
    ("hls-playlist-reload-time", "segment, live-edge, default or a number",
     ["segment", "live-edge", "default", "2", "2.5"], ["often", "-1", "''", "0", "1", "1.9"]),
]  # fmt: skip


def test_every_option_with_bounds_exists() -> None:
    assert {option for option, *_ in ENGINE_BOUNDS} <= set(ENGINE)
    assert {name for name in pipe.ENGINE_PARSERS if isinstance(name, str)} <= set(ENGINE)


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, _, good, _ in ENGINE_BOUNDS for value in good]
)
def test_value_that_streamlink_accepts_is_read(option: str, value: str) -> None:
    found = read(engine(f"{option}: {value}")).options.streamlink
    assert str(found[option]).removesuffix(".0") == value
    Streamlink().set_option(option, found[option])


@pytest.mark.parametrize(
    ("option", "expected", "value"),
    [(option, message, value) for option, message, _, bad in ENGINE_BOUNDS for value in bad],
)
def test_value_that_streamlink_would_refuse_is_a_mistake(
    option: str, expected: str, value: str
) -> None:
    (mistake,) = mistakes(engine(f"{option}: {value}"))
    assert mistake.startswith(f"test.yml:1: options.streamlink.{option}: expected {expected}")


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces have other names there")
@pytest.mark.parametrize(
    "value", ["lo", "if!lo", "127.0.0.1", "host!127.0.0.5", "ifhost!lo!127.0.0.1"]
)
def test_interface_of_this_machine_is_accepted(value: str) -> None:
    found = read(engine(f"interface: {value}")).options.streamlink
    assert found == {"interface": value}
    Streamlink().set_option("interface", value)


@pytest.mark.skipif(sys.platform == "win32", reason="streamlink takes only addresses there")
@pytest.mark.parametrize("value", ["eth0.100", "if!eth0.100"])
def test_interface_whose_name_has_a_dot_is_accepted(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLANs have such names.  A fake look-up: a test must not add an interface to its machine."""
    asked: list[str] = []
    monkeypatch.setattr("socket.if_nametoindex", asked.append)
    assert read(engine(f"interface: {value}")).options.streamlink == {"interface": value}
    assert asked == ["eth0.100"]


@pytest.mark.parametrize(
    "value",
    ["nope0", "if!nope0", "192.0.2.7", "host!192.0.2.7", "2001:db8::7", "ifhost!nope0!127.0.0.1"],
)
def test_interface_that_this_machine_lacks_is_a_mistake(value: str) -> None:
    (mistake,) = mistakes(engine(f"interface: '{value}'"))
    message = "expected an interface or address of this machine"
    assert mistake == f"test.yml:1: options.streamlink.interface: {message}"


def test_cookie_file_is_accepted_if_it_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "cookies.txt"
    head = "# Netscape HTTP Cookie File\n"
    file.write_text(f"{head}.h.example\tTRUE\t/\tFALSE\t0\tname\tvalue\n", encoding="utf-8")
    found = read(engine(f"http-cookies-files: ['{file}']")).options.streamlink
    assert found == {"http-cookies-files": (str(file),)}
    Streamlink().set_option("http-cookies-files", found["http-cookies-files"])


@pytest.mark.filterwarnings("error")  # a warning would be logged with a traceback
@pytest.mark.parametrize(
    "content", [None, b"", b"a=b", b"# Netscape HTTP Cookie File\nx\n", b"\xff"]
)
def test_cookie_file_that_cannot_be_loaded_is_a_mistake(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "cookies.txt"
    if content is not None:
        file.write_bytes(content)
    path = "options.streamlink.http-cookies-files"
    expected = f"{path}: expected a readable cookies.txt file in Netscape format"
    text = engine(f"http-cookies-files:\n  ['{file}']")
    assert mistakes(text) == [f"test.yml:2: {expected}"]


@pytest.mark.parametrize("value", ["[~nobody-of-this-name/x]", "['']", "[.]", '["\\0"]'])
def test_odd_path_of_a_cookie_file_is_a_mistake(value: str) -> None:
    (mistake,) = mistakes(engine(f"http-cookies-files: {value}"))
    assert mistake.startswith("test.yml:1: options.streamlink.http-cookies-files: expected ")


def test_missing_certificate_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "me.pem"
    text = engine(f"http-ssl-cert: '{file}'")
    assert mistakes(text) == ["test.yml:1: options.streamlink.http-ssl-cert: there is no such file"]
    file.touch()
    assert read(text).options.streamlink == {"http-ssl-cert": str(file)}


#### Features of YAML ####


def test_own_key_overrides_a_merged_one() -> None:
    config = read(f"""
        streams:
          a: &shared {{url: "{URL}", title: A, group: News, threads: 2}}
          b: {{<<: *shared, title: B}}
    """)
    a, b = config.streams.values()
    assert (a.title, b.title) == ("A", "B")
    assert b.urls == (URL,)
    assert (b.group, b.options.threads) == ("News", 2)


def test_alias_stands_for_a_whole_stream() -> None:
    config = read(f"streams:\n  a: &a {{url: '{URL}', group: G}}\n  b: *a\n")
    assert config.streams["b"] == pipe.StreamSettings("b", (URL,), title="b", group="G")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("&a [*a]", id="document"),
        pytest.param("streams: &s {a: *s}", id="streams"),
        pytest.param("streams: {a: &a {url: [*a]}}", id="address"),
        pytest.param("streams: &s {<<: *s, a: hls://u}", id="merge"),
        pytest.param("streams: {a: &a {url: hls://u, headers: {X: *a}}}", id="header"),
        pytest.param("server: {trusted: &t [*t]}", id="networks"),
        pytest.param("options: {streamlink: &x {http-headers: *x}}", id="map of streamlink"),
        pytest.param("options: {streamlink: {hls-audio-select: &x [*x]}}", id="list of streamlink"),
    ],
)
def test_alias_inside_itself_is_a_mistake(text: str) -> None:
    assert mistakes(text)


@pytest.mark.parametrize("merge", ["x", "[x]", "[[x]]", ""])
def test_merge_of_a_value_other_than_a_section_is_a_mistake(merge: str) -> None:
    (mistake,) = mistakes(f"streams:\n  a: {{<<: {merge}, url: hls://u}}\n")
    assert mistake.startswith("test.yml:2: ")


def test_merged_section_may_merge_another() -> None:
    config = read("""
        streams:
          a: &a {url: hls://u, title: A}
          b: &b {<<: *a, title: B, group: B}
          c: {<<: *b, quality: 720p}
    """)
    expected = pipe.StreamSettings("c", ("hls://u",), title="B", group="B", quality="720p")
    assert config.streams["c"] == expected


def test_several_merged_sections_are_a_mistake() -> None:
    text = "streams:\n  a: &a {url: hls://u}\n  c: {<<: [*a, *a]}\n"
    expected = 'streams.c.<<: expected "key: value" lines, got a list'
    assert f"test.yml:3: {expected}" in mistakes(text)


def test_merge_does_not_hide_a_duplicate_key() -> None:
    text = "streams:\n  a: &a {url: hls://u}\n  b: {<<: *a, title: x, title: y}\n"
    assert mistakes(text) == ["test.yml:3: streams.b.title: duplicate key"]


def test_key_other_than_text_beside_a_merge_is_a_mistake() -> None:
    text = "streams:\n  a: &a {url: hls://u}\n  b: {<<: *a, [x]: y}\n"
    assert mistakes(text) == ["test.yml:3: streams.b.(a key): unknown key"]


#### Environment variables ####


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables; None removes one."""

    def change(**values: str | None) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return change


Environment = Callable[..., None]


def test_environment_variables_work_in_any_value(environment: Environment) -> None:
    environment(TV_TOKEN="s3cret", _p1="81", HOST="h.example", EMPTY="", PROXY="10.0.0.2")
    config = read("""
        server:
          token: ${TV_TOKEN}
          port: ${_p1}
          name: "TV${EMPTY} of ${HOST}"
          proxies: ["${PROXY}", 10.0.0.3]
        streams:
          a: https://${HOST}/x?token=${TV_TOKEN}
          b: {url: hls://u, headers: {X: "Bearer ${TV_TOKEN}"}, linger: "${_p1}"}
        playlists:
          p: http://${HOST}/get.php?password=${TV_TOKEN}
        options:
          streamlink: {http-cookies: {X: "${TV_TOKEN}"}}
    """)
    assert (config.server.token, config.server.port) == ("s3cret", 81)
    assert config.server.name == "TV of h.example"
    assert config.server.proxies == ("10.0.0.2", "10.0.0.3")
    assert config.streams["a"].urls == ("https://h.example/x?token=s3cret",)
    assert config.streams["b"].headers == {"X": "Bearer s3cret"}
    assert config.streams["b"].options.linger == 81.0
    assert config.playlists["p"].url == "http://h.example/get.php?password=s3cret"
    assert config.options.streamlink == {"http-cookies": {"X": "s3cret"}}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("$${A}", "${A}"),
        ("a$${b}c$${", "a${b}c${"),
        ("$A $ $$ {A}", "$A $ $$ {A}"),
        ("$$${A}", "$${A}"),
        ("${B}", "${A}"),
    ],
)
def test_dollar_sign_without_a_variable_is_kept(
    written: str, text: str, environment: Environment
) -> None:
    """The value of a variable is not expanded again."""
    environment(A="a", B="${A}")
    assert read(server(f"name: '{written}'")).server.name == text


def test_variable_in_a_key_is_not_expanded(environment: Environment) -> None:
    environment(A="a")
    (mistake,) = mistakes("streams: {'${A}': hls://u}")
    assert mistake.endswith(NAME_RULE)


@pytest.mark.parametrize("text", ["${TV_TOKEN}", "https://${TV_TOKEN}/x"])
def test_unset_environment_variable_is_a_mistake(text: str, environment: Environment) -> None:
    environment(TV_TOKEN=None)
    expected = "the environment variable TV_TOKEN is not set"
    assert mistakes(f"streams: {{a: '{text}'}}") == [f"test.yml:1: streams.a: {expected}"]


def test_empty_environment_variable_for_a_token_is_a_mistake(environment: Environment) -> None:
    """An empty token would allow all clients."""
    environment(TV_TOKEN="")
    expected = "test.yml:1: server.token: the value is empty: fill it in, or remove the key"
    assert mistakes(server("token: '${TV_TOKEN}'")) == [expected]


@pytest.mark.parametrize("value", ["s3cret\n", "a\tb", "\udcff"])
def test_environment_variable_with_odd_characters_is_a_mistake(
    value: str, environment: Environment
) -> None:
    environment(TV_TOKEN=value)
    expected = "the environment variable TV_TOKEN contains a character that cannot be printed"
    assert mistakes(server("token: '${TV_TOKEN}'")) == [f"test.yml:1: server.token: {expected}"]


@pytest.mark.parametrize("value", ["${", "${}", "${1}", "${A:-b}", "${A b}", "${A", "a ${ä}"])
def test_invalid_name_of_a_variable_is_a_mistake(value: str) -> None:
    expected = "expected the name of an environment variable, like ${NAME}; write $${ for ${"
    assert mistakes(server(f"token: '{value}'")) == [f"test.yml:1: server.token: {expected}"]


@pytest.mark.parametrize("value", ["hunter2", "0123", "1e3", "", "x" * 30])
def test_value_of_an_environment_variable_is_never_shown(
    value: str, environment: Environment
) -> None:
    environment(TV_TOKEN=value)
    expected = "test.yml:1: server.port: expected a whole number from 0 to 65535"
    (mistake,) = mistakes(server("port: '9${TV_TOKEN}e'"))
    assert mistake.removesuffix(', got "9${TV_TOKEN}e"') == expected
    text = "options: {timeout: '${TV_TOKEN}x', streamlink: {ipv4: '${TV_TOKEN}'}}"
    assert all(value not in found or not value for found in mistakes(text))


@pytest.mark.parametrize(
    "text", ["server: {token: ${A}}", "server: {trusted: [${A}, b]}", stream("title: x${A}")]
)
def test_variable_that_needs_quotes_is_a_mistake(text: str) -> None:
    expected = "test.yml:1: invalid YAML: put quotes around a value with ${ inside brackets"
    assert mistakes(text) == [expected]


#### Mistakes ####


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("sever: {}", "sever: unknown key: did you mean server?"),
        ("x: 1", "x: unknown key"),
        (f"stream: {{a: '{URL}'}}", "stream: unknown key: did you mean streams?"),
        (f"news: '{URL}'", "news: unknown key; if it is a stream, put it under streams:"),
        ("server: {prt: 1}", "server.prt: unknown key: did you mean port?"),
        ("options: {thread: 1}", "options.thread: unknown key: did you mean threads?"),
        (stream("qualty: x"), "streams.a.qualty: unknown key: did you mean quality?"),
        (
            "options: {streamlink: {hls-liv-edge: 2}}",
            "options.streamlink.hls-liv-edge: unknown key: "
            "did you mean hls-live-edge?",
        ),
    ],
)  # fmt: skip
def test_unknown_key_is_reported_with_the_nearest_valid_one(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"test.yml:1: {mistake}"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("token: x", "token: belongs under server:"),
        (f"epg: '{URL}'", "epg: belongs under server:"),
        ("max_viewers: 5", "max_viewers: belongs under server:"),
        ("threads: 8", "threads: belongs under options:"),
        ("linger: 5", "linger: belongs under options:"),
        ("server: {threads: 8}", "server.threads: belongs under options:"),
        ("options: {port: 80}", "options.port: belongs under server:"),
        (stream("host: x"), "streams.a.host: belongs under server:"),
        (stream("token: x"), "streams.a.token: belongs under server:"),
        (
            "quality: best",
            'quality: belongs under a stream: news: {url: "...", quality: ...}',
        ),
        (f"url: '{URL}'", 'url: belongs under a stream: news: {url: "..."}'),
        (
            "options: {refresh: 5}",
            'options.refresh: belongs under a list: provider: {url: "...", refresh: ...}',
        ),
        ("hls-live-edge: 2", "hls-live-edge: belongs under streamlink: in options:"),
        ("options: {hls-live-edge: 2}", "options.hls-live-edge: belongs under streamlink:"),
        (stream("hls-live-edge: 2"), "streams.a.hls-live-edge: belongs under streamlink:"),
        (engine("threads: 2"), "options.streamlink.threads: belongs beside streamlink:"),
        (stream("groups: [x]"), "streams.a.groups: unknown key: did you mean group?"),
        (stream("name: x"), "streams.a.name: unknown key: did you mean title?"),
        (f"playlists: {{p: {{url: '{URL}', name: x}}}}", "playlists.p.name: unknown key"),
    ],
)
def test_misplaced_key_is_reported_with_its_place(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"test.yml:1: {mistake}"]


BESIDE = "this is an option: write it below the {}'s name, beside url:"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("playlists: {max_upstreams: 2}", f"playlists.max_upstreams: {BESIDE.format('list')}"),
        ("playlists: {groups: [UK]}", f"playlists.groups: {BESIDE.format('list')}"),
        ("playlists: {refresh: 60}", f"playlists.refresh: {BESIDE.format('list')}"),
        ("playlists: {threads: 2}", f"playlists.threads: {BESIDE.format('list')}"),
        ("playlists: {port: 80}", "playlists.port: this is an option: it belongs under server:"),
        ("streams: {quality: best}", f"streams.quality: {BESIDE.format('stream')}"),
        ("streams: {hide: true}", f"streams.hide: {BESIDE.format('stream')}"),
        ("streams: {user_agent: a/1.0}", f"streams.user_agent: {BESIDE.format('stream')}"),
        ("streams: {token: x}", "streams.token: this is an option: it belongs under server:"),
    ],
)
def test_option_in_place_of_an_entry_is_reported(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"test.yml:1: {mistake}"]


def test_entry_may_be_called_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESS", URL)
    text = (
        "playlists: {films: FILMS.M3U, groups: {url: http://panel.example/}}\n"
        f"streams: {{quality: '{URL}', title: ['{URL}'], group: '${{ADDRESS}}', "
        f"films: {{url: '{URL}'}}}}"
    )
    config = read(text)
    assert list(config.playlists) == ["films", "groups"]
    assert list(config.streams) == ["quality", "title", "group", "films"]


NUMBER_BOUNDS = [
    (server, "port", "a whole number from 0 to 65535", ["-1", "65536", "80.5", "http", "nan"]),
    (server, "max_viewers", "a whole number, 0 or more", ["-1", "1.5", "many"]),
    (server, "max_upstreams", "a whole number, 0 or more", ["-1", "1.5", "many"]),
    (options, "threads", "a whole number from 1 to 64", ["0", "65", "2.5", "two"]),
    (options, "timeout", "a number from 0.1 to 3600", ["0", "3601", "nan", "inf", "long"]),
    (options, "buffer_size", "a whole number from 1 to 67108864", ["0", "67108865", "8K"]),
    (options, "ringbuffer_size", "a whole number from 262144 to 4294967296", ["262143", "16M"]),
    (options, "linger", "a number from 0 to 86400", ["-0.1", "86401", "nan"]),
    (options, "reconnect", "a number from 0 to 86400", ["-0.1", "86401", "nan"]),
    (options, "viewer_timeout", "a number from 0.1 to 86400", ["0", "86401", "nan"]),
    (stream, "number", "a whole number, 1 or more", ["0", "-1", "1.5", "one"]),
]


@pytest.mark.parametrize(
    ("section", "key", "expected", "value"),
    [
        pytest.param(section, key, expected, value, id=f"{key}: {value}")
        for section, key, expected, values in NUMBER_BOUNDS
        for value in values
    ],
)
def test_number_of_another_type_or_out_of_range_is_a_mistake(
    section: Any, key: str, expected: str, value: str
) -> None:
    where = {server: "server", options: "options", stream: "streams.a"}[section]
    text = section(f"{key}: {value}")
    assert mistakes(text) == [f'test.yml:1: {where}.{key}: expected {expected}, got "{value}"']


@pytest.mark.parametrize(
    "text",
    [
        server("port: 0"),
        server("port: 65535"),
        options("threads: 64"),
        options("timeout: 0.1"),
        options("ringbuffer_size: 262144"),
        options("linger: 86400"),
        stream("number: 1"),
    ],
)
def test_value_at_a_bound_is_valid(text: str) -> None:
    read(text)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (server("token: [x]"), "server.token: expected a single value, got a list"),
        (server("name: {x: y}"), "server.name: expected a single value, got a section"),
        (stream("title: {}"), "streams.a.title: expected a single value, got a section"),
        (stream("headers: {X: [y]}"), "streams.a.headers.X: expected a single value, got a list"),
        ("hello", 'expected "key: value" lines'),
        ("[]", 'expected "key: value" lines'),
        ("server: [x]", 'server: expected "key: value" lines'),
        ("streams: u", 'streams: expected "key: value" lines'),
        (server("trusted: 10.0.0.0/8"), "server.trusted: expected a list like [a, b], got text"),
        (server("trusted: [lan]"), "server.trusted: expected a network like 192.168.0.0/16"),
        (server("proxies: [lan]"), "server.proxies: expected a network like 192.168.0.0/16"),
        (server("trusted: [10.1.1.1/8]"), "server.trusted: expected a network like "),
        (server("trusted: [[x]]"), "server.trusted: expected a single value, got a list"),
        (server("trusted: [~]"), "server.trusted: expected a network like 192.168.0.0/16"),
        (engine("hls-live-edge: two"), "options.streamlink.hls-live-edge: expected a whole number"),
        (
            engine("hls-live-edge: true"),
            "options.streamlink.hls-live-edge: expected a whole number",
        ),
        (engine("stream-timeout: soon"), "options.streamlink.stream-timeout: expected a number"),
        (engine("ipv4: 1"), "options.streamlink.ipv4: expected true or false"),
        (engine("hls-audio-select: en"), "options.streamlink.hls-audio-select: expected a list"),
        (engine("locale: {}"), "options.streamlink.locale: expected a single value"),
        (engine("http-proxy: [u]"), "options.streamlink.http-proxy: expected a single value"),
        (engine("http-cookies: u"), 'options.streamlink.http-cookies: expected "key: value" lines'),
    ],
)
def test_value_of_another_type_is_a_mistake(text: str, start: str) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(f"test.yml:1: {start}")


@pytest.mark.parametrize("value", ["[]", "''", "x", "[hls-live-edge]"])
def test_streamlink_options_must_be_a_map(value: str) -> None:
    (mistake,) = mistakes(options(f"streamlink: {value}"))
    assert mistake.startswith('test.yml:1: options.streamlink: expected "key: value" lines')


TAG = (
    "a YAML tag, which is not supported: put quotes around a text that begins with !, "
    "or write ${NAME} for an environment variable"
)


@pytest.mark.parametrize(
    "value", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!null 2", "!!int 2", "! 2"]
)
def test_standard_yaml_tag_is_a_mistake(value: str) -> None:
    path = "options.streamlink.hls-live-edge"
    expected = [f"test.yml:1: {path}: expected a single value, got {TAG}"]
    assert mistakes(engine(f"hls-live-edge: {value}")) == expected


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("server:\n  token: !secret tv", "server.token: expected a single value, got"),
        ("server:\n  token: !hunter2", "server.token: expected a single value, got"),
        ("server:\n  name: &x !env_var tv", "server.name: expected a single value, got"),
        ("server:\n  port: !secret port", "server.port: expected a single value, got"),
        ("server:\n  trusted: !secret lan", "server.trusted: expected a list like [a, b], got"),
        ("server:\n  trusted: [!secret lan]", "server.trusted: expected a single value, got"),
        ("streams:\n  a: !secret url", "streams.a: expected a single value, got"),
        ("streams:\n  a: {url: !secret url}", "streams.a.url: expected a single value, got"),
        ("streams:\n  a: [hls://u, !secret url]", "streams.a: expected a single value, got"),
        ("playlists:\n  p: !secret url", "playlists.p: expected a single value, got"),
        ("playlists:\n  p: {url: !secret url}", "playlists.p.url: expected a single value, got"),
        ("streams:\n  !include a.yml", 'streams: expected "key: value" lines, got'),
        ("options:\n  streamlink: !x {}", 'options.streamlink: expected "key: value" lines, got'),
    ],
)
def test_tag_is_one_mistake_with_the_remedy(text: str, mistake: str) -> None:
    assert [re.sub(r"^test.yml:[12]: ", "", found) for found in mistakes(text)] == [
        f"{mistake} {TAG}"
    ]


def test_tag_is_a_mistake_at_each_alias_of_its_value() -> None:
    text = "server:\n  token: &x !secret tv\n  name: *x\n"
    assert [mistake.split(": ")[1] for mistake in mistakes(text)] == ["server.token", "server.name"]


@pytest.mark.parametrize("value", ["!a!b", "!pa%zz", "!<x"])
def test_text_that_begins_like_a_tag_needs_quotes(value: str) -> None:
    expected = "test.yml:2: invalid YAML: put quotes around a text that begins with !"
    assert mistakes(f"server:\n  token: {value}\n") == [expected]


CURLY = 'use straight quotes (") instead of curly quotes'


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("server:\n  token: “hunter2”", "server.token"),
        ("server:\n  token: \u2018hunter2\u2019", "server.token"),
        ("server:\n  token: „hunter2“", "server.token"),
        ("server:\n  token: ”hunter2” # mine", "server.token"),
        ("server:\n  token: “hunter2 # cut off”", "server.token"),
        ("server:\n  port: “80”", "server.port"),
        ("streams:\n  a: “https://e.example/x”", "streams.a"),
        ("streams:\n  a: {url: [hls://u, \u2018hls://u\u2019]}", "streams.a.url"),
        ("streams:\n  a: {url: hls://u, quality: “720p, best”}", "streams.a.quality"),
        ("streams:\n  a: {url: hls://u, headers: {X: “y”}}", "streams.a.headers.X"),
    ],
)
def test_curly_quotes_are_a_mistake(text: str, path: str) -> None:
    assert f"test.yml:2: {path}: {CURLY}" in mistakes(text)
    assert "hunter2" not in "".join(mistakes(text))


def test_colon_in_curly_quotes_is_a_mistake_about_the_quotes() -> None:
    text = "streams:\n  a:\n    url: hls://u\n    title: “News: today”\n"
    assert mistakes(text) == [f"test.yml:4: invalid YAML: {CURLY}"]


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("“Best of” TV", "“Best of” TV"),
        ('"“Best of”"', "“Best of”"),
        ("\u2019t Journaal", "\u2019t Journaal"),
        ("Kids\u2019", "Kids\u2019"),
    ],
)
def test_curly_quotes_within_a_text_are_part_of_it(written: str, title: str) -> None:
    assert read_stream(f"title: {written}").title == title


@pytest.mark.parametrize(
    ("keys", "schemes"),
    [
        ("logo: e.example/1.png", "http:// or https://"),
        ("logo: ftp://e.example/1.png", "http:// or https://"),
        ("proxy: 127.0.0.1:1080", "http:// or socks5h://"),
        ("proxy: socks5h://", "http:// or socks5h://"),
    ],
)
def test_address_without_a_usable_scheme_or_host_is_a_mistake(keys: str, schemes: str) -> None:
    key = keys.partition(":")[0]
    expected = f"test.yml:1: streams.a.{key}: expected an address that starts with {schemes}"
    assert mistakes(stream(keys)) == [expected]


@pytest.mark.parametrize("key", ["public_url", "epg"])
@pytest.mark.parametrize("value", ["tv.example", "ftp://tv.example", "http://", "'http://[x'"])
def test_invalid_address_of_the_server_is_a_mistake(key: str, value: str) -> None:
    expected = f"server.{key}: expected an address that starts with http:// or https://"
    assert mistakes(server(f"{key}: {value}")) == [f"test.yml:1: {expected}"]


NO_PORT = "the address has an invalid port: expected a number from 1 to 65535"


@pytest.mark.parametrize("port", ["188100", "65536", "0", "port", "80a"])
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("streams: {{a: 'http://h.example:{}/x'}}", "streams.a"),
        ("streams: {{a: ['hls://u', 'hls://https://u:p@h.example:{}/x y=z']}}", "streams.a"),
        ("streams: {{a: 'http://[::1]:{}/x'}}", "streams.a"),
        ("streams: {{a: {{url: 'hls://u', proxy: 'socks5h://h.example:{}'}}}}", "streams.a.proxy"),
        ("streams: {{a: {{url: 'hls://u', logo: 'http://h.example:{}/x'}}}}", "streams.a.logo"),
        ("playlists: {{p: 'http://h.example:{}/get.php?x=y'}}", "playlists.p"),
        ("server: {{public_url: 'http://tv.example:{}'}}", "server.public_url"),
        ("server: {{epg: 'http://tv.example:{}/x.xml'}}", "server.epg"),
        (
            "options: {{streamlink: {{http-proxy: 'http://h.example:{}'}}}}",
            "options.streamlink.http-proxy",
        ),
    ],
    ids=lambda value: value if "{" not in value else "",
)
def test_invalid_port_of_an_address_is_a_mistake(text: str, path: str, port: str) -> None:
    assert mistakes(text.format(port)) == [f"test.yml:1: {path}: {NO_PORT}"]


@pytest.mark.parametrize(
    "address",
    [
        *("http://h.example:/x", "http://h.example:65535/x:188100", "http://[::1]/x"),
        *("http://u:188100@h.example/x", "http://h.example/?x=http://h:188100", "udp://@:1234"),
    ],
)
def test_address_with_a_valid_port_or_without_a_port_is_read(address: str) -> None:
    assert read(f"streams: {{a: '{address}'}}").streams["a"].urls == (address,)


@pytest.mark.parametrize("host", ["192.168.1.2:8080", "localhost:188100", ":8080"])
def test_port_in_the_host_is_a_mistake(host: str) -> None:
    expected = "test.yml:1: server.host: write the port under port:, not after the host"
    assert mistakes(server(f"host: '{host}'")) == [expected]


NAME_RULE = (
    "a stream name may only contain a-z, 0-9 and -, e.g. channel-1; "
    "use title: for the name that people see"
)


@pytest.mark.parametrize("name", ["A", "a_b", "a b", "ä", "a.m3u", ".."])
def test_invalid_name_is_a_mistake(name: str) -> None:
    expected = f"test.yml:2: streams.{name}: {NAME_RULE}"
    assert mistakes(f"streams:\n  '{name}': hls://u\n") == [expected]


@pytest.mark.parametrize("name", ["", "a/b", "%61", "a\\nb", "a" * 100 + "/", "日本"])
def test_mistake_about_an_odd_name_states_the_rule(name: str) -> None:
    (mistake,) = mistakes(f'streams:\n  "{name}": hls://u\n')
    assert mistake.startswith("test.yml:2: streams.")
    assert mistake.endswith(f": {NAME_RULE}")


@pytest.mark.parametrize("name", ["health", "status", "metrics", "playlist"])
def test_reserved_name_is_a_mistake(name: str) -> None:
    expected = f"test.yml:1: streams.{name}: this name is reserved: choose another"
    assert mistakes(f"streams: {{{name}: hls://u}}") == [expected]


@pytest.mark.parametrize("names", [("a", "a"), ("007", "'007'")])
def test_duplicate_name_is_a_mistake(names: tuple[str, str]) -> None:
    text = "streams:\n  {}: hls://u\n  {}: hls://v\n".format(*names)
    assert mistakes(text) == [f"test.yml:3: streams.{names[0]}: duplicate key"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("server: {}\nserver: {}\n", "server"),
        ("server: {port: 1,\n  port: 2}", "server.port"),
        ("streams: {a: {url: hls://u,\n  url: hls://v}}", "streams.a.url"),
        ("options: {streamlink: {ipv4: true,\n  ipv4: false}}", "options.streamlink.ipv4"),
    ],
)
def test_duplicate_key_is_a_mistake(text: str, path: str) -> None:
    assert mistakes(text) == [f"test.yml:2: {path}: duplicate key"]


def test_number_of_another_stream_is_a_mistake() -> None:
    text = """\
streams:
  a:
    url: hls://u
    number: 7
  b:
    url: hls://u
    number: 07
"""
    assert mistakes(text) == ["test.yml:7: streams.b.number: 7 is already used by a"]


def test_number_of_a_stream_with_a_long_name_is_a_mistake() -> None:
    a, b = 60 * "a", 60 * "b"
    text = f"streams: {{{a}: {{url: hls://u, number: 1}}, {b}: {{url: hls://u, number: 1}}}}"
    assert mistakes(text) == [f"test.yml:1: streams.{b}.number: 1 is already used by {a}"]


@pytest.mark.parametrize(
    ("value", "mistake"),
    [
        pytest.param("", "streams.a: the address is missing", id="nothing"),
        pytest.param("''", "streams.a: the address is missing", id="empty text"),
        pytest.param("~", "streams.a: the address is missing", id="null"),
        pytest.param("{}", "streams.a: url is missing", id="empty map"),
        pytest.param("{title: T}", "streams.a: url is missing", id="no url"),
        pytest.param("{url: }", "streams.a.url: the address is missing", id="null url"),
        pytest.param("{url: []}", "streams.a.url: the list of addresses is empty", id="empty list"),
        pytest.param(
            "{url: [hls://u, '']}", "streams.a.url: the address is missing", id="empty item"
        ),
        pytest.param("[]", "streams.a: the list of addresses is empty", id="bare empty list"),
    ],
)
def test_missing_address_is_one_mistake(value: str, mistake: str) -> None:
    assert mistakes(f"streams:\n  a: {value}\n") == [f"test.yml:2: {mistake}"]


@pytest.mark.parametrize("value", ["{x: y}", "[{x: y}]", "[[u]]"])
def test_address_of_another_type_is_one_mistake(value: str) -> None:
    (mistake,) = mistakes(f"streams: {{a: {{url: {value}}}}}")
    assert mistake.startswith("test.yml:1: streams.a.url: expected ")


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "hls://file:///etc/passwd",
        "httpstream://file://x",
        "file:/etc/passwd",
        "/home/me/a.m3u8",
        "./a.m3u8",
        "../a.m3u8",
        "~/a.m3u8",
        "~me/a.m3u8",
        "C:\\a.m3u8",
        "c:/a.m3u8",
        "\\\\nas\\a.m3u8",
        "httpstream:///home/me/a.ts",
        "hls://C:/a.m3u8",
    ],
)
def test_local_file_is_refused(address: str) -> None:
    expected = "local files are never opened: use an http:// or https:// address"
    text = f"streams: {{a: {{url: ['{address}']}}}}"
    assert mistakes(text) == [f"test.yml:1: streams.a.url: {expected}"]


@pytest.mark.parametrize(
    "address",
    [
        *("example.com/a.m3u8", "www.example.com", "example.com:8080/a", "//example.com/a.m3u8"),
        *("localhost", "192.0.2.1/a", "a.m3u8", "user:word@example.com/a", "twitch.tv/x"),
    ],
)
def test_address_without_a_scheme_is_refused(address: str) -> None:
    expected = "test.yml:1: streams.a: begin the address with http:// or https://"
    assert mistakes(f"streams: {{a: '{address}'}}") == [expected]


@pytest.mark.parametrize("address", ["http://", "hls://", "hls://https://"])
def test_scheme_alone_is_a_missing_address(address: str) -> None:
    assert mistakes(f"streams: {{a: '{address}'}}") == [
        "test.yml:1: streams.a: the address is missing"
    ]


@pytest.mark.parametrize(
    "address",
    [
        *("hls://example.com/x", "hls://https://example.com/x", "httpstream://example.com/x"),
        *("dash://http://example.com/x.mpd", "hlsvariant://example.com/x name_key=bitrate"),
        *("https://www.twitch.tv/x", "HTTP://[::1]:80/~x/./a", "http://h/http://file:///x"),
    ],
)
def test_address_with_a_scheme_or_prefix_is_accepted(address: str) -> None:
    assert read(f"streams: {{a: '{address}'}}").streams["a"].urls == (address,)


def test_control_character_in_an_address_is_a_mistake() -> None:
    expected = ["test.yml:1: streams.a: the address contains a control character"]
    assert mistakes('streams: {a: "http://h/\\nx"}') == expected


@pytest.mark.parametrize("name", ["Bad Name", "", "X:", "Größe", "a\\nb"])
def test_invalid_name_of_a_header_is_a_mistake(name: str) -> None:
    (mistake,) = mistakes(stream(f'headers: {{"{name}": x}}'))
    assert mistake.startswith("test.yml:1: streams.a.headers")
    assert mistake.endswith(": this is not a valid header name")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (stream("headers: {X: 日本}"), "streams.a.headers.X"),
        (stream('headers: {X: "a\\r\\nb"}'), "streams.a.headers.X"),
        (stream('headers: {X: " a"}'), "streams.a.headers.X"),
        (engine("http-headers: {X: 日本}"), "options.streamlink.http-headers.X"),
        (options("user_agent: 日本"), "options.user_agent"),
        (options('user_agent: "a\\nb"'), "options.user_agent"),
    ],
)
def test_header_that_cannot_be_sent_is_a_mistake(text: str, path: str) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(f"test.yml:1: {path}: ")


@pytest.mark.parametrize("option", sorted(pipe.SAFETY_OPTIONS))
@pytest.mark.parametrize("section", ["options", "streams.a"])
def test_safety_option_is_refused(option: str, section: str) -> None:
    write = {"options": options, "streams.a": stream}[section]
    (mistake,) = mistakes(write(f"streamlink: {{{option}: true}}"))
    assert mistake.startswith(f"test.yml:1: {section}.streamlink.{option}: StreamPipe sets this ")


@pytest.mark.parametrize("option", ["ipv4", "ipv6"])
def test_ip_version_is_refused_in_a_stream(option: str) -> None:
    expected = "this affects the whole process: set it under options.streamlink"
    path = f"streams.a.streamlink.{option}"
    assert mistakes(stream(f"streamlink: {{{option}: true}}")) == [
        f"test.yml:1: {path}: {expected}"
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("server:\nstreams: {}\n", "server"),
        ("streams:\n", "streams"),
        ("options:\n", "options"),
        ("options: {streamlink: }", "options.streamlink"),
        (stream("headers: "), "streams.a.headers"),
    ],
)
def test_empty_section_is_a_mistake(text: str, path: str) -> None:
    expected = "this section is empty: indent the lines that belong to it, or remove it"
    assert mistakes(text) == [f"test.yml:1: {path}: {expected}"]


def test_omitted_value_is_not_an_empty_section() -> None:
    assert mistakes("server:\n  token:\n  x: 1\n") == ["test.yml:3: server.x: unknown key"]


INDENT = "align this line with those above, or put quotes around a value with a colon"
SPACE = "put a space after the colon"
QUOTE = "this quoted text has no closing quote"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        pytest.param(
            "streams:\n\ta: u\n", "2: invalid YAML: found a tab: use spaces", id="tab",
        ),
        pytest.param(
            "streams:\n  a: {\n  url: [u}\n", "3: invalid YAML: expected ',' or ']', but got '}'",
            id="bracket closed by another",
        ),
        pytest.param(
            "streams:\n  a: [u\n", "2: invalid YAML: expected ',' or ']', but got '<stream end>'",
            id="bracket never closed",
        ),
        pytest.param(
            "streams:\n  a: hls://u\n   b: hls://v\n",
            f"3: invalid YAML: {INDENT}",
            id="indented too much",
        ),
        pytest.param(
            "streams:\n    a: hls://u\n  b: hls://v\n", f"3: invalid YAML: {INDENT}",
            id="indented too little",
        ),
        pytest.param(
            "streams:\n  a:\n    url:\n      - hls://u\n     - hls://v\n",
            f"5: invalid YAML: {INDENT}", id="list indented too little",
        ),
        pytest.param(
            "streams:\n  a:\n    url: hls://u\n    title: News: today\n",
            f"4: invalid YAML: {INDENT}", id="colon in a value",
        ),
        pytest.param(
            "server:\n  port:8080\n  host: x\n", f"2: invalid YAML: {SPACE}", id="space, first line"
        ),
        pytest.param(
            "server:\n  host: x\n  port:8080\n\n  name: x\n", f"3: invalid YAML: {SPACE}",
            id="space in the middle",
        ),
        pytest.param(
            "server:\n  host: x\n  port:8080\n", f"3: invalid YAML: {SPACE}", id="space, last line"
        ),
        pytest.param(
            "streams:\n  a:\n    url:http://u\n    title: A\n", f"3: invalid YAML: {SPACE}",
            id="space before an address",
        ),
        pytest.param("a: 'hls://u\nb: c\n", f"1: invalid YAML: {QUOTE}", id="quote never closed"),
        pytest.param(
            'streams:\n  a: "hls://u\n\n  b: "hls://v"\n', f"2: invalid YAML: {QUOTE}",
            id="quote closed by the next",
        ),
        pytest.param(
            'streams:\n  a: {url: ["hls://u, hls://v]}\n  b: "hls://v"\n',
            f"2: invalid YAML: {QUOTE}", id="quote in a list",
        ),
        pytest.param(
            "streams:\n  a:\n    url: hls://u\n    title: 'it's'\n",
            "4: invalid YAML: found text after a closing quote: "
            "use the other kind of quotes around the value",
            id="quote in quotes",
        ),
        pytest.param(
            "server:\n  name: @x\n", "2: invalid YAML: put quotes around this value", id="odd start"
        ),
        pytest.param(
            "a: 1\n---\nb: 2\n", "2: invalid YAML: found a second document: remove it", id="two"
        ),
        pytest.param(
            "a: &x 1\nb: &x 2\n", "2: invalid YAML: duplicate anchor", id="anchor twice"
        ),
    ],
)  # fmt: skip
def test_invalid_yaml_is_one_mistake_at_its_line(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"test.yml:{mistake}"]


def test_control_character_in_yaml_is_reported_at_its_line() -> None:
    (mistake,) = mistakes("streams:\n  a: hls://u\n  b: '\x07'\n")
    assert mistake.startswith("test.yml:3: invalid YAML: ")


def test_missing_space_before_an_address_is_a_mistake() -> None:
    text = "streams:\n  a:\n    url:http://u\n"
    assert mistakes(text) == ["test.yml:3: streams.a: put a space after the first colon"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("b{n}: &a{n} [*a{m}, *a{m}, *a{m}, *a{m}]", id="lists"),
        pytest.param("b{n}: &a{n} {{k: *a{m}, l: *a{m}, m: *a{m}}}", id="sections"),
        pytest.param("b{n}: &a{n} {{<<: [*a{m}, *a{m}, *a{m}]}}", id="merges"),
        pytest.param("b{n}: &a{n} {{<<: *a{m}, <<: *a{m}, <<: *a{m}}}", id="many merges"),
    ],
)
def test_exponential_aliases_are_reported_quickly(line: str) -> None:
    bombs = "\n".join("  " + line.format(n=n, m=n - 1) for n in range(1, 40))
    assert mistakes(f"streams:\n  a: &a0 {{k: v}}\n{bombs}\n")


def test_long_chain_of_merges_is_reported() -> None:
    rows = "\n".join(f"  - &s{n} {{<<: *s{n - 1}}}" for n in range(1, 900))
    assert mistakes(f"rows:\n  - &s0 {{url: hls://u}}\n{rows}\nstreams: {{a: *s899}}\n")


def test_large_file_is_read() -> None:
    keys = "title: T, group: G, logo: http://h/l, tvg_id: x, quality: best, threads: 2, proxy: ~"
    text = "".join(f"  s{n}: {{url: hls://u, number: {n}, {keys}}}\n" for n in range(1, 3001))
    assert len(read(f"streams:\n{text}").streams) == 3000


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "streams: {a: " + "[" * 5000])
def test_deep_nesting_is_a_mistake(text: str) -> None:
    assert len(mistakes(text)) == 1


def test_all_mistakes_are_reported_in_order_of_lines() -> None:
    text = """\
sever: {}
server:
  port: http
  nmae: TV
streams:
  Bad: hls://u
  health: hls://u
  a: file:///x
  b:
    title: B
    thread: 2
  c: {url: hls://u, number: 1}
  d: {url: hls://u, number: 1}
  c: hls://u
options:
  timeout: 0
  streamlink:
    hls-live: 2
    webbrowser: true
"""
    assert [": ".join(mistake.split(": ")[:2]) for mistake in mistakes(text)] == [
        "test.yml:1: sever",
        "test.yml:3: server.port",
        "test.yml:4: server.nmae",
        "test.yml:6: streams.Bad",
        "test.yml:7: streams.health",
        "test.yml:8: streams.a",
        "test.yml:9: streams.b",
        "test.yml:11: streams.b.thread",
        "test.yml:13: streams.d.number",
        "test.yml:14: streams.c",
        "test.yml:16: options.timeout",
        "test.yml:18: options.streamlink.hls-live",
        "test.yml:19: options.streamlink.webbrowser",
    ]


@pytest.mark.parametrize(
    "text",
    [
        server(f"token: [{SECRET}]"),
        server(f"token: *{SECRET}"),
        server(f"token: !{SECRET}!x y"),
        server(f"trusted: [{SECRET}]"),
        server(f"<<: {SECRET}"),
        f"streams: {{a: {SECRET}}}",
        f"streams: {{a: /home/{SECRET}}}",
        engine(f"http-proxy: {SECRET}"),
        engine(f"http-cookies-files: [{SECRET}]"),
        engine(f"http-ssl-cert: {SECRET}"),
        server(f'token: "{SECRET}'),
        f"server:\n  token: {SECRET}\n {SECRET}\n",
        f"streams: {{a: 'file:///{SECRET}'}}",
        f'streams: {{a: "http://h/\\n{SECRET}"}}',
        f"streams: {{a: {{url: {{x: {SECRET}}}}}}}",
        f"streams:\n  http://user:{SECRET}@h/x: hls://u\n",
        stream(f"headers: {SECRET}"),
        stream(f"headers: {{Cookie: [{SECRET}]}}"),
        stream(f'headers: {{Cookie: "{SECRET}\\n"}}'),
        stream(f'headers: {{"Cookie: {SECRET}": x}}'),
        stream(f"proxy: ftp://user:{SECRET}@p.example"),
        stream(f"logo: /{SECRET}"),
        server(f"public_url: {SECRET}"),
        server(f"trusted: {SECRET}"),
        engine(f"http-cookies: {SECRET}"),
        engine(f"http-headers: {SECRET}"),
        engine(f"http-proxy: {{x: {SECRET}}}"),
    ],
)
def test_secret_is_never_quoted(text: str) -> None:
    assert all(SECRET not in mistake for mistake in mistakes(text))


#### Files ####


def test_file_is_read_and_named_in_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "tv.yml"
    path.write_text("server: {port: 81}", encoding="utf-8")
    assert pipe.load_config(path, ENGINE).server.port == 81
    path.write_text("\nserver: {port: x}", encoding="utf-8")
    with pytest.raises(pipe.ConfigError) as caught:
        pipe.load_config(path, ENGINE)
    expected = 'server.port: expected a whole number from 0 to 65535, got "x"'
    assert caught.value.mistakes == (f"{path}:2: {expected}",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file_is_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "tv.yml"
    path.write_text("server: {name: Fernsehen für alle 📺}", encoding=encoding)
    assert pipe.load_config(path, ENGINE).server.name == "Fernsehen für alle 📺"


def test_missing_file_is_reported_with_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    with pytest.raises(pipe.ConfigError) as caught:
        pipe.load_config(path, ENGINE)
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(f"{path}: no such file; write one as in README's Quick start ")
    assert "config.example.yml" in mistake


def test_unreadable_file_is_reported_in_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "clip.ts"
    binary.write_bytes(b"\x47\xff\xfe\n")
    for path in (tmp_path, binary):
        with pytest.raises(pipe.ConfigError) as caught:
            pipe.load_config(path, ENGINE)
        (mistake,) = caught.value.mistakes
        assert mistake.startswith(f"{path}: cannot be read: ")
        assert len(mistake.splitlines()) == 1


#### Arbitrary text ####

WORDS = [
    *("server", "streams", "options", "url", "streamlink", "headers", "trusted", "number"),
    *("port", "token", "timeout", "hls-live-edge", "http-headers", "a", "<<", "=", "", "~"),
    *("1", "-1", "1e999", "0x1", "2020-99-99", "on", ".nan", "http://h/", "file:///x", "\n"),
    *("${", "${A}", "$${", "${PATH}", "“", "http://h:"),
]
SCALARS = st.sampled_from(WORDS) | st.text(max_size=8) | st.integers() | st.none() | st.floats()
TREES = st.recursive(
    SCALARS,
    lambda nodes: (
        st.lists(nodes, max_size=4) | st.dictionaries(st.sampled_from(WORDS), nodes, max_size=5)
    ),
    max_leaves=20,
)
SYNTAX = st.sampled_from(
    [*WORDS, ": ", "- ", "\n", "\n  ", "\t", "{", "}", "[", "]", ",", "&a ", "*a", "!!int ", "!x ",
     "'", '"', "#", "? ", "| ", "--- ", "%", "@", "\\", "\0", "\x85", "\ufeff", "!!merge "]
)  # fmt: skip


def found_mistakes(text: str) -> tuple[str, ...]:
    """The reported mistakes, if any; other exceptions than ConfigError fail the test."""
    try:
        config = read(text)
    except pipe.ConfigError as error:
        return error.mistakes
    assert all(stream.urls and all(stream.urls) for stream in config.streams.values())
    return ()


def check_outcome(text: str) -> None:
    """The text is a configuration, or each mistake is one line with its place."""
    for mistake in found_mistakes(text):
        assert re.fullmatch(r"test\.yml:[1-9][0-9]*: .+", mistake)
        assert len(mistake.splitlines()) == 1


@settings(deadline=None)
@given(st.lists(SYNTAX, max_size=25).map("".join) | st.text())
def test_any_text_is_a_configuration_or_a_list_of_mistakes(text: str) -> None:
    check_outcome(text)


@settings(deadline=None)
@given(TREES)
def test_any_tree_is_a_configuration_or_a_list_of_mistakes(tree: object) -> None:
    check_outcome(yaml.safe_dump(tree, allow_unicode=True))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), TREES), st.sampled_from(["options", "server"]))
def test_any_values_of_a_section_are_read_or_reported(tree: object, section: str) -> None:
    check_outcome(yaml.safe_dump({section: tree, "streams": {"a": tree, "b": {"url": tree}}}))


#### Playlists ####

LIST = "http://panel.example/get.php?username=u&password=hunter2"


def read_playlist(keys: str) -> pipe.PlaylistSettings:
    return read(f'playlists: {{p: {{url: "{LIST}", {keys}}}}}').playlists["p"]


@pytest.mark.parametrize("title", ["\N{TELEVISION} News", "N\u00e9ws"])
def test_characters_of_a_json_file_are_read(title: str) -> None:
    """JSON writes an emoji as two halves."""
    text = json.dumps({"streams": {"a": {"url": URL, "title": title}}})
    assert read(text).streams["a"].title == title


@pytest.mark.parametrize("half", ["ud83d", "udcfa"])
def test_half_of_a_character_is_a_mistake(half: str) -> None:
    (mistake,) = mistakes(stream(f'title: "a\\{half}b"'))
    assert mistake.startswith("test.yml:1: streams.a.title: found half of a character")


@pytest.mark.parametrize("address", ["http://[::1/x", "http://u:hunter2[a@h/x", "hls://http://[1/"])
def test_address_with_a_bracket_too_many_is_a_mistake(address: str) -> None:
    (mistake,) = mistakes(f"streams: {{a: '{address}'}}")
    assert mistake == "test.yml:1: streams.a: the address has an invalid host"


def test_playlist_with_only_an_address_has_the_defaults() -> None:
    expected = pipe.PlaylistSettings("p", LIST)
    assert read(f"playlists: {{p: '{LIST}'}}").playlists == {"p": expected}
    assert read_playlist("") == expected


@keys_and_values(PLAYLIST_VALUES)
def test_key_of_a_playlist_sets_only_its_field(key: str, text: str, value: Any) -> None:
    assert read_playlist(f"{key}: {text}") == pipe.PlaylistSettings("p", LIST, **{key: value})


def test_playlist_may_have_every_option() -> None:
    text = "options: {linger: 5, streamlink: {hls-live-edge: 2}}\n"
    text += f"playlists: {{p: {{url: '{LIST}', threads: 8, streamlink: {{interface: lo}}}}}}"
    found = read(text).playlists["p"].options
    streamlink = {"hls-live-edge": 2, "interface": "lo"}
    assert found == pipe.Options(threads=8, linger=5.0, streamlink=streamlink)


@pytest.mark.parametrize("path", ["channels.m3u", "/srv/tv/a b.m3u8", "~/tv.M3U", "./x.m3u"])
def test_list_may_be_a_local_file(path: str) -> None:
    assert read(f"playlists: {{p: '{path}'}}").playlists["p"].url == path


@pytest.mark.parametrize(
    ("entry", "mistake"),
    [
        ("{}", "playlists.p: url is missing"),
        ("{url: null}", "playlists.p: url is missing"),
        ("null", "playlists.p: url is missing"),
        (
            "'panel.example/get.php?password=hunter2'",
            "playlists.p: begin the address with http://, or name a local file that ends in .m3u",
        ),
        (
            "/etc/passwd",
            "playlists.p: begin the address with http://, or name a local file that ends in .m3u",
        ),
        (
            "file:///srv/a.m3u",
            "playlists.p: local files are never opened: use an http:// or https:// address",
        ),
        (
            "hls://http://a.example/x",
            "playlists.p: expected an address that starts with http:// or https://",
        ),
        (
            f"{{url: '{LIST}', prefix: UK}}",
            "playlists.p.prefix: a prefix may only contain a-z, 0-9 and -, e.g. uk-",
        ),
        (
            f"{{url: '{LIST}', refresh: -1}}",
            'playlists.p.refresh: expected a number, 0 or more, got "-1"',
        ),
        (f"{{url: '{LIST}', group: x}}", "playlists.p.group: unknown key: did you mean groups?"),
    ],
)
def test_mistake_of_a_playlist_is_reported(entry: str, mistake: str) -> None:
    (found,) = mistakes(f"playlists: {{p: {entry}}}")
    assert found.removeprefix("test.yml:1: ") == mistake


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("My TV", "a playlist's name may only contain a-z, 0-9 and -, e.g. provider-1"),
        ("status", "this name is reserved: choose another"),
    ],
)
def test_invalid_name_of_a_playlist_is_a_mistake(name: str, mistake: str) -> None:
    (found,) = mistakes(f"playlists: {{{name}: '{LIST}'}}")
    assert found == f"test.yml:1: playlists.{name}: {mistake}"


def test_stream_without_an_address_needs_a_playlist() -> None:
    text = "streams: {a: {title: T, threads: 2}, b: {hide: true}}\n"
    assert len(mistakes(text)) == 2
    config = read(text + f"playlists: {{p: '{LIST}'}}")
    assert config.overrides == {"a": {"title": "T", "threads": 2}, "b": {"hide": True}}
    assert config.streams == {}


def test_numbers_of_streams_without_an_address_are_unique() -> None:
    text = f"playlists: {{p: '{LIST}'}}\nstreams: {{a: {{number: 1}}, b: {{number: 1}}}}"
    assert mistakes(text) == ["test.yml:2: streams.b.number: 1 is already used by a"]


@pytest.mark.parametrize("name", ["config.yaml", "config.yml.txt"])
def test_missing_file_with_a_similar_one_is_reported_with_that_name(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("")
    path = tmp_path / "config.yml"
    with pytest.raises(pipe.ConfigError) as caught:
        pipe.load_config(path, ENGINE)
    advice = f"rename {tmp_path / name} to config.yml, or name it with -c"
    assert caught.value.mistakes == (f"{path}: no such file; {advice}",)
