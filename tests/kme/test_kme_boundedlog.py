"""Lines that a caller can cause at will: the first few, then counts; nobody's flood drowns another's line."""

from __future__ import annotations

import json
import sqlite3

import pytest
import structlog

from keysource.kme.boundedlog import BoundedLog
from keysource.kme.control import ControlServer
from keysource.kme.records import StoreError

SENTENCE = "a stranger was refused"


def flood(told, lines, now, source="eve", event=SENTENCE):
    for _ in range(lines):
        told.warning(event, source, now, sae=source)


def test_a_flood_of_one_source_is_a_few_lines_and_a_count():
    told = BoundedLog()
    with structlog.testing.capture_logs() as seen:
        flood(told, 1000, 0.0)
        assert seen == [{"event": SENTENCE, "log_level": "warning", "sae": "eve"}] * 5
        flood(told, 1, 10.5)
        assert seen[-1] == {"event": SENTENCE, "log_level": "warning", "sae": "eve", "left_out": 995}
        told.summary()
        assert len(seen) == 6  # all is told
        flood(told, 3, 10.6)
        told.summary()
        assert seen[-1]["number"] == 3 and seen[-1]["of"] == {SENTENCE: 3}


def test_another_source_and_another_reason_are_heard_meanwhile():
    told = BoundedLog()
    with structlog.testing.capture_logs() as seen:
        flood(told, 500, 0.0)
        flood(told, 1, 0.0, source="mallory")
        flood(told, 1, 0.0, event="these SAEs may not share keys")
        told.error("the store fails", "", 0.0, error="disk full")
        told.info("a client left before its answer", "eve", 0.0)
    assert [line["log_level"] for line in seen[5:]] == ["warning", "warning", "error", "info"]


def test_many_sources_together_are_bounded_too_in_lines_and_in_memory():
    told = BoundedLog()
    with structlog.testing.capture_logs() as seen:
        for number in range(5000):
            flood(told, 2, 0.0, source=f"sae-{number}-" + "x" * 1000)
        assert len(seen) == 100
        assert len(told._buckets) == 1024
        assert len(told._left_out) <= 1024
        assert max(len(source) for _event, source in told._buckets) == 64
        told.summary()
    assert seen[-1]["number"] == 2 * 5000 - 100  # each is either a line or counted, forgotten sources included


class FailingSite:
    """What a status meets when the file under the store is damaged."""

    def __init__(self, error):
        self.error = error

    async def answer(self, request):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a request is status or fault"), "a request is status or fault"),
        (sqlite3.DatabaseError("secret-of-a-page"), "internal error DatabaseError"),
        (StoreError("x"), "internal error StoreError"),
        (KeyError("secret-of-a-page"), "internal error KeyError"),
    ],
)
async def test_whatever_fails_behind_the_control_socket_is_an_answer(tmp_path, error, said):
    control = ControlServer(tmp_path / "c.sock", FailingSite(error).answer)
    answer = await control._answered(json.dumps({"op": "status"}).encode())
    assert answer["ok"] is False
    assert answer["error"].startswith(said)
    assert "secret" not in answer["error"]
