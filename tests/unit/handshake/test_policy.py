"""Chapter 7 as a truth table, written down apart from the code."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from qvpn.config import identity
from qvpn.handshake import policy
from qvpn.handshake.chain import Link
from qvpn.handshake.parameters import PeerParameters
from qvpn.wire.messages import Mode, Outcome, Policy, WireOrigin

REQUIRE, PREFER, PQC = Mode.REQUIRE_QKD, Mode.PREFER_QKD, Mode.PQC_ONLY
NOW = 1000.0
SITE, PEER = identity.generate(3), identity.generate(3).public


def parameters(mode: Mode, age: int = 0, allow: bool = False) -> PeerParameters:
    return PeerParameters("p", SITE, (PEER,), mode=mode, max_qkd_age=age, allow_simulated=allow)


def chain(age: float | None, origin: WireOrigin = WireOrigin.QKD) -> Link:
    return Link(b"c" * 48, 7, None if age is None else NOW - age, None if age is None else origin)


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        (REQUIRE, REQUIRE, Outcome.REFUSED),
        (REQUIRE, PREFER, Outcome.REFUSED),
        (REQUIRE, PQC, Outcome.REFUSED),
        (PREFER, REQUIRE, Outcome.REFUSED),
        (PREFER, PREFER, Outcome.ABSENT),
        (PREFER, PQC, Outcome.ABSENT),
        (PQC, REQUIRE, Outcome.REFUSED),
        (PQC, PREFER, Outcome.ABSENT),
        (PQC, PQC, Outcome.ABSENT),
    ],
)
def test_r_on_no_key_without_a_chain(ours: Mode, theirs: Mode, outcome: Outcome) -> None:
    for link in (None, chain(None), chain(1.0)):
        assert policy.decide_none(parameters(ours), Policy(theirs, True), link, NOW, True) is outcome


def test_r_is_not_degraded_for_longer_than_it_may() -> None:
    assert policy.decide_none(parameters(PREFER), Policy(PREFER, True), None, NOW, False) is Outcome.REFUSED
    assert policy.decide_none(parameters(PQC), Policy(PREFER, True), None, NOW, False) is Outcome.ABSENT


@pytest.mark.parametrize(("ours", "theirs"), list(product((REQUIRE, PREFER), repeat=2)))
@pytest.mark.parametrize(
    ("age", "own_limit", "peer_limit", "young"),
    [
        (59.9, 60, 60, True),
        (60.0, 60, 60, False),
        (30.0, 60, 20, False),
        (30.0, 20, 60, False),
        (19.0, 20, 60, True),
        (1.0, 0, 60, False),
        (1.0, 60, 0, False),
        (None, 60, 60, False),
    ],
)
def test_chained_takes_the_smaller_limit_of_both(
    ours: Mode, theirs: Mode, age: float | None, own_limit: int, peer_limit: int, young: bool
) -> None:
    got = policy.decide_none(parameters(ours, own_limit), Policy(theirs, False, peer_limit), chain(age), NOW, True)
    assert (got is Outcome.CHAINED) == young


def test_chained_is_nothing_for_pqc_only_and_for_simulated_keys_that_count_for_nothing() -> None:
    for ours, theirs in ((PQC, PREFER), (PREFER, PQC), (PQC, PQC)):
        assert not policy.chained_allowed(parameters(ours, 60), Policy(theirs, True, 60), chain(1.0), NOW)
    simulated = chain(1.0, WireOrigin.SIMULATED)
    for mode, allow, good in ((REQUIRE, False, False), (REQUIRE, True, True), (PREFER, False, True)):
        allowed = policy.chained_allowed(parameters(mode, 60, allow), Policy(mode, True, 60), simulated, NOW)
        assert allowed is good


@pytest.mark.parametrize(("mode", "allow"), list(product(Mode, (False, True))))
def test_origins(mode: Mode, allow: bool) -> None:
    for origin in WireOrigin:
        refused = origin is WireOrigin.SIMULATED and mode is REQUIRE and not allow
        assert policy.origin_allowed(parameters(mode, allow=allow), origin) is not refused


@pytest.mark.parametrize(
    ("mode", "degraded", "sends", "takes"),
    [
        (REQUIRE, True, False, False),
        (REQUIRE, False, False, False),
        (PREFER, True, True, True),
        (PREFER, False, False, False),  # max_degraded is over
        (PQC, True, True, True),
        (PQC, False, True, True),
    ],
)
def test_i_without_a_key(mode: Mode, degraded: bool, sends: bool, takes: bool) -> None:
    peer = Policy(PREFER, True)
    assert policy.may_send_none(parameters(mode), peer, chain(1.0), NOW, degraded) is sends
    assert policy.accepts(parameters(mode), peer, Outcome.ABSENT, None, NOW, degraded) is takes
    assert not policy.accepts(parameters(mode), peer, Outcome.CHAINED, chain(1.0), NOW, degraded)


def test_i_hopes_for_chained_only_where_it_can_be() -> None:
    wants = parameters(REQUIRE, 60)
    for peer, link, good in (
        (Policy(REQUIRE, False, 60), chain(30.0), True),
        (Policy(REQUIRE, False, 20), chain(30.0), False),
        (Policy(REQUIRE, False, 0), chain(30.0), False),
        (Policy(REQUIRE, False, 60), None, False),
    ):
        assert policy.may_send_none(wants, peer, link, NOW, True) is good
        assert policy.accepts(wants, peer, Outcome.CHAINED, link, NOW, True) is good


def test_parameters_are_of_one_level() -> None:
    five = identity.generate(5)
    good = parameters(PREFER)
    for bad in ({"suites": (3,)}, {"suites": (1, 3)}, {"suites": ()}, {"peers": (five.public,)}, {"peers": ()}):
        with pytest.raises(ValueError):
            replace(good, **bad)
    assert repr(good).count("secret") == 0 and "psk" not in repr(replace(good, psk=b"\xab" * 32))
