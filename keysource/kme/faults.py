"""``--fault NAME``: a KME that misbehaves on order, for demos and for people who test their own SAE.

Every fault leaves the store as consistent as it was: keys that go out wrong are as gone as keys that go out right.
How an answer is respelled as other KMEs do it, says :mod:`keysource.kme.spellings`.
"""

from __future__ import annotations

import enum
import secrets

SLOW_SECONDS = 5.0
SHORT_BYTES = 16


class Fault(enum.StrEnum):
    NONE = "none"
    DOWN = "down"  # no listener: neither SAEs nor the other KME get a connection
    SLOW = "slow"  # every answer to an SAE comes after 5 s; the key is consumed by then
    SERVICE_UNAVAILABLE = "503"  # every request of an SAE is answered 503, nothing is consumed
    EMPTY = "empty"  # as if no key were stored
    WRONG_KEY = "wrong-key"  # one byte of every key is flipped
    REPEATED_KEY = "repeated-key"  # the bytes of the first key under every further key_ID
    OUT_OF_STEP = "out-of-step"  # under each key_ID the bytes of the key before it
    WRONG_LENGTH = "wrong-length"  # keys of 128 bits
    UNAUTHORISED = "unauthorised"  # every request of an SAE is answered 401
    EXPIRED_CERTIFICATE = "expired-certificate"  # SAEs are shown a certificate whose time is over
    RESET = "reset"  # keys are consumed, then the connection is reset: no byte of an answer
    TORN = "torn"  # keys are consumed, then half of the answer, then a reset
    VENDOR_404 = "vendor-404"  # 404 where the standard has 400
    VENDOR_410 = "vendor-410"
    VENDOR_422 = "vendor-422"
    VENDOR_DETAIL = "vendor-detail"  # errors are {"detail": ...}
    VENDOR_HTML = "vendor-html"  # errors are HTML
    VENDOR_NULL = "vendor-null"  # optional fields are null, and there are fields that nobody knows
    VENDOR_UPPER = "vendor-upper"  # key_IDs in upper case


CUTS = (Fault.RESET, Fault.TORN)
"""Faults that cut the connection under an answer with keys."""


class FaultSwitch:
    """The fault that is on, and what it does to keys on their way out."""

    def __init__(self, fault: Fault = Fault.NONE) -> None:
        self._fault = fault
        self._repeated: bytes | None = None
        self._before: bytes | None = None

    @property
    def fault(self) -> Fault:
        return self._fault

    def set(self, fault: Fault) -> None:
        self._fault = fault
        self._repeated = self._before = None

    def spoil(self, material: bytearray) -> bytearray:
        """The bytes that go into an answer instead of ``material``."""
        match self._fault:
            case Fault.WRONG_KEY:
                material[0] ^= 0x01
            case Fault.WRONG_LENGTH:
                return material[:SHORT_BYTES]
            case Fault.REPEATED_KEY:
                if self._repeated is None:
                    self._repeated = bytes(material)
                material[:] = self._repeated
            case Fault.OUT_OF_STEP:
                before, self._before = self._before, bytes(material)
                if before is None or len(before) != len(material):  # the key before the first one is anybody's guess
                    before = secrets.token_bytes(len(material))
                material[:] = before
        return material


def fault_named(name: str) -> Fault:
    """Raises ``ValueError``, one sentence with the names there are."""
    try:
        return Fault(name)
    except ValueError:
        known = ", ".join(fault.value for fault in Fault)
        raise ValueError(f"unknown fault {name!r}; there are: {known}") from None
