"""README, config.example.yml, --help and requirements.txt agree with the code; pure."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipe

ROOT = Path(pipe.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "config.example.yml").read_text(encoding="utf-8")

SERVER = {field.name for field in dataclasses.fields(pipe.ServerSettings)}
OPTIONS = {field.name for field in dataclasses.fields(pipe.Options)}
# The key `url` sets the field `urls`.
STREAM = {*pipe.readers_of(pipe.StreamSettings), "url"}
PLAYLIST = {*pipe.readers_of(pipe.PlaylistSettings), "url"}


def as_yaml(value: object) -> object:
    """A default value, converted to the types of YAML."""
    if isinstance(value, tuple | list):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def defaults(settings: object, prefix: str, names: set[str]) -> dict[str, object]:
    return {f"{prefix}.{name}": as_yaml(getattr(settings, name)) for name in names}


EVERY_DEFAULT = {
    **defaults(pipe.ServerSettings(), "server", SERVER),
    **defaults(pipe.Options(), "options", OPTIONS),
    **defaults(pipe.StreamSettings("", ()), "streams.NAME", STREAM - {"url"}),
    **defaults(pipe.PlaylistSettings("", ""), "playlists.NAME", PLAYLIST - {"url"}),
    # README has no literal for these three.
    "playlists.NAME.url": "required",
    "streams.NAME.url": "required",
    "streams.NAME.title": "the name",
}


def blocks(language: str) -> list[str]:
    """The fenced code blocks of README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    """A part of README: the text below a heading or within a folded section."""
    if f"\n## {title}\n" in README:
        return re.split(r"\n## |\n<details>", README.split(f"\n## {title}\n")[1])[0]
    return README.split(f"\n<summary><b>{title}</b>: ")[1].split("\n</details>\n")[0]


def table(title: str) -> list[list[str]]:
    """The cells of the table in a section, without the head."""
    rows = re.findall(r"^\| ?(.*?) ?\|$", section(title), re.M)[2:]
    return [re.split(r" ?\| ?", row) for row in rows]


def option_table() -> dict[str, object]:
    """The default of each option, according to README."""
    rows = {}
    for option, default, *_ in table("Configuration"):
        literal = re.fullmatch(r"`(.+)`", default)
        rows[option.strip("`")] = yaml.safe_load(literal[1]) if literal else default
    return rows


def typed(values: Mapping[str, object]) -> dict[str, tuple[type, object]]:
    """Adds the type to each value, so that 20 and 20.0 compare unequal."""
    return {key: (type(value), value) for key, value in values.items()}


#### The shape of README ####


def test_front_of_readme_is_short() -> None:
    front = README.split("\n<details>\n")[0]
    assert len(front.splitlines()) <= 120
    assert re.findall(r"^## (.+)$", front, re.M) == [
        *("Start it", "Which address do I type on my television?", "Quick start", "Players"),
        *("Troubleshooting", "Updating"),
    ]


def test_rest_of_readme_is_folded_and_ends_with_changelog() -> None:
    rest = README.split("\n<details>\n", 1)[1]
    parts = rest.split("\n<details>\n")
    titles = [part[: part.index("</b>: ")].removeprefix("<summary><b>") for part in parts]
    assert titles[0] == "Configuration"
    assert titles[-1] == "Changelog"
    assert len(titles) == len(set(titles))
    # GitHub needs an empty line after the summary to render the Markdown below it.
    assert all(re.match(r"<summary>.+</summary>\n\n", part) for part in parts)
    between = [part.split("\n</details>\n")[1] for part in parts]
    assert "".join(between[:-1]).strip() == ""
    assert between[-1].startswith("\nMIT license, see [LICENSE](LICENSE).")


def test_sections_that_readme_refers_to_exist() -> None:
    for title in re.findall(r'(?:see |\()"([^"]+)"|"([^"]+)" below', README):
        assert section(title[0] or title[1])


def test_tables_of_readme_are_complete() -> None:
    """Every row has as many cells as the head, and only cells of the first column may be empty."""
    for rows in re.findall(r"(?:^\|.*\|\n)+", README, re.M):
        head, _, *body = [re.split(r" ?\| ?", row)[1:-1] for row in rows.splitlines()]
        assert {len(row) for row in body} == {len(head)}, head
        for column in range(1, len(head)):
            assert all(row[column] for row in body), head


def test_inline_code_does_not_span_lines() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    assert [code for code in re.findall(r"`[^`]*`", text) if "\n" in code] == []


def test_picture_of_readme_is_small() -> None:
    (path,) = re.findall(r"^!\[.+\]\((.+)\)$", README, re.M)
    picture = (ROOT / path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150_000


def test_program_gives_the_reasons_that_readme_lists() -> None:
    source = Path(pipe.__file__).read_text(encoding="utf-8")
    tables = section("Troubleshooting").split("| 502, and the reason")[1]
    tables += section("Faults").split("| reason |")[1]
    reasons = re.findall(r"^\| (`.+?) \|", tables, re.M)
    words = [word for row in reasons for word in re.findall(r"`(.+?)`", row)]
    assert len(words) >= 20
    # Of a reason with a status or a list of qualities, only the words before it are in the source.
    assert [
        word for word in words if re.split(r"(?<=available: )|(?=\d)", word)[0] not in source
    ] == []


#### The defaults ####


def test_readme_lists_every_option_with_its_default() -> None:
    assert typed(option_table()) == typed(EVERY_DEFAULT)


@pytest.mark.parametrize(
    ("name", "settings", "names"),
    [("server", pipe.ServerSettings(), SERVER), ("options", pipe.Options(), OPTIONS)],
    ids=["server", "options"],
)
def test_example_has_every_key_with_its_default(
    name: str, settings: object, names: set[str]
) -> None:
    written = yaml.safe_load(EXAMPLE)[name]
    assert typed({f"{name}.{key}": value for key, value in written.items()}) == typed(
        defaults(settings, name, names)
    )


def test_example_shows_every_key_of_a_stream_and_one_of_options() -> None:
    streams: dict[str, Any] = yaml.safe_load(EXAMPLE)["streams"]
    keys = {key for stream in streams.values() if isinstance(stream, dict) for key in stream}
    assert keys == STREAM | {"threads"}
    assert any(isinstance(stream, str) for stream in streams.values())


def test_example_shows_every_key_of_a_playlist_with_its_default_and_one_of_options() -> None:
    playlists: dict[str, Any] = yaml.safe_load(EXAMPLE)["playlists"]
    (written,) = playlists.values()
    assert pipe.list_address(written.pop("url"))
    expected = defaults(pipe.PlaylistSettings("", ""), "", PLAYLIST - {"url"})
    assert typed({f".{key}": value for key, value in written.items()}) == typed(
        {**expected, ".linger": pipe.Options().linger}
    )


def test_example_states_the_default_of_quality() -> None:
    assert f"default: {pipe.StreamSettings('', ()).quality}\n" in EXAMPLE


def test_example_is_a_valid_configuration() -> None:
    config = pipe.load_config(ROOT / "config.example.yml", pipe.engine_options())
    assert list(config.streams) == ["channel1", "channel2"]
    assert list(config.playlists) == ["provider"]
    hosts = re.findall(r"[a-z0-9+]+://([^/\"]+)", EXAMPLE)
    assert {host.split(":")[0] for host in hosts} == {
        *("example.com", "a.example.com", "b.example.com", "127.0.0.1")
    }


def test_every_key_of_the_example_has_a_comment() -> None:
    body = EXAMPLE[EXAMPLE.index("server:") :]
    bare = [
        line.strip() for line in body.splitlines() if line.startswith("  ") and "# " not in line
    ]
    assert [line.split(":")[0] for line in bare] == ["channel1", "channel2", "provider"]


def test_readme_contains_the_example() -> None:
    assert EXAMPLE in blocks("yaml")


@pytest.mark.parametrize(
    ("language", "names"),
    [("haproxy", ["haproxy.cfg"]), ("nginx", ["nginx_one.conf", "nginx.conf"])],
)
def test_readme_shows_the_tested_configurations(language: str, names: list[str]) -> None:
    """nginx's configuration for a single server is the first of the two."""
    tested = [(ROOT / "tests" / name).read_text(encoding="utf-8") for name in names]
    assert blocks(language) == tested


def test_timeouts_of_proxies_exceed_the_longest_silence() -> None:
    options = pipe.Options()
    silence, pause = options.timeout + options.reconnect, options.viewer_timeout
    for name, (from_server, to_client) in {
        "haproxy.cfg": (r"timeout server (\d+)m ", r"timeout client (\d+)m "),
        "nginx.conf": (r"proxy_read_timeout (\d+)m;", r"send_timeout (\d+)m;"),
        "nginx_one.conf": (r"proxy_read_timeout (\d+)m;", r"send_timeout (\d+)m;"),
    }.items():
        text = (ROOT / "tests" / name).read_text(encoding="utf-8")
        assert silence < 60 * float(re.findall(from_server, text)[0])
        assert pause < 60 * float(re.findall(to_client, text)[0])


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """README's unit, changed to start the Python of the tests: systemd checks that it exists."""
    text, _ = blocks("ini")
    file = tmp_path / "streampipe.service"
    file.write_text(with_python(text), encoding="utf-8")
    return file


@pytest.fixture
def reloading_unit(unit: Path) -> Path:
    """The unit with README's drop-in for reloading."""
    _, text = blocks("ini")
    folder = unit.with_name("streampipe.service.d")
    assert f"`/etc/systemd/system/{folder.name}/reload.conf`" in README
    folder.mkdir()
    (folder / "reload.conf").write_text(with_python(text), encoding="utf-8")
    return unit


def with_python(text: str) -> str:
    """The text of a unit, with the Python of the tests in ExecStart."""
    python = re.search(r"^ExecStart=(\S+)", text, re.M)
    assert python
    return text.replace(python[1], sys.executable)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if not program:
        assert "CI" not in os.environ, "CI must install systemd-analyze"
        pytest.skip("needs systemd-analyze")
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["unit", "reloading_unit"])
def test_unit_of_readme_is_valid(name: str, request: pytest.FixtureRequest) -> None:
    file: Path = request.getfixturevalue(name)
    done = analyze("verify", "--man=no", str(file))
    messages = [line for line in done.stderr.splitlines() if "streampipe" in line]
    assert (done.returncode, messages) == (0, [])


def test_mistake_in_the_drop_in_is_detected(reloading_unit: Path) -> None:
    file = reloading_unit.with_name("streampipe.service.d") / "reload.conf"
    file.write_text(file.read_text(encoding="utf-8") + "ExecReloads=x\n", encoding="utf-8")
    assert "Unknown key 'ExecReloads'" in analyze("verify", "--man=no", str(reloading_unit)).stderr


def test_drop_in_of_readme_reads_and_reloads_the_file_itself() -> None:
    unit, drop_in = blocks("ini")
    assert "\nExecReload=/bin/kill -HUP $MAINPID\n" in drop_in
    # Empty assignments reset the settings of the unit.
    assert "\nLoadCredential=\n" in drop_in
    assert "\nExecStart=\nExecStart=" in drop_in
    (source,) = re.findall(r"^LoadCredential=config.yml:(.+)$", unit, re.M)
    commands = re.findall(r"^ExecStart=(.+)$", unit + drop_in, re.M)
    assert commands[0].replace("${CREDENTIALS_DIRECTORY}/config.yml", source) == commands[1]


def test_unit_of_readme_restarts_after_every_failure() -> None:
    """Even status 2 may pass, if the file's disk is mounted late; SIGHUP may end a start."""
    unit, drop_in = blocks("ini")
    assert "\nRestart=always\n" in unit
    assert "\nStartLimitIntervalSec=0\n" in unit.partition("[Service]")[0]
    assert "Prevent" not in unit + drop_in


def test_unit_of_readme_is_hardened(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"exposure level for streampipe.service: (\d+\.\d)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) < 2.0


def test_unit_of_readme_keeps_the_configuration_secret() -> None:
    text, _ = blocks("ini")
    assert "\nLoadCredential=config.yml:/etc/" in text
    assert " -c ${CREDENTIALS_DIRECTORY}/config.yml\n" in text
    # systemd copies credentials only at a start; a reload would read the old file.
    assert "ExecReload=" not in text


def test_readme_lists_all_paths_of_the_server() -> None:
    named = set(re.findall(r"`(?:GET |POST )?(/[a-z0-9_.]+)`", section("HTTP API")))
    served = set(pipe.PAGES) | {"/health"}
    assert served - {"/"} <= named


#### The command line ####


def parser_options() -> dict[str, Any]:
    """The default of each option of the parser."""
    actions = pipe.build_parser()._actions
    return {name: action.default for action in actions for name in action.option_strings}


def option_names(text: str) -> set[str]:
    """The options that a help text lists (its layout differs between versions of Python)."""
    listed = text[text.index("options:") :]
    return set(
        re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(re.findall(r"^  (-.*)", listed, re.M)))
    )


def test_readme_has_the_options_of_the_parser() -> None:
    (block,) = [text for text in blocks("text") if text.startswith("usage: ")]
    assert option_names(block) == set(parser_options())
    assert option_names(block) == option_names(pipe.build_parser().format_help())


def test_readme_repeats_the_texts_of_help() -> None:
    for action in pipe.build_parser()._actions:
        assert str(action.help) in " ".join(section("Command line").split()), action.dest


def test_help_shows_the_defaults() -> None:
    shown = {
        action.dest: found[1]
        for action in pipe.build_parser()._actions
        if (found := re.search(r"\(default: (\S+)\)", action.help or ""))
    }
    assert shown == {"config": "config.yml", "log_level": parser_options()["--log-level"]}


#### Commands, packages, files ####


def test_first_two_commands_run_the_demo_and_the_tests() -> None:
    commands = "".join(blocks("sh")).splitlines()
    assert commands[:2] == [
        "python3 -m venv .venv && . .venv/bin/activate && "
        "pip install -r requirements.txt && python pipe.py --demo",
        "pip install -r tests/requirements.txt && python -m pytest",
    ]


def test_first_two_blocks_of_readme_are_commands() -> None:
    assert re.findall(r"^```([a-z]+)$", README, re.M)[:2] == ["sh", "sh"]


def test_requirements_match_those_of_the_script() -> None:
    source = Path(pipe.__file__).read_text(encoding="utf-8")
    metadata = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", source, re.M)
    assert metadata
    python, packages = re.findall(r"^# [a-z-]+ = (.+)$", metadata[1], re.M)
    assert python == '">=3.10"'
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert yaml.safe_load(packages) == requirements
    least = ".".join(map(str, pipe.LEAST_STREAMLINK))
    assert f"streamlink>={least},<{pipe.LEAST_STREAMLINK[0] + 1}" in requirements


def read_github(path: str) -> Any:
    # BaseLoader, because YAML 1.1 reads the key `on` as a boolean.
    text = (ROOT / ".github" / path).read_text(encoding="utf-8")
    return yaml.load(text, yaml.BaseLoader)


def test_workflow_runs_everything_on_each_python_and_each_week() -> None:
    workflow = read_github("workflows/ci.yml")
    assert {"push", "pull_request", "schedule"} <= set(workflow["on"])
    (times,) = workflow["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", times["cron"]), "once a week"
    jobs = workflow["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(10, 15)]
    for name in ("tests", "development"):
        assert jobs[name]["steps"][-1]["run"] == ".ci/run"
    assert "streamlink/streamlink" in jobs["development"]["steps"][-1]["env"]["STREAMLINK"]


def test_issue_form_requires_version_check_and_log() -> None:
    fields = read_github("ISSUE_TEMPLATE/fault.yml")["body"]
    needed = [
        field["attributes"]["label"]
        for field in fields
        if field.get("validations", {}).get("required") == "true"
    ]
    assert {re.sub(r".*`python pipe.py (.+)`", r"\1", label) for label in needed} >= {
        *("--version", "--check", "The log")
    }


def test_top_level_has_only_the_expected_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    names = {path.split("/")[0] for path in listed.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} == {
        *("pipe.py", "config.example.yml", "requirements.txt", "tests", "README.md", "LICENSE")
    }


def test_readme_shows_answers_of_this_version() -> None:
    (answer,) = blocks("console")
    assert f"\nServer: StreamPipe/{pipe.__version__}\n" in answer
    assert f"\nContent-Type: {pipe.MPEG_TS.media_type}\n" in answer


def test_each_top_level_name_is_assigned_once() -> None:
    """Otherwise one section could silently replace a name of another."""
    counts: Counter[str] = Counter()
    for node in ast.parse((ROOT / "pipe.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            counts[node.name] += 1
        elif isinstance(node, ast.Assign):
            counts.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            counts[node.target.id] += 1
    assert [name for name, count in counts.items() if count > 1] == []


def advice_rows() -> list[tuple[list[str], str]]:
    """The reasons and the advice in each row of README's two tables of reasons."""
    rows = []
    tables = re.findall(
        r"^\| [^|\n]*reason[^|\n]* \| what to do[^\n]*\n\|---.*\n((?:\|.*\n)+)", README, re.M
    )
    assert len(tables) == 2
    for line in "".join(tables).splitlines():
        reasons, advice = line.strip("| ").split(" | ")
        rows.append((re.findall("`([^`]+)`", reasons), advice))
    return rows


def test_pages_give_the_advice_of_readme() -> None:
    rows, failed = advice_rows(), HTTPStatus.BAD_GATEWAY
    assert len(rows) == len(pipe.ADVICE) >= 20
    for reasons, advice in rows:
        for reason in reasons:
            assert pipe.advice_for(reason, failed) == advice, reason
    full = pipe.advice_for("the origin answered 429", failed)
    assert pipe.advice_for("the origin answered 458", failed) == full
    late = pipe.advice_for("no media within 20 s: the origin answered 410", failed)
    assert late.startswith("the address has expired")
    (row,) = re.findall(r"^\| 503, 504 \| .* \| (.*) \|$", README, re.M)
    assert pipe.advice_for("there are too many viewers", HTTPStatus.SERVICE_UNAVAILABLE) == row
    assert pipe.advice_for("no such quality", HTTPStatus.NOT_FOUND) == ""
