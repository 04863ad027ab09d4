"""Every domain-separation label of protocol version 1, in one tree (PROTOCOL.md, chapters 3 to 5).

::

    gate             mac1 keys
    cookie           key that seals a cookie in RETRY
    kex, qkd         the two CasKDF rounds
    R auth, I auth,
    R degraded       what the signatures sign, and the context string of ML-DSA
    R confirm        key of confirm_R
    traffic I2R/R2I  traffic secrets, then "record key" per lane
    next chain       the chain secret, then "chain id"
"""

from __future__ import annotations

PROTOCOL = b"qvpn1"
GATE = b"qvpn1 gate"
COOKIE = b"cookie"
KEX = b"qvpn1 kex"
QKD = b"qvpn1 qkd"
SIGN_RESPONDER = b"qvpn1 R auth"
SIGN_INITIATOR = b"qvpn1 I auth"
SIGN_DEGRADED = b"qvpn1 R degraded"
CONFIRM = b"R confirm"
TRAFFIC_I2R = b"traffic I2R"
TRAFFIC_R2I = b"traffic R2I"
RECORD_KEY = b"record key"
NEXT_CHAIN = b"next chain"
CHAIN_ID = b"chain id"
