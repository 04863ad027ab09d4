"""The tables in state.py are those of PROTOCOL.md chapter 8, pair by pair, and nothing else happens."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

import qvpn.handshake
from qvpn.handshake.state import (
    INITIATOR,
    RESPONDER,
    InitiatorEvent,
    InitiatorState,
    ResponderEvent,
    ResponderState,
    step,
)

TEXT = (Path(qvpn.handshake.__path__[0]) / "PROTOCOL.md").read_text()


def rows(heading: str) -> dict[tuple[str, str], str]:
    """The table after a bold word of chapter 8, lists in a cell taken apart."""
    part = TEXT.split("## 8 State tables")[1].split(f"**{heading}**")[1].split("\n\n")[1]
    table: dict[tuple[str, str], str] = {}
    for line in part.splitlines()[2:]:
        states, events, _does, after = (cell.strip() for cell in line.strip().strip("|").split("|"))
        for state, event in product(re.split(r",\s*", states), re.split(r",\s*", events)):
            assert (state, event) not in table, f"{state} and {event} stand there twice"
            table[state, event] = state if after == "same" else after
    return table


@pytest.mark.parametrize(("heading", "code"), [("Initiator", INITIATOR), ("Responder", RESPONDER)])
def test_text_and_code_are_equal(heading: str, code: dict[tuple[str, str], str]) -> None:
    assert rows(heading) == {(str(state), str(event)): str(after) for (state, event), after in code.items()}


@pytest.mark.parametrize(
    ("code", "states", "events"),
    [(INITIATOR, InitiatorState, InitiatorEvent), (RESPONDER, ResponderState, ResponderEvent)],
)
def test_every_pair_has_one_answer(code: dict, states: type, events: type) -> None:  # type: ignore[type-arg]
    for state, event in product(states, events):
        assert step(code, state, event) == code.get((state, event))
    assert set(code) <= set(product(states, events))
    assert {event for _, event in code} == set(events), "an event that never counts"
    reached = set(code.values()) | {next(iter(states))}
    assert reached == set(states), "a state that nothing leads to"


def test_what_the_protocol_promises_of_them() -> None:
    one = INITIATOR
    # a bad message never ends an attempt
    assert one[InitiatorState.WAIT_M2, InitiatorEvent.M2_BAD] is InitiatorState.WAIT_M2
    assert one[InitiatorState.WAIT_M4, InitiatorEvent.M4_BAD] is InitiatorState.WAIT_M4
    # whoever runs can be stopped, and the deadline ends everything
    for state in set(InitiatorState) - {InitiatorState.IDLE}:
        assert one[state, InitiatorEvent.DEADLINE] is one[state, InitiatorEvent.STOP] is InitiatorState.IDLE
    # no M3R in HALF_OPEN, none after CHAINED, ABSENT or REFUSED
    for state in (
        ResponderState.NONE,
        ResponderState.HALF_OPEN,
        ResponderState.FETCH,
        ResponderState.CONFIRM_NONE,
        ResponderState.REFUSED,
        ResponderState.GONE,
    ):
        for event in (ResponderEvent.M3R_KEY, ResponderEvent.M3R_NONE, ResponderEvent.M3R_REFUSE):
            assert step(RESPONDER, state, event) is None
    # a key source is asked after a verified M3 or M3R only
    before = {event for (_, event), after in RESPONDER.items() if after is ResponderState.FETCH}
    assert before == {ResponderEvent.M3_KEY, ResponderEvent.M3R_KEY, ResponderEvent.M1_SAME, ResponderEvent.M3_SAME}
    drawing = {event for (_, event), after in INITIATOR.items() if after is InitiatorState.DRAW}
    assert drawing == {InitiatorEvent.M2_DRAW, InitiatorEvent.M4_DRAW}
    # nothing returns from GONE
    assert not any(state is ResponderState.GONE for state, _ in RESPONDER)
