"""The marker `alone`: no other test runs at the same time."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPAN = 0.05  # seconds that each inner test takes
INNER = f"""
import threading, time
from pathlib import Path
import pytest

def span(name):
    began = time.monotonic()
    threading.Event().wait({SPAN})
    with Path(__file__).with_name("spans").open("a") as spans:
        spans.write(f"{{name}} {{began}} {{time.monotonic()}}\\n")

@pytest.mark.parametrize("number", range(12))
def test_beside_others(number):
    span("beside")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(4))
def test_alone(number):
    span("alone")

@pytest.mark.parametrize("number", range(12))
def test_beside_others_again(number):
    span("beside")
"""


def test_marked_test_runs_while_no_other_test_runs(tmp_path: Path) -> None:
    inner = tmp_path / "test_inner.py"
    inner.write_text(INNER)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / ".pytest.ini"),
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "-p", "tests.conftest", "-n", "2", "--dist", "load", str(inner)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in (tmp_path / "spans").read_text().splitlines()]
    spans = sorted((float(began), float(ended), name) for name, began, ended in lines)
    assert len(spans) == 28
    overlapping = set()
    for (_, ended, name), (began, _, following) in itertools.pairwise(spans):
        if began < ended:
            overlapping.add((name, following))
    assert overlapping == {("beside", "beside")}, "unmarked tests overlap, marked ones do not"
