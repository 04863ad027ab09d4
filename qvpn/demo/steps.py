"""The demo's steps: each has a title, an outcome and facts, and a failed one says why.

A step's body is run by :meth:`Script.run`; it fills ``facts`` and calls :func:`require` for each thing that must
hold.  Whatever fails (a requirement, a program of the lab, a time limit) becomes the outcome ``failed`` with one
sentence; later steps still run, except where a step they stand on (``ground``) has failed.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from qvpn.demo.process import ProcessFailed

HELD, FAILED, NOT_RUN = "held", "failed", "not run"

Facts = dict[str, Any]


class StepFailed(Exception):
    """Something that the step promises did not hold; the message is one sentence."""


def require(condition: bool, sentence: str) -> None:
    """Raise StepFailed with ``sentence`` (what was expected and what was found) unless ``condition`` holds."""
    if not condition:
        raise StepFailed(sentence)


def wait_for(
    what: str,
    probe: Callable[[], bool],
    *,
    within: float,
    every: float = 0.1,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Poll until ``probe()`` is true and return the seconds it took; StepFailed after ``within`` seconds."""
    start = clock()
    while not probe():
        if clock() - start >= within:
            raise StepFailed(f"not within {within:g} s: {what}")
        sleep(every)
    return clock() - start


@dataclass
class Step:
    """One step as it went."""

    name: str
    title: str
    outcome: str = NOT_RUN
    facts: Facts = field(default_factory=dict)
    reason: str | None = None
    seconds: float = 0.0
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Last lines of the programs' logs, by program; only where the step failed."""

    @property
    def held(self) -> bool:
        return self.outcome == HELD

    def to_json(self) -> dict[str, Any]:
        plain = {"name": self.name, "title": self.title, "outcome": self.outcome, "seconds": round(self.seconds, 2)}
        if self.reason is not None:
            plain |= {"reason": self.reason, "logs": self.logs}
        return {**plain, "facts": self.facts}


class Audience(Protocol):
    """Who is told how it goes (see :mod:`qvpn.demo.report`)."""

    def begins(self, step: Step) -> None: ...
    def ended(self, step: Step) -> None: ...


class Script:
    """Runs steps in order and keeps what came of them."""

    def __init__(self, audience: Audience, tails: Callable[[], dict[str, list[str]]]) -> None:
        """``tails`` gives the last log lines of every program that runs, for a failed step."""
        self.steps: list[Step] = []
        self._audience = audience
        self._tails = tails
        self._ground_gone: str | None = None

    @property
    def all_held(self) -> bool:
        return bool(self.steps) and all(step.held for step in self.steps)

    def run(self, name: str, title: str, body: Callable[[Facts], None], *, ground: bool = False) -> Step:
        """Run one step; with ``ground`` the steps after it are not run where it fails."""
        step = Step(name, title)
        self.steps.append(step)
        if self._ground_gone is not None:
            step.reason = f"step {self._ground_gone} failed"
            self._audience.ended(step)
            return step
        self._audience.begins(step)
        start = time.monotonic()
        try:
            body(step.facts)
            step.outcome = HELD
        except (StepFailed, ProcessFailed) as error:
            self._failed(step, str(error))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or "").strip().splitlines()
            self._failed(step, f"{_short(error.cmd)} ended with code {error.returncode}: {' | '.join(said[-3:])}")
        except subprocess.TimeoutExpired as error:
            self._failed(step, f"{_short(error.cmd)} still ran after {error.timeout:g} s")
        except Exception as error:  # whatever it is, the other steps and the table are worth seeing
            self._failed(step, f"{type(error).__name__}: {error}")
        step.seconds = time.monotonic() - start
        if ground and not step.held:
            self._ground_gone = name
        self._audience.ended(step)
        return step

    def _failed(self, step: Step, reason: str) -> None:
        step.outcome = FAILED
        step.reason = " ".join(reason.split())
        step.logs = self._tails()


def _short(command: Any) -> str:
    """The program of a command line, without the launcher before it."""
    words = [str(word) for word in command] if isinstance(command, list | tuple) else [str(command)]
    if "--" in words:
        words = words[words.index("--") + 1 :]
    return " ".join(word.rsplit("/", 1)[-1] for word in words[:3])
