"""The machine itself, fed with the recorded randomness, puts the vectors' very bytes on the wire."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any

import pytest

from qvpn.crypto.kem import Encapsulated, HybridEphemeral
from qvpn.crypto.suites import SUITES, Suite
from qvpn.handshake import initiator, responder
from qvpn.handshake.carrier import Cold
from qvpn.handshake.events import Install, NeedKey, SendCold
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import KeyFault, KeyMaterial, PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.wire import datagram
from qvpn.wire.fragments import Reassembler
from qvpn.wire.messages import MessageType, Mode, Outcome, WireOrigin
from tests.vectors import generate, recompute

CASES = [(1, "cold-ok"), (2, "cold-ok"), (3, "cold-retry-absent")]


@dataclass(frozen=True)
class Where:
    ip: ipaddress.IPv4Address
    port: int = 51840


class RecordedKem:
    """Ephemeral keys and encapsulation as the vector has them."""

    def __init__(self, exchange: dict[str, Any]) -> None:
        self.exchange = exchange

    def generate(self, suite: Suite) -> HybridEphemeral:
        x25519 = generate.X25519PrivateKey.from_private_bytes(self.exchange["x25519_secret_i"])
        return HybridEphemeral(suite.mlkem_private.from_seed_bytes(self.exchange["mlkem_seed"]), x25519)

    def encapsulate_untrusted(self, suite: Suite, ek: bytes, x25519: bytes) -> Encapsulated:
        ciphertext = self.exchange["m2c"][4 : 4 + suite.ct_bytes]
        public = self.exchange["m2c"][4 + suite.ct_bytes : 36 + suite.ct_bytes]
        return Encapsulated(ciphertext, public, self.exchange["ss_mlkem"] + self.exchange["ss_x25519"])


def sites(code: int) -> tuple[generate.Site, generate.Site]:
    random = generate.Stream(f"qvpn vectors v1, suite {code}")
    one, other = (generate.Site.make(random, SUITES[code].level, sae) for sae in ("sae-alice", "sae-bob"))
    return one, other


def machine(own: generate.Site, peer: generate.Site, index: bytes, hs: dict[str, Any], code: int) -> PeerHandshake:
    label = hs["rounds"][0]["key"]["label"]
    mode = Mode(hs["rounds"][0]["p3"][0])
    parameters = PeerParameters(
        "peer",
        own.identity,
        (peer.identity.public,),
        psk=hs["inputs"]["psk"],
        suites=(code,),
        mode=mode,
        label=label,
        sae_local=own.sae,
        sae_remote=peer.sae,
    )
    randomness = Randomness(generate.Stream("message ids"), lambda: 0.5, RecordedKem(hs["exchange"]))
    made = PeerHandshake(parameters, Port(lambda count: index), randomness, 0.0)
    made.source_ready(True, 0.0)
    return made


def messages(made: PeerHandshake) -> list[tuple[MessageType, bytes, Cold]]:
    """What it wants sent, put together again, with the carrier the other side sees; other events are dealt with."""
    found: list[tuple[MessageType, bytes, Cold]] = []
    while (event := made.next_event()) is not None:
        if not isinstance(event, SendCold):
            continue
        pool = Reassembler(1)
        for raw in event.datagrams:
            part = datagram.decode_untrusted(raw)
            whole = pool.add(part.message_id, (), part, 0.0)
        carrier = Cold(
            Where(ipaddress.IPv4Address("192.0.2.1")), part.suite, part.sender, part.receiver, part.message_id
        )
        assert whole is not None
        found.append((part.type, whole, carrier))
    return found


@pytest.mark.parametrize(("code", "name"), CASES)
def test_both_machines_reproduce_the_handshake(code: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = json.loads((generate.FOLDER / generate.FILES[code - 1]).read_text())
    hs = recompute.unhex(next(entry for entry in file["handshakes"] if entry["name"] == name))
    site_i, site_r = sites(code)
    signing = {site.identity.public.fingerprint: site for site in (site_i, site_r)}

    def sign(identity: Any, label: bytes, data: bytes) -> bytes:
        return signing[identity.public.fingerprint].sign(label, data)

    monkeypatch.setattr(initiator, "sign", sign)
    monkeypatch.setattr(responder, "sign", sign)
    one = machine(site_i, site_r, hs["exchange"]["index_i"], hs, code)
    other = machine(site_r, site_i, hs["exchange"]["index_r"], hs, code)
    wanted = [(1, hs["exchange"]["m1"]), (2, hs["m2"]["message"])]
    for shown in hs["rounds"]:
        wanted += [(shown["message_type"], shown["e3"]), (4, shown["e4"])]
    seen, installs = [], []
    last = hs["rounds"][-1]

    def keep(made: PeerHandshake, first: dict[str, Any]) -> None:
        """Note installs and answer key requests, as a driver would, with the vector's key."""
        original = made.next_event

        def next_event() -> Any:
            event = original()
            if isinstance(event, Install):
                installs.append(event.keys)
            if isinstance(event, NeedKey):
                key = first["key"]
                fails = event.key is not None and first["outcome"] != Outcome.OK
                material = bytearray(first["epoch"]["k_qkd"] if "epoch" in first else bytes(32))
                answer = KeyMaterial(key["key_id"], WireOrigin(key["origin"]), key["hops"], material)
                made.key(event.request, KeyFault.UNAVAILABLE if fails else answer, 0.0)
            return event

        made.next_event = next_event  # type: ignore[method-assign]

    for made in (one, other):
        keep(made, hs["rounds"][0])
    one.start(0.0)
    turn, waiting = [one, other], messages(one)
    while waiting:
        kind, body, carrier = waiting.pop(0)
        seen.append((kind, body))
        receiver = turn[1] if kind in (MessageType.M1, MessageType.M3, MessageType.M3R) else turn[0]
        assert receiver.receive(kind, body, carrier, 0.0) is None
        waiting += messages(receiver)
    assert [(int(kind), body.hex()) for kind, body in seen] == [(kind, body.hex()) for kind, body in wanted]
    of_r, of_i = installs
    assert of_i.send_key(0) == of_r.receive_key(0) == last["epoch"]["record_key_i2r"]
    assert of_i.receive_key(0) == of_r.send_key(0) == last["epoch"]["record_key_r2i"]
    assert of_i.send_key(3) == last["epoch"]["record_key_i2r_lane_3"]
