"""Which transport a peer is reached by: the rules, without daemons."""

from __future__ import annotations

import ipaddress

from qvpn.control.carriers import ANSWERED, BACK, GIVE_UP, PATIENCE, SILENCE, CarrierChoice, Move
from qvpn.netio.base import Address
from qvpn.transports.quic.address import over_quic

UDP = Address(ipaddress.ip_address("192.0.2.1"), 443)
OTHER = Address(ipaddress.ip_address("192.0.2.9"), 443)
QUIC = over_quic(UDP)


def test_an_address_of_one_transport_is_none_of_another() -> None:
    assert UDP != QUIC and QUIC != UDP and len({UDP, QUIC}) == 2
    assert QUIC.place == UDP and (UDP.carrier, QUIC.carrier) == ("udp", "quic")


def test_roaming_within_a_transport_and_to_a_better_one_is_asked_there() -> None:
    choice = CarrierChoice(["udp", "quic"])
    assert choice.seen(UDP, OTHER, 0.0) is Move.ASK_THERE
    assert choice.seen(QUIC, UDP, 0.0) is Move.ASK_THERE
    assert choice.seen(None, QUIC, 0.0) is Move.ASK_THERE


def test_a_transport_that_is_not_configured_is_ignored() -> None:
    assert CarrierChoice(["udp"]).seen(UDP, QUIC, 0.0) is Move.IGNORE
    assert CarrierChoice(["quic"]).seen(QUIC, UDP, 0.0) is Move.IGNORE


def test_a_worse_transport_is_taken_only_when_the_better_one_is_silent() -> None:
    choice = CarrierChoice(["udp", "quic"])
    assert choice.seen(UDP, QUIC, 10.0) is Move.ASK_HERE
    assert choice.seen(UDP, QUIC, 10.0 + PATIENCE / 2) is Move.IGNORE
    choice.answered(10.5)
    assert choice.seen(UDP, QUIC, 10.5 + ANSWERED - 0.1) is Move.IGNORE
    late = 10.5 + ANSWERED + 0.1
    assert choice.seen(UDP, QUIC, late) is Move.ASK_HERE
    assert choice.seen(UDP, QUIC, late + 1.0) is Move.ASK_THERE


def test_a_silent_transport_is_asked_then_left_and_a_better_one_asked_now_and_then() -> None:
    choice = CarrierChoice(["udp", "quic"])
    places = (UDP, QUIC)
    assert choice.to_ask(UDP, places, 100.0, 101.0) == []
    assert choice.to_ask(UDP, places, 100.0, 100.1 + SILENCE) == [UDP]
    assert choice.to_ask(UDP, places, 100.0, 100.1 + GIVE_UP) == [UDP, QUIC]
    assert choice.to_ask(QUIC, places, 200.0, 200.0) == [UDP]
    assert choice.to_ask(QUIC, places, 200.0, 201.0) == []
    assert choice.to_ask(QUIC, places, 200.0 + BACK, 200.0 + BACK) == [UDP]
    assert choice.to_ask(None, places, None, 0.0) == []
