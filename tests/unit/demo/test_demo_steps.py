"""A step that fails says why, and no failure is told as success."""

import io
import json
import subprocess
from typing import Any

import pytest

from qvpn.demo import report, steps
from qvpn.demo.process import ProcessFailed
from qvpn.demo.steps import Facts, Script, StepFailed


class _Silent:
    def begins(self, step: steps.Step) -> None: ...
    def ended(self, step: steps.Step) -> None: ...


def _script() -> Script:
    return Script(_Silent(), lambda: {"qvpn": ["last words"]})


def _good(facts: Facts) -> None:
    facts["packets"] = 3


def _bad(facts: Facts) -> None:
    facts["before"] = 1
    steps.require(False, "expected 2, found 1")


def test_a_step_that_holds_has_its_facts_and_no_logs() -> None:
    script = _script()
    step = script.run("one", "One", _good)
    assert step.to_json() == {
        "name": "one",
        "title": "One",
        "outcome": "held",
        "seconds": 0.0,
        "facts": {"packets": 3},
    }
    assert script.all_held


def test_a_failed_step_keeps_its_facts_and_says_why_with_the_logs() -> None:
    script = _script()
    step = script.run("one", "One", _bad)
    assert step.outcome == "failed"
    assert step.facts == {"before": 1}
    assert step.reason == "expected 2, found 1"
    assert step.logs == {"qvpn": ["last words"]}
    assert not script.all_held


def test_steps_after_a_failure_run_unless_it_was_their_ground() -> None:
    script = _script()
    script.run("one", "One", _bad)
    assert script.run("two", "Two", _good).held
    script.run("three", "Three", _bad, ground=True)
    four = script.run("four", "Four", _good)
    assert four.outcome == "not run"
    assert four.reason == "step three failed"
    assert not script.all_held


def test_a_script_without_steps_has_not_held() -> None:
    assert not _script().all_held


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProcessFailed("kme ended with code 1"), "kme ended with code 1"),
        (
            subprocess.CalledProcessError(2, ["python", "--", "/x/qvpn", "init", "a", "b"], stderr="no\nreason"),
            "qvpn init a ended with code 2: no | reason",
        ),
        (subprocess.TimeoutExpired(["/x/qvpn", "status"], 3), "qvpn status still ran after 3 s"),
        (KeyError("peers"), "KeyError: 'peers'"),
        (AssertionError("never"), "AssertionError: never"),
        (FileNotFoundError("x"), "FileNotFoundError: x"),
        (TypeError("a slip of the demo itself"), "TypeError: a slip of the demo itself"),
    ],
)
def test_what_a_step_may_meet_becomes_its_reason(error: Exception, reason: str) -> None:
    def body(_facts: Facts) -> None:
        raise error

    assert _script().run("one", "One", body).reason == reason


def test_waiting_ends_at_its_limit_and_tells_how_long_it_took() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    took = steps.wait_for("3 s", lambda: now[0] >= 3, within=5, every=1, clock=lambda: now[0], sleep=sleep)
    assert took == 3
    with pytest.raises(StepFailed, match="not within 5 s: never"):
        steps.wait_for("never", lambda: False, within=5, every=1, clock=lambda: now[0], sleep=sleep)


def _told(script: Script, totals: dict[str, Any]) -> str:
    stream = io.StringIO()
    teller = report.Teller(stream)
    for step in script.steps:
        teller.begins(step)
        teller.ended(step)
    teller.summary(script, totals, 61.2)
    return stream.getvalue()


def test_the_tale_for_people_has_every_fact_and_no_colours_in_a_pipe() -> None:
    script = _script()
    script.run("one", "Keys [QKD] arrive", lambda facts: facts.update(keys_at_alice=12345, origin="simulated"))
    script.run("two", "Second", _bad)
    text = _told(script, {"packets_sent": 1000})
    for piece in (
        "Keys [QKD] arrive",
        "keys at alice: 12,345",
        "origin: simulated",
        "expected 2, found 1",
        "last words",
        "packets sent: 1,000",
        "1 of 2 steps held",
    ):
        assert piece in text
    assert "\x1b" not in text


def test_the_json_is_one_object_with_outcomes_and_totals() -> None:
    script = _script()
    script.run("one", "One", _good)
    read = json.loads(report.as_json(script, {"packets_sent": 5, "packets_lost": 0}, 3.14159))
    assert read["held"] is True
    assert read["packets_sent"] == 5
    assert read["steps"][0]["outcome"] == "held"
    assert read["seconds"] == 3.1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.01234, "0.0123"),
        (123456.7, "123,457"),
        ({"a_b": 1, "c": None}, "a b 1, c none"),
        ([1, "x"], "1, x"),
        ([], "none"),
    ],
)
def test_values_are_shown_for_people(value: object, text: str) -> None:
    assert report.show(value) == text
