"""Reads the vectors as a stranger with PROTOCOL.md alone would: nothing of qvpn, every value computed again."""

from hashlib import sha384
from hmac import digest as hmac
from io import BytesIO
from struct import unpack
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

FAMILY_1 = (mlkem.MLKEM768PrivateKey, mldsa.MLDSA65PublicKey, b"\1", 1088, 64 + 3309)  # bytes of ct, both signatures
FAMILY_3 = (mlkem.MLKEM1024PrivateKey, mldsa.MLDSA87PublicKey, b"\3", 1568, 64 + 4627)
SUITES: Any = {1: (AESGCM, *FAMILY_1), 2: (ChaCha20Poly1305, *FAMILY_1), 3: (AESGCM, *FAMILY_3)}


class Reader:
    def __init__(self, file: Any, given: Any) -> None:
        self.cold, self.suite, self.index = given["carrier"] == "cold", bytes([file["suite"]]), [bytes(4), bytes(4)]
        self.aead, self.kem, self.mldsa, fam, self.ct, self.sigs = SUITES[file["suite"]]
        self.ends, self.psk = (file["I"], file["R"]), bytes.fromhex(given["inputs"]["psk"] or "00" * 32)
        self.fprs = [sha384(fam + bytes.fromhex(s["ed25519_public"] + s["mldsa_public"])).digest() for s in self.ends]
        assert [fpr.hex() for fpr in self.fprs] == [site["fingerprint"] for site in self.ends], "fingerprint"
        groups = self.gate(given["gate"], *given["datagrams"]) if self.cold else given["payloads"]
        m1, m2, *rest = [self.message(*pair) for pair in zip(groups, (1, 2, 3, 4, 6, 4, 6, 4), strict=False)]
        self.exchange(given["inputs"] | given["exchange"] | given["m2"], m1, m2)
        for attempt, messages in enumerate(zip(given["rounds"], rest[::2], rest[1::2], strict=True)):
            self.round(attempt, *messages)

    def f(self, *parts: bytes) -> bytes:
        return sha384(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()

    def expand(self, prk: bytes, info: bytes, size: int) -> bytes:
        return HKDFExpand(SHA384(), size, info).derive(prk)

    def cascade(self, cs: bytes, key: bytes, a: bytes, b: bytes, label: bytes, info: bytes) -> Any:
        return unpack("48s96s", HKDF(SHA384(), 48 + 96, label, info).derive(hmac(cs, self.f(key, a, b), "sha384")))

    def check(self, section: Any, values: Any) -> None:
        for name in section.keys() & values.keys():  # what was computed under the name of a field must be that field
            assert section[name] == (values[name].hex() if isinstance(values[name], bytes) else values[name]), name

    def verify(self, site: int, label: bytes, data: bytes, signatures: bytes) -> None:
        ed, ml = (bytes.fromhex(self.ends[site][name]) for name in ("ed25519_public", "mldsa_public"))
        ed25519.Ed25519PublicKey.from_public_bytes(ed).verify(signatures[:64], label + data)
        self.mldsa.from_public_bytes(ml).verify(signatures[64:], label + data, label)

    def gate(self, given: Any, first: Any, retry: Any, *rest: Any) -> Any:
        info = b"".join(sorted(self.fprs))
        gk_i, gk_r = self.gk = [HKDF(SHA384(), 32, b"qvpn1 gate", info + fpr).derive(self.psk) for fpr in self.fprs]
        cookie = hmac(bytes.fromhex(given["cookie_secret"]), bytes.fromhex(given["address_i"]), "sha256")[:16]
        m1, answer, self.cookie = bytes.fromhex(first["datagrams"][0]), bytes.fromhex(retry["datagrams"][0]), cookie
        header, retry_nonce, sealed, mac1 = unpack("16s16s32s16s", answer)
        self.check(given, locals())
        assert header == b"\5\1" + self.suite + b"\1\0\0\0\0" + m1[4:8] + m1[12:16], "header of RETRY"
        opened = AESGCM(hmac(gk_r, b"cookie" + retry_nonce, "sha256")).decrypt(bytes(12), sealed, m1[-32:-16])
        assert mac1 == hmac(gk_r, answer[:64], "sha256")[:16] and opened == cookie, "mac1 or cookie of RETRY"
        assert self.message(first, 1) == self.message(rest[0], 1), "another M1"
        return rest

    def message(self, group: Any, type_: int) -> bytes:
        raws = sorted(map(bytes.fromhex, group["datagrams" if self.cold else "payloads"]), key=lambda raw: raw[3])
        from_r, (start, end, limit) = type_ in (2, 4), (16, -32, 1200) if self.cold else (12, None, 12 + 1100)
        self.index[from_r] = raws[0][start : start + 4] if type_ in (1, 2) else self.index[from_r]
        sender, receiver = self.index[from_r], self.index[not from_r]
        self.check(group, {"type": type_, "sender": "IR"[from_r]})
        rest = sender + receiver + raws[0][12:16] if self.cold else raws[0][4:8] + (receiver, sender)[type_ == 1]
        for n, raw in enumerate(raws):
            header = bytes([type_, 1] if self.cold else [1, type_]) + self.suite + bytes([n << 4 | len(raws)]) + rest
            assert raw.startswith(header) and raw[start:end] and limit >= len(raws[0]) >= len(raw), "header or length"
            assert len(raw) == len(raws[0]) or raw is raws[-1], "length of a fragment that is not the last"
            if self.cold:
                mac1 = hmac(self.gk[from_r], raw[:-32], "sha256")[:16]
                mac2 = hmac(self.cookie, raw[:-16], "sha256")[:16] if group["cookie"] else bytes(16)
                assert raw[-32:] == mac1 + mac2, "mac1 or mac2"
        return b"".join(raw[start:end] for raw in raws)

    def exchange(self, given: Any, m1: bytes, message: bytes) -> None:
        kem = self.kem.from_seed_bytes(bytes.fromhex(given["mlkem_seed"]))
        secret = x25519.X25519PrivateKey.from_private_bytes(bytes.fromhex(given["x25519_secret_i"]))
        publics = kem.public_key().public_bytes_raw() + secret.public_key().public_bytes_raw()
        index_i, shown, *chains = unpack(f"4s{len(publics)}s8s8s", m1)
        m2c, e2, chain = message[: 37 + self.ct], message[37 + self.ct :], bytes.fromhex(given["c_prev"] or "")
        index_r, ct, x_r, chain_sel = unpack(f"4s{self.ct}s32sB", m2c)
        assert [bytes(8), *chains][chain_sel] == (self.expand(chain, b"chain id", 8) if chain else bytes(8)), "chain"
        assert shown == publics and not (index_i[3] | index_r[3]) & 15, "public keys of M1, or an index with a lane"
        ss_mlkem, ss_x25519 = kem.decapsulate(ct), secret.exchange(x25519.X25519PublicKey.from_public_bytes(x_r))
        ctx = self.f(b"qvpn1", self.suite, *self.fprs, bytes([bool(given["psk"])]), given["epoch"].to_bytes(4, "big"))
        cs0 = HKDF.extract(SHA384(), chain or bytes(48), self.psk)
        cs1, km1 = self.cascade(cs0, ss_mlkem + ss_x25519, m1, m2c, b"qvpn1 kex", ctx)
        hk_r, iv_r, hk_i, iv_i = self.keys = unpack("32s12s32s12s", km1[:88])
        th1 = self.f(ctx, m1, m2c)
        plain = self.aead(hk_r).decrypt(iv_r, e2, th1)
        p2, signatures = plain[: -self.sigs], plain[-self.sigs :]
        th2, (low, high) = self.f(th1, p2), sorted(self.fprs)
        self.check(given, locals())
        self.verify(1, b"qvpn1 R auth", th2, signatures)
        self.payload(p2[:8], BytesIO(p2[8:]))
        self.ctx, self.cs1, self.last = ctx, cs1, (th2, e2)

    def payload(self, policy: bytes, c: BytesIO, n: int = 0) -> Any:
        key, last = None, -1
        if n:
            label, kind = c.read(c.read(1)[0]).decode("ascii"), c.read(1)[0]
            key_id = c.read(c.read(1)[0]).decode("ascii") if kind else str(UUID(bytes=c.read(16)))
            key = {"label": label, "key_id": key_id, "origin": c.read(1)[0], "hops": c.read(1)[0]}
        entry, tlvs = c.getvalue()[: c.tell()], BytesIO(c.read(int.from_bytes(c.read(2), "big")))
        while head := tlvs.read(4):
            number, size = unpack(">HH", head)
            assert len(tlvs.read(size)) == size and number % 0x8000 > last and number <= 0x8002, "TLV"
            last = number % 0x8000
        assert policy[0] in (1, 2, 3) and policy[2:4] == b"\1\0" and not c.read(), "policy, or bytes after the TLVs"
        return key, entry

    def round(self, attempt: int, given: Any, e3: bytes, e4: bytes) -> None:
        (hk_r, iv_r, hk_i, iv_i), aad3 = self.keys, self.f(*self.last) if attempt else self.last[0]
        plain = self.aead(hk_i).decrypt(iv_i[:11] + bytes([iv_i[11] ^ attempt]), e3, aad3)
        p3, signatures = plain[: -self.sigs], plain[-self.sigs :]
        th3 = self.f(*self.last, p3)
        th4 = self.f(th3, e3)
        self.verify(0, b"qvpn1 I auth", th3, signatures)
        p4 = self.aead(hk_r).decrypt(iv_r[:11] + bytes([iv_r[11] ^ (attempt + 1)]), e4, th4)
        (key, entry), (outcome, reason) = self.payload(p3[:8], BytesIO(p3[10:]), p3[9]), p4[:2]
        self.check(given, locals() | {"message_type": 6 if attempt else 3, "attempt": p3[8]})
        self.last, size = (th4, e4), 2 if outcome in (1, 4) else 34 + self.sigs * (outcome > 0)
        assert outcome in ((0, 1, 4) if key else (2, 3, 4)) and len(p4) == size and (reason > 0) == (size == 2), "P4"
        if outcome in (2, 3):
            self.verify(1, b"qvpn1 R degraded", th4 + p4[:1], p4[34:])
        if reason:
            return
        epoch, parts = given["epoch"], (entry, *(site["sae"].encode("ascii") for site in self.ends)) if key else ()
        k_qkd = bytes.fromhex(epoch["k_qkd"]) if key else b""
        keys = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        cs2, km2 = self.cascade(self.cs1, k_qkd, e3, p4[:1], b"qvpn1 qkd", self.f(self.ctx, keys, th4))
        confirm_r, c_next = p4[2:34], self.expand(cs2, b"next chain" + th4, 48)
        assert confirm_r == hmac(self.expand(km2[:48], b"R confirm" + th4, 32), th4, "sha384")[:32], "confirm_R"
        chain_id = self.expand(c_next, b"chain id", 8)
        traffic_i2r, traffic_r2i = (self.expand(km2[:48], b"traffic " + way + th4, 48) for way in (b"I2R", b"R2I"))
        record_key_i2r, record_key_r2i = (self.expand(ts, b"record key\0", 32) for ts in (traffic_i2r, traffic_r2i))
        record_key_i2r_lane_3 = self.expand(traffic_i2r, b"record key\3", 32)
        self.check(epoch, locals())
        for record in epoch["records"]:
            raw, from_r = bytes.fromhex(record["record"]), "IR".index(record["sender"])
            assert raw[:8] == b"\x10\1\0\0" + self.index[not from_r], "header of a record, or not lane 0"
            plaintext = self.aead(record_key_r2i if from_r else record_key_i2r).decrypt(raw[4:16], raw[16:], None)
            self.check(record, {"plaintext": plaintext, "kind": "control" if raw[15] & 0x80 else "data"})
        assert len({(r["sender"], r["record"][16:32]) for r in epoch["records"]}) == len(epoch["records"]), "counter"
