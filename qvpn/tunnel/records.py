"""Records: the only thing that travels between two sites once an epoch exists.  Layout as in PROTOCOL.md, "Records".

::

    0        1        2..3     4..7             8..15                    16..n-16      n-16..n
    0x10     0x01     zero     receive index    counter, little-endian   ciphertext    tag

Bytes 4..15 are the nonce as they stand.  There is no associated data: what the nonce does not cover (bytes 0..3) has
exactly one accepted value, so there is nothing to alter.  Bit 63 of the counter tells control records from data; it
is part of the nonce, so the two kinds have counters of their own under one key and cannot be turned into each other.

A batch of data records takes one block of 64 counters (:mod:`qvpn.tunnel.replay`); counters that are left over are
skipped.  :class:`Sealer` and :class:`Opener` do no I/O and know no time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import Cipher
from qvpn.tunnel.replay import BLOCK, INDEX_BITS, ReplayWindow

RECORD_TYPE = 0x10
WIRE_VERSION = 0x01
HEADER = 16
TAG = 16
OVERHEAD = HEADER + TAG
"""Bytes that a record adds to its plaintext."""

CONTROL_BIT = 1 << 63

PREFIX = bytes((RECORD_TYPE, WIRE_VERSION, 0, 0))

_U32 = struct.Struct(">I")
FIELDS = struct.Struct("<4s4sQ")
"""Prefix, receive index and counter with its control bit."""

_SEALED_HEADER = struct.Struct("<8sQ")
_AEAD: dict[Cipher, type[AESGCM] | type[ChaCha20Poly1305]] = {
    Cipher.AES_256_GCM: AESGCM,
    Cipher.CHACHA20_POLY1305: ChaCha20Poly1305,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """AEAD calls per key and direction.  Failed opens count apart: a forger must not use a key up."""

    rekey: int = 1 << 26
    """From here on a new epoch is wanted."""
    stop: int = 1 << 28
    """From here on nothing is sealed or opened any more."""
    failed_rekey: int = 1 << 20
    """Failed opens from which on a new epoch is wanted."""
    failed_stop: int = 1 << 36
    """Failed opens from which on nothing is opened any more."""


LIMITS = Limits()


class Refused(Exception):
    """A record that goes no further, and why."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def index_bytes(index: int) -> bytes:
    """A receive index as it stands in the header: the lane is in the low four bits of the last byte."""
    return _U32.pack(index)


def split_header(datagram: memoryview) -> tuple[bytes, int]:
    """(receive index, counter with its control bit) of a record.

    Raises :class:`Refused` with ``truncated``, ``bad_version`` or ``bad_header``.  Nothing is authenticated yet.
    """
    if len(datagram) < OVERHEAD:
        raise Refused(DropReason.TRUNCATED)
    prefix, index, counter = FIELDS.unpack_from(datagram)
    if prefix != PREFIX:
        other_version = prefix[0] == RECORD_TYPE and prefix[1] != WIRE_VERSION
        raise Refused(DropReason.BAD_VERSION if other_version else DropReason.BAD_HEADER)
    return index, counter


class Sealer:
    """The sending half of one epoch.  Never uses a counter twice; refuses when the limit is reached."""

    __slots__ = ("_control_counter", "_limits", "alert", "block", "calls", "encrypt", "head")

    def __init__(self, cipher: Cipher, key: bytes, index: int, limits: Limits = LIMITS) -> None:
        """``index`` is the receive index that the peer chose."""
        self.encrypt = _AEAD[cipher](key).encrypt_into
        """``encrypt(nonce, plaintext, None, out)``; only with counters from :meth:`take_block`, each once."""
        self.head = PREFIX + index_bytes(index)
        """The first eight bytes of every record."""
        self._limits = limits
        self.alert = limits.rekey
        """``calls`` from which on a new epoch is wanted."""
        self._control_counter = 0
        self.block = 0
        """The next unused block of data counters."""
        self.calls = 0

    def seal_batch(self, plaintexts: Sequence[memoryview], out: memoryview) -> list[int]:
        """Seal up to 64 plaintexts as data records, back to back into ``out``; returns each record's length.

        Raises :class:`Refused` with ``limit``, in which case nothing was sealed, and ValueError if there are more
        than 64 or ``out`` is too small.
        """
        if len(plaintexts) > BLOCK:
            raise ValueError(f"a batch has at most {BLOCK} records, not {len(plaintexts)}")
        counter = self.take_block(len(plaintexts))
        lengths, position = [], 0
        for plaintext in plaintexts:
            length = OVERHEAD + len(plaintext)
            self._seal(counter, plaintext, out[position : position + length])
            lengths.append(length)
            position += length
            counter += 1
        return lengths

    def seal_one(self, plaintext: memoryview, out: memoryview) -> memoryview:
        """Seal one data record to the start of ``out``; returns it.  Raises as :meth:`seal_batch`."""
        length = OVERHEAD + len(plaintext)
        _SEALED_HEADER.pack_into(out, 0, self.head, self.take_block(1))
        self.encrypt(out[4:HEADER], plaintext, None, out[HEADER:length])
        return out[:length]

    def take_block(self, calls: int) -> int:
        """The first of up to 64 counters that nobody else gets.  Raises :class:`Refused` with ``limit``."""
        spent = self.calls + calls
        if spent > self._limits.stop:
            raise Refused(DropReason.LIMIT)
        self.calls, block = spent, self.block
        self.block = block + 1
        return block << INDEX_BITS

    def seal_control(self, payload: bytes) -> bytes:
        """One control record.  Raises :class:`Refused` with ``limit``."""
        if self.calls >= self._limits.stop:
            raise Refused(DropReason.LIMIT)
        self.calls += 1
        counter = self._control_counter
        self._control_counter += 1
        record = bytearray(OVERHEAD + len(payload))
        self._seal(CONTROL_BIT | counter, payload, memoryview(record))
        return bytes(record)

    @property
    def wants_rekey(self) -> bool:
        return self.calls >= self._limits.rekey

    def _seal(self, counter: int, plaintext: memoryview | bytes, record: memoryview) -> None:
        _SEALED_HEADER.pack_into(record, 0, self.head, counter)
        self.encrypt(record[4:HEADER], plaintext, None, record[HEADER:])


class Opener:
    """The receiving half of one epoch: replay windows, tag, count of calls."""

    __slots__ = ("_limits", "alert", "calls", "control", "data", "decrypt", "failed")

    def __init__(self, cipher: Cipher, key: bytes, limits: Limits = LIMITS) -> None:
        self.decrypt = _AEAD[cipher](key).decrypt_into
        """``decrypt(nonce, ciphertext, None, out)``; only where :meth:`room` is true.

        The caller counts it in ``calls`` or ``failed`` and keeps the window.
        """
        self._limits = limits
        self.alert = limits.rekey
        """``calls`` from which on a new epoch is wanted."""
        self.data = ReplayWindow()
        self.control = ReplayWindow()
        self.calls = 0
        """Opens that succeeded."""
        self.failed = 0
        """Opens that failed: forged or damaged records."""

    def open(self, counter: int, datagram: memoryview, out: memoryview) -> int:
        """Open a record whose header :func:`split_header` read; returns the length of the plaintext in ``out``.

        Raises :class:`Refused` with ``replay``, ``limit`` or ``authentication``.  After the last, what stands in
        ``out`` is garbage that the forger chose part of: it must be overwritten or thrown away, never passed on.
        """
        length = self.decipher(counter, datagram, out)
        self.window(counter).mark(counter & (CONTROL_BIT - 1))
        return length

    def decipher(self, counter: int, datagram: memoryview, out: memoryview) -> int:
        """As :meth:`open`, but the counter is left for the caller to mark."""
        window, limits = self.control if counter & CONTROL_BIT else self.data, self._limits
        number = counter & (CONTROL_BIT - 1)
        if number <= window.highest and not window.fresh(number):  # what is above the highest always is
            raise Refused(DropReason.REPLAY)
        if self.calls >= limits.stop or self.failed >= limits.failed_stop:
            raise Refused(DropReason.LIMIT)
        length = len(datagram) - OVERHEAD
        try:
            self.decrypt(datagram[4:HEADER], datagram[HEADER:], None, out[:length])
        except InvalidTag:
            self.failed += 1
            raise Refused(DropReason.AUTHENTICATION) from None
        self.calls += 1
        return length

    def room(self, calls: int) -> bool:
        """Whether so many more records may be opened."""
        return self.calls + calls <= self._limits.stop and self.failed < self._limits.failed_stop

    def run_mask(self, counter: int, count: int) -> int:
        """For :meth:`~qvpn.tunnel.replay.ReplayWindow.mark_run`: the places in their block of so many data counters.

        0 if one of them is not fresh, or if there is no :meth:`room` for so many.
        """
        limits, data = self._limits, self.data
        if self.calls + count > limits.stop or self.failed >= limits.failed_stop:
            return 0
        mask = ((1 << count) - 1) << (counter & (BLOCK - 1))
        return mask if counter > data.highest or data.run_fresh(counter >> INDEX_BITS, mask) else 0

    def window(self, counter: int) -> ReplayWindow:
        """The window this counter belongs to, by its control bit."""
        return self.control if counter & CONTROL_BIT else self.data

    @property
    def marked(self) -> int:
        """Counters marked in both windows."""
        return self.data.marked + self.control.marked

    @property
    def wants_rekey(self) -> bool:
        return self.calls >= self._limits.rekey or self.failed >= self._limits.failed_rekey
