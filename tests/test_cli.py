"""The program as users run it: a real process, a real origin, real sockets and signals."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipe
from tests import media
from tests.origin import Fault, Origin, Playlist, Stall, StallHeaders
from tests.server import BROWSER, Watch

PIPE = Path(pipe.__file__)
TIMEOUT = 20.0  # seconds; longer than any event that a test waits for
EXIT_TIME = 5.0  # seconds in which the program must end, even if a connection hangs
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (debug|info|warning|error)\b.+", re.I)
SECRET = "hunter2"


class Program:
    """A running `python pipe.py`; `close` kills it if it is still running."""

    def __init__(self, *arguments: str, cwd: Path, python: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *python, str(PIPE), *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._read = threading.Condition()  # guards the two attributes below
        self._lines: list[str] = []
        self._is_closed = False
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._read:
                self._lines.append(line.rstrip("\n"))
                self._read.notify_all()
        with self._read:
            self._is_closed = True
            self._read.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stderr that has the pattern; returns the first one."""
        with self._read:
            self._read.wait_for(lambda: self._is_closed or self._find(pattern), TIMEOUT)
            found = self._find(pattern)
            assert found, f"{pattern!r} is not in {self._lines}"
            return found

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next(filter(None, (re.search(pattern, line) for line in self._lines)), None)

    def listening_port(self) -> int:
        return int(self.wait_for(r"listening on \S+ port (\d+)")[1])

    def wait_until_packages_load(self) -> None:
        """Wait until one of its packages is loaded, as Linux shows; others load after it."""
        deadline, pause = time.monotonic() + TIMEOUT, threading.Event()
        while "/lxml/" not in Path(f"/proc/{self._process.pid}/maps").read_text():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            pause.wait(0.002)

    def limit_files(self, count: int) -> None:
        resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, (count, count))

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit status; fails if the program does not end in time."""
        return self._process.wait(timeout)

    def errors(self) -> list[str]:
        """All lines on stderr, once the program has ended."""
        self.wait()
        self._reader.join(TIMEOUT)
        return self._lines

    def output(self) -> str:
        """The whole stdout, once the program has ended."""
        self.wait()
        assert self._process.stdout
        return self._process.stdout.read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream
            stream.close()


Run = Callable[..., Program]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start the program in an empty folder: `run("--demo")`; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, python: tuple[str, ...] = ()) -> Program:
            program = Program(*arguments, cwd=tmp_path, python=python)
            stack.callback(program.close)
            return program

        yield start


@pytest.fixture
def configure(tmp_path: Path) -> Callable[[str], None]:
    """Write config.yml to the program's folder."""

    def write(text: str) -> None:
        (tmp_path / "config.yml").write_text(text, encoding="utf-8")

    return write


Configure = Callable[[str], None]
HERE = ("--host", "127.0.0.1", "--port", "0")


def get_json(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())


def ask(port: int, path: str) -> socket.socket:
    """A connection that has sent a request and has not read the answer."""
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: tv\r\n\r\n".encode())
    return sock


#### Serving ####


def test_health_reports_the_running_process(run: Run) -> None:
    port = run("--demo", *HERE).listening_port()
    health = get_json(port, "/health")
    assert 0 <= health.pop("uptime_seconds") < TIMEOUT
    assert health == {"status": "ok", "streams": 1, "viewers": 0}


def test_demo_plays_without_a_configuration(run: Run) -> None:
    port = run("--demo", *HERE).listening_port()
    with Watch(port, "/test-card") as viewer:
        assert viewer.status == 200
        assert viewer.headers["Content-Type"] == "video/mp2t"
        clip = viewer.read(len(pipe.test_card_segment(0)))
        assert get_json(port, "/health")["viewers"] == 1
    assert media.decode(clip).starts_with_key


def test_demo_does_not_read_the_default_file(run: Run, configure: Configure) -> None:
    configure("broken: [")
    port = run("--demo", *HERE).listening_port()
    assert get_json(port, "/health")["streams"] == 1


def test_demo_is_added_to_the_streams_of_a_named_file(run: Run, configure: Configure) -> None:
    configure("streams: {news: 'http://origin.example/x.m3u8'}")
    program = run("--demo", "-c", "config.yml", *HERE)
    assert get_json(program.listening_port(), "/health")["streams"] == 2
    program.wait_for(r"the test card: http://127\.0\.0\.1:\d+/test-card$")


def test_stream_of_the_default_file_is_served(
    run: Run, configure: Configure, origin: Origin
) -> None:
    news = origin.add(Playlist("news", media.ts_segments(4)))
    configure(f"streams: {{news: '{news.url}'}}")
    port = run(*HERE).listening_port()
    with Watch(port, "/news") as viewer:
        assert viewer.read_all() == (news.plain(0, 4), True)


def test_command_line_overrides_host_and_port_of_the_file(run: Run, configure: Configure) -> None:
    configure("server: {host: 192.0.2.1, port: 1}")
    program = run(*HERE)
    assert program.wait_for(r"listening on (\S+) port")[1] == "127.0.0.1"
    assert get_json(program.listening_port(), "/health")["status"] == "ok"


def test_server_without_streams_warns_and_runs(run: Run, configure: Configure) -> None:
    configure("server: {name: TV}")
    program = run(*HERE)
    assert get_json(program.listening_port(), "/")["streams"] == 0
    program.wait_for(r"(?i) warning no streams are configured")


#### The first screen of the log ####


def first_screen(program: Program) -> list[str]:
    """The lines of the log up to the one with the port, without time and level."""
    program.listening_port()
    program.send(signal.SIGTERM)
    lines = [re.sub(r"^\S+ \S+ \S+ ", "", line) for line in program.errors()]
    return lines[: [" listening on " in line for line in lines].index(True) + 1]


def test_first_screen_of_the_demo_has_the_addresses(run: Run) -> None:
    opened, players, card, last = first_screen(run("--demo", *HERE))
    port = last.split()[-1]
    assert opened == f"open http://127.0.0.1:{port}/ in a browser"
    assert players == f"players: http://127.0.0.1:{port}/playlist.m3u"
    assert card == f"the test card: http://127.0.0.1:{port}/test-card"
    version = f"StreamPipe {pipe.__version__}"
    assert last == f"{version}: 1 stream, listening on 127.0.0.1 port {port}"


def test_first_screen_has_no_line_for_each_stream(run: Run, configure: Configure) -> None:
    configure("streams: {a: 'hls://u', b: 'hls://u', c: 'hls://u'}")
    screen = first_screen(run(*HERE))
    assert len(screen) == 3
    assert ": 3 streams, listening on " in screen[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_server_on_all_interfaces_shows_an_address_that_others_can_open(
    run: Run, configure: Configure, host: str
) -> None:
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    configure(f"server: {{host: '{host}', port: 0}}")
    program = run()
    address = program.wait_for(r"open http://(\S+):\d+/ in a browser")[1]
    assert address != host
    port = program.listening_port()
    with socket.create_connection((address, port), TIMEOUT):
        pass  # the address is reachable
    with Watch(port, "/", Accept=BROWSER, Host=f"LocalHost:{port}") as page:
        assert f"http://{address}:{port}/playlist.m3u" in page.read_all()[0].decode()


def test_ipv6_address_has_brackets(run: Run, configure: Configure) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    configure("server: {host: '::1', port: 0}")
    program = run()
    assert program.wait_for(r"players: (\S+):\d+/playlist.m3u$")[1] == "http://[::1]"


def test_public_url_is_the_one_to_open(run: Run, configure: Configure) -> None:
    configure("server: {public_url: 'https://tv.example/x/'}")
    screen = first_screen(run(*HERE))
    assert screen[0] == "open https://tv.example/x/ in a browser"
    assert screen[1] == "players: https://tv.example/x/playlist.m3u"


def test_log_says_that_a_token_is_required_and_hides_it(run: Run, configure: Configure) -> None:
    configure(f"server: {{token: {SECRET}}}")
    screen = first_screen(run(*HERE))
    assert any(line.startswith("a token is required: ") for line in screen)
    assert not any(SECRET in line for line in screen)


def test_token_is_read_from_an_environment_variable(
    run: Run, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TV_TOKEN", SECRET)
    configure('server: {token: "${TV_TOKEN}"}')
    program = run(*HERE, "--log-level", "debug")
    port = program.listening_port()
    assert "streams" in get_json(port, f"/status?token={SECRET}")
    for wrong in ("", "?token=${TV_TOKEN}"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", f"/status{wrong}")
            assert connection.getresponse().status == 401
    program.send(signal.SIGTERM)
    assert program.wait(EXIT_TIME) == 0
    assert [line for line in program.errors() if SECRET in line] == []


#### Ending ####


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_disconnects_the_viewers_and_ends_with_status_0(
    run: Run, number: signal.Signals
) -> None:
    program = run("--demo", *HERE)
    port = program.listening_port()
    with Watch(port, "/test-card") as first, Watch(port, "/test-card") as second:
        assert first.read(188)[:1] == second.read(188)[:1] == b"G"
        program.send(number)
        assert program.wait(EXIT_TIME) == 0
        for viewer in (first, second):
            assert not viewer.read_all()[1], "without a final chunk, players reconnect"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows loaded packages")
@pytest.mark.parametrize("end", [False, True], ids=["reload", "reload and end"])
def test_signals_during_the_start_are_not_lost(run: Run, end: bool) -> None:
    """A service manager may reload or stop a service that it has just started."""
    program = run("--demo", *HERE)
    program.wait_until_packages_load()
    program.send(signal.SIGHUP)
    if end:
        program.send(signal.SIGTERM)
        assert program.wait() == 0
    else:
        program.listening_port()
        program.wait_for("reloaded: no change")


def test_signal_ends_a_check(run: Run, configure: Configure, origin: Origin) -> None:
    news = origin.add(Playlist("news", media.ts_segments(), mode="live"))
    stall = origin.fault("/news/index.m3u8", StallHeaders(), times=None)
    configure(f"streams: {{news: 'hls://{news.url}'}}")
    program = run("--check")
    stall.wait_held()
    program.send(signal.SIGTERM)
    assert program.wait(EXIT_TIME) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        pytest.param("/news/index.m3u8", StallHeaders(), id="playlist's head"),
        pytest.param("/news/index.m3u8", Stall(20), id="playlist's body"),
        pytest.param("/news/*.ts", StallHeaders(), id="segments' heads"),
        pytest.param("/news/*.ts", Stall(1000), id="segments' bodies"),
    ],
)
def test_hanging_origin_does_not_delay_the_end(
    run: Run, configure: Configure, origin: Origin, path: str, fault: Fault
) -> None:
    news = origin.add(Playlist("news", media.ts_segments(), mode="live"))
    configure(f"streams: {{news: 'hls://{news.url}'}}")
    program = run(*HERE)
    stall = origin.fault(path, fault, times=None)
    with contextlib.closing(ask(program.listening_port(), "/news")):
        stall.wait_held()
        program.send(signal.SIGTERM)
        assert program.wait(EXIT_TIME) == 0


def test_silent_viewer_does_not_delay_the_end(run: Run) -> None:
    program = run("--demo", *HERE)
    port = program.listening_port()
    with socket.create_connection(("127.0.0.1", port), TIMEOUT):
        get_json(port, "/health")  # the silent connection was accepted before this one
        program.send(signal.SIGTERM)
        assert program.wait(EXIT_TIME) == 0


def test_second_signal_ends_at_once(run: Run) -> None:
    program = run("--demo", *HERE)
    program.listening_port()
    program.send(signal.SIGINT)
    program.wait_for("shutting down")
    program.send(signal.SIGINT)
    assert program.wait(EXIT_TIME) == 1, "only the first signal ends with status 0"


def test_closed_stdout_causes_no_error(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(PIPE), "--demo", *HERE]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert any("listening on" in line for line in lines)
        try:
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_TIME) == 0
            assert "Traceback" not in "".join(lines)
        finally:
            process.kill()


def test_reader_of_the_findings_may_close_the_pipe(tmp_path: Path) -> None:
    command = f"exec '{sys.executable}' '{PIPE}' --demo --check | true"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert "Error" not in done.stderr


def test_unread_log_does_not_delay_the_end(tmp_path: Path) -> None:
    command = [sys.executable, str(PIPE), "--demo", *HERE, "--log-level", "debug"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = (re.search(r"listening on \S+ port (\d+)", line) for line in process.stderr)
        port = int(next(filter(None, found))[1])
        try:
            for _ in range(1_500):  # more lines than a pipe of 64 KiB holds
                assert answers(port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_TIME) == 0
        finally:
            process.kill()


def answers(port: int) -> bool:
    with contextlib.closing(ask(port, "/health")) as sock:
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            return bool(sock.recv(100))
    return False


#### Failed starts ####


def test_port_in_use_is_reported_in_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        program = run("--demo", "--host", "127.0.0.1", "--port", str(port))
        assert program.wait() == 1
    (line,) = program.errors()
    assert f" cannot listen on 127.0.0.1 port {port}: " in line
    assert line.endswith("; choose another with --host or --port")
    assert LOG_LINE.fullmatch(line)


def test_host_of_another_machine_is_reported(run: Run) -> None:
    program = run("--demo", "--host", "192.0.2.1")
    assert program.wait() == 1
    (line,) = program.errors()
    assert " cannot listen on 192.0.2.1 port 8080: " in line
    assert line.endswith("; this machine has no such address: --host 0.0.0.0 takes all it has")


def test_port_that_needs_root_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fake: the tests may run as root, and containers allow every user every port."""

    def refuse(server: pipe.Server) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pipe.Server, "server_bind", refuse)
    config = pipe.Config(pipe.ServerSettings(port=80))
    assert pipe.serve(config, queue.SimpleQueue(), lambda: config, lambda config: None) == 1
    expected = "cannot listen on 0.0.0.0 port 80: [Errno 13] Permission denied; "
    expected += "a port below 1024 needs root: choose another with --port"
    assert [record.getMessage() for record in caplog.records] == [expected]


@pytest.mark.parametrize("host", ["192.0.2.1", "fe80::x", "a\\0b"])
def test_host_without_an_address_is_reported_in_one_line(
    run: Run, configure: Configure, host: str
) -> None:
    configure(f'server: {{host: "{host}", port: 0}}')
    program = run()
    assert program.wait() in (1, 2)
    assert len(program.errors()) == 1


def test_missing_packages_are_reported(run: Run) -> None:
    program = run("--demo", python=("-S",))
    assert program.wait() == 1
    (line,) = program.errors()
    assert re.fullmatch(r"StreamPipe needs its packages \(.+\): pip install -r .+", line)


def test_missing_home_is_reported_in_one_line(tmp_path: Path) -> None:
    """A fake: only a user without a passwd entry and without HOME has no home directory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib\n"
        "def home(*_):\n"
        "    raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = home\n"
    )
    done = subprocess.run(
        [sys.executable, PIPE, "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("StreamPipe cannot start: Could not determine home directory. Set ")


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limit of another process")
def test_limit_of_open_files_is_reported_in_one_line(run: Run) -> None:
    program = run("--demo", *HERE)
    port = program.listening_port()
    program.limit_files(40)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
        program.wait_for("no connection can be accepted: raise the limit of open files")
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    ) as client:
        client.request("GET", "/health")
        assert client.getresponse().status == 200, "the server recovers"
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert sum("no connection can be accepted" in line for line in program.errors()) == 1


def test_usage_error_ends_with_status_2(run: Run) -> None:
    program = run("--port", "70000")
    assert program.wait() == 2
    usage, *_, last = program.errors()
    assert usage.startswith("usage: pipe.py [-h] ")
    assert last == "pipe.py: error: argument --port: expected a number from 0 to 65535"
    assert program.output() == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["--port", "-1"], "expected a number from 0 to 65535", id="negative port"),
        pytest.param(["--port", "http"], "expected a number from 0 to 65535", id="port's name"),
        pytest.param(["--port"], "expected one argument", id="no port"),
        pytest.param(["--colour"], "unrecognized arguments: --colour", id="unknown option"),
        pytest.param(["--log-level", "loud"], "invalid choice: 'loud'", id="unknown level"),
    ],
)
def test_usage_error_is_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        pipe.main(arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_missing_default_file_is_reported_with_the_next_steps(run: Run) -> None:
    program = run()
    assert program.wait() == 2
    assert program.errors() == [
        "config.yml: no such file; write one as in README's Quick start "
        "(config.example.yml has every option), or run: python pipe.py --demo"
    ]


def test_missing_named_file_is_reported(run: Run) -> None:
    program = run("--demo", "--config", "tv.yml")
    assert program.wait() == 2
    (line,) = program.errors()
    assert line.startswith("tv.yml: no such file; ")
    assert "config.example.yml" in line


def test_every_mistake_of_the_file_has_its_line(run: Run, configure: Configure) -> None:
    configure("server: {port: 99999}\nstreams:\n  health: u\n  a: {titel: A}\n")
    program = run()
    assert program.wait() == 2
    assert program.errors() == [
        'config.yml:1: server.port: expected a whole number from 0 to 65535, got "99999"',
        "config.yml:3: streams.health: this name is reserved: choose another",
        "config.yml:4: streams.a.titel: unknown key: did you mean title?",
        "config.yml:4: streams.a: url is missing",
    ]
    assert program.output() == ""


def test_invalid_yaml_is_reported_in_one_line(run: Run, configure: Configure) -> None:
    configure("streams:\n\tnews: u\n")
    program = run()
    assert program.wait() == 2
    assert program.errors() == ["config.yml:2: invalid YAML: found a tab: use spaces"]


def test_stream_with_the_name_of_the_demo_is_a_mistake(run: Run, configure: Configure) -> None:
    configure("streams: {test-card: 'http://origin.example/x.m3u8'}")
    program = run("--demo", "-c", "config.yml")
    assert program.wait() == 2
    (line,) = program.errors()
    assert line.endswith("streams.test-card: --demo adds a stream with this name: rename yours")


#### Output ####


def test_version_names_streampipe_streamlink_and_python(run: Run) -> None:
    program = run("--version")
    assert program.wait() == 0
    numbers = r"\d+\.\d+\.\d+\S*"
    pattern = rf"StreamPipe {numbers}, streamlink {numbers}, Python {numbers}\n"
    assert re.fullmatch(pattern, program.output())
    assert program.errors() == []


def test_help_is_written_to_stdout(run: Run) -> None:
    program = run("--help")
    assert program.wait() == 0
    assert program.output().startswith("usage: pipe.py [-h] ")
    assert program.errors() == []


def test_log_is_written_only_to_stderr(run: Run) -> None:
    program = run("--demo", *HERE)
    port = program.listening_port()
    with Watch(port, "/test-card") as viewer:
        viewer.read(188)
    program.send(signal.SIGTERM)
    assert program.wait(EXIT_TIME) == 0
    assert program.output() == ""
    lines = program.errors()
    assert len(lines) >= 4
    assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []


def test_viewers_arrival_and_departure_are_logged(run: Run) -> None:
    program = run("--demo", *HERE)
    with Watch(program.listening_port(), "/test-card") as viewer:
        viewer.read(188)
        program.wait_for(r" test-card: viewer 127\.0\.0\.1 started watching$")
    program.wait_for(r" test-card: viewer 127\.0\.0\.1 left: \d+ bytes in \d+\.\d s, 0 skips$")


def test_log_level_error_is_silent(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = run("--demo", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error")
    wait_for_listener(port)
    with Watch(port, "/test-card") as viewer:
        assert viewer.read(188)[:1] == b"G"
    program.send(signal.SIGTERM)
    assert program.wait(EXIT_TIME) == 0
    assert (program.errors(), program.output()) == ([], "")


def wait_for_listener(port: int) -> None:
    """Wait until a program listens whose log does not show it: try to connect."""
    deadline = time.monotonic() + TIMEOUT
    pause = threading.Event()
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
            return
        pause.wait(0.02)
    pytest.fail("the program does not listen")


@pytest.mark.parametrize("secret", [SECRET, "${TV_SECRET}"], ids=["written", "in a variable"])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_log_shows_only_the_host_of_an_address(
    run: Run,
    configure: Configure,
    origin: Origin,
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    secret: str,
) -> None:
    monkeypatch.setenv("TV_SECRET", SECRET)
    address = f"http://user:{secret}@127.0.0.1:{origin.port}/{secret}/x.m3u8?token={secret}"
    configure(f"streams: {{news: {{url: '{address}', headers: {{Cookie: '{secret}'}}}}}}")
    program = run(*HERE, "--log-level", level)
    with Watch(program.listening_port(), "/news") as viewer:
        assert viewer.status == 502
        assert viewer.read_all() == (b'{"error": "the origin answered 404"}\n', True)
    program.send(signal.SIGTERM)
    assert program.wait(EXIT_TIME) == 0
    assert any("news: address 1 of 1 (127.0.0.1): " in line for line in program.errors())
    assert [line for line in program.errors() if SECRET in line] == []
