"""Someone on the path who knows the public keys only, where no PSK is set: the gate MAC is then no secret.

Whatever they add to what the sites say, the sites still meet; and an identity that rolls over is found whichever key
is left.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from qvpn.config import identity
from qvpn.handshake.cookie import KEPT, RENEW, CookieBox
from qvpn.handshake.parameters import Initiate
from qvpn.handshake.schedule import NO_PSK
from qvpn.handshake.state import ResponderState
from qvpn.netio.base import Address
from qvpn.wire import datagram as wire
from qvpn.wire.messages import MessageType
from tests.simnet.world import Site, World, pair

STRANGER = Address(ipaddress.ip_address("198.51.100.77"), 4000)


def gate_key(sender: Site, receiver: Site) -> bytes:
    """What protects datagrams from one site to the other: public where there is no PSK.

    The initiator is site a in every test here.
    """
    prints = {site.name: site.parameters.identity.public.fingerprint for site in (sender, receiver)}
    return wire.gate_key(NO_PSK, prints["b"], prints["a"], prints[sender.name])


@pytest.mark.parametrize(
    "waits", [[0.0001], [0.001], [0.0015], [0.05], [0.0001, 0.05], [0.0001, 0.05, 0.06], [0.0001, 0.05, 0.06, 0.07]]
)
def test_a_forger_of_retry_does_not_keep_the_initiator_out(waits: list[float]) -> None:
    """The way to the peer and back takes 2 ms: the forger may be nearer, or as far, or further away, or all of it."""
    world = World(1, b={"initiate": Initiate.NEVER})
    forged = 0

    def forge(source: Address, destination: Address, datagram: bytes) -> bool:
        nonlocal forged
        if source == world.a.address and datagram[0] == MessageType.M1 and datagram[3] >> 4 == 0:
            asked = wire.decode_untrusted(datagram)
            for wait in waits:
                lie = wire.encode_retry(asked, gate_key(world.b, world.a), world.random.randbytes(16), bytes(16))
                world.later(wait, world.a.on_handshake, lie, world.b.address)
                forged += 1
        return False

    world.network.filter = forge
    world.begin()
    assert world.run(15, world.up)
    assert forged > 1, "the forger had nothing to answer"


def test_every_kept_cookie_is_tried_in_turn_and_none_lives_for_ever() -> None:
    box = CookieBox()
    cookies = [bytes([number]) * 16 for number in range(1, KEPT + 2)]
    for number, cookie in enumerate(cookies):
        box.add(cookie, float(number))
    assert box.newest(20.0) == cookies[-1]
    assert {box.next(20.0) for _ in range(KEPT)} == set(cookies[1:])
    good = box.next(20.0)
    box.worked()
    assert box.newest(20.0) == good
    assert box.newest(20.0 + RENEW) is box.next(20.0 + RENEW) is None
    box.add(bytes(16), 200.0)
    box.clear()
    assert box.next(200.0) is box.newest(200.0) is None
    box.worked()


def test_a_cookie_has_its_turn_whatever_is_added_behind_it() -> None:
    for lies in range(1, KEPT):
        box = CookieBox()
        good, tried = b"g" * 16, set()
        for now in range(2 * KEPT):
            for cookie in (good, *[bytes([now, lie]) * 8 for lie in range(lies)]):
                box.add(cookie, float(now))
            tried.add(box.next(float(now)))
        assert good in tried


def test_a_copier_of_m3_cannot_use_up_the_repeats_of_m4() -> None:
    """It asks for M4 again and again from an address of its own, while a's own M4 is lost at first."""
    world = World(4, b={"initiate": Initiate.NEVER})
    b = world.b
    seen: dict[int, bytes] = {}
    lost = 0

    def watch(source: Address, destination: Address, datagram: bytes) -> bool:
        nonlocal lost
        if datagram[0] == MessageType.M3 and source == world.a.address:
            seen[datagram[3]] = datagram
        if datagram[0] == MessageType.M4 and destination == world.a.address and lost < 4:
            lost += 1
            return True
        return destination == STRANGER

    def ask() -> None:
        cookie = b.gate._cookies.cookie(STRANGER, world.now)  # it earned one with an M1 of its own
        for datagram in seen.values():
            copy = bytearray(datagram)
            copy[12:16] = b"\1\2\3\4"
            copy[-32:-16] = wire.mac(gate_key(world.a, b), bytes(copy[:-32]))
            copy[-16:] = wire.mac(cookie, bytes(copy[:-16]))
            b.on_handshake(bytes(copy), STRANGER)
        world.later(0.05, ask)

    world.network.filter = watch
    world.later(0.02, ask)
    world.begin()
    assert world.run(29, world.up), "the copies have eaten the answers that were meant for a"
    assert lost == 4 and b.drops.nonzero()["handshake_budget"] > 12, "nobody asked too often"


def test_an_index_outlives_its_epoch_while_an_answer_still_uses_it() -> None:
    """An unconfirmed epoch ends at its hard end before its answer gives up: then both go, and the index with them."""
    world = World(7, rekey=1.0).begin()
    assert world.run(3, world.up)
    world.keys.fault["b"] = "wrong-key"
    waiting = 0

    def look() -> bool:
        nonlocal waiting
        for site in world.sites:
            for entry in site.machine._answers:
                if entry.state in (ResponderState.CONFIRM, ResponderState.CONFIRM_NONE):
                    waiting += 1
                assert site.port.owner(entry.index, "entry") or site.port.owner(entry.index, "epoch"), (
                    f"{site.name}'s {entry.state} has an index that somebody else may get"
                )
        return False

    world.run(60, look)
    assert waiting, "nothing waited, so nothing was shown"


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_identity_rolls_over_and_the_initiator_finds_the_key_that_the_peer_has_now(left: int) -> None:
    """Site a lists three public keys of b; b has the private key of only one of them."""
    world = World(11, b={"initiate": Initiate.NEVER})
    others = [identity.generate().public for _ in range(2)]
    listed = [*others[:left], pair(3)[1].public, *others[left:]]
    world.a.parameters = replace(world.a.parameters, peers=tuple(listed))
    world.begin()
    assert world.run(35 * (left + 1), world.up)
    assert world.a.machine.snapshot(world.now).failures == left, "each key that b no longer has costs one attempt"
    assert not world.a.log.alarms


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_responder_takes_an_initiator_by_any_of_its_listed_keys(left: int) -> None:
    world = World(12, b={"initiate": Initiate.NEVER})
    others = [identity.generate().public for _ in range(2)]
    listed = [*others[:left], pair(3)[0].public, *others[left:]]
    world.b.parameters = replace(world.b.parameters, peers=tuple(listed))
    world.begin()
    assert world.run(30, world.up)
