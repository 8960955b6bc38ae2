"""README's container: built and run by Docker if there is one, and simulated in a plain folder.

In the simulation, the steps of the Dockerfile are applied to a folder.  The program runs as in the
container: without root's privileges, and with a read-only file system except for /tmp.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import pipe
from tests import media
from tests.origin import Origin, Playlist, master
from tests.program import eventually
from tests.server import Watch
from tests.test_docs import blocks
from tests.test_tracks import count

ROOT = Path(pipe.__file__).parent
(DOCKERFILE,) = blocks("dockerfile")
LINES = "".join(blocks("sh")).splitlines()
BUILD, RUN, RELOAD = [line for line in LINES if line.startswith("docker ")]
TIMEOUT = 20.0  # seconds; longer than anything a test waits for, except pip and docker
PATIENCE = 600.0  # seconds for pip and docker

# Make all files read-only, mount an empty /tmp, and run the command without privileges.
SANDBOX = """
mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -o remount,bind,ro / &&
mount -t tmpfs tmpfs /tmp && exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""

pytestmark = pytest.mark.long


#### The steps in a plain folder ####


class Image:
    """A folder with the files of the Dockerfile's image; `commands` maps keywords to commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: dict[str, list[str]] = {}
        for line in re.sub(r"(?<![\w.])/(?=app|config)", f"{folder}/", DOCKERFILE).splitlines():
            keyword, _, value = line.partition(" ")
            self._step(keyword, value)

    def _step(self, keyword: str, value: str) -> None:
        if keyword == "FROM":
            assert re.fullmatch(r"python:3\.1[0-4]-slim", value)
            assert self.run([sys.executable, "-m", "venv", str(self.folder)])
        elif keyword == "COPY":
            *names, target = value.split()
            Path(target).mkdir()
            for name in names:
                shutil.copy(ROOT / name, target)
        elif keyword == "RUN" and value.startswith("pip "):
            assert self.run(["python", "-m", *value.split()])
        elif keyword in ("HEALTHCHECK", "ENTRYPOINT"):
            self.commands[keyword] = json.loads(value.removeprefix("CMD "))
        else:  # not needed in a folder; ffmpeg is installed on the machine
            assert keyword in ("RUN", "USER", "EXPOSE")

    def path(self, program: str) -> str:
        return str(self.folder / "bin" / "python") if program == "python" else program

    def run(self, command: list[str]) -> bool:
        """Run a command of the image; returns whether it succeeded."""
        command = [self.path(command[0]), *command[1:]]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        return done.returncode == 0


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if not shutil.which("ffmpeg"):
        assert "CI" not in os.environ, "CI must install ffmpeg"
        pytest.skip("needs ffmpeg")
    if not is_read_only_possible():
        pytest.skip("needs root and the permission to mount")
    # Not in /tmp, because the container's /tmp hides it.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Image(Path(folder))


def is_read_only_possible() -> bool:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = sandboxed(folder, "sh", "-c", 'touch /tmp/x && ! touch "$0"/x', folder)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def sandboxed(folder: str | Path, *command: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", SANDBOX, str(folder), *command]


class Container:
    """The program of the image, running with its own configuration and port."""

    def __init__(self, image: Image, streams: dict[str, str]) -> None:
        self._image = image
        self._config = image.folder / "config" / "config.yml"
        self._config.parent.mkdir(exist_ok=True)
        self.configure(streams)
        program, *arguments = image.commands["ENTRYPOINT"]
        here = ["--host", "127.0.0.1", "--port", "0"]
        command = sandboxed(image.folder, image.path(program), *arguments, *here)
        with tempfile.TemporaryFile() as log:
            self._log = os.dup(log.fileno())
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(lambda: "listening on" in self.log, "the program listens")
        self.port = int(self.log.rpartition("port ")[2])

    @property
    def log(self) -> str:
        return os.pread(self._log, 1_000_000, 0).decode()

    def configure(self, streams: dict[str, str]) -> None:
        self._config.write_text(yaml.safe_dump({"streams": streams}), encoding="utf-8")

    def is_healthy(self) -> bool:
        """The result of the health check."""
        command = self._image.commands["HEALTHCHECK"]
        assert "8080" in command[-1]
        return self._image.run([*command[:-1], command[-1].replace("8080", str(self.port))])

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._log)


@pytest.fixture
def start(image: Image) -> Iterator[Callable[[dict[str, str]], Container]]:
    with contextlib.ExitStack() as stack:

        def run(streams: dict[str, str]) -> Container:
            container = Container(image, streams)
            stack.callback(container.close)
            return container

        yield run


Start = Callable[[dict[str, str]], Container]


def separate_sound(origin: Origin) -> str:
    picture = Playlist("picture", media.video_only_segments(30), mode="live", clock=True)
    sound = Playlist("sound", media.audio_only_segments(30), mode="live", clock=True)
    return origin.add(master("apart", {"360p": picture}, audio=sound)).url


def test_separate_sound_plays_if_only_tmp_is_writable(origin: Origin, start: Start) -> None:
    container = start({"apart": separate_sound(origin)})
    with Watch(container.port, "/apart") as viewer:
        assert viewer.status == 200
        received = count(viewer.read(sum(map(len, media.video_only_segments(30)[:4]))))
    assert received["video"] > 25
    assert received["audio"] > 25


def test_health_check_detects_whether_the_program_runs(start: Start) -> None:
    container = start({})
    assert container.is_healthy()
    assert container.end() == 0
    assert not container.is_healthy()


def test_signal_of_the_reload_command_reloads_the_configuration(start: Start) -> None:
    container = start({"one": "http://origin.example/x.m3u8"})
    container.configure({"one": "http://origin.example/x.m3u8", "two": "http://origin.example/y"})
    found = re.fullmatch(r"docker kill --signal=(\w+) streampipe", RELOAD)
    assert found
    container.process.send_signal(signal.Signals[f"SIG{found[1]}"])
    eventually(lambda: "reloaded: 1 stream added" in container.log, "the configuration is reloaded")


def test_run_command_fits_the_dockerfile() -> None:
    """It mounts the configuration, publishes the port, and makes all but /tmp read-only."""
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    folder = Path(json.loads(entrypoint)[-1]).parent
    assert f'-v "$PWD/config:{folder}:ro"' in RUN
    assert f"-p 8080:{re.findall('^EXPOSE (.+)$', DOCKERFILE, re.M)[0]} " in RUN
    assert " --read-only --tmpfs /tmp " in RUN
    assert " --restart unless-stopped " in RUN


#### With Docker ####


def docker(*arguments: str) -> str:
    command = ["docker", *arguments]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
    )
    return done.stdout.decode()


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Path]:
    """A folder with all files that README's commands need; removes their container afterwards."""
    try:
        docker("info")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs Docker and its engine")
    for name in ("pipe.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE, encoding="utf-8")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yml").write_text("streams: {}", encoding="utf-8")
    yield tmp_path
    with contextlib.suppress(subprocess.CalledProcessError):
        docker("rm", "-f", "streampipe")


def test_commands_build_run_and_reload_the_container(context: Path) -> None:
    for command in (BUILD, RUN):
        subprocess.run(["bash", "-c", command], cwd=context, check=True, timeout=PATIENCE)
    state = ("inspect", "--format", "{{.State.Health.Status}}", "streampipe")
    eventually(lambda: docker(*state).strip() == "healthy", "the container is healthy", timeout=90)
    with Watch(8080, "/health") as answer:
        assert answer.status == 200
        assert answer.read_all()[1]
    docker("exec", "streampipe", "sh", "-c", "ffmpeg -version && touch /tmp/x && ! touch /app/x")
    docker("exec", "streampipe", "python", "/app/pipe.py", "--demo", "--check")
    streams = "streams: {news: 'http://origin.example/x.m3u8'}"
    (context / "config" / "config.yml").write_text(streams, encoding="utf-8")
    subprocess.run(["bash", "-c", RELOAD], cwd=context, check=True, timeout=PATIENCE)
    eventually(
        lambda: "reloaded: " in docker("logs", "streampipe"), "the configuration is reloaded"
    )
