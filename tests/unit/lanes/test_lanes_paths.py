"""A lane's way to the peer: nothing is sent where no answer came from, and it is found again."""

from __future__ import annotations

import ipaddress
import itertools

from qvpn.lanes.paths import LAST_AGAIN, LOST, LanePath, Send
from qvpn.netio.base import Address
from qvpn.wire.messages import ControlType

GUESS = Address(ipaddress.ip_address("192.0.2.7"), 51841)
BEHIND_NAT = Address(ipaddress.ip_address("192.0.2.7"), 40123)
EVE = Address(ipaddress.ip_address("203.0.113.66"), 666)
FIRST, SECOND = 0x11, 0x21


class Chance:
    """Challenges that tell themselves apart."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return self.count.to_bytes(size, "big")


def reply(send: Send) -> bytes:
    assert send.payload[0] == ControlType.PROBE
    return bytes([ControlType.PROBE_REPLY]) + send.payload[1:]


def path(*, guess: Address | None = GUESS, usable: bool = True, now: float = 0.0) -> LanePath:
    made = LanePath(10.0, Chance())
    made.guess(guess, now)
    made.install(FIRST)
    if usable:
        made.usable(FIRST, now)
    return made


def proved(now: float = 0.0) -> LanePath:
    made = path(now=now)
    (probe,) = made.take()
    made.first_record(FIRST, now)
    assert made.control(FIRST, reply(probe), GUESS, now)
    assert made.endpoint == GUESS
    made.take()
    return made


def test_the_guess_is_an_endpoint_only_after_its_answer() -> None:
    made = path()
    (probe,) = made.take()
    assert (probe.receive_index, probe.address, made.endpoint) == (FIRST, GUESS, None)
    assert made.control(FIRST, reply(probe), EVE, 0.1)  # an answer from elsewhere proves nothing
    assert made.control(SECOND, reply(probe), GUESS, 0.1)  # nor one under another epoch
    assert made.control(FIRST, reply(probe)[:-1] + b"\xff", GUESS, 0.1)  # nor to another question
    assert made.endpoint is None
    assert made.control(FIRST, reply(probe), GUESS, 3.1)  # nor one that comes too late
    assert made.endpoint is None
    made.handle_timer(3.1)
    (probe,) = made.take()
    assert made.control(FIRST, reply(probe), GUESS, 3.2)
    assert made.endpoint == GUESS


def test_an_epoch_that_may_not_be_sent_on_says_nothing_even_when_asked_to_move() -> None:
    made = path(usable=False)
    made.guess(BEHIND_NAT, 1.0)
    made.handle_timer(5.0)
    assert made.take() == [] and made.next_timer() is None
    made.usable(FIRST, 5.0)
    assert [send.address for send in made.take()] == [BEHIND_NAT]


def test_probes_are_repeated_ever_slower_until_a_record_comes() -> None:
    made, times = path(), []
    made.take()
    while len(times) < 6:
        due = made.next_timer()
        assert due is not None
        made.handle_timer(due)
        assert made.take()
        times.append(due)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == sorted(gaps) and gaps[-1] == LAST_AGAIN


def test_a_peer_behind_a_nat_is_found_by_its_record_and_proved() -> None:
    made = path()
    made.take()
    made.first_record(FIRST, 1.0)
    made.new_address(FIRST, BEHIND_NAT, 1.0)
    (probe,) = [send for send in made.take() if send.address == BEHIND_NAT]
    assert made.endpoint is None
    made.control(FIRST, reply(probe), BEHIND_NAT, 1.1)
    assert made.endpoint == BEHIND_NAT


def test_the_seen_address_is_asked_again_where_its_first_probe_was_lost() -> None:
    made = path(guess=None)
    made.first_record(FIRST, 1.0)
    made.new_address(FIRST, BEHIND_NAT, 1.0)
    made.take()
    due = made.next_timer()
    assert due is not None
    made.handle_timer(due)
    assert [send.address for send in made.take()] == [BEHIND_NAT]


def test_a_probe_is_answered_where_it_came_from_and_only_under_a_known_epoch() -> None:
    made = path()
    made.take()
    question = bytes([ControlType.PROBE]) + b"8 bytes!"
    assert made.control(FIRST, question, EVE, 0.0)
    assert made.take() == [Send(FIRST, bytes([ControlType.PROBE_REPLY]) + b"8 bytes!", EVE)]
    assert made.endpoint is None
    assert made.control(SECOND, question, EVE, 0.0) and made.take() == []


def test_handshake_messages_and_other_control_are_none_of_a_lanes() -> None:
    made = path()
    for payload in (b"\x01" + bytes(20), b"\x02", b"\x03", b"\x04", b"\x07\0", b"\x05short", b"\x99"):
        assert not made.control(FIRST, payload, GUESS, 0.0)


def test_silence_while_packets_leave_stops_them_and_an_answer_starts_them_again() -> None:
    made, sent, now, stopped = proved(), 0, 0.0, None
    while now < 10 and stopped is None:
        now += 1
        sent += 5
        made.look(now, 0.0, sent)
        if made.endpoint is None:
            stopped = now
    assert stopped is not None and stopped <= 1 + LOST + 1
    (probe,) = [send for send in made.take() if send.address == GUESS][-1:]
    made.control(FIRST, reply(probe), GUESS, now + 0.1)
    assert made.endpoint == GUESS


def test_a_lane_that_carries_both_ways_is_never_asked() -> None:
    made = proved()
    for now in range(1, 100):
        made.look(float(now), now - 0.1, 10 * now)
    assert made.take() == [] and made.endpoint == GUESS


def test_one_way_traffic_is_kept_by_the_answers() -> None:
    made, heard = proved(), 0.0
    for now in range(1, 60):
        made.look(float(now), heard, 10 * now)
        for probe in made.take():
            made.control(FIRST, reply(probe), GUESS, now + 0.05)
            heard = now + 0.05
        assert made.endpoint == GUESS


def test_an_idle_lane_keeps_its_way_through_a_nat_open() -> None:
    made, probes, heard = proved(), 0, 0.0
    for now in range(1, 61):
        made.look(float(now), heard, 0)
        sends = made.take()
        probes += len(sends)
        heard = float(now) if sends else heard
    assert 4 <= probes <= 7 and made.endpoint == GUESS


def test_a_new_epoch_is_proved_where_the_old_one_was_and_elsewhere_if_that_stays_silent() -> None:
    made = proved()
    made.guess(BEHIND_NAT, 1.0)
    assert {send.address for send in made.take()} == {BEHIND_NAT}
    made.install(SECOND)
    made.usable(SECOND, 2.0)
    assert [send.address for send in made.take()] == [GUESS]
    asked, now = set(), 2.0
    while now < 10 and BEHIND_NAT not in asked:
        now = made.next_timer() or 99
        made.handle_timer(now)
        asked |= {send.address for send in made.take()}
    assert asked == {GUESS, BEHIND_NAT}


def test_erased_epochs_are_asked_about_no_more() -> None:
    made = path()
    made.take()
    made.erase(FIRST)
    assert made.next_timer() is None
    made.install(SECOND)
    made.usable(SECOND, 1.0)
    made.take()
    made.alive(set())
    assert made.next_timer() is None
