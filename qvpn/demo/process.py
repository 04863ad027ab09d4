"""One program of the lab: started through :mod:`qvpn.demo.launch`, logged to files, ended with its group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PROGRAMS = {
    "qvpn": "qvpn.cli.main",
    "qvpn-kme": "keysource.kme.cli",
    "qvpn-qkd": "keysource.qkd.cli",
}


class ProcessFailed(Exception):
    """A program of the lab ended when it should not have, or did not do its work; the message has its last lines."""


def program(name: str) -> list[str]:
    """The command for one of the project's own programs: the installed script, or its module where there is none."""
    script = Path(sys.executable).with_name(name)
    if os.access(script, os.X_OK):
        return [str(script)]
    return [sys.executable, "-c", f"import sys; from {_PROGRAMS[name]} import main; sys.exit(main())"]


def module(name: str, *arguments: str) -> list[str]:
    """The command for ``python -m name`` under the interpreter that runs now."""
    return [sys.executable, "-m", name, *arguments]


def environment() -> dict[str, str]:
    """Ours, with this very source tree first on the path: a checkout runs its own code, installed or not."""
    tree = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{tree}{os.pathsep}{path}" if path else tree}


class Process:
    """A child in its own process group; ``out`` and ``log`` are the files of its standard output and error."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        logs: Path,
        net: int | None = None,
        folder: Path | None = None,
        hide: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self.out = logs / f"{name}.out"
        self.log = logs / f"{name}.log"
        with self.out.open("ab") as out, self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [*launcher(net=net, folder=folder, hide=hide), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                pass_fds=() if net is None else (net,),
                process_group=0,
                env=environment(),
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs (negative: the signal that ended it)."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        return self.poll() is None

    def signal(self, signum: int) -> None:
        """Send a signal to the program itself, where it still runs."""
        if self.running:
            self._popen.send_signal(signum)

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit code; ProcessFailed when ``timeout`` seconds pass."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} still runs after {timeout:g} s{self.last_words()}") from None

    def stop(self, timeout: float = 5.0) -> int:
        """SIGTERM, then SIGKILL to the whole group after ``timeout`` seconds; returns the exit code."""
        self.signal(signal.SIGTERM)
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return self.kill()
        self._kill_group()
        return code

    def kill(self) -> int:
        """SIGKILL to the program and everything in its group."""
        self._kill_group()
        return self._popen.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def lines(self) -> list[dict[str, Any]]:
        """The JSON objects that the program has printed so far, one a line; an unfinished last line is left out."""
        text = self.out.read_text(errors="replace")
        complete = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in complete.splitlines() if line.startswith("{")]

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait for a program that prints JSON and return its last object; ProcessFailed when it did not end well."""
        code = self.wait(timeout)
        found = self.lines()
        if code != 0 or not found:
            raise ProcessFailed(f"{self.name} ended with code {code}{self.last_words()}")
        return found[-1]

    def finish(self, timeout: float = 10.0) -> dict[str, Any]:
        """SIGTERM to a program that then prints its result, and that result."""
        self.signal(signal.SIGTERM)
        return self.result(timeout)

    def until_output(self, timeout: float) -> dict[str, Any]:
        """Wait for the first JSON line (a program's "I am ready") and return it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := self.lines():
                return found[0]
            if not self.running:
                raise ProcessFailed(f"{self.name} ended with code {self.poll()}{self.last_words()}")
            time.sleep(0.01)
        raise ProcessFailed(f"{self.name} printed nothing for {timeout:g} s{self.last_words()}")

    def tail(self, count: int = 15) -> list[str]:
        """The last lines of its log, or of its output where it logged nothing."""
        for path in (self.log, self.out):
            if lines := path.read_text(errors="replace").splitlines():
                return lines[-count:]
        return []

    def last_words(self) -> str:
        """The last lines of its log as the end of a sentence; empty where it said nothing."""
        tail = self.tail(5)
        return ": " + " | ".join(tail) if tail else ""


def launcher(*, net: int | None, folder: Path | None = None, hide: Sequence[Path] = ()) -> list[str]:
    """The command that puts another command (appended) into its place; ``net`` must be passed on as a descriptor."""
    options = ["--parent", str(os.getpid())]
    if net is not None:
        options += ["--net", str(net)]
    if folder is not None:
        options += ["--folder", str(folder)]
    for place in hide:
        options += ["--hide", str(place)]
    return module("qvpn.demo.launch", *options, "--")
