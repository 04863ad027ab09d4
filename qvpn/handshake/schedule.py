"""The key schedule, step by step as PROTOCOL.md chapter 5 writes it.  Pure functions of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qvpn.crypto import kdf, labels
from qvpn.wire.codec import encode_key
from qvpn.wire.messages import KeyName, Outcome

NO_PSK = bytes(32)


@dataclass(frozen=True, slots=True)
class Kex:
    """After the key exchange: what protects M2 to M4."""

    ctx: bytes
    chain_secret: bytes = field(repr=False)
    hk_r: bytes = field(repr=False)
    iv_r: bytes = field(repr=False)
    hk_i: bytes = field(repr=False)
    iv_i: bytes = field(repr=False)
    th1: bytes = field(default=b"")


@dataclass(frozen=True, slots=True)
class Final:
    """After the QKD round: what the epoch is made of."""

    confirm: bytes = field(repr=False)
    traffic_i2r: bytes = field(repr=False)
    traffic_r2i: bytes = field(repr=False)
    chain: bytes = field(repr=False)
    """C_next."""

    def record_key(self, initiator_sends: bool, lane: int) -> bytes:
        """32 bytes: the key of one direction and lane."""
        secret = self.traffic_i2r if initiator_sends else self.traffic_r2i
        return kdf.expand(secret, labels.RECORD_KEY + bytes([lane]), 32)


def context(suite: int, fpr_i: bytes, fpr_r: bytes, psk: bytes | None, epoch: int) -> bytes:
    return kdf.digest(
        labels.PROTOCOL,
        bytes([suite]),
        fpr_i,
        fpr_r,
        bytes([psk is not None]),
        epoch.to_bytes(4, "big"),
    )


def key_exchange(
    ctx: bytes, chain: bytes | None, psk: bytes | None, secret: bytes, m1: bytes, m2_clear: bytes
) -> Kex:
    """``chain``: C_prev or None.  ``secret``: ``ss_mlkem ‖ ss_x25519``, 64 bytes."""
    cs0 = kdf.extract(chain or kdf.ZERO_HASH, psk or NO_PSK)
    cs1, km = kdf.cas_kdf(cs0, secret, m1, m2_clear, labels.KEX, ctx)
    return Kex(ctx, cs1, km[:32], km[32:44], km[44:76], km[76:88], kdf.digest(ctx, m1, m2_clear))


def th2(th1: bytes, p2: bytes) -> bytes:
    return kdf.digest(th1, p2)


def th3(before: bytes, sealed: bytes, p3: bytes) -> bytes:
    """First round: (th2, E2, P3).  M3R: (th4 and E4 of the round before, P3R)."""
    return kdf.digest(before, sealed, p3)


def th4(th3_: bytes, e3: bytes) -> bytes:
    return kdf.digest(th3_, e3)


def retry_aad(th4_: bytes, e4: bytes) -> bytes:
    """AAD of M3R."""
    return kdf.digest(th4_, e4)


def keys_info(keys: Sequence[KeyName], sae_i: str, sae_r: str) -> bytes:
    """``LP(key) ‖ LP(sae_I) ‖ LP(sae_R)`` of each key; empty for n = 0."""
    return b"".join(kdf.lp(encode_key(key)) + kdf.lp(sae_i.encode()) + kdf.lp(sae_r.encode()) for key in keys)


def qkd_round(kex: Kex, secret: bytes, e3: bytes, outcome: Outcome, keys: bytes, th4_: bytes) -> Final:
    """``secret``: the 32 bytes of the source for OK, empty for CHAINED and ABSENT; ``keys``: :func:`keys_info`."""
    info = kdf.digest(kex.ctx, keys, th4_)
    cs2, km = kdf.cas_kdf(kex.chain_secret, secret, e3, bytes([outcome]), labels.QKD, info)
    master = km[:48]
    confirm_key = kdf.expand(master, labels.CONFIRM + th4_, 32)
    return Final(
        kdf.hmac384(confirm_key, th4_)[:32],
        kdf.expand(master, labels.TRAFFIC_I2R + th4_, 48),
        kdf.expand(master, labels.TRAFFIC_R2I + th4_, 48),
        kdf.expand(cs2, labels.NEXT_CHAIN + th4_, 48),
    )


def chain_id(chain: bytes) -> bytes:
    return kdf.expand(chain, labels.CHAIN_ID, 8)
