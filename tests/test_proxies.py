"""Real processes behind a real HAProxy and a real nginx, configured as README shows.

The tests replace only addresses, ports and paths in these configurations. The tests of heads and
addresses also use Caddy and Apache. If a proxy is not installed, its tests are skipped, or fail if
the environment has CI.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Origin, Playlist
from tests.server import BROWSER, Site
from tests.test_cli import HERE, Program, get_json, wait_for_listener
from tests.test_docs import README
from tests.test_sharing import eventually

FOLDER = Path(__file__).parent
TIMEOUT = 20.0  # seconds; longer than any event that a test waits for
CHANNELS = [f"channel{number}" for number in range(1, 7)]
VIEWERS = 5  # of each channel
SEGMENTS = 8  # until the media repeats
ONE_SEGMENT = len(media.ts_segments(SEGMENTS)[0])

pytestmark = pytest.mark.long


#### Viewers ####


class Viewer:
    """A viewer that reads as fast as it can, in its own thread."""

    def __init__(self, port: int, path: str) -> None:
        self.path = path
        self.ended = threading.Event()
        self._parts: list[bytes] = []
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        self._response = http.client.HTTPResponse(self._socket)
        self._response.begin()
        self.status = self._response.status
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(http.client.IncompleteRead, OSError, ValueError):
            while part := self._response.read1(65536):
                self._parts.append(part)
        self.ended.set()

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT)
        self._response.close()
        self._socket.close()


@pytest.fixture
def watch() -> Iterator[Callable[[int, str], Viewer]]:
    """Watch a path on a port; the viewer leaves at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(port: int, path: str) -> Viewer:
            viewer = Viewer(port, path)
            stack.callback(viewer.close)
            return viewer

        yield start


Watching = Callable[[int, str], Viewer]


def wait_for_progress(viewers: Sequence[Viewer], size: int = ONE_SEGMENT) -> None:
    """Wait until each viewer has `size` more bytes, or its stream has ended."""
    wanted = [(viewer, len(viewer.body) + size) for viewer in viewers]
    for viewer, least in wanted:

        def is_done(viewer: Viewer = viewer, least: int = least) -> bool:
            return viewer.ended.is_set() or len(viewer.body) >= least

        eventually(is_done, f"{viewer.path} continues")


#### Processes ####


class Server:
    """A `python pipe.py` with all channels."""

    def __init__(self, folder: Path, streams: Mapping[str, object], **settings: object) -> None:
        folder.mkdir()
        config = json.dumps({"server": settings, "streams": streams})
        (folder / "config.yml").write_text(config, encoding="utf-8")
        self.program = Program(*HERE, cwd=folder)
        self.port = self.program.listening_port()

    def channels(self) -> set[str]:
        """The channels that it pulls now."""
        streams = get_json(self.port, "/status")["streams"]
        return {stream["stream"] for stream in streams if stream["channels"]}


@pytest.fixture
def channels(origin: Origin) -> dict[str, Playlist]:
    segments = media.ts_segments(SEGMENTS)
    live: dict[str, Any] = {"mode": "live", "window": 5, "clock": True}
    return {name: origin.add(Playlist(name, segments, **live)) for name in CHANNELS}


@pytest.fixture
def servers(channels: Mapping[str, Playlist], tmp_path: Path) -> Iterator[list[Server]]:
    streams = {name: channel.url for name, channel in channels.items()}
    with contextlib.ExitStack() as stack:
        running = []
        for name in ("one", "two", "three"):
            running.append(Server(tmp_path / name, streams))
            stack.callback(running[-1].program.close)
        yield running


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def adapted(name: str, replacements: Mapping[str, str], target: Path) -> Path:
    """A copy of a configuration with these texts replaced; each must occur exactly once."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    for old, new in replacements.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    target.write_text(text, encoding="utf-8")
    return target


@contextlib.contextmanager
def running(*command: str, port: int) -> Iterator[None]:
    """A proxy that listens on this port until the end of the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_listener(port)
        assert process.poll() is None, f"{command[0]} ended"
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT)
    finally:
        process.kill()
        process.wait()


def need(program: str) -> str:
    """The program's path, even if PATH lacks /usr/sbin; skips the test if it is missing."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not found:
        assert "CI" not in os.environ, f"CI must install {program}"
        pytest.skip(f"needs {program}")
    return found


def addresses(servers: list[Server]) -> dict[str, str]:
    """The addresses in the configurations, with the test's addresses of the servers."""
    return {
        f"192.0.2.{number}:8080": f"127.0.0.1:{server.port}"
        for number, server in enumerate(servers, 1)
    }


@contextlib.contextmanager
def haproxy(servers: list[Server], folder: Path) -> Iterator[int]:
    program, port = need("haproxy"), free_port()
    replacements = {"bind :80\n": f"bind 127.0.0.1:{port}\n", **addresses(servers)}
    config = adapted("haproxy.cfg", replacements, folder / "haproxy.cfg")
    with running(program, "-db", "-f", str(config), port=port):
        yield port


def certificate(folder: Path) -> tuple[Path, Path]:
    """A new certificate for 127.0.0.1, and its key."""
    file, key = folder / "tv.pem", folder / "tv.key"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command = [need("openssl"), "req", *kind, *names, "-out", str(file), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
    return file, key


@contextlib.contextmanager
def nginx_with_tls(servers: list[Server], folder: Path) -> Iterator[tuple[int, int]]:
    """nginx in front of all servers; yields its ports for plain HTTP and TLS."""
    port, tls_port = free_port(), free_port()
    replacements = {
        "listen 80;": f"listen 127.0.0.1:{port};",
        **tls(folder, tls_port),
        "\nhttp {\n": f"\nhttp {{{scratch_paths(folder)}\n",
        **addresses(servers),
    }
    config = adapted("nginx.conf", replacements, folder / "nginx.conf")
    with running_nginx(config, port):
        yield port, tls_port


@contextlib.contextmanager
def nginx_for_one(server: Server, folder: Path) -> Iterator[int]:
    """nginx in front of one server; yields its port for TLS.

    Another file includes the configuration, as Debian's nginx does with conf.d.
    """
    port = free_port()
    replacements = {**tls(folder, port), "127.0.0.1:8080": f"127.0.0.1:{server.port}"}
    included = adapted("nginx_one.conf", replacements, folder / "nginx_one.conf")
    config = folder / "nginx.conf"
    http = f"http {{{scratch_paths(folder)} include {included}; }}"
    config.write_text(f"events {{}}\n{http}\n", encoding="utf-8")
    with running_nginx(config, port):
        yield port


def tls(folder: Path, port: int) -> dict[str, str]:
    """The replacements for a configuration's TLS: the port, certificate and key of a test."""
    file, key = certificate(folder)
    return {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/ssl/tv.example.pem": str(file),
        "/etc/ssl/tv.example.key": str(key),
    }


def scratch_paths(folder: Path) -> str:
    scratch = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f" {name}_temp_path {folder / name};" for name in scratch)


@contextlib.contextmanager
def running_nginx(config: Path, port: int) -> Iterator[None]:
    """nginx with this configuration; it keeps its files in the same folder."""
    folder = config.parent
    settings = f"daemon off; pid {folder}/nginx.pid;"
    log = str(folder / "nginx.log")
    command = [need("nginx"), "-p", str(folder), "-e", log, "-c", str(config), "-g", settings]
    with running(*command, port=port):
        yield


@contextlib.contextmanager
def nginx(servers: list[Server], folder: Path) -> Iterator[int]:
    with nginx_with_tls(servers, folder) as (port, _):
        yield port


Proxy = Callable[[list[Server], Path], contextlib.AbstractContextManager[int]]


@pytest.fixture(params=[haproxy, nginx], ids=["haproxy", "nginx"])
def front(request: pytest.FixtureRequest, servers: list[Server], tmp_path: Path) -> Iterator[int]:
    """The port of a proxy in front of the three servers."""
    proxy: Proxy = request.param
    with proxy(servers, tmp_path) as port:
        yield port


#### Three servers behind a proxy ####


def is_from(body: bytes, channel: Playlist) -> bool:
    """Whether these bytes are the channel's, without a gap or a repeat.

    StreamPipe adds a signal at each repetition of the media.
    """
    whole = body[: len(body) // media.PACKET * media.PACKET]
    return media.without_notices(whole) in channel.plain(0, channel.newest + 1)


def segment_requests(origin: Origin, channel: Playlist) -> list[int]:
    """The number of requests for each segment that was requested."""
    paths = [request.path for request in origin.requests]
    asked = {path for path in paths if path.startswith(f"/{channel.name}/") and path[-3:] == ".ts"}
    return [paths.count(path) for path in asked]


def reconnected(watch: Watching, port: int, path: str) -> Viewer:
    """A viewer that reconnects until it is served.

    The proxy may send it to the ended server until it notices that this one is gone.
    """
    viewers: list[Viewer] = []

    def is_served() -> bool:
        viewers.append(watch(port, path))
        return viewers[-1].status == 200

    eventually(is_served, f"{path} is served again")
    return viewers[-1]


def test_each_channel_is_pulled_once_and_only_channels_of_a_lost_server_move(
    origin: Origin,
    channels: Mapping[str, Playlist],
    servers: list[Server],
    front: int,
    watch: Watching,
) -> None:
    viewers = [watch(front, f"/{name}") for name in CHANNELS for _ in range(VIEWERS)]
    assert {viewer.status for viewer in viewers} == {200}
    wait_for_progress(viewers)
    pulled = [server.channels() for server in servers]
    assert sorted(name for names in pulled for name in names) == CHANNELS
    for channel in channels.values():
        assert set(segment_requests(origin, channel)) == {1}

    victim = min(
        (server for server in servers if server.channels()), key=lambda s: len(s.channels())
    )
    moving = victim.channels()
    victim.program.send(signal.SIGKILL)
    gone = [viewer for viewer in viewers if viewer.path[1:] in moving]
    others = [viewer for viewer in viewers if viewer.path[1:] not in moving]
    assert len(gone) == VIEWERS * len(moving) > 0
    for viewer in gone:
        assert viewer.ended.wait(TIMEOUT)
    back = [reconnected(watch, front, viewer.path) for viewer in gone]
    wait_for_progress([*others, *back])
    for viewer in [*others, *back]:
        assert not viewer.ended.is_set()
        assert is_from(viewer.body, channels[viewer.path[1:]])
    pulled = [server.channels() for server in servers if server is not victim]
    assert sorted(name for names in pulled for name in names) == CHANNELS
    for viewer in others:
        assert set(segment_requests(origin, channels[viewer.path[1:]])) == {1}


def test_channel_that_moved_starts_at_a_key_frame(
    channels: Mapping[str, Playlist], servers: list[Server], front: int, watch: Watching
) -> None:
    wait_for_progress([watch(front, "/channel1")], 188)
    (victim,) = (server for server in servers if server.channels())
    victim.program.send(signal.SIGKILL)
    victim.program.wait()
    viewer = reconnected(watch, front, "/channel1")
    wait_for_progress([viewer], 2 * ONE_SEGMENT)
    body = viewer.body
    assert not viewer.ended.is_set()
    assert is_from(body, channels["channel1"])
    assert media.first_picture(body)[1], "the stream must start with a key frame"


def test_relay_of_a_relay_plays(
    origin: Origin,
    channels: Mapping[str, Playlist],
    front: int,
    serve: Callable[..., Site],
) -> None:
    relay = serve({"news": f"httpstream://http://127.0.0.1:{front}/channel1"})
    last = serve({"news": f"httpstream://{relay.url}/news"})
    size = sum(map(len, media.ts_segments(SEGMENTS)[:5]))
    viewers = [last.watch("/news") for _ in range(3)]
    for viewer in viewers:
        assert viewer.headers["Content-Type"] == "video/mp2t"
        body = viewer.read(size)
        assert is_from(body, channels["channel1"])
        assert media.first_picture(body)[1], "the stream must start with a key frame"
    assert set(segment_requests(origin, channels["channel1"])) == {1}


def test_all_addresses_of_a_channel_lead_to_one_server(
    servers: list[Server], front: int, watch: Watching
) -> None:
    """HLS has an address for each segment, and each server has its own numbers."""
    wait_for_progress([watch(front, f"/{name}") for name in CHANNELS], 188)
    for name in CHANNELS:
        for path in (f"/{name}.m3u8?quality=best", f"/{name}/1.ts", f"/{name}/init.mp4"):
            # Each server answers this method with the same status, and counts the answer.
            assert send(front, "DELETE", path).status == 405
    refused = {server.port: refusals(server) for server in servers}
    assert refused == {server.port: 3 * len(server.channels()) for server in servers}


def send(port: int, method: str, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        response.read()
        return response


def refusals(server: Server) -> int:
    """The number of requests that a server answered with 405."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = re.search(r'^streampipe_http_requests_total\{code="405"\} (\d+)', text, re.M)
    return int(found[1]) if found else 0


def test_playlist_has_the_address_of_the_proxy(front: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", "/playlist.m3u")
        text = connection.getresponse().read().decode()
    assert text.split("\n")[2] == f"http://127.0.0.1:{front}/channel1"


def test_nginx_adds_tls(servers: list[Server], tmp_path: Path) -> None:
    with nginx_with_tls(servers, tmp_path) as (_, port):
        check_tls(port, tmp_path)


def test_nginx_adds_tls_to_one_server(channels: Mapping[str, Playlist], tmp_path: Path) -> None:
    streams = {name: channel.url for name, channel in channels.items()}
    assert 'Set `host: "127.0.0.1"` and `proxies: ["127.0.0.1"]`' in README
    server = Server(tmp_path / "one", streams, host="127.0.0.1", proxies=["127.0.0.1"])
    with contextlib.closing(server.program), nginx_for_one(server, tmp_path) as port:
        check_tls(port, tmp_path)


def check_tls(port: int, folder: Path) -> None:
    """Check that lists have the proxy's address with https, and that channels play."""
    trust = ssl.create_default_context(cafile=str(folder / "tv.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT, context=trust)
    with contextlib.closing(connection):
        connection.request("GET", "/playlist.m3u")
        text = connection.getresponse().read().decode()
        connection.request("GET", "/channel1")
        response = connection.getresponse()
        assert response.read(188)[:1] == b"G"
        response.close()
    assert text.split("\n")[2] == f"https://127.0.0.1:{port}/channel1"


#### Heads and addresses behind one proxy ####


@contextlib.contextmanager
def caddy(servers: list[Server], folder: Path) -> Iterator[int]:
    """Caddy with its default headers; the server is at / and below /tv."""
    program, port = need("caddy"), free_port()
    upstream = f"127.0.0.1:{servers[0].port}"
    config = folder / "Caddyfile"
    config.write_text(
        f"""{{
    admin off
    auto_https off
}}
http://:{port} {{
    bind 127.0.0.1
    handle_path /tv/* {{
        reverse_proxy {upstream} {{
            header_up X-Forwarded-Prefix /tv
        }}
    }}
    handle {{
        reverse_proxy {upstream}
    }}
}}
""",
        encoding="utf-8",
    )
    home = f"HOME={folder}"
    command = ["env", home, program, "run", "--adapter", "caddyfile", "--config", str(config)]
    with running(*command, port=port):
        yield port


@contextlib.contextmanager
def apache(servers: list[Server], folder: Path) -> Iterator[int]:
    """Apache with its default headers; the server is at / and below /tv."""
    program, port = need("apache2"), free_port()
    upstream = f"http://127.0.0.1:{servers[0].port}"
    names = ("mpm_event", "authz_core", "proxy", "proxy_http", "headers")
    modules = [f"LoadModule {n}_module /usr/lib/apache2/modules/mod_{n}.so" for n in names]
    config = folder / "apache.conf"
    lines = [
        *modules,
        "ServerName tv.example",
        "User www-data",
        "Group www-data",
        f"DefaultRuntimeDir {folder}",
        f"PidFile {folder}/apache.pid",
        f"ErrorLog {folder}/apache.log",
        f"Listen 127.0.0.1:{port}",
        "<Location /tv/>",
        "RequestHeader set X-Forwarded-Prefix /tv",
        "</Location>",
        f"ProxyPass /tv/ {upstream}/",
        f"ProxyPass / {upstream}/",
    ]
    config.write_text("\n".join([*lines, ""]), encoding="utf-8")
    with running(program, "-d", str(folder), "-f", str(config), "-DFOREGROUND", port=port):
        yield port


@contextlib.contextmanager
def bare_nginx(servers: list[Server], folder: Path) -> Iterator[int]:
    """nginx that removes the port from Host; the server is at / and below /tv."""
    port = free_port()
    own = scratch_paths(folder)
    upstream = f"http://127.0.0.1:{servers[0].port}"
    headers = """proxy_set_header Host $host;
proxy_set_header X-Forwarded-Port $server_port;
proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"""
    config = folder / "nginx.conf"
    config.write_text(
        f"""events {{}}
http {{
access_log off; {own}
server {{
listen 127.0.0.1:{port};
{headers}
location / {{ proxy_pass {upstream}; }}
location /tv/ {{ {headers} proxy_set_header X-Forwarded-Prefix /tv; proxy_pass {upstream}/; }}
}}
}}
""",
        encoding="utf-8",
    )
    with running_nginx(config, port):
        yield port


WITH_PATH = [bare_nginx, caddy, apache]
ALL_PROXIES = [haproxy, nginx, *WITH_PATH]


@pytest.fixture
def server(channels: Mapping[str, Playlist], tmp_path: Path) -> Iterator[Server]:
    """A server that trusts the proxy and has five hundred logos on different hosts."""
    streams: dict[str, object] = {
        f"logo-{number}": {
            "url": "http://origin.example/x.m3u8",
            "logo": f"http://h{number}.example/",
        }
        for number in range(500)
    }
    streams = {"channel1": channels["channel1"].url, **streams}
    found = Server(tmp_path / "one", streams, proxies=["127.0.0.1/32"])
    yield found
    found.program.close()


@pytest.fixture(params=ALL_PROXIES, ids=[proxy.__name__ for proxy in ALL_PROXIES])
def alone(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[int]:
    """The port of a proxy in front of that server."""
    proxy: Proxy = request.param
    with proxy([server, server, server], tmp_path) as port:
        yield port


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


FOUND = "/?q=logo"  # shows as many of the five hundred as fit on a page


@pytest.mark.parametrize("path", [FOUND, "/nobody"], ids=["status", "error"])
def test_page_of_many_logos_passes_the_proxy(alone: int, path: str) -> None:
    status, page = get(alone, path, Accept=BROWSER)
    assert status == (200 if path == FOUND else 404)
    last = pipe.MOST_CARDS - 1
    assert (f"http://h{last}.example/" in page) == (path == FOUND)


def test_status_has_the_address_of_the_viewer(server: Server, alone: int) -> None:
    """The server ignores the address that the client claims; the proxy is 127.0.0.1."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", alone, timeout=TIMEOUT, source_address=("127.0.0.2", 0)
    )
    with contextlib.closing(connection):
        connection.request("GET", "/channel1", headers={"X-Forwarded-For": "203.0.113.99"})
        response = connection.getresponse()
        with contextlib.closing(response):
            assert response.read(188)[:1] == b"G"
            report = get_json(server.port, "/status")["streams"][0]
    viewers = [viewer for channel in report["channels"] for viewer in channel["viewers"]]
    assert [viewer["address"] for viewer in viewers] == ["127.0.0.2"]


def test_list_has_the_port_of_the_proxy(alone: int) -> None:
    _, text = get(alone, "/playlist.m3u")
    assert text.split("\n")[2] == f"http://127.0.0.1:{alone}/channel1"


@pytest.mark.parametrize("alone", WITH_PATH, indirect=True, ids=lambda proxy: proxy.__name__)
def test_list_has_the_path_below_a_proxy(alone: int) -> None:
    status, text = get(alone, "/tv/playlist.m3u")
    assert status == 200
    address = text.split("\n")[2]
    assert address == f"http://127.0.0.1:{alone}/tv/channel1"
    connection = http.client.HTTPConnection("127.0.0.1", alone, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", address.removeprefix(f"http://127.0.0.1:{alone}"))
        response = connection.getresponse()
        with contextlib.closing(response):
            assert response.read(188)[:1] == b"G"
