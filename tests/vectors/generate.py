"""Make the vectors of protocol version 1 again: ``python -m tests.vectors.generate [FOLDER]``.

Everything that is random in life comes from :class:`Stream` here, so each run writes the same bytes.  The library
offers neither a seeded encapsulation nor a deterministic signature; kyber-py and dilithium-py (independent, pure
Python) stand in for those two, and the library then checks what they made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA87PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from dilithium_py.ml_dsa import ML_DSA_65, ML_DSA_87
from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

from qvpn.config.identity import Identity
from qvpn.crypto import aead, kdf, labels
from qvpn.crypto.sign import verifies
from qvpn.crypto.suites import SUITES, Suite
from qvpn.handshake import schedule
from qvpn.tunnel.records import Sealer
from qvpn.wire import codec, datagram
from qvpn.wire.messages import (
    M1,
    NO_CHAIN,
    NO_INDEX,
    P2,
    P3,
    P4,
    TLV_CLAIM,
    TLV_LANES,
    KeyName,
    MessageType,
    Mode,
    Outcome,
    Policy,
    Reason,
    WireOrigin,
)

FOLDER = Path(__file__).parent
FILES = ("suite01.json", "suite02.json", "suite03.json")
KEMS = {1184: ML_KEM_768, 1568: ML_KEM_1024}
SIGNERS = {3: ML_DSA_65, 5: ML_DSA_87}
ADDRESS_I, ADDRESS_R = "192.0.2.1", "2001:db8::2"
PORT_I, PORT_R = 51840, 51841
UUID_KEY = KeyName("kme", "018f3a52-91d2-8c44-9f10-2b5a0d6c7e81", WireOrigin.QKD, 0)
OTHER_UUID_KEY = KeyName("kme", "018f3a52-91d2-8c44-9f10-2b5a0d6c7e82", WireOrigin.RELAYED, 2)
TEXT_KEY = KeyName("courier-box", "box-17/000042", WireOrigin.COURIERED, 0)


class Stream:
    """Bytes that look random and are not: SHA-256 of seed and counter."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self._counter = 0

    def __call__(self, count: int) -> bytes:
        out = b""
        while len(out) < count:
            out += hashlib.sha256(self._seed + self._counter.to_bytes(4, "big")).digest()
            self._counter += 1
        return out[:count]

    def index(self) -> bytes:
        raw = self(4)
        return raw[:3] + bytes([raw[3] & 0xF0])


@dataclass(frozen=True)
class Site:
    """A site's keys, from two 32-byte seeds."""

    identity: Identity
    ed_seed: bytes
    ml_seed: bytes
    sae: str

    @classmethod
    def make(cls, random: Stream, level: int, sae: str) -> Site:
        ed_seed, ml_seed = random(32), random(32)
        mldsa = (MLDSA65PrivateKey if level == 3 else MLDSA87PrivateKey).from_seed_bytes(ml_seed)
        return cls(Identity(Ed25519PrivateKey.from_private_bytes(ed_seed), mldsa, level), ed_seed, ml_seed, sae)

    @property
    def fingerprint(self) -> bytes:
        return self.identity.public.fingerprint

    def sign(self, label: bytes, data: bytes) -> bytes:
        """Deterministic; the library must find it good."""
        signer, message = SIGNERS[self.identity.level], label + data
        _, secret = signer.key_derive(self.ml_seed)
        signatures = self.identity.ed25519.sign(message) + signer.sign(secret, message, label, deterministic=True)
        assert verifies(self.identity.public, label, data, signatures)
        return bytes(signatures)

    def show(self) -> dict[str, Any]:
        public = self.identity.public
        return {
            "ed25519_seed": self.ed_seed,
            "mldsa_seed": self.ml_seed,
            "ed25519_public": public.ed25519.public_bytes_raw(),
            "mldsa_public": public.mldsa.public_bytes_raw(),
            "fingerprint": public.fingerprint,
            "sae": self.sae,
        }


@dataclass(frozen=True)
class Round:
    """One M3 or M3R and R's answer.  ``key`` None: n is 0."""

    outcome: Outcome
    key: KeyName | None = None
    reason: Reason = Reason.NONE


@dataclass(frozen=True)
class Case:
    """What a vector shall show."""

    name: str
    about: str
    rounds: tuple[Round, ...]
    carrier: str = "cold"
    psk: bool = False
    chain: int = 0
    """chain_sel."""
    modes: tuple[Mode, Mode] = (Mode.REQUIRE_QKD, Mode.REQUIRE_QKD)
    max_qkd_age: int = 0
    ready: tuple[bool, bool] = (True, True)
    tlvs: dict[int, bytes] = dataclasses.field(default_factory=dict)


CASES = {
    1: (
        Case("cold-ok", "first contact, the key is taken at once", (Round(Outcome.OK, UUID_KEY),)),
        Case(
            "inner-retry-ok",
            "rekey with PSK and chain; R lacks the first key, takes the second; text key_ID, TLVs",
            (
                Round(Outcome.RETRY_KEY, UUID_KEY, Reason.UNKNOWN_KEY),
                Round(Outcome.OK, TEXT_KEY),
            ),
            carrier="inner",
            psk=True,
            chain=1,
            tlvs={TLV_LANES: b"\x02", TLV_CLAIM: b"position 17, seen 16", 0x7ABC: b"unknown, not critical"},
        ),
        Case(
            "cold-mismatch-absent",
            "I found confirm_R wrong twice; prefer-qkd goes on without a key",
            (Round(Outcome.OK, UUID_KEY), Round(Outcome.OK, OTHER_UUID_KEY), Round(Outcome.ABSENT)),
            chain=2,
            modes=(Mode.PREFER_QKD, Mode.PREFER_QKD),
        ),
        Case(
            "inner-chained",
            "n = 0 under require-qkd, the chain holds a young key",
            (Round(Outcome.CHAINED),),
            carrier="inner",
            chain=1,
            max_qkd_age=3600,
            ready=(True, False),
        ),
        Case(
            "cold-refused",
            "R's policy takes no key",
            (Round(Outcome.REFUSED, UUID_KEY, Reason.POLICY),),
            modes=(Mode.PREFER_QKD, Mode.PQC_ONLY),
        ),
    ),
    2: (
        Case("cold-ok", "ChaCha20-Poly1305, PSK", (Round(Outcome.OK, UUID_KEY),), psk=True),
        Case(
            "inner-absent",
            "pqc-only at both ends",
            (Round(Outcome.ABSENT),),
            carrier="inner",
            chain=1,
            modes=(Mode.PQC_ONLY, Mode.PQC_ONLY),
            ready=(False, False),
        ),
    ),
    3: (
        Case("cold-ok", "level 5, PSK and chain", (Round(Outcome.OK, OTHER_UUID_KEY),), psk=True, chain=1),
        Case(
            "cold-retry-absent",
            "level 5, R's source is down, prefer-qkd",
            (Round(Outcome.RETRY_KEY, UUID_KEY, Reason.UNAVAILABLE), Round(Outcome.ABSENT)),
            modes=(Mode.PREFER_QKD, Mode.PREFER_QKD),
        ),
    ),
}


class Handshake:
    """Plays one case message by message and writes down every value."""

    def __init__(self, suite: Suite, case: Case, site_i: Site, site_r: Site, random: Stream) -> None:
        self.suite, self.case, self.i, self.r, self.random = suite, case, site_i, site_r, random
        self.psk = random(32) if case.psk else None
        self.index_i, self.index_r = random.index(), random.index()
        self.th4 = self.e4 = b""  # of the round before
        self.out: dict[str, Any] = {"name": case.name, "about": case.about, "carrier": case.carrier}

    def run(self) -> dict[str, Any]:
        self._inputs()
        self._exchange()
        self._second_message()
        for attempt, entry in enumerate(self.case.rounds):
            self._round(attempt, entry)
        self.out["datagrams" if self.case.carrier == "cold" else "payloads"] = list(self._carried())
        return self.out

    def _inputs(self) -> None:
        chains = [(self.random(48), number) for number in (41, 40)]
        chosen = chains[self.case.chain - 1] if self.case.chain else None
        self.chain = chosen[0] if chosen else None
        self.epoch = chosen[1] + 1 if chosen else 0
        self.offered = [schedule.chain_id(secret) for secret, _ in chains] if chosen else [NO_CHAIN, NO_CHAIN]
        self.out["inputs"] = {
            "psk": self.psk,
            "chain_sel": self.case.chain,
            "c_prev": self.chain,
            "epoch": self.epoch,
            "low": min(self.i.fingerprint, self.r.fingerprint),
            "high": max(self.i.fingerprint, self.r.fingerprint),
        }

    def _exchange(self) -> None:
        kem, seed, message = KEMS[self.suite.ek_bytes], self.random(64), self.random(32)
        x_i, x_r = (X25519PrivateKey.from_private_bytes(self.random(32)) for _ in range(2))
        ek, _ = kem.key_derive(seed)
        ss_mlkem, ct = kem._encaps_internal(ek, message)
        assert self.suite.mlkem_private.from_seed_bytes(seed).decapsulate(ct) == ss_mlkem
        self.m1 = codec.encode_m1(M1(self.index_i, ek, x_i.public_key().public_bytes_raw(), *self.offered))
        public_r = x_r.public_key().public_bytes_raw()
        self.m2c = codec.encode_m2_clear(self.index_r, ct, public_r, self.case.chain)
        ss_x25519 = x_i.exchange(X25519PublicKey.from_public_bytes(public_r))
        ctx = schedule.context(self.suite.code, self.i.fingerprint, self.r.fingerprint, self.psk, self.epoch)
        self.kex = schedule.key_exchange(ctx, self.chain, self.psk, ss_mlkem + ss_x25519, self.m1, self.m2c)
        self.out["exchange"] = {
            "index_i": self.index_i,
            "index_r": self.index_r,
            "mlkem_seed": seed,
            "mlkem_encapsulation_randomness": message,
            "x25519_secret_i": x_i.private_bytes_raw(),
            "x25519_secret_r": x_r.private_bytes_raw(),
            "ss_mlkem": ss_mlkem,
            "ss_x25519": ss_x25519,
            "m1": self.m1,
            "m2c": self.m2c,
            "ctx": ctx,
            "cs0": kdf.extract(self.chain or bytes(48), self.psk or bytes(32)),
            "cs1": self.kex.chain_secret,
            **{name: getattr(self.kex, name) for name in ("hk_r", "iv_r", "hk_i", "iv_i", "th1")},
        }

    def _second_message(self) -> None:
        p2 = codec.encode_p2(P2(self._policy(1), dict(self.case.tlvs)))
        self.th2 = schedule.th2(self.kex.th1, p2)
        signatures = self.r.sign(labels.SIGN_RESPONDER, self.th2)
        self.e2 = aead.seal(self.suite, self.kex.hk_r, self.kex.iv_r, 0, self.kex.th1, p2 + signatures)
        self.out["m2"] = {"p2": p2, "th2": self.th2, "signatures": signatures, "e2": self.e2}
        self.out["m2"]["message"] = self.m2c + self.e2
        self.out["rounds"] = []

    def _round(self, attempt: int, entry: Round) -> None:
        keys = () if entry.key is None else (entry.key,)
        p3 = codec.encode_p3(P3(self._policy(0), attempt, keys, dict(self.case.tlvs)))
        if attempt == 0:
            before, sealed, aad = self.th2, self.e2, self.th2
        else:
            before, sealed = self.th4, self.e4
            aad = schedule.retry_aad(before, sealed)
        th3 = schedule.th3(before, sealed, p3)
        signatures = self.i.sign(labels.SIGN_INITIATOR, th3)
        e3 = aead.seal(self.suite, self.kex.hk_i, self.kex.iv_i, attempt, aad, p3 + signatures)
        self.th4 = schedule.th4(th3, e3)
        shown: dict[str, Any] = {
            "message_type": MessageType.M3R if attempt else MessageType.M3,
            "attempt": attempt,
            "key": None if entry.key is None else dataclasses.asdict(entry.key),
            "p3": p3,
            "aad3": aad,
            "th3": th3,
            "signatures": signatures,
            "e3": e3,
            "th4": self.th4,
            "outcome": entry.outcome,
            "reason": entry.reason,
        }
        self._answer(attempt, entry, e3, shown)
        self.out["rounds"].append(shown)

    def _answer(self, attempt: int, entry: Round, e3: bytes, shown: dict[str, Any]) -> None:
        p4 = P4(entry.outcome, entry.reason)
        if entry.outcome.confirmed:
            material = self.random(32) if entry.outcome is Outcome.OK else b""
            keys = schedule.keys_info([] if entry.key is None else [entry.key], self.i.sae, self.r.sae)
            final = schedule.qkd_round(self.kex, material, e3, entry.outcome, keys, self.th4)
            signatures = b""
            if entry.outcome.degraded:
                signatures = self.r.sign(labels.SIGN_DEGRADED, self.th4 + bytes([entry.outcome]))
            p4 = P4(entry.outcome, Reason.NONE, final.confirm, signatures)
            shown["epoch"] = self._epoch(material, keys, final)
        plaintext = codec.encode_p4(p4)
        self.e4 = aead.seal(self.suite, self.kex.hk_r, self.kex.iv_r, 1 + attempt, self.th4, plaintext)
        shown |= {"p4": plaintext, "e4": self.e4}

    def _epoch(self, material: bytes, keys: bytes, final: schedule.Final) -> dict[str, Any]:
        return {
            "k_qkd": material,
            "keys": keys,
            "confirm_r": final.confirm,
            "traffic_i2r": final.traffic_i2r,
            "traffic_r2i": final.traffic_r2i,
            "c_next": final.chain,
            "chain_id": schedule.chain_id(final.chain),
            "record_key_i2r": final.record_key(True, 0),
            "record_key_r2i": final.record_key(False, 0),
            "record_key_i2r_lane_3": final.record_key(True, 3),
            "records": list(self._records(final)),
        }

    def _records(self, final: schedule.Final) -> Iterator[dict[str, Any]]:
        """By I and by R: a control record, then three data records of two blocks."""
        for sender, first, index in (("I", True, self.index_r), ("R", False, self.index_i)):
            sealer = Sealer(self.suite.cipher, final.record_key(first, 0), int.from_bytes(index, "big"))
            control = bytes([2 if first else 3])
            yield {"sender": sender, "kind": "control", "plaintext": control, "record": sealer.seal_control(control)}
            for size in (2, 1):
                plaintexts = [bytes(10) + self._packet(sender, number) for number in range(size)]
                out = bytearray(4096)
                lengths = sealer.seal_batch([memoryview(text) for text in plaintexts], memoryview(out))
                start = 0
                for text, length in zip(plaintexts, lengths, strict=True):
                    record = bytes(out[start : start + length])
                    yield {"sender": sender, "kind": "data", "plaintext": text, "record": record}
                    start += length

    def _packet(self, sender: str, number: int) -> bytes:
        """A small IPv4 packet (UDP, no checksum)."""
        body = f"packet {number} of {sender}".encode()
        ends = [bytes((10, 90, 0, 1)), bytes((10, 90, 0, 2))]
        source, destination = ends if sender == "I" else reversed(ends)
        udp = b"\x10\x00\x20\x00" + (8 + len(body)).to_bytes(2, "big") + bytes(2) + body
        head = (
            b"\x45\x00" + (20 + len(udp)).to_bytes(2, "big") + bytes(4) + b"\x40\x11\x00\x00" + source + destination
        )
        total = sum(int.from_bytes(head[at : at + 2], "big") for at in range(0, 20, 2))
        total = (total & 0xFFFF) + (total >> 16)
        return head[:10] + (0xFFFF - total).to_bytes(2, "big") + head[12:] + udp

    def _policy(self, side: int) -> Policy:
        return Policy(self.case.modes[side], self.case.ready[side], self.case.max_qkd_age)

    def _carried(self) -> Iterator[dict[str, Any]]:
        """Every datagram or control payload that the case puts on the wire, in order."""
        messages = [("I", MessageType.M1, self.m1), ("R", MessageType.M2, self.m2c + self.e2)]
        for shown in self.out["rounds"]:
            messages += [("I", shown["message_type"], shown["e3"]), ("R", MessageType.M4, shown["e4"])]
        if self.case.carrier == "inner":
            for sender, kind, body in messages:
                index = self.index_r if kind in (MessageType.M3, MessageType.M3R) else self.index_i
                outgoing = datagram.Outgoing(kind, self.suite.code, NO_INDEX, NO_INDEX, self.random(4), body)
                yield {"sender": sender, "type": kind, "payloads": list(outgoing.payloads(index))}
            return
        yield from self._cold(messages)

    def _cold(self, messages: list[tuple[str, MessageType, bytes]]) -> Iterator[dict[str, Any]]:
        psk = self.psk or bytes(32)
        gates = {
            sender: datagram.gate_key(psk, self.i.fingerprint, self.r.fingerprint, site.fingerprint)
            for sender, site in (("I", self.i), ("R", self.r))
        }
        secret, nonce = self.random(32), self.random(16)
        address = b"\0" * 10 + b"\xff\xff" + bytes(map(int, ADDRESS_I.split("."))) + PORT_I.to_bytes(2, "big")
        cookie = datagram.mac(secret, address)
        self.out["gate"] = {"gk_i": gates["I"], "gk_r": gates["R"], "cookie_secret": secret, "address_i": address}
        self.out["gate"] |= {"cookie": cookie, "retry_nonce": nonce}
        for sender, kind, body in messages:
            ends = (self.index_i, self.index_r) if sender == "I" else (self.index_r, self.index_i)
            receiver = NO_INDEX if kind is MessageType.M1 else ends[1]
            outgoing = datagram.Outgoing(kind, self.suite.code, ends[0], receiver, self.random(4), body)
            if kind is MessageType.M1:
                first = outgoing.datagrams(gates["I"], None)
                yield {"sender": "I", "type": kind, "cookie": False, "datagrams": list(first)}
                retry = datagram.encode_retry(datagram.decode_untrusted(first[0]), gates["R"], cookie, nonce)
                yield {"sender": "R", "type": MessageType.RETRY, "cookie": False, "datagrams": [retry]}
            sent = outgoing.datagrams(gates[sender], cookie if sender == "I" else None)
            yield {"sender": sender, "type": kind, "cookie": sender == "I", "datagrams": list(sent)}


def vectors(code: int) -> dict[str, Any]:
    """The whole file of one suite, ready for JSON."""
    suite = SUITES[code]
    random = Stream(f"qvpn vectors v1, suite {code}")
    sites = [Site.make(random, suite.level, sae) for sae in ("sae-alice", "sae-bob")]
    cases = [Handshake(suite, case, sites[0], sites[1], random).run() for case in CASES[code]]
    head = {"protocol": 1, "suite": code, "suite_name": suite.name, "I": sites[0].show(), "R": sites[1].show()}
    shown: dict[str, Any] = _plain({**head, "handshakes": cases})
    return shown


def _plain(value: Any) -> Any:
    """Bytes as lower-case hexadecimal, enums as numbers."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def text(code: int) -> str:
    return json.dumps(vectors(code), indent=1, ensure_ascii=True) + "\n"


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else FOLDER
    for code, name in zip(SUITES, FILES, strict=True):
        (folder / name).write_text(text(code))


if __name__ == "__main__":
    main(sys.argv[1:])
