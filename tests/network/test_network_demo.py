"""``qvpn-kme demo`` as a user runs it: every act holds, and nothing is left, also after Ctrl-C and SIGKILL."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from keysource.network.demo.drawing import Picture, drawn

LONG = bool(os.environ.get("QVPN_TEST_LONG"))
COMMAND = [sys.executable, "-m", "keysource.network", "demo"]


def mine(folder: Path) -> list[str]:
    """Processes whose command line names something in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        process_group=0,
    )


@pytest.fixture
def folder() -> Path:
    made = Path("/tmp") / f"qd{os.getpid()}"  # short: sockets live below it
    made.mkdir()
    return made


@pytest.fixture(autouse=True)
def empty(folder: Path):  # type: ignore[no-untyped-def]
    yield
    for entry in sorted(folder.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    folder.rmdir()


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    demo = start(folder)
    assert until(lambda: len(mine(folder)) >= 9, 60), "the processes never started"
    demo.send_signal(signal.SIGINT)
    out, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130 and "interrupted; nothing is left behind" in out, out
    assert "Traceback" not in out
    assert until(lambda: not mine(folder), 5), mine(folder)
    assert not list(folder.iterdir())


@pytest.mark.skipif(not LONG, reason="half a minute of two cores; QVPN_TEST_LONG=1")
@pytest.mark.timeout(240)
def test_the_whole_demo_holds(folder: Path) -> None:
    demo = start(folder, "--json")
    out, _ = demo.communicate(timeout=120)
    report = json.loads(out)
    assert demo.returncode == 0, report
    assert report["held"] and report["keys_equal_at_both_ends"] > 5 and report["keys_different"] == 0
    assert [act["name"] for act in report["acts"]] == ["start", "two_paths", "cut", "eve", "copy", "alter"]
    assert report["seconds"] < 60 and not mine(folder) and not list(folder.iterdir())
    assert report["processes_seen"] >= 10 and report["left_behind"] == [] and report["keys_at_one_end_only"] == 0


@pytest.mark.skipif(not LONG, reason="starts ten processes; QVPN_TEST_LONG=1")
def test_sigkill_of_the_demo_ends_its_processes(folder: Path) -> None:
    demo = start(folder)
    assert until(lambda: len(mine(folder)) >= 9, 60)
    demo.kill()
    demo.communicate(timeout=10)
    assert until(lambda: not mine(folder), 10), mine(folder)


def test_the_drawing_marks_what_is_so() -> None:
    console = Console(width=100, no_color=True, record=True, file=io.StringIO())
    picture = Picture([["west", "north", "east"], ["west", "south", "east"]], {"west-middle"}, {"middle-east"})
    console.print(drawn(picture))
    text = console.export_text()
    assert text.count("1") == 2 and text.count("2") == 2 and text.count("x") == 1 and text.count("!") == 1
    assert all(name in text for name in ("north", "west", "middle", "east", "south"))
