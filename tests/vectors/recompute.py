"""Chapters 2 to 5, 10 and 11 of PROTOCOL.md once more, from the text alone: nothing of qvpn is imported here.

``check(vector file as parsed JSON)`` recomputes every value from the inputs (seeds, secrets, recorded randomness)
with the standard library's ``hmac`` and ``hashlib`` and the plain primitives of ``cryptography``, and raises
AssertionError at the first that differs.  Signatures are verified, not made again.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

LABEL = {"R": b"qvpn1 R auth", "I": b"qvpn1 I auth", "degraded": b"qvpn1 R degraded"}


def unhex(value: Any) -> Any:
    """Hexadecimal strings to bytes, but for the few fields that are text."""
    words = ("name", "about", "suite_name", "sae", "carrier", "sender", "kind", "label", "key_id")
    if isinstance(value, dict):
        return {key: entry if key in words else unhex(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [unhex(entry) for entry in value]
    return bytes.fromhex(value) if isinstance(value, str) else value


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def lp(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def h(*parts: bytes) -> bytes:
    return sha384(b"".join(map(lp, parts)))


def hmac384(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha384).digest()


def expand(prk: bytes, info: bytes, length: int) -> bytes:
    blocks = [b""]
    while sum(map(len, blocks)) < length:
        blocks.append(hmac384(prk, blocks[-1] + info + bytes([len(blocks)])))
    return b"".join(blocks)[:length]


def cas_kdf(chain: bytes, key: bytes, ma: bytes, mb: bytes, label: bytes, info: bytes) -> tuple[bytes, bytes]:
    out = expand(hmac384(label, hmac384(chain, h(key, ma, mb))), info, 48 + 96)
    return out[:48], out[48:]


def mac16(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()[:16]


def shift(iv: bytes, number: int) -> bytes:
    return iv[:4] + bytes(a ^ b for a, b in zip(iv[4:], number.to_bytes(8, "big"), strict=True))


def verify(site: dict[str, Any], label: bytes, data: bytes, signatures: bytes) -> None:
    """Raises InvalidSignature."""
    family = mldsa.MLDSA65PublicKey if len(site["mldsa_public"]) == 1952 else mldsa.MLDSA87PublicKey
    ed25519.Ed25519PublicKey.from_public_bytes(site["ed25519_public"]).verify(signatures[:64], label + data)
    family.from_public_bytes(site["mldsa_public"]).verify(signatures[64:], label + data, label)


class Reader:
    """Recomputes one suite's file."""

    def __init__(self, file: dict[str, Any]) -> None:
        self.file = unhex(file)
        self.suite = self.file["suite"]
        self.aead = ChaCha20Poly1305 if self.suite == 2 else AESGCM
        self.sites = {"I": self.file["I"], "R": self.file["R"]}

    def check(self) -> int:
        """How many values were compared."""
        self.count = 0
        for site in self.sites.values():
            self._site(site)
        for handshake in self.file["handshakes"]:
            self._handshake(handshake)
        return self.count

    def _same(self, name: str, computed: bytes, shown: bytes) -> None:
        assert computed == shown, f"{name}: {computed.hex()[:64]} is not {shown.hex()[:64]}"
        self.count += 1

    def _site(self, site: dict[str, Any]) -> None:
        level5 = self.suite == 3
        private = mldsa.MLDSA87PrivateKey if level5 else mldsa.MLDSA65PrivateKey
        ed = ed25519.Ed25519PrivateKey.from_private_bytes(site["ed25519_seed"]).public_key().public_bytes_raw()
        ml = private.from_seed_bytes(site["mldsa_seed"]).public_key().public_bytes_raw()
        self._same("ed25519_public", ed, site["ed25519_public"])
        self._same("mldsa_public", ml, site["mldsa_public"])
        self._same("fingerprint", sha384(bytes([3 if level5 else 1]) + ed + ml), site["fingerprint"])

    def _handshake(self, hs: dict[str, Any]) -> None:
        cs1, th1 = self._exchange(hs)
        before, sealed = self._m2(hs, th1)
        aad = before
        for shown in hs["rounds"]:
            before, sealed = self._round(hs, shown, before, sealed, aad, cs1)
            aad = h(before, sealed)
        messages = [hs["exchange"]["m1"], hs["m2"]["message"]]
        for shown in hs["rounds"]:
            messages += [shown["e3"], shown["e4"]]
        if hs["carrier"] == "cold":
            self._datagrams(hs, messages)
        else:
            self._payloads(hs, messages)

    def _exchange(self, hs: dict[str, Any]) -> tuple[bytes, bytes]:
        inputs, ex = hs["inputs"], hs["exchange"]
        fpr_i, fpr_r = self.sites["I"]["fingerprint"], self.sites["R"]["fingerprint"]
        ek_size, ct_size = (1568, 1568) if self.suite == 3 else (1184, 1088)
        kem = mlkem.MLKEM1024PrivateKey if self.suite == 3 else mlkem.MLKEM768PrivateKey
        m1, m2c = ex["m1"], ex["m2c"]
        secret = kem.from_seed_bytes(ex["mlkem_seed"])
        self._same("index_I", m1[:4], ex["index_i"])
        self._same("ek", m1[4 : 4 + ek_size], secret.public_key().public_bytes_raw())
        self._same("index_R", m2c[:4], ex["index_r"])
        self._same("ss_mlkem", secret.decapsulate(m2c[4 : 4 + ct_size]), ex["ss_mlkem"])
        x_i = x25519.X25519PrivateKey.from_private_bytes(ex["x25519_secret_i"])
        x_r = x25519.X25519PrivateKey.from_private_bytes(ex["x25519_secret_r"])
        self._same("X_I", m1[4 + ek_size : 36 + ek_size], x_i.public_key().public_bytes_raw())
        self._same("X_R", m2c[4 + ct_size : 36 + ct_size], x_r.public_key().public_bytes_raw())
        self._same("ss_x25519", x_i.exchange(x_r.public_key()), ex["ss_x25519"])
        selected = m2c[-1]
        assert selected == inputs["chain_sel"]
        if selected:
            offered = m1[36 + ek_size :][8 * (selected - 1) :][:8]
            self._same("chain id", expand(inputs["c_prev"], b"chain id", 8), offered)
        psk = inputs["psk"] or bytes(32)
        ctx = h(
            b"qvpn1",
            bytes([self.suite]),
            fpr_i,
            fpr_r,
            bytes([inputs["psk"] is not None]),
            inputs["epoch"].to_bytes(4, "big"),
        )
        self._same("ctx", ctx, ex["ctx"])
        self._same("cs0", hmac384(inputs["c_prev"] or bytes(48), psk), ex["cs0"])
        cs1, km = cas_kdf(ex["cs0"], ex["ss_mlkem"] + ex["ss_x25519"], m1, m2c, b"qvpn1 kex", ctx)
        self._same("cs1", cs1, ex["cs1"])
        for name, at, size in (("hk_r", 0, 32), ("iv_r", 32, 12), ("hk_i", 44, 32), ("iv_i", 76, 12)):
            self._same(name, km[at : at + size], ex[name])
        self._same("th1", h(ctx, m1, m2c), ex["th1"])
        return cs1, ex["th1"]

    def _m2(self, hs: dict[str, Any], th1: bytes) -> tuple[bytes, bytes]:
        m2, ex = hs["m2"], hs["exchange"]
        opened = self.aead(ex["hk_r"]).decrypt(shift(ex["iv_r"], 0), m2["e2"], th1)
        self._same("P2 and signatures", opened, m2["p2"] + m2["signatures"])
        self._same("th2", h(th1, m2["p2"]), m2["th2"])
        verify(self.sites["R"], LABEL["R"], m2["th2"], m2["signatures"])
        self._same("M2", ex["m2c"] + m2["e2"], m2["message"])
        return m2["th2"], m2["e2"]

    def _round(
        self, hs: dict[str, Any], shown: dict[str, Any], before: bytes, sealed: bytes, aad: bytes, cs1: bytes
    ) -> tuple[bytes, bytes]:
        ex, attempt = hs["exchange"], shown["attempt"]
        self._same("aad of M3", aad, shown["aad3"])
        opened = self.aead(ex["hk_i"]).decrypt(shift(ex["iv_i"], attempt), shown["e3"], aad)
        self._same("P3 and signatures", opened, shown["p3"] + shown["signatures"])
        assert shown["p3"][8] == attempt
        self._same("th3", h(before, sealed, shown["p3"]), shown["th3"])
        verify(self.sites["I"], LABEL["I"], shown["th3"], shown["signatures"])
        self._same("th4", h(shown["th3"], shown["e3"]), shown["th4"])
        p4 = self.aead(ex["hk_r"]).decrypt(shift(ex["iv_r"], 1 + attempt), shown["e4"], shown["th4"])
        self._same("P4", p4, shown["p4"])
        assert p4[:2] == bytes([shown["outcome"], shown["reason"]])
        if shown["outcome"] in (2, 3):
            verify(self.sites["R"], LABEL["degraded"], shown["th4"] + p4[:1], p4[34:])
        if "epoch" in shown:
            self._epoch(hs, shown, cs1, p4)
        return shown["th4"], shown["e4"]

    def _epoch(self, hs: dict[str, Any], shown: dict[str, Any], cs1: bytes, p4: bytes) -> None:
        epoch, th4, ctx = shown["epoch"], shown["th4"], hs["exchange"]["ctx"]
        keys = b""
        if shown["p3"][9]:
            size = 1 + shown["p3"][10]  # label with its length
            kind = shown["p3"][10 + size]
            size += 1 + (16 if kind == 0 else 1 + shown["p3"][11 + size]) + 2
            saes = [self.sites[role]["sae"].encode() for role in "IR"]
            keys = lp(shown["p3"][10 : 10 + size]) + b"".join(map(lp, saes))
        self._same("keys", keys, epoch["keys"])
        info = h(ctx, keys, th4)
        cs2, km2 = cas_kdf(cs1, epoch["k_qkd"], shown["e3"], bytes([shown["outcome"]]), b"qvpn1 qkd", info)
        master = km2[:48]
        confirm = hmac384(expand(master, b"R confirm" + th4, 32), th4)[:32]
        self._same("confirm_R", confirm, epoch["confirm_r"])
        self._same("confirm_R in P4", confirm, p4[2:34])
        for way in ("I2R", "R2I"):
            traffic = expand(master, b"traffic " + way.encode() + th4, 48)
            self._same(way, traffic, epoch[f"traffic_{way.lower()}"])
            self._same("record key", expand(traffic, b"record key\0", 32), epoch[f"record_key_{way.lower()}"])
        lane3 = expand(epoch["traffic_i2r"], b"record key\3", 32)
        self._same("record key of lane 3", lane3, epoch["record_key_i2r_lane_3"])
        self._same("C_next", expand(cs2, b"next chain" + th4, 48), epoch["c_next"])
        self._same("chain id", expand(epoch["c_next"], b"chain id", 8), epoch["chain_id"])
        for entry in epoch["records"]:
            self._record(hs, epoch, entry)

    def _record(self, hs: dict[str, Any], epoch: dict[str, Any], entry: dict[str, Any]) -> None:
        record, from_i = entry["record"], entry["sender"] == "I"
        assert record[:4] == b"\x10\x01\0\0"
        self._same("receive index", record[4:8], hs["exchange"]["index_r" if from_i else "index_i"])
        assert int.from_bytes(record[8:16], "little") >> 63 == (entry["kind"] == "control")
        key = epoch["record_key_i2r" if from_i else "record_key_r2i"]
        self._same("record", self.aead(key).decrypt(record[4:16], record[16:], None), entry["plaintext"])

    def _datagrams(self, hs: dict[str, Any], messages: list[bytes]) -> None:
        gate, low, high = hs["gate"], hs["inputs"]["low"], hs["inputs"]["high"]
        for role in "IR":
            info = low + high + self.sites[role]["fingerprint"]
            prk = hmac384(b"qvpn1 gate", hs["inputs"]["psk"] or bytes(32))
            self._same("gk", expand(prk, info, 32), gate[f"gk_{role.lower()}"])
        address = ipaddress.IPv6Address("::ffff:192.0.2.1").packed + (51840).to_bytes(2, "big")
        self._same("cookie", mac16(gate["cookie_secret"], address), gate["cookie"])
        first, retry, *rest = hs["datagrams"]
        self._retry(gate, retry["datagrams"][0], first["datagrams"][0])
        for entry, message in zip([first, *rest], [messages[0], *messages], strict=True):
            gate_key = gate[f"gk_{entry['sender'].lower()}"]
            body = b"".join(self._fragment(gate, entry, raw, gate_key) for raw in entry["datagrams"])
            self._same("fragments", body, message)

    def _fragment(self, gate: dict[str, Any], entry: dict[str, Any], raw: bytes, gate_key: bytes) -> bytes:
        place = entry["datagrams"].index(raw)
        assert raw[:4] == bytes([entry["type"], 1, self.suite, place << 4 | len(entry["datagrams"])])
        assert len(raw) <= 1200
        self._same("mac1", mac16(gate_key, raw[:-32]), raw[-32:-16])
        self._same("mac2", mac16(gate["cookie"], raw[:-16]) if entry["cookie"] else bytes(16), raw[-16:])
        return raw[16:-32]

    def _retry(self, gate: dict[str, Any], retry: bytes, m1: bytes) -> None:
        assert len(retry) == 80
        self._same("RETRY head", bytes([5, 1, self.suite, 1]) + bytes(4) + m1[4:8] + m1[12:16], retry[:16])
        self._same("RETRY nonce", gate["retry_nonce"], retry[16:32])
        key = hmac.new(gate["gk_r"], b"cookie" + retry[16:32], hashlib.sha256).digest()
        self._same("cookie in RETRY", AESGCM(key).decrypt(bytes(12), retry[32:64], m1[-32:-16]), gate["cookie"])
        self._same("mac1 of RETRY", mac16(gate["gk_r"], retry[:64]), retry[64:])

    def _payloads(self, hs: dict[str, Any], messages: list[bytes]) -> None:
        for entry, message in zip(hs["payloads"], messages, strict=True):
            index = hs["exchange"]["index_r" if entry["type"] in (3, 6) else "index_i"]
            for place, payload in enumerate(entry["payloads"]):
                head = bytes([1, entry["type"], self.suite, place << 4 | len(entry["payloads"])])
                self._same("payload head", head, payload[:4])
                self._same("handshake index", index, payload[8:12])
            self._same("fragments", b"".join(payload[12:] for payload in entry["payloads"]), message)


def check(file: dict[str, Any]) -> int:
    """Raises AssertionError, InvalidSignature or InvalidTag at the first value that is not what the text says."""
    return Reader(file).check()
