"""An attacker on the path and one beside it: floods, replays, mutations, forgeries.  What counts: no key is drawn for
a stranger, nothing changes state, a live tunnel does not notice, memory stays bounded."""

from __future__ import annotations

import ipaddress
import os
import random
from typing import Any

import pytest

from qvpn.crypto import labels
from qvpn.handshake import responder
from qvpn.handshake.events import Failure
from qvpn.netio.base import Address
from qvpn.tunnel.keys import EpochState
from qvpn.wire import codec, datagram
from qvpn.wire.messages import M1, Mode, Outcome
from tests.simnet.world import Site, World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
SCALE = 10 if LONG else 1
STRANGER = Address(ipaddress.ip_address("198.51.100.66"), 4000)


def captured(world: World) -> list[tuple[Address, Address, bytes]]:
    """Everything that is sent from now on."""
    capture: list[tuple[Address, Address, bytes]] = []
    world.network.tap = lambda source, destination, data: capture.append((source, destination, data))
    return capture


def everything_as_before(world: World, drawn: int, epochs: int) -> None:
    assert sum(world.keys.drawn.values()) == drawn, "a stranger cost a key"
    assert len(world.a.installed) + len(world.b.installed) == epochs, "a stranger made an epoch"
    assert world.up()


def quiet_world(seed: int, **settings: Any) -> World:
    """Up, with the next rekey a long way off."""
    world = World(seed, rekey=3600.0, **settings).begin()
    assert world.run(10, world.up)
    world.run(1)
    return world


def test_garbage_with_right_looking_headers() -> None:
    world = quiet_world(41)
    before = sum(world.keys.drawn.values()), len(world.a.installed) + len(world.b.installed)
    chance = random.Random(41)
    for turn in range(3000 * SCALE):
        head = datagram.HEADER.pack(
            chance.randint(1, 6),
            1,
            1,
            chance.choice([0x01, 0x02, 0x12, 0x14]),
            *(chance.randbytes(4) for _ in range(3)),
        )
        source = Address(ipaddress.ip_address(chance.getrandbits(32)), chance.randint(1, 65535))
        world.network.inject(source, world.addresses["b"], head + chance.randbytes(chance.choice([64, 1152 + 32])))
        if turn % 500 == 0:
            world.run(0.5)
    sent = world.network.counts["sent"]
    world.run(1)
    assert world.network.counts["sent"] - sent < 5  # silence (but for keepalives)
    everything_as_before(world, *before)


def gate_key(world: World, sender: Site) -> bytes:
    """What anybody can compute who knows both public keys and that there is no PSK."""
    prints = [site.parameters.identity.public.fingerprint for site in world.sites]
    return datagram.gate_key(bytes(32), *prints, sender.parameters.identity.public.fingerprint)


def forged_m1(chance: random.Random, world: World, cookie: bytes | None = None) -> tuple[bytes, ...]:
    """An M1 in a's name with a good mac1."""
    from qvpn.crypto.kem import HybridKem
    from qvpn.crypto.suites import SUITES

    ephemeral = HybridKem().generate(SUITES[1])
    index = chance.randbytes(3) + b"\x10"
    body = codec.encode_m1(M1(index, ephemeral.ek, ephemeral.x25519))
    out = datagram.Outgoing(datagram.MessageType.M1, 1, index, bytes(4), chance.randbytes(4), body)
    return out.datagrams(gate_key(world, world.a), cookie)


def test_someone_who_knows_the_public_keys_gets_smaller_answers_only_and_stores_nothing() -> None:
    """Without a PSK the public keys make mac1.  Spoofed addresses: RETRY is all they cause, and it is smaller."""
    world = quiet_world(42)
    before = sum(world.keys.drawn.values()), len(world.a.installed) + len(world.b.installed)
    capture, chance = captured(world), random.Random(42)
    received = 0
    for _ in range(100 * SCALE):
        source = Address(ipaddress.ip_address(chance.getrandbits(32)), 1024)
        for raw in forged_m1(chance, world):
            world.network.inject(source, world.addresses["b"], raw)
            received += len(raw)
        world.run(0.01)
    answers = [data for source, _, data in capture if source == world.addresses["b"] and data[0] != 0x10]
    assert {data[0] for data in answers} == {5}
    assert sum(map(len, answers)) * 10 < received
    assert len(world.b.gate._questions) == 0
    assert world.b.machine.snapshot(world.now).answering == ()
    everything_as_before(world, *before)


def test_someone_who_has_the_cookie_too_gets_m2s_within_his_quota_and_no_key_is_drawn() -> None:
    world = quiet_world(43)
    before = sum(world.keys.drawn.values()), len(world.a.installed) + len(world.b.installed)
    capture, chance = captured(world), random.Random(43)
    cookie = world.b.gate._cookies.cookie(STRANGER, world.now)
    for _ in range(60 * SCALE):
        for raw in forged_m1(chance, world, cookie):
            world.network.inject(STRANGER, world.addresses["b"], raw)
        world.run(0.05)
        for kind in (datagram.MessageType.M3, datagram.MessageType.M3R):
            index = next(iter(world.b.port._owners))
            out = datagram.Outgoing(kind, 1, b"\1\2\3\x10", index, chance.randbytes(4), chance.randbytes(3400))
            for raw in out.datagrams(gate_key(world, world.a), cookie):
                world.network.inject(STRANGER, world.addresses["b"], raw)
        world.run(0.05)
    kinds = [data[0] for source, target, data in capture if source == world.addresses["b"] and target == STRANGER]
    assert set(kinds) == {2}
    assert len(world.b.machine.snapshot(world.now).answering) <= 4
    everything_as_before(world, *before)
    # and the true peer still gets in
    world.a.crash()
    world.a.begin()
    assert world.run(20, world.up)


def test_full_captures_replayed_in_any_order() -> None:
    """Starts, rekeys, data: everything once more, from the true addresses and from others, shuffled."""
    world = World(44, rekey=10.0)
    capture = captured(world)
    world.begin()
    assert world.run(10, world.up)
    world.traffic(0.5)
    world.run(32)
    world.quiet()
    drawn, epochs = sum(world.keys.drawn.values()), len(world.a.installed) + len(world.b.installed)
    world.network.tap = None
    for site in world.sites:
        site.machine._schedule(world.now + 1000, cold=False)  # no rekey of its own meanwhile
    lost = world.lost()
    chance = random.Random(44)
    again = [*capture, *((STRANGER, target, data) for _, target, data in capture)]
    chance.shuffle(again)
    for turn, (source, target, data) in enumerate(again):
        world.network.inject(source, target, data)
        if turn % 50 == 0:
            world.run(0.02)
    world.run(1)
    assert world.lost() == lost and max(world.a.received.values()) == max(world.b.received.values()) == 1
    everything_as_before(world, drawn, epochs)


def test_own_datagrams_reflected_are_nothing() -> None:
    world = World(45, rekey=10.0)
    capture = captured(world)
    world.begin()
    assert world.run(10, world.up)
    world.run(15)
    drawn, epochs = sum(world.keys.drawn.values()), len(world.a.installed) + len(world.b.installed)
    for source, target, data in list(capture):
        world.network.inject(target, source, data)
    world.run(1)
    everything_as_before(world, drawn, epochs)


class Tamperer:
    """Changes one bit of the first datagram of a type, and makes mac1 and mac2 good again."""

    def __init__(self, world: World, kind: int, chance: random.Random) -> None:
        self.world, self.kind, self.chance = world, kind, chance
        self.changed: int | None = None

    def __call__(self, source: Address, destination: Address, data: bytes) -> bool:
        if data[0] != self.kind or self.changed is not None or (self.kind == 1 and not any(data[-16:])):
            return False
        world = self.world
        sender, receiver = world.sites if source == world.addresses["a"] else world.sites[::-1]
        tail = 16 if self.kind == 5 else 32
        self.changed = self.chance.randrange(16, len(data) - tail)
        forged = bytearray(data[:-tail])
        forged[self.changed] ^= 1 << self.chance.randrange(8)
        forged += datagram.mac(gate_key(world, sender), bytes(forged))
        if self.kind in (1, 3):
            forged += datagram.mac(receiver.gate._cookies.cookie(source, world.now), bytes(forged))
        elif self.kind != 5:
            forged += bytes(16)
        world.network.inject(source, destination, bytes(forged))
        return True


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5])
def test_every_byte_of_every_message_counts(kind: int) -> None:
    """One bit of a message is wrong, sampled over its length: that one comes to nothing, its true repetition to an
    epoch, and no key is lost."""
    for sample in range(60 * SCALE):
        world = World(sample, b={"has_endpoint": False})
        tamperer = Tamperer(world, kind, random.Random(kind * 1000 + sample))
        world.network.filter = tamperer
        world.begin()
        assert world.run(29, world.up), f"byte {tamperer.changed} of type {kind}"
        world.run(1)
        assert tamperer.changed is not None
        assert sum(world.keys.drawn.values()) == 1
        assert [event.state for _, event in world.a.log.confirmed] == [EpochState.QKD]


@pytest.mark.parametrize("lie", ["unsigned", "wrong label", "other outcome", "ed25519 only", "mldsa only"])
@pytest.mark.parametrize("outcome", [Outcome.ABSENT, Outcome.CHAINED])
def test_a_forged_degraded_answer_is_refused(lie: str, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who has all of R's session secrets and not its signing keys cannot turn a handshake into one without
    a key: I drops the M4, keeps waiting, and installs nothing."""
    honest = responder.sign

    def forge(identity: Any, label: bytes, data: bytes) -> bytes:
        good = honest(identity, label, data)
        if label != labels.SIGN_DEGRADED:
            return good
        if lie == "unsigned":
            return bytes(len(good))
        if lie == "wrong label":
            return honest(identity, labels.SIGN_RESPONDER, data)
        if lie == "other outcome":
            return honest(identity, label, data[:-1] + bytes([data[-1] ^ 1]))
        return good[:64] + bytes(len(good) - 64) if lie == "ed25519 only" else bytes(64) + good[64:]

    world = World(46, mode=Mode.PREFER_QKD, rekey=10.0, max_qkd_age=600, b={"has_endpoint": False}).begin()
    if outcome is Outcome.CHAINED:
        assert world.run(10, world.up)
    world.keys.fault = {"a": "down", "b": "down"}
    monkeypatch.setattr(responder, "sign", forge)
    before = len(world.a.installed)
    if outcome is Outcome.ABSENT:
        world.a.crash()
        world.a.begin()
    world.run(25)
    assert len(world.a.installed) == before
    assert world.a.drops["handshake_authentication"] > 0  # type: ignore[index]
    assert all(event.state is EpochState.QKD for _, event in world.a.log.confirmed)


def test_r_never_answers_absent_to_a_key() -> None:
    """R cannot get the key that I offered: it says RETRY-KEY, and I decides (and signs)."""
    world = World(47, mode=Mode.PREFER_QKD, b={"has_endpoint": False})
    world.keys.fault["b"] = "unauthorised"
    outcomes: list[Outcome] = []
    honest = responder.codec.encode_p4

    def note(body: Any) -> bytes:
        outcomes.append(body.outcome)
        return honest(body)

    responder.codec.encode_p4 = note  # type: ignore[assignment]
    try:
        world.begin()
        assert world.run(10, lambda: world.up(EpochState.PQC))
    finally:
        responder.codec.encode_p4 = honest
    assert outcomes == [Outcome.RETRY_KEY, Outcome.ABSENT]


def test_a_wrong_peer_with_the_right_address_gets_nowhere() -> None:
    """b's place is taken by a site with other keys."""
    world = World(48)
    other = World(49)
    object.__setattr__(world.b.parameters, "identity", other.b.parameters.identity)
    from qvpn.config import identity

    object.__setattr__(world.b.parameters, "identity", identity.generate(3))
    world.begin()
    assert not world.run(60, world.up)
    assert world.network.counts["sent"] > 0 and sum(world.keys.drawn.values()) == 0
    assert world.a.drops.nonzero() == {"handshake_unknown_peer": world.a.drops["handshake_unknown_peer"]}  # type: ignore[index]


@pytest.mark.parametrize("psks", [(b"1" * 32, b"2" * 32), (b"1" * 32, None)])
def test_a_wrong_psk_is_silence(psks: tuple[bytes, bytes | None]) -> None:
    world = World(50, a={"psk": psks[0]}, b={"psk": psks[1]})
    capture = captured(world)
    world.begin()
    assert not world.run(60, world.up)
    assert {data[0] for _, _, data in capture} == {1}
    assert sum(world.keys.drawn.values()) == 0


def test_one_saes_name_differs_and_it_shows_as_a_mismatch() -> None:
    world = World(51, a={}, b={})
    object.__setattr__(world.b.parameters, "sae_remote", "sae-somebody")
    world.begin()
    assert not world.run(40, world.up)
    assert "key_mismatch" in {kind for _, kind in world.a.log.alarms}
    assert Failure.KEY_MISMATCH in {event.failure for _, event in world.a.log.failed + world.b.log.failed}


def test_suites_that_differ_never_meet() -> None:
    world = World(52, a={"suites": (1,)}, b={"suites": (2,)}).begin()
    assert not world.run(40, world.up)
    world = World(52, a={"suites": (2, 1)}, b={"suites": (1, 2)}).begin()
    assert world.run(20, world.up)
