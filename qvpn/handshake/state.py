"""The two state tables of PROTOCOL.md chapter 8, as code.

Rule 1: everything that changes the state of an attempt or an entry goes through :func:`step`.  Rule 2: what is not in
the table does not happen; the event is dropped and counted as ``handshake_state``.  A test compares these tables with
the text and walks every pair of state and event.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar


class InitiatorState(enum.StrEnum):
    IDLE = "IDLE"
    WAIT_M2 = "WAIT_M2"
    DRAW = "DRAW"
    WAIT_M4 = "WAIT_M4"


class InitiatorEvent(enum.StrEnum):
    START = "START"
    RETRY = "RETRY"
    RESEND = "RESEND"
    M2_BAD = "M2_BAD"
    M2_DRAW = "M2_DRAW"  # M2 is good and a key shall be drawn
    M2_NONE = "M2_NONE"  # M2 is good, n = 0
    M2_END = "M2_END"  # M2 is good and policy ends it here
    KEY = "KEY"
    NO_KEY_NONE = "NO_KEY_NONE"  # our source gave none, n = 0
    NO_KEY_END = "NO_KEY_END"
    M4_BAD = "M4_BAD"
    M4_ACCEPT = "M4_ACCEPT"
    M4_DRAW = "M4_DRAW"
    M4_NONE = "M4_NONE"
    M4_END = "M4_END"
    NO_REPLY = "NO_REPLY"
    DEADLINE = "DEADLINE"
    YIELD = "YIELD"
    STOP = "STOP"


class ResponderState(enum.StrEnum):
    NONE = "NONE"
    HALF_OPEN = "HALF_OPEN"
    FETCH = "FETCH"
    RETRY = "RETRY"
    CONFIRM = "CONFIRM"
    CONFIRM_NONE = "CONFIRM_NONE"
    REFUSED = "REFUSED"
    GONE = "GONE"


class ResponderEvent(enum.StrEnum):
    M1 = "M1"
    M1_SAME = "M1_SAME"
    M3_BAD = "M3_BAD"
    TOO_MANY_BAD = "TOO_MANY_BAD"
    M3_IGNORED = "M3_IGNORED"
    M3_KEY = "M3_KEY"
    M3_NONE = "M3_NONE"
    M3_REFUSE = "M3_REFUSE"
    M3_SAME = "M3_SAME"
    KEY = "KEY"
    NO_KEY = "NO_KEY"
    M3R_BAD = "M3R_BAD"
    M3R_KEY = "M3R_KEY"
    M3R_NONE = "M3R_NONE"
    M3R_REFUSE = "M3R_REFUSE"
    FIRST_RECORD = "FIRST_RECORD"
    EXPIRE = "EXPIRE"


_I, _IE, _R, _RE = InitiatorState, InitiatorEvent, ResponderState, ResponderEvent

INITIATOR: Mapping[tuple[InitiatorState, InitiatorEvent], InitiatorState] = {
    (_I.IDLE, _IE.START): _I.WAIT_M2,
    (_I.WAIT_M2, _IE.RETRY): _I.WAIT_M2,
    (_I.WAIT_M2, _IE.RESEND): _I.WAIT_M2,
    (_I.WAIT_M2, _IE.M2_BAD): _I.WAIT_M2,
    (_I.WAIT_M2, _IE.M2_DRAW): _I.DRAW,
    (_I.WAIT_M2, _IE.M2_NONE): _I.WAIT_M4,
    (_I.WAIT_M2, _IE.M2_END): _I.IDLE,
    (_I.DRAW, _IE.KEY): _I.WAIT_M4,
    (_I.DRAW, _IE.NO_KEY_NONE): _I.WAIT_M4,
    (_I.DRAW, _IE.NO_KEY_END): _I.IDLE,
    (_I.WAIT_M4, _IE.RESEND): _I.WAIT_M4,
    (_I.WAIT_M4, _IE.M4_BAD): _I.WAIT_M4,
    (_I.WAIT_M4, _IE.M4_ACCEPT): _I.IDLE,
    (_I.WAIT_M4, _IE.M4_DRAW): _I.DRAW,
    (_I.WAIT_M4, _IE.M4_NONE): _I.WAIT_M4,
    (_I.WAIT_M4, _IE.M4_END): _I.IDLE,
    **{(state, _IE.NO_REPLY): _I.WAIT_M2 for state in (_I.WAIT_M2, _I.DRAW, _I.WAIT_M4)},
    **{
        (state, event): _I.IDLE
        for state in (_I.WAIT_M2, _I.DRAW, _I.WAIT_M4)
        for event in (_IE.DEADLINE, _IE.YIELD, _IE.STOP)
    },
}

RESPONDER: Mapping[tuple[ResponderState, ResponderEvent], ResponderState] = {
    (_R.NONE, _RE.M1): _R.HALF_OPEN,
    (_R.HALF_OPEN, _RE.M1_SAME): _R.HALF_OPEN,
    (_R.HALF_OPEN, _RE.M3_BAD): _R.HALF_OPEN,
    (_R.HALF_OPEN, _RE.TOO_MANY_BAD): _R.GONE,
    (_R.HALF_OPEN, _RE.M3_IGNORED): _R.HALF_OPEN,
    (_R.HALF_OPEN, _RE.M3_KEY): _R.FETCH,
    (_R.HALF_OPEN, _RE.M3_NONE): _R.CONFIRM_NONE,
    (_R.HALF_OPEN, _RE.M3_REFUSE): _R.REFUSED,
    (_R.FETCH, _RE.M1_SAME): _R.FETCH,
    (_R.FETCH, _RE.M3_SAME): _R.FETCH,
    (_R.FETCH, _RE.KEY): _R.CONFIRM,
    (_R.FETCH, _RE.NO_KEY): _R.RETRY,
    **{(state, _RE.M3_SAME): state for state in (_R.RETRY, _R.CONFIRM, _R.CONFIRM_NONE, _R.REFUSED)},
    **{(state, _RE.M3R_BAD): state for state in (_R.RETRY, _R.CONFIRM)},
    **{(state, _RE.M3R_KEY): _R.FETCH for state in (_R.RETRY, _R.CONFIRM)},
    **{(state, _RE.M3R_NONE): _R.CONFIRM_NONE for state in (_R.RETRY, _R.CONFIRM)},
    **{(state, _RE.M3R_REFUSE): _R.REFUSED for state in (_R.RETRY, _R.CONFIRM)},
    **{(state, _RE.FIRST_RECORD): _R.GONE for state in (_R.CONFIRM, _R.CONFIRM_NONE)},
    **{(state, _RE.EXPIRE): _R.GONE for state in (_R.HALF_OPEN, _R.RETRY, _R.CONFIRM, _R.CONFIRM_NONE, _R.REFUSED)},
}

State = TypeVar("State")
TableEvent = TypeVar("TableEvent")


def step(table: Mapping[tuple[State, TableEvent], State], state: State, event: TableEvent) -> State | None:
    """The next state, or None where the table has no such row: drop and count."""
    return table.get((state, event))
