"""The event log: JSON for machines, text on a terminal, nothing secret in either."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from qvpn.control.mistakes import describe
from qvpn.observe import eventlog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["json", "text"])
def test_context_and_facts_are_there_and_secrets_are_not(stream: io.StringIO) -> None:
    eventlog.configure(stream)
    log = eventlog.get_log(site="alice").bind(peer="bob")
    log.info("epoch confirmed", number=3, material="5ec2e7", psk="5ec2e7", odd=b"5ec2e7", key=bytearray(b"5ec2e7"))
    log.debug("not shown")
    said = stream.getvalue()
    assert said.count("\n") == 1
    for word in ("epoch confirmed", "alice", "bob", "3", "(withheld)"):
        assert word in said
    assert "5ec2e7" not in said
    if not stream.isatty():
        assert json.loads(said) | {"timestamp": ""} == {
            "event": "epoch confirmed",
            "level": "info",
            "site": "alice",
            "peer": "bob",
            "number": 3,
            **dict.fromkeys(("material", "psk", "odd", "key"), "(withheld)"),
            "timestamp": "",
        }


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["json", "text"])
def test_a_mistake_is_kind_and_place_and_the_rest_on_demand(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    eventlog.configure(stream)
    try:
        raise ValueError("5ec2e7")
    except ValueError as error:
        eventlog.get_log().error("internal error", **describe(error))
        said = stream.getvalue()
        assert "ValueError" in said
        assert "test_eventlog.py:" in said
        assert "5ec2e7" not in said
        assert "Traceback" not in said
        monkeypatch.setenv("QVPN_DEBUG", "1")
        eventlog.get_log().error("internal error", **describe(error))
        assert "Traceback" in stream.getvalue()
