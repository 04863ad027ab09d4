"""Frames of the classical channel between Alice and Bob: kinds, payloads, checked decoding.

On the wire a frame is u32 big-endian length of what follows, u8 kind, payload.  Numbers are big-endian, bit strings
packed.  A block is strict question and answer, so the transcript has one order::

    A -> B  START      block u64, ticket u64, spent u64, refills u8
    B -> A  READY      spent u64
                       ... N pulses fly; nothing about them has left a site ...
    B -> A  DETECTED   count u32, positions count x u32 ascending, bases (1 = X) packed; E91: turned gates packed
    A -> B  SIFT       one byte per detection: 0 dropped, 1 key (Z), 2 check (X), + 4 for mu2, + 8 for mu3;
                       E91: 3 test, + 4 where she had X; her X bits packed, her test bits packed
    B -> A  CHECK      his X bits packed, his test bits packed
    A -> B  CORRECT    seed of the orders, 32 bytes
    B -> A  ASK        pass u8, positions n x u32            } repeated; positions as in ``distill.cascade.Question``
    A -> B  PARITY     n parities packed                     }
    B -> A  CORRECTED  --
    A -> B  VERIFY     Toeplitz seed packed, tag packed
    B -> A  ACCEPT     errors corrected, u32 per intensity
    A -> B  AMPLIFY    Toeplitz seed packed
    B -> A  AUTH       tag 0 over all above
    A -> B  AUTH       tag 1 over all above and tag 0
    B -> A  COMMIT     tag 2 over all above

Instead of its next frame either end may send ``ABORT`` (reason u8); then tags 0 and 1 follow, and no commit.
``HELLO``, ``CLAIMS``, ``INVITE``, ``PING`` and ``INTRODUCE`` belong to the connection, not to a block.  In a block
without a ticket (``ticket`` = :data:`~keysource.qkd.pad.SIGNED`) the three tags are signatures (``distill.signed``).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits, pack, unpack_untrusted
from keysource.qkd.distill.cascade import Question
from keysource.qkd.errors import BadFrame

MAX_FRAME = 256 * 1024 * 1024
_START = struct.Struct(">QQQB")
_READY = struct.Struct(">Q")
DROPPED, KEY, CHECKED, TEST = 0, 1, 2, 3
"""What becomes of a detection: the low two bits of its sifting code."""
INTENSITY = 2
"""Bits to the left at which a code has the number of the intensity, of a test Alice's basis."""


class Kind(enum.IntEnum):
    HELLO = 1
    CLAIMS = 2
    INVITE = 3
    PING = 4
    INTRODUCE = 5
    START = 10
    READY = 11
    DETECTED = 12
    SIFT = 13
    CHECK = 14
    CORRECT = 15
    ASK = 16
    PARITY = 17
    CORRECTED = 18
    VERIFY = 19
    ACCEPT = 20
    AMPLIFY = 21
    AUTH = 22
    COMMIT = 23
    ABORT = 30


class Reason(enum.IntEnum):
    """Why a block gives nothing."""

    SHORT = 1
    """Fewer detections than the sizes fixed for the block."""
    QBER = 2
    """More check errors than the plan allows."""
    LEAK = 3
    """Error correction would have disclosed more than its budget."""
    VERIFY = 4
    """The keys still differ after error correction."""
    STATISTICS = 5
    """The decoy bounds miss the plan's thresholds."""
    MONITOR = 6
    """A monitor of a site's detectors has fired."""
    CHSH = 7
    """E91: S is not five standard deviations above 2."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    payload: bytes = field(default=b"", repr=False)


def frame_untrusted(body: bytes) -> Frame:
    """A frame without its length."""
    try:
        return Frame(Kind(body[0]), bytes(body[1:]))
    except (ValueError, IndexError):
        raise BadFrame("a frame of unknown kind") from None


@dataclass(frozen=True, slots=True)
class Start:
    block: int
    ticket: int
    spent: int
    refills: int

    def frame(self) -> Frame:
        return Frame(Kind.START, _START.pack(self.block, self.ticket, self.spent, self.refills))

    @classmethod
    def from_untrusted(cls, payload: bytes) -> Start:
        return cls(*_unpack(_START, payload))


def ready(spent: int) -> Frame:
    return Frame(Kind.READY, _READY.pack(spent))


def ready_untrusted(payload: bytes) -> int:
    return int(_unpack(_READY, payload)[0])


def detected(positions: npt.NDArray[np.uint64], bases: Bits, angles: int = 2) -> Frame:
    """``bases``: 0 Z, 1 X; with four ``angles`` 2 and 3 are those of the CHSH test."""
    where = positions.astype(">u4").tobytes()
    turned = pack(bases >> np.uint8(1)) if angles > 2 else b""
    return Frame(Kind.DETECTED, len(positions).to_bytes(4, "big") + where + pack(bases & np.uint8(1)) + turned)


def detected_untrusted(payload: bytes, pulses: int, angles: int = 2) -> tuple[npt.NDArray[np.uint64], Bits]:
    """(pulse numbers, bases): ascending, inside the block."""
    count = int.from_bytes(payload[:4], "big")
    plane = (count + 7) // 8
    if len(payload) != 4 + 4 * count + plane * (angles // 2):
        raise BadFrame("a list of detections with a wrong length")
    positions = np.frombuffer(payload, dtype=">u4", count=count, offset=4).astype(np.uint32)
    if count and (int(positions[-1]) >= pulses or (positions[1:] <= positions[:-1]).any()):
        raise BadFrame("detections that do not ascend inside the block")
    start = 4 + 4 * count
    bases = unpack_untrusted(payload[start : start + plane], count)
    if angles > 2:
        bases = bases | unpack_untrusted(payload[start + plane :], count) << np.uint8(1)
    return positions.astype(np.uint64), bases


def sift(codes: Bits, check_bits: Bits, test_bits: Bits | None = None) -> Frame:
    return Frame(Kind.SIFT, codes.tobytes() + pack(check_bits) + (b"" if test_bits is None else pack(test_bits)))


def sift_untrusted(payload: bytes, bases: Bits, n_z: int, n_x: int, intensities: int = 2) -> tuple[Bits, Bits, Bits]:
    """(codes, Alice's check bits, her test bits) for detections made in ``bases``; exactly n_z key and n_x check
    positions."""
    count = len(bases)
    if len(payload) < count:
        raise BadFrame("a sifting answer that is too short")
    codes = np.frombuffer(payload, dtype=np.uint8, count=count)
    role = codes & 3
    is_key, is_check, is_test = (role == each for each in (KEY, CHECKED, TEST))
    most = np.array([1, intensities, intensities, 2], dtype=np.uint8)  # by role
    if ((codes >> INTENSITY) >= most[role]).any() or (is_test & (bases < 2)).any():
        raise BadFrame("a sifting answer with an unknown code")
    if (is_key & (bases != 0)).any() or (is_check & (bases != 1)).any():
        raise BadFrame("a sifting answer that takes a detection of the other basis")
    if np.count_nonzero(is_key) != n_z or np.count_nonzero(is_check) != n_x:
        raise BadFrame("a sifting answer of other sizes than the plan's")
    split = count + (n_x + 7) // 8
    tested = int(np.count_nonzero(is_test))
    return codes, unpack_untrusted(payload[count:split], n_x), unpack_untrusted(payload[split:], tested)


def check(check_bits: Bits, test_bits: Bits) -> Frame:
    return Frame(Kind.CHECK, pack(check_bits) + pack(test_bits))


def check_untrusted(payload: bytes, n_x: int, tested: int) -> tuple[Bits, Bits]:
    """(Bob's check bits, his test bits)."""
    split = (n_x + 7) // 8
    return unpack_untrusted(payload[:split], n_x), unpack_untrusted(payload[split:], tested)


def ask(question: Question) -> Frame:
    return Frame(Kind.ASK, bytes([question.number]) + question.positions.astype(">u4").tobytes())


def ask_untrusted(payload: bytes) -> Question:
    if len(payload) < 5 or len(payload) % 4 != 1:
        raise BadFrame("a parity question with a wrong length")
    return Question(payload[0], np.frombuffer(payload, dtype=">u4", offset=1).astype(np.uint32))


def hashed(kind: Kind, seed: Bits, tag: Bits | None = None) -> Frame:
    return Frame(kind, pack(seed) + (b"" if tag is None else pack(tag)))


def hashed_untrusted(payload: bytes, seed: int, tag: int) -> tuple[Bits, Bits]:
    """(Toeplitz seed, tag) of so many bits."""
    split = (seed + 7) // 8
    return unpack_untrusted(payload[:split], seed), unpack_untrusted(payload[split:], tag)


def accept(errors: tuple[int, ...]) -> Frame:
    return Frame(Kind.ACCEPT, b"".join(count.to_bytes(4, "big") for count in errors))


def accept_untrusted(payload: bytes, intensities: int = 2) -> tuple[int, ...]:
    if len(payload) != 4 * intensities:
        raise BadFrame("a frame of a wrong length")
    return tuple(int.from_bytes(payload[at : at + 4], "big") for at in range(0, len(payload), 4))


def abort(reason: Reason) -> Frame:
    return Frame(Kind.ABORT, bytes([reason]))


def abort_untrusted(payload: bytes) -> Reason:
    try:
        (code,) = payload
        return Reason(code)
    except ValueError:
        raise BadFrame("an abort without a known reason") from None


def _unpack(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    try:
        return form.unpack(payload)
    except struct.error:
        raise BadFrame("a frame of a wrong length") from None
