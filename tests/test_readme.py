"""README's examples are run unchanged, except for addresses and ports.

.ci/run runs the first two commands, test_container.py the Dockerfile and its commands,
test_proxies.py the configurations of proxies; test_docs.py analyzes the unit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

import pipe
from tests import media
from tests.origin import Origin, Playlist, Status, master
from tests.program import eventually
from tests.test_cli import HERE, TIMEOUT, Program
from tests.test_docs import README, blocks, section

ADDRESS = "http://localhost:8080"


def test_number_of_examples_is_known() -> None:
    fences = re.findall(r"^```(.*)$", README, re.M)
    several = {"sh": 4, "yaml": 6, "text": 3}
    once = ["console", "dockerfile", "haproxy"]
    twice = ["ini", "nginx", "conf"]
    assert Counter(fences[::2]) == several | dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    assert set(fences[1::2]) == {""}


def read(text: str) -> Mapping[str, pipe.StreamSettings]:
    """The streams of a configuration; raises an error if it is invalid."""
    return pipe.ConfigReader("README.md", pipe.engine_options()).read(text).streams


PROVIDER = "https://example.com/get.php?username=u&password=p&type=m3u_plus"


def test_quick_start_is_a_working_command_and_four_working_lines(
    origin: Origin, tmp_path: Path
) -> None:
    """The command is valid in a shell, and both examples serve their streams."""
    quick_start = section("Quick start")
    (command,) = re.findall(r'`python pipe\.py ("https.+?")`', quick_start)
    (text,) = re.findall(r"```yaml\n(.+?)```", quick_start, re.S)
    assert quick_start.index(command) < quick_start.index(text), (
        "the command must be above the file"
    )
    assert len(text.splitlines()) == 4
    playlist = origin.add(Playlist("one", media.ts_segments(), mode="live", clock=True))
    origin.add_file("/get.php", f"#EXTM3U\n#EXTINF:-1,One\n{playlist.url}\n".encode())
    news = "https://example.com/news/master.m3u8"
    here = text.replace(PROVIDER, f"{origin.url}/get.php?username=u").replace(news, playlist.url)
    (tmp_path / "config.yml").write_text(here, encoding="utf-8")
    argument = shlex.split(command)
    assert argument == [PROVIDER]
    for arguments, count in (([f"{origin.url}/get.php?username=u"], 1), ([], 2)):
        with contextlib.closing(Program(*arguments, *HERE, cwd=tmp_path)) as program:
            address = f"http://127.0.0.1:{program.listening_port()}"
            eventually(lambda at=address, n=count: streams_at(at) == n, "the list is loaded")  # type: ignore[misc]
            with urlopen(f"{address}/one", timeout=TIMEOUT) as answer:
                assert answer.read(1) == b"G"


def streams_at(address: str) -> int:
    with urlopen(f"{address}/health", timeout=TIMEOUT) as answer:
        return int(json.load(answer)["streams"])


def test_all_configurations_are_valid() -> None:
    configurations = [text for text in blocks("yaml") if "streams:\n" in text]
    assert len(configurations) == 3
    assert all(read(text) for text in configurations)


def test_options_in_troubleshooting_are_valid() -> None:
    """The options suggested under Troubleshooting are valid as written there."""
    suggested = re.findall(r"`([a-z_]+): ([^`]+)`", section("Troubleshooting"))
    assert {key for key, _ in suggested} >= {"quality", "threads", "url", "headers"}
    for key, value in suggested:
        settings = {"url": "https://example.com/x.m3u8", key: yaml.safe_load(value)}
        assert read(yaml.safe_dump({"streams": {"news": settings}}))


def promtool(*arguments: str) -> None:
    if not shutil.which("promtool"):
        assert "CI" not in os.environ, "CI must install promtool"
        pytest.skip("needs promtool")
    command = ["promtool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    """test_operators.py tests whether they fire, in a real outage."""
    (text,) = [text for text in blocks("yaml") if "- alert: " in text]
    assert text.count("- alert: ") == 4
    file = tmp_path / "rules.yml"
    file.write_text(text, encoding="utf-8")
    promtool("check", "rules", "--lint-fatal", str(file))


def test_prometheus_accepts_the_configuration(tmp_path: Path) -> None:
    (text,) = [text for text in blocks("yaml") if "scrape_configs:" in text]
    secured = text.replace("streampipe\n", "streampipe\n    authorization: {credentials: s3cret}\n")
    assert "`authorization: {credentials: s3cret}` beside `job_name`" in README
    for number, content in enumerate((text, secured)):
        file = tmp_path / f"{number}.yml"
        file.write_text(content, encoding="utf-8")
        promtool("check", "config", str(file))


def without_numbers(text: str) -> str:
    """Replaces values that differ from run to run: times and counts."""
    text = re.sub(r"^Date: .+$", "Date: now", text, flags=re.M)
    return re.sub(r'(?<=": )\d+|\d+\.\d\d(?= s)', "N", text)


def test_console_example_shows_real_answers(tmp_path: Path) -> None:
    (console,) = blocks("console")
    steps = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)+)", console, re.M)
    assert len(steps) == 3
    with contextlib.closing(Program("--demo", *HERE, cwd=tmp_path)) as program:
        address = f"http://127.0.0.1:{program.listening_port()}"
        for command, shown in steps:
            assert ADDRESS in command
            here = ["bash", "-c", command.replace(ADDRESS, address)]
            output = subprocess.run(here, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT)
            answer = output.stdout.decode("latin-1").replace("\r\n", "\n")
            if shown.endswith("\n...\n"):  # followed by media
                head, _, body = answer.partition("\n\n")
                assert body.startswith("G")
                answer = f"{head}\n\n...\n"
            assert without_numbers(answer).strip() == without_numbers(shown).strip()


def test_check_prints_the_output_in_readme(origin: Origin, tmp_path: Path) -> None:
    (example,) = [text for text in blocks("text") if text.startswith("$ python pipe.py --check\n")]
    small, large = (Playlist(name, media.ts_segments(4)) for name in ("small", "large"))
    picture = Playlist("picture", media.video_only_segments(4))
    sound = Playlist("sound", media.audio_only_segments(4))
    streams = {
        "news": origin.add(master("news", {"480p": small, "720p": large})).url,
        "films": origin.add(master("films", {"720p": picture}, audio=sound)).url,
        "sport": f"{origin.url}/sport.m3u8",
    }
    origin.fault("/sport.m3u8", Status(403), times=None)
    options = {"streamlink": {"ffmpeg-ffmpeg": "/nonexistent"}}
    text = yaml.safe_dump({"streams": streams, "options": options}, sort_keys=False)
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    with contextlib.closing(Program("--check", cwd=tmp_path)) as program:
        assert program.wait() == 1
        expected = example.partition("\n")[2]
        assert without_numbers(program.output()) == without_numbers(expected)


def test_unit_restarts_too_slowly_for_the_start_limit() -> None:
    """systemd allows five starts within 10 s; beyond that limit the unit would stay stopped."""
    unit = README
    found = re.search(r"^RestartSec=(\d+)$", unit, re.M)
    assert found
    assert int(found[1]) * 4 > 10
